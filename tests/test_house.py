"""The order of the house: imports run one way, files and functions stay small, presets are true.

Run: python -m pytest tests/test_house.py
"""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("infra", "formats", "retrieval", "serving", "world", "experiments", "examples")
METHOD = (
    "dgpo", "baselines", "episode", "batch", "rollout", "sampling", "settings", "session", "distil",
    "reinforce", "train",
)  # fmt: skip
MACHINE = ("kernels", "model", "tokenizer", "encoder", "weights", "data", "retriever")
SYSTEMS = ("bard", "qagent")
LEAVES = ("dgpo", "kernels", "infra.config")
MAX_METHOD_LINES, MAX_MACHINE_LINES, MAX_TOP_LEVEL_FILES = 1850, 1650, 24
MAX_TRAIN_MODULES, MAX_TRAIN_LINES = 20, 4030  # what `import train` loads
MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_COLUMNS = 80, 8, 100
MAX_REPOSITORY_BYTES = 12e6

# A module imports from its own floor or from lower ones; infra and the leaves are stricter still.
FLOORS = (
    ("dgpo", "kernels", "infra.*"),
    ("formats.*",),
    ("weights", "tokenizer", "data", "encoder", "model", "retriever", "retrieval.*"),
    ("episode", "batch"),
    ("rollout",),
    ("settings", "sampling", "session"),
    ("distil", "reinforce"),
    ("baselines",),
    ("serving.*", "server", "documents", "train", "eval", "viewer", "bard", "qagent", "world.*",
     "examples.*"),
    ("experiments.*",),
)


# ---- the graph of imports ----


def modules() -> dict[str, Path]:
    """Every Python file of the project but the tests, by its dotted name."""
    wings = [path for wing in WINGS for path in (ROOT / wing).glob("**/*.py")]
    paths = [*ROOT.glob("*.py"), *wings]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


MODULES = modules()


