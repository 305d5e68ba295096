"""Measuring: exact match, F1, hit ratio and searches per question set, ARCap, tables, intervals, curves.

The average is the paper's: the unweighted mean over the sets (Table 2). Beside it stands the mean
over all questions.

Departures from the official evaluation
1. Every row counts; the official loader drops the last incomplete batch.
2. Greedy by default. The official validation samples at temperature 1: compare with the paper's
   numbers under --temperature 1.
3. The answer and the passages come from the recorded episode, not from a search in its text (the
   official scorer reads an answer from the prompt, and its per-set search counts are misaligned).

    python eval.py --model runs/dgpo [--temperature 1] [--questions FILE ...] [--out DIR]
    python eval.py arcap --model runs/dgpo               # Agentic RAG Capabilities (Sec. 5.3-5.5, Table 5)
    python eval.py --budgets 16,32,64 --model runs/bard-rl --questions FILE ...   # thinking budgets (bard.py)
    python eval.py --table RESULT.json ...               # one row each, the paper's columns
    python eval.py compare A.json B.json                 # A - B, paired bootstrap
    python eval.py compare A0.json A1.json --against B0.json B1.json     # several seeds a side
    python eval.py plot runs/dgpo/metrics.jsonl ... --out curve.png      # also DIR/budgets.json ...

An evaluation writes DIR/result.json (summary), .jsonl (a line for each question), .csv and .txt.

ARCap: (2a) source referencing: exact match when the gold passages are shown at once, with the answer forced or after
further thinking; (2b) query rewriting: hit ratio of the first query; (2c) thinking: hit ratio over all searches, and
how many there were. The official code has none of it; gold passages are a row's supporting `context`, or the
corpus's passages with the titles in `metadata.hops`.
"""

import argparse
import csv
import json
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bard
import config
from config import setting
from data import TEST_SETS, Question, check_budget, f1, hit, load_questions
from episode import STATUSES, Episode, save_episodes
from model import Tokenizer, load_decoder, pick_device
from plots import plot_budgets, plot_curves
from protocol import PROTOCOLS, observation_ids
from retriever import Passage, Retriever
from rollout import Policy, RolloutSettings, generate

ROOT = Path(__file__).resolve().parent
NAMES = {"nq": "NQ", "triviaqa": "TriviaQA", "popqa": "PopQA", "hotpotqa": "HotpotQA",
         "2wikimultihopqa": "2wiki", "musique": "MuSiQue", "bamboogle": "Bamboogle"}  # Table 2
MEASURES = ("em", "f1", "hit", "first_hit", "searches", "agent_tokens", *STATUSES)
# Taken from a training preset: what is searched and how an episode runs; never how training
# samples (temperature, seed) nor what it trains on.
SHARED = ("corpus", "encoder", "index", "device", "prompt", "max_turns", "top_k", "max_new_tokens",
          "max_obs_tokens", "max_context_tokens", "rollout_rows", "budget_text", "protocol", "max_queries")


@dataclass
class EvalSettings(RolloutSettings):
    temperature: float = setting(0.0, "0: greedy; 1: as the official evaluation samples")
    model: str = setting("runs/dgpo", "checkpoint to measure (folder or hub id)")
    name: str = setting("", "its name in tables; empty: the last part of model")
    questions: tuple[str, ...] = setting(
        tuple(f"world/questions/{name}.jsonl" for name in TEST_SETS), "question files, JSONL")
    limit: int | None = setting(None, "the first questions of each file alone")
    corpus: str = setting("world/corpus.jsonl", "passages, JSONL")
    encoder: str = setting("world/encoder", "checkpoint of the passage encoder")
    index: str = setting("", "index of the corpus; empty: embed the corpus at the start")
    device: str = setting("auto", "cpu, cuda, mps; auto: cuda where there is one")
    dtype: str = setting("float32", "dtype of the model", choices=("float32", "bfloat16"))
    seed: int = setting(0, "sampling noise, at a temperature above 0")
    out: str = setting("", "folder to write; empty: runs/eval/<name>")
    budget: int | None = setting(None, "tokens to think, told to the agent")
    budgets: tuple[int, ...] = setting((), "every question at each of these budgets, freely and with a hard stop")
    episodes: bool = setting(False, "also write every episode, token by token, to episodes.jsonl")


