"""BARD: rewards against their formulas, what counts as thinking, hard stops, compression, measures.

Run: python -m pytest tests/test_bard.py
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bard
import reinforce
import sampling
import train
from bard import (
    BardSettings,
    Chain,
    additive,
    budget_of,
    check_settings,
    choice_match,
    compress,
    draw_budgets,
    fidelity,
    hard_stop,
    integer_match,
    l1_max,
    multiplicative,
    num_thinking_tokens,
    read_chains,
    spearman,
    tell,
    thinking,
    with_answer_kind,
)
from data import Question, load_questions
from episode import SEARCH_R1, Episode, Segment, load_episodes, prompt_segment, save_episodes
from model import Tokenizer, load_decoder
from rollout import Policy
from tests.support.mini import read_rows, write_rows
from tests.support.runs import run
from tests.support.scripted import ask, play
from world import trails

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-12  # of double precision
SHAPE = {"tolerance": 0.5}
HARD_STOP = SEARCH_R1._replace(interrupt=hard_stop)
STOP_TEXT = " </think>\n<answer>"  # what a hard stop puts in


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The embedded world's tokenizer: a word is a token."""
    return Tokenizer.load(ROOT / "world" / "student")


# ---- rewards ----


def test_fidelity_is_one_within_the_budget_and_falls_to_zero_at_the_tolerance():
    values = [fidelity(length, 100, **SHAPE) for length in (0, 50, 100, 125, 150, 900)]
    assert values == [1, 1, 1, 0.5, 0, 0]
    assert fidelity(101, 100, tolerance=0.0) == 0 and fidelity(100, 100, tolerance=0.0) == 1
    assert fidelity(50, 100, tolerance=0.5, use=0.1) == pytest.approx(0.95, abs=TOLERANCE)
    assert fidelity(100, 100, tolerance=0.5, use=0.1) == 1


def test_the_product_pays_no_wrong_answer_and_the_sum_does():
    assert multiplicative(0.0, 1, 100, **SHAPE) == 0
    assert multiplicative(1.0, 125, 100, **SHAPE) == 0.5
    assert additive(0.0, 1, 100, weight=0.5, **SHAPE) == 0.5
    assert additive(1.0, 125, 100, weight=0.5, **SHAPE) == 1.25
    # The shortcut, when w > 1: a short wrong answer beats a right one that is too long.
    short_and_wrong = additive(0.0, 1, 100, weight=1.5, **SHAPE)
    assert short_and_wrong > additive(1.0, 200, 100, weight=1.5, **SHAPE)
    assert multiplicative(0.0, 1, 100, **SHAPE) <= multiplicative(1.0, 200, 100, **SHAPE)


@pytest.mark.parametrize(("length", "expected"), [
    (600, 0.5 - 3e-4 * 500), (100, 0.5), (0, 0.53), (5000, 0.0)])
def test_l1_max_is_the_papers_formula(length, expected):
    value = l1_max(1.0, length, 100, alpha=3e-4, delta=0.5)
    assert value == pytest.approx(expected, abs=TOLERANCE)
    assert l1_max(1.0, 0, 4000, alpha=3e-4, delta=0.5) == 1.0
    assert l1_max(0.0, 0, 100, alpha=3e-4, delta=0.5) == 0.0


def told(name: str, golds: tuple[str, ...], budget: int) -> Question:
    return tell(Question(name, f"{name}?", golds, "test"), budget, bard.BUDGET_TEXT)


def played(
    tokenizer: Tokenizer, *turns: str, status: str = "answered", budget: int = 10
) -> Episode:
    """An episode whose agent wrote these turns, with an observation between them."""
    segments = [Segment("prompt", tokenizer.encode("?"))]
    for turn in turns:
        segments.append(Segment("agent", tokenizer.encode(turn)))
        segments.append(Segment("environment", tokenizer.encode("here")))
    answer = turns[-1].partition("<answer>")[2].partition("</answer>")[0].strip() or None
    return Episode(told("q", ("Gate",), budget), segments[:-1], status, answer)


def thought(length: int, answer: str = "Gate") -> str:
    return "<think>" + " Gate" * length + " </think>\n<answer> " + answer + " </answer>"


@pytest.mark.parametrize(("form", "expected"), [
    ("multiplicative", {8: 1.0, 10: 1.0, 12: 0.6, 15: 0.0}),
    ("additive", {8: 1.5, 10: 1.5, 12: 1.3, 15: 1.0}),
    ("l1_max", {8: 0.7, 10: 0.5, 12: 0.3, 15: 0.0}),
])
def test_an_episode_is_rewarded_by_its_thinking_alone(words, form, expected):
    settings = BardSettings(
        budget_reward=form, budget_tolerance=0.5, budget_weight=0.5, l1_alpha=0.1, l1_delta=0.5
    )
    for length, value in expected.items():
        reward = bard.reward(played(words, thought(length)), words, settings)
        assert reward == pytest.approx(value, abs=1e-9)
    wrong = bard.reward(played(words, thought(8, "Tower")), words, settings)
    assert wrong == (0.5 if form == "additive" else 0.0)


def test_the_budget_spans_all_turns(words):
    search = "<think> Gate Gate Gate Gate </think>\n<search> Gate Gate Gate </search>"
    episode = played(words, search, thought(7))
    assert num_thinking_tokens(episode, words) == 11
    assert bard.reward(episode, words, BardSettings()) == pytest.approx(0.8)
    wider = played(words, search, thought(7), budget=11)
    assert bard.reward(wider, words, BardSettings()) == 1


@pytest.mark.parametrize("turn", [
    "Gate Gate Gate <think> Gate </think>\n<answer> Gate </answer>",  # nothing is counted there
    "<answer> Gate </answer>", "<think> Gate <answer> Gate </answer>",
    "<think> Gate </think> so it is <answer> Gate </answer>",
    "<think> Gate </think><think> Gate </think>\n<answer> Gate </answer>",
    "<think> </think>\n<answer> " + "Gate " * 100 + "</answer>",
])
def test_thinking_outside_of_its_tags_is_worth_nothing(words, turn):
    assert bard.reward(played(words, turn), words, BardSettings()) == 0
    assert bard.reward(played(words, turn), words, BardSettings(budget_reward="additive")) == 0


