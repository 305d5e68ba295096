"""The loop that reinforces: guides, rewards, advantages, updates, and the settings they receive.

Run: python -m pytest tests/test_reinforce.py
"""

import math
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import bard
import dgpo
import qagent
import reinforce
import sampling
import session
import train
from batch import Batch, collate
from episode import Episode, Segment, load_episodes
from infra import guards
from infra.collapse import signs_of_collapse
from infra.parallel import row_weights
from infra.run import Stop
from model import Critic, load_decoder
from reinforce import Models, Tokens, learning_rates, score_tokens
from settings import REINFORCE, TrainSettings, with_defaults
from tests.support.runs import Spy, Updates, policies, run

ROOT = Path(__file__).resolve().parent.parent
GRADIENT_TOLERANCE = 1e-5  # fp32 sums in another order
FIRST_LOG_RATIO = 1e-5  # fp32, two layers
WHITENED = 1e-4  # mean and deviation of whitened numbers, fp32
MINI = ["--eval-every", "0", "--save-every", "0"]


def right_every_other_time(monkeypatch) -> None:
    """Half of the questions count as answered, although random models answer nothing."""
    is_right = property(lambda self: float(int(self.question.golden_answers[0]) % 2))
    monkeypatch.setattr(Episode, "score", is_right)


# ---- scores of tokens ----


def test_token_scores_do_not_depend_on_micro_batches_and_unguided_rows_hold_nan(mini):
    student, teacher = policies(mini)
    critic = Critic.from_decoder(student.decoder)
    torch.nn.init.normal_(critic.value_head.weight)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")
    batch = collate(episodes, pad_id=student.tokenizer.pad_id)
    guided = torch.tensor([i % 3 == 0 for i in range(len(episodes))])
    models, mask = Models(student, critic, teacher), batch.response_mask
    first, *others = (
        score_tokens(models, batch, guided.tolist(), TrainSettings(micro_batch_tokens=n))[0]
        for n in (1, 300, 10**6)
    )
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(
                a[mask], b[mask], atol=GRADIENT_TOLERANCE, rtol=0, equal_nan=True
            )
    guide = first.guide_logprobs
    assert guide[~guided].isnan().all() and not guide[guided][mask[guided]].isnan().any()


def test_the_ratio_is_one_before_the_first_update_of_every_step(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "dgpo")
    assert all(row["loss/first_log_ratio"] <= FIRST_LOG_RATIO for row in rows)
    # The sampler agrees as well.
    assert all(row["rollout/sampler_gap"] <= FIRST_LOG_RATIO for row in rows)


def test_a_policy_that_is_not_the_one_that_acted_stops_the_run(mini, tmp_path, monkeypatch):
    real = reinforce.score_tokens

    def off(*arguments):
        tokens, guide_rows = real(*arguments)
        return tokens._replace(old_logprobs=tokens.old_logprobs + 0.01), guide_rows

    monkeypatch.setattr(reinforce, "score_tokens", off)
    with pytest.raises(Stop, match="log ratio 0.0.* before the first update of step 1, expected"):
        run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "1")


def test_the_first_log_ratio_is_the_largest_of_all_processes(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "max_over_processes", lambda gap: max(gap, 0.5))
    with pytest.raises(Stop, match="log ratio 0.5 before the first update of step 1, expected"):
        run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "1", *MINI)
    monkeypatch.setattr(guards, "max_over_processes", lambda gap: 2 * gap)
    rounding = torch.tensor([1e-5, -2e-5])  # which is logged
    got = guards.check_first_ratio(rounding, step=1, dtype=torch.float32)
    assert got == pytest.approx(4e-5)


TWO_PROCESSES = """
import torch.distributed as dist
from infra.parallel import end_processes, max_over_processes, start_processes
rank, _, _ = start_processes("cpu", 1.0)
assert max_over_processes([0.25, 3.5][rank]) == 3.5 == max_over_processes([3.5, 0.0][rank])
end_processes()
"""


def test_the_largest_number_of_two_processes_is_known_to_both():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES], env=env | {"RANK": rank}, cwd=ROOT)
        for rank in "01"
    ]
    assert [job.wait(timeout=120) for job in jobs] == [0, 0]


