"""Exact spectral norm of the softmax Jacobian J(p) = diag(p) - p p^T, in O(n) a row and without an eigendecomposition.

For weights w with p = w/s, s = sum w, and w_1 the largest, it is nu/s with nu in [w_2, w_1] the root of nu = T(nu) :=
w_1 A(nu)/(w_1 + A(nu)), A(nu) = sum_{j>1} w_j + sum_{j>1} w_j^2/(nu - w_j). Newton's method stays left of the root, and
T at a point left of the root is an upper bound; nothing cancels. Proof: docs/functions.md, section 2.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops._rows import SMALLEST_NORMAL, Rows, rows_from_logits, rows_from_probabilities
from lipbounds.rounding import UNIT_ROUNDOFF, cast_up, inflate


# Newton from the start above needs at most 6 steps to float64 accuracy on all rows we searched; the result is an
# upper bound after any number of steps.
NEARLY_TIED = 2.0**-30  # relative; the eigenvector is off by as much, and nu - w_2 by a share of 1e-5 at most
NEWTON_STEPS = 8


def spectral_norm_upper(probabilities: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of diag(p) - p p^T for each row p, rounded up: exact but for the rounding slack.

    For rows that do not sum to exactly 1 the value is >= the norm at the given floats and >= the norm at p / sum(p):
    with s = sum(p) and L = s diag(p) - p p^T, diag(p) - p p^T = L + (1 - s) diag(p), and the norm of L is s^2 times
    that of J(p/s). (For s > 1 the added part is negative and its norm, at most (s-1) p_(1), is below that of L.)
    The gradient is that of the norm at p / sum(p).

    Source: secular equation, Golub 1973 (Some modified matrix eigenvalue problems); derivation at the top of this file.

    Args:
        probabilities: rows that sum to 1.

    Raises:
        InvalidInput: rows that are no probabilities.
    """
    rows = rows_from_probabilities(probabilities)
    top, _ = rows.top(1)
    total = rows.total()
    root = _secular_root(rows)
    # 1 - s = (1 - p_(1)) - others; the first difference is exact for p_(1) >= 1/2, where it matters.
    missing = torch.clamp((1 - top[..., 0]) - rows.others(1), min=0)
    at_floats = total * root + missing * top[..., 0]
    value = torch.maximum(root / total, at_floats).detach()
    value = inflate(value, 12 * rows.length + 64)
    return cast_up(_attach_gradient(value, rows, root), probabilities.dtype)


