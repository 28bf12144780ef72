"""The page and the figure of classifiers that were given, from their data alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, table
from bench.pages.page import bullets, folded, page
from bench.robustness.classifier_summary import column_name, radius_words
from bench.robustness.figures import COLOURS, MARKERS, NORM_TITLES, STYLE
from bench.robustness.measures import BOUNDS
from lipbounds.number_format import counted


Data = dict[str, Any]
SIGNIFICANT = 0.05
NORM_WORDS = {"l_inf": "l_inf (the largest change of a pixel)", "l2": "l2 (the Euclidean norm of all changes)"}


def report(data: Data, summary: Data, command: str, picture: str) -> str:
    """The page.

    Args:
        data: what `bench.robustness.classifier_task.shown` returned.
        summary: what `bench.robustness.classifier_summary.summarised` made of it.
        command: that made it.
        picture: the file name of the figure.
    """
    names = ", ".join(_code(model["model"]) for model in data["models"])
    paired = len(data["models"]) > 1
    parts = [
        f"# Robust accuracy of {names}",
        f"![Robust accuracy against the radius]({picture})",
        _headline(summary),
        _legend(data),
        f"Made by `{command.replace('`', '')}`; nothing here is written by hand. What is done, and why: "
        "docs/robustness.md.",
        *([f"## Compared with {_code(data['models'][0]['model'])}", _compared(summary)] if paired else []),
        "## By attack",
        *(_attacks(model, unfolded=not paired) for model in data["models"]),
        "## Local constants",
        *(_constants(model) for model in data["models"]),
        "## Environment",
        bullets(data["environments"]),
    ]
    return page(parts)


def _code(name: str) -> str:
    return f"`{name.replace('`', '')}`"


def _percent(found: Data) -> str:
    return f"{100 * found['share']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _headline(summary: Data) -> str:
    columns = list(summary["models"][0]["accuracies"])
    body = [
        [_code(model["model"]), *(_percent(model["accuracies"][column]) for column in columns)]
        for model in summary["models"]
    ]
    caption = "Accuracy in % as the images are, and robust accuracy by norm and radius, with 95 % intervals:"
    return f"{caption}\n\n{table(['model', *columns], body)}"


def _legend(data: Data) -> str:
    """What was attacked, in which unit, by what, and what the intervals are."""
    first, count = data["models"][0], len(data["names"])
    shape = " x ".join(map(str, first["shape"]))
    classes = " and ".join(dict.fromkeys(str(model["classes"]) for model in data["models"]))
    norms = " and ".join(NORM_WORDS[norm] for norm in first["robust"])
    attacks = dict.fromkeys(_attack_words(model) for model in data["models"])
    lines = [
        f"Images: {count} of {data['available']} of {data['source']}, drawn at random with a fixed seed and the same "
        f"for every model; {classes} classes; on {data['device']}.",
        f"Radii are in the norm {norms} of pixels in [0, 1], of the {shape} image that the model is given, before its "
        "normalisation.",
        *([data["unlike"]] if data["unlike"] else []),
        "Robust accuracy: the share of the images that are classified right and that no attack changed, of that norm "
        "with that radius or a smaller one. It is an upper bound of the truth: a better attack could leave less.",
        *(f"Attacks: {words}." for words in attacks),
        "Intervals: Clopper and Pearson's, which cover with at least 95 %. They stand for other images drawn like "
        "these, not for training again: there is one set of weights per model.",
    ]
    return bullets(lines)


def _attack_words(model: Data) -> str:
    attack = model["attack"]
    if attack is None:
        return (
            f"FGSM and PGD-40 alone on {_code(model['model'])}, which are weak: no package of AutoAttack is installed. "
            'Install the extra by `pip install -e ".[bench]"`, or the package `autoattack` of its authors'
        )
    whose = {
        "autoattack": f"the package `autoattack` ({attack['version']}) of its authors, which was found here",
        "pyautoattack": f"the package `pyautoattack` ({attack['version']}), a port: `autoattack` was not found here",
    }[attack["package"]]
    return f"FGSM, PGD-40, and {attack['name']} on the images that stood up to the two, by {whose}"


def _compared(summary: Data) -> str:
    """Differences in points on the same images."""
    body = []
    for row in summary["comparisons"]:
        low, high = 100 * row["low"], 100 * row["high"]
        higher = "higher" if row["difference"] > 0 else "lower"
        verdict = higher if row["corrected"] < SIGNIFICANT else "no significant difference"
        body.append(
            [
                *(_code(row["model"]), row["column"], f"{100 * row['difference']:+.1f} ({low:+.1f} to {high:+.1f})"),
                *(str(row["more"]), str(row["fewer"]), figure(row["p"]), figure(row["corrected"]), verdict),
            ]
        )
    titles = ["model", "accuracy", "difference in points", "only this one right", "only the first right"]
    text = (
        "Image by image, on the same images. The interval of the difference is Bonett and Price's for paired shares, "
        "at 95 %; p is of McNemar's exact test, two-sided, and in the next column corrected by Holm's rule over this "
        "table."
    )
    return f"{text}\n\n{table([*titles, 'p', 'p, corrected', 'verdict'], body)}"


def _attacks(model: Data, *, unfolded: bool) -> str:
    def percent(flags: list[bool]) -> str:
        return f"{100 * sum(flags) / len(flags):.1f}"

    body = [
        [norm, radius_words(norm, row["eps"]), *(percent(row[name]) for name in ("fgsm", "pgd", "worst"))]
        for norm, rows in model["robust"].items()
        for row in rows
    ]
    found = table(["norm", "radius", "FGSM %", "PGD-40 %", "worst case %"], body)
    return found if unfolded else folded(f"Accuracy of {model['model']} under each attack", found)


def _constants(model: Data) -> str:
    found = model["measured"]
    parts = [f"### {_code(model['model'])}"]
    whole = [row for row in found if row["constant"] is not None]
    if whole:
        parts.append(
            f"At {len(whole)} image{'s' if len(whole) > 1 else ''}, in float64. The Jacobian of the logits with "
            f"respect to the pixels, in the l2 norm, has a norm of "
            f"{figure(median(row['constant'] for row in whole))} (median; "
            "probable upper bound by Lanczos, fails with probability at most 1e-9 per image), and "
            f"{figure(median(row['reached'] for row in whole))} is reached (lower)."
        )
    parts += [*dict.fromkeys(f"Refused: {reason}" for row in found for reason in row["refused"])]
    with_layers = [row for row in found if row["layers"]]
    if not with_layers:
        parts.append("No attention block was measured.")
        return "\n\n".join(parts)
    body = []
    for index, layer in enumerate(with_layers[0]["layers"]):
        layers = [row["layers"][index] for row in with_layers]
        row = [str(index), f"`{layer['module']}`"]
        row += [figure(median(each[key][0] for each in layers)) for key in ("constant", *BOUNDS)]
        body.append(row + [figure(mean(each[key] for each in layers)) for key in ("g_1_mean", "g_1_largest")])
    titles = ["layer", "module", "constant (probable)", *(f"{name} (proved)" for name in BOUNDS)]
    parts.append(
        "Attention blocks: medians over images; g_1 as means, of all rows and of the largest row of each head."
    )
    parts.append(table([*titles, "g_1", "g_1, largest row"], body))
    return "\n\n".join(parts)


def draw(summary: Data, data: Data, folder: Path, name: str) -> list[Path]:
    """Robust accuracy of each model against the radius with its intervals, as PNG and SVG.

    Args:
        summary: what `bench.robustness.classifier_summary.summarised` returned.
        data: what it is of.
        folder: where the files go.
        name: of the files, without suffix.
    """
    norms = data["profile"]["eps"]
    with mpl.rc_context(STYLE):
        canvas, panels = plt.subplots(1, len(norms), figsize=(5.2 * len(norms), 4.2), dpi=150, squeeze=False)
        for axes, (norm, radii) in zip(panels[0], norms.items(), strict=True):
            for index, model in enumerate(summary["models"]):
                # A little apart, so that intervals do not hide each other.
                shift = 0.012 * max(radii) * (index - (len(summary["models"]) - 1) / 2)
                found = [
                    model["accuracies"][column] for column in ("clean", *(column_name(norm, eps) for eps in radii))
                ]
                axes.errorbar(
                    [eps + shift for eps in (0.0, *radii)],
                    [100 * row["share"] for row in found],
                    yerr=[
                        [100 * (row["share"] - row["low"]) for row in found],
                        [100 * (row["high"] - row["share"]) for row in found],
                    ],
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4,
                    capsize=2,
                    linewidth=1.2,
                    label=model["model"].replace("$", r"\$"),
                )
            axes.set_xlabel(f"radius, {NORM_TITLES[norm]}, pixels in [0, 1]")
            axes.set_ylabel("robust accuracy, %")
            axes.set_ylim(-3, 103)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].legend(fontsize=8, frameon=False)
        panels[0][0].set_title(f"{counted(len(data['names']), 'image')}, 95 % intervals", loc="left", fontsize=10)
        arrange(canvas)
        paths = save(canvas, folder, name)
        plt.close(canvas)
    return paths
