r"""LayerNorm and RMSNorm of every token: z = v / sigma, sigma^2 = |v|^2 / D + e, v the token (without its mean).

With u = v / sqrt(D) and phi(u) = sqrt(|u|^2 + e), z = sqrt(D) grad phi(u), so that derivatives of z are those of phi, a
symmetric form at every order, whose norm is reached at equal arguments (Banach). Along a line at distance p from the
origin phi = sqrt(x^2 + p^2 ) with p^2 >= e, and with c = p^2 / phi^2 in [0, 1]

    |phi'''| = 3 c sqrt(1 - c) / phi^2 <= (2 / sqrt 3) / phi^2,      |phi''''| = c |12 - 15 c| / phi^3 <= 3 / phi^3.

Hence for a token that moves by at most a, with sigma >= s on the way (|v| falls by at most a),

    |q| <= a^2 / (sqrt 3 sqrt D s^2),      and  |q| <= 2 sqrt D + a / sigma  (both z lie in a ball of radius sqrt D).

Second order, v = C h: with w a functional of the token's z,

    w . B[h, h] = -(w . v)(z . v) / (D sigma^2) + (w . z) / (2 D sigma^2) ( 3 (z . v)^2 / D - |v|^2 ).

The form with e is its polar form, so with |C h| <= U and |e| <= W what is left without the second order is

    |t| <= (2 U W + W^2) / (sqrt 3 sqrt D sigma^2) + a^3 / (2 D s^3),     |t| <= |q| + U^2 / (sqrt 3 sqrt D sigma^2).

Beyond: |w| ( W^2 / (sqrt 3 sqrt D sigma^2) + a^3 / (2 D s^3) ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipbounds.compose.taylor.coefficient import TINY, Coefficient, Map, norm_upper
from lipbounds.compose.taylor.model import CENTRE, Range, Ranges, Value
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.second import products
from lipbounds.errors import Unsupported
from lipbounds.rounding import gamma, inflate


class Normalize(Operation):
    """z of every token.

    Args:
        name: of the operation.
        value: the tokens, `[n, D]`.
        epsilon: e.
        centred: LayerNorm: the mean is taken off first.
    """

    def __init__(self, name: str, value: Value, epsilon: float, *, centred: bool) -> None:
        self.name, self.epsilon = name, epsilon
        self.dim = dim = value.centre.shape[-1]
        self.value = value.summed(_less_mean, _plus_mean, dim + 3) if centred else value
        v, off = self.value.centre, norm_upper(self.value.centre_error).unsqueeze(-1)
        sigma = (v.square().mean(-1, keepdim=True) + epsilon).sqrt()
        self._length = norm_upper(v)  # of the floats; the exact token is within `_off` of them
        self._off = off.squeeze(-1)
        lowest = self._smallest_sigma(torch.zeros(1, *self._length.shape, dtype=v.dtype, device=v.device))[0].unsqueeze(
            -1
        )
        z = v / sigma
        if not bool(z.isfinite().all()):
            raise Unsupported(f"method='taylor' needs tokens with a deviation before a normalisation, at {name}.")
        z_error = inflate(off / lowest + gamma(dim + 12) * z.abs(), 8)
        inverse_error = inflate(off / (math.sqrt(dim) * lowest * sigma) + gamma(dim + 12) / sigma, 8)
        self.z = Coefficient(z.unsqueeze(0), z_error.expand_as(z).nan_to_num(nan=torch.inf))
        self.inverse = Coefficient((1 / sigma).expand_as(z).unsqueeze(0), inverse_error.expand_as(z))
        coefficients = {k: self._slope(p) for k, p in self.value.coefficients.items() if k != CENTRE}
        self.output = self.bent({CENTRE: self.z} | coefficients).with_outputs(name)

    def _slope(self, part: Coefficient) -> Coefficient:
        """(part - z (z . part) / D) / sigma."""
        along = part.times(self.z, lambda t, z: (t * z).sum(-1, keepdim=True).expand_as(t) / self.dim, self.dim + 3)
        away = along.times(self.z, torch.mul, 2)
        return part.plus(Coefficient(-away.matrix, away.error)).times(self.inverse, torch.mul, 2)

    def _smallest_sigma(self, change: Tensor) -> Tensor:
        """Lower bound on sigma of tokens that moved by that, [radii, n]."""
        slack = 4 * gamma(self.dim + 16)
        shortest = (self._length * (1 - slack) - (change + self._off) * (1 + slack)).clamp(min=0)
        return ((shortest.square() / self.dim + self.epsilon) * (1 - slack)).sqrt()

    def bend(self) -> Coefficient:
        """( z (3 (z . v)^2 / D - |v|^2) / 2 - v (z . v) ) / (D sigma^2), v = C h."""
        part, wide = self.value.linear, self.z.error.shape
        along = part.times(self.z, lambda t, z: (t * z).sum(-1, keepdim=True), self.dim + 3)
        square = products(along, along, torch.mul, 2).summed(*_scaled(1.5 / self.dim), 3)
        length = products(part, part, lambda a, b: (a * b).sum(-1, keepdim=True), self.dim + 3)
        inner = square.plus(Coefficient(-length.matrix / 2, length.error / 2))
        inner = inner.arranged(lambda t: t.expand(-1, *wide)).times(self.z, torch.mul, 2)
        turned = products(part, along.arranged(lambda t: t.expand(-1, *wide)), torch.mul, 2)
        both = inner.plus(Coefficient(-turned.matrix, turned.error))
        both = both.times(self.inverse, torch.mul, 2).times(self.inverse, torch.mul, 2)
        return both.summed(*_scaled(1 / self.dim), 3)

    def _measure_third(self, ranges: Ranges, most: Tensor) -> Range:
        """Of t.

        Args:
            ranges: with those of all operations before.
            most: bound on |q| of every token.
        """
        first, rest = ranges.linear_and_rest(self.value, 1)
        change = first + rest
        bend = self.inverse.sizes[..., 0].square() / math.sqrt(3 * self.dim)
        turn = change.square() / (2 * self.dim * self._smallest_sigma(change) ** 3)
        mixed = bend * (first + change)
        rows = (mixed * rest + turn * change).nan_to_num(nan=torch.inf)
        rows = inflate(torch.minimum(rows, most + bend * first.square()), 24)
        all_first, all_rest = ranges.linear_and_rest(self.value, 2)
        energy = mixed.amax(1) * all_rest + turn.amax(1) * (all_first + all_rest)
        ball = torch.minimum(norm_upper(rows), inflate(energy, 24).nan_to_num(nan=torch.inf))
        return Range(ball=ball, groups=rows)

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        change = ranges.total(self.value, 1)
        lowest = self._smallest_sigma(change)
        bend = inflate(1 / (math.sqrt(3 * self.dim) * lowest.square()), 8)
        most = 2 * math.sqrt(self.dim) + change * self.inverse.sizes[..., 0]
        rows = torch.minimum((bend * change.square()).nan_to_num(nan=torch.inf), most)
        if self.second:
            return self._measure_third(ranges, inflate(rows, 8))
        energy = (bend * change).amax(1) * ranges.total(self.value, 2)
        rows = inflate(rows, 8)
        ball = torch.minimum(norm_upper(rows), inflate(energy, 8).nan_to_num(nan=torch.inf))
        return Range(ball=ball, groups=rows)

    def _form(self, w: Tensor, one: Coefficient, other: Coefficient) -> Tensor:
        """Twice the matrices of w . B with C replaced by two coefficients: its polar form, [rows, left, right]."""
        z, inverse = self.z.matrix[0], self.inverse.matrix[0]
        weight = inverse[..., 0].square() / self.dim  # 1 / (D sigma^2) of each token
        a_w, b_w = (torch.einsum("and,cnd->can", part.matrix, w) for part in (one, other))
        a_z, b_z = (torch.einsum("and,nd->an", part.matrix, z) for part in (one, other))
        along = (w * z).sum(-1) * weight  # [rows, n]
        first = (a_w * weight) @ b_z.mT + (a_z * weight) @ b_w.mT
        second = (a_z * (3 * along / self.dim).unsqueeze(1)) @ b_z.mT
        flat = along.unsqueeze(-1).expand_as(w).flatten(1).unsqueeze(1)
        return second - first - (one.matrix.flatten(1) * flat) @ other.matrix.flatten(1).mT

    def _lost(self, w: Tensor, error: Tensor, one: Coefficient, other: Coefficient) -> Tensor:
        """Bound on the error of the forms: every factor with its relative error, exp(sum) - 1 for the product."""
        size, lost = norm_upper(one.sizes), norm_upper(one.error)
        other_size, other_lost = norm_upper(other.sizes), norm_upper(other.error)
        z_size, z_lost = norm_upper(self.z.sizes), norm_upper(self.z.error)
        inverse, inverse_lost = self.inverse.sizes[..., 0], self.inverse.error[..., 0]
        relative = lost / size + other_lost / other_size + 3 * z_lost / (z_size + TINY) + 2 * inverse_lost / inverse
        relative = inflate(relative + gamma(4 * self.dim * len(size) + 64), 8)
        # 2 |w| |a| |z| |b| + 3 |w| |z|^3 |a| |b| / D + |w| |z| |a| |b|, with |z|^2 <= 2 D.
        each = inflate(9 * z_size * size * other_size * inverse.square() / self.dim, 16)
        return inflate(norm_upper(w) @ (each * torch.expm1(2 * relative)) + error * norm_upper(each), 64)

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """See the top of this file."""
        w, part = rows.unflatten(1, self.z.error.shape), self.value.linear
        return self._form(w, part, part) / 2, self._lost(w, error, part, part)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The polar form of the second order."""
        w, part = rows.unflatten(1, self.z.error.shape), self.value.linear
        return {
            name: (self._form(w, other, part), self._lost(w, error, other, part))
            for name, other in self.value.terms.items()
        }

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """See the top of this file."""
        first, rest = ranges.linear_and_rest(self.value, 1)
        change = first + rest
        lowest, inverse = self._smallest_sigma(change), self.inverse.sizes[..., 0]
        each = rest.square() * inverse.square() / math.sqrt(3 * self.dim) + change**3 / (2 * self.dim * lowest**3)
        size = norm_upper(rows.unflatten(1, self.z.error.shape))
        total = each @ size.mT + norm_upper(each).unsqueeze(1) * error
        return inflate(total, each.shape[1] + 32).nan_to_num(nan=torch.inf)


def _scaled(factor: float) -> tuple[Map, Map]:
    return (lambda t: t * factor), (lambda t: t * factor)


def _less_mean(tokens: Tensor) -> Tensor:
    return tokens - tokens.mean(-1, keepdim=True)


def _plus_mean(tokens: Tensor) -> Tensor:
    return tokens + tokens.mean(-1, keepdim=True)
