"""The head: log-probabilities, entropy, divergences and sampling from hidden states.

The caller selects rows first (response tokens alone). Logits [N, V] never exist, only a tile does.
head_logprobs tiles the vocabulary. It merges sums as in online softmax (Milakov & Gimelshein, 2018)
and computes a tile's logits again in the backward pass. head_divergence tiles the rows and takes a
tile's gradient at once. GEMMs run in the dtype of the hidden states, to which the weight is cast,
and reductions in fp32; the weight's gradient has the weight's dtype. Not in paper.

Legend: N selected rows, B episodes, D width, V vocabulary (a padded head is cut by the caller),
C columns or n rows of a tile.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, autograd, nn

# Logits at once. On a CPU a tile should fit into the cache; a GPU needs large GEMMs. A tile of rows
# reads both heads fully, so it must not be thin. On a CPU it is above 32 MiB in fp32: glibc gives
# those blocks back at once, and smaller ones took 8 tiles of memory where 5 are in use.
MAX_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}
MAX_ROWS_ELEMENTS = {"cpu": 11_500_000, "cuda": 2**28}
TILE_MULTIPLE = {"cuda": 64}  # else cuBLAS takes slow kernels; the last tile is what is left
SAMPLE_BLOCK = 512  # entries; sampling finds the block first, then the entry in it
COMPILED = ("cuda",)  # devices on which `fused` functions are compiled


def fused(function: Callable) -> Callable:
    """Compile a function for tensors on a GPU, on first use; on a CPU it runs as it stands.

    One row, which would need a graph of its own, runs as it stands, too.
    """
    @functools.cache
    def compiled() -> Callable:
        torch._dynamo.config.suppress_errors = True  # without a C compiler it warns, and is eager
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(first: Tensor, *rest, **options):
        is_compiled = first.device.type in COMPILED and len(first) > 1
        return (compiled() if is_compiled else function)(first, *rest, **options)

    return call


def tiles(size: int, other_size: int, limits: dict[str, int], device: torch.device) -> list[slice]:
    """Cut range(size) into nearly equal slices, each of at most limit / other_size entries."""
    count = max(1, math.ceil(size * other_size / limits.get(device.type, limits["cpu"])))
    multiple = TILE_MULTIPLE.get(device.type, 1)
    width = max(1, math.ceil(size / count) // multiple) * multiple
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *,
                  temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of p = softmax(hidden weight^T / temperature), in nats.

    hidden [N, D], weight [V, D], targets [N] -> (logprobs [N], entropy [N]), fp32, with gradients.
    """
    with torch.autocast(hidden.device.type, enabled=False):  # dtypes are as said here
        return _Logprobs.apply(hidden, weight, targets, temperature)


class _Logprobs(autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature) -> tuple[Tensor, Tensor]:
        # Four tensors of their own: a compiled function counts one that it gets twice as a variant.
        peak = torch.full((len(hidden),), torch.finfo(torch.float32).min, device=hidden.device)
        sums = (peak, *(torch.zeros_like(peak) for _ in range(3)))  # -inf would make 0 * inf
        for tile in tiles(len(weight), len(hidden), MAX_TILE_ELEMENTS, hidden.device):
            logits = hidden @ weight[tile].to(hidden.dtype).T  # [N, C]
            sums = merge(logits, targets - tile.start, temperature, *sums)
        peak, total, moment, target_z = sums
        log_total = total.log()
        entropy = log_total - moment / total  # H = log sum e^(z - max) - E[z - max]
        ctx.save_for_backward(hidden, weight, targets, peak, log_total, entropy)
        ctx.temperature = temperature
        return target_z - peak - log_total, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_logprobs.device.type, enabled=False):
            return _Logprobs.gradients(ctx, grad_logprobs, grad_entropy)

    @staticmethod
    def gradients(ctx, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *stats = (*ctx.saved_tensors, grad_logprobs, grad_entropy)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)  # summed in fp32
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for tile in tiles(len(weight), len(hidden), MAX_TILE_ELEMENTS, hidden.device):
            part, columns = weight[tile].to(hidden.dtype), targets - tile.start  # [C, D], [N]
            grad = logits_gradient(hidden @ part.T, columns, ctx.temperature, *stats)
            grad_hidden += grad @ part
            if grad_weight is not None:
                grad_weight[tile] = grad.T @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


