"""The tight blocks are tight: bounds of quite different proofs are equal to the truth there."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import lipbounds
from lipbounds.targets.attention import Attention
from lipbounds.testing.oracles import jacobian_norm
from lipbounds.testing.tight import tight_blocks


@pytest.mark.parametrize("name", ["yudin2025.biased", "yudin2025.biased_exact", "centred.products", "covariance.exact"])
@hypothesis.given(block=tight_blocks(dtype=torch.float64))
def test_bounds_equal_the_truth(name: str, block: Attention) -> None:
    torch.testing.assert_close(lipbounds.get(name)(block).value, jacobian_norm(block), rtol=1e-12, atol=0)


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
