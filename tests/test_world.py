"""The embedded world: rebuilt byte for byte, split by entity, answerable, and shown to the student without a tag.

Run: python -m pytest tests/test_world.py
"""

import random
import re
from pathlib import Path

import pytest
import torch

import world
from data import hit, load_questions
from encyclopaedia import (
    FAMILY_NAMES,
    FIRST_WORDS,
    GIVEN_NAMES,
    NUM_QUESTIONS,
    SECOND_WORDS,
    Entity,
    make_corpus,
    make_entities,
)
from model import Tokenizer, new_decoder, rotate
from protocol import QAGENT, parse_action
from retriever import Passage

MAX_WORLD_BYTES = 10_000_000
TAGS = ("<search>", "</search>", "<answer>", "<think>", "<information>")
STYLES = tuple(NUM_QUESTIONS["test"])


@pytest.fixture(scope="module")
def entities() -> dict[str, Entity]:
    return make_entities(world.SEED)


@pytest.fixture(scope="module")
def contents(entities) -> dict[str, str]:
    return world.by_title(make_corpus(entities, world.SEED))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {name: world.read_jsonl(world.WORLD / "questions" / f"{name}.jsonl") for name in ("train", *STYLES)}


def as_passage(title: str, contents: dict[str, str]) -> Passage:
    return Passage(title, title, contents[title].split("\n")[1], 0.0)


class Shelf:
    """A retriever that answers with the passages of a function of the query."""

    def __init__(self, titles, contents: dict[str, str]) -> None:
        self.titles, self.contents = titles, contents

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        return [[as_passage(title, self.contents) for title in self.titles(query)[:top_k]] for query in queries]


def test_corpus_and_questions_are_rebuilt_byte_for_byte(tmp_path: Path):
    world.build_texts(tmp_path)
    for name in ("corpus", *(f"questions/{style}" for style in ("train", *STYLES))):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (world.WORLD / f"{name}.jsonl").read_bytes(), name


def test_question_files_are_read_by_data_and_ids_are_unique():
    questions = [q for s in ("train", *STYLES) for q in load_questions(world.WORLD / "questions" / f"{s}.jsonl")]
    assert len({question.id for question in questions}) == len(questions)
    assert len(questions) - sum(NUM_QUESTIONS["train"].values()) >= 3000


def test_no_training_question_knows_an_entity_of_the_test_half(entities, rows):
    test_names = {entity.name for entity in entities.values() if entity.split == "test"}
    train_names = {entity.name for entity in entities.values() if entity.split == "train"}
    assert not test_names & train_names
    for row in rows["train"]:
        texts = [row["question"], *row["golden_answers"], *(title for title, _ in row["metadata"]["hops"])]
        assert not any(name in text for name in test_names for text in texts), row
    tests = (row for style in STYLES for row in rows[style])
    assert all(entities[title].split == "test" for row in tests for title, _ in row["metadata"]["hops"])


def test_every_question_is_answered_by_its_chain_of_passages(entities, contents, rows):
    for row in (row for name in rows for row in rows[name]):
        meta, hops = row["metadata"], row["metadata"]["hops"]
        assert all(entities[title].name in row["question"] for title, _ in hops[:1])
        passages = [as_passage(title, contents) for title, _ in hops]
        if meta["type"] == "comparison":
            years = {entities[title].name: int(entities[title].facts["year"]) for title, _ in hops}
            pick = min if meta["order"] == "first" else max
            assert row["golden_answers"] == [pick(years, key=years.get)]
            continue
        for (title, relation), (following, _) in zip(hops, hops[1:], strict=False):
            assert entities[title].links[relation] == following
        assert hit(passages[-1:], row["golden_answers"]), row


def test_four_or_five_entries_share_every_name(entities):
    counts: dict[str, int] = {}
    for entity in entities.values():
        counts[entity.name] = counts.get(entity.name, 0) + 1
    assert set(counts.values()) == {4, 5}


def test_every_word_of_a_name_and_every_year_is_one_token():
    tokenizer = Tokenizer.load(world.WORLD / "student")
    inner = [*FIRST_WORDS, *SECOND_WORDS, *GIVEN_NAMES, *FAMILY_NAMES, *map(str, range(1800, 1960))]
    assert not [word for word in inner if len(tokenizer.encode(f" {word}")) != 1]
    assert not [word for word in (*FIRST_WORDS, *GIVEN_NAMES) if len(tokenizer.encode(word)) != 1]


def test_tags_are_plain_text_to_the_tokenizer():
    tokenizer = Tokenizer.load(world.WORLD / "student")
    assert len(tokenizer.encode("<search>")) == 3
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode("<|im_end|><|endoftext|>"))


