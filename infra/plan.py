"""Plans: the memory and the seconds of a training run, by part, as arithmetic of plain numbers.

Memory is counted from shapes: what the programs keep, and what autograd saves for a backward pass
(`saved_bytes`, which a test compares with what is saved). A run holds different parts in turn, so
its peak is that of the fullest stage. Seconds are operations and bytes over the machine's rates.
What no file says is assumed, and printed by infra/planner.py. Bytes and seconds are those of one
rank: a process, or a card. c: the config of a decoder (model.DecoderConfig).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from infra.config import flag_of

GIB, F32 = 2**30, 4
SIZES = {"float32": 4, "bfloat16": 2}  # bytes
# Of kernels.py and rollout.py, which are above this file; a test compares them.
HEAD_TILE = {"cpu": 2**21, "cuda": 2**28}  # logits at once
ROWS_TILE = {"cpu": 11_500_000, "cuda": 2**28}  # of a divergence
MAX_PREFILL_TOKENS = 16384
# Bytes an entry of a tile: eager on a CPU (measured), compiled on a GPU (not measured).
HEAD_TILE_BYTES = {"cpu": 28, "cuda": 8}
ROWS_TILE_BYTES = {"cpu": 32, "cuda": 12}
NUM_PASSAGES, NUM_QUESTIONS = 21_015_324, 169_615  # Wikipedia 2018; NQ and HotpotQA for training
# Memory that an allocator keeps in holes between activations, as a share of them. On a CPU it is
# glibc's, measured; of a GPU nothing was measured.
HOLES = {"cpu": 0.25, "cuda": 0.1}
ONEDNN_BYTES = GIB // 2  # its compiled products in bfloat16, one for each shape; measured
PROMPTS = {"paper": 150, "short": 50}  # tokens, with a question
WRONG = 0.65  # share of a student's, and a teacher's, episodes
QUERY_TOKENS, PASSAGE_TOKENS = 32, 160
LARGEST = 3  # standard deviations of a run's largest batch above the mean
LOGIT_READS = 10  # of each logit, as fp32
REST = 0.03  # of all other seconds
OPS_A_LAYER = 100  # small operations that the host issues for a layer, in a decoding step
# Of a decoding step that is a CUDA graph: seconds of a layer, and of the host for a row. They fit
# Qwen2.5-0.5B's shape on an H200: 3.4 ms for 64 rows, 7.1 ms for 512 (docs/performance.md).
GRAPH_LAYER_S, ROW_S = 1.1e-4, 1e-5
SCORE_PASSES = 12  # of each score of a search, fp32, on a GPU: fits 64 queries on an H200
SCORES_BYTES = 5 * 2**28  # of a chunk's scores on a GPU, measured there


class Machine(NamedTuple):
    name: str
    ranks: int
    memory: float  # bytes of a rank
    base: float  # bytes of a process before its first tensor
    flops: dict[str, float]  # a second, by dtype
    bandwidth: float  # bytes a second
    link: float  # bytes a second between ranks
    layer_s: float  # of the host, for a layer of a decoding step
    kind: str  # cpu or cuda


# Sustained, not peak: dense GEMMs of models of 0.5 to 3 B parameters. 4 us an operation that Python
# issues. Copies of an H200 were measured (4.26 TB/s); the rest is assumed.
CARDS = {
    "80GB": Machine("H100", 1, 80e9, 1 * GIB, {"float32": 50e12, "bfloat16": 350e12}, 2.7e12,
                    300e9, 4e-4, "cuda"),
    "141GB": Machine("H200", 1, 141e9, 1 * GIB, {"float32": 50e12, "bfloat16": 350e12}, 4.3e12,
                     300e9, 4e-4, "cuda")}


class Shapes(NamedTuple):
    """What the files say."""
    student: Any
    guide: Any | None  # None: no guide
    encoder: float  # parameters of its layers
    passages: float
    width: int
    vector_bytes: int  # of a component
    num_asked: int  # questions that the teacher is asked
    num_episodes: int | None  # of the teacher, in --episodes; None: it is asked first


class Episodes(NamedTuple):
    """Means of an episode."""
    prompt: float  # tokens
    searches: float
    shown: float  # tokens that a search shows
    written: float  # tokens of the agent
    wrong: float  # share
    source: str
    spread: float = 0.0  # standard deviation of its tokens

    @property
    def tokens(self) -> float:
        return self.prompt + self.searches * self.shown + self.written


# ---- shapes ----


def linear_parameters(c: Any) -> int:
    """Weights of the matrices of all layers, without embedding and head."""
    heads, width = c.num_heads * c.head_dim, c.hidden_size
    attention = 2 * width * heads + 2 * width * c.num_kv_heads * c.head_dim
    return c.num_layers * (attention + 3 * width * c.intermediate_size)


def num_parameters(c: Any, *, is_critic: bool = False) -> int:
    """All weights; a critic has a value head in place of an untied head."""
    width, heads, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    layer = 2 * width + c.qkv_bias * (heads + 2 * kv) + c.o_bias * width
    layer += c.mlp_bias * (2 * c.intermediate_size + width) + c.qk_norm * 2 * c.head_dim
    rest = c.num_layers * layer + width  # norms and biases
    head = width + 1 if is_critic else 0 if c.tied else c.vocab_size * width
    return linear_parameters(c) + rest + c.vocab_size * width + head


def trained_share(settings: Any, c: Any) -> float:
    """Of the layers; the rest of a model is frozen where it is below 1, as infra/freeze.py says."""
    return min(settings.train_layers or c.num_layers, c.num_layers) / c.num_layers


def trained_parameters(settings: Any, c: Any, *, is_critic: bool = False) -> float:
    """Weights that have gradients and Adam's moments."""
    if not settings.train_layers:
        return num_parameters(c, is_critic=is_critic)
    width, entries = c.hidden_size, c.vocab_size * c.hidden_size
    layers = num_parameters(c, is_critic=True) - entries - 2 * width - 1
    return trained_share(settings, c) * layers + width + is_critic * (width + 1)


