"""Networks: Qwen2, Qwen3 and Llama 3 decoders with a KV cache, and the critic.

A saved folder loads in transformers and vLLM with the same logits. Legend: B rows, T tokens (N in
packed rows), L slots read, V vocabulary, D width, H heads, KV key/value heads, Dh head width.
"""

import copy
import functools
import math
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.checkpoint import checkpoint

from infra.checkpoint import write_aside
from infra.files import blaming, read_json, resolve
from kernels import fused, linears
from tokenizer import FILES, Tokenizer
from weights import fill, save_tensors

torch.set_float32_matmul_precision("highest")  # float32 means that: TF32 has ten bits
torch.backends.cuda.enable_cudnn_sdp(False)  # it takes 45 ms for each new length (H200)
GRAPHED = ("cuda",)  # devices on which the sampler's step is a graph
REACH_BUCKET = 512  # slots: a graph reads all of its bucket, and each graph takes time to capture


class DecoderConfig:
    """Sizes and options from config.json (`public`). KeyError or ValueError if it does not fit."""

    def __init__(self, public: dict, where: str = "config.json") -> None:
        from formats.decoders import number, read_family, read_rope
        family, self.rope = read_family(public, where), read_rope(public, where)
        bias, heads = bool(public.get("attention_bias")), public["num_attention_heads"]
        self.public = dict(public)
        self.vocab_size, self.hidden_size = public["vocab_size"], public["hidden_size"]
        self.intermediate_size = public["intermediate_size"]
        self.num_layers, self.num_heads = public["num_hidden_layers"], heads
        self.num_kv_heads = public.get("num_key_value_heads") or heads
        width = 128 if family == "qwen3" else self.hidden_size // heads
        self.head_dim = public.get("head_dim") or width
        self.norm_eps = float(number(where, public, "rms_norm_eps", 1e-6))
        self.qkv_bias, self.o_bias = family == "qwen2" or bias, family != "qwen2" and bias
        self.mlp_bias = bool(public.get("mlp_bias"))
        self.qk_norm = family == "qwen3"  # queries and keys are normalised before the rotation
        self.tied = bool(public.get("tie_word_embeddings"))
        # YaRN multiplies cosines and sines by this, and reaches beyond the positions trained on.
        factor = self.rope["factor"] if self.rope["rope_type"] == "yarn" else 1.0
        self.rope_scale = self.rope.get("attention_factor") or 0.1 * math.log(max(factor, 1)) + 1
        reach = public.get("max_position_embeddings"), factor * (self.rope["original_length"] or 0)
        self.max_positions = max(int(length or 0) for length in reach)  # 0: not known
        sizes = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers)
        are_sizes = all(type(n) is int and 0 < n < 2**24 for n in sizes) and self.num_layers <= 1000
        if not are_sizes or heads % self.num_kv_heads or self.head_dim % 2:
            got = f"{heads} heads, {self.num_kv_heads} key/value heads of width {self.head_dim}"
            raise ValueError(f"{where}: got vocabulary, widths and layers {sizes}, {got}, expected "
                             "sizes that fit together; copy it again")

    def rope_frequencies(self) -> Tensor:
        """Radians per position of each pair of channels, [Dh / 2], fp32."""
        rope, theta = self.rope, self.rope["rope_theta"]
        with torch.device("cpu"):  # also while the network is laid out on the meta device
            channels = torch.arange(0, self.head_dim, 2).float()
            frequencies = theta ** -(channels / self.head_dim)
        if rope["rope_type"] == "default":
            return frequencies
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended:
        # in Llama 3.1 by how often they fit into the original length, in YaRN by their number.
        original = rope["original_length"]
        if rope["rope_type"] == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        else:
            first, last = (self.head_dim / 2 * math.log(original / (2 * math.pi * rope[turns]))
                           / math.log(theta) for turns in ("beta_fast", "beta_slow"))
            if rope["truncate"]:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, self.head_dim - 1)
            keep = 1 - ((channels / 2 - first) / (last - first or 0.001)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / rope["factor"])


