"""The equations against hand-computed tables, float64 formulas and properties.

Run: python -m pytest tests/test_dgpo.py
"""

import math

import pytest
import torch

import dgpo
from baselines import TaidState, distillm_author, distillm_share, taid_update
from settings import TrainSettings, with_defaults

FP32 = 1e-6  # results of a few fp32 operations on numbers near 1
FP64 = 1e-12


def random_masks(batch: int = 16, tokens: int = 24, seed: int = 0) -> torch.Tensor:
    """Masks with gaps, as retrieved text leaves them; every row has at least one response token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator) < 0.5
    mask[:, 0] = False
    mask[:, tokens // 2] = True
    return mask


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_eq1_is_cross_entropy_plus_lambda_times_kl_from_teacher_to_student():
    student = torch.tensor([[1.0, 0.0, -1.0]])
    teacher = torch.tensor([[0.0, 2.0, 0.0]])
    p = [math.exp(x) / (1 + math.exp(2) + 1) for x in (0, 2, 0)]
    z = math.exp(1) + 1 + math.exp(-1)
    log_q = [x - math.log(z) for x in (1, 0, -1)]
    ce = -log_q[2]
    kl = sum(a * (math.log(a) - b) for a, b in zip(p, log_q, strict=True))
    loss, reported = dgpo.kd_loss(student, teacher, torch.tensor([2]), ce_weight=0.5, kl_weight=2.0)
    assert loss.item() == pytest.approx(0.5 * ce + 2.0 * kl, abs=FP32)
    assert reported.item() == pytest.approx(kl, abs=FP32)


def test_eq1_gradient_of_the_kl_is_student_minus_teacher_probabilities():
    student = torch.randn(
        4, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    teacher = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    loss, _ = dgpo.kd_loss(
        student, teacher, torch.zeros(4, dtype=torch.long), ce_weight=0.0, kl_weight=1.0
    )
    loss.sum().backward()
    torch.testing.assert_close(
        student.grad, student.detach().softmax(-1) - teacher.softmax(-1), atol=FP32, rtol=0
    )


def test_eq1_kl_is_zero_against_itself_and_positive_otherwise():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    other = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
    targets = torch.zeros(8, dtype=torch.long)
    assert dgpo.kd_loss(logits, logits, targets)[1].abs().max() < FP32
    assert (dgpo.kd_loss(logits, other, targets)[1] > 0).all()


def test_eq1_refuses_heads_of_different_size():
    with pytest.raises(ValueError, match="cut both heads"):
        dgpo.kd_loss(torch.zeros(2, 5), torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))


MIX = 0.3
BY_DEFINITION = {  # of the student's p and the teacher's q; r is TAID's target
    "forward": lambda p, q, r: q * (q / p).log(),
    "reverse": lambda p, q, r: p * (p / q).log(),
    "skew": lambda p, q, r: q * (q / (MIX * q + (1 - MIX) * p)).log(),
    "skew_reverse": lambda p, q, r: p * (p / (MIX * p + (1 - MIX) * q)).log(),
    "jsd": lambda p, q, r: (
        MIX * q * (q / (MIX * q + (1 - MIX) * p)).log()
        + (1 - MIX) * p * (p / (MIX * q + (1 - MIX) * p)).log()
    ),
    "taid": lambda p, q, r: r * (r / p).log(),
}


@pytest.mark.parametrize("kind", dgpo.DIVERGENCES)
def test_divergences_and_their_gradients_equal_their_definitions_in_float64(kind):
    generator = torch.Generator().manual_seed(6)
    student, teacher = (
        3 * torch.randn(5, 9, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    exact, leaf = student.clone().requires_grad_(), student.float().requires_grad_()
    target = ((1 - MIX) * student + MIX * teacher).softmax(-1)
    expected = BY_DEFINITION[kind](exact.softmax(-1), teacher.softmax(-1), target).sum(-1)
    got = dgpo.divergence(leaf.log_softmax(-1), teacher.float().log_softmax(-1), kind=kind, mix=MIX)
    torch.testing.assert_close(got.double(), expected, atol=FP32, rtol=FP32)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, atol=FP32, rtol=FP32)


def test_divergences_meet_at_their_limits():
    generator = torch.Generator().manual_seed(7)
    student, teacher = (
        torch.randn(4, 6, generator=generator),
        torch.randn(4, 6, generator=generator),
    )

    def of(kind, mix=0.1, a=student, b=teacher):
        return dgpo.divergence(a.log_softmax(-1), b.log_softmax(-1), kind=kind, mix=mix)

    close = {"atol": 1e-4, "rtol": 1e-3}
    for mix, accuracy in ((0.0, {"atol": 0, "rtol": 0}), (1e-6, close)):
        torch.testing.assert_close(of("skew", mix), of("forward"), **accuracy)
        torch.testing.assert_close(of("skew_reverse", mix), of("reverse"), **accuracy)
    torch.testing.assert_close(
        of("jsd", 0.5), of("jsd", 0.5, teacher, student), **close
    )  # symmetric at 1/2
    torch.testing.assert_close(
        of("jsd", 1e-3) / 1e-3, of("forward"), atol=0, rtol=1e-2
    )  # GKD: JSD / beta -> KL
    torch.testing.assert_close(of("taid", 1.0), of("forward"), **close)
    leaf = student.clone().requires_grad_()
    of("taid", 0.0, leaf).sum().backward()
    assert leaf.grad.abs().max() < FP32
    with pytest.raises(ValueError, match="forwards.*expected one of"):
        of("forwards")


@pytest.mark.parametrize("mix", [0, 0.0, 1, 1.0])
def test_l12_at_its_ends_jsd_is_the_kl_that_it_tends_to_and_a_mixture_is_one_side(mix):
    student, teacher = random_logits(2, 4, 6, seed=7)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    leaf = student.clone().requires_grad_()
    got = dgpo.divergence(leaf.log_softmax(-1), log_q, kind="jsd", mix=mix)
    limit = "reverse" if mix else "forward"
    torch.testing.assert_close(got, dgpo.divergence(log_p, log_q, kind=limit), atol=0, rtol=0)
    got.sum().backward()
    assert leaf.grad.abs().max() > 0.01
    near = abs(mix - 1e-3)
    scaled = dgpo.divergence(log_p, log_q, kind="jsd", mix=near) / (1 - near if mix else near)
    torch.testing.assert_close(got.detach(), scaled, atol=0, rtol=1e-2)
    assert dgpo.log_mixture(log_q, log_p, mix) is (log_q if mix else log_p)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"mix": 1.0, "distance": "skew"}, "--mix 1.0: --distance skew is 0"),
        ({"mix": 1.0, "distance": "skew_reverse"}, "--mix 1.0: --distance skew_reverse is 0"),
        ({"mix": 1.0, "phase": "distillm"}, "--mix 1.0: --distance skew is 0"),
    ],
)
def test_l12_a_mix_with_which_nothing_would_be_learnt_is_refused_by_its_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        with_defaults(TrainSettings(**flags))
    for mix in (0.0, 1.0):
        with_defaults(TrainSettings(phase="gkd", distance="jsd", mix=mix))
    with_defaults(TrainSettings(phase="distillm", mix=0.0))


def test_eq4_by_hand():
    #                 prompt agent  retrieved agent pad
    mask = torch.tensor([[False, True, False, True, False], [False, True, True, False, False]])
    old = torch.tensor([[9.0, -1.0, 9.0, -2.0, 9.0], [9.0, -0.5, -3.0, 9.0, 9.0]])
    guide = torch.tensor([[9.0, -1.5, 9.0, -1.0, 9.0], [math.nan] * 5])
    rewards = dgpo.kl_rewards(torch.tensor([0.0, 1.0]), old, guide, mask, beta=0.1)
    # wrong row: -0.1 * (-1 + 1.5) = -0.05 and -0.1 * (-2 + 1) = +0.1; right row: its score alone
    expected = torch.tensor([[0, -0.05, 0, 0.1, 0], [0, 0, 1.0, 0, 0]])
    torch.testing.assert_close(rewards, expected, atol=FP32, rtol=0)


def test_eq4_gives_no_kl_to_right_episodes_and_none_to_retrieved_tokens():
    mask = random_masks()
    generator = torch.Generator().manual_seed(5)
    old, guide = torch.randn(2, *mask.shape, generator=generator)
    scores = (torch.arange(len(mask)) % 2).float()
    rewards = dgpo.kl_rewards(scores, old, guide, mask, beta=1.0)
    assert (rewards[~mask] == 0).all()
    right = rewards[scores == 1]
    assert (right.sum(1) == 1).all() and ((right != 0).sum(1) == 1).all()
    wrong = scores == 0
    torch.testing.assert_close(rewards[wrong][mask[wrong]], (guide - old)[wrong][mask[wrong]])


@pytest.mark.parametrize(
    ("where", "guided"), [("wrong", [True, False]), ("all", [True, True]), ("none", [False, False])]
)
def test_eq4_where_selects_the_guided_episodes(where, guided):
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards = dgpo.kl_rewards(
        torch.tensor([0.0, 1.0]), torch.zeros(2, 3), torch.ones(2, 3), mask, beta=1.0, where=where
    )
    assert [bool(row[0] != 0) for row in rewards] == guided


def test_eq4_refuses_an_unknown_rule_and_survives_an_episode_without_a_response():
    empty = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected one of wrong, all, none"):
        dgpo.kl_rewards(
            torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3), empty, beta=1.0, where="right"
        )
    assert (
        dgpo.kl_rewards(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3), empty, beta=1.0) == 0
    ).all()


def test_k1_summed_over_tokens_is_the_kl_of_whole_sequences_by_exact_enumeration():
    generator = torch.Generator().manual_seed(6)
    first, first_guide = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    second, second_guide = torch.randn(
        2, 3, 3, generator=generator, dtype=torch.float64
    ).log_softmax(-1)
    joint, joint_guide = first[:, None] + second, first_guide[:, None] + second_guide  # [3, 3]
    exact = (joint.exp() * (joint - joint_guide)).sum()
    estimate = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            old = torch.stack([first[i], second[i, j]])[None]
            guide = torch.stack([first_guide[i], second_guide[i, j]])[None]
            mask = torch.ones(1, 2, dtype=torch.bool)
            rewards = dgpo.kl_rewards(torch.zeros(1), old, guide, mask, beta=1.0)
            estimate += joint[i, j].exp() * -rewards.double().sum()
    assert estimate.item() == pytest.approx(exact.item(), abs=FP32)


def test_exact_kl_by_hand():
    """KL(student || guide), not the other one: at temperature 2 both have square roots."""
    student, guide = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.4, 0.1]])
    for temperature in (1.0, 2.0):
        p, q = (x[0].double().pow(1 / temperature) for x in (student, guide))
        p, q = p / p.sum(), q / q.sum()
        kl, reported = dgpo.exact_kl(student.log(), guide.log() + 3.0, temperature=temperature)
        assert kl.item() == pytest.approx((p * (p / q).log()).sum().item(), abs=FP32)
        assert reported.tolist() == kl.tolist()
    assert dgpo.exact_kl(student, student + 1.0)[0].item() == pytest.approx(0.0, abs=FP32)


@pytest.mark.parametrize("seed", range(3))
def test_exact_kl_has_the_gradient_of_its_state_and_rewards_have_the_one_of_the_future_as_well(
    seed,
):
    """Two tokens, all sequences enumerated, against the gradient of the sequences' KL in float64.

    That is exact_kl's over the states visited, and what the first token is paid for the second's.
    """
    tables = [1.5 * random_logits(2, *shape, seed=seed).double() for shape in ((3,), (3, 3))]
    (first, first_guide), (second, second_guide) = tables
    leaves = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    log_first, log_second = (leaf.log_softmax(-1) for leaf in leaves)
    gap_first = log_first - first_guide.log_softmax(-1)
    gap_second = log_second - second_guide.log_softmax(-1)  # [3, 3]
    joint = (log_first[:, None] + log_second).exp()
    (joint * (gap_first[:, None] + gap_second)).sum().backward()
    visits = log_first.detach().exp()  # how often each second state is visited
    states = [first.float().requires_grad_(), second.float().requires_grad_()]
    exact = dgpo.exact_kl(states[0][None], first_guide[None])[0].sum()
    exact = exact + (visits * dgpo.exact_kl(states[1], second_guide)[0]).sum()
    exact.backward()
    # The last token has no future, so both agree there.
    torch.testing.assert_close(states[1].grad.double(), leaves[1].grad, atol=FP32, rtol=0)
    future = (log_second.exp() * gap_second).sum(-1).detach()  # KL of each second state
    of_future = visits * (future - (visits * future).sum())  # of sum pi(v) KL(v)
    torch.testing.assert_close(
        states[0].grad.double() + of_future, leaves[0].grad, atol=FP32, rtol=0)
    assert of_future.abs().max() > 0.01


def test_last_token_is_the_last_response_token_not_the_last_token():
    mask = torch.tensor([[False, True, True, False, True, False], [False] * 6])
    assert dgpo.last_token(mask).tolist() == [[False] * 4 + [True, False], [False] * 6]


def test_gae_by_hand():
    # three response tokens around one retrieved; gamma 0.9, lambda 0.5
    mask = torch.tensor([[True, False, True, True]])
    rewards, values = torch.tensor([[0.0, 7.0, 0.1, 1.0]]), torch.tensor([[0.5, 9.0, 0.4, 0.2]])
    d3 = 1.0 - 0.2
    d2 = 0.1 + 0.9 * 0.2 - 0.4
    d0 = 0.0 + 0.9 * 0.4 - 0.5
    a2 = d2 + 0.45 * d3
    a0 = d0 + 0.45 * a2
    advantages, returns = dgpo.gae(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[a0, 0.0, a2, d3]]), atol=FP32, rtol=0)
    torch.testing.assert_close(
        returns, torch.tensor([[a0 + 0.5, 0.0, a2 + 0.4, 1.0]]), atol=FP32, rtol=0
    )


def test_gae_at_gamma_and_lambda_one_is_reward_to_go_minus_value_for_any_mask():
    mask = random_masks(seed=7)
    rewards, values = torch.randn(
        2, *mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8)
    )
    rewards = torch.where(mask, rewards, 0.0)
    advantages, returns = dgpo.gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages[mask], (to_go - values)[mask], atol=FP64, rtol=0)
    torch.testing.assert_close(returns[mask], to_go[mask], atol=FP64, rtol=0)
    assert (advantages[~mask] == 0).all()


def gae_by_a_loop(rewards, values, mask, gamma, gae_lambda):
    """The definition, token by token from the last one."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        next_value = next_advantage = 0.0
        for t in mask[row].nonzero().flatten().flip(0).tolist():
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            next_value, next_advantage = values[row, t], delta + gamma * gae_lambda * next_advantage
            advantages[row, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 200])
