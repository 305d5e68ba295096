"""A small HTTP server: JSON in, JSON, text or events out; sizes, times and connections are bounded.

    server = Server({("POST", "/search"): answer}, "127.0.0.1", 8000)
    run_until_stopped(server)

An answer is a plain function of the body. What it raises is an error with its reason: ValueError
400, Refused as it says, anything else 500. A thread serves a connection, so a slow client holds up
nobody; after read_s it gets a 408.

An answer that takes long is a generator: it yields None now and then, and its value at the end. In
Events every value but None is sent at once, as a server-sent event. The generator is closed where
it stands if the client has left.
"""

import json
import math
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import GeneratorType
from typing import Any, NamedTuple

Routes = dict[tuple[str, str], Callable[[Any], Any]]  # (method, path) -> answer(body)
JSON, TEXT = "application/json; charset=utf-8", "text/plain; charset=utf-8"
HTML, EVENTS = "text/html; charset=utf-8", "text/event-stream; charset=utf-8"
POLL_S = 0.2  # how often slow clients are looked for
LEFT = 499  # how an answer is counted whose client has left; it is never sent


class Html(str):
    """An answer that is a page."""


class Events(NamedTuple):
    """An answer that is sent as it comes; a str is sent as it is, other values as JSON."""

    values: GeneratorType


