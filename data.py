"""Questions: files, prompts, answer normalisation and scores.

Eq. 3 (the reward is 1 when the answer equals a gold answer) -> exact_match; the paper's hit ratio -> hit.

Departures from the official code:
1. Question ids carry their data set ("nq_train_0"). NQ and HotpotQA both count from 0, so that bare ids would put
   two questions into one GRPO group and pair the wrong rows in a bootstrap.
2. Every row is kept: the official loader drops the last incomplete batch, and with it a Bamboogle question.
3. hit compares normalised text; the official count is case-sensitive.

Files are JSON lines: FlashRAG rows {"id", "question", "golden_answers", "metadata"}, or Search-R1 rows, where
"prompt", "data_source" and "reward_model" hold the same. "dataset" or "data_source" names the set, else the file
does. Parquet is not read (no package of this project does). Bytes that are not UTF-8 and lone surrogates (a JSON
escape can write them; no tokenizer takes them) become U+FFFD.

    python data.py prepare --flashrag DIR --out DIR      # DIR/nq/{train,dev,test}.jsonl ... -> train and test files
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

# The published rows of each set (Jin et al. 2025, paper Table 9): `prepare` prints them beside what it found.
TRAIN_SETS = {"nq": 79_168, "hotpotqa": 90_447}
TEST_SETS = {
    "nq": 3_610, "triviaqa": 11_313, "popqa": 14_267,
    "hotpotqa": 7_405, "2wikimultihopqa": 12_576, "musique": 2_417, "bamboogle": 125,
}  # fmt: skip
TEST_SPLITS = ("test", "dev", "train")  # the first of these that a set has

# Paper Table 7, without the blanks and the full stop that its type-setting puts around tags and placeholder. The
# published checkpoints were trained on other words: those of their data rows (--prompt row, or a file).
PAPER_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> "
    "query </search>, and it will return the top searched results between <information> and </information>. You can "
    "search as many times as you want. If you find no further external knowledge needed, you can directly provide "
    "the answer inside <answer> and </answer> without detailed illustrations. For example, <answer> xxx </answer>. "
    "Question: {question}"
)
SHORT_PROMPT = "{question}"  # the embedded world: its models know the protocol and no English instruction
PROMPTS = {"paper": PAPER_PROMPT, "short": SHORT_PROMPT}


@dataclass(frozen=True)
class Question:
    id: str  # unique over the data sets
    question: str
    golden_answers: tuple[str, ...]
    source: str  # the data set's name
    prompt: list[dict[str, str]] | None = None  # chat messages that came with the row
    metadata: dict[str, Any] = field(default_factory=dict)
    context: list[dict[str, Any]] | None = None  # gold and distractor paragraphs: title, text, is_supporting


class Document(Protocol):
    """What hit needs of a passage."""

    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...


# ---- files ----


def load_questions(path: Path | str, *, limit: int | None = None) -> list[Question]:
    """The (first `limit`) questions of a JSON-lines file, in its order."""
    path = Path(path)
    if path.suffix == ".parquet":
        raise ValueError(
            f"{path}: got a parquet file, expected JSON lines; convert it once, where pandas is installed: "
            "pandas.read_parquet(source).to_json(target, orient='records', lines=True)"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none for all rows")
    questions: list[Question] = []
    taken: set[str] = set()
    for number, row in read_rows(path):
        question = _question(row, default_source=path.stem, default_id=str(len(questions)), where=f"{path}:{number}")
        if question.id in taken:
            copy = next(i for i in range(2, len(taken) + 3) if f"{question.id}_{i}" not in taken)
            question = Question(**{**vars(question), "id": f"{question.id}_{copy}"})
        taken.add(question.id)
        questions.append(question)
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError(f"{path}: got no questions, expected at least one line")
    return questions


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a file of JSON objects; blank lines are passed over."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, expected a file of questions (JSON lines)")
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _clean(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: got no valid JSON ({error}), expected one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: got a {type(row).__name__}, expected a JSON object")
            yield number, row


def _clean(value: Any) -> Any:
    """The value with every lone surrogate replaced by U+FFFD."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _question(row: dict[str, Any], *, default_source: str, default_id: str, where: str) -> Question:
    def take(key: str, kind: type, expected: str, given: Any) -> Any:
        if not isinstance(given, kind):
            got = "nothing" if given is None else f"{type(given).__name__} {str(given)[:60]!r}"
            raise ValueError(f"{where}: got {got} for {key}, expected {expected}")
        return given

    source = take("dataset", str, "a name", row.get("dataset") or row.get("data_source") or default_source)
    prompt = row.get("prompt")
    if prompt is not None:
        for message in take("prompt", list, "a list of {role, content}", prompt):
            take("prompt", dict, "a list of {role, content}", message)
            take("prompt role", str, "a string", message.get("role"))
            take("prompt content", str, "a string", message.get("content"))
    text = row.get("question")
    if text is None and prompt:  # Search-R1 rows may hold the question in the prompt alone, after this word
        text = prompt[-1]["content"].rpartition("Question:")[2].strip()
    take("question", str, "a string", text)
    answers = row.get("golden_answers")
    if answers is None:
        reward = row.get("reward_model")
        truth = reward.get("ground_truth") if isinstance(reward, dict) else None
        answers = truth.get("target") if isinstance(truth, dict) else None
    for answer in take("golden_answers", list, "a list of strings", answers):
        take("golden_answers", str, "a list of strings", answer)
    if not answers:
        raise ValueError(f"{where}: got an empty list for golden_answers, expected at least one answer")
    metadata = take("metadata", dict, "an object", row.get("metadata") or {})
    context = row.get("context")
    if context is not None:
        for paragraph in take("context", list, "a list of {title, text}", context):
            take("context", dict, "a list of {title, text}", paragraph)
    name = str(default_id if row.get("id") is None else row["id"])
    name = name if name.startswith(f"{source}_") else f"{source}_{name}"
    return Question(name, text, tuple(answers), source, prompt, metadata, context)


