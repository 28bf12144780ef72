"""Softmax rows of a block while its moving input stays in a ball, from how far log-odds of keys can grow.

The log-odds of key j, o_j = S_j - log sum_{l != j} exp(S_l), is concave in the logits, with gradient c_j = e_j - q_j,
q_j the row without j. So o_j grows by at most c_j . dS, in which only differences of logits count and the radius is
shared by all tokens:

    c_j . dS = s ( <dx_i, g_j> + sum_l c_jl <u_i, dx_l> + <dx_i, A sum_l c_jl dx_l> ),    g_j = sum_l c_jl W_Q k_l.

That bounds upper ends of the row; 1 - P_j is at most the sum of those of the others. Lower ends are those of
independent logits (lipbounds.ops.interval). Proof and rounding: docs/derivatives.md, section 6.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.logits import SIZE_SLACK, logit_radius, size_error
from lipbounds.derivatives.ball.odds_rows import OddsRows
from lipbounds.derivatives.ball.turned_logits import turned_odds_gain
from lipbounds.derivatives.ball.turned_rows import is_turned
from lipbounds.derivatives.rounding.logits import key_logit_error
from lipbounds.ops.interval import SoftmaxInterval, softmax_interval
from lipbounds.ops.spectral import never_nan, root
from lipbounds.rounding import EXP_ULPS, UNIT_ROUNDOFF, gamma
from lipbounds.targets.attention import Attention


LARGEST = 2**24  # entries of the maps of one input: beyond, independent logits alone, which need less memory


def maps_interval(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> SoftmaxInterval:
    """Enclosure of the attention maps over the ball.

    Args:
        block: in float64.
        radius: eps, Frobenius norm; more radii than batch items in front give a result each.
    """
    gain = log_odds_gain(block, radius) if block.logits.shape[-3:].numel() <= LARGEST else None
    return softmax_interval(block.logits, logit_radius(block, radius), gain)


def log_odds_gain(block: Attention, radius: float | Float[Tensor, "*#batch"]) -> Float[Tensor, "*out heads n m"]:
    """How far the log-odds of each key can be above those of the computed logits, rounded up.

    Args:
        block: in float64.
        radius: eps, Frobenius norm; more radii than batch items in front give a result each.
    """
    rows = _Functionals(block)
    moved = turned_odds_gain(block, radius) if is_turned(block) else _moved(block, radius, rows)
    # Any row q proves the bound, at the cost of its divergence from the exact one: at most the largest |log| of their
    # ratio, 2 eta and the roundings of the softmax, whose exponents are rounded by at most 745 u each.
    rounded = (8 * block.logits.shape[-1] + 8 * EXP_ULPS + 4096) * UNIT_ROUNDOFF
    gain = moved + 4 * key_logit_error(block) + rounded
    return torch.where(rows.known, never_nan(gain), torch.inf)


def _moved(block: Attention, radius: float | Tensor, rows: _Functionals) -> Tensor:
    """sup c_j . dS of every key, without rotary positions and QK-norm."""
    eps = radius[..., None, None, None] if isinstance(radius, Tensor) else radius
    linear = eps * (root(rows.squares) + 2 * size_error(block))
    if block.moves == "self":
        own = rows.own.abs() + root(rows.entries)
        linear = linear + block.weight_norms.logits[..., None, None] * (eps * eps / 2) * own
    return abs(block.scale_value) * linear * (1 + SIZE_SLACK)


class _Functionals(OddsRows):
    """The same, with what the tokens do to them."""

    @cached_property
    def squares(self) -> Tensor:
        """The square of the norm of c_j . dS / s as a linear map of the tokens that move, to first order.

        All inner products go through the features of a head: nothing of size n x m x D is formed.
        """
        block = self.block
        keys = block.keys - block.keys.mean(-2, keepdim=True)
        by_key = block.queries @ block.w_k.mT
        sizes = by_key.square().sum(-1, keepdim=True)
        total = torch.zeros_like(block.logits)
        if block.query_moves:
            total = total + self._distances(keys, block.w_q.mT @ block.w_q)
        if block.memory_moves:
            total = total + sizes * self.entries
        if block.moves == "self":
            inner = (by_key @ block.w_q) @ keys.mT
            apart = [inner - (row * inner).sum(-1, keepdim=True) for row in (block.probabilities, self.rest)]
            total = total + 2 * self.own * self.each(apart[0], apart[1], 1)
        return total.clamp(min=0) + self._slack(keys)

    def _distances(self, keys: Tensor, metric: Tensor) -> Tensor:
        """|W sum_l c_jl k_l|^2, from W^T W: of the largest key by itself, of the others from the mean of the row."""
        maps, index = self.block.probabilities, self.block.probabilities.argmax(-1, keepdim=True)
        every = keys.expand(*index.shape[:-2], *keys.shape[-2:])
        largest = every.gather(-2, index.expand(*index.shape[:-1], keys.shape[-1]))
        of_rest = self.rest @ keys
        apart = largest - of_rest
        of_largest = ((apart @ metric) * apart).sum(-1, keepdim=True)
        share = maps.gather(-1, index)
        mean = share * largest + maps.masked_fill(self.top, 0.0).sum(-1, keepdim=True) * of_rest
        turned = keys @ metric
        own = (turned * keys).sum(-1).unsqueeze(-2)
        of_others = own - 2 * (mean @ turned.mT) + ((mean @ metric) * mean).sum(-1, keepdim=True)
        return self.each(of_others, of_largest, 2)

    @torch.no_grad()
    def _slack(self, keys: Tensor) -> Tensor:
        """What rounding may take off the squares: each is a sum of products of at most 16 (a + b)^2 together.

        Of what moves: the other term has units of its own.
        """
        block = self.block
        moving = [(keys, block.w_q)] if block.query_moves else []
        moving += [(block.queries, block.w_k)] if block.memory_moves else []
        largest = [tokens.square().sum(-1).amax(-1) * weights.square().sum((-2, -1)) for tokens, weights in moving]
        operations = 4 * (block.w_q.shape[-2] + block.w_k.shape[-2]) + 2 * sum(keys.shape[-2:]) + 32
        return (64 * gamma(operations) * sum(largest, torch.zeros_like(largest[0])))[..., None, None]
