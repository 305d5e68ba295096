"""QAgent: a plug-and-play search agent (Jiang et al., 2025, arXiv:2510.08383): rewards, generator, search door.

The agent plans, asks several queries at once, reflects on what came back (protocol.py) and hands the passages to any
generator. It learns by GRPO (train.py --phase qagent) in two stages; equations are the paper's Sec. 3
    stage 1   R = 1[format] EM(answer)                        rewards the whole chain, end to end
    stage 2   R = EM(generator's answer) + 0.5 Hit            rewards what was found, as a frozen generator sees it

Departures from the official code (commit f82eb19 of OpenStellarTeam/QAgent), with reasons; theirs by the option at the
right, where there is one
 1. Everything is read from the recorded episode. There, regular expressions over the whole text also match the notice
    after an invalid action.
 2. Hit looks at retrieved passages alone; there, and in the paper, at the whole trajectory, so that an agent is paid
    for listing guesses in its plan                                                          --hit-in trajectory
 3. EM is strict in both stages; there, stage 2 and the evaluation take a gold answer anywhere within the prediction,
    not even at the borders of words ("no" in "know")                                        --answer-match within
 4. The generator reads passages once each, title and text, in the order in which they were found; there, texts alone
    in the order of a set.
 5. The instruction opens the user's message; there it is the system's. A turn that its length cuts off gets a notice
    and another turn; there it ends the episode.
As published: an episode that never searches has the right format; nothing rewards fewer passages; a hit is a gold
answer anywhere in a passage, not even at the borders of words.

    python qagent.py search "who wrote ..." --model runs/qagent          passages, and how they were found
    python qagent.py answer "who wrote ..." --model runs/qagent --generator DIR     a generator's answer from them
    python qagent.py serve --model runs/qagent --port 8018               the same over HTTP, on this machine alone
    python qagent.py measure --model runs/qagent --generators DIR DIR    exact match of generators with its passages;
                                                                         --passages naive (top 5 once), gold, none

Legend: K passages collected.
"""

import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import config
from config import setting
from data import TEST_SETS, Question, f1, hit, is_correct, normalize_answer, replace_surrogates
from episode import Episode, episode_text
from eval import align, gold_passages, read_sets
from model import Tokenizer, load_decoder, pick_device
from protocol import PROTOCOLS, merged, parse_action
from retriever import Passage, Retriever
from rollout import Policy, RolloutSettings, generate

GENERATOR_PROMPT = (
    "{passages}\n\nUse the passages above to answer the question. Answer in a few words, without an explanation.\n"
    "Question: {question}"
)
PLANNED = re.compile(r"<plan>((?!</?plan>).)*</plan>\s*$", re.DOTALL)
REFLECTED = re.compile(r"\s*<reflection>((?!</?reflection>).)*</reflection>", re.DOTALL)
REMOTE_CALLS = 8  # of a remote generator at once
NAIVE_PASSAGES = 5  # of the one search of naive RAG (the paper's baselines)
MAX_BODY, MAX_QUESTION = 65_536, 4_000  # bytes of a request, characters of its question

Generator = Callable[[Sequence[Question], Sequence[Sequence[Passage]]], list[str]]


@dataclass
class QAgentSettings(RolloutSettings):
    stage: int = setting(1, "qagent: 1: format and answer; 2: what a frozen generator makes of the passages")
    generator: str = setting("", "qagent: checkpoint that answers from passages, or http://.../v1/chat/completions")
    generator_model: str = setting("", "qagent: the model's name, for a generator behind http")
    generator_prompt: str = setting("", "qagent: a file with {passages} and {question}; empty: our own words")
    generator_tokens: int = setting(64, "qagent: tokens of a generator's answer")
    generator_timeout_s: float = setting(60.0, "qagent: a generator behind http that takes longer is asked again")
    generator_tries: int = setting(3, "qagent: times that it is asked")
    answer_match: str = setting("strict", "qagent: a generator's answer equals a gold answer, or has it within",
                                choices=("strict", "within"))
    hit_in: str = setting("passages", "qagent: where a gold answer counts as found (published: trajectory)",
                          choices=("passages", "trajectory"))
    hit_weight: float = setting(0.5, "qagent: what a hit is worth in stage 2")


# ---- what an episode has found ----


