"""Sampling: the episodes of a training step, those of validation, and those of the teacher.

Which questions a step takes, and the noise of each episode, follow from (seed, step) and the
episode's number alone, whatever the number of processes.
"""

from pathlib import Path

import torch

from episode import STATUSES, Episode, save_episodes
from infra.parallel import means, shuffled, sum_over_processes, unsharded
from infra.run import Run
from rollout import Policy, generate
from session import Session, Task
from settings import TrainSettings


def play(run: Run, settings: TrainSettings, policy: Policy, session: Session, task: Task,
         step: int, num_episodes: int) -> tuple[list[Episode], int]:
    """This process's share of the step's episodes, and the number of its first one among all.
    Questions that would fill no whole step at the end of an epoch wait for the next one's order."""
    num_questions = num_episodes // settings.group_size
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
    from infra.guards import check_room, check_searches  # here, so that `import train` is small
    check_room(episodes, settings.max_context_tokens)
    check_searches(*sum_over_processes(torch.tensor(num_failed), torch.tensor(len(episodes))), run)
    return episodes, first


def validate(run: Run, settings: TrainSettings, policy: Policy, session: Session, task: Task,
             step: int) -> dict[str, float]:
    """The score on the questions set apart, in the steps that are validated. As in training, the
    settings' temperature and top_p sample: greedy episodes look fine long before sampled ones."""
    every = settings.eval_every
    if not (every and session.val_questions) or (step % every and step != run.num_steps):
        return {}
    questions = task.prepare(session.val_questions, 0)
    begin, end = (len(questions) * k // run.num_processes for k in (run.rank, run.rank + 1))
    with unsharded(policy.decoder):
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
    """Ask the teacher each question once; write its correct episodes, in parts that are kept."""
    from infra.guards import check_searches
    from infra.parts import made_with, write_in_parts
    questions = session.questions[: settings.num_episode_questions or None]
    teacher.tokenizer.date = run.date

    def write(part: Path, start: int, end: int) -> None:
        episodes = generate(teacher, session.retriever, questions[start:end], settings,
                            seed=settings.seed, first_episode=start, protocol=session.protocol,
                            progress=f"teacher episodes {start} to {end}")
        check_searches(sum(e.status == "search_error" for e in episodes), len(episodes))
        save_episodes(part, episodes, teacher.tokenizer)

    with unsharded(teacher.decoder):
        write_in_parts(run, Path(path), len(questions), settings, made_with(settings), write,
                       lambda row: row["score"] == 1, "--prompt, --corpus and the teacher itself")
