"""The figure of the task `certified`: certified accuracy by every method, and what attacks leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.certified.shares import METHODS, certified, left_by_smallest, share_of
from bench.certified.tables import TITLES
from bench.pages.figure_files import arrange, save
from bench.pages.log_axes import log_scale
from lipbounds.number_format import counted


Data = dict[str, Any]
COLOURS = {"taylor": "#0072B2", "joint": "#009E73", "product": "#CC79A7"}
ACROSS = 2  # panels side by side


def draw(data: Data, folder: Path) -> list[Path]:
    """Certified and robust accuracy against the radius, over all images, as PNG and SVG.

    Args:
        data: what `bench.certified.task.shown` returned.
        folder: where the files go.
    """
    count = max(1, len(data["models"]))
    across = min(ACROSS, count)
    down = -(-count // across)
    with mpl.rc_context({"svg.hashsalt": "certified", "svg.fonttype": "none", "font.size": 10}):
        canvas, panels = plt.subplots(down, across, figsize=(5.2 * across, 4 * down), dpi=150, squeeze=False)
        for axes in panels.flat[len(data["models"]) :]:
            axes.set_visible(False)
        for axes, (name, model) in zip(panels.flat, data["models"].items(), strict=False):
            _panel(axes, name, model)
        arrange(canvas)
        paths = save(canvas, folder, "certified")
        plt.close(canvas)
    return paths


def _panel(axes: Any, name: str, model: Data) -> None:
    by_method = {method: certified(model, method) for method in METHODS if certified(model, method)}
    proved = sorted({row["radius"] for rows in by_method.values() for row in rows if row["radius"] > 0})
    nearest = sorted({one for found in model["smallest"] for one in found["distances"] if one})
    attacked = [(a["radius"], sum(a["robust"]) / len(a["robust"])) for a in model["attacks"]]
    places = sorted([*proved, *nearest, *(radius for radius, _ in attacked)]) or [1.0]
    main = [row["radius"] for row in by_method.get("taylor", []) if row["radius"] > 0] or places
    decades = places[-1] > 100 * min(main)  # within two decades a straight axis is easier to read
    start = places[0] / 3 if decades else 0.0
    for method, rows in by_method.items():
        own = sorted(row["radius"] for row in rows if row["radius"] > 0)
        edges = sorted([start, *own, *(radius * 1.0001 for radius in own), places[-1]])
        label = f"certified, {method} (proved), {counted(len(rows), 'image')}"
        axes.plot(edges, [share_of(rows, edge) for edge in edges], color=COLOURS[method], label=label)
    if nearest:
        edges = sorted([start, *nearest, *(radius * 0.9999 for radius in nearest)])  # falls at the radius itself
        shares = [left_by_smallest(model, edge) for edge in edges]
        axes.plot(edges, shares, color="#999999", label="FAB and APGD leave")
    if attacked:
        axes.plot(*zip(*attacked, strict=True), color="#D55E00", marker="o", ls="", label="AutoAttack leaves")
    if decades:
        log_scale(axes.xaxis)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("radius, l2 norm of the pixels")
    axes.set_title(f"{TITLES.get(name, name)}", loc="left", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", fontsize=7, frameon=False)
    axes.set_ylabel("accuracy")
