"""Learning: one loop distils (sft, kd), one reinforces (ppo, dgpo).

    torchrun train.py --phase kd        cold start: distil the teacher's correct episodes (Eq. 1)
    torchrun train.py --phase dgpo      PPO with a search engine in the loop, teacher on wrong episodes (Eq. 2-4)

Phases
    episodes  the teacher answers training questions; what it answers correctly is kept on disk
    sft       cross-entropy alone, on episodes of any origin (SeqKD: the teacher's)    -> distil
    kd        Eq. 1 against the teacher's full distribution                            -> distil
    taid      KL to a target that moves from the student to the teacher                -> distil
    gkd       reverse KL on what the student writes now                                -> distil
    distillm  skew KL; what the student writes comes in as it is needed, and is kept   -> distil
    ppo       guide = the initial policy, on all episodes (Search-R1)                  -> reinforce
    grpo      the same with advantages within a question's group, no critic            -> reinforce
    dgpo      guide = the teacher, on wrong episodes (Eq. 4)                           -> reinforce
    bard-data a teacher's chains of thought, compressed to several budgets (bard.py)
    bard-sft  sft on them                                                              -> distil
    bard-rl   grpo, rewarded for being right within the budget                         -> reinforce
    qagent    grpo, rewarded for what a frozen generator makes of the passages (qagent.py) -> reinforce

Departures from the official code, with reasons
 1. Losses are one mean over the mini-batch's response tokens, whatever the number of processes and
    micro-batches; the official code averages the means of its micro-batches.
 2. The learning rate of step k of a warm-up of N is lr (k+1)/N; the official schedule starts at exactly 0.
 3. The teacher scores wrong episodes alone; the official code scores all and multiplies by zero.
 4. Weights are fp32 (a step of 1e-6 vanishes in bf16).

Legend: B episodes, T tokens, V vocabulary, D width, N response tokens.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import bard
import config
import qagent
from bard import BardSettings
from collapse import signs_of_collapse
from config import setting
from data import Question, check_budget, draw_budgets, hit
from dgpo import (
    Moments,
    Taid,
    distillm_author,
    distillm_share,
    gae,
    group_advantages,
    kd_loss,
    kl_rewards,
    masked_sum,
    moments,
    policy_loss,
    taid_update,
    value_loss,
    whiten,
    wrong_episodes,
)
from episode import Batch, Episode, Packed, collate, load_episodes, num_thinking_tokens, pack
from kernels import head_divergence, head_logprobs
from model import Critic, Decoder, Tokenizer, load_decoder, shift
from parallel import end_processes, in_step, shard, start_processes, sum_over_processes, update, whole
from play import episode_metrics, play, read_generated, shuffled, split_questions, write_episodes, write_generated
from qagent import QAgentSettings, collected, is_well_formed
from retriever import Retriever
from rollout import Policy, generate
from run import Collapse, Run, Stop

DISTIL = ("sft", "bard-sft", "kd", "taid", "gkd", "distillm")  # the first two without a teacher
REINFORCE = ("ppo", "grpo", "bard-rl", "qagent", "dgpo")
GROUPED = ("grpo", "bard-rl", "qagent")  # without a critic, unless --advantage says otherwise
SKIPPING = ("bard-rl", "qagent")  # groups whose episodes are all worth the same
PHASES = ("episodes", "bard-data", *DISTIL, *REINFORCE)
DISTANCES = {"taid": "taid", "gkd": "reverse", "distillm": "skew"}  # from the teacher; of every other phase: forward
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "world.toml"
COLLAPSED = 3  # exit status of a run that has collapsed and left its best weights
# Before the first update the policy is the one that acted. Two layers stay below 1e-5 (a test); the largest gap seen in
# 400 steps of the embedded world's models was 2.6e-5. The size is logged; a real mismatch stops the run.
MAX_FIRST_LOG_RATIO = 1e-4


@dataclass
class TrainSettings(BardSettings, QAgentSettings):
    phase: str = setting("kd", "what to run", choices=PHASES)
    run_dir: str = setting("", "where the run writes; empty: runs/<phase>")
    resume: bool = setting(False, "continue the run in run_dir from its newest state, or start it where there is none")
    overwrite: bool = setting(False, "start again in a run_dir that already holds a run")
    seed: int = setting(0, "order of the data and sampling noise")
    device: str = setting("auto", "cpu, cuda, mps; auto: cuda where there is one")
    student: str = setting("", "checkpoint to start from (folder or hub id)")
    teacher: str = setting("", "checkpoint that guides (folder or hub id)")
    teacher_dtype: str = setting("float32", "dtype of teacher and generator", choices=("float32", "bfloat16"))
    questions: str = setting("", "training questions, JSONL")
    val_size: int = setting(256, "training questions set apart to measure progress; never trained on")
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    episodes: str = setting("runs/episodes.jsonl", "teacher episodes; phase kd makes them when absent")
    num_episode_questions: int = setting(0, "questions the teacher is asked; 0: all")
    # distil (paper Table 8, TAID's defaults)
    epochs: float = setting(5, "passes over the episodes")
    batch_size: int = setting(64, "episodes per optimizer step")
    kd_lr: float = setting(1e-4, "peak learning rate of sft and kd, cosine to 0")
    kd_warmup_steps: int = setting(0, "linear warm-up of sft and kd")
    ce_weight: float = setting(1.0, "kd: weight of the cross-entropy in Eq. 1 (official code: 0)")
    kl_weight: float = setting(1.0, "lambda of Eq. 1")
    distance: str = setting("", "from the teacher; empty: forward for kd, reverse for gkd, skew for distillm",
                            choices=("", "forward", "reverse", "skew", "skew_reverse", "jsd"))
    mix: float = setting(0.1, "share of the target in a skew divergence (Table 8), of the teacher in jsd")
    student_share: float = setting(1.0, "gkd: share of batches that the student writes (its lambda)")
    share_tolerance: float = setting(0.0, "distillm: rise of the held-out loss that lets the student write more")
    buffer_size: int = setting(1000, "distillm: newest episodes of the student that batches are drawn from")
    taid_start: float = setting(0.4, "taid: first t (Table 8)")
    taid_end: float = setting(1.0, "taid: last t (Table 8)")
    taid_alpha: float = setting(5e-4, "taid: size of an adaptive change of t (Table 8)")
    taid_beta: float = setting(0.99, "taid: momentum of the loss's relative change (Table 8)")
    until_score: float = setting(0.0, "end kd once the sampled validation score reaches this; 0: never")
    # reinforce (paper Table 8; the rest from the official scripts)
    steps: int = setting(1000, "rollout batches; also the updates of gkd")
    prompts_per_step: int = setting(512, "episodes per rollout batch")
    minibatch_size: int = setting(256, "episodes per optimizer step")
    ppo_epochs: int = setting(1, "passes over a rollout batch")
    actor_lr: float = setting(1e-6, "learning rate of the actor")
    critic_lr: float = setting(1e-5, "learning rate of the critic")
    actor_warmup_steps: int = setting(285, "linear warm-up (official: 0.285 of the steps)")
    critic_warmup_steps: int = setting(15, "linear warm-up (official: 0.015 of the steps)")
    critic_only_steps: int = setting(0, "first steps that train the critic alone")
    beta: float = setting(0.001, "beta of Eq. 4")
    kl_where: str = setting("", "episodes with KL; empty: wrong for dgpo, else all; bard-rl and qagent with 'wrong' "
                            "are guided by the teacher, too",
                            choices=("", "wrong", "all", "none"))
    kl_in: str = setting("reward", "the KL of Eq. 4 is a reward, as in PPO, or a loss (k3), as in GRPO's paper",
                         choices=("reward", "loss"))
    mean_over: str = setting("token", "the policy's loss is a mean over tokens, or over episodes' means (GRPO's paper)",
                             choices=("token", "episode"))
    advantage: str = setting("", "gae: from a critic; group: GRPO; empty: group for grpo, gae for ppo and dgpo",
                             choices=("", "gae", "group"))
    group_size: int = setting(5, "group: episodes of one question")
    gamma: float = setting(1.0, "discount")
    gae_lambda: float = setting(1.0, "lambda of GAE")
    clip_eps: float = setting(0.2, "epsilon of Eq. 2")
    value_clip_eps: float = setting(0.5, "clip of the critic's change")
    entropy_weight: float = setting(0.001, "weight of the entropy bonus")
    stop_on_collapse: bool = setting(True, "end a run whose score has halved, and leave its best weights")
    # both
    weight_decay: float = setting(0.01, "AdamW")
    grad_clip: float = setting(1.0, "largest norm of a gradient")
    micro_batch_tokens: int = setting(16384, "tokens per forward pass; lower it when memory runs out")
    checkpointing: bool = setting(False, "compute activations again in backward: less memory, a third more time")
    eval_every: int = setting(50, "steps between validations; 0: never")
    save_every: int = setting(50, "steps between saved states; 0: only the result")
    max_minutes: float = setting(0.0, "end after this time, as if the steps were done; 0: never")
    shard: str = setting("none", "split weights, gradients and Adam over the processes: of student and critic, or of "
                         "the teacher, too", choices=("none", "student", "all"))
    timeout_minutes: float = setting(60.0, "a process that waits longer for another one ends the job")


# ---- batches ----


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in order, grouped so that the lengths of a group sum to at most max_tokens (at least one row)."""
    group, total = [], 0
    for i, length in enumerate(lengths):
        if group and total + length > max_tokens:
            yield group
            group, total = [], 0
        group.append(i)
        total += length
    if group:
        yield group


