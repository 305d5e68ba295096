"""Runs of train.py in this process, on the world of tests/support/mini.py, and spies on them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from model import Tokenizer, load_decoder
from rollout import Policy
from tests.support.mini import read_rows

ROOT = Path(__file__).resolve().parents[2]
METRIC_TOLERANCE = 1e-4  # the same run after a few Adam steps, which amplify small gradients
# Of one process alone, or counts of what crosses a line.
JUMPY = {"loss/first_log_ratio", "loss/value_clip", "loss/clip_frac"}


def run(mini: Path, out: Path, *flags: str) -> list[dict]:
    """Runs train.py with these flags; returns the lines of metrics.jsonl."""
    train.main(["--config", str(mini / "mini.toml"), "--run-dir", str(out), *flags])
    return read_rows(out / "metrics.jsonl")


class Spy:
    """Stands in for a function of a module, calls it, and keeps what went in and came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str):
        self.real, self.calls = getattr(module, name), []
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        result = self.real(*arguments, **options)
        self.calls.append((arguments, options, result))
        return result

    def options(self, name: str) -> set:
        """The values that a keyword argument had."""
        return {options[name] for _, options, _ in self.calls}


class Updates:
    """Every update by Adam: (number of parameters, rate, weight decay), and the clips."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[tuple[int, float, float]] = []
        self.clips: list[float] = []
        real_step, real_clip = torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_

        def step(adam, *arguments, **options):
            for group in adam.param_groups:
                self.steps.append((len(group["params"]), group["lr"], group["weight_decay"]))
            return real_step(adam, *arguments, **options)

        def clip(parameters, max_norm, *arguments, **options):
            self.clips.append(max_norm)
            return real_clip(parameters, max_norm, *arguments, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    """All gradients of a module, one after another."""
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def policies(mini: Path) -> tuple[Policy, Policy]:
    """The student and the teacher."""
    student, teacher = (
        Policy(load_decoder(mini / name), Tokenizer.load(mini / name))
        for name in ("student", "teacher")
    )
    return student, teacher


def torchrun(num_processes: int, *command: object, **options) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(num_processes)]
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finish(process: subprocess.Popen, timeout_s: float = 300) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output[-3000:]
    return output


def assert_same_metrics(some: list[dict], others: list[dict]) -> None:
    """To rounding: sums over processes are taken in another order."""
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - JUMPY:
            expected = a[key]
            if expected is not None:
                expected = pytest.approx(expected, rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE)
            assert b[key] == expected, key
