"""Write demonstrations for `train.py --phase sft`, from questions with gold paragraphs.

    python -m world.demonstrate --gold FILE [FILE ...] --out FILE [--split train] [--passages 3]

A row of a gold file has id, question, golden_answers and context [{title, text, is_supporting}].
Rows without a supporting paragraph and rows of another split are left out.
"""

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import Passage
from episode import SEARCH_R1
from infra.cli import Parser, reporting
from infra.programs import count


def demonstration(row: dict[str, Any], num_passages: int) -> dict[str, Any]:
    """An episode that finds each supporting paragraph of a question and then answers.

    The first query is the question; each later one is the title of a supporting paragraph. Every
    <information> block holds one supporting paragraph and up to num_passages - 1 others. Its place
    among them depends on the id of the question. Nothing is random.

    Returns a row of an episodes file (episode.load_episodes), in the protocol search-r1.
    """
    supporting = [paragraph for paragraph in row["context"] if paragraph["is_supporting"]]
    others = [paragraph for paragraph in row["context"] if not paragraph["is_supporting"]]
    num_others = num_passages - 1
    first_place = zlib.crc32(str(row["id"]).encode())
    segments = []
    for number, paragraph in enumerate(supporting):
        title = paragraph["title"]
        if number == 0:
            thought, query = "I need to look this up.", row["question"]
        else:
            thought, query = f"I still need to know about {title}.", title
        block = others[number * num_others : (number + 1) * num_others]
        block.insert((first_place + number) % (len(block) + 1), paragraph)
        passages = [Passage("", f'"{shown["title"]}"', shown["text"], 0.0) for shown in block]
        text = f"<think> {thought} </think>\n<search> {query} </search>"
        segments.append({"author": "agent", "text": text})
        segments.append({"author": "environment", "text": SEARCH_R1.observation(passages)})
    answer = row["golden_answers"][0]
    titles = " and ".join(paragraph["title"] for paragraph in supporting)
    thought = f"{titles} tell me that the answer is {answer}."
    text = f"<think> {thought} </think>\n<answer> {answer} </answer>"
    segments.append({"author": "agent", "text": text})
    return {
        "id": row["id"],
        "question": row["question"],
        "golden_answers": row["golden_answers"],
        "segments": segments,
    }


def read_demonstrations(path: Path, *, split: str, num_passages: int) -> list[dict[str, Any]]:
    """Demonstrations of the rows of one gold file; a row that is no such row ends the program."""
    demonstrations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row.get("split", split) != split:
                continue
            if any(paragraph["is_supporting"] for paragraph in row["context"]):
                demonstrations.append(demonstration(row, num_passages))
        except (json.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
            sys.exit(
                f"{path}:{number}: got {type(error).__name__}: {error}; expected id, question, "
                "golden_answers and context [{title, text, is_supporting}]"
            )
    return demonstrations


def argument_parser() -> Parser:
    summary = (__doc__ or "").split("\n")[0]
    parser = Parser("python -m world.demonstrate", description=summary)
    parser.add_argument(
        "--gold",
        nargs="+",
        required=True,
        metavar="FILE",
        help="questions with context, JSON lines",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="episodes, JSON lines")
    parser.add_argument(
        "--split", default="train", help="the split whose rows are kept (default train)"
    )
    parser.add_argument(
        "--passages", type=count, default=3, help="paragraphs in a block (default 3)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = argument_parser().parse_args(argv)
    demonstrations = []
    for path in options.gold:
        demonstrations += read_demonstrations(
            Path(path), split=options.split, num_passages=options.passages
        )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in demonstrations]
    Path(options.out).write_text("".join(lines), encoding="utf-8")
    print(f"{options.out}: {len(demonstrations)} episodes")


if __name__ == "__main__":
    with reporting("world.demonstrate"):
        main()
