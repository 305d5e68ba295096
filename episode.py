"""Episodes: what the agent and the environment wrote, token by token; as text, tensors and files.

What they write follows a protocol (protocol.py). Eq. 6's mask M follows from who wrote a segment. The answer is read
from the agent's own last turn; the official scorer also reads the prompt, whose example then counts as an answer.

Run: python episode.py demonstrate --gold FILE --out FILE

Legend: B episodes, T tokens.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import ANSWER_KINDS, BUDGET_TEXT, Question, build_messages, is_correct, parse_object
from model import Decoder, Tokenizer, shift
from protocol import SEARCH_R1
from retriever import Passage

STATUSES = ("answered", "max_turns", "max_tokens", "invalid", "search_error")


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
    dropped_queries: int = 0  # beyond the protocol's bound

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
        """Eq. 3: exact match of the agent's answer (or what the question's kind of answer asks for)."""
        return is_correct(self.answer, self.question)


# ---- prompts and thinking ----


def prompt_segment(tokenizer: Tokenizer, question: Question, prompt: str, budget_text: str = BUDGET_TEXT) -> Segment:
    return Segment("prompt", tokenizer.chat(build_messages(question, prompt, budget_text)))


def thinking(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, bool]:
    """(tokens strictly inside <think> and </think>, whether the last block is still open) of one agent turn.

    A token that holds a part of a tag counts for the tag.
    """
    closers, count, begin, is_open = tokenizer.containing(">"), 0, 0, False
    for i, token in enumerate(ids):
        if token not in closers:  # only ">" completes a tag
            continue
        text = tokenizer.decode(ids[begin : i + 1])
        if not is_open and "<think>" in text:
            is_open, begin = True, i + 1
        elif is_open and "</think>" in text:
            tag = next(j for j in range(i, begin - 1, -1) if "</think>" in tokenizer.decode(ids[j : i + 1]))
            count, is_open, begin = count + tag - begin, False, i + 1
    return count + (len(ids) - begin if is_open else 0), is_open


def num_thinking_tokens(episode: Episode, tokenizer: Tokenizer) -> int:
    """What a budget counts (bard.py): the agent's tokens inside its thinking, over all turns."""
    return sum(thinking(s.ids, tokenizer)[0] for s in episode.segments if s.author == "agent")


# ---- tensors ----


class Batch(NamedTuple):
    """Right-padded: for what there is one number of for each token."""

    ids: Tensor  # [B, T]
    response_mask: Tensor  # [B, T] bool

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.response_mask.to(device))

    def lengths(self) -> list[int]:
        """Tokens of each row up to its last response token: what comes after it cannot matter."""
        positions = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.response_mask * positions).amax(1).clamp(min=1).tolist()


class Packed(NamedTuple):
    """Rows one after another, without padding: what a network reads."""

    ids: Tensor  # [1, sum of documents]
    response_mask: Tensor  # [1, sum of documents] bool; its True entries are in the order of batch.response_mask[rows]
    documents: list[int]  # tokens of each row


def pack(batch: Batch, rows: Sequence[int], lengths: Sequence[int]) -> Packed:
    """These rows of a batch; lengths: batch.lengths(). Of no rows: one token that nothing is learnt from."""
    if not rows:
        return Packed(batch.ids.new_zeros(1, 1), batch.response_mask.new_zeros(1, 1), [1])
    documents = [lengths[i] for i in rows]
    ids, mask = (
        torch.cat([tensor[i, :n] for i, n in zip(rows, documents, strict=True)])[None]
        for tensor in (batch.ids, batch.response_mask)
    )
    return Packed(ids, mask, documents)


