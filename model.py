"""Networks: Qwen2 / Llama 3 decoder with KV cache, critic, BERT-type encoder, and the decoder's tokenizer.

All of it is read from and written to the published layout (config.json, *.safetensors under the public names,
tokenizer.json): a saved folder loads in transformers and vLLM with the same logits.

Departures from transformers, on purpose:
1. Text never becomes a control token: added tokens are not matched inside text, and in a chat prompt the
   template and the contents of the messages are encoded apart.
2. A checkpoint fits its config.json exactly or is refused with file, tensor, got, expected, what to do.
3. In the KV cache slot == position. Ragged prompts are right padded; what padding writes into later slots is
   overwritten before any token can attend to it.

    decoder, tokenizer = load_decoder("Qwen/Qwen2.5-0.5B-Instruct"), Tokenizer.load("Qwen/Qwen2.5-0.5B-Instruct")
    logits = decoder(torch.tensor([tokenizer.chat([{"role": "user", "content": "Hello"}])]))  # [1, T, V]

Legend: B rows, T tokens, L slots read, V vocabulary, D width, H heads, KV key/value heads, Dh head width, N texts.
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
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# ---------------------------------------------------------------------------------------------------- decoder


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
        _check(where, "model_type", family, "llama", "qwen2")
        _check(where, "hidden_act", public.get("hidden_act", "silu"), "silu")
        _check(where, "use_sliding_window", public.get("use_sliding_window") or False, False)
        _check(where, "quantization_config", public.get("quantization_config"), None)
        _check(where, "rope type", rule, "default", "llama3")
        _check(where, "partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1)
        _check(where, "rope_interleaved", public.get("rope_interleaved") or False, False)
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


def _check(where: str, key: str, got: object, *expected: object) -> None:
    if got not in expected:
        raise ValueError(f"{where}: unsupported {key}: got {got!r}, expected one of {list(expected)}; "
                         "use a Qwen2 or Llama decoder, or a BERT-type encoder with mean pooling")


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.num_heads, self.head_dim), cos, sin)
        k = rotate(self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim)
        cached = None if slots is None else slots.update(self.layer, k, v)
        if cached is None or slots.is_fresh:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H or KV, T, Dh]
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, slots: _Slots | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, slots)
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

    def hidden(self, ids: Tensor, *, positions: Tensor | None = None, documents: Tensor | None = None,
               cache: KVCache | None = None, rows: Tensor | None = None) -> Tensor:
        """States after the final norm, [B, T, D]; row t predicts token t + 1.

        Without a cache: causal attention over the T tokens, within a document where `documents` [B, T] numbers them.
        With a cache: the token at position p of row b is written to slot p of cache row rows[b] (b when rows is
        None) and attends to that row's slots <= p. `positions` [B, T] default to 0..T-1.
        """
        count = torch.arange(ids.shape[1], device=ids.device)
        positions = count.expand_as(ids) if positions is None else positions
        mask, slots = None, None
        if cache is not None:
            slots = _Slots.plan(cache, rows, positions, count)
            if not slots.is_fresh:
                mask = torch.arange(slots.reach, device=ids.device) <= positions[:, None, :, None]  # [B, 1, T, L]
        elif documents is not None:
            mask = (documents[:, None, :, None] == documents[:, None, None]) & (count[:, None] >= count)  # [B, 1, T, T]
        x = self.model.embed_tokens(ids)  # [B, T, D]
        cos, sin = self._rotary(positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, slots, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, slots)
        return self.model.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin, [B or 1, T, 1, Dh], in fp32 and once for all layers."""
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        positions = positions[:1] if positions.stride(0) == 0 else positions  # the same for all rows
        angles = positions[:, :, None, None].float() * self.frequencies  # [B or 1, T, 1, Dh / 2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def shift(hidden: Tensor) -> Tensor:
    """Entry t becomes the state before token t: [B, T, D], entry 0 zeros. The one place where tokens are shifted."""
    return F.pad(hidden[:, :-1], (0, 0, 1, 0))


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

    def values(self, ids: Tensor) -> Tensor:
        return self.value_head(shift(self.backbone.hidden(ids))).squeeze(-1).float()  # [B, T]

    def forward(self, ids: Tensor) -> Tensor:
        return self.values(ids)


