"""Building an index folder: vectors, and an index of them where a kind needs one.

    index.json        what it is made from; `done`: how many passages are embedded
    embeddings.npy    a vector for each passage; scales.npy: what int8 ones are multiplied by
    index.faiss       of --kind ivf and ivfpq, with its lists in index.ivfdata
    bm25/             of --kind bm25
    corpus.jsonl      a packed corpus, unpacked; a search reads single lines
    .rows.*           where the lines of the corpus begin, and by what it is known again

A build that is killed goes on: each file is whole or not there, and a chunk of vectors that was not
counted in `done` is written again. Legend: N passages, D width.
"""

import hashlib
import json
import math
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from encoder import Encoder
from formats.corpora import OPENERS, convert, identity
from formats.indexes import faiss_module
from infra.checkpoint import write_aside
from infra.files import packing, read_json, say
from model import load_encoder
from retriever import Corpus, embed_corpus, index_facts, say_cut

# What faiss makes of the vectors; {lists} and {parts} follow from their number and width. Another
# text in place of a kind is handed to faiss.index_factory as it is.
FACTORIES = {"flat": "", "sq8": "", "ivf": "IVF{lists},SQ8", "ivfpq": "IVF{lists},PQ{parts}"}
KINDS = (*FACTORIES, "bm25")
SHARD_ROWS = 2**20  # vectors added to one part of an index: 0.8 GB in 8 bits at a width of 768
ADD_ROWS = 2**15  # vectors that are held as fp32 meanwhile
TRAIN_ROWS = 40  # vectors for each list that its place is found by
PROBED = 64  # one of so many lists is searched, and at least MIN_PROBED
MIN_PROBED = 64


def build(corpus: Path, encoder: str, out: Path, *, kind: str = "flat", dtype: str = "float16",
          batch_size: int = 64, **reading: Any) -> None:
    """Write OUT; what a former build of the same has left there is taken.

    dtype: of the stored vectors. reading: device, dtype, prefixes, max_tokens of load_encoder;
    `encoder_dtype` by default float32 on a CPU, float16 on GPUs.
    """
    started = time.perf_counter()
    faiss = None if kind in ("flat", "sq8", "bm25") else faiss_module()  # say so now if it misses
    out.mkdir(parents=True, exist_ok=True)
    lines = Corpus(unpacked(corpus, out), out)
    if kind == "bm25":
        from retrieval.bm25 import build_bm25  # here, because its library is optional

        lines.check()
        return build_bm25(lines, out)
    models = load_encoders(encoder, **reading)
    say(f"encoder {encoder}: {models[0]}")
    dtype = "int8" if kind == "sq8" else dtype
    factory = factory_text(kind, len(lines), models[0].width)
    facts = {"encoder": encoder, "weights": weights_hash(models[0]), "kind": kind, "dtype": dtype,
             "factory": factory, **index_facts(lines, models[0])}
    if faiss is not None:
        check_factory(faiss, factory, models[0].width)
    start = begin(out, facts, lines, models)
    vectors, scales = open_vectors(out, facts, "r+" if start else "w+")
    for first, chunk in embed_corpus(lines, models, start=start, batch_size=batch_size):
        rows = slice(first, first + len(chunk))
        if scales is None:
            vectors[rows] = chunk.cpu().numpy()
        else:
            codes, scales[rows] = to_int8(chunk.cpu())
            vectors[rows] = codes
            scales.flush()
        vectors.flush()
        num_cut = sum(model.num_cut for model in models)
        write_facts(out, {**facts, "done": rows.stop, "num_cut": num_cut})
    if faiss is not None:
        add_index(faiss, out, facts, vectors, scales)
    say_cut(sum(model.num_cut for model in models), lines, models[0])
    size = sum(path.stat().st_size for path in out.iterdir() if path.suffix != ".jsonl")
    print(f"{out}: {len(lines)} passages, kind {kind}, {size / 2**30:.2f} GiB, "
          f"{time.perf_counter() - started:.0f} s"
          + (f"; search it with --corpus {lines.path}" if lines.path != corpus else ""))


