r"""Theorem 3 on a ball, evaluated in float32, its rounding proved and added.

Logits and rows of queries, keys and values are those of lipbounds.derivatives.first.single_precision, with errors eta
and e; eta is added to the radius r of the logits. With E = exp(S - max S) and sums over the other keys,

    upper_ij = E_ij e^r_ij / (E_ij e^r_ij + sum E_il e^(-r_il)),    lower_ij = E_ij e^(-r_ij) / (E_ij e^(-r_ij) + sum
    E_il e^r_il),

each up to gamma(3 m + 32). |W_Q k_j| is the length of k_j L with W_Q^T W_Q = L L^T, of d numbers in place of D. Proof:
docs/derivatives.md, section 15.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.single_norms import through_lengths
from lipbounds.derivatives.first.single_parts import SingleParts
from lipbounds.derivatives.first.single_precision import (
    OWN_ROUNDING,
    SMALLEST_SINGLE,
    UNIT_SINGLE,
    Rounded,
    SingleRows,
    gamma_single,
    known,
    lengths,
    map_norm_upper,
)
from lipbounds.ops.interval import g_of_ends
from lipbounds.targets.attention import Attention


SMALLEST_LENGTH = 2.0**-60  # its square is a normal number of float32
FARTHEST = 20.0  # of a logit: float64 takes over where it can move further
VISIBLE = 2.0**12  # times what may be lost to underflow: float64 takes over where g_1 is less


def theorem_3_on_ball_in_single_precision(parts: SingleParts, radius: float) -> Rounded:
    """`lipbounds.derivatives.ball.logits.theorem_3_on_ball`: with the rounding, and at least what it is without.

    NaN or infinite where numbers leave float32, logits can move by more than 20, or rows stay one-hot up to underflow.

    Args:
        parts: of the block.
        radius: eps, Frobenius norm.
    """
    block, norms, maps = parts.block, parts.norms, parts.maps
    error = maps.error
    reach = _logit_radius(block, parts.queries, parts.keys, radius) + (error * OWN_ROUNDING).float().unsqueeze(-1)
    softmax, map_norm = _over_interval(block, maps.weights, maps.sums, reach)
    value_norm, change = parts.value_and_change()
    if block.moves == "self":
        change = change + _exact(2 * radius * parts.scale * norms.logits)
    if block.memory_moves:
        value_norm = value_norm + _exact(radius * norms.values)
    lost = (-4 * error.amax(-1)).exp()  # what eta can have added to g_1 and to the norm of the map, at most
    per_head = value_norm * Rounded(softmax * lost, softmax) * change
    if block.memory_moves:
        per_head = per_head + Rounded(map_norm * lost, map_norm) * norms.values
    return parts.of_heads(per_head)


def _exact(value: Tensor) -> Rounded:
    return known(value)


def _logit_radius(
    block: Attention, queries: SingleRows, keys: SingleRows, radius: float
) -> Float[Tensor, "*batch heads n m"]:
    """How far each logit can move in the ball, rounded up; as lipbounds.derivatives.ball.logits.logit_radius."""
    norms, scale = block.double.weight_norms, abs(block.scale_value)
    by_query = through_lengths(keys, norms.query_factor, norms.queries).upper.unsqueeze(-2).clamp(min=SMALLEST_LENGTH)
    by_key = through_lengths(queries, norms.key_factor, norms.keys).upper.unsqueeze(-1).clamp(min=SMALLEST_LENGTH)
    up = 1 + 16 * UNIT_SINGLE
    if block.moves == "query":
        return (by_query * (scale * radius * up)).float() * up + torch.zeros_like(by_key.float())
    if block.moves == "memory":
        return (by_key * (scale * radius * up)).float() * up + torch.zeros_like(by_query.float())
    curved = scale * norms.logits.unsqueeze(-1).unsqueeze(-1) * radius**2 * OWN_ROUNDING
    squares = by_query.float().square() + by_key.float().square()
    apart = squares.sqrt_().mul_(scale * radius * up).add_((curved / 2).float() * up).mul_(up)
    own = scale * radius * _own_length(block, queries, keys, by_query, by_key) + curved[..., 0]
    apart.diagonal(dim1=-2, dim2=-1).copy_((own * OWN_ROUNDING).float() * up)
    return apart


def _own_length(
    block: Attention, queries: SingleRows, keys: SingleRows, by_query: Tensor, by_key: Tensor
) -> Float[Tensor, "*batch heads n"]:
    """|W_Q k_i + W_K q_i|, rounded up: the square of each, and twice the product."""
    w_q, w_k = block.w_q.float(), block.w_k.float()
    inner = w_q.mT @ w_k
    dim, width = w_q.shape[-2:]
    single = w_q.norm(dim=(-2, -1)).double() * w_k.norm(dim=(-2, -1)).double()
    size = single * (1 + 4 * gamma_single(dim * width + 8)) + dim * width * 2.0**-60
    product = ((keys.rows @ inner) * queries.rows).sum(-1).double()
    far, near = keys.length + keys.error, queries.length + queries.error
    off = gamma_single(dim + 2 * width + 8) * keys.length * queries.length + keys.error * near + far * queries.error
    off = off * size.unsqueeze(-1) + 4 * width**2 * SMALLEST_SINGLE * (1 + size.unsqueeze(-1)) * (1 + far) * (1 + near)
    square = by_query.squeeze(-2).square() + by_key.squeeze(-1).square() + 2 * (product + off)
    return square.clamp(min=0).sqrt() * OWN_ROUNDING


def _over_interval(
    block: Attention,
    weights: Float[Tensor, "*b heads n m"],
    sums: Float[Tensor, "*b heads n"],
    reach: Float[Tensor, "*b heads n m"],
) -> tuple[Float[Tensor, "*b heads"], Float[Tensor, "*b heads"]]:
    """max_i sup g_1(P'_i) and sup ||P'||, rounded up, for logits that move by `reach` at most."""
    rows, cols = weights.shape[-2:]
    too_far = reach.amax((-2, -1)) > FARTHEST
    grown = reach.mul(1 + 8 * UNIT_SINGLE).add_(16 * UNIT_SINGLE).exp_()  # at least e^r
    high, low = weights * grown, weights / grown
    over_low, over_high = _others(low), _others(high)
    up = 1 + 3 * gamma_single(cols + 8) + 32 * UNIT_SINGLE
    lost = 4 * (cols + 2) * SMALLEST_SINGLE * math.exp(2 * FARTHEST + 1)
    upper = (high / (high + over_low)).mul_(up).add_(lost)
    whole = low + over_high
    lower = (low / whole).mul_(2 - up).sub_(lost)
    largest, place = upper.max(-1, keepdim=True)
    second = upper.scatter(-1, place, 0.0).amax(-1)  # on rows of a few hundred keys much faster than topk
    least, index = lower.max(-1, keepdim=True)
    rest = (over_high.gather(-1, index) / whole.gather(-1, index)) * up + lost
    ends = (end.double().clamp(0, 1) for end in (largest[..., 0], second, least[..., 0], rest[..., 0]))
    # The lower end is too small by up to 2 (up - 1), and g_1 may be that times what is known of the rest.
    softmax = (g_of_ends(*ends).amax(-1) * ((1 + 4 * (up - 1)) * OWN_ROUNDING)).clamp(max=0.5)
    softmax = torch.where(too_far | (softmax < VISIBLE * lost), torch.nan, softmax)
    if not block.memory_moves:
        return softmax, torch.zeros_like(softmax)
    maps = weights / sums.unsqueeze(-1)
    away = torch.maximum(upper - maps, maps - lower).clamp_(min=0).add_(upper, alpha=16 * UNIT_SINGLE)
    from_centre = lengths(away).norm(dim=-1)
    centre = map_norm_upper(weights, sums, torch.zeros_like(sums, dtype=torch.float64)).upper
    by_columns = (upper.sum(-2).amax(-1).double() * (1 + 2 * gamma_single(rows + 4))).sqrt()
    norm = torch.minimum(from_centre + centre, by_columns) * OWN_ROUNDING
    return softmax, norm.clamp(max=rows**0.5 * OWN_ROUNDING)


def _others(entries: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch m"]:
    """Sums over all other entries of a row: for the largest one the others are summed, not subtracted."""
    largest, index = entries.max(-1, keepdim=True)
    rest = entries.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return (rest + largest - entries).scatter_(-1, index, rest)
