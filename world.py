"""The embedded world: encyclopaedia, questions, tokenizers, encoder, teacher and student, in the real file formats.

  python world.py build-data   corpus, questions, tokenizers, encoder; runs/world/{copying,reading,demonstrations}.jsonl
  python world.py measure      how often each wording of a query finds its passage (training questions)
  python world.py build        build-data, then pretrains the student and trains the teacher (train.py --phase sft):
                               16 minutes on two cores beside another job
  python world.py build-pairs  two more pairs in runs/world/pairs, from the shipped tokenizer and encoder: a teacher of
                               twice the layers, and a Llama-type student and teacher; interrupt it and call it again
  python world.py build-trails reasoning questions (trails.py) in runs/trails, and a student and a teacher for them;
                               interrupt it and call it again
  python world.py build-readers for QAgent, in runs/readers: two generators (three and six layers) that read several
                               passages, an agent of each protocol; interrupt it and call it again

What the world was built to contain (encyclopaedia.py says more; none of it is evidence about real data):

1. The teacher imitates a scripted expert that words every query in one of three ways, whatever the
   question: the bare name (most often, and worst: namesakes crowd the passage out), the question (of
   several hops, the question of this hop), or name and kind (best). When the passage is missing it searches
   again sometimes (SEARCH_AGAIN), or else trusts the first namesake's passage and answers from it. These
   demonstrations are not filtered: the teacher is imperfect, its choices are a mixture, and which of them
   pays is known to the reward alone.
2. Student and teacher learn to read from encyclopaedias of other seeds, so that nothing is gained by remembering
   facts; these have none of the names of the shipped test half.
3. The student is pretrained on copying lists and on notes and answers about passages it is shown, then on a few
   of the expert's demonstrations (GLIMPSES), as an instruction-tuned model has met tags and tools somewhere: it
   answers about one question in a hundred (the paper's student: 0.006).
4. Nothing was tuned on test questions.

Texts are rebuilt byte for byte; tokenizers are not (their trainer breaks ties by chance), and so the weights differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import trails
from data import Question
from encyclopaedia import (
    FAMILY_NAMES,
    FIRST_WORDS,
    GIVEN_NAMES,
    GROUPS,
    MULTI_HOP,
    NUM_DEVELOPMENT_QUESTIONS,
    NUM_QUESTIONS,
    PROFESSIONS,
    SCHEMA,
    SECOND_WORDS,
    SINGLE_HOP,
    THINGS,
    Entity,
    ask,
    chain_question,
    make_corpus,
    make_entities,
    make_questions,
)
from model import Decoder, Encoder, Tokenizer, load_decoder, new_decoder, new_encoder, save_decoder, save_encoder
from protocol import QAGENT, SEARCH_R1, Protocol, merged
from qagent import generator_messages
from retriever import Passage, Retriever

ROOT = Path(__file__).resolve().parent
WORLD, SCRATCH = ROOT / "world", ROOT / "runs" / "world"
TRAILS, READERS = ROOT / "runs" / "trails", ROOT / "runs" / "readers"
SEED = 7
VOCAB_SIZE, ENCODER_VOCAB_SIZE = 1536, 2000
TOP_K, MAX_SEARCHES = 1, 4
# the expert: chances of the three wordings, and of searching again when the passage did not come back: by
# whether the first namesake is of a similar kind (work and work, artist and artist), another kind, or absent
WORDINGS = {"poor": 0.40, "medium": 0.30, "good": 0.30}
SEARCH_AGAIN = {"similar": 0.55, "other": 0.80, "absent": 0.95}
DEMONSTRATIONS, DEMONSTRATION_WORLDS = 20_000, 40
LIST_ROWS, READING_ROWS, ROWS_PER_WORLD = 6_000, 24_000, 150  # the student's pretraining, one after the other
GLIMPSES = 1_100  # demonstrations that the student sees, once
READING_QUESTIONS, COLD_DEMONSTRATIONS, MOST_PASSAGES = 15_000, 9_000, 7  # QAgent's readers and agents
STUDENT_LAYERS, TEACHER_LAYERS, LARGER_TEACHER_LAYERS = 3, 6, 12
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 512},
}  # fmt: skip

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


def by_title(corpus: list[dict[str, str]]) -> dict[str, str]:
    """Title -> contents."""
    return {row["contents"].split("\n")[0].strip('"'): row["contents"] for row in corpus}


def by_name(entities: Iterable[Entity]) -> dict[str, list[Entity]]:
    """Name -> the entities that share it."""
    groups: dict[str, list[Entity]] = {}
    for entity in entities:
        groups.setdefault(entity.name, []).append(entity)
    return groups


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


def quote(passage: Passage) -> str:
    """As QAgent's protocol and its generators show it."""
    return f"{passage.title}\n{passage.text}"


