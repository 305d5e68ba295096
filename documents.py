"""Your own documents: passages and their index, and questions to learn from.

    python documents.py index FOLDER --out DIR --encoder ENCODER     again: what changed alone
    python documents.py questions DIR --model MODEL                  pairs that were checked
    python train.py --phase sft --config configs/own.toml DIR/own.toml --student MODEL

`index` reads text, Markdown, HTML, JSON lines, and PDF where pypdf is installed. DIR is an index as
`retriever.py build` writes it, with corpus.jsonl beside it, documents.json (what was read, what was
skipped and why) and own.toml, a preset that names all of it. docs/own-documents.md goes through it.

`questions` lets a model write questions and their answers for passages. A pair is kept where the
answer stands in the passage and the question finds the passage. DIR then has questions.jsonl,
test.jsonl (set apart by passage), and episodes.jsonl: a search and an answer for each question.
"""

import hashlib
import json
import os
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as RawTokenizer
from tqdm import tqdm

from data import Passage, Question, hit, normalize_answer
from encoder import Encoder
from episode import SEARCH_R1
from formats.corpora import join_contents
from formats.documents import Section, read_document
from formats.indexes import read_vectors
from infra import cli
from infra.checkpoint import write_aside
from infra.config import setting
from infra.files import read_json, say
from infra.fingerprint import hash_of
from infra.parallel import pick_device, shuffled
from infra.programs import check_paths, read_command
from model import load_encoder
from retrieval.build import weights_hash, write_facts
from retriever import Corpus, Retriever, index_facts
from rollout import Policy, RolloutSettings, generate
from session import load_policy
from world.demonstrate import demonstration

BLOCK = 512  # passages that are embedded between two writes
MAX_TITLE_SHARE = 4  # a title has at most one of so many tokens of a passage
CORPUS, VECTORS, RECORD, PRESET = "corpus.jsonl", "embeddings.npy", "documents.json", "own.toml"
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
PAIR = re.compile(r"Question[ \d]*:[ \t]*(\S.*?)[ \t]*\n+[ \t]*Answer[ \d]*:[ \t]*(\S.*)")
WRITER = ("Write three questions that the passage answers, each with its answer. An answer is a "
          "name, a number or a term of one to five words, copied from the passage. A question "
          "names what it is about, because its reader does not see the passage.\n\n"
          "Passage: {passage}")
EXAMPLE = ("Oresund Bridge\nThe Oresund Bridge joins Copenhagen and Malmo. It was opened in July "
           "2000, and trains and cars cross it.",
           "Question: In which year was the Oresund Bridge opened?\nAnswer: 2000\n\n"
           "Question: Which bridge joins Copenhagen and Malmo?\nAnswer: The Oresund Bridge\n\n"
           "Question: What crosses the Oresund Bridge?\nAnswer: trains and cars")
MAX_ANSWER_WORDS = 8


# ---- index: from files to passages ----


@dataclass
class IndexSettings:
    folder: str = setting("", "files to read, with or without the flag", reads="PATH",
                          is_words=True)
    out: str = setting("runs/own", "folder of the index", writes="DIR")
    encoder: str = setting("", "checkpoint of the passage encoder", reads="DIR", needed=True)
    size: int = setting(160, "tokens of a passage, its title included; the encoder's", at_least=16)
    overlap: int = setting(32, "tokens that a passage repeats from the one before it", below="size")
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: cuda where there is one")


