"""BARD on the embedded world's trails: both phases, each phase alone, other rewards and truncation, over three seeds.

    python reproduce_bard.py run        build the models, train and measure what is not recorded yet
    python reproduce_bard.py report     tables, orderings and plots of what is recorded

Rows
    agnostic    sft on the teacher's natural chains; the budget is not told, a hard stop keeps to it
    sft         bard-sft alone
    rl          bard-rl alone, from the agnostic student
    bard        bard-sft, then bard-rl with the product of correctness and fidelity
    additive    the same with their sum
Each distils on about as many tokens (up to sixteen versions of a chain, or the chain ten times), and each row
that is reinforced takes the same steps. Resumable row by row, as reproduce.py is.
"""

import json
import platform
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import align, bootstrap
from jobs import CORES, ROOT, Job, parse_experiment, read_records, run_jobs, seconds, write_json
from plots import plot_budgets

SEEDS = (0, 1, 2)
TRAILS = ROOT / "runs" / "trails"
TRAINED, HELD_OUT = (38, 64, 128, 256, 384), (48, 96, 192, 288)  # of configs/bard.toml; the others are interpolated
MEASURED = tuple(sorted(TRAINED + HELD_OUT))
NUM_QUESTIONS = 200  # of the 500 test questions; 100 at every one of the trained budgets


@dataclass(frozen=True)
class Row:
    label: str
    phase: str
    begins: str = ""  # the row whose model it starts from; empty: the plain student
    flags: tuple[str, ...] = ()
    told: bool = True  # whether the budget is told to the agent


ROWS = {
    "agnostic": Row("agnostic, truncated", "sft", flags=("--epochs", "10", "--batch-size", "16", "--kd-lr", "2e-3"),
                    told=False),
    "sft": Row("SFT only", "bard-sft"),
    "rl": Row("RL only", "bard-rl", "agnostic"),
    "bard": Row("BARD", "bard-rl", "sft"),
    # Its score may fall while its reward rises, which is what it is here to show: nothing stops it.
    "additive": Row("additive reward", "bard-rl", "sft", ("--budget-reward", "additive", "--no-stop-on-collapse")),
}
PRESETS = ["--config", "configs/world.toml", "configs/bard.toml"]


