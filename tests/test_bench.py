"""experiments/bench.py: what it times, what it keeps, and that a wrong result is never timed.

It needs no peer but transformers. Run: python -m pytest tests/test_bench.py
"""

import importlib.metadata
import json
from types import SimpleNamespace

import pytest
import torch

from experiments import bench, engines
from experiments.bench import Bench, Case, Heads, Implementation
from experiments.engines import Work
from kernels import head_logprobs
from model import load_decoder

TENSOR_BYTES = 2**26
CASE = Case("case", work=6, unit="rows", floor="nothing", floor_s=1.0)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "WEIGHTS", tmp_path / "weights")
    out = str(tmp_path / "out.json")
    return bench.parse(["head", "--quick", "--threads", "1", "--out", out])


def saved(options) -> dict:
    with open(options.out, encoding="utf-8") as file:
        return json.load(file)


def statuses(options, name: str = "head") -> dict[str, str]:
    return {row["implementation"]: row["status"] for row in saved(options)[name]["rows"]}


def always(seconds: float) -> Implementation:
    """One that is right and says how long it took."""
    return Implementation(lambda: {"seconds": seconds}, lambda: 0.0, 0.0)


# ---- timing ----


def test_median_and_interquartile_range():
    assert bench.median_and_iqr([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0)
    assert bench.median_and_iqr([7.0]) == (7.0, 0.0)


def test_memory_sees_a_tensor_that_is_gone_again():
    torch.ones(8).sum()
    numbers = bench.time_call(lambda: torch.ones(TENSOR_BYTES // 4).sum(), "cpu")
    if "peak_bytes" not in numbers:
        pytest.skip("peak memory of a process: Linux with glibc alone")
    # The kernel counts pages in batches.
    assert 0.99 * TENSOR_BYTES < numbers["peak_bytes"] < 1.5 * TENSOR_BYTES


def test_seconds_that_a_call_returns_count_in_place_of_its_time():
    numbers = bench.time_call(lambda: {"seconds": 42.0}, "cpu")
    assert numbers["seconds"] == 42.0 and numbers["wall_s"] < 1


def test_what_is_wrong_or_fails_is_a_row_is_not_timed_and_stops_nothing(options):
    calls = dict.fromkeys(("ours", "slow", "wrong", "nan", "late", "absent"), 0)
    errors = {"wrong": 0.5, "nan": float("nan")}

    def make(name: str) -> Implementation:
        if name == "absent":
            raise ModuleNotFoundError("No module named 'absent'")

        def run() -> dict:
            calls[name] += 1
            if name == "late" and calls[name] == 3:
                raise RuntimeError("out of memory")
            return {"seconds": 3.0 if name == "slow" else 2.0}

        return Implementation(run, lambda: errors.get(name, 0.0), 0.1)

    bench.compare(Bench("head", options), CASE, list(calls), make)
    # One call is the first one, which is checked; two are timed.
    assert calls == {"ours": 3, "slow": 3, "wrong": 1, "nan": 1, "late": 3, "absent": 0}
    assert statuses(options) == {
        "ours": "measured",
        "slow": "measured",
        "wrong": "wrong: error 5.0e-01, tolerance 1e-01",
        "nan": "wrong: error nan, tolerance 1e-01",
        "late": "not measured: RuntimeError: out of memory",
        "absent": "not measured: ModuleNotFoundError: No module named 'absent'",
    }
    ours = saved(options)["head"]["rows"][0]
    assert (ours["rate"], ours["of_floor"]) == (3.0, 2.0)
    assert (ours["best_peer"], ours["of_best_peer"]) == ("slow", 2 / 3)


def test_an_interrupted_run_keeps_the_rounds_it_finished(options):
    count = iter(range(10))

    def run() -> dict:
        if next(count) == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        bench.compare(Bench("head", options), CASE, ["ours"],
                      lambda _: Implementation(run, lambda: 0.0, 0.0))
    assert saved(options)["head"]["rows"][0]["seconds"] == 1.0


# ---- rows ----


def test_rows_are_replaced_and_other_benches_stay(options):
    Bench("decode", options).save([{"case": "a", "implementation": "ours", "status": "old"}])
    one = Bench("head", options)
    for case, status in (("a", "first"), ("a", "second"), ("b", "third")):
        one.save([{"case": case, "implementation": "ours", "status": status}])
    assert [row["status"] for row in saved(options)["head"]["rows"]] == ["second", "third"]
    assert statuses(options, "decode") == {"ours": "old"}
    torch_version = saved(options)["head"]["versions"]["torch"]
    assert torch_version == importlib.metadata.version("torch")


def test_the_report_is_a_table_under_what_was_measured_where(options, capsys):
    implementations = {"ours": always(0.25)}
    case = CASE._replace(name="KL(a || b)", work=2)
    one = Bench("divergence", options)
    bench.compare(one, case, ["ours", "gone"], implementations.__getitem__)
    capsys.readouterr()
    bench.main(["report", options.out])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## divergence" and "commit" in lines[2] and "GFLOP/s" in lines[2]
    [row] = [line for line in lines if "| ours |" in line]
    assert row.startswith(r"| KL(a \|\| b) | ours | 250 ms | 0 ms | 8 rows/s | ")
    assert "| 0.25 x |" in row
    assert any("| gone | not measured: KeyError" in line for line in lines)
    assert "Floor: nothing." in lines


def test_growth_is_drawn(options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = {"implementation": "ours", "status": "measured"}
    Bench("growth", options).save([
        {**row, "case": f"{axis} {x}", "axis": axis, "x": x, "seconds": x / 10, "peak_bytes": x}
        for axis in ("rows", "batch")
        for x in (1, 2, 4)
    ])
    bench.main(["report", options.out, "--plot", str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_a_bench_that_breaks_leaves_the_others_to_run(options, capsys, monkeypatch):
    def broken(one: Bench) -> None:
        raise RuntimeError("no world here")

    def fine(one: Bench) -> None:
        one.save([{"case": "a", "implementation": "ours", "status": "fine"}])

    monkeypatch.setitem(bench.BENCHES, "encoder", broken)
    monkeypatch.setitem(bench.BENCHES, "head", fine)
    bench.main(["encoder", "head", "--quick", "--threads", "1", "--out", options.out])
    assert statuses(options, "encoder") == {"all": "not measured: RuntimeError('no world here')"}
    assert statuses(options) == {"ours": "fine"}


# ---- heads ----


def test_a_head_without_the_gradient_of_the_entropy_is_wrong_and_a_missing_peer_is_a_row(options):
    def forgetful(h, w, y):
        logprobs, entropy = head_logprobs(h, w, y)
        return logprobs, entropy.detach() + 0 * logprobs

    def missing(h, w, y):
        raise ModuleNotFoundError("No module named 'trl'")

    functions = {"ours": head_logprobs, "torch": bench.torch_head, "forgetful": forgetful,
                 "TRL": missing}
    bench.compare_heads(Bench("head", options), "case", functions, Heads(8, [64]))
    status = statuses(options)
    assert status["ours"] == status["torch"] == "measured"
    assert status["forgetful"].startswith("wrong")
    assert status["TRL"] == "not measured: ModuleNotFoundError: No module named 'trl'"


def test_divergence_of_ours_is_that_of_the_formula(options):
    one = Bench("divergence", options)
    bench.bench_divergence(one)
    ours = {case: row["status"] for (case, name), row in one.rows.items() if name == "ours"}
    assert len(ours) == 3 and set(ours.values()) == {"measured"}


# ---- engines ----


@pytest.mark.parametrize("shape", ["tiny-qwen2", "tiny-llama"])
def test_our_engine_and_the_loop_around_transformers_write_the_same_tokens(options, shape):
    pytest.importorskip("transformers")
    weights = engines.load_weights(shape)
    work = Work(engines.random_ids(5, 12), engines.ragged(5, 3, 3, 1, 6), [7, 8, 9, 10], rows=2)
    ours, again, theirs = (engines.load_engine(name, weights, options, torch.float32)(work)
                           for name in ("ours", "ours, re-reading", "transformers"))
    assert ours == again == theirs
    assert [len(tokens) for tokens in ours] == [sum(counts) for counts in work.lengths]
    assert engines.greedy_error("ours", weights, options, several_turns=True) == 0


def test_our_engine_plays_turns_that_end_with_their_first_token(options):
    """A turn of one token ends when its prompt, or the observation before it, has been read."""
    weights = engines.load_weights("tiny-llama")
    engine = engines.load_engine("ours", weights, options, torch.float32)
    lengths = [[1, 1, 1], [1, 3, 1], [2, 1, 1]]
    alone = engine(Work(engines.random_ids(3, 9), lengths, [5], rows=1))
    assert alone == engine(Work(engines.random_ids(3, 9), lengths, [5], rows=3))
    assert [len(tokens) for tokens in alone] == [3, 5, 4]


def test_an_engine_that_does_not_attend_is_found_out(options, monkeypatch):
    """Decoders at initialisation repeat their last token: there every engine looked right."""

    def repeating(work: Work) -> list[list[int]]:
        return [[ids[-1]] * sum(n) for ids, n in zip(work.prompts, work.lengths, strict=True)]

    monkeypatch.setattr(engines, "load_engine", lambda *_: repeating)
    for weights in map(engines.load_weights, options.decoders):
        assert engines.greedy_error("x", weights, options, several_turns=True) > 0.1


def test_an_engine_that_writes_too_little_is_found_out(options, monkeypatch):
    monkeypatch.setattr(engines, "load_engine", lambda *_: lambda work: [[1]] * len(work.prompts))
    weights = engines.load_weights("tiny-llama")
    assert engines.greedy_error("x", weights, options, several_turns=False) == float("inf")


def test_rollout_and_step_run_from_the_command_line_and_agree_with_transformers(options, capsys):
    pytest.importorskip("transformers")
    flags = ["--quick", "--repeats", "1", "--threads", "1", "--out", options.out]
    bench.main(["rollout", "step", *flags, "--shapes", "tiny-llama"])
    engines = ("ours", "ours, re-reading", "transformers")
    assert statuses(options, "rollout") == dict.fromkeys(engines, "measured")
    assert statuses(options, "step") == dict.fromkeys(("ours", "transformers, padded"), "measured")


def test_our_step_is_raced_in_float32_and_in_bf16_with_float32_weights(options, monkeypatch):
    seen, real = set(), bench.our_step

    def step(actor, critic, batch, old):
        dtypes = actor.compute_dtype, critic.backbone.compute_dtype, actor.head_weight.dtype
        seen.add(dtypes)
        return real(actor, critic, batch, old)

    monkeypatch.setattr(bench, "our_step", step)
    monkeypatch.setattr(bench, "import_module", None)  # the peer is a row "not measured"
    bench.main(["step", "--quick", "--repeats", "1", "--threads", "1", "--out", options.out,
                "--shapes", "tiny-llama"])
    assert seen == {(dtype, dtype, torch.float32) for dtype in (torch.float32, torch.bfloat16)}
    rows = [row for row in saved(options)["step"]["rows"] if row["implementation"] == "ours"]
    assert [row["case"].split(", ")[1] for row in rows] == ["bfloat16", "float32"]
    assert all(row["status"] == "measured" for row in rows)


def test_searches_are_checked_against_float64_before_they_are_timed(options, monkeypatch):
    flags = ["search", "--quick", "--repeats", "1", "--threads", "1", "--out", options.out]
    bench.main(flags)
    found = statuses(options, "search")
    assert (found["ours"], found["torch"]) == ("measured", "measured")
    real = bench.TorchIndex.search
    monkeypatch.setattr(bench.TorchIndex, "search", lambda index, queries, k: real(
        index, queries.roll(1, 0) * 2, k))
    bench.main(flags)
    assert statuses(options, "search")["ours"].startswith("wrong")


def test_a_checkpoint_takes_the_place_of_random_weights(options, tmp_path):
    folder = engines.random_decoder("tiny-qwen2")
    chosen = bench.parse(["decode", "--quick", "--checkpoint", str(folder)])
    [weights] = map(engines.load_weights, chosen.decoders)
    assert (weights.name, weights.folder) == ("tiny-qwen2", folder)
    for flags in (
        ["--checkpoint", str(folder), "--shapes", "tiny-llama"],
        ["--gguf", __file__],
        ["--checkpoint", str(folder), "--gguf", str(tmp_path / "nothing.gguf")],
    ):
        with pytest.raises(SystemExit):
            bench.parse(["decode", *flags])


def test_llama_cpp_without_a_gguf_file_is_a_row_that_says_so(options, capsys):
    pytest.importorskip("transformers")
    flags = ["--quick", "--repeats", "1", "--threads", "1", "--out", options.out]
    bench.main(["decode", *flags, "--shapes", "tiny-llama", "--batch", "2", "--new-tokens", "8"])
    status = statuses(options, "decode")["llama.cpp"]
    assert status.startswith("not measured: ValueError: --gguf: got none")


class FakeLlamaCpp:
    """The part of llama.cpp's interface that the bench calls, around a decoder of ours."""

    def __init__(self, decoder) -> None:
        self.decoder, self.rows = decoder, {}

    def llama_context_default_params(self):
        return SimpleNamespace()

    def llama_init_from_model(self, model, params):
        self.rows = {row: [] for row in range(params.n_seq_max)}
        return "context"

    def llama_batch_init(self, size, embeddings, sequences):
        empty = [0] * size
        sequences = [[0] for _ in range(size)]
        return SimpleNamespace(token=[*empty], pos=[*empty], n_seq_id=[*empty], seq_id=sequences,
                               logits=[*empty], n_tokens=0)

    def llama_decode(self, context, batch):
        self.logits = {}
        for place in range(batch.n_tokens):
            ids = self.rows[batch.seq_id[place][0]]
            assert batch.pos[place] == len(ids) and batch.n_seq_id[place] == 1
            ids.append(batch.token[place])
            if batch.logits[place]:
                self.logits[place] = self.decoder(torch.tensor([ids]))[0, -1].detach().numpy()
        return 0

    def llama_get_logits_ith(self, context, place):
        return self.logits[place]

    def llama_batch_free(self, batch):
        pass

    def llama_free(self, context):
        pass


def test_rows_reach_llama_cpp_in_order_and_each_token_once(options, monkeypatch):
    weights = engines.load_weights("tiny-llama")
    decoder = load_decoder(weights.folder)
    loaded = SimpleNamespace(lib=FakeLlamaCpp(decoder), model=None, entries=512)
    monkeypatch.setattr(engines, "load_llama_cpp", lambda gguf: loaded)
    monkeypatch.setattr(engines.np.ctypeslib, "as_array", lambda logits, shape: logits)
    for several_turns in (False, True):
        error = engines.greedy_error("llama.cpp", weights, options, several_turns=several_turns)
        assert error == 0
