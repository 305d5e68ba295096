"""Watch one episode: what the agent thinks, searches, reads and answers.

A model is asked as its run was: prompt, passages and limits come from its run.json, where no flag
and no preset that is named says otherwise.

Run: python rollout.py ask "who wrote ..." --model runs/dgpo
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from data import Question
from episode import episode_text
from infra import cli
from infra.config import setting
from infra.programs import check_paths, read_command
from infra.record import recorded_settings
from rollout import RolloutSettings, generate
from session import load_policy
from tokenizer import Tokenizer

# What is taken from the run that made a model: how it acts and what it searches, not how training
# samples, or how many episodes fit into memory.
RECORDED = {field.name for field in fields(RolloutSettings)}
RECORDED -= {"temperature", "top_p", "rollout_rows"}


@dataclass
class AskSettings(RolloutSettings):
    question: str = setting("", "what is asked, with or without the flag", is_words=True,
                            needed=True)
    model: str = setting("runs/dgpo", "checkpoint that answers", reads="DIR")
    dtype: str = setting("float32", "bfloat16 takes half the memory, and is faster on processors "
                         "that multiply in it", choices=("float32", "bfloat16"))
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    seed: int = setting(0, "sampling noise, when temperature > 0", at_most=2**53)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, that of all. Of tokens that write a character together, the
    last one has it, and the others are empty."""
    texts, done, start = [], 0, 0  # ids[start:done] come before, in case a blank depends on them
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:done], skip_special=False)
        text = tokenizer.decode(ids[start:end], skip_special=False)
        if text.endswith("\ufffd") and end < min(len(ids), done + 4):  # of at most 4 bytes
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, done = done, end
    return texts


def ask(argv: list[str]) -> None:
    """Print one episode."""
    shared = {field.name for field in fields(AskSettings)} - {"seed", "temperature", "dtype"}
    settings = cli.load(
        AskSettings, argv, prog="rollout.py ask", description="Watch one episode.",
        default_config=Path(__file__).parent / "configs" / "world.toml", shared=shared,
        recorded=partial(recorded_settings, sorted(RECORDED)),
    )  # fmt: skip
    check_paths(settings)
    policy = load_policy(
        settings.model, torch.device("cpu"), "model", getattr(torch, settings.dtype)
    )
    retriever = None
    if settings.max_turns > 0:
        from retriever import open_retriever  # here, because only a policy that searches needs it

        retriever = open_retriever(settings)
    question = Question("asked", settings.question, (), "asked")
    [episode] = generate(policy, retriever, [question], settings, seed=settings.seed)
    print(episode_text(episode, policy.tokenizer))


def main(argv: list[str]) -> None:
    read_command(argv, "rollout.py", __doc__, ("ask",))
    with cli.reporting("rollout.py"):
        ask(argv[1:])


if __name__ == "__main__":
    main(["ask", *sys.argv[1:]])
