"""The runner of experiments: order, side by side, resumption, failures.

Run: python -m pytest tests/test_reproduce.py
"""

from pathlib import Path

import pytest

from reproduce import Job, run_jobs


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
