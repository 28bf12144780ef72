"""Norms of coefficients of Taylor models, rounded up: of views of a value, and of the forms of its second order."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import Coefficient, norm_upper
from lipbounds.compose.taylor.second import as_matrices
from lipbounds.ops.spectral import power_of_two, spectral_norm_upper
from lipbounds.rounding import gamma, inflate


LARGEST_EIGENPROBLEM = 320  # beyond this side, the Schatten 8-norm stands in for the spectral norm


def view_norms(part: Coefficient, dims: int) -> Float[Tensor, "*lead"]:
    """Spectral norm, rounded up, of the exact coefficient restricted to each view.

    Args:
        part: the coefficient.
        dims: how many trailing axes a view has.
    """
    if dims == 0:
        return part.sizes
    shape = part.error.shape
    lead = shape[: len(shape) - dims]
    matrix = part.matrix.reshape(part.matrix.shape[0], *lead, -1).movedim(0, -1)
    error = norm_upper(part.error.reshape(*lead, -1))
    return inflate(spectral_upper(matrix) + error, 4)


def spectral_upper(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Spectral norm rounded up; of large matrices the Schatten 8-norm, which is at least that.

    Args:
        matrix: finite.
    """
    side = min(matrix.shape[-2:])
    if side <= LARGEST_EIGENPROBLEM:
        return spectral_norm_upper(matrix) if side > 1 else norm_upper(matrix.flatten(-2))
    return schatten_upper(matrix)


def schatten_upper(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """The Schatten 8-norm rounded up, which is at least the spectral norm.

    With G = M M^T, ||M||^4 = ||G^2|| <= ||G^2||_F. The computed G is off by e = gamma(l) ||M||_F^2 in Frobenius norm,
    so G^2 by 2 e ||M||_F^2 + e^2, and the product of the computed matrices by gamma(n) ||G||_F^2.

    Args:
        matrix: finite.
    """
    rows, cols = matrix.shape[-2:]
    side, length = min(rows, cols), max(rows, cols)
    scale = power_of_two(matrix)
    scaled = matrix / scale
    gram = scaled @ scaled.mT if rows <= cols else scaled.mT @ scaled
    size, gram_size = norm_upper(scaled.flatten(-2)), norm_upper(gram.flatten(-2))
    slack = gamma(side + 8) * gram_size.square() + 3 * gamma(length + 8) * size.square().square()
    fourth = norm_upper((gram @ gram).flatten(-2)) + slack
    return inflate(fourth.sqrt().sqrt() * scale[..., 0, 0], 16)


def form_norms(part: Coefficient) -> Float[Tensor, "*shape"]:
    """Bound on the largest |h^T S h|, |h| <= 1, of the form of every entry.

    Args:
        part: with a column for every pair of inputs.
    """
    if not bool(part.matrix.any()):  # in front of the first product, where no value bends yet
        return part.sizes
    matrices, error = as_matrices(part)
    return torch.minimum(part.sizes, inflate(schatten_upper(matrices) + error, 4))
