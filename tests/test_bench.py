"""bench.py: what it measures, what it keeps, and that a wrong result is never timed. Needs no peer but transformers.

Run: python -m pytest tests/test_bench.py
"""

import importlib.metadata
import json

import pytest
import torch

import bench
from bench import Bench, Implementation
from kernels import head_logprobs

TENSOR_BYTES = 2**26
FLOOR = ("nothing", 1.0)


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "WEIGHTS", tmp_path / "weights")
    return bench.parse(["head", "--quick", "--threads", "1", "--out", str(tmp_path / "out.json")])


def saved(options) -> dict:
    with open(options.out, encoding="utf-8") as file:
        return json.load(file)


def statuses(options, name: str = "head") -> dict[str, str]:
    return {row["implementation"]: row["status"] for row in saved(options)[name]["rows"]}


def test_median_and_interquartile_range():
    assert bench.median_and_iqr([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0)
    assert bench.median_and_iqr([7.0]) == (7.0, 0.0)


def test_memory_sees_a_tensor_that_is_gone_again():
    torch.ones(8).sum()
    numbers = bench.measure(lambda: torch.ones(TENSOR_BYTES // 4).sum(), "cpu")
    if "peak_bytes" not in numbers:
        pytest.skip("peak memory of a process: Linux with glibc alone")
    assert 0.99 * TENSOR_BYTES < numbers["peak_bytes"] < 1.5 * TENSOR_BYTES  # the kernel counts pages in batches


def test_seconds_that_a_call_returns_count_in_place_of_its_time():
    numbers = bench.measure(lambda: {"seconds": 42.0}, "cpu")
    assert numbers["seconds"] == 42.0 and numbers["wall_s"] < 1


def test_what_is_wrong_or_fails_is_a_row_is_not_timed_and_stops_nothing(options):
    calls = dict.fromkeys(("ours", "slow", "wrong", "nan", "late", "absent"), 0)

    def make(name: str) -> Implementation:
        if name == "absent":
            raise ModuleNotFoundError("No module named 'absent'")

        def run() -> dict:
            calls[name] += 1
            if name == "late" and calls[name] == 3:
                raise RuntimeError("out of memory")
            return {"seconds": 3.0 if name == "slow" else 2.0}

        return Implementation(run, lambda: {"wrong": 0.5, "nan": float("nan")}.get(name, 0.0), 0.1)

    bench.compare(Bench("head", options), "case", calls, make, work=6, unit="rows", floor=FLOOR)
    assert calls == {"ours": 3, "slow": 3, "wrong": 1, "nan": 1, "late": 3, "absent": 0}  # 1 call is the first one
    assert statuses(options) == {
        "ours": "measured", "slow": "measured", "wrong": "wrong: error 5.0e-01, tolerance 1e-01",
        "nan": "wrong: error nan, tolerance 1e-01", "late": "not measured: RuntimeError: out of memory",
        "absent": "not measured: ModuleNotFoundError: No module named 'absent'",
    }  # fmt: skip
    ours = saved(options)["head"]["rows"][0]
    assert (ours["rate"], ours["best_peer"], ours["of_best_peer"], ours["of_floor"]) == (3.0, "slow", 2 / 3, 2.0)


def test_an_interrupted_run_keeps_the_rounds_it_finished(options):
    count = iter(range(10))

    def run() -> dict:
        if next(count) == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        bench.compare(Bench("head", options), "case", ["ours"], lambda _: Implementation(run, lambda: 0.0, 0.0), work=1,
                      unit="rows", floor=FLOOR)
    assert saved(options)["head"]["rows"][0]["seconds"] == 1.0


def test_rows_are_replaced_and_other_benches_stay(options):
    Bench("decode", options).save([{"case": "a", "implementation": "ours", "status": "old"}])
    one = Bench("head", options)
    for status in ("first", "second"):
        one.save([{"case": "a", "implementation": "ours", "status": status}])
    one.save([{"case": "b", "implementation": "ours", "status": "third"}])
    assert [row["status"] for row in saved(options)["head"]["rows"]] == ["second", "third"]
    assert statuses(options, "decode") == {"ours": "old"}
    assert saved(options)["head"]["versions"]["torch"] == importlib.metadata.version("torch")


def test_the_report_is_a_table_under_what_was_measured_where(options, capsys):
    one = Bench("divergence", options)
    bench.compare(one, "KL(a || b)", ["ours", "gone"], lambda name: {"ours": Implementation(
        lambda: {"seconds": 0.25}, lambda: 0.0, 0.0)}[name], work=2, unit="rows", floor=FLOOR)
    capsys.readouterr()
    bench.main(["report", options.out])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## divergence" and "commit" in lines[2] and "GFLOP/s" in lines[2]
    [row] = [line for line in lines if "| ours |" in line]
    assert row.startswith(r"| KL(a \|\| b) | ours | 250 ms | 0 ms | 8 rows/s | ") and "| 0.25 x |" in row
    assert any("| gone | not measured: KeyError" in line for line in lines) and "Floor: nothing." in lines


def test_growth_is_drawn(options, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    Bench("growth", options).save([{"case": f"{axis} {x}", "implementation": "ours", "status": "measured", "axis": axis,
                                    "x": x, "seconds": 0.1 * x, "peak_bytes": 100 * x}
                                   for axis in ("rows", "batch") for x in (1, 2, 4)])
    bench.main(["report", options.out, "--plot", str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_a_head_without_the_gradient_of_the_entropy_is_wrong_and_a_missing_peer_is_a_row(options):
    def forgetful(y, h, w):
        logprobs, entropy = head_logprobs(h, w, y)
        return logprobs, entropy.detach() + 0 * logprobs

    def missing(y, h, w):
        raise ModuleNotFoundError("No module named 'trl'")

    functions = {"ours": lambda y, h, w: head_logprobs(h, w, y), "torch": bench.torch_head, "forgetful": forgetful}
    bench.compare_heads(Bench("head", options), "case", functions | {"TRL": missing}, 8, [64])
    found = statuses(options)
    assert found["ours"] == found["torch"] == "measured" and found["forgetful"].startswith("wrong")
    assert found["TRL"] == "not measured: ModuleNotFoundError: No module named 'trl'"


def test_divergence_of_ours_is_that_of_the_formula(options):
    one = Bench("divergence", options)
    bench.bench_divergence(one)
    assert {row["status"] for key, row in one.rows.items() if key[1] in ("ours", "torch")} == {"measured"}


@pytest.mark.parametrize("shape", ["tiny-qwen2", "tiny-llama"])
def test_our_engine_and_the_loop_around_transformers_write_the_same_tokens(options, shape):
    pytest.importorskip("transformers")
    given = bench.random_ids(5, 12), bench.ragged(5, 3, 3, 1, 6), [7, 8, 9, 10], 2
    ours, again, theirs = (bench.load_engine(name, shape, options, torch.float32)(*given)
                           for name in ("ours", "ours, re-reading", "transformers"))
    assert ours == again == theirs
    assert [len(tokens) for tokens in ours] == [sum(counts) for counts in given[1]]
    assert bench.greedy_error("ours", shape, options, True) == 0


def test_an_engine_that_does_not_attend_is_found_out(options, monkeypatch):
    """Decoders at initialisation repeat their last token, so that every engine looked right whatever it attended to."""

    def repeating(prompts, lengths, observation, rows):
        return [[prompt[-1]] * sum(counts) for prompt, counts in zip(prompts, lengths, strict=True)]

    monkeypatch.setattr(bench, "load_engine", lambda *_: repeating)
    assert all(bench.greedy_error("x", shape, options, True) > 0.1 for shape in options.shapes)


def test_rollout_and_step_run_from_the_command_line_and_agree_with_transformers(options, capsys):
    pytest.importorskip("transformers")
    bench.main(["rollout", "step", "--quick", "--repeats", "1", "--shapes", "tiny-llama", "--threads", "1",
                "--out", options.out])
    assert statuses(options, "rollout") == dict.fromkeys(("ours", "ours, re-reading", "transformers"), "measured")
    assert statuses(options, "step") == dict.fromkeys(("ours", "transformers, padded"), "measured")


def test_a_bench_that_breaks_leaves_the_others_to_run(options, capsys, monkeypatch):
    def broken(one: Bench) -> None:
        raise RuntimeError("no world here")

    monkeypatch.setitem(bench.BENCHES, "encoder", broken)
    monkeypatch.setitem(bench.BENCHES, "head", lambda one: one.save(
        [{"case": "a", "implementation": "ours", "status": "fine"}]))
    bench.main(["encoder", "head", "--quick", "--threads", "1", "--out", options.out])
    assert statuses(options, "encoder") == {"all": "not measured: RuntimeError('no world here')"}
    assert statuses(options) == {"ours": "fine"}
