"""The experiment on real questions: split, corpus, demonstrations, commands, report.

Made-up questions stand for real ones; the last tests need DGPO_TEST_DATA and DGPO_TEST_ASSETS.

Run: python -m pytest tests/test_real.py
"""

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import Passage, hit, normalize_answer
from experiments import real
from experiments.jobs import ROOT
from experiments.rows import read_json
from infra.files import read_rows
from tests.support.mini import write_rows

RECORDS, PAGE = ROOT / "docs" / "results" / "real", ROOT / "docs" / "results" / "real.md"
GOLD = ("hotpotqa", "2wikimultihopqa", "musique")


def question(number: int | str, **keys: object) -> dict:
    return {"id": f"q{number}", "question": f"Which number has fact {number}?", "dataset": "nq",
            "golden_answers": [f"number {number}"], "split": "", **keys}


def passage(title: str, text: str) -> Passage:
    return Passage("", title, text, 0.0)


# ---- split ----


def test_a_part_follows_from_split_and_id_alone():
    rows = [question(n) for n in range(2000)]
    parts = {row["id"]: real.part_of(row) for row in rows}
    assert parts == {row["id"]: real.part_of({"id": row["id"], "split": ""})
                     for row in reversed(rows)}
    shares = {part: [*parts.values()].count(part) / len(rows) for part in real.PARTS}
    assert shares == pytest.approx({"test": 0.45, "validation": 0.1, "train": 0.45}, abs=0.03)


@pytest.mark.parametrize(("split", "expected"), [
    ("dev", {"test"}), ("train", {"validation", "train"}),
    ("", {"test", "validation", "train"})])
def test_only_rows_without_a_split_are_parted_into_all(split, expected):
    assert {real.part_of(question(n, split=split)) for n in range(200)} == expected


def test_numbers_of_texts_are_spread_and_stay():
    assert real.share("nq_test_946") == real.share("nq_test_946") != real.share("nq_test_947")
    assert real.share("") == 0.0 and all(0 <= real.share(str(n)) < 1 for n in range(99))


def test_a_question_of_the_test_never_trains_by_id_or_text():
    test = question("a", split="dev", question="Who wrote the Moby-Dick?")
    same_text = question("b", split="train", question="who wrote Moby-Dick")
    same_id = question("a", split="train", question="Another?")
    twice = question("c", split="dev", question="WHO WROTE MOBY-DICK?")
    other = question("d", split="train")
    parts = real.split_questions([same_text, same_id, other, test, twice])
    assert parts["test"] == [test]
    assert parts["train"] + parts["validation"] == [other]


# ---- corpus ----


def test_the_corpus_has_each_passage_once_and_lines_keep_their_numbers(tmp_path):
    (tmp_path / "passages").mkdir()
    contents = {"wiki18_sample": ["A\na", "B\nb", "A\na"], "multihop_corpus": ["B\nb", "C\nc"]}
    for name, texts in contents.items():
        write_rows(tmp_path / "passages" / f"{name}.jsonl",
                   [{"id": f"{name}{n}", "contents": text} for n, text in enumerate(texts)])
    by_line, counts = real.write_corpus(tmp_path, tmp_path / "corpus.jsonl")
    corpus = [row for _, row in read_rows(tmp_path / "corpus.jsonl", "passage")]
    assert [row["contents"] for row in corpus] == ["A\na", "B\nb", "C\nc"]
    assert len({row["id"] for row in corpus}) == 3
    assert by_line == contents["wiki18_sample"]
    assert counts == {"wiki18_sample": 3, "multihop_corpus": 2, "corpus": 3}
    row = question(1, metadata={"answer_passage_ids": [1, 2]})
    assert [p.text for p in real.own_passages(row, by_line)] == ["b", "a"]


# ---- gold passages and demonstrations ----

FOUND = [passage(f"T{n}", f"text {n}") for n in range(real.FOUND)]


def with_answer(rank: int) -> list[Passage]:
    return [*FOUND[:rank], passage("Gold", "it is number 7 ."), *FOUND[rank + 1 :]]


