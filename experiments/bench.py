"""Speed and memory of what this project computes itself, beside packages one would take instead.

    python -m experiments.bench head decode --out results.json           measure these, or all
    python -m experiments.bench report results.json --plot growth.png    show what is saved

    head        log-probabilities, with gradients              torch, TRL, Liger, cut-cross-entropy
    divergence  Eq. 1 and the exact KL of Eq. 4, gradients     torch, Liger
    decode      tokens a second after the first one            transformers, llama.cpp
    rollout     episodes a second, turns of given lengths      transformers in lock step,
                                                               ours re-reading
    step        gradients of one PPO update, actor and critic, transformers, padded
                float32 and bf16 with float32 weights
    search      best of many vectors in half precision         torch, faiss
    encoder     passages a second                              sentence-transformers
    growth      time and memory against size                   ours alone

Decoders have random weights of published shapes (--shapes), or are a checkpoint (--checkpoint). For
llama.cpp give the checkpoint's weights also as --gguf FILE. A file with fewer than 16 bits a weight
may be faster than the floor, which reads 16. --quick takes tiny sizes.

How a race is run. Ours and the peers (requirements-bench.txt) take turns in one process, on the
same weights, tokens and dtype; a difference is part of the name. The first call is set apart, as it
compiles. A small result is then held against plain formulas in higher precision. What is off
becomes a row "wrong" and is not timed; what cannot run becomes a row "not measured". --compile adds
compiled peers, which takes minutes.

What the numbers are. Times are medians. Memory is the largest rise above what was held before a
call. A floor is work that nobody can avoid, by the printed formula, at the rates that were measured
in the same run: bytes read, or FLOP of a GEMM, in a second.

Legend: N rows, B batch, T tokens, D width, V vocabulary, P parameters.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batch import Batch, pack, response_rows
from dgpo import exact_kl, kd_loss, policy_loss, value_loss
from experiments import engines
from experiments.engines import SHAPES, Weights, Work, load_weights, ragged, random_ids
from experiments.plots import plot_growth
from infra.checkpoint import write_aside
from infra.cli import Parser, reporting
from infra.files import read_json
from infra.parallel import micro_batches
from infra.programs import count
from infra.run import RunSettings
from kernels import head_divergence, head_logprobs
from model import Critic, Decoder, load_decoder, load_encoder
from retriever import TorchIndex

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("transformers", "trl", "liger-kernel", "cut-cross-entropy", "llama-cpp-python",
         "sentence-transformers")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest difference over largest value
HEADER = ["case", "implementation", "median", "IQR", "rate", "peak memory", "of floor",
          "of best peer", "first call"]


# ---- timing one call ----


def time_call(call: Callable[[], Any], device: str) -> dict[str, float]:
    """What a call takes: "seconds", "wall_s" and, where the system tells it, "peak_bytes".

    If the call returns {"seconds": ...}, that counts in place of its wall time, for example to
    leave out a part.
    """
    gc.collect()
    before = peak_bytes(device, start_again=True)
    started = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - started
    numbers = {"seconds": wall_s, "wall_s": wall_s}
    if isinstance(result, dict):
        numbers.update(result)
    if before is not None:
        numbers["peak_bytes"] = peak_bytes(device) - before
    return numbers


def peak_bytes(device: str, *, start_again: bool = False) -> int | None:
    """The most memory held since the peak was started again; None: the system does not tell."""
    try:
        if device == "cuda":
            if start_again:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated()
        if start_again:
            trim()
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, AttributeError):  # no Linux, no glibc
        return None


def trim() -> None:
    """Return memory kept of earlier calls: it hides a rise, and saves the next call page faults."""
    ctypes.CDLL(None).malloc_trim(0)


def median_and_iqr(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def relative_error(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest difference over largest expected value, of the worst pair; NaN if there is one."""
    errors = [(x.float() - y.float()).abs().max() / y.float().abs().max()
              for x, y in zip(results, expected, strict=True)]
    return torch.stack(errors).max().item()


# ---- a race ----


class Case(NamedTuple):
    """What is raced, and the work of one call."""

    name: str
    work: float  # units that a call does
    unit: str
    floor: str  # formula of the work that nobody can avoid
    floor_s: float  # its time at the rates of this run
    more: dict[str, Any] = {}  # further keys of its rows

    def row(self, name: str) -> dict[str, Any]:
        """What an implementation's row says before it is timed."""
        return {"implementation": name, **self.more, "case": self.name, "status": "measured",
                "unit": self.unit, "floor": self.floor, "floor_s": self.floor_s}


class Implementation(NamedTuple):
    run: Callable[[], Any]  # the timed call; see time_call
    error: Callable[[], float]  # of a small result
    tolerance: float


