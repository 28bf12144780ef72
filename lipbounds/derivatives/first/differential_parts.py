"""Norms of the three parts of the differential of an attention block, all heads together, rounded up.

Mixing, query and key part by formulas (5), (3) and (6) of docs/bounds/sharp.md, each replaced by its sum over heads
where that is smaller. Nothing of size n x m x D is formed. Rounding: docs/derivatives.md, section 4.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_by_head, cached_per_block
from lipbounds.derivatives.first.covariance import (
    CentredRows,
    centred_keys,
    centred_projection,
    map_error,
    map_upper,
    moment_error,
    row_covariance,
)
from lipbounds.derivatives.first.key_rows import joint_rows, pulled_joint_rows
from lipbounds.derivatives.first.pulled_queries import through_query_maps
from lipbounds.derivatives.first.rows import deviation_error, logit_gradient_error, scaled_weights
from lipbounds.derivatives.norms import map_norm
from lipbounds.ops.spectral import power_of_two, product_norm_upper, root, spectral_norm_upper, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


CANCELLED = 2.0**-40  # a product of matrices this far below the product of their norms is taken for rounding
SAME = 1e-6  # relative; the roots of the rounding slack are below it


@cached_per_block
def differential_parts(
    block: Attention,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Norms of T1, T2 and T3, rounded up; 0 for a part whose input does not move.

    Args:
        block: in float64.
    """
    nothing = torch.zeros_like(block.logits[..., 0, 0, 0])
    mixing, key = (mixing_part(block), key_part(block)) if block.memory_moves else (nothing, nothing)
    return mixing, query_part(block) if block.query_moves else nothing, key


def mixing_part(block: Attention) -> Float[Tensor, "*batch"]:
    """||T1||: the smaller of (5) and sum_h ||P_h|| ||M_h||.

    Args:
        block: in float64.
    """
    by_head = (map_norm(block) * block.weight_norms.through).sum(-1)
    w_v, w_o, unit = scaled_weights(block)
    maps = block.probabilities
    products = torch.einsum("...hij,...gkj->...ikhg", maps, maps).flatten(-2)
    inner = _map_products(w_v, w_o)
    squares = ((products @ inner.unsqueeze(-3)) * products).sum(-1)
    with torch.no_grad():
        weight = w_v.norm(dim=(-2, -1)) * w_o.norm(dim=(-2, -1))
        pairs = (weight.unsqueeze(-1) * weight.unsqueeze(-2)).flatten(-2)
        size = (products * pairs[..., None, None, :]).sum(-1)
        off = (map_error(block) * weight.unsqueeze(-1)).sum(-2)
        total = weight.sum(-1)[..., None, None]
        crossed = off.unsqueeze(-1) * total
        error = crossed + crossed.mT + off.unsqueeze(-1) * off.unsqueeze(-2) + 2 * gamma(maps.shape[-1] + 8) * size
        operations = 2 * (w_v.shape[-2] + w_o.shape[-1]) + (w_v.shape[-1] + 2) ** 2 + 2 * pairs.shape[-1] + 32
        slack = 2 * gamma(operations) * size.square()
    entries = root(squares.clamp(min=0) + slack) + inflate(error, operations)
    jointly = inflate(root(spectral_norm_upper(entries)), 8) * unit
    return inflate(_smaller(jointly, by_head), block.heads + 4)