def collected(episode: Episode) -> list[Passage]:
    """K: the passages of all turns, each once, in the order in which they were found."""
    return merged(episode.passages)


# ---- rewards ----


def is_well_formed(episode: Episode, tokenizer: Tokenizer) -> bool:
    """r_fmt: each search directly after a closed plan, a reflection directly after each block of passages, an answer,
    and no turn without an action."""
    turns = [tokenizer.decode(s.ids) for s in episode.segments if s.author == "agent"]
    if episode.status != "answered" or len(turns) != episode.num_searches + 1:
        return False
    reflects = all(REFLECTED.match(turn) for turn in turns[1:])
    return reflects and all(PLANNED.search(turn.partition("<search>")[0]) for turn in turns[:-1])


def stage_1(is_formed: bool, correct: float) -> float:
    """1[format] EM (paper, stage 1)."""
    return float(is_formed) * correct


def stage_2(correct: float, found: bool, hit_weight: float = 0.5) -> float:
    """EM of the generator's answer + 0.5 Hit (paper, stage 2)."""
    return correct + hit_weight * found


def within(prediction: str | None, golds: Sequence[str]) -> float:
    """The published "non-strict" match: a normalised gold answer anywhere in the normalised prediction."""
    text = normalize_answer(prediction or "")
    return float(any(gold and gold in text for gold in map(normalize_answer, golds)))


def has_hit(episode: Episode, tokenizer: Tokenizer, hit_in: str) -> bool:
    """Whether a gold answer was found: in the retrieved passages, or (as published) anywhere in the trajectory, the
    agent's own words included."""
    golds = episode.question.golden_answers
    if hit_in == "passages":
        return hit(collected(episode), golds)
    said = " ".join(tokenizer.decode(s.ids) for s in episode.segments if s.author != "prompt")
    return bool(within(said, golds))


def rewards(
    episodes: Sequence[Episode], tokenizer: Tokenizer, generator: Generator | None, settings: QAgentSettings
) -> list[float]:
    """Of a stage's episodes; generator: needed in stage 2."""
    if settings.stage == 1:
        return [stage_1(is_well_formed(e, tokenizer), e.score) for e in episodes]
    answers = generator([e.question for e in episodes], [collected(e) for e in episodes])
    strict = settings.answer_match == "strict"
    return [stage_2(is_correct(answer, e.question) if strict else within(answer, e.question.golden_answers),
                    has_hit(e, tokenizer, settings.hit_in), settings.hit_weight)
            for answer, e in zip(answers, episodes, strict=True)]  # fmt: skip


# ---- the frozen generator ----


def generator_messages(question: Question, passages: Sequence[Passage], prompt: str = "") -> list[dict[str, str]]:
    """What a generator is asked; prompt: a file with {passages} and {question}, empty for ours."""
    template = Path(prompt).read_text(encoding="utf-8") if prompt else GENERATOR_PROMPT
    if "{question}" not in template or "{passages}" not in template:
        raise ValueError(f"--generator-prompt {prompt}: got no {{question}} or no {{passages}}, expected both")
    shown = "\n\n".join(f"{p.title}\n{p.text}" for p in passages) or "(no passages)"
    parts = re.split(r"(\{passages\}|\{question\})", template)  # text that is put in is never searched for them
    values = {"{passages}": shown, "{question}": question.question}
    return [{"role": "user", "content": "".join(values.get(part, part) for part in parts)}]


def local_generator(policy: Policy, settings: QAgentSettings) -> Generator:
    """A checkpoint that answers greedily; passages that do not fit into the context are left out from the end."""
    def fits(question: Question, passages: Sequence[Passage]) -> Question:
        room = settings.max_context_tokens - settings.generator_tokens
        for count in range(len(passages), -1, -1):
            messages = generator_messages(question, passages[:count], settings.generator_prompt)
            if count == 0 or len(policy.tokenizer.chat(messages)) < room:
                return replace(question, prompt=messages, budget=None)

    def ask(questions: Sequence[Question], passages: Sequence[Sequence[Passage]]) -> list[str]:
        rules = replace(settings, prompt="row", max_turns=0, temperature=0.0, max_new_tokens=settings.generator_tokens)
        asked = [fits(q, k) for q, k in zip(questions, passages, strict=True)]
        episodes = generate(policy, None, asked, rules, seed=0)
        written = [e.segments[-1] for e in episodes]  # the prompt, where that alone fills the context
        return [final_answer(policy.tokenizer.decode(s.ids)) if s.author == "agent" else "" for s in written]

    return ask


