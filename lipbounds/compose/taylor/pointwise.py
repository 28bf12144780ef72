"""Activations as operations, by name."""

from __future__ import annotations

from lipbounds.compose.taylor.model import Value
from lipbounds.compose.taylor.relu import Relu
from lipbounds.compose.taylor.smooth import SMOOTH, SmoothPointwise
from lipbounds.errors import Unsupported


def pointwise(name: str, activation: str, value: Value) -> Relu | SmoothPointwise:
    """An activation as an operation.

    Args:
        name: of the operation.
        activation: its name.
        value: its input.

    Raises:
        Unsupported: no derivatives of it are known here.
    """
    if activation == "relu":
        return Relu(name, value)
    if activation not in SMOOTH:
        raise Unsupported(
            f"method='taylor' knows relu, identity and {sorted(SMOOTH)}, got {activation!r}; use 'joint'."
        )
    return SmoothPointwise(name, activation, value)