# ---- the scripted expert

Request = tuple[str, tuple[str, ...]]  # (agent text, queries)


def expert(
    row: dict[str, Any], entities: dict[str, Entity], rng: random.Random, protocol: Protocol = SEARCH_R1
) -> Generator[Request, list[Passage], tuple[str, str]]:
    """Works on one question: yields requests, is sent the passages, returns (last text, answer).

    Of protocol qagent it asks one, two or three wordings of a query at once, plans anew before each search, and
    repeats the passage that it trusts before it notes what that says: small models pick among passages in this way.
    """
    meta, hops = row["metadata"], row["metadata"]["hops"]
    comparison = meta["type"] == "comparison"
    kinds = [entities[title].kind for title, _ in hops]
    relations = [relation for _, relation in hops]
    name = entities[hops[0][0]].name
    if comparison:
        plan = f"compare year of {kinds[0]} {name} and {kinds[1]} {entities[hops[1][0]].name}"
    else:
        plan = f"need {' of '.join(reversed(relations))} of {kinds[0]} {name}"
    think, said, values, searches = plan, "", [], 0
    for hop, (kind, relation) in enumerate(zip(kinds, relations, strict=True)):
        wordings, found = dict(WORDINGS), None
        while found is None and searches < MAX_SEARCHES:
            asked = []
            for _ in range(1 if protocol is SEARCH_R1 else min(rng.choice((1, 1, 2, 3)), len(wordings))):
                wording = rng.choices(list(wordings), list(wordings.values()))[0]
                del wordings[wording]
                asked.append(query(wording, name, kind, relation, row["question"] if len(hops) == 1 else "", rng))
            text = f"<think> {think} </think>\n<search> {asked[0]} </search>"
            if protocol is QAGENT:
                queries = "".join(f"\n<query> {words} </query>" for words in asked)
                text = f"{said}<plan> {plan} </plan>\n<search>{queries}\n</search>"
            passages = yield text, tuple(asked)
            shown = [entities[passage.title] for passage in passages]
            searches += 1
            found = next((e for e in shown if e.name == name and e.kind == kind), None)
            if found is None:
                want = value_kind(kind, relation)
                usable = [e for e in shown if any(value_kind(e.kind, r) == want for r in SCHEMA[e.kind])]
                namesakes = [e for e in usable if e.name == name]
                look = "absent" if not namesakes else "similar" if similar(namesakes[0].kind, kind) else "other"
                if wordings and searches < MAX_SEARCHES and rng.random() < SEARCH_AGAIN[look]:
                    think = f"no {kind} {name} here"
                    said = f"<reflection> {think} </reflection>\n"
                else:
                    found = (namesakes or usable or shown)[0]
        if found is None:  # all searches are spent: answer with what is known
            break
        want = value_kind(kind, relation)
        same = [r for r in found.facts if found.kind == kind and r == relation]
        same = same or [r for r in found.facts if value_kind(found.kind, r) == want] or list(found.facts)
        values.append(found.facts[same[0]])
        think = note(relation, kind, name, values[-1])
        said = f"<reflection> {next(quote(p) for p in passages if p.title == found.title)}\n{think} </reflection>\n"
        if hop + 1 < len(hops):
            name = entities[hops[hop + 1][0]].name if comparison else values[-1]
            left = "year" if comparison else " of ".join(reversed(relations[hop + 1 :]))
            plan = f"need {left} of {kinds[hop + 1]} {name}"
            think += f" , {plan}"
    answer = values[-1] if values else name
    if comparison:
        names = [entities[title].name for title, _ in hops]
        answer = names[0]
        if len(values) == 2 and all(value.isdigit() for value in values):
            pick = min if meta["order"] == "first" else max
            answer = pick(zip(values, names, strict=True))[1]
            more = f" and {names[0]} {values[0]} , {meta['order']} is {answer}"
            think, said = think + more, said.replace(" </reflection>", f"{more} </reflection>")
    last = f"<answer> {answer} </answer>"
    return (f"<think> {think} </think>\n{last}" if protocol is SEARCH_R1 else said + last), answer


