"""Settings: precedence, types, and mistakes that must not run as the default.

Run: python -m pytest tests/test_config.py
"""

import json
from dataclasses import dataclass, replace

import pytest

from infra import cli, config, named
from infra.config import setting


@dataclass
class Base:
    top_k: int = setting(3, "passages per search")


@dataclass
class Settings(Base):
    phase: str = setting("kd", "what to run", choices=("kd", "dgpo"))
    lr: float = setting(1e-4, "peak learning rate, 100 % of it")
    resume: bool = setting(False, "continue a run")
    shuffle: bool = setting(True, "mix the rows")
    limit: int | None = setting(None, "first rows alone")
    questions: tuple[str, ...] = setting(("a.jsonl",), "question files")
    betas: tuple[float, ...] = setting((0.9, 0.999), "Adam")


def load(*argv: str, toml: str | None = None, tmp_path=None, **options) -> Settings:
    if toml is not None:
        (tmp_path / "preset.toml").write_text(toml)
        argv = ("--config", str(tmp_path / "preset.toml"), *argv)
    return cli.load(Settings, list(argv), prog="train.py", description="Trains.", **options)


def refused(capsys, *argv: str, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        load(*argv, **options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_without_arguments_the_defaults_hold():
    assert load() == Settings()


def test_flags_of_every_type_are_read():
    got = load(
        "--phase",
        "dgpo",
        "--lr",
        "3e-5",
        "--resume",
        "--no-shuffle",
        "--limit",
        "7",
        "--top-k",
        "5",
        "--questions",
        "x",
        "y",
        "--betas",
        "0.5",
        "1",
    )
    assert got == Settings(5, "dgpo", 3e-5, True, False, 7, ("x", "y"), (0.5, 1.0))
    assert type(got.betas[1]) is float
    assert load("--limit", "none").limit is None


TOML = """
lr = 1
top_k = 4
limit = 9
[train]
top_k = 5
[kd]
lr = 2
top_k = 6
[dgpo]
lr = 3.5
limit = "none"
"""


def test_precedence_is_default_top_level_program_phase_flag(tmp_path):
    def toml(*argv: str) -> Settings:
        return load(*argv, toml=TOML, tmp_path=tmp_path)

    assert (toml().lr, toml().top_k, toml().limit) == (2.0, 6, 9)  # the phase's default is kd
    dgpo = toml("--phase", "dgpo")
    assert (dgpo.lr, dgpo.top_k, dgpo.limit, dgpo.phase) == (3.5, 5, None, "dgpo")
    assert toml("--lr", "8", "--phase", "dgpo").lr == 8.0
    assert type(toml().lr) is float


def test_the_preset_may_name_the_phase(tmp_path):
    assert load(toml='phase = "dgpo"\n[dgpo]\nlr = 5\n', tmp_path=tmp_path).lr == 5.0
    assert (
        load("--phase", "kd", toml='phase = "dgpo"\n[dgpo]\nlr = 5\n', tmp_path=tmp_path).lr == 1e-4
    )


def test_a_later_preset_wins_over_an_earlier_one_and_its_tables(tmp_path):
    (tmp_path / "models.toml").write_text(
        'phase = "kd"\nlr = 1.0\ntop_k = 7\n[dgpo]\nlr = 2.0\nlimit = 5\n'
    )
    (tmp_path / "row.toml").write_text('phase = "dgpo"\nlr = 3.0\n')
    presets = ["--config", str(tmp_path / "models.toml"), str(tmp_path / "row.toml")]
    settings = load(*presets)
    assert settings.phase == "dgpo"  # the last one's, and with it the table of the first
    assert (settings.lr, settings.limit, settings.top_k) == (3.0, 5, 7)
    assert load("--phase", "kd", *presets).limit is None
    assert load("--lr", "4.0", *presets).lr == 4.0


def test_a_mistake_in_any_preset_is_reported_with_its_file(capsys, tmp_path):
    (tmp_path / "good.toml").write_text("lr = 1.0\n")
    (tmp_path / "bad.toml").write_text("lrr = 1.0\n")
    for order in (("good", "bad"), ("bad", "good")):
        message = refused(capsys, "--config", *(str(tmp_path / f"{name}.toml") for name in order))
        assert "bad.toml" in message and "lrr" in message
    assert "absent.toml" in refused(
        capsys, "--config", str(tmp_path / "good.toml"), str(tmp_path / "absent.toml")
    )


def test_the_default_preset_is_read_unless_another_or_none_is_named(tmp_path):
    default, other = tmp_path / "default.toml", tmp_path / "other.toml"
    default.write_text("top_k = 11")
    other.write_text("lr = 7")
    assert load(default_config=default).top_k == 11
    assert load("--config", str(other), default_config=default) == Settings(lr=7.0)
    assert load("--config", "none", default_config=default) == Settings()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("--lrr", "3"), ("--lrr", "did you mean --lr?")),
        (("--topk", "3"), ("--topk", "did you mean --top-k?")),
        (("--question", "x"), ("did you mean --questions?",)),  # no abbreviations
        (("--top-k", "1e3"), ("--top-k", "'1e3'", "expected int")),
        (("--top-k", "2.0"), ("'2.0'", "expected int")),
        (("--lr", "fast"), ("--lr", "'fast'", "expected float")),
        (("--lr", "nan"), ("expected float",)),
        (("--resume", "false"), ("'false'",)),  # must not switch resume on
        (("--phase", "dpgo"), ("phase", "'dpgo'", "did you mean dgpo?")),
        (("--limit", "few"), ("--limit", "expected int")),
        (("--config", "absent.toml"), ("absent.toml", "expected a TOML file")),
    ],
)
def test_a_mistaken_flag_is_refused(capsys, argv, parts):
    message = refused(capsys, *argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("lrr = 3", ("preset.toml", "lrr", "did you mean lr?")),
        ("[kd]\ntopk = 3", ("[kd]", "topk", "did you mean top_k?")),
        ("[dpgo]\nlr = 3", ("[dpgo]", "did you mean dgpo?")),
        ("top_k = 2.0", ("top_k", "2.0", "expected int")),
        ("top_k = true", ("top_k", "True", "expected int")),  # bool is an int in Python
        ("lr = true", ("lr", "True", "expected float")),
        ('lr = "1e-4"', ("lr", "'1e-4'", "expected float")),
        ("resume = 1", ("resume", "expected bool")),
        ('resume = "false"', ("resume", "'false'", "expected bool")),
        ('questions = "x"', ("questions", "'x'", "expected tuple")),  # not one a letter
        ("questions = [1]", ("questions", "1", "expected str")),
        ("phase = 3", ("phase", "3", "expected str")),
        ("lr = = 3", ("preset.toml", "not TOML")),
    ],
)
def test_a_mistaken_preset_is_refused(capsys, tmp_path, toml, parts):
    message = refused(capsys, toml=toml, tmp_path=tmp_path)
    assert all(part in message for part in parts), message


