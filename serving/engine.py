"""One engine for the questions of many threads: each gets a row beside those under way.

A question's tokens are those that `rollout.generate` gives to it alone as episode 0, whoever else
asks. The iterators of this file end where their reader closes them: its row is then free.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data import Question
from episode import Episode, Protocol, Segment, begin_episode
from infra.http import Refused
from kernels import merged
from model import open_steps
from rollout import Engine, Policy, RolloutSettings, Row, SearchEngine, load_protocol
from serving.ask import watched
from tokenizer import Tokenizer

MAX_WAITING, TIMEOUT_S = 256, 600.0  # questions without a row; seconds for an answer
POLL_S = 0.2  # how often a thread looks whether its client is there


@dataclass(eq=False)
class Job:
    """A question on its way; times in seconds of time.perf_counter."""

    episode: Episode
    is_streamed: bool
    came: float
    began: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    is_over: bool = False
    is_left: bool = False  # nobody waits for it any more
    error: Exception | None = None
    grown: threading.Event = field(default_factory=threading.Event)


class SharedEngine:
    """Answers questions of many threads in a thread of its own.

    It is the iterator from which the engine takes rows: questions that have come since.
    prepare: makes of a question the one that is played, with a prompt of its own perhaps.
    """

    def __init__(self, policy: Policy, retriever: SearchEngine | None, settings: RolloutSettings, *,
                 seed: int = 0, protocol: Protocol | None = None, max_waiting: int = MAX_WAITING,
                 timeout_s: float = TIMEOUT_S,
                 prepare: Callable[[Question], Question] = lambda question: question) -> None:
        self.policy, self.settings, self.prepare = policy, settings, prepare
        self.max_waiting, self.timeout_s = max_waiting, timeout_s
        self.waiting: deque[Job] = deque()
        self.playing: dict[int, Job] = {}  # by the id of the episode
        self.changed, self.is_closed = threading.Condition(), False
        self.counts: Counter[str] = Counter()  # episodes by status
        self.num_tokens, self.first_token_s = 0, 0.0  # of agents; sum over episodes
        self.begin(Question("", "?", (), ""))  # a prompt that cannot work is refused now
        steps = open_steps(policy.decoder, settings.rollout_rows, settings.max_context_tokens + 1,
                           policy.dtype)
        protocol = watched(protocol or load_protocol(settings.protocol), self.see)
        self.engine = Engine(policy, retriever, settings, protocol, seed, steps)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def play(self, question: Question, *, is_streamed: bool = False) -> Iterator[Job]:
        """The job of a question: whenever it has grown if streamed, now and then, at its end.

        Closing the generator gives up the question and frees its row. ValueError: it is too long.
        """
        episode = self.begin(question)
        job = Job(episode, is_streamed, time.perf_counter())
        with self.changed:
            if len(self.waiting) >= self.max_waiting or self.is_closed:
                raise Refused(503, f"got {len(self.waiting)} questions that wait, expected at most "
                              f"{self.max_waiting}; ask again later")
            self.waiting.append(job)
            self.changed.notify()
        try:
            is_over = False
            while not is_over:
                job.grown.wait(POLL_S)
                job.grown.clear()
                is_over = job.is_over
                if not is_over and time.perf_counter() - job.came > self.timeout_s:
                    raise Refused(503, f"got no answer within {self.timeout_s:g} s; ask again "
                                  "later")
                yield job
        finally:
            job.is_left = True
            with self.changed, suppress(ValueError):  # it has a row already
                self.waiting.remove(job)
        if job.error is not None:
            raise job.error
        if episode.status == "search_error":
            raise Refused(502, "the retriever failed; the server's log says why")

    def begin(self, question: Question) -> Episode:
        prompt, limit = self.settings.prompt, self.settings.max_context_tokens
        episode = begin_episode(self.policy.tokenizer, self.prepare(question), prompt)
        if (length := len(episode.ids)) >= limit:
            raise ValueError(f"question: got a prompt of {length} tokens, expected less than "
                             f"--max-context-tokens {limit}")
        return episode

    def close(self) -> None:
        """Give up all questions, and end the thread."""
        with self.changed:
            self.is_closed = True
            self.changed.notify()
        self.thread.join(5.0)

    # ---- what the thread does ----

    def _work(self) -> None:
        policy, engine = self.policy, self.engine
        with merged(policy.decoder, policy.dtype, engine.steps.copies):
            while not self.is_closed:
                with self.changed:
                    self.changed.wait_for(lambda: self.waiting or self.is_closed)
                engine.search, engine.cache.reach = None, 0  # what a failure or an earlier run left
                problem: Exception = Refused(503, "the server stops")
                try:
                    engine.run(self, tqdm(disable=True))
                except Exception as error:  # those who wait must hear of it
                    problem = error
                self.end(problem)

    def end(self, problem: Exception) -> None:
        """Tell the jobs in flight, and those that wait for a server that stops, what went wrong."""
        with self.changed:
            jobs = [*self.playing.values()]
            if self.is_closed:
                jobs += self.waiting
                self.waiting.clear()
        self.playing.clear()
        for job in jobs:
            job.error, job.is_over = problem, True
            job.grown.set()

    def __iter__(self) -> "SharedEngine":
        return self

    def __next__(self) -> Row:
        """A row for the next question; the engine asks at every step, also after a StopIteration.
        """
        for job in [*self.playing.values()]:
            if job.episode.status and not self.is_closed:
                self.note_end(job)
        with self.changed:
            if not self.waiting or self.is_closed:
                raise StopIteration
            job = self.waiting.popleft()
        job.began = time.perf_counter()
        self.playing[id(job.episode)] = job
        row = Row(job.episode, 0, job.episode.ids)  # its noise is that of a first one
        job.episode.segments.append(Segment("agent", []))
        return row

    def note_end(self, job: Job) -> None:
        job.ended, job.is_over = time.perf_counter(), True
        del self.playing[id(job.episode)]
        self.counts[job.episode.status] += 1
        self.num_tokens += job.episode.num_agent_tokens
        self.first_token_s += (job.first_token or job.ended) - job.came
        job.grown.set()

    def see(self, episode: Episode) -> None:
        """Called after each token that does not end a turn."""
        job = self.playing[id(episode)]
        job.first_token = job.first_token or time.perf_counter()
        if job.is_left or self.is_closed:
            episode.status = "left"  # the engine gives its row to another one
        if job.is_streamed:
            job.grown.set()


# ---- what goes out ----


class Pieces:
    """The text of an episode after its prompt, piece by piece, while it grows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.place, self.sent = tokenizer, 1, ""

    def new(self, episode: Episode, *, is_over: bool) -> Iterator[dict[str, str]]:
        """{author, text} of what is new; a character waits for all of its bytes."""
        segments = [*episode.segments]
        for place in range(self.place, len(segments)):
            text = self.tokenizer.decode([*segments[place].ids])
            is_last = place + 1 == len(segments)
            if is_last and not is_over:
                text = text.rstrip("\ufffd")
            if text.startswith(self.sent) and len(text) > len(self.sent):
                yield {"author": segments[place].author, "text": text[len(self.sent) :]}
                self.sent = text
            if not is_last:
                self.place, self.sent = place + 1, ""


def answer(engine: SharedEngine, question: Question, reply: Callable[[Job], Any]) -> Iterator[Any]:
    """For a plain answer: None until the episode has ended, then what `reply` makes of it."""
    with closing(engine.play(question)) as jobs:
        for job in jobs:
            if not job.is_over:
                yield None
    yield reply(job)


def stream(engine: SharedEngine, question: Question,
           written: Callable[[Any], list[Any]]) -> Iterator[Any]:
    """For events: what `written` makes of {author, text} of each piece, and of the job at last."""
    pieces = Pieces(engine.policy.tokenizer)
    with closing(engine.play(question, is_streamed=True)) as jobs:
        for job in jobs:
            for piece in pieces.new(job.episode, is_over=job.is_over):
                yield from written(piece)
            yield None
    yield from written(job)
