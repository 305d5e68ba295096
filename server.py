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
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from data import Question
from episode import Episode, episode_text
from eval import DEFAULT_CONFIG, AgentSettings, load_agent
from infra import cli
from infra.config import setting
from infra.files import replace_surrogates
from infra.http import Events, Html, Refused, Routes, Server, run_until_stopped
from infra.programs import check_paths
from infra.record import model_name, recorded_settings
from serving.ask import RECORDED, as_record
from serving.engine import MAX_WAITING, TIMEOUT_S, Job, SharedEngine, answer, stream
from tokenizer import Tokenizer

PAGE = Path(__file__).parent / "serving" / "ask.html"
MAX_BODY, MAX_QUESTION = 2**20, 4_000  # bytes of a request, characters of its question
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


# ---- what goes out ----


def reply_of(job: Job, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `ask --json` prints for an episode, and where its time went."""
    episode, num = job.episode, job.episode.num_agent_tokens
    first, played = (job.first_token or job.ended) - job.came, job.ended - job.began
    timings = {"waited_s": job.began - job.came, "first_token_s": first, "played_s": played,
               "tokens": num, "tokens_per_second": num / max(played, 1e-9)}
    return as_record(episode) | {
        "seconds": round(job.ended - job.came, 3), "trace": episode_text(episode, tokenizer),
        "timings": {name: round(value, 4) for name, value in timings.items()}}


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
