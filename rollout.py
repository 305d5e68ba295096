"""Episodes: the agent thinks, searches, reads and answers; sampled in batches, recorded token by token.

Protocol (Search-R1, as in the paper's Table 1): the agent writes <think>, then <search> query </search> or
<answer> text </answer>. A search is answered by an <information> block; at most max_turns turns, then one last
generation whose search is not executed. Eq. 6's mask M follows from who wrote a segment.

Departures from the official code (Search-R1's generation loop, vendored by omron-sinicx/dgpo), with reasons
 1. Sampled ids are kept as sampled; the official loop decodes, cuts and re-tokenises, which drifts.
 2. Generation stops where the decoded turn completes </search> or </answer>; the official loop runs on to the
    end of turn or 500 tokens and cuts afterwards. The token that completes a tag is kept whole.
 3. A too long observation is cut inside the block, so that </information> survives.
 4. An episode that fills the context ends with status max_tokens; the official loop drops the oldest tokens,
    the question among them.
 5. The notice after an invalid action has no tags in it, so no parser can take it for an action.
 6. The answer is read from the agent's own last turn; the official scorer also reads the prompt, whose example
    then counts as an answer.

Run: python rollout.py ask "who wrote ..." --model runs/dgpo
     python rollout.py demonstrate --gold FILE --out FILE

Legend: B rows (episodes in flight), T tokens, D width.
"""

import argparse
import json
import os
import re
import sys
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import setting
from data import Question, build_messages, exact_match
from kernels import sample
from model import Decoder, KVCache, Tokenizer, load_decoder
from retriever import Passage, Retriever

STATUSES = ("answered", "max_turns", "max_tokens", "invalid", "search_error")
SEARCH_TRIES = 3
NOTICE = (
    "\nNo action was found in this turn. Put a query between the search tags, "
    "or the final answer between the answer tags.\n"
)
INFORMATION_END = "</information>\n\n"
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


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


@dataclass
class Segment:
    author: str  # "prompt" | "agent" | "environment"
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)  # the sampler's, one for each id of an agent segment


@dataclass
class Episode:
    question: Question
    segments: list[Segment]
    status: str = ""  # one of STATUSES when it has ended
    answer: str | None = None
    queries: list[str] = field(default_factory=list)
    passages: list[list[Passage]] = field(default_factory=list)  # one list for each executed search

    @property
    def ids(self) -> list[int]:
        return [i for segment in self.segments for i in segment.ids]

    @property
    def response_mask(self) -> list[bool]:
        """Eq. 6: True exactly on tokens the policy wrote."""
        return [segment.author == "agent" for segment in self.segments for _ in segment.ids]

    @property
    def num_agent_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.author == "agent")

    @property
    def num_searches(self) -> int:
        return len(self.passages)

    @property
    def score(self) -> float:
        """Eq. 3: exact match of the agent's answer."""
        return exact_match(self.answer, self.question.golden_answers)


# ---- protocol: text in, text out ----


class Action(NamedTuple):
    kind: str  # "search" | "answer" | "invalid"
    content: str


def parse_action(text: str) -> Action:
    """The first complete action of one agent turn; an empty one is invalid."""
    match = ACTION.search(text)
    if match is None or not match[2].strip():
        return Action("invalid", "")
    return Action(match[1], match[2].strip())


def observation_text(passages: Sequence[Passage]) -> str:
    documents = "".join(f'Doc {i}(Title: "{p.title}") {p.text}\n' for i, p in enumerate(passages, 1))
    return f"\n\n<information>{documents.strip()}{INFORMATION_END}"


def observation_ids(tokenizer: Tokenizer, passages: Sequence[Passage], max_tokens: int) -> list[int]:
    """Tokens of the <information> block; what is over max_tokens is cut before the closing tag."""
    text = observation_text(passages)
    ids = tokenizer.encode(text)
    if len(ids) <= max_tokens:
        return ids
    end = tokenizer.encode(INFORMATION_END)
    body = tokenizer.encode(text.removesuffix(INFORMATION_END))
    return body[: max(0, max_tokens - len(end))] + end


def prompt_segment(tokenizer: Tokenizer, question: Question, prompt: str) -> Segment:
    return Segment("prompt", tokenizer.chat(build_messages(question, prompt)))


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


# ---- tensors ----


class Batch(NamedTuple):
    ids: Tensor  # [B, T], right padded
    response_mask: Tensor  # [B, T] bool

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.response_mask.to(device))


def collate(episodes: Sequence[Episode], *, pad_id: int, end_of_turn: int | None = None) -> Batch:
    """Episodes as right-padded tensors. The mask comes from the segments, never from ids != pad.

    end_of_turn: append this token after an agent's last segment and train on it (distillation: a student that
    never learns to stop generates to the limit wherever no tag stops it).
    """
    rows = [(episode.ids, episode.response_mask) for episode in episodes]
    if end_of_turn is not None:
        rows = [
            (ids + [end_of_turn], mask + [True]) if mask and mask[-1] and ids[-1] != end_of_turn else (ids, mask)
            for ids, mask in rows
        ]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows])
    return Batch(ids, mask)


# ---- files ----


