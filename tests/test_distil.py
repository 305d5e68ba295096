"""The loop that distils: Eq. 1, its batches and rates, and the schedules of TAID, GKD and DistiLLM.

Run: python -m pytest tests/test_distil.py
"""

import itertools
import json
import math
import shutil

import pytest
import torch

import dgpo
import distil
import sampling
import session
from batch import Packed, collate, pack
from episode import Episode, load_episodes
from infra import checkpoint
from infra.checkpoint import states
from infra.parallel import uniform
from infra.run import Stop, cosine, warm_up
from model import Tokenizer
from settings import TrainSettings
from tests.support.mini import NUM_QUESTIONS, read_rows, write_rows
from tests.support.models import EOS, PAD
from tests.support.runs import Updates, flat_gradient, policies, run

GRADIENT_TOLERANCE = 1e-5  # fp32 sums in another order


# ---- Eq. 1 ----


def packed(episodes: list[Episode], tokenizer) -> Packed:
    batch = collate(episodes, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id)
    return pack(batch, range(len(episodes)), batch.lengths())


@pytest.mark.parametrize("with_teacher", [False, True])
def test_loss_and_gradients_do_not_depend_on_micro_batches_or_order(mini, with_teacher):
    student, teacher = policies(mini)
    episodes = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")

    def gradients(groups: list[list[Episode]]) -> tuple[float, torch.Tensor]:
        student.decoder.zero_grad()
        total = 0.0
        for group in groups:
            rows = packed(group, student.tokenizer)
            loss, _ = distil.distil_loss(student, teacher if with_teacher else None, rows)
            (loss / 1000).backward()
            total += loss.item() / 1000
        return total, flat_gradient(student.decoder)

    at_once = gradients([episodes])
    split = gradients([episodes[20:], episodes[:3], episodes[3:20]])
    assert split[0] == pytest.approx(at_once[0], rel=GRADIENT_TOLERANCE)
    torch.testing.assert_close(split[1], at_once[1], atol=GRADIENT_TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_loss_and_gradients_equal_padded_rows_and_plain_formulas(mini, checkpointing):
    """The path of training against what a reader would write first: padding, full logits, Eq. 1."""
    student, teacher = policies(mini)
    tokenizer = student.tokenizer
    episodes = load_episodes(mini / "episodes.jsonl", tokenizer, prompt="short")
    batch = collate(episodes, pad_id=tokenizer.pad_id, end_of_turn=tokenizer.eos_id)
    mask, size = batch.response_mask, tokenizer.size
    assert (batch.ids.shape[1] - torch.tensor(batch.lengths())).max() > 0  # the rows are ragged
    logits, guide = (p.decoder(batch.ids)[:, :-1, :size][mask[:, 1:]] for p in (student, teacher))
    weights = {"ce_weight": 0.5, "kl_weight": 2.0}
    loss, kl = dgpo.kd_loss(logits, guide.detach(), batch.ids[mask], **weights)
    loss.sum().backward()
    expected = flat_gradient(student.decoder)
    student.decoder.zero_grad()
    student.decoder.checkpointing = checkpointing
    rows = packed(episodes, tokenizer)
    got, got_kl = distil.distil_loss(student, teacher, rows, **weights)
    got.backward()
    assert got.item() == pytest.approx(loss.sum().item(), rel=GRADIENT_TOLERANCE)
    assert got_kl.item() == pytest.approx(kl.sum().item(), rel=GRADIENT_TOLERANCE)
    difference = (flat_gradient(student.decoder) - expected).abs().max()
    assert difference <= GRADIENT_TOLERANCE * expected.abs().max()


def test_distillation_has_no_gradient_from_prompt_and_retrieved_tokens(mini):
    student, _ = policies(mini)
    [episode] = load_episodes(mini / "episodes.jsonl", student.tokenizer, prompt="short")[:1]
    batch = collate([episode], pad_id=student.tokenizer.pad_id)
    loss, _ = distil.distil_loss(student, None, pack(batch, [0], batch.lengths()))
    logprobs = student.decoder(batch.ids)[0, :-1, : student.tokenizer.size].log_softmax(-1)
    of_tokens = logprobs.gather(-1, batch.ids[0, 1:, None]).squeeze(-1)
    expected = -of_tokens[batch.response_mask[0, 1:]]
    assert len(expected) == episode.num_agent_tokens < len(episode.ids)
    torch.testing.assert_close(
        loss, expected.sum(), atol=GRADIENT_TOLERANCE, rtol=GRADIENT_TOLERANCE
    )


def test_distillation_lowers_the_loss(mini, tmp_path):
    rows = run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "6")
    assert rows[-1]["loss/kd"] < 0.8 * rows[0]["loss/kd"]


