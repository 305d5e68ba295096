"""Settings: the fields of a dataclass, with which values can work and who reads them.

They are of the types int, float, str, bool, X | None (written "none") and tuple[X, ...]. infra/cli
fills them from presets and flags; `save` records them. Nothing local is imported here.
"""

import dataclasses
import importlib.metadata
import json
import operator
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
# Their versions are in run.json.
PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "faiss-gpu", "faiss-cpu")
RANGE = {"at_least": (operator.ge, "at least"), "above": (operator.gt, "above"),
         "at_most": (operator.le, "at most"), "below": (operator.lt, "below")}
ABOUT = {"choices": (), "reads": "", "writes": "", "needed": False, "made_by": "", "of": "",
         "when": "", "section": "", "rare": False, "is_words": False, **dict.fromkeys(RANGE)}
T = TypeVar("T")


def setting(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with a help text; `about` says which values can work, and who reads it.

    choices: values of a str; those of `phase` may be a dict, with the words that a phase goes by
    at_least, above, at_most, below: bounds of a number, or names of the settings that bound it;
        without a lower one a number is at least 0
    reads, writes: FILE, DIR (a checkpoint), PATH or FILE.py:NAME; "paper|FILE": or the word paper
    needed: whether it must be given
    made_by: a word; phases that go by it make a file that others read
    section: "of: title" or title, for --help, of this field and those after it; else the class's
    of: words; phases that go by one of them read it. Empty: the section's; without one, all phases
    when: "advantage gae": it is read only where that setting has one of these values
    rare: whether --help-all alone shows it
    is_words: whether it takes the words that stand beside the flags, a question for example
    """
    assert about.keys() <= ABOUT.keys(), about
    if type(default) in (int, float) and "above" not in about:
        about.setdefault("at_least", 0)
    return dataclasses.field(default=default, metadata={**ABOUT, "help": help, **about})


def reads(cls: type, name: str, phase: str | None) -> bool:
    """Whether a phase reads the setting of this name; a program without phases reads all."""
    of = cls.__dataclass_fields__[name].metadata["of"] or sections(cls)[name].rpartition(": ")[0]
    return not of or phase is None or not words_of(cls, phase).isdisjoint(of.split())


def words_of(cls: type, phase: str) -> set[str]:
    """What a phase goes by: its name, and the words beside it in the choices of `phase`."""
    choices = cls.__dataclass_fields__["phase"].metadata["choices"]
    return {phase, *(choices[phase].split() if isinstance(choices, dict) else ())}


def in_project(path: str) -> str:
    """A relative path as one of the project's, whatever the current folder is."""
    return path if Path.cwd() == ROOT else str(ROOT / path)


def is_remote(path: str) -> bool:
    """Whether it is an address, or an id like org/name, and no path."""
    folder, *rest = path.split("/")
    is_path = folder in ("", ".", "..", "~", "runs", "world") or (ROOT / folder).is_dir()
    return "://" in path or len(rest) == 1 and not is_path and not Path(folder).is_dir()


def save(settings: Any, path: str | Path, **more: Any) -> None:
    """Write the resolved settings, and what else a result depends on (and `more`), as JSON."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    record = {"settings": dataclasses.asdict(settings), "argv": sys.argv, "commit": None,
              "versions": {"python": sys.version.split()[0]}, **more}
    record["versions"].update({name: installed.get(name) for name in PACKAGES})
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):  # git is not installed
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        record["commit"] = git.stdout.strip() or None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def sections(cls: type) -> dict[str, str]:
    """The section of each field: a class that changes a field leaves it in its section."""
    sections: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = base.__name__.removesuffix("Settings").lower()
        for name, field in getattr(base, "__dataclass_fields__", {}).items():
            if name not in sections:
                section = sections[name] = field.metadata["section"] or section
    return sections


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
