"""The runner of experiments: order, side by side, resumption, failures.

Run: python -m pytest tests/test_reproduce.py
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import config
import eval as evaluation
import jobs
import qagent
import reproduce
import reproduce_bard
import reproduce_qagent
from jobs import Job, run_jobs, verdict
from reproduce import ORDERINGS, ROWS, SEEDS, TABLES, read_records, row_jobs
from settings import DISTIL, PHASES, TrainSettings, with_defaults


def job(folder: Path, name: str, code: str, needs: tuple[str, ...] = ()) -> Job:
    """A job that appends its name to order.txt, runs `code` and leaves <name>.done."""
    script = f"open('order.txt', 'a').write('{name} '); {code}; open('{name}.done', 'w')"
    return Job(
        name,
        lambda: ["-c", f"import os, sys; os.chdir({str(folder)!r}); {script}"],
        folder / f"{name}.done",
        needs,
    )


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


def test_a_run_that_collapsed_counts_and_what_follows_a_job_is_done(tmp_path):
    seen = []
    script = f"open({str(tmp_path / 'done')!r}, 'w'); import sys; sys.exit(1)"  # torchrun's status, whatever the cause
    failing = Job("run", lambda: ["-c", script], tmp_path / "done", after=lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="run failed"):
        run_jobs([failing], tmp_path / "logs")
    assert not seen
    (tmp_path / "done").unlink()
    (tmp_path / "collapse.txt").write_text("the score fell")
    run_jobs([failing], tmp_path / "logs")
    assert seen == [1]


def test_a_report_without_records_says_how_to_make_them(tmp_path):
    with pytest.raises(RuntimeError, match="reproduce.py rows"):
        reproduce.report(tmp_path)


# ---- rows ----


def tuned(records: Path, *scores: float) -> None:
    """Records of tuning runs at the preset's rate and at twice that."""
    for name in ROWS:
        for k, (times, score) in enumerate(zip(reproduce.RATES, scores, strict=True)):
            found = {"row": name, "run": k, "times": times, "score": score}
            jobs.write_json(reproduce.tuning_record(records, name, k), found)


def test_every_row_is_a_command_of_train_py_that_its_settings_accept(tmp_path):
    tuned(tmp_path / "records", 0.1, 0.3)
    phases, linked, measured = {}, {}, set()
    tuning_runs = [tmp_path / "runs" / f"tune-{name}-1" for name, row in ROWS.items() if not row.rate_of]
    for folder in tuning_runs[1:]:  # of the first, SeqKD's, the record alone is left
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    for job in row_jobs(tmp_path / "runs", tmp_path / "records", list(ROWS), [0, 1]):
        program, *flags = job.flags()
        if flags[0] == "arcap":
            measured.add(job.name.removeprefix("arcap "))
            assert job.done.parent == tmp_path / "records" and job.after
        if program == "train.py":
            phases[job.name] = config.load(TrainSettings, flags, prog="train.py", description="",
                                           default_config=None)  # fmt: skip
        elif program == "-c":
            linked[job.name] = flags[1:]
    assert {name.split()[0] for name in phases} == {*ROWS, "episodes", "tune"}
    assert measured == {f"{name} {seed}" for name in TABLES["Table 2"] if name in ROWS for seed in (0, 1)} | {
        "student", "teacher"}
    for name, row in ROWS.items():
        settings, preset = phases[f"{name} 1"], reproduce.row_settings(name)
        plain = row.begins or "student"
        assert Path(settings.student).name == (f"{row.begins}-1" if row.begins in ROWS else plain)
        assert settings.run_dir.endswith(f"{name}-1") and settings.seed == 1
        at = "kd_lr" if settings.phase in DISTIL else "actor_lr"
        for rate in ("kd_lr", "actor_lr"):
            assert getattr(settings, rate) == pytest.approx(getattr(preset, rate) * (2.0 if rate == at else 1))
        if row.rate_of:  # chosen for another row: the first seed is a run like the others
            assert f"tune {name} 0" not in phases and phases[f"{name} 0"].run_dir.endswith(f"{name}-0")
            continue
        if name == "seqkd":
            assert phases["seqkd 0"].kd_lr == phases["tune seqkd 1"].kd_lr
        else:
            assert linked[f"{name} 0"] == [f"tune-{name}-1", str(tmp_path / "runs" / f"{name}-0")]  # the better run
        for k, times in enumerate(reproduce.RATES):
            tuning = phases[f"tune {name} {k}"]
            assert getattr(tuning, at) == pytest.approx(getattr(preset, at) * times)
            assert (tuning.seed, tuning.phase, tuning.steps, tuning.epochs, tuning.eval_every) == (
                0, settings.phase, settings.steps, settings.epochs, settings.eval_every)
            assert Path(tuning.student).name == (f"{row.begins}-0" if row.begins in ROWS else plain)
    assert {phases[f"{name} 1"].phase for name in ROWS} == {
        phase for phase in PHASES if phase not in ("episodes", "qagent") and not phase.startswith("bard")}
    assert phases["uniform-kl 1"].kl_where == "all" and phases["without-teacher 1"].kl_where == "none"
    assert phases["dgpo-grpo 1"].advantage == "group" and phases["dgpo-grpo 1"].phase == "dgpo"


