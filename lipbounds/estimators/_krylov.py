"""Lanczos with full re-orthogonalisation, for a batch of symmetric operators at once."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.estimators._operator import sphere
from lipbounds.ops.eigen import eigen
from lipbounds.rounding import UNIT_ROUNDOFF


@runtime_checkable
class Symmetric(Protocol):
    """A batch of positive semidefinite operators on vectors of length `size`."""

    @property
    def size(self) -> int: ...

    @property
    def batch_shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def gram(self, v: Tensor) -> Tensor: ...


def largest_ritz_pair(
    operator: Symmetric, steps: int, seed: int
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch size"]]:
    """Largest Ritz value of each operator over a Krylov space, and its Ritz vector.

    The start vectors are uniform on the sphere, independent across the batch. min(steps, N) operator products are made.

    Where the Krylov space is exhausted early (a zero operator, few distinct eigenvalues), the next vector is drawn at
    random orthogonally to the space and not coupled to it. The space then contains the Krylov space of every higher
    order, since that no longer grows, and the Ritz value is that of the larger space.

    Args:
        operator: such as J^T J or J J^T of a Jacobian, divided by its scale squared.
        steps: the dimension k of the Krylov space; capped at N.
        seed: of the random start.
    """
    generator = torch.Generator().manual_seed(seed)
    size, batch = operator.size, operator.batch_shape
    steps = min(steps, size)
    vector = sphere(batch, size, generator, operator.device)
    basis = vector.new_zeros(*batch, steps, size)
    tridiagonal = vector.new_zeros(*batch, steps, steps)
    largest = vector.new_zeros(batch)
    for k in range(steps):
        basis[..., k, :] = vector
        image = operator.gram(vector)
        tridiagonal[..., k, k] = (image * vector).sum(-1)
        if k + 1 == steps:
            break
        rest = _orthogonalise(image, basis[..., : k + 1, :])
        coupling = torch.linalg.vector_norm(rest, dim=-1)
        largest = torch.maximum(largest, torch.linalg.vector_norm(image, dim=-1))
        exhausted = coupling <= 8 * size * UNIT_ROUNDOFF * largest
        vector = rest / torch.where(exhausted, 1.0, coupling)[..., None]
        if bool(exhausted.any()):
            fresh = _orthogonalise(sphere(batch, size, generator, operator.device), basis[..., : k + 1, :])
            fresh = fresh / torch.linalg.vector_norm(fresh, dim=-1, keepdim=True)
            vector = torch.where(exhausted[..., None], fresh, vector)
        tridiagonal[..., k, k + 1] = tridiagonal[..., k + 1, k] = torch.where(exhausted, 0.0, coupling)
    values, vectors = eigen(tridiagonal)
    return values[..., -1].clamp(min=0), (vectors[..., None, :, -1] @ basis).squeeze(-2)


def _orthogonalise(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` minus its projection on the rows of `basis`; twice is enough (Kahan and Parlett)."""
    for _ in range(2):
        vector = vector - ((vector[..., None, :] @ basis.mT) @ basis).squeeze(-2)
    return vector
