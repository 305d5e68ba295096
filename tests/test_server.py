"""The server of an agent: one engine for many clients, streams, chats, and clients that leave.

Run: python -m pytest tests/test_server.py
"""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import server
from data import Question, load_questions
from episode import Episode, Segment, episode_text
from infra.http import Refused
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate
from serving.engine import Pieces, SharedEngine
from session import load_policy, save_policy
from tests.support.chromium import evaluate
from tests.support.scripted import (
    SEARCH_THEN_ANSWER,
    FixedRetriever,
    ScriptedDecoder,
    scripted_policy,
)

ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "world"
LONG = "<think>" + "hm, " * 40 + "</think><answer> late </answer>"
SCRIPTS = {"ask-a": SEARCH_THEN_ANSWER, "ask-b": "<answer> soon </answer>", "ask-long": LONG}
SETTINGS = {"max_new_tokens": 300, "max_context_tokens": 900, "max_obs_tokens": 120, "top_k": 2,
            "prompt": "short", "temperature": 0.0, "rollout_rows": 4}  # fmt: skip


class SlowDecoder(ScriptedDecoder):
    """Waits at each step, and fails where its name is `fail`."""

    wait_s, fails = 0.0, False

    def hidden(self, ids, **more):
        time.sleep(self.wait_s)
        if self.fails:
            raise RuntimeError("the card is away")
        return super().hidden(ids, **more)


class Door:
    """A server on a free port, of a scripted policy if no engine is given."""

    def __init__(self, engine: SharedEngine) -> None:
        self.engine = engine
        self.server = server.open_server(engine, "mine", "127.0.0.1", 0, read_s=5.0)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def get(self, path: str, body: object = None) -> tuple[int, str]:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(self.url + path, data, timeout=60) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, question: str, path: str = "/ask", **more: object) -> tuple[int, dict]:
        status, text = self.get(path, {"question": question, **more})
        return status, json.loads(text)

    def events(self, path: str, body: dict) -> list[str]:
        status, text = self.get(path, {**body, "stream": True})
        assert status == 200 and text.endswith("\n\n")
        lines = text[:-2].split("\n\n")
        assert all(line.startswith("data: ") for line in lines)
        return [line.removeprefix("data: ") for line in lines]

    def send(self, body: object) -> socket.socket:
        """A client that has asked and not read."""
        data = json.dumps(body).encode()
        head = f"POST /ask HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        client = socket.create_connection(("127.0.0.1", self.server.server_port))
        client.sendall(head + data)
        return client

    def close(self) -> None:
        self.engine.close()
        self.server.stop(1.0)


@pytest.fixture
def opened(tokenizer) -> Iterator[Callable[..., Door]]:
    doors = []

    def open_door(retriever=None, *, limits: dict | None = None, **changes) -> Door:
        policy = scripted_policy(tokenizer, SCRIPTS)
        slow = SlowDecoder(tokenizer, policy.decoder.scripts)
        engine = SharedEngine(Policy(slow, tokenizer), retriever or FixedRetriever(),
                              RolloutSettings(**{**SETTINGS, **changes}), **limits or {})
        doors.append(Door(engine))
        return doors[-1]

    yield open_door
    for door in doors:
        door.close()


