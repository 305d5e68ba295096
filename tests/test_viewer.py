"""The episode viewer: its numbers are those of training, and nothing in its page is markup.

Run: python -m pytest tests/test_viewer.py
"""

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import dgpo
import reinforce
import viewer
from batch import collate
from data import Question
from episode import Episode, Segment, save_episodes
from infra import page
from infra.record import read_record
from kernels import head_logprobs
from model import Tokenizer
from reinforce import Models
from serving.ask import token_texts
from settings import TrainSettings
from tests.support.mini import read_rows, write_rows
from tests.support.runs import Spy, policies, run

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5  # fp32, other batches
MIN_CONTRAST = 4.5  # of text, WCAG AA
MAX_PAGE_BYTES = 5e6
HOSTILE = (
    "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
    "<!-- \u2028 \u2029 \"quotes\" 'these' & \ud800 @@DATA@@ @@TITLE@@ {{ 7 * 7 }} \\u003c"
)
# Pays every second episode, so that a step has guided and other ones.
REWARD = "def pay(episodes):\n    return [float(len(e.ids) % 2) for e in episodes]\n"


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return f"{path}:pay"


@pytest.fixture(scope="module")
def finished(mini, tmp_path_factory, reward) -> Path:
    """A run of dgpo in three steps, with a state after each of the last two, and with samples."""
    out = tmp_path_factory.mktemp("runs") / "dgpo"
    run(mini, out, "--phase", "dgpo", "--steps", "3", "--eval-every", "1", "--reward", reward)
    return out


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, page_digest(path))
            for path in files}  # fmt: skip


