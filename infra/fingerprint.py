"""What a file was made with: named values, and the contents of the files among them.

It stands beside the file, in FILE.json, with the SHA-256 of the file itself. So a file that a
person put there, or changed, is not taken for one that was made.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from infra.checkpoint import digest, write_aside
from infra.files import resolve
from infra.record import split_name

BLOCK, MAX_BLOCKS = 2**16, 2**12  # bytes that are read at a time; how many times
MODELS = ("teacher", "encoder")  # folders or ids of the hub
# What a model is made of, its pooling included; its folder may be that of a run.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "[0-9]_*/*.*")
NOT_OF_A_MODEL = ("run.json", "meta.json", "collapse.txt")
RETRIEVAL = {"corpus", "encoder", "index", "top_k"}


def contents(values: dict[str, Any]) -> dict[str, Any]:
    """The values; those that name a file or a folder as [name, a hash of what is in it]."""
    if values.get("max_turns") == 0:
        values = {name: value for name, value in values.items() if name not in RETRIEVAL}
    made_with = {}
    for name, value in sorted(values.items()):
        path = resolve(value) if name in MODELS and value else value
        made_with[name] = value
        if isinstance(path, str | Path):
            file, part = split_name(str(path))  # FILE.py:NAME
            if os.path.exists(file):
                made_with[name] = [str(value), hash_of(Path(file), name in MODELS) + part]
    return made_with


def hash_of(path: Path, is_model: bool) -> str:
    """A hash of a file or of the files of a folder, wherever it lies.

    Of a file beyond 256 MiB its size and 4,096 places are read: enough to tell two corpora or two
    trained models apart, in less than a second.
    """
    files = [path]
    if path.is_dir():
        patterns = MODEL_FILES if is_model else ("[!.]*",)
        found = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
        files = sorted(file for file in found if not is_model or file.name not in NOT_OF_A_MODEL)
    hasher = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        hasher.update(f"{file.name if path.is_dir() else ''} {size}".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(BLOCK, size // MAX_BLOCKS)):
                opened.seek(start)
                hasher.update(opened.read(BLOCK))
    return hasher.hexdigest()[:16]


def stamp(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def write_stamp(path: Path, sha256: str, made_with: dict[str, Any]) -> None:
    """Before the file itself: a file that a killed process has finished is not without one."""
    text = json.dumps({"sha256": sha256, "made_with": made_with}, indent=1) + "\n"
    write_aside(stamp(path), lambda partial: partial.write_text(text))


def check_stamp(path: Path, values: dict[str, Any]) -> str:
    """What to say of a file that is there; ValueError if it was made with other values."""
    as_it_is = f"{path}: no fingerprint: taken as it is"
    if not stamp(path).exists():
        return as_it_is
    try:
        record = json.loads(stamp(path).read_text(encoding="utf-8"))
        sha256, before = record["sha256"], dict(record["made_with"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{stamp(path)}: got {type(error).__name__}: {error}, expected what "
                         f"{path} was made with; remove it to take the file as it is") from error
    if digest(path) != sha256:
        return f"{as_it_is} ({stamp(path).name} is of another file, or it was changed since)"
    now = contents(values)
    differing = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        # Another seed is another draw of the same: runs of several seeds may share a file.
        if name != "seed" and content(old) != content(new):
            differing.append(f"--{name.replace('_', '-')}: it has {shown(old)}, now {shown(new)}")
    if differing:
        raise ValueError(f"{path}: got a file that was made with other settings, which is not "
                         f"written over: {'; '.join(differing)}. Give --episodes OTHER, or the "
                         f"settings of the file; remove {stamp(path)} to take it as it is, or both "
                         "to make it again")
    return f"{path}: made with these settings; taken"


def content(value: Any) -> Any:
    """What counts of a value: the name of a file or a folder does not."""
    return value[1] if isinstance(value, list) and len(value) == 2 else value


def shown(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]} (content {str(value[1])[:8]})"
    return "nothing" if value in (None, "") else str(value)
