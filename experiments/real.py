"""The method on real questions and passages, with a published model and a published encoder.

    python -m experiments.real data --data FOLDER --encoder DIR --out DIR
    python -m experiments.real run --files DIR --student DIR --encoder DIR
    python -m experiments.real run ... --presets real-cpu --rows kd --first 20  two cores, two hours
    python -m experiments.real report

`data` merges the passages of FOLDER to one corpus and indexes it. It splits the questions once, by
a hash of their ids, and writes demonstrations for the teacher from training questions. FOLDER has
questions/*.jsonl, gold/*.jsonl and passages/*.jsonl. The counts are printed, and split.json keeps
them. `run` trains and measures every row; it goes on where it was interrupted.

Which questions train
    NQ, TriviaQA    a part by hash, if the corpus holds an answer that search finds
    HotpotQA, 2Wiki, MuSiQue with gold paragraphs    those of the split "train"
    other multi-hop training questions    if an answer stands in one of the FOUND passages that the
                    encoder ranks first; "yes" and "no", which stand everywhere, are left out
Which questions test: a part of NQ and TriviaQA by hash, the split "dev" of the others, Bamboogle.
A question that stands in a test file, by id or by normalised text, never trains or validates.
"""

import json
import sys
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import eval as evaluation
from data import Passage, hit, normalize_answer
from experiments import rows
from experiments.jobs import CORES, ROOT, Job, run_jobs
from experiments.reproduce import write_record
from experiments.rows import Record, Row, config_flags, write_json
from formats.corpora import split_contents
from infra.cli import Parser, reporting
from infra.files import read_rows
from infra.parallel import pick_device
from infra.programs import count
from retriever import Retriever
from world.demonstrate import demonstration

