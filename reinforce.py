"""Loop two, reinforce: PPO with a critic, GRPO without (Eq. 2 to 4).

Legend: B episodes, T tokens, N response tokens of a pass, G episodes of a group.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import dgpo
from batch import Batch, Packed, collate, pack, response_rows
from episode import Episode, episode_text
from infra.parallel import means, micro_batches, row_weights, shuffled, sum_over_processes
from infra.run import Run, warm_up
from kernels import head_divergence, head_logprobs
from model import Critic
from rollout import Policy
from sampling import episode_metrics, play, validate
from session import Session, Task, save_policy, shard_models
from settings import TrainSettings


class Models(NamedTuple):
    actor: Policy
    critic: Critic | None  # None: GRPO
    guide: Policy | None  # the teacher, or the initial policy; None: no KL


GuideRows = dict[int, Tensor]  # guided episode -> hidden states of its n response tokens [n, D]


class Tokens(NamedTuple):
    """One number a token: [B, T] for a step, [N] for the response tokens of a pass."""
    old_logprobs: Tensor
    guide_logprobs: Tensor  # NaN in episodes that are not guided
    old_values: Tensor  # 0 without a critic
    advantages: Tensor
    returns: Tensor


def reinforce(run: Run, settings: TrainSettings, student: Policy, guide: Policy | None,
              session: Session, task: Task) -> None:
    """Train the student, and a critic if GAE needs one, for settings.steps rollout batches."""
    critic = Critic.from_decoder(student.decoder) if settings.advantage == "gae" else None
    models, networks = Models(student, critic, guide), {"actor": student.decoder}
    shard_models(settings, student, guide, critic)
    if critic is not None:
        networks["critic"] = critic
    group_size = settings.group_size
    num_questions = settings.episodes_per_step // group_size
    export = partial(save_policy, student, run.dir)
    # Questions count, not episodes: those of a group succeed and fail together.
    watch = partial(run.stop_if_collapsed, student.decoder, export, num_questions,
                    "rollout/reward" if task.reward else "rollout/score")
    cap = settings.importance_cap
    if cap is None:  # in fp32 sampler and trainer agree
        cap = 2.0 if student.dtype == torch.bfloat16 else 0.0
    run.start(settings.steps, settings.minibatch_size, networks)
    watch()  # the steps that a resumed run has done
    for step in run.steps():
        # 1. rollout: this process's share of the step's questions
        with run.timed("rollout_s"):
            episodes, offset = play(
                run, settings, student, session, task, step, settings.episodes_per_step)
        # 2. score: Eq. 3, or the task's reward; the guide scores tokens where Eq. 4 needs it
        batch = collate(episodes, pad_id=student.tokenizer.pad_id).to(run.device)
        rewards = task.reward(episodes) if task.reward else [e.score for e in episodes]
        scores = torch.tensor(rewards, device=run.device)  # [B]
        guided = dgpo.guided_episodes(scores, settings.kl_where)  # [B]
        with run.timed("score_s"):
            tokens, guide_rows = score_tokens(models, batch, guided.tolist(), settings)
        # 3. rewards and advantages: Eq. 4, then GRPO's, or GAE's whitened over all processes
        mask = batch.response_mask
        rewards = dgpo.kl_rewards(
            scores, tokens.old_logprobs, tokens.guide_logprobs, mask, beta=settings.beta,
            where=settings.kl_where if settings.kl_in == "reward" else "none")
        if critic is None:
            advantages, returns = dgpo.group_advantages(rewards, mask, group_size), tokens.returns
        else:
            advantages, returns = dgpo.gae(rewards, tokens.old_values, mask, gamma=settings.gamma,
                                           gae_lambda=settings.gae_lambda)
            sums = sum_over_processes(*dgpo.moments(advantages, mask))
            stats = dgpo.Moments(*torch.tensor(sums, dtype=torch.float64, device=mask.device))
            advantages = dgpo.whiten(advantages, mask, stats=stats)
        if cap:
            sampled = spread(sampled_logprobs(episodes).to(mask.device), mask)  # [B, T]
            advantages = advantages * dgpo.importance_weights(
                tokens.old_logprobs, sampled, mask, cap=cap)
        tokens = tokens._replace(advantages=advantages, returns=returns)
        metrics = episode_metrics(episodes)
        metrics |= token_metrics(episodes, tokens, mask, critic is not None)
        if task.reward:
            sums = {"reward": scores.sum().item()}
            sums |= task.report(episodes) if task.report else {}
            sums["equal_groups"] = group_size * equal_groups(scores, group_size).sum().item()
            metrics |= means("rollout", sums, len(episodes))
        if task.drop_equal_groups:
            # The teacher has something to say about wrong episodes, even if a group has no other.
            kept = guided & (settings.kl_where == "wrong")
            batch = drop_equal_groups(batch, scores, group_size, kept)
        # 4. updates: Eq. 2 and the critic, one global mini-batch at a time
        with run.timed("update_s"):
            losses, num_tokens, passes = learn(
                run, settings, models, batch, tokens, guide_rows, step, offset)
        # 5. log, validate, save
        metrics |= losses | validate(run, settings, student, session, task, step + 1)
        run.log(step + 1, metrics, num_tokens=num_tokens, passes=passes)
        run.sample(step + 1, (episode_text(e, student.tokenizer) for e in episodes[:3]))
        watch()
    run.finish(student.decoder, export)


def token_logprobs(policy: Policy, packed: Packed, hidden: Tensor,
                   temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token at the temperature that sampled it.

    hidden [N, D]: response_rows of the policy.
    """
    targets = packed.ids[packed.response_mask]
    return head_logprobs(hidden, policy.head, targets, temperature=temperature)


