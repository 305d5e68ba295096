"""Settings: a dataclass, filled from TOML presets, then from --flags.

    settings = load(Settings, sys.argv[1:], prog="train.py", description="...", default_config=FILE)

The fields of the dataclass are setting(default, help), of the types int, float, str, bool, X | None
(written "none") and tuple[X, ...]. Later sources win over earlier ones:
    1. the defaults of the dataclass
    2. top-level keys of the preset
    3. the preset's table named after the program ("[eval]" for eval.py)
    4. its table named after the phase, if the dataclass has a `phase`
    5. 2 to 4 of each further preset (`--config models.toml method.toml`)
    6. flags
The phase itself is --phase, else the last preset's top-level key, else the default. `--config none`
reads no preset. An unknown or ill-typed key is an error that names the nearest match, because a
misspelt setting must never run as the default. Tables of other programs are passed over.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "tokenizers", "safetensors", "numpy", "faiss-gpu")  # versions in run.json
T = TypeVar("T")


def setting(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a help text; `choices` lists the values a str may take."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def load(cls: type[T], argv: list[str], *, prog: str, description: str,
         default_config: str | Path | None = None, shared: Iterable[str] | None = None) -> T:
    """Settings of type cls; a user's mistake ends the program with one line and exit status 2.

    shared: for a program that reads another's preset (eval.py reads train.py's): the top-level keys
    it takes from there; it passes over the others. None: every top-level key must be a field.
    """
    fields, hints = cls.__dataclass_fields__, get_type_hints(cls)
    parser = make_parser(cls, prog, description, default_config)
    arguments, extra = parser.parse_known_args(argv)
    try:
        if extra:
            name = extra[0].lstrip("-").split("=")[0].replace("-", "_")
            raise ValueError(f"unknown argument: got {extra[0]!r}, expected a flag of {prog}"
                             f"{_nearest(name, fields, _flag)}")
        flags = {name: _convert(value, hints[name], _flag(name))
                 for name, value in vars(arguments).items() if name in fields}
        values = _preset_values(arguments.config, cls, prog, flags.get("phase"), shared)
        values.update(flags)
        for name, value in values.items():
            choices = fields[name].metadata["choices"]
            if choices and value not in choices:
                others = training_programs() if name == "phase" else ()
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}"
                                 + "".join(f", or a phase of {other}.py" for other in others)
                                 + _nearest(value, (*choices, *others)))
        return cls(**values)  # its __post_init__ may raise ValueError, too
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{prog}: {error}\n")


def make_parser(cls: type, prog: str, description: str,
                default_config: str | Path | None) -> argparse.ArgumentParser:
    """The parser of a program: --config, and a flag for each field."""
    hints = get_type_hints(cls)
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", nargs="+", default=[default_config or "none"],
                        help=f"TOML presets, later ones win, or none (default {default_config})")
    for field in dataclasses.fields(cls):
        hint, choices = hints[field.name], field.metadata["choices"]
        kind = hint.__name__ if hint in (int, float, str, bool) else str(hint)
        kind = "|".join(choices) if choices else kind
        text = f"{field.metadata['help']} ({kind}; default {field.default})".replace("%", "%%")
        options: dict[str, Any] = {"metavar": "X"}
        if hint is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) is tuple:
            options["nargs"] = "*"
        parser.add_argument(_flag(field.name), dest=field.name, help=text, **options)
    return parser


def find_phase(argv: list[str], default_config: str | Path) -> str | None:
    """The phase that flags or presets ask for, before it is known which program it belongs to."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--phase")
    parser.add_argument("--config", nargs="+", default=[default_config])
    try:
        arguments, _ = parser.parse_known_args(argv)
        return arguments.phase or _preset_phase(_read_all(arguments.config))
    except (ValueError, OSError, argparse.ArgumentError):
        return None  # `load` reports it


def program_of(name: str) -> str | None:
    """The program whose phase this is: `x` and `x-y` are of x.py at the top level, if it trains."""
    name = name.partition("-")[0]
    return name if name in training_programs() else None


def training_programs() -> list[str]:
    """The programs beside train.py that it hands phases to: those with a function train(argv)."""
    files = sorted(ROOT.glob("*.py"))
    return [f.stem for f in files if "\ndef train(argv" in f.read_text(encoding="utf-8")]


