"""The page of the task `robustness`, from its data alone."""

from __future__ import annotations

import math
from statistics import mean, median
from typing import Any

from bench.pages.formatting import figure, table
from bench.pages.page import bullets, folded, page
from bench.robustness.measures import BOUNDS
from bench.robustness.settings import (
    CHOICE_EPS,
    CHOICE_SEED,
    CHOICE_STEPS,
    reference_of,
)
from bench.robustness.summary import CONSTANTS, WEAK, measure_name, verdict
from bench.robustness.weights import weights_section
from lipbounds.number_format import counted


Data = dict[str, Any]
WHOLE = "AutoAttack-standard"
LEGEND = (
    "Robust accuracy: the share of the test images that are classified right and that no attack changed: {attacks}, "
    "all of that norm with that radius or a smaller one. It is "
    "an upper bound of the truth: a better attack could leave less. Mean over seeds ± half the width of the 95 % "
    "interval by Student's t. The constant of the network is the spectral norm of the Jacobian of the logits with "
    "respect to the pixels, median over the images; that of attention is the one of a block (probable upper bound by "
    "Lanczos, fails with probability at most 1e-9), median over images, mean over layers; g_1 is the mean over images, "
    "heads, rows and layers."
)


def report(data: Data, summary: Data, command: str, name: str) -> str:
    """The page of results.

    Args:
        data: what `bench.robustness.task.run` returned.
        summary: what `bench.robustness.summary.summarised` made of it.
        command: that made it.
        name: of the page and of its figures.
    """
    count, about = len(data["seeds"]), data["study"]["about"] if "study" in data else "Digits ViTs"
    made = (
        f"{about}, {counted(data['epochs'], 'epoch')}, {counted(count, 'seed')} per setting, the first "
        f"{counted(data['images'], 'test image')} (blocks: the first {data['blocks']}), pixels in [0, 1]."
    )
    if "tuning_epochs" in data:
        made += (
            f" Fine-tuned: {counted(data['tuning_epochs'], 'more epoch')} from the baseline of the same seed, with "
            "what the setting adds; the control adds nothing."
        )
    parts = [
        "# Robust accuracy with and without penalties",
        f"![Robust accuracy over the radius]({name}.png)",
        _headline(data, summary),
        _findings(data, summary),
        "Higher and lower are significant at 5 % after Holm's correction over all tests of the same table. The "
        "intervals are not corrected: one that leaves out zero (for factors, one) may stand beside "
        "`no significant difference`.",
        made,
        LEGEND.format(attacks=_attacks_named(data)),
        f"Made by `{command}`; nothing here is written by hand. What is done, and why: [docs](../docs/robustness.md).",
        "## Compared with the reference",
        "Paired t-tests over seeds, two-sided; p is corrected by Holm's rule over all tests of its table. "
        "Wilcoxon's test, which with five seeds cannot fall below 0.06, is not used. Accuracies differ by points, "
        "constants by factors.",
        _accuracy_changes(data, summary),
        _constant_changes(data, summary),
        f"![Robust accuracy against the local constant]({name}_constants.png)",
        f"![g_1 of the rows by layer]({name}_g1.png)",
        *weights_section(data, summary, name),
        *_rest_section(data),
        *_choice_section(data),
        "## By attack",
        folded("Accuracy under each attack", _attacks(data, summary)),
        "## By layer",
        folded("Constants and g_1 by layer", _layers(data)),
        "## Environment",
        bullets(data["environments"]),
    ]
    return page(parts)


def _attacks_named(data: Data) -> str:
    last = data.get("attack", WHOLE)
    return f"FGSM, PGD-40, and {last} on the images that stood up to those two" if last else "FGSM and PGD-40 alone"


def _radii(data: Data) -> list[tuple[str, float]]:
    model = next(iter(data["settings"].values()))["models"][0]
    return [(norm, row["eps"]) for norm, rows in model["robust"].items() for row in rows]


