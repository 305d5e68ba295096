"""The episode viewer: one page that shows what an agent wrote, and what each token was worth.

    python viewer.py RUN [--teacher DIR] [--step N] --out page.html
    python viewer.py RUN OTHER_RUN                 the same questions by two models
    python viewer.py FILE [OTHER_FILE] [--model DIR] [--teacher DIR]
    python viewer.py watch FOLDER                  runs in progress, redrawn

RUN is a folder of train.py; FILE an episodes file, or the folder of `eval.py --episodes`. The page
needs no server and no network. The viewer reads: it changes nothing in a run's folder.

Runs keep no numbers of tokens, so they are computed again by the functions that trained:
    a run of loop two  its next step after a saved state, as the run plays it. Noise depends on
                       (seed, episode, token), so these are the episodes that training saw.
    a run of loop one  the teacher's episodes that it learns from
    two runs           the questions that the first one has set apart, asked as in a validation
    a file             its episodes; without a model there is no number to show

Legend: B episodes, T tokens, N response tokens of a pass.
"""

import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import dgpo
from batch import Batch, collate, pack, response_rows
from data import Question
from episode import Episode, load_episodes, parse_action, parse_episode
from eval import MEASURES, NAMES, sort_sets
from infra import checkpoint, cli, page
from infra.files import read_json, read_rows
from infra.named import load_scorer
from infra.parallel import micro_batches
from infra.programs import count, number
from infra.record import read_record, split_name
from infra.run import Run
from kernels import head_divergence
from model import Critic
from reinforce import Models, sampled_logprobs, score_tokens, spread
from rollout import generate
from sampling import play
from serving.ask import token_texts
from session import Session, Task, load_policy, open_frozen, open_session, open_student
from settings import DISTIL, REINFORCE, TrainSettings, guide_of
from tokenizer import Tokenizer

CPU = torch.device("cpu")
CHUNK = 32  # episodes that are scored between two moves of the bar
# What a token's numbers are called; {} is what guides. Each is there if the phase has it.
QUANTITIES = {
    "student": "log p of the student", "guide": "log p of the {}",
    "kl": "KL(student || {})", "reward": "reward", "value": "value",
    "advantage": "advantage",
}
ARCAP = ("without_thinking", "with_thinking", "first_hit", "hit", "searches")  # Table 5
NO_EPISODES = "no phase of train.py, so curves and samples are shown, and no episodes"

Numbers = dict[str, list[float]]  # by quantity: one number for each response token
Row = dict[str, Any]  # an episode as the page holds it


class Agent(NamedTuple):
    """A run's agent as it was after `step` steps."""
    run: Run
    settings: TrainSettings
    task: Task
    models: Models
    guide: str  # "teacher" or "initial policy"
    step: int


class Side(NamedTuple):
    """One model's episodes."""
    name: str
    about: str  # a line that says what is shown
    rows: list[Row]
    guide: str = "teacher"  # or the initial policy


# ---- the numbers of tokens ----


@torch.no_grad()
def token_numbers(models: Models, episodes: Sequence[Episode], settings: TrainSettings,
                  scores: Sequence[float] | None = None) -> list[Numbers]:
    """What training computes of each response token, by its own functions.

    The guide scores all episodes, also those that have no penalty. scores: Eq. 3, or the run's own
    reward; None for supervised training, which has no reward, value or advantage.
    """
    if not episodes:
        return []
    batch = collate(episodes, pad_id=models.actor.tokenizer.pad_id)
    chunks = [score_chunk(models, batch, range(i, min(i + CHUNK, len(episodes))), settings)
              for i in tqdm(range(0, len(episodes), CHUNK), desc="score", leave=False)]
    values = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}  # [B, T]
    if scores is not None:
        values |= credit(models, episodes, batch, values, torch.tensor(scores), settings)
    return [{name: x[mask].tolist() for name, x in zip(values, row, strict=True)}
            for mask, *row in zip(batch.response_mask, *values.values(), strict=True)]


