"""QAgent on the embedded world: what two frozen generators make of the passages that agents find.

    python -m experiments.qagent run       build the readers; train and measure what is not recorded
    python -m experiments.qagent report    tables and comparisons of what is recorded

Rows (the paper's Tables 2 to 4); those that are trained have three seeds
    none              no passages (vanilla)
    naive             five passages of one search for the question (naive RAG)
    gold              only the passages that a question is about: the generators' upper bound
    untrained         the small reader after demonstrations of the scripted expert; every trained
                      agent starts from it
    stage-1           GRPO on format and exact match of the agent's own answer
    stage-1-longer    the same for as many steps as stages 1 and 2
    stage-2           after stage-1: GRPO on the small generator's answer, and on whether a passage
                      holds an answer
    stage-2-alone     from the untrained agent, for as many steps as stage 1
    published-hit     stages 1 and 2, but an answer in the agent's own words counts as found, as in
                      the official code
    untrained-r1      as untrained, after as many demonstrations in Search-R1's protocol
    search-r1         the same, then GRPO on exact match for as many steps as stages 1 and 2
    recalling         an agent that knows towns and schools by heart, and looks up one in five
    recalling-1, -1-longer, -2
                      stage-1, stage-1-longer and stage-2 from this agent
    recalling-2-guided
                      recalling-2, and on episodes worth nothing the exact KL to `untrained`
Stage 2 trains with the small generator; no agent trains with the large one. An interrupted run goes
on when it is called again.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import TEST_SETS
from eval import NAMES, align
from experiments.jobs import CORES, ROOT, Job, run_jobs
from experiments.rows import (
    Record,
    Row,
    config_flags,
    mean_and_deviation,
    parse_experiment,
    read_json,
    read_lines,
    recorded_rows,
    row_record,
    train_command,
    training_record,
    verdict,
    write_json,
)
from infra.cli import reporting

READERS = ROOT / "runs" / "readers"  # models that world.build makes
GENERATORS = ("small", "large")
STEPS, MORE_STEPS = 40, 30  # of stage 1, of stage 2
NUM_QUESTIONS = 100  # of each test set
PRESETS = ("world", "qagent-world")
SEARCH_R1 = ("--protocol", "search-r1")
ROWS = {
    "none": Row("no passages", measure=("--passages", "none")),
    "naive": Row("naive RAG, 5 passages", measure=("--passages", "naive")),
    "gold": Row("gold passages", measure=("--passages", "gold")),
    "untrained": Row("untrained agent"),
    "untrained-r1": Row("Search-R1, untrained", measure=SEARCH_R1),
    "search-r1": Row(
        "Search-R1",
        "grpo",
        begins="untrained-r1",
        flags=("--steps", str(STEPS + MORE_STEPS)),
        measure=SEARCH_R1,
    ),
    "stage-1": Row(
        "stage 1", "qagent", begins="untrained", flags=("--stage", "1", "--steps", str(STEPS))
    ),
    "stage-1-longer": Row(
        "stage 1, longer",
        "qagent",
        begins="stage-1",
        flags=("--stage", "1", "--steps", str(MORE_STEPS)),
    ),
    "stage-2": Row(
        "stages 1 and 2",
        "qagent",
        begins="stage-1",
        flags=("--stage", "2", "--steps", str(MORE_STEPS)),
    ),
    "stage-2-alone": Row(
        "stage 2 alone", "qagent", begins="untrained", flags=("--stage", "2", "--steps", str(STEPS))
    ),
    "published-hit": Row(
        "with the published hit",
        "qagent",
        begins="stage-1",
        flags=(
            "--stage", "2", "--hit-in", "trajectory", "--hit-rule", "substring",
            "--steps", str(MORE_STEPS),
        ),
    ),
}
RECALLING = {
    "recalling": Row("recalling agent"),
    "recalling-1": replace(ROWS["stage-1"], label="recalling, stage 1", begins="recalling"),
    "recalling-1-longer": replace(
        ROWS["stage-1-longer"], label="recalling, stage 1, longer", begins="recalling-1"
    ),
    "recalling-2": replace(
        ROWS["stage-2"], label="recalling, stages 1 and 2", begins="recalling-1"
    ),
    "recalling-2-guided": replace(
        ROWS["stage-2"],
        label="the same, guided",
        begins="recalling-1",
        teacher="untrained",
        flags=(*ROWS["stage-2"].flags, "--kl-where", "wrong", "--kl-in", "exact"),
    ),
}
ROWS |= RECALLING
# The models of rows that are not trained. The rows without a model need no agent.
UNTRAINED = {
    "untrained": READERS / "qagent-agent",
    "untrained-r1": READERS / "search-r1-agent",
    "recalling": READERS / "recalling-agent",
}
COMPARED = [
    ("stage-2", "naive"),
    ("stage-2", "untrained"),
    ("stage-2", "stage-1"),
    ("stage-2", "stage-1-longer"),
    ("stage-2", "search-r1"),
    ("stage-2", "published-hit"),
    ("stage-1", "untrained"),
    ("stage-2-alone", "untrained"),
    ("stage-2-alone", "stage-1"),
    ("recalling-2", "recalling-1"),
    ("recalling-2", "recalling-1-longer"),
    ("recalling-2-guided", "recalling-2"),
]


def row_jobs(runs: Path, records: Path, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Training and measuring of these rows; rows that are not trained are measured once."""
    jobs = [
        measure_job(runs, records, name, None) for name in names if not ROWS[name].is_trained
    ]
    for seed in seeds:
        for name in names:
            if ROWS[name].is_trained:
                jobs += [row_job(runs, name, seed), measure_job(runs, records, name, seed)]
    return jobs