# ---- one evaluation ----


def evaluate(
    policy: Policy, retriever: Retriever, question_sets: dict[str, list[Question]],
    settings: RolloutSettings, *, seed: int = 0, progress: bool = False,
    keep: list[Episode] | None = None,
) -> dict[str, Any]:
    """Answer every question. Returns {"sets": {name: measures}, "average": over sets, "all": over
    questions, "scores": one row for each question}; `keep` collects the episodes."""
    rows = []
    for name, questions in question_sets.items():
        # The noise depends on the set's name: its result is the same whatever else is measured.
        episodes = generate(policy, retriever, questions, settings,
                            seed=seed + zlib.crc32(name.encode()),
                            progress=name if progress else "")
        rows += [score(name, episode) for episode in episodes]
        if keep is not None:
            keep += episodes
    return summarize(rows) | {"scores": rows}


def score(name: str, episode: Episode) -> dict[str, Any]:
    """What one episode counts for; from its record alone, never from its text."""
    golds = episode.question.golden_answers
    return {
        "set": name, "id": episode.question.id, "em": episode.score,
        "f1": f1(episode.answer, golds),
        "hit": float(any(hit(passages, golds) for passages in episode.passages)),
        "first_hit": float(any(hit(passages, golds) for passages in episode.passages[:1])),
        "searches": episode.num_searches, "agent_tokens": episode.num_agent_tokens,
        "status": episode.status, "answer": episode.answer,
    }  # fmt: skip


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of every measure: for each set, over the sets, over all questions."""
    def means(some: list[dict[str, Any]]) -> dict[str, float]:
        values = [row | {status: row["status"] == status for status in STATUSES} for row in some]
        return {"n": len(some)} | {m: float(np.mean([v[m] for v in values])) for m in MEASURES}

    if not rows:
        raise ValueError("evaluate: got no questions, expected at least one")
    names = sort_sets({row["set"] for row in rows})
    sets = {name: means([row for row in rows if row["set"] == name]) for name in names}
    average = {m: float(np.mean([values[m] for values in sets.values()])) for m in MEASURES}
    return {"sets": sets, "average": {"n": len(rows)} | average, "all": means(list(rows))}


def sort_sets(names: set[str]) -> list[str]:
    """The paper's order, then others by name."""
    return [n for n in TEST_SETS if n in names] + sorted(names - set(TEST_SETS))


def read_sets(paths: Sequence[str], limit: int | None) -> dict[str, list[Question]]:
    """Question files by the set that their rows name."""
    sets: dict[str, list[Question]] = {}
    for path in paths:
        for question in load_questions(path, limit=limit):
            sets.setdefault(question.source, []).append(question)
    for name, questions in sets.items():
        if len({q.id for q in questions}) < len(questions):
            raise ValueError(f"questions: got ids of set {name} more than once, expected each file "
                             "to be another set or another part; drop one of the files")
    return {name: sets[name] for name in sort_sets(set(sets))}