def compare(bench: "Bench", case: Case, names: Iterable[str],
            make: Callable[[str], Implementation]) -> None:
    """Race the implementations. Each gets a row, whatever becomes of it."""
    print(f"{bench.name}: {case.name}; floor {duration(case.floor_s)} = {case.floor}", flush=True)
    rows = {name: case.row(name) for name in names}
    runs: dict[str, Callable[[], Any]] = {}  # of those that are right
    samples: dict[str, list[dict]] = {name: [] for name in rows}
    for repeat in range(-1, bench.options.repeats):  # -1: the first call, and the check
        for name, row in rows.items():
            try:
                if repeat < 0:
                    implementation = make(name)
                    if first_call_is_right(implementation, row, bench.device):
                        runs[name] = implementation.run
                elif name in runs:
                    samples[name].append(time_call(runs[name], bench.device))
                    row.update(summary(samples[name], case))
            except Exception as problem:
                text = f"not measured: {type(problem).__name__}: {problem}"
                row["status"] = text.split("\n")[0][:200]
                runs.pop(name, None)
        add_best_peer([row for name, row in rows.items() if name in runs and samples[name]])
        bench.save(list(rows.values()))  # an interrupted run keeps the rounds that it finished
    for row in rows.values():
        print(f"  {' | '.join(filter(None, cells(row)[1:]))}", flush=True)


def first_call_is_right(implementation: Implementation, row: dict[str, Any], device: str) -> bool:
    """Call it once, and check its result; the row keeps both. A NaN is not right."""
    row["first_s"] = time_call(implementation.run, device)["wall_s"]
    row["error"] = implementation.error()
    if row["error"] <= implementation.tolerance:
        return True
    row["status"] = f"wrong: error {row['error']:.1e}, tolerance {implementation.tolerance:.0e}"
    return False


def summary(samples: list[dict], case: Case) -> dict[str, float]:
    """Medians of the timed calls, the rate, and the time as a multiple of the floor."""
    numbers = {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}
    seconds, iqr_s = median_and_iqr([sample["seconds"] for sample in samples])
    numbers.update(seconds=seconds, iqr_s=iqr_s, rate=case.work / seconds,
                   of_floor=seconds / case.floor_s)
    return numbers


def add_best_peer(rows: list[dict[str, Any]]) -> None:
    """Compare our rows with the fastest of the others."""
    ours = [row for row in rows if row["implementation"].startswith("ours")]
    if peers := [row for row in rows if row not in ours]:
        best = min(peers, key=lambda row: row["seconds"])
        for row in ours:
            row["best_peer"] = best["implementation"]
            row["of_best_peer"] = row["seconds"] / best["seconds"]


# ---- rows: kept and shown ----


class Bench:
    """One bench of a run. Its rows go to a file {bench: {..., "rows": [...]}}.

    The file keeps the rows of the other benches.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.device = name, options, options.device
        in_16_bit = name in ("decode", "rollout", "growth")
        in_16_bit |= self.device == "cuda" and name not in ("encoder", "step")
        self.dtype = torch.bfloat16 if in_16_bit else torch.float32
        gc.collect()
        gc.freeze()  # looking through the libraries before each call would take longer than some
        self.read, self.gemm = rates(self.device, self.dtype, options.quick)
        self.about = about_run(options)
        self.about.update(dtype=str(self.dtype).split(".")[1], read=self.read, gemm=self.gemm)
        self.rows: dict[tuple[str, str], dict] = {}

    def save(self, rows: list[dict]) -> None:
        """Add rows, or replace those of the same case and implementation, and write the file."""
        for row in rows:
            self.rows[row["case"], row["implementation"]] = row
        path = Path(self.options.out)
        benches = read_json(path, {})
        benches[self.name] = {**self.about, "rows": list(self.rows.values())}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(benches, separators=(",", ":")) + "\n"
        write_aside(path, lambda partial: partial.write_text(text))


def rates(device: str, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """(bytes read, FLOP of a square GEMM) in a second."""
    x = torch.ones(2**22 if quick else 2**28, device=device)  # 1 GiB, beyond any cache
    width = 8192 if device == "cuda" else 2048
    if quick:
        width = 256
    a, b = torch.randn(2, width, width, device=device).to(dtype)
    read_s, gemm_s = (
        statistics.median(time_call(call, device)["seconds"] for _ in range(5))
        for call in (x.sum, lambda: a @ b))
    return x.nbytes / read_s, 2 * width**3 / gemm_s


def about_run(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the rows of a run were measured."""
    installed = {package.name.lower().replace("_", "-"): package.version
                 for package in metadata.distributions()}
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    models = [line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")]
    machine = f"{models[0] if models else 'CPU'} ({os.cpu_count()} cores)"
    if options.device == "cuda":
        machine = torch.cuda.get_device_name()
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "date": str(date.today()), "machine": machine,
            "threads": options.threads, "repeats": options.repeats,
            "command": " ".join(["python -m experiments.bench", *options.argv]),
            "versions": {name: installed.get(name, "absent") for name in ("torch", *PEERS)}}


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def cells(row: dict) -> list[str]:
    """A row as text, under HEADER; the first call is what it took beyond the median."""
    names = [row["case"], row["implementation"]]
    if row["status"] != "measured" or "rate" not in row:
        return [*names, row["status"]] + [""] * (len(HEADER) - 3)
    rate = f"{row['rate']:,.4g} {row['unit']}/s"
    if "tokens" in row:
        rate += f", {row['tokens'] / row['seconds']:,.4g} tokens/s"
    peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else "not measured"
    of_peer = f"{row['of_best_peer']:.2f} x {row['best_peer']}" if "best_peer" in row else ""
    first_s = max(0.0, row["first_s"] - row["wall_s"])
    return [*names, duration(row["seconds"]), duration(row["iqr_s"]), rate, peak,
            f"{row['of_floor']:.2f} x", of_peer, "+" + duration(first_s)]


