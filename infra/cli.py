"""Command lines: settings filled from TOML presets, then from --flags; --help; messages.

    settings = load(Settings, sys.argv[1:], prog="train.py", description="...", default_config=FILE)

The fields of the dataclass are setting(default, help), of the types int, float, str, bool, X | None
(written "none") and tuple[X, ...]. Later sources win over earlier ones:
    1. the defaults of the dataclass
    2. top-level keys of the preset
    3. the preset's table named after the program ("[eval]" for eval.py)
    4. its table named after the phase, if the dataclass has a `phase`
    5. 2 to 4 of each further preset (`--config models.toml method.toml`)
    6. flags
A program that asks a run's model (`recorded`) takes what the run recorded in place of a preset that
it reads by default; presets that a person names, and flags, win over the record.
The phase itself is --phase, else the last preset's top-level key, else the default. `--config none`
reads no preset. An unknown or ill-typed key is an error that names the nearest match, because a
misspelt setting must never run as the default. Tables of other programs are passed over, and so are
top-level keys that the phase does not read. In the phase's table, or as a flag, they are refused.

Relative paths of flags begin at the current folder, those of presets and defaults at the project.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import textwrap
import time
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from infra.config import RANGE, ROOT, flag_of, in_project, is_remote, reads, sections

T = TypeVar("T")


def load(cls: type[T], argv: list[str], *, prog: str, description: str,
         default_config: str | Path | None = None, shared: Iterable[str] | None = None,
         recorded: Callable[[str, Iterable[str], str], dict[str, Any]] | None = None,
         finish: Callable[[T], T] = lambda settings: settings) -> T:
    """Settings of type cls; a user's mistake ends the program with one message and exit status 2.

    shared: for a program that reads another's preset (eval.py reads train.py's): the top-level keys
    it takes from there; it passes over the others. None: every top-level key must be a field.
    recorded: (model, names that a person has given, program) -> what the model's run recorded.
    finish: fills in what settings imply; what it raises is raised.
    """
    fields, hints = cls.__dataclass_fields__, get_type_hints(cls)
    say_repeated(prog, argv)
    arguments, extra = make_parser(cls, prog, default_config).parse_known_args(argv)
    is_help = arguments.help or arguments.help_all
    with reporting(prog, status=2):
        for name in (name for name in fields if fields[name].metadata["is_words"]):
            words = [word for word in extra if not word.startswith("-")]
            extra = [word for word in extra if word.startswith("-")] or (
                words if name in arguments else [])  # a flag and words, too
            vars(arguments).update({name: " ".join(words)} if words else {})
        if extra:
            name = extra[0].lstrip("-").split("=")[0].replace("-", "_")
            hint = (f"; did you mean --phase {extra[0]}?" if extra[0] in _known_phases(cls) else
                    _nearest(name, fields, flag_of))
            raise ValueError(f"unknown argument: got {extra[0]!r}, expected a flag of {prog}{hint}")
        flags = {name: _convert(value, hints[name], flag_of(name))
                 for name, value in vars(arguments).items() if name in fields}
        values = {name: field.default for name, field in fields.items()}
        preset, places = _preset_values(arguments.config, cls, prog, flags.get("phase"), shared)
        values |= preset
        values = {name: _of_project(value, fields[name]) for name, value in values.items()}
        if recorded is not None:
            given = flags if arguments.config[0] is default_config else preset | flags
            model = flags.get("model", values["model"])
            of_run = recorded(model, given, Path(prog.split()[0]).stem)
            values |= {name: _convert("none" if value is None else value, hints[name],
                                      f"{model}: {name}", text=False)
                       for name, value in of_run.items()}
        values |= flags
        for name, value in values.items():
            choices = fields[name].metadata["choices"]
            if choices and value not in choices:
                others = training_programs() if name == "phase" else ()
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}"
                                 + "".join(f", or a phase of {other}.py" for other in others)
                                 + _nearest(value, (*choices, *others)))
        settings = cls(**values)  # its __post_init__ may raise ValueError, too
        if not is_help:
            _check(settings, flags, places)
    if is_help:
        with suppress(ValueError, OSError):
            settings = finish(settings)
        parser = make_parser(cls, prog, default_config, settings, shows_all=arguments.help_all)
        parser.description = (f"{description} In brackets: values under the presets and flags "
                              "given. --help-all: all settings.")
        print(parser.format_help(), end="")
        sys.exit(0)
    settings = finish(settings)
    with reporting(prog, status=2):
        for name in flags:
            if other := _switched_off_by(settings, name):
                raise ValueError(f"{flag_of(name)}: got it with {flag_of(other)} "
                                 f"{getattr(settings, other)}, which does not read it; drop it")
    return settings


class Parser(argparse.ArgumentParser):
    """Flags are written out; a mistake ends the program with one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        say_repeated(self.prog, sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        leave(self.prog, f"{message}; see --help", 2)


def say_repeated(prog: str, argv: Iterable[str]) -> None:
    """Name the flags that are given more than once."""
    flags = [word.split("=")[0].replace("--no-", "--", 1) for word in argv if word[:2] == "--"]
    for flag in sorted({flag for flag in flags if flags.count(flag) > 1}):
        print(f"{prog}: {flag}: got it {flags.count(flag)} times; the last one counts",
              file=sys.stderr)


def make_parser(cls: type, prog: str, default_config: str | Path | None, shown: Any = None, *,
                shows_all: bool = False) -> Parser:
    """The parser of a program; its help has the values of `shown`."""
    hints, section_of = get_type_hints(cls), sections(cls)
    phase = getattr(shown, "phase", None)
    parser = Parser(prog, usage=f"{prog} [--FLAG VALUE ...] [--help | --help-all]", add_help=False,
                    argument_default=argparse.SUPPRESS, formatter_class=partial(
                        argparse.HelpFormatter, max_help_position=34, width=100))
    title = next(iter(section_of.values())).rpartition(": ")[2]
    groups = {title: parser.add_argument_group(title)}
    groups[title].add_argument("--config", metavar="FILE", nargs="+",
                               default=[default_config or "none"],
                               help="TOML presets, later ones win; none: no preset")
    for flags in (("--help", "-h"), ("--help-all",)):
        parser.add_argument(*flags, action="store_true", default=False, help=argparse.SUPPRESS)
    for name, field in cls.__dataclass_fields__.items():
        about, title = field.metadata, section_of[name].rpartition(": ")[2]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = (*get_args(hints[name]), hints[name])[0]
        word = {int: "INT", float: "FLOAT"}.get(kind, "TEXT")
        options = {"metavar": "|".join(filter(None, about["choices"])) or about["reads"]
                   or about["writes"] or word}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hints[name]) is tuple:
            options["nargs"] = "*"
        if shows_all or (reads(cls, name, phase) and not about["rare"]
                         and not (shown and _switched_off_by(shown, name))):
            value = getattr(shown, name, "")
            value = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            value = "" if value in ("", "False") else f" [{textwrap.shorten(value, 40)}]"
            options["help"] = (about["help"] + value).replace("%", "%%")
        else:
            options["help"] = argparse.SUPPRESS
        groups[title].add_argument(flag_of(name), dest=name, **options)
    return parser


