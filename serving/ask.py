"""Ask an agent: watch one episode, chat, or answer a file of questions.

A model is asked as its run was: prompt, passages and limits come from its run.json, where no flag
and no preset that is named says otherwise.

    python rollout.py ask "who wrote ..." --model runs/dgpo         one episode, as it is written
    python rollout.py ask --interactive                             each line is a new question
    python rollout.py ask --questions FILE --out answers.jsonl      JSON lines, CSV, or plain lines
"""

import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data import Question
from episode import Episode, Protocol, episode_text, unique_passages
from infra import cli, config
from infra.checkpoint import write_aside
from infra.config import setting
from infra.files import read_json, read_rows, replace_surrogates
from infra.parallel import pick_device
from infra.programs import check_paths, read_command
from infra.record import recorded_settings
from rollout import Policy, RolloutSettings, SearchEngine, generate, load_protocol
from session import load_policy
from tokenizer import Tokenizer

# What is taken from the run that made a model: how it acts and what it searches, not how training
# samples, or how many episodes fit into memory.
RECORDED = {field.name for field in fields(RolloutSettings)}
RECORDED -= {"temperature", "top_p", "rollout_rows"}

# Settings that change no answer.
NOT_OF_ANSWERS = {"out", "json", "rollout_rows", "search_timeout_s", "device"}


