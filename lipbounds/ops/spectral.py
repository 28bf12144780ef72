r"""Spectral norms of matrices and of products of matrices, rounded up.

The norm of F_1 F_2 ... F_k is the square root of the largest eigenvalue of the smaller Gram matrix. Where the first
factor is taller, and the last wider, than an inner size, the factor beside the smallest inner size, or both, are
replaced by their triangular QR factors first, which leaves the norm alone: for the D x d weights of a head the
eigenproblem is d x d, never D x D. What a factor needs for that is kept with it (`Factor`): weights pay for it once.

Rounding, all relative to the product of Frobenius norms, which absorbs any cancellation inside the product:
matrix products cost gamma(sum of inner sizes) (Higham 2002, section 3.5), a Householder QR of an m x k factor
gamma(c m k) with a small c (ibid., Theorem 19.4; 8 is taken), the Gram matrix gamma(inner size) of its own squared
Frobenius norm, the symmetric eigensolver 16 r u of the Gram matrix's norm (LAPACK Users' Guide, section 4.7, with
p(r) = 16 r)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.devices import waits_for
from lipbounds.ops.eigen import basis_and_triangle, eigen, largest_eigenvalue, triangle
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


# Of a product that is taken as computed: what underflow takes off an entry, 2^-1022 a term, is far below its rounding.
SMALLEST_SCALE = 2.0**-900


def spectral_norm_upper(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of a float64 matrix, rounded up; differentiable, with a subgradient where singular values tie.

    Args:
        matrix: float64 entries; where one is not finite, the norm is infinite.
    """
    return product_norm_upper(matrix)


class Factor:
    """A float64 matrix, or a batch of them, with what the norms of its products need of it, made at its first use.

    Args:
        matrix: finite entries.
    """

    def __init__(self, matrix: Float[Tensor, "*batch rows cols"]) -> None:
        self.matrix = matrix

    @cached_property
    def scale(self) -> Float[Tensor, "*batch 1 1"]:
        """A power of two of the size of the largest entry."""
        return power_of_two(self.matrix.detach())

    @cached_property
    def scaled(self) -> Float[Tensor, "*batch rows cols"]:
        """The matrix divided by its scale, which is exact."""
        return self.matrix.detach() / self.scale

    @cached_property
    def size(self) -> Float[Tensor, "*batch"]:
        """Frobenius norm of the scaled matrix."""
        return self.scaled.square().sum((-2, -1)).sqrt()

    @cached_property
    def narrow(self) -> Float[Tensor, "*batch rows rank"]:
        """A square matrix L with L L^T that of the scaled one, which is wide."""
        return triangle(self.scaled.mT).mT

    @cached_property
    def low(self) -> Float[Tensor, "*batch rank cols"]:
        """A square matrix R with R^T R that of the scaled one, which is tall."""
        return triangle(self.scaled)


