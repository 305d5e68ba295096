"""QAgent: rewards against the paper's formulas, the hack that the published hit pays, generators, the search door.

Run: python -m pytest tests/test_qagent.py
"""

import json
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

import config
import dgpo
import eval as evaluation
import qagent
from data import Question
from episode import Episode, Segment
from model import Tokenizer, load_decoder
from protocol import QAGENT
from qagent import Found, QAgentSettings, collected, generator_messages, has_hit, is_well_formed, within
from retriever import Passage
from rollout import Policy
from settings import TrainSettings, with_defaults

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6  # fp32
SEARCH = "<plan>p</plan>\n<search><query>q</query></search>"
ANSWER = "<reflection>r</reflection>\n<answer> Ann </answer>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "world" / "student")


def played(tokenizer: Tokenizer, *turns: str, passages: tuple[str, ...] = ("nothing",), gold: str = "Ann",
           notices: int = 0) -> Episode:
    """An episode of these turns; each search brought a passage for each text."""
    segments, found = [Segment("prompt", tokenizer.encode("who?"))], []
    for turn in turns:
        segments.append(Segment("agent", tokenizer.encode(turn)))
        if "<search>" in turn:
            found.append([Passage(text, "T", text, 1.0) for text in passages])
            segments.append(Segment("environment", tokenizer.encode(QAGENT.observation(found[-1]))))
        elif "<answer>" not in turn:
            segments.append(Segment("environment", tokenizer.encode(QAGENT.notice)))
    answer = turns[-1].partition("<answer>")[2].partition("</answer>")[0].strip() or None
    status = "answered" if answer else "max_turns"
    return Episode(Question("q", "who?", (gold,), "test"), segments, status, answer, passages=found)


# ---- rewards ----


@pytest.mark.parametrize(("turns", "expected"), [
    ((SEARCH, ANSWER), True), ((SEARCH, "<reflection>r</reflection>" + SEARCH, ANSWER), True),
    (("<answer> Ann </answer>",), True),  # as published: an answer without a search breaks no rule
    (("<search><query>q</query></search>", ANSWER), False),  # no plan
    (("<plan>p</plan> so <search><query>q</query></search>", ANSWER), False),  # not directly
    (("<plan>p<search><query>q</query></search>", ANSWER), False),  # not closed
    (("p</plan><search><query>q</query></search>", ANSWER), False),  # not opened
    ((SEARCH, "<answer> Ann </answer>"), False),  # no reflection
    ((SEARCH, "so <reflection>r</reflection><answer> Ann </answer>"), False),
    ((SEARCH, SEARCH, ANSWER), False), ((SEARCH,), False), (("hm", SEARCH, ANSWER), False),
    ((SEARCH, "<reflection>r</reflection>\n<plan>p</plan>", ANSWER), False),  # a turn without an action
])  # fmt: skip
def test_the_format_is_read_from_the_episode(tokenizer, turns, expected):
    assert is_well_formed(played(tokenizer, *turns), tokenizer) == expected


def test_stage_1_is_format_times_exact_match(tokenizer):
    settings, right, wrong = QAgentSettings(stage=1), (SEARCH, ANSWER), (SEARCH, ANSWER.replace("Ann", "Bob"))
    unformed = (SEARCH, "<answer> Ann </answer>")
    episodes = [played(tokenizer, *turns) for turns in (right, wrong, unformed)]
    assert qagent.rewards(episodes, tokenizer, None, settings) == [1.0, 0.0, 0.0]


def test_stage_2_is_the_generators_answer_and_half_a_hit(tokenizer):
    """{0, 0.5, 1, 1.5} of the paper; what the agent itself answers does not count."""
    episodes = [
        played(tokenizer, SEARCH, ANSWER, passages=("Ann was here",)), played(tokenizer, SEARCH, ANSWER),
        played(tokenizer, SEARCH, passages=("Ann was here",)), played(tokenizer, SEARCH, ANSWER),
    ]  # fmt: skip
    asked = []

    def generator(questions, passages):
        asked.append([[p.text for p in k] for k in passages])
        return ["Ann", "the Ann", "Bob", "Bob"]

    assert qagent.rewards(episodes, tokenizer, generator, QAgentSettings(stage=2)) == [1.5, 1.0, 0.5, 0.0]
    assert asked == [[["Ann was here"], ["nothing"], ["Ann was here"], ["nothing"]]]
    settings = QAgentSettings(stage=2, hit_weight=0.2)
    assert qagent.rewards(episodes[:1], tokenizer, lambda q, k: ["Bob"], settings) == [0.2]
    number = replace(episodes[1], question=Question("q", "?", ("42",), "test", answer_kind="integer"))
    assert qagent.rewards([number], tokenizer, lambda q, k: ["\\boxed{42}"], QAgentSettings(stage=2)) == [1.0]


