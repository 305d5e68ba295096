"""The agent at work: it thinks, searches, reads and answers; many episodes run at once.

An episode has at most max_turns turns that search, then one last turn whose search is not run.
Run: python rollout.py ask "who wrote ..." --model runs/dgpo

Legend: B rows (episodes in flight), T tokens, D width, V vocabulary.
"""

import importlib
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data import Passage, Question
from episode import (
    SEARCH_R1,
    Episode,
    Protocol,
    Segment,
    begin_episode,
    observation_ids,
    parse_action,
    unique_passages,
)
from infra.config import load_named, setting
from infra.parallel import uniforms
from kernels import blocked, in_blocks, sample
from model import Decoder, KVCache
from tokenizer import Tokenizer

SEARCH_TRIES = 3
# Steps of the other rows before a search's results are used; a CPU cannot do both at once.
SEARCH_STEPS = {"cpu": 1, "cuda": 8}
MAX_PREFILL_TOKENS = 16384  # at once; the MLP's activations of them take the memory
SearchEngine = Any  # has search(queries, top_k) -> passages of each, as retriever.Retriever has


@dataclass
class RolloutSettings:
    protocol: str = setting("search-r1", "what the agent may write: search-r1, or FILE.py:NAME")
    max_turns: int = setting(4, "turns that may search (paper Table 8)")
    top_k: int = setting(3, "passages per search (paper Table 8)")
    max_new_tokens: int = setting(500, "tokens per turn (paper Table 8: response length)")
    max_obs_tokens: int = setting(500, "tokens of one <information> block (official code)")
    max_context_tokens: int = setting(4096, "tokens of prompt and episode (paper Table 8)")
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus sampling; training needs 1.0")
    prompt: str = setting("paper", "paper (Table 7), short, row (its own), or FILE with {question}")
    rollout_rows: int = setting(64, "episodes in flight at once")
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")


class Policy(NamedTuple):
    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def head(self) -> Tensor:
        """[V, D]: the head's rows that are tokens; published heads are padded beyond them."""
        return self.decoder.head_weight[: self.tokenizer.size]


def load_protocol(spec: str) -> Protocol:
    return SEARCH_R1 if spec == SEARCH_R1.name else load_named(spec, "--protocol", Protocol)


def generate(policy: Policy, retriever: SearchEngine | None,
             questions: Sequence[Question | Episode], settings: RolloutSettings, *, seed: int,
             first_episode: int = 0, progress: str = "",
             protocol: Protocol | None = None) -> list[Episode]:
    """Play one episode for each question to its end, in the order of the questions.

    Question i is episode first_episode + i. This number, the seed and the weights determine the
    episode, whatever else is in the batch. An episode that was begun (episode.begin_episode) may
    stand in a question's place. progress: a bar's name. protocol: by default the settings' one.
    """
    if retriever is None and settings.max_turns > 0:
        raise ValueError(f"--max-turns {settings.max_turns}: got no corpus to search; give "
                         "--corpus and --encoder, or --max-turns 0")
    episodes, rows = [], []
    for number, episode in enumerate(questions, first_episode):
        if isinstance(episode, Question):
            episode = begin_episode(policy.tokenizer, episode, settings.prompt)
        episodes.append(episode)
        if len(episode.ids) < settings.max_context_tokens:
            rows.append(_Row(episode, number, episode.ids))
            episode.segments.append(Segment("agent", []))
        else:  # a prompt that fills the context leaves no room to act
            episode.status = "max_tokens"
    protocol = protocol or load_protocol(settings.protocol)
    with in_blocks(policy.decoder), ThreadPoolExecutor(1) as searcher:
        bar = tqdm(rows, desc=progress, disable=not progress, leave=False, mininterval=1)
        _Engine(policy, retriever, settings, protocol, seed, searcher).run(rows, bar)
        bar.close()
    return episodes


@dataclass
class _Row:
    """An episode in flight."""
    episode: Episode
    number: int  # the episode's; its noise depends on it
    pending: list[int]  # tokens that the cache does not hold yet
    num_cached: int = 0  # tokens in the cache; also the position of pending[0]
    turn: int = 0
    num_sampled: int = 0  # agent tokens so far: the counter of the noise
    queries: tuple[str, ...] = ()  # what it waits for

    @property
    def state(self) -> str:
        """ended, searching, reading (several tokens to prefill) or writing (one token a step)."""
        if self.episode.status:
            return "ended"
        if self.queries:
            return "searching"
        return "reading" if len(self.pending) > 1 else "writing"


