"""Corpora as they are published: what a row holds, and other formats as JSON lines.

A search reads single passages of a file of many GB, which needs plain lines. So packed files,
tables and parquet files are not searched where they lie. They are refused with the command that
converts them.
"""

import bz2
import csv
import gzip
import hashlib
import itertools
import json
import lzma
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from infra.checkpoint import write_aside
from infra.files import blaming, packing, parse_object, read_json, say
from infra.fingerprint import hash_of

OPENERS = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, None: open}
IDS = ("id", "_id", "docid", "doc_id", "pid", "passage_id")  # BEIR has _id
TEXTS = ("contents", "text", "passage")
BLOCK = 2**24  # bytes of a file that are looked at at once
MAX_FIELD = 2**24  # characters of one field of a table
UNPACK = "unpack it, or save it as UTF-8"
Rows = Iterator[tuple[str, dict[str, Any]]]  # where it stands, and what it holds


def passage_of(row: dict[str, Any], where: str) -> tuple[str, str]:
    """(id, contents) of a row; contents are its title, a newline and its text."""
    names = [row[key] for key in IDS if key in row]
    texts = [row[key] for key in TEXTS if key in row]
    title = row.get("title") or ""
    if not (names and texts and type(names[0]) in (int, str) and isinstance(texts[0], str)
            and isinstance(title, str)):
        raise ValueError(f"{where}: got {str(row)[:80]} with the keys {sorted(row)}, expected an "
                         f"id ({', '.join(IDS)}), a text ({', '.join(TEXTS)}) and perhaps a title")
    contents = texts[0]
    if "contents" in row and not title:
        return str(names[0]), contents
    title, first = (" ".join(line.split()) for line in (title, contents.split("\n", 1)[0]))
    if "contents" in row and first.strip('"') == title.strip('"'):  # it stands there already
        return str(names[0]), contents
    # Without a title, the first of several lines must not be taken for one.
    has_head = bool(title) or "\n" in contents
    return str(names[0]), f"{title}\n{contents}" if has_head else contents


def split_contents(contents: str) -> tuple[str, str]:
    """(title, text); contents of one line have no title."""
    title, newline, text = contents.partition("\n")
    return (title, text) if newline else ("", contents)


def join_contents(title: str, text: str) -> str:
    """What split_contents takes apart into these."""
    return f"{title}\n{text}" if title or "\n" in text else text


def identity(path: Path) -> dict[str, Any]:
    """What tells in a second whether a large file is the one that was read before."""
    about = path.stat()
    return {"size": about.st_size, "mtime_ns": about.st_mtime_ns, "sample": hash_of(path, False)}


