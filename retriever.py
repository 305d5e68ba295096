"""Passages: a JSON-lines corpus, an encoder, and exact inner-product search over its vectors.

The paper's search engine R: E5 vectors, a flat index, the top 3 passages (Jin et al. 2025). Row i
of an index is line i of the corpus, {"id", "contents"} with contents = '"Title"', newline, text.
Departures from the official code: an index of another corpus or encoder is refused, and equal
scores are ordered by row. Legend: B queries, N passages (C a chunk, K a query), D width.

    python retriever.py build --corpus FILE --encoder DIR --out DIR     # goes on where it stopped
    python retriever.py search "who wrote ..." --corpus FILE --encoder DIR --index DIR
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Passage
from encoder import Encoder, load_encoder
from infra.checkpoint import write_aside
from infra.files import parse_object, read_json, replace_surrogates

WORLD = Path(__file__).resolve().parent / "world"
EMBED_ROWS = 8192  # passages a chunk of `build`; sorted by length within
CHUNK_ELEMENTS = 2**26  # scores, or vectors, held as fp32 at once: 256 MiB of each
MIN_COSINE = 0.99  # of passage 0 stored and embedded again; fp16 encoders stay above 0.999


class Corpus:
    """A corpus file, which stays on disk: the offsets of 21 million lines take 168 MB of memory."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: got no such file, expected a corpus (JSON lines)")
        self._file = self.path.open("rb")
        ends, position, digest = [np.zeros(1, np.int64)], 0, hashlib.sha256()
        while block := self._file.read(2**24):  # a line at a time is ten times as slow
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            digest.update(block)
            position += len(block)
        if not position:
            raise ValueError(f"{path}: got an empty file, expected a passage a line")
        offsets = np.concatenate(ends)
        self._offsets = offsets if offsets[-1] == position else np.append(offsets, position)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, row: int) -> tuple[str, str]:
        """(id, contents) of a row. Bytes that are not UTF-8 and lone surrogates become U+FFFD."""
        start, end = self._offsets[row], self._offsets[row + 1]
        line = os.pread(self._file.fileno(), end - start, start).decode("utf-8", "replace")
        where = f"{self.path}:{row + 1}"
        record = parse_object(line.removeprefix("\ufeff"), where)
        name, contents = record.get("id"), record.get("contents")
        if not isinstance(name, str | int) or not isinstance(contents, str):
            raise ValueError(f"{where}: got {line[:80]!r}, expected an id and the string contents")
        return str(name), contents

    def passage(self, row: int, score: float) -> Passage:
        name, contents = self.read(row)
        title, text = contents.split("\n", 1) if "\n" in contents else ("", contents)
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return Passage(name, title, text, score)


