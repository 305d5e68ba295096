"""The two loops on a miniature world made here: random models, twenty passages, a few questions.

Run: python -m pytest tests/test_train.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

import config
import dgpo
import distil
import play
import reinforce
import train
from checkpoint import states
from episode import Episode, Packed, collate, load_episodes, micro_batches, pack
from model import Critic, Tokenizer, load_decoder, new_decoder, new_encoder, save_decoder, save_encoder
from rollout import Policy
from settings import DISTIL, REINFORCE, SKIPPING, TrainSettings

GRADIENT_TOLERANCE = 1e-5  # fp32 sums in another order
FIRST_LOG_RATIO = 1e-5  # fp32, two layers
METRIC_TOLERANCE = 1e-4  # the same after a few Adam steps, which amplify small gradients
ROOT = Path(__file__).resolve().parent.parent


def decoder_config(width: int, entries: int) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": entries,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
    }


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """A folder with student, teacher, encoder, corpus, questions and episodes."""
    folder = tmp_path_factory.mktemp("mini")
    raw = RawTokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    (folder / "tokenizer").mkdir()
    raw.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": "<|im_end|>",
                "pad_token": "<|im_end|>",  # pad = eos: masks must not come from ids
                "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>",
            }
        )
    )
    tokenizer = Tokenizer.load(folder / "tokenizer")
    for name, width, seed in (("student", 16, 0), ("teacher", 32, 1)):
        decoder = new_decoder(
            decoder_config(width, tokenizer.size + seed), seed
        )  # heads of different padded size
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(3.0)
        save_decoder(decoder, tokenizer, folder / name)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz0123456789",
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    pieces = RawTokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pieces.save(str(folder / "pieces.json"))
    save_encoder(
        new_encoder(
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "vocab_size": len(words),
                "max_position_embeddings": 64,
                "type_vocab_size": 2,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-12,
            },
            folder / "pieces.json",
            0,
        ),
        folder / "encoder",
    )
    lines = [{"id": str(i), "contents": f'"Title {i}"\nfact number {i}'} for i in range(20)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    questions = [
        {"id": f"q{i}", "question": f"which number has fact {i}", "golden_answers": [str(i)]}
        for i in range(24)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)) + "\n")
    episodes = [
        q
        | {
            "segments": [
                {"author": "agent", "text": f"<search>{'f' * (i % 5)}act</search>"},
                {"author": "environment", "text": "\n\n<information>x</information>\n\n"},
                {"author": "agent", "text": f"<answer>{i}</answer>"},
            ]
        }
        for i, q in enumerate(questions)
    ]
    (folder / "episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)) + "\n")
    (folder / "mini.toml").write_text(
        "\n".join(
            [
                f'student = "{folder}/student"',
                f'teacher = "{folder}/teacher"',
                f'encoder = "{folder}/encoder"',
                f'corpus = "{folder}/corpus.jsonl"',
                f'questions = "{folder}/questions.jsonl"',
                f'episodes = "{folder}/episodes.jsonl"',
                'prompt = "short"',
                "max_new_tokens = 8",
                "max_context_tokens = 200",
                "max_turns = 2",
                "top_k = 2",
                "max_obs_tokens = 60",
                "batch_size = 8",
                "epochs = 1",
                "prompts_per_step = 8",
                "minibatch_size = 4",
                "steps = 4",
                "eval_every = 2",
                "val_size = 2",
                "save_every = 1",
                "kd_lr = 1e-2",
                "actor_lr = 1e-3",
                "critic_lr = 1e-3",
                "actor_warmup_steps = 2",
                'device = "cpu"',
                "",
            ]
        )
    )
    return folder


def run(mini: Path, out: Path, *flags: str) -> list[dict]:
    train.main(["--config", str(mini / "mini.toml"), "--run-dir", str(out), *flags])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def policies(mini: Path) -> tuple[Policy, Policy]:
    return tuple(
        Policy(load_decoder(mini / name), Tokenizer.load(mini / name)) for name in ("student", "teacher")
    )


@pytest.mark.parametrize("phase", [*DISTIL, *REINFORCE])
def test_every_phase_runs_and_leaves_a_loadable_model_metrics_times_and_settings(mini, tmp_path, phase):
    budgets = ["--budgets", "4", "9", "--group-size", "2"] if phase.startswith("bard") else []
    if phase == "bard-sft":
        with pytest.raises(ValueError, match="got episodes without a budget"):
            run(mini, tmp_path / "run", "--phase", phase, *budgets)
        told = [json.loads(line) | {"budget": 4} for line in (mini / "episodes.jsonl").read_text().splitlines()]
        (tmp_path / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        budgets += ["--episodes", str(tmp_path / "told.jsonl"), "--overwrite"]
    tags = ["--protocol", "qagent"] if phase == "qagent" else []
    rows = run(mini, tmp_path / "run", "--phase", phase, *budgets, *tags)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 3
    assert all(isinstance(value, float | int) and value == value for row in rows for value in row.values())
    assert "eval/score" in rows[1] and ("eval/adherence" in rows[1]) == bool(budgets)
    assert ("rollout/equal_groups" in rows[0]) == (phase in SKIPPING)
    assert ("eval/reward" in rows[1]) == (phase in SKIPPING)  # what the best weights are chosen by
    assert not any("second" in key for key in rows[0])
    assert load_decoder(tmp_path / "run").config.hidden_size == 16
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["phase"] == phase
    perf = [json.loads(line) for line in (tmp_path / "run" / "perf.jsonl").read_text().splitlines()]
    assert len(perf) == len(rows) and all(
        row["passes"] >= 1 or phase in SKIPPING for row in perf)
    if phase in REINFORCE:
        assert "  [" in (tmp_path / "run" / "samples" / "step_000002.txt").read_text()


@pytest.mark.parametrize("flags", [
    ["--stage", "1"], ["--stage", "2", "--hit-in", "trajectory", "--answer-match", "within"],
    ["--stage", "2", "--teacher-dtype", "bfloat16", "--kl-in", "loss", "--mean-over", "episode"],
])  # fmt: skip
def test_qagent_learns_in_both_stages_with_a_generator_beside_it(mini, tmp_path, flags):
    rows = run(mini, tmp_path / "run", "--phase", "qagent", "--protocol", "qagent", "--group-size", "4", "--generator",
               str(mini / "teacher"), "--generator-tokens", "6", *flags)
    assert len(rows) == 4 and all(value == value for row in rows for value in row.values())
    assert {"rollout/reward", "rollout/format", "rollout/queries", "rollout/hit"} <= set(rows[0])
    assert "eval/reward" in rows[1]  # what the best weights are chosen by
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_qagent_can_be_guided_by_the_teacher_on_wrong_episodes_as_dgpo_is(mini, tmp_path):
    """The student differs from its guide at once, and groups that are all wrong still count."""
    flags = ["--phase", "qagent", "--protocol", "qagent", "--group-size", "4", "--beta", "0.5", "--kl-in", "loss"]
    own = run(mini, tmp_path / "own", *flags)
    guided = run(mini, tmp_path / "guided", *flags, "--kl-where", "wrong")
    assert own[0]["rollout/equal_groups"] == guided[0]["rollout/equal_groups"] == 1.0  # none is ever right
    assert abs(own[0]["rollout/kl_student_guide"]) < 1e-4 < guided[0]["rollout/kl_student_guide"]
    assert "loss/actor_grad_norm" not in own[0] and guided[0]["loss/actor_grad_norm"] > 0


def test_the_mean_over_episodes_weighs_a_long_one_like_a_short_one():
    mask = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4])
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0])  # means 3 and 10; the third row has nothing to say
    weights = reinforce.episode_weights(mask, 5.0, 2.0)
    assert (weights * values).sum() / 5 == pytest.approx(6.5)
    halves = [reinforce.episode_weights(mask[rows], 5.0, 2.0) for rows in ([0], [1, 2])]  # of two passes
    assert torch.equal(torch.cat(halves), weights)


def test_distillation_lowers_the_loss(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "6")
    assert rows[-1]["loss/kd"] < 0.8 * rows[0]["loss/kd"]


def test_bard_rl_learns_from_its_own_reward_with_one_budget_a_group(mini, tmp_path, monkeypatch):
    """Rewards 0 and 1 in turn, then equal ones: what they are worth, who shares a budget, what is left out."""
    seen, masks = [], []

    def reward(episode, tokenizer, settings):
        seen.append(episode.question)
        return float(len(seen) % 2) if len(seen) <= 8 else 1.0

    real = reinforce.skip_equal_groups
    monkeypatch.setattr(train.bard, "reward", reward)
    monkeypatch.setattr(reinforce, "skip_equal_groups",
                        lambda *given: masks.append(real(*given).response_mask) or real(*given))  # fmt: skip
    rows = run(mini, tmp_path / "run", "--phase", "bard-rl", "--budgets", *map(str, range(3, 60)), "--group-size", "4",
               "--steps", "2", "--kl-where", "none")
    for k in range(0, 16, 4):
        assert len({(q.id, q.budget) for q in seen[k : k + 4]}) == 1
    assert len({q.budget for q in seen}) > 1
    assert [row["rollout/reward"] for row in rows] == [0.5, 1.0] and rows[0]["rollout/score"] == 0.0
    assert [row["rollout/equal_groups"] for row in rows] == [0.0, 1.0]
    assert masks[0].any() and not masks[1].any()
    assert "loss/policy_loss" in rows[0] and "loss/policy_loss" not in rows[1]


def test_a_step_whose_groups_are_all_equal_moves_no_weight(mini, tmp_path):
    before = load_decoder(mini / "student").state_dict()
    run(mini, tmp_path / "run", "--phase", "bard-rl", "--budgets", "9", "--group-size", "4", "--weight-decay", "0.5")
    after = load_decoder(tmp_path / "run").state_dict()  # a random model answers nothing: every reward is 0
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("phase", ["kd", "dgpo", "bard-rl"])
def test_a_resumed_run_writes_the_same_metrics_as_an_uninterrupted_one(mini, tmp_path, phase):
    flags = ["--phase", phase, *(["--budgets", "4", "9", "--group-size", "4"] if phase == "bard-rl" else [])]
    whole = run(mini, tmp_path / "whole", *flags)
    run(mini, tmp_path / "part", *flags)
    for state in sorted((tmp_path / "part" / "state").iterdir())[-1:]:
        for file in state.iterdir():
            file.unlink()
        state.rmdir()  # as if the run had ended one step earlier; its last metrics lines are cut
    assert run(mini, tmp_path / "part", *flags, "--resume") == whole


def test_a_run_is_not_written_over_unless_told(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "sft")
    with pytest.raises(SystemExit, match="already holds a run"):
        run(mini, tmp_path / "run", "--phase", "sft")
    assert run(mini, tmp_path / "run", "--phase", "sft", "--overwrite") == rows


def test_resume_without_a_state_starts_the_run_and_says_so(mini, tmp_path, capsys):
    fresh = run(mini, tmp_path / "fresh", "--phase", "sft")
    assert run(mini, tmp_path / "run", "--phase", "sft", "--resume") == fresh
    assert "no state in" in capsys.readouterr().out


def test_the_kd_phase_asks_the_teacher_when_there_are_no_episodes(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Episode,
        "score",
        property(lambda self: float(self.question.golden_answers[0] in ("1", "7", "9"))),
    )
    path = tmp_path / "made.jsonl"
    run(
        mini,
        tmp_path / "run",
        "--phase",
        "kd",
        "--episodes",
        str(path),
        "--val-size",
        "0",
        "--eval-every",
        "0",
    )
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["golden_answers"][0] for row in kept} == {"1", "7", "9"}  # the correct ones alone
    assert not list(tmp_path.glob("*.part*"))


def test_a_teacher_without_a_correct_episode_is_an_error_that_says_so(mini, tmp_path):
    with pytest.raises(ValueError, match="0 correct episodes of 22"):
        run(mini, tmp_path / "run", "--phase", "kd", "--episodes", str(tmp_path / "made.jsonl"))


def test_a_teacher_with_other_token_ids_is_refused(mini, tmp_path):
    other = tmp_path / "other"
    save_decoder(load_decoder(mini / "teacher"), Tokenizer.load(mini / "teacher"), other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|start|>"))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another vocabulary"):
        run(mini, tmp_path / "run", "--phase", "kd", "--teacher", str(other))


def packed(episodes: list[Episode], tokenizer: Tokenizer) -> Packed:
    batch = collate(episodes, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id)
    return pack(batch, range(len(episodes)), batch.lengths())


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("with_teacher", [False, True])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_order(mini, with_teacher):
    student, teacher = policies(mini)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")

    def gradients(groups: list[list[Episode]]) -> tuple[float, torch.Tensor]:
        student.decoder.zero_grad()
        total = 0.0
        for group in groups:
            loss, _ = distil.distil_loss(
                student, teacher if with_teacher else None, packed(group, student.tokenizer)
            )
            (loss / 1000).backward()
            total += loss.item() / 1000
        return total, flat_gradient(student.decoder)

    whole = gradients([episodes])
    split = gradients([episodes[20:], episodes[:3], episodes[3:20]])
    assert split[0] == pytest.approx(whole[0], rel=GRADIENT_TOLERANCE)
    torch.testing.assert_close(split[1], whole[1], atol=GRADIENT_TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_padded_rows_and_plain_formulas(mini, checkpointing):
    """The path that training takes against the one a reader would write first: padding, full logits, Eq. 1."""
    student, teacher = policies(mini)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")
    batch = collate(episodes, pad_id=student.tokenizer.pad_id, end_of_turn=student.tokenizer.eos_id)
    mask, size = batch.response_mask, student.tokenizer.size
    assert (batch.ids.shape[1] - torch.tensor(batch.lengths())).max() > 0  # the rows are ragged
    logits, guide = (p.decoder(batch.ids)[:, :-1, :size][mask[:, 1:]] for p in (student, teacher))
    loss, kl = dgpo.kd_loss(logits, guide.detach(), batch.ids[mask], ce_weight=0.5, kl_weight=2.0)
    loss.sum().backward()
    expected = flat_gradient(student.decoder)
    student.decoder.zero_grad()
    student.decoder.checkpointing = checkpointing
    weights = {"ce_weight": 0.5, "kl_weight": 2.0}
    got, got_kl = distil.distil_loss(student, teacher, packed(episodes, student.tokenizer), **weights)
    got.backward()
    assert got.item() == pytest.approx(loss.sum().item(), rel=GRADIENT_TOLERANCE)
    assert got_kl.item() == pytest.approx(kl.sum().item(), rel=GRADIENT_TOLERANCE)
    difference = (flat_gradient(student.decoder) - expected).abs().max()
    assert difference <= GRADIENT_TOLERANCE * expected.abs().max()


def test_distillation_has_no_gradient_from_prompt_and_retrieved_tokens(mini):
    student, _ = policies(mini)
    [episode] = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")[:1]
    batch = collate([episode], pad_id=student.tokenizer.pad_id)
    loss, _ = distil.distil_loss(student, None, pack(batch, [0], batch.lengths()))
    logits = student.decoder(batch.ids)[0, :-1, : student.tokenizer.size].log_softmax(-1)
    expected = -logits.gather(-1, batch.ids[0, 1:, None]).squeeze(-1)[batch.response_mask[0, 1:]]
    assert len(expected) == episode.num_agent_tokens < len(episode.ids)
    torch.testing.assert_close(loss, expected.sum(), atol=GRADIENT_TOLERANCE, rtol=GRADIENT_TOLERANCE)


def test_token_scores_do_not_depend_on_micro_batches_and_unguided_rows_hold_nan(mini):
    student, teacher = policies(mini)
    critic = Critic.from_decoder(student.decoder)
    torch.nn.init.normal_(critic.value_head.weight)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")
    batch = collate(episodes, pad_id=student.tokenizer.pad_id)
    guided = [i % 3 == 0 for i in range(len(episodes))]
    runs = [
        reinforce.score_tokens(student, critic, teacher, batch, guided, TrainSettings(micro_batch_tokens=n))
        for n in (1, 300, 10**6)
    ]
    mask = batch.response_mask
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            torch.testing.assert_close(a[mask], b[mask], atol=GRADIENT_TOLERANCE, rtol=0, equal_nan=True)
    assert (
        runs[0][2][~torch.tensor(guided)].isnan().all()
        and not runs[0][2][torch.tensor(guided)][mask[torch.tensor(guided)]].isnan().any()
    )


def test_micro_batches_hold_every_row_once_within_the_limit():
    lengths = [5, 30, 7, 7, 100, 1, 12]
    groups = list(micro_batches(lengths, 40))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert groups == [[0, 1], [2, 3], [4], [5, 6]]
    assert all(sum(lengths[i] for i in g) <= 40 or len(g) == 1 for g in groups)


def test_ppo_is_guided_by_its_initial_policy_on_all_episodes_and_dgpo_by_the_teacher_on_wrong_ones(
    mini, tmp_path, monkeypatch
):
    seen = []
    real = dgpo.kl_rewards

    def spy(scores, old, guide, mask, *, beta, where):
        seen.append((where, (old - guide)[mask].abs().nanmean().item()))
        return real(scores, old, guide, mask, beta=beta, where=where)

    monkeypatch.setattr(reinforce, "kl_rewards", spy)
    run(mini, tmp_path / "ppo", "--phase", "ppo", "--steps", "1")
    run(mini, tmp_path / "dgpo", "--phase", "dgpo", "--steps", "1")
    run(mini, tmp_path / "none", "--phase", "ppo", "--steps", "1", "--kl-where", "none")
    assert [where for where, _ in seen] == ["all", "wrong", "none"]
    assert seen[0][1] < GRADIENT_TOLERANCE  # before the first update the initial policy is the policy
    assert seen[1][1] > 0.01


# ---- families ----

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "rope_theta": 5e5,
         "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 256}}  # fmt: skip
FAMILIES = {  # what the presets' pairs are like: (of both, rows of the heads beyond the tokenizer, role of padding)
    "qwen2.5-3b-0.5b": ({}, (271, 271), "<|im_start|>"),
    "qwen2.5-7b-0.5b": ({}, (271, 399), "<|im_start|>"),  # 151,936 and 152,064 rows for 151,665 entries
    "llama3-8b-1b": (LLAMA, (0, 0), None),
}


@pytest.mark.parametrize("pair", FAMILIES)
def test_pairs_of_the_papers_families_distil_and_reinforce(mini, tmp_path, pair):
    assert (ROOT / "configs" / f"{pair}.toml").exists()
    both, padding, pad_token = FAMILIES[pair]
    shutil.copytree(mini / "tokenizer", tmp_path / "tokenizer")
    settings = json.loads((mini / "tokenizer" / "tokenizer_config.json").read_text()) | {"pad_token": pad_token}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    assert (tokenizer.pad_id == tokenizer.eos_id) == (pad_token is None)
    for name, width, rows in zip(("student", "teacher"), (16, 32), padding, strict=True):
        large = {"tie_word_embeddings": False, "num_key_value_heads": 1} if name == "teacher" else {}
        config = decoder_config(width, tokenizer.size + rows) | both | large
        save_decoder(new_decoder(config, seed=0), tokenizer, tmp_path / name)
    models = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    kd = run(mini, tmp_path / "kd", "--phase", "kd", "--epochs", "3", *models)
    assert kd[-1]["loss/kd"] < kd[0]["loss/kd"] and kd[0]["loss/distance"] > 0
    models[1] = str(tmp_path / "kd")
    dgpo_rows = run(mini, tmp_path / "dgpo", "--phase", "dgpo", "--steps", "2", *models)
    assert all(row["loss/first_log_ratio"] <= FIRST_LOG_RATIO for row in dgpo_rows)
    trained = load_decoder(tmp_path / "dgpo")
    assert trained.config.public["model_type"] == both.get("model_type", "qwen2")
    # The end of turn is a target although, in Llama's tokenizers, it is what pads.
    episodes = load_episodes(mini / "episodes.jsonl", tokenizer, prompt="short")
    batch = collate(episodes, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id)
    ends = (batch.ids == tokenizer.eos_id) & batch.response_mask
    assert ends.sum(1).tolist() == [1] * len(episodes)
    assert batch.response_mask.sum(1).tolist() == [e.num_agent_tokens + 1 for e in episodes]


# ---- baselines ----


@pytest.fixture
def distances(monkeypatch):
    """What distil_loss was asked for, pass by pass."""
    seen, real = [], distil.distil_loss

    def spy(student, teacher, packed, **options):
        seen.append(options | {"grad": torch.is_grad_enabled(), "ids": packed.ids, "mask": packed.response_mask})
        return real(student, teacher, packed, **options)

    monkeypatch.setattr(distil, "distil_loss", spy)
    return seen


def test_each_phase_has_its_own_distance_and_the_cross_entropy_belongs_to_kd(mini, tmp_path, distances):
    expected = {"kd": ("forward", 1.0), "taid": ("taid", 0.0), "gkd": ("reverse", 0.0), "distillm": ("skew", 0.0)}
    for phase, (kind, ce_weight) in expected.items():
        distances.clear()
        run(mini, tmp_path / phase, "--phase", phase, "--steps", "2")
        assert {(d["kind"], d["ce_weight"]) for d in distances} == {(kind, ce_weight)}, phase
    distances.clear()
    run(mini, tmp_path / "other", "--phase", "gkd", "--steps", "1", "--distance", "jsd", "--mix", "0.5")
    assert {(d["kind"], d["mix"]) for d in distances} == {("jsd", 0.5)}
    with pytest.raises(ValueError, match="--distance jsd"):
        run(mini, tmp_path / "bad", "--phase", "taid", "--distance", "jsd")


def test_taid_moves_its_target_from_the_student_to_the_teacher(mini, tmp_path, distances):
    rows = run(mini, tmp_path / "run", "--phase", "taid", "--epochs", "4")
    assert [row["loss/taid_t"] for row in rows] == pytest.approx([0.4 + 0.6 * n / 12 for n in range(12)])
    assert [d["mix"] for d in distances] == [row["loss/taid_t"] for row in rows]


def test_taid_survives_a_loss_that_is_not_a_number(mini, tmp_path, monkeypatch):
    real, calls = distil.distil_loss, []

    def broken(*given, **options):
        calls.append(1)
        return tuple(x * (float("nan") if len(calls) == 3 else 1) for x in real(*given, **options))

    monkeypatch.setattr(distil, "distil_loss", broken)
    rows = run(mini, tmp_path / "run", "--phase", "taid", "--epochs", "4")
    assert rows[2]["loss/distance"] is None and rows[2]["loss/skipped"] == 1
    assert rows[-1]["loss/taid_t"] == pytest.approx(0.4 + 0.6 * 11 / 12)  # on the line again


def test_gkd_trains_on_what_the_student_writes_and_needs_no_file(mini, tmp_path, distances):
    rows = run(mini, tmp_path / "run", "--phase", "gkd", "--steps", "3", "--episodes", str(tmp_path / "absent"))
    assert len(rows) == 3 and all("rollout/score" in row for row in rows)
    played = sum(d["mask"].sum().item() for d in distances[:1])
    assert played / 8 == pytest.approx(rows[0]["rollout/agent_tokens"])  # sampled tokens, and no end of turn besides
    half = run(mini, tmp_path / "half", "--phase", "gkd", "--steps", "12", "--student-share", "0.5")
    assert 2 <= sum("rollout/score" in row for row in half) <= 10


def test_gkd_brings_the_student_closer_to_the_teacher_where_the_student_goes(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "gkd", "--steps", "12", "--batch-size", "16", "--eval-every", "0")
    assert sum(row["loss/distance"] for row in rows[-3:]) < 0.9 * sum(row["loss/distance"] for row in rows[:3])


def test_distillm_lets_the_student_write_when_the_held_out_loss_rises_and_replays_it(mini, tmp_path, monkeypatch):
    losses = iter([1.0, 1.0, 2.0, *[float(n) for n in range(3, 40)]])
    monkeypatch.setattr(distil, "mean_distance", lambda *_: next(losses))
    flags = ["--phase", "distillm", "--epochs", "6", "--buffer-size", "16", "--save-every", "1"]
    rows = run(mini, tmp_path / "run", *flags)
    shares = [row["loss/student_share"] for row in rows]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == 1.0
    written = sorted((tmp_path / "run" / "generated").glob("*.jsonl"))
    assert [int(path.name[5:11]) + 1 for path in written] == [row["step"] for row in rows if "rollout/score" in row]
    assert 2 <= len(written) < len(rows) - 4  # new ones, then old ones again


def test_distillm_resumes_with_its_buffer_and_its_share(mini, tmp_path):
    flags = ["--phase", "distillm", "--epochs", "5", "--buffer-size", "12", "--share-tolerance", "-9"]
    whole = run(mini, tmp_path / "run", *flags)  # every look raises the share
    assert any("rollout/score" in row for row in whole[:-1])
    shutil.rmtree(states(tmp_path / "run")[-1])
    last = sorted((tmp_path / "run" / "generated").glob("*.jsonl"))[-1]
    last.with_name("step_000099.0000.jsonl").write_text(last.read_text())  # of a step that is done again
    assert run(mini, tmp_path / "run", *flags, "--resume") == whole
    assert not last.with_name("step_000099.0000.jsonl").exists()


def test_distillm_needs_episodes_to_set_apart(mini, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join((mini / "episodes.jsonl").open().readlines()[:3]))
    with pytest.raises(ValueError, match="got 3 episodes, expected at least 10"):
        run(mini, tmp_path / "run", "--phase", "distillm", "--episodes", str(tmp_path / "few.jsonl"))


def test_grpo_plays_groups_of_a_question_and_has_no_critic(mini, tmp_path, monkeypatch):
    groups, real = [], play.generate

    def spy(policy, retriever, questions, *given, **options):
        groups.append(([q.id for q in questions], options["first_episode"]))
        return real(policy, retriever, questions, *given, **options)

    monkeypatch.setattr(play, "generate", spy)
    flags = ["--phase", "grpo", "--group-size", "3", "--eval-every", "0"]
    rows = run(mini, tmp_path / "run", *flags)
    for step, (ids, first) in enumerate(groups):
        assert len(ids) == 6 and ids[0] == ids[1] == ids[2] != ids[3] == ids[4] == ids[5] and first == 6 * step
    assert not any("value" in key or "critic" in key for row in rows for key in row if row.get(key))
    assert not [*(tmp_path / "run" / "state").glob("*/critic*")]
    assert run(mini, tmp_path / "dgpo", "--phase", "dgpo", "--advantage", "group", "--steps", "2")[1]["step"] == 2


def test_the_phase_switches_when_the_sampled_score_is_reached(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    rows = run(mini, tmp_path / "run", "--phase", "kd", "--until-score", "0.9", "--epochs", "20")
    assert len(rows) == 2  # the first validation
    again = run(mini, tmp_path / "run", "--phase", "kd", "--until-score", "0.9", "--epochs", "20", "--resume")
    assert again == rows  # done is done


def test_the_ratio_is_one_before_the_first_update_of_every_step(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "dgpo")
    assert all(row["loss/first_log_ratio"] <= FIRST_LOG_RATIO for row in rows)
    assert all(row["rollout/sampler_gap"] <= FIRST_LOG_RATIO for row in rows)  # the sampler agrees as well


def test_critic_only_steps_leave_the_actor_alone(mini, tmp_path):
    run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2", "--critic-only-steps", "2")
    before, after = load_decoder(mini / "student"), load_decoder(tmp_path / "run")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("phase", ["kd", "dgpo"])
def test_two_processes_compute_what_one_computes(mini, tmp_path, phase):
    flags = ["--phase", phase, "--steps", "2", "--epochs", "0.67", "--eval-every", "0"]
    one = run(mini, tmp_path / "one", *flags)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29581",
        str(ROOT / "train.py"),
        "--config",
        str(mini / "mini.toml"),
        "--run-dir",
        str(tmp_path / "two"),
        *flags,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"loss/first_log_ratio"}:
            assert b[key] == pytest.approx(a[key], rel=METRIC_TOLERANCE, abs=METRIC_TOLERANCE), key


def test_sft_without_episodes_says_where_they_come_from(mini, tmp_path):
    with pytest.raises(ValueError, match="absent, which is not there.*--phase episodes"):
        run(mini, tmp_path / "run", "--phase", "sft", "--episodes", str(tmp_path / "absent"))


def test_groups_that_cannot_be_are_refused_before_anything_is_played(mini, tmp_path):
    for size in ("1", "9"):
        with pytest.raises(ValueError, match=f"--group-size {size}"):
            run(mini, tmp_path / "run", "--phase", "grpo", "--group-size", size)


@pytest.mark.parametrize("pair", ["qwen2.5-3b-0.5b", "qwen2.5-7b-0.5b", "llama3-8b-1b"])
@pytest.mark.parametrize(("flags", "student"), [
    (["--phase", "kd"], None), (["--phase", "dgpo"], "runs/kd"), (["configs/uniform-kl.toml"], "runs/kd"),
    (["configs/ppo.toml"], None), (["configs/sft-ppo.toml"], "runs/seqkd"), (["configs/ppo-kd.toml"], "runs/ppo"),
])  # fmt: skip
def test_presets_of_the_papers_pairs_begin_where_they_say(pair, flags, student):
    pair = ROOT / "configs" / f"{pair}.toml"
    given = ["--config", str(ROOT / "configs" / "paper.toml"), str(pair), *(
        [str(ROOT / flags[0])] if flags[0].startswith("configs") else flags)]  # fmt: skip
    settings = config.load(TrainSettings, given, prog="train.py", description="")
    plain = re.search('^student = "(.*)"', pair.read_text(), re.MULTILINE)[1]
    assert settings.student == (student or plain) and settings.max_turns == 4 and settings.beta == 0.001


def test_a_mistyped_flag_names_its_nearest_match():
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--actor-lrr", "1"], capture_output=True, text=True
    )
    assert result.returncode == 2 and "actor-lr" in result.stderr
