"""Pictures: budgets of thinking, shapes of rewards, growth of time and memory.

    python -m experiments.plots budgets runs/eval/NAME/budgets.json ... --out budgets.png
    python -m experiments.plots rewards --out rewards.png

Training curves are drawn by `eval.py plot`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.rows import read_json
from infra.cli import Parser, reporting
from infra.curves import legend_labels, load_pyplot, save


def plot_budgets(paths: Sequence[str | Path], out: str | Path) -> None:
    """Draw accuracy with a hard stop, and tokens thought without one, against the budget.

    paths: budgets.json of `bard.py measure`; several of a name (seeds) share a colour.
    """
    results = [read_json(Path(path)) for path in paths]
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


def plot_cells(
    lines: dict[str, list[tuple[float, float]]], teacher: float, out: str | Path
) -> None:
    """Draw exact match after reinforcement against that of the start, a line for each name."""
    figure, axis = load_pyplot().subplots(figsize=(4.6, 3.4))
    for name, points in lines.items():
        if points:
            axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=name)
    axis.plot([0, 1], [0, 1], "k:", linewidth=1, label="the start")
    axis.axhline(teacher, color="grey", linewidth=1, label="the teacher")
    axis.set(xlabel="exact match of the start", ylabel="after reinforcement", ylim=(0, 1))
    axis.set_xlim(0, 0.7)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
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
    """Draw time and memory over those of the smallest size against size, all logarithmic.

    Along the dotted line twice the size costs twice as much. rows: of the bench "growth", measured.
    """
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = load_pyplot().subplots(
        1, len(names), figsize=(2.4 * len(names), 2.6), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        of_axis = [row for row in rows if row["axis"] == name]
        x = [row["x"] for row in of_axis]
        panel.loglog(x, [size / x[0] for size in x], "k:", base=2)
        for key, style, label in (("seconds", "o-", "time"), ("peak_bytes", "s--", "memory")):
            y = [row.get(key, 0) for row in of_axis]
            panel.loglog(x, [cost / y[0] for cost in y], style, label=label, markersize=4, base=2)
        panel.set(xlabel=name)
    panels[0, 0].set(ylabel="times that of the smallest")
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    save(figure, out)


def main(argv: list[str]) -> None:
    parser = Parser("experiments.plots", description=__doc__.split("\n")[0])
    pictures = parser.add_subparsers(dest="picture", required=True)
    budgets = pictures.add_parser("budgets", help="accuracy and length against budget")
    budgets.add_argument("files", nargs="+", type=Path, metavar="FILE",
                         help="budgets.json of bard.py measure")
    pictures.add_parser("rewards", help="rewards of bard.py against the length of thinking")
    for name, picture in pictures.choices.items():
        picture.add_argument("--out", default=f"{name}.png", help="file (default %(default)s)")
    options = parser.parse_args(argv)
    if options.picture == "rewards":
        plot_rewards(options.out)
    else:
        plot_budgets(options.files, options.out)


if __name__ == "__main__":
    with reporting("experiments.plots"):
        main(sys.argv[1:])
