"""Evaluation: all rows count, averages, tables, intervals with a known answer, the program.

Run: python -m pytest tests/test_eval.py
"""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bard
import eval as evaluation
import qagent
import server
from data import TEST_SETS, Passage, Question
from episode import Episode, Segment
from infra import cli, config, curves
from infra.record import say_once
from model import Tokenizer
from rollout import RolloutSettings
from serving import ask
from session import Task, open_session
from settings import TrainSettings
from tests.support.runs import run
from tests.support.scripted import scripted_policy

POLICY = SimpleNamespace()
INTERVAL_TOLERANCE = 0.002  # Monte Carlo error of 10,000 resamples

ROOT = Path(__file__).resolve().parents[1]


def scripted(policy, retriever, questions, settings, *, seed, progress=""):
    """Answers question i of a set rightly where i is even; a search finds the gold answer."""
    episodes = []
    for i, question in enumerate(questions):
        gold = question.golden_answers[0]
        searches = [[Passage("p", "A title", f"It says {gold.upper()}.", 1.0)]] * (i % 3 == 0)
        segments = [
            Segment("prompt", [1, 2]),
            Segment("agent", [3] * (i + 1)),
            Segment("environment", [4] * 9),
        ]
        status = "invalid" if i == 1 else "answered"
        answer = {1: None}.get(i, gold if i % 2 == 0 else "gold and more")
        queries = ["q"] * len(searches)
        episodes.append(Episode(question, segments, status, answer, queries, searches))
    return episodes


@pytest.fixture
def sets(monkeypatch) -> dict[str, list[Question]]:
    monkeypatch.setattr(evaluation, "generate", scripted)
    return {
        name: [Question(f"{name}_{i}", f"q {i}?", (f"gold {i}",), name) for i in range(n)]
        for name, n in (("nq", 6), ("bamboogle", 3))
    }


def evaluate(sets) -> dict:
    return {"name": "m"} | evaluation.evaluate(POLICY, None, sets, RolloutSettings(), seed=0)


def test_every_row_is_evaluated_whatever_the_batch(sets):
    """The official loader dropped the last incomplete batch: Bamboogle became k/124."""
    result = evaluate(sets)
    assert [(row["set"], row["id"]) for row in result["scores"]] == [
        (name, q.id) for name, questions in sets.items() for q in questions
    ]
    counts = {name: values["n"] for name, values in result["sets"].items()}
    assert counts == {"nq": 6, "bamboogle": 3}


def test_measures_come_from_the_episode(sets):
    nq = evaluate(sets)["sets"]["nq"]
    assert nq["em"] == 3 / 6
    assert nq["hit"] == nq["searches"] == 2 / 6
    assert nq["invalid"] == 1 / 6 and nq["answered"] == 5 / 6
    assert nq["agent_tokens"] == np.mean([1, 2, 3, 4, 5, 6])  # neither prompt nor environment
    # "gold and more" against "gold 3": precision 1/3, recall 1/2; no answer counts 0.
    assert nq["f1"] == pytest.approx((3 + 2 * 0.4) / 6)


def test_the_average_is_over_sets_and_all_is_over_questions(sets):
    result = evaluate(sets)
    assert result["average"]["em"] == pytest.approx((3 / 6 + 2 / 3) / 2)
    assert result["all"]["em"] == pytest.approx(5 / 9) and result["all"]["n"] == 9


def test_a_sets_noise_does_not_depend_on_the_other_sets(sets, monkeypatch):
    seeds = {}

    def spy(policy, retriever, questions, settings, *, seed, **rest):
        seeds.setdefault(questions[0].source, []).append(seed)
        return scripted(policy, retriever, questions, settings, seed=seed)

    monkeypatch.setattr(evaluation, "generate", spy)
    evaluate(sets)
    evaluate({"bamboogle": sets["bamboogle"]})
    assert len(set(seeds["bamboogle"])) == 1 and seeds["nq"][0] != seeds["bamboogle"][0]