# ---- prompts ----


def build_messages(question: Question, prompt: str) -> list[dict[str, str]]:
    """The chat that opens an episode; prompt: "paper", "short", "row" (the data row's own), or a file's path.

    The question is stripped and gets a question mark where it has none, as in the official data.
    """
    if prompt == "row":
        if not question.prompt:
            raise ValueError(f"question {question.id}: got no prompt in its row; use --prompt paper, short or a file")
        return [dict(message) for message in question.prompt]
    text = question.question.strip()
    text = text if text.endswith("?") else text + "?"
    template = PROMPTS[prompt] if prompt in PROMPTS else _template(prompt)
    return [{"role": "user", "content": template.replace("{question}", text)}]  # not str.format: braces are text


@functools.cache
def _template(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"prompt: got {path!r}, expected paper, short, row or the path of a text file")
    text = Path(path).read_text(encoding="utf-8")
    if "{question}" not in text:
        raise ValueError(f"{path}: got a prompt without {{question}}; write {{question}} where the question belongs")
    return text


# ---- scores ----


def normalize_answer(text: str) -> str:
    """SQuAD's order: lower case, no ASCII punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
    """Eq. 3: 1 if the normalised prediction equals any normalised gold answer; no prediction scores 0."""
    if prediction is None:
        return 0.0
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(gold) for gold in golds))


def f1(prediction: str | None, golds: Sequence[str]) -> float:
    """SQuAD's F1 of the normalised words, the best over the gold answers (not in paper)."""
    if prediction is None:
        return 0.0
    words = normalize_answer(prediction).split()
    best = 0.0
    for gold in golds:
        gold_words = normalize_answer(gold).split()
        common = sum((Counter(words) & Counter(gold_words)).values())
        if words and gold_words:
            best = max(best, 2 * common / (len(words) + len(gold_words)))
        elif words == gold_words:
            best = 1.0
    return best


def hit(passages: Iterable[Document], golds: Sequence[str]) -> bool:
    """Whether a passage contains a gold answer, both normalised.

    A gold answer of articles and punctuation alone normalises to nothing, which every text contains: no hit.
    """
    wanted = [gold for gold in map(normalize_answer, golds) if gold]
    texts = [normalize_answer(f"{passage.title} {passage.text}") for passage in passages]
    return any(gold in text for gold in wanted for text in texts)


# ---- prepare ----


def prepare(flashrag: Path, out: Path) -> None:
    """FlashRAG's folders -> OUT/train.jsonl (NQ + HotpotQA) and OUT/<set>.jsonl for the seven test sets."""
    train = {name: flashrag / name / "train.jsonl" for name in TRAIN_SETS}
    test = {}
    for name in TEST_SETS:
        files = [flashrag / name / f"{split}.jsonl" for split in TEST_SPLITS]
        test[name] = next((file for file in files if file.is_file()), files[0])
    if missing := [str(file) for file in [*train.values(), *test.values()] if not file.is_file()]:
        raise FileNotFoundError(
            f"{flashrag}: got no {', '.join(missing)}; expected FlashRAG's layout NAME/{{train,dev,test}}.jsonl; "
            "download the sets of RUC-NLPIR/FlashRAG_datasets"
        )
    out.mkdir(parents=True, exist_ok=True)
    # Training rows go without metadata: HotpotQA's holds ten paragraphs a question, half a gigabyte in all.
    _convert(train, out / "train.jsonl", published=sum(TRAIN_SETS.values()), with_metadata=False)
    for name, file in test.items():
        _convert({name: file}, out / f"{name}.jsonl", published=TEST_SETS[name], with_metadata=True)


def _convert(files: dict[str, Path], target: Path, *, published: int, with_metadata: bool) -> None:
    """Rows of the files, checked and with unique ids, into one file that is whole or absent."""
    partial, counts = target.with_name(target.name + ".partial"), Counter[str]()
    with partial.open("w", encoding="utf-8", newline="\n") as output:
        for name, file in files.items():
            taken: set[str] = set()
            for number, row in tqdm(read_rows(file), desc=f"{name} {file.stem}", unit=" rows", leave=False):
                question = _question(
                    row | {"dataset": name}, default_source=name, default_id=f"{file.stem}_{counts[name]}",
                    where=f"{file}:{number}",
                )  # fmt: skip
                if question.id in taken:
                    raise ValueError(f"{file}:{number}: got id {question.id} twice, expected unique ids within a set")
                taken.add(question.id)
                counts[name] += 1
                record = {"id": question.id, "question": question.question, "dataset": name}
                record |= {"golden_answers": question.golden_answers}
                record |= {"metadata": question.metadata} if with_metadata else {}
                output.write(json.dumps(record, ensure_ascii=False) + "\n")
            if not counts[name]:
                raise ValueError(f"{file}: got no questions, expected at least one line")
    os.replace(partial, target)
    found = " + ".join(f"{count} {name}" for name, count in counts.items())
    splits = "/".join(sorted({file.stem for file in files.values()}))
    print(f"{target}: {counts.total()} questions ({found}; split {splits}; published: {published})")


def main() -> None:
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make the training mix and the seven test files")
    command.add_argument("--flashrag", type=Path, required=True, help="folder with nq/, hotpotqa/, ... (FlashRAG)")
    command.add_argument("--out", type=Path, required=True, help="folder to write train.jsonl and the test files to")
    given = parser.parse_args()
    try:
        prepare(given.flashrag, given.out)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
