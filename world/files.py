"""Folders of the embedded world, and JSON lines.

Everything in WORLD is committed. The other folders lie under runs/ and can be rebuilt.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "world"
SCRATCH = ROOT / "runs" / "world"  # practice texts, and the runs that made student and teacher
TRAILS = ROOT / "runs" / "trails"  # reasoning questions, with a student and a teacher for them
READERS = ROOT / "runs" / "readers"  # generators and agents for QAgent
SEED = 7


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line; the bytes are the same on every machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = (",", ":")  # a committed world without blanks is a tenth smaller
    lines = [json.dumps(row, ensure_ascii=False, separators=short) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: got no such file, expected one of the builder's texts; "
            "run `python -m world.build build-data`"
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
