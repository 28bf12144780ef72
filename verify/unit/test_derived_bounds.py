"""The centred and covariance forms: above the truth, what they must not depend on, and where they must win."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from verify.unit.blocks import random_block, true_norm


NAMES = ["centred.products", "centred.weights", "covariance.exact", "covariance.trace"]
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "one head": {"heads": 1, "biases": False},
    "one token": {"n": 1},
    "query": {"memory": random_block(3, n=5).x, "moves": "query"},
    "memory": {"memory": random_block(3, n=5).x, "moves": "memory"},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("gain", [0.0, 0.01, 1.0, 30.0])
def test_above_the_truth(name: str, case: str, gain: float) -> None:
    block = random_block(11, **CASES[case])
    block = block.replace(w_q=gain * block.w_q)
    assert lipbounds.get(name)(block).value >= true_norm(block) * (1 - 1e-12)


@pytest.mark.parametrize("name", ["centred.products", "covariance.exact", "covariance.trace"])
def test_a_common_offset_of_the_values_costs_nothing(name: str) -> None:
    """The truth does not see value biases; nor do these, while the bias-aware form of Theorem 3 does."""
    block = random_block(12)
    assert block.b_v is not None
    shifted = block.replace(b_v=block.b_v + 100)
    torch.testing.assert_close(true_norm(shifted), true_norm(block), rtol=1e-9, atol=0)
    torch.testing.assert_close(lipbounds.get(name)(shifted).value, lipbounds.get(name)(block).value, rtol=1e-9, atol=0)
    biased = lipbounds.get("yudin2025.biased")
    assert biased(shifted).value > 5 * biased(block).value


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens_leave_only_the_mixing_term(name: str) -> None:
    """All covariances vanish, so the bound is exact: the norm of the mixing term (no cancellation noise left over)."""
    block = random_block(13, heads=1, biases=False)
    block = block.at(block.x[:1].expand(4, 6).clone())
    mixing = torch.linalg.matrix_norm(block.w_v[0], 2) * torch.linalg.matrix_norm(block.probabilities[0], 2)
    expected = mixing * torch.linalg.matrix_norm(block.w_o[0], 2)
    torch.testing.assert_close(lipbounds.get(name)(block).value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name: str) -> None:
    block = random_block(14, n=3)
    bound = lipbounds.get(name)
    assert torch.autograd.gradcheck(lambda x: bound(block.at(x)).value, block.x.clone().requires_grad_(), atol=1e-5)


def test_covariance_beats_the_products_under_a_causal_mask() -> None:
    """bounds.md, section 2: short causal rows pin max g_1 near 1/2; a bound by rows does not mind."""
    block = random_block(15, n=12, causal=True)
    assert lipbounds.get("covariance.exact")(block).value < 0.7 * lipbounds.get("yudin2025.biased_exact")(block).value