def spectral_norm_upper_from_logits(logits: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of the softmax Jacobian at each row of logits, rounded up: exact but for the rounding slack.

    The norm is well conditioned in the weights: v^T J v = sum_{i<j} p_i p_j (v_i - v_j)^2 has only positive terms, so a
    relative error e in every weight moves it by at most about 4 e.

    Source: as `spectral_norm_upper`.

    Args:
        logits: -inf marks a masked key.

    Raises:
        InvalidInput: NaN, +inf or a fully masked row.
    """
    rows = rows_from_logits(logits)
    root = _secular_root(rows)
    value = (root / rows.total()).detach()
    value = inflate(value, 12 * rows.length + 64 + 4 * rows.roundings) + rows.length * SMALLEST_NORMAL
    return cast_up(_attach_gradient(value, rows, root), logits.dtype)


def spectral_norm_upper_from_weights(weights: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of the softmax Jacobian at w / sum(w) for each row, rounded up: exact but for the slack; float64.

    Source: as `spectral_norm_upper`.

    Args:
        weights: given floats, >= 0, with one that is at least 2^-126 in each row; carries no gradient.
    """
    rows = Rows(weights.detach().double(), 0)
    return inflate(_secular_root(rows) / rows.total(), 12 * rows.length + 64)


@dc.dataclass(frozen=True, slots=True)
class _Secular:
    """The data of the secular equation: the two largest weights, and the rest relative to the second."""

    largest: Tensor
    second: Tensor
    rest: Tensor  # all weights but the largest, which is replaced by 0
    distance: Tensor  # second - rest, >= 0
    tail: Tensor  # sum of rest

    @classmethod
    def of(cls, rows: Rows) -> _Secular:
        weights = rows.weights.detach()
        top, indices = Rows(weights, 0).top(2)
        rest = weights.scatter(-1, indices[..., :1], 0.0)
        second = top[..., 1]
        return cls(top[..., 0], second, rest, second.unsqueeze(-1) - rest, rest.sum(-1))

    def ratios(self, x: Tensor) -> Tensor:
        """w_j/(nu - w_j) for every weight but the largest; 0 where the weight is 0."""
        quotient = self.rest / (x.unsqueeze(-1) + self.distance)
        return torch.where(self.rest > 0, quotient, 0.0)

    def fixed_point(self, excess: Tensor) -> Tensor:
        """T as a function of A, `excess`; its limit is w_1 as A grows."""
        return torch.where(excess.isfinite(), self.largest * (excess / (self.largest + excess)), self.largest)


def _secular_root(rows: Rows) -> Tensor:
    """nu >= the root of the secular equation, above it by a relative error of order n * 2**-53; no gradient."""
    equation = _Secular.of(rows)
    gap = equation.largest - equation.second
    x = equation.second * gap / (equation.largest + equation.second)
    for _ in range(NEWTON_STEPS):
        x = _newton_step(equation, x)
    slack = (4 * rows.length + 32) * UNIT_ROUNDOFF
    x = (x - slack * (equation.second + x)).clamp(min=0)
    excess = equation.tail + (equation.rest * equation.ratios(x)).sum(-1)
    return torch.minimum(equation.fixed_point(excess), equation.largest)


def _newton_step(equation: _Secular, x: Tensor) -> Tensor:
    """One Newton step on K, written so that only the residual T - nu is a difference."""
    ratios = equation.ratios(x)
    excess = equation.tail + (equation.rest * ratios).sum(-1)
    root = equation.second + x
    # psi = A/nu and |psi'| = sum w_j/(nu - w_j)^2.
    slope = torch.where(ratios > 0, ratios.square() / equation.rest, 0.0).sum(-1)
    residual = (equation.largest + excess) * (equation.fixed_point(excess) - root) / excess
    step = residual / (1 + equation.largest * slope * (root / excess).square())
    # A row with one non-zero weight, or with two equal largest ones, is at its root already: 0/0 there.
    moved = torch.where(step.isfinite(), x + step, x)
    return torch.minimum(moved.clamp(min=0), equation.largest - equation.second)


def _attach_gradient(value: Tensor, rows: Rows, root: Tensor) -> Tensor:
    """`value` with the gradient of the eigenvalue: that of u^T J(p) u at the fixed eigenvector u (Hellmann-Feynman).

    The eigenvector is v_j = w_j/(w_j - nu). J is blind to constants, so u = v - v_1 serves; then only the small weights
    contribute and the gradient, too, is free of cancellation at one-hot rows.
    """
    if not rows.weights.requires_grad:
        return value
    equation = _Secular.of(rows)
    top, indices = Rows(rows.weights.detach(), 0).top(2)
    x = (root - equation.second).clamp(min=0)
    vector = -equation.ratios(x) * (equation.largest - root).unsqueeze(-1)
    vector = vector.scatter(-1, indices[..., :1], top[..., :1])
    # Two largest weights that are equal, or so close that nu - w_2 is nothing but rounding: v = e_1 - e_2.
    close = (x <= 0) | (equation.largest - equation.second <= NEARLY_TIED * equation.largest)
    tied = close.unsqueeze(-1) & (top[..., 1:] > 0)
    pair = torch.zeros_like(vector).scatter(-1, indices[..., :1], 1.0)
    if indices.shape[-1] > 1:
        pair = pair.scatter(-1, indices[..., 1:], -1.0)
    vector = torch.where(tied, pair, vector)
    vector = vector / vector.norm(dim=-1, keepdim=True)
    shifted = vector - vector.gather(-1, indices[..., :1])
    probabilities = rows.weights / rows.total().unsqueeze(-1)
    quotient = (probabilities * shifted.square()).sum(-1) - (probabilities * shifted).sum(-1).square()
    return value + (quotient - quotient.detach())
