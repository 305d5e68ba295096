"""Episodes without chance: a decoder writes given texts, and a retriever echoes queries."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

import rollout
from data import Passage, Question
from episode import SEARCH_R1, Episode
from model import Tokenizer
from rollout import Policy, RolloutSettings
from tests.support.models import EOS, decoder_config
from world.pretrain import new_decoder

SEARCH_THEN_ANSWER = (
    "<think>hm</think><search> q1 </search><think>so</think><answer> gold </answer>"
)
HEAD_PADDING = 3  # rows of the scripted head beyond the tokenizer
OBSERVATIONS = (  # how those of the protocols begin and end
    (b"\n\n<information>", b"</information>\n\n"),
    (b"\n<information>\n", b"</information>\n"),
)


class ScriptedDecoder(torch.nn.Module):
    """Writes a fixed text for each question, turn by turn.

    Its "hidden state" is one-hot over the vocabulary. It finds its place by what it reads back
    from the cache, so it also checks which ids the engine feeds it. `scripts` maps a text that
    occurs in the prompt to the ids to write. `notices` are texts that the environment puts in
    besides observations and Search-R1's notice.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        scripts: dict[str, list[int]],
        notices: tuple[str, ...] = (),
    ):
        super().__init__()
        self.tokenizer, self.scripts = tokenizer, scripts
        self.notices = [notice.encode() for notice in (SEARCH_R1.notice, *notices)]
        self.head_weight = 100.0 * torch.eye(tokenizer.size + HEAD_PADDING)
        self.compute_dtype = None
        self.config = new_decoder(decoder_config(32, tokenizer.size), seed=0).config

    def hidden(
        self, ids: torch.Tensor, *, cache: Any, documents: list[int] | None = None
    ) -> torch.Tensor:
        if documents:  # prefill: one part for each row
            parts = zip(cache.rows, cache.starts, ids[0].split(documents), strict=True)
        else:
            parts = [(row, int(start), ids[row]) for row, start in enumerate(cache.positions)]
        states = [state for part in parts for state in self.read(cache.cache, *part)]
        return torch.stack(states).view(*ids.shape, -1)

    def read(self, cache: Any, row: int, start: int, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        # Ids stand where keys would, so that compaction moves them.
        slots = cache.keys[0][:, 0, :, 0]
        slots[row, start : start + len(ids)] = ids.float()
        for t in range(len(ids)):
            state = torch.zeros(self.tokenizer.size + HEAD_PADDING)
            prefix = slots[row, : start + t + 1].long().tolist()
            text = self.tokenizer.decode(prefix)
            name = next((name for name in self.scripts if name in text), None)
            if name is not None:
                script = self.scripts[name]
                state[script[min(self.progress(prefix, script), len(script) - 1)]] = 1.0
            yield state

    def progress(self, prefix: list[int], script: list[int]) -> int:
        """Number of script tokens that the prefix holds, matched in order after the prompt."""
        start_id = self.tokenizer.full.token_to_id("<|im_start|>")
        prompt_end = len(prefix) - prefix[::-1].index(start_id)
        environment = self.environment_places(prefix)
        num_written = 0
        for place in range(prompt_end, len(prefix)):
            is_next = num_written < len(script) and prefix[place] == script[num_written]
            if is_next and place not in environment:
                num_written += 1
        return num_written

    def environment_places(self, prefix: list[int]) -> set[int]:
        """Places of the tokens that the environment wrote: one token is one byte."""
        text = bytes_of(self.tokenizer, prefix)
        places: set[int] = set()
        for begin, end in (*OBSERVATIONS, *((notice, b"") for notice in self.notices)):
            start = text.find(begin)
            while start >= 0:
                stop = text.find(end, start) + len(end) if end else start + len(begin)
                places |= set(range(start, stop if stop > start else len(text)))
                start = text.find(begin, start + 1)
        return places


def bytes_of(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """The text of ids, with a zero byte for each control token."""
    return b"".join(b"\0" if i >= 256 else tokenizer.decode([i]).encode() for i in ids)


class FixedRetriever:
    """Returns passages that name the query; records the batches that it was asked."""

    def __init__(self, text: str = "short text", failures: int = 0):
        self.text, self.failures, self.batches = text, failures, []

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        if self.failures:
            self.failures -= 1
            raise OSError("the index is away")
        self.batches.append(list(queries))
        return [
            [Passage(str(i), f"T{i}", f"{self.text} on {query}", 1.0) for i in range(top_k)]
            for query in queries
        ]


def ask(name: str, golds: tuple[str, ...] = ("gold",)) -> Question:
    return Question(name, name, golds, "test")


def scripted_policy(
    tokenizer: Tokenizer, scripts: dict[str, str], notices: tuple[str, ...] = ()
) -> Policy:
    """A policy that writes the text of the script whose name occurs in the question, and ends."""
    ids = {name: tokenizer.encode(text) + [EOS] for name, text in scripts.items()}
    return Policy(ScriptedDecoder(tokenizer, ids, notices), tokenizer)


def play(
    tokenizer: Tokenizer,
    scripts: dict[str, str],
    retriever: Any = None,
    *,
    protocol: Any = None,
    make_question: Callable[[str], Question] = ask,
    notices: tuple[str, ...] = (),
    **changes: Any,
) -> dict[str, Episode]:
    """Plays one episode for each script, greedily; returns them by name.

    `changes` are fields of RolloutSettings; for `notices` see ScriptedDecoder.
    """
    settings = {
        "max_new_tokens": 60,
        "max_obs_tokens": 120,
        "max_context_tokens": 900,
        "temperature": 0.0,
        "top_k": 2,
        "prompt": "short",
        **changes,
    }
    episodes = rollout.generate(
        scripted_policy(tokenizer, scripts, notices),
        retriever or FixedRetriever(),
        [make_question(name) for name in scripts],
        RolloutSettings(**settings),
        seed=0,
        **({} if protocol is None else {"protocol": protocol}),
    )
    return {episode.question.id: episode for episode in episodes}
