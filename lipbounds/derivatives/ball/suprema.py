"""Suprema over a ball of the joint deviation of keys, values and queries of all heads of a block, rounded up.

- deviation: sup over |b| = 1 of sqrt( sum_hj t_hij <w'_hj - c_hi, b>^2 ) for weights t_hij >= P'_hij f_hij: it bounds
  covariances;
- shift: how far the mean of a row moves; far: how far one key is from the mean of its row;
- moment of the gradients of the logits: the largest eigenvalue of sum_h t_hij u'_hi u'_hi^T, which bounds variances of
  the logits by the keys.

Symbols and proof: docs/derivatives.md, sections 1 and 6.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.log_odds import maps_interval
from lipbounds.derivatives.ball.rows import Queries, Rows
from lipbounds.derivatives.rounding.logits import key_logit_error
from lipbounds.ops.capped_mean import largest_mean, threshold
from lipbounds.ops.eigen import eigen, largest_eigenvalue
from lipbounds.ops.interval import SoftmaxInterval, g_interval_upper, softmax_interval, variance_interval_upper
from lipbounds.ops.spectral import root, spectral_norm_upper, vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate
from lipbounds.targets.attention import Attention


PEAKED = 0.55  # not 1/2, at which many a row is exactly and rounding would choose


@dc.dataclass(frozen=True, slots=True)
class Maps:
    """The attention maps over the ball: ends of intervals, and how far the maps are from the computed ones.

    Args:
        upper: of P'.
        pairs: of pi, a diagonal above J(P').
        softmax_norm: of g_1 of each row.
        away: of |P' - computed P|.
    """

    upper: Float[Tensor, "*#batch heads n m"]
    pairs: Float[Tensor, "*#batch heads n m"]
    softmax_norm: Float[Tensor, "*#batch heads n"]
    away: Float[Tensor, "*#batch heads n m"]


def maps_on_ball(block: Attention, radius: Float[Tensor, "*#batch"]) -> Maps:
    """Suprema of functions of the maps over the ball.

    Args:
        block: in float64, without rotary positions.
        radius: eps; more radii than batch items, in front, give a result each, here and below.
    """
    interval = maps_interval(block, radius)
    peaked = block.probabilities.amax(-1, keepdim=True) > PEAKED
    pairs = torch.where(peaked, 2 * variance_interval_upper(interval), interval.upper)
    return Maps(interval.upper, pairs, g_interval_upper(interval), _away(block, interval))


def rounding_of_maps(block: Attention) -> Float[Tensor, "*#batch heads n m"]:
    """Upper bound of |P - computed P| at the centre, entry by entry, without a gradient.

    Args:
        block: in float64.
    """
    with torch.no_grad():
        error = key_logit_error(block)
        return _away(block, softmax_interval(block.logits, error))


def _away(block: Attention, interval: SoftmaxInterval) -> Tensor:
    maps = block.probabilities
    return torch.maximum(interval.upper - maps, maps - interval.lower).clamp(min=0)


@dc.dataclass(frozen=True, slots=True)
class DeviationBound:
    """What bounds a weighted deviation of all heads, before it is known how much each head counts.

    Args:
        rows: whose deviation it is.
        radius: of the ball, 0 where the tokens of these rows do not move.
        heads: norm of the weighted z of each head at the centre.
        largest: weight in each row of the map.
        total: sum of the weights of each row.
        error: of a row w' less the mean or constant taken off.
        shift: of the mean of z where the deviation feels it, else None.
    """

    rows: Rows
    radius: Float[Tensor, "*#batch"]
    heads: Float[Tensor, "*#batch heads n"]
    largest: Float[Tensor, "*#batch heads n"]
    total: Float[Tensor, "*#batch heads n"]
    error: Float[Tensor, "*#batch heads n"]
    shift: Float[Tensor, "*#batch heads n"] | None

    def joint(self, share: Float[Tensor, "*#batch heads n"]) -> Float[Tensor, "*#batch n"]:
        """The deviation of all heads with weights t_hij times the share of head h.

        Args:
            share: > 0, of each head in each row.
        """
        factor = root(share)
        heads, total = factor * self.heads, factor * root(self.total)
        moved = (self.radius * self.rows.joint_change).unsqueeze(-1) * root((share * self.largest).amax(-2))
        value = self._combined(heads) + moved
        if self.shift is not None:
            value = value + self._combined(total * self.shift)
        value = torch.minimum(value, self._combined(factor * self.alone()))
        value = value + vector_norm((total * self.error).mT)
        return inflate(value, heads.shape[-2] + 32)

    def alone(self) -> Float[Tensor, "*#batch heads n"]:
        """The deviation of z of each head, without the errors of rows."""
        change = self.radius.unsqueeze(-1) * self.rows.reduced_change
        value = self.heads + change.unsqueeze(-1) * root(self.largest)
        if self.shift is not None:
            value = value + root(self.total) * self.shift
        return inflate(value, 8)

    def _combined(self, heads: Float[Tensor, "*#batch heads n"]) -> Float[Tensor, "*#batch n"]:
        """Norm of all B_h Z_h side by side, from the norms of the Z_h."""
        apart = vector_norm((self.rows.factor_norm.unsqueeze(-1) * heads).mT)
        return torch.minimum(self.rows.joint.unsqueeze(-1) * heads.amax(-2), apart)


class RowDeviations:
    """Rows of keys or values on the ball of the given radius, seen from the mean of each row of the map at the centre.

    Args:
        block: in float64.
        rows: keys or values.
        maps: over the ball.
        radius: of the ball, 0 where the tokens of these rows do not move.
    """

    def __init__(self, block: Attention, rows: Rows, maps: Maps, radius: Float[Tensor, "*#batch"]) -> None:
        self.rows, self.maps, self.radius = rows, maps, radius
        self._away = rows.less_mean(block.probabilities)
        self._operations = 2 * sum(self._away.shape[-2:]) + 32
        self._error = (rows.error + radius.unsqueeze(-1) * rows.change_error).unsqueeze(-1)
        self._error = self._error + torch.zeros_like(maps.upper[..., 0])
        self.plain = self._bound(torch.ones_like(maps.upper), self._error, None)

    def move(
        self, logit_deviation: Float[Tensor, "*#batch heads n"], rounding: Float[Tensor, "*#batch heads n m"]
    ) -> None:
        """Find how far means and rows are from where they were: `shift`, `far`.

        Args:
            logit_deviation: bound on sqrt(Var_hi(S)) over the ball, S how far the logits move.
            rounding: of the maps at the centre.
        """
        # The computed mean differs from that under the computed map, and that map's sum from 1.
        lost = 8 * gamma(self._operations) * self.rows.largest()
        own = (self.radius.unsqueeze(-1) * self.rows.reduced_change + lost).unsqueeze(-1)
        distance = self._distance
        # The mean lies among the rows where these count as in the ball, and c is their mean where they count as before.
        by_entries = torch.minimum((self.maps.away * distance).sum(-1), largest_mean(distance, self.maps.upper))
        by_rate = (rounding * distance).sum(-1) + logit_deviation * self.plain.alone()
        self.shift = inflate(torch.minimum(by_entries, by_rate) + own, self._operations)
        self._error_of_mean = (2 + logit_deviation) * self._error
        far = self.rows.factor_norm[..., None, None] * (distance + (own + self.shift).unsqueeze(-1))
        self.far = inflate(far + self._error_of_mean.unsqueeze(-1), 8)

    def weighted(self, factors: Float[Tensor, "*#batch heads n m"]) -> DeviationBound:
        """The deviation of the rows less their mean in the ball, weighted by P' f; after `move`.

        Args:
            factors: f >= 0.
        """
        return self._bound(factors, self._error_of_mean, self.shift)

    def _bound(self, factors: Tensor, error: Tensor, shift: Tensor | None) -> DeviationBound:
        """The maps sum to 1: sum_j P'_j f_j <z_j, b>^2 <= mu + sum_j U_j f_j (1 - mu / (f_j |z_j|^2))_+ <z_j, b>^2."""
        weights = self.maps.upper * factors
        sizes = inflate(factors * self._distance.square(), 8)
        whole = self._weighted(weights)
        # As if all keys shared the directions of the norm alike: then this is the best mu.
        energy = (self.maps.upper * sizes).detach().sum(-1, keepdim=True)
        share = whole.detach().square().unsqueeze(-1) / torch.where(energy > 0, energy, 1.0)
        level = threshold(sizes, self.maps.upper * share).unsqueeze(-1)
        kept = torch.where(sizes > level, 1 - level / torch.where(sizes > level, sizes, 1.0), 0.0)
        apart = root(level.squeeze(-1) + self._weighted(weights * inflate(kept, 8)).square())
        heads = inflate(torch.minimum(whole, apart), self._operations)
        largest, total = weights.amax(-1), largest_mean(factors.expand(weights.shape), self.maps.upper)
        return DeviationBound(self.rows, self.radius, heads, largest, total, error, shift)

    @cached_property
    def _distance(self) -> Float[Tensor, "*#batch heads n m"]:
        """Of each row from the mean."""
        return inflate(vector_norm(self._away), self._operations)

    def _weighted(self, weights: Tensor) -> Tensor:
        return spectral_norm_upper(root(weights).unsqueeze(-1) * self._away)


def head_sizes(block: Attention, rows: Rows) -> Float[Tensor, "*#batch heads n"]:
    """Estimate of the deviation of the rows of each head at the centre, without rounding: a weight of heads.

    Args:
        block: in float64.
        rows: keys or values.
    """
    moments, means = rows.moments(block.probabilities)
    variance = moments - means
    return root(torch.maximum(variance, 1e-6 * moments))


def balance(first: Float[Tensor, "*#batch heads n"], second: Float[Tensor, "*#batch heads n"]) -> Tensor:
    """Shares of the heads, all > 0: in sum_h a_h b_h <= sqrt(sum_h share_h b_h^2) sqrt(sum_h a_h^2 / share_h) equality
    holds for a_h / b_h. A thousandth of the largest head is added to each, so that no share is 0 or infinite.

    Args:
        first: sizes of the a_h, >= 0.
        second: sizes of the b_h, >= 0.
    """
    sizes = []
    for size in (first, second):
        largest = size.amax(-2, keepdim=True)
        sizes.append(torch.where(largest > 0, size / torch.where(largest > 0, largest, 1.0), 1.0) + 1e-3)
    return sizes[0] / sizes[1]


def logit_gradient_moment(
    queries: Queries, radius: Float[Tensor, "*#batch"], weights: Float[Tensor, "*#batch heads n m"]
) -> Float[Tensor, "*#batch n m"]:
    """Upper bound of the norm of sum_h t_hij u'_hi u'_hi^T over the ball.

    Args:
        queries: of the block.
        radius: of the ball, 0 where the queries do not move.
        weights: t >= 0.
    """
    roots = root(weights).movedim(-3, -1)  # n x m x heads
    gram = queries.inner * roots.unsqueeze(-1) * roots.unsqueeze(-2)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    heads = gram.shape[-1]
    square = trace
    if heads > 1:
        largest = _largest_eigenvalue(gram) + 32 * heads * UNIT_ROUNDOFF * trace
        square = torch.minimum(trace, largest)
    total = weights.sum(-3)
    square = square + queries.slack.unsqueeze(-1) * total
    lost = root((weights * queries.error.square()[..., None, None]).sum(-3))
    moved = (radius * queries.joint_change)[..., None, None] * root(weights.amax(-3))
    return inflate((root(square) + moved + lost).square(), 2 * heads + 32)


def stacked_queries(
    queries: Queries, radius: Float[Tensor, "*#batch"], weights: Float[Tensor, "*#batch heads n"]
) -> Float[Tensor, "*#batch"]:
    """Upper bound of sup over unit y of sqrt(sum_hi t_hi <u'_hi, y>^2) over the ball.

    Args:
        queries: of the block.
        radius: of the ball, 0 where the queries do not move.
        weights: t >= 0.
    """
    assert queries.rows is not None  # keys are not turned
    rows = root(weights).unsqueeze(-1) * queries.rows
    moved = radius * queries.joint_change * root(weights.amax((-2, -1)))
    lost = root((weights * queries.error.square().unsqueeze(-1)).sum((-2, -1)))
    operations = rows.shape[-3:-1].numel() + 32
    return inflate(spectral_norm_upper(rows.flatten(-3, -2)) + moved + lost, operations)


def _largest_eigenvalue(gram: Float[Tensor, "*#batch size size"]) -> Float[Tensor, "*#batch"]:
    """As computed by LAPACK; its gradient is that of v^T A v with the top eigenvector v held fixed."""
    if not (torch.is_grad_enabled() and gram.requires_grad):
        return largest_eigenvalue(gram)
    values, vectors = eigen(gram.detach())
    top = vectors[..., -1:]
    stretch = (top.mT @ gram @ top)[..., 0, 0]
    return values[..., -1].clamp(min=0) + (stretch - stretch.detach())
