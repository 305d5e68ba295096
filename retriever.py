"""Passages: a JSON-lines corpus, an encoder, and an exact inner-product index over its vectors.

The paper's search engine R: E5 vectors, flat index, top 3 passages (Jin et al. 2025). Row i of an
index is line i of the corpus, {"id", "contents"} with contents = '"Title"', newline, text.

Departures from the official code:
1. Exact search in torch is the default: the passages of faiss Flat, without faiss. faiss files are
   read too, the published e5_Flat.index among them.
2. An index that does not belong to corpus and encoder is refused: its passages would be wrong.
3. Equal scores are ordered by row, so that a search repeats; faiss chooses among ties by itself.

The corpus stays on disk, and a search reads its passages: 21 million cost 168 MB. Bytes that are not
UTF-8 and lone surrogates (a JSON escape can write them) become U+FFFD.

    python retriever.py build --corpus FILE --encoder DIR --out DIR     # goes on where it stopped
    python retriever.py search "who wrote ..." --corpus FILE --encoder DIR --index DIR

Legend: N passages, B queries, D width, K passages a query, C passages a chunk.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import parse_object, replace_surrogates
from model import Encoder, load_encoder

WORLD = Path(__file__).resolve().parent / "world"
EMBED_ROWS = 8192  # passages between two flushes of `build`; sorted by length within
CHUNK_ELEMENTS = 2**26  # scores, or vectors, held as fp32 at once: 256 MiB of each
MIN_COSINE = 0.99  # passage 0 stored and embedded again; fp16 encoders stay above 0.999


class Passage(NamedTuple):
    id: str
    title: str  # without its quotes; empty where contents is a single line
    text: str
    score: float


class Corpus:
    """The lines of a corpus file by their byte offsets."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: got no such file, expected a corpus (JSON lines)")
        self._file = self.path.open("rb")
        ends, position, digest = [np.zeros(1, np.int64)], 0, hashlib.sha256()
        while block := self._file.read(2**24):
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
        """(id, contents) of a row."""
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
        title, newline, text = contents.partition("\n")
        if not newline:
            title, text = "", contents
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return Passage(name, title, text, score)


