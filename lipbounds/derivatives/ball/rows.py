"""Keys, values and queries of all heads as rows in the space of tokens, at the centre of a ball, with their rounding.

A row W k, W the weights of the head towards the tokens (s W_Q for keys, W_O^T for values), is written B z with ||B|| <=
1 and |z| = |W k|: z = L^T k with W^T W + tau = L L^T. What W - B L^T leaves is added to the rounding error of the rows.
Symbols and proof: docs/derivatives.md, sections 1 and 6.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import projection_error
from lipbounds.ops.eigen import try_cholesky
from lipbounds.ops.spectral import power_of_two, product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


REGULARISATION = 2.0**-40  # tau, relative to the squared Frobenius norm of the weights
OWN_ROUNDING = 1 + 1e-9  # pays for the rounding of error bounds themselves: sums of fewer than a million positive terms


@dc.dataclass(frozen=True, slots=True)
class Rows:
    """Keys or values of all heads seen from the tokens of the block: w or v of the table above, at the centre.

    Args:
        reduced: z without its mean, as computed.
        factor_norm: ||B_h||, rounded up.
        joint: ||[B_1 ... B_H]||.
        error: of a row, after B.
        change: ||G_h|| or ||M_h||: how far a row moves with its token.
        reduced_change: the same for z.
        change_error: what B times the move of z leaves of the move of a row.
        joint_change: ||G|| or ||M||, for all heads together.
    """

    reduced: Float[Tensor, "*#batch heads m width"]
    factor_norm: Float[Tensor, "*#batch heads"]
    joint: Float[Tensor, "*#batch"]
    error: Float[Tensor, "*#batch heads"]
    change: Float[Tensor, "*#batch heads"]
    reduced_change: Float[Tensor, "*#batch heads"]
    change_error: Float[Tensor, "*#batch heads"]
    joint_change: Float[Tensor, "*#batch"]


def key_rows(block: Attention) -> Rows:
    """w_hj = s W_Q^h k_hj.

    Args:
        block: in float64, without rotary positions.
    """
    error = projection_error(*block.key_factors, None).amax(-1)
    return _rows(block.keys, error, abs(block.scale_value) * block.w_q, block.w_k.mT)


def value_rows(block: Attention) -> Rows:
    """v_hj = W_O^hT times the value j of head h.

    Args:
        block: in float64.
    """
    error = projection_error(*block.value_factors, None).amax(-1)
    return _rows(block.values, error, block.w_o.mT, block.w_v.mT)


def _rows(
    tokens: Float[Tensor, "*#batch heads m width"],
    error: Float[Tensor, "*#batch heads"],
    weights: Float[Tensor, "*#batch heads dim width"],
    moving: Float[Tensor, "*#batch heads width memory_dim"],
) -> Rows:
    """Rows `weights` times a token of a head that is `moving` times a token of the block, plus a constant.

    Args:
        tokens: keys or values.
        error: of each, largest of a head.
        weights: W.
        moving: W_K^T or W_V^T.
    """
    width = weights.shape[-1]
    change = product_norm_upper(weights, moving)
    joint_change = torch.minimum(*joint_norms(weights, moving))
    unit = power_of_two(weights.detach())  # so that squares neither overflow nor vanish
    weights = weights / unit
    size = weights.detach().square().sum((-2, -1))
    identity = torch.eye(width, dtype=weights.dtype, device=weights.device)
    tau = REGULARISATION * torch.where(size > 0, size, 1.0)
    triangle, _ = try_cholesky(weights.mT @ weights + tau[..., None, None] * identity)
    factor = torch.linalg.solve_triangular(triangle.mT, weights, upper=True, left=False)
    joint, norm = spectral_norm_upper(factor.movedim(-3, -2).flatten(-2)), spectral_norm_upper(factor)
    centred = tokens - tokens.mean(-2, keepdim=True)
    with torch.no_grad():
        length = triangle.square().sum((-2, -1)).sqrt()
        rest = (weights - factor @ triangle.mT).square().sum((-2, -1)).sqrt()
        rest = rest + 2 * gamma(width + 4) * factor.square().sum((-2, -1)).sqrt() * length
        largest = tokens.norm(dim=-1).amax(-1)
        # The mean may be any row, but the difference is rounded; then the product with L.
        off = 2 * error + 4 * gamma(tokens.shape[-2] + width + 16) * largest
        lost = (norm * length * off + 2 * rest * largest) * unit[..., 0, 0] * OWN_ROUNDING
        change_error = rest * unit[..., 0, 0] * moving.square().sum((-2, -1)).sqrt() * OWN_ROUNDING
    # Where W is 0, so are its rows: z of the size of tau would count in how much each head weighs.
    unit = torch.where(size > 0, unit[..., 0, 0], 0.0)
    reduced_change = unit * product_norm_upper(triangle.mT, moving)
    reduced = centred @ triangle * unit[..., None, None]
    return Rows(reduced, norm, joint, lost, change, reduced_change, change_error, joint_change)


def joint_norms(
    left: Float[Tensor, "*#batch heads rows inner"], right: Float[Tensor, "*#batch heads inner cols"]
) -> tuple[Float[Tensor, "*#batch"], Float[Tensor, "*#batch"]]:
    """Norms of all L_h R_h side by side and stacked: sup sqrt(sum_h <x, L_h R_h y>^2) over unit x, y is at most either.

    Args:
        left: L_h, float64.
        right: R_h, float64.
    """
    products = left @ right
    sizes = left.square().sum((-2, -1)) * right.square().sum((-2, -1))
    error = 2 * gamma(left.shape[-1] + 4) * sizes.sum(-1).sqrt().detach()
    beside = spectral_norm_upper(products.movedim(-3, -2).flatten(-2))
    stacked = spectral_norm_upper(products.flatten(-3, -2))
    return beside + error, stacked + error


@dc.dataclass(frozen=True, slots=True)
class Queries:
    """u_hi = s W_K^h q_hi, norms and inner products between heads, the error of a row; ||G_h|| and ||G|| as in Rows."""

    rows: Float[Tensor, "*#batch heads n dim"]
    inner: Float[Tensor, "*#batch n heads heads"]
    sizes: Float[Tensor, "*#batch heads n"]
    error: Float[Tensor, "*#batch heads"]
    slack: Float[Tensor, "*#batch n"]
    change: Float[Tensor, "*#batch heads"]
    joint_change: Float[Tensor, "*#batch"]


def query_rows(block: Attention) -> Queries:
    """The queries of all heads seen from the tokens of the keys.

    Args:
        block: in float64, without rotary positions.
    """
    scale = abs(block.scale_value)
    rows = scale * block.queries @ block.w_k.mT
    beside = rows.movedim(-3, -2)  # heads x D for each token
    with torch.no_grad():
        size = block.queries.norm(dim=-1).amax(-1)
        off = projection_error(*block.query_factors, None).amax(-1) + 2 * gamma(block.w_k.shape[-1] + 8) * size
        error = scale * block.w_k.square().sum((-2, -1)).sqrt() * off * OWN_ROUNDING
        slack = 2 * gamma(rows.shape[-1] + 4) * beside.square().sum(-1).amax(-1)
    sizes = inflate(vector_norm(rows), rows.shape[-1] + 8)
    change = scale * product_norm_upper(block.w_q, block.w_k.mT)
    joint_change = torch.minimum(*joint_norms(scale * block.w_q, block.w_k.mT))
    return Queries(rows, beside @ beside.mT, sizes, error, slack, change, joint_change)
