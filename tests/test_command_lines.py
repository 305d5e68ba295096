"""Wrong command lines: each ends its program with one short message, before anything is loaded.

They run in this process as the shell would run them, through the end of each file.
Run: python -m pytest tests/test_command_lines.py
"""

import dataclasses
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bard
import qagent
from infra import cli
from infra.programs import check_path
from settings import PHASES, TrainSettings, with_defaults

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES, MAX_SECONDS, MAX_HELP_LINES = 4, 5, 75
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN, ASK, EVAL = "train.py", "rollout.py ask", "eval.py"


@pytest.fixture(scope="module")
def place(mini, tmp_path_factory) -> Path:
    """A folder with the miniature world's preset and files that are wrong in different ways."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy(mini / "mini.toml", folder / "mini.toml")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "not.toml").write_text("a: 1\n")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (folder / "unknown-key.toml").write_text("stepz = 3\n")
    (folder / "wrong-type.toml").write_text('steps = "three"\n')
    (folder / "unread.toml").write_text("[kd]\nsteps = 3\n")
    (folder / "negative.toml").write_text("steps = -3\n")
    (folder / "empty").mkdir()
    return folder


def run_program(command: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a program of the project."""
    program, *words = command.split()
    monkeypatch.setattr(sys, "argv", [str(ROOT / program), *words, *arguments])
    try:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            sys.modules.pop(program, None)
            runpy.run_module(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        assert isinstance(end.code, int | None), f"a text as status goes past the message: {end}"
        status = end.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# What is wrong: command, arguments, parts of the message. {place} and {mini} are folders.
WITH_MINI = ["--config", "{place}/mini.toml", "--run-dir", "{place}/fresh"]
WRONG = [
    # flags
    (TRAIN, ["--stepz", "3"], ["--stepz", "did you mean --steps?"]),
    (TRAIN, ["--step", "3", "--phase", "ppo"], ["--step", "--steps"]),  # no abbreviations
    (TRAIN, ["kd"], ["'kd'", "did you mean --phase kd?"]),
    (TRAIN, ["-phase", "kd"], ["-phase"]),
    (TRAIN, ["--phase"], ["--phase", "expected one argument"]),
    (TRAIN, ["--phase", "dpgo"], ["dpgo", "did you mean dgpo?"]),
    (TRAIN, ["--phase", "ppo", "--steps"], ["--steps", "expected one argument"]),
    (TRAIN, ["--phase", "ppo", "--steps", "many"], ["--steps", "'many'", "expected int"]),
    (TRAIN, ["--phase", "ppo", "--steps", "1e3"], ["--steps", "1e3"]),
    (TRAIN, ["--resume", "yes"], ["'yes'"]),
    (TRAIN, ["--device", "gpu", *WITH_MINI], ["--device", "gpu", "cpu"]),
    (TRAIN, ["--device", "cuda:99", *WITH_MINI], ["--device", "cuda:99"]),
    (TRAIN, ["--device", "", *WITH_MINI], ["--device"]),
    # numbers that cannot work
    (TRAIN, ["--phase", "ppo", "--steps", "0"], ["--steps", "got 0", "at least 1"]),
    (TRAIN, ["--phase", "ppo", "--prompts-per-step", "0"], ["--prompts-per-step", "at least 1"]),
    (TRAIN, ["--batch-size", "-1"], ["--batch-size", "got -1", "at least 1"]),
    (TRAIN, ["--epochs", "0"], ["--epochs", "above 0"]),
    (TRAIN, ["--kd-lr", "-0.1"], ["--kd-lr", "got -0.1", "at least 0"]),
    (TRAIN, ["--kd-lr", "nan"], ["--kd-lr", "nan"]),
    (TRAIN, ["--kd-lr", "inf"], ["--kd-lr", "inf"]),
    (TRAIN, ["--top-k", "0"], ["--top-k", "at least 1"]),
    (TRAIN, ["--max-new-tokens", "0"], ["--max-new-tokens", "above 0"]),
    (TRAIN, ["--max-new-tokens", "512"], ["--max-new-tokens", "below 512", "max_context"]),
    (TRAIN, ["--max-obs-tokens", "600"], ["--max-obs-tokens", "600"]),
    (TRAIN, ["--max-turns", "-1"], ["--max-turns", "at least 0"]),
    (TRAIN, ["--rollout-rows", "0"], ["--rollout-rows", "at least 1"]),
    (TRAIN, ["--val-size", "-1"], ["--val-size", "at least 0"]),
    (TRAIN, ["--save-every", "-1"], ["--save-every", "at least 0"]),
    (TRAIN, ["--eval-every", "-5"], ["--eval-every", "at least 0"]),
    (TRAIN, ["--seed", "-1"], ["--seed", "at least 0"]),
    (TRAIN, ["--temperature", "-1"], ["--temperature", "at least 0"]),
    (TRAIN, ["--top-p", "0"], ["--top-p", "above 0"]),
    (TRAIN, ["--top-p", "1.5"], ["--top-p", "at most 1"]),
    (TRAIN, ["--distance", "jsd", "--mix", "2"], ["--mix", "at most 1"]),
    (TRAIN, ["--phase", "ppo", "--gamma", "1.1"], ["--gamma", "at most 1"]),
    (TRAIN, ["--phase", "ppo", "--gae-lambda", "-1"], ["--gae-lambda", "at least 0"]),
    (TRAIN, ["--grad-clip", "0"], ["--grad-clip", "above 0"]),
    (TRAIN, ["--micro-batch-tokens", "0"], ["--micro-batch-tokens", "at least 1"]),
    (TRAIN, ["--timeout-minutes", "0"], ["--timeout-minutes", "above 0"]),
    (TRAIN, ["--processes", "0"], ["--processes", "at least 1"]),
    (TRAIN, ["--phase", "ppo", "--prompts-per-step", "8"], ["minibatch_size", "at most 8"]),
    (TRAIN, ["--phase", "grpo", "--group-size", "1"], ["--group-size", "at least 2"]),
    (TRAIN, ["--phase", "taid", "--taid-start", "1", "--taid-end", "0.5"], ["--taid-start", "0.5"]),
    # settings that the phase does not read
    (TRAIN, ["--phase", "kd", "--steps", "3"], ["--steps", "phase kd", "ppo"]),
    (TRAIN, ["--phase", "dgpo", "--epochs", "3"], ["--epochs", "phase dgpo", "kd"]),
    (TRAIN, ["--phase", "gkd", "--epochs", "3"], ["--epochs", "phase gkd"]),
    (TRAIN, ["--phase", "kd", "--taid-alpha", "1"], ["--taid-alpha", "phase kd", "taid"]),
    (TRAIN, ["--phase", "kd", "--beta", "1"], ["--beta", "phase kd"]),
    (TRAIN, ["--phase", "kd", "--reward", "r.py:f"], ["--reward", "phase kd"]),
    (TRAIN, ["--phase", "sft", "--teacher", "t"], ["--teacher", "phase sft", "kd"]),
    (TRAIN, ["--phase", "ppo", "--teacher", "t"], ["--teacher", "phase ppo", "dgpo"]),
    (TRAIN, ["--phase", "taid", "--distance", "jsd"], ["--distance", "phase taid"]),
    (TRAIN, ["--phase", "episodes", "--save-every", "3"], ["--save-every", "phase episodes"]),
    (TRAIN, ["--phase", "dgpo", "--group-size", "4"], ["--group-size", "--advantage gae"]),
    (TRAIN, ["--phase", "grpo", "--critic-lr", "1"], ["--critic-lr", "--advantage group"]),
    (TRAIN, ["--phase", "ppo", "--kl-where", "none", "--beta", "1"], ["--beta", "--kl-where"]),
    (TRAIN, ["--phase", "kd", "--mix", "0.2"], ["--mix", "--distance forward"]),
    (TRAIN, ["--config", "{place}/unread.toml", "--phase", "kd"], ["[kd] steps", "phase kd"]),
    (TRAIN, ["--phase", "bard-sft", "--steps", "3"], ["--steps", "bard-rl"]),
    (TRAIN, ["--phase", "bard-rl", "--compressor", "trails"], ["--compressor", "bard-data"]),
    (TRAIN, ["--phase", "qagent", "--epochs", "3"], ["--epochs", "phase qagent"]),
    (TRAIN, ["--phase", "qagent", "--stage", "3"], ["--stage", "3"]),
    (TRAIN, ["--phase", "qagent", "--hit-weight", "3"], ["--hit-weight", "--stage 1"]),
    (TRAIN, [*WITH_MINI, "--prompt", "{place}/mini.toml"], ["--prompt", "without {question}"]),
    # presets
    (TRAIN, ["--config", "{place}/absent.toml"], ["absent.toml", "expected a TOML file"]),
    (TRAIN, ["--config", ""], ["--config", "''"]),
    (TRAIN, ["--config", "{place}/empty"], ["empty", "expected a TOML file"]),
    (TRAIN, ["--config", "{place}/not.toml"], ["not.toml", "not TOML"]),
    (TRAIN, ["--config", "{place}/binary.toml"], ["binary.toml", "not TOML"]),
    (TRAIN, ["--config", "{place}/unknown-key.toml"], ["stepz", "did you mean steps?"]),
    (TRAIN, ["--config", "{place}/wrong-type.toml"], ["steps", "'three'", "expected int"]),
    (TRAIN, ["--config", "{place}/negative.toml", "--phase", "ppo"], ["negative.toml: steps"]),
    # files
    (TRAIN, [*WITH_MINI, "--run-dir", "{place}/run"], ["already holds a run", "--resume"]),
    (TRAIN, [*WITH_MINI, "--student", "{place}/nowhere"], ["--student", "nowhere", "not there"]),
    (TRAIN, [*WITH_MINI, "--student", "nowhere"], ["--student", "nowhere", "not there"]),
    (TRAIN, [*WITH_MINI, "--student", ""], ["--student", "no checkpoint"]),
    (TRAIN, [*WITH_MINI, "--student", "{place}/empty"], ["--student", "config.json"]),
    (TRAIN, [*WITH_MINI, "--teacher", "{place}/mini.toml"], ["--teacher", "is a file"]),
    (TRAIN, [*WITH_MINI, "--teacher", ""], ["--teacher", "no checkpoint"]),
    (TRAIN, [*WITH_MINI, "--encoder", "{place}/empty"], ["--encoder", "config.json"]),
    (TRAIN, [*WITH_MINI, "--corpus", "{place}/empty"], ["--corpus", "is a folder"]),
    (TRAIN, [*WITH_MINI, "--questions", "{place}/none.jsonl"], ["--questions", "not there"]),
    (TRAIN, [*WITH_MINI, "--index", "{place}/index"], ["--index", "not there"]),
    (TRAIN, ["--phase", "dgpo", "--importance-cap", "-1"], ["--importance-cap", "at least 0"]),
    (TRAIN, ["--phase", "dgpo", "--kl-in", "exact", "--beta", "1"], ["--beta", "--kl-in exact"]),
    (TRAIN, ["--phase", "dgpo", "--kl-in", "exact", "--mean-over", "episode"], ["--mean-over"]),
    (TRAIN, ["--phase", "dgpo", "--compute-dtype", "float16"], ["compute_dtype", "bfloat16"]),
    (TRAIN, [*WITH_MINI, "--prompt", "papre"], ["--prompt", "papre", "not there"]),
    (TRAIN, [*WITH_MINI, "--protocol", "mine.py:P"], ["--protocol", "mine.py:P"]),
    (TRAIN, [*WITH_MINI, "--phase", "ppo", "--reward", "mine.py:f"], ["--reward", "mine.py:f"]),
    (TRAIN, [*WITH_MINI, "--phase", "sft", "--episodes", "{place}/no"], ["--phase episodes makes"]),
    (TRAIN, ["--config", "{root}/configs/world.toml", "{root}/configs/bard.toml", "--phase",
             "bard-rl", "--student", "{root}/runs/trails/absent"],
     ["--student", "python -m world.build build-trails"]),
    # other programs
    ("rollout.py", [], ["got ''", "expected ask"]),
    ("rollout.py", ["aks", "who"], ["'aks'", "expected ask"]),
    (ASK, ["--model", "{mini}/student"], ["--question", "got no question"]),
    (ASK, ["who", "--model", "{place}/nowhere"], ["--model", "nowhere"]),
    (ASK, ["--modle", "x", "who"], ["--modle", "did you mean --model?"]),
    (ASK, ["who", "--model", "{mini}/student", "--top-p", "2"], ["--top-p", "at most 1"]),
    (EVAL, ["--model", "{place}/nowhere"], ["--model", "nowhere"]),
    (EVAL, ["--model", ""], ["--model", "empty"]),
    (EVAL, ["arcpa"], ["arcpa", "expected arcap"]),
    (EVAL, ["--limit", "0"], ["--limit", "at least 1"]),
    (EVAL, ["--model", "{mini}/student", "--questions", "{place}/no"], ["--questions"]),
    (EVAL, ["--model", "{mini}/student", "--device", "gpu"], ["--device", "gpu"]),
    (EVAL, ["arcap", "--model", "{mini}/student", "--max-turns", "0"], ["--max-turns 0"]),
    ("eval.py table", [], ["files"]),
    ("eval.py table", ["{place}/no.json"], ["no.json"]),
    ("eval.py table", ["{place}/not.toml"], ["not.toml", "JSON"]),
    ("eval.py compare", ["{place}/no.json"], ["expected A.json B.json"]),
    ("retriever.py", [], ["command"]),
    ("retriever.py build", [], ["--out"]),
    ("retriever.py build", ["--out", "{place}/i", "--corpus", "{place}/no"], ["--corpus", "no"]),
    ("retriever.py build", ["--out", "{place}/i", "--batch-size", "0"], ["--batch-size", "1"]),
    ("retriever.py search", ["who", "--top-k", "0"], ["--top-k", "at least 1"]),
    ("retriever.py search", ["who", "--device", "gpu"], ["--device", "gpu"]),
    ("retriever.py search", ["who", "--encoder", "{place}/empty"], ["--encoder", "config.json"]),
    ("retriever.py search", ["who", "--index", "{place}/no"], ["--index", "not there"]),
    ("retriever.py search", ["who", "--top", "1"], ["--top"]),
    ("data.py", ["prepare"], ["--flashrag"]),
    ("data.py", ["perpare"], ["perpare"]),
    ("data.py", ["prepare", "--flashrag", "{place}", "--out", "{place}/o"], ["the layout"]),
    ("bard.py", ["aks"], ["aks", "expected ask or measure"]),
    ("bard.py ask", ["--budget", "9"], ["--question", "no question"]),
    ("bard.py ask", ["who", "--budget", "-9"], ["--budget", "at least 0"]),
    ("bard.py ask", ["who", "--model", "{place}/no"], ["--model"]),
    ("bard.py measure", ["who"], ["'who'"]),
    ("bard.py measure", ["--model", "{mini}/student", "--budgets", "0"], ["budget: got 0"]),
    ("bard.py measure", ["--model", "{mini}/student"], ["--budgets", "got none"]),
    ("qagent.py", ["serch"], ["serch", "expected search, answer, serve or measure"]),
    ("qagent.py search", [], ["got question ''", "expected one"]),
    ("qagent.py serve", ["who"], ["'who'", "expected none"]),
    ("qagent.py serve", ["--port", "70000"], ["--port", "at most 65535"]),
    ("documents.py", ["indx"], ["indx", "expected index or questions"]),
    ("documents.py index", ["{place}/no"], ["--folder", "no", "expected a folder"]),
    ("documents.py index", ["{place}"], ["--encoder", "got no checkpoint"]),
    ("documents.py index", ["{place}", "--encoder", "{mini}/encoder", "--size", "8"], ["at least"]),
    ("documents.py index", ["{place}", "--encoder", "{mini}/encoder", "--out", "{place}/own",
                            "--size", "9999"], ["--size 9999", "tokens"]),
    ("documents.py questions", ["{place}/empty"], ["--index", "documents.py index"]),
    ("server.py", ["who"], ["'who'"]), ("server.py", ["--port", "0"], ["--port", "at least 1"]),
    ("server.py", ["--model", "{place}/no"], ["--model", "is not there"]),
    ("server.py", ["--rollout-rows", "0"], ["--rollout-rows", "at least 1"]),
    ("qagent.py answer", ["who", "--model", "{mini}/student", "--generator", "{place}/no"],
     ["--generator"]),
    ("world.build", ["trails"], ["trails"]),
    ("world.demonstrate", ["--gold", "{place}/no", "--out", "{place}/o"], ["no"]),
    ("world.demonstrate", ["--gold", "{place}/no", "--out", "o", "--passages", "0"], ["1"]),
    ("experiments.reproduce", ["rosw"], ["rosw"]),
    ("experiments.reproduce", ["rows", "--rows", "dpgo"], ["dpgo"]),
    ("experiments.reproduce", ["rows", "--seeds", "-1"], ["--seeds", "at least 0"]),
    ("experiments.reproduce", ["report", "--records", "{place}/no"], ["no recorded results"]),
    ("experiments.bard", ["report", "--records", "{place}/no"], ["no recorded results"]),
    ("experiments.qagent", ["report", "--records", "{place}/no"], ["no recorded results"]),
    ("experiments.bench", ["decode", "--batch", "0"], ["--batch", "at least 1"]),
    ("eval.py", ["plot", "{place}/no", "--out", "{place}/o.png"], ["no"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "arguments", "parts"), WRONG, ids=[f"{c} {' '.join(a)}"[:60] for c, a, _ in WRONG]
)
def test_a_wrong_command_line_ends_with_one_short_message_before_anything_is_loaded(
    place, mini, monkeypatch, capsys, command, arguments, parts
):
    arguments = [a.format(place=place, mini=mini, root=ROOT) for a in arguments]
    started = time.perf_counter()
    status, _, message = run_program(command, arguments, monkeypatch, capsys)
    assert status in (1, 2), message
    assert all(part in message for part in parts), message
    assert "Traceback" not in message and 1 <= len(message.splitlines()) <= MAX_LINES, message
    assert time.perf_counter() - started < MAX_SECONDS


# ---- help ----

HELP = [
    *(f"train.py --phase {phase}" for phase in (*PHASES, *bard.PHASES, *qagent.PHASES)),
    "train.py --config configs/world.toml configs/bard.toml --phase bard-rl",
    *("rollout.py", "rollout.py ask", "eval.py", "eval.py arcap", "eval.py table"),
    *("eval.py compare", "retriever.py", "retriever.py build", "retriever.py search"),
    *("retriever.py serve", "retriever.py compare", "viewer.py", "viewer.py watch", "server.py"),
    *("documents.py", "documents.py index", "documents.py questions"),
    *("data.py", "data.py prepare", "bard.py", "bard.py ask", "bard.py measure", "qagent.py"),
    *(f"qagent.py {command}" for command in ("search", "answer", "serve", "measure")),
    *("world.build", "world.build build-trails", "world.demonstrate"),
    *("experiments.reproduce", "experiments.reproduce rows", "experiments.bard"),
    *("experiments.qagent", "experiments.plots", "experiments.plots budgets"),
    *("experiments.bench", "experiments.bench report"),
]


@pytest.mark.parametrize("command", HELP)
def test_help_is_a_screen_and_a_half_on_every_program_and_command(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status, text, message = run_program(command, ["--help"], monkeypatch, capsys)
    assert status == 0 and not message
    lines = text.splitlines()
    assert 3 <= len(lines) <= MAX_HELP_LINES and max(map(len, lines)) <= 100


def test_help_shows_the_values_that_hold_for_the_phase_and_the_presets(monkeypatch, capsys):
    def shown(*arguments: str) -> dict[str, str]:
        _, text, _ = run_program(TRAIN, [*arguments, "--help"], monkeypatch, capsys)
        text = " ".join(text.split())
        return dict(re.findall(r"--([a-z-]+) (?:(?! --[a-z]).)*? \[([^\]]*)\]", text))

    paper = ["--config", str(ROOT / "configs" / "paper.toml")]
    dgpo = shown("--phase", "dgpo", *paper)
    assert dgpo["steps"] == "1000" and dgpo["prompts-per-step"] == "512"
    assert dgpo["kl-where"] == "wrong" and dgpo["advantage"] == "gae"
    assert dgpo["run-dir"].endswith("runs/dgpo")
    assert "epochs" not in dgpo and "group-size" not in dgpo
    grpo = shown("--phase", "grpo", *paper, "--steps", "7")
    assert grpo["steps"] == "7" and grpo["group-size"] == "5" and grpo["kl-where"] == "all"
    assert "critic-lr" not in grpo
    assert shown("--phase", "kd")["epochs"] == "7.0"  # the world's


def test_all_help_names_every_setting_and_types(monkeypatch, capsys):
    _, text, _ = run_program(TRAIN, ["--help-all"], monkeypatch, capsys)
    for field in dataclasses.fields(TrainSettings):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    for part in ("--steps INT", "--kd-lr FLOAT", "--corpus FILE", "--student DIR",
                 "--kl-in reward|loss", "--prompt paper|short|row|FILE"):  # fmt: skip
        assert part in text


# ---- where words and paths stand ----


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_a_question_may_stand_before_after_and_between_flags(
    mini, order, monkeypatch, capsys
):
    flags = ["--config", f"{mini}/mini.toml", "--max-turns", "0", "--model", f"{mini}/student"]
    question = ["which number", "has fact 3"]
    arguments = {"before": [*question, *flags], "after": [*flags, *question],
                 "between": [question[0], *flags, question[1]]}[order]  # fmt: skip
    status, text, _ = run_program(ASK, arguments, monkeypatch, capsys)
    assert status == 0 and "which number has fact 3?" in text


def test_programs_run_from_any_folder(mini, tmp_path, monkeypatch, capsys):
    """Paths of presets and defaults are the project's, those of flags the current folder's."""
    monkeypatch.chdir(tmp_path)
    world = ROOT / "configs" / "world.toml"
    settings = cli.load(TrainSettings, ["--phase", "kd"], prog=TRAIN, description="",
                           default_config=world, finish=with_defaults)  # fmt: skip
    assert settings.corpus == str(ROOT / "world" / "corpus.jsonl")
    assert settings.student == str(ROOT / "world" / "student")
    assert settings.run_dir == str(ROOT / "runs" / "kd") and settings.prompt == "short"
    assert settings.episodes == str(ROOT / "runs" / "episodes.jsonl")
    hub = ["--config", str(ROOT / "configs" / "qwen2.5-3b-0.5b.toml")]
    settings = cli.load(TrainSettings, hub, prog=TRAIN, description="")
    assert settings.student == "Qwen/Qwen2.5-0.5B-Instruct"  # an id, no path
    shutil.copy(mini / "episodes.jsonl", tmp_path / "mine.jsonl")
    flags = ["--phase", "sft", "--episodes", "mine.jsonl", "--run-dir", "run", "--epochs", "0.5"]
    status, _, message = run_program(TRAIN, flags, monkeypatch, capsys)
    assert status == 0, message
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_presets_leave_out_what_a_phase_does_not_read_at_their_top_alone(place, capsys):
    (place / "top.toml").write_text("steps = 3\nepochs = 2\n[gkd]\nsteps = 4\n[train]\nbeta = 1\n")
    flags = ["--config", str(place / "top.toml")]
    assert cli.load(TrainSettings, flags, prog=TRAIN, description="").epochs == 2
    gkd = cli.load(TrainSettings, [*flags, "--phase", "gkd"], prog=TRAIN, description="")
    assert gkd.steps == 4


def test_a_folder_that_is_no_model_is_told_from_one_that_is_not_there(tmp_path):
    for path, got in ((tmp_path, "has no config.json"), (tmp_path / "absent", "is not there")):
        with pytest.raises(FileNotFoundError, match=f"--student: got .*, which {got}, expected"):
            check_path(str(path), "DIR", "--student")
    with pytest.raises(FileNotFoundError, match="--corpus: got .*, which is a folder, expected"):
        check_path(str(tmp_path), "FILE", "--corpus")


# ---- several processes ----


@pytest.mark.slow
def test_torchrun_says_a_refused_setting_once_and_last(mini):
    command = [*LAUNCHER, str(ROOT / TRAIN), "--config", f"{mini}/mini.toml", "--steps", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1  # torchrun's, whatever the processes' is
    message = "train.py: --steps: got it for phase kd"
    lines = result.stderr.strip().splitlines()
    assert message in lines[-2]  # torchrun's table of failures ends with it, and a ruler
    assert len([line for line in lines if line.startswith(message)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.faults)]
)
def test_the_message_of_several_processes_is_the_last_thing_on_the_screen(mini, tmp_path, number):
    command = [sys.executable, str(ROOT / TRAIN), "--processes", "2"]
    command += ["--config", f"{mini}/mini.toml", "--phase", "kd", "--run-dir", f"{tmp_path}/run"]
    command += ["--epochs", "2000", "--eval-every", "0", "--save-every", "0", "--max-turns", "0"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert job.poll() is None and time.monotonic() < deadline, "the run did not begin"
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(job.pid, number)  # as a terminal does
        else:
            children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(children[-1]), number)
        output, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    if number == signal.SIGINT:
        assert job.returncode == 130 and "--resume continues the same command" in last
    else:
        assert job.returncode == 1 and "was ended by SIGKILL" in last and "--resume" in last