def result(name: str, **em: float) -> dict:
    values = {
        key: {"n": 1} | dict.fromkeys(evaluation.MEASURES, value) for key, value in em.items()
    }
    mean = {"n": 1} | dict.fromkeys(evaluation.MEASURES, float(np.mean(list(em.values()))))
    return {"name": name, "sets": values, "average": mean, "all": mean}


def test_the_table_has_the_papers_columns():
    shuffled = dict.fromkeys(sorted(TEST_SETS), 0.25)
    lines = evaluation.table([result("student", **shuffled), result("KD", **shuffled)]).splitlines()
    columns = "NQ TriviaQA PopQA HotpotQA 2wiki MuSiQue Bamboogle Avg."
    assert lines[0].split() == columns.split()
    assert [line.split() for line in lines[2:]] == [
        ["student"] + ["0.250"] * 8,
        ["KD"] + ["0.250"] * 8,
    ]
    assert len({len(line) for line in lines}) == 1


def test_several_seeds_of_a_name_are_a_mean_and_a_sample_deviation():
    rows = evaluation.table([result("a", nq=0.1), result("a", nq=0.3), result("b", nq=0.2)])
    seeds, single = (row.split() for row in rows.splitlines()[2:])
    assert seeds == ["a", "0.200", "0.200", "\u00b10.141"]  # sqrt(2) 0.1: divided by n - 1
    assert single == ["b", "0.200", "0.200"]  # of one seed nothing is known


def test_a_missing_set_shows_and_marks_the_average():
    text = evaluation.table([result("a", nq=0.1, mine=0.3), result("b", nq=0.2)])
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["NQ", "mine", "Avg."] and rows[2] == ["a", "0.100", "0.300", "0.200"]
    assert rows[3] == ["b", "0.200", "-", "0.200*"] and text.endswith(
        "* average over the sets shown in its row"
    )


def test_a_set_that_a_seed_lacks_has_no_mean_over_seeds():
    rows = evaluation.table([result("a", nq=0.1, mine=0.3), result("a", nq=0.3)]).splitlines()
    assert rows[2].split()[:3] == ["a", "0.200", "-"]


def test_the_bootstrap_finds_the_known_interval_of_a_bernoulli_difference():
    """n differences, a share p of them 1: the resampled mean is Binomial(n, p) / n."""
    n, p = 1000, 0.3
    mean, low, high = evaluation.bootstrap({"nq": np.repeat([1.0, 0.0], [300, 700])})["nq"]
    assert mean == pytest.approx(p)
    half = 1.96 * np.sqrt(p * (1 - p) / n)
    assert low == pytest.approx(p - half, abs=INTERVAL_TOLERANCE)
    assert high == pytest.approx(p + half, abs=INTERVAL_TOLERANCE)


def test_the_bootstrap_is_the_naive_one():
    values = np.random.default_rng(1).choice([-1, -1 / 3, 0, 1 / 3, 1], size=200)
    rng = np.random.default_rng(2)
    naive = np.percentile(values[rng.integers(0, 200, (10_000, 200))].mean(1), [2.5, 97.5])
    _, low, high = evaluation.bootstrap({"nq": values})["nq"]
    assert (low, high) == pytest.approx(tuple(naive), abs=3 * INTERVAL_TOLERANCE)


def test_a_constant_difference_has_no_width_and_keeps_its_sign():
    intervals = evaluation.bootstrap({"nq": np.full(10, 1.0), "popqa": np.full(30, -0.5)})
    assert intervals["nq"] == (1.0, 1.0, 1.0) and intervals["popqa"] == (-0.5, -0.5, -0.5)
    assert intervals["average"] == pytest.approx((0.25,) * 3)
    assert intervals["all"] == pytest.approx((-0.125,) * 3)


