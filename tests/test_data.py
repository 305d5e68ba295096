"""Question files, prompts and scores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import (
    Passage,
    Question,
    build_messages,
    exact_match,
    f1,
    hit,
    load_questions,
    normalize_answer,
)
from world.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(id: object = "test_0", question: str = "who?", answers: object = ("a",), **more) -> dict:
    return {"id": id, "question": question, "golden_answers": list(answers), **more}


# ---- files ----


def test_flashrag_rows_are_read_in_order_with_the_file_as_source(tmp_path):
    metadata = {"answer_passage_ids": [3]}
    rows = [row("test_0", metadata=metadata), row("nq_7", "where", ["x", "y"])]
    first, second = load_questions(write_rows(tmp_path / "nq.jsonl", rows))
    assert first == Question("nq_test_0", "who?", ("a",), "nq", None, metadata, None)
    assert (second.id, second.golden_answers) == ("nq_7", ("x", "y"))


def test_search_r1_rows_give_source_prompt_and_answers(tmp_path):
    prompt = [{"role": "user", "content": "Answer. For example, X. Question: who sang Red?\n"}]
    published = {
        "id": "train_0", "data_source": "hotpotqa", "prompt": prompt, "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Taylor Swift"]}},
        "extra_info": {"split": "train", "index": 0},
    }  # fmt: skip
    (question,) = load_questions(write_rows(tmp_path / "mix.jsonl", [published]))
    assert question.id == "hotpotqa_train_0" and question.source == "hotpotqa"
    assert question.question == "who sang Red?" and question.golden_answers == ("Taylor Swift",)
    assert build_messages(question, "row") == prompt


def test_two_data_sets_that_both_count_from_0_get_different_ids(tmp_path):
    """NQ and HotpotQA both hold a train_0; bare ids would put the two into one GRPO group."""
    rows = [row("train_0", dataset="nq"), row("train_0", dataset="hotpotqa"), row(0, dataset="nq")]
    ids = [q.id for q in load_questions(write_rows(tmp_path / "train.jsonl", rows))]
    assert ids == ["nq_train_0", "hotpotqa_train_0", "nq_0"]


def test_repeated_and_missing_ids_are_made_unique(tmp_path):
    rows = [row("a"), row("a"), row("a_2"), row(None), row("a")]
    ids = [q.id for q in load_questions(write_rows(tmp_path / "s.jsonl", rows))]
    assert ids == ["s_a", "s_a_2", "s_a_2_2", "s_3", "s_a_3"]


def test_every_row_is_kept_and_limit_takes_the_first(tmp_path):
    path = write_rows(tmp_path / "s.jsonl", [row(i) for i in range(257)])
    assert len(load_questions(path)) == 257
    assert [q.id for q in load_questions(path, limit=2)] == ["s_0", "s_1"]
    with pytest.raises(ValueError, match="limit: got 0"):
        load_questions(path, limit=0)


def test_keys_that_mean_nothing_to_the_core_are_kept_in_the_metadata(tmp_path):
    rows = [row(metadata={"level": 3}, choices=["A", "B"], note="x"), row(level=2)]
    first, second = load_questions(write_rows(tmp_path / "s.jsonl", rows))
    assert first.metadata == {"level": 3, "choices": ["A", "B"], "note": "x"}
    assert second.metadata == {"level": 2}


def test_context_paragraphs_are_kept(tmp_path):
    context = [{"title": "T", "text": "t", "is_supporting": True}]
    (question,) = load_questions(write_rows(tmp_path / "s.jsonl", [row(context=context)]))
    assert question.context == context


def test_foreign_text_is_read_and_what_no_tokenizer_takes_is_replaced(tmp_path):
    path = tmp_path / "s.jsonl"
    long = "\u00e9\x00\x1b<|im_end|>" * 10_000
    lines = [
        b'\xef\xbb\xbf{"id": 0, "question": "\\ud800 \xff \xe2\x80\xa8", "golden_answers": ["x"]}'
    ]
    lines += [b"", json.dumps(row(1, long)).encode()]
    path.write_bytes(b"\r\n".join(lines))
    first, second = load_questions(path)
    assert first.question == "\ufffd \ufffd \u2028" and second.question == long


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"s\.jsonl:2: got no valid JSON"),
        ("[" * 100_000, r"s\.jsonl:2: got no valid JSON"),
        ("[1]", r"s\.jsonl:2: got '\[1\]\\n', expected a JSON object"),
        ('{"id": 1, "golden_answers": ["x"]}', r"s\.jsonl:2: got 'None' for question"),
        ('{"question": " ", "golden_answers": ["x"]}', r"s\.jsonl:2: got ' ' for question"),
        ('{"question": "q"}', r"s\.jsonl:2: got 'None' for golden_answers"),
        ('{"question": "q", "golden_answers": []}', r"s\.jsonl:2: got '\[\]' for golden_answers"),
        ('{"question": "q", "golden_answers": "x"}', r"s\.jsonl:2: got 'x' for golden_answers"),
        ('{"question": "q", "golden_answers": [1]}', r"s\.jsonl:2: got '\[1\]' for golden_answers"),
        ('{"question": "q", "golden_answers": ["x"], "prompt": "p"}', r"2: got 'p' for prompt"),
        ('{"question": "q", "golden_answers": ["x"], "dataset": 3}', r"2: got '3' for dataset"),
        ('{"question": "q", "golden_answers": ["x"], "metadata": 3}', r"2: got '3' for metadata"),
        ('{"question": "q", "golden_answers": ["x"], "context": [{"title": "t"}]}', r"for context"),
        ('{"question": "q", "reward_model": 3}', r"s\.jsonl:2: got 'None' for golden_answers"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_questions(path)


def test_missing_empty_and_parquet_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no such file"):
        load_questions(tmp_path / "s.jsonl")
    with pytest.raises(ValueError, match="got no questions"):
        load_questions(write_rows(tmp_path / "s.jsonl", []))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="got a parquet file.*to_json"):
        load_questions(tmp_path / "t.parquet")


# ---- prompts ----


def test_the_paper_prompt_is_table_7_with_the_question_filled_in():
    question = Question("q", "  who sang {Red}  ", ("x",), "nq")
    (message,) = build_messages(question, "paper")
    assert message["role"] == "user"
    assert message["content"].startswith("Answer the given question. You must conduct reasoning")
    assert "For example, <answer> xxx </answer>. Question: who sang {Red}?" in message["content"]


def test_short_and_file_prompts(tmp_path):
    question = Question("q", "who?", ("x",), "nq")
    assert build_messages(question, "short") == [{"role": "user", "content": "who?"}]
    (tmp_path / "p.txt").write_text('{"a": 1} Q: {question}\n')
    (message,) = build_messages(question, str(tmp_path / "p.txt"))
    assert message["content"] == '{"a": 1} Q: who?\n'


def test_an_instruction_follows_the_question_after_one_blank():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    question = Question("q", "who?", ("x",), "nq", messages, instruction="Use #64.")
    assert build_messages(question, "short") == [{"role": "user", "content": "who? Use #64."}]
    (message,) = build_messages(question, "paper")
    assert message["content"].endswith("Question: who? Use #64.")
    asked = build_messages(question, "row")
    assert asked == [messages[0], {"role": "user", "content": "u Use #64."}]
    assert messages[1]["content"] == "u"  # the row's own prompt is not changed


def test_a_prompt_that_cannot_be_used_is_an_error(tmp_path):
    question = Question("nq_1", "who?", ("x",), "nq")
    with pytest.raises(ValueError, match="nq_1: got a row without prompt"):
        build_messages(question, "row")
    with pytest.raises(FileNotFoundError, match="got 'papr', expected paper, short, row"):
        build_messages(question, "papr")
    (tmp_path / "p.txt").write_text("Q")
    with pytest.raises(ValueError, match="got no {question}"):
        build_messages(question, str(tmp_path / "p.txt"))


def test_the_example_of_the_prompt_is_no_answer():
    """The official extraction finds the prompt's own example, so that silence can score 1."""
    assert exact_match(None, ["Beijing", "xxx", "and"]) == 0.0