def save_array(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would give a path another ending
        np.save(file, array)


def refuse_other_formats(path: Path) -> None:
    """ValueError, with what to do, if a file does not hold a JSON object a line."""
    kind = packing(path)
    with path.open("rb") as file:
        start = file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if kind is None and start.startswith(b"["):
        kind = "a JSON array"
    if kind is None and not start.startswith(b"{") and b"\t" in start.split(b"\n", 1)[0]:
        kind = "a table (tab-separated)"
    if kind is not None:
        advice = f"python retriever.py convert --corpus {path} --out NEW.jsonl"
        advice = UNPACK if packing(path) not in (*OPENERS, "parquet") else f"convert it: {advice}"
        raise ValueError(f"{path}: got {kind}, expected a JSON object a line; {advice}")


class Lines:
    """A file of a passage a line, read by offsets, which stay on disk where `cache` names a place.

    cache: an index's path. Offsets and hash are kept beside it, in .rows.npy and .rows.json, and
    taken while the corpus has the size, the time and the sampled contents that it had then.
    is_known: False reads the whole file again whatever is kept.
    """

    def __init__(self, path: Path, cache: Path | None = None, *, is_known: bool = True) -> None:
        self.path = path
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: got no such file, expected a corpus (JSON lines)")
        refuse_other_formats(self.path)
        self._file = self.path.open("rb")
        if cache is None:
            return self._scan()
        folder, name = (cache, "") if cache.is_dir() else (cache.parent, f".{cache.name}")
        rows, about = folder / f"{name}.rows.npy", folder / f"{name}.rows.json"
        facts = identity(self.path)
        kept = read_json(about, {}) if is_known else {}
        if not rows.is_file() or {key: kept.get(key) for key in facts} != facts:
            self._scan()
            kept = {**facts, "sha256": self.sha256}
            try:
                about.unlink(missing_ok=True)  # it must never stand beside offsets of another file
                write_aside(rows, partial(save_array, self._offsets))
                write_aside(about, lambda path: path.write_text(json.dumps(kept) + "\n"))
            except OSError as error:
                return say(f"{rows}: not written ({error}), so every start reads all of {path}")
        with blaming(rows, "the offsets of a corpus"):
            self._offsets, self.sha256 = np.load(rows, mmap_mode="r"), kept["sha256"]
            if self._offsets[-1] != facts["size"]:
                raise ValueError(f"offsets up to {self._offsets[-1]}; remove the file")

    def _scan(self) -> None:
        """Find the rows by reading all of the file, which gives its SHA-256 as well."""
        offsets, spaces, position, begins = [], [], 0, [0]
        digest, size = hashlib.sha256(), self.path.stat().st_size
        with tqdm(None, "scan", size, unit="B", unit_scale=True, delay=3) as bar:
            while block := self._file.read(BLOCK):  # a line at a time is ten times as slow
                characters = np.frombuffer(block, np.uint8)
                ends = np.flatnonzero(characters[:-1] == ord("\n"))
                starts = np.append(begins, ends + 1).astype(int)
                offsets.append(starts + position)
                spaces.append(offsets[-1][characters[starts] <= ord(" ")])
                begins = [0] if characters[-1] == ord("\n") else []
                digest.update(block)
                position += len(block)
                bar.update(len(block))
        if not position:
            raise ValueError(f"{self.path}: got an empty file, expected a passage a line")
        self.sha256, self._offsets = digest.hexdigest(), np.concatenate([*offsets, [position]])
        lines = np.searchsorted(self._offsets, np.concatenate(spaces))
        if blank := [line for line in lines if not self._line(line).strip()]:
            # They become the end of the row before them.
            self._offsets = np.delete(self._offsets, blank)
        if not len(self):
            raise ValueError(f"{self.path}: got blank lines alone, expected a passage a line")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _line(self, row: int) -> bytes:
        start, end = self._offsets[row], self._offsets[row + 1]
        return os.pread(self._file.fileno(), end - start, start)

    def line_number(self, row: int) -> int:
        """Counted in the file, because blank lines are no rows: only messages need it."""
        left, number = int(self._offsets[row]), 1
        with self.path.open("rb") as file:
            while block := file.read(min(BLOCK, left)):
                number, left = number + block.count(b"\n"), left - len(block)
        return number

    def read(self, row: int) -> tuple[str, str]:
        """(id, contents) of a row. Bytes that are not UTF-8 and lone surrogates become U+FFFD."""
        return self._parse(self._line(row), row)

    def _parse(self, line: bytes, row: int) -> tuple[str, str]:
        text = line.decode("utf-8", "replace").removeprefix("\ufeff").strip()
        try:
            return passage_of(parse_object(text, ""), "")
        except ValueError:  # again, with the number of the line, which takes time to find
            where = f"{self.path}:{self.line_number(row)}"
            return passage_of(parse_object(text, where), where)

    def check(self) -> None:
        """Read every row, so that a bad line is found before hours of embedding."""
        hashes = np.empty(len(self), np.int64)
        bar = tqdm(None, "check", len(self), unit=" passages", unit_scale=True, delay=3)
        with bar, self.path.open("rb") as file:  # in order, which is faster than row by row
            for row, line in enumerate(filter(bytes.strip, file)):
                hashes[row] = hash(self._parse(line, row)[0])
                bar.update()
        in_order = np.sort(hashes)
        if len(repeated := in_order[1:][in_order[1:] == in_order[:-1]]):
            first, second = np.flatnonzero(hashes == repeated[0])[:2].tolist()
            say(f"{self.path}: {len(repeated)} passages have the id of an earlier one, such as "
                f"{self.read(first)[0]!r} in lines {self.line_number(first)} and "
                f"{self.line_number(second)}")

    def spread(self, num: int) -> list[int]:
        """Row 0 and rows all over the file: short ones, which no limit of tokens cuts."""
        rows = {0}
        for start, end in itertools.pairwise(np.linspace(0, len(self), num).astype(int).tolist()):
            if (start := max(start, end - num)) < end:
                rows.add(start + int(np.diff(self._offsets[start : end + 1]).argmin()))
        return sorted(rows)


def convert(corpus: Path, out: Path) -> None:
    """Write a corpus of any format as JSON lines with id and contents."""
    if not corpus.is_file():
        raise FileNotFoundError(f"--corpus: got {corpus}, expected a file")
    if out.exists():
        raise FileExistsError(f"--out: got {out}, which is there already; expected a new file")
    count = 0

    def write(path: Path) -> None:
        nonlocal count
        try:
            with path.open("w", encoding="utf-8") as file:
                for where, row in tqdm(_rows(corpus), "convert", unit=" passages", unit_scale=True):
                    name, contents = passage_of(row, where)
                    passage = {"id": name, "contents": contents}
                    file.write(json.dumps(passage, ensure_ascii=False) + "\n")
                    count += 1
            if not count:
                raise ValueError(f"{corpus}: got no passages, expected at least one")
        except BaseException:
            path.unlink()
            raise

    write_aside(out, write)
    print(f"{out}: {count} passages of {corpus}")


def _rows(path: Path) -> Rows:
    kind = packing(path)
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    if kind not in OPENERS:
        raise ValueError(f"{path}: got {kind}, expected plain text (UTF-8), gzip, bzip2, xz or "
                         f"parquet; {UNPACK}")
    with blaming(path, "a whole file"), OPENERS[kind](
            path, "rt", encoding="utf-8-sig", errors="replace", newline="\n") as file:
        numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        number, first = next(numbered, (0, ""))
        start = first.lstrip()[:1]
        if start == "[":
            for i, row in enumerate(json.loads(first + file.read()), 1):
                yield f"{path}: entry {i}", row if isinstance(row, dict) else {"": row}
        elif start == "{":
            for place, line in itertools.chain([(number, first)], numbered):
                yield (where := f"{path}:{place}"), parse_object(line.strip(), where)
        elif first:
            yield from _table_rows(path, first.rstrip("\r\n").split("\t"), number, file)


def _table_rows(path: Path, first: list[str], number: int, rest: Iterable[str]) -> Rows:
    """Rows after the first of a tab-separated table: DPR's, with a header, or MS MARCO's."""
    names = [name.strip().lower() for name in first]
    if set(names) & {*IDS} and set(names) & {*TEXTS}:  # a header, and fields may be in quotes
        csv.field_size_limit(MAX_FIELD)
        table = csv.reader(rest, delimiter="\t", strict=True)
        rows = ((number + table.line_num, fields) for fields in table)
    else:  # no header, and quotes are part of the text
        names = ["id", "text"]
        split = (line.rstrip("\r\n").split("\t") for line in rest)
        rows = enumerate(itertools.chain([first], split), number)
    try:
        for line_number, fields in rows:
            if "".join(fields).strip():
                where = f"{path}:{line_number}"
                if len(fields) != len(names):
                    raise ValueError(f"{where}: got {len(fields)} columns, expected {names}, or a "
                                     "first line that names the columns")
                yield where, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{number + table.line_num}: got {error}; expected a field in "
                         "quotes to end at a tab or a line's end") from error


def _parquet_rows(path: Path) -> Rows:
    try:
        from pyarrow import parquet  # here, because it is optional
    except ImportError as error:
        raise ImportError(f"{path}: got a parquet file and {error}; pip install pyarrow") from error
    with blaming(path, "a parquet file"):
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
