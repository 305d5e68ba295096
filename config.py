"""Settings: a dataclass, filled from a TOML preset, then from --flags; an unknown or ill-typed key is an error.

    @dataclass(frozen=True)
    class Settings:
        lr: float = setting(1e-4, "peak learning rate")

    settings = load(Settings, sys.argv[1:], prog="train.py", description="...", default_config=PRESET)

Precedence, lowest first: defaults of the dataclass; top-level keys of the preset; its table named after the
program ("[eval]" for eval.py); its table named after the phase, where the dataclass has a `phase`; flags. The
phase itself is --phase, else the preset's top-level key, else the default. `--config none` reads no preset.
Field types: int, float, str, bool, X | None, tuple[X, ...]. This file imports nothing local.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

T = typing.TypeVar("T")
PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "faiss-gpu")  # versions that save() records


def setting(default: typing.Any, help: str, *, choices: tuple[str, ...] = ()) -> typing.Any:
    """A dataclass field with a help text; `choices` lists the values a str may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def load(
    cls: type[T], argv: list[str], *, prog: str, description: str,
    default_config: str | Path | None = None, shared_preset: bool = False,
) -> T:
    """Settings of type cls. A user's mistake ends the program with one line (argparse's exit status 2).

    shared_preset: the preset also serves another program (eval.py reads train.py's), so top-level keys that cls
    does not have are passed over; keys in the program's own table are checked all the same.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False, add_help=True)
    parser.add_argument("--config", metavar="FILE", default=default_config,
                        help=f"TOML preset, or none (default {default_config})")
    for name, field in fields.items():
        _add_flag(parser, field, hints[name])
    known, extra = parser.parse_known_args(argv)
    flags = {n: getattr(known, n) for n in fields if n in known}
    try:
        if extra:
            raise ValueError(f"unknown argument: got {extra[0]!r}, expected a flag of {prog}"
                             + _nearest(extra[0].lstrip("-").split("=")[0].replace("-", "_"), fields, "--"))
        for name in flags:
            flags[name] = _from_text(flags[name], hints[name], f"--{name.replace('_', '-')}")
        values = {}
        if known.config is not None and str(known.config).lower() != "none":
            values = _preset(Path(known.config), fields, hints, flags.get("phase"), Path(prog).stem, shared_preset)
        values |= flags
        for name, value in values.items():
            choices = fields[name].metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}"
                                 + _nearest(str(value), choices, ""))
        return cls(**values)  # a dataclass' own __post_init__ may raise ValueError as well
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def save(settings: object, path: str | Path) -> None:
    """Write the resolved settings and what else a result depends on, as JSON."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = None
    if "torch" in sys.modules:  # not worth an import: who trains or evaluates has it
        cuda = sys.modules["torch"].cuda
        gpu = cuda.get_device_name() if cuda.is_available() else None
    record = {"settings": dataclasses.asdict(settings), "argv": sys.argv, "commit": commit(),
              "versions": versions, "gpu": gpu}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def commit() -> str:
    """The commit this code is at, with "+changes" where tracked files differ from it."""
    def git(*words: str) -> str:
        folder = str(Path(__file__).parent)
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _preset(path: Path, fields: dict, hints: dict, phase: str | None, program: str, shared: bool) -> dict:
    """The values a TOML file sets, its tables applied in the order of the module docstring."""
    if not path.is_file():
        raise FileNotFoundError(f"--config: got {path}, expected a TOML file; give its path or --config none")
    try:
        document = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    layers = [("", {key: value for key, value in document.items() if not isinstance(value, dict)})]
    layers += [(program, tables.get(program, {}))]
    if "phase" in fields:
        phase = phase or document.get("phase") or fields["phase"].default
        layers += [(phase, tables.get(phase, {}))]
        phases = fields["phase"].metadata.get("choices")
        for table in tables:
            if phases and table not in (*phases, program, "eval"):
                raise ValueError(f"{path}: [{table}]: got an unknown table, expected one of "
                                 f"{', '.join((program, 'eval', *phases))}{_nearest(table, phases, '')}")
    values = {}
    for table, layer in layers:
        for key, value in layer.items():
            where = f"{path}: {f'[{table}] ' if table else ''}{key}"
            if key in fields:
                values[key] = _check(value, hints[key], where)
            elif table or not shared:
                raise ValueError(f"{where}: got an unknown key, expected a setting of {program}.py"
                                 + _nearest(key, fields, ""))
    return values


def _nearest(word: str, known: typing.Iterable[str], prefix: str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    shown = prefix + (near[0].replace("_", "-") if prefix else near[0]) if near else ""
    return f"; did you mean {shown}?" if near else "; see --help"


def _parts(hint: typing.Any) -> tuple[type, bool, bool]:
    """A field's type as (element type, is a tuple, may be None)."""
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return options[0], True, False
    if len(options) == 1:
        kind, many, _ = _parts(options[0])
        return kind, many, True
    if hint in (int, float, str, bool):
        return hint, False, False
    raise TypeError(f"config: a field of type {hint}: expected int, float, str, bool, X | None or tuple[X, ...]")


def _name(hint: typing.Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _check(value: typing.Any, hint: typing.Any, where: str) -> typing.Any:
    """A TOML value as the field's type: an int may stand for a float, nothing else is converted."""
    kind, many, optional = _parts(hint)
    if optional and value == "none":  # TOML has no null
        return None
    if many and isinstance(value, list):
        return tuple(_check(item, kind, where) for item in value)
    if kind is float and type(value) is int:
        value = float(value)
    if many or type(value) is not kind or (kind is float and math.isnan(value)):
        raise ValueError(f"{where}: got {value!r} ({type(value).__name__}), expected {_name(hint)}; correct its value")
    return value


def _from_text(text: typing.Any, hint: typing.Any, where: str) -> typing.Any:
    """A flag's words as the field's type (a bool flag arrives as a bool)."""
    kind, many, optional = _parts(hint)
    if isinstance(text, list):
        return tuple(_from_text(word, kind, where) for word in text)
    if optional and text == "none":
        return None
    try:
        return _check(text if kind in (str, bool) else kind(text), kind, where)
    except ValueError:
        raise ValueError(f"{where}: got {text!r}, expected {_name(hint)}; correct its value") from None


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: typing.Any) -> None:
    kind, many, _ = _parts(hint)
    flag = "--" + field.name.replace("_", "-")
    default = " ".join(map(str, field.default)) if many and field.default else field.default
    choices = ", one of " + "|".join(field.metadata["choices"]) if field.metadata.get("choices") else ""
    text = f"{field.metadata.get('help', '')} ({_name(hint)}{choices}; default {default})".replace("%", "%%")
    if kind is bool and not many:
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text,
                            action=argparse.BooleanOptionalAction)
    else:
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text,
                            nargs="*" if many else None, metavar=kind.__name__.upper())
