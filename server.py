"""A server for an agent: questions come in over HTTP, answers and what they rest on go out.

    python server.py --model runs/dgpo                  prompt, passages and limits as its run had
    python server.py --model DIR --index DIR --port 8001

    POST /ask {"question": text}      the object of `ask --json`, and timings
         {..., "stream": true}        server-sent events: {author, text} as it is written, the
                                      object at last
    POST /v1/chat/completions         for clients that know nothing else: the last message is asked,
                                      content is the answer, reasoning_content the episode
    GET  /, /health, /metrics, /v1/models    a page to try it; how it goes (Prometheus)

All questions share one engine: one that comes while others are answered gets a row beside them. Its
answer is the one that `ask` gives to it alone. docs/serving.md says more.
"""

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ask import RECORDED, as_record, watched
from data import Question
from episode import Episode, Protocol, Segment, begin_episode, episode_text
from eval import DEFAULT_CONFIG, AgentSettings, load_agent
from infra import cli
from infra.config import setting
from infra.files import replace_surrogates
from infra.http import Events, Html, Refused, Routes, Server, run_until_stopped
from infra.programs import check_paths
from infra.record import model_name, recorded_settings
from kernels import merged
from model import open_steps
from rollout import Engine, Policy, RolloutSettings, Row, SearchEngine, load_protocol
from tokenizer import Tokenizer

PAGE = Path(__file__).parent / "infra" / "ask.html"
MAX_BODY, MAX_QUESTION = 2**20, 4_000  # bytes of a request, characters of its question
MAX_WAITING, TIMEOUT_S = 256, 600.0  # questions without a row; seconds for an answer
POLL_S = 0.2  # how often a thread looks whether its client is there
# Keys of a chat's request that are read, or that change nothing here; others are named in `notes`.
CHAT_KEYS = {"model", "messages", "stream", "stream_options", "user", "n"}


@dataclass
class ServerSettings(AgentSettings):
    rollout_rows: int = setting(16, "questions answered at once; others wait", at_least=1)
    max_waiting: int = setting(MAX_WAITING, "questions that wait; more are sent away (503)")
    answer_timeout_s: float = setting(TIMEOUT_S, "an answer that takes longer is given up (503)",
                                      above=0)
    host: str = setting("127.0.0.1", "address; 0.0.0.0 opens the door to other machines, without a "
                        "password")
    port: int = setting(8001, "port", at_least=1, at_most=65535)


# ---- one engine for many threads ----


@dataclass
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
        self.begin(read_question("?"))  # a prompt that cannot work is refused now
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
            while self.waiting and not self.is_closed:
                job = self.waiting.popleft()
                if not job.is_left:
                    job.began = time.perf_counter()
                    self.playing[id(job.episode)] = job
                    row = Row(job.episode, 0, job.episode.ids)  # its noise is that of a first one
                    job.episode.segments.append(Segment("agent", []))
                    return row
        raise StopIteration

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


