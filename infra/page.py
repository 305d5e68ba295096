"""The viewer's page: what it shows, as one HTML file that needs no server and no network.

page.html has style and code; the rest is JSON inside it. The code puts every text in as a text
node, and the page's policy runs the page's own code alone, whatever a passage holds.
"""

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.checkpoint import MODEL, read_meta, states, write_aside
from infra.curves import read_run
from infra.files import read_json, replace_surrogates

TEMPLATE = Path(__file__).with_suffix(".html")
MAX_EPISODES, MAX_BYTES = 500, 4_000_000  # of a page; more episodes stand on further pages
MAX_POINTS = 1000  # of a curve; of a longer one, every k-th
MAX_SAMPLES, MAX_SAMPLE = 30, 20_000  # files of a run's samples, characters of each

Data = dict[str, Any]


def render(data: Data) -> str:
    """The page of `data`, ASCII but for the template's own text."""
    text = TEMPLATE.read_text(encoding="utf-8")
    hashes = {kind: base64.b64encode(hashlib.sha256(own_part(text, kind).encode()).digest())
              for kind in ("style", "script")}
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for kind, digest in hashes.items():
        policy += f"; {kind}-src 'sha256-{digest.decode()}'"
    parts = {"POLICY": policy, "TITLE": html.escape(replace_surrogates(data["title"])),
             "DATA": to_json(data)}
    # One pass, so that a text that holds a placeholder stays text.
    return re.sub("@@([A-Z]+)@@", lambda match: parts[match[1]], text)


def to_json(data: Data) -> str:
    """JSON for a script element, ASCII. `<`, `>` and `&` stand in strings alone, where an escape
    is read as the character; without them nothing ends the element."""
    escapes = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
    return json.dumps(data, allow_nan=False, separators=(",", ":")).translate(escapes)


def own_part(text: str, kind: str) -> str:
    """What stands in the template's style, or in its script."""
    return text.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]


def split(episodes: Sequence[Data]) -> list[list[Data]]:
    """Episodes of one page after another; each page has one, and stays below both limits."""
    pages: list[list[Data]] = [[]]
    size = 0
    for episode in episodes:
        added = len(to_json(episode))
        if pages[-1] and (len(pages[-1]) == MAX_EPISODES or size + added > MAX_BYTES):
            pages.append([])
            size = 0
        pages[-1].append(episode)
        size += added
    return pages


def write(out: Path, data: Data, episodes: Sequence[Data]) -> list[Path]:
    """Write the page, or pages out.html, out-2.html, ...; returns their paths.

    Curves and tables stand on the first page alone.
    """
    parts = split(episodes)
    paths = [out, *(out.with_stem(f"{out.stem}-{k}") for k in range(2, len(parts) + 1))]
    data = {"tables": [], "runs": [], "step": None, "refresh": 0, **data,
            "made": f"Made by viewer.py on {time.strftime('%Y-%m-%d %H:%M')}.",
            "pages": [path.name for path in paths]}
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
        if number == 1:
            data |= {"tables": [], "runs": []}
        text = render(data | {"episodes": part, "page": number})
        write_aside(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
    return paths


# ---- what runs have logged ----


def curves(folder: Path, name: str = "") -> Data:
    """A run's logged numbers and its samples, as far as there are any."""
    steps = []
    if (folder / "metrics.jsonl").is_file():
        _, steps = read_run(folder)
    every = -(-len(steps) // MAX_POINTS) or 1
    kept = steps[::every] + steps[-1:] * (len(steps) % every != 1 and every > 1)
    names = list(dict.fromkeys(key for step in kept for key in step if key != "step"))
    samples = sorted((folder / "samples").glob("step_*.txt"))[-MAX_SAMPLES:]
    return {
        "name": name or folder.absolute().name, "steps": [step["step"] for step in kept],
        "metrics": {key: [rounded(step.get(key)) for step in kept] for key in names},
        "samples": {int(path.stem.removeprefix("step_")): read_sample(path) for path in samples}}


def read_sample(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]}\n[the rest is in {path}]"


def rounded(number: float | None) -> float | None:
    """Four digits, which is more than a colour shows; None where there is no finite number."""
    if number is None or not abs(number) < float("inf"):
        return None
    return float(f"{number:.4g}")


# ---- runs in progress ----


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs in a folder, or itself; the one that wrote last comes first."""
    found = {path.parent for path in folder.rglob("metrics.jsonl")}
    for path in folder.rglob("run.json"):  # of a run before its first step, or of something else
        if path.parent.parent.name != "state" and "phase" in settings_of(path.parent):
            found.add(path.parent)
    return sorted(found, key=lambda run: -last_written(run))


def settings_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "run.json", {}).get("settings", {})


def last_written(folder: Path) -> float:
    """When a run wrote its last line, or began; seconds of the clock."""
    files = [folder / name for name in ("metrics.jsonl", "run.json")]
    return max(file.stat().st_mtime for file in files if file.is_file())


def is_finished(folder: Path) -> bool:
    """Whether a run has left its result."""
    return (folder / MODEL).exists() or (folder / "collapse.txt").exists()


def progress_table(folders: Sequence[Path], root: Path) -> Data:
    """A row for each run: how far it is, its scores, when it wrote its last line."""
    rows = []
    for folder in folders:
        steps = read_run(folder)[1] if (folder / "metrics.jsonl").is_file() else []
        last = steps[-1] if steps else {"step": 0}
        scores = [next((step[key] for step in reversed(steps) if step.get(key) is not None), None)
                  for key in ("rollout/score", "eval/score")]
        settings = settings_of(folder)
        newest = [read_meta(state).get("num_steps") for state in states(folder)[-1:]]
        total = settings.get("steps") if settings.get("advantage") else next(iter(newest), None)
        age = time.time() - last_written(folder)
        state = "collapsed" if (folder / "collapse.txt").exists() else (
            "finished" if is_finished(folder) else f"wrote {spoken(age)} ago")
        rows.append([name_in(folder, root), settings.get("phase", "?"),
                     f"{last['step']} of {total or '?'}", *map(rounded, scores), state])
    return {"title": "Runs", "about": "The run that wrote last comes first.", "rows": rows,
            "head": ["run", "phase", "step", "rollout/score", "eval/score", "state"]}


def name_in(folder: Path, root: Path) -> str:
    """A run's folder as seen from the one that is watched."""
    path = str(folder.relative_to(root))
    return folder.absolute().name if path == "." else path


def spoken(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