@pytest.mark.parametrize("decay", [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_gae_equals_a_loop_over_tokens(width, decay):
    generator = torch.Generator().manual_seed(width)
    shares = torch.tensor([0, 0.1, 0.5, 0.5, 0.9, 1])[:, None]
    mask = torch.rand(6, width, generator=generator) < shares
    rewards, values = torch.randn(2, *mask.shape, dtype=torch.float64, generator=generator)
    expected = gae_by_a_loop(rewards, values, mask, *decay)
    for dtype, tolerance in ((torch.float64, FP64), (torch.float32, FP32 * width**0.5)):
        got = dgpo.gae(rewards.to(dtype), values.to(dtype), mask, gamma=decay[0],
                       gae_lambda=decay[1])
        for mine, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.double(), truth, atol=tolerance, rtol=0)


def test_gae_does_not_read_values_of_retrieved_tokens_or_of_padding():
    mask = random_masks(seed=9)
    rewards, values = torch.randn(2, *mask.shape, generator=torch.Generator().manual_seed(10))
    rewards = torch.where(mask, rewards, 0.0)
    dirty = torch.where(mask, values, 1e6)
    clean = dgpo.gae(rewards, values, mask, gamma=0.99, gae_lambda=0.9)
    torch.testing.assert_close(dgpo.gae(rewards, dirty, mask, gamma=0.99, gae_lambda=0.9), clean)


def test_whitened_entries_have_mean_zero_and_variance_one_under_the_mask():
    mask = random_masks(seed=11)
    x = 5 + 3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(12))
    white = dgpo.whiten(x, mask)
    assert white[mask].mean().abs() < 1e-5
    assert white[mask].var().item() == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask] == 0).all()
    assert torch.corrcoef(torch.stack([white[mask], x[mask]]))[0, 1] > 0.999  # the sign is kept