def query_part(block: Attention) -> Float[Tensor, "*batch"]:
    """||T2||: the largest over rows of the smaller of (3) and its sum over heads.

    Args:
        block: in float64.
    """
    w_v, w_o, unit = scaled_weights(block)
    cross, error = row_covariance(block, centred_projection(block.source_input, w_v), centred_keys(block))
    cross, error, w_q = through_query_maps(block, cross, error)
    scale = abs(block.scale_value)
    off = error * (w_o.norm(dim=(-2, -1)) * w_q.norm(dim=(-2, -1))).unsqueeze(-1)
    outputs, of_outputs = _of_heads(w_o)
    by_head = scale * (_cross_norms(block, outputs, cross, w_q) * of_outputs + off).sum(-2)
    # W_Q^h of order 1, its size moved to the covariances, and these of order 1 for each row.
    of_queries = power_of_two(w_q.detach())
    w_q = (w_q / of_queries).expand(*w_q.shape[:-3], block.heads, -1, -1)
    cross = cross * of_queries.unsqueeze(-3)
    of_row = power_of_two(cross.detach().movedim(-4, -3).flatten(-3, -2))
    cross = cross / of_row.unsqueeze(-4)
    squares = _squared_sum(cross, w_o, w_q)
    with torch.no_grad():
        weight = w_o.norm(dim=(-2, -1)) * w_q.norm(dim=(-2, -1))
        size = (cross.norm(dim=(-2, -1)) * weight.unsqueeze(-1)).sum(-2)
        operations = 2 * (w_o.shape[-1] + w_q.shape[-2] + sum(cross.shape[-2:])) + math.prod(cross.shape[-2:]) + 64
        slack = 2 * gamma(operations + block.heads**2) * size.square()
    jointly = scale * (root(squares.clamp(min=0) + slack) * of_row[..., 0, 0] + off.sum(-2))
    return inflate(_smaller(jointly, by_head), operations).amax(-1) * unit


def key_part(block: Attention) -> Float[Tensor, "*batch"]:
    """||T3||: the smaller of (6) and its sum over heads.

    Args:
        block: in float64.
    """
    w_v, w_o, unit = scaled_weights(block)
    values = centred_projection(block.source_input, w_v)
    # ||W_O^hT Cov W_O^h|| as computed, and what its error adds.
    outputs, of_outputs = _of_heads(w_o)
    through = _variance_norms(block, outputs, values) * of_outputs.square()
    error = moment_error(block, values, values)
    through = through + error * w_o.square().sum((-2, -1)).unsqueeze(-1)
    if block.key_norm is None and block.key_rotation is None:
        logit_gradient = block.scale_value * block.queries @ block.w_k.mT
        gradient_error = logit_gradient_error(block)
        gradient_size = vector_norm(logit_gradient) + gradient_error
        weighted = gradient_size.square() * through
        columns = (weighted.unsqueeze(-2) @ map_upper(block)).squeeze(-2)
        rows = joint_rows(block, values.rows, w_o, logit_gradient)
    else:
        rows, lengths, gradient_error = pulled_joint_rows(block, values.rows, w_o)
        columns = ((lengths.square() * through.unsqueeze(-1)) * map_upper(block)).sum(-2)
        gradient_size = lengths.amax(-1)
    by_head = root(columns.amax(-1)).sum(-1)
    with torch.no_grad():
        weight = w_o.norm(dim=(-2, -1)).unsqueeze(-1)
        own = map_upper(block).norm(dim=-1) * 2 * values.size.unsqueeze(-1)
        off = weight * (deviation_error(block, values) * gradient_size + own * gradient_error)
    jointly = vector_norm(rows + off.sum(-2))
    operations = block.tokens + block.logits.shape[-1] + sum(block.w_k.shape[-2:]) + block.heads + 64
    return inflate(_smaller(jointly, by_head), operations) * unit


def _of_heads(w_o: Tensor) -> tuple[Tensor, Tensor]:
    """W_O^hT of order 1 for each head, with an axis for rows, and the powers of two that are left over, likewise.

    So norms of a head are the same numbers in every block that it is part of.
    """
    unit = power_of_two(w_o.detach())
    return (w_o / unit).mT.unsqueeze(-3), unit[..., 0]


@cached_by_head
def _cross_norms(block: Attention, outputs: Tensor, cross: Tensor, w_q: Tensor) -> Float[Tensor, "*batch heads n"]:
    """||W_O^hT Cov_hi(V, K) T_hi W_Q^hT||, for covariances as computed, in units of each head (`scaled_weights`)."""
    return _steady_norm(outputs, cross, w_q.mT.unsqueeze(-3))


