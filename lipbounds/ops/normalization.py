"""LayerNorm and RMSNorm of one token without scale and shift: their Jacobians, at a point and on a ball.

With C = I - 1 1^T / D for LayerNorm and C = I for RMSNorm, v = C x and sigma = sqrt(|v|^2 / D + e), the output is
z = v / sigma, and the Jacobian N(x) = ( C - z z^T / D ) / sigma, of norm 1/sigma where there is a direction orthogonal
to z. On a ball of radius r, sigma' >= sqrt( max(0, |v| - r)^2 / D + e ), and N moves by at most (2 / sqrt 3)
(r / sqrt D) / (smallest sigma')^2. Proof and rounding: docs/functions.md, section 5.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import gamma, inflate


@dc.dataclass(frozen=True, slots=True)
class NormalizationRange:
    """What is known of a normalisation on a ball around each token.

    Args:
        norm: upper bound on the norm of the Jacobian over the ball.
        deviation: upper bound on how far the Jacobian is from the computed one at the centre, in norm.
    """

    norm: Float[Tensor, "*tokens"]
    deviation: Float[Tensor, "*tokens"]


def normalize(x: Float[Tensor, "*tokens dim"], epsilon: float, *, centred: bool) -> Float[Tensor, "*tokens dim"]:
    """z, the output without scale and shift.

    Args:
        x: tokens.
        epsilon: e, added to the variance (LayerNorm) or the mean square (RMSNorm).
        centred: take the mean off first: LayerNorm; otherwise RMSNorm.
    """
    v = _moved(x, centred)
    return v / (v.square().mean(-1, keepdim=True) + epsilon).sqrt()


def normalization_jacobian(
    x: Float[Tensor, "*tokens dim"], epsilon: float, *, centred: bool
) -> Float[Tensor, "*tokens dim dim"]:
    """N(x) as computed; its rounding is covered by the deviation of `normalization_range`.

    Args:
        x: tokens, in float64.
        epsilon: e.
        centred: LayerNorm; otherwise RMSNorm.
    """
    dim = x.shape[-1]
    v = _moved(x, centred)
    sigma = (v.square().mean(-1, keepdim=True) + epsilon).sqrt()
    z = v / sigma
    kept = torch.eye(dim, dtype=x.dtype, device=x.device)
    kept = kept - 1 / dim if centred else kept
    return (kept - z.unsqueeze(-1) * z.unsqueeze(-2) / dim) / sigma.unsqueeze(-1)


def normalization_range(
    x: Float[Tensor, "*tokens dim"], radius: Float[Tensor, "*tokens"], epsilon: float, *, centred: bool
) -> NormalizationRange:
    """Norm and movement of the Jacobian over the balls |x' - x| <= radius of the tokens, rounded up.

    Args:
        x: tokens, in float64.
        radius: one for each token, >= 0, may be infinite.
        epsilon: e, >= 0; with 0 the values are infinite where the deviation of the token may vanish.
        centred: LayerNorm; otherwise RMSNorm.
    """
    dim = x.shape[-1]
    error = 2 * gamma(dim + 4) * math.sqrt(dim) * x.abs().amax(-1) if centred else torch.zeros_like(radius)
    length = vector_norm(_moved(x, centred))
    slack = 2 * gamma(dim + 8)
    reach = radius + error
    shortest = (length * (1 - slack) - reach * (1 + slack)).clamp(min=0)
    square = (shortest.square() / dim + epsilon) * (1 - slack)
    inverse = inflate(square.rsqrt(), 8)
    directions = dim - 1 if centred else dim
    norm = inverse if directions >= 2 else inflate(epsilon * inverse**3, 8) if directions == 1 else 0 * radius
    moved = 2 / math.sqrt(3) * reach / (math.sqrt(dim) * square)
    rounding = 4 * gamma(dim + 16) * dim * inverse
    deviation = inflate(torch.minimum(moved.nan_to_num(nan=math.inf), norm), 16) + rounding
    if epsilon == 0 and directions == 1:  # 0 times infinity: no direction is kept where the sphere is two points
        norm = torch.where(inverse.isfinite(), norm, torch.inf)
    return NormalizationRange(norm=norm, deviation=torch.where(norm.isinf(), torch.inf, deviation))


def _moved(x: Tensor, centred: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centred else x