# ---- batches ----


class Pass:
    """What distil_loss was asked for in one pass."""

    def __init__(self, packed: Packed, options: dict):
        self.documents = packed.ids[0].split(packed.documents)
        self.masks = packed.response_mask[0].split(packed.documents)
        self.options, self.is_trained = options, torch.is_grad_enabled()

    @property
    def texts(self) -> list[bytes]:
        return [bytes(i for i in document.tolist() if i < 256) for document in self.documents]

    @property
    def num_response_tokens(self) -> int:
        return sum(mask.sum().item() for mask in self.masks)


@pytest.fixture
def passes(monkeypatch) -> list[Pass]:
    """All passes through distil_loss, in their order."""
    recorded, real = [], distil.distil_loss

    def spy(student, teacher, packed, **options):
        recorded.append(Pass(packed, options))
        return real(student, teacher, packed, **options)

    monkeypatch.setattr(distil, "distil_loss", spy)
    return recorded


def answers(passes: list[Pass], tokenizer) -> list[str]:
    """The numbers that the episodes of these passes answer with: they name the episode."""
    texts = [tokenizer.decode(document.tolist()) for p in passes for document in p.documents]
    return [text.partition("<answer>")[2].partition("</answer>")[0] for text in texts]


def test_the_end_of_turn_is_a_target_of_the_teachers_text(mini, tmp_path, passes):
    tokenizer = policies(mini)[0].tokenizer
    run(mini, tmp_path / "run", "--phase", "kd")
    assert len(passes) == 3
    for one in passes:
        for document, mask in zip(one.documents, one.masks, strict=True):
            assert document[-1] == tokenizer.eos_id and mask[-1]


def test_an_epoch_takes_every_episode_once_and_the_next_one_in_another_order(
    mini, tmp_path, passes
):
    tokenizer = policies(mini)[0].tokenizer
    run(mini, tmp_path / "run", "--phase", "sft", "--epochs", "2", "--eval-every", "0")
    first, second = answers(passes[:3], tokenizer), answers(passes[3:], tokenizer)
    assert sorted(first) == sorted(second) == sorted(map(str, range(NUM_QUESTIONS)))
    assert first != second
    passes.clear()
    run(mini, tmp_path / "other", "--phase", "sft", "--eval-every", "0", "--seed", "1")
    assert answers(passes, tokenizer) not in (first, second)


# ---- tokens that end a turn (L1) ----


def with_end_tokens(mini, folder, name: str, ids: list[int]):
    """A copy of the mini world's student or teacher whose turns end at these tokens as well."""
    shutil.copytree(mini / name, folder / name)
    path = folder / name / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": ids, "top_k": 20}))
    return folder / name


def test_l1_student_and_teacher_end_turns_at_the_tokens_of_both_and_the_model_lists_them(
    mini, tmp_path, capsys, monkeypatch
):
    teacher = with_end_tokens(mini, tmp_path, "teacher", [PAD])
    ends, real = [], sampling.generate

    def spy(policy, *arguments, **options):
        ends.append(policy.tokenizer.end_ids)
        return real(policy, *arguments, **options)

    monkeypatch.setattr(sampling, "generate", spy)
    flags = ["--phase", "gkd", "--steps", "1", "--teacher", str(teacher), "--eval-every", "1"]
    run(mini, tmp_path / "run", *flags)
    assert ends == [{EOS, PAD}] * 2  # of training and of validation
    assert f"the student's [{EOS}], the teacher's [{EOS}, {PAD}]" in capsys.readouterr().out
    trained = Tokenizer.load(tmp_path / "run")
    assert (trained.end_ids, trained.eos_id) == ({EOS, PAD}, EOS)
    listed = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert listed == {"eos_token_id": [EOS, PAD], "stop_strings": ["</search>", "</answer>"]}


