"""A session: what a phase opens (policies, passages, questions) and what it asks of the agent."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data import Question, load_questions
from episode import Episode, Protocol
from infra.parallel import shard, shuffled
from infra.run import Run
from model import Critic, load_decoder, save_decoder
from rollout import Policy, SearchEngine, load_protocol
from settings import TrainSettings
from tokenizer import Tokenizer

Report = Callable[[list[Episode]], dict[str, float]]


class Task(NamedTuple):
    """What a method asks of the agent and pays for; each part is a plain function."""
    reward: Callable[[list[Episode]], list[float]] | None = None  # None: Eq. 3, Episode.score
    report: Report | None = None  # sums over these episodes, logged as means rollout/NAME
    val_report: Report | None = None  # the same of a validation, as eval/NAME
    # (questions, *seeds) -> the questions as a step, or a validation (seed 0), asks them
    prepare: Callable[..., list[Question]] = lambda questions, *seeds: questions
    protocol: Protocol | None = None  # None: the one that settings name
    drop_equal_groups: bool = False  # leave out groups whose episodes have equal rewards


class Session(NamedTuple):
    retriever: SearchEngine | None  # None where nothing is searched
    questions: list[Question]  # to train on
    val_questions: list[Question]  # set apart to measure progress
    protocol: Protocol


def open_session(settings: TrainSettings, device: torch.device, task: Task, *,
                 asks: bool = True) -> Session:
    """Questions, and passages if episodes search. asks: whether the phase asks questions at all."""
    from infra.checks import check_asked, check_session  # here: `import train` should load little
    protocol = task.protocol or load_protocol(settings.protocol)
    if not asks:
        return Session(None, [], [], protocol)
    check_asked(settings)
    questions = load_questions(settings.questions, answer_rule=settings.answer_rule)
    questions = [questions[i] for i in shuffled(len(questions), 0)]  # one split for all seeds
    num_val = min(settings.val_size, len(questions) // 10)
    check_session(settings, len(questions), num_val, task.drop_equal_groups)
    retriever = None
    if settings.max_turns > 0:
        from retriever import open_retriever  # here, because only a phase that searches needs it
        retriever = open_retriever(settings, device)
    return Session(retriever, questions[num_val:], questions[:num_val], protocol)


def load_policy(path: str, device: torch.device, role: str,
                dtype: torch.dtype = torch.float32) -> Policy:
    if not path:
        raise ValueError(f"--{role}: got no checkpoint, expected a folder or a hub id")
    tokenizer = Tokenizer.load(path)
    return Policy(load_decoder(path, dtype=dtype, device=device, num_ids=tokenizer.size), tokenizer)


def open_student(run: Run, settings: TrainSettings) -> Policy:
    """The policy that a run trains."""
    student = load_policy(settings.student, run.device, "student")
    student.tokenizer.date = run.date  # a template may write it; the same when the run goes on
    run.write_config = lambda: save_policy(student, run.dir, {})
    if settings.train_layers:
        from infra.freeze import train_last  # here, because few runs need it
        run.say(train_last(student.decoder, settings.train_layers))
    # The critic is a copy and inherits these.
    student.decoder.checkpointing = settings.checkpointing
    student.decoder.compute_dtype = compute_dtype(settings, run.device)
    return student


def compute_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    """Of activations and GEMMs of what is trained."""
    return getattr(torch, settings.compute_dtype or
                   ("bfloat16" if device.type == "cuda" else "float32"))


def open_frozen(settings: TrainSettings, device: torch.device, role: str,
                student: Policy | None = None) -> Policy:
    """The policy that the setting `role` names, without gradients; a student must share its ids."""
    dtype = torch.float32 if role == "student" else getattr(torch, settings.teacher_dtype)
    policy = load_policy(getattr(settings, role), device, role, dtype)
    policy.decoder.requires_grad_(False)
    if student is not None:
        from infra.checks import check_same_tokens
        check_same_tokens(student.tokenizer, policy.tokenizer)
    return policy


def shard_models(settings: TrainSettings, student: Policy, guide: Policy | None,
                 critic: Critic | None = None) -> None:
    """Split student and critic, and with --shard all the guide, over the processes."""
    policies = {"none": (), "student": (student,), "all": (student, guide)}[settings.shard]
    for policy in filter(None, policies):
        shard(policy.decoder, [*policy.decoder.model.layers], "hidden", policy.dtype)
    if critic is not None and settings.shard != "none":
        shard(critic, [*critic.backbone.model.layers], "values", student.dtype)


def save_policy(policy: Policy, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a policy of these unsharded tensors and its end tokens; without tensors, no weights."""
    from infra.checks import write_ends
    save_decoder(policy.decoder, policy.tokenizer, folder, state=tensors)
    write_ends(policy.tokenizer, folder)