def test_the_better_rate_is_chosen_and_of_equals_the_presets(tmp_path):
    tuned(tmp_path, 0.1, 0.2)
    assert reproduce.best_run(tmp_path, "kd")["times"] == 2.0
    tuned(tmp_path, 0.01, 0.01)
    assert reproduce.best_run(tmp_path, "kd")["times"] == 1.0


def test_a_tuning_run_is_kept_with_its_average_on_development_questions(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "result.json").write_text('{"average": {"em": 0.25}}')
    (folder / "perf.jsonl").write_text('{"seconds": 2.0}\n{"seconds": 1.5}\n')
    (folder / "run.json").write_text('{"settings": {"phase": "kd", "kd_lr": 4e-3}}')
    (folder / "metrics.jsonl").write_text('{"loss/kd": 1.0, "eval/score": 0.9}\n{"eval/score": 0.25}\n')
    reproduce.write_tuning(tmp_path, "kd", 1, folder, folder)
    found = json.loads((tmp_path / "tuning" / "kd-1.json").read_text())
    assert (found["score"], found["times"], found["train_s"], found["collapsed"]) == (0.25, 2.0, 3.5, False)


def test_another_pair_takes_over_the_rates_and_its_own_models(tmp_path):
    tuned(tmp_path / "records", 0.1, 0.3)
    jobs = row_jobs(tmp_path / "runs", tmp_path / "records" / "llama", reproduce.PAIR_ROWS, [0], tmp_path / "models",
                    tuned=tmp_path / "records")
    assert not [job.name for job in jobs if job.name.startswith(("tune", "arcap"))]
    assert {job.done.parent for job in jobs if job.name.startswith("eval")} == {tmp_path / "records" / "llama"}
    [dgpo] = [job for job in jobs if job.name == "dgpo 0"]
    settings = config.load(TrainSettings, dgpo.flags()[1:], prog="train.py", description="")
    assert settings.actor_lr == pytest.approx(2 * reproduce.row_settings("dgpo").actor_lr)
    assert settings.teacher == str(tmp_path / "models" / "teacher") and settings.student.endswith("kd-0")


def test_table_3_has_a_column_for_each_pair(tmp_path):
    for seed in SEEDS:
        record(tmp_path, "dgpo", seed, {"nq": 0.6})
        record(tmp_path / "llama", "dgpo", seed, {"nq": 0.5 + 0.01 * seed})
    text = reproduce.pairs_table(tmp_path)
    assert "Llama-type" in text and "0.510 \u00b10.010" in text and "0.600 \u00b10.000" in text


def test_tables_and_orderings_name_rows_that_exist():
    known = {*ROWS, *reproduce.GIVEN}
    assert {name for names in TABLES.values() for name in names} <= known
    assert {name for pair in ORDERINGS for name in pair} <= known
    assert all(row.begins in known | {""} for row in ROWS.values())