def collate(episodes: Sequence[Episode], *, pad_id: int, end_of_turn: int | None = None) -> Batch:
    """Episodes as right-padded tensors. The mask comes from the segments, never from ids != pad; it is empty where a
    search failed: nothing is to be learnt from the retriever's faults.

    end_of_turn: append this token after an agent's last segment and train on it (distillation: a student that
    never learns to stop generates to the limit wherever no tag stops it).
    """
    rows = [(e.ids, [here and e.status != "search_error" for here in e.response_mask]) for e in episodes]
    if end_of_turn is not None:
        rows = [
            (ids + [end_of_turn], mask + [True]) if mask and mask[-1] and ids[-1] != end_of_turn else (ids, mask)
            for ids, mask in rows
        ]
    width = max((len(ids) for ids, _ in rows), default=1)
    ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in rows], dtype=torch.long)
    mask = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows], dtype=torch.bool)
    return Batch(ids.view(-1, width), mask.view(-1, width))


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in order, grouped so that the lengths of a group sum to at most max_tokens (at least one row)."""
    group, total = [], 0
    for i, length in enumerate(lengths):
        if group and total + length > max_tokens:
            yield group
            group, total = [], 0
        group.append(i)
        total += length
    if group:
        yield group


def response_rows(decoder: Decoder, packed: Packed) -> Tensor:
    """Hidden states that predict the response tokens: [N, D], in the order of packed.ids[response_mask]."""
    hidden = decoder.hidden(packed.ids, documents=packed.documents)
    return shift(hidden, packed.documents)[packed.response_mask]


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
            row |= {"answer_kind": e.question.answer_kind} if e.question.answer_kind != "text" else {}
            row |= {"budget": e.question.budget} if e.question.budget is not None else {}
            row |= {"status": e.status, "answer": e.answer, "score": e.score, "queries": e.queries}
            row["segments"] = [
                {"author": s.author, "text": tokenizer.decode(s.ids, skip_special=False), "ids": s.ids}
                for s in e.segments
            ]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def load_episodes(
    path: Path | str, tokenizer: Tokenizer, *, prompt: str, budget_text: str = BUDGET_TEXT
) -> list[Episode]:
    """Episodes of a file that save_episodes or a person wrote.

    A segment without ids is encoded from its text; a row without a prompt segment gets one built from its
    question, or none when the question is empty (plain text, for pretraining).
    """
    episodes = []
    with Path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            row = parse_object(line, f"{path}:{number}")
            try:
                golds = tuple(gold for gold in row["golden_answers"] if isinstance(gold, str))
                question = Question(str(row["id"]), row["question"], golds, row.get("source", ""),
                                    answer_kind=row.get("answer_kind", "text"), budget=row.get("budget"))
                segments = [
                    Segment(s["author"], [index(i) for i in s["ids"]] if "ids" in s else tokenizer.encode(s["text"]))
                    for s in row["segments"]
                ]
                if not isinstance(question.question, str) or not isinstance(row.get("answer"), str | None):
                    raise TypeError(f"question {question.question!r}, answer {row.get('answer')!r}")
                if question.answer_kind not in ANSWER_KINDS or not isinstance(question.budget, int | None):
                    raise TypeError(f"answer_kind {question.answer_kind!r}, budget {question.budget!r}")
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number}: got {type(error).__name__}: {error}; expected an episode with id, "
                    "question, golden_answers and segments [{author, text or ids}]"
                ) from error
            unknown = [s.author for s in segments if s.author not in ("prompt", "agent", "environment")]
            if unknown:
                raise ValueError(f"{path}:{number}: got author {unknown}, expected prompt, agent or environment")
            if not all(0 <= i < tokenizer.size for s in segments for i in s.ids):
                raise ValueError(
                    f"{path}:{number}: got a token id beyond the tokenizer's {tokenizer.size} entries; the file "
                    "was written with another tokenizer: drop its ids to encode the text again"
                )
            if question.question and not any(s.author == "prompt" for s in segments):
                segments.insert(0, prompt_segment(tokenizer, question, prompt, budget_text))
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
        segments += [{"author": "agent", "text": text}, {"author": "environment", "text": SEARCH_R1.observation(shown)}]
    answer = row["golden_answers"][0]
    thought = f"{' and '.join(p['title'] for p in gold)} tell me that the answer is {answer}."
    segments.append({"author": "agent", "text": f"<think> {thought} </think>\n<answer> {answer} </answer>"})
    return {key: row[key] for key in ("id", "question", "golden_answers")} | {"segments": segments}


# ---- the program ----


def main(argv: list[str]) -> None:
    main_parser = argparse.ArgumentParser("episode.py", description=__doc__.split("\n")[0])
    commands = main_parser.add_subparsers(dest="command", required=True)
    parser = commands.add_parser("demonstrate", help="write episodes from questions with gold paragraphs, for sft")
    parser.add_argument("--gold", nargs="+", required=True, metavar="FILE", help="questions with context, JSONL")
    parser.add_argument("--out", required=True, metavar="FILE", help="episodes, JSONL")
    parser.add_argument("--split", default="train", help="keep rows of this split (default train)")
    parser.add_argument("--passages", type=int, default=3, help="paragraphs in a block (default 3)")
    options = main_parser.parse_args(argv)
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


if __name__ == "__main__":
    main(sys.argv[1:])
