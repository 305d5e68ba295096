"""Collapse: how reinforcement of compact models goes wrong, detected from a run's metrics.

The paper reports it for PPO without a cold start, for GRPO and for KD -> GKD (Sec. 5.7, Figures 3,
4 and 6); users of Search-R1 report it for GRPO after some hundred steps. The score falls to a
fraction of what it was, and the text no longer holds an action. Either sign ends a run. What else
has changed says which setting to turn.
"""

import math
from collections.abc import Sequence

WINDOW = 5  # steps that a number is averaged over
FALL = 0.5  # a score below this share of the best one is a collapse
INVALID = 0.5  # share of episodes without an action, if it was below half of this before
NUM_DEVIATIONS = 4  # a fall must exceed chance in a mean over so many questions
LARGE_CHANGE = 3.0  # factor from which a change is named
CHANGES = (  # (metric, its name, advice when it fell, advice when it rose)
    ("loss/entropy", "entropy", "raise --entropy-weight or lower --actor-lr", "lower --actor-lr"),
    ("rollout/kl_student_guide", "KL to the guide", "", "raise --beta"),
    ("rollout/agent_tokens", "tokens per episode", "lower --actor-lr",
     "lower --max-new-tokens or --actor-lr"),
    ("loss/approx_kl", "the size of updates", "", "lower --actor-lr or --ppo-epochs"),
)  # fmt: skip


def signs_of_collapse(
    rows: Sequence[dict[str, float]], num_questions: int, key: str = "rollout/score"
) -> str:
    """What went wrong in the last steps and which setting to turn; empty if nothing did.

    rows: the metrics of all steps, oldest first; num_questions: of each step; key: the score's.
    """
    if len(rows) < 2 * WINDOW:
        return ""
    score = averages(rows, key)
    invalid = averages(rows, "rollout/max_tokens", "rollout/invalid")
    best = max(range(len(score)), key=lambda i: score[i])
    variance = max(score[best] * (1 - score[best]), 0.0)
    chance = math.sqrt(2 * variance / (WINDOW * num_questions))
    signs = []
    if score[-1] < FALL * score[best] and score[best] - score[-1] > NUM_DEVIATIONS * chance:
        signs.append(f"the score fell from {score[best]:.3f} (steps {best + 1} to "
                     f"{best + WINDOW}) to {score[-1]:.3f}")
    if invalid[-1] > INVALID > 2 * min(invalid):
        signs.append(f"episodes without an action rose from {min(invalid):.2f} to "
                     f"{invalid[-1]:.2f}")
    return "; ".join([*signs, *reasons(rows, best)]) if signs else ""


def averages(rows: Sequence[dict[str, float]], *keys: str) -> list[float]:
    """Moving average over WINDOW steps of the sum of these numbers; NaN where no step has them."""
    values = []
    for row in rows:
        numbers = [row.get(key) for key in keys]
        values.append(None if None in numbers else sum(numbers))
    windows = [values[i : i + WINDOW] for i in range(len(values) - WINDOW + 1)]
    windows = [[value for value in window if value is not None] for window in windows]
    return [sum(window) / len(window) if window else math.nan for window in windows]


def reasons(rows: Sequence[dict[str, float]], best: int) -> list[str]:
    """What else has changed since the best steps, each with the setting to turn."""
    texts = []
    for key, name, advice_fell, advice_rose in CHANGES:
        before, now = averages(rows, key)[best], averages(rows, key)[-1]
        advice = ""
        if now > LARGE_CHANGE * abs(before):
            advice = advice_rose
        elif now < before / LARGE_CHANGE:
            advice = advice_fell
        if advice:
            texts.append(f"{name} went from {before:.3g} to {now:.3g}: {advice}")
    if averages(rows, "rollout/explained_variance")[-1] < 0:
        texts.append("the critic is worse than a constant: raise --critic-only-steps or lower "
                     "--critic-lr")
    return texts or ["nothing else stands out: lower --actor-lr, or begin with more distillation"]