class KVCache:
    """Keys and values of every layer, [rows, KV, slots, Dh]; slot == position."""

    def __init__(self, config: DecoderConfig, rows: int, slots: int, *,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self.rows, self.slots, self.reach = rows, slots, 0  # reach: slots that have been written
        if slots - 1 > config.max_positions > 0:
            warnings.warn(f"contexts may have {slots - 1} tokens, and the model was made for "
                          f"{config.max_positions}; lower --max-context-tokens, or see YaRN in "
                          "docs/own-models.md", stacklevel=2)
        shape = (rows, config.num_kv_heads, slots, config.head_dim)
        # Zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 * NaN is NaN.
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device)
                                   for _ in range(config.num_layers)] for _ in range(2))

    def keep(self, rows: Tensor) -> None:
        """Compact the cache to these rows, in this order: the first ones from now on."""
        self.rows = len(rows)
        for tensor in (*self.keys, *self.values):  # one at a time, so that one is held twice
            tensor[: self.rows, :, : self.reach] = tensor[rows, :, : self.reach]

    def prefill(self, rows: list[int], starts: list[int]) -> "Prefill":
        """For a call with packed documents: document i goes on at starts[i] of row rows[i]."""
        return Prefill(self, rows, starts)

    def step(self, positions: Tensor, reach: int, *, are_equal: bool = False) -> "Step":
        """For a call with one token a row at positions [rows], all < reach: reads slots < reach.

        are_equal: all positions are reach - 1. There may be further positions, of rows not in use.
        """
        # What an idle row writes is overwritten by its next token before a token attends to it.
        if not self.rows <= (count := len(positions)) <= len(self.keys[0]):
            raise ValueError(f"KV cache: got {count} positions, expected {self.rows}, one a row")
        rows, slots = (torch.arange(n, device=positions.device) for n in (count, self.check(reach)))
        mask = None
        if not are_equal:
            # In sixteens: attention on a GPU copies other masks, in each layer.
            mask = self.keys[0].new_zeros(count, 1, 1, -(-reach // 16) * 16)[..., :reach]
            mask.masked_fill_(slots > positions[:, None, None, None], -torch.inf)
        return Step(self, positions, reach, rows, mask)

    def check(self, reach: int) -> int:
        if reach > self.slots:
            raise ValueError(f"KV cache: got position {reach - 1}, expected less than {self.slots}")
        self.reach = max(self.reach, reach)
        return reach


class Prefill(NamedTuple):
    cache: KVCache
    rows: list[int]
    starts: list[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        """Write k, v [1, KV, N, Dh]; q [1, H, N, Dh] attends to its row's slots up to its own."""
        ends = [self.cache.check(start + new)
                for start, new in zip(self.starts, documents, strict=True)]
        read = []
        for cached, new in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            parts = new[0].split(documents, 1)
            for row, start, end, part in zip(self.rows, self.starts, ends, parts, strict=True):
                cached[row, :, start:end] = part
            rows = zip(self.rows, ends, strict=True)
            read.append(torch.cat([cached[row, :, :end] for row, end in rows], 1)[None])
        return attend_packed(q, *(x.to(q.dtype) for x in read), documents, ends)


class Step(NamedTuple):
    cache: KVCache
    positions: Tensor  # [B]
    reach: int
    row_numbers: Tensor  # [B]
    mask: Tensor | None  # [B, 1, 1, L], 0 or -inf

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
        """Write k, v [B, KV, 1, Dh]; q [B, H, 1, Dh] attends to its row's slots up to its own."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.row_numbers, :, self.positions] = k.squeeze(2).to(keys.dtype)
        values[self.row_numbers, :, self.positions] = v.squeeze(2).to(values.dtype)
        keys, values = (x[: len(q), :, : self.reach].to(q.dtype) for x in (keys, values))
        mask = None if self.mask is None else self.mask.to(q.dtype)
        # Queries that share a key head stand where tokens would, so that keys are never repeated.
        grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])  # [B, KV, H / KV, Dh]
        return attention(grouped, keys, values, mask).reshape(q.shape)  # on a GPU it has strides


Slots = Prefill | Step | None  # where a call writes keys and values; None: nowhere
Rotary = tuple[Tensor, Tensor]  # cos and signed sin, [B T, 1, Dh] each


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *,
           is_causal: bool = False) -> Tensor:
    """Attention of q [B, H, T, Dh] to k, v [B, KV, L, Dh], each read by H / KV heads."""
    if q.is_cuda and q.dtype == torch.float32:  # torch 2.13 has no fast kernel that groups these
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return attention(q, k, v, mask, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])


def attend_packed(q: Tensor, k: Tensor, v: Tensor, documents: list[int],
                  lengths: list[int]) -> Tensor:
    """Causal attention inside each document: q [1, H, N, Dh] to k, v [1, KV, L, Dh].

    documents: tokens of each in q, the last ones of its lengths[i] tokens in k and v.
    """
    varlen = None
    if q.is_cuda and q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0:  # what flash attention takes
        from infra.cuda import find_varlen, offsets  # here, because a CPU has none of it
        varlen = find_varlen()
    if varlen:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))  # [N or L, heads, Dh]
        mixed = varlen(q, k, v, offsets(tuple(documents), q.device),
                       offsets(tuple(lengths), q.device), max(documents), max(lengths))
        return mixed.transpose(0, 1).unsqueeze(0)
    # One document at a time: what is packed beside it costs nothing, and needs no mask.
    mixed, parts = [], (q.split(documents, 2), k.split(lengths, 2), v.split(lengths, 2))
    for q, k, v in zip(*parts, strict=True):
        before, mask = k.shape[2] - q.shape[2], None
        if before:  # it goes on: all its earlier tokens, and causal among the new ones
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(before)
        mixed.append(attend(q, k, v, mask, is_causal=not before))
    return torch.cat(mixed, 2)


@fused
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, heads, Dh]; the first half of `sin` carries the minus sign."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


swiglu = fused(lambda gate, up: F.silu(gate) * up)


class Linear(nn.Linear):
    """Computes in the dtype of x; the weights may have more digits."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    """Its mean is taken in fp32 at least, whatever the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        kv_inner = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = Linear(width, kv_inner, bias=config.qkv_bias)
        self.v_proj = Linear(width, kv_inner, bias=config.qkv_bias)
        self.q_proj.beside = self.k_proj, self.v_proj  # see kernels.linears
        self.o_proj = Linear(inner, width, bias=config.o_bias)
        self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm
                                    else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotary: Rotary, documents: list[int], slots: Slots) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim))  # [B T, H or KV, Dh]
                   for y in linears(x.flatten(0, 1), self.q_proj))
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        q, k, v = (y.unflatten(0, x.shape[:2]).transpose(1, 2) for y in (q, k, v))  # [B, H, T, Dh]
        if slots is None:
            mixed = attend_packed(q, k, v, documents, documents)
        else:
            mixed = slots.attend(self.layer, q, k, v, documents)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.input_layernorm = RMSNorm(width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, config.norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": Linear(width, inner, bias=bias),
            "up_proj": Linear(width, inner, bias=bias),
            "down_proj": Linear(inner, width, bias=bias)})
        self.mlp["gate_proj"].beside = (self.mlp["up_proj"],)

    def forward(self, x: Tensor, rotary: Rotary, documents: list[int], slots: Slots) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, documents, slots)
        gate, up = linears(self.post_attention_layernorm(x).flatten(0, 1), self.mlp["gate_proj"])
        return x + self.mlp["down_proj"](swiglu(gate, up)).view_as(x)


