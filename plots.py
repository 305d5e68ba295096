"""Pictures: training curves, thinking budgets, shapes of rewards. matplotlib is a requirement of development alone.

    python plots.py rewards --out FILE     rewards of bard.py against the length of thinking
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bard import additive, l1_max, multiplicative


def load_pyplot() -> ModuleType:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ValueError("plot: matplotlib is not installed; run pip install matplotlib") from None
    matplotlib.use("Agg")  # also where there is no display
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    load_pyplot().close(figure)


def plot_curves(paths: Sequence[str | Path], out: str | Path) -> None:
    """Score against step, distillation at the left, reinforcement at the right: their steps are not comparable.

    Thin lines: the rollouts' score; dots: validation. Runs whose folders differ only by a number share a colour. paths:
    metrics.jsonl of runs, or recorded results (reproduce.py) with a "curve".
    """
    pyplot = load_pyplot()
    panels: dict[str, list[tuple[str, list[dict]]]] = {"distillation": [], "reinforcement": []}
    for path in map(Path, paths):
        if path.suffix == ".json":
            record = json.loads(path.read_text(encoding="utf-8"))
            rows, method = record.get("curve", []), record["name"]
        else:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            method = re.sub(r"-\d+$", "", path.parent.name)
        if any("rollout/score" in row for row in rows):
            panels["reinforcement"].append((method, rows))
        elif any("eval/score" in row for row in rows):
            panels["distillation"].append((method, rows))
    panels = {title: runs for title, runs in panels.items() if runs}
    if not panels:
        raise ValueError(f"plot: got no scores in {', '.join(map(str, paths))}, "
                         "expected rollout/score or eval/score")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), sharey=True, squeeze=False)
    methods = list(dict.fromkeys(method for runs in panels.values() for method, _ in runs))
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for method, rows in runs:
            for key, style, width in (("rollout/score", "-", 0.6), ("eval/score", "o-", 1.5)):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axis.plot(*zip(*points, strict=True), style, linewidth=width, markersize=4,
                              color=f"C{methods.index(method)}", label=method if key == "eval/score" else None)
        axis.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, 1))
        lengths = [rows[-1]["step"] for _, rows in runs]
        if max(lengths) > 4 * min(lengths):  # or the short runs are a line at the left
            axis.set(xscale="log", xlim=(1, None))
        axis.grid(alpha=0.3)
        labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        where = {"loc": "lower right"} if len(labels) <= 3 else {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axis.legend(labels.values(), labels.keys(), **where)
    axes[0, 0].set_ylabel("exact match, sampled")
    save(figure, out)


def plot_budgets(paths: Sequence[str | Path], out: str | Path) -> None:
    """Accuracy with a hard stop, and tokens thought without one, against the budget. paths: budgets.json of eval.py;
    several of a name (seeds) share a colour."""
    pyplot = load_pyplot()
    results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    names = list(dict.fromkeys(result["name"] for result in results))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for axis, key, title in zip(axes, ("accuracy", "length"), ("accuracy, hard stop", "tokens thought"), strict=True):
        for result in results:
            points = [(int(budget), values[key]) for budget, values in result["budgets"].items()]
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1,
                      color=f"C{names.index(result['name'])}", label=result["name"])
        axis.set(title=title, xlabel="budget, tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    budgets = [int(budget) for budget in results[0]["budgets"]]
    axes[1].plot(budgets, budgets, "k:", linewidth=1)
    axes[1].set_yscale("log", base=2)
    axes[0].set_ylim(0, 1)
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    axes[0].legend(labels.values(), labels.keys(), fontsize=7)
    save(figure, out)


def plot_sizes(series: dict[str, list[tuple[int, float]]], out: str | Path) -> None:
    """Exact match against the number of parameters (Figure 3): a line for each name."""
    figure, axis = load_pyplot().subplots(figsize=(4, 3))
    for name, points in series.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=name)
    axis.set(xlabel="parameters", ylabel="exact match, average", ylim=(0, 1))
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, out)


def plot_rewards(out: str | Path, *, budget: int = 100) -> None:
    """Each form of the reward against the length of thinking, of right (solid) and wrong answers (dashed)."""
    figure, axis = load_pyplot().subplots(figsize=(5, 3.6))
    lengths = range(0, 2 * budget + 1)
    for i, (name, function) in enumerate({
        "multiplicative": lambda c, n: multiplicative(c, n, budget, tolerance=0.5),
        "multiplicative, use 0.1": lambda c, n: multiplicative(c, n, budget, tolerance=0.5, use=0.1),
        "additive": lambda c, n: additive(c, n, budget, tolerance=0.5, weight=0.5),
        "l1_max, alpha 0.01": lambda c, n: l1_max(c, n, budget, alpha=0.01, delta=0.5),
    }.items()):
        for correct, style in ((1.0, "-"), (0.0, "--")):
            axis.plot(lengths, [function(correct, n) for n in lengths], style, color=f"C{i}",
                      label=name if correct else None)
    axis.axvline(budget, color="k", linewidth=0.5)
    axis.set(xlabel=f"tokens thought (budget {budget})", ylabel="reward; dashed: wrong answers")
    axis.legend(fontsize=7)
    save(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser("plots.py", description=__doc__.split("\n")[0])
    parser.add_argument("picture", choices=("rewards",))
    parser.add_argument("--out", default="rewards.png", help="file to write (rewards.png)")
    plot_rewards(parser.parse_args().out)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"plots.py: {error}")
