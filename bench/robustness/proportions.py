"""What images say of accuracies: exact intervals of one model, and paired comparisons of two on the same images.

All of it counts the images as drawn at random and independently of each other, and says nothing about training again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special  # scipy.stats takes seconds to import

from bench.robustness.statistics import LEVEL


def clopper_pearson(right: int, count: int) -> tuple[float, float]:
    """The interval of a share that covers the truth with a probability of at least 95 % (Clopper and Pearson 1934).

    Args:
        right: images that are right.
        count: of all images.
    """
    tail = (1 - LEVEL) / 2
    low = float(special.betaincinv(right, count - right + 1, tail)) if right > 0 else 0.0
    high = float(special.betaincinv(right + 1, count - right, 1 - tail)) if right < count else 1.0
    return low, high


def discordant(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    """How many images only the first model has right, and how many only the second.

    Args:
        ours: for each image, whether the first model is right.
        theirs: of the same images in the same order.
    """
    both = list(zip(ours, theirs, strict=True))
    return sum(one and not other for one, other in both), sum(other and not one for one, other in both)


def mcnemar(more: int, fewer: int) -> float:
    """p of the exact two-sided test that images that only one model has right are as often of either (McNemar 1947).

    Args:
        more: images that only the first model has right.
        fewer: images that only the second has right.
    """
    return min(1.0, 2 * float(special.bdtr(min(more, fewer), more + fewer, 0.5)))


def difference(more: int, fewer: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a difference of paired shares by Bonett and Price 2012: Wald's with one image added to each.

    Args:
        more: images that only the first model has right.
        fewer: images that only the second has right.
        count: of all images.
    """
    one, other = (more + 1) / (count + 2), (fewer + 1) / (count + 2)
    centre = one - other
    half = float(special.ndtri((1 + LEVEL) / 2)) * math.sqrt((one + other - centre**2) / (count + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)