def response_rows(decoder: Decoder, packed: Packed) -> Tensor:
    """Hidden states that predict the response tokens: [N, D], in the order of packed.ids[response_mask]."""
    hidden = decoder.hidden(packed.ids, documents=packed.documents)
    return shift(hidden, packed.documents)[packed.response_mask]


def token_logprobs(policy: Policy, packed: Packed) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token, nats: two [N]."""
    return head_logprobs(response_rows(policy.decoder, packed), policy.head, packed.ids[packed.response_mask])


# ---- loop one: distil ----


def distil_loss(
    student: Policy, teacher: Policy | None, packed: Packed, *,
    ce_weight: float = 1.0, kl_weight: float = 1.0, kind: str = "forward", mix: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Eq. 1, summed over the response tokens: (loss [], distance from the teacher [], without gradient).

    kind, mix: dgpo.divergence; without a teacher the cross-entropy alone.
    """
    targets = packed.ids[packed.response_mask]
    rows = response_rows(student.decoder, packed)  # [N, D]
    if teacher is None:
        loss = -head_logprobs(rows, student.head, targets)[0].sum()
        return loss, torch.zeros_like(loss)
    with torch.no_grad():
        teacher_rows = response_rows(teacher.decoder, packed)  # [N, D of the teacher]
    loss, distance = head_divergence(
        kd_loss, rows, student.head, teacher_rows, teacher.head, targets,
        ce_weight=ce_weight, kl_weight=kl_weight, kind=kind, mix=mix,
    )
    return loss, distance.sum()


