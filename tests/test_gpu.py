"""On a CUDA device: what a CPU's tests can only play. Skipped without one.

Run: python -m pytest tests/test_gpu.py
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dgpo
import model
from data import load_questions
from kernels import head_divergence, head_logprobs
from model import load_decoder
from retriever import Retriever, TorchIndex
from rollout import Policy, RolloutSettings, generate
from tests.support.mini import read_rows
from tests.support.runs import assert_same_metrics, finish, run, torchrun
from tokenizer import Tokenizer

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
MAX_LOGPROB_DIFFERENCE = 1e-3  # fp32, nats: a graph and a GPU sum in another order
MAX_BF16_GAP = 0.02  # mean, nats a token, between steps of one token and a pass over all
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the norm, against float64
NOTHING = ["--eval-every", "0", "--val-size", "0"]


def relative(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm()).item()


# ---- attention ----


def continued(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Documents of 5, 1 and 70 tokens, of which the second and third go on after 9 and 30."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 76), (2, 115), (2, 115)
    return tuple(torch.randn(1, heads, length, 64, generator=generator).to(device, dtype)
                 .requires_grad_() for heads, length in shapes)


def attention_and_gradients(dtype: torch.dtype, device: str, *, goes_on: bool) -> list[Tensor]:
    q, k, v = continued(dtype, device)
    lengths = [5, 10, 100] if goes_on else [5, 1, 70]
    if not goes_on:
        k, v = (x.detach()[:, :, :76].requires_grad_() for x in (k, v))
    mixed = model.attend_packed(q, k, v, [5, 1, 70], lengths)
    mixed.float().square().sum().backward()
    return [mixed.detach().cpu(), *(x.grad.cpu() for x in (q, k, v))]


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_is_that_of_the_cpu(dtype, goes_on):
    expected = attention_and_gradients(torch.float64, "cpu", goes_on=goes_on)
    got = attention_and_gradients(dtype, "cuda", goes_on=goes_on)
    assert max(map(relative, got, expected)) < MAX_ERROR[dtype]


def test_grouped_queries_in_float32_have_a_fast_kernel():
    q, k, v = continued(torch.float32, "cuda")
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        model.attend(q, k[:, :, :76], v[:, :, :76], is_causal=True)


# ---- head ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_tiles_of_the_head_are_right_and_few(dtype):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows in (300, 301, 17):
        generator = torch.Generator().manual_seed(rows)
        hidden, weight = (torch.randn(shape, generator=generator).mul(scale).to(dtype)
                          for shape, scale in (((rows, 64), 1.0), ((5000, 64), 0.3)))
        targets = torch.randint(5000, (rows,), generator=generator)
        results = []
        for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
            h, w = (x.to(device, kind).requires_grad_() for x in (hidden, weight))
            logprobs, entropy = head_logprobs(h, w, targets.to(device), temperature=0.7)
            (logprobs.sum() + 0.3 * entropy.square().sum()).backward()
            results.append([logprobs.detach().cpu(), entropy.detach().cpu(),
                            h.grad.cpu(), w.grad.cpu()])
        assert max(map(relative, results[1], results[0])) < MAX_ERROR[dtype]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # forward and backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [dgpo.kd_loss, dgpo.exact_kl])
def test_compiled_divergences_are_right(loss, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).mul(scale).to(dtype)
              for shape, scale in (((200, 64), 1.0), ((5000, 64), 0.2),
                                   ((200, 96), 1.0), ((5000, 96), 0.2))]
    targets = torch.randint(5000, (200,), generator=generator)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        h, w, th, tw = (x.to(device, kind) for x in inputs)
        h.requires_grad_(), w.requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total, _ = head_divergence(loss, h, w, th, tw, targets.to(device))
        total.backward()
        results.append([total.detach().cpu(), h.grad.cpu(), w.grad.cpu()])
    assert max(map(relative, results[1], results[0])) < MAX_ERROR[dtype]


# ---- sampling ----


def play(policy: Policy, retriever: Retriever, temperature: float = 1.0) -> list:
    questions = load_questions(ROOT / "world/questions/nq.jsonl")[:12]
    settings = RolloutSettings(max_turns=3, max_new_tokens=64, max_context_tokens=600,
                               prompt="short", temperature=temperature, rollout_rows=8)
    return generate(policy, retriever, questions, settings, seed=0)


def open_world(device: str, dtype: torch.dtype = torch.float32) -> tuple[Policy, Retriever]:
    folder = ROOT / "world/teacher"
    policy = Policy(load_decoder(folder, device=device), Tokenizer.load(folder))
    policy.decoder.compute_dtype = dtype
    return policy, Retriever.load(ROOT / "world/corpus.jsonl", ROOT / "world/encoder",
                                  device=device)


def differences(some: list, others: list) -> list[float]:
    pairs = zip(some, others, strict=True)
    return [abs(x - y) for a, b in pairs
            for s, t in zip(a.segments, b.segments, strict=True)
            for x, y in zip(s.logprobs or [], t.logprobs or [], strict=True)]


def test_sampled_episodes_are_those_of_the_cpu_and_of_steps_without_graphs(monkeypatch):
    expected = play(*open_world("cpu"))
    policy, retriever = open_world("cuda")
    for _ in range(2):  # the second time by the graphs of the first
        got = play(policy, retriever)
        assert [e.ids for e in got] == [e.ids for e in expected]
        assert max(differences(got, expected)) < MAX_LOGPROB_DIFFERENCE
    monkeypatch.setattr(model, "GRAPHED", ())
    plain = play(*open_world("cuda"))
    assert [e.ids for e in plain] == [e.ids for e in expected]


def test_graphs_see_weights_that_have_changed():
    policy, retriever = open_world("cuda")
    before = play(policy, retriever)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
            parameter.mul_(1.1)
    after = play(policy, retriever)
    assert [e.ids for e in before] != [e.ids for e in after]
    fresh, _ = open_world("cuda")
    fresh.decoder.load_state_dict(policy.decoder.state_dict())
    assert [e.ids for e in play(fresh, retriever)] == [e.ids for e in after]


def test_bfloat16_samples_what_a_pass_over_all_says():
    policy, retriever = open_world("cuda", torch.bfloat16)
    episodes = play(policy, retriever)
    gaps = []
    for episode in episodes:
        sampled = [x for s in episode.segments for x in s.logprobs or []]
        ids = torch.tensor([episode.ids], device="cuda")
        with torch.no_grad():
            hidden = policy.decoder.hidden(ids)[0, :-1]
            logprobs, _ = head_logprobs(hidden, policy.head, ids[0, 1:])
        of_agent = torch.tensor(episode.response_mask[1:], device="cuda")
        passed = logprobs[of_agent].tolist()
        gaps += [abs(x - y) for x, y in zip(sampled, passed, strict=True)]
    assert 0 < sum(gaps) / len(gaps) < MAX_BF16_GAP


# ---- search ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_search_on_the_gpu_finds_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(5000, 96, generator=generator).to(dtype)
    vectors[77] = vectors[4000]  # a tie
    queries = torch.cat([torch.randn(40, 96, generator=generator), vectors[77:78].float()])
    expected = TorchIndex(vectors).search(queries, 5)
    got = TorchIndex(vectors).to(torch.device("cuda")).search(queries.cuda(), 5)
    assert (got[1] == expected[1]).all()
    assert abs(got[0] - expected[0]).max() < 1e-3


# ---- training ----


@pytest.mark.parametrize("flags", [
    ["kd"], ["dgpo", "--steps", "3"], ["dgpo", "--steps", "3", "--kl-in", "exact"],
])
def test_a_run_on_the_gpu_has_the_metrics_of_the_cpu(mini, tmp_path, flags):
    command = [*NOTHING, "--compute-dtype", "float32", "--phase", *flags]
    expected = run(mini, tmp_path / "cpu", *command)
    got = run(mini, tmp_path / "gpu", *command, "--device", "cuda")
    assert_same_metrics(expected, got)


@pytest.mark.parametrize("flags", [
    ["kd"], ["dgpo", "--steps", "2"], ["dgpo", "--steps", "2", "--advantage", "group"],
    ["grpo", "--steps", "2"], ["gkd", "--steps", "2"],
])
def test_phases_run_in_bfloat16(mini, tmp_path, flags):
    rows = run(mini, tmp_path / "run", *NOTHING, "--device", "cuda", "--phase", *flags)
    numbers = [value for value in rows[-1].values() if isinstance(value, float)]
    assert len(rows) >= 2 and all(abs(number) < 1e6 for number in numbers)


def test_a_group_of_one_process_shards_over_nccl_and_goes_on(mini, tmp_path):
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--phase", "dgpo", "--device",
               "cuda", *NOTHING, "--shard", "all", "--run-dir", tmp_path / "run", "--steps"]
    finish(torchrun(1, *command, "2"))
    finish(torchrun(1, *command, "3", "--resume"))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