def _headline(data: Data, summary: Data) -> str:
    titles = ["setting", "clean %", *(f"{norm} {eps:g} %" for norm, eps in _radii(data))]
    titles += ["constant, network", "constant, attention", "g_1"]
    measures = ["clean", *(measure_name(norm, eps) for norm, eps in _radii(data))]
    body = []
    for name, setting in data["settings"].items():
        found = summary["intervals"][name]
        body.append([setting["title"]])
        body[-1] += [_with_half(found[measure], 100, 1) for measure in measures]
        body[-1] += [_with_half(found[measure], 1, 3 if measure == "g_1" else 2) for measure in CONSTANTS]
    return table(titles, body)


def _with_half(found: Data, factor: float, digits: int) -> str:
    middle = f"{factor * found['mean']:.{digits}f}"
    return middle if found["half"] is None else f"{middle} ± {factor * found['half']:.{digits}f}"


def _findings(data: Data, summary: Data) -> str:
    """For each comparison of two settings, what is significant, in words; how much it is stands in the tables."""
    pairs = dict.fromkeys((row["setting"], row["reference"]) for row in summary["comparisons"])
    lines = []
    for name, reference in pairs:
        rows = [row for row in summary["comparisons"] if (row["setting"], row["reference"]) == (name, reference)]
        robust = [row for row in rows if row["family"] == "accuracies" and row["measure"] != "clean"]
        constant = [row for row in rows if row["family"] == "constants"]
        clean = [row for row in rows if row["measure"] == "clean"]
        title, other = data["settings"][name]["title"], data["settings"][reference]["title"]
        parts = [
            f"clean accuracy {_said(clean)}",
            f"robust accuracy {_said(robust)}",
            f"local constants and g_1 {_said(constant)}",
        ]
        lines.append(f"- **{title}** compared with {other}: {'; '.join(parts)}.")
    return "\n".join(lines)


def _said(rows: list[Data]) -> str:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(verdict(row), []).append(_measured(row["measure"]))
    if len(groups) == 1:
        return next(iter(groups))
    return ", ".join(f"{what} ({', '.join(names)})" for what, names in groups.items())


def _measured(measure: str) -> str:
    return CONSTANTS.get(measure, measure.removesuffix(" worst").replace(f" {WEAK}", " under weak PGD"))


def change(row: Data) -> str:
    """A difference in points or a factor, with its interval where there are seeds enough.

    Args:
        row: a comparison of the summary.
    """
    middle, half = row["mean"], row["half"]
    if row["family"] == "constants":
        ends = "" if half is None else f" [{figure(math.exp(middle - half))}, {figure(math.exp(middle + half))}]"
        return f"x {figure(math.exp(middle))}{ends}"
    ends = "" if half is None else f" [{100 * (middle - half):+.1f}, {100 * (middle + half):+.1f}]"
    return f"{100 * middle:+.1f}{ends}"


def _accuracy_changes(data: Data, summary: Data) -> str:
    measures = {"clean": "clean, points"}
    for norm, eps in _radii(data):
        measures[measure_name(norm, eps)] = f"{norm} {eps:g}, points"
        if "weak_steps" in data:
            measures[measure_name(norm, eps, WEAK)] = f"{norm} {eps:g} under PGD-{data['weak_steps']}, points"
    return _changes(data, summary, measures)


def _constant_changes(data: Data, summary: Data) -> str:
    return _changes(data, summary, CONSTANTS)


def _changes(data: Data, summary: Data, measures: dict[str, str]) -> str:
    found = {(row["setting"], row["reference"], row["measure"]): row for row in summary["comparisons"]}
    body = []
    for name, reference in dict.fromkeys((name, reference) for name, reference, _ in found):
        cells = [found[name, reference, measure] for measure in measures]
        shown = [change(row) + ("" if row["p"] is None else f", p = {row['corrected']:.2g}") for row in cells]
        body.append([data["settings"][name]["title"], data["settings"][reference]["title"], *shown])
    return table(["setting", "reference", *measures.values()], body) if body else ""


