"""The loops against plain formulas: what a step plays, pays, learns and logs, to the last weight.

tests/support/byhand.py computes the same steps once more from the episodes that a run has played.
A score stands in for the answers of random models, so that a step has right and wrong episodes.

Run: python -m pytest tests/test_loops.py
"""

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import bard
import dgpo
import distil
import qagent
import sampling
import train
from bard import BardSettings
from data import Passage, Question, build_messages, load_questions
from distil import Schedule
from episode import (
    SEARCH_R1,
    Episode,
    Segment,
    episode_text,
    load_episodes,
    observation_ids,
    parse_action,
)
from infra.parallel import uniforms
from infra.run import Run
from model import load_decoder, save_decoder
from qagent import SearchSettings
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate
from serving import ask
from settings import TrainSettings, with_defaults
from tests.support import byhand
from tests.support.byhand import Distillation, Reinforcement, is_right
from tests.support.mini import make_mini, read_rows, write_rows
from tests.support.runs import Spy, run
from tests.support.scripted import FixedRetriever
from tokenizer import Tokenizer

MOMENTS = 2e-3  # of the largest entry: fp32 sums in another order, over some updates
WEIGHTS = 2e-2  # of all that the weights moved: Adam makes much of the smallest gradients
METRICS = 2e-4  # relative, and absolute below 1
SAMPLED = 1e-4  # log-probabilities of six layers, with a cache and without
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature world with a student that ends its turns early and late: rows are ragged."""
    folder = make_mini(tmp_path_factory.mktemp("ragged"))
    student, tokenizer = load_decoder(folder / "student"), Tokenizer.load(folder / "student")
    with torch.no_grad():
        student.head_weight[tokenizer.eos_id] *= -4.0
    save_decoder(student, tokenizer, folder / "student")
    return folder


@pytest.fixture
def scores(monkeypatch) -> None:
    """Episodes that are right and wrong, within a group of one question as well."""
    monkeypatch.setattr(Episode, "score", property(is_right))


def run_by(rules: SimpleNamespace, mini: Path, out: Path, *flags: str) -> list[dict]:
    """Runs train.py by these rules and flags; returns the lines of metrics.jsonl."""
    preset = out.with_name("rules.toml")
    byhand.write_preset(rules, preset)
    train.main(
        ["--config", str(mini / "mini.toml"), str(preset), "--run-dir", str(out), *flags])
    return read_rows(out / "metrics.jsonl")


# ---- reinforcement ----

# Rules stand in presets, at the top level: those of other phases must change nothing.
OF_DISTILLATION = {
    "kd_lr": 0.3, "kd_warmup_steps": 9, "batch_size": 3, "ce_weight": 0.4, "kl_weight": 9.0,
    "mix": 0.7, "distance": "jsd", "student_share": 0.1, "buffer_size": 2, "taid_start": 0.6,
}  # fmt: skip
RULES = {
    "seed": 3, "steps": 2, "prompts_per_step": 8, "minibatch_size": 4, "ppo_epochs": 2,
    "actor_lr": 0.004, "critic_lr": 0.01, "actor_warmup_steps": 4, "critic_warmup_steps": 2,
    "critic_only_steps": 0, "beta": 0.3, "gamma": 0.9, "gae_lambda": 0.8, "clip_eps": 0.1,
    "value_clip_eps": 0.05, "entropy_weight": 0.05, "weight_decay": 0.5, "grad_clip": 0.4,
    "advantage": "gae", "group_size": 2, "kl_where": "all", "kl_in": "reward",
    "guide_weight": 0.7, "mean_over": "token", "micro_batch_tokens": 300, "eval_every": 2,
    "save_every": 0, "temperature": 0.9, **OF_DISTILLATION,
}  # fmt: skip
CASES = {
    "ppo": ("ppo", "student", {"steps": 3}),  # the third begins another epoch
    "ppo, no guide": ("ppo", "student", {"kl_where": "none"}),
    "dgpo": ("dgpo", "teacher", {"kl_where": "wrong", "critic_only_steps": 1, "steps": 3}),
    "dgpo, uniform, in the loss": (
        "dgpo", "teacher", {"kl_in": "loss", "minibatch_size": 3, "micro_batch_tokens": 10**6}),
    "grpo": ("grpo", "student", {"advantage": "group", "kl_in": "loss", "steps": 3}),
    "grpo, means of episodes": (
        "grpo", "student", {"advantage": "group", "mean_over": "episode", "group_size": 4}),
    "dgpo in groups": (
        "dgpo", "teacher", {"advantage": "group", "kl_where": "wrong", "kl_in": "loss",
                           "temperature": 1.0}),
    # At lower rates: an exact KL soon teaches the student when the teacher's turns end.
    "dgpo, exact": (
        "dgpo", "teacher", {"kl_where": "wrong", "kl_in": "exact", "actor_lr": 0.001}),
    "dgpo, exact, uniform": (
        "dgpo", "teacher", {"kl_in": "exact", "guide_weight": 2.0, "actor_lr": 0.001,
                           "micro_batch_tokens": 10**6}),
    "dgpo in groups, exact": (
        "dgpo", "teacher", {"advantage": "group", "kl_where": "wrong", "kl_in": "exact",
                           "actor_lr": 0.001}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_of_reinforcement_are_those_by_hand(mini, tmp_path, monkeypatch, scores, name):
    phase, guide, changes = CASES[name]
    rules = SimpleNamespace(**{**RULES, **changes})
    spy = Spy(monkeypatch, sampling, "generate")
    rows = run_by(rules, mini, tmp_path / "run", "--phase", phase)
    expected = Reinforcement(mini, rules, guide)
    played = check_played(spy, rows, mini, rules)
    for step, (episodes, row) in enumerate(zip(played, rows, strict=True)):
        assert 0 < sum(map(is_right, episodes)) < len(episodes)
        assert len({len(byhand.agent_ids(episode)) for episode in episodes}) > 1
        numbers = expected.step(step, episodes)
        byhand.check_metrics(numbers, row, tolerance=METRICS)
        of_losses = {key for key in row if key.startswith("loss/")}
        assert of_losses - {"loss/skipped", "loss/first_log_ratio"} == {
            key for key in numbers if key.startswith("loss/")}
    check_networks(expected, tmp_path / "run", rules)


def check_played(
    spy: Spy, rows: list[dict], mini: Path, rules: SimpleNamespace
) -> list[list[Episode]]:
    """What was asked in each step and validation, and with which noise; the steps' episodes."""
    training, held_out = byhand.split_questions(mini / "questions.jsonl", 2)
    size = rules.group_size if rules.advantage == "group" else 1
    calls, steps = byhand.passes(spy.calls), []
    for step, row in enumerate(rows):
        asked, options, episodes = next(calls)
        chosen = byhand.step_questions(
            training, rules.seed, step, rules.prompts_per_step // size)
        assert [q.id for q in asked] == [q.id for q in chosen for _ in range(size)]
        first = step * (rules.prompts_per_step // size * size)
        assert (options["seed"], options["first_episode"]) == (rules.seed, first)
        steps.append(episodes)
        is_validated = rules.eval_every and (
            (step + 1) % rules.eval_every == 0 or step + 1 == len(rows))
        assert ("eval/score" in row) == bool(is_validated)
        if is_validated:
            asked, options, episodes = next(calls)
            assert [q.id for q in asked] == [q.id for q in held_out]
            assert (options["seed"], options["first_episode"]) == (rules.seed + 1, 0)
            assert row["eval/score"] == sum(map(is_right, episodes)) / len(episodes)
            assert options["settings"].temperature == rules.temperature  # not greedy
    assert next(calls, None) is None
    return steps


def check_networks(expected: Reinforcement, folder: Path, rules: SimpleNamespace) -> None:
    """The weights and Adam's moments that a run has left."""
    state = folder / "state" / f"step_{rules.steps:06d}"
    byhand.check_adam(expected.actor_adam, state, "actor", tolerance=MOMENTS)
    saved = load_file(folder / "model.safetensors")
    byhand.check_weights(expected.actor, expected.before, saved, tolerance=WEIGHTS)
    if expected.critic is None:
        assert not [*state.glob("critic*")]
        return
    byhand.check_adam(expected.critic_adam, state, "critic", tolerance=MOMENTS)
    start = type(expected.critic).from_decoder(expected.before)
    saved = load_file(state / "critic.safetensors")
    byhand.check_weights(expected.critic, start, saved, tolerance=WEIGHTS)


def test_a_step_of_reinforcement_says_what_it_did(mini, tmp_path, monkeypatch, scores):
    """Passes, tokens, times, a sample, and what the guard against collapse is told."""
    watched = []
    monkeypatch.setattr(
        Run, "stop_if_collapsed", lambda run, *arguments: watched.append(arguments[2:]))
    spy = Spy(monkeypatch, sampling, "generate")
    flags = {**RULES, "micro_batch_tokens": 1, "advantage": "group", "eval_every": 2}
    run_by(SimpleNamespace(**flags), mini, tmp_path / "run", "--phase", "grpo")
    steps = [episodes for _, _, episodes in spy.calls[:2]]
    perf = read_rows(tmp_path / "run" / "perf.jsonl")
    for row, episodes in zip(perf, steps, strict=True):
        assert row["passes"] == 2 * len(episodes)  # of one row each, in two passes over them
        num_tokens = sum(len(byhand.agent_ids(episode)) for episode in episodes)
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(num_tokens)
        times = [row[name] for name in ("rollout_s", "score_s", "update_s")]
        assert min(times) > 0 and sum(times) <= row["seconds"]
    [sample] = (tmp_path / "run" / "samples").iterdir()
    tokenizer = Tokenizer.load(mini / "student")
    texts = [episode_text(episode, tokenizer) for episode in steps[1][:3]]
    assert sample.name == "step_000002.txt"
    assert sample.read_bytes().decode() == "\n\n".join(texts) + "\n"
    # Before the first step, which may be a resumed run's, and after each; questions, not episodes.
    assert watched == [(4, "rollout/score")] * 3


def test_a_step_of_distillation_says_what_it_did(mini, tmp_path):
    flags = ["--batch-size", "8", "--micro-batch-tokens", "1", "--eval-every", "0"]
    run(mini, tmp_path / "run", "--phase", "sft", *flags)
    for row in read_rows(tmp_path / "run" / "perf.jsonl"):
        assert row["passes"] == 8
        assert row["tokens_per_s"] * row["seconds"] > 8 * len("<search>act</search>")


def test_distillation_ends_once_the_validation_score_is_reached(mini, tmp_path, capsys, scores):
    flags = ["--phase", "sft", "--epochs", "4", "--eval-every", "1", "--save-every", "0"]
    rows = run(mini, tmp_path / "free", *flags)
    wanted = max(row["eval/score"] for row in rows[:-1])
    first = next(row["step"] for row in rows if row["eval/score"] == wanted)
    ended = run(mini, tmp_path / "ended", *flags, "--until-score", str(wanted))
    assert [row["step"] for row in ended] == list(range(1, first + 1)) and first < len(rows)
    assert f"reached {wanted}" in capsys.readouterr().out


def test_updates_that_are_left_out_are_counted(mini, tmp_path, monkeypatch):
    real, calls = dgpo.policy_loss, []

    def broken(*arguments, **options):
        calls.append(1)
        result = real(*arguments, **options)
        return result._replace(terms=result.terms * (math.nan if len(calls) == 1 else 1.0))

    monkeypatch.setattr(dgpo, "policy_loss", broken)
    rows = run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2", "--eval-every", "0")
    assert [row["loss/skipped"] for row in rows] == [1, 0]


# ---- distillation ----

DISTIL_RULES = {
    "seed": 3, "batch_size": 8, "epochs": 2, "kd_lr": 0.004, "kd_warmup_steps": 3,
    "ce_weight": 0.5, "kl_weight": 0.7, "mix": 0.2, "weight_decay": 0.5, "grad_clip": 0.4,
    "student_share": 0.5, "share_tolerance": -9.0, "buffer_size": 12, "steps": 6,
    "taid_start": 0.3, "taid_end": 0.9, "taid_alpha": 0.8, "taid_beta": 0.9,
    "micro_batch_tokens": 400, "eval_every": 0, "save_every": 0,
    # Of reinforcement, but for the temperature, at which a student writes and no loss is.
    "prompts_per_step": 4, "minibatch_size": 2, "ppo_epochs": 3, "actor_lr": 0.3,
    "actor_warmup_steps": 9, "advantage": "group", "group_size": 2, "kl_where": "none",
    "beta": 0.9, "entropy_weight": 0.9, "temperature": 0.9,
}  # fmt: skip


class Batches:
    """What each phase should train on; written(step): what the student wrote in it."""

    def __init__(self, expected: Distillation, episodes: list[Episode],
                 written: Callable[[int], list[Episode]]):
        self.expected, self.rules, self.phase = expected, expected.rules, expected.phase
        self.episodes, self.written = episodes, written
        if self.phase == "distillm":
            self.held_out, self.episodes = episodes[:2], episodes[2:]  # a tenth
        self.share, self.reference, self.buffer = 0.0, None, []
        self.t, self.momentum, self.loss = self.rules.taid_start, 0.0, None
        per_epoch = -(-len(self.episodes) // self.rules.batch_size)
        self.num_steps = round(per_epoch * self.rules.epochs)
        if self.phase == "gkd":
            self.num_steps = self.rules.steps
        self.looks_every, self.looks = max(1, per_epoch // 2), []

    @property
    def mix(self) -> float:
        return self.t if self.phase == "taid" else self.rules.mix

    def author(self, step: int) -> str:
        u = byhand.draw(self.rules.seed, step, 2)
        if self.phase == "gkd":
            return "student" if u < self.rules.student_share else "teacher"
        if self.phase != "distillm":
            return "teacher"
        if step % self.looks_every == 0:
            loss = self.expected.mean_distance(self.held_out, self.mix)
            self.looks.append(loss)
            if self.reference is None:
                self.reference = loss
            elif loss >= self.reference + self.rules.share_tolerance:
                self.share, self.reference = min(1.0, self.share + 0.1), loss
        is_full = len(self.buffer) >= self.rules.buffer_size
        if u < self.share * (1 - step / self.num_steps) or (u < self.share and not is_full):
            return "student"
        return "replay" if u < self.share else "teacher"

    def batch(self, step: int, author: str) -> list[Episode]:
        rules = self.rules
        if author == "teacher":
            return byhand.epoch_batch(self.episodes, rules.seed, step, rules.batch_size)
        if author == "student":
            return self.written(step)
        order = np.random.default_rng((rules.seed, step, 1)).permutation(len(self.buffer))
        return [self.buffer[i] for i in order[: rules.batch_size]]

    def update(self, step: int, author: str, episodes: list[Episode], distance: float) -> None:
        if author == "student" and self.phase == "distillm":
            self.buffer = [*self.buffer, *episodes][-self.rules.buffer_size :]
        if self.phase == "taid":
            self.move_target(step, distance)

    def move_target(self, step: int, distance: float) -> None:
        """TAID, Eq. 8 to 10."""
        rules = self.rules
        if self.loss is not None:
            change = (self.loss - distance) / self.loss
            self.momentum = rules.taid_beta * self.momentum + (1 - rules.taid_beta) * change
            self.t += rules.taid_alpha * (1 - self.t) / (1 + math.exp(-self.momentum))
        line = rules.taid_start + (rules.taid_end - rules.taid_start) * (step + 1) / self.num_steps
        self.t, self.loss = min(rules.taid_end, max(line, self.t)), distance


@pytest.mark.parametrize(("phase", "changes", "authors"), [
    ("sft", {"eval_every": 4}, {"teacher"}), ("kd", {"epochs": 0.5}, {"teacher"}),
    ("taid", {}, {"teacher"}), ("taid", {"taid_alpha": 0.1, "kl_weight": 1.0}, {"teacher"}),
    ("gkd", {}, {"teacher", "student"}),
    ("distillm", {"epochs": 4}, {"teacher", "student", "replay"}),
    ("distillm", {"share_tolerance": 9.0, "epochs": 1}, {"teacher"}),
])
def test_steps_of_distillation_are_those_by_hand(
    mini, tmp_path, monkeypatch, scores, phase, changes, authors
):
    rules = SimpleNamespace(**{**DISTIL_RULES, **changes})
    spy, looks = Spy(monkeypatch, sampling, "generate"), Spy(monkeypatch, distil, "mean_distance")
    rows = run_by(rules, mini, tmp_path / "run", "--phase", phase)
    expected = Distillation(mini, phase, rules)
    episodes = load_episodes(mini / "episodes.jsonl", expected.tokenizer, prompt="short")
    training, _ = byhand.split_questions(mini / "questions.jsonl", 2)

    def written(step: int) -> list[Episode]:
        return check_asked(spy.calls.pop(0), step, training, rules)

    batches = Batches(expected, episodes, written)
    assert len(rows) == batches.num_steps
    wrote = set()
    for step, row in enumerate(rows):
        author, mix = batches.author(step), batches.mix
        wrote.add(author)
        batch = batches.batch(step, author)
        if author == "student":
            assert row["rollout/score"] == sum(map(is_right, batch)) / len(batch)
        else:
            assert "rollout/score" not in row
        if "eval/score" in row:
            assert (step + 1) % rules.eval_every == 0 or step + 1 == len(rows)
            [*_, played] = spy.calls.pop(0)
            assert row["eval/score"] == sum(map(is_right, played)) / len(played)
        numbers = expected.step(
            step, len(rows), batch, is_teachers=author == "teacher", mix=mix)
        if phase == "taid":
            numbers["loss/taid_t"] = mix
        if phase == "distillm":
            numbers["loss/student_share"] = batches.share
        byhand.check_metrics(numbers, row, tolerance=METRICS)
        batches.update(step, author, batch, numbers["loss/distance"])
    assert wrote == authors and not spy.calls
    assert [loss for _, _, loss in looks.calls] == pytest.approx(batches.looks, abs=METRICS)
    state = tmp_path / "run" / "state" / f"step_{len(rows):06d}"
    byhand.check_adam(expected.adam, state, "student", tolerance=MOMENTS)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    byhand.check_weights(expected.student, expected.before, saved, tolerance=WEIGHTS)


def check_asked(
    call: tuple, step: int, training: list[Question], rules: SimpleNamespace
) -> list[Episode]:
    """A batch that the student wrote: to which questions, with which noise."""
    arguments, options, episodes = call
    asked = byhand.step_questions(training, rules.seed, step, rules.batch_size)
    assert [q.id for q in arguments[2]] == [q.id for q in asked]
    assert (options["seed"], options["first_episode"]) == (rules.seed, step * rules.batch_size)
    return episodes


# ---- what phases imply, and the programs that start them ----


def test_the_defaults_that_the_paper_and_its_scripts_say():
    """Table 8 and the official scripts; a preset says what differs."""
    settings = vars(TrainSettings())
    assert {key: settings[key] for key in DEFAULTS} == DEFAULTS
    for steps, warm_ups in ((1000, (285, 15)), (200, (57, 3))):
        filled = with_defaults(TrainSettings(phase="dgpo", steps=steps))
        assert (filled.actor_warmup_steps, filled.critic_warmup_steps) == warm_ups
    told = with_defaults(TrainSettings(
        phase="dgpo", actor_warmup_steps=0, critic_warmup_steps=7))
    assert (told.actor_warmup_steps, told.critic_warmup_steps) == (0, 7)


DEFAULTS = {
    "epochs": 5, "batch_size": 64, "kd_lr": 1e-4, "kd_warmup_steps": 0, "ce_weight": 1.0,
    "kl_weight": 1.0, "mix": 0.1, "student_share": 1.0, "share_tolerance": 0.0,
    "buffer_size": 1000, "taid_start": 0.4, "taid_end": 1.0, "taid_alpha": 5e-4,
    "taid_beta": 0.99, "until_score": 0.0, "steps": 1000, "prompts_per_step": 512,
    "minibatch_size": 256, "ppo_epochs": 1, "actor_lr": 1e-6, "critic_lr": 1e-5,
    "actor_warmup_steps": None, "critic_warmup_steps": None, "critic_only_steps": 0, "beta": 0.001,
    "kl_in": "reward", "guide_weight": 1.0, "mean_over": "token", "group_size": 5, "gamma": 1.0,
    "gae_lambda": 1.0, "clip_eps": 0.2, "value_clip_eps": 0.5, "entropy_weight": 0.001,
    "val_size": 256, "weight_decay": 0.01, "grad_clip": 1.0, "eval_every": 50, "save_every": 50,
    "seed": 0,
    "max_turns": 4, "top_k": 3, "max_new_tokens": 500, "max_obs_tokens": 500,
    "max_context_tokens": 4096, "temperature": 1.0, "top_p": 1.0, "prompt": "paper",
    "protocol": "search-r1", "num_episode_questions": 0, "teacher_dtype": "float32",
    "stop_on_collapse": True, "micro_batch_tokens": 16384, "shard": "none",
}  # fmt: skip


@pytest.mark.parametrize(("phase", "implied"), [
    ("kd", ("forward", 0.5, "", 1, "all")), ("sft", ("forward", 0.0, "", 1, "all")),
    ("taid", ("forward", 0.0, "", 1, "all")), ("gkd", ("reverse", 0.0, "", 1, "all")),
    ("distillm", ("skew", 0.0, "", 1, "all")), ("ppo", ("forward", 0.0, "gae", 1, "all")),
    ("grpo", ("forward", 0.0, "group", 4, "all")), ("dgpo", ("forward", 0.0, "gae", 1, "wrong")),
])
def test_a_phase_implies_what_settings_leave_open(phase, implied):
    settings = with_defaults(TrainSettings(phase=phase, ce_weight=0.5, group_size=4))
    distance = "forward" if phase == "taid" else settings.distance  # TAID's is its own
    assert (distance, settings.ce_weight, settings.advantage, settings.group_size,
            settings.kl_where) == implied
    assert settings.run_dir == f"runs/{phase}"
    told = with_defaults(TrainSettings(
        phase=phase, run_dir="there", kl_where="none", advantage="group", group_size=4))
    of_groups = ("group", 4) if phase in ("ppo", "grpo", "dgpo") else ("", 1)
    assert (told.run_dir, told.kl_where) == ("there", "none")
    assert (told.advantage, told.group_size) == of_groups


def test_ask_plays_as_its_flags_say(mini, tmp_path, monkeypatch, capsys):
    calls = []

    def generate(policy, retriever, questions, settings, *, seed, **_):
        [question] = questions
        calls.append((policy.head.dtype, retriever, question.question, seed, settings.temperature))
        return [Episode(question, [Segment("agent", policy.tokenizer.encode("hm"))], "invalid")]

    def load(corpus, encoder, *, index, device, prefixes):
        assert (str(device), prefixes["passage"]) == ("cpu", None)
        return Path(corpus).name, Path(encoder).name, index, prefixes["query"]

    monkeypatch.setattr(ask, "generate", generate)
    monkeypatch.setattr(Retriever, "load", load)
    monkeypatch.chdir(tmp_path)
    for name in ("c.jsonl", "i"):
        Path(name).touch()
    Path("e").mkdir()
    Path("e/config.json").touch()
    flags = ["--model", str(mini / "student"), "--corpus", "c.jsonl", "--encoder", "e"]
    ask.main(["ask", "who", "wrote it", *flags])
    ask.main(["ask", "who", *flags, "--max-turns", "1", "--index", "i", "--seed", "7",
              "--query-prefix", "q: ", "--dtype", "bfloat16", "--temperature", "0.5"])
    ask.main(["ask", "who", *flags, "--max-turns", "0"])
    capsys.readouterr()
    assert calls == [
        (torch.float32, ("c.jsonl", "e", None, None), "who wrote it", 0, 0.0),
        (torch.bfloat16, ("c.jsonl", "e", "i", "q: "), "who", 7, 0.5),
        (torch.float32, None, "who", 0, 0.0)]


def test_the_teacher_is_asked_as_many_questions_as_are_wanted(mini, tmp_path, monkeypatch):
    """Its episodes are played with the run's seed, and those that are right are kept."""
    calls = []

    def generate(policy, retriever, questions, settings, **options):
        calls.append(([q.id for q in questions], policy.tokenizer.folder.name, options["seed"],
                      options["first_episode"]))
        return [Episode(q, [Segment("agent", policy.tokenizer.encode("hm"))], "answered",
                        q.golden_answers[0] if i % 2 else "none")
                for i, q in enumerate(questions)]

    monkeypatch.setattr(sampling, "generate", generate)
    out = tmp_path / "episodes.jsonl"
    run_flags = ["--phase", "episodes", "--episodes", str(out), "--num-episode-questions", "5"]
    train.main(["--config", str(mini / "mini.toml"), *run_flags, "--seed", "6",
                "--run-dir", str(tmp_path / "run")])
    training, _ = byhand.split_questions(mini / "questions.jsonl", 2)
    names = [question.id for question in training[:5]]
    assert calls == [(names, "teacher", 6, 0)]
    assert [row["id"] for row in read_rows(out)] == names[1::2]


# ---- BARD and QAgent: what they hand to the loops ----

IN_GROUPS = {**RULES, "advantage": "group", "kl_in": "loss", "group_size": 4, "eval_every": 1}


def thirds(episode: Episode) -> float:
    """What stands in for a reward: 0, 1/2 or 1."""
    return sum(byhand.agent_ids(episode)) % 3 / 2


def check_rewards(numbers: dict, row: dict, episodes: list[Episode], size: int) -> None:
    paid = [thirds(episode) for episode in episodes]
    assert row["rollout/reward"] == pytest.approx(np.mean(paid))
    groups = [paid[first : first + size] for first in range(0, len(paid), size)]
    are_equal = [len(set(group)) == 1 for group in groups]
    assert row["rollout/equal_groups"] == pytest.approx(np.mean(are_equal))
    byhand.check_metrics(numbers, row, tolerance=METRICS)


@pytest.mark.parametrize("changes", [
    {"kl_where": "all", "group_size": 2, "seed": 8},
    {"kl_where": "wrong", "group_size": 2, "seed": 8},
    {"kl_where": "all", "group_size": 2, "seed": 8, "kl_in": "exact", "actor_lr": 0.001},
    {"kl_where": "none"}])
def test_bard_rl_learns_by_hand_from_its_reward_its_budgets_and_its_report(
    mini, tmp_path, monkeypatch, scores, changes
):
    rules = SimpleNamespace(**{**IN_GROUPS, **changes})
    asked = []

    def reward(episode, tokenizer, settings):
        asked.append((tokenizer.folder.name, settings.budget_weight))
        return thirds(episode)

    monkeypatch.setattr(bard, "reward", reward)
    spy = Spy(monkeypatch, sampling, "generate")
    budgets = [5, 6, 7, 8, 9]
    told = ["--budgets", *map(str, budgets), "--budget-text", "#{budget}"]
    told += ["--budget-reward", "additive", "--budget-weight", "0.7"]
    rows = run_by(rules, mini, tmp_path / "run", "--phase", "bard-rl", *told)
    guide = "teacher" if rules.kl_where == "wrong" else "student"
    expected = Reinforcement(mini, rules, guide, pay=thirds, drops=True)
    calls = iter(spy.calls)
    num = rules.prompts_per_step // rules.group_size
    for step, row in enumerate(rows):
        arguments, _, episodes = next(calls)
        drawn = np.random.default_rng((rules.seed, step, 4)).choice(np.array(budgets), num)
        check_told(arguments[2], [b for b in drawn for _ in range(rules.group_size)])
        check_rewards(expected.step(step, episodes), row, episodes, rules.group_size)
        lengths = [bard.num_thinking_tokens(e, expected_tokenizer(mini)) for e in episodes]
        assert row["rollout/thinking"] == pytest.approx(np.mean(lengths))
        assert row["rollout/adherence"] == pytest.approx(1.0)  # random models think nothing
        arguments, options, episodes = next(calls)
        check_told(arguments[2], np.random.default_rng((0, 4)).choice(np.array(budgets), 2))
        assert row["eval/reward"] == pytest.approx(np.mean([thirds(e) for e in episodes]))
        assert row["eval/adherence"] == 1.0
        assert "eval/thinking" not in row
    assert set(asked) == {("student", 0.7)}
    assert any(row["rollout/equal_groups"] for row in rows) or rules.group_size > 2
    check_networks(expected, tmp_path / "run", rules)


def expected_tokenizer(mini: Path) -> Tokenizer:
    return Tokenizer.load(mini / "student")


def check_told(questions: list[Question], budgets) -> None:
    assert [question.metadata["budget"] for question in questions] == list(budgets)
    assert [question.instruction for question in questions] == [f"#{b}" for b in budgets]


def test_bard_sft_hands_the_loop_its_episodes_and_its_questions(mini, tmp_path, monkeypatch):
    handed = {}

    def distil(run, settings, student, teacher, session, task, schedule):
        handed.update(locals())
        raise InterruptedError

    monkeypatch.setattr(bard, "distil", distil)
    rows = [
        row | {"metadata": {"budget": 4 + i % 3}, "answer_kind": "integer"}
        for i, row in enumerate(read_rows(mini / "episodes.jsonl"))
    ]
    write_rows(tmp_path / "told.jsonl", rows)
    flags = ["--phase", "bard-sft", "--budgets", "4", "9", "--budget-text", "#{budget}"]
    with pytest.raises(InterruptedError):
        run(mini, tmp_path / "run", *flags, "--episodes", str(tmp_path / "told.jsonl"))
    schedule, task, session = handed["schedule"], handed["task"], handed["session"]
    assert type(schedule) is Schedule and handed["teacher"] is None
    assert handed["settings"].ce_weight == 0.0  # without a teacher nobody reads it
    check_told([e.question for e in schedule.episodes], [4 + i % 3 for i in range(24)])
    assert {e.question.match for e in schedule.episodes} == {bard.integer_match}
    assert (task.reward, task.report, task.protocol, task.drop_equal_groups) == (
        None, None, None, False)
    asked = task.prepare(session.val_questions, 0)
    check_told(asked, np.random.default_rng((0, 4)).choice(np.array([4, 9]), 2))
    tokenizer = handed["student"].tokenizer
    thought = Segment("agent", tokenizer.encode("<think>12345</think>"))
    report = task.val_report([Episode(replace(q, metadata={"budget": b}), [thought]) for q, b in
                              zip(asked, (4, 5), strict=True)])
    assert report == {"adherence": 1}


def test_bard_data_hands_on_who_compresses_and_who_checks(mini, tmp_path, monkeypatch):
    calls = []

    def write_versions(chains, student, compressor, checker, settings):
        def name(policy):
            return policy and policy.tokenizer.folder.name

        assert not policy_learns(compressor) and not policy_learns(checker)
        calls.append((Path(chains).name, student.folder.name, name(compressor), name(checker)))
        return "done"

    def policy_learns(policy) -> bool:
        return policy is not None and any(p.requires_grad for p in policy.decoder.parameters())

    monkeypatch.setattr(bard, "write_versions", write_versions)
    (tmp_path / "c.jsonl").touch()
    flags = ["--phase", "bard-data", "--budgets", "9", "12"]
    flags += ["--chains", str(tmp_path / "c.jsonl")]
    flags += ["--episodes", str(tmp_path / "v.jsonl")]
    run_flags = [mini, tmp_path / "run", *flags]
    for extra in (["--compressor", str(mini / "student")], ["--compressor", "trails"],
                  ["--compressor", str(mini / "student"), "--teacher", ""]):
        train.main(["--config", str(mini / "mini.toml"), *run_flags[2:], *extra])
    assert calls == [("c.jsonl", "student", "student", "teacher"),
                     ("c.jsonl", "student", None, None),
                     ("c.jsonl", "student", "student", None)]


def test_budgets_are_measured_question_by_question_and_with_the_same_noise(mini, monkeypatch):
    tokenizer, calls = Tokenizer.load(mini / "student"), []

    def generate(policy, retriever, questions, settings, **options):
        stops = options["protocol"].interrupt is bard.hard_stop
        calls.append((retriever, options["seed"], stops, options["progress"],
                      [q.instruction for q in questions]))
        episodes = []
        for question in questions:
            length = question.metadata["budget"] // 2 + (question.id == "b")
            text = f"<think>{'x' * length}</think><answer>1</answer>"
            status = "answered" if question.id == "a" else "max_turns"
            answer = "1" if stops == (question.id == "a") else None
            episodes.append(Episode(
                question, [Segment("agent", tokenizer.encode(text))], status, answer))
        return episodes

    monkeypatch.setattr(bard, "generate", generate)
    questions = [Question(name, "?", ("1",), "test") for name in "ab"]
    result = bard.measure_budgets(
        Policy(None, tokenizer), questions, BardSettings(), [4, 8], budget_text="#{budget}",
        seed=5, retriever="shelf", progress=True)
    assert calls == [
        ("shelf", 5, stops, f"budget {budget}{name}", [f"#{budget}"] * 2)
        for budget in (4, 8) for stops, name in ((False, ""), (True, ", hard stop"))]
    assert result["rows"] == [
        {"id": id, "budget": budget, "length": budget // 2 + (id == "b"),
         "correct_free": float(id == "b"), "correct": float(id == "a"),
         "status": "answered" if id == "a" else "max_turns", "formed": id == "a"}
        for budget in (4, 8) for id in "ab"]
    assert result["budgets"][4]["accuracy"] == 0.5
    assert result["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("changes", [
    {"kl_where": "all"}, {"kl_where": "wrong", "group_size": 2, "seed": 4, "steps": 1}])
def test_qagent_learns_by_hand_from_its_reward_and_its_report(
    mini, tmp_path, monkeypatch, scores, changes
):
    rules = SimpleNamespace(**{**IN_GROUPS, **changes})
    calls = []

    def rewards(episodes, tokenizer, generator, settings):
        calls.append((tokenizer.folder.name, generator, settings.stage, settings.prompt))
        return [thirds(episode) for episode in episodes]

    def load_generator(settings, device, dtype):
        return settings.generator, str(device), dtype

    monkeypatch.setattr(qagent, "rewards", rewards)
    monkeypatch.setattr(qagent, "load_generator", load_generator)
    spy = Spy(monkeypatch, sampling, "generate")
    flags = ["--stage", "2", "--generator", "org/reader", "--teacher-dtype", "bfloat16"]
    flags += ["--protocol", "qagent", "--prompt", "qagent", "--max-context-tokens", "900"]
    if rules.kl_where == "wrong":
        flags[flags.index("bfloat16")] = "float32"
    rows = run_by(rules, mini, tmp_path / "run", "--phase", "qagent", *flags)
    guide = "teacher" if rules.kl_where == "wrong" else "student"
    expected = Reinforcement(mini, rules, guide, pay=thirds, drops=True)
    played = iter(spy.calls)
    for step, row in enumerate(rows):
        arguments, options, episodes = next(played)
        assert arguments[3].prompt == "row" and options["protocol"] == qagent.QAGENT
        check_rewards(expected.step(step, episodes), row, episodes, rules.group_size)
        for name in ("passages", "hit", "queries", "dropped_queries", "format"):
            sums = qagent.report_passages(episodes, expected_tokenizer(mini))
            assert row[f"rollout/{name}"] == pytest.approx(sums[name] / len(episodes))
        arguments, options, episodes = next(played)
        assert row["eval/reward"] == pytest.approx(np.mean([thirds(e) for e in episodes]))
    [(_, generator, stage, prompt)] = set(calls)
    dtype = torch.float32 if rules.kl_where == "wrong" else torch.bfloat16
    assert (generator, stage, prompt) == (("org/reader", "cpu", dtype), 2, "qagent")
    assert {name for name, *_ in calls} == {"student"}
    check_networks(expected, tmp_path / "run", rules)


def test_qagents_commands_play_with_its_prompt_its_protocol_and_its_noise(mini, monkeypatch):
    tokenizer, calls = Tokenizer.load(mini / "student"), []
    two = [Passage("1", "T", "Ann", 1.0), Passage("2", "U", "Bob", 0.5)]

    def generate(policy, retriever, questions, settings, **options):
        calls.append((retriever, settings.prompt, options["seed"], options["protocol"],
                      options["progress"], [q.prompt[0]["content"][-8:] for q in questions]))
        segments = [Segment("agent", tokenizer.encode("x"))]
        return [Episode(q, segments, "answered", "so Ann", ["q", "r"], [two, two[:1]])
                for q in questions]

    monkeypatch.setattr(qagent, "generate", generate)
    settings = SearchSettings(max_queries=2, seed=9, passages="agent")
    protocol = qagent.QAGENT._replace(max_queries=2)
    found = qagent.search("who?", Policy(None, tokenizer), "shelf", settings, seed=4)
    assert (found.passages, found.queries) == (two, ["q", "r"]) and "answered" in found.trace
    assert calls == [("shelf", "row", 4, protocol, "", ["on: who?"])]
    calls.clear()
    sets = {"nq": [Question("1", "who", ("Ann",), "nq"), Question("2", "whom", ("Bob",), "nq")]}
    read = []

    def reader(questions, passages):
        read.append(([q.id for q in questions], [[p.id for p in some] for some in passages]))
        return ["Ann", "to Bob"]

    result = qagent.evaluate_passages(
        Policy(None, tokenizer), "shelf", sets, {"reader": reader}, settings, progress=True)
    seed = 9 + zlib.crc32(b"nq")
    assert calls == [("shelf", "row", seed, protocol, "nq", ["on: who?", "n: whom?"])]
    assert read == [(["1", "2"], [["1", "2"]] * 2)]
    common = {"set": "nq", "passages": 2.0, "hit": 1.0, "queries": 2.0, "searches": 2.0,
              "agent_em": 0.0}
    assert result["rows"] == [
        common | {"id": "1", "agent_f1": pytest.approx(2 / 3), "answer reader": "Ann",
                  "em reader": 1.0, "within reader": 1.0, "f1 reader": 1.0},
        common | {"id": "2", "agent_f1": 0.0, "answer reader": "to Bob",
                  "em reader": 0.0, "within reader": 1.0, "f1 reader": pytest.approx(2 / 3)}]
    assert result["average"]["agent_f1"] == pytest.approx(1 / 3)


# ---- the engine ----


@dataclass
class Plain:
    """An episode that one row plays alone: no cache, no batch, the context read for each token."""

    ids: list[int]
    status: str = ""
    answer: str | None = None
    queries: list[str] = field(default_factory=list)
    dropped: int = 0
    logprobs: list[float] = field(default_factory=list)


@torch.no_grad()
def play_plainly(
    policy, retriever, question, settings, protocol, noise, interruption: Segment | None
) -> Plain:
    """The rules of rollout.py. noise(n): the uniform number of the agent's token n.

    interruption: what the environment puts in after INTERRUPTED tokens of the agent.
    """
    decoder, tokenizer = policy
    limit = settings.max_context_tokens
    episode = Plain(tokenizer.chat(build_messages(question, settings.prompt)))
    turn, opens, written = 0, "", []
    while not episode.status:
        logits = decoder(torch.tensor([episode.ids]))[0, -1, : tokenizer.size]
        token, logprob = pick(logits, noise(len(episode.logprobs)), settings)
        episode.ids.append(token)
        episode.logprobs.append(logprob)
        written.append(token)
        is_full = len(episode.ids) >= limit
        text = opens + tokenizer.decode(written)
        said = without_thoughts(text)
        ends = "</search>" in said or "</answer>" in said or token in tokenizer.end_ids
        put_in, begins = None, ""
        if not ends and not is_full and len(written) < settings.max_new_tokens:
            if len(episode.logprobs) == INTERRUPTED and interruption:
                put_in, begins = interruption.ids, interruption.opens
        else:
            action = parse_action(text, protocol)
            is_last = turn == settings.max_turns
            if action.kind == "answer":
                episode.status, episode.answer = "answered", action.content
            elif is_full:
                episode.status = "max_tokens"
            elif is_last:
                is_cut = len(written) >= settings.max_new_tokens
                other = "max_tokens" if is_cut else "invalid"
                episode.status = "max_turns" if action.kind == "search" else other
            elif action.kind == "search":
                asked = list(action.queries)[: protocol.max_queries or None]
                episode.dropped += len(action.queries) - len(asked)
                episode.queries += asked
                found = retriever.search(asked, settings.top_k)
                shown = {(p.title, p.text): p for passages in found for p in passages}
                put_in = observation_ids(
                    tokenizer, [*shown.values()], settings.max_obs_tokens, protocol)
                turn += 1
            else:
                put_in = tokenizer.encode(protocol.notice, own=True)
                turn += 1
        if put_in is not None:
            if len(episode.ids) + len(put_in) >= limit:
                episode.status = "max_tokens"
                break
            episode.ids += put_in
            written, opens = [], begins
    return episode


def without_thoughts(text: str) -> str:
    """What stands before, between and after thoughts; one that is still open goes to the end."""
    said, opening, rest = text.partition("<think>")
    while opening:
        before, opening, rest = rest.partition("</think>")[2].partition("<think>")
        said += " " + before
    return said


def pick(logits: torch.Tensor, u: float, settings) -> tuple[int, float]:
    """The inverse of the cumulative distribution, over a nucleus."""
    if settings.temperature == 0:
        token = logits.argmax().item()
        return token, logits.log_softmax(-1)[token].item()
    probs = (logits / settings.temperature).softmax(-1).double()
    order = probs.argsort(descending=True, stable=True)
    kept, mass = torch.zeros_like(probs), 0.0
    for token in order.tolist():
        if mass >= settings.top_p:
            break
        kept[token] = probs[token]
        mass += probs[token].item()
    token = int((kept.cumsum(-1) <= u * mass).sum())
    return token, math.log(kept[token].item() / mass)


INTERRUPTED = 9


@pytest.fixture(scope="module")
def world() -> tuple[Policy, FixedRetriever, list[Question]]:
    policy = Policy(load_decoder(ROOT / "world/teacher"), Tokenizer.load(ROOT / "world/teacher"))
    questions = load_questions(ROOT / "world/questions/train.jsonl", limit=3)
    return policy, FixedRetriever(text="Gate Harbor"), questions


BASE = RolloutSettings(
    max_turns=2, top_k=2, max_new_tokens=64, max_obs_tokens=40, max_context_tokens=190,
    temperature=1.0, prompt="short", rollout_rows=3)


@pytest.mark.parametrize("name", ["plain", "nucleus", "interrupted", "words", "greedy, one turn",
                                  "other ends"])
def test_sampled_episodes_are_those_of_a_plain_loop(world, name):
    policy, retriever, questions = world
    settings, protocol, interruption = BASE, SEARCH_R1, None
    if name == "nucleus":
        settings = replace(BASE, top_p=0.7, temperature=1.5, max_new_tokens=15)
    if name == "greedy, one turn":
        settings = replace(BASE, temperature=0.0, max_turns=1)
    if name == "words":  # each word of a search is a query, and the second is the last
        protocol = SEARCH_R1._replace(queries=lambda text: tuple(text.split()), max_queries=2)
    if name == "other ends":  # as a teacher's tokens that end a turn are the student's, too
        policy = policy._replace(tokenizer=copy.copy(policy.tokenizer))
        [usual] = generate(policy, retriever, questions[:1], settings, seed=11, first_episode=4)
        other = usual.segments[1].ids[5]
        policy.tokenizer.end_ids |= {other}
    if name == "interrupted":
        ids = policy.tokenizer.encode(" so <answer>")
        interruption = Segment("environment", ids, opens="<answer>")

        def interrupt(episode, tokenizer):
            return interruption if episode.num_agent_tokens == INTERRUPTED else None

        protocol = SEARCH_R1._replace(interrupt=interrupt)
    episodes = generate(
        policy, retriever, questions, settings, seed=11, first_episode=4, protocol=protocol)
    for number, (episode, question) in enumerate(zip(episodes, questions, strict=True), 4):
        expected = play_plainly(
            policy, retriever, question, settings, protocol,
            lambda n, number=number: uniforms(11, [number], [n])[0], interruption)
        assert episode.ids == expected.ids
        assert (episode.status, episode.answer) == (expected.status, expected.answer)
        assert (episode.queries, episode.dropped_queries) == (expected.queries, expected.dropped)
        recorded = [logprob for segment in episode.segments for logprob in segment.logprobs]
        assert recorded == pytest.approx(expected.logprobs, abs=SAMPLED)
    if name == "other ends":
        assert other in {s.ids[-1] for e in episodes for s in e.segments if s.author == "agent"}
    print(name, [(e.status, e.num_searches, e.dropped_queries, len(e.ids)) for e in episodes])


def test_the_noise_of_a_seed_stays_what_it_was():
    """Another generator would make other runs of all recorded seeds."""
    got = uniforms(7, [0, 1, 2**40], [0, 3, 5]).tolist()
    assert got == [0.7169742120081, 0.1412395338628043, 0.893001708850041]
