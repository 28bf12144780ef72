"""Rotary positions read off from linear forms: weights, and one rotation a token and pair of features.

Each feature of a query or key is a form in one or two features of the projection. With two, a and b, there is a second
feature made of the same two, and the pair is [[c, -s], [s, c]] (a, b) times a gain g that is the same for all tokens:

    g (c a - s b),  g (s a + c b).

Then c and s are the rotation, g goes into the weights, and the features are sorted as `lipbounds.targets.rotary` has
them: the first of each pair, the second of each pair, those that are not turned. To sort queries and keys alike leaves
the logits alone.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor


# |g c^2 + g s^2 - 1| up to which the gain is one and the model's own cosines and sines are kept, rounded as they are.
UNIT_GAIN = 2.0**-7
# Of the two numbers that should be the same cosine or sine, in roundings of the model's dtype.
SAME_ROTATION = 4.0


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Turned:
    """What was found.

    Args:
        features: the number of the output feature that each sorted column is, before it is turned; `*lead width`.
        gain: what each sorted column is multiplied by; `*lead width`.
        rotation: cosines and sines; `*lead n 2 pairs`, None if nothing is turned.
        order: the column of the call that each sorted column is; `width`.
    """

    features: Tensor
    gain: Tensor
    rotation: Tensor | None
    order: Tensor


def turned(features: Tensor, coefficients: Tensor, eps: float, refuse: Callable[[str], NoReturn]) -> Turned:
    """Sort the terms of queries or keys into weights and rotations.

    Args:
        features: the number of the output feature of each term; `terms *lead n width`.
        coefficients: what it is multiplied by.
        eps: the rounding of the model.
        refuse: raises, given what must hold.
    """
    low, high = features.amin((0, -2)), features.amax((0, -2))
    is_low = features == low.unsqueeze(-2)
    if not bool((is_low | (features == high.unsqueeze(-2))).all()):
        refuse("each feature must be made of at most two of the projection")
    at_low = torch.where(is_low, coefficients, 0.0).sum(0)
    at_high = torch.where(is_low, 0.0, coefficients).sum(0)
    first, second, rest = _pairs(low, high, refuse)

    corners = at_low[..., first], at_high[..., first], at_low[..., second], at_high[..., second]
    a_is_low, cos, sin = _rotation(*corners, eps, refuse)
    a = torch.where(a_is_low, low[..., first], high[..., first])
    b = torch.where(a_is_low, high[..., first], low[..., first])
    size = (cos.square() + sin.square()).sqrt()
    gain = size[..., :1, :]
    gain = torch.where((gain.square() - 1).abs() <= UNIT_GAIN, torch.ones_like(gain), gain)
    cos, sin = cos / gain, sin / gain
    if not bool(((cos.square() + sin.square() - 1).abs() <= 2 * UNIT_GAIN).all()):
        refuse("each pair of features must be multiplied by the same number for all tokens")
    straight = at_low[..., rest]
    if not bool((straight == straight[..., :1, :]).all()):
        refuse("each feature must be multiplied by the same number for all tokens")
    return Turned(
        features=torch.cat([a, b, low[..., rest]], -1),
        gain=torch.cat([gain, gain, straight[..., :1, :]], -1).squeeze(-2),
        rotation=torch.stack([cos, sin], -2) if len(first) else None,
        order=torch.cat([first, second, rest]),
    )


def _pairs(low: Tensor, high: Tensor, refuse: Callable[[str], NoReturn]) -> tuple[Tensor, Tensor, Tensor]:
    """The columns that are first of a pair, second of it, in none; the same for all heads."""
    one_low, one_high = (t.flatten(0, -2)[0] for t in (low, high))
    paired = one_low != one_high
    same = (one_low[:, None] == one_low) & (one_high[:, None] == one_high) & paired
    columns = torch.arange(len(one_low), device=low.device)
    (rest,) = torch.where(~paired)
    if not bool((same.sum(-1)[paired] == 2).all()) or not bool(((low != high) == paired).all()):
        refuse("features must be turned in pairs, the same ones in all heads")
    partner = (same * columns).sum(-1) - columns
    (first,) = torch.where(paired & (columns < partner))
    second = partner[first]
    if not (torch.equal(low[..., first], low[..., second]) and torch.equal(high[..., first], high[..., second])):
        refuse("features must be turned in pairs, the same ones in all heads")
    return first, second, rest


def _rotation(
    low_in_first: Tensor,
    high_in_first: Tensor,
    low_in_second: Tensor,
    high_in_second: Tensor,
    eps: float,
    refuse: Callable[[str], NoReturn],
) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair whether its first feature is made of the low one; cosines and sines."""

    def same(one: Tensor, other: Tensor) -> Tensor:
        size = torch.maximum(one.abs(), other.abs()).clamp(min=1.0)
        return ((one - other).abs() <= SAME_ROTATION * eps * size).flatten(0, -2).all(0)

    a_is_low = same(low_in_first, high_in_second) & same(high_in_first, -low_in_second)
    a_is_high = same(high_in_first, low_in_second) & same(low_in_first, -high_in_second)
    if not bool((a_is_low | a_is_high).all()):
        refuse("each pair of features must be multiplied by a rotation")
    cos = torch.where(a_is_low, low_in_first, high_in_first)
    sin = torch.where(a_is_low, low_in_second, high_in_second)
    return a_is_low, cos, sin
