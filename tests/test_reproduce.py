"""The experiments: jobs, rows, records, reports, and the commands that they run.

Run: python -m pytest tests/test_reproduce.py
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import bard
import eval as evaluation
import qagent
import settings as core
from experiments import bard as reproduce_bard
from experiments import guidance, plots, reproduce, rows
from experiments import qagent as reproduce_qagent
from experiments.jobs import ROOT, Job, run_jobs
from experiments.reproduce import ORDERINGS, ROWS, TABLES, Pair, row_jobs
from experiments.rows import SEEDS, Row, read_json, read_records, verdict, write_json
from infra import cli, curves

CONFIGS = ROOT / "configs"


# ---- jobs ----


def job(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> Job:
    """A job that appends its name to order.txt, runs `code` and leaves <name>.done."""
    script = f"open('order.txt', 'a').write('{name} '); {code}; open('{name}.done', 'w')"
    command = ["-c", f"import os, sys; os.chdir({str(folder)!r}); {script}"]
    return Job(name, lambda: command, folder / f"{name}.done", needs)


def order(folder: Path) -> list[str]:
    return (folder / "order.txt").read_text().split()


def test_a_job_waits_for_what_it_needs_and_finished_ones_are_not_run_again(tmp_path):
    jobs = [
        job(tmp_path, "b", "pass", needs=("a",)),
        job(tmp_path, "c", "pass", needs=("b",)),
        job(tmp_path, "a", "pass"),
    ]
    run_jobs(jobs, tmp_path / "logs")
    assert order(tmp_path) == ["a", "b", "c"]
    (tmp_path / "c.done").unlink()
    run_jobs(jobs, tmp_path / "logs")
    assert order(tmp_path) == ["a", "b", "c", "c"]


def test_a_job_that_only_finished_ones_need_is_left_out(tmp_path):
    """Records are kept and weights are not: only what the missing records need is trained again."""
    jobs = [
        job(tmp_path, "train", "pass"),
        job(tmp_path, "measure", "pass", needs=("train",)),
        job(tmp_path, "other", "pass"),
        job(tmp_path, "next", "pass", needs=("other",)),
        job(tmp_path, "last", "pass", needs=("next",)),
    ]
    (tmp_path / "measure.done").touch()
    run_jobs(jobs, tmp_path / "logs")
    assert sorted(order(tmp_path)) == ["last", "next", "other"]


def test_a_failed_job_ends_the_experiment_with_the_end_of_its_log(tmp_path):
    jobs = [
        job(tmp_path, "bad", "sys.exit('no such checkpoint')"),
        job(tmp_path, "after", "pass", needs=("bad",)),
    ]
    with pytest.raises(RuntimeError, match="no such checkpoint"):
        run_jobs(jobs, tmp_path / "logs")
    assert order(tmp_path) == ["bad"]


def test_a_job_that_ends_well_without_its_result_is_a_failure(tmp_path):
    silent = Job("silent", lambda: ["-c", "pass"], tmp_path / "never")
    with pytest.raises(RuntimeError, match="silent failed"):
        run_jobs([silent], tmp_path / "logs")


def test_a_job_without_a_command_is_done_by_what_follows_it(tmp_path):
    done = tmp_path / "done"
    run_jobs([Job("touch", lambda: [], done, after=done.touch)], tmp_path / "logs")
    with pytest.raises(RuntimeError, match="idle failed"):
        run_jobs([Job("idle", lambda: [], tmp_path / "never")], tmp_path / "logs")


def test_needs_that_no_job_meets_are_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(RuntimeError, match="lonely: got needs that no job meets"):
        run_jobs([job(tmp_path, "lonely", "pass", needs=("nobody",))], tmp_path / "logs")


def test_a_run_that_collapsed_counts_and_what_follows_a_job_is_done(tmp_path):
    seen = []
    # torchrun ends with status 1, whatever the cause.
    script = f"open({str(tmp_path / 'done')!r}, 'w'); import sys; sys.exit(1)"
    failing = Job("run", lambda: ["-c", script], tmp_path / "done", after=lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="run failed"):
        run_jobs([failing], tmp_path / "logs")
    assert not seen
    (tmp_path / "done").unlink()
    (tmp_path / "collapse.txt").write_text("the score fell")
    run_jobs([failing], tmp_path / "logs")
    assert seen == [1]


def test_a_report_without_records_says_how_to_make_them(tmp_path):
    for experiment, command in (
        (reproduce, "experiments.reproduce rows"),
        (guidance, "experiments.guidance run"),
        (reproduce_bard, "experiments.bard run"),
        (reproduce_qagent, "experiments.qagent run"),
    ):
        with pytest.raises(RuntimeError, match=command):
            experiment.report(tmp_path)


# ---- the commands of jobs, read by the programs that they call ----


def read_command(command: list[str]) -> Any:
    """The settings that train.py, or the program that measures, reads from a job's command."""
    if command[0] == "-m":  # torch.distributed.run and its flags
        command = command[command.index("train.py") :]
    program, *flags = command
    if program == "train.py":
        phase = cli.find_phase(flags, CONFIGS / "world.toml")
        if phase in core.PHASES:
            return cli.load(core.TrainSettings, flags, prog=program, description="",
                            finish=core.with_defaults)
        system = {"bard": bard, "qagent": qagent}[cli.program_of(phase)]
        owner = bard.BardSettings if system is bard else qagent.QAgentSettings
        settings = cli.load(owner, flags, prog=f"{system.__name__}.py", description="")
        return system.with_defaults(settings)
    if program == "eval.py":
        flags = flags[flags[0] == "arcap" :]
        owner, shared = evaluation.EvalSettings, evaluation.SHARED
    else:
        assert flags.pop(0) == "measure"
        owner, shared = {
            "bard.py": (bard.MeasureSettings, bard.SHARED),
            "qagent.py": (qagent.SearchSettings, qagent.SHARED),
        }[program]
    return cli.load(owner, flags, prog=f"{program} measure", description="", shared=shared)


