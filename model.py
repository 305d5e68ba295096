"""Networks: Qwen2 / Llama 3 decoder with KV cache, and the critic.

Read from and written to the published layout (config.json, *.safetensors under the public names, tokenizer.json):
a saved folder loads in transformers and vLLM with the same logits. encoder.py and tokenizer.py are part of this
door: `from model import Tokenizer, load_encoder` works.

In the KV cache slot == position. Ragged prompts are right padded; what padding writes into later slots is
overwritten before any token can attend to it.

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
from weights import check, fill, randomize, read_json, resolve, save_tensors, write_aside

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
    tied: bool
    rope_theta: float
    rope_scaling: dict[str, float] | None  # the keys of the "llama3" rule, or None
    public: dict = field(compare=False, repr=False)

    @classmethod
    def read(cls, public: dict, where: str = "config.json") -> "DecoderConfig":
        names = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
        family = public.get("model_type") or names.get((public.get("architectures") or [""])[0])
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files have them apart.
        rope = (public.get("rope_scaling") or {}) | (public.get("rope_parameters") or {})
        rule = rope.get("rope_type", rope.get("type", "default"))
        check(where, "model_type", family, "llama", "qwen2")
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
                head_dim=public.get("head_dim") or width // heads, norm_eps=public.get("rms_norm_eps", 1e-6),
                qkv_bias=family == "qwen2" or bias, o_bias=family == "llama" and bias,
                mlp_bias=bool(public.get("mlp_bias")), tied=bool(public.get("tie_word_embeddings")),
                rope_theta=float(rope.get("rope_theta", public.get("rope_theta", 10000.0))),
                rope_scaling={key: float(rope[key]) for key in LLAMA3_ROPE} if rule == "llama3" else None,
                public=dict(public),
            )
        except KeyError as error:
            raise ValueError(f"{where}: got no {error}, expected it; copy the published file") from None
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


class _Slots(NamedTuple):
    """Where one call writes into the cache and what it reads back; the same for all layers."""

    cache: KVCache
    rows: Tensor | None  # [B] cache rows, None for all in order
    positions: Tensor  # [B, T] slots
    reach: int  # slots < reach are read
    is_fresh: bool  # positions are 0..T-1: all there is to attend to comes with this call

    @classmethod
    def plan(cls, cache: KVCache, rows: Tensor | None, positions: Tensor, count: Tensor) -> "_Slots":
        if rows is None and cache.rows != len(positions):
            raise ValueError(f"KV cache: got {len(positions)} rows of ids, expected {cache.rows}; pass rows=")
        reach = int(positions.max()) + 1
        if reach > cache.slots:
            raise ValueError(f"KV cache: got position {reach - 1}, expected less than {cache.slots}; make it longer")
        is_fresh = 1 < reach == len(count) and bool((positions == count).all())
        return cls(cache, rows, positions, reach, is_fresh)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, KV, Dh]; return what there is to attend to, [B, KV, L, Dh]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        write = (torch.arange(len(k), device=k.device) if self.rows is None else self.rows)[:, None]
        keys[write, :, self.positions], values[write, :, self.positions] = k.to(keys.dtype), v.to(values.dtype)
        keys, values = keys[:, :, : self.reach], values[:, :, : self.reach]
        if self.rows is None:
            return keys, values
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None,
                documents: list[int]) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.num_heads, self.head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        cached = None if slots is None else slots.update(self.layer, k, v)
        if cached is None or slots.is_fresh:
            # A document at a time: what is packed beside it costs nothing, which no mask can say to every kernel.
            parts = zip(*(x.transpose(1, 2).split(documents, 2) for x in (q, k, v)), strict=True)  # [B, H or KV, n, Dh]
            mixed = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
                               for part in parts], dim=2)
            return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))
        # The queries that share a key head are laid side by side, so that keys are never repeated.
        keys, values = cached  # [B, KV, L, Dh]
        q = q.view(B, T, self.num_kv_heads, -1, self.head_dim).permute(0, 2, 3, 1, 4)  # [B, KV, H / KV, T, Dh]
        group, q = q.shape[2], q.flatten(2, 3)
        if T == 1 and not x.is_cuda:  # faster than the CPU's fused kernel, which splits work by row and head only
            weights = (q * self.head_dim**-0.5) @ keys.to(q.dtype).transpose(2, 3)
            mixed = weights.masked_fill(~mask, -torch.inf).softmax(-1) @ values.to(q.dtype)
        else:
            mask = mask.repeat(1, 1, group, 1)  # [B, 1, H / KV * T, L]
            mixed = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), mask)
        return self.o_proj(mixed.unflatten(2, (group, T)).permute(0, 3, 1, 2, 4).reshape(B, T, -1))


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None,
                documents: list[int]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, slots, documents)
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

    def hidden(self, ids: Tensor, *, positions: Tensor | None = None, documents: list[int] | None = None,
               cache: KVCache | None = None, rows: Tensor | None = None) -> Tensor:
        """States after the final norm, [B, T, D]; row t predicts token t + 1.

        Without a cache: causal attention over the T tokens, within a document where `documents` gives the lengths
        of the documents packed into a row.
        With a cache: the token at position p of row b is written to slot p of cache row rows[b] (b when rows is
        None) and attends to that row's slots <= p. `positions` [B, T] default to 0..T-1.
        """
        if documents and sum(documents) != ids.shape[1]:
            raise ValueError(f"documents: got {sum(documents)} tokens, expected the {ids.shape[1]} of a row")
        documents = documents or [ids.shape[1]]
        count = torch.cat([torch.arange(length, device=ids.device) for length in documents])
        positions = count.expand_as(ids) if positions is None else positions
        mask, slots = None, None
        if cache is not None:
            slots = _Slots.plan(cache, rows, positions, count)
            if not slots.is_fresh:
                mask = torch.arange(slots.reach, device=ids.device) <= positions[:, None, :, None]  # [B, 1, T, L]
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cos, sin = self._rotary(positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, slots, documents, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, slots, documents)
        return self.model.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, Dh], in fp32 and once for all layers."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        positions = positions[:1] if positions.stride(0) == 0 else positions  # the same for all rows
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


def load_decoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Decoder:
    folder = resolve(path)
    config = DecoderConfig.read(read_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
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
