"""Tokenizer: text to ids and back, and chat prompts. Text never becomes a control token."""

import functools
import json
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel, WordPiece

from infra.files import blaming, file_in, resolve

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json",
         "special_tokens_map.json", "added_tokens.json", "merges.txt", "generation_config.json")


def text_tokenizer(path: Path, tags: frozenset[str] = frozenset()) -> RawTokenizer:
    """A tokenizer that matches no added token inside text but `tags`, and puts no blank before it.
    [CLS] around a text is still added."""
    spec, _ = read_spec(path)
    for token in spec.get("added_tokens", []):
        is_text = token["content"].isspace() or token["content"] in tags
        token["special"] = token["special"] or not is_text
    tokenizer = RawTokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True  # as text; removed, they would have no ids
    tokenizer.encode("a \ue000")  # parts that do not fit together panic at the first text
    model = tokenizer.model
    if isinstance(model, WordPiece | WordLevel) and model.token_to_id(model.unk_token) is None:
        raise ValueError(f"{path}: got no word {model.unk_token!r}, its unk_token; copy it again")
    return tokenizer


def read_spec(path: Path) -> tuple[dict, str]:
    """tokenizer.json without the blank that it puts before a text; and where it puts one."""
    from formats.chat import drop_blanks
    spec = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    return spec, drop_blanks(spec)


class Tokenizer:
    def __init__(self, folder: Path) -> None:
        from formats import chat
        self.folder = folder
        with blaming(path := file_in(folder, "tokenizer.json"), "a tokenizer"):
            spec, self.blank = read_spec(path)
            self.text, self.full = text_tokenizer(path), RawTokenizer.from_str(json.dumps(spec))
            self.size = max(self.full.get_vocab(with_added_tokens=True).values()) + 1
            unknown = spec["model"].get("unk_token")
            # Those of blanks are text to everyone.
            added = {i: token for i, token in self.full.get_added_tokens_decoder().items()
                     if token.content != unknown and not token.content.isspace()}
            self.added_ids = frozenset(added)
            self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self._closes: dict[int, bool] = {}
        settings, self.names, self.template, self.date = chat.read_settings(folder)
        with blaming(folder / "tokenizer_config.json", "the settings of a tokenizer"):
            if self.blank != "never" and settings.get("tokenizer_class", "").startswith("Llama"):
                self.blank = "always" if settings.get("legacy") else "first"
            self.eos_id, self.end_ids = self._end_of_turn(chat.listed_ends(folder, self.size))
            pad = self.names.get("pad_token")
            self.pad_id = self.eos_id if pad is None else self._id(pad)
        # What a text begins with where no template says it; what transformers calls BOS.
        self.start = [*takewhile(self.control_ids.__contains__, self.full.encode("a").ids)]
        # Added tokens that control nothing, Qwen3's <think> for example.
        control = self.control_ids | self.end_ids | {self.pad_id, *self.start}
        self.tags = frozenset(added[i].content for i in self.added_ids - control)
        letters = {letter for token in added.values() for letter in token.content}
        self.letters = [c for c in sorted(letters) if not c.isspace() and c not in '"\\']

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load from a folder or id; ValueError or FileNotFoundError names what does not fit."""
        return cls(resolve(path))

    def encode(self, text: str, *, own: bool = False) -> list[int]:
        """Ids of a piece of text. own: it is ours or the agent's, so that added tokens which
        control nothing are matched in it; in a text from outside none is."""
        is_tagged = own and any(tag in text for tag in self.tags)
        ids = (self.own if is_tagged else self.text).encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            got = sorted(self.control_ids & set(ids))
            raise ValueError(f"{self.folder}/tokenizer.json: got control ids {got} from text, "
                             "expected none; its model holds them as words: use another tokenizer")
        return ids

    def segment(self, part: dict[str, str], *, is_first: bool) -> list[int]:
        """Ids of a part of an episode that is given as text: {author, text}."""
        start = self.start if part["author"] == "prompt" and is_first else []
        return start + self.encode(part["text"], own=part["author"] == "agent")

    @functools.cached_property
    def own(self) -> RawTokenizer:
        return text_tokenizer(self.folder / "tokenizer.json", self.tags)

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special)

    def closes(self, token: int) -> bool:
        """Whether a token may complete a tag: its text has a ">". A control token has no text."""
        if token not in self._closes:
            self._closes[token] = ">" in self.decode([token])
        return self._closes[token]

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to where the assistant's turn begins."""
        from formats import chat
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            return self.start + self.encode(self._begin(text, is_first=True))
        return self.compose(lambda outside: chat.render(self.template, [
            {"role": message["role"], "content": outside(message["content"])}
            for message in messages], self.names, self.date, self.folder), control=True)

    def compose(self, render: Callable[[Callable[[str], str]], str], *,
                control: bool = False) -> list[int]:
        """Ids of a text of ours with texts from outside in it, in which no added token is matched.

        render: makes the text, and passes each text from outside through the function it gets.
        control: special tokens are matched, as in a chat template.
        """
        from formats import chat
        text = render(str)
        if not control and not any(tag in text for tag in self.tags):
            return self.encode(text)
        twinned, letters, problem = chat.render_with_twins(render, text, self.letters)
        if problem and not control:
            return self.encode(text)
        if problem:
            raise ValueError(f"{self.folder}: chat template: got {problem}, expected each content "
                             "as it is or in parts; use another template")
        found = (self.full if control else self.own).encode(twinned, add_special_tokens=False)
        ids, done, end = [], 0, len(twinned)
        pairs = zip(found.ids, found.offsets, strict=True)
        for token, (begin, after) in [*pairs, (None, (end, end))]:
            if token is None or token in self.added_ids:
                piece = twinned[done:begin].translate(letters)
                ids += self.encode(self._begin(piece, is_first=not done) if control else piece)
                ids, done = [*ids, token], after
        return ids[:-1]

    def _begin(self, piece: str, *, is_first: bool) -> str:
        """A piece of a conversation, after the blank that this tokenizer puts before it."""
        has_blank = self.blank == "always" or self.blank == "first" and is_first
        return " " + piece if has_blank and piece and piece[0] not in " \u2581" else piece

    def _end_of_turn(self, listed: list[int]) -> tuple[int, frozenset[int]]:
        """The id that ends an assistant's turn in the template, and all that end one."""
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
