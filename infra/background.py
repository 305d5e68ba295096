"""Calls in the background: one that never returns holds up neither its caller nor the program.

A pool of threads is no good for this, because the interpreter waits for its threads at the end.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def in_background(call: Callable[[], Any]) -> Future:
    """Start a call in a thread of its own; its result() is what the call returns or raises."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # also of sys.exit: whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def keep_trying(name: str, call: Callable[[], Any], timeout_s: float, *, tries: int = 3) -> Future:
    """Start a call in the background, again while it fails or is late; None if it always does.

    A late call is left to itself. Each failure is printed.
    """

    def work() -> Any:
        for attempt in range(1, tries + 1):
            future = in_background(call)
            try:
                return future.result(min(timeout_s, threading.TIMEOUT_MAX))
            except Exception as error:  # it may be anyone's program
                problem = f"{type(error).__name__}: {error}"
                if not future.done():
                    problem = f"no answer within {timeout_s:g} s"
            print(f"{name} failed ({attempt} of {tries} tries): {problem}", file=sys.stderr)
        return None

    return in_background(work)