def read_commands(jobs: Sequence[Job]) -> dict[str, Any]:
    """By name of the job; jobs without a command are left out."""
    commands = {job.name: job.command() for job in jobs}
    return {name: read_command(command) for name, command in commands.items() if command}


def write_tuned(records: Path, *scores: float) -> None:
    """Records of tuning runs at the preset's rate and at twice that."""
    for name in ROWS:
        for number, (times, score) in enumerate(zip(ROWS[name].rates, scores, strict=True)):
            record = {"row": name, "run": number, "times": times, "score": score}
            write_json(reproduce.tuning_record(records, name, number), record)


@pytest.fixture
def tuned(tmp_path) -> Pair:
    """A pair whose rows were all better at twice the preset's rate."""
    pair = Pair(tmp_path / "runs", tmp_path / "records")
    write_tuned(pair.records, 0.1, 0.3)
    return pair


def test_every_row_is_a_command_of_train_py_at_its_chosen_rate(tuned):
    commands = read_commands(row_jobs(tuned, list(ROWS), [0, 1]))
    for name, row in ROWS.items():
        settings, preset = commands[f"{name} 1"], reproduce.row_settings(tuned, name)
        begins = f"{row.begins}-1" if row.begins in ROWS else row.begins or "student"
        assert Path(settings.student).name == begins
        assert settings.run_dir.endswith(f"{name}-1") and settings.seed == 1
        if settings.phase in core.DISTIL:
            assert settings.episodes.endswith("episodes-1.jsonl")
        chosen = "kd_lr" if settings.phase in core.DISTIL else "actor_lr"
        for rate in ("kd_lr", "actor_lr"):
            times = 2.0 if rate == chosen else 1.0
            assert getattr(settings, rate) == pytest.approx(getattr(preset, rate) * times)
    assert {commands[f"{name} 1"].phase for name in ROWS} == {*core.PHASES} - {"episodes"}
    assert commands["uniform-kl 1"].kl_where == "all"
    assert commands["without-teacher 1"].kl_where == "none"
    assert commands["dgpo-grpo 1"].advantage == "group"
    assert commands["dgpo-grpo 1"].phase == "dgpo"


def test_a_row_is_tuned_at_its_full_length_from_where_it_begins(tuned):
    commands = read_commands(row_jobs(tuned, list(ROWS), [0, 1]))
    for name, row in ROWS.items():
        settings, preset = commands[f"{name} 1"], reproduce.row_settings(tuned, name)
        if row.rate_of:  # it takes over another row's choice
            assert f"tune {name} 0" not in commands
            continue
        begins = f"{row.begins}-0" if row.begins in ROWS else row.begins or "student"
        rate = "kd_lr" if settings.phase in core.DISTIL else "actor_lr"
        for number, times in enumerate(row.rates):
            tuning = commands[f"tune {name} {number}"]
            assert getattr(tuning, rate) == pytest.approx(getattr(preset, rate) * times)
            assert Path(tuning.student).name == begins
            assert tuning.seed == 0
            for key in ("phase", "steps", "epochs", "eval_every"):
                assert getattr(tuning, key) == getattr(settings, key)
            judge = commands[f"judge {name} {number}"]
            assert judge.model == tuning.run_dir
            assert judge.questions == (reproduce.DEVELOPMENT,)


def test_models_of_table_2_get_arcap_and_every_model_a_record(tuned):
    jobs = row_jobs(tuned, list(ROWS), [0, 1])
    keys = {f"{name}-{seed}" for name in ROWS for seed in (0, 1)} | {"student", "teacher"}
    measured = {job.done.stem: job for job in jobs if job.done.parent == tuned.records}
    assert measured.keys() == keys and all(job.after for job in measured.values())
    with_arcap = {key for key, job in measured.items() if job.command()[1] == "arcap"}
    assert with_arcap == {key for key in keys if re.sub(r"-\d$", "", key) in TABLES["Table 2"]}


def test_the_first_seed_of_a_row_is_its_better_tuning_run(tuned):
    better = tuned.runs / "tune-kd-1"
    better.mkdir(parents=True)
    (better / "model.safetensors").touch()
    [first, second] = [reproduce.row_job(tuned, "kd", seed) for seed in (0, 1)]
    assert first.command() == [] and second.command()[0] == "train.py"
    # Nothing of KD's choice stands for KD, as long as DGPO: only its rate does.
    assert reproduce.row_job(tuned, "kd-long", 0).command()[0] == "train.py"
    run_jobs([dataclasses.replace(first, needs=())], tuned.runs / "logs")
    assert (tuned.runs / "kd-0").resolve() == better


