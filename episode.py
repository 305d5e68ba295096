"""Episodes: what agent and environment wrote, token by token, and the protocol of Search-R1.

The agent writes <think>, then <search> query </search> or <answer> text </answer>. A search is
answered by an <information> block of numbered documents (the paper's Table 1). Eq. 6's mask M
follows from who wrote a segment. The answer is read from the agent's own last turn.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import NamedTuple

from data import Passage, Question, build_messages
from infra.checkpoint import write_aside
from infra.files import read_rows
from tokenizer import Tokenizer

STATUSES = ("answered", "max_turns", "max_tokens", "invalid", "search_error")
AUTHORS = ("prompt", "agent", "environment")
# Keys of a row of an episodes file, beside "segments"; others are the question's metadata.
QUESTION_KEYS = ("id", "question", "golden_answers", "source")
OPTIONAL_KEYS = ("metadata", "instruction")  # of a question, too
OUTCOME_KEYS = ("status", "answer", "score", "queries")
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
INFORMATION_END = "</information>\n\n"


@dataclass
class Segment:
    author: str  # one of AUTHORS
    ids: list[int]
    logprobs: list[float] = field(default_factory=list)  # the sampler's, one for each agent token
    opens: str = ""  # the environment's text at its end that the agent's turn begins with


@dataclass
class Episode:
    question: Question
    segments: list[Segment]
    status: str = ""  # one of STATUSES once it has ended
    answer: str | None = None
    queries: list[str] = field(default_factory=list)
    passages: list[list[Passage]] = field(default_factory=list)  # one list for each search
    dropped_queries: int = 0  # queries beyond the protocol's bound

    @property
    def ids(self) -> list[int]:
        return [i for segment in self.segments for i in segment.ids]

    @property
    def response_mask(self) -> list[bool]:
        """Eq. 6: True exactly on the tokens that the policy wrote."""
        return [segment.author == "agent" for segment in self.segments for _ in segment.ids]

    @property
    def num_agent_tokens(self) -> int:
        return sum(self.response_mask)

    @property
    def num_searches(self) -> int:
        return len(self.passages)

    @property
    def score(self) -> float:
        """Eq. 3: whether the agent's answer matches a gold answer."""
        return self.question.match(self.answer, self.question.golden_answers)


def begin_episode(tokenizer: Tokenizer, question: Question, prompt: str, *,
                  shown: Sequence[int] = (), opens: str = "") -> Episode:
    """An episode before its first turn, which begins with the text `opens` ("<answer>", say).
    prompt: see data.build_messages; shown: token ids that the agent reads after it."""
    segments = [prompt_segment(tokenizer, question, prompt)]
    if ids := [*shown, *tokenizer.encode(opens, own=True)]:
        segments.append(Segment("environment", ids, opens=opens))
    return Episode(question, segments)


def prompt_segment(tokenizer: Tokenizer, question: Question, prompt: str) -> Segment:
    return Segment("prompt", tokenizer.chat(build_messages(question, prompt)))


def episode_text(episode: Episode, tokenizer: Tokenizer) -> str:
    """The episode as text; a bar at the left marks what the agent wrote and is trained on."""
    lines = []
    for segment in episode.segments:
        text = tokenizer.decode(segment.ids, skip_special=False).strip("\n")
        bar = "| " if segment.author == "agent" else "  "
        lines += [bar + line for line in text.split("\n")]
    golds = " / ".join(episode.question.golden_answers) or "unknown"
    lines.append(f"  [{episode.status}; answer {episode.answer!r}; gold {golds}]")
    return "\n".join(lines)


class Action(NamedTuple):
    kind: str  # "search" | "answer" | "invalid"
    content: str
    queries: tuple[str, ...] = ()  # of a search


class Protocol(NamedTuple):
    """What the agent may write, and what the environment answers."""
    name: str
    queries: Callable[[str], tuple[str, ...]]  # reads what stands between the search tags
    observation: Callable[[Sequence[Passage]], str]
    observation_end: str  # the last part of an observation, kept when the observation is cut
    notice: str  # the answer to an invalid action
    max_queries: int = 0  # of one search; the others are dropped and counted. 0: any number
    # Called after each token that does not end a turn; returns what the environment puts in there.
    # The turn is read from there on, with Segment.opens: "<think>" if a thought shall go on.
    interrupt: Callable[[Episode, Tokenizer], Segment | None] | None = None


def document_block(passages: Sequence[Passage]) -> str:
    documents = [f'Doc {i}(Title: {p.title}) {p.text}\n' for i, p in enumerate(passages, 1)]
    return f"\n\n<information>{''.join(documents).strip()}{INFORMATION_END}"


SEARCH_R1 = Protocol(
    name="search-r1", queries=lambda content: (content,), observation=document_block,
    observation_end=INFORMATION_END, notice="\nNo action was found in this turn. Put a query "
    "between the search tags, or the final answer between the answer tags.\n")


