"""BARD: budget-aware reasoning distillation (Niu et al., 2025, arXiv:2511.01470).

The user says how many tokens the model may think. Phase bard-sft imitates a teacher's chains of
thought, compressed to several budgets. Phase bard-rl rewards right answers whose thoughts keep
within the budget. Engine and training loops are those of DGPO.

The paper's abstract names the two phases, the budget as the user's control signal, chains
compressed to various budgets, and a reward for both reasoning performance and budget fidelity.
Others report that the reward is the product of the two, and that the compressor is another
language model; we have not read it.

The rest is a reconstruction, because the paper's own choice was not available. An option at the
right changes it:
    control signal     one sentence in the user's turn, with the number in it   --budget-text
    what is counted    tokens strictly inside <think> and </think>, over all turns
    budgets            one of a list, drawn for each question                   --budgets
    compressor asked   with COMPRESS_PROMPT, in our own words                   --compress-prompt
    acceptance         the teacher finds the answer when it reads a model's
                       chain; a refused chain is tried again                    --compress-tries
                       the length is in [min_fill * b, b]                       --min-fill
                       a question stays if half of its budgets have a version
    reinforcement      GRPO, with one budget a group; a group whose rewards are
                       all equal is left out                                    --advantage gae
    fidelity           1 within the budget, then linearly down to 0 at
                       (1 + tolerance) * b                                      --budget-tolerance
    bonus for use      a reward for using the budget; none by default           --budget-use
    reward             the product; also the sum, and L1-Max of Aggarwal and
                       Welleck (2025); L1-Exact and BudgetThinker's are missing --budget-reward
Departures from analogues: L1 counts the whole response, we count the thinking alone. L1's code
halves the slope of its formula; we use the formula.

    torchrun train.py --phase bard-data    compress a teacher's chains to several budgets
    torchrun train.py --phase bard-sft     imitate them
    torchrun train.py --phase bard-rl      reinforce
    python bard.py measure --model DIR --budgets 64,128 --questions FILE   adherence and accuracy
    python bard.py ask "which is ..." --model DIR --budget 64 [--hard-stop]

A row of a question file may say how its answer is compared: "answer_kind": "integer" (AIME) or
"choice" (GPQA). Tokens of compressed chains are those of the student's tokenizer.

Legend: l tokens of thinking, b budget.
"""

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import eval as evaluation
from data import Question, exact_match, parse_question
from distil import Schedule, distil
from episode import Episode, Segment, begin_episode, episode_text, load_episodes, save_episodes
from eval import SHARED, AgentSettings, EvalSettings
from formats.answers import find_numbers
from infra import cli, config
from infra.config import setting
from infra.files import read_rows
from infra.parts import find_made
from infra.programs import check_paths, read_command
from infra.record import recorded_settings
from infra.run import Run, launch
from reinforce import reinforce
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate, load_protocol
from sampling import write_episodes
from serving.ask import RECORDED
from session import Session, Task, open_frozen, open_session, open_student
from settings import TrainSettings
from settings import with_defaults as with_core_defaults
from tokenizer import Tokenizer

# Each with the words by which settings say who reads them (infra/config.py).
PHASES = {"bard-data": "teacher asks", "bard-sft": "learn distil sft",
          "bard-rl": "learn reinforce teacher"}
REWARDS = ("multiplicative", "additive", "l1_max")
BUDGET_TEXT = "Think for at most {budget} tokens."  # BARD's own words are not known
COMPRESS_PROMPT = (
    "Below are a question, a line of reasoning about it and the answer that it reaches. Rewrite "
    "the reasoning so that it takes at most {budget} tokens: keep the steps without which the "
    "answer could not be found, in their order, drop repetitions, doubts and detours, add nothing "
    "new, and end with the answer. Write the shorter reasoning alone.\n\n"
    "Question: {question}\n\nReasoning: {chain}\n\nAnswer: {answer}"
)
THINK_END, ANSWER_START = "</think>", "<answer>"
TURN = re.compile(r"(?s)\s*<think>(?:(?!</?think>).)*</think>\s*"
                  r"<(search|answer)>((?:(?!<think>).)*?)</\1>")
TAG = re.compile(r"</?(?:think|answer|search|information)>")
MAX_ACTION_TOKENS = 48  # a longer query or answer would be thinking that is not counted
# Keys of a row of a chains file that do not belong to its question.
CHAIN_KEYS = ("chain", "answer", "segments", "status", "score", "queries", "instruction", "source")


# ---- settings ----


@dataclass
class BudgetSettings:
    """What a preset's table [bard] may hold: all commands read it."""

    budgets: tuple[int, ...] = setting((), "tokens to think; a question gets one of them")
    budget_text: str = setting(BUDGET_TEXT, "how a budget is told; empty: the agent is not told")


