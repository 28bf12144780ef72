"""Spectral norm of a matrix of non-negative entries, from products with vectors.

For A >= 0 and any vector v > 0, Collatz (1942) and Wielandt (1950): ||A||^2 <= max_j (A^T A v)_j / v_j. It holds
whatever v is, so v comes from the power method, whose ratio falls at every step. |A v|^2 / |v|^2 is a lower bound:
where the two have met, the number is the norm; elsewhere the Gram matrix is taken apart, as for any other matrix.
Proof and rounding: docs/functions.md, section 6.

On a device of its own nobody asks whether they have met, which would make the host wait: small matrices are taken apart
in any case, and larger ones get the upper bound after all the steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lipbounds.devices import waits_for
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.rounding import inflate


SMALLEST_NORMAL = torch.finfo(torch.float64).tiny
STEPS = 24  # of the power method: together far cheaper than an eigenvalue problem of the same size
LARGE = 256  # rows and columns from which one costs more than three times as many steps
CHECK_EVERY = 2  # steps between two looks at how far the bounds have met
MET = 1e-11  # relative distance of upper and lower bound, and so of the vector from the singular vector


def nonnegative_norm_upper(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Spectral norm of a float64 matrix of non-negative entries, rounded up; differentiable.

    Within a relative 2e-11 of the norm, and the rounding of sums; on a device of its own, for 256 rows and columns or
    more, above it by what the power method has left after 72 steps. O(rows cols) where the power method gets there,
    else as `spectral_norm_upper`.

    Args:
        matrix: finite entries, >= 0, of at most about 1: attention maps.
    """
    waits = waits_for(matrix)
    if waits and min(matrix.shape[-2:]) < LARGE:
        return spectral_norm_upper(matrix)
    with torch.no_grad():
        vector, upper, met = _power(matrix.detach())
    if not waits and not bool(met.any()):
        return spectral_norm_upper(matrix)
    stretch = (vector @ matrix.mT).norm(dim=(-2, -1)) / vector.norm(dim=(-2, -1))
    value = upper + (stretch - stretch.detach())
    if waits or bool(met.all()):
        return value
    # Only those matrices that need it are taken apart.
    exact = torch.zeros_like(value).masked_scatter(~met, spectral_norm_upper(matrix[~met]))
    return torch.where(met, value, exact)


def _power(
    matrix: Float[Tensor, "*batch rows cols"],
) -> tuple[Float[Tensor, "*batch one cols"], Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """A positive vector as a row, the upper bound it gives, and whether that is the norm."""
    columns = matrix.sum(-2, keepdim=True)
    seen = columns > 0  # a column of zeros adds nothing to A^T A: its entry of the vector does not matter
    vector = torch.where(seen, columns / columns.amax(-1, keepdim=True).clamp(min=SMALLEST_NORMAL), 1.0)
    waits = waits_for(matrix)
    steps = STEPS if min(matrix.shape[-2:]) < LARGE else 3 * STEPS
    for step in range(1, steps + 1):
        image = vector @ matrix.mT
        again = image @ matrix
        if step == steps or (not waits and step % CHECK_EVERY == 1):
            upper, met = _bracket(vector, image, again, seen)
            if step == steps or bool(met.all()):
                return vector, upper, met
        largest = again.amax(-1, keepdim=True)
        vector = torch.where(again > 0, again / largest.clamp(min=SMALLEST_NORMAL), vector)
    raise AssertionError("the last step returns")


def _bracket(vector: Tensor, image: Tensor, again: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The upper bound of the norm, and whether the lower one is as large but for `MET`."""
    rows, cols = image.shape[-1], vector.shape[-1]
    ratio = torch.where(seen, (again + rows * SMALLEST_NORMAL) / vector, 0.0).amax((-2, -1))
    lower = torch.linalg.vector_norm(image, dim=(-2, -1)) / torch.linalg.vector_norm(vector, dim=(-2, -1))
    upper = inflate(inflate(ratio, rows + cols + 4).sqrt(), 2)
    return upper, ratio.sqrt() <= lower * (1 + MET) + SMALLEST_NORMAL