def cache_bytes(c: Any, rows: int, slots: int, size: int) -> int:
    """Keys and values of all layers; size: bytes a number."""
    return 2 * c.num_layers * rows * c.num_kv_heads * slots * c.head_dim * size


def saved_bytes(c: Any, size: int, kind: str = "cpu", *, checkpointing: bool = False,
                share: float = 1) -> float:
    """What autograd saves of a token for the backward pass of the layers and the last norm.

    share: of the layers that are trained, the last ones. size: bytes of a number that is computed
    with. A norm of a CPU keeps its input and its result in fp32; one of a GPU keeps its input as it
    is. A GPU's SwiGLU is fused, and keeps no sigmoid.
    """
    width, heads, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    per_norm = 2 * F32 if kind == "cpu" else size
    attention = (3 * heads + 2 * kv) * size + c.num_heads * F32  # q, k, v, two results, their logs
    attention += c.qk_norm * ((heads + kv) * per_norm + (c.num_heads + c.num_kv_heads) * F32)
    norms = 2 * (width * (per_norm + size) + F32)
    layer = norms + attention + (4 if kind == "cpu" else 3) * c.intermediate_size * size
    last = width * per_norm + F32 + 8 + 2 * c.head_dim * size  # ids and rotary angles, too
    if checkpointing:  # the input of each layer, and the one layer that is computed again
        return share * c.num_layers * width * size + layer + last
    return share * c.num_layers * layer + last


def passing_bytes(c: Any, size: int) -> int:
    """What a token takes in a layer without gradients, before the next layer frees it."""
    return (3 * c.intermediate_size + 3 * c.hidden_size) * size + 2 * c.hidden_size * F32


def pass_flops(c: Any, length: float) -> float:
    """Operations of a token in a forward pass without the head, in a text of this length."""
    return 2 * linear_parameters(c) + 2 * c.num_layers * c.num_heads * c.head_dim * length


# ---- memory ----


def compute_size(settings: Any, machine: Machine) -> int:
    return SIZES[compute_dtype(settings, machine)]


def compute_dtype(settings: Any, machine: Machine) -> str:
    return settings.compute_dtype or ("bfloat16" if machine.kind == "cuda" else "float32")


def guide_dtype(settings: Any) -> str:
    """The initial policy (of ppo and grpo) guides in fp32."""
    return "float32" if settings.phase in ("ppo", "grpo") else settings.teacher_dtype


def searches(settings: Any) -> bool:
    return settings.max_turns > 0 and (student_writes(settings) > 0 or settings.phase != "sft"
                                       or settings.eval_every > 0)