# ---- the temperature that sampled (L2) ----


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_l2_tokens_are_scored_at_the_temperature_that_sampled_them(mini, temperature):
    student, teacher = policies(mini)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")[:5]
    batch = collate(episodes, pad_id=student.tokenizer.pad_id)
    settings = TrainSettings(temperature=temperature)
    tokens, _ = score_tokens(Models(student, None, teacher), batch, [True] * 5, settings)
    mask, size = batch.response_mask, student.tokenizer.size
    for policy, got in ((student, tokens.old_logprobs), (teacher, tokens.guide_logprobs)):
        logits = policy.decoder(batch.ids)[:, :-1, :size] / temperature
        plain = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
        difference = got[:, 1:][mask[:, 1:]] - plain[mask[:, 1:]]
        assert difference.abs().max() < FIRST_LOG_RATIO


@pytest.mark.parametrize("temperature", ["0.5", "2"])
def test_l2_sampler_and_trainer_agree_at_any_temperature(mini, tmp_path, temperature, monkeypatch):
    spy = Spy(monkeypatch, dgpo, "policy_loss")
    flags = ["--phase", "dgpo", "--steps", "1", "--temperature", temperature, *MINI]
    [row] = run(mini, tmp_path / "run", *flags)
    assert row["rollout/sampler_gap"] <= FIRST_LOG_RATIO
    assert row["loss/first_log_ratio"] <= FIRST_LOG_RATIO
    (logprobs, old, *_), options, _ = spy.calls[0]
    torch.testing.assert_close(logprobs, old, atol=FIRST_LOG_RATIO, rtol=0)
    entropy = options["entropy"].mean()  # of 259 tokens: a hot policy is close to uniform
    assert (entropy > 0.95 * math.log(259)) == (temperature == "2")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"top_p": 0.9}, "--top-p 0.9"),
        ({"temperature": 0.0}, "--temperature 0.0"),
    ],
)
def test_l2_a_sampler_that_reinforcement_cannot_account_for_is_refused_by_every_door(changes, flag):
    for phase in REINFORCE:
        with pytest.raises(ValueError, match=flag):
            with_defaults(TrainSettings(phase=phase, **changes))
    with pytest.raises(ValueError, match=flag):
        bard.with_defaults(bard.BardSettings(phase="bard-rl", budgets=(16,), **changes))
    with pytest.raises(ValueError, match=flag):
        qagent.with_defaults(qagent.QAgentSettings(**changes))
    for phase in ("episodes", "gkd"):  # what only samples may do as it likes
        assert with_defaults(TrainSettings(phase=phase, **changes)).phase == phase
    data = bard.BardSettings(phase="bard-data", budgets=(16,), student="x", **changes)
    assert bard.with_defaults(data).advantage == ""


# ---- guides ----


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (["--phase", "ppo"], "all"),
        (["--phase", "dgpo"], "wrong"),
        (["--phase", "dgpo", "--kl-where", "all"], "all"),
        (["--phase", "ppo", "--kl-where", "none"], "none"),
    ],
)
def test_the_guide_scores_all_episodes_in_ppo_and_the_wrong_ones_in_dgpo(
    mini, tmp_path, monkeypatch, flags, where
):
    right_every_other_time(monkeypatch)
    spy = Spy(monkeypatch, dgpo, "kl_rewards")
    run(mini, tmp_path / "run", *flags, "--steps", "1", *MINI)
    [((scores, old, guide, mask), options, _)] = spy.calls
    assert options["where"] == where and 0 < scores.sum() < len(scores)
    guided = {"all": scores >= 0, "wrong": scores < 1, "none": scores < 0}[where]
    assert guide[~guided].isnan().all() and not guide[guided][mask[guided]].isnan().any()
    if where == "none":
        return
    distance = (old - guide)[mask].abs().nanmean()
    # Before the first update PPO's guide, the initial policy, is the policy itself.
    is_own = flags == ["--phase", "ppo"]
    assert distance < GRADIENT_TOLERANCE if is_own else distance > 0.01


