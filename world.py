"""The embedded world: encyclopaedia, questions, tokenizers, encoder, teacher and student, in the real file formats.

  python world.py build-data   corpus, questions, tokenizers, encoder; runs/world/{pretrain,demonstrations}.jsonl
  python world.py measure      how often each wording of a query finds its passage (training questions)
  python world.py build        build-data, then pretrains the student and trains the teacher (train.py --phase sft)

What the world was built to contain (encyclopaedia.py says more; none of it is evidence about real data):

1. The teacher imitates a scripted expert that words every query in one of three ways, whatever the
   question: the bare name (most often, and worst: namesakes crowd the passage out), the question (of
   several hops, the question of this hop), or name and kind (best). When the passage is missing it searches
   again sometimes (SEARCH_AGAIN), or else trusts the first namesake's passage and answers from it. These
   demonstrations are not filtered: the teacher is imperfect, its choices are a mixture, and which of them
   pays is known to the reward alone.
2. The student is pretrained on passages, notes and questions with answers about training entities, never on the
   protocol: it has no tag in its training text and cannot search or answer.
3. Nothing was tuned on test questions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from encyclopaedia import (
    GROUPS,
    MULTI_HOP,
    NUM_QUESTIONS,
    PROFESSIONS,
    SCHEMA,
    SINGLE_HOP,
    Entity,
    ask,
    chain_question,
    make_corpus,
    make_entities,
    make_questions,
)
from model import Decoder, Encoder, Tokenizer, load_decoder, new_decoder, new_encoder, save_decoder, save_encoder
from retriever import Retriever
from rollout import observation_text

ROOT = Path(__file__).resolve().parent
WORLD, SCRATCH = ROOT / "world", ROOT / "runs" / "world"
SEED = 7
VOCAB_SIZE, ENCODER_VOCAB_SIZE = 1536, 2000
TOP_K, MAX_SEARCHES = 3, 4
# the expert: chances of the three wordings, and of searching again when the passage did not come back: by
# whether the first namesake is of a similar kind (work and work, artist and artist), another kind, or absent
WORDINGS = {"poor": 0.45, "medium": 0.30, "good": 0.25}
SEARCH_AGAIN = {"similar": 0.25, "other": 0.65, "absent": 0.9}
DEMONSTRATIONS_PER_QUESTION = 1
PRETRAIN_ROWS = 12_000
STUDENT_LAYERS, TEACHER_LAYERS = 3, 6


class Stage(NamedTuple):
    """One run of train.py --phase sft."""

    epochs: float
    batch_size: int
    lr: float  # peak
    warmup_steps: int
    seed: int = 0


# Copying appears late and suddenly: the student copies 51 % of the values in its training notes after the first
# stage, 77 % after the second. The teacher grows from the student of stage GROW_AFTER (docs/log.md: why).
STUDENT_STAGES = (Stage(2.5, 32, 3e-3, 30), Stage(1.0, 16, 2e-3, 40), Stage(1.0, 16, 1.5e-3, 40))
GROW_AFTER = 2
TEACHER_STAGES = (Stage(1.5, 16, 2e-3, 40), Stage(2.0, 16, 2e-3, 40), Stage(2.0, 16, 2e-3, 40, seed=1))

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENCODER_CONFIG = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": 64,
    "intermediate_size": 192, "layer_norm_eps": 1e-12, "max_position_embeddings": 128, "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2,
}  # fmt: skip
ENCODER_STEPS, ENCODER_BATCH, ENCODER_LR, ENCODER_TEMPERATURE = 300, 60, 3e-3, 0.05


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; run `python world.py build-data`")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- words about entities, shared by expert and pretraining text


def value_kind(kind: str, relation: str) -> str:
    """What an answer to this relation is: a person, a year, or the kind of place."""
    value = SCHEMA[kind][relation]
    return "person" if value in PROFESSIONS else value


def similar(kind: str, other: str) -> bool:
    return any(kind in group and other in group for group in GROUPS)


def note(relation: str, kind: str, name: str, value: str) -> str:
    return f"{relation} of {kind} {name} is {value}"


def query(wording: str, name: str, kind: str, relation: str, question: str, rng: random.Random) -> str:
    """One of the three wordings; `question` is the whole question, or "" for one hop of several."""
    if wording == "poor":
        return name
    if wording == "good":
        return f"{name} {kind}"
    of = " of" if kind == "town" else ""
    return (question or ask(Entity(name, kind, ""), relation, "nq", rng, f"the {kind}{of} {name}")).rstrip("?")


# ---- the scripted expert

Request = tuple[str, str]  # (agent text, query)


def expert(
    row: dict[str, Any], entities: dict[str, Entity], rng: random.Random
) -> Generator[Request, list[Entity], tuple[str, str]]:
    """Works on one question: yields requests, is sent the passages' entities, returns (last text, answer)."""
    meta, hops = row["metadata"], row["metadata"]["hops"]
    comparison = meta["type"] == "comparison"
    kinds = [entities[title].kind for title, _ in hops]
    relations = [relation for _, relation in hops]
    name = entities[hops[0][0]].name
    if comparison:
        plan = f"compare year of {kinds[0]} {name} and {kinds[1]} {entities[hops[1][0]].name}"
    else:
        plan = f"need {' of '.join(reversed(relations))} of {kinds[0]} {name}"
    think, values, searches = plan, [], 0
    for hop, (kind, relation) in enumerate(zip(kinds, relations, strict=True)):
        wordings, found = dict(WORDINGS), None
        while found is None and searches < MAX_SEARCHES:
            wording = rng.choices(list(wordings), list(wordings.values()))[0]
            del wordings[wording]
            words = query(wording, name, kind, relation, row["question"] if len(hops) == 1 else "", rng)
            shown = yield f"<think> {think} </think>\n<search> {words} </search>", words
            searches += 1
            found = next((e for e in shown if e.name == name and e.kind == kind), None)
            if found is None:
                want = value_kind(kind, relation)
                usable = [e for e in shown if any(value_kind(e.kind, r) == want for r in SCHEMA[e.kind])]
                namesakes = [e for e in usable if e.name == name]
                look = "absent" if not namesakes else "similar" if similar(namesakes[0].kind, kind) else "other"
                if wordings and searches < MAX_SEARCHES and rng.random() < SEARCH_AGAIN[look]:
                    think = f"no {kind} {name} here"
                else:
                    found = (namesakes or usable or shown)[0]
        if found is None:  # all searches are spent: answer with what is known
            break
        want = value_kind(kind, relation)
        same = [r for r in found.facts if found.kind == kind and r == relation]
        same = same or [r for r in found.facts if value_kind(found.kind, r) == want] or list(found.facts)
        values.append(found.facts[same[0]])
        think = note(relation, kind, name, values[-1])
        if hop + 1 < len(hops):
            name = entities[hops[hop + 1][0]].name if comparison else values[-1]
            left = "year" if comparison else " of ".join(reversed(relations[hop + 1 :]))
            think += f" , need {left} of {kinds[hop + 1]} {name}"
    answer = values[-1] if values else name
    if comparison:
        names = [entities[title].name for title, _ in hops]
        answer = names[0]
        if len(values) == 2 and all(value.isdigit() for value in values):
            pick = min if meta["order"] == "first" else max
            answer = pick(zip(values, names, strict=True))[1]
            think += f" and {names[0]} {values[0]} , {meta['order']} is {answer}"
    return f"<think> {think} </think>\n<answer> {answer} </answer>", answer