PRESETS = ("real-smollm2",)
SINGLE = ("nq", "triviaqa")
MULTI = ("hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
PASSAGES = ("wiki18_sample", "multihop_corpus")  # files; rows of NQ and TriviaQA name lines of one
PARTS = ("test", "validation", "train")  # a question of two files stays in the first of these
TEST_SHARE, VALIDATION_SHARE = 0.45, 0.1  # of NQ and TriviaQA; the second also of what would train
FOUND, SHOWN, MAX_HOPS = 10, 3, 3  # passages looked at, shown by a search; searches shown at most
ROWS = {
    "teacher": Row("Teacher (sft)", "sft"),
    "seqkd": Row("SeqKD", "sft"),
    "kd": Row("KD", "kd"),
    "ppo": Row("PPO from KD", "ppo", begins="kd"),
    "published": Row("DGPO, as published", "dgpo", begins="kd", flags=("--kl-in", "reward")),
    "dgpo": Row("DGPO, exact", "dgpo", begins="kd"),
}
NEEDS = {"seqkd": ("kd",), "kd": ("teacher",), "ppo": ("kd",), "published": ("kd",),
         "dgpo": ("kd",)}
COMPARED = (("kd", "student"), ("seqkd", "student"), ("kd", "seqkd"), ("published", "kd"),
            ("dgpo", "kd"), ("dgpo", "published"), ("ppo", "kd"), ("dgpo", "ppo"),
            ("kd", "teacher"), ("ppo", "teacher"))
SETS = {"single-hop": SINGLE, "multi-hop": MULTI}
# How an episode ends. Shown: a passage of it holds a gold answer. Own: the answer is in no passage.
ENDS = ("right", "no action", "no answer", "shown, another", "shown, own", "not shown, another",
        "not shown, own")


# ---- questions ----


def read_questions(folder: Path) -> list[Record]:
    """Rows of every question file, with "dataset" and "split": where a row may go ("" by hash)."""
    questions = []
    for name in SINGLE:
        questions += read_file(folder / "questions" / f"{name}.jsonl", name, "")
    for name in MULTI[:3]:
        questions += read_file(folder / "gold" / f"{name}.jsonl", name, "dev")
    questions += read_file(folder / "questions" / "bamboogle.jsonl", "bamboogle", "dev")
    return questions + read_file(
        folder / "questions" / "train_hotpotqa_2wiki.jsonl", "hotpotqa_2wiki", "train")


def read_file(path: Path, dataset: str, split: str) -> list[Record]:
    rows_of_file = [row for _, row in read_rows(path, "question")]
    return [{"dataset": dataset, "split": split} | row for row in rows_of_file]


def share(text: str) -> float:
    """A number in [0, 1) that follows from a text alone."""
    return zlib.crc32(text.encode()) / 2**32


def part_of(row: Record) -> str:
    """test, validation or train, by the row's split and by a hash of its id."""
    number = share(str(row["id"]))
    if row["split"] == "dev" or (not row["split"] and number < TEST_SHARE):
        return "test"
    begin = 0.0 if row["split"] else TEST_SHARE
    return "validation" if number < begin + VALIDATION_SHARE else "train"


def split_questions(questions: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each part; of those with one id or one text the first stays, test before all."""
    parts: dict[str, list[Record]] = {part: [] for part in PARTS}
    for row in questions:
        parts[part_of(row)].append(row)
    ids, texts = set[str](), set[str]()
    for part in PARTS:
        kept = []
        for row in parts[part]:
            text = normalize_answer(row["question"])
            if row["id"] not in ids and text not in texts:
                kept.append(row)
            ids.add(row["id"])
            texts.add(text)
        parts[part] = kept
    return parts


# ---- passages ----


def write_corpus(folder: Path, path: Path) -> tuple[list[str], dict[str, int]]:
    """Write every passage once; returns the passages of wiki18_sample by line, and counts."""
    contents, counts = dict[str, None](), {}
    texts = {name: [row["contents"] for _, row in read_rows(
        folder / "passages" / f"{name}.jsonl", "passage")] for name in PASSAGES}
    for name in PASSAGES:
        contents |= dict.fromkeys(texts[name])
        counts[name] = len(texts[name])
    write_lines(path, ({"id": str(i), "contents": text} for i, text in enumerate(contents)))
    return texts[PASSAGES[0]], counts | {"corpus": len(contents)}


def write_lines(path: Path, records: Any) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def found_at(passages: Sequence[Passage], row: Record) -> int | None:
    """The rank of the first passage with a gold answer as whole words; None: there is none."""
    ranks = (rank for rank, passage in enumerate(passages) if hit([passage], row["golden_answers"]))
    return next(ranks, None)


def own_passages(row: Record, by_line: Sequence[str]) -> list[Passage]:
    """Passages that the row itself names as having an answer."""
    lines = row.get("metadata", {}).get("answer_passage_ids", [])
    return [Passage("", *split_contents(by_line[line]), 0.0) for line in lines]


# ---- demonstrations ----


def gold_paragraphs(row: Record, found: Sequence[Passage],
                    own: Sequence[Passage]) -> list[Passage]:
    """The passages that lead to the answer, in the order of the searches; empty: not known.

    A row's supporting paragraphs, those that the question finds before the others. Without such:
    the first passage that holds an answer, after the best one where the question alone does not
    find it among those shown. NQ and TriviaQA take one search.
    """
    if context := row.get("context"):
        names = [passage.name for passage in found]
        gold = [Passage("", p["title"], p["text"], 0.0) for p in context if p["is_supporting"]]
        return sorted(gold, key=lambda p: names.index(p.title) if p.title in names else FOUND)
    rank = found_at(found, row)
    if rank is None:
        return [*own[:1]]
    if rank < SHOWN or row["dataset"] in SINGLE:
        return [found[rank]]
    return [found[0], found[rank]]


def demonstrate(row: Record, gold: Sequence[Passage], searches: Sequence[Sequence[Passage]]
                ) -> dict[str, Any] | None:
    """A demonstration whose blocks hold what search found, and one gold passage each.

    searches: what the question found, then what each later gold passage's title found.
    """
    if not 1 <= len(gold) <= MAX_HOPS or not hit(gold, row["golden_answers"]):
        return None
    answers = [answer for answer in row["golden_answers"] if hit(gold, [answer])]
    texts, others = {passage.text for passage in gold}, []
    for found in searches[: len(gold)]:
        others += [p for p in found if p.text not in texts][: SHOWN - 1]
    context = [{"title": p.name, "text": p.text, "is_supporting": p in gold}
               for p in (*gold, *others)]
    return demonstration({**row, "golden_answers": answers, "context": context}, SHOWN)


def write_training(retriever: Retriever, train: list[Record], by_line: Sequence[str],
                   out: Path) -> dict[str, int]:
    """Keep the training questions that can be learnt from; write them and demonstrations."""
    found = retriever.search([row["question"] for row in train], FOUND)
    kept, golds = [], []
    for row, passages in zip(train, found, strict=True):
        if row["dataset"] == "hotpotqa_2wiki" and row["golden_answers"][0].lower() in ("yes", "no"):
            continue
        if gold := gold_paragraphs(row, passages, own_passages(row, by_line)):
            kept.append((row, passages))
            golds.append(gold)
    titles = [passage.name for gold in golds for passage in gold[1:]]
    by_title = dict(zip(titles, retriever.search(titles, FOUND), strict=True))
    shown = (demonstrate(row, gold, [passages, *(by_title[p.name] for p in gold[1:])])
             for (row, passages), gold in zip(kept, golds, strict=True))
    demonstrations = [episode for episode in shown if episode is not None]
    write_lines(out / "train.jsonl", (public(row) for row, _ in kept))
    write_lines(out / "gold.jsonl", demonstrations)
    return {"demonstrations": len(demonstrations)} | {
        f"train {name}": count
        for name, count in Counter(row["dataset"] for row, _ in kept).items()}


def public(row: Record) -> Record:
    """A question as the programs read it: its paragraphs are the supporting ones alone."""
    kept = {key: row[key] for key in ("id", "dataset", "question", "golden_answers")}
    if paragraphs := [p for p in row.get("context", []) if p["is_supporting"]]:
        kept["context"] = paragraphs
    return kept


def prepare(data: Path, encoder: str, out: Path) -> None:
    """Write corpus, index, question files and demonstrations."""
    from retrieval.build import build  # here, because the other commands embed nothing
    out.mkdir(parents=True, exist_ok=True)
    corpus, index = out / "corpus.jsonl", out / "index"
    by_line, counts = write_corpus(data, corpus)
    build(corpus, encoder, index, device=pick_device("auto"))
    parts = split_questions(read_questions(data))
    retriever = Retriever.load(corpus, encoder, index=index, device=pick_device("auto"))
    for part in PARTS[:2]:
        write_lines(out / f"{part}.jsonl", map(public, parts[part]))
        counts |= {f"{part} {name}": count
                   for name, count in Counter(row["dataset"] for row in parts[part]).items()}
        found = retriever.search([row["question"] for row in parts[part]], FOUND)
        for first in (SHOWN, FOUND):
            hits = Counter(row["dataset"]
                           for row, passages in zip(parts[part], found, strict=True)
                           if hit(passages[:first], row["golden_answers"]))
            counts |= {f"{part} {name}, an answer in the first {first}": hits[name]
                       for name in hits}
    counts["train, before the rule"] = len(parts["train"])
    counts |= write_training(retriever, parts["train"], by_line, out)
    write_json(out / "split.json", {"rule": __doc__.split("Which questions train\n")[1], **counts})
    print("\n".join(f"{count:7,}  {name}" for name, count in counts.items()))


# ---- rows ----


def file_flags(files: Path, encoder: str) -> list[str]:
    """What is searched, as flags of train.py and eval.py."""
    return ["--corpus", str(files / "corpus.jsonl"), "--index", str(files / "index"),
            "--encoder", encoder]


def train_row(name: str, options: Any, seed: int) -> list[str]:
    """Arguments of Python that train a row, or resume its training."""
    row, files, runs = ROWS[name], options.files, options.runs
    start = options.teacher if name == "teacher" else options.student
    if row.begins:
        start = runs / f"{row.begins}-{seed}"
    command = rows.train_command(
        row, options.presets, student=start, run_dir=runs / f"{name}-{seed}", seed=seed)
    if row.phase != "sft":
        command += ["--questions", str(files / "train.jsonl"),
                    *file_flags(files, options.encoder)]
    if name == "teacher" and options.teacher_layers:
        command += ["--train-layers", str(options.teacher_layers)]
    if name == "seqkd":  # the section sft is the teacher's
        for flag, key in (("--epochs", "epochs"), ("--kd-lr", "kd_lr")):
            command += [flag, str(of_kd(key, options.presets))]
    if row.phase in ("kd", "dgpo"):
        command += ["--teacher", str(runs / f"teacher-{seed}")]
    episodes = {"teacher": files / "gold.jsonl", "seqkd": runs / f"episodes-{seed}.jsonl",
                "kd": runs / f"episodes-{seed}.jsonl"}
    return command + (["--episodes", str(episodes[name])] if name in episodes else [])


def of_kd(key: str, presets: Sequence[str]) -> float:
    """The value of phase kd in the last of these presets that has one."""
    texts = [(ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8") for name in presets]
    sections = [tomllib.loads(text).get("kd", {}) for text in texts]
    return [section[key] for section in sections if key in section][-1]


def measure_row(label: str, model: Path, options: Any, out: Path) -> list[str]:
    """Arguments of Python that measure a model on the asked questions, greedily."""
    return ["eval.py", *config_flags(options.presets), "--model", str(model), "--name", label,
            "--questions", str(asked_file(options)), "--dtype", "bfloat16", "--out", str(out),
            "--episodes", *file_flags(options.files, options.encoder)]


def asked_file(options: Any) -> Path:
    """The questions of the asked part, or a file of the first of each set."""
    if options.first:
        return options.runs / f"{options.part}-{options.first}.jsonl"
    return options.files / f"{options.part}.jsonl"


def write_first(options: Any) -> None:
    """Write the first `options.first` questions of each set, if only these are asked."""
    if options.first:
        of_set = dict[str, list[Record]]()
        for row in rows.read_lines(options.files / f"{options.part}.jsonl"):
            of_set.setdefault(row["dataset"], []).append(row)
        options.runs.mkdir(parents=True, exist_ok=True)
        write_lines(asked_file(options),
                    [row for kept in of_set.values() for row in kept[: options.first]])


def row_jobs(names: Sequence[str], options: Any) -> list[Job]:
    """Training and measuring of these rows, for each seed, and of the student as it is."""
    jobs = [measure_job("student", None, "Student", options.student, options)]
    wanted = {need for name in names for need in (name, *NEEDS.get(name, ()))}
    wanted |= {need for name in wanted for need in NEEDS.get(name, ())}
    for seed in options.seeds:
        for name in (name for name in ROWS if name in wanted):
            model = options.runs / f"{name}-{seed}"
            train = train_row(name, options, seed)
            needs = tuple(f"{need} {seed}" for need in NEEDS.get(name, ()))
            jobs.append(Job(f"{name} {seed}", lambda command=train: command,
                            model / "model.safetensors", needs, options.threads,
                            threads=options.threads))
            jobs.append(measure_job(name, seed, ROWS[name].label, model, options))
    return jobs


def measure_job(name: str, seed: int | None, label: str, model: Path, options: Any) -> Job:
    """seed None: a model that no row trains."""
    run = name if seed is None else f"{name} {seed}"
    out = options.runs / f"eval-{asked_file(options).stem}-{name}-{seed or 0}"
    record = options.records / f"{name}-{seed or 0}.json"
    command = measure_row(label, model, options, out)

    def keep() -> None:
        write_record(name, seed, model, out, record, threads=options.threads)
        add_ends(out, record)

    return Job(f"eval {run}", lambda: command, record, () if seed is None else (run,),
               options.threads, keep, options.threads)


def end_of(row: Record, episode: Record) -> str:
    """Which of ENDS an episode has. row: of result.jsonl; episode: of episodes.jsonl."""
    if row["em"]:
        return "right"
    if row["status"] != "answered":
        return "no action" if row["status"] == "invalid" else "no answer"
    passages = [Passage("", "", segment["text"], 0.0) for segment in episode["segments"]
                if segment["author"] == "environment"]
    is_theirs = hit(passages, [row["answer"] or ""])
    return f"{'shown' if row['hit'] else 'not shown'}, {'another' if is_theirs else 'own'}"


def add_ends(out: Path, record: Path) -> None:
    """Add to a record how many of its test episodes have each of ENDS."""
    pairs = zip(rows.read_lines(out / "result.jsonl"), rows.read_lines(out / "episodes.jsonl"),
                strict=True)
    counts = Counter(end_of(*pair) for pair in pairs)
    write_json(record, {**rows.read_json(record), "ends": {end: counts[end] for end in ENDS}})


# ---- report ----


def report(records: Path) -> str:
    """Exact match of each row, means over the kinds of sets, and paired intervals."""
    runs_of = rows.recorded_rows(records, "experiments.real run")
    names = [name for name in ("student", *ROWS) if name in runs_of]
    runs = [run for name in names for run in runs_of[name]]
    kinds = [["", *SETS, "answered", "searches", "steps", "train s", "GiB"]]
    for run in runs:
        ems = [[run["sets"][name]["em"] for name in sets if name in run["sets"]]
               for sets in SETS.values()]
        kinds.append([run["name"], *(f"{np.mean(em):.3f}" if em else "-" for em in ems),
                      f"{run['average']['answered']:.3f}", f"{run['average']['searches']:.2f}",
                      str(run.get("num_steps", "-")), f"{run.get('train_s', 0):.0f}",
                      f"{max(run.get('peak_gib', {'': 0}).values()):.1f}"])
    ends = [["", *ENDS]] + [[run["name"], *(str(run["ends"][end]) for end in ENDS)]
                            for run in runs if "ends" in run]
    return "\n\n".join([
        "Exact match, greedy, test questions\n\n" + evaluation.table(runs),
        "Exact match, mean over the sets of a kind\n\n" + evaluation.align(kinds),
        "\n".join(difference_lines(runs_of)),
        "How test episodes end, questions\n\n" + evaluation.align(ends)])


def difference_lines(runs_of: dict[str, list[Record]]) -> Iterator[str]:
    yield "Differences of exact match, paired 95 % interval over questions; ! excludes 0\n"
    for left, right in COMPARED:
        if left in runs_of and right in runs_of:
            intervals = evaluation.compare_correct(runs_of[left], runs_of[right])
            _, low, high = intervals["average"]
            text = rows.differences_text(intervals)
            yield f"{left} - {right}: average [{low:+.3f}, {high:+.3f}]  {text}"


# ---- the command line ----


def parse(argv: Sequence[str]) -> Any:
    parser = Parser("experiments.real", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="split the questions, merge and index the passages")
    run = commands.add_parser("run", help="train and measure the rows")
    show = commands.add_parser("report", help="tables and intervals of the records")
    data.add_argument("--data", type=Path, required=True, help="folder of questions and passages")
    data.add_argument("--out", type=Path, required=True, help="new folder")
    run.add_argument("--files", type=Path, required=True, help="folder that `data` has written")
    run.add_argument("--student", type=Path, required=True, help="checkpoint")
    run.add_argument("--teacher", type=Path, help="what becomes the teacher: a checkpoint with "
                     "the student's tokens; default: the student")
    run.add_argument("--teacher-layers", type=count, metavar="N",
                     help="train the teacher's last N layers alone; default: all of it")
    run.add_argument("--presets", nargs="+", default=[], metavar="NAME",
                     help="further files of configs/, such as real-cpu; later ones win")
    run.add_argument("--part", choices=PARTS[:2], default=PARTS[0],
                     help="questions that measure; default test. Choose settings by validation")
    run.add_argument("--first", type=count, metavar="N",
                     help="questions of each set; default: all")
    run.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default 0")
    for command in (data, run):
        command.add_argument("--encoder", required=True, help="checkpoint of the passage encoder")
    for command in (run, show):
        command.add_argument("--runs", type=Path, default=ROOT / "runs" / "real",
                             help="default runs/real")
        command.add_argument("--records", type=Path, help="default: in --runs: records, "
                             "or with --first or --part such as records-validation-30")
    run.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                     help=", ".join(ROWS))
    options = parser.parse_args(argv)
    if "student" in options:
        options.teacher = options.teacher or options.student
        options.presets = (*PRESETS, *options.presets)
        for name in options.presets:
            if not (ROOT / "configs" / f"{name}.toml").is_file():
                parser.error(f"--presets: got {name}, expected a file configs/{name}.toml")
        # Beside a GPU two jobs run at a time. On a CPU one takes all cores.
        options.threads = CORES if pick_device("auto") == "cpu" else 1
    for name in ("data", "out", "files", "student", "teacher", "runs"):
        if name in options:  # commands run from the project's folder
            setattr(options, name, getattr(options, name).resolve())
    if "runs" in options:
        asked = asked_file(options).stem if "part" in options else PARTS[0]
        options.records = options.records or options.runs / (
            "records" if asked == PARTS[0] else f"records-{asked}")
    return options


def main(argv: list[str]) -> None:
    options = parse(argv)
    if options.command == "data":
        return prepare(options.data, options.encoder, options.out)
    if options.command == "run":
        write_first(options)
        run_jobs(row_jobs(options.rows, options), options.runs / "logs")
    print(report(options.records))


if __name__ == "__main__":
    with reporting("experiments.real", RuntimeError):
        main(sys.argv[1:])