@dataclass
class AskSettings(RolloutSettings):
    question: str = setting("", "what is asked, with or without the flag", is_words=True)
    interactive: bool = setting(False, "ask each line of the terminal, or of a pipe; /trace shows "
                                "the last episode")
    questions: str = setting("", "questions to answer: JSON lines, CSV, or one a line",
                             reads="FILE")
    out: str = setting("", "answers of --questions, JSON lines; goes on where it was interrupted",
                       writes="FILE")
    json: bool = setting(False, "print each answer as one JSON object")
    model: str = setting("runs/dgpo", "checkpoint that answers", reads="DIR")
    dtype: str = setting("float32", "bfloat16 takes half the memory, and is faster on processors "
                         "that multiply in it", choices=("float32", "bfloat16"))
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: cuda where there is one")
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy")
    seed: int = setting(0, "sampling noise, when temperature > 0", at_most=2**53)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, that of all. Of tokens that write a character together, the
    last one has it, and the others are empty."""
    texts, done, start = [], 0, 0  # ids[start:done] come before, in case a blank depends on them
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:done], skip_special=False)
        text = tokenizer.decode(ids[start:end], skip_special=False)
        if text.endswith("\ufffd") and end < min(len(ids), done + 4):  # of at most 4 bytes
            texts.append("")
            continue
        texts.append(text[len(before) :])
        start, done = done, end
    return texts


def ask(argv: list[str]) -> None:
    """Answer one question, those of a file, or those of a person."""
    own = {"seed", "temperature", "dtype", "device", "questions", "out", "interactive", "json"}
    settings = cli.load(
        AskSettings, argv, prog="rollout.py ask", description="Ask an agent.",
        default_config=config.ROOT / "configs" / "world.toml",
        shared={field.name for field in fields(AskSettings)} - own,
        recorded=partial(recorded_settings, sorted(RECORDED)),
    )  # fmt: skip
    modes = [flag for flag in ("question", "interactive", "questions") if getattr(settings, flag)]
    if len(modes) != 1:
        got = " and ".join(f"--{flag}" for flag in modes) or "no question"
        raise ValueError(f"--question: got {got}, expected one, --interactive, or --questions FILE")
    if bool(settings.questions) != bool(settings.out):
        raise ValueError("--out: got one of --questions and --out, expected both")
    check_paths(settings)
    questions = read_questions(Path(settings.questions)) if settings.questions else []
    num_done = count_done(Path(settings.out), questions, settings) if settings.out else 0
    device = pick_device(settings.device)
    policy = load_policy(settings.model, device, "model", getattr(torch, settings.dtype))
    retriever = None
    if settings.max_turns > 0:
        from retriever import open_retriever  # here, because only a policy that searches needs it

        retriever = open_retriever(settings, device)
    if questions:
        answer_file(policy, retriever, questions, settings, num_done)
    elif settings.interactive:
        chat(policy, retriever, settings)
    else:
        answer(policy, retriever, settings.question, settings, Trace(policy.tokenizer))


# ---- one question ----


class Trace:
    """Prints an episode as it is written, in the form of episode_text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.printed = tokenizer, ""

    def see(self, episode: Episode) -> None:
        """Print what is new; what a later token may still change waits."""
        text = episode_text(episode, self.tokenizer).rpartition("\n")[0].rstrip("\ufffd")
        if text.startswith(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text

    def end(self, episode: Episode) -> None:
        """Print the rest, and how it ended."""
        text = episode_text(episode, self.tokenizer)
        is_whole = text.startswith(self.printed)
        print(text[len(self.printed) :] if is_whole else f"\n{text}", flush=True)


class Brief:
    """Prints an episode's queries when their passages are there, and its answer at the end."""

    def __init__(self) -> None:
        self.num_shown = 0

    def see(self, episode: Episode) -> None:
        for query in episode.queries[self.num_shown :]:
            print(f"  searched: {query}", flush=True)
        self.num_shown = len(episode.queries)

    def end(self, episode: Episode) -> None:
        self.see(episode)
        print(f"{episode.answer if episode.answer is not None else f'({episode.status})'}\n",
              flush=True)


def answer(policy: Policy, retriever: SearchEngine | None, text: str, settings: AskSettings,
           printer: Trace | Brief, number: int = 0) -> Episode:
    """Play one episode and print it meanwhile; number: that of its noise."""
    started = time.perf_counter()
    protocol = load_protocol(settings.protocol)
    if not settings.json:
        protocol = watched(protocol, printer.see)
    question = Question("asked", replace_surrogates(text), (), "asked")
    [episode] = generate(policy, retriever, [question], settings, seed=settings.seed,
                         first_episode=number, protocol=protocol)
    if settings.json:
        trace = episode_text(episode, policy.tokenizer)
        more = {"seconds": round(time.perf_counter() - started, 3), "trace": trace}
        print(json.dumps(as_record(episode) | more), flush=True)
    else:
        printer.end(episode)
    return episode


def watched(protocol: Protocol, see: Callable[[Episode], object]) -> Protocol:
    """The same protocol; `see` is called after each token that does not end a turn."""

    def interrupt(episode: Episode, tokenizer: Tokenizer):
        see(episode)
        return protocol.interrupt(episode, tokenizer) if protocol.interrupt else None

    return protocol._replace(interrupt=interrupt)


def as_record(episode: Episode) -> dict[str, Any]:
    """An answer, and what it rests on; with a score where the question came with answers."""
    question, passages = episode.question, unique_passages(episode.passages)
    record = {
        "id": question.id, "question": question.question, "answer": episode.answer,
        "status": episode.status, "queries": episode.queries,
        "passages": [{"id": p.id, "title": p.name, "text": p.text} for p in passages],
    }  # fmt: skip
    return record | ({"score": episode.score} if question.golden_answers else {})


# ---- a chat ----


def chat(policy: Policy, retriever: SearchEngine | None, settings: AskSettings) -> None:
    """Answer each line; the model stays loaded, and no question knows the one before it."""
    last, number, is_person = None, 0, sys.stdin.isatty()
    if is_person:
        print("Ask; /trace shows the last episode, Ctrl-C stops an answer, Ctrl-D ends.")
    for line in lines_of(is_person):
        if line == "/trace":
            print(episode_text(last, policy.tokenizer) if last else "no question so far")
            continue
        try:
            last = answer(policy, retriever, line, settings, Brief(), number)
        except KeyboardInterrupt:
            if not is_person:
                raise
            print("  (stopped)")
        number += 1


def lines_of(is_person: bool) -> Iterator[str]:
    """Lines of the terminal, after a prompt, or of a pipe; blank ones are passed over."""
    while True:
        try:
            line = (input("> ") if is_person else input()).strip()
        except EOFError:
            return
        if line:
            yield line


# ---- a file of questions ----


def read_questions(path: Path) -> list[Question]:
    """Questions of JSON lines, of a CSV's column `question`, or of plain lines."""
    if path.suffix in (".jsonl", ".json"):
        rows = [row for _, row in read_rows(path)]
    else:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        rows = ([*csv.DictReader(text.splitlines(keepends=True))] if path.suffix == ".csv" else
                [{"question": line.strip()} for line in text.splitlines() if line.strip()])
    questions = []
    for number, row in enumerate(rows, 1):
        asked, golds = row.get("question"), row.get("golden_answers")
        if not isinstance(asked, str) or not asked.strip():
            raise ValueError(f"{path}: row {number}: got {str(asked)[:60]!r} for question, "
                             f"expected a text; its keys: {', '.join(map(str, row))[:200]}")
        known = tuple(map(str, golds)) if isinstance(golds, list) else ()
        questions.append(Question(str(row.get("id") or number), asked.strip(), known, path.stem))
    if not questions:
        raise ValueError(f"{path}: got no questions, expected at least one")
    return questions


def count_done(out: Path, questions: Sequence[Question], settings: AskSettings) -> int:
    """How many answers an interrupted command left in `out`; others are refused by name."""
    record = out.with_name(f"{out.name}.run.json")
    now = {key: value for key, value in json.loads(json.dumps(asdict(settings))).items()
           if key not in NOT_OF_ANSWERS}
    if not out.exists():
        config.save(settings, record)
        return 0
    before = read_json(record, {}).get("settings", {})
    changed = [f"--{key.replace('_', '-')} {before.get(key)!r}, now {value!r}"
               for key, value in now.items() if before.get(key) != value]
    if changed:
        raise ValueError(f"{out}: got a file that was made with {'; '.join(changed)[:300]}; give "
                         "what it was made with, or another --out")
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last one may be half-written
    there = [(row["id"], row["question"]) for row in map(json.loads, whole)]
    expected = [(question.id, question.question) for question in questions[: len(there)]]
    if there != expected:
        raise ValueError(f"{out}: got answers to other questions than those of "
                         f"{settings.questions}, which has changed; give another --out")
    if len(whole) < len(lines):
        write_aside(out, lambda partial: partial.write_text("".join(whole), encoding="utf-8"))
    return len(whole)


def answer_file(policy: Policy, retriever: SearchEngine | None, questions: Sequence[Question],
                settings: AskSettings, num_done: int) -> None:
    """Append the missing answers to --out, --rollout-rows of them at a time."""
    out, size = Path(settings.out), settings.rollout_rows
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(questions), initial=num_done, desc="answers") as bar:
        for start in range(num_done, len(questions), size):
            episodes = generate(policy, retriever, questions[start : start + size], settings,
                                seed=settings.seed, first_episode=start)
            lines = [json.dumps(as_record(episode)) + "\n" for episode in episodes]
            with out.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
            bar.update(len(episodes))
            if settings.json:
                print("".join(lines), end="", flush=True)
    print(f"wrote {out}: {len(questions)} answers, {num_done} of them were there", file=sys.stderr)


def main(argv: list[str]) -> None:
    read_command(argv, "rollout.py", __doc__, ("ask",))
    with cli.reporting("rollout.py"):
        ask(argv[1:])