class TorchIndex:
    def __init__(self, vectors: Tensor) -> None:  # [N, D], any float type
        self.vectors, self.num_rows = vectors, len(vectors)
        self.first: Tensor | None = vectors[0].float().cpu()  # [D], to recognise the encoder by

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Best inner products of queries [B, D], equal ones by row: scores, rows [B, K]."""
        queries, scores, rows = queries.to(self.vectors.device), [], []
        num_rows = max(1, CHUNK_ELEMENTS // max(queries.shape))
        for start in range(0, self.num_rows, num_rows):
            products = queries @ self.vectors[start : start + num_rows].float().T  # [B, C], fp32
            best, columns = _top(products, top_k)
            scores.append(best)
            rows.append(columns + start)
        best, columns = _top(torch.cat(scores, 1), top_k)  # equal scores are in order of rows
        return best.cpu().numpy(), torch.cat(rows, 1).gather(1, columns).cpu().numpy()


def _top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """topk of scores [B, C] that prefers the lower column on ties; torch.topk takes any."""
    k = min(top_k, scores.shape[1])
    best, columns = scores.topk(k)  # [B, K]
    is_open = (scores >= best[:, -1:]).sum(1) > k  # [B]: ties for the last place
    ordered = scores[is_open].argsort(dim=1, descending=True, stable=True)
    columns[is_open] = ordered[:, :k]
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


def _faiss() -> ModuleType:
    try:
        import faiss  # here, because it is optional, large, and slow to import
    except ImportError as error:
        raise ImportError(f"faiss: got {error}, expected it; pip install faiss-gpu (Linux x86-64) "
                          "or let torch search an index folder, or none") from error
    return faiss


class FaissIndex:
    def __init__(self, path: Path, device: torch.device) -> None:
        faiss = _faiss()
        self.index = index = faiss.read_index(str(path))
        self.num_rows = index.ntotal
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: got another metric, expected inner product")
        is_flat = isinstance(index, faiss.IndexFlat)  # others may not be able to return a vector
        self.first = torch.from_numpy(index.reconstruct(0)) if is_flat and self.num_rows else None
        # "cuda" means all GPUs. Asked for GPUs that are not there, faiss gives an empty index.
        if device.type == "cuda" and (num_gpus := faiss.get_num_gpus()):
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = options.shard = True
            gpus = list(range(num_gpus)) if device.index is None else [device.index]
            self.index = faiss.index_cpu_to_gpus_list(index, options, gpus=gpus)

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.index.search(queries.cpu().numpy(), min(top_k, self.num_rows))
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class Retriever:
    def __init__(self, corpus: Corpus, encoder: Encoder, index: TorchIndex | FaissIndex) -> None:
        self.corpus, self.encoder, self.index = corpus, encoder, index

    @classmethod
    def load(cls, corpus: Path | str, encoder: Path | str | Encoder, *,
             index: Path | str | None = None, backend: str = "auto",
             device: torch.device | str = "cpu") -> "Retriever":
        """index: a folder of `build`, a faiss file, or None: the corpus is embedded now."""
        if backend not in ("auto", "torch", "faiss") or (index is None and backend == "faiss"):
            raise ValueError(f"backend: got {backend!r} with index {index}, expected auto, torch, "
                             "or faiss with an index")
        lines, device = Corpus(corpus), torch.device(device)
        if not isinstance(encoder, Encoder):
            encoder = load_encoder(encoder, device=device)
        if index is not None:
            return cls(lines, encoder, _open_index(Path(index), lines, encoder, backend, device))
        vectors = torch.cat([chunk for _, chunk in embed_corpus(lines, encoder)])  # [N, D]
        return cls(lines, encoder, TorchIndex(vectors.to(device)))

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        """The best passages of each query, best first; all of them in a corpus below top_k."""
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if not queries:
            return []
        vectors = self.encoder.embed(list(map(replace_surrogates, queries)), kind="query")  # [B, D]
        scores, rows = self.index.search(vectors, top_k)
        return [  # faiss writes row -1 for a place that it could not fill
            [self.corpus.passage(row, score) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]


def embed_corpus(corpus: Corpus, encoder: Encoder, *, start: int = 0,
                 batch_size: int = 64) -> Iterator[tuple[int, Tensor]]:
    """(first row, vectors [C, D]) of chunks of passages, from row `start` on."""
    for first in tqdm(range(start, len(corpus), EMBED_ROWS), "embed", unit=" chunks"):
        rows = range(first, min(first + EMBED_ROWS, len(corpus)))
        contents = [corpus.read(row)[1] for row in rows]
        yield first, encoder.embed(contents, kind="passage", batch_size=batch_size)


def _facts(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What vectors depend on, apart from the encoder's weights."""
    return {"rows": len(corpus), "dim": encoder.config["hidden_size"], "prefixes": encoder.prefixes,
            "max_tokens": encoder.tokenizer.truncation["max_length"],
            "corpus_sha256": corpus.sha256}


def _open_index(path: Path, corpus: Corpus, encoder: Encoder, backend: str,
                device: torch.device) -> TorchIndex | FaissIndex:
    """The index at a path; ValueError if it was made from another corpus or encoder."""
    expected = {**_facts(corpus, encoder), "done": len(corpus)}
    stored, needed = expected, [path]  # a faiss file does not say what it was made from
    if path.is_dir():
        name = "index.faiss" if backend == "faiss" else "embeddings.npy"
        needed = [path / "index.json", path / name]
        stored = {"done": len(corpus), **read_json(needed[0], {})}
    missing = [file.name for file in needed if not file.is_file()]
    if missing or (path.is_file() and backend == "torch"):
        raise FileNotFoundError(f"index: got {path} without {missing}, expected a folder that "
                                "`python retriever.py build` (for backend faiss: with --faiss) has "
                                "written, or, not for torch, a faiss file")
    file = needed[-1]
    if file.suffix == ".npy":  # mode "c": read as searched, and torch may write to it
        index = TorchIndex(torch.from_numpy(np.load(file, mmap_mode="c")).to(device))
    else:
        index = FaissIndex(file, device)
    got = {key: stored.get(key) for key in expected} | {"rows": index.num_rows}
    if index.first is not None:
        got["dim"] = len(index.first)
        if got == expected:  # vectors of another encoder may well have the same width
            vector = encoder.embed([corpus.read(0)[1]], kind="passage")[0].cpu()  # [D]
            cosine = float(torch.cosine_similarity(vector, index.first, dim=0))
            expected["cosine"], got["cosine"] = 1.0, 1.0 if cosine >= MIN_COSINE else cosine
    for key, value in expected.items():
        if got[key] != value:
            raise ValueError(f"{path}: got an index with {key} {got[key]}, expected {value}, as "
                             f"{corpus.path} and the encoder have it; build it again from these")
    return index


