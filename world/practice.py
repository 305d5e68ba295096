"""Practice texts from encyclopaedias of other seeds: what the world's networks learn from.

    pretrain_rows             plain text for the student: lists to copy, passages with notes on them
    practice_demonstrations   episodes of the scripted expert (expert.py)
    memory_rows               facts of the shipped encyclopaedia, to be known by heart
    recalling_demonstrations  episodes of an expert who knows these facts
    reading_rows              passages and answers for QAgent's generators

All are rows of an episodes file (episode.load_episodes). Facts differ from one encyclopaedia to the
next, so nothing is gained by remembering them, apart from memory_rows. No other practice text has a
name of the shipped test half. The texts are the same on every machine that has the same encoder.
"""

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from data import Passage, Question
from episode import SEARCH_R1, Protocol, unique_passages
from model import Tokenizer
from qagent import QAGENT, generator_messages
from retriever import Retriever
from world.encyclopaedia import (
    FAMILY_NAMES,
    FIRST_WORDS,
    GIVEN_NAMES,
    MULTI_HOP,
    PROFESSIONS,
    SECOND_WORDS,
    SINGLE_HOP,
    THINGS,
    Entity,
    ask,
    by_name,
    by_title,
    chain_question,
    make_corpus,
    make_entities,
    make_questions,
)
from world.expert import TOP_K, WORDINGS, Target, expert_episodes, note, query, quote
from world.files import SCRATCH, SEED, WORLD, write_jsonl

ROWS_PER_WORLD = 150  # of pretraining
MAX_READ_PASSAGES = 7  # that a generator is shown
# The first seed of each kind of text: no two kinds share an encyclopaedia.
DEMONSTRATION_SEED = 9_000
READING_SEED = 30_000
MEMORY_SEED = 50_000
KNOWN = ("town", "school")  # two fifths of the test questions need a fact about one of these
FACTS_PER_ROW = 12


class Encyclopaedia(NamedTuple):
    entities: dict[str, Entity]  # by title
    corpus: list[dict[str, str]]


class PracticeWorld(NamedTuple):
    """An encyclopaedia that can be searched, and questions about both of its halves."""

    number: int
    entities: dict[str, Entity]
    retriever: Retriever
    questions: list[dict[str, Any]]


class Turn(NamedTuple):
    """Plain text: what is shown, and what is told about it. Only the second is trained on."""

    shown: str
    told: str


# ---- other encyclopaedias


def practice_worlds(count: int, first_seed: int) -> Iterator[Encyclopaedia]:
    """Encyclopaedias of the seeds from first_seed on, without names of the shipped test half."""
    shipped = make_entities(SEED).values()
    hidden = frozenset(entity.name for entity in shipped if entity.split == "test")
    for seed in range(first_seed, first_seed + count):
        entities = make_entities(seed, without=hidden)
        yield Encyclopaedia(entities, make_corpus(entities, seed))


def practice_questions(
    num_questions: int, num_worlds: int, first_seed: int
) -> Iterator[PracticeWorld]:
    """Practice worlds with about num_questions questions in all, as many of each style and half."""
    styles = SINGLE_HOP + MULTI_HOP
    count = num_questions // num_worlds // len(styles) // 2
    for number, (entities, corpus) in enumerate(practice_worlds(num_worlds, first_seed)):
        write_jsonl(SCRATCH / "practice.jsonl", corpus)
        retriever = Retriever.load(SCRATCH / "practice.jsonl", WORLD / "encoder")
        questions = []
        for split in ("train", "test"):
            for style in styles:
                for row in make_questions(entities, split, style, count, number):
                    questions.append({**row, "id": f"{number}_{row['id']}"})
        yield PracticeWorld(number, entities, retriever, questions)


# ---- plain text for the student


def document(contents: str) -> str:
    """A passage as an observation shows it, without the tags around it."""
    title, text = contents.split("\n", 1)
    return f"Doc 1(Title: {title}) {text}\n"


def list_to_copy(rng: random.Random) -> Turn:
    """A list, and the same list again: here copying is all there is to learn."""
    items = []
    for _ in range(rng.choice((4, 8, 12, 16))):
        names = ((FIRST_WORDS, SECOND_WORDS), (GIVEN_NAMES, FAMILY_NAMES))
        first, second = rng.choice(names)
        draw = rng.random()
        if draw < 0.7:
            items.append(f"{rng.choice(first)} {rng.choice(second)}")
        elif draw < 0.85:
            items.append(str(rng.randrange(1800, 1960)))
        else:
            items.append(rng.choice(THINGS + PROFESSIONS))
    text = " , ".join(items)
    return Turn(f"List: {text}\nAgain:", f" {text}\n")