def test_the_published_hit_pays_guesses_in_the_plan_and_ours_does_not(tokenizer):
    guess = "<plan>Ann or Bob or Cid or Dan</plan>\n<search><query>q</query></search>"
    episode = played(tokenizer, guess, ANSWER.replace("Ann", "Bob"))
    assert has_hit(episode, tokenizer, "trajectory") and not has_hit(episode, tokenizer, "passages")
    hacked = [qagent.rewards([episode], tokenizer, lambda q, k: ["Eve"], QAgentSettings(stage=2, hit_in=where))[0]
              for where in ("trajectory", "passages")]  # fmt: skip
    assert hacked == [0.5, 0.0]
    asked = played(tokenizer, SEARCH, ANSWER.replace("Ann", "Bob"), gold="who")
    assert not has_hit(asked, tokenizer, "trajectory")  # the question is not the agent's


def test_the_published_match_takes_an_answer_within_a_word():
    assert within("I know", ["no"]) == 1.0 and within("It was Ann.", ["ann"]) == 1.0
    assert within("Bob", ["Ann"]) == within(None, ["Ann"]) == within("x", ["The"]) == 0.0


def test_passages_are_collected_once_each_in_the_order_in_which_they_were_found(tokenizer):
    episode = played(tokenizer, SEARCH, ANSWER)
    one, two, three = (Passage(n, n, n, 1.0) for n in "abc")
    episode.passages = [[two, one], [one, three]]
    assert [p.id for p in collected(episode)] == ["b", "a", "c"]


# ---- KL in the loss, mean over episodes ----


def test_kl_in_the_loss_is_k3_of_the_guided_tokens():
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    guide = torch.tensor([-1.5, float("nan"), -0.5])
    zeros, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    found = dgpo.policy_loss(
        logprobs, logprobs.detach(), zeros, mask, clip_eps=0.2, guide_logprobs=guide, kl_weight=0.1)
    gap = -0.5
    assert found.loss.item() == pytest.approx(0.1 * (torch.tensor(gap).exp().item() - gap - 1), abs=TOLERANCE)
    found.loss.backward()
    expected = [0.1 * (1 - torch.tensor(gap).exp().item()), 0.0, 0.0]
    assert logprobs.grad.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_weights_turn_the_sum_over_tokens_into_a_mean_of_means():
    logprobs, zeros = torch.zeros(5), torch.zeros(5)
    advantages, mask = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0]), torch.ones(5, dtype=torch.bool)
    weights = torch.tensor([1 / 4] * 4 + [1.0])
    found = dgpo.policy_loss(logprobs, zeros, advantages, mask, clip_eps=0.2, weights=weights)
    assert found.loss.item() == pytest.approx(-1.0 + 2.0)
    assert dgpo.policy_loss(logprobs, zeros, advantages, mask, clip_eps=0.2).loss.item() == pytest.approx(-2.0)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_is_none_is_refused(stage):
    with pytest.raises(ValueError, match=f"--stage {stage}: expected 1 or 2"):
        with_defaults(TrainSettings(phase="qagent", stage=stage))


# ---- generators ----


def test_a_generator_reads_titles_and_texts_and_nothing_that_is_put_in_is_a_place(tmp_path):
    question = Question("q", "who {passages}?", ("Ann",), "test")
    [message] = generator_messages(question, [Passage("1", "T", "of {question}", 1.0)])
    assert "T\nof {question}" in message["content"] and "Question: who {passages}?" in message["content"]
    (tmp_path / "prompt.txt").write_text("{question}")
    with pytest.raises(ValueError, match="no {passages}"):
        generator_messages(question, [], str(tmp_path / "prompt.txt"))


def test_a_local_generator_answers_in_batch_and_drops_what_does_not_fit(tokenizer, monkeypatch):
    policy = Policy(load_decoder(ROOT / "world" / "student"), tokenizer)
    settings = QAgentSettings(max_context_tokens=400, generator_tokens=5)
    questions = [Question(f"q{i}", "who?", ("Ann",), "test") for i in range(3)]
    long = [Passage(str(i), "T", "word " * 20, 1.0) for i in range(9)]
    shown, real = [], qagent.generate

    def generate(policy, retriever, asked, *rest, **more):
        shown.extend(q.prompt[0]["content"].count("T\n") for q in asked)
        return real(policy, retriever, asked, *rest, **more)

    monkeypatch.setattr(qagent, "generate", generate)
    answers = qagent.local_generator(policy, settings)(questions, [[], long[:1], long])
    assert len(answers) == 3 and shown[:2] == [0, 1] and 1 <= shown[2] < 9
    small = QAgentSettings(max_context_tokens=10, generator_tokens=5)
    assert qagent.local_generator(policy, small)(questions[:1], [[]]) == [""]  # never the prompt itself