@cached_by_head
def _variance_norms(block: Attention, outputs: Tensor, values: CentredRows) -> Float[Tensor, "*batch heads n"]:
    """||W_O^hT Cov_hi(V, V) W_O^h||, likewise."""
    return _steady_norm(outputs, row_covariance(block, values, values)[0], outputs.mT)


def _steady_norm(*factors: Tensor) -> Tensor:
    """`product_norm_upper`, without a gradient where the factors cancel to rounding: its direction would be noise."""
    norm = product_norm_upper(*factors)
    size = torch.ones_like(norm.detach())
    for factor in factors:
        size = size * factor.detach().norm(dim=(-2, -1))
    return torch.where(norm.detach() > CANCELLED * size, norm, norm.detach())


def _smaller(jointly: Tensor, by_head: Tensor) -> Tensor:
    """The minimum, with the gradient of the first where both are the same but for rounding.

    A head that contributes nothing is a kink of the sum over heads alone.
    """
    smallest = torch.minimum(jointly, by_head).detach()
    chosen = torch.where(by_head.detach() < (1 - SAME) * jointly.detach(), by_head, jointly)
    return smallest + (chosen - chosen.detach())


def _map_products(w_v: Tensor, w_o: Tensor) -> Float[Tensor, "*weights pairs pairs"]:
    """<M_h^T M_g, M_h'^T M_g'> = tr(S_hh' G_h'g' S_g'g G_gh), G_hg = W_V^hT W_V^g, as a matrix from (h, g) to (h', g').

    One head h at a time, so that H^2 d_v^2 numbers are kept and not H^3 d_v^2.
    """
    values = torch.einsum("...hav,...gaw->...hgvw", w_v, w_v)
    outputs = torch.einsum("...hva,...gwa->...hgvw", w_o, w_o)
    lines = []
    for h in range(w_v.shape[-3]):
        first = torch.einsum("...pvw,...pqwx->...qpvx", outputs[..., h, :, :, :], values)
        second = torch.einsum("...qgvw,...gwx->...qgvx", outputs, values[..., :, h, :, :])
        lines.append(torch.einsum("...qpvx,...qgxv->...gpq", first, second))
    return torch.stack(lines, -4).flatten(-2).flatten(-3, -2)


def _squared_sum(cross: Tensor, w_o: Tensor, w_q: Tensor) -> Float[Tensor, "*batch n"]:
    """||sum_h W_O^hT C_hi W_Q^hT||_F^2 = sum_hg <S_hg C_gi, C_hi Q_hg>, S_hg = W_O^h W_O^gT, Q_hg = W_Q^hT W_Q^g.

    One head h at a time, with the heads g >= h: the terms of (h, g) and (g, h) are equal. Rows are side by side in
    products of few large matrices, which are several times as fast as many small ones.
    """
    width, depth = cross.shape[-2:]
    columns = cross.movedim(-3, -2).flatten(-2)  # [*, g, v, (i, d)]: C_gi side by side
    total = torch.zeros_like(cross[..., 0, :, 0, 0])
    for h in range(cross.shape[-4]):
        outputs = w_o[..., h : h + 1, :, :] @ w_o[..., h:, :, :].mT
        queries = (w_q[..., h : h + 1, :, :].mT @ w_q[..., h:, :, :]).movedim(-3, -2).flatten(-2)  # [*, d, (g, e)]
        left = (outputs @ columns[..., h:, :, :]).unflatten(-1, (-1, depth))  # [*, g, v, i, e]
        right = (cross[..., h, :, :, :].flatten(-3, -2) @ queries).unflatten(-1, (-1, depth))  # [*, (i, v), g, e]
        right = right.unflatten(-3, (-1, width)).movedim(-2, -4).movedim(-2, -3)  # [*, g, v, i, e]
        terms = (left * right).sum((-3, -1))
        total = total + (terms[..., 0, :] + 2 * terms[..., 1:, :].sum(-2))
    return total
