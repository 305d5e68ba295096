"""Trackers of other packages (--log-to): what they are given, and that none is needed.

Run: python -m pytest tests/test_trackers.py
"""

import sys
import types

import pytest

from infra import trackers
from tests.support.mini import read_rows
from tests.support.runs import run

FLAGS = ["--phase", "kd", "--eval-every", "0"]


class Writer:
    """Stands in for torch.utils.tensorboard.SummaryWriter."""

    def __init__(self, folder: str, purge_step: int):
        self.folder, self.purge_step, self.rows, self.num_flushed = folder, purge_step, [], 0

    def add_scalar(self, *row):
        self.rows.append(row)

    def flush(self):
        self.num_flushed += 1


def stand_in(monkeypatch, name: str, **parts) -> None:
    """Puts a module of this name in the place of one that need not be installed."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace()
    vars(module).update(parts)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_every_number_of_every_step(mini, tmp_path, monkeypatch):
    writers = []

    def open_writer(*arguments, **options):
        writers.append(Writer(*arguments, **options))
        return writers[-1]

    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=open_writer)
    steps = run(mini, tmp_path / "run", *FLAGS, "--log-to", "tensorboard")
    [writer] = writers
    assert writer.folder == str(tmp_path / "run" / "tensorboard") and writer.purge_step == 1
    expected = [(key, value, step["step"]) for step in steps for key, value in step.items()
                if key != "step"]  # fmt: skip
    assert writer.rows == expected and writer.num_flushed == len(steps) > 1
    (tmp_path / "run" / "tensorboard").mkdir()
    run(mini, tmp_path / "run", *FLAGS, "--resume", "--log-to", "tensorboard")
    assert writers[1].purge_step == len(steps) + 1
    run(mini, tmp_path / "run", *FLAGS, "--overwrite")
    assert len(writers) == 2 and not (tmp_path / "run" / "tensorboard").exists()


def test_weights_and_biases_gets_settings_steps_and_no_null(tmp_path, monkeypatch):
    calls = []
    logger = types.SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics)))

    def init(**options):
        calls.append(options)
        return logger

    stand_in(monkeypatch, "wandb", init=init)
    trackers.check_installed("wandb")
    track = trackers.open_tracker("wandb", tmp_path / "dgpo", {"seed": 3}, 7)
    track(8, {"loss/kd": 0.5})
    assert calls == [
        {"project": "dgpo", "group": "dgpo", "name": "dgpo-7", "dir": str(tmp_path / "dgpo"),
         "config": {"seed": 3}},
        (8, {"loss/kd": 0.5}),
    ]  # fmt: skip


def test_numbers_that_are_not_finite_are_left_out(mini, tmp_path, monkeypatch):
    """Explained variance is null in a step whose returns are all equal."""
    seen = []
    stand_in(monkeypatch, "wandb", init=lambda **_: types.SimpleNamespace(
        log=lambda metrics, step: seen.append(metrics)))  # fmt: skip
    flags = ["--phase", "dgpo", "--steps", "1", "--beta", "0", "--log-to", "wandb"]
    run(mini, tmp_path / "run", *flags, "--eval-every", "0")
    [logged] = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert logged["rollout/explained_variance"] is None
    assert seen == [{key: value for key, value in logged.items()
                     if key != "step" and value is not None}]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_loaded(
    mini, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--log-to wandb: got no package wandb.*pip install wandb"):
        run(mini, tmp_path / "run", *FLAGS, "--log-to", "wandb")
    assert not (tmp_path / "run" / "config.json").exists()
    trackers.check_installed("")


def test_a_real_tensorboard_holds_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = trackers.open_tracker("tensorboard", tmp_path, {}, 0)
    track(1, {"loss/kd": 0.5})
    track(2, {"loss/kd": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss/kd")
    assert [(event.step, event.value) for event in scalars] == [(1, 0.5), (2, 0.25)]
