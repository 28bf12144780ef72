r"""Spectral norms of matrices and of products of matrices, rounded up.

The norm of F_1 F_2 ... F_k is the square root of the largest eigenvalue of the smaller Gram matrix, after a tall first
factor and a wide last factor have been replaced by their triangular QR factors, which leaves the norm alone: for the
D x d weights of a head the eigenproblem is d x d, never D x D.

Rounding, all relative to the product of Frobenius norms, which absorbs any cancellation inside the product:
matrix products cost gamma(sum of inner sizes) (Higham 2002, section 3.5), a Householder QR of an m x k factor
gamma(c m k) with a small c (ibid., Theorem 19.4; 8 is taken), the Gram matrix gamma(inner size) of its own squared
Frobenius norm, the symmetric eigensolver 16 r u of the Gram matrix's norm (LAPACK Users' Guide, section 4.7, with
p(r) = 16 r)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


def spectral_norm_upper(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of a float64 matrix, rounded up; differentiable, with a subgradient where singular values tie.

    Args:
        matrix: finite float64 entries.
    """
    return product_norm_upper(matrix)


def product_norm_upper(*factors: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Spectral norm of the exact product of float64 matrices, rounded up; batch dimensions broadcast.

    The product of the given floats is meant, not the rounded product, so the value is an upper bound also where the
    factors cancel. Differentiable: the gradient is that of the norm of (F_1 ... F_k v) at the top right singular
    vector v, held fixed.

    Args:
        *factors: one or more matrices whose inner sizes match.
    """
    needs_gradient = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    detached = [factor.detach() for factor in factors]
    scales = [power_of_two(factor) for factor in detached]
    scaled = [factor / scale for factor, scale in zip(detached, scales, strict=True)]
    value = _product([scale[..., 0, 0] for scale in scales]) * _scaled_norm(scaled)
    if not needs_gradient:
        return value
    image = _top_right_vector(scaled)
    for factor in reversed(factors):
        image = factor @ image
    stretch = image.squeeze(-1).norm(dim=-1)
    return value + (stretch - stretch.detach())


def row_norms_upper(*factors: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Euclidean norm of each row of the exact product of float64 matrices, rounded up; batch dimensions broadcast.

    Rounding: gamma(inner sizes) times the norm of the row of the first factor and the Frobenius norms of the others.

    Args:
        *factors: one or more matrices whose inner sizes match.
    """
    row = _chain(factors)
    norms = vector_norm(row)
    operations = 2 * sum(factor.shape[-2] for factor in factors[1:]) + row.shape[-1] + 8
    size = vector_norm(factors[0])
    for factor in factors[1:]:
        size = size * vector_norm(factor.flatten(-2)).unsqueeze(-1)
    return inflate(norms + gamma(operations) * size.detach(), operations)


def vector_norm(values: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch"]:
    """Euclidean norm whose squares neither overflow nor vanish; rounded to nearest, with gradient 0 at 0.

    Scaled by a power of two, which costs no rounding: length + 1 of them remain.

    Args:
        values: float64, may be infinite.
    """
    scale = power_of_two(values.detach().nan_to_num(posinf=1.0).unsqueeze(-1)).squeeze(-1)
    return (values / scale).norm(dim=-1) * scale.squeeze(-1)


def root(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0.

    Args:
        squares: >= 0.
    """
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _scaled_norm(factors: Sequence[Tensor]) -> Tensor:
    """The norm rounded up, for factors with entries of order 1 (so that squares neither overflow nor vanish)."""
    left, right = _is_tall(factors), _is_wide(factors)
    shrunk = [*factors]
    if left:
        shrunk[0] = torch.linalg.qr(factors[0], mode="r").R
    if right:
        shrunk[-1] = torch.linalg.qr(factors[-1].mT, mode="r").R.mT
    operations = sum(factor.shape[-1] for factor in factors[:-1]) + 2 * len(factors)
    operations += 8 * (left * math.prod(factors[0].shape[-2:]) + right * math.prod(factors[-1].shape[-2:]))
    error = 0.0
    if len(factors) > 1:
        error = 2 * gamma(operations) * _product([factor.square().sum((-2, -1)).sqrt() for factor in factors])
    gram, length = _gram(_chain(shrunk))
    largest = torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # the squared Frobenius norm
    square = largest * (1 + 16 * gram.shape[-1] * UNIT_ROUNDOFF) + 2 * gamma(length + 2) * trace
    return inflate(square.sqrt() + error, 8)


def _top_right_vector(factors: Sequence[Tensor]) -> Tensor:
    """Unit top right singular vector of the product, as a column; zero where the product is zero."""
    shrunk, basis = [*factors], None
    if _is_tall(factors):
        shrunk[0] = torch.linalg.qr(factors[0], mode="r").R
    if _is_wide(factors):
        basis, triangle = torch.linalg.qr(factors[-1].mT)
        shrunk[-1] = triangle.mT
    product = _chain(shrunk)
    gram, _ = _gram(product)
    top = torch.linalg.eigh(gram).eigenvectors[..., -1:]
    vector = product.mT @ top if product.shape[-2] <= product.shape[-1] else top
    norm = vector.norm(dim=(-2, -1), keepdim=True)
    vector = torch.where(norm > 0, vector / torch.where(norm > 0, norm, 1.0), 0.0)
    return vector if basis is None else basis @ vector


def _is_tall(factors: Sequence[Tensor]) -> bool:
    return len(factors) > 1 and factors[0].shape[-2] > factors[0].shape[-1]


def _is_wide(factors: Sequence[Tensor]) -> bool:
    return len(factors) > 1 and factors[-1].shape[-1] > factors[-1].shape[-2]


def _gram(matrix: Tensor) -> tuple[Tensor, int]:
    """The smaller Gram matrix and the length of its sums."""
    rows, cols = matrix.shape[-2:]
    return (matrix @ matrix.mT, cols) if rows <= cols else (matrix.mT @ matrix, rows)


def _chain(factors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.matmul, factors)


def _product(values: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, values)


def power_of_two(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch 1 1"]:
    """The power of two below the largest entry: dividing by it is exact; 1 for the zero matrix.

    Args:
        matrix: finite entries.
    """
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, torch.exp2(torch.log2(torch.where(largest > 0, largest, 1.0)).floor()), 1.0)
