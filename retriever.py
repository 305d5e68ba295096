"""Passages: a JSON-lines corpus, an encoder, and exact inner-product search over its vectors.

The paper's search engine R: E5 vectors, a flat index, the top 3 passages (Jin et al. 2025). Row i
of an index is line i of the corpus, {"id", "contents"} with contents = '"Title"', newline, text.
Blank lines are passed over; formats/corpora.py says what else a line may hold.
Departures from the official code: an index of another corpus or encoder is refused, and equal
scores are ordered by row. Legend: B queries, N passages (C a chunk, K a query), D width.

    python retriever.py build --corpus FILE --encoder DIR --out DIR     # goes on where it stopped
    python retriever.py search "who wrote ..." --corpus FILE --encoder DIR --index DIR
    python retriever.py convert --corpus FILE --out FILE                # packed files, tables
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Passage
from encoder import Encoder
from formats.corpora import Lines, convert
from formats.indexes import Difference, FaissIndex, faiss_module, read_vectors, unlike
from infra.checkpoint import write_aside
from infra.cli import Parser, reporting
from infra.config import is_remote
from infra.files import read_json, replace_surrogates, say
from infra.parallel import pick_device
from infra.programs import check_path, count
from model import load_encoder

WORLD = Path(__file__).resolve().parent / "world"
EMBED_ROWS = 8192  # passages a chunk of `build`; sorted by length within
CHUNK_ELEMENTS = 2**26  # scores, or vectors, held as fp32 at once: 256 MiB of each
NUM_COMPARED = 8  # passages that are embedded again to recognise the corpus and the encoder by


class Corpus:
    """The passages of a file, which stays on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.lines = Path(path), Lines(Path(path))
        self.sha256, self.read, self.check = self.lines.sha256, self.lines.read, self.lines.check

    def __len__(self) -> int:
        return len(self.lines)

    def passage(self, row: int, score: float) -> Passage:
        name, contents = self.read(row)
        title, text = contents.split("\n", 1) if "\n" in contents else ("", contents)
        return Passage(name, title, text, score)


class TorchIndex:
    def __init__(self, vectors: Tensor) -> None:  # [N, D], any float type
        self.vectors, (self.num_rows, self.width) = vectors, vectors.shape

    def difference(self, rows: list[int], vectors: np.ndarray) -> Difference:
        return unlike(rows, self.vectors[rows].float().cpu().numpy(), vectors)

    def to(self, device: torch.device) -> "TorchIndex":
        return TorchIndex(self.vectors.to(device))

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


class Retriever:
    def __init__(self, corpus: Corpus, encoder: Encoder, index: TorchIndex | FaissIndex) -> None:
        self.corpus, self.encoder, self.index = corpus, encoder, index

    @classmethod
    def load(cls, corpus: Path | str, encoder: Path | str | Encoder, *,
             index: Path | str | None = None, backend: str = "auto",
             device: torch.device | str = "cpu", prefixes: dict[str, str | None] | None = None,
             max_tokens: int | None = None) -> "Retriever":
        """index: a folder of `build`, a faiss file, or None: the corpus is embedded now.

        prefixes, max_tokens: see load_encoder. Without max_tokens an index folder's is taken.
        """
        if backend not in ("auto", "torch", "faiss") or (index is None and backend == "faiss"):
            raise ValueError(f"backend: got {backend!r} with index {index}, expected auto, torch, "
                             "or faiss with an index")
        if index is not None and Path(index).name == "index.faiss" and backend != "torch":
            if (Path(index).parent / "index.json").is_file():  # it says what the file was made from
                index, backend = Path(index).parent, "faiss"
        lines, device = Corpus(corpus), torch.device(device)
        if not isinstance(encoder, Encoder):
            path, encoder = encoder, load_encoder(encoder, device=device, prefixes=prefixes,
                                                  max_tokens=max_tokens)
            if index is not None and max_tokens is None:
                with suppress(ValueError, TypeError):  # what does not fit is refused below
                    encoder.limit(read_json(Path(index) / "index.json", {}).get("max_tokens"))
            say(f"encoder {path}: {encoder}")
        if index is not None:
            return cls(lines, encoder, _open_index(Path(index), lines, encoder, backend, device))
        lines.check()
        num_cut, chunks = encoder.num_cut, [chunk for _, chunk in embed_corpus(lines, encoder)]
        _say_cut(encoder.num_cut - num_cut, lines, encoder)
        return cls(lines, encoder, TorchIndex(torch.cat(chunks).to(device)))  # [N, D]

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


def open_retriever(settings: Any, device: torch.device | str = "cpu") -> Retriever:
    """The retriever that the settings of a program name."""
    prefixes = {"query": settings.query_prefix, "passage": settings.passage_prefix}
    return Retriever.load(settings.corpus, settings.encoder, index=settings.index or None,
                          device=device, prefixes=prefixes)


def embed_corpus(corpus: Corpus, encoder: Encoder, *, start: int = 0,
                 batch_size: int = 64) -> Iterator[tuple[int, Tensor]]:
    """(first row, vectors [C, D]) of chunks of passages, from row `start` on."""
    for first in tqdm(range(start, len(corpus), EMBED_ROWS), "embed", unit=" chunks"):
        rows = range(first, min(first + EMBED_ROWS, len(corpus)))
        contents = [corpus.read(row)[1] for row in rows]
        yield first, encoder.embed(contents, kind="passage", batch_size=batch_size)


