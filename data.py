"""Questions and passages: files, prompts, answer normalisation and scores.

Departures from the official code: question ids begin with their data set ("nq_train_0"), because NQ
and HotpotQA both count from 0; no last batch is dropped; hits are whole words of normalised text;
SQuAD's rule makes nothing of "A" and "?": they are kept, or each would equal the other.
Files: formats/questions.py. "dataset" or "data_source" names the set, else the file does.
`python data.py prepare` (world/prepare.py) makes training and test files from published ones.
"""

import importlib
import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


def normalize_answer(text: str, rule: str = "squad") -> str:
    """SQuAD's order: lower case, no ASCII punctuation, no articles, single blanks. The other rules,
    unicode and numbers, rewrite the text before (formats/answers.py)."""
    if rule != "squad":
        from formats.answers import REWRITES  # here, because the paper's rule needs none
        text = REWRITES[rule](text)
    text = text.lower()
    bare = "".join(c for c in text if c not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", bare).split()
    return " ".join(words or bare.split() or text.split())  # "A" and "?" stay what they are


def exact_match(prediction: str | None, golds: Sequence[str], rule: str = "squad") -> float:
    """Eq. 3: 1 if the prediction equals any gold answer, both normalised. None scores 0."""
    answer = None if prediction is None else normalize_answer(prediction, rule)
    return float(any(answer == normalize_answer(gold, rule) for gold in golds))


def f1(prediction: str | None, golds: Sequence[str], rule: str = "squad") -> float:
    """SQuAD's F1 of the normalised words, the best over the gold answers (not in paper)."""
    if prediction is None:
        return 0.0
    words, best = normalize_answer(prediction, rule).split(), 0.0
    for gold in golds:
        gold_words = normalize_answer(gold, rule).split()
        num_shared = (Counter(words) & Counter(gold_words)).total()
        num_words = len(words) + len(gold_words)
        best = max(best, 2 * num_shared / num_words if num_words else 1.0)
    return best


class Passage(NamedTuple):
    id: str
    title: str  # as the corpus has it: Search-R1's has quotes around it
    text: str
    score: float  # the retriever's

    @property
    def name(self) -> str:
        """The title without quotes around it."""
        is_quoted = len(self.title) > 1 and self.title[0] == self.title[-1] == '"'
        return self.title[1:-1] if is_quoted else self.title


def hit(passages: Iterable[Passage], golds: Sequence[str], rule: str = "squad", *,
        whole_words: bool = True) -> bool:
    """Whether the title or text of a passage contains a gold answer, both normalised."""
    from formats.answers import contains  # here, because training counts no hits
    texts = (f"{passage.title} {passage.text}" for passage in passages)
    normalize = partial(normalize_answer, rule=rule)
    return contains(texts, golds, normalize, whole_words=whole_words)


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
    answer_rule: str = "squad"  # of normalize_answer


def load_questions(path: Path | str, *, limit: int | None = None,
                   answer_rule: str = "squad") -> list[Question]:
    """The (first `limit`) questions of a file, in its order, with unique ids."""
    from formats.questions import read_question_rows  # here, because only files need it
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none for all rows")
    questions: dict[str, Question] = {}
    source = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    for where, row in itertools.islice(read_question_rows(path), limit):
        question = parse_question(row, source, str(len(questions)), where, answer_rule)
        name, copy = question.id, 1
        while name in questions:
            copy += 1
            name = f"{question.id}_{copy}"
        questions[name] = replace(question, id=name)
    return list(questions.values())


def parse_question(row: dict[str, Any], source: str, id: str, where: str,
                   answer_rule: str = "squad") -> Question:
    """The question of a row in any format; `source` and `id` are used if it has none."""
    from formats.questions import as_flashrag
    keys = ", ".join(row)

    def check(ok: bool, key: str, value: Any, expected: str) -> None:
        if not ok:
            raise ValueError(f"{where}: got {str(value)[:60]!r} for {key}, expected {expected}; "
                             f"the row's keys: {keys[:200]}")

    row = as_flashrag(row, where)
    source = row.get("dataset") or row.get("data_source") or source
    check(isinstance(source, str), "dataset", source, "a name")
    text, answers = row.get("question"), row.get("golden_answers")
    check(isinstance(text, str) and bool(text.strip()), "question", text, "a text")
    ok = isinstance(answers, list) and all(isinstance(a, str) and a.strip() for a in answers)
    check(ok and bool(answers), "golden_answers", answers,
          'a list of one or more strings, none of them blank ("42", not 42)')
    metadata = row.get("metadata") or {}
    check(isinstance(metadata, dict), "metadata", metadata, "an object")
    metadata = metadata | {key: value for key, value in row.items() if key not in ROW_KEYS}
    id = id if row.get("id") is None else str(row["id"])
    id = id if id.startswith(f"{source}_") else f"{source}_{id}"
    match = exact_match if answer_rule == "squad" else partial(exact_match, rule=answer_rule)
    return Question(id, text, tuple(answers), source, row.get("prompt") or None, metadata,
                    row.get("context") or None, match=match, answer_rule=answer_rule)


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
        text = question.question.strip()
        text += "" if text.endswith("?") else "?"
        # Not str.format, because braces in a template are text.
        messages = [{"role": "user", "content": template.replace("{question}", text)}]
    if question.instruction:
        messages[-1]["content"] += " " + question.instruction
    return messages


if __name__ == "__main__":
    importlib.import_module("world.prepare").main()