# ---- the corpus ----


def unpacked(corpus: Path, out: Path) -> Path:
    """The corpus, or its lines in OUT if it is packed (gzip, bzip2, xz)."""
    if not corpus.is_file() or packing(corpus) not in {*OPENERS} - {None}:
        return corpus
    lines, source = out / "corpus.jsonl", out / ".corpus.json"
    about = identity(corpus)
    if not lines.is_file() or read_json(source, {}) != about:
        source.unlink(missing_ok=True)
        lines.unlink(missing_ok=True)
        convert(corpus, lines)
        write_aside(source, lambda path: path.write_text(json.dumps(about) + "\n"))
    return lines


# ---- vectors ----


def load_encoders(encoder: str, *, device: str = "cpu", encoder_dtype: str | None = None,
                  **reading: Any) -> list[Encoder]:
    """The encoder, once for each GPU where the device is cuda, which means all of them."""
    dtype = encoder_dtype or ("float16" if device.startswith("cuda") else "float32")
    devices = [device]
    if device == "cuda":
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [load_encoder(encoder, device=name, dtype=getattr(torch, dtype), **reading)
            for name in devices]


def weights_hash(encoder: Encoder) -> str:
    """Of the weights as they are held, by which a build knows its encoder again."""
    hasher = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        hasher.update(name.encode())
        hasher.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def begin(out: Path, facts: dict[str, Any], lines: Corpus, models: list[Encoder]) -> int:
    """How many vectors in OUT are of these facts; what is of other ones is removed, and said."""
    before = read_json(out / "index.json", {})
    start, num_cut = before.pop("done", 0), before.pop("num_cut", 0)
    of_index = ("kind", "factory")  # they do not change the vectors
    differing = [key for key in facts if before.get(key) != facts[key] and key not in of_index]
    for path in out.glob(".*.partial[0-9]*"):  # what a killed process had not finished
        path.unlink()
    if start and not differing and (out / "embeddings.npy").is_file():
        models[0].num_cut = num_cut
        say(f"{out}: {start} of {len(lines)} passages are embedded already")
        if before != facts or not facts["factory"]:  # another index of the same vectors, or none
            for name in ("index.faiss", "index.ivfdata"):
                (out / name).unlink(missing_ok=True)
            remove_parts(out)
            write_facts(out, {**facts, "done": start, "num_cut": num_cut})
        return start
    if start:
        say(f"{out}: built again, because it has other values of {', '.join(differing) or 'done'}")
    lines.check()
    # index.json first: without it nothing here is an index. A reader of old vectors keeps them.
    for name in ("index.json", "index.faiss", "index.ivfdata", "embeddings.npy", "scales.npy"):
        (out / name).unlink(missing_ok=True)
    remove_parts(out)
    return 0


def write_facts(out: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=1) + "\n"
    write_aside(out / "index.json", lambda path: path.write_text(text))


def open_vectors(out: Path, facts: dict[str, Any], mode: str) -> tuple[np.ndarray, Any]:
    """(vectors [N, D], scales [N, 1] or None), on disk."""
    size = facts["rows"], facts["dim"]
    open_file = partial(np.lib.format.open_memmap, mode=mode)
    scales = None
    if facts["dtype"] == "int8":
        scales = open_file(out / "scales.npy", dtype="float32", shape=(size[0], 1))
    return open_file(out / "embeddings.npy", dtype=facts["dtype"], shape=size), scales


