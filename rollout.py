"""The agent at work: it thinks, searches, reads and answers, many episodes at once, recorded token by token.

At most max_turns turns, then one last generation whose search is not executed. Protocols are in protocol.py.

Departures from the official code (Search-R1's generation loop, vendored by omron-sinicx/dgpo), with reasons
 1. Sampled ids are kept as sampled; the official loop decodes, cuts and re-tokenises, which drifts.
 2. Generation stops where the decoded turn completes </search> or </answer>; the official loop runs on to the
    end of turn or 500 tokens and cuts afterwards. The token that completes a tag is kept whole.
 3. An episode that fills the context ends with status max_tokens; the official loop drops the oldest tokens,
    the question among them.

Run: python rollout.py ask "who wrote ..." --model runs/dgpo

Legend: B rows (episodes in flight), T tokens, D width.
"""

import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import setting
from data import BUDGET_TEXT, Question, check_budget
from episode import Episode, Segment, episode_text, prompt_segment, thinking
from kernels import blocked, in_blocks, sample
from model import Decoder, KVCache, Tokenizer, load_decoder
from protocol import PROTOCOLS, Action, merged, observation_ids, parse_action
from retriever import Passage, Retriever

SEARCH_TRIES = 3
THINK_END, ANSWER_START = "</think>", "<answer>"  # what a hard stop says in the agent's place
# Tokens that the other rows write before the results of a search are looked at; on a CPU both want the same cores.
SEARCH_STEPS = {"cpu": 1, "cuda": 8}
MAX_PREFILL_TOKENS = 16384  # at once: what the MLP holds of them is what takes memory
GRAPH_REACH = 256  # slots; a graph reads a multiple of them
DECODE_STEPS = {"cpu": 1, "cuda": 8}  # tokens that a row writes before the host looks: on a GPU each look costs a wait


@dataclass
class RolloutSettings:
    protocol: str = setting("search-r1", "what the agent may write", choices=tuple(PROTOCOLS))
    max_queries: int = setting(3, "qagent: queries of one search, those beyond are dropped and counted; 0: any number")
    max_turns: int = setting(4, "turns that may search (paper Table 8)")
    top_k: int = setting(3, "passages per search (paper Table 8)")
    max_new_tokens: int = setting(500, "tokens per turn (paper Table 8: maximum response length)")
    max_obs_tokens: int = setting(500, "tokens of one <information> block (official code)")
    max_context_tokens: int = setting(4096, "tokens of prompt and episode together (paper Table 8)")
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus sampling; training needs 1.0")
    prompt: str = setting("paper", "'paper' (Table 7), 'qagent', 'short', 'row' (from the data), or a file with "
                          "{question}")
    budget_text: str = setting(BUDGET_TEXT, "how a question's budget is told; empty: it is kept from the agent")
    hard_stop: bool = setting(False, "end the thinking at a question's budget and ask for the answer at once")
    rollout_rows: int = setting(64, "episodes in flight at once")
    cuda_graphs: bool = setting(False, "replay the steps of a GPU as CUDA graphs (not yet tried on one)")


class Policy(NamedTuple):
    decoder: Decoder
    tokenizer: Tokenizer

    @property
    def head(self) -> Tensor:
        """[V, D]: the head's rows that are tokens; published heads are padded beyond them."""
        return self.decoder.head_weight[: self.tokenizer.size]


# ---- noise ----


