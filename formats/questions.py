"""Question files as their authors publish them, read as rows of FlashRAG's form.

Such a row is {"id", "question", "golden_answers": [text, ...], "context": [{"title", "text",
"is_supporting"}, ...], "metadata"}; only the question and its answers must be there. Read are
    FlashRAG     JSON lines; paragraphs also from its metadata; one answer may be a string
    Search-R1    "prompt", "data_source" and "reward_model"
    NQ-open      JSON lines with "question" and "answer"; also DPR's table without a header
    TriviaQA     {"Data": [{"QuestionId", "Question", "Answer": {"Value", "Aliases"}}]}
    HotpotQA, 2WikiMultihopQA     a JSON list with "_id", "context" and "supporting_facts"
    MuSiQue      JSON lines with "paragraphs" and "answer_aliases"
    PopQA        a table with "possible_answers"
and files that hold the same under these names. A file may end in .gz.
"""

import ast
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from infra.files import blaming, parse_object, read_rows, replace_surrogates

Row = dict[str, Any]
IDS = ("_id", "QuestionId", "question_id", "qid", "example_id")
# Where published rows have their answers; one of them is read, if there are no golden_answers.
ANSWERS = ("answer", "answers", "Answer", "possible_answers", "output")
ALIASES = ("answer_aliases",)  # further answers beside "answer"
LISTS = ("Data", "data")  # an object with the rows under such a key is a whole file
FEW = 60  # characters of what was got


# ---- files ----


def read_question_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(its place for messages, row) of a file in any form that this module names."""
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".zip":
        raise ValueError(f"{path}: got an archive, expected the question file in it; unpack it")
    if not path.is_file() or kind == ".parquet":
        for number, row in read_rows(path):
            yield f"{path}:{number}", row
        return
    with blaming(path, "questions"), _open(path) as file:
        if kind in (".tsv", ".csv"):
            yield from _table(path, file)
            return
        first = ""
        while not first.strip() and (first := file.readline()):
            pass
        whole = _whole(first, file) if _may_be_whole(first) else None
    if whole is not None:
        yield from _listed(path, whole)
    elif path.suffix == ".gz":
        yield from _lines(path)
    else:
        for number, row in read_rows(path):
            yield f"{path}:{number}", row


def _open(path: Path) -> IO[str]:
    opens = gzip.open if path.suffix == ".gz" else open
    return opens(path, "rt", encoding="utf-8-sig", errors="replace", newline="\n")


def _may_be_whole(line: str) -> bool:
    """Whether the file that begins with this line may be one JSON value, and not one a line."""
    if line.lstrip().startswith("["):
        return True
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line.lstrip().startswith("{")
    return isinstance(row, dict) and _rows_of(row) is not None


def _rows_of(value: Row) -> list[Any] | None:
    """The rows that an object holds; None: it is a row itself."""
    lists = [value[key] for key in LISTS if isinstance(value.get(key), list)]
    return lists[0] if lists and "question" not in value else None


def _whole(first: str, file: IO[str]) -> Any:
    """The JSON value of a whole file; None: it is none, or one a line."""
    text = first + file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if "\\ud" in text.lower():  # an escape that may write a lone surrogate
        value = json.loads(replace_surrogates(json.dumps(value, ensure_ascii=False)))
    return value


def _listed(path: Path, value: Any) -> Iterator[tuple[str, Row]]:
    """The rows of a JSON list, or of an object that has them under one of LISTS."""
    if isinstance(value, dict):
        rows = _rows_of(value)
        value = [value] if rows is None else rows
    if not value:
        raise ValueError(f"{path}: got no questions, expected at least one")
    for number, row in enumerate(value, 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {str(row)[:FEW]!r}, expected a JSON object")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of packed JSON lines."""
    is_empty = True
    with blaming(path, "questions"), _open(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                is_empty = False
                yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
    if is_empty:
        raise ValueError(f"{path}: got no questions, expected at least one line")


def _table(path: Path, file: IO[str]) -> Iterator[tuple[str, Row]]:
    """The rows of a table whose first line names its columns, or of DPR's two columns.

    Tabs divide a line if there are any: DPR's files end in .csv and have them, too.
    """
    text = replace_surrogates(file.read())
    has_tabs = "\t" in text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if has_tabs else ",")
    names: list[str] = []
    count = 0
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if not any(map(str.strip, cells)):
            continue
        if not names:
            is_dpr = len(cells) == 2 and cells[1].strip().startswith("[")
            names = ["question", "answers"] if is_dpr else cells
            if not is_dpr:
                continue
        if len(cells) != len(names):
            raise ValueError(f"{where}: got {len(cells)} columns, expected {len(names)}: "
                             f"{', '.join(names)[:FEW]}")
        count += 1
        yield where, dict(zip(names, cells, strict=True))
    if not count:
        raise ValueError(f"{path}: got no questions, expected a line of column names, then rows")


# ---- rows ----


def as_flashrag(row: Row, where: str) -> Row:
    """The row with the keys that FlashRAG has; other keys stay. An answer that it lacks is absent.
    """
    row = dict(row)
    if row.get("answerable") is False:
        raise ValueError(f"{where}: got answerable false, expected a question that its paragraphs "
                         "answer; take musique_ans_*.jsonl")
    if "annotations" in row and ("question_text" in row or isinstance(row.get("question"), dict)):
        raise ValueError(f"{where}: got Natural Questions with its pages, expected NQ-open, whose "
                         "answers are texts; take NQ-open.*.jsonl")
    _rename(row, "id", IDS)
    _rename(row, "question", ("Question", "input") if "output" in row else ("Question",))
    _read_prompt(row, where)
    if row.get("golden_answers") is None:
        answers = _published_answers(row, where)
        if answers is not None:
            row["golden_answers"] = answers
    else:
        row["golden_answers"] = _as_list(row["golden_answers"])
    _read_context(row, where)
    return row