def episodes_a_step(settings: Any, ranks: int) -> float:
    """Of a rank."""
    num = settings.episodes_per_step if settings.advantage else settings.batch_size
    return max(1, num / ranks)


def tokens_a_pass(settings: Any, machine: Machine, episodes: Episodes,
                  deviations: float = 0) -> tuple[float, float]:
    """(tokens of a pass of an update, passes of the update), of a rank; deviations: above the mean.
    """
    share = episodes_a_step(settings, machine.ranks)
    if settings.advantage:
        share = min(share, max(1, settings.minibatch_size / machine.ranks))
    tokens, most = share * episodes.tokens, max(settings.micro_batch_tokens, episodes.tokens)
    tokens += deviations * math.sqrt(share) * episodes.spread
    return min(most, tokens), max(1, tokens / most)


def student_writes(settings: Any) -> float:
    """The share of steps whose episodes the student writes."""
    if settings.advantage:
        return 1.0
    return {"gkd": settings.student_share, "distillm": 0.5}.get(settings.phase, 0.0)


def teacher_asks(settings: Any, shapes: Shapes) -> bool:
    """Whether the run begins with the teacher's episodes."""
    s = settings
    reads = not s.advantage and s.phase != "sft" and (s.phase != "gkd" or s.student_share < 1)
    return reads and shapes.num_episodes is None


def stages(settings: Any, shapes: Shapes, machine: Machine,
           episodes: Episodes) -> dict[str, dict[str, float]]:
    """Bytes of each part, in each stage that a run comes to."""
    s, c, kind, size = settings, shapes.student, machine.kind, compute_size(settings, machine)
    is_split = s.shard != "none" and machine.ranks > 1
    ours = machine.ranks if is_split else 1
    weights, trained = num_parameters(c) / ours, trained_parameters(s, c) / ours
    has_critic, share = s.advantage == "gae", trained_share(s, c)
    critic = trained_parameters(s, c, is_critic=True) / ours
    caches = ONEDNN_BYTES if kind == "cpu" and size < F32 else 0
    kept = {"process": machine.base + caches, "weights": F32 * weights, "Adam": 2 * F32 * trained}
    if has_critic:
        kept["critic: weights, Adam"] = F32 * (
            num_parameters(c, is_critic=True) / ours + 2 * critic)
    guide_size = 0
    if shapes.guide is not None:
        guide_size = SIZES[guide_dtype(s)]
        splits = machine.ranks if is_split and s.shard == "all" else 1
        kept["guide"] = guide_size * num_parameters(shapes.guide) / splits
    if searches(s):
        kept["encoder"] = F32 * shapes.encoder
        kept["index"] = shapes.passages * shapes.width * shapes.vector_bytes
        if kind == "cuda" and shapes.passages:
            kept["index"] += SCORES_BYTES
    tokens, passes = tokens_a_pass(s, machine, episodes, LARGEST)
    update = {**kept, "gradients": F32 * trained * (passes > 1 or is_split)}
    if has_critic:
        update["critic: gradients"] = F32 * critic
    update["activations"] = tokens * saved_bytes(
        c, size, kind, checkpointing=s.checkpointing, share=share)
    if size < F32:  # the casts that a backward pass multiplies by
        update["activations"] += size * linear_parameters(c) * share
    if is_split:  # entry and head whole, and two layers
        update["gathered weights"] = size * (num_parameters(c) - linear_parameters(c)
                                             * (1 - 2 / c.num_layers))
    is_divergence = shapes.guide is not None and (not s.advantage or s.kl_in == "exact")
    update["head"] = head_bytes(s, c, kind, size, tokens * episodes.written / episodes.tokens,
                                is_divergence=is_divergence)
    update["workspace"] = tokens * 2 * (c.intermediate_size + c.hidden_size) * size
    if is_divergence and not s.advantage:  # the guide reads while the student's are kept
        update["workspace"] = max(update["workspace"],
                                  tokens * passing_bytes(shapes.guide, guide_size))
    parts = {"update": update, "Adam's step": {**kept, "gradients": F32 * trained, "head": (
        2 * F32 * c.vocab_size * c.hidden_size * (not s.train_layers))}}
    if has_critic:
        parts["Adam's step"]["critic: gradients"] = F32 * critic
    if s.advantage:
        nets = [(c, size)] + ([(shapes.guide, guide_size)] if shapes.guide is not None else [])
        scored = min(max(s.micro_batch_tokens, episodes.tokens),
                     episodes_a_step(s, machine.ranks) * episodes.tokens)
        parts["scoring"] = {
            **kept, "head": HEAD_TILE[kind] * HEAD_TILE_BYTES[kind],
            "workspace": scored * max(passing_bytes(net, n) for net, n in nets)}
    if student_writes(s) or s.eval_every and s.val_size:
        asked = s.val_size / machine.ranks if s.eval_every else 0
        rows = rows_at_once(s, max(episodes_a_step(s, machine.ranks), asked))
        rollout = rollout_bytes(s, c, kind, size, episodes, rows, is_split)
        if kind == "cuda":  # the graphs of a GPU need both where they are
            for stage in parts.values():
                stage |= {name: rollout[name] for name in ("sampler's copy", "keys and values")}
        parts["rollout"] = {**kept, **rollout}
    if teacher_asks(s, shapes):
        early = {name: kept[name] for name in kept if name != "Adam"}
        asking = rollout_bytes(s, shapes.guide, kind, guide_size, episodes,
                               rows_at_once(s, shapes.num_asked / machine.ranks),
                               is_split and s.shard == "all")
        if kind == "cuda":  # its weights have this dtype, and only a CPU reorders them
            asking["sampler's copy"] = 0
        parts["teacher asks"] = early | asking
    for stage in parts.values():
        stage["allocator's holes"] = HOLES[kind] * sum(
            stage.get(name, 0) for name in ("activations", "head", "workspace"))
    order = ("teacher asks", "rollout", "scoring", "update", "Adam's step")
    return {name: parts[name] for name in order if name in parts}


