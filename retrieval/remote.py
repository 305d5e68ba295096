"""A retriever that asks others: `--index http://HOST:8000`, several with commas between.

Each address speaks Search-R1's POST /retrieve (retrieval/serve.py says how) and has the same
passages. They are asked in turn; a process of torchrun begins with its own. A search goes on
trying, with pauses that grow, for most of --search-timeout-s. Once that was in vain, the next
searches try each address once, so that a step whose retriever stays away ends soon.
"""

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, NoReturn

from data import Passage
from formats.corpora import split_contents
from infra.files import replace_surrogates

MAX_QUERIES = 512  # of a request; a server may take no more than some hundreds
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 10.0
SHARE = 0.9  # of the time that a search may take: rollout.py asks again after that
AWAY_S = 5.0  # for a search while the retriever is known to be away


class RemoteRetriever:
    """addresses: of replicas, with commas between; timeout_s: for a search, retries included."""

    def __init__(self, addresses: str, *, timeout_s: float) -> None:
        self.addresses = [a.strip().rstrip("/") for a in addresses.split(",") if a.strip()]
        if wrong := [a for a in self.addresses if not a.startswith(("http://", "https://"))]:
            raise ValueError(f"--index: got {wrong}, expected addresses such as http://HOST:8000")
        self.addresses = [a if a.endswith("/retrieve") else a + "/retrieve" for a in self.addresses]
        self.turn = int(os.environ.get("RANK", "0"))
        self.timeout_s, self.is_away = SHARE * timeout_s, False
        self.search(["first"], 1)  # say now, not in the first step, that nobody answers

    @property
    def corpus(self) -> NoReturn:
        raise ValueError(f"--index {','.join(self.addresses)}: got a retriever behind http, "
                         "expected passages at hand; give --corpus, --encoder and another --index")

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        """The best passages of each query; ConnectionError if no address answers in time.

        Equal queries are asked once. ValueError: a server refuses the request and says why.
        """
        queries = list(map(replace_surrogates, queries))
        unique, found = list(dict.fromkeys(queries)), {}
        for start in range(0, len(unique), MAX_QUERIES):
            part = unique[start : start + MAX_QUERIES]
            found |= zip(part, self._keep_asking(part, top_k), strict=True)
        return [[*found[query]] for query in queries]

    def _keep_asking(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        was_away, num = self.is_away, len(self.addresses)
        timeout_s = min(AWAY_S, self.timeout_s) if was_away else self.timeout_s
        end, attempt, problem = time.monotonic() + timeout_s, 0, ""
        while (left := end - time.monotonic()) > 0 and not (was_away and attempt >= num):
            address = self.addresses[(self.turn + attempt) % num]
            try:  # one that never answers leaves time for the others
                found = ask(address, queries, top_k, max(0.1, left / max(1, num - attempt)))
                self.turn, self.is_away = self.turn + attempt, False
                return found
            except (OSError, HTTPException, KeyError, TypeError, AttributeError) as error:
                problem = f"{address}: {type(error).__name__}: {error}"
            attempt += 1
            if attempt % num == 0:  # all of them were asked
                pause = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt // num - 1))
                time.sleep(max(0.0, min(pause, end - time.monotonic())))
        self.is_away = True
        raise ConnectionError(f"--index: got {problem} after {attempt} tries, expected an answer "
                              "of a retriever; see its log, start it again")


def ask(address: str, queries: list[str], top_k: int, timeout_s: float) -> list[list[Passage]]:
    """One request. ValueError: it was refused (4xx). Other exceptions: it may be sent again."""
    body = {"queries": queries, "topk": top_k, "return_scores": True}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            result = json.loads(reply.read())["result"]
    except urllib.error.HTTPError as error:
        text = error.read(1000).decode(errors="replace")
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise ValueError(f"{address}: got {error.code} {text}, expected passages") from error
        raise ConnectionError(f"{error.code} {text}") from error
    except ValueError as error:  # no JSON: it was cut, or something else answers there
        raise ConnectionError(f"got no JSON ({error})") from error
    if len(result) != len(queries):
        raise ConnectionError(f"got {len(result)} results for {len(queries)} queries")
    return [[passage_of(row) for row in rows] for rows in result]


def passage_of(row: dict[str, Any]) -> Passage:
    document = row["document"]
    title, text = split_contents(document["contents"])
    return Passage(str(document["id"]), title, text, float(row["score"]))
