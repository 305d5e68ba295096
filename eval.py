"""Measures a model on question sets: exact match, F1, hit ratio, searches, ARCap, intervals.

The average is the paper's: the unweighted mean over the sets (Table 2). The mean over all questions
stands beside it.

Departures from the official evaluation
1. Every row counts; the official loader drops the last incomplete batch.
2. Decoding is greedy by default. The official validation samples at temperature 1: give
   --temperature 1 to compare with the paper's numbers.
3. The answer and the passages come from the recorded episode, not from a search in its text. The
   official scorer reads an answer from the prompt, and its per-set search counts are misaligned.

    python eval.py --model runs/dgpo [--temperature 1] [--questions FILE ...] [--out DIR]
    python eval.py arcap --model runs/dgpo      # Agentic RAG Capabilities (Sec. 5.3-5.5, Table 5)
    python eval.py table RESULT.json ...        # one row each, the paper's columns
    python eval.py compare A.json B.json        # A - B, paired bootstrap
    python eval.py compare A0.json A1.json --against B0.json B1.json     # several seeds a side
    python eval.py plot RUN_DIR ... [--metrics loss/kd,rollout/score] [--out FILE.svg]

An evaluation writes result.json (the summary), .jsonl (a line for each question), .csv and .txt.

ARCap has three parts. The official code has none of them.
    source referencing  exact match when the agent is shown the gold passages at once: with the
                        answer forced, and after further thinking (Sec. 5.3)
    query rewriting     hit ratio of the first query (Sec. 5.4)
    thinking            hit ratio over all searches, and how many searches there were (Sec. 5.5)
Gold passages are the supporting paragraphs of a row's `context`. For a row without context they are
the corpus's passages with the titles in `metadata.hops`.
"""

import csv
import json
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import TEST_SETS, Passage, Question, f1, hit, load_questions
from episode import STATUSES, Episode, begin_episode, observation_ids, save_episodes
from infra import cli, config
from infra.config import setting
from infra.files import read_json, resolve
from infra.parallel import pick_device
from infra.programs import check_paths
from infra.record import model_name, recorded_settings
from retriever import Retriever, open_retriever
from rollout import Policy, RolloutSettings, generate, load_protocol
from serving.ask import RECORDED
from session import load_policy

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "world.toml"
# The paper's names of the sets (Table 2).
NAMES = {"nq": "NQ", "triviaqa": "TriviaQA", "popqa": "PopQA", "hotpotqa": "HotpotQA",
         "2wikimultihopqa": "2wiki", "musique": "MuSiQue", "bamboogle": "Bamboogle"}
QUESTION_FILES = tuple(f"world/questions/{name}.jsonl" for name in TEST_SETS)
MEASURES = ("em", "f1", "hit", "first_hit", "searches", "agent_tokens", *STATUSES)
# What an evaluation takes from a training preset: what is searched and how an episode runs. How
# training samples (temperature, seed) and what it trains on do not carry over.
SHARED = ("corpus", "encoder", "index", "device", "protocol", "prompt", "max_turns", "top_k",
          "max_new_tokens", "max_obs_tokens", "max_context_tokens", "rollout_rows", "answer_rule")

Record = dict[str, Any]  # a result, or a row of one
Intervals = dict[str, tuple[float, float, float]]  # set -> (mean, low, high)


@dataclass
class AgentSettings(RolloutSettings):
    """An agent that is watched or measured, not trained."""

    temperature: float = setting(0.0, "0: greedy; 1: as the official evaluation samples")
    model: str = setting("runs/dgpo", "checkpoint of the agent (folder or hub id)", reads="DIR")
    dtype: str = setting("float32", "dtype of the model", choices=("float32", "bfloat16"))
    device: str = setting("auto", "cpu, cuda, cuda:N, mps; auto: cuda where there is one")
    seed: int = setting(0, "sampling noise, at a temperature above 0", at_most=2**53)


