"""The page and the figure of a classifier that was given, from its data alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, table
from bench.robustness.figures import COLOURS, MARKERS, NORM_TITLES, STYLE
from bench.robustness.measures import BOUNDS


Data = dict[str, Any]


def report(data: Data, command: str, picture: str) -> str:
    """The page.

    Args:
        data: what `bench.robustness.classifier_task.run` returned.
        command: that made it.
        picture: the file name of the figure.
    """
    shape = " x ".join(map(str, data["shape"]))
    parts = [
        f"# Robust accuracy of `{data['model'].replace('`', '')}`",
        f"Made by `{command.replace('`', '')}`; nothing here is written by hand. What is done, and why: "
        "docs/robustness.md.",
        f"{data['images']} of {data['available']} images ({shape}, pixels in [0, 1]), {data['classes']} classes, on "
        f"{data['device']}; clean accuracy {100 * data['clean']:.1f} %.",
        "Robust accuracy: the share of the images that are classified right and that no attack changed: FGSM, PGD-40, "
        "and AutoAttack-standard on those that stood up to the two, of that norm with that radius or a smaller one. It "
        "is an upper bound of the truth: a better attack could leave less.",
        _attacks(data),
        f"![Robust accuracy against the radius]({picture})",
        "## Local constants",
        _constants(data),
        "## Environment",
        "\n".join(f"- {line}" for line in data["environments"]),
    ]
    return "\n\n".join(parts) + "\n"


def _attacks(data: Data) -> str:
    body = [
        [norm, f"{row['eps']:.4g}", *(f"{100 * row[name]:.1f}" for name in ("fgsm", "pgd", "worst"))]
        for norm, rows in data["robust"].items()
        for row in rows
    ]
    return table(["norm", "radius", "FGSM %", "PGD-40 %", "worst case %"], body)


def _constants(data: Data) -> str:
    found = data["measured"]
    whole = (
        f"At {len(found)} image{'s' if len(found) > 1 else ''}, in float64. The Jacobian of the logits with respect to "
        f"the pixels has a norm of {figure(median(row['constant'] for row in found))} (median; probable upper bound by "
        "Lanczos, fails with probability at most 1e-9 an image), and "
        f"{figure(median(row['reached'] for row in found))} is reached (lower)."
    )
    if not found[0]["layers"]:
        return f"{whole}\n\nNo attention block was found."
    body = []
    for index, layer in enumerate(found[0]["layers"]):
        layers = [row["layers"][index] for row in found]
        row = [str(index), f"`{layer['module']}`"]
        row += [figure(median(each[key][0] for each in layers)) for key in ("constant", *BOUNDS)]
        body.append(row + [figure(mean(each[key] for each in layers)) for key in ("g_1_mean", "g_1_largest")])
    titles = ["layer", "module", "constant (probable)", *(f"{name} (proved)" for name in BOUNDS)]
    caption = "Attention blocks: medians over images; g_1 as means, of all rows and of the largest row of each head."
    return f"{whole}\n\n{caption}\n\n{table([*titles, 'g_1', 'g_1, largest row'], body)}"


def draw(data: Data, folder: Path, name: str) -> list[Path]:
    """Robust accuracy against the radius, as PNG and SVG.

    Args:
        data: what `bench.robustness.classifier_task.run` returned.
        folder: where the files go.
        name: of the files, without suffix.
    """
    with mpl.rc_context(STYLE):
        canvas, panels = plt.subplots(
            1, len(data["robust"]), figsize=(5.2 * len(data["robust"]), 4.2), dpi=150, squeeze=False
        )
        for axes, (norm, rows) in zip(panels[0], data["robust"].items(), strict=True):
            for index, (key, title) in enumerate({"fgsm": "FGSM", "pgd": "PGD-40", "worst": "worst case"}.items()):
                axes.plot(
                    [0.0, *(row["eps"] for row in rows)],
                    [100 * data["clean"], *(100 * row[key] for row in rows)],
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    label=title,
                )
            axes.set_xlabel(f"radius, {NORM_TITLES[norm]}")
            axes.set_ylabel("accuracy, %")
            axes.set_ylim(-3, 103)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0][0].legend(fontsize=8, frameon=False)
        arrange(canvas)
        paths = save(canvas, folder, name)
        plt.close(canvas)
    return paths
