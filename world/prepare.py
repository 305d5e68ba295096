"""Published question files as training and test files: `python data.py prepare`.

    python data.py prepare --flashrag DIR --out DIR   # DIR/nq/test.jsonl ... -> OUT/nq.jsonl ...
"""

import json
import os
from pathlib import Path

from tqdm import tqdm

from data import TEST_SETS, parse_question
from formats.questions import read_question_rows
from infra.cli import Parser, reporting

TRAIN_SETS = {"nq": 79_168, "hotpotqa": 90_447}  # published numbers of rows (paper Table 9)
TEST_SPLITS = ("test", "dev", "train")  # the first of these that a set has


def prepare(flashrag: Path, out: Path) -> None:
    """FlashRAG's folders -> OUT/train.jsonl (NQ, then HotpotQA), OUT/NAME.jsonl (seven tests)."""
    sources = {"train": [flashrag / name / "train.jsonl" for name in TRAIN_SETS]}
    for name in TEST_SETS:
        files = [flashrag / name / f"{split}.jsonl" for split in TEST_SPLITS]
        sources[name] = [next((file for file in files if file.is_file()), files[0])]
    missing = [str(file) for files in sources.values() for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{flashrag}: got no {', '.join(missing)}; expected the layout "
                                "NAME/{train,dev,test}.jsonl of RUC-NLPIR/FlashRAG_datasets")
    out.mkdir(parents=True, exist_ok=True)
    for name, files in sources.items():
        # HotpotQA's training metadata is ten paragraphs a question, half a gigabyte: left out.
        count = convert(files, out / f"{name}.jsonl", drop="metadata" if name == "train" else "")
        origin = " + ".join(f"{file.parent.name}/{file.name}" for file in files)
        published = TEST_SETS.get(name, sum(TRAIN_SETS.values()))
        print(f"{name}.jsonl: {count} questions from {origin} (published: {published})")


def convert(files: list[Path], target: Path, *, drop: str) -> int:
    """Write the files' rows, checked and with unique ids, to one file, complete or absent."""
    partial, ids = target.with_name(target.name + ".partial"), set[str]()
    with partial.open("w", encoding="utf-8", newline="\n") as output:
        for file in files:
            rows = tqdm(read_question_rows(file), f"{file.parent.name} {file.stem}", unit=" rows",
                        leave=False)
            for number, (where, row) in enumerate(rows):
                row["dataset"] = file.parent.name
                row["id"] = parse_question(row, "", f"{file.stem}_{number}", where).id
                if row["id"] in ids:
                    raise ValueError(f"{where}: got id {row['id']} again, expected unique ids")
                ids.add(row["id"])
                row = {key: value for key, value in row.items() if key != drop}
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return len(ids)


def main() -> None:
    parser = Parser("data.py", description=__doc__.split("\n")[0],
                    usage="data.py prepare --flashrag DIR --out DIR")
    parser.add_argument("command", choices=["prepare"], help="make training mix and test files")
    parser.add_argument("--flashrag", type=Path, required=True, metavar="DIR",
                        help="folder with nq/, popqa/ ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="folder for the eight files")
    options = parser.parse_args()
    with reporting("data.py"):
        prepare(options.flashrag, options.out)
