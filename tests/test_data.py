"""Question files, prompts and scores."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qagent
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
from episode import document_block
from experiments import scores
from retriever import Corpus
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
        ('{"question": "q", "golden_answers": {"x": 1}}', r"2: got .* for golden_answers"),
        ('{"question": "q", "golden_answers": [null]}', r"2: got '\[None\]' for golden_answers"),
        ('{"question": "q", "golden_answers": 42}', r"2: got '42' for golden_answers, .*not 42"),
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


# ---- files as their authors publish them: forms written by hand ----

PARAGRAPHS = [["Ume", ["Ume is a town.", " Bob leads it."]], ["Cat", ["A cat."]]]
HOTPOT = {
    "_id": "5a7a", "question": "who leads Ume", "answer": "Bob", "type": "bridge", "level": "hard",
    "supporting_facts": [["Ume", 1]], "context": PARAGRAPHS,
}  # fmt: skip
CONTEXT = [
    {"title": "Ume", "text": "Ume is a town. Bob leads it.", "is_supporting": True},
    {"title": "Cat", "text": "A cat.", "is_supporting": False},
]
COLUMNS = {"title": ["Ume", "Cat"], "sentences": [p[1] for p in PARAGRAPHS]}
MUSIQUE = {
    "id": "2hop__1_2", "question": "who leads Ume", "answer": "Bob", "answer_aliases": ["Robert"],
    "answerable": True, "question_decomposition": [{"id": 1}],
    "paragraphs": [
        {"idx": 0, "title": "Ume", "paragraph_text": "Bob leads it.", "is_supporting": True},
        {"idx": 1, "title": "Cat", "paragraph_text": "A cat.", "is_supporting": False}],
}  # fmt: skip
TRIVIA = {
    "Question": "Who leads Ume?", "QuestionId": "tc_1", "EntityPages": [],
    "Answer": {"Value": "Bob", "Aliases": ["Bob", "Robert"], "NormalizedAliases": ["bob"],
               "NormalizedValue": "bob", "Type": "WikipediaEntity"},
}  # fmt: skip


def test_r6_hotpotqa_and_2wiki_lists_are_read_with_their_paragraphs(tmp_path):
    for indent in (None, 2):  # on one line, as published, or laid out
        path = tmp_path / "hotpotqa.json"
        path.write_text(json.dumps([HOTPOT, {**HOTPOT, "_id": "5a7b"}], indent=indent))
        first, second = load_questions(path)
        assert (first.id, second.id) == ("hotpotqa_5a7a", "hotpotqa_5a7b")
        assert (first.question, first.golden_answers) == ("who leads Ume", ("Bob",))
        assert first.context == CONTEXT and first.source == "hotpotqa"
        assert first.metadata["type"] == "bridge" and "context" not in first.metadata
    (only,) = load_questions(path, limit=1)
    assert only == first


def test_r6_paragraphs_as_columns_or_in_flashrag_s_metadata_are_read(tmp_path):
    facts = {"title": ["Ume"], "sent_id": [1]}
    columns = {**HOTPOT, "context": COLUMNS, "supporting_facts": facts}
    content = {"title": COLUMNS["title"], "content": COLUMNS["sentences"]}
    metadata = {"type": "bridge", "supporting_facts": facts}
    rows = [
        columns, row(metadata={**metadata, "context": COLUMNS}),
        row(metadata={**metadata, "context": content}), row(metadata={"paragraphs": CONTEXT}),
    ]  # fmt: skip
    questions = load_questions(write_rows(tmp_path / "s.jsonl", rows))
    assert [question.context for question in questions] == [CONTEXT] * 4
    assert questions[1].metadata == metadata  # nothing is held twice
    (question,) = load_questions(write_rows(tmp_path / "s.jsonl", [row(data=[1])]))
    assert question.metadata == {"data": [1]}  # a row, no file of rows
    odd = row(metadata={"context": "a text"})
    (question,) = load_questions(write_rows(tmp_path / "s.jsonl", [odd]))
    assert question.context is None and question.metadata == {"context": "a text"}


def test_r6_musique_is_read_with_aliases_and_refused_where_nothing_answers(tmp_path):
    (question,) = load_questions(write_rows(tmp_path / "musique.jsonl", [MUSIQUE]))
    assert (question.id, question.golden_answers) == ("musique_2hop__1_2", ("Bob", "Robert"))
    assert [p["is_supporting"] for p in question.context] == [True, False]
    assert question.context[0]["text"] == "Bob leads it."
    path = write_rows(tmp_path / "full.jsonl", [MUSIQUE, {**MUSIQUE, "answerable": False}])
    with pytest.raises(ValueError, match=r"full\.jsonl:2: got answerable false, .*musique_ans"):
        load_questions(path)


def test_r6_triviaqa_is_read_with_its_aliases(tmp_path):
    for indent in (None, 4):
        path = tmp_path / "triviaqa.json"
        path.write_text(json.dumps({"Data": [TRIVIA], "Domain": "Web"}, indent=indent))
        (question,) = load_questions(path)
        assert (question.id, question.question) == ("triviaqa_tc_1", "Who leads Ume?")
        assert question.golden_answers == ("Bob", "Robert")
    lower = {"question_id": "tc_1", "question": "q", "answer": {"value": "Bob", "aliases": ["B"]}}
    (question,) = load_questions(write_rows(tmp_path / "t.jsonl", [lower]))
    assert question.id == "t_tc_1" and question.golden_answers == ("Bob", "B")


def test_r6_popqa_and_dpr_tables_are_read(tmp_path):
    popqa = tmp_path / "popqa.tsv"
    popqa.write_text(
        "id\tsubj\tquestion\tpossible_answers\n"
        '4222362\tUme\tWho leads Ume?\t"[""Bob"", ""Bob, the \\""Mayor\\""""]"\n'
        "7\tCat\tWhat is Cat?\t\"[\"\"animal\"\"]\"\n\n")
    first, second = load_questions(popqa)
    assert first.golden_answers == ("Bob", 'Bob, the "Mayor"') and first.metadata == {"subj": "Ume"}
    assert (second.id, second.question) == ("popqa_7", "What is Cat?")
    dpr = tmp_path / "nq-test.qa.csv"
    dpr.write_text("who leads ume\t['Bob', \"O'Neil\"]\nwhere\t['x']\n")
    first, second = load_questions(dpr)  # published with tabs in a file called csv
    assert first.golden_answers == ("Bob", "O'Neil") and second.golden_answers == ("x",)
    (tmp_path / "c.csv").write_text('question,answer\n"who, or what",x\n')
    assert load_questions(tmp_path / "c.csv")[0].question == "who, or what"
    (tmp_path / "t.tsv").write_text("question\tanswer\nq\n")
    with pytest.raises(ValueError, match=r"t\.tsv:2: got 1 columns, expected 2: question, answer"):
        load_questions(tmp_path / "t.tsv")
    (tmp_path / "t.tsv").write_text("question\tanswer\n")
    with pytest.raises(ValueError, match=r"t\.tsv: got no questions"):
        load_questions(tmp_path / "t.tsv")


