"""QAgent: its protocol and rewards, the hack that the published hit pays, generators, the door.

Run: python -m pytest tests/test_qagent.py
"""

import json
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import bard
import qagent
import sampling
from data import Passage, Question, exact_match
from episode import SEARCH_R1, Episode, Segment, parse_action
from infra import cli
from model import load_decoder
from qagent import (
    QAGENT,
    QAGENT_PROMPT,
    QAgentSettings,
    SearchSettings,
    collected_passages,
    follows_format,
    generator_messages,
    has_hit,
    within,
)
from rollout import Policy, load_protocol
from tests.support.mini import read_rows
from tests.support.runs import run
from tests.support.scripted import FixedRetriever, play, scripted_policy
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SEARCH = "<plan>p</plan>\n<search><query>q</query></search>"
ANSWER = "<reflection>r</reflection>\n<answer> Ann </answer>"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The embedded world's tokenizer: a word is a token."""
    return Tokenizer.load(ROOT / "world" / "student")


def played(
    tokenizer: Tokenizer, *turns: str, passages: tuple[str, ...] = ("nothing",), gold: str = "Ann"
) -> Episode:
    """An episode of these turns; each search brought a passage for each text."""
    segments, searches = [Segment("prompt", tokenizer.encode("who?"))], []
    for turn in turns:
        segments.append(Segment("agent", tokenizer.encode(turn)))
        if "<search>" in turn:
            searches.append([Passage(text, "T", text, 1.0) for text in passages])
            block = QAGENT.observation(searches[-1])
            segments.append(Segment("environment", tokenizer.encode(block)))
        elif "<answer>" not in turn:
            segments.append(Segment("environment", tokenizer.encode(QAGENT.notice)))
    answer = turns[-1].partition("<answer>")[2].partition("</answer>")[0].strip() or None
    status = "answered" if answer else "max_turns"
    question = Question("q", "who?", (gold,), "test")
    return Episode(question, segments, status, answer, passages=searches)


# ---- the protocol ----

TWO_QUERIES = "<plan>p</plan><search>\n<query> q1 </query>\n<query>q2</query>\n</search>"
REFLECTS = "<reflection>r</reflection><answer> gold </answer>"


def play_qagent(
    tokenizer: Tokenizer, script: str, retriever: Any = None, *, max_queries: int = 3, **changes
) -> Episode:
    """The one episode of an agent that writes this text."""
    protocol = QAGENT._replace(max_queries=max_queries)
    return play(
        tokenizer, {"ask-a": script}, retriever, protocol=protocol, notices=(QAGENT.notice,),
        **{"max_new_tokens": 120, **changes},
    )["ask-a"]


@pytest.mark.parametrize(("content", "expected"), [
    ("<query>a</query><query> b c </query>", ("a", "b c")), ("a\n\n b", ("a", "b")),
    ("<query> </query>", ()), ("x <query>a</query> y", ("a",)), ("<query>a", ("<query>a",)),
])
def test_queries_are_a_list(content, expected):
    assert QAGENT.queries(content) == expected
    assert SEARCH_R1.queries(content) == (content,)


def test_the_protocol_is_found_by_its_file_and_name():
    assert load_protocol("qagent.py:QAGENT") is QAGENT
    for name in ("qagent", "qagent.py:QAGENT"):
        settings = QAgentSettings(protocol=name, max_queries=2)
        assert qagent.agent_protocol(settings) == QAGENT._replace(max_queries=2)
    assert qagent.agent_protocol(SearchSettings(protocol="search-r1")) == SEARCH_R1


def test_a_turn_searches_several_queries_and_shows_each_passage_once(tokenizer):
    class Overlapping(FixedRetriever):
        def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
            self.batches.append(list(queries))
            both = Passage("0", "T0", "common", 1.0)
            return [[Passage(q, q, f"about {q}", 2.0), both][:top_k] for q in queries]

    retriever = Overlapping()
    episode = play_qagent(tokenizer, TWO_QUERIES + REFLECTS, retriever, max_obs_tokens=300)
    assert retriever.batches == [["q1", "q2"]]
    authors = [segment.author for segment in episode.segments]
    assert authors == ["prompt", "agent", "environment", "agent"]
    assert tokenizer.decode(episode.segments[2].ids) == (
        "\n<information>\nPassage #1 q1\nPassage #1 about q1\n\nPassage #2 T0\n"
        "Passage #2 common\n\nPassage #3 q2\nPassage #3 about q2\n\n</information>\n"
    )
    assert (episode.queries, episode.num_searches) == (["q1", "q2"], 1)
    assert episode.answer == "gold"
    assert [passage.id for passage in episode.passages[0]] == ["q1", "0", "q2"]


