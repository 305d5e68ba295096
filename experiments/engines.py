"""Engines that bench.py races: ours, transformers and llama.cpp write turns of given lengths.

All of them choose greedily and read the same weights: random ones of a published shape, or those of
a checkpoint.
"""

import argparse
import functools
import math
import random
from collections.abc import Callable
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from data import Question
from episode import SEARCH_R1, Episode, Segment
from infra.files import read_json
from model import Decoder, load_decoder
from rollout import Policy, RolloutSettings, generate
from weights import save_tensors
from world.pretrain import new_decoder

WEIGHTS = Path(__file__).resolve().parents[1] / "runs" / "bench"  # of random decoders
Tokens = list[list[int]]  # ids of each row, or numbers of ids


# ---- decoders ----


def shape(family: str, layers: int, width: int, heads: int, kv_heads: int, inner: int,
          entries: int) -> dict[str, Any]:
    """config.json of a decoder with tied embeddings."""
    return {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"],
            "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": entries,
            "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}


SHAPES = {
    "Qwen2.5-0.5B": shape("qwen2", 24, 896, 14, 2, 4864, 151_936),
    "SmolLM2-135M": shape("llama", 30, 576, 9, 3, 1536, 49_152),
    "tiny-qwen2": shape("qwen2", 2, 64, 4, 2, 128, 512),
    "tiny-llama": shape("llama", 2, 96, 3, 3, 128, 512),
}


class Weights(NamedTuple):
    """A decoder that engines race on."""

    name: str
    folder: Path
    config: dict[str, Any]  # of config.json
    num_weights: int

    @property
    def head_weights(self) -> int:
        return self.config["vocab_size"] * self.config["hidden_size"]

    @property
    def bytes_of_a_token(self) -> float:
        """Keys and values in the cache, in 16 bits."""
        head_width = self.config["hidden_size"] / self.config["num_attention_heads"]
        width = head_width * self.config["num_key_value_heads"]
        return 2 * 2 * self.config["num_hidden_layers"] * width


def load_weights(name: str) -> Weights:
    """name: one of SHAPES, or the folder of a checkpoint."""
    folder = random_decoder(name) if name in SHAPES else Path(name)
    decoder = load_decoder(folder, dtype=torch.bfloat16)
    num_weights = sum(parameter.numel() for parameter in decoder.parameters())
    return Weights(folder.name, folder, read_json(folder / "config.json"), num_weights)


def random_decoder(name: str) -> Path:
    """A folder of random weights in bfloat16, written when it is first asked for.

    The layers weigh more than at initialisation. Otherwise a tied decoder repeats its last token,
    and no check would notice what an engine attends to.
    """
    folder, config = WEIGHTS / name, SHAPES[name]
    if read_json(folder / "config.json", {}) != {**config, "torch_dtype": "bfloat16"}:
        decoder, generator = new_decoder(config, 0), torch.Generator().manual_seed(1)
        for key, weight in decoder.model.layers.named_parameters():
            if weight.ndim == 2 or key.endswith("bias"):
                nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5, generator=generator)
        save_tensors(folder, config, decoder.bfloat16().state_dict())
    return folder


# ---- work ----


class Work(NamedTuple):
    """What an engine does: for each prompt it writes turns, and reads the observation between."""

    prompts: Tokens
    lengths: Tokens  # how many tokens each turn of each episode has
    observation: list[int]
    rows: int  # episodes at once

    @property
    def num_turns(self) -> int:
        return len(self.lengths[0])

    @property
    def num_written(self) -> int:
        return sum(map(sum, self.lengths))


Engine = Callable[[Work], Tokens]  # returns the tokens that each episode's agent wrote


def ragged(count: int, turns: int, typical: float, shortest: int, longest: int) -> Tokens:
    """Lengths of turns, log-normal around the typical one, the same in every call."""
    draw = random.Random(0)
    lengths = []
    for _ in range(count):
        drawn = [round(draw.lognormvariate(math.log(typical), 0.6)) for _ in range(turns)]
        lengths.append([min(longest, max(shortest, length)) for length in drawn])
    return lengths


