"""Experiments: the whole method on the embedded world, as a demonstration and over three seeds.

    python reproduce.py demo      one seed: episodes, kd, dgpo, exact match of four models, curve, an episode
    python reproduce.py rows      every row of the paper's tables: learning rates chosen, then three seeds; for some:
                                  --rows dgpo kd --seeds 0
    python reproduce.py pairs     Table 3: PPO, KD and DGPO with a larger teacher, and of a Llama-type pair
    python reproduce.py report    tables, orderings, times and curves of what is recorded

Every job is a command of train.py or eval.py, printed before it runs; a job whose result is there is not run
again, and training is resumed, so an interrupted call goes on where it stopped. Two cores are enough: processes have
one thread each (models this small gain little from a second), so two jobs run side by side, or one in two processes.
"""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import config
import eval as evaluation
from jobs import (
    CORES,
    ROOT,
    Job,
    eval_job,
    parse_experiment,
    read_records,
    result,
    run_jobs,
    seconds,
    torchrun,
    train_job,
    verdict,
    write_json,
)
from model import load_decoder
from plots import plot_curves, plot_sizes
from settings import DISTIL, TrainSettings

SEEDS = (0, 1, 2)
DEMO_QUESTIONS = 200  # of each test set; experiment main takes all


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
    plot_curves([kd / "metrics.jsonl", dgpo / "metrics.jsonl"], runs / "curve.png")
    for sample in sorted((dgpo / "samples").iterdir())[-1:]:
        print(f"\nEpisodes of the last step that kept samples ({sample}); | marks what the agent wrote\n")
        print(sample.read_text())
    print(f"Curve: {runs / 'curve.png'}. Everything took {time.perf_counter() - started:.0f} s.")


# ---- every row of the paper's tables ----


@dataclass(frozen=True)
class Row:
    label: str
    presets: tuple[str, ...] = ()  # after configs/world.toml
    begins: str = ""  # the row whose model it starts from, or "teacher"; empty: the plain student
    flags: tuple[str, ...] = ()
    rate_of: str = ""  # the row whose choice of learning rate it takes over; empty: it has its own


# What KD and DGPO take together, about five minutes of one thread, is what every other row gets, about; the report has
# the seconds. PPO's first steps are the slowest: a student that has not learnt to stop writes to every limit.
ROWS = {
    "seqkd": Row("SeqKD", ("seqkd",), flags=("--epochs", "7")),
    "kd": Row("KD", flags=("--phase", "kd")),
    "kd-long": Row("KD, as long as DGPO", flags=("--phase", "kd", "--epochs", "16"), rate_of="kd"),
    "gkd": Row("GKD", ("gkd",), flags=("--steps", "300")),
    "distillm": Row("DistiLLM", ("distillm",), flags=("--epochs", "11")),
    "taid": Row("TAID", ("taid",), flags=("--epochs", "11")),
    "ppo": Row("PPO", ("ppo",)),
    "grpo": Row("GRPO", ("grpo",)),
    "sft-ppo": Row("SFT -> PPO", ("sft-ppo",), "seqkd"),
    "dgpo": Row("DGPO", begins="kd", flags=("--phase", "dgpo")),
    "without-cold-start": Row("(a) w/o cold start", ("without-cold-start",)),
    "uniform-kl": Row("(b) uniform KL", ("uniform-kl",), "kd"),
    "without-teacher": Row("(c) w/o teacher guidance", ("without-teacher",), "kd"),
    "ppo-kd": Row("(d) PPO -> KD", ("ppo-kd",), "ppo"),
    "dgpo-grpo": Row("DGPO with GRPO", ("dgpo-grpo",), "kd"),
    "kd-gkd": Row("KD -> GKD", ("kd-gkd",), "kd", flags=("--steps", "180")),
    "teacher-ppo": Row("Teacher, PPO", ("ppo",), "teacher", rate_of="ppo"),
}
# The same tuning for every row: the first seed runs at its preset's learning rate and at twice that, each at the row's
# full length. The one that answers more development questions (all seven styles, about the training half) is the
# row's first seed and gives the others' rate. Chosen after half of the length, on the styles of training alone, rates
# were too high: wordings that training never met were lost; four times KD's rate won there, and lost at full length
# (docs/log.md).
RATES = (1.0, 2.0)
DEVELOPMENT = "world/questions/development.jsonl"
TUNING_SEED = SEEDS[0]
GIVEN = {"student": "Student", "teacher": "Teacher"}
# Other models of the world (world.py build-pairs), at the learning rates that were chosen for the first pair.
PAIRS = {"": "first pair", "larger-teacher": "larger teacher", "llama": "Llama-type"}
PAIR_ROWS = ("ppo", "kd", "dgpo")
TABLES = {
    "Table 2": ("student", "teacher", "ppo", "sft-ppo", "gkd", "seqkd", "kd", "kd-long", "distillm", "taid", "dgpo"),
    "Figure 3": ("student", "ppo", "teacher", "teacher-ppo"),
    "Table 6": ("dgpo", "without-cold-start", "uniform-kl", "without-teacher", "ppo-kd"),
    "Figure 6": ("dgpo", "dgpo-grpo", "without-cold-start", "gkd", "kd-gkd", "ppo", "grpo"),
}
# The paper's averages over its seven sets (Tables 2 and 6, exact match): other models, another corpus, other questions.
PAPER = {"student": 0.006, "teacher": 0.353, "ppo": 0.238, "sft-ppo": 0.289, "gkd": 0.240, "seqkd": 0.275, "kd": 0.298,
         "distillm": 0.287, "taid": 0.282, "dgpo": 0.329, "without-cold-start": 0.320, "uniform-kl": 0.314,
         "without-teacher": 0.306, "ppo-kd": 0.286}