def wait_until(is_true: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


# ---- one engine for all ----


@pytest.fixture(scope="module")
def world() -> tuple[Policy, Retriever, list[Question]]:
    policy = load_policy(str(WORLD / "teacher"), torch.device("cpu"), "model")
    retriever = Retriever.load(WORLD / "corpus.jsonl", WORLD / "encoder")
    questions = load_questions(str(WORLD / "questions" / "nq.jsonl"))[:48]
    asked = [question.question for question in questions]
    return policy, retriever, [Question("asked", text, (), "asked") for text in asked]


@pytest.mark.parametrize(("num", "temperature"), [(64, 0.0), (16, 1.0)])
def test_64_clients_at_once_get_the_tokens_that_each_question_gets_alone(world, num, temperature):
    """In rows that come and go: some questions wait, and rows that were dropped grow again."""
    policy, retriever, questions = world
    settings = RolloutSettings(**{**SETTINGS, "temperature": temperature, "max_turns": 1,
                                  "rollout_rows": 12})
    alone = [generate(policy, retriever, [question], settings, seed=3)[0]
             for question in questions[:6]]  # fmt: skip
    door = Door(SharedEngine(policy, retriever, settings, seed=3))
    asked = [questions[i % len(questions)].question for i in range(num)]
    with ThreadPoolExecutor(num) as pool:
        replies = [*pool.map(door.ask, asked)]
    steps = door.engine.engine.num_steps
    assert [status for status, _ in replies] == [200] * num
    for episode, (_, reply) in zip(alone, replies, strict=False):
        trace = episode_text(episode, policy.tokenizer)
        assert (reply["trace"], reply["answer"]) == (trace, episode.answer)
        assert reply["timings"]["tokens"] == episode.num_agent_tokens
    assert steps < sum(reply["timings"]["tokens"] for _, reply in replies) / 4  # shared ones
    ids = []
    with ThreadPoolExecutor(3) as pool:  # token by token, in two rows
        jobs = pool.map(lambda q: [*door.engine.play(q)][-1], questions[:6])
        ids = [job.episode.ids for job in jobs]
    assert ids == [episode.ids for episode in alone[:6]]
    door.close()


def test_a_question_that_comes_late_ends_before_a_long_one(opened):
    door = opened()
    door.engine.policy.decoder.wait_s = 0.01
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(door.ask, "ask-long")
        wait_until(lambda: door.engine.playing and door.engine.engine.num_steps > 3)
        assert door.ask("ask-b")[1]["answer"] == "soon" and not long.done()
        assert long.result()[1]["answer"] == "late"
    timings = long.result()[1]["timings"]
    assert 0 < timings["first_token_s"] < timings["played_s"] / 2
    assert timings["tokens_per_second"] == pytest.approx(
        timings["tokens"] / timings["played_s"], rel=0.01)
    assert not door.engine.playing and not door.engine.waiting


def test_an_answer_is_the_object_of_ask_as_json(opened):
    status, reply = opened().ask("ask-a")
    assert (status, reply["answer"], reply["status"], reply["queries"]) == (
        200, "gold", "answered", ["q1"])
    assert reply["passages"][1] == {"id": "1", "title": "T1", "text": "short text on q1"}
    assert "<answer> gold </answer>\n" in reply["trace"] and reply["seconds"] >= 0


# ---- clients that leave, and bounds ----


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_frees_its_row(opened, is_streamed):
    door = opened(rollout_rows=1)
    door.engine.policy.decoder.wait_s = 0.01
    client = door.send({"question": "ask-long", "stream": is_streamed})
    wait_until(lambda: door.engine.playing)
    waiting = door.send({"question": "ask-long"})
    wait_until(lambda: door.engine.waiting)
    waiting.close()
    wait_until(lambda: door.server.counts[499] == 1)
    assert not door.engine.waiting  # others may wait in its place
    client.close()
    wait_until(lambda: not door.engine.playing, 1.2)  # the episode takes more than 1.6 s
    assert door.engine.counts == {"left": 1}  # the other one was never played
    wait_until(lambda: door.server.counts[499] == 2)
    assert door.ask("ask-b")[0] == 200 and not door.engine.waiting


def test_too_many_too_long_and_too_late_questions_are_refused(opened):
    door = opened(rollout_rows=1, limits={"max_waiting": 1, "timeout_s": 0.5})
    door.engine.policy.decoder.wait_s = 0.01
    clients = [door.send({"question": "ask-long"})]
    wait_until(lambda: door.engine.playing)
    clients.append(door.send({"question": "ask-long"}))
    wait_until(lambda: door.engine.waiting)
    status, reply = door.ask("ask-b")
    assert status == 503 and "expected at most 1" in reply["error"]
    wait_until(lambda: not door.engine.waiting and not door.engine.playing)
    status, reply = door.ask("ask-long")
    assert status == 503 and "within 0.5 s" in reply["error"]
    # The one that waited has played too, if it came later than the row was free.
    wait_until(lambda: door.engine.counts in ({"left": 2}, {"left": 3}))
    status, reply = door.ask("ask-b " + 1500 * "x")
    assert status == 400 and "expected less than --max-context-tokens 900" in reply["error"]
    for client in clients:
        client.close()


WRONG = [
    ("/ask", b"{", 400, "no JSON"), ("/ask", b"[]", 400, "expected an object with question"),
    ("/ask", b"{}", 400, "question: got"), ("/ask", b'{"question": " "}', 400, "question: got"),
    ("/ask", b'{"question": 3}', 400, "question: got"),
    ("/ask", b'{"question": "a", "top_k": 3}', 400, "got top_k"),
    ("/ask", b'{"question": "a", "stream": 1}', 400, "stream: got"),
    ("/ask", json.dumps({"question": "x" * 4001}).encode(), 400, "at most 4000"),
    ("/ask", b" " * (2**20 + 1), 413, "Content-Length"),
    ("/v1/chat/completions", b"{}", 400, "messages: got"),
    ("/v1/chat/completions", b'{"messages": []}', 400, "messages: got"),
    ("/v1/chat/completions", b'{"messages": [3]}', 400, "messages: got"),
    ("/v1/chat/completions", b'{"messages": [{"role": "tool", "content": "a"}]}', 400, "role"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user"}]}', 400, "question: got"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}'
     b"]}", 400, "image_url"),
    ("/v1/chat/completions", b'{"n": 2, "messages": [{"role": "user", "content": "a"}]}', 400,
     "n: got 2"),
    ("/v1/embeddings", b"{}", 404, "expected POST /ask"),
]  # fmt: skip


def test_what_cannot_be_asked_is_refused_with_its_reason_and_the_server_lives(opened):
    door = opened()
    for path, body, status, part in WRONG:
        got, text = door.get(path, body)
        assert got == status and part in json.loads(text)["error"], (path, body[:60], text)
    assert door.ask("ask-b half \ud800")[0] == 200


# ---- faults ----


def test_a_retriever_or_a_model_that_fails_is_an_error_and_the_next_question_is_answered(
    opened, capfd
):
    door = opened(FixedRetriever(failures=3))
    status, reply = door.ask("ask-a")
    assert status == 502 and "retriever failed" in reply["error"]
    door.engine.policy.decoder.fails = True
    assert door.ask("ask-b") == (500, {"error": "the card is away"})
    assert door.ask("ask-b", stream=True) == (500, {"error": "the card is away"})
    door.engine.policy.decoder.fails = False
    assert door.ask("ask-a")[1]["answer"] == "gold"
    assert "search failed" in capfd.readouterr().err


def test_a_fault_after_the_first_event_is_the_last_event(opened):
    door = opened()
    door.engine.policy.decoder.wait_s = 0.01
    with ThreadPoolExecutor(1) as pool:
        events = pool.submit(door.events, "/ask", {"question": "ask-long"})
        wait_until(lambda: door.engine.engine.num_steps > 5)
        door.engine.policy.decoder.fails = True
        *pieces, last = map(json.loads, events.result())
    assert pieces[0]["author"] == "agent" and last == {"error": "the card is away"}


def test_a_search_that_a_failed_run_left_behind_holds_up_nobody(opened):
    door = opened(limits={"timeout_s": 2.0})
    door.engine.engine.search = Future()  # it never ends
    assert door.ask("ask-a")[1].get("answer") == "gold"


def test_a_prompt_that_cannot_work_is_refused_before_anybody_asks(tokenizer):
    policy = scripted_policy(tokenizer, SCRIPTS)
    with pytest.raises(ValueError, match="prompt"):
        SharedEngine(policy, None, RolloutSettings(prompt="row", max_turns=0))
    with pytest.raises(ValueError, match="--max-context-tokens 20"):
        SharedEngine(policy, None, RolloutSettings(max_context_tokens=20, max_turns=0))


def test_a_server_that_stops_tells_those_who_wait(opened):
    door = opened(rollout_rows=1)
    door.engine.policy.decoder.wait_s = 0.01
    with ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(door.ask, "ask-long") for _ in range(2)]
        wait_until(lambda: door.engine.playing and door.engine.waiting)
        door.engine.close()
        assert [reply.result(timeout=5)[0] for reply in replies] == [503, 503]
    assert not door.engine.thread.is_alive() and door.get("/health")[0] == 503
    with pytest.raises(Refused):
        [*door.engine.play(Question("", "ask-b", (), ""))]


