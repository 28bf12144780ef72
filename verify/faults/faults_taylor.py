"""Mistakes in Taylor's formula on a ball: each leaves out or takes in the wrong place one thing that we ship."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.derivatives.ball.first import Centre
from lipbounds.derivatives.ball.third import BallThirdDerivative
from lipbounds.derivatives.first.dense import dense_norm
from lipbounds.derivatives.second import norm as attention_second
from lipbounds.derivatives.second.factors import factors_of
from lipbounds.derivatives.second.norm import second_norm
from lipbounds.derivatives.second.rows import one_key, own_and_another, two_keys
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted


Norm = Callable[[Attention], Tensor]


def taylor(
    block: Attention, radius: float, *, second: Norm = second_norm, outer: bool = True, weight: float = 0.5
) -> Tensor:
    """The formula with one shell.

    Args:
        block: the attention block.
        radius: of the ball.
        second: the norm of the second differential at the centre.
        outer: whether the third differential is bounded on the ball, not at its centre.
        weight: of eps^2 times the third differential.
    """
    wide = block.double
    value = dense_norm(wide)
    if radius:
        third = sum(BallThirdDerivative(Centre(wide), radius if outer else 0.0).third().values())
        value = value + radius * second(wide) + weight * radius**2 * third
    value = (value * (1 + 1e-12)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return cast_up(value.expand(block.batch_shape), block.dtype)


def _of_rows(keep: Callable[[Tensor, int], Tensor]) -> Norm:
    """The norm of what is kept of the matrix t_ijl of each i."""

    def norm(block: Attention) -> Tensor:
        factors = factors_of(block)
        rows = [keep(attention_second._row(block, factors, i), i) for i in range(block.tokens)]
        return torch.stack(rows, -3).flatten(-2).square().sum((-2, -1)).sqrt() * factors.unit

    return norm


def _own_token(row: Tensor, i: int) -> Tensor:
    at = min(i, row.shape[-1] - 1)
    return row[..., at : at + 1, at : at + 1]


@planted(scope="ball", subtle=True)
def no_second_differential(block: Attention, radius: float) -> Tensor:
    """The second differential is left out, as though the Jacobian were stationary at the centre."""
    return taylor(block, radius, second=lambda wide: torch.zeros_like(wide.logits[..., 0, 0, 0]))


@planted(scope="ball", subtle=True)
def no_third_differential(block: Attention, radius: float) -> Tensor:
    """The Jacobian is taken to be linear in the ball."""
    return taylor(block, radius, weight=0.0)


@planted(scope="ball", subtle=True)
def third_differential_at_the_centre(block: Attention, radius: float) -> Tensor:
    """The third differential is bounded at the centre only, where rows that rest on one key have none."""
    return taylor(block, radius, outer=False)


@planted(scope="ball", subtle=True)
def second_differential_of_the_own_token(block: Attention, radius: float) -> Tensor:
    """Of the second differential only how an output moves with its own token."""
    return taylor(block, radius, second=_of_rows(_own_token))


@planted(scope="ball", subtle=True)
def second_differential_by_its_mean_block(block: Attention, radius: float) -> Tensor:
    """The mean of the norms of its blocks for the norm of the second differential."""
    return taylor(block, radius, second=_of_rows(lambda row, i: row.mean((-2, -1), keepdim=True) / row.shape[-1]))


def _by_rows(combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Norm:
    """The norm from what one key, two keys, and the own token with another do in each row (0 where there is none)."""

    def norm(block: Attention) -> Tensor:
        if not block.memory_moves:
            return second_norm(block)
        factors = factors_of(block)
        alone = torch.stack([one_key(block, factors, i) for i in range(block.tokens)], -2)
        apart = two_keys(block, factors)
        own = torch.zeros_like(apart)
        if block.query_moves and block.tokens > 1:
            own = torch.stack([own_and_another(block, factors, i) for i in range(block.tokens)], -1)
        return combine(alone, apart, own) * factors.unit

    return norm


@planted(scope="ball", subtle=True)
def one_key_left_out_of_the_rows(block: Attention, radius: float) -> Tensor:
    """Of the second differential only what two tokens do together."""
    norm = _by_rows(lambda alone, apart, own: apart.square().sum(-1).sqrt() + 2 * own.amax(-1))
    return taylor(block, radius, second=norm)


@planted(scope="ball", subtle=True)
def own_token_with_another_left_out(block: Attention, radius: float) -> Tensor:
    """What a token and another do together in the token's own row is left out."""
    norm = _by_rows(lambda alone, apart, own: (alone + apart.unsqueeze(-1)).square().sum(-2).amax(-1).sqrt())
    return taylor(block, radius, second=norm)
