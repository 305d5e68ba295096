"""Small wrong changes to the project, one at a time: does a test notice each of them?

    python tests/mutants.py [--only FILE [FILE ...]] [--jobs 2] [--list]         (make mutants)

The tables tests/mutants_table/*.toml hold the changes of each file. A row is a text that occurs
once in the file, what takes its place, and what goes wrong then. After these it may name tests that
are closer to it than those of the file:

    ["reinforce.py"]
    tests = ["test_loops.py::test_steps_of_reinforcement_are_those_by_hand"]
    changes = [
        ["gamma=settings.gamma,", "gamma=1.0,", "the discount never arrives"],
        ["for e in episodes[:3]))", "for e in episodes[:2]))", "an episode of the sample is lost",
         "test_loops.py::test_a_step_of_reinforcement_says_what_it_did"],
    ]

A change is made in a copy of the project, never in the working tree, and its tests are run there.
    caught     a test failed, or did not end
    SURVIVED   all passed: the wiring can break without a test that notices; write one
    stale      the text is not there exactly once: the source has changed; adapt the row
    broken     the change does not compile, or fails by a name that is not there: that shows nothing
    unclear    a test of the row fails, or is skipped, without the change
The tests are first run without any change. Each row runs in a fork of a process that has imported
torch once, so most rows take a second or two. Results are kept in build/mutants/results.jsonl: an
interrupted command goes on where it stopped as long as the project's files are the same.
The exit status is 0 if all rows are caught.
"""

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = "tests/mutants_table"
RESULTS = "build/mutants/results.jsonl"
VERDICTS = ("caught", "SURVIVED", "stale", "broken", "unclear")
MAX_SECONDS = 120  # of the tests of one row: a change that makes them hang is caught
# Imported once, before any fork. Nothing local is among them: each fork imports its own copy.
PRELOADED = ("torch", "torch.distributed.fsdp", "torch._dynamo", "numpy", "tokenizers",
             "safetensors.torch", "jinja2.sandbox", "tqdm", "hypothesis", "pytest")  # fmt: skip
# What a test that was broken by its change raises, rather than one that noticed something.
NOT_NOTICED = ("ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError", "NameError")


@dataclass(frozen=True)
class Mutant:
    """A row of a table."""

    file: str
    before: str
    after: str
    tests: tuple[str, ...]  # paths below tests/, or with ::name
    why: str

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def apply(self, text: str) -> str:
        """The text with the change; ValueError says why the row is stale."""
        count = text.count(self.before)
        if count != 1:
            raise ValueError(f"{self.file}: got {self.before!r} {count} times, expected it once; "
                             "adapt the row to the source of today")
        return text.replace(self.before, self.after)


def load_tables(root: Path) -> list[Mutant]:
    """All rows, in the order of the tables' names."""
    rows = []
    for path in sorted((root / TABLES).glob("*.toml")):
        for file, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            for row in table["changes"]:
                if len(row) < 3 or not all(isinstance(part, str) for part in row):
                    raise ValueError(f"{path}: {file}: got a row {row}, expected before, after, "
                                     "what goes wrong and, maybe, tests")
                before, after, why, *tests = row
                rows.append(Mutant(file, before, after, tuple(tests or table["tests"]), why))
    return rows


def project_files(root: Path) -> list[Path]:
    """What git tracks or would track; without git, all files but caches and results."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        paths = [root / name for name in listed.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {".venv", "runs", "build", ".git", "__pycache__", ".pytest_cache"}
        paths = [p for p in root.rglob("*") if not skipped & {*p.relative_to(root).parts}]
    return sorted(path for path in paths if path.is_file())


def tree_key(root: Path, files: Sequence[Path]) -> str:
    """A hash of the project but for its tables and its prose."""
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(root).as_posix()
        if not name.startswith((TABLES, "docs/")):
            digest.update(f"{name}\0{len(data := path.read_bytes())}\0".encode() + data)
    return digest.hexdigest()[:16]


# ---- in a fork ----


class Watch:
    """A plugin of pytest: which tests passed, and which failed, by what."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}

    def pytest_runtest_makereport(self, item, call) -> None:
        if call.excinfo is None:
            if call.when == "call":
                self.passed.append(item.nodeid)
        elif (kind := call.excinfo.type.__name__) != "Skipped":
            message = str(call.excinfo.value).strip().split("\n")[0][:150]
            self.failed.setdefault(item.nodeid, f"{kind}: {message}")