def test_the_bootstrap_pairs():
    """Two models that fail on the same questions: unpaired, it would be about 0.09 wide."""
    hard = np.random.default_rng(0).random(1000) < 0.5
    right = (~hard).astype(float)
    better = right.copy()
    better[np.flatnonzero(hard)[:20]] = 1.0
    mean, low, high = evaluation.bootstrap({"nq": better - right})["nq"]
    assert mean == pytest.approx(0.02) and 0.01 < low < high < 0.03


def test_the_bootstrap_is_the_same_every_time():
    # All values are distinct, so an interval reveals its seed.
    values = {"nq": np.random.default_rng(0).normal(size=99)}
    assert evaluation.bootstrap(values) == evaluation.bootstrap(values)
    assert evaluation.bootstrap(values) != evaluation.bootstrap(values, seed=1)


def scores(path, em: dict[str, float]):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"set": "nq", "id": key, "em": value} for key, value in em.items()]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_compare_averages_seeds_before_it_pairs(tmp_path, capsys):
    a0 = scores(tmp_path / "a0" / "result.json", {"q0": 1, "q1": 0})
    a1 = scores(tmp_path / "a1" / "result.json", {"q1": 1, "q0": 1})  # rows in another order
    b = scores(tmp_path / "b" / "result.json", {"q0": 0, "q1": 0})
    mean, low, high = evaluation.compare([a0, a1], [b])["all"]
    assert (mean, low, high) == (0.75, 0.5, 1.0)
    evaluation.main(["compare", str(a0), str(b)])
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].split() == ["All", "questions", "+0.5000", "+0.0000", "+1.0000"]
    evaluation.main(["compare", str(b), "--against", str(a0), str(a1)])
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "-0.7500"


def test_compare_refuses_other_questions_and_missing_files(tmp_path):
    a = scores(tmp_path / "a.json", {"q0": 1, "q1": 0})
    b = scores(tmp_path / "b.json", {"q0": 1, "q2": 0})
    with pytest.raises(ValueError, match="1 of them shared"):
        evaluation.compare([a], [b])
    with pytest.raises(ValueError, match="every seed"):
        evaluation.compare([a, b], [a])
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        evaluation.compare([tmp_path / "absent.json"], [b])


def test_question_files_are_sorted_into_sets_and_doubles_are_refused(tmp_path):
    for name, source in (("x", "musique"), ("y", "nq")):
        row = {"id": "1", "question": "q?", "golden_answers": ["a"], "dataset": source}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")]
    assert list(evaluation.read_sets(files, None)) == ["nq", "musique"]
    with pytest.raises(ValueError, match="more than once"):
        evaluation.read_sets([files[0], files[0]], None)


