"""Which images hold out, and what several seeds say: intervals, paired tests, and the correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from scipy import special  # scipy.stats takes seconds to import


LEVEL = 0.95


def worst_case(clean: Sequence[bool], runs: Mapping[float, Sequence[Sequence[bool]]]) -> dict[float, list[bool]]:
    """For each radius, the images that are right as they are and after every attack of that radius or a smaller one.

    Args:
        clean: for each image, whether it is classified right.
        runs: for each radius of one norm, one list like `clean` for each attack.
    """
    standing, found = list(clean), {}
    for eps in sorted(runs):
        for run in runs[eps]:
            standing = [before and after for before, after in zip(standing, run, strict=True)]
        found[eps] = standing
    return found


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean with the half width of its 95 % interval by Student's t; no half width for a single value.

    Args:
        values: one for each seed.
    """
    if len(values) < 2:
        return {"mean": mean(values), "half": None}
    quantile = float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2))
    return {"mean": mean(values), "half": quantile * stdev(values) / math.sqrt(len(values))}


def paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, float | None]:
    """The mean difference, the half width of its 95 % interval, and p of the two-sided paired t-test that it is 0.

    Args:
        values: one for each seed.
        reference: of the same seeds in the same order.
    """
    differences = [value - base for value, base in zip(values, reference, strict=True)]
    found = interval(differences)
    if found["half"] is None:
        return {**found, "p": None}
    error = stdev(differences) / math.sqrt(len(differences))
    if error == 0:  # as the test has it in the limit
        return {**found, "p": 1.0 if differences[0] == 0 else 0.0}
    statistic = mean(differences) / error
    return {**found, "p": 2 * float(special.stdtr(len(differences) - 1, -abs(statistic)))}


def holm(values: Sequence[float]) -> list[float]:
    """The p values corrected by Holm's rule: below 5 % ones keep the chance of any false finding below 5 %.

    Args:
        values: the p values of one family of tests.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected
