"""The head against float64 formulas, and sampling against its definition.

Run: python -m pytest tests/test_kernels.py
"""

import functools
import shutil

import pytest
import torch

import dgpo
import kernels
from tests.support.runs import Spy

FP32 = 2e-5  # logits of width 16 and vocabularies of a few hundred entries
TOLERANCE = {
    torch.float32: FP32,
    torch.bfloat16: 2**-8,
}  # of the largest entry; bf16: half of its last place
FALSE_ALARM_SIGMA = 5.0  # a right sampler fails a count test with probability below 1e-6


def head(rows: int, width: int = 16, entries: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator), torch.randn(
        entries, width, generator=generator
    )


def naive_logprobs(hidden, weight, targets, temperature=1.0):
    log_p = (
        (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    ).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def values_and_gradients(function, hidden, weight, *rest, upstream=None):
    """What the function returns, and the gradients of hidden and weight, as float64."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    results = [result for result in function(*leaves, *rest) if result.requires_grad]
    upstream = upstream or [torch.ones_like(result) for result in results]
    torch.autograd.backward(
        results, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
    )
    return [x.detach().double() for x in (*results, *(leaf.grad for leaf in leaves))]


def assert_no_worse_than_naive(ours, naive, exact, dtype=torch.float32):
    """Our error against float64 is at most the naive path's plus a tolerance.

    The tolerance is relative to the largest entry.
    """
    for mine, theirs, truth in zip(ours, naive, exact, strict=True):
        scale = truth.abs().max()
        assert (mine - truth).abs().max() <= (theirs - truth).abs().max() + TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tile", [10**6, 97, 1])
def test_logprobs_entropy_and_their_gradients_are_as_near_to_float64_as_the_plain_formula(
    monkeypatch, dtype, temperature, tile
):
    hidden, weight = (x.to(dtype) for x in head(8))
    monkeypatch.setattr(
        kernels, "MAX_TILE_ELEMENTS", {"cpu": tile * len(hidden)}
    )  # 97: the last tile is ragged
    targets = torch.tensor([0, 96, 97, 98, 193, 194, 298, 299])  # at the edges of tiles
    upstream = [torch.linspace(-1, 2, 8), torch.linspace(0.5, -0.5, 8)]
    runs = [
        values_and_gradients(function, h, w, targets, upstream=upstream)
        for function, h, w in (
            (lambda *a: kernels.head_logprobs(*a, temperature=temperature), hidden, weight),
            (lambda *a: naive_logprobs(*a, temperature), hidden, weight),
            (lambda *a: naive_logprobs(*a, temperature), hidden.double(), weight.double()),
        )
    ]
    assert_no_worse_than_naive(*runs, dtype)


@pytest.mark.parametrize("entries", [151_936, 128_256])
def test_vocabularies_of_the_published_models_are_exact(entries):
    """Tiles do not divide them: columns beyond them, or a tile left out, would shift the sum."""
    hidden, weight = head(3, width=8, entries=entries)
    targets = torch.tensor([0, entries // 2, entries - 1])
    many = kernels.tiles(entries, 2**10, kernels.MAX_TILE_ELEMENTS, hidden.device)
    assert len(many) > 1 and many[-1].stop == entries
    runs = [
        values_and_gradients(function, h, w, targets)
        for function, h, w in (
            (kernels.head_logprobs, hidden, weight),
            (naive_logprobs, hidden, weight),
            (naive_logprobs, hidden.double(), weight.double()),
        )
    ]
    assert_no_worse_than_naive(*runs)


def test_tiles_of_a_gpu_are_whole_lines_but_for_the_last(monkeypatch):
    device, limits = torch.device("cuda"), kernels.MAX_TILE_ELEMENTS
    for entries, rows in ((151_665, 16_384), (151_665, 1), (151_936, 6500), (49, 7)):
        cut = kernels.tiles(entries, rows, limits, device)
        assert [i for tile in cut for i in (tile.start, tile.stop)][1:-1:2] == [
            tile.start for tile in cut[1:]] and (cut[0].start, cut[-1].stop) == (0, entries)
        assert all((tile.stop - tile.start) % 64 == 0 for tile in cut[:-1])
        assert all((tile.stop - tile.start) * rows <= limits["cuda"] for tile in cut)
        # What is left is small, unless it is all.
        assert len(cut) == 1 or cut[-1].stop - cut[-1].start <= 64 * len(cut)
    # With a rest, the head is the same.
    monkeypatch.setattr(kernels, "TILE_MULTIPLE", {"cpu": 16})
    monkeypatch.setattr(kernels, "MAX_TILE_ELEMENTS", {"cpu": 5 * 20})
    hidden, weight = head(5, entries=50)
    assert [tile.stop for tile in kernels.tiles(50, 5, kernels.MAX_TILE_ELEMENTS,
                                                hidden.device)] == [16, 32, 48, 50]
    runs = [values_and_gradients(f, hidden, weight, torch.tensor([0, 15, 16, 48, 49]))
            for f in (kernels.head_logprobs, naive_logprobs)]
    for ours, naive in zip(*runs, strict=True):
        torch.testing.assert_close(ours, naive, atol=FP32 * 100, rtol=FP32)


def test_logits_of_a_thousand_stay_finite(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_TILE_ELEMENTS", {"cpu": 2 * 2})
    weight = torch.tensor([[1000.0], [0.0], [-1000.0], [999.0], [-1000.0]])
    hidden, targets = torch.ones(2, 1), torch.tensor([3, 4])
    runs = [
        values_and_gradients(f, h, w, targets)
        for f, h, w in (
            (kernels.head_logprobs, hidden, weight),
            (naive_logprobs, hidden, weight),
            (naive_logprobs, hidden.double(), weight.double()),
        )
    ]
    assert all(x.isfinite().all() for x in runs[0])
    assert_no_worse_than_naive(*runs)


def test_an_empty_selection_and_a_frozen_head_are_fine():
    hidden, weight = head(4)
    logprobs, entropy = kernels.head_logprobs(
        hidden[:0], weight.requires_grad_(), torch.zeros(0, dtype=torch.long)
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,) and not weight.grad.any()
    none = hidden[:0].clone().requires_grad_()
    total, reports = kernels.head_divergence(
        dgpo.kd_loss, none, weight, none.detach(), weight.detach(), torch.zeros(0, dtype=torch.long)
    )
    total.backward()
    assert (
        total == 0
        and reports.shape == (0,)
        and none.grad.shape == (0, 16)
        and not weight.grad.any()
    )
    hidden.requires_grad_()
    kernels.head_logprobs(hidden, weight.detach(), torch.arange(4))[0].sum().backward()
    assert hidden.grad.abs().max() > 0


@pytest.mark.parametrize("kind", dgpo.DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergences_from_hidden_states_are_as_near_to_float64_as_the_plain_formula(
    monkeypatch, kind, dtype
):
    hidden, weight = (x.to(dtype) / 2 for x in head(7))
    teacher_hidden, teacher_weight = (x.to(dtype) / 4 for x in head(7, width=24))
    targets = torch.arange(7) * 40
    monkeypatch.setattr(kernels, "MAX_ROWS_ELEMENTS", {"cpu": 3 * len(weight)})  # 3, 3 and 1 rows

    def ours(h, w):
        return kernels.head_divergence(
            dgpo.kd_loss,
            h,
            w,
            teacher_hidden,
            teacher_weight,
            targets,
            kind=kind,
            mix=0.3,
            ce_weight=0.5,
        )

    def naive(h, w):
        teacher_logits = teacher_hidden.to(h.dtype) @ teacher_weight.to(h.dtype).T
        return [
            dgpo.kd_loss(h @ w.T, teacher_logits, targets, kind=kind, mix=0.3, ce_weight=0.5)[
                0
            ].sum()
        ]

    assert kernels.head_divergence(
        dgpo.kd_loss, hidden, weight, teacher_hidden, teacher_weight, targets, kind=kind
    )[1].shape == (7,)
    # dgpo reduces in fp32, even what a float64 product gives it. tests/test_dgpo.py compares that
    # with float64.
    runs = [
        values_and_gradients(f, h, w)
        for f, h, w in (
            (ours, hidden, weight),
            (naive, hidden, weight),
            (naive, hidden.double(), weight.double()),
        )
    ]
    assert_no_worse_than_naive(*runs, dtype)


def test_the_gradient_of_a_divergence_scales_with_what_comes_from_above():
    hidden, weight = head(5)
    teacher = head(5, width=4)
    grads = []
    for scale in (1.0, -0.25):
        leaf = hidden.clone().requires_grad_()
        loss, _ = kernels.head_divergence(dgpo.kd_loss, leaf, weight, *teacher, torch.arange(5))
        (scale * loss).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], -0.25 * grads[0])


@pytest.mark.slow
def test_compiled_tiles_equal_eager_ones_and_a_ragged_tile_is_not_compiled_again():
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    generator = torch.Generator().manual_seed(2)
    torch._dynamo.reset()
    functions = (kernels.merge, kernels.logits_gradient)
    compiled = [torch.compile(function.__wrapped__, dynamic=True) for function in functions]
    for step, width in enumerate((96, 40, 77)):
        logits, at = (
            torch.randn(6, width, generator=generator),
            torch.tensor([0, 5, 39, 200, -3, 1]),
        )
        sums = [torch.randn(6, generator=generator) for _ in range(4)]
        gradient = [torch.randn(6, generator=generator) for _ in range(5)]
        for i, rest in enumerate((sums, gradient)):
            with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                ours = compiled[i](logits, at, 0.7, *rest)
            eager = functions[i](logits, at, 0.7, *rest)
            torch.testing.assert_close(ours, eager, atol=FP32, rtol=FP32)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes of tiles, which are compiled on the CPU, too."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(kernels, "COMPILED", ("cpu",))
    for name in ("merge", "logits_gradient"):
        monkeypatch.setattr(kernels, name, kernels.fused(getattr(kernels, name).__wrapped__))
    monkeypatch.setattr(kernels, "MAX_TILE_ELEMENTS", {"cpu": 400})  # 2 to 40 tiles
    monkeypatch.setattr(kernels, "MAX_ROWS_ELEMENTS", {"cpu": 900})  # 3 rows
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def test_a_graph_serves_all_numbers_of_rows_and_temperatures_of_a_head(graphs):
    hidden, weight = head(40)
    for rows in (5, 0, 1, 2, 7, 40, 3):
        targets = torch.arange(rows) * 7
        runs = [values_and_gradients(f, hidden[:rows], weight, targets)
                for f in (kernels.head_logprobs, naive_logprobs)]
        for ours, naive in zip(*runs, strict=True):
            torch.testing.assert_close(ours, naive, atol=FP32 * 100, rtol=FP32)
    assert len(graphs) == 2, "one of merge and one of logits_gradient"


def test_a_graph_serves_all_numbers_of_rows_and_targets_of_a_divergence(graphs):
    hidden, weight = head(40)
    teacher_hidden, teacher_weight = head(40, width=8)
    for rows in (5, 0, 1, 2, 7, 40, 3):
        for mix in (0.0, 0.4, 0.41, 0.9, 1.0):
            options = {"kind": "taid", "mix": torch.tensor(mix, dtype=torch.float64)}
            total, _ = kernels.head_divergence(
                dgpo.kd_loss, hidden[:rows].clone().requires_grad_(), weight,
                teacher_hidden[:rows], teacher_weight, torch.arange(rows) * 7, **options)
            plain, _ = dgpo.kd_loss(
                hidden[:rows] @ weight.T, teacher_hidden[:rows] @ teacher_weight.T,
                torch.arange(rows) * 7, kind="taid", mix=mix)
            torch.testing.assert_close(total.detach(), plain.sum(), atol=FP32, rtol=FP32)
    assert len(graphs) == 1


def test_without_a_compiler_functions_run_as_they_stand_and_say_so(monkeypatch, caplog):
    def backend(graph, inputs):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(kernels, "COMPILED", ("cpu",))
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)
    torch._dynamo.reset()
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(kernels.fused(lambda x: x.sin() + 1)(x), x.sin() + 1)
    torch._dynamo.reset()
    assert "Failed to find C compiler" in caplog.text


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
    tokens, _ = kernels.sample(
        torch.ones(n, 1), probs.log()[:, None], uniforms, temperature=temperature
    )
    expected = probs.sqrt() / probs.sqrt().sum()
    counts = torch.bincount(tokens, minlength=4)
    sigma = (n * expected * (1 - expected)).sqrt()
    assert ((counts - n * expected).abs() < FALSE_ALARM_SIGMA * sigma).all()


def test_top_p_keeps_the_smallest_set_that_reaches_p_and_renormalises():
    weight = torch.tensor([[0.1], [0.6], [0.3]]).log()
    uniforms = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    tokens, logprobs = kernels.sample(
        torch.ones(50, 1), weight, uniforms, temperature=1.0, top_p=0.7
    )
    assert set(tokens.tolist()) == {1, 2}
    assert logprobs[tokens == 1][0].item() == pytest.approx(
        torch.tensor(0.6 / 0.9).log().item(), abs=FP32
    )


def test_top_p_below_every_probability_is_greedy():
    weight = torch.tensor([[0.1], [0.6], [0.3]]).log()
    tokens, logprobs = kernels.sample(
        torch.ones(2, 1), weight, torch.tensor([0.0, 0.99]), temperature=1.0, top_p=1e-9
    )
    assert tokens.tolist() == [1, 1] and logprobs.abs().max() < FP32


def test_tokens_that_are_not_allowed_are_never_sampled_even_at_the_ends():
    hidden, weight = head(2)
    allowed = torch.zeros(300, dtype=torch.bool)
    allowed[[5, 9]] = True
    for temperature in (0, 1.0):
        tokens, _ = kernels.sample(
            hidden,
            weight,
            torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64),
            temperature=temperature,
            allowed=allowed,
        )
        assert set(tokens.tolist()) <= {5, 9}


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 products on this machine",
)
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_weights_in_blocks_are_as_near_to_float64_as_plain_ones_and_leave_the_module_as_it_was(
    rows,
):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 200), torch.nn.SiLU(), torch.nn.Linear(200, 33, bias=False)
    )
    x, module = torch.randn(rows, 64).bfloat16(), module.bfloat16()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    with torch.no_grad():
        plain = module(x)
        with kernels.merged(module, torch.bfloat16):
            assert kernels.blocked(module[0].weight).is_mkldnn
            blocked = module(x)
            assert "forward" in vars(module[0])
        assert torch.equal(module(x), plain) and "forward" not in vars(module[0])
        assert all(
            torch.equal(weight, before[name]) for name, weight in module.state_dict().items()
        )
        exact = module.double()(x.double())
    assert_no_worse_than_naive([blocked.double()], [plain.double()], [exact], torch.bfloat16)


def test_weights_in_blocks_are_for_bf16_alone():
    layer = torch.nn.Linear(4, 3)
    with kernels.merged(layer, torch.float32):
        assert kernels.blocked(layer.weight) is layer.weight
        used = vars(layer)["forward"].keywords["weight"]
        assert used.data_ptr() == layer.weight.data_ptr(), "a weight was copied for nothing"


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layers_beside_each_other_are_one_product_where_they_are_merged(
    dtype, has_bias, monkeypatch
):
    torch.manual_seed(0)
    module = torch.nn.ModuleList(torch.nn.Linear(32, n, bias=has_bias) for n in (24, 8, 40))
    module[0].beside = module[1], module[2]
    x = torch.randn(3, 5, 32).to(dtype)
    expected = [x @ layer.weight.to(dtype).T + (layer.bias.to(dtype) if has_bias else 0)
                for layer in module]
    with kernels.merged(module, dtype):
        calls = Spy(monkeypatch, kernels, "linear")
        vars(module[0])["merged"] = functools.partial(
            kernels.linear, **vars(module[0])["merged"].keywords)
        got = kernels.linears(x, module[0])
        assert len(calls.calls) == 1 and not any("forward" in vars(layer) for layer in module)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert "merged" not in vars(module[0])
    if dtype == torch.float32:
        separate = kernels.linears(x, module[0])
        torch.testing.assert_close(list(got), separate, atol=FP32, rtol=0)