def test_a_row_that_asks_for_another_comparison_of_answers_is_refused_by_name(tmp_path):
    """Exact match would score "the answer is 42" as wrong without a word."""
    row = {"id": "1", "question": "6 x 7", "golden_answers": ["42"], "answer_kind": "integer"}
    (tmp_path / "sums.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="sums_1: got 'integer' for answer_kind"):
        evaluation.read_sets([tmp_path / "sums.jsonl"], None)
    assert evaluation.read_sets([tmp_path / "sums.jsonl"], None, ("text", "integer"))


def test_presets_of_another_program_are_refused(capsys):
    presets = [str(ROOT / "configs" / f"{name}.toml") for name in ("world", "qagent-world")]
    with pytest.raises(SystemExit):
        evaluation.main(["--config", *presets, "--model", "absent"])
    assert "use qagent.py for its models" in capsys.readouterr().err


def test_a_saved_result_is_complete(sets, tmp_path):
    evaluation.save_result(evaluate(sets), tmp_path)
    assert len((tmp_path / "result.jsonl").read_text().splitlines()) == 9
    rows = list(csv.DictReader((tmp_path / "result.csv").open()))
    assert [row["set"] for row in rows] == ["NQ", "Bamboogle", "Avg. of sets", "All questions"]
    assert float(rows[0]["em"]) == 0.5 and "Bamboogle" in (tmp_path / "result.txt").read_text()
    same = [tmp_path / "result.json"]
    assert evaluation.compare(same, same)["all"] == (0, 0, 0)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_program_evaluates_a_checkpoint(mini, tmp_path, capsys, temperature):
    evaluation.main([
        "--config", str(mini / "mini.toml"), "--model", str(mini / "student"),
        "--questions", str(mini / "questions.jsonl"), "--temperature", temperature,
        "--out", str(tmp_path), "--device", "cpu", "--episodes",
    ])
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["all"]["n"] == 24 and saved["name"] == "student"
    # The preset's limits hold; how training samples does not reach evaluation.
    assert saved["settings"]["max_turns"] == 2
    assert saved["settings"]["temperature"] == float(temperature)
    assert sum(saved["all"][status] for status in evaluation.STATUSES) == pytest.approx(1)
    assert len((tmp_path / "episodes.jsonl").read_text().splitlines()) == 24
    assert "questions" in capsys.readouterr().out


def test_s2_s3_training_and_evaluation_use_the_rule_of_the_preset_and_say_so(mini, tmp_path):
    preset = tmp_path / "rule.toml"
    preset.write_text('answer_rule = "unicode"\n')
    model, out = shutil.copytree(mini / "student", tmp_path / "model"), tmp_path / "out"
    (model / "run.json").write_text(json.dumps({"settings": {"answer_rule": "numbers"}}))
    flags = ["--config", str(mini / "mini.toml"), str(preset), "--model", str(model), "--limit"]
    flags += ["1", "--questions", str(mini / "questions.jsonl"), "--out", str(out)]
    evaluation.main([*flags, "--device", "cpu"])
    for file in ("result.json", "run.json"):
        saved = json.loads((out / file).read_text())["settings"]
        assert (saved["answer_rule"], saved["hit_rule"]) == ("unicode", "words")
    settings = TrainSettings(
        questions=str(mini / "questions.jsonl"), max_turns=0, answer_rule="numbers")
    session = open_session(settings, torch.device("cpu"), Task())
    questions = [*session.questions, *session.val_questions]
    assert {question.answer_rule for question in questions} == {"numbers"}
    assert questions[0].match("3.5", ["35"]) == 0.0


def test_s2_s4_results_by_different_rules_are_not_compared(tmp_path):
    def result(name: str, **settings) -> Path:
        path = tmp_path / f"{name}.json"
        row = {"set": "nq", "id": "1", "em": 1.0, "hit": 1.0, "searches": 1}
        evaluation.write_result(path, {"name": name, "settings": settings}, [row])
        return path

    old, new = result("old"), result("new", answer_rule="squad", hit_rule="words")
    strict = result("strict", answer_rule="numbers", hit_rule="words")
    assert evaluation.compare([old], [new])["all"] == (0, 0, 0)
    assert evaluation.compare([old], [strict], "searches")["all"] == (0, 0, 0)
    for pair, measure in (((new, strict), "em"), ((old, new), "hit"), ((new, strict), "f1")):
        with pytest.raises(ValueError, match=f"got {measure} by the rules --.* and --.*, expected"):
            evaluation.compare([pair[0]], [pair[1]], measure)


# ---- ARCap ----


class Corpus(list):
    def passage(self, row: int, score: float) -> Passage:
        return self[row]


class Library:
    """A corpus of two passages; every search finds the second one."""

    def __init__(self) -> None:
        self.corpus = Corpus([
            Passage("0", '"Alpha"', "Alpha was born in Beta.", 1.0),
            Passage("1", '"Beta"', "In gold.", 1.0),
        ])
        self.queries: list[str] = []

    def search(self, queries: list[str], top_k: int) -> list[list[Passage]]:
        self.queries += queries
        return [[self.corpus[1]] for _ in queries]


@pytest.fixture
def arcap_of(tokenizer, monkeypatch):
    """ARCap of an agent that writes a fixed text, and its episodes: plain, forced, thinking."""

    def measure_arcap(text: str, questions: list[Question], protocol: str = "search-r1"):
        library, kept = Library(), []
        generate = evaluation.generate

        def keep(*arguments, **options):
            kept.append(generate(*arguments, **options))
            return kept[-1]

        settings = RolloutSettings(
            protocol=protocol, max_turns=1, max_new_tokens=60, max_obs_tokens=80,
            max_context_tokens=900, temperature=0.0, top_k=1, prompt="short",
        )
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "generate", keep)
            policy = scripted_policy(tokenizer, {"who": text})
            result = evaluation.arcap(policy, library, {"nq": questions}, settings)
        return result["nq"], kept, library

    return measure_arcap


