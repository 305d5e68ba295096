"""Encoder: a BERT-type network that turns texts into unit vectors (E5, MiniLM), read from its published folder.

Legend: N texts, T tokens, D width.
"""

import copy
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as RawTokenizer
from torch import Tensor, nn

import weights
from tokenizer import text_tokenizer
from weights import blaming, check, file_in, fill, randomize, read_json, resolve, save_tensors, write_aside


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


def _bert_name(name: str) -> str | None:
    name = name.removeprefix("bert.").replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    return None if name.startswith(("pooler.", "cls.")) or name.endswith("position_ids") else name


def _bert_config(folder: Path) -> dict:
    where, config = str(folder / "config.json"), read_json(folder / "config.json")
    pooling = read_json(folder / "1_Pooling" / "config.json", {})
    if "pooling_mode_mean_tokens" in config:
        config, pooling = _bert_sizes(folder), config
    check(where, "model_type", config.get("model_type"), "bert")
    check(where, "hidden_act", config.get("hidden_act", "gelu"), "gelu")
    check(where, "position_embedding_type", config.get("position_embedding_type", "absolute"), "absolute")
    check(where, "pooling_mode_mean_tokens", pooling.get("pooling_mode_mean_tokens", True), True)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings"):
        if type(config.get(key)) is not int or not 0 < config[key] < 2**24:
            raise ValueError(f"{where}: got {key} {config.get(key)!r}, expected a size; copy the published file")
    pad_id = config.get("pad_token_id") or 0
    if type(pad_id) is not int or not 0 <= pad_id < config["vocab_size"]:
        raise ValueError(f"{where}: got pad_token_id {pad_id!r}, expected a token; copy the published file")
    return config | {"layer_norm_eps": float(config.get("layer_norm_eps", 1e-12))}


def _bert_sizes(folder: Path) -> dict:
    """The configuration of a BERT whose config.json was overwritten by 1_Pooling/config.json in a flat copy."""
    shapes: dict[str | None, list[int]] = {}
    for path in weights.shards(folder):
        with weights.open_tensors(path) as file:
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
    config_file = folder / "config.json"
    with blaming(config_file, "the configuration of a BERT-type encoder"):
        config = _bert_config(folder)
    prompts = read_json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    is_e5 = "e5" in f"{folder.resolve().name} {config.get('_name_or_path', '')}".lower()
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    for kind in prefixes:
        if prefixes[kind] is None:
            prefixes[kind] = prompts.get(kind, f"{kind}: " if is_e5 else "")
    with blaming(folder / "tokenizer.json", "a tokenizer"):
        tokenizer = text_tokenizer(file_in(folder, "tokenizer.json"))
    with blaming(config_file, "the configuration of a BERT-type encoder"), torch.device("meta"):
        encoder = Encoder(config, tokenizer, prefixes, max_tokens)
    fill(encoder, folder, _bert_name, dtype=dtype, device=device, twin={})
    return encoder.eval()


def new_encoder(public: dict, tokenizer_path: str | Path, seed: int, *, query_prefix: str = "query: ",
                passage_prefix: str = "passage: ") -> Encoder:
    """A randomly initialised encoder; tokenizer_path is a WordPiece tokenizer.json that adds [CLS] and [SEP]."""
    prefixes = {"query": query_prefix, "passage": passage_prefix}
    tokenizer = text_tokenizer(file_in(Path(tokenizer_path).parent, Path(tokenizer_path).name))
    return randomize(Encoder({"model_type": "bert"} | public, tokenizer, prefixes, 256), seed)


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    folder, tokenizer = Path(path), copy.deepcopy(encoder.tokenizer)
    tokenizer.no_truncation()
    save_tensors(folder, {"architectures": ["BertModel"]} | encoder.config, encoder.state_dict())
    write_aside(folder / "tokenizer.json", lambda target: tokenizer.save(str(target)))
    prompts = json.dumps({"prompts": encoder.prefixes}, indent=1) + "\n"
    write_aside(folder / "config_sentence_transformers.json", lambda target: target.write_text(prompts))
