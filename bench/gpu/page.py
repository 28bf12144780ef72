"""The page of what a machine found: a table for each part, what was skipped and why."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from bench.gpu.measurements import Measurement
from bench.pages.formatting import table


def page(
    measurements: Sequence[Measurement], found: dict[tuple[str, str], dict[str, Any]], here: dict[str, Any]
) -> str:
    """In Markdown.

    Args:
        measurements: in their order.
        found: results by part and name.
        here: the place they belong to.
    """
    lines = [
        f"# Measured on {here['hardware']}",
        "",
        *(() if here["device"] == "cuda" else (DRY_RUN, "")),
        f"torch {here['torch']}, CUDA {here['cuda']}, Python {here['python']}, code {here['code']}"
        + ("; small sizes, which show that everything runs and nothing else." if here["quick"] else "."),
        "",
        "Times are those between CUDA events, in turns with the baseline: median and quartiles. Memory is what torch "
        "allocates beyond what was there."
        if here["device"] == "cuda"
        else "Times are processor times of all threads, in turns with the baseline: median and quartiles. Memory is "
        "how far the resident set rose.",
    ]
    for part in dict.fromkeys(measurement.part for measurement in measurements):
        known = [
            (measurement, found.get((part, measurement.name)))
            for measurement in measurements
            if measurement.part == part
        ]
        rows = _by_setting(known) if part == ROBUST else [_row(measurement, result) for measurement, result in known]
        lines += ["", f"## {part.capitalize()}", "", table(HEADS[part], rows)]
    return "\n".join(lines) + "\n"


DRY_RUN = (
    "**Not run on a GPU.** A dry run, which shows that every step runs to its end or says why it is skipped; nothing "
    "on this page says how fast, how large or how exact anything is on a GPU."
)
ROBUST = "robust training"
NOT_TOLD = ("part", "name", "place", "passed", "seconds_in_all")
ATTACKED = ("clean", "fgsm", "pgd", "autoattack")
HEADS = {
    "checks": ["check", "result"],
    "speed": ["bound and block", "cost in forward passes", "seconds", "MB, forward pass"],
    "long maps": ["function", "cost in fused attention", "seconds", "MB", "TFLOP/s"],
    ROBUST: ["training", "seeds", "clean", "FGSM", "PGD-40", "AutoAttack", "local constant of the logits, l2"],
    "tightness": ["model", "blocks", "bound by the lower bound of Lanczos: median (largest), at a point, float64"],
}


def _row(measurement: Measurement, result: dict[str, Any] | None) -> list[str]:
    rest = [""] * (len(HEADS[measurement.part]) - 2)
    if result is None:
        return [measurement.name, "not reached", *rest]
    reason = result.get("skipped") or result.get("error")
    if reason:
        return [measurement.name, f"{'skipped' if 'skipped' in result else 'failed'}: {reason}", *rest]
    return [measurement.name, *CELLS[measurement.part](result)]


def _by_setting(measurements: Sequence[tuple[Measurement, dict[str, Any] | None]]) -> list[list[str]]:
    """A row for each setting: means over the seeds that are there, with the smallest and the largest value."""
    rows = []
    for title in dict.fromkeys(measurement.name.rpartition(", seed")[0] for measurement, _ in measurements):
        results = [result for measurement, result in measurements if measurement.name.rpartition(", seed")[0] == title]
        made = [result for result in results if result is not None and "clean" in result]
        lacking = [result for result in results if result is not None and "clean" not in result]
        reasons = {str(result.get("skipped") or result.get("error")) for result in lacking}
        told = "; ".join([f"{len(made)} of {len(results)}", *sorted(reasons)])
        cells = [_mean_of([result[name] for result in made]) for name in (*ATTACKED, "constant")] if made else [""] * 5
        rows.append([title, told, *cells])
    return rows


def _mean_of(values: Sequence[float]) -> str:
    return f"{mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def _check(result: dict[str, Any]) -> list[str]:
    numbers = {name: value for name, value in result.items() if name not in NOT_TOLD}
    told = [
        f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}" for name, value in numbers.items()
    ]
    return [("passed" if result["passed"] else "**failed**") + f" ({', '.join(told)})"]


def _spread(values: Sequence[float]) -> str:
    low, middle, high = values
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def _cost(result: dict[str, Any]) -> list[str]:
    found = [result.get(name) for name in ("megabytes", "baseline_megabytes")]
    memory = ["?" if each is None else f"{each:.0f}" for each in found]
    return [_spread(result["ratio"]), _spread(result["cost"]), ", ".join(memory)]


def _long(result: dict[str, Any]) -> list[str]:
    ratio, seconds, memory = _cost(result)
    return [ratio, seconds, memory.partition(",")[0], f"{result['teraflops']:.3g}"]


def _tight(result: dict[str, Any]) -> list[str]:
    ratios = result["ratios"].items()
    return [str(result["blocks"]), ", ".join(f"{name} {median(all_):.4g} ({max(all_):.4g})" for name, all_ in ratios)]


CELLS = {"checks": _check, "speed": _cost, "long maps": _long, "tightness": _tight}
