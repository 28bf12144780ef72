"""Bounds through the covariances of keys and values under each attention row, ours.

    exact:  ||W_V|| ||P|| + s max_i ||Cov_i(V, K) W_Q^T|| + sqrt( max_j sum_i P_ij |u_i|^2 ||Cov_i(V, V)|| )
    trace:  ||W_V|| ( ||P|| + s ||W_Q W_K^T|| max_i tr C_i + sqrt( max_j sum_i P_ij |u_i|^2 tr C_i ) )

with u_i = s W_K q_i, Cov_i(Y, Z) = Y^T J(P_i) Z and C_i the covariance of the tokens under row i. Heads: ||W_O||
sqrt(sum_h L_h^2). Where only the query moves, the middle term remains; where only the memory moves, the other two.
Proof, rotary positions, QK-norm: docs/bounds/covariance.md.

Numerics: float64. tr C_i = sum_j P_ij |x_j - x|^2 - |sum_j P_ij (x_j - x)|^2 for any row x. Covariances are differences
of moments of centred data; their rounding is added by lipbounds.derivatives.first.covariance. `trace` at a block in a
shorter dtype, on the CPU: float32 with its rounding proved and added (lipbounds.derivatives.first.single_parts), where
that adds under 5 %; `details["bits"]` says which it was, and `precision="float64"` asks for float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.cache import cached_by_head
from lipbounds.derivatives.first.covariance import (
    CentredRows,
    centred_keys,
    centred_projection,
    centred_tokens,
    map_upper,
    row_covariance,
    row_variance,
)
from lipbounds.derivatives.first.single_parts import SingleParts, in_single_or_double
from lipbounds.derivatives.first.single_precision import Precision, Rounded
from lipbounds.derivatives.logit_changes import key_lipschitz
from lipbounds.derivatives.norms import combine_heads, map_norm
from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.derivatives.token_maps import query_maps
from lipbounds.ops.largest_norm import largest_product_norm
from lipbounds.ops.spectral import product_norm_upper, root, spectral_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, gamma, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="covariance.exact",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="covariance form, derived here (D2)"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 d^2 + H n d^3); with QK-norm of all heads also O(H^2 n d^2 D)",
    version=3,
)
def exact(block: Attention) -> tuple[Tensor, Terms]:
    """Spectral norms of the covariances of keys and values under every attention row.

    Args:
        block: the attention block.
    """
    wide = block.double
    scale = abs(wide.scale_value)
    values = centred_projection(wide.source_input, wide.w_v)
    query_part = key_part = mixing = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        query_part = scale * _largest_query_norm(wide, values)
    if wide.memory_moves:
        key_part = _key_part(wide, _value_norms(wide, values))
        mixing = wide.weight_norms.values * map_norm(wide)
    value, terms = _finish(wide, mixing, query_part, key_part)
    return cast_up(value, block.dtype), terms


@bound(
    name="covariance.trace",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="trace form of the covariance bound, derived here (D3)"),
    supports=("heads", "biases", "mask", "cross", "some_queries"),
    cost="O(H n^2 + n D + H D d^2) beside the attention map",
    version=3,
)
def trace(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """Traces of the covariances of the tokens under every attention row, without a matrix for each row.

    Args:
        block: the attention block.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    return in_single_or_double(block, precision, _trace_in_single, _trace)


def _trace_in_single(parts: SingleParts) -> Rounded:
    heads, values = parts.mixing, parts.norms.values
    if parts.block.query_moves:
        heads = heads + parts.variance.largest() * (parts.scale * parts.norms.logits * values)
    if parts.block.memory_moves:
        heads = heads + parts.key_part(parts.variance) * values
    return parts.of_heads(heads)


def _trace(wide: Attention) -> tuple[Tensor, Terms]:
    variance = row_variance(wide, centred_tokens(wide.source_input))
    value_norm = wide.weight_norms.values
    query_part = key_part = mixing = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        query_part = value_norm * abs(wide.scale_value) * wide.weight_norms.logits * variance.amax(-1)
    if wide.memory_moves:
        key_part = value_norm * _key_part(wide, variance)
        mixing = value_norm * map_norm(wide)
    return _finish(wide, mixing, query_part, key_part)


@cached_by_head
def _largest_query_norm(block: Attention, values: CentredRows) -> Float[Tensor, "*batch heads"]:
    """max_i ||Cov_i(V, K) T_i W_Q^T||, rounded up."""
    cross, error = row_covariance(block, values, centred_keys(block))
    maps = query_maps(block)
    if maps is None:
        return largest_product_norm(cross, block.w_q.mT, error * block.w_q.norm(dim=(-2, -1)).unsqueeze(-1))
    queries = maps.weights.mT.unsqueeze(-3)
    length = queries.norm(dim=(-2, -1))
    norms = product_norm_upper(cross, maps.matrices, queries) + error * length * maps.norm.unsqueeze(-1)
    if maps.error is not None:
        size = cross.detach().norm(dim=(-2, -1)) + error
        norms = norms + size * length * inflate(maps.error, cross.shape[-2] + 32).unsqueeze(-1)
    return norms.amax(-1)


@cached_by_head
def _value_norms(block: Attention, values: CentredRows) -> Float[Tensor, "*batch heads n"]:
    """||Cov_i(V, V)|| of each row, rounded up."""
    covariance, error = row_covariance(block, values, values)
    return spectral_norm_upper(covariance) + error


def _key_part(block: Attention, variances: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch heads"]:
    """sqrt( max_j sum_i P_ij |u_i|^2 spread_i ), rounded up."""
    tokens, weights = block.query_factors
    size = tokens.norm(dim=-1) * (weights.norm(dim=(-2, -1)) * block.w_k.norm(dim=(-2, -1))).unsqueeze(-1)
    operations = 2 * (weights.shape[-2] + weights.shape[-1] + 4)
    if block.key_rotation is None and block.key_norm is None:
        logit_gradient = (block.queries @ block.w_k.mT).norm(dim=-1) + gamma(operations) * size
    else:
        length = inflate(block.queries.norm(dim=-1) + query_error(block), block.w_q.shape[-1] + 4)
        logit_gradient = length * key_lipschitz(block).unsqueeze(-1)
    weighted = logit_gradient.square() * variances
    columns = (weighted.unsqueeze(-2) @ map_upper(block)).squeeze(-2)
    return abs(block.scale_value) * inflate(root(columns.amax(-1)), block.tokens + block.w_k.shape[-2] + 16)


def _finish(wide: Attention, mixing: Tensor, query_part: Tensor, key_part: Tensor) -> tuple[Tensor, Terms]:
    value = inflate(combine_heads(wide, mixing + query_part + key_part), 16)
    return value, {"detail.mixing": mixing, "detail.query_part": query_part, "detail.key_part": key_part}
