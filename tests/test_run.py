"""A run's folder: what is logged and saved and when, what counts as the best state, when it ends.

Run: python -m pytest tests/test_run.py
"""

import datetime
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from infra import checkpoint
from infra import run as run_module
from infra.checkpoint import best_state, save_state, states
from infra.memory import disk_report
from infra.parallel import micro_batches, shuffled, uniforms, update
from infra.processes import start_several
from infra.record import changes, paths_of
from infra.run import MAX_SKIPPED, Run, RunSettings, Stop
from model import Critic, Tokenizer, load_decoder
from settings import TrainSettings
from tests.support.mini import read_rows
from tests.support.runs import run as run_mini


class Counter:
    """A schedule with one number."""

    def __init__(self, count: int = 0):
        self.count = count

    def state(self) -> dict:
        return {"count": self.count}

    def load(self, state: dict) -> None:
        self.count = state["count"]


def begin(folder, schedule=None, num_steps: int = 10, **changes) -> Run:
    """A run of a network with one layer, ready for its first step."""
    values = {"phase": "kd", "run_dir": str(folder), "save_every": 1, "device": "cpu", **changes}
    settings = RunSettings(**values)
    run = Run(settings, 0, 1, torch.device("cpu"))
    run.prepare_folder()
    run.start(num_steps, 8, {"student": torch.nn.Linear(2, 2)}, schedule)
    return run


def log(run: Run, step: int, **metrics: float) -> None:
    named = {key.replace("_", "/", 1): value for key, value in metrics.items()}
    run.log(step, named, num_tokens=1, passes=1)


# ---- states ----


def test_the_best_state_is_chosen_by_the_reward_where_a_validation_has_one(tmp_path):
    run = begin(tmp_path / "run")
    for step, (score, reward) in enumerate([(0.1, 0.9), (0.9, 0.1), (0.8, 0.2), (0.7, 0.3)], 1):
        log(run, step, eval_score=score, eval_reward=reward)
    assert run.score == 0.3 and best_state(states(tmp_path / "run")).name == "step_000001"
    by_score = begin(tmp_path / "score")
    for step, score in enumerate([0.1, 0.9, 0.8, 0.7], 1):
        log(by_score, step, eval_score=score)
    assert best_state(states(tmp_path / "score")).name == "step_000002"


def test_a_step_that_was_not_validated_has_no_score(tmp_path):
    run = begin(tmp_path)
    log(run, 1, eval_score=0.5)
    log(run, 2, loss_kd=0.1)
    assert run.score is None
    scores = [json.loads((s / "meta.json").read_text())["score"] for s in states(tmp_path)]
    assert scores == [0.5, None]


def test_a_state_is_on_the_disk_before_it_gets_its_name_and_after_the_log(tmp_path, monkeypatch):
    """What a power cut leaves is a whole state, whose log is at least as long."""
    flushed, places = [], {}
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (flushed.append(os.fstat(handle).st_ino), real(handle))
    )
    rename = checkpoint.Path.rename

    def watching(self, target):
        places[target.name] = len(flushed)
        return rename(self, target)

    monkeypatch.setattr(checkpoint.Path, "rename", watching)
    run = begin(tmp_path)
    log(run, 1, loss_kd=0.1)
    [state] = states(tmp_path)
    before = set(flushed[: places[state.name]])
    files = {path.name: path.stat().st_ino for path in (*state.iterdir(), state)}
    assert {"meta.json", "student.safetensors", "student_adam.safetensors"} <= files.keys()
    assert set(files.values()) <= before
    assert flushed[0] == (tmp_path / "metrics.jsonl").stat().st_ino
    assert flushed[-1] == state.parent.stat().st_ino  # the new name, too


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_, **options):
        raise OSError("no space left on device")

    network = torch.nn.Linear(2, 2)
    save_state(tmp_path, {"student": network}, {}, {"step": 1})
    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(OSError, match="student.safetensors: no space left"):
        save_state(tmp_path, {"student": network}, {}, {"step": 2})
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000001"]


