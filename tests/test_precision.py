"""Computing in bfloat16: weights, Adam and reductions stay float32, and what is rounded is bounded.

Run: python -m pytest tests/test_precision.py
"""

import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode

import dgpo
import kernels
import model
from data import Question
from episode import Episode
from infra import cuda, guards
from infra.run import Stop
from model import Critic, load_decoder
from rollout import generate
from session import compute_dtype
from settings import TrainSettings
from tests.support.runs import Spy, policies, run

BF16 = 2**-8  # half of its last place, relative
MAX_SAMPLER_GAP = 0.02  # mean, nats a token: of two layers
FLAGS = ["--steps", "2", "--prompts-per-step", "8", "--minibatch-size", "4", "--eval-every", "2"]


def test_a_process_bounds_what_onednn_keeps_of_each_shape():
    """By default 1,024 products, which grew to 5 GB in a run of SmolLM2-135M on a CPU."""
    assert int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")) < 1024


def gradients(decoder: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of a loss on the hidden states and the head's log-probabilities, flat, in float64."""
    decoder.zero_grad()
    hidden = decoder.hidden(ids)
    logprobs, entropy = kernels.head_logprobs(hidden[0], decoder.head_weight, ids[0])
    (logprobs.mean() + 0.1 * entropy.mean()).backward()
    return torch.cat([p.grad.double().flatten() for p in decoder.parameters()])


def test_gradients_are_as_near_to_float64_as_those_of_a_network_that_is_all_bf16(mini):
    ids = torch.arange(7, 90)[None]
    exact = gradients(load_decoder(mini / "teacher", dtype=torch.float64), ids)
    plain = gradients(load_decoder(mini / "teacher", dtype=torch.bfloat16), ids)
    decoder = load_decoder(mini / "teacher")
    full = gradients(decoder, ids)
    decoder.compute_dtype = torch.bfloat16
    ours = gradients(decoder, ids)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in decoder.parameters())
    error, naive, small = ((x - exact).norm() / exact.norm() for x in (ours, plain, full))
    assert small < BF16 / 100 < error <= naive + BF16


def test_activations_logits_and_the_cache_have_the_compute_dtype(mini, monkeypatch):
    student, _ = policies(mini)
    student.decoder.compute_dtype = torch.bfloat16
    ids = torch.arange(5, 25)[None]
    assert student.decoder.hidden(ids).dtype == student.decoder(ids).dtype == torch.bfloat16
    critic = Critic.from_decoder(student.decoder)
    torch.nn.init.ones_(critic.value_head.weight)
    values = critic.values(ids)
    assert values.dtype == torch.float32 and critic.backbone.compute_dtype == torch.bfloat16
    drawn = Spy(monkeypatch, torch.nn.functional, "linear")
    settings = TrainSettings(max_turns=0, max_new_tokens=4, max_context_tokens=64, prompt="short")
    [episode] = generate(student, None, [Question("a", "who?", ("x",), "s")], settings, seed=0)
    assert episode.num_agent_tokens > 0 and not any(
        arguments[1].dtype == torch.float32 for arguments, _, _ in drawn.calls)
    assert all(p.dtype == torch.float32 for p in student.decoder.parameters())


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    is_cuda = True


