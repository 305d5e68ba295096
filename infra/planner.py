"""The planner: prints what a training run would take, from config.json alone; nothing is trained.

    train.py ... --plan 8x80GB      cards: NxM, N of 80 GB (H100) or 141 GB (H200)
    train.py ... --plan here        this machine, whose speed is measured in a few seconds

infra/plan.py has the arithmetic. This file reads configs, counts lines, measures the machine, and
prints a table of memory, one of seconds, what is assumed, and the setting to turn first. A run that
does not fit ends with a message and status 1.
"""

import json
import math
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import pstdev
from typing import Any

import torch
import torch.nn.functional as F

from infra.config import is_remote
from infra.files import blaming, read_json, read_rows, resolve
from infra.parallel import pick_device
from infra.plan import (
    CARDS,
    F32,
    GIB,
    GRAPH_LAYER_S,
    NUM_PASSAGES,
    NUM_QUESTIONS,
    OPS_A_LAYER,
    PROMPTS,
    ROW_S,
    SIZES,
    WRONG,
    Episodes,
    Machine,
    Shapes,
    as_flags,
    compute_dtype,
    episodes_a_step,
    make_it_fit,
    num_parameters,
    num_steps,
    peak,
    searches,
    stages,
    start_seconds,
    step_seconds,
    time_knobs,
    tokens_a_pass,
    turn,
)
from infra.programs import check_path

CHARACTERS = 4  # a token, of English

# ---- what files say ----


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def expected_episodes(settings: Any) -> Episodes:
    """From the log in --run-dir, else --episodes where nothing is sampled, else from the limits."""
    s = settings
    searches, written, wrong = 0.75 * s.max_turns, min(75, 0.4 * s.max_new_tokens), WRONG
    written *= searches + 1
    if not s.max_turns:
        written = s.max_new_tokens / 2
    source = "assumed from --max-turns, --max-new-tokens and --max-obs-tokens"
    log = Path(s.run_dir) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.open()] if log.is_file() else []
    if rows := [row for row in rows if row.get("rollout/agent_tokens")][-20:]:
        searches, written, score = (
            sum(row[f"rollout/{name}"] for row in rows) / len(rows)
            for name in ("searches", "agent_tokens", "score"))
        wrong, source = 1 - score, f"the last {len(rows)} steps of {log}"
    prompt = PROMPTS.get(s.prompt, PROMPTS["paper"])
    if not (rows or s.advantage) and Path(s.episodes).is_file():
        return given_episodes(Path(s.episodes), prompt)
    shown = s.max_obs_tokens
    room = max(1, s.max_context_tokens - prompt - written)
    return Episodes(prompt, searches, min(shown, room / max(1, searches)), written, wrong, source)


def given_episodes(path: Path, prompt: float) -> Episodes:
    """The means of a file's first thousand; a prompt that it lacks has `prompt` tokens."""
    tokens, counts, totals = Counter(), Counter(), []
    rows = [row for _, row in islice(read_rows(path, "episode"), 1000)]
    with blaming(path, "segments [{author, text or ids}]"):
        for row in rows:
            before = tokens.total()
            for part in row.get("segments", [{"author": "agent", "text": row.get("text", "")}]):
                size = len(part["ids"]) if "ids" in part else len(part["text"]) / CHARACTERS
                counts[part["author"]] += 1
                tokens[part["author"]] += size
            totals.append(tokens.total() - before)
    shown = tokens["environment"] / max(1, counts["environment"])
    prompt = tokens["prompt"] / len(rows) or prompt
    return Episodes(prompt, counts["environment"] / len(rows), shown, tokens["agent"] / len(rows),
                    WRONG, f"{path}; text without ids has a token in {CHARACTERS} characters",
                    pstdev(totals))


def encoder_shape(public: dict, read_config: Callable) -> tuple[float, int]:
    """(parameters, width) of an encoder, a BERT's kind or a decoder, from its config.json."""
    width, inner = public["hidden_size"], public["intermediate_size"]
    if "position_embedding_type" in public or public.get("type_vocab_size"):
        layer = 4 * width * (width + 1) + 2 * width * inner + inner + 5 * width
        rows = public["vocab_size"] + public["max_position_embeddings"]
        return public["num_hidden_layers"] * layer + width * rows, width
    return num_parameters(read_config(public | {"tie_word_embeddings": True}, "config.json")), width


