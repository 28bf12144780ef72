r"""relu at every entry: y = max(0, u), u = c + C h + e.

With s the slope at c, q = relu(u) - relu(c) - s (u - c) = max(0, -u) for s = 1, max(0, u) for s = 0: between 0
and max(0, a - |c|), up to the error of c. There is no second order; B = 0 and t = q.

Along the worst direction (lipbounds.compose.taylor.touching), z = u, x = C h, |e| <= W, and sigma the slope of relu at
c + x*: a functional v_i > 0 takes relu(z) >= sigma z, and v_i < 0 one of these, for all z that an entry may become:

- a bowl: relu(z) = sigma z + relu(w), w = z for sigma = 0 and -z for sigma = 1; with w' = w with W in place of e,
  relu(w) <= relu(w') <= (w' + delta)^2 / (4 delta) for any delta > 0, since (w' - delta)^2 >= 0. delta is the larger of
  |w'| at x* and a share of |C_i| r: one that touches at x* itself bends without bound as w' nears 0;
- in balls of other norms a chord, relu(z) <= top (z - bottom) / (top - bottom), bottom <= z <= top, or what is known of
  the remainder, relu(z) <= relu(c) + s (x + e) + its bound: the lower one at x*.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from lipbounds.compose.taylor.activated import activated
from lipbounds.compose.taylor.coefficient import TINY, exact, norm_upper
from lipbounds.compose.taylor.model import CENTRE, Range, Ranges, Value
from lipbounds.compose.taylor.operation import WithoutSecondOrder
from lipbounds.compose.taylor.touching import Cases, Parabolas, finite
from lipbounds.rounding import UNIT_ROUNDOFF, inflate


SHARE = 0.3  # of what C_i h can do at most: the least distance from its kink at which relu is touched


class Relu(WithoutSecondOrder):
    """max(0, u).

    Args:
        name: of the operation.
        value: u.
    """

    def __init__(self, name: str, value: Value) -> None:
        self.name, self.value = name, value
        c = value.centre
        # Where the sign of the exact c is not known, any slope in [0, 1] is right: the remainder is the same.
        self.slope = (c > 0).to(c.dtype)
        coefficients = {k: p.times(exact(self.slope.unsqueeze(0)), torch.mul, 2) for k, p in value.coefficients.items()}
        self.output = Value(coefficients | {CENTRE: activated("relu", value)}).with_outputs(name)

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file; 2 |error of c| pays for a slope on the wrong side."""
        box = self.excess(ranges).flatten(1)
        return Range(ball=norm_upper(box), box=box)

    def excess(self, ranges: Ranges) -> Tensor:
        """max(0, a - |c|), and what the error of c adds: bounds of the remainder."""
        c, off = self.value.centre.abs(), self.value.centre_error
        change = ranges.total(self.value, 0)
        return inflate((change + 2 * off - c * (1 - 4 * UNIT_ROUNDOFF)).clamp(min=0), 4)

    def touched(self, rows: Tensor, error: Tensor, cases: Cases, ranges: Ranges) -> Parabolas:
        """See lipbounds.compose.taylor.touching."""
        value, c, off = self.value, self.value.centre.flatten(), self.value.centre_error.flatten()
        first, rest = (cases.select(part) for part in ranges.linear_and_rest(value, 0))
        box, slope = cases.select(self.excess(ranges)), self.slope.flatten()
        # e here is all of u but c + C h with the floats of both.
        missed = inflate(cases.select(ranges.per_radius(ranges.radii, value.linear.error)) + off, 4)
        wide = inflate(rest + missed, 4)
        touch = cases.points @ value.linear.matrix.flatten(1)
        there, size = c + touch, c.abs() + touch.abs()
        wide = inflate(wide + 4 * UNIT_ROUNDOFF * (size + first + wide), 4)
        sigma = (there > 0).to(c.dtype)
        line = Above(sigma * there, sigma, torch.zeros_like(there), sigma)
        if ranges.ball is None:
            above = _bowls(there, sigma, wide, SHARE * first)
        else:
            flat = Above(c.clamp(min=0) + slope * touch + box, slope, torch.zeros_like(there), slope)
            above = _chords(there, (c - first - wide).clamp(max=0), (c + first + wide).clamp(min=0)).where_lower(flat)
        found = above.where(rows < 0, line)
        moving = rows * (box > 0)
        heights = moving * (found.height - c.clamp(min=0) - slope * touch)
        slopes, carried = moving * (found.slope - slope), moving * (found.carried - slope)
        # The error of c counts at relu(c) and at z, that of C at z and at s x; the rest is rounding.
        rounded = size + found.height.abs() + (1 + found.slope.abs()) * (first + wide + touch.abs())
        wrong = 2 * off + missed + 16 * UNIT_ROUNDOFF * rounded
        lost = inflate((moving.abs() * wrong).sum(1) + error * norm_upper(box), c.numel() + 16)
        bends = inflate(moving.abs() * found.bend, 4)
        return finite(Parabolas(value, touch, heights, slopes, bends, carried, lost))

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        box, off = self.excess(ranges).flatten(1), self.value.centre_error.flatten()
        wrong_side = (rows.abs() @ off).unsqueeze(0)
        return inflate(
            wrong_side + box @ (-rows).clamp(min=0).mT + norm_upper(box).unsqueeze(1) * error, box.shape[1] + 8
        )


@dc.dataclass(frozen=True, eq=False)
class Above:
    """A parabola of x for each entry, and what it makes of e, beside relu(c + x + e).

    Args:
        height: at x*.
        slope: at x*.
        bend: the second derivative.
        carried: the factor of e.
    """

    height: Tensor
    slope: Tensor
    bend: Tensor
    carried: Tensor

    def where(self, mine: Tensor, other: Above) -> Above:
        """This one for some entries, and another one for the rest."""
        fields = (field.name for field in dc.fields(self))
        return Above(*(torch.where(mine, getattr(self, name), getattr(other, name)) for name in fields))

    def where_lower(self, other: Above) -> Above:
        """The lower one at x*."""
        return self.where(self.height <= other.height, other)


def _bowls(there: Tensor, sigma: Tensor, wide: Tensor, least: Tensor) -> Above:
    """sigma z + (w' + delta)^2 / (4 delta).

    Args:
        there: c + x*.
        sigma: the slope of relu there.
        wide: W, and the rounding of c + x*.
        least: delta is not below.
    """
    side = 1 - 2 * sigma
    moved = side * there + wide
    delta = torch.maximum(moved.abs(), least) + TINY
    height, slope = (moved + delta).square() / (4 * delta), side * (moved + delta) / (2 * delta)
    return Above(sigma * there + height, sigma + slope, 1 / (2 * delta), sigma)


def _chords(there: Tensor, bottom: Tensor, top: Tensor) -> Above:
    """top (z - bottom) / (top - bottom).

    Args:
        there: c + x*.
        bottom: z is not below, nor 0.
        top: z is not above, nor 0.
    """
    # Only where both are 0, which nothing leaves, is there no chord: tiny numbers may meet huge weights.
    slope = torch.where(top == bottom, 1.0, top / (top - bottom))
    return Above(slope * (there - bottom), slope, torch.zeros_like(there), slope)
