"""README and docs are true: links, names, commands, worked examples, numbers and plain sentences.

docs/log.md tells of the past, so its commands and names are not checked; its links are.

Run: python -m pytest tests/test_docs.py
"""

import argparse
import ast
import doctest
import json
import re
import runpy
import shlex
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from experiments import guidance
from experiments.rows import read_json, read_records
from infra import cli
from settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LOG = ROOT / "docs" / "log.md"
ALGORITHM = ROOT / "docs" / "algorithm.md"
REPRODUCTION = ROOT / "docs" / "reproduction.md"
RECORDS = ROOT / "docs" / "results" / "world"
PAGES = [README, *sorted((ROOT / "docs").glob("**/*.md"))]
LIVING_PAGES = [page for page in PAGES if page != LOG]
PROSE_PAGES = [page for page in PAGES if page.parent.name != "results"]  # not printed by programs
MAX_README_BYTES, MAX_SENTENCE_WORDS = 8000, 30
CODE_FOLDERS = ("", "infra", "retrieval", "serving", "world", "experiments", "examples", "tests",
                "tests/support")
SCRIPTS_ON_PAGES = {"subset.py", "clients.py", "race.py"}  # a page prints them whole
WRITTEN_PRESETS = {"runs/own/own.toml"}  # by a command that stands before them
FOREIGN_FLAGS = {"--shutdown-timeout"}  # of torchrun, beside those of its own parser
MAX_COLUMNS = 100
# A demonstration is one run; its record is written by hand from runs/demo (docs/reproduction.md).
DEMO_RECORD = ROOT / "docs" / "results" / "demo.json"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block; the language of shell commands is empty."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def without_code_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


# ---- links ----


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: small letters, no punctuation, a hyphen for each blank."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    """Targets inside the repository, pictures included."""
    targets = re.findall(r"\]\(([^()\s]+)\)", without_code_blocks(page))
    return [target for target in targets if not target.startswith(("http:", "https:"))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_inside = target.is_relative_to(ROOT) and target.exists()
        if not is_inside or anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


def test_every_page_is_one_click_from_the_readme_and_every_picture_is_shown():
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert not [page for page in (ROOT / "docs").glob("*.md") if page not in linked]
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    pictures = [path for kind in ("png", "svg") for path in (ROOT / "docs").glob(f"**/*.{kind}")]
    assert pictures and not [path for path in pictures if path not in shown]


def test_every_equation_is_two_clicks_from_the_readme():
    """README links the page, its table links the section, the section names a function."""
    assert "docs/algorithm.md" in links(README)
    text = text_of(ALGORITHM)
    for number in range(1, 7):
        [anchor] = re.findall(rf"^\| \[Eq\. {number}\]\(#([\w-]+)\)", text, re.MULTILINE)
        assert anchor in anchors(ALGORITHM)
    sections = re.split(r"^##+ ", text, flags=re.MULTILINE)
    with_a_formula = [section for section in sections if "```math" in section]
    assert len(with_a_formula) >= 14
    for section in with_a_formula:
        title = section.partition("\n")[0]
        assert re.search(r"`(dgpo|baselines|data|episode|rollout)\.\w+", section), title
        assert "*If it is wrong:*" in section and ">>> " in section, title


# ---- names ----


@cache
def definitions(path: Path) -> frozenset[str]:
    """`name` and `Class.name` of what a file defines, imports and exports."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names |= set(defined_by(node))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in defined_by(inner)}
    return frozenset(names)


def defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    return []


@cache
def sources() -> dict[Path, str]:
    paths = [path for folder in CODE_FOLDERS for path in (ROOT / folder).glob("*.py")]
    return {path: path.read_text(encoding="utf-8") for path in paths}


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_code_blocks(page))


def is_missing(code: str, page: Path) -> bool:
    """Whether a name or path in code marks points to nothing."""
    [word, *_] = re.split(r"[\s(]", code, maxsplit=1)
    if re.fullmatch(r"test_\w+", word):
        return not any(f"def {word}(" in text for text in sources().values())
    if re.fullmatch(r"[\w./-]+\.(py|toml|md|txt|cff)", word):
        return not ((ROOT / word).exists() or (page.parent / word).exists())
    if match := re.fullmatch(r"([a-z_]+)\.([A-Za-z_][\w.]*)", word):
        path = ROOT / f"{match[1]}.py"
        return path.exists() and match[2] not in definitions(path)
    return False