def run_tests(copy: Path, tests: Sequence[str], stops: bool) -> dict:
    """Run tests of a copy in this process, which ends afterwards."""
    import pytest

    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (
        ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(copy)
    watch = Watch()
    flags = ["-q", "-p", "no:cacheprovider", "--no-header", "-m", "", *(["-x"] if stops else [])]
    names = [f"tests/{test}" for test in tests]
    status = pytest.main([*flags, *names], plugins=[watch])
    return {"status": int(status), "failed": watch.failed, "passed": watch.passed}


def fork(work: Callable[[], dict], out: Path, log: Path) -> int:
    """Start `work` in a child with a group of processes of its own, which writes its result."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        out.write_text(json.dumps(work()))
        status = 0
    except BaseException as error:  # nothing of the parent's may run in a child
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


# ---- workers ----


class Worker:
    """A copy of the project, in which one row after another is tried."""

    def __init__(self, root: Path, files: Sequence[Path], folder: Path) -> None:
        self.copy, self.out, self.log = folder / "project", folder / "out.json", folder / "log.txt"
        for path in files:
            target = self.copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        self.task: Task | None = None
        self.child, self.started, self.changed = 0, 0.0, 0

    def start(self, task: "Task") -> None:
        self.task, self.started = task, time.monotonic()
        self.out.unlink(missing_ok=True)
        if task.mutant:
            path = self.copy / task.mutant.file
            self.original = path.read_text(encoding="utf-8"), path.stat()
            path.write_text(task.mutant.apply(self.original[0]), encoding="utf-8")
            # A time of its own: no byte code of the original is taken for the change.
            self.changed += 1
            os.utime(path, (1e9 + self.changed, 1e9 + self.changed))
        # The run without changes leaves byte code, which those with a change read.
        sys.dont_write_bytecode = task.mutant is not None
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1" if task.mutant else ""
        work = lambda: run_tests(self.copy, task.tests, stops=task.mutant is not None)  # noqa: E731
        self.child = fork(work, self.out, self.log)

    def poll(self) -> dict | None:
        """The task's result once it has one; its tests are killed when they do not end."""
        done, _ = os.waitpid(self.child, os.WNOHANG)
        limit = MAX_SECONDS if self.task.mutant else 10 * MAX_SECONDS
        is_late = not done and time.monotonic() - self.started > limit
        if not done and not is_late:
            return None
        try:
            os.killpg(self.child, signal.SIGKILL)  # what the tests have started, too
        except ProcessLookupError:
            pass
        if is_late:
            os.waitpid(self.child, 0)
        if self.task.mutant:
            path, (text, stat) = self.copy / self.task.mutant.file, self.original
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        result = json.loads(self.out.read_text()) if self.out.is_file() else {"status": -1}
        result |= {"late": is_late, "seconds": round(time.monotonic() - self.started, 1)}
        if result["status"] not in (0, 1):
            result["log"] = self.log.read_text(errors="replace")[-1500:]
        return result


@dataclass(frozen=True)
class Task:
    tests: tuple[str, ...]
    mutant: Mutant | None = None  # None: the project as it is


def run_all(workers: list[Worker], tasks: Sequence[Task]) -> Iterator[tuple[Task, dict]]:
    """Try the tasks on the workers; yields each with its result as it ends."""
    waiting, free, busy = [*tasks], [*workers], []
    while waiting or busy:
        while waiting and free:
            worker = free.pop()
            worker.start(waiting.pop(0))
            busy.append(worker)
        time.sleep(0.02)
        for worker in [*busy]:
            if (result := worker.poll()) is not None:
                busy.remove(worker)
                free.append(worker)
                yield worker.task, result


# ---- verdicts ----


def verdict_before_running(mutant: Mutant, root: Path) -> tuple[str, str] | None:
    """(verdict, reason) of a row that need not be tried."""
    path = root / mutant.file
    if not path.is_file():
        return "stale", f"{mutant.file}: got no such file; adapt the row"
    try:
        changed = mutant.apply(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return "stale", str(error)
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError as error:
        return "broken", f"the change does not compile: {error}"
    return None


def verdict_after_running(result: dict) -> tuple[str, str]:
    if result["late"]:
        return "caught", f"the tests did not end within {MAX_SECONDS} s"
    if result["status"] == 0:
        return "SURVIVED", ""
    if result["status"] != 1:
        return "broken", f"pytest ended with {result['status']}: {result['log'][-600:]}"
    [(test, reason), *_] = result["failed"].items()
    if reason.partition(":")[0] in NOT_NOTICED:
        return "broken", f"{test}: {reason}"
    return "caught", f"{test}: {reason}"


def baseline_tasks(tests: set[str]) -> list[Task]:
    """Those tests file by file, without a change."""
    files: dict[str, list[str]] = {}
    for test in sorted(tests):
        files.setdefault(test.partition("::")[0], []).append(test)
    return [Task(tuple(names)) for names in files.values()]


def unclear_tests(workers: list[Worker], tests: set[str]) -> dict[str, str]:
    """Test -> why it says nothing about a change: without one it fails, or none of it passes."""
    unclear: dict[str, str] = {}
    for task, result in run_all(workers, baseline_tasks(tests)):
        failed, passed = result.get("failed", {}), result.get("passed", ())
        print(f"{result['seconds']:7.1f} s  {task.tests[0].partition('::')[0]}: {len(passed)} "
              f"passed, {len(failed)} failed", flush=True)
        for test in task.tests:
            problems = [f"{name}: {reason}" for name, reason in failed.items() if holds(test, name)]
            if result["status"] not in (0, 1):
                problems = [f"pytest ended with {result['status']}: {result['log'][-600:]}"]
            elif not any(holds(test, name) for name in passed):
                problems += ["no test of this name passes"]
            if problems:
                unclear[test] = f"without the change {problems[0]}"
    return unclear


def holds(test: str, item: str) -> bool:
    """Whether what a row names (a file, or a test with all its cases) holds an item of pytest."""
    item = item.removeprefix("tests/")
    return item == test or item.startswith((f"{test}::", f"{test}["))


# ---- the command ----


def report(rows: Sequence[Mutant], verdicts: dict[str, tuple[str, str]]) -> int:
    """Print what is not caught and the totals of each file; the exit status."""
    totals: dict[str, Counter] = {}
    for row in rows:
        verdict, reason = verdicts[row.key]
        totals.setdefault(row.file, Counter())[verdict] += 1
        if verdict != "caught":
            print(f"\n{verdict}  {row.file}: {row.why}\n    - {row.before!r}\n    + {row.after!r}\n"
                  f"    {reason or 'tests that passed: ' + ', '.join(row.tests)}")
    print(f"\n{'':32}" + "".join(f"{verdict:>10}" for verdict in VERDICTS))
    total: Counter = sum(totals.values(), Counter())
    for name, counts in [*sorted(totals.items()), ("all", total)]:
        print(f"{name:32}" + "".join(f"{counts[verdict] or '-':>10}" for verdict in VERDICTS))
    return int(total["caught"] < len(rows))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("tests/mutants.py", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="FILE", help="rows of these files alone")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default 2)")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--root", type=Path, default=ROOT, help="the project (default: this one)")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    rows = load_tables(root)
    if options.only:
        rows = [row for row in rows if row.file in options.only]
    if not rows:
        parser.error(f"got no rows for {options.only}, expected some of {TABLES}/*.toml")
    if options.list:
        for row in rows:
            print(f"{row.file:28} {row.why}")
        return 0
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    files = project_files(root)
    tree, kept = tree_key(root, files), root / RESULTS
    verdicts = read_results(kept, tree)
    for row in rows:
        if found := verdict_before_running(row, root):
            verdicts[row.key] = found
    pending = [row for row in rows if row.key not in verdicts]
    print(f"{len(rows)} rows, {len(pending)} of them to run", flush=True)
    if pending:
        for name in PRELOADED if root == ROOT else ("pytest",):
            importlib.import_module(name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            workers = [Worker(root, files, Path(folder, str(k))) for k in range(options.jobs)]
            unclear = unclear_tests(workers, {test for row in pending for test in row.tests})
            for row in pending:
                if found := next((unclear[test] for test in row.tests if test in unclear), ""):
                    verdicts[row.key] = "unclear", found
            tasks = [Task(row.tests, row) for row in pending if row.key not in verdicts]
            try_rows(workers, tasks, verdicts, kept, tree)
    return report(rows, verdicts)


def try_rows(workers: list[Worker], tasks: list[Task], verdicts: dict[str, tuple[str, str]],
             kept: Path, tree: str) -> None:
    started = time.monotonic()
    for number, (task, result) in enumerate(run_all(workers, tasks), 1):
        row, verdict = task.mutant, verdict_after_running(result)
        verdicts[row.key] = verdict
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"tree": tree, "row": row.key, "verdict": verdict}) + "\n")
        left = (time.monotonic() - started) / number * (len(tasks) - number)
        print(f"[{number}/{len(tasks)}, {left / 60:.0f} min left] {verdict[0]:8} "
              f"{result['seconds']:5.1f} s  {row.file}: {row.why}", flush=True)


def read_results(path: Path, tree: str) -> dict[str, tuple[str, str]]:
    """The verdicts of an earlier command on the same files."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {row["row"]: tuple(row["verdict"]) for row in rows if row["tree"] == tree}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