@contextmanager
def reporting(prog: str, *more: type[Exception], status: int = 1) -> Iterator[None]:
    """Context manager: what a person can mend ends the program with one message.

    more: further exceptions of this kind, perhaps with a `status`.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, *more) as error:
        leave(prog, error, getattr(error, "status", status))
    except KeyboardInterrupt:
        leave(prog, "interrupted", 130)


def leave(prog: str, message: object, status: int) -> NoReturn:
    """Say why and end; the processes of torchrun on a machine say the same only once."""
    text, is_first = f"{prog}: {message}", True
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    if file.name == "error.json" and file.parent.is_dir():
        about = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        file.write_text(json.dumps({"message": about}))  # torchrun shows it at its end
        said = file.parents[1] / f"said-{zlib.crc32(text.partition(chr(10))[0].encode())}"
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            is_first = False
    if is_first:
        print(text, file=sys.stderr, flush=True)  # torchrun soon ends what outlives a dead process
    end = SystemExit(status)
    end.args = (text,)  # for a caller that catches it
    raise end


def _switched_off_by(settings: Any, name: str) -> str:
    """The setting under whose value this one is not read (`when`), or ""."""
    other, *values = settings.__dataclass_fields__[name].metadata["when"].split() or [""]
    if not hasattr(settings, other):
        return ""
    is_off = str(getattr(settings, other)) not in values
    return other if is_off else _switched_off_by(settings, other)


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


def _check(settings: Any, flags: Iterable[str], places: dict[str, str]) -> None:
    """Refuse flags that the phase does not read, and numbers that cannot work where it does.

    places: where values of presets stand.
    """
    cls, phase, values = type(settings), getattr(settings, "phase", None), vars(settings)
    for name, field in cls.__dataclass_fields__.items():
        about, value = field.metadata, values[name]
        if not reads(cls, name, phase):
            if name in flags:
                _refuse_unread(cls, name, phase, flag_of(name))
            continue
        if name in flags and (about["reads"] or about["writes"]) and field.default and not value:
            raise ValueError(f"{flag_of(name)}: got an empty text, expected a path; leave the flag "
                             "out for the default")
        bounds = {word: about[word] for word in RANGE if about[word] is not None}
        limits = {word: values.get(bound, bound) for word, bound in bounds.items()}
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and not RANGE[word][0](number, limit)
               for number in numbers for word, limit in limits.items()):
            texts = [f"{RANGE[word][1]} {limit}" for word, limit in limits.items()]
            where, *others = (flag_of(key) if key in flags else places.get(key, flag_of(key))
                              for key in (name, *bounds.values()) if key in values)
            texts += [f"see {other}" for other in others]
            raise ValueError(f"{where}: got {value}, expected {', '.join(texts)}")


def _refuse_unread(cls: type, name: str, phase: str, where: str) -> None:
    phases = [other for other in cls.__dataclass_fields__["phase"].metadata["choices"]
              if reads(cls, name, other)]
    raise ValueError(f"{where}: got it for phase {phase}, which does not read it, expected it for "
                     f"{', '.join(phases) or 'other programs'}; drop it")


def _of_project(value: Any, field: dataclasses.Field) -> Any:
    """A preset's or a default's value; a path becomes one of the project's."""
    if isinstance(value, tuple):
        return tuple(_of_project(item, field) for item in value)
    *names, kind = (field.metadata["reads"] or field.metadata["writes"]).split("|")
    is_elsewhere = kind == "DIR" and is_remote(value) or kind == "PATH" and "://" in value
    if kind in ("", "FILE.py:NAME") or value in ("", *names) or is_elsewhere:
        return value  # load_named looks into the project itself
    return in_project(value)


def _preset_values(config: list, cls: type, prog: str, phase: str | None,
                   shared: Iterable | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The values that presets give to fields, later ones in place of earlier ones; their places."""
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
    values, places = {}, {}
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
                if phases and place == f"{path}: [{names[-1]}]":
                    if not reads(cls, key, names[-1]):
                        _refuse_unread(cls, key, names[-1], f"{place} {key}")
                places[key] = f"{place}: {key}"
                values[key] = _convert(value, hints[key], places[key], text=False)
    return values, places


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
    for name in config if [*map(str, config)] != ["none"] else ():
        path = Path(name)
        if not path.is_file():
            there = f"; did you mean {ROOT / path}?" if (ROOT / path).is_file() else ""
            raise FileNotFoundError(f"--config: got {str(name)!r}, expected a TOML file that is "
                                    f"there, or none{there}")
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
    if rest or type(value) is not kind or kind is float and not math.isfinite(value):
        expected = str(hint) if get_args(hint) else hint.__name__
        raise ValueError(f"{where}: got {value!r}, expected {expected}; correct its value")
    return value


def _nearest(word: str, known: Iterable[str], show: Any = str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {show(near[0])}?" if near else "; see --help"
