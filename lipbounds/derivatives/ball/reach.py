r"""How far queries and keys can move with their tokens in a ball where they are turned or normalised: norms of maps.

A query is q_hi = phi_hi(x_i): the projection of the token, with QK-norm divided by its root mean square, and turned by
rotary positions. Over the ball

    |D phi_hi| <= rho max|w_h| r ||W||,        |D2 phi_hi| <= rho max|w_h| (2 / sqrt 3) (r ||W||)^2 / sqrt D,
    |D3 phi_hi| <= rho max|w_h| 3 (r ||W||)^3 / D,

rho the norm of the rotations, w the weights of the norm, D the number of features that are normalised together, W their
weights, r = (l^2 / D + e)^(-1/2) with l the least length of what is normalised: that at the centre less eps ||W||.
Without QK-norm |D phi_hi| <= rho ||W_Q^h|| and D2 phi = 0. Keys alike. Proof: docs/derivatives.md, section 6.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import key_error, projection_error, query_error
from lipbounds.ops.spectral import root, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotation_norm


@dc.dataclass(frozen=True, slots=True)
class Reach:
    """Suprema over the ball and over the tokens, of the queries or of the keys.

    Args:
        rate: |D phi_h| of each head.
        together: the same for all heads side by side: sqrt( sum_h |D phi_h a|^2 ) over unit a.
        bend: |D2 phi_h|; 0 without QK-norm.
        twist: |D3 phi_h|; 0 without QK-norm.
        size: of one query or key.
    """

    rate: Float[Tensor, "*#batch heads"]
    together: Float[Tensor, "*#batch"]
    bend: Float[Tensor, "*#batch heads"]
    twist: Float[Tensor, "*#batch heads"]
    size: Float[Tensor, "*#batch heads"]


def reaches(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> tuple[Reach, Reach]:
    """Of the queries and of the keys in a ball of the input that moves.

    Args:
        block: in float64.
        radius: of the ball.
    """
    eps = torch.as_tensor(radius, dtype=block.dtype, device=block.device)
    still = torch.zeros_like(eps)
    queries = query_reach(block, eps if block.query_moves else still)
    return queries, key_reach(block, eps if block.memory_moves else still)


def query_reach(block: Attention, radius: Float[Tensor, "*#batch"]) -> Reach:
    """Of the queries.

    Args:
        block: in float64.
        radius: of the ball, 0 where the queries do not move; more radii than batch items give a result each.
    """
    return _reach(
        block.queries, query_error(block), radius, block.weight_norms.queries, block.weight_norms.queries_jointly,
        block.query_norm, block.query_rotation, block.query_factors, block.projected_queries,
    )  # fmt: skip


def key_reach(block: Attention, radius: Float[Tensor, "*#batch"]) -> Reach:
    """Of the keys.

    Args:
        block: in float64.
        radius: of the ball, 0 where the keys do not move; more radii than batch items give a result each.
    """
    return _reach(
        block.keys, key_error(block), radius, block.weight_norms.keys, block.weight_norms.keys_jointly,
        block.key_norm, block.key_rotation, block.key_factors, block.projected_keys,
    )  # fmt: skip


def logit_bend(block: Attention, queries: Reach, keys: Reach) -> tuple[Tensor, Tensor]:
    """Of each head ||G_h|| = s |D phi_hi^T D psi_hj| at most, over the ball and all tokens; ||G|| of all heads.

    Args:
        block: in float64.
        queries: how far they reach.
        keys: how far they reach.
    """
    scale = abs(block.scale_value)
    apart = inflate(scale * queries.rate * keys.rate, 4)
    joint = torch.minimum(queries.together * keys.rate.amax(-1), queries.rate.amax(-1) * keys.together)
    return apart, inflate(torch.minimum(inflate(scale * joint, 4), vector_norm(apart)), block.heads + 8)


def _reach(
    rows: Float[Tensor, "*#batch heads n head_dim"],
    error: Float[Tensor, "*#batch heads n"],
    radius: Float[Tensor, "*#batch"],
    norms: Float[Tensor, "*#batch heads"],
    beside: Float[Tensor, "*#batch"],
    norm: RmsNorm | None,
    rotation: Tensor | None,
    factors: tuple[Tensor, Tensor],
    projected: Float[Tensor, "*#batch heads n head_dim"],
) -> Reach:
    rho = rotation_norm(rotation, norms)
    size = inflate((vector_norm(rows) + error).amax(-1), rows.shape[-1] + 8)
    if norm is None:
        rate = inflate(rho * norms, 2)
        together = inflate(rho[..., 0] * beside, 2)
        nothing = torch.zeros_like(rate)
        return Reach(rate, together, nothing, nothing, size + inflate(radius.unsqueeze(-1) * rate, 4))
    inner = norms if norm.over == "head" else beside.unsqueeze(-1)
    gain = rho * norm.weight.abs().amax(-1)
    slope = _largest_inverse_root(norm, factors, projected, radius, inner)
    slope = slope * (1 + 64 * gamma(norm.width + 16))
    steep = slope * inner
    rate, bend = gain * steep, gain * (2 / math.sqrt(3 * norm.width)) * steep.square()
    twist = gain * (3 / norm.width) * steep.square() * steep
    together = (gain * slope).amax(-1) * beside
    if norm.over == "head":
        together = torch.minimum(together, vector_norm(rate))
    size = torch.minimum(size + inflate(radius.unsqueeze(-1) * rate, 8), gain * norm.width**0.5)
    return Reach(*(inflate(part, norms.shape[-1] + 32) for part in (rate, together, bend, twist, size)))


def _largest_inverse_root(
    norm: RmsNorm,
    factors: tuple[Tensor, Tensor],
    projected: Float[Tensor, "*#batch heads n head_dim"],
    radius: Float[Tensor, "*#batch"],
    inner: Float[Tensor, "*#batch heads_or_one"],
) -> Float[Tensor, "*#batch heads_or_one"]:
    """r at the least length that what is normalised can have in the ball, the largest of the tokens."""
    off = root(norm.total(projection_error(*factors, None).unsqueeze(-1).square()))
    length = root(norm.total(projected.square())) * (1 - 2 * gamma(norm.width + 8)) - 2 * off
    length = length.squeeze(-1)
    least = (length * (1 - 4 * gamma(8)) - inflate(radius[..., None, None] * inner.unsqueeze(-1), 4)).clamp(min=0)
    return torch.rsqrt(least.square() / norm.width + norm.eps).amax(-1)