def test_whitening_shares_with_common_moments_equals_whitening_the_whole():
    mask = random_masks(seed=13)
    x = torch.randn(mask.shape, generator=torch.Generator().manual_seed(14))
    stats = dgpo.Moments(
        *(
            a + b
            for a, b in zip(
                dgpo.moments(x[:5], mask[:5]), dgpo.moments(x[5:], mask[5:]), strict=True
            )
        )
    )
    whole = dgpo.whiten(x, mask)
    torch.testing.assert_close(
        torch.cat(
            [dgpo.whiten(x[:5], mask[:5], stats=stats), dgpo.whiten(x[5:], mask[5:], stats=stats)]
        ),
        whole,
        atol=FP32,
        rtol=0,
    )


def test_whitening_survives_one_token_and_none():
    one = torch.tensor([[False, True]])
    assert dgpo.whiten(torch.tensor([[3.0, 4.0]]), one).tolist() == [[0.0, 0.0]]
    assert dgpo.whiten(torch.tensor([[3.0, 4.0]]), ~one & one).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected", "is_clipped"),
    [
        (0.1, 1.0, -math.exp(0.1), 0),
        (0.5, 1.0, -1.2, 1),
        (-0.5, 1.0, -math.exp(-0.5), 0),
        (0.5, -1.0, math.exp(0.5), 0),
        (-0.5, -1.0, 0.8, 1),
        (-0.1, -2.0, 2 * math.exp(-0.1), 0),
    ],
)
def test_eq2_clip_table(log_ratio, advantage, expected, is_clipped):
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = dgpo.policy_loss(
        torch.full((1, 1), log_ratio),
        torch.zeros(1, 1),
        torch.full((1, 1), advantage),
        mask,
        clip_eps=0.2,
    )
    assert result.loss.item() == pytest.approx(expected, abs=FP32)
    assert result.clip_frac.item() == is_clipped
    assert result.approx_kl.item() == pytest.approx(math.exp(log_ratio) - 1 - log_ratio, abs=FP32)


