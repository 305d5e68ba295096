"""The head: log-probabilities, entropy, divergences and sampling from hidden states and the head's weight.

Rows are selected before they come here (response tokens alone), and [N, V] never exists: only a tile of it does.
    head_logprobs     a tile is a slice of the vocabulary; sums over it are merged as in online softmax (Milakov &
                      Gimelshein, 2018), and the backward pass computes a tile's logits again: 4 GEMMs instead of 3
    head_divergence   a tile is a slice of the rows; its gradient is taken at once, which needs no logits again:
                      3 GEMMs with the student's head, 1 with the teacher's
GEMMs run in the weight's dtype, reductions in fp32. On a GPU torch.compile fuses what lies between the GEMMs; without
it the same functions run as they stand. Not in paper; results equal the plain formulas to rounding.
    in_blocks         for generation in bf16 on a CPU: weights in the order in which its GEMMs read them

Shapes: N selected rows, B episodes, D width, V vocabulary entries (the tokenizer's: the caller cuts a padded head),
C entries or n rows of a tile.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits that exist at once. A tile that stays in the CPU's cache is faster than one that does not; a GPU needs large
# GEMMs. A tile of rows reads both heads whole, so it must not be thin: 110 rows of Qwen2.5's vocabulary on a CPU.
MAX_TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}
MAX_ROWS_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
SAMPLE_BLOCK = 512  # entries; sampling finds the block first, then the entry in it


def fused(function: Callable) -> Callable:
    """The function: compiled for tensors on a GPU, as it stands elsewhere. Dynamic: a ragged last tile is not new."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))  # loads the compiler: not before due

    @functools.wraps(function)
    def call(first: Tensor, *rest):
        return (compiled() if first.is_cuda else function)(first, *rest)

    call.compiled = compiled
    return call


def tiles(size: int, other_size: int, max_elements: dict[str, int], device: torch.device) -> list[slice]:
    """Slices of range(size), as equal as can be, each with at most max_elements / other_size entries (at least one)."""
    count = max(1, math.ceil(size * other_size / max_elements.get(device.type, max_elements["cpu"])))
    width = max(1, math.ceil(size / count))
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


# ---- log-probability and entropy ----


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of p = softmax(hidden weight^T / temperature), in nats, both with gradient.

    hidden [N, D], weight [V, D], targets [N] -> (logprobs [N], entropy [N]), fp32.
    """
    return _HeadLogprobs.apply(hidden, weight, targets, temperature)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(len(hidden), device=hidden.device)
        sums = (zeros + torch.finfo(torch.float32).min, zeros, zeros, zeros)  # [N] each; -inf would make 0 * inf
        for tile in tiles(len(weight), len(hidden), MAX_TILE_ELEMENTS, hidden.device):
            sums = merge(hidden @ weight[tile].T, targets - tile.start, temperature, *sums)
        peak, total, moment, chosen = sums
        log_total = total.log()
        entropy = log_total - moment / total  # H = log sum e^(z - max) - E[z - max]
        ctx.save_for_backward(hidden, weight, targets, peak, log_total, entropy)
        ctx.temperature = temperature
        return chosen - peak - log_total, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *row_numbers = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for tile in tiles(len(weight), len(hidden), MAX_TILE_ELEMENTS, hidden.device):
            logits = hidden @ weight[tile].T  # [N, C], again
            grad = logits_gradient(
                logits, targets - tile.start, ctx.temperature, *row_numbers, grad_logprobs, grad_entropy
            )
            if grad_hidden is not None:
                grad_hidden += grad @ weight[tile]
            if grad_weight is not None:
                torch.mm(grad.T, hidden, out=grad_weight[tile])
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None


def scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


@fused
def merge(
    logits: Tensor, at: Tensor, temperature: float, peak: Tensor, total: Tensor, moment: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take a tile [N, C] into the running max z, sum e^(z - max), sum (z - max) e^(z - max), target's z; all [N].

    at [N]: the target's column, outside 0..C-1 when it is in another tile.
    """
    z = scaled(logits, temperature)
    here = z.gather(-1, at.clamp(0, z.shape[1] - 1)[:, None]).squeeze(-1)
    chosen = torch.where((at >= 0) & (at < z.shape[1]), here, chosen)
    highest = torch.maximum(peak, z.amax(-1))
    scale = (peak - highest).exp()
    moment = scale * (moment + total * (peak - highest))
    z = z - highest[:, None]
    p = z.exp()
    return highest, total * scale + p.sum(-1), moment + torch.linalg.vecdot(p, z), chosen


@fused
def logits_gradient(
    logits: Tensor, at: Tensor, temperature: float, peak: Tensor, log_total: Tensor, entropy: Tensor,
    grad_logprobs: Tensor, grad_entropy: Tensor,
) -> Tensor:
    """Gradient of a tile's logits [N, C], in their dtype, from those of log p(target) and entropy [N].

    d log p_y / dz = 1[y] - p and dH / dz = -p (log p + H).
    """
    log_p = scaled(logits, temperature) - peak[:, None] - log_total[:, None]  # in this order: logits may be large
    by_entropy = -grad_entropy[:, None] / temperature
    by_both = by_entropy * entropy[:, None] - grad_logprobs[:, None] / temperature
    grad = log_p.exp() * (log_p * by_entropy + by_both)
    of_target = torch.where((at >= 0) & (at < grad.shape[1]), grad_logprobs / temperature, 0.0)
    grad = grad.scatter_add(-1, at.clamp(0, grad.shape[1] - 1)[:, None], of_target[:, None])
    return grad.to(logits.dtype)