HOPS = {"hops": [["Alpha", "birthplace"], ["Beta", "metal"]]}


def test_arcap_shows_the_gold_passages_and_forces_the_answer(arcap_of, tokenizer: Tokenizer):
    question = Question("nq_0", "who?", ("gold",), "nq", metadata=HOPS)
    values, (plain, forced, thinking), library = arcap_of("gold </answer>", [question])
    text = tokenizer.decode(forced[0].ids, skip_special=False)
    shown = (
        '<information>Doc 1(Title: "Alpha") Alpha was born in Beta.\n'
        'Doc 2(Title: "Beta") In gold.</information>\n\n'
    )
    assert text.endswith(f"{shown}<answer>gold </answer>")
    assert [s.author for s in forced[0].segments] == ["prompt", "environment", "agent"]
    assert forced[0].answer == "gold"
    assert values["without_thinking"] == 1.0 and values["num_gold"] == 1
    # The tag is the only word that is put into its mouth: without it the same text is no answer.
    assert thinking[0].answer is None and values["with_thinking"] == 0.0
    assert plain[0].answer is None and values["em"] == 0.0 and not library.queries


def test_arcap_lets_the_agent_think_and_search_after_the_gold_passages(arcap_of):
    script = "<think> so </think> <search> more </search>"
    question = Question("nq_0", "who?", ("gold",), "nq", metadata=HOPS)
    values, (plain, forced, thinking), library = arcap_of(script, [question])
    assert thinking[0].num_searches == plain[0].num_searches == 1 and len(library.queries) == 2
    assert forced[0].num_searches == 0  # with the answer forced, nothing but the answer is done
    assert values["first_hit"] == values["hit"] == values["searches"] == 1.0


def test_arcap_shows_gold_passages_as_the_protocol_does(arcap_of, tokenizer):
    question = Question("nq_0", "who?", ("gold",), "nq", metadata=HOPS)
    _, (_, forced, _), _ = arcap_of("gold </answer>", [question], "qagent.py:QAGENT")
    assert "Passage #2 Beta\nPassage #2 In gold." in tokenizer.decode(forced[0].ids)


def test_arcap_takes_supporting_paragraphs_and_leaves_out_questions_without_gold(
    arcap_of, tokenizer
):
    context = [
        {"title": "Gamma", "text": "Of gold.", "is_supporting": True},
        {"title": "Delta", "text": "Not so.", "is_supporting": False},
    ]
    questions = [
        Question("nq_0", "who?", ("gold",), "nq", context=context),
        Question("nq_1", "who?", ("x",), "nq"),
    ]
    values, (_, forced, _), _ = arcap_of("gold </answer>", questions)
    text = tokenizer.decode(forced[0].ids)
    # A row's titles have no quotes. Search-R1's corpus, which the agent knows, has them.
    assert 'Doc 1(Title: "Gamma") Of gold.' in text and "Delta" not in text
    assert values["num_gold"] == 1 and values["n"] == 2 and len(forced) == 1