@pytest.mark.parametrize(("max_queries", "asked", "dropped"), [
    (1, ["q1"], 1), (3, ["q1", "q2"], 0), (0, ["q1", "q2"], 0)])
def test_the_bound_on_queries_is_kept(tokenizer, max_queries, asked, dropped):
    retriever, script = FixedRetriever(), TWO_QUERIES + REFLECTS
    episode = play_qagent(tokenizer, script, retriever, max_queries=max_queries)
    assert retriever.batches == [asked] and episode.dropped_queries == dropped


def test_the_notice_has_no_tag_in_it(tokenizer):
    assert "<" not in QAGENT.notice and parse_action(QAGENT.notice, QAGENT).kind == "invalid"
    script = "<plan>p</plan><search> </search>" + REFLECTS
    episode = play_qagent(tokenizer, script)
    assert tokenizer.decode(episode.segments[2].ids) == QAGENT.notice
    assert episode.answer == "gold"


def test_queries_of_many_rows_come_back_to_their_own(tokenizer):
    scripts = {
        f"ask-{name}": f"<search><query>{name}1</query><query>{name}2</query></search>{REFLECTS}"
        for name in "abcdef"
    }
    settings = {"max_new_tokens": 120, "max_context_tokens": 1500, "max_obs_tokens": 300}
    for name, episode in play(tokenizer, scripts, protocol=QAGENT, **settings).items():
        assert episode.queries == [f"{name[-1]}1", f"{name[-1]}2"]
        found_for = {passage.text.split()[-1] for passage in episode.passages[0]}
        assert found_for == set(episode.queries)


def test_the_prompt_is_the_questions_own_where_settings_ask_for_it():
    question = Question("q", " who wrote it ", ("Ann",), "test", instruction="Be quick.")
    [asked] = qagent.as_asked([question], SearchSettings(prompt="qagent"))
    content = asked.prompt[0]["content"]
    assert content == qagent.QAGENT_PROMPT.replace("{question}", "who wrote it?")
    assert qagent.core_settings(SearchSettings(prompt="qagent")).prompt == "row"
    assert qagent.as_asked([question], SearchSettings(prompt="short")) == [question]
    assert qagent.core_settings(SearchSettings(prompt="short")).prompt == "short"


# ---- rewards ----


@pytest.mark.parametrize(("turns", "expected"), [
    ((SEARCH, ANSWER), True), ((SEARCH, "<reflection>r</reflection>" + SEARCH, ANSWER), True),
    (("<answer> Ann </answer>",), True),  # as published: an answer needs no search
    (("<search><query>q</query></search>", ANSWER), False),  # no plan
    (("<plan>p</plan> so <search><query>q</query></search>", ANSWER), False),  # not directly
    (("<plan>p<search><query>q</query></search>", ANSWER), False),  # not closed
    (("p</plan><search><query>q</query></search>", ANSWER), False),  # not opened
    ((SEARCH, "<answer> Ann </answer>"), False),  # no reflection
    ((SEARCH, "so <reflection>r</reflection><answer> Ann </answer>"), False),
    ((SEARCH, SEARCH, ANSWER), False), ((SEARCH,), False), (("hm", SEARCH, ANSWER), False),
    ((SEARCH, "<reflection>r</reflection>\n<plan>p</plan>", ANSWER), False),  # no action
])
def test_the_format_is_read_from_the_episode(words, turns, expected):
    assert follows_format(played(words, *turns), words) == expected


def test_stage_1_is_format_times_exact_match(words):
    episodes = [
        played(words, SEARCH, ANSWER),
        played(words, SEARCH, ANSWER.replace("Ann", "Bob")),
        played(words, SEARCH, "<answer> Ann </answer>"),  # without a reflection
    ]
    assert qagent.rewards(episodes, words, None, QAgentSettings(stage=1)) == [1.0, 0.0, 0.0]