def head_bytes(settings: Any, c: Any, kind: str, size: int, rows: float, *,
               is_divergence: bool) -> float:
    """Of the head's loss and its gradient, while the activations of a pass are kept."""
    weight = c.vocab_size * c.hidden_size
    states = rows * c.hidden_size * (F32 + 2 * size)
    # The head's own, and that of the weight it is cut from.
    gradient = 0 if settings.train_layers else 2 * F32 * weight
    tile = HEAD_TILE[kind] * HEAD_TILE_BYTES[kind]
    if is_divergence:
        cast = size * weight if size < F32 else 0
        tile = min(ROWS_TILE[kind], rows * c.vocab_size) * ROWS_TILE_BYTES[kind]
        return states + cast + max(gradient, gradient / 2 + tile)
    return states + gradient + tile


def rollout_bytes(settings: Any, c: Any, kind: str, size: int, episodes: Episodes, rows: int,
                  is_split: bool) -> dict[str, float]:
    """What an engine holds: weights to sample with, keys and values, a prefill."""
    copy = size * (linear_parameters(c) + c.vocab_size * c.hidden_size) if size < F32 else 0
    if is_split:
        copy = size * num_parameters(c)
    cache = cache_bytes(c, rows, settings.max_context_tokens + 1, size)
    prefill = min(MAX_PREFILL_TOKENS, rows * episodes.prompt) * passing_bytes(c, size)
    logits = rows * c.vocab_size * 4 * F32
    # Free rows are dropped: old and new keys are held together for a moment.
    return {"sampler's copy": copy, "keys and values": cache,
            "workspace": max(prefill, 3 / 8 * cache) + logits}


def rows_at_once(settings: Any, num_episodes: float) -> int:
    return max(1, min(settings.rollout_rows, round(num_episodes)))


def peak(parts: dict[str, dict[str, float]]) -> float:
    return max(sum(stage.values()) for stage in parts.values())


# ---- seconds ----


def episode_steps(settings: Any, episodes: Episodes, num: float) -> float:
    """Decoding steps in which `num` episodes are written: the last row is alone for a while."""
    return episodes.written * (num / rows_at_once(settings, num) + 1)


