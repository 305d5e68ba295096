"""The sampler's step as a CUDA graph, played on a CPU: captures, fixed places, what stays.

Run: python -m pytest tests/test_graphs.py
"""

import functools
from contextlib import contextmanager

import pytest
import torch

import distil
import kernels
import model
import rollout
from data import Question
from episode import Episode
from infra import cuda
from rollout import RolloutSettings, generate
from tests.support.runs import policies, run
from tests.support.scripted import SEARCH_THEN_ANSWER, play

ANSWER = "<answer> gold </answer>"
MAX_LOGPROB_DIFFERENCE = 1e-5  # fp32: a graph reads more masked slots, in another order of sums
QUESTIONS = [Question(f"q{i}", f"which number has fact {i}", ("x",), "s") for i in range(10)]
SETTINGS = RolloutSettings(max_turns=0, max_new_tokens=24, max_context_tokens=160, prompt="short",
                           rollout_rows=6)


class Recorded:
    """In the place of a CUDA graph: a replay runs the function again, at the same places."""

    made: list["Recorded"] = []

    def __init__(self, run, given):
        self.run, self.result, self.given = run, run().clone(), given
        self.num_replays = 0
        Recorded.made.append(self)

    def replay(self):
        self.result.copy_(self.run())
        self.num_replays += 1

    def pool(self):
        return "pool"


@pytest.fixture
def captured(monkeypatch):
    """Graphs on the CPU; the list of those that were captured."""

    def capture(run, pool):
        graph = Recorded(run, pool)
        return graph, graph.result

    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(cuda, "capture", capture)
    monkeypatch.setattr(model, "GRAPHED", ("cpu",))
    monkeypatch.setattr(model, "REACH_BUCKET", 64)
    return Recorded.made


def places(policy):
    """Where everything lies that a graph reads."""
    steps = cuda.KEPT[policy.decoder]
    tensors = (steps.ids, steps.positions, *steps.cache.keys, *steps.cache.values,
               *steps.copies.values(), *policy.decoder.parameters())
    return [tensor.data_ptr() for tensor in tensors]


def assert_equal_episodes(left, right):
    for mine, expected in zip(left, right, strict=True):
        assert mine.ids == expected.ids and mine.status == expected.status
        mine, expected = (torch.tensor([p for s in e.segments for p in s.logprobs])
                          for e in (mine, expected))
        torch.testing.assert_close(mine, expected, atol=MAX_LOGPROB_DIFFERENCE, rtol=0)


def test_graphs_write_what_steps_write_and_live_across_calls(mini, captured, monkeypatch):
    student, _ = policies(mini)
    got = generate(student, None, QUESTIONS, SETTINGS, seed=3)
    count, before = len(captured), places(student)
    keys = list(cuda.KEPT[student.decoder].graphs.graphs)
    assert 0 < count == len(keys) <= 12
    assert {rows for rows, _ in keys} <= {1, 2, 4, 6} and {r for _, r in keys} <= {64, 128, 161}
    assert sum(graph.num_replays for graph in captured) > 3 * count
    assert [graph.given for graph in captured] == [None] + ["pool"] * (count - 1), "shared memory"
    # Another call, with fewer rows and other weights, captures nothing and moves nothing.
    with torch.no_grad():
        for parameter in student.decoder.parameters():
            parameter.mul_(1.1)
    again = generate(student, None, QUESTIONS[:6], SETTINGS, seed=4)
    assert len(captured) == count and places(student) == before
    monkeypatch.setattr(model, "GRAPHED", ())
    cuda.KEPT.clear()
    assert_equal_episodes(again, generate(student, None, QUESTIONS[:6], SETTINGS, seed=4))
    student, _ = policies(mini)
    assert_equal_episodes(got, generate(student, None, QUESTIONS, SETTINGS, seed=3))
    assert student.decoder not in cuda.KEPT, "a CPU keeps nothing between calls"


def test_graphs_of_weights_that_moved_are_made_anew(mini, captured):
    student, _ = policies(mini)
    generate(student, None, QUESTIONS[:6], SETTINGS, seed=3)
    count = len(captured)
    student.decoder.model.norm.weight.data = student.decoder.model.norm.weight.data.clone()
    generate(student, None, QUESTIONS[:6], SETTINGS, seed=3)
    assert len(captured) == 2 * count
    # CUDA frees a pool with its last graph, and a capture into one that is freed fails.
    assert [graph.given for graph in captured] == ([None] + ["pool"] * (count - 1)) * 2


