"""Settings: a dataclass, filled from a TOML preset, then from --flags.

    settings = load(Settings, sys.argv[1:], prog="train.py", description="...", default_config=FILE)

The fields of the dataclass are setting(default, help). Precedence, lowest first: its defaults;
top-level keys of the preset; the preset's table named after the program ("[eval]" for eval.py); its
table named after the phase, where the dataclass has a `phase`; the same of a second preset
(`--config models.toml method.toml`); flags. The phase itself is --phase, else the presets' top-level
key, the last one's first, else the default. `--config none` reads no preset. An unknown or
ill-typed key is an error that names the nearest match: a misspelt setting must never run as the
default. Field types: int, float, str, bool, X | None (written "none"), tuple[X, ...].
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
RECORDED = ("torch", "tokenizers", "safetensors", "numpy", "faiss-gpu")  # versions for save()


def setting(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a help text; `choices` lists the values a str may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def load(cls: type[T], argv: list[str], *, prog: str, description: str,
         default_config: str | Path | None = None, shared: Iterable[str] | None = None) -> T:
    """Settings of type cls; a user's mistake ends the program with one line and exit status 2.

    shared: for a program that reads another's preset (eval.py reads train.py's): the top-level keys
    it takes from there; it passes over the others. None: every top-level key must be a field.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", nargs="+", default=[default_config or "none"],
                        help=f"TOML presets, the later ones first in precedence, or none (default {default_config})")
    for name, field in fields.items():
        choices = field.metadata["choices"]
        kind = "|".join(choices) if choices else hints[name].__name__ if hints[name] in (
            int, float, str, bool) else str(hints[name])
        text = f"{field.metadata['help']} ({kind}; default {field.default})".replace("%", "%%")
        how = ({"action": argparse.BooleanOptionalAction} if hints[name] is bool else
               {"metavar": "X", "nargs": "*" if get_origin(hints[name]) is tuple else None})
        parser.add_argument(_flag(name), dest=name, help=text, **how)
    given, extra = parser.parse_known_args(argv)
    flags = {name: value for name, value in vars(given).items() if name in fields}
    try:
        if extra:
            near = _nearest(extra[0].lstrip("-").split("=")[0].replace("-", "_"), fields, _flag)
            raise ValueError(f"unknown argument: got {extra[0]!r}, expected a flag of {prog}{near}")
        flags = {name: _convert(value, hints[name], _flag(name)) for name, value in flags.items()}
        values = {}
        if [*map(str, given.config)] != ["none"]:
            paths = [*map(Path, given.config)]
            for place, table in _layers(paths, fields, Path(prog).stem, flags.get("phase")):
                for key, value in table.items():
                    if shared is not None and place in map(str, paths) and key not in shared:
                        continue
                    if key in fields:
                        values[key] = _convert(value, hints[key], f"{place}: {key}", text=False)
                    else:
                        raise ValueError(f"{place}: got an unknown key {key}, expected a setting "
                                         f"of {prog}{_nearest(key, fields)}")
        values |= flags
        for name, value in values.items():
            choices = fields[name].metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}"
                                 + _nearest(value, choices))
        return cls(**values)  # __post_init__ of cls may raise ValueError, too
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{prog}: {error}\n")


def save(settings: Any, path: str | Path) -> None:
    """Write the resolved settings and what else a result depends on, as JSON."""
    packages = {package.name: package.version for package in importlib.metadata.distributions()}
    versions = {"python": sys.version.split()[0]} | {name: packages.get(name) for name in RECORDED}
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # no git here
        commit = None
    record = {"settings": dataclasses.asdict(settings), "argv": sys.argv, "commit": commit,
              "versions": versions}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def _layers(paths: list[Path], fields: dict, program: str, phase: str | None) -> list[tuple[str, dict]]:
    """The tables of the presets that apply, each with where it stands, in order of precedence."""
    documents = {path: _read(path) for path in paths}
    for path in reversed(paths):
        phase = phase or documents[path].get("phase")
    layers = []
    for path, document in documents.items():
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        top = {key: value for key, value in document.items() if key not in tables}
        names = [program]
        if "phase" in fields:
            names.append(phase or fields["phase"].default)
            known = (program, "eval", *fields["phase"].metadata["choices"])
            for table in set(tables) - set(known):
                raise ValueError(f"{path}: got an unknown table [{table}], expected one of "
                                 f"{', '.join(known)}{_nearest(table, known)}")
        layers += [(str(path), top), *((f"{path}: [{name}]", tables.get(name, {})) for name in names)]
    return layers


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config: got {path}, expected a TOML file; give a path, or none")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path}: not TOML: {error}") from None


def _convert(value: Any, hint: Any, where: str, *, text: bool = True) -> Any:
    """A TOML value or a flag's text as the field's type; of TOML, only int to float converts."""
    kind, *rest = [option for option in get_args(hint) if option is not type(None)] or [hint]
    if get_origin(hint) is tuple and isinstance(value, list):
        if text and kind is not str:  # --budgets 16,32 as well as --budgets 16 32
            value = [part for item in value for part in item.split(",") if part]
        return tuple(_convert(item, kind, where, text=text) for item in value)
    if type(None) in get_args(hint):
        return None if value == "none" else _convert(value, kind, where, text=text)
    try:
        if kind is float and type(value) is int or text and kind in (int, float):
            value = kind(value)
    except ValueError:
        pass  # stays a str, refused below
    if rest or type(value) is not kind or kind is float and math.isnan(value):
        expected = str(hint) if get_args(hint) else hint.__name__
        raise ValueError(f"{where}: got {value!r}, expected {expected}; correct its value")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(word: str, known: Iterable[str], show: Any = str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {show(near[0])}?" if near else "; see --help"