def score_chunk(models: Models, batch: Batch, rows: range,
                settings: TrainSettings) -> dict[str, Tensor]:
    """Log-probabilities, values and the exact KL of some rows of a batch: [B of them, T] each."""
    batch = Batch(batch.ids[rows.start : rows.stop], batch.response_mask[rows.start : rows.stop])
    # "exact" keeps the guide's hidden states, which the KL over all tokens needs.
    tokens, guide_rows = score_tokens(
        models, batch, [True] * len(rows), replace(settings, kl_in="exact"))
    values = {"student": tokens.old_logprobs}
    if models.critic is not None:
        values["value"] = tokens.old_values
    if models.guide is None:
        return values
    values |= {"guide": tokens.guide_logprobs, "kl": torch.zeros_like(tokens.old_logprobs)}
    mask, lengths = batch.response_mask, batch.lengths()
    for group in micro_batches(lengths, settings.micro_batch_tokens):
        packed = pack(batch, group, lengths)
        if packed.response_mask.any():
            _, kl = head_divergence(
                dgpo.exact_kl, response_rows(models.actor.decoder, packed), models.actor.head,
                torch.cat([guide_rows[i] for i in group]), models.guide.head,
                packed.ids[packed.response_mask], temperature=settings.temperature)  # [N]
            values["kl"][group] = spread(kl, mask[group])
    return values


def credit(models: Models, episodes: Sequence[Episode], batch: Batch, values: dict[str, Tensor],
           scores: Tensor, settings: TrainSettings) -> dict[str, Tensor]:
    """Rewards and advantages [B, T] as a step of reinforce.py takes them."""
    mask, old = batch.response_mask, values["student"]
    where = settings.kl_where if settings.kl_in == "reward" else "none"
    rewards = dgpo.kl_rewards(scores, old, values.get("guide", old), mask, beta=settings.beta,
                              where=where)
    if settings.advantage == "group":
        advantages = dgpo.group_advantages(rewards, mask, settings.group_size)
    elif models.critic is not None:
        advantages, _ = dgpo.gae(rewards, values["value"], mask, gamma=settings.gamma,
                                 gae_lambda=settings.gae_lambda)
        advantages = dgpo.whiten(advantages, mask)
    else:  # the critic was not kept
        return {"reward": rewards}
    cap = settings.importance_cap
    if cap is None:
        cap = 2.0 if models.actor.dtype == torch.bfloat16 else 0.0
    if cap:
        sampled = spread(sampled_logprobs([*episodes]), mask)
        advantages = advantages * dgpo.importance_weights(old, sampled, mask, cap=cap)
    return {"reward": rewards, "advantage": advantages}


# ---- a run as it was ----


def open_agent(folder: Path, record: dict[str, Any], teacher: str, step: int | None) -> Agent:
    """The agent before training step `step` (None: the newest weights); teacher: in the guide's
    place."""
    settings = settings_of(record)
    reinforces = settings.phase in REINFORCE
    weights, done = find_weights(folder, step)
    run = Run(settings, 0, 1, CPU)
    run.date = record.get("date", run.date)
    start = str(weights or settings.student)
    student = open_student(run, replace(settings, student=start, train_layers=0))
    student.decoder.requires_grad_(False)
    role = guide_of(settings)
    if teacher:
        settings, role = replace(settings, teacher=teacher), "teacher"
    guide = open_frozen(settings, CPU, role, student) if role else None
    critic = None
    has_critic = weights is None or (weights / "critic.safetensors").is_file()
    if reinforces and settings.advantage == "gae" and has_critic:
        critic = Critic.from_decoder(student.decoder)
        if weights is not None:
            checkpoint.load_state(weights, {"critic": critic}, {})
    own = settings.reward if reinforces else ""
    task = Task(load_scorer(own, "--reward") if own else None)
    name = "initial policy" if role == "student" else "teacher"
    return Agent(run, settings, task, Models(student, critic, guide), name, done)


def settings_of(record: dict[str, Any]) -> TrainSettings:
    """The settings of a run's record; paths that it read stand as they were resolved then."""
    names = {field.name for field in fields(TrainSettings)}
    values = {name: value for name, value in record["settings"].items() if name in names}
    for name, place in record.get("paths", {}).items():
        if name in values and os.path.exists(place):
            values[name] = place + split_name(values[name])[1]
    return replace(TrainSettings(**values), device="cpu")


