"""Processes: the ranks of torchrun, sums over them, and replicated or sharded (FSDP2) weights.

    torchrun --nproc-per-node 8 train.py ...     with one process torchrun is not needed

Every rank plays and scores its own share of a step's episodes. Gradients are summed, not averaged,
because the loss is already one mean over the tokens of all ranks. `update` sums the gradients of
replicated modules. FSDP2 sums those of sharded ones in each backward pass, which needs the same
number of passes on every rank (`pad_groups`). While a sharded module generates it is unsharded.

No object is sent between processes, because objects travel as pickles.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

# oneDNN compiles a product of bf16 for each shape, and keeps 1,024 of some MB by default.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def pick_device(name: str) -> str:
    """The device that --device names, if it is there; auto means cuda if there is one, else cpu."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{i}" for i in range(num_gpus)),
             *(["mps"] if torch.backends.mps.is_available() else [])]
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    if name not in there:
        raise ValueError(f"--device: got {name!r}, expected auto or a device of this machine: "
                         f"{', '.join(there)}")
    return name


def start_processes(device: str, timeout_minutes: float) -> tuple[int, int, torch.device]:
    """Join torchrun's processes: (rank, number of processes, device); (0, 1, device) without it."""
    device = pick_device(device)
    if "WORLD_SIZE" not in os.environ:  # torchrun's one process is a group: NCCL on one GPU
        return 0, 1, torch.device(device)
    num_here, is_numbered = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), ":" in device
    if is_numbered or device == "cuda" and num_here > torch.cuda.device_count():
        raise ValueError(f"--device: got {device} for {num_here} processes on this machine, "
                         "expected cuda with a GPU for each, or cpu")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def end_processes() -> None:
    """Leave the group of processes before the interpreter ends.

    Sharded modules hold the group in reference cycles. If its threads end later than the program,
    they sometimes abort a program that has done its work.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def sum_over_processes(*values: Tensor) -> list[float]:
    """Each value summed over the processes, in fp64, as floats."""
    total = torch.stack([value.detach().double().cpu() for value in values])
    if dist.is_initialized():
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()


def means(group: str, sums: dict[str, float], count: int) -> dict[str, float]:
    """Sums over this process's share as metrics GROUP/NAME: means over all processes."""
    n, *totals = sum_over_processes(*map(torch.tensor, (count, *sums.values())))
    return {f"{group}/{name}": total / max(1, n) for name, total in zip(sums, totals, strict=True)}


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text)


def max_over_processes(value: float) -> float:
    """The largest of the processes' numbers."""
    largest = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        largest = largest.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def barrier() -> None:
    """Wait for all processes; unlike dist.barrier it keeps to the timeout on every backend."""
    sum_over_processes(torch.zeros(()))


# ---- shares of work that do not depend on the number of processes ----


def shuffled(num: int, *seeds: int) -> list[int]:
    """A permutation of range(num) that depends on the seeds alone."""
    return np.random.default_rng(seeds).permutation(num).tolist()


def uniform(*seeds: int) -> float:
    """A number in [0, 1) that depends on the seeds alone."""
    return np.random.default_rng(seeds).random()


def uniforms(seed: int, episodes: Sequence[int], token_indices: Sequence[int]) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, episode, token index) alone.

    Runs a counter through splitmix64's finaliser, twice. Two sequences of one shape -> float64 of
    that shape. So neither batches nor processes change what an episode samples.
    """
    with np.errstate(over="ignore"):
        x = np.asarray(episodes, np.uint64) * np.uint64(0xD1342543DE82EF95)
        x = _mix(np.uint64(seed % 2**64) + x)
        x = _mix(x + np.asarray(token_indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def micro_batches(lengths: Sequence[int], max_tokens: int,
                  rows: Sequence[int] | None = None) -> list[list[int]]:
    """Cut rows (None: all) into groups whose lengths sum to at most max_tokens (at least one row).

    Padded with empty groups, so that every rank runs the same number of passes.
    """
    groups, total = [], max_tokens
    for i in range(len(lengths)) if rows is None else rows:
        if total + lengths[i] > max_tokens:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += lengths[i]
    return pad_groups(groups)


def pad_groups(groups: list[list[int]]) -> list[list[int]]:
    """Pads with empty groups, so that every rank runs the same number of collective passes."""
    if not dist.is_initialized():
        return groups
    counts = torch.zeros(dist.get_world_size())
    counts[dist.get_rank()] = len(groups)
    return groups + [[]] * int(max(sum_over_processes(*counts)) - len(groups))


def row_weights(mask: Tensor, num_tokens: float, num_rows: float) -> Tensor:
    """Weights of tokens that turn their mean into one of rows' means: masks of rows [B, T] -> [N].

    num_tokens, num_rows: of all processes and micro-batches; N: tokens of this one.
    """
    sizes = mask.sum(1)  # [B]
    return (num_tokens / max(1, num_rows) / sizes).repeat_interleave(sizes)


# ---- sharded modules ----


def shard(module: nn.Module, blocks: Sequence[nn.Module], entry: str,
          dtype: torch.dtype | None = None) -> None:
    """Split a module's weights, gradients and Adam over torchrun's processes, if it runs.

    blocks: the parts that are gathered one after another; entry: the method that runs a forward
    pass, if it is not `forward`; dtype: that weights are gathered in (None: their own). Gradients
    are summed in fp32.
    """
    if not dist.is_initialized():
        return
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        part.set_force_sum_reduction_for_comms(True)  # gloo offers no other
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean
    register_fsdp_forward_method(module, entry)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Context manager: unshards the weights, e.g. to generate, which runs the module often."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def gather(tensor: Tensor) -> Tensor:
    """The unsharded tensor, detached; every process must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of an unsharded tensor if `like` is sharded, else all of it."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def update(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float, grad_clip: float
) -> float:
    """Sum the gradients over the processes, clip, step; returns the norm before clipping.

    If the norm is not finite on any process, all processes leave the step out: weights and Adam
    stay as they are.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized() and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
    norm = gather(nn.utils.clip_grad_norm_(parameters, grad_clip)).item()
    if torch.tensor(norm).isfinite():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
