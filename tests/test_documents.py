"""Own documents: what is read of them, passages, an index that grows, questions that are checked.

Run: python -m pytest tests/test_documents.py
"""

import json
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest

import documents
from data import Passage
from documents import IndexSettings, QuestionSettings, passages_of, problem_of, read_pairs
from encoder import Encoder
from episode import Episode, Segment, load_episodes
from formats.documents import Section, read_document
from model import Tokenizer
from retrieval.build import build
from retriever import Retriever
from tests.support.mini import read_rows

SIZE, SIZE_OF_MINI = 24, 48  # tokens of a passage; the miniature encoder reads 64


def count(text: str) -> int:
    """A token a word, and one for each four letters of a longer one."""
    return sum(-(-len(word) // 4) for word in text.split())


# ---- what is read ----


def sections(folder: Path, name: str, text: str | bytes) -> list[Section]:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_document(path)


def test_markdown_has_a_section_for_each_heading_and_code_in_one_piece(tmp_path):
    text = ("before\n\n# Big [one](http://x)\n\nfirst ![pic](p.png) line\nsecond\n\nthird\n\n"
            "## Small ##\n```\n# no heading\n\n[a](b)\n```\n\nlast\n")
    assert sections(tmp_path, "a.md", text) == [
        Section("Big one", ["before"]), Section("Big one", ["first pic line\nsecond", "third"]),
        Section("Big one: Small", ["```\n# no heading\n\n[a](b)\n```", "last"])]  # fmt: skip


@pytest.mark.parametrize(("front", "title"), [
    ("---\ntitle: npm-ci\nsection: 1\n---\n\n", "npm-ci"),
    ('---\r\nsection: 1\r\ntitle: "A: b"\r\n---\r\n', "A: b"),
    ("---\nsubtitle: x\n...\n", "Use"), ("---\n---\n", "Use"), ("---\ntitle:\n---\n", "Use"),
    ("", "Use"),
])  # fmt: skip
def test_what_stands_before_a_text_of_markdown_may_name_it(tmp_path, front, title):
    name = "Use" if title == "Use" else f"{title}: Use"
    assert sections(tmp_path, "a.md", f"{front}# Use\ntext\n") == [Section(name, ["text"])]


@pytest.mark.parametrize("text", ["---\ntitle: no\n\ntext", "---\nA rule: no\n\n---\ntext"])
def test_a_line_at_the_top_of_markdown_does_not_hide_text(tmp_path, text):
    assert sections(tmp_path, "a.md", text) == [Section("a", text.split("\n\n"))]


PAGE = """<!doctype html><html><head><title>The &amp; book</title><style>p { }</style></head>
<body><nav><p>Menu<p>Next</nav><p>outside</p><main><h1>The &amp; book</h1><p>One
  <b>bold</b> text<p>two<ul><li>item</ul><h2>Next <i>part</i></h2><pre>a = 1
  b = 2</pre><script>alert("no")</script><p>end</p></main><p>after</p></body></html>"""


def test_html_is_the_text_of_its_main_part_without_menus_and_scripts(tmp_path):
    assert sections(tmp_path, "a.html", PAGE) == [
        Section("The & book", ["One bold text", "two", "item"]),
        Section("The & book: Next part", ["a = 1\n  b = 2", "end"])]
    plain = PAGE.replace("<main>", "").replace("</main>", "").replace("<title>", "<title >")
    assert sections(tmp_path, "b.HTM", plain)[0].paragraphs == ["outside"]
    assert sections(tmp_path, "b.HTM", plain)[-1].paragraphs[-1] == "after"


def test_text_and_json_lines_are_read_as_corpora_are(tmp_path):
    assert sections(tmp_path, "LICENCE-2.0", "a\nb\n\n \n\nc") == [
        Section("LICENCE-2", ["a\nb", "c"])]
    rows = '{"title": "T", "text": "x\\n\\ny"}\n\n{"id": 7, "text": "z"}\n'
    assert sections(tmp_path, "rows.jsonl", rows) == [
        Section("T", ["x", "y"]), Section("rows 7", ["z"])]


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("a.png", b"x", "png files are not read"), ("a.txt", b"\xff\xfe", "it is UTF-16"),
    ("a.txt", b"caf\xe9", "not UTF-8"), ("a.txt", b"a\0b", "not text"),
    ("a.md", b" \n\n", "no text"), ("a.html", b"<nav>x</nav>", "no text"),
    ("a.jsonl", b'{"id": 1}\n', "line 1"), ("a.jsonl", b"{\n", "line 1"),
    ("a.txt", b"\x1f\x8b", "it is gzip"),
])  # fmt: skip
def test_what_is_not_read_says_why(tmp_path, name, text, reason):
    with pytest.raises(ValueError, match=reason):
        sections(tmp_path, name, text)