def test_l1_an_end_token_that_is_no_token_is_refused(mini, tmp_path):
    teacher = with_end_tokens(mini, tmp_path, "teacher", [999])
    with pytest.raises(ValueError, match="got eos_token_id 999"):
        run(mini, tmp_path / "run", "--phase", "dgpo", "--teacher", str(teacher))


# ---- nothing to learn from, nothing to validate, too little to ask (L4, L5, L10) ----

NO_TEXT = [
    [],
    [{"author": "agent", "text": ""}],
    [{"author": "environment", "text": "<answer> x </answer>"}],
]


def file_of(folder, rows: list[dict]) -> str:
    write_rows(folder / "rows.jsonl", rows)
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("phase", "segments"), [*zip(("sft", "kd", "distillm"), NO_TEXT, strict=True)]
)
def test_l5_episodes_without_text_of_the_agent_are_refused_by_their_file(
    mini, tmp_path, phase, segments
):
    rows = [row | {"segments": segments} for row in read_rows(mini / "episodes.jsonl")]
    flags = ["--phase", phase, "--episodes", file_of(tmp_path, rows)]
    with pytest.raises(ValueError, match="rows.jsonl: got 24 of 24 episodes without agent text"):
        run(mini, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_l5_a_file_with_some_such_episodes_is_learnt_from_without_them(
    mini, tmp_path, capsys, passes
):
    rows = read_rows(mini / "episodes.jsonl")
    rows[3]["segments"], rows[7]["status"] = NO_TEXT[2], "search_error"
    flags = ["--phase", "sft", "--episodes", file_of(tmp_path, rows), "--eval-every", "0"]
    run(mini, tmp_path / "run", *flags)
    said = "rows.jsonl: got 2 of 24 episodes without agent text; they are passed over"
    assert capsys.readouterr().out.count(said) == 1
    learnt = answers(passes, policies(mini)[0].tokenizer)
    assert sorted(learnt, key=int) == [str(i) for i in range(24) if i not in (3, 7)]


@pytest.mark.parametrize(("phase", "num_questions"), [("kd", 24), ("dgpo", 8)])
def test_l4_without_questions_to_validate_there_is_no_score_and_a_warning(
    mini, tmp_path, capsys, phase, num_questions
):
    rows = read_rows(mini / "questions.jsonl")[:num_questions]
    flags = ["--phase", phase, "--questions", file_of(tmp_path, rows)]
    flags += ["--epochs", "0.5"] if phase == "kd" else ["--steps", "2"]
    flags += ["--val-size", "0"] if num_questions == 24 else []  # a tenth of 8 is none
    rows = run(mini, tmp_path / "run", *flags)
    assert not [key for row in rows for key in row if key.startswith("eval/")]
    said = "0 of them set apart to validate"
    assert capsys.readouterr().out.count(said) == 1
    run(mini, tmp_path / "quiet", *flags, "--eval-every", "0")
    assert said not in capsys.readouterr().out


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(session, "load_decoder", load)


def test_l4_a_run_that_waits_for_a_score_needs_questions_to_validate(
    mini, tmp_path, nothing_loads, capsys
):
    flags = ["--phase", "kd", "--until-score", "0.5"]
    for more in (["--val-size", "0"], ["--eval-every", "0"]):
        with pytest.raises(ValueError, match="until-score 0.5"):
            run(mini, tmp_path / "run", *flags, *more)
    with pytest.raises(SystemExit):
        run(mini, tmp_path / "run", "--phase", "dgpo", "--until-score", "0.5")
    assert "--until-score: got it for phase dgpo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "num"),
    [
        (["--phase", "ppo", "--prompts-per-step", "23"], 23),
        (["--phase", "dgpo", "--prompts-per-step", "512"], 512),
        (["--phase", "grpo", "--prompts-per-step", "69", "--group-size", "3"], 23),
        (["--phase", "gkd", "--batch-size", "23"], 23),
        (["--phase", "distillm", "--batch-size", "64"], 64),
    ],
)
def test_l10_fewer_questions_than_a_step_asks_are_refused_before_a_model_is_loaded(
    mini, tmp_path, nothing_loads, flags, num
):
    message = f"questions.jsonl: got 24 questions, 2 of them set apart .*expected {num} others"
    with pytest.raises(ValueError, match=message):
        run(mini, tmp_path / "run", *flags)


