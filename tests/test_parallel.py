"""One, two and four processes: the same numbers, replicated or sharded; a dead or stuck one ends the job.

Run: python -m pytest tests/test_parallel.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import METRIC_TOLERANCE, mini, run  # noqa: F401

from checkpoint import states
from distil import distil_loss
from episode import collate, load_episodes, micro_batches, pack
from model import Critic, Tokenizer, load_decoder
from parallel import end_processes, full, in_step, shard, start_processes, sum_over_processes, update
from rollout import Policy
from run import Run

ROOT = Path(__file__).resolve().parent.parent
GRADIENT_TOLERANCE = 1e-5  # of the largest entry; fp32 sums in another order
JUMPY = {"loss/first_log_ratio", "loss/value_clip", "loss/clip_frac"}  # of one process; counts of what crosses a line
MAX_END_S = 90  # until torchrun has ended a job with a dead or stuck process


def torchrun(num_processes: int, *command: object, **options) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(list(map(str, [*launcher, *command])), env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # fmt: skip


def finish(process: subprocess.Popen, timeout_s: float = 300) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output[-3000:]
    return output


def stored_batch(mini: Path, out: Path, is_sharded: bool) -> None:
    """What a process does: one stored batch, loss and gradients of Eq. 1 and of a critic, from its own share."""
    rank, num_processes, _ = start_processes("cpu", timeout_minutes=2)
    student, teacher = (Policy(load_decoder(mini / n), Tokenizer.load(mini / n)) for n in ("student", "teacher"))
    critic = Critic.from_decoder(student.decoder)
    torch.nn.init.constant_(critic.value_head.weight, 0.1)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")
    # Shares of different size, one of them of a single episode: the numbers of micro-batches differ, too.
    share = episodes if num_processes == 1 else episodes[:1] if rank == 1 else [
        e for i, e in enumerate(episodes[1:]) if i % (num_processes - 1) == max(0, rank - 1)]
    if is_sharded:
        for module in (student.decoder, critic, teacher.decoder):
            shard(module)
    modules = {"student": student.decoder, "critic": critic}
    before = {name: [full(p).clone() for p in module.parameters()] for name, module in modules.items()}
    batch = collate(share, pad_id=student.tokenizer.pad_id)
    lengths, losses = batch.lengths(), torch.zeros(2)
    for group in in_step(micro_batches(lengths, 300)):
        packed = pack(batch, group, lengths)
        loss, _ = distil_loss(student, teacher, packed)
        value_loss = critic.values(packed.ids, packed.documents)[packed.response_mask].square().sum()
        (loss / 100).backward()
        (value_loss / 100).backward()
        losses += torch.stack([loss.detach(), value_loss.detach()])
    result = {"losses": torch.tensor(sum_over_processes(*losses))}
    for name, module in modules.items():  # one step of plain descent shows the gradient
        parameters = list(module.parameters())
        norm = update(parameters, torch.optim.SGD(parameters, lr=1.0), 1.0, float("inf"))
        result[f"{name}/norm"] = torch.tensor(norm)
        for (key, p), old in zip(module.named_parameters(), before[name], strict=True):
            result[f"{name}/{key}"] = (old - full(p)).contiguous()
    if rank == 0:
        save_file(result, out)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True], ids=["replicated", "sharded"])
def test_one_stored_batch_gives_the_same_loss_and_gradients_on_any_number_of_processes(mini, tmp_path, is_sharded):
    running = {n: torchrun(n, __file__, mini, tmp_path / f"{n}.safetensors", int(is_sharded)) for n in (1, 2, 4)}
    for process in running.values():
        finish(process)
    one, *others = (load_file(tmp_path / f"{n}.safetensors") for n in running)
    assert one["losses"].min() > 0 and one["critic/value_head.weight"].abs().max() > 0
    for other in others:
        assert other.keys() == one.keys()
        for key, expected in one.items():
            assert (other[key] - expected).abs().max() <= GRADIENT_TOLERANCE * max(1, expected.abs().max()), key


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("phase, sharded", [("kd", "all"), ("dgpo", "all"), ("ppo", "student")])
def test_sharded_training_computes_what_one_process_computes_and_another_number_continues(
    mini, tmp_path, phase, sharded
):
    flags = ["--phase", phase, "--steps", "3", "--epochs", "1", "--eval-every", "2"]
    one = run(mini, tmp_path / "one", *flags)
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", tmp_path / "two", *flags]
    finish(torchrun(2, *command, "--shard", sharded))
    for a, b in zip(one, metrics(tmp_path / "two"), strict=True):
        for key in a.keys() - JUMPY:
            assert b[key] == pytest.approx(a[key], rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), key
    weights, sharded_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert weights.keys() == sharded_weights.keys()
    # As if the last step had not been done: two processes take it up to the bit, and so does one, to rounding.
    shutil.rmtree(states(tmp_path / "two")[-1])
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    command[command.index(tmp_path / "two")] = tmp_path / "again"
    assert "resumed" in finish(torchrun(2, *command, "--shard", sharded, "--resume"))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "two")
    continued = run(mini, tmp_path / "two", *flags, "--resume")
    for a, b in zip(one, continued, strict=True):
        assert b.keys() == a.keys()
        for key in a.keys() - JUMPY:
            assert b[key] == pytest.approx(a[key], rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), key


@pytest.mark.slow
@pytest.mark.parametrize("number", [
    pytest.param(signal.SIGKILL, id="dead"),
    pytest.param(signal.SIGSTOP, id="stuck", marks=pytest.mark.faults),  # torchrun waits 30 s before it kills
])  # fmt: skip
def test_a_dead_or_stuck_process_ends_the_job_with_a_message(mini, tmp_path, number):
    command = [ROOT / "train.py", "--config", mini / "mini.toml", "--run-dir", tmp_path / "run", "--phase", "kd",
               "--epochs", "2000", "--eval-every", "0", "--save-every", "0", "--timeout-minutes", "0.1"]
    job = torchrun(2, *command, start_new_session=True)
    try:
        deadline = time.monotonic() + MAX_END_S
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert job.poll() is None and time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.2)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
        if not children.exists():
            pytest.skip("needs Linux's /proc to find the processes of a job")
        rank = {int(pid): dict(entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")
                               if "=" in entry).get("RANK") for pid in children.read_text().split()}
        [victim] = [pid for pid, number_of in rank.items() if number_of == "1"]
        os.kill(victim, number)
        output, _ = job.communicate(timeout=MAX_END_S)
        assert job.returncode not in (0, None)
        assert "another process ended, or did not answer" in output and "--resume" in output, output
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def test_a_launchers_signal_does_not_end_a_process_that_is_about_to_say_what_went_wrong(capsys):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError), Run.signals(SimpleNamespace(signal=0)):
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, at the next line
        assert "SIGTERM" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


def test_groups_are_left_alone_by_one_process():
    assert in_step(iter([[0, 1], [2]])) == [[0, 1], [2]] and in_step([]) == []


if __name__ == "__main__":
    stored_batch(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1")
    end_processes()
