"""Trails: reasoning questions, chains of thought about them, and shorter chains of the same kind.

`python -m world.build build-trails` writes the questions and practice texts to runs/trails, and
builds a student and a teacher for them.

A question lists one-way roads in random order, and asks where the trail from a place ends. Roads of
other trails lie among them:

    Gate Tower, Mill Lake, Harbor Gate, ... Which is last from Harbor, 12?

What the questions were built to contain (none of it is evidence about real reasoning):

1. To follow a trail one road at a time, a model must look at the list once for each road. Trails
   have 3 to 34 roads, so that natural chains have 41 to 413 tokens, a factor of ten. Shorter trails
   fit into most budgets, and then lengths tie. With trails of 2 to 32 roads, the chains of
   `compress` have a rank correlation of length and budget of 0.90; with these trails, 0.93.
2. The same chain can be told in fewer words, down to one name for each road. In still shorter
   chains places are left out, and the model must follow several roads at once.
3. The question says how many roads its trail has, so that a model can know before it thinks how
   briefly it must think.
4. The student has practised two things that any pretrained model has met: looking a word up, and
   numbers. Without numbers it read little more from a budget than how many digits that has
   (docs/log.md). Held-out budgets are among the numbers, as they would be in any pretraining, but
   no chain of thought was ever shown for them.
5. Names are words of the world's tokenizer, one token each. Test questions and demonstrations have
   other seeds than training questions.
"""

import random
import re
from collections.abc import Callable, Iterator

from world.encyclopaedia import FIRST_WORDS, SECOND_WORDS

PLACES = (*FIRST_WORDS, *SECOND_WORDS)
MIN_ROADS, MAX_ROADS = 3, 34
NUM_OTHERS = 3  # trails of a question that lead elsewhere
OTHER_ROADS = (3, 8)  # least and most roads of each of these
NUM_QUESTIONS = {"train": 4000, "test": 500}
NUM_DEMONSTRATIONS = 8_000
NUM_ROADS_PRACTICE = 12_000
NUM_NUMBERS_PRACTICE = 24_000
RECALLED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # roads of a list that the student practises on
DIVIDENDS = (30, 400)  # least and most that the student divides
NUM_DIVISIONS = 6  # in a row of practice


def question(rng: random.Random, id: str) -> tuple[dict, list[str]]:
    """A row of a question file, and the trail that answers it."""
    num_roads = rng.randint(MIN_ROADS, MAX_ROADS)
    lengths = [num_roads, *(rng.randint(*OTHER_ROADS) for _ in range(NUM_OTHERS))]
    places = rng.sample(PLACES, sum(lengths) + len(lengths))
    trails, roads = [], []
    for length in lengths:
        trail = places[: length + 1]
        places = places[length + 1 :]
        trails.append(trail)
        roads += [f"{start} {end}" for start, end in zip(trail, trail[1:], strict=False)]
    rng.shuffle(roads)
    trail = trails[0]
    row = {
        "id": id,
        "question": f"{', '.join(roads)}. Which is last from {trail[0]}, {num_roads}?",
        "golden_answers": [trail[-1]],
        "dataset": "trails",
        "metadata": {"num_roads": num_roads},
    }
    return row, trail


# ---- chains: the same trail in many words and in few


def natural_chain(trail: list[str]) -> str:
    """Look every road up, repeat it and look it up again: 12 tokens a road."""
    return tell(trail, "from {0} {1} , that is {1} , and {0} {1} ,", "from {0}")


def shorter_chains(trail: list[str]) -> Iterator[str]:
    """The trail in fewer and fewer words; every chain ends with the last place."""
    yield tell(trail, "from {0} {1} , that is {1} ,", "from {0}")
    yield tell(trail, "from {0} {1} ,", "from {0}")
    yield tell(trail, "{0} {1}", "{0}")
    for stride in range(1, len(trail)):  # places are left out from a stride of 2 on
        yield " ".join([*trail[stride:-1:stride], trail[-1], f"last is {trail[-1]}"])


def tell(trail: list[str], road: str, end: str) -> str:
    """Fill `road` with the places of every road, and `end` with the place where the trail ends."""
    roads = [road.format(*places) for places in zip(trail, trail[1:], strict=False)]
    return " ".join([*roads, end.format(trail[-1]), f"last is {trail[-1]}"])


def compress(chain: str, budget: int, num_tokens: Callable[[str], int]) -> str | None:
    """The longest chain about a natural chain's trail that fits into the budget, in tokens.

    None if the chain does not tell of one unbroken trail, or if even the shortest does not fit.
    """
    roads = re.findall(r"from (\w+) (\w+) ,", chain)
    if not roads:
        return None
    for (_, end), (start, _) in zip(roads, roads[1:], strict=False):
        if end != start:
            return None
    trail = [roads[0][0], *(end for _, end in roads)]
    for text in (chain, *shorter_chains(trail)):
        if num_tokens(text) <= budget:
            return text
    return None


# ---- texts to learn from: rows of an episodes file (episode.load_episodes)


def demonstration(rng: random.Random, id: str) -> dict:
    """For the teacher: a question and its natural chain."""
    row, trail = question(rng, id)
    text = f"<think> {natural_chain(trail)} </think>\n<answer> {trail[-1]} </answer>"
    return {**row, "segments": [{"author": "agent", "text": text}]}


def recall(rng: random.Random, id: str) -> dict:
    """For the student: a list of roads, and the same roads along the trail or in any order.

    There is no question and no thinking: looking a road up is all there is to learn.
    """
    places = rng.sample(PLACES, rng.choice(RECALLED) + 1)
    roads = [f"{start} {end}" for start, end in zip(places, places[1:], strict=False)]
    shown = rng.sample(roads, len(roads))
    told = rng.choice((roads, rng.sample(roads, len(roads))))
    return _plain_text(id, [(f" {', '.join(shown)}.", f" {', '.join(told)}.")])


def division(rng: random.Random, id: str) -> dict:
    """For the student: how often the first number goes into the second."""
    turns = []
    for _ in range(NUM_DIVISIONS):
        divisor, dividend = rng.randint(MIN_ROADS, MAX_ROADS), rng.randint(*DIVIDENDS)
        turns.append((f" {divisor}? #{dividend}\n", f" {dividend // divisor}."))
    return _plain_text(id, turns)


def _plain_text(id: str, turns: list[tuple[str, str]]) -> dict:
    """Turns of what is shown and what is told; only the second is trained on."""
    segments = []
    for shown, told in turns:
        segments.append({"author": "environment", "text": shown})
        segments.append({"author": "agent", "text": told})
    return {"id": id, "question": "", "golden_answers": [], "segments": segments}


def make_rows(split: str) -> list[dict]:
    """The rows of train, test, demonstrations, roads or numbers; the same on every machine.

    After two rows of divisions, numbers has one of roads, so that roads are not forgotten.
    """
    rng = random.Random(f"trails {split}")
    if split == "roads":
        return [recall(rng, f"roads_{i}") for i in range(NUM_ROADS_PRACTICE)]
    if split == "numbers":
        kinds = (division, division, recall)
        return [kinds[i % 3](rng, f"numbers_{i}") for i in range(NUM_NUMBERS_PRACTICE)]
    if split == "demonstrations":
        return [demonstration(rng, f"demonstration_{i}") for i in range(NUM_DEMONSTRATIONS)]
    return [question(rng, f"{split}_{i}")[0] for i in range(NUM_QUESTIONS[split])]
