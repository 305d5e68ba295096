"""The head: log-probabilities, entropy and sampling straight from hidden states and the head's weight.

Rows are selected before they come here (response tokens alone). Logits exist for one chunk of rows at a time:
with more than one chunk the backward pass computes each chunk's logits again instead of keeping them.
GEMMs run in the weight's dtype, reductions in fp32. Not in paper; results equal the plain formulas to rounding.

Shapes: N selected rows, B episodes, D width, V vocabulary entries (the tokenizer's: the caller cuts a padded head).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_CHUNK_ELEMENTS = 2**28  # logits that exist at once: 1 GB in fp32, 1,766 rows of Qwen2.5's vocabulary


def by_chunks(
    function: Callable[..., tuple[Tensor, ...]], num_entries: int, *row_tensors: Tensor
) -> tuple[Tensor, ...]:
    """Apply a function of rows [n, ...] -> tensors [n] chunk by chunk, and join what it returns to [N].

    num_entries: V, from which the number of rows in a chunk follows.
    """
    num_rows = max(1, MAX_CHUNK_ELEMENTS // num_entries)
    chunks = list(zip(*(tensor.split(num_rows) for tensor in row_tensors), strict=True))
    if len(chunks) == 1:
        return function(*chunks[0])
    results = [checkpoint(function, *rows, use_reentrant=False) for rows in chunks]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def head_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of p = softmax(hidden weight^T / temperature), in nats, both with gradient.

    hidden [N, D], weight [V, D], targets [N] -> (logprobs [N], entropy [N]), fp32.
    """

    def chunk(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        log_p = ((h @ weight.T).float() / temperature).log_softmax(-1)  # [n, V], fp32 from here
        return log_p.gather(-1, y[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    return by_chunks(chunk, len(weight), hidden, targets)


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

    hidden [B, D], weight [V, D], uniforms [B] in [0, 1); allowed [V] bool, None = every token. temperature 0 is
    the exact argmax (lowest id among equals). -> (tokens [B], logprobs [B] fp32 of the distribution sampled
    from; at temperature 0 of the distribution at temperature 1).
    """
    logits = (hidden @ weight.T).float()  # [B, V]
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    probs = (logits / temperature).softmax(-1)  # [B, V]
    if top_p < 1.0:
        sorted_probs, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p, so the most likely one always stays.
        kept = sorted_probs.where(sorted_probs.cumsum(-1) - sorted_probs < top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)
    cdf = probs.double().cumsum(-1)  # [B, V]; fp64: fp32 loses the tail of a 150k vocabulary
    total = cdf[:, -1:]
    tokens = torch.searchsorted(cdf, uniforms[:, None].double() * total, right=True).squeeze(-1)  # [B]
    # u * total may round up to total; the last token with any probability is then the right one.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    tokens = torch.minimum(tokens, last)
    logprobs = (probs.gather(-1, tokens[:, None]) / total).log().squeeze(-1).float()
    return tokens, logprobs