def page_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its scripts, styles and attributes."""

    def __init__(self, path: Path):
        super().__init__()
        self.scripts: list[tuple[dict, str]] = []
        self.styles: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.inside = ""
        self.title = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0][1])

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        if tag == "style":
            self.styles.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            about, before = self.scripts[-1]
            self.scripts[-1] = about, before + text
        elif self.inside == "style":
            self.styles[-1] += text
        elif self.inside == "title":
            self.title += text


# ---- numbers ----


@pytest.mark.parametrize(
    "flags",
    [
        ["--phase", "dgpo"],
        ["--phase", "dgpo", "--kl-in", "exact", "--gae-lambda", "0.9", "--gamma", "0.95"],
        ["--phase", "ppo", "--beta", "0.3", "--importance-cap", "0.9"],
        ["--phase", "grpo", "--group-size", "4", "--beta", "0.3", "--rollout-rows", "4"],
    ],
    ids=lambda flags: "-".join(flags[1:3]),
)
def test_a_step_that_is_played_again_has_the_numbers_that_training_saw(
    mini, tmp_path, reward, monkeypatch, flags
):
    learn, rewards = Spy(monkeypatch, reinforce, "learn"), Spy(monkeypatch, dgpo, "kl_rewards")
    run(mini, tmp_path / "run", *flags, "--steps", "3", "--reward", reward)
    seen_rewards = rewards.calls[2][2]
    _, _, _, batch, tokens, _, step, _ = learn.calls[2][0]
    assert step == 2
    record = read_record(tmp_path / "run")
    agent = viewer.open_agent(tmp_path / "run", record, "", 3)
    session = viewer.open_session(agent.settings, viewer.CPU, agent.task)
    episodes = viewer.play_step(agent, session, 8)
    again = collate(episodes, pad_id=agent.models.actor.tokenizer.pad_id)
    assert torch.equal(again.ids, batch.ids)
    assert torch.equal(again.response_mask, batch.response_mask)
    numbers = viewer.token_numbers(
        agent.models, episodes, agent.settings, agent.task.reward(episodes)
    )
    expected = {"student": tokens.old_logprobs, "advantage": tokens.advantages,
                "reward": seen_rewards}  # fmt: skip
    if agent.models.critic is not None:
        expected["value"] = tokens.old_values
    assert ("value" in numbers[0]) == (agent.models.critic is not None)
    for i, row in enumerate(numbers):
        mask = batch.response_mask[i]
        for name, values in expected.items():
            torch.testing.assert_close(
                torch.tensor(row[name]), values[i][mask], rtol=TOLERANCE, atol=TOLERANCE
            )
        if not tokens.guide_logprobs[i].isnan().any():  # the others had no guide in training
            guide = tokens.guide_logprobs[i][mask]
            torch.testing.assert_close(torch.tensor(row["guide"]), guide, rtol=0, atol=TOLERANCE)
    rows = viewer.rows_of(agent, episodes)
    guided = dgpo.guided_episodes(torch.tensor([r["score"] for r in rows]), record["settings"]
                                  ["kl_where"])  # fmt: skip
    assert [row["guided"] for row in rows] == guided.tolist()
    word = "teacher" if flags[1] == "dgpo" else "initial policy"
    assert agent.guide == word


def test_log_probabilities_and_kl_are_those_by_hand(mini, tokenizer):
    student, teacher = policies(mini)
    agent, shown = tokenizer.encode("<answer>7</answer>"), tokenizer.encode(" x ")
    episode = Episode(
        Question("q", "which", ("7",), ""),
        [Segment("prompt", tokenizer.encode("which")), Segment("agent", agent[:4]),
         Segment("environment", shown), Segment("agent", agent[4:])],
        "answered", "7",
    )  # fmt: skip
    settings = TrainSettings(temperature=0.7)
    [numbers] = viewer.token_numbers(Models(student, None, teacher), [episode], settings)
    ids = torch.tensor([episode.ids])
    rows = torch.tensor(episode.response_mask).nonzero()[:, 0] - 1  # row t predicts token t + 1
    with torch.no_grad():
        logits = [p.decoder(ids)[0, rows, : p.tokenizer.size] / 0.7 for p in (student, teacher)]
    log_student, log_teacher = (x.log_softmax(-1) for x in logits)
    expected = {
        "student": log_student.gather(1, ids[0, rows + 1, None])[:, 0],
        "guide": log_teacher.gather(1, ids[0, rows + 1, None])[:, 0],
        "kl": (log_student.exp() * (log_student - log_teacher)).sum(-1),
    }
    assert numbers.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(numbers[name]), values, rtol=1e-4, atol=1e-4)
    row = viewer.as_row(episode, 1.0, numbers, student.tokenizer)
    parts = [segment for segment in row["segments"] if segment["by"] == "agent"]
    assert [len(part["kl"]) for part in parts] == [4, len(agent) - 4]
    assert sum((part["kl"] for part in parts), []) == [page.rounded(x) for x in numbers["kl"]]
    assert row["kl"] == page.rounded(sum(numbers["kl"]) / len(agent)) and row["tokens"] == 18
    assert row["segments"][2] == {"by": "environment", "text": " x ", "n": 3}


def test_supervised_numbers_are_at_temperature_one(mini, tmp_path):
    run(mini, tmp_path / "kd", "--phase", "kd", "--temperature", "0.5", "--eval-every", "0")
    viewer.main([str(tmp_path / "kd"), "--limit", "2", "--out", str(tmp_path / "kd.html")])
    data = Page(tmp_path / "kd.html").data
    assert len(data["episodes"]) == 2 and "episodes.jsonl" in data["about"][0]
    [row] = data["episodes"][0]
    [part, *_] = [s for s in row["segments"] if s["by"] == "agent"]
    assert part.keys() == {"by", "tokens", "student", "guide", "kl"} and not row["guided"]
    assert row["searches"] == 1  # read from its turns
    policy = viewer.load_policy(str(tmp_path / "kd"), viewer.CPU, "model")
    prompt = row["segments"][0]["n"]
    ids = policy.tokenizer.chat(viewer_messages(row["question"]))
    assert len(ids) == prompt
    written = policy.tokenizer.encode("".join(part["tokens"]), own=True)
    hidden = policy.decoder.hidden(torch.tensor([ids + written]))[0, prompt - 1 : -1]
    logprobs, _ = head_logprobs(hidden, policy.head, torch.tensor(written))
    torch.testing.assert_close(
        torch.tensor(part["student"]), logprobs.detach(), rtol=1e-3, atol=1e-3
    )


def viewer_messages(question: str) -> list[dict]:
    from data import build_messages

    return build_messages(Question("", question, (), ""), "short")


def test_the_first_episodes_of_a_step_are_the_same_alone(finished):
    """A limit saves time and changes no episode; groups stay whole."""
    agent = viewer.open_agent(finished, read_record(finished), "", 3)
    session = viewer.open_session(agent.settings, viewer.CPU, agent.task)
    everything = viewer.play_step(agent, session, 99)
    some = viewer.play_step(agent, session, 3)
    assert [e.ids for e in some] == [e.ids for e in everything[:3]] and len(everything) == 8
    text = (finished / "samples" / "step_000003.txt").read_text()
    first = viewer.page.replace_surrogates(everything[0].question.question)
    assert first in text.split("\n\n")[0]
    shown = page.curves(finished)
    score = sum(e.score for e in everything) / 8
    assert shown["metrics"]["rollout/score"][2] == page.rounded(score)
    settings = viewer.replace(agent.settings, group_size=2)
    assert len(viewer.play_step(agent._replace(settings=settings), session, 3)) == 2


def test_a_step_without_weights_is_refused_with_those_there_are(finished):
    record = read_record(finished)
    assert viewer.find_weights(finished, 1) == (None, 0)  # where the run began
    assert viewer.find_weights(finished, 3)[0].name == "step_000002"
    assert viewer.find_weights(finished, None)[1] == 3
    with pytest.raises(ValueError, match="--step: got 9, expected one of 1, 3, 4"):
        viewer.open_agent(finished, record, "", 9)


def test_a_result_without_states_is_shown_without_its_critic(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "state")
    agent = viewer.open_agent(tmp_path / "moved", read_record(finished), "", None)
    assert agent.step == 3 and agent.models.critic is None
    [row] = viewer.rows_of(agent, viewer.play_step(
        agent, viewer.open_session(agent.settings, viewer.CPU, agent.task), 1))  # fmt: skip
    [part, *_] = [s for s in row["segments"] if s["by"] == "agent"]
    assert {"student", "guide", "kl", "reward"} <= part.keys()
    assert not {"value", "advantage"} & part.keys()


def test_token_texts_join_to_the_text_and_keep_characters_whole(tokenizer):
    ids = tokenizer.encode("caf\u00e9 \u20ac \U0001f600!")
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "caf\u00e9 \u20ac \U0001f600!" and len(texts) == len(ids)
    assert texts[3:5] == ["", "\u00e9"] and "\ufffd" not in texts
    broken = [ids[3], *tokenizer.encode("bcdefgh")]  # half a character
    assert "".join(token_texts(tokenizer, broken)) == tokenizer.decode(broken)
    world = Tokenizer.load(ROOT / "world" / "student")
    ids = world.encode("who wrote the novel Paper Lake? <search>")
    assert token_texts(world, ids)[:3] == ["who", " wrote", " the"]


@pytest.mark.real
def test_token_texts_of_a_real_tokenizer(real_assets):
    tokenizer = Tokenizer.load(real_assets / "smollm2-135m-instruct")
    text = "<think> caf\u00e9 \u4f60\u597d \U0001f600\U0001f1eb\U0001f1f7 </think>\n\n  x"
    ids = tokenizer.encode(text)
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids) == text


# ---- the page ----


def hostile_rows() -> list[dict]:
    return [{
        "id": "1</script>", "question": HOSTILE, "golden_answers": [HOSTILE], "source": "<b>",
        "status": "answered", "answer": HOSTILE, "score": 1.0, "queries": [HOSTILE, "b"],
        "segments": [{"author": "prompt", "text": HOSTILE}, {"author": "agent", "text": "<b>x</b>"},
                     {"author": "environment", "text": HOSTILE}],
    }]  # fmt: skip


def test_hostile_texts_stay_data(tmp_path):
    file, out = tmp_path / "<i>&amp;.jsonl", tmp_path / "page.html"
    write_rows(file, hostile_rows())
    viewer.main([str(file), "--out", str(out)])
    seen = Page(out)
    assert [about for about, _ in seen.scripts] == [
        {"type": "application/json", "id": "data"}, {}]  # fmt: skip
    assert seen.title == str(file)
    [[row]] = seen.data["episodes"]
    expected = HOSTILE.replace("\ud800", "\ufffd")  # read_rows does, no file could hold it
    assert row["question"] == row["answer"] == row["golds"][0] == expected
    assert row["segments"][2] == {"by": "environment", "text": expected}
    assert row["searches"] == 2 and row["status"] == "answered"
    assert not [name for _, name, _ in seen.attributes if name.startswith("on")]
    assert not [tag for tag, name, _ in seen.attributes if name in ("src", "href")]
    text = out.read_text(encoding="utf-8")
    assert "\u2028" not in text and text.count("</script>") == text.count("<script") == 2


def test_the_policy_lets_the_pages_own_code_run_and_nothing_else(tmp_path):
    page.write(tmp_path / "a.html", watched_data(), [])
    seen = Page(tmp_path / "a.html")
    [policy] = [value for tag, name, value in seen.attributes if "default-src" in (value or "")]
    for kind, text in (("script", seen.scripts[1][1]), ("style", seen.styles[0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    code = page.TEMPLATE.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "fetch("):
        assert word not in code
    assert [*re.findall(r"https?://[\w./]+", code)] == ["http://www.w3.org/2000/svg"]  # a name


def watched_data() -> dict:
    return {"title": "t", "sides": [], "quantities": {}, "about": []}


def test_a_lone_surrogate_and_a_number_that_is_not_finite_cannot_break_a_page(tmp_path):
    data = watched_data() | {"title": "a\ud800<b>", "about": ["\ud800"]}
    page.write(tmp_path / "a.html", data, [])
    seen = Page(tmp_path / "a.html")
    assert seen.title == "a\ufffd<b>" and seen.data["about"] == ["\ud800"]
    with pytest.raises(ValueError, match="Out of range"):
        page.render(data | {"step": float("nan")})
    assert page.rounded(float("nan")) is page.rounded(float("inf")) is page.rounded(None) is None
    assert page.rounded(-0.123456) == -0.1235


def luminance(colour: tuple[float, ...]) -> float:
    parts = [c / 255 for c in colour]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_legible_in_light_and_dark_also_on_the_strongest_tint():
    css = page.own_part(page.TEMPLATE.read_text(encoding="utf-8"), "style")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    depth = float(re.search(r"largest \? ([\d.]+) \*", page.TEMPLATE.read_text())[1])
    for block in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): ([^;]+);", block))
        rgb = {name: tuple(int(value[i : i + 2], 16) for i in (1, 3, 5))
               for name, value in colours.items() if value.startswith("#")}  # fmt: skip
        grounds = [rgb["paper"], rgb["card"]]
        for name in ("plus", "minus"):
            tint = [float(x) for x in colours[name].split()]
            grounds.append(tuple(depth * t + (1 - depth) * p
                                 for t, p in zip(tint, rgb["paper"], strict=True)))  # fmt: skip
        for ground in grounds:
            assert contrast(rgb["ink"], ground) >= MIN_CONTRAST
        for name in ("soft", "accent", "warm"):
            for ground in ("paper", "card", "wash"):
                assert contrast(rgb[name], rgb[ground]) >= MIN_CONTRAST, (name, ground)


def long_row(i: int, num_tokens: int) -> dict:
    numbers = {name: [-0.1234] * num_tokens for name in viewer.QUANTITIES}
    return {"id": str(i), "question": "q", "set": "", "golds": [], "status": "answered",
            "answer": "a", "score": 0.0, "searches": 1, "tokens": num_tokens, "segments": [
                {"by": "agent", "tokens": ["word"] * num_tokens, **numbers}]}  # fmt: skip


def test_pages_are_bounded_by_episodes_and_by_bytes(tmp_path):
    few = [[long_row(i, 1)] for i in range(1001)]
    paths = page.write(tmp_path / "few.html", watched_data() | {"tables": [1]}, few)
    assert [path.name for path in paths] == ["few.html", "few-2.html", "few-3.html"]
    parts = [Page(path).data for path in paths]
    assert [len(part["episodes"]) for part in parts] == [500, 500, 1]
    assert [part["page"] for part in parts] == [0, 1, 2]
    assert all(part["pages"] == [path.name for path in paths] for part in parts)
    assert [part["tables"] for part in parts] == [[1], [], []]  # on the first page alone
    assert [row["id"] for part in parts for [row] in part["episodes"]] == [*map(str, range(1001))]
    long = page.write(tmp_path / "long.html", watched_data(), [[long_row(0, 20_000)]] * 9)
    assert [len(Page(path).data["episodes"]) for path in long] == [3, 3, 3]
    assert all(path.stat().st_size < MAX_PAGE_BYTES for path in long)
    tags = [[{"text": "<" * 300_000}]] * 4  # an escape has six characters
    assert [len(part) for part in page.split(tags)] == [2, 2]
    assert page.split([]) == [[]] and len(page.split([[long_row(0, 99_000)]] * 2)) == 2


# ---- what is shown ----


def test_a_run_is_shown_and_left_as_it_was(mini, finished, tmp_path):
    before = contents(finished)
    out = tmp_path / "page.html"
    write_result(finished.parent / "eval" / "dgpo")
    viewer.main([str(finished), "--out", str(out), "--limit", "4", "--step", "3",
                 "--teacher", str(mini / "student")])  # fmt: skip
    assert contents(finished) == before
    data = Page(out).data
    assert "dgpo (dgpo): 4 of 8 episodes of step 3. Weights after step 2." in data["about"]
    assert len(data["episodes"]) == 4 and data["step"] == 3
    [curve] = data["runs"]
    assert curve["steps"] == [1, 2, 3] and curve["name"] == "dgpo"
    logged = read_rows(finished / "metrics.jsonl")
    assert curve["metrics"]["loss/value_loss"] == [
        page.rounded(step["loss/value_loss"]) for step in logged]  # fmt: skip
    assert curve["samples"].keys() == {"1", "2", "3"}
    assert curve["samples"]["3"] == (finished / "samples" / "step_000003.txt").read_text()
    sets, arcap = data["tables"]
    assert sets["rows"][0][:3] == ["NQ", 2, 0.5] and sets["head"][:3] == ["", "n", "em"]
    assert [row[0] for row in sets["rows"]] == ["NQ", "Avg. of sets", "All questions"]
    assert arcap["rows"] == [["NQ", 2, None, 0.25, 1, 1, 1]]
    assert data["quantities"]["kl"] == "KL(student || teacher)"
    shutil.rmtree(finished.parent / "eval")


def write_result(folder: Path) -> None:
    folder.mkdir(parents=True)
    values = {"n": 2, **dict.fromkeys(viewer.MEASURES, 0.5)}
    result = {"sets": {"nq": values}, "average": values, "all": values}
    (folder / "result.json").write_text(json.dumps(result))
    arcap = {"n": 2, "without_thinking": float("nan"), "with_thinking": 0.25, "first_hit": 1,
             "hit": 1, "searches": 1}  # fmt: skip
    (folder / "arcap.json").write_text(json.dumps({"arcap": {"nq": arcap}}))


def test_the_newest_weights_play_the_step_that_follows(finished, tmp_path):
    viewer.main([str(finished), "--out", str(tmp_path / "a.html"), "--limit", "2"])
    [about] = Page(tmp_path / "a.html").data["about"]
    assert about.endswith("step 4, which the run has not done. Weights after step 3.")


def test_two_runs_answer_the_same_questions(mini, finished, tmp_path):
    other = tmp_path / "kd"
    run(mini, other, "--phase", "kd", "--eval-every", "0")
    viewer.main([str(finished), str(other), "--out", str(tmp_path / "two.html")])
    data = Page(tmp_path / "two.html").data
    assert [side["name"] for side in data["sides"]] == ["dgpo", "kd"] and len(data["runs"]) == 2
    assert len(data["episodes"]) == 2  # --val-size
    for left, right in data["episodes"]:
        assert left["question"] == right["question"]
        assert "advantage" in left["segments"][1] and "advantage" not in right["segments"][1]
    assert all("set apart" in line for line in data["about"])


def test_another_program_s_run_has_curves_and_no_episodes(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "bard")
    record = json.loads((tmp_path / "bard" / "run.json").read_text())
    record["settings"]["phase"] = "bard-rl"
    (tmp_path / "bard" / "run.json").write_text(json.dumps(record))
    viewer.main([str(tmp_path / "bard"), "--out", str(tmp_path / "a.html")])
    data = Page(tmp_path / "a.html").data
    assert data["episodes"] == [] and "bard-rl" in data["about"][0] and data["runs"]


def episodes_file(mini: Path, path: Path, *numbers: int) -> Path:
    rows = read_rows(mini / "episodes.jsonl")
    more = {"status": "answered", "answer": "5", "score": 1.0, "queries": ["fact"]}
    write_rows(path, [{**rows[i], **more} for i in numbers])
    return path


def test_a_file_has_numbers_where_a_model_is_given(mini, tmp_path):
    file, out = episodes_file(mini, tmp_path / "e.jsonl", 0, 1, 2), tmp_path / "a.html"
    viewer.main([str(file), "--out", str(out), "--limit", "2"])
    [[row], _] = Page(out).data["episodes"]
    assert [s["text"] for s in row["segments"]][:1] == ["<search>act</search>"]
    models = ["--model", str(mini / "student"), "--teacher", str(mini / "teacher")]
    viewer.main([str(file), "--out", str(out), *models])
    [row] = Page(out).data["episodes"][0]
    agent, environment, _ = row["segments"]
    assert "".join(agent["tokens"]) == "<search>act</search>" and "text" in environment
    assert len(agent["kl"]) == len(agent["guide"]) == len(agent["tokens"])
    assert row["score"] == 1.0 and row["searches"] == 1 and row["answer"] == "5"
    assert row["golds"] == ["0"]


def test_an_evaluation_s_folder_names_its_own_model(mini, tmp_path):
    student, _ = policies(mini)
    said = [Segment("agent", student.tokenizer.encode("hi"))]
    episode = Episode(Question("a", "b", (), "nq"), said, "answered", "hi")
    save_episodes(tmp_path / "eval" / "episodes.jsonl", [episode], student.tokenizer)
    record = {"settings": {"model": str(mini / "student")}}
    (tmp_path / "eval" / "run.json").write_text(json.dumps(record))
    viewer.main([str(tmp_path / "eval"), "--out", str(tmp_path / "a.html")])
    data = Page(tmp_path / "a.html").data
    [[row]] = data["episodes"]
    assert len(row["segments"][0]["student"]) == 2 and row["set"] == "nq"


def test_two_files_are_paired_by_question(mini, tmp_path):
    left = episodes_file(mini, tmp_path / "l.jsonl", 0, 1, 1, 2)
    right = episodes_file(mini, tmp_path / "r.jsonl", 1, 2, 1, 9)
    viewer.main([str(left), str(right), "--out", str(tmp_path / "a.html")])
    pairs = Page(tmp_path / "a.html").data["episodes"]
    assert [[row["id"] for row in pair] for pair in pairs] == [["q1"] * 2, ["q1"] * 2, ["q2"] * 2]


# name of the case, arguments, what the message holds; {mini}, {run}, {tmp}
WRONG = [
    (["{tmp}"], ["no run.json", "eval.py --episodes"]),
    (["{tmp}/no.jsonl"], ["no.jsonl", "expected"]),
    (["{mini}/episodes.jsonl", "{run}"], ["expected two of a kind"]),
    (["{run}", "{run}", "{run}"], ["got 3 paths"]),
    (["{run}", "--model", "{mini}/student"], ["--model: is for files"]),
    (["{run}", "{run}", "--step", "2"], ["--step: is for one run"]),
    (["{mini}/episodes.jsonl", "--teacher", "{mini}/teacher"], ["--teacher", "--model"]),
    (["{mini}/episodes.jsonl", "--model", "a", "b"], ["--model: got 2"]),
    (["{mini}/episodes.jsonl", "{mini}/corpus.jsonl"], ["segments"]),
    (["{mini}/episodes.jsonl", "--limit", "0"], ["--limit"]),
    (["watch", "{tmp}/nothing"], ["nothing", "expected one that holds runs"]),
]


@pytest.mark.parametrize("arguments, parts", WRONG)
def test_what_cannot_be_shown_is_refused_by_name(
    mini, finished, tmp_path, capsys, arguments, parts
):
    places = {"mini": mini, "run": finished, "tmp": tmp_path}
    out = ["--out", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit):
        viewer.main([argument.format(**places) for argument in arguments] + out)
    message = capsys.readouterr().err
    for part in parts:
        assert part in message, message
    assert not (tmp_path / "page.html").exists()


# ---- runs in progress ----


def test_watching_draws_all_runs_until_they_have_ended(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "runs" / "deep" / "b")
    going = tmp_path / "runs" / "a"
    shutil.copytree(finished, going)
    result = going / "model.safetensors"
    result.rename(tmp_path / "kept")
    with (going / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/score": 0.75}\n{"step": 5, "roll')  # being written
    begun = tmp_path / "runs" / "begun"
    begun.mkdir()
    shutil.copy(finished / "run.json", begun / "run.json")
    os.utime(begun / "run.json", (0, 0))
    (tmp_path / "runs" / "eval").mkdir()
    (tmp_path / "runs" / "eval" / "run.json").write_text('{"settings": {"model": "m"}}')
    out, pages = tmp_path / "w.html", []

    def sleep(seconds: float) -> None:
        pages.append((seconds, Page(out).data))
        if len(pages) == 1:
            (tmp_path / "kept").rename(result)
            (begun / "model.safetensors").touch()

    monkeypatch.setattr(viewer.time, "sleep", sleep)
    viewer.main(["watch", str(tmp_path / "runs"), "--out", str(out), "--every", "7"])
    (pause, first), (_, last) = pages
    assert pause == first["refresh"] == 7 and last["refresh"] == 0
    assert first["about"] == ["Drawn again every 7 s."]
    [runs] = first["tables"]
    assert runs["rows"][0][:4] == ["a", "dgpo", "4 of 3", 0.75] and "ago" in runs["rows"][0][5]
    assert runs["rows"][1][0] == "deep/b" and runs["rows"][1][5] == "finished"
    assert runs["rows"][2][:4] == ["begun", "dgpo", "0 of 3", None] and len(runs["rows"]) == 3
    assert [run["name"] for run in first["runs"]] == ["a", "deep/b", "begun"]
    assert first["runs"][0]["samples"].keys() == {"1", "2", "3"}
    assert "runs 3" in capsys.readouterr().out


def test_long_curves_are_thinned_and_keep_their_last_step(tmp_path):
    lines = [{"step": i, "loss/kd": 1 / i, "odd": None} for i in range(1, 2500)]
    write_rows(tmp_path / "metrics.jsonl", lines)
    curve = page.curves(tmp_path, "name")
    assert len(curve["steps"]) <= page.MAX_POINTS + 1
    assert curve["steps"][0] == 1 and curve["steps"][-1] == 2499
    assert curve["metrics"]["loss/kd"][-1] == 0.0004002 and curve["metrics"]["odd"][0] is None
    assert len(curve["steps"]) == len({*curve["steps"]}) == len(curve["metrics"]["loss/kd"])
    write_rows(tmp_path / "metrics.jsonl", lines[:7])
    assert page.curves(tmp_path)["steps"] == [1, 2, 3, 4, 5, 6, 7]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000002.txt").write_text("x" * (page.MAX_SAMPLE + 9))
    text = page.curves(tmp_path)["samples"][2]
    assert len(text) < page.MAX_SAMPLE + 200 and "the rest is in" in text
    assert page.curves(tmp_path / "nothing")["steps"] == []
    assert [page.spoken(x) for x in (5, 119, 120, 9000)] == ["5 s", "119 s", "2 min", "2 h"]


# ---- in a browser ----


def open_in_chromium(path: Path, place: str = "") -> str:
    """The document of a page after its code has run."""
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome")
                    if shutil.which(b)), None)  # fmt: skip
    if browser is None:
        pytest.skip("no Chromium here")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--virtual-time-budget=2000", f"{path.as_uri()}#{place}"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if result.returncode or not result.stdout:
        pytest.skip(f"Chromium does not run here: {result.stderr[-200:]}")
    return result.stdout


class Drawn(html.parser.HTMLParser):
    """The text under each id of a document, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.num_scripts = self.num_images = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.num_scripts += tag == "script"
        self.num_images += tag == "img"
        if tag not in ("meta", "input", "img", "br", "line", "polyline"):
            self.open.append(dict(attributes).get("id") or "")

    def handle_endtag(self, tag):
        if tag not in ("meta", "input", "img", "br", "line", "polyline"):
            self.open.pop()

    def handle_data(self, text):
        for name in filter(None, self.open):
            self.texts[name] = self.texts.get(name, "") + text


