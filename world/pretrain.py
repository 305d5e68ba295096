"""Networks of the embedded world: random weights, prepared starting weights, and pretraining runs.

A pretraining run is a run of `train.py --phase sft`. world/build.py says which texts it reads.

`new_decoder`, `new_encoder` and `save_encoder` also serve tests and benchmarks that need small
networks of a given shape.

Legend: B texts, T tokens, D width, H heads, Dh width of a head.
"""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder import Encoder
from infra.checkpoint import write_aside
from infra.files import file_in
from model import Decoder, DecoderConfig, Tokenizer, load_decoder, save_decoder
from tokenizer import text_tokenizer
from weights import save_tensors
from world.files import ROOT, SCRATCH, read_jsonl, write_jsonl

Network = TypeVar("Network", bound=nn.Module)

STUDENT_LAYERS = 3
TEACHER_LAYERS = 6
NUM_GLIMPSES = 1_100  # demonstrations that the student sees, each once; see world/build.py, point 4
LLAMA: dict[str, Any] = {  # changes to decoder_config for a decoder of the Llama type
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
}


# ---- random weights


def randomize(module: Network, seed: int) -> Network:
    """Draw all weight matrices of a network from N(0, 0.02), in place, and return it.

    Biases become 0; the weights of norms keep their 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    return module


def new_decoder(public: dict[str, Any], seed: int) -> Decoder:
    """Return a randomly initialised decoder; `public` has the keys of config.json."""
    return randomize(Decoder(DecoderConfig(public)), seed)


def new_encoder(
    public: dict[str, Any],
    tokenizer_path: str | Path,
    seed: int,
    *,
    query_prefix: str = "query: ",
    passage_prefix: str = "passage: ",
) -> Encoder:
    """Return a randomly initialised encoder; `public` has the keys of config.json.

    tokenizer_path is the tokenizer.json of a WordPiece tokenizer that adds [CLS] and [SEP].
    """
    path = Path(tokenizer_path)
    tokenizer = text_tokenizer(file_in(path.parent, path.name))
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    config = {"model_type": "bert", **public}
    return randomize(Encoder(config, tokenizer, prefixes), seed)


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    """Write a folder that `load_encoder` and transformers load; it is made where it is missing."""
    folder = Path(path)
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.no_truncation()
    config = {"architectures": ["BertModel"], **encoder.config}
    save_tensors(folder, config, encoder.state_dict())
    write_aside(folder / "tokenizer.json", lambda target: tokenizer.save(str(target)))
    prompts = json.dumps({"prompts": encoder.prefixes}, indent=1) + "\n"
    write_aside(
        folder / "config_sentence_transformers.json",
        lambda target: target.write_text(prompts),
    )


def decoder_config(num_layers: int, vocab_size: int, eos_id: int) -> dict[str, Any]:
    """config.json of the world's decoders, which are small Qwen2s."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }


# ---- starting weights


@torch.no_grad()
def ready_to_copy(decoder: Decoder) -> Decoder:
    """Change random weights, in place, so that the decoder learns to copy within minutes.

    From plain noise it took far longer (docs/log.md). Three things are changed:

    1. The embedding outweighs what the layers add at first.
    2. Queries resemble keys and outputs undo values, so that a head attends to tokens like its own
       and repeats them (mimetic initialisation, Trockman and Kolter 2023).
    3. The first head of the first layer looks one token back.
    """
    for name, parameter in decoder.named_parameters():
        if "embed_tokens" in name:
            parameter.mul_(10)
        elif parameter.ndim == 2 and not name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(5)
    decoder.model.norm.weight.fill_(0.3)
    for layer in decoder.model.layers:
        attention = layer.self_attn
        keys = _weight_of_each_head(attention.k_proj, decoder.config)
        values = _weight_of_each_head(attention.v_proj, decoder.config)
        attention.q_proj.weight.mul_(0.3).add_(0.7 * keys)
        attention.o_proj.weight.add_(0.2 * values.T)
    _look_one_token_back(decoder)
    return decoder


def _weight_of_each_head(projection: nn.Linear, config: DecoderConfig) -> Tensor:
    """The key or value weights, repeated for the query heads that share them: [H * Dh, D]."""
    group = config.num_heads // config.num_kv_heads
    by_head = projection.weight.unflatten(0, (config.num_kv_heads, -1))  # [key heads, Dh, D]
    return by_head.repeat_interleave(group, 0).flatten(0, 1)


def _look_one_token_back(decoder: Decoder) -> None:
    """Make the first head of the first layer attend to the token before its own, at any token.

    Key and query do not depend on the token. They differ by one step of the rotary embedding, so
    that they agree best at a distance of one. Biases can say this; a decoder without biases gets a
    channel that is the same for all tokens, and the weights of that channel stand for the biases.
    """
    config, layers = decoder.config, decoder.model.layers
    attention, half = layers[0].self_attn, config.head_dim // 2
    angles = config.rope_frequencies()[:4]  # the fastest four tell neighbours apart
    key = torch.zeros(config.head_dim)
    key[:4] = 2.7
    query = torch.zeros(config.head_dim)
    query[:4] = 2.7 * angles.cos()
    query[half : half + 4] = -2.7 * angles.sin()
    if config.qkv_bias:
        attention.k_proj.bias[: len(key)] = key
        attention.q_proj.bias[: len(query)] = query
        return
    for layer in layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight[:, -1] = 0.0
    embeddings = decoder.model.embed_tokens.weight
    embeddings[:, -1] = 1.0
    constant = F.rms_norm(embeddings, embeddings.shape[1:])[:, -1].mean()
    attention.k_proj.weight[: len(key), -1] = key / constant
    attention.q_proj.weight[: len(query), -1] = query / constant