def rollout_seconds(settings: Any, c: Any, shapes: Shapes, machine: Machine, episodes: Episodes,
                    num: float, dtype: str) -> dict[str, float]:
    """Seconds of `num` episodes that a decoder writes, by part."""
    rows, size, rate = rows_at_once(settings, num), SIZES[dtype], machine.flops[dtype]
    head, host = c.vocab_size * c.hidden_size, c.num_layers * machine.layer_s
    read = num * (episodes.tokens - episodes.written)
    # An eighth of the rows is read, or searched for, at once.
    calls = num * (episodes.searches + 1) / max(1, rows / 8)
    prefill = read * pass_flops(c, episodes.tokens) / rate + calls * host
    # A step reads all weights, and the keys and values of all rows as far as the longest one's.
    traffic = size * (linear_parameters(c) + head) + cache_bytes(c, rows, episodes.tokens, size)
    device = max(traffic / machine.bandwidth, rows * (pass_flops(c, 0) + 2 * head) / rate)
    step = device + host
    if machine.kind == "cuda":
        step = max(device, c.num_layers * GRAPH_LAYER_S) + rows * ROW_S
    parts = {"prefill": prefill, "decode": episode_steps(settings, episodes, num) * step}
    if episodes.searches and searches(settings):
        asked = num * episodes.searches
        scans = asked / max(1, rows / 8)
        numbers = shapes.passages * shapes.width
        traffic = scans * numbers * shapes.vector_bytes
        if machine.kind == "cuda":  # two products in half precision, whose scores are fp32
            multiply = 4 * numbers * asked / machine.flops["bfloat16"]
            traffic += SCORE_PASSES * F32 * shapes.passages * asked
        else:
            multiply = 2 * numbers * asked / machine.flops["float32"]
            traffic += scans * numbers * 2 * F32 * (shapes.vector_bytes < F32)  # copies as fp32
        encode = asked * QUERY_TOKENS * 2 * shapes.encoder / machine.flops["float32"]
        parts["search"] = traffic / machine.bandwidth + multiply + encode
    return parts


def reading_seconds(c: Any, machine: Machine, episodes: Episodes, num: float, dtype: str, *,
                    passes: float = 1, gemms: float = 1) -> float:
    """`num` episodes read in forward passes (3: with the backward pass); gemms: of the head."""
    body = num * episodes.tokens * pass_flops(c, episodes.tokens) * passes
    head = num * episodes.written * 2 * c.vocab_size * c.hidden_size * gemms
    # Elementwise work writes what is saved and reads it again; logits are read a few times.
    traffic = num * episodes.tokens * 2 * saved_bytes(c, SIZES[dtype], machine.kind) * passes
    traffic += num * episodes.written * c.vocab_size * F32 * LOGIT_READS * (gemms > 0)
    return (body + head) / machine.flops[dtype] + traffic / machine.bandwidth


def step_seconds(settings: Any, shapes: Shapes, machine: Machine,
                 episodes: Episodes) -> dict[str, float]:
    """Seconds of each part of a step."""
    s, c, dtype = settings, shapes.student, compute_dtype(settings, machine)
    num, share = episodes_a_step(s, machine.ranks), trained_share(s, c)
    passes, gemms = 1 + (2 + s.checkpointing) * share, 3 - bool(s.train_layers)
    parts: dict[str, float] = {}
    writes = student_writes(s)
    if writes:
        written = rollout_seconds(s, c, shapes, machine, episodes, num, dtype)
        parts |= {name: writes * value for name, value in written.items()}
    has_critic, rounds, updates = s.advantage == "gae", 1, 1
    if s.advantage:
        rounds = s.ppo_epochs
        updates = rounds * max(1, round(s.episodes_per_step / s.minibatch_size))
        parts["scoring: actor"] = reading_seconds(c, machine, episodes, num, dtype)
        if has_critic:
            parts["scoring: critic"] = reading_seconds(c, machine, episodes, num, dtype, gemms=0)
    if shapes.guide is not None:
        guided = num * (episodes.wrong if s.advantage and s.kl_where == "wrong" else 1)
        parts["guide"] = reading_seconds(shapes.guide, machine, episodes, guided, guide_dtype(s))
    parts["update"] = rounds * reading_seconds(
        c, machine, episodes, num, dtype, passes=passes, gemms=gemms + bool(s.advantage))
    size = trained_parameters(s, c)
    if has_critic:
        parts["update: critic"] = rounds * reading_seconds(
            c, machine, episodes, num, dtype, passes=passes, gemms=0)
        size += trained_parameters(s, c, is_critic=True)
    # Adam reads four numbers a weight and writes three; gradients are sent and fetched.
    parts["Adam"] = updates * 7 * F32 * size / machine.bandwidth
    if machine.ranks > 1:
        parts["sums over ranks"] = updates * 2 * F32 * size / machine.link
    if s.eval_every and s.val_size:
        asked = rollout_seconds(s, c, shapes, machine, episodes, s.val_size / machine.ranks, dtype)
        parts["validation"] = sum(asked.values()) / s.eval_every
    parts["rest"] = REST * sum(parts.values())
    return parts