FIGURES = {"figure-4": ("ppo", "grpo"), "figure-6": TABLES["Figure 6"]}  # training curves
ORDERINGS = [("kd", "seqkd"), *(("dgpo", row) for row in (
    "kd", "kd-long", "ppo", "gkd", "distillm", "taid", "sft-ppo", "without-cold-start", "uniform-kl", "without-teacher",
    "ppo-kd", "dgpo-grpo", "kd-gkd"))]  # fmt: skip
CURVE = ("rollout/score", "eval/score", "loss/entropy", "rollout/kl_student_guide", "rollout/searches",
         "rollout/agent_tokens", "rollout/invalid", "rollout/max_tokens")  # fmt: skip


def row_jobs(
    runs: Path, records: Path, names: Sequence[str], seeds: Sequence[int], models: Path = ROOT / "world",
    tuned: Path | None = None,
) -> list[Job]:
    """Teacher episodes, the choice of learning rates, training, evaluation and ARCap of these rows.

    models: the folder of student and teacher; tuned: records of rows whose choice is taken over, for other models.
    """
    teacher = ["--teacher", str(models / "teacher")]
    jobs = [episodes_job(runs, seed, teacher) for seed in sorted({*seeds} if tuned else {TUNING_SEED, *seeds})]
    for name in names if tuned is None else ():
        if not ROWS[name].rate_of:
            jobs += tuning_jobs(runs, records, name)
    for name in GIVEN:
        out = runs / f"eval-{name}"
        jobs += measure(name, GIVEN[name], models / name, out, (), records / f"{name}.json",
                        has_arcap=tuned is None)
    for seed in seeds:
        for name in names:
            row, folder = ROWS[name], runs / f"{name}-{seed}"
            student = models / (row.begins or "student")
            if row.begins in ROWS:
                student = runs / f"{row.begins}-{seed}"

            def flags(name=name, seed=seed, folder=folder, student=student) -> list[str]:
                best = best_run(tuned or records, row_of_rate(name))
                chosen = runs / f"tune-{name}-{best['run']}"
                if tuned is None and seed == TUNING_SEED and (chosen / "model.safetensors").exists():
                    return ["-c", "import os, sys; os.symlink(*sys.argv[1:])", chosen.name, str(folder)]
                return row_command(runs, name, seed, folder, student, best["times"], *teacher)

            needs = (f"episodes {seed}", *([f"{row.begins} {seed}"] if row.begins in ROWS else []))
            needs += tuple(f"judge {row_of_rate(name)} {k}" for k in range(len(RATES)) if tuned is None)
            jobs.append(Job(f"{name} {seed}", flags, folder / "model.safetensors", needs))
            jobs += measure(f"{name} {seed}", row.label, folder, runs / f"eval-{name}-{seed}", (f"{name} {seed}",),
                            records / f"{name}-{seed}.json", has_arcap=tuned is None and name in TABLES["Table 2"])
    return jobs


