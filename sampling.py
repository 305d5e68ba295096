"""Sampling: the episodes of a training step, those of validation, and those of the teacher.

Which questions a step takes, and the noise of each episode, follow from (seed, step) and the
episode's number alone, whatever the number of processes.
"""

from dataclasses import asdict, fields
from pathlib import Path

import torch

from episode import STATUSES, Episode, save_episodes
from infra.parallel import means, shuffled, sum_over_processes, unsharded
from infra.run import Run, Stop
from rollout import Policy, RolloutSettings, generate
from session import Session, Task
from settings import TrainSettings


def play(run: Run, settings: TrainSettings, policy: Policy, session: Session, task: Task,
         step: int, num_episodes: int) -> tuple[list[Episode], int]:
    """This process's share of the step's episodes, and the number of its first one among all."""
    num_questions = num_episodes // settings.group_size
    if num_questions > len(session.questions):
        raise ValueError(f"{settings.questions}: got {len(session.questions)} training questions, "
                         f"expected the {num_questions} that a step asks; lower --prompts-per-step "
                         "(reinforcement) or --batch-size (distillation)")
    per_epoch = len(session.questions) // num_questions
    order = shuffled(len(session.questions), settings.seed, step // per_epoch)
    start = step % per_epoch * num_questions
    chosen = [session.questions[i] for i in order[start : start + num_questions]]
    chosen = task.prepare(chosen, settings.seed, step)
    # The episodes of a question follow one another, on one process.
    begin, end = (num_questions * k // run.num_processes for k in (run.rank, run.rank + 1))
    share = [question for question in chosen[begin:end] for _ in range(settings.group_size)]
    first = begin * settings.group_size
    with unsharded(policy.decoder):
        episodes = generate(policy, session.retriever, share, settings, seed=settings.seed,
                            first_episode=step * num_episodes + first, protocol=session.protocol)
    num_failed = sum(episode.status == "search_error" for episode in episodes)
    check_searches(*sum_over_processes(torch.tensor(num_failed), torch.tensor(len(episodes))))
    return episodes, first


def check_searches(num_failed: float, num_episodes: float) -> None:
    """Stop when most searches failed; fewer are left out of learning (batch.collate)."""
    if 2 * num_failed > num_episodes:
        raise Stop(f"the retriever failed in {num_failed:.0f} of {num_episodes:.0f} episodes, see "
                   "above why; mend it, then --resume")


def validate(run: Run, settings: TrainSettings, policy: Policy, session: Session, task: Task,
             step: int) -> dict[str, float]:
    """The sampled score on the questions set apart, in the steps that are validated."""
    every = settings.eval_every
    if not every or (step % every and step != run.num_steps):
        return {}
    questions = task.prepare(session.val_questions, 0)
    begin, end = (len(questions) * k // run.num_processes for k in (run.rank, run.rank + 1))
    with unsharded(policy.decoder):  # not greedy, which looks fine long before sampling does
        episodes = generate(policy, session.retriever, questions[begin:end], settings,
                            seed=settings.seed + 1, first_episode=begin, protocol=session.protocol)
    sums = {"score": sum(episode.score for episode in episodes)}
    if task.reward:
        sums["reward"] = sum(task.reward(episodes))
    if task.val_report:
        sums |= task.val_report(episodes)
    return means("eval", sums, len(episodes))


def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """How the episodes of a step went, over all processes."""
    learnt = [e for e in episodes if e.status != "search_error"]
    sums = {"score": sum(e.score for e in episodes),
            "searches": sum(e.num_searches for e in episodes),
            "agent_tokens": sum(e.num_agent_tokens for e in learnt)}
    sums |= {status: sum(e.status == status for e in episodes) for status in STATUSES}
    return means("rollout", sums, len(episodes))


def write_episodes(run: Run, settings: TrainSettings, teacher: Policy, session: Session,
                   path: str | Path) -> None:
    """Ask the teacher each question once and write its correct episodes to a file.

    Finished parts stand beside the file, so an interrupted run goes on where it stopped.
    """
    from infra.parts import fingerprint, write_in_parts  # here, because nothing else needs them
    questions = session.questions[: settings.num_episode_questions or None]

    def write(part: Path, start: int, end: int) -> None:
        episodes = generate(teacher, session.retriever, questions[start:end], settings,
                            seed=settings.seed, first_episode=start, protocol=session.protocol,
                            progress=f"teacher episodes {start} to {end}")
        num_failed = sum(episode.status == "search_error" for episode in episodes)
        check_searches(num_failed, len(episodes))
        save_episodes(part, episodes, teacher.tokenizer)

    asked = [asdict(question) | {"match": question.match.__name__} for question in questions]
    names = [*(field.name for field in fields(RolloutSettings)), "seed", "teacher_dtype"]
    rules = [getattr(settings, name) for name in names]
    key = fingerprint(run, teacher.tokenizer.folder, [asked, rules])
    with unsharded(teacher.decoder):
        write_in_parts(run, Path(path), len(questions), key, write, lambda row: row["score"] == 1,
                       "--prompt, --corpus and the teacher itself")
