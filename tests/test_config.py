"""Settings: precedence, types, and mistakes that must not run as the default.

Run: python -m pytest tests/test_config.py
"""

import json
from dataclasses import dataclass

import pytest

from infra import config
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
    return config.load(Settings, list(argv), prog="train.py", description="Trains.", **options)


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
    assert config.find_phase([], default) == "kd"
    assert config.find_phase(["--phase", "qagent", "--stage", "2"], default) == "qagent"
    assert config.find_phase(["--config", str(other), "--lr", "3"], default) == "bard-rl"
    assert config.find_phase(["--config", str(tmp_path / "absent.toml")], default) is None
    assert config.find_phase(["--config", "none"], default) is None


def test_what_a_flag_names_in_a_file_is_loaded_and_anything_else_refused(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text("def reward(episodes):\n    return [1.0]\n")
    assert config.load_named(f"{path}:reward", "--reward")([]) == [1.0]
    monkeypatch.chdir(tmp_path)
    assert config.load_named("mine.py:reward", "--reward")([]) == [1.0]
    import bard

    assert config.load_named("bard.py:train", "--reward") is bard.train  # of the project, once
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
            config.load_named(wrong, "--reward")


def test_post_init_of_the_dataclass_reports_like_any_mistake(capsys):
    @dataclass
    class Positive:
        steps: int = setting(1, "steps")

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise ValueError(f"steps: got {self.steps}, expected at least 1")

    with pytest.raises(SystemExit):
        config.load(Positive, ["--steps", "0"], prog="x.py", description="")
    assert "steps: got 0" in capsys.readouterr().err


def test_help_names_every_setting_with_type_and_default(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for part in (
        "--lr",
        "100 % of it (float; default 0.0001)",
        "--no-shuffle",
        "kd|dgpo",
        "passages per search",
    ):
        assert part in text


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
    assert config.find_phase(["--config", str(tmp_path / "p.toml")], "absent.toml") is None
    assert config.find_phase(["--phase"], "absent.toml") is None
    assert capsys.readouterr().err == ""  # the program's own parser says what is wrong


def test_a_named_file_may_define_dataclasses(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / "mine.py").write_text(text + "@dataclass\nclass A:\n    x: int = 1\n\nA1 = A()\n")
    assert config.load_named(f"{tmp_path}/mine.py:A1", "--reward").x == 1
    with pytest.raises(ValueError, match="expected a Callable"):
        config.load_scorer(f"{tmp_path}/mine.py:A1", "--reward")
