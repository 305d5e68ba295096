"""Passages: a JSON-lines corpus, an encoder, and exact inner-product search over its vectors.

The paper's search engine R: E5 vectors, a flat index, the top 3 passages (Jin et al. 2025). Row i
of an index is line i of the corpus, {"id", "contents"} with contents = '"Title"', newline, text.
Blank lines are passed over; formats/corpora.py says what else a line may hold.
Departures from the official code: an index of another corpus or encoder is refused, and equal
scores are ordered by row. Other kinds of indexes, the build and the server are in retrieval/.
Legend: B queries, N passages (C a tile, K a query), D width.

    python retriever.py build --corpus FILE --encoder DIR --out DIR     # goes on where it stopped
    python retriever.py search "who wrote ..." --corpus FILE --encoder DIR --index DIR
    python retriever.py serve --corpus FILE --encoder DIR --index DIR   # Search-R1's POST /retrieve
    python retriever.py compare --questions FILE --corpus FILE --encoder DIR --index DIR
    python retriever.py convert --corpus FILE --out FILE                # packed files, tables
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Passage
from encoder import Encoder
from formats.corpora import Lines, split_contents
from formats.indexes import Difference, FaissIndex, read_vectors, unlike
from infra.files import read_json, replace_surrogates, say
from model import load_encoder

WORLD = Path(__file__).resolve().parent / "world"
EMBED_ROWS = 8192  # passages a chunk of `build`; sorted by length within
TILE_ELEMENTS = 2**22  # of vectors, as fp32, at once on a CPU: 16 MiB stay near its cores
GPU_ROWS, GPU_SCORES = 2**20, 2**29  # of vectors, and of their scores, at once on a GPU
SPLIT = 2.0**11  # what half precision rounds off a number, times this, is a number of its size
NUM_COMPARED = 8  # passages that are embedded again to recognise the corpus and the encoder by


class Corpus:
    """The passages of a file, which stays on disk. cache, is_known: see Lines."""

    def __init__(self, path: Path | str, cache: Path | None = None, *,
                 is_known: bool = True) -> None:
        self.path, self.lines = Path(path), Lines(Path(path), cache, is_known=is_known)
        self.sha256, self.read, self.check = self.lines.sha256, self.lines.read, self.lines.check

    def __len__(self) -> int:
        return len(self.lines)

    def passage(self, row: int, score: float) -> Passage:
        name, contents = self.read(row)
        return Passage(name, *split_contents(contents), score)


class TorchIndex:
    """Vectors [N, D] as they are stored: floats, or int8 with a scale [N, 1] of each row."""

    kind = "exact"

    def __init__(self, vectors: Tensor, scales: Tensor | None = None) -> None:
        self.vectors, self.scales, (self.num_rows, self.width) = vectors, scales, vectors.shape

    def rows(self, rows: Any) -> Tensor:
        """Stored vectors in fp32, [..., D] for rows [...]."""
        vectors = self.vectors[rows].float()
        return vectors if self.scales is None else vectors * self.scales[rows]

    def difference(self, rows: list[int], vectors: np.ndarray) -> Difference:
        return unlike(rows, self.rows(rows).cpu().numpy(), vectors)

    def to(self, device: torch.device) -> "TorchIndex":
        scales = None if self.scales is None else self.scales.to(device)
        return TorchIndex(self.vectors.to(device), scales)

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Best inner products of queries [B, D], equal ones by row: scores, rows [B, K]."""
        queries, k = queries.to(self.vectors.device), min(top_k, self.num_rows)
        best, rows = self._scan(queries, k + 1, _any_top)  # one more, to see a tie for the last
        if rows.shape[1] > k and (best[:, k - 1] == best[:, k]).any():
            best, rows = self._scan(queries, k, _top)  # slower: of equal scores the lower row
        rows, order = rows[:, :k].sort(dim=1)
        best, order = best[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
        return best.cpu().numpy(), rows.gather(1, order).cpu().numpy()

    def _scan(self, queries: Tensor, k: int, top: Any) -> tuple[Tensor, Tensor]:
        """The top k of queries [B, D], tile by tile: scores, rows [B, K]."""
        scores, rows, num_rows = [], [], max(1, TILE_ELEMENTS // self.width)
        if queries.is_cuda:
            num_rows, room = max(1, min(GPU_ROWS, GPU_SCORES // (2 * len(queries)))), ()
        else:
            num_rows = min(num_rows, self.num_rows)
            sizes = (num_rows, self.width), (len(queries), num_rows)
            room = [torch.empty(size, device=queries.device) for size in sizes]
        for start in range(0, self.num_rows, num_rows):
            tile = slice(start, start + num_rows)
            products = inner_products(queries, self.vectors[tile], room)  # [B, C]
            if self.scales is not None:
                products *= self.scales[tile].T
            best, columns = top(products, k)
            scores.append(best)
            rows.append(columns + start)
        best, columns = top(torch.cat(scores, 1), k)  # equal scores are in order of rows
        return best, torch.cat(rows, 1).gather(1, columns)


def inner_products(queries: Tensor, tile: Tensor, room: Sequence[Tensor] = ()) -> Tensor:
    """queries [B, D], fp32, times stored vectors [C, D]: [B, C], fp32.

    room [>= C, D], [B, >= C]: where a CPU puts the vectors as fp32, and the products. New memory
    for each tile takes longer, and the allocator may not use again what the last one gave back.
    """
    if room:
        vectors, products = room[0][: len(tile)], room[1][:, : len(tile)]
        return torch.mm(queries, vectors.copy_(tile).T, out=products)
    if not queries.is_cuda or tile.dtype == torch.float32:
        return queries @ tile.float().T
    return split_products(queries, tile, partial(torch.mm, out_dtype=torch.float32))


def split_products(queries: Tensor, tile: Tensor, multiply: Any) -> Tensor:
    """The same by two products in half precision, summed in fp32 by `multiply`: [B, C].

    Rounded once, a query would lose 11 of its 24 bits; its second half holds them.
    """
    tile = tile.half() if tile.dtype == torch.int8 else tile  # exact: up to 127
    high = queries.to(tile.dtype)
    low = ((queries - high) * SPLIT).to(tile.dtype)
    high_part, low_part = multiply(torch.cat([high, low]), tile.T).chunk(2)  # fp32 from here
    return high_part + low_part / SPLIT


def _any_top(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return scores.topk(min(top_k, scores.shape[1]))


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


class Retriever:
    """encoder: None for an index that searches words."""

    def __init__(self, corpus: Corpus, encoder: Encoder | None, index: Any) -> None:
        self.corpus, self.encoder, self.index = corpus, encoder, index
        device = getattr(getattr(index, "vectors", None), "device", torch.device("cpu"))
        # A search beside decoding must not wait in the queue of the decoder's work.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @classmethod
    def load(cls, corpus: Path | str, encoder: Path | str | Encoder, *,
             index: Path | str | None = None, backend: str = "auto",
             device: torch.device | str = "cpu", prefixes: dict[str, str | None] | None = None,
             max_tokens: int | None = None, is_known: bool = True) -> "Retriever":
        """index: a folder of `build`, a faiss file, or None: the corpus is embedded now.

        backend: torch searches a folder's vectors whatever its kind; auto: as its kind says.
        prefixes, max_tokens: see load_encoder. Without max_tokens an index folder's is taken.
        is_known: False reads all of the corpus, in place of its size, time and a sample.
        """
        if backend not in ("auto", "torch", "faiss") or (index is None and backend == "faiss"):
            raise ValueError(f"backend: got {backend!r} with index {index}, expected auto, torch, "
                             "or faiss with an index")
        index, device, facts = Path(index) if index else None, torch.device(device), {}
        if index and index.name == "index.faiss" and (index.parent / "index.json").is_file():
            if backend != "torch":  # it says what the file was made from
                index, backend = index.parent, "faiss"
        if index and index.is_dir():
            facts = read_json(index / "index.json", {})
        lines = Corpus(corpus, index if index and index.exists() else None, is_known=is_known)
        if facts.get("kind") == "bm25" and backend == "auto":
            from retrieval.bm25 import open_bm25  # here, because its library is optional
            return cls(lines, None, open_bm25(index, facts, len(lines), lines.sha256))
        if not isinstance(encoder, Encoder):
            path, encoder = encoder, load_encoder(encoder, device=device, prefixes=prefixes,
                                                  max_tokens=max_tokens)
            if facts and max_tokens is None:
                with suppress(ValueError, TypeError):  # what does not fit is refused below
                    encoder.limit(facts.get("max_tokens"))
            say(f"encoder {path}: {encoder}")
        if index is not None:
            return cls(lines, encoder, _open_index(index, lines, encoder, backend, device))
        lines.check()
        num_cut, chunks = encoder.num_cut, [chunk for _, chunk in embed_corpus(lines, [encoder])]
        say_cut(encoder.num_cut - num_cut, lines, encoder)
        return cls(lines, encoder, TorchIndex(torch.cat(chunks).to(device)))  # [N, D]

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        """The best passages of each query, best first; all of them in a corpus below top_k."""
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if not queries:
            return []
        queries = list(map(replace_surrogates, queries))
        asked = places = list(dict.fromkeys(queries))  # equal ones are searched once
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            if self.encoder is not None:
                asked = self.encoder.embed(places, kind="query")  # [B, D]
            scores, rows = self.index.search(asked, top_k)
        found = {  # faiss writes row -1 for a place that it could not fill
            query: [self.corpus.passage(row, score) for row, score in zip(*pair, strict=True)
                    if row >= 0]
            for query, *pair in zip(places, rows.tolist(), scores.tolist(), strict=True)}
        return [[*found[query]] for query in queries]


def open_retriever(settings: Any, device: torch.device | str = "cpu") -> Any:
    """What the settings of a program name: a Retriever, or one that asks others (`--index URL`)."""
    if "://" in settings.index:
        from retrieval.remote import RemoteRetriever  # here, because most searches are local
        return RemoteRetriever(settings.index, timeout_s=settings.search_timeout_s)
    prefixes = {"query": settings.query_prefix, "passage": settings.passage_prefix}
    return Retriever.load(settings.corpus, settings.encoder, index=settings.index or None,
                          device=device, prefixes=prefixes)


def embed_corpus(corpus: Corpus, encoders: list[Encoder], *, start: int = 0,
                 batch_size: int = 64) -> Iterator[tuple[int, Tensor]]:
    """(first row, vectors [C, D]) of chunks of passages, from row `start` on, in their order.

    Several encoders, one on each GPU, embed a chunk each at the same time.
    """
    firsts, num = range(start, len(corpus), EMBED_ROWS), len(encoders)
    bar = tqdm(None, "embed", len(corpus), initial=start, unit=" passages", unit_scale=True)

    def embed(encoder: Encoder, first: int) -> Tensor:
        rows = range(first, min(first + EMBED_ROWS, len(corpus)))
        contents = [corpus.read(row)[1] for row in rows]
        return encoder.embed(contents, kind="passage", batch_size=batch_size, progress=bar.update)

    with bar, ThreadPoolExecutor(num) as pool:
        run = pool.map if num > 1 else map  # Ctrl-C ends a thread's chunk only when it is done
        for i in range(0, len(firsts), num):
            group = firsts[i : i + num]
            yield from zip(group, run(embed, encoders, group), strict=False)


def index_facts(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What vectors depend on, apart from the encoder's weights."""
    return {"rows": len(corpus), "dim": encoder.width, "prefixes": encoder.prefixes,
            "max_tokens": encoder.max_tokens, "corpus_sha256": corpus.sha256}


def say_cut(num_cut: int, corpus: Corpus, encoder: Encoder) -> None:
    if num_cut:
        say(f"{corpus.path}: {num_cut / len(corpus):.1%} of passages are longer than "
            f"{encoder.max_tokens} tokens and cut (--max-tokens)")


def _open_index(path: Path, corpus: Corpus, encoder: Encoder, backend: str,
                device: torch.device) -> TorchIndex | FaissIndex:
    """The index at a path; ValueError if it was made from another corpus or encoder."""
    expected = {**index_facts(corpus, encoder), "done": len(corpus)}
    stored, needed = expected, [path]  # a faiss file does not say what it was made from
    if path.is_dir():
        stored = {"done": len(corpus), **read_json(path / "index.json", {})}
        is_faiss = backend == "faiss" or (backend == "auto" and stored.get("factory"))
        needed = [path / "index.json", path / ("index.faiss" if is_faiss else "embeddings.npy")]
        needed += [path / "scales.npy"] * (not is_faiss and stored.get("dtype") == "int8")
    missing = [file.name for file in needed if not file.is_file()]
    if missing or (path.is_file() and backend == "torch"):
        raise FileNotFoundError(f"index: got {path} without {missing}, expected a folder that "
                                "`python retriever.py build` (for backend faiss: of --kind ivf or "
                                "ivfpq) has written, or, not for torch, a faiss file")
    exact = None
    if path.is_dir() and (path / "embeddings.npy").is_file():
        vectors = [torch.from_numpy(read_vectors(path / name))
                   for name in ("embeddings.npy", "scales.npy") if (path / name).is_file()]
        exact = TorchIndex(*vectors)
    is_exact = needed[-1].suffix == ".npy"
    index = exact if is_exact else FaissIndex(needed[-1], exact)
    if path.is_dir() and stored != {"done": len(corpus), **read_json(needed[0], {})}:
        raise ValueError(f"{path}: got an index that is being built again; wait for its end")
    got = {key: stored.get(key) for key in expected}
    got |= {"rows": index.num_rows, "dim": index.width}
    if isinstance(got["prefixes"], dict):  # no stored vector depends on the prefix of queries
        got["prefixes"] = got["prefixes"] | {"query": encoder.prefixes["query"]}
    problems = [(key, got[key], value) for key, value in expected.items() if got[key] != value]
    if not problems:  # vectors of another encoder may well have the same width
        rows = corpus.lines.spread(NUM_COMPARED)
        texts = [corpus.read(row)[1] for row in rows]
        problems = [index.difference(rows, encoder.embed(texts, kind="passage").cpu().numpy())]
    if problems[0] is not None:
        key, value, wanted = problems[0]
        raise ValueError(f"{path}: got an index with {key} {value}, expected {wanted}, as "
                         f"{corpus.path} and the encoder have it; build it again from these, or "
                         "give --passage-prefix and --max-tokens as they were then")
    return index.to(device)


if __name__ == "__main__":
    importlib.import_module("retrieval.program").main(sys.argv[1:])