@torch.no_grad()
def score_tokens(models: Models, batch: Batch, guided: list[bool],
                 settings: TrainSettings) -> tuple[Tokens, GuideRows]:
    """old_logprobs, old_values and guide_logprobs of a step; the advantages are still missing."""
    guide_rows: GuideRows = {}
    old_logprobs, values = torch.zeros(2, *batch.ids.shape, device=batch.ids.device)
    guide_logprobs = torch.full_like(values, torch.nan)
    mask, lengths = batch.response_mask, batch.lengths()
    for group in micro_batches(lengths, settings.micro_batch_tokens):
        packed = pack(batch, group, lengths)
        hidden = response_rows(models.actor.decoder, packed)
        old, _ = token_logprobs(models.actor, packed, hidden, settings.temperature)
        old_logprobs[group] = spread(old, mask[group])
        if models.critic is not None:
            values_of_pass = models.critic.values(packed.ids, packed.documents)
            values[group] = spread(values_of_pass[packed.response_mask], mask[group])
    rows = [i for i, is_guided in enumerate(guided) if is_guided and models.guide is not None]
    for group in micro_batches(lengths, settings.micro_batch_tokens, rows):
        packed = pack(batch, group, lengths)
        hidden = response_rows(models.guide.decoder, packed)
        logprobs, _ = token_logprobs(models.guide, packed, hidden, settings.temperature)
        guide_logprobs[group] = spread(logprobs, mask[group])
        if settings.kl_in == "exact":
            guide_rows |= zip(group, hidden.split(mask[group].sum(1).tolist()), strict=True)
    tokens = Tokens(old_logprobs, guide_logprobs, values, advantages=values, returns=values)
    return tokens, guide_rows


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """x at the True places of the mask, 0 elsewhere: [N], [B, T] -> [B, T]."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x)


def sampled_logprobs(episodes: list[Episode]) -> Tensor:
    """What the sampler gave to the response tokens, [N]."""
    segments = [s for e in episodes if e.status != "search_error" for s in e.segments]
    return torch.tensor([logprob for s in segments for logprob in s.logprobs])


def token_metrics(episodes: list[Episode], tokens: Tokens, mask: Tensor,
                  has_critic: bool) -> dict[str, float]:
    """What the tokens of a step were like, over all processes."""
    old, guide, returns = tokens.old_logprobs, tokens.guide_logprobs, tokens.returns
    sampled = sampled_logprobs(episodes).to(mask.device)
    gap = (sampled - old[mask]).abs().sum().item()  # between sampler and trainer, nats
    metrics = means("rollout", {"sampler_gap": gap}, mask.sum().item())
    guided = mask & ~guide.isnan()
    kl = dgpo.masked_sum(old - guide, guided).item()  # nats
    metrics |= means("rollout", {"kl_student_guide": kl}, guided.sum().item())
    if has_critic:
        errors = returns - tokens.old_values
        _, total, total_sq = sum_over_processes(*dgpo.moments(returns, mask))
        count, error, error_sq = sum_over_processes(*dgpo.moments(errors, mask))
        count = max(1, count)
        variance = total_sq / count - (total / count) ** 2
        residual = error_sq / count - (error / count) ** 2
        # Null in the log where fp32's rounding over thousands of tokens is all that varies.
        is_real = variance > 1e-10 * (total_sq + error_sq) / count
        metrics["rollout/explained_variance"] = 1 - residual / variance if is_real else torch.nan
    return metrics


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """Groups with equal rewards, from which nothing can be learnt: [B] -> [B / G] bool."""
    groups = scores.view(-1, group_size)
    return (groups == groups[:, :1]).all(1) & (group_size > 1)


def drop_equal_groups(batch: Batch, scores: Tensor, group_size: int, kept: Tensor) -> Batch:
    """Mask groups with equal rewards, which would dilute the mean, except `kept` episodes [B]."""
    dropped = equal_groups(scores, group_size).repeat_interleave(group_size) & ~kept  # [B]
    return batch._replace(response_mask=batch.response_mask & ~dropped[:, None])


def learning_rates(settings: TrainSettings, step: int, has_critic: bool) -> dict[str, float]:
    """The rate of each network that a step trains, after a linear warm-up."""
    rates = {}
    if has_critic:
        rates["critic"] = settings.critic_lr * warm_up(step, settings.critic_warmup_steps)
        step -= settings.critic_only_steps
    if step >= 0:
        rates["actor"] = settings.actor_lr * warm_up(step, settings.actor_warmup_steps)
    return rates


def learn(run: Run, settings: TrainSettings, models: Models, batch: Batch, tokens: Tokens,
          guide_rows: GuideRows, step: int,
          offset: int) -> tuple[dict[str, float], float, int]:
    """The updates of a step: (metrics, response tokens, passes of this process).

    offset: the number of this process's first episode among the episodes of all processes.
    """
    from infra.guards import check_first_ratio  # here, because `import train` should load little
    mask, lengths = batch.response_mask, batch.lengths()
    rates = learning_rates(settings, step, models.critic is not None)
    num_episodes = settings.episodes_per_step
    num_minibatches = max(1, round(num_episodes / settings.minibatch_size))
    passes: list[dict[str, Tensor]] = []  # sums over the tokens of each
    norms, first_gap, total_tokens = {}, 0.0, 0.0
    for epoch in range(settings.ppo_epochs):
        order = shuffled(num_episodes, settings.seed, step, epoch)  # of all processes
        for k in range(num_minibatches):
            rows = [i - offset for i in order[k::num_minibatches] if 0 <= i - offset < len(mask)]
            num_tokens, num_rows = sum_over_processes(mask[rows].sum(), mask[rows].any(1).sum())
            if not num_tokens:  # an update would follow old momentum and weight decay alone
                continue
            total_tokens += num_tokens
            gaps = []  # log ratios of each pass
            for group in micro_batches(lengths, settings.micro_batch_tokens, rows):
                numbers = Tokens(*(x[group][mask[group]] for x in tokens))  # [N]
                weights = (1.0 if settings.mean_over == "token" else
                           row_weights(mask[group], num_tokens, num_rows))  # [N]
                of_guide = [guide_rows[i] for i in group if i in guide_rows and mask[i].any()]
                sums, gap = backward(models, pack(batch, group, lengths), numbers, of_guide,
                                     weights, num_tokens, settings, trains_actor="actor" in rates)
                passes.append(sums)
                gaps.append(gap)
            if epoch == k == 0:
                first_gap = check_first_ratio(torch.cat(gaps), step + 1, models.actor.dtype)
            norms = {f"loss/{name}_grad_norm": run.update(name, rates[name]) for name in rates}
    metrics = {}
    if passes:
        names = [*passes[0]]
        totals = sum_over_processes(*(sum(x[name].double() for x in passes) for name in names))
        metrics = {f"loss/{n}": x / total_tokens for n, x in zip(names, totals, strict=True)}
    metrics |= norms  # of the last mini-batch
    metrics |= {"loss/skipped": run.count_skipped(), "loss/first_log_ratio": first_gap}
    metrics |= {"loss/actor_lr": 0.0} | {f"loss/{name}_lr": rate for name, rate in rates.items()}
    return metrics, total_tokens / settings.ppo_epochs, len(passes)


def backward(models: Models, packed: Packed, tokens: Tokens, guide_rows: list[Tensor],
             weights: Tensor | float, num_tokens: float, settings: TrainSettings, *,
             trains_actor: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Add the gradients of a pass; returns (sums over its tokens, log ratios of the policy)."""
    mask = torch.ones_like(tokens.advantages, dtype=torch.bool)  # [N], all are response tokens
    sums, gap = {}, torch.zeros_like(tokens.old_logprobs)
    if models.critic is not None:
        values = models.critic.values(packed.ids, packed.documents)[packed.response_mask]
        of_critic = dgpo.value_loss(
            values, tokens.old_values, tokens.returns, mask, clip_eps=settings.value_clip_eps)
        (of_critic.loss / num_tokens).backward()
        sums |= {"value_loss": of_critic.loss.detach(), "value_clip": of_critic.clip_frac}
    if trains_actor:
        hidden, penalty = response_rows(models.actor.decoder, packed), None
        logprobs, entropy = token_logprobs(models.actor, packed, hidden, settings.temperature)
        if settings.kl_in in ("loss", "loss_k2") and settings.beta != 0:
            kind = "k3" if settings.kl_in == "loss" else "k2"
            kl = dgpo.kl_penalty(logprobs, tokens.guide_logprobs, mask, kind=kind)
            penalty = settings.beta * kl
        of_actor = dgpo.policy_loss(
            logprobs, tokens.old_logprobs, tokens.advantages, mask, clip_eps=settings.clip_eps,
            entropy=entropy, entropy_weight=settings.entropy_weight, penalty=penalty)
        loss = (weights * of_actor.terms).sum()
        if settings.kl_in == "exact":
            sums["guide_kl"] = torch.zeros_like(loss)
        if guide_rows:  # Eq. 4's KL: its sum over the guided tokens, divided by those of all
            guided = ~tokens.guide_logprobs.isnan()  # [N]
            targets = packed.ids[packed.response_mask][guided]
            kl, _ = head_divergence(
                dgpo.exact_kl, hidden[guided], models.actor.head, torch.cat(guide_rows),
                models.guide.head, targets, temperature=settings.temperature)
            loss, sums["guide_kl"] = loss + settings.guide_weight * kl, kl.detach()
        (loss / num_tokens).backward()
        sums |= {"policy_loss": loss.detach(), "clip_frac": of_actor.clip_frac,
                 "approx_kl": of_actor.approx_kl, "entropy": entropy.detach().sum()}
        gap = logprobs.detach() - tokens.old_logprobs
    return sums, gap
