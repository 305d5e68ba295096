"""Checks that several places share: each refuses by name, or says in a line what it changes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.files import read_json
from infra.parallel import say

TAGS = ["</search>", "</answer>"]  # of any protocol: what rollout.py ends a turn at


def check_together(settings: Any, distance: str, *, reinforces: bool, is_grouped: bool) -> None:
    """Refuse settings that cannot work together; distance: the one that the phase takes."""
    s = settings
    rules = (
        ("mix", s.mix == 1 and "skew" in distance, f"--distance {distance} is 0 there"),
        ("until_score", s.until_score > 0 and not s.eval_every, "it is a score of a validation; "
         "give --eval-every, or drop it"),
        ("temperature", reinforces and s.temperature == 0, "reinforcement needs more than 0"),
        ("mean_over", reinforces and (s.mean_over, s.kl_in) == ("episode", "exact"),
         "--kl-in exact is a mean over tokens; give --mean-over token, or another --kl-in"),
        ("top_p", reinforces and s.top_p != 1, "reinforcement needs 1: it scores any token"),
        ("group_size", is_grouped and not 2 <= s.group_size <= s.prompts_per_step, "expected at "
         f"least 2, and at most --prompts-per-step ({s.prompts_per_step}), which counts episodes"))
    for name, is_wrong, advice in rules:
        if is_wrong:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(s, name)}: {advice}")


def learnable(episodes: Sequence[Any]) -> list[Any]:
    """Episodes with text of the agent, without those of the retriever's faults."""
    return [e for e in episodes if e.num_agent_tokens > 0 and e.status != "search_error"]


def keep_learnable(path: object, episodes: Sequence[Any]) -> list[Any]:
    """The learnable episodes of a file; says how many others it has, and refuses those alone."""
    kept = learnable(episodes)
    got = f"{path}: got {len(episodes) - len(kept)} of {len(episodes)} episodes without agent text"
    if episodes and not kept:
        raise ValueError(f"{got}, expected some to learn from; check who wrote its segments")
    if len(kept) < len(episodes):
        say(f"{got}; they are passed over")
    return kept


def check_asked(settings: Any) -> None:
    """Refuse a phase that asks questions without them, or without passages or a fitting prompt."""
    prompt = Path(settings.prompt)
    if prompt.is_file() and "{question}" not in prompt.read_text(encoding="utf-8"):
        raise ValueError(f"--prompt: got {prompt} without {{question}}, expected it in the "
                         "question's place")
    searches = settings.max_turns > 0 and "://" not in settings.index  # else another one searches
    if not settings.questions or searches and not (settings.corpus and settings.encoder):
        raise ValueError(f"phase {settings.phase}: got --questions {settings.questions!r}, "
                         f"--corpus {settings.corpus!r}, --encoder {settings.encoder!r}, expected "
                         "all three (the last two are not needed with --max-turns 0 or an --index "
                         "http://...)")


def check_session(settings: Any, num: int, num_val: int, drops_equal: bool) -> None:
    """Refuse num questions, num_val of them set apart, that are too few for a step to ask.

    drops_equal: whether the task leaves out groups of equal rewards.
    Says what else will not be as it seems: no validation (an error where the run waits for its
    score), warm-ups of loop two that do not end, and a KL that groups make large.
    """
    got = (f"{settings.questions}: got {num} questions, {num_val} of them set apart to validate "
           f"(--val-size {settings.val_size}, at most a tenth)")
    num_asked, flag = 0, "batch-size"
    if settings.advantage:
        num_asked, flag = settings.prompts_per_step // settings.group_size, "prompts-per-step"
        has_critic = settings.advantage == "gae"
        num_actor_steps = settings.steps - has_critic * settings.critic_only_steps
        check_warm_up("actor", settings.actor_warmup_steps, num_actor_steps)
        check_warm_up("critic", has_critic * settings.critic_warmup_steps, settings.steps)
        in_reward = settings.kl_in == "reward" and settings.kl_where != "none" and settings.beta
        if in_reward and not has_critic and not drops_equal:
            say("--kl-in reward: got it with advantages of groups, which rank a group of equal "
                "scores by its KL alone, as strongly as by right answers; --kl-in loss and exact "
                "keep its weight")
    elif settings.phase in ("gkd", "distillm"):
        num_asked = settings.batch_size
    if num - num_val < num_asked:
        raise ValueError(f"{got}, expected {num_asked} others, which a step asks; lower --{flag}")
    if num_val == 0 and settings.until_score > 0:
        raise ValueError(f"{got}, expected some, for --until-score {settings.until_score}")
    if num_val == 0 and settings.eval_every > 0:
        say(f"{got}: there will be no validation score")


def check_warm_up(name: str, num_warm: int, num_steps: int) -> None:
    """Say so where a learning rate will not reach its peak."""
    if num_warm > num_steps:
        say(f"--{name}-warmup-steps {num_warm}: got more than the {num_steps} steps that follow; "
            "the learning rate will not reach its peak")


def check_same_tokens(student: Any, teacher: Any) -> None:
    """The teacher scores the student's ids, so every id must mean the same to both tokenizers.

    From here on a turn ends at any token that ends one for either of them.
    """
    ours, theirs = student.full.get_vocab(), teacher.full.get_vocab()
    if differing := sorted(ours.items() ^ theirs.items(), key=lambda item: item[1]):
        raise ValueError(
            f"--teacher: got another vocabulary than the student's (for example {differing[:3]}), "
            "expected the same token ids; take both from one model family")
    ends = student.end_ids | teacher.end_ids
    if unknown := [i for i in sorted(ends) if student.full.id_to_token(i) is None]:
        raise ValueError(f"--student, --teacher: got end tokens {unknown}, expected ids of their "
                         "tokenizer; correct eos_token_id in generation_config.json")
    if student.end_ids != teacher.end_ids:
        say(f"tokens that end a turn: the student's {sorted(student.end_ids)}, the teacher's "
            f"{sorted(teacher.end_ids)}; here all of them do")
    student.end_ids = teacher.end_ids = ends


def write_ends(tokenizer: Any, folder: Path) -> None:
    """List all that ends a turn, tokens and tags, where a reader of the folder looks for it."""
    path, first = folder / "generation_config.json", tokenizer.eos_id
    ends = {"eos_token_id": [first, *sorted(tokenizer.end_ids - {first})], "stop_strings": TAGS}
    path.write_text(json.dumps(read_json(path, {}) | ends, indent=1) + "\n", encoding="utf-8")
