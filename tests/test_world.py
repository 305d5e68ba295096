"""The embedded world: rebuilt byte for byte, split by entity, answerable, and shown without tags.

Run: python -m pytest tests/test_world.py
"""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data import Passage, hit, load_questions
from episode import SEARCH_R1, load_episodes, parse_action
from model import Decoder, Tokenizer, rotate
from qagent import QAGENT
from world import build, demonstrate, practice, pretrain
from world.encyclopaedia import (
    FAMILY_NAMES,
    FIRST_WORDS,
    GIVEN_NAMES,
    MULTI_HOP,
    NUM_QUESTIONS,
    SECOND_WORDS,
    SINGLE_HOP,
    Entity,
    by_title,
    make_corpus,
    make_entities,
)
from world.expert import MAX_SEARCHES, Target, expert_episodes, note, query
from world.files import ROOT, SEED, WORLD, read_jsonl, write_jsonl
from world.pretrain import decoder_config, new_decoder

MAX_WORLD_BYTES = 10_000_000
TAGS = ("<search>", "</search>", "<answer>", "<think>", "<information>")
STYLES = tuple(NUM_QUESTIONS["test"])
FILES = ("train", *STYLES)
GOLD = {
    "id": "g1",
    "question": "who leads the town where Ann was born",
    "golden_answers": ["Bob"],
    "context": [
        {"title": "Ann", "text": "Ann was born in Ume.", "is_supporting": True},
        {"title": "Cat", "text": "A cat.", "is_supporting": False},
        {"title": "Ume", "text": "Ume is led by Bob.", "is_supporting": True},
        {"title": "Dog", "text": "A dog.", "is_supporting": False},
    ],
}


@pytest.fixture(scope="module")
def entities() -> dict[str, Entity]:
    return make_entities(SEED)


@pytest.fixture(scope="module")
def contents(entities: dict[str, Entity]) -> dict[str, str]:
    return by_title(make_corpus(entities, SEED))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: read_jsonl(WORLD / "questions" / f"{name}.jsonl") for name in FILES}


@pytest.fixture(scope="module")
def test_names(entities: dict[str, Entity]) -> set[str]:
    return {entity.name for entity in entities.values() if entity.split == "test"}


def as_passage(title: str, contents: dict[str, str]) -> Passage:
    return Passage(title, title, contents[title].split("\n")[1], 0.0)


class Shelf:
    """A retriever whose passages are those of a function of the query, whatever the top_k."""

    def __init__(self, titles: Callable[[str], list[str]], contents: dict[str, str]) -> None:
        self.titles, self.contents = titles, contents

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        return [[as_passage(title, self.contents) for title in self.titles(q)] for q in queries]


def all_namesakes(entities: dict[str, Entity], contents: dict[str, str]) -> Shelf:
    def titles(words: str) -> list[str]:
        return [title for title, entity in entities.items() if entity.name in words]

    return Shelf(titles, contents)


def agent_texts(episode: dict) -> list[str]:
    return [segment["text"] for segment in episode["segments"] if segment["author"] == "agent"]


# ---- files


def test_corpus_and_questions_are_rebuilt_byte_for_byte(tmp_path: Path):
    build.build_texts(tmp_path)
    for name in ("corpus", *(f"questions/{name}" for name in (*FILES, "development"))):
        rebuilt = (tmp_path / f"{name}.jsonl").read_bytes()
        assert rebuilt == (WORLD / f"{name}.jsonl").read_bytes(), name


def test_question_files_are_read_by_data_and_ids_are_unique():
    questions = []
    for name in FILES:
        questions += load_questions(WORLD / "questions" / f"{name}.jsonl")
    assert len({question.id for question in questions}) == len(questions)
    assert len(questions) - sum(NUM_QUESTIONS["train"].values()) >= 3000


def test_no_training_question_knows_an_entity_of_the_test_half(entities, rows, test_names):
    assert not test_names & {entity.name for entity in entities.values() if entity.split == "train"}
    for row in rows["train"]:
        titles = [title for title, _ in row["hops"]]
        texts = [row["question"], *row["golden_answers"], *titles]
        assert not any(name in text for name in test_names for text in texts), row
    for style in STYLES:
        for row in rows[style]:
            assert all(entities[title].split == "test" for title, _ in row["hops"])


