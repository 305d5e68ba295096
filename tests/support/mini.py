"""A miniature world: random models, twenty passages, twenty-four questions.

Its models answer nothing rightly, so every score is 0 unless a test says otherwise.
"""

import json
from pathlib import Path

import torch

from model import save_decoder
from tests.support.models import byte_tokenizer, decoder_config, encoder_config, word_pieces
from world.pretrain import new_decoder, new_encoder, save_encoder

NUM_PASSAGES, NUM_QUESTIONS = 20, 24
SETTINGS = """
student = "{folder}/student"
teacher = "{folder}/teacher"
encoder = "{folder}/encoder"
corpus = "{folder}/corpus.jsonl"
questions = "{folder}/questions.jsonl"
episodes = "{folder}/episodes.jsonl"
prompt = "short"
max_new_tokens = 8
max_context_tokens = 200
max_turns = 2
top_k = 2
max_obs_tokens = 60
batch_size = 8
epochs = 1
prompts_per_step = 8
minibatch_size = 4
steps = 4
eval_every = 2
val_size = 2
save_every = 1
kd_lr = 1e-2
actor_lr = 1e-3
critic_lr = 1e-3
actor_warmup_steps = 2
device = "cpu"
"""


def make_mini(folder: Path) -> Path:
    """Writes models, passages, questions, episodes and the preset mini.toml that names them."""
    make_models(folder)
    make_encoder(folder)
    passages = [
        {"id": str(i), "contents": f'"Title {i}"\nfact number {i}'} for i in range(NUM_PASSAGES)
    ]
    questions = [
        {"id": f"q{i}", "question": f"which number has fact {i}", "golden_answers": [str(i)]}
        for i in range(NUM_QUESTIONS)
    ]
    write_rows(folder / "corpus.jsonl", passages)
    write_rows(folder / "questions.jsonl", questions)
    write_rows(folder / "episodes.jsonl", [{**q, "segments": solution(q)} for q in questions])
    (folder / "mini.toml").write_text(SETTINGS.format(folder=folder))
    return folder


def make_models(folder: Path) -> None:
    """A student and a wider teacher, whose heads have different numbers of padded rows."""
    # Padding is the end of turn, so a mask that came from ids would be wrong.
    tokenizer = byte_tokenizer(folder / "tokenizer", pad_token="<|im_end|>")
    for name, width, seed in (("student", 16, 0), ("teacher", 32, 1)):
        decoder = new_decoder(decoder_config(width, tokenizer.size + seed), seed)
        sharpen(decoder)
        save_decoder(decoder, tokenizer, folder / name)


def sharpen(decoder: torch.nn.Module) -> None:
    """A random model of this size is close to uniform: larger weights make its choices differ."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3.0)


def make_encoder(folder: Path) -> None:
    num_pieces = word_pieces(folder / "pieces.json")
    encoder = new_encoder(encoder_config(num_pieces), folder / "pieces.json", 0)
    save_encoder(encoder, folder / "encoder")


def solution(question: dict) -> list[dict]:
    """One search and the right answer; queries differ in length, so that rows are ragged."""
    number = int(question["golden_answers"][0])
    return [
        {"author": "agent", "text": f"<search>{'f' * (number % 5)}act</search>"},
        {"author": "environment", "text": "\n\n<information>x</information>\n\n"},
        {"author": "agent", "text": f"<answer>{number}</answer>"},
    ]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
