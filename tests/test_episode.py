"""The record of an episode: protocol, masks and batches, files.

Run: python -m pytest tests/test_episode.py
"""

import json
import random
from dataclasses import replace

import pytest

from batch import collate, pack
from data import Passage, Question
from episode import (
    SEARCH_R1,
    Episode,
    Segment,
    begin_episode,
    episode_text,
    load_episodes,
    observation_ids,
    parse_action,
    save_episodes,
    unique_passages,
)
from tests.support.mini import read_rows, write_rows
from tests.support.models import EOS
from tests.support.scripted import SEARCH_THEN_ANSWER, ask, play

# ---- the protocol ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><search> two words </search>", ("search", "two words")),
        ("<answer>\nx\ny </answer>", ("answer", "x\ny")),
        ("<search>a</search><answer>b</answer>", ("search", "a")),
        ("</search>", ("invalid", "")),
        ("<search>a</answer>", ("invalid", "")),
        ("<answer>  </answer>", ("invalid", "")),
        ("", ("invalid", "")),
    ],
)
def test_parse_reads_the_first_complete_action(text, expected):
    assert parse_action(text)[:2] == expected


def test_a_query_of_search_r1_is_one_query_however_many_lines_it_has():
    assert parse_action("<search>a\nb</search>").queries == ("a\nb",)


def test_no_parser_can_take_the_notice_for_an_action():
    assert "<" not in SEARCH_R1.notice and ">" not in SEARCH_R1.notice
    assert parse_action(SEARCH_R1.notice).kind == "invalid"


@pytest.mark.parametrize("limit", [20, 60, 61, 400])
def test_a_long_observation_is_cut_inside_the_block(tokenizer, limit):
    passages = [Passage("0", "T", "word " * 40, 1.0)]
    ids = observation_ids(tokenizer, passages, limit)
    text = tokenizer.decode(ids)
    assert len(ids) <= limit and text.endswith(SEARCH_R1.observation_end)
    assert limit < 400 or text == SEARCH_R1.observation(passages)


def test_passages_of_several_queries_are_shown_once_in_the_order_of_queries_and_ranks():
    a, b, c = (Passage(name, name, name, 1.0) for name in "abc")
    assert [p.id for p in unique_passages([[a, b], [b, c], [a]])] == ["a", "b", "c"]
    assert unique_passages([[], []]) == []


# ---- before the first turn ----


def test_an_episode_begins_with_its_prompt_and_what_the_agent_is_shown(tokenizer):
    plain = begin_episode(tokenizer, ask("who"), "short")
    assert [s.author for s in plain.segments] == ["prompt"] and plain.status == ""
    shown = tokenizer.encode("read this")
    begun = begin_episode(tokenizer, ask("who"), "short", shown=shown, opens="<answer>")
    assert [s.author for s in begun.segments] == ["prompt", "environment"]
    assert tokenizer.decode(begun.segments[1].ids) == "read this<answer>"
    assert begun.segments[1].opens == "<answer>" and not any(begun.response_mask)


def test_the_instruction_of_a_question_is_said_after_it_and_to_the_agent_alone(tokenizer):
    question = replace(ask("who"), instruction="In one word.")
    text = tokenizer.decode(begin_episode(tokenizer, question, "short").ids)
    assert "who? In one word." in text or "who In one word." in text
    assert question.question == "who"


def test_an_answer_is_compared_as_its_question_says():
    always = replace(ask("q"), match=lambda answer, golds: 0.5 * len(golds))
    assert Episode(always, [], "answered", "anything").score == 0.5
    assert Episode(ask("q"), [], "answered", "The Gold!").score == 1.0  # Eq. 3: exact match
    assert Episode(ask("q"), [], "max_turns", None).score == 0.0


# ---- masks ----


def test_masks_and_ids_stay_aligned_over_random_episodes(tokenizer):
    draw = random.Random(0)
    episodes = []
    for _ in range(50):
        authors = draw.choices(["prompt", "agent", "environment"], k=draw.randint(1, 6))
        segments = [
            Segment(author, [draw.randrange(259) for _ in range(draw.randint(0, 5))])
            for author in authors
        ]
        # A sampled padding token counts like any other.
        segments.append(Segment("agent", [tokenizer.pad_id]))
        episodes.append(Episode(ask("q"), segments))
    batch = collate(episodes, pad_id=tokenizer.pad_id)
    for row, episode in enumerate(episodes):
        agent = [i for s in episode.segments if s.author == "agent" for i in s.ids]
        assert batch.ids[row][batch.response_mask[row]].tolist() == agent
        assert batch.ids[row][: len(episode.ids)].tolist() == episode.ids
        assert not batch.response_mask[row][len(episode.ids) :].any()


def test_the_end_of_turn_becomes_a_target_only_after_the_agent():
    ends = Episode(ask("q"), [Segment("prompt", [1, 2]), Segment("agent", [3])])
    cut = replace(
        ends, segments=[*ends.segments[:1], Segment("agent", [3]), Segment("environment", [4])]
    )
    done = replace(ends, segments=[Segment("prompt", [1]), Segment("agent", [3, EOS])])
    batch = collate([ends, cut, done], pad_id=0, end_of_turn=EOS)
    assert batch.ids.tolist() == [[1, 2, 3, EOS], [1, 2, 3, 4], [1, 3, EOS, 0]]
    assert batch.response_mask.tolist() == [
        [False, False, True, True],
        [False, False, True, False],
        [False, True, True, False],
    ]


def test_nothing_is_learnt_from_an_episode_whose_search_failed():
    failed = Episode(ask("q"), [Segment("prompt", [1]), Segment("agent", [3])], "search_error")
    batch = collate([failed], pad_id=0, end_of_turn=EOS)
    assert not batch.response_mask.any() and batch.lengths() == [1]