def uniforms(seed: int, episodes: Sequence[int], token_indices: Sequence[int]) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, episode, token index) alone, never on the batch.

    A counter through splitmix64's finaliser, twice; two of one shape -> float64 of that shape.
    """
    with np.errstate(over="ignore"):
        x = _mix(np.uint64(seed % 2**64) + np.asarray(episodes, np.uint64) * np.uint64(0xD1342543DE82EF95))
        x = _mix(x + np.asarray(token_indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- the engine ----


@dataclass
class _Row:
    """One episode in flight. `pending` are the tokens that the cache does not hold yet."""

    episode: Episode
    index: int  # the episode's number: its noise depends on it
    pending: list[int]
    cached: int = 0  # tokens in the cache; also the position of pending[0]
    turn: int = 0
    sampled: int = 0  # agent tokens so far: the counter of the noise
    queries: tuple[str, ...] = ()  # what it waits for
    forced: str = ""  # what the turn begins with: the first one alone, and not the agent's words


class _Search(NamedTuple):
    """A batch of queries under way."""

    rows: list[_Row]
    results: Future[list[list[Passage]] | None]
    deadline: int  # the step before which the results are not looked at


def generate(
    policy: Policy,
    retriever: Retriever | None,
    questions: Sequence[Question],
    settings: RolloutSettings,
    *,
    seed: int,
    first_episode: int = 0,
    progress: str = "",
    shown: Sequence[Sequence[int]] = (),
    forced: str = "",
) -> list[Episode]:
    """One episode for each question, in the order of the questions.

    Question i is episode first_episode + i; with seed and weights it fixes the episode, whatever else is in
    the batch. `progress` names a progress bar. KV is kept across turns: an observation is a prefill into the
    same row; a row is given to the next question when its episode ends. shown: ids that each agent reads before its
    first turn; forced: text that this turn begins with, "<answer>" for example. retriever None: for max_turns 0.
    """
    if retriever is None and settings.max_turns > 0:
        raise ValueError(f"--max-turns {settings.max_turns}: got no corpus to search; give --corpus and --encoder, or "
                         "--max-turns 0")
    for budget in {question.budget for question in questions} - {None}:
        check_budget(budget, settings.max_context_tokens)
        if settings.hard_stop and settings.max_turns == 0 and budget >= settings.max_new_tokens:
            raise ValueError(f"--hard-stop: got a budget of {budget} and --max-new-tokens {settings.max_new_tokens}, "
                             "which end a turn first; raise them")
    episodes = [
        Episode(q, [prompt_segment(policy.tokenizer, q, settings.prompt, settings.budget_text)]) for q in questions]
    opening = policy.tokenizer.encode(forced) if forced else []
    for episode, ids in zip(episodes, shown or [[]] * len(episodes), strict=True):
        if given := [*ids, *opening]:
            episode.segments.append(Segment("environment", given))
    rows = [_Row(e, first_episode + i, e.ids, forced=forced) for i, e in enumerate(episodes)]
    with (
        in_blocks(policy.decoder),
        ThreadPoolExecutor(1) as searcher,
        tqdm(total=len(rows), desc=progress, disable=not progress, leave=False, mininterval=1) as bar,
    ):
        _Engine(policy, retriever, settings, seed, rows, searcher, bar).run()
    return episodes


class _Engine:
    """Rows in flight: some read (prefill), some write (a token a step), some wait for their search.

    What happens next follows from token counts and step numbers alone, never from how long a search took, so that
    the batches, and with them the rounding, are the same in every run.
    """

    def __init__(self, policy: Policy, retriever: Retriever, settings: RolloutSettings, seed: int, queue: list[_Row],
                 searcher: ThreadPoolExecutor, bar: tqdm) -> None:
        self.policy, self.retriever, self.settings, self.seed = policy, retriever, settings, seed
        self.queue, self.searcher, self.bar = deque(queue), searcher, bar
        self.search: _Search | None = None
        self.rows: list[_Row | None] = [None] * min(settings.rollout_rows, len(queue))
        self.num_steps = 0
        self.graphs: dict[int, _Graph] = {}  # by reach
        self.device = policy.head.device
        # One slot more than the context: what runs beyond it is written there and never read.
        self.head = blocked(policy.head)
        self.cache = KVCache(policy.decoder.config, len(self.rows), settings.max_context_tokens + 1,
                             dtype=policy.head.dtype, device=self.device)
        self.decode_steps = DECODE_STEPS.get(self.device.type, 1)
        self.may_end = torch.zeros(len(policy.head), dtype=torch.bool, device=self.device)  # [V]
        self.may_end[[*policy.tokenizer.containing(">"), policy.tokenizer.eos_id]] = True

    @torch.no_grad()
    def run(self) -> None:
        while self.fill():
            waiting = [row for row in self.rows if row and row.queries]
            busy = [slot for slot, row in enumerate(self.rows) if row and not row.queries]
            reading = [slot for slot in busy if len(self.rows[slot].pending) > 1]
            writing = [slot for slot in busy if len(self.rows[slot].pending) == 1]
            if self.search is None and self.is_worth_it(waiting, writing):
                self.ask(waiting)
            elif self.search and (not writing or self.num_steps >= self.search.deadline):
                self.observe()
            elif self.is_worth_it(reading, writing):
                self.read(reading)
            else:
                self.write(writing)

    def is_worth_it(self, group: list, writing: list[int]) -> bool:
        """A prefill and a search wait for company, so that they are not done a row at a time."""
        return bool(group) and (not writing or 8 * len(group) >= len(self.rows))

    def fill(self) -> bool:
        """Free ended rows, give them to the next questions, drop rows that stay free; False when all is done."""
        for slot, row in enumerate(self.rows):
            if row and row.episode.status:
                self.rows[slot] = None
                self.bar.update()
            while self.rows[slot] is None and self.queue:
                row = self.queue.popleft()
                if len(row.pending) < self.settings.max_context_tokens:
                    self.rows[slot] = row
                    row.episode.segments.append(Segment("agent", []))
                else:  # a prompt that fills the context leaves no room to act
                    row.episode.status = "max_tokens"
                    self.bar.update()
        in_flight = [slot for slot, row in enumerate(self.rows) if row]
        if 4 * len(in_flight) <= 3 * len(self.rows):
            self.cache.keep(torch.tensor(in_flight, dtype=torch.long, device=self.device))
            self.rows, self.graphs = [self.rows[slot] for slot in in_flight], {}  # a graph holds the old cache
        return bool(self.rows)

    def read(self, slots: list[int]) -> None:
        """Run the pending tokens of these rows, packed, and sample the token that follows each row's."""
        fit = np.cumsum([len(self.rows[slot].pending) for slot in slots]) <= MAX_PREFILL_TOKENS
        slots = slots[: max(1, fit.sum())]  # the others read next time
        active = [self.rows[slot] for slot in slots]
        lengths = [len(row.pending) for row in active]
        hidden = self.policy.decoder.hidden(
            torch.tensor([[i for row in active for i in row.pending]], device=self.device),
            documents=lengths,
            cache=self.cache.prefill(slots, [row.cached for row in active]),
        )  # [1, T, D]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        tokens, logprobs = self.sample(hidden[0, last], self.noise(active, 1)[:, 0])
        for row, length, token, logprob in zip(active, lengths, tokens.tolist(), logprobs.tolist(), strict=True):
            self.take(row, length, token, logprob)

    def write(self, slots: list[int]) -> None:
        """A few steps of all rows, sampling a token a step; the host looks at the tokens afterwards.

        A step is over all rows, which saves gathering the cache; a row that does not write, or whose last token may
        have ended its turn, repeats its place: what it puts there is overwritten before anything attends to it.
        """
        writing, num_steps = set(slots), self.decode_steps
        rows = [self.rows[slot] if slot in writing else None for slot in range(len(self.rows))]
        pending = torch.tensor([row.pending[0] if row else 0 for row in rows], device=self.device)
        positions = torch.tensor([row.cached if row else 0 for row in self.rows], device=self.device)
        stopped = torch.tensor([row is None for row in rows], device=self.device)
        noise = self.noise([row or _IDLE for row in rows], num_steps)
        reach = max(row.cached for row in self.rows if row) + num_steps  # also of those that wait
        results = self.steps(min(reach, self.cache.slots), pending, positions, stopped, noise)
        self.num_steps += num_steps
        tokens, logprobs, may_end = (result.tolist() for result in results)
        for slot in slots:
            row = self.rows[slot]
            for token, logprob, stops in zip(tokens[slot], logprobs[slot], may_end[slot], strict=True):
                if self.take(row, 1, token, logprob) or stops:
                    break

    def steps(self, reach: int, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The steps of `write` on the device: (tokens, logprobs, may_end), [B, steps] each.

        Where CUDA graphs are on, a graph is captured for each number of rows and (rounded) reach, and replayed.
        """
        if not (self.settings.cuda_graphs and self.device.type == "cuda"):
            return self.run_steps(reach, *inputs)
        reach = min(-(-reach // GRAPH_REACH) * GRAPH_REACH, self.cache.slots)
        if reach not in self.graphs:
            self.graphs[reach] = _Graph(partial(self.run_steps, reach), inputs)
        return self.graphs[reach](*inputs)

    def run_steps(
        self, reach: int, pending: Tensor, positions: Tensor, stopped: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """pending, positions, stopped [B], noise [B, steps]; nothing here waits for the device."""
        tokens, logprobs = [], []
        for uniform in noise.unbind(1):
            positions = positions.clamp(max=reach - 1)
            hidden = self.policy.decoder.hidden(pending[:, None], cache=self.cache.step(positions, reach))  # [B, 1, D]
            token, logprob = self.sample(hidden[:, 0], uniform)
            tokens, logprobs = [*tokens, token], [*logprobs, logprob]
            stopped = stopped | self.may_end[token]
            pending = torch.where(stopped, pending, token)
            positions = torch.where(stopped, positions, positions + 1)
        tokens = torch.stack(tokens, 1)
        return tokens, torch.stack(logprobs, 1), self.may_end[tokens]

    def noise(self, rows: Sequence[_Row], num_steps: int) -> Tensor:
        """[B, steps]"""
        counts = np.array([row.sampled for row in rows])[:, None] + np.arange(num_steps)
        indices = np.broadcast_to(np.array([row.index for row in rows])[:, None], counts.shape)
        return torch.from_numpy(uniforms(self.seed, indices, counts)).to(self.device)

    def sample(self, hidden: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return sample(hidden, self.head, noise, temperature=self.settings.temperature, top_p=self.settings.top_p)

    def take(self, row: _Row, num_read: int, token: int, logprob: float) -> bool:
        """Record a token sampled after num_read more; whether that ended the turn."""
        row.cached += num_read
        row.pending = [token]
        row.sampled += 1
        turn = row.episode.segments[-1]
        turn.ids.append(token)
        turn.logprobs.append(logprob)
        row.queries = _end_of_turn(row, self.policy.tokenizer, self.settings)
        if not row.queries and not row.episode.status and len(row.pending) == 1 and self.settings.hard_stop:
            _stop_thinking(row, self.policy.tokenizer, self.settings)
        return bool(row.queries) or bool(row.episode.status) or len(row.pending) > 1

    def ask(self, rows: list[_Row]) -> None:
        """Start one search for all that wait; the others go on writing meanwhile."""
        queries = [query for row in rows for query in row.queries]
        results = self.searcher.submit(_search, self.retriever, queries, self.settings.top_k)
        self.search = _Search(rows, results, self.num_steps + SEARCH_STEPS.get(self.device.type, 1))

    def observe(self) -> None:
        """Show what was found; a search that keeps failing ends its episodes with status search_error."""
        rows, results, _ = self.search
        self.search, found = None, results.result()
        for row in rows:
            queries, row.queries = row.queries, ()
            if found is None:
                row.episode.status = "search_error"
                continue
            passages, found = merged(found[: len(queries)]), found[len(queries) :]
            row.episode.queries += queries
            row.episode.passages.append(passages)
            protocol = PROTOCOLS[self.settings.protocol]
            ids = observation_ids(self.policy.tokenizer, passages, self.settings.max_obs_tokens, protocol)
            _observe(row, ids, self.settings)


_IDLE = _Row(None, 0, [0])  # stands for a row that does not write


class _Graph:
    """What a function of tensors launches on a GPU, recorded once and launched again at one go."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in inputs]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function(*self.inputs)  # libraries allocate what they need
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.outputs


def _end_of_turn(row: _Row, tokenizer: Tokenizer, settings: RolloutSettings) -> tuple[str, ...]:
    """Act on the token just sampled: continue, end the episode, go on with a notice, or return queries."""
    episode, ids = row.episode, row.episode.segments[-1].ids
    # Both closing tags end in ">", so only a token with that character can complete one.
    text = row.forced + tokenizer.decode(ids) if ids[-1] in tokenizer.containing(">") else ""
    complete = "</search>" in text or "</answer>" in text
    full = row.cached + 1 >= settings.max_context_tokens
    cut = full or len(ids) >= settings.max_new_tokens
    if not (complete or cut or ids[-1] == tokenizer.eos_id):
        return ()
    protocol = PROTOCOLS[settings.protocol]
    action = parse_action(text, protocol) if complete else Action("invalid", "")
    if action.kind == "answer":
        episode.status, episode.answer = "answered", action.content
    elif full:
        episode.status = "max_tokens"
    elif row.turn == settings.max_turns:  # that was the last generation: nothing it asks for is done
        episode.status = "max_turns" if action.kind == "search" else "max_tokens" if cut else "invalid"
    elif action.kind == "search":
        kept = action.queries[: settings.max_queries or None] if protocol.name == "qagent" else action.queries
        episode.dropped_queries += len(action.queries) - len(kept)
        return kept
    else:
        _observe(row, tokenizer.encode(protocol.notice), settings)
    return ()


def _observe(row: _Row, ids: list[int], settings: RolloutSettings, *, forced: str = "") -> None:
    """Append what the environment says and open the next agent turn, or end an episode that has no room.

    forced: the end of ids, with which the agent's turn goes on, rather than a new one begins.
    """
    if row.cached + 1 + len(ids) >= settings.max_context_tokens:
        row.episode.status = "max_tokens"
        return
    row.turn += not forced
    row.forced = forced
    row.pending += ids
    row.episode.segments += [Segment("environment", ids), Segment("agent", [])]


def _stop_thinking(row: _Row, tokenizer: Tokenizer, settings: RolloutSettings) -> None:
    """At the budget: close the agent's thinking in its place, and let it write the answer."""
    budget, turns = row.episode.question.budget, [s for s in row.episode.segments if s.author == "agent"]
    if budget is None or sum(len(turn.ids) for turn in turns) < budget:
        return
    counts = [thinking(turn.ids, tokenizer) for turn in turns]
    is_open, tail = counts[-1][1], tokenizer.decode(turns[-1].ids[-len(THINK_END) :])
    is_closing = any(THINK_END.startswith(tail[i:]) for i in range(len(tail)))  # by itself, just now
    if is_open and not is_closing and sum(count for count, _ in counts) >= budget:
        _observe(row, tokenizer.encode(f" {THINK_END}\n{ANSWER_START}"), settings, forced=ANSWER_START)


def _search(retriever: Retriever, queries: list[str], top_k: int) -> list[list[Passage]] | None:
    """One batched search, tried again when it fails; None when it keeps failing."""
    for attempt in range(1, SEARCH_TRIES + 1):
        try:
            return retriever.search(queries, top_k)
        except (OSError, RuntimeError) as error:
            print(f"search failed ({attempt} of {SEARCH_TRIES} tries): {error}", file=sys.stderr)
    return None


# ---- the program ----


@dataclass
class AskSettings(RolloutSettings):
    model: str = setting("runs/dgpo", "checkpoint that answers")
    dtype: str = setting("float32", "bfloat16: half the memory, and faster where the processor multiplies in it",
                         choices=("float32", "bfloat16"))
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    seed: int = setting(0, "sampling noise, when temperature > 0")
    budget: int | None = setting(None, "tokens to think, told to the agent; --hard-stop makes it keep to them")


def ask(words: list[str], argv: list[str]) -> None:
    """Print one episode."""
    if not words:
        sys.exit('rollout.py: got no question; expected: python rollout.py ask "who wrote ..." --model DIR')
    settings = config.load(AskSettings, argv, prog="rollout.py ask", description="Watch one episode.",
                           default_config=Path(__file__).parent / "configs" / "world.toml",
                           shared={f.name for f in fields(AskSettings)} - {"seed", "temperature", "dtype", "hard_stop"})
    policy = Policy(load_decoder(settings.model, dtype=getattr(torch, settings.dtype)), Tokenizer.load(settings.model))
    retriever = None
    if settings.max_turns > 0:
        retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None)
    question = Question("asked", " ".join(words), (), "asked", budget=settings.budget)
    [episode] = generate(policy, retriever, [question], settings, seed=settings.seed)
    print(episode_text(episode, policy.tokenizer))


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command != "ask":
        is_help = command in ("", "-h", "--help")
        sys.exit(__doc__ if is_help else f"rollout.py: got {command!r}, expected ask")
    words = []
    while rest and not rest[0].startswith("--"):
        words.append(rest.pop(0))
    ask(words, rest)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rollout.py: {error}")
