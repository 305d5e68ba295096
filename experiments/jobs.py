"""Jobs of an experiment: commands of this project, run side by side, each of them once.

An experiment that was interrupted goes on where it stopped when it is called again. A process has
one thread, because the models of the embedded world gain little from a second one. So two jobs run
beside each other on two cores, or one job in two processes. A job may ask for more threads.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORES = 2


@dataclass(frozen=True)
class Job:
    """One command. It needs other jobs, and it has ended well once its file `done` exists."""

    name: str
    # Returns the arguments of Python. It is called when the job starts, so the command may depend
    # on what ran before. An empty command runs nothing, and `after` does the work.
    command: Callable[[], list[str]]
    done: Path
    needs: tuple[str, ...] = ()  # names of jobs
    cores: int = 1
    after: Callable[[], None] | None = None  # called here once the command has ended well
    threads: int = 1  # of a process; no more than its share of the cores


def torchrun(processes: int) -> list[str]:
    """`torchrun train.py` for this interpreter; one process needs no launcher."""
    if processes == 1:
        return ["train.py"]
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), "train.py"]


def train_job(
    name: str,
    phase: str,
    folder: Path,
    *flags: str,
    needs: tuple[str, ...] = (),
    processes: int = 1,
) -> Job:
    run = ["--phase", phase, "--run-dir", str(folder), "--resume"]
    command = [*torchrun(processes), *run, *flags]
    return Job(name, lambda: command, folder / "model.safetensors", needs, processes)


def eval_job(name: str, model: Path, out: Path, *flags: str, needs: tuple[str, ...] = ()) -> Job:
    command = ["eval.py", "--model", str(model), "--name", name, "--out", str(out), *flags]
    return Job(f"eval {out.name}", lambda: command, out / "result.json", needs)


def run_jobs(jobs: list[Job], logs: Path) -> None:
    """Run the jobs in order, as cores become free and needs are met; stop at the first failure.

    A job that is needed by finished jobs only is left out: a record may be kept without the
    weights that it was measured on. Raises RuntimeError with the end of the failed job's log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def run(job: Job) -> Job:
        run_job(job, logs, started)
        return job

    finished = {job.name for job in jobs if job.done.exists()}
    waiting = wanted(jobs, finished)
    running: set[Future[Job]] = set()
    free = CORES
    with ThreadPoolExecutor(CORES) as pool:
        while waiting or running:
            for job in [job for job in waiting if finished.issuperset(job.needs)]:
                if job.cores <= free:
                    free -= job.cores
                    waiting.remove(job)
                    running.add(pool.submit(run, job))
            if not running:
                names = ", ".join(job.name for job in waiting)
                raise RuntimeError(
                    f"{names}: got needs that no job meets, or more than {CORES} cores"
                )
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for job in [future.result() for future in ended]:
                free += job.cores
                finished.add(job.name)
    print(f"[{time.perf_counter() - started:5.0f} s] all jobs done", flush=True)


def run_job(job: Job, logs: Path, started: float) -> None:
    """Run one job to its end. Raises RuntimeError if it fails or does not leave its file."""
    command = job.command()
    text = shlex.join(["python", *command]) if command else "no command to run"
    print(f"[{time.perf_counter() - started:5.0f} s] {job.name}: {text}", flush=True)
    log = logs / f"{job.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        status = run_python(command, file, job.threads) if command else 0
    if (job.done.parent / "collapse.txt").exists():
        status = 0  # the run left its best weights, and they are its result
    if status == 0 and job.after:
        job.after()
    if status or not job.done.exists():
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(
            f"{job.name} failed with exit status {status}; the end of {log}:\n{tail}"
        )


def run_python(arguments: list[str], output: object, threads: int = 1) -> int:
    """Run Python from the project's folder; returns its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment
    ).returncode


def wanted(jobs: list[Job], finished: set[str]) -> list[Job]:
    """The unfinished jobs that no job needs, and all unfinished jobs that these need, in order."""
    by_name = {job.name: job for job in jobs}
    needed_by_some = {need for job in jobs for need in job.needs}
    names = by_name.keys() - needed_by_some - finished
    frontier = names
    while frontier:
        needs = {need for name in frontier if name in by_name for need in by_name[name].needs}
        frontier = needs - names - finished
        names = names | frontier
    return [job for job in jobs if job.name in names]
