"""The scripted expert: it answers questions of the world by searching, and its searches often fail.

The teacher learns from its episodes (practice.py). It works in this way:

1. It draws one of three wordings for each query (WORDINGS), whatever the question. The bare name is
   the most frequent wording and the worst: passages of namesakes crowd the right one out. The
   question is better; if there are several hops, the expert asks a question about this hop. The
   name with its kind is best.
2. When the passage did not come back, it may search again in other words (SEARCH_AGAIN). Otherwise
   it trusts the passage of the first namesake, and answers from that.
3. In the protocol qagent it asks one, two or three wordings of a query at once, and plans before
   every search. It repeats the passage that it trusts before it notes what the passage says,
   because small models pick among passages in this way (docs/log.md).
4. An expert may know some kinds of entities by heart (RECALL). It then notes the fact, and asks
   nothing.
"""

import random
from collections.abc import Collection, Generator, Sequence
from typing import Any, NamedTuple

from data import Passage
from episode import SEARCH_R1, Protocol, unique_passages
from qagent import QAGENT
from retriever import Retriever
from world.encyclopaedia import GROUPS, PROFESSIONS, SCHEMA, Entity, ask

TOP_K = 1
MAX_SEARCHES = 4
NUM_QUERIES = (1, 1, 2, 3)  # of one search of protocol qagent; drawn uniformly
WORDINGS = {"poor": 0.40, "medium": 0.30, "good": 0.30}  # chance of each
RECALL = 0.8  # chance that an expert who knows a fact does not look it up
# Chance of another search when the passage did not come back. It depends on what came back instead:
# a namesake of a similar kind (work and work, artist and artist), one of another kind, or neither.
SEARCH_AGAIN = {"similar": 0.55, "other": 0.80, "absent": 0.95}


class Target(NamedTuple):
    """What one hop of a question asks for."""

    name: str
    kind: str
    relation: str

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"


class Request(NamedTuple):
    """One turn of the expert that ends in a search."""

    text: str
    queries: tuple[str, ...]


class Conclusion(NamedTuple):
    """The last turn of the expert."""

    text: str
    answer: str


class Source(NamedTuple):
    """The passage that the expert trusts, and the entity that it is about."""

    entity: Entity
    passage: Passage


# ---- words about entities, for the expert and for practice texts


def value_kind(kind: str, relation: str) -> str:
    """What an answer to this relation is: a person, a year, or the kind of place."""
    value = SCHEMA[kind][relation]
    return "person" if value in PROFESSIONS else value


def are_similar(kind: str, other: str) -> bool:
    """Whether two kinds are easily taken for each other."""
    return any(kind in group and other in group for group in GROUPS)


def note(relation: str, kind: str, name: str, value: str) -> str:
    return f"{relation} of {kind} {name} is {value}"


def quote(passage: Passage) -> str:
    """The passage in the form in which QAgent's protocol and its generators show it."""
    return f"{passage.name}\n{passage.text}"


def query(wording: str, target: Target, question: str, rng: random.Random) -> str:
    """Word a query; `question` is the question of a single hop, or "" for one hop of several."""
    if wording == "poor":
        return target.name
    if wording == "good":
        return f"{target.name} {target.kind}"
    if not question:
        entity = Entity(target.name, target.kind, "")
        of = " of" if target.kind == "town" else ""
        subject = f"the {target.kind}{of} {target.name}"
        question = ask(entity, target.relation, "nq", rng, subject)
    return question.rstrip("?")


# ---- one question


