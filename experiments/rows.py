"""What the experiments share: rows of a table, records of runs, comparisons, the command line.

A row is one method of an experiment: how its model is trained and how it is measured. A record is
one JSON file about a run: its settings, training curve and seconds, and which questions it
answered. Reports read records only, so the repository keeps records and no weights.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import compare_correct
from experiments.jobs import ROOT
from infra.checkpoint import write_aside
from infra.cli import Parser
from infra.programs import number
from settings import TrainSettings

SEEDS = (0, 1, 2)
DEFAULTS = asdict(TrainSettings())
TABLES = {"sets", "budgets"}  # keys of a record with the same measures for each set or budget
CURVE_POINTS = 60  # of a recorded curve, about
COMMIT_DIGITS = 12
DIGITS = 5  # of a recorded number that is no whole one
Record = dict[str, Any]
Interval = tuple[float, float, float]  # mean, low and high end of the 95 % interval


@dataclass(frozen=True)
class Row:
    """One method of an experiment."""

    label: str  # its name in tables
    phase: str = ""  # --phase of train.py; empty: what a preset says
    presets: tuple[str, ...] = ()  # names of files in configs/, after the experiment's own
    begins: str = ""  # the row whose model it starts from; empty: the experiment's plain student
    flags: tuple[str, ...] = ()  # further flags of train.py
    measure: tuple[str, ...] = ()  # further flags of the command that measures
    # Its first seed runs at these multiples of the preset's learning rate; the best one stays.
    rates: tuple[float, ...] = (1.0, 2.0)
    rate_of: str = ""  # the row whose choice of a rate it takes over
    teacher: str = ""  # the row or folder whose model guides; empty: the experiment's teacher

    @property
    def is_trained(self) -> bool:
        return bool(self.phase or self.presets)


def config_flags(presets: Sequence[str], folder: Path = Path("configs")) -> list[str]:
    return ["--config", *(str(folder / f"{name}.toml") for name in presets)]


def row_flags(row: Row, presets: Sequence[str], folder: Path = Path("configs")) -> list[str]:
    """The flags of train.py that say what a row is. presets: the experiment's own."""
    phase = ["--phase", row.phase] if row.phase else []
    return [*config_flags((*presets, *row.presets), folder), *phase, *row.flags]


def train_command(
    row: Row, presets: Sequence[str], *, student: Path, run_dir: Path, seed: int
) -> list[str]:
    """Arguments of Python that train a row, or resume its training."""
    run = ["--student", str(student), "--run-dir", str(run_dir), "--seed", str(seed), "--resume"]
    return ["train.py", *row_flags(row, presets), *run]


# ---- records ----


def read_json(path: Path) -> Record:
    record = json.loads(path.read_text(encoding="utf-8"))
    for key in TABLES & set(record):
        if columns := record[key].pop("columns", None):
            record[key] = {name: dict(zip(columns, values, strict=True))
                           for name, values in record[key].items()}
    if "correct" in record:
        record["correct"] = converted(record["correct"], lambda text: f"{int(text, 16):b}"[1:])
    return record


def converted(correct: Any, convert: Callable[[str], str]) -> Any:
    """The texts of a record's "correct", which has one for each set, or for each model's sets."""
    if isinstance(correct, dict):
        return {name: converted(value, convert) for name, value in correct.items()}
    return convert(correct)


def read_lines(path: Path) -> list[Record]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, record: Record) -> None:
    """Write a record. Paths are made relative to the repository: it is read on other machines.

    Numbers keep DIGITS significant digits. "correct", a digit a question, becomes hexadecimal, a
    quarter as long, after a 1 in front. The measures of each set or budget become a row of numbers,
    with the names of the columns once.
    """
    record = {**record}
    for key in TABLES & set(record):
        columns = [*next(iter(record[key].values()), [])]
        if all([*measures] == columns for measures in record[key].values()):
            record[key] = {"columns": columns} | {
                name: [*measures.values()] for name, measures in record[key].items()}
    if "correct" in record:
        bits = converted(record["correct"], lambda text: f"{int('1' + text, 2):x}")
        record["correct"] = bits
    path.parent.mkdir(parents=True, exist_ok=True)
    short = json.loads(json.dumps(record),
                       parse_float=lambda number: float(f"{float(number):.{DIGITS}g}"))
    text = json.dumps(short, separators=(",", ":")).replace(f"{ROOT}/", "")
    write_aside(path, lambda partial: partial.write_text(text + "\n"))


def read_records(folder: Path) -> dict[str, list[Record]]:
    """The recorded runs of each row, by seed."""
    records: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        records.setdefault(record["row"], []).append(record)
    return records


def recorded_rows(folder: Path, command: str) -> dict[str, list[Record]]:
    """As read_records; raises RuntimeError if there are none. command: what makes them."""
    records = read_records(folder)
    if not records:
        raise RuntimeError(
            f"{folder}: got no recorded results, expected some; python -m {command} makes them"
        )
    return records


