"""Curves of runs: what metrics.jsonl holds, against the step. A run may still be going on.

matplotlib is a requirement of development only. A PNG is written with a palette, which makes it a
third as large.
"""

import difflib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

DPI = 150
COLOURS = 64  # of a PNG's palette; more would not be seen
LONGEST_LEGEND = 3  # names that fit into a panel; more of them stand beside it
COLUMNS = 3  # panels beside each other
# What is drawn where nothing is asked for, as far as the runs have logged it.
DRAWN = (
    "eval/score", "rollout/score", "rollout/reward", "loss/kd", "loss/distance", "loss/entropy",
    "rollout/kl_student_guide", "rollout/agent_tokens", "rollout/searches",
)  # fmt: skip

Steps = list[dict[str, Any]]  # the lines of a metrics.jsonl


def load_pyplot() -> ModuleType:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("plot: matplotlib is not installed; run pip install matplotlib") from None
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, out: str | Path) -> None:
    """Write a figure in the format that the file's suffix names, and close it."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        from PIL import Image  # matplotlib requires it

        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight")
        picture = Image.open(drawn).convert("RGB").quantize(COLOURS)
        picture.save(out, optimize=True)
    else:
        figure.savefig(out, dpi=DPI, bbox_inches="tight")
    load_pyplot().close(figure)


def read_run(path: Path) -> tuple[str, Steps]:
    """(name, steps) of a run's folder, its metrics.jsonl, or a record of it (.json)."""
    if path.suffix == ".json":
        record = json.loads(path.read_text(encoding="utf-8"))
        curve = record.get("curve", {})  # a list for each metric
        points = zip(*curve.values(), strict=True)
        return record["name"], [dict(zip(curve, point, strict=True)) for point in points]
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{path}: got no metrics.jsonl, expected the folder of a run that "
                                "has done a step")
    steps = []
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line or "null")
        except ValueError as error:
            if number == len(lines):
                break  # it is being written
            raise ValueError(f"{file}:{number}: got no valid JSON: {error}") from error
        if isinstance(step, dict) and isinstance(step.get("step"), int):
            steps.append(step)
        elif line:
            raise ValueError(f"{file}:{number}: got {line[:60]!r}, expected an object with a step")
    return file.absolute().parent.name, steps


def method_of(name: str) -> str:
    """Runs whose names differ by a number at the end only are seeds of a method."""
    return re.sub(r"-\d+$", "", name)


# ---- any metrics ----


def plot_metrics(paths: Sequence[Path], metrics: Sequence[str], out: str | Path) -> None:
    """Draw a panel for each metric, a line for each run. metrics: none means those of DRAWN."""
    runs = [read_run(path) for path in paths]
    logged = {key for _, steps in runs for step in steps for key in step
              if step[key] is not None} - {"step"}
    metrics = metrics or [name for name in DRAWN if name in logged]
    for name in metrics:
        if name not in logged:
            near = difflib.get_close_matches(name, logged, n=1, cutoff=0.4)
            raise ValueError(f"--metrics {name}: got no such number in {', '.join(map(str, paths))}"
                             + (f"; did you mean {near[0]}?" if near else "; they have ")
                             + ("" if near else ", ".join(sorted(logged)) or "no step yet"))
    if not metrics:
        raise ValueError(f"plot: got no numbers in {', '.join(map(str, paths))}, expected runs "
                         "that have done a step")
    names = [name for name, _ in runs]
    labels = names if len({*names}) == len(names) else [str(path) for path in paths]
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = load_pyplot().subplots(
        rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, metrics, strict=False):
        for number, (label, (_, steps)) in enumerate(zip(labels, runs, strict=True)):
            points = [(s["step"], s[name]) for s in steps if s.get(name) is not None]
            if points:
                style = "-" if len(points) > len(steps) / 2 > 1 else "o-"
                axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1,
                          color=f"C{number}", label=label)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    save(figure, out)


# ---- the score, methods beside each other ----


def plot_curves(paths: Sequence[str | Path], out: str | Path) -> None:
    """Draw score against step; distillation at the left, reinforcement at the right.

    The two have panels of their own because their steps are not comparable. A thin line is the
    score of the rollouts, dots are validations. Runs whose folders differ by a number only share a
    colour. paths: metrics.jsonl of runs, or records (experiments.rows) with a "curve".
    """
    panels = read_curves(paths)
    if not panels:
        raise ValueError(f"plot: got no scores in {', '.join(map(str, paths))}, "
                         "expected rollout/score or eval/score")
    figure, axes = load_pyplot().subplots(
        1, len(panels), figsize=(4.5 * len(panels), 3.6), sharey=True, squeeze=False)
    methods = list(dict.fromkeys(method for runs in panels.values() for method, _ in runs))
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for method, steps in runs:
            draw_curve(axis, method, steps, f"C{methods.index(method)}")
        axis.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, 1))
        lengths = [steps[-1]["step"] for _, steps in runs]
        if max(lengths) > 4 * min(lengths):  # a linear axis would press the short runs together
            axis.set(xscale="log", xlim=(1, None))
        axis.grid(alpha=0.3)
        labels = legend_labels(axis)
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        if len(labels) <= LONGEST_LEGEND:
            place = {"loc": "lower right"}
        axis.legend(labels.values(), labels.keys(), **place)
    axes[0, 0].set_ylabel("exact match, sampled")
    save(figure, out)


def read_curves(paths: Sequence[str | Path]) -> dict[str, list[tuple[str, Steps]]]:
    """{"distillation" or "reinforcement": [(method, its steps)]}, without empty panels."""
    panels: dict[str, list[tuple[str, Steps]]] = {"distillation": [], "reinforcement": []}
    for path in map(Path, paths):
        name, steps = read_run(path)
        method = name if path.suffix == ".json" else method_of(name)
        if any("rollout/score" in step for step in steps):
            panels["reinforcement"].append((method, steps))
        elif any("eval/score" in step for step in steps):
            panels["distillation"].append((method, steps))
    return {title: runs for title, runs in panels.items() if runs}


def draw_curve(axis: Any, method: str, steps: Steps, colour: str) -> None:
    for key, style, width in (("rollout/score", "-", 0.6), ("eval/score", "o-", 1.5)):
        points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
        if points:
            label = method if key == "eval/score" else None
            axis.plot(*zip(*points, strict=True), style, linewidth=width, markersize=4,
                      color=colour, label=label)


def legend_labels(axis: Any) -> dict[str, Any]:
    """What was drawn under each label, once: the lines of several seeds share a label."""
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))