def row_jobs(runs: Path, records: Path, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Compressed chains, training and measures of these rows."""
    jobs = []
    for seed in seeds:
        versions = runs / f"versions-{seed}.jsonl"
        chains = runs / f"versions-{seed}.chains.jsonl"
        data = ["train.py", *PRESETS, "--phase", "bard-data", "--episodes", str(versions), "--seed", str(seed)]
        jobs.append(Job(f"data {seed}", lambda data=data: data, versions))
        for name in names:
            row, folder = ROWS[name], runs / f"{name}-{seed}"
            student = runs / f"{row.begins}-{seed}" if row.begins else TRAILS / "student"
            episodes = versions if row.told else chains
            command = ["train.py", *PRESETS, "--phase", row.phase, *row.flags, "--student", str(student), "--episodes",
                       str(episodes), "--run-dir", str(folder), "--seed", str(seed), "--save-every", "20", "--resume"]
            if not row.told:
                command += ["--budget-text", "", "--budgets", "--eval-every", "500"]
            needs = (f"data {seed}", *([f"{row.begins} {seed}"] if row.begins else []))
            jobs.append(Job(f"{name} {seed}", lambda command=command: command, folder / "model.safetensors", needs))
            jobs += measure_jobs(name, seed, folder, runs / f"eval-{name}-{seed}", records / f"{name}-{seed}.json")
    return jobs


def measure_jobs(name: str, seed: int, model: Path, out: Path, record: Path) -> list[Job]:
    """Nine budgets with many questions; for BARD all that it was trained on, with fewer."""
    def command(out: Path, limit: int, budgets: Sequence[int]) -> list[str]:
        told = [] if ROWS[name].told else ["--budget-text", ""]
        return ["eval.py", *PRESETS, "--model", str(model), "--name", ROWS[name].label, "--out", str(out),
                "--questions", str(TRAILS / "test.jsonl"), "--limit", str(limit), "--budgets",
                ",".join(map(str, budgets)), *told]  # fmt: skip

    jobs, needs = [], (f"{name} {seed}",)
    if name == "bard":
        trained = tomllib.loads((ROOT / "configs" / "bard.toml").read_text())["budgets"]
        every = out.with_name(f"{out.name}-every")
        jobs.append(Job(f"every budget {seed}", lambda: command(every, 100, trained), every / "budgets.json", needs))
        needs += (f"every budget {seed}",)
    jobs.append(Job(f"measure {name} {seed}", lambda: command(out, NUM_QUESTIONS, MEASURED), record, needs,
                    after=lambda: write_record(name, seed, model, out, record)))
    return jobs


def write_record(name: str, seed: int, model: Path, out: Path, record: Path) -> None:
    """What the report needs of a run, in one file."""
    found = json.loads((out / "budgets.json").read_text())
    rows = [json.loads(line) for line in (out / "budgets.jsonl").read_text().splitlines()]
    found |= {"row": name, "seed": seed, "machine": f"{platform.machine()}, one thread a process"}
    found["correct"] = {b: "".join(str(int(row["correct"])) for row in rows if row["budget"] == b) for b in MEASURED}
    for key, right in (("adherence_right", 1), ("adherence_wrong", 0)):  # answers without a stop
        kept = [row["length"] <= row["budget"] for row in rows if row["correct_free"] == right]
        found[key] = float(np.mean(kept or [True]))
    metrics = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    keys = ("eval/score", "eval/adherence", "rollout/score", "rollout/reward", "rollout/thinking", "rollout/adherence",
            "rollout/equal_groups", "loss/entropy")  # fmt: skip
    found["curve"] = [{"step": m["step"]} | {key: round(m[key], 4) for key in keys if m.get(key) is not None}
                      for m in metrics if any(key in m for key in keys)]
    found |= {"train": json.loads((model / "run.json").read_text()), "train_s": seconds(model)}
    every = out.with_name(f"{out.name}-every") / "budgets.json"
    if every.exists():
        budgets = json.loads(every.read_text())["budgets"]
        found["every_adherence"] = {budget: values["adherence"] for budget, values in budgets.items()}
    write_json(record, found)


# ---- report ----


def report(records: Path) -> str:
    """Measures at each budget, means over seeds, and the orderings with paired intervals."""
    found = read_records(records)
    if not found:
        raise RuntimeError(f"{records}: got no recorded results, expected some; python reproduce_bard.py run")
    lines = []
    for key, title in (("adherence", "Adherence P(l <= b)"), ("accuracy", "Accuracy with a hard stop at b"),
                       ("accuracy_free", "Accuracy without a stop"), ("length", "Tokens thought"),
                       ("overshoot", "Overshoot E max(0, l - b) / b"),
                       ("relative_error", "Relative error E |l - b| / b"),
                       ("use", "Use E l / b")):  # fmt: skip
        marked = [f"{b}*" if b in HELD_OUT else str(b) for b in MEASURED]
        rows = [["", *marked]]
        for name in ROWS:
            if name in found:
                means = [np.mean([run["budgets"][str(b)][key] for run in found[name]]) for b in MEASURED]
                digits = 1 if key == "length" else 3
                rows.append([ROWS[name].label, *(f"{mean:.{digits}f}" for mean in means)])
        lines += [f"{title}; * never trained on\n", align(rows), ""]
    rows = [["", "Spearman", "area under accuracy", "least adherence, trained", "held out", "adherence, right answers",
             "wrong answers", "s, last phase", "seeds"]]
    for name in ROWS:
        if name in found:
            some = found[name]
            least = [min(np.mean([run["budgets"][str(b)]["adherence"] for run in some]) for b in budgets)
                     for budgets in (TRAINED, HELD_OUT)]
            areas = [run["area"] for run in some]
            spread = f" \u00b1{np.std(areas, ddof=1):.3f}" if len(areas) > 1 else ""
            rows.append([ROWS[name].label, f"{np.mean([run['spearman'] for run in some]):.3f}",
                         f"{np.mean(areas):.3f}{spread}", *(f"{value:.3f}" for value in least),
                         *(f"{np.mean([run[f'adherence_{kind}'] for run in some]):.3f}" for kind in ("right", "wrong")),
                         f"{np.mean([run['train_s'] for run in some]):.0f}", str(len(some))])
    lines += [align(rows), ""]
    if adherence := [run["every_adherence"] for run in found.get("bard", []) if "every_adherence" in run]:
        means = {budget: float(np.mean([run[budget] for run in adherence])) for budget in adherence[0]}
        below = ", ".join(f"{budget} {mean:.3f}" for budget, mean in means.items() if mean < 0.95)
        lines += [f"BARD's adherence at each of its {len(means)} trained budgets, 100 questions a seed: mean "
                  f"{np.mean([*means.values()]):.3f}, least {min(means.values()):.3f}; below 0.95: {below or 'none'}\n"]
    lines += ["Accuracy with a hard stop: differences; ! the paired 95 % interval over questions excludes 0\n"]
    for other in ("agnostic", "sft", "rl", "additive"):
        if {run["seed"] for run in found.get("bard", [])} & {run["seed"] for run in found.get(other, [])}:
            lines.append(f"BARD > {ROWS[other].label}: {differences(found['bard'], found[other])}")
    return "\n".join(lines)


def differences(left: list[dict], right: list[dict]) -> str:
    """The difference at each budget; a mark where its interval excludes 0."""
    seeds = {run["seed"] for run in left} & {run["seed"] for run in right}

    def mean(side: list[dict], b: int) -> np.ndarray:
        return np.mean([np.array([*run["correct"][str(b)]], float) for run in side if run["seed"] in seeds], axis=0)

    found = bootstrap({str(b): mean(left, b) - mean(right, b) for b in MEASURED})
    return "  ".join(f"{b} {value:+.3f}{'!' if low > 0 or high < 0 else ''}"
                     for b, (value, low, high) in found.items() if b != "all")


def main(argv: list[str]) -> None:
    options = parse_experiment(argv, "reproduce_bard.py", __doc__, ROWS, SEEDS, "bard")
    if options.experiment == "run":
        build = Job("build trails", lambda: ["world.py", "build-trails"], TRAILS / "teacher" / "model.safetensors",
                    cores=CORES)  # fmt: skip
        run_jobs([build], options.runs / "logs")
        run_jobs(row_jobs(options.runs, options.records, options.rows, options.seeds), options.runs / "logs")
    print(report(options.records))
    plot_budgets(sorted(options.records.glob("*.json")),
                 options.records.with_name(f"{options.records.name}-budgets.png"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RuntimeError, ValueError) as error:
        sys.exit(f"reproduce_bard.py: {error}")
