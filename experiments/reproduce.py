"""The whole method on the embedded world, as a demonstration and as the paper's tables.

    python -m experiments.reproduce demo      one seed: five models measured, a curve, episodes
    python -m experiments.reproduce rows      every row of the paper's tables, over three seeds;
                                              a part of them: --rows dgpo kd --seeds 0
    python -m experiments.reproduce pairs     Table 3: a larger teacher, and a Llama-type pair
    python -m experiments.reproduce report    tables, orderings, times and curves of the records

`rows` first chooses a learning rate for each row. Every job is a command of train.py or eval.py,
which is printed before it runs. A job whose result exists is not run again, and training is
resumed, so an interrupted experiment goes on when it is called again.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import eval as evaluation
from experiments import rows
from experiments.jobs import CORES, ROOT, Job, eval_job, run_jobs, torchrun, train_job
from experiments.plots import plot_sizes
from experiments.rows import Record, Row, read_json, read_lines, read_records, verdict, write_json
from infra import cli, config
from infra.cli import reporting
from infra.curves import plot_curves
from model import load_decoder
from settings import DISTIL, REINFORCE, TrainSettings, with_defaults

DEMO_QUESTIONS = 200  # of each test set; `rows` takes all of them
DEMO_STEPS = 100  # of each reinforcement, 64 episodes a step


def demo(runs: Path) -> None:
    """DGPO with one seed, and the same reinforcement without the teacher, from one cold start.

    The student is weak when reinforcement begins (configs/weak-start.toml). Both runs have the
    learning rate that was best for their kind on development questions.
    """
    started = time.perf_counter()
    episodes, kd, dgpo, ppo = (runs / name for name in ("episodes.jsonl", "kd", "dgpo", "ppo"))
    presets = rows.config_flags(("world", "weak-start"), ROOT / "configs")
    ask_teacher = [*torchrun(2), *presets, "--phase", "episodes", "--episodes", str(episodes)]
    after_kd = ("--student", str(kd), "--steps", str(DEMO_STEPS))
    jobs = [
        Job("episodes", lambda: ask_teacher, episodes, cores=2),
        train_job("kd", "kd", kd, *presets, "--episodes", str(episodes), needs=("episodes",),
                  processes=2),
        train_job("dgpo", "dgpo", dgpo, *presets, *after_kd, needs=("kd",)),
        train_job("ppo", "dgpo", ppo, *presets, *after_kd, "--kl-where", "none",
                  "--actor-lr", "3e-4", needs=("kd",))]
    models = {"Student": ROOT / "world" / "student", "Teacher": ROOT / "world" / "teacher",
              "KD": kd, "KD, then PPO": ppo, "DGPO": dgpo}
    outs = {name: runs / f"eval-{model.name}" for name, model in models.items()}
    limit = ("--limit", str(DEMO_QUESTIONS))
    for name in reversed(models):  # beside DGPO, which takes the longest
        needs = ("dgpo",) if name == "DGPO" else ("ppo",)
        jobs.append(eval_job(name, models[name], outs[name], *limit, needs=needs))
    run_jobs(jobs, runs / "logs")

    title = f"Exact match, greedy, on {DEMO_QUESTIONS} test questions of each set"
    print(f"\n{title} of the embedded world\n")
    print(evaluation.table([read_json(out / "result.json") for out in outs.values()]))
    plot_curves([run / "metrics.jsonl" for run in (ppo, dgpo)], runs / "curve.png")
    if samples := sorted((dgpo / "samples").iterdir()):
        title = f"Episodes of the last step that kept samples ({samples[-1]})"
        print(f"\n{title}; | marks what the agent wrote\n")
        print(samples[-1].read_text())
    took = time.perf_counter() - started
    print(f"Curve: {runs / 'curve.png'}. Everything took {took:.0f} s.")


# ---- every row of the paper's tables ----

# The lengths aim at what KD and DGPO take together; docs/reproduction.md says what each row took.
ROWS = {
    "seqkd": Row("SeqKD", presets=("seqkd",), flags=("--epochs", "7")),
    "kd": Row("KD", "kd"),
    "kd-long": Row("KD, as long as DGPO", "kd", flags=("--epochs", "16"), rate_of="kd"),
    "gkd": Row("GKD", "gkd", flags=("--steps", "300")),
    "distillm": Row("DistiLLM", "distillm", flags=("--epochs", "11")),
    "taid": Row("TAID", "taid", flags=("--epochs", "11")),
    "ppo": Row("PPO", "ppo"),
    "grpo": Row("GRPO", "grpo"),
    "sft-ppo": Row("SFT -> PPO", presets=("sft-ppo",), begins="seqkd"),
    "dgpo": Row("DGPO", "dgpo", begins="kd"),
    "without-cold-start": Row("(a) w/o cold start", presets=("without-cold-start",)),
    "uniform-kl": Row("(b) uniform KL", presets=("uniform-kl",), begins="kd"),
    "without-teacher": Row("(c) w/o teacher guidance", presets=("without-teacher",), begins="kd"),
    "ppo-kd": Row("(d) PPO -> KD", presets=("ppo-kd",), begins="ppo"),
    "dgpo-grpo": Row("DGPO with GRPO", presets=("dgpo-grpo",), begins="kd"),
    "kd-gkd": Row("KD -> GKD", presets=("kd-gkd",), begins="kd", flags=("--steps", "180")),
    "teacher-ppo": Row("Teacher, PPO", "ppo", begins="teacher", rate_of="ppo"),
}
GIVEN = {"student": "Student", "teacher": "Teacher"}  # models that no row trains
# Every row is tuned in the same way. The first seed runs at its preset's learning rate and at twice
# that, at the row's full length. The run that answers more development questions is the row's first
# seed and gives the other seeds' rate. These questions have all seven styles of the test sets and
# are about the half of the world that training asks about. docs/log.md says why we no longer
# choose after half of the length, on the styles of training.
DEVELOPMENT = "world/questions/development.jsonl"
TUNING_SEED = rows.SEEDS[0]
# Other models of the world (`python -m world.build build-pairs`). They train at the learning rates
# that were chosen for the first pair.
PAIRS = {"": "first pair", "larger-teacher": "larger teacher", "llama": "Llama-type"}
PAIR_ROWS = ("ppo", "kd", "dgpo")
PAIRS_FOLDER = ROOT / "runs" / "world" / "pairs"
TABLES = {
    "Table 2": ("student", "teacher", "ppo", "sft-ppo", "gkd", "seqkd", "kd", "kd-long", "distillm",
                "taid", "dgpo"),
    "Figure 3": ("student", "ppo", "teacher", "teacher-ppo"),
    "Table 6": ("dgpo", "without-cold-start", "uniform-kl", "without-teacher", "ppo-kd"),
    "Figure 6": ("dgpo", "dgpo-grpo", "without-cold-start", "gkd", "kd-gkd", "ppo", "grpo"),
}
FIGURES = {"figure-4": ("ppo", "grpo"), "figure-6": TABLES["Figure 6"]}  # training curves
BELOW_DGPO = ("kd", "kd-long", "ppo", "gkd", "distillm", "taid", "sft-ppo", "without-cold-start",
              "uniform-kl", "without-teacher", "ppo-kd", "dgpo-grpo", "kd-gkd")  # in the paper
ORDERINGS = [("kd", "seqkd"), *(("dgpo", row) for row in BELOW_DGPO)]
CURVE = ("rollout/score", "eval/score", "loss/entropy", "rollout/kl_student_guide",
         "rollout/searches", "rollout/agent_tokens")
PEAKS = {"memory": "peak_memory_gib", "gpu": "peak_gpu_gib"}  # of perf.jsonl


@dataclass(frozen=True)
class Pair:
    """A student and its teacher, how they are trained, and where runs and records go."""

    runs: Path
    records: Path
    models: Path = ROOT / "world"  # with the folders student and teacher
    rates_of: Path | None = None  # records whose learning rates it takes over; None: it chooses
    rows: Mapping[str, Row] = field(default_factory=lambda: ROWS)
    presets: tuple[str, ...] = ("world",)
    drawn: Sequence[str] | None = None  # rows whose records keep their curves; None: all

    @property
    def chooses_rates(self) -> bool:
        return self.rates_of is None

    def episodes(self, seed: int) -> Path:
        return self.runs / f"episodes-{seed}.jsonl"

    def best_run(self, name: str) -> Record:
        """The record of the tuning run that gives this row its learning rate."""
        name = self.tuned(name)
        rates = self.rows[name].rates
        if len(rates) == 1:
            return {"run": 0, "times": rates[0]}
        return best_run(self.rates_of or self.records, name)

    def tuned(self, name: str) -> str:
        """The row whose choice of a learning rate a row takes."""
        return self.rows[name].rate_of or name

    def chooses(self, name: str) -> bool:
        """Whether a row's rate is chosen here, among several."""
        return self.chooses_rates and len(self.rows[self.tuned(name)].rates) > 1