def test_an_action_of_as_many_tokens_as_are_allowed_is_no_hidden_thinking(words):
    longest = " Gate" * bard.MAX_ACTION_TOKENS
    turn = "<think> Gate </think>\n<answer>{}</answer>"
    assert bard.is_countable(played(words, turn.format(longest)), words)
    assert not bard.is_countable(played(words, turn.format(longest + " Gate")), words)


def test_an_episode_that_was_cut_off_is_worth_nothing(words):
    episode = played(words, "<think> Gate", status="max_tokens")
    assert bard.reward(episode, words, BardSettings(budget_reward="additive")) == 0


# ---- what counts as thinking ----


@pytest.mark.parametrize(("text", "expected"), [
    ("<think>abc</think>", (3, False)), ("<think>abc", (3, True)), ("abc", (0, False)),
    ("<think></think>", (0, False)), ("a<think>b</think>c<think>de</think>f", (3, False)),
    ("<think>a>b<c</think>", (5, False)), ("</think><think>x", (1, True)),
    ("<think>a<think>b</think>", (9, False)), ("", (0, False)),
])
def test_thinking_is_counted_between_the_tags(tokenizer, text, expected):
    assert thinking(tokenizer.encode(text), tokenizer) == expected


def test_thinking_is_counted_where_tokens_are_words(words):
    inside = words.encode(" Harbor Gate , that is Gate ,")
    end = words.encode(" </think>\n<answer> Gate </answer>")
    ids = words.encode("<think>") + inside
    assert thinking(ids + end, words) == (len(inside), False)
    assert thinking(ids, words) == (len(inside), True)


# ---- how a budget is told, and drawn ----


def budgeted(budget: int, text: str = bard.BUDGET_TEXT):
    """For tests.support.scripted.play: every question has this budget."""
    return lambda name: tell(ask(name), budget, text)


def test_a_budget_is_told_in_the_question_and_counts_what_is_thought(tokenizer):
    script = "<think>abc</think><search> q1 </search><think>de</think><answer> gold </answer>"
    scripts = {"ask-a": script}
    episode = play(tokenizer, scripts, make_question=budgeted(12, "[{budget}]"))["ask-a"]
    assert "ask-a? [12]" in tokenizer.decode(episode.segments[0].ids)
    assert budget_of(episode.question) == 12
    assert num_thinking_tokens(episode, tokenizer) == 5  # over both turns, without tags and query
    silent = play(tokenizer, scripts, make_question=budgeted(12, ""))["ask-a"]
    assert "12" not in tokenizer.decode(silent.ids) and budget_of(silent.question) == 12
    with pytest.raises(ValueError, match="--budget-text: got 'think little', expected {budget}"):
        tell(ask("ask-a"), 12, "think little")


def test_a_question_without_a_budget_has_none_and_a_wrong_one_is_named():
    assert budget_of(ask("ask-a")) is None
    with pytest.raises(ValueError, match="ask-a: got budget '7', expected a whole number"):
        budget_of(replace(ask("ask-a"), metadata={"budget": "7"}))


def test_budgets_depend_on_seed_and_place_alone_and_come_from_the_list():
    questions = [Question(f"q{i}", "q", ("a",), "test") for i in range(300)]

    def drawn(*seeds: int) -> list[int]:
        return [budget_of(q) for q in draw_budgets(questions, (16, 64), "#{budget}", *seeds)]

    assert set(drawn(0, 3)) == {16, 64} and 100 < drawn(0, 3).count(16) < 200
    assert drawn(0, 3) == drawn(0, 3) != drawn(0, 4)
    asked = draw_budgets(questions, (16, 64), "#{budget}", 0, 3)
    assert [q.instruction for q in asked] == [f"#{budget}" for budget in drawn(0, 3)]


# ---- the hard stop ----

THINKS_LONG = {"ask-a": "<think>aaaaaaaaaa gold </answer>"}


def play_stopped(tokenizer, scripts: dict[str, str], budget: int, **changes) -> Episode:
    """The one episode of a script, with a budget and a hard stop."""
    return play(
        tokenizer, scripts, protocol=HARD_STOP, make_question=budgeted(budget),
        notices=(STOP_TEXT,), **changes,
    )["ask-a"]


def authors(episode: Episode) -> list[str]:
    return [segment.author for segment in episode.segments]


def test_a_hard_stop_ends_the_thinking_at_the_budget_and_asks_for_the_answer(tokenizer):
    episode = play_stopped(tokenizer, THINKS_LONG, 10, max_turns=0)
    assert authors(episode) == ["prompt", "agent", "environment", "agent"]
    assert tokenizer.decode(episode.segments[1].ids) == "<think>aaaaaaaaaa"
    assert tokenizer.decode(episode.segments[2].ids) == STOP_TEXT
    assert (episode.status, episode.answer) == ("answered", "gold")
    assert num_thinking_tokens(episode, tokenizer) == 10
    free = play(tokenizer, THINKS_LONG, make_question=budgeted(10), max_turns=0)["ask-a"]
    assert free.answer is None


def test_a_hard_stop_leaves_alone_what_ends_by_itself(tokenizer):
    script = {"ask-a": "<think>aaaaaaaaaa</think><answer> gold </answer>"}
    for budget in (11, 12, 50):  # at 11 the closing tag has just begun
        episode = play_stopped(tokenizer, script, budget, max_turns=0)
        assert authors(episode) == ["prompt", "agent"] and episode.answer == "gold"


def test_a_hard_stop_counts_the_thinking_of_all_turns(tokenizer):
    script = "<think>aaaaaa</think><search> q1 </search><think>bbbb gold </answer>"
    episode = play_stopped(tokenizer, {"ask-a": script}, 10)
    assert authors(episode) == ["prompt", *["agent", "environment"] * 2, "agent"]
    assert (episode.answer, num_thinking_tokens(episode, tokenizer)) == ("gold", 10)


def test_a_hard_stop_uses_up_no_turn(tokenizer):
    """With one turn that may search, a last turn follows an invalid action after the stop."""
    script = {"ask-a": "<think>aaaaaaaaaa </search><answer> gold </answer>"}
    episode = play_stopped(tokenizer, script, 10, max_turns=1)
    assert authors(episode) == ["prompt", *["agent", "environment"] * 2, "agent"]
    assert (episode.status, episode.answer) == ("answered", "gold")