def episodes_job(runs: Path, seed: int, teacher: list[str]) -> Job:
    episodes = runs / f"episodes-{seed}.jsonl"
    ask = ["train.py", "--phase", "episodes", "--episodes", str(episodes), "--seed", str(seed), *teacher]
    return Job(f"episodes {seed}", lambda: ask, episodes)


def row_command(runs: Path, name: str, seed: int, folder: Path, student: Path, rate: float, *flags: str) -> list[str]:
    """Arguments that train a row at a multiple of its preset's learning rate."""
    row, settings = ROWS[name], row_settings(name)
    which = rate_setting(settings.phase)
    presets = [f"configs/{preset}.toml" for preset in ("world", *row.presets)]
    return ["train.py", "--config", *presets, *row.flags, "--student", str(student), "--episodes",
            str(runs / f"episodes-{seed}.jsonl"), "--run-dir", str(folder), "--seed", str(seed), "--save-every", "10",
            "--resume", "--" + which.replace("_", "-"), f"{getattr(settings, which) * rate:g}", *flags]


def row_of_rate(name: str) -> str:
    return ROWS[name].rate_of or name


def rate_setting(phase: str) -> str:
    return "kd_lr" if phase in DISTIL else "actor_lr"


def row_settings(name: str) -> TrainSettings:
    """What presets and flags of the row say."""
    presets = [str(ROOT / "configs" / f"{preset}.toml") for preset in ("world", *ROWS[name].presets)]
    return config.load(TrainSettings, ["--config", *presets, *ROWS[name].flags], prog="train.py", description="")


def tuning_jobs(runs: Path, records: Path, name: str) -> list[Job]:
    """The row's first seed at each of the learning rates, and their scores on development questions."""
    begins, jobs = ROWS[name].begins, []
    student = runs / f"{begins}-{TUNING_SEED}" if begins in ROWS else ROOT / "world" / (begins or "student")
    needs = (f"episodes {TUNING_SEED}", *([f"{begins} {TUNING_SEED}"] if begins in ROWS else []))
    for k, rate in enumerate(RATES):
        folder, out = runs / f"tune-{name}-{k}", runs / f"eval-tune-{name}-{k}"
        command = row_command(runs, name, TUNING_SEED, folder, student, rate)
        judge = ["eval.py", "--model", str(folder), "--out", str(out), "--questions", DEVELOPMENT]
        jobs += [
            Job(f"tune {name} {k}", lambda command=command: command, folder / "model.safetensors", needs),
            Job(f"judge {name} {k}", lambda judge=judge: judge, tuning_record(records, name, k), (f"tune {name} {k}",),
                after=lambda k=k, folder=folder, out=out: write_tuning(records, name, k, folder, out)),
        ]
    return jobs


def best_run(records: Path, name: str) -> dict:
    """The record of the row's best tuning run; of equals the first."""
    found = [json.loads(tuning_record(records, name, k).read_text()) for k in range(len(RATES))]
    return max(found, key=lambda run: run["score"])  # max takes the first of equals


def tuning_record(records: Path, name: str, k: int) -> Path:
    return records / "tuning" / f"{name}-{k}.json"


