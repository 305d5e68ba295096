"""The embedded encyclopaedia: people, works, towns, organisations, and questions about them.

`python -m world.build build-data` writes the files. Everything is drawn from one seed, so that they
can be rebuilt byte for byte. What the world contains, and why:

1. A name has two words from closed lists, and each word is one token of the world's tokenizer. A
   small model that gives a wrong answer has decided wrongly; it has not misspelt a word.
2. Four or five entries share each name and differ in kind only: "Silver Harbor (novel)" and "Silver
   Harbor (film)". People share full names and differ by profession. A search for the bare name may
   bring any of the namesakes. The agent must therefore decide how to word a query, whether to
   search again and which passage to trust.
3. The encyclopaedia has two halves, "train" and "test", without links between them. The corpus
   holds the passages of both. A training question never mentions an entity of the test half,
   neither on the way nor as the answer.
4. Seven styles of questions stand for the paper's seven data sets. Three have a single hop: nq,
   triviaqa and popqa. Four have several: hotpotqa (bridges and comparisons), 2wikimultihopqa
   (compositions and comparisons), musique (two and three hops) and bamboogle (125 questions).
5. As in the paper, training questions have the styles nq and hotpotqa only. The development file,
   on which settings may be chosen, has all seven styles and asks about the training half.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST_WORDS = (
    "Amber Ancient Broken Burning Cold Copper Crimson Distant Frozen Gentle Golden Green Grey "
    "Hidden Hollow Iron Last Little Lonely Long Lost Marble Midnight Northern Pale Paper Quiet Red "
    "Salt Scarlet Second Secret Silver Stone Summer Velvet Western White Wild Winter"
).split()
SECOND_WORDS = (
    "Anchor Arrow Bridge Candle Castle Clock Crown Door Feather Field Forest Garden Gate Harbor "
    "House Island Lake Lantern Letter Meadow Mill Mirror Moon Mountain Orchard Promise River Road "
    "Shadow Shore Star Station Storm Street Thorn Tide Tower Valley Voice Window"
).split()
GIVEN_NAMES = (
    "Adel Anso Berit Bram Calla Corin Dario Delia Edda Elric Fenna Fitz Galen Greta Hanno Hesper "
    "Ilsa Ivo Jonel Juna Kasper Kira Lena Lorin Mara Milo Nadia Nils Odile Orson Petra Piet Quill "
    "Rhea Rolf Sanna Silas Tessa Tobin Ulla Vera Viktor Wanda Wren Xavi Yara Yorick Zelda"
).split()
FAMILY_NAMES = (
    "Abbot Ashby Barlow Bexley Calder Corvin Dell Drummond Eastman Elgin Farrow Finch Gorman Grell "
    "Hadley Hobb Innis Jessop Jorvik Keller Kline Lambert Locke Marlow Merrick Nash Norwood Oakes "
    "Orwin Pell Prior Quist Ramsey Rook Selby Stroud Tarrant Thorpe Umber Vance Voss Wexler Wick "
    "Yates Yew Zimmer Zorn Bascombe"
).split()

WORKS = ("novel", "film", "song", "painting")
PLACES = ("town", "school", "company")
THINGS = (*WORKS, *PLACES)
ARTISTS = ("novelist", "director", "singer", "painter")
GRADUATES = ("engineer", "teacher", "lawyer")
PROFESSIONS = (*ARTISTS, *GRADUATES)
GROUPS = (WORKS, PLACES, ARTISTS, GRADUATES)  # kinds that are easily taken for each other
SINGLE_HOP = ("nq", "triviaqa", "popqa")
MULTI_HOP = ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
NUM_NAMESAKES = (4, 4, 5, 5)  # entries that share a name; drawn uniformly
NUM_THING_NAMES = 380
NUM_PERSON_NAMES = 220
TRAIN_SHARE = 0.55  # of the names; the others belong to the test half
NUM_DEVELOPMENT_QUESTIONS = 100  # of each style
NUM_QUESTIONS = {
    "train": {"nq": 4000, "hotpotqa": 3500},
    "test": {
        "nq": 500,
        "triviaqa": 500,
        "popqa": 500,
        "hotpotqa": 500,
        "2wikimultihopqa": 500,
        "musique": 500,
        "bamboogle": 125,
    },
}

# kind -> relation -> kind of the value. A year has no entry of its own.
SCHEMA: dict[str, dict[str, str]] = {
    "novel": {"author": "novelist", "year": "year", "publisher": "company"},
    "film": {"director": "director", "year": "year", "town": "town"},
    "song": {"singer": "singer", "year": "year", "label": "company"},
    "painting": {"painter": "painter", "year": "year", "town": "town"},
    "town": {"founder": "engineer", "year": "year", "mayor": "lawyer"},
    "school": {"founder": "teacher", "year": "year", "town": "town"},
    "company": {"founder": "engineer", "year": "year", "town": "town"},
    **{
        profession: {"birthplace": "town", "year": "year", "school": "school"}
        for profession in PROFESSIONS
    },
}
PASSAGES: dict[str, tuple[str, ...]] = {
    "novel": (
        "{n} is a novel by {author}, published in {year} by {publisher}.",
        "{n} is a {year} novel written by {author}. The publisher was {publisher}.",
        "Published by {publisher} in {year}, {n} is a novel by the author {author}.",
        "The novel {n} was written by {author} and published by the company {publisher} in {year}.",
    ),
    "film": (
        "{n} is a film directed by {director}. It was shot in {town} and released in {year}.",
        "The film {n} was released in {year}. {director} was the director, "
        "and it was shot in {town}.",
        "Shot in the town of {town}, {n} is a {year} film by the director {director}.",
    ),
    "song": (
        "{n} is a song by {singer}, recorded in {year} and issued by the label {label}.",
        "The song {n} was sung by the singer {singer} in {year}. The label was {label}.",
        "Issued by {label} and recorded in {year}, {n} is a song first sung by {singer}.",
    ),
    "painting": (
        "{n} is a painting by {painter}, finished in {year}. It is kept in {town}.",
        "Kept in the town of {town}, {n} was painted by {painter} and finished in {year}.",
        "The painting {n} by the painter {painter} was finished in {year} and is kept in {town}.",
    ),
    "town": (
        "{n} is a town founded by {founder} in {year}. The mayor is {mayor}.",
        "The town of {n} was founded in {year} by the engineer {founder} and is led by {mayor}.",
        "{mayor} is the mayor of {n}, a town that {founder} founded in {year}.",
    ),
    "school": (
        "{n} is a school in {town}, founded in {year} by {founder}.",
        "Founded by the teacher {founder} in {year}, {n} is a school based in the town of {town}.",
        "The school {n} is based in {town}. The founder was {founder} in {year}.",
    ),
    "company": (
        "{n} is a company based in {town}. It was founded by {founder} in {year}.",
        "The company {n} was founded in {year} by the engineer {founder} and is based in {town}.",
        "Based in {town}, {n} is a company that {founder} founded in {year}.",
    ),
    "person": (
        "{n} was {a} {kind} born in {birthplace} in {year}. {last} studied at {school}.",
        "Born in {year} in {birthplace}, {n} was {a} {kind} who studied at {school}.",
        "The {kind} {n} studied at {school}. {last} was born in {birthplace} in {year}.",
        "{n}, {a} {kind} from {birthplace}, was born in {year} and studied at the school {school}.",
    ),
}


class AgentWords(NamedTuple):
    """Words for a relation to somebody: "who {verb} X", "X {passive} by which {asked}"."""

    noun: str
    verb: str
    passive: str
    asked: str


class SiteWords(NamedTuple):
    """Words for a relation to a place: "where {was} X {done}"."""

    was: str
    done: str


AGENTS = {
    "author": AgentWords("author", "wrote", "was written", "author"),
    "director": AgentWords("director", "directed", "was directed", "director"),
    "singer": AgentWords("singer", "sang", "was sung", "singer"),
    "painter": AgentWords("painter", "painted", "was painted", "painter"),
    "founder": AgentWords("founder", "founded", "was founded", "person"),
    "mayor": AgentWords("mayor", "leads", "is led", "mayor"),
    "publisher": AgentWords("publisher", "published", "was published", "company"),
    "label": AgentWords("label", "issued", "was issued", "company"),
}
YEARS = {"novel": "published", "film": "released", "song": "recorded", "painting": "finished"}
SITES = {"film": SiteWords("was", "shot"), "painting": SiteWords("is", "kept")}
OTHER_SITE = SiteWords("is", "based")
BIRTH = SiteWords("was", "born")

# Templates by style. {s} is the subject, "the novel X" or a description of it; {S} is the same with
# a capital letter.
ASK_AGENT = {
    "nq": ("who {verb} {s}", "who is the {noun} of {s}"),
    "triviaqa": ("Which {asked} {verb} {s}?", "{S} {passive} by which {asked}?"),
    "popqa": ("Who is the {noun} of {s}?",),
    "hotpotqa": ("Who {verb} {s}?", "Who is the {noun} of {s}?"),
    "2wikimultihopqa": ("Who is the {noun} of {s}?",),
    "musique": ("Who {verb} {s}?", "Who was the {noun} of {s}?"),
    "bamboogle": ("Which {asked} {verb} {s}?",),
}
ASK_YEAR = {
    "nq": ("when was {s} {done}", "what year was {s} {done}"),
    "triviaqa": ("In which year was {s} {done}?", "{S} was {done} in which year?"),
    "popqa": ("In what year was {s} {done}?",),
    "hotpotqa": ("In which year was {s} {done}?", "When was {s} {done}?"),
    "2wikimultihopqa": ("When was {s} {done}?",),
    "musique": ("What year was {s} {done}?", "When was {s} {done}?"),
    "bamboogle": ("{S} was {done} in what year?",),
}
ASK_PLACE = {
    "nq": ("where {was} {s} {done}", "in what town {was} {s} {done}"),
    "triviaqa": ("In which town {was} {s} {done}?", "{S} {was} {done} in which town?"),
    "popqa": ("In what town {was} {s} {done}?",),
    "hotpotqa": ("In which town {was} {s} {done}?", "Where {was} {s} {done}?"),
    "2wikimultihopqa": ("Where {was} {s} {done}?",),
    "musique": ("What town {was} {s} {done} in?", "Where {was} {s} {done}?"),
    "bamboogle": ("{S} {was} {done} in what town?",),
}
ASK_SCHOOL = {
    "nq": ("where did {s} study", "what school did {s} study at"),
    "triviaqa": ("At which school did {s} study?", "{S} studied at which school?"),
    "popqa": ("What is the school of {s}?",),
    "hotpotqa": ("At which school did {s} study?", "Where did {s} study?"),
    "2wikimultihopqa": ("Where did {s} study?",),
    "musique": ("What school did {s} study at?", "Where did {s} study?"),
    "bamboogle": ("{S} studied at what school?",),
}
# How a question of several hops speaks of an entity that it does not name.
DESCRIBE_AGENT = {
    "hotpotqa": ("the {noun} of {s}", "the {asked} that {verb} {s}"),
    "2wikimultihopqa": ("the {noun} of {s}",),
    "musique": ("the {asked} that {verb} {s}", "the {noun} of {s}"),
    "bamboogle": ("the {asked} that {verb} {s}",),
}
DESCRIBE_PLACE = {
    "hotpotqa": ("the town where {s} {was} {done}",),
    "2wikimultihopqa": ("the town where {s} {was} {done}",),
    "musique": ("the place where {s} {was} {done}", "the town where {s} {was} {done}"),
    "bamboogle": ("the town that {s} {was} {done} in",),
}
DESCRIBE_SCHOOL = {
    "hotpotqa": ("the school where {s} studied", "the school of {s}"),
    "2wikimultihopqa": ("the school of {s}",),
    "musique": ("the place where {s} studied", "the school of {s}"),
    "bamboogle": ("the school that {s} studied at",),
}
# {order} is "first" or "last".
COMPARE_THINGS = {
    "hotpotqa": (
        "Which {kind} was {done} {order}, {a} or {b}?",
        "Which was {done} {order}, the {kind} {a} or the {kind} {b}?",
    ),
    "2wikimultihopqa": ("Which {kind} was {done} {order}, {a} or {b}?",),
}
COMPARE_PEOPLE = {
    "hotpotqa": ("Who was born {order}, the {ka} {a} or the {kb} {b}?",),
    "2wikimultihopqa": ("Which person was born {order}, the {ka} {a} or the {kb} {b}?",),
}


class Templates(NamedTuple):
    """Templates for the three ways in which an entity is related to another one."""

    agent: dict[str, tuple[str, ...]]
    place: dict[str, tuple[str, ...]]
    school: dict[str, tuple[str, ...]]


ASK = Templates(ASK_AGENT, ASK_PLACE, ASK_SCHOOL)
DESCRIBE = Templates(DESCRIBE_AGENT, DESCRIBE_PLACE, DESCRIBE_SCHOOL)


@dataclass
class Entity:
    name: str
    kind: str
    split: str  # "train" or "test"
    facts: dict[str, str] = field(default_factory=dict)  # relation -> name of the value, or a year
    links: dict[str, str] = field(default_factory=dict)  # relation -> title of the value's entry

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"


def by_title(corpus: list[dict[str, str]]) -> dict[str, str]:
    """Contents of each passage by its title."""
    return {row["contents"].split("\n")[0].strip('"'): row["contents"] for row in corpus}


def by_name(entities: Iterable[Entity]) -> dict[str, list[Entity]]:
    """The entities that share each name."""
    groups: dict[str, list[Entity]] = {}
    for entity in entities:
        groups.setdefault(entity.name, []).append(entity)
    return groups


# ---- entries and passages


def make_entities(seed: int, *, without: frozenset[str] = frozenset()) -> dict[str, Entity]:
    """All entries by title. `without`: names that must not be used.

    Links never leave a half and never lead to a namesake.
    """
    rng = random.Random(f"entities {seed}")
    entities: dict[str, Entity] = {}
    for first_words, second_words, count, kinds in (
        (FIRST_WORDS, SECOND_WORDS, NUM_THING_NAMES, THINGS),
        (GIVEN_NAMES, FAMILY_NAMES, NUM_PERSON_NAMES, PROFESSIONS),
    ):
        names = [f"{first} {second}" for first in first_words for second in second_words]
        names = rng.sample([name for name in names if name not in without], count)
        for number, name in enumerate(names):
            split = "train" if number < TRAIN_SHARE * count else "test"
            for kind in rng.sample(kinds, rng.choice(NUM_NAMESAKES)):
                entity = Entity(name, kind, split)
                entities[entity.title] = entity
    pools: dict[tuple[str, str], list[Entity]] = {}
    for entity in entities.values():
        pools.setdefault((entity.split, entity.kind), []).append(entity)
    for entity in entities.values():
        for relation, kind in SCHEMA[entity.kind].items():
            if kind == "year":
                entity.facts[relation] = str(first_year(entity.kind) + rng.randrange(60))
                continue
            value = rng.choice(pools[entity.split, kind])
            while value.name == entity.name or value.name in entity.facts.values():
                value = rng.choice(pools[entity.split, kind])
            entity.facts[relation], entity.links[relation] = value.name, value.title
    return entities


def first_year(kind: str) -> int:
    """The earliest year in which something or somebody of this kind may have begun."""
    if kind in WORKS:
        return 1900
    return 1860 if kind in PROFESSIONS else 1800


def passage(entity: Entity, rng: random.Random) -> str:
    """Contents of a Search-R1 corpus row: the title in double quotes, a newline, the text."""
    templates = PASSAGES["person" if entity.kind in PROFESSIONS else entity.kind]
    text = rng.choice(templates).format(
        n=entity.name,
        kind=entity.kind,
        a="an" if entity.kind[0] in "aeiou" else "a",
        last=entity.name.split()[-1],
        **entity.facts,
    )
    return f'"{entity.title}"\n{text}'


def make_corpus(entities: dict[str, Entity], seed: int) -> list[dict[str, str]]:
    """The passages of all entities, in random order."""
    rng = random.Random(f"corpus {seed}")
    order = list(entities.values())
    rng.shuffle(order)
    return [{"id": str(row), "contents": passage(entity, rng)} for row, entity in enumerate(order)]


# ---- questions


def implies_kind(kind: str, relation: str) -> bool:
    """Whether the wording of the relation alone tells the kind ("who wrote X")."""
    if relation in ("founder", "school", "birthplace"):
        return False
    return kind in WORKS or relation == "mayor"


def subject(entity: Entity, relation: str, style: str, rng: random.Random) -> str:
    """The entity as a question names it: with its kind, or its bare name where that may do."""
    bare = {"nq": 0.4, "triviaqa": 0.2, "popqa": 0.6}.get(style, 0.25)
    if implies_kind(entity.kind, relation) and rng.random() < bare:
        return entity.name
    of = " of" if entity.kind == "town" else ""
    return f"the {entity.kind}{of} {entity.name}"


def fill(
    templates: Templates, relation: str, kind: str, style: str, s: str, rng: random.Random
) -> str:
    """Fill a template of the relation, which is not "year"; `s` is the subject."""
    if relation in AGENTS:
        words = AGENTS[relation]._asdict()
        chosen = templates.agent
    elif relation == "school":
        words = {}
        chosen = templates.school
    else:
        site = BIRTH if relation == "birthplace" else SITES.get(kind, OTHER_SITE)
        words = site._asdict()
        chosen = templates.place
    return rng.choice(chosen[style]).format(s=s, S=capitalised(s), **words)


def capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def ask(entity: Entity, relation: str, style: str, rng: random.Random, s: str = "") -> str:
    """A question about one relation; `s` replaces the subject in a question of several hops."""
    s = s or subject(entity, relation, style, rng)
    if relation == "year":
        done = "born" if entity.kind in PROFESSIONS else YEARS.get(entity.kind, "founded")
        return rng.choice(ASK_YEAR[style]).format(s=s, S=capitalised(s), done=done)
    return fill(ASK, relation, entity.kind, style, s, rng)


def describe(entity: Entity, relation: str, style: str, rng: random.Random, s: str = "") -> str:
    """What a question of several hops calls the value of a relation that is not "year"."""
    s = s or subject(entity, relation, style, rng)
    return fill(DESCRIBE, relation, entity.kind, style, s, rng)


def chain_question(
    entities: dict[str, Entity], start: Entity, num_hops: int, style: str, rng: random.Random
) -> dict:
    """A question that follows num_hops relations from `start`; the last one may lead to a year."""
    entity, s, path = start, "", []
    for _ in range(num_hops - 1):
        relation = rng.choice(list(entity.links))
        path.append([entity.title, relation])
        s = describe(entity, relation, style, rng, s)
        entity = entities[entity.links[relation]]
    relation = rng.choice(list(entity.facts))
    path.append([entity.title, relation])
    question = ask(entity, relation, style, rng, s)
    return {
        "question": question,
        "golden_answers": [entity.facts[relation]],
        "hops": path,
    }


def comparable(entity: Entity) -> str:
    """People can be compared with each other; a thing, with others of its kind."""
    return "person" if entity.kind in PROFESSIONS else entity.kind


def compare_question(pool: list[Entity], style: str, rng: random.Random) -> dict:
    """A question which of two entities has the earlier or the later year."""
    a = rng.choice(pool)
    b = rng.choice(pool)
    while b.name == a.name or b.facts["year"] == a.facts["year"] or comparable(b) != comparable(a):
        b = rng.choice(pool)
    order = rng.choice(("first", "last"))
    templates = COMPARE_PEOPLE if a.kind in PROFESSIONS else COMPARE_THINGS
    question = rng.choice(templates[style]).format(
        kind=a.kind,
        ka=a.kind,
        kb=b.kind,
        a=a.name,
        b=b.name,
        done=YEARS.get(a.kind, "founded"),
        order=order,
    )
    pick = min if order == "first" else max
    answer = pick(a, b, key=lambda entity: int(entity.facts["year"])).name
    hops = [[a.title, "year"], [b.title, "year"]]
    return {
        "question": question,
        "golden_answers": [answer],
        "order": order,
        "hops": hops,
    }


def make_questions(
    entities: dict[str, Entity], split: str, style: str, count: int, seed: int
) -> list[dict]:
    """`count` distinct questions of one style; a chain that returns to one of its names is dropped.

    Raises ValueError when the encyclopaedia does not have as many.
    """
    rng = random.Random(f"questions {seed} {split} {style}")
    pool = [entity for entity in entities.values() if entity.split == split]
    rows: dict[str, dict] = {}
    for _ in range(50 * count):
        if len(rows) == count:
            break
        if style in COMPARE_THINGS and rng.random() < 0.25:
            row = compare_question(pool, style, rng)
        else:
            num_hops = 1 if style in SINGLE_HOP else 2
            if style == "musique" and rng.random() < 0.2:
                num_hops = 3
            row = chain_question(entities, rng.choice(pool), num_hops, style, rng)
            names = [entities[title].name for title, _ in row["hops"]]
            if len({*names, *row["golden_answers"]}) <= len(names):
                continue
        rows.setdefault(row["question"], row)
    if len(rows) < count:
        raise ValueError(
            f"{split} {style}: got {len(rows)} distinct questions, expected {count}; "
            "lower NUM_QUESTIONS"
        )
    numbered = enumerate(rows.values())
    return [{"id": f"{style}_{split}_{i}", "dataset": style, **row} for i, row in numbered]