def markdown(document: dict) -> str:
    """The benches of a file: how they were run, a table of rows, the formulas of the floors."""
    lines = []
    for name, bench in document.items():
        versions = [f"{package} {version}" for package, version in bench["versions"].items()]
        about = (
            f"`{bench['command']}`: {bench['machine']}, {bench['threads']} threads, "
            f"{bench['dtype']}, median of {bench['repeats']}; reads {bench['read'] / 1e9:.1f} GB/s,"
            f" GEMM {bench['gemm'] / 1e9:,.0f} GFLOP/s; commit {bench['commit']}, {bench['date']}; "
            f"{', '.join(versions)}.")
        lines += [f"## {name}", "", about, ""]
        for row in (HEADER, ["---"] * len(HEADER), *map(cells, bench["rows"])):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        floors = [f"Floor: {row['floor']}." for row in bench["rows"] if "floor" in row]
        lines += ["", *dict.fromkeys(floors), ""]
    return "\n".join(lines)


# ---- head and divergence: functions of hidden [N, D], weight [V, D] and targets [N]; divergence
# also takes the hidden states and weight of a teacher, before the targets ----


class Heads(NamedTuple):
    """Sizes of a race of heads."""

    rows: int
    widths: list[int]  # the student's D, and the teacher's
    peak: float = 0.0  # how far the hidden state points to its target, as after training
    more: dict[str, Any] = {}  # further keys of the rows


def head_inputs(bench: Bench, heads: Heads, rows: int, entries: int) -> list[Tensor]:
    """For each width hidden states and a weight, then targets, the same in every call."""
    generator, inputs = torch.Generator().manual_seed(0), []
    targets = torch.randint(entries, (rows,), generator=generator)
    for width in heads.widths:
        weight = torch.randn(entries, width, generator=generator) * 0.02
        hidden = torch.randn(rows, width, generator=generator) + heads.peak * weight[targets]
        inputs += [x.to(bench.device, bench.dtype) for x in (hidden, weight)]
    return [*inputs, targets.to(bench.device)]


def with_gradients(function: Callable, *inputs: Tensor) -> list[Tensor]:
    """What the function returns, and the gradients of hidden and weight.

    The upstream gradient differs by row.
    """
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    values = tuple(function(hidden, weight, *inputs[2:]))
    upstream = [torch.linspace(0.5, 2, v.numel()).view(v.shape).to(v) for v in values]
    torch.autograd.backward(values, upstream)
    return [*(value.detach() for value in values), hidden.grad, weight.grad]


def compare_heads(bench: Bench, name: str, functions: dict[str, Callable], heads: Heads) -> None:
    """Race functions of heads, at the sizes of Qwen2.5's and Llama 3's vocabularies.

    All are timed at Qwen2.5's and checked at both; the reference is "torch" in float64.
    """
    vocabularies = [1000, 777] if bench.options.quick else [151_936, 128_256]
    inputs = head_inputs(bench, heads, heads.rows, vocabularies[0])
    if bench.options.compile:
        functions["torch, compiled"] = torch.compile(functions["torch"])

    @functools.cache
    def reference(entries: int) -> tuple[list[Tensor], list[Tensor]]:
        few = head_inputs(bench, heads, 16, entries)
        double = [x.double() if x.is_floating_point() else x for x in few]
        return few, [x.float() for x in with_gradients(functions["torch"], *double)]

    def error(name: str, entries: int) -> float:
        few, exact = reference(entries)
        return relative_error(with_gradients(functions[name], *few), exact)

    def make(name: str) -> Implementation:
        return Implementation(lambda: with_gradients(functions[name], *inputs),
                              lambda: max(error(name, entries) for entries in vocabularies),
                              TOLERANCE[bench.dtype])

    width, *others = heads.widths
    flop = 2 * heads.rows * vocabularies[0] * (3 * width + sum(others))
    floor = "3 GEMMs of 2 N V D FLOP"
    if others:
        floor += ", and 1 with the teacher's head"
    case = Case(name, heads.rows, "rows", floor, flop / bench.gemm, heads.more)
    is_growth = bool(heads.more)
    compare(bench, case, ["ours"] if is_growth else functions, make)


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, V], all of them at once, in fp32 (or fp64) from the logits on."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return F.log_softmax(hidden @ weight.T, -1, dtype=dtype)


