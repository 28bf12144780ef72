"""The figure of tightness, from the aggregates alone: how many times above the truth each bound is, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.pages.colours import BOLD, GREY, THE_PAPER, family_colour
from bench.pages.figure_files import save
from bench.pages.formatting import module_words
from bench.pages.log_axes import log_scale
from lipbounds.number_format import counted


DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = "os^Dv*"
OF_THE_PAPER = (THE_PAPER, "yudin2025.theorem3")
Aggregates = dict[str, Any]
Style = dict[str, Any]


def draw(aggregates: Aggregates, folder: Path, name: str = "tightness") -> list[Path]:
    """Write the figure as PNG and SVG and return their paths.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
        folder: where the files go.
        name: of the files, without ending.
    """
    main, *others = _panels(aggregates)
    styles = method_styles(aggregates)
    # Fixed ids and no date: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        canvas = plt.figure(figsize=(12, 5.2), dpi=150)
        grid = canvas.add_gridspec(1, 3, width_ratios=[4.6, 3.4, 3.0], wspace=0.03)
        axes = canvas.add_subplot(grid[0])
        _panel(axes, main, aggregates, styles)
        axes.set_ylabel("times the true local Lipschitz constant")
        for other in others[:1]:
            side = canvas.add_subplot(grid[2], sharey=axes)
            _panel(side, other, aggregates, styles)
            side.tick_params(labelleft=False)
        _labels(axes, main, aggregates, styles)
        paths = save(canvas, folder, name)
        plt.close(canvas)
    return paths


def method_styles(aggregates: Aggregates) -> dict[str, Style]:
    """The looks of the upper bounds: one colour per family, one dash and marker per variant; probable ones dotted.

    The bound of the paper and `sharp` are bold; other softmax norms in the place of g_1 are ablations, and grey.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
    """
    styles: dict[str, Style] = {}
    variants: dict[str, int] = {}
    for name, method in aggregates["methods"].items():
        if (method["norm"], method["scope"]) != ("l2", "point"):
            continue
        if method["kind"] == "probable":
            styles[name] = {"color": "black", "linestyle": ":", "marker": "", "linewidth": 1.6}
        elif method["kind"] == "proved":
            paper = name.split(".")[0]
            variant = variants[paper] = variants.get(paper, -1) + 1
            is_ablation = paper == "yudin2025" and name not in OF_THE_PAPER
            styles[name] = {
                "color": GREY if is_ablation else family_colour(name),
                "linestyle": DASHES[variant % len(DASHES)],
                "marker": MARKERS[variant % len(MARKERS)],
                "linewidth": 3.0 if name in BOLD else 1.6,
                "markersize": 4.5,
            }
    return styles


def space_out(positions: Sequence[float], gap: float) -> list[float]:
    """Positions moved as little as a simple rule allows so that neighbours are at least `gap` apart, in the same order.

    Args:
        positions: in ascending order.
        gap: smallest distance.
    """
    placed: list[list[float]] = []  # clusters: the centre of each is the mean of the positions in it
    for position in positions:
        placed.append([position])
        while len(placed) > 1 and _low(placed[-1], gap) < _high(placed[-2], gap) + gap:
            placed[-2:] = [placed[-2] + placed[-1]]
    return [_low(cluster, gap) + gap * number for cluster in placed for number in range(len(cluster))]


def _low(cluster: list[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _high(cluster: list[float], gap: float) -> float:
    return _low(cluster, gap) + gap * (len(cluster) - 1)


def _panels(aggregates: Aggregates) -> list[str]:
    """The model of the main panel and that of the side panel: trained ones whose blocks have all their parts."""
    names = list(aggregates["models"])
    return [name for name in ("minilm", "digits-vit") if name in names] or names[:1]


def _shown(model: dict[str, Any], styles: dict[str, Style]) -> list[str]:
    return [row["bound"] for row in model["overall"] if row["bound"] in styles]


def _panel(axes: Axes, name: str, aggregates: Aggregates, styles: dict[str, Style]) -> None:
    """One model: a line a method."""
    model = aggregates["models"][name]
    layers = model["per_layer"]
    for method in _shown(model, styles):
        medians = [row["median"].get(method, math.nan) for row in layers]
        axes.plot(range(len(layers)), medians, **styles[method])
    axes.axhline(1, color="black", linewidth=1)
    log_scale(axes.yaxis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f} x" if value >= 1 else f"{value:g} x")
    axes.set_xticks(range(len(layers)), [module_words(row) for row in layers])
    axes.set_xlim(-0.2, len(layers) - 0.8)
    axes.set_xlabel("layer")
    title = model["description"].split(":")[0]
    axes.set_title(f"{title}\nmedian over {counted(model['inputs'], 'input')}", loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _labels(axes: Axes, name: str, aggregates: Aggregates, styles: dict[str, Style]) -> None:
    """The name of each method at the right end of its line, as in the tables, moved apart where lines are close."""
    model, methods = aggregates["models"][name], aggregates["methods"]
    last = model["per_layer"][-1]["median"]
    entries = [(1.0, "the truth", "black")]
    for method in _shown(model, styles):
        if 0 < last.get(method, 0) < math.inf:
            kind = "" if methods[method]["kind"] == "proved" else f" ({methods[method]['kind']})"
            note = " (the paper)" if method in OF_THE_PAPER else ""
            entries.append((last[method], method + kind + note, styles[method]["color"]))
    entries.sort()
    lowest, highest = (math.log10(limit) for limit in axes.get_ylim())
    heights = [(math.log10(value) - lowest) / (highest - lowest) for value, _, _ in entries]
    for (_, words, colour), height, placed in zip(entries, heights, space_out(heights, 0.05), strict=True):
        axes.plot([1.01, 1.05], [height, placed], color=colour, lw=0.7, transform=axes.transAxes, clip_on=False)
        axes.text(
            1.06,
            placed,
            words,
            transform=axes.transAxes,
            **{"color": "#222222", "fontsize": 9, "verticalalignment": "center"},
            fontweight="bold" if words.split(" ")[0] in BOLD else "normal",
        )
