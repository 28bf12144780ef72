"""The tight blocks are tight: bounds of quite different proofs are equal to the truth there."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch

import lipbounds
from lipbounds.targets.attention import Attention
from lipbounds.testing.oracles import jacobian_norm
from lipbounds.testing.tight_instances import tight_blocks


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("name", ["yudin2025.biased", "yudin2025.biased_exact", "centred.products", "covariance.exact"])
@hypothesis.given(block=tight_blocks(dtype=torch.float64))
def test_bounds_equal_the_truth(name: str, block: Attention) -> None:
    torch.testing.assert_close(lipbounds.get(name)(block).value, jacobian_norm(block), rtol=1e-12, atol=0)


def test_small_tokens_cost_the_centred_form_no_more_slack_than_others() -> None:
    """Found by CI: a column of ones beside tokens of size 1/256 made the rounding slack 256 times larger."""
    token = torch.full((1, 1), 2.0**-8, dtype=torch.float64)
    shared = torch.tensor([[[0.5359, -1.2005]]], dtype=torch.float64)
    values = torch.tensor([[[0.1517, 1.881, 0.0491, 1.0945, 0.9, -0.7948, 0.1211, 0.5257]]], dtype=torch.float64)
    weights: dict[str, Any] = {"w_q": shared, "w_k": shared, "w_v": values, "w_o": values.mT.contiguous()}
    block = Attention(x=torch.zeros_like(token), memory=torch.cat([token, -token]), moves="query", **weights)
    claimed = lipbounds.get("centred.products")(block).value
    torch.testing.assert_close(claimed, jacobian_norm(block), rtol=5e-13, atol=0)


@hypothesis.given(block=tight_blocks(features=()))
def test_a_bound_without_cross_attention_gets_none(block: Attention) -> None:
    assert not block.features


def test_both_kinds_and_all_dtypes_are_drawn() -> None:
    seen = set()

    @hypothesis.settings(max_examples=100, database=None)
    @hypothesis.given(block=tight_blocks())
    def draw(block: Attention) -> None:
        seen.add((block.moves, block.dtype))

    draw()
    assert len(seen) == 6