@pytest.mark.parametrize(("dataset", "rank", "titles"), [
    ("nq", 0, ["Gold"]),
    ("nq", 7, ["Gold"]),  # one search
    ("hotpotqa_2wiki", 2, ["Gold"]),  # among those shown
    ("hotpotqa_2wiki", 3, ["T0", "Gold"]),  # a second search
])
def test_the_first_passage_with_an_answer_is_gold(dataset, rank, titles):
    row = question(7, dataset=dataset)
    assert [p.title for p in real.gold_paragraphs(row, with_answer(rank), [])] == titles


def test_passages_that_the_row_names_help_where_search_finds_none():
    own = [passage("Own", "number 7"), passage("Other", "number 7")]
    assert real.gold_paragraphs(question(7), FOUND, own) == own[:1]
    assert real.gold_paragraphs(question(7), FOUND, []) == []


def test_an_answer_within_a_word_is_not_found():
    row = question(7, golden_answers=["text"])
    assert real.found_at([passage("T", "context"), passage("T", "a text")], row) == 1
    assert real.found_at([passage("T", "context")], row) is None


def test_supporting_paragraphs_come_in_the_order_that_search_finds_them():
    paragraphs = [{"title": title, "text": "", "is_supporting": title != "T1"}
                  for title in ("Far", "T5", "T1", "T2")]
    gold = real.gold_paragraphs(question(7, context=paragraphs), FOUND, [])
    assert [p.title for p in gold] == ["T2", "T5", "Far"]


def test_each_search_of_a_demonstration_shows_a_gold_passage_and_others_that_are_found():
    gold = [passage("T0", "text 0"), passage("Gold", "number 7")]
    row = question(7, golden_answers=["seven", "number 7"])
    shown = real.demonstrate(row, gold, [FOUND, with_answer(1)])
    blocks = [s["text"] for s in shown["segments"] if s["author"] == "environment"]
    assert len(blocks) == len(gold)
    for block, own in zip(blocks, gold, strict=True):
        assert own.text in block and block.count("Doc ") == real.SHOWN
    assert shown["golden_answers"] == ["number 7"]  # "seven" stands in no gold passage
    assert "<answer> number 7 </answer>" in shown["segments"][-1]["text"]


@pytest.mark.parametrize("gold", [
    [], [passage("T", "no answer")], [passage("T", "number 7")] * (real.MAX_HOPS + 1)])
def test_what_cannot_be_shown_is_no_demonstration(gold):
    assert real.demonstrate(question(7), gold, [FOUND] * len(gold)) is None


# ---- all files ----


def write_data(folder: Path, num: int = 40) -> Path:
    """A folder of questions and passages as `data` reads it, with the embedded facts of mini."""
    for name in ("questions", "gold", "passages"):
        (folder / name).mkdir(parents=True)
    facts = [f"Title {n}\nfact {n} has the number {n}" for n in range(num)]
    write_rows(folder / "passages" / "wiki18_sample.jsonl",
               [{"id": str(n), "contents": text} for n, text in enumerate(facts)])
    write_rows(folder / "passages" / "multihop_corpus.jsonl",
               [{"id": "x", "contents": facts[0]}, {"id": "y", "contents": "Else\nmore"}])
    for name in (*real.SINGLE, "bamboogle", "train_hotpotqa_2wiki"):
        write_rows(folder / "questions" / f"{name}.jsonl", [
            {"id": f"{name}_{n}", "question": f"{name}: which number has fact {n}",
             "golden_answers": [f"number {n}"]} for n in range(num)])
    context = [{"title": f"Title {n}", "text": f"fact {n} has the number {n}",
                "is_supporting": n < 2} for n in range(6)]
    for name in GOLD:
        write_rows(folder / "gold" / f"{name}.jsonl", [
            {"id": f"{name}_{split}", "dataset": name, "split": split, "context": context,
             "question": f"{name} {split}: which number has fact 1",
             "golden_answers": ["number 1"]} for split in ("train", "dev")])
    return folder


