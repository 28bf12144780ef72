"""Tables and figure of the task `certified`, from its data alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl


mpl.use("Agg")

import matplotlib.pyplot as plt

from bench.pages.figure_files import arrange, save
from bench.pages.formatting import figure, table
from bench.pages.log_axes import log_scale
from bench.pages.page import folded, page


Data = dict[str, Any]
TITLES = {"lipschitz-vit": "ViT made to be certified", "digits-vit": "ViT trained as usual"}


def report(data: Data, command: str, environment: str) -> str:
    """The page of results.

    Args:
        data: what `bench.certified.task.run` returned.
        command: that made it.
        environment: of this run, in a line.
    """
    parts = [
        "# Certified radii, and bounds of whole models",
        "![Certified and robust accuracy over the radius](certified.png)",
        "Certified accuracy: the share of test images that are classified right and for which it is proved that no "
        "image within the radius (Euclidean norm of the pixels) has another class. Robust accuracy: the share that "
        "AutoAttack-standard (l2) leaves right on the images that were attacked. Proved numbers are below the truth, "
        "what an attack leaves is above it.",
        *([_headline(data["models"])] if data["models"] else []),
        f"Made by `{command}`; nothing here is written by hand.",
    ]
    parts += [part for name, model in data["models"].items() for part in _classifier(name, model)]
    parts += ["## Whole models at a point", *_whole(data["whole"])]
    parts += [folded(f"{name}, layer by layer", _layers(row)) for name, row in data["whole"].items()]
    return page([*parts, "## Environment", f"- {environment}"])


def _headline(models: Data) -> str:
    body = []
    for name, model in models.items():
        rows = model["certificates"]
        radii = [row["radius"] for row in rows if row["correct"]]
        products = [row["product_radius"] for row in rows if row["correct"]]
        shown = [figure(median(values)) if values else "-" for values in (radii, products)]
        body.append([f"{TITLES.get(name, name)} (`{name}`)", len(rows), len(radii), *shown])
    titles = ["classifier", "images", "classified right", "certified radius, median (proved)"]
    return table([*titles, "by the product of norms, median (proved)"], body)


def _classifier(name: str, model: Data) -> list[str]:
    rows, attacks = model["certificates"], model["attacks"]
    radii = [row["radius"] for row in rows if row["correct"]]
    products = [row["product_radius"] for row in rows if row["correct"]]
    body = [["0", figure(_share(rows, 0.0)), "-", len(rows), "-"]]
    for attacked in attacks:
        robust, radius = attacked["robust"], attacked["radius"]
        same = rows[: len(robust)]
        body.append([f"{radius:g}", figure(_share(same, radius)), figure(sum(robust) / len(robust)), len(same), ""])
    summary = (
        f"{len(rows)} images, {len(radii)} of them classified right. Certified radius of those: median "
        f"{figure(median(radii))}, smallest {figure(min(radii))}, largest {figure(max(radii))}; with the product of "
        f"norms instead of the joint Jacobian: median {figure(median(products))}. "
        f"Seconds per image for both together: median {figure(median(row['seconds'] for row in rows))}."
    )
    titles = ["radius", "certified accuracy", "robust accuracy (AutoAttack)", "images"]
    return [f"## {TITLES.get(name, name)} (`{name}`)", summary, table(titles, [row[:4] for row in body])]


def _share(rows: list[Data], radius: float) -> float:
    return sum(row["correct"] and row["radius"] >= radius for row in rows) / len(rows)


def _whole(models: Data) -> list[str]:
    rows = [
        [
            name,
            *(figure(row[key]) for key in ("bound", "joint", "constant", "lower")),
            *(figure(row["bound"] / row[key]) for key in ("constant", "lower")),
        ]
        for name, row in models.items()
    ]
    caption = (
        "Norm of the Jacobian of the whole model at one input: the product of the bounds of its layers, the joint "
        "Jacobian where it is small enough to be formed, the probable upper bound of Lanczos (fails with probability "
        "at most 1e-9) and the lower bound of Lanczos; the truth lies between the last two."
    )
    titles = ["model", "product (proved)", "joint (proved)", "constant (probable)", "reached (lower)"]
    titles += ["product / constant", "product / reached"]
    return [caption, table(titles, rows)]


def _layers(row: Data) -> str:
    body = [
        [
            f"`{layer['path']}`",
            layer["description"],
            figure(layer["bound"]),
            figure(layer["reached"]),
            figure(layer["bound"] / layer["reached"]) if layer["reached"] else "-",
            figure(layer["so_far"]),
        ]
        for layer in row["layers"]
    ]
    return table(["layer", "what", "bound (proved)", "reached (lower)", "ratio", "bound so far"], body)


def draw(data: Data, folder: Path) -> list[Path]:
    """Certified and robust accuracy against the radius, as PNG and SVG.

    Args:
        data: what `bench.certified.task.run` returned.
        folder: where the files go.
    """
    with mpl.rc_context({"svg.hashsalt": "certified", "svg.fonttype": "none", "font.size": 10}):
        canvas, panels = plt.subplots(1, len(data["models"]), figsize=(5.2 * len(data["models"]), 4), dpi=150)
        for axes, (name, model) in zip(
            [panels] if len(data["models"]) == 1 else panels, data["models"].items(), strict=True
        ):
            rows = model["certificates"]
            radii = sorted({row["radius"] for row in rows if row["radius"] > 0})
            shown = sorted([*radii, *(attack["radius"] for attack in model["attacks"] if attack["radius"] > 0)]) or [
                1.0
            ]
            decades = shown[-1] > 100 * shown[0]  # within two decades a straight axis is easier to read
            start = shown[0] / 3 if decades else 0.0
            edges = [start, *radii, *(radius * 1.0001 for radius in radii)]
            edges.sort()
            axes.plot(edges, [_share(rows, edge) for edge in edges], color="#0072B2", label="certified (proved)")
            attacked = [(a["radius"], sum(a["robust"]) / len(a["robust"])) for a in model["attacks"]]
            if attacked:
                axes.plot(*zip(*attacked, strict=True), color="#D55E00", marker="o", label="AutoAttack leaves")
            if decades:
                log_scale(axes.xaxis)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel("radius, l2 norm of the pixels")
            axes.set_title(f"{TITLES.get(name, name)}\n{len(rows)} images", loc="left", fontsize=10)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="lower left", fontsize=8, frameon=False)
            axes.set_ylabel("accuracy")
        arrange(canvas)
        paths = save(canvas, folder, "certified")
        plt.close(canvas)
    return paths
