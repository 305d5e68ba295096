"""Small checkpoints of every family, and a tokenizer of a few words, for tests that load them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RawTokenizer

from model import Decoder, Tokenizer, save_decoder
from world.pretrain import new_decoder

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN = SIZES | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "tie_word_embeddings": True,
    "rope_theta": 1e4,
    "hidden_act": "silu",
}
LLAMA = SIZES | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "rope_theta": 5e5,
    "rope_scaling": LLAMA3,
    "head_dim": 16,
    "hidden_act": "silu",
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HELLO = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who wrote Hamlet?"},
]


def wide(public: dict, seed: int = 0) -> Decoder:
    """A decoder whose weights are large enough for every part to matter, biases included."""
    decoder = new_decoder(public, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return decoder.eval()


def ids_of(*shape: int, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def write_tokenizer(folder: Path, **settings: object) -> None:
    """A byte-level BPE of a few words, with ChatML control tokens and two kinds of added tags."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["Who wrote Hamlet? user assistant system brief search"] * 4,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    raw.add_special_tokens([AddedToken(name, special=True) for name in CONTROL])
    raw.add_tokens([AddedToken("<tool_call>", special=False)])
    raw.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", raw.token_to_id("<|endoftext|>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    default = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    settings = default | settings
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value})
    )


def checkpoint(folder: Path, tokenizer: Tokenizer, public: dict = QWEN) -> Decoder:
    decoder = wide(public)
    save_decoder(decoder, tokenizer, folder)
    return decoder


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, edit: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
