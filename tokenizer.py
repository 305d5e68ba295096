"""Tokenizer: text to ids and back, and chat prompts; text from outside never becomes a control token.

Added tokens are not matched inside text, and in a chat prompt the template and the contents of the messages are
encoded apart. Templates come with checkpoints from strangers: they run in jinja2's immutable sandbox.
"""

import datetime
import functools
import json
import re
from pathlib import Path

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as RawTokenizer

from weights import blaming, file_in, read_json, resolve


def text_tokenizer(path: Path) -> RawTokenizer:
    """Matches no added token inside text: all of them are marked special, and special ones are encoded as text.

    They are not removed, because the model may need their ids (an unknown-word token, [CLS] around a text).
    """
    spec = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    for token in spec.get("added_tokens", []):
        token["special"] = token["special"] or not token["content"].isspace()  # runs of spaces are ordinary text
    tokenizer = RawTokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    tokenizer.encode("a \ue000")  # a file whose parts do not fit together panics at its first text: let it do so here
    return tokenizer


class Tokenizer:
    """Text to ids and back; text never yields a control token."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")
    ROLES = ("system", "user", "assistant", "tool")
    # In the template each content stands as a mark between two em spaces: a lost space shows that it trims.
    MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with blaming(file_in(folder, "tokenizer.json"), "a tokenizer"):
            self._read_vocabulary(folder / "tokenizer.json")
        with blaming(folder / "tokenizer_config.json", "the settings of a tokenizer"):
            self._read_settings(folder, read_json(folder / "tokenizer_config.json", {}))

    def _read_vocabulary(self, path: Path) -> None:
        self.full = RawTokenizer.from_file(str(path))
        self.text = text_tokenizer(path)
        self.full.no_truncation()
        self.full.no_padding()
        self.size = max(self.full.get_vocab(with_added_tokens=True).values()) + 1
        unknown = json.loads(self.full.to_str())["model"].get("unk_token")
        added = self.full.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special and token.content != unknown)
        self._containing: dict[str, frozenset[int]] = {}

    def _read_settings(self, folder: Path, settings: dict) -> None:
        self.template = settings.get("chat_template")
        if isinstance(self.template, list):  # several, by name
            self.template = {entry["name"]: entry["template"] for entry in self.template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.names = {key: value["content"] if isinstance(value, dict) else value for key, value in settings.items()
                      if key in ("bos_token", "eos_token", "pad_token") and value}
        if not isinstance(self.template, str | None):
            raise ValueError(f"got a chat_template of type {type(self.template).__name__}, expected a text")
        self.eos_id = self._end_of_turn()
        self.pad_id = self._id(self.names["pad_token"]) if "pad_token" in self.names else self.eos_id

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        return cls(resolve(path))

    @property
    def files(self) -> list[Path]:
        """What to copy beside a saved model."""
        return [self.folder / name for name in self.FILES if (self.folder / name).is_file()]

    def encode(self, text: str) -> list[int]:
        ids = self.text.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise ValueError(f"{self.folder}/tokenizer.json: got control ids {sorted(self.control_ids & set(ids))} "
                             "from text, expected none; its model holds them as words, use another tokenizer")
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special)

    def containing(self, character: str) -> frozenset[int]:
        """Ids whose decoded text contains the character (control tokens decode to nothing)."""
        if character not in self._containing:  # once: a vocabulary of 150,000 takes a third of a second
            texts = self.full.decode_batch([[i] for i in range(self.size)], skip_special_tokens=True)
            self._containing[character] = frozenset(i for i, text in enumerate(texts) if character in text)
        return self._containing[character]

    def chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: pieces of the template may hold control tokens, contents cannot."""
        contents = [message["content"] for message in messages]
        if self.template is None:
            return self.encode("\n".join(contents))
        marked = [{"role": message["role"], "content": f"\u2003\ue000{i}\ue001\u2003"}
                  for i, message in enumerate(messages)]
        # piece, em space, number, em space, piece, ...
        first, *rest = self.MARK.split(self._render(marked, add_generation_prompt))
        missing = sorted(set(range(len(messages))) - {int(number) for number in rest[1::4]})
        if missing:
            raise ValueError(f"{self.folder}: chat template: got no content of messages {missing} in what it wrote, "
                             "expected each as it is; use another template")
        ids = self.full.encode(first, add_special_tokens=False).ids
        for before, number, after, piece in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
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
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": raise_exception,
                                "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        return environment.from_string(self.template)

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        unknown = [message["role"] for message in messages if message["role"] not in self.ROLES]
        if unknown:  # a role is rendered as it is, so a free one could carry control tokens
            raise ValueError(f"message role: got {unknown[0]!r}, expected one of {list(self.ROLES)}; fix the messages")
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                         documents=None, **self.names)
        except Exception as error:  # a stranger's program may fail in any way
            raise ValueError(f"{self.folder}: chat template: got {type(error).__name__}: {error}, expected text; "
                             "check the roles of the messages, or replace the template") from error

    def _end_of_turn(self) -> int:
        listed: list[int] = []
        for name in ("generation_config.json", "config.json"):
            ids = read_json(self.folder / name, {}).get("eos_token_id")
            listed += ids if isinstance(ids, list) else [] if ids is None else [ids]
        # Llama 3 may name the end of text as eos_token and list the end of turn beside it.
        turn = self.full.token_to_id("<|eot_id|>")
        if turn in listed and self.template is not None and "<|eot_id|>" in self.template:
            return turn
        if "eos_token" not in self.names and not listed:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got no eos_token, expected one; add it")
        return self._id(self.names["eos_token"]) if "eos_token" in self.names else listed[0]

    def _id(self, token: str) -> int:
        found = self.full.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got {token!r}, expected a token of tokenizer.json; "
                             "take both files from the same checkpoint")
        return found
