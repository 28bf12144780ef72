"""The largest ball that Taylor models prove: a search over radii."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.ball import Norm
from lipbounds.compose.taylor.margin import TaylorMargin
from lipbounds.compose.taylor.rounded import Rounded
from lipbounds.rounding import inflate
from lipbounds.targets.layers import Layer


AT_ONCE = 3  # balls evaluated together while none is proved
ABOVE = 1.25  # of the radius that the slopes at the point allow: margins may bend upwards
SMALLEST = 1e-300  # no smaller radius is looked for


def taylor_radius(
    network: Layer,
    x: Float[Tensor, "..."],
    label: int,
    *,
    largest: float,
    steps: int,
    precision: float,
    norm: Norm = "l2",
) -> tuple[float, Float[Tensor, " classes"] | None]:
    """A radius within which the label provably keeps a largest logit, and how fast the margins may fall.

    The first balls halve from a little above the one that the slopes at the point allow. Between the largest ball that
    is proved and the next one above it, the margins are nearly linear in the radius: the next balls are where the line
    through both meets 0, or in the middle where that does not halve the gap.

    Args:
        network: in float64.
        x: one input, in float64.
        label: the class.
        largest: no larger radius is looked for.
        steps: balls tried, at most.
        precision: the search ends when the gap is this share of the radius.
        norm: of the balls.

    Returns:
        The radius, 0 if nothing is proved, and for every class a bound on the fall of its margin over that ball,
        divided by the radius; None at radius 0. The ball that was evaluated may be larger than the one it proves: a
        margin falls at least as far there, but maybe less for its radius.
    """
    margin = TaylorMargin(network, x, label, norm=norm)
    if not bool((margin.at_point > 0).all()):
        return 0.0, None
    top = min(ABOVE * float(inflate((margin.at_point / margin.slopes).amin(), 64)), largest)
    found = _search(margin, Found(), top, steps, precision)
    if margin.margins.second:
        margin = TaylorMargin(network, x, label, norm=norm, order=1)
        found = _search(margin, found, top, steps, precision)
    if found.falls is None:
        return 0.0, None
    return found.radius, torch.cat([found.falls[:label], found.falls.new_zeros(1), found.falls[label:]])


@dc.dataclass(frozen=True, eq=False)
class Found:
    """The largest radius proved so far, and how far margins fall over its ball, divided by it; None: nothing yet."""

    radius: float = 0.0
    falls: Tensor | None = None


def _search(margin: TaylorMargin, found: Found, top: float, steps: int, precision: float) -> Found:
    """A larger radius by this model, if it proves one.

    Args:
        margin: the model.
        found: by another model.
        top: no larger radius is looked for.
        steps: balls tried, at most.
        precision: by which share a radius must be larger.
    """
    start, above = (0.0, float(margin.at_point.amin())), _above_at_point(margin)
    bracket = Bracket(start, (math.inf, -math.inf))
    radii = _halving(top, min(AT_ONCE, steps)) if found.radius == 0 else [min(found.radius * (1 + precision), top)]
    while radii and radii[0] > found.radius:
        steps -= len(radii)
        lower, inside = margin.evaluate(margin.at_point.new_tensor(radii))
        best = int(inside.argmax())
        if float(inside[best]) > found.radius:
            radius = float(inside[best])
            found = Found(radius, inflate((margin.at_point - lower[best] + above) / inside[best], 4))
        bracket = bracket.narrowed(radii, lower.amin(1).tolist())
        count, (high, _) = min(AT_ONCE, steps), bracket.bad
        if found.radius == 0:
            radii = _halving(high / 2, count)
        else:
            radius = max(bracket.between(), found.radius * (1 + precision)) if high < math.inf else top
            radii = [radius] if count and radius < high else []
    return found


def _above_at_point(margin: TaylorMargin) -> Float[Tensor, " others"]:
    """How far the margins at the input may be above what the lower bounds start from, so that they fall from higher.

    The error of their centre moves both. Where rounding is a remainder of its own, remainders are not 0 at the input.

    Args:
        margin: the model.
    """
    if not any(isinstance(operation, Rounded) for operation in margin.operations):
        return torch.zeros_like(margin.at_point)
    ranges = margin.ranges(margin.at_point.new_zeros(1))
    _, rest = ranges.linear_and_rest(margin.margins, 0)
    ranges.known.clear()  # see TaylorMargin.evaluate
    return rest[0]


@dc.dataclass(frozen=True)
class Bracket:
    """Two balls between which the smallest margin changes its sign, as radius and lower bound of that margin.

    Args:
        good: the largest ball known whose margins are proved, or the point itself.
        bad: the smallest ball known, of those above, whose margins are not; infinity: none. The value of a ball that
            stayed while the other end moved is halved (the Illinois rule), so that both ends move.
    """

    good: tuple[float, float]
    bad: tuple[float, float]

    def narrowed(self, radii: list[float], margins: list[float]) -> Bracket:
        """With some more balls.

        Args:
            radii: of the balls.
            margins: the smallest lower bound of each; NaN proves nothing.
        """
        balls = list(zip(radii, margins, strict=True))
        good = max([self.good, *(ball for ball in balls if ball[1] >= 0)])
        stayed = self.bad if good == self.good else (self.bad[0], self.bad[1] / 2)
        fresh = [(r, m if m < 0 else -math.inf) for r, m in balls if not m >= 0]
        return Bracket(good, min([stayed, *fresh], key=lambda ball: ball[0] if ball[0] > good[0] else math.inf))

    def between(self) -> float:
        """Where the line through both meets 0; in the middle where it cannot be drawn."""
        (low, above), (high, below) = self.good, self.bad
        share = above / (above - below) if math.isfinite(below) else 0.5
        return low + (high - low) * share


def _halving(radius: float, count: int) -> list[float]:
    return [radius / 2**number for number in range(count)] if radius > SMALLEST else []