def test_a_first_seed_is_trained_where_the_record_of_tuning_alone_is_left(tuned):
    first = read_command(reproduce.row_job(tuned, "seqkd", 0).command())
    assert first.kd_lr == pytest.approx(2 * reproduce.row_settings(tuned, "seqkd").kd_lr)
    assert first.run_dir.endswith("seqkd-0")


def test_the_better_rate_is_chosen_and_of_equals_the_presets(tmp_path):
    write_tuned(tmp_path, 0.1, 0.2)
    assert reproduce.best_run(tmp_path, "kd")["times"] == 2.0
    write_tuned(tmp_path, 0.01, 0.01)
    assert reproduce.best_run(tmp_path, "kd")["times"] == 1.0


def test_another_pair_takes_over_the_rates_and_its_own_models(tuned, tmp_path):
    records, models = tmp_path / "records" / "llama", tmp_path / "models"
    llama = Pair(tmp_path / "runs", records, models, rates_of=tuned.records)
    jobs = row_jobs(llama, reproduce.PAIR_ROWS, [0])
    assert not [job.name for job in jobs if job.name.startswith(("tune", "arcap"))]
    assert {job.done.parent for job in jobs if job.name.startswith("eval")} == {records}
    settings = read_commands(jobs)["dgpo 0"]
    assert settings.actor_lr == pytest.approx(2 * reproduce.row_settings(tuned, "dgpo").actor_lr)
    assert settings.teacher == str(models / "teacher") and settings.student.endswith("kd-0")


# ---- when guidance pays ----


def test_every_cell_is_dgpo_from_its_start_with_its_form_for_the_same_number_of_episodes(tmp_path):
    pair = guidance.pair_of(tmp_path / "runs", tmp_path / "records")
    for name in guidance.ROWS:
        for number, times in enumerate(guidance.RATES):
            record = {"run": number, "times": times, "score": number / 10}
            write_json(reproduce.tuning_record(pair.records, name, number), record)
    commands = read_commands(row_jobs(pair, list(guidance.ROWS), [1]))
    for start, epochs in guidance.EPOCHS.items():
        if epochs:
            assert commands[f"{start} 1"].epochs == epochs and commands[f"{start} 1"].phase == "kd"
            assert f"tune {start} 0" not in commands
        for form, kl in (("none", ("none", "exact")), ("reward", ("wrong", "reward")),
                         ("exact", ("wrong", "exact")), ("uniform", ("all", "exact"))):
            settings = commands[f"{start}-{form} 1"]
            assert (settings.kl_where, settings.kl_in) == kl and settings.phase == "dgpo"
            assert settings.student.endswith(f"{start}-1" if epochs else "world/student")
            assert settings.steps * settings.prompts_per_step == 7680
            assert settings.actor_lr == pytest.approx(1e-3)  # the better one, of 3e-4 and 1e-3
            rates = [commands[f"tune {start}-{form} {number}"].actor_lr for number in (0, 1)]
            assert rates == pytest.approx([3e-4, 1e-3])
    assert not [name for name in commands if name.startswith("arcap")]
    for name in guidance.OTHERS:
        settings = commands[f"{name} 1"]
        if settings.phase in core.REINFORCE:
            assert settings.steps * settings.episodes_per_step in (7680, 7200)  # groups of five
    assert commands["kd1-grpo 1"].advantage == "group" and commands["kd1-grpo 1"].kl_in == "exact"
    named = {name for names in guidance.PAPER_ORDERINGS for name in names} | {*guidance.CURVES}
    assert named <= {*guidance.ROWS}


def test_a_row_may_be_guided_by_a_model_that_another_row_trains(tmp_path):
    table = {"better": Row("better", "ppo", begins="teacher", rates=(1.0,)),
             "guided": Row("guided", "dgpo", teacher="better", rates=(0.5,))}
    pair = Pair(tmp_path, tmp_path / "records", rows=table)
    job = reproduce.row_job(pair, "guided", 2)
    assert job.needs == ("episodes 2", "better 2")
    settings = read_command(job.command())
    assert settings.teacher.endswith("better-2") and settings.student.endswith("world/student")
    assert settings.actor_lr == reproduce.row_settings(pair, "guided").actor_lr / 2


def test_the_report_of_guidance_has_a_line_a_start_and_says_what_is_above_what(tmp_path):
    def write(row: str, seed: int, share: float) -> None:
        record(tmp_path / "cells", row, seed, {"nq": share}, guidance.ROWS)

    for seed in SEEDS:
        write("kd1", seed, 0.2)
        write("kd1-none", seed, 0.3)
        write("kd1-exact", seed, 0.6 + 0.01 * seed)
    for name, share in (("student", 0.04), ("teacher", 0.7)):
        write_json(tmp_path / "cells" / f"{name}.json", {
            "row": name, "name": name, "sets": {"nq": {"em": share}}, "average": {"em": share}})
    text = guidance.report(tmp_path / "cells")
    assert re.search(r"^kd1 +0\.200 \S+ +0\.300 \S+ +- +0\.610 \u00b10\.010 +-", text, re.MULTILINE)
    assert re.search(r"^kd1, exact, wrong > kd1, no KL +holds +\+0\.31", text, re.MULTILINE)
    assert re.search(r"^plain +0\.040 +- ", text, re.MULTILINE)
    pytest.importorskip("matplotlib")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guidance, "plot_cells", lambda *arguments: drawn.append(arguments))
        guidance.plot(tmp_path / "cells")
    [(lines, teacher, out)] = drawn
    assert lines["exact, wrong"] == [(pytest.approx(0.2), pytest.approx(0.61))]
    assert lines["exact, all"] == [] and teacher == 0.7
    plots.plot_cells(lines, teacher, out)
    assert out == tmp_path / "cells.png" and out.stat().st_size > 1000
    assert (tmp_path / "cells-curves.png").stat().st_size > 1000


