"""BARD: budget-aware reasoning distillation (Niu et al., 2025, arXiv:2511.01470): rewards, data, measures.

The user says how many tokens the model may think. Phase bard-sft imitates a teacher's chains that were compressed to
several budgets; phase bard-rl rewards being right within the budget. Engine and loops are those of DGPO.

What is BARD's, as its abstract says: the two phases; the budget as a control signal of the user; chains compressed to
various budgets; a reward of reasoning performance and budget fidelity together. Reported by others, not read by us:
that the reward is their product, and that the compressor is another language model.

What is a reconstruction, because the paper's own choice was not available; what stands at the right is an option
  the control signal          one sentence in the user's turn, a plain integer in it                 --budget-text
  what is counted             tokens strictly inside <think> and </think>, over all turns
  budgets                     one of them drawn for each question                                    --budgets
  prompt of the compressor    COMPRESS_PROMPT, in our own words                                      --compress-prompt
  acceptance                  the teacher finds the answer when it reads a model's chain; retries    --compress-tries
                              length in [min_fill * b, b]                                            --min-fill
                              a question stays when it has versions for half of its budgets
  reinforcement               GRPO, one budget a group, groups without a difference skipped          --advantage gae
  fidelity                    1 within the budget, then linearly to 0 at (1 + tolerance) * b         --budget-tolerance
  a bonus for using it        0 by default                                                           --budget-use
  other forms of the reward   additive; L1-Max's (Aggarwal and Welleck, 2025); L1-Exact's and BudgetThinker's
                              are not here                                                           --budget-reward
Departures from analogues: L1 counts the whole response, here thinking alone; L1's code halves the slope of its formula
(the formula is used).

Legend: l tokens thought, b budget.
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import trails
from config import setting
from data import Question, is_correct, parse_question, read_rows
from episode import Episode, Segment, num_thinking_tokens, prompt_segment, save_episodes, thinking
from model import Tokenizer
from retriever import Retriever
from rollout import Policy, RolloutSettings, generate

REWARDS = ("multiplicative", "additive", "l1_max")
COMPRESS_PROMPT = (
    "Below are a question, a line of reasoning about it and the answer that it reaches. Rewrite the reasoning so that "
    "it takes at most {budget} tokens: keep the steps without which the answer could not be found, in their order, "
    "drop repetitions, doubts and detours, add nothing new, and end with the answer. Write the shorter reasoning "
    "alone.\n\n"
    "Question: {question}\n\nReasoning: {chain}\n\nAnswer: {answer}"
)
TURN = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<(search|answer)>((?:(?!<think>).)*?)</\1>", re.DOTALL)
MAX_ACTION_TOKENS = 48  # of a query or an answer: more would be thinking that is not counted
TAG = re.compile(r"</?(?:think|answer|search|information)>")


@dataclass
class BardSettings(RolloutSettings):
    budgets: tuple[int, ...] = setting((), "bard: tokens to think; a question gets one of them")
    versions_per_question: int = setting(6, "bard-data: budgets that each chain is compressed to")
    chains: str = setting("", "bard-data: the teacher's chains, rows with question, golden_answers, chain, or an "
                          "episodes file; empty: the teacher is asked")
    compressor: str = setting("trails", "bard-data: 'trails' (the embedded world's rules) or a checkpoint")
    compress_prompt: str = setting("", "bard-data: a file with {question} {chain} {answer} {budget}; empty: ours")
    compress_tries: int = setting(3, "bard-data: attempts of a compressor that samples")
    min_fill: float = setting(0.5, "bard-data: least length of a compressed chain, as a share of its budget")
    budget_reward: str = setting("multiplicative", "bard-rl: form of the reward", choices=REWARDS)
    budget_tolerance: float = setting(0.5, "bard-rl: overshoot, as a share of the budget, that is worth nothing")
    budget_use: float = setting(0.0, "bard-rl: share of the reward that is for using the budget")
    budget_weight: float = setting(0.5, "bard-rl: additive: what fidelity is worth beside a right answer")
    l1_alpha: float = setting(3e-4, "bard-rl: l1_max: slope per token (its paper's)")
    l1_delta: float = setting(0.5, "bard-rl: l1_max: what is left at the budget itself (its paper's)")


# ---- rewards ----


def fidelity(length: int, budget: int, *, tolerance: float, use: float = 0.0) -> float:
    """1 for l <= b, falling linearly to 0 at l = (1 + tolerance) b; use: 1 - use (1 - l / b) below the budget."""
    if length <= budget:
        return 1 - use * (1 - length / budget)
    return max(0.0, 1 - (length - budget) / (tolerance * budget)) if tolerance > 0 else 0.0


def multiplicative(correct: float, length: int, budget: int, *, tolerance: float, use: float = 0.0) -> float:
    """Right and within the budget: a short wrong answer is worth nothing (BARD's form, as reported)."""
    return correct * fidelity(length, budget, tolerance=tolerance, use=use)


def additive(correct: float, length: int, budget: int, *, tolerance: float, weight: float, use: float = 0.0) -> float:
    """The ablation: a short wrong answer is worth `weight`."""
    return correct + weight * fidelity(length, budget, tolerance=tolerance, use=use)


def l1_max(correct: float, length: int, budget: int, *, alpha: float, delta: float) -> float:
    """L1-Max (arXiv:2503.04697): 1[correct] clip(alpha (b - l) + delta, 0, 1)."""
    return correct * min(1.0, max(0.0, alpha * (budget - length) + delta))


def reward(episode: Episode, tokenizer: Tokenizer, settings: BardSettings) -> float:
    """Of an episode with a budget; one whose turns are not <think>..</think> and an action is worth nothing."""
    if not is_well_formed(episode, tokenizer):
        return 0.0
    budget, length = episode.question.budget, num_thinking_tokens(episode, tokenizer)
    scored = (episode.score, length, budget)
    if settings.budget_reward == "l1_max":
        return l1_max(*scored, alpha=settings.l1_alpha, delta=settings.l1_delta)
    shape = {"tolerance": settings.budget_tolerance, "use": settings.budget_use}
    if settings.budget_reward == "additive":
        return additive(*scored, weight=settings.budget_weight, **shape)
    return multiplicative(*scored, **shape)


def is_well_formed(episode: Episode, tokenizer: Tokenizer) -> bool:
    """Whether each of the agent's turns is one thought and one short action, so that all thinking is counted.

    A turn that a hard stop has ended is not.
    """
    turns = [TURN.match(tokenizer.decode(s.ids)) for s in episode.segments if s.author == "agent"]
    return episode.status == "answered" and all(
        turn and len(tokenizer.encode(turn[2])) <= MAX_ACTION_TOKENS for turn in turns)


# ---- checks of settings ----


def check_settings(settings: BardSettings) -> None:
    """Of the phases of BARD."""
    if not settings.budgets:
        raise ValueError("--budgets: got none, expected the budgets to train for, --budgets 128 256 512 for example")
    for name, low, high in (("budget_use", 0, 1), ("min_fill", 0, 1), ("versions_per_question", 2, math.inf),
                            ("compress_tries", 1, math.inf), ("budget_tolerance", 0, math.inf)):  # fmt: skip
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected {low} to {high}")
    if settings.hard_stop:
        raise ValueError("--hard-stop: got it for training, where it would put words into the agent's mouth; it is for "
                         "eval.py and rollout.py ask")


# ---- data: a teacher's chains, compressed ----


def read_chains(path: str | Path) -> tuple[list[tuple[Question, str]], int]:
    """(questions and right chains of a file, how many rows were left out: wrong, or of several turns).

    A row has a "chain" (and an "answer", when the teacher's may be wrong), or is an episode whose one turn has the
    chain in its thinking.
    """
    found, num_left_out = [], 0
    for number, row in read_rows(Path(path)):
        where = f"{path}:{number}"
        question = parse_question(row, row.get("source") or Path(path).stem, str(len(found)), where)
        chain, answer = row.get("chain"), row.get("answer", question.golden_answers[0])
        segments = row.get("segments")
        if chain is None and isinstance(segments, list) and all(isinstance(s, dict) for s in segments):
            turns = [s.get("text") for s in segments if s.get("author") == "agent"]
            chain = turns[0] if len(turns) == 1 else ""
            whole = isinstance(chain, str) and chain.lstrip().startswith("<think>") and "</think>" in chain
            chain = chain.partition("</think>")[0] if whole else ""
        if not isinstance(chain, str) or not isinstance(answer, str | None):
            raise ValueError(f"{where}: got no chain, expected the teacher's reasoning as text under \"chain\", or an "
                             "episode")
        chain = chain.strip().removeprefix("<think>").removesuffix("</think>").strip()
        if tag := TAG.search(chain):
            raise ValueError(f"{where}: got {tag[0]} within a chain, expected reasoning without tags, or with one "
                             "<think> and </think> around it")
        if chain and is_correct(answer, question):
            found.append((question, chain))
        else:
            num_left_out += 1
    if not found:
        raise ValueError(f"{path}: got no right answer with a chain in {num_left_out} rows, expected at least one")
    return found, num_left_out


def version(tokenizer: Tokenizer, question: Question, chain: str, settings: BardSettings) -> Episode:
    """What bard-sft learns from: the question with its budget, the chain, the first gold answer."""
    text = f"<think> {chain} </think>\n<answer> {question.golden_answers[0]} </answer>"
    prompt = prompt_segment(tokenizer, question, settings.prompt, settings.budget_text)
    return Episode(question, [prompt, Segment("agent", tokenizer.encode(text))], "answered",
                   question.golden_answers[0])


def num_chain_tokens(tokenizer: Tokenizer, chain: str) -> int:
    """l of a chain that stands between its tags."""
    return thinking(tokenizer.encode(f"<think> {chain} </think>"), tokenizer)[0]


def compress(
    chains: Sequence[tuple[Question, str]], student: Tokenizer, compressor: Policy | None, checker: Policy | None,
    settings: BardSettings, *, seed: int,
) -> tuple[list[Episode], dict[str, int]]:
    """Versions of the chains for budgets drawn for each, and counts of what was kept and dropped, and why.

    compressor: a model that is prompted; None: trails.compress. checker: a model that must find the answer when it
    reads the chain, by greedy decoding; None: the chain must contain it.
    """
    wanted: list[tuple[int, Question, str]] = []  # (chain's number, question with its budget, natural chain)
    for i, (question, chain) in enumerate(chains):
        rng = np.random.default_rng((seed, i, 5))
        num = min(settings.versions_per_question, len(settings.budgets))
        budgets = sorted(int(b) for b in rng.choice(np.array(settings.budgets), num, replace=False))
        wanted += [(i, replace(question, budget=b), chain) for b in budgets]
    accepted: dict[int, str] = {}  # by place in wanted
    left = list(range(len(wanted)))
    for attempt in range(1 if compressor is None else settings.compress_tries):
        proposed = propose([wanted[k] for k in left], student, compressor, settings, seed=seed + attempt)
        kept, refused = [], Counter[str]()
        for k, chain in zip(left, proposed, strict=True):
            if reason := refusal(chain, wanted[k][2], wanted[k][1].budget, student, settings.min_fill):
                refused[reason] += 1
            else:
                kept.append((k, chain))
        right = check_answers([(wanted[k][1], chain) for k, chain in kept], checker, settings)
        refused["answer lost"] = len(right) - sum(right)
        accepted |= {k: chain for (k, chain), is_right in zip(kept, right, strict=True) if is_right}
        left = [k for k in left if k not in accepted]
    counts = refused  # of the last attempt
    episodes = []
    for _, group in itertools.groupby(range(len(wanted)), key=lambda k: wanted[k][0]):  # a question's budgets
        places = list(group)
        versions = [k for k in places if k in accepted]
        # Budget, not difficulty, must explain the length: no question stands at its easy budgets alone.
        if len(versions) < max(2, len(places) / 2) or len({accepted[k] for k in versions}) < 2:
            counts["question with too few versions"] += len(versions)
            continue
        for k in versions:
            counts["kept as it was" if accepted[k] == wanted[k][2] else "compressed"] += 1
            episodes.append(version(student, wanted[k][1], accepted[k], settings))
    return episodes, dict(counts)


def refusal(chain: str | None, natural: str, budget: int, student: Tokenizer, min_fill: float) -> str:
    """Why a version of a natural chain is not taken; empty: its length is as it should be."""
    length = num_chain_tokens(student, chain) if chain else 0
    if not chain:
        return "no chain"
    if length > budget:
        return "too long"
    return "too short" if length < min_fill * budget and chain != natural else ""


def propose(
    wanted: Sequence[tuple[int, Question, str]], student: Tokenizer, compressor: Policy | None,
    settings: BardSettings, *, seed: int,
) -> list[str | None]:
    """A chain for each; one that fits already is kept."""
    def length(text: str) -> int:
        return num_chain_tokens(student, text)

    proposed: list[str | None] = [chain if length(chain) <= q.budget else None for _, q, chain in wanted]
    open_places = [k for k, chain in enumerate(proposed) if chain is None]
    if compressor is None:
        for k in open_places:
            _, question, chain = wanted[k]
            proposed[k] = trails.compress(chain, question.budget, length)
        return proposed
    template = Path(settings.compress_prompt).read_text(encoding="utf-8") if settings.compress_prompt else (
        COMPRESS_PROMPT)
    asked = []
    for k in open_places:
        _, question, chain = wanted[k]
        text = template
        for key, value in (("{budget}", str(question.budget)), ("{answer}", question.golden_answers[0]),
                           ("{question}", question.question), ("{chain}", chain)):
            text = text.replace(key, value)
        asked.append(replace(question, budget=None, prompt=[{"role": "user", "content": text}]))
    longest = max((q.budget for _, q, _ in wanted), default=0)
    room = max(longest + 16, settings.max_new_tokens)  # it may think before it writes
    rules = replace(settings, prompt="row", max_turns=0, max_new_tokens=room, temperature=1.0, hard_stop=False)
    for k, episode in zip(open_places, generate(compressor, None, asked, rules, seed=seed, progress="compressor"),
                          strict=True):
        written = episode.segments[-1]
        # A prompt that fills the context is not answered, and an answer that was cut off is not a chain.
        if written.author == "agent" and written.ids and written.ids[-1] == compressor.tokenizer.eos_id:
            text = compressor.tokenizer.decode(written.ids).rpartition("</think>")[2]  # not what it thought itself
            proposed[k] = TAG.sub(" ", text).strip() or None
    return proposed


def check_answers(chains: Sequence[tuple[Question, str]], checker: Policy | None, settings: BardSettings) -> list[bool]:
    """Whether each chain alone leads to its question's answer."""
    if checker is None:
        return [any(gold.lower() in chain.lower() for gold in q.golden_answers) for q, chain in chains]
    shown = [checker.tokenizer.encode(f"<think> {chain} </think>\n") for _, chain in chains]
    rules = replace(settings, max_turns=0, temperature=0.0, hard_stop=False, budget_text="")
    episodes = generate(checker, None, [q for q, _ in chains], rules, seed=0, shown=shown, forced="<answer>",
                        progress="answers")
    return [episode.score == 1 for episode in episodes]


def write_versions(
    path: str | Path, chains_path: str | Path, student: Tokenizer, compressor: Policy | None, checker: Policy | None,
    settings: BardSettings, *, seed: int,
) -> str:
    """Phase bard-data: the file that bard-sft reads, and beside it what was dropped; returns a line for the log."""
    chains, num_left_out = read_chains(chains_path)
    if compressor and not checker and any(question.answer_kind != "text" for question, _ in chains):
        raise ValueError(f"{chains_path}: got options or integers, which any text may contain, expected a teacher that "
                         "finds them in the compressed chains; give --teacher")
    episodes, counts = compress(chains, student, compressor, checker, settings, seed=seed)
    if not episodes:
        raise ValueError(f"{path}: got no chain through the filters, expected some; {counts}; try other --budgets, a "
                         "lower --min-fill or another --compressor")
    save_episodes(path, episodes, student)
    lengths: dict[int, list[int]] = {}
    for episode in episodes:
        lengths.setdefault(episode.question.budget, []).append(num_thinking_tokens(episode, student))
    found = {"chains": len(chains), "rows left out": num_left_out, "versions": len(episodes), "counts": counts,
             "mean_length": {b: round(float(np.mean(lengths[b])), 1) for b in sorted(lengths)},
             "versions_at": {b: len(lengths[b]) for b in sorted(lengths)}, "settings": asdict(settings)}
    Path(path).with_suffix(".counts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return f"{path}: {len(episodes)} versions of {len(chains)} chains ({num_left_out} rows left out); " + ", ".join(
        f"{reason} {count}" for reason, count in counts.items() if count)


# ---- measures ----


def measure(
    policy: Policy, questions: Sequence[Question], settings: RolloutSettings, budgets: Sequence[int], *,
    seed: int = 0, retriever: Retriever | None = None, progress: bool = False,
) -> dict[str, Any]:
    """Every question at every budget: what is thought, and how often it is right, freely and with a hard stop.

    accuracy is with the hard stop, so that methods are compared at equal compute; accuracy_free without.
    """
    rows = []
    for budget in budgets:
        told = [replace(question, budget=budget) for question in questions]
        free, stopped = (
            generate(policy, retriever, told, replace(settings, hard_stop=stop), seed=seed,
                     progress=f"budget {budget}{', hard stop' * stop}" if progress else "")
            for stop in (False, True))
        rows += [{"id": e.question.id, "budget": budget, "length": num_thinking_tokens(e, policy.tokenizer),
                  "correct_free": e.score, "correct": s.score, "status": e.status,
                  "formed": is_well_formed(e, policy.tokenizer)}
                 for e, s in zip(free, stopped, strict=True)]
    return summarize(rows) | {"rows": rows}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"budgets": {b: measures}, "spearman": mean over questions, "area": of accuracy over log b}."""
    budgets = sorted({row["budget"] for row in rows})
    found = {}
    for b in budgets:
        some = [row for row in rows if row["budget"] == b]
        lengths = np.array([row["length"] for row in some], float)
        found[b] = {
            "n": len(some), "formed": float(np.mean([row["formed"] for row in some])),
            "adherence": float((lengths <= b).mean()),
            "overshoot": float(np.maximum(0, lengths - b).mean() / b),
            "relative_error": float(np.abs(lengths - b).mean() / b), "use": float(lengths.mean() / b),
            "length": float(lengths.mean()), "accuracy": float(np.mean([row["correct"] for row in some])),
            "accuracy_free": float(np.mean([row["correct_free"] for row in some])),
        }
    by_question: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        by_question.setdefault(row["id"], []).append((row["budget"], row["length"]))
    correlations = [spearman(*zip(*pairs, strict=True)) for pairs in by_question.values()]
    accuracies = [found[b]["accuracy"] for b in budgets]
    widths = np.diff(np.log(budgets))
    area = float(np.average([(a + b) / 2 for a, b in zip(accuracies, accuracies[1:], strict=False)], weights=widths)
                 ) if len(budgets) > 1 else accuracies[0]
    return {"budgets": found, "spearman": float(np.mean(correlations)), "area": area}


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; 0 where either side never varies (no control at all)."""
    ranks = []
    for values in (np.asarray(x, float), np.asarray(y, float)):
        order = np.unique(values, return_inverse=True)[1]
        ends = np.cumsum(np.bincount(order))
        ranks.append(((ends + np.r_[0, ends[:-1]] + 1) / 2)[order])
    if any(np.ptp(r) == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def save_measures(result: dict[str, Any], out: Path) -> None:
    """budgets.json, and a line for each question and budget beside it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "budgets.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result["rows"])
    summary = {key: value for key, value in result.items() if key != "rows"}
    (out / "budgets.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