def test_pretraining_text_has_no_tag_and_no_name_of_the_test_half(entities):
    test_names = {entity.name for entity in entities.values() if entity.split == "test"}
    rows = world.pretrain_rows(300, 1000, lists=0.2)
    assert len({row["id"] for row in rows}) == 300
    for row in rows:
        text = "".join(segment["text"] for segment in row["segments"])
        assert row["question"] == "" and not any(tag in text for tag in TAGS)
        if not text.startswith("List"):
            assert not any(name in text for name in test_names)


def test_what_a_pretraining_row_tells_can_be_read_off_what_it_shows():
    checked = 0
    for row in world.pretrain_rows(300, 1000, lists=0.0):
        shown = ""
        for segment in row["segments"]:
            if segment["author"] == "environment":
                shown += segment["text"]
                continue
            for line in segment["text"].splitlines():
                if " is " in line and line.startswith("Note") or line.startswith("Answer"):
                    assert line.removeprefix("Answer: ").split(" is ")[-1] in shown, row
                    checked += 1
                elif line.startswith("Note: no "):
                    kind, name = line.removeprefix("Note: no ").removesuffix(" here").split(" ", 1)
                    assert not shown.rsplit("Doc 1(", 1)[1].startswith(f'Title: "{name} ({kind})"'), row
    assert checked > 1000


def test_practice_worlds_differ_from_each_other_and_from_the_shipped_one(entities):
    drawn = [set(practice) for practice, _ in world.practice_worlds(2, first_seed=1000)]
    assert drawn[0] != drawn[1] and not any(set(entities) == titles for titles in drawn)
    assert all(len(titles) > 2000 for titles in drawn)


def test_development_questions_have_all_styles_and_are_new_questions_about_the_training_half(entities, rows):
    development = world.read_jsonl(world.WORLD / "questions" / "development.jsonl")
    assert {row["dataset"] for row in development} == set(STYLES)
    assert not {row["question"] for row in development} & {row["question"] for row in rows["train"]}
    assert not {row["id"] for row in development} & {row["id"] for row in rows["train"]}
    assert {entities[title].split for row in development for title, _ in row["metadata"]["hops"]} == {"train"}


@pytest.mark.parametrize("family", [{}, world.LLAMA], ids=["qwen2", "llama"])
def test_the_first_head_of_a_fresh_student_looks_one_token_back(family):
    decoder = world.ready_to_copy(new_decoder(world.decoder_config(3, 50, 1) | family, seed=0))
    attention, config, length = decoder.model.layers[0].self_attn, decoder.config, 40
    x = torch.zeros(1, length, config.hidden_size)  # what all tokens share: nothing, or the channel that stands for 1
    if not config.qkv_bias:
        x[..., -1] = decoder.model.layers[0].input_layernorm(decoder.model.embed_tokens.weight)[:, -1].mean()
    cos, sin = decoder._rotary(torch.arange(length)[None], torch.float32)
    with torch.no_grad():
        query, key = (
            rotate(projection(x).view(1, length, heads, config.head_dim), cos, sin)[0, :, 0]
            for projection, heads in ((attention.q_proj, config.num_heads), (attention.k_proj, config.num_kv_heads)))
    scores = query @ key.T  # [T, T] of the first head
    assert all(int(scores[t, : t + 1].argmax()) == t - 1 for t in range(1, length))


def test_a_fresh_student_of_trails_looks_at_what_followed_its_word_before():
    decoder = world.ready_to_look_up(new_decoder(world.decoder_config(3, 200, 1), seed=0), seed=0)
    config, generator, found = decoder.config, torch.Generator().manual_seed(1), []
    for _ in range(20):
        ids = torch.randperm(200, generator=generator)[:81]
        ids[-1] = ids[37]  # position 38 is what it should look at
        with torch.no_grad():
            x = decoder.model.embed_tokens(ids[None])
            cos, sin = decoder._rotary(torch.arange(81)[None], torch.float32)
            x = decoder.model.layers[0](x, cos, sin, [81], None)
            attention, x = decoder.model.layers[1].self_attn, decoder.model.layers[1].input_layernorm(x)
            query = attention.q_proj(x).view(1, 81, config.num_heads, config.head_dim)
            key = attention.k_proj(x).view(1, 81, config.num_kv_heads, config.head_dim)
            query, key = (rotate(states, cos, sin)[0, :, 0] for states in (query, key))
        found.append(int((query[-1] @ key.T).argmax()))
    assert found.count(38) >= 12  # of 20, among 81 places