def test_every_question_is_answered_by_its_chain_of_passages(entities, contents, rows):
    for row in (row for name in FILES for row in rows[name]):
        hops = row["hops"]
        assert entities[hops[0][0]].name in row["question"]
        if "order" in row:
            years = {entities[title].name: int(entities[title].facts["year"]) for title, _ in hops}
            pick = min if row["order"] == "first" else max
            assert row["golden_answers"] == [pick(years, key=years.__getitem__)]
            continue
        for (title, relation), (following, _) in zip(hops, hops[1:], strict=False):
            assert entities[title].links[relation] == following
        assert hit([as_passage(hops[-1][0], contents)], row["golden_answers"]), row


def test_four_or_five_entries_share_every_name(entities):
    counts: dict[str, int] = {}
    for entity in entities.values():
        counts[entity.name] = counts.get(entity.name, 0) + 1
    assert set(counts.values()) == {4, 5}


def test_every_word_of_a_name_and_every_year_is_one_token():
    tokenizer = Tokenizer.load(WORLD / "student")
    years = [str(year) for year in range(1800, 1960)]
    for word in (*FIRST_WORDS, *SECOND_WORDS, *GIVEN_NAMES, *FAMILY_NAMES, *years):
        assert len(tokenizer.encode(f" {word}")) == 1, word
    for word in (*FIRST_WORDS, *GIVEN_NAMES):
        assert len(tokenizer.encode(word)) == 1, word


def test_tags_are_plain_text_to_the_tokenizer():
    tokenizer = Tokenizer.load(WORLD / "student")
    assert len(tokenizer.encode("<search>")) == 3
    ids = tokenizer.encode("<|im_end|><|endoftext|>")
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_development_questions_are_new_have_all_styles_and_ask_about_the_training_half(
    entities, rows
):
    development = read_jsonl(WORLD / "questions" / "development.jsonl")
    assert {row["dataset"] for row in development} == set(STYLES)
    for key in ("question", "id"):
        assert not {row[key] for row in development} & {row[key] for row in rows["train"]}
    titles = {title for row in development for title, _ in row["hops"]}
    assert {entities[title].split for title in titles} == {"train"}


def test_the_shipped_world_is_small():
    total = sum(path.stat().st_size for path in WORLD.rglob("*") if path.is_file())
    assert total < MAX_WORLD_BYTES, total


def test_a_text_that_is_missing_is_named_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: got no such file.*build-data"):
        read_jsonl(tmp_path / "none.jsonl")


# ---- practice texts


def test_pretraining_text_has_no_tag_and_no_name_of_the_test_half(test_names):
    pretraining = practice.pretrain_rows(300, 1000, lists=0.2)
    assert len({row["id"] for row in pretraining}) == 300
    for row in pretraining:
        text = "".join(segment["text"] for segment in row["segments"])
        assert row["question"] == "" and not any(tag in text for tag in TAGS)
        if not text.startswith("List"):
            assert not any(name in text for name in test_names)


def test_what_a_pretraining_row_tells_can_be_read_off_what_it_shows():
    num_checked = 0
    for row in practice.pretrain_rows(300, 1000, lists=0.0):
        shown = ""
        for segment in row["segments"]:
            if segment["author"] == "environment":
                shown += segment["text"]
                continue
            for line in segment["text"].splitlines():
                if " is " in line and line.startswith("Note") or line.startswith("Answer"):
                    assert line.removeprefix("Answer: ").split(" is ")[-1] in shown, row
                    num_checked += 1
                elif line.startswith("Note: no "):
                    missing = line.removeprefix("Note: no ").removesuffix(" here")
                    kind, name = missing.split(" ", 1)
                    last = shown.rsplit("Doc 1(", 1)[1]
                    assert not last.startswith(f'Title: "{name} ({kind})"'), row
    assert num_checked > 1000


def test_practice_worlds_differ_from_each_other_and_from_the_shipped_one(entities):
    first, second = (set(world.entities) for world in practice.practice_worlds(2, first_seed=1000))
    assert first != second and set(entities) not in (first, second)
    assert min(len(first), len(second)) > 2000