def torch_head(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = log_probs(h, w)
    return log_p.gather(-1, y[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def trl_head(h: Tensor, w: Tensor, y: Tensor, *outputs: str) -> tuple[Tensor, ...]:
    """In tiles, as TRL's trainers call it. outputs: "entropy", or none."""
    function = import_module("trl.kernels").ChunkedLogProbFunction
    return function.apply(h, w, None, y, 1.0, 32_768, None, 1.0, outputs)[: 1 + len(outputs)]


def liger_head(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    module = import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    return module.LigerFusedLinearPPOBase.chunk_forward(h[None], w, y[None])


def cross_entropy_head(module: str, *inputs: Tensor, **options: Any) -> tuple[Tensor]:
    """Of torch (in chunks) and of cut-cross-entropy, which have the same interface."""
    return (-import_module(module).linear_cross_entropy(*inputs, reduction="none", **options),)


def bench_head(bench: Bench) -> None:
    with_entropy = {"ours": head_logprobs, "torch": torch_head,
                    "TRL": lambda *x: trl_head(*x, "entropy")}
    logprobs_alone = {
        "ours": lambda *x: head_logprobs(*x)[:1],
        "torch": lambda h, w, y: (log_probs(h, w).gather(-1, y[:, None]).squeeze(-1),),
        "torch, chunked": lambda *x: cross_entropy_head(  # as torch chooses the chunks
            "torch.nn.functional", *x, options=nn.LinearCrossEntropyOptions()),
        "TRL": trl_head,
        "Liger": liger_head,
        "cut-cross-entropy": lambda *x: cross_entropy_head("cut_cross_entropy", *x),
    }
    heads = Heads(bench.options.rows, bench.options.widths[:1])
    compare_heads(bench, "log-probabilities and entropy", with_entropy, heads)
    compare_heads(bench, "log-probabilities", logprobs_alone, heads)
    peaked = heads._replace(peak=40.0)  # p of about 0.9
    compare_heads(bench, "log-probabilities, peaked", logprobs_alone, peaked)


def divergences(ce_weight: float, *, is_exact: bool, compiled: bool) -> dict[str, Callable]:
    """Functions of both heads, by implementation. compiled: Liger's.

    is_exact: reinforcement's KL(student || guide), in place of Eq. 1's KL(teacher || student).
    """
    beta = float(is_exact)  # of Liger: 0 is KL(teacher || student), 1 is KL(student || teacher)

    def plain(h: Tensor, w: Tensor, teacher_h: Tensor, teacher_w: Tensor, y: Tensor) -> tuple:
        log_p, log_q = log_probs(h, w), log_probs(teacher_h, teacher_w)
        cross_entropy = -log_p.gather(-1, y[:, None]).sum()
        log_a, log_b = (log_p, log_q) if is_exact else (log_q, log_p)
        return ((log_a.exp() * (log_a - log_b)).sum() + ce_weight * cross_entropy,)

    def liger(*inputs: Tensor) -> tuple[Tensor]:
        """Liger returns a mean."""
        loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
        return (loss(ce_weight, 1.0, beta=beta, compiled=compiled)(*inputs) * len(inputs[-1]),)

    def liger_triton(*inputs: Tensor) -> tuple[Tensor]:
        loss = import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=beta)
        return (loss(*inputs[:-1], None) * len(inputs[-1]),)

    ours = functools.partial(head_divergence, kd_loss, ce_weight=ce_weight)
    if is_exact:
        ours = functools.partial(head_divergence, exact_kl)
    functions = {"ours": lambda *x: ours(*x)[:1], "torch": plain, "Liger": liger}
    return functions if ce_weight else {**functions, "Liger, Triton": liger_triton}


def bench_divergence(bench: Bench) -> None:
    options = bench.options
    heads = Heads(max(1, options.rows // 2), options.widths)
    for name, ce_weight, is_exact in (
        ("CE + KL(teacher || student)", 1.0, False), ("KL(teacher || student)", 0.0, False),
        ("KL(student || guide)", 0.0, True),
    ):
        compiled = options.compile or bench.device == "cuda"  # a CPU needs a C++ compiler
        functions = divergences(ce_weight, is_exact=is_exact, compiled=compiled)
        compare_heads(bench, name, functions, heads)


# ---- decode and rollout ----


def compare_engines(bench: Bench, case: Case, weights: Weights, names: Iterable[str],
                    work: Work) -> None:
    """Race engines. The time of a single turn begins after its first token."""
    options, several_turns = bench.options, work.num_turns > 1

    def make(name: str) -> Implementation:
        engine = engines.load_engine(name, weights, options, bench.dtype)

        def timed(work: Work) -> float:
            started = time.perf_counter()
            engine(work)
            return time.perf_counter() - started

        def run() -> dict[str, float]:
            all_s = timed(work)
            if several_turns:
                return {"seconds": all_s}
            with suppress(OSError, AttributeError):
                trim()  # so that both calls begin alike
            prefill_s = timed(work._replace(lengths=[[1]] * len(work.prompts)))
            if prefill_s >= all_s:
                raise RuntimeError("too short to be told from reading the prompt; raise "
                                   "--new-tokens")
            return {"seconds": all_s - prefill_s, "prefill_s": prefill_s}

        def error() -> float:
            return engines.greedy_error(name, weights, options, several_turns=several_turns)

        # A GGUF file holds 16-bit floats at best; ours and transformers check in fp32.
        return Implementation(run, error, 2e-2 if name.startswith("llama.cpp") else 1e-5)

    compare(bench, case, names, make)


def engine_floor(bench: Bench, weights: Weights, work: Work, num_tokens: int) -> float:
    """Seconds of the work that no engine can avoid. num_tokens: written tokens that count."""
    count, num_observations = len(work.prompts), work.num_turns - 1
    read = num_observations * len(work.observation)  # tokens of an episode, beside its prompt
    typical_length = len(work.prompts[0]) + (num_tokens / count + read) / 2
    step_bytes = 2 * weights.num_weights + work.rows * typical_length * weights.bytes_of_a_token
    step_flop = 2 * weights.num_weights * work.rows
    step_s = max(step_bytes / bench.read, step_flop / bench.gemm)
    read_s = 0.0
    if num_observations:
        num_read = sum(map(len, work.prompts)) + count * read
        read_s = 2 * num_read * (weights.num_weights - weights.head_weights) / bench.gemm
    return num_tokens / work.rows * step_s + read_s


STEP_FLOOR = (
    "each step reads the weights and half the final keys and values, or computes 2 P B FLOP")
READ_FLOOR = "each token that is read, 2 P FLOP without the head"


def compare_decoding(bench: Bench, weights: Weights, batch: int, context: int,
                     names: Iterable[str], **more: Any) -> None:
    """Tokens a second after the first one, of a batch of single turns."""
    length = 1 + bench.options.new_tokens
    work = Work(random_ids(batch, context), [[length]] * batch, [], batch)
    num_tokens = work.num_written - batch
    floor_s = engine_floor(bench, weights, work, num_tokens)
    name = f"{weights.name}, batch {batch}, context {context}"
    case = Case(name, num_tokens, "tokens", STEP_FLOOR, floor_s, more)
    compare_engines(bench, case, weights, names, work)


def compare_rollouts(bench: Bench, weights: Weights, count: int, names: Iterable[str],
                     **more: Any) -> None:
    """Episodes a second: three turns that an observation answers, and a last one."""
    options = bench.options
    typical = (4, 1, 8) if options.quick else (30, 8, 96)
    [observation] = random_ids(1, options.observation)
    rows = min(count, options.rollout_rows)
    work = Work(random_ids(count, options.context), ragged(count, 4, *typical), observation, rows)
    floor_s = engine_floor(bench, weights, work, work.num_written)
    more["tokens"] = work.num_written
    case = Case(f"{weights.name}, {count} episodes", count, "episodes",
                f"{STEP_FLOOR}; {READ_FLOOR}", floor_s, more)
    compare_engines(bench, case, weights, names, work)


def bench_decode(bench: Bench) -> None:
    options, names = bench.options, ["ours", "transformers"]
    if options.compile:
        names.append("transformers, static cache")  # which it compiles
    if bench.device == "cpu":  # the name of the file says how the weights are quantised
        names.append(f"llama.cpp, {Path(options.gguf).stem}" if options.gguf else "llama.cpp")
    for weights in map(load_weights, options.decoders):
        for batch in options.batch:
            compare_decoding(bench, weights, batch, options.context, names)


def bench_rollout(bench: Bench) -> None:
    names = ("ours", "ours, re-reading", "transformers")
    for weights in map(load_weights, bench.options.decoders):
        compare_rollouts(bench, weights, bench.options.episodes, names)


def bench_growth(bench: Bench) -> None:
    options, ours = bench.options, ["ours"]
    weights = load_weights(options.decoders[-1])
    for times in (1, 2, 4, 8, 16):
        rows, context, count = options.rows * times // 4, options.context * times, 4 * times
        heads = Heads(rows, options.widths[:1], more={"axis": "head: rows", "x": rows})
        functions = {"ours": head_logprobs, "torch": torch_head}
        compare_heads(bench, f"head, {rows} rows", functions, heads)
        compare_decoding(bench, weights, times, options.context, ours,
                         axis="decode: batch", x=times)
        compare_decoding(bench, weights, 3, context, ours, axis="decode: context", x=context)
        compare_rollouts(bench, weights, count, ours, axis="rollout: episodes", x=count)


# ---- step ----


Step = Callable[[Batch, Tensor], Tensor]  # of batch and old, as step_inputs returns them


def step_inputs(bench: Bench, entries: int) -> tuple[Batch, Tensor]:
    """A batch, and what was computed of it before the update: the same in every call.

    Episodes are ragged, with two turns of 40 % of their tokens. The tensor [4, B, T] holds
    old_logprobs, advantages, old_values and returns.
    """
    count, low, high = (32, 600, 2500) if bench.device == "cuda" else (16, 100, 600)
    if bench.options.quick:
        count, low, high = 4, 10, 60
    lengths = sorted(ragged(1, count, math.sqrt(low * high), low, high)[0])
    place = torch.arange(lengths[-1]) / torch.tensor(lengths)[:, None]  # [B, T]
    mask = ((place > 0.3) & (place < 0.5)) | ((place >= 0.8) & (place < 1))
    batch = Batch(torch.tensor(random_ids(count, lengths[-1])), mask).to(bench.device)
    old = torch.randn(4, *mask.shape, generator=torch.Generator().manual_seed(0))
    old[0] = 0.3 * old[0] - math.log(entries)
    old[1] = 1 + old[1]
    return batch, old.to(bench.device)


def critic_loss(values: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The loss [], of which the gradients are left. old: as in step_inputs."""
    _, _, old_values, returns = old
    loss = value_loss(values, old_values, returns, mask, clip_eps=0.5).loss
    loss.backward()
    return loss.detach()


def actor_loss(logprobs: Tensor, entropy: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """As critic_loss."""
    old_logprobs, advantages, _, _ = old
    loss = policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2,
                       entropy=entropy, entropy_weight=0.001).loss
    loss.backward()
    return loss.detach()


def our_step(actor: Decoder, critic: Critic, batch: Batch, old: Tensor) -> Tensor:
    """Losses [2] of critic and actor as in reinforce.py, in about eight micro-batches.

    On a GPU they are as large as train.py makes them.
    """
    losses, lengths = torch.zeros(2, device=old.device), batch.lengths()
    max_tokens = -(-sum(lengths) // max(1, len(lengths) // 8))
    if old.is_cuda:
        max_tokens = RunSettings.micro_batch_tokens
    for group in micro_batches(lengths, max_tokens):
        packed = pack(batch, group, lengths)
        old_rows = old[:, group][:, batch.response_mask[group]]  # [4, N]
        targets = packed.ids[packed.response_mask]  # [N]
        mask = torch.ones_like(targets, dtype=bool)
        values = critic.values(packed.ids, packed.documents)[packed.response_mask]
        losses[0] += critic_loss(values, old_rows, mask)
        hidden = response_rows(actor, packed)
        losses[1] += actor_loss(*head_logprobs(hidden, actor.head_weight, targets), old_rows, mask)
    return losses


def padded_step(logits: Callable, hidden: Callable, value_weight: Tensor, batch: Batch,
                old: Tensor) -> Tensor:
    """The same from rows that are padded to the longest, eight at a time; on a GPU two.

    logits, hidden: functions of ids and of which ids are real.
    """
    losses, lengths = torch.zeros(2, device=old.device), batch.lengths()
    places = torch.arange(batch.ids.shape[1], device=old.device)
    real = (places < torch.tensor(lengths, device=old.device)[:, None]).long()
    for rows in torch.arange(len(real)).split(2 if old.is_cuda else 8):
        ids, attended = batch.ids[rows], real[rows]
        old_rows, mask = old[:, rows, 1:], batch.response_mask[rows, 1:]
        values = F.linear(hidden(ids, attended)[:, :-1], value_weight).squeeze(-1).float()
        losses[0] += critic_loss(values, old_rows, mask)
        log_p = F.log_softmax(logits(ids, attended)[:, :-1].float(), -1)  # [8, T - 1, V]
        logprobs = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
        losses[1] += actor_loss(logprobs, -(log_p.exp() * log_p).sum(-1), old_rows, mask)
    return losses


def decoder_and_critic(bench: Bench, weights: Weights, value_weight: Tensor,
                       dtype: torch.dtype) -> tuple[Decoder, Critic]:
    decoder = load_decoder(weights.folder, dtype=dtype, device=bench.device)
    critic = Critic.from_decoder(decoder)
    critic.value_head.weight.data.copy_(value_weight)
    return decoder, critic


def load_step(bench: Bench, weights: Weights, value_weight: Tensor, dtype: torch.dtype,
              name: str) -> Step:
    """A step that clears the gradients which it leaves. Weights are float32, products dtype."""
    if name == "ours":
        actor, critic = decoder_and_critic(bench, weights, value_weight, torch.float32)
        actor.compute_dtype = critic.backbone.compute_dtype = dtype
        step = functools.partial(our_step, actor, critic)
    else:
        library = import_module("transformers")
        actor, critic = (
            kind.from_pretrained(weights.folder, dtype=torch.float32).to(bench.device)
            for kind in (library.AutoModelForCausalLM, library.AutoModel))
        step = functools.partial(
            padded_step, lambda ids, real: actor(ids, attention_mask=real).logits,
            lambda ids, real: critic(ids, attention_mask=real).last_hidden_state,
            nn.Parameter(value_weight.float()))

    def run(batch: Batch, old: Tensor) -> Tensor:
        is_mixed = name != "ours" and dtype != torch.float32
        with torch.autocast(bench.device, dtype, enabled=is_mixed):
            losses = step(batch, old)
        actor.zero_grad()
        critic.zero_grad()
        return losses

    return run


def bench_step(bench: Bench) -> None:
    """One update: gradients of actor and critic."""
    weights = load_weights(bench.options.decoders[0 if bench.device == "cuda" else -1])
    width, entries = weights.config["hidden_size"], weights.config["vocab_size"]
    batch, old = step_inputs(bench, entries)
    few = (Batch(batch.ids[:2], batch.response_mask[:2]), old[:, :2])
    value_weight = torch.linspace(-0.05, 0.05, width, device=bench.device)[None]
    num_tokens, num_responses = sum(batch.lengths()), int(batch.response_mask.sum())
    body_flop = 2 * (weights.num_weights - weights.head_weights) * num_tokens
    flop = 6 * (body_flop + weights.head_weights * num_responses)

    def make(dtype: torch.dtype, name: str) -> Implementation:
        step = load_step(bench, weights, value_weight, dtype, name)

        def error() -> float:
            actor, critic = decoder_and_critic(bench, weights, value_weight, torch.float64)
            hidden = critic.backbone.hidden
            plain = padded_step(lambda ids, _: actor(ids), lambda ids, _: hidden(ids),
                                critic.value_head.weight, *few)
            return relative_error([step(*few)], [plain])

        return Implementation(lambda: step(batch, old), error, TOLERANCE[dtype])

    for dtype in (torch.bfloat16, torch.float32):  # the shorter one first
        name = (f"{weights.name}, {str(dtype).split('.')[1]}, {len(batch.ids)} episodes, "
                f"{num_tokens} tokens, {num_responses} of them the agent's")
        _, gemm = rates(bench.device, dtype, bench.options.quick)
        floor = "6 P FLOP for each token in actor and critic, the head for the agent's alone"
        case = Case(name, num_tokens, "tokens", floor, flop / gemm, {"gemm": gemm})
        compare(bench, case, ("ours", "transformers, padded"), functools.partial(make, dtype))


# ---- search ----


def bench_search(bench: Bench) -> None:
    """The best three of random vectors for 1 and 64 queries."""
    options, device = bench.options, torch.device(bench.device)
    rows, width = options.index_rows, 64 if options.quick else 768
    vectors = torch.empty(rows, width, dtype=torch.float16, device=device)
    for part in vectors.split(2**20):
        part.normal_(std=width**-0.5)

    @functools.cache
    def search(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Of queries and vectors: the scores of the best."""
        if name == "ours":
            return lambda q, x: torch.from_numpy(TorchIndex(x).search(q, 3)[0])
        if name == "torch":
            return lambda q, x: (q.to(x.dtype) @ x.T).topk(3).values.cpu()
        faiss = import_module("faiss")
        kept: dict[int, Any] = {}

        def by_faiss(q: Tensor, x: Tensor) -> Tensor:
            if len(x) not in kept:
                kept[len(x)] = faiss.IndexScalarQuantizer(
                    width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
                for part in x.split(2**18):
                    kept[len(x)].add(part.float().cpu().numpy())
            return torch.from_numpy(kept[len(x)].search(q.cpu().numpy(), 3)[0])

        faiss.omp_set_num_threads(options.threads)
        return by_faiss

    for num_queries in (1, 64):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(num_queries, width, generator=generator).to(device)

        def make(name: str, queries: Tensor = queries) -> Implementation:
            few, is_rounded = vectors[:1000], name == "torch"
            exact = (queries.double() @ few.double().T).topk(3).values.cpu()
            return Implementation(lambda: search(name)(queries, vectors),
                                  lambda: relative_error([search(name)(queries, few)], [exact]),
                                  TOLERANCE[torch.bfloat16 if is_rounded else torch.float32])

        floor_s = max(vectors.nbytes / bench.read, 2 * num_queries * vectors.numel() / bench.gemm)
        case = Case(f"{num_queries} queries, {rows} vectors of width {width}", num_queries,
                    "queries", "the vectors are read once, or 2 B N D FLOP", floor_s)
        compare(bench, case, ("ours", "torch", "faiss"), make)


# ---- encoder ----


def bench_encoder(bench: Bench) -> None:
    """Passages of 100 words each, in float32 and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        compare_encoders(bench, dtype)


def compare_encoders(bench: Bench, dtype: torch.dtype) -> None:
    options = bench.options
    with open(ROOT / "world" / "corpus.jsonl", encoding="utf-8") as file:
        words = " ".join(json.loads(line)["contents"] for line in file).split()
    starts = range(0, 800 if options.quick else 6400, 100)
    passages = [" ".join(words[start : start + 100]) for start in starts]
    encoder = load_encoder(options.encoder_dir, dtype=dtype, device=options.device)
    exact = load_encoder(options.encoder_dir, dtype=torch.float64, device=options.device)

    def make(name: str) -> Implementation:
        embed = functools.partial(encoder.embed, kind="passage")
        if name != "ours":
            library = import_module("sentence_transformers")
            peer = library.SentenceTransformer(options.encoder_dir, device=options.device,
                                               model_kwargs={"torch_dtype": dtype})
            peer.max_seq_length = encoder.tokenizer.truncation["max_length"]
            embed = functools.partial(
                peer.encode, prompt=encoder.prefixes["passage"], batch_size=64,
                normalize_embeddings=True, convert_to_tensor=True)

        def error() -> float:
            expected = exact.embed(passages[:8], kind="passage", batch_size=1)
            return relative_error([embed(passages[:8])], [expected])

        return Implementation(lambda: embed(passages), error, TOLERANCE[dtype])

    texts = [encoder.prefixes["passage"] + text for text in passages]
    num_tokens = int(encoder.encode(texts)[1].sum())
    flop = 2 * num_tokens * sum(p.numel() for p in encoder.encoder.parameters())
    name = f"{len(passages)} passages, {num_tokens} tokens, {str(dtype).removeprefix('torch.')}"
    _, gemm = rates(bench.device, dtype, options.quick)
    case = Case(name, len(passages), "passages", "2 P FLOP for each token", flop / gemm,
                {"gemm": gemm})
    compare(bench, case, ("ours", "sentence-transformers"), make)


# ---- the program ----

BENCHES = {"head": bench_head, "divergence": bench_divergence, "decode": bench_decode,
           "rollout": bench_rollout, "step": bench_step, "search": bench_search,
           "encoder": bench_encoder, "growth": bench_growth}


class Size(NamedTuple):
    """A size of the races, and its default."""

    cpu: Any
    cuda: Any
    quick: Any
    help: str


SIZES = {
    "repeats": Size(5, 20, 2, "timed rounds"),
    "rows": Size(512, 16_384, 48, "rows of the head; half of them for divergence"),
    "batch": Size([1, 4, 16, 32], [64, 256, 512], [1, 3], "decode: sequences"),
    "context": Size(128, 1024, 24, "tokens of a prompt"),
    "new_tokens": Size(64, 128, 24, "decode: tokens after the first one"),
    "episodes": Size(64, 256, 8, "rollout: questions"),
    "rollout_rows": Size(32, 256, 4, "rollout: episodes at once"),
    "observation": Size(150, 400, 6, "rollout: tokens between two turns"),
    "index_rows": Size(1_000_000, 21_015_324, 2000, "search: vectors"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Options of a run, with the defaults of the device.

    Also decoders: names for load_weights; widths: of the student's and the teacher's head.
    """
    parser = Parser("experiments.bench", description=__doc__.split("\n")[0])
    names = [*BENCHES, "all"]
    add = parser.add_argument
    add("names", nargs="+", choices=names, metavar="NAME", help=" ".join(names))
    add("--out", default="runs/bench/results.json", help="file of the rows (default %(default)s)")
    add("--quick", action="store_true", help="tiny sizes: does it run?")
    add("--compile", action="store_true", help="race compiled peers, too (needs a C++ compiler)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=count, default=torch.get_num_threads())
    add("--encoder-dir", default=str(ROOT / "world" / "encoder"), metavar="DIR",
        help="a BERT-type checkpoint")
    add("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help="decoders with random weights")
    add("--checkpoint", metavar="DIR", help="a decoder in place of --shapes")
    add("--gguf", default="", metavar="FILE", help="the checkpoint's weights, for llama.cpp")
    for name, size in SIZES.items():
        nargs = "+" if isinstance(size.cpu, list) else None
        add("--" + name.replace("_", "-"), type=count, nargs=nargs, metavar="N", help=size.help)
    options = parser.parse_args(argv)
    if options.checkpoint and options.shapes:
        parser.error("got --checkpoint and --shapes, expected one of them")
    if options.gguf and not (options.checkpoint and Path(options.gguf).is_file()):
        parser.error(f"--gguf {options.gguf}: expected a file with the weights of --checkpoint DIR")
    for name, size in SIZES.items():
        if getattr(options, name) is None:
            default = size.cuda if options.device == "cuda" else size.cpu
            setattr(options, name, size.quick if options.quick else default)
    large, tiny = list(SHAPES)[:2], list(SHAPES)[2:]
    options.decoders = options.shapes or (tiny if options.quick else large)
    if options.checkpoint:
        options.decoders = [options.checkpoint]
    options.widths = [64, 96] if options.quick else [896, 2048]
    options.argv = argv
    return options


def report(argv: list[str]) -> None:
    parser = Parser("experiments.bench report", description="Rows as markdown.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows of growth")
    options = parser.parse_args(argv)
    documents = [read_json(path) for path in options.files]
    print("\n".join(map(markdown, documents)))
    if options.plot:
        growth = [document["growth"] for document in documents if "growth" in document]
        rows = [row for bench in growth for row in bench["rows"] if "seconds" in row]
        plot_growth(rows, options.plot)


def main(argv: list[str]) -> None:
    if argv[:1] == ["report"]:
        return report(argv[1:])
    options = parse(argv)
    torch.set_num_threads(options.threads)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1",
                      HF_HUB_OFFLINE="1")
    for name in BENCHES if "all" in options.names else options.names:
        bench = Bench(name, options)
        try:
            BENCHES[name](bench)
        except Exception as problem:
            status = f"not measured: {problem!r}"
            bench.save([{"case": name, "implementation": "all", "status": status}])
            print(f"{name}: {status}", flush=True)
    print(f"{options.out}: python -m experiments.bench report {options.out}")


if __name__ == "__main__":
    with reporting("experiments.bench"):
        main(sys.argv[1:])