def _rest_section(data: Data) -> list[str]:
    """What all of AutoAttack leaves where a part of it attacks every model; nothing where all of it does."""
    if not data.get("standard_seeds"):
        return []
    body, changed = [], 0
    for setting in data["settings"].values():
        models = [model for model in setting["models"] if "standard" in model]
        if not models:
            continue
        for norm, rows in models[0]["standard"].items():
            for place, row in enumerate(rows):
                part = mean(model["robust"][norm][place]["worst"] for model in models)
                whole = mean(model["standard"][norm][place]["worst"] for model in models)
                changed += round(data["images"] * sum(m["robust"][norm][place]["worst"] for m in models)) - round(
                    data["images"] * sum(m["standard"][norm][place]["worst"] for m in models)
                )
                weak = [mean(model["weak"][norm][place] for model in models)] if "weak_steps" in data else []
                shown = [f"{100 * value:.1f}" for value in (*weak, part, whole)]
                body.append([setting["title"], len(models), norm, f"{row['eps']:g}", *shown])
    seeds = ", ".join(map(str, data["standard_seeds"]))
    weak = [f"PGD-{data['weak_steps']} %"] if "weak_steps" in data else []
    return [
        f"## {WHOLE}",
        f"All four of its attacks (APGD-CE, APGD-T, FAB-T and Square) on some of the models, of seeds {seeds}: means "
        f"over them. Of the images of these models and radii together, they change {changed} that the attacks above "
        "did not.",
        table(["setting", "models", "norm", "radius", *weak, "worst case above %", f"worst case with {WHOLE} %"], body),
    ]


def _choice_section(data: Data) -> list[str]:
    """Nothing where no weight was chosen."""
    choices = _choices(data)
    if not choices:
        return []
    return [
        "## How the weights were chosen",
        f"Validation images only, seed {CHOICE_SEED}, which is not among those reported: of the weights whose "
        "validation accuracy is at most one point below that of the reference setting, the one with the best accuracy "
        f"under PGD-{CHOICE_STEPS} (l_inf, {CHOICE_EPS:g}).",
        folded("Weights that were tried", choices),
    ]


def _choices(data: Data) -> str:
    body = []
    for name, setting in data["settings"].items():
        choice = setting["choice"]
        if not choice["rows"]:
            continue
        reference = data["settings"].get(reference_of(name), {"title": reference_of(name)})["title"]
        row = choice["reference"]
        body.append([f"{reference} (reference)", "-", f"{100 * row['clean']:.1f}", f"{100 * row['robust']:.1f}", ""])
        for row in choice["rows"]:
            taken = "chosen" if row["weight"] == choice["weight"] else ""
            shown = [f"{row['weight']:g}", f"{100 * row['clean']:.1f}", f"{100 * row['robust']:.1f}", taken]
            body.append([setting["title"], *shown])
    titles = ["setting", "weight", "clean, validation %", f"PGD-{CHOICE_STEPS}, validation %", ""]
    return table(titles, body) if body else ""


def _attacks(data: Data, summary: Data) -> str:
    weak = {WEAK: f"PGD-{data['weak_steps']} %"} if "weak_steps" in data else {}
    attacks = {"fgsm": "FGSM %", **weak, "pgd": "PGD-40 %", "worst": "worst case %"}
    body = []
    for name, setting in data["settings"].items():
        for norm, eps in _radii(data):
            found = [summary["intervals"][name][measure_name(norm, eps, attack)] for attack in attacks]
            body.append([setting["title"], norm, f"{eps:g}", *(_with_half(each, 100, 1) for each in found)])
    return table(["setting", "norm", "radius", *attacks.values()], body)


def _layers(data: Data) -> str:
    caption = "Means over seeds of medians over images; g_1 as means, of all rows and of the largest row of each head."
    body = []
    for setting in data["settings"].values():
        for index in range(len(setting["models"][0]["layers"])):
            layers = [model["layers"][index] for model in setting["models"]]
            row = [setting["title"], str(index)]
            row += [figure(mean(median(layer[key]) for layer in layers)) for key in ("constant", *BOUNDS)]
            row += [figure(mean(layer[key] for layer in layers)) for key in ("g_1_mean", "g_1_largest")]
            body.append(row)
    titles = ["setting", "layer", "constant (probable)", *(f"{name} (proved)" for name in BOUNDS)]
    return f"{caption}\n\n{table([*titles, 'g_1', 'g_1, largest row'], body)}"
