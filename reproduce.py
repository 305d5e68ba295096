"""Experiments: the whole method on the embedded world, as a demonstration and over three seeds.

    python reproduce.py demo      one seed: episodes, kd, dgpo, exact match of four models, curve, an episode
    python reproduce.py main      three seeds: DGPO against KD, KD continued for the same wall time, KD -> PPO
                                  without the teacher; paired bootstrap intervals on all test questions

Every job is a command of train.py or eval.py, printed before it runs; a job whose result is there is not run
again, so an interrupted call goes on where it stopped. Two cores are enough: processes have one thread each (models
this small gain little from a second), so two jobs run side by side, or one job in two processes.
Results: runs/demo and runs/main.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import eval as evaluation

ROOT = Path(__file__).resolve().parent
CORES = 2
SEEDS = (0, 1, 2)
DEMO_QUESTIONS = 200  # of each test set; experiment main takes all


@dataclass(frozen=True)
class Job:
    name: str
    flags: Callable[[], list[str]]  # called when the job starts: it may depend on what ran before
    done: Path  # the file whose presence says that the job has ended well
    needs: tuple[str, ...] = ()
    cores: int = 1


def torchrun(processes: int) -> list[str]:
    """`torchrun train.py` for this interpreter; one process needs no launcher."""
    if processes == 1:
        return ["train.py"]
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "train.py"]


def train_job(
    name: str, phase: str, folder: Path, *flags: str, needs: tuple[str, ...] = (), processes: int = 1
) -> Job:
    command = [*torchrun(processes), "--phase", phase, "--run-dir", str(folder), "--overwrite", *flags]
    return Job(name, lambda: command, folder / "model.safetensors", needs, processes)


def eval_job(name: str, model: Path, out: Path, *flags: str, needs: tuple[str, ...] = ()) -> Job:
    command = ["eval.py", "--model", str(model), "--name", name, "--out", str(out), *flags]
    return Job(f"eval {out.name}", lambda: command, out / "result.json", needs)


def run_jobs(jobs: list[Job], logs: Path) -> None:
    """Run the jobs in order as cores become free, each once its needs are met; stop at the first failure."""
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
        if code or not job.done.exists():
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{job.name} failed with exit status {code}; the end of {log}:\n{tail}")
        return job

    met = {job.name for job in jobs if job.done.exists()}
    waiting = [job for job in jobs if job.name not in met]
    running: set[Future] = set()
    free = CORES
    with ThreadPoolExecutor(CORES) as pool:
        while waiting or running:
            for job in [job for job in waiting if met.issuperset(job.needs)]:
                if job.cores <= free:
                    free -= job.cores
                    waiting.remove(job)
                    running.add(pool.submit(run, job))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for job in [future.result() for future in finished]:
                free += job.cores
                met.add(job.name)
    print(f"[{time.perf_counter() - started:5.0f} s] all jobs done", flush=True)


def seconds(folder: Path) -> float:
    """Time of a run's steps."""
    return sum(json.loads(line)["seconds"] for line in (folder / "perf.jsonl").read_text().splitlines())


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def demo(runs: Path) -> None:
    started = time.perf_counter()
    episodes = str(runs / "episodes.jsonl")
    kd, dgpo = runs / "kd", runs / "dgpo"
    ask_teacher = [*torchrun(2), "--phase", "episodes", "--episodes", episodes]
    limit = ("--limit", str(DEMO_QUESTIONS))
    jobs = [
        Job("episodes", lambda: ask_teacher, Path(episodes), cores=2),
        train_job("kd", "kd", kd, "--episodes", episodes, needs=("episodes",), processes=2),
        train_job("dgpo", "dgpo", dgpo, "--student", str(kd), needs=("kd",), processes=2),
        eval_job("DGPO", dgpo, runs / "eval-dgpo", *limit, needs=("dgpo",)),
        eval_job("KD", kd, runs / "eval-kd", *limit, needs=("dgpo",)),
        eval_job("Teacher", ROOT / "world/teacher", runs / "eval-teacher", *limit, needs=("dgpo",)),
        eval_job("Student", ROOT / "world/student", runs / "eval-student", *limit, needs=("dgpo",)),
    ]
    run_jobs(jobs, runs / "logs")
    names = ("student", "teacher", "kd", "dgpo")
    print(f"\nExact match, greedy, on {DEMO_QUESTIONS} test questions of each set of the embedded world\n")
    print(evaluation.table([result(runs / f"eval-{name}") for name in names]))
    evaluation.plot_curves([kd / "metrics.jsonl", dgpo / "metrics.jsonl"], runs / "curve.png")
    for sample in sorted((dgpo / "samples").iterdir())[-1:]:
        print(f"\nEpisodes of the last step that kept samples ({sample}); | marks what the agent wrote\n")
        print(sample.read_text())
    print(f"Curve: {runs / 'curve.png'}. Everything took {time.perf_counter() - started:.0f} s.")


