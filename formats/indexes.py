"""Indexes of passages on disk: vectors (.npy) and files of faiss, read and checked.

A file of faiss does not say which corpus and encoder it is of. What can be read from it is its
kind, its metric, its ids and, in most kinds, its vectors, exactly or nearly. So a few passages are
embedded again and compared with what is stored for them.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.files import say

MIN_COSINE = 0.99  # of a passage stored and embedded again; fp16 encoders stay above 0.999
MIN_CODED_COSINE = 0.5  # of a compressed vector, which must also be the nearest of those compared
TIE = 1e-3  # two passages may have the same text
NUM_RESCORED = 100  # of the best by compressed vectors
NUM_FOUND = 1000  # an index that cannot return vectors finds a passage among its first ones
EXACT = ("IndexFlat", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat", "IndexRefineFlat")
CODED = ("IndexScalarQuantizer", "IndexIVFScalarQuantizer", "IndexHNSWSQ", "IndexPQ", "IndexIVFPQ")
Difference = tuple[str, Any, Any] | None  # what, got, expected; None: there is none


def read_vectors(path: Path) -> np.ndarray:
    """Vectors [N, D] of any float type or int8, which stay on disk until they are read."""
    try:  # mode "c": read as searched, and torch may write to it
        vectors = np.load(path, mmap_mode="c")
    except Exception as error:  # of a truncated header: anything
        raise ValueError(f"{path}: got {type(error).__name__}: {error}; expected a whole file of "
                         "vectors; build the index again") from None
    if vectors.ndim != 2 or not (vectors.dtype.kind == "f" or vectors.dtype == np.int8):
        raise ValueError(f"{path}: got {vectors.dtype} of the shape {vectors.shape}, expected a "
                         "row of floats, or of int8, for each passage; build the index again")
    return vectors


def unlike(rows: list[int], stored: np.ndarray, vectors: np.ndarray, *,
           is_coded: bool = False) -> Difference:
    """How stored vectors [C, D] differ from those that were embedded again."""
    stored = stored.astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if is_coded:  # compressed: the nearest of those compared, whatever its length
        stored_norms = np.linalg.norm(stored, axis=1, keepdims=True)
        cosines = (vectors / norms) @ (stored / stored_norms).T  # [C, C]
        own = cosines.diagonal()
        likeness = np.where(own >= cosines.max(1) - TIE, own, -1.0)
    else:  # the cosine of vectors of one length; other lengths count as well
        likeness = 1 - (((stored - vectors) / norms) ** 2).sum(1) / 2
    least = MIN_CODED_COSINE if is_coded else MIN_COSINE
    worst = int(np.argmin(np.nan_to_num(likeness, nan=-np.inf)))
    if likeness[worst] >= least:
        return None
    return f"passage {rows[worst]}'s cosine", f"{likeness[worst]:.3f}", f"at least {least}"


# ---- faiss ----


def faiss_module() -> ModuleType:
    try:
        import faiss  # here, because it is optional, large, and slow to import
    except ImportError as error:
        raise ImportError(f"faiss: got {error}, expected it; pip install faiss-gpu where there is "
                          "a GPU (Linux x86-64), else faiss-cpu, never both; or let torch search: "
                          "--kind flat or sq8") from error
    return faiss


class FaissIndex:
    """An index that faiss searches; ValueError if the file or its ids cannot be one of a corpus.

    exact: the vectors, if they are at hand: the best NUM_RESCORED are compared again by them.
    """

    def __init__(self, path: Path, exact: Any = None) -> None:
        self._faiss, self.exact = faiss_module(), exact
        faiss = self._faiss
        # Vectors stay on disk until they are searched; lists in a file of their own (retrieval/
        # build.py) lie beside this one, wherever the folder was when it was written.
        has_lists = path.with_suffix(".ivfdata").is_file()
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR if has_lists else faiss.IO_FLAG_MMAP_IFC
        try:
            self.index = index = faiss.read_index(str(path), flags)
        except Exception as error:  # of C++, which names its own files and lines
            reason = str(error).rpartition("Error: ")[2].strip()[:100] or type(error).__name__
            raise ValueError(f"{path}: got no whole file of faiss ({reason}), expected an index; "
                             "copy it again, or join its parts: cat part_* > FILE") from None
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(f"{path}: got another metric (number {index.metric_type}), expected "
                             "inner product; build it again with faiss.METRIC_INNER_PRODUCT")
        self.num_rows, self.width = index.ntotal, index.d
        inner = index  # the index inside one that numbers or changes vectors first
        while hasattr(inner, "id_map") or hasattr(inner, "chain"):
            inner = faiss.downcast_index(inner.index)
        self._inner = inner
        self.kind = type(index if hasattr(index, "chain") else inner).__name__
        self._check_ids(path)
        notes = []
        if hasattr(inner, "invlists"):
            notes.append(f"searches {inner.nprobe} of {inner.nlist} lists (nprobe)")
        if hasattr(inner, "hnsw"):
            notes.append(f"searches a graph (efSearch {inner.hnsw.efSearch})")
        if "Refine" in self.kind:
            notes.append("looks at what another index has found")
        if self.kind not in EXACT:
            notes.append("has compressed or changed vectors")
        if notes:
            say(f"{path}: {self.kind} {' and '.join(notes)}, so it may miss some of the best")

    def _check_ids(self, path: Path) -> None:
        """Every number of a row is the id of one vector."""
        inner, parts = self._inner, []
        if hasattr(self.index, "id_map"):
            parts = [self._faiss.vector_to_array(self.index.id_map)]
        elif hasattr(inner, "invlists"):
            lists, sizes = inner.invlists, map(inner.invlists.list_size, range(inner.nlist))
            parts = (self._faiss.rev_swig_ptr(lists.get_ids(i), size)
                     for i, size in enumerate(sizes) if size)
        else:
            return
        wrong, ids = np.empty((2, 0), int)
        is_there = np.zeros(self.num_rows, bool)  # 21 MB where sorted ids would take 336
        for ids in parts:
            wrong = ids[(ids < 0) | (ids >= self.num_rows)]
            if len(wrong):
                break
            is_there[ids] = True
        if len(wrong) or not is_there.all():  # as many ids as rows: one that is missing is double
            raise ValueError(
                f"{path}: got ids such as {ids[:3].tolist()} for {self.num_rows} vectors, expected "
                f"the numbers of rows, 0 to {self.num_rows - 1}; build it again without such ids")

    def difference(self, rows: list[int], vectors: np.ndarray) -> Difference:
        """How what is stored for some rows differs from these vectors [C, D]."""
        inner = self._inner
        if self.kind not in (*EXACT, *CODED):  # some end the program when asked for a vector
            top_k = max(1, min(NUM_FOUND, self.num_rows // 10))  # chance finds one in ten at most
            found = self.index.search(vectors, top_k)[1]
            count = sum(row in some for row, some in zip(rows, found, strict=True))
            difference = "passages that find themselves", f"{count} of {len(rows)}", "most"
            return difference if 2 * count < len(rows) else None
        places = rows
        if hasattr(self.index, "id_map"):  # ids may be the numbers of rows in another order
            ids = self._faiss.vector_to_array(self.index.id_map)
            places = np.argsort(ids)[rows].tolist()
        if hasattr(inner, "invlists"):
            inner.make_direct_map()
        stored = np.stack([inner.reconstruct(place) for place in places])
        if hasattr(inner, "invlists"):
            inner.set_direct_map_type(self._faiss.DirectMap.NoMap)
        return unlike(rows, stored, vectors, is_coded=self.kind in CODED)

    def probe(self, num_lists: int) -> None:
        """Search so many lists; ValueError for an index without lists."""
        if not hasattr(self._inner, "invlists"):
            raise ValueError(f"--nprobe {num_lists}: got an {self.kind}, expected an IVF; drop it")
        self._inner.nprobe = num_lists

    def to(self, device: torch.device) -> "FaissIndex":
        # "cuda" means all GPUs. Asked for GPUs that are not there, faiss gives an empty index.
        if device.type == "cuda" and (num_gpus := self._faiss.get_num_gpus()):
            options = self._faiss.GpuMultipleClonerOptions()
            options.useFloat16 = options.shard = True
            gpus = list(range(num_gpus)) if device.index is None else [device.index]
            self.index = self._faiss.index_cpu_to_gpus_list(self.index, options, gpus=gpus)
        return self

    def search(self, queries: Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """Best inner products of queries [B, D], equal ones by row: scores, rows [B, K]."""
        queries, num = queries.cpu(), top_k if self.exact is None else max(top_k, NUM_RESCORED)
        scores, rows = self.index.search(queries.numpy(), min(num, self.num_rows))
        if self.exact is not None:
            stored = self.exact.rows(torch.from_numpy(rows.clip(0)))  # [B, M, D]
            exact = (stored @ queries[:, :, None]).squeeze(2).numpy()
            scores = np.where(rows < 0, -np.inf, exact)
        order = np.lexsort((rows, -scores))[:, :top_k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