def says(*answers: str) -> qagent.Generator:
    return lambda questions, passages: list(answers)


def test_stage_2_is_the_generators_answer_and_half_a_hit(words):
    """{0, 0.5, 1, 1.5} of the paper; what the agent itself answers does not count."""
    episodes = [
        played(words, SEARCH, ANSWER, passages=("Ann was here",)),
        played(words, SEARCH, ANSWER),
        played(words, SEARCH, passages=("Ann was here",)),
        played(words, SEARCH, ANSWER),
    ]
    asked = []

    def generator(questions, passages):
        asked.append([[p.text for p in of_question] for of_question in passages])
        return ["Ann", "the Ann", "Bob", "Bob"]

    settings = QAgentSettings(stage=2)
    assert qagent.rewards(episodes, words, generator, settings) == [1.5, 1.0, 0.5, 0.0]
    assert asked == [[["Ann was here"], ["nothing"], ["Ann was here"], ["nothing"]]]
    cheaper = QAgentSettings(stage=2, hit_weight=0.2)
    assert qagent.rewards(episodes[:1], words, says("Bob"), cheaper) == [0.2]


@pytest.mark.parametrize(("match", "expected"), [("strict", [1, 0, 0]), ("within", [1, 1, 0])])
def test_a_gold_answer_within_a_longer_one_counts_where_it_is_asked_for(words, match, expected):
    episodes = [played(words, SEARCH, ANSWER)] * 3
    settings = QAgentSettings(stage=2, answer_match=match)
    answers = says("the Ann", "It was Ann.", "Bob")
    assert qagent.rewards(episodes, words, answers, settings) == expected


def test_a_strict_answer_is_compared_as_its_question_says(words):
    question = Question("q", "?", ("42",), "test", match=bard.integer_match)
    episode = replace(played(words, SEARCH, ANSWER), question=question)
    settings = QAgentSettings(stage=2)
    assert qagent.rewards([episode], words, says("\\boxed{42}"), settings) == [1.0]


def test_the_published_hit_pays_guesses_in_the_plan_and_ours_does_not(words):
    guess = "<plan>Ann or Bob or Cid or Dan</plan>\n<search><query>q</query></search>"
    episode = played(words, guess, ANSWER.replace("Ann", "Bob"))
    for hit_in, expected in (("trajectory", 0.5), ("passages", 0.0)):
        assert has_hit(episode, words, hit_in) == bool(expected)
        settings = QAgentSettings(stage=2, hit_in=hit_in)
        assert qagent.rewards([episode], words, says("Eve"), settings) == [expected]
    asked = played(words, SEARCH, ANSWER.replace("Ann", "Bob"), gold="who")
    assert not has_hit(asked, words, "trajectory")  # the question is not the agent's


def test_the_published_match_takes_an_answer_within_a_word():
    assert within("I know", ["no"]) == 1.0 and within("It was Ann.", ["ann"]) == 1.0
    assert within("Bob", ["Ann"]) == within(None, ["Ann"]) == within("x", ["The"]) == 0.0


def test_s1_the_published_match_takes_an_article_for_itself_alone():
    assert within("A", ["A"]) == within("?", ["?"]) == 1.0
    assert within("a banana", ["A"]) == within("what?", ["?"]) == within("the", ["A"]) == 0.0


@pytest.mark.parametrize(("hit_rule", "expected"), [("words", 0.0), ("substring", 0.5)])
def test_s4_a_hit_inside_a_word_pays_by_the_published_rule_alone(words, hit_rule, expected):
    episode = played(words, SEARCH, ANSWER, passages=("Annapolis",))
    for hit_in in ("passages", "trajectory"):
        settings = QAgentSettings(stage=2, hit_in=hit_in, hit_rule=hit_rule)
        paid = qagent.rewards([episode], words, says("Eve"), settings)
        assert paid == [0.5 if hit_in == "trajectory" else expected]  # the agent says "Ann"
    assert qagent.report_passages([episode], words, hit_rule)["hit"] == bool(expected)
    found = played(words, SEARCH, ANSWER, passages=("Ann's house",))
    assert has_hit(found, words, "passages", hit_rule)