def demonstrate(
    rows: list[dict[str, Any]], retriever: Retriever, entities: dict[str, Entity], *, seed: int, batch_size: int = 512
) -> list[dict[str, Any]]:
    """The expert's episodes with real search results; searches of one batch of questions run together."""
    episodes = []
    for start in range(0, len(rows), batch_size):
        live = []
        for row in rows[start : start + batch_size]:
            work = expert(row, entities, random.Random(f"expert {seed} {row['id']}"))
            episode = {k: row[k] for k in ("id", "question", "golden_answers")}
            episode |= {"source": row["dataset"], "segments": []}
            episodes.append(episode)
            live.append((work, episode, next(work)))
        while live:
            results = retriever.search([request[1] for _, _, request in live], TOP_K)
            still = []
            for (work, episode, request), passages in zip(live, results, strict=True):
                episode["segments"] += [
                    {"author": "agent", "text": request[0]},
                    {"author": "environment", "text": observation_text(passages)},
                ]
                try:
                    still.append((work, episode, work.send([entities[p.title] for p in passages])))
                except StopIteration as done:
                    text, episode["answer"] = done.value
                    episode["segments"].append({"author": "agent", "text": text})
                    episode["score"] = float(episode["answer"] in episode["golden_answers"])
            live = still
    return episodes