@pytest.mark.parametrize("page", LIVING_PAGES, ids=name_of)
def test_functions_tests_and_files_in_code_marks_exist(page):
    """`dgpo.gae`, `episode.Episode.response_mask`, `test_x`, `world/trails.py`."""
    written_by_a_person = SCRIPTS_ON_PAGES | WRITTEN_PRESETS | {"prompt.txt", "compress.txt"}
    checked = [code for code in inline_code(page) if code not in written_by_a_person]
    assert not [code for code in checked if is_missing(code, page)]


@pytest.mark.parametrize("page", [p for p in LIVING_PAGES if p in PROSE_PAGES], ids=name_of)
def test_flags_in_code_marks_exist(page):
    fields = {name for text in sources().values() for name in
              re.findall(r"^    (\w+): .*= setting\(", text, re.MULTILINE)}  # fmt: skip
    flags = {flag for text in sources().values() for flag in re.findall(r'"(--[\w-]+)"', text)}
    known = flags | FOREIGN_FLAGS | {f"--{name.replace('_', '-')}" for name in fields}
    used = {flag for code in inline_code(page) for flag in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert not {flag for flag in used if flag.replace("--no-", "--", 1) not in known} - known


def test_metrics_in_the_page_are_written_by_the_code():
    names = re.findall(r"`(?:rollout|loss|eval)/(\w+)`", text_of(ROOT / "docs" / "metrics.md"))
    code = "".join(text for path, text in sources().items() if "tests" not in path.parts)
    words = {name.removeprefix("actor_").removeprefix("critic_") for name in names}
    assert len(words) > 20
    assert not [word for word in words if not re.search(rf"\b{word}\b|_{word}\b", code)]


WINGS = ("infra", "retrieval", "formats", "serving", "world", "experiments", "examples")


def listed(page: Path) -> set[str]:
    """What the blocks of a page that list files name, a file or folder a line."""
    blocks = [block for _, block in code_blocks(page) if re.match(r"[\w/]+\.py ", block)]
    return {line.split()[0] for block in blocks for line in block.splitlines() if line.strip()}


@pytest.mark.parametrize(("page", "folders"), [(README, [""]), (ROOT / "docs/files.md", WINGS)],
                         ids=["top level", "wings"])
def test_pages_that_list_files_name_every_one_and_no_other(page, folders):
    named = listed(page)
    files = {name_of(path) for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert {name for name in named if name.endswith(".py")} == files
    assert all((ROOT / name).exists() for name in named)


def test_the_readme_names_every_wing():
    assert {f"{wing}/" for wing in WINGS} <= listed(README)


# ---- commands ----


class Parsed(BaseException):
    """Raised in place of running a program whose arguments have been parsed."""


class Command(NamedTuple):
    page: str
    program: str  # "train.py", or "-m experiments.plots"
    arguments: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {self.program} {shlex.join(self.arguments)}"


def commands(page: Path) -> Iterator[Command]:
    """The project's commands in shell blocks, with the variables that these set, and inline."""
    variables: dict[str, str] = {}
    for language, block in code_blocks(page):
        for line in block.replace("\\\n", " ").splitlines() if not language else ():
            if match := re.fullmatch(r'([A-Z])="(.*)"', line):
                variables[match[1]] = match[2]
                continue
            text = re.sub(r"\$([A-Z]+)", lambda name: variables.get(name[1], name[1]), line)
            if command := parse_command(text, name_of(page)):
                yield command
    for code in inline_code(page):
        if command := parse_command(code, name_of(page)):
            yield command


def parse_command(line: str, page: str) -> Command | None:
    if not re.match(r"([A-Z_]+=\S+ )*(\.venv/bin/)?(python|torchrun) ", line):
        return None
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        del words[0]
    launcher = words.pop(0).removeprefix(".venv/bin/")
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        torchrun = get_args_parser().parse_args(words)
        return Command(page, torchrun.training_script, torchrun.training_script_args)
    if words[0] == "-m":
        return Command(page, f"-m {words[1]}", words[2:])
    return Command(page, words[0], words[1:])


COMMANDS = [command for page in LIVING_PAGES for command in commands(page)]
PROGRAMS = [c for c in COMMANDS if c.program not in SCRIPTS_ON_PAGES | {"-m pytest"}]


@pytest.fixture
def stop_after_parsing(monkeypatch):
    """Lets a program parse its arguments with its own parser, and do nothing with them."""
    load, parse_args = cli.load, argparse.ArgumentParser.parse_args

    def load_and_stop(*args, **kwargs):
        settings = load(*args, **kwargs)
        if isinstance(settings, TrainSettings):  # refuses what cannot work together
            sys.modules[type(settings).__module__].with_defaults(replace(settings))
        raise Parsed

    def parse_and_stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.chdir(ROOT)  # presets are named as seen from here
    monkeypatch.setattr(cli, "load", load_and_stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.mark.parametrize("command", PROGRAMS, ids=lambda command: str(command)[:80])
def test_commands_are_accepted_by_the_programs_own_parsers(
    command, stop_after_parsing, monkeypatch, capsys
):
    arguments = [word for word in command.arguments if word not in WRITTEN_PRESETS]
    monkeypatch.setattr(sys, "argv", [command.program, *arguments])
    try:
        if command.program.startswith("-m "):
            runpy.run_module(command.program.removeprefix("-m "), run_name="__main__")
        else:
            assert (ROOT / command.program).is_file()
            runpy.run_path(str(ROOT / command.program), run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        pytest.fail(f"{command}: {end} {capsys.readouterr().err}")
    pytest.fail(f"{command}: was not parsed by cli.load or argparse")


def test_pages_have_the_commands_that_the_check_above_is_for():
    found = {page: 0 for page in map(name_of, LIVING_PAGES)}
    for command in COMMANDS:
        found[command.page] += 1
    assert found["README.md"] >= 4 and found["docs/reproduction.md"] >= 20
    assert found["docs/own-models.md"] >= 15 and found["docs/bard.md"] >= 12
    assert found["docs/qagent.md"] >= 12 and found["docs/performance.md"] >= 3


def test_tests_and_make_targets_in_commands_exist():
    for command in COMMANDS:
        if command.program == "-m pytest":
            files = [word for word in command.arguments if word.startswith("tests/")]
            assert all((ROOT / file).exists() for file in files), command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in LIVING_PAGES:
        shell = "".join(block for language, block in code_blocks(page) if not language)
        mentions = re.findall(r"^make ([\w-]+)", shell, re.MULTILINE)
        mentions += [m for code in inline_code(page) for m in re.findall(r"^make ([\w-]+)", code)]
        assert not [m for m in mentions if not re.search(rf"^{m}:", makefile, re.MULTILINE)], page


@pytest.mark.parametrize("page", LIVING_PAGES, ids=name_of)
def test_python_is_that_of_the_environment(page):
    """A page that calls python says first how to activate the environment."""
    plain = re.search(r"^(python|torchrun) ", text_of(page), re.MULTILINE)
    activation = text_of(page).find(". .venv/bin/activate")
    assert plain is None or 0 <= activation < plain.start()


# ---- the worked examples ----


def test_the_examples_of_the_algorithm_page_give_what_they_say():
    names: dict = {}
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    blocks = [block for language, block in code_blocks(ALGORITHM) if language == "python"]
    report: list[str] = []
    for number, block in enumerate(blocks, 1):
        where = f"{name_of(ALGORITHM)}, example {number}"
        example = doctest.DocTestParser().get_doctest(block, {}, where, None, 0)
        example.globs = names  # a later block goes on with the names of the earlier ones
        runner.run(example, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)
    assert runner.tries > 50


@pytest.mark.parametrize("page", LIVING_PAGES, ids=name_of)
def test_other_python_on_a_page_is_python(page):
    for language, block in code_blocks(page):
        if language == "python" and ">>> " not in block:
            ast.parse(block)


# ---- numbers ----


@cache
def recorded_averages() -> dict[str, list[float]]:
    """Label of a row in the tables -> its average exact match for each seed."""
    averages: dict[str, list[float]] = {}
    for path in sorted(RECORDS.glob("*.json")):
        record = read_json(path)
        averages.setdefault(record["name"], []).append(record["average"]["em"])
    return averages


def mean(label: str) -> str:
    return f"{statistics.mean(recorded_averages()[label]):.3f}"


def guidance_mean(row: str) -> str:
    paths = sorted((RECORDS.parent / "guidance").glob(f"{row}-[0-9].json"))
    assert len(paths) == 3
    records = [read_json(path) for path in paths]
    return f"{statistics.mean(record['average']['em'] for record in records):.3f}"


def table_rows(page: Path, after: str) -> list[list[str]]:
    """Cells of the first table after some text, without its two header lines."""
    lines = text_of(page).partition(after)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]


def test_numbers_on_the_readme_are_those_of_the_records():
    _, _, text = text_of(README).partition("## Does it reproduce the paper?")
    section = " ".join(text.partition("\n## ")[0].split())
    expected = {
        "DGPO ([0-9.]+), KD": mean("DGPO"),
        ", KD ([0-9.]+), PPO": mean("KD"),
        r", PPO ([0-9.]+)\.": mean("PPO"),
        r"weak student \(([0-9.]+)\)": guidance_mean("kd1"),
        ": ([0-9.]+) on wrong": guidance_mean("kd1-exact"),
        "episodes, ([0-9.]+) on all": guidance_mean("kd1-uniform"),
        "on all, ([0-9.]+) without": guidance_mean("kd1-none"),
        "cold start: ([0-9.]+), and": guidance_mean("plain-exact"),
        r"and PPO ([0-9.]+)\.": guidance_mean("plain-none"),
        "a stronger start: ([0-9.]+) after seven": guidance_mean("kd7-exact"),
        r"and ([0-9.]+) without it\.": guidance_mean("kd7-none"),
        "gives ([0-9.]+) and": guidance_mean("kd1-reward"),
        "and ([0-9.]+) there": guidance_mean("kd7-reward"),
        ": ([0-9.]+) selective": mean("DGPO"),
        "selective, ([0-9.]+) uniform": mean("(b) uniform KL"),
        "uniform, ([0-9.]+) none": mean("(c) w/o teacher guidance"),
    }
    checked = []
    for pattern, value in expected.items():
        match = re.search(pattern, section)
        assert match and match[1] == value, pattern
        checked.append(match[1])
    assert sorted(re.findall(r"\b0\.\d{3}\b", section)) == sorted(checked), "an unchecked number"
    assert "docs/reproduction.md" in section  # the page that the numbers are from


def test_the_tables_of_reproduction_are_those_of_the_records():
    rows = table_rows(REPRODUCTION, "## What came out")
    assert {label for label, *_ in rows} == set(recorded_averages())
    for label, *sets, average in rows:
        values = recorded_averages()[label]
        spread = f" \u00b1{statistics.stdev(values):.3f}" if len(values) > 1 else ""
        assert average == f"{statistics.mean(values):.3f}{spread}", label
        assert len(sets) == 7, label


def test_the_table_of_starts_and_forms_has_the_numbers_of_its_records():
    runs_of = read_records(RECORDS.parent / "guidance")
    table = table_rows(REPRODUCTION, "<!-- starts and forms -->")
    for start, (_, *shown) in zip(guidance.EPOCHS, table, strict=True):
        names = [guidance.start_name(start), *(f"{start}-{form}" for form in guidance.FORMS)]
        assert shown == [guidance.cell(runs_of.get(name, [])) for name in names], start


def test_the_demonstration_s_table_is_the_same_on_both_pages_and_in_its_record():
    table = table_rows(README, "<!-- demo table -->")
    assert table == table_rows(REPRODUCTION, "<!-- demo table -->")
    assert [row[0] for row in table] == ["Student", "Teacher", "KD", "KD, then PPO", "DGPO"]
    for label, *sets, average in table:
        assert float(average) == pytest.approx(statistics.mean(map(float, sets)), abs=1.1e-3), label
    if DEMO_RECORD.exists():
        for result, row in zip(json.loads(text_of(DEMO_RECORD)), table, strict=True):
            measured = [*result["sets"].values(), result["average"]]
            assert row[1:] == [f"{values['em']:.3f}" for values in measured], row[0]


def test_the_table_of_real_questions_has_the_numbers_of_its_records():
    labels = {"Student": "student", "Teacher (sft)": "teacher", "KD": "kd", "DGPO, exact": "dgpo"}
    table = table_rows(README, "<!-- real table -->")
    assert [row[0] for row in table] == [*labels]
    for label, *shown in table:
        record = read_json(ROOT / f"docs/results/real/{labels[label]}-0.json")
        measured = [*record["sets"].values(), record["average"]]
        assert shown == [f"{values['em']:.3f}" for values in measured], label


def test_the_table_of_the_guided_bard_has_the_numbers_of_its_records():
    page, folder = ROOT / "docs/bard.md", ROOT / "docs/results/bard-guided"
    names = {"SFT only": "sft", "SFT of the teacher, the guide": "sft-teacher",
             "BARD": "bard", "BARD, guided": "guided"}
    rows = table_rows(page, "Records: [results/bard-guided/](results/bard-guided).")
    assert [row[0] for row in rows] == [*names]
    for label, *shown in rows:
        runs = [read_json(path) for path in folder.glob(f"{names[label]}-?.json")]
        means = [statistics.mean(run["budgets"][budget]["adherence"] for run in runs)
                 for budget in ("38", "64", "128", "256", "384", "48", "96", "192", "288")]
        means.append(statistics.mean(run["spearman"] for run in runs))
        assert [float(cell) for cell in shown] == pytest.approx(means, abs=6e-4), label


# ---- language ----


def sentences(page: Path) -> list[str]:
    """Sentences of paragraphs and lists; code, tables, headings and pictures are left out."""
    text = re.sub(r"^(\||#|<|!\[).*$", "", without_code_blocks(page), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text))
    paragraphs = re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE)
    return [
        sentence
        for paragraph in paragraphs
        for sentence in re.split(
            r"(?<=[.!?])(?<!Eq\.)(?<!Sec\.)[\"*)]*\s+", " ".join(paragraph.split())
        )
    ]


@pytest.mark.parametrize("page", PROSE_PAGES, ids=name_of)
def test_no_sentence_is_longer_than_thirty_words(page):
    long = [s for s in sentences(page) if len(re.findall(r"\w[\w'.,-]*", s)) > MAX_SENTENCE_WORDS]
    assert not long


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= MAX_README_BYTES


@pytest.mark.parametrize("page", PROSE_PAGES, ids=name_of)
def test_lines_of_prose_have_at_most_a_hundred_columns(page):
    lines = without_code_blocks(page).splitlines()
    prose = [line for line in lines if not line.startswith(("|", "#", "!["))]
    assert not [line for line in prose if len(line) > MAX_COLUMNS]


def test_no_page_names_a_machine_s_paths_or_a_tracker_s_numbers():
    words = r"/(?:work|home|root|tmp)/|(?<!\w)\.\./\.\./\.\.|\b[Ii]ssue #?\d+\b|\bshared/"
    files = [*PAGES, ROOT / "CITATION.cff", ROOT / "docs" / "method.svg"]
    assert not [(name_of(path), m) for path in files for m in re.findall(words, text_of(path))]


# ---- the other files ----


def test_no_record_names_a_machine_s_paths():
    records = [*(ROOT / "docs").rglob("*.json")]
    assert len(records) > 100
    assert not [path for path in records if re.search(r'[" =]/\w', path.read_text())]


def test_the_picture_of_the_method_is_readable_in_light_and_dark():
    text = text_of(ROOT / "docs" / "method.svg")
    picture = ElementTree.fromstring(text)
    assert picture.tag.endswith("svg") and picture.get("role") == "img"
    assert "prefers-color-scheme: dark" in text  # and no background: that of the page shows
    assert not re.search(r"href|<image|<script|url\(http", text)


def test_the_citation_names_software_licence_and_paper():
    text = text_of(ROOT / "CITATION.cff")
    for line in ("cff-version: 1.2.0", "type: software", "license: MIT", "references:"):
        assert re.search(rf"^{re.escape(line)}$", text, re.MULTILINE), line
    assert "DGPO reference implementation's contributors" in text
    assert "2508.20324" in text and "family-names: Kotoge" in text
