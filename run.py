"""A run: its folder, its log, its progress bar, when its state is saved, and how it ends early.

    <run_dir>/run.json            resolved settings, commit, versions
    <run_dir>/metrics.jsonl       a line for each step: numbers that depend on the computation alone
    <run_dir>/perf.jsonl          a line for each step: times, tokens per second, memory
    <run_dir>/samples/            episodes as text
    <run_dir>/state/              what --resume continues from
    <run_dir>/generated/          what the student wrote for its replay buffer (distillm)
    <run_dir>/collapse.txt        what was seen, if the run ended by it
    <run_dir>/model.safetensors   the result, with config.json and the tokenizer's files

Only rank 0 writes. Every process calls every method: some of them wait for the others.
"""

import json
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from tqdm import tqdm

import config
from checkpoint import best_state, cut_lines, damage, flush, load_state, newest_state, save_state, states
from episode import Episode, episode_text
from model import Tokenizer, save_decoder
from parallel import barrier, full, sum_over_processes
from rollout import Policy
from weights import read_json

MAY_DIFFER = {"resume", "overwrite", "max_minutes", "save_every", "timeout_minutes"}  # without changing a number
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_SKIPPED = 5  # updates that are left out in steps that follow one another, before the run gives up


class Stop(Exception):
    """The run cannot go on; the text says why and what to do."""


class Collapse(Stop):
    """The run has become worse than it was; what it leaves is its best."""


class RunSettings(Protocol):
    """What a run reads of its program's settings."""

    phase: str
    run_dir: str
    resume: bool
    overwrite: bool
    save_every: int
    eval_every: int
    max_minutes: float
    shard: str
    micro_batch_tokens: int
    rollout_rows: int
    max_context_tokens: int


