"""What the parts hand to each other: commands, numbers, files and models that reach the next one.

Small wrong changes to these lines broke no other test (tests/mutants.py).

Run: python -m pytest tests/test_wiring.py
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import bard
import eval as evaluation
import qagent
from data import Passage, Question, parse_question
from episode import Episode, Segment, parse_action
from experiments import bard as reproduce_bard
from experiments import bench, engines, jobs, plots, reproduce
from experiments import qagent as reproduce_qagent
from infra import checkpoint, cli, config, curves, files, fingerprint, parts
from infra.collapse import signs_of_collapse
from infra.memory import memory_report
from infra.parallel import micro_batches
from infra.run import Run, RunSettings, Stop, launch
from model import Critic, Decoder, DecoderConfig, load_decoder, load_encoder
from qagent import QAgentSettings
from session import Task, open_session, open_student
from settings import TrainSettings
from tests.support.mini import read_rows, write_rows
from tests.support.runs import Spy
from tokenizer import Tokenizer
from world import build, embedding, prepare, pretrain, trails, vocabulary
from world.encyclopaedia import by_name, by_title, make_corpus, make_entities
from world.expert import MAX_SEARCHES, expert_episodes
from world.files import SEED, WORLD, read_jsonl
from world.practice import pretrain_rows

# ---- runs ----


def test_a_run_saves_in_the_steps_that_are_due_and_once_at_its_end(tmp_path, monkeypatch):
    spy = Spy(monkeypatch, checkpoint, "save_state")
    settings = RunSettings(phase="kd", run_dir=str(tmp_path), save_every=2, device="cpu")
    run, network = Run(settings, 0, 1, torch.device("cpu")), torch.nn.Linear(2, 2)
    run.prepare_folder()
    run.start(4, 8, {"student": network})
    for step in range(1, 5):
        run.log(step, {"loss/kd": 0.1}, num_tokens=1, passes=1)
    run.finish(network, lambda tensors: None)
    assert [arguments[3]["step"] for arguments, _, _ in spy.calls] == [2, 4]


def test_a_launch_sets_the_seed_and_ends_with_what_a_person_can_do(tmp_path):
    settings = RunSettings(phase="kd", run_dir=str(tmp_path), seed=77, device="cpu")
    seen = []
    launch(settings, lambda run: seen.append((torch.initial_seed(), run.rank, run.num_processes)))
    assert seen == [(77, 0, 1)]

    def full(run: Run) -> None:
        raise MemoryError

    with pytest.raises(Stop, match="out of memory"):
        launch(settings, full)


def test_memory_is_told_by_what_is_held():
    decoder = SimpleNamespace(
        config=SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=4),
        head_weight=torch.zeros(1))

    class Network(torch.nn.Linear):
        config, head_weight, compute_dtype = decoder.config, decoder.head_weight, None

    network = Network(2**18, 2**10, bias=False, device="meta")  # 1 GiB
    adam = torch.optim.AdamW(network.parameters())
    adam.state[network.weight] = {"exp_avg": torch.empty(2**27, device="meta")}  # half of one
    settings = SimpleNamespace(shard="none", micro_batch_tokens=9, max_context_tokens=2**16,
                               rollout_rows=2**10)
    report = memory_report(2**33, {"student": network}, {"student": adam}, settings)
    sizes = [float(line.split()[0]) for line in report.splitlines()[1:]]
    # 2 * 2 * 3 * 4 floats a slot; what is left of 8 GiB; weights and gradients, and Adam.
    assert sizes == [12.0, 5.5, 2.5]
    network.requires_grad_(False)  # without gradients, and moments are as they are
    report = memory_report(2**33, {"student": network}, {"student": adam}, settings)
    assert [float(line.split()[0]) for line in report.splitlines()[1:]] == [12.0, 6.5, 1.5]
    network.requires_grad_(True)
    network.compute_dtype = torch.bfloat16  # that of the cache
    report = memory_report(2**33, {"student": network}, {"student": adam}, settings)
    assert [float(line.split()[0]) for line in report.splitlines()[1:]] == [6.0, 5.5, 2.5]


def begin(tmp_path: Path) -> Run:
    settings = RunSettings(phase="kd", run_dir=str(tmp_path / "run"), device="cpu")
    return Run(settings, 0, 1, torch.device("cpu"))


def test_parts_are_made_once_and_joined_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_SIZE", 4)
    out, made = tmp_path / "all.jsonl", []

    def write(part: Path, start: int, end: int) -> None:
        made.append((start, end))
        write_rows(part, [{"n": n} for n in range(start, end)])

    def join(seed: int, write=write, keep=lambda row: row["n"] % 3) -> None:
        settings = SimpleNamespace(seed=seed, rollout_rows=len(made))  # the latter is not named
        parts.write_in_parts(
            begin(tmp_path), out, 10, settings, ["seed"], write, keep, "it")

    def fail(part: Path, start: int, end: int) -> None:
        if start == 8:
            raise InterruptedError
        write(part, start, end)

    with pytest.raises(InterruptedError):
        join(5, fail)
    first, second = sorted(tmp_path.glob("all.jsonl.*.part*"))
    first.unlink()
    made.clear()
    join(5)
    assert made == [(0, 4), (8, 10)]  # the second was there
    assert [row["n"] for row in read_rows(out)] == [1, 2, 4, 5, 7, 8]
    assert [*tmp_path.glob("*.part*")] == []
    assert json.loads((tmp_path / "all.jsonl.json").read_text())["made_with"] == {"seed": 5}
    with pytest.raises(InterruptedError):
        join(5, fail)
    made.clear()
    join(6)  # parts of other settings are neither taken nor lost
    assert made == [(0, 4), (4, 8), (8, 10)]
    left = sorted(tmp_path.glob("*.part*"))
    assert [path.name for path in left] == [first.name, second.name]
    with pytest.raises(ValueError, match="got 0 correct episodes of 10.*check it"):
        join(7, keep=lambda row: False)


def test_a_fingerprint_depends_on_files_and_values(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("corpus", "teacher"):  # any folder, and a model's
        def made(seed: int, name=name) -> dict:
            return fingerprint.contents({name: str(folder), "seed": seed})

        (folder / "a.json").write_text("1")
        first = made(1)
        assert first == made(1) != made(2)
        (folder / "a.json").write_text("2")
        assert made(1)[name] != first[name]


# ---- sessions and episodes ----


def test_a_session_sets_apart_what_settings_say(mini):
    def open_with(val_size: int) -> tuple[list, list]:
        settings = TrainSettings(
            questions=str(mini / "questions.jsonl"), val_size=val_size, max_turns=0)
        session = open_session(settings, torch.device("cpu"), Task())
        assert session.retriever is None
        return session.questions, session.val_questions

    for val_size, num in ((0, 0), (1, 1), (2, 2), (256, 2)):  # at most a tenth
        training, held_out = open_with(val_size)
        assert (len(training), len(held_out)) == (24 - num, num)
        assert len({q.id for q in (*training, *held_out)}) == 24


def test_a_student_is_opened_as_settings_say(mini, tmp_path):
    for checkpointing in (False, True):
        settings = TrainSettings(student=str(mini / "student"), checkpointing=checkpointing,
                                 run_dir=str(tmp_path / str(checkpointing)))
        run = Run(settings, 0, 1, torch.device("cpu"))
        run.prepare_folder()
        run.date = "2020-02-03"  # of the run's first start
        student = open_student(run, settings)
        assert student.tokenizer.date == run.date
        assert student.decoder.checkpointing == checkpointing
        assert Critic.from_decoder(student.decoder).backbone.checkpointing == checkpointing
        run.write_record()
        names = {path.name for path in run.dir.iterdir()}
        assert {"run.json", "config.json", "tokenizer.json"} <= names
        assert "model.safetensors" not in names  # which says that a run is complete


def test_the_first_action_of_a_turn_ends_at_its_own_tag():
    for first, second in (("a", "b"), ("<a>", "</b>")):
        text = f"<search>{first}</search><search>{second}</search>"
        assert parse_action(text).content == first
        text = f"<answer>{first}</answer>{second}</answer>"
        assert parse_action(text).content == first


def test_what_an_environment_writes_is_no_thinking(mini):
    tokenizer = Tokenizer.load(mini / "student")
    segments = [Segment(author, tokenizer.encode(text)) for author, text in (
        ("prompt", "<think>12</think>"), ("agent", "<think>345</think>"),
        ("environment", "<think>6789</think>"), ("agent", "<think>01"))]
    episode = Episode(Question("q", "?", ("1",), "t"), segments)
    assert bard.num_thinking_tokens(episode, tokenizer) == 3 + 2


@pytest.mark.parametrize(("form", "length", "expected"), [
    ("multiplicative", 8, 0.96), ("multiplicative", 11, 0.6), ("multiplicative", 13, 0.0),
    ("additive", 8, 1 + 0.7 * 0.96), ("additive", 11, 1 + 0.7 * 0.6), ("l1_max", 8, 0.3 + 0.2),
])
def test_every_setting_of_bards_reward_arrives(mini, form, length, expected):
    tokenizer = Tokenizer.load(mini / "student")
    settings = bard.BardSettings(budget_reward=form, budget_tolerance=0.25, budget_use=0.2,
                                 budget_weight=0.7, l1_alpha=0.1, l1_delta=0.3)
    question = bard.tell(Question("q", "?", ("1",), "t"), 10, "")
    text = f"<think>{'x' * length}</think><answer>1</answer>"
    episode = Episode(question, [Segment("agent", tokenizer.encode(text))], "answered", "1")
    assert bard.reward(episode, tokenizer, settings) == pytest.approx(expected)


def test_rows_without_ids_are_counted_from_0(tmp_path):
    row = {"question": "who?", "golden_answers": ["x"]}
    (tmp_path / "nq").mkdir()
    write_rows(tmp_path / "nq" / "test.jsonl", [row, row])
    assert prepare.convert([tmp_path / "nq" / "test.jsonl"], tmp_path / "out", drop="") == 2
    assert [row["id"] for row in read_rows(tmp_path / "out")] == ["nq_test_0", "nq_test_1"]


def test_a_pass_may_be_just_full():
    assert micro_batches([5, 5, 5], 10) == [[0, 1], [2]]
    assert micro_batches([20, 20, 1], 40) == [[0, 1], [2]]
    assert micro_batches([9, 4, 4, 4], 8, [3, 1, 2]) == [[3, 1], [2]]


@dataclass
class Numbers:
    sizes: tuple[int, ...] = config.setting((), "some sizes")


def test_numbers_may_stand_between_commas():
    for flags in (["16,32", "64"], ["16", "32", "64"], ["16,32,64"]):
        got = cli.load(Numbers, ["--config", "none", "--sizes", *flags], prog="p.py",
                       description="")
        assert got.sizes == (16, 32, 64)


def test_a_panic_is_blamed_on_the_file_and_a_wish_to_stop_is_not(tmp_path):
    class Panic(BaseException):
        """As libraries in Rust raise it."""

    with pytest.raises(ValueError, match="x.json: got Panic: no; expected a tokenizer"):
        with files.blaming(tmp_path / "x.json", "a tokenizer"):
            raise Panic("no")
    with pytest.raises(KeyboardInterrupt):
        with files.blaming(tmp_path / "x.json", "a tokenizer"):
            raise KeyboardInterrupt


def test_the_question_of_a_prompt_is_its_last():
    prompt = [{"role": "user", "content": "Question: 1 + 1? Answer: 2. Question: who?"}]
    row = {"prompt": prompt, "golden_answers": ["x"]}
    assert parse_question(row, "nq", "0", "here").question == "who?"


# ---- networks and tokenizers ----


def test_queries_and_passages_are_embedded_with_their_own_prefixes():
    encoder = load_encoder(WORLD / "encoder")
    assert encoder.prefixes["query"] != encoder.prefixes["passage"]
    for kind, prefix in encoder.prefixes.items():
        with torch.no_grad():
            expected = encoder(*encoder.encode([f"{prefix}Silver Harbor"]))
        torch.testing.assert_close(encoder.embed(["Silver Harbor"], kind=kind), expected)


def test_the_epsilon_of_a_checkpoints_norms_is_its_own():
    config = DecoderConfig({**pretrain.decoder_config(1, 8, 1), "rms_norm_eps": 0.25})
    norms = [m for m in Decoder(config).modules() if isinstance(m, torch.nn.RMSNorm)]
    assert {norm.eps for norm in norms} == {0.25} and len(norms) == 3


def test_templates_leave_out_the_line_ends_of_their_blocks(mini, tmp_path):
    """As transformers renders them."""
    shutil.copytree(mini / "student", tmp_path / "model")
    template = "{% for m in messages %}\n  {% if true %}\n[{{ m.content }}]\n  {% endif %}\n"
    template += "{% endfor %}\n"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "a"}])) == "[a]\n"


# ---- collapse ----


def scores(*values: float, **others: float) -> list[dict]:
    return [{"rollout/score": value, "rollout/max_tokens": 0.0, "rollout/invalid": 0.0, **others}
            for value in values]


def test_a_collapse_is_told_by_its_numbers():
    high, low = [0.8] * 5, [0.3] * 5
    text = signs_of_collapse(scores(*high, *low), 1000)
    assert text.startswith("the score fell from 0.800 (steps 1 to 5) to 0.300")
    assert not signs_of_collapse(scores(*high, *[0.5] * 5), 1000)  # more than half is left
    assert not signs_of_collapse(scores(*high[:4], *low), 1000)  # too few steps to say
    assert not signs_of_collapse(scores(*high, *low), 2)  # chance, with two questions a step
    assert not signs_of_collapse(scores(*low, *high), 1000)
    fallen = signs_of_collapse(scores(*high, *[0.41] * 5, 0.38), 1000)
    assert "to 0.404" not in fallen and not fallen  # the mean of five steps counts


def test_episodes_without_an_action_are_of_both_kinds():
    before, after = scores(*[0.5] * 5), scores(*[0.5] * 5)
    for row in after:
        row["rollout/max_tokens"], row["rollout/invalid"] = 0.3, 0.4
    assert "episodes without an action rose from 0.00 to 0.70" in signs_of_collapse(
        [*before, *after], 100)
    for row in before:
        row["rollout/invalid"] = 0.3
    assert not signs_of_collapse([*before, *after], 100)  # it has seldom acted before, either


# ---- measures ----


def test_two_results_are_compared_in_their_order(tmp_path, capsys):
    for name, em in (("a", 1.0), ("b", 0.0)):
        rows = [{"set": "nq", "id": str(i), "em": em} for i in range(4)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        (tmp_path / f"{name}.json").write_text("{}")
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    evaluation.main(["compare", *files])
    assert "+1.0000" in capsys.readouterr().out
    evaluation.main(["compare", files[1], "--against", files[0], files[0]])
    assert "-1.0000" in capsys.readouterr().out


def test_a_remote_generator_is_asked_as_settings_say(monkeypatch):
    asked, pauses = [], []

    def urlopen(request, timeout):
        asked.append((timeout, json.loads(request.data)["max_tokens"]))
        if len(asked) < 4:
            raise OSError("busy")
        return io.BytesIO(json.dumps({"choices": [{"message": {"content": "Ann"}}]}).encode())

    monkeypatch.setattr(qagent.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(qagent.time, "sleep", pauses.append)
    settings = QAgentSettings(
        generator="http://there", generator_tokens=7, generator_timeout_s=3.0, generator_tries=4)
    ask = qagent.remote_generator(settings)
    assert ask([Question("q", "?", (), "t")], [[Passage("1", "T", "x", 1.0)]]) == ["Ann"]
    assert asked == [(3.0, 7)] * 4 and pauses == [0.5, 1.0, 2.0]


# ---- experiments ----


def test_jobs_of_training_can_be_interrupted():
    job = jobs.train_job("kd", "kd", Path("runs/kd"), "--seed", "3", needs=("e",), processes=2)
    command = job.command()
    assert command[-7:] == ["--phase", "kd", "--run-dir", "runs/kd", "--resume", "--seed", "3"]
    assert command[-8] == "train.py" and command[command.index("--nproc-per-node") + 1] == "2"
    assert (job.done, job.needs, job.cores) == (Path("runs/kd/model.safetensors"), ("e",), 2)


def test_a_job_of_two_processes_runs_alone(tmp_path):
    """The demonstration trains in two processes, on two cores."""
    def leave(name: str) -> jobs.Job:
        done = tmp_path / name
        return jobs.Job(name, lambda: [], done, cores=2, after=done.touch)

    jobs.run_jobs([leave("a"), leave("b")], tmp_path / "logs")
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


@pytest.mark.parametrize(("num_steps", "minutes", "collapsed"), [
    (3, 0, False), (2, 0, True), (2, 2.5, False)])
def test_a_run_has_collapsed_if_steps_are_missing(tmp_path, num_steps, minutes, collapsed):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir(), out.mkdir()
    settings = {"phase": "dgpo", "steps": 3, "max_minutes": minutes}
    (model / "run.json").write_text(json.dumps({"settings": settings}))
    for name in ("metrics", "perf"):
        steps = [{"step": n, "seconds": 1, "peak_gpu_gib": 5 - n} for n in range(num_steps)]
        write_rows(model / f"{name}.jsonl", steps)
    (out / "result.json").write_text('{"settings": {}}')
    write_rows(out / "result.jsonl", [{"set": "nq", "em": 1.0}])
    reproduce.write_record("dgpo", 0, model, out, tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["collapsed"] == collapsed and record["peak_gib"] == {"gpu": 5}


def test_a_generators_answers_are_compared_with_its_own():
    run = {"row": "naive", "seed": None, "correct": {"small": {"nq": "0"}, "large": {"nq": "1"}},
           "average": {"em small": 0.1, "em large": 0.2}}
    for label, digit, em in (("small", "0", 0.1), ("large", "1", 0.2)):
        records = reproduce_qagent.generator_records([run], label, [3, 4])
        assert [record["seed"] for record in records] == [3, 4]
        assert all(r["correct"] == {"nq": digit} and r["average"]["em"] == em for r in records)


def test_the_best_peer_is_the_fastest_of_the_others():
    rows = [{"implementation": name, "seconds": seconds} for name, seconds in (
        ("ours", 2.0), ("ours, other", 6.0), ("slow", 9.0), ("fast", 4.0))]
    bench.add_best_peer(rows)
    assert [(row.get("best_peer"), row.get("of_best_peer")) for row in rows] == [
        ("fast", 0.5), ("fast", 1.5), (None, None), (None, None)]


def test_arcap_is_measured_on_two_hundred_questions_a_set(tmp_path):
    pair = reproduce.Pair(tmp_path / "runs", tmp_path / "records")
    evaluate, arcap = reproduce.measure_jobs(pair, "kd", 0, "KD", Path("runs/kd-0"))
    assert "--limit" not in evaluate.command()
    assert arcap.command()[1] == "arcap" and arcap.command()[-2:] == ["--limit", "200"]
    assert arcap.needs == (evaluate.name,)


def test_accuracies_of_bard_are_compared_seed_by_seed():
    def runs(*digits: str) -> list[dict]:
        return [{"seed": seed, "correct": {str(b): text for b in reproduce_bard.MEASURED}}
                for seed, text in enumerate(digits)]

    text = reproduce_bard.accuracy_differences(runs("11", "00"), runs("00"))
    assert text.startswith("38 +1.000!") and text.endswith("average +1.000!")
    assert reproduce_bard.accuracy_differences(runs("00"), runs("11")).startswith("38 -1.000!")


@pytest.fixture
def figures(monkeypatch) -> list:
    """What pictures would be saved."""
    pytest.importorskip("matplotlib")
    kept = []
    for module in (plots, curves):
        monkeypatch.setattr(module, "save", lambda figure, out: kept.append(figure))
    return kept


def lines_of(axis) -> list[tuple]:
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
            for line in axis.get_lines()]


def test_curves_show_the_numbers_of_their_runs(tmp_path, figures):
    for name, rows in (
        ("kd-0", [{"step": 1, "eval/score": 0.1}, {"step": 2}, {"step": 3, "eval/score": 0.2}]),
        ("dgpo-0", [{"step": 1, "rollout/score": 0.3}, {"step": 2, "eval/score": 0.5}]),
        ("dgpo-1", [{"step": 1, "rollout/score": 0.4}, {"step": 2, "eval/score": 0.6}]),
    ):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", rows)
    curves.plot_curves(sorted(tmp_path.glob("*/metrics.jsonl")), "x.png")
    left, right = figures[0].axes
    assert (left.get_title(), right.get_title()) == ("distillation", "reinforcement")
    assert lines_of(left) == [([1, 3], [0.1, 0.2])]
    assert lines_of(right) == [([1], [0.3]), ([2], [0.5]), ([1], [0.4]), ([2], [0.6])]
    names = [text.get_text() for text in right.get_legend().get_texts()]
    assert names == ["dgpo"]
    assert len({line.get_color() for line in right.get_lines()}) == 1


def test_budgets_rewards_and_growth_are_drawn_as_they_are(tmp_path, figures):
    budgets = {"8": {"accuracy": 0.5, "length": 7.0}, "16": {"accuracy": 0.6, "length": 9.0}}
    (tmp_path / "b.json").write_text(json.dumps({"name": "BARD", "budgets": budgets}))
    plots.plot_budgets([tmp_path / "b.json"], "x.png")
    accuracy, length = figures[-1].axes
    assert lines_of(accuracy) == [([8, 16], [0.5, 0.6])]
    assert lines_of(length) == [([8, 16], [7, 9]), ([8, 16], [8, 16])]
    plots.plot_rewards("x.png", budget=10)
    lines = {line.get_label(): y for line, (_, y) in zip(
        figures[-1].axes[0].get_lines(), lines_of(figures[-1].axes[0]), strict=True)}
    assert lines["multiplicative"][10] == 1.0 and lines["additive"][10] == 1.5
    assert lines["l1_max, alpha 0.01"][10] == 0.5 and lines["multiplicative, use 0.1"][0] == 0.9
    plots.plot_growth([{"axis": "rows", "x": x, "seconds": x / 2, "peak_bytes": 3} for x in (1, 4)],
                      "x.png")
    assert lines_of(figures[-1].axes[0]) == [([1, 4], [1, 4]), ([1, 4], [1, 4]), ([1, 4], [1, 1])]


def test_lengths_of_turns_are_ragged_and_bounded():
    lengths = np.array(engines.ragged(200, 3, 20, 5, 40))
    assert lengths.shape == (200, 3) and (lengths.min(), lengths.max()) == (5, 40)
    assert 15 < np.median(lengths) < 25


def test_a_token_in_the_cache_has_keys_and_values():
    weights = engines.Weights("x", Path(), engines.SHAPES["tiny-qwen2"], 0)
    assert weights.bytes_of_a_token == 2 * 2 * 2 * 2 * 16  # bytes, both, layers, heads, width


# ---- the world's models ----


@pytest.fixture
def built(tmp_path, monkeypatch) -> list:
    """Runs of sft that a builder would start; what they would leave is a copy of the start."""
    runs = []

    def sft(start, texts, end, *, lr, epochs=1, **options):
        runs.append((start.name, texts.stem, end.name, lr, epochs))
        shutil.copytree(start, end)

    for name in ("TRAILS", "SCRATCH", "READERS"):
        monkeypatch.setattr(build, name, tmp_path / name.lower())
    for name in ("config.json", "model.safetensors"):
        assert (WORLD / "student" / name).is_file()
    monkeypatch.setattr(build, "sft", sft)
    monkeypatch.setattr(pretrain, "sft", sft)
    monkeypatch.setattr(pretrain, "SCRATCH", tmp_path / "scratch")
    return runs


def test_models_of_trails_are_built_from_each_other(built, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_write_trails", lambda: False)
    spy = Spy(monkeypatch, build, "load_decoder")
    build.build_trails()
    assert built == [
        ("student-0", "roads", "student-1", 2e-3, 1),
        ("student-1", "numbers", "student-2", 2e-3, 1),
        ("teacher-0", "demonstrations", "teacher-1", 1.5e-3, 1)]
    assert [arguments[0].name for arguments, _, _ in spy.calls] == [
        "student-2", "student-1", "teacher-1"]
    layers = [load_decoder(tmp_path / "trails" / name).config.num_layers
              for name in ("student", "teacher")]
    assert layers == [3, 6]


def test_student_and_teacher_are_built_from_each_other(built, tmp_path, monkeypatch):
    shutil.copytree(WORLD / "student", tmp_path / "scratch" / "tokenizer")
    monkeypatch.setattr(build, "WORLD", tmp_path / "world")
    rows = [{"id": str(i)} for i in range(1200)]
    write_rows(tmp_path / "scratch" / "demonstrations.jsonl", rows)
    build.build_models(seed=3)
    assert built == [
        ("student-0", "copying", "student-1", 3e-3, 1),
        ("student-1", "reading", "student-2", 3e-3, 1),
        ("student-2", "glimpses", "student-3", 2e-3, 1),
        ("teacher-0", "demonstrations", "teacher", 2e-3, 1)]
    glimpses = {row["id"] for row in read_rows(tmp_path / "scratch" / "glimpses.jsonl")}
    assert len(glimpses) == 1100
    sizes = [load_decoder(tmp_path / "world" / name).config for name in ("student", "teacher")]
    assert [config.num_layers for config in sizes] == [3, 6]
    # The teacher begins as the student did before it saw demonstrations.
    student, teacher = (load_file(tmp_path / "world" / name / "model.safetensors")
                        for name in ("student", "teacher"))
    assert all(torch.equal(teacher[name], tensor) for name, tensor in student.items())


def test_readers_are_built_from_student_teacher_and_the_small_one(built, tmp_path):
    (tmp_path / "readers").mkdir()
    for name in ("reading", "memory", "recalling"):
        (tmp_path / "readers" / f"{name}.jsonl").touch()
    build.build_readers()
    assert built == [
        ("student", "reading", "small", 2e-3, 2), ("teacher", "reading", "large", 2e-3, 2),
        ("small", "qagent", "qagent-agent", 2e-3, 1),
        ("small", "search-r1", "search-r1-agent", 2e-3, 1),
        ("small", "memory", "memory", 2e-3, 1),
        ("memory", "recalling", "recalling-agent", 2e-3, 1)]


def test_a_pretraining_run_is_a_command_of_train_py(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(pretrain.subprocess, "run", lambda command, **_: commands.append(command))
    options = {"batch_size": 5, "lr": 0.25, "processes": 3, "epochs": 2}
    pretrain.sft(tmp_path / "a", tmp_path / "t.jsonl", tmp_path / "b", **options)
    [command] = commands
    assert command[command.index("--nproc-per-node") + 1] == "3"
    flags = command[command.index(str(pretrain.ROOT / "train.py")) + 1 :]
    settings = cli.load(TrainSettings, flags, prog="train.py", description="")
    assert (settings.phase, settings.resume, settings.batch_size) == ("sft", True, 5)
    assert (settings.kd_lr, settings.epochs, settings.kd_warmup_steps) == (0.25, 2.0, 40)
    assert (settings.student, settings.run_dir) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert (settings.episodes, settings.eval_every) == (str(tmp_path / "t.jsonl"), 0)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").touch()
    pretrain.sft(tmp_path / "a", tmp_path / "t.jsonl", tmp_path / "b", **options)
    assert len(commands) == 1  # it is complete


def test_the_two_tokenizers_of_the_world_are_of_the_published_kinds(tmp_path):
    texts = ["<search> Silver Harbor </search>", "Who wrote the novel Silver Harbor?"] * 3
    vocabulary.build_decoder_tokenizer(texts, tmp_path / "decoder")
    decoder = Tokenizer.load(tmp_path / "decoder")
    assert decoder.full.token_to_id("<|im_end|>") == decoder.eos_id != decoder.pad_id
    assert decoder.full.token_to_id("<|endoftext|>") == decoder.pad_id
    assert len(decoder.control_ids) == 3
    unseen = "\u00e9\u4e16\x07"
    assert decoder.decode(decoder.encode(unseen)) == unseen
    ids = decoder.chat([{"role": "user", "content": "hi"}])
    shown = decoder.decode(ids, skip_special=False)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    vocabulary.build_encoder_tokenizer(texts, tmp_path / "encoder")
    encoder = vocabulary.Tokenizer.from_file(str(tmp_path / "encoder" / "tokenizer.json"))
    first, second = (encoder.encode(text).tokens for text in ("SILVER harbor", "silver harbor"))
    assert first == second and (first[0], first[-1]) == ("[CLS]", "[SEP]")


@pytest.fixture(scope="module")
def entities() -> dict:
    return make_entities(SEED)


def test_the_encoder_of_the_world_is_trained_on_queries_and_their_passages(entities, monkeypatch):
    corpus, encoder = make_corpus(entities, SEED), load_encoder(WORLD / "encoder")
    monkeypatch.setattr(embedding, "NUM_STEPS", 2)
    monkeypatch.setattr(embedding, "BATCH_SIZE", 30)
    losses, texts = Spy(monkeypatch, F, "cross_entropy"), Spy(monkeypatch, encoder, "encode")
    embedding.train_encoder(encoder, entities, corpus, seed=0)
    for step in range(2):
        (queries,), (passages,) = (call[0] for call in texts.calls[2 * step : 2 * step + 2])
        logits, targets = losses.calls[step][0]
        assert len(queries) == len(passages) == 30
        assert all(text.startswith("query: ") for text in queries)
        assert all(text.startswith('passage: "') for text in passages)
        titles = [text.removeprefix('passage: "').partition('"')[0] for text in passages]
        names = [entities[title].name for title in titles]
        assert all(names.count(name) == 3 for name in names)
        assert targets.tolist() == list(range(30))
        # Some queries are words of their passage's text, which are not in its title.
        words = [{*text.partition("\n")[2].split()} for text in passages]
        told = [{*query.removeprefix("query: ").split()} for query in queries]
        shared = [len(a & b - {*title.split()}) for a, b, title in
                  zip(told, words, titles, strict=True)]
        assert sum(count > 3 for count in shared) >= 2
    logits = losses.calls[0][0][0]  # of the shipped encoder, over the temperature
    assert (logits.argmax(1) == torch.arange(30)).float().mean() > 0.5
    assert 5 < logits.diagonal().mean() <= 1 / embedding.TEMPERATURE


def test_queries_of_the_encoders_training_are_of_four_kinds(entities):
    entity = next(e for e in entities.values() if e.kind == "novel")
    rng, kinds = embedding.random.Random(0), {"name": 0, "kind": 0, "relation": 0, "text": 0}
    for _ in range(2000):
        query = embedding.training_query(entity, "it stands in the shop window", rng)
        rest = query.removeprefix(entity.name).strip()
        kind = "relation" if rest.startswith("novel ") else "text"
        kinds[{"": "name", "novel": "kind"}.get(rest, kind)] += 1
    shares = [count / 2000 for count in kinds.values()]
    assert shares == pytest.approx([0.25, 0.4, 0.15, 0.2], abs=0.04)


# ---- the world's texts ----


class Shelf:
    """A retriever whose passage is that of a title, which is a function of the query."""

    def __init__(self, title, entities):
        self.title, self.contents = title, by_title(make_corpus(entities, SEED))

    def search(self, queries, top_k):
        titles = [self.title(query) for query in queries]
        return [[Passage(t, t, self.contents[t].split("\n")[1], 0.0)] for t in titles]


def test_the_expert_stops_searching_in_time(entities):
    rows = read_jsonl(WORLD / "questions" / "musique.jsonl")
    rows = [row for row in rows if len(row["hops"]) == 3][:30]
    wrong = next(title for title, entity in entities.items() if entity.kind == "company")
    counts = set()
    for seed in range(4):
        for episode in expert_episodes(rows, Shelf(lambda _: wrong, entities), entities, seed=seed):
            counts.add(sum(s["author"] == "environment" for s in episode["segments"]))
    assert max(counts) == MAX_SEARCHES


def test_the_expert_believes_what_it_read(entities):
    """A wrong passage for the first hop is followed, and not what the question means."""
    rows = read_jsonl(WORLD / "questions" / "train.jsonl")
    rows = [r for r in rows if r["dataset"] == "hotpotqa" and "order" not in r][:60]
    names, num_misled = by_name(entities.values()), 0
    for row in rows:
        (title, _), (following, _) = row["hops"]
        first = entities[title]
        wrong = next(e for e in names[first.name] if e.title != title)

        def shown(query, first=first, wrong=wrong):
            if first.name in query:
                return wrong.title
            return next((e.title for e in entities.values() if e.name in query), wrong.title)

        [episode] = expert_episodes([row], Shelf(shown, entities), entities, seed=0)
        texts = [s["text"] for s in episode["segments"] if s["author"] == "agent"]
        queries = [text.partition("<search> ")[2] for text in texts]
        asked = [query for query in queries if query and first.name not in query]
        true_name = entities[following].name
        if asked and true_name not in wrong.facts.values():
            num_misled += 1
            assert not any(true_name in query for query in asked)
    assert num_misled > 20


def test_practice_texts_stay_what_they_were():
    """They are the same bytes on every machine, so that a student can be built again."""
    text = json.dumps(pretrain_rows(300, 1000, lists=0.2))
    assert checkpoint.hashlib.sha256(text.encode()).hexdigest()[:16] == PRACTICE
    first = pretrain_rows(150, 5, lists=0.0)
    chains = [row for row in first if row["segments"][0]["text"].startswith("Question")]
    for row in chains:
        notes = [s["text"] for s in row["segments"] if s["author"] == "agent"]
        answer = notes[-1].splitlines()[-1].removeprefix("Answer: ")
        assert f" is {answer}\n" in notes[-1]


PRACTICE = "462639bdb1767e8d"


def test_trails_are_what_their_questions_ask():
    rng = trails.random.Random(5)
    in_order = 0
    for number in range(30):
        row, trail = trails.question(rng, str(number))
        listed, _, asked = row["question"].partition(". Which is last from ")
        roads = [tuple(road.split()) for road in listed.split(", ")]
        start, num_roads = asked.rstrip("?").split(", ")
        ends = dict(roads)
        place = start
        for _ in range(int(num_roads)):
            place = ends[place]
        assert [place] == row["golden_answers"] == [trail[-1]] and place not in ends
        assert len(roads) == len(ends) > int(num_roads)  # others lie among them
        in_order += roads[0][0] == start
        chain = trails.natural_chain(trail)
        assert trails.compress(chain, len(chain.split()), lambda t: len(t.split())) == chain
        short = trails.compress(chain, 4, lambda t: len(t.split()))
        assert short == f"{trail[-1]} last is {trail[-1]}"
    assert in_order < 10


def test_divisions_are_right_and_lists_are_recalled():
    rng = trails.random.Random(5)
    for _ in range(20):
        segments = trails.division(rng, "d")["segments"]
        for shown, told in zip(segments[::2], segments[1::2], strict=True):
            divisor, dividend = shown["text"].replace("?", "").replace("#", "").split()
            assert told == {"author": "agent", "text": f" {int(dividend) // int(divisor)}."}
        shown, told = (s["text"] for s in trails.recall(rng, "r")["segments"])
        assert sorted(shown.strip(" .").split(", ")) == sorted(told.strip(" .").split(", "))
