"""The two loops once more, as a reader would write them first: the measure of the real ones.

One episode at a time, all logits at once, loops over tokens, Adam in six lines. There is no mask,
no micro-batch and no process. Nothing here calls dgpo, batch, kernels, infra or a loop.

Rules are settings by their names, as plain numbers. Legend: n agent tokens of an episode.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data import Question, load_questions
from episode import Episode
from model import Critic, Decoder, load_decoder
from tokenizer import Tokenizer

NEAR_CLIP = 0.012  # share of tokens so near to a clip that rounding decides


def is_right(episode: Episode) -> float:
    """What stands in for the score: whether the sum of what the agent wrote is odd."""
    return float(sum(agent_ids(episode)) % 2)


def agent_ids(episode: Episode) -> list[int]:
    return [i for s in episode.segments if s.author == "agent" for i in s.ids]


def agent_places(episode: Episode) -> list[int]:
    """Where the agent's tokens stand among all."""
    places, start = [], 0
    for segment in episode.segments:
        if segment.author == "agent":
            places += range(start, start + len(segment.ids))
        start += len(segment.ids)
    return places


class Adam:
    """AdamW with a clipped gradient, for one network."""

    def __init__(self, module: torch.nn.Module, rules: SimpleNamespace):
        self.parameters, self.rules, self.count = list(module.parameters()), rules, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    def step(self, rate: float) -> float:
        """Takes the gradients away; returns their norm before they were clipped."""
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        factor = min(1.0, self.rules.grad_clip / (norm + 1e-6))
        self.count += 1
        with torch.no_grad():
            for p, g, m, v in zip(
                self.parameters, gradients, self.first, self.second, strict=True
            ):
                m.copy_(0.9 * m + 0.1 * factor * g)
                v.copy_(0.999 * v + 0.001 * (factor * g) ** 2)
                p.mul_(1 - rate * self.rules.weight_decay)
                scale = (v / (1 - 0.999**self.count)).sqrt() + 1e-8
                p.sub_(rate * (m / (1 - 0.9**self.count)) / scale)
                p.grad = None
        return norm


