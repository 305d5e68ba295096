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
from infra import config
from infra.run import Run, launch, run_program
from reinforce import reinforce
from sampling import write_episodes
from session import Task, open_frozen, open_session, open_student
from settings import REINFORCE, TrainSettings, with_defaults

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "world.toml"


def main(argv: list[str]) -> None:
    if program := config.program_of(config.find_phase(argv, DEFAULT_CONFIG) or ""):
        return importlib.import_module(program).train(argv)
    settings = config.load(TrainSettings, argv, prog="train.py", default_config=DEFAULT_CONFIG,
                           description=__doc__.split("\n")[0])
    settings = with_defaults(settings)
    launch(settings, partial(train, settings=settings))


def train(run: Run, settings: TrainSettings) -> None:
    """Run one phase: open what it needs, then enter its loop."""
    phase = settings.phase
    task = Task(config.load_scorer(settings.reward, "--reward") if settings.reward else None)
    session = open_session(settings, run.device, task,
                           asks=phase != "sft" or settings.eval_every > 0)
    if kinds := {q.metadata.get("answer_kind", "text") for q in session.questions} - {"text"}:
        raise ValueError(f"{settings.questions}: got answers of kind {kinds}, expected text alone; "
                         "another program's phase may know how to score them")
    if phase == "episodes":
        teacher = open_frozen(settings, run.device, "teacher")
        return write_episodes(run, settings, teacher, session, settings.episodes)
    student, guide = open_student(run, settings), None
    if phase in REINFORCE:
        if settings.kl_where != "none":
            role = "teacher" if phase == "dgpo" else "student"  # Eq. 4; Eq. 5: the initial policy
            guide = open_frozen(settings, run.device, role, student)
        return reinforce(run, settings, student, guide, session, task)
    if phase != "sft":
        guide = open_frozen(settings, run.device, "teacher", student)
    episodes = []
    if phase != "gkd" or settings.student_share < 1:
        if not run.agree(Path(settings.episodes).exists()):
            if guide is None:
                raise ValueError(f"--episodes: got {settings.episodes}, which is not there, "
                                 "expected episodes to learn from; --phase episodes makes them")
            write_episodes(run, settings, guide, session, settings.episodes)
        episodes = load_episodes(settings.episodes, student.tokenizer, prompt=settings.prompt)
    import baselines  # here, because a reader of the method need not open it
    schedules = {"gkd": baselines.Gkd, "taid": baselines.Taid,
                 "distillm": partial(baselines.DistiLLM, run, student.tokenizer)}
    schedule = schedules.get(phase, Schedule)(settings, episodes)
    distil(run, settings, student, guide, session, task, schedule)


if __name__ == "__main__":
    run_program("train.py", main)