def test_eq2_gradient_raises_the_probability_of_a_good_token_and_stops_beyond_the_clip():
    logprobs = torch.tensor([[0.0, 0.0, 0.5]], requires_grad=True)
    advantages = torch.tensor([[2.0, -3.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    dgpo.policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, clip_eps=0.2).loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-2.0, 3.0, 0.0]]))


def test_eq2_ignores_what_is_off_the_mask_even_nan_in_value_and_gradient():
    logprobs = torch.tensor([[-1.0, math.nan, 300.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    result = dgpo.policy_loss(
        logprobs, torch.tensor([[-1.0, 0.0, -300.0]]), torch.ones(1, 3), mask, clip_eps=0.2
    )
    result.loss.backward()
    assert result.loss.item() == -1.0 and result.count == 1
    assert logprobs.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_eq2_entropy_bonus_lowers_the_loss():
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    plain = dgpo.policy_loss(zeros, zeros, zeros, mask, clip_eps=0.2)
    bonus = dgpo.policy_loss(
        zeros, zeros, zeros, mask, clip_eps=0.2, entropy=torch.full((1, 2), 1.5), entropy_weight=0.1
    )
    assert (bonus.loss - plain.loss).item() == pytest.approx(-0.3, abs=FP32)


def test_losses_are_sums_so_a_split_into_micro_batches_changes_nothing():
    mask = random_masks(seed=15)
    new, old, advantages = torch.randn(
        3, *mask.shape, generator=torch.Generator().manual_seed(16), dtype=torch.float64
    )
    whole = dgpo.policy_loss(new, old, advantages, mask, clip_eps=0.2)
    parts = [
        dgpo.policy_loss(new[i], old[i], advantages[i], mask[i], clip_eps=0.2)
        for i in (slice(3), slice(3, None))
    ]
    assert sum(p.loss for p in parts).item() == pytest.approx(whole.loss.item(), abs=FP64 * 1000)
    assert sum(p.count for p in parts) == whole.count == mask.sum()


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "is_clipped"),
    [
        (1.0, 0.0, 2.0, 0.5 * 1.5**2, 1),  # clipped to 0.5: the larger error counts
        (1.0, 0.0, 0.0, 0.5 * 1.0, 0),
        (0.3, 0.0, 1.0, 0.5 * 0.7**2, 0),
    ],
)
def test_value_loss_by_hand(value, old, target, expected, is_clipped):
    mask = torch.tensor([[True, False]])
    result = dgpo.value_loss(
        torch.tensor([[value, 5.0]]),
        torch.tensor([[old, 5.0]]),
        torch.tensor([[target, -5.0]]),
        mask,
        clip_eps=0.5,
    )
    assert result.loss.item() == pytest.approx(expected, abs=FP32)
    assert (result.clip_frac.item(), result.count.item()) == (is_clipped, 1)


def test_no_loss_counts_rounding_as_clipped():
    """Old + (new - old) is not always new; 0.0096 of these values were counted once."""
    generator = torch.Generator().manual_seed(0)
    old, values, returns = 0.05 * torch.randn(3, 100, 100, generator=generator)
    mask = torch.ones(100, 100, dtype=torch.bool)
    assert (old + (values - old) != values).any()
    assert dgpo.value_loss(values, old, returns, mask, clip_eps=0.5).clip_frac == 0
    assert dgpo.value_loss(values, old, returns, mask, clip_eps=0.1).clip_frac > 100
    logprobs = old + 0.3 * (values - old)  # log(1.2) is 0.18
    assert dgpo.policy_loss(logprobs, old, returns, mask, clip_eps=0.2).clip_frac == 0


def test_one_ppo_step_on_a_two_token_toy_matches_the_gradient_by_hand():
    # One state, two tokens, token 0 sampled, advantage 2: d loss / d z = -2 (1[y] - p) at ratio 1.
    z = torch.tensor([[0.3, -0.2]], requires_grad=True)
    logprobs = z.log_softmax(-1)[:, :1]
    mask = torch.ones(1, 1, dtype=torch.bool)
    dgpo.policy_loss(
        logprobs, logprobs.detach(), torch.full((1, 1), 2.0), mask, clip_eps=0.2
    ).loss.backward()
    p0 = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(
        z.grad, torch.tensor([[-2 * (1 - p0), 2 * (1 - p0)]]), atol=FP32, rtol=0
    )


def test_wrong_means_a_score_below_a_tenth():
    scores = torch.tensor([0.0, 0.05, 0.1, 1.0])
    assert dgpo.guided_episodes(scores, "wrong").tolist() == [True, True, False, False]
    higher = dgpo.guided_episodes(scores, "wrong", threshold=0.5)
    assert higher.tolist() == [True, True, True, False]
    assert dgpo.guided_episodes(scores, "all").all()
    assert not dgpo.guided_episodes(scores, "none").any()


def test_kl_penalty_is_k3_of_the_guided_tokens_and_adds_to_the_loss():
    """E[k3] is KL(pi || pi_g); tokens without a guide cost nothing."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    guide = torch.tensor([-1.5, float("nan"), -0.5])
    zeros, mask = torch.zeros(3), torch.ones(3, dtype=torch.bool)
    penalty = 0.1 * dgpo.kl_penalty(logprobs, guide, mask)
    result = dgpo.policy_loss(
        logprobs, logprobs.detach(), zeros, mask, clip_eps=0.2, penalty=penalty
    )
    gap = -0.5  # log pi_g - log pi of the first token
    assert result.loss.item() == pytest.approx(0.1 * (math.exp(gap) - gap - 1), abs=FP32)
    result.loss.backward()
    expected = [0.1 * (1 - math.exp(gap)), 0.0, 0.0]
    assert logprobs.grad.tolist() == pytest.approx(expected, abs=FP32)


def expected_gradient(kind: str, logits: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
    """Of kl_penalty in a state with these logits, over all tokens that may be sampled there."""
    leaf = logits.clone().requires_grad_()
    logprobs, mask = leaf.log_softmax(-1), torch.ones(len(logits), dtype=torch.bool)
    penalty = dgpo.kl_penalty(logprobs, guide.log_softmax(-1), mask, kind=kind)
    (logprobs.detach().exp() * penalty).sum().backward()
    return leaf.grad


@pytest.mark.parametrize(("kind", "divergence"), [("k3", "forward"), ("k2", "reverse")])
@pytest.mark.parametrize("seed", range(3))
def test_l8_the_expected_gradient_of_a_kl_in_the_loss_is_that_of_the_kl_it_is_said_to_be(
    kind, divergence, seed
):
    """By enumeration, in float64: "reverse" is Eq. 4's KL(student || guide)."""
    logits, guide = (1.5 * x.double() for x in random_logits(2, 7, seed=seed))
    leaf = logits.clone().requires_grad_()
    dgpo.divergence(leaf.log_softmax(-1), guide.log_softmax(-1), kind=divergence).backward()
    got = expected_gradient(kind, logits, guide)
    torch.testing.assert_close(got, leaf.grad, atol=FP64, rtol=0)
    other = expected_gradient({"k3": "k2", "k2": "k3"}[kind], logits, guide)
    assert (other - got).abs().max() > 0.01


def test_l8_k2_costs_nothing_without_a_guide():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    guide, mask = torch.tensor([math.nan, -1.5]), torch.ones(2, dtype=torch.bool)
    penalty = dgpo.kl_penalty(logprobs, guide, mask, kind="k2")
    assert penalty.tolist() == [0.0, 0.125]
    penalty.sum().backward()
    assert logprobs.grad.tolist() == [0.0, -0.5]


def test_terms_weighted_by_hand_give_a_mean_of_means():
    zeros, mask = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])
    result = dgpo.policy_loss(zeros, zeros, advantages, mask, clip_eps=0.2)
    assert result.loss.item() == pytest.approx(-2.0)
    weights = torch.tensor([1 / 4] * 4 + [1.0])
    assert (weights * result.terms).sum().item() == pytest.approx(-1.0 + 2.0)


