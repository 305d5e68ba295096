"""Networks: a Qwen2 / Llama 3 decoder with KV cache, a critic, a BERT-type encoder, and their tokenizers.

Everything is read from and written to the published layout (config.json, *.safetensors under the public
parameter names, tokenizer.json), so that a saved folder loads in transformers and vLLM with the same logits.

Departures from transformers, on purpose:
1. Text never becomes a control token: added tokens are not matched inside text, and in a chat prompt the template
   and the message contents are encoded apart.
2. A checkpoint either fits its config.json exactly or is refused with file, tensor, got, expected, what to do.
3. In the KV cache, slot == position: ragged prompts are right padded, and what padding writes into later slots is
   overwritten before any token can attend to it.

    decoder, tokenizer = load_decoder("Qwen/Qwen2.5-0.5B-Instruct"), Tokenizer.load("Qwen/Qwen2.5-0.5B-Instruct")
    logits = decoder(torch.tensor([tokenizer.chat([{"role": "user", "content": "Hello"}])]))

Legend: B rows, T tokens, V vocabulary, D width, H query heads, KV key/value heads, Dh head width, N texts, L slots read.
"""

import copy
import datetime
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


# ---------------------------------------------------------------------------------------- decoder: configuration


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
    rope_scaling: dict | None  # the keys of the "llama3" rule, or None
    public: dict = field(compare=False, repr=False)

    @classmethod
    def read(cls, public: dict, where: str = "config.json") -> "DecoderConfig":
        family = public.get("model_type") or {
            "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"
        }.get((public.get("architectures") or ["none"])[0])
        _supported(where, "model_type", family, ("llama", "qwen2"))
        _supported(where, "hidden_act", public.get("hidden_act", "silu"), ("silu",))
        _supported(where, "use_sliding_window", public.get("use_sliding_window") or False, (False,))
        _supported(where, "quantization_config", public.get("quantization_config"), (None,))
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters; older files have both apart.
        rope = {**(public.get("rope_scaling") or {}), **(public.get("rope_parameters") or {})}
        rule = rope.get("rope_type", rope.get("type", "default"))
        _supported(where, "rope type", rule, ("default", "llama3"))
        _supported(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,))
        _supported(where, "rope_interleaved", public.get("rope_interleaved") or False, (False,))
        if rule == "llama3":
            rope.setdefault("original_max_position_embeddings", public.get("max_position_embeddings"))
        try:
            heads, width = public["num_attention_heads"], public["hidden_size"]
            llama_bias = bool(public.get("attention_bias", False))
            config = cls(
                vocab_size=public["vocab_size"], hidden_size=width, num_heads=heads,
                intermediate_size=public["intermediate_size"], num_layers=public["num_hidden_layers"],
                num_kv_heads=public.get("num_key_value_heads") or heads,
                head_dim=public.get("head_dim") or width // heads,
                norm_eps=public.get("rms_norm_eps", 1e-6),
                qkv_bias=family == "qwen2" or llama_bias, o_bias=family == "llama" and llama_bias,
                mlp_bias=bool(public.get("mlp_bias", False)),
                tied=bool(public.get("tie_word_embeddings", False)),
                rope_theta=float(rope.get("rope_theta", public.get("rope_theta", 10000.0))),
                rope_scaling={key: float(rope[key]) for key in (
                    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
                )} if rule == "llama3" else None,
                public=dict(public),
            )
        except KeyError as error:
            raise ValueError(f"{where}: got no key {error}, expected a Llama or Qwen2 configuration; "
                             "take config.json from the published checkpoint") from None
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise ValueError(
                f"{where}: got {config.num_heads} heads, {config.num_kv_heads} key/value heads of width "
                f"{config.head_dim}, expected heads divisible by key/value heads and an even width; fix the file")
        return config

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each pair of channels, fp32 [Dh / 2]."""
        with torch.device("cpu"):  # also when the network is being laid out on the meta device
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
            frequencies = 1.0 / self.rope_theta**exponents
        if self.rope_scaling is None:
            return frequencies
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended linearly.
        low, high = self.rope_scaling["low_freq_factor"], self.rope_scaling["high_freq_factor"]
        turns = self.rope_scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / self.rope_scaling["factor"])


def _supported(where: str, key: str, got: object, expected: tuple) -> None:
    if got not in expected:
        raise ValueError(f"{where}: unsupported {key}: got {got!r}, expected one of {list(expected)}; "
                         "use a Qwen2, Llama 3 or (as encoder) BERT-type checkpoint")


# ---------------------------------------------------------------------------------------------- decoder: KV cache


class KVCache:
    """Keys and values of every layer, [rows, KV, slots, Dh]; slot == position."""

    def __init__(self, config: DecoderConfig, rows: int, slots: int, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        self.rows, self.slots = rows, slots
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        # zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 * NaN would be NaN
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def keep(self, rows: Tensor) -> None:
        """Compact to these rows, in this order."""
        self.keys = [keys.index_select(0, rows) for keys in self.keys]
        self.values = [values.index_select(0, rows) for values in self.values]
        self.rows = len(rows)


class _Slots(NamedTuple):
    """Where one call writes into the cache and what it reads back; shared by all layers."""

    cache: KVCache
    write: Tensor  # [B, 1] cache rows
    positions: Tensor  # [B, T] slots
    rows: Tensor | None  # [B] when rows must be gathered for reading
    reach: int  # slots < reach are read
    is_fresh: bool  # positions are 0..T-1: everything to attend to is in this call

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [B, T, KV, Dh]; return what to attend to, [B, KV, L, Dh]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.write, :, self.positions] = k.to(keys.dtype)
        values[self.write, :, self.positions] = v.to(values.dtype)
        keys, values = keys[:, :, : self.reach], values[:, :, : self.reach]
        if self.rows is not None:
            keys, values = keys.index_select(0, self.rows), values.index_select(0, self.rows)
        return keys, values


# ------------------------------------------------------------------------------------------------ decoder: layers


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
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.o_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.num_heads, self.head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        cached = slots.update(self.layer, k, v) if slots is not None else None
        if slots is None or slots.is_fresh:
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                attn_mask=mask, is_causal=mask is None, enable_gqa=self.num_heads != self.num_kv_heads,
            ).transpose(1, 2)  # [B, T, H, Dh]
        else:
            # The queries that share a key head are laid side by side, so keys are never repeated.
            keys, values = cached
            group = self.num_heads // self.num_kv_heads
            q = q.view(B, T, self.num_kv_heads, group, self.head_dim).permute(0, 2, 3, 1, 4)
            q = q.reshape(B, self.num_kv_heads, group * T, self.head_dim)
            out = F.scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype), attn_mask=mask)
            out = out.view(B, self.num_kv_heads, group, T, self.head_dim).permute(0, 3, 1, 2, 4)
        return self.o_proj(out.reshape(B, T, self.num_heads * self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Holds what is public under "model."."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """Decoder(ids [B, T]) -> logits [B, T, V]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequencies = config.rope_frequencies()  # no buffer: .to(bfloat16) must not round it
        self.checkpointing = False  # True: recompute layers in backward instead of storing activations

    @property
    def head_weight(self) -> nn.Parameter:  # [V, D]
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.head_weight)

    def hidden(self, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None,
               cache: KVCache | None = None, rows: Tensor | None = None) -> Tensor:
        """States after the final norm, [B, T, D]; row t predicts token t + 1.

        Without a cache: causal attention over the T tokens, kept within a document where `documents` [B, T] numbers
        them. With a cache: the token at position p of row b is written to slot p of cache row rows[b] (b when
        rows is None) and attends to that row's slots <= p. `positions` [B, T] defaults to 0..T-1.
        """
        B, T = ids.shape
        count = torch.arange(T, device=ids.device)
        mask, slots = None, None
        if cache is not None:
            slots = _slots(cache, count.expand(B, T) if positions is None else positions, rows, count)
            if not slots.is_fresh:
                mask = torch.arange(slots.reach, device=ids.device) <= slots.positions[:, :, None]  # [B, T, L]
                group = self.config.num_heads // self.config.num_kv_heads
                mask = mask.repeat(1, group, 1)[:, None] if T > 1 else mask[:, None]  # [B, 1, group * T or 1, L]
        elif documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]) & (count[:, None] >= count)
            mask = mask[:, None]  # [B, 1, T, T]
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cos, sin = self._rotary(count[None] if positions is None else positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, slots, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, slots)
        return self.model.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, Dh], computed in fp32 and once for all layers."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, :, None, None].float() * self.frequencies  # [B, T, 1, Dh / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _slots(cache: KVCache, positions: Tensor, rows: Tensor | None, count: Tensor) -> _Slots:
    B, T = positions.shape
    if rows is None and cache.rows != B:
        raise ValueError(f"KV cache: got {B} rows of ids, expected {cache.rows}; pass rows=")
    reach = int(positions.max()) + 1
    if reach > cache.slots:
        raise ValueError(f"KV cache: got position {reach - 1}, expected less than {cache.slots}; make it longer")
    is_fresh = T > 1 and reach == T and bool((positions == count).all())
    write = (torch.arange(B, device=positions.device) if rows is None else rows)[:, None]
    return _Slots(cache, write, positions, rows, reach, is_fresh)


