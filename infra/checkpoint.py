"""Training state: what a run needs to continue after an interruption, without any pickle.

    <run_dir>/state/step_000040/actor.safetensors, actor_adam.safetensors, ..., meta.json

meta.json holds step, num_steps, the score of its validation (or null), num_processes, the
schedule's state and a SHA-256 for each file. A state is written under another name, flushed to the
disk and renamed, so a half-written one is never loaded. One that was damaged later is passed over
for the one before it. A state is a checkpoint folder, too: it has hard links to its weights under
the public name, and to the run's config.json, tokenizer and run.json.

The order of the data, the learning rate and the sampling noise are functions of (seed, step), so
the step number stands for all of them. Tensors are saved unsharded, for any number of processes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.parallel import gather, shard_like

NUM_KEPT = 2  # the newest states; the one with the best validation score is kept as well
MODEL = "model.safetensors"  # the public name of weights
Modules, Optimizers = dict[str, nn.Module], dict[str, torch.optim.Optimizer]


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: a reader, or a crash, sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    try:
        write(partial)
        umask = os.umask(0)
        os.umask(umask)  # the only way to read it is to set it
        partial.chmod(0o666 & ~umask)  # safetensors would leave it readable by its owner alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # on a full disk


def flush(path: Path) -> None:
    """Force a file or folder to the disk, so that a power cut does not lose it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut_lines(path: Path, steps_done: int) -> None:
    """Drop the JSON lines of steps that a resumed run does again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    with suppress(ValueError, KeyError, TypeError):  # of a line that is not whole
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if json.loads(line)["step"] > steps_done:
                break
            kept.append(line + "\n")
    write_aside(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))


def save_state(run_dir: Path, modules: Modules, optimizers: Optimizers, meta: dict, *,
               writes: bool = True) -> None:
    """Write the state after meta["step"] steps, then delete the states that are not kept.

    Every process calls this, because sharded tensors are gathered; only one of them writes. Raises
    OSError on that one if it cannot write: nothing is left behind, older states stay as they are.
    """
    folder = run_dir / "state" / f"step_{meta['step']:06d}"
    partial = folder.with_name(folder.name + ".partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
    digests, problem = {}, None
    for name, tensors in named_tensors(modules, optimizers).items():
        # One file at a time, so that only this file's tensors are held gathered.
        gathered = {key: gather(tensor).contiguous() for key, tensor in tensors.items()}
        path = partial / f"{name}.safetensors"
        if not writes or problem:
            continue  # the other processes still wait for this one to gather
        try:
            partial.mkdir(parents=True, exist_ok=True)
            save_file(gathered, path, metadata={"format": "pt"})
            digests[path.name] = digest(path)
        except (OSError, SafetensorError) as error:
            problem = OSError(f"{path}: {error}")
    if not writes:
        return
    try:
        if problem:
            raise problem
        meta = {**meta, "files": digests}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        link(partial / f"{next(iter(modules))}.safetensors", partial / MODEL)  # the policy is first
        for path in (p for kind in ("json", "jinja", "txt") for p in run_dir.glob(f"[!.]*.{kind}")):
            link(path, partial / path.name)
        for path in (*partial.iterdir(), partial):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        flush(folder.parent)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    complete = states(run_dir)
    for old in {*complete} - {*complete[-NUM_KEPT:], best_state(complete)}:
        shutil.rmtree(old)


def link(source: Path, path: Path) -> None:
    """A second name for a file, if it is free; a copy where the disk has no hard links."""
    try:
        os.link(source, path)
    except FileExistsError:
        pass
    except OSError:
        shutil.copyfile(source, path)


def named_tensors(modules: Modules, optimizers: Optimizers) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, by name; sharded ones are not gathered yet."""
    # named_parameters, not state_dict: a tied head is one parameter under two names there.
    files = {name: dict(module.named_parameters()) for name, module in modules.items()}
    for name, optimizer in optimizers.items():
        states_by_index = optimizer.state_dict()["state"].items()
        files[name] = {f"{index}/{key}": value for index, state in states_by_index
                       for key, value in state.items()}
    return files


def states(run_dir: Path) -> list[Path]:
    """The complete states of a run, oldest first; damaged ones that were renamed are left out."""
    return sorted(path for path in (run_dir / "state").glob("step_*") if not path.suffix)


def best_state(folders: list[Path]) -> Path | None:
    """The state with the best validation score, the newest of equals; None if none has a score."""
    scores = {folder: read_meta(folder).get("score") for folder in folders}
    scored = [folder for folder in folders if scores[folder] is not None]
    return max(scored, key=lambda folder: (scores[folder], folder.name), default=None)


def read_meta(folder: Path) -> dict:
    with suppress(OSError, ValueError):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return meta if isinstance(meta, dict) else {}
    return {}


def damage(folder: Path) -> str:
    """What is wrong with the files of a state; empty if nothing is."""
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
    """The newest undamaged state, and what is wrong with newer ones, which are renamed."""
    problems = []
    for folder in reversed(states(run_dir)):
        if not (problem := damage(folder)):
            return folder, problems
        problems.append(problem)
        # Left under its name, a damaged state would count as one of the newest that are kept.
        folder.rename(folder.with_name(folder.name + ".damaged"))
    return None, problems


def load_state(folder: Path, modules: Modules, optimizers: Optimizers) -> dict:
    """Load a state into modules and optimizers, in place; returns its meta."""
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        with open_state(path) as file:
            for key, parameter in module.named_parameters():
                expected, got = tuple(parameter.shape), "nothing"
                if key in file.keys():
                    got = tuple(file.get_slice(key).get_shape())
                if got != expected:
                    raise ValueError(f"{path}: {key}: got {got}, expected {expected}; give the "
                                     "model and settings of the run that wrote the state")
                parameter.data.copy_(shard_like(file.get_tensor(key), parameter))
    for name, optimizer in optimizers.items():
        groups = optimizer.state_dict()["param_groups"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        with open_state(folder / f"{name}.safetensors") as file:
            for key in file.keys():
                index, field = key.split("/")
                tensor = shard_like(file.get_tensor(key), parameters[int(index)])
                state.setdefault(int(index), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return read_meta(folder)


def open_state(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); the state belongs to another phase: give the "
            "settings of the run that wrote it, or another --run-dir") from error