def save(settings: Any, path: str | Path) -> None:
    """Write the resolved settings, and what else a result depends on, as JSON."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    record = {"settings": dataclasses.asdict(settings), "argv": sys.argv, "commit": None,
              "versions": {"python": sys.version.split()[0]}}
    record["versions"].update({name: installed.get(name) for name in PACKAGES})
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):  # git is not installed
        git = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True)
        record["commit"] = git.stdout.strip() or None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def load_named(spec: str, flag: str, kind: type = object) -> Any:
    """What "FILE.py:NAME" names; FILE is looked for in the working folder, then in this project."""
    file, _, name = spec.rpartition(":")
    paths = [path for path in (Path(file), ROOT / file) if path.suffix == ".py" and path.is_file()]
    if not paths:
        raise ValueError(f"{flag}: got {spec!r}, expected FILE.py:NAME of a file that is there")
    path = paths[0].resolve()
    if path.parent == ROOT:  # a program of this project, which must not be loaded twice
        module = importlib.import_module(path.stem)
    else:
        module_spec = importlib.util.spec_from_file_location(f"_named_{path.stem}", path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses look their module up there
        module_spec.loader.exec_module(module)
    if name not in vars(module):
        raise ValueError(f"{flag} {spec}: got no {name} in {path}, expected it there")
    value = vars(module)[name]
    if not isinstance(value, kind):
        raise ValueError(f"{flag} {spec}: got {value!r}, expected a {kind.__name__}")
    return value


def load_scorer(spec: str, flag: str) -> Callable[[list], list[float]]:
    """The function that "FILE.py:NAME" names; it must return one finite number for each item."""
    function = load_named(spec, flag, Callable)

    def scorer(items: list) -> list[float]:
        result = function(items)
        try:
            numbers = [float(number) for number in result]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(items) or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{flag} {spec}: got {str(result)[:200]} for {len(items)} items, "
                             "expected one finite number for each")
        return numbers

    return scorer


def _preset_values(config: list, cls: type, prog: str, phase: str | None,
                   shared: Iterable | None) -> dict[str, Any]:
    """The values that the presets give to fields, later ones in place of earlier ones."""
    fields, hints = cls.__dataclass_fields__, get_type_hints(cls)
    documents, phases = _read_all(config), _known_phases(cls)
    names = [Path(prog.split()[0]).stem]  # of the tables that apply, in order of precedence
    known = (names[0], "eval", *phases)
    if phases:
        names.append(phase or _preset_phase(documents) or fields["phase"].default)
    other = program_of(_preset_phase(documents) or "") if shared is not None else None
    if other not in (None, names[0]):
        raise ValueError(f"--config: got presets of {other}.py, whose tags and prompts {prog} does "
                         f"not know; use {other}.py for its models")
    values: dict[str, Any] = {}
    for path, document in documents.items():
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        for table in tables if phases else ():
            if table not in known and not program_of(table):
                raise ValueError(f"{path}: got an unknown table [{table}], expected one of "
                                 f"{', '.join(known)}{_nearest(table, known)}")
        top = {key: value for key, value in document.items()
               if key not in tables and (shared is None or key in shared)}
        layers = {path: top}
        layers.update({f"{path}: [{name}]": tables.get(name, {}) for name in names})
        for place, table in layers.items():
            for key, value in table.items():
                if key not in fields:
                    raise ValueError(f"{place}: got an unknown key {key}, expected a setting of "
                                     f"{prog}{_nearest(key, fields)}")
                values[key] = _convert(value, hints[key], f"{place}: {key}", text=False)
    return values


def _known_phases(cls: type) -> list[str]:
    """The choices of `phase`, those of inherited settings included: presets have tables of both."""
    fields = [getattr(base, "__dataclass_fields__", {}).get("phase") for base in cls.__mro__]
    return [choice for field in fields if field for choice in field.metadata["choices"]]


def _preset_phase(documents: dict[Path, dict]) -> str | None:
    phases = [document.get("phase") for document in documents.values()]
    phases = [phase for phase in phases if isinstance(phase, str)]  # `load` refuses others
    return phases[-1] if phases else None


def _read_all(config: list) -> dict[Path, dict[str, Any]]:
    documents = {}
    for path in map(Path, config if [*map(str, config)] != ["none"] else ()):
        if not path.is_file():
            raise FileNotFoundError(f"--config: got {path}, expected a TOML file, or none")
        try:
            documents[path] = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # of TOML, or of UTF-8
            raise ValueError(f"{path}: not TOML: {error}") from None
    return documents


def _convert(value: Any, hint: Any, where: str, *, text: bool = True) -> Any:
    """A TOML value or a flag's text as the field's type; a TOML int may become a float."""
    kind, *rest = [option for option in get_args(hint) if option is not type(None)] or [hint]
    if get_origin(hint) is tuple and isinstance(value, list):
        if text and kind is not str:  # --sizes 16,32 as well as --sizes 16 32
            value = [part for item in value for part in item.split(",") if part]
        return tuple(_convert(item, kind, where, text=text) for item in value)
    if type(None) in get_args(hint):
        return None if value == "none" else _convert(value, kind, where, text=text)
    with suppress(ValueError):  # it stays a str then and is refused below
        if kind is float and type(value) is int or text and kind in (int, float):
            value = kind(value)
    if rest or type(value) is not kind or kind is float and math.isnan(value):
        expected = str(hint) if get_args(hint) else hint.__name__
        raise ValueError(f"{where}: got {value!r}, expected {expected}; correct its value")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(word: str, known: Iterable[str], show: Any = str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {show(near[0])}?" if near else "; see --help"