def distil(
    run: Run, student: Policy, teacher: Policy | None, episodes: list[Episode],
    retriever: Retriever | None, questions: list[Question], validate,
) -> None:
    """Supervised on episodes: the teacher's (sft, kd, taid), the student's own (gkd), or both (distillm)."""
    settings, phase = run.settings, run.settings.phase
    parameters = list(student.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.kd_lr, weight_decay=settings.weight_decay)
    held_out, episodes = split_held_out(episodes) if phase == "distillm" else ([], episodes)
    per_epoch = math.ceil(len(episodes) / settings.batch_size)
    num_steps = settings.steps if phase == "gkd" else max(1, round(per_epoch * settings.epochs))
    run.method = {"taid": Taid(settings.taid_start), "share": 0.0, "reference": None}
    first = run.start(num_steps, settings.batch_size, {"student": student.decoder}, {"student_adam": optimizer})
    buffer = read_generated(run, first, student.tokenizer) if phase == "distillm" else []
    for step in range(first, num_steps):
        if run.score is not None and 0 < settings.until_score <= run.score:
            run.say(f"sampled validation score {run.score:.3f} reached {settings.until_score}")
            break
        progress, method = step / num_steps, run.method
        distance = {"kl_weight": settings.kl_weight, "kind": settings.distance, "mix": settings.mix}
        if phase == "taid":
            distance["mix"] = method["taid"][0]
        if phase == "distillm" and step % max(1, per_epoch // 2) == 0:
            loss = mean_distance(run, student, teacher, held_out, distance)
            method["share"], method["reference"] = distillm_share(
                method["share"], loss, method["reference"], tolerance=settings.share_tolerance)
        # 1. batch: this process's share of the step's episodes; one draw for all processes says who writes them
        u, author = np.random.default_rng((settings.seed, step, 2)).random(), "teacher"
        if phase == "gkd" and u < settings.student_share:
            author = "student"
        elif phase == "distillm":
            author = distillm_author(u, method["share"], progress=progress,
                                     is_buffer_full=len(buffer) >= settings.buffer_size)
        if author == "student":
            share, _ = play(run, student, retriever, questions, step, settings.batch_size)
            if phase == "distillm":
                buffer = (buffer + write_generated(run, step, share, student.tokenizer))[-settings.buffer_size :]
        elif author == "student before":
            drawn = shuffled(len(buffer), settings.seed, step, 1)[: settings.batch_size]
            share = [buffer[i] for i in drawn][run.rank :: run.num_processes]
        else:
            order = shuffled(len(episodes), settings.seed, step // per_epoch)
            at = step % per_epoch * settings.batch_size
            share = [episodes[i] for i in order[at : at + settings.batch_size]][run.rank :: run.num_processes]
        # What a student wrote ends where it stopped writing, and is no target of a cross-entropy.
        end_of_turn = student.tokenizer.eos_id if author == "teacher" else None
        batch = collate(share, pad_id=student.tokenizer.pad_id, end_of_turn=end_of_turn).to(run.device)
        lengths = batch.lengths()
        [global_tokens] = sum_over_processes(batch.response_mask.sum())
        global_tokens = max(1, global_tokens)
        # 2. loss and gradients
        loss_sum = distance_sum = torch.zeros((), device=run.device)
        groups = in_step(micro_batches(lengths, settings.micro_batch_tokens))
        ce_weight = settings.ce_weight if phase == "kd" else 0.0
        for group in groups:
            loss, apart = distil_loss(student, teacher, pack(batch, group, lengths), ce_weight=ce_weight, **distance)
            (loss / global_tokens).backward()
            loss_sum, distance_sum = loss_sum + loss.detach(), distance_sum + apart
        # 3. update
        lr = settings.kd_lr * 0.5 * (1 + math.cos(math.pi * progress))
        lr *= min(1.0, (step + 1) / max(1, settings.kd_warmup_steps))
        grad_norm = update(parameters, optimizer, lr, settings.grad_clip)
        # 4. log, validate, save
        loss, apart = (total / global_tokens for total in sum_over_processes(loss_sum, distance_sum))
        metrics = {"loss/kd": loss, "loss/distance": apart, "loss/grad_norm": grad_norm, "loss/lr": lr,
                   "loss/skipped": run.check_norms(grad_norm)}
        if phase == "taid":
            metrics["loss/taid_t"] = method["taid"][0]
            if math.isfinite(apart):  # or t would be lost for good
                method["taid"] = taid_update(
                    Taid(*method["taid"]), apart, progress=(step + 1) / num_steps, start=settings.taid_start,
                    end=settings.taid_end, alpha=settings.taid_alpha, beta=settings.taid_beta)
        if phase == "distillm":
            metrics["loss/student_share"] = method["share"]
        if author == "student":
            metrics |= episode_metrics(share)
        metrics |= validate(step + 1, num_steps)
        run.log(step + 1, metrics, num_tokens=global_tokens, passes=len(groups))
        if run.is_over():
            break
    run.finish(student)


def split_held_out(episodes: list[Episode]) -> tuple[list[Episode], list[Episode]]:
    """(episodes that DistiLLM measures its loss on, episodes that it trains on)."""
    num = min(64, len(episodes) // 10)
    if num == 0:
        raise ValueError(f"phase distillm: got {len(episodes)} episodes, expected at least 10: a tenth is set apart to "
                         "see when the loss on them rises")
    return episodes[:num], episodes[num:]


@torch.no_grad()
def mean_distance(run: Run, student: Policy, teacher: Policy, episodes: list[Episode], distance: dict) -> float:
    """Mean distance from the teacher over the response tokens of these episodes, nats."""
    share = episodes[run.rank :: run.num_processes]
    batch = collate(share, pad_id=student.tokenizer.pad_id, end_of_turn=student.tokenizer.eos_id).to(run.device)
    lengths, total = batch.lengths(), torch.zeros((), device=run.device)
    for group in in_step(micro_batches(lengths, run.settings.micro_batch_tokens)):
        total += distil_loss(student, teacher, pack(batch, group, lengths), ce_weight=0.0, **distance)[1]
    total, num_tokens = sum_over_processes(total, batch.response_mask.sum())
    return total / max(1, num_tokens)


# ---- loop two: reinforce ----


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


# ---- the program ----


def load_policy(path: str, device: torch.device, role: str, dtype: torch.dtype = torch.float32) -> Policy:
    if not path:
        raise ValueError(f"--{role}: got no checkpoint, expected a folder or a hub id")
    return Policy(load_decoder(path, dtype=dtype, device=device), Tokenizer.load(path))


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """The teacher scores the student's ids, so every id must mean the same to both."""
    ours, theirs = student.full.get_vocab(), teacher.full.get_vocab()
    if ours != theirs:
        differing = sorted(ours.items() ^ theirs.items(), key=lambda item: item[1])[:3]
        raise ValueError(f"--teacher: got another vocabulary than the student's (for example {differing}), expected "
                         "the same token ids; take both from one model family")


def frozen(policy: Policy) -> Policy:
    policy.decoder.requires_grad_(False)
    return policy


def main(argv: list[str]) -> None:
    settings = config.load(TrainSettings, argv, prog="train.py", description=__doc__.split("\n")[0],
                           default_config=DEFAULT_CONFIG)
    settings = with_defaults(settings)
    run = Run(settings, *start_processes(settings.device, settings.timeout_minutes))
    try:
        with run.signals():
            train(run)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise Stop(f"{run.memory()}\n({error})") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # of a CPU
            raise Stop(f"{run.memory()}\n({error})") from error
        if dist.is_initialized() and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise Stop(f"rank {run.rank} of {run.num_processes}: another process ended, or did not answer within "
                       f"{settings.timeout_minutes} minutes; read what it said, then --resume\n({error})") from error
        raise


def with_defaults(settings: TrainSettings) -> TrainSettings:
    """What the phase says where the settings leave it open."""
    phase = settings.phase
    if settings.phase == "taid" and settings.distance:
        raise ValueError(f"--distance {settings.distance}: got it for phase taid, whose target is its own; drop it")
    if phase.startswith("bard"):
        bard.check_settings(settings)
    for budget in settings.budgets:
        check_budget(budget, settings.max_context_tokens)
    episodes = settings.episodes
    if phase in ("bard-data", "bard-sft") and episodes == TrainSettings.episodes:
        episodes = "runs/versions.jsonl"  # not those of kd
    advantage = settings.advantage or ("group" if phase in GROUPED else "gae")
    if phase == "qagent" and settings.stage not in (1, 2):
        raise ValueError(f"--stage {settings.stage}: expected 1 or 2")
    spoken = {"qagent": "qagent", "bard-sft": "search-r1", "bard-rl": "search-r1"}.get(phase, settings.protocol)
    if settings.protocol != spoken:
        raise ValueError(f"--protocol {settings.protocol}: got it for phase {phase}, whose reward reads the tags of "
                         f"{spoken}; give --protocol {spoken}")
    if phase in SKIPPING and settings.kl_where == "wrong" and advantage == "group" and settings.kl_in == "reward":
        raise ValueError("--kl-in reward: got it with --kl-where wrong and advantages of groups, which would blow "
                         "the KL of a group that is all wrong up to the size of a right answer; give --kl-in loss")
    if phase in REINFORCE and advantage == "group" and not 2 <= settings.group_size <= settings.prompts_per_step:
        raise ValueError(f"--group-size {settings.group_size}: expected at least 2, and at most --prompts-per-step "
                         f"({settings.prompts_per_step}), which counts episodes")
    return replace(
        settings, run_dir=settings.run_dir or f"runs/{phase}", episodes=episodes,
        kl_where=settings.kl_where or ("wrong" if phase == "dgpo" else "all"),
        advantage=advantage,
        distance=settings.distance or ("forward" if phase not in DISTANCES else DISTANCES[phase]),
    )


def train(run: Run) -> None:
    settings, rank, num_processes, device = run.settings, run.rank, run.num_processes, run.device
    torch.manual_seed(settings.seed)
    teacher_dtype = getattr(torch, settings.teacher_dtype)
    acts = settings.phase not in ("sft", "bard-sft") or settings.eval_every > 0
    if settings.phase == "bard-data" and settings.chains:
        acts = False
    retriever, questions, val_questions = None, [], []
    if acts:
        searches = settings.max_turns > 0
        if not settings.questions or searches and not (settings.corpus and settings.encoder):
            raise ValueError(
                f"phase {settings.phase}: got questions {settings.questions!r}, corpus {settings.corpus!r} and encoder "
                f"{settings.encoder!r}, expected all three; give --questions, --corpus and --encoder (the last two are "
                "not needed with --max-turns 0)"
            )
        questions, val_questions = split_questions(settings.questions, settings.val_size)
        if searches:
            retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None, device=device)

    if settings.phase == "episodes":
        teacher = frozen(load_policy(settings.teacher, device, "teacher", teacher_dtype))
        return write_episodes(run, teacher, retriever, questions, settings.episodes)
    if settings.phase == "bard-data":
        return compress_chains(run, retriever, questions, teacher_dtype)

    run.prepare_folder()
    student = load_policy(settings.student, device, "student")
    student.decoder.checkpointing = settings.checkpointing  # the critic is a copy and inherits it
    teacher = None
    is_guided = settings.phase in SKIPPING and settings.kl_where == "wrong"
    if settings.phase in DISTIL[2:] or (settings.phase == "dgpo" and settings.kl_where != "none") or is_guided:
        teacher = frozen(load_policy(settings.teacher, device, "teacher", teacher_dtype))
        check_same_tokens(student.tokenizer, teacher.tokenizer)

    score = make_score(student.tokenizer, settings, device)

    def validate(step: int, num_steps: int) -> dict[str, float]:
        """Sampled score on the questions set apart: greedy looks fine long before sampling does."""
        if not (settings.eval_every and (step % settings.eval_every == 0 or step == num_steps)):
            return {}
        at, end = (len(val_questions) * (rank + k) // num_processes for k in (0, 1))
        with whole(student.decoder):
            asked = draw_budgets(val_questions, settings.budgets, 0)[at:end]
            episodes = generate(student, retriever, asked, settings, seed=settings.seed + 1, first_episode=at)
        kept = [num_thinking_tokens(e, student.tokenizer) <= e.question.budget for e in episodes if settings.budgets]
        reward = sum(score(episodes)) if settings.phase in SKIPPING else 0.0
        correct, adhered, reward, n = sum_over_processes(*map(torch.tensor, (
            sum(e.score for e in episodes), sum(kept), reward, len(episodes))))
        result = {"eval/score": correct / max(1, n)}
        result |= {"eval/reward": reward / max(1, n)} if settings.phase in SKIPPING else {}
        return result | ({"eval/adherence": adhered / max(1, n)} if settings.budgets else {})

    if settings.phase in DISTIL:
        episodes = []
        if settings.phase != "gkd" or settings.student_share < 1:
            if not run.agree(Path(settings.episodes).exists()):
                if not teacher:
                    phase = "bard-data" if settings.phase == "bard-sft" else "episodes"
                    raise ValueError(f"--episodes: got {settings.episodes}, which is not there, expected episodes to "
                                     f"learn from; --phase {phase} makes the teacher's")
                write_episodes(run, teacher, retriever, questions, settings.episodes)
            episodes = load_episodes(settings.episodes, student.tokenizer, prompt=settings.prompt,
                                     budget_text=settings.budget_text)
            if settings.phase == "bard-sft" and any(e.question.budget is None for e in episodes):
                raise ValueError(f"--episodes {settings.episodes}: got episodes without a budget, expected those that "
                                 "--phase bard-data writes")
        if settings.shard != "none":
            shard(student.decoder)
        if settings.shard == "all" and teacher:
            shard(teacher.decoder)
        distil(run, student, teacher, episodes, retriever, questions, validate)
    else:
        critic = Critic.from_decoder(student.decoder) if settings.advantage == "gae" else None
        guide = teacher
        if teacher is None and settings.kl_where != "none":
            guide = frozen(load_policy(settings.student, device, "student"))  # Eq. 5: the initial policy
        if settings.shard != "none":
            shard(student.decoder)
            if critic is not None:
                shard(critic)
        if settings.shard == "all" and guide:
            shard(guide.decoder)
        reinforce(run, student, critic, guide, retriever, questions, validate, score)


def make_score(
    tokenizer: Tokenizer, settings: TrainSettings, device: torch.device
) -> Callable[[list[Episode]], list[float]]:
    """What episodes are worth in a phase: Eq. 3, right within the budget, or what was found for a generator."""
    if settings.phase == "bard-rl":
        return lambda episodes: [bard.reward(e, tokenizer, settings) for e in episodes]
    if settings.phase == "qagent":
        dtype = getattr(torch, settings.teacher_dtype)
        generator = qagent.load_generator(settings, device, dtype) if settings.stage == 2 else None
        return lambda episodes: qagent.rewards(episodes, tokenizer, generator, settings)
    return lambda episodes: [e.score for e in episodes]


def compress_chains(run: Run, retriever: Retriever | None, questions: list[Question], dtype: torch.dtype) -> None:
    """Phase bard-data: chains of a file or of the teacher, asked by all processes; the first compresses them."""
    settings, chains = run.settings, run.settings.chains
    if not settings.student:
        raise ValueError("--student: got no checkpoint, expected one: budgets count its tokens")
    teacher = frozen(load_policy(settings.teacher, run.device, "teacher", dtype)) if settings.teacher else None
    if not chains:
        chains = str(Path(settings.episodes).with_suffix(".chains.jsonl"))
        if run.agree(Path(chains).exists()):
            run.say(f"{chains} is there already: its chains are taken; remove it to ask the teacher again")
        elif teacher is None:
            raise ValueError("--teacher: got no checkpoint and no --chains, expected either to reason from")
        else:
            write_episodes(run, teacher, retriever, questions, chains)
    if run.rank == 0:  # the others have nothing to wait for
        rules = settings.compressor == "trails"
        compressor = None if rules else frozen(load_policy(settings.compressor, run.device, "compressor", dtype))
        checker = None if rules else teacher  # rules say the answer; who has seen natural chains alone may misread them
        run.say(bard.write_versions(settings.episodes, chains, Tokenizer.load(settings.student), compressor, checker,
                                    settings, seed=settings.seed))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, Stop) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)  # at once: torchrun soon ends what outlives a process
        sys.exit(COLLAPSED if isinstance(error, Collapse) else 1)
    except KeyboardInterrupt:
        sys.exit("train.py: stopped at once; --resume continues from the last state")
    finally:
        end_processes()
