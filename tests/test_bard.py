"""Budgets: rewards against their formulas, what counts as thinking, compression and its filters, measures.

Run: python -m pytest tests/test_bard.py
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bard
import eval as evaluation
import plots
import reinforce
import trails
import train
from bard import BardSettings, additive, compress, fidelity, l1_max, multiplicative, read_chains, spearman
from data import Question, choice_match, draw_budgets, integer_match, load_questions
from episode import Batch, Episode, Segment, load_episodes, num_thinking_tokens
from model import Tokenizer
from rollout import Policy
from settings import TrainSettings, with_defaults

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-12  # of double precision
SHAPE = {"tolerance": 0.5}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "world" / "student")


# ---- rewards ----


def test_fidelity_is_one_within_the_budget_and_falls_to_zero_at_the_tolerance():
    assert [fidelity(n, 100, **SHAPE) for n in (0, 50, 100, 125, 150, 900)] == [1, 1, 1, 0.5, 0, 0]
    assert fidelity(101, 100, tolerance=0.0) == 0 and fidelity(100, 100, tolerance=0.0) == 1
    assert fidelity(50, 100, tolerance=0.5, use=0.1) == pytest.approx(0.95, abs=TOLERANCE)
    assert fidelity(100, 100, tolerance=0.5, use=0.1) == 1


def test_the_product_pays_no_wrong_answer_and_the_sum_does():
    assert multiplicative(0.0, 1, 100, **SHAPE) == 0 and multiplicative(1.0, 125, 100, **SHAPE) == 0.5
    assert additive(0.0, 1, 100, weight=0.5, **SHAPE) == 0.5
    assert additive(1.0, 125, 100, weight=0.5, **SHAPE) == 1.25
    # the shortcut: with the sum a short wrong answer beats a right one that is too long for any fidelity, when w > 1
    assert additive(0.0, 1, 100, weight=1.5, **SHAPE) > additive(1.0, 200, 100, weight=1.5, **SHAPE)
    assert multiplicative(0.0, 1, 100, **SHAPE) <= multiplicative(1.0, 200, 100, **SHAPE)


def test_l1_max_is_the_papers_formula():
    for length, expected in ((600, 0.5 - 3e-4 * 500), (100, 0.5), (0, 0.53), (5000, 0.0)):
        assert l1_max(1.0, length, 100, alpha=3e-4, delta=0.5) == pytest.approx(expected, abs=TOLERANCE)
    assert l1_max(1.0, 0, 4000, alpha=3e-4, delta=0.5) == 1.0 and l1_max(0.0, 0, 100, alpha=3e-4, delta=0.5) == 0.0


def played(tokenizer: Tokenizer, *turns: str, status: str = "answered") -> Episode:
    """An episode whose agent wrote these turns, with an observation between them."""
    segments = [Segment("prompt", tokenizer.encode("?"))]
    for turn in turns:
        segments += [Segment("agent", tokenizer.encode(turn)), Segment("environment", tokenizer.encode("here"))]
    answer = turns[-1].partition("<answer>")[2].partition("</answer>")[0].strip() or None
    return Episode(Question("q", "q", ("Gate",), "test", budget=10), segments[:-1], status, answer)


def thought(n: int, answer: str = "Gate") -> str:
    return "<think>" + " Gate" * n + " </think>\n<answer> " + answer + " </answer>"


@pytest.mark.parametrize(("form", "expected"), [
    ("multiplicative", {8: 1.0, 10: 1.0, 12: 0.6, 15: 0.0}), ("additive", {8: 1.5, 10: 1.5, 12: 1.3, 15: 1.0}),
    ("l1_max", {8: 0.7, 10: 0.5, 12: 0.3, 15: 0.0}),
])  # fmt: skip
def test_an_episode_is_rewarded_by_its_thinking_alone(tokenizer, form, expected):
    settings = BardSettings(budget_reward=form, budget_tolerance=0.5, budget_weight=0.5, l1_alpha=0.1, l1_delta=0.5)
    for n, value in expected.items():
        assert bard.reward(played(tokenizer, thought(n)), tokenizer, settings) == pytest.approx(value, abs=1e-9)
    wrong = bard.reward(played(tokenizer, thought(8, "Tower")), tokenizer, settings)
    assert wrong == (0.5 if form == "additive" else 0.0)


def test_the_budget_spans_all_turns(tokenizer):
    search = "<think> Gate Gate Gate Gate </think>\n<search> Gate Gate Gate </search>"
    episode = played(tokenizer, search, thought(7))
    assert num_thinking_tokens(episode, tokenizer) == 11
    assert bard.reward(episode, tokenizer, BardSettings()) == pytest.approx(0.8)
    assert bard.reward(replace_budget(episode, 11), tokenizer, BardSettings()) == 1


def replace_budget(episode: Episode, budget: int) -> Episode:
    return replace(episode, question=replace(episode.question, budget=budget))


@pytest.mark.parametrize("turn", [
    "Gate Gate Gate <think> Gate </think>\n<answer> Gate </answer>",  # thinks where nothing is counted
    "<answer> Gate </answer>", "<think> Gate <answer> Gate </answer>",
    "<think> Gate </think> so it is <answer> Gate </answer>",
    "<think> Gate </think><think> Gate </think>\n<answer> Gate </answer>",
    "<think> </think>\n<answer> " + "Gate " * 100 + "</answer>",
])  # fmt: skip
def test_thinking_outside_of_its_tags_is_worth_nothing(tokenizer, turn):
    assert bard.reward(played(tokenizer, turn), tokenizer, BardSettings()) == 0
    assert bard.reward(played(tokenizer, turn), tokenizer, BardSettings(budget_reward="additive")) == 0


def test_an_episode_that_was_cut_off_is_worth_nothing(tokenizer):
    episode = played(tokenizer, "<think> Gate", status="max_tokens")
    assert bard.reward(episode, tokenizer, BardSettings(budget_reward="additive")) == 0


# ---- budgets of a run ----


def test_budgets_depend_on_seed_and_place_alone_and_come_from_the_list():
    questions = [Question(f"q{i}", "q", ("a",), "test") for i in range(300)]
    drawn = [q.budget for q in draw_budgets(questions, (16, 64), 0, 3)]
    assert set(drawn) == {16, 64} and 100 < drawn.count(16) < 200
    assert drawn == [q.budget for q in draw_budgets(questions, (16, 64), 0, 3)]
    assert drawn != [q.budget for q in draw_budgets(questions, (16, 64), 0, 4)]
    assert all(q.budget is None for q in draw_budgets(questions, (), 0))


@pytest.mark.parametrize(("budgets", "message"), [
    ((), "--budgets: got none"), ((0,), "got 0, expected 1 to 4095"), ((16, -1), "got -1"), ((5000,), "got 5000"),
])  # fmt: skip
def test_budgets_that_cannot_be_are_refused(budgets, message):
    with pytest.raises(ValueError, match=message):
        with_defaults(TrainSettings(phase="bard-rl", budgets=budgets))


@pytest.mark.parametrize(("flag", "value"), [
    ("budget_use", 2.0), ("versions_per_question", 1), ("compress_tries", 0), ("min_fill", 1.5),
    ("budget_tolerance", -1),
])  # fmt: skip
def test_settings_out_of_range_are_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}: got {value}, expected"):
        with_defaults(TrainSettings(phase="bard-data", budgets=(16,), **{flag: value}))


@pytest.mark.parametrize(("phase", "protocol"), [("qagent", "search-r1"), ("bard-rl", "qagent")])
def test_a_reward_that_reads_other_tags_is_refused(phase, protocol):
    with pytest.raises(ValueError, match=f"--protocol {protocol}: got it for phase {phase}"):
        with_defaults(TrainSettings(phase=phase, budgets=(16,), protocol=protocol))


def test_guidance_as_a_reward_of_groups_is_refused():
    guided = {"phase": "bard-rl", "budgets": (16,), "kl_where": "wrong"}
    with pytest.raises(ValueError, match="--kl-in loss"):
        with_defaults(TrainSettings(**guided))
    with_defaults(TrainSettings(**guided, kl_in="loss"))
    with_defaults(TrainSettings(**guided, advantage="gae"))


def test_training_with_a_hard_stop_is_refused():
    with pytest.raises(ValueError, match="--hard-stop"):
        with_defaults(TrainSettings(phase="bard-rl", budgets=(16,), hard_stop=True))


def test_groups_without_a_difference_are_left_out():
    scores = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0, 0.0])
    assert reinforce.equal_groups(scores, 2).tolist() == [True, False, True]
    mask = torch.ones(6, 3, dtype=torch.bool)
    batch = Batch(torch.zeros(6, 3, dtype=torch.long), mask)
    left = reinforce.skip_equal_groups(batch, scores, 2, kept=scores != scores).response_mask
    assert left.any(1).tolist() == [False, False, True, True, False, False]
    left = reinforce.skip_equal_groups(batch, scores, 2, kept=scores < 0.1).response_mask  # a teacher guides wrong ones
    assert left.any(1).tolist() == [False, False, True, True, True, True]
    assert not reinforce.equal_groups(scores, 1).any()  # of a single episode nothing is known


# ---- data ----


def trail_chains(num: int, seed: int = 0) -> list[tuple[Question, str]]:
    rng, found = random.Random(seed), []
    for i in range(num):
        row, trail = trails.question(rng, f"q{i}")
        question = Question(row["id"], row["question"], tuple(row["golden_answers"]), "trails")
        found.append((question, trails.natural_chain(trail)))
    return found


def test_a_trail_is_the_only_way_from_its_start():
    rng = random.Random(3)
    for i in range(50):
        row, trail = trails.question(rng, f"q{i}")
        roads = dict(road.split() for road in row["question"].partition(".")[0].split(", "))
        here, steps = trail[0], 0
        while here in roads:
            here, steps = roads[here], steps + 1
        assert [here] == row["golden_answers"] and steps == row["metadata"]["num_roads"] == len(trail) - 1
        assert f"from {trail[0]}, {steps}" in row["question"]


def test_the_student_practises_looking_up_and_dividing():
    rng = random.Random(4)
    for i in range(20):
        texts = [s["text"] for s in trails.division(rng, f"d{i}")["segments"]]
        assert len(texts) == 2 * trails.NUM_DIVISIONS
        for asked, told in zip(texts[::2], texts[1::2], strict=True):
            divisor, dividend = map(int, asked.replace("? #", " ").split())
            assert trails.MIN_ROADS <= divisor <= trails.MAX_ROADS and told == f" {dividend // divisor}."
        shown, told = ({*s["text"].strip(" .").split(", ")} for s in trails.recall(rng, f"r{i}")["segments"])
        assert shown == told and len(shown) in trails.RECALLED


def test_the_worlds_compressor_keeps_within_the_budget_and_ends_with_the_answer(tokenizer):
    def length(text: str) -> int:
        return bard.num_chain_tokens(tokenizer, text)

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
    assert trails.compress("from Gate Tower , and from Mill Lake ,", 100, length) is None  # a broken trail
    assert trails.compress("nothing here", 100, length) is None and trails.compress(chain, 3, length) is None


def test_versions_keep_a_question_at_several_budgets_and_their_counts_add_up(tokenizer):
    settings = BardSettings(budgets=(8, 16, 32, 64, 128, 256), versions_per_question=4, prompt="short",
                            budget_text="#{budget}")
    chains = trail_chains(40)
    episodes, counts = compress(chains, tokenizer, None, None, settings, seed=0)
    assert sum(counts.values()) == 4 * 40
    assert len(episodes) == counts["compressed"] + counts["kept as it was"] > 100
    by_question: dict[str, list[Episode]] = {}
    below = 0  # natural chains of less than half of a budget: they stay as they are
    for e in episodes:
        budget, length = e.question.budget, num_thinking_tokens(e, tokenizer)
        natural = bard.num_chain_tokens(tokenizer, dict((q.id, c) for q, c in chains)[e.question.id])
        assert length <= budget and (length >= 0.5 * budget or length == natural)
        below += length < 0.5 * budget
        assert tokenizer.decode(e.segments[0].ids).rstrip().endswith(f"#{budget}\nassistant")
        by_question.setdefault(e.question.id, []).append(e)
    assert below >= 3
    for some in by_question.values():
        assert len(some) >= 2 and len({num_thinking_tokens(e, tokenizer) for e in some}) >= 2


def test_what_a_compressor_does_wrong_is_dropped_and_counted(tokenizer, monkeypatch):
    question = Question("q", "where?", ("Gate",), "test")
    chain = " ".join(["Gate"] * 200)
    proposals = {16: "Gate " * 17, 32: "Gate " * 8, 64: "Tower " * 40, 128: "Gate " * 100, 150: "Gate " * 120}
    monkeypatch.setattr(bard, "propose", lambda wanted, *rest, **more: [proposals[q.budget] for _, q, _ in wanted])
    settings = BardSettings(budgets=tuple(proposals), versions_per_question=5, prompt="short", compress_tries=3)
    episodes, counts = compress([(question, chain)], tokenizer, object(), None, settings, seed=0)
    assert not episodes  # two of five: what is left stands at its easy budgets alone
    assert {k: v for k, v in counts.items() if v} == {
        "too long": 1, "too short": 1, "answer lost": 1, "question with too few versions": 2}  # fmt: skip
    proposals[64] = "Tower Gate " * 20
    episodes, _ = compress([(question, chain)], tokenizer, object(), None, settings, seed=0)
    assert sorted(e.question.budget for e in episodes) == [64, 128, 150]


def test_a_compressor_that_fails_is_asked_again(tokenizer, monkeypatch):
    question, seeds = Question("q", "where?", ("Gate",), "test"), []

    def propose(wanted, *rest, seed):
        seeds.append((seed, len(wanted)))
        return ["Gate " * (20 if len(seeds) == 2 else 200) if q.budget == 32 else "Gate " * 12 for _, q, _ in wanted]

    monkeypatch.setattr(bard, "propose", propose)
    settings = BardSettings(budgets=(16, 32), versions_per_question=2, compress_tries=3, prompt="short")
    episodes, _ = compress([(question, "Gate " * 300)], tokenizer, object(), None, settings, seed=7)
    assert seeds == [(7, 2), (8, 1), (9, 0)] and len(episodes) == 2


def test_a_model_that_compresses_is_asked_in_words_and_what_it_leaves_open_is_no_chain(tokenizer, monkeypatch):
    """Its own thinking is dropped; a prompt that fills the context and an answer that was cut off give nothing."""
    written = {"a?": "hm </think> so <answer> x", "b?": "cut off", "c?": None}

    def generate(policy, retriever, questions, settings, **_):
        assert settings.max_turns == 0 and settings.prompt == "row"
        for q in questions:
            asked = q.prompt[0]["content"]
            assert f"at most {4} tokens" in asked and "Reasoning: Gate Gate Gate" in asked and "Answer: x" in asked
        episodes = []
        for q in questions:
            text = written[q.question]
            ids = tokenizer.encode(text or "") + [tokenizer.eos_id] * (q.question == "a?")
            segments = [Segment("prompt", tokenizer.encode("?"))] + [Segment("agent", ids)] * (text is not None)
            episodes.append(Episode(q, segments, "invalid"))
        return episodes

    monkeypatch.setattr(bard, "generate", generate)
    wanted = [(i, Question(q, q, ("x",), "test", budget=4), "Gate " * 30) for i, q in enumerate(written)]
    policy = Policy(None, tokenizer)
    assert bard.propose(wanted, tokenizer, policy, BardSettings(), seed=0) == ["so   x", None, None]


@pytest.mark.parametrize(("budget", "room"), [(4, 300), (900, 916)])
def test_a_compressor_has_room_to_think_before_it_writes(tokenizer, monkeypatch, budget, room):
    def generate(policy, retriever, questions, settings, **_):
        assert settings.max_new_tokens == room
        return [Episode(questions[0], [Segment("prompt", [1])])]

    monkeypatch.setattr(bard, "generate", generate)
    wanted = [(0, Question("q", "q", ("x",), "test", budget=budget), "Gate " * 999)]
    settings = BardSettings(max_new_tokens=300)
    assert bard.propose(wanted, tokenizer, Policy(None, tokenizer), settings, seed=0) == [None]


def test_a_compressed_chain_of_a_choice_needs_a_teacher_to_check_it(tmp_path, tokenizer):
    path = tmp_path / "chains.jsonl"
    row = {"question": "a?", "golden_answers": ["C"], "chain": "so C", "answer": "C", "answer_kind": "choice"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="give --teacher"):
        bard.write_versions(tmp_path / "out", path, tokenizer, Policy(None, tokenizer), None, BardSettings(), seed=0)


def test_a_checker_must_find_the_answer_when_it_reads_the_chain(tokenizer, monkeypatch):
    def generate(policy, retriever, questions, settings, *, shown, forced, **_):
        assert forced == "<answer>" and settings.temperature == 0
        answers = ["x" if "right" in tokenizer.decode(ids) else "y" for ids in shown]
        return [Episode(q, [], "answered", answer) for q, answer in zip(questions, answers, strict=True)]

    monkeypatch.setattr(bard, "generate", generate)
    question = Question("q", "q", ("x",), "test")
    chains = [(question, "right"), (question, "x but wrong")]
    assert bard.check_answers(chains, Policy(None, tokenizer), BardSettings()) == [True, False]
    assert bard.check_answers(chains, None, BardSettings()) == [False, True]  # without one: it must be named


def test_chains_are_read_from_rows_and_from_episodes_and_wrong_ones_are_left_out(tmp_path):
    rows = [
        {"id": 1, "question": "a?", "golden_answers": ["x"], "chain": " so x "},
        {"id": 2, "question": "b?", "golden_answers": ["x"], "chain": "so y", "answer": "y"},
        {"id": 3, "question": "c?", "golden_answers": ["12"], "chain": "so", "answer": "\\boxed{12}",
         "answer_kind": "integer"},
        {"id": 4, "question": "d?", "golden_answers": ["x"], "answer": "x",
         "segments": [{"author": "agent", "text": "<think> in d </think>\n<answer> x </answer>"}]},
        {"id": 5, "question": "e?", "golden_answers": ["x"], "answer": "x",
         "segments": [{"author": "agent", "text": "<think> 1 </think> <search> s </search>"},
                      {"author": "agent", "text": "<think> 2 </think> <answer> x </answer>"}]},
        {"id": 6, "question": "f?", "golden_answers": ["x"], "answer": "x",  # said more than it thought
         "segments": [{"author": "agent", "text": "Well, <think> in f </think>\n<answer> x </answer>"}]},
    ]  # fmt: skip
    path = tmp_path / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, num_left_out = read_chains(path)
    assert [(q.question, chain) for q, chain in found] == [("a?", "so x"), ("c?", "so"), ("d?", "in d")]
    assert num_left_out == 3
    path.write_text(json.dumps(rows[0] | {"chain": "<think> so x </think>"}) + "\n")
    assert read_chains(path)[0][0][1] == "so x"
    for bad in ("so <think> x", "so </think> x", "<search> s </search>"):
        path.write_text(json.dumps(rows[0] | {"chain": bad}) + "\n")
        with pytest.raises(ValueError, match="chains.jsonl:1: got <.* within a chain"):
            read_chains(path)
    for segments in (["a"], [{"author": "agent", "text": 5}], "x"):
        path.write_text(json.dumps({"question": "a?", "golden_answers": ["x"], "segments": segments}) + "\n")
        with pytest.raises(ValueError, match="got no chain|got no right answer"):
            read_chains(path)
    path.write_text(json.dumps({"question": "a?", "golden_answers": ["x"]}) + "\n")
    with pytest.raises(ValueError, match="chains.jsonl:1: got no chain"):
        read_chains(path)
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(ValueError, match="got no right answer"):
        read_chains(path)


# ---- answers ----


@pytest.mark.parametrize(("prediction", "gold", "expected"), [
    ("204", "204", 1), ("$\\boxed{042}$", "42", 1), ("the answer is 1,024.", "1024", 1), ("204.0", "204", 1),
    ("204.5", "204", 0), ("204 or 205", "204", 0), ("-7", "7", 0), ("", "0", 0), (None, "3", 0), ("x", "x", 0),
    ("9" * 5000, "9" * 5000, 1), ("we get \\boxed{3} of 12", "3", 1), ("(1,2)", "12", 0), ("-0", "0", 1),
    ("1,234,567", "1234567", 1), ("12,34", "1234", 0),
])  # fmt: skip
def test_integers_are_compared_as_numbers(prediction, gold, expected):
    assert integer_match(prediction, [gold]) == expected


@pytest.mark.parametrize(("prediction", "gold", "expected"), [
    ("C", "C", 1), ("(c)", "C", 1), ("C. the third", "C", 1), ("the answer is C", "C", 1),
    ("Answer: (D) because", "D", 1), ("\\boxed{\\text{B}}", "B", 1), ("A cat", "A", 0), ("B and C", "B", 0),
    ("Because", "B", 0), ("D", "C", 0), (None, "A", 0), ("**C**", "C", 1), ("I, think D", "I", 0),
    ("the answer is a matter of C", "A", 0), ("the answer is option b", "B", 0),
])  # fmt: skip
def test_choices_are_compared_by_their_letter(prediction, gold, expected):
    assert choice_match(prediction, [gold]) == expected


def test_a_row_says_how_its_answer_is_compared(tmp_path):
    path = tmp_path / "aime.jsonl"
    row = {"id": 1, "question": "How many?", "golden_answers": ["42"], "answer_kind": "integer"}
    path.write_text(json.dumps(row) + "\n")
    [question] = load_questions(path)
    assert Episode(question, [], "answered", "\\boxed{042}").score == 1
    path.write_text(json.dumps(row | {"answer_kind": "number"}) + "\n")
    for kind in ("number", ["integer"], 3):
        path.write_text(json.dumps(row | {"answer_kind": kind}) + "\n")
        with pytest.raises(ValueError, match="answer_kind, expected one of text, integer, choice"):
            load_questions(path)
    for kind, gold in (("integer", "x"), ("choice", "the third")):
        path.write_text(json.dumps(row | {"answer_kind": kind, "golden_answers": [gold]}) + "\n")
        with pytest.raises(ValueError, match=f"golden_answers, expected answers of kind {kind}"):
            load_questions(path)


# ---- measures ----


def test_spearman_is_the_correlation_of_ranks_with_ties_in_the_middle():
    assert spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    expected = np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    assert spearman([16, 32, 64, 128], [5, 5, 9, 11]) == pytest.approx(expected)
    assert spearman([1, 2, 3], [7, 7, 7]) == 0  # no control is no correlation, and not NaN


def test_measures_are_what_their_names_say():
    rows = [
        {"id": i, "budget": b, "length": n, "correct": c, "correct_free": f, "status": "answered",
         "formed": True}
        for i, b, n, c, f in (("a", 10, 10, 1, 1), ("a", 20, 15, 1, 1), ("b", 10, 14, 0, 1), ("b", 20, 30, 1, 0))
    ]  # fmt: skip
    found = bard.summarize(rows)
    ten, twenty = found["budgets"][10], found["budgets"][20]
    assert (ten["adherence"], twenty["adherence"], ten["accuracy"], ten["accuracy_free"]) == (0.5, 0.5, 0.5, 1.0)
    assert ten["overshoot"] == pytest.approx(0.2) and twenty["overshoot"] == pytest.approx(0.25)
    assert ten["relative_error"] == pytest.approx(0.2) and twenty["relative_error"] == pytest.approx(0.375)
    assert ten["use"] == pytest.approx(1.2) and found["spearman"] == pytest.approx(1)
    assert found["area"] == pytest.approx(0.75)  # from 0.5 to 1 on a straight line
    assert evaluation.budget_table(found).splitlines()[2].split()[:3] == ["10", "1.000", "0.500"]


def test_the_area_is_over_the_logarithm_of_the_budget():
    rows = [{"id": "a", "budget": b, "length": b, "correct": c, "correct_free": c, "status": "answered", "formed": True}
            for b, c in ((10, 0), (20, 1), (80, 1))]  # fmt: skip
    assert bard.summarize(rows)["area"] == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)  # one octave, then two


def test_every_question_is_asked_freely_and_with_a_hard_stop(tokenizer, monkeypatch):
    def generate(policy, retriever, questions, settings, **rest):
        turn = "<think> a </think>\n<answer> b </answer>"
        for q in questions:  # right where nothing stops it
            yield Episode(q, [Segment("agent", tokenizer.encode(turn))], "answered", "x" if settings.hard_stop else "b")

    monkeypatch.setattr(bard, "generate", lambda *given, **rest: list(generate(*given, **rest)))
    found = bard.measure(Policy(None, tokenizer), [Question("q", "?", ("b",), "test")], BardSettings(), [16, 32])
    for values in found["budgets"].values():
        assert (values["accuracy"], values["accuracy_free"]) == (0.0, 1.0)


@pytest.mark.parametrize("flags", [["--budget", "16"], ["--hard-stop"], ["--episodes"]])
def test_budgets_are_measured_by_eval_py_and_drawn(tmp_path, flags):
    pytest.importorskip("matplotlib")
    rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers)} for q, _ in trail_chains(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--config", "none", "--model", str(ROOT / "world" / "student"), "--questions", str(tmp_path / "q.jsonl"),
             "--prompt", "short", "--max-turns", "0", "--max-new-tokens", "24", "--out", str(tmp_path / "out"),
             "--budgets", "4,8", "--name", "m"]  # fmt: skip
    with pytest.raises(ValueError, match="--budgets: got it with"):
        evaluation.main([*given, *flags])
    evaluation.main(given)
    found = json.loads((tmp_path / "out" / "budgets.json").read_text())
    assert set(found["budgets"]) == {"4", "8"} and found["budgets"]["4"]["n"] == 4
    assert len((tmp_path / "out" / "budgets.jsonl").read_text().splitlines()) == 8
    plots.plot_budgets([tmp_path / "out" / "budgets.json"], tmp_path / "b.png")
    plots.plot_rewards(tmp_path / "r.png")
    assert min((tmp_path / f"{name}.png").stat().st_size for name in "br") > 1000


def test_the_metrics_of_a_step_count_who_kept_to_the_budget_itself_included(tokenizer):
    turn = tokenizer.encode("<think> a b c </think>\n<answer> b </answer>")
    length = num_thinking_tokens(Episode(Question("q", "?", ("b",), "t"), [Segment("agent", turn)]), tokenizer)
    episodes = [Episode(Question("q", "?", ("b",), "t", budget=b), [Segment("agent", turn)], "answered", "b")
                for b in (length - 1, length, length + 9, length + 9)]  # fmt: skip
    found = reinforce.reward_metrics(episodes, torch.tensor([0.0, 1.0, 1.0, 1.0]), 2, tokenizer, "bard-rl")
    assert (found["rollout/adherence"], found["rollout/thinking"]) == (0.75, length)
    assert (found["rollout/reward"], found["rollout/equal_groups"]) == (0.75, 0.5)


# ---- a run ----


@pytest.mark.parametrize("teacher", ["", str(ROOT / "world" / "teacher")])  # what rules wrote it is not asked about
def test_the_data_phase_reads_a_file_of_chains_and_needs_no_search(tmp_path, tokenizer, capsys, teacher):
    chains, out = tmp_path / "chains.jsonl", tmp_path / "versions.jsonl"
    rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers), "chain": c}
            for q, c in trail_chains(8)]  # fmt: skip
    chains.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = str(ROOT / "world" / "student")
    train.main(["--config", "none", "--phase", "bard-data", "--chains", str(chains), "--episodes", str(out), "--prompt",
                "short", "--student", student, "--teacher", teacher, "--budgets", "16,48,120", "--budget-text",
                "#{budget}"])  # fmt: skip
    assert "versions of 8 chains" in capsys.readouterr().out
    assert {e.question.budget for e in load_episodes(out, tokenizer, prompt="short")} == {16, 48, 120}


def test_versions_are_written_and_read_again_with_their_budgets(tmp_path, tokenizer):
    chains = tmp_path / "chains.jsonl"
    rows = [{"id": q.id, "question": q.question, "golden_answers": list(q.golden_answers), "chain": c}
            for q, c in trail_chains(12)]  # fmt: skip
    chains.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = BardSettings(budgets=(16, 64, 256), versions_per_question=3, prompt="short")
    line = bard.write_versions(tmp_path / "versions.jsonl", chains, tokenizer, None, None, settings, seed=0)
    assert "versions of 12 chains" in line
    episodes = load_episodes(tmp_path / "versions.jsonl", tokenizer, prompt="short")
    counts = json.loads((tmp_path / "versions.counts.json").read_text())
    assert len(episodes) == counts["versions"] and {e.question.budget for e in episodes} == {16, 64, 256}
    assert counts["mean_length"]["16"] < counts["mean_length"]["64"] < counts["mean_length"]["256"]
