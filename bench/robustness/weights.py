"""Clean and robust accuracy over the weight of JaSMin, so that "no effect at that weight" and "at no weight" differ."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.pages.formatting import table
from bench.pages.log_axes import log_scale
from bench.robustness.settings import ALL, reference_of
from bench.robustness.summary import WEAK, measure_name


Data = dict[str, Any]
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def curves(data: Data) -> dict[str, list[str]]:
    """The settings of each curve by penalty and start, by rising weight; curves of one point are none.

    Args:
        data: what `bench.robustness.task.run` returned.
    """
    found: dict[str, list[str]] = {}
    for name in data["settings"]:
        setting = ALL.get(name)
        if setting and setting.penalty.startswith("jasmin") and setting.weight is not None and not setting.adversary:
            found.setdefault(f"{setting.penalty} {setting.start}".strip(), []).append(name)
    return {curve: sorted(names, key=_weight) for curve, names in found.items() if len(names) > 1}


def _weight(name: str) -> float:
    weight = ALL[name].weight
    assert weight is not None
    return weight


def _measures(data: Data) -> dict[str, str]:
    """Clean accuracy, and for each radius that under the weak attack and in the worst case, with their titles."""
    found = {"clean": "clean"}
    model = next(iter(data["settings"].values()))["models"][0]
    for norm, rows in model["robust"].items():
        for row in rows:
            if "weak_steps" in data:
                found[measure_name(norm, row["eps"], WEAK)] = f"PGD-{data['weak_steps']}, {norm} {row['eps']:g}"
            found[measure_name(norm, row["eps"])] = f"worst case, {norm} {row['eps']:g}"
    return found


def weights_section(data: Data, summary: Data, name: str) -> list[str]:
    """The section of the page; nothing where no weights are compared.

    Args:
        data: what `bench.robustness.task.run` returned.
        summary: what `bench.robustness.summary.summarised` made of it.
        name: of the page.
    """
    found = curves(data)
    if not found:
        return []
    measures = _measures(data)
    body = []
    for names in found.values():
        for setting in (reference_of(names[0]), *names):
            cells = [_cell(summary["intervals"][setting][measure]) for measure in measures]
            body.append([data["settings"][setting]["title"], *cells])
    return [
        "## Clean against robust accuracy over the weight of JaSMin",
        f"![Accuracy over the weight]({name}_weights.png)",
        "Percent, mean over seeds ± half the width of the 95 % interval. Every weight is shown, none was chosen.",
        table(["setting", *measures.values()], body),
    ]


def _cell(found: Data) -> str:
    middle = f"{100 * found['mean']:.1f}"
    return middle if found["half"] is None else f"{middle} ± {100 * found['half']:.1f}"


def over_weights(data: Data, summary: Data) -> Figure | None:
    """A panel for each penalty, a line for each accuracy, and the baseline as a dashed line of the same colour.

    Args:
        data: what `bench.robustness.task.run` returned.
        summary: what `bench.robustness.summary.summarised` made of it.
    """
    found = curves(data)
    if not found:
        return None
    canvas, panels = plt.subplots(1, len(found), figsize=(6.4 * len(found), 4.2), dpi=150, squeeze=False)
    for axes, names in zip(panels[0], found.values(), strict=True):
        weights = [_weight(name) for name in names]
        for number, (measure, words) in enumerate(_measures(data).items()):
            colour = COLOURS[number % len(COLOURS)]
            shown = [summary["intervals"][name][measure] for name in names]
            halves = [100 * (each["half"] or 0.0) for each in shown]
            middle = [100 * each["mean"] for each in shown]
            axes.errorbar(weights, middle, yerr=halves, color=colour, marker="o", markersize=4, capsize=2, label=words)
            without = summary["intervals"][reference_of(names[0])][measure]["mean"]
            axes.axhline(100 * without, color=colour, linestyle=":", linewidth=1)
        log_scale(axes.xaxis)
        axes.set_xlabel(f"weight, {data['settings'][names[0]]['title'].rsplit(',', 1)[0]}")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(-3, 103)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_title("dotted: without the penalty", loc="left", fontsize=10)
    panels[0][0].legend(fontsize=8, frameon=False)
    return canvas
