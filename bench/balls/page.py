"""The page and the figure of bounds over the radius of a ball, from the records alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.balls.task import LOWER, REFERENCES, UPPERS
from bench.engine.machine import describe
from bench.engine.records import Record
from bench.pages.colours import COLOURS
from bench.pages.figure_files import save
from bench.pages.formatting import figure, module_words, table


# In the order of the legend: what a curve is, its key in the rows, its look.
CURVES = (
    ("least of the four (sharp_ball)", "sharp_ball", {"color": COLOURS[1], "linewidth": 2.6}),
    ("Taylor, second order", "taylor", {"color": COLOURS[5], "linestyle": (0, (3, 1)), "marker": "v"}),
    ("centre plus deviation", "deviation", {"color": COLOURS[2], "linestyle": "--", "marker": "o"}),
    ("three joint parts", "direct", {"color": COLOURS[4], "linestyle": "-.", "marker": "s"}),
    ("Theorem 3 over the ball", "theorem_3", {"color": COLOURS[0], "linestyle": ":", "marker": "^"}),
    ("Hu et al. 2024, corrected", "hu2024.ball", {"color": COLOURS[3], "linestyle": (0, (6, 1, 1, 1)), "marker": "D"}),
)
DRAWN = 100.0  # a bound so many times above the least one is left out of the figure: it would flatten the others
Row = dict[str, Any]


def blocks(records: Iterable[Record]) -> dict[str, list[Row]]:
    """One row for each radius of each block, by the title of the block, radii ascending.

    Args:
        records: of the task.
    """
    found: dict[str, dict[float, Row]] = {}
    for record in records:
        asked = record.question
        if record.value is None:
            continue
        where = (
            "" if asked.model.startswith("small") else f", layer {module_words({'layer': asked.layer, 'module': ''})}"
        )
        rows = found.setdefault(f"{asked.model}{where} ({record.tokens} tokens)", {})
        radius = record.radius or 0.0
        row = rows.setdefault(radius, {"radius": radius, "relative": record.relative_radius})
        row[asked.bound] = record.value
        if asked.bound == UPPERS[0]:
            row |= record.details
    return {title: [rows[radius] for radius in sorted(rows)] for title, rows in found.items()}


def violations(found: dict[str, list[Row]]) -> list[str]:
    """Where an upper bound is below what ascent reached; one of the two is wrong."""
    return [
        f"{title}, radius {row['radius']:g}: {key} claims <= {row[key]:.6g}, but {LOWER} reaches {row[LOWER]:.6g}"
        for title, rows in found.items()
        for row in rows
        for _, key, _ in CURVES
        if LOWER in row and key in row and not row[key] >= row[LOWER]
    ]


def page(found: dict[str, list[Row]], command: str, records_path: str, environments: Iterable[Row]) -> str:
    """The page of results.

    Args:
        found: what `blocks` returned.
        command: that made it.
        records_path: where the records are.
        environments: of the runs.
    """
    parts = [
        "# Balls: bounds on a ball over its radius",
        f"Made by `{command}` from `{records_path}`.",
        *([f"**Violations**: {'; '.join(wrong)}."] if (wrong := violations(found)) else []),
        "Multiples of the largest norm of the Jacobian that gradient ascent in the ball found, a lower bound of the "
        "truth: a bound is *at most* so many times above it. The radius is in the Frobenius norm of the input. "
        "`sharp_ball` is the least of the four columns after it; its centre is the exact norm up to 2**22 entries of "
        "the Jacobian, and what the Gram blocks of `sharp` give for longer inputs. All bounds are proved, on the ball, "
        "in l2; ascent is a lower bound. The figure leaves out what is more than 100 times above the least bound.",
        "Columns marked 'quoted' were not measured here: they are quoted from the project's theory page, made there "
        "by other programs on other random blocks of the same kind, and are multiples of the norm at the centre.",
        "![curves](balls.png)",
    ]
    for title, rows in found.items():
        parts += [f"## {title}", _table(title, rows)]
    parts += ["## Environment", *[f"- {describe(state)}" for state in environments]]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ") + "\n"


def _table(title: str, rows: list[Row]) -> str:
    name = title.split(",")[0].split(" (")[0].removeprefix("small-")
    references = REFERENCES.get(name, {})
    titles = [
        "radius",
        "ascent",
        *(words for words, _, _ in CURVES),
        *(f"{words}, quoted, over the centre" for words in references),
    ]
    centre = next((row[UPPERS[0]] for row in rows if row["radius"] == 0 and UPPERS[0] in row), None)
    lines = []
    for row in rows:
        if LOWER not in row:
            continue
        reached = row[LOWER]
        ratios = [figure(row[key] / reached if key in row and reached else None) for _, key, _ in CURVES]
        others = [figure(values.get(row["radius"])) for values in references.values()]
        lines.append([f"{row['radius']:g}", figure(reached), *ratios, *others])
    note = f"At radius 0: {figure(centre)}.\n\n" if centre is not None else ""
    return note + table(titles, lines)


def draw(found: dict[str, list[Row]], folder: Path, name: str = "balls") -> list[Path]:
    """Write the figure as PNG and SVG and return their paths.

    Args:
        found: what `blocks` returned.
        folder: where the files go.
        name: of the files, without ending.
    """
    titles = list(found)
    columns = min(3, len(titles))
    height = math.ceil(len(titles) / columns)
    # Fixed ids and no date: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        canvas, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 3.3 * height), dpi=150, squeeze=False)
        for place, title in zip(axes.flat, titles, strict=False):
            _panel(place, title, found[title])
        for place in list(axes.flat)[len(titles) :]:
            place.axis("off")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
        canvas.tight_layout()
        paths = save(canvas, folder, name)
        plt.close(canvas)
    return paths


def _drawn(row: Row, key: str) -> bool:
    return key in row and row[key] <= DRAWN * row.get(UPPERS[0], math.inf)


def _panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """One block: the radius against every curve."""
    for words, key, look in CURVES:
        points = [(row["radius"], row[key]) for row in rows if row["radius"] and _drawn(row, key)]
        if points:
            looks: dict[str, Any] = {"markersize": 3.5, "linewidth": 1.3} | look
            axes.plot(*zip(*points, strict=True), label=words, **looks)
    reached = [(row["radius"], row[LOWER]) for row in rows if row["radius"] and LOWER in row]
    if reached:
        axes.plot(*zip(*reached, strict=True), color="black", marker="v", markersize=3.5, label="reached by ascent")
    axes.set(xscale="log", yscale="log", xlabel="radius of the ball", ylabel="Lipschitz constant on it")
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