# ---- baselines ----

TAID = {"start": 0.4, "end": 1.0, "beta": 0.99}


def taid_path(num: int, alpha: float, losses=lambda n: 1.0) -> list[float]:
    state, path = TaidState(TAID["start"]), []
    for n in range(num):
        path.append(state.t)
        state = taid_update(state, losses(n), progress=(n + 1) / num, alpha=alpha, **TAID)
    return [*path, state.t]


def test_taid_is_a_straight_line_in_runs_shorter_than_two_over_alpha():
    path = taid_path(500, alpha=5e-4)
    assert path == pytest.approx([0.4 + 0.6 * n / 500 for n in range(501)], abs=FP64)


def test_taid_runs_ahead_of_the_line_with_a_large_alpha_and_ends_at_the_teacher():
    path = taid_path(100, alpha=0.2)
    assert all(a <= b for a, b in zip(path, path[1:], strict=False)) and path[-1] == 1.0
    assert path[50] > 0.4 + 0.6 * 0.5 + 0.2
    falling = taid_path(
        100, alpha=0.05, losses=lambda n: 0.9**n
    )  # a falling loss: faster than a rising one
    rising = taid_path(100, alpha=0.05, losses=lambda n: 1.1**n)
    assert falling[50] > rising[50]


def test_taid_update_by_hand():
    state = taid_update(
        TaidState(0.5, 0.1, 2.0), 1.5, progress=0.0, start=0.4, end=1.0, alpha=0.1, beta=0.9
    )
    momentum = 0.9 * 0.1 + 0.1 * 0.25  # the loss fell by a quarter
    assert state.momentum == pytest.approx(momentum) and state.loss == 1.5
    assert state.t == pytest.approx(0.5 + 0.1 * 0.5 / (1 + math.exp(-momentum)))
    steep = taid_update(
        TaidState(0.4, 0.0, 1e-9), 5.0, progress=0.0, start=0.4, end=1.0, alpha=0.1, beta=0.9
    )
    assert steep.t == 0.4  # a loss that explodes takes no step, and breaks nothing
    none = taid_update(
        TaidState(0.0, 0.2, 0.0), 5.0, progress=0.0, start=0.0, end=1.0, alpha=0.1, beta=0.9
    )
    assert none.t == 0.0  # nothing to compare with: target and student were one
    first = taid_update(TaidState(0.4), 3.0, progress=0.0, start=0.4, end=1.0, alpha=0.1, beta=0.9)
    assert first == TaidState(0.4, 0.0, 3.0)  # nothing to compare with: the line alone


