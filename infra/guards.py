"""Guards: what ends a step that would teach the wrong thing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infra.parallel import max_over_processes, sum_over_processes
from infra.run import Run, Stop

# Before the first update the policy is the one that acted. Two layers stay below 1e-5 (a test); the
# largest gap in 400 steps of the embedded world's models was 2.6e-5. A real mismatch ends the run.
MAX_FIRST_LOG_RATIO = 1e-4
# In bf16 a token may round otherwise beside other tokens, so the bound is of their mean.
MAX_MEAN_LOG_RATIO = 0.05


def check_first_ratio(gaps: Tensor, step: int, dtype: torch.dtype) -> float:
    """The largest first log ratio of all processes, from this one's [N]; Stop, on all of them, if
    they are no rounding of this dtype."""
    largest = max_over_processes(gaps.abs().max().item() if len(gaps) else 0.0)
    total, count = sum_over_processes(gaps.abs().sum(), torch.tensor(len(gaps)))
    got, limit, word = largest, MAX_FIRST_LOG_RATIO, "log ratio"
    if dtype != torch.float32:
        got, limit, word = total / max(1, count), MAX_MEAN_LOG_RATIO, "mean log ratio"
    if got > limit:
        raise Stop(f"{word} {got} before the first update of step {step}, expected at most "
                   f"{limit}: training and scoring compute different things")
    return largest


def check_searches(num_failed: float, num_episodes: float, run: Run | None = None) -> None:
    """Stop when most searches failed; fewer are left out of learning (batch.collate).

    run: its state after the last step is saved before. That of a schedule may be ahead of it.
    """
    if 2 * num_failed > num_episodes:
        kept = ""
        if run is not None and run.steps_done and not run.schedule:
            run.save()
            kept = f"the state after step {run.steps_done} is saved; "
        raise Stop(f"the retriever failed in {num_failed:.0f} of {num_episodes:.0f} episodes, see "
                   f"above why; {kept}mend it, or raise --search-timeout-s, then --resume")


def check_room(episodes: Sequence[Any], max_context_tokens: int) -> None:
    """Stop, on all processes, when most prompts fill the context: nothing can be written then."""
    full = sum(not e.num_agent_tokens and e.status == "max_tokens" for e in episodes)
    num_full, num_all = sum_over_processes(torch.tensor(full), torch.tensor(len(episodes)))
    if 2 * num_full > num_all:
        raise Stop(f"--max-context-tokens {max_context_tokens}: {num_full:.0f} of {num_all:.0f} "
                   "prompts fill it, so nothing can be written; give more, or a shorter prompt")