def read_shapes(settings: Any, read_config: Callable, guide_role: str) -> Shapes:
    """From config.json of the models, index.json of the index, and the lines of the corpus."""
    s = settings

    def public_of(role: str) -> dict:
        path = getattr(s, role)
        if not path:
            raise ValueError(f"--{role}: got no checkpoint, expected a folder or a hub id")
        if not is_remote(path):
            check_path(path, "DIR", f"--{role}")
        return read_json(resolve(path, ["config.json"]) / "config.json")

    student = read_config(public_of("student"), f"{s.student}/config.json")
    guide = read_config(public_of(guide_role), f"{getattr(s, guide_role)}/config.json") if (
        guide_role) else None
    episodes, questions = Path(s.episodes), Path(s.questions)
    num = count_lines(questions) if questions.is_file() else NUM_QUESTIONS
    asked = (min(num, s.num_episode_questions or num),
             count_lines(episodes) if episodes.is_file() else None)
    if not searches(s) or "://" in s.index:  # a served index: that process has encoder and vectors
        return Shapes(student, guide, 0, 0, 0, F32, *asked)
    try:
        encoder, width = encoder_shape(public_of("encoder"), read_config)
    except KeyError as error:
        raise ValueError(f"--encoder {s.encoder}: got a config.json without {error}, expected that "
                         "of a network; copy its own there to plan") from error
    passages, vector_bytes, index, corpus = NUM_PASSAGES, 2, Path(s.index), Path(s.corpus)
    if s.index and (index / "index.json").is_file():
        about = read_json(index / "index.json")
        passages, width = about["rows"], about["dim"]
        vector_bytes = {"float16": 2, "int8": 1}.get(about["dtype"], F32)
    elif s.corpus and corpus.is_file():
        passages, vector_bytes = count_lines(corpus), F32
    return Shapes(student, guide, encoder, passages, width, vector_bytes, *asked)


# ---- the machine ----


def machine_of(settings: Any, shapes: Shapes) -> Machine:
    """The one that --plan names; ValueError if it is not known."""
    if settings.plan == "here":
        return this_machine(settings, shapes)
    match = re.fullmatch(r"(?:([1-9]\d{0,4})x)?(\w+)", settings.plan)
    if not match or match[2] not in CARDS:
        raise ValueError(f"--plan: got {settings.plan!r}, expected here, or cards of "
                         f"{' or '.join(CARDS)}, for example 8x80GB")
    return CARDS[match[2]]._replace(ranks=int(match[1] or 1))


