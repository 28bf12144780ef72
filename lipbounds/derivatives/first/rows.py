"""The rows of the Jacobian of an attention block in factored form, with their rounding.

    dy_i = sum_h W_O^hT [ sum_j P_hij W_V^hT dx_j + sum_j x_hij <u_hi, dx_j> + Z_hi dx_i ],
    x_hij = P_hij (v_hj - m_hi),   u_hi = s W_K^h q_hi,   Z_hi = s Cov_hi(V, K) W_Q^hT,   m_hi = sum_j P_hij v_hj.

With rotary positions or QK-norm u_hi is W_K^h t_hij (lipbounds.derivatives.first.pulled_queries) and depends on the
key, and Z_hi = s Cov_hi(V, K) T_hi W_Q^hT. `Rows` holds P, x, u or t, and Z as computed, each row i divided by a power
of two, with a bound on the size of the row and on its error. Scaling, rounding and proof: docs/derivatives.md, section
2.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.derivatives.first.covariance import (
    CentredRows,
    centred_keys,
    centred_projection,
    map_error,
    row_covariance,
)
from lipbounds.derivatives.first.pulled_queries import PulledQueries, through_query_maps
from lipbounds.ops.spectral import power_of_two
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The factors of the Jacobian; a part whose input does not move is None.

    Args:
        w_v: value weights, scaled.
        w_o: output weights, scaled; the Jacobian is `unit` times what these give.
        unit: power of two.
        maps: P, divided by `scale`.
        deviations: x_hij, not divided.
        logit_gradient: u_hi, divided by `scale`; None where it depends on the key.
        pulled: t_hij, divided by `scale`, where it does.
        w_k: what makes u_hij of it: key weights of order 1, one matrix where the heads are normalised together.
        query: Z_hi, divided by `scale`.
        queries_at: the input token of each row, where these are not all tokens in order.
        scale: power of two of each row, of the order of its size.
        size: bound on the computed row, divided by `scale`.
        error: bound on its error, divided by `scale`.
    """

    w_v: Float[Tensor, "*weights heads dim value_dim"]
    w_o: Float[Tensor, "*weights heads value_dim out_dim"]
    unit: Float[Tensor, "*weights"]
    maps: Float[Tensor, "*batch heads n m"] | None
    deviations: Float[Tensor, "*batch n m heads value_dim"] | None
    logit_gradient: Float[Tensor, "*batch heads n dim"] | None
    pulled: Float[Tensor, "*batch heads n m features"] | None
    w_k: Float[Tensor, "*weights any_heads dim features"] | None
    query: Float[Tensor, "*batch heads n value_dim query_dim"] | None
    queries_at: Int[Tensor, " n"] | None
    scale: Float[Tensor, "*batch n"]
    size: Float[Tensor, "*batch n"]
    error: Float[Tensor, "*batch n"]

    def tokens(self, which: slice) -> slice | Int[Tensor, " some"]:
        """The input tokens that some rows are about.

        Args:
            which: the rows.
        """
        return which if self.queries_at is None else self.queries_at[which]