# ------------------------------------------------------------------------------------------------------- critic


def shift(hidden: Tensor) -> Tensor:
    """Entry t becomes the state before token t: [B, T, D], entry 0 zeros. The one place where tokens are shifted."""
    return F.pad(hidden[:, :-1], (0, 0, 1, 0))


class Critic(nn.Module):
    """A backbone of its own with a value head; values[:, t] is the value of the state before token t."""

    def __init__(self, backbone: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        weight = backbone.head_weight
        backbone.lm_head = None  # an untied head would be dead weight in optimizer and checkpoint
        self.value_head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @classmethod
    def from_decoder(cls, decoder: Decoder) -> "Critic":
        return cls(copy.deepcopy(decoder))

    def values(self, ids: Tensor) -> Tensor:
        """[B, T], fp32."""
        return self.value_head(shift(self.backbone.hidden(ids))).squeeze(-1).float()

    def forward(self, ids: Tensor) -> Tensor:
        return self.values(ids)


# ------------------------------------------------------------------------------------------------------- encoder


class EncoderLayer(nn.Module):
    """Post-LN BERT layer; attributes carry the public names, "self" among them, hence the dictionaries."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, inner, eps = config["hidden_size"], config["intermediate_size"], config.get("layer_norm_eps", 1e-12)
        self.num_heads = config["num_attention_heads"]
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps)}),
        })
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.attention["self"][name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for name in ("query", "key", "value"))  # [B, H, T, Dh]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](mixed))
        inner = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class Encoder(nn.Module):
    """Texts to vectors: BERT, mean over valid tokens, L2 norm."""

    def __init__(self, config: dict, tokenizer: RawTokenizer, *, prefixes: dict[str, str], max_tokens: int) -> None:
        super().__init__()
        self.config, self.tokenizer, self.prefixes = config, tokenizer, prefixes
        self.max_tokens = min(max_tokens, config["max_position_embeddings"])
        self.tokenizer.enable_truncation(self.max_tokens)
        self.tokenizer.no_padding()
        width = config["hidden_size"]
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config["vocab_size"], width),
            "position_embeddings": nn.Embedding(config["max_position_embeddings"], width),
            "token_type_embeddings": nn.Embedding(config.get("type_vocab_size", 2), width),
            "LayerNorm": nn.LayerNorm(width, config.get("layer_norm_eps", 1e-12)),
        })
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids [N, T] (right padded) and valid_mask [N, T]; [CLS] and [SEP] are added, never matched in the text."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.config.get("pad_token_id") or 0)
        for row, entries in zip(ids, rows, strict=True):
            row[: len(entries)] = torch.tensor(entries)
        lengths = torch.tensor([len(row) for row in rows])
        device = self.embeddings["word_embeddings"].weight.device
        return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)

    def forward(self, ids: Tensor, valid_mask: Tensor) -> Tensor:
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, valid_mask[:, None, None, :])
        x = x.float().masked_fill(~valid_mask[:, :, None], 0.0).sum(1)  # fp32 from here
        return F.normalize(x / valid_mask.sum(1, keepdim=True), dim=-1)  # [B, D]

    @torch.no_grad()
    def embed(self, texts: list[str], *, kind: str, batch_size: int = 64) -> Tensor:
        """[N, D] fp32; kind is "query" or "passage" and selects the prefix."""
        texts = [self.prefixes[kind] + text for text in texts]
        out = torch.empty(len(texts), self.config["hidden_size"])
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
        for start in range(0, len(texts), batch_size):
            chosen = by_length[start : start + batch_size]
            out[chosen] = self(*self.encode([texts[i] for i in chosen])).cpu()
        return out.to(self.embeddings["word_embeddings"].weight.device)


# ----------------------------------------------------------------------------------------------------- tokenizer


def _text_tokenizer(path: Path, *, keep_template: bool) -> RawTokenizer:
    """A tokenizer that matches no added token inside text: all are marked special, and special ones are text."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    for token in spec.get("added_tokens", []):
        # runs of spaces are added tokens in some vocabularies, but they are ordinary text
        token["special"] = token["special"] or not token["content"].isspace()
    if not keep_template:
        spec["post_processor"] = None
    tokenizer = RawTokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    return tokenizer


class Tokenizer:
    """Text to ids and back; text never yields a control token."""

    # Contents stand in the template as a mark between two em spaces: a lost space shows that the template trims.
    MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")
    ROLES = ("system", "user", "assistant", "tool")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = RawTokenizer.from_file(str(_file(folder, "tokenizer.json")))
        self.full.no_truncation()
        self.full.no_padding()
        self.text = _text_tokenizer(folder / "tokenizer.json", keep_template=False)
        settings = _json(folder / "tokenizer_config.json", {})
        self.size = max(self.full.get_vocab(with_added_tokens=True).values()) + 1
        self.template = _template(folder, settings)
        self.names = {key: value["content"] if isinstance(value, dict) else value
                      for key, value in settings.items() if key in ("bos_token", "eos_token", "pad_token") and value}
        self.eos_id = self._end_of_turn()
        self.pad_id = self._id(self.names["pad_token"]) if "pad_token" in self.names else self.eos_id
        unk = json.loads(self.full.to_str())["model"].get("unk_token")
        added = self.full.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special and token.content != unk)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        return cls(resolve(path))

    @property
    def files(self) -> list[Path]:
        """What to copy beside a saved model."""
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
                 "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")
        return [self.folder / name for name in names if (self.folder / name).is_file()]

    def encode(self, text: str) -> list[int]:
        ids = self.text.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            found = sorted(self.control_ids.intersection(ids))
            raise ValueError(f"{self.folder}/tokenizer.json: got control ids {found} from plain text, expected none; "
                             "its model holds control tokens as words, use another tokenizer")
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special)

    def containing(self, character: str) -> frozenset[int]:
        """Ids whose decoded text contains the character (control tokens decode to nothing)."""
        texts = self.full.decode_batch([[i] for i in range(self.size)], skip_special_tokens=True)
        return frozenset(i for i, text in enumerate(texts) if character in text)

    def chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation; template pieces may hold control tokens, contents cannot."""
        contents = [message["content"] for message in messages]
        if self.template is None:
            return self.encode("\n".join(contents))
        for message in messages:
            if message["role"] not in self.ROLES:
                raise ValueError(f"message role: got {message['role']!r}, expected one of {list(self.ROLES)}; fix the row")
        marked = [{"role": message["role"], "content": f"\u2003\ue000{i}\ue001\u2003"}
                  for i, message in enumerate(messages)]
        pieces = self.MARK.split(self._render(marked, add_generation_prompt))  # text, space, number, space, text, ...
        missing = set(range(len(messages))) - {int(number) for number in pieces[2::4]}
        if missing:
            raise ValueError(f"{self.folder}: chat template: got no content of messages {sorted(missing)} in its output, "
                             "expected every content as it is; use another template")
        ids = self.full.encode(pieces[0], add_special_tokens=False).ids
        for before, number, after, literal in zip(*(pieces[i::4] for i in (1, 2, 3, 4)), strict=True):
            content = contents[int(number)]
            content = content if before else content.lstrip()
            ids += self.encode(content if after else content.rstrip())
            ids += self.full.encode(literal, add_special_tokens=False).ids
        return ids

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        # Templates come with checkpoints from strangers, hence the sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": raise_exception,
                                "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            return environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.names)
        except TemplateError as error:
            raise ValueError(f"{self.folder}: chat template: got {type(error).__name__}: {error}, expected a rendering; "
                             "check the messages' roles, or replace the template") from error

    def _end_of_turn(self) -> int:
        listed = []
        for name in ("generation_config.json", "config.json"):
            ids = _json(self.folder / name, {}).get("eos_token_id")
            listed += ids if isinstance(ids, list) else [] if ids is None else [ids]
        # Llama 3 names the end of text as eos_token and adds the end of turn to a list of ids.
        turn = self.full.token_to_id("<|eot_id|>")
        if turn in listed and self.template is not None and "<|eot_id|>" in self.template:
            return turn
        if "eos_token" in self.names:
            return self._id(self.names["eos_token"])
        if listed:
            return listed[0]
        raise ValueError(f"{self.folder}/tokenizer_config.json: got no eos_token, expected one; add it")

    def _id(self, token: str) -> int:
        found = self.full.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got token {token!r}, expected one of tokenizer.json; "
                             "take both files from the same checkpoint")
        return found


def _template(folder: Path, settings: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


# ----------------------------------------------------------------------------------------------- reading, writing


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint; ids such as "Qwen/Qwen2.5-0.5B-Instruct" are downloaded."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is None or folder.parent.is_dir():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a folder or a model id like org/name; check the path")
    from huggingface_hub import snapshot_download  # lazy: only downloads need it

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:
        raise FileNotFoundError(f"checkpoint: got {path}, neither a folder nor a model that could be downloaded "
                                f"({type(error).__name__}: {error}); check the path") from error


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        found = sorted(entry.name for entry in folder.iterdir())
        raise FileNotFoundError(f"{folder}: got {found}, expected {name} among them; copy it from the checkpoint")
    return folder / name


def _json(path: Path, default: dict | None = None) -> dict:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(_file(path.parent, path.name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got broken JSON ({error}), expected an object; copy it again") from error


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [_file(folder, WEIGHTS)]
    return [_file(folder, name) for name in sorted(set(_json(folder / INDEX)["weight_map"].values()))]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes that are no complete safetensors file ({error}), "
                         "expected a whole one; download or copy it again") from error


def _fill(module: nn.Module, folder: Path, *, public_name: Callable[[str], str | None], dtype: torch.dtype,
          device: torch.device | str, spare: str | None = None, spare_of: str | None = None) -> None:
    """Load a module laid out on the meta device, strictly. `spare`: a copy of `spare_of` that may be there too."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    for path in _shards(folder):
        with _open(path) as file:
            for stored in file.keys():
                name = public_name(stored)
                if name is None:
                    continue
                wanted = expected.get(spare_of if name == spare else name)
                part = file.get_slice(stored)
                if wanted is None:
                    raise ValueError(f"{path}: unexpected tensor {stored}: got shape {part.get_shape()}, expected only "
                                     "what config.json describes; take both files from the same checkpoint")
                if tuple(part.get_shape()) != wanted:
                    raise ValueError(f"{path}: tensor {stored}: got shape {part.get_shape()}, expected {list(wanted)}; "
                                     "take config.json and weights from the same checkpoint")
                if part.get_dtype() not in FLOAT_TYPES:
                    raise ValueError(f"{path}: tensor {stored}: got type {part.get_dtype()}, expected one of "
                                     f"{list(FLOAT_TYPES)}; use a checkpoint that is not quantized")
                # a copy, because the tensor of safe_open is a view of the file
                found[name] = file.get_tensor(stored).to(device, dtype, copy=True)
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: missing tensor {missing[0]} (and {len(missing) - 1} more): got {len(found)} tensors, "
                         f"expected {len(expected)}; take config.json and weights from the same checkpoint")
    if spare in found and not torch.equal(found.pop(spare), found[spare_of]):
        raise ValueError(f"{folder}: tensor {spare}: got values other than {spare_of}'s, expected the same, as config.json "
                         "says tie_word_embeddings; set that to false to use it, or remove the tensor")
    module.load_state_dict(found, assign=True)


