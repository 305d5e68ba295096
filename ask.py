"""Watch one episode: what the agent thinks, searches, reads and answers.

Run: python rollout.py ask "who wrote ..." --model runs/dgpo
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from data import Question
from episode import episode_text
from infra import config
from infra.config import setting
from model import load_decoder
from rollout import Policy, RolloutSettings, generate
from tokenizer import Tokenizer


@dataclass
class AskSettings(RolloutSettings):
    model: str = setting("runs/dgpo", "checkpoint that answers")
    dtype: str = setting("float32", "bfloat16 takes half the memory, and is faster on processors "
                         "that multiply in it", choices=("float32", "bfloat16"))
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    seed: int = setting(0, "sampling noise, when temperature > 0")


def ask(words: list[str], argv: list[str]) -> None:
    """Print one episode."""
    if not words:
        sys.exit('rollout.py: got no question; expected: python rollout.py ask "who wrote ..." '
                 "--model DIR")
    shared = {field.name for field in fields(AskSettings)} - {"seed", "temperature", "dtype"}
    settings = config.load(
        AskSettings, argv, prog="rollout.py ask", description="Watch one episode.",
        default_config=Path(__file__).parent / "configs" / "world.toml", shared=shared,
    )  # fmt: skip
    decoder = load_decoder(settings.model, dtype=getattr(torch, settings.dtype))
    policy = Policy(decoder, Tokenizer.load(settings.model))
    retriever = None
    if settings.max_turns > 0:
        from retriever import Retriever  # here, because only a policy that searches needs it

        index = settings.index or None
        retriever = Retriever.load(settings.corpus, settings.encoder, index=index)
    question = Question("asked", " ".join(words), (), "asked")
    [episode] = generate(policy, retriever, [question], settings, seed=settings.seed)
    print(episode_text(episode, policy.tokenizer))


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """(words before the first flag, the rest)."""
    first_flag = next((i for i, arg in enumerate(argv) if arg.startswith("--")), len(argv))
    return argv[:first_flag], argv[first_flag:]


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command != "ask":
        is_help = command in ("", "-h", "--help")
        sys.exit(__doc__ if is_help else f"rollout.py: got {command!r}, expected ask")
    try:
        ask(*split_words(rest))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"rollout.py: {error}")


if __name__ == "__main__":
    main(["ask", *sys.argv[1:]])
