"""How far the float64 products of an `Attention` with its Jacobian can be from the exact ones.

    |fl(J v) - J v|  <=  F(size + error) - F(size)  +  gamma(c) F(size + error),

F the product with every matrix replaced by its size, c the roundings on the longest path; the difference is carried
along as the second member of a pair. Underflow is covered inside the softmax only: weights and tokens are taken to be
zero or above 1e-100 in size. Proof: docs/derivatives.md, section 11.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.matrices import OWN_ROUNDING, Pair, plus_all
from lipbounds.derivatives.rounding.rms_norm import NormRoundoff
from lipbounds.rounding import EXP_ULPS, UNIT_ROUNDOFF, gamma
from lipbounds.targets.attention import Attention
from lipbounds.targets.rotary import rotate_sizes


# Attention to a key this far below the largest logit is below 2**-1090, exactly and as computed.
NEGLIGIBLE_LOGIT = -760.0
# Times the smallest relative error that occurs, 2**-49, it is still above 2**-1022, below which floats may be flushed.
UNDERFLOW = 2.0**-960


class Roundoff:
    """Bounds on the rounding errors of `block.jvp`, `block.vjp` and `block.forward`.

    Args:
        block: in float64.
    """

    def __init__(self, block: Attention) -> None:
        self.block = block
        self.w_q, self.w_k, self.w_v, self.w_o = (Pair(w.abs()) for w in (block.w_q, block.w_k, block.w_v, block.w_o))
        self.scale = Pair(block.x.new_full((), abs(block.scale_value)))
        self.query_norm = self.key_norm = None
        if block.query_norm is None or block.key_norm is None:
            self.queries = _projected(block.query_input, block.w_q, block.b_q, block.queries, block.query_rotation)
            self.keys = _projected(block.source_input, block.w_k, block.b_k, block.keys, block.key_rotation)
        else:
            queries = _projected(block.query_input, block.w_q, block.b_q, block.projected_queries)
            keys = _projected(block.source_input, block.w_k, block.b_k, block.projected_keys)
            self.query_norm = NormRoundoff(block.query_norm, block.projected_queries, queries)
            self.key_norm = NormRoundoff(block.key_norm, block.projected_keys, keys)
            self.queries = _turned(self.query_norm.normalised, block.query_rotation)
            self.keys = _turned(self.key_norm.normalised, block.key_rotation)
        self.values = _projected(block.source_input, block.w_v, block.b_v, block.values)
        self.maps = self._maps()
        n, m = block.logits.shape[-2:]
        widths = sum(sum(w.shape[-2:]) for w in (block.w_q, block.w_k, block.w_v, block.w_o))
        self.operations = 2 * (n + m) + widths + block.heads + 32
        self.operations += 0 if self.query_norm is None else 4 * block.heads * block.w_q.shape[-1] + 64

    def forward(self) -> Float[Tensor, "*batch n out_dim"]:
        """Entrywise upper bound on |block.forward() - Y|, for a block without `b_o`."""
        return self._bound((self.maps @ self.values @ self.w_o).sum(-3))

    def jvp(self, magnitude: Float[Tensor, "*extra moving dim"]) -> Float[Tensor, "*extra n out_dim"]:
        """Entrywise upper bound on |block.jvp(v) - J v| for every v with |v| <= magnitude."""
        block = self.block
        tangent = Pair(magnitude.unsqueeze(-3))
        logit_change: list[Pair] = []
        if block.query_moves:
            moved = tangent.mapped(block.of_queries) @ self.w_q
            moved = moved if self.query_norm is None else self.query_norm.jvp(moved)
            logit_change.append(moved.rotated(block.query_rotation) @ self.keys.mT)
        if block.memory_moves:
            moved = tangent @ self.w_k
            moved = moved if self.key_norm is None else self.key_norm.jvp(moved)
            logit_change.append(self.queries @ moved.rotated(block.key_rotation).mT)
        change = self._softmax_derivative(self.scale * _total(logit_change)) @ self.values
        if block.memory_moves:
            change = change + self.maps @ (tangent @ self.w_v)
        return self._bound((change @ self.w_o).sum(-3))

    def vjp(self, magnitude: Float[Tensor, "*extra n out_dim"]) -> Float[Tensor, "*extra moving dim"]:
        """Entrywise upper bound on |block.vjp(u) - J^T u| for every u with |u| <= magnitude."""
        block = self.block
        per_head = Pair(magnitude.unsqueeze(-3)) @ self.w_o.mT
        logit_change = self.scale * self._softmax_derivative(per_head @ self.values.mT)
        result: list[Pair] = []
        if block.query_moves:
            pulled = (logit_change @ self.keys).rotated(block.query_rotation)
            pulled = pulled if self.query_norm is None else self.query_norm.vjp(pulled)
            result.append((pulled @ self.w_q.mT).mapped(block.to_tokens))
        if block.memory_moves:
            pulled = (logit_change.mT @ self.queries).rotated(block.key_rotation)
            pulled = pulled if self.key_norm is None else self.key_norm.vjp(pulled)
            result.append(pulled @ self.w_k.mT)
            result.append(self.maps.mT @ per_head @ self.w_v.mT)
        return self._bound(_total(result).sum(-3))

    def _bound(self, pair: Pair) -> Tensor:
        assert pair.error is not None  # the maps are computed
        return (pair.error + 2 * gamma(self.operations) * (pair.size + pair.error)) * OWN_ROUNDING

    def _softmax_derivative(self, change: Pair) -> Pair:
        weighted = self.maps * change
        return weighted + self.maps * weighted.sum(-1, keepdim=True)

    def _maps(self) -> Pair:
        """The attention maps; where the logits are not known to 0.1, only that both versions lie in [0, 1]."""
        block = self.block
        maps = block.probabilities
        worst = self._worst_logit_error()
        # The numerator and the sum each hold an exponential; then m additions and a division, or a product instead.
        own = 2 * gamma(4 * EXP_ULPS + maps.shape[-1] + 8)
        growth = torch.expm1(2 * worst) * OWN_ROUNDING
        # 1 - p_j, the sum of the others: each is at most twice its computed value, and those sum to 1 up to `own`.
        others = (2 * (1 - maps).clamp(min=0) + 4 * own).clamp(max=1)
        shift = others * growth
        relative = (shift / (1 - shift).clamp(min=0.5) + own) * (1 + own) * OWN_ROUNDING
        known = worst < 0.1
        size = torch.where(known, maps * (1 + 2 * relative) + UNDERFLOW, 1 + 1e-9)
        error = torch.where(known, relative * size, size)
        visible = ~block.logits.isneginf()
        return Pair(torch.where(visible, size, 0.0), torch.where(visible, error, 0.0))

    def _worst_logit_error(self) -> Float[Tensor, "*batch heads n 1"]:
        """The largest |fl(S) - S| in each row, the rounding of S - max S included, over the keys that matter."""
        block = self.block
        products = self.scale * (self.queries @ self.keys.mT)
        size = plus_all(products.size, products.error)
        if block.mask is not None:
            size = size + torch.where(block.mask.isneginf(), 0.0, block.mask.abs())
        error = plus_all(2 * gamma(block.w_q.shape[-1] + 8) * size, products.error)
        distance = block.logits - block.logits.amax(-1, keepdim=True)
        matters = distance + error > NEGLIGIBLE_LOGIT
        error = error + 2 * UNIT_ROUNDOFF * distance.abs()
        return torch.where(matters, error, 0.0).amax(-1, keepdim=True) * OWN_ROUNDING


def _projected(
    tokens: Tensor, weights: Tensor, bias: Tensor | None, computed: Tensor, rotation: Tensor | None = None
) -> Pair:
    """The pair of tokens @ weights + bias, then turned, whose computed value is known."""
    size = tokens.abs().unsqueeze(-3) @ weights.abs()
    if bias is not None:
        size = size + bias.abs().unsqueeze(-2)
    size = rotate_sizes(size, rotation)
    error = 2 * gamma(tokens.shape[-1] + 4) * size  # a turn adds two roundings: the factor 2 pays for them
    return Pair(computed.abs() + error, error)


def _turned(normalised: Pair, rotation: Tensor | None) -> Pair:
    """The pair of normalised vectors, then turned, which adds two roundings."""
    turned = normalised.rotated(rotation)
    assert turned.error is not None  # they are computed
    return Pair(turned.size, turned.error + 4 * gamma(4) * turned.size)


def _total(pairs: list[Pair]) -> Pair:
    return pairs[0] if len(pairs) == 1 else sum(pairs[1:], pairs[0])
