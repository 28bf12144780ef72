"""The figures of the task `robustness`, from its data alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.pages.figure_files import arrange, save
from bench.pages.log_axes import log_scale
from bench.robustness.settings import BASELINE
from bench.robustness.summary import WEAK, measure_name
from bench.robustness.weights import over_weights
from lipbounds.number_format import counted


Data = dict[str, Any]
# Okabe and Ito's colours, told apart by colour-blind readers; markers tell them apart in grey.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A7B00", "#666666")
MARKERS = "os^DvP<X>"
NORM_TITLES = {"l_inf": "largest change of a pixel", "l2": "l2 norm of the change"}
STYLE: dict[Any, Any] = {"svg.hashsalt": "robustness", "svg.fonttype": "none", "font.size": 10}


def draw(data: Data, summary: Data, folder: Path, prefix: str) -> list[Path]:
    """Robust accuracy against radius and against the local constant, and g_1 of rows; each as PNG and SVG.

    Args:
        data: what `bench.robustness.task.run` returned.
        summary: what `bench.robustness.summary.summarised` made of it.
        folder: where the files go.
        prefix: of their names.
    """
    paths = []
    with mpl.rc_context(STYLE):
        for name, canvas in (
            (prefix, _accuracies(data, summary)),
            (f"{prefix}_constants", _dots(data)),
            (f"{prefix}_g1", _histograms(data)),
            (f"{prefix}_weights", over_weights(data, summary)),
        ):
            if canvas is None:
                continue
            arrange(canvas)
            paths += save(canvas, folder, name)
            plt.close(canvas)
    return paths


def _accuracies(data: Data, summary: Data) -> Figure:
    """Over the radius where a norm has several, and else a row for each setting."""
    return _curves(data, summary) if max(map(len, _norms(data).values())) > 1 else _rows(data, summary)


def _rows(data: Data, summary: Data) -> Figure:
    """A panel for each norm, a row for each setting: clean, under the weak attack, and in the worst case."""
    norms, names = _norms(data), [*data["settings"]]
    size = (4.0 + 4.0 * len(norms), 1.2 + 0.34 * len(names))
    canvas, panels = plt.subplots(1, len(norms), figsize=size, dpi=150, squeeze=False, sharey=True)
    for axes, (norm, (eps,)) in zip(panels[0], norms.items(), strict=True):
        measures = {"clean": "clean"}
        if "weak_steps" in data:
            measures[measure_name(norm, eps, WEAK)] = f"PGD-{data['weak_steps']}"
        measures[measure_name(norm, eps)] = "worst case"
        for index, (measure, words) in enumerate(measures.items()):
            shown = [summary["intervals"][name][measure] for name in names]
            axes.errorbar(
                [100 * each["mean"] for each in shown],
                [row + 0.16 * (index - 1) for row in range(len(names))],  # a little apart
                xerr=[100 * (each["half"] or 0.0) for each in shown],
                color=COLOURS[2 * index],
                marker=MARKERS[index],
                markersize=4,
                capsize=2,
                linestyle="none",
                label=words,
            )
        axes.set_yticks(range(len(names)), [data["settings"][name]["title"] for name in names])
        axes.set_xlabel(f"accuracy, %, {norm} {eps:g}")
        axes.set_xlim(-3, 103)
        _plain(axes)
    panels[0][0].invert_yaxis()
    handles, labels = panels[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    panels[0][0].set_title(_sample(data), loc="left", fontsize=10)
    return canvas


def _sample(data: Data) -> str:
    seeds = len(data["seeds"])
    return f"{counted(data['images'], 'image')}, {counted(seeds, 'seed')}" + ", 95 % intervals" * (seeds > 1)


def _curves(data: Data, summary: Data) -> Figure:
    norms = _norms(data)
    canvas, panels = plt.subplots(1, len(norms), figsize=(5.2 * len(norms), 4.2), dpi=150, squeeze=False)
    for axes, (norm, radii) in zip(panels[0], norms.items(), strict=True):
        for index, (name, setting) in enumerate(data["settings"].items()):
            found = summary["intervals"][name]
            shown = [found["clean"], *(found[measure_name(norm, eps)] for eps in radii)]
            # A little apart, so that intervals do not hide each other.
            shift = 0.012 * max(radii) * (index - (len(data["settings"]) - 1) / 2)
            axes.errorbar(
                [eps + shift for eps in (0.0, *radii)],
                [100 * each["mean"] for each in shown],
                yerr=[100 * (each["half"] or 0.0) for each in shown],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=setting["title"],
            )
        axes.set_xlabel(f"radius, {NORM_TITLES[norm]}")
        axes.set_ylabel("robust accuracy, %")
        axes.set_ylim(-3, 103)
        _plain(axes)
    panels[0][0].legend(fontsize=8, frameon=False, loc="lower left")
    panels[0][0].set_title(_sample(data), loc="left", fontsize=10)
    return canvas


def _dots(data: Data) -> Figure:
    """One dot a model, at the smallest radius of each norm."""
    norms = _norms(data)
    canvas, panels = plt.subplots(1, len(norms), figsize=(5.2 * len(norms), 4.2), dpi=150, squeeze=False)
    for axes, (norm, radii) in zip(panels[0], norms.items(), strict=True):
        for index, setting in enumerate(data["settings"].values()):
            axes.plot(
                [median(model["constants"]) for model in setting["models"]],
                [100 * model["robust"][norm][0]["worst"] for model in setting["models"]],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],  # each pair once
                markersize=5,
                linestyle="none",
                label=setting["title"],
            )
        log_scale(axes.xaxis)
        axes.set_xlabel("local Lipschitz constant of the network, median over images")
        axes.set_ylabel(f"robust accuracy at {norm} {radii[0]:g}, %")
        _plain(axes)
    panels[0][0].legend(fontsize=8, frameon=False)
    return canvas


def _histograms(data: Data) -> Figure:
    """g_1 of all rows, by layer: the baseline, and the first setting with JaSMin if there is one."""
    names = [BASELINE, *[name for name in data["settings"] if name.startswith("jasmin")][:1]]
    layers = len(data["settings"][names[0]]["models"][0]["layers"])
    canvas, panels = plt.subplots(1, layers, figsize=(3.0 * layers, 2.8), dpi=150, squeeze=False, sharey=True)
    for layer, axes in enumerate(panels[0]):
        for name in names:
            setting = data["settings"][name]
            shares = _shares([model["layers"][layer]["g_1_counts"] for model in setting["models"]])
            edges = [0.5 * place / len(shares) for place in range(len(shares) + 1)]
            index = list(data["settings"]).index(name)
            axes.stairs(shares, edges, color=COLOURS[index % len(COLOURS)], linewidth=1.4, label=setting["title"])
        axes.set_title(f"layer {layer}", loc="left", fontsize=10)
        axes.set_xlabel("g_1 of a row")
        _plain(axes)
    panels[0][0].set_ylabel("share of rows")
    panels[0][-1].legend(fontsize=8, frameon=False)
    return canvas


def _shares(counts: list[list[int]]) -> list[float]:
    """Mean over models of the shares of rows in each bin."""
    return [mean(model[place] / sum(model) for model in counts) for place in range(len(counts[0]))]


def _norms(data: Data) -> dict[str, list[float]]:
    model = next(iter(data["settings"].values()))["models"][0]
    return {norm: [row["eps"] for row in rows] for norm, rows in model["robust"].items()}


def _plain(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