@pytest.mark.parametrize(
    ("published", "golds"),
    [
        ({"question": "q", "answer": ["x", "y"]}, ("x", "y")),  # NQ-open
        ({"question": "q", "answer": "x"}, ("x",)),
        ({"question": "q", "answers": ["x"], "positive_ctxs": []}, ("x",)),  # DPR
        ({"question": "q", "answers": {"text": ["x"], "answer_start": [3]}}, ("x",)),  # SQuAD
        ({"question": "q", "golden_answers": "x"}, ("x",)),  # FlashRAG
        ({"question": "q", "golden_answers": '["x", "y"]'}, ("x", "y")),  # a table that was JSON
        ({"question": "q", "golden_answers": "['x']"}, ("x",)),
        ({"question": "q", "golden_answers": "[sic] x"}, ("[sic] x",)),
        ({"question": "q", "possible_answers": '["x", "y"]'}, ("x", "y")),  # PopQA
        ({"input": "q", "output": [{"answer": "x"}, {"provenance": []}]}, ("x",)),  # KILT
        ({"question": "q", "golden_answers": ["x"], "answer": "z"}, ("x",)),
    ],
)
def test_r6_answers_are_read_under_their_published_names(tmp_path, published, golds):
    (question,) = load_questions(write_rows(tmp_path / "s.jsonl", [published]))
    assert (question.question, question.golden_answers) == ("q", golds)
    assert question.metadata == {k: published[k] for k in ("positive_ctxs",) if k in published} | (
        {"answer": "z"} if published.get("answer") == "z" else {})


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"question": "q", "label": "x"}, "got 'None' for golden_answers, .*keys: question, label"),
        ({"query": "q", "golden_answers": ["x"]}, "got 'None' for question, .*keys: query, gold"),
        ({"question": "q", "answer": "x", "answers": ["y"]}, "answers under answer and answers"),
        ({"question": "q", "answer": True}, "got 'True' for golden_answers"),
        ({"question": "q", "answer": 3.5}, r"got '3.5' for golden_answers, .*\"42\", not 42"),
        ({"question": "q", "answer": {"spans": []}}, "for golden_answers"),
        ({"question": "q", "output": [{"provenance": []}]}, r"got '\[\]' for golden_answers"),
        ({"question_text": "q", "annotations": [], "document_text": "x"}, "take NQ-open"),
        ({"question": {"text": "q"}, "annotations": {}, "document": {}}, "take NQ-open"),
        ({**HOTPOT, "context": [["Ume", 3]]}, r"got .* for context, .*\[title, \[sentence"),
        ({**HOTPOT, "context": "a text"}, "got 'a text' for context"),
        ({**MUSIQUE, "paragraphs": [{"title": "T"}]}, "for paragraphs"),
    ],
)
def test_r6_a_row_that_is_not_understood_names_its_keys(tmp_path, published, message):
    path = write_rows(tmp_path / "s.jsonl", [row(), published])
    with pytest.raises(ValueError, match=rf"s\.jsonl:2: {message}|s\.jsonl:2: got .*{message}"):
        load_questions(path)
    path = tmp_path / "s.json"
    path.write_text(json.dumps([row(), published]))
    with pytest.raises(ValueError, match=r"s\.json: row 2: got "):
        load_questions(path)


