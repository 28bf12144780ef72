"""Tables of the task `certified`, from its data alone."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from bench.certified.shares import METHODS, certified, in_norm, left_by_smallest, share_of
from bench.pages.formatting import figure, table
from bench.pages.page import folded, page
from lipbounds.number_format import counted


Data = dict[str, Any]
TITLES = {
    "certified-vit": "ViT trained to be certified, against an attack",
    "lipschitz-vit": "ViT made to be certified",
    "digits-vit": "ViT trained as usual",
    "certified-mnist-vit": "ViT on MNIST trained to be certified, against an attack",
    "mnist-vit": "ViT on MNIST with radii published by DeepT",
    "mnist-vit-3": "ViT on MNIST with three layers",
}


WRITTEN = {part / 255: f"{part}/255" for part in (36, 72, 108)}  # radii that are usual for MNIST in l2


def report(data: Data, command: str, environment: str) -> str:
    """The page of results.

    Args:
        data: what `bench.certified.task.shown` returned.
        command: that made it.
        environment: of this run, in a line.
    """
    more = " --deept DIR" if any(model["published"] for model in data["models"].values()) else ""
    parts = [
        "# Certified radii, and bounds of whole models",
        "![Certified and robust accuracy over the radius](certified.png)",
        "Certified accuracy: the share of test images that are classified right and for which it is proved that no "
        "image within the radius (Euclidean norm of the pixels) has another class. Robust accuracy: the share that an "
        "attack leaves right: AutoAttack-standard in l2 at that radius, or FAB and APGD, which look for the nearest "
        "image of another class. Proved numbers are below the truth, what an attack leaves is above it. In every "
        "certified ball a short attack was tried as well; a radius that an attack refutes is an error of the run.",
        *([_headline(data["models"])] if data["models"] else []),
        f"Made by `{command}{more}`; nothing here is written by hand. Every radius: "
        "[certified_instances.csv](certified_instances.csv).",
    ]
    parts += [part for name, model in data["models"].items() for part in _classifier(name, model)]
    parts += ["## Whole models at a point", *_whole(data["whole"])]
    parts += [folded(f"{name}, layer by layer", _layers(row)) for name, row in data["whole"].items()]
    return page([*parts, "## Environment", f"- {environment}"])


def _headline(models: Data) -> str:
    body = []
    for name, model in models.items():
        first = max((certified(model, method) for method in METHODS), key=len)
        shown = [_median(certified(model, method)) for method in METHODS]
        nearest = [one for one in _distances(model) if one > 0]
        found = figure(median(nearest)) if nearest else "-"
        right = sum(row["correct"] for row in first)
        body.append([f"{TITLES.get(name, name)} (`{name}`)", len(first), right, *shown, found])
    titles = [
        "classifier",
        "images",
        "classified right",
        *(f"{method}, median (proved), of how many" for method in METHODS),
    ]
    return table([*titles, "nearest other class found, median (attack)"], body)


def _median(rows: list[Data]) -> str:
    radii = [row["radius"] for row in rows if row["correct"]]
    return f"{figure(median(radii))} ({len(radii)})" if radii else "-"


def _distances(model: Data) -> list[float]:
    return [value for one in model["smallest"] for value in one["distances"] if value is not None]


def _classifier(name: str, model: Data) -> list[str]:
    quoted = list(WRITTEN) if "mnist" in name else []
    parts = [f"## {TITLES.get(name, name)} (`{name}`)", _methods(model), _accuracy(model, quoted)]
    parts += [part for norm in ("l_inf", "l1") if (part := _other_norm(model, norm))]
    if model["smoothing"]:
        parts += [_smoothing(model["smoothing"])]
    return parts


def _methods(model: Data) -> str:
    """Radii of the images that are classified right, by method."""
    body = []
    for method in METHODS:
        rows = certified(model, method)
        radii = [row["radius"] for row in rows if row["correct"]]
        if radii:
            seconds = median(row["seconds"] for row in rows)
            numbers = (mean(radii), median(radii), min(radii), max(radii), seconds)
            body.append([method, "proved", len(radii), *map(figure, numbers)])
    for row in in_norm(model["published"], "l2"):
        numbers = (row[key] for key in ("mean", "median", "smallest", "largest", "seconds"))
        body.append([f"DeepT ({row['source']})", "published", row["images"], *map(figure, numbers)])
    nearest = [one for one in _distances(model) if one > 0]
    if nearest:
        numbers = (mean(nearest), median(nearest), min(nearest), max(nearest))
        body.append(["FAB and APGD: another class is there", "attack", len(nearest), *map(figure, numbers), "-"])
    titles = ["radius by", "kind", "images", "mean", "median", "smallest", "largest", "seconds per image"]
    note = "\n\nThe published radii are of other random images of the same test set, on a GPU."
    return table(titles, body) + (note if model["published"] else "")


def _other_norm(model: Data, norm: str) -> str:
    """Radii in the maximum norm or in the sum norm beside the published ones; nothing if there are none."""
    rows = in_norm([row for row in model["certificates"] if row["method"] == "taylor"], norm)
    radii = [row["radius"] for row in rows if row["correct"]]
    if not radii:
        return ""
    numbers = (mean(radii), median(radii), min(radii), max(radii), median(row["seconds"] for row in rows))
    body = [["taylor", "proved", len(radii), *map(figure, numbers)]]
    for row in in_norm(model["published"], norm):
        numbers = (row[key] for key in ("mean", "median", "smallest", "largest", "seconds"))
        body.append([f"DeepT ({row['source']})", "published", row["images"], *map(figure, numbers)])
    name = {"l_inf": "maximum norm (l_inf)", "l1": "sum norm (l1)"}[norm]
    titles = [f"radius in the {name} by", "kind", "images", "mean", "median", "smallest", "largest"]
    return table([*titles, "seconds per image"], body)


def _accuracy(model: Data, quoted: list[float]) -> str:
    """Shares of the images at the radii of the attacks, and at some more.

    Args:
        model: of the data of the page.
        quoted: more radii.
    """
    methods = [method for method in METHODS if certified(model, method)]
    counts = {method: len(certified(model, method)) for method in methods}
    titles = ["radius", *(f"certified, {method}, {counted(counts[method], 'image')}" for method in methods)]
    attacked = {attack["radius"]: attack for attack in model["attacks"]}
    body = []
    for radius in sorted({0.0, *attacked, *quoted}):
        shares = [figure(share_of(certified(model, method), radius)) for method in methods]
        robust = attacked[radius]["robust"] if radius in attacked else []
        left = left_by_smallest(model, radius)
        written = WRITTEN.get(radius, f"{radius:.3g}")
        body.append([written, *shares, figure(sum(robust) / len(robust)) if robust else "-", figure(left)])
    images = max((len(attack["robust"]) for attack in model["attacks"]), default=0)
    return table([*titles, f"AutoAttack leaves, {counted(images, 'image')}", "FAB and APGD leave"], body)


def _smoothing(rows: list[Data]) -> str:
    kept = [row["radius"] for row in rows if row["correct"]]
    first = rows[0]
    numbers = f"median {figure(median(kept))}, largest {figure(max(kept))}" if kept else "none"
    return (
        f"Smoothing, probable and about another classifier (this one under noise of standard deviation "
        f"{first['sigma']:g}), so not to be compared with the proved radii: {len(kept)} of "
        f"{counted(len(rows), 'image')} {'keeps its' if len(kept) == 1 else 'keep their'} class; "
        f"radius of those: {numbers}. Each is wrong with probability at most {first['delta']:g}, from "
        f"{first['samples']:,} draws; "
        f"{figure(median(row['seconds'] for row in rows))} seconds per image."
    )


def _whole(models: Data) -> list[str]:
    rows = [
        [
            name,
            *(figure(row[key]) for key in ("bound", "joint", "formed", "constant", "lower")),
            *(figure(row["bound"] / row[key]) for key in ("constant", "lower")),
        ]
        for name, row in models.items()
    ]
    caption = (
        "Norm of the Jacobian of the whole model at one input: the product of the bounds of its layers; the Jacobian "
        "formed as a matrix, with all rounding (`lipbounds.compose.constant`), where the network is small enough; "
        "the norm of its rows as float64 computes them, one product with the transposed Jacobian for each output "
        "(`lipbounds.estimators.formed`: proved of these floats, the arithmetic of the model counts as exact); the "
        "probable upper bound of Lanczos (fails with probability at most 1e-9) and the lower bound of Lanczos. The "
        "truth lies between the last two."
    )
    titles = ["model", "product (proved)", "Jacobian (proved)", "rows in float64 (proved of the floats)"]
    titles += ["constant (probable)", "reached (lower)"]
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