def record(folder: Path, row: str, seed: int, shares: dict[str, float]) -> dict:
    """A recorded run with the first share of each set's 500 questions right."""
    correct = {name: "1" * int(500 * share) + "0" * (500 - int(500 * share)) for name, share in shares.items()}
    sets = {name: {"em": share} for name, share in shares.items()}
    found = {"name": ROWS[row].label, "row": row, "seed": seed, "correct": correct, "sets": sets, "collapsed": False}
    found |= {"average": {"em": sum(shares.values()) / len(shares)}, "train_s": 10.0, "arcap": {"nq": {"hit": 0.5}},
              "curve": [{"step": n, "rollout/score": 0.1 * n} for n in range(1, 8)]}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{row}-{seed}.json").write_text(json.dumps(found))
    return found


@pytest.mark.parametrize(("others", "word"), [
    ((0.5, 0.5, 0.5), "holds"), ((0.7, 0.7, 0.7), "reversed"), ((0.6, 0.6, 0.6), "undecided"),
    ((0.4, 0.4, 0.65), "undecided"),  # a clear mean, but not every seed says so
])  # fmt: skip
def test_an_ordering_holds_when_the_interval_excludes_zero_and_the_seeds_agree(tmp_path, others, word):
    ours = [record(tmp_path, "dgpo", seed, {"nq": 0.6, "musique": 0.6}) for seed in SEEDS]
    theirs = [record(tmp_path, "kd", seed, {"nq": x, "musique": x}) for seed, x in zip(SEEDS, others, strict=True)]
    line = verdict(ours, theirs)
    assert line.startswith("DGPO > KD") and word in line
    assert "one seed" in verdict(ours[:1], theirs)
    assert "no seed in common" in verdict(ours[:1], theirs[1:])