@dataclass
class BardSettings(BudgetSettings, TrainSettings):
    phase: str = setting("bard-sft", "what to run", choices=PHASES)
    student: str = setting("", "checkpoint whose tokens are counted, and that is trained",
                           reads="DIR", needed=True)
    episodes: str = setting("runs/versions.jsonl", "compressed chains: of bard-data, for bard-sft",
                            reads="FILE", made_by="bard-data", of="bard-data bard-sft")
    versions_per_question: int = setting(6, "budgets that each chain is compressed to",
                                         of="bard-data", at_least=2, section="bard-data: chains")
    chains: str = setting("", "the teacher's chains, rows with question, golden_answers, chain, or "
                          "an episodes file; empty: the teacher is asked", reads="FILE")
    compressor: str = setting("trails", "trails (the world's rules) or a checkpoint",
                              reads="trails|DIR")
    compress_prompt: str = setting("", "a file with {question} {chain} {answer} {budget}; empty: "
                                   "ours", reads="FILE")
    compress_tries: int = setting(3, "attempts of a compressor that samples", at_least=1)
    min_fill: float = setting(0.5, "least share of its budget that a version fills", at_most=1)
    budget_reward: str = setting("multiplicative", "form of the reward", choices=REWARDS,
                                 section="bard-rl: reward")
    budget_tolerance: float = setting(0.5, "share of overshoot that is worth nothing",
                                      when="budget_reward multiplicative additive")
    budget_use: float = setting(0.0, "share of the reward that is for using the budget", at_most=1,
                                when="budget_reward multiplicative additive")
    budget_weight: float = setting(0.5, "what fidelity alone is worth",
                                   when="budget_reward additive")
    l1_alpha: float = setting(3e-4, "slope per token (its paper's)", when="budget_reward l1_max")
    l1_delta: float = setting(0.5, "what is left at the budget (its paper's)",
                              when="budget_reward l1_max")


def with_defaults(settings: BardSettings) -> BardSettings:
    """Settings with what the phase implies where they are left open; refuses what cannot work."""
    if settings.phase == "bard-rl" and not settings.advantage:
        settings = replace(settings, advantage="group")
    check_settings(settings)
    return with_core_defaults(settings, reinforces=settings.phase == "bard-rl")


def check_settings(settings: BardSettings) -> None:
    """Refuse settings that no phase of BARD can work with."""
    check_budgets(settings.budgets, settings)
    for name, low, high in (("budget_use", 0, 1), ("min_fill", 0, 1),
                            ("versions_per_question", 2, math.inf),
                            ("compress_tries", 1, math.inf), ("budget_tolerance", 0, math.inf)):
        value = vars(settings)[name]
        if not low <= value <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: got {value}, expected {low} to {high}")
    if settings.phase == "bard-data" and not settings.student:
        raise ValueError("--student: got no checkpoint, expected one: budgets count its tokens")
    # What the teacher is asked for bard-data may follow any protocol.
    protocol = "search-r1" if settings.phase == "bard-data" else settings.protocol
    check_own_reward(settings, "search-r1", protocol)


def check_own_reward(settings: TrainSettings, tags: str, protocol: str) -> None:
    """Refuse settings that do not fit a phase with a reward of its own; QAgent's asks, too.

    tags, protocol: names of the protocol whose tags that reward reads, and of the one in use.
    """
    if settings.reward:
        raise ValueError(f"--reward {settings.reward}: got it for phase {settings.phase}, which "
                         "has its own; drop it")
    if protocol != tags:
        raise ValueError(f"--protocol {settings.protocol}: got it for phase {settings.phase}, "
                         f"whose reward reads the tags of {tags}; give --protocol {tags}")
    if (settings.kl_where, settings.advantage, settings.kl_in) == ("wrong", "group", "reward"):
        raise ValueError("--kl-in reward: got it with --kl-where wrong and advantages of groups, "
                         "which would blow the KL of a group that is all wrong up to the size of a "
                         "right answer; give --kl-in loss")


def check_budgets(
    budgets: Sequence[int], settings: "BardSettings | MeasureSettings | AskSettings", *,
    stops: bool = False,
) -> None:
    """Refuse budgets that an episode, or with a hard stop a turn, has no room for."""
    if not budgets:
        raise ValueError("--budgets: got none, expected at least one, --budgets 128 256 512 for "
                         "example")
    check_budget_text(settings.budget_text)
    room = settings.max_context_tokens
    for budget in budgets:
        if not 0 < budget < room:
            raise ValueError(f"budget: got {budget}, expected 1 to {room - 1} tokens: it must fit "
                             f"into --max-context-tokens {room}")
        if stops and settings.max_turns == 0 and budget >= settings.max_new_tokens:
            raise ValueError(f"--hard-stop: got a budget of {budget} and --max-new-tokens "
                             f"{settings.max_new_tokens}, which ends the turn first; raise "
                             "--max-new-tokens")


def check_budget_text(text: str) -> None:
    if text and "{budget}" not in text:
        raise ValueError(f"--budget-text: got {text!r}, expected {{budget}} where the number "
                         "belongs, or nothing at all")


# ---- a question's budget, and how its answer is compared ----