def test_distillm_lets_the_student_write_more_once_the_loss_rises_over_its_reference():
    share, reference = distillm_share(0.0, 2.0, None, tolerance=0.1)
    assert (share, reference) == (0.0, 2.0)
    for loss, expected in [
        (1.5, (0.0, 2.0)),
        (2.05, (0.0, 2.0)),
        (2.1, (0.1, 2.1)),
        (2.15, (0.1, 2.1)),
    ]:
        share, reference = distillm_share(share, loss, reference, tolerance=0.1)
        assert (share, reference) == pytest.approx(expected)
    assert distillm_share(0.95, 9.0, 1.0, tolerance=0.0) == (1.0, 9.0)


@pytest.mark.parametrize(
    ("u", "share", "progress", "is_full", "author"),
    [
        (0.0, 0.0, 0.0, False, "teacher"),
        (0.3, 0.5, 0.2, True, "student"),  # 0.3 < 0.5 * 0.8
        (0.45, 0.5, 0.2, True, "replay"),
        (0.45, 0.5, 0.2, False, "student"),  # there is not enough to draw from yet
        (0.1, 0.5, 1.0, True, "replay"),
        (0.6, 0.5, 0.0, False, "teacher"),
    ],
)
def test_distillm_draws_new_outputs_then_old_ones_then_the_teachers(
    u, share, progress, is_full, author
):
    assert distillm_author(u, share, progress=progress, is_buffer_full=is_full) == author