def test_data_writes_corpus_index_questions_and_demonstrations(mini, tmp_path, capsys):
    data, out = write_data(tmp_path / "data"), tmp_path / "files"
    real.main(["data", "--data", str(data), "--encoder", str(mini / "encoder"),
               "--out", str(out)])
    parts = {part: [row for _, row in read_rows(out / f"{part}.jsonl", "question")]
             for part in (*real.PARTS, "gold")}
    ids = {part: {row["id"] for row in rows} for part, rows in parts.items()}
    assert ids["gold"] <= ids["train"] and ids["gold"]
    assert not ids["test"] & (ids["train"] | ids["validation"])
    assert {f"{name}_dev" for name in GOLD} <= ids["test"]
    assert {f"bamboogle_{n}" for n in range(40)} <= ids["test"]
    trained = next(row for row in parts["train"] if row["id"] == "hotpotqa_train")
    assert all(paragraph["is_supporting"] for paragraph in trained["context"])
    split = json.loads((out / "split.json").read_text())
    assert split["corpus"] == 41 and split["demonstrations"] == len(parts["gold"])
    assert split["test nq"] == sum(row["dataset"] == "nq" for row in parts["test"])
    assert "a part by hash" in split["rule"]
    assert re.search(r"^ +41  corpus$", capsys.readouterr().out, re.M)
    assert (out / "index").is_dir()


# ---- commands ----


def options(tmp_path: Path, rows: tuple[str, ...] = tuple(real.ROWS)) -> SimpleNamespace:
    return SimpleNamespace(files=tmp_path / "files", encoder="ENC", student=tmp_path / "student",
                           teacher=tmp_path / "large", teacher_layers=None, seeds=[0],
                           runs=tmp_path / "runs", records=tmp_path / "records", rows=rows,
                           presets=real.PRESETS, part="test", first=None, threads=1)


def flag(command: list[str], name: str) -> str:
    """The value of a flag, without its folder; "" if it is not there."""
    return Path(command[command.index(name) + 1]).name if name in command else ""


@pytest.mark.parametrize(("row", "phase", "student", "teacher", "episodes", "questions"), [
    ("teacher", "sft", "large", "", "gold.jsonl", ""),
    ("seqkd", "sft", "student", "", "episodes-2.jsonl", ""),
    ("kd", "kd", "student", "teacher-2", "episodes-2.jsonl", "train.jsonl"),
    ("ppo", "ppo", "kd-2", "", "", "train.jsonl"),
    ("published", "dgpo", "kd-2", "teacher-2", "", "train.jsonl"),
    ("dgpo", "dgpo", "kd-2", "teacher-2", "", "train.jsonl"),
])
def test_a_row_begins_from_its_model_and_learns_from_its_files(
        tmp_path, row, phase, student, teacher, episodes, questions):
    command = real.train_row(row, options(tmp_path), 2)
    names = ("--phase", "--student", "--teacher", "--episodes", "--questions", "--run-dir")
    assert [flag(command, name) for name in names] == [
        phase, student, teacher, episodes, questions, f"{row}-2"]
    assert command[command.index("--seed") + 1] == "2"
    assert ("--index" in command) == bool(questions)


def test_the_two_forms_of_dgpo_differ_in_where_the_guidance_goes(tmp_path):
    o = options(tmp_path)
    exact, published = real.train_row("dgpo", o, 0), real.train_row("published", o, 0)
    preset = tomllib.loads((real.ROOT / "configs/real-smollm2.toml").read_text(encoding="utf-8"))
    assert preset["dgpo"]["kl_in"] == "exact" and flag(exact, "--kl-in") == ""
    assert flag(published, "--kl-in") == "reward"


def test_the_last_layers_of_the_teacher_alone_are_trained_where_asked(tmp_path):
    o = options(tmp_path)
    o.teacher_layers = 8
    assert flag(real.train_row("teacher", o, 0), "--train-layers") == "8"
    assert not any(flag(real.train_row(row, o, 0), "--train-layers") for row in ("seqkd", "kd"))


def test_a_model_is_measured_on_the_test_questions_alone(tmp_path):
    command = real.measure_row("KD", tmp_path / "kd-0", options(tmp_path), tmp_path / "out")
    assert flag(command, "--questions") == "test.jsonl" and flag(command, "--model") == "kd-0"
    assert flag(command, "--index") == "index" and flag(command, "--corpus") == "corpus.jsonl"