def tell(question: Question, budget: int, budget_text: str) -> Question:
    """The question with a budget, told by budget_text; an empty text keeps it from the agent."""
    check_budget_text(budget_text)
    return replace(question, instruction=budget_text.replace("{budget}", str(budget)),
                   metadata={**question.metadata, "budget": budget})


def budget_of(question: Question) -> int | None:
    """The tokens that may be thought about a question; None: it has no budget."""
    budget = question.metadata.get("budget")
    if not isinstance(budget, int | None):
        raise ValueError(f"{question.id}: got budget {budget!r}, expected a whole number")
    return budget


def draw_budgets(
    questions: Sequence[Question], budgets: Sequence[int], budget_text: str, *seeds: int
) -> list[Question]:
    """Each question with one of the budgets, which depends on the seeds and on its place alone."""
    drawn = np.random.default_rng((*seeds, 4)).choice(np.array(budgets), len(questions))
    return [tell(q, int(budget), budget_text) for q, budget in zip(questions, drawn, strict=True)]


def integer_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if the prediction's only number is a gold one; "$\\boxed{042}$" is "42" (not in paper)."""
    number = _number(prediction or "")
    return float(number is not None and any(number == _number(gold) for gold in golds))


def _number(text: str) -> Decimal | None:
    """The only number of a text, or of its last \\boxed{}, however often it is there."""
    boxed = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    numbers = find_numbers(boxed[-1] if boxed else text)
    return numbers.pop() if len(numbers) == 1 else None


def choice_match(prediction: str | None, golds: Sequence[str]) -> float:
    """1 if the prediction names a gold option: "(c)", "C. so", "the answer is C" (not in paper)."""
    letter = _letter(prediction or "")
    return float(letter is not None and any(letter == _letter(gold) for gold in golds))


def _letter(text: str) -> str | None:
    """The option that a text, or its last \\boxed{}, names."""
    boxed = re.findall(r"\\boxed\{(?:\\text\{)?([^{}]*)\}", text)
    text = (boxed[-1] if boxed else text).strip().strip("*").strip()
    match = re.match(r"\(?([A-J])\)?(?:[.):]|$)", text, re.IGNORECASE)
    if match is None:
        said = r"(?i:answer(?: is)?:?\s*(?:option\s*)?)\(?([A-J])\)?(?![A-Za-z])"
        match = re.search(said, text)
    return match[1].upper() if match else None


ANSWER_KINDS = {"text": exact_match, "integer": integer_match, "choice": choice_match}
READERS: dict[str, Callable[[str], Any]] = {"integer": _number, "choice": _letter}


def with_answer_kind(question: Question, where: str = "") -> Question:
    """The question with the comparison of answers that its row's "answer_kind" asks for.

    An unknown kind, or a gold answer of another kind, is an error that names `where` or its id.
    """
    where = where or question.id
    kind = question.metadata.get("answer_kind", "text")
    if not isinstance(kind, str) or kind not in ANSWER_KINDS:
        raise ValueError(f"{where}: got {kind!r} for answer_kind, expected one of "
                         f"{', '.join(ANSWER_KINDS)}")
    if kind in READERS and None in map(READERS[kind], question.golden_answers):
        raise ValueError(f"{where}: got {question.golden_answers} for golden_answers, expected "
                         f"answers of kind {kind}")
    return question if kind == "text" else replace(question, match=ANSWER_KINDS[kind])


# ---- what is thought ----


class Thinking(NamedTuple):
    num_tokens: int  # strictly inside <think> and </think>
    is_open: bool  # whether the last block has no end yet


def thinking(ids: Sequence[int], tokenizer: Tokenizer) -> Thinking:
    """The thinking in one agent turn. A token that holds a part of a tag counts for the tag."""
    num_tokens, begin, is_open = 0, 0, False
    for i, token in enumerate(ids):
        if not tokenizer.closes(token):
            continue
        text = tokenizer.decode(ids[begin : i + 1])
        if not is_open and "<think>" in text:
            is_open, begin = True, i + 1
        elif is_open and THINK_END in text:
            tag = i
            while THINK_END not in tokenizer.decode(ids[tag : i + 1]):
                tag -= 1
            num_tokens += tag - begin
            is_open, begin = False, i + 1
    if is_open:
        num_tokens += len(ids) - begin
    return Thinking(num_tokens, is_open)


def num_thinking_tokens(episode: Episode, tokenizer: Tokenizer) -> int:
    """l, which a budget limits: the agent's tokens inside its thinking, over all turns."""
    turns = [segment for segment in episode.segments if segment.author == "agent"]
    return sum(thinking(turn.ids, tokenizer).num_tokens for turn in turns)


def hard_stop(episode: Episode, tokenizer: Tokenizer) -> Segment | None:
    """At the budget: closes the thinking in the agent's place and lets it write the answer.

    It is a Protocol's `interrupt`. Thinking that is just closing by itself is left alone.
    """
    budget = budget_of(episode.question)
    turns = [segment for segment in episode.segments if segment.author == "agent"]
    if budget is None or sum(len(turn.ids) for turn in turns) < budget:
        return None  # before anything is decoded: this is called for every token
    thoughts = [thinking(turn.ids, tokenizer) for turn in turns]
    if not thoughts[-1].is_open or sum(thought.num_tokens for thought in thoughts) < budget:
        return None
    tail = tokenizer.decode(turns[-1].ids[-len(THINK_END) :])
    if any(THINK_END.startswith(tail[i:]) for i in range(len(tail))):
        return None
    ids = tokenizer.encode(f" {THINK_END}\n{ANSWER_START}", own=True)
    return Segment("environment", ids, opens=ANSWER_START)


