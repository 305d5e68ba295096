"""BARD on the embedded world's trails, beside its parts, another reward and truncation.

    python -m experiments.bard run       build the models; train and measure what is not recorded
    python -m experiments.bard report    tables, orderings and a plot of what is recorded

Rows, each over three seeds
    agnostic    sft on the teacher's natural chains; no budget is told, a hard stop keeps to it
    sft         bard-sft alone
    rl          bard-rl alone, from the agnostic student
    bard        bard-sft, then bard-rl with the product of correctness and fidelity
    additive    the same with their sum
    guided      BARD, and on all answers the exact KL to sft-teacher
    sft-teacher bard-sft of the teacher, which guides: a teacher that has been told budgets
Each row distils on about as many tokens: a chain in up to sixteen versions, or the chain ten times.
The rows that are reinforced take the same number of steps. An interrupted run goes on when it is
called again.
"""

import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from eval import align, bootstrap
from experiments.jobs import CORES, ROOT, Job, run_jobs
from experiments.plots import plot_budgets
from experiments.rows import (
    Record,
    Row,
    common_seeds,
    config_flags,
    differences_text,
    mean_and_deviation,
    parse_experiment,
    read_json,
    read_lines,
    recorded_rows,
    row_record,
    train_command,
    training_record,
    write_json,
)
from infra.cli import reporting

TRAILS = ROOT / "runs" / "trails"  # models and questions that world.build makes
# Budgets that are measured: some of those in configs/bard.toml, and some between them.
TRAINED, HELD_OUT = (38, 64, 128, 256, 384), (48, 96, 192, 288)
MEASURED = tuple(sorted(TRAINED + HELD_OUT))
NUM_QUESTIONS = 200  # of the 500 test questions
NUM_QUESTIONS_EVERY = 100  # where all trained budgets are measured
PRESETS = ("world", "bard")
ROWS = {
    "agnostic": Row(
        "agnostic, truncated",
        "sft",
        flags=(
            "--epochs", "10", "--batch-size", "16", "--kd-lr", "2e-3", "--eval-every", "500",
        ),
        measure=("--budget-text", ""),
    ),
    "sft": Row("SFT only", "bard-sft"),
    "sft-teacher": Row("SFT of the teacher", "bard-sft"),
    "rl": Row("RL only", "bard-rl", begins="agnostic"),
    "bard": Row("BARD", "bard-rl", begins="sft"),
    # This reward pays for short wrong answers. The guard against a collapse is off, so that the row
    # shows what comes of it.
    "additive": Row(
        "additive reward",
        "bard-rl",
        begins="sft",
        flags=("--budget-reward", "additive", "--no-stop-on-collapse"),
    ),
    "guided": Row(
        "BARD, guided",
        "bard-rl",
        begins="sft",
        teacher="sft-teacher",
        flags=("--kl-where", "all", "--kl-in", "exact"),
    ),
}
MEASURED_AT_EVERY = ("bard", "guided")
COMPARED = {"bard": ("agnostic", "sft", "rl", "additive", "guided"), "guided": ("sft",)}
STARTS = {"sft-teacher": TRAILS / "teacher"}  # the rows that do not begin from the student


