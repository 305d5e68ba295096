"""BM25: passages by the words of a query, without an encoder; the retriever of QAgent's paper.

The library bm25s counts and scores. Equal scores are ordered by row, as everywhere here, and a
passage without a word of the query is not found. Legend: B queries, N passages, K a query.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from infra.checkpoint import write_aside
from infra.files import blaming

READ_ROWS = 2**16  # passages whose words are found at once


def library() -> ModuleType:
    try:
        import bm25s  # here, because it is optional
    except ImportError as error:
        raise ImportError(f"--kind bm25: got {error}, expected it; pip install bm25s") from error
    return bm25s


class Bm25Index:
    """The index in a folder. Its queries are texts."""

    kind = "bm25"

    def __init__(self, folder: Path) -> None:
        self._library = library()
        with blaming(folder, "an index of bm25s; build it again"):
            self._scores = self._library.BM25.load(folder, mmap=True)
            self.num_rows = int(self._scores.scores["num_docs"])

    def search(self, queries: list[str], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Best scores of queries, equal ones by row: scores, rows [B, K]; row -1: no other one."""
        top_k = min(top_k, self.num_rows)
        scores = np.zeros((len(queries), top_k), np.float32)
        rows = np.full((len(queries), top_k), -1)
        for i, words in enumerate(tokens(self._library, queries)):
            words = [word for word in words if word in self._scores.vocab_dict]
            if not words:
                continue
            of_all = self._scores.get_scores(words)  # [N]
            least = np.partition(of_all, -top_k)[-top_k]
            found = np.flatnonzero((of_all >= least) & (of_all > 0))
            found = found[np.lexsort((found, -of_all[found]))][:top_k]
            scores[i, : len(found)], rows[i, : len(found)] = of_all[found], found
        return scores, rows


def tokens(library: ModuleType, texts: list[str]) -> list[list[str]]:
    """The words of texts in small letters, without the most frequent ones of English."""
    return library.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def build_bm25(corpus: Any, out: Path) -> None:
    """Write OUT/bm25 and OUT/index.json. A build that is killed begins anew."""
    bm25s, size = library(), len(corpus)
    (out / "index.json").unlink(missing_ok=True)
    half = out / ".bm25.partial"
    for folder in (half, out / "bm25"):
        shutil.rmtree(folder, ignore_errors=True)

    def words() -> Iterator[list[str]]:
        for first in tqdm(range(0, size, READ_ROWS), "words", unit=" chunks", delay=3):
            rows = range(first, min(first + READ_ROWS, size))
            yield from tokens(bm25s, [corpus.read(row)[1] for row in rows])

    scores = bm25s.BM25()
    scores.index([*words()], show_progress=False)
    scores.save(half, show_progress=False)
    half.rename(out / "bm25")
    facts = {"kind": "bm25", "rows": size, "corpus_sha256": corpus.sha256, "done": size}
    write_aside(out / "index.json", lambda path: path.write_text(json.dumps(facts) + "\n"))
    print(f"{out}: {size} passages, kind bm25")


def open_bm25(folder: Path, facts: dict[str, Any], num_rows: int, sha256: str) -> Bm25Index:
    """The index of a folder; ValueError if it was made from another corpus."""
    for key, got, expected in (("corpus_sha256", facts.get("corpus_sha256"), sha256),
                               ("done", facts.get("done"), num_rows)):
        if got != expected:
            raise ValueError(f"{folder}: got an index with {key} {got}, expected {expected}, as "
                             "the corpus has it; build it again")
    return Bm25Index(folder / "bm25")