def test_a_record_names_files_as_seen_from_the_repository(tmp_path):
    jobs.write_json(tmp_path / "a.json", {"argv": [f"{jobs.ROOT}/runs/kd", "--seed"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"argv": ["runs/kd", "--seed"]}


def test_paired_intervals_are_of_the_same_questions(tmp_path):
    ours, theirs = (record(tmp_path, "dgpo", 0, {"nq": share}) for share in (0.51, 0.5))
    mean, low, high = evaluation.compare_correct([ours], [theirs])["average"]
    assert mean == pytest.approx(0.01) and 0 < low < high < 0.03  # 5 of 500 differ, all to one side


def test_the_report_says_what_is_recorded_and_leaves_out_what_is_not(tmp_path):
    for seed in SEEDS:
        record(tmp_path, "dgpo", seed, {"nq": 0.6 + 0.01 * seed})
        record(tmp_path, "kd", seed, {"nq": 0.5})
    assert set(read_records(tmp_path)) == {"dgpo", "kd"}
    text = reproduce.report(tmp_path)
    assert "0.610 \u00b10.010" in text and "DGPO > KD" in text and "holds" in text
    assert "0.50 -> 0.50" in text and "GKD" not in text  # mean of the last five of 0.1 to 0.7


def test_the_report_says_on_which_sets_the_student_passes_its_teacher(tmp_path):
    ours = [record(tmp_path, "dgpo", seed, {"nq": 0.6, "musique": 0.5, "popqa": 0.4}) for seed in SEEDS]
    teacher = record(tmp_path, "kd", 7, {"nq": 0.5, "musique": 0.5, "popqa": 0.6})
    assert reproduce.against_teacher(ours, [teacher]) == "NQ +0.100!  PopQA -0.200!  MuSiQue +0.000  average -0.033!"


def test_curves_are_drawn_of_what_is_recorded(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "world"
    record(folder, "dgpo", 0, {"nq": 0.6})
    record(folder, "kd-gkd", 1, {"nq": 0.6})
    for name in ("ppo", "teacher-ppo"):
        record(folder, name, 0, {"nq": 0.6})
    for name in reproduce.GIVEN:
        jobs.write_json(folder / f"{name}.json", {"row": name, "average": {"em": 0.1}})
    reproduce.plot(folder)
    assert (tmp_path / "world-figure-6.png").stat().st_size > 1000
    assert (tmp_path / "world-figure-3.png").stat().st_size > 1000


def test_rows_bring_those_that_they_begin_from_and_keep_the_order_of_all(tmp_path):
    given = ["rows", "--rows", "ppo-kd", "dgpo", "--runs", str(tmp_path), "--seeds", "5"]
    options = jobs.parse_experiment(given, "p", "doc", ROWS, SEEDS, "rows", ("rows",))
    assert options.rows == ["kd", "ppo", "dgpo", "ppo-kd"] and options.seeds == [5]
    assert options.records == tmp_path / "records"
    with pytest.raises(SystemExit):
        jobs.parse_experiment(["rows", "--rows", "kdd"], "p", "doc", ROWS, SEEDS, "rows", ("rows",))


def settings_of(jobs: list[Job], measured: type, shared: tuple[str, ...]) -> dict[str, Any]:
    """By name of the job: what train.py, or the program that measures, reads from its flags."""
    found = {}
    for job in jobs:
        program, *flags = job.flags()
        if program == "train.py":
            found[job.name] = with_defaults(
                config.load(TrainSettings, flags, prog=program, description=""))
        else:
            flags = flags[flags[0] == "measure" :]  # qagent.py's
            found[job.name] = config.load(measured, flags, prog=program, description="", shared=shared)
    return found


# ---- BARD ----


def test_every_row_of_bard_is_a_command_that_its_settings_accept(tmp_path):
    jobs = reproduce_bard.row_jobs(tmp_path / "runs", tmp_path / "records", list(reproduce_bard.ROWS), [1])
    phases = settings_of(jobs, evaluation.EvalSettings, evaluation.SHARED)
    assert phases["data 1"].phase == "bard-data" and phases["data 1"].budgets
    assert not phases["agnostic 1"].budgets and phases["agnostic 1"].episodes.endswith("chains.jsonl")
    assert phases["agnostic 1"].phase == "sft" and phases["measure agnostic 1"].budget_text == ""
    assert phases["rl 1"].student.endswith("agnostic-1") and phases["bard 1"].student.endswith("sft-1")
    assert phases["bard 1"].advantage == "group" and phases["additive 1"].budget_reward == "additive"
    assert set(phases["measure bard 1"].budgets) == set(reproduce_bard.MEASURED)
    trained = set(phases["bard 1"].budgets)
    assert set(phases["every budget 1"].budgets) == trained
    assert trained >= set(reproduce_bard.TRAINED) and not trained & set(reproduce_bard.HELD_OUT)
    steps = {phases[f"{name} 1"].steps for name in ("rl", "bard", "additive")}
    assert len(steps) == 1  # equal compute


def bard_record(folder: Path, row: str, seed: int, share: float) -> None:
    measures = ("adherence", "accuracy", "accuracy_free", "length", "overshoot", "relative_error", "use")
    values, right = dict.fromkeys(measures, share), int(300 * share)
    found = {"name": reproduce_bard.ROWS[row].label, "row": row, "seed": seed, "spearman": 0.9, "area": share,
             "train_s": 1.0, "budgets": {b: values for b in reproduce_bard.MEASURED}, "adherence_right": 0.95,
             "adherence_wrong": 0.85,
             "correct": {b: "1" * right + "0" * (300 - right) for b in reproduce_bard.MEASURED}}  # fmt: skip
    jobs.write_json(folder / f"{row}-{seed}.json", found)


def test_the_report_of_bard_compares_the_rows_at_each_budget(tmp_path):
    for seed in SEEDS:
        bard_record(tmp_path, "bard", seed, 0.8)
        bard_record(tmp_path, "agnostic", seed, 0.5)
        bard_record(tmp_path, "sft", seed, 0.8)
        record = json.loads((tmp_path / f"bard-{seed}.json").read_text())
        every = {"every_adherence": {"16": 0.99, "17": 0.9 + seed / 100}}
        jobs.write_json(tmp_path / f"bard-{seed}.json", record | every)
    text = reproduce_bard.report(tmp_path)
    assert "its 2 trained budgets, 100 questions a seed: mean 0.950, least 0.910; below 0.95: 17 0.910" in text
    assert "BARD > agnostic, truncated: 38 +0.300!" in text and "BARD > SFT only: 38 +0.000 " in text
    assert "48*" in text and "RL only" not in text and "0.950          0.850" in text
    with pytest.raises(RuntimeError, match="reproduce_bard.py run"):
        reproduce_bard.report(tmp_path / "nothing")


def test_a_record_of_bard_says_how_right_and_wrong_answers_keep_to_the_budget(tmp_path):
    model, out, record = tmp_path / "bard-0", tmp_path / "eval", tmp_path / "bard-0.json"
    rows = [{"id": str(i), "budget": b, "length": b + (i == 2), "correct_free": int(i < 2), "correct": int(i < 1)}
            for i in range(4) for b in reproduce_bard.MEASURED]  # fmt: skip
    jobs.write_json(out / "budgets.json", {"name": "BARD"})
    (out / "budgets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    jobs.write_json(model / "run.json", {})
    for name in ("metrics.jsonl", "perf.jsonl"):
        (model / name).write_text('{"step": 1, "rollout/score": 0.25, "seconds": 2.0}\n')
    reproduce_bard.write_record("bard", 0, model, out, record)
    found = json.loads(record.read_text())
    assert (found["adherence_right"], found["adherence_wrong"]) == (1.0, 0.5)
    assert found["correct"]["38"] == "1000" and found["curve"] == [{"step": 1, "rollout/score": 0.25}]


# ---- QAgent ----


def test_every_row_of_qagent_is_a_command_that_its_settings_accept(tmp_path):
    jobs = reproduce_qagent.row_jobs(tmp_path / "runs", tmp_path / "records", list(reproduce_qagent.ROWS), [0, 1])
    phases = settings_of(jobs, qagent.SearchSettings, qagent.SHARED)
    assert phases["stage-2 1"].stage == 2 and phases["stage-2 1"].student.endswith("stage-1-1")
    assert phases["stage-2 1"].generator.endswith("small") and phases["published-hit 1"].hit_in == "trajectory"
    assert phases["search-r1 1"].protocol == "search-r1" and phases["search-r1 1"].advantage == "group"
    assert phases["stage-1 1"].student.endswith("readers/qagent-agent") and "untrained 1" not in phases
    assert phases["measure untrained-r1"].model.endswith("readers/search-r1-agent")
    together = phases["stage-1 1"].steps + phases["stage-2 1"].steps  # equal compute
    assert phases["search-r1 1"].steps == together == phases["stage-1 1"].steps + phases["stage-1-longer 1"].steps
    assert {phases[f"{name} 1"].seed for name in ("stage-1", "search-r1", "stage-2-alone")} == {1}
    later = [phases[f"{name} 1"].seed for name in ("stage-2", "stage-1-longer", "published-hit")]
    assert set(later) == {101}  # other questions than stage 1's
    assert phases["measure naive"].passages == "naive" and "measure naive 1" not in phases
    measured = phases["measure stage-2 1"]
    assert (measured.protocol, measured.temperature, measured.top_k, len(measured.generators)) == ("qagent", 0.0, 1, 2)
    assert phases["measure search-r1 1"].protocol == "search-r1" == phases["measure untrained-r1"].protocol


def qagent_record(folder: Path, row: str, seed: int | None, right: int) -> None:
    values = {f"{key} {label}": right / 10 for key in ("em", "within", "f1") for label in reproduce_qagent.GENERATORS}
    values |= {"hit": 0.5, "passages": 2.0}
    found = {"row": row, "seed": seed, "sets": dict.fromkeys(reproduce_qagent.TEST_SETS, values), "average": values,
             "correct": {label: dict.fromkeys(reproduce_qagent.TEST_SETS, "1" * right + "0" * (10 - right))
                         for label in reproduce_qagent.GENERATORS}} | ({} if seed is None else {"train_s": 9.0})
    jobs.write_json(folder / f"{row}{'' if seed is None else f'-{seed}'}.json", found)


def test_the_report_of_qagent_compares_agents_with_each_other_and_with_naive_search(tmp_path):
    qagent_record(tmp_path, "naive", None, 4)
    for seed in SEEDS:
        qagent_record(tmp_path, "stage-2", seed, 7)
        qagent_record(tmp_path, "stage-1", seed, 8 if seed else 7)
    text = reproduce_qagent.report(tmp_path)
    assert re.search(r"small: stages 1 and 2 > naive RAG, 5 passages +holds +\+0\.3000", text)
    assert re.search(r"large: stages 1 and 2 > stage 1 +undecided .* seeds \+0\.000, -0\.100, -0\.100", text)
    assert "no agent was trained with it" in text and "Search-R1" not in text
    with pytest.raises(RuntimeError, match="reproduce_qagent.py run"):
        reproduce_qagent.report(tmp_path / "nothing")