def test_a_pdf_has_a_section_for_each_page(tmp_path, monkeypatch):
    def pages(path):
        if b"bad" in Path(path).read_bytes():
            raise KeyError("xref")
        texts = ["A line that is di-\nvided, well-\nKnown.\n\nNext", ""]
        made = [types.SimpleNamespace(extract_text=lambda text=text: text) for text in texts]
        return types.SimpleNamespace(pages=made, metadata={"/Title": "Paper"})

    monkeypatch.setitem(sys.modules, "pypdf", types.SimpleNamespace(PdfReader=pages))
    assert sections(tmp_path, "a.pdf", b"%PDF") == [
        Section("Paper, page 1", ["A line that is divided, well- Known.", "Next"])]
    with pytest.raises(ValueError, match="pypdf: KeyError"):
        sections(tmp_path, "a.pdf", b"bad")
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(ValueError, match="pip install pypdf"):
        sections(tmp_path, "a.pdf", b"%PDF")


# ---- passages ----


def test_passages_hold_all_words_in_order_and_no_more_than_their_size():
    paragraphs = [f"w{i} " * n + "end." for i, n in enumerate((3, 4, 30, 2, 9, 1))]
    paragraphs += ["One two. " * 12, "one two " + "x" * 300, "short"]
    made = [*passages_of(Section("A title", paragraphs), SIZE, 0, count)]
    words = " ".join(text for _, text in made).split()
    assert "".join(words) == "".join("".join(paragraphs).split())
    assert all(count(f'"{title}"') + count(text) <= SIZE for title, text in made)
    assert {title for title, _ in made} == {"A title"} and len(made) > 8
    assert made[0][1] == paragraphs[0] + "\n" + paragraphs[1]  # at the borders of paragraphs


def test_a_passage_begins_with_the_end_of_the_one_before_it():
    paragraphs = [f"p{i} a b c d" for i in range(9)]  # five tokens each
    made = [text for _, text in passages_of(Section("T", paragraphs), SIZE, 6, count)]
    for before, after in zip(made, made[1:], strict=False):
        assert before.split("\n")[-1] == after.split("\n")[0]  # one part fits, not two
    assert {line for text in made for line in text.split("\n")} == set(paragraphs)
    assert len(made) == len({*made})
    wide = ["a b c d", " ".join("w" * 20)] * 3  # no room for a repeated part beside the second
    assert all(count('"T"') + count(text) <= SIZE
               for _, text in passages_of(Section("T", wide), SIZE, 6, count))


def test_a_long_title_leaves_room_for_the_text():
    [(title, text)] = passages_of(Section("word " * 40, ["some text"]), SIZE, 0, count)
    assert 0 < count(title) <= SIZE // 4 and text == "some text"
    [(title, text)] = passages_of(Section("x" * 400, ["some text"]), SIZE, 0, count)
    assert 0 < count(title) <= SIZE // 4


# ---- an index ----


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "docs"
    (place / "sub").mkdir(parents=True)
    for i in range(4):
        words = "".join(f"fact {i} number {n} is red.\n\n" for n in range(6))
        (place / f"{i}.md").write_text(f"# Title {i}\n\n{words}")
    (place / "sub" / "page.html").write_text("<title>Page</title><p>a green fact")
    (place / "picture.png").write_bytes(b"\x89PNG")
    (place / ".hidden").mkdir()
    (place / ".hidden" / "a.txt").write_text("secret")
    return place


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """The passages that are embedded, query vectors and checks left out."""
    texts, real = [], Encoder.embed

    def embed(self, part, *, kind, **more):
        if "progress" in more:
            texts.extend(part)
        return real(self, part, kind=kind, **more)

    monkeypatch.setattr(Encoder, "embed", embed)
    return texts


def settings(mini, folder: Path, **changes) -> IndexSettings:
    values = {"folder": str(folder), "out": str(folder.parent / "own"), "overlap": 6,
              "size": SIZE_OF_MINI, "encoder": str(mini / "encoder")}  # fmt: skip
    return IndexSettings(**{**values, **changes})


