"""A run: its folder, its log, its progress bar, when its state is saved, and how it ends early.

    run.json            resolved settings, commit, versions, date; `history`: former records
    metrics.jsonl       one line a step: numbers that depend on the computation alone
    perf.jsonl          one line a step: times, tokens per second, memory
    samples/            episodes as text
    tensorboard/, wandb/  what --log-to writes
    state/              what --resume continues from; each state is a model, too
    generated/          what a student wrote for its replay buffer (distillm)
    collapse.txt        why the run was stopped, if its score collapsed
    model.safetensors   the result; config.json and the tokenizer's files are there from the start
    .lock               held while a process writes here

Only rank 0 writes. Every process calls every method, because some of them wait for the others.
"""

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from itertools import compress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from infra import checkpoint, config
from infra.config import setting
from infra.parallel import (
    barrier,
    end_processes,
    gather,
    pick_device,
    start_processes,
    sum_over_processes,
    update,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
COLLAPSED = 3  # exit status of a run that has collapsed and left its best weights
MAX_SKIPPED = 5  # updates left out in consecutive steps before the run gives up
LOGS = ("metrics.jsonl", "perf.jsonl")
OF_ONE_RUN = (*LOGS, "run.json", "collapse.txt", checkpoint.MODEL, "state", "generated",
              "tensorboard", "wandb")
SHOWN = {  # metrics beside the progress bar
    "rollout/score": "score", "eval/score": "val", "loss/kd": "loss", "loss/entropy": "entropy",
    "rollout/kl_student_guide": "kl", "rollout/searches": "searches"}

Export = Callable[[dict[str, Tensor]], object]  # writes a model, given its unsharded tensors


class Stop(Exception):
    """The run cannot go on; the text says why and what to do."""
    status = 1  # of the program, when it exits


class Collapse(Stop):
    """The run became worse than it was; it leaves its best weights."""
    status = COLLAPSED


@dataclass
class RunSettings:
    """What any training run can be told."""
    phase: str = setting("", "what to run")
    run_dir: str = setting("", "where the run writes; empty: runs/<phase>", writes="DIR")
    resume: bool = setting(False, "continue the run in run_dir; start it where there is no state")
    overwrite: bool = setting(False, "start again in a run_dir that already holds a run")
    seed: int = setting(0, "order of the data and sampling noise", at_most=2**53)
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: cuda if there is one")
    processes: int = setting(1, "start as many on this machine, like torchrun", at_least=1)
    timeout_minutes: float = setting(60.0, "a process that waits longer for another ends the job",
                                     above=0, at_most=1e6, rare=True)
    eval_every: int = setting(50, "steps between validations; 0: never",
                              section="learn: all training")
    save_every: int = setting(50, "steps between saved states; 0: the last alone")
    stop_on_collapse: bool = setting(True, "end a run whose score halves; keep its best weights",
                                     of="reinforce", rare=True)
    weight_decay: float = setting(0.01, "AdamW", rare=True)
    grad_clip: float = setting(1.0, "largest norm of a gradient", above=0, rare=True)
    micro_batch_tokens: int = setting(16384, "tokens per forward pass; lower it to save memory",
                                      at_least=1)
    compute_dtype: str = setting("", "of GEMMs; empty: bfloat16 on CUDA, else float32",
                                 choices=("", "float32", "bfloat16"))
    checkpointing: bool = setting(False, "recompute activations in backward: less memory, slower",
                                  rare=True)
    max_minutes: float = setting(0.0, "end after this time, as if all steps were done; 0: never")
    log_to: str = setting("", "also log to this package, if it is installed",
                          choices=("", "tensorboard", "wandb"), rare=True)
    shard: str = setting("none", "split weights and Adam over processes; all: teacher's, too",
                         choices=("none", "student", "all"))


class Run:
    """Where a training loop writes, and when."""

    def __init__(self, settings: RunSettings, rank: int, num_processes: int,
                 device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.rank, self.num_processes = rank, num_processes
        self.dir = Path(settings.run_dir)
        self.started = self.step_started = time.perf_counter()
        self.networks: dict[str, nn.Module] = {}
        self.adams: dict[str, torch.optim.AdamW] = {}
        self.schedule: Any = None  # its state() is saved in JSON, and load() continues from it
        self.steps_done, self.num_steps, self.bar = 0, 0, None
        self.score: float | None = None  # of the last step's validation
        self.num_skipped = 0  # updates left out since the last step without one
        self.num_skipped_now = 0  # in this step
        self.times: dict[str, float] = {}  # seconds of parts of this step
        self.history: list[dict[str, float]] = []  # the metrics of every step
        self.signal = 0  # the one that asked this process to stop
        self.record: dict[str, Any] | None = None  # run.json of the run that goes on
        self.date = date.today().isoformat()  # what templates may write; of the run's first start
        self.track: Callable[[int, dict], object] = lambda step, metrics: None  # --log-to
        self.write_config: Callable[[], object] = lambda: None  # config.json, the tokenizer's files

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def agree(self, value: int) -> int:
        """Rank 0's number, on every process."""
        [agreed] = sum_over_processes(torch.tensor(value if self.rank == 0 else 0))
        return int(agreed)

    def agree_on_state(self, state: Path | None) -> Path | None:
        """Rank 0's state, on every process."""
        step = self.agree(-1 if state is None else int(state.name.removeprefix("step_")))
        return None if step < 0 else self.dir / "state" / f"step_{step:06d}"

    def prepare_folder(self) -> None:
        """Claim the folder, before anything is loaded; refuse another run's, unless told to."""
        from infra import record  # in functions: only a run that trains needs it
        today = date.today().toordinal()
        if self.rank == 0:
            if self.settings.log_to:
                from infra.trackers import check_installed
                check_installed(self.settings.log_to)
            self.lock_file, settings = record.lock(self.dir), asdict(self.settings)
            record.check_apart(self.dir, settings)
            if self.settings.resume:
                self.record = record.read_record(self.dir)
                for line in record.changes(self.record or {}, settings, self.dir):
                    self.say(line)
                with suppress(KeyError, TypeError, ValueError):  # of an earlier version
                    today = date.fromisoformat(self.record["date"]).toordinal()
        self.date = date.fromordinal(self.agree(today)).isoformat()

    def write_record(self) -> None:
        """Write run.json, and config.json; run.json of before stands in its `history`."""
        from infra.record import paths_of
        history, former = [], self.record
        if former is not None:
            history = [*former.pop("history", []), {**former, "until_step": self.steps_done}]
        more = {"date": self.date, "paths": paths_of(asdict(self.settings)), "history": history}
        checkpoint.write_aside(
            self.dir / "run.json", lambda path: config.save(self.settings, path, **more))
        self.write_config()

    def start(self, num_steps: int, batch_size: int, networks: dict[str, nn.Module],
              schedule: Any = None) -> None:
        """Give each network an Adam, and load a saved state where the run goes on."""
        share = math.ceil(batch_size / self.num_processes)
        self.say(f"{num_steps} steps; {batch_size} episodes an update: {share} for each of "
                 f"{self.num_processes} processes, in passes of at most "
                 f"{self.settings.micro_batch_tokens} tokens (perf.jsonl counts them)")
        self.num_steps, self.networks, self.schedule = num_steps, networks, schedule
        if self.rank == 0:
            from infra.memory import disk_report
            from infra.record import clean
            begins_again = self.settings.overwrite and not self.settings.resume
            for path in clean(self.dir, OF_ONE_RUN if begins_again else ()):
                self.say(f"removed {path}, which a killed process had not finished")
            self.say(disk_report(self.dir, networks, checkpoint.NUM_KEPT, self.settings.save_every))
        from infra.cuda import KEPT  # here, because a CPU keeps none
        KEPT.clear()  # a teacher that was asked keeps a cache of all its rows: 29 GB in one run
        decay = self.settings.weight_decay
        for name, network in networks.items():  # `update` sets the learning rate of each step
            trained = [p for p in network.parameters() if p.requires_grad]
            self.adams[name] = torch.optim.AdamW(trained, weight_decay=decay, fused=True)
        if self.settings.resume:
            self.resume()
        if self.rank == 0:
            self.write_record()
            if self.settings.log_to:
                from infra.trackers import open_tracker
                self.track = open_tracker(
                    self.settings.log_to, self.dir, asdict(self.settings), self.steps_done)
        self.bar = tqdm(total=num_steps, initial=self.steps_done, desc=self.settings.phase,
                        disable=self.rank != 0, mininterval=1.0)
        self.step_started = time.perf_counter()

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the names of their files in a state."""
        return {f"{name}_adam": adam for name, adam in self.adams.items()}

    def resume(self) -> None:
        """Load the newest undamaged state; without one the run starts from the beginning."""
        state, problems = checkpoint.newest_state(self.dir) if self.rank == 0 else (None, [])
        for problem in problems:
            self.say(f"{problem}; passed over for the state before it")
        result = self.dir / checkpoint.MODEL
        if self.rank == 0 and state is None:
            if result.exists() or any((self.dir / "state").glob("*.damaged")):
                raise Stop(f"{self.dir}: got no undamaged state to continue the run from, expected "
                           "one; start again with --overwrite, or give another --run-dir")
        if state := self.agree_on_state(state):
            self.load(state)
        for name in LOGS if self.rank == 0 else ():
            checkpoint.cut_lines(self.dir / name, self.steps_done)
        if self.rank == 0 and self.steps_done < self.num_steps:
            result.unlink(missing_ok=True)  # of an earlier end; the state holds these weights
        barrier()
        if self.steps_done:
            lines = (self.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.history = [json.loads(line) for line in lines]
        self.say(f"resumed {self.dir} after step {self.steps_done}" if state else
                 f"--resume: no state in {self.dir / 'state'}; starts from the beginning")

    def load(self, state: Path) -> None:
        meta = checkpoint.load_state(state, self.networks, self.optimizers())
        self.steps_done, self.score = meta["step"], meta["score"]
        if self.schedule:
            try:
                self.schedule.load(meta.get("schedule", {}))
            except (KeyError, TypeError, ValueError) as error:
                raise Stop(f"{state / 'meta.json'}: got a schedule of another layout "
                           f"({type(error).__name__}: {error}); finish the run with the version "
                           "that wrote it, or start again with --overwrite") from error
        if meta["num_processes"] != self.num_processes:
            self.say(f"saved by {meta['num_processes']} processes, continued by "
                     f"{self.num_processes}: sums are taken in another order from here on, so "
                     "the numbers agree to rounding, not bit for bit")

    def steps(self) -> Iterator[int]:
        """The steps to do; ends early when --max-minutes have passed."""
        for step in range(self.steps_done, self.num_steps):
            yield step
            if self.is_over():
                return

    def log(self, step: int, metrics: dict[str, float], *, num_tokens: float, passes: int) -> None:
        """Write a step's metrics and times, move the bar, save the state where it is due."""
        now = time.perf_counter()
        seconds, self.step_started = now - self.step_started, now
        self.steps_done = step
        self.score = metrics.get("eval/reward", metrics.get("eval/score"))
        # JSON has no NaN. A number that is not finite is null in the file, and after a resume too.
        finite = {key: value if abs(value) < math.inf else None for key, value in metrics.items()}
        self.history.append(finite)
        if self.rank == 0:
            times = {"step": step, "seconds": seconds, "tokens_per_s": num_tokens / seconds,
                     "passes": passes, **self.times}
            for place, size in peak_memory(self.device).items():
                times[f"peak_{place}_gib"] = size / 2**30
            for name, row in zip(LOGS, ({"step": step, **finite}, times), strict=True):
                with (self.dir / name).open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self.track(step, {key: value for key, value in finite.items() if value is not None})
            shown = {SHOWN[key]: f"{metrics[key]:.3f}" for key in SHOWN if key in metrics}
            self.bar.set_postfix({**shown, "tok/s": f"{num_tokens / seconds:.0f}"}, refresh=False)
            self.bar.update()
        every = self.settings.save_every
        if every and step % every == 0 and step < self.num_steps:
            try:
                self.save()
            except OSError as error:
                self.say(f"the state of step {step} was not saved: {error}; the run goes on, "
                         "older states are kept; make room on the disk")

    def save(self) -> None:
        """Flushes the logs first, so that a saved state is never ahead of them."""
        if self.rank == 0 and self.steps_done:
            for name in LOGS:
                with suppress(OSError):  # save_state, which all processes enter, reports it
                    checkpoint.flush(self.dir / name)
        meta = {"step": self.steps_done, "num_steps": self.num_steps, "score": self.score,
                "num_processes": self.num_processes,
                "schedule": self.schedule.state() if self.schedule else {}}
        checkpoint.save_state(self.dir, self.networks, self.optimizers(), meta,
                              writes=self.rank == 0)

    def sample(self, step: int, texts: Iterable[str]) -> None:
        """Keep a readable sample of what was generated in the steps that are validated."""
        every = self.settings.eval_every
        if self.rank == 0 and every and step % every == 0:
            path = self.dir / "samples" / f"step_{step:06d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")

    def update(self, name: str, lr: float) -> float:
        """Step a network's Adam, but not by a gradient that is not finite; returns its norm."""
        parameters = self.adams[name].param_groups[0]["params"]
        norm = update(parameters, self.adams[name], lr, self.settings.grad_clip)
        self.num_skipped_now += not abs(norm) < math.inf
        return norm

    def count_skipped(self) -> int:
        """How many updates of this step were left out; Stop if consecutive steps had too many."""
        skipped, self.num_skipped_now = self.num_skipped_now, 0
        self.num_skipped = self.num_skipped + skipped if skipped else 0
        if self.num_skipped >= MAX_SKIPPED:
            raise Stop(f"the last {self.num_skipped} updates had gradients that are not finite "
                       f"and were left out; the last good state is in {self.dir / 'state'}; lower "
                       "the learning rate or --grad-clip, then --resume")
        return skipped

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Context manager: adds the seconds within to the step's times."""
        started = time.perf_counter()
        yield
        self.times[name] = time.perf_counter() - started

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Context manager: SIGTERM and Ctrl-C let the step end first; a second one does not."""
        def ask(number: int, _) -> None:
            if self.signal:
                raise KeyboardInterrupt
            self.signal = number
            print(f"\n{signal.Signals(number).name}: the run ends after this step (once more: at "
                  "once)", file=sys.stderr)

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        except Exception:
            # A launcher sends SIGTERM when another process has died. Ignore it until this
            # process has said what it saw.
            del before[signal.SIGTERM]
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_over(self) -> bool:
        """Whether --max-minutes have passed; after a signal to any process, save and exit."""
        minutes = (time.perf_counter() - self.started) / 60
        time_is_up = self.rank == 0 and 0 < self.settings.max_minutes <= minutes
        flags = [time_is_up, *(self.signal == number for number in SIGNALS)]
        over, *asked = sum_over_processes(*map(torch.tensor, flags))
        for number in compress(SIGNALS, asked):  # those that a process got
            if self.adams:
                self.save()
            if self.bar:
                self.bar.close()
            self.say(f"stopped after step {self.steps_done}; --resume continues the same command")
            sys.exit(128 + number)  # as a shell reports it
        return over > 0

    def finish(self, module: nn.Module, export: Export, *, saves_state: bool = True) -> None:
        """Save the last state, then hand the module's unsharded tensors to `export` on rank 0."""
        self.bar.close()
        if saves_state:
            self.save()
        tensors = {name: gather(tensor) for name, tensor in module.state_dict().items()}
        if self.rank == 0:
            export(tensors)
        seconds = time.perf_counter() - self.started
        self.say(f"wrote {self.dir} after {self.steps_done} steps, {seconds:.0f} s")
        barrier()

    def stop_if_collapsed(self, module: nn.Module, export: Export, num_questions: int,
                          key: str) -> None:
        """End a run whose score (the metric `key`, over num_questions a step) has collapsed."""
        from infra.collapse import signs_of_collapse  # here, because only reinforcement needs it
        signs = signs_of_collapse(self.history, num_questions, key)
        if not signs or not self.settings.stop_on_collapse:
            return
        best = None
        if self.rank == 0:
            sound = [f for f in checkpoint.states(self.dir) if not checkpoint.damage(f)]
            best = checkpoint.best_state(sound)
        best = self.agree_on_state(best)
        kept = "the last weights: no state has a validation score (--save-every, --eval-every)"
        if best:
            step = checkpoint.load_state(best, self.networks, {})["step"]
            kept = f"the weights of step {step}, the best validation so far"
        self.finish(module, export, saves_state=False)
        text = f"collapse after step {self.steps_done}: {signs}. {self.dir} holds {kept}"
        if self.rank == 0:
            (self.dir / "collapse.txt").write_text(text + "\n", encoding="utf-8")
        raise Collapse(text)


def cosine(step: int, num_steps: int) -> float:
    """Factor of a learning rate: from 1 to 0 in the steps of a run."""
    return 0.5 * (1 + math.cos(math.pi * (step / num_steps)))


def warm_up(step: int, num_steps: int) -> float:
    """Factor of a learning rate: (step + 1) / num_steps, then 1."""
    return min(1.0, (step + 1) / max(1, num_steps))


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process at its peak: {"memory": the host's, "gpu": the device's}."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"memory": host, "gpu": gpu}


def refuse_other_run(folder: Path) -> None:
    if (folder / "metrics.jsonl").exists():
        raise Stop(f"{folder} already holds a run; give --resume to continue it, --overwrite to "
                   "start again, or another --run-dir")


def launch(settings: Any, phase: Callable[[Run], None]) -> None:
    """Start the processes and run a phase; what ends it early becomes a Stop with advice."""
    from infra.programs import check_paths  # here, because only programs that start need it

    check_paths(settings)
    trains = config.reads(type(settings), "save_every", settings.phase)  # in a folder of its own
    if trains and not (settings.resume or settings.overwrite):
        refuse_other_run(Path(settings.run_dir))
    if settings.processes > 1 and "WORLD_SIZE" not in os.environ:
        from infra.processes import start_several  # here, because torchrun has its own
        pick_device(settings.device)
        return start_several(settings.processes, settings.timeout_minutes)
    run = Run(settings, *start_processes(settings.device, settings.timeout_minutes))
    try:
        with run.signals():
            torch.manual_seed(settings.seed)
            if trains:
                run.prepare_folder()
            phase(run)
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_memory or "can't allocate memory" in str(error):  # the last is a CPU's
            from infra.memory import memory_report  # here, because a run seldom needs it
            peaks = peak_memory(run.device)
            peak = peaks["gpu"] or peaks["memory"]
            report = memory_report(peak, run.networks, run.adams, settings)
            raise Stop(f"{report}\n({error})") from error
        if dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise Stop(f"another process ended, or did not answer within "
                       f"{settings.timeout_minutes} minutes; read what it said, then --resume\n"
                       f"(rank {run.rank} of {run.num_processes}: {error})") from error
        raise
    finally:
        if run.bar:
            run.bar.close()  # an open one would redraw itself below the error


def run_program(name: str, main: Callable[[list[str]], object]) -> None:
    """Run a training program; what a person can mend ends it with one message and a status."""
    from infra import cli  # here, because a reader of the loops need not open it

    try:
        with cli.reporting(name, Stop):
            try:
                main(sys.argv[1:])
            except KeyboardInterrupt:
                raise Stop("stopped at once; --resume continues from the last state") from None
    finally:
        if dist.is_initialized():  # a launcher passes an interrupt on to what it has reached before
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_processes()
