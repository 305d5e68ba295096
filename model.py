"""Networks: Qwen2 / Qwen3 / Llama 3 decoder with KV cache, and the critic.

Read from and written to the published layout (config.json, *.safetensors under the public names, tokenizer.json):
a saved folder loads in transformers and vLLM with the same logits. encoder.py and tokenizer.py are part of this
door: `from model import Tokenizer, load_encoder` works.

In the KV cache slot == position. Prompts and observations of several rows are read packed, without padding; what an
idle row writes during a step lies where its next token will be written before anything can attend to it.

    decoder, tokenizer = load_decoder("Qwen/Qwen2.5-0.5B-Instruct"), Tokenizer.load("Qwen/Qwen2.5-0.5B-Instruct")
    logits = decoder(torch.tensor([tokenizer.chat([{"role": "user", "content": "Hello"}])]))  # [1, T, V]

Legend: B rows, T tokens, L slots read, V vocabulary, D width, H heads, KV key/value heads, Dh head width.
"""

import copy
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from encoder import Encoder, load_encoder, new_encoder, save_encoder
from tokenizer import Tokenizer
from weights import blaming, check, fill, randomize, read_json, resolve, save_tensors, write_aside

__all__ = [
    "Critic", "Decoder", "DecoderConfig", "Encoder", "KVCache", "Tokenizer", "load_decoder", "load_encoder",
    "new_decoder", "new_encoder", "save_decoder", "save_encoder", "shift",
]  # fmt: skip
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; `public` keeps config.json as it was read, so that it can be written back."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # Qwen3: queries and keys are normalised before they are rotated
    tied: bool
    rope_theta: float
    rope_scaling: dict[str, float] | None  # the keys of the "llama3" rule, or None
    public: dict = field(compare=False, repr=False)

    @classmethod
    def read(cls, public: dict, where: str = "config.json") -> "DecoderConfig":
        names = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
        family = public.get("model_type") or names.get((public.get("architectures") or [""])[0])
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files have them apart.
        rope = (public.get("rope_scaling") or {}) | (public.get("rope_parameters") or {})
        rule = rope.get("rope_type", rope.get("type", "default"))
        check(where, "model_type", family, "llama", "qwen2", "qwen3")
        check(where, "hidden_act", public.get("hidden_act", "silu"), "silu")
        check(where, "use_sliding_window", public.get("use_sliding_window") or False, False)
        check(where, "quantization_config", public.get("quantization_config"), None)
        check(where, "rope type", rule, "default", "llama3")
        check(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1)
        check(where, "rope_interleaved", public.get("rope_interleaved") or False, False)
        rope.setdefault(LLAMA3_ROPE[3], public.get("max_position_embeddings"))
        try:
            heads, width = public["num_attention_heads"], public["hidden_size"]
            bias = bool(public.get("attention_bias"))
            config = cls(
                vocab_size=public["vocab_size"], hidden_size=width, intermediate_size=public["intermediate_size"],
                num_layers=public["num_hidden_layers"], num_heads=heads,
                num_kv_heads=public.get("num_key_value_heads") or heads,
                head_dim=public.get("head_dim") or (128 if family == "qwen3" else width // heads),
                norm_eps=float(public.get("rms_norm_eps", 1e-6)),
                qkv_bias=family == "qwen2" or bias, o_bias=family != "qwen2" and bias,
                mlp_bias=bool(public.get("mlp_bias")), qk_norm=family == "qwen3",
                tied=bool(public.get("tie_word_embeddings")),
                rope_theta=float(rope.get("rope_theta", public.get("rope_theta", 10000.0))),
                rope_scaling={key: float(rope[key]) for key in LLAMA3_ROPE} if rule == "llama3" else None,
                public=dict(public),
            )
        except KeyError as error:
            raise ValueError(f"{where}: got no {error}, expected it; copy the published file") from None
        sizes = (config.vocab_size, width, config.intermediate_size, config.num_layers)
        if not all(type(size) is int and 0 < size < 2**24 for size in sizes) or config.num_layers > 1000:
            raise ValueError(f"{where}: got vocab_size, hidden_size, intermediate_size, num_hidden_layers {sizes}, "
                             "expected positive sizes; copy the published file")
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise ValueError(f"{where}: got {heads} heads, {config.num_kv_heads} key/value heads, width "
                             f"{config.head_dim}, expected divisible heads and an even width; copy the published file")
        return config

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each pair of channels, fp32 [Dh / 2]."""
        with torch.device("cpu"):  # also while the network is laid out on the meta device
            frequencies = self.rope_theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if self.rope_scaling is None:
            return frequencies
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended.
        factor, low, high, original = (self.rope_scaling[key] for key in LLAMA3_ROPE)
        keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / factor)


class KVCache:
    """Keys and values of every layer, [rows, KV, slots, Dh]; slot == position."""

    def __init__(self, config: DecoderConfig, rows: int, slots: int, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        self.rows, self.slots = rows, slots
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        # zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 * NaN is NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def keep(self, rows: Tensor) -> None:
        """Compact to these rows, in this order."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.rows = len(rows)

    def prefill(self, rows: list[int], starts: list[int]) -> "Prefill":
        """For a call with packed documents: document i goes on at position starts[i] of row rows[i]."""
        return Prefill(self, rows, starts)

    def step(self, positions: Tensor, reach: int) -> "Step":
        """For a call with one token for each row, at positions [rows]; slots < reach are read, all positions among
        them (a number of the host's, so that the device need not be asked)."""
        if not self.rows == len(positions):
            raise ValueError(f"KV cache: got {len(positions)} positions, expected one for each of {self.rows} rows")
        return Step(self, positions, self.check(reach))

    def check(self, reach: int) -> int:
        if reach > self.slots:
            raise ValueError(f"KV cache: got position {reach - 1}, expected less than {self.slots}; make it longer")
        return reach


class Prefill(NamedTuple):
    cache: KVCache
    rows: list[int]
    starts: list[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        """Write k, v [1, KV, N, Dh]; q [1, H, N, Dh] attends to its row's slots up to its own -> [1, H, N, Dh]."""
        keys, values, mixed = self.cache.keys[layer], self.cache.values[layer], []
        parts = zip(self.rows, self.starts, *(x.split(documents, 2) for x in (q, k, v)), strict=True)
        for row, start, q, k, v in parts:
            end = self.cache.check(start + q.shape[2])
            keys[row, :, start:end], values[row, :, start:end] = k[0], v[0]
            mask = None
            if start:  # the row goes on: all its earlier slots, and causal among the new ones
                k, v = keys[row : row + 1, :, :end].to(q.dtype), values[row : row + 1, :, :end].to(q.dtype)
                mask = torch.ones(q.shape[2], end, dtype=torch.bool, device=q.device).tril(start)
            mixed.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=not start, enable_gqa=True))
        return torch.cat(mixed, 2)