def save_result(result: dict[str, Any], out: Path) -> None:
    """result.json, .jsonl, .csv and .txt."""
    out.mkdir(parents=True, exist_ok=True)
    summary = {key: value for key, value in result.items() if key != "scores"}
    with (out / "result.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result["scores"])
    with (out / "result.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "set", "n", *MEASURES])
        for part, values in _parts(result).items():
            writer.writerow([result["name"], part, *(values[key] for key in ("n", *MEASURES))])
    text = f"{table([result])}\n\n{details(result)}\n"
    (out / "result.txt").write_text(text, encoding="utf-8")
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (out / "result.json").write_text(text, encoding="utf-8")


def _parts(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The sets and the two means below them, by the names that tables show."""
    parts = {NAMES.get(name, name): values for name, values in result["sets"].items()}
    return parts | {"Avg. of sets": result["average"], "All questions": result["all"]}


# ---- ARCap ----


def arcap(
    policy: Policy, retriever: Retriever, question_sets: dict[str, list[Question]], settings: RolloutSettings, *,
    seed: int = 0, progress: bool = False,
) -> dict[str, dict[str, float]]:
    """{set: {"without_thinking": EM, "with_thinking": EM, "first_hit", "hit", "searches"}}; the first two over the
    questions whose gold passages are known ("num_gold")."""
    parts = evaluate(policy, retriever, question_sets, settings, seed=seed, progress=progress)["sets"]
    result = {name: {m: parts[name][m] for m in ("n", "em", "first_hit", "hit", "searches")} for name in parts}
    for name, questions in question_sets.items():
        known = [(q, gold) for q, gold in zip(questions, gold_passages(questions, retriever), strict=True) if gold]
        result[name]["num_gold"] = len(known)
        shown = [observation_ids(policy.tokenizer, gold, settings.max_context_tokens // 2, PROTOCOLS[settings.protocol])
                 for _, gold in known]
        for key, forced, turns in (("without_thinking", "<answer>", 0), ("with_thinking", "", settings.max_turns)):
            episodes = generate(policy, retriever, [q for q, _ in known], replace(settings, max_turns=turns),
                                seed=seed + zlib.crc32(name.encode()), shown=shown, forced=forced,
                                progress=f"{name}, {key.replace('_', ' ')}" if progress else "")
            result[name][key] = float(np.mean([e.score for e in episodes])) if known else math.nan
    return result


def gold_passages(questions: Sequence[Question], retriever: Retriever) -> list[list[Passage]]:
    """Of each question, in the order of its hops; empty where they are not known."""
    titles = [[hop[0] for hop in q.metadata.get("hops", [])] for q in questions]
    wanted = {title for row in titles for title in row}
    corpus = (retriever.corpus.passage(row, 0.0) for row in range(len(retriever.corpus) if wanted else 0))
    found = {passage.title: passage for passage in corpus if passage.title in wanted}
    return [
        [Passage("", p["title"], p["text"], 0.0) for p in q.context if p.get("is_supporting")] if q.context
        else [found[title] for title in row if title in found]
        for q, row in zip(questions, titles, strict=True)
    ]


def arcap_table(results: Sequence[dict[str, Any]]) -> str:
    """Table 5's columns for each set: exact match without and with thinking, first hit, hit, searches."""
    lines = []
    for name in sort_sets({name for result in results for name in result["arcap"]}):
        lines.append([NAMES.get(name, name), "w/o", "w/ thinking", "first hit", "hit", "searches"])
        for label, seeds in by_name(results).items():
            keys = ("without_thinking", "with_thinking", "first_hit", "hit", "searches")
            means = [np.mean([seed["arcap"].get(name, {}).get(key, math.nan) for seed in seeds]) for key in keys]
            lines.append([f"  {label}", *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in means)])
    return align(lines)


# ---- tables ----


def table(results: Sequence[dict[str, Any]], measure: str = "em",
          beside: dict[str, dict[str, float | None]] | None = None) -> str:
    """One row for each name, in the shape of the paper's Table 2; several results of a name are seeds: their mean, and
    the standard deviation of the average. beside: further columns, a number for some names."""
    names = sort_sets({name for result in results for name in result["sets"]})
    beside = beside or {}
    lines = [["", *(NAMES.get(name, name) for name in names), "Avg.", *beside]]
    partial = False
    for label, seeds in by_name(results).items():
        cells = [f"{np.mean([seed['sets'][name][measure] for seed in seeds]):.3f}"
                 if all(name in seed["sets"] for seed in seeds) else "-" for name in names]
        mark = "*" if "-" in cells else ""
        partial |= bool(mark)
        averages = [seed["average"][measure] for seed in seeds]
        spread = f" \u00b1{np.std(averages, ddof=1):.3f}" if len(seeds) > 1 else ""
        others = [column.get(label) for column in beside.values()]
        lines.append([label, *cells, f"{np.mean(averages):.3f}{spread}{mark}",
                      *("" if value is None else f"{value:.3f}" for value in others)])
    return align(lines) + ("\n* average over the sets shown in its row" if partial else "")


def by_name(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results in the order of their names' first ones."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["name"], []).append(result)
    return groups


def budget_table(result: dict[str, Any]) -> str:
    """One line for each budget of bard.measure."""
    keys = ("formed", "adherence", "overshoot", "relative_error", "use", "length", "accuracy", "accuracy_free")
    lines = [["budget", *keys]]
    lines += [[str(budget), *(f"{values[key]:.3f}" for key in keys)] for budget, values in result["budgets"].items()]
    return align(lines) + (f"\nSpearman of length and budget within a question {result['spearman']:.3f}; area under "
                           f"accuracy over log budget {result['area']:.3f}")


def details(result: dict[str, Any]) -> str:
    """Every measure of one result; the statuses as shares of the episodes."""
    lines = [["", "n", *MEASURES]]
    for part, values in _parts(result).items():
        cells = [f"{values[m]:.{1 if m == 'agent_tokens' else 3}f}" for m in MEASURES]
        lines.append([part, str(values["n"]), *cells])
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    first, *rest = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [f"{line[0]:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in
             zip(line[1:], rest, strict=True)) for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


# ---- comparisons ----


def bootstrap(
    differences: dict[str, np.ndarray], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Paired bootstrap of a mean difference: {set: (mean, low, high)}, with "average" over the sets
    and "all" over the questions; 95 % percentile intervals.

    differences: for each set, one number a question. Questions are drawn anew within their set, so
    the sets keep their sizes. n draws with replacement from n values are one multinomial draw over
    the distinct values, of which there are few.
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
    return {name: (float(drawn[0]), *map(float, np.percentile(drawn[1:], [2.5, 97.5])))
            for name, drawn in means.items()}


def compare(
    left: Sequence[Path], right: Sequence[Path], measure: str = "em"
) -> dict[str, tuple[float, float, float]]:
    """left - right on the same questions; several files of a side are seeds, averaged first."""
    sides = [_mean_scores(paths, measure) for paths in (left, right)]
    if sides[0].keys() != sides[1].keys():
        raise ValueError(f"compare: got {len(sides[0])} and {len(sides[1])} questions, "
                         f"{len(sides[0].keys() & sides[1].keys())} of them shared, expected the "
                         "same questions on both sides; evaluate both on the same files")
    differences: dict[str, list[float]] = {}
    for key, value in sides[0].items():
        differences.setdefault(key[0], []).append(value - sides[1][key])
    return bootstrap({name: np.array(differences[name]) for name in sort_sets(set(differences))})


def compare_correct(
    left: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]
) -> dict[str, tuple[float, float, float]]:
    """left - right of recorded results, which hold a digit for each question: {"correct": {set: "0110..."}}."""
    def mean(side: Sequence[dict[str, Any]], name: str) -> np.ndarray:
        return np.mean([np.array([*result["correct"][name]], float) for result in side], axis=0)

    return bootstrap({name: mean(left, name) - mean(right, name) for name in sort_sets(set(left[0]["correct"]))})


def _mean_scores(paths: Sequence[Path], measure: str) -> dict[tuple[str, str], float]:
    """(set, id) -> mean over the files."""
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


def run(settings: EvalSettings, *, measures_arcap: bool) -> None:
    """Load, evaluate, write, print."""
    sets = read_sets(settings.questions, settings.limit)  # mistakes here show before the long loads
    if settings.budgets and (measures_arcap or settings.budget is not None or settings.hard_stop or settings.episodes):
        raise ValueError("--budgets: got it with --budget, --hard-stop, --episodes or arcap, expected it alone: every "
                         "budget is run freely and with a hard stop")
    if measures_arcap and settings.max_turns == 0:
        raise ValueError("arcap: got --max-turns 0, expected turns that search")
    for budget in (settings.budget, *settings.budgets):
        if budget is not None:
            check_budget(budget, settings.max_context_tokens)
    sets = {name: [replace(q, budget=settings.budget) for q in some] for name, some in sets.items()}
    device, name = pick_device(settings.device), settings.name or Path(settings.model).name
    out = Path(settings.out or f"runs/eval/{name}")
    decoder = load_decoder(settings.model, dtype=getattr(torch, settings.dtype), device=device)
    policy = Policy(decoder, Tokenizer.load(settings.model))
    retriever = None
    if settings.max_turns > 0:
        retriever = Retriever.load(settings.corpus, settings.encoder, index=settings.index or None,
                                   device=device)
    result: dict[str, Any] = {"name": name, "settings": asdict(settings)}
    if measures_arcap:
        result["arcap"] = arcap(policy, retriever, sets, settings, seed=settings.seed, progress=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "arcap.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{arcap_table([result])}\n\nwrote {out}/arcap.json")
        return
    if settings.budgets:
        config.save(settings, out / "run.json")
        questions = [question for some in sets.values() for question in some]
        result |= bard.measure(policy, questions, settings, settings.budgets, seed=settings.seed, retriever=retriever,
                               progress=True)
        bard.save_measures(result, out)
        print(f"{budget_table(result)}\n\nwrote {out}/budgets.json, .jsonl")
        return
    episodes: list[Episode] = []
    result |= evaluate(policy, retriever, sets, settings, seed=settings.seed, progress=True,
                       keep=episodes)
    save_result(result, out)
    config.save(settings, out / "run.json")
    if settings.episodes:
        save_episodes(out / "episodes.jsonl", episodes, policy.tokenizer)
    print((out / "result.txt").read_text(encoding="utf-8"))
    print(f"wrote {out}/result.json, .jsonl, .csv, .txt")


def main(argv: list[str]) -> None:
    if argv[:1] == ["--table"]:
        argv = ["table", *argv[1:]]
    if not argv or argv[0] not in ("table", "compare", "plot"):
        text = "Measure a model on question sets. Also: eval.py arcap, eval.py {table,compare,plot} --help."
        measures_arcap = argv[:1] == ["arcap"]
        run(config.load(EvalSettings, argv[measures_arcap:], prog="eval.py", description=text, shared=SHARED,
                        default_config=ROOT / "configs" / "world.toml"), measures_arcap=measures_arcap)
        return
    parser = argparse.ArgumentParser(f"eval.py {argv[0]}", allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path,
                        help="metrics.jsonl of runs, or result.json of evaluations")
    if argv[0] == "plot":
        parser.add_argument("--out", default="curve.png", help="picture to write (curve.png)")
        given = parser.parse_args(argv[1:])
        draw = plot_budgets if all(path.name == "budgets.json" for path in given.files) else plot_curves
        return draw(given.files, given.out)
    parser.add_argument("--measure", default="em", choices=MEASURES[:6])
    if argv[0] == "table":
        given = parser.parse_args(argv[1:])
        results = [json.loads(path.read_text(encoding="utf-8")) for path in given.files]
        has_arcap = all("arcap" in result for result in results)
        return print(arcap_table(results) if has_arcap else table(results, given.measure))
    parser.add_argument("--against", nargs="+", type=Path, help="the other side, of several seeds")
    given = parser.parse_args(argv[1:])
    left, right = given.files, given.against
    if right is None:
        if len(left) != 2:
            parser.error(f"got {len(left)} files, expected A.json B.json; or use --against")
        left, right = left[:1], left[1:]
    lines = [[f"{given.measure}: difference", "mean", "95 % low", "high"]]
    for name, numbers in compare(left, right, given.measure).items():
        shown = {"average": "Avg. of sets", "all": "All questions"}.get(name, NAMES.get(name, name))
        lines.append([shown, *(f"{number:+.4f}" for number in numbers)])
    print(align(lines))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"eval.py: {error}")
