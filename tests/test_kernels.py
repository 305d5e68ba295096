"""The head against float64 formulas, and sampling against its definition.

Run: python -m pytest tests/test_kernels.py
"""

import pytest
import torch

import kernels

FP32 = 2e-5  # logits of width 16 and vocabularies of a few hundred entries
FALSE_ALARM_SIGMA = 5.0  # a right sampler fails a count test with probability below 1e-6


def head(rows: int, width: int = 16, entries: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(entries, width, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1000, 3, 1])
def test_logprobs_entropy_and_their_gradients_equal_float64_whatever_the_chunks(monkeypatch, temperature, chunk_rows):
    hidden, weight = head(8)
    monkeypatch.setattr(kernels, "MAX_CHUNK_ELEMENTS", chunk_rows * len(weight))
    targets = torch.arange(8) * 7
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logprobs, entropy = kernels.head_logprobs(*leaves, targets, temperature=temperature)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    log_p = (exact[0] @ exact[1].T / temperature).log_softmax(-1)
    exact_logprobs, exact_entropy = log_p[range(8), targets], -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(logprobs.double(), exact_logprobs, atol=FP32, rtol=FP32)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=FP32, rtol=FP32)
    (logprobs.sum() + 0.5 * entropy.sum()).backward()
    (exact_logprobs.sum() + 0.5 * exact_entropy.sum()).backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, atol=FP32, rtol=FP32)


def test_greedy_is_the_exact_argmax_and_reports_the_logprob_at_temperature_one():
    hidden, weight = head(6)
    tokens, logprobs = kernels.sample(hidden, weight, torch.zeros(6), temperature=0)
    logits = hidden @ weight.T
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=FP32, rtol=0)


def test_sampling_inverts_the_cumulative_distribution():
    weight = torch.tensor([[0.2], [0.5], [0.3]]).log()
    uniforms = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.999999999], dtype=torch.float64)
    tokens, logprobs = kernels.sample(torch.ones(6, 1), weight, uniforms, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(logprobs, weight[tokens, 0], atol=FP32, rtol=0)


def test_sampled_counts_follow_the_distribution_at_a_temperature():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    n, temperature = 20_000, 2.0
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens, _ = kernels.sample(torch.ones(n, 1), probs.log()[:, None], uniforms, temperature=temperature)
    expected = probs.sqrt() / probs.sqrt().sum()
    counts = torch.bincount(tokens, minlength=4)
    sigma = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() < FALSE_ALARM_SIGMA * sigma).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p_and_renormalises():
    weight = torch.tensor([[0.1], [0.6], [0.3]]).log()
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    tokens, logprobs = kernels.sample(torch.ones(50, 1), weight, uniforms, temperature=1.0, top_p=0.7)
    assert set(tokens.tolist()) == {1, 2}
    assert logprobs[tokens == 1][0].item() == pytest.approx(torch.tensor(0.6 / 0.9).log().item(), abs=FP32)


def test_top_p_below_every_probability_is_greedy():
    weight = torch.tensor([[0.1], [0.6], [0.3]]).log()
    tokens, logprobs = kernels.sample(torch.ones(2, 1), weight, torch.tensor([0.0, 0.99]), temperature=1.0, top_p=1e-9)
    assert tokens.tolist() == [1, 1] and logprobs.abs().max() < FP32


def test_tokens_that_are_not_allowed_are_never_sampled_even_at_the_ends():
    hidden, weight = head(2)
    allowed = torch.zeros(300, dtype=torch.bool)
    allowed[[5, 9]] = True
    for temperature in (0, 1.0):
        tokens, _ = kernels.sample(hidden, weight, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
                                   temperature=temperature, allowed=allowed)
        assert set(tokens.tolist()) <= {5, 9}