def test_a_folder_becomes_an_index_that_every_program_takes(mini, folder, capsys):
    documents.write_index(settings(mini, folder))
    captured = capsys.readouterr()
    assert "5 files (5 of them new or changed)" in captured.out
    assert "skipped 1: .png files are not read (picture.png)" in captured.err
    own = folder.parent / "own"
    record = json.loads((own / "documents.json").read_text())
    assert sorted(record["read"]) == ["0.md", "1.md", "2.md", "3.md", "sub/page.html"]
    preset = tomllib.loads((own / "own.toml").read_text())
    loaded = Retriever.load(preset["corpus"], preset["encoder"], index=preset["index"])
    first = loaded.corpus.passage(0, 0.0)
    assert (first.id, first.title) == ("0.md#0", '"Title 0"')
    assert first.text.startswith("fact 0 number 0 is red.")
    assert len(loaded.search(["red"], 3)[0]) == 3
    assert {row["id"].partition("#")[0] for row in read_rows(own / "corpus.jsonl")} == {
        *record["read"]}
    assert not [*own.glob(".*.npz")]
    build(own / "corpus.jsonl", str(mini / "encoder"), own)  # what it would write is there
    captured = capsys.readouterr().err
    assert "passages are embedded already" in captured and "built again" not in captured


def test_only_passages_that_changed_are_embedded_again(mini, folder, embedded, capsys):
    documents.write_index(settings(mini, folder))
    num = len(embedded)
    embedded.clear()
    documents.write_index(settings(mini, folder))
    assert embedded == [] and "0 of them new or changed), 0 embedded" in capsys.readouterr().out
    (folder / "1.md").write_text("# New\n\nquite another text")
    (folder / "2.md").unlink()
    documents.write_index(settings(mini, folder))
    assert embedded == ['"New"\nquite another text']
    own = folder.parent / "own"
    rows, vectors = read_rows(own / "corpus.jsonl"), np.load(own / "embeddings.npy")
    assert not [row for row in rows if row["id"].startswith("2.md")]
    documents.write_index(settings(mini, folder, out=str(folder.parent / "fresh")))
    again = np.load(folder.parent / "fresh" / "embeddings.npy")
    np.testing.assert_allclose(vectors.astype(float), again.astype(float), atol=2e-3)
    embedded.clear()
    path = own / "index.json"
    path.write_text(path.read_text().replace('"weights": "', '"weights": "0'))  # of another encoder
    documents.write_index(settings(mini, folder))
    assert len(embedded) == len({row["contents"] for row in rows}) < num + 1


@pytest.mark.parametrize("moment", ["embed", "facts"])
def test_an_index_that_is_interrupted_goes_on(mini, folder, embedded, monkeypatch, moment):
    monkeypatch.setattr(documents, "BLOCK", 4)
    whole = settings(mini, folder, out=str(folder.parent / "whole"))
    documents.write_index(whole)
    num, before = len(embedded), settings(mini, folder)
    if moment == "facts":  # vectors of an older index are kept as well
        (folder / "4.md").write_text("# Five\n\nsoon gone")
        documents.write_index(before)
        (folder / "4.md").unlink()
    embedded.clear()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "facts":
            patch.setattr(documents, "write_facts", stop)
        else:
            keep = documents.keep_block
            patch.setattr(documents, "keep_block",
                          lambda *a: stop() if len(embedded) > 8 else keep(*a))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            documents.write_index(before)
    assert not (folder.parent / "own" / "index.json").exists()
    embedded.clear()
    documents.write_index(before)
    assert len(embedded) == (0 if moment == "facts" else num - 8)
    for name in ("corpus.jsonl", "embeddings.npy"):
        assert (folder.parent / "own" / name).read_bytes() == (
            folder.parent / "whole" / name).read_bytes()  # fmt: skip


def test_a_folder_inside_which_the_index_lies_does_not_read_the_index(mini, folder):
    for _ in range(2):
        documents.write_index(settings(mini, folder, out=str(folder / "own")))
    read = json.loads((folder / "own" / "documents.json").read_text())["read"]
    assert not [name for name in read if name.startswith("own/")]


