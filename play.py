"""Episodes to learn from: what each process plays of a step, what the teacher is asked, what a student's buffer keeps.

Which questions a step takes, and the noise of each episode, follow from (seed, step) and the episode's number alone,
whatever the number of processes.
"""

import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from data import Question, draw_budgets, load_questions
from episode import STATUSES, Episode, load_episodes, save_episodes
from model import Tokenizer
from parallel import barrier, sum_over_processes, whole
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate
from run import Run, Stop
from weights import write_aside


def shuffled(num: int, *seeds: int) -> list[int]:
    """A permutation of range(num) that depends on the seeds alone."""
    return np.random.default_rng(seeds).permutation(num).tolist()


def split_questions(path: str, val_size: int) -> tuple[list[Question], list[Question]]:
    """(training, validation) questions; the split does not depend on the run's seed."""
    questions = load_questions(path)
    order = shuffled(len(questions), 0)
    num_val = min(val_size, len(questions) // 10)
    return [questions[i] for i in order[num_val:]], [questions[i] for i in order[:num_val]]


# ---- a step's episodes ----


def play(
    run: Run, policy: Policy, retriever: Retriever | None, questions: list[Question], step: int, num: int,
    group_size: int = 1,
) -> tuple[list[Episode], int]:
    """This process's share of the step's `num` episodes, sampled, and the place of its first one among them.

    group_size episodes of a question follow one another, on one process.
    """
    settings = run.settings
    num_questions = num // group_size
    per_epoch = max(1, len(questions) // num_questions)
    order = shuffled(len(questions), settings.seed, step // per_epoch)
    at = step % per_epoch * num_questions
    chosen = draw_budgets([questions[i] for i in order[at : at + num_questions]], settings.budgets, settings.seed, step)
    begin, end = (len(chosen) * k // run.num_processes for k in (run.rank, run.rank + 1))
    share = [question for question in chosen[begin:end] for _ in range(group_size)]
    with whole(policy.decoder):
        episodes = generate(policy, retriever, share, settings, seed=settings.seed,
                            first_episode=step * num + begin * group_size)
    failed, total = sum_over_processes(torch.tensor(sum(e.status == "search_error" for e in episodes)),
                                       torch.tensor(len(episodes)))
    if 2 * failed > total:  # fewer are left out (episode.collate)
        raise Stop(f"the retriever failed in {failed:.0f} of {total:.0f} episodes of a step, see above why; mend it, "
                   "then --resume")
    return episodes, begin * group_size


def episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """How the episodes of a step went, over all processes."""
    counts = [sum(e.status == status for e in episodes) for status in STATUSES]
    n, score, searches, tokens, *by_status = sum_over_processes(*map(torch.tensor, (
        len(episodes), sum(e.score for e in episodes), sum(e.num_searches for e in episodes),
        sum(e.num_agent_tokens for e in episodes if e.status != "search_error"), *counts)))
    result = {"rollout/score": score / n, "rollout/searches": searches / n, "rollout/agent_tokens": tokens / n}
    return result | {f"rollout/{s}": count / n for s, count in zip(STATUSES, by_status, strict=True)}


# ---- the replay buffer (DistiLLM) ----


def write_generated(run: Run, step: int, episodes: list[Episode], tokenizer: Tokenizer) -> list[Episode]:
    """Keep what the student wrote in a step, for the replay buffer; returns what all processes kept."""
    if episodes:
        save_episodes(run.dir / "generated" / f"step_{step:06d}.{run.rank:04d}.jsonl", episodes, tokenizer)
    barrier()
    return [e for path in sorted((run.dir / "generated").glob(f"step_{step:06d}.*.jsonl"))
            for e in load_episodes(path, tokenizer, prompt=run.settings.prompt)]


def read_generated(run: Run, steps_done: int, tokenizer: Tokenizer) -> list[Episode]:
    """The replay buffer after so many steps; files of later steps, which the run does again, are removed."""
    paths = sorted((run.dir / "generated").glob("step_*.jsonl"))
    kept = [path for path in paths if int(path.name[5:11]) < steps_done]
    barrier()  # all have looked
    if run.rank == 0:
        for path in set(paths) - set(kept):
            path.unlink()
    buffer: list[Episode] = []
    for path in reversed(kept):
        if len(buffer) < run.settings.buffer_size:
            buffer = load_episodes(path, tokenizer, prompt=run.settings.prompt) + buffer
    barrier()
    return buffer[-run.settings.buffer_size :]


# ---- the teacher's episodes ----


def write_episodes(
    run: Run, teacher: Policy, retriever: Retriever | None, questions: list[Question], path: str | Path
) -> None:
    """Phase episodes: one sampled episode for each question; the correct ones go to the file.

    Each process writes finished parts beside the file, so an interrupted run goes on where it stopped. The parts are
    named after all that they depend on: other settings, or another teacher, do not take them for their own.
    """
    settings, path = run.settings, Path(path)
    questions = questions[: settings.num_episode_questions or None]
    part_size = 1024
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(teacher.tokenizer.folder.iterdir())]
    asked = [asdict(question) for question in questions]
    rules = {f.name: getattr(settings, f.name) for f in fields(RolloutSettings)} | {"seed": settings.seed}
    rules |= {"corpus": settings.corpus, "encoder": settings.encoder, "teacher_dtype": settings.teacher_dtype}
    name = int(hashlib.sha256(json.dumps([weights, asked, rules]).encode()).hexdigest()[:8], 16)
    name = f"{run.agree(name):08x}"  # other machines hold other copies of the weights
    parts = [path.with_name(f"{path.name}.{name}.part{k:05d}") for k in range(math.ceil(len(questions) / part_size))]
    with whole(teacher.decoder):
        for first in range(0, len(parts), run.num_processes):  # a part for each process, then they meet
            k = first + run.rank
            if k < len(parts) and not parts[k].exists():
                episodes = generate(teacher, retriever, questions[k * part_size : (k + 1) * part_size], settings,
                                    seed=settings.seed, first_episode=k * part_size,
                                    progress=f"teacher episodes {k + 1}/{len(parts)}")
                failed = sum(e.status == "search_error" for e in episodes)
                if 2 * failed > len(episodes):
                    raise Stop(f"the retriever failed in {failed} of {len(episodes)} episodes, see above why")
                save_episodes(parts[k], episodes, teacher.tokenizer)
            run.is_over()
    if run.rank == 0:
        lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
        correct = [line for line in lines if json.loads(line)["score"] == 1]
        if not correct:
            raise ValueError(f"{path}: got 0 correct episodes of {len(lines)} from the teacher, expected some; read "
                             f"{parts[0]}, and check --prompt, --corpus and the teacher itself")
        write_aside(path, lambda partial: partial.write_text("".join(correct), encoding="utf-8"))
        for part in parts:
            part.unlink()
        run.say(f"{path}: {len(correct)} correct episodes of {len(lines)}")
    barrier()
