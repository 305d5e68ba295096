"""Processes: the ranks of torchrun, sums over them, and training state that is replicated or sharded (FSDP2).

    torchrun --nproc-per-node 8 train.py ...       one process: no torchrun needed, and nothing here does anything

Every rank plays and scores its own share of a step's episodes. Gradients are summed, not averaged: the loss is one mean
over the tokens of all ranks already. Replicated modules are summed in `update`; sharded ones (`shard`) by FSDP2 in each
backward pass, which needs as many passes on every rank (`in_step`), and are gathered while they generate (`whole`).

No object is sent between processes: those travel as pickles.
"""

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Critic, Decoder, pick_device


def start_processes(device: str, timeout_minutes: float) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device) under torchrun, or (0, 1, device) without it."""
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, torch.device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def end_processes() -> None:
    """Before the interpreter goes. Sharded modules hold on to the group in cycles: its threads, ended later, abort now
    and then a program that has done its work."""
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def sum_over_processes(*values: Tensor) -> list[float]:
    """Each value summed over the processes, as floats; fp64."""
    total = torch.stack([value.detach().double().cpu() for value in values])
    if dist.is_initialized():
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()


def barrier() -> None:
    sum_over_processes(torch.zeros(()))  # dist.barrier does not keep to the timeout on every backend


def in_step(groups: Iterable[list[int]]) -> list[list[int]]:
    """The groups, and empty ones after them until every process has as many: a pass through a sharded module is one
    of all processes, and so is a sum of gradients."""
    groups = list(groups)
    if not dist.is_initialized():
        return groups
    counts = torch.zeros(dist.get_world_size())
    counts[dist.get_rank()] = len(groups)
    return groups + [[]] * int(max(sum_over_processes(*counts)) - len(groups))


# ---- sharded modules ----


def shard(module: Decoder | Critic) -> None:
    """Split weights, and with them gradients and optimizer state, over the processes; nothing with one process."""
    if not dist.is_initialized():
        return
    decoder = module.backbone if isinstance(module, Critic) else module
    device = next(module.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in (*decoder.model.layers, module):
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot do more
        part.set_gradient_divide_factor(1.0)  # a sum, no mean
    register_fsdp_forward_method(module, "values" if isinstance(module, Critic) else "hidden")


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within, every process holds all weights of a sharded module, and may run it as often as it likes."""
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


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process calls it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if `like` is sharded."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def update(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float, grad_clip: float) -> float:
    """Sum the gradients over the processes, clip, step; returns the norm before clipping.

    If that is not finite, on any process, the step is left out on all of them: weights and optimizer stay as they are.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if dist.is_initialized() and not isinstance(parameter, DTensor):
            dist.all_reduce(parameter.grad)
    norm = full(nn.utils.clip_grad_norm_(parameters, grad_clip)).item()
    if torch.tensor(norm).isfinite():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