def jacobian_rows(block: Attention) -> Rows:
    """The factors of the Jacobian at `block`.

    Args:
        block: in float64.
    """
    w_v, w_o, unit = scaled_weights(block)
    output = w_o.detach().norm(dim=(-2, -1)).unsqueeze(-1)
    values = centred_projection(block.source_input, w_v)
    size = error = torch.zeros_like(block.logits[..., 0].detach())
    maps = deviations = gradients = query = None
    if block.memory_moves:
        maps = block.probabilities
        by_head = values.rows.unsqueeze(-3) - (maps @ values.rows).unsqueeze(-2)
        deviations = (maps.unsqueeze(-1) * by_head).movedim(-4, -2).contiguous()
        gradients = _gradients(block)
        with torch.no_grad():
            through = w_v.norm(dim=(-2, -1)).unsqueeze(-1)
            deviations_size = deviations.norm(dim=(-3, -1)).mT
            size = size + maps.norm(dim=-1) * through + deviations_size * gradients.size
            error = error + map_error(block) * through + deviations_size * gradients.error
            error = error + deviation_error(block, values) * (gradients.size + gradients.error)
    if block.query_moves:
        cross, cross_error = row_covariance(block, values, centred_keys(block))
        cross, cross_error, w_q = through_query_maps(block, cross, cross_error)
        query = block.scale_value * cross @ w_q.mT.unsqueeze(-3)
        with torch.no_grad():
            factor = abs(block.scale_value) * w_q.norm(dim=(-2, -1)).unsqueeze(-1)
            cross_size = cross.norm(dim=(-2, -1))
            size = size + query.norm(dim=(-2, -1))
            error = error + (cross_error + gamma(w_q.shape[-1] + 4) * cross_size) * factor
    operations = block.logits.shape[-1] + sum(block.w_v.shape[-2:]) + block.heads + 32
    size, error = inflate((output * size).sum(-2), operations), inflate((output * error).sum(-2), operations)
    scale = power_of_two((size + error)[..., None, None])[..., 0, 0]
    per_head = scale.unsqueeze(-2).unsqueeze(-1)
    return Rows(
        w_v=w_v,
        w_o=w_o,
        unit=unit,
        maps=None if maps is None else maps / per_head,
        deviations=deviations,
        logit_gradient=None if gradients is None or gradients.own is None else gradients.own / per_head,
        pulled=None if gradients is None or gradients.pulled is None else gradients.pulled / per_head.unsqueeze(-1),
        w_k=None if gradients is None else gradients.w_k,
        query=None if query is None else query / per_head.unsqueeze(-1),
        queries_at=block.queries_at,
        scale=scale,
        size=size / scale,
        error=error / scale,
    )


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class _Gradients:
    """u_hi, or t_hij and the weights that make u_hij of it; size and error of u, of t_hij times ||W_K||_F."""

    own: Tensor | None = None
    pulled: Tensor | None = None
    w_k: Tensor | None = None
    size: Float[Tensor, "*batch heads n"]
    error: Float[Tensor, "*batch heads n"]


def _gradients(block: Attention) -> _Gradients:
    if block.key_norm is None and block.key_rotation is None:
        own = block.scale_value * block.queries @ block.w_k.mT
        return _Gradients(own=own, size=own.detach().norm(dim=-1), error=logit_gradient_error(block))
    queries = PulledQueries(block)
    pulled = queries()
    with torch.no_grad():
        by = queries.weights_size.unsqueeze(-1)
        size = inflate(pulled.norm(dim=-1).amax(-1) * by, pulled.shape[-1] + 4)
        error = inflate(queries.error * by, 4)
    return _Gradients(pulled=pulled, w_k=queries.weights, size=size, error=error)


@torch.no_grad()
def logit_gradient_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """How far a computed u_hi can be from the exact one; without a gradient.

    Args:
        block: in float64, without rotary positions.
    """
    tokens, weights = block.query_factors
    length = tokens.norm(dim=-1) * weights.norm(dim=(-2, -1)).unsqueeze(-1)
    length = abs(block.scale_value) * length * block.w_k.norm(dim=(-2, -1)).unsqueeze(-1)
    return 2 * gamma(2 * (sum(block.w_q.shape[-2:]) + 8)) * length


@torch.no_grad()
def deviation_error(block: Attention, values: CentredRows) -> Float[Tensor, "*batch heads n"]:
    """How far the computed x_hij of a row can be from the exact ones, in sum over j; without a gradient.

    Args:
        block: in float64.
        values: the centred values as computed.
    """
    relative = 4 * map_error(block) + 4 * gamma(block.logits.shape[-1] + 8)
    return relative * values.size.unsqueeze(-1) + 4 * values.error.unsqueeze(-1)


def scaled_weights(block: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """W_V, W_O of order 1 for each head and for all heads, and the unit that is left over.

    Weights of 0 have no unit: they take that of the largest, or W_O of their head would count in units of its own.

    Args:
        block: in float64.
    """
    by_head = power_of_two(block.w_v.detach())
    nothing = (block.w_v.detach() == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    largest = power_of_two(block.w_v.detach().flatten(-3, -2)).unsqueeze(-3)
    by_head = torch.where(nothing, largest, by_head)
    w_o = block.w_o * by_head
    unit = power_of_two(w_o.detach().flatten(-3, -2))[..., 0, 0]
    return block.w_v / by_head, w_o / unit[..., None, None, None], unit
