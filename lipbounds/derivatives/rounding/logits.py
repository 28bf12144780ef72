"""How far computed logits and attention maps can be from those of exact arithmetic.

With K = 2 D + d + 6 each logit of row i is off by at most

    eta_i = gamma(K) s ||[x_i 1]|| ||[W_Q; b_Q]||_F ||[W_K; b_K]||_F max_j ||[x_j 1]||  +  2 u max_j |B_ij|,

so each P_ij by a factor in [e^-2 eta, e^2 eta], but for keys that the mask B holds so far below others that P_ij is 0
up to underflow; they do not count in eta. Rotary positions, QK-norm and the proof: docs/derivatives.md, section
10.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import UNIT_ROUNDOFF, gamma
from lipbounds.targets.attention import Attention
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotation_norm


def _untracked(function: Callable[[Attention], Tensor]) -> Callable[[Attention], Tensor]:
    """Without a gradient; but queries and keys, which the block keeps, are made with theirs for those who ask later."""

    @functools.wraps(function)
    def untracked(block: Attention) -> Tensor:
        if block.query_norm is not None or block.logit_bias is not None:
            _ = block.queries, block.keys
        with torch.no_grad():
            return function(block)

    return untracked


LARGE_MASK = -(2.0**40)  # above it the rounding of a masked logit is below 2^-11, and need not be looked at


@_untracked
def logit_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """eta_i of each head and row, for logits computed in float64, without a gradient; see the top of this file.

    Args:
        block: in float64 (`block.double`).
    """
    error = abs(block.scale_value) * _product_error(block)
    if block.logit_bias is not None:  # a causal mask alone adds nothing to what is visible, and is not made
        assert block.mask is not None
        hidden = block.mask.isneginf() | _far_below(block)
        error = error + 2 * UNIT_ROUNDOFF * torch.where(hidden, 0.0, block.mask).abs().amax(-1)
    return error * (1 + 1e-9)  # pays for the rounding in this very formula


@_untracked
def key_logit_error(block: Attention) -> Float[Tensor, "*batch heads n m"]:
    """The same for each key, for what moves so far that a key matters which does not at the centre of a ball.

    Args:
        block: in float64.
    """
    error = logit_error(block).unsqueeze(-1)
    if block.logit_bias is None:
        return error.expand(block.logits.shape)
    assert block.mask is not None
    own = torch.where(_far_below(block), block.mask, 0.0).abs()
    return (error + 2 * UNIT_ROUNDOFF * own * (1 + 1e-9)).expand(block.logits.shape)


def _far_below(block: Attention) -> Tensor:
    """Keys that a mask holds so far below another key of the row that their weight is below 2^-1022, and computed as 0.

    Such as the most negative float, which models write for -inf. |s <q, k>| of any key and head is at most R.
    """
    assert block.mask is not None
    rows = _largest_product(block).amax(-2, keepdim=True).unsqueeze(-1)  # of all heads: as few entries as the mask
    largest = block.mask.amax(-1, keepdim=True)
    return (block.mask < LARGE_MASK) & (block.mask - largest < -(1024 + 4 * rows))


def _largest_product(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """R of each row, and more than what rounding makes of it."""
    query_off, key_off = query_error(block), key_error(block)
    queries, keys = block.queries.norm(dim=-1) + query_off, (block.keys.norm(dim=-1) + key_off).amax(-1, keepdim=True)
    return 2 * abs(block.scale_value) * queries * keys


def _product_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """Largest error of the products of each query with the keys."""
    if block.query_norm is not None:
        query_off, key_off = query_error(block), key_error(block).amax(-1, keepdim=True)
        queries, keys = block.queries.norm(dim=-1), block.keys.norm(dim=-1).amax(-1, keepdim=True)
        own = 2 * gamma(block.w_q.shape[-1] + 8) * queries * keys
        return queries * key_off + query_off * (keys + key_off) + own
    operations = 2 * max(block.w_q.shape[-2], block.w_k.shape[-2]) + block.w_q.shape[-1] + 6
    norms = block.weight_norms
    query_size = _token_norms(block.query_input, block.b_q).unsqueeze(-2) * _weight_norm(norms.query_size, block.b_q)
    key_size = _token_norms(block.source_input, block.b_k).amax(-1)[..., None, None] * _weight_norm(
        norms.key_size, block.b_k
    )
    if block.query_rotation is not None:
        operations += 10
    return gamma(operations) * query_size * key_size * rotation_norms(block).unsqueeze(-1)


@_untracked
def query_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """How far computed queries can be from exact ones, as the Euclidean norm of each row; without a gradient.

    Args:
        block: in float64.
    """
    return _row_error(block.query_factors, block.projected_queries, block.query_norm, block.query_rotation)


@_untracked
def key_error(block: Attention) -> Float[Tensor, "*batch heads m"]:
    """The same for the keys.

    Args:
        block: in float64.
    """
    return _row_error(block.key_factors, block.projected_keys, block.key_norm, block.key_rotation)


def _row_error(
    factors: tuple[Tensor, Tensor], projected: Tensor, norm: RmsNorm | None, rotation: Tensor | None
) -> Tensor:
    if norm is None:
        return projection_error(*factors, rotation)
    off = norm.total(projection_error(*factors, None).unsqueeze(-1).square()).sqrt()
    length = norm.total(projected.square()).sqrt() * (1 - 2 * gamma(norm.width + 8))
    shortest = (length - 2 * off).clamp(min=0)
    root = ((shortest.square() / norm.width + norm.eps).rsqrt() * off).squeeze(-1)
    largest = norm.weight.abs().amax(-1, keepdim=True)
    normalised = norm(projected).norm(dim=-1)
    error = largest * root + 2 * gamma(norm.width + 24) * normalised  # four more roundings pay for a turn
    return error * rotation_norm(rotation, largest[..., 0]).unsqueeze(-1) * (1 + 1e-9)


@torch.no_grad()
def projection_error(
    tokens: Float[Tensor, "*batch one n dim"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
    rotation: Float[Tensor, "*rotary n 2 pairs"] | None,
) -> Float[Tensor, "*out heads n"]:
    """How far computed queries or keys can be from exact ones in float64, as the Euclidean norm of each row.

    gamma(D + 5) rho |x_i| ||W||_F, see the top of this file; without a gradient.

    Args:
        tokens: as in `Attention.query_factors`, with a feature 1 where there is a bias.
        weights: the same, with the bias as one more row.
        rotation: of the queries or keys.
    """
    size = tokens.norm(dim=-1) * weights.norm(dim=(-2, -1)).unsqueeze(-1)
    norm = rotation_norm(rotation, size[..., 0]).unsqueeze(-1)
    return 2 * gamma(tokens.shape[-1] + 8) * size * norm


def rotation_norms(block: Attention) -> Float[Tensor, "*rotary one"]:
    """Product of the norms of the two rotations, rounded up; 1 without rotary positions.

    Args:
        block: in float64.
    """
    like = block.w_q[..., 0, 0]
    return rotation_norm(block.query_rotation, like) * rotation_norm(block.key_rotation, like)


def _token_norms(tokens: Tensor, bias: Tensor | None) -> Tensor:
    squares = tokens.square().sum(-1)
    return (squares if bias is None else squares + 1).sqrt()


def _weight_norm(squares: Tensor, bias: Tensor | None) -> Tensor:
    """Frobenius norm of each head's weights with the bias as one more row, shaped [*weights, heads, 1]."""
    return (squares if bias is None else squares + bias.square().sum(-1)).sqrt().unsqueeze(-1)