def row_job(runs: Path, name: str, seed: int) -> Job:
    """Train a row."""
    row, folder = ROWS[name], runs / f"{name}-{seed}"
    if row.begins in UNTRAINED:
        student, needs, draw = UNTRAINED[row.begins], (), seed
    else:
        student, needs = runs / f"{row.begins}-{seed}", (f"{row.begins} {seed}",)
        draw = seed + 100  # another seed, so that its steps ask other questions than stage 1's
    command = train_command(row, PRESETS, student=student, run_dir=folder, seed=draw)
    if row.teacher:
        command += ["--teacher", str(UNTRAINED[row.teacher])]
    return Job(f"{name} {seed}", lambda: command, folder / "model.safetensors", needs)


def measure_job(runs: Path, records: Path, name: str, seed: int | None) -> Job:
    """Measure a row with both generators and record it; seed None: a row that is not trained."""
    row = ROWS[name]
    key = name if seed is None else f"{name}-{seed}"
    model = UNTRAINED.get(name) if seed is None else runs / key
    out, record = runs / f"eval-{key}", records / f"{key}.json"
    command = ["qagent.py", "measure", *config_flags(PRESETS), "--name", row.label]
    command += ["--out", str(out), "--limit", str(NUM_QUESTIONS), *row.measure]
    command += ["--model", str(model)] if model else []
    command += ["--generators", *(str(READERS / generator) for generator in GENERATORS)]

    def keep() -> None:
        write_record(name, seed, model, out, record)

    if seed is None:
        return Job(f"measure {name}", lambda: command, record, after=keep)
    needs = (f"{name} {seed}",)
    return Job(f"measure {name} {seed}", lambda: command, record, needs, after=keep)


def write_record(
    name: str, seed: int | None, model: Path | None, out: Path, record: Path
) -> None:
    """Write what the report needs of a run."""
    result = read_json(out / "submodule.json")
    rows = read_lines(out / "submodule.jsonl")
    correct: dict[str, dict[str, str]] = {}
    for label in GENERATORS:
        correct[label] = dict.fromkeys(TEST_SETS, "")
        for row in rows:
            if row["set"] in TEST_SETS:
                correct[label][row["set"]] += str(int(row[f"em {label}"]))
    result.update(row_record(name, seed), correct=correct)
    if seed is not None:
        result.update(training_record(model))
    write_json(record, result)


# ---- report ----