METHODS = {"kd": "KD", "kd-continued": "KD continued", "ppo": "KD -> PPO, no teacher", "dgpo": "DGPO"}


def kd_continued(runs: Path, seed: int) -> list[str]:
    """KD from where it ended, with as many steps as fit into the time DGPO took."""
    kd, dgpo = runs / f"kd-{seed}", runs / f"dgpo-{seed}"
    num_kd_steps = len((kd / "perf.jsonl").read_text().splitlines())
    num_steps = math.ceil(seconds(dgpo) / (seconds(kd) / num_kd_steps))
    epochs = json.loads((kd / "run.json").read_text())["settings"]["epochs"] * num_steps / num_kd_steps
    command = ["train.py", "--phase", "kd", "--run-dir", str(runs / f"kd-continued-{seed}"), "--overwrite"]
    command += ["--student", str(kd), "--episodes", str(runs / f"episodes-{seed}.jsonl"), "--seed", str(seed)]
    return [*command, "--epochs", f"{epochs:.3f}"]


def main_jobs(runs: Path) -> list[Job]:
    jobs: list[Job] = []
    for seed in SEEDS:
        episodes, kd, same_seed = runs / f"episodes-{seed}.jsonl", runs / f"kd-{seed}", ("--seed", str(seed))
        ask_teacher = ["train.py", "--phase", "episodes", "--episodes", str(episodes), *same_seed]
        jobs.append(Job(f"episodes {seed}", lambda flags=ask_teacher: flags, episodes))
        taught = (f"episodes {seed}",)
        jobs.append(train_job(f"kd {seed}", "kd", kd, "--episodes", str(episodes), *same_seed, needs=taught))
        for name, phase, *flags in (("dgpo", "dgpo"), ("ppo", "ppo", "--kl-where", "none")):
            flags = ("--student", str(kd), *flags, *same_seed)
            jobs.append(train_job(f"{name} {seed}", phase, runs / f"{name}-{seed}", *flags, needs=(f"kd {seed}",)))
        longer = runs / f"kd-continued-{seed}" / "model.safetensors"
        jobs.append(Job(f"kd-continued {seed}", lambda seed=seed: kd_continued(runs, seed), longer, (f"dgpo {seed}",)))
    for name in ("student", "teacher"):
        jobs.append(eval_job(name.capitalize(), ROOT / "world" / name, runs / f"eval-{name}"))
    for seed in SEEDS:
        for method, name in METHODS.items():
            model, out = runs / f"{method}-{seed}", runs / f"eval-{method}-{seed}"
            jobs.append(eval_job(name, model, out, needs=(f"{method} {seed}",)))
    return jobs


def main_report(runs: Path) -> str:
    """Tables, and DGPO minus each other method with its interval."""
    rows = [result(runs / f"eval-{name}") for name in ("student", "teacher")]
    rows += [result(runs / f"eval-{method}-{seed}") for method in METHODS for seed in SEEDS]
    report = ["Exact match, greedy; one row a seed\n", evaluation.table(rows), ""]
    report.append("DGPO minus another: mean over seeds, 95 % paired bootstrap interval over questions\n")
    ours = [runs / f"eval-dgpo-{seed}" / "result.json" for seed in SEEDS]
    for method in ("kd", "kd-continued", "ppo"):
        theirs = [runs / f"eval-{method}-{seed}" / "result.json" for seed in SEEDS]
        for part, (mean, low, high) in evaluation.compare(ours, theirs).items():
            report.append(f"{METHODS[method]:24} {part:16} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    report.append("")
    times = {method: [round(seconds(runs / f"{method}-{seed}")) for seed in SEEDS] for method in METHODS}
    report.append("Seconds of training, one thread: " + "; ".join(f"{METHODS[m]} {t}" for m, t in times.items()))
    return "\n".join(report)


def main_comparison(runs: Path) -> None:
    run_jobs(main_jobs(runs), runs / "logs")
    (runs / "report.txt").write_text(main_report(runs) + "\n")
    curves = [runs / f"{method}-{seed}" / "metrics.jsonl" for method in ("kd", "dgpo", "ppo") for seed in SEEDS]
    evaluation.plot_curves(curves, runs / "curves.png")
    print(main_report(runs))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("demo", "main"))
    parser.add_argument("--runs", type=Path, help="where the runs are kept (default runs/<experiment>)")
    options = parser.parse_args(argv)
    runs = options.runs or ROOT / "runs" / options.experiment
    (demo if options.experiment == "demo" else main_comparison)(runs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RuntimeError as error:
        sys.exit(f"reproduce.py: {error}")