def save_episodes(path: Path | str, episodes: Sequence[Episode], tokenizer: Tokenizer) -> None:
    """JSON lines, written aside and renamed: the file is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for e in episodes:
            row = {"id": e.question.id, "question": e.question.question}
            row |= {"golden_answers": list(e.question.golden_answers), "source": e.question.source}
            row |= {"status": e.status, "answer": e.answer, "score": e.score, "queries": e.queries}
            row["segments"] = [
                {"author": s.author, "text": tokenizer.decode(s.ids, skip_special=False), "ids": s.ids}
                for s in e.segments
            ]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def load_episodes(path: Path | str, tokenizer: Tokenizer, *, prompt: str) -> list[Episode]:
    """Episodes of a file that save_episodes or a person wrote.

    A segment without ids is encoded from its text; a row without a prompt segment gets one built from its
    question, or none when the question is empty (plain text, for pretraining).
    """
    episodes = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                question = Question(
                    str(row["id"]), row["question"], tuple(row["golden_answers"]), row.get("source", "")
                )
                segments = [
                    Segment(s["author"], s["ids"] if "ids" in s else tokenizer.encode(s["text"]))
                    for s in row["segments"]
                ]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number}: got {type(error).__name__}: {error}; expected an episode with id, "
                    "question, golden_answers and segments [{author, text or ids}]"
                ) from error
            if (unknown := {s.author for s in segments} - {"prompt", "agent", "environment"}):
                raise ValueError(f"{path}:{number}: got author {unknown}, expected prompt, agent or environment")
            if max((i for s in segments for i in s.ids), default=0) >= tokenizer.size:
                raise ValueError(
                    f"{path}:{number}: got a token id beyond the tokenizer's {tokenizer.size} entries; the file "
                    "was written with another tokenizer: drop its ids to encode the text again"
                )
            if question.question and not any(s.author == "prompt" for s in segments):
                segments.insert(0, prompt_segment(tokenizer, question, prompt))
            episodes.append(Episode(question, segments, row.get("status", ""), row.get("answer")))
    if not episodes:
        raise ValueError(f"{path}: got no episodes, expected at least one line")
    return episodes


def episode_text(episode: Episode, tokenizer: Tokenizer) -> str:
    """The episode as text; what the agent wrote, and is trained on, is marked with a bar at the left."""
    parts = []
    for segment in episode.segments:
        text = tokenizer.decode(segment.ids, skip_special=False).strip("\n")
        bar = "| " if segment.author == "agent" else "  "
        parts += [bar + line for line in text.split("\n")]
    golds = " / ".join(episode.question.golden_answers) or "unknown"
    return "\n".join(parts) + f"\n  [{episode.status}; answer {episode.answer!r}; gold {golds}]"


def demonstration(row: dict, num_passages: int) -> dict:
    """A hand-written episode from a question with its gold paragraphs (context: title, text, is_supporting).

    The first query is the question, the next ones are titles of supporting paragraphs; every <information> block
    holds one supporting paragraph among distractors, at a place that depends on the question's id.
    """
    gold = [p for p in row["context"] if p["is_supporting"]]
    others = [p for p in row["context"] if not p["is_supporting"]]
    start = zlib.crc32(str(row["id"]).encode())
    segments = []
    for k, paragraph in enumerate(gold):
        rest = others[k * (num_passages - 1) : (k + 1) * (num_passages - 1)]
        place = (start + k) % (len(rest) + 1)
        shown = [Passage("", p["title"], p["text"], 0.0) for p in (*rest[:place], paragraph, *rest[place:])]
        thought, query = ("I need to look this up.", row["question"]) if k == 0 else (
            f"I still need to know about {paragraph['title']}.", paragraph["title"])
        text = f"<think> {thought} </think>\n<search> {query} </search>"
        segments += [{"author": "agent", "text": text}, {"author": "environment", "text": observation_text(shown)}]
    answer = row["golden_answers"][0]
    thought = f"{' and '.join(p['title'] for p in gold)} tell me that the answer is {answer}."
    segments.append({"author": "agent", "text": f"<think> {thought} </think>\n<answer> {answer} </answer>"})
    return {key: row[key] for key in ("id", "question", "golden_answers")} | {"segments": segments}


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


def demonstrate(argv: list[str]) -> None:
    """Write episodes from questions with gold paragraphs, for phase sft."""
    parser = argparse.ArgumentParser(prog="rollout.py demonstrate", description=demonstrate.__doc__)
    parser.add_argument("--gold", nargs="+", required=True, metavar="FILE", help="questions with context, JSONL")
    parser.add_argument("--out", required=True, metavar="FILE", help="episodes, JSONL")
    parser.add_argument("--split", default="train", help="keep rows of this split (default train)")
    parser.add_argument("--passages", type=int, default=3, help="paragraphs in a block (default 3)")
    options = parser.parse_args(argv)
    rows = []
    for path in options.gold:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row.get("split", options.split) == options.split and any(p["is_supporting"] for p in row["context"]):
                    rows.append(demonstration(row, options.passages))
            except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
                sys.exit(f"{path}:{number}: got {type(error).__name__}: {error}; expected id, question, golden_answers "
                         "and context [{title, text, is_supporting}]")
    Path(options.out).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows)} episodes")


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "demonstrate":
        return demonstrate(rest)
    if command != "ask":
        is_help = command in ("", "-h", "--help")
        sys.exit(__doc__ if is_help else f"rollout.py: got {command!r}, expected ask or demonstrate")
    words = []
    while rest and not rest[0].startswith("--"):
        words.append(rest.pop(0))
    ask(words, rest)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rollout.py: {error}")