def test_l10_phases_that_ask_the_teacher_or_nobody_need_no_whole_step_of_questions(mini, tmp_path):
    run(mini, tmp_path / "run", "--phase", "kd", "--batch-size", "64", "--eval-every", "0")


# ---- rates ----


def test_l6_a_warm_up_of_distillation_that_does_not_end_is_said(mini, tmp_path, capsys):
    flags = ["--phase", "kd", "--eval-every", "0", "--kd-warmup-steps"]
    run(mini, tmp_path / "long", *flags, "4")
    assert "--kd-warmup-steps 4: got more than the 3 steps" in capsys.readouterr().out
    run(mini, tmp_path / "fits", *flags, "3")
    assert "warmup" not in capsys.readouterr().out


def test_the_rate_falls_on_a_cosine_after_a_linear_warm_up():
    settings = TrainSettings(kd_lr=2.0, kd_warmup_steps=0)
    rates = [settings.kd_lr * cosine(step, 8) * warm_up(step, 0) for step in range(8)]
    expected = [1 + math.cos(math.pi * step / 8) for step in range(8)]
    assert rates == pytest.approx(expected) and rates == sorted(rates, reverse=True)
    assert [warm_up(step, 4) for step in range(8)] == pytest.approx([0.25, 0.5, 0.75, *[1] * 5])


def test_rate_decay_and_clip_reach_the_optimizer(mini, tmp_path, monkeypatch):
    updates = Updates(monkeypatch)
    flags = ["--kd-lr", "0.003", "--weight-decay", "0.07", "--grad-clip", "0.9"]
    rows = run(mini, tmp_path / "run", "--phase", "kd", "--kd-warmup-steps", "2", *flags)
    rates = [lr for _, lr, _ in updates.steps]
    assert rates == [row["loss/lr"] for row in rows]
    assert rates[0] == pytest.approx(0.0015) and rates[2] == pytest.approx(0.00075)
    assert set(updates.clips) == {0.9} and {decay for *_, decay in updates.steps} == {0.07}


# ---- distances ----

DISTANCES = {
    "kd": ("forward", 1.0),
    "taid": ("taid", 0.0),
    "gkd": ("reverse", 0.0),
    "distillm": ("skew", 0.0),
}


@pytest.mark.parametrize("phase", DISTANCES)
def test_each_phase_has_its_own_distance_and_the_cross_entropy_belongs_to_kd(
    mini, tmp_path, passes, phase
):
    steps = ["--steps", "2"] if phase == "gkd" else ["--epochs", "0.5"]
    run(mini, tmp_path / "run", "--phase", phase, *steps)
    assert {(p.options["kind"], p.options["ce_weight"]) for p in passes} == {DISTANCES[phase]}


def test_weights_distance_and_mix_are_settings(mini, tmp_path, passes, capsys):
    flags = ["--distance", "jsd", "--mix", "0.5", "--kl-weight", "0.7"]
    run(mini, tmp_path / "gkd", "--phase", "gkd", "--steps", "1", *flags)
    options = {(p.options["kind"], p.options["mix"], p.options["kl_weight"]) for p in passes}
    assert options == {("jsd", 0.5, 0.7)}
    passes.clear()
    run(mini, tmp_path / "kd", "--phase", "kd", "--ce-weight", "0.3")
    assert {p.options["ce_weight"] for p in passes} == {0.3}
    with pytest.raises(SystemExit):
        run(mini, tmp_path / "bad", "--phase", "taid", "--distance", "jsd")
    assert "--distance: got it for phase taid" in capsys.readouterr().err


