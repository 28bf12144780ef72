"""Right formulas that break another promise: one value an item, its gradient, its dtype, its symmetries."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import CENTRED, Formula, frobenius, g_1, input_norm, largest


@planted()
def first_item_of_the_batch(block: Attention) -> Tensor:
    """The softmax norm of the first batch item is used for all of them."""

    def first(b: Attention) -> Tensor:
        found = largest(g_1)(b)
        return found.reshape(-1, found.shape[-1])[0].expand(found.shape)

    return Formula(softmax=first)(block)


@planted(subtle=True)
def largest_of_the_batch(block: Attention) -> Tensor:
    """Valid but not what was asked: the largest value of the batch is returned for every item."""
    value = Formula()(block)
    return value.amax().expand(value.shape)


@planted(subtle=True)
def cast_to_nearest(block: Attention) -> Tensor:
    """The float64 value is cast to the dtype of the block to nearest, in half of all cases downwards."""
    return CENTRED_TO_NEAREST(block)


CENTRED_TO_NEAREST = dc.replace(CENTRED, cast=lambda value, dtype: value.to(dtype))


@planted(subtle=True)
def computed_in_short_dtype(block: Attention) -> Tensor:
    """Computed in the dtype of the block instead of float64."""

    def short(matrix: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(matrix.float(), 2).double()

    parts = Formula(
        maps=lambda b: short(block.probabilities),
        value_weights=lambda b: short(block.w_v),
        key_side=lambda b: short(block.keys @ block.w_q.mT),
        query_side=lambda b: short(block.queries @ block.w_k.mT),
    )
    return parts(block) if block.dtype != torch.float64 else Formula()(block)


@planted(subtle=True)
def depends_on_first_token(block: Attention) -> Tensor:
    """Valid, but the order of tokens matters: slack in proportion to the first token."""
    value = Formula()(block.double)
    share = torch.linalg.vector_norm(block.double.x[..., 0, :], dim=-1) / frobenius(block.double.x).clamp(min=1e-300)
    return cast_up(value * (1 + share / 100), block.dtype)


@planted(subtle=True)
def constant_added(block: Attention) -> Tensor:
    """Valid, but 0.001 is added against division by zero: the value does not scale with the function."""
    return cast_up(Formula()(block.double) + 1e-3, block.dtype)


@planted()
def zero_over_zero(block: Attention) -> Tensor:
    """Tokens are divided by the length of the whole input: no number for an input of zeros."""
    size = input_norm(block.double).squeeze(-1)
    return cast_up(Formula()(block.double) / size * size * (1 + 1e-9), block.dtype)


@planted()
def always_infinite(block: Attention) -> Tensor:
    """Infinity, which is true of everything."""
    return torch.full(block.batch_shape, torch.inf, dtype=block.dtype)