def row_jobs(pair: Pair, names: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Teacher episodes, choice of learning rates, training and measuring of these rows."""
    tuned = [name for name in names if pair.chooses(name) and pair.tuned(name) == name]
    episode_seeds = {*seeds, TUNING_SEED} if pair.chooses_rates else {*seeds}
    jobs = [episodes_job(pair, seed) for seed in sorted(episode_seeds)]
    for name in tuned:
        jobs += tuning_jobs(pair, name)
    for name, label in GIVEN.items():
        jobs += measure_jobs(pair, name, None, label, pair.models / name)
    for seed in seeds:
        for name in names:
            jobs.append(row_job(pair, name, seed))
            label = pair.rows[name].label
            jobs += measure_jobs(pair, name, seed, label, pair.runs / f"{name}-{seed}")
    return jobs


def episodes_job(pair: Pair, seed: int) -> Job:
    """Let the teacher write the episodes that all rows of a seed learn from."""
    episodes = pair.episodes(seed)
    command = ["train.py", "--phase", "episodes", "--episodes", str(episodes),
               "--seed", str(seed), "--teacher", str(pair.models / "teacher")]
    return Job(f"episodes {seed}", lambda: command, episodes)


def row_needs(pair: Pair, name: str, seed: int) -> tuple[str, ...]:
    """The jobs whose results a row's training reads."""
    row = pair.rows[name]
    trained = [other for other in (row.begins, row.teacher) if other in pair.rows]
    return (f"episodes {seed}", *(f"{other} {seed}" for other in trained))


def row_job(pair: Pair, name: str, seed: int) -> Job:
    """Train a row at its chosen rate. Its first seed is the better tuning run, if that is there."""
    folder, needs = pair.runs / f"{name}-{seed}", row_needs(pair, name, seed)
    if pair.chooses(name):
        tuned = pair.tuned(name)
        needs += tuple(f"judge {tuned} {k}" for k in range(len(pair.rows[tuned].rates)))

    def tuning_run() -> Path | None:
        run = pair.runs / f"tune-{name}-{pair.best_run(name)['run']}"
        is_first = pair.chooses(name) and seed == TUNING_SEED
        return run if is_first and (run / "model.safetensors").exists() else None

    def command() -> list[str]:
        if tuning_run():
            return []
        return row_command(pair, name, seed, folder, pair.best_run(name)["times"])

    def link() -> None:
        if run := tuning_run():
            folder.symlink_to(run.name)

    return Job(f"{name} {seed}", command, folder / "model.safetensors", needs, after=link)


def row_command(pair: Pair, name: str, seed: int, folder: Path, times: float) -> list[str]:
    """Arguments of Python that train a row at a multiple of its preset's learning rate."""
    def model(name: str) -> Path:
        return pair.runs / f"{name}-{seed}" if name in pair.rows else pair.models / name

    row = pair.rows[name]
    command = rows.train_command(
        row, pair.presets, student=model(row.begins or "student"), run_dir=folder, seed=seed)
    rate, preset = preset_rate(pair, name)
    command += ["--save-every", "10", "--" + rate.replace("_", "-"), f"{preset * times:g}"]
    given = {"episodes": pair.episodes(seed), "teacher": model(row.teacher or "teacher")}
    for setting, path in given.items():
        if config.reads(TrainSettings, setting, row_settings(pair, name).phase):
            command += [f"--{setting}", str(path)]
    return command


def row_settings(pair: Pair, name: str) -> TrainSettings:
    """What the presets and flags of a row say."""
    flags = rows.row_flags(pair.rows[name], pair.presets, ROOT / "configs")
    return cli.load(TrainSettings, flags, prog="train.py", description="", finish=with_defaults)


def preset_rate(pair: Pair, name: str) -> tuple[str, float]:
    """The setting that holds the learning rate of a row's phase, and what its presets say."""
    settings = row_settings(pair, name)
    rate = "kd_lr" if settings.phase in DISTIL else "actor_lr"
    return rate, getattr(settings, rate)


# ---- the choice of learning rates ----


def tuning_jobs(pair: Pair, name: str) -> list[Job]:
    """Train the row's first seed at each learning rate, and ask it the development questions."""
    jobs = []
    for number, times in enumerate(pair.rows[name].rates):
        folder, out = pair.runs / f"tune-{name}-{number}", pair.runs / f"eval-tune-{name}-{number}"
        train = row_command(pair, name, TUNING_SEED, folder, times)
        judge = ["eval.py", "--model", str(folder), "--out", str(out), "--questions", DEVELOPMENT]

        def keep(number: int = number, folder: Path = folder, out: Path = out) -> None:
            write_tuning(pair, name, number, folder, out)

        tune = f"tune {name} {number}"
        jobs += [Job(tune, lambda command=train: command, folder / "model.safetensors",
                     row_needs(pair, name, TUNING_SEED)),
                 Job(f"judge {name} {number}", lambda command=judge: command,
                     tuning_record(pair.records, name, number), (tune,), after=keep)]
    return jobs


def tuning_record(records: Path, name: str, number: int) -> Path:
    return records / "tuning" / f"{name}-{number}.json"


def write_tuning(pair: Pair, name: str, number: int, folder: Path, out: Path) -> None:
    """Record a tuning run: its rate, also as a multiple of the preset's, and its score."""
    setting, preset = preset_rate(pair, name)
    rate = read_json(folder / "run.json")["settings"][setting]
    write_json(tuning_record(pair.records, name, number), {
        "row": name, "run": number, "rate": rate, "times": round(rate / preset, 3),
        "score": read_json(out / "result.json")["average"]["em"],
        "num_steps": len(read_lines(folder / "metrics.jsonl")), "train_s": rows.seconds(folder),
        "collapsed": (folder / "collapse.txt").exists()})


def tuning_runs(records: Path, name: str) -> list[Record]:
    """The recorded runs of a row, one for each rate, in their order."""
    return [read_json(path) for path in sorted(records.glob(f"tuning/{name}-[0-9].json"))]


def best_run(records: Path, name: str) -> Record:
    """The run with the highest score; of runs with equal scores the one with the lower rate."""
    return max(tuning_runs(records, name), key=lambda run: run["score"])


# ---- measuring and recording ----


def measure_jobs(pair: Pair, name: str, seed: int | None, label: str, model: Path) -> list[Job]:
    """Measure exact match, and ARCap for the models of Table 2; then write the record.

    seed None: a model that no row trains.
    """
    run, needs = (name, ()) if seed is None else (f"{name} {seed}", (f"{name} {seed}",))
    key = run.replace(" ", "-")
    out, record = pair.runs / f"eval-{key}", pair.records / f"{key}.json"
    flags = ["--model", str(model), "--name", label, "--out", str(out)]
    evaluate, arcap = ["eval.py", *flags], ["eval.py", "arcap", *flags, "--limit", "200"]

    def keep() -> None:
        is_drawn = pair.drawn is None or name in pair.drawn
        write_record(name, seed, model, out, record, has_curve=is_drawn)

    if not pair.chooses_rates or pair.rows is not ROWS or name not in TABLES["Table 2"]:
        return [Job(f"eval {run}", lambda: evaluate, record, needs, after=keep)]
    return [Job(f"eval {run}", lambda: evaluate, out / "result.json", needs),
            Job(f"arcap {run}", lambda: arcap, record, (f"eval {run}",), after=keep)]


def write_record(name: str, seed: int | None, model: Path, out: Path, record: Path, *,
                 has_curve: bool = True, threads: int = 1) -> None:
    """Write what tables, intervals and plots need of a run. threads: of its processes."""
    correct: dict[str, str] = {}
    for row in read_lines(out / "result.jsonl"):
        correct[row["set"]] = correct.get(row["set"], "") + str(int(row["em"]))
    result = read_json(out / "result.json")
    result["settings"] = rows.chosen(result["settings"], asdict(evaluation.EvalSettings()))
    result.update(rows.row_record(name, seed, threads), correct=correct)
    if (out / "arcap.json").exists():
        result["arcap"] = read_json(out / "arcap.json")["arcap"]
    if (model / "run.json").exists():
        result.update(rows.training_record(model, CURVE if has_curve else ()))
        settings = read_json(model / "run.json")["settings"]
        reinforces = settings["phase"] in REINFORCE
        result["collapsed"] = (reinforces and not settings.get("max_minutes")  # its time was up
                               and result["num_steps"] < settings["steps"])
        steps = read_lines(model / "perf.jsonl")
        parts = [part for part in ("rollout_s", "score_s", "update_s") if part in steps[0]]
        result["step_s"] = {part: sum(step[part] for step in steps) / len(steps) for part in parts}
        result["peak_gib"] = {key: max(step[name] for step in steps) for key, name in PEAKS.items()
                              if name in steps[0]}
    write_json(record, result)


# ---- report ----


def report(records: Path) -> str:
    """Tables, each ordering that the paper claims, times and stability, from records alone."""
    runs_of = rows.recorded_rows(records, "experiments.reproduce rows")
    in_table_2 = [run for name in TABLES["Table 2"] for run in runs_of.get(name, [])]
    parts = [
        *exact_match_tables(runs_of),
        f"Table 3, average exact match of each pair of models\n\n{pairs_table(records)}",
        f"ARCap (Table 5), 200 questions a set\n\n{evaluation.arcap_table(in_table_2)}",
        "\n".join(ordering_lines(records, runs_of)),
        "\n".join(training_lines(runs_of)),
        overhead(runs_of),
        "\n".join(tuning_lines(records)),
    ]
    return "\n\n".join(parts)


def exact_match_tables(runs_of: dict[str, list[Record]]) -> Iterator[str]:
    caption = "exact match, greedy; mean over seeds, standard deviation of the average"
    for title, names in TABLES.items():
        if runs := [run for name in names for run in runs_of.get(name, [])]:
            yield f"{title}, {caption}\n\n{evaluation.table(runs)}"


def ordering_lines(records: Path, runs_of: dict[str, list[Record]]) -> Iterator[str]:
    yield ("Orderings that the paper claims: difference of the averages over sets, "
           "paired 95 % interval\n")
    for left, right in ORDERINGS:
        if rows.common_seeds(runs_of.get(left, []), runs_of.get(right, [])):
            yield verdict(runs_of[left], runs_of[right])
    if "dgpo" in runs_of and "teacher" in runs_of:
        yield f"DGPO - teacher: {against_teacher(runs_of['dgpo'], runs_of['teacher'])}"
    for pair, label in PAIRS.items():
        others = read_records(records / pair) if pair else {}
        for row in ("kd", "ppo"):
            if "dgpo" in others and row in others:
                yield f"{label}: {verdict(others['dgpo'], others[row])}"


def against_teacher(student: list[Record], teacher: list[Record]) -> str:
    """The difference on each set; "!" where the paired interval over questions excludes 0."""
    differences = evaluation.compare_correct(student, teacher)
    del differences["all"]
    return rows.differences_text(
        {evaluation.NAMES.get(name, name): value for name, value in differences.items()})


def training_lines(runs_of: dict[str, list[Record]]) -> Iterator[str]:
    yield ("Training, seconds on one thread; best and last sampled score of a step (mean of 5), "
           "collapses\n")
    for name, runs in runs_of.items():
        if name in ROWS:
            took = ", ".join(f"{run['train_s']:.0f}" for run in runs)
            ends = [stability(run["curve"]) for run in runs]
            scores = "; ".join(f"{best:.2f} -> {last:.2f}" for best, last in ends
                               if not math.isnan(best))
            collapsed = sum(run["collapsed"] for run in runs)
            yield f"{ROWS[name].label:26} {took:20} {scores}  {collapsed} collapsed"


def stability(curve: dict[str, list]) -> tuple[float, float]:
    """(best, last) mean of five steps' sampled scores; NaN if nothing was sampled."""
    scores = [score for score in curve.get("rollout/score", []) if score is not None]
    means = [sum(scores[i : i + 5]) / 5 for i in range(len(scores) - 4)]
    return (max(means), means[-1]) if means else (math.nan, math.nan)


def overhead(runs_of: dict[str, list[Record]]) -> str:
    """How much longer DGPO trains than the same without a teacher, for each seed."""
    seconds_without = {run["seed"]: run["train_s"] for run in runs_of.get("without-teacher", [])}
    ratios = ", ".join(f"{run['train_s'] / seconds_without[run['seed']] - 1:+.1%}"
                       for run in runs_of.get("dgpo", []) if run["seed"] in seconds_without)
    if not ratios:
        return "The teacher's overhead: not recorded"
    return f"The teacher's overhead in training time, each seed, beside other jobs: {ratios}"


def tuning_lines(records: Path) -> Iterator[str]:
    yield ("Tuning: exact match on development questions, at multiples of the preset's learning "
           "rate\n")
    for name in ROWS:
        if runs := tuning_runs(records, name):
            scores = ", ".join(f"x{run['times']:g} {run['score']:.3f}" for run in runs)
            best = best_run(records, name)["times"]
            yield f"{ROWS[name].label:26} {scores}; taken x{best:g}"


def plot(records: Path) -> None:
    """Draw the paper's figures of training curves and of sizes, beside the folder of records."""
    for figure, names in FIGURES.items():
        paths = [path for name in names for path in sorted(records.glob(f"{name}-[0-9]*.json"))]
        if paths:
            plot_curves(paths, records.with_name(f"{records.name}-{figure}.png"))
    runs_of = read_records(records)
    lines = {"as it is": ("student", "teacher"), "after PPO": ("ppo", "teacher-ppo")}
    if not all(name in runs_of for names in lines.values() for name in names):
        return
    decoders = [load_decoder(ROOT / "world" / name) for name in GIVEN]
    sizes = [sum(parameter.numel() for parameter in decoder.parameters()) for decoder in decoders]
    series = {}
    for label, names in lines.items():
        scores = [np.mean([run["average"]["em"] for run in runs_of[name]]) for name in names]
        series[label] = list(zip(sizes, map(float, scores), strict=True))
    plot_sizes(series, records.with_name(f"{records.name}-figure-3.png"))


# ---- other pairs of models ----


def pairs(runs: Path, records: Path, seeds: Sequence[int]) -> None:
    """Build the other models, and run Table 3's rows with them."""
    tuned = {name: len(tuning_runs(records, name)) for name in PAIR_ROWS}
    if missing := [name for name, num in tuned.items() if num < len(ROWS[name].rates)]:
        raise RuntimeError(f"{records}: got no learning rates of {', '.join(missing)}, expected "
                           "those that python -m experiments.reproduce rows chooses")
    run_jobs([pairs_job(PAIRS_FOLDER / "llama" / "teacher")], runs / "logs")
    for name in filter(None, PAIRS):
        pair = Pair(runs / name, records / name, PAIRS_FOLDER / name, rates_of=records)
        run_jobs(row_jobs(pair, PAIR_ROWS, seeds), runs / name / "logs")


def pairs_job(model: Path) -> Job:
    """Build the other models of the world until this one of them is there."""
    command = ["-m", "world.build", "build-pairs"]
    return Job("build pairs", lambda: command, model / "model.safetensors", cores=CORES)


def pairs_table(records: Path) -> str:
    """Table 3: averages over sets of each pair, mean and standard deviation over seeds."""
    runs_of = {pair: read_records(records / pair) for pair in PAIRS}
    lines = [["", *PAIRS.values()]]
    for name in (*GIVEN, *PAIR_ROWS):
        cells = []
        for pair in PAIRS:
            averages = [run["average"]["em"] for run in runs_of[pair].get(name, [])]
            cells.append(rows.mean_and_deviation(averages) if averages else "-")
        lines.append([GIVEN[name] if name in GIVEN else ROWS[name].label, *cells])
    return evaluation.align(lines)


def main(argv: list[str]) -> None:
    folder = "demo" if argv[:1] == ["demo"] else "rows"
    experiments = ("demo", "rows", "pairs", "report")
    options = rows.parse_experiment(argv, "experiments.reproduce", __doc__, ROWS, folder,
                                    experiments)
    runs, records = options.runs, options.records
    if options.experiment == "demo":
        return demo(runs)
    if options.experiment == "rows":
        run_jobs(row_jobs(Pair(runs, records), options.rows, options.seeds), runs / "logs")
    if options.experiment == "pairs":
        pairs(runs, records, options.seeds)
    print(report(records))
    if options.experiment == "report":
        plot(records)


if __name__ == "__main__":
    with reporting("experiments.reproduce", RuntimeError):
        main(sys.argv[1:])