def test_a_kl_in_the_loss_is_not_in_the_reward_as_well(mini, tmp_path, monkeypatch):
    rewards, penalty = Spy(monkeypatch, dgpo, "kl_rewards"), Spy(monkeypatch, dgpo, "policy_loss")
    flags = ["--phase", "dgpo", "--steps", "1", "--beta", "0.3", *MINI]
    run(mini, tmp_path / "reward", *flags)
    assert rewards.options("where") == {"wrong"} and rewards.options("beta") == {0.3}
    assert all(options["penalty"] is None for _, options, _ in penalty.calls)
    rewards.calls.clear(), penalty.calls.clear()
    kinds = Spy(monkeypatch, dgpo, "kl_penalty")
    for kl_in, kind in (("loss", "k3"), ("loss_k2", "k2")):  # L8: both are in the loss alone
        run(mini, tmp_path / kl_in, *flags, "--kl-in", kl_in)
        assert rewards.options("where") == {"none"} and kinds.options("kind") == {kind}
        [(_, _, paid)] = rewards.calls
        assert not paid.any()  # every episode is wrong, so all that could be paid is the KL
        assert all(options["penalty"].abs().max() > 0 for _, options, _ in penalty.calls)
        rewards.calls.clear(), penalty.calls.clear(), kinds.calls.clear()


def test_an_exact_kl_is_of_guided_episodes_and_in_no_reward(mini, tmp_path, monkeypatch):
    right_every_other_time(monkeypatch)
    rewards, loss = Spy(monkeypatch, dgpo, "kl_rewards"), Spy(monkeypatch, dgpo, "policy_loss")
    exact = Spy(monkeypatch, dgpo, "exact_kl")
    flags = ["--phase", "dgpo", "--kl-in", "exact", "--steps", "1", *MINI]
    [row] = run(mini, tmp_path / "run", *flags)
    [((scores, _, guide, mask), options, paid)] = rewards.calls
    assert options["where"] == "none" and paid.sum() == scores.sum()
    assert all(options["penalty"] is None for _, options, _ in loss.calls)
    kl = torch.cat([reported for _, _, (_, reported) in exact.calls])
    guided = mask & (scores < 1)[:, None]
    assert len(kl) == guided.sum() and (~guide.isnan() == guided)[mask].all()
    # A sum over the guided tokens, divided by the number of all.
    assert row["loss/guide_kl"] == pytest.approx(kl.sum().item() / mask.sum().item())
    assert row["loss/guide_kl"] > 0.01


def test_an_exact_kl_that_nobody_asks_for_is_zero_or_refused(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(Episode, "score", property(lambda episode: 1.0))  # no episode is wrong
    flags = ["--phase", "dgpo", "--kl-in", "exact", "--steps", "1", *MINI]
    [row] = run(mini, tmp_path / "run", *flags)
    assert row["loss/guide_kl"] == 0
    settings = TrainSettings(phase="dgpo", kl_in="exact", mean_over="episode")
    with pytest.raises(ValueError, match="--mean-over episode: --kl-in exact"):
        with_defaults(settings)


# ---- advantages ----


def test_gamma_lambda_and_whitening_reach_the_policys_loss(mini, tmp_path, monkeypatch):
    estimate, loss = Spy(monkeypatch, dgpo, "gae"), Spy(monkeypatch, dgpo, "policy_loss")
    right_every_other_time(monkeypatch)
    flags = ["--gamma", "0.9", "--gae-lambda", "0.8", "--beta", "0.2"]
    run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "1", *flags, *MINI)
    assert estimate.options("gamma") == {0.9} and estimate.options("gae_lambda") == {0.8}
    advantages = torch.cat([arguments[2] for arguments, _, _ in loss.calls])  # of all minibatches
    assert abs(advantages.mean()) < WHITENED and abs(advantages.std() - 1) < 1e-2
    [(arguments, _, (raw, _))] = estimate.calls
    mask = arguments[2]
    expected = dgpo.whiten(raw, mask)[mask]
    torch.testing.assert_close(
        advantages.sort().values, expected.sort().values, atol=WHITENED, rtol=0
    )


