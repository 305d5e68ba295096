"""Loop two, reinforce: rollout, score, KL, advantage, update (Eq. 2-4), with a critic or within groups.

Departures from the official code, with reasons
 1. Losses and learning rates as in distil.py.
 2. The teacher scores wrong episodes alone; the official code scores all and multiplies by zero.

Legend: B episodes, T tokens, N response tokens.
"""

import time

import torch
from torch import Tensor

from collapse import signs_of_collapse
from data import Question, hit
from dgpo import (
    Moments,
    gae,
    group_advantages,
    kl_rewards,
    masked_sum,
    moments,
    policy_loss,
    value_loss,
    whiten,
    wrong_episodes,
)
from episode import Batch, Episode, Packed, collate, micro_batches, num_thinking_tokens, pack, response_rows
from kernels import head_logprobs
from model import Critic, Tokenizer
from parallel import in_step, sum_over_processes, update
from play import episode_metrics, play, shuffled
from qagent import collected, is_well_formed
from retriever import Retriever
from rollout import Policy
from run import Run, Stop
from settings import SKIPPING, TrainSettings

# Before the first update the policy is the one that acted. Two layers stay below 1e-5 (a test); the largest gap seen in
# 400 steps of the embedded world's models was 2.6e-5. The size is logged; a real mismatch stops the run.
MAX_FIRST_LOG_RATIO = 1e-4


def token_logprobs(policy: Policy, packed: Packed) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token, nats: two [N]."""
    return head_logprobs(response_rows(policy.decoder, packed), policy.head, packed.ids[packed.response_mask])


@torch.no_grad()
def score_tokens(
    actor: Policy, critic: Critic | None, guide: Policy | None, batch: Batch, guided: list[bool],
    settings: TrainSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """(old_logprobs, values, guide_logprobs), each [B, T]; values are 0 without a critic, guide_logprobs NaN in rows
    that are not guided."""
    old_logprobs, values = torch.zeros(2, *batch.ids.shape, device=batch.ids.device)
    guide_logprobs = torch.full_like(values, torch.nan)
    mask, lengths = batch.response_mask, batch.lengths()
    for group in in_step(micro_batches(lengths, settings.micro_batch_tokens)):
        packed = pack(batch, group, lengths)
        old_logprobs[group] = spread(token_logprobs(actor, packed)[0], mask[group])
        if critic is not None:
            values[group] = spread(critic.values(packed.ids, packed.documents)[packed.response_mask], mask[group])
    rows = [i for i, is_guided in enumerate(guided) if is_guided and guide is not None]
    for group in in_step(micro_batches([lengths[i] for i in rows], settings.micro_batch_tokens)):
        group = [rows[i] for i in group]
        guide_logprobs[group] = spread(token_logprobs(guide, pack(batch, group, lengths))[0], mask[group])
    return old_logprobs, values, guide_logprobs


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """One number for each True of the mask, laid out as the mask is, 0 elsewhere: [N], [B, T] -> [B, T]."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x)