def row_jobs(runs: Path, records: Path, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Compressed chains, training and measuring of these rows."""
    jobs = []
    for seed in seeds:
        jobs.append(data_job(runs, seed))
        for name in names:
            jobs.append(row_job(runs, name, seed))
            jobs += measure_jobs(runs, records, name, seed)
    return jobs


def versions(runs: Path, seed: int) -> Path:
    """The episodes file of phase bard-data; the natural chains lie beside it as .chains.jsonl."""
    return runs / f"versions-{seed}.jsonl"


def data_job(runs: Path, seed: int) -> Job:
    """Ask the teacher for chains and compress them."""
    out = versions(runs, seed)
    phase = ["train.py", *config_flags(PRESETS), "--phase", "bard-data"]
    command = [*phase, "--episodes", str(out), "--seed", str(seed)]
    return Job(f"data {seed}", lambda: command, out)


def row_job(runs: Path, name: str, seed: int) -> Job:
    """Train a row."""
    row, folder = ROWS[name], runs / f"{name}-{seed}"
    student = runs / f"{row.begins}-{seed}" if row.begins else STARTS.get(name, TRAILS / "student")
    episodes = versions(runs, seed)
    if row.phase == "sft":
        episodes = episodes.with_suffix(".chains.jsonl")
    command = train_command(row, PRESETS, student=student, run_dir=folder, seed=seed)
    command += ["--save-every", "20"]
    if row.teacher:
        command += ["--teacher", str(runs / f"{row.teacher}-{seed}")]
    if row.phase != "bard-rl":
        command += ["--episodes", str(episodes)]
    needs = (f"data {seed}", *(f"{other} {seed}" for other in (row.begins, row.teacher) if other))
    return Job(f"{name} {seed}", lambda: command, folder / "model.safetensors", needs)


def measure_jobs(runs: Path, records: Path, name: str, seed: int) -> list[Job]:
    """Measure a row at nine budgets, and those of MEASURED_AT_EVERY at all trained ones."""
    model, out = runs / f"{name}-{seed}", runs / f"eval-{name}-{seed}"
    record = records / f"{name}-{seed}.json"
    jobs, needs = [], (f"{name} {seed}",)
    if name in MEASURED_AT_EVERY:
        all_trained = tomllib.loads((ROOT / "configs" / "bard.toml").read_text())["bard"]["budgets"]
        every = out_of_every(out)
        command = measure_command(name, model, every, all_trained, NUM_QUESTIONS_EVERY)
        job = f"every budget {seed}"
        jobs.append(Job(job, lambda: command, every / "budgets.json", needs))
        needs += (job,)

    def keep() -> None:
        write_record(name, seed, model, out, record)

    measure = measure_command(name, model, out, MEASURED, NUM_QUESTIONS)
    jobs.append(Job(f"measure {name} {seed}", lambda: measure, record, needs, after=keep))
    return jobs


def out_of_every(out: Path) -> Path:
    """Where the measures of every trained budget lie, beside those of a few with more questions."""
    return out.with_name(f"{out.name}-every")


def measure_command(
    name: str, model: Path, out: Path, budgets: Sequence[int], limit: int
) -> list[str]:
    questions = ["--questions", str(TRAILS / "test.jsonl"), "--limit", str(limit)]
    command = ["bard.py", "measure", *config_flags(PRESETS), "--model", str(model)]
    command += ["--name", ROWS[name].label, "--out", str(out), *questions]
    return [*command, "--budgets", ",".join(map(str, budgets)), *ROWS[name].measure]


def write_record(name: str, seed: int, model: Path, out: Path, record: Path) -> None:
    """Write what the report needs of a run."""
    result = read_json(out / "budgets.json")
    rows = read_lines(out / "budgets.jsonl")
    correct = {}
    for budget in MEASURED:
        digits = [str(int(row["correct"])) for row in rows if row["budget"] == budget]
        correct[budget] = "".join(digits)
    result.update(row_record(name, seed), correct=correct)
    # Adherence of right and of wrong answers, where no hard stop ended the thinking.
    for key, is_right in (("adherence_right", 1), ("adherence_wrong", 0)):
        kept = [row["length"] <= row["budget"] for row in rows if row["correct_free"] == is_right]
        result[key] = float(np.mean(kept or [True]))
    result.update(training_record(model))
    every = out_of_every(out) / "budgets.json"
    if every.exists():
        measures = read_json(every)["budgets"]
        result["every_adherence"] = {budget: m["adherence"] for budget, m in measures.items()}
    write_json(record, result)


# ---- report ----

TITLES = {
    "adherence": "Adherence P(l <= b)",
    "accuracy": "Accuracy with a hard stop at b",
    "accuracy_free": "Accuracy without a stop",
    "length": "Tokens thought",
    "overshoot": "Overshoot E max(0, l - b) / b",
    "relative_error": "Relative error E |l - b| / b",
    "use": "Use E l / b",
}


def report(records: Path) -> str:
    """Measures at each budget, means over seeds, and the orderings with paired intervals."""
    runs_of = recorded_rows(records, "experiments.bard run")
    lines = []
    for key, title in TITLES.items():
        lines += [f"{title}; * never trained on\n", budget_table(runs_of, key), ""]
    lines += [summary_table(runs_of), ""]
    for name in MEASURED_AT_EVERY:
        lines += every_budget_lines(ROWS[name].label, runs_of.get(name, []))
    lines.append(
        "Accuracy with a hard stop: differences; ! the paired 95 % interval over questions "
        "excludes 0\n"
    )
    for name, others in COMPARED.items():
        for other in others:
            if common_seeds(runs_of.get(name, []), runs_of.get(other, [])):
                text = accuracy_differences(runs_of[name], runs_of[other])
                lines.append(f"{ROWS[name].label} > {ROWS[other].label}: {text}")
    return "\n".join(lines)


def budget_table(runs_of: dict[str, list[Record]], key: str) -> str:
    """One measure: a line for each row, a column for each budget, means over seeds."""
    lines = [["", *(f"{b}*" if b in HELD_OUT else str(b) for b in MEASURED)]]
    digits = 1 if key == "length" else 3
    for name, row in ROWS.items():
        if name in runs_of:
            means = [mean_at(runs_of[name], key, b) for b in MEASURED]
            lines.append([row.label, *(f"{mean:.{digits}f}" for mean in means)])
    return align(lines)


def mean_at(runs: Sequence[Record], key: str, budget: int) -> float:
    return float(np.mean([run["budgets"][str(budget)][key] for run in runs]))


def summary_table(runs_of: dict[str, list[Record]]) -> str:
    """What a row has one number of, means over seeds."""
    lines = [[
        "", "Spearman", "area under accuracy", "least adherence, trained", "held out",
        "adherence, right answers", "wrong answers", "s, last phase", "seeds",
    ]]  # fmt: skip
    for name, row in ROWS.items():
        if name in runs_of:
            runs = runs_of[name]
            least = [
                min(mean_at(runs, "adherence", b) for b in budgets)
                for budgets in (TRAINED, HELD_OUT)
            ]
            lines.append([
                row.label,
                f"{np.mean([run['spearman'] for run in runs]):.3f}",
                mean_and_deviation([run["area"] for run in runs]),
                *(f"{value:.3f}" for value in least),
                f"{np.mean([run['adherence_right'] for run in runs]):.3f}",
                f"{np.mean([run['adherence_wrong'] for run in runs]):.3f}",
                f"{np.mean([run['train_s'] for run in runs]):.0f}",
                str(len(runs)),
            ])  # fmt: skip
    return align(lines)


def every_budget_lines(label: str, runs: Sequence[Record]) -> Iterator[str]:
    """A row's adherence at all trained budgets: mean, least, and those below 0.95."""
    adherences = [run["every_adherence"] for run in runs if "every_adherence" in run]
    if not adherences:
        return
    means = {}
    for budget in adherences[0]:
        means[budget] = float(np.mean([adherence[budget] for adherence in adherences]))
    values = [*means.values()]
    below = [f"{budget} {mean:.3f}" for budget, mean in means.items() if mean < 0.95]
    yield (
        f"{label}: adherence at each of its {len(means)} trained budgets, {NUM_QUESTIONS_EVERY} "
        f"questions a seed: mean {np.mean(values):.3f}, least {min(values):.3f}; below 0.95: "
        f"{', '.join(below) or 'none'}\n"
    )


def accuracy_differences(left: Sequence[Record], right: Sequence[Record]) -> str:
    """left - right at each budget, and their average over budgets."""
    seeds = common_seeds(left, right)

    def mean_correct(side: Sequence[Record], budget: int) -> np.ndarray:
        """For each question, the share of seeds that answer it."""
        digits = [[*run["correct"][str(budget)]] for run in side if run["seed"] in seeds]
        return np.mean(np.array(digits, float), axis=0)

    differences = bootstrap({
        str(budget): mean_correct(left, budget) - mean_correct(right, budget)
        for budget in MEASURED
    })  # fmt: skip
    del differences["all"]
    return differences_text(differences)


def main(argv: list[str]) -> None:
    options = parse_experiment(argv, "experiments.bard", __doc__, ROWS, "bard")
    runs, records = options.runs, options.records
    if options.experiment == "run":
        build = ["-m", "world.build", "build-trails"]
        last = TRAILS / "teacher" / "model.safetensors"
        run_jobs([Job("build trails", lambda: build, last, cores=CORES)], runs / "logs")
        run_jobs(row_jobs(runs, records, options.rows, options.seeds), runs / "logs")
    print(report(records))
    plot_budgets(sorted(records.glob("*.json")), records.with_name(f"{records.name}-budgets.png"))


if __name__ == "__main__":
    with reporting("experiments.bard", RuntimeError):
        main(sys.argv[1:])
