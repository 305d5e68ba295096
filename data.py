"""Questions: files, prompts, answer normalisation and scores.

Eq. 3 (reward 1 when the answer equals a gold answer) -> exact_match; the paper's hit ratio -> hit. A row's
"answer_kind" asks for another comparison: "integer" (AIME) or "choice" (GPQA: the letter of an option).

Departures from the official code:
1. Question ids carry their data set ("nq_train_0"): NQ and HotpotQA both count from 0, and bare ids
   would put two questions into one GRPO group and pair the wrong rows in a bootstrap.
2. Every row is kept; the official loader drops the last batch, and with it a Bamboogle question.
3. hit compares normalised text; the official count is case-sensitive.

Files are JSON lines: FlashRAG rows {"id", "question", "golden_answers", "metadata"}, or Search-R1
rows, where "prompt", "data_source" and "reward_model" hold the same. "dataset" or "data_source"
names the set, else the file does. Parquet is not read. What is no UTF-8 is replaced by U+FFFD.

    python data.py prepare --flashrag DIR --out DIR   # DIR/nq/test.jsonl ... -> OUT/nq.jsonl ...
"""

import argparse
import functools
import json
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

# Rows of the published sets (paper Table 9): `prepare` prints them beside what it found.
TRAIN_SETS = {"nq": 79_168, "hotpotqa": 90_447}
TEST_SETS = {
    "nq": 3_610, "triviaqa": 11_313, "popqa": 14_267,
    "hotpotqa": 7_405, "2wikimultihopqa": 12_576, "musique": 2_417, "bamboogle": 125,
}  # fmt: skip
TEST_SPLITS = ("test", "dev", "train")  # the first of these that a set has

# Paper Table 7, less the blanks and the full stop that type-setting put around tags and placeholder.
# Published checkpoints know other words: those in their data rows (prompt "row", or a file).
PAPER_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every "
    "time you get new information. After reasoning, if you find you lack some knowledge, you can call "
    "a search engine by <search> query </search>, and it will return the top searched results between "
    "<information> and </information>. You can search as many times as you want. If you find no "
    "further external knowledge needed, you can directly provide the answer inside <answer> and "
    "</answer> without detailed illustrations. For example, <answer> xxx </answer>. "
    "Question: {question}"
)
# QAgent's loop in our own words; the published text (its paper's Table 5) belongs in a file, for its checkpoints.
QAGENT_PROMPT = (
    "Find what is needed to answer the question below. Work in turns. To search, first write what you still have to "
    "find out and how inside <plan> and </plan>, then up to three queries, each inside <query> and </query>, all of "
    "them inside <search> and </search>. What is found comes back between <information> and </information>; say "
    "inside <reflection> and </reflection> what it tells you and what is missing, then plan and search again, or give "
    "the answer, a few words, inside <answer> and </answer>. Question: {question}"
)
SHORT_PROMPT = "{question}"  # the embedded world: its models know the protocol, and no English
PROMPTS = {"paper": PAPER_PROMPT, "qagent": QAGENT_PROMPT, "short": SHORT_PROMPT}
BUDGET_TEXT = "Think for at most {budget} tokens."  # a reconstruction: BARD's own words are not known


@dataclass(frozen=True)
class Question:
    id: str  # unique over the data sets
    question: str
    golden_answers: tuple[str, ...]
    source: str  # the data set's name
    prompt: list[dict[str, str]] | None = None  # chat messages that came with the row
    metadata: dict[str, Any] = field(default_factory=dict)
    context: list[dict[str, Any]] | None = None  # paragraphs: title, text, is_supporting
    answer_kind: str = "text"  # of ANSWER_KINDS
    budget: int | None = None  # tokens to think, told to the agent (bard.py)