def test_a_hard_stop_without_room_for_the_answer_ends_the_episode(tokenizer):
    start = len(prompt_segment(tokenizer, budgeted(10)("ask-a"), "short").ids)
    room = start + len("<think>") + 10 + 5
    episode = play_stopped(tokenizer, THINKS_LONG, 10, max_turns=0, max_context_tokens=room)
    assert episode.status == "max_tokens" and num_thinking_tokens(episode, tokenizer) == 10


def test_a_hard_stop_that_the_turn_would_end_before_is_refused():
    settings = BardSettings(max_turns=0, max_new_tokens=60)
    with pytest.raises(ValueError, match="--hard-stop: got a budget of 60 and --max-new-tokens 60"):
        bard.check_budgets([60], settings, stops=True)
    bard.check_budgets([59], settings, stops=True)
    bard.check_budgets([60], replace(settings, max_turns=1), stops=True)  # turns may add up to it


# ---- answers ----


@pytest.mark.parametrize(("prediction", "gold", "expected"), [
    ("204", "204", 1), ("$\\boxed{042}$", "42", 1), ("the answer is 1,024.", "1024", 1),
    ("204.0", "204", 1), ("204.5", "204", 0), ("204 or 205", "204", 0), ("-7", "7", 0),
    ("", "0", 0), (None, "3", 0), ("x", "x", 0), ("9" * 5000, "9" * 5000, 1),
    ("we get \\boxed{3} of 12", "3", 1), ("(1,2)", "12", 0), ("-0", "0", 1),
    ("1,234,567", "1234567", 1), ("12,34", "1234", 0),
])
def test_integers_are_compared_as_numbers(prediction, gold, expected):
    assert integer_match(prediction, [gold]) == expected


DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u207b\ufe58\ufe63\uff0d"


@pytest.mark.parametrize("dash", DASHES)
@pytest.mark.parametrize("text", [
    "{}5", "$x={}5$", "({}5)", "it is {}5.", "\\boxed{{{}5}}", "{}5.0", "{}05", "{}\uff15",
])
def test_s2_a_negative_number_is_one_in_whatever_dash(dash, text):
    prediction = text.format(dash)
    assert integer_match(prediction, ["-5"]) == integer_match("-5", [prediction]) == 1
    assert integer_match(prediction, ["5"]) == integer_match("5", [prediction]) == 0


@pytest.mark.parametrize(("prediction", "gold", "expected"), [
    ("+5", "5", 1), ("5.0", "5", 1), ("5.50", "5.5", 1), ("0005", "5", 1), ("-0", "0", 1),
    ("\uff11\uff0c\uff10\uff10\uff10", "1000", 1), ("\u0664\u0662", "42", 1),
    ("1{,}000", "1000", 1), ("1\\,000", "1000", 1), ("1\u202f000", "1000", 1),
    ("1'000", "1000", 1), ("1\u2019000", "1000", 1),
    ("\\boxed{1{,}000}", "1000", 1), ("\\boxed{\\text{5}}", "5", 1), ("\u2212 5", "-5", 1),
    ("1 000", "1000", 0), ("3-5", "-5", 0), ("3\u20135", "-5", 0), ("10\u00b2", "10", 0),
    ("10^2", "10", 0), ("3/4", "3", 0), ("\u00bd", "1", 0), ("2.5", "25", 0), ("1.000", "1000", 0),
    ("- 5", "5", 1),  # a list's bullet
    ("COVID-19", "19", 1), ("5-5", "5", 1), ("(3)-5", "-5", 0),
])
def test_s2_integers_are_parsed_whatever_their_spelling(prediction, gold, expected):
    assert integer_match(prediction, [gold]) == expected


@pytest.mark.parametrize(("prediction", "gold", "expected"), [
    ("C", "C", 1), ("(c)", "C", 1), ("C. the third", "C", 1), ("the answer is C", "C", 1),
    ("Answer: (D) because", "D", 1), ("\\boxed{\\text{B}}", "B", 1), ("A cat", "A", 0),
    ("B and C", "B", 0), ("Because", "B", 0), ("D", "C", 0), (None, "A", 0), ("**C**", "C", 1),
    ("I, think D", "I", 0), ("the answer is a matter of C", "A", 0),
    ("the answer is option b", "B", 0),
])
def test_choices_are_compared_by_their_letter(prediction, gold, expected):
    assert choice_match(prediction, [gold]) == expected


def test_a_row_says_how_its_answer_is_compared(tmp_path):
    path = tmp_path / "aime.jsonl"
    row = {"id": 1, "question": "How many?", "golden_answers": ["42"], "answer_kind": "integer"}
    write_rows(path, [row])
    [question] = map(with_answer_kind, load_questions(path))
    assert Episode(question, [], "answered", "\\boxed{042}").score == 1
    for kind in ("number", ["integer"], 3):
        write_rows(path, [row | {"answer_kind": kind}])
        message = "aime_1: got .* for answer_kind, expected one of text, integer, choice"
        with pytest.raises(ValueError, match=message):
            with_answer_kind(load_questions(path)[0])
    for kind, gold in (("integer", "x"), ("integer", "3 or 5"), ("choice", "the third")):
        write_rows(path, [row | {"answer_kind": kind, "golden_answers": [gold]}])
        message = f"got .*{gold}.* for golden_answers, expected answers of kind {kind}"
        with pytest.raises(ValueError, match=message):
            with_answer_kind(load_questions(path)[0])


def test_s2_zero_is_an_integer_and_text_keeps_the_rule_that_its_file_was_read_with(tmp_path):
    row = {"question": "How many?", "golden_answers": ["0"], "answer_kind": "integer"}
    text = {"question": "Who?", "golden_answers": ["3.5"]}
    write_rows(tmp_path / "q.jsonl", [row, text])
    none, who = map(with_answer_kind, load_questions(tmp_path / "q.jsonl", answer_rule="numbers"))
    assert none.match("\u22120", none.golden_answers) == 1.0
    assert who.match("35", who.golden_answers) == 0.0


def test_a_saved_episode_keeps_its_budget_and_the_kind_of_its_answer(words, tmp_path):
    question = Question("q", "how many?", ("42",), "test", metadata={"answer_kind": "integer"})
    question = with_answer_kind(tell(question, 16, "#{budget}"))
    episode = Episode(question, [Segment("agent", words.encode("x"))], "answered", "\\boxed{42}")
    save_episodes(tmp_path / "episodes.jsonl", [episode], words)
    [loaded] = load_episodes(
        tmp_path / "episodes.jsonl", words, prompt="short", prepare=with_answer_kind
    )
    assert (budget_of(loaded.question), loaded.question.instruction) == (16, "#16")
    assert loaded.score == episode.score == 1