def test_passages_are_collected_once_each_in_the_order_in_which_they_were_found(words):
    episode = played(words, SEARCH, ANSWER)
    one, two, three = (Passage(name, name, name, 1.0) for name in "abc")
    episode.passages = [[two, one], [one, three]]
    assert [passage.id for passage in collected_passages(episode)] == ["b", "a", "c"]


def test_the_metrics_of_a_step_count_passages_hits_queries_and_formats(words):
    episodes = [
        played(words, SEARCH, ANSWER, passages=("Ann", "Bob")),
        played(words, SEARCH, "<answer> Ann </answer>"),
    ]
    episodes[0].queries, episodes[0].dropped_queries = ["q", "r"], 3
    assert qagent.report_passages(episodes, words) == {
        "passages": 3, "hit": 1, "queries": 2, "dropped_queries": 3, "format": 1,
    }


# ---- settings ----


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stage_that_is_none_is_refused(stage):
    with pytest.raises(ValueError, match=f"--stage {stage}: expected 1 or 2"):
        qagent.with_defaults(QAgentSettings(stage=stage))


def test_a_reward_that_reads_other_tags_is_refused():
    with pytest.raises(ValueError, match="--protocol search-r1: got it for phase qagent"):
        qagent.with_defaults(QAgentSettings(protocol="search-r1"))


def test_guidance_as_a_reward_of_groups_is_refused():
    guided = QAgentSettings(kl_where="wrong")
    with pytest.raises(ValueError, match="--kl-in loss"):
        qagent.with_defaults(guided)
    assert qagent.with_defaults(replace(guided, kl_in="loss")).kl_where == "wrong"
    assert qagent.with_defaults(replace(guided, advantage="gae")).advantage == "gae"


def test_a_users_reward_is_refused_where_the_phase_has_its_own():
    with pytest.raises(ValueError, match="--reward FILE.py:F: got it for phase qagent"):
        qagent.with_defaults(QAgentSettings(reward="FILE.py:F"))


def test_the_phase_has_groups_and_the_initial_policy_as_guide_unless_settings_say_otherwise():
    settings = qagent.with_defaults(QAgentSettings())
    assert (settings.advantage, settings.group_size, settings.kl_where) == ("group", 5, "all")
    assert settings.run_dir == "runs/qagent"


def test_the_preset_serves_training_and_search():
    presets = [str(ROOT / "configs" / "paper.toml"), str(ROOT / "configs" / "qagent.toml")]
    argv = ["--config", *presets]
    trained = cli.load(QAgentSettings, argv, prog="qagent.py", description="")
    assert (trained.phase, trained.group_size, trained.kl_in) == ("qagent", 5, "loss")
    searching = cli.load(
        SearchSettings, argv, prog="qagent.py search", description="", shared=qagent.SHARED
    )
    assert searching.temperature == 0 and trained.temperature == 1
    for settings in (trained, searching):
        assert qagent.agent_protocol(settings) == QAGENT and settings.prompt == "qagent"
        assert (settings.max_turns, settings.top_k, settings.max_new_tokens) == (5, 1, 512)


# ---- generators ----

QUESTION = Question("q", "who?", ("Ann",), "test")


def test_a_generator_reads_titles_and_texts_and_nothing_that_is_put_in_is_a_place(tmp_path):
    question = Question("q", "who {passages}?", ("Ann",), "test")
    [message] = generator_messages(question, [Passage("1", "T", "of {question}", 1.0)])
    assert "T\nof {question}" in message["content"]
    assert "Question: who {passages}?" in message["content"]
    (tmp_path / "prompt.txt").write_text("{question}")
    with pytest.raises(ValueError, match="no {passages}"):
        generator_messages(question, [], str(tmp_path / "prompt.txt"))


