"""train.py: every phase runs, resumes and leaves a model; presets, pairs of models, mistakes.

Run: python -m pytest tests/test_train.py
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import train
from batch import collate
from episode import Episode, load_episodes
from infra import checkpoint, cli
from infra.checkpoint import states
from infra.run import Stop
from model import Tokenizer, load_decoder, save_decoder
from settings import DISTIL, REINFORCE, TrainSettings
from tests.support.mini import read_rows
from tests.support.models import byte_tokenizer, decoder_config
from tests.support.runs import run
from world.pretrain import new_decoder

FIRST_LOG_RATIO = 1e-5  # fp32, two layers
ROOT = Path(__file__).resolve().parent.parent


# ---- every phase ----


@pytest.mark.parametrize("phase", [*DISTIL, *REINFORCE])
def test_every_phase_runs_and_leaves_a_loadable_model_metrics_times_and_settings(
    mini, tmp_path, phase
):
    rows = run(mini, tmp_path / "run", "--phase", phase)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3
    for name, value in (item for row in rows for item in row.items()):
        # PPO starts at its guide, and every score is 0: there is nothing to be explained.
        is_null = value is None and (phase, name) == ("ppo", "rollout/explained_variance")
        assert is_null or isinstance(value, float | int) and value == value
    assert "eval/score" in rows[1] and "eval/reward" not in rows[1]
    assert not any("second" in key for key in rows[0])  # times stand in perf.jsonl
    assert load_decoder(tmp_path / "run").config.hidden_size == 16
    saved = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert saved["phase"] == phase
    perf = read_rows(tmp_path / "run" / "perf.jsonl")
    assert len(perf) == len(rows) and all(row["passes"] >= 1 for row in perf)
    if phase in REINFORCE:
        assert "  [" in (tmp_path / "run" / "samples" / "step_000002.txt").read_text()


@pytest.mark.parametrize("phase", [*DISTIL, *REINFORCE])
def test_a_resumed_run_writes_the_same_metrics_as_an_uninterrupted_one(
    mini, tmp_path, phase, monkeypatch
):
    monkeypatch.setattr(checkpoint, "NUM_KEPT", 99)
    flags = ["--phase", phase, *(["--epochs", "1.34"] if phase in {*DISTIL} - {"gkd"} else [])]
    rows = run(mini, tmp_path / "run", *flags)
    for state in states(tmp_path / "run")[2:]:
        shutil.rmtree(state)  # as if it had ended after step 2; later lines of the log are cut
    assert run(mini, tmp_path / "run", *flags, "--resume") == rows and len(rows) == 4


@pytest.mark.parametrize("phase", ["sft", "kd", "dgpo"])
def test_the_last_layers_alone_are_trained_where_asked(mini, tmp_path, phase, capsys):
    run(mini, tmp_path / "run", "--phase", phase, "--train-layers", "1")
    before, after = (load_decoder(path) for path in (mini / "student", tmp_path / "run"))
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    changed = {name for (name, old), new in pairs if not old.equal(new)}
    trained = {name for name, _ in before.named_parameters()
               if name.startswith(("model.layers.1.", "model.norm."))}
    assert changed == trained and len(trained) > 8
    sizes = {name: old.numel() for name, old in before.named_parameters()}
    assert (f"trains the last 1 of 2 layers: {sum(map(sizes.get, trained)):,} of "
            f"{sum(sizes.values()):,} weights") in capsys.readouterr().out
    state = states(tmp_path / "run")[-1]
    for adam in state.glob("*_adam.safetensors"):  # a critic has a value head, too
        with safe_open(adam, "pt") as file:
            count = len({key.split("/")[0] for key in file.keys()})
        assert count == len(trained) + 2 * (adam.name == "critic_adam.safetensors"), adam
    with pytest.raises(ValueError, match="--train-layers 1, now 2"):
        run(mini, tmp_path / "run", "--phase", phase, "--train-layers", "2", "--resume")


def test_more_layers_than_a_student_has_are_refused(mini, tmp_path):
    with pytest.raises(ValueError, match="--train-layers: got 3, expected at most 2"):
        run(mini, tmp_path / "run", "--phase", "sft", "--train-layers", "3")


def test_a_run_is_not_written_over_unless_told(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "sft")
    with pytest.raises(Stop, match="already holds a run"):
        run(mini, tmp_path / "run", "--phase", "sft")
    assert run(mini, tmp_path / "run", "--phase", "sft", "--overwrite") == rows


def test_resume_without_a_state_starts_the_run_and_says_so(mini, tmp_path, capsys):
    fresh = run(mini, tmp_path / "fresh", "--phase", "sft")
    assert run(mini, tmp_path / "run", "--phase", "sft", "--resume") == fresh
    assert "no state in" in capsys.readouterr().out


def test_the_phase_ends_when_the_sampled_score_is_reached(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    flags = ["--phase", "kd", "--until-score", "0.9", "--epochs", "20"]
    rows = run(mini, tmp_path / "run", *flags)
    assert len(rows) == 2  # the first validation
    assert run(mini, tmp_path / "run", *flags, "--resume") == rows  # done is done


def test_validation_asks_questions_that_are_never_trained_on(mini, tmp_path, monkeypatch):
    import sampling

    asked, real = [], sampling.generate

    def spy(policy, retriever, questions, settings, *, seed, **options):
        asked.append((seed, [question.id for question in questions]))
        return real(policy, retriever, questions, settings, seed=seed, **options)

    monkeypatch.setattr(sampling, "generate", spy)
    run(mini, tmp_path / "run", "--phase", "ppo", "--steps", "6", "--eval-every", "3")
    trained = {name for seed, names in asked if seed == 0 for name in names}
    validated = [names for seed, names in asked if seed == 1]
    assert len(trained) == 22 and len(validated) == 2 and validated[0] == validated[1]
    assert len(validated[0]) == 2 and not trained & set(validated[0])


# ---- the teacher's episodes ----


def test_the_kd_phase_asks_the_teacher_when_there_are_no_episodes(mini, tmp_path, monkeypatch):
    right = ("1", "7", "9")
    is_right = property(lambda self: float(self.question.golden_answers[0] in right))
    monkeypatch.setattr(Episode, "score", is_right)
    path = tmp_path / "made.jsonl"
    flags = ["--phase", "kd", "--episodes", str(path), "--val-size", "0", "--eval-every", "0"]
    run(mini, tmp_path / "run", *flags)
    kept = {row["golden_answers"][0] for row in read_rows(path)}
    assert kept == set(right)  # the correct ones alone
    assert not list(tmp_path.glob("*.part*"))


def test_a_teacher_without_a_correct_episode_is_an_error_that_says_so(mini, tmp_path):
    flags = ["--phase", "kd", "--episodes", str(tmp_path / "made.jsonl")]
    with pytest.raises(ValueError, match="0 correct episodes of 22"):
        run(mini, tmp_path / "run", *flags)


def test_sft_without_episodes_says_where_they_come_from(mini, tmp_path):
    absent = ["--episodes", str(tmp_path / "absent")]
    with pytest.raises(OSError, match="absent, which is not there.*--phase episodes"):
        run(mini, tmp_path / "run", "--phase", "sft", *absent)


def test_a_teacher_with_other_token_ids_is_refused(mini, tmp_path):
    other = tmp_path / "other"
    save_decoder(load_decoder(mini / "teacher"), Tokenizer.load(mini / "teacher"), other)
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (other / name).exists():
            text = (other / name).read_text()
            (other / name).write_text(text.replace("<|im_start|>", "<|start|>"))
    with pytest.raises(ValueError, match="another vocabulary"):
        run(mini, tmp_path / "run", "--phase", "kd", "--teacher", str(other))


# ---- families ----

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
# What the presets' pairs are like: keys of both configurations, rows of the two heads beyond the
# tokenizer, and the token that pads.
FAMILIES = {
    "qwen2.5-3b-0.5b": ({}, (271, 271), "<|im_start|>"),
    "qwen2.5-7b-0.5b": ({}, (271, 399), "<|im_start|>"),  # 151,936 and 152,064 rows of 151,665
    "llama3-8b-1b": (LLAMA, (0, 0), None),
}


@pytest.mark.parametrize("pair", FAMILIES)
def test_pairs_of_the_papers_families_distil_and_reinforce(mini, tmp_path, pair):
    assert (ROOT / "configs" / f"{pair}.toml").exists()
    family, padding, pad_token = FAMILIES[pair]
    tokenizer = byte_tokenizer(tmp_path / "tokenizer", pad_token)
    assert (tokenizer.pad_id == tokenizer.eos_id) == (pad_token is None)
    student = decoder_config(16, tokenizer.size + padding[0], **family)
    large = {"tie_word_embeddings": False, "num_key_value_heads": 1}
    teacher = decoder_config(32, tokenizer.size + padding[1], **family, **large)
    for name, keys in (("student", student), ("teacher", teacher)):
        save_decoder(new_decoder(keys, seed=0), tokenizer, tmp_path / name)
    models = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    kd = run(mini, tmp_path / "kd", "--phase", "kd", "--epochs", "3", *models)
    assert kd[-1]["loss/kd"] < kd[0]["loss/kd"] and kd[0]["loss/distance"] > 0
    models[1] = str(tmp_path / "kd")
    rows = run(mini, tmp_path / "dgpo", "--phase", "dgpo", "--steps", "2", *models)
    assert all(row["loss/first_log_ratio"] <= FIRST_LOG_RATIO for row in rows)
    trained = load_decoder(tmp_path / "dgpo")
    assert trained.config.public["model_type"] == family.get("model_type", "qwen2")
    # The end of turn is a target although, in Llama's tokenizers, it is what pads.
    episodes = load_episodes(mini / "episodes.jsonl", tokenizer, prompt="short")
    batch = collate(episodes, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id)
    ends = (batch.ids == tokenizer.eos_id) & batch.response_mask
    assert ends.sum(1).tolist() == [1] * len(episodes)
    expected = [episode.num_agent_tokens + 1 for episode in episodes]
    assert batch.response_mask.sum(1).tolist() == expected


# ---- presets ----


@pytest.mark.parametrize("pair", FAMILIES)
@pytest.mark.parametrize(
    ("flags", "student"),
    [
        (["--phase", "kd"], None),
        (["--phase", "ppo"], None),
        (["--phase", "dgpo"], "runs/kd"),
        (["configs/uniform-kl.toml"], "runs/kd"),
        (["configs/sft-ppo.toml"], "runs/seqkd"),
        (["configs/ppo-kd.toml"], "runs/ppo"),
    ],
)
def test_presets_of_the_papers_pairs_begin_where_they_say(pair, flags, student):
    path = ROOT / "configs" / f"{pair}.toml"
    presets = [str(ROOT / "configs" / "paper.toml"), str(path)]
    if flags[0].startswith("configs"):
        presets, flags = [*presets, str(ROOT / flags[0])], []
    argv = ["--config", *presets, *flags]
    settings = cli.load(TrainSettings, argv, prog="train.py", description="")
    own = re.search('^student = "(.*)"', path.read_text(), re.MULTILINE)[1]
    assert settings.student == (student or own)
    assert settings.max_turns == 4 and settings.beta == 0.001


# ---- phases of other programs, and mistakes ----


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["--phase", "bard-rl", "--budgets", "9"], "bard"),
        (["--phase", "bard-data"], "bard"),
        (["--phase", "qagent", "--stage", "2"], "qagent"),
        (["--config", str(ROOT / "configs" / "qagent.toml")], "qagent"),
        (["--config", str(ROOT / "configs" / "world.toml"), "--phase", "qagent"], "qagent"),
    ],
)
def test_a_phase_of_another_system_is_handed_to_its_program_with_all_flags(
    monkeypatch, argv, program
):
    import bard
    import qagent

    received = []
    for module in (bard, qagent):
        monkeypatch.setattr(
            module, "train", lambda argv, name=module.__name__: received.append((name, argv))
        )
    train.main(argv)
    assert received == [(program, argv)]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--actor-lrr", "1"], ["actor-lr"]),
        (["--phase", "dpgo"], ["dpgo", "did you mean dgpo?"]),
        (["--phase", "bard-rll"], ["bard-rll", "bard-rl"]),
        (["--phase", "eval"], ["eval", "expected one of"]),
        (["--phase", "model"], ["model", "expected one of"]),
    ],
)
def test_a_mistyped_flag_or_phase_names_its_nearest_match(capsys, argv, parts):
    with pytest.raises(SystemExit) as caught:
        train.main(argv)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", ""], "phase kd: got --questions ''"),
        (["--corpus", ""], "expected all three"),
        (["--student", ""], "--student: got no checkpoint"),
        (["--teacher", ""], "--teacher: got no checkpoint"),
    ],
)
def test_what_a_phase_needs_is_asked_for_by_name(mini, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(mini, tmp_path / "run", "--phase", "kd", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("phase", "flag"), [("ppo", "prompts-per-step"), ("gkd", "batch-size")])
def test_a_step_that_needs_more_questions_than_there_are_is_refused_by_name(
    mini, tmp_path, phase, flag
):
    """It used to take those that there are, so that the step was shorter than the settings say."""
    with pytest.raises(ValueError, match=f"questions.jsonl: got 24 .*23 others.*--{flag}"):
        run(mini, tmp_path / "run", "--phase", phase, f"--{flag}", "23")


def test_weights_are_fp32_and_frozen_models_may_be_smaller(mini, tmp_path, monkeypatch):
    import session

    loaded, real = [], session.load_decoder

    def spy(path, **options):
        loaded.append((Path(path).name, options["dtype"]))
        return real(path, **options)

    monkeypatch.setattr(session, "load_decoder", spy)
    flags = ["--steps", "1", "--teacher-dtype", "bfloat16", "--eval-every", "0"]
    run(mini, tmp_path / "run", "--phase", "dgpo", *flags)
    assert sorted(loaded) == [("student", torch.float32), ("teacher", torch.bfloat16)]


def test_questions_that_ask_for_another_comparison_of_answers_are_refused(mini, tmp_path):
    row = {"question": "6 x 7", "golden_answers": ["42"], "answer_kind": "integer"}
    (tmp_path / "sums.jsonl").write_text((json.dumps(row) + "\n") * 20)
    with pytest.raises(ValueError, match="sums.jsonl: got answers of kind {'integer'}"):
        run(mini, tmp_path / "run", "--phase", "ppo", "--questions", str(tmp_path / "sums.jsonl"))


def test_a_reward_for_a_phase_that_pays_nothing_is_refused(mini, tmp_path, capsys):
    for phase in ("episodes", "sft", "kd", "gkd"):
        with pytest.raises(SystemExit):
            run(mini, tmp_path / "run", "--phase", phase, "--reward", "r.py:f")
        assert f"--reward: got it for phase {phase}" in capsys.readouterr().err