def test_float32_queries_on_a_gpu_meet_keys_for_each_head(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    expected = model.attend(q, k, v, is_causal=True)
    calls = Spy(monkeypatch, model, "attention")
    got = model.attend(*(x.as_subclass(OnCuda) for x in (q, k, v)), is_causal=True)
    torch.testing.assert_close(got.as_subclass(torch.Tensor), expected, atol=1e-6, rtol=0)
    model.attend(*(x.bfloat16().as_subclass(OnCuda) for x in (q, k, v)), is_causal=True)
    assert [(arguments[1].shape[1], options["enable_gqa"]) for arguments, options, _ in
            calls.calls] == [(6, False), (2, True)]


# ---- packed documents on a GPU ----


def varlen_of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """A loop in the place of torch's: q [N, H, Dh], k, v [L, H, Dh], documents by their bounds."""
    assert is_causal and k.shape[1] == q.shape[1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    out = torch.full_like(q, torch.nan)
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
        later = torch.ones(b - a, d - c).triu(1 + (d - c) - (b - a)).bool()
        p = scores.masked_fill(later, -torch.inf).softmax(-1)
        out[a:b] = torch.einsum("hqk,khd->qhd", p, v[c:d])
    return out


def varlen_of_2_13(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1),
                   enable_gqa=False, seqused_k=None):
    assert window_size == (-1, 0) and (enable_gqa or q.shape[1] == k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return varlen_of_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=True)


@pytest.mark.parametrize("version", [varlen_of_2_11, varlen_of_2_13])
def test_packed_documents_and_rows_that_go_on_use_varlen_attention(version, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    documents, lengths = [3, 1, 4], [7, 1, 4]  # the first row goes on after 4 tokens
    q = torch.randn(1, 6, 8, 8, generator=generator).bfloat16()
    k, v = torch.randn(2, 1, 2, 12, 8, generator=generator).bfloat16()
    expected = model.attend_packed(q, k, v, documents, lengths)
    monkeypatch.setattr(cuda, "find_varlen", lambda: cuda.causal(version))
    loop = Spy(monkeypatch, model, "attention")
    got = model.attend_packed(*(x.as_subclass(OnCuda) for x in (q, k, v)), documents, lengths)
    error = (got.as_subclass(torch.Tensor) - expected).float().norm()
    assert error <= 2 * BF16 * expected.float().norm() and not loop.calls
    others = ([x.float() for x in (q, k, v)], [x.double() for x in (q, k, v)],
              [x[..., :4] for x in (q, k, v)])
    for number, inputs in enumerate(others, 1):
        model.attend_packed(*(x.as_subclass(OnCuda) for x in inputs), documents, lengths)
        assert len(loop.calls) == 3 * number, "flash attention has 16 bits and widths of eights"


def test_a_step_takes_attention_in_any_layout(mini, monkeypatch):
    student, _ = policies(mini)
    ids, slots = torch.arange(5, 8)[:, None], torch.zeros(3, dtype=torch.long)
    real = model.attention

    def by_tokens(*arguments):  # as a kernel of CUDA returns it
        return real(*arguments).transpose(1, 2).contiguous().transpose(1, 2)

    def step():
        cache = model.KVCache(student.decoder.config, 3, 4)
        return student.decoder.hidden(ids, cache=cache.step(slots, 1))

    expected = step()
    monkeypatch.setattr(model, "attention", by_tokens)
    assert torch.equal(step(), expected)


def test_the_shapes_of_varlen_attention_fit_on_a_pretended_gpu(monkeypatch):
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    cuda.find_varlen.cache_clear()
    cuda.offsets.cache_clear()
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, tokens, 64, device="cuda", dtype=torch.bfloat16)
                   for heads, tokens in ((14, 30), (2, 50), (2, 50)))
        mixed = model.attend_packed(q, k, v, [10, 20], [30, 20])
        assert mixed.shape == q.shape and (mixed.dtype, mixed.device) == (q.dtype, q.device)
        assert cuda.find_varlen() is not None
    cuda.find_varlen.cache_clear()
    cuda.offsets.cache_clear()


def test_bf16_is_what_a_gpu_computes_in_unless_told():
    settings, cuda, cpu = TrainSettings(), torch.device("cuda"), torch.device("cpu")
    assert (compute_dtype(settings, cuda), compute_dtype(settings, cpu)) == (
        torch.bfloat16, torch.float32)
    settings.compute_dtype = "float32"
    assert compute_dtype(settings, cuda) == torch.float32


# ---- heads ----


@pytest.mark.parametrize("loss", [dgpo.kd_loss, dgpo.exact_kl])
def test_heads_take_states_in_bf16_and_weights_in_float32(loss):
    generator = torch.Generator().manual_seed(0)
    hidden, guide = torch.randn(2, 8, 16, generator=generator).bfloat16()
    weight, guide_weight = torch.randn(2, 300, 16, generator=generator)
    targets = torch.arange(8)

    def results(hidden, weight, guide, guide_weight):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total, _ = kernels.head_divergence(loss, hidden, weight, guide, guide_weight, targets)
        logprobs, entropy = kernels.head_logprobs(hidden, weight, targets)
        (total + logprobs.sum() + entropy.sum()).backward()
        assert (hidden.grad.dtype, weight.grad.dtype) == (hidden.dtype, weight.dtype)
        return [x.detach().double() for x in (
            total[None], logprobs, entropy, hidden.grad, weight.grad)]

    mixed = results(hidden, weight, guide, guide_weight)
    exact = results(*(x.double() for x in (hidden, weight, guide, guide_weight)))
    plain = results(*(x.bfloat16() for x in (hidden, weight, guide, guide_weight)))
    for ours, naive, truth in zip(mixed, plain, exact, strict=True):
        scale = truth.abs().max()
        assert (ours - truth).abs().max() <= (naive - truth).abs().max() + BF16 * scale


def test_the_gradient_of_a_float32_weight_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_ROWS_ELEMENTS", {"cpu": 3})  # a tile a row
    hidden = torch.tensor([[1.0], [0.7], [-0.3]]).bfloat16().requires_grad_()
    weight = torch.tensor([[0.5], [-0.25], [0.125]], requires_grad=True)
    total, _ = kernels.head_divergence(
        dgpo.kd_loss, hidden, weight, hidden.detach(), weight.detach().flip(0), torch.arange(3))
    total.backward()
    assert (weight.grad.bfloat16().float() != weight.grad).any()


def test_a_sampler_in_bf16_casts_each_weight_once_and_leaves_the_module_as_it_was(mini):
    student, _ = policies(mini)
    layers = [m for m in student.decoder.modules() if isinstance(m, torch.nn.Linear)]
    with kernels.merged(student.decoder, torch.bfloat16):
        used = [call.keywords for layer in layers for name, call in vars(layer).items()
                if name in ("forward", "merged")]
        assert len(used) == 4 * 2, "q, k, v are one product, and so are gate and up"
        assert {options["weight"].dtype for options in used} == {torch.bfloat16}
        assert {options["bias"].dtype for options in used if options["bias"] is not None} == {
            torch.bfloat16}
    assert not any({"forward", "merged"} & vars(layer).keys() for layer in layers)
    assert {p.dtype for p in student.decoder.parameters()} == {torch.float32}