def test_another_programs_preset_lends_only_the_named_keys(capsys, tmp_path):
    toml = "top_k = 4\nlr = 9\nsomething = 1\n[train]\nlimit = 2\n"
    got = load(toml=toml, tmp_path=tmp_path, shared=("top_k",))
    assert (got.top_k, got.lr, got.limit) == (4, 1e-4, 2)
    refused(capsys, toml=toml + "limti = 3\n", tmp_path=tmp_path, shared=("top_k",))
    folder = (
        tmp_path / "a [b]"
    )  # neither a bracket nor a detour in the path changes what is passed over
    folder.mkdir()
    (folder / "preset.toml").write_text(toml)
    assert load("--config", f"{folder}/./preset.toml", shared=("top_k",)) == got


def test_tables_of_other_programs_and_their_phases_are_passed_over(tmp_path, capsys):
    toml = "top_k = 4\n[bard]\nbudgets = [9]\n[bard-rl]\nsteps = 3\n[qagent]\nstage = 2\n"
    assert load(toml=toml, tmp_path=tmp_path) == Settings(top_k=4)
    message = refused(capsys, toml="[brad]\nbudgets = [9]\n", tmp_path=tmp_path)
    assert "unknown table [brad]" in message


def test_the_phase_is_found_before_it_is_known_whose_it_is(tmp_path):
    default, other = tmp_path / "default.toml", tmp_path / "other.toml"
    default.write_text('phase = "kd"')
    other.write_text('phase = "bard-rl"\n[bard-rl]\nsteps = 3\n')
    assert cli.find_phase([], default) == "kd"
    assert cli.find_phase(["--phase", "qagent", "--stage", "2"], default) == "qagent"
    assert cli.find_phase(["--config", str(other), "--lr", "3"], default) == "bard-rl"
    assert cli.find_phase(["--config", str(tmp_path / "absent.toml")], default) is None
    assert cli.find_phase(["--config", "none"], default) is None