IDLE = _Row(Episode(None, [], "ended"), 0, [0])  # in the place of a row that writes nothing


class _Engine:
    """Rows in flight: some read (prefill), some write (one token a step), some await a search.

    What happens next follows from token counts and step numbers, never from how long a search
    took. So the batches, and with them the rounding, are the same in every run.
    """

    def __init__(self, policy: Policy, retriever: SearchEngine | None, settings: RolloutSettings,
                 protocol: Protocol, seed: int, searcher: ThreadPoolExecutor) -> None:
        self.decoder, self.tokenizer = policy
        self.retriever, self.searcher = retriever, searcher
        self.settings, self.protocol, self.seed = settings, protocol, seed
        self.head, self.device = blocked(policy.head), policy.head.device
        self.num_steps = 0
        # Both closing tags end in ">", so only a token with that character can complete one.
        self.closers = policy.tokenizer.containing(">")
        self.search: Future[list[list[Passage]] | None] | None = None  # the one under way

    @torch.no_grad()
    def run(self, rows: list[_Row], bar: tqdm) -> None:
        """Play the episodes of these rows to their ends."""
        self.waiting = iter(rows)
        self.rows = [IDLE] * min(self.settings.rollout_rows, len(rows))
        # One slot more than the context: a row at its end writes there, and nothing reads it.
        slots = self.settings.max_context_tokens + 1
        self.cache = KVCache(self.decoder.config, len(self.rows), slots,
                             dtype=self.head.dtype, device=self.device)
        while self.fill(bar):
            searching, reading, writing = map(self.slots_in, ("searching", "reading", "writing"))
            if self.search is None and self.is_worth_it(searching, writing):
                self.start_search(searching)
            elif self.search and (not writing or self.num_steps >= self.deadline):
                self.show_passages()
            elif self.is_worth_it(reading, writing):
                self.read(reading)
            else:
                self.write(writing)

    def slots_in(self, state: str) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row.state == state]

    def is_worth_it(self, slots: list[int], writing: list[int]) -> bool:
        """Batches prefills and searches: waits until 1/8 of the rows need one."""
        return bool(slots) and (not writing or 8 * len(slots) >= len(self.rows))

    def fill(self, bar: tqdm) -> bool:
        """Give the rows of ended episodes to the next ones; False once all episodes have ended."""
        for slot in self.slots_in("ended"):
            bar.update(self.rows[slot] is not IDLE)
            self.rows[slot] = next(self.waiting, IDLE)
        occupied = [slot for slot, row in enumerate(self.rows) if row is not IDLE]
        if 4 * len(occupied) <= 3 * len(self.rows):  # drop rows that stay free
            self.cache.keep(torch.tensor(occupied, dtype=torch.long, device=self.device))
            self.rows = [self.rows[slot] for slot in occupied]
        return bool(self.rows)

    def read(self, slots: list[int]) -> None:
        """Prefill the pending tokens of these rows, packed; sample each row's next token."""
        ends = torch.tensor([len(self.rows[slot].pending) for slot in slots]).cumsum(0)
        slots = slots[: max(1, (ends <= MAX_PREFILL_TOKENS).sum())]  # the others read next time
        rows = [self.rows[slot] for slot in slots]
        pending = torch.tensor([[i for row in rows for i in row.pending]], device=self.device)
        cache = self.cache.prefill(slots, [row.num_cached for row in rows])
        hidden = self.decoder.hidden(
            pending, documents=[len(row.pending) for row in rows], cache=cache)  # [1, T, D]
        self.sample(hidden[0, ends[: len(rows)] - 1], rows)

    def write(self, slots: list[int]) -> None:
        """One step: sample a token for each of these rows."""
        # It covers all rows, because gathering some of them would copy the cache. A row that does
        # not write repeats its position: what it puts there is overwritten before use.
        rows = [self.rows[slot] if slot in slots else IDLE for slot in range(len(self.rows))]
        pending = torch.tensor([row.pending for row in rows], device=self.device)  # [B, 1]
        positions = [row.num_cached for row in self.rows]
        cache = self.cache.step(torch.tensor(positions, device=self.device), max(positions) + 1)
        hidden = self.decoder.hidden(pending, cache=cache)  # [B, 1, D]
        self.num_steps += 1
        self.sample(hidden[:, 0], rows)

    def sample(self, hidden: Tensor, rows: list[_Row]) -> None:
        """Sample the next token of each row from hidden [B, D], and act on it."""
        noise = uniforms(self.seed, [r.number for r in rows], [r.num_sampled for r in rows])
        noise = torch.from_numpy(noise).to(self.device)  # [B]
        tokens, logprobs = sample(hidden, self.head, noise, top_p=self.settings.top_p,
                                  temperature=self.settings.temperature)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row is not IDLE:
                self.take(row, token, logprob)

    def take(self, row: _Row, token: int, logprob: float) -> None:
        """Record a token, which was sampled once the pending ones were read, and act on it."""
        row.num_cached += len(row.pending)
        row.pending = [token]
        row.num_sampled += 1
        *_, before, turn = row.episode.segments
        turn.ids.append(token)
        turn.logprobs.append(logprob)
        is_full = row.num_cached + 1 >= self.settings.max_context_tokens
        is_cut = is_full or len(turn.ids) >= self.settings.max_new_tokens
        text = before.opens + self.tokenizer.decode(turn.ids) if token in self.closers else ""
        is_complete = "</search>" in text or "</answer>" in text
        if is_complete or is_cut or token == self.tokenizer.eos_id:
            self.end_turn(row, text, is_full=is_full, is_cut=is_cut)
        elif self.protocol.interrupt:
            if segment := self.protocol.interrupt(row.episode, self.tokenizer):
                self.put_in(row, segment)

    def end_turn(self, row: _Row, text: str, *, is_full: bool, is_cut: bool) -> None:
        """End the episode, wait for a search, or go on after a notice."""
        episode, action = row.episode, parse_action(text, self.protocol)
        if action.kind == "answer":
            episode.status, episode.answer = "answered", action.content
        elif is_full:
            episode.status = "max_tokens"
        elif row.turn == self.settings.max_turns:  # the last turn: its search is not run
            episode.status = "max_tokens" if is_cut else "invalid"
            if action.kind == "search":
                episode.status = "max_turns"
        elif action.kind == "search":
            row.queries = action.queries[: self.protocol.max_queries or None]
            episode.dropped_queries += len(action.queries) - len(row.queries)
        else:
            row.turn += 1
            self.put_in(row, Segment("environment", self.tokenizer.encode(self.protocol.notice)))

    def put_in(self, row: _Row, segment: Segment) -> None:
        """Append the environment's segment and let the agent go on, if there is room for it."""
        if row.num_cached + 1 + len(segment.ids) >= self.settings.max_context_tokens:
            row.episode.status = "max_tokens"
            return
        row.pending += segment.ids
        row.episode.segments += [segment, Segment("agent", [])]

    def start_search(self, slots: list[int]) -> None:
        """Start one search for all rows that wait; the others go on writing meanwhile."""
        self.asking = [self.rows[slot] for slot in slots]
        queries = [query for row in self.asking for query in row.queries]
        self.search = self.searcher.submit(_search, self.retriever, queries, self.settings.top_k)
        # The step before which the results are not used, even if they are there.
        self.deadline = self.num_steps + SEARCH_STEPS.get(self.device.type, 1)

    def show_passages(self) -> None:
        """Show the results; a search that keeps failing ends its episodes as search_error."""
        results, self.search = self.search.result(), None
        for row in self.asking:
            queries, row.queries = row.queries, ()
            if results is None:
                row.episode.status = "search_error"
                continue
            passages = unique_passages(results[: len(queries)])
            results = results[len(queries) :]
            row.episode.queries += queries
            row.episode.passages.append(passages)
            row.turn += 1
            self.put_in(row, Segment("environment", observation_ids(
                self.tokenizer, passages, self.settings.max_obs_tokens, self.protocol)))


def _search(engine: SearchEngine, queries: list[str], top_k: int) -> list[list[Passage]] | None:
    """One batched search, tried again when it fails; None when it keeps failing."""
    for attempt in range(1, SEARCH_TRIES + 1):
        try:
            return engine.search(queries, top_k)
        except (OSError, RuntimeError) as error:
            print(f"search failed ({attempt} of {SEARCH_TRIES} tries): {error}", file=sys.stderr)
    return None


if __name__ == "__main__":
    importlib.import_module("ask").main(sys.argv[1:])  # a door for use, beside the method
