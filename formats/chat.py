"""Chat: what a checkpoint's folder says about conversations, and its template, rendered.

Templates come with checkpoints from strangers, and are rendered as transformers renders them, in
jinja2's immutable sandbox. What they get of people's texts are Outside strings, whose letters can
be told from the template's own wherever they end up in the result.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from infra.files import blaming, read_json

ROLES = ("system", "user", "assistant", "tool")


class Generation(Extension):
    """{% generation %} marks what an assistant writes; it renders as what stands inside."""
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


@functools.cache
def _compiled(text: str, date: str) -> Template:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.fromisoformat(date).strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # jinja2's own would escape < and >

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(text)


def render(text: str, messages: list[dict], names: dict[str, str], date: str,
           where: Path) -> str:
    """A conversation up to where the assistant's turn begins; names: bos_token and others; date:
    what a template that asks for today's gets, 2026-01-31 for example."""
    for role in (message["role"] for message in messages):
        if role not in ROLES:  # it is rendered as it is, so it could carry control tokens
            raise ValueError(f"message role: got {role!r}, expected one of {list(ROLES)}")
    options = {"add_generation_prompt": True, "tools": None, "documents": None}
    try:
        return _compiled(text, date).render(messages=messages, **options, **names)
    except Exception as error:  # a stranger's program may fail in any way
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: chat template: got {got}, expected text; check the roles of "
                         "the messages and the tokens that tokenizer_config.json names, or "
                         "replace the template") from error


class Outside(str):
    """A text from outside: some letters are replaced by twins of theirs, in private code points.

    What a template compares it with, or splits it at, is replaced likewise.
    """

    _twins: dict[int, str]

    def __new__(cls, text: str, twins: dict[int, str]) -> "Outside":
        self = super().__new__(cls, text.translate(twins))
        self._twins = twins
        return self

    def __str__(self) -> "Outside":
        return self

    __hash__ = str.__hash__


def _twinned(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of str whose arguments and results have twins in the place of letters, too."""
    def call(self: Outside, *args: Any, **options: Any) -> Any:
        def wrap(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(wrap, value))
            return Outside(value, self._twins) if isinstance(value, str) else value

        return wrap(method(self, *map(wrap, args), **options))
    return call


for _name in ("__contains__", "__eq__", "__getitem__", "__ne__", "count", "endswith", "find",
              "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
              "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip"):
    setattr(Outside, _name, _twinned(getattr(str, _name)))


def render_with_twins(render: Callable[[Callable[[str], str]], str], text: str,
                      letters: Sequence[str]) -> tuple[str, dict[int, str], str]:
    """(the text with twins, the letters of the twins, what went wrong or nothing).

    render: makes the text, and passes each text from outside through the function it gets; these
    letters of it get twins, others in each.
    """
    parts: list[str] = []

    def note(part: str) -> str:
        parts.append(part)
        return part

    render(note)
    width, taken = len(letters), set(map(ord, text))
    num_twins = width * len(parts)
    first = next(i for i in range(0xF0000, 0x10FFFE) if taken.isdisjoint(range(i, i + num_twins)))
    starts = itertools.count(first, width)

    def twin(part: str) -> Outside:
        start = next(starts)
        return Outside(part, {ord(c): chr(start + i) for i, c in enumerate(letters)})

    twinned = render(twin)
    back = {first + i: letters[i % width] for i in range(num_twins)}
    left = {(ord(c) - first) // width for c in twinned if ord(c) in back}
    lost = [k for k, part in enumerate(parts)
            if k not in left and not set(letters).isdisjoint(part)]
    problem = f"no content of messages {lost}" if lost else ""
    if twinned.translate(back) != text:
        problem = "contents that it changes or compares in a way that cannot be followed"
    return twinned, back, problem


def drop_blanks(spec: dict) -> str:
    """Let a tokenizer.json put no blank before a text; returns where it did so: "never", "first"
    (before the first text) or "always" (also after an added token)."""
    blank = "never"
    for key in ("decoder", "normalizer", "pre_tokenizer"):
        sequence = spec.get(key) or {}
        for part in sequence.get(key.replace("_", "") + "s", [sequence]):
            kind = part.get("type")
            if kind == "Strip" and key == "decoder":
                part["start"] = 0
            elif kind == "Prepend":
                blank, part["prepend"] = "always", ""
            elif kind == "Metaspace":
                blank, part["prepend_scheme"] = part.get("prepend_scheme", "always"), "never"
            elif kind == "ByteLevel" and key == "pre_tokenizer" and part["add_prefix_space"]:
                blank, part["add_prefix_space"] = "always", False
    return blank


def read_settings(folder: Path) -> tuple[dict, dict[str, str], str | None, str]:
    """(tokenizer_config.json, the tokens that it names, chat template, the date it may write)."""
    path = folder / "tokenizer_config.json"
    with blaming(path, "the settings of a tokenizer"):
        settings = read_json(folder / "special_tokens_map.json", {}) | read_json(path, {})
        names = {key: name["content"] if isinstance(name, dict) else name
                 for key, name in settings.items()
                 if key.endswith("_token") and isinstance(name, str | dict) and name}
        return settings, names, choose_template(folder, settings), date_in(folder)


def listed_ends(folder: Path, num_ids: int) -> list[int]:
    """Every id that generation_config.json and config.json call an end."""
    listed: list[int] = []
    for path in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(path, {}).get("eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            if i is not None and (type(i) is not int or not 0 <= i < num_ids):
                raise ValueError(f"{path}: got eos_token_id {i!r}, expected an id below the "
                                 f"{num_ids} of tokenizer.json; take both from the same "
                                 "checkpoint, or take the id out")
            listed += [] if i is None else [i]
    return listed


def choose_template(folder: Path, settings: dict) -> str | None:
    """The chat template in a folder: a file of its own, or one of these settings."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"{folder}/tokenizer_config.json: got chat templates {[*named]}, "
                             'expected one named "default"; rename the one that is meant')
        template = named["default"]
    if not isinstance(template, str | None):
        raise ValueError(f"{folder}/tokenizer_config.json: got chat_template {template!r:.60}, "
                         "expected a text, or a list of named ones; copy it again")
    return template


def date_in(folder: Path) -> str:
    """The date that a template may write: of the run that made the model, or today's."""
    path = folder / "run.json"
    date = read_json(path, {}).get("date") or datetime.date.today().isoformat()
    with blaming(path, "a date like 2026-01-31"):
        return datetime.date.fromisoformat(date).isoformat()
