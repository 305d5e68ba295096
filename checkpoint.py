"""State: what a run needs to continue after an interruption, as safetensors and JSON; no pickle is read or written.

    <run_dir>/state/step_000040/actor.safetensors, actor_adam.safetensors, ..., meta.json

    meta.json   step, score (of that step's validation, if there was one), num_processes, and a SHA-256 for each file

A state is written aside, flushed to the disk, then renamed: one that is half written is never picked, and one that
was damaged later is noticed and passed over for the one before. The order of the data, the learning rate and the
sampling noise are functions of (seed, step), so the step number stands for all of them, on every process. Tensors are
whole, whatever the number of processes: any number of them can continue.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel import full, share
from weights import write_aside

NUM_KEPT = 2  # the newest ones; the one with the best validation score is kept besides
Modules, Optimizers = dict[str, nn.Module], dict[str, torch.optim.Optimizer]


def tensors_of(modules: Modules, optimizers: Optimizers) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file's name, tensors by name), not gathered."""
    for name, module in modules.items():
        # Names of parameters, not of the state dict: a tied head is one parameter under two names there.
        yield name, dict(module.named_parameters())
    for name, optimizer in optimizers.items():
        states = optimizer.state_dict()["state"].items()
        yield name, {f"{index}/{key}": value for index, state in states for key, value in state.items()}


def save_state(run_dir: Path, modules: Modules, optimizers: Optimizers, meta: dict, *, writes: bool = True) -> None:
    """Write the state after meta["step"] steps, and drop those that are not kept.

    Every process calls it, one of them writes; there it raises OSError when it cannot, with nothing left behind and the
    older states untouched.
    """
    folder = run_dir / "state" / f"step_{meta['step']:06d}"
    partial = folder.with_name(folder.name + ".partial")
    digests: dict[str, str] = {}
    problem: OSError | None = None
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    for name, tensors in tensors_of(modules, optimizers):  # a file at a time, so that one is all that is gathered
        gathered = {key: full(tensor).contiguous() for key, tensor in tensors.items()}
        if not writes or problem:
            continue  # the others still wait for this process to gather
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(gathered, partial / f"{name}.safetensors")
            digests[f"{name}.safetensors"] = digest(partial / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            problem = OSError(f"{partial / name}.safetensors: {error}")
    if not writes:
        return
    try:
        if problem:
            raise problem
        (partial / "meta.json").write_text(json.dumps(meta | {"files": digests}, indent=1) + "\n")
        for path in (*partial.iterdir(), partial):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush(folder.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in not_kept(states(run_dir)):
        shutil.rmtree(old)


def flush(path: Path) -> None:
    """To the disk: a power cut does not lose it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def states(run_dir: Path) -> list[Path]:
    """States of a run that were written to the end and not put aside, oldest first."""
    return sorted(p for p in (run_dir / "state").glob("step_*") if not p.suffix)


def best_state(found: list[Path]) -> Path | None:
    """The one with the best validation score, the newest of equals; None where none was validated."""
    scores = {folder: score for folder in found if (score := read_meta(folder).get("score")) is not None}
    return max(scores, key=lambda folder: (scores[folder], folder.name), default=None)


def not_kept(found: list[Path]) -> list[Path]:
    best = best_state(found)
    return [folder for folder in found[:-NUM_KEPT] if folder != best]


def read_meta(folder: Path) -> dict:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def damage(folder: Path) -> str:
    """What is wrong with the files of a state; empty: nothing."""
    meta = read_meta(folder)
    if not isinstance(meta.get("files"), dict) or not isinstance(meta.get("step"), int):
        return f"{folder / 'meta.json'}: got no step and files, expected them"
    for name, expected in meta["files"].items():
        try:
            got = digest(folder / name)
        except OSError as error:
            return f"{folder / name}: got {error.strerror}, expected the file"
        if got != expected:
            return f"{folder / name}: got SHA-256 {got[:12]}..., expected {expected[:12]}..."
    return ""


def newest_state(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest state without damage, and what was found wrong with newer ones, which are put aside."""
    problems = []
    for folder in reversed(states(run_dir)):
        if not (problem := damage(folder)):
            return folder, problems
        problems.append(problem)
        folder.rename(folder.with_name(folder.name + ".damaged"))  # it would push out whole ones
    return None, problems


def load_state(folder: Path, modules: Modules, optimizers: Optimizers) -> dict:
    """Load a state into modules and optimizers, in place; returns its meta."""
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        with open_state(path) as file:
            saved = set(file.keys())
            for key, parameter in module.named_parameters():
                got = tuple(file.get_slice(key).get_shape()) if key in saved else "nothing"
                if got != tuple(parameter.shape):
                    raise ValueError(f"{path}: {key}: got {got}, expected {tuple(parameter.shape)}; the state belongs "
                                     "to another model: give the settings of the run that wrote it")
                parameter.data.copy_(share(file.get_tensor(key), parameter))
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        with open_state(folder / f"{name}.safetensors") as file:
            for key in file.keys():
                index, what = key.split("/")
                state.setdefault(int(index), {})[what] = share(file.get_tensor(key), parameters[int(index)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_meta(folder)


def open_state(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); the state belongs to another phase: give the settings of "
                         "the run that wrote it, or another --run-dir") from error


def cut_lines(path: Path, steps_done: int) -> None:
    """Drop the JSON lines of steps that the resumed run will do again, and a last line that is not whole."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > steps_done:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_aside(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))
