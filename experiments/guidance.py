"""When does guidance pay? Students at several starts, with each form of Eq. 4's KL.

    python -m experiments.guidance run       train and measure every cell, three seeds (hours);
                                             a part of them: --rows kd1-exact kd1-none --seeds 0
    python -m experiments.guidance report    table, orderings, rates and picture of the records

A cell is a start and a form. Starts: the plain student, and that student after some epochs of KD.
Forms: no KL; Eq. 4's reward on wrong episodes, as published; the exact KL on wrong episodes, and on
all. Beside the cells stand the other rows of the paper that reinforce, but for PPO, which is the
plain student without a KL; and the exact KL to a teacher that PPO has made better, and to one with
twice the layers, which is built first (40 minutes). All run for the same number of steps and
episodes. They are tuned as the rows of experiments/reproduce.py are: the first seed runs at two
learning rates, and the run that answers more development questions stays and gives the other seeds'
rate.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import eval as evaluation
from experiments import rows
from experiments.jobs import run_jobs
from experiments.plots import plot_cells
from experiments.reproduce import (
    PAIRS_FOLDER,
    Pair,
    best_run,
    pairs_job,
    row_jobs,
    tuning_runs,
)
from experiments.rows import Record, Row, mean_and_deviation, verdict
from infra.cli import reporting
from infra.curves import plot_curves

EPOCHS = {"plain": 0, "kd1": 1, "kd2": 2, "kd3": 3, "kd7": 7}  # of KD, for each start
FORMS = {
    "none": ("no KL", ("--kl-where", "none")),
    "reward": ("as a reward, wrong", ("--kl-in", "reward", "--beta", "0.02")),
    "exact": ("exact, wrong", ("--kl-in", "exact")),
    "uniform": ("exact, all", ("--kl-in", "exact", "--kl-where", "all")),
}
RATES = (0.3, 1.0)  # of the preset's 1e-3, where PPO without a teacher breaks from a weak start
LARGER = PAIRS_FOLDER / "larger-teacher" / "teacher"
# What should be above what, at one start: (form, other form).
ORDERINGS = (("exact", "uniform"), ("exact", "none"), ("exact", "reward"), ("reward", "none"))
# The paper's other rows, in this regime. Its DGPO is kd1-exact here, and the ablations of Table 6
# are plain-exact (a), kd1-uniform (b) and kd1-none (c).
OTHERS = {
    "grpo": Row("GRPO", "grpo", rates=RATES),
    "seqkd1": Row("SeqKD, 1 epoch", presets=("seqkd",), flags=("--epochs", "1"), rates=(1.0,)),
    "sft-ppo": Row("SFT -> PPO", presets=("sft-ppo",), begins="seqkd1", rates=RATES),
    "ppo-kd": Row("(d) PPO -> KD", presets=("ppo-kd",), begins="plain-none",
                  flags=("--epochs", "1"), rates=(1.0,)),
    "kd1-grpo": Row("kd1, exact, wrong, GRPO", presets=("dgpo-grpo",), begins="kd1",
                    rates=RATES),
    "teacher-ppo": Row("Teacher, PPO", "ppo", begins="teacher", rates=RATES[:1]),
    "kd1-exact-better": Row("kd1, exact, wrong, better teacher", "dgpo", flags=FORMS["exact"][1],
                            rates=RATES, begins="kd1", teacher="teacher-ppo"),
    "kd1-exact-larger": Row("kd1, exact, wrong, larger teacher", "dgpo", flags=FORMS["exact"][1],
                            rates=RATES, begins="kd1", teacher=str(LARGER)),
}
PAPER_ORDERINGS = [("kd1-exact", row) for row in (
    "kd1", "plain-none", "grpo", "sft-ppo", "plain-exact", "ppo-kd", "kd1-grpo")]
PAPER_ORDERINGS += [("sft-ppo", "plain-none"), ("kd1-exact-better", "kd1-exact"),
                    ("kd1-exact-larger", "kd1-exact")]
CURVES = ("plain-exact", "kd1-none", "kd1-reward", "kd1-exact", "kd1-uniform",
          "kd1-grpo")


def cells() -> dict[str, Row]:
    """The starts, then a row for each cell."""
    starts = {
        start: Row(f"KD, {epochs} epochs", "kd", flags=("--epochs", str(epochs)), rates=(1.0,))
        for start, epochs in EPOCHS.items() if epochs
    }
    return starts | OTHERS | {
        f"{start}-{form}": Row(f"{start}, {label}", "dgpo", flags=flags, rates=RATES,
                               begins=start if start in starts else "")
        for start in EPOCHS for form, (label, flags) in FORMS.items()
    }


ROWS = cells()


def pair_of(runs: Path, records: Path) -> Pair:
    return Pair(runs, records, rows=ROWS, presets=("world", "weak-start"), drawn=CURVES)


def report(records: Path) -> str:
    """Table, orderings and chosen rates, from records alone."""
    runs_of = rows.recorded_rows(records, "experiments.guidance run")
    return "\n\n".join([
        "Exact match, greedy, all test questions, average of sets; mean over seeds\n\n"
        + evaluation.align([*table_lines(runs_of)]),
        evaluation.table([run for name in ("student", "teacher", *ROWS)
                          for run in runs_of.get(name, [])]),
        "\n".join(ordering_lines(runs_of)), "\n".join(tuning_lines(records))])


def table_lines(runs_of: dict[str, list[Record]]) -> Iterator[list[str]]:
    yield ["start", "score", *(label for label, _ in FORMS.values())]
    for start in EPOCHS:
        names = [start_name(start), *(f"{start}-{form}" for form in FORMS)]
        yield [start, *(cell(runs_of.get(name, [])) for name in names)]


def start_name(start: str) -> str:
    """The row whose model a start is."""
    return start if start in ROWS else "student"


def cell(runs: list[Record]) -> str:
    return mean_and_deviation([run["average"]["em"] for run in runs]) if runs else "-"


def ordering_lines(runs_of: dict[str, list[Record]]) -> Iterator[str]:
    yield "Difference of the averages over sets, paired 95 % interval over questions\n"
    pairs = [(f"{start}-{left}", f"{start}-{right}") for start in EPOCHS
             for left, right in ORDERINGS]
    for names in (*pairs, *PAPER_ORDERINGS):
        if all(name in runs_of for name in names):
            yield verdict(*(runs_of[name] for name in names))


def tuning_lines(records: Path) -> Iterator[str]:
    yield "Exact match on development questions, at multiples of the preset's learning rate\n"
    for name in ROWS:
        if runs := tuning_runs(records, name):
            scores = ", ".join(f"x{run['times']:g} {run['score']:.3f}" for run in runs)
            yield f"{ROWS[name].label:28} {scores}; taken x{best_run(records, name)['times']:g}"


def plot(records: Path) -> None:
    """Draw where a student ends against where it began, and the curves of some rows."""
    runs_of = rows.read_records(records)

    def average(name: str) -> float:
        return float(np.mean([run["average"]["em"] for run in runs_of[name]]))

    lines = {
        label: [(average(start_name(start)), average(f"{start}-{form}"))
                for start in EPOCHS if {start_name(start), f"{start}-{form}"} <= runs_of.keys()]
        for form, (label, _) in FORMS.items()
    }
    plot_cells(lines, average("teacher"), records.with_name(f"{records.name}.png"))
    paths = [path for name in CURVES for path in sorted(records.glob(f"{name}-[0-9].json"))]
    if paths:
        plot_curves(paths, records.with_name(f"{records.name}-curves.png"))


def main(argv: list[str]) -> None:
    options = rows.parse_experiment(argv, "experiments.guidance", __doc__, ROWS, "guidance")
    runs, records = options.runs, options.records
    if options.experiment == "run":
        if "kd1-exact-larger" in options.rows:
            run_jobs([pairs_job(LARGER)], runs / "logs")
        jobs = row_jobs(pair_of(runs, records), options.rows, options.seeds)
        run_jobs(jobs, runs / "logs")
    print(report(records))
    if options.experiment == "report":
        plot(records)


if __name__ == "__main__":
    with reporting("experiments.guidance", RuntimeError):
        main(sys.argv[1:])
