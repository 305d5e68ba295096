"""Loop one, distil: supervised on episodes of the teacher, of the student, or of both (Eq. 1 and its neighbours).

Departures from the official code, with reasons
 1. The loss is one mean over the mini-batch's response tokens, whatever the number of processes and micro-batches;
    the official code averages the means of its micro-batches.
 2. The learning rate of step k of a warm-up of N is lr (k+1)/N; the official schedule starts at exactly 0.

Legend: N response tokens, D width.
"""

import math

import numpy as np
import torch
from torch import Tensor

from data import Question
from dgpo import Taid, distillm_author, distillm_share, kd_loss, taid_update
from episode import Episode, Packed, collate, micro_batches, pack, response_rows
from kernels import head_divergence, head_logprobs
from parallel import in_step, sum_over_processes, update
from play import episode_metrics, play, read_generated, shuffled, write_generated
from retriever import Retriever
from rollout import Policy
from run import Run


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
