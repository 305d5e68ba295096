"""Speed and memory of what this project computes itself, beside the packages a user would take in its place.

    python bench.py head decode --out runs/bench/results.json          measure: names below, or all; --quick: tiny sizes
    python bench.py report runs/bench/results.json --plot growth.png   saved rows as markdown; growth as a picture

    head        log-probabilities (and entropy) of tokens, with gradients   torch, TRL, Liger, cut-cross-entropy
    divergence  Eq. 1 against a teacher's head, with gradients              torch, Liger
    decode      tokens a second after the first one                         transformers, llama.cpp
    rollout     episodes a second, turns of given ragged lengths            transformers in lock step, ours re-reading
    step        one PPO update of actor and critic, optimizer apart         transformers, padded
    encoder     passages a second                                           sentence-transformers
    growth      time and memory against rows, batch, context, episodes      ours alone

Ours and the peers (requirements-bench.txt) take turns in one process, on the same weights, tokens and dtype; a
difference is in the name. The first call is set apart as compilation. Then a small result is held against plain
formulas in higher precision: what is off is a row "wrong", what cannot run a row "not measured". Times are medians,
memory is the largest rise above what was held before a call. A floor is work that nobody can avoid, by the printed
formula, at the rates measured in the same run: bytes read, or FLOP of a GEMM, in a second.

Legend: N rows, B batch, T tokens, D width, V vocabulary, P parameters.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import rollout
from data import Question
from dgpo import kd_loss, policy_loss, value_loss
from episode import Batch, micro_batches, pack
from kernels import head_divergence, head_logprobs
from model import Critic, Decoder, load_decoder, load_encoder, new_decoder
from reinforce import token_logprobs
from rollout import Policy, RolloutSettings
from weights import read_json, save_tensors, write_aside

ROOT = Path(__file__).parent
WEIGHTS = ROOT / "runs" / "bench"  # of random decoders
PEERS = ("transformers", "trl", "liger-kernel", "cut-cross-entropy", "llama-cpp-python", "sentence-transformers")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # largest difference over largest value
HEADER = ["case", "implementation", "median", "IQR", "rate", "peak memory", "of floor", "of best peer", "first call"]
Tokens = list[list[int]]  # ids, or numbers of them, for each row


# ---- measuring ----


class Implementation(NamedTuple):
    run: Callable[[], Any]  # the timed call; if it returns {"seconds": ...}, that counts in place of its wall time
    error: Callable[[], float]  # of a small result
    tolerance: float


def median_and_iqr(values: list[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else values * 3
    return middle, high - low


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Largest difference over largest expected value, of the worst pair; NaN if there is one."""
    pairs = [(x.float(), y.float()) for x, y in zip(found, expected, strict=True)]
    return torch.stack([(x - y).abs().max() / y.abs().max() for x, y in pairs]).max().item()


def peak_bytes(device: str, *, begins_anew: bool = False) -> int | None:
    """The most that was held since the peak was last made to begin anew, with what is held now; None: not told here."""
    try:
        if device == "cuda":
            if begins_anew:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated()
        if begins_anew:
            trim()
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, AttributeError):  # no Linux, no glibc
        return None


def trim() -> None:
    """Hand back what the allocator kept of earlier calls: it would hide a rise, and save the next call page faults."""
    ctypes.CDLL(None).malloc_trim(0)


def measure(call: Callable[[], Any], device: str) -> dict[str, float]:
    gc.collect()
    before = peak_bytes(device, begins_anew=True)
    started = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    wall_s = time.perf_counter() - started
    numbers = {"seconds": wall_s, "wall_s": wall_s} | (result if isinstance(result, dict) else {})
    return numbers if before is None else numbers | {"peak_bytes": peak_bytes(device) - before}


def compare(bench: "Bench", case: str, names: Iterable[str], make: Callable[[str], Implementation], *, work: float,
            unit: str, floor: tuple[str, float], **more: Any) -> None:
    """A row for each implementation, whatever becomes of it. work: units a call does; floor: (formula, seconds)."""
    print(f"{bench.name}: {case}; floor {duration(floor[1])} = {floor[0]}", flush=True)
    more |= {"case": case, "status": "measured", "unit": unit, "floor": floor[0], "floor_s": floor[1]}
    rows = {name: {"implementation": name} | more for name in names}
    samples: dict[str, list[dict]] = {name: [] for name in rows}
    ready: dict[str, Implementation] = {}
    for repeat in range(-1, bench.options.repeats):  # -1: make, call once, check
        for name, row in rows.items():
            try:
                if repeat < 0:
                    made = make(name)
                    row["first_s"] = measure(made.run, bench.device)["wall_s"]
                    row["error"] = made.error()
                    if row["error"] <= made.tolerance:
                        ready[name] = made
                    else:  # NaN, too
                        row["status"] = f"wrong: error {row['error']:.1e}, tolerance {made.tolerance:.0e}"
                elif name in ready:
                    samples[name].append(measure(ready[name].run, bench.device))
                    row |= {key: statistics.median(s[key] for s in samples[name]) for key in samples[name][0]}
                    row["seconds"], row["iqr_s"] = median_and_iqr([s["seconds"] for s in samples[name]])
                    row |= {"rate": work / row["seconds"], "of_floor": row["seconds"] / floor[1]}
            except Exception as problem:
                row["status"] = f"not measured: {type(problem).__name__}: {problem}".split("\n")[0][:200]
                ready.pop(name, None)
        done = {name: rows[name] for name in ready if samples[name]}
        peers = {row["seconds"]: name for name, row in done.items() if not name.startswith("ours")}
        for name, row in done.items():
            if peers and name.startswith("ours"):
                row |= {"best_peer": peers[min(peers)], "of_best_peer": row["seconds"] / min(peers)}
        bench.save(list(rows.values()))  # after every round: an interrupted run keeps what it has
    print("".join(f"  {' | '.join(filter(None, cells(row)[1:]))}\n" for row in rows.values()), end="", flush=True)