def write_tuning(records: Path, name: str, k: int, folder: Path, out: Path) -> None:
    """What a tuning run has come to."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "run.json").read_text())["settings"]
    which = rate_setting(settings["phase"])
    found = {"row": name, "run": k, "times": round(settings[which] / getattr(row_settings(name), which), 3),
             "score": result(out)["average"]["em"], "num_steps": len(metrics), "train_s": seconds(folder),
             "collapsed": (folder / "collapse.txt").exists(), "settings": settings}
    write_json(tuning_record(records, name, k), found)


def measure(
    name: str, label: str, model: Path, out: Path, needs: tuple[str, ...], record: Path, *, has_arcap: bool
) -> list[Job]:
    """Exact match of a model, and ARCap where it is wanted, in one file that the repository keeps."""
    given = ["--model", str(model), "--name", label, "--out", str(out)]
    jobs = [
        Job(f"eval {name}", lambda: ["eval.py", *given], out / "result.json", needs),
        Job(f"arcap {name}", lambda: ["eval.py", "arcap", *given, "--limit", "200"], out / "arcap.json",
            (f"eval {name}",)),
    ][: 1 + has_arcap]
    return [*jobs[:-1], replace(jobs[-1], done=record, after=lambda: write_record(name, model, out, record))]


def write_record(name: str, model: Path, out: Path, record: Path) -> None:
    """What tables, intervals and plots need of a run, in one file."""
    row, *seed = name.split()
    rows = [json.loads(line) for line in (out / "result.jsonl").read_text().splitlines()]
    correct: dict[str, str] = {}
    for scored in rows:
        correct[scored["set"]] = correct.get(scored["set"], "") + str(int(scored["em"]))
    found = result(out) | {"row": row, "seed": int(seed[0]) if seed else None, "correct": correct}
    if (out / "arcap.json").exists():
        found["arcap"] = json.loads((out / "arcap.json").read_text())["arcap"]
    found |= {"machine": f"{os.cpu_count()} cores, {platform.machine()}, one thread a process"}
    if (model / "run.json").exists():
        about = json.loads((model / "run.json").read_text())
        metrics, perf = (
            [json.loads(line) for line in (model / f"{kind}.jsonl").read_text().splitlines()]
            for kind in ("metrics", "perf"))
        found |= {"train": about, "num_steps": len(metrics), "train_s": seconds(model)}
        found["step_s"] = {key: sum(r[key] for r in perf) / len(perf) for key in ("rollout_s", "score_s", "update_s")
                           if key in perf[0]}
        reinforces = about["settings"]["phase"] in ("ppo", "grpo", "dgpo")
        found["collapsed"] = reinforces and len(metrics) < about["settings"]["steps"]
        found["curve"] = [{"step": m["step"]} | {key: round(m[key], 4) for key in CURVE if m.get(key) is not None}
                          for m in metrics if any(key in m for key in CURVE)]
    write_json(record, found)


def report(records: Path) -> str:
    """The tables, every ordering that the paper claims, times and stability, from what is recorded."""
    found = read_records(records)
    if not found:
        raise RuntimeError(f"{records}: got no recorded results, expected some; python reproduce.py rows makes them")
    lines = []
    for title, names in TABLES.items():
        present = [record for name in names for record in found.get(name, [])]
        if present:
            paper = {record["name"]: PAPER.get(record["row"]) for record in present}
            lines += [f"{title}, exact match, greedy; mean over seeds, standard deviation of the average\n",
                      evaluation.table(present, beside={"paper's Avg.": paper}), ""]
    present = [record for name in TABLES["Table 2"] for record in found.get(name, [])]
    lines += ["Table 3, average exact match of each pair of models\n", pairs_table(records), ""]
    lines += ["ARCap (Table 5), 200 questions a set\n", evaluation.arcap_table(present), ""]
    lines += ["Orderings that the paper claims: difference of the averages over sets, paired 95 % interval\n"]
    for left, right in ORDERINGS:
        if {run["seed"] for run in found.get(left, [])} & {run["seed"] for run in found.get(right, [])}:
            lines.append(verdict(found[left], found[right]))
    if "dgpo" in found and "teacher" in found:
        lines.append(f"DGPO - teacher: {against_teacher(found['dgpo'], found['teacher'])}")
    for pair, label in [*PAIRS.items()][1:]:
        others = read_records(records / pair)
        lines += [f"{label}: {verdict(others['dgpo'], others[row])}" for row in ("kd", "ppo")
                  if "dgpo" in others and row in others]
    lines += ["", "Training, seconds on one thread; best and last sampled score of a step (mean of 5), collapses\n"]
    for name, runs_of in found.items():
        if name in ROWS:
            took = ", ".join(f"{run['train_s']:.0f}" for run in runs_of)
            ends = [stability(run["curve"]) for run in runs_of]
            text = "; ".join(f"{best:.2f} -> {last:.2f}" for best, last in ends if not math.isnan(best))
            collapsed = sum(run["collapsed"] for run in runs_of)
            lines.append(f"{ROWS[name].label:26} {took:20} {text}  {collapsed} collapsed")
    lines += ["", overhead(found), ""]
    lines += ["Tuning: exact match on development questions, at multiples of the preset's learning rate\n"]
    for name in ROWS:
        if all(tuning_record(records, name, k).exists() for k in range(len(RATES))):
            runs_of = [json.loads(tuning_record(records, name, k).read_text()) for k in range(len(RATES))]
            text = ", ".join(f"x{run['times']:g} {run['score']:.3f}" for run in runs_of)
            lines.append(f"{ROWS[name].label:26} {text}; taken x{best_run(records, name)['times']:g}")
    return "\n".join(lines)


def against_teacher(student: list[dict], teacher: list[dict]) -> str:
    """The difference on each set; a mark where the paired interval over questions excludes 0."""
    found = evaluation.compare_correct(student, teacher)
    return "  ".join(f"{evaluation.NAMES.get(name, name)} {value:+.3f}{'!' if low > 0 or high < 0 else ''}"
                     for name, (value, low, high) in found.items() if name != "all")


def overhead(found: dict[str, list[dict]]) -> str:
    """What the teacher's guidance adds to the time of training: DGPO against the same without a teacher."""
    pairs = [(run["train_s"], other["train_s"]) for run in found.get("dgpo", [])
             for other in found.get("without-teacher", []) if run["seed"] == other["seed"]]
    if not pairs:
        return "The teacher's overhead: not recorded"
    ratios = ", ".join(f"{a / b - 1:+.1%}" for a, b in pairs)
    return f"The teacher's overhead in training time, each seed (paper: 9.5 %): {ratios}"


