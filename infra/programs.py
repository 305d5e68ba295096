"""What programs share beside their settings: commands, numbers, and paths that must be there."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra.cli import leave
from infra.config import ROOT, flag_of, is_remote, reads, words_of

# What makes the folders that do not come with the project.
MADE_BY = {"runs/trails": "build-trails", "runs/readers": "build-readers",
           "runs/world/pairs": "build-pairs"}
EXPECTED = {"DIR": "a checkpoint (a folder with config.json, or an id like org/name)",
            "PATH": "a file or a folder"}  # others: a file


def read_command(argv: list[str], prog: str, doc: str, commands: Iterable[str]) -> str:
    """The command that a program begins with; the program's help is doc."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help", "--help-all"):
        print(doc.strip())
        sys.exit(0)
    if command not in commands:
        *names, last = commands
        expected = f"{', '.join(names)} or {last}" if names else last
        leave(prog, f"got {command!r}, expected {expected}; see --help", 2)
    return command


def number(text: str, at_least: int = 0) -> int:
    """For add_argument(type=number): a whole number that is not negative."""
    if int(text) < at_least:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least {at_least}")
    return int(text)


def count(text: str) -> int:
    """For add_argument(type=count): a whole number above 0."""
    return number(text, at_least=1)


def check_paths(settings: Any) -> None:
    """Refuse what the phase needs and does not get, and what it reads and is not there."""
    cls, phase = type(settings), getattr(settings, "phase", None)
    fields = [field for field in dataclasses.fields(cls) if reads(cls, field.name, phase)]
    for field in fields:
        if field.metadata["needed"] and not getattr(settings, field.name):
            is_path = field.metadata["reads"]
            what = "checkpoint, expected a folder or a hub id" if is_path else (
                f"{field.name}, expected one")
            raise ValueError(f"{flag_of(field.name)}: got no {what}")
    for field in fields:
        *words, kind = field.metadata["reads"].split("|")
        makers = phases_of(cls, field.metadata["made_by"])
        if kind and phase not in makers:
            value = getattr(settings, field.name)
            for name in value if isinstance(value, tuple) else (value,):
                is_elsewhere = kind == "DIR" and is_remote(name) or "://" in name
                if name not in ("", *words) and not is_elsewhere:
                    advice = f"--phase {makers[0]} makes it" if makers else ""
                    check_path(name, kind, flag_of(field.name), advice)


def phases_of(cls: type, word: str) -> list[str]:
    """The phases that go by a word."""
    if not word:
        return []
    phases = cls.__dataclass_fields__["phase"].metadata["choices"]
    return [phase for phase in phases if word in words_of(cls, phase)]


def check_path(name: str, kind: str, flag: str, advice: str = "") -> None:
    """Refuse a path that is not there, or that is of another kind."""
    path = Path(name.rpartition(":")[0] if kind == "FILE.py:NAME" else name)
    if kind == "FILE.py:NAME":
        is_right = path.is_file() or (ROOT / path).is_file()
    elif kind == "DIR":
        is_right = any((path / name).is_file() for name in ("config.json", "modules.json"))
    else:
        is_right = path.exists() if kind == "PATH" else path.is_file()
    if is_right:
        return
    got = "is not there" if not path.exists() else "is a folder" if path.is_dir() else "is a file"
    if path.is_dir() and kind == "DIR":
        got = "has no config.json"
    place = os.path.relpath(path, ROOT)
    if place.startswith("runs/") and not advice:
        advice = "it is what a finished run of train.py leaves in its --run-dir; train that first"
    for folder, command in MADE_BY.items():
        if f"{place}/".startswith(f"{folder}/"):
            advice = f"run `python -m world.build {command}` first"
    expected = kind if ":" in kind else EXPECTED.get(kind, "a file")
    raise FileNotFoundError(f"{flag}: got {name}, which {got}, expected {expected}; "
                            f"{advice or 'check the path'}")
