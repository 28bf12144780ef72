r"""How far logits and log-odds move in a ball where queries and keys are turned by rotary positions or normalised.

As lipbounds.derivatives.ball.logits and lipbounds.derivatives.ball.log_odds, with gradients of their own for each query
and key, w_ij and u_ij, and with what QK-norm bends:

    |S'_ij - S_ij - <w_ij, dx_i> - <u_ij, dx_j>| <= s ( alpha beta |dx_i| |dx_j| + alpha_2 |k_j| |dx_i|^2 / 2 +
                                                        beta_2 |q_i| |dx_j|^2 / 2 ),

alpha, alpha_2 bounds of the derivatives of the queries in the ball, beta, beta_2 of the keys
(lipbounds.derivatives.ball.reach). Proof: docs/derivatives.md, section 6.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.odds_rows import OddsRows
from lipbounds.derivatives.ball.reach import reaches
from lipbounds.derivatives.ball.turned_rows import PulledKeys, chunks, gradient_error
from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.first.pulled_queries import PulledQueries
from lipbounds.derivatives.rounding.logits import key_error, key_logit_error, query_error
from lipbounds.ops._rows import SMALLEST_NORMAL
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.ops.spectral import root, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


SIZE_SLACK = 1e-11  # relative: pays for sums of up to 40 000 squares


@dc.dataclass(frozen=True, slots=True)
class Gradients:
    """Sizes of the gradients of logits and of log-odds, for every head, query and key, as computed.

    Args:
        by_query: |w_ij|; 0 where the queries do not move.
        by_key: |u_ij|; 0 where the keys do not move.
        together: |w_ii + u_ii| of the token that the query is at; where both move.
        odds: the norm of c_j . dS as a linear map of the tokens that move, to first order.
        spread: |sum_l c_jl k_l|.
        error: of each of the two, and of `together`.
    """

    by_query: Float[Tensor, "*batch heads n m"]
    by_key: Float[Tensor, "*batch heads n m"]
    together: Float[Tensor, "*batch heads n"]
    odds: Float[Tensor, "*batch heads n m"]
    spread: Float[Tensor, "*batch heads n m"]
    error: Float[Tensor, "*batch heads 1 1"]


def turned_logit_radius(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> Float[Tensor, "*out heads n m"]:
    """How far each logit can move while the moving input stays in the ball, rounded up.

    Args:
        block: in float64, with rotary positions or QK-norm.
        radius: eps, Frobenius norm; more radii than batch items in front give a result each.
    """
    radius = torch.as_tensor(radius, dtype=block.dtype, device=block.device)
    eps, found, bends = radius[..., None, None, None], logit_gradients(block), _Bends(block, radius)
    # No norm of 0 and 0, which has no gradient.
    both = torch.hypot(found.by_query.clamp(min=SMALLEST_NORMAL), found.by_key)
    square = eps * eps / 2
    apart = eps * both + square * (torch.maximum(bends.of_queries, bends.of_keys) + bends.crossed)
    if block.moves == "self":
        own = square * (bends.of_queries + bends.of_keys + 2 * bends.crossed)
        own = eps * found.together.unsqueeze(-1) + own
        apart = torch.where(_own_tokens(block), own, apart)
    change = apart + 2 * eps * found.error
    if block.query_norm is not None:
        change = torch.minimum(change, bends.whole)
    change = change * (1 + SIZE_SLACK)
    return change.expand(broadcast_shape((change.shape, block.logits.shape))) + key_logit_error(block)


def turned_odds_gain(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> Float[Tensor, "*out heads n m"]:
    """How far log-odds can grow to first and second order, without the rounding of the map.

    Args:
        block: in float64, with rotary positions or QK-norm.
        radius: eps, Frobenius norm; more radii than batch items in front give a result each.
    """
    radius = torch.as_tensor(radius, dtype=block.dtype, device=block.device)
    eps, found, bends = radius[..., None, None, None], logit_gradients(block), _Bends(block, radius)
    linear = eps * (found.odds + 4 * found.error)
    square = eps * eps / 2
    if block.moves == "self":
        rows = OddsRows(block)
        linear = linear + square * bends.crossed * (rows.own.abs() + root(rows.entries))
    if block.query_norm is not None:
        linear = linear + square * (bends.of_spread * found.spread + bends.of_keys)
    return linear * (1 + SIZE_SLACK)


def _own_tokens(block: Attention) -> Tensor:
    """Whether a key is that of the token that the query is at, [n, m]."""
    places = torch.arange(block.logits.shape[-1], device=block.device)
    return (places if block.queries_at is None else block.queries_at).unsqueeze(-1) == places


class _Bends:
    """Second-order terms of a logit in units of eps^2 / 2, each with axes for queries and keys.

    Args:
        block: in float64.
        radius: of the ball.
    """

    def __init__(self, block: Attention, radius: Tensor) -> None:
        scale = abs(block.scale_value)
        queries, keys = reaches(block, radius)
        query_size = inflate(vector_norm(block.queries) + query_error(block), block.w_q.shape[-1] + 8).unsqueeze(-1)
        key_size = inflate(vector_norm(block.keys) + key_error(block), block.w_q.shape[-1] + 8).unsqueeze(-2)
        moving = (float(block.query_moves), float(block.memory_moves))
        self.of_spread = (moving[0] * scale * queries.bend)[..., None, None]
        self.of_queries = self.of_spread * key_size
        self.of_keys = (moving[1] * scale * keys.bend)[..., None, None] * query_size
        self.crossed = (moving[0] * moving[1] * scale * queries.rate * keys.rate)[..., None, None]
        self.whole = scale * ((queries.size * keys.size)[..., None, None] + query_size * key_size)


@cached_per_block
def logit_gradients(block: Attention) -> Gradients:
    """Sizes of the gradients of the logits and log-odds at the centre of a ball.

    Args:
        block: in float64, with rotary positions or QK-norm.
    """
    rows = OddsRows(block)
    keys, queries = PulledKeys(block), PulledQueries(block)
    parts = [_chunk(block, rows, keys, queries, which) for which in chunks(block)]
    by_query, by_key, together, odds, spread = (torch.cat(part, -2) for part in zip(*parts, strict=True))
    error = torch.zeros_like(block.logits[..., 0, 0].detach())
    with torch.no_grad():
        if block.query_moves:
            length = block.keys.norm(dim=-1).amax(-1) * keys.maps.norm
            error = error + abs(block.scale_value) * gradient_error(keys.weights, length, keys.error)
        if block.memory_moves:
            error = error + gradient_error(queries.weights, queries.largest, queries.error.amax(-1))
        operations = 8 * (block.w_q.shape[-2] + block.logits.shape[-1]) + 64
        largest = (by_query + by_key).amax((-2, -1))
        error = error + 16 * gamma(operations) * largest
    return Gradients(by_query, by_key, together[..., 0], odds, spread, error[..., None, None])


def _chunk(block: Attention, rows: OddsRows, keys: PulledKeys, queries: PulledQueries, which: slice) -> list[Tensor]:
    """The fields of Gradients for some rows of the map."""
    maps = block.probabilities[..., which, :]
    top, rest = rows.top[..., which, :], rows.rest[..., which, :]
    left = 1 - maps.masked_fill(top, 0.5)  # >= 1/2
    by_query = by_key = together = squares = spread = torch.zeros_like(maps)
    in_query = in_key = functional = None

    def each(vectors: Tensor) -> Tensor:
        """sum_l c_jl of vectors with axes rows x m x width, for every j."""
        vectors = vectors - vectors.mean(-2, keepdim=True)
        of_row, of_rest = (p.unsqueeze(-2) @ vectors for p in (maps, rest))
        return torch.where(top.unsqueeze(-1), vectors - of_rest, (vectors - of_row) / left.unsqueeze(-1))

    if block.query_moves:
        in_query = block.scale_value * keys(which) @ keys.weights.mT.unsqueeze(-3)
        by_query = by_query + vector_norm(in_query)
        functional = each(in_query)
        squares = squares + functional.square().sum(-1)
    if block.memory_moves:
        in_key = queries(which) @ queries.weights.mT.unsqueeze(-3)
        by_key = by_key + vector_norm(in_key)
        sizes = by_key.square()
        others = ((maps.square() * sizes).sum(-1, keepdim=True) - maps.square() * sizes).clamp(min=0) / left.square()
        of_rest = (rest.square() * sizes).sum(-1, keepdim=True).expand_as(others)
        squares = squares + sizes + torch.where(top, of_rest, others)
    if in_query is not None and in_key is not None and functional is not None and block.moves == "self":
        mine = _own_tokens(block)[which].to(maps.dtype)
        own_query, own_key = (torch.einsum("...ijd,ij->...id", gradients, mine) for gradients in (in_query, in_key))
        together = together + vector_norm(own_query + own_key).unsqueeze(-1)
        crossed = (functional @ own_key.unsqueeze(-1)).squeeze(-1)
        squares = squares + 2 * rows.own[..., which, :] * crossed
    operations = 4 * (block.w_q.shape[-2] + block.w_k.shape[-2] + maps.shape[-1]) + 32
    slack = 64 * gamma(operations) * (by_query + by_key).detach().amax(-1, keepdim=True).square()
    if block.key_norm is not None:
        lost = 16 * gamma(operations) * vector_norm(block.keys.detach()) + 4 * key_error(block)
        spread = vector_norm(each(block.keys.unsqueeze(-3).expand(*maps.shape, -1)))
        spread = spread + lost.amax(-1)[..., None, None]
    return [by_query, by_key, together, root(squares.clamp(min=0) + slack), spread]
