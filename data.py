"""Questions and passages: files, prompts, answer normalisation and scores.

Departures from the official code: question ids begin with their data set ("nq_train_0"), because NQ
and HotpotQA both count from 0; no last batch is dropped; hits are counted on normalised text.
Files are JSON lines: FlashRAG rows {"id", "question", "golden_answers", "metadata"}, or Search-R1
rows, where "prompt", "data_source" and "reward_model" hold the same. "dataset" or "data_source"
names the set, else the file does. Bytes that are not UTF-8 become U+FFFD.
`python data.py prepare` (world/prepare.py) makes training and test files from published ones.
"""

import importlib
import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from infra.files import read_rows

# Published numbers of rows (paper Table 9).
TEST_SETS = {"nq": 3_610, "triviaqa": 11_313, "popqa": 14_267, "hotpotqa": 7_405,
             "2wikimultihopqa": 12_576, "musique": 2_417, "bamboogle": 125}  # fmt: skip
ROW_KEYS = ("id", "question", "golden_answers", "dataset", "data_source", "prompt", "reward_model",
            "context", "metadata")  # fmt: skip
# Paper Table 7, without the blanks and the full stop that typesetting put around the tags.
PAPER_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every "
    "time you get new information. After reasoning, if you find you lack some knowledge, you can "
    "call a search engine by <search> query </search>, and it will return the top searched results "
    "between <information> and </information>. You can search as many times as you want. If you "
    "find no further external knowledge needed, you can directly provide the answer inside "
    "<answer> and </answer> without detailed illustrations. For example, <answer> xxx </answer>. "
    "Question: {question}"
)
PROMPTS = {"paper": PAPER_PROMPT, "short": "{question}"}  # short: the embedded world's


def normalize_answer(text: str) -> str:
    """SQuAD's order: lower case, no ASCII punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """Eq. 3: 1 if the prediction equals any gold answer, both normalised. None scores 0."""
    answer = None if prediction is None else normalize_answer(prediction)
    return float(any(answer == normalize_answer(gold) for gold in golds))


def f1(prediction: str | None, golds: Sequence[str]) -> float:
    """SQuAD's F1 of the normalised words, the best over the gold answers (not in paper)."""
    if prediction is None:
        return 0.0
    words, best = normalize_answer(prediction).split(), 0.0
    for gold in golds:
        gold_words = normalize_answer(gold).split()
        num_shared = (Counter(words) & Counter(gold_words)).total()
        num_words = len(words) + len(gold_words)
        best = max(best, 2 * num_shared / num_words if num_words else 1.0)
    return best


class Passage(NamedTuple):
    id: str
    title: str
    text: str
    score: float  # the retriever's


def hit(passages: Iterable[Passage], golds: Sequence[str]) -> bool:
    """Whether the title or text of a passage contains a gold answer, both normalised."""
    # A gold answer that normalises to nothing ("The") would be in every text: it is never a hit.
    wanted = [gold for gold in map(normalize_answer, golds) if gold]
    texts = [normalize_answer(f"{passage.title} {passage.text}") for passage in passages]
    return any(gold in text for gold in wanted for text in texts)


@dataclass(frozen=True)
class Question:
    id: str  # unique over the data sets
    question: str
    golden_answers: tuple[str, ...]
    source: str  # the data set's name
    prompt: list[dict[str, str]] | None = None  # chat messages that came with the row
    metadata: dict[str, Any] = field(default_factory=dict)  # with the row's other keys
    context: list[dict[str, Any]] | None = None  # paragraphs: title, text, is_supporting
    instruction: str = ""  # what the agent is told after the question
    match: Callable[[str | None, Sequence[str]], float] = exact_match  # answer and golds -> score


def load_questions(path: Path | str, *, limit: int | None = None) -> list[Question]:
    """The (first `limit`) questions of a JSON-lines file, in its order, with unique ids."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none for all rows")
    questions: dict[str, Question] = {}
    for number, row in itertools.islice(read_rows(path), limit):
        question = parse_question(row, path.stem, str(len(questions)), f"{path}:{number}")
        name, copy = question.id, 1
        while name in questions:
            copy += 1
            name = f"{question.id}_{copy}"
        questions[name] = replace(question, id=name)
    return list(questions.values())


def parse_question(row: dict[str, Any], source: str, id: str, where: str) -> Question:
    """The question of a row in either format; `source` and `id` are used if it has none."""
    def check(ok: bool, key: str, value: Any, expected: str) -> None:
        if not ok:
            raise ValueError(f"{where}: got {str(value)[:60]!r} for {key}, expected {expected}")

    for key, inner in (("prompt", ("role", "content")), ("context", ("title", "text"))):
        value = row.get(key) or []
        ok = isinstance(value, list) and all(
            isinstance(v, dict) and all(isinstance(v.get(k), str) for k in inner) for v in value)
        check(ok, key, value, f"a list of objects with the strings {' and '.join(inner)}")
    prompt, context = row.get("prompt") or None, row.get("context") or None
    source = row.get("dataset") or row.get("data_source") or source
    check(isinstance(source, str), "dataset", source, "a name")
    text, answers = row.get("question"), row.get("golden_answers")
    if text is None and prompt:  # some Search-R1 rows hold the question in the prompt alone
        text = prompt[-1]["content"].rpartition("Question:")[2].strip()
    check(isinstance(text, str) and bool(text.strip()), "question", text, "a text")
    if answers is None and isinstance(reward := row.get("reward_model"), dict):
        truth = reward.get("ground_truth")
        answers = truth.get("target") if isinstance(truth, dict) else None
    ok = isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)
    check(bool(ok), "golden_answers", answers, "a list of one or more strings")
    metadata = row.get("metadata") or {}
    check(isinstance(metadata, dict), "metadata", metadata, "an object")
    metadata = metadata | {key: value for key, value in row.items() if key not in ROW_KEYS}
    id = id if row.get("id") is None else str(row["id"])
    id = id if id.startswith(f"{source}_") else f"{source}_{id}"
    return Question(id, text, tuple(answers), source, prompt, metadata, context)


def build_messages(question: Question, prompt: str) -> list[dict[str, str]]:
    """The chat that opens an episode; prompt: "paper", "short", "row" (the row's own) or a file."""
    if prompt == "row":
        if question.prompt is None:
            raise ValueError(f"{question.id}: got a row without prompt; use paper, short or a file")
        messages = [dict(message) for message in question.prompt]
    else:
        if prompt not in PROMPTS and not Path(prompt).is_file():
            raise FileNotFoundError(f"prompt: got {prompt!r}, expected paper, short, row or a file")
        template = PROMPTS.get(prompt) or Path(prompt).read_text(encoding="utf-8")
        if "{question}" not in template:
            raise ValueError(f"{prompt}: got no {{question}}, expected it in the question's place")
        # Without blanks and with a question mark, as in the official data.
        text = question.question.strip().removesuffix("?") + "?"
        # Not str.format, because braces in a template are text.
        messages = [{"role": "user", "content": template.replace("{question}", text)}]
    if question.instruction:
        messages[-1]["content"] += " " + question.instruction
    return messages


if __name__ == "__main__":
    importlib.import_module("world.prepare").main()
