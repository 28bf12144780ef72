r"""Activation functions of feed-forward networks, with Lipschitz constants rounded up.

The constant is the supremum of |f'|. For f(x) = x s(x) with s(-x) = 1 - s(x), f'(-x) = 1 - f'(x): so the supremum over
x >= 0 of f', which is above 1, is that of |f'|.

- relu, identity, tanh: 1, for 0 <= f' <= 1 and f' reaches 1 (tanh' = 1 - tanh^2).
- gelu, x Phi(x): f'' = phi(x) (2 - x^2), so f' is largest at sqrt 2: (1 + erf 1) / 2 + 1 / (e sqrt pi), which is
  1.128904145185...
- silu, x sigma(x): f'' = sigma (1 - sigma) (2 - x tanh(x/2)), so f' is largest at the root r of r tanh(r/2) = 2. There
  sigma = 1/2 + 1/r, and f' = sigma + r sigma (1 - sigma) = 1/2 + r/4 = 1.099839320128...
- gelu_tanh, x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): 1.1289930686... No closed form was found; that the supremum
  is below the constant is proved by interval arithmetic in verify/unit/test_activations.py.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


@dc.dataclass(frozen=True, slots=True)
class Activation:
    """A function applied to every entry, and an upper bound on its Lipschitz constant."""

    function: Callable[[Tensor], Tensor]
    lipschitz: float


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(_identity, 1.0),
    "relu": Activation(torch.relu, 1.0),
    "tanh": Activation(torch.tanh, 1.0),
    "gelu": Activation(functional.gelu, 1.1289041451852),
    "gelu_tanh": Activation(_gelu_tanh, 1.1289931),
    "silu": Activation(functional.silu, 1.0998393201289),
}
