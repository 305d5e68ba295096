"""A run's folder: what is logged and saved and when, what counts as the best state, when it ends.

Run: python -m pytest tests/test_run.py
"""

import json
import math
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infra import checkpoint
from infra.checkpoint import best_state, save_state, states
from infra.parallel import micro_batches, shuffled, uniforms, update
from infra.run import MAX_SKIPPED, Run, RunSettings, Stop
from tests.support.mini import read_rows


class Counter:
    """A schedule with one number."""

    def __init__(self, count: int = 0):
        self.count = count

    def state(self) -> dict:
        return {"count": self.count}

    def load(self, state: dict) -> None:
        self.count = state["count"]


def begin(folder, schedule=None, num_steps: int = 10, **changes) -> Run:
    """A run of a network with one layer, ready for its first step."""
    settings = RunSettings(phase="kd", run_dir=str(folder), save_every=1, device="cpu", **changes)
    run = Run(settings, 0, 1, torch.device("cpu"))
    run.prepare_folder()
    run.start(num_steps, 8, {"student": torch.nn.Linear(2, 2)}, schedule)
    return run


def log(run: Run, step: int, **metrics: float) -> None:
    named = {key.replace("_", "/", 1): value for key, value in metrics.items()}
    run.log(step, named, num_tokens=1, passes=1)


# ---- states ----


def test_the_best_state_is_chosen_by_the_reward_where_a_validation_has_one(tmp_path):
    run = begin(tmp_path / "run")
    for step, (score, reward) in enumerate([(0.1, 0.9), (0.9, 0.1), (0.8, 0.2), (0.7, 0.3)], 1):
        log(run, step, eval_score=score, eval_reward=reward)
    assert run.score == 0.3 and best_state(states(tmp_path / "run")).name == "step_000001"
    by_score = begin(tmp_path / "score")
    for step, score in enumerate([0.1, 0.9, 0.8, 0.7], 1):
        log(by_score, step, eval_score=score)
    assert best_state(states(tmp_path / "score")).name == "step_000002"


def test_a_step_that_was_not_validated_has_no_score(tmp_path):
    run = begin(tmp_path)
    log(run, 1, eval_score=0.5)
    log(run, 2, loss_kd=0.1)
    assert run.score is None
    scores = [json.loads((s / "meta.json").read_text())["score"] for s in states(tmp_path)]
    assert scores == [0.5, None]


def test_a_state_is_on_the_disk_before_it_gets_its_name_and_after_the_log(tmp_path, monkeypatch):
    """What a power cut leaves is a whole state, whose log is at least as long."""
    flushed, places = [], {}
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), real(handle))
    )
    rename = checkpoint.Path.rename

    def watching(self, target):
        places[target.name] = len(flushed)
        return rename(self, target)

    monkeypatch.setattr(checkpoint.Path, "rename", watching)
    run = begin(tmp_path)
    log(run, 1, loss_kd=0.1)
    [state] = states(tmp_path)
    before = set(flushed[: places[state.name]])
    files = {path.name: path.stat().st_ino for path in (*state.iterdir(), state)}
    assert {"meta.json", "student.safetensors", "student_adam.safetensors"} <= files.keys()
    assert set(files.values()) <= before
    assert flushed[0] == (tmp_path / "metrics.jsonl").stat().st_ino
    assert flushed[-1] == state.parent.stat().st_ino  # the new name, too


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no space left on device")

    network = torch.nn.Linear(2, 2)
    save_state(tmp_path, {"student": network}, {}, {"step": 1})
    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(OSError, match="student.safetensors: no space left"):
        save_state(tmp_path, {"student": network}, {}, {"step": 2})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000001"]


# ---- a schedule ----


def test_a_schedule_is_saved_with_the_state_and_loaded_from_it(tmp_path):
    run = begin(tmp_path, Counter(7))
    log(run, 1, loss_kd=0.1)
    resumed = Counter()
    begin(tmp_path, resumed, resume=True)
    assert resumed.count == 7


def test_a_schedule_of_another_layout_is_refused_by_name(tmp_path):
    """A state that an earlier version wrote, or a phase without a schedule."""
    log(begin(tmp_path), 1, loss_kd=0.1)
    with pytest.raises(Stop, match="meta.json: got a schedule of another layout .*--overwrite"):
        begin(tmp_path, Counter(), resume=True)


# ---- ends ----


