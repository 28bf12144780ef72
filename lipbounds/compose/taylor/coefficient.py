r"""Matrices known row by row: the coefficients of a Taylor model, with what rounding took from them.

A coefficient holds floats a_{kj}, one row (over k, the columns of the model) for every entry j of a value, and promises
that the exact row is within `error` of them: |a*_j - a_j|_2 <= e_j. With s_j >= |a_j|_2 + e_j its size, the rules are

- sum of entries with fixed weights w of the given floats, t terms: e' = sum |w| e + gamma(t) sum |w| s;
- product with numbers b known up to f, |b| + f <= B, summed over t terms: e' = sum (B e + s f) + gamma(t) sum B s;
- rearranging entries costs nothing.

The computed row of a sum of t terms is off by gamma(t) sum |w_j| |a_kj| in column k (Higham 2002, section 3.1), and by
the triangle inequality in l2 over k that is at most gamma(t) sum_j |w_j| |a_j|_2. Every right-hand side is a sum of
products of numbers >= 0, which is inflated by its own roundings.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops import eigen
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


Map = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]
TINY = 1e-150  # above what squares lose to underflow in a norm of fewer than 1e12 entries


def norm_upper(values: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch"]:
    """Euclidean norm over the last axis, rounded up.

    Squares below the smallest float lose at most 2^-1074 each, so the root at most sqrt(length) 2^-537 < TINY.

    Args:
        values: float64; NaN and infinity give infinity.
    """
    squares = values.square().sum(-1)
    return inflate(squares.sqrt(), values.shape[-1] + 4).nan_to_num(nan=torch.inf) + TINY


@dc.dataclass(frozen=True, eq=False)
class Coefficient:
    """Rows of floats with a bound on how far the exact rows are.

    Args:
        matrix: one row for every entry: the columns of the model come first.
        error: l2 distance of each row to the exact one, at most.
    """

    matrix: Float[Tensor, " columns *shape"]
    error: Float[Tensor, "*shape"]

    @cached_property
    def sizes(self) -> Float[Tensor, "*shape"]:
        """Bound on the l2 norm of each row, of the floats and of the exact one."""
        return inflate(norm_upper(self.matrix.movedim(0, -1)) + self.error, 2)

    def arranged(self, rearrange: Map) -> Coefficient:
        """Entries moved, repeated, dropped, or zeros put beside them.

        Args:
            rearrange: acts on the trailing axes, whatever stands before them.
        """
        return Coefficient(rearrange(self.matrix), rearrange(self.error.unsqueeze(0)).squeeze(0))

    def summed(self, weigh: Map, absolute: Map, terms: int) -> Coefficient:
        """Sums of entries with fixed weights.

        Args:
            weigh: the sums, on the trailing axes, whatever stands before them.
            absolute: the same with the absolute values of the weights.
            terms: roundings in a row in each sum.
        """
        lost = absolute((self.error + gamma(terms) * self.sizes).unsqueeze(0)).squeeze(0)
        return Coefficient(weigh(self.matrix), inflate(lost, terms + 8))

    def times(self, other: Coefficient, multiply: Product, terms: int) -> Coefficient:
        """The product with one known row of numbers.

        Args:
            other: with one column.
            multiply: bilinear in the entries of both, with weights >= 0; the first argument has the columns in front.
            terms: roundings in a row in each sum.
        """
        mine, theirs = self.sizes.unsqueeze(0), other.sizes
        lost = multiply(self.error.unsqueeze(0), theirs) + multiply(mine, other.error)
        lost = lost + gamma(terms) * multiply(mine, theirs)
        return Coefficient(multiply(self.matrix, other.matrix[0]), inflate(lost.squeeze(0), terms + 12))

    def plus(self, other: Coefficient) -> Coefficient:
        """The sum with a coefficient of the same columns.

        Args:
            other: of the same shape.
        """
        error = self.error + other.error + UNIT_ROUNDOFF * (self.sizes + other.sizes)
        return Coefficient(self.matrix + other.matrix, inflate(error, 6))

    def shifted(self, constants: Tensor) -> Coefficient:
        """Given floats added to every column.

        Args:
            constants: broadcast to the shape.
        """
        matrix = self.matrix + constants
        return Coefficient(matrix, inflate(self.error + 2 * UNIT_ROUNDOFF * matrix.abs().amax(0), 4))


def exact(matrix: Float[Tensor, " columns *shape"]) -> Coefficient:
    """Given floats.

    Args:
        matrix: the floats.
    """
    return Coefficient(matrix, torch.zeros_like(matrix[0]))


def weighted_product(
    one: Coefficient, other: Coefficient, weights: Float[Tensor, "rows entries"], weight_error: Tensor
) -> tuple[Float[Tensor, "rows left right"], Float[Tensor, " rows"]]:
    """sum_i w_i a_i b_i^T over the entries of two coefficients, and a bound on its error in the Frobenius norm.

    Args:
        one: a, one row for every entry.
        other: b.
        weights: w, as computed, for several functionals.
        weight_error: of every weight.
    """
    left, right = one.matrix.flatten(1), other.matrix.flatten(1)
    size, other_size = one.sizes.flatten(), other.sizes.flatten()
    if len(right) <= len(left):  # the weights go to the side with fewer columns
        matrices = left @ (right * weights.unsqueeze(1)).mT
    else:
        matrices = (left * weights.unsqueeze(1)) @ right.mT
    both = size * other_size
    lost = one.error.flatten() * other_size + size * other.error.flatten() + gamma(len(size) + 8) * both
    return matrices, inflate(weights.abs() @ lost + weight_error @ (both + lost), len(size) + 16)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    """Of positive semidefinite matrices, rounded up for the solver (LAPACK Users' Guide, section 4.7)."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)
    side = gram.shape[-1]
    top = inflate(eigen.largest_eigenvalue(gram) + 16 * side * UNIT_ROUNDOFF * trace, 8)
    return torch.where(top.isnan(), torch.inf, top)