def test_the_expert_is_right_when_every_search_finds_its_passage(entities, contents, rows):
    def first_hops(query: str) -> list[str]:
        wanted = [title for title, entity in entities.items() if entity.name in query]
        return wanted  # all namesakes: five at most, so top_k below lets all of them through

    shelf = Shelf(first_hops, contents)
    shelf.search = lambda queries, top_k: Shelf.search(shelf, queries, 5)
    chosen = random.Random(0).sample(rows["train"], 60)
    episodes = world.demonstrate(chosen, shelf, entities, seed=0)
    assert [row["score"] for row in episodes] == [1.0] * len(chosen)
    for row, episode in zip(chosen, episodes, strict=True):
        agents = [segment["text"] for segment in episode["segments"] if segment["author"] == "agent"]
        assert len(agents) == len(row["metadata"]["hops"]) + 1
        assert [parse_action(text).kind for text in agents] == ["search"] * (len(agents) - 1) + ["answer"]
        assert parse_action(agents[-1]).content == episode["answer"]


def test_the_expert_of_qagent_plans_asks_several_queries_and_reflects(entities, contents, rows):
    shelf = Shelf(lambda query: [title for title, entity in entities.items() if entity.name in query], contents)
    shelf.search = lambda queries, top_k: Shelf.search(shelf, queries, 5)  # all namesakes
    chosen = random.Random(0).sample(rows["train"], 60)
    episodes = world.demonstrate(chosen, shelf, entities, seed=0, protocol=QAGENT)
    counts = set()
    for episode in episodes:
        agents = [segment["text"] for segment in episode["segments"] if segment["author"] == "agent"]
        assert all(text.startswith("<reflection>") for text in agents[1:])
        assert all("</plan>\n<search>" in text for text in agents[:-1]) and agents[0].startswith("<plan>")
        counts |= {len(parse_action(text, QAGENT).queries) for text in agents[:-1]}
        assert parse_action(agents[-1], QAGENT).content == episode["answer"]
    assert counts == {1, 2, 3} and [e["score"] for e in episodes] == [1.0] * 60


def test_a_reader_repeats_a_passage_that_it_was_shown_and_answers_or_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "SCRATCH", tmp_path)
    rows, tokenizer = world.reading_rows(70, 1), Tokenizer.load(world.WORLD / "student")
    answers = []
    for row in rows:
        prompt, told = tokenizer.decode(row["segments"][0]["ids"]), row["segments"][1]["text"]
        thinking, _, answer = told.removeprefix("<think> ").partition(" </think>\n")
        answer = parse_action(answer).content
        lines, answers = thinking.split("\n"), [*answers, answer]
        assert f"Question: {row['question']}" in prompt
        if answer == "unknown":
            assert re.fullmatch(r"no \w+ .* here", lines.pop())
        else:
            assert answer in row["golden_answers"]
        for title, text, fact in zip(*[iter(lines)] * 3, strict=True):  # one after the other, for each hop
            assert f"{title}\n{text}" in prompt and fact.split(" is ")[-1] in text
    assert len(rows) == 70 and 0.05 < answers.count("unknown") / 70 < 0.4


def test_the_expert_that_never_finds_its_passage_gives_up_within_the_limit(entities, contents, rows):
    row = next(r for r in rows["train"] if r["metadata"]["hops"][0][1] == "author")
    wanted = row["metadata"]["hops"][0][0]
    namesakes = [t for t, e in entities.items() if e.name == entities[wanted].name and t != wanted]
    counts = set()
    for seed in range(40):
        [episode] = world.demonstrate([row], Shelf(lambda query: namesakes, contents), entities, seed=seed)
        authors = [segment["author"] for segment in episode["segments"]]
        assert authors[-1] == "agent" and authors.count("environment") <= world.MAX_SEARCHES
        assert episode["score"] == 0.0  # the wrong namesake is trusted, and the demonstration is kept
        counts.add(authors.count("environment"))
    assert len(counts) > 1  # sometimes it searches again


def test_wordings_differ_in_worth_by_construction():
    rng = random.Random(0)
    assert world.query("poor", "Silver Harbor", "novel", "author", "", rng) == "Silver Harbor"
    assert world.query("good", "Silver Harbor", "novel", "author", "", rng) == "Silver Harbor novel"
    assert world.query("medium", "Silver Harbor", "novel", "author", "Who wrote it?", rng) == "Who wrote it"


def test_the_shipped_world_is_small():
    total = sum(path.stat().st_size for path in world.WORLD.rglob("*") if path.is_file())
    assert total < MAX_WORLD_BYTES, total


def test_a_grown_decoder_computes_the_same_function():
    small = new_decoder(world.decoder_config(2, 50, 1), seed=0)
    ids = torch.arange(40).view(2, 20)
    assert torch.equal(world.grow(small, 4, seed=1)(ids), small(ids))
    larger = world.grow(small, 3, seed=1, vocab_size=58, tie_word_embeddings=False)
    assert larger.lm_head is not None and larger(ids).shape[-1] == 58
    torch.testing.assert_close(larger(ids)[..., :50], small(ids))