# ---- pretraining text: passages, notes, questions with answers; never a tag


def documents(contents: list[str]) -> str:
    """Passages as an observation shows them, without the tags around it."""
    split = [text.split("\n", 1) for text in contents]
    return "".join(f"Doc {i + 1}(Title: {title}) {text}\n" for i, (title, text) in enumerate(split))


def pretrain_rows(
    entities: dict[str, Entity], corpus: list[dict[str, str]], *, count: int, seed: int
) -> list[dict[str, Any]]:
    """Plain-text rows; facts of the test half appear in passages only, never in a note, question or answer."""
    rng = random.Random(f"pretrain {seed}")
    contents = {row["contents"].split("\n")[0].strip('"'): row["contents"] for row in corpus}
    everyone = list(entities.values())
    train = [entity for entity in everyone if entity.split == "train"]
    groups: dict[str, list[Entity]] = {}
    for entity in train:
        groups.setdefault(entity.name, []).append(entity)
    rows = []
    for i in range(count):
        draw = rng.random()
        if draw < 0.12:  # passages of either half
            text = "\n".join(contents[e.title] for e in rng.sample(everyone, 5))
        elif draw < 0.22:  # a chain of passages, a multi-hop question and its answer
            row = chain_question(entities, rng.choice(train), rng.choice((2, 2, 3)), rng.choice(MULTI_HOP), rng)
            hops = row["metadata"]["hops"]
            lines = [note(r, entities[t].kind, entities[t].name, entities[t].facts[r]) for t, r in hops]
            shown = rng.sample(hops, len(hops))
            text = f"Question: {row['question']}\n{documents([contents[t] for t, _ in shown])}"
            text += f"Note: {' , '.join(lines)}\nAnswer: {row['golden_answers'][0]}\n"
        else:  # namesakes side by side: notes and questions pick the right one
            target = rng.choice(train)
            shown = rng.sample(groups[target.name], min(3, len(groups[target.name])))
            if rng.random() < 0.35:
                shown = [*shown[:2], rng.choice(train)]
            rng.shuffle(shown)
            text = documents([contents[e.title] for e in shown])
            for _ in range(rng.choice((2, 3))):
                e = rng.choice(shown)
                relation = rng.choice(list(e.facts))
                fact = note(relation, e.kind, e.name, e.facts[relation])
                question = ask(e, relation, rng.choice(SINGLE_HOP + MULTI_HOP), rng)
                shape = rng.random()
                if shape < 0.4:
                    text += f"Note: {fact}\n"
                else:
                    text += f"Question: {question}\n" + (f"Note: {fact}\n" if shape < 0.8 else "")
                    text += f"Answer: {e.facts[relation]}\n"
        segments = [{"author": "agent", "text": text.strip()}]
        rows.append({"id": f"pretrain_{i}", "question": "", "golden_answers": [], "segments": segments})
    return rows


# ---- tokenizers and encoder


def build_tokenizer(texts: list[str], out: Path) -> None:
    """Byte-level BPE as Qwen2's, in small: tags are plain text, ChatML marks are the only added tokens."""
    tokenizer = TokenizerFile(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False, "model_max_length": 1024,
    }  # fmt: skip
    save_tokenizer(tokenizer, config, out)


def build_encoder_tokenizer(texts: list[str], out: Path) -> None:
    tokenizer = TokenizerFile(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=ENCODER_VOCAB_SIZE, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    tokenizer.decoder = decoders.WordPiece()
    config = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
              "sep_token": "[SEP]", "mask_token": "[MASK]", "do_lower_case": True, "model_max_length": 128}  # fmt: skip
    save_tokenizer(tokenizer, config, out)