def chain_to_read(
    entities: dict[str, Entity], contents: dict[str, str], rng: random.Random
) -> list[Turn]:
    """A question of several hops, its passages one after the other, and its answer."""
    start = rng.choice(list(entities.values()))
    num_hops = rng.choice((2, 2, 3))
    row = chain_question(entities, start, num_hops, rng.choice(MULTI_HOP), rng)
    turns = []
    for title, relation in row["hops"]:
        turns.append(Turn(document(contents[title]), _note_line(entities[title], relation)))
    turns[0] = Turn(f"Question: {row['question']}\n{turns[0].shown}", turns[0].told)
    answer = f"Answer: {row['golden_answers'][0]}\n"
    turns[-1] = Turn(turns[-1].shown, turns[-1].told + answer)
    return turns


def passages_to_read(
    entities: dict[str, Entity],
    contents: dict[str, str],
    namesakes: dict[str, list[Entity]],
    rng: random.Random,
) -> list[Turn]:
    """One to three passages that share a name, each followed by notes and answers about it."""
    together = namesakes[rng.choice(list(entities.values())).name]
    turns = []
    for entity in rng.sample(together, rng.choice((1, 1, 2, 3))):
        told = "".join(_remark(entity, together, rng) for _ in range(3))
        turns.append(Turn(document(contents[entity.title]), told))
    return turns


def _remark(entity: Entity, namesakes: list[Entity], rng: random.Random) -> str:
    """A note, a question with its answer, or a question that these passages do not answer."""
    relation = rng.choice(list(entity.facts))
    style = rng.choice(SINGLE_HOP + MULTI_HOP)
    draw = rng.random()
    fact = _note_line(entity, relation)
    if draw < 0.5:
        return fact
    if draw < 0.9:
        question = f"Question: {ask(entity, relation, style, rng)}\n"
        answer = f"Answer: {entity.facts[relation]}\n"
        return question + (fact if draw < 0.75 else "") + answer
    other = rng.choice([namesake for namesake in namesakes if namesake is not entity])
    question = ask(other, rng.choice(list(other.facts)), style, rng)
    return f"Question: {question}\nNote: no {other.kind} {other.name} here\n"


def _note_line(entity: Entity, relation: str) -> str:
    return f"Note: {note(relation, entity.kind, entity.name, entity.facts[relation])}\n"


