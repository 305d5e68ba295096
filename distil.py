"""Loop one, distil: supervised on episodes of the teacher, the student, or both (Eq. 1)."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from batch import Packed, collate, pack, response_rows
from dgpo import kd_loss
from episode import Episode
from infra.parallel import micro_batches, shuffled, sum_over_processes
from infra.run import Run, cosine, warm_up
from kernels import head_divergence, head_logprobs
from rollout import Policy
from sampling import episode_metrics, play, validate
from session import Session, Task, save_policy, shard_models
from settings import TrainSettings

Distance = Callable[[list[Episode]], float]  # of the student from the teacher, over all processes


class Schedule:
    """What a method trains on in each step. This one is of sft and kd; baselines.py has others."""
    def __init__(self, settings: TrainSettings, episodes: list[Episode]) -> None:
        self.settings, self.episodes = settings, episodes
        self.mix: float | Tensor = settings.mix  # of the target, see dgpo.divergence
        self.metrics: dict[str, float] = {}
        self.per_epoch = math.ceil(len(episodes) / settings.batch_size)  # steps
        self.num_steps = max(1, round(self.per_epoch * settings.epochs))

    def author(self, step: int, distance_on: Distance) -> str:
        """Who writes a step's episodes: "student" means now; those of others come from `batch`."""
        return "teacher"

    def batch(self, step: int, author: str) -> list[Episode]:
        """The episodes of all processes in a step for which the student does not write now."""
        order = shuffled(len(self.episodes), self.settings.seed, step // self.per_epoch)
        start = step % self.per_epoch * self.settings.batch_size
        return [self.episodes[i] for i in order[start : start + self.settings.batch_size]]

    def update(self, step: int, distance: float, written: list[Episode]) -> None:
        """Called after a step; written: this process's share of what the student wrote in it."""

    def state(self) -> dict:
        """What a resumed run needs, in JSON; `load` continues from it."""
        return {}

    def load(self, state: dict) -> None: ...


def distil_loss(student: Policy, teacher: Policy | None, packed: Packed,
                **options) -> tuple[Tensor, Tensor]:
    """Eq. 1, summed over the response tokens: (loss [], distance from the teacher [], detached).

    options: see dgpo.kd_loss, at temperature 1 whatever sampled. No teacher: cross-entropy alone.
    """
    targets = packed.ids[packed.response_mask]
    rows = response_rows(student.decoder, packed)  # [N, D], N response tokens, D width
    if teacher is None:
        loss = -head_logprobs(rows, student.head, targets)[0].sum()
        return loss, torch.zeros_like(loss)
    with torch.no_grad():
        teacher_rows = response_rows(teacher.decoder, packed)  # [N, D of the teacher]
    loss, distance = head_divergence(
        kd_loss, rows, student.head, teacher_rows, teacher.head, targets, **options)
    return loss, distance.sum()


def distil(run: Run, settings: TrainSettings, student: Policy, teacher: Policy | None,
           session: Session, task: Task, schedule: Schedule) -> None:
    """Train the student for the schedule's steps. teacher: None for the cross-entropy alone."""
    shard_models(settings, student, teacher)
    from infra.checks import check_warm_up
    check_warm_up("kd", settings.kd_warmup_steps, schedule.num_steps)
    run.start(schedule.num_steps, settings.batch_size, {"student": student.decoder}, schedule)
    for step in run.steps():
        if run.score is not None and 0 < settings.until_score <= run.score:
            run.say(f"sampled validation score {run.score:.3f} reached {settings.until_score}")
            break
        # 1. batch: this process's share of the step's episodes
        options = {"ce_weight": settings.ce_weight, "kl_weight": settings.kl_weight,
                   "kind": settings.distance, "mix": schedule.mix}
        distance_on = partial(mean_distance, run, settings, student, teacher, options)
        author = schedule.author(step, distance_on)
        if author == "student":
            episodes, _ = play(run, settings, student, session, task, step, settings.batch_size)
        else:
            episodes = schedule.batch(step, author)[run.rank :: run.num_processes]
        # What a student wrote ends where it stopped, and is no target of a cross-entropy.
        end_of_turn = student.tokenizer.eos_id if author == "teacher" else None
        batch = collate(episodes, pad_id=student.tokenizer.pad_id, end_of_turn=end_of_turn)
        batch = batch.to(run.device)
        num_tokens = max(1, *sum_over_processes(batch.response_mask.sum()))  # of all processes
        # 2. loss and gradients
        lengths = batch.lengths()
        groups = micro_batches(lengths, settings.micro_batch_tokens)
        loss_sum = distance_sum = torch.zeros((), device=run.device)
        for group in groups:
            packed = pack(batch, group, lengths)
            loss, distance = distil_loss(student, teacher, packed, **options)
            (loss / num_tokens).backward()
            loss_sum, distance_sum = loss_sum + loss.detach(), distance_sum + distance
        # 3. update
        lr = settings.kd_lr * cosine(step, schedule.num_steps)
        lr *= warm_up(step, settings.kd_warmup_steps)
        grad_norm = run.update("student", lr)
        # 4. log, validate, save
        loss, distance = (x / num_tokens for x in sum_over_processes(loss_sum, distance_sum))
        metrics = {"loss/kd": loss, "loss/distance": distance, "loss/grad_norm": grad_norm,
                   "loss/lr": lr, "loss/skipped": run.count_skipped(), **schedule.metrics}
        schedule.update(step, distance, episodes if author == "student" else [])
        if author == "student":
            metrics |= episode_metrics(episodes)
        metrics |= validate(run, settings, student, session, task, step + 1)
        run.log(step + 1, metrics, num_tokens=num_tokens, passes=len(groups))
    run.finish(student.decoder, partial(save_policy, student, run.dir))


@torch.no_grad()
def mean_distance(run: Run, settings: TrainSettings, student: Policy, teacher: Policy,
                  options: dict, episodes: list[Episode]) -> float:
    """Mean distance from the teacher over the response tokens of these episodes, nats."""
    share, tokenizer = episodes[run.rank :: run.num_processes], student.tokenizer
    batch = collate(share, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id).to(run.device)
    lengths, total = batch.lengths(), torch.zeros((), device=run.device)
    for group in micro_batches(lengths, settings.micro_batch_tokens):
        total += distil_loss(student, teacher, pack(batch, group, lengths), **options)[1]
    total, num_tokens = sum_over_processes(total, batch.response_mask.sum())
    return total / max(1, num_tokens)
