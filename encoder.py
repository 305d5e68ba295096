"""Encoder: BERT-type networks (E5, MiniLM), from N texts of T tokens to vectors of width D."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn

from infra.files import blaming, file_in, read_json, resolve
from tokenizer import text_tokenizer
from weights import check, fill


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
    """Texts to vectors: BERT, mean over the tokens of a text, L2 norm."""

    def __init__(self, config: dict, tokenizer: RawTokenizer, prefixes: dict[str, str],
                 max_tokens: int = 256) -> None:
        super().__init__()
        self.config, self.tokenizer, self.prefixes = config, tokenizer, prefixes
        width, num_positions = config["hidden_size"], config["max_position_embeddings"]
        self.tokenizer.enable_truncation(min(max_tokens, num_positions))
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config["vocab_size"], width),
            "position_embeddings": nn.Embedding(num_positions, width),
            "token_type_embeddings": nn.Embedding(config.get("type_vocab_size", 2), width),
            "LayerNorm": nn.LayerNorm(width, config.get("layer_norm_eps", 1e-12))})
        layers = nn.ModuleList(EncoderLayer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids [N, T], right-padded, with [CLS] and [SEP]; valid_mask [N, T]."""
        rows = [torch.tensor(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        pad_id = self.config.get("pad_token_id") or 0
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        valid_mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
        device = self.embeddings["word_embeddings"].weight.device
        return ids.to(device), valid_mask.to(device)

    def forward(self, ids: Tensor, valid_mask: Tensor) -> Tensor:
        positions = self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = self.embeddings["word_embeddings"](ids) + positions  # [N, T, D]
        x = self.embeddings["LayerNorm"](x + self.embeddings["token_type_embeddings"].weight[0])
        for layer in self.encoder["layer"]:
            x = layer(x, valid_mask[:, None, None])
        x = x.float().masked_fill(~valid_mask[:, :, None], 0.0).sum(1)  # fp32 from here
        return F.normalize(x / valid_mask.sum(1, keepdim=True), dim=-1)  # [N, D]

    @torch.no_grad()
    def embed(self, texts: list[str], *, kind: str, batch_size: int = 64) -> Tensor:
        """Unit vectors [N, D], fp32; `kind` ("query" or "passage") selects the prefix."""
        texts = [self.prefixes[kind] + text for text in texts]
        device = self.embeddings["word_embeddings"].weight.device
        vectors = torch.empty(len(texts), self.config["hidden_size"], device=device)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # less padding
        for start in range(0, len(texts), batch_size):
            rows = by_length[start : start + batch_size]
            vectors[rows] = self(*self.encode([texts[i] for i in rows]))
        return vectors


def load_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Encoder:
    """Load a checkpoint folder or id; ValueError or FileNotFoundError names what does not fit."""
    folder = resolve(path)
    prompts = read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    with blaming(folder / "tokenizer.json", "a tokenizer"):
        tokenizer = text_tokenizer(file_in(folder, "tokenizer.json"))
    with blaming(folder / "config.json", "the configuration of a BERT"), torch.device("meta"):
        config = _bert_config(folder)
        # Prefixes that the folder does not name are E5's for a model with "e5" in its name.
        is_e5 = "e5" in f"{folder.resolve().name} {config.get('_name_or_path', '')}".lower()
        prefixes = {kind: prompts.get(kind, f"{kind}: " if is_e5 else "")
                    for kind in ("query", "passage")}
        encoder = Encoder(config, tokenizer, prefixes)
    fill(encoder, folder, _bert_name, dtype=dtype, device=device, twin={})
    return encoder.eval()


def _bert_config(folder: Path) -> dict:
    config, key = read_json(folder / "config.json"), "pooling_mode_mean_tokens"
    where = f"{folder}/config.json"
    pooling = read_json(folder / "1_Pooling" / "config.json", {})
    if key in config:
        config, pooling = _bert_sizes(folder), config
    check(where, "model_type", config.get("model_type"), "bert")
    check(where, "hidden_act", config.get("hidden_act", "gelu"), "gelu")
    positions = config.get("position_embedding_type", "absolute")
    check(where, "position_embedding_type", positions, "absolute")
    check(where, key, pooling.get(key, True), True)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings"):
        if type(config.get(key)) is not int or not 0 < config[key] < 2**24:
            raise ValueError(f"{where}: got {key} {config.get(key)!r}, expected a size")
    remainder = config["hidden_size"] % config["num_attention_heads"]
    check(where, "hidden_size % num_attention_heads", remainder, 0)
    pad_id = config.get("pad_token_id") or 0
    if type(pad_id) is not int or not 0 <= pad_id < config["vocab_size"]:
        raise ValueError(f"{where}: got pad_token_id {pad_id!r}, expected a token; copy it again")
    return {**config, "layer_norm_eps": float(config.get("layer_norm_eps", 1e-12))}


def _bert_sizes(folder: Path) -> dict:
    """The config.json of a flat copy, in which 1_Pooling/config.json has taken its place."""
    with safe_open(file_in(folder, "model.safetensors"), "pt") as file:
        shapes = {_bert_name(name): file.get_slice(name).get_shape() for name in file.keys()}
    vocab, width = shapes["embeddings.word_embeddings.weight"]
    # Heads are 64 wide in published BERTs, but MiniLM and E5-small have 12 in 384.
    heads = 12 if width == 384 else max(1, width // 64)
    warnings.warn(f"{folder}/config.json: got a pooling configuration; sizes are the tensors', and "
                  f"{heads} heads are assumed: copy the published config.json there", stacklevel=4)
    layers = [name for name in shapes if name and name.endswith("query.weight")]
    return {"model_type": "bert", "vocab_size": vocab, "hidden_size": width,
            "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": len(layers), "num_attention_heads": heads,
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
            "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0]}


def _bert_name(name: str) -> str | None:
    name = name.removeprefix("bert.")
    name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    return None if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids") else name
