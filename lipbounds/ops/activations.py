"""Activation functions of feed-forward networks: Lipschitz constants rounded up, and slopes on intervals.

relu, identity and tanh have the constant 1, gelu 1.128904145185..., silu 1.099839320128... and gelu_tanh
1.1289930686.... The slope of the last three falls up to -p, grows up to p and falls again, so that its range on an
interval follows from its ends and p. Proof and rounding: docs/functions.md, section 4.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lipbounds.rounding import UNIT_ROUNDOFF


SLOPE_ERROR = 64 * UNIT_ROUNDOFF
FLAT = 1e3  # beyond it the slopes of all functions here are 0 or 1 to far less than SLOPE_ERROR, and nothing overflows


@dc.dataclass(frozen=True, slots=True)
class Activation:
    """A function applied to every entry, an upper bound on its Lipschitz constant, and its derivative.

    `peak` holds a bracket of the only positive point where f' is largest, for functions x s(x) as above.
    """

    function: Callable[[Tensor], Tensor]
    lipschitz: float
    slope: Callable[[Tensor], Tensor]
    peak: tuple[float, float] | None = None


def slope_interval(
    name: str, low: Float[Tensor, "*shape"], high: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Lower and upper bound on the slopes of the activation on [low, high], rounded outwards.

    Args:
        name: a name in `ACTIVATIONS`.
        low: float64, may be -inf.
        high: float64, may be inf; not below `low`.
    """
    rule = ACTIVATIONS[name]
    if name == "identity":
        return torch.ones_like(low), torch.ones_like(low)
    if name == "relu":
        return (low > 0).to(low.dtype), (high >= 0).to(low.dtype)
    if rule.peak is None:  # tanh: a bump at 0
        nearest = torch.where(low > 0, low, torch.where(high < 0, high, torch.zeros_like(low)))
        least, largest = rule.slope(torch.maximum(-low, high)), rule.slope(nearest)
        return (least - SLOPE_ERROR).clamp(0, 1), (largest + SLOPE_ERROR).clamp(0, 1)
    ends = rule.slope(low.clamp(-FLAT, FLAT)), rule.slope(high.clamp(-FLAT, FLAT))
    least, largest = torch.minimum(*ends) - SLOPE_ERROR, torch.maximum(*ends) + SLOPE_ERROR
    first, last = rule.peak
    top = (low <= last) & (high >= first)
    bottom = (low <= -first) & (high >= -last)
    least = torch.where(bottom, 1 - rule.lipschitz, least)
    largest = torch.where(top, rule.lipschitz, largest)
    return least.clamp(min=1 - rule.lipschitz), largest.clamp(max=rule.lipschitz)


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - x.tanh().square()


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.erfc(-x / math.sqrt(2)) / 2 + x * (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


def _silu_slope(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x * (-x).sigmoid())


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    root = math.sqrt(2 / math.pi)
    inner = 2 * root * x * (1 + 0.044715 * x.square())
    return inner.sigmoid() * (1 + 2 * root * x * (1 + 3 * 0.044715 * x.square()) * (-inner).sigmoid())


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, 1.0, torch.ones_like),
    "relu": Activation(torch.relu, 1.0, lambda x: (x > 0).to(x.dtype)),
    "tanh": Activation(torch.tanh, 1.0, _tanh_slope),
    "gelu": Activation(functional.gelu, 1.1289041451852, _gelu_slope, (1.41421356, 1.41421357)),
    "gelu_tanh": Activation(_gelu_tanh, 1.1289931, _gelu_tanh_slope, (1.41, 1.43)),
    "silu": Activation(functional.silu, 1.0998393201289, _silu_slope, (2.39935728, 2.39935729)),
}