def this_machine(settings: Any, shapes: Shapes) -> Machine:
    """This machine as it is now, beside whatever else it does."""
    device = torch.device(pick_device(settings.device))
    ranks = int(os.environ.get("WORLD_SIZE", settings.processes))
    unit = 1 if sys.platform == "darwin" else 1024
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    name = f"this machine, {torch.get_num_threads()} threads a process"
    memory = free_memory() / ranks
    if device.type == "cuda":
        name, base = torch.cuda.get_device_name(device), GIB
        memory = torch.cuda.get_device_properties(device).total_memory
    c, flops = shapes.student, {}
    for dtype in SIZES:
        x = torch.ones(1024, c.hidden_size, dtype=getattr(torch, dtype), device=device)
        weight = torch.ones(c.intermediate_size, c.hidden_size, dtype=x.dtype, device=device)
        work = 2 * len(x) * weight.numel()
        flops[dtype] = work / seconds_of(lambda x=x, w=weight: F.linear(x, w), device)
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)
    bandwidth = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
    small = torch.ones(1, 16)
    op = seconds_of(lambda: F.linear(small, small), torch.device("cpu"))
    return Machine(name, ranks, memory, base, flops, bandwidth, bandwidth / 4, OPS_A_LAYER * op,
                   "cuda" if device.type == "cuda" else "cpu")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a piece of work that is repeated for a third of a second."""
    def done() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()  # the first one is slower
    started = now = done()
    count = 0
    while now - started < 1 / 3:
        work()
        count, now = count + 1, done()
    return (now - started) / count


def free_memory() -> float:
    """Bytes that no other process needs; all of the machine's where it does not say."""
    path = Path("/proc/meminfo")
    text = path.read_text() if path.is_file() else ""
    if match := re.search(r"MemAvailable:\s+(\d+) kB", text):
        return float(match[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


# ---- the report ----


def memory_table(parts: dict[str, dict[str, float]]) -> list[str]:
    """A line for each part, a column for each stage, GiB."""
    names = [*dict.fromkeys(name for stage in parts.values() for name in stage)]
    rows = {name: [stage.get(name, 0) for stage in parts.values()] for name in names}
    rows = {name: sizes for name, sizes in rows.items() if any(sizes)}
    rows["sum"] = [sum(stage.values()) for stage in parts.values()]
    lines = [f"{'memory of a rank, GiB':28}" + "".join(f"{name:>14}" for name in parts)]
    return lines + [f"  {name:26}" + "".join(f"{size / GIB:14.2f}" if size else f"{'':14}"
                                             for size in sizes) for name, sizes in rows.items()]


def print_plan(settings: Any, read_config: Callable, guide_role: str) -> None:
    """Print the plan of a run; ValueError if it does not fit. read_config: model.DecoderConfig;
    guide_role: the setting that names the guide's checkpoint, or ""."""
    if os.environ.get("RANK", "0") != "0":
        return
    shapes = read_shapes(settings, read_config, guide_role)
    machine, episodes = machine_of(settings, shapes), expected_episodes(settings)
    parts = stages(settings, shapes, machine, episodes)
    seconds = step_seconds(settings, shapes, machine, episodes)
    once, steps = start_seconds(settings, shapes, machine, episodes), num_steps(settings, shapes)
    dtype, total = compute_dtype(settings, machine), sum(seconds.values())
    tokens, passes = tokens_a_pass(settings, machine, episodes)
    share = episodes_a_step(settings, machine.ranks)
    print(f"plan of phase {settings.phase} on {machine.ranks} x {machine.name}, {dtype}: {steps} "
          f"steps; a rank has {share:g} episodes a step, and {tokens:.0f} tokens in "
          f"each of {passes:.1f} passes an update\n")
    print("\n".join(memory_table(parts)))
    print(f"  {'there is':26}{machine.memory / GIB:14.2f}\n")
    print("seconds of a step")
    for name, value in [*seconds.items(), ("sum", total)]:
        print(f"  {name:26}{value:14.3f}{value / total:7.0%}")
    for name, value in once.items():
        print(f"  once: {name:20}{value:14.1f}")
    print(f"  the run: {(sum(once.values()) + steps * total) / 3600:.2f} h\n")
    print("assumed")
    print("\n".join(f"  {line}" for line in assumptions(settings, shapes, machine, episodes)))
    most = peak(parts)
    print()
    if most > machine.memory:
        flags = [f"{flag} ({size / GIB:.1f} GiB)" for flag, size in make_it_fit(
            settings, shapes, machine, episodes)]
        raise ValueError(
            f"--plan {settings.plan}: does not fit: got {most / GIB:.1f} GiB, expected at most "
            f"{machine.memory / GIB:.1f}; turn first " + (", then ".join(flags) or "the models: no "
                                                          "setting helps"))
    print(f"fits: {most / GIB:.1f} of {machine.memory / GIB:.1f} GiB")
    slowest = max(seconds, key=seconds.get)

    def cost(changed: Any) -> float:
        if peak(stages(changed, shapes, machine, episodes)) > machine.memory:
            return math.inf
        return sum(step_seconds(changed, shapes, machine, episodes).values())

    change = turn(settings, time_knobs(settings, machine), cost)
    print(f"slowest: {slowest}, {seconds[slowest] / total:.0%} of a step; " + (
        f"turn first {as_flags(change)} ({cost(replace(settings, **change)):.2f} s a step)"
        if change else "no setting saves 2 %"))


def assumptions(settings: Any, shapes: Shapes, machine: Machine, episodes: Episodes) -> list[str]:
    """What the numbers depend on and no file says."""
    flops = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in
                      machine.flops.items())
    origin = "measured now" if settings.plan == "here" else "sustained, never measured here"
    lines = [
        f"{flops}; {machine.bandwidth / 1e9:.3g} GB/s of memory; {1e3 * machine.layer_s:.2g} ms of "
        f"the host for a layer of a {'prefill' if machine.kind == 'cuda' else 'decoding step'} "
        f"({origin})",
        f"an episode has {episodes.tokens:.0f} tokens: a prompt of {episodes.prompt:.0f}, "
        f"{episodes.searches:.2g} searches that show {episodes.shown:.0f} each, "
        f"{episodes.written:.0f} of the agent's; {episodes.wrong:.0%} are wrong "
        f"({episodes.source})",
        "the longest episode of a step has twice the mean of agent's tokens; search and decoding "
        "do not overlap"]
    if searches(settings):
        lines.append(f"{shapes.passages:.0f} passages, {shapes.vector_bytes} bytes a component; "
                     "every rank holds and scans all of them" if shapes.passages else
                     f"{settings.index} answers searches, at no cost here and without a wait")
    if machine.kind == "cuda":
        lines.append(f"{machine.base / GIB:g} GiB for CUDA itself; a step of decoding is a graph: "
                     f"{1e3 * GRAPH_LAYER_S:.2g} ms a layer, and {1e3 * ROW_S:.2g} ms a row")
    return lines
