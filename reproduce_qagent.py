"""QAgent on the embedded world: passages of trained and untrained agents for two frozen generators, over three seeds.

    python reproduce_qagent.py run        build the readers, train and measure what is not recorded yet
    python reproduce_qagent.py report     tables and comparisons of what is recorded

Rows (the paper's Tables 2 to 4)
    none, naive       no passages (vanilla); five passages of one search for the question (naive RAG)
    gold              the passages that a question is about, and no others: what the generators could do at best
    untrained         the small reader after demonstrations of the scripted expert: where every trained agent begins
    stage-1           GRPO on format and exact match of the agent's own answer
    stage-1-longer    the same for as many steps as stages 1 and 2
    stage-2           after stage-1: GRPO on the answer of the small generator, and whether passages hold an answer
    stage-2-alone     from the untrained agent: as many steps as stage 1
    published-hit     stages 1 and 2, but an answer in the agent's own words counts as found, as in the official code
    untrained-r1      as untrained, after as many demonstrations in Search-R1's protocol
    search-r1         the same, then GRPO on exact match for as many steps
The small generator trained stage-2; none of the agents was trained with the large one. Resumable row by row.
"""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import TEST_SETS
from eval import NAMES, align
from jobs import CORES, ROOT, Job, parse_experiment, read_records, run_jobs, seconds, verdict, write_json

SEEDS = (0, 1, 2)
READERS = ROOT / "runs" / "readers"
GENERATORS = ("small", "large")
STEPS, MORE_STEPS = 40, 30  # of stage 1, of stage 2
NUM_QUESTIONS = 100  # of each test set


@dataclass(frozen=True)
class Row:
    label: str
    phase: str = ""  # empty: nothing is trained, and it is the same for every seed
    begins: str = ""  # the row whose model it starts from
    flags: tuple[str, ...] = ()
    protocol: str = "qagent"


ROWS = {
    "none": Row("no passages"),
    "naive": Row("naive RAG, 5 passages"),
    "gold": Row("gold passages"),
    "untrained": Row("untrained agent"),
    "untrained-r1": Row("Search-R1, untrained", protocol="search-r1"),
    "search-r1": Row("Search-R1", "grpo", "untrained-r1", ("--steps", str(STEPS + MORE_STEPS)), "search-r1"),
    "stage-1": Row("stage 1", "qagent", "untrained", ("--stage", "1", "--steps", str(STEPS))),
    "stage-1-longer": Row("stage 1, longer", "qagent", "stage-1", ("--stage", "1", "--steps", str(MORE_STEPS))),
    "stage-2": Row("stages 1 and 2", "qagent", "stage-1", ("--stage", "2", "--steps", str(MORE_STEPS))),
    "stage-2-alone": Row("stage 2 alone", "qagent", "untrained", ("--stage", "2", "--steps", str(STEPS))),
    "published-hit": Row("with the published hit", "qagent", "stage-1",
                         ("--stage", "2", "--hit-in", "trajectory", "--steps", str(MORE_STEPS))),
}  # fmt: skip
COMPARED = [
    *(("stage-2", other) for other in ("naive", "untrained", "stage-1", "stage-1-longer", "search-r1",
                                       "published-hit")),
    ("stage-1", "untrained"), ("stage-2-alone", "untrained"), ("stage-2-alone", "stage-1"),
]  # fmt: skip
PRESETS = ["--config", "configs/world.toml", "configs/qagent-world.toml"]


