"""The figures of the task `attention`, from its data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from bench.attention.correlation import estimate, spearman_within
from bench.attention.links import MEAN, Data, arrays, attacked, over_layers
from bench.attention.maps import BINS, HISTOGRAMS
from bench.pages.colours import COLOURS
from bench.pages.figure_files import arrange, save


MAPS, STATISTICS, SCATTER = "attention_maps", "attention_statistics", "attention_scatter"
SHOWN = ("minilm", "digits-vit")
HISTOGRAM_TITLES = {"g_1": "g_1", "largest": "largest probability p_(1)", "entropy": "entropy / log of the keys"}
LAYER_COLOURS = "viridis"
SHADES = PowerNorm(0.5, 0, 1)  # so that nearly uniform rows are seen
GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}


def draw(data: Data, folder: Path) -> list[Path]:
    """Write all figures as PNG and SVG and return their paths.

    Args:
        data: what `bench.attention.task.run` returned.
        folder: where the files go.
    """
    paths = []
    for name, make in ((MAPS, _maps), (STATISTICS, _statistics), (SCATTER, _scatter)):
        with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
            canvas = make(data)
            if canvas is not None:
                paths += save(canvas, folder, name)
                plt.close(canvas)
    return paths


def _maps(data: Data) -> Figure | None:
    """Four maps, chosen by rule, each with g_1 of its rows to the right."""
    if "examples" not in data:
        return None
    shown = data["examples"]
    canvas = plt.figure(figsize=(12.5, 3.6), dpi=150)
    grid = canvas.add_gridspec(
        1, 3 * len(shown["maps"]), width_ratios=[1, 0.34, 0.24] * len(shown["maps"]), wspace=0.08
    )
    for number, entry in enumerate(shown["maps"]):
        axes = canvas.add_subplot(grid[3 * number])
        weights, g_1 = np.array(entry["map"]), np.array(entry["g_1"])
        axes.imshow(weights, cmap="Blues", norm=SHADES, aspect="auto")
        axes.set_title(f"{entry['kind']}\nlayer {entry['layer']}, head {entry['head']}", loc="left", fontsize=9)
        axes.set_xlabel("key")
        axes.set_xticks([0, len(weights[0]) - 1])
        axes.set_yticks([0, len(weights) - 1])
        if number == 0:
            axes.set_ylabel("query (row)")
        bars = canvas.add_subplot(grid[3 * number + 1], sharey=axes)
        bars.barh(range(len(g_1)), g_1, color=COLOURS[0], height=0.85)
        bars.set_xlim(0, 0.5)
        bars.set_xticks([0.5], ["½"])
        bars.set_xlabel("g_1")
        bars.tick_params(labelleft=False, left=False)
        bars.spines[["top", "right"]].set_visible(False)
    place = canvas.add_axes((0.91, 0.2, 0.009, 0.55))
    canvas.colorbar(ScalarMappable(SHADES, "Blues"), cax=place, label="attention")
    canvas.text(
        0.125,
        1.06,
        f"Attention maps of {shown['model']} at {shown['input']}: g_1 is small where a row is one-hot or uniform, and "
        "½ where two keys share it",
        fontsize=10,
    )
    return canvas


def _statistics(data: Data) -> Figure:
    """Shares of rows over the values of three statistics, one ridge a layer."""
    models = [name for name in SHOWN if name in data["models"]] or list(data["models"])[:1]
    canvas, panels = plt.subplots(
        len(models), len(HISTOGRAMS), figsize=(10.5, 3.1 * len(models)), dpi=150, squeeze=False, sharey="row"
    )
    for row, name in zip(panels, models, strict=True):
        inputs = [answer["layers"] for answer in data["models"][name]["inputs"]]
        for axes, (statistic, top) in zip(row, HISTOGRAMS.items(), strict=True):
            _ridges(axes, inputs, statistic, top)
        row[0].set_ylabel(f"{name}\nlayer")
        row[0].set_yticks(range(len(inputs[0])), range(len(inputs[0])))
    for axes, title in zip(panels[0], HISTOGRAM_TITLES.values(), strict=True):
        axes.set_title(title, loc="left", fontsize=10)
    canvas.suptitle(
        "How many rows of attention have which value (all heads and inputs)", x=0.01, ha="left", fontsize=11
    )
    arrange(canvas)
    return canvas


def _ridges(axes: Axes, inputs: list[Any], statistic: str, top: float) -> None:
    edges = np.linspace(0, top, BINS + 1)
    for layer in reversed(range(len(inputs[0]))):
        counts = np.sum([layers[layer]["histograms"][statistic] for layers in inputs], 0)
        heights = 0.9 * counts / counts.max()
        axes.stairs(layer + heights, edges, baseline=layer, fill=True, color=COLOURS[1], alpha=0.75)
        axes.axhline(layer, color="#888888", linewidth=0.6)
    axes.set_xlim(0, top)
    axes.spines[["top", "right"]].set_visible(False)


def _scatter(data: Data) -> Figure:
    """Mean g_1 against the true constant, and against the perturbation, with the one number that predicts it beside."""
    models = [name for name in SHOWN if name in data["models"]] or list(data["models"])[:1]
    attacks = [name for name in data["attacks"] if name in SHOWN and "L2" in data["attacks"][name]["distances"]]
    columns = len(models) + 2 * len(attacks)
    canvas, panels = plt.subplots(1, columns, figsize=(3.5 * columns, 3.6), dpi=150, squeeze=False)
    places = iter(panels[0])
    for name in models:
        _constants(next(places), name, data["models"][name])
    for name in attacks:
        found, distances = attacked(data["attacks"][name], data["models"][name], "L2")
        first = np.array(data["attacks"][name]["first"]["L2"])[None]
        axes = next(places)
        _points(axes, over_layers(found[MEAN]), distances[:1])
        axes.set(xlabel="mean g_1 (mean over layers)", ylabel="perturbation that fools it, l2")
        axes.set_title(
            _title(
                f"{name}: g_1 and what fools an image,\none point an image", over_layers(found[MEAN]), distances[:1]
            ),
            **_LEFT,
        )
        axes = next(places)
        _points(axes, first, distances[:1])
        ends = [0, float(max(first.max(), distances.max()))]
        axes.plot(ends, ends, color="black", linewidth=0.8, label="equal")
        axes.legend(fontsize=8, frameon=False)
        axes.set(xlabel="margin over slope (linear model)", ylabel="perturbation that fools it, l2")
        axes.set_title(_title(f"{name}: margin over slope and what fools\nan image", first, distances[:1]), **_LEFT)
    arrange(canvas)
    return canvas


_LEFT: dict[str, Any] = {"loc": "left", "fontsize": 9}


def _constants(axes: Axes, name: str, model: Data) -> None:
    found = arrays(model)
    x, y = found[MEAN], found["true constant"]
    colours = plt.get_cmap(LAYER_COLOURS)(np.linspace(0, 0.9, len(x)))
    for layer, colour in enumerate(colours):
        axes.scatter(x[layer], y[layer], s=11, color=colour, label=f"layer {layer}", linewidths=0)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 30, 50, 100) if y.min() * 0.9 <= tick <= y.max() * 1.1]
    axes.set_yticks(ticks)
    axes.set(xlabel="mean g_1 of the block", ylabel="true local constant of the block")
    axes.set_title(_title(f"{name}: g_1 and the constants of blocks,\nwithin layers", x, y), **_LEFT)
    axes.legend(fontsize=7, framealpha=0.8, edgecolor="none", handletextpad=0.1, borderpad=0.1, ncols=2)
    _frame(axes)


def _points(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    axes.scatter(x, y, s=12, color=COLOURS[1], linewidths=0, alpha=0.8)
    _frame(axes)


def _frame(axes: Axes) -> None:
    axes.grid(**GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _title(words: str, x: np.ndarray, y: np.ndarray) -> str:
    found = estimate(spearman_within, x, y)
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if np.isfinite(found.low) else ""
    return f"{words}\nSpearman {found.value:.2f}{interval}"
