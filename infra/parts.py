"""Parts: a long file made piece by piece, by all processes.

An interruption costs what each process was working on. Parts carry a fingerprint of all that they
depend on, so a run with other settings, or another model, does not take them.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from infra import fingerprint
from infra.checkpoint import write_aside
from infra.config import sections
from infra.parallel import barrier
from infra.run import Run

PART_SIZE = 1024  # items


def made_with(settings: Any) -> set[str]:
    """Names of the settings that a teacher's episodes depend on: how it acts, and what it is asked.
    Not how many episodes are in flight, or how long a search may take."""
    acts = {name for name, section in sections(type(settings)).items() if section == "rollout"}
    asked = {"teacher", "teacher_dtype", "questions", "val_size", "num_episode_questions", "seed"}
    return acts - {"rollout_rows", "search_timeout_s"} | asked


def find_made(run: Run, path: str, settings: Any, *, takes_any: bool) -> bool:
    """Whether a file is there, on every process; one that was made otherwise is refused.

    takes_any: every file is taken, and one must be there.
    """
    is_there = bool(run.agree(Path(path).exists()))
    if run.rank == 0 and is_there:
        values = {name: vars(settings)[name] for name in made_with(settings)}
        run.say(f"{path}: taken as it is" if takes_any else
                fingerprint.check_stamp(Path(path), values))
    if takes_any and not is_there:
        raise ValueError(f"--episodes: got {path}, which is not there, expected episodes to learn "
                         "from; --phase episodes makes them")
    return is_there


def write_in_parts(run: Run, path: Path, num_items: int, settings: Any, names: Collection[str],
                   write: Callable, keep: Callable, advice: str) -> None:
    """Write the lines of all parts that are kept to one file; the parts are deleted then.

    write(part, start, end) makes the part of items start to end - 1, in JSON lines. keep(row) says
    whether a row is kept. names: of the settings that the lines depend on. advice: what to check if
    no row is kept.
    """
    made_with = fingerprint.contents({name: vars(settings)[name] for name in names})
    digest = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
    key = f"{run.agree(int(digest[:8], 16)):08x}"  # other machines may hold other copies
    starts = range(0, num_items, PART_SIZE)
    parts = [path.with_name(f"{path.name}.{key}.part{k:05d}") for k in range(len(starts))]
    others = {p for p in path.parent.glob("*.part*") if p.name.startswith(f"{path.name}.")}
    if others := others - {*parts}:
        run.say(f"{path}: parts of other settings are left beside it: {len(others)} files")
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
        text = "".join(kept).encode()
        fingerprint.write_stamp(path, hashlib.sha256(text).hexdigest(), made_with)
        write_aside(path, lambda partial: partial.write_bytes(text))
        for part in (*parts, *path.parent.glob(f".{path.name}.*partial*")):
            part.unlink(missing_ok=True)
        run.say(f"{path}: {len(kept)} correct episodes of {len(lines)}")
    barrier()
