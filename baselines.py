"""Baselines of distillation: what GKD, DistiLLM and TAID change from step to step (paper, Table 2).

GKD        what the student writes now, reverse KL: dgpo.divergence("reverse")
DistiLLM   skew KL; the share of the student's text adapts, and a replay buffer keeps what it wrote
TAID       a target between student and teacher that moves: dgpo.divergence("taid", mix=t)
"""

import math
from typing import NamedTuple

import torch

from distil import Distance, Schedule
from episode import Episode, load_episodes, save_episodes
from infra.checks import learnable
from infra.parallel import barrier, shuffled, uniform
from infra.run import Run
from settings import TrainSettings
from tokenizer import Tokenizer


class Gkd(Schedule):
    """A share of the batches, by default all, is what the student writes now."""
    def __init__(self, settings: TrainSettings, episodes: list[Episode]) -> None:
        super().__init__(settings, episodes)
        self.num_steps = settings.steps

    def author(self, step: int, distance_on: Distance) -> str:
        is_student = uniform(self.settings.seed, step, 2) < self.settings.student_share
        return "student" if is_student else "teacher"


class TaidState(NamedTuple):
    t: float  # the target, from the student (0) to the teacher (1)
    momentum: float = 0.0
    loss: float | None = None  # of the last update


def taid_update(state: TaidState, loss: float, *, progress: float, start: float, end: float,
                alpha: float, beta: float) -> TaidState:
    """TAID's adaptive t after an update with this loss (Shing et al., 2025, Eq. 8 to 10).

    delta = (J_before - J) / J_before,  m = beta m + (1 - beta) delta,  t + alpha sigmoid(m) (1 - t)
    t is never below the straight line from start to end, nor above end. progress: the share of the
    updates that are done. As sigmoid(m) is about 1/2, t leaves the line after 2 / alpha updates.
    """
    t, momentum = state.t, state.momentum
    if state.loss:  # None before the first update, 0 where target and student are equal
        change = (state.loss - loss) / state.loss
        momentum = beta * momentum + (1 - beta) * change
        t += alpha * 0.5 * (1 + math.tanh(momentum / 2)) * (1 - t)  # a sigmoid without overflow
    return TaidState(min(end, max(start + (end - start) * progress, t)), momentum, loss)


class Taid(Schedule):
    def __init__(self, settings: TrainSettings, episodes: list[Episode]) -> None:
        super().__init__(settings, episodes)
        self.load({"t": settings.taid_start})

    def update(self, step: int, distance: float, written: list[Episode]) -> None:
        s = self.settings
        if math.isfinite(distance):  # else t would be lost for good
            state = taid_update(
                self.taid, distance, progress=(step + 1) / self.num_steps, start=s.taid_start,
                end=s.taid_end, alpha=s.taid_alpha, beta=s.taid_beta)
            self.load(state._asdict())

    def state(self) -> dict:
        return self.taid._asdict()

    def load(self, state: dict) -> None:
        self.taid = TaidState(**state)
        # torch.compile makes another graph for each new number, and one for all tensors.
        self.mix = torch.tensor(self.taid.t, dtype=torch.float64)
        self.metrics = {"loss/taid_t": self.taid.t}


def distillm_share(share: float, loss: float, reference: float | None, *, tolerance: float,
                   step: float = 0.1) -> tuple[float, float]:
    """The share of batches that the student writes, after a validation: (share, reference).

    A loss on the teacher's text that exceeds the reference by the tolerance raises the share and is
    the new reference (Ko et al., 2024, Algorithm 1; official code): that text no longer helps.
    """
    if reference is None:
        return share, loss
    if loss >= reference + tolerance:
        return min(1.0, share + step), loss
    return share, reference


def distillm_author(u: float, share: float, *, progress: float, is_buffer_full: bool) -> str:
    """Who wrote the batch of a step: "student" (now), "replay" (the student, before), "teacher".

    u is uniform in [0, 1). New text becomes rarer with progress, until the student's batches come
    from the buffer alone (official code).
    """
    if u < share * (1 - progress) or (u < share and not is_buffer_full):
        return "student"
    return "replay" if u < share else "teacher"


class DistiLLM(Schedule):
    def __init__(self, run: Run, tokenizer: Tokenizer, settings: TrainSettings,
                 episodes: list[Episode]) -> None:
        num_held_out = min(64, len(episodes) // 10)
        if num_held_out == 0:
            raise ValueError(f"phase distillm: got {len(episodes)} episodes, expected at least "
                             "10: a tenth is set apart to see when the loss on them rises")
        super().__init__(settings, episodes[num_held_out:])
        self.held_out, self.run, self.tokenizer = episodes[:num_held_out], run, tokenizer
        self.share, self.reference = 0.0, None
        self.folder = run.dir / "generated"
        self.buffer: list[Episode] | None = None  # the student's newest episodes; None: not read

    def author(self, step: int, distance_on: Distance) -> str:
        settings = self.settings
        if self.buffer is None:
            for path in self.folder.glob("step_*.jsonl"):
                if int(path.name[5:11]) >= step:  # of a step that is done again
                    path.unlink(missing_ok=True)
            barrier()
            self.buffer = self.read("step_*")
        if step % max(1, self.per_epoch // 2) == 0:
            self.share, self.reference = distillm_share(
                self.share, distance_on(self.held_out), self.reference,
                tolerance=settings.share_tolerance)
        self.metrics = {"loss/student_share": self.share}
        return distillm_author(
            uniform(settings.seed, step, 2), self.share, progress=step / self.num_steps,
            is_buffer_full=len(self.buffer) >= settings.buffer_size)

    def batch(self, step: int, author: str) -> list[Episode]:
        if author == "teacher":
            return super().batch(step, author)
        drawn = shuffled(len(self.buffer), self.settings.seed, step, 1)
        return [self.buffer[i] for i in drawn[: self.settings.batch_size]]

    def update(self, step: int, distance: float, written: list[Episode]) -> None:
        if written := learnable(written):
            path = self.folder / f"step_{step:06d}.{self.run.rank:04d}.jsonl"
            save_episodes(path, written, self.tokenizer)
        barrier()
        self.buffer = (self.buffer + self.read(f"step_{step:06d}"))[-self.settings.buffer_size :]

    def read(self, name: str) -> list[Episode]:
        """The newest episodes that all processes have kept in the files of this name."""
        episodes = []
        for path in sorted(self.folder.glob(f"{name}.*.jsonl")):
            episodes += load_episodes(path, self.tokenizer, prompt=self.settings.prompt)
        return episodes[-self.settings.buffer_size :]

    def state(self) -> dict:
        return {"share": self.share, "reference": self.reference}

    def load(self, state: dict) -> None:
        self.share, self.reference = state["share"], state["reference"]
