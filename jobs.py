"""Jobs of experiments: commands of this project, side by side, each run once; an interrupted call goes on where it was.

Processes have one thread each: models of the embedded world gain little from a second, so two jobs run beside each
other on two cores, or one in two processes.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import compare_correct
from weights import write_aside

ROOT = Path(__file__).resolve().parent
CORES = 2


@dataclass(frozen=True)
class Job:
    name: str
    flags: Callable[[], list[str]]  # called when the job starts: it may depend on what ran before
    done: Path  # the file whose presence says that the job has ended well
    needs: tuple[str, ...] = ()
    cores: int = 1
    after: Callable[[], None] | None = None  # what is left to do here once the command has ended well


def torchrun(processes: int) -> list[str]:
    """`torchrun train.py` for this interpreter; one process needs no launcher."""
    if processes == 1:
        return ["train.py"]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "train.py"]


def train_job(
    name: str, phase: str, folder: Path, *flags: str, needs: tuple[str, ...] = (), processes: int = 1
) -> Job:
    command = [*torchrun(processes), "--phase", phase, "--run-dir", str(folder), "--resume", *flags]
    return Job(name, lambda: command, folder / "model.safetensors", needs, processes)


def eval_job(name: str, model: Path, out: Path, *flags: str, needs: tuple[str, ...] = ()) -> Job:
    command = ["eval.py", "--model", str(model), "--name", name, "--out", str(out), *flags]
    return Job(f"eval {out.name}", lambda: command, out / "result.json", needs)


def run_jobs(jobs: list[Job], logs: Path) -> None:
    """Run the jobs in order as cores become free, each once its needs are met; stop at the first failure.

    A job that only finished ones need is left out: where the records of a run are kept, its weights need not be.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def run(job: Job) -> Job:
        command = [sys.executable, *job.flags()]
        print(
            f"[{time.perf_counter() - started:5.0f} s] {job.name}: {shlex.join(['python', *command[1:]])}",
            flush=True,
        )
        log = logs / f"{job.name.replace(' ', '-')}.log"
        with log.open("w") as file:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ).returncode
        if (job.done.parent / "collapse.txt").exists():
            code = 0  # it has left its best weights, which are its result
        if code == 0 and job.after:
            job.after()
        if code or not job.done.exists():
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{job.name} failed with exit status {code}; the end of {log}:\n{tail}")
        return job

    met = {job.name for job in jobs if job.done.exists()}
    waiting = wanted(jobs, met)
    running: set[Future] = set()
    free = CORES
    with ThreadPoolExecutor(CORES) as pool:
        while waiting or running:
            for job in [job for job in waiting if met.issuperset(job.needs)]:
                if job.cores <= free:
                    free -= job.cores
                    waiting.remove(job)
                    running.add(pool.submit(run, job))
            if not running:
                names = ", ".join(job.name for job in waiting)
                raise RuntimeError(f"{names}: got needs that no job meets, or more than {CORES} cores")
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for job in [future.result() for future in finished]:
                free += job.cores
                met.add(job.name)
    print(f"[{time.perf_counter() - started:5.0f} s] all jobs done", flush=True)


def wanted(jobs: list[Job], met: set[str]) -> list[Job]:
    """The unfinished jobs that nothing depends on, and those that they need, in the order of all."""
    needed = {name for job in jobs for name in job.needs}
    names, of = {job.name for job in jobs} - needed - met, {job.name: job for job in jobs}
    while more := {name for known in names if known in of for name in of[known].needs} - names - met:
        names |= more
    return [job for job in jobs if job.name in names]


def parse_experiment(
    argv: Sequence[str], prog: str, doc: str, rows: Mapping[str, Any], seeds: Sequence[int], folder: str,
    experiments: Sequence[str] = ("run", "report"),
) -> argparse.Namespace:
    """experiment, runs, records, rows (with those that they begin from, in the order of all) and seeds of a command."""
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / folder, help=f"default runs/{folder}")
    parser.add_argument("--records", type=Path, help="a file for each result (default: records in the folder of runs)")
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help=", ".join(rows))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds), metavar="N",
                        help=f"default {' '.join(map(str, seeds))}")
    options = parser.parse_args(argv)
    options.runs = options.runs.resolve()
    options.records = options.records or options.runs / "records"
    wanted = set(options.rows)
    while missing := {rows[name].begins for name in wanted} & set(rows) - wanted:
        wanted |= missing
    options.rows = [name for name in rows if name in wanted]
    return options


def seconds(folder: Path) -> float:
    """Time of a run's steps."""
    return sum(json.loads(line)["seconds"] for line in (folder / "perf.jsonl").read_text().splitlines())


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def write_json(path: Path, found: dict) -> None:
    """Paths in this repository are written as seen from it: a record is read elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found).replace(f"{ROOT}/", "")
    write_aside(path, lambda partial: partial.write_text(text + "\n"))


def read_records(records: Path) -> dict[str, list[dict]]:
    """The recorded runs of each row, by seed."""
    found: dict[str, list[dict]] = {}
    for path in sorted(records.glob("*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["row"], []).append(record)
    return found


def verdict(left: list[dict], right: list[dict]) -> str:
    """Whether left > right holds: the paired interval over questions excludes 0 and no seed of several disagrees.

    Of each run: "name", "seed", "average": {"em": of its sets}, "correct": a digit for each question of each set.
    """
    seeds = {run["seed"] for run in left} & {run["seed"] for run in right}
    names = f"{left[0]['name']} > {right[0]['name']}"
    if not seeds:
        return f"{names:44} no seed in common"
    left, right = ([run for run in side if run["seed"] in seeds] for side in (left, right))
    mean, low, high = compare_correct(left, right)["average"]
    each = [a["average"]["em"] - b["average"]["em"] for a, b in zip(left, right, strict=True)]
    word = "undecided" if len(each) > 1 else "one seed"
    if len(each) > 1 and (low > 0 and min(each) > 0 or high < 0 and max(each) < 0):
        word = "holds" if low > 0 else "reversed"
    by_seed = ", ".join(f"{value:+.3f}" for value in each)
    return f"{names:44} {word:9} {mean:+.4f} [{low:+.4f}, {high:+.4f}]  seeds {by_seed}"