def pretrain_rows(num_rows: int, first_seed: int, *, lists: float) -> list[dict[str, Any]]:
    """Texts without a question of the row's own and without any tag; `lists` is the share of lists.

    What is shown is the environment's, so that only what is told is trained on.
    """
    rng, rows = random.Random(f"pretrain {first_seed}"), []
    for entities, corpus in practice_worlds(num_rows // ROWS_PER_WORLD, first_seed):
        contents, namesakes = by_title(corpus), by_name(entities.values())
        for _ in range(ROWS_PER_WORLD):
            if rng.random() < lists:
                turns = [list_to_copy(rng)]
            elif rng.random() < 0.3:
                turns = chain_to_read(entities, contents, rng)
            else:
                turns = passages_to_read(entities, contents, namesakes, rng)
            segments = []
            for turn in turns:
                segments.append({"author": "environment", "text": turn.shown})
                segments.append({"author": "agent", "text": turn.told})
            row_id = f"pretrain_{first_seed}_{len(rows)}"
            rows.append({"id": row_id, "question": "", "golden_answers": [], "segments": segments})
    return rows


# ---- episodes of the expert


def practice_demonstrations(
    num_questions: int, num_worlds: int, protocol: Protocol = SEARCH_R1
) -> list[dict[str, Any]]:
    """The expert's episodes in other encyclopaedias: all seven styles, both halves."""
    episodes = []
    for world in practice_questions(num_questions, num_worlds, DEMONSTRATION_SEED):
        episodes += expert_episodes(
            world.questions,
            world.retriever,
            world.entities,
            seed=world.number,
            protocol=protocol,
        )
    return episodes


# ---- an agent that knows some kinds of entities by heart


def memory_rows(entities: dict[str, Entity], num_rows: int) -> list[dict[str, Any]]:
    """Facts of the KNOWN kinds in both halves, in the words of the expert's notes.

    The subject is shown and the value is told, so that nothing but values is learnt.
    """
    facts = [
        (entity, relation)
        for entity in entities.values()
        if entity.kind in KNOWN
        for relation in entity.facts
    ]
    rng, rows, waiting = random.Random("memory"), [], []
    while len(rows) < num_rows:
        if len(waiting) < FACTS_PER_ROW:
            waiting += rng.sample(facts, len(facts))
        segments = []
        for entity, relation in waiting[:FACTS_PER_ROW]:
            shown = note(relation, entity.kind, entity.name, "").rstrip()
            told = f" {entity.facts[relation]} </reflection>\n"
            segments.append({"author": "environment", "text": f"<reflection> {shown}"})
            segments.append({"author": "agent", "text": told})
        del waiting[:FACTS_PER_ROW]
        row_id = f"memory_{len(rows)}"
        rows.append({"id": row_id, "question": "", "golden_answers": [], "segments": segments})
    return rows


def recalling_demonstrations(
    entities: dict[str, Entity], retriever: Retriever, num_questions: int
) -> list[dict[str, Any]]:
    """Episodes of QAgent's expert who knows the KNOWN kinds, about the shipped training half."""
    styles, rows = SINGLE_HOP + MULTI_HOP, []
    for style in styles:
        rows += make_questions(entities, "train", style, num_questions // len(styles), MEMORY_SEED)
    return expert_episodes(
        rows, retriever, entities, seed=MEMORY_SEED, protocol=QAGENT, known=KNOWN)


# ---- texts for generators


def reading_rows(num_questions: int, num_worlds: int) -> list[dict[str, Any]]:
    """What a generator of QAgent is asked, and how it answers.

    It repeats the passage of each hop and notes what that says, or says that the passage is
    missing. Models of this size pick among passages by repeating them (docs/log.md).
    """
    rows, tokenizer = [], Tokenizer.load(WORLD / "student")
    for world in practice_questions(num_questions, num_worlds, READING_SEED):
        rng = random.Random(f"reading {world.number}")
        rng.shuffle(world.questions)
        corpus = world.retriever.corpus
        passages = (corpus.passage(number, 0.0) for number in range(len(corpus)))
        shelf = {passage.name: passage for passage in passages}
        for row in world.questions:
            shown = passages_for(row, world, shelf, rng)
            rows.append(reading_row(row, shown, world.entities, tokenizer))
    return rows


def passages_for(
    row: dict[str, Any], world: PracticeWorld, shelf: dict[str, Passage], rng: random.Random
) -> list[Passage]:
    """The passages that a generator is shown with a question, at most MAX_READ_PASSAGES.

    They come from one search for the question, or from searches for each hop in several wordings.
    A passage that these did not bring is added with a chance of 0.7. shelf: all passages by title.
    """
    hops = row["hops"]
    question = row["question"] if len(hops) == 1 else ""
    queries = []
    for title, relation in hops:
        entity = world.entities[title]
        target = Target(entity.name, entity.kind, relation)
        for wording in rng.sample(list(WORDINGS), rng.choice((1, 2, 3))):
            queries.append(query(wording, target, question, rng))
    if rng.random() < 0.4:
        results = world.retriever.search([row["question"]], 5)
    else:
        results = world.retriever.search(queries, TOP_K)
    passages = unique_passages(results)
    for title, _ in hops:
        if title not in {passage.name for passage in passages} and rng.random() < 0.7:
            passages.insert(rng.randint(0, len(passages)), shelf[title])
    if rng.random() < 0.5:
        rng.shuffle(passages)
    return passages[:MAX_READ_PASSAGES]


def reading_row(
    row: dict[str, Any],
    passages: list[Passage],
    entities: dict[str, Entity],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """A generator's prompt with these passages, and the answer that it should give."""
    shown = {passage.name: passage for passage in passages}
    lines, answer = [], row["golden_answers"][0]
    for title, relation in row["hops"]:
        entity = entities[title]
        if title not in shown:
            lines.append(f"no {entity.kind} {entity.name} here")
            answer = "unknown"
            break
        lines.append(quote(shown[title]))
        lines.append(note(relation, entity.kind, entity.name, entity.facts[relation]))
    golds = tuple(row["golden_answers"])
    question = Question(row["id"], row["question"], golds, row["dataset"])
    thinking = "\n".join(lines)
    return {
        "id": row["id"],
        "question": row["question"],
        "golden_answers": row["golden_answers"],
        "segments": [
            {"author": "prompt", "ids": tokenizer.chat(generator_messages(question, passages))},
            {
                "author": "agent",
                "text": f"<think> {thinking} </think>\n<answer> {answer} </answer>",
            },
        ],
    }
