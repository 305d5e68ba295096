"""What a run's folder says to those who come later: its settings, its states as models.

A program that asks a run's model takes from run.json how it is asked. A run that goes on may change
its learning rates, but not what it is.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from infra.checkpoint import MODEL, read_meta, states
from infra.cli import program_of
from infra.config import ROOT

RECORD = "run.json"
# Settings that may change between a run and its resumption without a word.
MAY_DIFFER = {"resume", "overwrite", "max_minutes", "save_every", "timeout_minutes", "processes",
              "log_to"}
# Those that say which run it is, and those by which a step number finds its data. Others may
# change with a word: learning rates, the number of steps, where passages lie.
MUST_STAY = {
    "phase", "student", "teacher", "questions", "val_size", "episodes", "seed", "protocol",
    "prompt", "reward", "advantage", "group_size", "batch_size", "prompts_per_step",
    "minibatch_size", "kl_where", "kl_in", "mean_over", "distance", "train_layers",
}  # fmt: skip
# Settings of an agent that hold paths, and those that hold a path or a name.
PATHS, PATHS_OR_NAMES = ("corpus", "encoder", "index"), ("prompt", "protocol")


@cache
def say_once(text: str) -> None:
    """To stderr, because what a program prints may be read by another one."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def lock(folder: Path) -> TextIO:
    """Hold a folder until this process ends; ValueError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: got another process that writes there; wait until it ends, "
                         "or give another --run-dir") from None
    except OSError as error:
        say_once(f"{folder}: cannot be locked ({error}); let no other process write there")
    return file


def clean(folder: Path, names: Iterable[str]) -> list[Path]:
    """Remove what stands half-written in a run's folder, which is returned, and these names."""
    left = [*folder.glob(".*.partial*"), *(folder / "state").glob("*.partial")]
    for path in (*left, *(folder / name for name in names)):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    return left


# ---- run.json ----


def read_record(folder: Path) -> dict[str, Any] | None:
    """What run.json says, None without one; ValueError if it is damaged."""
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no valid JSON ({error}), expected the record of a run; "
                         "restore it, or move it away") from error
    kinds = {"settings": dict, "paths": dict, "history": list}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key, kind()), kind) for key, kind in kinds.items()
    ) or "settings" not in record:
        raise ValueError(f"{path}: got no object with {list(kinds)}, expected the record of a run; "
                         "restore it, or move it away")
    return record


def paths_of(settings: dict[str, Any]) -> dict[str, str]:
    """The settings that name files or folders that are there, as absolute paths."""
    texts = {key: split_name(value)[0] for key, value in settings.items() if isinstance(value, str)}
    return {key: os.path.abspath(text) for key, text in texts.items() if os.path.exists(text)}


def check_apart(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to learn from what the run itself replaces: its result and its states."""
    own = folder.resolve()
    for name, path in paths_of(settings).items():
        where = Path(path).resolve()
        if name != "run_dir" and (where == own or where.parent == own / "state"):
            raise ValueError(f"--{name.replace('_', '-')}: got {path}, which the run in {folder} "
                             "replaces; give another --run-dir")


def split_name(value: str) -> tuple[str, str]:
    """("FILE.py", ":NAME") of a setting that names something in a file; else (value, "")."""
    file, colon, name = value.rpartition(":")
    return (file, colon + name) if file.endswith(".py") else (value, "")


def changes(record: dict[str, Any], settings: dict[str, Any], folder: Path) -> list[str]:
    """What a resumed run says about settings that changed; ValueError if it would be another run.
    """
    if not record:
        return [f"{folder}: no {RECORD} to compare the settings with"] if states(folder) else []
    lines, refused = [], []
    was_at = record.get("paths", {})
    for name, value in json.loads(json.dumps(settings)).items():
        before = record["settings"].get(name, value)
        if name in MAY_DIFFER or value == before:
            continue
        flag, place = "--" + name.replace("_", "-"), str(was_at.get(name, ""))
        if place and isinstance(value, str) and os.path.exists(value):
            if os.path.realpath(value) == os.path.realpath(place):
                continue  # another way to write the same path
            if not os.path.exists(place):
                lines.append(f"{flag}: was {before!r}, which is gone; continues with {value!r}")
                continue
        if name in MUST_STAY:
            refused.append(f"{flag} {before!r}, now {value!r}")
        else:
            lines.append(f"{flag}: was {before!r}, continues with {value!r}")
    if refused:
        raise ValueError(f"{folder}: --resume would make it another run: it has "
                         f"{'; '.join(refused)}. Give what it has, or another --run-dir, or start "
                         "again with --overwrite")
    return lines


# ---- a run as a model ----


def newest_model(folder: Path) -> Path:
    """The newest state of a run that has no result yet; says which step it is."""
    newest = next((state for state in reversed(states(folder)) if (state / MODEL).exists()), None)
    if newest is None:
        raise FileNotFoundError(f"{folder}: got a run without a result or a state that holds "
                                f"{MODEL}; wait for its first state (--save-every)")
    meta = read_meta(newest)
    say_once(f"{folder} is unfinished: step {meta.get('step', '?')} of {meta.get('num_steps', '?')}"
             f", from {newest}")
    return newest


def model_name(model: str) -> str:
    """The last part of a path; a state is named after its run, too."""
    path = Path(model)
    return f"{path.parents[1].name}-{path.name}" if path.parent.name == "state" else path.name


def recorded_settings(
    names: Iterable[str], model: str, given: Collection[str], program: str
) -> dict[str, Any]:
    """{"FILE: setting": ...}: the settings `names` of the run that made a model.

    given: the names that flags or presets of a person hold, which come first.
    """
    folder = Path(model)
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        if folder.is_dir():
            say_once(f"{model}: no {RECORD}, so the settings are those of presets and flags")
        return {}
    settings, path = record["settings"], folder / RECORD
    owner = program_of(str(settings.get("phase", "")))
    if owner not in (None, program) and settings.get("protocol") == owner:
        raise ValueError(f"{path}: got a run of {owner}.py, whose tags and prompts {program}.py "
                         f"does not know; use {owner}.py for its models")
    taken = {name: settings[name] for name in names if name in settings and name not in given}
    if {"corpus", "encoder"} & {*given}:
        taken.pop("index", None)  # it is of the run's corpus and encoder
    found = {name: find_path(record, name, path) if isinstance(value, str) else value
             for name, value in taken.items()}
    shown = ", ".join(f"{name} {value}" for name, value in found.items()
                      if value not in ("", None))
    say_once(f"settings of {path}: {shown}" if shown else f"no settings of {path} are used")
    return found


def find_path(record: dict[str, Any], name: str, path: Path) -> str:
    """A text that run.json holds; where it names a file or a folder, one that is there now."""
    value, was_at = record["settings"][name], str(record.get("paths", {}).get(name, ""))
    file, rest = split_name(value)
    looks = name in PATHS or name in PATHS_OR_NAMES and ("/" in file or Path(file).suffix != "")
    if not value or not looks:
        return value
    for place in (was_at, file, ROOT / file):
        if place and os.path.exists(place):
            return str(place) + rest
    if was_at:  # else it may be an id of the hub
        raise FileNotFoundError(f"{path}: {name}: got {value} (then {was_at}), which is not there "
                                f"any more; give --{name}")
    return value