@cache
def imports(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """(modules imported when this one is loaded, modules imported by its functions), dotted.

    Names of other packages stand beside those of the project.
    """
    nodes = [*ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))]
    deferred = {
        inner
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    lazy = {target for node in nodes if node in deferred for target in targets(node)}
    at_once = {target for node in nodes if node not in deferred for target in targets(node)}
    return frozenset(at_once), frozenset(lazy)


def targets(node: ast.AST) -> list[str]:
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        package = node.module or ""
        submodules = [f"{package}.{alias.name}" for alias in node.names]
        return [name for name in submodules if name in MODULES] or [package]
    return []


def local_imports(name: str) -> set[str]:
    at_once, lazy = imports(name)
    return {target for target in at_once | lazy if target in MODULES}


def reachable(name: str, *, follow_lazy: bool) -> set[str]:
    """All local modules that `name` imports, itself or through others."""
    seen, waiting = set(), [name]
    while waiting:
        at_once, lazy = imports(waiting.pop())
        new = {target for target in at_once | (lazy if follow_lazy else set()) if target in MODULES}
        waiting += new - seen
        seen |= new
    return seen


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if name in names or f"{name.partition('.')[0]}.*" in names:
            return number
    raise AssertionError(f"{name}: has no floor; put it on one of FLOORS")


def test_every_import_runs_down_or_stays_on_its_floor():
    upward = [
        f"{name} -> {target}"
        for name in MODULES
        for target in local_imports(name)
        if floor(target) > floor(name)
    ]
    assert not upward


def test_no_imports_run_in_a_circle_also_not_through_other_files():
    assert not [name for name in MODULES if name in reachable(name, follow_lazy=True)]


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_nothing_local(name):
    assert not local_imports(name)


def test_the_equations_import_torch_alone():
    at_once, lazy = imports("dgpo")
    assert at_once | lazy <= {"torch", "typing", "collections.abc", "math", "dataclasses"}


def test_infra_is_ground():
    for name in MODULES:
        if name.startswith("infra."):
            assert all(target.startswith("infra.") for target in local_imports(name)), name


def test_the_core_knows_no_system_no_wing_and_no_program():
    outside = {"server", "documents", "eval", "train", *SYSTEMS}
    for name in (*METHOD, *MACHINE):
        below = reachable(name, follow_lazy=True)
        assert not below & (outside - {name}), name
        wings = ("serving.", "world.", "experiments.")
        assert not [other for other in below if other.startswith(wings)], name


def test_nothing_imports_train():
    assert not [name for name in MODULES if "train" in local_imports(name)]


def test_rollout_never_sees_an_optimizer():
    below = ["rollout", *reachable("rollout", follow_lazy=True)]
    assert not {"distil", "reinforce", "infra.run"} & set(below)
    assert "optim" not in MODULES["rollout"].read_text(encoding="utf-8")


def test_import_train_loads_the_method_and_little_else():
    """In a fresh process, so that what counts is what Python does, not what this test reads."""
    program = "import json, sys, train; print(json.dumps({name: getattr(module, '__file__', None) "
    program += "for name, module in sys.modules.items()}))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout)
    local = [Path(file) for file in loaded.values() if file and Path(file) in MODULES.values()]
    sizes = {str(path.relative_to(ROOT)): num_lines(path) for path in local}
    assert "train.py" in sizes and len(sizes) <= MAX_TRAIN_MODULES, sizes
    assert sum(sizes.values()) <= MAX_TRAIN_LINES, sizes
    unwanted = {*SYSTEMS, "eval", "retriever", "encoder", "baselines", "http.server"}
    assert not unwanted & loaded.keys()
    wings = r"(serving|world|experiments|examples|retrieval)(\.|$)"
    assert not [name for name in loaded if re.match(wings, name)]
    assert set(sizes) == {
        str(MODULES[name].relative_to(ROOT))
        for name in ("train", *reachable("train", follow_lazy=False))
    }, "the graph that this file reads differs from the one that Python loads"


# ---- words that do not belong into a room ----


def core_files() -> list[Path]:
    infra = [path for name, path in MODULES.items() if name.startswith("infra.")]
    return [MODULES[name] for name in (*METHOD, *MACHINE)] + infra


@pytest.mark.parametrize("path", core_files(), ids=lambda path: path.stem)
def test_the_core_has_no_word_about_the_other_systems(path):
    words = re.compile("bard|qagent|budget|hard_stop|thinking", re.IGNORECASE)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [f"{path.name}:{n}: {line}" for n, line in enumerate(lines, 1) if words.search(line)]


@pytest.mark.parametrize("name", ["distil", "reinforce"])
def test_the_loops_test_no_phase_by_name(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert not re.findall(r"\bphase (==|!=|in|not in)|\.phase\b|\bphase\.", text)


# ---- sizes ----


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_method_stays_an_afternoon_and_the_machine_small():
    for names, limit in ((METHOD, MAX_METHOD_LINES), (MACHINE, MAX_MACHINE_LINES)):
        sizes = {name: num_lines(MODULES[name]) for name in names}
        assert sum(sizes.values()) <= limit, f"{sum(sizes.values())} lines: {sizes}"
    assert len([name for name in MODULES if "." not in name]) <= MAX_TOP_LEVEL_FILES


def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (name, node)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [argument.arg for argument in (*named, *rest) if argument.arg not in ("self", "cls")]


def test_functions_are_short_have_few_parameters_and_say_what_they_measure():
    problems = []
    for name, node in functions():
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{name}.{node.name}: {length} lines")
        if len(parameters(node)) > MAX_PARAMETERS:
            problems.append(f"{name}.{node.name}: {len(parameters(node))} parameters")
        if node.name == "measure":
            problems.append(f"{name}.measure: name what is measured")
    assert not problems


def python_files() -> list[Path]:
    return [*MODULES.values(), *ROOT.glob("tests/**/*.py")]


def test_lines_are_at_most_100_columns_wide():
    assert not [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]


def test_python_files_are_ascii_and_open_with_a_docstring():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path
        assert ast.get_docstring(ast.parse(text)), path


def test_nothing_large_is_committed():
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < MAX_REPOSITORY_BYTES


# ---- what is read and handed in ----


@pytest.mark.parametrize("path", [*MODULES.values()], ids=[*MODULES])
def test_nothing_reads_or_writes_a_pickle(path):
    words = r"\bpickle\.\w|import pickle|torch\.(load|save)\b|allow_pickle=True|_object_list\("
    assert not re.findall(words, path.read_text(encoding="utf-8"))


def test_tests_share_what_they_need_through_support_and_conftest():
    for path in ROOT.glob("tests/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [target for node in ast.walk(tree) for target in targets(node)]
        assert not [name for name in names if re.match(r"(tests\.)?(test_|conftest)", name)], path


def settings_of_tables() -> dict[str, type]:
    """The dataclass that reads each table of a preset; "" stands for the top-level keys."""
    import bard
    import eval as evaluation
    import qagent
    from settings import PHASES, TrainSettings

    owners = {name: TrainSettings for name in ("", "train", *PHASES)}
    owners["eval"] = evaluation.EvalSettings
    owners.update({name: bard.BardSettings for name in ("bard", *bard.PHASES)})
    owners.update({name: qagent.QAgentSettings for name in ("qagent", *qagent.PHASES)})
    return owners


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.toml")), ids=lambda path: path.stem)
def test_presets_hold_settings_that_exist_and_values_of_their_types(path):
    """A key that no program knows would fail on the machine where the real run starts."""
    from infra import cli

    owners = settings_of_tables()
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    tables[""] = {key: value for key, value in document.items() if key not in tables}
    for table, values in tables.items():
        assert table in owners, f"[{table}]: no program reads it"
        known = {field.name for field in dataclasses.fields(owners[table])}
        assert values.keys() <= known, f"[{table}] {sorted(values.keys() - known)}"
    for program in ("train", *SYSTEMS):
        settings = owners[program]
        [phase] = [field for field in dataclasses.fields(settings) if field.name == "phase"]
        for name in phase.metadata["choices"]:
            argv = ["--config", str(path), "--phase", name]
            cli.load(settings, argv, prog=f"{program}.py", description="")
