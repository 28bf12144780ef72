"""What a block can be while its moving input X' stays in the ball ||X' - X||_F <= eps: logits, maps, Theorem 3 there.

Each logit moves by at most s eps sqrt(|W_Q k_j|^2 + |W_K q_i|^2) + s ||W_Q W_K^T|| eps^2/2 (i != j, self-attention),
softmax rows stay in the interval that this gives (lipbounds.ops.interval), and the norms in Theorem 3 grow with eps.
Rounding of the logits is added to the radius of the interval. Proof: docs/derivatives.md, section 6.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.reach import reaches
from lipbounds.derivatives.ball.turned_logits import turned_logit_radius
from lipbounds.derivatives.ball.turned_rows import is_turned
from lipbounds.derivatives.logit_changes import change_by_keys, change_by_queries, key_norm, query_norm
from lipbounds.derivatives.norms import combine_heads, value_norm
from lipbounds.derivatives.rounding.logits import key_logit_error
from lipbounds.ops._rows import SMALLEST_NORMAL
from lipbounds.ops.interval import SoftmaxInterval, g_interval_upper, softmax_interval
from lipbounds.ops.nonnegative import nonnegative_norm_upper
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.rounding import gamma, inflate, product
from lipbounds.targets.attention import Attention


SIZE_SLACK = 1e-11  # relative, for the norms of single rows: pays for sums of up to 40 000 squares


def theorem_3_on_ball(
    block: Attention,
    radius: float,
    interval: SoftmaxInterval | None = None,
    change: Float[Tensor, "*batch heads"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bias-aware Theorem 3 of Yudin et al. 2025 with every factor bounded over the ball, and its parts; in float64.

    Args:
        block: in float64.
        radius: eps, Frobenius norm.
        interval: of the maps over the ball; by default that of independent logits.
        change: how far the logits move, without s; by default `logit_change`.
    """
    if interval is None:
        interval = softmax_interval(block.logits, logit_radius(block, radius))
    if change is None:
        change = logit_change(block, radius)
    norms = g_interval_upper(interval).amax(-1)
    values = value_norm(block)
    mixing = torch.zeros_like(norms)
    if block.memory_moves:
        value_weights = block.weight_norms.values
        values = values + radius * value_weights
        mixing = product(value_weights, _map_norm(block, interval))
    softmax_part = product(values, norms, abs(block.scale_value), change)
    value = inflate(combine_heads(block, mixing + softmax_part), 32)
    return value, {"mixing": mixing, "softmax_part": softmax_part, "softmax_norm": norms}


def logit_radius(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch heads n m"]:
    """How far each logit can move while the moving input stays in the ball, rounded up.

    Args:
        block: in float64.
        radius: eps, Frobenius norm; more radii than batch items in front give a result each.
    """
    if is_turned(block):
        return turned_logit_radius(block, radius)
    eps = radius[..., None, None, None] if isinstance(radius, Tensor) else radius
    by_query = block.keys @ block.w_q.mT  # W_Q k_j, a row for each key
    by_key = block.queries @ block.w_k.mT  # W_K q_i, a row for each query
    query_sizes = by_query.norm(dim=-1).unsqueeze(-2)
    key_sizes = by_key.norm(dim=-1).unsqueeze(-1)
    if block.moves == "query":
        change = eps * query_sizes
    elif block.moves == "memory":
        change = eps * key_sizes
    else:
        curvature = block.weight_norms.logits[..., None, None]
        # No norm of 0 and 0, which has no gradient.
        both = torch.hypot(query_sizes.clamp(min=SMALLEST_NORMAL), key_sizes)
        apart = eps * both + curvature * eps * eps / 2
        own = block.of_queries(by_query) + by_key
        together = eps * own.norm(dim=-1).unsqueeze(-1) + curvature * eps * eps
        if block.queries_at is None:
            change = apart + torch.diag_embed(together.squeeze(-1) - apart.diagonal(dim1=-2, dim2=-1))
        else:
            tokens = torch.arange(apart.shape[-1], device=apart.device)
            change = torch.where(block.queries_at.unsqueeze(-1) == tokens, together, apart)
    rounded = abs(block.scale_value) * (change + eps * size_error(block)) * (1 + SIZE_SLACK)
    shape = broadcast_shape((rounded.shape, block.logits.shape))
    return rounded.expand(shape) + key_logit_error(block)


def size_error(block: Attention) -> Float[Tensor, "*batch heads 1 1"]:
    """Rounding of what moves logits: W_Q k_j where queries move, W_K q_i where keys do, both where both do.

    gamma times Frobenius norms of the factors, for the largest token. What does not move has units of its own.

    Args:
        block: in float64.
    """
    operations = 2 * (max(block.w_q.shape[-2], block.w_k.shape[-2]) + block.w_q.shape[-1] + 4)
    error = torch.zeros_like(block.logits[..., :1, :1])
    by_key = [(block.query_factors, block.w_k)] if block.memory_moves else []
    by_query = [(block.key_factors, block.w_q)] if block.query_moves else []
    for (tokens, weights), other in by_key + by_query:
        size = tokens.norm(dim=-1).amax(-1) * weights.norm(dim=(-2, -1)) * other.norm(dim=(-2, -1))
        error = error + gamma(operations) * size[..., None, None]
    return error


def logit_change(block: Attention, radius: float) -> Float[Tensor, "*batch heads"]:
    """sup ||K' W_Q^T|| + sup ||Q' W_K^T||, as far as they occur; or what stands for these where tokens are turned.

    Args:
        block: in float64.
        radius: eps, Frobenius norm.
    """
    if is_turned(block):
        return _turned_logit_change(block, radius)
    total = torch.zeros_like(block.logits[..., 0, 0])
    if block.query_moves:
        total = total + change_by_queries(block)
    if block.memory_moves:
        total = total + change_by_keys(block)
    if block.moves == "self":  # only then does the matrix beside the moving one move, too
        total = total + 2 * radius * block.weight_norms.logits
    return total


def _turned_logit_change(block: Attention, radius: float) -> Float[Tensor, "*batch heads"]:
    """max_i ||K' T'_i W_Q^T|| + max_j ||Q' T'_j W_K^T||: T' moves with QK-norm, K' and Q' where both inputs move."""
    queries, keys = reaches(block, radius)
    total = torch.zeros_like(block.logits[..., 0, 0])
    if block.query_moves:
        rows = key_norm(block)
        if block.memory_moves:
            total = total + radius * queries.rate * keys.rate
            rows = rows + radius * keys.rate
        total = total + change_by_queries(block) + torch.minimum(radius * queries.bend, 2 * queries.rate) * rows
    if block.memory_moves:
        rows = query_norm(block)
        if block.query_moves:
            total = total + radius * queries.rate * keys.rate
            rows = rows + radius * queries.rate
        total = total + change_by_keys(block) + torch.minimum(radius * keys.bend, 2 * keys.rate) * rows
    return inflate(total, 32)


def _map_norm(block: Attention, interval: SoftmaxInterval) -> Float[Tensor, "*batch heads"]:
    """sup ||P'|| over the ball, rounded up."""
    maps = block.probabilities  # as computed: the interval holds the exact ones, so their difference is in `deviation`
    deviation = torch.maximum(interval.upper - maps, maps - interval.lower).clamp(min=0)
    from_centre = nonnegative_norm_upper(maps) + deviation.norm(dim=(-2, -1))
    by_columns = interval.upper.sum(-2).amax(-1).sqrt()
    return inflate(torch.minimum(from_centre, by_columns), sum(maps.shape[-2:]) + 16)
