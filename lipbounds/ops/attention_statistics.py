"""How attention spreads over the keys: statistics of the rows and columns of attention maps, from their logits.

| statistic | of a row p over m visible keys | one-hot | uniform |
|---|---|---|---|
| `g_1` | p_(1) (1 - p_(1) + p_(2)), which bounds the softmax Jacobian | 0 | 1/m |
| `largest` | p_(1) | 1 | 1/m |
| `entropy` | -sum_j p_j log p_j, in nats | 0 | log m |
| `to_uniform` | total variation to the uniform row, 1/2 sum_j abs(p_j - 1/m) | 1 - 1/m | 0 |
| `to_one_hot` | total variation to the one-hot row at the largest entry, 1 - p_(1) | 0 | 1 - 1/m |

g_1 is small at both ends and largest, 1/2, where two keys share the mass: it tells one-hot from half-half, not from
uniform. Masked keys count nowhere. Only `g_1` is rounded to a side, upwards (`lipbounds.ops.softmax`); the others are
values to the nearest float. Entropy and `to_one_hot` are sums of non-negative terms, so that a row that is one-hot to
all digits keeps its digits.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.ops._rows import rows_from_logits
from lipbounds.ops.softmax import g_upper_from_logits


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class RowStatistics:
    """One number a row of an attention map; the table at the top of this file says which.

    Args:
        g_1: rounded up.
        largest: p_(1).
        entropy: in nats.
        to_uniform: distance to the row that is uniform on the visible keys.
        to_one_hot: distance to the one-hot row at the largest entry.
        keys: number m of visible keys.
    """

    g_1: Float[Tensor, "*batch n"]
    largest: Float[Tensor, "*batch n"]
    entropy: Float[Tensor, "*batch n"]
    to_uniform: Float[Tensor, "*batch n"]
    to_one_hot: Float[Tensor, "*batch n"]
    keys: Int[Tensor, "*batch n"]


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class SinkShares:
    """Shares of the mass of an attention map, mean over its rows.

    Args:
        most_attended: on the key that gets most, which is the attention sink if there is one.
        position: of that key.
        first: on the first key.
    """

    most_attended: Float[Tensor, "*batch"]
    position: Int[Tensor, "*batch"]
    first: Float[Tensor, "*batch"]


def row_statistics(logits: Float[Tensor, "*batch n m"]) -> RowStatistics:
    """Statistics of each row of softmax(logits), in the dtype of the logits; float64 inside.

    Args:
        logits: -inf marks a masked key.

    Raises:
        InvalidInput: NaN, +inf or a fully masked row.
    """
    rows = rows_from_logits(logits)
    total, weights = rows.total(), rows.weights
    others = rows.others(1)
    visible = ~logits.isneginf()
    keys = visible.sum(-1)
    # p_j = w_j / total and -log p_j = log total + (S_(1) - S_j): two non-negative terms.
    below = (logits.double().amax(-1, keepdim=True) - logits.double()).where(visible, 0.0)
    entropy = others.log1p() + (weights * below).sum(-1) / total
    uniform = (visible / keys.unsqueeze(-1)).double()
    to_uniform = (weights / total.unsqueeze(-1) - uniform).abs().sum(-1) / 2
    return RowStatistics(
        g_1=g_upper_from_logits(logits),
        largest=(1 / total).to(logits.dtype),
        entropy=entropy.to(logits.dtype),
        to_uniform=to_uniform.to(logits.dtype),
        to_one_hot=(others / total).to(logits.dtype),
        keys=keys,
    )


def sink_shares(logits: Float[Tensor, "*batch n m"]) -> SinkShares:
    """How much of the mass of each attention map goes to one key.

    Args:
        logits: -inf marks a masked key.

    Raises:
        InvalidInput: NaN, +inf or a fully masked row.
    """
    rows = rows_from_logits(logits)
    columns = (rows.weights / rows.total().unsqueeze(-1)).mean(-2)
    largest, position = columns.max(-1)
    return SinkShares(
        most_attended=largest.to(logits.dtype),
        position=position.to(torch.int64),
        first=columns[..., 0].to(logits.dtype),
    )