# ---- settings ----


@pytest.mark.parametrize(("budgets", "message"), [
    ((), "--budgets: got none"), ((0,), "got 0, expected 1 to 4095"), ((16, -1), "got -1"),
    ((5000,), "got 5000"), ((4096,), "got 4096"),
])
def test_budgets_that_cannot_be_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        check_settings(BardSettings(phase="bard-rl", budgets=budgets))


@pytest.mark.parametrize(("flag", "value"), [
    ("budget_use", 2.0), ("versions_per_question", 1), ("compress_tries", 0), ("min_fill", 1.5),
    ("budget_tolerance", -1),
])
def test_settings_out_of_range_are_refused(flag, value):
    settings = BardSettings(phase="bard-data", budgets=(16,), **{flag: value})
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}: got {value}, expected"):
        check_settings(settings)


def test_a_budget_text_without_a_place_for_the_number_is_refused():
    with pytest.raises(ValueError, match="--budget-text: got 'be brief'"):
        check_settings(BardSettings(budgets=(16,), budget_text="be brief"))
    check_settings(BardSettings(budgets=(16,), budget_text=""))


@pytest.mark.parametrize("phase", ["bard-sft", "bard-rl"])
def test_a_reward_that_reads_other_tags_is_refused(phase):
    settings = BardSettings(phase=phase, budgets=(16,), protocol="qagent.py:QAGENT")
    message = f"--protocol qagent.py:QAGENT: got it for phase {phase}"
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_guidance_as_a_reward_of_groups_is_refused():
    guided = BardSettings(phase="bard-rl", budgets=(16,), kl_where="wrong")
    with pytest.raises(ValueError, match="--kl-in loss"):
        bard.with_defaults(guided)
    bard.with_defaults(replace(guided, kl_in="loss"))
    bard.with_defaults(replace(guided, advantage="gae"))


def test_phases_have_their_own_defaults_where_the_settings_leave_them_open():
    reinforced = bard.with_defaults(BardSettings(phase="bard-rl", budgets=(16,)))
    assert (reinforced.advantage, reinforced.kl_where) == ("group", "all")
    assert reinforced.run_dir == "runs/bard-rl"
    assert bard.with_defaults(BardSettings(budgets=(16,))).episodes == "runs/versions.jsonl"
    with pytest.raises(ValueError, match="--group-size 1"):
        bard.with_defaults(replace(reinforced, group_size=1))


# ---- data ----


def trail_chains(num: int, seed: int = 0) -> list[Chain]:
    rng, chains = random.Random(seed), []
    for i in range(num):
        row, trail = trails.question(rng, f"q{i}")
        question = Question(row["id"], row["question"], tuple(row["golden_answers"]), "trails")
        chains.append(Chain(question, trails.natural_chain(trail)))
    return chains


def chain_rows(num: int) -> list[dict]:
    """The same as rows of a chains file."""
    return [
        {"id": question.id, "question": question.question,
         "golden_answers": list(question.golden_answers), "chain": text}
        for question, text in trail_chains(num)
    ]


def test_the_worlds_compressor_keeps_within_the_budget_and_ends_with_the_answer(words):
    def length(text: str) -> int:
        return bard.num_chain_tokens(words, text)

    natural = []
    for question, chain in trail_chains(60):
        natural.append(length(chain))
        last = None
        for budget in (600, 256, 100, 64, 33, 16, 5, 4):
            text = trails.compress(chain, budget, length)
            assert length(text) <= budget and text.split()[-1] == question.golden_answers[0]
            assert (text == chain) == (length(chain) <= budget)
            assert last is None or length(text) <= length(last)
            last = text
    assert max(natural) > 10 * min(natural)
    broken = "from Gate Tower , and from Mill Lake ,"
    assert trails.compress(broken, 100, length) is None
    assert trails.compress("nothing here", 100, length) is None
    assert trails.compress(chain, 3, length) is None


def test_versions_keep_a_question_at_several_budgets_and_their_counts_add_up(words):
    settings = BardSettings(
        budgets=(8, 16, 32, 64, 128, 256), versions_per_question=4, prompt="short",
        budget_text="#{budget}",
    )
    chains = trail_chains(40)
    natural_chains = {question.id: text for question, text in chains}
    episodes, counts = compress(chains, words, None, None, settings)
    assert sum(counts.values()) == 4 * 40
    assert len(episodes) == counts["compressed"] + counts["kept as it was"] > 100
    by_question: dict[str, list[Episode]] = {}
    num_short = 0  # natural chains of less than half of a budget: they stay as they are
    for episode in episodes:
        budget, length = budget_of(episode.question), num_thinking_tokens(episode, words)
        natural = bard.num_chain_tokens(words, natural_chains[episode.question.id])
        assert length <= budget and (length >= 0.5 * budget or length == natural)
        num_short += length < 0.5 * budget
        prompt = words.decode(episode.segments[0].ids)
        assert prompt.rstrip().endswith(f"#{budget}\nassistant")
        by_question.setdefault(episode.question.id, []).append(episode)
    assert num_short >= 3
    for versions in by_question.values():
        lengths = {num_thinking_tokens(episode, words) for episode in versions}
        assert len(versions) >= 2 and len(lengths) >= 2


def test_each_chain_has_budgets_of_its_own(words):
    """One draw for all chains would leave the other budgets without a single version."""
    settings = BardSettings(budgets=tuple(range(20, 80)), versions_per_question=4)
    targets = bard.draw_targets(trail_chains(10), settings)
    budgets = [budget_of(question) for question, _ in targets]
    drawn = [tuple(budgets[start : start + 4]) for start in range(0, 40, 4)]
    assert all(len(set(budgets)) == 4 and list(budgets) == sorted(budgets) for budgets in drawn)
    assert len(set(drawn)) == 10
    assert targets == bard.draw_targets(trail_chains(10), settings)
    others = bard.draw_targets(trail_chains(10), replace(settings, seed=1))
    assert budgets != [budget_of(question) for question, _ in others]


@pytest.mark.parametrize(("length", "expected"), [
    (10, ""), (11, "too long"), (5, ""), (4, "too short"), (0, "no chain")])
