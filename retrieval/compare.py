"""An index beside the exact search: what it misses, how long it takes, what it holds.

Recall@k is the share of the exact search's first k passages that are among the index's first k.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data import load_questions
from formats.indexes import FaissIndex
from infra.files import replace_surrogates
from retriever import Retriever, TorchIndex

RECALLS = (1, 3, 10)
BATCHES = (1, 64, 512)
REPEATS = 5  # of a timed batch; the median counts
MAX_SECONDS = 20.0  # for the repeats of one batch


def recalls(found: np.ndarray, exact: np.ndarray) -> dict[int, float]:
    """{k: share} of rows [B, K] that an index found among the exact ones [B, K]."""
    return {k: float(np.mean([len({*mine[:k]} & {*best[:k]}) / len(best[:k])
                              for mine, best in zip(found, exact, strict=True)]))
            for k in RECALLS}


def milliseconds(search: Callable[[int], object], batch: int) -> float:
    """Median of REPEATS searches of a batch, for a query."""
    search(batch)
    times, started = [], time.perf_counter()
    while len(times) < REPEATS and time.perf_counter() - started < MAX_SECONDS:
        before = time.perf_counter()
        search(batch)
        times.append(time.perf_counter() - before)
    return 1e3 * statistics.median(times or [time.perf_counter() - started]) / batch


def disk_bytes(index: Path) -> int:
    """Of an index, without the corpus."""
    paths = index.rglob("*") if index.is_dir() else [index]
    return sum(path.stat().st_size for path in paths if path.is_file() and path.suffix != ".jsonl")


def compare(retriever: Retriever, index: Path, questions: Path, exact: Path | None,
            limit: int | None) -> None:
    """Print what an index finds, takes and holds, and the same of the exact search.

    exact: a folder whose vectors are searched exactly; None: the index's own.
    """
    queries = [replace_surrogates(q.question) for q in load_questions(questions)][:limit]
    oracle = open_oracle(retriever, exact)
    asked = retriever.encoder.embed(queries, kind="query")
    top_k = min(max(RECALLS), len(retriever.corpus))
    rows = {"index": measured(retriever.index, asked, top_k)}
    rows["exact"] = measured(oracle.index, asked, top_k)
    shares = recalls(rows["index"][0], rows["exact"][0])
    print(f"{index}: {retriever.index.kind}, {len(retriever.corpus)} passages, "
          f"{disk_bytes(index) / 2**30:.3f} GiB on disk, {len(queries)} queries")
    print("recall against the exact search: "
          + ", ".join(f"@{k} {share:.4f}" for k, share in shares.items()))
    for name, (_, times, peak) in rows.items():
        print(f"{name}: " + ", ".join(f"{ms:.2f} ms a query at {batch}"
                                      for batch, ms in times.items())
              + f"; at most {peak / 2**30:.2f} GiB resident until here")


def open_oracle(retriever: Retriever, exact: Path | None) -> Retriever:
    """What searches exactly; ValueError if nothing was given that does."""
    index = retriever.index
    if retriever.encoder is None:
        raise ValueError("--index: got one of kind bm25, whose words no search of vectors judges; "
                         "compare what programs answer with both")
    if exact is not None:
        return Retriever.load(retriever.corpus.path, retriever.encoder, index=exact,
                              backend="torch")
    if not isinstance(index, FaissIndex) or not isinstance(index.exact, TorchIndex):
        raise ValueError(f"--index: got one of kind {index.kind}, without other vectors to compare "
                         "with; give --exact DIR, a folder of --kind flat")
    return Retriever(retriever.corpus, retriever.encoder, index.exact)


def measured(index: Any, asked: Any, top_k: int) -> tuple[np.ndarray, dict[int, float], int]:
    """(rows found [B, K], ms a query by batch, bytes resident at the peak so far)."""
    found = index.search(asked, top_k)[1]
    batches = sorted({min(batch, len(asked)) for batch in BATCHES})
    times = {batch: milliseconds(lambda size: index.search(asked[:size], 3), batch)
             for batch in batches}
    unit = 1 if sys.platform == "darwin" else 1024
    return found, times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