@pytest.mark.parametrize("mix", ["0", "1"])
def test_l12_jsd_learns_at_both_ends_of_mix(mini, tmp_path, mix):
    flags = ["--phase", "kd", "--ce-weight", "0", "--distance", "jsd", "--mix", mix]
    rows = run(mini, tmp_path / "run", *flags, "--epochs", "3", "--eval-every", "0")
    assert 0.01 < rows[-1]["loss/distance"] < rows[0]["loss/distance"]


def test_l2_distillation_compares_untempered_models_whatever_sampled(mini, tmp_path):
    flags = ["--phase", "gkd", "--steps", "1", "--temperature", "1e-6", "--top-p", "0.5"]
    [row] = run(mini, tmp_path / "run", *flags, "--eval-every", "0")
    assert math.isfinite(row["loss/distance"]) and 0 < row["loss/distance"] < 20


# ---- TAID ----


def test_taid_moves_its_target_from_the_student_to_the_teacher(mini, tmp_path, passes):
    rows = run(mini, tmp_path / "run", "--phase", "taid", "--epochs", "4")
    line = [0.4 + 0.6 * n / 12 for n in range(12)]
    assert [row["loss/taid_t"] for row in rows] == pytest.approx(line)
    assert [p.options["mix"] for p in passes] == [row["loss/taid_t"] for row in rows]


def test_taid_survives_a_loss_that_is_not_a_number(mini, tmp_path, monkeypatch):
    real, calls = distil.distil_loss, []

    def broken(*arguments, **options):
        calls.append(1)
        factor = float("nan") if len(calls) == 3 else 1
        return tuple(x * factor for x in real(*arguments, **options))

    monkeypatch.setattr(distil, "distil_loss", broken)
    rows = run(mini, tmp_path / "run", "--phase", "taid", "--epochs", "4")
    assert rows[2]["loss/distance"] is None and rows[2]["loss/skipped"] == 1
    assert rows[-1]["loss/taid_t"] == pytest.approx(0.4 + 0.6 * 11 / 12)  # on the line again


def end_after(folder, step: int) -> None:
    """As if the run had ended after this step: later states are gone."""
    for state in states(folder):
        if int(state.name.removeprefix("step_")) > step:
            shutil.rmtree(state)


def test_taid_resumes_with_its_target_and_its_momentum(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "NUM_KEPT", 99)
    # With a large alpha the target leaves the straight line and depends on all losses before.
    flags = ["--phase", "taid", "--epochs", "4", "--taid-alpha", "0.8", "--taid-beta", "0.9"]
    rows = run(mini, tmp_path / "run", *flags)
    line = [0.4 + 0.6 * n / 12 for n in range(12)]
    assert rows[6]["loss/taid_t"] > line[6] + 0.01
    end_after(tmp_path / "run", 4)
    assert run(mini, tmp_path / "run", *flags, "--resume") == rows


# ---- GKD ----


def test_gkd_trains_on_what_the_student_writes_and_needs_no_file(mini, tmp_path, passes):
    absent = ["--episodes", str(tmp_path / "absent")]
    rows = run(mini, tmp_path / "run", "--phase", "gkd", "--steps", "3", *absent)
    assert len(rows) == 3 and all("rollout/score" in row for row in rows)
    # Sampled tokens only: the end of turn is no target where the student did not write it.
    assert passes[0].num_response_tokens / 8 == pytest.approx(rows[0]["rollout/agent_tokens"])
    half = ["--phase", "gkd", "--steps", "12", "--student-share", "0.5", "--eval-every", "0"]
    rows = run(mini, tmp_path / "half", *half)
    assert 2 <= sum("rollout/score" in row for row in rows) <= 10


def test_gkd_brings_the_student_closer_to_the_teacher_where_the_student_goes(mini, tmp_path):
    flags = ["--steps", "12", "--batch-size", "16", "--eval-every", "0"]
    rows = run(mini, tmp_path / "run", "--phase", "gkd", *flags)
    first, last = (sum(row["loss/distance"] for row in part) for part in (rows[:3], rows[-3:]))
    assert last < 0.9 * first


# ---- DistiLLM ----


def rising(monkeypatch) -> None:
    """The loss on the held-out episodes rises from the third look on."""
    losses = itertools.chain([1.0, 1.0], itertools.count(2.0))
    monkeypatch.setattr(distil, "mean_distance", lambda *_: next(losses))