def test_grpo_plays_groups_of_a_question_and_has_no_critic(mini, tmp_path, monkeypatch):
    groups, real = [], sampling.generate

    def spy(policy, retriever, questions, *arguments, **options):
        groups.append(([q.id for q in questions], options["first_episode"]))
        return real(policy, retriever, questions, *arguments, **options)

    monkeypatch.setattr(sampling, "generate", spy)
    flags = ["--phase", "grpo", "--group-size", "3", "--eval-every", "0"]
    rows = run(mini, tmp_path / "run", *flags)
    for step, (ids, first) in enumerate(groups):
        assert len(ids) == 6 and first == 6 * step
        assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4] == ids[5]
    words = ("value", "critic", "explained")
    assert not [key for row in rows for key in row if any(word in key for word in words)]
    assert not [*(tmp_path / "run" / "state").glob("*/critic*")]
    run(mini, tmp_path / "dgpo", "--phase", "dgpo", "--advantage", "group", "--steps", "2")


def test_l10_an_epoch_asks_no_question_twice_and_its_tail_waits_for_another_order(
    mini, tmp_path, monkeypatch
):
    asked, real = [], sampling.generate

    def spy(policy, retriever, questions, *arguments, **options):
        asked.append([q.id for q in questions])
        return real(policy, retriever, questions, *arguments, **options)

    monkeypatch.setattr(sampling, "generate", spy)
    run(mini, tmp_path / "run", "--phase", "ppo", "--steps", "4", *MINI)
    assert [len(ids) for ids in asked] == [8] * 4  # of 22 questions: two whole steps an epoch
    epochs = [{*asked[0], *asked[1]}, {*asked[2], *asked[3]}]
    assert [len(epoch) for epoch in epochs] == [16, 16] and epochs[0] != epochs[1]


def test_groups_that_cannot_be_are_refused_before_anything_is_played(mini, tmp_path):
    for size in ("1", "9"):
        with pytest.raises(ValueError, match=f"--group-size {size}"):
            run(mini, tmp_path / "run", "--phase", "grpo", "--group-size", size)


@pytest.mark.parametrize(("flags", "is_said"), [
    ("", True), ("--kl-where all", True), ("--kl-where none", False), ("--kl-in loss", False),
    ("--kl-in exact", False), ("--beta 0", False), ("--advantage gae", False)])