class Step(NamedTuple):
    cache: KVCache
    positions: Tensor  # [B]
    reach: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        """Write k, v [B, KV, 1, Dh]; q [B, H, 1, Dh] attends to its row's slots up to its own -> [B, H, 1, Dh]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, self.positions] = k.squeeze(2).to(keys.dtype)
        values[rows, :, self.positions] = v.squeeze(2).to(values.dtype)
        keys, values = keys[:, :, : self.reach].to(q.dtype), values[:, :, : self.reach].to(q.dtype)
        mask = torch.arange(self.reach, device=q.device) <= self.positions[:, None, None, None]  # [B, 1, 1, L]
        # The queries that share a key head stand where tokens would, so that keys are never repeated.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # [B, KV, H / KV, Dh]
        return F.scaled_dot_product_attention(grouped, keys, values, mask).view_as(q)


Slots = Prefill | Step | None  # where a call writes keys and values; None: nowhere

class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # fp32 inside


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, Dh]; the first half of `sin` carries the minus sign."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        width, inner, kv_inner = config.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.o_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: list[int], slots: Slots) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_norm(self.q_proj(x).view(B, T, self.num_heads, self.head_dim)), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim)), cos, sin)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or KV, T, Dh]
        if slots is None:
            # A document at a time: what is packed beside it costs nothing, and no mask is ever made.
            parts = zip(*(x.split(documents, 2) for x in (q, k, v)), strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
                               for part in parts], 2)
        else:
            mixed = slots.attend(self.layer, q, k, v, documents)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: list[int], slots: Slots) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Decoder(ids [B, T]) -> logits [B, T, V]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()  # what is public under "model."
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = config.rope_frequencies()  # no buffer: .to(bfloat16) must not round it
        self.checkpointing = False  # True: layers are computed again in backward instead of kept

    @property
    def head_weight(self) -> nn.Parameter:  # [V, D]
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.head_weight)

    def hidden(self, ids: Tensor, *, documents: list[int] | None = None,
               cache: Slots = None) -> Tensor:
        """States after the final norm, [B, T, D]; row t predicts token t + 1.

        Causal attention over the T tokens, or within a document where `documents` gives the lengths of the documents
        packed into a row. cache: tokens are written to a KVCache and attend to what its rows hold, see
        KVCache.prefill (ids [1, T], packed) and KVCache.step (ids [rows, 1]).
        """
        if documents and sum(documents) != ids.shape[1]:
            raise ValueError(f"documents: got {sum(documents)} tokens, expected the {ids.shape[1]} of a row")
        documents = documents or [ids.shape[1]]
        if isinstance(cache, Step):
            positions = cache.positions[:, None]  # [B, 1]
        else:
            starts = [0] * len(documents) if cache is None else cache.starts
            positions = torch.cat([torch.arange(start, start + length, device=ids.device)
                                   for start, length in zip(starts, documents, strict=True)])[None]  # [1, T]
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cos, sin = self._rotary(positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, documents, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, documents, cache)
        return self.model.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, Dh], in fp32 and once for all layers."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, :, None, None].float() * self.frequencies  # [B or 1, T, 1, Dh / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def shift(hidden: Tensor, documents: list[int] | None = None) -> Tensor:
    """Entry t becomes the state before token t: [B, T, D]; zeros before the first token of a document.

    The one place where tokens are shifted.
    """
    shifted = F.pad(hidden[:, :-1], (0, 0, 1, 0))
    if documents is None:
        return shifted
    starts = torch.tensor(documents, device=hidden.device).cumsum(0) - torch.tensor(documents, device=hidden.device)
    return shifted.index_fill(1, starts, 0.0)


class Critic(nn.Module):
    """A backbone of its own with a value head; values(ids)[:, t] is the value of the state before token t."""

    def __init__(self, backbone: Decoder) -> None:
        super().__init__()
        weight = backbone.head_weight
        self.backbone, self.value_head = backbone, nn.Linear(weight.shape[1], 1).to(weight)
        backbone.lm_head = None  # an untied head would be dead weight in optimizer and checkpoint
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> "Critic":
        return cls(copy.deepcopy(decoder))

    def values(self, ids: Tensor, documents: list[int] | None = None) -> Tensor:
        states = shift(self.backbone.hidden(ids, documents=documents), documents)
        return self.value_head(states).squeeze(-1).float()  # [B, T]

    def forward(self, ids: Tensor) -> Tensor:
        return self.values(ids)


def pick_device(name: str) -> str:
    """What --device says; auto: cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_decoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Decoder:
    folder = resolve(path)
    with blaming(folder / "config.json", "the configuration of a decoder"), torch.device("meta"):
        config = DecoderConfig.read(read_json(folder / "config.json"), str(folder / "config.json"))
        decoder = Decoder(config)
    fill(decoder, folder, lambda name: None if name.endswith("rotary_emb.inv_freq") else name, dtype=dtype,
          device=device, twin={"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {})
    return decoder


def new_decoder(public: dict, seed: int) -> Decoder:
    """A randomly initialised decoder; `public` has the keys of config.json."""
    return randomize(Decoder(DecoderConfig.read(public)), seed)


def save_decoder(decoder: Decoder, tokenizer: Tokenizer, path: str | Path, *,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a folder that transformers loads; `state` stands in for decoder.state_dict() where that is sharded."""
    save_tensors(Path(path), decoder.config.public, decoder.state_dict() if state is None else state)
    for file in tokenizer.files:
        if file.parent.resolve() != Path(path).resolve():
            write_aside(Path(path) / file.name, lambda target, file=file: shutil.copyfile(file, target))