@torch.no_grad()
def ready_to_look_up(decoder: Decoder, seed: int) -> Decoder:
    """Change random weights, in place, so that the decoder finds what followed an earlier token.

    This lays an induction head by hand. The first head of the first layer looks one token back and
    writes a code of the token that it sees into channels of its own. The first head of the second
    layer looks for the code that matches its own token, and copies what it finds.
    From `ready_to_copy`, 1,200 steps of training did not find this (docs/log.md).
    """
    config, generator = decoder.config, torch.Generator().manual_seed(seed)
    width, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    slow = (torch.arange(size) % half >= half // 2)[:, None]  # [Dh, 1] channels that hardly rotate
    decoder.model.embed_tokens.weight.mul_(10)
    decoder.model.norm.weight.fill_(0.3)
    back, look = (layer.self_attn for layer in decoder.model.layers[:2])
    place = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]  # [D, Dh] orthonormal
    code = torch.randn(size, width, generator=generator) / width**0.5
    code = code - code @ place @ place.T  # [Dh, D]: does not see the codes of the first layer
    angles = config.rope_frequencies()[: half // 2]
    for projection in (back.q_proj, back.k_proj):
        projection.weight[:size] = 0.0
        projection.bias[:size] = 0.0
    back.k_proj.bias[: half // 2] = 5.0
    back.q_proj.bias[: half // 2] = 5.0 * angles.cos()
    back.q_proj.bias[half : half + half // 2] = -5.0 * angles.sin()
    back.v_proj.weight[:size] = code
    back.o_proj.weight[:, :size] = place
    look.q_proj.weight[:size] = 4.0 * code * slow
    look.k_proj.weight[:size] = 4.0 * place.T * slow
    values = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]  # [D, Dh]
    look.v_proj.weight[:size] = values.T
    look.o_proj.weight[:, :size] = values
    return decoder


def grow(decoder: Decoder, num_layers: int, *, seed: int, **changes: Any) -> Decoder:
    """Return a decoder of more layers that computes the same function.

    The new layers add nothing to the residual stream at first: their output weights are zero.
    changes: keys of config.json, such as a larger vocab_size or a head of its own.
    """
    public = {**decoder.config.public, "num_hidden_layers": num_layers, **changes}
    grown = new_decoder(public, seed)
    old = decoder.state_dict()
    if grown.lm_head is not None:
        old["lm_head.weight"] = decoder.head_weight
    state = grown.state_dict()
    for name, tensor in old.items():
        state[name] = torch.cat([tensor, state[name][len(tensor) :]])  # more rows than before
    for layer in range(decoder.config.num_layers, num_layers):
        for part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            name = f"model.layers.{layer}.{part}"
            state[name] = torch.zeros_like(state[name])
    grown.load_state_dict(state)
    return grown


# ---- pretraining runs


def sft(
    student: Path,
    texts: Path,
    run_dir: Path,
    *,
    batch_size: int,
    lr: float,
    processes: int,
    epochs: int = 1,
) -> None:
    """Train a checkpoint on an episodes file, in processes of one thread each.

    A run that was interrupted goes on; one that is complete is left as it is.
    """
    if (run_dir / "model.safetensors").exists():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(ROOT / "train.py")]
    command += ["--phase", "sft", "--resume"]
    command += ["--student", str(student)]
    command += ["--episodes", str(texts)]
    command += ["--run-dir", str(run_dir)]
    command += ["--epochs", str(epochs)]
    command += ["--kd-warmup-steps", "40"]
    command += ["--kd-lr", str(lr)]
    command += ["--batch-size", str(batch_size)]
    command += ["--eval-every", "0"]
    command += ["--save-every", "200"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def build_student(
    folder: Path, tokenizer: Tokenizer, config: dict[str, Any], out: Path, seed: int
) -> Decoder:
    """Pretrain a student on copying and reading, then on some demonstrations; write it to `out`.

    folder: the runs on the way. Returns the decoder as it was before it saw demonstrations: the
    teacher grows from that.
    """
    steps = [folder / f"student-{number}" for number in range(4)]
    save_decoder(ready_to_copy(new_decoder(config, seed)), tokenizer, steps[0])
    sft(steps[0], SCRATCH / "copying.jsonl", steps[1], batch_size=8, lr=3e-3, processes=1)
    sft(steps[1], SCRATCH / "reading.jsonl", steps[2], batch_size=8, lr=3e-3, processes=1)
    demonstrations = read_jsonl(SCRATCH / "demonstrations.jsonl")
    glimpses = random.Random("glimpses").sample(demonstrations, NUM_GLIMPSES)
    write_jsonl(SCRATCH / "glimpses.jsonl", glimpses)
    sft(steps[2], SCRATCH / "glimpses.jsonl", steps[3], batch_size=8, lr=2e-3, processes=1)
    save_decoder(load_decoder(steps[3]), tokenizer, out)
    return load_decoder(steps[2])


def build_teacher(folder: Path, tokenizer: Tokenizer, grown: Decoder, out: Path) -> None:
    """Train a grown student on all demonstrations, and write it to `out`."""
    start, end = folder / "teacher-0", folder / "teacher"
    save_decoder(grown, tokenizer, start)
    sft(start, SCRATCH / "demonstrations.jsonl", end, batch_size=16, lr=2e-3, processes=2)
    save_decoder(load_decoder(end), tokenizer, out)
