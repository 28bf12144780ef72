"""A block whose tensors were changed in place is refused: its cached tensors are of another one."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds import Attention, InvalidInput
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.testing.recipes import Recipe, build


def _block() -> Attention:
    block = build(Recipe(seed=1, n=4, dim=4, heads=2, head_dim=2, value_dim=2, out_dim=4))
    return block.replace(x=block.x.clone(), w_q=block.w_q.clone())


@pytest.mark.parametrize("name", ["sharp", "exact", "yudin2025.theorem3", "lanczos"])
@pytest.mark.parametrize("field", ["x", "w_q"])
def test_a_block_changed_in_place_is_refused(name: str, field: str) -> None:
    block = _block()
    lipbounds.get("sharp")(block)  # fills the caches
    getattr(block, field).mul_(2)
    with pytest.raises(InvalidInput, match=f"{field} must stay as it was"):
        lipbounds.get(name)(block)
    assert lipbounds.get("exact")(block.replace()).value > 0


def test_a_step_in_place_of_an_attack_or_optimiser_is_seen() -> None:
    block = _block()
    x = block.x.clone().requires_grad_()
    moving = block.replace(x=x)
    lipbounds.get("sharp")(moving, grad=True).value.backward()
    with torch.no_grad():
        x += 0.1 * x
    with pytest.raises(InvalidInput, match="x must stay"):
        lipbounds.get("sharp")(moving)


def test_other_attention_blocks_are_frozen_too() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    block = L2Attention(x=one[0].clone(), w_q=one, w_v=one, w_o=one)
    lipbounds.get("kim2021.l2")(block)
    block.x.add_(1)
    with pytest.raises(InvalidInput, match="x must stay"):
        lipbounds.get("kim2021.l2")(block)


def test_inference_mode_and_views_are_no_change() -> None:
    with torch.inference_mode():
        block = _block()
        assert lipbounds.get("sharp")(block).value > 0
    outside = _block()
    outside.x[0].sum()
    assert lipbounds.get("sharp")(outside).value == lipbounds.get("sharp")(outside).value