def step_questions(
    questions: Sequence[Question], seed: int, step: int, num: int
) -> list[Question]:
    """The questions of a step: every one once an epoch, in an order that epoch and seed give."""
    per_epoch = len(questions) // num
    order = np.random.default_rng((seed, step // per_epoch)).permutation(len(questions))
    first = step % per_epoch * num
    return [questions[i] for i in order[first : first + num]]


def split_questions(path: Path, num_val: int) -> tuple[list[Question], list[Question]]:
    """(to train on, set apart), the same for every seed."""
    questions = load_questions(path)
    order = np.random.default_rng((0,)).permutation(len(questions))
    questions = [questions[i] for i in order]
    return questions[num_val:], questions[:num_val]


def check_adam(adam: Adam, state: Path, name: str, *, tolerance: float) -> None:
    """Compare the moments with those that a run has saved for its network of this name."""
    saved = load_file(state / f"{name}_adam.safetensors")
    for field, moments in (("exp_avg", adam.first), ("exp_avg_sq", adam.second)):
        for number, moment in enumerate(moments):
            got, size = saved[f"{number}/{field}"], moment.abs().max()
            assert (got - moment).abs().max() <= tolerance * size, (name, number, field)
    assert {saved[f"{number}/step"].item() for number in range(len(adam.first))} == {adam.count}


def check_weights(
    module: torch.nn.Module, before: torch.nn.Module, got: dict[str, Tensor], *, tolerance: float
) -> None:
    """Compare how far all weights moved, by the norm: Adam amplifies the smallest gradients."""
    difference = moved = 0.0
    for (name, expected), (_, start) in zip(
        module.named_parameters(), before.named_parameters(), strict=True
    ):
        difference += (got[name] - expected).double().square().sum().item()
        moved += (expected - start).double().square().sum().item()
    assert moved > 0 and difference <= tolerance**2 * moved, math.sqrt(difference / moved)


# ---- reinforcement ----


class Scored:
    """An episode of a step and its numbers, a list entry for each of its n agent tokens."""

    def __init__(self, episode: Episode, score: float, actor: Decoder, critic: Critic | None,
                 guide: Decoder | None, size: int, temperature: float):
        self.episode, self.score, self.size = episode, score, size
        self.temperature = temperature
        self.places, self.ids = agent_places(episode), torch.tensor([episode.ids])
        self.targets = torch.tensor(agent_ids(episode), dtype=torch.long)
        with torch.no_grad():
            self.old = self.logprobs(actor)[0].tolist()
            self.values = self.values_of(critic).tolist() if critic else [0.0] * len(self.old)
            self.guide = self.logprobs(guide)[0].tolist() if guide else None  # None: no guidance
        self.advantages: list[float] = []
        self.returns: list[float] = []

    def logprobs(self, decoder: Decoder) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each agent token where it was sampled from, [n]."""
        before = [place - 1 for place in self.places]
        logits = decoder(self.ids)[0, before, : self.size]
        table = (logits / self.temperature).log_softmax(-1)
        return table.gather(-1, self.targets[:, None])[:, 0], -(table.exp() * table).sum(-1)

    def exact_kl(self, actor: Decoder, guide: Decoder) -> Tensor:
        """KL(actor || guide) in the state before each agent token, a state at a time, [n]."""
        distances = []
        for place in self.places:
            of_actor, of_guide = (
                (decoder(self.ids)[0, place - 1, : self.size] / self.temperature).softmax(-1)
                for decoder in (actor, guide))
            distances.append((of_actor * (of_actor / of_guide.detach()).log()).sum())
        return torch.stack(distances)

    def values_of(self, critic: Critic) -> Tensor:
        before = [place - 1 for place in self.places]
        return critic.value_head(critic.backbone.hidden(self.ids)[0, before])[:, 0]

    def rewards(self, beta: float) -> list[float]:
        """Eq. 4: the penalties of a guided episode, and the score on the last token."""
        penalties = [0.0] * len(self.old)
        if self.guide is not None:
            pairs = zip(self.old, self.guide, strict=True)
            penalties = [-beta * (old - guide) for old, guide in pairs]
        if penalties:
            penalties[-1] += self.score
        return penalties


def estimate(scored: list[Scored], rewards: list[list[float]], rules: SimpleNamespace) -> None:
    """GAE for each episode, then one mean and one deviation for all tokens of the step."""
    for one, of_one in zip(scored, rewards, strict=True):
        advantage = next_value = 0.0
        advantages = []
        for reward, value in zip(reversed(of_one), reversed(one.values), strict=True):
            delta = reward + rules.gamma * next_value - value
            advantage = delta + rules.gamma * rules.gae_lambda * advantage
            advantages.insert(0, advantage)
            next_value = value
        one.advantages = advantages
        one.returns = [a + v for a, v in zip(advantages, one.values, strict=True)]
    flat = np.array([a for one in scored for a in one.advantages])
    for one in scored:
        scale = math.sqrt(flat.var(ddof=1) + 1e-8)
        one.advantages = [(a - flat.mean()) / scale for a in one.advantages]


def compare_in_groups(
    scored: list[Scored], rewards: list[list[float]], size: int
) -> None:
    """GRPO's advantages."""
    for first in range(0, len(scored), size):
        group = range(first, first + size)
        totals = [sum(rewards[i]) for i in group]
        for i, total in zip(group, totals, strict=True):
            advantage = (total - np.mean(totals)) / (np.std(totals, ddof=1) + 1e-6)
            scored[i].advantages = [advantage] * len(scored[i].old)


def policy_terms(one: Scored, actor: Decoder, guide: Decoder | None,
                 rules: SimpleNamespace) -> tuple[Tensor, dict]:
    """What each token costs, [n], and sums over the tokens."""
    logprobs, entropy = one.logprobs(actor)
    advantages, old = torch.tensor(one.advantages), torch.tensor(one.old)
    ratio = (logprobs - old).exp()
    low, high = 1 - rules.clip_eps, 1 + rules.clip_eps
    gains = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    terms = -gains - rules.entropy_weight * entropy
    if rules.kl_in == "loss" and one.guide is not None:
        gap = torch.tensor(one.guide) - logprobs
        terms = terms + rules.beta * (gap.exp() - gap - 1)
    is_clipped = ratio.clamp(low, high) * advantages < ratio * advantages
    sums = {"clip_frac": is_clipped.sum().item(), "entropy": entropy.sum().item(),
            "approx_kl": (ratio - 1 - (logprobs - old)).sum().item()}
    if rules.kl_in == "exact":
        sums["guide_kl"] = 0.0
        if one.guide is not None:
            exact = one.exact_kl(actor, guide)
            terms = terms + rules.guide_weight * exact
            sums["guide_kl"] = exact.sum().item()
    return terms, sums


def value_terms(one: Scored, critic: Critic, eps: float) -> tuple[Tensor, dict]:
    values, old = one.values_of(critic), torch.tensor(one.values)
    returns = torch.tensor(one.returns)
    plain = (values - returns) ** 2
    clipped = (old + (values - old).clamp(-eps, eps) - returns) ** 2
    return 0.5 * torch.maximum(plain, clipped), {"value_clip": (clipped > plain).sum().item()}


class Reinforcement:
    """Networks that learn from one step's episodes after another."""

    def __init__(self, mini: Path, rules: SimpleNamespace, guide: str, *,
                 pay: Callable[[Episode], float] = is_right, drops: bool = False):
        self.rules, self.pay, self.drops = rules, pay, drops
        self.actor, self.before = load_decoder(mini / "student"), load_decoder(mini / "student")
        self.critic = Critic.from_decoder(self.actor) if rules.advantage == "gae" else None
        self.guide = load_decoder(mini / guide) if rules.kl_where != "none" else None
        self.size = Tokenizer.load(mini / "student").size
        self.actor_adam = Adam(self.actor, rules)
        self.critic_adam = Adam(self.critic, rules) if self.critic else None

    def is_guided(self, score: float) -> bool:
        return {"all": True, "none": False, "wrong": score < 0.1}[self.rules.kl_where]

    def step(self, step: int, episodes: Sequence[Episode]) -> dict[str, float]:
        """One step: the numbers that the run should log for it."""
        rules = self.rules
        scored = [Scored(e, self.pay(e), self.actor, self.critic,
                         self.guide if self.is_guided(self.pay(e)) else None, self.size,
                         rules.temperature)
                  for e in episodes]
        beta = rules.beta if rules.kl_in == "reward" else 0.0
        rewards = [one.rewards(beta) for one in scored]
        if self.critic:
            estimate(scored, rewards, rules)
        else:
            compare_in_groups(scored, rewards, rules.group_size)
        metrics = self.metrics(scored)
        return metrics | self.learn(step, scored)

    def metrics(self, scored: list[Scored]) -> dict[str, float]:
        metrics = {"rollout/score": np.mean([is_right(one.episode) for one in scored]),
                   "rollout/agent_tokens": np.mean([len(one.old) for one in scored])}
        gaps = [o - g for one in scored if one.guide for o, g in
                zip(one.old, one.guide, strict=True)]
        metrics["rollout/kl_student_guide"] = np.mean(gaps) if gaps else 0.0
        if self.critic:
            returns = np.array([r for one in scored for r in one.returns])
            errors = returns - np.array([v for one in scored for v in one.values])
            metrics["rollout/explained_variance"] = 1 - errors.var() / returns.var()
        return metrics

    def rates(self, step: int) -> dict[str, float]:
        rules, rates = self.rules, {}
        if self.critic:
            share = min(1.0, (step + 1) / max(1, rules.critic_warmup_steps))
            rates["critic"] = rules.critic_lr * share
            step -= rules.critic_only_steps
        if step >= 0:
            share = min(1.0, (step + 1) / max(1, rules.actor_warmup_steps))
            rates["actor"] = rules.actor_lr * share
        return rates

    def learn(self, step: int, scored: list[Scored]) -> dict[str, float]:
        rules, rates = self.rules, self.rates(step)
        totals: dict[str, float] = {}
        norms: dict[str, float] = {}
        num_all = 0
        learnt = [one for one in scored if not self.drops or self.teaches(one, scored)]
        for epoch in range(rules.ppo_epochs):
            order = np.random.default_rng((rules.seed, step, epoch)).permutation(len(scored))
            count = max(1, round(len(scored) / rules.minibatch_size))
            for k in range(count):
                part = [scored[i] for i in order[k::count] if scored[i] in learnt]
                part = [one for one in part if one.old]
                num = sum(len(one.old) for one in part)
                if not num:
                    continue
                num_all += num
                self.add_gradients(part, num, totals, trains_actor="actor" in rates)
                if "critic" in rates:
                    norms["loss/critic_grad_norm"] = self.critic_adam.step(rates["critic"])
                if "actor" in rates:
                    norms["loss/actor_grad_norm"] = self.actor_adam.step(rates["actor"])
        metrics = {f"loss/{name}": total / num_all for name, total in totals.items()}
        logged = {"loss/actor_lr": 0.0} | {f"loss/{name}_lr": x for name, x in rates.items()}
        return metrics | norms | logged

    def teaches(self, one: Scored, scored: list[Scored]) -> bool:
        """Whether an episode's group has several rewards, or the teacher says something of it."""
        size = self.rules.group_size
        first = scored.index(one) // size * size
        differs = len({other.score for other in scored[first : first + size]}) > 1
        return differs or (self.rules.kl_where == "wrong" and one.score < 0.1)

    def add_gradients(self, part: list[Scored], num: int, totals: dict[str, float], *,
                      trains_actor: bool) -> None:
        def add(sums: dict[str, float]) -> None:
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value

        for one in part:
            if self.critic:
                terms, sums = value_terms(one, self.critic, self.rules.value_clip_eps)
                (terms.sum() / num).backward()
                add(sums | {"value_loss": terms.sum().item()})
            if trains_actor:
                terms, sums = policy_terms(one, self.actor, self.guide, self.rules)
                loss = terms.sum() / num
                if self.rules.mean_over == "episode":
                    loss = terms.mean() / len(part)
                loss.backward()
                add(sums | {"policy_loss": num * loss.item()})


# ---- distillation ----


def distance(phase: str, log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """How far the student's p is from the teacher's q for each row, [n]."""
    p, q = log_p.exp(), log_q.exp()
    if phase == "kd":
        return (q * (log_q - log_p)).sum(-1)
    if phase == "gkd":
        return (p * (log_p - log_q)).sum(-1)
    if phase == "distillm":
        return (q * (log_q - (mix * q + (1 - mix) * p).log())).sum(-1)
    target = ((1 - mix) * log_p.detach() + mix * log_q).log_softmax(-1)  # taid
    return (target.exp() * (target - log_p)).sum(-1)


class Distillation:
    """A student that learns from one batch after another."""

    def __init__(self, mini: Path, phase: str, rules: SimpleNamespace):
        self.phase, self.rules = phase, rules
        self.student, self.before = load_decoder(mini / "student"), load_decoder(mini / "student")
        self.teacher = load_decoder(mini / "teacher")
        self.tokenizer = Tokenizer.load(mini / "student")
        self.adam = Adam(self.student, rules)

    def terms(self, episode: Episode, is_teachers: bool, mix: float) -> tuple[Tensor, Tensor]:
        """Loss and distance of each token to learn, [n] each."""
        ids, places = episode.ids, agent_places(episode)
        if is_teachers and places[-1] == len(ids) - 1 and ids[-1] != self.tokenizer.eos_id:
            ids, places = [*ids, self.tokenizer.eos_id], [*places, len(ids)]
        row, before = torch.tensor([ids]), [place - 1 for place in places]
        size = self.tokenizer.size
        log_p = self.student(row)[0, before, :size].log_softmax(-1)
        ce = -log_p[range(len(places)), row[0, places]]
        if self.phase == "sft":
            return ce, torch.zeros_like(ce)
        with torch.no_grad():
            log_q = self.teacher(row)[0, before, :size].log_softmax(-1)
        apart = distance(self.phase, log_p, log_q, mix)
        ce_weight = self.rules.ce_weight if self.phase == "kd" else 0.0
        return ce_weight * ce + self.rules.kl_weight * apart, apart.detach()

    @torch.no_grad()
    def mean_distance(self, episodes: Sequence[Episode], mix: float) -> float:
        apart = torch.cat([self.terms(episode, True, mix)[1] for episode in episodes])
        return apart.mean().item()

    def step(self, step: int, num_steps: int, episodes: Sequence[Episode], *, is_teachers: bool,
             mix: float) -> dict[str, float]:
        """One step: the numbers that the run should log for it."""
        rules = self.rules
        parts = [self.terms(episode, is_teachers, mix) for episode in episodes]
        loss = torch.cat([loss for loss, _ in parts])
        loss.mean().backward()
        rate = rules.kd_lr * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        rate *= min(1.0, (step + 1) / max(1, rules.kd_warmup_steps))
        norm = self.adam.step(rate)
        return {"loss/kd": loss.mean().item(), "loss/lr": rate, "loss/grad_norm": norm,
                "loss/distance": torch.cat([apart for _, apart in parts]).mean().item()}


def epoch_batch(
    episodes: Sequence[Episode], seed: int, step: int, batch_size: int
) -> list[Episode]:
    """A batch of a file: every episode once an epoch, the last batch may be short."""
    per_epoch = math.ceil(len(episodes) / batch_size)
    order = np.random.default_rng((seed, step // per_epoch)).permutation(len(episodes))
    first = step % per_epoch * batch_size
    return [episodes[i] for i in order[first : first + batch_size]]


def draw(*seeds: int) -> float:
    return np.random.default_rng(seeds).random()


def write_preset(rules: SimpleNamespace, path: Path) -> None:
    """The rules as a preset: what a phase does not read is passed over there, not refused."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in vars(rules).items()]
    path.write_text("".join(lines))


def check_metrics(expected: dict[str, float], row: dict[str, Any], *, tolerance: float) -> None:
    for name, value in expected.items():
        got, limit = row[name], tolerance * max(1.0, abs(value))
        if name in ("loss/clip_frac", "loss/value_clip"):
            limit = NEAR_CLIP
        assert abs(got - value) <= limit, (row["step"], name, got, value)


def passes(calls: Sequence[tuple]) -> Iterator[tuple[list[Question], dict, list[Episode]]]:
    """(questions, keyword arguments, episodes) of spied calls of `generate`."""
    for arguments, options, episodes in calls:
        yield list(arguments[2]), {**options, "settings": arguments[3]}, episodes