def test_a_version_fits_its_budget_to_the_token(words, length, expected):
    target = Chain(told("q", ("Gate",), 10), "Gate " * 99)
    assert bard.refusal(("Gate " * length).strip() or None, target, words, 0.5) == expected


def test_what_a_compressor_does_wrong_is_dropped_and_counted(words, monkeypatch):
    chains = [Chain(Question("q", "where?", ("Gate",), "test"), " ".join(["Gate"] * 200))]
    proposals = {
        16: "Gate " * 17, 32: "Gate " * 8, 64: "Tower " * 40, 128: "Gate " * 100, 150: "Gate " * 120
    }

    def propose(targets, *rest, **options):
        return [proposals[budget_of(target.question)] for target in targets]

    monkeypatch.setattr(bard, "propose", propose)
    settings = BardSettings(
        budgets=tuple(proposals), versions_per_question=5, prompt="short", compress_tries=3
    )
    episodes, counts = compress(chains, words, object(), None, settings)
    assert not episodes  # two of five: what is left stands at its easy budgets alone
    assert {reason: count for reason, count in counts.items() if count} == {
        "too long": 1, "too short": 1, "answer lost": 1, "question with too few versions": 2,
    }
    proposals[64] = "Tower Gate " * 20
    episodes, _ = compress(chains, words, object(), None, settings)
    assert sorted(budget_of(episode.question) for episode in episodes) == [64, 128, 150]


def test_a_compressor_that_fails_is_asked_again(words, monkeypatch):
    attempts = []

    def propose(targets, *rest, seed):
        attempts.append((seed, len(targets)))
        good = {16: 12, 32: 20 if len(attempts) == 2 else 200}
        return ["Gate " * good[budget_of(target.question)] for target in targets]

    monkeypatch.setattr(bard, "propose", propose)
    settings = BardSettings(
        budgets=(16, 32), versions_per_question=2, compress_tries=3, prompt="short", seed=7
    )
    chains = [Chain(Question("q", "where?", ("Gate",), "test"), "Gate " * 300)]
    episodes, _ = compress(chains, words, object(), None, settings)
    assert attempts == [(7, 2), (8, 1), (9, 0)] and len(episodes) == 2


def test_a_model_that_compresses_is_asked_in_words_and_what_it_leaves_open_is_no_chain(
    words, monkeypatch
):
    """Its own thinking is dropped. A full context and an answer that was cut off give nothing."""
    written = {"a?": "hm </think> so <answer> x", "b?": "cut off", "c?": None}

    def generate(policy, retriever, questions, settings, **_):
        assert settings.max_turns == 0 and settings.prompt == "row" and settings.temperature == 1
        episodes = []
        for question in questions:
            asked = question.prompt[0]["content"]
            assert "at most 4 tokens" in asked and "Answer: x" in asked
            assert "Reasoning: Gate Gate Gate" in asked
            assert not question.instruction  # the agent's, not the compressor's
            text = written[question.question]
            ids = words.encode(text or "") + [words.eos_id] * (question.question == "a?")
            segments = [Segment("prompt", words.encode("?"))]
            segments += [Segment("agent", ids)] * (text is not None)
            episodes.append(Episode(question, segments, "invalid"))
        return episodes

    monkeypatch.setattr(bard, "generate", generate)
    targets = [
        Chain(tell(Question(q, q, ("x",), "test"), 4, bard.BUDGET_TEXT), "Gate " * 30)
        for q in written
    ]
    policy = Policy(None, words)
    proposed = bard.propose(targets, words, policy, BardSettings(), seed=0)
    assert proposed == ["so   x", None, None]


@pytest.mark.parametrize(("budget", "room"), [(4, 300), (900, 916)])
def test_a_compressor_has_room_to_think_before_it_writes(words, monkeypatch, budget, room):
    def generate(policy, retriever, questions, settings, **_):
        assert settings.max_new_tokens == room
        return [Episode(questions[0], [Segment("prompt", [1])])]

    monkeypatch.setattr(bard, "generate", generate)
    targets = [Chain(told("q", ("x",), budget), "Gate " * 999)]
    settings = BardSettings(max_new_tokens=300)
    assert bard.propose(targets, words, Policy(None, words), settings, seed=0) == [None]


def test_a_compressed_chain_of_a_choice_needs_a_teacher_to_check_it(tmp_path, words):
    path = tmp_path / "chains.jsonl"
    row = {"question": "a?", "golden_answers": ["C"], "chain": "so C", "answer": "C"}
    write_rows(path, [row | {"answer_kind": "choice"}])
    compressor = Policy(None, words)
    with pytest.raises(ValueError, match="give --teacher"):
        bard.write_versions(path, words, compressor, None, BardSettings())


def test_a_checker_must_find_the_answer_when_it_reads_the_chain(words, monkeypatch):
    def generate(policy, retriever, episodes, settings, **_):
        assert settings.temperature == 0 and settings.max_turns == 0
        for episode in episodes:
            prompt, shown = episode.segments
            assert shown.opens == "<answer>"
            assert "#7" not in words.decode(prompt.ids)  # the budget is the agent's
            text = words.decode(shown.ids)
            assert text.startswith("<think>") and text.endswith("</think>\n<answer>")
            episode.answer = "x" if "right" in text else "y"
        return episodes

    monkeypatch.setattr(bard, "generate", generate)
    question = tell(Question("q", "q", ("x",), "test"), 7, "#{budget}")
    chains = [Chain(question, "right"), Chain(question, "x but wrong")]
    settings = BardSettings(prompt="short")
    assert bard.check_answers(chains, Policy(None, words), settings) == [True, False]
    assert bard.check_answers(chains, None, settings) == [False, True]  # it must be named


def one_turn(text: str) -> list[dict]:
    return [{"author": "agent", "text": text}]