def random_ids(count: int, length: int) -> Tokens:
    return [random.Random(seed).choices(range(500), k=length) for seed in range(count)]


# ---- engines ----


def load_engine(name: str, weights: Weights, options: argparse.Namespace,
                dtype: torch.dtype) -> Engine:
    partial = functools.partial
    if name.startswith("llama.cpp"):
        loaded = load_llama_cpp(options.gguf)
        return partial(by_turns, partial(llama_cpp_turn, loaded, options.threads))
    if name.startswith("transformers"):
        library = import_module("transformers").AutoModelForCausalLM
        model = library.from_pretrained(weights.folder, dtype=dtype).to(options.device)
        model.generation_config.stop_strings = None  # of a trained agent; the race has lengths
        cache = {"cache_implementation": "static"} if "static" in name else {}
        return partial(by_turns, partial(transformers_turn, model, cache))
    decoder = load_decoder(weights.folder, dtype=dtype, device=options.device)

    def our_turn(contexts: Tokens, wanted: list[int]) -> Tokens:
        return our_engine(decoder, Work(contexts, [[n] for n in wanted], [], len(contexts)))

    # Asked for one turn at a time, our engine forgets what it has read.
    return partial(by_turns, our_turn) if "re-reading" in name else partial(our_engine, decoder)


def our_engine(decoder: Decoder, work: Work) -> Tokens:
    """Play the episodes with rollout.generate.

    A protocol of our own ends the turns. Once a turn has its length it puts in the observation, and
    after the last turn more than the context holds, which ends the episode.
    """
    longest = max(map(len, work.prompts)) + max(map(sum, work.lengths))
    longest += work.num_turns * len(work.observation)
    max_context_tokens = longest + 2

    def end_turn(episode: Episode, tokenizer: Any) -> Segment | None:
        turns = [segment.ids for segment in episode.segments if segment.author == "agent"]
        lengths = work.lengths[int(episode.question.id)]
        if len(turns[-1]) < lengths[len(turns) - 1]:
            return None
        is_last = len(turns) == len(lengths)
        ids = [0] * max_context_tokens if is_last else list(work.observation)
        return Segment("environment", ids)

    tokenizer = SimpleNamespace(
        size=decoder.config.vocab_size, eos_id=-1, end_ids=frozenset(), pad_id=0,
        closes=lambda token: False, encode=lambda text, own: [], decode=lambda ids: "",
        chat=lambda messages: list(messages[0]["content"]))
    settings = RolloutSettings(
        max_turns=0, max_new_tokens=longest, max_context_tokens=max_context_tokens,
        temperature=0.0, prompt="row", rollout_rows=work.rows)
    questions = [Question(str(number), "", (), "", prompt=[{"content": ids}])
                 for number, ids in enumerate(work.prompts)]
    protocol = SEARCH_R1._replace(name="bench", interrupt=end_turn)
    policy = Policy(decoder, tokenizer)
    episodes = generate(policy, None, questions, settings, seed=0, protocol=protocol)
    return [[i for segment in episode.segments if segment.author == "agent" for i in segment.ids]
            for episode in episodes]


def by_turns(write_turn: Callable[[Tokens, list[int]], Tokens], work: Work) -> Tokens:
    """What one writes around an engine without turns.

    The rows of a batch wait for the longest one and read everything again in each turn.
    """
    written: Tokens = [[] for _ in work.prompts]
    for batch in torch.arange(len(work.prompts)).split(work.rows):
        contexts = [list(work.prompts[i]) for i in batch]
        for turn in range(work.num_turns):
            new = write_turn(contexts, [work.lengths[i][turn] for i in batch])
            for i, context, tokens in zip(batch, contexts, new, strict=True):
                written[i] += tokens
                context += tokens + work.observation
    return written


