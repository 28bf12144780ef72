"""What the Gram matrices of the second differential are made of: factors of a block of attention in units of their own.

Notation: lipbounds.derivatives.second.norm.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import (
    CentredRows,
    centred_keys,
    centred_projection,
    map_error,
    row_covariance,
)
from lipbounds.derivatives.first.rows import deviation_error, logit_gradient_error, scaled_weights
from lipbounds.errors import Unsupported
from lipbounds.ops.spectral import power_of_two
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """What the blocks are made of; a factor with a hat in `unit` or `units` is the true one divided by that number.

    Args:
        w_v: value weights, scaled.
        output: output weights of all heads on top of each other, scaled.
        unit: of the result.
        logit_gradient: u_hi.
        to_query: s W_Q.
        to_key: W_K.
        maps: P.
        deviations: x_hij.
        away: k_hj less its mean.
        cross: Cov_hi(V, K).
        units: powers of two: of `logit_gradient`, `to_query`, `to_key`, and of the largest row.
        error: of a block of a row, output weights included.
    """

    w_v: Float[Tensor, "*#batch heads dim value_dim"]
    output: Float[Tensor, "*#batch inner out_dim"]
    unit: Float[Tensor, "*#batch"]
    logit_gradient: Float[Tensor, "*#batch heads n dim"]
    to_query: Float[Tensor, "*#batch heads query_dim head_dim"]
    to_key: Float[Tensor, "*#batch heads memory_dim head_dim"]
    maps: Float[Tensor, "*#batch heads n m"]
    deviations: Float[Tensor, "*#batch heads n m value_dim"]
    away: Float[Tensor, "*#batch heads n m head_dim"]
    cross: Float[Tensor, "*#batch heads n value_dim head_dim"]
    units: tuple[Tensor, Tensor, Tensor, Tensor]
    error: Float[Tensor, "*#batch n"]


def factors_of(block: Attention) -> Factors:
    """What the blocks of the second differential are made of.

    Args:
        block: in float64, without rotary positions and QK-norm.

    Raises:
        Unsupported: the block has them.
    """
    turning = sorted(block.features & {"rotary", "qk_norm"})
    if turning:
        raise Unsupported(f"The joint norm of the second differential knows no {' and '.join(turning)}.")
    w_v, w_o, unit = scaled_weights(block)
    values, keys = centred_projection(block.source_input, w_v), centred_keys(block)
    maps = block.probabilities
    cross, cross_error = row_covariance(block, values, keys)
    apart = values.rows.unsqueeze(-3) - (maps @ values.rows).unsqueeze(-2)
    away = keys.rows.unsqueeze(-3) - (maps @ keys.rows).unsqueeze(-2)
    logit_gradient = block.scale_value * block.queries @ block.w_k.mT
    to_query = block.scale_value * block.w_q
    size, error = _sizes(block, values, keys, w_v, logit_gradient, cross, cross_error)
    with torch.no_grad():
        output = w_o.norm(dim=(-2, -1)).unsqueeze(-1)
        operations = block.heads + 8
        size, error = inflate((output * size).sum(-2), operations), inflate((output * error).sum(-2), operations)
        largest = power_of_two((size + error).unsqueeze(-1))[..., 0, 0]
        units = tuple(_unit(t) for t in (logit_gradient, to_query, block.w_k))
    logit_gradient_unit, query_unit, key_unit = units
    return Factors(
        w_v=w_v,
        output=w_o.flatten(-3, -2),
        unit=unit * largest,
        logit_gradient=logit_gradient / wide(logit_gradient_unit, 3),
        to_query=to_query / wide(query_unit, 3),
        to_key=block.w_k / wide(key_unit, 3),
        maps=maps,
        deviations=maps.unsqueeze(-1) * apart,
        away=away,
        cross=cross,
        units=(logit_gradient_unit, query_unit, key_unit, largest),
        error=error / largest.unsqueeze(-1),
    )


@torch.no_grad()
def _sizes(
    block: Attention,
    values: CentredRows,
    keys: CentredRows,
    w_v: Tensor,
    logit_gradient: Tensor,
    cross: Tensor,
    cross_error: Tensor,
) -> tuple[Float[Tensor, "*#batch heads n"], Float[Tensor, "*#batch heads n"]]:
    """Of the blocks of a row, before the output weights: a bound on the norm, factor by factor, and on the error."""
    through = w_v.norm(dim=(-2, -1)).unsqueeze(-1)
    to_query = abs(block.scale_value) * block.w_q.norm(dim=(-2, -1)).unsqueeze(-1)
    to_key = block.w_k.norm(dim=(-2, -1)).unsqueeze(-1)
    value, key = values.size.unsqueeze(-1), to_query * keys.size.unsqueeze(-1)
    value, key = 2 * value, 2 * key  # less the mean of a row instead of that of all keys
    off = logit_gradient_error(block)
    query = logit_gradient.norm(dim=-1) + off
    moment = to_query * cross.norm(dim=(-2, -1))
    maps, deviations, turned = map_error(block), deviation_error(block, values), to_query * deviation_error(block, keys)
    size = lost = torch.zeros_like(query)
    if block.memory_moves:
        size = size + 2 * through * query + 3 * value * query.square()
        lost = lost + 2 * through * (2 * maps * query + off) + 6 * off * value * query
        lost = lost + (3 * deviations + 2 * maps * value) * query.square()
    if block.query_moves:
        size = size + value * key.square()
        lost = lost + deviations * key.square() + 2 * value * key * turned
    if block.moves == "self":
        size = size + 2 * through * key + 2 * value * to_query * to_key + (2 * value * key + 2 * moment) * query
        lost = lost + 2 * through * turned + 2 * deviations * to_query * to_key + off * (2 * value * key + 2 * moment)
        lost = lost + 2 * (deviations * key + value * turned + maps * moment + to_query * cross_error) * query
    operations = 2 * (sum(block.w_q.shape[-2:]) + sum(w_v.shape[-2:]) + block.w_k.shape[-2] + block.logits.shape[-1])
    return size, 2 * lost + gamma(operations + 64) * size  # twice: products of two errors


def _unit(factor: Float[Tensor, "*#batch heads rows cols"]) -> Float[Tensor, "*#batch"]:
    return power_of_two(factor.flatten(-3, -2).detach())[..., 0, 0]


def wide(unit: Float[Tensor, "*#batch"], dims: int) -> Tensor:
    """A number of each batch item with axes of size 1 behind.

    Args:
        unit: the numbers.
        dims: how many axes.
    """
    return unit[(..., *[None] * dims)]