def test_a_local_generator_answers_in_batch_and_drops_the_last_passages_that_do_not_fit(
    words, monkeypatch
):
    policy = Policy(load_decoder(ROOT / "world" / "student"), words)
    settings = QAgentSettings(max_context_tokens=400, generator_tokens=5)
    passages = [Passage(str(i), f"T{i}", "word " * 20, 1.0) for i in range(9)]
    prompts, generate = [], qagent.generate

    def keep(policy, retriever, questions, settings, **options):
        assert settings.temperature == 0 and settings.max_turns == 0
        assert settings.max_new_tokens == 5
        prompts.extend(question.prompt for question in questions)
        return generate(policy, retriever, questions, settings, **options)

    monkeypatch.setattr(qagent, "generate", keep)
    collections = [[], passages[:1], passages]
    answers = qagent.local_generator(policy, settings)([QUESTION] * 3, collections)
    assert len(answers) == 3
    assert prompts[0] == generator_messages(QUESTION, [])
    assert prompts[1] == generator_messages(QUESTION, passages[:1])
    # The most that leave room for an answer, and the first that were found.
    sizes = [len(words.chat(generator_messages(QUESTION, passages[:n]))) for n in range(10)]
    num_fitting = max(n for n in range(10) if sizes[n] < 400 - 5)
    assert 1 < num_fitting < 9
    assert prompts[2] == generator_messages(QUESTION, passages[:num_fitting])


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_local_generator_keeps_room_for_an_answer(words, monkeypatch, extra):
    """The prompt is shorter than the context without the answer, to the token."""
    passages = [Passage("1", "T", "word " * 20, 1.0)]
    num_tokens = len(words.chat(generator_messages(QUESTION, passages)))
    settings = QAgentSettings(max_context_tokens=num_tokens + 50 + extra, generator_tokens=50)

    def generate(policy, retriever, questions, settings, **_):
        return [Episode(q, [Segment("prompt", words.chat(q.prompt))]) for q in questions]

    kept = []
    monkeypatch.setattr(
        qagent, "generate", lambda *a, **o: kept.extend(generate(*a, **o)) or kept
    )
    qagent.local_generator(Policy(None, words), settings)([QUESTION], [passages])
    assert (len(kept[0].segments[0].ids) == num_tokens) == (extra > 0)


def test_a_local_generator_is_not_told_what_the_agent_is(words, monkeypatch):
    told, generate = replace(QUESTION, instruction="#64", match=exact_match), qagent.generate
    texts = []

    def keep(*arguments, **options):
        episodes = generate(*arguments, **options)
        texts.extend(words.decode(episode.segments[0].ids) for episode in episodes)
        return episodes

    monkeypatch.setattr(qagent, "generate", keep)
    policy = Policy(load_decoder(ROOT / "world" / "student"), words)
    qagent.local_generator(policy, QAgentSettings(generator_tokens=2))([told], [[]])
    assert "who?" in texts[0] and "#64" not in texts[0]


def test_a_local_generator_whose_prompt_fills_the_context_says_nothing(words):
    policy = Policy(load_decoder(ROOT / "world" / "student"), words)
    settings = QAgentSettings(max_context_tokens=10, generator_tokens=5)
    assert qagent.local_generator(policy, settings)([QUESTION], [[]]) == [""]


@pytest.mark.parametrize(("text", "answer"), [
    ("<think> Bob? no </think>\nAnn\n", "Ann"), (" Ann ", "Ann"),
    ("<think> Bob </think>\n<answer> Ann </answer>", "Ann"),
    ("<think> maybe Ann or Bob", ""),  # cut off
])
def test_what_a_generator_thinks_is_no_part_of_its_answer(text, answer):
    assert qagent.final_answer(text) == answer