def report(records: Path) -> str:
    """Exact match of both generators, what was found and asked, comparisons with intervals."""
    runs_of = recorded_rows(records, "experiments.qagent run")
    lines = []
    for label in GENERATORS:
        about = "no agent was trained with it"
        if label == GENERATORS[0]:
            about = "trained stage 2"
        title = f"Exact match of the {label} generator ({about}); strict, mean over seeds\n"
        lines += [title, generator_table(runs_of, label), ""]
    lines += ["What was found and asked, means over the sets\n", search_table(runs_of), ""]
    lines.append(
        "Differences of the averages over sets, paired 95 % interval; small and large generator\n"
    )
    return "\n".join([*lines, *comparison_lines(runs_of)])


def generator_table(runs_of: dict[str, list[Record]], label: str) -> str:
    """Exact match of one generator on each set, for each row; F1 and the published match beside."""
    lines = [["", *(NAMES[part] for part in TEST_SETS), "Avg.", "F1", "published EM"]]
    for name, row in ROWS.items():
        if name in runs_of:
            runs = runs_of[name]
            by_set = [np.mean([run["sets"][s][f"em {label}"] for run in runs]) for s in TEST_SETS]
            averages = [run["average"][f"em {label}"] for run in runs]
            f1 = np.mean([run["average"][f"f1 {label}"] for run in runs])
            published = np.mean([run["average"][f"within {label}"] for run in runs])
            cells = [f"{value:.3f}" for value in by_set]
            cells += [mean_and_deviation(averages), f"{f1:.3f}", f"{published:.3f}"]
            lines.append([row.label, *cells])
    return align(lines)


def search_table(runs_of: dict[str, list[Record]]) -> str:
    """What each row found and asked, means over the sets."""
    columns = {
        "hit": "hit",
        "passages": "passages",
        "queries": "queries",
        "searches": "searches",
        "agent_em": "agent's own EM",
        "agent_f1": "F1",
    }
    lines = [["", *columns.values(), "s, last phase", "seeds"]]
    for name, row in ROWS.items():
        if name in runs_of:
            runs = runs_of[name]
            cells = []
            for key in columns:
                values = [run["average"][key] for run in runs if key in run["average"]]
                cells.append(f"{np.mean(values):.3f}" if values else "-")
            train_s = [run["train_s"] for run in runs if "train_s" in run]
            took = f"{np.mean(train_s):.0f}" if train_s else "-"
            lines.append([row.label, *cells, took, str(len(runs))])
    return align(lines)


def comparison_lines(runs_of: dict[str, list[Record]]) -> Iterator[str]:
    for left, right in COMPARED:
        if left in runs_of and right in runs_of:
            seeds = [run["seed"] for run in runs_of[left]]
            for label in GENERATORS:
                sides = [generator_records(runs_of[name], label, seeds) for name in (left, right)]
                yield f"{label}: {verdict(*sides)}"


def generator_records(runs: list[Record], label: str, seeds: Sequence[int]) -> list[Record]:
    """What one generator answered, as rows.verdict compares it.

    A row that is not trained has one run, which counts for each of the seeds.
    """
    if runs[0]["seed"] is None:
        runs = [{**runs[0], "seed": seed} for seed in seeds]
    return [
        {
            "name": ROWS[run["row"]].label,
            "seed": run["seed"],
            "correct": run["correct"][label],
            "average": {"em": run["average"][f"em {label}"]},
        }
        for run in runs
    ]


def main(argv: list[str]) -> None:
    options = parse_experiment(argv, "experiments.qagent", __doc__, ROWS, "qagent")
    runs, records = options.runs, options.records
    if options.experiment == "run":
        build = ["-m", "world.build", "build-readers"]
        last = READERS / "search-r1-agent" / "model.safetensors"
        run_jobs([Job("build readers", lambda: build, last, cores=CORES)], runs / "logs")
        run_jobs(row_jobs(runs, records, options.rows, options.seeds), runs / "logs")
    print(report(records))


if __name__ == "__main__":
    with reporting("experiments.qagent", RuntimeError):
        main(sys.argv[1:])