def row_record(row: str, seed: int | None, threads: int = 1) -> Record:
    """The keys of every record; seed None: nothing was trained, and all seeds share the record."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    machine = (f"{gpu}{os.cpu_count()} cores, {platform.machine()}, "
               f"{'one thread' if threads == 1 else f'{threads} threads'} a process")
    return {"row": row, "seed": seed, "machine": machine}


def training_record(run_dir: Path, curve_keys: Sequence[str] = ()) -> Record:
    """A run's settings, number of steps and seconds, and the curves of these metrics, if any."""
    metrics = read_lines(run_dir / "metrics.jsonl")
    run = read_json(run_dir / "run.json")
    # Left out: settings at train.py's defaults of that commit, and what is of this machine alone.
    run["settings"] = chosen(run["settings"], DEFAULTS)
    there = run.get("versions", {}).items()
    run |= {"versions": {name: version for name, version in there if version},
            "commit": (run.get("commit") or "")[:COMMIT_DIGITS]}
    record = {
        "train": {key: value for key, value in run.items() if key not in ("paths", "history")},
        "num_steps": len(metrics),
        "train_s": seconds(run_dir),
    }
    return record | ({"curve": curve_of(metrics, curve_keys)} if curve_keys else {})


def chosen(settings: Record, defaults: Record) -> Record:
    """The phase, and settings that are not at their defaults."""
    return {name: value for name, value in settings.items()
            if name == "phase" or value != defaults.get(name, ...)}


def curve_of(metrics: list[Record], curve_keys: Sequence[str]) -> dict[str, list]:
    """At most some CURVE_POINTS values of each metric, and their steps."""
    logged = [step for step in metrics if any(key in step for key in curve_keys)]
    # A list for each metric, because the names would take most of the file. A long run's points are
    # means of neighbouring steps.
    every = max(1, len(logged) // CURVE_POINTS)
    blocks = [logged[i : i + every] for i in range(0, len(logged), every)]
    curve = {"step": [block[-1]["step"] for block in blocks]}
    for key in curve_keys:
        values = [mean_of(block, key) for block in blocks]
        if any(value is not None for value in values):
            curve[key] = values
    return curve


def mean_of(steps: Sequence[Record], key: str) -> float | None:
    """The mean of a metric over those of these steps that have it."""
    values = [step[key] for step in steps if step.get(key) is not None]
    return round(float(np.mean(values)), 3) if values else None


def seconds(run_dir: Path) -> float:
    """What the steps of a run took together."""
    return sum(step["seconds"] for step in read_lines(run_dir / "perf.jsonl"))


# ---- comparisons, as text ----


def mean_and_deviation(values: Sequence[float]) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    text = f"{np.mean(values):.3f}"
    return f"{text} \u00b1{np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def common_seeds(left: Sequence[Record], right: Sequence[Record]) -> set[int]:
    return {run["seed"] for run in left} & {run["seed"] for run in right}


def differences_text(differences: Mapping[str, Interval]) -> str:
    """Each difference after its name; "!" says that its interval excludes 0."""
    texts = []
    for name, (mean, low, high) in differences.items():
        mark = "!" if low > 0 or high < 0 else ""
        texts.append(f"{name} {mean:+.3f}{mark}")
    return "  ".join(texts)


def verdict(left: Sequence[Record], right: Sequence[Record]) -> str:
    """A line that says whether left > right holds, over the seeds that both sides have.

    It holds if the paired 95 % interval over questions excludes 0 and no seed says otherwise. With
    one seed the line makes no claim. A record needs "name", "seed", "average" ({"em": of its sets})
    and "correct" (for each set a text with a digit for each question).
    """
    seeds = common_seeds(left, right)
    names = f"{left[0]['name']} > {right[0]['name']}"
    if not seeds:
        return f"{names:44} no seed in common"
    left = [run for run in left if run["seed"] in seeds]
    right = [run for run in right if run["seed"] in seeds]
    mean, low, high = compare_correct(left, right)["average"]
    by_seed = [a["average"]["em"] - b["average"]["em"] for a, b in zip(left, right, strict=True)]
    word = "undecided"
    if len(by_seed) == 1:
        word = "one seed"
    elif low > 0 and min(by_seed) > 0:
        word = "holds"
    elif high < 0 and max(by_seed) < 0:
        word = "reversed"
    seeds_text = ", ".join(f"{value:+.3f}" for value in by_seed)
    return f"{names:44} {word:9} {mean:+.4f} [{low:+.4f}, {high:+.4f}]  seeds {seeds_text}"


# ---- the command line ----


def parse_experiment(
    argv: Sequence[str],
    prog: str,
    doc: str,
    rows: Mapping[str, Row],
    folder: str,
    experiments: Sequence[str] = ("run", "report"),
) -> argparse.Namespace:
    """experiment, runs, records, rows and seeds of a command.

    A row brings the rows that it begins from and that guide it; all are in the table's order.
    """
    parser = Parser(
        prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("experiment", choices=experiments)
    add("--runs", type=Path, default=ROOT / "runs" / folder, help=f"default runs/{folder}")
    add("--records", type=Path, help="folder of the records (default: records, in that of runs)")
    add(
        "--rows", nargs="+", choices=rows, default=list(rows), metavar="ROW", help=", ".join(rows)
    )
    add("--seeds", nargs="+", type=number, default=list(SEEDS), metavar="N", help="default 0 1 2")
    options = parser.parse_args(argv)
    options.runs = options.runs.resolve()
    options.records = options.records or options.runs / "records"
    names = set(options.rows)
    while True:
        others = {other for name in names for other in (rows[name].begins, rows[name].teacher)}
        if not others & set(rows) - names:
            break
        names |= others & set(rows)
    options.rows = [name for name in rows if name in names]
    return options
