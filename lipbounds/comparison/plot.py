"""A comparison as a figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from lipbounds.comparison.row import Row
from lipbounds.errors import LipboundsError, install_advice
from lipbounds.number_format import shown


# The same colour for a name in every figure; dark enough for white paper, apart for people who see no red or green.
PAPER, OWN, OTHERS = "#0072b2", "#d55e00", "#8a8a8a"


def plot(rows: Iterable[Row], model: str, path: str | Path | None) -> Any:
    """One line of dots for each bound: how many times the truth it is at each block.

    Args:
        rows: what is drawn: the upper bounds at the point among them.
        model: its name, for the title.
        path: where to write the figure; None for nowhere.

    Raises:
        LipboundsError: matplotlib is not installed, or there is no ratio to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise LipboundsError(f"a figure needs matplotlib, which is not installed; {install_advice('bench')}") from error
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        upper = row.kind in ("proved", "probable") and row.scope == "point" and row.bound != "truth"
        if upper and row.ratio is not None and row.ratio < float("inf"):
            ratios[row.bound].append(row.ratio)
    if not ratios:
        raise LipboundsError("a figure needs upper bounds at the point and a truth, got none; pass truth='auto'.")
    names = sorted(ratios, key=lambda name: -median(ratios[name]))
    figure = Figure(figsize=(7.0, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        colour = PAPER if name.startswith("yudin2025.") else OWN if name.startswith("sharp") else OTHERS
        axes.scatter(ratios[name], [place] * len(ratios[name]), s=14, color=colour, alpha=0.6, linewidths=0)
        axes.scatter(median(ratios[name]), place, s=60, marker="|", color=colour, linewidths=2)
    axes.axvline(1.0, color="#222222", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), labels=names)
    axes.set_xlabel("value over the true constant, at the point, l2 (one dot for each block, a bar for the median)")
    best = names[-1]
    least = shown(median(ratios[best]), "proved")
    axes.set_title(f"{model}: {best} is {least} times the truth", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    return figure
