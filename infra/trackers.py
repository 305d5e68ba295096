"""Trackers: packages of others that draw a run's numbers beside its metrics.jsonl (--log-to).

They are not required here, and are imported only where a run asks for one.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

Track = Callable[[int, dict[str, float]], object]  # (step, its metrics)


def check_installed(name: str) -> None:
    """Refuse a tracker that is not there, before a run loads anything."""
    if name and importlib.util.find_spec(name) is None:
        raise ValueError(f"--log-to {name}: got no package {name}, expected it to be installed; "
                         f"run pip install {name}, or drop the flag: viewer.py watch needs none")


def open_tracker(name: str, folder: Path, settings: dict[str, Any], steps_done: int) -> Track:
    """What takes a step's numbers from here on; steps_done: those that a resumed run has."""
    if name == "wandb":
        wandb = importlib.import_module("wandb")
        # A run that goes on is another one there, in the same group.
        run = wandb.init(project="dgpo", group=folder.name, name=f"{folder.name}-{steps_done}",
                         dir=str(folder), config=settings)
        return lambda step, metrics: run.log(metrics, step=step)
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    # Steps that a resumed run does again replace what was drawn of them.
    writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def track(step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return track
