"""Decompositions of matrices, guarded: the one place that calls those of torch.linalg.

LAPACK and cuSOLVER answer a matrix with an entry that is not finite with an error of their own, with NaN, or with
numbers that mean nothing. Here such a matrix gives infinity where an upper bound is asked for, "failed" where a proof
is tried, NaN where factors are (norms of which are infinite, see lipbounds.ops.spectral), and `Unsupported` where no
such answer exists. Each matrix of a batch is answered for itself.

An eigensolver reads its status from the device, which makes the host wait. On a device of its own the largest
eigenvalue comes from squaring instead: ||B||^2 = ||B B^T||, so with B_0 the matrix over its Frobenius norm s_0, and
B_(k+1) = B_k B_k^T over its own, s_(k+1), the norm is at most s_0 s_1^(1/2) s_2^(1/4) ... s_K^(2^-K), above by a factor
r^(2^-K) at most for a matrix of size r. Rounding: docs/functions.md, section 6.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lipbounds.devices import waits_for
from lipbounds.errors import Unsupported
from lipbounds.rounding import UNIT_ROUNDOFF, gamma


SQUARINGS = 44  # of matrices up to 1e6 rows, the value is above by a relative 1e-12
SOLVER_ERROR = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]  # it is documented


def largest_eigenvalue(matrix: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch"]:
    """Largest eigenvalue of positive semidefinite matrices, as computed, at least 0; infinity where one is not finite.

    Where the solver does not converge, the largest sum of the sizes of a row, which is never below. On a device of its
    own by squaring, never below, unless a gradient is wanted.

    Args:
        matrix: symmetric; the lower triangle is read.
    """
    safe, finite = _finite_or_zero(matrix)
    if waits_for(safe) and not (torch.is_grad_enabled() and safe.requires_grad):
        return torch.where(finite, eigenvalue_by_squaring(safe), torch.inf)
    try:
        largest = torch.linalg.eigvalsh(safe)[..., -1].clamp(min=0)
    except SOLVER_ERROR:
        lower = safe.tril()
        largest = (lower + lower.tril(-1).mT).abs().sum(-1).amax(-1)
    return torch.where(finite, largest, torch.inf)


def eigen(
    matrix: Float[Tensor, "*batch size size"],
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch size size"]]:
    """Eigenvalues in ascending order, as computed, and unit eigenvectors as columns.

    Where a matrix is not finite, its eigenvalues are infinite and its eigenvectors those of the zero matrix.

    Args:
        matrix: symmetric; the lower triangle is read.

    Raises:
        Unsupported: the solver does not converge.
    """
    safe, finite = _finite_or_zero(matrix)
    try:
        values, vectors = torch.linalg.eigh(safe)
    except SOLVER_ERROR as error:
        raise _unconverged(error) from error
    return torch.where(finite.unsqueeze(-1), values, torch.inf), vectors


def singular(
    matrix: Float[Tensor, "*batch rows cols"],
) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch rank"], Float[Tensor, "*batch rank cols"]]:
    """U, s and V^T of the thin decomposition, as computed, with s in descending order.

    Raises:
        Unsupported: an entry is not finite, or the solver does not converge.
    """
    if not bool(matrix.isfinite().all()):
        raise Unsupported("a singular value decomposition needs finite entries, got others; rescale the weights.")
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except SOLVER_ERROR as error:
        raise _unconverged(error) from error
    return u, s, vh


def try_cholesky(
    matrix: Float[Tensor, "*batch size size"],
) -> tuple[Float[Tensor, "*batch size size"], Bool[Tensor, "*batch"]]:
    """The lower triangle L with L L^T the matrix, as computed, and where it ran to its end.

    Where it has not, L is NaN; a matrix that is not finite never does.

    Args:
        matrix: symmetric; the lower triangle is read.
    """
    safe, finite = _finite_or_zero(matrix)
    found = torch.linalg.cholesky_ex(safe)
    ended = finite & (found.info == 0)
    return torch.where(ended[..., None, None], found.L, torch.nan), ended


def triangle(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch rank cols"]:
    """The factor R of Q R, as computed; NaN where the matrix is not finite."""
    safe, finite = _finite_or_zero(matrix)
    return torch.where(finite[..., None, None], torch.linalg.qr(safe, mode="r").R, torch.nan)


def basis_and_triangle(
    matrix: Float[Tensor, "*batch rows cols"],
) -> tuple[Float[Tensor, "*batch rows rank"], Float[Tensor, "*batch rank cols"]]:
    """The factors Q and R, as computed; R is NaN where the matrix is not finite."""
    safe, finite = _finite_or_zero(matrix)
    q, r = torch.linalg.qr(safe)
    return q, torch.where(finite[..., None, None], r, torch.nan)


def eigenvalue_by_squaring(
    matrix: Float[Tensor, "*batch size size"], squarings: int = SQUARINGS
) -> Float[Tensor, "*batch"]:
    """Upper bound on the spectral norm of symmetric matrices, rounding included; see the top of this file.

    Args:
        matrix: finite, float64 or float32, in which it is squared; the lower triangle is read.
        squarings: K.
    """
    unit = torch.finfo(matrix.dtype).eps / 2
    lower = matrix.tril()
    whole = lower + lower.tril(-1).mT
    largest = whole.abs().amax((-2, -1), keepdim=True)
    some, size = largest > 0, whole.shape[-1]
    scaled = torch.where(some, whole / largest, 1.0)  # ones for the zero matrix, times 0 in the end
    sizes = [torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)]
    power = scaled / sizes[0]
    for _ in range(squarings):
        power = power @ power.mT
        sizes.append(torch.linalg.vector_norm(power, dim=(-2, -1), keepdim=True))
        power = power / sizes[-1]
    roots = torch.arange(len(sizes), dtype=torch.float64, device=matrix.device).neg().exp2()
    norm = (torch.cat(sizes, -1).double().log() * roots).sum(-1).exp().to(matrix.dtype)
    slack = (gamma(size + 16) * (size + 2) + gamma(128)) * 2 * unit / UNIT_ROUNDOFF
    return (norm * (1 + slack)).squeeze(-1) * largest[..., 0, 0]


def _finite_or_zero(matrix: Tensor) -> tuple[Tensor, Tensor]:
    finite = matrix.isfinite().flatten(-2).all(-1)
    return torch.where(finite[..., None, None], matrix, 0.0), finite


def _unconverged(error: Exception) -> Unsupported:
    return Unsupported(
        f"the eigensolver does not converge at this input ({error}); rescale the weights, or use another bound."
    )
