"""Nothing is lost: runs are killed, disks are full, states damaged, gradients broken.

Run: python -m pytest tests/test_faults.py              without the killed runs
     python -m pytest tests/test_faults.py -m faults    the killed runs (minutes; `make faults`)
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import dgpo
import distil
import reinforce
import sampling
import train
from episode import Episode
from infra import fingerprint, guards
from infra import run as run_module
from infra.checkpoint import digest, newest_state, save_state, states
from infra.parts import find_made
from infra.run import Run, Stop
from model import load_decoder
from tests.support.mini import read_rows
from tests.support.runs import Spy, run

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


def test_a_state_of_another_model_or_phase_is_refused_by_name(mini, tmp_path, capsys):
    run(mini, tmp_path / "run", "--phase", "kd")
    for phase, other, message in (
        ("kd", ["--student", str(mini / "teacher")], "--student '.*student', now '.*teacher'"),
        ("ppo", [], "--phase 'kd', now 'ppo'"),
    ):
        flags = ["--phase", phase, "--resume", *other]
        with pytest.raises(ValueError, match=f"would make it another run: it has .*{message}"):
            run(mini, tmp_path / "run", *flags)
    (tmp_path / "run" / "run.json").unlink()  # nothing to compare with: the state does not fit
    message = r"student.safetensors: .*got \(\d+, 16\), expected \(\d+, 32\)"
    with pytest.raises(ValueError, match=message):
        run(mini, tmp_path / "run", "--phase", "kd", "--resume", "--student", str(mini / "teacher"))
    assert "no run.json to compare the settings with" in capsys.readouterr().out
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
    nulls = {key for row in rows for key, value in row.items() if value is None}
    # All correct episodes return the same, so that there is nothing for the critic to explain.
    assert nulls == ({"rollout/explained_variance"} if score else set())


def test_a_step_without_a_token_of_the_agent_changes_nothing_but_decay(mini, tmp_path, monkeypatch):
    """Prompts that fill the context leave the student no room."""
    monkeypatch.setattr(guards, "check_room", lambda *_: None)  # it ends a run of such steps
    full = ["--max-context-tokens", "20", "--max-obs-tokens", "9", "--eval-every", "0"]
    rows = run(mini, tmp_path / "run", "--phase", "gkd", "--steps", "3", *full)
    assert [row["rollout/agent_tokens"] for row in rows] == [0.0] * 3
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


def test_an_error_closes_the_progress_bar(mini, tmp_path, monkeypatch):
    """An open one would be drawn below the error, and closed by the garbage collector."""
    bars = Spy(monkeypatch, run_module, "tqdm")
    monkeypatch.setattr(bars, "write", tqdm.write, raising=False)
    monkeypatch.setattr(reinforce, "score_tokens", lambda *_: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    [(_, _, bar)] = bars.calls
    assert bar.disable and bar not in tqdm._instances  # closed


def test_parts_of_teacher_episodes_of_other_settings_are_not_taken_for_these(
    mini, tmp_path, monkeypatch
):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    path = tmp_path / "made.jsonl"
    flags = ["--phase", "episodes", "--episodes", str(path)]
    seen = []
    real = sampling.generate
    unlink = Path.unlink

    def counting(*arguments, **options):
        seen.append(1)
        return real(*arguments, **options)

    def keep_parts(self: Path, **options: bool) -> None:
        if ".part0" not in self.name:
            unlink(self, **options)

    monkeypatch.setattr(sampling, "generate", counting)
    monkeypatch.setattr(Path, "unlink", keep_parts)
    config = ["--config", str(mini / "mini.toml"), "--run-dir", str(tmp_path / "run")]
    for others in ((), (), ("--seed", "5"), ("--teacher", str(mini / "student"))):
        path.unlink(missing_ok=True)  # its parts are left, as if the run had been interrupted
        train.main([*config, *flags, *others])
    assert len(seen) == 3  # those of the second run were there
    assert len({part.name for part in tmp_path.glob("made.jsonl.*.part*")}) == 3


# ---- a finished file of teacher episodes ----


@pytest.fixture
def made(mini, tmp_path, monkeypatch):
    """Makes the teacher's episodes in a world where all are right; returns a call of train.py."""
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    path = tmp_path / "runs" / "episodes.jsonl"

    def call(phase: str, *flags: str) -> Path:
        folder = ["--run-dir", str(tmp_path / "runs" / "kd"), "--episodes", str(path)]
        quick = ["--val-size", "0"]
        if phase != "episodes":
            quick += ["--eval-every", "0", "--epochs", "0.3", "--overwrite"]
        config = ["--config", str(mini / "mini.toml")]
        config += ["--num-episode-questions", "4"] if phase != "sft" else []
        train.main([*config, "--phase", phase, *folder, *quick, *flags])
        return path

    call("episodes")
    return call


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-episode-questions", "6"], "--num-episode-questions: it has 4, now 6"),
        (["--temperature", "0.5"], "--temperature: it has 1.0, now 0.5"),
        (["--prompt", "paper"], "--prompt: it has short, now paper"),
        (["--max-turns", "0"], "--corpus: it has .* now nothing.*--max-turns: it has 2, now 0"),
        (["--top-k", "1"], "--top-k: it has 2, now 1"),
        (["--teacher", "{mini}/student"], "--teacher: it has .*teacher .*now .*student"),
        (["--corpus", "{mini}/questions.jsonl"], "--corpus: it has .*, now .*questions"),
        (["--questions", "{mini}/episodes.jsonl"], "--questions: it has .*, now .*episodes"),
        (["--encoder", "{mini}/student"], "--encoder: it has .*encoder .*, now .*student"),
        (["--protocol", "qagent.py:QAGENT"], "--protocol: it has search-r1, now qagent.py"),
    ],
)
def test_a_finished_file_of_episodes_is_not_taken_for_one_of_other_settings(
    mini, made, flags, said
):
    """`--num-episode-questions 64` once is not the file of every run after it."""
    path = made("episodes")  # of these settings it is taken
    before = path.read_bytes()
    for phase in ("kd", "episodes"):
        message = f"made with other settings.*{said}.*--episodes OTHER"
        with pytest.raises(ValueError, match=message):
            made(phase, *(flag.format(mini=mini) for flag in flags))
    assert path.read_bytes() == before


