r"""Norms of sums over heads, from the overlaps of the heads alone.

Let U_1, ..., U_H be matrices with D rows, Omega_hg >= ||U_h^T U_g||, nu >= ||[U_1 ... U_H]||, and c_h >= 0. Then

    || sum_h c_h U_h U_h^T || = || [sqrt(c_h) U_h]_h ||^2 <= min( nu^2 max_h c_h,  lambda_max(sqrt(c_h c_g) Omega_hg) ),

the second because the Gram matrix of the blocks sqrt(c_h) U_h is an array of blocks, whose norm is at most that of the
matrix of norms. The matrix is non-negative and similar to Omega diag(c), so that (Collatz 1942, Wielandt 1950) its
largest eigenvalue is at most max_h (Omega (c v))_h / v_h, whatever v > 0 is; v comes from a few steps of the power
method. No root of c is taken: the value is differentiable where some c_h is 0.

What it is for: a sum of S = sum_h U_h A_h Z_h^T with ||A_h|| <= a_h has, by Cauchy-Schwarz, for any w_h > 0,

    |<y, S x>| <= sum_h a_h |U_h^T y| |Z_h^T x|,
    ||S||^2 <= || sum_h w_h U_h U_h^T || || sum_h (a_h^2 / w_h) Z_h Z_h^T ||.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import inflate


STEPS = 4  # of the power method; each has H^2 products


def mixture_norm_upper(
    weights: Float[Tensor, "*batch rows heads"],
    overlap: Float[Tensor, "*weights heads heads"] | None,
    jointly: Float[Tensor, "*weights"],
) -> Float[Tensor, "*out rows"]:
    """|| sum_h c_h U_h U_h^T ||, rounded up, for each row of weights c; differentiable.

    Args:
        weights: c, non-negative float64.
        overlap: Omega, symmetric; None where the heads have no U of their own.
        jointly: nu.
    """
    largest = weights.amax(-1)
    jointly = jointly.unsqueeze(-1).square() * largest
    if overlap is None:
        return inflate(jointly, 4)
    unit = torch.where(largest > 0, largest, 1.0).detach().unsqueeze(-1)
    relative = weights / unit
    vector = torch.ones_like(relative)
    for _ in range(STEPS):
        image = (relative * vector) @ overlap
        # Any positive vector will do: where underflow left nothing of an entry, 1 is taken.
        vector = torch.where(image > 0, image / image.amax(-1, keepdim=True).clamp(min=1e-300), 1.0)
    ratio = ((relative * vector) @ overlap / vector).amax(-1)
    return inflate(torch.minimum(jointly, ratio * unit.squeeze(-1)), 4 * weights.shape[-1] + 16)