def test_tables_and_orderings_name_rows_that_exist():
    names = {*ROWS, *reproduce.GIVEN}
    assert {name for table in TABLES.values() for name in table} <= names
    assert {name for ordering in ORDERINGS for name in ordering} <= names
    assert all(row.begins in names | {""} for row in ROWS.values())
    assert all(row.rate_of in {"", *ROWS} for row in ROWS.values())


def test_rows_bring_those_that_they_begin_from_and_keep_the_order_of_all(tmp_path):
    argv = ["rows", "--rows", "ppo-kd", "dgpo", "--runs", str(tmp_path), "--seeds", "5"]
    options = rows.parse_experiment(argv, "p", "doc", ROWS, "rows", ("rows",))
    assert options.rows == ["kd", "ppo", "dgpo", "ppo-kd"] and options.seeds == [5]
    assert options.records == tmp_path / "records"
    with pytest.raises(SystemExit):
        rows.parse_experiment(["rows", "--rows", "kdd"], "p", "doc", ROWS, "rows", ("rows",))


# ---- the demonstration ----


def test_the_demo_reinforces_with_and_without_the_teacher_and_shows_what_came_out(
    tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    jobs = {}

    def leave_results(all_jobs: list[Job], logs: Path) -> None:
        jobs.update({job.name: job for job in all_jobs})
        for name in ("student", "teacher", "kd", "ppo", "dgpo"):
            sets = {"nq": {"em": 0.5}}
            result = {"name": name, "sets": sets, "average": {"em": 0.5}}
            write_json(tmp_path / f"eval-{name}" / "result.json", result)
        write_run(tmp_path / "kd", {}, [{"step": 1, "eval/score": 0.1}])
        for name in ("ppo", "dgpo"):
            step = {"step": 1, "rollout/score": 0.2, "eval/score": 0.2}
            write_run(tmp_path / name, {}, [step])
        (tmp_path / "dgpo" / "samples").mkdir()
        (tmp_path / "dgpo" / "samples" / "step-1.txt").write_text("| <answer> 1915 </answer>")

    monkeypatch.setattr(reproduce, "run_jobs", leave_results)
    reproduce.demo(tmp_path)
    commands = {name: read_command(job.command()) for name, job in jobs.items()}
    assert commands["kd"].episodes == commands["episodes"].episodes
    assert commands["kd"].epochs == 1
    for name, where, rate in (("dgpo", "wrong", 1e-3), ("ppo", "none", 3e-4)):
        settings = commands[name]
        assert settings.student == commands["kd"].run_dir and settings.kl_in == "exact"
        assert (settings.kl_where, settings.actor_lr) == (where, pytest.approx(rate))
        assert (settings.steps, settings.prompts_per_step) == (reproduce.DEMO_STEPS, 64)
        assert jobs[name].cores == 1 and jobs[name].needs == ("kd",)  # beside each other
    assert commands["eval eval-dgpo"].model == commands["dgpo"].run_dir
    assert commands["eval eval-student"].model == str(ROOT / "world" / "student")
    assert jobs["episodes"].cores == jobs["kd"].cores == 2
    text = capsys.readouterr().out
    assert "| <answer> 1915 </answer>" in text and "dgpo" in text
    assert (tmp_path / "curve.png").stat().st_size > 1000


# ---- records ----


def write_run(folder: Path, settings: dict, metrics: Sequence[dict]) -> None:
    """What train.py leaves of a run, as far as records read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    for name in ("metrics.jsonl", "perf.jsonl"):
        lines = [json.dumps({"seconds": 2.0, "rollout_s": 1.5, **step}) for step in metrics]
        (folder / name).write_text("".join(line + "\n" for line in lines))


def test_a_record_names_files_as_seen_from_the_repository(tmp_path):
    write_json(tmp_path / "a.json", {"argv": [f"{ROOT}/runs/kd", "--seed"]})
    assert read_json(tmp_path / "a.json") == {"argv": ["runs/kd", "--seed"]}


@pytest.mark.parametrize("key", ["sets", "budgets"])
def test_a_record_has_the_names_of_its_measures_once(tmp_path, key):
    record = {key: {"a": {"em": 0.5, "n": 2}, "b": {"em": 0.25, "n": 4}}}
    write_json(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text()
    assert text == f'{{"{key}":{{"columns":["em","n"],"a":[0.5,2],"b":[0.25,4]}}}}\n'
    assert read_json(tmp_path / "a.json") == record
    for other in ({key: {"a": {"em": 0.5}, "b": {"n": 4}}}, {key: {}}):
        write_json(tmp_path / "b.json", other)
        assert read_json(tmp_path / "b.json") == other


def test_a_tuning_run_is_kept_with_its_average_on_development_questions(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, {"phase": "kd", "kd_lr": 4e-3}, [{"step": 1}, {"step": 2}])
    (folder / "result.json").write_text('{"average": {"em": 0.25}}')
    reproduce.write_tuning(Pair(tmp_path, tmp_path), "kd", 1, folder, folder)
    record = read_json(tmp_path / "tuning" / "kd-1.json")
    assert (record["score"], record["times"], record["train_s"]) == (0.25, 2.0, 4.0)
    assert record["num_steps"] == 2 and not record["collapsed"]


def test_a_record_holds_what_a_run_answered_and_how_it_was_trained(tmp_path):
    steps = [{"step": 1, "rollout/score": 0.25}, {"step": 2, "rollout/score": 0.123456}]
    write_run(tmp_path / "model", {"phase": "dgpo", "steps": 3, "clip_eps": 0.2}, steps)
    out = tmp_path / "eval"
    write_json(out / "result.json", {"name": "DGPO", "average": {"em": 0.5},
                                      "settings": {"top_p": 1.0, "top_k": 4}})
    (out / "result.jsonl").write_text('{"set": "nq", "em": 1.0}\n{"set": "nq", "em": 0.0}\n')
    reproduce.write_record("dgpo", 0, tmp_path / "model", out, tmp_path / "record.json")
    record = read_json(tmp_path / "record.json")
    assert (record["row"], record["seed"], record["correct"]) == ("dgpo", 0, {"nq": "10"})
    assert record["curve"] == {"step": [1, 2], "rollout/score": [0.25, 0.123]}
    assert record["train"]["settings"] == {"phase": "dgpo", "steps": 3}  # none at its default
    assert record["settings"] == {"top_k": 4}
    assert record["train_s"] == 4.0 and record["step_s"] == {"rollout_s": 1.5}
    assert record["collapsed"]  # two of three steps
    assert "arcap" not in record and "cores" in record["machine"]
    # A curve that no picture draws is not kept.
    pair = Pair(tmp_path, tmp_path / "kept", drawn=("kd",))
    for name, has_curve in (("kd", True), ("ppo-kd", False)):
        (tmp_path / f"{name}-0").symlink_to(tmp_path / "model")
        (tmp_path / f"eval-{name}-0").symlink_to(out)
        reproduce.measure_jobs(pair, name, 0, name, tmp_path / f"{name}-0")[-1].after()
        assert ("curve" in read_json(pair.records / f"{name}-0.json")) == has_curve


def test_a_long_curve_is_recorded_as_means_of_neighbouring_steps(tmp_path):
    steps = [{"step": n + 1, "rollout/score": n / 100} for n in range(120)]
    steps[119]["eval/score"] = 0.5
    write_run(tmp_path, {"phase": "dgpo"}, steps)
    curve = rows.training_record(tmp_path, ("rollout/score", "eval/score"))["curve"]
    assert curve["step"][:2] == [2, 4] and len(curve["step"]) == 60
    assert curve["rollout/score"][:2] == [0.005, 0.025]
    assert curve["eval/score"] == [None] * 59 + [0.5]


def record(
    folder: Path, row: str, seed: int, shares: dict[str, float], table: dict[str, Row] = ROWS
) -> dict:
    """A recorded run with the first share of each set's 500 questions right."""
    correct = {}
    for name, share in shares.items():
        num_right = int(500 * share)
        correct[name] = "1" * num_right + "0" * (500 - num_right)
    run = {
        "name": table[row].label,
        "row": row,
        "seed": seed,
        "correct": correct,
        "sets": {name: {"em": share} for name, share in shares.items()},
        "average": {"em": sum(shares.values()) / len(shares)},
        "arcap": {"nq": {"hit": 0.5}},
        "collapsed": False,
        "train_s": 10.0,
        "curve": {"step": [*range(1, 8)], "rollout/score": [0.1 * n for n in range(1, 8)]},
    }
    write_json(folder / f"{row}-{seed}.json", run)
    return run


@pytest.mark.parametrize(
    ("others", "word"),
    [
        ((0.5, 0.5, 0.5), "holds"),
        ((0.7, 0.7, 0.7), "reversed"),
        ((0.6, 0.6, 0.6), "undecided"),
        ((0.4, 0.4, 0.65), "undecided"),  # a clear mean, but not every seed says so
    ],
)
def test_an_ordering_holds_when_the_interval_excludes_zero_and_the_seeds_agree(
    tmp_path, others, word
):
    ours = [record(tmp_path, "dgpo", seed, {"nq": 0.6, "musique": 0.6}) for seed in SEEDS]
    theirs = [
        record(tmp_path, "kd", seed, {"nq": share, "musique": share})
        for seed, share in zip(SEEDS, others, strict=True)
    ]
    line = verdict(ours, theirs)
    assert line.startswith("DGPO > KD") and word in line
    assert "one seed" in verdict(ours[:1], theirs)
    assert "no seed in common" in verdict(ours[:1], theirs[1:])


def test_paired_intervals_are_of_the_same_questions(tmp_path):
    ours, theirs = (record(tmp_path, "dgpo", 0, {"nq": share}) for share in (0.51, 0.5))
    mean, low, high = evaluation.compare_correct([ours], [theirs])["average"]
    # 5 of 500 questions differ, all of them in our favour.
    assert mean == pytest.approx(0.01) and 0 < low < high < 0.03


# ---- reports ----


def test_the_report_says_what_is_recorded_and_leaves_out_what_is_not(tmp_path):
    for seed in SEEDS:
        record(tmp_path, "dgpo", seed, {"nq": 0.6 + 0.01 * seed})
        record(tmp_path, "kd", seed, {"nq": 0.5})
    assert set(read_records(tmp_path)) == {"dgpo", "kd"}
    text = reproduce.report(tmp_path)
    assert "0.610 \u00b10.010" in text and "DGPO > KD" in text and "holds" in text
    assert "0.50 -> 0.50" in text  # the mean of the last five of 0.1 to 0.7
    assert "GKD" not in text and "paper's Avg." not in text


def test_the_report_says_on_which_sets_the_student_passes_its_teacher(tmp_path):
    shares = {"nq": 0.6, "musique": 0.5, "popqa": 0.4}
    ours = [record(tmp_path, "dgpo", seed, shares) for seed in SEEDS]
    teacher = record(tmp_path, "kd", 7, {"nq": 0.5, "musique": 0.5, "popqa": 0.6})
    text = reproduce.against_teacher(ours, [teacher])
    assert text == "NQ +0.100!  PopQA -0.200!  MuSiQue +0.000  average -0.033!"


def test_table_3_has_a_column_for_each_pair(tmp_path):
    for seed in SEEDS:
        record(tmp_path, "dgpo", seed, {"nq": 0.6})
        record(tmp_path / "llama", "dgpo", seed, {"nq": 0.5 + 0.01 * seed})
    text = reproduce.pairs_table(tmp_path)
    assert "Llama-type" in text and "0.510 \u00b10.010" in text and "0.600 \u00b10.000" in text


def test_the_records_that_the_repository_keeps_give_the_tables_of_its_pages():
    text = reproduce.report(ROOT / "docs" / "results" / "world")
    assert re.search(r"^DGPO +0\.995 .* 0\.741 \u00b10\.008$", text, re.MULTILINE)
    assert re.search(r"^DGPO > KD +holds +\+0\.1567 \[\+0\.1441, \+0\.1690\]", text, re.MULTILINE)
    assert "KD                         157, 152, 172" in text
    text = guidance.report(ROOT / "docs" / "results" / "guidance")
    assert re.search(r"^kd1, exact, wrong +0\.979 .* 0\.690 \u00b10\.030$", text, re.MULTILINE)
    assert re.search(r"^kd1, exact, wrong > kd1, exact, all +holds +\+0\.1350", text, re.MULTILINE)
    text = reproduce_bard.report(ROOT / "docs" / "results" / "bard")
    assert re.search(r"^BARD +0\.872  0\.937", text, re.MULTILINE)
    text = reproduce_qagent.report(ROOT / "docs" / "results" / "qagent")
    assert re.search(r"^stages 1 and 2 +0\.997 .* 0\.863 \u00b10\.007", text, re.MULTILINE)


# ---- pictures ----


def test_curves_are_drawn_of_what_is_recorded(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "world"
    for name, seed in (("dgpo", 0), ("kd-gkd", 1), ("ppo", 0), ("teacher-ppo", 0)):
        record(folder, name, seed, {"nq": 0.6})
    for name in reproduce.GIVEN:
        write_json(folder / f"{name}.json", {"row": name, "average": {"em": 0.1}})
    reproduce.plot(folder)
    assert (tmp_path / "world-figure-6.png").stat().st_size > 1000
    assert (tmp_path / "world-figure-3.png").stat().st_size > 1000


def test_a_png_has_a_palette_and_is_smaller_than_what_matplotlib_writes(tmp_path):
    pyplot, image = curves.load_pyplot(), pytest.importorskip("PIL.Image")
    figure, axis = pyplot.subplots()
    axis.plot([1, 3, 2], label="a")
    axis.legend()
    figure.savefig(tmp_path / "plain.png", dpi=curves.DPI, bbox_inches="tight")
    curves.save(figure, tmp_path / "folder" / "small.png")
    small, plain = (image.open(tmp_path / p) for p in ("folder/small.png", "plain.png"))
    assert (small.mode, small.size) == ("P", plain.size)
    sizes = [(tmp_path / p).stat().st_size for p in ("folder/small.png", "plain.png")]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_picture_has_the_format_of_its_suffix(tmp_path):
    pytest.importorskip("matplotlib")
    figure, _ = curves.load_pyplot().subplots()
    curves.save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_growth_is_drawn_for_each_axis_by_its_own_sizes(monkeypatch):
    pytest.importorskip("matplotlib")
    pyplot, figures = curves.load_pyplot(), []
    monkeypatch.setattr(plots, "save", lambda figure, out: figures.append(figure))
    rows = [{"axis": axis, "x": x, "seconds": 3 * x**2, "peak_bytes": 8}
            for axis, x in (("a", 1), ("a", 2), ("b", 9))]
    plots.plot_growth(rows, "x.png")
    a, b = figures[0].axes[:2]
    in_proportion, seconds, memory = (line.get_xydata().tolist() for line in a.lines)
    assert in_proportion == [[1, 1], [2, 2]]
    assert seconds == [[1, 1], [2, 4]] and memory == [[1, 1], [2, 1]]
    assert b.lines[1].get_xydata().tolist() == [[9, 1]]
    pyplot.close(figures[0])


def test_pictures_are_drawn_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "kd", {}, [{"step": 1, "eval/score": 0.1}, {"step": 2}])
    curves.plot_curves([tmp_path / "kd"], tmp_path / "c.png")
    plots.main(["rewards", "--out", str(tmp_path / "r.png")])
    budgets = {"8": {"accuracy": 0.5, "length": 7.0}, "16": {"accuracy": 0.6, "length": 9.0}}
    write_json(tmp_path / "budgets.json", {"name": "BARD", "budgets": budgets})
    plots.main(["budgets", str(tmp_path / "budgets.json"), "--out", str(tmp_path / "b.png")])
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "crb")
    write_run(tmp_path / "sft", {}, [{"step": 1, "loss/kd": 0.1}])
    with pytest.raises(ValueError, match="got no scores"):
        curves.plot_curves([tmp_path / "sft" / "metrics.jsonl"], tmp_path / "none.png")