@dataclass
class EvalSettings(AgentSettings):
    corpus: str = setting("world/corpus.jsonl", "passages, JSONL", reads="FILE")
    encoder: str = setting("world/encoder", "checkpoint of the passage encoder", reads="DIR")
    name: str = setting("", "its name in tables; empty: the last part of model")
    questions: tuple[str, ...] = setting(QUESTION_FILES, "question files", reads="FILE")
    limit: int | None = setting(None, "only the first questions of each file", at_least=1)
    hit_rule: str = setting("words", "a passage has an answer as whole words, or (published) also "
                            "inside a word", choices=("words", "substring"))
    out: str = setting("", "folder to write; empty: runs/eval/<name>", writes="DIR")
    episodes: bool = setting(False, "also write every episode, token by token, to episodes.jsonl")


# ---- one evaluation ----


def evaluate(
    policy: Policy, retriever: Retriever | None, question_sets: dict[str, list[Question]],
    settings: RolloutSettings, *, seed: int = 0, progress: bool = False,
    keep: list[Episode] | None = None, hit_rule: str = "words",
) -> Record:
    """Answer every question and average what came of it.

    Returns {"sets": {name: measures}, "average": over sets, "all": over questions, "scores": one
    row for each question}. The episodes are appended to `keep`, if it is given.
    """
    rows = []
    for name, questions in question_sets.items():
        episodes = generate(policy, retriever, questions, settings, seed=set_seed(seed, name),
                            progress=name if progress else "")
        rows += [score(name, episode, hit_rule) for episode in episodes]
        if keep is not None:
            keep += episodes
    return summarize(rows) | {"scores": rows}


def set_seed(seed: int, name: str) -> int:
    """A set's seed depends on its name, so its result is the same whatever else is measured."""
    return seed + zlib.crc32(name.encode())


def score(name: str, episode: Episode, hit_rule: str = "words") -> Record:
    """The measures of one episode of set `name`, from its record alone, never from its text."""
    golds, rule = episode.question.golden_answers, episode.question.answer_rule
    hits = [hit(passages, golds, rule, whole_words=hit_rule == "words")
            for passages in episode.passages]
    return {
        "set": name, "id": episode.question.id,
        "em": episode.score, "f1": f1(episode.answer, golds, rule),
        "hit": float(any(hits)), "first_hit": float(any(hits[:1])),
        "searches": episode.num_searches, "agent_tokens": episode.num_agent_tokens,
        "status": episode.status, "answer": episode.answer,
    }


def summarize(rows: Sequence[Record]) -> Record:
    """Means of every measure: for each set, over the sets, over all questions."""
    if not rows:
        raise ValueError("evaluate: got no questions, expected at least one")
    sets = {}
    for name in sort_sets({row["set"] for row in rows}):
        sets[name] = mean_measures([row for row in rows if row["set"] == name])
    average: dict[str, float] = {"n": len(rows)}
    for measure in MEASURES:
        average[measure] = float(np.mean([values[measure] for values in sets.values()]))
    return {"sets": sets, "average": average, "all": mean_measures(rows)}


def mean_measures(rows: Sequence[Record]) -> dict[str, float]:
    """{"n": number of rows, measure: its mean}; the mean of a status is the share that ended so."""
    means: dict[str, float] = {"n": len(rows)}
    for measure in MEASURES:
        is_status = measure in STATUSES
        values = [row["status"] == measure if is_status else row[measure] for row in rows]
        means[measure] = float(np.mean(values))
    return means


def sort_sets(names: set[str]) -> list[str]:
    """The paper's order, then others by name."""
    return [n for n in TEST_SETS if n in names] + sorted(names - set(TEST_SETS))


def read_sets(
    paths: Sequence[str], limit: int | None, answer_kinds: Sequence[str] = ("text",),
    answer_rule: str = "squad",
) -> dict[str, list[Question]]:
    """Read question files and sort the questions into the sets that their rows name.

    answer_kinds: what the caller can score; a row may ask for another kind of answer than text.
    """
    sets: dict[str, list[Question]] = {}
    for path in paths:
        for question in load_questions(path, limit=limit, answer_rule=answer_rule):
            check_answer_kind(question, answer_kinds)
            sets.setdefault(question.source, []).append(question)
    for name, questions in sets.items():
        if len({q.id for q in questions}) < len(questions):
            raise ValueError(f"questions: got ids of set {name} more than once, expected each file "
                             "to be another set or another part; drop one of the files")
    return {name: sets[name] for name in sort_sets(set(sets))}


