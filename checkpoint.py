"""State: what a run needs to continue after an interruption, as safetensors and JSON; no pickle is read or written.

    <run_dir>/state/step_000040/{tensors.safetensors, meta.json}

A state is written aside, then renamed, so a half-written one is never picked. The order of the data and the
sampling noise are functions of (seed, step), so the step number stands for both.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NUM_KEPT = 2


def save_state(
    run_dir: Path, step: int, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """Write the state after `step` steps and drop all but the last NUM_KEPT."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        # Names of parameters, not of the state dict: a tied head is one parameter under two names there.
        tensors |= {f"{name}/{key}": p.detach().contiguous() for key, p in module.named_parameters()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{key}": value.contiguous() for key, value in state.items()}
    folder = run_dir / "state" / f"step_{step:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "tensors.safetensors")
    (partial / "meta.json").write_text(json.dumps({"step": step}))
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in states(run_dir)[:-NUM_KEPT]:
        shutil.rmtree(old)


def states(run_dir: Path) -> list[Path]:
    """Whole states of a run, oldest first."""
    return sorted(p for p in (run_dir / "state").glob("step_*") if p.suffix != ".partial")


def load_state(
    run_dir: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> int:
    """Load the newest state into modules and optimizers, in place; returns the number of steps done."""
    if not (found := states(run_dir)):
        raise FileNotFoundError(f"--resume: got no state in {run_dir / 'state'}; start the run without --resume")
    path = found[-1] / "tensors.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete {found[-1]} to use the one before") from error
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            saved = tensors.get(f"{name}/{key}")
            if saved is None or saved.shape != parameter.shape:
                got = "nothing" if saved is None else tuple(saved.shape)
                raise ValueError(
                    f"{path}: {name}/{key}: got {got}, expected {tuple(parameter.shape)}; the state belongs to "
                    "another model: give the settings of the run that wrote it"
                )
            parameter.data.copy_(saved)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            owner, *rest = key.split("/")
            if owner == name:
                state.setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((found[-1] / "meta.json").read_text())["step"]


def cut_lines(path: Path, steps_done: int) -> None:
    """Drop the JSON lines of steps that the resumed run will do again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= steps_done]
        path.write_text("".join(line + "\n" for line in lines))