def build(corpus: Path, encoder: str, out: Path, *, device: str = "cpu", batch_size: int = 64,
          dtype: str = "float16", with_faiss: bool = False) -> None:
    """Write OUT/embeddings.npy, and OUT/index.json: what it is made of, how many rows are done."""
    faiss = _faiss() if with_faiss else None  # if it is missing, say so now and not after hours
    lines = Corpus(corpus)
    encoder_dtype = torch.float32 if device == "cpu" else torch.float16
    model = load_encoder(encoder, device=device, dtype=encoder_dtype)
    facts = {"encoder": encoder, "dtype": dtype, **_facts(lines, model)}
    out.mkdir(parents=True, exist_ok=True)
    before = read_json(out / "index.json", {})
    start = before.pop("done", 0)
    goes_on = 0 < start < len(lines) and before == facts and (out / "embeddings.npy").is_file()
    mode, start = ("r+", start) if goes_on else ("w+", 0)
    for name in () if start else ("index.json", "index.faiss", "embeddings.npy"):
        (out / name).unlink(missing_ok=True)  # a reader of the old vectors keeps them
    vectors = np.lib.format.open_memmap(out / "embeddings.npy", mode=mode, dtype=dtype,
                                        shape=(len(lines), facts["dim"]))
    for first, chunk in embed_corpus(lines, model, start=start, batch_size=batch_size):
        vectors[first : first + len(chunk)] = chunk.cpu().numpy()
        vectors.flush()
        text = json.dumps({**facts, "done": first + len(chunk)}, indent=1) + "\n"
        write_aside(out / "index.json", lambda path, text=text: path.write_text(text))
    if faiss is not None:
        index = faiss.IndexFlatIP(facts["dim"])
        for first in range(0, len(vectors), EMBED_ROWS):
            index.add(vectors[first : first + EMBED_ROWS].astype(np.float32))
        write_aside(out / "index.faiss", lambda path: faiss.write_index(index, str(path)))
    print(f"{out}: {len(lines)} passages, {vectors.nbytes / 2**30:.2f} GiB of {dtype}")


def main() -> None:
    parser = argparse.ArgumentParser("retriever.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="embed a corpus")
    search = commands.add_parser("search", help="print the passages for queries")
    for command in (make, search):
        command.add_argument("--corpus", type=Path, default=WORLD / "corpus.jsonl")
        command.add_argument("--encoder", default=str(WORLD / "encoder"), help="folder or model id")
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    make.add_argument("--out", type=Path, required=True, help="folder of the index")
    make.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    make.add_argument("--batch-size", type=int, default=64, help="passages at once")
    make.add_argument("--with-faiss", "--faiss", action="store_true", help="and index.faiss")
    search.add_argument("queries", nargs="+")
    search.add_argument("--index", type=Path, help="folder, or faiss file; default: embed now")
    search.add_argument("--backend", choices=("auto", "torch", "faiss"), default="auto")
    search.add_argument("--top-k", type=int, default=3, help="passages a query")
    options = vars(parser.parse_args())
    try:
        if options.pop("command") == "build":
            return build(**options)
        queries, top_k = options.pop("queries"), options.pop("top_k")
        results = Retriever.load(**options).search(queries, top_k)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"retriever.py: {error}")
    for query, passages in zip(queries, results, strict=True):
        print(f"\n{query}")
        for passage in passages:
            print(f"{passage.score:.4f}  [{passage.id}] {passage.title}: {passage.text}")


if __name__ == "__main__":
    main()