@pytest.mark.parametrize(("texts", "hit", "first_hit"), [
    (("nothing", "the gold"), 1.0, 0.0), (("the gold", "nothing"), 1.0, 1.0),
    (("nothing", "nothing"), 0.0, 0.0), ((), 0.0, 0.0),
])
def test_any_search_can_hit_and_the_first_one_is_told_from_later_ones(texts, hit, first_hit):
    searches = [[Passage(text, "t", text, 1.0)] for text in texts]
    question = Question("q", "q", ("gold",), "nq")
    episode = Episode(question, [Segment("agent", [1])], "answered", "gold", ["a"], searches)
    row = evaluation.score("nq", episode)
    assert (row["hit"], row["first_hit"], row["searches"]) == (hit, first_hit, len(texts))


def test_s2_s3_s4_an_evaluation_scores_by_the_rules_that_it_is_told(tmp_path):
    """--answer-rule goes with the questions, --hit-rule is the evaluation's own."""
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps({"question": "q", "golden_answers": ["no", "35", "caf\u00e9"]}))
    searches = [[Passage("0", "t", "a cafe\u0301 in the north", 1.0)]]
    scores = {}
    for rule in ("squad", "unicode", "numbers"):
        [question] = evaluation.read_sets([path], None, answer_rule=rule)["nq"]
        for answer in ("3.5", "cafe\u0301"):
            episode = Episode(question, [], "answered", answer, ["a"], searches)
            row = evaluation.score("nq", episode)
            scores[rule, answer] = (row["em"], row["f1"], row["hit"])
            assert evaluation.score("nq", episode, "substring")["hit"] == 1.0  # "no" in "north"
    assert scores == {
        ("squad", "3.5"): (1, 1, 0), ("squad", "cafe\u0301"): (0, 0, 0),
        ("unicode", "3.5"): (1, 1, 1), ("unicode", "cafe\u0301"): (1, 1, 1),
        ("numbers", "3.5"): (0, 0, 1), ("numbers", "cafe\u0301"): (1, 1, 1),
    }  # fmt: skip


def test_arcap_program_writes_a_table_that_prints_again(mini, tmp_path, capsys):
    evaluation.main([
        "arcap", "--config", str(mini / "mini.toml"), "--model", str(mini / "student"),
        "--questions", str(mini / "questions.jsonl"), "--limit", "3", "--out", str(tmp_path),
    ])
    capsys.readouterr()
    evaluation.main(["table", str(tmp_path / "arcap.json")])
    shown = capsys.readouterr().out
    assert "w/ thinking" in shown and "student" in shown
    assert "-" in shown.splitlines()[2]  # these questions name no gold passages


def test_arcap_without_turns_that_search_is_refused(mini):
    with pytest.raises(ValueError, match="arcap: got --max-turns 0"):
        evaluation.main([
            "arcap", "--config", str(mini / "mini.toml"), "--max-turns", "0",
            "--model", str(mini / "student"),
            "--questions", str(mini / "questions.jsonl"),
        ])


def test_the_program_says_which_commands_it_has():
    with pytest.raises(SystemExit, match="got 'draw', expected arcap, table, compare, plot, or"):
        evaluation.main(["draw", "metrics.jsonl"])


# ---- what a run recorded about its model ----


@pytest.fixture
def own_run(mini, tmp_path, monkeypatch) -> Path:
    """A run with a prompt and passages of its own, named relative to where it was started."""
    (tmp_path / "there" / "data").mkdir(parents=True)
    for name in ("corpus.jsonl", "questions.jsonl", "episodes.jsonl"):
        shutil.copyfile(mini / name, tmp_path / "there" / "data" / name)
    (tmp_path / "there" / "own.txt").write_text("Say at once: {question}")
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "there")
        run(mini, Path("runs/own"), "--phase", "sft", "--epochs", "0.67", "--prompt", "own.txt",
            "--corpus", "data/corpus.jsonl", "--episodes", "data/episodes.jsonl", "--top-k", "2",
            "--max-turns", "1")  # fmt: skip
    return tmp_path / "there" / "runs" / "own"


