"""Classifiers that change their mind at one known distance, where nothing near the input gives it away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lipbounds.certify import certify
from lipbounds.targets.layers import Flatten, Linear, Pointwise, Sequence


STEEP = 64.0


def hidden(distance: float, activation: str) -> tuple[Sequence, torch.Tensor]:
    """Logits 1 and a(z + shift) with z = STEEP (<u, x> - distance), |u| = 1: the classes meet at the distance along u.

    At x = 0 the second logit and its gradient are 0, or nearly so, and they stay 0 until shortly before the distance;
    there relu(0 + 1) is 1 exactly, and gelu(0 + 1.2) is 1.06.
    """
    u = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    shift = {"relu": 1.0, "gelu": 1.2}[activation]
    inner = Linear(STEEP * u, torch.tensor([shift - STEEP * distance], dtype=torch.float64))
    head = Linear(torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))
    return Sequence((Flatten(), inner, Pointwise(activation), head)), u


@pytest.mark.parametrize("distance", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("method", ["taylor", "joint", "product"])
def test_no_method_certifies_beyond_a_hidden_point(method: Any, activation: str, distance: float) -> None:
    network, u = hidden(distance, activation)
    x = torch.zeros(1, 1, 2, dtype=torch.float64)
    point = x + distance * u
    logits = network(point).flatten()
    assert logits[1] >= logits[0] - 1e-12  # the other class, at the known distance
    assert (network(x).flatten()[0] - network(x).flatten()[1]).item() == pytest.approx(1, abs=1e-3)
    radius = certify(network, x, torch.tensor([0]), method=method).radius.item()
    assert 0 < radius <= distance * (1 + 1e-9)