def test_distillm_lets_the_student_write_when_the_held_out_loss_rises_and_replays_it(
    mini, tmp_path, monkeypatch
):
    rising(monkeypatch)
    flags = ["--phase", "distillm", "--epochs", "6", "--buffer-size", "16", "--save-every", "1"]
    rows = run(mini, tmp_path / "run", *flags)
    shares = [row["loss/student_share"] for row in rows]
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == 1.0
    files = sorted((tmp_path / "run" / "generated").glob("*.jsonl"))
    written_in = [row["step"] for row in rows if "rollout/score" in row]
    assert [int(path.name[5:11]) + 1 for path in files] == written_in
    assert 2 <= len(files) < len(rows) - 4  # new ones, then old ones again


def test_distillm_draws_other_episodes_of_its_buffer_in_every_step(
    mini, tmp_path, monkeypatch, passes
):
    rising(monkeypatch)
    flags = ["--phase", "distillm", "--epochs", "8", "--buffer-size", "16", "--eval-every", "0"]
    rows = run(mini, tmp_path / "run", *flags)
    last = max(row["step"] for row in rows if "rollout/score" in row)
    replays = [tuple(one.texts) for one in passes[last:]]  # nothing new came into the buffer
    assert len(replays) >= 3 and len(set(replays)) == len(replays)


def test_distillm_never_trains_on_the_episodes_that_it_measures_its_loss_on(mini, tmp_path, passes):
    tokenizer = policies(mini)[0].tokenizer
    run(mini, tmp_path / "run", "--phase", "distillm", "--epochs", "2", "--eval-every", "0")
    trained = answers([p for p in passes if p.is_trained], tokenizer)
    measured = answers([p for p in passes if not p.is_trained], tokenizer)
    assert set(measured) == {"0", "1"}  # a tenth, the first ones
    assert set(trained) == set(map(str, range(2, NUM_QUESTIONS)))


def test_distillm_resumes_with_its_buffer_and_its_share(mini, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "NUM_KEPT", 99)
    # Every look raises the share.
    flags = ["--phase", "distillm", "--epochs", "5", "--buffer-size", "12"]
    flags += ["--share-tolerance", "-9"]
    rows = run(mini, tmp_path / "run", *flags)
    written_in = [row["step"] for row in rows if "rollout/score" in row]
    assert len(written_in) >= 2
    end_after(tmp_path / "run", written_in[1])
    last = sorted((tmp_path / "run" / "generated").glob("*.jsonl"))[-1]
    # Of a step that is done again.
    last.with_name("step_000099.0000.jsonl").write_text(last.read_text())
    assert run(mini, tmp_path / "run", *flags, "--resume") == rows
    assert not last.with_name("step_000099.0000.jsonl").exists()


def test_distillm_needs_episodes_to_set_apart(mini, tmp_path):
    write_rows(tmp_path / "few.jsonl", read_rows(mini / "episodes.jsonl")[:3])
    flags = ["--phase", "distillm", "--episodes", str(tmp_path / "few.jsonl")]
    with pytest.raises(ValueError, match="got 3 episodes, expected at least 10"):
        run(mini, tmp_path / "run", *flags)


@pytest.mark.parametrize("phase", ["taid", "distillm"])
def test_a_state_without_the_schedule_that_a_method_needs_is_refused_by_name(mini, tmp_path, phase):
    """States of earlier versions kept it elsewhere."""
    run(mini, tmp_path / "run", "--phase", phase)
    for state in states(tmp_path / "run"):
        meta = json.loads((state / "meta.json").read_text())
        meta["method"] = meta.pop("schedule")
        (state / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(Stop, match="got a schedule of another layout"):
        run(mini, tmp_path / "run", "--phase", phase, "--resume")


def test_one_draw_says_for_all_processes_who_writes_a_batch():
    draws = [uniform(3, step, 2) for step in range(20)]
    assert draws == [uniform(3, step, 2) for step in range(20)]
    assert len(set(draws)) == 20 and all(0 <= u < 1 for u in draws)