# ---- BARD ----


def test_every_row_of_bard_is_a_command_that_its_settings_accept(tmp_path):
    names = list(reproduce_bard.ROWS)
    jobs = reproduce_bard.row_jobs(tmp_path / "runs", tmp_path / "records", names, [1])
    commands = read_commands(jobs)
    assert commands["data 1"].phase == "bard-data" and commands["data 1"].budgets
    assert commands["data 1"].versions_per_question == 16
    assert commands["agnostic 1"].phase == "sft"
    assert commands["agnostic 1"].episodes.endswith("versions-1.chains.jsonl")
    assert commands["sft 1"].episodes.endswith("versions-1.jsonl")
    assert commands["measure agnostic 1"].budget_text == ""
    assert commands["measure sft 1"].budget_text == "#{budget}"
    assert commands["rl 1"].student.endswith("agnostic-1")
    assert commands["bard 1"].student.endswith("sft-1")
    assert commands["bard 1"].advantage == "group"
    assert commands["additive 1"].budget_reward == "additive"
    assert not commands["additive 1"].stop_on_collapse
    assert commands["sft-teacher 1"].student.endswith("trails/teacher")
    guided = commands["guided 1"]
    assert guided.student.endswith("sft-1") and guided.teacher.endswith("sft-teacher-1")
    assert (guided.kl_where, guided.kl_in) == ("all", "exact")
    assert {job.name: job for job in jobs}["guided 1"].needs == ("data 1", "sft 1", "sft-teacher 1")
    steps = {commands[f"{name} 1"].steps for name in ("rl", "bard", "additive", "guided")}
    assert len(steps) == 1  # rows that are reinforced take as many steps