# ---------------------------------------------------------------------------------------------------- encoder


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
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](mixed))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class Encoder(nn.Module):
    """Texts to vectors: BERT, mean over valid tokens, L2 norm."""

    def __init__(self, config: dict, tokenizer: RawTokenizer, prefixes: dict[str, str], max_tokens: int) -> None:
        super().__init__()
        self.config, self.tokenizer, self.prefixes = config, tokenizer, prefixes
        self.tokenizer.enable_truncation(min(max_tokens, config["max_position_embeddings"]))
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
        """ids [N, T], right padded, and valid_mask [N, T]; [CLS] and [SEP] are added, never matched in the text."""
        rows = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.config.get("pad_token_id") or 0)
        valid_mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = self.embeddings["word_embeddings"].weight.device
        return ids.to(device), valid_mask.to(device)

    def forward(self, ids: Tensor, valid_mask: Tensor) -> Tensor:
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, valid_mask[:, None, None])
        x = x.float().masked_fill(~valid_mask[:, :, None], 0.0).sum(1)  # fp32 from here
        return F.normalize(x / valid_mask.sum(1, keepdim=True), dim=-1)  # [B, D]

    @torch.no_grad()
    def embed(self, texts: list[str], *, kind: str, batch_size: int = 64) -> Tensor:
        """[N, D] fp32; `kind` ("query" or "passage") selects the prefix."""
        texts = [self.prefixes[kind] + text for text in texts]
        out = self.embeddings["word_embeddings"].weight.new_empty(
            len(texts), self.config["hidden_size"], dtype=torch.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
        for start in range(0, len(texts), batch_size):
            chosen = by_length[start : start + batch_size]
            out[chosen] = self(*self.encode([texts[i] for i in chosen]))
        return out


# -------------------------------------------------------------------------------------------------- tokenizer


def _text_tokenizer(path: Path) -> RawTokenizer:
    """Matches no added token inside text: all of them are marked special, and special ones are encoded as text.

    They are not removed, because the model may need their ids (an unknown-word token, [CLS] around a text).
    """
    spec = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
    for token in spec.get("added_tokens", []):
        token["special"] = token["special"] or not token["content"].isspace()  # runs of spaces are ordinary text
    tokenizer = RawTokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    return tokenizer


class Tokenizer:
    """Text to ids and back; text never yields a control token."""

    FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json")
    ROLES = ("system", "user", "assistant", "tool")
    # In the template each content stands as a mark between two em spaces: a lost space shows that it trims.
    MARK = re.compile("(\u2003?)\ue000(\\d+)\ue001(\u2003?)")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.full = RawTokenizer.from_file(str(_file(folder, "tokenizer.json")))
        self.text = _text_tokenizer(folder / "tokenizer.json")
        self.full.no_truncation()
        self.full.no_padding()
        settings = _json(folder / "tokenizer_config.json", {})
        self.template = settings.get("chat_template")
        if isinstance(self.template, list):  # several, by name
            self.template = {entry["name"]: entry["template"] for entry in self.template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            self.template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.names = {key: value["content"] if isinstance(value, dict) else value for key, value in settings.items()
                      if key in ("bos_token", "eos_token", "pad_token") and value}
        self.size = max(self.full.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._end_of_turn()
        self.pad_id = self._id(self.names["pad_token"]) if "pad_token" in self.names else self.eos_id
        unknown = json.loads(self.full.to_str())["model"].get("unk_token")
        added = self.full.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special and token.content != unknown)
        self._containing: dict[str, frozenset[int]] = {}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        return cls(resolve(path))

    @property
    def files(self) -> list[Path]:
        """What to copy beside a saved model."""
        return [self.folder / name for name in self.FILES if (self.folder / name).is_file()]

    def encode(self, text: str) -> list[int]:
        ids = self.text.encode(text, add_special_tokens=False).ids
        if not self.control_ids.isdisjoint(ids):
            raise ValueError(f"{self.folder}/tokenizer.json: got control ids {sorted(self.control_ids & set(ids))} "
                             "from text, expected none; its model holds them as words, use another tokenizer")
        return ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        return self.full.decode(ids, skip_special_tokens=skip_special)

    def containing(self, character: str) -> frozenset[int]:
        """Ids whose decoded text contains the character (control tokens decode to nothing)."""
        if character not in self._containing:  # once: a vocabulary of 150,000 takes a third of a second
            texts = self.full.decode_batch([[i] for i in range(self.size)], skip_special_tokens=True)
            self._containing[character] = frozenset(i for i, text in enumerate(texts) if character in text)
        return self._containing[character]

    def chat(self, messages: list[dict], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation: pieces of the template may hold control tokens, contents cannot."""
        contents = [message["content"] for message in messages]
        if self.template is None:
            return self.encode("\n".join(contents))
        marked = [{"role": message["role"], "content": f"\u2003\ue000{i}\ue001\u2003"}
                  for i, message in enumerate(messages)]
        # piece, em space, number, em space, piece, ...
        first, *rest = self.MARK.split(self._render(marked, add_generation_prompt))
        missing = sorted(set(range(len(messages))) - {int(number) for number in rest[1::4]})
        if missing:
            raise ValueError(f"{self.folder}: chat template: got no content of messages {missing} in what it wrote, "
                             "expected each as it is; use another template")
        ids = self.full.encode(first, add_special_tokens=False).ids
        for before, number, after, piece in zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True):
            content = contents[int(number)]
            content = content if before else content.lstrip()
            ids += self.encode(content if after else content.rstrip())
            ids += self.full.encode(piece, add_special_tokens=False).ids
        return ids

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        unknown = [message["role"] for message in messages if message["role"] not in self.ROLES]
        if unknown:  # a role is rendered as it is, so a free one could carry control tokens
            raise ValueError(f"message role: got {unknown[0]!r}, expected one of {list(self.ROLES)}; fix the messages")
        # The sandbox, because templates come with checkpoints from strangers.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": raise_exception,
                                "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            return environment.from_string(self.template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self.names)
        except TemplateError as error:
            raise ValueError(f"{self.folder}: chat template: got {type(error).__name__}: {error}, expected text; "
                             "check the roles of the messages, or replace the template") from error

    def _end_of_turn(self) -> int:
        listed: list[int] = []
        for name in ("generation_config.json", "config.json"):
            ids = _json(self.folder / name, {}).get("eos_token_id")
            listed += ids if isinstance(ids, list) else [] if ids is None else [ids]
        # Llama 3 may name the end of text as eos_token and list the end of turn beside it.
        turn = self.full.token_to_id("<|eot_id|>")
        if turn in listed and self.template is not None and "<|eot_id|>" in self.template:
            return turn
        if "eos_token" not in self.names and not listed:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got no eos_token, expected one; add it")
        return self._id(self.names["eos_token"]) if "eos_token" in self.names else listed[0]

    def _id(self, token: str) -> int:
        found = self.full.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.folder}/tokenizer_config.json: got {token!r}, expected a token of tokenizer.json; "
                             "take both files from the same checkpoint")
        return found


# ------------------------------------------------------------------------------------------------ checkpoints


def resolve(path: str | Path) -> Path:
    """The folder of a checkpoint; ids such as "Qwen/Qwen2.5-0.5B-Instruct" are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is None or Path(path).parent.is_dir():
        raise FileNotFoundError(f"checkpoint: got {path}, expected a folder or an id like org/name; check the path")
    from huggingface_hub import snapshot_download  # here, because only downloads need it

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except Exception as error:
        raise FileNotFoundError(f"checkpoint: got {path}, expected a folder or an id that can be downloaded "
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
                         "expected a whole one; copy it again") from error


def _fill(module: nn.Module, folder: Path, public_name: Callable[[str], str | None], *, dtype: torch.dtype,
          device: torch.device | str, twin: dict[str, str]) -> None:
    """Load, strictly, a module laid out on the meta device; `twin` names tensors that may only repeat another one."""
    again = "take config.json and weights from the same checkpoint"
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    for path in _shards(folder):
        with _open(path) as file:
            for stored in file.keys():
                name, part = public_name(stored), file.get_slice(stored)
                if name is None:
                    continue
                at, wanted, shape = f"{path}: tensor {stored}:", expected.get(twin.get(name, name)), part.get_shape()
                if wanted is None:
                    raise ValueError(f"{at} got it with shape {shape}, expected no such (unexpected) tensor; {again}")
                if shape != wanted:
                    raise ValueError(f"{at} got shape {shape}, expected {wanted}; {again}")
                if part.get_dtype() not in FLOAT_TYPES:
                    raise ValueError(f"{at} got type {part.get_dtype()}, expected one of {list(FLOAT_TYPES)}; "
                                     "use a checkpoint that is not quantized")
                found[name] = file.get_tensor(stored).to(device, dtype, copy=True)  # else it is a view of the file
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: missing tensor {missing[0]} (and {len(missing) - 1} more): got {len(found)} "
                         f"tensors, expected {len(expected)}; {again}")
    for name in twin.keys() & found.keys():
        if not torch.equal(found.pop(name), found[twin[name]]):
            raise ValueError(f"{folder}: tensor {name}: got values other than {twin[name]}'s, expected the same, as "
                             "config.json says tie_word_embeddings; set that to false, or remove the tensor")
    module.load_state_dict(found, assign=True)


def load_decoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Decoder:
    folder = resolve(path)
    config = DecoderConfig.read(_json(folder / "config.json"), str(folder / "config.json"))
    with torch.device("meta"):
        decoder = Decoder(config)
    _fill(decoder, folder, lambda name: None if name.endswith("rotary_emb.inv_freq") else name, dtype=dtype,
          device=device, twin={"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {})
    return decoder


def new_decoder(public: dict, seed: int) -> Decoder:
    """A randomly initialised decoder; `public` has the keys of config.json."""
    return _randomize(Decoder(DecoderConfig.read(public)), seed)


def _randomize(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():  # norm weights stay 1
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.02, generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
    return module


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Atomic: a reader, or a crash, leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial{os.getpid()}")
    write(partial)
    os.replace(partial, path)


def _save(folder: Path, public: dict, state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    kind = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    public = {key: value for key, value in public.items() if key != "dtype"} | {"torch_dtype": kind}
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    (folder / INDEX).unlink(missing_ok=True)  # of a sharded checkpoint that was here before
    _write(folder / "config.json", lambda path: path.write_text(json.dumps(public, indent=1) + "\n"))


def save_decoder(decoder: Decoder, tokenizer: Tokenizer, path: str | Path, *,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a folder that transformers loads; `state` stands in for decoder.state_dict() where that is sharded."""
    _save(Path(path), decoder.config.public, decoder.state_dict() if state is None else state)
    for file in tokenizer.files:
        if file.parent.resolve() != Path(path).resolve():
            _write(Path(path) / file.name, lambda target, file=file: shutil.copyfile(file, target))


def _bert_name(name: str) -> str | None:
    name = name.removeprefix("bert.").replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    return None if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids") else name


def _bert_config(folder: Path) -> dict:
    where, config = str(folder / "config.json"), _json(folder / "config.json")
    pooling = _json(folder / "1_Pooling" / "config.json", {})
    if "pooling_mode_mean_tokens" in config:
        config, pooling = _bert_sizes(folder), config
    _check(where, "model_type", config.get("model_type"), "bert")
    _check(where, "hidden_act", config.get("hidden_act", "gelu"), "gelu")
    _check(where, "position_embedding_type", config.get("position_embedding_type", "absolute"), "absolute")
    _check(where, "pooling_mode_mean_tokens", pooling.get("pooling_mode_mean_tokens", True), True)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings"):
        if key not in config:
            raise ValueError(f"{where}: got no {key!r}, expected a full configuration; copy the published one")
    return config


def _bert_sizes(folder: Path) -> dict:
    """The configuration of a BERT whose config.json was overwritten by 1_Pooling/config.json in a flat copy."""
    shapes: dict[str | None, list[int]] = {}
    for path in _shards(folder):
        with _open(path) as file:
            shapes |= {_bert_name(name): file.get_slice(name).get_shape() for name in file.keys()}
    vocab, width = shapes["embeddings.word_embeddings.weight"]
    # Shapes do not tell the head count: heads are 64 wide in published BERTs, but MiniLM and E5-small have 12 in 384.
    heads = 12 if width == 384 else max(1, width // 64)
    warnings.warn(f"{folder}/config.json: got a pooling configuration, expected the encoder's; sizes are taken from "
                  f"the tensors, and {heads} heads are assumed: copy the published config.json there", stacklevel=4)
    return {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": vocab, "hidden_size": width,
            "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0], "num_attention_heads": heads,
            "num_hidden_layers": sum(1 for name in shapes if name and name.endswith("query.weight")),
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
            "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0], "layer_norm_eps": 1e-12}


def load_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 query_prefix: str | None = None, passage_prefix: str | None = None, max_tokens: int = 256) -> Encoder:
    """Prefixes: those given, else those of config_sentence_transformers.json, else E5's where the name has "e5"."""
    folder = resolve(path)
    config = _bert_config(folder)
    prompts = _json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    is_e5 = "e5" in f"{folder.resolve().name} {config.get('_name_or_path', '')}".lower()
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    for kind in prefixes:
        if prefixes[kind] is None:
            prefixes[kind] = prompts.get(kind, f"{kind}: " if is_e5 else "")
    with torch.device("meta"):
        encoder = Encoder(config, _text_tokenizer(_file(folder, "tokenizer.json")), prefixes, max_tokens)
    _fill(encoder, folder, _bert_name, dtype=dtype, device=device, twin={})
    return encoder.eval()


def new_encoder(public: dict, tokenizer_path: str | Path, seed: int, *, query_prefix: str = "query: ",
                passage_prefix: str = "passage: ") -> Encoder:
    """A randomly initialised encoder; tokenizer_path is a WordPiece tokenizer.json that adds [CLS] and [SEP]."""
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    tokenizer = _text_tokenizer(_file(Path(tokenizer_path).parent, Path(tokenizer_path).name))
    return _randomize(Encoder({"model_type": "bert"} | public, tokenizer, prefixes, 256), seed)


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    folder, tokenizer = Path(path), copy.deepcopy(encoder.tokenizer)
    tokenizer.no_truncation()
    _save(folder, {"architectures": ["BertModel"]} | encoder.config, encoder.state_dict())
    _write(folder / "tokenizer.json", lambda target: tokenizer.save(str(target)))
    prompts = json.dumps({"prompts": encoder.prefixes}, indent=1) + "\n"
    _write(folder / "config_sentence_transformers.json", lambda target: target.write_text(prompts))
