"""Training: one loop distils (Eq. 1), one reinforces (Eq. 2 to 4).

    torchrun train.py --phase NAME [--config FILE.toml ...] [--key value ...]

  episodes   the teacher answers training questions; its correct episodes are kept on disk
  distil:
    sft        cross-entropy alone, on episodes of any origin (SeqKD: the teacher's)
    kd         Eq. 1 against the teacher's full distribution: the cold start
    taid       KL to a target that moves from the student to the teacher
    gkd        reverse KL on what the student writes now
    distillm   skew KL; what the student writes joins as it is needed, and is kept
  reinforce:
    ppo        guide = the initial policy, on all episodes (Search-R1)
    grpo       the same with advantages within a question's group, no critic
    dgpo       guide = the teacher, on wrong episodes (Eq. 4)
A phase `x` or `x-y` that is none of these is handed to the program x.py beside this file.
"""

import importlib
from functools import partial
from pathlib import Path

from distil import Schedule, distil
from episode import load_episodes
from infra.run import Run, launch, run_program
from model import DecoderConfig
from reinforce import reinforce
from sampling import write_episodes
from session import Task, open_frozen, open_session, open_student
from settings import DISTIL, REINFORCE, TrainSettings, guide_of, with_defaults

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "world.toml"


def main(argv: list[str]) -> None:
    from infra import cli  # here, because a reader of the method need not open it
    if program := cli.program_of(cli.find_phase(argv, DEFAULT_CONFIG) or ""):
        return importlib.import_module(program).train(argv)
    settings = cli.load(TrainSettings, argv, prog="train.py", default_config=DEFAULT_CONFIG,
                        description=__doc__.split("\n")[0], finish=with_defaults)
    if settings.plan:
        from infra.planner import print_plan  # here, because nothing else needs it
        return print_plan(settings, DecoderConfig, guide_of(settings))
    launch(settings, partial(train, settings=settings))


def train(run: Run, settings: TrainSettings) -> None:
    """Run one phase: open what it needs, then enter its loop."""
    phase, guide_role, is_made = settings.phase, guide_of(settings), None  # None: reads no episodes
    if guide_role and not getattr(settings, guide_role):
        raise ValueError(f"--{guide_role}: got no checkpoint, expected a folder or a hub id")
    if phase in ("episodes", *DISTIL) and (phase != "gkd" or settings.student_share < 1):
        from infra.parts import find_made  # here, because the second loop does not need it
        is_made = find_made(run, settings.episodes, settings, takes_any=phase == "sft")
    if phase == "episodes" and is_made:
        return None
    from infra.named import load_scorer  # here, so that `import train` is small
    own = phase in REINFORCE and settings.reward
    task = Task(load_scorer(settings.reward, "--reward") if own else None)
    session = open_session(settings, run.device, task,
                           asks=phase != "sft" or settings.eval_every > 0)
    if kinds := {q.metadata.get("answer_kind", "text") for q in session.questions} - {"text"}:
        raise ValueError(f"{settings.questions}: got answers of kind {kinds}, expected text alone; "
                         "another program's phase may know how to score them")
    if phase == "episodes":
        teacher = open_frozen(settings, run.device, "teacher")
        return write_episodes(run, settings, teacher, session, settings.episodes)
    student = open_student(run, settings)
    guide = open_frozen(settings, run.device, guide_role, student) if guide_role else None
    if phase in REINFORCE:
        return reinforce(run, settings, student, guide, session, task)
    if is_made is False:
        write_episodes(run, settings, guide, session, settings.episodes)
    episodes = [] if is_made is None else load_episodes(
        settings.episodes, student.tokenizer, prompt=settings.prompt)
    import baselines  # here, because a reader of the method need not open it
    schedules = {"gkd": baselines.Gkd, "taid": baselines.Taid,
                 "distillm": partial(baselines.DistiLLM, run, student.tokenizer)}
    schedule = schedules.get(phase, Schedule)(settings, episodes)
    distil(run, settings, student, guide, session, task, schedule)


if __name__ == "__main__":
    run_program("train.py", main)
