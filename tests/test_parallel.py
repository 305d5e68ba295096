"""One, two and four processes: the same numbers, replicated or sharded; a dead one ends the job.

Run: python -m pytest tests/test_parallel.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from batch import collate, pack
from distil import distil_loss
from episode import load_episodes
from infra.checkpoint import states
from infra.parallel import (
    end_processes,
    gather,
    micro_batches,
    shard,
    start_processes,
    sum_over_processes,
    update,
)
from model import Critic
from tests.support.mini import read_rows
from tests.support.runs import (
    assert_same_metrics,
    finish,
    policies,
    run,
    torchrun,
)

ROOT = Path(__file__).resolve().parent.parent
GRADIENT_TOLERANCE = 1e-5  # of the largest entry; fp32 sums in another order
BF16_TOLERANCE = 0.02  # of the norm: each process rounds its share of a gradient
MAX_END_S = 90  # until torchrun has ended a job with a dead or stuck process


# ---- one stored batch ----


def shares(episodes: list, num_processes: int) -> list[list]:
    """Shares of different sizes, so that the numbers of micro-batches differ, too."""
    if num_processes == 1:
        return [episodes]
    rest = [episodes[1:][k :: num_processes - 1] for k in range(num_processes - 1)]
    return [rest[0], episodes[:1], *rest[1:]]


KINDS = ("replicated", "sharded", "bf16")  # bf16: sharded, and computed in it


def stored_batch(mini: Path, rank: int, num_processes: int, kind: str) -> dict:
    """Loss and gradients of Eq. 1 and of a critic, from this process's share of a stored batch."""
    student, teacher = policies(mini)
    student.decoder.compute_dtype = torch.bfloat16 if kind == "bf16" else None
    critic = Critic.from_decoder(student.decoder)
    torch.nn.init.constant_(critic.value_head.weight, 0.1)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")
    if kind != "replicated":
        shard(student.decoder, student.decoder.model.layers, "hidden", student.dtype)
        shard(critic, critic.backbone.model.layers, "values", student.dtype)
        shard(teacher.decoder, teacher.decoder.model.layers, "hidden")
    modules = {"student": student.decoder, "critic": critic}
    before = {
        name: [gather(p).clone() for p in module.parameters()] for name, module in modules.items()
    }
    share = shares(episodes, num_processes)[rank]
    batch = collate(share, pad_id=student.tokenizer.pad_id)
    lengths, losses = batch.lengths(), torch.zeros(2)
    for group in micro_batches(lengths, 300):
        packed = pack(batch, group, lengths)
        loss, _ = distil_loss(student, teacher, packed)
        values = critic.values(packed.ids, packed.documents)[packed.response_mask]
        value_loss = values.square().sum()
        (loss / 100).backward()
        (value_loss / 100).backward()
        losses += torch.stack([loss.detach(), value_loss.detach()])
    result = {"losses": torch.tensor(sum_over_processes(*losses))}
    for name, module in modules.items():  # one step of plain descent shows the gradient
        parameters = list(module.parameters())
        norm = update(parameters, torch.optim.SGD(parameters, lr=1.0), 1.0, float("inf"))
        result[f"{name}/norm"] = torch.tensor(norm)
        for (key, parameter), old in zip(module.named_parameters(), before[name], strict=True):
            result[f"{name}/{key}"] = (old - gather(parameter)).contiguous()
    return result


@pytest.fixture(scope="module")
def stored(mini, tmp_path_factory) -> dict[tuple[int, str], dict]:
    """Results by (number of processes, kind)."""
    folder = tmp_path_factory.mktemp("stored")
    running = [torchrun(number, __file__, mini, folder / str(number)) for number in (2, 4)]
    results = {(1, kind): stored_batch(mini, 0, 1, kind) for kind in KINDS}
    for process in running:
        finish(process)
    for number in (2, 4):
        for kind in KINDS:
            results[number, kind] = load_file(folder / str(number) / f"{kind}.safetensors")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_one_stored_batch_gives_the_same_loss_and_gradients_on_any_number_of_processes(
    stored, kind
):
    one = stored[1, "replicated"]
    assert one["losses"].min() > 0 and one["critic/value_head.weight"].abs().max() > 0
    for number in (2, 4):
        other = stored[number, kind]
        assert other.keys() == one.keys()
        for key, expected in one.items():
            limit = GRADIENT_TOLERANCE * max(1, expected.abs().max())
            assert (other[key] - expected).abs().max() <= limit, (number, key)