def check_answer_kind(question: Question, answer_kinds: Sequence[str] = ("text",)) -> None:
    """Refuse a question whose row asks for a comparison of answers that the caller lacks."""
    kind = question.metadata.get("answer_kind", "text")
    if kind not in answer_kinds:
        raise ValueError(f"{question.id}: got {kind!r} for answer_kind, expected one of "
                         f"{', '.join(answer_kinds)} (integer and choice are for bard.py)")


def save_result(result: Record, out: Path) -> None:
    """Write result.json, .jsonl, .csv and .txt to the folder `out`."""
    summary = {key: value for key, value in result.items() if key != "scores"}
    write_result(out / "result.json", summary, result["scores"])
    with (out / "result.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "set", "n", *MEASURES])
        for part, values in _parts(result).items():
            writer.writerow([result["name"], part, *(values[key] for key in ("n", *MEASURES))])
    text = f"{table([result])}\n\n{details(result)}\n"
    (out / "result.txt").write_text(text, encoding="utf-8")


def write_result(path: Path, result: Record, rows: Sequence[Record] = ()) -> None:
    """Write a .json file, and beside it a .jsonl file with a line for each row if there are any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    if lines:
        path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")


def _parts(result: Record) -> dict[str, dict[str, float]]:
    """The sets and the two means below them, by the names that tables show."""
    parts = {NAMES.get(name, name): values for name, values in result["sets"].items()}
    return parts | {"Avg. of sets": result["average"], "All questions": result["all"]}


# ---- ARCap ----


def arcap(
    policy: Policy, retriever: Retriever, question_sets: dict[str, list[Question]],
    settings: RolloutSettings, *, seed: int = 0, progress: bool = False, hit_rule: str = "words",
) -> dict[str, dict[str, float]]:
    """The parts of ARCap for each set.

    Returns {set: {"n", "em", "first_hit", "hit", "searches", "num_gold", "without_thinking",
    "with_thinking"}}. The last two are exact match over the num_gold questions whose gold passages
    are known, NaN if there are none.
    """
    plain = evaluate(policy, retriever, question_sets, settings, seed=seed, progress=progress,
                     hit_rule=hit_rule)
    protocol = load_protocol(settings.protocol)
    room = settings.max_context_tokens // 2  # the rest is for what the agent writes and searches
    result = {}
    for name, questions in question_sets.items():
        means = plain["sets"][name]
        result[name] = {m: means[m] for m in ("n", "em", "first_hit", "hit", "searches")}
        golds = gold_passages(questions, retriever)
        result[name]["num_gold"] = sum(map(bool, golds))
        for key, opens, max_turns in (("without_thinking", "<answer>", 0),
                                      ("with_thinking", "", settings.max_turns)):
            episodes = []
            for question, gold in zip(questions, golds, strict=True):
                if gold:
                    shown = observation_ids(policy.tokenizer, gold, room, protocol)
                    episodes.append(begin_episode(
                        policy.tokenizer, question, settings.prompt, shown=shown, opens=opens))
            episodes = generate(
                policy, retriever, episodes, replace(settings, max_turns=max_turns),
                seed=set_seed(seed, name),
                progress=f"{name}, {key.replace('_', ' ')}" if progress else "")
            scores = [episode.score for episode in episodes]
            result[name][key] = float(np.mean(scores)) if scores else math.nan
    return result


def gold_passages(
    questions: Sequence[Question], retriever: Retriever | None
) -> list[list[Passage]]:
    """The gold passages of each question, in the order of its hops; empty if they are unknown."""
    titles = [[hop[0] for hop in q.metadata.get("hops", [])] for q in questions]
    wanted = {title for row in titles for title in row}
    by_title: dict[str, Passage] = {}
    for row in range(len(retriever.corpus) if wanted else 0):
        passage = retriever.corpus.passage(row, 0.0)
        if passage.name in wanted:
            by_title[passage.name] = passage
    gold = []
    for question, row in zip(questions, titles, strict=True):
        if question.context:
            supporting = [p for p in question.context if p.get("is_supporting")]
            # In quotes, as Search-R1's corpus has titles.
            gold.append([Passage("", f'"{p["title"]}"', p["text"], 0.0) for p in supporting])
        else:
            gold.append([by_title[title] for title in row if title in by_title])
    return gold


def arcap_table(results: Sequence[Record]) -> str:
    """The columns of Table 5 for each set: exact match with and without thinking, searches."""
    keys = ("without_thinking", "with_thinking", "first_hit", "hit", "searches")
    lines = []
    for name in sort_sets({name for result in results for name in result["arcap"]}):
        lines.append([NAMES.get(name, name), "w/o", "w/ thinking", "first hit", "hit", "searches"])
        for label, seeds in by_name(results).items():
            measured = [seed["arcap"].get(name, {}) for seed in seeds]
            means = [np.mean([values.get(key, math.nan) for values in measured]) for key in keys]
            cells = ["-" if math.isnan(mean) else f"{mean:.3f}" for mean in means]
            lines.append([f"  {label}", *cells])
    return align(lines)


# ---- tables ----


def table(results: Sequence[Record], measure: str = "em") -> str:
    """One row for each name, in the shape of the paper's Table 2.

    Several results of a name are seeds: the row shows their mean, and after the average its sample
    standard deviation over the seeds.
    """
    names = sort_sets({name for result in results for name in result["sets"]})
    lines = [["", *(NAMES.get(name, name) for name in names), "Avg."]]
    is_partial = False
    for label, seeds in by_name(results).items():
        cells = []
        for name in names:
            values = [seed["sets"][name][measure] for seed in seeds if name in seed["sets"]]
            cells.append(f"{np.mean(values):.3f}" if len(values) == len(seeds) else "-")
        averages = [seed["average"][measure] for seed in seeds]
        average = f"{np.mean(averages):.3f}"
        if len(seeds) > 1:
            average += f" \u00b1{np.std(averages, ddof=1):.3f}"
        if "-" in cells:
            average += "*"
            is_partial = True
        lines.append([label, *cells, average])
    note = "\n* average over the sets shown in its row" if is_partial else ""
    return align(lines) + note


def by_name(results: Sequence[Record]) -> dict[str, list[Record]]:
    """Results grouped by name, in the order in which the names first appear."""
    groups: dict[str, list[Record]] = {}
    for result in results:
        groups.setdefault(result["name"], []).append(result)
    return groups


def details(result: Record) -> str:
    """Every measure of one result; the statuses as shares of the episodes."""
    lines = [["", "n", *MEASURES]]
    for part, values in _parts(result).items():
        cells = [f"{values[m]:.{1 if m == 'agent_tokens' else 3}f}" for m in MEASURES]
        lines.append([part, str(values["n"]), *cells])
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column flush left, the others flush right, a rule below line 1."""
    first, *rest = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for label, *cells in lines:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, rest, strict=True)]
        texts.append("  ".join([f"{label:<{first}}", *padded]))
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