def test_an_asked_row_brings_the_rows_that_it_needs(tmp_path):
    jobs = {job.name: job for job in real.row_jobs(("dgpo",), options(tmp_path))}
    assert list(jobs) == ["eval student", "teacher 0", "eval teacher 0", "kd 0", "eval kd 0",
                          "dgpo 0", "eval dgpo 0"]
    assert jobs["dgpo 0"].needs == ("kd 0",) and jobs["kd 0"].needs == ("teacher 0",)
    assert jobs["eval kd 0"].needs == ("kd 0",) and jobs["eval student"].needs == ()
    assert flag(jobs["eval kd 0"].command(), "--model") == "kd-0"
    assert flag(jobs["eval student"].command(), "--model") == "student"
    assert jobs["eval kd 0"].done.name == "kd-0.json"
    assert "--episodes" in jobs["eval kd 0"].command()  # how they end is counted


def test_a_seed_has_rows_of_its_own_and_all_have_one_student(tmp_path):
    o = options(tmp_path)
    o.seeds = [0, 1]
    jobs = {job.name: job for job in real.row_jobs(("kd",), o)}
    assert list(jobs) == ["eval student", "teacher 0", "eval teacher 0", "kd 0", "eval kd 0",
                          "teacher 1", "eval teacher 1", "kd 1", "eval kd 1"]
    assert jobs["kd 1"].needs == ("teacher 1",)
    assert flag(jobs["kd 1"].command(), "--teacher") == "teacher-1"
    assert flag(jobs["eval kd 1"].command(), "--out") == "eval-test-kd-1"
    assert jobs["eval kd 1"].done.name == "kd-1.json"


@pytest.mark.parametrize(("presets", "epochs", "rate"), [
    ((), "4", "0.0002"), (("real-cpu",), "2", "5e-05"),
    (("real-cpu", "real-pair"), "2", "2e-05"),  # the teacher's is 1e-4
])
def test_seqkd_has_the_epochs_and_the_rate_of_kd(tmp_path, presets, epochs, rate):
    o = options(tmp_path)
    o.presets = (*real.PRESETS, *presets)
    command = real.train_row("seqkd", o, 0)
    assert flag(command, "--epochs") == epochs and flag(command, "--kd-lr") == rate
    assert "--epochs" not in real.train_row("teacher", o, 0)


@pytest.mark.parametrize("part", ["test", "validation"])
def test_the_first_questions_of_each_set_are_measured(tmp_path, part):
    o = options(tmp_path)
    o.first, o.files, o.part = 2, tmp_path, part
    rows = [{"id": f"{name}{i}", "dataset": name} for i in range(3) for name in ("nq", "musique")]
    write_rows(tmp_path / f"{part}.jsonl", rows)
    real.write_first(o)
    command = real.measure_row("KD", tmp_path / "kd-0", o, tmp_path / "out")
    kept = Path(command[command.index("--questions") + 1])
    assert [row["id"] for row in real.rows.read_lines(kept)] == ["nq0", "nq1", "musique0",
                                                                 "musique1"]


@pytest.mark.parametrize(("more", "records", "out"), [
    ([], "records", "eval-test-kd-0"),
    (["--first", "5"], "records-test-5", "eval-test-5-kd-0"),
    (["--part", "validation"], "records-validation", "eval-validation-kd-0"),
    (["--part", "validation", "--first", "5"], "records-validation-5", "eval-validation-5-kd-0"),
    (["--first", "5", "--records", "own"], "own", "eval-test-5-kd-0"),
])
def test_other_questions_have_records_and_episodes_of_their_own(more, records, out):
    o = real.parse(["run", "--files", "f", "--student", "s", "--encoder", "e", *more])
    jobs = {job.name: job for job in real.row_jobs(("kd",), o)}
    assert o.records.name == records and jobs["eval kd 0"].done.parent.name == records
    assert flag(jobs["eval kd 0"].command(), "--out") == out


