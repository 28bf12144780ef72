"""Largest means under probability rows that are bounded entry by entry: 0 <= p <= caps, sum p = 1."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.shapes import broadcast_shape
from lipbounds.rounding import gamma, inflate


BEYOND = 1 + 1e-9  # weights often sum to 1 exactly: rounding must not decide


def largest_mean(values: Float[Tensor, "*#batch n"], caps: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*out"]:
    """max of sum_l p_l x_l over 0 <= p <= caps, sum p = 1: the largest values first. Rounded up.

    Args:
        values: x >= 0.
        caps: upper bounds of probabilities that sum to 1; broadcast against the values.
    """
    ordered, index = values.sort(-1, descending=True)
    shape = broadcast_shape((caps.shape, values.shape))
    ordered, caps = ordered.expand(shape), caps.expand(shape).gather(-1, index.expand(shape))
    before = torch.cat([torch.zeros_like(caps[..., :1]), caps.cumsum(-1)[..., :-1]], -1)
    length = values.shape[-1]
    taken = torch.minimum(caps, (1 - before + 2 * gamma(length + 2)).clamp(min=0))
    return inflate(torch.where(taken > 0, ordered * taken, 0.0).sum(-1), length + 8)


def threshold(values: Float[Tensor, "*#batch n"], weights: Float[Tensor, "*#batch n"]) -> Float[Tensor, "*out"]:
    """The largest of the values at and above which the weights sum to more than 1; 0 where all together do not.

    mu + sum_l w_l max(x_l - mu, 0) is least there. Which of the values it is has no gradient, and no
    rounding counts: every mu is a bound.

    Args:
        values: x >= 0.
        weights: w >= 0.
    """
    ordered, index = values.sort(-1, descending=True)
    shape = broadcast_shape((ordered.shape, weights.shape))
    reached = weights.detach().expand(shape).gather(-1, index.expand(shape)).cumsum(-1) > BEYOND
    return torch.where(reached, ordered, 0.0).amax(-1)