def test_chains_are_read_from_rows_and_from_episodes_and_wrong_ones_are_left_out(tmp_path):
    asked = {"golden_answers": ["x"], "answer": "x"}
    search = "<think> 1 </think> <search> s </search>"
    answer = "<think> 2 </think> <answer> x </answer>"
    path = tmp_path / "chains.jsonl"
    write_rows(path, [
        {"id": 1, "question": "a?", "golden_answers": ["x"], "chain": " so x "},
        {"id": 2, "question": "b?", "golden_answers": ["x"], "chain": "so y", "answer": "y"},
        {"id": 3, "question": "c?", "golden_answers": ["12"], "chain": "so",
         "answer": "\\boxed{12}", "answer_kind": "integer"},
        {"id": 4, "question": "d?", **asked,
         "segments": one_turn("<think> in d </think>\n<answer> x </answer>")},
        {"id": 5, "question": "e?", **asked, "segments": one_turn(search) + one_turn(answer)},
        {"id": 6, "question": "f?", **asked,  # it said more than it thought
         "segments": one_turn("Well, <think> in f </think>\n<answer> x </answer>")},
    ])
    chains, num_left_out = read_chains(path)
    read = [(chain.question.question, chain.text) for chain in chains]
    assert read == [("a?", "so x"), ("c?", "so"), ("d?", "in d")] and num_left_out == 3
    assert [chain.question.metadata for chain in chains] == [{}, {"answer_kind": "integer"}, {}]
    row = {"id": 1, "question": "a?", "golden_answers": ["x"]}
    write_rows(path, [row | {"chain": "<think> so x </think>"}])
    assert read_chains(path)[0][0].text == "so x"


@pytest.mark.parametrize(("change", "message"), [
    ({"chain": "so <think> x"}, "chains.jsonl:1: got <think> within a chain"),
    ({"chain": "so </think> x"}, "chains.jsonl:1: got </think> within a chain"),
    ({"chain": "<search> s </search>"}, "chains.jsonl:1: got <search> within a chain"),
    ({"segments": ["a"]}, "chains.jsonl:1: got no chain"),
    ({"segments": one_turn(5)}, "got no right answer with a chain in 1 rows"),
    ({"segments": "x"}, "chains.jsonl:1: got no chain"), ({}, "chains.jsonl:1: got no chain"),
    ({"chain": "so x", "answer": 5}, "chains.jsonl:1: got answer 5"),
    ({"chain": "so y", "answer": "y"}, "got no right answer"),
])
def test_rows_without_a_chain_are_refused_by_file_and_line(tmp_path, change, message):
    path = tmp_path / "chains.jsonl"
    write_rows(path, [{"id": 1, "question": "a?", "golden_answers": ["x"], **change}])
    with pytest.raises(ValueError, match=message):
        read_chains(path)


def test_versions_are_written_and_read_again_with_their_budgets(tmp_path, words):
    write_rows(tmp_path / "chains.jsonl", chain_rows(12))
    out = tmp_path / "versions.jsonl"
    settings = BardSettings(
        budgets=(16, 64, 256), versions_per_question=3, prompt="short", episodes=str(out)
    )
    line = bard.write_versions(tmp_path / "chains.jsonl", words, None, None, settings)
    assert "versions of 12 chains" in line
    episodes = load_episodes(out, words, prompt="short")
    counts = json.loads((tmp_path / "versions.counts.json").read_text())
    assert len(episodes) == counts["versions"]
    assert {budget_of(episode.question) for episode in episodes} == {16, 64, 256}
    assert counts["mean_length"]["16"] < counts["mean_length"]["64"] < counts["mean_length"]["256"]


# ---- measures ----


def test_spearman_is_the_correlation_of_ranks_with_ties_in_the_middle():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    expected = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    assert spearman([16, 32, 64, 128], [5, 5, 9, 11]) == pytest.approx(expected)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0  # no control is no correlation, and not NaN


def budget_row(id: str, budget: int, length: int, correct: float, correct_free: float) -> dict:
    return {"id": id, "budget": budget, "length": length, "correct": correct,
            "correct_free": correct_free, "status": "answered", "formed": True}


def test_measures_are_what_their_names_say():
    result = bard.summarize_budgets([
        budget_row("a", 10, 10, 1, 1), budget_row("a", 20, 15, 1, 1),
        budget_row("b", 10, 14, 0, 1), budget_row("b", 20, 30, 1, 0),
    ])
    ten, twenty = result["budgets"][10], result["budgets"][20]
    assert (ten["adherence"], twenty["adherence"]) == (0.5, 0.5)
    assert (ten["accuracy"], ten["accuracy_free"]) == (0.5, 1.0)
    assert ten["overshoot"] == pytest.approx(0.2)
    assert twenty["overshoot"] == pytest.approx(0.25)
    assert ten["relative_error"] == pytest.approx(0.2)
    assert twenty["relative_error"] == pytest.approx(0.375)
    assert ten["use"] == pytest.approx(1.2) and result["spearman"] == pytest.approx(1)
    assert result["area"] == pytest.approx(0.75)  # from 0.5 to 1 on a straight line
    first = bard.budget_table(result).splitlines()[2].split()
    assert first[:3] == ["10", "1.000", "0.500"]


def test_the_area_is_over_the_logarithm_of_the_budget():
    rows = [budget_row("a", b, b, right, right) for b, right in ((10, 0), (20, 1), (80, 1))]
    area = bard.summarize_budgets(rows)["area"]
    assert area == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)  # one octave, then two
    assert bard.summarize_budgets(rows[1:2])["area"] == 1.0


def test_every_question_is_asked_freely_and_with_a_hard_stop(words, monkeypatch):
    def generate(policy, retriever, questions, settings, *, protocol, **_):
        turn = words.encode("<think> a </think>\n<answer> b </answer>")
        answer = "x" if protocol.interrupt is hard_stop else "b"  # right if nothing stops it
        return [Episode(q, [Segment("agent", turn)], "answered", answer) for q in questions]

    monkeypatch.setattr(bard, "generate", generate)
    questions = [Question("q", "?", ("b",), "test")]
    policy = Policy(None, words)
    result = bard.measure_budgets(policy, questions, BardSettings(), [16, 32])
    for values in result["budgets"].values():
        assert (values["accuracy"], values["accuracy_free"]) == (0.0, 1.0)


MEASURE = [
    "measure", "--config", "none", "--model", str(ROOT / "world" / "student"), "--prompt", "short",
    "--max-turns", "0", "--max-new-tokens", "24",
]


def test_budgets_are_measured_by_the_program(tmp_path, capsys):
    write_rows(tmp_path / "q.jsonl", chain_rows(4))
    flags = ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "out")]
    bard.main([*MEASURE, *flags, "--budgets", "4,8", "--name", "m"])
    result = json.loads((tmp_path / "out" / "budgets.json").read_text())
    assert set(result["budgets"]) == {"4", "8"} and result["budgets"]["4"]["n"] == 4
    assert (result["name"], result["settings"]["budgets"]) == ("m", [4, 8])
    assert len(read_rows(tmp_path / "out" / "budgets.jsonl")) == 8
    assert (tmp_path / "out" / "run.json").is_file()
    assert "Spearman of length and budget" in capsys.readouterr().out