class Run:
    """What both loops share: where things are written, and when."""

    def __init__(self, settings: RunSettings, rank: int, num_processes: int, device: torch.device):
        self.settings, self.rank, self.num_processes, self.device = settings, rank, num_processes, device
        self.dir = Path(settings.run_dir)
        self.started = self.step_started = time.perf_counter()
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.steps_done, self.num_steps, self.bar = 0, 0, None
        self.score: float | None = None  # of the last step's validation
        self.num_skipped = 0  # updates left out since the last step without one
        self.history: list[dict[str, float]] = []  # the metrics of every step
        self.signal = 0  # that asked this process to stop
        self.method: dict = {}  # numbers that a method keeps from step to step; in JSON, saved with the state

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def agree(self, value: int) -> int:
        """Rank 0's number, on every process."""
        [agreed] = sum_over_processes(torch.tensor(value if self.rank == 0 else 0))
        return int(agreed)

    def prepare_folder(self) -> None:
        """Refuse to write over a run, unless told to."""
        settings = self.settings
        if not settings.resume and (self.dir / "metrics.jsonl").exists() and self.rank == 0:
            if not settings.overwrite:
                sys.exit(f"train.py: {self.dir} already holds a run; give --resume to continue it, "
                         "--overwrite to start again, or another --run-dir")
            for name in ("metrics.jsonl", "perf.jsonl", "collapse.txt"):
                (self.dir / name).unlink(missing_ok=True)
            for name in ("state", "generated"):
                shutil.rmtree(self.dir / name, ignore_errors=True)
        if self.rank == 0:
            self.dir.mkdir(parents=True, exist_ok=True)
            before = read_json(self.dir / "run.json", {}).get("settings", {}) if settings.resume else {}
            for name, value in json.loads(json.dumps(asdict(settings))).items():
                if name in before.keys() - MAY_DIFFER and value != before[name]:
                    self.say(f"--{name.replace('_', '-')}: was {before[name]!r}, continues with {value!r}")
            config.save(settings, self.dir / "run.json")
        barrier()

    def start(self, num_steps: int, batch_size: int, modules: dict, optimizers: dict) -> int:
        """The first step to do: 0, or where the saved state ends."""
        share = math.ceil(batch_size / self.num_processes)
        self.say(f"{num_steps} steps; {batch_size} episodes an update: {share} for each of {self.num_processes} "
                 f"processes, in as many passes of {self.settings.micro_batch_tokens} tokens as they fill (perf.jsonl)")
        self.modules, self.optimizers, self.num_steps = modules, optimizers, num_steps
        if self.settings.resume:
            self.resume()
        self.bar = tqdm(total=num_steps, initial=self.steps_done, desc=self.settings.phase, disable=self.rank != 0,
                        mininterval=1.0)
        self.step_started = time.perf_counter()
        return self.steps_done

    def resume(self) -> None:
        """Load the newest state that is whole; without any, the run starts from the beginning."""
        folder, problems = newest_state(self.dir) if self.rank == 0 else (None, [])
        for problem in problems:
            self.say(f"{problem}; passed over for the state before it")
        step = self.agree(-1 if folder is None else int(folder.name.split("_")[1]))
        if step >= 0:
            meta = load_state(self.dir / "state" / f"step_{step:06d}", self.modules, self.optimizers)
            self.steps_done, self.score, self.method = meta["step"], meta["score"], meta["method"]
            if meta["num_processes"] != self.num_processes:
                self.say(f"saved by {meta['num_processes']} processes, continued by {self.num_processes}: sums are "
                         "taken in another order from here on, so the numbers agree to rounding, not bit for bit")
        if self.rank == 0:
            for name in ("metrics.jsonl", "perf.jsonl"):
                cut_lines(self.dir / name, self.steps_done)
        barrier()
        if self.steps_done:
            lines = (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.history = [json.loads(line) for line in lines]
        self.say(f"resumed {self.dir} after step {self.steps_done}" if step >= 0 else
                 f"--resume: no state in {self.dir / 'state'}; starts from the beginning")

    def log(self, step: int, metrics: dict[str, float], *, num_tokens: float, **perf: float) -> None:
        """metrics.jsonl: what depends on the computation alone; perf.jsonl: times and memory."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        self.steps_done, self.score = step, metrics.get("eval/reward", metrics.get("eval/score"))
        # JSON has no NaN: what is not finite is null, in the file and so, after a resume, in the history
        finite = {key: value if abs(value) < float("inf") else None for key, value in metrics.items()}
        self.history.append(finite)
        every = self.settings.save_every
        if self.rank == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
            gpu = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
            perf = {"step": step, "seconds": seconds, "tokens_per_s": num_tokens / seconds, **perf,
                    "peak_memory_gib": peak, "peak_gpu_gib": gpu}
            for name, row in (("metrics.jsonl", {"step": step, **finite}), ("perf.jsonl", perf)):
                with (self.dir / name).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            shown = {"rollout/score": "score", "eval/score": "val", "loss/kd": "loss", "loss/entropy": "entropy",
                     "rollout/kl_student_guide": "kl", "rollout/searches": "searches"}
            text = {short: f"{metrics[key]:.3f}" for key, short in shown.items() if key in metrics}
            self.bar.set_postfix(text | {"tok/s": f"{num_tokens / seconds:.0f}"}, refresh=False)
            self.bar.update()
        if every and step % every == 0 and step < self.num_steps:
            try:
                self.save()
            except OSError as error:
                self.say(f"the state of step {step} was not saved: {error}; the run goes on, older states are kept; "
                         "make room on the disk")

    def save(self) -> None:
        """Write the state, lines of the log first: a state never knows more steps than they do."""
        if self.rank == 0 and self.steps_done:
            for name in ("metrics.jsonl", "perf.jsonl"):
                with suppress(OSError):  # the others are on their way to save_state, which reports a full disk
                    flush(self.dir / name)
        meta = {"step": self.steps_done, "score": self.score, "num_processes": self.num_processes,
                "method": self.method}
        save_state(self.dir, self.modules, self.optimizers, meta, writes=self.rank == 0)

    def write_samples(self, step: int, episodes: Sequence[Episode], tokenizer: Tokenizer, num: int = 3) -> None:
        every = self.settings.eval_every
        if self.rank == 0 and every and step % every == 0:
            (self.dir / "samples").mkdir(exist_ok=True)
            text = "\n\n".join(episode_text(e, tokenizer) for e in episodes[:num])
            (self.dir / "samples" / f"step_{step:06d}.txt").write_text(text + "\n", encoding="utf-8")

    # ---- ends that were not planned ----

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within, SIGTERM and SIGINT (Ctrl-C) let the step end first; a second one does not wait."""

        def ask(number: int, _) -> None:
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number
            name = signal.Signals(number).name
            print(f"\n{name}: the run ends after this step (once more: at once)", file=sys.stderr)

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        except Exception:
            del before[signal.SIGTERM]  # a launcher sends it when another process has died: say first what was seen
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check_norms(self, *norms: float) -> int:
        """How many of a step's updates were left out, because their gradients were not finite; too many in steps that
        follow one another end the run."""
        skipped = sum(not abs(norm) < float("inf") for norm in norms)
        self.num_skipped = self.num_skipped + skipped if skipped else 0
        if self.num_skipped >= MAX_SKIPPED:
            raise Stop(f"the last {self.num_skipped} updates had gradients that are not finite and were left out; the "
                       f"last good state is in {self.dir / 'state'}; lower the learning rate or --grad-clip, then "
                       "--resume")
        return skipped

    def is_over(self) -> bool:
        """Whether rank 0's clock says that max_minutes are over; on a signal to any process, save and exit."""
        over = 0 < self.settings.max_minutes * 60 <= time.perf_counter() - self.started
        over, *asked = sum_over_processes(
            *(torch.tensor(float(x)) for x in (over and self.rank == 0, *(self.signal == n for n in SIGNALS))))
        for number, count in zip(SIGNALS, asked, strict=True):
            if count:
                if self.optimizers:
                    self.save()
                if self.bar:
                    self.bar.close()
                self.say(f"stopped after step {self.steps_done}; the same command with --resume continues")
                sys.exit(128 + number)  # as a shell reports it
        return over > 0

    def finish(self, policy: Policy, *, saves_state: bool = True) -> None:
        self.bar.close()
        if saves_state:
            self.save()
        state = {name: full(tensor) for name, tensor in policy.decoder.state_dict().items()}
        if self.rank == 0:
            save_decoder(policy.decoder, policy.tokenizer, self.dir, state=state)
        self.say(f"wrote {self.dir} after {self.steps_done} steps, {time.perf_counter() - self.started:.0f} s")
        barrier()

    def give_up(self, policy: Policy, signs: str) -> None:
        """End a run that has collapsed: what it leaves is the weights of its best validation, if states hold them."""
        best = best_state([s for s in states(self.dir) if not damage(s)]) if self.rank == 0 else None
        step = self.agree(-1 if best is None else int(best.name.split("_")[1]))
        kept = f"{self.dir} holds the last weights: no state has a validation score (--save-every, --eval-every)"
        if step >= 0:
            load_state(self.dir / "state" / f"step_{step:06d}", self.modules, {})
            kept = f"{self.dir} holds the weights of step {step}, the best validation so far"
        self.finish(policy, saves_state=False)
        text = f"collapse after step {self.steps_done}: {signs}. {kept}"
        if self.rank == 0:
            (self.dir / "collapse.txt").write_text(text + "\n", encoding="utf-8")
        raise Collapse(text)

    def memory(self) -> str:
        """What memory went to, and the settings that change it, largest first."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        s, decoder = self.settings, self.modules.get("actor", self.modules.get("student"))
        weights = sum(p.nbytes for module in self.modules.values() for p in module.parameters())
        adam = sum(value.nbytes for optimizer in self.optimizers.values() for state in optimizer.state.values()
                   for value in state.values())
        parts = [(2 * weights + adam, "weights, gradients and Adam", f"--shard (now {s.shard}) over more processes"),
                 (max(0, peak - 2 * weights - adam), "the rest of the peak, activations above all",
                  f"--micro-batch-tokens (now {s.micro_batch_tokens}), or --checkpointing")]
        if decoder is not None:
            c = decoder.config
            slots = 2 * c.num_layers * c.num_kv_heads * c.head_dim * s.max_context_tokens * s.rollout_rows
            parts.append((slots * decoder.head_weight.element_size(), "keys and values of a rollout",
                          f"--rollout-rows (now {s.rollout_rows}) or --max-context-tokens ({s.max_context_tokens})"))
        lines = [f"  {size / 2**30:8.2f} GiB {what}: {knob}" for size, what, knob in sorted(parts, reverse=True)]
        return f"out of memory at a peak of {peak / 2**30:.2f} GiB. Change first what is largest:\n" + "\n".join(lines)
