"""Files that a person hands in: JSON, JSON lines, folders of checkpoints.

What cannot be read is refused by name: the file, the line or the key.
"""

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip",
         b"\x28\xb5\x2f\xfd": "zstandard", b"PAR1": "parquet", b"ARROW1": "arrow",
         b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # how files begin that are not plain text


PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # of a checkpoint's files


def resolve(path: str | Path, patterns: Sequence[str] = PATTERNS) -> Path:
    """The folder of a checkpoint; of an id such as "Qwen/Qwen2.5-0.5B-Instruct", the files of these
    patterns are downloaded.

    A run without a result stands for its newest state.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "run.json").is_file() and not any(path.glob("model*.safetensors")):
            from infra.record import newest_model  # here, because only unfinished runs need it
            return newest_model(path)
        return path
    problem = f"checkpoint: got {path}, expected a folder or an id like org/name"
    if path.is_file() or path.parent.is_dir():  # an id is no path
        from infra.hints import about_path
        raise FileNotFoundError(f"{problem}; {about_path(path)}")
    from huggingface_hub import snapshot_download  # here, because only downloads need it
    try:
        return Path(snapshot_download(str(path), allow_patterns=[*patterns]))
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise FileNotFoundError(f"{problem} to download ({got}); check the path") from error


@contextmanager
def blaming(path: Path, expected: str) -> Iterator[None]:
    """Context manager: whatever goes wrong inside becomes a ValueError that names this file."""
    try:
        yield
    except (FileNotFoundError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path}: got {got}; expected {expected}; copy it again") from error


def file_in(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        got = sorted(entry.name for entry in folder.iterdir())
        from infra.hints import about_missing
        raise FileNotFoundError(f"{folder}: got {got}, expected {name} among them; "
                                f"{about_missing(folder, name)}")
    return folder / name


def read_json(path: Path, default: dict | None = None) -> dict:
    """The object in a JSON file. If there is no such file: `default`, or an error without one."""
    if default is not None and not path.is_file():
        return default
    with blaming(path, "a JSON object"):
        return {**json.loads(file_in(path.parent, path.name).read_text(encoding="utf-8"))}


def check(where: str, key: str, got: object, *expected: object) -> None:
    if got not in expected:
        raise ValueError(f"{where}: unsupported {key}: got {got!r}, expected one of "
                         f"{list(expected)}; use a Qwen2, Qwen3, Llama or mean-pooling BERT model "
                         "that is not quantized (docs/own-models.md lists what loads)")


def read_rows(path: Path, what: str = "question") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a file with one JSON object, a `what`, a line; blank ones are skipped.
    """
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: got a parquet file, expected JSON lines; convert it with "
                         "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, expected {what}s (JSON lines)")
    if kind := packing(path):
        raise ValueError(f"{path}: got {kind}, expected plain JSON lines in UTF-8; unpack it")
    is_empty = True
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                is_empty = False
                yield number, parse_object(line, f"{path}:{number}")
    if is_empty:
        raise ValueError(f"{path}: got no {what}s, expected at least one line")


def packing(path: Path) -> str | None:
    """What a file is by its first bytes; None if it may be plain text."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line; errors name `where`. Lone surrogates become U+FFFD."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got no valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {line[:60]!r}, expected a JSON object")
    if "\\ud" in line.lower():  # an escape that may write a lone surrogate
        row = json.loads(replace_surrogates(json.dumps(row, ensure_ascii=False)))
    return row


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which no tokenizer and no UTF-8 file takes, become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def say(line: str) -> None:
    """A line for the person at the terminal: one also where several processes run."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