def test_a_row_of_bard_brings_the_rows_that_it_needs(tmp_path):
    argv = ["run", "--rows", "guided"]
    options = rows.parse_experiment(argv, "bard", "Doc", reproduce_bard.ROWS, "bard")
    assert options.rows == ["sft", "sft-teacher", "guided"]


def test_bard_is_measured_at_trained_and_held_out_budgets(tmp_path):
    jobs = reproduce_bard.row_jobs(tmp_path / "runs", tmp_path / "records", ["bard"], [1])
    commands = read_commands(jobs)
    trained = set(commands["bard 1"].budgets)
    assert set(commands["measure bard 1"].budgets) == set(reproduce_bard.MEASURED)
    assert set(commands["every budget 1"].budgets) == trained
    assert trained >= set(reproduce_bard.TRAINED)
    assert not trained & set(reproduce_bard.HELD_OUT)


def bard_record(folder: Path, row: str, seed: int, share: float, **more: Any) -> None:
    right = int(300 * share)
    budgets = {str(b): dict.fromkeys(reproduce_bard.TITLES, share) for b in reproduce_bard.MEASURED}
    run = {
        "name": reproduce_bard.ROWS[row].label,
        "row": row,
        "seed": seed,
        "spearman": 0.9,
        "area": share,
        "train_s": 1.0,
        "budgets": budgets,
        "adherence_right": 0.95,
        "adherence_wrong": 0.85,
        "correct": dict.fromkeys(budgets, "1" * right + "0" * (300 - right)),
    }
    write_json(folder / f"{row}-{seed}.json", {**run, **more})


