"""Asking an agent: a trace while it is written, chats, and files of questions.

Run: python -m pytest tests/test_ask.py
"""

import io
import json

import pytest

from data import Passage, Question
from episode import SEARCH_R1, Episode, Segment, episode_text
from rollout import load_protocol
from serving import ask
from serving.ask import Brief, Trace, answer, as_record, read_questions, watched
from tests.support.mini import read_rows
from tests.support.scripted import SEARCH_THEN_ANSWER, FixedRetriever, scripted_policy

QUESTIONS = [f"which number has fact {i}" for i in range(5)]


def settings(**changes) -> ask.AskSettings:
    return ask.AskSettings(max_new_tokens=200, max_context_tokens=2000, prompt="short", **changes)


def flags(mini, *more: str) -> list[str]:
    return ["ask", "--config", f"{mini}/mini.toml", "--model", f"{mini}/student", *more]


# ---- one question ----


def test_an_episode_is_printed_while_it_is_written(tokenizer, capsys):
    script = SEARCH_THEN_ANSWER.replace("hm", "caf\u00e9")
    policy = scripted_policy(tokenizer, {"ask-a": script})
    texts, whole = [], []

    class Spy(Trace):
        def see(self, episode):
            super().see(episode)
            texts.append(capsys.readouterr().out)
            whole.append(len(episode.ids))

    episode = answer(policy, FixedRetriever(), "ask-a", settings(), Spy(tokenizer))
    texts.append(capsys.readouterr().out)
    assert "".join(texts) == episode_text(episode, tokenizer) + "\n"
    assert texts[-1].startswith(">\n  [answered; answer 'gold'")  # all but the last token was there
    assert len(texts) == episode.num_agent_tokens - 2 + 1  # but for the tokens that end a turn
    assert sum(map(bool, texts)) > 0.9 * len(texts)  # token by token
    assert "\u00e9" in "".join(texts) and "\ufffd" not in "".join(texts)
    assert whole == sorted(whole)

    def interrupt(episode, tokenizer):
        return Segment("environment", [1])

    inner = SEARCH_R1._replace(interrupt=interrupt)
    assert watched(inner, print).interrupt(episode, tokenizer) == Segment("environment", [1])
    assert watched(SEARCH_R1, print).interrupt(episode, tokenizer) is None


def test_a_text_that_a_later_token_changes_is_shown_whole_at_the_end(tokenizer, capsys):
    trace = Trace(tokenizer)
    trace.printed = "| something else"
    episode = Episode(Question("a", "b", (), "c"), [Segment("agent", tokenizer.encode("hi"))],
                      "invalid")  # fmt: skip
    trace.see(episode)
    assert capsys.readouterr().out == ""
    trace.end(episode)
    assert capsys.readouterr().out == "\n" + episode_text(episode, tokenizer) + "\n"


def test_an_answer_as_json_says_what_it_rests_on(tokenizer, capsys):
    policy = scripted_policy(tokenizer, {"ask-a": SEARCH_THEN_ANSWER})
    episode = answer(policy, FixedRetriever(), "ask-a", settings(json=True), Trace(tokenizer))
    [line] = capsys.readouterr().out.splitlines()
    row = json.loads(line)
    assert row["answer"] == "gold" and row["status"] == "answered" and row["queries"] == ["q1"]
    assert row["trace"] == episode_text(episode, tokenizer) and row["seconds"] >= 0
    assert row["passages"] and row["passages"][0].keys() == {"id", "title", "text"}
    assert "score" not in row and row["question"] == "ask-a"
    passage = Passage("7", '"T"', "x", 0.5)
    known = Episode(Question("a", "b", ("gold",), "c"), [], "answered", "gold",
                    passages=[[passage], [passage]])  # fmt: skip
    record = as_record(known)
    assert record["score"] == 1.0
    assert record["passages"] == [{"id": "7", "title": "T", "text": "x"}]


# ---- a chat ----


def test_a_chat_answers_each_line_for_itself(mini, monkeypatch, capsys):
    seen = []

    def generate(policy, retriever, questions, settings, *, seed, first_episode, protocol):
        [question] = questions
        ids = policy.tokenizer.encode(f"<answer>{question.question}!</answer>")
        episode = Episode(question, [Segment("agent", ids)], "answered", question.question + "!")
        episode.queries = ["a query"]
        seen.append((question.question, first_episode, id(policy.decoder)))
        return [episode]

    monkeypatch.setattr(ask, "generate", generate)
    monkeypatch.setattr("sys.stdin", io.StringIO("/trace\nwho\n\n  when \n/trace\n"))
    ask.main(flags(mini, "--interactive"))
    printed = capsys.readouterr().out
    assert [row[:2] for row in seen] == [("who", 0), ("when", 1)]
    assert len({row[2] for row in seen}) == 1  # the model stays loaded
    assert printed.startswith("no question so far\n  searched: a query\nwho!\n\n  searched:")
    assert printed.endswith("| <answer>when!</answer>\n"
                            "  [answered; answer 'when!'; gold unknown]\n")  # fmt: skip