def test_a_reader_repeats_a_passage_and_answers_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "SCRATCH", tmp_path)
    reading, tokenizer = practice.reading_rows(70, 1), Tokenizer.load(WORLD / "student")
    answers = []
    for row in reading:
        prompt, told = tokenizer.decode(row["segments"][0]["ids"]), row["segments"][1]["text"]
        thinking, _, action = told.removeprefix("<think> ").partition(" </think>\n")
        answer = parse_action(action).content
        answers.append(answer)
        lines = thinking.split("\n")
        assert f"Question: {row['question']}" in prompt
        if answer == "unknown":
            assert re.fullmatch(r"no \w+ .* here", lines.pop())
        else:
            assert answer in row["golden_answers"]
        for title, text, fact in zip(*[iter(lines)] * 3, strict=True):  # three lines for each hop
            assert f"{title}\n{text}" in prompt and fact.split(" is ")[-1] in text
    assert len(reading) == 70 and 0.05 < answers.count("unknown") / 70 < 0.4


# ---- the scripted expert


def test_the_expert_is_right_when_every_search_brings_its_passage(entities, contents, rows):
    chosen = random.Random(0).sample(rows["train"], 60)
    episodes = expert_episodes(chosen, all_namesakes(entities, contents), entities, seed=0)
    assert [episode["score"] for episode in episodes] == [1.0] * len(chosen)
    for row, episode in zip(chosen, episodes, strict=True):
        texts = agent_texts(episode)
        assert len(texts) == len(row["hops"]) + 1
        kinds = [parse_action(text).kind for text in texts]
        assert kinds == ["search"] * (len(texts) - 1) + ["answer"]
        assert parse_action(texts[-1]).content == episode["answer"]


def test_the_expert_of_qagent_plans_asks_several_queries_and_reflects(entities, contents, rows):
    chosen = random.Random(0).sample(rows["train"], 60)
    shelf = all_namesakes(entities, contents)
    episodes = expert_episodes(chosen, shelf, entities, seed=0, protocol=QAGENT)
    counts = set()
    for episode in episodes:
        *searches, last = agent_texts(episode)
        assert searches[0].startswith("<plan>")
        assert all(text.startswith("<reflection>") for text in (*searches[1:], last))
        assert all("</plan>\n<search>" in text for text in searches)
        counts |= {len(parse_action(text, QAGENT).queries) for text in searches}
        assert parse_action(last, QAGENT).content == episode["answer"]
    assert counts == {1, 2, 3}
    assert [episode["score"] for episode in episodes] == [1.0] * len(chosen)


def test_the_expert_that_never_sees_its_passage_gives_up_within_the_limit(entities, contents, rows):
    row = next(row for row in rows["train"] if row["hops"][0][1] == "author")
    wanted = row["hops"][0][0]
    name = entities[wanted].name
    namesakes = [title for title in entities if entities[title].name == name and title != wanted]
    shelf = Shelf(lambda words: namesakes[:1], contents)
    counts = set()
    for seed in range(40):
        [episode] = expert_episodes([row], shelf, entities, seed=seed)
        authors = [segment["author"] for segment in episode["segments"]]
        assert authors[-1] == "agent" and authors.count("environment") <= MAX_SEARCHES
        # The wrong namesake is trusted, and the demonstration is kept.
        assert episode["score"] == 0.0
        counts.add(authors.count("environment"))
    assert len(counts) > 1  # sometimes it searches again


def test_an_expert_who_knows_a_kind_by_heart_mostly_notes_its_facts_without_a_search(
    entities, contents, rows
):
    row = next(row for row in rows["train"]
               if row["dataset"] == "hotpotqa" and "order" not in row)
    (first, _), (second, relation) = row["hops"]
    shelf, kind = all_namesakes(entities, contents), entities[second].kind
    assert entities[first].kind != kind
    recalled = 0
    for seed in range(40):
        [episode] = expert_episodes(
            [row], shelf, entities, seed=seed, protocol=QAGENT, known=[kind])
        texts = agent_texts(episode)
        fact = f"{relation} of {kind} {entities[second].name} is {entities[second].facts[relation]}"
        assert fact in texts[-1] and episode["score"] == 1.0
        shown = "".join(s["text"] for s in episode["segments"] if s["author"] == "environment")
        assert first in shown
        recalled += second not in shown
    assert 0.6 < recalled / 40 < 0.95


def test_an_expert_who_knows_all_kinds_answers_many_questions_at_once(entities, contents, rows):
    shelf, chosen = all_namesakes(entities, contents), rows["train"][:60]
    kinds = {entity.kind for entity in entities.values()}
    episodes = expert_episodes(chosen, shelf, entities, seed=0, protocol=QAGENT, known=kinds)
    assert [episode["score"] for episode in episodes] == [1.0] * 60
    at_once = [episode for episode in episodes if len(episode["segments"]) == 1]
    assert 0.5 < len(at_once) / 60 < 0.95
    assert all(agent_texts(episode)[0].startswith("<reflection> ") for episode in at_once)