class Decoder(nn.Module):
    """Decoder(ids [B, T]) -> logits [B, T, V]."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, entries = config.hidden_size, config.vocab_size
        self.model = nn.Module()  # the public names begin with "model."
        self.model.embed_tokens = nn.Embedding(entries, width)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.model.norm = RMSNorm(width, config.norm_eps)
        self.lm_head = None if config.tied else Linear(width, entries, bias=False)
        # Not a buffer: .to(bfloat16) would round it.
        self.frequencies, self.scale = config.rope_frequencies(), config.rope_scale
        self.checkpointing = False  # True: backward computes layers again instead of keeping them
        self.compute_dtype: torch.dtype | None = None  # of activations; None: that of the weights

    @property
    def head_weight(self) -> nn.Parameter:  # [V, D]
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    def hidden(self, ids: Tensor, *, documents: list[int] | None = None,
               cache: Slots = None) -> Tensor:
        """States after the final norm, [B, T, D]; row t predicts token t + 1. documents: lengths of
        those packed into a row. cache: KVCache.prefill for ids [1, T], KVCache.step for [rows, 1].
        """
        documents = documents or [ids.shape[1]]
        if sum(documents) != (T := ids.shape[1]):
            raise ValueError(f"documents: got {sum(documents)} tokens, expected the {T} of a row")
        if isinstance(cache, Step):
            positions = cache.positions  # [B T], as below
        else:
            starts = [0] * len(documents) if cache is None else cache.starts
            positions = torch.cat([torch.arange(start, start + length, device=ids.device) for start,
                                   length in zip(starts, documents, strict=True)] * len(ids))
        x = self.model.embed_tokens(ids)  # [B, T, D]
        x = x.to(self.compute_dtype or x.dtype)
        rotary = self._rotary(positions, x.dtype)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, documents, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, documents, cache)
        return self.model.norm(x)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:  # in fp32, for all layers
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, None, None].float() * self.frequencies  # [B T, 1, Dh / 2]
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


class Steps:
    """Steps of one token a row through a decoder, and their cache. On a GPU each is a CUDA graph.

    Graphs need fixed places, so cache, inputs and copies of weights stay from call to call there.
    """

    def __init__(self, config: DecoderConfig, rows: int, slots: int, dtype: torch.dtype,
                 device: torch.device) -> None:
        self.cache, self.graphs, self.copies = KVCache(
            config, rows, slots, dtype=dtype, device=device), None, None
        if device.type in GRAPHED:
            from infra.cuda import Graphs  # here, because a CPU needs none
            self.graphs, self.copies = Graphs(), {}  # copies: of weights, see kernels.merged
            self.ids, self.positions = torch.zeros(2, rows, dtype=torch.long, device=device)

    def hidden(self, decoder: Decoder, ids: list[int], positions: list[int], *,
               may_capture: bool) -> Tensor:
        """States [rows, D] of a token a row at these positions, until the next call."""
        count, reach, device = len(ids), max(positions) + 1, decoder.head_weight.device
        new = torch.tensor([ids, positions], device=device)  # [2, rows]
        if self.graphs is None:
            step = self.cache.step(new[1], reach, are_equal=min(positions) == reach - 1)
            return decoder.hidden(new[0, :, None], cache=step)[:, 0]
        self.ids[:count], self.positions[:count] = new
        rows = min(2 ** (count - 1).bit_length(), len(self.ids))
        reach = min(-(-reach // REACH_BUCKET) * REACH_BUCKET, self.cache.slots)
        self.cache.check(reach)  # a replay does not

        def run() -> Tensor:
            step = self.cache.step(self.positions[:rows], reach)
            return decoder.hidden(self.ids[:rows, None], cache=step)[:, 0]

        return self.graphs.call((rows, reach), run, may_capture=may_capture)[:count]


def open_steps(decoder: Decoder, rows: int, slots: int, dtype: torch.dtype) -> Steps:
    """The steps that a decoder has from earlier calls if they fit, else new ones.

    On a CPU none are kept: nothing needs to stay in its place, and training needs the memory.
    """
    from infra.cuda import KEPT  # here, because `import train` should load little
    steps, device = KEPT.pop(decoder, None), decoder.head_weight.device
    if steps is not None:
        keys = steps.cache.keys[0]
        if len(keys) < rows or steps.cache.slots != slots or keys.dtype != dtype:
            steps = None
    steps = steps or Steps(decoder.config, rows, slots, dtype, device)
    steps.cache.rows, steps.cache.reach = rows, 0
    if steps.graphs is not None:
        steps.graphs.check(decoder)
        KEPT[decoder] = steps
    return steps


def shift(hidden: Tensor, documents: list[int] | None = None) -> Tensor:
    """Make entry t the state before token t, [B, T, D]; zeros before a document's first token."""
    shifted = F.pad(hidden[:, :-1], (0, 0, 1, 0))
    if documents is None:
        return shifted
    lengths = torch.tensor(documents, device=hidden.device)
    return shifted.index_fill(1, lengths.cumsum(0) - lengths, 0.0)


