"""Indexes as they grow: seconds to build, bytes on disk and in memory, milliseconds a query.

    python -m experiments.scale --rows 10000 100000 1000000 --out scale.json
    python -m experiments.scale --rows 10000000 --width 384 --kinds flat sq8 ivf --out scale.json
    python -m experiments.scale --index DIR --questions FILE --out scale.json     recall, too

Ours are all kinds of `retriever.py build`; those of faiss are measured without the vectors, from
which a search would compare its best again. The peers are raw faiss, hnswlib and usearch, where
they are installed. Vectors are random, which have no neighbours worth the name, or those of an
index of kind flat: then the questions' best three are compared with those of the exact search.
Each index is built and searched in a process of its own, on Linux; what --out holds is not measured
again.

What the numbers are. Build is from vectors on disk to an index on disk. Disk is what a search
opens. Open is the memory of a process once an index is open; searched, its peak until all batches
are searched, what lies in files that are mapped included. Times are medians over repeats of a
batch.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data import load_questions
from experiments.jobs import ROOT
from experiments.rows import write_json
from formats.indexes import FaissIndex, faiss_module, read_vectors
from infra.cli import Parser, reporting
from infra.files import read_json
from infra.programs import count
from model import load_encoder
from retrieval import build
from retrieval.compare import BATCHES, disk_bytes, milliseconds, recalls
from retriever import TorchIndex

OURS = ("flat", "sq8", "ivf", "ivfpq")
PEERS = ("faiss flat", "faiss ivf", "hnswlib", "usearch")
WITHOUT_LISTS = ("flat", "sq8", "faiss flat", "hnswlib", "usearch")
TOP_K = 3
PART = 2**16  # vectors that are made, changed or added at once
LINKS, EFFORT = 16, 100  # of a graph: neighbours of a vector, candidates while it is added
Search = Callable[[torch.Tensor], Any]  # queries [B, D] -> rows [B, K]


def write_vectors(path: Path, rows: int, width: int) -> None:
    """Random vectors [N, D] of about unit length, float16."""
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype="float16", shape=(rows, width))
    generator = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, rows, PART), desc="vectors", delay=2):
        part = vectors[start : start + PART]
        part[:] = torch.randn(part.shape, generator=generator).mul_(width**-0.5).half().numpy()
    vectors.flush()


# ---- building: what a kind makes of vectors, in a folder ----


def build_ours(kind: str, vectors: np.ndarray, folder: Path) -> None:
    facts = {"rows": len(vectors), "dim": vectors.shape[1], "dtype": "float16",
             "factory": build.factory_text(kind, *vectors.shape)}
    if kind == "sq8":
        codes, scales = build.open_vectors(folder, {**facts, "dtype": "int8"}, "w+")
        for start in range(0, len(vectors), PART):
            rows = slice(start, start + PART)
            codes[rows], scales[rows] = build.to_int8(torch.from_numpy(vectors[rows].astype("f")))
        codes.flush()
    elif kind == "flat":
        shutil.copy(vectors.filename, folder / "embeddings.npy")
    else:
        build.add_index(faiss_module(), folder, facts, vectors, None)


def build_peer(kind: str, vectors: np.ndarray, folder: Path) -> None:
    path = "index"
    if kind == "hnswlib":
        index = import_module("hnswlib").Index("ip", vectors.shape[1])
        index.init_index(len(vectors), M=LINKS, ef_construction=EFFORT)
        index.set_num_threads(torch.get_num_threads())
        add, save = index.add_items, index.save_index
    elif kind == "usearch":
        index = usearch_index(vectors.shape[1])
        places = iter(range(0, len(vectors), PART))

        def add(part: np.ndarray) -> None:
            keys = np.arange(len(part)) + next(places)
            index.add(keys, part, threads=torch.get_num_threads())

        save = index.save
    else:
        index, faiss = faiss_index(kind, *vectors.shape), faiss_module()
        if not index.is_trained:
            step = max(1, len(vectors) // (build.TRAIN_ROWS * faiss.extract_index_ivf(index).nlist))
            index.train(vectors[::step].astype(np.float32))
        add, path = index.add, "index.faiss"

        def save(name: str) -> None:
            faiss.write_index(index, name)

    for start in tqdm(range(0, len(vectors), PART), desc=kind, delay=2):
        add(vectors[start : start + PART].astype(np.float32))
    save(str(folder / path))


def faiss_index(kind: str, rows: int, width: int) -> Any:
    """What a user of faiss alone would take: float16, or lists of 8 bits a number."""
    faiss = faiss_module()
    text = "SQfp16" if kind == "faiss flat" else build.factory_text("ivf", rows, width)
    return faiss.index_factory(width, text, faiss.METRIC_INNER_PRODUCT)


def usearch_index(width: int) -> Any:
    options = {"metric": "ip", "dtype": "f16", "connectivity": LINKS, "expansion_add": EFFORT}
    return import_module("usearch.index").Index(ndim=width, **options)


# ---- opening and searching ----


def open_index(kind: str, folder: Path, width: int, nprobe: int | None = None) -> Search:
    """nprobe: lists that are searched; None: as many as a build says."""
    if kind in ("flat", "sq8"):
        names = ("embeddings.npy", "scales.npy")
        parts = [torch.from_numpy(read_vectors(folder / name))
                 for name in names if (folder / name).is_file()]
        index = TorchIndex(*parts)
        return lambda queries: index.search(queries, TOP_K)[1]
    if kind not in PEERS:
        index = FaissIndex(folder / "index.faiss")
        if nprobe:
            index.probe(nprobe)
        return lambda queries: index.search(queries, TOP_K)[1]
    threads, path = torch.get_num_threads(), str(folder / "index")
    if kind == "hnswlib":
        index = import_module("hnswlib").Index("ip", width)
        index.load_index(path)
        index.set_num_threads(threads)
        index.set_ef(EFFORT)
        return lambda queries: index.knn_query(queries.numpy(), TOP_K)[0].astype(int)
    if kind == "usearch":
        index = usearch_index(width)
        index.load(path)
        index.expansion_search = EFFORT
        return lambda queries: np.asarray(
            index.search(queries.numpy(), TOP_K, threads=threads).keys).astype(int)
    faiss = faiss_module()
    index = faiss.read_index(f"{path}.faiss")
    if kind == "faiss ivf":
        index.nprobe = nprobe or min(index.nlist,
                                     max(build.MIN_PROBED, index.nlist // build.PROBED))
    return lambda queries: index.search(queries.numpy(), TOP_K)[1]


def resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM); mapped files count.

    Not the peak of getrusage, which a process takes over from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def search_times(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How an index opens and is searched; this process has done nothing else.

    options.asked: a file of queries [Q, D], whose best rows are then compared with the exact ones.
    """
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(max(BATCHES), options.width, generator=generator)
    if options.asked:
        queries = torch.from_numpy(np.load(options.asked))
    many = queries.repeat(-(-max(BATCHES) // len(queries)), 1)
    before, started = resident("VmRSS"), time.perf_counter()
    search = open_index(kind, folder, options.width, options.nprobe)
    open_s, opened = time.perf_counter() - started, resident("VmRSS")
    times = {str(batch): milliseconds(lambda size: search(many[:size]), batch)
             for batch in BATCHES}
    result = {"disk": disk_bytes(folder), "open_s": open_s, "open": opened - before,
              "searched": resident("VmHWM") - before, "ms": times}
    if options.asked:
        vectors = torch.from_numpy(read_vectors(options.vectors))
        exact = TorchIndex(vectors).search(queries, TOP_K)[1]
        result["recall"] = {k: recalls(search(queries), exact)[k] for k in (1, TOP_K)}
    return result


# ---- the program ----


def measured(kind: str, rows: int, options: argparse.Namespace, vectors: Path,
             asked: Path | None = None) -> dict[str, Any]:
    """One index, built and searched by two processes one after the other."""
    about = {"kind": kind, "rows": rows, "width": options.width, "threads": options.threads,
             "nprobe": options.nprobe}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for step in ("build", "search"):
            command = [sys.executable, "-m", "experiments.scale", "--step", step, folder,
                       "--vectors", str(vectors), "--kinds", kind, "--rows", str(rows),
                       "--width", str(options.width), "--threads", str(options.threads)]
            command += ["--asked", str(asked)] if asked else []
            command += ["--nprobe", str(options.nprobe)] if options.nprobe else []
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                return {**about, "problem": f"{step} ended with {done.returncode}"}
            about |= json.loads(done.stdout.splitlines()[-1])
    return about


def one_step(options: argparse.Namespace) -> dict[str, Any]:
    step, folder = options.step[0], Path(options.step[1])
    [kind] = options.kinds
    torch.set_num_threads(options.threads)
    if kind not in ("flat", "sq8", "hnswlib", "usearch"):
        faiss_module().omp_set_num_threads(options.threads)
    if step == "search":
        return search_times(kind, folder, options)
    vectors, started = np.load(options.vectors, mmap_mode="r"), time.perf_counter()
    (build_peer if kind in PEERS else build_ours)(kind, vectors, folder)
    return {"build_s": time.perf_counter() - started}


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown, by rows and kind."""
    lines = ["| vectors | kind | build | on disk | open | searched | "
             + " | ".join(f"{batch} a batch" for batch in BATCHES) + " | recall @1, @3 |",
             "|---" * (7 + len(BATCHES)) + "|"]
    for result in sorted(results, key=lambda r: (r["width"], r["rows"])):
        name = result["kind"]
        name += f", {result['nprobe']} lists" if result.get("nprobe") else ""
        cells = [f"{result['rows']:,} x {result['width']}", name]
        if "problem" in result:
            cells += [result["problem"], *[""] * (4 + len(BATCHES))]
        else:
            sizes = [f"{result[key] / 2**20:,.0f} MiB" for key in ("disk", "open", "searched")]
            times = [f"{result['ms'][str(batch)]:.3g} ms" for batch in BATCHES]
            shares = ", ".join(f"{share:.3f}" for share in result.get("recall", {}).values())
            cells += [f"{result['build_s']:,.0f} s", *sizes, *times, shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("experiments.scale", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", nargs="+", type=count, help="default 10000 100000")
    add("--width", type=count, help="numbers of a vector, default 768")
    add("--kinds", nargs="+", default=[*OURS, *PEERS], metavar="KIND",
        help=f"by default {', '.join(OURS + PEERS)}; also what a build takes, IVF4096,SQ6 for one")
    add("--nprobe", type=count, help="lists that a search reads, of kinds that have lists")
    add("--index", type=Path, help="a folder of kind flat, in place of random vectors")
    add("--questions", nargs="+", default=[], metavar="FILE", help="to search --index for")
    add("--threads", type=count, default=torch.get_num_threads(), help="default: all cores")
    add("--work", help="folder for the files meanwhile (default: that of temporary files)")
    add("--out", type=Path, help="JSON of the results; one that exists is added to")
    add("--step", nargs=2, help=argparse.SUPPRESS)
    add("--vectors", type=Path, help=argparse.SUPPRESS)
    add("--asked", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if bool(options.index) != bool(options.questions):
        parser.error("--index and --questions: got one of them, expected both or none")
    if options.index and (options.rows or options.width):
        parser.error("--index: got --rows or --width beside it, which it has itself; drop these")
    options.rows, options.width = options.rows or [10_000, 100_000], options.width or 768
    if options.nprobe and (others := {*options.kinds} & {*WITHOUT_LISTS}):
        parser.error(f"--nprobe: got kinds without lists ({', '.join(sorted(others))}); drop these")
    return options


def embed_questions(options: argparse.Namespace, facts: dict[str, Any], path: Path) -> None:
    """Write the questions' vectors [Q, D] as the index's encoder makes them."""
    encoder = load_encoder(facts["encoder"], prefixes=facts["prefixes"])
    texts = [question.question for file in options.questions for question in load_questions(file)]
    np.save(path, encoder.embed(texts, kind="query").numpy())


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.step:
        return print(json.dumps(one_step(options)))
    results = read_json(options.out, {"results": []})["results"] if options.out else []
    results = [result for result in results if "problem" not in result]
    facts = {}
    if options.index:
        facts = read_json(options.index / "index.json")
        if facts["kind"] != "flat":
            raise ValueError(f"--index: got {options.index} of kind {facts['kind']}, expected flat")
        options.rows, options.width = [facts["rows"]], facts["dim"]

    def key(result: dict[str, Any]) -> tuple:
        return (*(result[name] for name in ("kind", "rows", "width", "threads")),
                result.get("nprobe"), "recall" in result)

    known = {key(result) for result in results}
    for rows in sorted(options.rows):
        about = {"rows": rows, "width": options.width, "threads": options.threads,
                 "nprobe": options.nprobe}
        about |= {"recall": {}} if facts else {}
        kinds = [kind for kind in options.kinds if key({**about, "kind": kind}) not in known]
        if not kinds:
            continue
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            vectors, asked = Path(folder) / "vectors.npy", None
            if facts:
                vectors, asked = options.index / "embeddings.npy", Path(folder) / "asked.npy"
                embed_questions(options, facts, asked)
            else:
                write_vectors(vectors, rows, options.width)
            for kind in tqdm(kinds, desc=f"{rows} vectors"):
                results.append(measured(kind, rows, options, vectors, asked))
                if options.out:
                    write_json(options.out, {"results": results})
    print(table(results))


if __name__ == "__main__":
    with reporting("experiments.scale", RuntimeError):
        main(sys.argv[1:])
