"""A sound bound on a ball from replaceable parts."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.right import (
    ROUNDING,
    UNIT,
    frobenius,
    key_side,
    length,
    logit_error,
    map_norm,
    norm,
    output,
    query_side,
    value_weights,
    values,
)


@dc.dataclass(frozen=True, kw_only=True)
class Interval:
    """What the softmax rows can be while their logits move by at most `radius`: entrywise ends, and 1 - lower."""

    lower: Tensor
    upper: Tensor
    rest: Tensor


def interval(logits: Tensor, radius: Tensor) -> Interval:
    """Ends of every probability, from log-odds against all other keys; rounded outwards."""
    hidden = logits.isneginf()

    def odds(own: Tensor, others: Tensor) -> Tensor:
        itself = torch.eye(logits.shape[-1], dtype=torch.bool)
        rivals = others.unsqueeze(-2).masked_fill(itself | hidden.unsqueeze(-2), -1e30)
        return own.masked_fill(hidden, -1e30) - rivals.logsumexp(-1)

    best, worst = odds(logits + radius, logits - radius), odds(logits - radius, logits + radius)
    slack = (1 + 1e-12 + 4 * UNIT * (logits.masked_fill(hidden, 0.0).abs() + radius).amax(-1, keepdim=True)).square()
    return Interval(lower=worst.sigmoid() / slack, upper=best.sigmoid() * slack, rest=(-worst).sigmoid() * slack)


def g_1_over(rows: Interval) -> Tensor:
    """Largest g_1 of rows in the interval: t (1 - t + min(u, t, 1 - t)) over the range of the largest entry t."""
    upper = torch.cat([rows.upper, torch.zeros_like(rows.upper[..., :1])], -1).sort(-1, descending=True).values
    least, which = rows.lower.max(-1)
    rest = rows.rest.gather(-1, which.unsqueeze(-1)).squeeze(-1)
    second = upper[..., 1]
    peak = torch.minimum(1 - second, (1 + second) / 2).clamp(min=0.5)
    inside = torch.minimum(peak, upper[..., 0])
    first, rest = torch.where(peak < least, least, inside), torch.where(peak < least, rest, 1 - inside)
    return (first * (rest + torch.minimum(second, torch.minimum(first, rest))) * (1 + ROUNDING)).clamp(max=0.5)


@dc.dataclass(frozen=True, kw_only=True)
class Ball:
    """`Formula` with every part bounded over the ball of the given radius; each can be replaced."""

    softmax: Callable[[Interval], Tensor] = g_1_over
    logit_radius: Callable[[Attention, float], Tensor] | None = None
    softmax_radius: Callable[[float], float] = lambda radius: radius
    map_radius: Callable[[float], float] = lambda radius: radius
    value_radius: Callable[[float], float] = lambda radius: radius
    change_radius: Callable[[float], float] = lambda radius: radius

    def __call__(self, block: Attention, radius: float) -> Tensor:
        """The bound on the ball, in the dtype of the block."""
        wide = block.double
        move = self.logit_radius or logit_radius
        rows = interval(wide.logits, move(wide, self.softmax_radius(radius)))
        reached = interval(wide.logits, move(wide, self.map_radius(radius)))
        curvature = norm(wide.w_q, wide.w_k.mT)
        both = wide.moves == "self"
        change = mixing = torch.zeros_like(wide.logits[..., 0, 0])
        found = values(wide)
        if wide.memory_moves:
            found = found + self.value_radius(radius) * value_weights(wide)
            mixing = value_weights(wide) * _map_norm_over(wide, reached)
            change = change + query_side(wide)
        if wide.query_moves:
            change = change + key_side(wide)
        change = change + (2 * self.change_radius(radius) * curvature if both else 0.0)
        heads = mixing + abs(wide.scale_value) * found * self.softmax(rows).amax(-1) * change
        value = output(wide) * length(heads) * (1 + 4 * ROUNDING)
        return cast_up(value.expand(block.batch_shape), block.dtype)


def logit_radius(block: Attention, radius: float) -> Tensor:
    """How far each logit moves while the moving input moves by `radius`."""
    by_query = torch.linalg.vector_norm(block.keys @ block.w_q.mT, dim=-1).unsqueeze(-2)
    by_key = torch.linalg.vector_norm(block.queries @ block.w_k.mT, dim=-1).unsqueeze(-1)
    change = radius * ((by_query if block.query_moves else 0.0) + (by_key if block.memory_moves else 0.0))
    if block.moves == "self":
        change = change + radius**2 * norm(block.w_q, block.w_k.mT)[..., None, None]
    sizes = (frobenius(block.key_factors[0]) + frobenius(block.query_factors[0])) * (1 + radius)
    weights = frobenius(block.query_factors[1]) * frobenius(block.key_factors[1])
    change = abs(block.scale_value) * (change * (1 + 1e-12) + ROUNDING * radius * (sizes * weights)[..., None, None])
    return (change + logit_error(block)[..., None, None]).expand(block.logits.shape)


def _map_norm_over(block: Attention, rows: Interval) -> Tensor:
    maps = block.probabilities
    away = torch.maximum(rows.upper - maps, maps - rows.lower).clamp(min=0)
    near = map_norm(block) + frobenius(away) * (1 + ROUNDING)
    return torch.minimum(near, rows.upper.sum(-2).amax(-1).sqrt() * (1 + ROUNDING))