def load_decoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Decoder:
    folder = resolve(path)
    config = DecoderConfig.read(_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        decoder = Decoder(config)
    spare = ("lm_head.weight", "model.embed_tokens.weight") if config.tied else (None, None)
    _fill(decoder, folder, dtype=dtype, device=device, spare=spare[0], spare_of=spare[1],
          public_name=lambda name: None if name.endswith("rotary_emb.inv_freq") else name)
    return decoder


def new_decoder(public: dict, seed: int) -> Decoder:
    """A randomly initialised decoder; `public` has the keys of config.json."""
    return _randomize(Decoder(DecoderConfig.read(public)), seed)


def _randomize(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():  # matrices std 0.02; vectors are biases (0) and norm weights (1)
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
        for name, parameter in module.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    return module


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Atomic: a reader or a crash sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    write(partial)
    os.replace(partial, path)


def _save(folder: Path, public: dict, state: dict[str, Tensor], files: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    public = {key: value for key, value in public.items() if key != "dtype"} | {"torch_dtype": kind}
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    (folder / INDEX).unlink(missing_ok=True)  # left by a sharded checkpoint, it would point to old files
    _write(folder / "config.json", lambda path: path.write_text(json.dumps(public, indent=1) + "\n"))
    for file in files:
        if file.parent.resolve() != folder.resolve():
            _write(folder / file.name, lambda path, file=file: shutil.copyfile(file, path))


def save_decoder(decoder: Decoder, tokenizer: Tokenizer, path: str | Path, *,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a folder that transformers loads; `state` replaces decoder.state_dict() where that is sharded."""
    state = decoder.state_dict() if state is None else state
    _save(Path(path), decoder.config.public, state, tokenizer.files)


BERT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings")


def _bert_name(name: str) -> str | None:
    name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
    return None if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids") else name


def _bert_config(folder: Path) -> dict:
    config = _json(folder / "config.json")
    where = str(folder / "config.json")
    if "pooling_mode_mean_tokens" in config:
        config = _config_from_shapes(folder)
    _supported(where, "model_type", config.get("model_type"), ("bert",))
    _supported(where, "hidden_act", config.get("hidden_act", "gelu"), ("gelu",))
    _supported(where, "position_embedding_type", config.get("position_embedding_type", "absolute"), ("absolute",))
    pooling = _json(folder / "1_Pooling" / "config.json", {})
    _supported(str(folder / "1_Pooling/config.json"), "pooling_mode_mean_tokens",
               pooling.get("pooling_mode_mean_tokens", True), (True,))
    missing = [key for key in BERT_KEYS if key not in config]
    if missing:
        raise ValueError(f"{where}: got no {missing}, expected them; take config.json from the published checkpoint")
    return config


def _config_from_shapes(folder: Path) -> dict:
    """The sizes of a BERT whose config.json was overwritten by 1_Pooling/config.json, as flat copies of folders do."""
    shapes = {}
    for path in _shards(folder):
        with _open(path) as file:
            shapes |= {_bert_name(name): file.get_slice(name).get_shape() for name in file.keys()}
    vocab, width = shapes["embeddings.word_embeddings.weight"]
    # Shapes do not tell the head count: 64 wide as in every published BERT, but MiniLM and E5-small (width 384) have 12.
    heads = 12 if width == 384 else max(1, width // 64)
    warnings.warn(f"{folder}/config.json: got a pooling configuration, expected the encoder's; sizes are taken from the "
                  f"tensors and {heads} heads are assumed; put the published config.json there", stacklevel=4)
    return {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocab, "hidden_size": width,
            "num_hidden_layers": len([name for name in shapes if name and name.endswith("query.weight")]),
            "num_attention_heads": heads, "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0], "hidden_act": "gelu",
            "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0], "layer_norm_eps": 1e-12}


def _prefixes(folder: Path, config: dict, query: str | None, passage: str | None) -> dict[str, str]:
    prompts = _json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    is_e5 = "e5" in f"{folder.resolve().name} {config.get('_name_or_path', '')}".lower()
    default = {"query": "query: " if is_e5 else "", "passage": "passage: " if is_e5 else ""}
    prompts = default | {key: prompts[key] for key in default if key in prompts}
    return {"query": prompts["query"] if query is None else query,
            "passage": prompts["passage"] if passage is None else passage}


def load_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 query_prefix: str | None = None, passage_prefix: str | None = None, max_tokens: int = 256) -> Encoder:
    folder = resolve(path)
    config = _bert_config(folder)
    tokenizer = _text_tokenizer(_file(folder, "tokenizer.json"), keep_template=True)
    prefixes = _prefixes(folder, config, query_prefix, passage_prefix)
    with torch.device("meta"):
        encoder = Encoder(config, tokenizer, prefixes=prefixes, max_tokens=max_tokens)
    _fill(encoder, folder, dtype=dtype, device=device, public_name=_bert_name)
    return encoder.eval()


def new_encoder(public: dict, tokenizer_path: str | Path, seed: int, *, query_prefix: str = "query: ",
                passage_prefix: str = "passage: ") -> Encoder:
    """A randomly initialised encoder; tokenizer_path is a tokenizer.json with a WordPiece model and [CLS] / [SEP]."""
    tokenizer = _text_tokenizer(Path(tokenizer_path), keep_template=True)
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    return _randomize(Encoder({"model_type": "bert"} | public, tokenizer, prefixes=prefixes, max_tokens=256), seed)


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    folder = Path(path)
    _save(folder, {"architectures": ["BertModel"]} | encoder.config, encoder.state_dict(), [])
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.no_truncation()
    _write(folder / "tokenizer.json", lambda target: tokenizer.save(str(target)))
    prompts = json.dumps({"prompts": encoder.prefixes}, indent=1) + "\n"
    _write(folder / "config_sentence_transformers.json", lambda target: target.write_text(prompts))