def settings_of(program, argv: list[str], monkeypatch, capsys) -> tuple[object, str]:
    """The settings that a program loads, and what it says about them."""
    taken, load = [], cli.load

    class Loaded(BaseException):
        pass

    def load_and_stop(*arguments, **options):
        taken.append(load(*arguments, **options))
        raise Loaded

    say_once.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(Loaded):
        patch.setattr(cli, "load", load_and_stop)
        program(argv)
    return taken[0], capsys.readouterr().err


ASKING = {
    "ask": (ask.main, ["ask", "who"]),
    "eval": (evaluation.main, []),
    "arcap": (evaluation.main, ["arcap"]),
    "qagent search": (qagent.main, ["search", "who"]),
    "qagent serve": (qagent.main, ["serve"]),
    "bard ask": (bard.main, ["ask", "who"]),
    "server": (server.main, []),
}


@pytest.mark.parametrize("door", ASKING)
def test_a_model_is_asked_as_its_run_was_from_any_folder(own_run, door, monkeypatch, capsys):
    """It used to be asked with the embedded world's prompt and passages, and to answer nonsense."""
    program, words = ASKING[door]
    there = own_run.parents[1]
    settings, said = settings_of(
        program, [*words, "--model", str(own_run)], monkeypatch, capsys)
    assert settings.prompt == str(there / "own.txt")
    assert settings.corpus == str(there / "data" / "corpus.jsonl")
    assert (settings.top_k, settings.max_turns, settings.max_new_tokens) == (2, 1, 8)
    assert settings.protocol == "search-r1" and settings.max_context_tokens == 200
    assert settings.temperature == 0.0  # how training samples does not carry over
    [line] = [line for line in said.splitlines() if line.startswith("settings of")]
    assert str(own_run / "run.json") in line
    assert "prompt " in line and "corpus " in line and "max_turns 1" in line


def test_flags_win_over_named_presets_over_the_record_over_the_default_preset(
    own_run, tmp_path, monkeypatch, capsys
):
    def settings_with(*flags: str):
        return settings_of(evaluation.main, ["--model", str(own_run), *flags], monkeypatch, capsys)

    preset = tmp_path / "preset.toml"
    preset.write_text('top_k = 7\nmax_turns = 6\nprompt = "short"\n')
    settings, said = settings_with("--config", str(preset), "--max-turns", "5")
    assert (settings.max_turns, settings.top_k, settings.prompt) == (5, 7, "short")
    assert settings.max_obs_tokens == 60  # of the record: the preset does not name it
    assert "max_turns" not in said and "max_obs_tokens 60" in said
    # An index is of its corpus: it does not go with another one.
    record = json.loads((own_run / "run.json").read_text())
    record["settings"]["index"] = record["settings"]["corpus"]
    (own_run / "run.json").write_text(json.dumps(record))
    assert settings_with()[0].index
    assert settings_with("--corpus", str(preset))[0].index == ""


def test_a_path_of_the_record_that_is_gone_is_named_with_the_flag_to_give(own_run, capsys):
    (own_run.parents[1] / "data" / "corpus.jsonl").unlink()
    with pytest.raises(SystemExit):
        evaluation.main(["--model", str(own_run)])
    message = capsys.readouterr().err
    assert "run.json: corpus: got data/corpus.jsonl" in message
    assert "not there any more; give --corpus" in message


