"""Tiny networks and tokenizers, made on the spot."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from model import Tokenizer

START, EOS, PAD = 256, 257, 258  # ids of the byte tokenizer's control tokens
CONTROL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def decoder_config(width: int, entries: int, **changes: object) -> dict:
    """The config.json of a two-layer Qwen2.5 decoder: hidden size, rows of the head, other keys."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": entries,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
    }
    return {**config, **changes}


def encoder_config(entries: int, **changes: object) -> dict:
    """The config.json of a one-layer BERT encoder with a vocabulary of `entries` word pieces."""
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": entries,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    return {**config, **changes}


def byte_tokenizer(folder: Path, pad_token: str | None = "<|pad|>") -> Tokenizer:
    """Saves and loads a tokenizer with one token a byte (0 to 255) and the tokens of CONTROL."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in CONTROL])
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": pad_token, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


def word_pieces(path: Path) -> int:
    """Saves a BERT tokenizer whose pieces are single letters and digits; returns its size."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ALPHABET, *("##" + c for c in ALPHABET)]
    raw = RawTokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    raw.save(str(path))
    return len(words)