# ---- rows: kept and shown ----


class Bench:
    """One bench of a run; its rows go to a file {bench: {..., "rows": [...]}} that keeps those of the other benches."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options, self.device = name, options, options.device
        in_16_bit = name in ("decode", "rollout", "growth") or (self.device == "cuda" and name != "encoder")
        self.dtype = torch.bfloat16 if in_16_bit else torch.float32
        gc.collect()
        gc.freeze()  # the libraries: looking through them before each call would take longer than many a call
        self.read, self.gemm = rates(self.device, self.dtype, options.quick)
        self.about = about(options) | {"dtype": str(self.dtype).split(".")[1], "read": self.read, "gemm": self.gemm}
        self.rows: dict[tuple[str, str], dict] = {}

    def save(self, rows: list[dict]) -> None:
        """Add rows, or replace those of the same case and implementation, and write the file."""
        self.rows |= {(row["case"], row["implementation"]): row for row in rows}
        path = Path(self.options.out)
        everything = read_json(path, {}) | {self.name: self.about | {"rows": list(self.rows.values())}}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(path, lambda partial: partial.write_text(json.dumps(everything, indent=1) + "\n"))


def rates(device: str, dtype: torch.dtype, quick: bool) -> tuple[float, float]:
    """(bytes read, FLOP of a square GEMM) in a second."""
    x = torch.ones(2**22 if quick else 2**28, device=device)  # 1 GiB, beyond any cache
    width = 256 if quick else 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, width, width, device=device).to(dtype)
    read, gemm = (statistics.median(measure(f, device)["seconds"] for _ in range(5)) for f in (x.sum, lambda: a @ b))
    return x.nbytes / read, 2 * width**3 / gemm


def about(o: argparse.Namespace) -> dict:
    installed = {package.name.lower().replace("_", "-"): package.version for package in metadata.distributions()}
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "CPU")
    machine = torch.cuda.get_device_name() if o.device == "cuda" else f"{cpu} ({os.cpu_count()} cores)"
    return {"commit": git.stdout.strip(), "date": str(date.today()), "machine": machine, "threads": o.threads,
            "repeats": o.repeats, "command": " ".join(["python bench.py", *o.argv]),
            "versions": {name: installed.get(name, "absent") for name in ("torch", *PEERS)}}


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def cells(row: dict) -> list[str]:
    """A row as text, under HEADER; of the first call, what it took beyond the median."""
    if row["status"] != "measured" or "rate" not in row:
        return [row["case"], row["implementation"], row["status"]] + [""] * (len(HEADER) - 3)
    tokens = f", {row['tokens'] / row['seconds']:,.4g} tokens/s" if "tokens" in row else ""
    peak = f"{row['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in row else "not measured"
    of_peer = f"{row['of_best_peer']:.2f} x {row['best_peer']}" if "best_peer" in row else ""
    return [row["case"], row["implementation"], duration(row["seconds"]), duration(row["iqr_s"]),
            f"{row['rate']:,.4g} {row['unit']}/s{tokens}", peak, f"{row['of_floor']:.2f} x", of_peer,
            "+" + duration(max(0.0, row["first_s"] - row["wall_s"]))]


def markdown(document: dict) -> str:
    lines = []
    for name, saved in document.items():
        versions = ", ".join(f"{package} {version}" for package, version in saved["versions"].items())
        lines += [f"## {name}", "", f"`{saved['command']}`: {saved['machine']}, {saved['threads']} threads, "
                  f"{saved['dtype']}, median of {saved['repeats']}; reads {saved['read'] / 1e9:.1f} GB/s, GEMM "
                  f"{saved['gemm'] / 1e9:,.0f} GFLOP/s; commit {saved['commit']}, {saved['date']}; {versions}.", ""]
        for row in (HEADER, ["---"] * len(HEADER), *map(cells, saved["rows"])):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        lines += ["", *dict.fromkeys(f"Floor: {row['floor']}." for row in saved["rows"] if "floor" in row), ""]
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """Time and memory against size, log-log; along the dotted line twice the size costs twice as much."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = pyplot.subplots(2, len(names), figsize=(3.4 * len(names), 6), squeeze=False)
    for panel, (key, name) in zip(panels.flat, ((k, n) for k in ("seconds", "peak_bytes") for n in names), strict=True):
        x, y = zip(*((row["x"], row.get(key, 0)) for row in rows if row["axis"] == name), strict=True)
        panel.loglog(x, y, "o-", x, [y[0] * size / x[0] for size in x], "k:")
        panel.set(xlabel=name, ylabel=key)
        panel.tick_params(axis="x", which="minor", labelbottom=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- head and divergence: functions of targets [N], hidden [N, D], weight [V, D], and of a teacher's two ----


def head_inputs(bench: Bench, rows: int, entries: int, widths: list[int], peak: float) -> list[Tensor]:
    """peak: how far the hidden state points to its target, as after training."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(entries, (rows,), generator=generator)]
    for width in widths:
        weight = torch.randn(entries, width, generator=generator) * 0.02
        inputs += [torch.randn(rows, width, generator=generator) + peak * weight[inputs[0]], weight]
    return [x.to(bench.device, bench.dtype if x.is_floating_point() else x.dtype) for x in inputs]


def with_gradients(function: Callable, targets: Tensor, *heads: Tensor) -> list[Tensor]:
    """What the function returns, and the gradients of hidden and weight, under an upstream that differs by row."""
    hidden, weight = (x.detach().requires_grad_() for x in heads[:2])
    values = tuple(function(targets, hidden, weight, *heads[2:]))
    torch.autograd.backward(values, [torch.linspace(0.5, 2, v.numel()).view(v.shape).to(v) for v in values])
    return [*(value.detach() for value in values), hidden.grad, weight.grad]


def compare_heads(bench: Bench, case: str, functions: dict[str, Callable], rows: int, widths: list[int],
                  peak: float = 0.0, **more: Any) -> None:
    """"torch" in float64 is the reference, at the vocabularies of Qwen2.5 and Llama 3."""
    vocabularies = [1000, 777] if bench.options.quick else [151_936, 128_256]
    inputs = head_inputs(bench, rows, vocabularies[0], widths, peak)
    if bench.options.compile:
        functions["torch, compiled"] = torch.compile(functions["torch"])

    @functools.cache
    def reference(entries: int) -> tuple[list[Tensor], list[Tensor]]:
        few = head_inputs(bench, 16, entries, widths, peak)
        double = [x.double() if x.is_floating_point() else x for x in few]
        return few, [x.float() for x in with_gradients(functions["torch"], *double)]

    def error(name: str, entries: int) -> float:
        few, exact = reference(entries)
        return relative_error(with_gradients(functions[name], *few), exact)

    def make(name: str) -> Implementation:
        return Implementation(lambda: with_gradients(functions[name], *inputs),
                              lambda: max(error(name, entries) for entries in vocabularies), TOLERANCE[bench.dtype])

    flop = 2 * rows * vocabularies[0] * (3 * widths[0] + sum(widths[1:]))
    formula = "3 GEMMs of 2 N V D FLOP" + ", and 1 with the teacher's head" * len(widths[1:])
    names = ["ours"] if "axis" in more else functions
    compare(bench, case, names, make, work=rows, unit="rows", floor=(formula, flop / bench.gemm), **more)


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, V], all of them at once, in fp32 (or fp64) from the logits on."""
    return F.log_softmax(hidden @ weight.T, -1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def torch_head(y: Tensor, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    log_p = log_probs(h, w)
    return log_p.gather(-1, y[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def torch_divergence(ce: float, y: Tensor, h: Tensor, w: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor]:
    log_p, log_q = log_probs(h, w), log_probs(g, u)
    return ((log_q.exp() * (log_q - log_p)).sum() - ce * log_p.gather(-1, y[:, None]).sum(),)


def bench_head(bench: Bench) -> None:
    def trl(y: Tensor, h: Tensor, w: Tensor, *outputs: str) -> tuple[Tensor, ...]:  # tiles as in TRL's trainers
        function = import_module("trl.kernels").ChunkedLogProbFunction
        return function.apply(h, w, None, y, 1.0, 32_768, None, 1.0, outputs)[: 1 + len(outputs)]

    liger, apple = "liger_kernel.chunked_loss.fused_linear_ppo", "cut_cross_entropy"
    chunks = nn.LinearCrossEntropyOptions()  # as torch chooses them
    both = {"ours": lambda y, h, w: head_logprobs(h, w, y), "torch": torch_head, "TRL": lambda *x: trl(*x, "entropy")}
    first = {
        "ours": lambda y, h, w: head_logprobs(h, w, y)[:1],
        "torch": lambda y, h, w: (log_probs(h, w).gather(-1, y[:, None]).squeeze(-1),),
        "torch, chunked": lambda y, h, w: (-F.linear_cross_entropy(h, w, y, reduction="none", options=chunks),),
        "TRL": trl,
        "Liger": lambda y, h, w: import_module(liger).LigerFusedLinearPPOBase.chunk_forward(h[None], w, y[None]),
        "cut-cross-entropy": lambda y, h, w: (-import_module(apple).linear_cross_entropy(h, w, y, reduction="none"),),
    }
    sizes = bench.options.rows, [64 if bench.options.quick else 896]
    compare_heads(bench, "log-probabilities and entropy", both, *sizes)
    compare_heads(bench, "log-probabilities", first, *sizes)
    compare_heads(bench, "log-probabilities, peaked", first, *sizes, peak=40.0)  # p about 0.9


def bench_divergence(bench: Bench) -> None:
    def liger(ce: float, y: Tensor, *heads: Tensor) -> tuple[Tensor]:  # beta 0: KL(teacher || student); a mean
        loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
        return (loss(ce, 1.0, beta=0.0, compiled=bench.options.compile)(*heads, y) * len(y),)

    def liger_triton(y: Tensor, *heads: Tensor) -> tuple[Tensor]:
        return (import_module("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.0)(*heads, None) * len(y),)

    for ce, case in ((1.0, "CE + KL(teacher || student)"), (0.0, "KL(teacher || student)")):
        functions = {"ours": lambda y, *heads, ce=ce: head_divergence(kd_loss, *heads, y, ce_weight=ce)[:1],
                     "torch": functools.partial(torch_divergence, ce), "Liger": functools.partial(liger, ce)}
        compare_heads(bench, case, functions | ({} if ce else {"Liger, Triton": liger_triton}),
                      max(1, bench.options.rows // 2), [64, 96] if bench.options.quick else [896, 2048])


# ---- decode and rollout: random prompts, greedy, every turn ends after a given number of tokens ----

KEYS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "vocab_size", "rope_theta", "architectures")
SHAPES = {name: dict(zip(KEYS, values, strict=True)) | {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}
          for name, *values in (
              ("Qwen2.5-0.5B", "qwen2", 24, 896, 14, 2, 4864, 151_936, 1e6, ["Qwen2ForCausalLM"]),
              ("SmolLM2-135M", "llama", 30, 576, 9, 3, 1536, 49_152, 1e5, ["LlamaForCausalLM"]),
              ("tiny-qwen2", "qwen2", 2, 64, 4, 2, 128, 512, 1e4, ["Qwen2ForCausalLM"]),
              ("tiny-llama", "llama", 2, 96, 3, 3, 128, 512, 1e4, ["LlamaForCausalLM"]))}


def weights_of(shape: str) -> Path:
    """A folder of random weights in bfloat16, written when it is first asked for.

    Layers weigh more than at initialisation: else a tied decoder repeats its last token, and no check sees attention.
    """
    folder = WEIGHTS / shape
    if read_json(folder / "config.json", {}) != SHAPES[shape] | {"torch_dtype": "bfloat16"}:
        decoder, generator = new_decoder(SHAPES[shape], 0), torch.Generator().manual_seed(1)
        for name, weight in decoder.model.layers.named_parameters():
            if weight.ndim == 2 or name.endswith("bias"):
                nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5, generator=generator)
        save_tensors(folder, SHAPES[shape], decoder.bfloat16().state_dict())
    return folder


def num_weights(shape: str) -> int:
    return sum(tensor.numel() for tensor in load_file(weights_of(shape) / "model.safetensors").values())


def ragged(count: int, turns: int, typical: float, shortest: int, longest: int) -> Tokens:
    draw = random.Random(0)
    return [[min(longest, max(shortest, round(draw.lognormvariate(math.log(typical), 0.6)))) for _ in range(turns)]
            for _ in range(count)]


def random_ids(count: int, length: int) -> Tokens:
    return [random.Random(seed).choices(range(500), k=length) for seed in range(count)]


def play(decoder: Decoder, prompts: Tokens, lengths: Tokens, observation: list[int], rows: int, *,
         cuda_graphs: bool = False) -> Tokens:
    """The tokens of each agent, from our engine; turns last lengths[episode][turn] in place of what it would decide."""

    def end_of_turn(row: Any, tokenizer: Any, settings: RolloutSettings) -> str | None:
        if len(row.episode.segments[-1].ids) < lengths[row.index][row.turn]:
            return None
        row.episode.status = "answered" if row.turn == settings.max_turns else ""
        return None if row.episode.status else "query"

    longest = max(map(len, prompts)) + max(map(sum, lengths)) + len(lengths[0]) * len(observation)
    settings = RolloutSettings(max_turns=len(lengths[0]) - 1, max_new_tokens=longest, max_obs_tokens=longest,
                               max_context_tokens=longest + 2, temperature=0.0, prompt="row", rollout_rows=rows,
                               cuda_graphs=cuda_graphs)
    tokenizer = SimpleNamespace(size=decoder.config.vocab_size, eos_id=-1, pad_id=0, containing=lambda _: frozenset(),
                                decode=lambda ids: "", encode=lambda text: list(observation),
                                chat=lambda messages: list(messages[0]["content"]))
    questions = [Question(str(i), "", (), "", prompt=[{"content": ids}]) for i, ids in enumerate(prompts)]
    retriever = SimpleNamespace(search=lambda queries, top_k: [[] for _ in queries])
    with patch.object(rollout, "_end_of_turn", end_of_turn):
        episodes = rollout.generate(Policy(decoder, tokenizer), retriever, questions, settings, seed=0)
    return [[i for s in episode.segments if s.author == "agent" for i in s.ids] for episode in episodes]


def by_turns(turn: Callable[[Tokens, list[int]], Tokens], prompts: Tokens, lengths: Tokens, observation: list[int],
             rows: int) -> Tokens:
    """What one writes around an engine without turns: the rows of a batch wait for the longest and read all again."""
    written: Tokens = [[] for _ in prompts]
    for batch in torch.arange(len(prompts)).split(rows):
        contexts = [list(prompts[i]) for i in batch]
        for k in range(len(lengths[0])):
            for i, context, new in zip(batch, contexts, turn(contexts, [lengths[i][k] for i in batch]), strict=True):
                written[i] += new
                context += new + observation
    return written


def transformers_turn(model: Any, options: dict, contexts: Tokens, wanted: list[int]) -> Tokens:
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(c)) + c for c in contexts], device=model.device)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=model.device)
    new = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(wanted),
                         pad_token_id=0, **options)[:, width:].tolist()
    return [tokens[:count] for tokens, count in zip(new, wanted, strict=True)]


@functools.cache
def llama_cpp_model(folder: Path) -> SimpleNamespace:
    """The weights of a folder, written as llama.cpp reads them (16-bit floats, no vocabulary), and loaded."""
    gguf, lib, path = import_module("gguf"), import_module("llama_cpp"), folder / "f16.gguf"
    public = read_json(folder / "config.json")
    family, layers, width, heads, kv_heads, inner, entries, theta = (public[key] for key in KEYS[:8])
    writer = gguf.GGUFWriter(path, family)
    for name, value in (("block_count", layers), ("context_length", 8192), ("embedding_length", width),
                        ("feed_forward_length", inner), ("vocab_size", entries), ("attention.head_count", heads),
                        ("attention.head_count_kv", kv_heads)):
        writer.add_uint32(f"{family}.{name}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", public["rms_norm_eps"])
    writer.add_float32(f"{family}.rope.freq_base", theta)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):  # pairs of channels side by side, not halves
            tensor = tensor.view(-1, 2, width // heads // 2, width).transpose(1, 2).reshape(-1, width)
        array = (tensor.float() if tensor.ndim == 1 else tensor.half()).numpy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    silence = lib.llama_log_callback(lambda *_: None)  # must live as long as the library
    lib.llama_log_set(silence, None)
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    return SimpleNamespace(lib=lib, model=model, entries=entries, silence=silence)


def llama_cpp_turn(loaded: SimpleNamespace, threads: int, contexts: Tokens, wanted: list[int]) -> Tokens:
    """Through its batched interface, greedy."""
    lib, params = loaded.lib, loaded.lib.llama_context_default_params()
    params.n_ctx = len(contexts) * (max(map(len, contexts)) + max(wanted))
    params.n_seq_max, params.n_batch = len(contexts), sum(map(len, contexts))
    params.n_threads = params.n_threads_batch = threads
    context, batch = lib.llama_init_from_model(loaded.model, params), lib.llama_batch_init(params.n_batch, 0, 1)
    written: Tokens = [[] for _ in contexts]
    for _ in range(max(wanted)):
        n, last = 0, []
        for row, (read, own) in enumerate(zip(contexts, written, strict=True)):
            for position, token in [(len(read) + len(own) - 1, own[-1])] if own else enumerate(read):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position, 1, row
                batch.logits[n], n = False, n + 1
            batch.logits[n - 1] = True
            last.append(n - 1)
        batch.n_tokens = n
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for own, at in zip(written, last, strict=True):
            logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, at), (loaded.entries,))
            own.append(int(logits.argmax()))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return [tokens[:count] for tokens, count in zip(written, wanted, strict=True)]