def test_a_pack_holds_rows_up_to_their_last_response_token_and_one_dummy_where_there_are_none():
    long = Episode(
        ask("q"),
        [Segment("prompt", [1]), Segment("agent", [2]), Segment("environment", [9] * 5)],
    )
    short = Episode(ask("q"), [Segment("prompt", [4]), Segment("agent", [5, 6])])
    batch = collate([long, short], pad_id=0)
    packed = pack(batch, [1, 0], batch.lengths())
    assert packed.ids.tolist() == [[4, 5, 6, 1, 2]] and packed.documents == [3, 2]
    assert packed.response_mask.tolist() == [[False, True, True, False, True]]
    nothing = pack(batch, [], batch.lengths())
    assert nothing.ids.shape == (1, 1) and not nothing.response_mask.any()


# ---- files ----


def test_saved_episodes_load_with_the_same_ids_and_masks(tokenizer, tmp_path):
    episode = play(tokenizer, {"ask-a": SEARCH_THEN_ANSWER})["ask-a"]
    save_episodes(tmp_path / "e.jsonl", [episode], tokenizer)
    [loaded] = load_episodes(tmp_path / "e.jsonl", tokenizer, prompt="short")
    assert loaded.ids == episode.ids and loaded.response_mask == episode.response_mask
    assert (loaded.answer, loaded.status, loaded.score) == (episode.answer, episode.status, 1.0)


def test_metadata_and_instructions_survive_the_file_and_other_keys_become_metadata(
    tokenizer, tmp_path
):
    question = replace(ask("q"), metadata={"level": 3}, instruction="Be brief.")
    path = tmp_path / "e.jsonl"
    segments = [Segment("prompt", [1]), Segment("agent", [2])]
    save_episodes(path, [Episode(question, segments), Episode(ask("q"), segments)], tokenizer)
    told, plain = load_episodes(path, tokenizer, prompt="short")
    assert (told.question.metadata, told.question.instruction) == ({"level": 3}, "Be brief.")
    assert (plain.question.metadata, plain.question.instruction) == ({}, "")
    rows = read_rows(path)
    assert not {"metadata", "instruction"} & rows[1].keys()  # written where there is something
    write_rows(path, [{**rows[0], "answer_kind": "integer"}])
    [loaded] = load_episodes(path, tokenizer, prompt="short")
    assert loaded.question.metadata == {"level": 3, "answer_kind": "integer"}


HAND_WRITTEN = {
    "id": 1,
    "question": "who",
    "golden_answers": ["x"],
    "segments": [{"author": "agent", "text": "<answer> x </answer>"}],
}


def test_hand_written_episodes_get_a_prompt_and_plain_text_gets_none(tokenizer, tmp_path):
    text = {"id": 2, "question": "", "golden_answers": [], "segments": HAND_WRITTEN["segments"]}
    write_rows(tmp_path / "e.jsonl", [HAND_WRITTEN, text])
    asked, plain = load_episodes(tmp_path / "e.jsonl", tokenizer, prompt="short")
    assert [s.author for s in asked.segments] == ["prompt", "agent"]
    assert "who" in tokenizer.decode(asked.ids)
    assert [s.author for s in plain.segments] == ["agent"]


def test_a_question_may_be_prepared_before_its_prompt_is_built(tokenizer, tmp_path):
    write_rows(tmp_path / "e.jsonl", [HAND_WRITTEN])
    [episode] = load_episodes(
        tmp_path / "e.jsonl",
        tokenizer,
        prompt="short",
        prepare=lambda question: replace(question, instruction=f"[{question.golden_answers[0]}]"),
    )
    assert "[x]" in tokenizer.decode(episode.segments[0].ids)
    assert episode.question.instruction == "[x]"


BAD_AUTHOR = {**HAND_WRITTEN, "segments": [{"author": "me", "ids": [1]}]}
BAD_ID = {**HAND_WRITTEN, "segments": [{"author": "agent", "ids": [99999]}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "e.jsonl:1: got no valid JSON"),
        ('{"id": 1}', "e.jsonl:1: got KeyError"),
        (json.dumps(BAD_AUTHOR), "e.jsonl:1: .*expected prompt, agent"),
        (json.dumps(BAD_ID), "e.jsonl:1: .*another tokenizer"),
        (json.dumps({**HAND_WRITTEN, "question": 3}), "e.jsonl:1: got TypeError"),
        (json.dumps({**HAND_WRITTEN, "instruction": 3}), "e.jsonl:1: got TypeError"),
        (json.dumps({**HAND_WRITTEN, "metadata": 3}), "e.jsonl:1: got TypeError"),
        ("", "got no episodes"),
    ],
)
def test_bad_episode_files_are_refused_with_file_and_line(tokenizer, tmp_path, line, message):
    (tmp_path / "e.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        load_episodes(tmp_path / "e.jsonl", tokenizer, prompt="short")


def test_an_episode_as_text_marks_what_the_agent_wrote(tokenizer):
    episode = play(tokenizer, {"ask-a": SEARCH_THEN_ANSWER})["ask-a"]
    lines = episode_text(episode, tokenizer).splitlines()
    assert "| <think>hm</think><search> q1 </search>" in lines
    assert any(line.startswith("  <information>Doc 1") for line in lines)
    assert lines[-1] == "  [answered; answer 'gold'; gold gold]"
    unknown = Episode(Question("q", "q", (), "asked"), episode.segments, "invalid")
    assert episode_text(unknown, tokenizer).endswith("gold unknown]")