def _facts(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What vectors depend on, apart from the encoder's weights."""
    return {"rows": len(corpus), "dim": encoder.width, "prefixes": encoder.prefixes,
            "max_tokens": encoder.max_tokens, "corpus_sha256": corpus.sha256}


def _say_cut(num_cut: int, corpus: Corpus, encoder: Encoder) -> None:
    if num_cut:
        say(f"{corpus.path}: {num_cut / len(corpus):.1%} of passages are longer than "
            f"{encoder.max_tokens} tokens and cut (--max-tokens)")


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
    if file.suffix == ".npy":
        index = TorchIndex(torch.from_numpy(read_vectors(file)))
    else:
        index = FaissIndex(file)
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


def build(corpus: Path, encoder: str, out: Path, *, device: str = "cpu", batch_size: int = 64,
          dtype: str = "float16", with_faiss: bool = False, **reading: Any) -> None:
    """Write OUT/embeddings.npy, and OUT/index.json: what it is made of, how many rows are done.

    reading: prefixes and max_tokens of load_encoder.
    """
    faiss = faiss_module() if with_faiss else None  # if it is missing, say so now
    lines = Corpus(corpus)
    encoder_dtype = torch.float32 if device == "cpu" else torch.float16
    model = load_encoder(encoder, device=device, dtype=encoder_dtype, **reading)
    say(f"encoder {encoder}: {model}")
    lines.check()
    facts = {"encoder": encoder, "dtype": dtype, **_facts(lines, model)}
    out.mkdir(parents=True, exist_ok=True)
    before = read_json(out / "index.json", {})
    start, num_cut = before.pop("done", 0), before.pop("num_cut", 0)
    goes_on = 0 < start < len(lines) and before == facts and (out / "embeddings.npy").is_file()
    mode, start, model.num_cut = ("r+", start, num_cut) if goes_on else ("w+", 0, 0)
    for name in () if start else ("index.json", "index.faiss", "embeddings.npy"):
        (out / name).unlink(missing_ok=True)  # a reader of the old vectors keeps them
    vectors = np.lib.format.open_memmap(out / "embeddings.npy", mode=mode, dtype=dtype,
                                        shape=(len(lines), facts["dim"]))
    for first, chunk in embed_corpus(lines, model, start=start, batch_size=batch_size):
        vectors[first : first + len(chunk)] = chunk.cpu().numpy()
        vectors.flush()
        progress = {"done": first + len(chunk), "num_cut": model.num_cut}
        text = json.dumps({**facts, **progress}, indent=1) + "\n"
        write_aside(out / "index.json", lambda path, text=text: path.write_text(text))
    if faiss is not None:
        index = faiss.IndexFlatIP(facts["dim"])
        for first in range(0, len(vectors), EMBED_ROWS):
            index.add(vectors[first : first + EMBED_ROWS].astype(np.float32))
        write_aside(out / "index.faiss", lambda path: faiss.write_index(index, str(path)))
    _say_cut(model.num_cut, lines, model)
    print(f"{out}: {len(lines)} passages, {vectors.nbytes / 2**30:.2f} GiB of {dtype}")


def main() -> None:
    parser = Parser("retriever.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="embed a corpus")
    search = commands.add_parser("search", help="print the passages for queries")
    plain = commands.add_parser("convert", help="write a corpus of another format as JSON lines")
    plain.add_argument("--corpus", type=Path, required=True, help="gz, bz2, xz, tsv, parquet, ...")
    plain.add_argument("--out", type=Path, required=True, help="new file")
    for command in (make, search):
        command.add_argument("--corpus", type=Path, default=WORLD / "corpus.jsonl")
        command.add_argument("--encoder", default=str(WORLD / "encoder"), help="folder or model id")
        command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or mps")
        for kind in ("query", "passage"):
            command.add_argument(f"--{kind}-prefix", help=f"before each {kind}; default: the "
                                 "encoder's own")
        command.add_argument("--max-tokens", type=int, help="of a text; default: as many as the "
                             "encoder's folder says, or as the index was built with")
    make.add_argument("--out", type=Path, required=True, help="folder of the index")
    make.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    make.add_argument("--batch-size", type=count, default=64, help="passages at once")
    make.add_argument("--with-faiss", "--faiss", action="store_true", help="and index.faiss")
    search.add_argument("queries", nargs="+")
    search.add_argument("--index", type=Path, help="folder, or faiss file; default: embed now")
    search.add_argument("--backend", choices=("auto", "torch", "faiss"), default="auto")
    search.add_argument("--top-k", type=count, default=3, help="passages a query")
    options = vars(parser.parse_args())
    with reporting("retriever.py"):
        check_path(str(options["corpus"]), "FILE", "--corpus")
        if (command := options.pop("command")) == "convert":
            return convert(**options)
        options["device"] = pick_device(options["device"])
        options["prefixes"] = {kind: options.pop(f"{kind}_prefix") for kind in ("query", "passage")}
        if not is_remote(options["encoder"]):
            check_path(options["encoder"], "DIR", "--encoder")
        if options.get("index"):
            check_path(str(options["index"]), "PATH", "--index")
        if command == "build":
            return build(**options)
        queries, top_k = options.pop("queries"), options.pop("top_k")
        results = Retriever.load(**options).search(queries, top_k)
    for query, passages in zip(queries, results, strict=True):
        print(f"\n{query}")
        for passage in passages:
            print(f"{passage.score:.4f}  [{passage.id}] {passage.name}: {passage.text}")


if __name__ == "__main__":
    main()