def plot(records: Path) -> None:
    """The paper's figures of training curves, beside the records' folder."""
    for figure, names in FIGURES.items():
        paths = [path for name in names for path in sorted(records.glob(f"{name}-[0-9]*.json"))]
        if paths:
            plot_curves(paths, records.with_name(f"{records.name}-{figure}.png"))
    found = read_records(records)
    sizes = {name: sum(p.numel() for p in load_decoder(ROOT / "world" / name).parameters()) for name in GIVEN}
    series = {"as it is": ("student", "teacher"), "after PPO": ("ppo", "teacher-ppo")}
    if all(name in found for names in series.values() for name in names):
        plot_sizes({label: [(size, float(np.mean([run["average"]["em"] for run in found[name]])))
                            for size, name in zip(sizes.values(), names, strict=True)]
                    for label, names in series.items()}, records.with_name(f"{records.name}-figure-3.png"))


def stability(curve: list[dict]) -> tuple[float, float]:
    """(best, last) mean of five steps' sampled scores; NaN where nothing was sampled."""
    scores = [point["rollout/score"] for point in curve if "rollout/score" in point]
    means = [sum(scores[i : i + 5]) / 5 for i in range(len(scores) - 4)]
    return (max(means), means[-1]) if means else (math.nan, math.nan)


def pairs(runs: Path, records: Path, seeds: Sequence[int]) -> None:
    """Build the other models, run Table 3's rows with them and print the report."""
    if missing := [name for name in PAIR_ROWS if not tuning_record(records, name, len(RATES) - 1).exists()]:
        raise RuntimeError(f"{records}: got no learning rates of {', '.join(missing)}, expected those that python "
                           "reproduce.py rows chooses")
    built = ROOT / "runs" / "world" / "pairs"
    run_jobs([Job("build pairs", lambda: ["world.py", "build-pairs"], built / "llama" / "teacher" / "model.safetensors",
                  cores=CORES)], runs / "logs")  # fmt: skip
    for pair in [pair for pair in PAIRS if pair]:
        run_jobs(row_jobs(runs / pair, records / pair, PAIR_ROWS, seeds, built / pair, tuned=records),
                 runs / pair / "logs")  # fmt: skip
    print(report(records))


def pairs_table(records: Path) -> str:
    """Table 3: averages of each pair, mean and standard deviation over seeds."""
    found = {label: read_records(records / pair) for pair, label in PAIRS.items()}
    lines = [["", *PAIRS.values()]]
    for name in ("student", "teacher", *PAIR_ROWS):
        cells = []
        for rows_of in found.values():
            averages = [run["average"]["em"] for run in rows_of.get(name, [])]
            spread = f" \u00b1{np.std(averages, ddof=1):.3f}" if len(averages) > 1 else ""
            cells.append(f"{np.mean(averages):.3f}{spread}" if averages else "-")
        lines.append([GIVEN.get(name) or ROWS[name].label, *cells])
    return evaluation.align(lines)


def main(argv: list[str]) -> None:
    folder = "demo" if argv[:1] == ["demo"] else "rows"
    options = parse_experiment(argv, "reproduce.py", __doc__, ROWS, SEEDS, folder, ("demo", "rows", "pairs", "report"))
    if options.experiment == "demo":
        demo(options.runs)
    elif options.experiment == "rows":
        run_jobs(row_jobs(options.runs, options.records, options.rows, options.seeds), options.runs / "logs")
        print(report(options.records))
    elif options.experiment == "pairs":
        pairs(options.runs, options.records, options.seeds)
    else:
        print(report(options.records))
        plot(options.records)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"reproduce.py: {error}")
