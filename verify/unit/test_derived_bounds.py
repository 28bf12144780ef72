"""The centred and covariance forms: above the truth, what they must not depend on, and where they must win."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.testing.extended import jacobian_norm_extended
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
    assert torch.autograd.gradcheck(
        lambda x: bound(block.at(x), grad=True).value, block.x.clone().requires_grad_(), atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_whose_rounding_leaves_nothing_of_the_map_give_a_number_and_a_gradient(name: str) -> None:
    """One key: P = 1 whatever the logits, but their rounding error is large and exp of it infinite. Found by CI."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    block = Attention(x=-3e4 * one[0], w_q=1e3 * one, w_k=one, w_v=one, w_o=one, b_k=2e4 * one[0], scale=4.0)
    x = block.x.clone().requires_grad_()
    value = lipbounds.get(name)(block.at(x), grad=True).value
    assert value.isfinite()
    assert value >= 1  # the truth: Y = X
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, "yudin2025.biased", "yudin2025.biased_exact"])
def test_squares_of_small_numbers_do_not_vanish(name: str) -> None:
    """Two keys 384 apart in the logits: the norm is 2.6e-164, and its square is below the range. Found by CI."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    memory = torch.tensor([[0.0], [16.0]], dtype=torch.float64)
    block = Attention(
        x=3 * one[0], w_q=-3 * one, w_k=2 * one, w_v=one, w_o=one, b_q=-3 * one[0], scale=1.0, memory=memory,
        moves="query",
    )  # fmt: skip
    truth = 3 * 2 * 256 * math.exp(-384)  # s |w_q w_k| Var(memory) under p = (1 - e^-384, e^-384)
    assert lipbounds.get(name)(block).value >= truth


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_round_to_equal_ones_keep_their_error(name: str) -> None:
    """Keys and values 1e-17 apart: as computed they are equal, as given they are not."""
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    memory = torch.tensor([[0.0, 1.0], [1e-17, 1.0]], dtype=torch.float64)
    block = Attention(x=ones[:, 0], w_q=ones[:, :1], w_k=ones, w_v=ones, w_o=ones[:, :1], memory=memory, moves="query")
    truth = float(jacobian_norm_extended(block))
    assert 2.4e-35 < truth < 2.6e-35  # p (1 - p) 1e-34
    assert lipbounds.get(name)(block).value >= truth


def test_covariance_beats_the_products_under_a_causal_mask() -> None:
    """Short causal rows pin max g_1 near 1/2; a bound by rows does not mind."""
    block = random_block(15, n=12, causal=True)
    assert lipbounds.get("covariance.exact")(block).value < 0.7 * lipbounds.get("yudin2025.biased_exact")(block).value
