"""The embedded encyclopaedia: people, works, towns, organisations and questions about them.

Everything is drawn from one seed, so the files can be rebuilt byte for byte. What the world contains, and why:

1. Names are two words from closed lists; each word is one token of the world's tokenizer. A small model that
   fails here has taken a wrong decision, it has not misspelt a word.
2. Four or five entries share each name and differ only by kind ("Silver Harbor (novel)", "Silver Harbor (film)");
   people share full names and differ by profession. Asking the retriever for a name alone is a gamble on which
   namesakes come back: how to word a query, whether to search again and which passage to trust are decisions.
3. The encyclopaedia has two halves, "train" and "test", without links between them. All passages are in the
   corpus; a training question never mentions an entity of the test half, neither on the way nor as the answer.
4. Seven question styles mirror the paper's seven sets: three single-hop (nq, triviaqa, popqa), four multi-hop
   (hotpotqa: bridge and comparison; 2wikimultihopqa: compositional and comparison; musique: two and three hops;
   bamboogle: 125). The training file has the nq and hotpotqa styles only, as in the paper; the development file,
   which settings may be chosen on, has all seven, about the training half.

`python world.py build-data` writes the files.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

FIRST_WORDS = (
    "Amber Ancient Broken Burning Cold Copper Crimson Distant Frozen Gentle Golden Green Grey Hidden Hollow Iron "
    "Last Little Lonely Long Lost Marble Midnight Northern Pale Paper Quiet Red Salt Scarlet Second Secret Silver "
    "Stone Summer Velvet Western White Wild Winter"
).split()
SECOND_WORDS = (
    "Anchor Arrow Bridge Candle Castle Clock Crown Door Feather Field Forest Garden Gate Harbor House Island Lake "
    "Lantern Letter Meadow Mill Mirror Moon Mountain Orchard Promise River Road Shadow Shore Star Station Storm "
    "Street Thorn Tide Tower Valley Voice Window"
).split()
GIVEN_NAMES = (
    "Adel Anso Berit Bram Calla Corin Dario Delia Edda Elric Fenna Fitz Galen Greta Hanno Hesper Ilsa Ivo Jonel "
    "Juna Kasper Kira Lena Lorin Mara Milo Nadia Nils Odile Orson Petra Piet Quill Rhea Rolf Sanna Silas Tessa "
    "Tobin Ulla Vera Viktor Wanda Wren Xavi Yara Yorick Zelda"
).split()
FAMILY_NAMES = (
    "Abbot Ashby Barlow Bexley Calder Corvin Dell Drummond Eastman Elgin Farrow Finch Gorman Grell Hadley Hobb "
    "Innis Jessop Jorvik Keller Kline Lambert Locke Marlow Merrick Nash Norwood Oakes Orwin Pell Prior Quist "
    "Ramsey Rook Selby Stroud Tarrant Thorpe Umber Vance Voss Wexler Wick Yates Yew Zimmer Zorn Bascombe"
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
NAMESAKES = (4, 4, 5, 5)  # entries that share a name; drawn uniformly
NUM_THING_NAMES, NUM_PERSON_NAMES, TRAIN_SHARE = 380, 220, 0.55
NUM_DEVELOPMENT_QUESTIONS = 100  # of each style, about the training half, none of them a training question
NUM_QUESTIONS = {
    "train": {"nq": 4000, "hotpotqa": 3500},
    "test": dict(zip((*SINGLE_HOP, *MULTI_HOP), (500, 500, 500, 500, 500, 500, 125), strict=True)),
}

# (kind, relation) -> kind of the value; a year has no entry of its own
SCHEMA: dict[str, dict[str, str]] = {
    "novel": {"author": "novelist", "year": "year", "publisher": "company"},
    "film": {"director": "director", "year": "year", "town": "town"},
    "song": {"singer": "singer", "year": "year", "label": "company"},
    "painting": {"painter": "painter", "year": "year", "town": "town"},
    "town": {"founder": "engineer", "year": "year", "mayor": "lawyer"},
    "school": {"founder": "teacher", "year": "year", "town": "town"},
    "company": {"founder": "engineer", "year": "year", "town": "town"},
    **{p: {"birthplace": "town", "year": "year", "school": "school"} for p in PROFESSIONS},
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
        "The film {n} was released in {year}. {director} was the director, and it was shot in {town}.",
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
# relation -> (noun, verb, passive, asked-for noun): "who {verb} s", "s {passive} by which {asked}"
AGENTS = {
    "author": ("author", "wrote", "was written", "author"),
    "director": ("director", "directed", "was directed", "director"),
    "singer": ("singer", "sang", "was sung", "singer"),
    "painter": ("painter", "painted", "was painted", "painter"),
    "founder": ("founder", "founded", "was founded", "person"),
    "mayor": ("mayor", "leads", "is led", "mayor"),
    "publisher": ("publisher", "published", "was published", "company"),
    "label": ("label", "issued", "was issued", "company"),
}
YEARS = {"novel": "published", "film": "released", "song": "recorded", "painting": "finished"}
SITES = {"film": ("was", "shot"), "painting": ("is", "kept")}  # every other thing "is based", a person "was born"
# {s} is the subject ("the novel X", or a description of it), {S} the same with a capital letter
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
# how a multi-hop question speaks of an entity that it does not name
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
COMPARE = {  # (things, people); {order} is first or last
    "hotpotqa": (
        (
            "Which {kind} was {done} {order}, {a} or {b}?",
            "Which was {done} {order}, the {kind} {a} or the {kind} {b}?",
        ),
        ("Who was born {order}, the {ka} {a} or the {kb} {b}?",),
    ),
    "2wikimultihopqa": (
        ("Which {kind} was {done} {order}, {a} or {b}?",),
        ("Which person was born {order}, the {ka} {a} or the {kb} {b}?",),
    ),
}


@dataclass
class Entity:
    name: str
    kind: str
    split: str
    facts: dict[str, str] = field(default_factory=dict)  # relation -> name of the value, or a year
    links: dict[str, str] = field(default_factory=dict)  # relation -> title of the value's entry

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"


def make_entities(seed: int, *, without: frozenset[str] = frozenset()) -> dict[str, Entity]:
    """All entries by title; links never leave a half and never lead to a namesake. `without`: names not to be used."""
    rng = random.Random(f"entities {seed}")
    entities: dict[str, Entity] = {}
    for first, second, count, kinds in (
        (FIRST_WORDS, SECOND_WORDS, NUM_THING_NAMES, THINGS),
        (GIVEN_NAMES, FAMILY_NAMES, NUM_PERSON_NAMES, PROFESSIONS),
    ):
        names = rng.sample([name for a in first for b in second if (name := f"{a} {b}") not in without], count)
        for row, name in enumerate(names):
            split = "train" if row < TRAIN_SHARE * count else "test"
            for kind in rng.sample(kinds, rng.choice(NAMESAKES)):
                entity = Entity(name, kind, split)
                entities[entity.title] = entity
    pools: dict[tuple[str, str], list[Entity]] = {}
    for entity in entities.values():
        pools.setdefault((entity.split, entity.kind), []).append(entity)
    for entity in entities.values():
        for relation, kind in SCHEMA[entity.kind].items():
            if kind == "year":
                first_year = 1900 if entity.kind in WORKS else 1860 if entity.kind in PROFESSIONS else 1800
                entity.facts[relation] = str(first_year + rng.randrange(60))
                continue
            value = rng.choice(pools[entity.split, kind])
            while value.name == entity.name or value.name in entity.facts.values():
                value = rng.choice(pools[entity.split, kind])
            entity.facts[relation], entity.links[relation] = value.name, value.title
    return entities


def passage(entity: Entity, rng: random.Random) -> str:
    """Search-R1 corpus contents: the title in double quotes, a newline, the text."""
    person = entity.kind in PROFESSIONS
    text = rng.choice(PASSAGES["person" if person else entity.kind]).format(
        n=entity.name,
        kind=entity.kind,
        a="an" if entity.kind[0] in "aeiou" else "a",
        last=entity.name.split()[-1],
        **entity.facts,
    )
    return f'"{entity.title}"\n{text}'


def make_corpus(entities: dict[str, Entity], seed: int) -> list[dict[str, str]]:
    rng = random.Random(f"corpus {seed}")
    order = list(entities.values())
    rng.shuffle(order)
    return [{"id": str(row), "contents": passage(entity, rng)} for row, entity in enumerate(order)]


def implies_kind(kind: str, relation: str) -> bool:
    """True where the wording of the relation alone tells the kind ("who wrote X")."""
    return relation not in ("founder", "school", "birthplace") and (kind in WORKS or relation == "mayor")


def subject(entity: Entity, relation: str, style: str, rng: random.Random) -> str:
    bare = {"nq": 0.4, "triviaqa": 0.2, "popqa": 0.6}.get(style, 0.25)
    if implies_kind(entity.kind, relation) and rng.random() < bare:
        return entity.name
    of = " of" if entity.kind == "town" else ""
    return f"the {entity.kind}{of} {entity.name}"


def fill(
    relation: str, kind: str, templates: tuple[dict, dict, dict], style: str, s: str, rng: random.Random
) -> str:  # fmt: skip
    """Fill a template for (agent, place, school); a year is asked for by `ask` only."""
    agent, place, school = templates
    if relation in AGENTS:
        noun, verb, passive, asked = AGENTS[relation]
        words = {"noun": noun, "verb": verb, "passive": passive, "asked": asked}
        chosen = agent
    elif relation == "school":
        words, chosen = {}, school
    else:
        was, done = ("was", "born") if relation == "birthplace" else SITES.get(kind, ("is", "based"))
        words, chosen = {"was": was, "done": done}, place
    return rng.choice(chosen[style]).format(s=s, S=s[0].upper() + s[1:], **words)


def ask(entity: Entity, relation: str, style: str, rng: random.Random, s: str = "") -> str:
    """A question about one relation; `s` replaces the subject in a multi-hop question."""
    s = s or subject(entity, relation, style, rng)
    if relation == "year":
        done = "born" if entity.kind in PROFESSIONS else YEARS.get(entity.kind, "founded")
        return rng.choice(ASK_YEAR[style]).format(s=s, S=s[0].upper() + s[1:], done=done)
    return fill(relation, entity.kind, (ASK_AGENT, ASK_PLACE, ASK_SCHOOL), style, s, rng)


def describe(entity: Entity, relation: str, style: str, rng: random.Random, s: str = "") -> str:
    s = s or subject(entity, relation, style, rng)
    return fill(relation, entity.kind, (DESCRIBE_AGENT, DESCRIBE_PLACE, DESCRIBE_SCHOOL), style, s, rng)


def chain_question(entities: dict[str, Entity], start: Entity, hops: int, style: str, rng: random.Random) -> dict:
    """Follow `hops` relations from `start`; every entity on the way has its own name."""
    entity, s, path = start, "", []
    for hop in range(hops):
        last = hop == hops - 1
        relation = rng.choice(list(entity.facts if last else entity.links))
        path.append([entity.title, relation])
        if last:
            question, answer = ask(entity, relation, style, rng, s), entity.facts[relation]
        else:
            s = describe(entity, relation, style, rng, s)
            entity = entities[entity.links[relation]]
    kind = "single" if hops == 1 else "compositional" if style != "hotpotqa" else "bridge"
    return {"question": question, "golden_answers": [answer], "metadata": {"type": kind, "hops": path}}


def comparable(entity: Entity) -> str:
    return "person" if entity.kind in PROFESSIONS else entity.kind


def compare_question(pool: list[Entity], style: str, rng: random.Random) -> dict:
    a = rng.choice(pool)
    person = a.kind in PROFESSIONS
    b = rng.choice(pool)
    while b.name == a.name or b.facts["year"] == a.facts["year"] or comparable(b) != comparable(a):
        b = rng.choice(pool)
    order = rng.choice(("first", "last"))
    done = YEARS.get(a.kind, "founded")
    question = rng.choice(COMPARE[style][person]).format(
        kind=a.kind, ka=a.kind, kb=b.kind, a=a.name, b=b.name, done=done, order=order
    )
    answer = min(a, b, key=lambda e: int(e.facts["year"]) * (1 if order == "first" else -1)).name
    metadata = {"type": "comparison", "order": order, "hops": [[a.title, "year"], [b.title, "year"]]}
    return {"question": question, "golden_answers": [answer], "metadata": metadata}


def make_questions(entities: dict[str, Entity], split: str, style: str, count: int, seed: int) -> list[dict]:
    """`count` distinct questions of one style; a chain that returns to a name it has used is dropped."""
    rng = random.Random(f"questions {seed} {split} {style}")
    pool = [entity for entity in entities.values() if entity.split == split]
    rows: dict[str, dict] = {}
    for _ in range(50 * count):
        if len(rows) == count:
            break
        if style in COMPARE and rng.random() < 0.25:
            row = compare_question(pool, style, rng)
        else:
            hops = 1 if style in SINGLE_HOP else 3 if style == "musique" and rng.random() < 0.2 else 2
            row = chain_question(entities, rng.choice(pool), hops, style, rng)
            names = [entities[title].name for title, _ in row["metadata"]["hops"]]
            if len({*names, *row["golden_answers"]}) <= len(names):
                continue
        rows.setdefault(row["question"], row)
    if len(rows) < count:
        raise ValueError(f"{split} {style}: got {len(rows)} distinct questions, expected {count}; lower NUM_QUESTIONS")
    return [{"id": f"{style}_{split}_{i}", "dataset": style, **row} for i, row in enumerate(rows.values())]