def demonstrate(
    rows: list[dict[str, Any]], retriever: Retriever, entities: dict[str, Entity], *, seed: int, batch_size: int = 512,
    protocol: Protocol = SEARCH_R1,
) -> list[dict[str, Any]]:
    """The expert's episodes with real search results; searches of one batch of questions run together."""
    episodes = []
    for start in range(0, len(rows), batch_size):
        live = []
        for row in rows[start : start + batch_size]:
            work = expert(row, entities, random.Random(f"expert {seed} {row['id']}"), protocol)
            episode = {k: row[k] for k in ("id", "question", "golden_answers")}
            episode |= {"source": row["dataset"], "segments": []}
            episodes.append(episode)
            live.append((work, episode, next(work)))
        while live:
            results = iter(retriever.search([words for _, _, request in live for words in request[1]], TOP_K))
            still = []
            for work, episode, request in live:
                passages = merged([next(results) for _ in request[1]])
                episode["segments"] += [
                    {"author": "agent", "text": request[0]},
                    {"author": "environment", "text": protocol.observation(passages)},
                ]
                try:
                    still.append((work, episode, work.send(passages)))
                except StopIteration as done:
                    text, episode["answer"] = done.value
                    episode["segments"].append({"author": "agent", "text": text})
                    episode["score"] = float(episode["answer"] in episode["golden_answers"])
            live = still
    return episodes


# ---- other encyclopaedias, to learn reading from


def practice_worlds(number: int, first_seed: int) -> Iterator[tuple[dict[str, Entity], list[dict[str, str]]]]:
    """(entities, corpus) of other seeds, without the names of the shipped test half."""
    hidden = frozenset(entity.name for entity in make_entities(SEED).values() if entity.split == "test")
    for seed in range(first_seed, first_seed + number):
        entities = make_entities(seed, without=hidden)
        yield entities, make_corpus(entities, seed)


def document(contents: str) -> str:
    """A passage as an observation shows it, without the tags around it."""
    title, text = contents.split("\n", 1)
    return f"Doc 1(Title: {title}) {text}\n"


def list_to_copy(rng: random.Random) -> tuple[str, str]:
    """(a list, the same list again): copying with nothing else to learn."""
    items = []
    for _ in range(rng.choice((4, 8, 12, 16))):
        first, second = rng.choice(((FIRST_WORDS, SECOND_WORDS), (GIVEN_NAMES, FAMILY_NAMES)))
        draw = rng.random()
        if draw < 0.7:
            items.append(f"{rng.choice(first)} {rng.choice(second)}")
        else:
            items.append(str(rng.randrange(1800, 1960)) if draw < 0.85 else rng.choice(THINGS + PROFESSIONS))
    text = " , ".join(items)
    return f"List: {text}\nAgain:", f" {text}\n"


Turn = tuple[str, str]  # (what is shown, what is told about it)


def chain_to_read(entities: dict[str, Entity], contents: dict[str, str], rng: random.Random) -> list[Turn]:
    """A question of several hops, its passages one after the other, and its answer."""
    start = rng.choice(list(entities.values()))
    row = chain_question(entities, start, rng.choice((2, 2, 3)), rng.choice(MULTI_HOP), rng)
    turns = []
    for title, relation in row["metadata"]["hops"]:
        entity = entities[title]
        fact = note(relation, entity.kind, entity.name, entity.facts[relation])
        turns.append((document(contents[title]), f"Note: {fact}\n"))
    (first, told), (last, note_of_last) = turns[0], turns[-1]
    turns[0] = (f"Question: {row['question']}\n{first}", told)
    turns[-1] = (last, f"{note_of_last}Answer: {row['golden_answers'][0]}\n")
    return turns