# ---- comparisons ----


def bootstrap(
    differences: dict[str, np.ndarray], *, resamples: int = 10_000, seed: int = 0
) -> Intervals:
    """Paired bootstrap of a mean difference, with 95 % percentile intervals.

    differences: {set: one number for each question}. Returns {set: (mean, low, high)}, with
    "average" over the sets and "all" over the questions. Questions are drawn anew within their set,
    so the sets keep their sizes. n draws with replacement from n values are one multinomial draw
    over the distinct values, of which there are few.
    """
    rng = np.random.default_rng(seed)
    means = {}  # [1 + R] for each set; entry 0 is the observed mean
    for name, values in differences.items():
        distinct, counts = np.unique(values, return_counts=True)
        drawn = rng.multinomial(len(values), counts / len(values), size=resamples)  # [R, distinct]
        means[name] = np.vstack([counts, drawn]) @ distinct / len(values)
    sets = np.stack(list(means.values()))  # [sets, 1 + R]
    sizes = [len(values) for values in differences.values()]
    means |= {"average": sets.mean(0), "all": np.average(sets, axis=0, weights=sizes)}
    intervals = {}
    for name, drawn in means.items():
        low, high = np.percentile(drawn[1:], [2.5, 97.5])
        intervals[name] = (float(drawn[0]), float(low), float(high))
    return intervals


