r"""Smooth activations at every entry: y = f(u), u = c + C h + e, |C h| <= U, |e| <= W, a = U + W.

The remainder is at most sup |f''| a^2 / 2 over [c - a, c + a]. Second order: v . B[h, h] =
1/2 sum_i v_i f''(c_i) (C_i h)^2, v . X_s[q, h] = sum_i v_i f''(c_i) (T_i q)(C_i h). Beyond: |v_i| ( |f''(c_i)| W^2 / 2
+ sup |f'''| a^3 / 6 ), summed, or the largest factor of a^2 (of W^2) times a bound on the sum of all squares.
Without the second order, |t| <= |f''(c)| (U W + W^2 / 2) + sup |f'''| a^3 / 6.

- gelu: f'' = phi(x) (2 - x^2), f''' = phi(x) (x^3 - 4 x), f'''' = -phi(x) (x^4 - 7 x^2 + 4). So |f''| is largest on an
  interval at an end, at 0 or at +-2, and |f'''| at an end or at +-sqrt((7 +- sqrt 33) / 2). At the float next to such
  a point the function differs from its maximum by the square of 1e-15 only, far less than the rounding that is added.
- tanh: |f''| = 2 |t| (1 - t^2) <= 4 / (3 sqrt 3) < 0.7699, |f'''| = 2 (1 - t^2) |1 - 3 t^2| <= 2.

Rounding: the slopes and second derivatives are sums of at most two terms of size at most 1.2 (f', f'', f''') with fewer
than 24 roundings each: 64 u is added, as in lipbounds.ops.activations, and what the error of c moves: |f''| <= 0.8,
|f'''| <= 0.8 (gelu, at the critical points above) or 2 (tanh).
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.compose.taylor.activated import activated
from lipbounds.compose.taylor.coefficient import TINY, Coefficient, norm_upper, weighted_product
from lipbounds.compose.taylor.model import CENTRE, Range, Ranges, Value
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.second import products
from lipbounds.compose.taylor.touching import Cases, Parabolas, finite
from lipbounds.ops.activations import ACTIVATIONS, SLOPE_ERROR
from lipbounds.rounding import UNIT_ROUNDOFF, inflate


@dc.dataclass(frozen=True)
class _Smooth:
    """Second and third derivative, their global bounds, and where their absolute values may be largest inside."""

    second: Callable[[Tensor], Tensor]
    third: Callable[[Tensor], Tensor]
    largest: tuple[float, float]
    peaks: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


def _bell(x: Tensor) -> Tensor:
    return (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


_INNER, _OUTER = math.sqrt((7 - math.sqrt(33)) / 2), math.sqrt((7 + math.sqrt(33)) / 2)
SMOOTH = {
    "gelu": _Smooth(
        lambda x: _bell(x) * (2 - x.square()),
        lambda x: _bell(x) * (x**3 - 4 * x),
        (0.8, 0.8),
        ((0.0, 2.0, -2.0), (_INNER, -_INNER, _OUTER, -_OUTER)),
    ),
    "tanh": _Smooth(
        lambda x: -2 * x.tanh() * (1 - x.tanh().square()),
        lambda x: -2 * (1 - x.tanh().square()) * (1 - 3 * x.tanh().square()),
        (0.77, 2.0),
    ),
}


def _sup(
    function: Callable[[Tensor], Tensor], peaks: tuple[float, ...], largest: float, low: Tensor, high: Tensor
) -> Tensor:
    """sup |f| on [low, high]; without known peaks the global one."""
    if not peaks:
        return torch.full_like(low, largest)
    low, high = low.clamp(-40, 40), high.clamp(-40, 40)  # beyond, all derivatives are below 1e-300
    best = torch.maximum(function(low).abs(), function(high).abs())
    for peak in peaks:
        inside = (low <= peak) & (peak <= high)
        best = torch.where(inside, best.clamp(min=float(function(low.new_full((), peak)).abs())), best)
    return best + SLOPE_ERROR


class SmoothPointwise(Operation):
    """A smooth activation.

    Args:
        name: of the operation.
        activation: its name.
        value: u.
    """

    def __init__(self, name: str, activation: str, value: Value) -> None:
        self.name, self.value, self._activation, self._rule = name, value, activation, SMOOTH[activation]
        c, off = value.centre, value.centre_error
        second_bound = self._rule.largest[0]
        slope = Coefficient(ACTIVATIONS[activation].slope(c).unsqueeze(0), inflate(second_bound * off + SLOPE_ERROR, 4))
        coefficients = {k: p.times(slope, torch.mul, 2) for k, p in value.coefficients.items() if k != CENTRE}
        self._second = self._rule.second(c)
        self._second_error = inflate(self._rule.largest[1] * off + SLOPE_ERROR, 4)
        self.output = self.bent({CENTRE: activated(activation, value)} | coefficients).with_outputs(name)

    def bend(self) -> Coefficient:
        """f''(c) (C h)^2 / 2."""
        part = self.value.linear
        weights = Coefficient(self._second.unsqueeze(0) / 2, self._second_error / 2)
        return products(part, part, torch.mul, 2).times(weights, torch.mul, 2)

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        if self.second:
            return self._measure_third(ranges)
        c = self.value.centre
        change = inflate(ranges.total(self.value, 0), 2)
        wide = inflate(change + self.value.centre_error, 4) + 2 * UNIT_ROUNDOFF * c.abs()
        bend = _sup(self._rule.second, self._rule.peaks[0], self._rule.largest[0], c - wide, c + wide)
        box = inflate(bend * change.square() / 2, 8).flatten(1)
        # sum of squares of bend a^2 / 2, the sum of a^2 being bounded as a whole.
        energy = inflate((bend * change / 2).flatten(1).amax(1) * ranges.total(self.value, c.dim()), 4)
        return Range(ball=torch.minimum(norm_upper(box), energy), box=box)

    def _measure_third(self, ranges: Ranges) -> Range:
        """Of t; the ball also by the largest factor of W and of a, and the norms of all W and all a."""
        c = self.value.centre
        first, rest = ranges.linear_and_rest(self.value, 0)
        mixed = (self._second.abs() + self._second_error) * (first + rest / 2)
        turn = self._turn(ranges) * (first + rest).square() / 6
        box = inflate(mixed * rest + turn * (first + rest), 16).flatten(1)
        all_first, all_rest = ranges.linear_and_rest(self.value, c.dim())
        energy = mixed.flatten(1).amax(1) * all_rest + turn.flatten(1).amax(1) * (all_first + all_rest)
        box, energy = (part.nan_to_num(nan=torch.inf) for part in (box, inflate(energy, 16)))
        return Range(ball=torch.minimum(norm_upper(box), energy), box=box)

    def _turn(self, ranges: Ranges) -> Tensor:
        """sup |f'''| over all that an entry may become."""
        c = self.value.centre
        change = ranges.total(self.value, 0)
        wide = inflate(change + self.value.centre_error, 8) + 2 * UNIT_ROUNDOFF * c.abs()
        return _sup(self._rule.third, self._rule.peaks[1], self._rule.largest[1], c - wide, c + wide)

    def _weights(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """v_i f''(c_i), with its error."""
        bend, off = self._second.flatten(), self._second_error.flatten()
        return rows * bend, inflate(rows.abs() * (off + UNIT_ROUNDOFF) + error.unsqueeze(1) * (bend.abs() + off), 8)

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """See the top of this file."""
        weights, off = self._weights(rows, error)
        return weighted_product(self.value.linear, self.value.linear, weights / 2, off / 2)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """See the top of this file."""
        weights, off = self._weights(rows, error)
        return {k: weighted_product(part, self.value.linear, weights, off) for k, part in self.value.terms.items()}

    def touched(self, rows: Tensor, error: Tensor, cases: Cases, ranges: Ranges) -> Parabolas:
        """See lipbounds.compose.taylor.touching."""
        value, c, off = self.value, self.value.centre.flatten(), self.value.centre_error.flatten()
        second, second_error = self._second.flatten(), self._second_error.flatten()
        function, slope = ACTIVATIONS[self._activation].function, ACTIVATIONS[self._activation].slope
        first, rest = (cases.select(part) for part in ranges.linear_and_rest(value, 0))
        # e here is all of u - c but C h with the floats of C, so what these are off by is a part of it.
        missed = inflate(cases.select(ranges.per_radius(ranges.radii, value.linear.error)), 2)
        rest_and_missed = inflate(rest + missed, 2)
        reach = inflate(first + rest_and_missed, 4)
        wide = inflate(reach + off, 4) + 2 * UNIT_ROUNDOFF * c.abs()
        low, high = self._second_range(c - wide, c + wide)
        turn = _sup(self._rule.third, self._rule.peaks[1], self._rule.largest[1], c - wide, c + wide)
        touch = cases.points @ value.linear.matrix.flatten(1)
        touch = torch.minimum(touch.abs(), reach) * touch.sign()
        rho = function(c + touch) - function(c) - slope(c) * touch - second * touch.square() / 2
        steep = slope(c + touch) - slope(c) - second * touch
        bends = torch.where(rows > 0, rows.abs() * (second - low), rows.abs() * (high - second))
        bends = (bends + rows.abs() * second_error).clamp(min=0)
        bends = inflate(torch.minimum(bends, rows.abs() * turn * reach), 8)
        slopes = rows * steep
        # Any eta > 0: the one that would be best if all entries moved as far as they can.
        rests, firsts = ((bends * part.square()).sum(1) for part in (rest_and_missed, first))
        eta = (rests / (firsts + TINY)).sqrt().clamp(1e-3, 1.0)
        size, largest = c.abs() + touch.abs(), self._rule.largest[1]
        rho_error = SLOPE_ERROR * (2 * size + touch.abs() + touch.square() + TINY) + largest * off * touch.square()
        steep_error = SLOPE_ERROR * (4 + size + touch.abs()) + 2 * largest * off * touch.abs()
        wrong = rho_error + steep_error * (reach + touch.abs()) + missed * steep.abs()
        bent = (self._second.abs() + self._second_error).flatten() / 2
        lost = (rows.abs() * (wrong + bent * rest.square())).sum(1) + (1 + 1 / eta) * rests / 2
        lost = lost + error * norm_upper(turn * reach**3 / 6 + bent * rest.square())
        bends = inflate(bends * (1 + eta.unsqueeze(1)), 4)
        return finite(Parabolas(value, touch, rows * rho, slopes, bends, slopes, inflate(lost, c.numel() + 32)))

    def _second_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest f'' on [low, high], rounded outwards; without known peaks the global ones."""
        if not self._rule.peaks[0]:
            most = torch.full_like(low, self._rule.largest[0])
            return -most, most
        second, low, high = self._rule.second, low.clamp(-40, 40), high.clamp(-40, 40)
        least, most = torch.minimum(second(low), second(high)), torch.maximum(second(low), second(high))
        for peak in self._rule.peaks[0]:
            there, inside = float(second(low.new_full((), peak))), (low <= peak) & (peak <= high)
            least = torch.where(inside, least.clamp(max=there), least)
            most = torch.where(inside, most.clamp(min=there), most)
        return least - SLOPE_ERROR, most + SLOPE_ERROR

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        c = self.value.centre
        first, rest = ranges.linear_and_rest(self.value, 0)
        change, turn = inflate(first + rest, 2), self._turn(ranges)
        bend = (self._second.abs() + self._second_error) / 2
        all_of_it, all_rest = ranges.total(self.value, c.dim()), ranges.linear_and_rest(self.value, c.dim())[1]
        size = rows.abs() + error.unsqueeze(1)
        total = rows.new_zeros(())
        for weight, each, energy in ((turn * change / 6, change, all_of_it), (bend.expand_as(rest), rest, all_rest)):
            # sum w_i a_i^2, at most the largest w times the sum of a^2.
            by_entry = (weight * each.square()).flatten(1) @ size.mT
            largest = (weight.flatten(1).unsqueeze(1) * size).amax(-1)
            total = total + torch.minimum(by_entry, largest * energy.square().unsqueeze(1))
        return inflate(total, c.numel() + 32).nan_to_num(nan=torch.inf)
