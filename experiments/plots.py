"""Pictures: training curves, budgets of thinking, shapes of rewards, growth of time and memory.

    python -m experiments.plots curves runs/kd/metrics.jsonl runs/dgpo/metrics.jsonl --out curve.png
    python -m experiments.plots budgets runs/eval/NAME/budgets.json ... --out budgets.png
    python -m experiments.plots rewards --out rewards.png

matplotlib is a requirement of development only. A PNG is written with a palette, which makes it a
third as large.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

DPI = 150
COLOURS = 256  # of a PNG's palette
LONGEST_LEGEND = 3  # names that fit into a panel; more of them stand beside it


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


# ---- training curves ----


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


def read_curves(paths: Sequence[str | Path]) -> dict[str, list[tuple[str, list[dict]]]]:
    """{"distillation" or "reinforcement": [(method, its steps)]}, without empty panels."""
    distillation, reinforcement = [], []
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            record = json.loads(text)
            method, steps = record["name"], record.get("curve", [])
        else:
            method = re.sub(r"-\d+$", "", path.parent.name)
            steps = [json.loads(line) for line in text.splitlines()]
        if any("rollout/score" in step for step in steps):
            reinforcement.append((method, steps))
        elif any("eval/score" in step for step in steps):
            distillation.append((method, steps))
    panels = {"distillation": distillation, "reinforcement": reinforcement}
    return {title: runs for title, runs in panels.items() if runs}


def draw_curve(axis: Any, method: str, steps: list[dict], colour: str) -> None:
    for key, style, width in (("rollout/score", "-", 0.6), ("eval/score", "o-", 1.5)):
        x = [step["step"] for step in steps if key in step]
        y = [step[key] for step in steps if key in step]
        if x:
            label = method if key == "eval/score" else None
            axis.plot(x, y, style, linewidth=width, markersize=4, color=colour, label=label)


def legend_labels(axis: Any) -> dict[str, Any]:
    """What was drawn under each label, once: the lines of several seeds share a label."""
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


# ---- other pictures ----


def plot_budgets(paths: Sequence[str | Path], out: str | Path) -> None:
    """Draw accuracy with a hard stop, and tokens thought without one, against the budget.

    paths: budgets.json of `bard.py measure`; several of a name (seeds) share a colour.
    """
    results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    names = list(dict.fromkeys(result["name"] for result in results))
    figure, axes = load_pyplot().subplots(1, 2, figsize=(9, 3.6))
    panels = {"accuracy": "accuracy, hard stop", "length": "tokens thought"}
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for result in results:
            x = [int(budget) for budget in result["budgets"]]
            y = [measures[key] for measures in result["budgets"].values()]
            axis.plot(x, y, "o-", markersize=3, linewidth=1, label=result["name"],
                      color=f"C{names.index(result['name'])}")
        axis.set(title=title, xlabel="budget, tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    budgets = [int(budget) for budget in results[0]["budgets"]]
    axes[1].plot(budgets, budgets, "k:", linewidth=1)
    axes[1].set_yscale("log", base=2)
    axes[0].set_ylim(0, 1)
    labels = legend_labels(axes[0])
    axes[0].legend(labels.values(), labels.keys(), fontsize=7)
    save(figure, out)


def plot_sizes(series: dict[str, list[tuple[int, float]]], out: str | Path) -> None:
    """Draw exact match against the number of parameters (Figure 3), a line for each name."""
    figure, axis = load_pyplot().subplots(figsize=(4, 3))
    for name, points in series.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axis.set(xlabel="parameters", ylabel="exact match, average", ylim=(0, 1))
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, out)


def plot_rewards(out: str | Path, *, budget: int = 100) -> None:
    """Draw each reward of bard.py against the length of thinking.

    Right answers are solid lines, wrong ones are dashed.
    """
    from bard import additive, l1_max, multiplicative  # here, because only this picture needs it

    shapes = {
        "multiplicative": lambda c, n: multiplicative(c, n, budget, tolerance=0.5),
        "multiplicative, use 0.1":
            lambda c, n: multiplicative(c, n, budget, tolerance=0.5, use=0.1),
        "additive": lambda c, n: additive(c, n, budget, tolerance=0.5, weight=0.5),
        "l1_max, alpha 0.01": lambda c, n: l1_max(c, n, budget, alpha=0.01, delta=0.5),
    }
    figure, axis = load_pyplot().subplots(figsize=(5, 3.6))
    lengths = range(0, 2 * budget + 1)
    for i, (name, shape) in enumerate(shapes.items()):
        for correct, style, label in ((1.0, "-", name), (0.0, "--", None)):
            rewards = [shape(correct, n) for n in lengths]
            axis.plot(lengths, rewards, style, color=f"C{i}", label=label)
    axis.axvline(budget, color="k", linewidth=0.5)
    axis.set(xlabel=f"tokens thought (budget {budget})", ylabel="reward; dashed: wrong answers")
    axis.legend(fontsize=7)
    save(figure, out)


def plot_growth(rows: Sequence[dict], out: str | Path) -> None:
    """Draw time and memory against size, both axes logarithmic.

    Along the dotted line twice the size costs twice as much. rows: of the bench "growth", measured.
    """
    names = list(dict.fromkeys(row["axis"] for row in rows))
    size = (3.4 * len(names), 6)
    figure, panels = load_pyplot().subplots(2, len(names), figsize=size, squeeze=False)
    for line, key in zip(panels, ("seconds", "peak_bytes"), strict=True):
        for panel, name in zip(line, names, strict=True):
            x = [row["x"] for row in rows if row["axis"] == name]
            y = [row.get(key, 0) for row in rows if row["axis"] == name]
            in_proportion = [y[0] * size / x[0] for size in x]
            panel.loglog(x, y, "o-", x, in_proportion, "k:")
            panel.set(xlabel=name, ylabel=key)
            panel.tick_params(axis="x", which="minor", labelbottom=False)
    figure.tight_layout()
    save(figure, out)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("experiments.plots", description=__doc__.split("\n")[0])
    pictures = parser.add_subparsers(dest="picture", required=True)
    draw = {"curves": plot_curves, "budgets": plot_budgets}
    texts = {"curves": ("metrics.jsonl of runs, or records", "score against step"),
             "budgets": ("budgets.json of bard.py measure", "accuracy and length against budget")}
    for name, (files, text) in texts.items():
        picture = pictures.add_parser(name, help=text)
        picture.add_argument("files", nargs="+", type=Path, metavar="FILE", help=files)
    pictures.add_parser("rewards", help="rewards of bard.py against the length of thinking")
    for name, picture in pictures.choices.items():
        picture.add_argument("--out", default=f"{name}.png", help="file (default %(default)s)")
    options = parser.parse_args(argv)
    if options.picture == "rewards":
        plot_rewards(options.out)
    else:
        draw[options.picture](options.files, options.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"experiments.plots: {error}")