def test_what_a_flag_names_in_a_file_is_loaded_and_anything_else_refused(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("def reward(episodes):\n    return [1.0]\n")
    assert named.load_named(f"{path}:reward", "--reward")([]) == [1.0]
    monkeypatch.chdir(tmp_path)
    assert named.load_named("mine.py:reward", "--reward")([]) == [1.0]
    import bard

    assert named.load_named("bard.py:train", "--reward") is bard.train  # of the project, once
    (tmp_path / "qagent.py").write_text("answer = 42\n")  # the current folder comes first
    assert named.load_named("qagent.py:answer", "--reward", int) == 42
    with pytest.raises(ValueError, match="--reward mine.py:reward: got .*, expected a int"):
        named.load_named("mine.py:reward", "--reward", int)
    for wrong in (
        "mine.py:other",
        "absent.py:reward",
        "mine.py",
        "mine:reward",
        "",
        ":",
        "mine.py:",
    ):
        with pytest.raises(ValueError, match=f"--reward.*{wrong.split(':')[0]}.*expected"):
            named.load_named(wrong, "--reward")


def test_post_init_of_the_dataclass_reports_like_any_mistake(capsys):
    @dataclass
    class Positive:
        steps: int = setting(1, "steps")

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise ValueError(f"steps: got {self.steps}, expected at least 1")

    with pytest.raises(SystemExit):
        cli.load(Positive, ["--steps", "0"], prog="x.py", description="")
    assert "steps: got 0" in capsys.readouterr().err


def test_help_names_every_setting_with_type_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in (
        "--lr",
        "--lr FLOAT", "100 % of it [0.0001]",
        "--no-shuffle",
        "kd|dgpo",
        "passages per search",
    ):
        assert part in text


@dataclass
class Loop:
    """Settings of two phases; a section, and words by which phases say what they read."""

    phase: str = setting("kd", "what to run", choices={"kd": "distil", "ppo": "", "none": ""})
    corpus: str = setting("", "passages", reads="FILE")
    lr: float = setting(0.1, "rate", above=0, section="distil: distillation")
    batch: int = setting(8, "episodes", at_least=1, at_most="total")
    total: int = setting(16, "of all", at_least=1, of="distil ppo")
    method: str = setting("", "how; empty: a", choices=("", "a", "b"), section="ppo: ppo")
    share: float = setting(0.5, "of b", at_most=1, when="method b")
    sizes: tuple[int, ...] = setting((), "several", at_least=2, section="more")
    limit: int | None = setting(None, "none: all", at_least=1)


def load_loop(*argv: str, finish=lambda loop: replace(loop, method=loop.method or "a")) -> Loop:
    return cli.load(Loop, list(argv), prog="x.py", description="", finish=finish)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--lr 0", ("--lr: got 0.0, expected above 0",)),
        ("--lr inf", ("--lr", "inf")),
        ("--batch 0", ("--batch: got 0, expected at least 1",)),
        ("--batch 17", ("at most 16, see --total",)),
        ("--phase ppo --total -1", ("--total: got -1",)),
        ("--sizes 4 1", ("--sizes: got (4, 1), expected at least 2",)),
        ("--limit 0", ("--limit: got 0, expected at least 1",)),
        ("--phase ppo --lr 1", ("--lr: got it for phase ppo", "expected it for kd")),
        ("--method a", ("--method: got it for phase kd", "expected it for ppo")),
        ("--phase none --total 3", ("--total", "kd, ppo")),
        ("--phase ppo --share 0.4", ("--share: got it with --method a",)),
        ("--phase ppo --method b --share 2", ("--share", "at most 1")),
    ],
)
def test_a_value_or_a_flag_that_cannot_work_is_refused(capsys, argv, parts):
    with pytest.raises(SystemExit) as caught:
        load_loop(*argv.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in message for part in parts), message


