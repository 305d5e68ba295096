"""Tokenizer: text to ids and back, and chat prompts. Text never becomes a control token."""

import datetime
import functools
import json
import re
from pathlib import Path

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel, WordPiece

from infra.files import blaming, file_in, read_json, resolve

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
         "special_tokens_map.json", "added_tokens.json", "merges.txt", "generation_config.json")
ROLES = ("system", "user", "assistant", "tool")
# In a template each content stands as a mark between em spaces: a lost one shows that it trims.
MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")


def text_tokenizer(path: Path) -> RawTokenizer:
    """A tokenizer that matches no added token inside text; [CLS] around a text is still added."""
    spec = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    for token in spec.get("added_tokens", []):
        token["special"] = token["special"] or not token["content"].isspace()
    tokenizer = RawTokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True  # as text; removed, they would have no ids
    tokenizer.encode("a \ue000")  # parts that do not fit together panic at the first text
    model = tokenizer.model
    if isinstance(model, WordPiece | WordLevel) and model.token_to_id(model.unk_token) is None:
        raise ValueError(f"{path}: got no word {model.unk_token!r}, its unk_token; copy it again")
    return tokenizer


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with blaming(path := file_in(folder, "tokenizer.json"), "a tokenizer"):
            self.text, self.full = text_tokenizer(path), RawTokenizer.from_file(str(path))
            self.full.no_truncation()
            self.full.no_padding()
            self.size = max(self.full.get_vocab(with_added_tokens=True).values()) + 1
            unknown = json.loads(self.full.to_str())["model"].get("unk_token")
            added = self.full.get_added_tokens_decoder().items()
            self.control_ids = frozenset(i for i, t in added if t.special and t.content != unknown)
        self._containing: dict[str, frozenset[int]] = {}
        with blaming(path := folder / "tokenizer_config.json", "the settings of a tokenizer"):
            settings = read_json(path, {})
            self.template = settings.get("chat_template")
            if isinstance(self.template, list):  # several, by name
                templates = {entry["name"]: entry["template"] for entry in self.template}
                self.template = templates.get("default")
            if (folder / "chat_template.jinja").is_file():
                self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            self.names = {key: name["content"] if isinstance(name, dict) else name
                          for key, name in settings.items()
                          if key in ("bos_token", "eos_token", "pad_token") and name}
            self.eos_id, self.end_ids = self._end_of_turn()
            self.pad_id = self.eos_id
            if "pad_token" in self.names:
                self.pad_id = self._id(self.names["pad_token"])

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder or id; ValueError or FileNotFoundError names what does not fit."""
        return cls(resolve(path))

    def encode(self, text: str) -> list[int]:
        ids = self.text.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            got = sorted(self.control_ids & set(ids))
            raise ValueError(f"{self.folder}/tokenizer.json: got control ids {got} from text, "
                             "expected none; its model holds them as words: use another tokenizer")
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special)

    def containing(self, character: str) -> frozenset[int]:
        """Ids whose decoded text contains the character (control tokens decode to nothing)."""
        if character not in self._containing:  # a vocabulary of 150,000 takes a third of a second
            texts = enumerate(self.full.decode_batch([[i] for i in range(self.size)]))
            self._containing[character] = frozenset(i for i, text in texts if character in text)
        return self._containing[character]

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to where the assistant's turn begins."""
        contents = [message["content"] for message in messages]
        if self.template is None:
            return self.encode("\n".join(contents))
        marked = [{"role": message["role"], "content": f"\u2003\ue000{i}\ue001\u2003"}
                  for i, message in enumerate(messages)]
        # A piece, then again and again: em space, number, em space, piece.
        first, *rest = MARK.split(self._render(marked))
        missing = sorted(set(range(len(messages))) - {int(number) for number in rest[1::4]})
        if missing:
            raise ValueError(f"{self.folder}: chat template: got no content of messages {missing}, "
                             "expected each as it is; use another template")
        ids = self.full.encode(first, add_special_tokens=False).ids
        for before, number, after, piece in zip(*(rest[i::4] for i in range(4)), strict=True):
            content = contents[int(number)]
            content = content if before else content.lstrip()
            ids += self.encode(content if after else content.rstrip())
            ids += self.full.encode(piece, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def _compiled(self) -> Template:
        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # The sandbox, because templates come with checkpoints from strangers.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment.from_string(self.template)

    def _render(self, messages: list[dict]) -> str:
        for role in (message["role"] for message in messages):
            if role not in ROLES:  # it is rendered as it is, so it could carry control tokens
                raise ValueError(f"message role: got {role!r}, expected one of {list(ROLES)}")
        options = {"add_generation_prompt": True, "tools": None, "documents": None}
        try:
            return self._compiled.render(messages=messages, **options, **self.names)
        except Exception as error:  # a stranger's program may fail in any way
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.folder}: chat template: got {got}, expected text; check the "
                             "roles of the messages, or replace the template") from error

    def _end_of_turn(self) -> tuple[int, frozenset[int]]:
        """The id that ends an assistant's turn in the template, and all that end one."""
        listed: list[int] = []
        for name in ("generation_config.json", "config.json"):
            ids = read_json(self.folder / name, {}).get("eos_token_id")
            if ids is not None:
                listed += ids if isinstance(ids, list) else [ids]
        named = [self._id(self.names["eos_token"])] if "eos_token" in self.names else []
        if not named + listed:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got no eos_token; add one")
        # Llama 3 may name the end of text as eos_token and list the end of turn beside it.
        turn = self.full.token_to_id("<|eot_id|>")
        if turn in listed and self.template is not None and "<|eot_id|>" in self.template:
            named = [turn, *named]
        return (named + listed)[0], frozenset(named + listed)

    def _id(self, token: str) -> int:
        if (token_id := self.full.token_to_id(token)) is None:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got {token!r}, expected a "
                             "token of tokenizer.json; take both files from the same checkpoint")
        return token_id
