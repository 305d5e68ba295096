"""Runs that are killed, that meet a full disk, damaged states, broken gradients, a silent retriever: nothing is lost.

    python -m pytest tests/test_faults.py              without the killed runs
    python -m pytest tests/test_faults.py -m faults    the killed runs (minutes; `make faults`)
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_train import mini, run  # noqa: F401

import distil
import play
import reinforce
import train
from checkpoint import newest_state, states
from episode import Episode
from model import load_decoder
from run import Stop

ROOT = Path(__file__).resolve().parent.parent
NUM_KILLS = 20
FLAGS = {
    "sft": ["--epochs", "8"],
    "kd": ["--epochs", "8"],
    "kd from the teacher": ["--phase", "kd", "--epochs", "4", "--val-size", "0", "--eval-every", "0"],
    "ppo": ["--steps", "12"],
    "dgpo": ["--steps", "12"],
}  # and of the other phases what a method keeps: test_distillm_resumes_with_its_buffer_and_its_share


def command(mini: Path, out: Path, name: str) -> list[str]:
    flags = ["--phase", name, "--save-every", "1", *FLAGS[name]]
    if "teacher" in name:  # its own episodes; a random one is right about nothing, so the world gives it the answer
        flags = [*flags[2:], "--episodes", str(out.with_suffix(".episodes.jsonl"))]
    return [sys.executable, __file__, "--config", str(mini / "mini.toml"), "--run-dir", str(out), *flags]


def start(arguments: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            **options)  # fmt: skip


def end(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


def kill_one(mini: Path, out: Path, name: str, step: int, wait_s: float) -> tuple[str, int]:
    """Kill a run wait_s after it logged the step, continue it; its metrics.jsonl and the steps it had logged."""
    process = start(command(mini, out, name))
    path = out / "metrics.jsonl"
    while process.poll() is None and (path.read_text().count("\n") if path.exists() else 0) < step:
        time.sleep(0.002)
    time.sleep(wait_s)
    process.kill()
    process.communicate()
    logged = path.read_text().count("\n") if path.exists() else 0
    end(start([*command(mini, out, name), "--resume"]))
    left = [*(out / "state").glob("*.partial")]
    assert not left, left
    return path.read_text(), logged


@pytest.mark.faults
@pytest.mark.parametrize("name", FLAGS)
def test_a_run_killed_at_any_moment_and_resumed_has_the_metrics_of_an_uninterrupted_one(mini, tmp_path, name):
    started = time.monotonic()
    end(start(command(mini, tmp_path / "whole", name)))
    whole_s = time.monotonic() - started
    expected = (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = (tmp_path / "whole" / "perf.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert len(seconds) >= 8
    draw = random.Random(name)
    moments = [(draw.randrange(len(seconds)), draw.random()) for _ in range(NUM_KILLS // len(FLAGS))]
    with ThreadPoolExecutor(2) as pool:  # in a step, or, before the first, while the run starts
        killed = list(pool.map(lambda m: kill_one(
            mini, tmp_path / f"killed in {m[0]} at {m[1]:.3f}", name, m[0],
            m[1] * (seconds[m[0]] if m[0] else whole_s - sum(seconds))), moments))  # fmt: skip
    assert [text == expected for text, _ in killed] == [True] * len(moments)
    print(f"{name}: {len(killed)} of {len(killed)} killed runs equal; they had done {[n for _, n in killed]} of "
          f"{len(seconds)} steps")  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_ends_its_step_saves_and_continues(mini, tmp_path):
    end(start(command(mini, tmp_path / "whole", "kd")))
    process = start([*command(mini, tmp_path / "run", "kd"), "--save-every", "0"])
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = end(process, 128 + signal.SIGTERM)
    assert "stopped after step" in output and "--resume" in output
    assert not (tmp_path / "run" / "model.safetensors").exists() and len(states(tmp_path / "run")) == 1
    end(start([*command(mini, tmp_path / "run", "kd"), "--resume"]))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_full_disk_costs_states_but_no_step_and_the_old_states_stay(mini, tmp_path):
    """Files may not grow beyond 24 kB: the logs fit, a state does not."""
    end(start(command(mini, tmp_path / "whole", "kd")))
    limit = 24 * 1024
    process = start(command(mini, tmp_path / "run", "kd"),
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    output = end(process, 1)  # the result could not be written
    assert "was not saved" in output and "make room on the disk" in output and "Traceback" not in output
    assert not states(tmp_path / "run") and not [*(tmp_path / "run" / "state").glob("*")]
    steps = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == steps  # every step was done and logged
    end(start([*command(mini, tmp_path / "run", "kd"), "--resume"]))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == steps


def damage_none(folder: Path) -> None:
    pass


def flip_a_byte(folder: Path) -> None:
    path = folder / "student_adam.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_a_file(folder: Path) -> None:
    os.truncate(folder / "student.safetensors", 1000)


def remove_a_file(folder: Path) -> None:
    (folder / "student.safetensors").unlink()


def break_the_meta(folder: Path) -> None:
    (folder / "meta.json").write_text('{"step": 2')


def leave_a_partial_one(folder: Path) -> None:
    folder.rename(folder.with_name(folder.name + ".partial"))


@pytest.mark.parametrize("harm", [
    damage_none, flip_a_byte, cut_a_file, remove_a_file, break_the_meta, leave_a_partial_one,
])  # fmt: skip
def test_a_damaged_state_is_noticed_and_passed_over_for_the_one_before(mini, tmp_path, capsys, harm):
    flags = ["--phase", "kd", "--epochs", "2"]
    whole = run(mini, tmp_path / "run", *flags)
    assert [folder.name for folder in states(tmp_path / "run")] == ["step_000005", "step_000006"]
    harm(states(tmp_path / "run")[-1])
    assert run(mini, tmp_path / "run", *flags, "--resume") == whole
    is_whole = harm is damage_none
    assert [folder.name for folder in states(tmp_path / "run")] == ["step_000005", "step_000006"]
    # What was damaged is put aside: it does not count among those that are kept.
    aside = [*(tmp_path / "run" / "state").glob("*.damaged")]
    assert len(aside) == (not is_whole and harm is not leave_a_partial_one)
    said = capsys.readouterr()
    resumed_at = 6 if harm is damage_none else 5
    assert f"after step {resumed_at}" in said.out + said.err
    assert ("passed over" in said.out + said.err) == (harm not in (damage_none, leave_a_partial_one))


def test_the_last_two_states_and_the_one_with_the_best_validation_score_are_kept(mini, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.3, 0.1])
    real = train.sum_over_processes

    def scripted(*values):  # validation is the one place that sums four numbers of episodes
        is_score = len(values) == 4 and values[3].dtype == torch.int64
        return [next(scores), 0.0, 0.0, 1.0] if is_score else real(*values)

    monkeypatch.setattr(train, "sum_over_processes", scripted)
    run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "2.67")
    assert [folder.name for folder in states(tmp_path / "run")] == ["step_000004", "step_000007", "step_000008"]
    assert json.loads((states(tmp_path / "run")[0] / "meta.json").read_text())["score"] == 0.9


def test_lines_after_the_state_and_a_line_that_is_not_whole_are_cut(mini, tmp_path):
    whole = run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "1")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1].replace('"step": 3', '"step": 4'), lines[-1][:20]]))
    assert run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "1", "--resume") == whole


def test_resumed_with_other_settings_the_run_says_so(mini, tmp_path, capsys):
    run(mini, tmp_path / "run", "--phase", "kd")
    run(mini, tmp_path / "run", "--phase", "kd", "--resume", "--kd-lr", "1e-3", "--save-every", "2")
    said = capsys.readouterr().out
    assert "--kd-lr: was 0.01, continues with 0.001" in said and "save-every" not in said


def test_a_state_of_another_model_or_phase_is_refused_by_name(mini, tmp_path):
    run(mini, tmp_path / "run", "--phase", "kd")
    with pytest.raises(ValueError, match=r"student.safetensors: .*got \(\d+, 16\), expected \(\d+, 32\)"):
        run(mini, tmp_path / "run", "--phase", "kd", "--resume", "--student", str(mini / "teacher"))
    with pytest.raises(ValueError, match="another phase"):
        run(mini, tmp_path / "run", "--phase", "ppo", "--resume")


# ---- numbers that are not numbers ----


def test_a_gradient_that_is_not_finite_is_left_out_counted_and_harms_nothing(mini, tmp_path, monkeypatch):
    real, calls = distil.distil_loss, []

    def broken(*given, **weights):
        calls.append(1)
        loss, kl = real(*given, **weights)
        return (loss * float("nan") if len(calls) == 2 else loss), kl

    monkeypatch.setattr(distil, "distil_loss", broken)
    rows = run(mini, tmp_path / "run", "--phase", "kd")
    assert [row["loss/skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["loss/kd"] is None and rows[1]["loss/grad_norm"] is None and rows[2]["loss/kd"] > 0
    assert all(p.isfinite().all() for p in load_decoder(tmp_path / "run").parameters())


@pytest.mark.parametrize("critic_only_steps", [9, 0], ids=["critic alone", "beside an actor that is well"])
def test_gradients_that_stay_broken_end_the_run_with_the_last_good_state(
    mini, tmp_path, monkeypatch, critic_only_steps
):
    real = reinforce.value_loss
    monkeypatch.setattr(reinforce, "value_loss", lambda values, *rest, **options: real(
        values * float("inf"), *rest, **options))  # fmt: skip
    with pytest.raises(Stop, match=r"last \d updates .*last good state"):
        run(mini, tmp_path / "run", "--phase", "ppo", "--steps", "9",
            "--critic-only-steps", str(critic_only_steps))  # fmt: skip
    folder, problems = newest_state(tmp_path / "run")
    assert folder is not None and not problems


# ---- the world around ----


def test_episodes_whose_search_failed_are_left_out_and_a_silent_retriever_ends_the_run(mini, tmp_path, monkeypatch):
    real = play.generate

    def some_fail(*given, **options):
        episodes = real(*given, **options)
        for episode in episodes[: len(episodes) // 4]:
            episode.status = "search_error"
        return episodes

    monkeypatch.setattr(play, "generate", some_fail)
    rows = run(mini, tmp_path / "some", "--phase", "dgpo", "--steps", "2")
    assert [row["rollout/search_error"] for row in rows] == [0.25, 0.25]
    assert all(value is not None for row in rows for value in row.values())

    def all_fail(*given, **options):
        episodes = real(*given, **options)
        for episode in episodes:
            episode.status = "search_error"
        return episodes

    monkeypatch.setattr(play, "generate", all_fail)
    with pytest.raises(Stop, match="retriever failed in 8 of 8 episodes"):
        run(mini, tmp_path / "all", "--phase", "dgpo", "--steps", "2")


@pytest.mark.parametrize("score", [0.0, 1.0], ids=["all wrong", "all correct"])
def test_steps_of_equal_scores_train(mini, tmp_path, monkeypatch, score):
    monkeypatch.setattr(Episode, "score", property(lambda self: score))
    rows = run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    assert [row["rollout/score"] for row in rows] == [score] * 2
    assert all(value is not None for row in rows for value in row.values())


def test_a_step_without_a_token_of_the_agent_changes_nothing_but_decay(mini, tmp_path):
    lines = [json.loads(line) for line in (mini / "episodes.jsonl").read_text().splitlines()]
    for line in lines:
        line["segments"] = [s for s in line["segments"] if s["author"] == "environment"]
    path = tmp_path / "silent.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = run(mini, tmp_path / "run", "--phase", "kd", "--episodes", str(path))
    assert [row["loss/kd"] for row in rows] == [0.0] * 3 and all(row["loss/skipped"] == 0 for row in rows)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no"), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_names_the_settings_that_help_largest_first(mini, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(reinforce, "score_tokens", fail)
    with pytest.raises(Stop, match="out of memory at a peak of") as caught:
        run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    lines = str(caught.value).splitlines()[1:4]
    sizes = [float(line.split()[0]) for line in lines]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.01
    for knob in ("--micro-batch-tokens (now 16384)", "--rollout-rows (now 64)", "--shard (now none)"):
        assert any(knob in line for line in lines)


def test_teacher_episodes_of_other_settings_are_not_taken_for_these(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    path = tmp_path / "made.jsonl"
    flags = ["--phase", "episodes", "--episodes", str(path)]
    seen = []
    real = play.generate
    monkeypatch.setattr(play, "generate", lambda *given, **options: seen.append(1) or real(*given, **options))
    unlink, kept = Path.unlink, []

    def keep_parts(self: Path, **options: bool) -> None:
        kept.append(self) if ".part0" in self.name else unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", keep_parts)
    config = ["--config", str(mini / "mini.toml"), "--run-dir", str(tmp_path / "run")]
    train.main([*config, *flags])  # leaves its part, as if it had been interrupted before the end
    train.main([*config, *flags])
    assert len(seen) == 1  # taken up
    train.main([*config, *flags, "--seed", "5"])
    train.main([*config, *flags, "--teacher", str(mini / "student")])
    assert len(seen) == 3 and len(set(kept)) == 3


if __name__ == "__main__":  # train.py, with a world that scores random models
    Episode.score = property(lambda self: float(len(self.question.question) % 2))
    try:
        train.main(sys.argv[1:])
    except (ValueError, OSError, Stop) as problem:
        sys.exit(f"train.py: {problem}")