def test_a_kl_reward_that_groups_would_make_large_is_said(mini, tmp_path, capsys, flags, is_said):
    groups = ["--advantage", "group", "--group-size", "2"] * ("gae" not in flags)
    run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "1", *MINI, *groups, *flags.split())
    assert ("rank a group of equal scores by its KL alone" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("drops", [True, False])
def test_a_task_that_leaves_equal_groups_out_is_not_said_to_rank_them(
        mini, tmp_path, monkeypatch, capsys, drops):
    monkeypatch.setattr(train, "Task", partial(session.Task, drop_equal_groups=drops))
    run(mini, tmp_path / "run", "--phase", "grpo", "--group-size", "2", "--steps", "1", *MINI)
    assert ("rank a group of equal scores" in capsys.readouterr().out) != drops


def test_groups_with_equal_rewards_are_dropped_but_for_the_episodes_that_are_kept():
    scores = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    assert reinforce.equal_groups(scores, 2).tolist() == [False, True, True]
    assert not reinforce.equal_groups(scores, 1).any()
    mask = torch.tensor([[True, False]] * 6)
    kept = torch.tensor([False] * 4 + [True, False])
    batch = reinforce.drop_equal_groups(Batch(mask.long(), mask), scores, 2, kept)
    assert batch.response_mask[:, 0].tolist() == [True, True, False, False, True, False]
    assert not batch.response_mask[:, 1].any()


# ---- updates ----


def test_each_network_has_its_own_rate_and_warm_up():
    settings = TrainSettings(
        actor_lr=2.0, critic_lr=3.0, actor_warmup_steps=4, critic_warmup_steps=2
    )
    rates = [learning_rates(settings, step, True) for step in range(5)]
    assert [r["critic"] for r in rates] == pytest.approx([1.5, 3, 3, 3, 3])
    assert [r["actor"] for r in rates] == pytest.approx([0.5, 1, 1.5, 2, 2])
    assert learning_rates(settings, 0, False) == {"actor": 0.5}  # GRPO


def test_the_actors_warm_up_begins_after_the_steps_of_the_critic_alone():
    settings = TrainSettings(
        actor_lr=2.0, actor_warmup_steps=4, critic_warmup_steps=0, critic_only_steps=3
    )
    rates = [learning_rates(settings, step, True) for step in range(6)]
    assert ["actor" in r for r in rates] == [False] * 3 + [True] * 3
    assert [r["actor"] for r in rates[3:]] == pytest.approx([0.5, 1.0, 1.5])
    assert learning_rates(settings, 0, False)["actor"] == 0.5  # nothing to wait for


def test_l6_the_default_warm_up_is_the_published_share_of_the_steps():
    def warm_ups(**changes):
        settings = with_defaults(TrainSettings(phase="dgpo", **changes))
        return settings.actor_warmup_steps, settings.critic_warmup_steps

    assert warm_ups() == (285, 15)  # of 1000
    assert warm_ups(steps=40) == (11, 1) and warm_ups(steps=1) == (0, 0)
    assert warm_ups(steps=40, actor_warmup_steps=285, critic_warmup_steps=0) == (285, 0)
    assert qagent.with_defaults(qagent.QAgentSettings(steps=200)).actor_warmup_steps == 57


def test_l6_a_warm_up_that_does_not_end_is_said_and_both_rates_are_logged(mini, tmp_path, capsys):
    flags = ["--phase", "dgpo", "--actor-warmup-steps", "3", "--critic-warmup-steps", "4", *MINI]
    flags += ["--critic-only-steps", "1"]
    rows = run(mini, tmp_path / "run", *flags, "--steps", "3")
    said = capsys.readouterr().out
    assert "--actor-warmup-steps 3: got more than the 2 steps" in said
    assert "--critic-warmup-steps 4: got more than the 3 steps" in said
    assert [row["loss/actor_lr"] for row in rows] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3])
    assert [row["loss/critic_lr"] for row in rows] == pytest.approx([1e-3 / 4, 2e-3 / 4, 3e-3 / 4])
    run(mini, tmp_path / "fits", *flags, "--steps", "4")
    assert "warmup" not in capsys.readouterr().out


def test_rates_decay_and_clip_reach_the_two_optimizers(mini, tmp_path, monkeypatch):
    updates = Updates(monkeypatch)
    flags = ["--actor-lr", "0.002", "--critic-lr", "0.0005", "--actor-warmup-steps", "4"]
    flags += ["--critic-warmup-steps", "0", "--weight-decay", "0.07", "--grad-clip", "0.9"]
    run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2", *flags, *MINI)
    assert set(updates.clips) == {0.9} and {decay for *_, decay in updates.steps} == {0.07}
    size = len(list(load_decoder(mini / "student").parameters()))
    of_actor = [lr for num, lr, _ in updates.steps if num == size]
    of_critic = [lr for num, lr, _ in updates.steps if num != size]
    assert of_actor == pytest.approx([0.0005] * 2 + [0.001] * 2)  # two mini-batches a step
    assert of_critic == pytest.approx([0.0005] * 4)


def test_clips_and_the_entropy_bonus_reach_the_losses(mini, tmp_path, monkeypatch):
    policy, value = Spy(monkeypatch, dgpo, "policy_loss"), Spy(monkeypatch, dgpo, "value_loss")
    flags = ["--clip-eps", "0.11", "--value-clip-eps", "0.22", "--entropy-weight", "0.033"]
    run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "1", *flags, *MINI)
    assert policy.options("clip_eps") == {0.11} and value.options("clip_eps") == {0.22}
    assert policy.options("entropy_weight") == {0.033}
    assert all(options["entropy"].min() > 0 for _, options, _ in policy.calls)