def test_memory_rows_hold_every_fact_of_the_known_kinds_and_no_other(entities):
    told = []
    for row in practice.memory_rows(entities, 150):
        assert row["question"] == "" and not row["golden_answers"]
        for shown, value in zip(*[iter(row["segments"])] * 2, strict=True):
            assert (shown["author"], value["author"]) == ("environment", "agent")
            told.append((shown["text"] + value["text"]).strip())
    facts = {
        f"<reflection> {note(relation, e.kind, e.name, e.facts[relation])} </reflection>"
        for e in entities.values() if e.kind in practice.KNOWN for relation in e.facts
    }
    assert set(told) == facts and max(Counter(told).values()) <= 2


def test_texts_of_the_recalling_agent_never_look_for_known_kinds_in_other_worlds(
    entities, contents, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "READERS", tmp_path)
    monkeypatch.setattr(build, "NUM_REMINDING_ROWS", 3)
    monkeypatch.setattr(build, "NUM_RECALLING_DEMONSTRATIONS", 70)
    sought = [{"id": kind, "segments": [{"author": "agent", "text": f"<plan> need year of {kind} A"
                                         " B </plan>"}]} for kind in ("novel", "town")]
    write_jsonl(tmp_path / "qagent.jsonl", sought)
    texts = build.recalling_texts()
    assert len(texts) == 3 + 70 + 1 and texts[-1]["id"] == "novel"
    asked = texts[3:-1]
    assert {row["source"] for row in asked} == set(SINGLE_HOP + MULTI_HOP)
    hidden = {entity.name for entity in entities.values() if entity.split == "test"}
    told = "".join(segment["text"] for row in asked for segment in row["segments"])
    questions = "".join(row["question"] for row in asked)
    assert not [name for name in hidden if name in questions]
    assert "<plan>" in told
    assert any(len(row["segments"]) == 1 for row in asked)


def test_the_expert_words_a_query_in_three_ways():
    target, rng = Target("Silver Harbor", "novel", "author"), random.Random(0)
    assert query("poor", target, "", rng) == "Silver Harbor"
    assert query("good", target, "", rng) == "Silver Harbor novel"
    assert query("medium", target, "Who wrote it?", rng) == "Who wrote it"
    assert query("medium", target, "", rng).startswith("who ")


# ---- networks


@pytest.mark.parametrize("family", [{}, pretrain.LLAMA], ids=["qwen2", "llama"])
def test_the_first_head_of_a_fresh_student_looks_one_token_back(family):
    public = {**decoder_config(3, 50, 1), **family}
    decoder = pretrain.ready_to_copy(new_decoder(public, seed=0))
    layer, config, length = decoder.model.layers[0], decoder.config, 40
    # What all tokens share: nothing, or without biases the channel that stands for them.
    x = torch.zeros(1, length, config.hidden_size)
    if not config.qkv_bias:
        x[..., -1] = layer.input_layernorm(decoder.model.embed_tokens.weight)[:, -1].mean()
    scores = first_head_scores(decoder, layer.self_attn, x)
    assert all(int(scores[t, : t + 1].argmax()) == t - 1 for t in range(1, length))


def test_a_fresh_student_of_trails_looks_at_what_followed_its_word_before():
    decoder = pretrain.ready_to_look_up(new_decoder(decoder_config(3, 200, 1), seed=0), seed=0)
    generator, length, places = torch.Generator().manual_seed(1), 81, []
    attention, inputs = decoder.model.layers[1].self_attn, []
    attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    for _ in range(20):
        ids = torch.randperm(200, generator=generator)[:length]
        ids[-1] = ids[37]  # position 38 is what it should look at
        with torch.no_grad():
            decoder.hidden(ids[None])
        scores = first_head_scores(decoder, attention, inputs[-1])
        places.append(int(scores[-1].argmax()))
    assert places.count(38) >= 12  # of 20, among 81 places