def row_jobs(runs: Path, records: Path, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Training and measures of these rows."""
    jobs = []
    for seed in seeds:
        for name in names:
            row, folder = ROWS[name], runs / f"{name}-{seed}"
            if not row.phase:
                if seed == seeds[0]:
                    model, out = READERS / f"{row.protocol}-agent", runs / f"eval-{name}"
                    jobs.append(measure_job(name, None, model, out, records / f"{name}.json"))
                continue
            trained = bool(ROWS[row.begins].phase)
            student = runs / f"{row.begins}-{seed}" if trained else READERS / f"{row.protocol}-agent"
            drawn = seed + 100 * trained  # a seed says which questions each step asks: others than before
            command = ["train.py", *PRESETS, "--phase", row.phase, "--protocol", row.protocol, *row.flags, "--student",
                       str(student), "--run-dir", str(folder), "--seed", str(drawn), "--resume"]  # fmt: skip
            needs = (f"{row.begins} {seed}",) if trained else ()
            jobs.append(Job(f"{name} {seed}", lambda command=command: command, folder / "model.safetensors", needs))
            jobs.append(measure_job(name, seed, folder, runs / f"eval-{name}-{seed}", records / f"{name}-{seed}.json"))
    return jobs


def measure_job(name: str, seed: int | None, model: Path, out: Path, record: Path) -> Job:
    row = ROWS[name]
    command = ["qagent.py", "measure", *PRESETS, "--name", row.label, "--out", str(out), "--limit", str(NUM_QUESTIONS),
               "--generators", *(str(READERS / generator) for generator in GENERATORS)]  # fmt: skip
    command += (["--passages", name] if name in ("none", "naive", "gold")
                else ["--model", str(model), "--protocol", row.protocol])  # fmt: skip
    needs = (f"{name} {seed}",) if row.phase else ()
    return Job(f"measure {name}" + (f" {seed}" if needs else ""), lambda: command, record, needs,
               after=lambda: write_record(name, seed, model, out, record))  # fmt: skip


def write_record(name: str, seed: int | None, model: Path, out: Path, record: Path) -> None:
    """What the report needs of a run, in one file."""
    found = json.loads((out / "submodule.json").read_text())
    rows = [json.loads(line) for line in (out / "submodule.jsonl").read_text().splitlines()]
    found |= {"row": name, "seed": seed, "machine": f"{platform.machine()}, one thread a process"}
    found["correct"] = {
        label: {part: "".join(str(int(row[f"em {label}"])) for row in rows if row["set"] == part) for part in TEST_SETS}
        for label in GENERATORS}  # fmt: skip
    if seed is not None:
        metrics = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
        keys = ("eval/score", "eval/reward", "rollout/score", "rollout/reward", "rollout/hit", "rollout/queries",
                "rollout/format", "rollout/searches", "rollout/equal_groups", "loss/entropy")  # fmt: skip
        found["curve"] = [{"step": m["step"]} | {key: round(m[key], 4) for key in keys if m.get(key) is not None}
                          for m in metrics if any(key in m for key in keys)]
        found |= {"train": json.loads((model / "run.json").read_text()), "train_s": seconds(model)}
    write_json(record, found)


# ---- report ----


def report(records: Path) -> str:
    """Exact match of both generators on each set, what was found and asked, and comparisons with paired intervals."""
    found = read_records(records)
    if not found:
        raise RuntimeError(f"{records}: got no recorded results, expected some; python reproduce_qagent.py run")
    present = [name for name in ROWS if name in found]
    lines = []
    for label in GENERATORS:
        trained = "trained stage 2" if label == GENERATORS[0] else "no agent was trained with it"
        rows = [["", *(NAMES[part] for part in TEST_SETS), "Avg.", "F1", "published EM"]]
        for name in present:
            runs = found[name]
            cells = [np.mean([run["sets"][part][f"em {label}"] for run in runs]) for part in TEST_SETS]
            averages = [run["average"][f"em {label}"] for run in runs]
            spread = f" \u00b1{np.std(averages, ddof=1):.3f}" if len(averages) > 1 else ""
            others = [np.mean([run["average"][f"{key} {label}"] for run in runs]) for key in ("f1", "within")]
            rows.append([ROWS[name].label, *(f"{cell:.3f}" for cell in cells), f"{np.mean(averages):.3f}{spread}",
                         *(f"{value:.3f}" for value in others)])
        lines += [f"Exact match of the {label} generator ({trained}); strict, mean over seeds\n", align(rows), ""]
    rows = [["", "hit", "passages", "queries", "searches", "agent's own EM", "F1", "s, last phase", "seeds"]]
    for name in present:
        runs = found[name]
        keys = ("hit", "passages", "queries", "searches", "agent_em", "agent_f1")
        cells = [f"{np.mean([run['average'][key] for run in runs]):.3f}" if key in runs[0]["average"] else "-"
                 for key in keys]
        times = f"{np.mean([run['train_s'] for run in runs]):.0f}" if "train_s" in runs[0] else "-"
        rows.append([ROWS[name].label, *cells, times, str(len(runs))])
    lines += ["What was found and asked, means over the sets\n", align(rows), ""]
    lines += ["Differences of the averages over sets, paired 95 % interval; small and large generator\n"]
    for left, right in COMPARED:
        if left in found and right in found:
            seeds = [run["seed"] for run in found[left]]
            lines += [f"{label}: {verdict(*(answered(found[name], label, seeds) for name in (left, right)))}"
                      for label in GENERATORS]
    return "\n".join(lines)


def answered(runs: list[dict], label: str, seeds: Sequence[int]) -> list[dict]:
    """What one generator made of the passages, as `verdict` compares it; a baseline is the same for each seed."""
    if runs[0]["seed"] is None:
        runs = [runs[0] | {"seed": seed} for seed in seeds]
    return [{"name": ROWS[run["row"]].label, "seed": run["seed"], "correct": run["correct"][label],
             "average": {"em": run["average"][f"em {label}"]}} for run in runs]


def main(argv: list[str]) -> None:
    options = parse_experiment(argv, "reproduce_qagent.py", __doc__, ROWS, SEEDS, "qagent")
    if options.experiment == "run":
        last = READERS / "search-r1-agent" / "model.safetensors"
        build = Job("build readers", lambda: ["world.py", "build-readers"], last, cores=CORES)
        run_jobs([build], options.runs / "logs")
        run_jobs(row_jobs(options.runs, options.records, options.rows, options.seeds), options.runs / "logs")
    print(report(options.records))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"reproduce_qagent.py: {error}")
