"""A lower bound on the norm of the Jacobian from one direction, whatever produced that direction."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.estimators._operator import JacobianOperator
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import gamma, inflate


def attained(
    operator: JacobianOperator, direction: Float[Tensor, "*batch size"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Lower bound sigma = ||J v|| / ||v|| on the norm of J, rounded down, and the relative residual of v.

    Promise: sigma is at most the exact norm. For an `Attention` the rounding of J v is bounded entry by entry
    (`targets/attention_roundoff.py`) and subtracted; for a `Network` its own arithmetic is taken as exact.

    Args:
        operator: the Jacobian.
        direction: v, on the smaller side; not zero.

    Returns:
        sigma, and ||A v - sigma^2 v|| / (sigma^2 ||v||) with A = J^T J or J J^T: some eigenvalue of A lies within
        that relative distance of sigma^2. Both are 0 where J v is; the residual is infinite where it overflows.
    """
    v = operator.representable(direction)
    image = operator.stretch(v)
    length = torch.linalg.vector_norm(v, dim=-1)
    # J v may be far above the scale, which one random direction gave: then squares overflow.
    stretched = vector_norm(image)
    certain = stretched * (1 - 2 * gamma(image.shape[-1] + 4)) - operator.stretch_error(v)
    sigma = certain.clamp(min=0) / inflate(length, v.shape[-1] + 8)
    eigenvalue = (stretched / length).square()[..., None]
    defect = torch.linalg.vector_norm(operator.gram(v) - eigenvalue * v, dim=-1)
    size = eigenvalue.squeeze(-1) * length
    residual = torch.where(size > 0, defect / torch.where(size > 0, size, 1.0), 0.0)
    residual = torch.where(size.isfinite() & defect.isfinite(), residual, torch.inf)
    return sigma * operator.scale, residual