@torch.no_grad()
def first_head_scores(
    decoder: Decoder, attention: torch.nn.Module, x: torch.Tensor
) -> torch.Tensor:
    """Attention scores of the first head for inputs x [1, T, D], before the mask: [T, T]."""
    config, length = decoder.config, x.shape[1]
    cos, sin = decoder._rotary(torch.arange(length), torch.float32)
    query = attention.q_proj(x).view(length, config.num_heads, config.head_dim)
    key = attention.k_proj(x).view(length, config.num_kv_heads, config.head_dim)
    return rotate(query, cos, sin)[:, 0] @ rotate(key, cos, sin)[:, 0].T


def test_a_grown_decoder_computes_the_same_function():
    small = new_decoder(decoder_config(2, 50, 1), seed=0)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(pretrain.grow(small, 4, seed=1)(ids), small(ids))
    larger = pretrain.grow(small, 3, seed=1, vocab_size=58, tie_word_embeddings=False)
    assert larger.lm_head is not None and larger(ids).shape[-1] == 58
    torch.testing.assert_close(larger(ids)[..., :50], small(ids))


def test_random_weights_come_without_the_texts_and_the_program():
    """Tests and benchmarks import world.pretrain: that must stay light."""
    modules = "[name for name in sys.modules if name.startswith(('world', 'qagent', 'retriever'))]"
    code = f"import sys, world.pretrain; print({modules})"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "['world', 'world.files', 'world.pretrain']"


# ---- demonstrations by hand


def test_a_demonstration_follows_the_protocol_and_shows_every_supporting_paragraph(
    tokenizer, tmp_path
):
    row = demonstrate.demonstration(GOLD, 2)
    actions = [parse_action(text) for text in agent_texts(row)]
    assert [action.kind for action in actions] == ["search", "search", "answer"]
    assert [action.content for action in actions] == [GOLD["question"], "Ume", "Bob"]
    blocks = [s["text"] for s in row["segments"] if s["author"] == "environment"]
    assert "Ann was born" in blocks[0] and "led by Bob" in blocks[1]
    for block in blocks:
        assert block.count("Doc ") == 2 and block.endswith(SEARCH_R1.observation_end)
    assert demonstrate.demonstration(GOLD, 2) == row  # nothing in it is random
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    [episode] = load_episodes(tmp_path / "d.jsonl", tokenizer, prompt="short")
    authors = [segment.author for segment in episode.segments]
    assert authors == ["prompt", "agent", "environment", "agent", "environment", "agent"]


def test_the_place_of_a_supporting_paragraph_depends_on_the_id():
    places = set()
    for number in range(20):
        row = demonstrate.demonstration({**GOLD, "id": f"g{number}"}, 2)
        block = row["segments"][1]["text"]
        places.add(block.index("Ann was born") < block.index("A cat"))
    assert places == {False, True}


def test_demonstrate_keeps_rows_of_a_split_with_a_supporting_paragraph(tmp_path, capsys):
    paragraph = {"title": "Cat", "text": "A cat.", "is_supporting": False}
    gold = [
        {**GOLD, "split": "train"},
        {**GOLD, "split": "dev", "id": "g2"},
        {**GOLD, "id": "g3"},  # of no split: it is kept
        {**GOLD, "id": "g4", "context": [paragraph]},
    ]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    out = tmp_path / "out.jsonl"
    demonstrate.main(["--gold", str(tmp_path / "gold.jsonl"), "--out", str(out)])
    assert [row["id"] for row in read_jsonl(out)] == ["g1", "g3"]
    assert capsys.readouterr().out == f"{out}: 2 episodes\n"


@pytest.mark.parametrize(
    ("line", "problem"), [('{"id": "g1"}', "KeyError"), ("{", "JSONDecodeError"), ("[]", "Attrib")]
)
def test_demonstrate_names_the_line_of_a_bad_row(tmp_path, line, problem):
    (tmp_path / "gold.jsonl").write_text(f"{json.dumps(GOLD)}\n{line}\n")
    command = ["--gold", str(tmp_path / "gold.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit, match=f"gold.jsonl:2: got {problem}.*expected id, question"):
        demonstrate.main(command)
    assert not (tmp_path / "out.jsonl").exists()


def test_demonstrate_refuses_blocks_without_a_paragraph(capsys):
    with pytest.raises(SystemExit):
        demonstrate.main(["--gold", "absent.jsonl", "--out", "absent.jsonl", "--passages", "0"])
    assert "--passages: got 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["world.build", "world.demonstrate"])
def test_the_programs_tell_how_they_are_called(program):
    output = subprocess.run(
        [sys.executable, "-m", program, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.startswith(f"usage: python -m {program}")