# ---- scores ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S.A.", "usa"),
        ("an Apple a day", "apple day"),
        ("Well-known", "wellknown"),  # punctuation is deleted, not replaced by a blank
        ("the.rapist", "therapist"),  # before articles are
        ("Theatre", "theatre"),
        ("A", ""),
        (
            "caf\u00e9 \u2013 \u4e2d\u6587",
            "caf\u00e9 \u2013 \u4e2d\u6587",
        ),  # ASCII punctuation only
        ("a\tb\u00a0\nc", "b c"),
    ],
)
def test_answers_are_normalised_in_the_order_of_squad(text, expected):
    assert normalize_answer(text) == expected


@given(st.text())
def test_normalising_survives_any_text_and_an_answer_equals_itself(text):
    assert exact_match(text, ["z", text]) == 1.0
    assert normalize_answer(text) == " ".join(normalize_answer(text).split())


def test_a_question_is_matched_by_exact_match_unless_it_says_otherwise():
    question = Question("q", "who?", ("The Beatles",), "nq")
    assert question.match("beatles", question.golden_answers) == 1.0
    other = Question("q", "who?", ("x",), "nq", match=lambda answer, golds: 0.5)
    assert other.match("beatles", other.golden_answers) == 0.5


def test_exact_match_is_with_any_gold_answer():
    assert exact_match("the Beatles!", ["Queen", "Beatles"]) == 1.0
    assert exact_match("Beatles band", ["Beatles"]) == 0.0
    assert exact_match("", ["Beatles"]) == 0.0