# ---- streams and chats ----


def test_events_are_the_episode_as_it_is_written_and_the_answer_at_last(opened):
    door = opened()
    *pieces, last = map(json.loads, door.events("/ask", {"question": "ask-a"}))
    plain = door.ask("ask-a")[1]
    for reply in (last, plain):
        del reply["seconds"], reply["timings"]
    assert last == plain
    text = "".join(piece["text"] for piece in pieces)
    assert text.startswith("<think>hm</think><search> q1 </search>\n\n<information>Doc 1")
    assert text.endswith("<think>so</think><answer> gold </answer>")
    authors = [piece["author"] for piece in pieces]
    assert {*authors} == {"agent", "environment"} and authors.count("environment") == 1
    assert len(pieces) > 3


def test_a_character_of_several_tokens_is_one_piece(tokenizer):
    question = Question("a", "a", (), "a")
    ids = tokenizer.encode("caf\u00e9!")
    pieces, texts = Pieces(tokenizer), []
    for end in range(1, len(ids) + 1):
        episode = Episode(
            question, [Segment("prompt", [1]), Segment("agent", ids[:end])])
        texts += [piece["text"] for piece in pieces.new(episode, is_over=False)]
    assert texts == ["c", "a", "f", "\u00e9", "!"]
    episode.segments[-1].ids.append(ids[3])  # it ends within a character
    assert [*pieces.new(episode, is_over=False)] == []
    assert [piece["text"] for piece in pieces.new(episode, is_over=True)] == ["\ufffd"]


