"""The page and the figure of bounds over the radius of a ball, from the records alone."""

from __future__ import annotations

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
from bench.pages.colours import COLOURS, family_colour
from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, module_words, table
from bench.pages.log_axes import log_scale
from bench.pages.page import bullets, folded
from bench.pages.page import page as joined
from lipbounds.number_format import counted


PAPER = "yudin2025_ball.biased"
# In the order of the legend: the name of a bound, its key in the rows, its look.
CURVES = (
    ("sharp_ball", "sharp_ball", {"color": family_colour("sharp_ball"), "linewidth": 3.0}),
    ("sharp_ball.taylor", "taylor", {"color": COLOURS[5], "linestyle": (0, (3, 1)), "marker": "v"}),
    ("sharp_ball.deviation", "deviation", {"color": COLOURS[2], "linestyle": "--", "marker": "o"}),
    ("sharp_ball.direct", "direct", {"color": COLOURS[4], "linestyle": "-.", "marker": "s"}),
    (PAPER, "theorem_3", {"color": family_colour(PAPER), "linewidth": 2.4, "marker": "^"}),
    ("hu2024.ball", "hu2024.ball", {"color": COLOURS[3], "linestyle": (0, (6, 1, 1, 1)), "marker": "D"}),
)
BOLD = ("sharp_ball", PAPER)
HEADLINE = ("sharp_ball", "theorem_3", "hu2024.ball")
SHOWN = ("minilm", "digits-vit", "small-one-hot")  # one block of each, that with the most tokens
DRAWN = 200.0  # the top of the figure: what is further above the truth is left out, it would flatten the others
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
        rows = found.setdefault(f"{asked.model}{where} ({counted(record.tokens, 'token')})", {})
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
        *([f"**Violations**: {'; '.join(wrong)}."] if (wrong := violations(found)) else []),
        "![Bounds on a ball, as multiples of what gradient ascent reached, over the radius](balls.png)",
        "Every number is a multiple of the largest norm of the Jacobian that gradient ascent in the ball found. That "
        "is a lower bound of the truth, so a bound is *at most* so many times above it. All bounds are proved, on the "
        "ball, in the norm l2; the radius is in the Frobenius norm of the input. "
        f"`{PAPER}` is Theorem 3 of the paper over the ball. The figure leaves out what is above {DRAWN:g}.",
        _headline(found),
        "`sharp_ball` is the least of four bounds: the Taylor expansion of second order (`sharp_ball.taylor`), the "
        "norm at the centre plus the largest deviation from it (`sharp_ball.deviation`), three joint parts over the "
        f"ball (`sharp_ball.direct`), and `{PAPER}`. The norm at its centre is exact up to 2**22 entries of the "
        "Jacobian, and from the Gram blocks of `sharp` for longer inputs.",
        f"Made by `{command}` from `{records_path}`; nothing here is written by hand.",
        "## All blocks",
        "Columns marked 'quoted' were not measured here. They come from other programs on other random blocks of the "
        "same kind, and are multiples of the norm at the centre.",
    ]
    parts += [folded(title, _table(title, rows)) for title, rows in found.items()]
    return joined([*parts, "## Environment", bullets(describe(state) for state in environments)])


def _headline(found: dict[str, list[Row]]) -> str:
    """The blocks of the figure at all radii, and of each bound the multiple of what ascent reached."""
    curves = [(words, key) for words, key, _ in CURVES if key in HEADLINE]
    lines = [
        [title, f"{row['radius']:g}", *(figure(row[key] / row[LOWER] if key in row else None) for _, key in curves)]
        for title in _shown(found)
        for row in found[title]
        if row["radius"] and row.get(LOWER)
    ]
    return table(["block", "radius", *(f"`{words}`" for words, _ in curves)], lines)


def _shown(found: dict[str, list[Row]]) -> list[str]:
    """The blocks of the figure: of each chosen model the last one of those with the most tokens."""
    chosen = []
    for name in SHOWN:
        titles = [title for title in found if title.split(",")[0].split(" (")[0] == name]
        if titles:
            chosen.append(max(titles, key=_tokens))
    return chosen or list(found)[: len(SHOWN)]


def _tokens(title: str) -> int:
    return int(title.rpartition("(")[2].split(" ")[0])


def _table(title: str, rows: list[Row]) -> str:
    name = title.split(",")[0].split(" (")[0].removeprefix("small-")
    references = REFERENCES.get(name, {})
    titles = [
        "radius",
        "ascent",
        *(f"`{words}`" for words, _, _ in CURVES),
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
    titles = _shown(found)
    # Fixed ids and no date: the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        canvas, panels = plt.subplots(
            1, len(titles), figsize=(4.2 * len(titles), 4.2), dpi=150, squeeze=False, sharey=True
        )
        for axes, title in zip(panels[0], titles, strict=True):
            _panel(axes, title, found[title])
        panels[0][0].set_ylabel("times what gradient ascent reached")
        handles, labels = panels[0][0].get_legend_handles_labels()
        words = [f"{label} (the paper)" if label == PAPER else label for label in labels]
        legend = canvas.legend(
            handles, words, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False, labelcolor="#222222"
        )
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_fontweight("bold" if label in BOLD else "normal")
        arrange(canvas)
        paths = save(canvas, folder, name)
        plt.close(canvas)
    return paths


def _panel(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """One block: the radius against every curve."""
    for words, key, look in CURVES:
        found = [(row["radius"], row[key] / row[LOWER]) for row in rows if row.get(LOWER) and key in row]
        points = [(radius, ratio) for radius, ratio in found if radius and ratio <= DRAWN]
        looks: dict[str, Any] = {"markersize": 4, "linewidth": 1.4} | look
        axes.plot(*zip(*points, strict=True) if points else ([], []), label=words, **looks)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="radius of the ball", ylim=(0.9, DRAWN))
    for axis in (axes.xaxis, axes.yaxis):
        log_scale(axis)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} x")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
