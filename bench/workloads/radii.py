"""The radii of balls and sets, chosen relative to the size of the input, so that they mean the same on every model."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.claims import Scope
from lipbounds.targets.attention import Attention


RELATIVE = (0.01, 0.1, 1.0)
DIGITS = 6  # radii are rounded, so that the key of a record does not hang on the last bit of a norm
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


def radii(block: Attention, scope: Scope) -> list[Radius | None]:
    """The radii to evaluate bounds of that scope at; one None for a scope that has none.

    Balls have 0.01, 0.1 and 1 times the median norm of the tokens of the moving input. A compact set has the largest
    norm, rounded up: it is the smallest set of its kind that holds the input, so the norm of the Jacobian there is a
    lower bound of the constant on the set.

    Args:
        block: without batch dimensions.
        scope: of the bound.
    """
    norms = block.moving_input.detach().double().norm(dim=-1)
    if scope == "compact":
        return [Radius(_rounded(norms.max().item() * (1 + ROUNDING)), 1.0)]
    if scope in ("ball", "change"):
        return [Radius(_rounded(relative * norms.median().item()), relative) for relative in RELATIVE]
    return [None]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
