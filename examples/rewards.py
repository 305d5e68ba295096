"""Rewards of your own: functions of a step's episodes, given to train.py by name.

    torchrun train.py --phase grpo --reward examples/rewards.py:fewer_searches
    torchrun train.py --phase dgpo --reward examples/rewards.py:token_f1

A reward function takes the episodes of a rollout step, in any order, and returns one number for
each. It replaces the exact match of Eq. 3 as the score that training maximises. Validation goes on
to measure exact match. An episode holds its question, the agent's answer, the queries, the passages
of each search and the status with which it ended (see episode.py).
"""

from data import f1
from episode import Episode

PRICE = 0.05  # of one search


def fewer_searches(episodes: list[Episode]) -> list[float]:
    """Exact match, less a small price for each search of a right answer.

    A wrong answer earns 0 whatever it cost. If searches of wrong answers had a price too, an agent
    that answers little would first learn not to search at all.
    """
    return [max(0.0, episode.score - PRICE * episode.num_searches) for episode in episodes]


def token_f1(episodes: list[Episode]) -> list[float]:
    """F1 of the answer's words, against the gold answer that it is closest to.

    It also pays for a part of the answer. Exact match does not, so it is rarer at first.
    """
    questions = [episode.question for episode in episodes]
    return [
        f1(episode.answer, question.golden_answers, question.answer_rule)
        for episode, question in zip(episodes, questions, strict=True)
    ]
