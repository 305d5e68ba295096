"""Nothing is lost: runs are killed, disks are full, states damaged, gradients broken.

Run: python -m pytest tests/test_faults.py              without the killed runs
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

import dgpo
import distil
import reinforce
import sampling
import train
from episode import Episode
from infra.checkpoint import newest_state, states
from infra.run import Run, Stop
from model import load_decoder
from tests.support.mini import read_rows, write_rows
from tests.support.runs import run

ROOT = Path(__file__).resolve().parent.parent
NUM_KILLS = 20
FLAGS = {  # what the other phases keep in a state is tested in test_distil.py
    "sft": ["--epochs", "8"],
    "kd": ["--epochs", "8"],
    "kd from the teacher": [
        "--phase",
        "kd",
        "--epochs",
        "4",
        "--val-size",
        "0",
        "--eval-every",
        "0",
    ],
    "ppo": ["--steps", "12"],
    "dgpo": ["--steps", "12"],
}


def command(mini: Path, out: Path, name: str) -> list[str]:
    flags = ["--phase", name, "--save-every", "1", *FLAGS[name]]
    if "teacher" in name:  # it writes the episodes; the end of this file decides which are right
        flags = [*flags[2:], "--episodes", str(out.with_suffix(".episodes.jsonl"))]
    config = ["--config", str(mini / "mini.toml"), "--run-dir", str(out)]
    return [sys.executable, __file__, *config, *flags]


def start(arguments: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        arguments,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def end(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


def kill_one(mini: Path, out: Path, name: str, step: int, wait_s: float) -> tuple[str, int]:
    """Kills a run wait_s after it logged the step and continues it.

    Returns its metrics.jsonl and the number of steps that it had logged.
    """
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
def test_a_run_killed_at_any_moment_and_resumed_has_the_metrics_of_an_uninterrupted_one(
    mini, tmp_path, name
):
    started = time.monotonic()
    end(start(command(mini, tmp_path / "whole", name)))
    whole_s = time.monotonic() - started
    expected = (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = (tmp_path / "whole" / "perf.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert len(seconds) >= 8
    draw = random.Random(name)
    kills = []
    for _ in range(NUM_KILLS // len(FLAGS)):
        step, share = draw.randrange(len(seconds)), draw.random()
        # In a step, or, before the first, while the run starts.
        duration_s = seconds[step] if step else whole_s - sum(seconds)
        kills.append((tmp_path / f"killed in {step} at {share:.3f}", step, share * duration_s))
    with ThreadPoolExecutor(2) as pool:
        killed = list(pool.map(lambda k: kill_one(mini, k[0], name, k[1], k[2]), kills))
    assert [text == expected for text, _ in killed] == [True] * len(kills)
    steps_done = [num for _, num in killed]
    print(f"{name}: {len(killed)} of {len(killed)} killed runs equal;", end=" ")
    print(f"they had done {steps_done} of {len(seconds)} steps")


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
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert len(states(tmp_path / "run")) == 1
    end(start([*command(mini, tmp_path / "run", "kd"), "--resume"]))
    assert read_rows(tmp_path / "run/metrics.jsonl") == read_rows(tmp_path / "whole/metrics.jsonl")


@pytest.mark.slow
def test_a_full_disk_costs_states_but_no_step_and_the_old_states_stay(mini, tmp_path):
    """Files may not grow beyond 24 kB: the logs fit, a state does not."""
    end(start(command(mini, tmp_path / "whole", "kd")))
    limit = 24 * 1024
    process = start(
        command(mini, tmp_path / "run", "kd"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    output = end(process, 1)  # the result could not be written
    assert "was not saved" in output and "make room on the disk" in output
    assert "Traceback" not in output
    assert not states(tmp_path / "run") and not [*(tmp_path / "run" / "state").glob("*")]
    steps = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == steps  # all were done and logged
    end(start([*command(mini, tmp_path / "run", "kd"), "--resume"]))
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == steps


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


HARMS = [
    damage_none, flip_a_byte, cut_a_file, remove_a_file, break_the_meta, leave_a_partial_one
]  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_state_is_noticed_and_passed_over_for_the_one_before(
    mini, tmp_path, capsys, harm
):
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
    assert ("passed over" in said.out + said.err) == (
        harm not in (damage_none, leave_a_partial_one)
    )


def test_the_last_two_states_and_the_one_with_the_best_validation_score_are_kept(
    mini, tmp_path, monkeypatch
):
    scores = {2: 0.2, 4: 0.9, 6: 0.3, 8: 0.1}
    real = Run.log

    def scripted(self, step, metrics, **others):
        if "eval/score" in metrics:
            metrics["eval/score"] = scores[step]
        return real(self, step, metrics, **others)

    monkeypatch.setattr(Run, "log", scripted)
    run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "2.67")
    kept = [folder.name for folder in states(tmp_path / "run")]
    assert kept == ["step_000004", "step_000007", "step_000008"]
    assert json.loads((states(tmp_path / "run")[0] / "meta.json").read_text())["score"] == 0.9


def test_lines_after_the_state_and_a_line_that_is_not_whole_are_cut(mini, tmp_path):
    whole = run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "1")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    later, broken = lines[-1].replace('"step": 3', '"step": 4'), lines[-1][:20]
    path.write_text("\n".join([*lines, later, broken]))
    assert run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "1", "--resume") == whole


def test_resumed_with_other_settings_the_run_says_so(mini, tmp_path, capsys):
    run(mini, tmp_path / "run", "--phase", "kd")
    run(mini, tmp_path / "run", "--phase", "kd", "--resume", "--kd-lr", "1e-3", "--save-every", "2")
    said = capsys.readouterr().out
    assert "--kd-lr: was 0.01, continues with 0.001" in said and "save-every" not in said


def test_a_state_of_another_model_or_phase_is_refused_by_name(mini, tmp_path):
    run(mini, tmp_path / "run", "--phase", "kd")
    message = r"student.safetensors: .*got \(\d+, 16\), expected \(\d+, 32\)"
    with pytest.raises(ValueError, match=message):
        run(mini, tmp_path / "run", "--phase", "kd", "--resume", "--student", str(mini / "teacher"))
    with pytest.raises(ValueError, match="another phase"):
        run(mini, tmp_path / "run", "--phase", "ppo", "--resume")


# ---- numbers that are not numbers ----


def test_a_gradient_that_is_not_finite_is_left_out_counted_and_harms_nothing(
    mini, tmp_path, monkeypatch
):
    real, calls = distil.distil_loss, []

    def broken(*arguments, **weights):
        calls.append(1)
        loss, kl = real(*arguments, **weights)
        return (loss * float("nan") if len(calls) == 2 else loss), kl

    monkeypatch.setattr(distil, "distil_loss", broken)
    rows = run(mini, tmp_path / "run", "--phase", "kd")
    assert [row["loss/skipped"] for row in rows] == [0, 1, 0]
    assert rows[1]["loss/kd"] is None and rows[1]["loss/grad_norm"] is None
    assert rows[2]["loss/kd"] > 0
    assert all(p.isfinite().all() for p in load_decoder(tmp_path / "run").parameters())


@pytest.mark.parametrize(
    "critic_only_steps", [9, 0], ids=["critic alone", "beside an actor that is well"]
)
def test_gradients_that_stay_broken_end_the_run_with_the_last_good_state(
    mini, tmp_path, monkeypatch, critic_only_steps
):
    real = dgpo.value_loss

    def broken(values, *rest, **options):
        return real(values * float("inf"), *rest, **options)

    monkeypatch.setattr(dgpo, "value_loss", broken)
    flags = ["--phase", "ppo", "--steps", "9", "--critic-only-steps", str(critic_only_steps)]
    with pytest.raises(Stop, match=r"last \d updates .*last good state"):
        run(mini, tmp_path / "run", *flags)
    folder, problems = newest_state(tmp_path / "run")
    assert folder is not None and not problems


# ---- the world around ----


def test_episodes_whose_search_failed_are_left_out_and_a_silent_retriever_ends_the_run(
    mini, tmp_path, monkeypatch
):
    real = sampling.generate

    def failing(share: float):
        def generate(*arguments, **options):
            episodes = real(*arguments, **options)
            for episode in episodes[: int(share * len(episodes))]:
                episode.status = "search_error"
            return episodes

        return generate

    monkeypatch.setattr(sampling, "generate", failing(0.25))
    rows = run(mini, tmp_path / "some", "--phase", "dgpo", "--steps", "2")
    assert [row["rollout/search_error"] for row in rows] == [0.25, 0.25]
    assert all(value is not None for row in rows for value in row.values())
    monkeypatch.setattr(sampling, "generate", failing(1.0))
    with pytest.raises(Stop, match="retriever failed in 8 of 8 episodes"):
        run(mini, tmp_path / "all", "--phase", "dgpo", "--steps", "2")


@pytest.mark.parametrize("score", [0.0, 1.0], ids=["all wrong", "all correct"])
def test_steps_of_equal_scores_train(mini, tmp_path, monkeypatch, score):
    monkeypatch.setattr(Episode, "score", property(lambda self: score))
    rows = run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    assert [row["rollout/score"] for row in rows] == [score] * 2
    assert all(value is not None for row in rows for value in row.values())


def test_a_step_without_a_token_of_the_agent_changes_nothing_but_decay(mini, tmp_path):
    episodes = read_rows(mini / "episodes.jsonl")
    for episode in episodes:
        episode["segments"] = [s for s in episode["segments"] if s["author"] == "environment"]
    path = tmp_path / "silent.jsonl"
    write_rows(path, episodes)
    rows = run(mini, tmp_path / "run", "--phase", "kd", "--episodes", str(path))
    assert [row["loss/kd"] for row in rows] == [0.0] * 3
    assert [row["loss/skipped"] for row in rows] == [0] * 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_settings_that_help_largest_first(
    mini, tmp_path, monkeypatch, error
):
    def fail(*_):
        raise error

    monkeypatch.setattr(reinforce, "score_tokens", fail)
    with pytest.raises(Stop, match="out of memory at a peak of") as caught:
        run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    lines = str(caught.value).splitlines()[1:4]
    sizes = [float(line.split()[0]) for line in lines]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.01
    for knob in ("micro-batch-tokens (now 16384)", "rollout-rows (now 64)", "shard (now none)"):
        assert any(f"--{knob}" in line for line in lines)


def test_teacher_episodes_of_other_settings_are_not_taken_for_these(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    path = tmp_path / "made.jsonl"
    flags = ["--phase", "episodes", "--episodes", str(path)]
    seen = []
    real = sampling.generate
    unlink, kept = Path.unlink, []

    def counting(*arguments, **options):
        seen.append(1)
        return real(*arguments, **options)

    def keep_parts(self: Path, **options: bool) -> None:
        kept.append(self) if ".part0" in self.name else unlink(self, **options)

    monkeypatch.setattr(sampling, "generate", counting)
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