def test_a_size_a_device_and_a_folder_that_cannot_be_used_are_refused(mini, folder):
    with pytest.raises(ValueError, match="--size 500.*tokens that.*reads of a passage"):
        documents.write_index(settings(mini, folder, size=500))
    with pytest.raises(ValueError, match="--device: got 'cuda:99'"):
        documents.write_index(settings(mini, folder, device="cuda:99"))
    (folder / "empty").mkdir()
    (folder / "empty" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="got 1 files, none of which can be read"):
        documents.write_index(settings(mini, folder / "empty"))


# ---- questions ----

PASSAGE = Passage("a#0", '"Bridge"', "It was opened in July 2000 by the queen.", 0.0)


@pytest.mark.parametrize(("text", "pairs"), [
    ("Question: Who?\nAnswer: the queen.", [("Who?", "the queen")]),
    ('Sure!\nQuestion:  Who ? \n\n Answer: "July 2000"\nMore', [("Who ?", "July 2000")]),
    ("1. Question: Who?\nAnswer: `a`\n\nQuestion 2: When?\nAnswer 2: 2000\nQuestion: Cut",
     [("Who?", "a"), ("When?", "2000")]),
    ("Question: Who?", []), ("Answer: x\nQuestion: y", []), ("Question:\nAnswer: x", []),
])  # fmt: skip
def test_pairs_are_read_from_what_a_model_writes(text, pairs):
    assert read_pairs(text) == pairs


def test_the_example_of_a_writer_is_what_is_asked_for():
    title, _, text = documents.EXAMPLE[0].partition("\n")
    pairs = read_pairs(documents.EXAMPLE[1])
    passage = Passage("a#0", f'"{title}"', text, 0.0)
    assert [problem_of(*pair, passage) for pair in pairs] == ["", "", ""]


@pytest.mark.parametrize(("question", "answer", "problem"), [
    ("When was the Bridge opened?", "July 2000", ""),
    ("When was it opened?", "in  JULY 2000", ""),
    ("When was it opened?", "June 2000", "does not stand"), ("Who?", "ueen", "does not stand"),
    ("What is its name?", "Bridge", "does not stand"),  # its title alone
    ("Who opened it in July 2000?", "July 2000", "away"),
    ("Who?", "", "is empty"), ("Who?", "it was opened in july 2000 by the queen it", "more than 8"),
    ("Was it?", "No", "yes or no"), ("Who does the passage name?", "the queen", "its passage"),
])  # fmt: skip
def test_a_pair_is_dropped_for_a_reason(question, answer, problem):
    got = problem_of(question, answer, PASSAGE)
    assert problem in got and bool(problem) == bool(got)


class Shelf:
    """Finds the passages that share a word with the query, in order."""

    def __init__(self, passages: list[Passage]) -> None:
        self.passages = passages

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        return [[p for p in self.passages if {*p.text.lower().split()} & {*q.lower().split()}]
                [:top_k] for q in queries]  # fmt: skip


def test_a_question_is_kept_if_it_finds_its_passage():
    first, second = PASSAGE, Passage("b#0", '"T"', "The tower was built by monks", 0.0)
    write = "Question: {}\nAnswer: {}".format
    three = [write(q, "monks") for q in ("who built the", "the tower opened it", "nothing")]
    drafts = [(first, write("when opened", "July 2000")), (second, "\n\n".join(three)),
              (first, write("When  opened?", "the queen")), (first, "no")]  # fmt: skip
    rows, dropped = documents.check_pairs(drafts, Shelf([first, second]), 1)
    assert [(row["id"], row["golden_answers"]) for row in rows] == [("a#0/1", ["July 2000"])]
    assert rows[0]["context"] == [
        {"title": "Bridge", "text": first.text, "is_supporting": True}]
    assert dropped == {"the passage is not among the 1 that the question finds": 3,
                       "the question was written before": 1,
                       "no question and answer were written": 1}  # fmt: skip
    twins = [first._replace(id="c#0", title='"Other"'), first._replace(id="d#0")]
    rows, _ = documents.check_pairs(drafts[:1], Shelf(twins), 2)  # the same text elsewhere
    assert [c["is_supporting"] for c in rows[0]["context"]] == [True, False]
    rows, _ = documents.check_pairs(drafts, Shelf([first, second]), 2)
    assert [row["id"] for row in rows] == ["a#0/1", "b#0/1", "b#0/2"]
    assert [c["is_supporting"] for c in rows[1]["context"]] == [False, True]


