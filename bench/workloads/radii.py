"""The radii of balls and sets, chosen relative to the size of the input, so that they mean the same on every model."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.claims import Scope
from lipbounds.targets.attention import Attention


RELATIVE = (0.01, 0.1, 1.0)
DIGITS = 6  # radii are rounded, so that a value does not hang on the last bit of a norm
# What a radius is a multiple of: in the key of a record, for norms of activations differ by rounding between machines.
ONE, MEDIAN, LARGEST = "one", "median token norm", "largest token norm"
INPUTS = 4  # of each model, its first ones: a bound on a set costs more than one at the point, and for each radius
SEARCHED_INPUTS = 1  # likewise, for estimators that search the set
ROUNDING = 1e-5  # twice what rounding to so many digits can take off, relative


@dc.dataclass(frozen=True)
class Radius:
    """A radius in the l2 norm.

    Args:
        value: what the bound is given.
        relative: the same in units of the median token norm (a ball) or of the largest one (a compact set).
    """

    value: float
    relative: float


@dc.dataclass(frozen=True)
class Multiple:
    """A radius as it is asked for: the same on every machine, and known before the block is.

    Args:
        count: of the unit.
        unit: `ONE`, `MEDIAN` or `LARGEST`.
    """

    count: float
    unit: str = MEDIAN

    def at(self, block: Attention) -> Radius:
        """The radius at a block.

        Args:
            block: without batch dimensions.
        """
        norms = block.moving_input.detach().double().norm(dim=-1)
        if self.unit == LARGEST:
            return Radius(_rounded(self.count * norms.max().item() * (1 + ROUNDING)), self.count)
        median = norms.median().item()
        if self.unit == MEDIAN:
            return Radius(_rounded(self.count * median), self.count)
        return Radius(self.count, _rounded(self.count / median) if median else 0.0)


def multiples(scope: Scope) -> list[Multiple | None]:
    """The radii that bounds of that scope are evaluated at; one None for a scope that has none.

    Balls have 0.01, 0.1 and 1 times the median norm of the tokens of the moving input. A compact set has the largest
    norm, rounded up: it is the smallest set of its kind that holds the input, so the norm of the Jacobian there is a
    lower bound of the constant on the set.

    Args:
        scope: of the bound.
    """
    if scope == "compact":
        return [Multiple(1.0, LARGEST)]
    return [Multiple(count) for count in RELATIVE] if scope in ("ball", "change") else [None]


def radii(block: Attention, scope: Scope) -> list[Radius | None]:
    """`multiples` at a block.

    Args:
        block: without batch dimensions.
        scope: of the bound.
    """
    return [None if found is None else found.at(block) for found in multiples(scope)]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