def test_a_flag_that_is_given_twice_is_said_and_the_last_one_counts(capsys):
    assert load_loop("--lr", "1", "--batch", "4", "--lr=2").lr == 2
    assert capsys.readouterr().err == "x.py: --lr: got it 2 times; the last one counts\n"


def test_what_a_phase_does_not_read_is_not_looked_at():
    assert load_loop("--phase", "ppo", "--method", "b", "--share", "0.4").share == 0.4
    assert load_loop("--total", "16", "--batch", "16").batch == 16
    assert load_loop("--phase", "none").phase == "none"
    assert load_loop("--phase", "ppo", "--total", "1").batch == 8  # above --total, and not read
    assert config.reads(Loop, "lr", "kd") and not config.reads(Loop, "lr", "ppo")


def test_a_key_that_is_not_read_is_passed_over_at_the_top_and_refused_in_the_phase_s_table(
    tmp_path, capsys
):
    path = tmp_path / "p.toml"
    path.write_text("lr = 3\nbatch = 99\n")
    assert load_loop("--phase", "ppo", "--config", str(path)).lr == 3
    for text in ("[ppo]\nlr = 3\n", "batch = 99\n"):
        path.write_text(text)
        phase = "ppo" if "ppo" in text else "kd"
        with pytest.raises(SystemExit):
            load_loop("--phase", phase, "--config", str(path))
        assert "p.toml" in capsys.readouterr().err


def test_a_misspelt_fact_about_a_setting_is_a_bug_of_ours():
    with pytest.raises(AssertionError):
        setting(1, "help", atleast=1)


def test_several_processes_say_the_same_once(tmp_path, monkeypatch, capsys):
    for rank in range(3):
        folder = tmp_path / str(rank)
        folder.mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        with pytest.raises(SystemExit):
            cli.leave("x.py", "the same" if rank < 2 else "another", 1)
        assert "x.py: " in json.loads((folder / "error.json").read_text())["message"]["message"]
    assert capsys.readouterr().err == "x.py: the same\nx.py: another\n"


def test_saved_settings_can_be_read_back(tmp_path):
    config.save(load("--lr", "3"), tmp_path / "run" / "run.json")
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["settings"]["lr"] == 3.0 and saved["settings"]["questions"] == ["a.jsonl"]
    assert saved["versions"]["torch"] and saved["versions"]["python"] and "commit" in saved


def test_tables_that_belong_to_no_program_that_trains_are_refused(tmp_path, capsys):
    """[episode] for [episodes] must not run with the defaults because there is an episode.py."""
    for table in ("episode", "distil", "data", "bard_rl"):
        (tmp_path / "p.toml").write_text(f"[{table}]\nlr = 1.0\n")
        with pytest.raises(SystemExit):
            load("--config", str(tmp_path / "p.toml"))
        assert f"unknown table [{table}]" in capsys.readouterr().err
    (tmp_path / "p.toml").write_text("[bard-rl]\nlr = 1.0\n")
    load("--config", str(tmp_path / "p.toml"))


def test_a_phase_that_is_no_text_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "p.toml").write_text("phase = 3\n")
    assert cli.find_phase(["--config", str(tmp_path / "p.toml")], "absent.toml") is None
    assert cli.find_phase(["--phase"], "absent.toml") is None
    assert capsys.readouterr().err == ""  # the program's own parser says what is wrong


def test_a_named_file_may_define_dataclasses(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / "mine.py").write_text(text + "@dataclass\nclass A:\n    x: int = 1\n\nA1 = A()\n")
    assert named.load_named(f"{tmp_path}/mine.py:A1", "--reward").x == 1
    with pytest.raises(ValueError, match="expected a Callable"):
        named.load_scorer(f"{tmp_path}/mine.py:A1", "--reward")


def test_a_flag_that_is_given_twice_is_said_and_its_last_value_counts(capsys):
    assert load_loop("--lr", "1", "--lr", "2").lr == 2
    assert capsys.readouterr().err == "x.py: --lr: got it 2 times; the last one counts\n"