def is_countable(episode: Episode, tokenizer: Tokenizer) -> bool:
    """Whether each turn is one thought and one short action, so that all thinking is counted."""
    if episode.status != "answered":
        return False
    turns = [TURN.match(tokenizer.decode(s.ids)) for s in episode.segments if s.author == "agent"]
    return all(turn and len(tokenizer.encode(turn[2])) <= MAX_ACTION_TOKENS for turn in turns)


# ---- rewards ----


def fidelity(length: int, budget: int, *, tolerance: float, use: float = 0.0) -> float:
    """1 for l <= b, falling linearly to 0 at l = (1 + tolerance) b.

    use: below the budget the value is 1 - use (1 - l / b).
    """
    if length <= budget:
        return 1 - use * (1 - length / budget)
    if tolerance == 0:
        return 0.0
    return max(0.0, 1 - (length - budget) / (tolerance * budget))


def multiplicative(correct: float, length: int, budget: int, **shape: float) -> float:
    """Right and within the budget: a short wrong answer is worth nothing (BARD's, as reported)."""
    return correct * fidelity(length, budget, **shape)


def additive(correct: float, length: int, budget: int, *, weight: float, **shape: float) -> float:
    """The ablation: a short wrong answer is worth `weight`; shape: see `fidelity`."""
    return correct + weight * fidelity(length, budget, **shape)


def l1_max(correct: float, length: int, budget: int, *, alpha: float, delta: float) -> float:
    """L1-Max (arXiv:2503.04697): 1[correct] clip(alpha (b - l) + delta, 0, 1)."""
    return correct * min(1.0, max(0.0, alpha * (budget - length) + delta))


def reward(episode: Episode, tokenizer: Tokenizer, settings: BardSettings) -> float:
    """What an episode with a budget is worth; 0 if some of its thinking cannot be counted."""
    if not is_countable(episode, tokenizer):
        return 0.0
    correct, budget = episode.score, budget_of(episode.question)
    length = num_thinking_tokens(episode, tokenizer)
    if settings.budget_reward == "l1_max":
        return l1_max(correct, length, budget, alpha=settings.l1_alpha, delta=settings.l1_delta)
    shape = {"tolerance": settings.budget_tolerance, "use": settings.budget_use}
    if settings.budget_reward == "additive":
        return additive(correct, length, budget, weight=settings.budget_weight, **shape)
    return multiplicative(correct, length, budget, **shape)


def report_thinking(episodes: Sequence[Episode], tokenizer: Tokenizer) -> dict[str, float]:
    """Sums over the episodes of a step: tokens of thinking, and thoughts within the budget."""
    lengths = [num_thinking_tokens(episode, tokenizer) for episode in episodes]
    within = [n <= budget_of(e.question) for n, e in zip(lengths, episodes, strict=True)]
    return {"thinking": sum(lengths), "adherence": sum(within)}


# ---- data: a teacher's chains, compressed ----


class Chain(NamedTuple):
    question: Question
    text: str  # the reasoning, without tags


def read_chains(path: str | Path, answer_rule: str = "squad") -> tuple[list[Chain], int]:
    """The right chains of a file, and how many rows were left out: wrong, or of several turns.

    A row has a "chain", and an "answer" if the teacher's may be wrong, or it is an episode.
    """
    chains: list[Chain] = []
    num_left_out = 0
    for number, row in read_rows(Path(path)):
        where = f"{path}:{number}"
        source, id = row.get("source") or Path(path).stem, str(len(chains))
        question_row = {key: value for key, value in row.items() if key not in CHAIN_KEYS}
        question = parse_question(question_row, source, id, where, answer_rule)
        question = with_answer_kind(question, where)
        text, answer = chain_text(row, where), row.get("answer", question.golden_answers[0])
        if not isinstance(answer, str | None):
            raise ValueError(f"{where}: got answer {answer!r}, expected a text")
        if text and question.match(answer, question.golden_answers):
            chains.append(Chain(question, text))
        else:
            num_left_out += 1
    if not chains:
        raise ValueError(f"{path}: got no right answer with a chain in {num_left_out} rows, "
                         "expected at least one")
    return chains, num_left_out