def transformers_turn(model: Any, options: dict, contexts: Tokens, wanted: list[int]) -> Tokens:
    width = max(map(len, contexts))
    ids = [[0] * (width - len(context)) + context for context in contexts]
    attended = [[0] * (width - len(context)) + [1] * len(context) for context in contexts]
    new = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(attended, device=model.device),
        do_sample=False, max_new_tokens=max(wanted), pad_token_id=0, **options)
    return [tokens[:count] for tokens, count in zip(new[:, width:].tolist(), wanted, strict=True)]


@functools.cache
def load_llama_cpp(gguf: str) -> SimpleNamespace:
    """A GGUF file in llama.cpp. Raises ValueError if there is none, or if it does not load."""
    if not gguf:
        raise ValueError("--gguf: got none, expected the weights of --checkpoint as a GGUF file")
    lib = import_module("llama_cpp")
    silence = lib.llama_log_callback(lambda *_: None)  # must live as long as the library
    lib.llama_log_set(silence, None)
    model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
    if not model:
        raise ValueError(f"--gguf {gguf}: llama.cpp could not load it; see the file's architecture")
    entries = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return SimpleNamespace(lib=lib, model=model, entries=entries, silence=silence)


def llama_cpp_turn(loaded: SimpleNamespace, threads: int, contexts: Tokens,
                   wanted: list[int]) -> Tokens:
    """One turn through llama.cpp's batched interface."""
    lib, params = loaded.lib, loaded.lib.llama_context_default_params()
    params.n_ctx = len(contexts) * (max(map(len, contexts)) + max(wanted))
    params.n_seq_max, params.n_batch = len(contexts), sum(map(len, contexts))
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(loaded.model, params)
    batch = lib.llama_batch_init(params.n_batch, 0, 1)
    written: Tokens = [[] for _ in contexts]
    for _ in range(max(wanted)):
        last = fill_llama_cpp_batch(batch, contexts, written)
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for tokens, place in zip(written, last, strict=True):
            logits = lib.llama_get_logits_ith(context, place)
            tokens.append(int(np.ctypeslib.as_array(logits, (loaded.entries,)).argmax()))
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return [tokens[:count] for tokens, count in zip(written, wanted, strict=True)]


def fill_llama_cpp_batch(batch: Any, contexts: Tokens, written: Tokens) -> list[int]:
    """Put in what llama.cpp has not read yet; returns the place of each row's last token."""
    count, last = 0, []
    for row, (context, tokens) in enumerate(zip(contexts, written, strict=True)):
        pending = [(len(context) + len(tokens) - 1, tokens[-1])] if tokens else enumerate(context)
        for position, token in pending:
            batch.token[count], batch.pos[count] = token, position
            batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
            batch.logits[count] = False
            count += 1
        batch.logits[count - 1] = True
        last.append(count - 1)
    batch.n_tokens = count
    return last


def greedy_error(name: str, weights: Weights, options: argparse.Namespace, *,
                 several_turns: bool) -> float:
    """How far a written token is below the best one, at worst, over the largest logit; in fp32.

    The logits come from plain forward passes over what was written.
    """
    lengths = [[3, 1, 2], [1, 4, 2], [2, 2, 1]] if several_turns else [[6]] * 3
    work = Work(random_ids(3, 16), lengths, [7, 8], rows=2)
    written = load_engine(name, weights, options, torch.float32)(work)
    if [len(tokens) for tokens in written] != [sum(counts) for counts in lengths]:
        return math.inf
    decoder = load_decoder(weights.folder, device=options.device)
    worst = 0.0
    for ids, counts, tokens in zip(work.prompts, lengths, written, strict=True):
        rest, places = iter(tokens), []  # places: of the agent's tokens in ids
        for count in counts:
            places += range(len(ids), len(ids) + count)
            ids = [*ids, *islice(rest, count), *work.observation]
        tensor = torch.tensor(ids, device=options.device)
        logits = decoder(tensor[None]).detach()[0, [place - 1 for place in places]]
        below = logits.amax(1) - logits.gather(1, tensor[places, None])[:, 0]
        worst = max(worst, (below.max() / logits.abs().max()).item())
    return worst
