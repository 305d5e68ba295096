"""Parts: a long file made piece by piece, by all processes.

An interruption costs what each process was working on. Parts carry a fingerprint of all that they
depend on, so a run with other settings, or another model, does not take them.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.checkpoint import write_aside
from infra.parallel import barrier
from infra.run import Run

PART_SIZE = 1024  # items


def write_in_parts(run: Run, path: Path, num_items: int, key: str, write: Callable, keep: Callable,
                   advice: str) -> None:
    """Write the lines of all parts that are kept to one file; the parts are deleted then.

    write(part, start, end) makes the part of items start to end - 1, in JSON lines. keep(row) says
    whether a row is kept. key: the fingerprint. advice: what to check if no row is.
    """
    starts = range(0, num_items, PART_SIZE)
    parts = [path.with_name(f"{path.name}.{key}.part{k:05d}") for k in range(len(starts))]
    for k in range(run.rank, run.rank + len(parts), run.num_processes):
        if k < len(parts) and not parts[k].exists():
            write(parts[k], starts[k], min(starts[k] + PART_SIZE, num_items))
        run.is_over()  # all processes meet here
    if run.rank == 0:
        lines = [line for part in parts for line in part.open(encoding="utf-8")]
        kept = [line for line in lines if keep(json.loads(line))]
        if not kept:
            raise ValueError(f"{path}: got 0 correct episodes of {len(lines)}, expected some; read "
                             f"{parts[0]}, and check {advice}")
        write_aside(path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))
        for part in parts:
            part.unlink()
        run.say(f"{path}: {len(kept)} correct episodes of {len(lines)}")
    barrier()


def fingerprint(run: Run, folder: Path, values: Any) -> str:
    """A hash of the files of a folder, by size and time, and of values that JSON can write."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir())]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    digest = hashlib.sha256(json.dumps([stamps, values]).encode()).hexdigest()
    return f"{run.agree(int(digest[:8], 16)):08x}"  # other machines may hold other copies
