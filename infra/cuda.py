"""What a GPU does otherwise: attention over packed documents, and steps as CUDA graphs."""

import functools
import inspect
from collections.abc import Callable, Hashable
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# Of each decoder: the model.Steps of its last rollout, with graphs, cache and copies of weights.
KEPT: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

# ---- attention over packed documents ----


@functools.cache
def find_varlen() -> Callable[..., Tensor] | None:
    """torch's attention over packed documents; None where this torch or this GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return causal(varlen_attn) if torch.cuda.get_device_capability() >= (8, 0) else None


def causal(varlen_attn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """varlen_attn, causal and with grouped queries, by the options that its version has."""
    names = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        return functools.partial(varlen_attn, enable_gqa=True, **options)

    def grouped(q: Tensor, k: Tensor, v: Tensor, *sizes) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *sizes, **options)

    return grouped


@functools.lru_cache(8)  # all layers of a pass ask for the same
def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents of these lengths begin, and the end of the last one, int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


# ---- graphs ----


class Graphs:
    """CUDA graphs of one module's functions. They share memory, because one runs at a time.

    A graph reads inputs and weights where they lay when it was captured: they must stay there.
    """

    def __init__(self) -> None:
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool: Any = None
        self.places: list[int] = []

    def check(self, module: nn.Module) -> None:
        """Forget the graphs if weights of the module have moved, as those that FSDP gathers do."""
        places = [parameter.data_ptr() for parameter in module.parameters()]
        if places != self.places:
            self.graphs, self.places, self.pool = {}, places, None  # no graph holds the pool now

    def call(self, key: Hashable, run: Callable[[], Tensor], *, may_capture: bool) -> Tensor:
        """run(), by the graph of this key; what it returns holds until the next call."""
        if key not in self.graphs:
            if not may_capture:
                return run()
            self.graphs[key] = capture(run, self.pool)
            self.pool = self.graphs[key][0].pool()
        graph, result = self.graphs[key]
        graph.replay()
        return result


def capture(run: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of run(), and what it fills each time. pool: the memory of other graphs, or None."""
    run()  # what a first call sets up cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        return graph, run()