# ---- what a run keeps, and for how long ----


def test_a_run_says_how_much_its_states_take_and_whether_the_disk_has_room(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=2**31)
    monkeypatch.setattr("infra.memory.shutil.disk_usage", lambda _: usage)
    networks = {"actor": torch.nn.Linear(2**14, 2**12, bias=False)}  # 0.25 GiB; a state: 0.75
    text = disk_report(tmp_path, networks, 2, save_every=5)
    assert "the 2 newest and the best, 0.75 GiB each; the result has 0.25 GiB" in text
    # Two, the best, the one being written, and the result.
    assert "got 2 GiB free on the disk, expected 3.25 GiB; make room" in text
    text = disk_report(tmp_path, networks, 2, save_every=0)
    assert "state: the last one, 0.75 GiB; the result has 0.25 GiB" in text
    assert "warning" not in text
    for step in (5, 10):
        (tmp_path / "state" / f"step_{step:06d}").mkdir(parents=True)
    assert "warning" not in disk_report(tmp_path, networks, 2, save_every=5)


def test_a_folder_in_which_another_process_writes_is_refused(tmp_path):
    program = "import fcntl, sys, time; file = open(sys.argv[1], 'w'); "  # as record.lock does
    program += "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    begin(tmp_path / "run")
    command = [sys.executable, "-c", program, str(tmp_path / "run" / ".lock")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="run: got another process that writes there; wait"):
            begin(tmp_path / "run")
    finally:
        holder.kill()
        holder.communicate()
    begin(tmp_path / "run")  # a killed process holds nothing


def test_what_a_killed_process_left_half_written_is_removed_and_said(tmp_path, capsys):
    run = begin(tmp_path)
    log(run, 1, loss_kd=0.1)
    (tmp_path / ".run.json.partial123").write_text('{"settings')
    (tmp_path / "state" / "step_000002.partial").mkdir()
    begin(tmp_path, resume=True)
    assert capsys.readouterr().out.count("which a killed process had not finished") == 2
    assert not [*tmp_path.glob("**/*partial*"), *tmp_path.glob("**/.*partial*")]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_other(tmp_path):
    def fill_the_disk(path):
        path.write_text("half")
        raise OSError("no space left on device")

    (tmp_path / "run.json").write_text("whole")
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write_aside(tmp_path / "run.json", fill_the_disk)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").read_text() == "whole"


# ---- a run that goes on ----


def test_a_resumed_run_says_each_change_and_keeps_the_former_records(tmp_path, capsys):
    log(begin(tmp_path, grad_clip=1.0), 1, loss_kd=0.1)
    log(begin(tmp_path, grad_clip=2.0, save_every=7, resume=True), 2, loss_kd=0.1)
    said = capsys.readouterr().out
    assert "--grad-clip: was 1.0, continues with 2.0" in said and "save-every" not in said
    begin(tmp_path, grad_clip=3.0, resume=True)
    record = json.loads((tmp_path / "run.json").read_text())
    former = [(one["settings"]["grad_clip"], one["until_step"]) for one in record["history"]]
    assert record["settings"]["grad_clip"] == 3.0 and former == [(1.0, 1), (2.0, 1)]
    assert all("history" not in one for one in record["history"])


@pytest.mark.parametrize(("name", "other"), [("phase", "sft"), ("seed", 1)])
def test_a_resumed_run_that_would_be_another_run_is_refused_and_nothing_changes(
    tmp_path, name, other
):
    log(begin(tmp_path), 1, loss_kd=0.1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"another run: it has --{name} .*, now {other!r}"):
        begin(tmp_path, resume=True, **{name: other})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_path_may_be_written_otherwise_and_a_folder_may_move(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("a", "b")]
    folders[0].mkdir()
    settings = {"student": str(folders[0]), "seed": 0}
    record = {"settings": settings, "paths": paths_of(settings)}
    monkeypatch.chdir(tmp_path)
    assert changes(record, settings | {"student": "./a"}, tmp_path) == []
    folders[1].mkdir()
    with pytest.raises(ValueError, match="--student .*a', now 'b'"):
        changes(record, settings | {"student": "b"}, tmp_path)
    folders[0].rmdir()
    [line] = changes(record, settings | {"student": "b"}, tmp_path)
    assert "which is gone; continues with 'b'" in line


