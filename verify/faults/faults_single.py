"""Mistakes in Theorem 3 evaluated in float32: each changes one function of what we ship, and float64 stays right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.derivatives.ball import single_precision as on_ball
from lipbounds.derivatives.first import single_precision as at_point
from lipbounds.derivatives.first.single_precision import Rounded
from lipbounds.registry import get
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted


# Blocks with other features are never evaluated in float32.
FEATURES: tuple[Feature, ...] = ("heads", "biases", "mask", "cross", "some_queries")


def shipped(name: str, module: Any, function: str, wrong: Callable[..., Any], *given: Any) -> Tensor:
    """The registered bound with one function of its evaluation replaced."""
    with mock.patch.object(module, function, wrong):
        return get(name)(*given).value


@planted(supports=FEATURES, subtle=True)
def float32_value_to_nearest(block: Attention) -> Tensor:
    """The value of float32 is rounded to the nearest number of the dtype of the block, and not up."""
    return shipped("yudin2025.biased", at_point, "cast_up", lambda value, dtype: value.to(dtype), block)


@planted(scope="ball", supports=FEATURES)
def float32_own_key_among_the_others(block: Attention, radius: float) -> Tensor:
    """A probability is at most E e^r over itself plus the sum of all E e^(-r), that of its own key among them."""

    def together(entries: Tensor) -> Tensor:
        return entries.sum(-1, keepdim=True).expand_as(entries)

    return shipped("yudin2025_ball.biased", on_ball, "_others", together, block, radius)


@planted(scope="ball", supports=FEATURES)
def float32_norms_at_the_centre(block: Attention, radius: float) -> Tensor:
    """||V||, ||K W_Q^T|| and ||Q W_K^T|| at the centre, what float32 adds for the radius left out."""

    def nothing(value: Tensor) -> Rounded:
        return Rounded(torch.zeros_like(value), torch.zeros_like(value))

    return shipped("yudin2025_ball.biased", on_ball, "_exact", nothing, block, radius)