def test_a_browser_shows_hostile_text_as_text(tmp_path):
    file, out = tmp_path / "e.jsonl", tmp_path / "page.html"
    write_rows(file, hostile_rows())
    viewer.main([str(file), "--out", str(out)])
    drawn = Drawn(open_in_chromium(out))
    assert drawn.num_scripts == 2 and drawn.num_images == 0
    assert "</script><script>document.title = 'taken'</script><img" in drawn.texts["sides"]
    assert "<img src=x onerror=alert(1)>" in drawn.texts["question"]
    assert "1 of 1" in drawn.texts["count"] and "2 searches" in drawn.texts["list"]


def test_a_browser_shows_the_numbers_of_the_token_that_is_pointed_at(mini, tmp_path):
    file, out = episodes_file(mini, tmp_path / "e.jsonl", 0, 1), tmp_path / "page.html"
    models = ["--model", str(mini / "student"), "--teacher", str(mini / "teacher")]
    viewer.main([str(file), "--out", str(out), *models])
    drawn = Drawn(open_in_chromium(out, "episodes/1/2"))
    [row] = Page(out).data["episodes"][1]
    number = row["segments"][0]["kl"][2]
    assert f"KL(student || teacher) {number:.4g}"[:-1] in drawn.texts["numbers"]
    assert "token 3 of" in drawn.texts["numbers"] and row["question"] == drawn.texts["question"]


def test_a_browser_draws_curves_and_tables_of_a_watched_folder(finished, tmp_path):
    out = tmp_path / "w.html"
    viewer.main(["watch", str(finished), "--out", str(out), "--every", "0"])
    drawn = Drawn(open_in_chromium(out, "curves/2"))
    assert "2 of 3" in drawn.texts["step"] and "dgpo wrote in step 2" in drawn.texts["samples"]
    assert "rollout/score" in drawn.texts["view-curves"]
    assert "finished" in Drawn(open_in_chromium(out)).texts["view-tables"]