def test_group_advantages_by_hand():
    rewards = torch.zeros(4, 3)
    rewards[0, 2], rewards[1, 1], rewards[1, 2] = 1.0, -0.25, 0.25  # totals 1, 0; 0, 0
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    got = dgpo.group_advantages(rewards, mask, 2)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)  # unbiased std of (1, 0)
    expected = [[0, a, a], [0, -a, -a], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(expected), atol=FP32, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 5, 7, 16, 61])
@pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3, -2.3, 1e-4, 12345.6])
def test_l7_equal_rewards_give_exactly_zero(size, reward):
    mask = torch.ones(2 * size, 4, dtype=torch.bool)
    mask[::3, 3] = False  # the score stands on other places
    rewards = torch.where(dgpo.last_token(mask), reward, 0.0)
    assert (dgpo.group_advantages(rewards, mask, size) == 0).all()
    mask[0] = False  # a failed search does not count
    assert (dgpo.group_advantages(rewards, mask, size) == 0).all()


def test_l7_rewards_that_are_equal_but_for_the_order_of_a_sum_give_zero_and_others_do_not():
    rewards, mask = torch.tensor([[0.1, 0.2, 0.4], [0.4, 0.2, 0.1]]), torch.ones(2, 3).bool()
    assert (dgpo.group_advantages(rewards, mask, 2) == 0).all()
    rewards[0, 0] += 1e-4
    total = rewards.sum(1).double()
    expected = (total - total.mean()) / (total.std() + 1e-6)
    got = dgpo.group_advantages(rewards, mask, 2)[:, 0].double()
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # of rewards in fp32


def test_group_advantages_count_the_penalties_of_the_mask_alone_and_refuse_broken_groups():
    rewards, mask = torch.rand(6, 5), random_masks(6, 5)
    elsewhere = torch.where(mask, rewards, torch.nan)
    torch.testing.assert_close(
        dgpo.group_advantages(elsewhere, mask, 3), dgpo.group_advantages(rewards, mask, 3)
    )
    per_episode = torch.stack(
        [row[m][0] for row, m in zip(dgpo.group_advantages(rewards, mask, 3), mask, strict=True)]
    )
    torch.testing.assert_close(per_episode.view(2, 3).sum(1), torch.zeros(2), atol=1e-5, rtol=0)
    failed = torch.tensor(
        [[True, True], [True, True], [False, False], [False, False], [True, True], [False, False]]
    )
    given = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])[:, None] * torch.tensor([0.0, 1.0])
    assert (
        dgpo.group_advantages(given, failed, 3).abs().max() == 0
    )  # a failed search is no wrong answer
    for size in (1, 4):
        with pytest.raises(ValueError, match="complete groups"):
            dgpo.group_advantages(rewards, mask, size)