def chain_text(row: dict[str, Any], where: str) -> str:
    """The reasoning of a row, without its tags; empty for an episode that is not one thought."""
    text, segments = row.get("chain"), row.get("segments")
    is_episode = isinstance(segments, list) and all(isinstance(s, dict) for s in segments)
    if text is None and is_episode:
        turns = [str(s.get("text")) for s in segments if s.get("author") == "agent"]
        thought = re.match(r"\s*<think>.*?</think>", "".join(turns), re.DOTALL)
        text = thought[0] if thought and len(turns) == 1 else ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: got no chain, expected the teacher's reasoning as text under "
                         "\"chain\", or an episode")
    text = text.strip().removeprefix("<think>").removesuffix(THINK_END).strip()
    if tag := TAG.search(text):
        raise ValueError(f"{where}: got {tag[0]} within a chain, expected reasoning without tags, "
                         "or with one <think> and </think> around it")
    return text


def num_chain_tokens(tokenizer: Tokenizer, chain: str) -> int:
    """l of a chain that stands between its tags."""
    ids = tokenizer.encode(f"<think> {chain} {THINK_END}", own=True)
    return thinking(ids, tokenizer).num_tokens


def draw_targets(chains: Sequence[Chain], settings: BardSettings) -> list[Chain]:
    """Each chain at versions_per_question budgets, drawn for it; those of a chain ascend."""
    targets, num = [], min(settings.versions_per_question, len(settings.budgets))
    for number, (question, text) in enumerate(chains):
        rng = np.random.default_rng((settings.seed, number, 5))
        budgets = rng.choice(settings.budgets, num, replace=False)
        targets += [Chain(tell(question, int(budget), settings.budget_text), text)
                    for budget in sorted(budgets)]
    return targets


def compress(
    chains: Sequence[Chain], student: Tokenizer, compressor: Policy | None,
    checker: Policy | None, settings: BardSettings,
) -> tuple[list[Episode], dict[str, int]]:
    """Versions of the chains for budgets drawn for each, and counts of what became of them.

    compressor: a model that is prompted; None: world.trails.compress. checker: a model that must
    find the answer when it reads the chain, by greedy decoding; None: the chain must contain it.
    The counts of refusals are those of the last attempt.
    """
    targets = draw_targets(chains, settings)
    accepted: dict[int, str] = {}  # the version of each target, by its place in the list
    places = list(range(len(targets)))  # of targets that have no version yet
    for attempt in range(1 if compressor is None else settings.compress_tries):
        missing = [targets[k] for k in places]
        proposed = propose(missing, student, compressor, settings, seed=settings.seed + attempt)
        counts = Counter[str]()
        fitting = {}
        for k, text in zip(places, proposed, strict=True):
            if reason := refusal(text, targets[k], student, settings.min_fill):
                counts[reason] += 1
            else:
                fitting[k] = text
        checked = [Chain(targets[k].question, text) for k, text in fitting.items()]
        are_right = check_answers(checked, checker, settings)
        counts["answer lost"] = are_right.count(False)
        accepted.update(itertools.compress(fitting.items(), are_right))
        places = [k for k in places if k not in accepted]
    episodes, num = [], len(targets) // len(chains)  # budgets of a chain
    for first in range(0, len(targets), num):
        versions = [k for k in range(first, first + num) if k in accepted]
        # The budget must explain the length, and not how hard the question is: no question may
        # stand at its easy budgets alone.
        if len(versions) < max(2, num / 2) or len({accepted[k] for k in versions}) < 2:
            counts["question with too few versions"] += len(versions)
            continue
        for k in versions:
            is_natural = accepted[k] == targets[k].text
            counts["kept as it was" if is_natural else "compressed"] += 1
            episode = begin_episode(student, targets[k].question, settings.prompt)
            episode.status, episode.answer = "answered", episode.question.golden_answers[0]
            text = f"<think> {accepted[k]} {THINK_END}\n{ANSWER_START} {episode.answer} </answer>"
            episode.segments.append(Segment("agent", student.encode(text, own=True)))
            episodes.append(episode)
    return episodes, dict(counts)


def refusal(text: str | None, target: Chain, student: Tokenizer, min_fill: float) -> str:
    """Why a version of the target is not taken; empty if its length is as it should be."""
    if not text:
        return "no chain"
    length, budget = num_chain_tokens(student, text), budget_of(target.question)
    if length > budget:
        return "too long"
    return "too short" if length < min_fill * budget and text != target.text else ""


