"""A retriever behind HTTP, as Search-R1's training asks one.

    POST /retrieve {"queries": [text], "topk": 3, "return_scores": true}
        -> {"result": [[{"document": {"id": ..., "contents": '"Title"\\ntext'}, "score": 0.8}]]}
    GET /health, GET /metrics (Prometheus)

Without return_scores a result is a list of bare documents; the original server crashes there.
Requests that wait together are searched together. docs/retrieval.md says why the standard library
carries this.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from data import Passage
from formats.corpora import join_contents
from infra.http import Refused, Server, run_until_stopped

MAX_QUERY, MAX_TOP_K = 20_000, 1_000  # characters of a query, passages of a query
MAX_BATCH = 512  # queries of one search
MAX_WAITING = 65_536  # queries that wait; more are sent away
Found = list[list[Passage]]


class Batcher:
    """Searches for many threads by one: what waits while a search runs is the next search."""

    def __init__(self, search: Callable[[list[str], int], Found]) -> None:
        self.search = search
        self.waiting: deque[tuple[list[str], int, Future]] = deque()
        self.changed = threading.Condition()
        self.num_waiting = self.num_queries = self.num_searches = 0
        self.seconds = 0.0  # of searches
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, queries: list[str], top_k: int, timeout_s: float) -> Found:
        future: Future = Future()
        with self.changed:
            if self.num_waiting + len(queries) > MAX_WAITING:
                raise Refused(503, f"got {self.num_waiting} queries that wait, expected at most "
                              f"{MAX_WAITING}; ask again later")
            self.waiting.append((queries, top_k, future))
            self.num_waiting += len(queries)
            self.changed.notify()
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise Refused(503, f"got no result within {timeout_s:g} s; ask again later, or for "
                          "fewer queries") from error

    def _take(self) -> list[tuple[list[str], int, Future]]:
        """The request that has waited longest, and others of its topk that fit beside it."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            top_k, room, taken, left = self.waiting[0][1], MAX_BATCH, [], deque()
            for job in self.waiting:
                fits = job[1] == top_k and (not taken or len(job[0]) <= room)
                (taken if fits else left).append(job)
                room -= len(job[0]) * fits
            self.waiting = left
            self.num_waiting -= sum(len(queries) for queries, _, _ in taken)
        return [job for job in taken if job[2].set_running_or_notify_cancel()]

    def _work(self) -> None:
        while True:
            if not (jobs := self._take()):
                continue
            queries = [query for texts, _, _ in jobs for query in texts]
            started = time.perf_counter()
            try:
                found = self.search(queries, jobs[0][1])
            except BaseException as error:  # those who wait must hear of it
                for _, _, future in jobs:
                    future.set_exception(error)
                continue
            self.seconds += time.perf_counter() - started
            self.num_searches, self.num_queries = (
                self.num_searches + 1, self.num_queries + len(queries))
            for texts, _, future in jobs:
                future.set_result(found[: len(texts)])
                found = found[len(texts) :]


def read_request(body: Any, top_k: int, max_queries: int) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores) of a body; ValueError says what is wrong with it."""
    if not isinstance(body, dict) or not isinstance(body.get("queries"), list):
        raise ValueError(f"body: got {str(body)[:60]}, expected an object with queries [text]")
    queries, scores = body["queries"], body.get("return_scores", False)
    top_k = body.get("topk") if body.get("topk") is not None else top_k
    if len(queries) > max_queries:
        raise ValueError(f"queries: got {len(queries)}, expected at most {max_queries}")
    for query in queries:
        if not isinstance(query, str) or len(query) > MAX_QUERY:
            raise ValueError(f"queries: got {str(query)[:60]!r}, expected texts of at most "
                             f"{MAX_QUERY} characters")
    if type(top_k) is not int or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"topk: got {top_k!r}, expected a number from 1 to {MAX_TOP_K}")
    if scores is not None and not isinstance(scores, bool):
        raise ValueError(f"return_scores: got {scores!r}, expected true or false")
    return queries, top_k, bool(scores)


def written(passages: Sequence[Passage], with_scores: bool) -> list[dict[str, Any]]:
    documents = [{"id": p.id, "contents": join_contents(p.title, p.text)} for p in passages]
    if not with_scores:
        return documents
    return [{"document": document, "score": passage.score}
            for document, passage in zip(documents, passages, strict=True)]


def open_server(retriever: Any, host: str, port: int, *, top_k: int = 3, max_queries: int = 1024,
                timeout_s: float = 60.0, **limits: Any) -> Server:
    """A server that listens; limits: of infra.http.Server."""
    batcher, started = Batcher(retriever.search), time.time()

    def retrieve(body: Any) -> dict[str, Any]:
        queries, num, with_scores = read_request(body, top_k, max_queries)
        found = batcher.ask(queries, num, timeout_s) if queries else []
        return {"result": [written(passages, with_scores) for passages in found]}

    def health(_: None) -> dict[str, Any]:
        return {"status": "ok", "passages": len(retriever.corpus), "kind": retriever.index.kind,
                "topk": top_k, "seconds": round(time.time() - started)}

    def metrics(_: None) -> str:
        lines = [f'retriever_answers_total{{status="{status}"}} {count}'
                 for status, count in sorted(server.counts.items())]
        lines += [f"retriever_queries_total {batcher.num_queries}",
                  f"retriever_searches_total {batcher.num_searches}",
                  f"retriever_search_seconds_total {batcher.seconds:.3f}",
                  f"retriever_waiting_queries {batcher.num_waiting}",
                  f"retriever_connections {len(server.handlers)}"]
        return "\n".join(lines) + "\n"

    routes = {("POST", "/retrieve"): retrieve, ("GET", "/health"): health,
              ("GET", "/metrics"): metrics}
    limits = {"max_body": 2**20 + max_queries * 2048} | limits
    server = Server(routes, host, port, **limits)
    return server


def run_server(retriever: Any, host: str, port: int, **options: Any) -> None:
    server = open_server(retriever, host, port, **options)
    print(f"http://{host}:{server.server_port}/retrieve answers; Ctrl-C ends it", flush=True)
    run_until_stopped(server)