def test_training_frees_the_cache_of_a_teacher_that_was_asked(
        mini, captured, tmp_path, monkeypatch):
    kept, loss = [], distil.distil_loss

    def watched(*args, **options):
        kept.append(len(cuda.KEPT))
        return loss(*args, **options)

    monkeypatch.setattr(distil, "distil_loss", watched)
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    made = ["--episodes", str(tmp_path / "made.jsonl"), "--val-size", "0", "--eval-every", "0"]
    run(mini, tmp_path / "run", "--phase", "kd", *made)
    assert captured and kept and not any(kept)


def test_what_a_gpu_fuses_is_right_and_few_variants_are_compiled(mini, monkeypatch):
    student, _ = policies(mini)
    expected = generate(student, None, QUESTIONS, SETTINGS, seed=3)
    made: list[str] = []

    def backend(graph, inputs):
        made.append("silu" if "silu" in graph.code else "roll")
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(kernels, "COMPILED", ("cpu",))
    for name in ("rotate", "swiglu"):
        monkeypatch.setattr(model, name, kernels.fused(getattr(model, name).__wrapped__))
    torch._dynamo.reset()
    for documents in ([5], [9, 4], [1, 3, 2], [1]):
        ids = torch.arange(sum(documents))[None]
        with torch.no_grad():
            student.decoder.hidden(ids, documents=documents)
        student.decoder.hidden(ids, documents=documents).sum().backward()
    student.decoder(torch.arange(12).view(3, 4))
    assert_equal_episodes(generate(student, None, QUESTIONS, SETTINGS, seed=3), expected)
    # Eight of a function may be compiled: with and without gradients, of parts of a merged product.
    assert max(map(made.count, ("silu", "roll"))) <= 4 and set(made) == {"silu", "roll"}
    torch._dynamo.reset()


def test_a_replay_counts_the_slots_that_it_writes(mini, captured, monkeypatch):
    """A GPU's replay runs no Python, so the cache must hear of its reach before."""
    student, _ = policies(mini)
    steps = model.open_steps(student.decoder, 4, 32, torch.float32)
    with torch.no_grad():
        steps.hidden(student.decoder, [1] * 4, [5] * 4, may_capture=True)
        steps.cache.reach = 0  # as another call begins
        monkeypatch.setattr(Recorded, "replay", lambda graph: None)
        steps.hidden(student.decoder, [1] * 4, [5] * 4, may_capture=True)
    assert steps.cache.reach == 32


def test_a_cache_that_is_too_small_or_of_another_length_is_replaced(mini, captured):
    student, _ = policies(mini)
    kept = model.open_steps(student.decoder, 4, 32, torch.float32)
    assert model.open_steps(student.decoder, 3, 32, torch.float32) is kept
    assert kept.cache.rows == 3
    for rows, slots, dtype in ((5, 32, torch.float32), (4, 33, torch.float32),
                               (4, 32, torch.bfloat16)):
        kept = model.open_steps(student.decoder, 4, 32, torch.float32)
        new = model.open_steps(student.decoder, rows, slots, dtype)
        assert new is not kept and new.cache.slots == slots and new.cache.keys[0].dtype == dtype


def test_nothing_is_captured_while_a_search_is_under_way(tokenizer, captured, monkeypatch):
    monkeypatch.setattr(rollout, "SEARCH_STEPS", {"cpu": 8})
    monkeypatch.setattr(model, "REACH_BUCKET", 8)  # so that each search meets new buckets
    engines, in_flight = [], []
    real_run, real_hidden, real_capture = (
        rollout.Engine.run, model.Steps.hidden, cuda.capture)

    def run(engine, *arguments):
        engines.append(engine)
        return real_run(engine, *arguments)

    def hidden(*arguments, may_capture):
        in_flight.append(not may_capture)
        return real_hidden(*arguments, may_capture=may_capture)

    def capture(*arguments):
        assert engines[-1].search is None
        return real_capture(*arguments)

    monkeypatch.setattr(rollout.Engine, "run", run)
    monkeypatch.setattr(model.Steps, "hidden", hidden)
    monkeypatch.setattr(cuda, "capture", capture)
    scripts = {"ask-a": SEARCH_THEN_ANSWER, "ask-b": f"<think>{50 * 'x'}</think>{ANSWER}"}
    episodes = play(tokenizer, scripts)
    assert [e.status for e in episodes.values()] == ["answered", "answered"] and captured
    assert True in in_flight and False in in_flight


def test_a_capture_warms_up_shares_the_pool_and_lets_other_threads_be(monkeypatch):
    done = []

    @contextmanager
    def graph(graph, **options):
        done.append(options)
        yield
        done.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert cuda.capture(lambda: done.append("run"), "pool") == ("graph", None)
    options = {"pool": "pool", "capture_error_mode": "thread_local"}
    assert done == ["run", options, "run", "captured"]