def test_a_step_is_cut_into_other_mini_batches_in_every_pass(mini, tmp_path, monkeypatch):
    spy = Spy(monkeypatch, reinforce, "shuffled")
    run(mini, tmp_path / "run", "--phase", "ppo", "--steps", "3", "--ppo-epochs", "2", *MINI)
    orders = [tuple(order) for _, _, order in spy.calls]
    assert len(orders) == 6 == len(set(orders))
    assert all(sorted(order) == list(range(8)) for order in orders)
    spy.calls.clear()
    other = ["--phase", "ppo", "--steps", "1", "--seed", "1", *MINI]
    run(mini, tmp_path / "other", *other)
    assert tuple(spy.calls[0][2]) not in orders


def test_critic_only_steps_leave_the_actor_alone_and_then_it_starts(mini, tmp_path):
    flags = ["--phase", "dgpo", "--critic-only-steps", "2", *MINI]
    rows = run(mini, tmp_path / "two", *flags, "--steps", "2")
    assert [*("loss/policy_loss" in row for row in rows)] == [False, False]
    before, after = load_decoder(mini / "student"), load_decoder(tmp_path / "two")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = run(mini, tmp_path / "three", *flags, "--steps", "3")
    assert "loss/policy_loss" in rows[2] and rows[2]["loss/actor_grad_norm"] > 0
    after = load_decoder(tmp_path / "three")
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert all(moved)


def test_the_mean_over_episodes_weighs_a_long_one_like_a_short_one():
    mask = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4])
    # Means 3 and 10; the third row has nothing to say.
    values = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0])
    weights = row_weights(mask, 5.0, 2.0)
    assert (weights * values).sum() / 5 == pytest.approx(6.5)
    halves = [row_weights(mask[rows], 5.0, 2.0) for rows in ([0], [1, 2])]
    assert torch.equal(torch.cat(halves), weights)


# ---- metrics ----


def test_explained_variance_is_the_share_of_the_returns_that_values_foresee():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 6.0, 50.0]])  # variance 14 / 3
    values = torch.tensor([[1.0, 1.0, 4.0, -9.0]])  # errors 0, 1, 2: variance 2 / 3
    zero = torch.zeros_like(returns)
    tokens = Tokens(zero, zero, values, advantages=zero, returns=returns)
    episode = Episode(None, [], "answered")
    episode.segments = [Segment("agent", [1, 2, 3], [0.0] * 3)]
    metrics = reinforce.token_metrics([episode], tokens, mask, True)
    assert metrics["rollout/explained_variance"] == pytest.approx(1 - (2 / 3) / (14 / 3))
    perfect = tokens._replace(old_values=returns)
    assert reinforce.token_metrics([episode], perfect, mask, True)[
        "rollout/explained_variance"
    ] == pytest.approx(1.0)


@pytest.mark.parametrize(("returned", "scale"), [(1.0, 1.0), (0.0, 1.0), (0.7, 30.0), (-3.0, 0.01)])
def test_l3_the_explained_variance_of_returns_that_differ_by_rounding_is_null(returned, scale):
    """Equal scores and no penalty: what varies is the rounding of advantage + value."""
    generator = torch.Generator().manual_seed(0)
    values = scale * torch.randn(4, 500, generator=generator)
    mask = torch.ones_like(values, dtype=torch.bool)
    rewards = torch.where(dgpo.last_token(mask), returned, 0.0)
    _, returns = dgpo.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    zero = torch.zeros_like(values)
    episode = Episode(None, [Segment("agent", [1] * 2000, [0.0] * 2000)], "answered")

    def explained(returns):
        tokens = Tokens(zero, zero, values, advantages=zero, returns=returns)
        return reinforce.token_metrics([episode], tokens, mask, True)["rollout/explained_variance"]

    assert math.isnan(explained(returns))
    size = max(abs(returned), scale)
    real = returns + 0.001 * size * torch.randn(values.shape, generator=generator)
    assert explained(real) < 1  # small differences that are real are there to be explained