def test_a_stream_ends_with_what_was_held_back(opened, monkeypatch):
    """The last token of an episode that is cut off may be a part of a character."""
    monkeypatch.setitem(SCRIPTS, "ask-cut", "caf\u00e9")
    door = opened(max_new_tokens=4, max_turns=0)
    *pieces, last = map(json.loads, door.events("/ask", {"question": "ask-cut"}))
    assert "".join(piece["text"] for piece in pieces) == "caf\ufffd" and not last["answer"]


def test_a_chat_client_gets_the_answer_as_content_and_hears_what_is_not_read(opened):
    door = opened()
    assert json.loads(door.get("/v1/models")[1])["data"][0]["id"] == "mine"
    messages = [{"role": "system", "content": "ask-b"}, {"role": "user", "content": "ask-a"}]
    body = {"model": "any", "temperature": 0.7, "messages": messages}
    reply = json.loads(door.get("/v1/chat/completions", body)[1])
    [choice] = reply["choices"]
    assert choice["message"]["content"] == "gold" and choice["finish_reason"] == "stop"
    assert "| <think>hm</think><search>" in choice["message"]["reasoning_content"]
    assert [note.partition(":")[0] for note in reply["notes"]] == ["temperature", "messages"]
    plain = door.ask("ask-a")[1]
    assert reply["usage"]["completion_tokens"] == plain["timings"]["tokens"]
    job = [*door.engine.play(Question("asked", "ask-a", (), ""))][-1]
    assert reply["usage"]["total_tokens"] == len(job.episode.ids)
    assert reply["passages"] == plain["passages"] and reply["model"] == "mine"

    *chunks, done = door.events("/v1/chat/completions", {"messages": messages[1:]})
    assert done == "[DONE]"
    chunks = [json.loads(chunk) for chunk in chunks]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "gold"
    assert "<answer>" in "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[-1]["notes"] == []


