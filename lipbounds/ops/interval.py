"""Softmax rows whose logits are known up to an interval: |S'_j - S_j| <= r_j for every j.

P_j is largest with S'_j = S_j + r_j and all others lowered, least with the signs swapped; both are attained. Neither
end cancels, nor does 1 - lower, which is returned with them, rounded up. Proof: docs/functions.md, section 3.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops._rows import SMALLEST_NORMAL
from lipbounds.rounding import EXP_ULPS, UNIT_ROUNDOFF, gamma


@dc.dataclass(frozen=True, slots=True)
class SoftmaxInterval:
    """Entrywise enclosure of softmax rows: lower <= P <= upper, and 1 - P <= complement.

    Where P is least, at t, also t (1 - t) <= lower * complement.
    """

    lower: Float[Tensor, "*batch n"]
    upper: Float[Tensor, "*batch n"]
    complement: Float[Tensor, "*batch n"]


def softmax_interval(
    logits: Float[Tensor, "*#batch n"],
    radius: Float[Tensor, "*#batch n"],
    gain: Float[Tensor, "*#batch n"] | None = None,
) -> SoftmaxInterval:
    """Enclosure of softmax(S') over all |S'_j - S_j| <= radius_j, rounded outwards.

    Args:
        logits: float64, -inf where masked (such a key stays masked).
        radius: float64, finite and >= 0, one for each logit; more of them than rows of logits give an interval each.
        gain: float64, >= 0: no log-odds S'_j - log sum_{l != j} exp(S'_l) is farther than that above that of S, where
            more is known than the radii say.
    """
    masked = logits.isneginf()
    high, low = ((logits + moved).masked_fill(masked, -torch.inf) for moved in (radius, -radius))
    # Log-odds of each key at its best and at its worst.
    best = high - _log_sum_of_others(low)
    worst = low - _log_sum_of_others(high)
    if gain is not None:
        grown = logits - _log_sum_of_others(logits) + gain
        best = torch.minimum(best, grown.masked_fill(masked, -torch.inf))
    slack = (4 * logits.shape[-1] + 4 * EXP_ULPS + 64) * UNIT_ROUNDOFF
    gained, lost = _spread(best) + slack, _spread(worst) + slack
    upper = torch.sigmoid(best) * (1 + gained) + SMALLEST_NORMAL
    lower = torch.sigmoid(worst) * (1 - lost) - SMALLEST_NORMAL
    # `lower` may be too small by twice the spread, sigmoid(-worst) by one: the fourth pays for second-order terms.
    complement = torch.sigmoid(-worst) * (1 + 4 * lost) + SMALLEST_NORMAL
    interval = SoftmaxInterval(
        lower=lower.clamp(min=0).masked_fill(masked, 0.0),
        upper=upper.clamp(max=1).masked_fill(masked, 0.0),
        complement=complement.clamp(max=1).masked_fill(masked, 1.0),
    )
    return interval if gain is None else _summing_to_one(interval)


def _summing_to_one(interval: SoftmaxInterval) -> SoftmaxInterval:
    """1 - P_j is at most the sum of the upper ends of the others, where that says more than the lower end does."""
    upper = interval.upper
    top = torch.zeros_like(upper, dtype=torch.bool).scatter(-1, upper.argmax(-1, keepdim=True), True)
    # Without the largest end a sum of the others; of the rest this difference is at least half of what is summed.
    others = torch.where(top, upper.masked_fill(top, 0.0).sum(-1, keepdim=True), upper.sum(-1, keepdim=True) - upper)
    others = others * (1 + 4 * gamma(upper.shape[-1] + 8)) + SMALLEST_NORMAL
    better = others < interval.complement
    lower = torch.where(better, (1 - others - 2 * UNIT_ROUNDOFF).clamp(min=0), interval.lower)
    return dc.replace(interval, lower=lower, complement=torch.where(better, others, interval.complement))


def g_interval_upper(interval: SoftmaxInterval) -> Float[Tensor, "*batch"]:
    """Upper bound of g_1(p) over all probability rows p in the interval; equals g_1 where it is one point.

    Let U and u be the two largest upper ends, L the largest lower end: p_(1) is in [L, U] and p_(2) <= min(u, p_(1),
    1 - p_(1)). So g_1 <= f(p_(1)) with f(t) = t (1 - t + min(u, t, 1 - t)), which grows up to
    t* = max(1/2, min(1 - u, (1 + u)/2)) and falls after it: the largest value on [L, U] is at t* moved into [L, U].
    There t is never the least of the three: t >= 1/2 >= 1 - t, or t = U >= u. (Left in, a tie at t = 1/2 would give it
    a share of the gradient.)

    Args:
        interval: enclosure of the rows, in float64.
    """
    top = interval.upper.topk(min(2, interval.upper.shape[-1]), -1).values
    largest = top[..., 0]
    second = top[..., 1] if top.shape[-1] > 1 else torch.zeros_like(largest)
    least, index = interval.lower.max(-1)
    rest = interval.complement.gather(-1, index.unsqueeze(-1)).squeeze(-1)  # 1 - L without a subtraction
    return g_of_ends(largest, second, least, rest)


def g_of_ends(
    largest: Float[Tensor, "*batch"],
    second: Float[Tensor, "*batch"],
    least: Float[Tensor, "*batch"],
    rest: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """`g_interval_upper` from what it looks at in a row.

    Args:
        largest: U, float64.
        second: u.
        least: L.
        rest: 1 - L.
    """
    peak = torch.clamp(torch.minimum(1 - second, (1 + second) / 2), min=0.5)
    point = torch.minimum(peak, largest)
    inside = _largest_g(point, 1 - point, second)
    at_lower_end = _largest_g(least, rest, second)
    value = torch.where(peak < least, at_lower_end, inside)
    return torch.clamp(value * (1 + 16 * UNIT_ROUNDOFF), max=0.5)


def variance_interval_upper(interval: SoftmaxInterval) -> Float[Tensor, "*batch n"]:
    """Upper bound of p_j (1 - p_j) for each entry of a probability row p in the interval; without cancellation.

    t (1 - t) grows up to t = 1/2 and falls after it, so the largest value on [l, u] is at 1/2 moved into it.

    Args:
        interval: enclosure of the rows, in float64.
    """
    falling = interval.lower * interval.complement
    rising = interval.upper * (1 - interval.upper)
    value = torch.where(interval.lower > 0.5, falling, torch.where(interval.upper < 0.5, rising, 0.25))
    return value * (1 + 8 * UNIT_ROUNDOFF)


def _spread(odds: Tensor) -> Tensor:
    """What one rounding of each log-odds may change: an absolute error of it is a relative error of the result."""
    return (odds.detach().abs() * (4 * UNIT_ROUNDOFF)).nan_to_num(0.0, 0.0, 0.0)


def _largest_g(first: Tensor, rest: Tensor, second: Tensor) -> Tensor:
    return first * (rest + torch.minimum(second, rest))


def _log_sum_of_others(logits: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """log sum_{l != j} exp(logits_l) for every j; -inf where no other key is visible."""
    largest, index = logits.max(-1, keepdim=True)
    weights = (logits - largest).exp()
    # Every weight but the largest is at most half of the total, so this difference keeps its digits ...
    others = (weights.sum(-1, keepdim=True) - weights).scatter(-1, index, 1.0).log() + largest
    # ... and for the largest the others are summed, relative to their own maximum.
    rest = logits.scatter(-1, index, -torch.inf)
    alone = rest.isneginf().all(-1, keepdim=True)
    sum_of_rest = torch.logsumexp(rest.masked_fill(alone, 0.0), -1, keepdim=True).masked_fill(alone, -torch.inf)
    return others.scatter(-1, index, sum_of_rest)
