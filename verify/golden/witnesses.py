"""For each formula kept as refuted, an input at which it is below the truth: the smallest that was found.

A name of the registry -> a function that returns the block, and the radius for the scopes that have one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lipbounds.targets.attention import Attention
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.targets.target import Target


Witness = tuple[Target, float | None]
ONE = torch.ones(1, 1, 1, dtype=torch.float64)


def _hu2024() -> Witness:
    """A single token at 0: the formula is 0, the output is the token."""
    return Attention(x=0 * ONE[0], w_q=ONE, w_k=ONE, w_v=ONE, w_o=ONE), 0.0


def _newhouse2025() -> Witness:
    """A single token: the output is the token, whatever the scale of the logits."""
    return Attention(x=ONE[0], w_q=0 * ONE, w_k=ONE, w_v=ONE, w_o=ONE, scale=0.25), 1.0


def scalar_l2_attention(w_q: float) -> Witness:
    """One token, one feature, W_V = W_O = 1: the map is x -> w_q^2 x, whatever the token."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return L2Attention(x=one, w_q=w_q * one.unsqueeze(0), w_v=one.unsqueeze(0), w_o=one.unsqueeze(0)), None


WITNESSES: dict[str, Callable[[], Witness]] = {
    "hu2024.printed": _hu2024,
    "newhouse2025.as_coded": _newhouse2025,
    "certvit2023.l2": lambda: scalar_l2_attention(2.0),  # claimed 2.1138 sqrt(2 + 1) = 3.661, truth 4
    "kim2021.l2_recollected": lambda: scalar_l2_attention(2.0),  # claimed 2, truth 4
}