def test_l3_null_is_no_broken_critic_to_the_guard_and_stands_in_the_log(
    mini, tmp_path, monkeypatch
):
    monkeypatch.setattr(Episode, "score", property(lambda self: 1.0))
    rows = run(mini, tmp_path / "run", "--phase", "dgpo", "--steps", "2", *MINI)
    assert [row["rollout/explained_variance"] for row in rows] == [None, None]
    fallen = [{"rollout/score": 0.8, "rollout/max_tokens": 0.0, "rollout/invalid": 0.0}] * 10
    fallen += [{**fallen[0], "rollout/score": 0.0, "rollout/explained_variance": None}] * 10
    signs = signs_of_collapse(fallen, 100)
    assert "the score fell" in signs and "critic" not in signs


def test_the_kl_to_the_guide_is_a_mean_over_the_tokens_of_guided_episodes():
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    guide = torch.tensor([[-1.5, -3.0], [math.nan, math.nan]])
    zero = torch.zeros_like(old)
    tokens = Tokens(old, guide, zero, zero, zero)
    episodes = [
        Episode(None, [Segment("agent", [1, 2], [-1.0, -2.5])], "answered"),
        Episode(None, [Segment("agent", [1], [-3.0])], "answered"),
    ]
    metrics = reinforce.token_metrics(episodes, tokens, mask, False)
    assert metrics["rollout/kl_student_guide"] == pytest.approx((0.5 + 1.0) / 2)
    assert metrics["rollout/sampler_gap"] == pytest.approx(0.5 / 3)
    assert "rollout/explained_variance" not in metrics


# ---- rewards of a user ----

REWARDS = """
import math

def by_length(episodes):
    return [-0.001 * episode.num_agent_tokens for episode in episodes]

def too_few(episodes):
    return [1.0]

def not_finite(episodes):
    return [math.nan for _ in episodes]

def nothing(episodes):
    pass

def texts(episodes):
    return ["good" for _ in episodes]

NUMBER = 3
"""


@pytest.fixture
def rewards_file(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path / "rewards.py"


def test_a_reward_from_a_file_pays_for_episodes_instead_of_exact_match(
    mini, tmp_path, monkeypatch, rewards_file
):
    spy = Spy(monkeypatch, dgpo, "kl_rewards")
    flags = ["--phase", "grpo", "--group-size", "4", "--reward", f"{rewards_file}:by_length"]
    rows = run(mini, tmp_path / "run", *flags)
    paid = [arguments[0] for arguments, _, _ in spy.calls]
    assert all(-1 < score < 0 for scores in paid for score in scores)
    for row, scores in zip(rows, paid, strict=True):
        assert row["rollout/reward"] == pytest.approx(scores.mean().item())
        assert row["rollout/reward"] == pytest.approx(-0.001 * row["rollout/agent_tokens"])
        assert row["rollout/score"] == 0.0  # the answers are wrong all the same
    assert rows[1]["eval/reward"] < 0 and rows[1]["eval/score"] == 0.0
    without = run(mini, tmp_path / "without", *flags[:4])
    assert not [key for row in without for key in row if "reward" in key]


@pytest.mark.parametrize("name", ["too_few", "not_finite", "nothing", "texts"])
def test_a_reward_that_is_not_one_number_for_each_episode_is_refused_by_name(
    mini, tmp_path, rewards_file, name
):
    flags = ["--phase", "grpo", "--group-size", "4", "--reward", f"{rewards_file}:{name}"]
    with pytest.raises(ValueError, match=f"--reward .*rewards.py:{name}.*one finite number"):
        run(mini, tmp_path / "run", *flags)


def test_a_reward_that_is_not_there_is_refused_before_anything_is_loaded(
    mini, tmp_path, rewards_file, monkeypatch
):
    spec = str(rewards_file)
    monkeypatch.chdir(tmp_path)
    for wrong in (
        f"{spec}:absent",
        "absent.py:reward",
        spec,
        f"{spec}:NUMBER",
        "rewards:by_length",
    ):
        with pytest.raises((ValueError, OSError), match="--reward"):
            run(mini, tmp_path / "run", "--phase", "grpo", "--reward", wrong)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
