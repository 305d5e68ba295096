"""The agent at work: it thinks, searches, reads and answers, many episodes at once, recorded token by token.

At most max_turns turns, then one last generation whose search is not executed. The protocol is in episode.py.

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
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import setting
from data import Question
from episode import (
    NOTICE,
    Action,
    Episode,
    Segment,
    episode_text,
    observation_ids,
    parse_action,
    prompt_segment,
)
from kernels import sample
from model import Decoder, KVCache, Tokenizer, load_decoder
from retriever import Retriever

SEARCH_TRIES = 3


@dataclass
class RolloutSettings:
    max_turns: int = setting(4, "turns that may search (paper Table 8)")
    top_k: int = setting(3, "passages per search (paper Table 8)")
    max_new_tokens: int = setting(500, "tokens per turn (paper Table 8: maximum response length)")
    max_obs_tokens: int = setting(500, "tokens of one <information> block (official code)")
    max_context_tokens: int = setting(4096, "tokens of prompt and episode together (paper Table 8)")
    temperature: float = setting(1.0, "sampling temperature; 0 is greedy")
    top_p: float = setting(1.0, "nucleus sampling; training needs 1.0")
    prompt: str = setting("paper", "'paper' (Table 7), 'short', 'row' (from the data), or a file with {question}")
    rollout_rows: int = setting(64, "episodes in flight at once")


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

    A counter through splitmix64's finaliser, twice; [B], [B] -> float64 [B].
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


@torch.no_grad()
def generate(
    policy: Policy,
    retriever: Retriever,
    questions: Sequence[Question],
    settings: RolloutSettings,
    *,
    seed: int,
    first_episode: int = 0,
    progress: str = "",
) -> list[Episode]:
    """One episode for each question, in the order of the questions.

    Question i is episode first_episode + i; with seed and weights it fixes the episode, whatever else is in
    the batch. `progress` names a progress bar. KV is kept across turns: an observation is a prefill into the
    same row; a row is given to the next question when its episode ends.
    """
    decoder, tokenizer = policy
    device = decoder.head_weight.device
    episodes = [Episode(q, [prompt_segment(tokenizer, q, settings.prompt)]) for q in questions]
    queue = deque(
        _Row(e, first_episode + i, list(e.segments[0].ids)) for i, e in enumerate(episodes)
    )
    num_rows = min(settings.rollout_rows, len(questions))
    if num_rows == 0:
        return episodes
    # One slot more than the context: padding of a full row is written there and never read.
    cache = KVCache(
        decoder.config, num_rows, settings.max_context_tokens + 1, dtype=decoder.head_weight.dtype, device=device
    )
    rows: list[_Row | None] = [None] * num_rows
    bar = tqdm(total=len(questions), desc=progress, disable=not progress, leave=False, mininterval=1)
    while queue or any(rows):
        for slot in range(len(rows)):
            while rows[slot] is None and queue:
                row = queue.popleft()
                if len(row.pending) < settings.max_context_tokens:
                    rows[slot] = row
                    row.episode.segments.append(Segment("agent", []))
                else:  # a prompt that fills the context leaves no room to act
                    row.episode.status = "max_tokens"
                    bar.update()
        in_flight = [slot for slot, row in enumerate(rows) if row]
        if not in_flight:
            break
        if not queue and len(in_flight) <= len(rows) // 2:
            cache.keep(torch.tensor(in_flight, device=device))
            rows = [rows[slot] for slot in in_flight]
            in_flight = list(range(len(rows)))
        reading = [slot for slot in in_flight if len(rows[slot].pending) > 1]
        writing = [slot for slot in in_flight if len(rows[slot].pending) == 1]
        # A prefill waits for company, so that it is not done a row at a time.
        if reading and (not writing or 8 * len(reading) >= len(rows)):
            _step(policy, retriever, cache, rows, reading, settings, seed)
        else:
            _step(policy, retriever, cache, rows, writing, settings, seed)
        for slot, row in enumerate(rows):
            if row and row.episode.status:
                rows[slot] = None
                bar.update()
    bar.close()
    return episodes


def _step(
    policy: Policy,
    retriever: Retriever,
    cache: KVCache,
    rows: list[_Row | None],
    slots: list[int],
    settings: RolloutSettings,
    seed: int,
) -> None:
    """Run the pending tokens of `slots` through the decoder and sample one token for each of them."""
    device = policy.decoder.head_weight.device
    width = max(len(rows[slot].pending) for slot in slots)
    # A decode step runs over all rows, which saves gathering the cache; idle rows write one junk token where
    # their next real token will be written before anything can attend to it.
    part = list(range(len(rows))) if width == 1 else slots
    writing = set(slots)
    ids = np.zeros((len(part), width), np.int64)
    positions = np.zeros((len(part), width), np.int64)
    for i, slot in enumerate(part):
        row = rows[slot]
        if row is None:
            continue
        count = len(row.pending) if slot in writing else 0
        ids[i, :count] = row.pending[:count]
        # Padding goes to later slots, which real tokens fill before anything can attend to them.
        positions[i] = np.minimum(row.cached + np.arange(width), settings.max_context_tokens)
    hidden = policy.decoder.hidden(
        torch.from_numpy(ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        cache=cache,
        rows=None if width == 1 else torch.tensor(part, device=device),
    )  # [B, T, D]
    chosen = slots if width == 1 else list(range(len(slots)))
    active = [rows[slot] for slot in slots]
    last = torch.tensor([len(row.pending) - 1 for row in active], device=device)
    noise = uniforms(seed, [row.index for row in active], [row.sampled for row in active])
    tokens, logprobs = sample(
        hidden[torch.tensor(chosen, device=device), last],
        policy.head,
        torch.from_numpy(noise).to(device),
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    searching: list[tuple[_Row, str]] = []
    for row, token, logprob in zip(active, tokens.tolist(), logprobs.tolist(), strict=True):
        row.cached += len(row.pending)
        row.pending = [token]
        row.sampled += 1
        row.episode.segments[-1].ids.append(token)
        row.episode.segments[-1].logprobs.append(logprob)
        query = _end_of_turn(row, policy.tokenizer, settings)
        if query is not None:
            searching.append((row, query))
    if searching:
        _search(searching, retriever, policy.tokenizer, settings)


def _end_of_turn(row: _Row, tokenizer: Tokenizer, settings: RolloutSettings) -> str | None:
    """Act on the token just sampled: continue, end the episode, go on with a notice, or return a query."""
    episode, ids = row.episode, row.episode.segments[-1].ids
    # Both closing tags end in ">", so only a token with that character can complete one.
    text = tokenizer.decode(ids) if ids[-1] in tokenizer.containing(">") else ""
    complete = "</search>" in text or "</answer>" in text
    full = row.cached + 1 >= settings.max_context_tokens
    cut = full or len(ids) >= settings.max_new_tokens
    if not (complete or cut or ids[-1] == tokenizer.eos_id):
        return None
    action = parse_action(text) if complete else Action("invalid", "")
    if action.kind == "answer":
        episode.status, episode.answer = "answered", action.content
    elif full:
        episode.status = "max_tokens"
    elif row.turn == settings.max_turns:  # that was the last generation: nothing it asks for is done
        episode.status = "max_turns" if action.kind == "search" else "max_tokens" if cut else "invalid"
    elif action.kind == "search":
        return action.content
    else:
        _observe(row, tokenizer.encode(NOTICE), settings)
    return None


def _observe(row: _Row, ids: list[int], settings: RolloutSettings) -> None:
    """Append what the environment says and open the next agent turn, or end an episode that has no room."""
    if row.cached + 1 + len(ids) >= settings.max_context_tokens:
        row.episode.status = "max_tokens"
        return
    row.turn += 1
    row.pending += ids
    row.episode.segments += [Segment("environment", ids), Segment("agent", [])]


def _search(
    searching: list[tuple[_Row, str]], retriever: Retriever, tokenizer: Tokenizer, settings: RolloutSettings
) -> None:
    """One batched search; a search that keeps failing ends its episodes with status search_error."""
    queries = [query for _, query in searching]
    for attempt in range(1, SEARCH_TRIES + 1):
        try:
            found = retriever.search(queries, settings.top_k)
            break
        except (OSError, RuntimeError) as error:
            print(f"search failed ({attempt} of {SEARCH_TRIES} tries): {error}", file=sys.stderr)
    else:
        for row, _ in searching:
            row.episode.status = "search_error"
        return
    for (row, query), passages in zip(searching, found, strict=True):
        row.episode.queries.append(query)
        row.episode.passages.append(passages)
        _observe(row, observation_ids(tokenizer, passages, settings.max_obs_tokens), settings)


# ---- the program ----


@dataclass
class AskSettings(RolloutSettings):
    model: str = setting("runs/dgpo", "checkpoint that answers")
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    seed: int = setting(0, "sampling noise, when temperature > 0")


def ask(words: list[str], argv: list[str]) -> None:
    """Print one episode."""
    if not words:
        sys.exit('rollout.py: got no question; expected: python rollout.py ask "who wrote ..." --model DIR')
    settings = config.load(AskSettings, argv, prog="rollout.py ask", description="Watch one episode.",
                           default_config=Path(__file__).parent / "configs" / "world.toml",
                           shared={f.name for f in fields(AskSettings)} - {"seed", "temperature"})
    policy = Policy(load_decoder(settings.model), Tokenizer.load(settings.model))
    retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None)
    question = Question("asked", " ".join(words), (), "asked")
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