@fused
def merge(logits: Tensor, columns: Tensor, temperature: float, peak: Tensor, total: Tensor,
          moment: Tensor, target_z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a tile [N, C] to max z, sum e^(z - max), sum (z - max) e^(z - max), the z of targets."""
    # columns [N]: where the target stands, outside 0..C-1 if it is in another tile.
    z = logits.float() / temperature
    tile_z = z.gather(-1, columns.clamp(0, z.shape[1] - 1)[:, None]).squeeze(-1)
    target_z = torch.where((columns >= 0) & (columns < z.shape[1]), tile_z, target_z)
    highest = torch.maximum(peak, z.amax(-1))
    scale = (peak - highest).exp()
    moment = scale * (moment + total * (peak - highest))
    z = z - highest[:, None]
    p = z.exp()
    return highest, total * scale + p.sum(-1), moment + torch.linalg.vecdot(p, z), target_z


@fused
def logits_gradient(logits: Tensor, columns: Tensor, temperature: float, peak: Tensor,
                    log_total: Tensor, entropy: Tensor, grad_logprobs: Tensor,
                    grad_entropy: Tensor) -> Tensor:
    """Gradient of a tile's logits [N, C], in their dtype, from those of logprobs, entropy [N]."""
    # d log p_y / dz = 1[y] - p and dH / dz = -p (log p + H).
    z = logits.float() / temperature
    log_p = z - peak[:, None] - log_total[:, None]  # in this order: logits may be large
    by_entropy = -grad_entropy[:, None] / temperature
    by_both = by_entropy * entropy[:, None] - grad_logprobs[:, None] / temperature
    grad = log_p.exp() * (log_p * by_entropy + by_both)
    in_tile = (columns >= 0) & (columns < grad.shape[1])
    of_target = torch.where(in_tile, grad_logprobs / temperature, 0.0)
    grad = grad.scatter_add(-1, columns.clamp(0, grad.shape[1] - 1)[:, None], of_target[:, None])
    return grad.to(logits.dtype)


def head_divergence(loss: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, weight: Tensor,
                    teacher_hidden: Tensor, teacher_weight: Tensor, targets: Tensor,
                    **options: float | str | Tensor) -> tuple[Tensor, Tensor]:
    """Sum over rows of a loss between the next-token distributions of student and teacher.

    hidden [N, D], weight [V, D], teacher_hidden [N, D'], teacher_weight [V, D'], targets [N] ->
    (sum of the loss [], reports [N] without gradient). loss(student_logits [n, V], teacher_logits,
    targets [n], **options) -> (loss [n], report [n]), as dgpo.kd_loss. The gradient is taken at
    once: the caller may scale the sum, but no single row.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _Divergence.apply(
            loss, options, hidden, weight, teacher_hidden, teacher_weight, targets)


class _Divergence(autograd.Function):
    @staticmethod
    def forward(ctx, loss, options, hidden, weight, teacher_hidden, teacher_weight, targets):
        wants_hidden, wants_weight = ctx.needs_input_grad[2:4]
        dtype, weight = weight.dtype, weight.to(hidden.dtype)
        teacher_weight = teacher_weight.to(teacher_hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total, reports = torch.zeros((), device=hidden.device), []
        run = fused(loss)
        for rows in tiles(len(hidden), len(weight), MAX_ROWS_ELEMENTS, hidden.device):
            logits = (hidden[rows] @ weight.T).requires_grad_(wants_hidden or wants_weight)
            teacher_logits = teacher_hidden[rows] @ teacher_weight.T  # [n, V], as logits
            with torch.set_grad_enabled(logits.requires_grad):
                losses, report = run(logits, teacher_logits, targets[rows], **options)
                grad = autograd.grad(losses.sum(), logits)[0] if logits.requires_grad else None
            total = total + losses.detach().sum()
            reports.append(report.detach())
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if wants_weight and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[rows])
            elif wants_weight:  # a product cannot be added in fp32, so it is made part by part
                for part in tiles(*weight.shape, MAX_ROWS_ELEMENTS, hidden.device):
                    grad_weight[part] += grad[:, part].T @ hidden[rows]
            logits = teacher_logits = grad = None  # none is held beside the next tile's
        ctx.grads = [grad_hidden, grad_weight.to(dtype) if wants_weight else None]
        reports = torch.cat(reports) if reports else torch.zeros(0, device=hidden.device)
        ctx.mark_non_differentiable(reports)
        return total, reports

    @staticmethod
    def backward(ctx, grad_total: Tensor, _) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second backward pass must fail
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_total)
        return None, None, *grads, None, None, None


def sample(hidden: Tensor, weight: Tensor, uniforms: Tensor, *, temperature: float,
           top_p: float = 1.0, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw one token a row: the first whose cumulative probability exceeds uniform * total.

    hidden [B, D], weight [V, D] (or `blocked`), uniforms [B] in [0, 1), allowed [V] bool ->
    (tokens [B], logprobs [B], of the distribution sampled). Temperature 0: argmax, logprobs at 1.
    """
    logits = linear(hidden, weight).float()  # [B, V]
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)
    probs = (logits / temperature).softmax(-1)  # [B, V]
    if top_p < 1.0:
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if the mass before it is below top_p, so the most likely one always stays.
        kept = sorted_probs.where(sorted_probs.cumsum(-1) - sorted_probs < top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    # The cumulative sum in fp64 (fp32 loses the tail of a 150k vocabulary) is over blocks alone.
    blocks = F.pad(probs, (0, -probs.shape[-1] % SAMPLE_BLOCK)).unflatten(-1, (-1, SAMPLE_BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64)  # [B, V / block]
    total = mass.sum(-1)  # [B]
    block, before = first_above(mass, uniforms * total)
    inside = blocks[torch.arange(len(block), device=block.device), block]  # [B, block]
    entry, _ = first_above(inside.double(), uniforms * total - before)
    logprobs = (inside.gather(-1, entry[:, None]).squeeze(-1) / total).log().float()
    return block * SAMPLE_BLOCK + entry, logprobs


def first_above(mass: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """First column whose cumulative mass [B, K] exceeds the goal [B], and the mass before it."""
    cumulative, goal = mass.cumsum(-1), goal.clamp(min=0)[:, None]
    # Rounding may leave no such column, or one without mass: the last one with mass is right then.
    last = mass.shape[-1] - 1 - (mass.flip(-1) > 0).int().argmax(-1)
    column = torch.minimum(torch.searchsorted(cumulative, goal, right=True).squeeze(-1), last)
    before = (cumulative - mass).gather(-1, column[:, None]).squeeze(-1)
    return column, before


def blocked(weight: Tensor) -> Tensor:
    """A copy for `linear` in the order that oneDNN's bf16 GEMMs read; else the weight itself."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return weight
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    # 1.4 times as fast for 1 to 16 tokens (docs/log.md), at the weight's memory once more.
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear that also takes a `blocked` weight (without gradients)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linears(x: Tensor, first: nn.Linear) -> Sequence[Tensor]:
    """What a layer and those `beside` it, which read the same, make of x; one product if merged."""
    layers = (first, *first.beside)
    if "merged" in vars(first):
        return first.merged(x).split([layer.out_features for layer in layers], -1)
    return [layer(x) for layer in layers]


@contextmanager
def merged(module: nn.Module, dtype: torch.dtype,
           copies: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Context manager: linear layers use `blocked` weights of this dtype, cast once.

    Layers that stand beside each other become one. The weights must not change meanwhile.
    copies: a dict of earlier calls, whose tensors are filled where they lie; a new one is filled.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    beside = {other for layer in layers for other in getattr(layer, "beside", ())}
    try:
        for number, layer in enumerate(layers):
            if layer in beside:
                continue
            group = (layer, *getattr(layer, "beside", ()))
            weight = stack([part.weight for part in group], dtype, copies, f"{number}.weight")
            bias = layer.bias
            if bias is not None:
                bias = stack([part.bias for part in group], dtype, copies, f"{number}.bias")
            name = "merged" if len(group) > 1 else "forward"
            vars(layer)[name] = functools.partial(linear, weight=blocked(weight), bias=bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
            vars(layer).pop("merged", None)


def stack(parts: Sequence[Tensor], dtype: torch.dtype, copies: dict[str, Tensor] | None,
          name: str) -> Tensor:
    """One below the other, in a dtype; a copy where needed, or copies[name] with these values."""
    parts = [part.detach().to(dtype) for part in parts]
    if copies is None:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    new = torch.cat(parts)
    kept = copies.setdefault(name, new)
    return kept if kept is new else kept.copy_(new)