def outside_thoughts(text: str) -> str:
    """A turn's text without its closed thoughts. An open one, a stray tag, <THINK> are text."""
    return THOUGHT.sub(" ", text)


def parse_action(text: str, protocol: Protocol = SEARCH_R1) -> Action:
    """The first complete action of one agent turn, outside of thoughts; an empty one is invalid."""
    match = ACTION.search(outside_thoughts(text))
    content = match[2].strip() if match else ""
    if content and match[1] == "answer":
        return Action("answer", content)
    queries = protocol.queries(content) if content else ()
    return Action("search", content, queries) if queries else Action("invalid", "")


def unique_passages(results: Sequence[Sequence[Passage]]) -> list[Passage]:
    """The passages of several queries, each once, in the order of the queries and their ranks."""
    passages = [passage for passages in results for passage in passages]
    return list({(passage.title, passage.text): passage for passage in passages}.values())


def observation_ids(tokenizer: Tokenizer, passages: Sequence[Passage], max_tokens: int,
                    protocol: Protocol = SEARCH_R1) -> list[int]:
    """Tokens of the block of passages, at most max_tokens: a longer body is cut at its end."""
    def block(outside: Callable[[str], str]) -> str:  # no tag in a passage is one of ours
        shown = [p._replace(title=outside(p.title), text=outside(p.text)) for p in passages]
        return protocol.observation(shown)

    if len(ids := tokenizer.compose(block)) <= max_tokens:
        return ids
    end = tokenizer.encode(protocol.observation_end, own=True)
    body = tokenizer.compose(lambda outside: block(outside).removesuffix(protocol.observation_end))
    return body[: max(0, max_tokens - len(end))] + end


def save_episodes(path: Path | str, episodes: Sequence[Episode], tokenizer: Tokenizer) -> None:
    """Write one JSON object a line; the file is complete or absent."""
    lines = []
    for episode in episodes:
        question = vars(episode.question)
        row = {key: question[key] for key in QUESTION_KEYS}
        row |= {key: question[key] for key in OPTIONAL_KEYS if question[key]}
        row |= {key: getattr(episode, key) for key in OUTCOME_KEYS}
        row["segments"] = [
            {"author": s.author, "text": tokenizer.decode(s.ids, skip_special=False), "ids": s.ids}
            for s in episode.segments]
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_aside(Path(path), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))


def load_episodes(path: Path | str, tokenizer: Tokenizer, *, prompt: str,
                  prepare: Callable[[Question], Question] = lambda question: question
                  ) -> list[Episode]:
    """Episodes of a file that save_episodes or a person wrote.

    A segment without ids is encoded from its text. A row without a prompt segment gets the prompt
    of its question, which `prepare` may change before; plain text has no question and no prompt.
    """
    episodes = []
    for number, row in read_rows(Path(path), "episode"):
        episode = parse_episode(row, tokenizer, f"{path}:{number}")
        episode.question = prepare(episode.question)
        has_prompt = any(segment.author == "prompt" for segment in episode.segments)
        if episode.question.question and not has_prompt:
            episode.segments.insert(0, prompt_segment(tokenizer, episode.question, prompt))
        episodes.append(episode)
    from infra.checks import keep_learnable  # here, because `import train` should load little
    return keep_learnable(path, episodes)


def parse_episode(row: dict, tokenizer: Tokenizer, where: str) -> Episode:
    """The episode of a row; where: its file and line, for errors."""
    try:
        golds = tuple(gold for gold in row["golden_answers"] if isinstance(gold, str))
        keys = {*QUESTION_KEYS, *OPTIONAL_KEYS, *OUTCOME_KEYS, "segments"}
        metadata = {key: value for key, value in row.items() if key not in keys}
        question = Question(str(row["id"]), row["question"], golds, row.get("source", ""),
                            metadata=metadata | row.get("metadata", {}),
                            instruction=row.get("instruction", ""))
        texts = (question.question, question.instruction, row.get("answer"))
        if not all(isinstance(text, str | None) for text in texts) or None in texts[:2]:
            raise TypeError(f"question, instruction and answer {texts}")
        segments = []
        for part in row["segments"]:
            ids = part["ids"] if "ids" in part else tokenizer.segment(part, is_first=not segments)
            segments.append(Segment(part["author"], [index(i) for i in ids]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: got {type(error).__name__}: {error}; expected id, question, "
                         "golden_answers and segments [{author, text or ids}]") from error
    if unknown := [segment.author for segment in segments if segment.author not in AUTHORS]:
        raise ValueError(f"{where}: got author {unknown}, expected prompt, agent or environment")
    if not all(0 <= i < tokenizer.size for segment in segments for i in segment.ids):
        raise ValueError(f"{where}: got ids beyond the tokenizer's {tokenizer.size} entries, those "
                         "of another tokenizer; drop the ids to encode the text again")
    return Episode(question, segments, row.get("status", ""), row.get("answer"))