def load_questions(path: Path | str, *, limit: int | None = None) -> list[Question]:
    """The (first `limit`) questions of a JSON-lines file, in its order, all ids different."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none for all rows")
    questions: dict[str, Question] = {}
    for number, row in read_rows(path):
        question = parse_question(row, path.stem, str(len(questions)), f"{path}:{number}")
        name, copy = question.id, 1
        while name in questions:
            copy += 1
            name = f"{question.id}_{copy}"
        questions[name] = replace(question, id=name)
        if len(questions) == limit:
            break
    return list(questions.values())


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a file with one JSON object a line; blank lines are passed over."""
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: got a parquet file, expected JSON lines; convert it where pandas is installed: "
            "pandas.read_parquet(FILE).to_json(OUT, orient='records', lines=True)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, expected questions (JSON lines)")
    is_empty = True
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            is_empty = False
            yield number, parse_object(line, f"{path}:{number}")
    if is_empty:
        raise ValueError(f"{path}: got no rows, expected at least one question")


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line; a mistake is reported as being at `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got no valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {line[:60]!r}, expected a JSON object")
    if "\\ud" in line.lower():  # an escape that may write a lone surrogate
        row = json.loads(replace_surrogates(json.dumps(row, ensure_ascii=False)))
    return row


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which no tokenizer and no UTF-8 file takes, become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def parse_question(row: dict[str, Any], source: str, id: str, where: str) -> Question:
    """A row in either format; `source` and `id` stand in for those it does not have."""

    def check(ok: bool, key: str, value: Any, expected: str) -> None:
        if not ok:
            raise ValueError(f"{where}: got {str(value)[:60]!r} for {key}, expected {expected}")

    def objects(key: str, inner: tuple[str, ...]) -> list[dict[str, Any]] | None:
        value = row.get(key)
        ok = value is None or isinstance(value, list) and all(
            isinstance(v, dict) and all(isinstance(v.get(k), str) for k in inner) for v in value
        )
        check(ok, key, value, f"a list of objects with the strings {' and '.join(inner)}")
        return value or None

    source = row.get("dataset") or row.get("data_source") or source
    check(isinstance(source, str), "dataset", source, "a name")
    prompt, context = objects("prompt", ("role", "content")), objects("context", ("title", "text"))
    text, answers = row.get("question"), row.get("golden_answers")
    if text is None and prompt:  # some Search-R1 rows hold the question in the prompt alone
        text = prompt[-1]["content"].rpartition("Question:")[2].strip()
    check(isinstance(text, str) and bool(text.strip()), "question", text, "a text")
    if answers is None and isinstance(reward := row.get("reward_model"), dict):
        truth = reward.get("ground_truth")
        answers = truth.get("target") if isinstance(truth, dict) else None
    ok = isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers)
    check(bool(ok), "golden_answers", answers, "a list of one or more strings")
    kind = row.get("answer_kind", "text")
    check(isinstance(kind, str) and kind in ANSWER_KINDS, "answer_kind", kind, f"one of {', '.join(ANSWER_KINDS)}")
    metadata = row.get("metadata") or {}
    check(isinstance(metadata, dict), "metadata", metadata, "an object")
    if kind != "text":
        readable = {"integer": _numbers, "choice": _letter}[kind]
        check(all(map(readable, answers)), "golden_answers", answers, f"answers of kind {kind}")
    id = id if row.get("id") is None else str(row["id"])
    id = id if id.startswith(f"{source}_") else f"{source}_{id}"
    return Question(id, text, tuple(answers), source, prompt, metadata, context, kind)


def build_messages(question: Question, prompt: str, budget_text: str = BUDGET_TEXT) -> list[dict[str, str]]:
    """The chat that opens an episode; prompt is "paper", "qagent", "short", "row" (the row's own) or a file.

    The question is stripped and ends with a question mark, as in the official data. Where it has a budget, budget_text
    follows with the number in the place of {budget}; an empty one keeps the budget from the agent.
    """
    if prompt == "row":
        if question.prompt is None:
            raise ValueError(f"{question.id}: got a row without prompt; use paper, short or a file")
        messages = [dict(message) for message in question.prompt]
    else:
        text = question.question.strip()
        text = text if text.endswith("?") else text + "?"
        template = PROMPTS[prompt] if prompt in PROMPTS else _template(prompt)
        # not str.format: braces in a template are text
        messages = [{"role": "user", "content": template.replace("{question}", text)}]
    if question.budget is not None and budget_text:
        if "{budget}" not in budget_text:
            raise ValueError(f"--budget-text: got {budget_text!r}, expected {{budget}} where the number belongs, or "
                             "nothing at all")
        messages[-1]["content"] += " " + budget_text.replace("{budget}", str(question.budget))
    return messages


def check_budget(budget: int, max_context_tokens: int) -> None:
    """A budget is a number of tokens that an episode has room for."""
    if not 0 < budget < max_context_tokens:
        raise ValueError(f"budget: got {budget}, expected 1 to {max_context_tokens - 1} tokens: it must fit into "
                         f"--max-context-tokens {max_context_tokens}")


def draw_budgets(questions: Sequence[Question], budgets: Sequence[int], *seeds: int) -> list[Question]:
    """Each question with one of the budgets, which depends on the seeds and on its place alone."""
    if not budgets:
        return list(questions)
    drawn = np.random.default_rng((*seeds, 4)).choice(np.array(budgets), len(questions))
    return [replace(question, budget=int(budget)) for question, budget in zip(questions, drawn, strict=True)]


@functools.cache
def _template(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompt: got {path!r}, expected paper, qagent, short, row or a text file")
    text = Path(path).read_text(encoding="utf-8")
    if "{question}" not in text:
        raise ValueError(f"{path}: got no {{question}}, expected it where the question belongs")
    return text


def normalize_answer(text: str) -> str:
    """SQuAD's order: lower case, no ASCII punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """Eq. 3: 1 if prediction and any gold answer are equal when normalised; None scores 0."""
    if prediction is None:
        return 0.0
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(gold) for gold in golds))


def integer_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if the prediction holds one number, and that is a gold integer: "$\\boxed{042}$" equals "42" (not in paper)."""
    numbers = _numbers(prediction or "")
    return float(len(numbers) == 1 and any(numbers == _numbers(gold) for gold in golds))


def _numbers(text: str) -> set[str]:
    """The distinct numbers of a text, or of its last \\boxed{}, without leading zeros and thousands' commas."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    found = re.findall(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", boxed[-1] if boxed else text)
    plain = {re.sub(r"\.0+$", "", re.sub(r"^(-?)0+(?=\d)", r"\1", n.replace(",", ""))) for n in found}
    return {"0" if number == "-0" else number for number in plain}


def choice_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if the prediction names a gold option: "C", "(c)", "C. the third one", "the answer is C" (not in paper)."""
    letter = _letter(prediction or "")
    return float(letter is not None and any(letter == _letter(gold) for gold in golds))


def _letter(text: str) -> str | None:
    boxed = re.findall(r"\\boxed\{(?:\\text\{)?([^{}]*)\}", text)
    text = (boxed[-1] if boxed else text).strip().strip("*").strip()
    found = re.match(r"\(?([A-J])\)?(?:[.):]|$)", text, re.IGNORECASE)
    found = found or re.search(r"(?i:answer(?: is)?:?\s*(?:option\s*)?)\(?([A-J])\)?(?![A-Za-z])", text)
    return found[1].upper() if found else None


ANSWER_KINDS = {"text": exact_match, "integer": integer_match, "choice": choice_match}


def is_correct(prediction: str | None, question: Question) -> float:
    """1 if this answers the question, in the way that its kind of answer is compared."""
    return ANSWER_KINDS[question.answer_kind](prediction, question.golden_answers)


def f1(prediction: str | None, golds: Sequence[str]) -> float:
    """SQuAD's F1 of the normalised words, the best over the gold answers (not in paper)."""
    if prediction is None:
        return 0.0
    words, best = normalize_answer(prediction).split(), 0.0
    for gold_words in (normalize_answer(gold).split() for gold in golds):
        common = (Counter(words) & Counter(gold_words)).total()
        both = len(words) + len(gold_words)
        best = max(best, 2 * common / both if both else 1.0)
    return best


def hit(passages: Iterable[Any], golds: Sequence[str]) -> bool:
    """Whether a passage (.title, .text) contains a gold answer, both normalised.

    A gold answer that normalises to nothing ("The") would be in every text: it hits none.
    """
    wanted = [gold for gold in map(normalize_answer, golds) if gold]
    texts = [normalize_answer(f"{passage.title} {passage.text}") for passage in passages]
    return any(gold in text for gold in wanted for text in texts)


def prepare(flashrag: Path, out: Path) -> None:
    """FlashRAG's folders -> OUT/train.jsonl (NQ, then HotpotQA) and OUT/NAME.jsonl for seven tests."""
    jobs = {"train": {name: flashrag / name / "train.jsonl" for name in TRAIN_SETS}}
    for name in TEST_SETS:
        files = [flashrag / name / f"{split}.jsonl" for split in TEST_SPLITS]
        jobs[name] = {name: next((file for file in files if file.is_file()), files[0])}
    missing = [str(file) for job in jobs.values() for file in job.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{flashrag}: got no {', '.join(missing)}; expected FlashRAG's layout "
            "NAME/{train,dev,test}.jsonl; download it: RUC-NLPIR/FlashRAG_datasets"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, job in jobs.items():
        published = TEST_SETS.get(name, sum(TRAIN_SETS.values()))
        # HotpotQA's training metadata is ten paragraphs a question, half a gigabyte: left out.
        count = _convert(job, out / f"{name}.jsonl", drop="metadata" if name == "train" else "")
        files = " + ".join(f"{file.parent.name}/{file.name}" for file in job.values())
        print(f"{name}.jsonl: {count} questions from {files} (published: {published})")


def _convert(files: dict[str, Path], target: Path, *, drop: str) -> int:
    """The files' rows, checked and with unique ids, in one file that is whole or absent."""
    partial, taken = target.with_name(target.name + ".partial"), set[str]()
    with partial.open("w", encoding="utf-8", newline="\n") as output:
        for name, file in files.items():
            rows = tqdm(read_rows(file), desc=f"{name} {file.stem}", unit=" rows", leave=False)
            for number, row in rows:
                where, row = f"{file}:{number}", row | {"dataset": name}
                question = parse_question(row, name, f"{file.stem}_{number - 1}", where)
                if question.id in taken:
                    raise ValueError(f"{where}: got id {question.id} again, expected unique ids")
                taken.add(question.id)
                row = {key: value for key, value in row.items() if key != drop}
                output.write(json.dumps(row | {"id": question.id}, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return len(taken)


def main() -> None:
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make the training mix and the seven test files")
    command.add_argument("--flashrag", type=Path, required=True, help="folder with nq/, popqa/, ...")
    command.add_argument("--out", type=Path, required=True, help="folder for the eight files")
    given = parser.parse_args()
    try:
        prepare(given.flashrag, given.out)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
