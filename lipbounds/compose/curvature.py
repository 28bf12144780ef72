"""How fast the Jacobian of attention turns: a bound on the second derivative over a ball.

||J(X) - J(X0)|| <= eps H with H = ||W_O|| (sum_h H_h^2)^1/2, H_h from standard deviations of keys, values and logits
under each row, bounded over the ball. Symbols and proof: docs/functions.md, section 8.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.log_odds import maps_interval
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


SLACK = 1e-11  # relative, for sums of up to 40 000 products of positive terms, of which there are few in a row


def supports_curvature(block: Attention) -> bool:
    """Whether the bound holds for this block: self-attention without rotary positions and QK-norm.

    Args:
        block: the block.
    """
    return block.moves == "self" and block.features.isdisjoint(("rotary", "qk_norm"))


@torch.no_grad()
def curvature(block: Attention, radius: float) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the second derivative over the ball of that radius: |D2 Y[U, W]| <= H |U| |W|.

    Args:
        block: in float64, with `supports_curvature`.
        radius: eps, Frobenius norm.
    """
    upper = maps_interval(block, radius).upper
    scale = abs(block.scale_value)
    value_weights = spectral_norm_upper(block.w_v).unsqueeze(-1)
    product = scale * product_norm_upper(block.w_q, block.w_k.mT).unsqueeze(-1)
    keys, values = _rows(block, "k"), _rows(block, "v")
    alpha = scale * product_norm_upper(_centred(keys, upper, block), block.w_q.mT.unsqueeze(-3))
    alpha = (alpha + 0.5**0.5 * radius * product) * (1 + SLACK) + scale * _row_error(block, "k") * block.w_q.norm(
        dim=(-2, -1)
    ).unsqueeze(-1)
    beta = spectral_norm_upper(_centred(values, upper, block))
    beta = (beta + 0.5**0.5 * radius * value_weights) * (1 + SLACK) + _row_error(block, "v")
    gradient = (block.queries @ block.w_k.mT).norm(dim=-1)
    gradient_error = _row_error(block, "q") * block.w_k.norm(dim=(-2, -1)).unsqueeze(-1)
    nu = (scale * (gradient + gradient_error) + radius * product) * (1 + SLACK)
    distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").amax((-2, -1)).unsqueeze(-1)
    diameter = (distance + 2**0.5 * radius * value_weights) * (1 + SLACK) + 2 * _row_error(block, "v")
    x1 = value_weights * alpha + product * beta + diameter * nu * alpha
    x2 = 2 * value_weights * nu + diameter * nu.square()
    largest = upper.amax(-1).sqrt()
    columns = (upper.square() * x2.square().unsqueeze(-1)).sum(-2).amax(-1).sqrt()
    heads = (x1 * largest).amax(-1) + columns + (diameter * alpha.square() + x1 * largest).amax(-1)
    return inflate(combine_heads(block, heads * (1 + SLACK)), 64)


def _rows(block: Attention, which: str) -> Float[Tensor, "*batch heads n width"]:
    return block.keys if which == "k" else block.values


def _row_error(block: Attention, which: str) -> Float[Tensor, "*batch heads 1"]:
    """How far computed queries, keys or values can be from exact ones, the norm of all rows together; twice over."""
    tokens, weights = {"q": block.query_factors, "k": block.key_factors, "v": block.value_factors}[which]
    operations = tokens.shape[-1] + weights.shape[-1] + 8
    size = tokens.norm(dim=(-2, -1)) * weights.norm(dim=(-2, -1))
    return (4 * gamma(operations) * size).unsqueeze(-1)


def _centred(
    rows: Float[Tensor, "*batch heads m width"], upper: Float[Tensor, "*batch heads n m"], block: Attention
) -> Float[Tensor, "*batch heads n m width"]:
    """F_i with F_i^T F_i = sum_j upper_ij (z_j - c_i)(z_j - c_i)^T, c_i the mean of the rows at the centre."""
    means = block.probabilities @ rows
    return upper.sqrt().unsqueeze(-1) * (rows.unsqueeze(-3) - means.unsqueeze(-2))
