"""Tables and figure of `bench.speed.pareto`, from the data of the page alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.pages.colours import BOLD, family_colour
from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, table
from bench.pages.page import folded


Row = dict[str, Any]
ACROSS = 2  # panels side by side
NEAR = math.log(1.6)  # factors between points whose names would overlap


def blocks_of(rows: list[Row]) -> list[str]:
    """The blocks, in order.

    Args:
        rows: with `block`, `method` and `answer`; the truth has no method.
    """
    return list(dict.fromkeys(row["block"] for row in rows))


def costs_and_ratios(rows: list[Row], block: str) -> list[tuple[str, float, float]]:
    """Name, forward passes and ratio to the truth of each bound at a block, cheapest first.

    Args:
        rows: as `blocks_of` takes them.
        block: which.
    """
    here = {row["method"]: row["answer"] for row in rows if row["block"] == block}
    truth = here.get(None, {}).get("value")
    if not truth:
        return []
    found = [(name, answer) for name, answer in here.items() if name is not None and "value" in answer]
    return sorted(
        ((name, answer["ratio"][1], answer["value"] / truth) for name, answer in found), key=lambda each: each[1:]
    )


def front(points: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """Those that no cheaper bound undercuts.

    Args:
        points: cheapest first.
    """
    kept: list[tuple[str, float, float]] = []
    for point in points:
        if not kept or point[2] < kept[-1][2]:
            kept.append(point)
    return kept


def section(rows: list[Row]) -> list[str]:
    """The part of the page.

    Args:
        rows: as `blocks_of` takes them; empty where none was measured.
    """
    if not rows:
        return []
    best, folds = [], []
    for block in blocks_of(rows):
        points = costs_and_ratios(rows, block)
        chosen = front(points)
        steps = "; ".join(f"`{name}` {figure(cost)} passes, {figure(ratio)}x" for name, cost, ratio in chosen)
        best.append(f"- **{block}**: {steps or 'nothing was measured'}.")
        names = {name for name, _, _ in chosen}
        lines = [[f"`{n}`", figure(c), figure(r), "yes" if n in names else ""] for n, c, r in points]
        missing = {
            str(row["method"]): row["answer"]["error"]
            for row in rows
            if row["block"] == block and "error" in row["answer"]
        }
        told = "; ".join(f"`{name}`: {why}" for name, why in missing.items())
        folds.append(
            folded(
                block,
                table(["bound", "forward passes", "times the truth", "none cheaper is as small"], lines),
                f"Without a number: {told}." if told else "",
            )
        )
    caption = (
        "All proved bounds at a point in l2, and the probable ones from Lanczos (delta = 1e-9). Times the truth: over "
        "a lower bound by Lanczos, so at most that. Forward passes: of the block in float32. For each block those that "
        "no cheaper bound undercuts, cheapest first:"
    )
    return [
        "## Which bound for which budget",
        "![Ratio to the truth over cost](pareto.png)",
        caption,
        "\n".join(best),
        *folds,
    ]


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """One panel for each block, logarithmic; the line joins what no cheaper bound undercuts.

    Args:
        rows: as `blocks_of` takes them; nothing is drawn where there are none.
        folder: where the figure goes.
    """
    names = [block for block in blocks_of(rows) if costs_and_ratios(rows, block)]
    if not names:
        return []
    with mpl.rc_context({"font.size": 9, "svg.hashsalt": "lipbounds"}):
        down = -(-len(names) // ACROSS)
        canvas, axes = plt.subplots(down, ACROSS, figsize=(6.2 * ACROSS, 4.4 * down), squeeze=False)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
        for axis, block in zip(axes.flat, names, strict=False):
            points = costs_and_ratios(rows, block)
            chosen = front(points)
            axis.plot([c for _, c, _ in chosen], [r for _, _, r in chosen], color="#666666", linewidth=1, zorder=1)
            for name, cost, ratio in points:
                axis.scatter([cost], [ratio], color=family_colour(name), s=40 if name in BOLD else 22, zorder=2)
            for (name, cost, ratio), below in zip(chosen, _below(chosen), strict=True):
                axis.annotate(name, (cost, ratio), textcoords="offset points", xytext=(5, 4 - 9 * below), fontsize=7)
            axis.set(xscale="log", yscale="log", xlabel="forward passes", ylabel="times the truth", title=block)
            axis.title.set_fontsize(9)
            axis.margins(x=0.15)
        arrange(canvas)
        paths = save(canvas, folder, "pareto")
        plt.close(canvas)
    return paths


def _below(chosen: list[tuple[str, float, float]]) -> list[int]:
    """How many lines the name of each point is set below its place, so that those of neighbours stand apart."""
    lines: list[int] = []
    for k, (_, cost, ratio) in enumerate(chosen):
        near = k and abs(math.log(cost / chosen[k - 1][1])) < NEAR and abs(math.log(ratio / chosen[k - 1][2])) < NEAR
        lines.append(lines[-1] + 1 if near else 0)
    return lines