def final_answer(text: str) -> str:
    """What a generator says at last: after its thinking, if it thinks first; within answer tags, if it writes them.

    Nothing, if it was cut off while it thought.
    """
    if "<think>" in text and "</think>" not in text:
        return ""
    action = parse_action(text := text.rpartition("</think>")[2])
    return action.content if action.kind == "answer" else text.strip()


def remote_generator(settings: QAgentSettings) -> Generator:
    """A server that speaks the chat-completions protocol; asked again after an error, with growing pauses."""
    def ask(question: Question, passages: Sequence[Passage]) -> str:
        body = {"model": settings.generator_model, "temperature": 0, "max_tokens": settings.generator_tokens,
                "messages": generator_messages(question, passages, settings.generator_prompt)}  # fmt: skip
        request = urllib.request.Request(settings.generator, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        for attempt in range(settings.generator_tries):
            try:
                with urllib.request.urlopen(request, timeout=settings.generator_timeout_s) as response:
                    answer = json.load(response)["choices"][0]["message"]["content"]
                    return final_answer("" if answer is None else answer)  # null: cut off while it thought
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                problem = f"{type(error).__name__}: {error}"
            time.sleep(min(10.0, 0.5 * 2**attempt) if attempt + 1 < settings.generator_tries else 0)
        raise ConnectionError(f"--generator {settings.generator}: got {problem} {settings.generator_tries} times, "
                              "expected an answer of a chat-completions server; see its log, then --resume")

    def ask_all(questions: Sequence[Question], passages: Sequence[Sequence[Passage]]) -> list[str]:
        with ThreadPoolExecutor(REMOTE_CALLS) as pool:
            return list(pool.map(ask, questions, passages))

    return ask_all


def load_generator(
    settings: QAgentSettings, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    if not settings.generator:
        raise ValueError("--generator: got none, expected a checkpoint or the address of a chat-completions server")
    if is_remote(settings.generator):
        return remote_generator(settings)
    decoder = load_decoder(settings.generator, dtype=dtype, device=device)
    policy = Policy(decoder, Tokenizer.load(settings.generator))
    policy.decoder.requires_grad_(False)
    return local_generator(policy, settings)


def is_remote(generator: str) -> bool:
    return generator.startswith(("http://", "https://"))


# ---- plug and play ----


class Found(NamedTuple):
    passages: list[Passage]
    queries: list[str]
    trace: str  # the episode as text


def search(question: str, policy: Policy, retriever: Retriever, settings: QAgentSettings, *, seed: int = 0) -> Found:
    """Let the agent work on a question: the passages for a generator, and how they were found."""
    if not question.strip():
        raise ValueError("question: got nothing, expected a text")
    [episode] = generate(policy, retriever, [Question("asked", question, (), "asked")], settings, seed=seed)
    if episode.status == "search_error":
        raise ConnectionError("the retriever failed, see above why")
    return Found(collected(episode), episode.queries, episode_text(episode, policy.tokenizer))


@dataclass
class SearchSettings(QAgentSettings):
    protocol: str = setting("qagent", "what the agent may write", choices=tuple(PROTOCOLS))
    max_turns: int = setting(5, "turns that may search (official code)")
    top_k: int = setting(1, "passages of a query (official code)")
    prompt: str = setting("qagent", "'qagent' (our words), 'short', or a file with {question} (the published text)")
    model: str = setting("runs/qagent", "checkpoint that searches")
    dtype: str = setting("float32", "dtype of agent and generators", choices=("float32", "bfloat16"))
    device: str = setting("auto", "cpu, cuda, mps; auto: cuda where there is one")
    corpus: str = setting("", "passages, JSONL")
    encoder: str = setting("", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    passages: str = setting("agent", "measure: whose passages; naive: 5 of one search for the question; gold: those "
                            "that the row names", choices=("agent", "naive", "none", "gold"))
    generators: tuple[str, ...] = setting((), "measure: several, each as --generator; empty: that one")
    questions: tuple[str, ...] = setting(
        tuple(f"world/questions/{name}.jsonl" for name in TEST_SETS), "measure: question files, JSONL")
    limit: int | None = setting(None, "measure: the first questions of each file alone")
    name: str = setting("", "measure: its name in tables; empty: the last part of model")
    out: str = setting("", "measure: folder to write; empty: runs/eval/<name>")
    seed: int = setting(0, "sampling noise, at a temperature above 0")
    host: str = setting("127.0.0.1", "serve: address; 0.0.0.0 opens the door to other machines, without a password")
    port: int = setting(8018, "serve: port")


SHARED = {field.name for field in fields(SearchSettings)} - {"temperature", "questions", "seed"}  # of a training preset


class Handler(BaseHTTPRequestHandler):
    """POST /search {"question": text} -> {"passages": [{id, title, text}], "queries": [text], "trace": text}."""

    look_up: Callable[[str], Found]  # set by serve
    lock = threading.Lock()  # the model answers one question at a time
    timeout = 30  # seconds for a client to send what it has announced

    def do_POST(self) -> None:
        try:
            self.answer(200, self.found())
        except ValueError as error:
            self.answer(400, {"error": str(error)})
        except (OSError, RuntimeError) as error:
            self.answer(500, {"error": str(error)})

    def found(self) -> dict[str, Any]:
        if self.path != "/search":
            raise ValueError(f"{self.path}: got an unknown path, expected /search")
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY:
            raise ValueError(f"Content-Length: got {length!r}, expected at most {MAX_BODY}")
        row = json.loads(self.rfile.read(int(length)))
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not 0 < len(question.strip()) <= MAX_QUESTION:
            raise ValueError(f"question: got {str(question)[:60]!r}, expected a text of at most {MAX_QUESTION} "
                             "characters")
        with self.lock:
            found = type(self).look_up(replace_surrogates(question))
        passages = [{"id": p.id, "title": p.title, "text": p.text} for p in found.passages]
        return {"passages": passages, "queries": found.queries, "trace": found.trace}

    def answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(look_up: Callable[[str], Found], host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready; .serve_forever() runs it."""
    return ThreadingHTTPServer((host, port), type("Door", (Handler,), {"look_up": staticmethod(look_up)}))


# ---- measures as a submodule ----


def gather(
    policy: Policy | None, retriever: Retriever | None, questions: Sequence[Question], settings: SearchSettings, *,
    seed: int, progress: str = "",
) -> tuple[list[list[Passage]], list[dict[str, float]]]:
    """Passages for each question, and what it took to find them."""
    if settings.passages == "none":
        return [[] for _ in questions], [{} for _ in questions]
    if settings.passages == "gold":
        return gold_passages(questions, retriever), [{} for _ in questions]
    if settings.passages == "naive":
        found = retriever.search([q.question for q in questions], NAIVE_PASSAGES)
        return found, [{"queries": 1.0} for _ in questions]
    episodes = generate(policy, retriever, questions, settings, seed=seed, progress=progress)
    about = [{"queries": float(len(e.queries)), "searches": float(e.num_searches), "agent_em": e.score,
              "agent_f1": f1(e.answer, e.question.golden_answers)} for e in episodes]  # fmt: skip
    return [collected(e) for e in episodes], about


def measure(
    policy: Policy | None, retriever: Retriever | None, question_sets: dict[str, list[Question]],
    generators: dict[str, Generator], settings: SearchSettings, *, progress: bool = False,
) -> dict[str, Any]:
    """{"sets": {set: means}, "average": over the sets, "rows": one for each question}. Of each generator: strict exact
    match "em NAME", the published one "within NAME", "f1 NAME"; beside them hit, passages, queries, searches, and the
    agent's own answers."""
    rows = []
    for name, questions in question_sets.items():
        seed = settings.seed + zlib.crc32(name.encode())
        found, about = gather(policy, retriever, questions, settings, seed=seed, progress=name if progress else "")
        some = [{"set": name, "id": q.id, "passages": float(len(k)), "hit": float(hit(k, q.golden_answers)), **more}
                for q, k, more in zip(questions, found, about, strict=True)]  # fmt: skip
        for label, generator in generators.items():
            for row, question, answer in zip(some, questions, generator(questions, found), strict=True):
                golds = question.golden_answers
                row |= {f"answer {label}": answer, f"em {label}": is_correct(answer, question),
                        f"within {label}": within(answer, golds), f"f1 {label}": f1(answer, golds)}
        rows += some
    sets = {}
    for name in question_sets:
        some = [row for row in rows if row["set"] == name]
        sets[name] = {key: float(np.mean([row[key] for row in some])) for key in some[0]
                      if isinstance(some[0][key], float)}
    average = {key: float(np.mean([means[key] for means in sets.values()])) for key in next(iter(sets.values()))}
    return {"sets": sets, "average": average, "rows": rows}


def measure_table(result: dict[str, Any]) -> str:
    """A line for each measure, a column for each set."""
    columns = {**result["sets"], "average": result["average"]}
    lines = [[result["name"], *columns]]
    lines += [[key, *(f"{means[key]:.3f}" for means in columns.values())] for key in result["average"]]
    return align(lines)


def run_measure(settings: SearchSettings, policy: Policy | None, retriever: Retriever | None) -> None:
    """Measure, write DIR/submodule.json and .jsonl, print."""
    name = settings.name or (Path(settings.model).name if settings.passages == "agent" else settings.passages)
    labels = [g if is_remote(g) else Path(g).name for g in settings.generators or (settings.generator,)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--generators: got {labels}, expected names that differ")
    sets = read_sets(settings.questions, settings.limit)  # a wrong file is told before models are loaded
    dtype = getattr(torch, settings.dtype)
    generators = {label: load_generator(replace(settings, generator=given), pick_device(settings.device), dtype)
                  for label, given in zip(labels, settings.generators or (settings.generator,), strict=True)}
    result = {"name": name} | measure(policy, retriever, sets, generators, settings, progress=True)
    out = Path(settings.out or f"runs/eval/{name}")
    out.mkdir(parents=True, exist_ok=True)
    rows = result.pop("rows")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "submodule.jsonl").write_text(text, encoding="utf-8")
    about = json.dumps(result | {"settings": asdict(settings)}, indent=1, ensure_ascii=False)
    (out / "submodule.json").write_text(about + "\n", encoding="utf-8")
    print(f"{measure_table(result)}\n\nwrote {out}/submodule.json, .jsonl")


# ---- the program ----


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command not in ("search", "answer", "serve", "measure"):
        is_help = command in ("", "-h", "--help")
        sys.exit(__doc__ if is_help else f"qagent.py: got {command!r}, expected search, answer, serve or measure")
    words = []
    while rest and not rest[0].startswith("--"):
        words.append(rest.pop(0))
    if (command in ("serve", "measure")) == bool(words):
        sys.exit(f"qagent.py {command}: got {' '.join(words)!r}, expected "
                 + ('a question: "who wrote ..."' if command in ("search", "answer") else "no question"))
    settings = config.load(SearchSettings, rest, prog=f"qagent.py {command}",
                           description="A plug-and-play search agent.",
                           default_config=Path(__file__).parent / "configs" / "world.toml",
                           shared=SHARED)
    if not (settings.corpus and settings.encoder):
        raise ValueError(f"got corpus {settings.corpus!r} and encoder {settings.encoder!r}, expected both; give "
                         "--corpus and --encoder")
    dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
    generator = load_generator(settings, device, dtype) if command == "answer" else None
    policy = retriever = None
    if command != "measure" or settings.passages == "agent":
        policy = Policy(load_decoder(settings.model, dtype=dtype, device=device), Tokenizer.load(settings.model))
    if command != "measure" or settings.passages != "none":
        retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None, device=device)
    if command == "measure":
        return run_measure(settings, policy, retriever)

    def look_up(question: str) -> Found:
        return search(question, policy, retriever, settings)

    if command == "serve":
        server = serve(look_up, settings.host, settings.port)
        print(f"http://{settings.host}:{settings.port}/search; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
    question = " ".join(words)
    found = look_up(question)
    print(found.trace)
    for number, passage in enumerate(found.passages, 1):
        print(f"\n[{number}] {passage.title}\n{passage.text}")
    if generator is not None:
        [answer] = generator([Question("asked", question, (), "asked")], [found.passages])
        print(f"\nanswer: {answer}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"qagent.py: {error}")