def test_ctrl_c_stops_an_answer_and_not_the_chat(tokenizer, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal("who\n/trace\n"))
    monkeypatch.setattr(ask, "generate", interrupted)
    policy = scripted_policy(tokenizer, {})
    ask.chat(policy, None, settings(max_turns=0))
    assert "(stopped)" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("who\n"))  # a pipe ends
    with pytest.raises(KeyboardInterrupt):
        ask.chat(policy, None, settings(max_turns=0))


def test_an_episode_without_an_answer_says_how_it_ended(capsys):
    brief = Brief()
    episode = Episode(Question("a", "b", (), "c"), [], "max_turns", queries=["x"])
    brief.see(episode)
    episode.queries.append("y")
    brief.end(episode)
    assert capsys.readouterr().out == "  searched: x\n  searched: y\n(max_turns)\n\n"


# ---- files ----


def test_questions_are_read_from_json_lines_csv_and_plain_lines(tmp_path):
    plain, table, lines = (tmp_path / f"q.{kind}" for kind in ("txt", "csv", "jsonl"))
    plain.write_text("who?\n\n  when? \n")
    table.write_text('id,question,note\na,"who, then?",x\nb,"two\nlines",y\n')
    lines.write_text('{"question": "who", "golden_answers": ["me"]}\n{"id": 7, "question": "x"}\n')
    read = {path: [(q.id, q.question, q.golden_answers) for q in read_questions(path)]
            for path in (plain, table, lines)}  # fmt: skip
    assert read[plain] == [("1", "who?", ()), ("2", "when?", ())]
    assert read[table] == [("a", "who, then?", ()), ("b", "two\nlines", ())]
    assert read[lines] == [("1", "who", ("me",)), ("7", "x", ())]
    for path, text in ((table, "query\nwho\n"), (lines, '{"question": 3}\n'), (plain, "\n")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path.name}.*got .*expected"):
            read_questions(path)


def test_a_file_is_answered_as_if_it_had_never_been_interrupted(mini, tmp_path, monkeypatch):
    questions = tmp_path / "q.txt"
    questions.write_text("\n".join(QUESTIONS))
    more = ["--questions", str(questions), "--temperature", "1", "--rollout-rows", "2", "--out"]
    ask.main(flags(mini, *more, str(tmp_path / "whole.jsonl")))
    whole = (tmp_path / "whole.jsonl").read_text()
    rows = read_rows(tmp_path / "whole.jsonl")
    assert [row["question"] for row in rows] == QUESTIONS and "score" not in rows[0]

    real, calls = ask.generate, []

    def fails(*arguments, **options):
        calls.append((options["first_episode"], len(arguments[2])))  # its noise, its size
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(ask, "generate", fails)
    out = tmp_path / "part.jsonl"
    with pytest.raises(SystemExit):
        ask.main(flags(mini, *more, str(out)))
    assert whole.startswith(out.read_text()) and len(read_rows(out)) == 2
    with out.open("a") as file:
        file.write('{"id": "3", "quest')  # a machine that stopped
    ask.main(flags(mini, *more, str(out)))
    assert out.read_text() == whole and calls == [(0, 2), (2, 2), (2, 2), (4, 1)]
    ask.main(flags(mini, *more, str(out)))  # nothing is left to do
    assert out.read_text() == whole and len(calls) == 4


def test_answers_of_other_settings_or_questions_are_not_gone_on_with(mini, tmp_path, capsys):
    questions, out = tmp_path / "q.txt", tmp_path / "a.jsonl"
    questions.write_text("\n".join(QUESTIONS[:2]))
    more = ["--questions", str(questions), "--out", str(out), "--max-turns", "0"]
    ask.main(flags(mini, *more))
    before = out.read_text()
    with pytest.raises(SystemExit):
        ask.main(flags(mini, *more, "--seed", "3"))
    assert "--seed 0, now 3" in capsys.readouterr().err
    questions.write_text("another\n")
    with pytest.raises(SystemExit):
        ask.main(flags(mini, *more))
    assert "other questions" in capsys.readouterr().err and out.read_text() == before
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        ask.main(flags(mini, "--questions", str(questions), "--out",
                       str(tmp_path / "foreign.jsonl")))  # fmt: skip
    assert "give what it was made with, or another --out" in capsys.readouterr().err


@pytest.mark.parametrize("more, part", [
    (["who", "--interactive"], "got --question and --interactive"),
    (["--questions", "q.txt"], "--out: got one of"),
    (["who", "--out", "x"], "--out: got one of"),
    (["--questions", "nowhere.txt", "--out", "x"], "nowhere.txt"),
    (["who", "--device", "cuda:99"], "--device: got 'cuda:99', expected auto or a device"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(mini, more, part, capsys):
    with pytest.raises(SystemExit):
        ask.main(flags(mini, *more))
    assert part in capsys.readouterr().err
    assert load_protocol("search-r1") is SEARCH_R1