def propose(
    targets: Sequence[Chain], student: Tokenizer, compressor: Policy | None,
    settings: BardSettings, *, seed: int,
) -> list[str | None]:
    """A version for each target; None if the compressor wrote none. A chain that fits is kept."""
    length = partial(num_chain_tokens, student)
    budgets = [budget_of(question) for question, _ in targets]
    proposed = [text if length(text) <= budget else None
                for (_, text), budget in zip(targets, budgets, strict=True)]
    places = [k for k, text in enumerate(proposed) if text is None]
    if compressor is None:
        from world import trails  # the embedded world's rules: nothing else here needs the world

        for k in places:
            proposed[k] = trails.compress(targets[k].text, budgets[k], length)
        return proposed
    prompt, asked = COMPRESS_PROMPT, []
    if settings.compress_prompt:
        prompt = Path(settings.compress_prompt).read_text(encoding="utf-8")
    for k in places:
        question, text = targets[k].question, prompt
        for place, value in (("{budget}", str(budgets[k])),
                             ("{answer}", question.golden_answers[0]),
                             ("{question}", question.question), ("{chain}", targets[k].text)):
            text = text.replace(place, value)
        asked.append(replace(question, instruction="", prompt=[{"role": "user", "content": text}]))
    room = max([settings.max_new_tokens, *(b + 16 for b in budgets)])  # it may think first
    rules = replace(settings, prompt="row", max_turns=0, max_new_tokens=room, temperature=1.0)
    episodes = generate(compressor, None, asked, rules, seed=seed, progress="compressor")
    for k, episode in zip(places, episodes, strict=True):
        written = episode.segments[-1]
        # A prompt that fills the context is not answered; an answer that was cut off is no chain.
        if written.author == "agent" and written.ids[-1] in compressor.tokenizer.end_ids:
            text = compressor.tokenizer.decode(written.ids).rpartition(THINK_END)[2]
            proposed[k] = TAG.sub(" ", text).strip() or None
    return proposed


def check_answers(
    chains: Sequence[Chain], checker: Policy | None, settings: BardSettings
) -> list[bool]:
    """Whether each chain alone leads to its question's answer; for the checker see `compress`."""
    if checker is None:
        return [any(gold.lower() in text.lower() for gold in question.golden_answers)
                for question, text in chains]
    episodes = []
    for question, text in chains:
        shown = checker.tokenizer.encode(f"<think> {text} {THINK_END}\n", own=True)
        episodes.append(begin_episode(
            checker.tokenizer, replace(question, instruction=""), settings.prompt, shown=shown,
            opens=ANSWER_START))
    rules = replace(settings, max_turns=0, temperature=0.0)
    episodes = generate(checker, None, episodes, rules, seed=0, progress="answers")
    return [episode.score == 1 for episode in episodes]


def write_versions(
    chains_path: str, student: Tokenizer, compressor: Policy | None, checker: Policy | None,
    settings: BardSettings,
) -> str:
    """Write the file that bard-sft reads, and counts beside it; returns a line for the log."""
    path = settings.episodes
    chains, num_left_out = read_chains(chains_path, settings.answer_rule)
    kinds = {chain.question.metadata.get("answer_kind", "text") for chain in chains}
    if compressor and not checker and kinds != {"text"}:
        raise ValueError(f"{chains_path}: got options or integers, which any text may contain, "
                         "expected a teacher that finds them in the compressed chains; give "
                         "--teacher")
    episodes, counts = compress(chains, student, compressor, checker, settings)
    if not episodes:
        raise ValueError(f"{path}: got no chain through the filters, expected some; {counts}; try "
                         "other --budgets, a lower --min-fill or another --compressor")
    save_episodes(path, episodes, student)
    lengths: dict[int, list[int]] = {}
    for episode in episodes:
        length = num_thinking_tokens(episode, student)
        lengths.setdefault(budget_of(episode.question), []).append(length)
    evaluation.write_result(Path(path).with_suffix(".counts.json"), {
        "chains": len(chains), "rows left out": num_left_out, "versions": len(episodes),
        "counts": counts,
        "mean_length": {b: round(float(np.mean(lengths[b])), 1) for b in sorted(lengths)},
        "versions_at": {b: len(lengths[b]) for b in sorted(lengths)},
        "settings": asdict(settings),
    })
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items() if count)
    return (f"{path}: {len(episodes)} versions of {len(chains)} chains ({num_left_out} rows left "
            f"out); {reasons}")


# ---- phases ----


def train(argv: list[str]) -> None:
    """Run one of PHASES; train.py hands over to it."""
    settings = cli.load(
        BardSettings, argv, prog="bard.py", description=__doc__.split("\n")[0],
        default_config=evaluation.DEFAULT_CONFIG, finish=with_defaults)
    phases = {"bard-data": make_versions, "bard-sft": imitate_versions,
              "bard-rl": reinforce_within_budget}
    launch(settings, partial(phases[settings.phase], settings=settings))


def open_questions(settings: BardSettings, device: torch.device, *, asks: bool) -> Session:
    """A session whose questions know how their answers are compared."""
    session = open_session(settings, device, Task(), asks=asks)
    return session._replace(questions=[*map(with_answer_kind, session.questions)],
                            val_questions=[*map(with_answer_kind, session.val_questions)])


def make_task(settings: BardSettings, tokenizer: Tokenizer) -> Task:
    """What both loops ask of the agent, and what the second one pays for."""

    def prepare(questions: list[Question], *seeds: int) -> list[Question]:
        return draw_budgets(questions, settings.budgets, settings.budget_text, *seeds)

    def report(episodes: list[Episode]) -> dict[str, float]:
        return report_thinking(episodes, tokenizer)

    task = Task(prepare=prepare, val_report=lambda e: {"adherence": report(e)["adherence"]})
    if settings.phase == "bard-sft":
        return task
    return task._replace(reward=lambda e: [reward(episode, tokenizer, settings) for episode in e],
                         report=report, drop_equal_groups=True)


