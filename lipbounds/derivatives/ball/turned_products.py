r"""Products of queries and keys over a ball where these are turned by rotary positions or normalised.

With q = phi(x), k = psi(x) of each token, |D phi| <= alpha and |D psi| <= beta over the ball, and Q', K' there,

    |Q'| <= |Q| + eps alpha,    |Q'| <= sqrt(n) sup |q'|,

and likewise for the keys. With QK-norm the second says that queries and keys stay on an ellipsoid, however large the
ball is. Proof: docs/derivatives.md, section 6.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.reach import Reach, reaches
from lipbounds.derivatives.ball.turned_rows import is_turned
from lipbounds.derivatives.logit_changes import change_by_keys, key_norm, query_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention


def apart_on_ball(block: Attention, radius: float) -> Float[Tensor, "*batch heads"]:
    """sup |D phi| sup ||K'|| + sup |D psi| sup ||Q'||, as far as queries and keys move: how far the logits move.

    It bounds max_i ||K' D phi'_i|| + max_j ||Q' D psi'_j|| at every point of the ball.

    Args:
        block: in float64.
        radius: eps, Frobenius norm.
    """
    queries, keys = reaches(block, radius)
    total = torch.zeros_like(block.logits[..., 0, 0])
    if block.query_moves:
        eps, count = radius * block.memory_moves, block.logits.shape[-1]
        total = total + queries.rate * _rows(key_norm(block), keys.rate, keys.size, count, eps)
    if block.memory_moves:
        eps = radius * block.query_moves
        total = total + keys.rate * _rows(query_norm(block), queries.rate, queries.size, block.tokens, eps)
    return inflate(total, 8)


def change_from_centre(
    block: Attention, radius: float, by_queries: Float[Tensor, "*batch heads"]
) -> Float[Tensor, "*batch heads"]:
    """Upper bound of ||(S' - S) / s||_F / ||X' - X||_F over the ball, up to a constant of each row of S.

    Args:
        block: in float64, self-attention.
        radius: eps, Frobenius norm.
        by_queries: ||K W_Q^T||, or max_i ||K D phi_i|| of turned or normalised queries; K with or without its mean row.
    """
    at_centre = by_queries + change_by_keys(block)
    if not is_turned(block):
        return at_centre + radius * block.weight_norms.logits
    (queries, keys), (queries_here, keys_here) = reaches(block, radius), reaches(block, 0.0)
    rate_q, rate_k = _from_centre(queries_here, queries), _from_centre(keys_here, keys)
    rows_q, rows_k = query_norm(block), key_norm(block)
    # The mean of the derivative along a segment is no further from that at its end than half of what it moves.
    bends = radius / 2 * (queries.bend * rows_k + keys.bend * rows_q)
    first = torch.minimum(at_centre + bends, rate_q * rows_k + rate_k * rows_q)
    # S' - S = (Q' - Q) K^T + Q' (K' - K)^T = (Q' - Q) K'^T + Q (K' - K)^T
    keys_last = rate_q * rows_k + rate_k * _rows(rows_q, rate_q, queries.size, block.tokens, radius)
    queries_last = rate_q * _rows(rows_k, rate_k, keys.size, block.logits.shape[-1], radius) + rate_k * rows_q
    apart = torch.minimum(keys_last, queries_last)
    return inflate(torch.minimum(first + radius * rate_q * rate_k, apart), 16)


def _from_centre(here: Reach, on_ball: Reach) -> Float[Tensor, "*#batch heads"]:
    """sup |q' - q| / |dx|, q at the centre: normalised vectors are no further apart than Dunkl and Williams say."""
    both = here.rate + on_ball.rate
    return inflate(here.rate * (2 * (on_ball.rate / torch.where(both > 0, both, 1.0))), 8)


def _rows(
    at_centre: Float[Tensor, "*batch heads"],
    rate: Float[Tensor, "*#batch heads"],
    size: Float[Tensor, "*#batch heads"],
    count: int,
    radius: float,
) -> Float[Tensor, "*batch heads"]:
    """sup ||Q'|| or sup ||K'||.

    Args:
        at_centre: that norm there.
        rate: how fast a row moves.
        size: of a row.
        count: of rows.
        radius: eps, 0 where they do not move.
    """
    return inflate(torch.minimum(at_centre + radius * rate, count**0.5 * size), 8)