def test_what_a_generator_thinks_is_no_part_of_its_answer():
    assert qagent.final_answer("<think> Bob? no </think>\nAnn\n") == "Ann" == qagent.final_answer(" Ann ")
    assert qagent.final_answer("<think> Bob </think>\n<answer> Ann </answer>") == "Ann"
    assert qagent.final_answer("<think> maybe Ann or Bob") == ""  # cut off


class Server(BaseHTTPRequestHandler):
    failures = 0
    asked: list = []
    content: str | None = "<think> Bob? </think> Ann \n"

    def do_POST(self):
        row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(row)
        ok = type(self).failures <= 0
        type(self).failures -= 1
        choice = {"message": {"content": type(self).content}}
        body = json.dumps({"choices": [choice]} if ok else {"error": "busy"}).encode()
        self.send_response(200 if ok else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.failures, Server.asked = 0, []
    http = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1/chat/completions"
    http.shutdown()
    http.server_close()


def test_a_remote_generator_speaks_chat_completions_and_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(qagent.time, "sleep", lambda seconds: None)
    Server.failures = 2
    settings = QAgentSettings(generator=server, generator_model="m", generator_tries=3)
    questions = [Question("q", "who?", ("Ann",), "test")]
    assert qagent.load_generator(settings)(questions, [[Passage("1", "T", "Ann", 1.0)]]) == ["Ann"]
    assert len(Server.asked) == 3
    assert (Server.asked[0]["model"], Server.asked[0]["temperature"]) == ("m", 0)
    assert "T\nAnn" in Server.asked[0]["messages"][0]["content"]


def test_a_remote_generator_that_was_cut_off_while_it_thought_says_nothing(server, monkeypatch):
    monkeypatch.setattr(Server, "content", None)
    ask = qagent.remote_generator(QAgentSettings(generator=server, generator_tries=1))
    assert ask([Question("q", "who?", ("Ann",), "test")], [[]]) == [""]


def test_a_remote_generator_that_keeps_failing_ends_with_its_address(server, monkeypatch):
    monkeypatch.setattr(qagent.time, "sleep", lambda seconds: None)
    Server.failures = 99
    settings = QAgentSettings(generator=server, generator_tries=2)
    with pytest.raises(ConnectionError, match="--generator http://127.*503.* 2 times"):
        qagent.load_generator(settings)([Question("q", "who?", ("Ann",), "test")], [[]])


def test_without_a_generator_the_error_says_what_to_give():
    with pytest.raises(ValueError, match="--generator: got none"):
        qagent.load_generator(QAgentSettings())


# ---- the door ----


@pytest.fixture
def door():
    def look_up(question: str) -> Found:
        if question == "fail":
            raise RuntimeError("the index is away")
        return Found([Passage("1", "T", f"about {question}", 1.0)], [question], "trace")

    http = qagent.serve(look_up, "127.0.0.1", 0)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def post(url: str, body: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_half_a_character_in_a_question_is_no_reason_to_hang_up(door):
    status, found = post(f"{door}/search", b'{"question": "who \\ud800?"}')
    assert status == 200 and found["queries"] == ["who \ufffd?"]


def test_a_question_comes_in_by_the_door_and_passages_and_trace_go_out(door):
    status, found = post(f"{door}/search", json.dumps({"question": "who?"}).encode())
    assert (status, found["queries"], found["trace"]) == (200, ["who?"], "trace")
    assert found["passages"] == [{"id": "1", "title": "T", "text": "about who?"}]


@pytest.mark.parametrize(("path", "body", "status", "message"), [
    ("/other", b"{}", 400, "expected /search"), ("/search", b"not json", 400, "Expecting value"),
    ("/search", b"[]", 400, "expected a text"), ("/search", b'{"question": " "}', 400, "expected a text"),
    ("/search", b'{"question": 3}', 400, "expected a text"), ("/search", b'{"question": "fail"}', 500, "index is away"),
    ("/search", json.dumps({"question": "x" * 5000}).encode(), 400, "at most 4000"),
    ("/search", b" " * 70_000, 400, "Content-Length"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_its_reason(door, path, body, status, message):
    got, found = post(door + path, body)
    assert got == status and message in found["error"]


def test_a_search_whose_retriever_fails_is_an_error_and_not_an_empty_result(tokenizer, monkeypatch):
    failed = Episode(Question("q", "who?", (), "asked"), [], "search_error")
    monkeypatch.setattr(qagent, "generate", lambda *given, **more: [failed])
    with pytest.raises(ConnectionError, match="the retriever failed"):
        qagent.search("who?", Policy(None, tokenizer), None, QAgentSettings())


# ---- measures as a submodule ----


class Shelf:
    def search(self, queries, top_k):
        return [[Passage(str(i), "T", f"{query} {i}", 1.0) for i in range(top_k)] for query in queries]


def test_naive_passages_are_one_search_and_generators_are_scored_side_by_side(monkeypatch):
    sets = {"nq": [Question("a", "who?", ("who? 4",), "nq"), Question("b", "when?", ("1900",), "nq")],
            "popqa": [Question("a", "where?", ("where? 0",), "popqa")]}
    readers = {"last": lambda questions, found: [k[-1].text if k else "" for k in found],
               "all": lambda questions, found: [" ".join(p.text for p in k) for k in found]}
    result = qagent.measure(None, Shelf(), sets, readers, qagent.SearchSettings(passages="naive"))
    nq, average = result["sets"]["nq"], result["average"]
    assert (nq["em last"], nq["within last"], nq["em all"], nq["within all"]) == (0.5, 0.5, 0.0, 0.5)
    assert (nq["hit"], nq["passages"], nq["queries"], result["sets"]["popqa"]["em last"]) == (0.5, 5.0, 1.0, 0.0)
    assert average["within all"] == 0.75 and len(result["rows"]) == 3  # the mean over sets, not over questions
    context = [{"title": "T", "text": "who? 4", "is_supporting": True},
               {"title": "U", "text": "what?", "is_supporting": False}]  # fmt: skip
    gold = {"nq": [replace(sets["nq"][0], context=context)]}
    monkeypatch.setattr(Shelf, "corpus", (), raising=False)
    best = qagent.measure(None, Shelf(), gold, readers, qagent.SearchSettings(passages="gold"))["average"]
    assert (best["passages"], best["em last"], best["em all"]) == (1.0, 1.0, 1.0)
    nothing = qagent.measure(None, None, sets, readers, qagent.SearchSettings(passages="none"))
    assert nothing["average"]["passages"] == nothing["average"]["hit"] == nothing["average"]["em last"] == 0.0
    assert "em last" in qagent.measure_table({"name": "naive"} | result)


def test_an_agents_passages_are_measured_with_its_own_answers(tokenizer, monkeypatch):
    episode = played(tokenizer, SEARCH, ANSWER, passages=("by Ann", "by Bob"))
    episode.queries = ["q", "r"]
    monkeypatch.setattr(qagent, "generate", lambda policy, retriever, questions, *given, **more: [episode])
    sets = {"test": [episode.question]}
    generators = {"first": lambda questions, found: [found[0][0].text.removeprefix("by ")]}
    found = qagent.measure(None, None, sets, generators, qagent.SearchSettings())["average"]
    assert (found["em first"], found["hit"], found["passages"], found["queries"]) == (1.0, 1.0, 2.0, 2.0)
    assert (found["agent_em"], found["agent_f1"], found["searches"]) == (1.0, 1.0, 1.0)


def test_measure_writes_what_it_prints(tmp_path, capsys):
    student, teacher = (str(ROOT / "world" / name) for name in ("student", "teacher"))
    given = ["measure", "--passages", "none", "--limit", "1", "--generator-tokens", "4", "--out", str(tmp_path),
             "--questions", str(ROOT / "world" / "questions" / "nq.jsonl")]  # fmt: skip
    qagent.main([*given, "--generators", student, teacher, "--dtype", "bfloat16"])
    found = json.loads((tmp_path / "submodule.json").read_text())
    assert {"em student", "em teacher", "within teacher"} <= set(found["average"]) and found["name"] == "none"
    assert len((tmp_path / "submodule.jsonl").read_text().splitlines()) == 1
    assert "em teacher" in capsys.readouterr().out
    with pytest.raises(ValueError, match="names that differ"):
        qagent.main([*given, "--generators", student, student])
    with pytest.raises(ValueError, match="--generator: got none"):
        qagent.main(given)


def test_the_preset_of_qagent_serves_training_search_and_evaluation():
    presets = ["--config", str(ROOT / "configs" / "paper.toml"), str(ROOT / "configs" / "qagent.toml")]
    trained = config.load(TrainSettings, presets, prog="train.py", description="")
    assert (trained.phase, trained.group_size, trained.kl_in) == ("qagent", 5, "loss")
    for cls, prog, shared in ((qagent.SearchSettings, "qagent.py search", qagent.SHARED),
                              (evaluation.EvalSettings, "eval.py", evaluation.SHARED)):  # fmt: skip
        found = config.load(cls, presets, prog=prog, description="", shared=shared)
        assert (found.protocol, found.prompt, found.max_turns, found.top_k) == ("qagent", "qagent", 5, 1)
        assert found.max_new_tokens == 512 and found.temperature == 0