def load_engine(name: str, shape: str, o: argparse.Namespace, dtype: torch.dtype) -> Callable[..., Tokens]:
    """A function of what play takes after its decoder."""
    folder, partial = weights_of(shape), functools.partial
    if name == "llama.cpp, F16":
        return partial(by_turns, partial(llama_cpp_turn, llama_cpp_model(folder), o.threads))
    if name.startswith("transformers"):
        model = import_module("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(o.device)
        options = {"cache_implementation": "static"} if "static" in name else {}
        return partial(by_turns, partial(transformers_turn, model, options))
    engine = partial(play, load_decoder(folder, dtype=dtype, device=o.device), cuda_graphs="graphs" in name)
    return engine if "re-reading" not in name else lambda prompts, lengths, observation, rows: by_turns(
        lambda contexts, wanted: engine(contexts, [[n] for n in wanted], [], rows), prompts, lengths, observation,
        len(prompts))


def greedy_error(name: str, shape: str, o: argparse.Namespace, several: bool) -> float:
    """In fp32: how far below the best token, by plain forward passes, a written one is, over the largest logit."""
    lengths, prompts, observation = [[6]] * 3, random_ids(3, 16), [7, 8]
    lengths = [[3, 1, 2], [1, 4, 2], [2, 2, 1]] if several else lengths
    written, worst = load_engine(name, shape, o, torch.float32)(prompts, lengths, observation, 2), 0.0
    decoder = load_decoder(weights_of(shape), device=o.device)
    for ids, counts, tokens in zip(prompts, lengths, written, strict=True):
        rest, at = iter(tokens), []
        for count in counts:
            at += range(len(ids), len(ids) + count)
            ids = [*ids, *islice(rest, count), *observation]
        tensor = torch.tensor(ids, device=o.device)
        logits = decoder(tensor[None]).detach()[0, [i - 1 for i in at]]  # before each token of the agent
        below = logits.amax(1) - logits.gather(1, tensor[at, None])[:, 0]
        worst = max(worst, (below.max() / logits.abs().max()).item())
    return worst if [len(tokens) for tokens in written] == [sum(counts) for counts in lengths] else math.inf


def compare_engines(bench: Bench, case: str, shape: str, engines: Iterable[str], prompts: Tokens, lengths: Tokens,
                    observation: list[int], rows: int, **more: Any) -> None:
    """Of one turn, tokens a second after the first token; of several, episodes a second."""
    o, count, turns = bench.options, len(prompts), len(lengths[0])

    def make(name: str) -> Implementation:
        engine = load_engine(name, shape, o, bench.dtype)

        def timed(lengths: Tokens) -> float:
            started = time.perf_counter()
            engine(prompts, lengths, observation, rows)
            return time.perf_counter() - started

        def run() -> dict[str, float]:
            whole_s = timed(lengths)
            if turns > 1:
                return {"seconds": whole_s}
            with suppress(OSError, AttributeError):
                trim()  # both calls begin alike
            prefill_s = timed([[1]] * count)
            if prefill_s >= whole_s:
                raise RuntimeError("too short to be told from reading the prompt; raise --new-tokens")
            return {"seconds": whole_s - prefill_s, "prefill_s": prefill_s}

        return Implementation(run, lambda: greedy_error(name, shape, o, turns > 1), 2e-2 if "F16" in name else 1e-5)

    layers, width, heads, kv_heads, _, entries = (SHAPES[shape][key] for key in KEYS[1:7])
    tokens = sum(map(sum, lengths)) - count * (turns == 1)
    read = (turns > 1) * (sum(map(len, prompts)) + count * (turns - 1) * len(observation))
    length = len(prompts[0]) + (tokens / count + (turns - 1) * len(observation)) / 2
    step_bytes = 2 * num_weights(shape) + rows * length * 4 * layers * width // heads * kv_heads
    step_s = max(step_bytes / bench.read, 2 * num_weights(shape) * rows / bench.gemm)
    read_s = 2 * read * (num_weights(shape) - entries * width) / bench.gemm
    formula = "each step reads the weights and half the final keys and values, or computes 2 P B FLOP" + (
        "; each token that is read, 2 P FLOP without the head" * (turns > 1))
    what = {"work": tokens, "unit": "tokens"} if turns == 1 else {"work": count, "unit": "episodes", "tokens": tokens}
    compare(bench, case, engines, make, **what, **more, floor=(formula, tokens / rows * step_s + read_s))


def compare_decoding(bench: Bench, shape: str, batch: int, context: int, engines: Iterable[str], **more: Any) -> None:
    compare_engines(bench, f"{shape}, batch {batch}, context {context}", shape, engines, random_ids(batch, context),
                    [[1 + bench.options.new_tokens]] * batch, [], batch, **more)


def compare_rollouts(bench: Bench, shape: str, episodes: int, engines: Iterable[str], **more: Any) -> None:
    """Three turns that search and a last one."""
    o = bench.options
    lengths = ragged(episodes, 4, *((4, 1, 8) if o.quick else (100, 20, 320) if o.device == "cuda" else (30, 8, 96)))
    compare_engines(bench, f"{shape}, {episodes} episodes", shape, engines, random_ids(episodes, o.context), lengths,
                    *random_ids(1, o.observation), min(episodes, o.rollout_rows), **more)


def bench_decode(bench: Bench) -> None:
    here = ("ours, CUDA graphs", "transformers, static cache") if bench.device == "cuda" else ("llama.cpp, F16",)
    for shape in bench.options.shapes:
        for batch in bench.options.batch:
            compare_decoding(bench, shape, batch, bench.options.context, ("ours", "transformers", *here))


def bench_rollout(bench: Bench) -> None:
    for shape in bench.options.shapes:
        compare_rollouts(bench, shape, bench.options.episodes, ("ours", "ours, re-reading", "transformers") + (
            ("ours, CUDA graphs",) if bench.device == "cuda" else ()))


def bench_growth(bench: Bench) -> None:
    o, shape = bench.options, bench.options.shapes[-1]
    functions = {"ours": lambda y, h, w: head_logprobs(h, w, y), "torch": torch_head}
    for k in (1, 2, 4, 8, 16):
        compare_heads(bench, f"head, {o.rows * k // 4} rows", functions, o.rows * k // 4, [64 if o.quick else 896],
                      axis="head: rows", x=o.rows * k // 4)
        compare_decoding(bench, shape, k, o.context, ["ours"], axis="decode: batch", x=k)
        compare_decoding(bench, shape, 3, o.context * k, ["ours"], axis="decode: context", x=o.context * k)
        compare_rollouts(bench, shape, 4 * k, ["ours"], axis="rollout: episodes", x=4 * k)


# ---- step and encoder ----


def learn(values: Tensor, policy: Callable[[], tuple[Tensor, Tensor]], old: Tensor, mask: Tensor) -> Tensor:
    """Losses of critic and actor, [2], and their gradients; policy: log-probabilities and entropy."""
    critic = value_loss(values, old[2], old[3], mask, clip_eps=0.5).loss
    critic.backward()
    logprobs, entropy = policy()
    actor = policy_loss(logprobs, old[0], old[1], mask, clip_eps=0.2, entropy=entropy, entropy_weight=0.001).loss
    actor.backward()
    return torch.stack([critic, actor]).detach()


def our_step(actor: Policy, critic: Critic, batch: Batch, old: Tensor) -> Tensor:
    """As in reinforce.reinforce; old [4, B, T]: log-probabilities, advantages, values, returns."""
    lengths, losses = batch.lengths(), torch.zeros(2, device=old.device)
    for group in micro_batches(lengths, -(-sum(lengths) // max(1, len(lengths) // 8))):
        packed, given = pack(batch, group, lengths), old[:, group][:, batch.response_mask[group]]  # [4, N]
        values = critic.values(packed.ids, packed.documents)[packed.response_mask]
        losses += learn(values, functools.partial(token_logprobs, actor, packed), given, torch.ones_like(given[0]) > 0)
    return losses


def padded_step(logits: Callable, hidden: Callable, value_weight: Tensor, batch: Batch, old: Tensor) -> Tensor:
    """The same from rows padded to the longest, 8 at a time; logits, hidden: of ids and which of them are real."""
    real = torch.arange(old.shape[2], device=old.device) < torch.tensor(batch.lengths(), device=old.device)[:, None]
    losses = torch.zeros(2, device=old.device)
    for rows in torch.arange(len(real)).split(8):
        ids, attended = batch.ids[rows], real[rows].long()

        def policy(ids: Tensor = ids, attended: Tensor = attended) -> tuple[Tensor, Tensor]:
            log_p = F.log_softmax(logits(ids, attended)[:, :-1].float(), -1)  # [8, T - 1, V]
            return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

        values = F.linear(hidden(ids, attended)[:, :-1], value_weight).squeeze(-1).float()  # [8, T - 1]
        losses += learn(values, policy, old[:, rows, 1:], batch.response_mask[rows, 1:])
    return losses


def bench_step(bench: Bench) -> None:
    o, shape = bench.options, bench.options.shapes[0 if bench.device == "cuda" else -1]
    folder, width, entries = weights_of(shape), SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    count, low, high = (4, 10, 60) if o.quick else (64, 600, 2500) if o.device == "cuda" else (16, 100, 600)
    lengths = sorted(ragged(1, count, math.sqrt(low * high), low, high)[0])
    place = torch.arange(lengths[-1]) / torch.tensor(lengths)[:, None]  # [B, T]; two turns with 40 % of the tokens
    mask = ((place > 0.3) & (place < 0.5)) | ((place >= 0.8) & (place < 1))
    batch = Batch(torch.tensor(random_ids(count, lengths[-1])), mask).to(o.device)
    old = torch.randn(4, *mask.shape, generator=torch.Generator().manual_seed(0))
    old[0], old[1] = 0.3 * old[0] - math.log(entries), 1 + old[1]
    old, few = old.to(o.device), Batch(batch.ids[:2], batch.response_mask[:2])
    value_weight = torch.linspace(-0.05, 0.05, width, device=o.device)[None]

    def our_models(dtype: torch.dtype) -> tuple[Decoder, Critic]:
        decoder = load_decoder(folder, dtype=dtype, device=o.device)
        critic = Critic.from_decoder(decoder)
        critic.value_head.weight.data.copy_(value_weight)
        return decoder, critic

    def make(name: str) -> Implementation:
        if name == "ours":
            actor, critic = our_models(bench.dtype)
            step = functools.partial(our_step, Policy(actor, SimpleNamespace(size=entries)), critic)
        else:
            library, head = import_module("transformers"), nn.Parameter(value_weight.to(bench.dtype))
            actor, critic = (kind.from_pretrained(folder, dtype=bench.dtype).to(o.device)
                             for kind in (library.AutoModelForCausalLM, library.AutoModel))
            step = functools.partial(padded_step, lambda ids, real: actor(ids, attention_mask=real).logits,
                                     lambda ids, real: critic(ids, attention_mask=real).last_hidden_state, head)

        def run(*given: Any) -> Tensor:
            losses = step(*given)
            actor.zero_grad()
            critic.zero_grad()
            return losses

        def error() -> float:
            exact, judge = our_models(torch.float64)
            plain = padded_step(lambda ids, _: exact(ids), lambda ids, _: judge.backbone.hidden(ids),
                                judge.value_head.weight, few, old[:, :2])
            return relative_error([run(few, old[:, :2])], [plain])

        return Implementation(lambda: run(batch, old), error, TOLERANCE[bench.dtype])

    tokens, responses = sum(batch.lengths()), int(mask.sum())
    flop = 6 * (2 * (num_weights(shape) - width * entries) * tokens + width * entries * responses)
    compare(bench, f"{shape}, {count} episodes, {tokens} tokens, {responses} of them the agent's",
            ("ours", "transformers, padded"), make, work=tokens, unit="tokens",
            floor=("6 P FLOP for each token in actor and critic, the head for the agent's alone", flop / bench.gemm))


def bench_encoder(bench: Bench) -> None:
    o = bench.options
    with open(ROOT / "world" / "corpus.jsonl", encoding="utf-8") as file:
        words = " ".join(json.loads(line)["contents"] for line in file).split()
    passages = [" ".join(words[i : i + 100]) for i in range(0, 800 if o.quick else 6400, 100)]
    encoder = load_encoder(o.encoder_dir, device=o.device)

    exact = load_encoder(o.encoder_dir, dtype=torch.float64, device=o.device)

    def make(name: str) -> Implementation:
        embed = functools.partial(encoder.embed, kind="passage")
        if name != "ours":
            peer = import_module("sentence_transformers").SentenceTransformer(o.encoder_dir, device=o.device)
            peer.max_seq_length, prefix = encoder.tokenizer.truncation["max_length"], encoder.prefixes["passage"]
            embed = functools.partial(peer.encode, prompt=prefix, batch_size=64, normalize_embeddings=True,
                                      convert_to_tensor=True)
        return Implementation(lambda: embed(passages), lambda: relative_error(
            [embed(passages[:8])], [exact.embed(passages[:8], kind="passage", batch_size=1)]), TOLERANCE[bench.dtype])

    tokens = int(encoder.encode([encoder.prefixes["passage"] + text for text in passages])[1].sum())
    flop = 2 * tokens * sum(p.numel() for p in encoder.encoder.parameters())
    compare(bench, f"{len(passages)} passages, {tokens} tokens", ("ours", "sentence-transformers"), make,
            work=len(passages), unit="passages", floor=("2 P FLOP for each token", flop / bench.gemm))


# ---- the program ----

BENCHES = {"head": bench_head, "divergence": bench_divergence, "decode": bench_decode, "rollout": bench_rollout,
           "step": bench_step, "encoder": bench_encoder, "growth": bench_growth}


SIZES = {  # name: (default on a CPU, on CUDA, with --quick, help)
    "repeats": (5, 20, 2, "timed rounds"),
    "rows": (512, 16_384, 48, "rows of the head; half of them for divergence"),
    "shapes": (list(SHAPES)[:2], list(SHAPES)[:2], list(SHAPES)[2:], "decoders"),
    "batch": ([1, 4, 16, 32], [64, 256, 512], [1, 3], "decode: sequences"),
    "context": (128, 1024, 24, "tokens of a prompt"),
    "new_tokens": (64, 128, 24, "decode: tokens after the first one"),
    "episodes": (64, 256, 8, "rollout: questions"),
    "rollout_rows": (32, 256, 4, "rollout: episodes at once"),
    "observation": (150, 400, 6, "rollout: tokens that answer a search"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", choices=[*BENCHES, "all"], metavar="NAME", help=" ".join([*BENCHES, "all"]))
    parser.add_argument("--out", default="runs/bench/results.json", help="file of the rows (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--compile", action="store_true", help="compile peers on a CPU, too (needs a C++ compiler)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--encoder-dir", default=str(ROOT / "world" / "encoder"), help="a BERT-type checkpoint")
    for name, (*values, text) in SIZES.items():
        kind = {"choices": SHAPES} if name == "shapes" else {"type": int, "metavar": "N"}
        kind |= {"nargs": "+"} if isinstance(values[0], list) else {}
        parser.add_argument("--" + name.replace("_", "-"), **kind, help=text)
    o = parser.parse_args(argv)
    for name, values in SIZES.items():
        if vars(o)[name] is None:
            vars(o)[name] = values[2 if o.quick else o.device == "cuda"]
    o.argv, o.compile = argv, o.compile or o.device == "cuda"
    return o


def report(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("bench.py report", description="Saved rows as markdown.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows of growth")
    o = parser.parse_args(argv)
    documents = [read_json(path) for path in o.files]
    print("\n".join(map(markdown, documents)))
    if o.plot:
        plot([row for d in documents for row in d.get("growth", {"rows": []})["rows"] if "seconds" in row], o.plot)


def main(argv: list[str]) -> None:
    if argv[:1] == ["report"]:
        return report(argv[1:])
    o = parse(argv)
    torch.set_num_threads(o.threads)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    for name in BENCHES if "all" in o.names else o.names:
        bench = Bench(name, o)
        try:
            BENCHES[name](bench)
        except Exception as problem:
            bench.save([{"case": name, "implementation": "all", "status": f"not measured: {problem!r}"}])
            print(f"{name}: not measured: {problem!r}", flush=True)
    print(f"{o.out}: python bench.py report {o.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench.py: {error}")
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted; the rows of finished rounds are saved")
