r"""Bounds through the covariances of keys and values under each attention row, ours: bounds.md D2 and D3.

Row i of the differential of a head is, with m_i = sum_j P_ij v_j, u_i = s W_K q_i and Cov_i(Y, Z) = Y^T J(P_i) Z,

    dy_i = sum_j P_ij W_V^T dx_j  +  s Cov_i(V, K) W_Q^T dx_i  +  sum_j P_ij (v_j - m_i) <u_i, dx_j>.

The first map has norm at most ||P|| ||W_V||. The second is block diagonal in i: its norm is the largest of its
blocks'. For the third, |sum_j P_ij (v_j - m_i) c_j|^2 <= ||Cov_i(V, V)|| sum_j P_ij c_j^2 (Cauchy-Schwarz, as sum_j
P_ij (v_j - m_i) (v_j - m_i)^T = Cov_i(V, V)), so summed over i its squared norm is at most max_j sum_i P_ij |u_i|^2
||Cov_i(V, V)||. Hence

    covariance.exact:  ||W_V|| ||P|| + s max_i ||Cov_i(V, K) W_Q^T|| + sqrt( max_j sum_i P_ij |u_i|^2 ||Cov_i(V, V)|| ).

With C_i the covariance of the tokens under row i, Cov_i(V, K) = W_V^T C_i W_K and ||C_i|| <= tr C_i = sum_j P_ij |x_j
- x|^2 - |sum_j P_ij (x_j - x)|^2 for any row x, which gives without any matrix a row

    covariance.trace:  ||W_V|| ( ||P|| + s ||W_Q W_K^T|| max_i tr C_i + sqrt( max_j sum_i P_ij |u_i|^2 tr C_i ) ).

Biases of keys and values drop out of covariances.

Rotary positions turn q_i to R_i q_i and k_j to R_j k_j and keep the proof of covariance.exact: R_i W_Q^T stands for
W_Q^T, the covariance is that of the turned keys (with their biases), and u_ij = s W_K R_j^T q_i depends on the key, so
that |u_i| is replaced by s rho ||W_K|| |q_i|, rho the norm of the rotations as given. In covariance.trace the
covariance of turned keys no longer is W_V^T C_i W_K: it refuses them.

QK-norm puts T_i, the map of each token (lipbounds.derivatives.token_maps), for R_i, and the largest norm of T_j for
rho.

Where only the query moves, the middle term remains; where only the memory moves, the other two. Heads: ||W_O||
sqrt(sum_h L_h^2).

Numerics: float64. Covariances are differences of moments of centred data; the error of a moment is at most gamma
times the moment of absolute values, that of P follows from logit_error, and both are added by
lipbounds.derivatives.first.covariance.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.covariance import (
    centred_keys,
    centred_projection,
    centred_tokens,
    map_upper,
    row_covariance,
    row_variance,
)
from lipbounds.derivatives.logit_changes import key_reach
from lipbounds.derivatives.norms import combine_heads, map_norm
from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.derivatives.token_maps import query_maps
from lipbounds.ops.spectral import product_norm_upper, root, spectral_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, gamma, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="covariance.exact",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="covariance form, derived here (D2)"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm"),
    cost="O(H n^2 d^2 + H n d^3); with QK-norm of all heads also O(H^2 n d^2 D)",
    version=3,
)
def exact(block: Attention) -> tuple[Tensor, Terms]:
    """Spectral norms of the covariances of keys and values under every attention row."""
    wide = block.double
    scale = abs(wide.scale_value)
    values = centred_projection(wide.source_input, wide.w_v)
    query_part = key_part = mixing = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        cross, error = row_covariance(wide, values, centred_keys(wide))
        query_part = scale * _query_norms(wide, cross, error).amax(-1)
    if wide.memory_moves:
        spread, error = row_covariance(wide, values, values)
        key_part = _key_part(wide, spectral_norm_upper(spread) + error)
        mixing = spectral_norm_upper(wide.w_v) * map_norm(wide)
    return _finish(block, mixing, query_part, key_part)


@bound(
    name="covariance.trace",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="trace form of the covariance bound, derived here (D3)"),
    supports=("heads", "biases", "mask", "cross"),
    cost="O(H n^2 + n D + H D d^2) beside the attention map",
    version=2,
)
def trace(block: Attention) -> tuple[Tensor, Terms]:
    """Traces of the covariances of the tokens under every attention row: no matrix a row."""
    wide = block.double
    variance = row_variance(wide, centred_tokens(wide.source_input))
    value_norm = spectral_norm_upper(wide.w_v)
    query_part = key_part = mixing = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        product = abs(wide.scale_value) * product_norm_upper(wide.w_q, wide.w_k.mT)
        query_part = value_norm * product * variance.amax(-1)
    if wide.memory_moves:
        key_part = value_norm * _key_part(wide, variance)
        mixing = value_norm * map_norm(wide)
    return _finish(block, mixing, query_part, key_part)


def _query_norms(
    block: Attention, cross: Float[Tensor, "*batch heads n value_dim head_dim"], error: Float[Tensor, "*batch heads n"]
) -> Float[Tensor, "*batch heads n"]:
    """||Cov_i(V, K) T_i W_Q^T|| of each row, rounded up."""
    maps = query_maps(block)
    if maps is None:
        queries = block.w_q.mT.unsqueeze(-3)
        return product_norm_upper(cross, queries) + error * queries.norm(dim=(-2, -1))
    queries = maps.weights.mT.unsqueeze(-3)
    length = queries.norm(dim=(-2, -1))
    norms = product_norm_upper(cross, maps.matrices, queries) + error * length * maps.norm.unsqueeze(-1)
    if maps.error is None:
        return norms
    size = cross.detach().norm(dim=(-2, -1)) + error
    return norms + size * length * inflate(maps.error, cross.shape[-2] + 32).unsqueeze(-1)


def _key_part(block: Attention, spreads: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch heads"]:
    """sqrt( max_j sum_i P_ij |u_i|^2 spread_i ), rounded up."""
    tokens, weights = block.query_factors
    size = tokens.norm(dim=-1) * (weights.norm(dim=(-2, -1)) * block.w_k.norm(dim=(-2, -1))).unsqueeze(-1)
    operations = 2 * (weights.shape[-2] + weights.shape[-1] + 4)
    if block.key_rotation is None and block.key_norm is None:
        reach = (block.queries @ block.w_k.mT).norm(dim=-1) + gamma(operations) * size
    else:
        length = inflate(block.queries.norm(dim=-1) + query_error(block), block.w_q.shape[-1] + 4)
        reach = length * key_reach(block).unsqueeze(-1)
    weighted = reach.square() * spreads
    columns = (weighted.unsqueeze(-2) @ map_upper(block)).squeeze(-2)
    return abs(block.scale_value) * inflate(root(columns.amax(-1)), block.tokens + block.w_k.shape[-2] + 16)


def _finish(block: Attention, mixing: Tensor, query_part: Tensor, key_part: Tensor) -> tuple[Tensor, Terms]:
    value = inflate(combine_heads(block.double, mixing + query_part + key_part), 16)
    terms = {"detail.mixing": mixing, "detail.query_part": query_part, "detail.key_part": key_part}
    return cast_up(value, block.dtype), terms
