"""Passages: a JSON-lines corpus, an encoder, and an exact inner-product index over its vectors.

The paper's search engine R: E5 vectors, flat index, top 3 passages (Jin et al. 2025). Row i of the
index is line i of the corpus, {"id", "contents"} with contents = '"Title"' newline text.

Departures from the official code:
1. Exact search in torch is the default: same passages as faiss Flat, no second copy of the index.
   faiss reads its own files, the published e5_Flat.index among them.
2. An index that does not belong to corpus and encoder is refused: it would return wrong passages.
3. Equal scores are ordered by row, so that a search repeats (faiss picks among ties by itself).

The corpus stays on disk and a search reads its passages; 21 million of them cost 168 MB. Bytes that
are not UTF-8 and lone surrogates (a JSON escape can write them) become U+FFFD.

    python retriever.py build --corpus FILE --encoder DIR --out DIR      # resumes where it stopped
    python retriever.py search "who wrote ..." --corpus FILE --encoder DIR --index DIR

Legend: N passages, B queries, D width, K passages a query, C passages a chunk.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import Encoder, load_encoder

WORLD = Path(__file__).resolve().parent / "world"
EMBED_ROWS = 8192  # passages between two flushes of `build`; sorted by length within
CHUNK_ELEMENTS = 2**26  # of the scores, or of the vectors, held as fp32 at once: 256 MiB
MIN_COSINE = 0.99  # of passage 0, stored and embedded again: fp16 encoders stay above 0.999


class Passage(NamedTuple):
    id: str
    title: str  # without its quotes; "" where contents is a single line
    text: str
    score: float


class Corpus:
    """Random access to the lines of a corpus file by their byte offsets."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: got no such file, expected a corpus (JSON lines)")
        self._file = self.path.open("rb")
        size, position, digest = self.path.stat().st_size, 0, hashlib.sha256()
        ends: list[np.ndarray] = []
        bar = tqdm(total=size, desc="corpus", unit="B", unit_scale=True, disable=size < 2**28)
        while block := self._file.read(2**24):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            digest.update(block)
            position += len(block)
            bar.update(len(block))
        bar.close()
        starts = np.concatenate([[0], *ends]).astype(np.int64)
        self._bounds = starts if starts[-1] == position else np.append(starts, position)
        self.sha256, self.num_bytes = digest.hexdigest(), position
        if not len(self):
            raise ValueError(f"{path}: got an empty file, expected a passage a line")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def read(self, row: int) -> tuple[str, str]:
        """(id, contents) of a row."""
        start, end = self._bounds[row], self._bounds[row + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        where, expected = f"{self.path}:{row + 1}", '{"id": ..., "contents": "\\"Title\\"\\ntext"}'
        try:
            record = json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: got no valid JSON ({error}), expected {expected}") from error
        if not isinstance(record, dict) or not isinstance(record.get("contents"), str):
            raise ValueError(f"{where}: got {str(record)[:80]!r}, expected {expected}")
        if not isinstance(record.get("id"), (str, int)):
            raise ValueError(f"{where}: got id {record.get('id')!r}, expected a string or a number")
        return clean(str(record["id"])), clean(record["contents"])

    def passage(self, row: int, score: float) -> Passage:
        name, contents = self.read(row)
        title, newline, text = contents.partition("\n")
        if not newline:
            title, text = "", contents
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return Passage(name, title, text, score)


def clean(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# ---- exact search ----


def flat_search(
    vectors: Tensor, queries: Tensor, top_k: int, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The best inner products of each query, equal ones by row: scores [B, K], rows [B, K].

    vectors [N, D] of any float type, queries [B, D] fp32, same device; products are fp32.
    """
    chunk_rows = chunk_rows or max(1, CHUNK_ELEMENTS // max(queries.shape))
    scores = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(vectors), chunk_rows):
        products = queries @ vectors[start : start + chunk_rows].float().T  # [B, C]
        found, columns = _top_columns(products, top_k)
        scores, rows = torch.cat([scores, found], 1), torch.cat([rows, columns + start], 1)
        scores, columns = _top_columns(scores, top_k)  # columns are in the order of rows on ties
        rows = rows.gather(1, columns)
    return scores, rows


def _top_columns(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """topk of scores [B, C] that takes the lower column on ties, which torch.topk does not."""
    k = min(top_k, scores.shape[1])
    last = scores.topk(k).values[:, -1:]
    columns = scores.topk(k).indices  # [B, K]
    crowded = (scores >= last).sum(1) > k  # more equal scores than places: topk's choice is open
    if crowded.any():
        columns[crowded] = scores[crowded].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    found, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return found, columns.gather(1, order)


class TorchIndex:
    def __init__(self, vectors: Tensor) -> None:  # [N, D]
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def first(self) -> Tensor | None:  # [D]
        return self.vectors[0].float().cpu()

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = flat_search(self.vectors, queries.to(self.vectors.device), top_k)
        return scores.cpu().numpy(), rows.cpu().numpy()


class FaissIndex:
    """A faiss index of any kind; on a CUDA device it is split over all GPUs, or put on the one named."""

    def __init__(self, source: Path | Tensor, device: torch.device) -> None:
        faiss = import_faiss()
        if isinstance(source, Tensor):
            self.index = faiss.IndexFlatIP(source.shape[1])
            self.index.add(source.float().cpu().numpy())
        else:
            self.index = faiss.read_index(str(source))
            if self.index.metric_type != faiss.METRIC_INNER_PRODUCT:
                raise ValueError(f"{source}: got another metric, expected inner product")
        flat = isinstance(self.index, faiss.IndexFlat) and self.index.ntotal > 0
        self._first = torch.from_numpy(self.index.reconstruct(0)) if flat else None
        self.num_rows = self.index.ntotal
        # faiss answers a request for GPUs it does not have with an empty index, silently: ask first.
        if device.type == "cuda" and (num_gpus := faiss.get_num_gpus()):
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16, options.shard = True, True
            gpus = list(range(num_gpus)) if device.index is None else [device.index]
            self.index = faiss.index_cpu_to_gpus_list(self.index, options, gpus=gpus)

    def __len__(self) -> int:
        return self.num_rows

    def first(self) -> Tensor | None:
        return self._first

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = self.index.search(queries.cpu().numpy(), min(top_k, self.num_rows))
        order = np.lexsort((rows, -scores))  # by score, then by row
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def import_faiss() -> Any:
    try:
        import faiss  # lazy: large, and Linux only
    except ImportError as error:
        raise ImportError(
            f"faiss: got {error}; expected an installed faiss for this index; pip install faiss-gpu "
            "(Linux x86-64), or search without it: --backend torch, no --index or a folder that build wrote"
        ) from error
    return faiss


# ---- retriever ----


class Retriever:
    def __init__(self, corpus: Corpus, encoder: Encoder, index: TorchIndex | FaissIndex) -> None:
        self.corpus, self.encoder, self.index = corpus, encoder, index

    @classmethod
    def load(
        cls, corpus: Path | str, encoder: Path | str | Encoder, *, index: Path | str | None = None,
        backend: str = "auto", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> "Retriever":  # fmt: skip
        """index: a folder of `build`, a faiss file, or None: the corpus is embedded now.

        backend "auto" is faiss for a faiss file, else torch. dtype is the encoder's, and that of vectors
        embedded now; vectors of a folder keep theirs.
        """
        if backend not in ("auto", "torch", "faiss"):
            raise ValueError(f"backend: got {backend!r}, expected auto, torch or faiss")
        device, passages = torch.device(device), Corpus(corpus)
        if not isinstance(encoder, Encoder):
            encoder = load_encoder(encoder, dtype=torch.float32 if device.type == "cpu" else dtype, device=device)
        if index is None:
            chunks = [v.to(device, dtype) for _, v in embed_corpus(passages, encoder, 0)]
            vectors = torch.cat(chunks)
            built = FaissIndex(vectors, device) if backend == "faiss" else TorchIndex(vectors)
        else:
            built = _open_index(Path(index), passages, encoder, backend, device)
        return cls(passages, encoder, built)

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        """The best passages of each query, best first; fewer than top_k where the corpus is smaller."""
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if not queries:
            return []
        embedded = self.encoder.embed([clean(query) for query in queries], kind="query")  # [B, D]
        scores, rows = self.index.search(embedded, top_k)
        return [  # faiss fills places it has no passage for with row -1
            [self.corpus.passage(row, score) for row, score in zip(*found, strict=True) if row >= 0]
            for found in zip(rows.tolist(), scores.tolist(), strict=True)
        ]


def embed_corpus(
    corpus: Corpus, encoder: Encoder, first_row: int, *, batch_size: int = 64
) -> Iterator[tuple[int, Tensor]]:
    """(row of the first, vectors [C, D]) for the passages from first_row on, in chunks."""
    with tqdm(total=len(corpus), initial=first_row, desc="embed", unit=" passages") as bar:
        for start in range(first_row, len(corpus), EMBED_ROWS):
            rows = range(start, min(start + EMBED_ROWS, len(corpus)))
            contents = [corpus.read(row)[1] for row in rows]
            yield start, encoder.embed(contents, kind="passage", batch_size=batch_size)
            bar.update(len(rows))


def _description(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What vectors depend on, beside the encoder's weights."""
    return {
        "rows": len(corpus), "dim": encoder.config["hidden_size"], "prefixes": encoder.prefixes,
        "max_tokens": encoder.max_tokens, "corpus_bytes": corpus.num_bytes,
        "corpus_sha256": corpus.sha256,
    }  # fmt: skip


def _open_index(
    path: Path, corpus: Corpus, encoder: Encoder, backend: str, device: torch.device
) -> TorchIndex | FaissIndex:
    again = "build it again: python retriever.py build"
    if path.is_dir():
        if not (path / "index.json").is_file():
            raise FileNotFoundError(f"{path}: got no index.json, expected a finished index; {again}")
        stored = json.loads((path / "index.json").read_text(encoding="utf-8"))
        for key, expected in _description(corpus, encoder).items():
            if stored.get(key) != expected:
                raise ValueError(
                    f"{path}: got an index with {key} {stored.get(key)!r}, expected {expected!r} "
                    f"({corpus.path} and this encoder); {again}"
                )
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, expected a folder or a faiss file; {again}")
    elif backend == "torch":
        raise ValueError(f"{path}: got a file for backend torch, expected a folder; {again}")
    built: TorchIndex | FaissIndex
    if backend == "faiss" or path.is_file():
        built = FaissIndex(path / "index.faiss" if path.is_dir() else path, device)
    else:  # mode "c": pages are read when searched, and torch wants an array it might write to
        vectors = torch.from_numpy(np.load(path / "embeddings.npy", mmap_mode="c"))
        built = TorchIndex(vectors if device.type == "cpu" else vectors.to(device))
    if len(built) != len(corpus):
        raise ValueError(
            f"{path}: got {len(built)} rows, expected {len(corpus)}, the lines of {corpus.path}; "
            "an index belongs to one corpus file: take the file it was built from"
        )
    stored_vector = built.first()
    if stored_vector is not None:
        vector = encoder.embed([corpus.read(0)[1]], kind="passage")[0].cpu()
        same = vector.shape == stored_vector.shape
        cosine = float(torch.cosine_similarity(vector, stored_vector, dim=0)) if same else 0.0
        if not cosine >= MIN_COSINE:
            raise ValueError(
                f"{path}: got a vector of passage 0 with width {len(stored_vector)} and cosine "
                f"{cosine:.3f}, expected width {len(vector)} and 1.000 to the encoder's; the index is "
                "another encoder's or another corpus': name the right ones"
            )
    return built


# ---- program ----


def build(
    corpus_path: Path, encoder_path: str, out: Path, *, device: str = "cpu", batch_size: int = 64,
    dtype: str = "float16", with_faiss: bool = False,
) -> None:  # fmt: skip
    """OUT/embeddings.npy and OUT/index.json, which is written last: an index without it is unfinished."""
    if with_faiss:
        import_faiss()  # fail now, not after hours of embedding
    corpus = Corpus(corpus_path)
    encoder = load_encoder(encoder_path, device=device)
    wanted = {"encoder": encoder_path, "dtype": dtype, **_description(corpus, encoder)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.json").unlink(missing_ok=True)
    partial, progress = out / "embeddings.npy.partial", out / "progress.json"
    before = json.loads(progress.read_text()) if progress.is_file() and partial.is_file() else {}
    done = before.pop("done", 0)
    done = done if before == wanted else 0
    shape = (len(corpus), encoder.config["hidden_size"])
    vectors = np.lib.format.open_memmap(
        partial, mode="r+" if done else "w+", dtype=None if done else dtype, shape=None if done else shape
    )
    for start, chunk in embed_corpus(corpus, encoder, done, batch_size=batch_size):
        vectors[start : start + len(chunk)] = chunk.cpu().numpy()
        vectors.flush()
        _write_json(progress, wanted | {"done": start + len(chunk)})
    if with_faiss:
        index = import_faiss().IndexFlatIP(shape[1])
        for start in range(0, len(vectors), EMBED_ROWS):
            index.add(np.asarray(vectors[start : start + EMBED_ROWS], dtype=np.float32))
        import_faiss().write_index(index, str(out / "index.faiss.partial"))
        os.replace(out / "index.faiss.partial", out / "index.faiss")
    os.replace(partial, out / "embeddings.npy")
    _write_json(out / "index.json", wanted)
    progress.unlink()
    print(f"{out}: {shape[0]} passages, width {shape[1]}, {dtype}, {vectors.nbytes / 2**30:.2f} GiB")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser("retriever.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = {}
    for name, text in {"build": "embed a corpus", "search": "print the passages for queries"}.items():
        add[name] = commands.add_parser(name, help=text).add_argument
        add[name]("--corpus", type=Path, default=WORLD / "corpus.jsonl", help="JSON lines")
        add[name]("--encoder", default=str(WORLD / "encoder"), help="folder or model id")
        add[name]("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
    add["build"]("--out", type=Path, required=True, help="folder of the index")
    add["build"]("--dtype", choices=("float16", "float32"), default="float16", help="of the vectors")
    add["build"]("--batch-size", type=int, default=64, help="passages at once")
    add["build"]("--faiss", action="store_true", help="write index.faiss (Flat, fp32), too")
    add["search"]("queries", nargs="+")
    add["search"]("--index", type=Path, help="folder of build, or a faiss file; default: embed now")
    add["search"]("--backend", choices=("auto", "torch", "faiss"), default="auto")
    add["search"]("--top-k", type=int, default=3, help="passages a query")
    given = parser.parse_args()
    try:
        if given.command == "build":
            build(given.corpus, given.encoder, given.out, device=given.device, dtype=given.dtype,
                  batch_size=given.batch_size, with_faiss=given.faiss)  # fmt: skip
            return
        retriever = Retriever.load(given.corpus, given.encoder, index=given.index,
                                   backend=given.backend, device=given.device)  # fmt: skip
        for query, passages in zip(given.queries, retriever.search(given.queries, given.top_k), strict=True):
            print(f"\n{query}")
            for passage in passages:
                print(f"{passage.score:.4f}  [{passage.id}] {passage.title}: {passage.text}")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"retriever.py: {error}")


if __name__ == "__main__":
    main()