def test_the_report_of_bard_compares_the_rows_at_each_budget(tmp_path):
    for seed in SEEDS:
        every = {"16": 0.99, "17": 0.9 + seed / 100}
        bard_record(tmp_path, "bard", seed, 0.8, every_adherence=every)
        bard_record(tmp_path, "agnostic", seed, 0.5)
        bard_record(tmp_path, "sft", seed, 0.8)
    text = reproduce_bard.report(tmp_path)
    assert "its 2 trained budgets, 100 questions a seed: mean 0.950, least 0.910" in text
    assert "below 0.95: 17 0.910" in text
    assert "BARD > agnostic, truncated: 38 +0.300!" in text
    assert "BARD > SFT only: 38 +0.000 " in text
    assert "48*" in text and "RL only" not in text and "0.950          0.850" in text


def test_a_record_of_bard_says_how_right_and_wrong_answers_keep_to_the_budget(tmp_path):
    model, out = tmp_path / "bard-0", tmp_path / "eval"
    scored = [
        {"budget": b, "length": b + (i == 2), "correct_free": int(i < 2), "correct": int(i < 1)}
        for i in range(4)
        for b in reproduce_bard.MEASURED
    ]
    write_json(out / "budgets.json", {"name": "BARD"})
    (out / "budgets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    write_run(model, {}, [{"step": 1, "rollout/score": 0.25}])
    reproduce_bard.write_record("bard", 0, model, out, tmp_path / "record.json")
    record = read_json(tmp_path / "record.json")
    assert (record["adherence_right"], record["adherence_wrong"]) == (1.0, 0.5)
    assert record["correct"]["38"] == "1000"
    assert record["num_steps"] == 1 and "curve" not in record  # no picture draws it
    assert "every_adherence" not in record


# ---- QAgent ----


@pytest.fixture
def qagent_commands(tmp_path) -> dict[str, Any]:
    names = list(reproduce_qagent.ROWS)
    jobs = reproduce_qagent.row_jobs(tmp_path / "runs", tmp_path / "records", names, [0, 1])
    return read_commands(jobs)


def test_every_row_of_qagent_is_a_command_that_its_settings_accept(qagent_commands):
    commands = qagent_commands
    assert commands["stage-2 1"].stage == 2
    assert commands["stage-2 1"].student.endswith("stage-1-1")
    assert commands["stage-2 1"].generator.endswith("small")
    assert commands["published-hit 1"].hit_in == "trajectory"
    assert commands["search-r1 1"].protocol == "search-r1"
    assert commands["search-r1 1"].advantage == "group"
    assert commands["search-r1 1"].student.endswith("readers/search-r1-agent")
    assert commands["stage-1 1"].student.endswith("readers/qagent-agent")
    together = commands["stage-1 1"].steps + commands["stage-2 1"].steps
    assert commands["search-r1 1"].steps == together
    assert commands["stage-1 1"].steps + commands["stage-1-longer 1"].steps == together
    first = ("stage-1", "search-r1", "stage-2-alone")
    assert {commands[f"{name} 1"].seed for name in first} == {1}
    assert commands["recalling-1 1"].student.endswith("readers/recalling-agent")
    assert commands["recalling-2 1"].student.endswith("recalling-1-1")
    assert (commands["recalling-1 1"].stage, commands["recalling-2 1"].stage) == (1, 2)
    guided = commands["recalling-2-guided 1"]
    assert guided.student.endswith("recalling-1-1")
    assert guided.teacher.endswith("readers/qagent-agent")  # which looks everything up
    assert (guided.kl_where, guided.kl_in) == ("wrong", "exact")
    later = ("stage-2", "stage-1-longer", "published-hit", "recalling-2", "recalling-2-guided")
    assert {commands[f"{name} 1"].seed for name in later} == {101}  # other questions than stage 1's


def test_rows_of_qagent_are_measured_in_the_protocol_that_they_speak(qagent_commands):
    commands = qagent_commands
    assert "untrained 1" not in commands and "measure naive 1" not in commands
    assert commands["measure naive"].passages == "naive"
    assert commands["measure untrained-r1"].model.endswith("readers/search-r1-agent")
    measured = commands["measure stage-2 1"]
    assert measured.protocol == commands["stage-2 1"].protocol != "search-r1"
    assert (measured.temperature, measured.top_k, len(measured.generators)) == (0.0, 1, 2)
    for name in ("measure search-r1 1", "measure untrained-r1"):
        assert commands[name].protocol == "search-r1"


def qagent_record(folder: Path, row: str, seed: int | None, right: int) -> None:
    values = {"hit": 0.5, "passages": 2.0}
    for label in reproduce_qagent.GENERATORS:
        for key in ("em", "within", "f1"):
            values[f"{key} {label}"] = right / 10
    correct = dict.fromkeys(reproduce_qagent.TEST_SETS, "1" * right + "0" * (10 - right))
    run = {
        "row": row,
        "seed": seed,
        "sets": dict.fromkeys(reproduce_qagent.TEST_SETS, values),
        "average": values,
        "correct": dict.fromkeys(reproduce_qagent.GENERATORS, correct),
    }
    if seed is None:
        write_json(folder / f"{row}.json", run)
    else:
        write_json(folder / f"{row}-{seed}.json", {**run, "train_s": 9.0})


def test_the_report_of_qagent_compares_agents_with_each_other_and_with_naive_search(tmp_path):
    qagent_record(tmp_path, "naive", None, 4)
    for seed in SEEDS:
        qagent_record(tmp_path, "stage-2", seed, 7)
        qagent_record(tmp_path, "stage-1", seed, 8 if seed else 7)
    text = reproduce_qagent.report(tmp_path)
    assert re.search(r"small: stages 1 and 2 > naive RAG, 5 passages +holds +\+0\.3000", text)
    by_seed = r"seeds \+0\.000, -0\.100, -0\.100"
    assert re.search(rf"large: stages 1 and 2 > stage 1 +undecided .* {by_seed}", text)
    assert "no agent was trained with it" in text and "Search-R1" not in text


def test_a_record_of_qagent_has_a_digit_for_each_question_of_each_generator(tmp_path):
    out = tmp_path / "eval"
    write_json(out / "submodule.json", {"name": "naive"})
    row = {"set": "nq", "em small": 1.0, "em large": 0.0}
    (out / "submodule.jsonl").write_text(json.dumps(row) + "\n")
    reproduce_qagent.write_record("naive", None, None, out, tmp_path / "naive.json")
    record = read_json(tmp_path / "naive.json")
    assert (record["row"], record["seed"]) == ("naive", None)
    assert record["correct"]["small"]["nq"] == "1" and record["correct"]["large"]["nq"] == "0"
    assert record["correct"]["small"]["popqa"] == "" and "train" not in record
