"""The agent at work: it thinks, searches, reads and answers; many episodes run at once.

An episode has at most max_turns turns that search, then one last turn whose search is not run.
Run: python rollout.py ask "who wrote ..." --model runs/dgpo

Legend: B rows (episodes in flight), T tokens, D width, V vocabulary.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import episode as record
from data import Passage, Question
from episode import SEARCH_R1, Episode, Protocol, Segment
from infra.config import setting
from infra.parallel import uniforms
from kernels import blocked, merged, sample
from model import Decoder, Steps, open_steps
from tokenizer import Tokenizer

# Steps of the other rows before a search's results are used; a CPU cannot do both at once.
SEARCH_STEPS = {"cpu": 1, "cuda": 8}
MAX_PREFILL_TOKENS = 16384  # at once; the MLP's activations of them take the memory
SearchEngine = Any  # has search(queries, top_k) -> passages of each, as retriever.Retriever has


@dataclass
class RolloutSettings:
    protocol: str = setting("search-r1", "what the agent may write", reads="search-r1|FILE.py:NAME")
    max_turns: int = setting(4, "turns that may search (paper Table 8)")
    top_k: int = setting(3, "passages per search (paper Table 8)", at_least=1)
    max_new_tokens: int = setting(500, "tokens per turn", above=0, below="max_context_tokens")
    max_obs_tokens: int = setting(500, "tokens a search shows", above=0, below="max_context_tokens")
    max_context_tokens: int = setting(4096, "tokens of prompt and episode (Table 8)", at_least=2)
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus sampling; reinforcement needs 1", above=0, at_most=1)
    answer_rule: str = setting("squad", "how answers are compared: as in the paper; see metrics.md",
                               choices=("squad", "unicode", "numbers"), rare=True)
    prompt: str = setting("paper", "paper: Table 7; row: the row's own; FILE with {question}",
                          reads="paper|short|row|FILE")
    rollout_rows: int = setting(64, "episodes in flight at once", at_least=1)
    corpus: str = setting("", "passages, JSONL", reads="FILE")
    encoder: str = setting("", "checkpoint of the passage encoder", reads="DIR")
    query_prefix: str | None = setting(None, "before each query; none: its own", rare=True)
    passage_prefix: str | None = setting(None, "before each passage; none: its own", rare=True)
    index: str = setting("", "of the corpus, or its server; empty: embed now", reads="URL|PATH")
    search_timeout_s: float = setting(60.0, "a longer search has failed", above=0, rare=True)


class Policy(NamedTuple):
    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def head(self) -> Tensor:
        """[V, D]: the head's rows that are tokens; published heads are padded beyond them."""
        return self.decoder.head_weight[: self.tokenizer.size]

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, logits and the cache."""
        return self.decoder.compute_dtype or self.head.dtype


def load_protocol(spec: str) -> Protocol:
    from infra.named import load_named  # here, because most protocols are this one
    return SEARCH_R1 if spec == SEARCH_R1.name else load_named(spec, "--protocol", Protocol)


def generate(policy: Policy, retriever: SearchEngine | None,
             questions: Sequence[Question | Episode], settings: RolloutSettings, *, seed: int,
             first_episode: int = 0, progress: str = "",
             protocol: Protocol | None = None) -> list[Episode]:
    """Play one episode for each question to its end, in the order of the questions.

    Question i is episode first_episode + i. This number, the seed and the weights determine it,
    whatever else is in the batch. In a question's place may stand an episode that was begun
    (episode.begin_episode). progress: a bar's name. protocol: by default the settings' one.
    """
    if retriever is None and settings.max_turns > 0:
        raise ValueError(f"--max-turns {settings.max_turns}: got no corpus to search; give "
                         "--corpus and --encoder, or --max-turns 0")
    episodes, rows = [], []
    for number, episode in enumerate(questions, first_episode):
        if isinstance(episode, Question):
            episode = record.begin_episode(policy.tokenizer, episode, settings.prompt)
        episodes.append(episode)
        if len(episode.ids) < settings.max_context_tokens:
            rows.append(Row(episode, number, episode.ids))
            episode.segments.append(Segment("agent", []))
        else:  # a prompt that fills the context leaves no room to act
            episode.status = "max_tokens"
    protocol = protocol or load_protocol(settings.protocol)
    bar = tqdm(rows, desc=progress, disable=not progress, leave=False, mininterval=1)
    # One slot more than the context: a row at its end writes there, and nothing reads it.
    steps = open_steps(policy.decoder, min(settings.rollout_rows, len(rows)),
                       settings.max_context_tokens + 1, policy.dtype)
    with merged(policy.decoder, policy.dtype, steps.copies), bar:
        Engine(policy, retriever, settings, protocol, seed, steps).run(rows, bar)
    return episodes


@dataclass
class Row:
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


IDLE = Row(Episode(None, [], "ended"), 0, [0])  # in the place of a row that writes nothing


class Engine:
    """Rows in flight: some read (prefill), some write (one token a step), some await a search.

    What happens next follows from token counts and step numbers, never from how long a search
    took. So the batches, and with them the rounding, are the same in every run.
    """

    def __init__(self, policy: Policy, retriever: SearchEngine | None, settings: RolloutSettings,
                 protocol: Protocol, seed: int, steps: Steps) -> None:
        self.decoder, self.tokenizer, self.retriever = *policy, retriever
        self.settings, self.protocol, self.seed = settings, protocol, seed
        self.steps, self.cache, self.device = steps, steps.cache, policy.head.device
        self.head = blocked(policy.head.to(policy.dtype))
        self.num_steps, self.max_rows = 0, steps.cache.rows
        self.search = None  # the one under way, a Future; its result is None if it kept failing

    @torch.no_grad()
    def run(self, rows: list[Row], bar: tqdm) -> None:
        """Play the episodes of these rows to their ends."""
        self.waiting, self.rows = iter(rows), [IDLE] * self.max_rows
        while self.fill(bar):
            slots = {"ended": [], "searching": [], "reading": [], "writing": []}
            for slot, row in enumerate(self.rows):
                slots[row.state].append(slot)
            _, searching, reading, writing = slots.values()
            if self.search is None and self.is_worth_it(searching, writing):
                self.start_search(searching)
            elif self.search and (not writing or self.num_steps >= self.deadline):
                self.show_passages()
            elif self.is_worth_it(reading, writing):
                self.read(reading)
            else:
                self.write()

    def is_worth_it(self, slots: list[int], writing: list[int]) -> bool:
        """Batches prefills and searches: waits until 1/8 of the rows need one."""
        return bool(slots) and (not writing or 8 * len(slots) >= len(self.rows))

    def fill(self, bar: tqdm) -> bool:
        """Give the rows of ended episodes to the next ones; False once all episodes have ended."""
        for slot, row in enumerate(self.rows):
            if row.episode.status:
                bar.update(row is not IDLE)
                self.rows[slot] = next(self.waiting, IDLE)
        self.rows += islice(self.waiting, self.max_rows - len(self.rows))  # of rows that come late
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

    def write(self) -> None:
        """One step: sample a token for each row that writes."""
        # It covers all rows, because gathering some of them would copy the cache. A row that does
        # not write repeats its position: what it puts there is overwritten before use.
        rows = [row if row.state == "writing" else IDLE for row in self.rows]
        positions = [row.num_cached for row in self.rows]
        # A search may use the GPU, too, and nothing else may happen there during a capture.
        hidden = self.steps.hidden(self.decoder, [row.pending[0] for row in rows], positions,
                                   may_capture=self.search is None)  # [B, D]
        self.num_steps += 1
        self.sample(hidden, rows)

    def sample(self, hidden: Tensor, rows: list[Row]) -> None:
        """Sample the next token of each row from hidden [B, D], and act on it."""
        noise = uniforms(self.seed, [r.number for r in rows], [r.num_sampled for r in rows])
        noise = torch.from_numpy(noise).to(self.device)  # [B]
        tokens, logprobs = sample(hidden, self.head, noise, top_p=self.settings.top_p,
                                  temperature=self.settings.temperature)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row is not IDLE:
                self.take(row, token, logprob)

    def take(self, row: Row, token: int, logprob: float) -> None:
        """Record a token, which was sampled once the pending ones were read, and act on it."""
        row.num_cached += len(row.pending)
        row.pending, row.num_sampled = [token], row.num_sampled + 1
        before, turn = row.episode.segments[-2:]
        turn.ids.append(token)
        turn.logprobs.append(logprob)
        is_full = row.num_cached + 1 >= self.settings.max_context_tokens
        is_cut = is_full or len(turn.ids) >= self.settings.max_new_tokens
        is_over, text, said = is_cut or token in self.tokenizer.end_ids, "", ""
        if is_over or self.tokenizer.closes(token):
            text = before.opens + self.tokenizer.decode(turn.ids)
            said = record.outside_thoughts(text).partition("<think>")[0]  # an open one hides tags
        if is_over or "</search>" in said or "</answer>" in said:
            self.end_turn(row, text, is_full=is_full, is_cut=is_cut)
        elif self.protocol.interrupt:
            if segment := self.protocol.interrupt(row.episode, self.tokenizer):
                self.put_in(row, segment)

    def end_turn(self, row: Row, text: str, *, is_full: bool, is_cut: bool) -> None:
        """End the episode, wait for a search, or go on after a notice."""
        episode, action = row.episode, record.parse_action(text, self.protocol)
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
            ids = self.tokenizer.encode(self.protocol.notice, own=True)
            self.put_in(row, Segment("environment", ids))

    def put_in(self, row: Row, segment: Segment) -> None:
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
        from infra.background import keep_trying  # here, because only agents that search need it
        search = partial(_search, self.retriever, queries, self.settings.top_k)
        self.search = keep_trying("search", search, self.settings.search_timeout_s)
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
            passages = record.unique_passages(results[: len(queries)])
            results = results[len(queries) :]
            row.episode.queries += queries
            row.episode.passages.append(passages)
            row.turn += 1
            self.put_in(row, Segment("environment", record.observation_ids(
                self.tokenizer, passages, self.settings.max_obs_tokens, self.protocol)))


def _search(engine: SearchEngine, queries: list[str], top_k: int) -> list[list[Passage]]:
    """One batched search; raises if what comes back are not passages for each query."""
    results = [[*passages] for passages in engine.search(queries, top_k)]
    "".join(p.title + p.text for passages in results for p in passages).encode()  # they are text
    if len(results) != len(queries):
        raise ValueError(f"got {len(results)} lists of passages for {len(queries)} queries")
    return results


if __name__ == "__main__":
    importlib.import_module("serving.ask").main(sys.argv[1:])  # a door for use, beside the method