@pytest.fixture
def asked(mini, folder, monkeypatch) -> list[tuple]:
    """An index of the folder; the calls of a `generate` that writes two pairs for a passage."""
    documents.write_index(settings(mini, folder))
    calls = []

    def generate(policy, retriever, questions, rules, *, seed, first_episode, protocol):
        calls.append((first_episode, len(questions), seed, rules.temperature, rules.max_turns))
        episodes = []
        for question in questions:
            text = question.prompt[-1]["content"].rpartition("Passage: ")[2]
            number = text.partition("number ")[2].partition(" ")[0]
            told = "\n\n".join(f"Question: {word} is {question.id}?\nAnswer: number {number}"
                               for word in ("what", "which"))
            ids = policy.tokenizer.encode(told)
            episodes.append(Episode(question, [Segment("agent", ids)], "invalid"))
        return episodes

    monkeypatch.setattr(documents, "generate", generate)
    return calls


def question_settings(mini, folder: Path, **changes) -> QuestionSettings:
    values = {"index": str(folder.parent / "own"), "model": str(mini / "student"), "top_k": 200,
              "min_words": 5, "rollout_rows": 4, "test_share": 0.4}  # fmt: skip
    return QuestionSettings(**{**values, **changes})


def supporting(row: dict) -> str:
    [text] = [c["text"] for c in row["context"] if c["is_supporting"]]
    return text


def test_questions_are_written_checked_and_split_by_passage(mini, folder, asked, capsys):
    documents.write_questions(question_settings(mini, folder))
    own = folder.parent / "own"
    learn, test = read_rows(own / "questions.jsonl"), read_rows(own / "test.jsonl")
    num = len(read_rows(own / "corpus.jsonl")) - 1  # one has too few words
    assert len(learn) + len(test) == 2 * num and len(test) > 0.2 * num
    names = [{supporting(row) for row in part} for part in (learn, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == num
    assert f"kept {2 * num} pairs from {num} passages" in capsys.readouterr().out
    tokenizer = Tokenizer.load(mini / "student")
    episodes = load_episodes(own / "episodes.jsonl", tokenizer, prompt="short")
    assert [e.question.id for e in episodes] == [row["id"] for row in learn]
    for episode, row in zip(episodes, learn, strict=True):
        answer = tokenizer.decode(episode.segments[-1].ids)
        assert f"<answer> {row['golden_answers'][0]} </answer>" in answer
    preset = tomllib.loads((own / "own.toml").read_text())
    assert preset["questions"] == str((own / "questions.jsonl").resolve())
    assert {call[2:] for call in asked} == {(0, 0.7, 0)}
    documents.write_questions(question_settings(mini, folder, test_share=0.0))
    assert read_rows(own / "test.jsonl") == []


def test_pairs_that_were_written_before_an_interruption_are_kept(mini, folder, asked, monkeypatch):
    own, write = folder.parent / "own", documents.generate

    def interrupted(*arguments, **more):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return write(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(documents, "generate", interrupted)
        documents.write_questions(question_settings(mini, folder, num=10))
    with (own / "drafts.jsonl").open("a") as file:
        file.write('{"text": "torn')
    documents.write_questions(question_settings(mini, folder, num=10))
    assert [call[:2] for call in asked] == [(0, 4), (4, 4), (8, 2)]
    asked.clear()
    for num in (3, 11):
        documents.write_questions(question_settings(mini, folder, num=num))
    assert [call[:2] for call in asked] == [(10, 1)]  # more of the same
    asked.clear()
    documents.write_questions(question_settings(mini, folder, num=10, seed=1))  # other passages
    assert [call[:2] for call in asked] == [(0, 4), (4, 4), (8, 2)]


def test_a_model_that_writes_no_pair_that_holds_is_refused(
    mini, folder, asked, monkeypatch, capsys
):
    monkeypatch.setattr(documents, "read_pairs", lambda text: [])
    with pytest.raises(ValueError, match="none of whose pairs holds.*give a larger model"):
        documents.write_questions(question_settings(mini, folder, num=3))
    assert "dropped 3: no question and answer" in capsys.readouterr().out
    assert not (folder.parent / "own" / "questions.jsonl").exists()


def test_an_index_without_a_passage_of_enough_words_is_refused(mini, folder, asked):
    with pytest.raises(ValueError, match="--device: got 'cuda:99'"):
        documents.write_questions(question_settings(mini, folder, device="cuda:99"))
    with pytest.raises(ValueError, match="--min-words 900: got no passage"):
        documents.write_questions(question_settings(mini, folder, min_words=900))