def compare(left: Sequence[Path], right: Sequence[Path], measure: str = "em") -> Intervals:
    """left - right on the same questions; several files of a side are seeds, averaged first."""
    rules = {_rules(path, measure) for path in (*left, *right)}
    if len(rules) > 1:
        raise ValueError(f"compare: got {measure} by the rules {' and '.join(sorted(rules))}, "
                         "expected one rule on both sides; evaluate both alike")
    ours, theirs = _mean_scores(left, measure), _mean_scores(right, measure)
    if ours.keys() != theirs.keys():
        raise ValueError(f"compare: got {len(ours)} and {len(theirs)} questions, "
                         f"{len(ours.keys() & theirs.keys())} of them shared, expected the same "
                         "questions on both sides; evaluate both on the same files")
    differences: dict[str, list[float]] = {}
    for (set_name, id), value in ours.items():
        differences.setdefault(set_name, []).append(value - theirs[set_name, id])
    return bootstrap({name: np.array(differences[name]) for name in sort_sets(set(differences))})


def compare_correct(left: Sequence[Record], right: Sequence[Record]) -> Intervals:
    """left - right of recorded results, {"correct": {set: "0110..."}} with a digit a question."""

    def mean(side: Sequence[Record], name: str) -> np.ndarray:
        return np.mean([np.array([*result["correct"][name]], float) for result in side], axis=0)

    names = sort_sets(set(left[0]["correct"]))
    return bootstrap({name: mean(left, name) - mean(right, name) for name in names})


def _rules(path: Path, measure: str) -> str:
    """The rules by which a result was scored, as flags; results that name none are older."""
    settings = read_json(path.with_suffix(".json"), {}).get("settings", {})
    rules = []
    if measure in ("em", "f1", "hit", "first_hit"):
        rules.append(f"--answer-rule {settings.get('answer_rule', 'squad')}")
    if measure in ("hit", "first_hit"):
        rules.append(f"--hit-rule {settings.get('hit_rule', 'substring')}")
    return " ".join(rules)


def _mean_scores(paths: Sequence[Path], measure: str) -> dict[tuple[str, str], float]:
    """(set, id) -> the mean of a measure over the files."""
    files = []
    for path in (path.with_suffix(".jsonl") for path in paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, expected the scores beside result.json; "
                                    "keep the two together")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        files.append({(row["set"], row["id"]): float(row[measure]) for row in rows})
        if files[-1].keys() != files[0].keys():
            raise ValueError(f"{path}: got other questions than {paths[0]}, expected the same for "
                             "every seed")
    return {key: sum(file[key] for file in files) / len(files) for key in files[0]}


# ---- the program ----


def load_agent(settings: AgentSettings) -> tuple[Policy, Retriever | None]:
    """The policy, and what it searches: None with --max-turns 0."""
    dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
    policy = load_policy(settings.model, device, "model", dtype)
    return policy, load_retriever(settings) if settings.max_turns > 0 else None


def load_retriever(settings: AgentSettings) -> Retriever:
    return open_retriever(settings, pick_device(settings.device))




def name_and_out(settings: EvalSettings, measured: str) -> tuple[str, Path]:
    """The name in tables of what is measured (a path or a word), and the folder of its result."""
    name = settings.name or model_name(measured)
    return name, Path(settings.out or config.in_project(f"runs/eval/{name}"))


