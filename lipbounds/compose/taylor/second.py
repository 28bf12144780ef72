r"""The second order of a value as one more coefficient, with a column for every pair of inputs.

Where the input is small, a value is followed to second order,

    X(x0 + h) = c + C h + D[h, h] + sum_s T_s t_s(h),

D half the Hessian at the centre and t_s what an operation adds beyond its own second order (of third order in h). D is
a linear function of the vector p(h) of the products h_a^2 and 2^(1/2) h_a h_b for a < b, and |p(h)| = |h|^2: so D is a
coefficient like any T_s, and p(h) the remainder that it multiplies, known to lie in the ball of radius r^2. Later
operations multiply it by their Jacobian and add their own B[h, h] to it, so that what they do to each other cancels,
where bounds on each B_s alone would add up.

Of one entry, D[h, h] is h^T S h with S symmetric and ||S||_F the norm of its row, so it is at most r^2 ||S||; the
Schatten 8-norm bounds ||S||. A row known up to e gives S up to e in the Frobenius norm.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import Coefficient, Product
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


SECOND = "second"
LARGEST_SQUARE = 127  # inputs: beyond it, there are too many pairs


def pairs(inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs a <= b of inputs, as two rows of indices.

    Args:
        inputs: how many.
        device: of the indices.
    """
    first, second = torch.triu_indices(inputs, inputs, device=device)
    return first, second


def products(one: Coefficient, other: Coefficient, multiply: Product, terms: int) -> Coefficient:
    """The quadratic form (A h)(B h), summed as `multiply` says, as a coefficient of pairs.

    The symmetric part of a matrix is no longer than it, in the Frobenius norm, and |a b^T|_F = |a| |b|. So rows a and b
    known up to e and f give it up to |a| f + e |b|, as for numbers.

    Args:
        one: A, with a column for every input.
        other: B.
        multiply: bilinear in the entries of both, with weights >= 0; both arguments have columns in front.
        terms: roundings in a row in each sum.
    """
    inputs = len(one.matrix)
    first, second = pairs(inputs, one.matrix.device)
    if one is other and multiply is torch.mul:
        matrix = one.matrix[first] * one.matrix[second]
        matrix = matrix * _weights(first, second, one.matrix, math.sqrt(2.0), 1.0)
    else:
        table = multiply(one.matrix.unsqueeze(1), other.matrix.unsqueeze(0))
        matrix = table[first, second] + table[second, first]
        matrix = matrix * _weights(first, second, matrix, math.sqrt(0.5), 0.5)
    lost = multiply(one.error.unsqueeze(0), other.sizes) + multiply(one.sizes.unsqueeze(0), other.error)
    lost = lost + gamma(terms + 4) * multiply(one.sizes.unsqueeze(0), other.sizes)
    return Coefficient(matrix, inflate(lost.squeeze(0), terms + 12))


def _weights(first: Tensor, second: Tensor, like: Tensor, apart: float, equal: float) -> Tensor:
    """One factor for every pair, to be multiplied to a coefficient."""
    weights = torch.full_like(first, apart, dtype=like.dtype).masked_fill(first == second, equal)
    return weights.reshape(-1, *[1] * (like.dim() - 1))


def no_second(inputs: int, like: Tensor) -> Coefficient:
    """A second order of 0.

    Args:
        inputs: how many.
        like: of the shape of the value.
    """
    return Coefficient(like.new_zeros(inputs * (inputs + 1) // 2, *like.shape), torch.zeros_like(like))


def as_matrices(part: Coefficient) -> tuple[Float[Tensor, "*shape inputs inputs"], Float[Tensor, "*shape"]]:
    """S of every entry, and its error in the Frobenius norm.

    Args:
        part: with a column for every pair.
    """
    inputs = (math.isqrt(8 * len(part.matrix) + 1) - 1) // 2
    first, second = pairs(inputs, part.matrix.device)
    rows = part.matrix * _weights(first, second, part.matrix, math.sqrt(0.5), 1.0)
    found = part.matrix.new_zeros(*part.matrix.shape[1:], inputs, inputs)
    found[..., first, second] = found[..., second, first] = rows.movedim(0, -1)
    return found, inflate(part.error + 3 * UNIT_ROUNDOFF * part.sizes, 4)