def test_presets_are_added():
    words = ["run", "--files", "f", "--student", "s", "--encoder", "e", "--runs", "r"]
    o = real.parse([*words, "--presets", "real-cpu", "--first", "5"])
    assert o.presets == ("real-smollm2", "real-cpu")
    command = real.train_row("dgpo", o, 0)
    last = command.index("--phase")
    assert [Path(name).name for name in command[2:last]] == ["real-smollm2.toml", "real-cpu.toml"]


def test_a_preset_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        real.parse(["run", "--files", "f", "--student", "s", "--encoder", "e", "--presets", "big"])
    assert "got big, expected a file configs/big.toml" in capsys.readouterr().err


def test_on_a_cpu_a_job_takes_all_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "pick_device", lambda name: "cpu")
    words = ["run", "--files", "f", "--student", "s", "--encoder", "e"]
    jobs = real.row_jobs(("kd",), real.parse(words))
    assert {(job.cores, job.threads) for job in jobs} == {(real.CORES, real.CORES)}
    monkeypatch.setattr(real, "pick_device", lambda name: "cuda")
    jobs = real.row_jobs(("kd",), real.parse(words))
    assert {(job.cores, job.threads) for job in jobs} == {(1, 1)}


@pytest.mark.parametrize("given", [[], ["--teacher", "large"]])
def test_the_teacher_is_a_copy_of_the_student_unless_another_is_given(given):
    o = real.parse(["run", "--files", "f", "--student", "small", "--encoder", "e", *given])
    assert o.teacher.name == (given or ["", "small"])[1] and o.seeds == [0]


# ---- how episodes end ----


@pytest.mark.parametrize(("row", "end"), [
    ({"em": 1.0, "hit": 1.0, "status": "answered", "answer": "seven"}, "right"),
    ({"em": 0.0, "hit": 0.0, "status": "invalid", "answer": None}, "no action"),
    ({"em": 0.0, "hit": 1.0, "status": "max_turns", "answer": None}, "no answer"),
    ({"em": 0.0, "hit": 1.0, "status": "answered", "answer": "The Six"}, "shown, another"),
    ({"em": 0.0, "hit": 1.0, "status": "answered", "answer": "nine"}, "shown, own"),
    ({"em": 0.0, "hit": 0.0, "status": "answered", "answer": "six"}, "not shown, another"),
    ({"em": 0.0, "hit": 0.0, "status": "answered", "answer": "the"}, "not shown, own"),  # no word
])
def test_an_episode_ends_in_one_of_seven_ways(tmp_path, row, end):
    segments = [{"author": "environment", "text": "it is six or seven"},
                {"author": "agent", "text": "nine"}]
    assert real.end_of(row, {"segments": segments}) == end
    write_rows(tmp_path / "result.jsonl", [row] * 2)
    write_rows(tmp_path / "episodes.jsonl", [{"segments": segments}] * 2)
    real.write_json(tmp_path / "record.json",
                    {"row": "kd", "correct": {"nq": "01"}, "s": [0.1234567, 123456.7, 1234567]})
    real.add_ends(tmp_path, tmp_path / "record.json")
    record = real.rows.read_json(tmp_path / "record.json")
    assert record["correct"] == {"nq": "01"}
    assert record["s"] == [0.12346, 123460.0, 1234567]  # five digits, and whole numbers as they are
    assert record["ends"] == {name: 2 * (name == end) for name in real.ENDS}


# ---- report ----


@pytest.mark.parametrize(("folder", "kd", "dgpo"), [
    ("real", "[+0.122, +0.174]", "[-0.019, +0.016]"),
    ("real-pair", "[+0.029, +0.121]", "[-0.008, +0.050]"),
    ("real-pair-all", "[+0.056, +0.112]", "[-0.001, +0.031]"),  # two seeds of KD and DGPO
    ("real-pair-long", "", "[-0.000, +0.042]"),  # 15 steps; the student is among the others
    ("real-pair-gpu", "[+0.097, +0.161]", ""),  # DGPO came to one step, and has no record
])
def test_the_report_of_the_records_says_what_the_page_says(folder, kd, dgpo):
    text, page = real.report(RECORDS.with_name(folder)), PAGE.read_text(encoding="utf-8")
    assert not kd or f"kd - student: average {kd}" in text
    assert not dgpo or f"dgpo - kd: average {dgpo}" in text
    for line in text.split("\n\n")[1].splitlines()[2:]:  # of the first table, a row of the page
        cells = re.split(r"  +", line)
        assert f"| {' | '.join(cells)} |" in page, cells
    for low, high in re.findall(r"average \[([+-][\d.]+), ([+-][\d.]+)\]", text):
        assert f"[{low}, {high}]" in page