def start_seconds(settings: Any, shapes: Shapes, machine: Machine,
                  episodes: Episodes) -> dict[str, float]:
    """Seconds of what comes once, before the first step."""
    s, parts = settings, {}
    if searches(s) and s.corpus and not s.index:
        parts["embedding the corpus"] = (shapes.passages * PASSAGE_TOKENS * 2 * shapes.encoder
                                         / machine.flops["float32"])
    if teacher_asks(s, shapes):
        asked = rollout_seconds(s, shapes.guide, shapes, machine, episodes,
                                shapes.num_asked / machine.ranks, guide_dtype(s))
        parts["the teacher's episodes"] = sum(asked.values())
    return parts


def num_steps(settings: Any, shapes: Shapes) -> int:
    """Steps of the run."""
    if settings.advantage or settings.phase == "gkd":
        return settings.steps
    num = (1 - WRONG) * shapes.num_asked if shapes.num_episodes is None else shapes.num_episodes
    return max(1, round(math.ceil(num / settings.batch_size) * settings.epochs))


# ---- what to turn ----


def memory_knobs(settings: Any, machine: Machine, episodes: Episodes) -> list[dict[str, Any]]:
    """Changes that may save memory, those that cost least first."""
    s = settings
    changes = [{"micro_batch_tokens": s.micro_batch_tokens // n} for n in (2, 4, 8)
               if s.micro_batch_tokens // n >= episodes.tokens]
    changes += [{"rollout_rows": s.rollout_rows // n} for n in (2, 4, 8) if s.rollout_rows >= n]
    if s.shard == "none" and machine.ranks > 1:
        changes.append({"shard": "student"})
    if compute_dtype(s, machine) == "float32":
        changes.append({"compute_dtype": "bfloat16"})
    if s.teacher_dtype == "float32":
        changes.append({"teacher_dtype": "bfloat16"})
    if s.shard != "all" and machine.ranks > 1:
        changes.append({"shard": "all"})
    return changes + [{"checkpointing": True}] * (not s.checkpointing)


def time_knobs(settings: Any, machine: Machine) -> list[dict[str, Any]]:
    """Changes that may save time."""
    changes = [{"rollout_rows": settings.rollout_rows * n} for n in (2, 4)]
    if settings.checkpointing:
        changes.append({"checkpointing": False})
    if compute_dtype(settings, machine) == "float32":
        changes.append({"compute_dtype": "bfloat16"})
    return changes + [{"teacher_dtype": "bfloat16"}] * (settings.teacher_dtype == "float32")


def turn(settings: Any, changes: list[dict[str, Any]], cost: Callable[[Any], float],
         limit: float = 0.0) -> dict[str, Any] | None:
    """The first change that brings the cost under the limit, else the one that saves most.

    None if no change saves 2 %.
    """
    costs = [cost(replace(settings, **change)) for change in changes]
    for change, value in zip(changes, costs, strict=True):
        if value <= limit:
            return change
    if costs and min(costs) < 0.98 * cost(settings):
        return changes[costs.index(min(costs))]
    return None


def make_it_fit(settings: Any, shapes: Shapes, machine: Machine,
                episodes: Episodes) -> list[tuple[str, float]]:
    """Flags to give, one after another, and the peak with each and those before it, bytes."""
    def cost(changed: Any) -> float:
        return peak(stages(changed, shapes, machine, episodes))

    found: list[tuple[str, float]] = []
    while cost(settings) > machine.memory and len(found) < 6:
        change = turn(settings, memory_knobs(settings, machine, episodes), cost, machine.memory)
        if change is None:
            break
        settings = replace(settings, **change)
        found.append((as_flags(change), cost(settings)))
    return found


def as_flags(change: dict[str, Any]) -> str:
    return " ".join(flag_of(name) if value is True else "--no-" + flag_of(name)[2:]
                    if value is False else f"{flag_of(name)} {value}"
                    for name, value in change.items())