class Expert:
    """The expert at work on one row of a question file.

    `work()` yields a Request for each search and must be sent the passages that were found. What it
    returns at the end is a Conclusion.
    """

    def __init__(
        self,
        row: dict[str, Any],
        entities: dict[str, Entity],
        rng: random.Random,
        protocol: Protocol = SEARCH_R1,
        known: Collection[str] = (),
    ) -> None:
        self.row, self.entities, self.rng, self.protocol = row, entities, rng, protocol
        self.known = known  # kinds of entities that it knows by heart
        hops = row["hops"]
        self.subjects = [entities[title] for title, _ in hops]
        self.relations = [relation for _, relation in hops]
        self.is_comparison = "order" in row
        self.num_searches = 0
        first = f"{self.subjects[0].kind} {self.subjects[0].name}"
        if self.is_comparison:
            second = f"{self.subjects[1].kind} {self.subjects[1].name}"
            self.plan = f"compare year of {first} and {second}"
        else:
            self.plan = f"need {' of '.join(reversed(self.relations))} of {first}"
        self.thought = self.plan  # how its next turn begins in the protocol search-r1
        self.notes: list[str] = []  # since the last search; they begin its next turn in qagent

    def work(self) -> "Work":
        """Look up one hop after the other, until the answer is known or no search is left."""
        name, values = self.subjects[0].name, []
        for hop, relation in enumerate(self.relations):
            target = Target(name, self.subjects[hop].kind, relation)
            if self._recalls(target):
                values.append(self.entities[target.title].facts[relation])
            else:
                source = yield from self._look_up(target)
                if source is None:
                    break
                values.append(_read_value(source.entity, target))
                self.notes = [quote(source.passage)]
            self.thought = note(relation, target.kind, name, values[-1])
            self.notes.append(self.thought)
            if hop + 1 < len(self.relations):
                name = self.subjects[hop + 1].name if self.is_comparison else values[-1]
                self._plan_hop(hop + 1, name)
        return self._conclude(values, name)

    def _recalls(self, target: Target) -> bool:
        is_known = target.kind in self.known and target.title in self.entities
        return is_known and self.rng.random() < RECALL

    def _look_up(self, target: Target) -> Generator[Request, Sequence[Passage], Source | None]:
        """Search until a passage is trusted; None when no search is left for this target."""
        wordings = dict(WORDINGS)
        while self.num_searches < MAX_SEARCHES:
            queries = self._draw_queries(wordings, target)
            passages = yield Request(self._search_text(queries), queries)
            self.num_searches += 1
            sources = [Source(self.entities[passage.name], passage) for passage in passages]
            for source in sources:
                if source.entity.name == target.name and source.entity.kind == target.kind:
                    return source
            usable = [source for source in sources if _may_answer(source.entity, target)]
            namesakes = [source for source in usable if source.entity.name == target.name]
            if not self._searches_again(wordings, namesakes, target):
                return (namesakes or usable or sources)[0]
            self.thought = f"no {target.kind} {target.name} here"
            self.notes = [self.thought]
        return None

    def _draw_queries(self, wordings: dict[str, float], target: Target) -> tuple[str, ...]:
        """Draw the wordings of one search, and remove them from `wordings`."""
        count = 1
        if self.protocol is QAGENT:
            count = min(self.rng.choice(NUM_QUERIES), len(wordings))
        question = self.row["question"] if len(self.relations) == 1 else ""
        queries = []
        for _ in range(count):
            [wording] = self.rng.choices(list(wordings), list(wordings.values()))
            del wordings[wording]
            queries.append(query(wording, target, question, self.rng))
        return tuple(queries)

    def _search_text(self, queries: Sequence[str]) -> str:
        if self.protocol is SEARCH_R1:
            return f"<think> {self.thought} </think>\n<search> {queries[0]} </search>"
        listed = "".join(f"\n<query> {words} </query>" for words in queries)
        return f"{self._reflection()}<plan> {self.plan} </plan>\n<search>{listed}\n</search>"

    def _searches_again(
        self, wordings: dict[str, float], namesakes: list[Source], target: Target
    ) -> bool:
        if not wordings or self.num_searches == MAX_SEARCHES:
            return False
        if not namesakes:
            came_back = "absent"
        elif are_similar(namesakes[0].entity.kind, target.kind):
            came_back = "similar"
        else:
            came_back = "other"
        return self.rng.random() < SEARCH_AGAIN[came_back]

    def _plan_hop(self, hop: int, name: str) -> None:
        remaining = "year"
        if not self.is_comparison:
            remaining = " of ".join(reversed(self.relations[hop:]))
        self.plan = f"need {remaining} of {self.subjects[hop].kind} {name}"
        self.thought += f" , {self.plan}"

    def _conclude(self, values: list[str], name: str) -> Conclusion:
        """Answer with the last value; without any, with the name that it was looking for."""
        answer = values[-1] if values else name
        if self.is_comparison:
            answer = self._compare(values)
        action = f"<answer> {answer} </answer>"
        if self.protocol is SEARCH_R1:
            return Conclusion(f"<think> {self.thought} </think>\n{action}", answer)
        return Conclusion(self._reflection() + action, answer)

    def _reflection(self) -> str:
        """How a turn begins in the protocol qagent."""
        listed = "\n".join(self.notes)
        return f"<reflection> {listed} </reflection>\n" if self.notes else ""

    def _compare(self, values: list[str]) -> str:
        """The name with the earlier or later year; the first name where a year is missing."""
        names = [subject.name for subject in self.subjects]
        if len(values) < 2 or not all(value.isdigit() for value in values):
            return names[0]
        order = self.row["order"]
        pick = min if order == "first" else max
        _, answer = pick(zip(values, names, strict=True))
        comparison = f" and {names[0]} {values[0]} , {order} is {answer}"
        self.thought += comparison
        self.notes[-1] += comparison
        return answer


