"""Encoder: N texts of T tokens to vectors of width D, by a BERT, a RoBERTa or a decoder."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn

from formats.encoders import DECODERS, ROBERTAS, Prefixes, public_name, read_recipe
from infra.files import blaming, file_in, resolve
from tokenizer import text_tokenizer
from weights import fill


class EncoderLayer(nn.Module):
    """Post-LN BERT layer. Modules have the public names, "self" among them, hence ModuleDict."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        eps, self.num_heads = config.get("layer_norm_eps", 1e-12), config["num_attention_heads"]
        heads = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        mixer = {"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps)}
        parts = {"self": nn.ModuleDict(heads), "output": nn.ModuleDict(mixer)}
        self.attention = nn.ModuleDict(parts)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = nn.ModuleDict(
            {"dense": nn.Linear(inner, width), "LayerNorm": nn.LayerNorm(width, eps)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (head(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                   for head in self.attention["self"].values())  # [N, heads, T, width]
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.attention["output"]["LayerNorm"](x + self.attention["output"]["dense"](mixed))
        inner = F.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class Encoder(nn.Module):
    """Texts to vectors: a network, one vector for the tokens of a text, layers after it, norm."""

    def __init__(self, config: dict, tokenizer: RawTokenizer, prefixes: Prefixes,
                 decoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.tokenizer, self.prefixes = config, tokenizer, prefixes
        self.pooling, self.normalize, self.lowercase, self.notes = "mean", True, False, ()
        self.num_cut = 0  # texts so far that had more than max_tokens
        width, num_positions = config["hidden_size"], config["max_position_embeddings"]
        # A RoBERTa counts positions from behind the id of its padding.
        is_roberta = config.get("model_type") in ROBERTAS
        self.first_position = 1 + (config.get("pad_token_id") or 0) if is_roberta else 0
        self.limit(num_positions - self.first_position)
        self.decoder, self.dense = decoder, nn.ModuleList()
        if decoder is None:
            self.embeddings = nn.ModuleDict({
                "word_embeddings": nn.Embedding(config["vocab_size"], width),
                "position_embeddings": nn.Embedding(num_positions, width),
                "token_type_embeddings": nn.Embedding(config.get("type_vocab_size", 2), width),
                "LayerNorm": nn.LayerNorm(width, config.get("layer_norm_eps", 1e-12))})
            layers = nn.ModuleList(EncoderLayer(config) for _ in range(config["num_hidden_layers"]))
            self.encoder = nn.ModuleDict({"layer": layers})

    @property
    def width(self) -> int:
        return self.dense[-1]["linear"].out_features if self.dense else self.config["hidden_size"]

    @property
    def max_tokens(self) -> int:
        return self.tokenizer.truncation["max_length"]

    def limit(self, max_tokens: int) -> None:
        """Cut texts to max_tokens, counting the tokens that are put around a text."""
        least = self.tokenizer.num_special_tokens_to_add(False) + 1
        most = self.config["max_position_embeddings"] - self.first_position
        if not least <= max_tokens <= most:
            raise ValueError(f"--max-tokens: got {max_tokens}, expected {least} to {most}, which "
                             "this encoder has positions for")
        self.tokenizer.enable_truncation(max_tokens)

    def __str__(self) -> str:
        prefixes = ", ".join(f'{kind} "{text}"' for kind, text in self.prefixes.items())
        norm = "normalised" if self.normalize else "not normalised"
        parts = (f"pooling {self.pooling}", norm, f"prefixes {prefixes}",
                 f"{self.max_tokens} tokens", *self.notes)
        return ", ".join(parts)

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids [N, T], right-padded, with [CLS] and [SEP]; valid_mask [N, T]."""
        encodings, pad_id = self.tokenizer.encode_batch(texts), self.config.get("pad_token_id") or 0
        self.num_cut += sum(bool(encoding.overflowing) for encoding in encodings)
        rows = [torch.tensor(encoding.ids or [pad_id]) for encoding in encodings]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        valid_mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = next(self.parameters()).device
        return ids.to(device), valid_mask.to(device)

    def forward(self, ids: Tensor, valid_mask: Tensor) -> Tensor:
        if self.decoder is not None:  # causal, so that padding at the right needs no mask
            x = self.decoder.hidden(ids)
        else:
            positions = self.embeddings["position_embeddings"].weight[self.first_position :]
            x = self.embeddings["word_embeddings"](ids) + positions[: ids.shape[1]]  # [N, T, D]
            x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
            for layer in self.encoder["layer"]:
                x = layer(x, valid_mask[:, None, None])
        x = pool(x.float(), valid_mask, self.pooling)  # fp32 from here
        for layer in self.dense:
            x = layer["activation"](layer["linear"](x))
        return F.normalize(x, dim=-1) if self.normalize else x  # [N, D]

    @torch.no_grad()
    def embed(self, texts: list[str], *, kind: str, batch_size: int = 64,
              progress: Callable[[int], object] = lambda num: None) -> Tensor:
        """Vectors [N, D], fp32; `kind` ("query" or "passage") selects the prefix.

        progress: called with the number of texts of each batch that is done.
        """
        texts = [self.prefixes[kind] + text for text in texts]
        texts = [text.lower() for text in texts] if self.lowercase else texts
        vectors = torch.empty(len(texts), self.width, device=next(self.parameters()).device)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
        for start in range(0, len(texts), batch_size):
            rows = by_length[start : start + batch_size]
            vectors[rows] = self(*self.encode([texts[i] for i in rows]))
            progress(len(rows))
        return vectors


def pool(x: Tensor, valid_mask: Tensor, pooling: str) -> Tensor:
    """One vector [N, D] for the valid states of each row of x [N, T, D]."""
    counts = valid_mask.sum(1, keepdim=True)  # [N, 1]
    if pooling == "cls":
        return x[:, 0]
    if pooling == "lasttoken":
        return x[torch.arange(len(x), device=x.device), counts.squeeze(1) - 1]
    if pooling == "max":
        return x.masked_fill(~valid_mask[:, :, None], -torch.inf).amax(1)
    if pooling == "weightedmean":  # by position, from 1 on
        weights = valid_mask.cumsum(1) * valid_mask
        x, counts = x * weights[:, :, None], weights.sum(1, keepdim=True)
    total = x.masked_fill(~valid_mask[:, :, None], 0.0).sum(1)
    return total / (counts.sqrt() if pooling == "mean_sqrt_len_tokens" else counts)


def load_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", prefixes: dict[str, str | None] | None = None,
                 max_tokens: int | None = None,
                 load_decoder: Callable[..., nn.Module]) -> Encoder:
    """model.load_encoder, which hands its load_decoder in. prefixes, max_tokens: in place of the
    folder's; None, also for one kind of text: as the folder says."""
    recipe = read_recipe(path, resolve(path))
    folder, config = recipe.folder, recipe.config
    with blaming(folder / "tokenizer.json", "a tokenizer"):
        tokenizer = text_tokenizer(file_in(folder, "tokenizer.json"))
    decoder = None
    if config["model_type"] in DECODERS:
        decoder = load_decoder(folder, dtype=dtype, device=device, with_head=False)
    given = {kind: text for kind, text in (prefixes or {}).items() if text is not None}
    with blaming(folder / "config.json", "sizes that fit together"), torch.device("meta"):
        encoder = Encoder(config, tokenizer, recipe.prefixes | given, decoder)
    if decoder is None:
        fill(encoder, folder, public_name, dtype=dtype, device=device, twin={})
    for dense_folder, layer in recipe.dense:
        sizes = layer["in_features"], layer["out_features"], layer.get("bias", True)
        with torch.device("meta"):
            dense = nn.ModuleDict({"linear": nn.Linear(*sizes),
                                   "activation": getattr(nn, layer["activation"])()})
        fill(dense, dense_folder, str, dtype=torch.float32, device=device, twin={})
        encoder.dense.append(dense)
    encoder.pooling, encoder.normalize = recipe.pooling, recipe.normalize
    encoder.lowercase, encoder.notes = recipe.lowercase, recipe.notes
    most = encoder.max_tokens
    with blaming(folder / "max_seq_length", "a length of texts"):
        encoder.limit(min(recipe.max_tokens or most, most))
    encoder.limit(encoder.max_tokens if max_tokens is None else max_tokens)
    return encoder.eval()