@pytest.mark.parametrize(
    "text", ["", '{"settings": {"seed"', "[]", "{}", '{"settings": 5}', "\xff"]
)
def test_a_damaged_record_is_refused_by_name_and_left(tmp_path, text):
    log(begin(tmp_path), 1, loss_kd=0.1)
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="run.json: got no .*restore it, or move it away"):
        begin(tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text(encoding="latin-1") == text


def test_a_finished_run_without_its_states_is_not_started_anew_by_resume(tmp_path):
    log(begin(tmp_path), 1, loss_kd=0.1)
    (tmp_path / "model.safetensors").touch()
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(Stop, match="got no undamaged state to continue .*--overwrite"):
        begin(tmp_path, resume=True)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_when_all_states_are_damaged_the_log_is_kept_and_the_run_refused_again_and_again(tmp_path):
    log(begin(tmp_path), 1, loss_kd=0.1)
    (states(tmp_path)[0] / "student.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(Stop, match="got no undamaged state"):
            begin(tmp_path, resume=True)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_a_run_begun_again_leaves_nothing_of_the_former_one(tmp_path):
    log(begin(tmp_path), 1, loss_kd=0.1)
    for name in ("model.safetensors", "collapse.txt"):
        (tmp_path / name).touch()
    begin(tmp_path, overwrite=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run.json", ".lock"}


def test_c4_the_date_is_that_of_the_runs_first_start(tmp_path):
    log(begin(tmp_path), 1, loss_kd=0.1)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["date"] == datetime.date.today().isoformat()
    (tmp_path / "run.json").write_text(json.dumps(record | {"date": "2020-02-03"}))
    assert begin(tmp_path, resume=True).date == "2020-02-03"
    assert json.loads((tmp_path / "run.json").read_text())["date"] == "2020-02-03"
    assert begin(tmp_path, overwrite=True).date == record["date"]


@pytest.mark.parametrize("place", ["run", "run/state/step_000001"])
def test_a_run_does_not_learn_from_what_it_replaces(mini, tmp_path, place):
    run_here = ["--phase", "sft", "--epochs", "0.34"]
    run_mini(mini, tmp_path / "run", *run_here)
    with pytest.raises(ValueError, match="--student: got .*run.*, which the run in .* replaces"):
        run_mini(mini, tmp_path / "run", *run_here, "--overwrite", "--student",
                 str(tmp_path / place))
    assert (tmp_path / "run" / "model.safetensors").exists()


# ---- states as models ----


def test_every_state_is_a_model_that_costs_no_disk(mini, tmp_path, capfd):
    run_mini(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2")
    state = states(tmp_path / "run")[-1]
    ours, result = load_decoder(state).state_dict(), load_decoder(tmp_path / "run").state_dict()
    assert all(torch.equal(ours[name], result[name]) for name in result)
    # All states hold links to one tokenizer, and a model's weights are the actor's.
    assert (state / "tokenizer.json").samefile(states(tmp_path / "run")[0] / "tokenizer.json")
    assert (state / "model.safetensors").samefile(state / "actor.safetensors")
    assert Tokenizer.load(state).size == Tokenizer.load(mini / "student").size
    shutil.copytree(state, tmp_path / "elsewhere")  # a copy stands alone
    assert load_decoder(tmp_path / "elsewhere")


def test_a_state_is_a_model_on_a_disk_without_hard_links(mini, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    run_mini(mini, tmp_path / "run", "--phase", "sft", "--epochs", "0.34")
    assert load_decoder(states(tmp_path / "run")[-1])


def test_a_run_that_is_not_done_stands_for_its_newest_state_and_says_which(
    mini, tmp_path, capfd
):
    run_mini(mini, tmp_path / "run", "--phase", "sft", "--epochs", "0.67")
    (tmp_path / "run" / "model.safetensors").unlink()
    expected = load_decoder(states(tmp_path / "run")[-1]).state_dict()
    got = load_decoder(tmp_path / "run").state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert "run is unfinished: step 2 of 2" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(FileNotFoundError, match="a run without a result or a state"):
        load_decoder(tmp_path / "run")


def test_a_run_that_goes_on_has_no_result_until_it_is_done_again(mini, tmp_path):
    flags = ["--phase", "dgpo", "--steps"]
    run_mini(mini, tmp_path / "run", *flags, "1")
    run_mini(mini, tmp_path / "other", *flags, "2")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    run = Run(TrainSettings(**{**settings, "resume": True, "steps": 2}), 0, 1, torch.device("cpu"))
    run.prepare_folder()
    student = load_decoder(tmp_path / "run")
    run.start(2, 4, {"actor": student, "critic": Critic.from_decoder(student)})
    assert run.steps_done == 1 and not (tmp_path / "run" / "model.safetensors").exists()


# ---- a schedule ----


def test_a_schedule_is_saved_with_the_state_and_loaded_from_it(tmp_path):
    run = begin(tmp_path, Counter(7))
    log(run, 1, loss_kd=0.1)
    resumed = Counter()
    begin(tmp_path, resumed, resume=True)
    assert resumed.count == 7


def test_a_schedule_of_another_layout_is_refused_by_name(tmp_path):
    """A state that an earlier version wrote, or a phase without a schedule."""
    log(begin(tmp_path), 1, loss_kd=0.1)
    with pytest.raises(Stop, match="meta.json: got a schedule of another layout .*--overwrite"):
        begin(tmp_path, Counter(), resume=True)


# ---- ends ----


def test_updates_that_were_left_out_are_forgotten_after_a_good_step(tmp_path):
    run = begin(tmp_path)

    def step(*gradients: float) -> int:
        """One step with an update for each gradient; the number of those that were left out."""
        for gradient in gradients:
            for parameter in run.networks["student"].parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            run.update("student", 0.1)
        return run.count_skipped()

    for _ in range(3):
        assert [step(math.nan) for _ in range(MAX_SKIPPED - 1)] == [1] * (MAX_SKIPPED - 1)
        assert step(1.0, 2.0) == 0
    for _ in range(MAX_SKIPPED - 1):
        assert step(math.inf, 1.0) == 1  # beside one that is well
    with pytest.raises(Stop, match=f"last {MAX_SKIPPED} updates .*--grad-clip"):
        step(math.nan)


def test_a_network_is_updated_at_the_steps_rate_with_the_settings_decay_and_clip(tmp_path):
    run = begin(tmp_path, weight_decay=0.07, grad_clip=0.5)
    [weight, bias] = run.networks["student"].parameters()
    weight.grad, bias.grad = torch.ones(2, 2), torch.zeros(2)
    before = weight.detach().clone()
    assert run.update("student", 0.01) == pytest.approx(2.0)  # before clipping
    [group] = run.adams["student"].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.07)
    state = run.adams["student"].state[weight]
    assert state["exp_avg"].norm() == pytest.approx(0.1 * 0.5)  # Adam saw the clipped gradient
    decayed = before * (1 - 0.01 * 0.07)
    torch.testing.assert_close(weight.detach(), decayed - 0.01, atol=1e-6, rtol=0)


def test_max_minutes_are_minutes_and_none_is_no_limit(tmp_path):
    run = begin(tmp_path, max_minutes=2.0)
    assert not run.is_over()
    run.started -= 119
    assert not run.is_over()
    run.started -= 2
    assert run.is_over()
    unlimited = begin(tmp_path / "other")
    unlimited.started -= 10**6
    assert not unlimited.is_over()


def test_a_number_that_is_not_one_is_null_in_the_log_and_in_the_history(tmp_path):
    run = begin(tmp_path)
    log(run, 1, loss_kd=math.nan, loss_lr=1.0)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss/kd": None, "loss/lr": 1.0}]
    assert run.history == [{"loss/kd": None, "loss/lr": 1.0}]


def test_a_launchers_signal_does_not_end_a_process_that_is_about_to_say_what_went_wrong(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), Run.signals(SimpleNamespace(signal=0)):
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, at the next line
        assert "SIGTERM" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- several processes of one command ----


def failed(exitcode: int) -> ChildFailedError:
    return ChildFailedError("train.py", {1: ProcessFailure(1, 7, exitcode, "")})


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        (SignalException("", signal.SIGTERM), 128 + signal.SIGTERM, ""),
        (failed(-signal.SIGKILL), 1, "process 1 of 3 was ended by SIGKILL"),
        (failed(3), 3, ""),
    ],
    ids=["stopped", "killed", "failed"],
)
def test_several_processes_end_with_what_the_first_failed_one_says(
    monkeypatch, capsys, ended, status, said
):
    def launch(arguments: list[str]) -> None:
        assert arguments[1:5] == ["--nproc-per-node", "3", "--shutdown-timeout", "120"]
        raise ended

    monkeypatch.setattr(logging, "disable", lambda _: None)
    monkeypatch.setattr(torch.distributed.run, "main", launch)
    with pytest.raises(SystemExit) as caught:
        start_several(3, timeout_minutes=2.0)
    assert caught.value.code == status and said in capsys.readouterr().err


# ---- updates, in one process ----


def descend(gradient: list[float], grad_clip: float) -> tuple[torch.Tensor, float]:
    """(how far plain descent at rate 1 moved, the norm that `update` returned)."""
    parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    norm = update([parameter], torch.optim.SGD([parameter], lr=9.0), 1.0, grad_clip)
    assert parameter.grad is None
    return -parameter.detach(), norm


def test_a_gradient_is_clipped_to_the_largest_norm_and_its_own_norm_is_returned():
    moved, norm = descend([3.0, 4.0], 1.0)
    assert norm == 5.0 and torch.allclose(moved, torch.tensor([0.6, 0.8]))
    moved, norm = descend([0.3, 0.4], 1.0)
    assert norm == pytest.approx(0.5) and torch.allclose(moved, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    moved, norm = descend([1.0, bad], 1.0)
    assert not math.isfinite(norm) and not moved.any()


# ---- shares of work ----


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [5, 30, 7, 7, 100, 1, 12]
    groups = micro_batches(lengths, 40)
    assert groups == [[0, 1], [2, 3], [4], [5, 6]]
    assert all(sum(lengths[i] for i in g) <= 40 or len(g) == 1 for g in groups)
    assert micro_batches([], 40) == []


def test_a_permutation_depends_on_its_seeds_alone():
    assert shuffled(9, 1, 2) == shuffled(9, 1, 2) != shuffled(9, 1, 3)
    assert sorted(shuffled(9, 1, 2)) == list(range(9)) and shuffled(0, 1) == []


def test_noise_depends_on_seed_episode_and_index_alone_and_is_uniform():
    assert (uniforms(1, [5, 6], [0, 3]) == uniforms(1, [6, 5], [3, 0])[::-1]).all()
    a, b = np.meshgrid(np.arange(200), np.arange(200))
    u = uniforms(3, a.ravel(), b.ravel())
    assert ((0 <= u) & (u < 1)).all() and len(np.unique(u)) == u.size
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.size) ** 0.5
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / u.size**0.5
    assert abs(np.corrcoef(uniforms(4, a.ravel(), b.ravel()), u)[0, 1]) < 5 / u.size**0.5


def test_an_interrupt_while_processes_end_does_not_end_them_otherwise(monkeypatch):
    """A launcher passes on the interrupt that the terminal has sent to all."""
    before, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(run_module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(run_module, "end_processes",
                        lambda: seen.append(signal.getsignal(signal.SIGINT)))
    try:
        run_module.run_program("train.py", lambda argv: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN]