def test_f1_counts_shared_words_and_takes_the_best_gold_answer():
    # 2 shared of 3 predicted and 2 gold words: precision 2/3, recall 1
    assert f1("John Fitzgerald Kennedy", ["x", "John Kennedy"]) == pytest.approx(0.8)
    assert f1("John Fitzgerald Kennedy", ["x", "John Kennedy", "y"]) == pytest.approx(0.8)
    assert f1("John Fitzgerald Kennedy", ["John Kennedy", "John"]) == pytest.approx(0.8)
    assert f1("ha ha", ["ha"]) == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert f1(None, ["x"]) == f1("y", ["x"]) == f1("", ["x"]) == 0.0
    assert f1("the", ["a"]) == 1.0


def test_hit_finds_a_normalised_answer_in_title_or_text():
    passages = [Passage("0", "Red (album)", "by Taylor  Swift.", 1.0)]
    assert hit(passages, ["TAYLOR SWIFT"]) and hit(passages, ["x", "red album"])
    assert not hit(passages, ["Queen"]) and not hit([], ["red"])
    assert not hit(passages, ["The"])  # normalises to nothing, which every text contains


# ---- prepare ----


def flashrag(folder: Path) -> Path:
    """Each set with the splits it is published with, and one row more for a later split."""
    splits = {
        "nq": {"train": 3, "dev": 1, "test": 2}, "triviaqa": {"train": 1, "test": 2},
        "popqa": {"test": 2}, "hotpotqa": {"train": 2, "dev": 4}, "2wikimultihopqa": {"dev": 1},
        "musique": {"dev": 3, "train": 1}, "bamboogle": {"train": 5},
    }  # fmt: skip
    for name, counts in splits.items():
        for split, count in counts.items():
            rows = [row(f"{split}_{i}", metadata={"n": i}) for i in range(count)]
            write_rows(folder / name / f"{split}.jsonl", rows)
    return folder


def test_prepare_writes_the_training_mix_and_seven_tests_by_the_split_rule(tmp_path, capsys):
    out = tmp_path / "out"
    prepare(flashrag(tmp_path / "in"), out)
    sizes = {file.stem: len(load_questions(file)) for file in out.iterdir()}
    assert sizes == {
        "train": 5, "nq": 2, "triviaqa": 2, "popqa": 2, "hotpotqa": 4, "2wikimultihopqa": 1,
        "musique": 3, "bamboogle": 5,
    }  # fmt: skip
    train = load_questions(out / "train.jsonl")
    assert [q.id for q in train][2:4] == ["nq_train_2", "hotpotqa_train_0"]
    assert train[0].metadata == {} and load_questions(out / "nq.jsonl")[1].metadata == {"n": 1}
    everything = [q.id for file in out.iterdir() for q in load_questions(file)]
    assert len(set(everything)) == len(everything)
    printed = capsys.readouterr().out
    assert "train.jsonl: 5 questions from nq/train.jsonl + hotpotqa/train.jsonl" in printed
    assert "musique.jsonl: 3 questions from musique/dev.jsonl (published: 2417)" in printed


def test_prepare_names_missing_sets_and_writes_nothing(tmp_path):
    source = flashrag(tmp_path / "in")
    (source / "bamboogle" / "train.jsonl").unlink()
    command = [
        sys.executable,
        "data.py",
        "prepare",
        "--flashrag",
        source,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "bamboogle" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_prepare_stopped_by_a_bad_row_leaves_no_half_file(tmp_path):
    source = flashrag(tmp_path / "in")
    with (source / "popqa" / "test.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match=r"popqa/test\.jsonl:3"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out" / "popqa.jsonl").exists()
    assert (tmp_path / "out" / "nq.jsonl").exists()