def _rename(row: Row, name: str, others: tuple[str, ...]) -> None:
    for other in others:
        if row.get(name) is None and other in row:
            row[name] = row.pop(other)


def _read_prompt(row: Row, where: str) -> None:
    """Search-R1's rows hold chat messages; some hold the question in them alone."""
    prompt = row.get("prompt") or []
    if not _are_objects(prompt, "role", "content"):
        raise ValueError(f"{where}: got {str(prompt)[:FEW]!r} for prompt, expected a list of "
                         "objects with the strings role and content")
    if row.get("question") is None and prompt:
        row["question"] = prompt[-1]["content"].rpartition("Question:")[2].strip()


def _are_objects(values: Any, *keys: str) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)
        for value in values)


def _published_answers(row: Row, where: str) -> Any:
    """The answers under another name than golden_answers; None: there are none."""
    if isinstance(reward := row.get("reward_model"), dict):
        truth = reward.get("ground_truth")
        return _as_list(truth.get("target")) if isinstance(truth, dict) else None
    found = [key for key in ANSWERS if row.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"{where}: got answers under {' and '.join(found)}, expected one of them; "
                         "name the right ones golden_answers")
    if not found:
        return None
    answers = _as_list(row.pop(found[0]))
    for key in ALIASES:
        aliases = _as_list(row.pop(key, None) or [])
        if isinstance(answers, list) and isinstance(aliases, list):
            answers = _distinct([*answers, *aliases])
    return answers


def _as_list(value: Any) -> Any:
    """Answers as a list of texts; what is not understood comes back as it is, to be refused."""
    if isinstance(value, str):
        text = value.strip()
        return _written_list(text) if text.startswith("[") and text.endswith("]") else [value]
    if isinstance(value, dict):
        if "text" in value:  # SQuAD: {"text": [...], "answer_start": [...]}
            return _as_list(value["text"])
        for first, aliases in (("Value", "Aliases"), ("value", "aliases")):  # TriviaQA
            if first in value:
                others = value.get(aliases) or []
                return _distinct([value[first], *others]) if isinstance(others, list) else value
    if isinstance(value, list) and value and all(
            isinstance(entry, dict) and ("answer" in entry or "provenance" in entry)
            for entry in value):  # KILT: [{"answer": text, "provenance": [...]}, ...]
        return _distinct([entry["answer"] for entry in value if "answer" in entry])
    return value


def _written_list(text: str) -> list[str]:
    """The list that a table's cell writes, in JSON or Python; another text is one answer."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return value
    return [text]


def _distinct(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


# ---- paragraphs ----


def _read_context(row: Row, where: str) -> None:
    """Paragraphs with titles, and which of them support the answer, from the row or its metadata.
    """
    metadata = row.get("metadata")
    inner = dict(metadata) if isinstance(metadata, dict) else {}
    for holder in (row, inner):
        for key in ("context", "paragraphs"):
            if not holder.get(key):
                continue
            facts = row.get("supporting_facts") or inner.get("supporting_facts")
            paragraphs = _paragraphs(holder[key], _supporting_titles(facts))
            if paragraphs is None and holder is inner:
                continue  # metadata may be anything
            if paragraphs is None:
                raise ValueError(f"{where}: got {str(holder[key])[:FEW]!r} for {key}, expected a "
                                 "list of objects with the strings title and text, or a list of "
                                 "[title, [sentence, ...]]")
            del holder[key]
            row["context"] = paragraphs
            if holder is inner:
                row["metadata"] = inner
            return


def _paragraphs(value: Any, supporting: set[str]) -> list[Row] | None:
    """Paragraphs in one form: {"title", "text", "is_supporting", ...}; None: not understood."""
    if isinstance(value, dict):  # columns, as the datasets library keeps them
        titles = value.get("title")
        texts = next((value[k] for k in ("sentences", "content", "text") if k in value), None)
        if not isinstance(titles, list) or not isinstance(texts, list) or (
                len(titles) != len(texts)):
            return None
        value = [*zip(titles, texts, strict=True)]
    if not isinstance(value, list):
        return None
    paragraphs = []
    for paragraph in value:
        if isinstance(paragraph, list | tuple) and len(paragraph) == 2:
            paragraph = {"title": paragraph[0], "text": _joined(paragraph[1])}
        elif isinstance(paragraph, dict):
            paragraph = dict(paragraph)
            _rename(paragraph, "text", ("paragraph_text", "sentences", "content"))
            paragraph["text"] = _joined(paragraph.get("text"))
        paragraphs.append(paragraph)
        if not _are_objects([paragraph], "title", "text"):
            return None
        if supporting and "is_supporting" not in paragraph:
            paragraph["is_supporting"] = paragraph["title"] in supporting
    return paragraphs


def _joined(text: Any) -> Any:
    """The text of sentences; HotpotQA's begin with a blank, 2Wiki's do not."""
    is_list = isinstance(text, list) and all(isinstance(sentence, str) for sentence in text)
    return " ".join(sentence.strip() for sentence in text) if is_list else text


def _supporting_titles(facts: Any) -> set[str]:
    """The titles in [[title, sentence], ...] or {"title": [...], "sent_id": [...]}."""
    if isinstance(facts, dict):
        facts = [[title] for title in facts.get("title") or []]
    if not isinstance(facts, list):
        return set()
    return {fact[0] for fact in facts
            if isinstance(fact, list) and fact and isinstance(fact[0], str)}
