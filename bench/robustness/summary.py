"""From the numbers of each model to what is said about each setting: intervals over seeds and paired comparisons.

Accuracies are compared by differences, in points; constants, bounds and g_1 by ratios, so their logarithms are.
Two families of tests, each corrected by Holm's rule as a whole: accuracies, and constants.
"""

from __future__ import annotations

import math
from statistics import mean, median
from typing import Any

from bench.robustness.settings import BASELINE, reference_of, starts_from
from bench.robustness.statistics import holm, interval, paired


Data = dict[str, Any]
SIGNIFICANT = 0.05
WEAK = "weak"  # PGD of few steps
COMPARED = (" worst", f" {WEAK}")  # ends of the accuracies that settings are compared in, beside the clean one
CONSTANTS = {
    "network": "local constant of the network",
    "blocks": "local constant of attention",
    "g_1": "mean g_1",
}


def summarised(data: Data) -> Data:
    """Intervals of every measure of every setting, and the comparisons.

    Args:
        data: what `bench.robustness.task.run` returned.
    """
    values = {
        name: [{**accuracies(model), **constants(model)} for model in setting["models"]]
        for name, setting in data["settings"].items()
    }
    intervals = {
        name: {measure: interval([model[measure] for model in models]) for measure in models[0]}
        for name, models in values.items()
    }
    return {"intervals": intervals, "comparisons": _comparisons(values)}


def accuracies(model: Data) -> dict[str, float]:
    """Clean accuracy, and accuracy under each attack and the worst of all, as shares.

    Args:
        model: one of the models of a setting.
    """
    found = {"clean": model["clean"]}
    for norm, rows in model["robust"].items():
        for row in rows:
            found |= {measure_name(norm, row["eps"], attack): row[attack] for attack in ("fgsm", "pgd", "worst")}
        for row, weak in zip(rows, model.get("weak", {}).get(norm, ()), strict=False):
            found[measure_name(norm, row["eps"], WEAK)] = weak
    return found


def measure_name(norm: str, eps: float, attack: str = "worst") -> str:
    """Such as "l2 0.5 worst"."""
    return f"{norm} {eps:g} {attack}"


def constants(model: Data) -> dict[str, float]:
    """The median over images of the constant of the network; of attention and g_1 the mean over layers.

    Args:
        model: one of the models of a setting.
    """
    return {
        "network": median(model["constants"]),
        "blocks": mean(median(layer["constant"]) for layer in model["layers"]),
        "g_1": mean(layer["g_1_mean"] for layer in model["layers"]),
    }


def _comparisons(values: dict[str, list[dict[str, float]]]) -> list[Data]:
    """Every setting with the baseline, and with its own reference where that is another.

    What trains a model on is compared with its own reference alone: more steps are no effect of what is added in them.
    """
    pairs = [
        (name, BASELINE)
        for name in values
        if name != BASELINE and not (starts_from(name) and reference_of(name) != BASELINE)
    ]
    own = [(name, reference_of(name)) for name in values]
    pairs += [pair for pair in own if pair[1] != BASELINE and pair[1] in values]
    rows = []
    for name, reference in pairs:
        for measure in values[name][0]:
            family = "constants" if measure in CONSTANTS else "accuracies"
            if family == "accuracies" and measure != "clean" and not measure.endswith(COMPARED):
                continue
            ours, theirs = ([_scaled(model[measure], family) for model in values[which]] for which in (name, reference))
            found = paired(ours, theirs)
            rows.append({"setting": name, "reference": reference, "measure": measure, "family": family, **found})
    for family in ("accuracies", "constants"):
        tested = [row for row in rows if row["family"] == family and row["p"] is not None]
        for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["corrected"] = corrected
    return rows


def _scaled(value: float, family: str) -> float:
    """Logarithms of constants: a setting multiplies them."""
    return value if family == "accuracies" else math.log(max(value, 1e-300))


def verdict(row: Data) -> str:
    """higher, lower, no significant difference, or not tested.

    Args:
        row: one of the comparisons.
    """
    if row["p"] is None:
        return "not tested"
    if row["corrected"] >= SIGNIFICANT:
        return "no significant difference"
    return "higher" if row["mean"] > 0 else "lower"