def _may_answer(entity: Entity, target: Target) -> bool:
    """Whether the entity has a value of the kind that is asked for."""
    wanted = value_kind(target.kind, target.relation)
    return any(value_kind(entity.kind, relation) == wanted for relation in SCHEMA[entity.kind])


def _read_value(entity: Entity, target: Target) -> str:
    """What the passage of this entity says about the target, or seems to say."""
    if entity.kind == target.kind:
        return entity.facts[target.relation]
    wanted = value_kind(target.kind, target.relation)
    for relation, value in entity.facts.items():
        if value_kind(entity.kind, relation) == wanted:
            return value
    return next(iter(entity.facts.values()))


# ---- many questions


Work = Generator[Request, Sequence[Passage] | None, Conclusion]


class Job(NamedTuple):
    """A question that is being worked on."""

    work: Work
    episode: dict[str, Any]
    request: Request  # the search that is due


def expert_episodes(
    rows: Sequence[dict[str, Any]],
    retriever: Retriever,
    entities: dict[str, Entity],
    *,
    seed: int,
    protocol: Protocol = SEARCH_R1,
    known: Collection[str] = (),
    batch_size: int = 512,
) -> list[dict[str, Any]]:
    """The expert's episodes about these questions, in their order, as rows of an episodes file.

    Searches are real, and wrong answers are kept. Searches of `batch_size` questions run together.
    """
    episodes = []
    for start in range(0, len(rows), batch_size):
        jobs = []
        for row in rows[start : start + batch_size]:
            rng = random.Random(f"expert {seed} {row['id']}")
            work = Expert(row, entities, rng, protocol, known).work()
            episodes.append(_new_episode(row))
            jobs += _go_on(work, episodes[-1], None)
        while jobs:
            jobs = _search_and_go_on(jobs, retriever, protocol)
    return episodes


def _new_episode(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "question": row["question"],
        "golden_answers": row["golden_answers"],
        "source": row["dataset"],
        "segments": [],
    }


def _go_on(work: Work, episode: dict[str, Any], passages: Sequence[Passage] | None) -> list[Job]:
    """Let the expert read passages, or begin: the job of its next search, or none at its end."""
    try:
        return [Job(work, episode, work.send(passages))]
    except StopIteration as stop:
        conclusion: Conclusion = stop.value
        episode["segments"].append({"author": "agent", "text": conclusion.text})
        episode["answer"] = conclusion.answer
        episode["score"] = float(conclusion.answer in episode["golden_answers"])
        return []


def _search_and_go_on(jobs: Sequence[Job], retriever: Retriever, protocol: Protocol) -> list[Job]:
    """Run the searches that are due and let the expert read; returns the jobs that want another."""
    queries = [words for job in jobs for words in job.request.queries]
    results = iter(retriever.search(queries, TOP_K))
    unfinished = []
    for job in jobs:
        passages = unique_passages([next(results) for _ in job.request.queries])
        segments = job.episode["segments"]
        segments.append({"author": "agent", "text": job.request.text})
        segments.append({"author": "environment", "text": protocol.observation(passages)})
        unfinished += _go_on(job.work, job.episode, passages)
    return unfinished