def test_updates_that_were_left_out_are_forgotten_after_a_good_step(tmp_path):
    run = begin(tmp_path)

    def step(*gradients: float) -> int:
        """One step with an update for each gradient; the number of those that were left out."""
        for gradient in gradients:
            for parameter in run.networks["student"].parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            run.update("student", 0.1)
        return run.count_skipped()

    for _ in range(3):
        assert [step(math.nan) for _ in range(MAX_SKIPPED - 1)] == [1] * (MAX_SKIPPED - 1)
        assert step(1.0, 2.0) == 0
    for _ in range(MAX_SKIPPED - 1):
        assert step(math.inf, 1.0) == 1  # beside one that is well
    with pytest.raises(Stop, match=f"last {MAX_SKIPPED} updates .*--grad-clip"):
        step(math.nan)


def test_a_network_is_updated_at_the_steps_rate_with_the_settings_decay_and_clip(tmp_path):
    run = begin(tmp_path, weight_decay=0.07, grad_clip=0.5)
    [weight, bias] = run.networks["student"].parameters()
    weight.grad, bias.grad = torch.ones(2, 2), torch.zeros(2)
    before = weight.detach().clone()
    assert run.update("student", 0.01) == pytest.approx(2.0)  # before clipping
    [group] = run.adams["student"].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.07)
    state = run.adams["student"].state[weight]
    assert state["exp_avg"].norm() == pytest.approx(0.1 * 0.5)  # Adam saw the clipped gradient
    decayed = before * (1 - 0.01 * 0.07)
    torch.testing.assert_close(weight.detach(), decayed - 0.01, atol=1e-6, rtol=0)


def test_max_minutes_are_minutes_and_none_is_no_limit(tmp_path):
    run = begin(tmp_path, max_minutes=2.0)
    assert not run.is_over()
    run.started -= 119
    assert not run.is_over()
    run.started -= 2
    assert run.is_over()
    unlimited = begin(tmp_path / "other")
    unlimited.started -= 10**6
    assert not unlimited.is_over()


def test_a_number_that_is_not_one_is_null_in_the_log_and_in_the_history(tmp_path):
    run = begin(tmp_path)
    log(run, 1, loss_kd=math.nan, loss_lr=1.0)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/kd": None, "loss/lr": 1.0}]
    assert run.history == [{"loss/kd": None, "loss/lr": 1.0}]


def test_a_launchers_signal_does_not_end_a_process_that_is_about_to_say_what_went_wrong(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), Run.signals(SimpleNamespace(signal=0)):
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, at the next line
        assert "SIGTERM" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- updates, in one process ----


def descend(gradient: list[float], grad_clip: float) -> tuple[torch.Tensor, float]:
    """(how far plain descent at rate 1 moved, the norm that `update` returned)."""
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    norm = update([parameter], torch.optim.SGD([parameter], lr=9.0), 1.0, grad_clip)
    assert parameter.grad is None
    return -parameter.detach(), norm


def test_a_gradient_is_clipped_to_the_largest_norm_and_its_own_norm_is_returned():
    moved, norm = descend([3.0, 4.0], 1.0)
    assert norm == 5.0 and torch.allclose(moved, torch.tensor([0.6, 0.8]))
    moved, norm = descend([0.3, 0.4], 1.0)
    assert norm == pytest.approx(0.5) and torch.allclose(moved, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    moved, norm = descend([1.0, bad], 1.0)
    assert not math.isfinite(norm) and not moved.any()


# ---- shares of work ----


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [5, 30, 7, 7, 100, 1, 12]
    groups = micro_batches(lengths, 40)
    assert groups == [[0, 1], [2, 3], [4], [5, 6]]
    assert all(sum(lengths[i] for i in g) <= 40 or len(g) == 1 for g in groups)
    assert micro_batches([], 40) == []


def test_a_permutation_depends_on_its_seeds_alone():
    assert shuffled(9, 1, 2) == shuffled(9, 1, 2) != shuffled(9, 1, 3)
    assert sorted(shuffled(9, 1, 2)) == list(range(9)) and shuffled(0, 1) == []


def test_noise_depends_on_seed_episode_and_index_alone_and_is_uniform():
    assert (uniforms(1, [5, 6], [0, 3]) == uniforms(1, [6, 5], [3, 0])[::-1]).all()
    a, b = np.meshgrid(np.arange(200), np.arange(200))
    u = uniforms(3, a.ravel(), b.ravel())
    assert ((0 <= u) & (u < 1)).all() and len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.size) ** 0.5
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / u.size**0.5
    assert abs(np.corrcoef(uniforms(4, a.ravel(), b.ravel()), u)[0, 1]) < 5 / u.size**0.5
