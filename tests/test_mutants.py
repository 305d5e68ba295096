"""The tables of small wrong changes fit today's sources, and their runner tells one from another.

`make mutants` runs the rows themselves. Run: python -m pytest tests/test_mutants.py
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import ROOT, Mutant, load_tables, verdict_before_running

ROWS = load_tables(ROOT)
MIN_ROWS, MIN_OF_A_LOOP, MIN_OF_A_MODULE = 150, 10, 5
LOOPS = ("distil.py", "reinforce.py", "rollout.py", "bard.py", "qagent.py")
FEWER = {  # modules that need no rows, and why
    "examples/doors.py": "an example for users; its numbers are those of the doors",
    "examples/rewards.py": "an example for users, of three short functions",
    "world/files.py": "names of folders, and JSON lines in and out",
}


def modules() -> list[str]:
    """Every Python file of the project but the tests."""
    paths = [*ROOT.glob("*.py")]
    for wing in ("formats", "infra", "retrieval", "serving", "world", "experiments",
                 "examples"):
        paths += (ROOT / wing).glob("**/*.py")
    return [path.relative_to(ROOT).as_posix() for path in paths]


@cache
def names_of_tests(file: str) -> set[str]:
    nodes = ast.walk(ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({row.file for row in ROWS}))
def test_every_row_is_a_change_of_todays_source(file):
    """A row that is stale is adapted by who changed the source: take the text of today."""
    for row in (row for row in ROWS if row.file == file):
        assert verdict_before_running(row, ROOT) is None, verdict_before_running(row, ROOT)
        assert row.before != row.after and row.why, row


def test_every_row_names_tests_that_exist():
    for row in ROWS:
        assert row.tests, row
        for test in row.tests:
            file, _, name = test.partition("::")
            assert (ROOT / "tests" / file).is_file(), f"{row.file}: got {test}, expected a test"
            name = name.partition("[")[0]
            assert not name or name in names_of_tests(file), f"{row.file}: got no {test}"


def test_no_row_stands_twice():
    doubles = [key for key, count in Counter((r.file, r.before, r.after) for r in ROWS).items()
               if count > 1]
    assert not doubles


def test_every_module_has_rows_and_the_loops_have_more():
    counts = Counter(row.file for row in ROWS)
    assert len(ROWS) >= MIN_ROWS
    for name in modules():
        wanted = MIN_OF_A_LOOP if name in LOOPS else MIN_OF_A_MODULE
        if name in FEWER:
            wanted = 0
        assert counts[name] >= wanted, f"{name}: got {counts[name]} rows, expected {wanted}; add " \
            "them to tests/mutants_table/, and a test where a row survives"
    assert counts.keys() <= {*modules()}


# ---- the runner ----

SOURCE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TEST = "from source import double\n\n\ndef test_double():\n    assert double(3) == 6\n"
TOY = [
    Mutant("source.py", "2 * x", "3 * x", ("test_toy.py",), "noticed"),
    Mutant("source.py", "x / 2", "x / 3", ("test_toy.py",), "not noticed"),
    Mutant("source.py", "4 * x", "5 * x", ("test_toy.py",), "of another time"),
    Mutant("source.py", "return 2 * x", "return twice(x)", ("test_toy.py",), "no such name"),
    Mutant("source.py", "2 * x", "2 *", ("test_toy.py",), "no Python"),
    Mutant("source.py", "def double", "def treble", ("test_toy.py",), "no such import"),
    Mutant("source.py", "x / 2", "2 / x", ("test_none.py",), "no such test"),
]


def test_the_runner_tells_what_is_caught_from_what_is_not(tmp_path):
    (tmp_path / "tests" / "mutants_table").mkdir(parents=True)
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_toy.py").write_text(TEST)
    changes = [[row.before, row.after, row.why, *row.tests] for row in TOY]
    table = f'["source.py"]\ntests = []\nchanges = {changes}\n'
    (tmp_path / "tests" / "mutants_table" / "toy.toml").write_text(table)
    command = [sys.executable, str(ROOT / "tests" / "mutants.py"), "--root", str(tmp_path)]

    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, "--jobs", "1", *flags], capture_output=True, text=True)

    first = run()
    for verdict, why in (("SURVIVED", "not noticed"), ("stale", "of another time"),
                         ("broken", "no such name"), ("broken", "no Python"),
                         ("broken", "no such import"), ("unclear", "no such test")):
        assert f"{verdict}  source.py: {why}\n" in first.stdout, first.stdout + first.stderr
    assert first.returncode == 1
    assert first.stdout.splitlines()[-1].split() == ["all", "1", "1", "1", "3", "1"]
    assert (tmp_path / "source.py").read_text() == SOURCE
    again = run()  # what was tried is remembered
    assert "7 rows, 1 of them to run" in again.stdout and again.returncode == 1
    Path(tmp_path / "source.py").write_text(SOURCE + "\n")
    assert "7 rows, 5 of them to run" in run().stdout
    listed = run("--list")
    assert listed.returncode == 0 and len(listed.stdout.splitlines()) == 7