def test_a_finished_file_is_known_by_contents_not_by_paths_or_times(mini, made, tmp_path, capsys):
    for name in ("teacher", "corpus.jsonl"):
        source = mini / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, tmp_path / f"other-{name}")
    teacher = tmp_path / "other-teacher"
    same = ["--teacher", str(teacher), "--corpus", str(tmp_path / "other-corpus.jsonl")]
    # What the student does with them does not count.
    # Another seed is another draw of the same.
    made("kd", *same, "--rollout-rows", "2", "--kd-lr", "0.5", "--student", str(mini / "student"))
    made("kd", "--seed", "5")
    assert "episodes.jsonl: made with these settings; taken" in capsys.readouterr().out
    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # another teacher of the same size at the same place
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="--teacher: it has .*, now .*other-teacher"):
        made("kd", *same)


def test_episodes_of_a_person_are_taken_as_they_are_and_sft_takes_any(mini, made, capsys):
    path = made("sft", "--seed", "9")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")  # changed by hand, the fingerprint still there
    made("kd", "--seed", "9")
    assert "no fingerprint: taken as it is (episodes.jsonl.json is of" in capsys.readouterr().out
    path.with_name("episodes.jsonl.json").unlink()
    made("kd", "--seed", "9")
    assert "no fingerprint: taken as it is" in capsys.readouterr().out


def test_another_run_and_other_settings_are_noticed_before_anything_is_loaded(made, monkeypatch):
    def refuse(*_, **options):
        raise AssertionError("loaded")

    path = made("episodes")

    for name in ("open_session", "open_student", "open_frozen"):
        monkeypatch.setattr(train, name, refuse)
    with pytest.raises(ValueError, match="made with other settings"):
        made("kd", "--top-k", "1")
    made("episodes")  # they are there: nothing to do
    with pytest.raises(FileNotFoundError, match="--episodes: got absent, which is not there"):
        made("sft", "--episodes", "absent")
    (path.parent / "kd").mkdir(exist_ok=True)
    (path.parent / "kd" / "metrics.jsonl").touch()
    with pytest.raises(Stop, match="already holds a run"):
        made("kd", "--no-overwrite")


def test_prompts_that_fill_the_context_end_the_run(mini, tmp_path):
    flags = ["--phase", "ppo", "--steps", "1", "--run-dir", str(tmp_path), "--max-obs-tokens", "9"]
    with pytest.raises(Stop, match="--max-context-tokens 10: 8 of 8 prompts fill it"):
        train.main(["--config", str(mini / "mini.toml"), *flags, "--max-context-tokens", "10"])


def test_episodes_that_are_not_there_are_refused_where_any_would_be_taken(tmp_path):
    alone = SimpleNamespace(agree=bool, rank=0)
    for path in (tmp_path / "absent", tmp_path / "folder" / "absent"):
        with pytest.raises(ValueError, match="--episodes: got .*absent, which is not there"):
            find_made(alone, str(path), None, takes_any=True)


