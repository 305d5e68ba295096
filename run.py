"""A run: its folder, its log, its progress bar, and when its state is saved.

    <run_dir>/run.json            resolved settings, commit, versions
    <run_dir>/metrics.jsonl       a line for each step: numbers that depend on the computation alone
    <run_dir>/perf.jsonl          a line for each step: times, tokens per second, memory
    <run_dir>/samples/            episodes as text
    <run_dir>/state/              what --resume continues from
    <run_dir>/model.safetensors   the result, with config.json and the tokenizer's files

Only rank 0 writes. Every process calls every method: some of them wait for the others.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import config
from checkpoint import cut_lines, load_state, save_state
from episode import Episode, episode_text
from model import Tokenizer, save_decoder
from rollout import Policy


def sum_over_processes(*values: Tensor) -> list[float]:
    """Each value summed over the processes, as floats; fp64."""
    total = torch.stack([value.detach().double().cpu() for value in values])
    if dist.is_initialized():
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
    return total.tolist()


class RunSettings(Protocol):
    """What a run reads of its program's settings."""

    phase: str
    run_dir: str
    resume: bool
    overwrite: bool
    save_every: int
    eval_every: int
    max_minutes: float


class Run:
    """What both loops share: where things are written, and when."""

    def __init__(self, settings: RunSettings, rank: int, num_processes: int, device: torch.device):
        self.settings, self.rank, self.num_processes, self.device = settings, rank, num_processes, device
        self.dir = Path(settings.run_dir)
        self.started = self.step_started = time.perf_counter()
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.steps_done, self.num_steps, self.bar = 0, 0, None

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def prepare_folder(self) -> None:
        """Refuse to write over a run, unless told to."""
        settings = self.settings
        if not settings.resume and (self.dir / "metrics.jsonl").exists() and self.rank == 0:
            if not settings.overwrite:
                sys.exit(f"train.py: {self.dir} already holds a run; give --resume to continue it, "
                         "--overwrite to start again, or another --run-dir")
            for path in [self.dir / "metrics.jsonl", self.dir / "perf.jsonl"]:
                path.unlink(missing_ok=True)
            shutil.rmtree(self.dir / "state", ignore_errors=True)
        if self.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            config.save(settings, self.dir / "run.json")
        if dist.is_initialized():
            dist.barrier()

    def start(self, num_steps: int, modules: dict, optimizers: dict) -> int:
        """The first step to do: 0, or where the saved state ends."""
        self.modules, self.optimizers, self.num_steps = modules, optimizers, num_steps
        if self.settings.resume:
            self.steps_done = load_state(self.dir, modules, optimizers)
            if self.rank == 0:
                for name in ("metrics.jsonl", "perf.jsonl"):
                    cut_lines(self.dir / name, self.steps_done)
            self.say(f"resumed {self.dir} after step {self.steps_done}")
        self.bar = tqdm(total=num_steps, initial=self.steps_done, desc=self.settings.phase, disable=self.rank != 0,
                        mininterval=1.0)
        self.step_started = time.perf_counter()
        return self.steps_done

    def log(self, step: int, metrics: dict[str, float], *, num_tokens: float, **perf: float) -> None:
        """metrics.jsonl: what depends on the computation alone; perf.jsonl: times and memory."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        self.steps_done = step
        every = self.settings.save_every
        if self.rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
            gpu = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
            perf = {"step": step, "seconds": seconds, "tokens_per_s": num_tokens / seconds, **perf,
                    "peak_memory_gib": peak, "peak_gpu_gib": gpu}
            for name, row in (("metrics.jsonl", {"step": step, **metrics}), ("perf.jsonl", perf)):
                with (self.dir / name).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            shown = {"rollout/score": "score", "eval/score": "val", "loss/kd": "loss", "loss/entropy": "entropy",
                     "rollout/kl_student_guide": "kl", "rollout/searches": "searches"}
            text = {short: f"{metrics[key]:.3f}" for key, short in shown.items() if key in metrics}
            self.bar.set_postfix(text | {"tok/s": f"{num_tokens / seconds:.0f}"}, refresh=False)
            self.bar.update()
            if every and step % every == 0 and step < self.num_steps:
                save_state(self.dir, step, self.modules, self.optimizers)

    def write_samples(self, step: int, episodes: Sequence[Episode], tokenizer: Tokenizer, num: int = 3) -> None:
        every = self.settings.eval_every
        if self.rank == 0 and every and step % every == 0:
            (self.dir / "samples").mkdir(exist_ok=True)
            text = "\n\n".join(episode_text(e, tokenizer) for e in episodes[:num])
            (self.dir / "samples" / f"step_{step:06d}.txt").write_text(text + "\n", encoding="utf-8")

    def out_of_time(self) -> bool:
        """Whether rank 0's clock says that max_minutes are over."""
        over = 0 < self.settings.max_minutes * 60 <= time.perf_counter() - self.started
        return sum_over_processes(torch.tensor(float(over and self.rank == 0)))[0] > 0

    def finish(self, policy: Policy) -> None:
        self.bar.close()
        if self.rank == 0:
            save_state(self.dir, self.steps_done, self.modules, self.optimizers)
            save_decoder(policy.decoder, policy.tokenizer, self.dir)
        self.say(f"wrote {self.dir} after {self.steps_done} steps, {time.perf_counter() - self.started:.0f} s")
        if dist.is_initialized():
            dist.barrier()
