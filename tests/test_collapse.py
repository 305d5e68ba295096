"""Collapse: it is noticed where it is, and nowhere else; a run that ends by it leaves its best.

Run: python -m pytest tests/test_collapse.py
"""

import random

import pytest
from safetensors.torch import load_file

from infra.collapse import WINDOW, signs_of_collapse
from infra.run import Collapse, Run
from tests.support.runs import run

EPISODES = 128


def row(score: float, invalid: float = 0.02, **others: float) -> dict[str, float]:
    return {
        "rollout/score": score,
        "rollout/invalid": invalid,
        "rollout/max_tokens": 0.01,
        "loss/entropy": 0.3,
        "rollout/kl_student_guide": 0.1,
        "rollout/agent_tokens": 60.0,
        "loss/approx_kl": 0.01,
        "rollout/explained_variance": 0.5,
    } | others


RISING = [row(0.1 + 0.02 * n) for n in range(25)]


def test_a_run_that_learns_or_stands_still_has_not_collapsed():
    falling_slowly = [row(0.4 - 0.004 * n) for n in range(40)]
    for rows in (RISING, RISING[:3], [], [row(0.0)] * 40, [row(0.3)] * 40, falling_slowly):
        assert signs_of_collapse(rows, EPISODES) == ""


def share(draw: random.Random, probability: float, num: int) -> float:
    return sum(draw.random() < probability for _ in range(num)) / num


def test_chance_is_no_collapse():
    draw = random.Random(0)
    for num_episodes, score in ((8, 0.3), (8, 0.05), (128, 0.02), (128, 0.5)):
        for _ in range(100):
            rows = [row(share(draw, score, num_episodes)) for _ in range(60)]
            assert all(signs_of_collapse(rows[:n], num_episodes) == "" for n in (10, 20, 40, 60))


def test_a_score_that_halves_is_a_collapse_and_a_single_bad_step_is_not():
    assert signs_of_collapse([*RISING, row(0.0)], EPISODES) == ""
    signs = signs_of_collapse([*RISING, *[row(0.15)] * WINDOW], EPISODES)
    assert "the score fell from 0.540 (steps 21 to 25) to 0.150" in signs


def test_a_reward_that_stands_is_no_collapse_where_it_and_not_the_score_is_watched():
    scores = [*RISING, *[row(0.1)] * WINDOW]
    rows = [{**metrics, "rollout/reward": 0.9} for metrics in scores]
    assert signs_of_collapse(rows, EPISODES)
    assert signs_of_collapse(rows, EPISODES, "rollout/reward") == ""
    fallen = [{**metrics, "rollout/reward": 0.2} for metrics in [row(0.9)] * WINDOW]
    assert "fell from 0.900" in signs_of_collapse([*rows, *fallen], EPISODES, "rollout/reward")


def test_episodes_without_an_action_are_a_collapse_before_the_score_says_so():
    signs = signs_of_collapse([*RISING, *[row(0.4, invalid=0.6)] * WINDOW], EPISODES)
    assert "episodes without an action rose from 0.03 to 0.61" in signs
    assert signs_of_collapse([row(0.0, invalid=0.9)] * 30, EPISODES) == ""  # it never knew better


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loss/entropy": 0.01}, "entropy went from 0.3 to 0.01: raise --entropy-weight"),
        ({"loss/entropy": 3.0}, "entropy went from 0.3 to 3: lower --actor-lr"),
        ({"rollout/kl_student_guide": 2.0}, "KL to the guide went from 0.1 to 2: raise --beta"),
        (
            {"rollout/agent_tokens": 400.0},
            "tokens per episode went from 60 to 400: lower --max-new-tokens",
        ),
        ({"rollout/agent_tokens": 5.0}, "tokens per episode went from 60 to 5: lower --actor-lr"),
        ({"loss/approx_kl": 0.5}, "the size of updates went from 0.01 to 0.5"),
        (
            {"rollout/explained_variance": -0.5},
            "the critic is worse than a constant: raise --critic-only-steps",
        ),
        ({}, "nothing else stands out"),
    ],
)
def test_the_message_names_what_changed_and_what_to_turn(change, text):
    assert text in signs_of_collapse([*RISING, *[row(0.1, **change)] * WINDOW], EPISODES)


def test_a_number_that_is_not_one_or_is_missing_does_not_break_the_guard():
    rows = [row(0.5) | {"loss/entropy": None} for _ in range(20)]
    for r in rows:
        del r["rollout/explained_variance"]  # GRPO has no critic
    assert "fell" in signs_of_collapse([*rows, *[row(0.1)] * WINDOW], EPISODES)


def test_steps_that_trained_the_critic_alone_say_nothing_of_the_actor():
    start = [row(0.9) for _ in range(WINDOW)]
    for r in start[:4]:
        del r["loss/entropy"], r["loss/approx_kl"]
    signs = signs_of_collapse([*start, *[row(0.5)] * 6, *[row(0.1)] * WINDOW], EPISODES)
    assert "fell from 0.900" in signs and "entropy" not in signs and "size of updates" not in signs


def test_answers_to_one_question_that_agree_are_no_collapse():
    draw = random.Random(1)
    for _ in range(30):
        rows = [row(share(draw, 0.1, 25)) for _ in range(80)]  # groups of 5, all alike
        assert all(signs_of_collapse(rows[:n], 25) == "" for n in range(10, 81, 5))


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_that_collapses_leaves_its_best_weights(mini, tmp_path, monkeypatch, saves):
    real = Run.log

    def scripted(self, step, metrics, **others):
        metrics["rollout/score"] = 0.9 if step <= 12 else 0.0
        if "eval/score" in metrics:
            metrics["eval/score"] = {4: 0.1, 8: 0.8}.get(step, 0.3)
        return real(self, step, metrics, **others)

    monkeypatch.setattr(Run, "log", scripted)
    flags = ["--phase", "dgpo", "--steps", "32", "--eval-every", "4"]
    flags += ["--save-every", "4" if saves else "0"]
    message = "collapse after step 15: the score fell from 0.900"
    with pytest.raises(Collapse, match=message) as caught:
        run(mini, tmp_path / "run", *flags)
    if not saves:
        assert "holds the last weights" in str(caught.value)
        return
    assert "holds the weights of step 8" in str(caught.value)
    best = load_file(tmp_path / "run" / "state" / "step_000008" / "actor.safetensors")
    left = load_file(tmp_path / "run" / "model.safetensors")
    assert left and all((left[key] == best[key]).all() for key in left.keys() & best.keys())
    with pytest.raises(Collapse, match="after step 15"):  # a resumed run knows the steps before
        run(mini, tmp_path / "run", *flags, "--resume")
    assert len(run(mini, tmp_path / "on", *flags, "--steps", "16", "--no-stop-on-collapse")) == 16
