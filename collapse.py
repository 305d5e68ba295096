"""Collapse: how reinforcement of compact models goes wrong, seen in a run's metrics while it happens.

The paper reports it of PPO without a cold start, of GRPO and of KD -> GKD (Sec. 5.7, Figures 3, 4 and 6), users of
Search-R1 of GRPO after some hundred steps: the score falls to a fraction of what it was, and text turns into what no
parser takes. Either sign ends a run; what else has changed says which setting to turn.
"""

import math
from collections.abc import Sequence

WINDOW = 5  # steps that a number is averaged over
FALL = 0.5  # of the best score: a fall below it is a collapse
INVALID = 0.5  # share of episodes without an action, where it was below half of this before
NUM_DEVIATIONS = 4  # a fall must exceed what chance does to a mean over so many questions
TIMES = 3.0  # a change worth naming


def signs_of_collapse(rows: Sequence[dict[str, float]], num_questions: int, key: str = "rollout/score") -> str:
    """What has gone wrong in the last steps, and what to turn; empty: nothing.

    rows: the metrics of all steps so far, oldest first; num_questions of each step; key: of the score.
    """
    if len(rows) < 2 * WINDOW:
        return ""
    score, invalid = averages(rows, key), averages(rows, "rollout/max_tokens", "rollout/invalid")
    best = max(range(len(score)), key=lambda i: score[i])
    chance = math.sqrt(2 * max(score[best] * (1 - score[best]), 0.0) / (WINDOW * num_questions))
    seen = []
    if score[-1] < FALL * score[best] and score[best] - score[-1] > NUM_DEVIATIONS * chance:
        seen.append(f"the score fell from {score[best]:.3f} (steps {best + 1} to {best + WINDOW}) to {score[-1]:.3f}")
    if invalid[-1] > INVALID > 2 * min(invalid):
        seen.append(f"episodes without an action rose from {min(invalid):.2f} to {invalid[-1]:.2f}")
    return "; ".join([*seen, *reasons(rows, best)]) if seen else ""


def averages(rows: Sequence[dict[str, float]], *keys: str) -> list[float]:
    """Moving average over WINDOW steps of a number, or of the sum of several; NaN where no step has it."""
    values = [sum(row[key] for key in keys) if all(row.get(key) is not None for key in keys) else None for row in rows]
    windows = [[v for v in values[i : i + WINDOW] if v is not None] for i in range(len(values) - WINDOW + 1)]
    return [sum(window) / len(window) if window else math.nan for window in windows]


def reasons(rows: Sequence[dict[str, float]], best: int) -> list[str]:
    """What else has changed since the best steps, each with the setting to turn."""
    found = []
    for key, name, fell, rose in (
        ("loss/entropy", "entropy", "raise --entropy-weight or lower --actor-lr", "lower --actor-lr"),
        ("rollout/kl_student_guide", "KL to the guide", "", "raise --beta"),
        ("rollout/agent_tokens", "tokens per episode", "lower --actor-lr", "lower --max-new-tokens or --actor-lr"),
        ("loss/approx_kl", "the size of updates", "", "lower --actor-lr or --ppo-epochs"),
    ):
        before, now = averages(rows, key)[best], averages(rows, key)[-1]
        knob = rose if now > TIMES * abs(before) else fell if now < before / TIMES else ""
        if knob:
            found.append(f"{name} went from {before:.3g} to {now:.3g}: {knob}")
    if averages(rows, "rollout/explained_variance")[-1] < 0:
        found.append("the critic is worse than a constant: raise --critic-only-steps or lower --critic-lr")
    return found or ["nothing else stands out: lower --actor-lr, or begin with more distillation"]