class Server(BaseHTTPRequestHandler):
    """A chat-completions server that fails the first `failures` times."""

    failures = 0
    asked: list = []
    content: str | None = "<think> Bob? </think> Ann \n"

    def do_POST(self) -> None:
        row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(row)
        is_up = type(self).failures <= 0
        type(self).failures -= 1
        choice = {"message": {"content": type(self).content}}
        body = json.dumps({"choices": [choice]} if is_up else {"error": "busy"}).encode()
        self.send_response(200 if is_up else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.failures, Server.asked = 0, []
    http = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1/chat/completions"
    http.shutdown()
    http.server_close()


def test_a_remote_generator_speaks_chat_completions_and_is_asked_again(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(qagent.time, "sleep", pauses.append)
    Server.failures = 2
    settings = QAgentSettings(generator=server, generator_model="m", generator_tries=3)
    generator = qagent.load_generator(settings)
    assert generator([QUESTION], [[Passage("1", "T", "Ann", 1.0)]]) == ["Ann"]
    assert len(Server.asked) == 3 and pauses == [0.5, 1.0]
    assert (Server.asked[0]["model"], Server.asked[0]["temperature"]) == ("m", 0)
    assert "T\nAnn" in Server.asked[0]["messages"][0]["content"]


def test_a_remote_generator_that_was_cut_off_while_it_thought_says_nothing(server, monkeypatch):
    monkeypatch.setattr(Server, "content", None)
    ask = qagent.remote_generator(QAgentSettings(generator=server, generator_tries=1))
    assert ask([QUESTION], [[]]) == [""]


def test_a_remote_generator_that_keeps_failing_ends_with_its_address(server, monkeypatch):
    monkeypatch.setattr(qagent.time, "sleep", lambda seconds: None)
    Server.failures = 99
    settings = QAgentSettings(generator=server, generator_tries=2)
    with pytest.raises(ConnectionError, match="--generator http://127.*503.* 2 times"):
        qagent.load_generator(settings)([QUESTION], [[]])


def test_without_a_generator_the_error_says_what_to_give():
    with pytest.raises(ValueError, match="--generator: got none"):
        qagent.load_generator(QAgentSettings())


# ---- the door ----


@pytest.fixture
def door(tokenizer) -> Iterator[str]:
    policy = scripted_policy(tokenizer, {"who": TWO_QUERIES + REFLECTS}, (QAGENT.notice,))
    settings = SearchSettings(max_context_tokens=1500, model="runs/mine", temperature=0.0)
    engine, http = qagent.serve(policy, FixedRetriever(), settings, 0)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    engine.close()
    http.shutdown()
    http.server_close()


def post(url: str, body: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_half_a_character_in_a_question_is_no_reason_to_hang_up(door):
    status, reply = post(f"{door}/search", b'{"question": "who \\ud800?"}')
    assert status == 200 and "who \ufffd?" in reply["trace"]


def test_a_question_comes_in_by_the_door_and_passages_and_trace_go_out(door):
    status, reply = post(f"{door}/search", json.dumps({"question": "who?"}).encode())
    assert (status, reply["queries"]) == (200, ["q1", "q2"])
    assert reply["passages"][0] == {"id": "0", "title": "T0", "text": "short text on q1"}
    opening = QAGENT_PROMPT.partition(". ")[0]
    assert opening in reply["trace"] and "<reflection>r</reflection>" in reply["trace"]
    status, reply = post(f"{door}/ask", json.dumps({"question": "who?"}).encode())
    assert (status, reply["answer"]) == (200, "gold") and opening in reply["trace"]


@pytest.mark.parametrize(("path", "body", "status", "message"), [
    ("/other", b"{}", 404, "POST /search"),
    ("/search", b"not json", 400, "Expecting value"),
    ("/search", b"[]", 400, "expected an object"),
    ("/search", b'{"question": " "}', 400, "expected a text"),
    ("/search", b'{"question": 3}', 400, "expected a text"),
    ("/search", json.dumps({"question": "x" * 5000}).encode(), 400, "at most 4000"),
    ("/search", b" " * 2_000_000, 413, "Content-Length"),
])
def test_what_cannot_be_answered_is_refused_with_its_reason(door, path, body, status, message):
    got, reply = post(door + path, body)
    assert got == status and message in reply["error"]


def test_a_search_whose_retriever_fails_is_an_error_and_not_an_empty_result(words, monkeypatch):
    failed = Episode(QUESTION, [], "search_error")
    monkeypatch.setattr(qagent, "generate", lambda *arguments, **options: [failed])
    with pytest.raises(ConnectionError, match="the retriever failed"):
        qagent.search("who?", Policy(None, words), None, SearchSettings())


# ---- how good the passages are for generators ----


class Shelf:
    """A search engine whose passages hold the query and their rank."""

    corpus: Sequence[Passage] = ()

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        return [
            [Passage(str(i), "T", f"{query} {i}", 1.0) for i in range(top_k)] for query in queries
        ]


SETS = {
    "nq": [
        Question("a", "who?", ("who? 4",), "nq"),
        Question("b", "when?", ("1900",), "nq"),
    ],
    "popqa": [Question("a", "where?", ("where? 0",), "popqa")],
}
READERS = {
    "last": lambda questions, passages: [k[-1].text if k else "" for k in passages],
    "all": lambda questions, passages: [" ".join(p.text for p in k) for k in passages],
}


def evaluate(whose: str, sets: dict[str, list[Question]] = SETS) -> dict:
    settings = SearchSettings(passages=whose)
    return qagent.evaluate_passages(None, Shelf(), sets, READERS, settings)


def test_naive_passages_are_one_search_and_generators_are_scored_side_by_side():
    result = evaluate("naive")
    nq, average = result["sets"]["nq"], result["average"]
    assert (nq["em last"], nq["within last"]) == (0.5, 0.5)
    assert (nq["em all"], nq["within all"]) == (0.0, 0.5)
    assert (nq["hit"], nq["passages"], nq["queries"]) == (0.5, 5.0, 1.0)
    assert result["sets"]["popqa"]["em last"] == 0.0
    assert average["within all"] == 0.75  # the mean over sets, not over questions
    assert len(result["rows"]) == 3
    assert "em last" in qagent.passages_table({"name": "naive"} | result)


def test_gold_passages_are_those_that_a_row_names_and_none_are_none():
    context = [
        {"title": "T", "text": "who? 4", "is_supporting": True},
        {"title": "U", "text": "what?", "is_supporting": False},
    ]
    gold = {"nq": [replace(SETS["nq"][0], context=context)]}
    best = evaluate("gold", gold)["average"]
    assert (best["passages"], best["em last"], best["em all"]) == (1.0, 1.0, 1.0)
    nothing = evaluate("none")["average"]
    assert nothing["passages"] == nothing["hit"] == nothing["em last"] == 0.0


def test_an_agents_passages_are_measured_with_its_own_answers(words, monkeypatch):
    episode = played(words, SEARCH, ANSWER, passages=("by Ann", "by Bob"))
    episode.queries = ["q", "r"]
    monkeypatch.setattr(qagent, "generate", lambda *arguments, **options: [episode])
    generators = {"first": lambda questions, passages: [passages[0][0].text.removeprefix("by ")]}
    average = qagent.evaluate_passages(
        None, None, {"test": [episode.question]}, generators, SearchSettings()
    )["average"]
    assert (average["em first"], average["hit"], average["passages"]) == (1.0, 1.0, 2.0)
    assert (average["queries"], average["searches"]) == (2.0, 1.0)
    assert (average["agent_em"], average["agent_f1"]) == (1.0, 1.0)


def test_a_sets_noise_does_not_depend_on_the_other_sets(words, monkeypatch):
    seeds = []

    def generate(policy, retriever, questions, settings, *, seed, **_):
        seeds.append((questions[0].source, seed))
        return [played(words, SEARCH, ANSWER) for _ in questions]

    monkeypatch.setattr(qagent, "generate", generate)
    settings = SearchSettings(seed=3)
    for sets in (SETS, {"popqa": SETS["popqa"]}):
        qagent.evaluate_passages(None, None, sets, READERS, settings)
    expected = [(name, 3 + zlib.crc32(name.encode())) for name in ("nq", "popqa", "popqa")]
    assert seeds == expected


def test_measure_writes_what_it_prints(tmp_path, capsys):
    student, teacher = (str(ROOT / "world" / name) for name in ("student", "teacher"))
    argv = [
        "measure", "--passages", "none", "--limit", "1", "--generator-tokens", "4",
        "--out", str(tmp_path), "--questions", str(ROOT / "world" / "questions" / "nq.jsonl"),
    ]
    qagent.main([*argv, "--generators", student, teacher, "--dtype", "bfloat16"])
    result = json.loads((tmp_path / "submodule.json").read_text())
    assert {"em student", "em teacher", "within teacher"} <= set(result["average"])
    assert result["name"] == "none" and "rows" not in result
    assert len(read_rows(tmp_path / "submodule.jsonl")) == 1
    assert "em teacher" in capsys.readouterr().out
    with pytest.raises(ValueError, match="names that differ"):
        qagent.main([*argv, "--generators", student, student])
    with pytest.raises(ValueError, match="--generator: got none"):
        qagent.main(argv)


def test_answer_prints_the_trace_the_passages_and_what_a_generator_makes_of_them(capsys):
    model = str(ROOT / "world" / "teacher")
    qagent.main([
        "answer", "Who", "wrote", "the", "novel", "Silver", "Harbor?", "--model", model,
        "--generator", model, "--generator-tokens", "4", "--protocol", "search-r1",
    ])
    printed = capsys.readouterr().out
    assert "| <search>" in printed and "\n[1] " in printed and "\nanswer: " in printed


@pytest.mark.parametrize(("argv", "message"), [
    (["look"], "got 'look', expected search, answer, serve or measure"),
    (["search"], "got question '', expected one"), (["serve", "who"], "got question 'who', exp"),
])
def test_the_program_says_what_it_expects(argv, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        qagent.main(argv)


# ---- a run ----

TRAIN = ["--phase", "qagent", "--group-size", "4"]


@pytest.mark.parametrize("flags", [
    ["--stage", "1"], ["--stage", "2", "--hit-in", "trajectory", "--answer-match", "within"],
    ["--stage", "2", "--teacher-dtype", "bfloat16", "--kl-in", "loss", "--mean-over", "episode"],
])
def test_both_stages_learn_with_a_generator_beside_the_agent(mini, tmp_path, flags):
    generator = ["--generator", str(mini / "teacher"), "--generator-tokens", "6"]
    rows = run(mini, tmp_path / "run", *TRAIN, *generator, *flags)
    assert len(rows) == 4 and all(value == value for row in rows for value in row.values())
    reported = {f"rollout/{name}" for name in ("reward", "passages", "hit", "queries", "format")}
    assert reported | {"rollout/dropped_queries", "rollout/equal_groups"} <= set(rows[0])
    assert "eval/reward" in rows[1]  # the best weights are chosen by it
    assert load_decoder(tmp_path / "run").config.hidden_size == 16
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["phase"] == "qagent" and settings["protocol"] == "qagent"


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_run_learns_from_what_its_stage_pays_for(mini, tmp_path, monkeypatch, stage):
    """Every second episode is paid for: the groups differ, and the reward is what was said."""
    calls = []

    def rewards(episodes, tokenizer, generator, settings):
        calls.append((settings.stage, generator is not None))
        return [float(i % 2) for i in range(len(episodes))]

    monkeypatch.setattr(qagent, "rewards", rewards)
    flags = ["--stage", stage, "--generator", str(mini / "teacher"), "--steps", "1"]
    [row] = run(mini, tmp_path / "run", *TRAIN, *flags, "--eval-every", "0")
    assert calls == [(int(stage), stage == "2")]
    assert (row["rollout/reward"], row["rollout/equal_groups"]) == (0.5, 0.0)
    assert "loss/policy_loss" in row


def test_training_asks_with_qagents_prompt_where_settings_name_it(mini, tmp_path, monkeypatch):
    asked, generate = [], sampling.generate

    def keep(policy, retriever, questions, settings, **options):
        assert options["protocol"] == QAGENT._replace(max_queries=2)
        asked.extend((question.prompt[0]["content"], settings.prompt) for question in questions)
        return generate(policy, retriever, questions, settings, **options)

    monkeypatch.setattr(sampling, "generate", keep)
    flags = ["--prompt", "qagent", "--max-context-tokens", "1000", "--max-queries", "2"]
    run(mini, tmp_path / "run", *TRAIN, *flags, "--steps", "1")
    assert len(asked) == 8 + 2  # a step and a validation
    beginning = qagent.QAGENT_PROMPT.partition("{question}")[0]
    assert all(text.startswith(beginning) and prompt == "row" for text, prompt in asked)


def test_the_teacher_can_guide_wrong_episodes_as_in_dgpo(mini, tmp_path):
    """The student differs from its guide at once, and groups that are all wrong still count."""
    flags = [*TRAIN, "--beta", "0.5", "--kl-in", "loss"]
    own = run(mini, tmp_path / "own", *flags)
    guided = run(mini, tmp_path / "guided", *flags, "--kl-where", "wrong")
    # None is ever right.
    assert own[0]["rollout/equal_groups"] == guided[0]["rollout/equal_groups"] == 1.0
    assert abs(own[0]["rollout/kl_student_guide"]) < 1e-4
    assert guided[0]["rollout/kl_student_guide"] > 1e-4
    assert "loss/actor_grad_norm" not in own[0] and guided[0]["loss/actor_grad_norm"] > 0