def test_heads_compute_the_same_where_a_user_has_turned_autocast_on():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (8, 300))
    targets = torch.arange(8)

    def results(*, casts: bool) -> list[torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            logprobs, entropy = kernels.head_logprobs(leaf, weight, targets)
            total, _ = kernels.head_divergence(
                dgpo.kd_loss, leaf, weight, hidden.flip(0), weight, targets)
            (total + (logprobs + entropy).sum()).backward()
        return [logprobs, entropy, total, leaf.grad]

    for plain, cast in zip(results(casts=False), results(casts=True), strict=True):
        assert torch.equal(plain, cast)


# ---- what the sampler rounds otherwise ----


def test_importance_weights_by_hand():
    old = torch.tensor([[-1.0, -2.0, -3.0, 0.0]])
    sampled = torch.tensor([[-1.0, -2.5, -1.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    got = dgpo.importance_weights(old, sampled, mask, cap=1.5)
    torch.testing.assert_close(got, torch.tensor([[1.0, 1.5, math.exp(-2.0), 1.0]]))
    assert dgpo.importance_weights(old, old, mask, cap=1.0).tolist() == [[1.0] * 4]


@pytest.mark.parametrize(("flags", "cap"), [
    (["--compute-dtype", "bfloat16"], 2.0), ([], None), (["--importance-cap", "0.5"], 0.5),
    (["--compute-dtype", "bfloat16", "--importance-cap", "0"], None)])
def test_advantages_are_weighted_in_bf16_or_where_it_is_asked_for(
    mini, tmp_path, monkeypatch, flags, cap
):
    monkeypatch.setattr(Episode, "score", property(lambda e: float(e.num_agent_tokens % 2)))
    weights, loss = Spy(monkeypatch, dgpo, "importance_weights"), Spy(
        monkeypatch, dgpo, "policy_loss")
    white = Spy(monkeypatch, dgpo, "whiten")
    rows = run(mini, tmp_path / "run", "--phase", "dgpo", *FLAGS[2:], "--steps", "1", *flags)
    assert rows[0]["rollout/sampler_gap"] < MAX_SAMPLER_GAP
    learnt = torch.cat([arguments[2] for arguments, _, _ in loss.calls]).sort().values
    [((_, mask), _, advantages)] = white.calls
    if cap is None:
        assert not weights.calls
        assert torch.equal(learnt, advantages[mask].sort().values)
        return
    [((old, sampled, _), options, got)] = weights.calls
    assert options == {"cap": cap} and torch.equal(learnt, (advantages * got)[mask].sort().values)
    expected = (old - sampled)[mask].exp().clamp(max=cap)
    torch.testing.assert_close(got[mask], expected)
    assert (old - sampled)[mask].abs().max() > 0


def test_the_first_log_ratio_is_bounded_by_what_the_dtype_rounds():
    def check(*gaps: float, dtype: torch.dtype) -> float:
        return guards.check_first_ratio(torch.tensor(gaps), 1, dtype)

    assert check(0.3, 0.0, -0.01, 0.0, 0.0, 0.0, 0.0, dtype=torch.bfloat16) == pytest.approx(0.3)
    with pytest.raises(Stop, match="mean log ratio 0.2.* expected at most 0.05"):
        check(0.3, 0.1, dtype=torch.bfloat16)
    with pytest.raises(Stop, match="^log ratio 0.3.* expected at most 0.0001"):
        check(0.3, 0.0, dtype=torch.float32)
    assert guards.check_first_ratio(torch.zeros(0), 1, torch.float32) == 0.0


# ---- runs ----


@pytest.mark.parametrize("phase", ["kd", "dgpo", "grpo", "gkd"])
def test_a_run_in_bf16_learns_saves_float32_and_resumes_to_the_bit(mini, tmp_path, phase):
    flags = ["--phase", phase, "--compute-dtype", "bfloat16", "--eval-every", "2"]
    flags += ["--epochs", "0.67"] if phase == "kd" else ["--steps", "2"]
    flags += ["--kl-in", "exact"] if phase == "dgpo" else []
    rows = run(mini, tmp_path / "run", *flags, "--save-every", "1")
    plain = run(mini, tmp_path / "plain", *flags, "--compute-dtype", "float32")
    state = tmp_path / "run" / "state"
    newest = max(state.iterdir())
    for path in (tmp_path / "run" / "model.safetensors", *newest.glob("*.safetensors")):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}, path
    name = "loss/kd" if phase in ("kd", "gkd") else "loss/entropy"
    assert rows[0][name] != plain[0][name]
    assert rows[0][name] == pytest.approx(plain[0][name], rel=0.05)
    shutil.rmtree(newest)
    assert run(mini, tmp_path / "run", *flags, "--save-every", "1", "--resume") == rows
