"""The value of an activation at the centre, with its rounding."""

from __future__ import annotations

from lipbounds.compose.taylor.coefficient import TINY, Coefficient
from lipbounds.compose.taylor.model import Value
from lipbounds.ops.activations import ACTIVATIONS
from lipbounds.rounding import UNIT_ROUNDOFF, inflate


def activated(activation: str, value: Value) -> Coefficient:
    """An activation at the centre.

    Every function here is within 32 u |x| of its computed value: x times a factor of at most 1 with few roundings and
    an error of a few ulps in erf, exp or tanh, each of which moves the product by no more than itself; |tanh x| <= |x|.

    Args:
        activation: its name in `ACTIVATIONS`.
        value: its input.
    """
    rule = ACTIVATIONS[activation]
    lost = rule.lipschitz * value.centre_error + 32 * UNIT_ROUNDOFF * (value.centre.abs() + TINY)
    return Coefficient(rule.function(value.centre).unsqueeze(0), inflate(lost, 4))
