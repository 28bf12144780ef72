"""The spectral norm of an explicit matrix, verified from above.

A Cholesky factorisation of tau I - M^T M that runs to its end in floating point proves that ||M||^2 is at most tau plus
a bound on its rounding (Higham 2002, Theorem 10.3; Rump 2006). No trust in the eigensolver that proposes tau is needed.
Proof: docs/functions.md, section 6.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.ops.eigen import largest_eigenvalue, try_cholesky
from lipbounds.ops.spectral import power_of_two
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


MAX_TRIES = 60


def verified_norm(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Upper bound on the spectral norm of the given floats; above the exact norm by a relative 1e-15 N^2 at most.

    Args:
        matrix: float64.

    Raises:
        InvalidInput: an entry is NaN or infinite.
    """
    if not bool(matrix.isfinite().all()):
        raise InvalidInput("the Jacobian must be finite, got entries that are not; rescale the weights or the input.")
    scale = power_of_two(matrix)
    scaled = matrix / scale
    rows, cols = matrix.shape[-2:]
    gram = scaled @ scaled.mT if rows <= cols else scaled.mT @ scaled
    return norm_of_gram(gram, max(rows, cols)) * scale[..., 0, 0]


def norm_of_gram(gram: Float[Tensor, "*batch size size"], length: int) -> Float[Tensor, "*batch"]:
    """Upper bound on the spectral norm of a matrix of floats, from its Gram matrix as computed.

    Args:
        gram: inner products of its rows, or of its columns, whichever are fewer; finite, not below 1e-150 in size.
        length: of these rows or columns.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    # |fl(G) - G| <= gamma(length) |M|^T |M|, and the norm of that is at most the squared Frobenius norm of M.
    product_error = 2 * gamma(length + gram.shape[-1]) * trace
    square = inflate(_verified_eigenvalue(gram) + product_error, 4)
    return torch.where(trace > 0, inflate(square.sqrt(), 4), 0.0)


def _verified_eigenvalue(gram: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch"]:
    """Upper bound on the largest eigenvalue of a symmetric matrix, whose lower triangle is read."""
    size = gram.shape[-1]
    theta = largest_eigenvalue(gram).clamp(min=torch.finfo(torch.float64).tiny)
    excess = torch.full_like(theta, 8 * size * UNIT_ROUNDOFF)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    for _ in range(MAX_TRIES):
        tau = theta * (1 + excess)
        failed = ~try_cholesky(tau[..., None, None] * identity - gram)[1]
        if not bool(failed.any()):
            return tau * (1 + 2 * size * gamma(size + 2) + 4 * UNIT_ROUNDOFF)
        excess = torch.where(failed, 2 * excess, excess)
    raise InvalidInput("the norm of the Jacobian could not be verified; its entries span too many orders of magnitude.")