def product_norm_upper(
    *factors: Float[Tensor, "..."] | Factor,
    before_last: Float[Tensor, "..."] | None = None,
    whole: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """Spectral norm of the exact product of float64 matrices, rounded up; batch dimensions broadcast.

    The product of the given floats is meant, not the rounded product, so the value is an upper bound also where the
    factors cancel. Differentiable: the gradient is that of the norm of (F_1 ... F_k v) at the top right singular
    vector v, held fixed.

    Args:
        *factors: one or more matrices whose inner sizes match; where an entry is not finite, the norm is infinite.
        before_last: the product of all factors but the last where it is at hand, computed in float64 with sums in any
            order; its gradient is not used.
        whole: the same for the product of all factors.
    """
    parts = [factor if isinstance(factor, Factor) else Factor(factor) for factor in factors]
    scale = _product([part.scale for part in parts])
    if not (torch.is_grad_enabled() and any(part.matrix.requires_grad for part in parts)):
        norm = _scaled_norm(parts, _relative(before_last, parts[:-1]), _relative(whole, parts))
        return never_nan(scale[..., 0, 0] * norm)
    norm, image = _scaled_norm_and_vector(parts)
    value = never_nan(scale[..., 0, 0] * norm)
    for part in reversed(parts):
        image = part.matrix @ image
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
    return torch.linalg.vector_norm(values / scale, dim=-1) * scale.squeeze(-1)


def never_nan(upper: Tensor) -> Tensor:
    """Infinity for NaN: what an upper bound is where infinity less, over or times something leaves no number.

    Args:
        upper: upper bounds.
    """
    return torch.where(upper.isnan(), torch.inf, upper)


def root(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0; of NaN, which overflow makes (infinity less infinity), infinity.

    Args:
        squares: >= 0; upper bounds, so that infinity is the only number that NaN may stand for.
    """
    squares = squares.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _relative(computed: Tensor | None, parts: Sequence[Factor]) -> Tensor | None:
    """A product divided by the scales of its factors; where it may have lost digits to underflow None, or, on a device
    of its own, which is not asked, infinity."""
    if computed is None:
        return None
    scale = _product([part.scale for part in parts])
    kept = scale > SMALLEST_SCALE
    if waits_for(scale):
        return torch.where(kept, computed.detach() / scale, torch.inf)
    return computed.detach() / scale if bool(kept.all()) else None


def _scaled_norm(parts: Sequence[Factor], before_last: Tensor | None, whole: Tensor | None) -> Tensor:
    """The norm rounded up, for factors with entries of order 1 (so that squares neither overflow nor vanish)."""
    left, right = _shrunk_side(parts)
    shrunk = [part.scaled for part in parts]
    if left:
        shrunk[0] = parts[0].low
    if right:
        shrunk[-1] = parts[-1].narrow
    if whole is not None and not left | right:
        product = whole
    elif before_last is not None and not left:
        product = before_last @ shrunk[-1]
    else:
        product = _chain(shrunk)
    gram, length = _gram(product)
    return _rounded_up(parts, largest_eigenvalue(gram), gram, length)


def _rounded_up(parts: Sequence[Factor], largest: Tensor, gram: Tensor, length: int) -> Tensor:
    """The norm of the product from the largest eigenvalue of its Gram matrix as computed, with the rounding of both."""
    left, right = _shrunk_side(parts)
    operations = sum(part.matrix.shape[-1] for part in parts[:-1]) + 2 * len(parts)
    operations += 8 * (left * math.prod(parts[0].matrix.shape[-2:]) + right * math.prod(parts[-1].matrix.shape[-2:]))
    error = 0.0
    if len(parts) > 1:
        error = 2 * gamma(operations) * _product([part.size for part in parts])
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # the squared Frobenius norm
    square = largest * (1 + 16 * gram.shape[-1] * UNIT_ROUNDOFF) + 2 * gamma(length + 2) * trace
    return inflate(square.sqrt() + error, 8)


def _scaled_norm_and_vector(parts: Sequence[Factor]) -> tuple[Tensor, Tensor]:
    """`_scaled_norm`, and the unit top right singular vector of the product, as a column; zero where that is zero."""
    left, right = _shrunk_side(parts)
    shrunk, basis = [part.scaled for part in parts], None
    if left:
        shrunk[0] = parts[0].low
    if right:
        basis, low = basis_and_triangle(parts[-1].scaled.mT)
        shrunk[-1] = low.mT
    product = _chain(shrunk)
    gram, length = _gram(product)
    values, vectors = eigen(gram)
    # A solver of another device is not taken at its word.
    largest = largest_eigenvalue(gram) if waits_for(gram) else values[..., -1].clamp(min=0)
    top = vectors[..., -1:]
    vector = product.mT @ top if product.shape[-2] <= product.shape[-1] else top
    norm = vector.norm(dim=(-2, -1), keepdim=True)
    vector = torch.where(norm > 0, vector / torch.where(norm > 0, norm, 1.0), 0.0)
    return _rounded_up(parts, largest, gram, length), vector if basis is None else basis @ vector


def _shrunk_side(parts: Sequence[Factor]) -> tuple[bool, bool]:
    """Whether the first factor, and the last one, are replaced by their triangles.

    A triangle has the inner size beside it as its outer one. Where a side of the product is the smallest size already,
    nothing is; elsewhere the factor beside the smallest inner size is, and the other one if that pays for its QR.
    """
    if len(parts) == 1:
        return False, False
    rows, first = parts[0].matrix.shape[-2:]
    last, cols = parts[-1].matrix.shape[-2:]
    smallest = min(rows, cols, first, last)
    if smallest in (rows, cols):
        return False, False
    items = math.prod(broadcast_shape(part.matrix.shape[:-2] for part in parts))
    if last == smallest:
        return _pays(parts[0].matrix, rows, first, smallest, items), True
    return True, _pays(parts[-1].matrix, cols, last, smallest, items)


def _pays(matrix: Tensor, outer: int, inner: int, smallest: int, items: int) -> bool:
    """Whether a QR of a factor costs less than what its long side costs the products and Gram matrices of all items."""
    return outer > inner and 2 * matrix.numel() * inner < items * (outer - inner) * smallest * (inner + smallest)


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