def passages_to_read(
    entities: dict[str, Entity], contents: dict[str, str], namesakes: dict[str, list[Entity]], rng: random.Random
) -> list[Turn]:
    """One to three passages that share a name, each followed by notes and answers about it."""
    together = namesakes[rng.choice(list(entities.values())).name]
    turns = []
    for entity in rng.sample(together, rng.choice((1, 1, 2, 3))):
        told = ""
        for _ in range(3):
            relation, style, shape = rng.choice(list(entity.facts)), rng.choice(SINGLE_HOP + MULTI_HOP), rng.random()
            fact = f"Note: {note(relation, entity.kind, entity.name, entity.facts[relation])}\n"
            if shape < 0.5:
                told += fact
            elif shape < 0.9:
                told += f"Question: {ask(entity, relation, style, rng)}\n"
                told += (fact if shape < 0.75 else "") + f"Answer: {entity.facts[relation]}\n"
            else:
                other = rng.choice([namesake for namesake in together if namesake is not entity])
                told += f"Question: {ask(other, rng.choice(list(other.facts)), style, rng)}\n"
                told += f"Note: no {other.kind} {other.name} here\n"
        turns.append((document(contents[entity.title]), told))
    return turns


def pretrain_rows(number: int, first_seed: int, *, lists: float) -> list[dict[str, Any]]:
    """Episodes without question or tag; what is shown is the environment's, so only what is told is trained on."""
    rng, rows = random.Random(f"pretrain {first_seed}"), []
    for entities, corpus in practice_worlds(number // ROWS_PER_WORLD, first_seed):
        contents, namesakes = by_title(corpus), by_name(entities.values())
        for _ in range(ROWS_PER_WORLD):
            if rng.random() < lists:
                turns = [list_to_copy(rng)]
            elif rng.random() < 0.3:
                turns = chain_to_read(entities, contents, rng)
            else:
                turns = passages_to_read(entities, contents, namesakes, rng)
            segments = []
            for shown, told in turns:
                segments += [{"author": "environment", "text": shown}, {"author": "agent", "text": told}]
            name = f"pretrain_{first_seed}_{len(rows)}"
            rows.append({"id": name, "question": "", "golden_answers": [], "segments": segments})
    return rows


def practice_demonstrations(number: int, worlds: int, protocol: Protocol = SEARCH_R1) -> list[dict[str, Any]]:
    """The expert's episodes in other encyclopaedias, all seven styles of question, both halves."""
    episodes = []
    for world, entities, retriever, questions in practice_questions(number, worlds, first_seed=9000):
        episodes += demonstrate(questions, retriever, entities, seed=world, protocol=protocol)
    return episodes


def practice_questions(
    number: int, worlds: int, first_seed: int
) -> Iterator[tuple[int, dict[str, Entity], Retriever, list[dict[str, Any]]]]:
    """(number of the world, its entities, its passages, questions of all styles about both halves)."""
    count = number // worlds // len(SINGLE_HOP + MULTI_HOP) // 2
    for world, (entities, corpus) in enumerate(practice_worlds(worlds, first_seed)):
        write_jsonl(SCRATCH / "practice.jsonl", corpus)
        retriever = Retriever.load(SCRATCH / "practice.jsonl", WORLD / "encoder")
        yield world, entities, retriever, [
            question | {"id": f"{world}_{question['id']}"}
            for split in ("train", "test")
            for style in SINGLE_HOP + MULTI_HOP
            for question in make_questions(entities, split, style, count, world)
        ]


def passages_for(
    row: dict[str, Any], entities: dict[str, Entity], retriever: Retriever, shelf: dict[str, Passage],
    rng: random.Random,
) -> list[Passage]:
    """What one search for the question finds, or several wordings for each hop; what is missing added more often
    than not."""
    hops, queries = row["metadata"]["hops"], []
    for title, relation in hops:
        whole = row["question"] if len(hops) == 1 else ""
        queries += [query(wording, entities[title].name, entities[title].kind, relation, whole, rng)
                    for wording in rng.sample(list(WORDINGS), rng.choice((1, 2, 3)))]  # fmt: skip
    one_search = rng.random() < 0.4
    found = merged(retriever.search([row["question"]], 5) if one_search else retriever.search(queries, TOP_K))
    for title, _ in hops:
        if title not in {passage.title for passage in found} and rng.random() < 0.7:
            found.insert(rng.randint(0, len(found)), shelf[title])
    if rng.random() < 0.5:
        rng.shuffle(found)
    return found[:MOST_PASSAGES]


def reading_rows(number: int, worlds: int) -> list[dict[str, Any]]:
    """What a generator is asked, and how it answers: it repeats the passage of each hop and notes what that says, or
    says that a passage is missing. Repeating is how models of this size pick among passages (docs/log.md)."""
    rows, tokenizer = [], Tokenizer.load(WORLD / "student")
    for world, entities, retriever, questions in practice_questions(number, worlds, first_seed=30_000):
        rng = random.Random(f"reading {world}")
        rng.shuffle(questions)
        passages = (retriever.corpus.passage(number, 0.0) for number in range(len(retriever.corpus)))
        shelf = {passage.title: passage for passage in passages}
        for row in questions:
            found, told, answer = passages_for(row, entities, retriever, shelf, rng), [], row["golden_answers"][0]
            for title, relation in row["metadata"]["hops"]:
                entity, seen = entities[title], [passage for passage in found if passage.title == title]
                if not seen:
                    told, answer = [*told, f"no {entity.kind} {entity.name} here"], "unknown"
                    break
                told += [quote(seen[0]), note(relation, entity.kind, entity.name, entity.facts[relation])]
            question = Question(row["id"], row["question"], tuple(row["golden_answers"]), row["dataset"])
            prompt = tokenizer.chat(generator_messages(question, found))
            text = "<think> " + "\n".join(told) + f" </think>\n<answer> {answer} </answer>"
            rows.append({"id": row["id"], "question": row["question"], "golden_answers": row["golden_answers"],
                         "segments": [{"author": "prompt", "ids": prompt}, {"author": "agent", "text": text}]})
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
    contents, groups = by_title(corpus), by_name(entities.values())
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


def sft(
    student: Path, texts: Path, run_dir: Path, *, batch_size: int, lr: float, processes: int, epochs: int = 1
) -> None:
    """Passes over the texts, or what is left of them; a process has one thread."""
    if (run_dir / "model.safetensors").exists():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "train.py"), "--phase", "sft", "--resume", "--student", str(student)]
    command += ["--episodes", str(texts), "--run-dir", str(run_dir), "--epochs", str(epochs), "--kd-warmup-steps", "40"]
    command += ["--kd-lr", str(lr), "--batch-size", str(batch_size), "--eval-every", "0", "--save-every", "200"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def ready_to_copy(decoder: Decoder) -> Decoder:
    """Starting weights from which copying is learnt in minutes; from plain noise it took far longer (docs/log.md).

    The embedding outweighs what the layers add at first. Queries resemble keys and outputs undo values, so that a head
    attends to tokens like its own and repeats them (mimetic initialisation, Trockman and Kolter 2023). The first
    head of the first layer looks one token back, which its biases can say without any weight.
    """
    config, layers = decoder.config, decoder.model.layers
    group = config.num_heads // config.num_kv_heads
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "embed_tokens" in name:
                parameter.mul_(10)
            elif parameter.ndim == 2 and not name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(5)
        decoder.model.norm.weight.fill_(0.3)
        for layer in layers:
            attention = layer.self_attn
            keys, values = (
                projection.weight.unflatten(0, (config.num_kv_heads, -1)).repeat_interleave(group, 0).flatten(0, 1)
                for projection in (attention.k_proj, attention.v_proj)
            )  # [H * Dh, D]
            attention.q_proj.weight.mul_(0.3).add_(0.7 * keys)
            attention.o_proj.weight.add_(0.2 * values.T)
        first, half = layers[0].self_attn, config.head_dim // 2
        angles = config.rope_frequencies()[:4]  # the fastest four tell neighbours apart
        key, query = torch.zeros(config.head_dim), torch.zeros(config.head_dim)
        key[:4], query[:4], query[half : half + 4] = 2.7, 2.7 * angles.cos(), -2.7 * angles.sin()
        if config.qkv_bias:
            first.k_proj.bias[: len(key)], first.q_proj.bias[: len(query)] = key, query
        else:  # the last channel is the same for all tokens, and stands for the bias
            embeddings = decoder.model.embed_tokens.weight
            for layer in layers:
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    projection.weight[:, -1] = 0.0
            embeddings[:, -1] = 1.0
            constant = F.rms_norm(embeddings, embeddings.shape[1:])[:, -1].mean()
            first.k_proj.weight[: len(key), -1] = key / constant
            first.q_proj.weight[: len(query), -1] = query / constant
    return decoder


def grow(decoder: Decoder, layers: int, *, seed: int, **changes: Any) -> Decoder:
    """The same function in more layers: what the new ones add to the residual stream starts at zero.

    changes: of config.json; more rows of the head than there are tokens, a head of its own.
    """
    grown = new_decoder({**decoder.config.public, "num_hidden_layers": layers, **changes}, seed)
    old = decoder.state_dict()
    if grown.lm_head is not None:
        old["lm_head.weight"] = decoder.head_weight
    state = grown.state_dict()
    state |= {name: torch.cat([tensor, state[name][len(tensor) :]]) for name, tensor in old.items()}
    for layer in range(decoder.config.num_layers, layers):
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            state[f"model.layers.{layer}.{name}"] = torch.zeros_like(state[f"model.layers.{layer}.{name}"])
    grown.load_state_dict(state)
    return grown


def build_student(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], out: Path, seed: int) -> Decoder:
    """Pretrain a student on plain text and show it some demonstrations; returns what it was before these."""
    save_decoder(ready_to_copy(new_decoder(config, seed)), tokenizer, folder / "student-0")
    for number, texts in enumerate(("copying", "reading")):
        start, end = folder / f"student-{number}", folder / f"student-{number + 1}"
        sft(start, SCRATCH / f"{texts}.jsonl", end, batch_size=8, lr=3e-3, processes=1)
    glimpses = random.Random("glimpses").sample(read_jsonl(SCRATCH / "demonstrations.jsonl"), GLIMPSES)
    write_jsonl(SCRATCH / "glimpses.jsonl", glimpses)
    sft(end, SCRATCH / "glimpses.jsonl", folder / "student-3", batch_size=8, lr=2e-3, processes=1)
    save_decoder(load_decoder(folder / "student-3"), tokenizer, out)
    return load_decoder(end)