def make_versions(run: Run, settings: BardSettings) -> None:
    """Phase bard-data: compress chains of a file, or of the teacher, which all processes ask."""
    chains, is_made = settings.chains, True
    if not chains:
        chains = str(Path(settings.episodes).with_suffix(".chains.jsonl"))
        if not settings.teacher and not Path(chains).exists():
            raise ValueError("--teacher: got no checkpoint and no --chains, expected either to "
                             "reason from")
        is_made = find_made(run, chains, settings, takes_any=not settings.teacher)
    session = open_questions(settings, run.device, asks=not is_made)
    teacher = open_frozen(settings, run.device, "teacher") if settings.teacher else None
    if not is_made:
        write_episodes(run, settings, teacher, session, chains)
    if run.rank > 0:
        return  # these processes have nothing to wait for
    compressor = checker = None
    if settings.compressor != "trails":
        # The rules of trails need no checker. They say the answer, and a teacher that has seen
        # natural chains alone may misread short ones.
        compressor, checker = open_frozen(settings, run.device, "compressor"), teacher
    student = Tokenizer.load(settings.student)
    run.say(write_versions(chains, student, compressor, checker, settings))


def imitate_versions(run: Run, settings: BardSettings) -> None:
    """Phase bard-sft: cross-entropy on what bard-data wrote."""

    def prepare(question: Question) -> Question:
        budget = budget_of(question)
        if budget is None:
            raise ValueError(f"--episodes {settings.episodes}: got episodes without a budget, "
                             "expected those that --phase bard-data writes")
        return tell(with_answer_kind(question), budget, settings.budget_text)

    session = open_questions(settings, run.device, asks=settings.eval_every > 0)
    student = open_student(run, settings)
    episodes = load_episodes(
        settings.episodes, student.tokenizer, prompt=settings.prompt, prepare=prepare)
    task = make_task(settings, student.tokenizer)
    distil(run, settings, student, None, session, task, Schedule(settings, episodes))


def reinforce_within_budget(run: Run, settings: BardSettings) -> None:
    """Phase bard-rl: GRPO, or PPO with --advantage gae."""
    session = open_questions(settings, run.device, asks=True)
    student = open_student(run, settings)
    guide = open_own_guide(settings, run.device, student)
    task = make_task(settings, student.tokenizer)
    reinforce(run, settings, student, guide, session, task)


def open_own_guide(
    settings: TrainSettings, device: torch.device, student: Policy
) -> Policy | None:
    """The teacher if only wrong episodes are guided, else the initial policy; QAgent's, too."""
    if settings.kl_where == "none":
        return None
    role = "teacher" if settings.kl_where == "wrong" else "student"
    return open_frozen(settings, device, role, student)


# ---- measures ----


def measure_budgets(
    policy: Policy, questions: Sequence[Question], settings: RolloutSettings,
    budgets: Sequence[int], *, budget_text: str = BUDGET_TEXT, seed: int = 0,
    retriever: Retriever | None = None, progress: bool = False,
) -> dict[str, Any]:
    """Ask every question at every budget, freely and with a hard stop.

    Returns summarize_budgets and "rows", one for each question and budget. "accuracy" is with the
    hard stop, so that methods are compared at equal compute; "accuracy_free" is without.
    """
    free = load_protocol(settings.protocol)
    protocols = {"": free, ", hard stop": free._replace(interrupt=hard_stop)}
    rows = []
    for budget in budgets:
        told = [tell(question, budget, budget_text) for question in questions]
        free_episodes, stopped_episodes = (
            generate(policy, retriever, told, settings, seed=seed, protocol=protocol,
                     progress=f"budget {budget}{name}" if progress else "")
            for name, protocol in protocols.items())
        for episode, stopped in zip(free_episodes, stopped_episodes, strict=True):
            rows.append({
                "id": episode.question.id, "budget": budget,
                "length": num_thinking_tokens(episode, policy.tokenizer),
                "correct_free": episode.score, "correct": stopped.score, "status": episode.status,
                "formed": is_countable(episode, policy.tokenizer)})
    return summarize_budgets(rows) | {"rows": rows}