def flat_search(
    vectors: Tensor, queries: Tensor, top_k: int, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best inner products of each query, equal ones by row: scores [B, K], rows [B, K].

    vectors [N, D] of any float type, queries [B, D] fp32, on one device; products are fp32.
    """
    chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // max(queries.shape))
    scores = queries.new_empty(len(queries), 0)  # [B, K]
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)  # [B, K]
    for start in range(0, len(vectors), chunk_rows):
        products = queries @ vectors[start : start + chunk_rows].float().T  # [B, C]
        found, columns = _top(products, top_k)
        scores, rows = torch.cat([scores, found], 1), torch.cat([rows, columns + start], 1)
        scores, columns = _top(scores, top_k)  # among equal scores, columns are in order of rows
        rows = rows.gather(1, columns)
    return scores, rows


def _top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """topk of scores [B, C] that prefers the lower column on ties; torch.topk takes any."""
    k = min(top_k, scores.shape[1])
    best, columns = scores.topk(k)  # [B, K]
    is_open = (scores >= best[:, -1:]).sum(1) > k  # [B]: ties for the last place
    if is_open.any():
        ordered = scores[is_open].argsort(dim=1, descending=True, stable=True)
        columns[is_open] = ordered[:, :k]
    columns = columns.sort(dim=1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return best, columns.gather(1, order)


class TorchIndex:
    def __init__(self, vectors: Tensor) -> None:  # [N, D]
        self.vectors, self.num_rows = vectors, len(vectors)
        self.first: Tensor | None = vectors[0].float().cpu()  # [D], to recognise the encoder by

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = flat_search(self.vectors, queries.to(self.vectors.device), top_k)
        return scores.cpu().numpy(), rows.cpu().numpy()


class FaissIndex:
    def __init__(self, path: Path, device: torch.device) -> None:
        faiss = _faiss()
        self.index = index = faiss.read_index(str(path))
        self.num_rows = index.ntotal
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: got another metric, expected inner product")
        is_flat = isinstance(index, faiss.IndexFlat)  # others may not be able to give a vector back
        self.first = torch.from_numpy(index.reconstruct(0)) if is_flat and self.num_rows else None
        # Asked for GPUs that it does not have, faiss gives an empty index and says nothing.
        if device.type == "cuda" and (num_gpus := faiss.get_num_gpus()):
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16 = options.shard = True
            gpus = list(range(num_gpus)) if device.index is None else [device.index]
            self.index = faiss.index_cpu_to_gpus_list(index, options, gpus=gpus)

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.index.search(queries.cpu().numpy(), min(top_k, self.num_rows))
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _faiss() -> ModuleType:
    try:
        import faiss  # lazy: optional, large, and slow to import
    except ImportError as error:
        raise ImportError(
            f"faiss: got {error}, expected it for this index; pip install faiss-gpu (Linux x86-64), "
            "or let torch search: an index folder or none, and not --backend faiss"
        ) from error
    return faiss


class Retriever:
    def __init__(self, corpus: Corpus, encoder: Encoder, index: TorchIndex | FaissIndex) -> None:
        self.corpus, self.encoder, self.index = corpus, encoder, index

    @classmethod
    def load(
        cls, corpus: Path | str, encoder: Path | str | Encoder, *, index: Path | str | None = None,
        backend: str = "auto", device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Retriever":  # fmt: skip
        """index: a folder of `build`, a faiss file, or None: the corpus is embedded now.

        backend "auto" is faiss for a faiss file, else torch. On "cuda" faiss takes all GPUs, on
        "cuda:1" that one. dtype: of vectors embedded now, and of the encoder where device is no CPU.
        """
        if backend not in ("auto", "torch", "faiss"):
            raise ValueError(f"backend: got {backend!r}, expected auto, torch or faiss")
        lines, device = Corpus(corpus), torch.device(device)
        if not isinstance(encoder, Encoder):
            encoder_dtype = torch.float32 if device.type == "cpu" else dtype  # CPUs crawl in fp16
            encoder = load_encoder(encoder, dtype=encoder_dtype, device=device)
        if index is not None:
            return cls(lines, encoder, _open_index(Path(index), lines, encoder, backend, device))
        if backend == "faiss":
            raise ValueError("index: got none for backend faiss, expected a faiss file or a folder")
        vectors = torch.cat([v.to(device, dtype) for _, v in embed_corpus(lines, encoder)])
        return cls(lines, encoder, TorchIndex(vectors))

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        """The best passages of each query, best first; all of them in a corpus below top_k."""
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if not queries:
            return []
        vectors = self.encoder.embed(list(map(replace_surrogates, queries)), kind="query")  # [B, D]
        scores, rows = self.index.search(vectors, top_k)
        return [  # row -1 is faiss's word for a place that it could not fill
            [self.corpus.passage(row, score) for score, row in zip(*pair, strict=True) if row >= 0]
            for pair in zip(scores.tolist(), rows.tolist(), strict=True)
        ]


def embed_corpus(
    corpus: Corpus, encoder: Encoder, *, start: int = 0, batch_size: int = 64
) -> Iterator[tuple[int, Tensor]]:
    """(row of the first, vectors [C, D]) of the passages from row `start` on, in chunks."""
    with tqdm(total=len(corpus), initial=start, desc="embed", unit=" passages") as bar:
        for first in range(start, len(corpus), EMBED_ROWS):
            rows = range(first, min(first + EMBED_ROWS, len(corpus)))
            contents = [corpus.read(row)[1] for row in rows]
            yield first, encoder.embed(contents, kind="passage", batch_size=batch_size)
            bar.update(len(rows))


def _facts(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What vectors depend on, beside the encoder's weights."""
    return {"rows": len(corpus), "dim": encoder.config["hidden_size"], "prefixes": encoder.prefixes,
            "max_tokens": encoder.tokenizer.truncation["max_length"],
            "corpus_sha256": corpus.sha256}  # fmt: skip


def _open_index(
    path: Path, corpus: Corpus, encoder: Encoder, backend: str, device: torch.device
) -> TorchIndex | FaissIndex:
    file, expected = path, _facts(corpus, encoder)
    got: dict[str, Any] = dict(expected)
    if path.is_dir():
        file = path / ("index.faiss" if backend == "faiss" else "embeddings.npy")
        if (path / "index.json").is_file():
            stored = json.loads((path / "index.json").read_text(encoding="utf-8"))
            got = {key: stored.get(key) for key in expected}
        else:  # not finished
            file = path / "index.json"
    if not file.is_file() or (file == path and backend == "torch"):
        raise FileNotFoundError(
            f"index: got {path} without {file.name}, expected a folder that `python retriever.py "
            "build` (for backend faiss: with --faiss) has written, or, not for torch, a faiss file"
        )
    index: TorchIndex | FaissIndex
    if file.name == "embeddings.npy":  # mode "c": read as searched, and torch may write to it
        index = TorchIndex(torch.from_numpy(np.load(file, mmap_mode="c")).to(device))
    else:
        index = FaissIndex(file, device)
    got["rows"] = index.num_rows
    if index.first is not None:  # another encoder's vectors may well have the same width
        vector = encoder.embed([corpus.read(0)[1]], kind="passage")[0].cpu()  # [D]
        got["dim"] = len(index.first)
        if got == expected:
            cosine = float(torch.cosine_similarity(vector, index.first, dim=0))
            expected["cosine"], got["cosine"] = 1.0, 1.0 if cosine >= MIN_COSINE else cosine
    for key, value in expected.items():
        if got[key] != value:
            raise ValueError(
                f"{path}: got an index with {key} {got[key]}, expected {value}, as {corpus.path} and "
                "the encoder have it; name those it was built from, or build it again"
            )
    return index


def build(corpus: Path, encoder: str, out: Path, *, device: str = "cpu", batch_size: int = 64,
          dtype: str = "float16", with_faiss: bool = False) -> None:  # fmt: skip
    """OUT/embeddings.npy, OUT/index.faiss if asked for, and last OUT/index.json, which vouches."""
    faiss = _faiss() if with_faiss else None  # missing? say so now, not after hours
    lines = Corpus(corpus)
    encoder_dtype = torch.float32 if device == "cpu" else torch.float16
    model = load_encoder(encoder, device=device, dtype=encoder_dtype)
    facts = {"encoder": encoder, "dtype": dtype} | _facts(lines, model)
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("index.json", "index.faiss"):
        (out / stale).unlink(missing_ok=True)
    partial, progress = out / "embeddings.npy.partial", out / "progress.json"
    before = json.loads(progress.read_text()) if partial.is_file() and progress.is_file() else {}
    start = before.pop("done", 0)
    if start and before == facts:
        vectors = np.lib.format.open_memmap(partial, mode="r+")
    else:
        shape, start = (len(lines), facts["dim"]), 0
        vectors = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
    for first, chunk in embed_corpus(lines, model, start=start, batch_size=batch_size):
        vectors[first : first + len(chunk)] = chunk.cpu().numpy()
        vectors.flush()
        _write_json(progress, facts | {"done": first + len(chunk)})
    if faiss is not None:
        index = faiss.IndexFlatIP(facts["dim"])
        for first in range(0, len(vectors), EMBED_ROWS):
            index.add(vectors[first : first + EMBED_ROWS].astype(np.float32))
        faiss.write_index(index, str(out / "index.faiss.partial"))
        os.replace(out / "index.faiss.partial", out / "index.faiss")
    os.replace(partial, out / "embeddings.npy")
    _write_json(out / "index.json", facts)
    progress.unlink()
    print(f"{out}: {len(lines)} passages, {vectors.nbytes / 2**30:.2f} GiB of {dtype}")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser("retriever.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="embed a corpus")
    search = commands.add_parser("search", help="print the passages for queries")
    for either in (command, search):
        either.add_argument("--corpus", type=Path, default=WORLD / "corpus.jsonl")
        either.add_argument("--encoder", default=str(WORLD / "encoder"), help="folder or model id")
        either.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    command.add_argument("--out", type=Path, required=True, help="folder of the index")
    command.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    command.add_argument("--batch-size", type=int, default=64, help="passages at once")
    command.add_argument("--with-faiss", "--faiss", action="store_true", help="and index.faiss")
    search.add_argument("queries", nargs="+")
    search.add_argument("--index", type=Path, help="folder, or faiss file; default: embed now")
    search.add_argument("--backend", choices=("auto", "torch", "faiss"), default="auto")
    search.add_argument("--top-k", type=int, default=3, help="passages a query")
    given = vars(parser.parse_args())
    try:
        if given.pop("command") == "build":
            build(**given)
            return
        queries, top_k = given.pop("queries"), given.pop("top_k")
        found = Retriever.load(**given).search(queries, top_k)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"retriever.py: {error}")
    for query, passages in zip(queries, found, strict=True):
        print(f"\n{query}")
        for passage in passages:
            print(f"{passage.score:.4f}  [{passage.id}] {passage.title}: {passage.text}")


if __name__ == "__main__":
    main()