def test_the_program_compares_answers_of_their_kind(tmp_path, monkeypatch):
    row = {"question": "how many?", "golden_answers": ["42"], "answer_kind": "integer"}
    write_rows(tmp_path / "q.jsonl", [row])
    asked = []

    def measure_budgets(policy, questions, *rest, **options):
        asked.extend(questions)
        raise InterruptedError

    monkeypatch.setattr(bard, "measure_budgets", measure_budgets)
    flags = ["--questions", str(tmp_path / "q.jsonl"), "--out", str(tmp_path)]
    with pytest.raises(InterruptedError):
        bard.main([*MEASURE, *flags, "--budgets", "4"])
    assert [question.match for question in asked] == [integer_match]


@pytest.mark.parametrize(("flags", "message"), [
    ([], "--budgets: got none"), (["--budgets", "4", "--episodes"], "--episodes: got it"),
    (["--budgets", "24"], "--hard-stop: got a budget of 24 and --max-new-tokens 24"),
    (["--budgets", "0"], "budget: got 0"), (["--budgets", "4096"], "budget: got 4096"),
    (["--budgets", "4", "--budget-text", "briefly"], "--budget-text: got 'briefly'"),
])
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        bard.main([*MEASURE, *flags])


def test_ask_prints_an_episode_that_keeps_to_its_budget(capsys):
    question = trail_chains(1)[0].question.question
    ask_flags = ["ask", *question.split(), *MEASURE[1:]]
    bard.main([*ask_flags, "--budget", "4", "--hard-stop", "--budget-text", "#{budget}"])
    printed = capsys.readouterr().out
    assert "? #4" in printed and "of 4 tokens thought]" in printed
    bard.main([*ask_flags, "--budgets", "2", "3", "9"])
    assert "Think for at most 3 tokens." in capsys.readouterr().out
    with pytest.raises(ValueError, match="budget: got 0"):
        bard.main(ask_flags)


def test_the_program_says_what_it_expects():
    for argv in (["ask"], ["aks", "who"], ["measure", "who"]):
        with pytest.raises((SystemExit, ValueError), match="expected"):
            bard.main(argv)


# ---- a run ----


def test_the_metrics_of_a_step_count_who_kept_to_the_budget_itself_included(words):
    turn = words.encode("<think> a b c </think>\n<answer> b </answer>")
    length = thinking(turn, words).num_tokens
    episodes = [
        Episode(told("q", ("b",), budget), [Segment("agent", turn)], "answered", "b")
        for budget in (length - 1, length, length + 9, length + 9)
    ]
    report = bard.report_thinking(episodes, words)
    assert report == {"thinking": 4 * length, "adherence": 3}


# What rules wrote is not checked by a teacher.
@pytest.mark.parametrize("teacher", ["", str(ROOT / "world" / "teacher")])
def test_the_data_phase_reads_a_file_of_chains_and_needs_no_search(
    tmp_path, words, capsys, teacher
):
    chains, out = tmp_path / "chains.jsonl", tmp_path / "versions.jsonl"
    write_rows(chains, chain_rows(8))
    train.main([
        "--config", "none", "--phase", "bard-data", "--chains", str(chains), "--episodes", str(out),
        "--prompt", "short", "--student", str(ROOT / "world" / "student"), "--teacher", teacher,
        "--budgets", "16,48,120", "--budget-text", "#{budget}",
    ])
    assert "versions of 8 chains" in capsys.readouterr().out
    episodes = load_episodes(out, words, prompt="short")
    assert {budget_of(episode.question) for episode in episodes} == {16, 48, 120}


def test_the_data_phase_asks_the_teacher_where_there_is_no_file(mini, tmp_path, monkeypatch):
    """What it answers rightly is compressed; without a teacher the phase says what to give."""

    def generate(policy, retriever, questions, settings, **_):
        episodes = []
        for question in questions:
            assert budget_of(question) is None and not question.instruction
            [gold] = question.golden_answers
            text = f"<think> from Gate Mill , that is Mill , from Mill {gold} , </think>"
            turn = Segment("agent", policy.tokenizer.encode(f"{text}<answer> {gold} </answer>"))
            prompt = prompt_segment(policy.tokenizer, question, settings.prompt)
            episodes.append(Episode(question, [prompt, turn], "answered", gold))
        return episodes

    monkeypatch.setattr(sampling, "generate", generate)
    out = tmp_path / "versions.jsonl"
    argv = ["--config", str(mini / "mini.toml"), "--phase", "bard-data", "--episodes", str(out)]
    argv += ["--budgets", "16", "24", "80", "--versions-per-question", "3"]
    train.main(argv)
    chains = read_rows(tmp_path / "versions.chains.jsonl")
    versions = load_episodes(out, Tokenizer.load(mini / "student"), prompt="short")
    assert len(versions) == 3 * len(chains) == 3 * 22  # all but those set apart to validate
    assert {budget_of(episode.question) for episode in versions} == {16, 24, 80}
    (tmp_path / "versions.chains.jsonl").unlink()
    with pytest.raises(ValueError, match="--teacher: got no checkpoint and no --chains"):
        train.main([*argv, "--teacher", ""])


def test_the_data_phase_takes_chains_that_are_there_and_says_so(mini, tmp_path, capsys):
    write_rows(tmp_path / "versions.chains.jsonl", chain_rows(4))
    argv = ["--config", str(mini / "mini.toml"), "--phase", "bard-data", "--max-turns", "0"]
    argv += ["--episodes", str(tmp_path / "versions.jsonl"), "--budgets", "200", "400", "800"]
    train.main([*argv, "--max-context-tokens", "900"])
    assert "versions.chains.jsonl: no fingerprint: taken as it is" in capsys.readouterr().out
    assert read_rows(tmp_path / "versions.jsonl")


def budgeted_episodes(mini: Path, tmp_path: Path) -> Path:
    rows = [row | {"metadata": {"budget": 4}} for row in read_rows(mini / "episodes.jsonl")]
    write_rows(tmp_path / "told.jsonl", rows)
    return tmp_path / "told.jsonl"


def check_rows(rows: list[dict]) -> None:
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3
    for row in rows:
        assert all(isinstance(value, float | int) and value == value for value in row.values())
    assert {"eval/score", "eval/adherence"} <= set(rows[1])