@pytest.mark.slow
def test_sharded_bf16_gives_the_gradients_of_one_process_to_its_rounding(stored):
    full, one = stored[1, "replicated"], stored[1, "bf16"]
    for number in (2, 4):
        other = stored[number, "bf16"]
        for key, expected in one.items():
            assert other[key].dtype == torch.float32
            scale = max(1e-6, expected.norm())
            assert (other[key] - expected).norm() <= BF16_TOLERANCE * scale, (number, key)
    difference = one["student/norm"] - full["student/norm"]
    assert 0 < difference.abs() <= BF16_TOLERANCE * full["student/norm"]


# ---- runs ----


@pytest.mark.parametrize("phase", ["kd", "dgpo"])
def test_two_processes_compute_what_one_computes(mini, tmp_path, phase):
    length = ["--epochs", "0.67"] if phase == "kd" else ["--steps", "2"]
    flags = ["--phase", phase, *length, "--eval-every", "0"]
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", tmp_path / "two"]
    two = torchrun(2, *command, *flags)
    one = run(mini, tmp_path / "one", *flags)
    finish(two)
    assert len(one) == 2
    assert_same_metrics(one, read_rows(tmp_path / "two" / "metrics.jsonl"))


def test_one_process_of_torchrun_is_a_group_that_shards_and_computes_the_same(mini, tmp_path):
    flags = ["--phase", "dgpo", "--steps", "2", "--eval-every", "0"]
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", tmp_path / "group"]
    group = torchrun(1, *command, *flags, "--shard", "all")
    one = run(mini, tmp_path / "one", *flags)
    finish(group)
    assert_same_metrics(one, read_rows(tmp_path / "group" / "metrics.jsonl"))


def test_torchrun_starts_a_group_of_one_process(monkeypatch):
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: started.append(a))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert start_processes("cpu", 1.0) == (0, 1, torch.device("cpu")) and not started
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_processes("cpu", 1.0) == (0, 1, torch.device("cpu")) and started == [("gloo",)]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "sharded", "more"), [
    ("kd", "all", ["--epochs", "1"]), ("dgpo", "all", ["--steps", "3"]),
    ("dgpo", "all", ["--steps", "3", "--train-layers", "1"]),
    ("dgpo", "all", ["--steps", "3", "--kl-in", "exact"]), ("ppo", "student", ["--steps", "3"])])
def test_sharded_training_computes_what_one_process_computes_and_another_number_continues(
    mini, tmp_path, phase, sharded, more
):
    flags = ["--phase", phase, *more, "--eval-every", "2"]

    def train_with_two(folder: Path, *more: str) -> str:
        command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", folder, *flags]
        return finish(torchrun(2, *command, "--shard", sharded, *more))

    one = run(mini, tmp_path / "one", *flags)
    train_with_two(tmp_path / "two")
    assert_same_metrics(one, read_rows(tmp_path / "two" / "metrics.jsonl"))
    weights, sharded_weights = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")
    )
    assert weights.keys() == sharded_weights.keys()
    # As if the last step had not been done: two processes do it again to the bit, one to rounding.
    shutil.rmtree(states(tmp_path / "two")[-1])
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    assert "resumed" in train_with_two(tmp_path / "again", "--resume")
    again, two = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("again", "two"))
    assert again == two
    assert_same_metrics(one, run(mini, tmp_path / "two", *flags, "--resume"))


def rank_one(job: subprocess.Popen) -> int:
    """The process id of a job's second rank."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc to find the processes of a job")
    for pid in map(int, children.read_text().split()):
        if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError("no process has rank 1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="dead"),
        # torchrun waits 30 s before it kills.
        pytest.param(signal.SIGSTOP, id="stuck", marks=pytest.mark.faults),
    ],
)
def test_a_dead_or_stuck_process_ends_the_job_with_a_message(mini, tmp_path, number):
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", tmp_path / "run"]
    command += ["--phase", "kd", "--epochs", "2000", "--eval-every", "0", "--save-every", "0"]
    job = torchrun(2, *command, "--timeout-minutes", "0.1", start_new_session=True)
    try:
        deadline = time.monotonic() + MAX_END_S
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.2)
        os.kill(rank_one(job), number)
        output, _ = job.communicate(timeout=MAX_END_S)
        assert job.returncode not in (0, None)
        assert "another process ended, or did not answer" in output, output
        assert "--resume" in output, output
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


if __name__ == "__main__":  # one of the processes of `stored`
    rank, num_processes, _ = start_processes("cpu", timeout_minutes=2)
    out = Path(sys.argv[2])
    for kind in KINDS:
        result = stored_batch(Path(sys.argv[1]), rank, num_processes, kind)
        if rank == 0:
            out.mkdir(exist_ok=True)
            save_file(result, out / f"{kind}.safetensors")
    end_processes()
