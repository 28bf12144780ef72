r"""Activations at every entry: y = f(u), u = c + C h + e, |C h| <= U, |e| <= W, a = U + W.

Smooth f: the remainder is at most sup |f''| a^2 / 2 over [c - a, c + a]. Second order: v . B[h, h] =
1/2 sum_i v_i f''(c_i) (C_i h)^2, v . X_s[q, h] = sum_i v_i f''(c_i) (T_i q)(C_i h). Beyond: |v_i| ( |f''(c_i)| W^2 / 2
+ sup |f'''| a^3 / 6 ), summed, or the largest factor of a^2 (of W^2) times a bound on the sum of all squares.
Without the second order, |t| <= |f''(c)| (U W + W^2 / 2) + sup |f'''| a^3 / 6.

- gelu: f'' = phi(x) (2 - x^2), f''' = phi(x) (x^3 - 4 x), f'''' = -phi(x) (x^4 - 7 x^2 + 4). So |f''| is largest on an
  interval at an end, at 0 or at +-2, and |f'''| at an end or at +-sqrt((7 +- sqrt 33) / 2). At the float next to such
  a point the function differs from its maximum by the square of 1e-15 only, far less than the rounding that is added.
- tanh: |f''| = 2 |t| (1 - t^2) <= 4 / (3 sqrt 3) < 0.7699, |f'''| = 2 (1 - t^2) |1 - 3 t^2| <= 2.

relu: with s the slope at c, q = relu(u) - relu(c) - s (u - c) = max(0, -u) for s = 1, max(0, u) for s = 0: between 0
and max(0, a - |c|), up to the error of c. There is no second order; B = 0 and t = q.

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

from lipbounds.compose.taylor.coefficient import TINY, Coefficient, exact, norm_upper, weighted_product
from lipbounds.compose.taylor.model import CENTRE, Range, Ranges, Value
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.second import products
from lipbounds.errors import Unsupported
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
_SMOOTH = {
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
        self.name, self.value, self._rule = name, value, _SMOOTH[activation]
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


class Relu(Operation):
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

    def bend(self) -> None:
        """None: there is no second order."""

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file; 2 |error of c| pays for a slope on the wrong side."""
        box = self.excess(ranges).flatten(1)
        return Range(ball=norm_upper(box), box=box)

    def excess(self, ranges: Ranges) -> Tensor:
        """max(0, a - |c|), and what the error of c adds: bounds of the remainder."""
        c, off = self.value.centre.abs(), self.value.centre_error
        change = ranges.total(self.value, 0)
        return inflate((change + 2 * off - c * (1 - 4 * UNIT_ROUNDOFF)).clamp(min=0), 4)

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """None."""
        inputs = len(self.value.linear.matrix)
        return rows.new_zeros(len(rows), inputs, inputs), torch.zeros_like(error)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """None."""
        return {}

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        box, off = self.excess(ranges).flatten(1), self.value.centre_error.flatten()
        wrong_side = (rows.abs() @ off).unsqueeze(0)
        return inflate(
            wrong_side + box @ (-rows).clamp(min=0).mT + norm_upper(box).unsqueeze(1) * error, box.shape[1] + 8
        )


def activated(activation: str, value: Value) -> Coefficient:
    """An activation at the centre.

    Every function here is within 32 u |x| of its computed value: x times a factor of at most 1 with few roundings and
    an error of a few ulps in erf, exp or tanh, each of which moves the product by no more than itself; |tanh x| <= |x|.

    Args:
        activation: its name in `ACTIVATIONS`.
        value: its input.
    """
    rule = ACTIVATIONS[activation]
    lost = rule.lipschitz * value.centre_error + 32 * UNIT_ROUNDOFF * (value.centre.abs() + TINY)
    return Coefficient(rule.function(value.centre).unsqueeze(0), inflate(lost, 4))


def pointwise(name: str, activation: str, value: Value) -> Operation:
    """An activation as an operation.

    Args:
        name: of the operation.
        activation: its name.
        value: its input.

    Raises:
        Unsupported: no derivatives of it are known here.
    """
    if activation == "relu":
        return Relu(name, value)
    if activation not in _SMOOTH:
        raise Unsupported(
            f"method='taylor' knows relu, identity and {sorted(_SMOOTH)}, got {activation!r}; use 'joint'."
        )
    return SmoothPointwise(name, activation, value)
