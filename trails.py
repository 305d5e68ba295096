"""Trails: reasoning questions of the embedded world, chains of thought about them, and chains made shorter.

    python world.py build-trails     questions, practice texts, student and teacher in runs/trails; minutes

A question lists one-way roads in random order and asks where the trail from a place ends; other trails lie among them.

    Gate Tower, Mill Lake, Harbor Gate, ... Which is last from Harbor, 12?

What it was built to contain (none of it is evidence about real reasoning):

1. Following a trail one road at a time needs one look at the list for each road. Trails have 3 to 34 roads, so that
   natural chains are 41 to 413 tokens long: a factor of ten. (Short trails fit into most budgets, so that lengths tie:
   with trails of 2 to 32 roads the rules below have a rank correlation of length and budget of 0.90, with these 0.93.)
2. The same chain can be told in fewer words, down to a name for each road. Below that, places are left out, and the
   model must follow several roads in its head.
3. The number of roads stands in the question, so that how briefly to think can be known before thinking.
4. The student has practised two things that any pretrained model has met: to look a word up, and numbers. Without the
   second it read of a budget little more than how many digits it has (docs/log.md). Held-out budgets are among these
   numbers, as they would be in any pretraining; no thought has ever been shown for them.
5. Names are words of the world's tokenizer, one token each. Test questions and demonstrations have other seeds.
"""

import random
import re
from collections.abc import Callable, Iterator

from encyclopaedia import FIRST_WORDS, SECOND_WORDS

PLACES = (*FIRST_WORDS, *SECOND_WORDS)
MIN_ROADS, MAX_ROADS = 3, 34
NUM_OTHERS, OTHER_ROADS = 3, (3, 8)  # trails that lead elsewhere, and how many roads each has
NUM_QUESTIONS = {"train": 4000, "test": 500}
NUM_DEMONSTRATIONS, NUM_ROADS_PRACTICE, NUM_NUMBERS_PRACTICE = 8_000, 12_000, 24_000
RECALLED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # roads of a list that the student practises on
DIVIDENDS, NUM_DIVISIONS = (30, 400), 6  # of its numbers; in a row


def question(rng: random.Random, id: str) -> tuple[dict, list[str]]:
    """A row of a question file, and the trail that answers it."""
    num_roads = rng.randint(MIN_ROADS, MAX_ROADS)
    lengths = [num_roads, *(rng.randint(*OTHER_ROADS) for _ in range(NUM_OTHERS))]
    places = rng.sample(PLACES, sum(lengths) + len(lengths))
    trails = []
    for length in lengths:
        trails.append(places[: length + 1])
        places = places[length + 1 :]
    roads = [f"{start} {end}" for trail in trails for start, end in zip(trail, trail[1:], strict=False)]
    rng.shuffle(roads)
    trail = trails[0]
    text = f"{', '.join(roads)}. Which is last from {trail[0]}, {num_roads}?"
    row = {"id": id, "question": text, "golden_answers": [trail[-1]], "dataset": "trails"}
    return row | {"metadata": {"num_roads": num_roads}}, trail


# ---- chains: the same trail in many words and in few ----


def natural_chain(trail: list[str]) -> str:
    """Every road looked up, repeated and looked up again: 12 tokens a road."""
    return tell(trail, "from {0} {1} , that is {1} , and {0} {1} ,", "from {0}")


def shorter_chains(trail: list[str]) -> Iterator[str]:
    """The trail in fewer and fewer words; all end with its last place."""
    yield tell(trail, "from {0} {1} , that is {1} ,", "from {0}")
    yield tell(trail, "from {0} {1} ,", "from {0}")
    yield tell(trail, "{0} {1}", "{0}")
    for stride in range(1, len(trail)):  # from 2 on places are left out
        yield " ".join([*trail[stride:-1:stride], trail[-1], f"last is {trail[-1]}"])


def tell(trail: list[str], road: str, end: str) -> str:
    """What is said of each road, and of the place from which none leads."""
    said = [road.format(*places) for places in zip(trail, trail[1:], strict=False)]
    return " ".join([*said, end.format(trail[-1]), f"last is {trail[-1]}"])


def compress(chain: str, budget: int, num_tokens: Callable[[str], int]) -> str | None:
    """The longest telling of a natural chain's trail that fits into the budget; None: no trail, or nothing fits."""
    roads = re.findall(r"from (\w+) (\w+) ,", chain)
    if not roads or any(end != start for (_, end), (start, _) in zip(roads, roads[1:], strict=False)):
        return None
    trail = [roads[0][0], *(end for _, end in roads)]
    return next((text for text in (chain, *shorter_chains(trail)) if num_tokens(text) <= budget), None)


# ---- texts to learn from


def demonstration(rng: random.Random, id: str) -> dict:
    """An episode for the teacher (episode.load_episodes): a question and its natural chain."""
    row, trail = question(rng, id)
    text = f"<think> {natural_chain(trail)} </think>\n<answer> {trail[-1]} </answer>"
    return row | {"segments": [{"author": "agent", "text": text}]}


def recall(rng: random.Random, id: str) -> dict:
    """Text for the student: roads, and the same roads as they follow each other, or in any order; no question, no
    thinking: to look a road up is all there is to learn."""
    places = rng.sample(PLACES, rng.choice(RECALLED) + 1)
    roads = [f"{start} {end}" for start, end in zip(places, places[1:], strict=False)]
    shown, told = rng.sample(roads, len(roads)), rng.choice((roads, rng.sample(roads, len(roads))))
    segments = [{"author": "environment", "text": f" {', '.join(shown)}."},
                {"author": "agent", "text": f" {', '.join(told)}."}]  # fmt: skip
    return {"id": id, "question": "", "golden_answers": [], "segments": segments}


def division(rng: random.Random, id: str) -> dict:
    """Text for the student: how often the first number goes into the second."""
    segments = []
    for _ in range(NUM_DIVISIONS):
        divisor, dividend = rng.randint(MIN_ROADS, MAX_ROADS), rng.randint(*DIVIDENDS)
        segments += [{"author": "environment", "text": f" {divisor}? #{dividend}\n"},
                     {"author": "agent", "text": f" {dividend // divisor}."}]  # fmt: skip
    return {"id": id, "question": "", "golden_answers": [], "segments": segments}


def make_rows(split: str) -> list[dict]:
    """The rows of train, test, demonstrations, roads or numbers (two rows of divisions, then one of roads, so that
    roads are not forgotten), the same on every machine."""
    rng = random.Random(f"trails {split}")
    if split == "roads":
        return [recall(rng, f"roads_{i}") for i in range(NUM_ROADS_PRACTICE)]
    if split == "numbers":
        return [(division, division, recall)[i % 3](rng, f"numbers_{i}") for i in range(NUM_NUMBERS_PRACTICE)]
    if split == "demonstrations":
        return [demonstration(rng, f"demonstration_{i}") for i in range(NUM_DEMONSTRATIONS)]
    return [question(rng, f"{split}_{i}")[0] for i in range(NUM_QUESTIONS[split])]