def test_a_file_that_was_changed_since_it_was_made_has_no_fingerprint(tmp_path):
    path, values = tmp_path / "made.jsonl", {"temperature": 0.5}
    path.write_text("{}\n")
    fingerprint.write_stamp(path, digest(path), values)
    assert fingerprint.check_stamp(path, values).endswith("made with these settings; taken")
    path.write_text("{} \n")
    for others in (values, {"temperature": 0.7}):
        assert "no fingerprint: taken as it is" in fingerprint.check_stamp(path, others)


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 1, "made_with": 5}', '{"sha256": "x"}'])
def test_a_damaged_fingerprint_is_refused_by_name(made, text):
    path = made("kd")
    path.with_name("episodes.jsonl.json").write_text(text)
    with pytest.raises(ValueError, match="episodes.jsonl.json: got .*remove it to take the file"):
        made("kd")


def test_a_full_disk_at_the_fingerprint_costs_no_episode(mini, tmp_path, made, monkeypatch):
    path = made("kd")
    path.unlink()
    real, asked = sampling.generate, []

    def counting(*arguments, **options):
        asked.append(1)
        return real(*arguments, **options)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(sampling, "generate", counting)
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "write_aside", full)
        with pytest.raises(OSError, match="no space left"):
            made("episodes")
    assert not path.exists() and len(asked) == 1
    made("episodes")
    assert path.exists() and len(asked) == 1  # the parts were there


def test_a_state_is_loaded_whole_while_the_run_writes_and_drops_states(mini, tmp_path):
    """Another process that asks a running run gets one step's weights, or an error by name."""
    torch.manual_seed(0)
    decoder = load_decoder(mini / "student")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(mini / "student" / name, tmp_path / name)
    (tmp_path / "run.json").write_text("{}")
    seen, problems, ended = [], [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            try:
                loaded = load_decoder(tmp_path)
            except FileNotFoundError as error:  # dropped, because two newer ones were written
                assert str(tmp_path) in str(error)
                continue
            except Exception as error:
                problems.append(repr(error))
                return
            seen.append({p.detach().flatten()[0].item() for p in loaded.parameters()})

    reader = threading.Thread(target=read)
    save_state(tmp_path, {"actor": decoder}, {}, {"step": 0})
    with torch.no_grad():
        [parameter.fill_(1) for parameter in decoder.parameters()]
        save_state(tmp_path, {"actor": decoder}, {}, {"step": 1})
        reader.start()
        for step in range(2, 30):
            [parameter.fill_(step) for parameter in decoder.parameters()]
            save_state(tmp_path, {"actor": decoder}, {}, {"step": step})
    ended.set()
    reader.join()
    assert not problems and len(seen) > 3
    assert all(len(values) == 1 for values in seen), seen


DEATHS = {  # where a process is killed: the file that it is about to give its name, and a flag
    "the fingerprint is half-written": ("episodes.jsonl.json", False),
    "the fingerprint stands alone": ("episodes.jsonl.json", True),
    "run.json is half-written on resume": ("run.json", False),
}


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory) -> Path:
    """A run that nobody killed, and its episodes."""
    folder = tmp_path_factory.mktemp("unharmed")
    end(start([*command(mini, folder / "whole", "kd from the teacher"), "--epochs", "1"]))
    return folder


@pytest.mark.faults
@pytest.mark.parametrize("death", DEATHS)
def test_a_process_killed_while_it_writes_a_small_file_costs_nothing(mini, tmp_path, whole, death):
    name, is_after = DEATHS[death]
    name = name.replace("episodes.jsonl", "run.episodes.jsonl")
    arguments = [*command(mini, tmp_path / "run", "kd from the teacher"), "--epochs", "1"]
    if name == "run.json":
        end(start(arguments))
        (states(tmp_path / "run")[-1] / "meta.json").unlink()  # a step is left to do
    more = [] if name != "run.json" else ["--resume"]
    environment = {"DGPO_DIE_AT": name, "DGPO_DIE_AFTER": "1" if is_after else ""}
    os.environ.update(environment)
    try:
        process = start([*arguments, *more])
    finally:
        for key in environment:
            del os.environ[key]
    end(process, -signal.SIGKILL)
    output = end(start([*arguments, "--resume"]))
    assert "Traceback" not in output
    for path in ("run/metrics.jsonl", "run.episodes.jsonl"):
        other = whole / path.replace("run", "whole", 1)
        assert (tmp_path / path).read_bytes() == other.read_bytes()
    assert not [*tmp_path.glob("**/.*partial*")], "left half-written"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]


def die_at(name: str, *, after: bool) -> None:
    """Kill this process when it gives a file its name: before, or just after."""
    real = os.replace

    def replace(source, target):
        if Path(target).name == name and not after:
            os.truncate(source, 10)
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


if __name__ == "__main__":  # train.py, with a world that scores random models
    Episode.score = property(lambda self: float(len(self.question.question) % 2))
    if "DGPO_DIE_AT" in os.environ:
        die_at(os.environ["DGPO_DIE_AT"], after=bool(os.environ["DGPO_DIE_AFTER"]))
    try:
        train.main(sys.argv[1:])
    except (ValueError, OSError, Stop) as problem:
        sys.exit(f"train.py: {problem}")