def summarize_budgets(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"budgets": {b: measures}, "spearman": mean over questions, "area": of accuracy over log b}.

    The area is divided by its width: it is the mean accuracy over the logarithm of the budget.
    """
    by_budget: dict[int, list[dict[str, Any]]] = {}
    by_question: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_budget.setdefault(row["budget"], []).append(row)
        by_question.setdefault(row["id"], []).append(row)
    budgets = sorted(by_budget)
    measures = {b: summarize_budget(b, by_budget[b]) for b in budgets}
    correlations = [spearman([row["budget"] for row in group], [row["length"] for row in group])
                    for group in by_question.values()]
    accuracies = [measures[b]["accuracy"] for b in budgets]
    area = accuracies[0]
    if len(budgets) > 1:
        heights = [(a + b) / 2 for a, b in itertools.pairwise(accuracies)]
        area = float(np.average(heights, weights=np.diff(np.log(budgets))))
    return {"budgets": measures, "spearman": float(np.mean(correlations)), "area": area}


def summarize_budget(budget: int, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Measures of the rows at one budget.

    "length" is in tokens; "overshoot", "relative_error" and "use" are shares of the budget; the
    others are shares of the rows.
    """
    lengths = np.array([row["length"] for row in rows], float)
    means = {
        "formed": np.mean([row["formed"] for row in rows]),
        "adherence": (lengths <= budget).mean(),
        "overshoot": np.maximum(0, lengths - budget).mean() / budget,
        "relative_error": np.abs(lengths - budget).mean() / budget,
        "use": lengths.mean() / budget, "length": lengths.mean(),
        "accuracy": np.mean([row["correct"] for row in rows]),
        "accuracy_free": np.mean([row["correct_free"] for row in rows]),
    }
    return {"n": len(rows)} | {name: float(mean) for name, mean in means.items()}


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where a side never varies (no control)."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        order = np.unique(values, return_inverse=True)[1]
        ends = np.cumsum(np.bincount(order))
        ranks.append(((ends + np.r_[0, ends[:-1]] + 1) / 2)[order])
    if any(np.ptp(r) == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def budget_table(result: dict[str, Any]) -> str:
    """One line for each budget of summarize_budgets."""
    keys = ("formed", "adherence", "overshoot", "relative_error", "use", "length", "accuracy",
            "accuracy_free")
    lines = [["budget", *keys]]
    for budget, measures in result["budgets"].items():
        lines.append([str(budget), *(f"{measures[key]:.3f}" for key in keys)])
    return (f"{evaluation.align(lines)}\n"
            f"Spearman of length and budget within a question {result['spearman']:.3f}; "
            f"area under accuracy over log budget {result['area']:.3f}")


# ---- the program ----


@dataclass
class MeasureSettings(BudgetSettings, EvalSettings):
    """The settings of eval.py, and the budgets."""


@dataclass
class AskSettings(BudgetSettings, AgentSettings):
    model: str = setting("runs/bard-rl", "checkpoint that answers", reads="DIR")
    question: str = setting("", "what is asked, with or without the flag", is_words=True,
                            needed=True)
    budget: int = setting(0, "tokens to think; 0: the median of --budgets")
    hard_stop: bool = setting(False, "end the thinking at the budget and ask for the answer")


def run_measure(settings: MeasureSettings) -> None:
    """Write DIR/budgets.json and .jsonl, print the table."""
    check_budgets(settings.budgets, settings, stops=True)
    if settings.episodes:
        raise ValueError("--episodes: got it for bard.py measure, which writes none; drop it")
    if settings.hit_rule != "words":
        raise ValueError("--hit-rule: got it for bard.py measure, which counts no hits; drop it")
    sets = evaluation.read_sets(
        settings.questions, settings.limit, ANSWER_KINDS, settings.answer_rule)
    questions = [with_answer_kind(question) for group in sets.values() for question in group]
    policy, retriever = evaluation.load_agent(settings)
    name, out = evaluation.name_and_out(settings, settings.model)
    config.save(settings, out / "run.json")
    result: dict[str, Any] = {"name": name, "settings": asdict(settings)}
    result |= measure_budgets(
        policy, questions, settings, settings.budgets, budget_text=settings.budget_text,
        seed=settings.seed, retriever=retriever, progress=True)
    rows = result.pop("rows")
    evaluation.write_result(out / "budgets.json", result, rows)
    print(f"{budget_table(result)}\n\nwrote {out}/budgets.json, .jsonl")


def run_ask(settings: AskSettings) -> None:
    """Print one episode."""
    budget = settings.budget
    if budget == 0 and settings.budgets:
        budget = sorted(settings.budgets)[len(settings.budgets) // 2]
    check_budgets([budget], settings, stops=settings.hard_stop)
    protocol = load_protocol(settings.protocol)
    if settings.hard_stop:
        protocol = protocol._replace(interrupt=hard_stop)
    policy, retriever = evaluation.load_agent(settings)
    asked = Question("asked", settings.question, (), "asked")
    question = tell(asked, budget, settings.budget_text)
    [episode] = generate(
        policy, retriever, [question], settings, seed=settings.seed, protocol=protocol)
    print(episode_text(episode, policy.tokenizer))
    print(f"  [{num_thinking_tokens(episode, policy.tokenizer)} of {budget} tokens thought]")


def main(argv: list[str]) -> None:
    command = read_command(argv, "bard.py", __doc__, ("ask", "measure"))
    settings = cli.load(
        AskSettings if command == "ask" else MeasureSettings, argv[1:], prog=f"bard.py {command}",
        description="Answer within a budget of tokens to think.",
        default_config=evaluation.DEFAULT_CONFIG, shared=SHARED,
        recorded=partial(recorded_settings, sorted(RECORDED | {"budgets", "budget_text"})))
    check_paths(settings)
    run_ask(settings) if command == "ask" else run_measure(settings)


if __name__ == "__main__":
    with cli.reporting("bard.py"):
        main(sys.argv[1:])