def to_int8(vectors: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes [C, D] and scales [C, 1] whose product is near vectors [C, D]."""
    scales = vectors.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (vectors / scales).round().to(torch.int8).numpy(), scales.numpy()


# ---- faiss ----


def factory_text(kind: str, num_rows: int, width: int) -> str:
    """What faiss is asked for: lists by the root of the number of rows, 8 bits for 8 numbers."""
    lists = max(1, min(num_rows // TRAIN_ROWS, 2 ** round(math.log2(4 * math.sqrt(num_rows)))))
    parts = max(part for part in range(1, width // 4 + 1)
                if width % part == 0 and part <= max(1, width // 8))
    return FACTORIES.get(kind, kind).format(lists=lists, parts=parts)


def check_factory(faiss: ModuleType, factory: str, width: int) -> None:
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(index)
    except Exception as error:  # of C++
        raise ValueError(f"--kind: got {factory!r}, expected {', '.join(KINDS)}, or what "
                         "faiss.index_factory makes an IVF of, such as IVF4096,SQ6") from error


def add_index(faiss: ModuleType, out: Path, facts: dict[str, Any], vectors: np.ndarray,
              scales: np.ndarray | None) -> None:
    """Write index.faiss: train on a sample, add the vectors part by part, put the parts together.
    """
    if (out / "index.faiss").is_file():
        return remove_parts(out)

    def read(rows: slice) -> np.ndarray:
        part = vectors[rows].astype(np.float32)
        return part if scales is None else part * scales[rows]

    def write(path: Path, index: Any) -> None:
        write_aside(path, lambda partial: faiss.write_index(index, str(partial)))

    trained, num_rows = out / ".trained.faiss", len(vectors)
    if not trained.is_file():
        index = faiss.index_factory(facts["dim"], facts["factory"], faiss.METRIC_INNER_PRODUCT)
        inner = faiss.extract_index_ivf(index)
        inner.nprobe = min(inner.nlist, max(MIN_PROBED, inner.nlist // PROBED))
        step = max(1, num_rows // max(TRAIN_ROWS * inner.nlist, TRAIN_ROWS * 256))
        say(f"{out}: trains {facts['factory']} on {len(range(0, num_rows, step))} vectors")
        index.train(read(slice(0, num_rows, step)))
        write(trained, index)
    parts = []
    bar = tqdm(None, "index", num_rows, unit=" passages", unit_scale=True)
    for begin_row in range(0, num_rows, SHARD_ROWS):
        end = min(begin_row + SHARD_ROWS, num_rows)
        parts.append(out / f".part_{begin_row:012d}.faiss")
        if not parts[-1].is_file():
            index = faiss.read_index(str(trained))
            for first in range(begin_row, end, ADD_ROWS):
                rows = slice(first, min(first + ADD_ROWS, end))
                index.add_with_ids(read(rows), np.arange(rows.start, rows.stop))
                bar.update(rows.stop - rows.start)
            write(parts[-1], index)
    bar.close()
    index = put_together(faiss, faiss.read_index(str(trained)), parts, out / "index.ivfdata")
    write(out / "index.faiss", index)
    remove_parts(out)


def put_together(faiss: ModuleType, index: Any, parts: list[Path], path: Path) -> Any:
    """The trained index with the lists of its parts, in a file of their own, read from the disk."""
    half = path.with_name(f".{path.name}.partial")
    inner = faiss.extract_index_ivf(index)
    loaded = [faiss.read_index(str(part), faiss.IO_FLAG_MMAP) for part in parts]
    pointers = faiss.InvertedListsPtrVector()
    for part in loaded:
        pointers.push_back(faiss.extract_index_ivf(part).invlists)
    lists = faiss.OnDiskInvertedLists(inner.nlist, inner.code_size, str(half))
    index.ntotal = inner.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size())
    half.replace(path)
    lists.filename = path.name  # it lies beside index.faiss, wherever that is
    inner.replace_invlists(lists, True)
    lists.this.disown()
    return index


def remove_parts(out: Path) -> None:
    for pattern in (".part_*.faiss", ".trained.faiss", ".index.ivfdata.partial"):
        for path in out.glob(pattern):
            path.unlink()