def test_a_published_model_is_asked_with_presets_and_flags_which_is_said(
    mini, monkeypatch, capsys
):
    argv = ["--model", str(mini / "student")]
    settings, said = settings_of(evaluation.main, argv, monkeypatch, capsys)
    assert settings.corpus == "world/corpus.jsonl" and settings.prompt == "short"
    assert "student: no run.json, so the settings are those of presets and flags" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"phase": "qagent", "protocol": "qagent"}, "use qagent.py for its models"),
        ({"max_turns": "four"}, "max_turns: got 'four', expected int"),
        ({"prompt": 5}, "prompt: got 5, expected str"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_name(tmp_path, capsys, settings, message):
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(SystemExit):
        evaluation.main(["--model", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_bard_run_is_measured_with_its_prompt_by_eval_and_with_its_budgets_by_bard(
    tmp_path, monkeypatch, capsys
):
    record = {"phase": "bard-rl", "protocol": "search-r1", "prompt": "row", "budgets": [4, 9],
              "budget_text": "At most {budget}."}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"settings": record}))
    argv = ["--model", str(tmp_path)]
    settings, _ = settings_of(evaluation.main, argv, monkeypatch, capsys)
    assert settings.prompt == "row"
    settings, _ = settings_of(bard.main, ["measure", *argv], monkeypatch, capsys)
    assert settings.budgets == (4, 9) and settings.budget_text == "At most {budget}."


def test_a_run_that_is_not_done_is_measured_under_the_name_of_its_state(
    mini, own_run, tmp_path, monkeypatch, capsys
):
    (own_run / "model.safetensors").unlink()
    questions = ["--questions", str(mini / "questions.jsonl"), "--limit", "2"]
    monkeypatch.setattr(config, "ROOT", tmp_path)  # where results are written by default
    evaluation.main(["--model", str(own_run), *questions, "--device", "cpu"])
    result = json.loads((tmp_path / "runs/eval/own-step_000002/result.json").read_text())
    assert result["name"] == "own-step_000002"
    assert result["settings"]["model"].endswith("own/state/step_000002")
    said = capsys.readouterr()
    assert "is unfinished: step 2 of 2" in said.err


# ---- curves ----


def write_log(folder: Path, rows: list[dict], half: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, **row}) for step, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, half]))
    return folder


def test_plot_draws_what_runs_have_logged_while_one_is_writing(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [{"loss/entropy": 0.5, "rollout/score": 0.1, "rollout/searches": None}] * 3
    done = write_log(tmp_path / "dgpo", rows)
    going_on = write_log(tmp_path / "kd", [{"loss/kd": 2.0, "eval/score": 0.1}], '{"step": 2, "lo')
    out = tmp_path / "all.svg"
    evaluation.main(["plot", str(done), str(going_on / "metrics.jsonl"), "--out", str(out)])
    text = out.read_text()
    for name in ("loss/entropy", "rollout/score", "loss/kd", "eval/score"):
        assert f"<!-- {name} -->" in text  # a panel's title
    assert text.count("<!-- dgpo -->") == 2 and text.count("<!-- kd -->") == 2
    assert f"wrote {out}" in capsys.readouterr().out
    evaluation.main(["plot", str(done), "--metrics", "loss/entropy", "--out", str(out)])
    assert "<!-- rollout/score -->" not in out.read_text()


def test_plot_draws_a_panel_of_the_numbers_of_its_metric(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, out: figures.append(figure))
    rows = [{"loss/kd": 2.0, "loss/entropy": 1.0}, {"loss/kd": None}, {"loss/kd": 1.5}]
    curves.plot_metrics([write_log(tmp_path / "kd", rows)], ["loss/kd"], tmp_path / "x.png")
    [panel] = figures[0].axes
    assert [line.get_xydata().tolist() for line in panel.lines] == [[[1, 2.0], [3, 1.5]]]
    curves.load_pyplot().close(figures[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kd", "--metrics", "loss/kl"], "--metrics loss/kl: .*did you mean loss/kd"),
        (["absent"], "absent: got no metrics.jsonl, expected the folder of a run"),
        (["empty"], "got no numbers in .*empty"),
        (["broken"], "metrics.jsonl:1: got no valid JSON"),
    ],
)
def test_plot_refuses_by_name_what_it_cannot_draw(tmp_path, monkeypatch, arguments, message):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "kd", [{"loss/kd": 2.0}])
    write_log(tmp_path / "empty", [])
    write_log(tmp_path / "broken", []).joinpath("metrics.jsonl").write_text("{x\n{}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluation.main(["plot", *arguments])