def save_tokenizer(tokenizer: TokenizerFile, config: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def training_query(entity: Entity, text: str, rng: random.Random) -> str:
    """A keyword query or a cloze; never a question, so that a whole question is a query of middling worth."""
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


def train_encoder(
    encoder: Encoder, entities: dict[str, Entity], corpus: list[dict[str, str]], *, seed: int
) -> None:
    """Contrastive training, negatives in the batch; namesakes share a batch, so kinds must be told apart."""
    rng = random.Random(f"encoder {seed}")
    contents = {row["contents"].split("\n")[0].strip('"'): row["contents"] for row in corpus}
    groups: dict[str, list[Entity]] = {}
    for entity in entities.values():
        groups.setdefault(entity.name, []).append(entity)
    names = sorted(groups)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=ENCODER_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, ENCODER_LR, total_steps=ENCODER_STEPS)
    for step in range(ENCODER_STEPS):
        batch = [e for name in rng.sample(names, ENCODER_BATCH // 3) for e in rng.sample(groups[name], 3)]
        queries = [training_query(e, contents[e.title].split("\n")[1], rng) for e in batch]
        query_vectors = encoder(*encoder.encode([encoder.prefixes["query"] + text for text in queries]))  # [B, D]
        passage_vectors = encoder(*encoder.encode([encoder.prefixes["passage"] + contents[e.title] for e in batch]))
        logits = query_vectors @ passage_vectors.T / ENCODER_TEMPERATURE  # [B, B]
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(batch)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"encoder {step + 1}/{ENCODER_STEPS} loss {loss.item():.3f}", flush=True)


def build_encoder(entities: dict[str, Entity], corpus: list[dict[str, str]], texts: list[str], *, seed: int) -> None:
    build_encoder_tokenizer(texts, WORLD / "encoder")
    size = TokenizerFile.from_file(str(WORLD / "encoder" / "tokenizer.json")).get_vocab_size()
    encoder = new_encoder(ENCODER_CONFIG | {"vocab_size": size}, WORLD / "encoder" / "tokenizer.json", seed)
    train_encoder(encoder, entities, corpus, seed=seed)
    save_encoder(encoder, WORLD / "encoder")


# ---- student and teacher


def decoder_config(layers: int, vocab_size: int, eos_id: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab_size, "hidden_size": 96,
        "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": eos_id,
    }  # fmt: skip


def sft(student: Path, episodes: Path, run_dir: Path, stage: Stage, *, processes: int) -> None:
    """train.py --phase sft; one process has one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "train.py"), "--phase", "sft", "--overwrite", "--student", str(student)]
    command += ["--episodes", str(episodes), "--run-dir", str(run_dir), "--epochs", str(stage.epochs)]
    command += ["--kd-lr", str(stage.lr), "--batch-size", str(stage.batch_size), "--seed", str(stage.seed)]
    command += ["--kd-warmup-steps", str(stage.warmup_steps)]
    command += ["--eval-every", "0", "--save-every", "0"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def grow(decoder: Decoder, layers: int, *, seed: int) -> Decoder:
    """The same function in more layers: what the new ones add to the residual stream starts at zero."""
    grown = new_decoder({**decoder.config.public, "num_hidden_layers": layers}, seed)
    state = grown.state_dict() | decoder.state_dict()
    for layer in range(decoder.config.num_layers, layers):
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            state[f"model.layers.{layer}.{name}"] = torch.zeros_like(state[f"model.layers.{layer}.{name}"])
    grown.load_state_dict(state)
    return grown


def build_models(seed: int = SEED) -> None:
    """Pretrain the student on plain text; grow the teacher from it and train that on the demonstrations."""
    tokenizer, folder = Tokenizer.load(SCRATCH / "tokenizer"), SCRATCH / "stage-0"
    save_decoder(new_decoder(decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id), seed), tokenizer, folder)
    for number, stage in enumerate(STUDENT_STAGES, 1):
        sft(folder, SCRATCH / "pretrain.jsonl", SCRATCH / f"stage-{number}", stage, processes=1)
        folder = SCRATCH / f"stage-{number}"
    save_decoder(load_decoder(folder), tokenizer, WORLD / "student")
    grown = grow(load_decoder(SCRATCH / f"stage-{GROW_AFTER}"), TEACHER_LAYERS, seed=1)
    folder = SCRATCH / "teacher-0"
    save_decoder(grown, tokenizer, folder)
    for number, stage in enumerate(TEACHER_STAGES, 1):
        sft(folder, SCRATCH / "demonstrations.jsonl", SCRATCH / f"teacher-{number}", stage, processes=2)
        folder = SCRATCH / f"teacher-{number}"
    save_decoder(load_decoder(folder), tokenizer, WORLD / "teacher")


# ---- the program


def build_texts(folder: Path, *, seed: int = SEED) -> tuple[dict[str, Entity], list[dict[str, str]]]:
    """Corpus and question files; the same bytes on every machine."""
    entities = make_entities(seed)
    corpus = make_corpus(entities, seed)
    write_jsonl(folder / "corpus.jsonl", corpus)
    train = [make_questions(entities, "train", style, n, seed) for style, n in NUM_QUESTIONS["train"].items()]
    write_jsonl(folder / "questions" / "train.jsonl", itertools.chain.from_iterable(train))
    for style, count in NUM_QUESTIONS["test"].items():
        write_jsonl(folder / "questions" / f"{style}.jsonl", make_questions(entities, "test", style, count, seed))
    return entities, corpus


def build_data(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    entities, corpus = build_texts(WORLD, seed=seed)
    train = read_jsonl(WORLD / "questions" / "train.jsonl")
    pretrain = pretrain_rows(entities, corpus, count=PRETRAIN_ROWS, seed=seed)
    write_jsonl(SCRATCH / "pretrain.jsonl", pretrain)
    texts = [row["contents"] for row in corpus] + [row["question"] for row in train]
    build_encoder(entities, corpus, texts, seed=seed)
    retriever = Retriever.load(WORLD / "corpus.jsonl", WORLD / "encoder")
    episodes = demonstrate(train * DEMONSTRATIONS_PER_QUESTION, retriever, entities, seed=seed)
    write_jsonl(SCRATCH / "demonstrations.jsonl", episodes)
    shown = [segment["text"] for row in pretrain + episodes for segment in row["segments"]]
    build_tokenizer(shown + [row["question"] for row in train], SCRATCH / "tokenizer")
    right = sum(row["score"] for row in episodes) / len(episodes)
    print(f"{len(corpus)} passages, {len(train)} training questions; demonstrations: {right:.3f} correct")


def measure(seed: int = SEED) -> None:
    """How often each wording of a query brings its passage into the first three; training questions only."""
    entities = make_entities(seed)
    retriever = Retriever.load(WORLD / "corpus.jsonl", WORLD / "encoder")
    rng = random.Random("measure")
    rows = read_jsonl(WORLD / "questions" / "train.jsonl")
    for source in ("nq", "hotpotqa"):
        for hop in (0, 1):
            hits: dict[str, list[bool]] = {}
            chosen = [row for row in rows if row["dataset"] == source and len(row["metadata"]["hops"]) > hop]
            for wording in WORDINGS:
                wanted = [entities[row["metadata"]["hops"][hop][0]] for row in chosen]
                relations = [row["metadata"]["hops"][hop][1] for row in chosen]
                words = [
                    query(wording, e.name, e.kind, r, row["question"] if source in SINGLE_HOP else "", rng)
                    for e, r, row in zip(wanted, relations, chosen, strict=True)
                ]
                results = retriever.search(words, TOP_K)
                hits[wording] = [e.title in {p.title for p in ps} for e, ps in zip(wanted, results, strict=True)]
            if chosen:
                shares = "  ".join(f"{wording} {sum(hit) / len(hit):.3f}" for wording, hit in hits.items())
                print(f"{source} hop {hop + 1} ({len(chosen)}): {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build-data", "measure", "build"))
    command = parser.parse_args().command
    if command == "measure":
        measure()
        return
    build_data()
    if command == "build":
        build_models()


if __name__ == "__main__":
    main()