class Refused(Exception):
    """An answer with a status of its own."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Left(OSError):
    """The client has hung up."""


class Server(ThreadingHTTPServer):
    """Listens from the start; serve_forever() answers.

    max_body: bytes of a request; read_s: seconds for a client to send or take one.
    """

    daemon_threads, block_on_close = True, False
    request_queue_size = 1024  # connections that wait to be accepted; 5 refuse a burst

    def __init__(self, routes: Routes, host: str, port: int, *, max_body: int = 2**16,
                 max_connections: int = 4096, read_s: float = 30.0) -> None:
        self.routes, self.max_body, self.read_s = routes, max_body, read_s
        self.max_connections = max_connections
        self.counts: Counter[int] = Counter()  # answers by status
        self.handlers: set[Handler] = set()  # one for each open connection
        self.lock = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise OSError(f"{host}:{port}: got {error}, expected a free port of this machine; "
                          "give another --port") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.handlers) < self.max_connections:
            return super().process_request(request, client_address)
        self.counts[503] += 1
        with suppress(OSError):
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n"
                            b"Retry-After: 1\r\nConnection: close\r\n\r\n")
        self.shutdown_request(request)

    def service_actions(self) -> None:
        """End the reading of those who have had their time; the handler then answers 408."""
        now = time.monotonic()
        with self.lock:
            late = [handler for handler in self.handlers if handler.deadline < now]
        for handler in late:
            handler.is_late = True
            with suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is no fault of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self, grace_s: float) -> None:
        """Accept nothing more, let answers under way end, close."""
        self.shutdown()
        self.server_close()
        end = time.monotonic() + grace_s
        while any(handler.is_answering for handler in [*self.handlers]) and time.monotonic() < end:
            time.sleep(0.02)


class Handler(BaseHTTPRequestHandler):
    """A connection, which may bring several requests."""

    protocol_version, wbufsize = "HTTP/1.1", -1  # an answer leaves in one piece
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        self.timeout = 2 * self.server.read_s  # of a single wait; the deadline comes first
        self.is_late = self.is_answering = False
        self.deadline = time.monotonic() + self.server.read_s
        super().setup()
        with self.server.lock:
            self.server.handlers.add(self)

    def finish(self) -> None:
        with self.server.lock:
            self.server.handlers.discard(self)
        super().finish()

    def handle_one_request(self) -> None:
        self.deadline = time.monotonic() + self.server.read_s
        super().handle_one_request()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.is_answering = True
        try:
            status, value = 200, self.route()
            if isinstance(value, Events):
                return self.send_events(self.watch(value.values))
            if isinstance(value, GeneratorType):
                *_, value = self.watch(value)
        except Left:
            self.server.counts[LEFT] += 1
            raise
        except Exception as error:  # the server lives on
            status, value = self.explain(error)
        self.reply(status, value)
        self.is_answering = False

    def explain(self, error: Exception) -> tuple[int, dict[str, str]]:
        """The status of an error, and its reason."""
        if isinstance(error, Refused | ValueError):
            return getattr(error, "status", 400), {"error": str(error)}
        print(f"{self.path}: {type(error).__name__}: {error}", file=sys.stderr)
        return 500, {"error": str(error) or type(error).__name__}

    def watch(self, values: GeneratorType) -> Iterator[Any]:
        """Those that are not None; Left once the client is away."""
        with closing(values):
            for value in values:
                if value is not None:
                    yield value
                elif self.has_left():
                    raise Left("the client has hung up")

    def has_left(self) -> bool:
        """Whether the client has closed its end; it may have sent its next request instead."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def send_events(self, values: Iterator[Any]) -> None:
        """Send values as they come. Their end is that of the connection."""
        with closing(values):
            first = next(values)  # before the head, so that a refusal has its status
            self.server.counts[200] += 1
            self.close_connection = True
            self.send_head(200, EVENTS, {"Cache-Control": "no-cache", "Connection": "close"})
            self.send_event(first)
            try:
                for value in values:
                    self.send_event(value)
            except Left:
                raise
            except Exception as error:
                self.send_event(self.explain(error)[1])
        self.is_answering = False

    def send_event(self, value: Any) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        try:
            self.wfile.write(f"data: {text}\n\n".encode())
            self.wfile.flush()
        except OSError as error:
            raise Left(str(error)) from error

    def send_head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def route(self) -> Any:
        path = self.path.partition("?")[0]
        if (self.command, path) not in self.server.routes:
            self.close_connection = True  # its body was not read
            paths = [f"{method} {known}" for method, known in self.server.routes]
            is_known = any(path == known for _, known in self.server.routes)
            raise Refused(405 if is_known else 404, f"{self.command} {path}: got an unknown "
                          f"{'method' if is_known else 'path'}, expected {', '.join(paths)}")
        body = self.read_body() if self.command == "POST" else None
        self.deadline = math.inf
        return self.server.routes[self.command, path](body)

    def read_body(self) -> Any:
        """The value that the body holds in JSON."""
        length = self.headers.get("Content-Length", "")
        is_number = length.isascii() and length.isdigit() and len(length) < 16
        if not is_number or int(length) > self.server.max_body:
            self.close_connection = True
            raise Refused(413 if is_number else 411, f"Content-Length: got {length!r}, expected "
                          f"at most {self.server.max_body}")
        body = self.rfile.read(int(length))
        if self.is_late or len(body) < int(length):
            self.close_connection = True
            raise Refused(408, f"body: got {len(body)} of {length} bytes within "
                          f"{self.server.read_s:g} s, expected all of them")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"body: got no JSON ({error})") from error

    def reply(self, status: int, value: Any) -> None:
        """Send a value as JSON, a str as it is."""
        self.server.counts[status] += 1
        kind, text = (TEXT, value) if isinstance(value, str) else (JSON, json.dumps(value))
        kind, body = HTML if isinstance(value, Html) else kind, text.encode()
        headers = {"Connection": "close"} if self.close_connection else {}
        self.send_head(status, kind, {"Content-Length": str(len(body))} | headers)
        self.wfile.write(body)
        self.wfile.flush()
        if self.close_connection and not self.is_late:
            self.drain()

    def drain(self) -> None:
        """Take what the client still sends: a closed door would hide the answer from it."""
        self.deadline = time.monotonic() + self.server.read_s
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(2**16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: a line that is no request, headers without end."""
        self.close_connection = True
        code = 408 if self.is_late else code
        self.command, self.request_version = self.command or "", "HTTP/1.1"
        self.reply(code, {"error": message or explain or "bad request"})

    def log_message(self, *_: Any) -> None:
        """Requests are counted, not printed."""


def run_until_stopped(server: Server, grace_s: float = 10.0) -> None:
    """Answer until SIGINT or SIGTERM, then let answers under way end."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set())
              for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    try:
        stopped.wait()
    finally:
        server.stop(grace_s)
        for number, handler in before.items():
            signal.signal(number, handler)