def files_of(folder: Path, out: Path) -> Iterator[Path]:
    """The files of a folder in order, without hidden ones and without those of the index."""
    for place, folders, names in os.walk(folder):
        hidden = {name for name in folders if name.startswith(".")}
        folders[:] = sorted(name for name in folders
                            if name not in hidden and (Path(place) / name).resolve() != out)
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def token_counter(encoder: Encoder) -> Callable[[str], int]:
    """Tokens of a text for the encoder, those that it puts around a text left out."""
    tokenizer = RawTokenizer.from_str(encoder.tokenizer.to_str())
    tokenizer.no_truncation()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def pieces_of(paragraph: str, size: int, count: Callable[[str], int]) -> Iterator[str]:
    """A paragraph in parts of at most `size` tokens: whole, else its sentences, else its words."""
    if count(paragraph) <= size:
        yield paragraph
        return
    parts = [part for part in SENTENCE.split(paragraph) if part.strip()]
    if len(parts) > 1:
        for part in parts:
            yield from pieces_of(part, size, count)
        return
    words, piece = paragraph.split(), ""
    for word in words:
        while count(word) > size:  # no blanks: a long number, a text in Chinese
            keep = max(1, len(word) * size // (2 * count(word)))
            word, rest = word[:keep], word[keep:]
            if piece:
                yield piece
            yield word
            piece, word = "", rest
        if piece and count(f"{piece} {word}") > size:
            yield piece
            piece = ""
        piece = f"{piece} {word}".strip()
    if piece:
        yield piece


def passages_of(section: Section, size: int, overlap: int,
                count: Callable[[str], int]) -> Iterator[tuple[str, str]]:
    """(title, text) of passages of at most `size` tokens, at the borders of paragraphs.

    A passage begins with the last parts of the one before it, as many as `overlap` tokens hold.
    """
    title = " ".join(section.title.split())
    while count(title) > size // MAX_TITLE_SHARE and " " in title:
        title = title.rpartition(" ")[0]
    while count(title) > size // MAX_TITLE_SHARE:
        title = title[: len(title) // 2]
    room = size - count(f'"{title}"')
    held: list[tuple[str, int]] = []
    num_new = 0
    for paragraph in section.paragraphs:
        for piece in pieces_of(paragraph, room, count):
            length = count(piece)
            if num_new and sum(n for _, n in held) + length > room:
                yield title, "\n".join(text for text, _ in held)
                while held and (sum(n for _, n in held) > overlap
                                or sum(n for _, n in held) + length > room):
                    del held[0]
                num_new = 0
            held.append((piece, length))
            num_new += 1
    if num_new:
        yield title, "\n".join(text for text, _ in held)


def read_folder(settings: IndexSettings, encoder: Encoder) -> tuple[list[dict], dict[str, Any]]:
    """(rows of the corpus, what was read and skipped)."""
    folder, count = Path(settings.folder), token_counter(encoder)
    out = Path(settings.out).resolve()
    around = encoder.tokenizer.num_special_tokens_to_add(False) + count(encoder.prefixes["passage"])
    if settings.size + around > encoder.max_tokens:
        raise ValueError(f"--size {settings.size}: got more than the {encoder.max_tokens - around} "
                         f"tokens that {settings.encoder} reads of a passage; lower it")
    rows: list[dict[str, str]] = []
    read, skipped = {}, {}
    for path in tqdm([*files_of(folder, out)], desc="read", unit=" files", delay=2):
        name = path.relative_to(folder).as_posix()
        try:
            sections = read_document(path)
        except (ValueError, OSError, RecursionError) as error:
            skipped[name] = str(error)
            continue
        texts = [passage for section in sections
                 for passage in passages_of(section, settings.size, settings.overlap, count)]
        rows += [{"id": f"{name}#{number}", "contents": join_contents(f'"{title}"', text)}
                 for number, (title, text) in enumerate(texts)]
        read[name] = {"sha256": hash_of(path, False), "passages": len(texts)}
    if not rows:
        raise ValueError(f"{folder}: got {len(skipped)} files, none of which can be read "
                         f"({dict(Counter(skipped.values()).most_common(3))}), expected text, "
                         "Markdown, HTML, PDF or JSON lines")
    return rows, {"folder": str(folder.resolve()), "size": settings.size,
                  "overlap": settings.overlap, "read": read, "skipped": skipped}


# ---- index: from passages to vectors ----


def key_of(contents: str) -> bytes:
    return hashlib.sha256(contents.encode()).digest()


def known_vectors(out: Path, about: dict[str, Any]) -> dict[bytes, np.ndarray]:
    """Vectors that OUT has of this encoder, finished or not, by the hash of their passages."""
    known: dict[bytes, np.ndarray] = {}
    facts = read_json(out / "index.json", {})
    is_whole = facts.get("done") == facts.get("rows") and (out / VECTORS).is_file()
    if is_whole and all(facts.get(key) == value for key, value in about.items()):
        lines, vectors = Corpus(out / CORPUS, out), read_vectors(out / VECTORS)
        if lines.sha256 == facts["corpus_sha256"]:
            known = {key_of(lines.read(row)[1]): vectors[row] for row in range(len(lines))}
    for path in sorted(out.glob(f".{signature(about)}.*.npz")):
        with np.load(path) as block:
            known |= {key.tobytes(): vector
                      for key, vector in zip(block["keys"], block["vectors"], strict=True)}
    return known


def signature(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def keep_block(out: Path, about: dict[str, Any], name: str, found: dict[bytes, np.ndarray]) -> None:
    """Write vectors where an interrupted command finds them again."""
    keys = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -1)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, keys=keys, vectors=np.stack([*found.values()]))

    write_aside(out / f".{signature(about)}.{name}.npz", write)


def embed_new(out: Path, about: dict[str, Any], encoder: Encoder,
              contents: Sequence[str]) -> tuple[np.ndarray, int]:
    """(vectors [N, D] of passages, how many of them were not known)."""
    known = known_vectors(out, about)
    new = [*dict.fromkeys(text for text in contents if key_of(text) not in known)]
    with tqdm(total=len(new), desc="embed", unit=" passages", delay=2) as bar:
        for start in range(0, len(new), BLOCK):
            part = new[start : start + BLOCK]
            vectors = encoder.embed(part, kind="passage", progress=bar.update)
            found = dict(zip(map(key_of, part), vectors.half().cpu().numpy(), strict=True))
            keep_block(out, about, f"new-{time.time_ns()}", found)
            known |= found
    return np.stack([known[key_of(text)] for text in contents]), len(new)


def write_index(settings: IndexSettings) -> None:
    """Write OUT; a passage that it has already is not embedded again."""
    started, out = time.perf_counter(), Path(settings.out)
    encoder = load_encoder(settings.encoder, device=pick_device(settings.device))
    say(f"encoder {settings.encoder}: {encoder}")
    rows, record = read_folder(settings, encoder)
    out.mkdir(parents=True, exist_ok=True)
    about = {"weights": weights_hash(encoder), "dtype": "float16", "dim": encoder.width,
             "max_tokens": encoder.max_tokens, "prefixes": encoder.prefixes}
    contents = [row["contents"] for row in rows]
    vectors, num_new = embed_new(out, about, encoder, contents)
    before = read_json(out / RECORD, {}).get("read", {})
    # All vectors once more, because from here to the new index.json the old ones belong to nothing.
    keep_block(out, about, "all", dict(zip(map(key_of, contents), vectors, strict=True)))
    for name in ("index.json", "embeddings.npy", "index.faiss", "index.ivfdata", "scales.npy"):
        (out / name).unlink(missing_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_aside(out / CORPUS, lambda path: path.write_text(text, encoding="utf-8"))
    write_aside(out / VECTORS, partial(save_vectors, vectors))
    lines = Corpus(out / CORPUS, out)
    lines.check()
    facts = {"encoder": settings.encoder, "weights": about["weights"], "kind": "flat",
             "dtype": "float16", "factory": "", **index_facts(lines, encoder)}
    write_facts(out, {**facts, "done": len(lines), "num_cut": 0})
    write_record(out, record)
    write_preset(out, {"corpus": CORPUS, "encoder": settings.encoder, "index": "."})
    for path in out.glob(".*.npz"):
        path.unlink()
    num_changed = sum(before.get(name) != about for name, about in record["read"].items())
    say_skipped(record["skipped"])
    print(f"{out}: {len(rows)} passages of {len(record['read'])} files ({num_changed} of them new "
          f"or changed), {num_new} embedded, {time.perf_counter() - started:.0f} s; none is longer "
          f"than the {encoder.max_tokens} tokens that the encoder reads")


def save_vectors(vectors: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, vectors)


def write_record(out: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=1) + "\n"
    write_aside(out / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def write_preset(out: Path, values: dict[str, str]) -> None:
    """A preset that names the files of OUT; paths of presets begin at the project."""
    lines = ["# Written by documents.py."]
    for name, value in values.items():
        path = (out if name != "encoder" else Path()) / value
        text = str(path.resolve()) if path.exists() else value  # else an id of the hub
        lines.append(f"{name} = {json.dumps(text)}")
    write_aside(out / PRESET, lambda path: path.write_text("\n".join(lines) + "\n"))


def say_skipped(skipped: dict[str, str]) -> None:
    for reason, count in Counter(skipped.values()).most_common():
        first = next(name for name, other in skipped.items() if other == reason)
        say(f"skipped {count}: {reason} ({first}{', ...' if count > 1 else ''})")


# ---- questions ----


@dataclass
class QuestionSettings:
    index: str = setting("runs/own", "what `index` has written, with or without the flag",
                         reads="PATH", is_words=True)
    model: str = setting("", "checkpoint that writes the pairs: an instructed one", reads="DIR",
                         needed=True)
    num: int = setting(200, "passages that pairs are written for", at_least=1)
    top_k: int = setting(3, "a question is kept if its passage is among so many", at_least=1)
    test_share: float = setting(0.2, "share of the passages whose questions are set apart",
                                at_most=1)
    min_words: int = setting(25, "words of a passage that pairs are written for")
    temperature: float = setting(0.7, "how freely the model writes; 0 is greedy")
    seed: int = setting(0, "which passages, and the sampling noise", at_most=2**53)
    dtype: str = setting("float32", "dtype of the model", choices=("float32", "bfloat16"))
    rollout_rows: int = setting(16, "passages that pairs are written for at once", at_least=1)
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: cuda where there is one")


def messages_for(passage: Passage) -> list[dict[str, str]]:
    """The chat that pairs are written for a passage in, with one example before it."""
    asked = [WRITER.replace("{passage}", text)
             for text in (EXAMPLE[0], f"{passage.name}\n{passage.text}")]
    return [{"role": "user", "content": asked[0]}, {"role": "assistant", "content": EXAMPLE[1]},
            {"role": "user", "content": asked[1]}]


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Each (question, answer) of what a model wrote."""
    return [(question, answer.strip().rstrip(".").strip('"`'))
            for question, answer in PAIR.findall(text)]


def problem_of(question: str, answer: str, passage: Passage) -> str:
    """Why a pair is dropped, by the pair and its passage alone; "" if it is not."""
    words = normalize_answer(answer)
    if not words or len(words.split()) > MAX_ANSWER_WORDS:
        return f"the answer is empty or has more than {MAX_ANSWER_WORDS} words"
    if words in ("yes", "no"):
        return "the answer is yes or no"
    if not hit([passage._replace(title="")], [answer]):
        return "the answer does not stand in the passage"
    if hit([passage._replace(title="", text=question)], [answer]):
        return "the question gives the answer away"
    if re.search(r"\b(this|the) (passage|text|section|chapter)\b", question.lower()):
        return "the question speaks of its passage"
    return ""


def check_pairs(drafts: Sequence[tuple[Passage, str]], retriever: Retriever,
                top_k: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of the pairs that are kept, with what their question finds; how many were dropped."""
    kept, dropped, seen = [], Counter(), set()
    for passage, text in drafts:
        pairs = read_pairs(text)
        dropped["no question and answer were written"] += not pairs
        for number, (question, answer) in enumerate(pairs, 1):
            problem = problem_of(question, answer, passage)
            if not problem and normalize_answer(question) in seen:
                problem = "the question was written before"
            if problem:
                dropped[problem] += 1
                continue
            seen.add(normalize_answer(question))
            kept.append((passage, f"{passage.id}/{number}", question, answer))
    found = retriever.search([question for _, _, question, _ in kept], top_k)
    rows = []
    for (passage, name, question, answer), passages in zip(kept, found, strict=True):
        texts = [other.text for other in passages]
        if passage.text not in texts:  # documents repeat themselves: the title may be another
            dropped[f"the passage is not among the {top_k} that the question finds"] += 1
            continue
        place = texts.index(passage.text)
        context = [{"title": other.name, "text": other.text, "is_supporting": number == place}
                   for number, other in enumerate(passages)]
        rows.append({"id": name, "question": question, "golden_answers": [answer],
                     "context": context})
    return rows, +dropped


def write_drafts(policy: Policy, passages: Sequence[Passage], path: Path,
                 settings: QuestionSettings) -> list[str]:
    """What the model writes for each passage; a file keeps it, and a later command goes on.

    Passages come in an order that neither an interruption nor a larger --num changes.
    """
    about = {"model": settings.model, "seed": settings.seed, "temperature": settings.temperature,
             "min_words": settings.min_words, "writer": WRITER,
             "corpus": read_json(path.parent / "index.json")["corpus_sha256"]}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
    texts = [row["text"] for row in whole[1:]] if whole[:1] == [about] else []
    kept = [about, *({"text": text} for text in texts)]
    write_aside(path, lambda partial: partial.write_text(
        "".join(json.dumps(row) + "\n" for row in kept)))
    rules = RolloutSettings(prompt="row", max_turns=0, max_new_tokens=160, max_context_tokens=2048,
                            temperature=settings.temperature, rollout_rows=settings.rollout_rows)
    with tqdm(total=len(passages), initial=min(len(texts), len(passages)), desc="passages") as bar:
        for start in range(len(texts), len(passages), settings.rollout_rows):
            part = passages[start : start + settings.rollout_rows]
            asked = [Question(passage.id, "", (), "own", prompt=messages_for(passage))
                     for passage in part]
            episodes = generate(policy, None, asked, rules, seed=settings.seed,
                                first_episode=start, protocol=SEARCH_R1)
            new = [policy.tokenizer.decode(episode.segments[-1].ids) for episode in episodes]
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps({"text": text}) + "\n" for text in new))
            texts += new
            bar.update(len(part))
    return texts[: len(passages)]


def write_questions(settings: QuestionSettings) -> None:
    """Write DIR/questions.jsonl, test.jsonl and episodes.jsonl; say what was dropped and why."""
    out = Path(settings.index)
    facts = read_json(out / "index.json")
    device = pick_device(settings.device)
    retriever = Retriever.load(out / CORPUS, facts["encoder"], index=out, device=device)
    lines = retriever.corpus
    passages = [lines.passage(row, 0.0) for row in shuffled(len(lines), settings.seed)]
    long = [p for p in passages if len(p.text.split()) >= settings.min_words]
    if not long:
        raise ValueError(f"--min-words {settings.min_words}: got no passage of {out} with so many, "
                         "expected some; lower it")
    chosen = long[: settings.num]
    policy = load_policy(settings.model, device, "model", getattr(torch, settings.dtype))
    texts = write_drafts(policy, chosen, out / "drafts.jsonl", settings)
    rows, dropped = check_pairs([*zip(chosen, texts, strict=True)], retriever, settings.top_k)
    for reason, count in dropped.most_common():
        print(f"dropped {count}: {reason}")
    if not rows:
        raise ValueError(f"--model: got {settings.model}, none of whose pairs holds "
                         f"(see {out / 'drafts.jsonl'}), expected some; give a larger model")
    shown = [next(c["text"] for c in row["context"] if c["is_supporting"]) for row in rows]
    is_test = [zlib.crc32(text.encode()) % 1000 < 1000 * settings.test_share for text in shown]
    parts = {"questions": [row for row, test in zip(rows, is_test, strict=True) if not test],
             "test": [row for row, test in zip(rows, is_test, strict=True) if test]}
    parts["episodes"] = [demonstration(row, settings.top_k) for row in parts["questions"]]
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        write_aside(out / f"{name}.jsonl", partial(Path.write_text, data=text))
    write_preset(out, {"corpus": CORPUS, "encoder": facts["encoder"], "index": ".",
                       "questions": "questions.jsonl", "episodes": "episodes.jsonl"})
    print(f"{out}: kept {len(rows)} pairs from {len(chosen)} passages: {len(parts['questions'])} "
          f"to learn from, {len(parts['test'])} to test with")


# ---- the program ----


def main(argv: list[str]) -> None:
    command = read_command(argv, "documents.py", __doc__, ("index", "questions"))
    cls, about = {"index": (IndexSettings, "Passages of a folder's files, and their index."),
                  "questions": (QuestionSettings, "Questions and answers from an index.")}[command]
    settings = cli.load(cls, argv[1:], prog=f"documents.py {command}", description=about,
                        shared={field.name for field in fields(cls)})
    with cli.reporting("documents.py"):
        if command == "index" and not Path(settings.folder or "-").is_dir():
            raise FileNotFoundError(f"--folder: got {settings.folder!r}, expected a folder of "
                                    "documents")
        if command == "questions" and not (Path(settings.index) / RECORD).is_file():
            raise FileNotFoundError(f"--index: got {settings.index!r}, expected a folder that "
                                    "`documents.py index` has written")
        check_paths(settings)
        (write_index if command == "index" else write_questions)(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