def reinforce(
    run: Run, actor: Policy, critic: Critic | None, guide: Policy | None, retriever: Retriever,
    questions: list[Question], validate, score,
) -> None:
    """PPO, or GRPO where there is no critic, with a search engine in the loop: phases differ in the guide, where it
    counts, and the advantage."""
    settings = run.settings
    networks = {"actor": actor.decoder} | ({"critic": critic} if critic is not None else {})
    rates = {"actor": settings.actor_lr, "critic": settings.critic_lr}
    warmups = {"actor": settings.actor_warmup_steps, "critic": settings.critic_warmup_steps}
    parameters = {name: list(network.parameters()) for name, network in networks.items()}
    adams = {name: torch.optim.AdamW(parameters[name], lr=rates[name], weight_decay=settings.weight_decay)
             for name in networks}
    group_size = settings.group_size if critic is None else 1
    num_episodes = settings.prompts_per_step // group_size * group_size
    num_minibatches = max(1, round(num_episodes / settings.minibatch_size))
    critic_only_steps = settings.critic_only_steps if critic is not None else 0
    first = run.start(settings.steps, settings.minibatch_size, networks,
                      {f"{name}_adam": adam for name, adam in adams.items()})

    # Who is paid for a short thought, or for passages, may answer less often.
    watched = "rollout/reward" if settings.phase in SKIPPING else "rollout/score"

    def check_collapse() -> None:  # questions, not episodes: those of a group succeed and fail together
        if settings.stop_on_collapse and (signs := signs_of_collapse(run.history, num_episodes // group_size, watched)):
            run.give_up(actor, signs)

    check_collapse()  # of the steps that a resumed run has done
    for step in range(first, settings.steps):
        # 1. rollout: this process's share of the step's questions
        started = time.perf_counter()
        episodes, offset = play(run, actor, retriever, questions, step, num_episodes, group_size)
        rollout_s = time.perf_counter() - started
        # 2. score: Eq. 3, and the teacher's log-probabilities where Eq. 4 needs them
        batch = collate(episodes, pad_id=actor.tokenizer.pad_id).to(run.device)
        mask = batch.response_mask
        scores = torch.tensor(score(episodes), device=run.device)  # [B]
        guided = {"wrong": wrong_episodes(scores), "all": scores == scores, "none": scores != scores}
        guided = guided[settings.kl_where].tolist()
        started = time.perf_counter()
        old_logprobs, old_values, guide_logprobs = score_tokens(actor, critic, guide, batch, guided, settings)
        score_s = time.perf_counter() - started
        # 3. rewards and advantages: Eq. 4; GAE, whitened over all processes, or GRPO's
        where = settings.kl_where if settings.kl_in == "reward" else "none"
        rewards = kl_rewards(scores, old_logprobs, guide_logprobs, mask, beta=settings.beta, where=where)
        if critic is None:
            advantages, returns = group_advantages(rewards, mask, group_size), old_values
        else:
            advantages, returns = gae(rewards, old_values, mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
            sums_of_all = torch.tensor(sum_over_processes(*moments(advantages, mask)), dtype=torch.float64)
            stats = Moments(*sums_of_all.to(run.device))
            advantages = whiten(advantages, mask, stats=stats)
        metrics = episode_metrics(episodes) | token_metrics(
            episodes, old_logprobs, guide_logprobs, returns, old_values, mask, has_critic=critic is not None)
        if settings.phase in SKIPPING:
            metrics |= reward_metrics(episodes, scores, group_size, actor.tokenizer, settings.phase)
            kept = wrong_episodes(scores) & (settings.kl_where == "wrong")  # of these the teacher has something to say
            batch = skip_equal_groups(batch, scores, group_size, kept)
        mask, lengths = batch.response_mask, batch.lengths()
        # 4. updates: Eq. 2 and the critic, a global mini-batch at a time
        started = time.perf_counter()
        trained = [name for name in reversed(networks) if name == "critic" or step >= critic_only_steps]
        sums: dict[str, Tensor] = {}
        norms, passes, first_gap = {"actor": [], "critic": []}, 0, 0.0
        for epoch in range(settings.ppo_epochs):
            rows = shuffled(num_episodes, settings.seed, step, epoch)  # of all processes
            for k in range(num_minibatches):
                part = [i - offset for i in rows[k::num_minibatches] if 0 <= i - offset < len(episodes)]
                num_tokens, num_rows = sum_over_processes(mask[part].sum(), mask[part].any(1).sum())
                if not num_tokens:  # all groups were equal: an update would follow old momentum and weight decay alone
                    continue
                groups = in_step(micro_batches([lengths[i] for i in part], settings.micro_batch_tokens))
                passes += len(groups)
                for group in groups:
                    group = [part[i] for i in group]
                    old = [x[group][mask[group]]
                           for x in (old_logprobs, advantages, old_values, returns, guide_logprobs)]
                    by_episode = settings.mean_over == "episode"
                    weights = episode_weights(mask[group], num_tokens, num_rows) if by_episode else None
                    packed = pack(batch, group, lengths)
                    done = backward(actor, critic, packed, *old, weights, num_tokens, trained, settings)
                    if epoch == 0 and k == 0:
                        first_gap = max(first_gap, done["gap"].item())
                        check_first_gap(first_gap, step)
                    for name, value in done.items():
                        sums[name] = sums.get(name, 0.0) + value.double()  # fetched once, after the updates
                for name in trained:
                    done_steps = step + 1 - (critic_only_steps if name == "actor" else 0)
                    lr = rates[name] * min(1, done_steps / max(1, warmups[name]))
                    norms[name].append(update(parameters[name], adams[name], lr, settings.grad_clip))
        update_s = time.perf_counter() - started
        # 5. log, validate, save
        names = ["value_loss", "value_clip"] if "critic" in trained else []
        names += ["policy_loss", "clip_frac", "approx_kl", "entropy"] if "actor" in trained else []
        names.append("tokens")
        *totals, tokens = sum_over_processes(*(sums.get(name, torch.zeros(())) for name in names))
        if tokens:
            metrics |= {f"loss/{name}": total / tokens for name, total in zip(names, totals, strict=False)}
            metrics |= {f"loss/{name}_grad_norm": norms[name][-1] for name in trained}
        metrics |= {"loss/skipped": run.check_norms(*norms["critic"], *norms["actor"]),
                    "loss/first_log_ratio": first_gap}  # of this process
        metrics |= validate(step + 1, settings.steps)
        run.log(step + 1, metrics, num_tokens=tokens / settings.ppo_epochs,
                passes=passes, rollout_s=rollout_s, score_s=score_s, update_s=update_s)
        run.write_samples(step + 1, episodes, actor.tokenizer)
        check_collapse()
        if run.is_over():
            break
    run.finish(actor)


def episode_weights(mask: Tensor, num_tokens: float, num_rows: float) -> Tensor:
    """Of each response token, so that the weighted sum over all num_rows episodes / num_tokens is the mean of the
    episodes' means: [B, T] -> [N]."""
    sizes = mask.sum(1)  # [B]
    return (num_tokens / max(1, num_rows) / sizes).repeat_interleave(sizes)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """Groups whose episodes are all worth the same, of which nothing can be learnt: [B] -> [B / G] bool."""
    groups = scores.view(-1, group_size)
    return (groups == groups[:, :1]).all(1) if group_size > 1 else torch.zeros(len(scores), dtype=torch.bool)


def skip_equal_groups(batch: Batch, scores: Tensor, group_size: int, kept: Tensor) -> Batch:
    """The batch without response tokens in such groups, but for kept episodes: they would dilute the mean."""
    skipped = equal_groups(scores, group_size).repeat_interleave(group_size).to(scores.device) & ~kept  # [B]
    return batch._replace(response_mask=batch.response_mask & ~skipped[:, None])


def reward_metrics(
    episodes: list[Episode], scores: Tensor, group_size: int, tokenizer: Tokenizer, phase: str
) -> dict[str, float]:
    """What a step's rewards looked at: thinking and budgets, or queries and passages; over all processes."""
    equal, values = equal_groups(scores, group_size), {"reward": scores.sum().item()}
    if phase == "bard-rl":
        lengths = [num_thinking_tokens(e, tokenizer) for e in episodes]
        values["thinking"] = sum(lengths)
        values["adherence"] = sum(n <= e.question.budget for e, n in zip(episodes, lengths, strict=True))
    else:
        found = [collected(e) for e in episodes]
        values["passages"] = sum(map(len, found))
        values["hit"] = sum(hit(k, e.question.golden_answers) for k, e in zip(found, episodes, strict=True))
        values["queries"] = sum(len(e.queries) for e in episodes)
        values["dropped_queries"] = sum(e.dropped_queries for e in episodes)
        values["format"] = sum(is_well_formed(e, tokenizer) for e in episodes)
    n, skipped, groups, *totals = sum_over_processes(*map(torch.tensor, (
        len(episodes), equal.sum().item(), len(equal), *values.values())))
    means = {f"rollout/{name}": total / n for name, total in zip(values, totals, strict=True)}
    return means | {"rollout/equal_groups": skipped / groups}


def backward(
    actor: Policy, critic: Critic | None, packed: Packed,
    old_logprobs: Tensor, advantages: Tensor, old_values: Tensor, returns: Tensor, guide_logprobs: Tensor,
    weights: Tensor | None, num_tokens: float, trained: list[str], settings: TrainSettings,
) -> dict[str, Tensor]:
    """Gradients of Eq. 2 and of the critic's loss over the response tokens of a pass, as a share of the mini-batch's
    num_tokens; returns sums for the log. old_logprobs to weights: [N]."""
    here = torch.ones_like(old_logprobs, dtype=torch.bool)  # all of them are under the mask
    sums = {"tokens": here.sum()}
    if critic is not None:
        values = critic.values(packed.ids, packed.documents)[packed.response_mask]
        of_critic = value_loss(values, old_values, returns, here, clip_eps=settings.value_clip_eps)
        (of_critic.loss / num_tokens).backward()
        sums |= {"value_loss": of_critic.loss.detach(), "value_clip": of_critic.clip_frac}
    if "actor" in trained:
        logprobs, entropy = token_logprobs(actor, packed)
        of_actor = policy_loss(
            logprobs, old_logprobs, advantages, here, clip_eps=settings.clip_eps, entropy=entropy,
            entropy_weight=settings.entropy_weight, guide_logprobs=guide_logprobs,
            kl_weight=settings.beta if settings.kl_in == "loss" else 0.0, weights=weights)
        (of_actor.loss / num_tokens).backward()
        sums |= {"policy_loss": of_actor.loss.detach(), "clip_frac": of_actor.clip_frac,
                 "approx_kl": of_actor.approx_kl, "entropy": entropy.detach().sum()}
    gap = (logprobs.detach() - old_logprobs).abs() if "actor" in trained else torch.zeros(1)
    return sums | {"gap": gap.max() if len(gap) else torch.zeros(())}


def check_first_gap(gap: float, step: int) -> None:
    if gap > MAX_FIRST_LOG_RATIO:
        raise Stop(f"log ratio {gap} before the first update of step {step + 1}, expected at most "
                   f"{MAX_FIRST_LOG_RATIO}: training and scoring compute different things")


def token_metrics(
    episodes: list[Episode], old_logprobs: Tensor, guide_logprobs: Tensor, returns: Tensor, values: Tensor,
    mask: Tensor, *, has_critic: bool,
) -> dict[str, float]:
    """What the tokens of a step were like, over all processes."""
    learnt = [segment for e in episodes if e.status != "search_error" for segment in e.segments]
    sampled = torch.tensor([lp for segment in learnt for lp in segment.logprobs], device=mask.device)
    scored = mask & ~guide_logprobs.isnan()
    tokens, gap, kl, kl_count = sum_over_processes(
        mask.sum(), (sampled - old_logprobs[mask]).abs().sum(), masked_sum(old_logprobs - guide_logprobs, scored),
        scored.sum())
    result = {
        "rollout/sampler_gap": gap / max(1, tokens),  # mean |log-probability of the sampler - of the trainer|
        "rollout/kl_student_guide": kl / max(1, kl_count),  # per token, over the guided episodes alone
    }
    if has_critic:
        count, total, total_sq = sum_over_processes(*moments(returns, mask))
        _, error, error_sq = sum_over_processes(*moments(returns - values, mask))
        count = max(1, count)
        variance, left = total_sq / count - (total / count) ** 2, error_sq / count - (error / count) ** 2
        result["rollout/explained_variance"] = 1 - left / variance if variance > 0 else 0.0
    return result