def test_the_page_s_first_table_has_the_averages_of_its_records():
    rows = PAGE.read_text(encoding="utf-8").partition("<!-- three runs -->")[2].split("\n\n")[0]
    folders = ("real", "real-pair", "real-pair-gpu")
    for name, row in zip(("student", *real.ROWS), rows.splitlines()[4:], strict=True):
        for folder, cell in zip(folders, row.split(" | ")[1:], strict=True):
            record = RECORDS.with_name(folder) / f"{name}-0.json"
            shown = "not measured"
            if record.exists():
                shown = f"{read_json(record)['average']['em']:.3f}"
            assert cell.removesuffix(" |") == shown, (name, folder)


def test_the_page_s_counts_of_failures_are_those_of_the_records():
    page = PAGE.read_text(encoding="utf-8")
    ends = [json.loads((RECORDS / f"{name}-0.json").read_text())["ends"]
            for name in ("student", *real.ROWS) if name != "published"]  # only of the pair
    assert all(sum(counts.values()) == 773 for counts in ends)
    for end in real.ENDS:
        assert f"| {' | '.join(str(counts[end]) for counts in ends)} |" in page, end


def test_a_kind_of_sets_is_the_mean_of_its_sets():
    lines = real.report(RECORDS).split("\n\n")[3].splitlines()
    assert lines[0].split()[:2] == ["single-hop", "multi-hop"]
    kd = next(re.split(r"  +", line) for line in lines if line.startswith("KD"))
    sets = read_json(RECORDS / "kd-0.json")["sets"]
    assert float(kd[1]) == pytest.approx((sets["nq"]["em"] + sets["triviaqa"]["em"]) / 2, abs=5e-4)
    assert float(kd[2]) == pytest.approx(
        sum(sets[name]["em"] for name in real.MULTI) / 4, abs=5e-4)


def test_no_records_are_said_with_what_makes_them(tmp_path):
    with pytest.raises(RuntimeError, match="experiments.real run makes them"):
        real.report(tmp_path)


# ---- the real folder ----


@pytest.mark.real
def test_the_real_questions_are_split_as_the_page_says(real_data):
    parts = real.split_questions(real.read_questions(real_data))
    counts = {name: sum(row["dataset"] == name for row in parts["test"])
              for name in (*real.SINGLE, *real.MULTI)}
    sets = read_json(RECORDS / "kd-0.json")["sets"]
    assert counts == {name: row["n"] for name, row in sets.items()}
    test = {normalize_answer(row["question"]) for row in parts["test"]}
    assert len(test) == len(parts["test"]) == 773
    for part in real.PARTS[1:]:
        assert not test & {normalize_answer(row["question"]) for row in parts[part]}


@pytest.mark.real
@pytest.mark.slow
def test_a_part_of_the_real_folder_becomes_files(real_data, real_assets, tmp_path):
    """The first 60 passages; questions that name no later ones."""
    data, out = tmp_path / "data", tmp_path / "files"
    for name in ("questions", "gold", "passages"):
        (data / name).mkdir(parents=True)
    for path in real_data.glob("*/*.jsonl"):
        rows = [row for _, row in read_rows(path, "row")][:60]
        rows = [row for row in rows
                if max(row.get("metadata", {}).get("answer_passage_ids", []), default=0) < 60]
        write_rows(data / path.parent.name / path.name, rows)
    real.prepare(data, str(real_assets / "all-minilm-l6-v2"), out)
    shown = [row for _, row in read_rows(out / "gold.jsonl", "episode")]
    assert shown and len(shown) == json.loads((out / "split.json").read_text())["demonstrations"]
    for episode in shown:
        blocks = [passage("", s["text"]) for s in episode["segments"]
                  if s["author"] == "environment"]
        assert hit(blocks, episode["golden_answers"])