def run_evaluation(settings: EvalSettings, *, is_arcap: bool) -> None:
    """Load, evaluate, write, print."""
    sets = read_sets(  # mistakes show before the long loads
        settings.questions, settings.limit, answer_rule=settings.answer_rule)
    load_protocol(settings.protocol)
    if is_arcap and settings.max_turns == 0:
        raise ValueError("arcap: got --max-turns 0, expected turns that search")
    if Path(settings.model).is_dir():  # of a run that is not done: the state that is measured
        settings = replace(settings, model=str(resolve(settings.model)))
    policy, retriever = load_agent(settings)
    name, out = name_and_out(settings, settings.model)
    result: Record = {"name": name, "settings": asdict(settings)}
    if is_arcap:
        result["arcap"] = arcap(
            policy, retriever, sets, settings, seed=settings.seed, progress=True,
            hit_rule=settings.hit_rule)
        write_result(out / "arcap.json", result)
        print(f"{arcap_table([result])}\n\nwrote {out}/arcap.json")
        return
    episodes: list[Episode] = []
    result |= evaluate(policy, retriever, sets, settings, seed=settings.seed, progress=True,
                       keep=episodes, hit_rule=settings.hit_rule)
    save_result(result, out)
    config.save(settings, out / "run.json")
    if settings.episodes:
        save_episodes(out / "episodes.jsonl", episodes, policy.tokenizer)
    print((out / "result.txt").read_text(encoding="utf-8"))
    print(f"wrote {out}/result.json, .jsonl, .csv, .txt")


def show_results(command: str, argv: list[str]) -> None:
    """The commands that read files of earlier evaluations: table and compare."""
    parser = cli.Parser(f"eval.py {command}")
    parser.add_argument("files", nargs="+", type=Path, help="result.json of evaluations")
    parser.add_argument("--measure", default="em", choices=MEASURES[:6])
    if command == "table":
        options = parser.parse_args(argv)
        results = [read_json(path) for path in options.files]
        has_arcap = all("arcap" in result for result in results)
        print(arcap_table(results) if has_arcap else table(results, options.measure))
        return
    parser.add_argument("--against", nargs="+", type=Path, help="other side, of several seeds")
    options = parser.parse_args(argv)
    left, right, measure = options.files, options.against, options.measure
    if right is None:
        if len(left) != 2:
            parser.error(f"got {len(left)} files, expected A.json B.json; or use --against")
        left, right = left[:1], left[1:]
    lines = [[f"{measure}: difference", "mean", "95 % low", "high"]]
    titles = NAMES | {"average": "Avg. of sets", "all": "All questions"}
    for name, numbers in compare(left, right, measure).items():
        lines.append([titles.get(name, name), *(f"{number:+.4f}" for number in numbers)])
    print(align(lines))


def plot_runs(argv: list[str]) -> None:
    """Draw what runs have logged, also while they go on."""
    from infra.curves import plot_metrics  # here, because it needs matplotlib

    parser = cli.Parser("eval.py plot", description="Draw what runs have logged.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or metrics.jsonl")
    parser.add_argument("--metrics", default="", metavar="A,B", help="a panel for each; default: "
                        "score, loss, entropy, KL, lengths and searches, if they are logged")
    parser.add_argument("--out", type=Path, default="curves.svg", help="file (default %(default)s)")
    options = parser.parse_args(argv)
    plot_metrics(options.runs, [name for name in options.metrics.split(",") if name], options.out)
    print(f"wrote {options.out}")


def main(argv: list[str]) -> None:
    command, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if command in ("table", "compare"):
        return show_results(command, rest)
    if command == "plot":
        return plot_runs(rest)
    if command not in ("", "arcap"):
        cli.leave("eval.py", f"got {command!r}, expected arcap, table, compare, plot, or flags",
                     2)
    settings = cli.load(
        EvalSettings, rest, prog="eval.py", default_config=DEFAULT_CONFIG, shared=SHARED,
        recorded=partial(recorded_settings, sorted(RECORDED)),
        description="Measure a model on question sets. "
                    "Also: eval.py {arcap,table,compare,plot} --help.")
    check_paths(settings)
    run_evaluation(settings, is_arcap=command == "arcap")


if __name__ == "__main__":
    with cli.reporting("eval.py"):
        main(sys.argv[1:])