@pytest.mark.parametrize("name", ["nq.jsonl", "nq.json", "nq.tsv"])
def test_r6_packed_files_are_read_as_what_they_hold(tmp_path, name):
    texts = {
        "nq.jsonl": json.dumps(row(1)) + "\n\n" + json.dumps(row(2)) + "\n",
        "nq.json": json.dumps([row(1), row(2)]),
        "nq.tsv": "id\tquestion\tanswer\n1\twho?\ta\n2\twho?\ta\n",
    }
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(texts[name].encode()))
    assert [q.id for q in load_questions(path)] == ["nq_1", "nq_2"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{name}\.gz: got EOFError"):
        load_questions(path)


def test_r6_files_that_are_no_questions_say_so(tmp_path):
    for text, message in [
        ("[]", "got no questions"), ('[{"question": "q"', r"s\.json:1: got no valid JSON"),
        ("[1, 2]", r"row 1: got '1', expected a JSON object"), ('{"data": []}', "got no questions"),
        ('{"a": 1}', "got 'None' for question, .*keys: a"), ("\n \n", "got no questions"),
        ('{\n"a": [}', r"s\.json:1: got no valid JSON"),
    ]:  # fmt: skip
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_questions(tmp_path / "s.json")
    (tmp_path / "s.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="got an archive, .*unpack it"):
        load_questions(tmp_path / "s.zip")


def test_r6_a_list_s_lone_surrogates_and_foreign_bytes_are_replaced(tmp_path):
    (tmp_path / "s.json").write_bytes(
        b'\xef\xbb\xbf[{"id": 0, "question": "\\ud800 \xff \\ud83d\\ude00", "answer": "x"}]')
    (question,) = load_questions(tmp_path / "s.json")
    assert question.question == "\ufffd \ufffd \U0001f600"


def test_r6_real_files_hold_paragraphs_of_which_some_support(real_data):
    for name in ("hotpotqa", "2wikimultihopqa", "musique"):
        questions = load_questions(real_data / "gold" / f"{name}.jsonl")
        assert len(questions) > 50
        for question in questions:
            supports = [paragraph["is_supporting"] for paragraph in question.context]
            assert True in supports and False in supports
    for path in (real_data / "questions").glob("*.jsonl"):
        assert all(question.golden_answers for question in load_questions(path))


# ---- prompts ----


def test_the_paper_prompt_is_table_7_with_the_question_filled_in():
    question = Question("q", "  who sang {Red}  ", ("x",), "nq")
    (message,) = build_messages(question, "paper")
    assert message["role"] == "user"
    assert message["content"].startswith("Answer the given question. You must conduct reasoning")
    assert "For example, <answer> xxx </answer>. Question: who sang {Red}?" in message["content"]


@pytest.mark.parametrize(("asked", "expected"), [
    ("What", "What?"), ("What?", "What?"), ("What??", "What??"), ("What ?", "What ?"),
    ("Who...?", "Who...?"), ("Who...", "Who...?"), (" What? ", "What?"), ("What?\n", "What?"),
    ("What\uff1f", "What\uff1f?"), ('"Who?"', '"Who?"?'), ("Who?\u200b", "Who?\u200b?"),
    ("?", "?"), ("Who said 'why?'", "Who said 'why?'?"),
])
def test_a_question_mark_is_added_only_where_none_ends_the_question(asked, expected):
    """The official data's rule: strip; if the last character is no "?", add one."""
    question = Question("q", asked, ("x",), "nq")
    assert build_messages(question, "short") == [{"role": "user", "content": expected}]
    assert build_messages(question, "paper")[0]["content"].endswith(f"Question: {expected}")


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
        ("A", "a"),  # nothing else would be left
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
    assert f1("Jr", ["x", "JR."]) == 1.0


# SQuAD's rule makes nothing of these. "---" is an answer of NQ's test questions.
EMPTIED = ("A", "The", "an", "a the", "?", "!", "---", "...", "'", "$")


@pytest.mark.parametrize("rule", ["squad", "unicode", "numbers"])
@pytest.mark.parametrize("gold", EMPTIED)
def test_s1_a_gold_that_normalises_to_nothing_matches_only_the_like(gold, rule):
    for prediction in (*EMPTIED, "", " ", "x"):
        expected = float(prediction == gold)
        assert exact_match(prediction, [gold], rule) == expected, prediction
        if "a the" not in (prediction, gold):  # that shares a word with "a" and with "the"
            assert f1(prediction, [gold], rule) == expected, prediction
    assert exact_match(f" {gold.upper()} ", [gold], rule) == f1(gold, [gold], rule) == 1.0
    assert exact_match(None, [gold], rule) == f1(None, [gold], rule) == 0.0


def test_s1_letters_as_answers_are_told_from_each_other():
    assert exact_match("(A)", ["A"]) == exact_match("A.", ["a"]) == 1.0
    assert exact_match("the", ["A"]) == exact_match("B", ["A"]) == 0.0
    assert f1("the", ["a"]) == f1("?", ["!"]) == 0.0


def test_s1_a_gold_that_normalises_to_nothing_is_no_hit_in_longer_text():
    passages = [Passage("0", '"An album"', "The band, that is a trio? Yes --- it is.", 1.0)]
    for gold in EMPTIED:
        assert not hit(passages, [gold])
        assert not hit(passages, [gold], whole_words=False)
    assert hit([Passage("0", "", "---", 1.0)], ["---"])


@pytest.mark.parametrize("answers", [[""], ["x", "  "], ["\u3000"], "", {"target": [" "]}])
def test_s1_a_blank_gold_is_refused_at_its_line(tmp_path, answers):
    bad = {"question": "q", "golden_answers": answers}
    if isinstance(answers, dict):
        bad = {"question": "q", "reward_model": {"ground_truth": answers}}
    path = write_rows(tmp_path / "s.jsonl", [row(), bad])
    with pytest.raises(ValueError, match=r"s\.jsonl:2: got .* for golden_answers, .*none.* blank"):
        load_questions(path)


# (prediction, gold, by squad, by unicode, by numbers)
COMPARED = [
    ("3.5", "35", 1, 1, 0), ("-5", "5", 1, 1, 0), ("$3.50", "350", 1, 1, 0), (".5", "5", 1, 1, 0),
    ("-$5", "$5", 1, 1, 0), ("1990-91", "199091", 1, 1, 0), ("12:30", "1230", 1, 1, 0),
    ("1/2", "12", 1, 1, 0), ("1,5", "15", 1, 1, 0), ("1,000", "1000", 1, 1, 1),
    ("The 3.5 Million", "3.5 million", 1, 1, 1), ("May 5, 2001", "may 5 2001", 1, 1, 1),
    ("COVID-19", "covid19", 1, 1, 1), ("U.S.", "US", 1, 1, 1), ("$5", "5", 1, 1, 1),
    ("\u22125", "-5", 0, 1, 1), ("\u22125", "5", 0, 1, 0), ("1914\u20131918", "1914-1918", 0, 1, 1),
    ("cafe\u0301", "caf\u00e9", 0, 1, 1), ("O\u2019Brien", "O'Brien", 0, 1, 1),
    ("it\u02bcs", "its", 0, 1, 1), ("O\u00b4Brien", "O'Brien", 0, 1, 1),
    ("Jean\u2013Luc", "Jean-Luc", 0, 1, 1), ("Jean\u2011Luc", "Jean-Luc", 0, 1, 1),
    ("\u201cHeroes\u201d", "Heroes", 0, 1, 1), ("\u00abHeroes\u00bb", "Heroes", 0, 1, 1),
    ("\uff21\uff22\u3000\uff11", "AB 1", 0, 1, 1), ("\ufb01ve", "five", 0, 1, 1),
    ("H\u2082O", "H2O", 0, 1, 1), ("co\u00adop", "coop", 0, 1, 1), ("a\u200bb", "ab", 0, 1, 1),
    ("\u00bd", "1/2", 0, 1, 1), ("well\u2026", "well", 0, 1, 1),
    ("rock\u00a0n\u00a0roll", "rock n roll", 1, 1, 1), ("Beyonc\u00e9", "Beyonce", 0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("prediction", "gold", "squad", "unicode", "numbers"), COMPARED)
def test_s2_s3_rules_differ_in_marks_within_numbers_and_in_spelling(
    prediction, gold, squad, unicode, numbers
):
    for rule, expected in (("squad", squad), ("unicode", unicode), ("numbers", numbers)):
        assert exact_match(prediction, [gold], rule) == expected, rule
        assert exact_match(gold, [prediction], rule) == expected, rule
        assert f1(prediction, [gold], rule) == 1.0 or not expected, rule


def test_s3_the_paper_s_rule_is_the_default_and_takes_forms_apart():
    assert exact_match("cafe\u0301", ["caf\u00e9"]) == f1("O\u2019Brien", ["O'Brien"]) == 0.0
    assert exact_match("3.5", ["35"]) == 1.0
    assert not hit([Passage("0", "", "Caf\u00e9", 1.0)], ["Cafe\u0301"])
    assert hit([Passage("0", "", "Caf\u00e9", 1.0)], ["Cafe\u0301"], "unicode")


@given(st.text())
def test_s3_any_text_equals_itself_by_every_rule(text):
    for rule in ("unicode", "numbers"):
        assert exact_match(text, ["z", text], rule) == 1.0


def test_s2_s3_the_rule_that_a_file_is_read_with_is_its_questions_(tmp_path):
    path = write_rows(tmp_path / "s.jsonl", [row(answers=["35", "caf\u00e9"])])
    expected = {"squad": (1.0, 0.0), "unicode": (1.0, 1.0), "numbers": (0.0, 1.0)}
    for rule, matches in expected.items():
        (question,) = load_questions(path, answer_rule=rule)
        matched = [question.match(p, question.golden_answers) for p in ("3.5", "cafe\u0301")]
        assert question.answer_rule == rule and tuple(matched) == matches
    assert load_questions(path)[0].match is exact_match


def test_hit_finds_a_normalised_answer_in_title_or_text():
    passages = [Passage("0", '"Red (album)"', "by Taylor  Swift.", 1.0)]
    assert hit(passages, ["TAYLOR SWIFT"]) and hit(passages, ["x", "red album"])
    assert not hit(passages, ["Queen"]) and not hit([], ["red"])


# (text, gold, whether it is there as whole words, whether it is anywhere: the published rule)
FOUND = [
    ("I know the north", "no", 0, 1), ("No, he did not.", "no", 1, 1), ("born in 1935", "35", 0, 1),
    ("Mark Twain's book", "Twain", 1, 1), ("Mark Twain\u2019s book", "Twain", 1, 1),
    ("from 1914\u20131918", "1914", 1, 1), ("from 1914-1918", "1918", 1, 1),
    ("the Franco-Prussian War", "Prussian", 1, 1), ("the U.S.-based firm", "U.S.", 1, 1),
    ("the US army", "U.S.", 1, 1), ("AC/DC's album", "AC/DC", 1, 1), ("acdc", "AC/DC", 1, 1),
    ("grew by 3.5 percent", "5", 0, 1), ("grew by 3.5 percent", "3.5", 1, 1),
    ("it has 1,000 members", "1000", 1, 1), ("it has 1,000 members", "000", 0, 1),
    ("number 1", "A-1", 0, 0), ("the A-1 sauce", "A-1", 1, 1),
    ("he said \u201cYes\u201d.", "yes", 1, 1),
    ("eyes", "yes", 0, 1), ("the Lord of Rings", "Lord of the Rings", 1, 1),
    ("men and women", "men", 1, 1), ("women", "men", 0, 1), ("and/or", "or", 1, 1),
    ("a snake_case name", "case", 1, 1), ("Yes\u2014sometimes", "yes", 1, 1),
]  # fmt: skip


@pytest.mark.parametrize(("text", "gold", "as_words", "anywhere"), FOUND)
def test_s4_a_hit_is_whole_words_and_the_published_rule_an_option(text, gold, as_words, anywhere):
    for passage in (Passage("0", "", text, 1.0), Passage("0", text, "and so on", 1.0)):
        assert hit([passage], [gold]) == bool(as_words)
        assert hit([passage], ["zebra", gold], whole_words=False) == bool(anywhere)


@given(st.text(), st.text(), st.text())
def test_s4_a_text_between_blanks_is_a_hit_whatever_it_is(before, gold, after):
    if gold.strip() and len(normalize_answer(f"{gold} x")) > 1:
        assert hit([Passage("0", "", f"{before} {gold} {after}", 1.0)], [gold])


def test_the_experiment_counts_what_each_rule_changes(tmp_path, capsys):
    context = [{"title": "North", "text": text} for text in ("He knows.", "No.", "Yes.")]
    rows = [row(answers=["no", "---"], context=context), row(answers=["3.5", "35", "NO!"]),
            row(answers=["O'Brien", "O\u2019Brien"])]
    scores.main(["--questions", str(write_rows(tmp_path / "s.jsonl", rows))])
    title, _, line = capsys.readouterr().out.splitlines()[:3]
    counts = dict(zip(title.replace("asked ", "asked_").split(), line.split(), strict=True))
    assert counts == {
        "file": "s", "questions": "3", "golds": "7", "emptied": "1", "pairs": "2", "apart": "1",
        "rewritten": "1", "joined": "1", "passages": "3", "hits": "3", "lost": "2",
        "asked_hit": "1", "asked_lost": "0",
    }  # fmt: skip


# ---- titles ----


def test_s5_a_title_is_shown_as_the_corpus_has_it(tmp_path):
    titles = ['"Cauliflower"', "Cauliflower", '"Red" (album)', '""Heroes" (song)"', '"', "", "'x'"]
    rows = [{"id": i, "contents": f"{title}\nIt is."} for i, title in enumerate(titles)]
    corpus = Corpus(write_rows(tmp_path / "c.jsonl", rows))
    for number, title in enumerate(titles):
        passage = corpus.passage(number, 1.0)
        assert passage.title == title
        assert document_block([passage]) == (
            f"\n\n<information>Doc 1(Title: {title}) It is.</information>\n\n")
    names = [corpus.passage(number, 1.0).name for number in range(len(corpus))]
    assert names[:3] == ["Cauliflower", "Cauliflower", '"Red" (album)']
    assert names[3:] == ['"Heroes" (song)', '"', "", "'x'"]
    assert hit([corpus.passage(0, 1.0)], ["cauliflower"])


def test_s5_protocols_that_show_plain_titles_and_generators_show_none_of_the_quotes():
    passage = Passage("0", '"Cauliflower"', "It is.", 1.0)
    assert "Passage #1 Cauliflower\n" in qagent.passage_block([passage])
    (message,) = qagent.generator_messages(Question("q", "q", ("x",), "nq"), [passage])
    assert message["content"].startswith("Cauliflower\nIt is.")


def test_s5_blocks_of_real_passages_are_those_of_search_r1(real_data):
    """Its rule, on the lines of the corpora: the first line is the title, the rest the text."""
    for path in (real_data / "passages").glob("*.jsonl"):
        corpus = Corpus(path)
        passages = [corpus.passage(row, 1.0) for row in range(len(corpus))]
        rows = [json.loads(line)["contents"].split("\n") for line in path.open(encoding="utf-8")]
        for start in range(0, len(rows), 3):
            shown = "".join(
                f"Doc {number}(Title: {title}) {chr(10).join(text)}\n"
                for number, (title, *text) in enumerate(rows[start : start + 3], 1))
            block = document_block(passages[start : start + 3])
            assert block == f"\n\n<information>{shown.strip()}</information>\n\n"


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