def test_an_episode_without_an_answer_is_an_empty_content_of_limited_length(opened):
    door = opened(max_new_tokens=5, max_turns=0)
    parts = [{"type": "text", "text": "ask"}, {"type": "text", "text": "-long"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    [choice] = json.loads(door.get("/v1/chat/completions", body)[1])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")


# ---- how it goes, the page, the program ----


def test_health_and_metrics_say_how_it_goes(opened):
    door = opened()
    door.ask("ask-a")
    door.ask("ask-b")
    door.get("/ask", b"{}")
    health = json.loads(door.get("/health")[1])
    assert (health["status"], health["model"], health["playing"]) == ("ok", "mine", 0)
    status, text = door.get("/metrics")
    tokens = len(SEARCH_THEN_ANSWER) + len(SCRIPTS["ask-b"])
    for line in ('agent_answers_total{status="200"} 3', 'agent_answers_total{status="400"} 1',
                 'agent_episodes_total{status="answered"} 2', f"agent_tokens_total {tokens}",
                 "agent_waiting 0", "agent_playing 0"):  # fmt: skip
        assert line in text.splitlines(), text
    first = re.search(r"agent_first_token_seconds_total (\S+)", text)[1]
    assert 0 < float(first) < 5


def test_the_page_shows_texts_as_texts_and_loads_nothing(opened):
    with urllib.request.urlopen(opened().url) as reply:
        kind, page = reply.headers["Content-Type"], reply.read().decode()
    assert kind.startswith("text/html") and "<form" in page
    assert not re.findall(r"innerHTML|insertAdjacentHTML|https?://|src=|@import", page)


def test_the_page_draws_a_stream_in_chromium_and_a_hostile_passage_as_text(opened, tmp_path):
    door = opened(FixedRetriever(text="<script>document.title = 'bad'</script>"))
    expression = "document.querySelector('#answer').textContent && document.body.outerHTML"
    page = evaluate(f"{door.url}/#ask-a", expression, tmp_path)
    assert '<p id="answer" class="answer" role="status">gold</p>' in page
    assert "&lt;script&gt;document.title = 'bad'&lt;/script&gt; on q1" in page
    assert page.count("<script>") == 1 and '<span class="environment">' in page
    assert "2 passages</p>" in page


def test_the_pages_loop_in_transformers_gives_the_answers_of_ask(world, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    policy, retriever, questions = world
    save_policy(policy, tmp_path, policy.decoder.state_dict())
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    [code] = [block for block in blocks if "def answer(" in block]
    exec(code, names := {})

    def search(query: str) -> str:
        [passage] = retriever.search([query], 1)[0]
        return f"Doc 1(Title: {passage.title}) {passage.text}"

    settings = RolloutSettings(**{**SETTINGS, "top_k": 1, "max_new_tokens": 64})
    for episode in generate(policy, retriever, questions[:3], settings, seed=0):
        said = names["answer"](tmp_path, f"{episode.question.question}?", search, 4, 64)
        assert said == episode.answer is not None


@pytest.mark.slow
def test_the_program_serves_and_stops_when_it_is_asked(mini, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, ROOT / "server.py", "--config", mini / "mini.toml", "--model",
               mini / "student", "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(command, text=True, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    address = process.stdout.readline().split()[0]
    assert address == f"http://127.0.0.1:{port}/ask"
    body = b'{"question": "which number has fact 3"}'
    with urllib.request.urlopen(address, body, timeout=300) as reply:
        served = json.load(reply)
    policy = load_policy(str(mini / "student"), torch.device("cpu"), "model")
    settings = RolloutSettings(max_new_tokens=8, max_context_tokens=200, max_turns=2, top_k=2,
                               max_obs_tokens=60, prompt="short", temperature=0.0)
    question = Question("asked", "which number has fact 3", (), "asked")
    [episode] = generate(policy, FixedRetriever(), [question], settings, seed=0)
    assert served["trace"] == episode_text(episode, policy.tokenizer)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0 and "Traceback" not in process.stderr.read()
