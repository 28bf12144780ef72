r"""The largest radius that slopes on balls prove: the fall of a margin is integrated along the ray, ball by ball.

On a ray x + t u, |u| = 1, the margin m_j falls at a rate of at most |grad m_j|, and a bound on the gradient over B(r)
holds on every smaller ball. With s_j(r_k) known on the balls r_1 < ... < r_K, and r_0 = 0,

    m_j(x + r u)  >=  m_j(x) - sum_k (min(r, r_k) - r_{k-1})_+ s_j(r_k),        r <= r_K.

The balls are chosen one by one, where they are expected to gain most; that is no part of the proof.

Rounding: the margins are lower bounds, slopes and falls are rounded up, and the radius down.
"""

from __future__ import annotations

import dataclasses as dc
import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import UNIT_ROUNDOFF, inflate


STEEP = 8.0  # beyond that ratio of the slopes on two balls they are taken as exponential between
WALL = 0.03  # share of the radius that a ball before such a rise must add: they rise faster than that, and it adds less
HALVINGS = 60
TINY = torch.finfo(torch.float64).tiny


@dc.dataclass(frozen=True, eq=False, slots=True)
class Slopes:
    """What is known on one ball.

    Args:
        radius: of the ball.
        slopes: upper bounds on the norms of the gradients of the margins over it, rounded up.
        margins: lower bounds on the margins at its centre.
    """

    radius: float
    slopes: Float[Tensor, " margins"]
    margins: Float[Tensor, " margins"]


@dc.dataclass(frozen=True, eq=False, slots=True)
class Proved:
    """A radius with what proves it.

    Args:
        radius: up to which no margin is below 0.
        falls: by how much each margin can fall within it.
        ball: index of the first of the balls that is larger; their number if there is none.
        margin: index of the margin that ends it.
        left: of that margin, where the last ball inside ends.
    """

    radius: float
    falls: Float[Tensor, " margins"]
    ball: int
    margin: int
    left: float


def proved_radius(balls: list[Slopes]) -> Proved:
    """The radius that the balls prove together.

    Args:
        balls: in order of their radii, all > 0, about the same centre.
    """
    margins = torch.stack([ball.margins for ball in balls]).amax(0)  # each is a lower bound
    falls, before, worst = torch.zeros_like(margins), 0.0, 0
    rest = float(margins[worst])
    for index, ball in enumerate(balls):
        left, at = ((margins - falls) / inflate(ball.slopes, 8)).nan_to_num(nan=0.0).min(0)
        worst, rest = int(at), float((margins - falls)[at])
        inside = before + max(float(left), 0.0)
        end = max(min(inside * (1 - 8 * UNIT_ROUNDOFF), ball.radius), before)
        # A radius of 0 proves nothing of a slope without a bound.
        moved = inflate(falls + (end - before) * ball.slopes, 8) if end > before else falls
        if end < ball.radius:
            return Proved(end, moved, index, worst, rest)
        falls, before = moved, end
    return Proved(before, falls, len(balls), worst, rest)


def farthest(
    slopes_on: Callable[[float], Slopes], *, largest: float, steps: int, precision: float
) -> tuple[float, Float[Tensor, " margins"] | None]:
    """The largest radius found, and by how much each margin can fall within it; None where it is 0.

    Args:
        slopes_on: what is known on a ball of the radius given; of radius 0 only to start from.
        largest: no larger radius is looked for.
        steps: balls evaluated, at most.
        precision: the search ends when no further ball is expected to add that share of the radius.
    """
    point = slopes_on(0.0)
    balls = [dc.replace(point, radius=math.inf)]  # no bound on a ball can give more than the slopes at the point
    trial = min(proved_radius(balls).radius, largest)
    balls, found = [], None
    for _ in range(steps):
        if not TINY < trial < math.inf:
            break
        balls = sorted([*balls, slopes_on(trial)], key=lambda ball: ball.radius)
        found = proved_radius(balls)
        gain, trial = _next(point, balls, found)
        if gain <= precision * found.radius:
            break
    return (found.radius, found.falls) if found is not None and found.radius > 0 else (0.0, None)


def _next(point: Slopes, balls: list[Slopes], found: Proved) -> tuple[float, float]:
    """What one more ball is expected to add to the radius, and its own, with slopes taken as linear between balls.

    Where they differ by more than `STEEP` they are taken as exponential.
    """
    worst, best = found.margin, (0.0, 0.0)
    if found.ball == len(balls):  # all that was asked for
        return best
    known = [(0.0, float(point.slopes[worst])), *((ball.radius, float(ball.slopes[worst])) for ball in balls)]
    last = known[found.ball + 1][1]
    for (inner, low), (outer, high) in itertools.pairwise(known[: found.ball + 1]):
        saved = (outer - inner) * (high - low) / 4 / last if last > 0 else 0.0
        best = max(best, (saved, (inner + outer) / 2))
    (inner, low), (outer, high) = known[found.ball], known[found.ball + 1]
    if not high < math.inf or found.radius < outer / 4:  # too large to say anything: nearer to what is proved
        lower = max(found.radius, inner)
        return math.inf, math.sqrt(lower) * math.sqrt(outer) if lower > 0 else outer / 100
    if high > 0:
        best = max(best, ((found.radius - inner) * (high - low) / 4 / high, (inner + found.radius) / 2))
    step = _reach(low, high, outer - inner, found.left)
    gain = inner + step - found.radius
    if high > STEEP * low and gain < WALL * found.radius:
        return best
    return max(best, (gain, min(inner + step, (inner + step + outer) / 2)))


def _reach(low: float, high: float, width: float, left: float) -> float:
    """Where a ball as large as its slope allows ends: the root t of t slope(t) = left.

    Args:
        low: slope at t = 0.
        high: at t = width.
        width: from one to the other.
        left: > 0.
    """
    if not left > 0:
        return 0.0
    if high <= STEEP * low or low == 0:
        growth = max((high - low) / width, 0.0)
        return 2 * left / (low + math.sqrt(low * low + 4 * growth * left))
    rate = (math.log(high) - math.log(low)) / width
    inside, outside = 0.0, left / low
    for _ in range(HALVINGS):
        middle = (inside + outside) / 2
        # In logarithms, which do not overflow.
        fits = math.log(max(middle, TINY)) + math.log(low) + rate * middle <= math.log(left)
        inside, outside = (middle, outside) if fits else (inside, middle)
    return inside
