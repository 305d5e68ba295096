"""Memory and disk: what they go to, and which setting changes each part."""

import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer


def memory_report(
    peak: int, networks: dict[str, nn.Module], optimizers: dict[str, Optimizer], settings: Any
) -> str:
    """What the memory went to, and the setting that changes each part, largest first.

    peak: bytes; settings: the program's, with those of passes and rollouts.
    """
    parameters = [p for network in networks.values() for p in network.parameters()]
    weights = sum(p.nbytes for p in parameters)
    weights += sum(p.nbytes for p in parameters if p.requires_grad)  # their gradients
    adam = 0
    for optimizer in optimizers.values():
        for state in optimizer.state.values():
            adam += sum(value.nbytes for value in state.values())
    parts = [
        (weights + adam, "weights, gradients and Adam",
         f"--shard (now {settings.shard}) over more processes; --train-layers trains a part"),
        (max(0, peak - weights - adam), "the rest of the peak, activations above all",
         f"--micro-batch-tokens (now {settings.micro_batch_tokens}), --checkpointing, or "
         "--compute-dtype bfloat16"),
    ]
    decoder = networks.get("actor", networks.get("student"))
    if decoder is not None:
        c = decoder.config
        slots = settings.max_context_tokens * settings.rollout_rows
        bytes_a_slot = 2 * c.num_layers * c.num_kv_heads * c.head_dim
        dtype = decoder.compute_dtype or decoder.head_weight.dtype
        parts.append((slots * bytes_a_slot * dtype.itemsize,
                      "keys and values of a rollout",
                      f"--rollout-rows (now {settings.rollout_rows}) or --max-context-tokens "
                      f"({settings.max_context_tokens})"))
    lines = [f"  {size / 2**30:8.2f} GiB {name}: {knob}"
             for size, name, knob in sorted(parts, reverse=True)]
    return (f"out of memory at a peak of {peak / 2**30:.2f} GiB. Change first what is largest:\n"
            + "\n".join(lines))


def disk_report(run_dir: Path, networks: dict[str, nn.Module], num_kept: int,
                save_every: int) -> str:
    """What a run will keep on the disk, and whether there is room for it."""
    model, *others = [sum(p.nbytes for p in network.parameters()) for network in networks.values()]
    trained = sum(p.nbytes for network in networks.values()
                  for p in network.parameters() if p.requires_grad)
    state = model + sum(others) + 2 * trained  # weights and Adam's two moments
    folder = run_dir / "state"
    free, num_there = shutil.disk_usage(run_dir).free, len([*folder.glob("step_*")])
    # The newest ones, the best one, and the one that is being written; without --save-every the
    # last one alone.
    num_states = num_kept + 2 if save_every else 1
    wanted = max(0, num_states - num_there) * state + model
    which = f"states in {folder}: the {num_kept} newest and the best, {state / 2**30:.3g} GiB each"
    if not save_every:
        which = f"state in {folder}: the last one, {state / 2**30:.3g} GiB"
    text = f"{which}; the result has {model / 2**30:.3g} GiB"
    if free < wanted:
        text += (f"\nwarning: {run_dir}: got {free / 2**30:.3g} GiB free on the disk, expected "
                 f"{wanted / 2**30:.3g} GiB; make room, or give a --run-dir on another disk")
    return text