def test_bard_sft_imitates_episodes_with_a_budget_and_refuses_others(mini, tmp_path):
    flags = ["--phase", "bard-sft", "--budgets", "4", "9"]
    with pytest.raises(ValueError, match="got episodes without a budget.*--phase bard-data"):
        run(mini, tmp_path / "run", *flags)
    told_file = budgeted_episodes(mini, tmp_path)
    rows = run(mini, tmp_path / "run", *flags, "--episodes", str(told_file), "--overwrite")
    check_rows(rows)
    assert "eval/reward" not in rows[1] and "rollout/equal_groups" not in rows[0]
    assert load_decoder(tmp_path / "run").config.hidden_size == 16
    with pytest.raises(OSError, match="absent, which is not there.*--phase bard-data"):
        run(mini, tmp_path / "other", *flags, "--episodes", str(tmp_path / "absent"))


def test_bard_sft_tells_the_budget_of_an_episode_that_has_no_prompt(mini, tmp_path, monkeypatch):
    shown = []

    def distil(run, settings, student, teacher, session, task, schedule):
        assert teacher is None
        prompts = [episode.segments[0].ids for episode in schedule.episodes]
        shown.extend(student.tokenizer.decode(ids) for ids in prompts)
        raise InterruptedError

    monkeypatch.setattr(bard, "distil", distil)
    flags = ["--phase", "bard-sft", "--budgets", "4", "9", "--budget-text", "#{budget}"]
    with pytest.raises(InterruptedError):
        run(mini, tmp_path / "run", *flags, "--episodes", str(budgeted_episodes(mini, tmp_path)))
    assert shown and all("? #4" in text for text in shown)


def test_bard_rl_runs_and_leaves_a_loadable_model_metrics_times_and_settings(mini, tmp_path):
    flags = ["--phase", "bard-rl", "--budgets", "4", "9", "--group-size", "2"]
    rows = run(mini, tmp_path / "run", *flags)
    check_rows(rows)
    assert {"rollout/reward", "rollout/thinking", "rollout/adherence", "rollout/equal_groups"} <= (
        set(rows[0]))
    assert "eval/reward" in rows[1]  # the best weights are chosen by it
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (settings["phase"], settings["budgets"]) == ("bard-rl", [4, 9])
    assert load_decoder(tmp_path / "run").config.hidden_size == 16


def test_bard_rl_learns_from_its_own_reward_with_one_budget_a_group(mini, tmp_path, monkeypatch):
    """Rewards 0 and 1 in turn, then equal ones: who shares a budget, and what is left out."""
    asked, masks = [], []

    def reward(episode, tokenizer, settings):
        asked.append(episode.question)
        return float(len(asked) % 2) if len(asked) <= 8 else 1.0

    drop_equal_groups = reinforce.drop_equal_groups

    def keep_masks(*arguments):
        batch = drop_equal_groups(*arguments)
        masks.append(batch.response_mask)
        return batch

    monkeypatch.setattr(bard, "reward", reward)
    monkeypatch.setattr(reinforce, "drop_equal_groups", keep_masks)
    budgets = [str(budget) for budget in range(3, 60)]
    rows = run(
        mini, tmp_path / "run", "--phase", "bard-rl", "--budgets", *budgets, "--group-size", "4",
        "--steps", "2", "--kl-where", "none", "--eval-every", "0",
    )
    for k in range(0, 16, 4):
        assert len({(q.id, budget_of(q)) for q in asked[k : k + 4]}) == 1
    assert len({budget_of(q) for q in asked}) > 1
    assert [row["rollout/reward"] for row in rows] == [0.5, 1.0]
    assert rows[0]["rollout/score"] == 0.0
    assert [row["rollout/equal_groups"] for row in rows] == [0.0, 1.0]
    assert masks[0].any() and not masks[1].any()
    assert "loss/policy_loss" in rows[0] and "loss/policy_loss" not in rows[1]


def test_the_teacher_can_guide_wrong_episodes_as_in_dgpo(mini, tmp_path):
    """The student differs from its teacher at once, and from its initial policy it does not."""
    flags = ["--phase", "bard-rl", "--budgets", "9", "--group-size", "4", "--kl-in", "loss"]
    flags += ["--beta", "0.5", "--steps", "1", "--eval-every", "0"]
    [own] = run(mini, tmp_path / "own", *flags)
    [guided] = run(mini, tmp_path / "guided", *flags, "--kl-where", "wrong")
    assert abs(own["rollout/kl_student_guide"]) < 1e-4 < guided["rollout/kl_student_guide"]
    # None is ever right: without a teacher there is nothing to learn.
    assert "loss/actor_grad_norm" not in own and guided["loss/actor_grad_norm"] > 0


def test_the_questions_of_a_run_know_how_their_answers_are_compared(tmp_path):
    rows = [
        {"question": f"how many {i}?", "golden_answers": ["42"], "answer_kind": "integer"}
        for i in range(20)
    ]
    write_rows(tmp_path / "q.jsonl", rows)
    settings = BardSettings(questions=str(tmp_path / "q.jsonl"), max_turns=0)
    session = bard.open_questions(settings, "cpu", asks=True)
    assert (len(session.questions), len(session.val_questions)) == (18, 2)
    questions = [*session.questions, *session.val_questions]
    assert all(question.match is integer_match for question in questions)


def test_a_step_whose_groups_are_all_equal_moves_no_weight(mini, tmp_path):
    before = load_decoder(mini / "student").state_dict()
    flags = ["--phase", "bard-rl", "--budgets", "9", "--group-size", "4"]
    run(mini, tmp_path / "run", *flags, "--weight-decay", "0.5")
    # A random model answers nothing, so every reward is 0.
    after = load_decoder(tmp_path / "run").state_dict()
    assert all(before[name].equal(after[name]) for name in before)


def test_a_resumed_run_writes_the_same_metrics_as_an_uninterrupted_one(mini, tmp_path):
    flags = ["--phase", "bard-rl", "--budgets", "4", "9", "--group-size", "4"]
    uninterrupted = run(mini, tmp_path / "whole", *flags)
    run(mini, tmp_path / "part", *flags)
    # As if the run had ended one step earlier: its last lines of metrics are cut.
    last = sorted((tmp_path / "part" / "state").iterdir())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert run(mini, tmp_path / "part", *flags, "--resume") == uninterrupted