class Critic(nn.Module):
    """A value head on a backbone of its own; values(ids)[:, t] is the value before token t."""

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
        return self.value_head(states.to(self.value_head.weight)).squeeze(-1).float()  # [B, T]


def load_decoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", with_head: bool = True,
                 num_ids: int = 0) -> Decoder:
    """Load a checkpoint folder or id; ValueError or FileNotFoundError names what does not fit.
    num_ids: those of its tokenizer, each of which needs a row of the embedding."""
    folder = resolve(path)
    file = folder / "config.json"
    with blaming(file, "the configuration of a decoder"), torch.device("meta"):
        public = read_json(file) | ({} if with_head else {"tie_word_embeddings": True})
        decoder = Decoder(DecoderConfig(public, str(file)))
        if num_ids > (entries := decoder.config.vocab_size):
            raise ValueError(f"{file}: got vocab_size {entries}, expected at least the {num_ids} "
                             "ids of tokenizer.json; take both files from the same checkpoint, or "
                             "resize its embedding")
    twin = {"lm_head.weight": "model.embed_tokens.weight"} if decoder.config.tied else {}

    def public_name(name: str) -> str | None:
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and not with_head):
            return None
        # A decoder saved without its head, as an encoder is, has names without "model.".
        return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"

    fill(decoder, folder, public_name, dtype=dtype, device=device, twin=twin)
    return decoder


def load_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """Load an Encoder; see encoder.py, which is imported only when this is called."""
    import encoder
    return encoder.load_encoder(path, dtype=dtype, device=device, load_decoder=load_decoder,
                                **options)


def save_decoder(decoder: Decoder, tokenizer: Tokenizer, path: str | Path, *,
                 state: dict[str, Tensor] | None = None) -> None:
    """Write a folder that transformers loads; `state` replaces a state_dict() that is sharded."""
    folder = Path(path)
    save_tensors(folder, decoder.config.public, decoder.state_dict() if state is None else state)
    for file in (tokenizer.folder / name for name in FILES):
        if file.is_file():
            write_aside(folder / file.name, functools.partial(shutil.copyfile, file))