def build_teacher(folder: Path, tokenizer: Tokenizer, grown: Decoder, out: Path) -> None:
    """Train a grown student on the demonstrations."""
    save_decoder(grown, tokenizer, folder / "teacher-0")
    sft(folder / "teacher-0", SCRATCH / "demonstrations.jsonl", folder / "teacher", batch_size=16, lr=2e-3, processes=2)
    save_decoder(load_decoder(folder / "teacher"), tokenizer, out)


def ready_to_look_up(decoder: Decoder, seed: int) -> Decoder:
    """Starting weights that find what followed an earlier token like this one (an induction head), laid by hand.

    The first head of the first layer looks one token back and notes a code of what it sees in channels of its own;
    the first head of the second layer looks for the note that matches its own token, and copies what it finds. From
    ready_to_copy, 1,200 steps did not find this (docs/log.md).
    """
    config, generator = decoder.config, torch.Generator().manual_seed(seed)
    width, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    slow = (torch.arange(size) % half >= half // 2)[:, None]  # channels that the rotation hardly turns
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(10)
        decoder.model.norm.weight.fill_(0.3)
        back, look = (layer.self_attn for layer in decoder.model.layers[:2])
        place = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]  # [D, Dh] orthonormal
        code = torch.randn(size, width, generator=generator) / width**0.5
        code = code - code @ place @ place.T  # [Dh, D]: blind to the notes
        angles = config.rope_frequencies()[: half // 2]
        for projection in (back.q_proj, back.k_proj):
            projection.weight[:size], projection.bias[:size] = 0.0, 0.0
        back.k_proj.bias[: half // 2] = 5.0
        back.q_proj.bias[: half // 2] = 5.0 * angles.cos()
        back.q_proj.bias[half : half + half // 2] = -5.0 * angles.sin()
        back.v_proj.weight[:size], back.o_proj.weight[:, :size] = code, place
        look.q_proj.weight[:size], look.k_proj.weight[:size] = 4.0 * code * slow, 4.0 * place.T * slow
        values = torch.linalg.qr(torch.randn(width, size, generator=generator))[0]
        look.v_proj.weight[:size], look.o_proj.weight[:, :size] = values.T, values
    return decoder


def build_trails(seed: int = SEED) -> None:
    """The reasoning questions; a student that can look roads up and then learns to divide; a teacher, grown from it
    before that, that follows trails."""
    tokenizer = Tokenizer.load(WORLD / "student")
    paths = {split: TRAILS / f"{split}.jsonl" for split in ("train", "test", "demonstrations", "roads", "numbers")}
    before = [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths.values()]
    for split, path in paths.items():
        write_jsonl(path, trails.make_rows(split))
    if before != [path.read_text(encoding="utf-8") for path in paths.values()]:  # what was built is of other texts
        shutil.rmtree(TRAILS / "building", ignore_errors=True)
    fresh = new_decoder(decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id), seed)
    building = TRAILS / "building"
    save_decoder(ready_to_look_up(fresh, seed), tokenizer, building / "student-0")
    for start, texts, end in (("student-0", "roads", "student-1"), ("student-1", "numbers", "student-2")):
        sft(building / start, paths[texts], building / end, batch_size=16, lr=2e-3, processes=2)
    save_decoder(load_decoder(building / "student-2"), tokenizer, TRAILS / "student")
    grown = grow(load_decoder(building / "student-1"), TEACHER_LAYERS, seed=1)
    save_decoder(grown, tokenizer, building / "teacher-0")
    sft(building / "teacher-0", paths["demonstrations"], building / "teacher-1", batch_size=16, lr=1.5e-3, processes=2)
    save_decoder(load_decoder(building / "teacher-1"), tokenizer, TRAILS / "teacher")


def build_readers() -> None:
    """For QAgent: generators that read several passages, and agents of both protocols that the small one becomes."""
    rows, building = READERS / "reading.jsonl", READERS / "building"
    if not rows.exists():
        for protocol in (QAGENT, SEARCH_R1):
            episodes = practice_demonstrations(COLD_DEMONSTRATIONS, 30, protocol)
            write_jsonl(READERS / f"{protocol.name}.jsonl", episodes)
        write_jsonl(rows, reading_rows(READING_QUESTIONS, 50))
    for name, start, texts, epochs in (
        ("small", WORLD / "student", rows, 2), ("large", WORLD / "teacher", rows, 2),
        *((f"{p.name}-agent", READERS / "small", READERS / f"{p.name}.jsonl", 1) for p in (QAGENT, SEARCH_R1)),
    ):  # fmt: skip
        sft(start, texts, building / name, batch_size=16, lr=2e-3, processes=2, epochs=epochs)
        save_decoder(load_decoder(building / name), Tokenizer.load(WORLD / "student"), READERS / name)


def build_models(seed: int = SEED) -> None:
    """The shipped student and teacher."""
    tokenizer = Tokenizer.load(SCRATCH / "tokenizer")
    for stale in (*SCRATCH.glob("student-*"), *SCRATCH.glob("teacher*")):  # of other texts, or another tokenizer
        shutil.rmtree(stale)
    config = decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id)
    reader = build_student(SCRATCH, tokenizer, config, WORLD / "student", seed)
    build_teacher(SCRATCH, tokenizer, grow(reader, TEACHER_LAYERS, seed=1), WORLD / "teacher")


def build_pairs(seed: int = SEED) -> None:
    """A larger teacher for the shipped student, as Qwen2.5 7B is to 0.5B (its head is padded further); a Llama-type
    pair, as Llama 3 8B and 1B are (no biases, no token for padding, the teacher's head untied)."""
    pairs, tokenizer = SCRATCH / "pairs", Tokenizer.load(WORLD / "student")
    if not (pairs / "texts").exists():
        write_jsonl(SCRATCH / "copying.jsonl", pretrain_rows(LIST_ROWS, 1000, lists=1.0))
        write_jsonl(SCRATCH / "reading.jsonl", pretrain_rows(READING_ROWS, 2000, lists=0.1))
        write_jsonl(SCRATCH / "demonstrations.jsonl", practice_demonstrations(DEMONSTRATIONS, DEMONSTRATION_WORLDS))
        write_jsonl(pairs / "texts", [])  # they are whole
    folder = pairs / "larger-teacher"
    grown = grow(load_decoder(WORLD / "student"), LARGER_TEACHER_LAYERS, seed=1, vocab_size=tokenizer.size + 64)
    build_teacher(folder / "building", tokenizer, grown, folder / "teacher")
    save_decoder(load_decoder(WORLD / "student"), tokenizer, folder / "student")
    folder = pairs / "llama"
    shutil.copytree(tokenizer.folder, folder / "tokenizer", dirs_exist_ok=True)
    about = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    about.pop("pad_token", None)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id) | LLAMA
    reader = build_student(folder / "building", tokenizer, config, folder / "student", seed)
    grown = grow(reader, TEACHER_LAYERS, seed=1, tie_word_embeddings=False)
    build_teacher(folder / "building", tokenizer, grown, folder / "teacher")


# ---- the program


def build_texts(folder: Path, *, seed: int = SEED) -> tuple[dict[str, Entity], list[dict[str, str]]]:
    """Corpus and question files; the same bytes on every machine."""
    entities = make_entities(seed)
    corpus = make_corpus(entities, seed)
    write_jsonl(folder / "corpus.jsonl", corpus)
    train = [make_questions(entities, "train", style, n, seed) for style, n in NUM_QUESTIONS["train"].items()]
    write_jsonl(folder / "questions" / "train.jsonl", itertools.chain.from_iterable(train))
    asked = {row["question"] for row in read_jsonl(folder / "questions" / "train.jsonl")}
    development = []
    for style in NUM_QUESTIONS["test"]:
        rows = make_questions(entities, "train", style, 4 * NUM_DEVELOPMENT_QUESTIONS, seed + 1)
        new = [row for row in rows if row["question"] not in asked][:NUM_DEVELOPMENT_QUESTIONS]
        development += [row | {"id": f"{style}_development_{i}"} for i, row in enumerate(new)]
    write_jsonl(folder / "questions" / "development.jsonl", development)
    for style, count in NUM_QUESTIONS["test"].items():
        write_jsonl(folder / "questions" / f"{style}.jsonl", make_questions(entities, "test", style, count, seed))
    return entities, corpus


def build_data(seed: int = SEED) -> None:
    torch.manual_seed(seed)
    entities, corpus = build_texts(WORLD, seed=seed)
    train = read_jsonl(WORLD / "questions" / "train.jsonl")
    copying = pretrain_rows(LIST_ROWS, 1000, lists=1.0)
    reading = pretrain_rows(READING_ROWS, 2000, lists=0.1)
    write_jsonl(SCRATCH / "copying.jsonl", copying)
    write_jsonl(SCRATCH / "reading.jsonl", reading)
    texts = [row["contents"] for row in corpus] + [row["question"] for row in train]
    build_encoder(entities, corpus, texts, seed=seed)
    episodes = practice_demonstrations(DEMONSTRATIONS, DEMONSTRATION_WORLDS)
    write_jsonl(SCRATCH / "demonstrations.jsonl", episodes)
    shown = [segment["text"] for row in reading[::8] + episodes[::4] for segment in row["segments"]]
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
    others = {"measure": measure, "build-pairs": build_pairs, "build-trails": build_trails,
              "build-readers": build_readers}  # fmt: skip
    parser.add_argument("command", choices=("build-data", "build", *others))
    command = parser.parse_args().command
    if command in others:
        return others[command]()
    build_data()
    if command == "build":
        build_models()


if __name__ == "__main__":
    main()
