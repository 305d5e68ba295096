"""Guards: what ends a step that would teach the wrong thing."""

from collections.abc import Sequence
from typing import Any

import torch

from infra.parallel import max_over_processes, sum_over_processes
from infra.run import Stop

# Before the first update the policy is the one that acted. Two layers stay below 1e-5 (a test); the
# largest gap in 400 steps of the embedded world's models was 2.6e-5. A real mismatch ends the run.
MAX_FIRST_LOG_RATIO = 1e-4


def check_first_ratio(gap: float, step: int) -> float:
    """The largest first log ratio of all processes; Stop, on all of them, if it is no rounding."""
    if (gap := max_over_processes(gap)) > MAX_FIRST_LOG_RATIO:
        raise Stop(f"log ratio {gap} before the first update of step {step}, expected at most "
                   f"{MAX_FIRST_LOG_RATIO}: training and scoring compute different things")
    return gap


def check_searches(num_failed: float, num_episodes: float) -> None:
    """Stop when most searches failed; fewer are left out of learning (batch.collate)."""
    if 2 * num_failed > num_episodes:
        raise Stop(f"the retriever failed in {num_failed:.0f} of {num_episodes:.0f} episodes, see "
                   "above why; mend it, or raise --search-timeout-s, then --resume")


def check_room(episodes: Sequence[Any], max_context_tokens: int) -> None:
    """Stop, on all processes, when most prompts fill the context: nothing can be written then."""
    full = sum(not e.num_agent_tokens and e.status == "max_tokens" for e in episodes)
    num_full, num_all = sum_over_processes(torch.tensor(full), torch.tensor(len(episodes)))
    if 2 * num_full > num_all:
        raise Stop(f"--max-context-tokens {max_context_tokens}: {num_full:.0f} of {num_all:.0f} "
                   "prompts fill it, so nothing can be written; give more, or a shorter prompt")
