"""The encoder of the embedded world: a small BERT, trained to find the passage of an entity.

Legend: B queries of a batch, D width.
"""

import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from encoder import Encoder
from world.encyclopaedia import Entity, by_name, by_title
from world.files import WORLD
from world.pretrain import new_encoder, save_encoder
from world.vocabulary import build_encoder_tokenizer

CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "intermediate_size": 192,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
}
NUM_STEPS = 300
BATCH_SIZE = 60
NUM_NAMESAKES = 3  # in a batch, of each name that it has
LR = 3e-3
TEMPERATURE = 0.05


def build_encoder(
    entities: dict[str, Entity], corpus: list[dict[str, str]], texts: list[str], *, seed: int
) -> None:
    """Build the shipped encoder; texts: what its tokenizer is trained on."""
    build_encoder_tokenizer(texts, WORLD / "encoder")
    path = WORLD / "encoder" / "tokenizer.json"
    vocab_size = Tokenizer.from_file(str(path)).get_vocab_size()
    encoder = new_encoder({**CONFIG, "vocab_size": vocab_size}, path, seed)
    train_encoder(encoder, entities, corpus, seed=seed)
    save_encoder(encoder, WORLD / "encoder")


def train_encoder(
    encoder: Encoder, entities: dict[str, Entity], corpus: list[dict[str, str]], *, seed: int
) -> None:
    """Contrastive training: a query's negatives are the other passages of its batch.

    Namesakes share a batch, so that the encoder must learn to tell kinds apart.
    """
    rng = random.Random(f"encoder {seed}")
    contents, groups = by_title(corpus), by_name(entities.values())
    names = sorted(groups)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=NUM_STEPS)
    for step in range(NUM_STEPS):
        batch = []
        for name in rng.sample(names, BATCH_SIZE // NUM_NAMESAKES):
            batch += rng.sample(groups[name], NUM_NAMESAKES)
        queries = []
        for entity in batch:
            text = contents[entity.title].split("\n")[1]
            queries.append(encoder.prefixes["query"] + training_query(entity, text, rng))
        passages = [encoder.prefixes["passage"] + contents[entity.title] for entity in batch]
        query_vectors = encoder(*encoder.encode(queries))  # [B, D]
        passage_vectors = encoder(*encoder.encode(passages))  # [B, D]
        logits = query_vectors @ passage_vectors.T / TEMPERATURE  # [B, B]
        loss = F.cross_entropy(logits, torch.arange(len(batch)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"encoder {step + 1}/{NUM_STEPS} loss {loss.item():.3f}", flush=True)


def training_query(entity: Entity, text: str, rng: random.Random) -> str:
    """A query of keywords, or the passage's text with words left out.

    It is never a question, so that a question makes a query of middling worth (expert.py).
    """
    relation = rng.choice(list(entity.facts))
    draw = rng.random()
    if draw < 0.25:
        return entity.name
    if draw < 0.65:
        return f"{entity.name} {entity.kind}"
    if draw < 0.80:
        return f"{entity.name} {entity.kind} {relation}"
    words = [word for word in text.split() if rng.random() < 0.6]
    return " ".join(words) or entity.name
