"""Protocols: what an agent may write, and what the environment answers. Text in, text out.

search-r1   (the paper's Table 1) the agent writes <think>, then <search> query </search> or <answer> text </answer>;
            a search is answered by an <information> block of numbered documents
qagent      (arXiv:2510.08383) <plan>, then <search> with a <query> for each of several queries, or <answer>; what comes
            back is a block of numbered passages, and the agent begins its next turn with a <reflection>

Departures from the official code of Search-R1 (vendored by omron-sinicx/dgpo), with reasons
 1. A too long observation is cut inside the block, so that </information> survives.
 2. The notice after an invalid action has no tags in it, so no parser or reward can take it for an action.
Departures from the official code of QAgent, with reasons
 3. Its notice has tags in it: after one of them every episode fails the format, and "and" is taken for an answer.
 4. Passages of a turn come in the order of the queries, then of their ranks, each once; there the order of a turn's
    queries is a matter of which thread ends first.
 5. Numbers run through a block; there they start at 1 for each query, so that with one passage a query all are "#1".
 6. The bound of three queries is kept (--max-queries 0: it is not); there it is in the prompt alone.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model import Tokenizer
from retriever import Passage

ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
QUERY = re.compile(r"<query>(.*?)</query>", re.DOTALL)


class Action(NamedTuple):
    kind: str  # "search" | "answer" | "invalid"
    content: str
    queries: tuple[str, ...] = ()  # of a search


class Protocol(NamedTuple):
    name: str
    queries: Callable[[str], tuple[str, ...]]  # of what stands between the search tags
    observation: Callable[[Sequence[Passage]], str]
    observation_end: str  # its last part, which survives when it is cut
    notice: str  # what an invalid action is answered with


def parse_action(text: str, protocol: "Protocol | None" = None) -> Action:
    """The first complete action of one agent turn; an empty one is invalid."""
    match = ACTION.search(text)
    if match is None or not match[2].strip():
        return Action("invalid", "")
    content = match[2].strip()
    if match[1] == "answer":
        return Action("answer", content)
    queries = (protocol or SEARCH_R1).queries(content)
    return Action("search", content, queries) if queries else Action("invalid", "")


def query_list(content: str) -> tuple[str, ...]:
    """What stands in <query> tags; without any, a query a line (official code)."""
    found = QUERY.findall(content) or content.split("\n")
    return tuple(query.strip() for query in found if query.strip())


def document_block(passages: Sequence[Passage]) -> str:
    documents = "".join(f'Doc {i}(Title: "{p.title}") {p.text}\n' for i, p in enumerate(passages, 1))
    return f"\n\n<information>{documents.strip()}{SEARCH_R1_END}"


def passage_block(passages: Sequence[Passage]) -> str:
    documents = "".join(f"Passage #{i} {p.title}\nPassage #{i} {p.text}\n\n" for i, p in enumerate(passages, 1))
    return f"\n<information>\n{documents}{QAGENT_END}"


SEARCH_R1_END, QAGENT_END = "</information>\n\n", "</information>\n"
SEARCH_R1 = Protocol(
    "search-r1", lambda content: (content,), document_block, SEARCH_R1_END,
    "\nNo action was found in this turn. Put a query between the search tags, "
    "or the final answer between the answer tags.\n",
)  # fmt: skip
QAGENT = Protocol(
    "qagent", query_list, passage_block, QAGENT_END,
    "\nNo action was found in this turn. Plan, then put each query between query tags, all of them between the search "
    "tags; or put the final answer between the answer tags.\n",
)  # fmt: skip
PROTOCOLS = {protocol.name: protocol for protocol in (SEARCH_R1, QAGENT)}


def merged(results: Sequence[Sequence[Passage]]) -> list[Passage]:
    """The passages of several queries, each once, in the order of the queries and of their ranks."""
    return list({(passage.title, passage.text): passage for passages in results for passage in passages}.values())


def observation_ids(
    tokenizer: Tokenizer, passages: Sequence[Passage], max_tokens: int, protocol: Protocol = SEARCH_R1
) -> list[int]:
    """Tokens of the <information> block; what is over max_tokens is cut before the closing tag."""
    text = protocol.observation(passages)
    ids = tokenizer.encode(text)
    if len(ids) <= max_tokens:
        return ids
    end = tokenizer.encode(protocol.observation_end)
    body = tokenizer.encode(text.removesuffix(protocol.observation_end))
    return body[: max(0, max_tokens - len(end))] + end