def reply_of(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `ask --json` prints for an episode, and where its time went."""
    episode, num = job.episode, job.episode.num_agent_tokens
    first, played = (job.first_token or job.ended) - job.came, job.ended - job.began
    timings = {"waited_s": job.began - job.came, "first_token_s": first, "played_s": played,
               "tokens": num, "tokens_per_second": num / max(played, 1e-9)}
    return as_record(episode) | {
        "seconds": round(job.ended - job.came, 3), "trace": episode_text(episode, tokenizer),
        "timings": {name: round(value, 4) for name, value in timings.items()}}


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


# ---- what comes in ----


def read_question(text: Any) -> Question:
    """The question of a request; ValueError says what is wrong with it."""
    if not isinstance(text, str) or not 0 < len(text.strip()) <= MAX_QUESTION:
        raise ValueError(f"question: got {str(text)[:60]!r}, expected a text of at most "
                         f"{MAX_QUESTION} characters")
    return Question("asked", replace_surrogates(text), (), "asked")


def read_ask(body: Any) -> tuple[Question, bool]:
    """(question, whether its answer is streamed) of a body of POST /ask."""
    if not isinstance(body, dict):
        raise ValueError(f"body: got {str(body)[:60]}, expected an object with question")
    if unknown := [*map(str, body.keys() - {"question", "stream"})]:
        raise ValueError(f"body: got {', '.join(sorted(unknown))[:100]}, expected question and "
                         "stream alone")
    return read_question(body.get("question")), read_flag(body, "stream")


def read_flag(body: dict[str, Any], key: str) -> bool:
    if not isinstance(value := body.get(key) or False, bool):
        raise ValueError(f"{key}: got {str(value)[:60]!r}, expected true or false")
    return value


def read_chat(body: Any) -> tuple[Question, bool, list[str]]:
    """(question, whether its answer is streamed, notes on what is not read) of a chat's body."""
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise ValueError(f"messages: got {str(messages)[:60]}, expected [{{role, content}}]")
    if (role := messages[-1].get("role")) != "user":
        raise ValueError(f"messages: got a last one of role {str(role)[:60]!r}, expected user")
    if body.get("n") not in (None, 1):
        raise ValueError(f"n: got {str(body['n'])[:60]}, expected 1")
    content = messages[-1].get("content")
    if isinstance(content, list):  # in parts
        kinds = [part.get("type") if isinstance(part, dict) else part for part in content]
        if any(kind != "text" for kind in kinds):
            raise ValueError(f"content: got parts {str(kinds)[:60]}, expected text alone")
        content = "".join(str(part.get("text", "")) for part in content)
    notes = [f"{key}: not read; the server's settings hold"
             for key in sorted(map(str, body.keys() - CHAT_KEYS))]
    if len(messages) > 1:
        notes.append(f"messages: each question is an episode of its own; the {len(messages) - 1} "
                     "before the last one are not read")
    return read_question(content), read_flag(body, "stream"), notes


# ---- the routes ----


class Door:
    """Routes over an engine; name: the model's, for clients that ask for it."""

    def __init__(self, engine: SharedEngine, name: str) -> None:
        self.engine, self.name, self.started = engine, name, time.time()
        self.tokenizer, self.num_chats = engine.policy.tokenizer, 0
        self.server: Server | None = None

    def ask(self, body: Any) -> Any:
        question, is_streamed = read_ask(body)
        reply = partial(reply_of, tokenizer=self.tokenizer)
        if not is_streamed:
            return answer(self.engine, question, reply)
        return Events(stream(self.engine, question, lambda value: [
            reply(value) if isinstance(value, Job) else value]))

    def chat(self, body: Any) -> Any:
        question, is_streamed, notes = read_chat(body)
        self.num_chats += 1
        about = {"id": f"chatcmpl-{self.num_chats}", "created": round(time.time()),
                 "model": self.name}
        if is_streamed:
            chunks = partial(self.chunks, about=about, notes=notes)
            return Events(stream(self.engine, question, chunks))
        return answer(self.engine, question, lambda job: self.completion(job, about, notes))

    def completion(self, job: Job, about: dict[str, Any], notes: list[str]) -> dict[str, Any]:
        episode, num = job.episode, job.episode.num_agent_tokens
        record = reply_of(job, self.tokenizer)
        message = {"role": "assistant", "content": episode.answer or "",
                   "reasoning_content": record["trace"]}
        shown = len(episode.ids) - num
        return about | {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason(episode)}],
            "usage": {"prompt_tokens": shown, "completion_tokens": num,
                      "total_tokens": shown + num},
            "passages": record["passages"], "notes": notes}

    def chunks(self, value: Any, about: dict[str, Any], notes: list[str]) -> list[Any]:
        """A chat's events for a value of `stream`."""

        def chunk(delta: dict[str, str], reason: str | None = None, **more: Any) -> dict[str, Any]:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return about | {"object": "chat.completion.chunk", "choices": [choice]} | more

        if not isinstance(value, Job):
            return [chunk({"role": "assistant", "reasoning_content": value["text"]})]
        record = as_record(value.episode)
        end = chunk({}, finish_reason(value.episode), passages=record["passages"], notes=notes)
        return [chunk({"role": "assistant", "content": record["answer"] or ""}), end, "[DONE]"]

    def models(self, _: None) -> dict[str, Any]:
        model = {"id": self.name, "object": "model", "owned_by": "local",
                 "created": round(self.started)}
        return {"object": "list", "data": [model]}

    def health(self, _: None) -> dict[str, Any]:
        engine = self.engine
        if not engine.thread.is_alive():
            raise Refused(503, "the engine has ended; start the server again")
        return {"status": "ok", "model": self.name, "waiting": len(engine.waiting),
                "playing": len(engine.playing), "seconds": round(time.time() - self.started)}

    def metrics(self, _: None) -> str:
        engine = self.engine
        lines = [f'agent_answers_total{{status="{status}"}} {count}'
                 for status, count in sorted(self.server.counts.items())]
        lines += [f'agent_episodes_total{{status="{status}"}} {count}'
                  for status, count in sorted(engine.counts.items())]
        lines += [f"agent_tokens_total {engine.num_tokens}",
                  f"agent_steps_total {engine.engine.num_steps}",
                  f"agent_first_token_seconds_total {engine.first_token_s:.3f}",
                  f"agent_waiting {len(engine.waiting)}", f"agent_playing {len(engine.playing)}",
                  f"agent_connections {len(self.server.handlers)}"]
        return "\n".join(lines) + "\n"


def finish_reason(episode: Episode) -> str:
    return "stop" if episode.status == "answered" else "length"


def open_server(engine: SharedEngine, name: str, host: str, port: int, *,
                routes: Routes | None = None, **limits: Any) -> Server:
    """A server that listens; routes: beside those of the header; limits: of infra.http.Server."""
    door, page = Door(engine, name), Html(PAGE.read_text(encoding="utf-8"))
    known = {("POST", "/ask"): door.ask, ("POST", "/v1/chat/completions"): door.chat,
             ("GET", "/v1/models"): door.models, ("GET", "/health"): door.health,
             ("GET", "/metrics"): door.metrics, ("GET", "/"): lambda _: page}
    door.server = Server(known | (routes or {}), host, port, **{"max_body": MAX_BODY} | limits)
    return door.server


def run_server(engine: SharedEngine, server: Server, path: str) -> None:
    """Answer until SIGINT or SIGTERM; answers under way have ten seconds more."""
    host, port = server.server_address[:2]
    print(f"http://{host}:{port}{path} answers; Ctrl-C ends it", flush=True)
    run_until_stopped(server)
    engine.close()
    server.stop(2.0)  # for those who hear now that it stops


def main(argv: list[str]) -> None:
    own = {"temperature", "seed", "rollout_rows"}
    settings = cli.load(
        ServerSettings, argv, prog="server.py", description="An agent behind HTTP.",
        default_config=DEFAULT_CONFIG, recorded=partial(recorded_settings, sorted(RECORDED)),
        shared={field.name for field in fields(ServerSettings)} - own)
    check_paths(settings)
    policy, retriever = load_agent(settings)
    engine = SharedEngine(policy, retriever, settings, seed=settings.seed,
                          max_waiting=settings.max_waiting, timeout_s=settings.answer_timeout_s)
    server = open_server(engine, model_name(settings.model), settings.host, settings.port)
    run_server(engine, server, "/ask")


if __name__ == "__main__":
    with cli.reporting("server.py", RuntimeError):
        main(sys.argv[1:])