# ---- against a teacher ----


def head_divergence(
    loss: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    **options: float | str,
) -> tuple[Tensor, Tensor]:
    """Sum over the rows of a loss between student's and teacher's next-token distributions, with gradient.

    loss(student_logits [n, V], teacher_logits [n, V], targets [n], **options) -> (loss [n], report [n]), as
    dgpo.kd_loss. hidden [N, D], weight [V, D], teacher_hidden [N, D'],
    teacher_weight [V, D'], targets [N] -> (sum of the loss [], reports [N], without gradient). A sum, because the
    gradient is ready before it is asked for: the caller may scale it, and no row apart from the others.
    """
    return _HeadDivergence.apply(loss, options, hidden, weight, teacher_hidden, teacher_weight, targets)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, options, hidden, weight, teacher_hidden, teacher_weight, targets) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[2:4]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None  # summed in fp32
        total, reports = torch.zeros((), device=hidden.device), []
        run = torch.compile(loss, dynamic=True) if hidden.is_cuda else loss
        for rows in tiles(len(hidden), len(weight), MAX_ROWS_ELEMENTS, hidden.device):
            logits = (hidden[rows] @ weight.T).requires_grad_(wants_hidden or wants_weight)  # [n, V]
            with torch.set_grad_enabled(logits.requires_grad):
                losses, report = run(logits, teacher_hidden[rows] @ teacher_weight.T, targets[rows], **options)
                grad = torch.autograd.grad(losses.sum(), logits)[0] if logits.requires_grad else None
            total, reports = total + losses.detach().sum(), [*reports, report.detach()]
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if wants_weight and weight.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[rows])
            elif wants_weight:
                grad_weight += grad.T @ hidden[rows]
        ctx.grads = [grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)]
        reports = torch.cat(reports) if reports else torch.zeros(0, device=hidden.device)  # no rows
        ctx.mark_non_differentiable(reports)
        return total, reports

    @staticmethod
    def backward(ctx, grad_total: Tensor, _) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled where they are: a second backward pass finds none
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_total)
        return None, None, *grads, None, None, None


# ---- sampling ----


def sample(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row by inverse CDF: the first token whose cumulative probability exceeds uniform * total.

    hidden [B, D], weight [V, D] (or `blocked`), uniforms [B] in [0, 1); allowed [V] bool, None = every token.
    temperature 0 is the exact argmax (lowest id among equals). -> (tokens [B], logprobs [B] fp32 of the distribution
    sampled from; at temperature 0 of the distribution at temperature 1).
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
        # A token stays while the mass before it is below top_p, so the most likely one always stays.
        kept = sorted_probs.where(sorted_probs.cumsum(-1) - sorted_probs < top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    # Two steps, so that the cumulative sum in fp64 (fp32 loses the tail of a 150k vocabulary) is over blocks alone.
    blocks = F.pad(probs, (0, -probs.shape[-1] % SAMPLE_BLOCK)).unflatten(-1, (-1, SAMPLE_BLOCK))
    mass = blocks.sum(-1, dtype=torch.float64)  # [B, V / block]
    total = mass.sum(-1)
    block, before = first_above(mass, uniforms * total)
    inside = blocks[torch.arange(len(block), device=block.device), block]  # [B, block]
    entry, _ = first_above(inside.double(), uniforms * total - before)
    logprobs = (inside.gather(-1, entry[:, None]).squeeze(-1) / total).log().float()
    return block * SAMPLE_BLOCK + entry, logprobs


def first_above(mass: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """(first column whose cumulative mass exceeds the goal, mass before it): [B, K] fp64, [B] -> [B], [B].

    Rounding may leave no such column, or one without mass: the last column with mass is then the right one.
    """
    cumulative, goal = mass.cumsum(-1), goal.clamp(min=0)[:, None]
    last = mass.shape[-1] - 1 - (mass.flip(-1) > 0).int().argmax(-1)
    column = torch.minimum(torch.searchsorted(cumulative, goal, right=True).squeeze(-1), last)
    before = (cumulative - mass).gather(-1, column[:, None]).squeeze(-1)
    return column, before


# ---- weights in blocks ----


def blocked(weight: Tensor) -> Tensor:
    """A copy for `linear`, in the order in which oneDNN's GEMMs read it; the weight itself if there is no such order.

    Read at the memory's rate, 1.4 x as fast as rows by 1 to 16 tokens (docs/log.md); takes the weight's memory again.
    """
    mkldnn = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, also of a `blocked` weight (without gradients then)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@contextmanager
def in_blocks(module: nn.Module) -> Iterator[None]:
    """Within, the module's linear layers multiply by `blocked` copies; its weights must not change meanwhile."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    try:
        for layer in layers:
            if (weight := blocked(layer.weight)) is not layer.weight:
                layer.forward = functools.partial(linear, weight=weight, bias=layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