def find_weights(folder: Path, step: int | None) -> tuple[Path | None, int]:
    """(folder of the weights before training step `step`, the steps that they have learnt from);
    no folder stands for the run's start."""
    found = {checkpoint.read_meta(state).get("step"): state for state in checkpoint.states(folder)}
    found.pop(None, None)
    if step is not None:
        if step - 1 and step - 1 not in found:
            steps = ", ".join(str(done + 1) for done in sorted({0, *found}))
            raise ValueError(f"--step: got {step}, expected one of {steps}: {folder} has no other "
                             "weights (--save-every keeps more)")
        return found.get(step - 1), step - 1
    if not found and (folder / checkpoint.MODEL).exists():  # a result whose states were removed
        return folder, max(page.curves(folder)["steps"], default=0)
    done = max(found, default=0)
    return found.get(done), done


def play_step(agent: Agent, session: Session, limit: int) -> list[Episode]:
    """The episodes of the agent's next step, the first `limit` of them in whole groups."""
    run, settings = agent.run, agent.settings
    size = settings.group_size
    num_questions = settings.episodes_per_step // size
    share = max(1, min(settings.rollout_rows, limit) // size)  # questions
    # As many processes would play it: what an episode samples does not depend on their number.
    run.num_processes = math.ceil(num_questions / share)
    episodes: list[Episode] = []
    for rank in tqdm(range(run.num_processes), desc=f"play step {agent.step + 1}"):
        run.rank = rank
        episodes += play(run, settings, agent.models.actor, session, agent.task, agent.step,
                         settings.episodes_per_step)[0]
        if len(episodes) >= limit:
            break
    return episodes[: max(size, limit // size * size)]


def validation(agent: Agent, session: Session, questions: Sequence[Question]) -> list[Episode]:
    """These questions as the run's validation asks them."""
    settings = agent.settings
    return generate(agent.models.actor, session.retriever, agent.task.prepare([*questions], 0),
                    settings, seed=settings.seed + 1, protocol=session.protocol, progress="play")


def rows_of(agent: Agent, episodes: Sequence[Episode]) -> list[Row]:
    """The episodes with their numbers, as the page holds them."""
    settings, tokenizer = agent.settings, agent.models.actor.tokenizer
    scores = agent.task.reward([*episodes]) if agent.task.reward else [e.score for e in episodes]
    if settings.phase in DISTIL:  # its loss is at temperature 1, whatever sampled
        numbers = token_numbers(agent.models, episodes, replace(settings, temperature=1.0))
        guided = [False] * len(episodes)
    else:
        numbers = token_numbers(agent.models, episodes, settings, scores)
        where = settings.kl_where if agent.models.guide else "none"
        guided = dgpo.guided_episodes(torch.tensor(scores), where).tolist()
    return [as_row(*parts, tokenizer) | {"guided": is_guided}
            for *parts, is_guided in zip(episodes, scores, numbers, guided, strict=True)]


# ---- episodes as rows of the page ----


def as_row(episode: Episode, score: float, numbers: Numbers, tokenizer: Tokenizer) -> Row:
    """An episode for the page; only the agent's tokens stand apart, the others have no numbers."""
    segments, place = [], 0
    for segment in episode.segments:
        part: Row = {"by": segment.author}
        if segment.author == "agent":
            after = place + len(segment.ids)
            part["tokens"] = token_texts(tokenizer, segment.ids)
            part |= {name: [page.rounded(x) for x in values[place:after]]
                     for name, values in numbers.items() if values}
            place = after
        else:
            text = tokenizer.decode(segment.ids, skip_special=False)
            part |= {"text": text, "n": len(segment.ids)}
        segments.append(part)
    row = about_question(vars(episode.question)) | {
        "status": episode.status or "unknown", "answer": episode.answer, "score": score,
        "searches": (episode.num_searches or len(episode.queries)
                     or turns_that_search(episode, tokenizer)),
        "tokens": episode.num_agent_tokens, "segments": segments}
    if numbers.get("kl"):
        row["kl"] = page.rounded(sum(numbers["kl"]) / len(numbers["kl"]))
    return row


def turns_that_search(episode: Episode, tokenizer: Tokenizer) -> int:
    """Searches of an episode that comes from a file, which does not keep their passages."""
    turns = [turn for turn, after in pairwise(episode.segments)
             if (turn.author, after.author) == ("agent", "environment")]
    return sum(parse_action(tokenizer.decode(turn.ids)).kind == "search" for turn in turns)


def about_question(row: Row) -> Row:
    return {"id": str(row.get("id", "")), "question": str(row.get("question") or ""),
            "set": str(row.get("source", "")),
            "golds": [str(gold) for gold in row.get("golden_answers") or ()]}


def plain_row(row: Row, where: str) -> Row:
    """A row of an episodes file as it stands there, without a tokenizer: segments as texts."""
    try:
        segments = [{"by": str(s["author"]), "text": str(s["text"])} for s in row["segments"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: got {type(error).__name__}: {error}; expected segments "
                         "[{author, text}], or a --model that decodes ids") from error
    tokens = sum(len(s.get("ids", ())) for s in row["segments"] if s["author"] == "agent")
    return about_question(row) | {
        "status": str(row.get("status") or "unknown"), "answer": row.get("answer"),
        "score": float(row.get("score") or 0), "searches": len(row.get("queries") or ()),
        "tokens": tokens, "segments": segments}


# ---- what is shown ----


def read_sides(options: Namespace) -> list[Side]:
    """One side for each path: all are runs, or all are episodes."""
    paths = options.paths
    records = [read_record(path) if path.is_dir() else None for path in paths]
    are_runs = [record is not None and "phase" in record["settings"] for record in records]
    if len(paths) > 2:
        raise ValueError(f"viewer.py: got {len(paths)} paths, expected one, or two to compare")
    if any(are_runs) != all(are_runs):
        raise ValueError(f"viewer.py: got a run and episodes ({paths[0]}, {paths[1]}), expected "
                         "two of a kind; eval.py --episodes writes a run's episodes")
    names = [path.absolute().name if path.is_dir() else str(path) for path in paths]
    if len({*names}) < len(names):
        names = [*map(str, paths)]
    if all(are_runs):
        phases = [record["settings"]["phase"] for record in records]
        if len(paths) == 1 and phases[0] not in (*DISTIL, *REINFORCE):
            return [Side(names[0], f"{names[0]}: {phases[0]} is {NO_EPISODES}.", [])]
        if options.model or len(paths) > 1 and options.step:
            flag = "--model: is for files" if options.model else "--step: is for one run"
            raise ValueError(f"{flag}; got it with {', '.join(map(str, paths))}; drop it")
        agents = [open_agent(path, record, options.teacher, options.step)
                  for path, record in zip(paths, records, strict=True)]
        if len(agents) == 1:
            return [one_run(names[0], paths[0], agents[0], options.limit)]
        return compare_runs(names, agents, options.limit)
    models = [*options.model] or [(record or {"settings": {}})["settings"].get("model", "")
                                  for record in records]
    if len(models) != len(paths):
        raise ValueError(f"--model: got {len(models)}, expected one for each of {len(paths)} files")
    return [read_file(*parts, options)
            for parts in zip(names, paths, models, records, strict=True)]


def one_run(name: str, path: Path, agent: Agent, limit: int) -> Side:
    """What a run learns from: episodes of its next step, or those of its teacher."""
    settings, step = agent.settings, agent.step
    if settings.phase in DISTIL and Path(settings.episodes).is_file():
        episodes = load_episodes(settings.episodes, agent.models.actor.tokenizer,
                                 prompt=settings.prompt)[:limit]
        what = f"episodes of {settings.episodes}"
    elif settings.phase in DISTIL:  # the student writes them itself
        session = open_session(settings, CPU, agent.task)
        episodes = validation(agent, session, session.val_questions[:limit])
        what = "questions set apart, asked as in a validation"
    else:
        episodes = play_step(agent, open_session(settings, CPU, agent.task), limit)
        what = f"of {settings.episodes_per_step} episodes of step {step + 1}"
        is_done = step < max(page.curves(path)["steps"], default=0)
        what += "" if is_done else ", which the run has not done"
    about = f"{name} ({settings.phase}): {len(episodes)} {what}. Weights after step {step}."
    return Side(name, about, rows_of(agent, episodes), agent.guide)


def compare_runs(names: Sequence[str], agents: Sequence[Agent], limit: int) -> list[Side]:
    """The questions that the first run has set apart, asked of both."""
    sessions = [open_session(agent.settings, CPU, agent.task) for agent in agents]
    asked = sessions[0].val_questions[:limit]
    if not asked:
        raise ValueError(f"{names[0]}: got no question set apart (--val-size), expected some to "
                         "ask both runs; evaluate both with eval.py --episodes instead")
    sides = []
    for name, agent, session in zip(names, agents, sessions, strict=True):
        num_known = len({q.id for q in session.questions} & {q.id for q in asked})
        about = (f"{name} ({agent.settings.phase}): {len(asked)} questions that {names[0]} has set "
                 f"apart, asked as in a validation. Weights after step {agent.step}.")
        about += f" It may have trained on {num_known} of them." if num_known else ""
        rows = rows_of(agent, validation(agent, session, asked))
        sides.append(Side(name, about, rows, agent.guide))
    return sides


def read_file(name: str, path: Path, model: str, record: dict[str, Any] | None,
              options: Namespace) -> Side:
    """The episodes of a file, or of an evaluation's folder; with a model, also their numbers."""
    file = path / "episodes.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: got no run.json of a training run and no episodes.jsonl, expected one of "
            "them, or an episodes file; eval.py --episodes writes one")
    rows = [(f"{file}:{line}", row)
            for line, row in islice(read_rows(file, "episode"), options.limit)]
    about = f"{name}: {len(rows)} episodes" + (f", scored by {model}." if model else ".")
    if not model:
        if options.teacher:
            raise ValueError("--teacher: got it without --model, expected both; a KL is between "
                             "two models")
        return Side(name, about, [plain_row(row, where) for where, row in rows])
    actor = load_policy(model, CPU, "model")
    settings = TrainSettings(teacher=options.teacher)
    guide = open_frozen(settings, CPU, "teacher", actor) if options.teacher else None
    episodes = [parse_episode(row, actor.tokenizer, where) for where, row in rows]
    for episode, (_, row) in zip(episodes, rows, strict=True):
        episode.queries = [str(query) for query in row.get("queries") or ()]
    numbers = token_numbers(Models(actor, None, guide), episodes, settings)
    return Side(name, about, [
        as_row(episode, float(row.get("score", episode.score)), its, actor.tokenizer)
        for episode, its, (_, row) in zip(episodes, numbers, rows, strict=True)])


def pair_up(sides: Sequence[Side]) -> list[list[Row | None]]:
    """Episodes of the same question beside each other: the k-th of one with the other's k-th."""
    if len(sides) == 1:
        return [[row] for row in sides[0].rows]
    left, right = ({key: row for key, row in zip(keys(side.rows), side.rows, strict=True)}
                   for side in sides)
    shared = [[row, right[key]] for key, row in left.items() if key in right]
    if not shared:
        raise ValueError(f"viewer.py: got no question in both {sides[0].name} and {sides[1].name}, "
                         "expected the same ids (or texts) in both; show them one by one")
    return shared


def keys(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """(set, question, how many episodes of it came before) of each row."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for row in rows:
        about = row["set"], row["id"] or row["question"]
        seen[about] = seen.get(about, -1) + 1
        result.append((*about, seen[about]))
    return result


# ---- tables ----


def tables(path: Path, name: str) -> list[dict[str, Any]]:
    """The tables of evaluations in this folder, or where eval.py puts those of this run."""
    folders = [path, path.absolute().parent / "eval" / path.absolute().name]
    found = []
    for folder in folders if path.is_dir() else []:
        if result := read_json(folder / "result.json", {}).get("sets"):
            rest = read_json(folder / "result.json")
            parts = {**{NAMES.get(key, key): result[key] for key in sort_sets({*result})},
                     "Avg. of sets": rest["average"], "All questions": rest["all"]}
            found.append(table(f"{name}: sets", ("n", *MEASURES), parts, folder))
        if sets := read_json(folder / "arcap.json", {}).get("arcap"):
            parts = {NAMES.get(key, key): sets[key] for key in sort_sets({*sets})}
            found.append(table(f"{name}: ARCap", ("n", *ARCAP), parts, folder))
    return found


def table(title: str, columns: Sequence[str], parts: dict[str, dict[str, float]],
          folder: Path) -> dict[str, Any]:
    rows = [[part, *(page.rounded(values.get(column)) for column in columns)]
            for part, values in parts.items()]
    return {"title": title, "about": f"from {folder}", "head": ["", *columns], "rows": rows}


# ---- the program ----


def show(argv: list[str]) -> None:
    """Write the page of one or two paths."""
    parser = cli.Parser("viewer.py", description="Show episodes token by token, curves and "
                        "tables in one page. Also: viewer.py watch --help.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run's folder, an "
                        "evaluation's (eval.py --episodes), or an episodes file; two: side by side")
    parser.add_argument("--out", type=Path, default="page.html", help="(default %(default)s)")
    parser.add_argument("--teacher", default="", metavar="DIR",
                        help="in place of the run's; with a file and --model: whose KL is shown")
    parser.add_argument("--model", nargs="+", default=[], metavar="DIR",
                        help="for each file: whose log-probabilities are shown")
    parser.add_argument("--step", type=count, help="training step that a run plays again "
                        "(default: the one after its newest state)")
    parser.add_argument("--limit", type=count, default=page.MAX_EPISODES, help="episodes at most; "
                        f"{page.MAX_EPISODES} stand on a page (default %(default)s)")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    sides = read_sides(options)
    named = [*zip(options.paths, (side.name for side in sides), strict=True)]
    episodes = pair_up(sides)
    guide = sides[0].guide if len({side.guide for side in sides}) == 1 else "guide"
    data = {
        "title": " and ".join(side.name for side in sides),
        "quantities": {key: name.format(guide) for key, name in QUANTITIES.items()},
        "about": [side.about for side in sides],
        "sides": [{"name": side.name, "guide": side.guide} for side in sides],
        "runs": [curve for path, name in named if (curve := page.curves(path, name))["steps"]],
        "tables": [part for path, name in named for part in tables(path, name)],
        "step": options.step}
    written = page.write(options.out, data, episodes)
    size = sum(path.stat().st_size for path in written) / 1e6
    more = f" to {written[-1].name} ({len(written)} pages)" if len(written) > 1 else ""
    print(f"wrote {options.out}{more}: {len(episodes)} episodes, {size:.2f} MB, "
          f"{time.perf_counter() - started:.0f} s")


def watch(argv: list[str]) -> None:
    """Write a page of all runs in a folder, again and again while one of them goes on."""
    parser = cli.Parser("viewer.py watch", description="Redraw the curves and newest samples of "
                        "all runs in a folder, until they have ended. The page reloads itself.")
    parser.add_argument("folder", type=Path, help="it, or folders in it, are runs")
    parser.add_argument("--out", type=Path, default="watch.html", help="(default %(default)s)")
    parser.add_argument("--every", type=number, default=10, metavar="SECONDS",
                        help="between two drawings; 0: draw once (default %(default)s)")
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        raise FileNotFoundError(f"{options.folder}: got no folder, expected one that holds runs")
    is_told, goes_on = False, True
    while goes_on:
        folders = page.find_runs(options.folder)
        goes_on = options.every > 0 and not all(map(page.is_finished, folders or [Path()]))
        page.write(options.out, watched(folders, options.folder, options.every * goes_on), [])
        if not is_told or not goes_on:
            print(f"wrote {options.out}: runs {len(folders)}" + (
                f"; drawn again every {options.every} s until they end, or Ctrl-C"
                if goes_on else ""), flush=True)
        is_told = True
        time.sleep(options.every * goes_on)


def watched(folders: Sequence[Path], root: Path, every: int) -> dict[str, Any]:
    """What the page of runs in progress shows; every: seconds until it reloads, 0: never."""
    runs = [page.curves(folder, page.name_in(folder, root)) for folder in folders]
    return {"title": f"Runs in {root}", "sides": [], "quantities": {}, "refresh": every,
            "about": [f"Drawn again every {every} s." if every else "No run is in progress."],
            "runs": runs, "tables": [page.progress_table(folders, root)]}


def main(argv: list[str]) -> None:
    with cli.reporting("viewer.py"):
        if argv[:1] == ["watch"]:
            watch(argv[1:])
        else:
            show(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
