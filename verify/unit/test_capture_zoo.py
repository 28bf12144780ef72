"""Attention as people write it: each map is in a captured block or reported, each block has the module's Jacobian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipbounds.capture import capture
from verify.unit.capture_models import float64_and_seed as float64_and_seed
from verify.unit.capture_zoo import ZOO, inputs_of
from verify.unit.softmax_counter import attention_maps


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """By torch alone, batch item by batch item."""
    return torch.autograd.functional.jacobian(lambda t: model(t[None])[0], x)  # pyright: ignore


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", ZOO)
def test_every_map_is_in_a_block_or_reported(name: str) -> None:
    case, x = ZOO[name], None
    model, x = case.make().eval(), inputs_of(case)
    with torch.no_grad():
        found = capture(model, x, on_unsupported="skip")
    assert len(found) == case.blocks
    assert len(found) + len(found.skipped) == case.maps
    assert attention_maps(model, x) == case.maps * case.heads
    assert all(case.reported in one.reason for one in found.skipped)
    assert all(block.projected == case.projected for block in found)
    if not case.whole:
        return
    block = found[0].attention
    rows = x.flatten(2).mT if case.image else x
    torch.testing.assert_close(block.x, rows)
    for item in range(len(x)):
        wanted = jacobian(model, x[item])
        if case.image:  # channels, height, width
            wanted = wanted.flatten(1, 2).flatten(-2).permute(1, 0, 3, 2)
        own = block.replace(x=block.x[item]) if block.logit_bias is None or block.logit_bias.dim() < 4 else None
        assert own is not None
        basis = torch.eye(own.x.numel()).view(-1, *own.x.shape)
        mine = own.jvp(basis).movedim(0, -1).unflatten(-1, own.x.shape)
        torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-10)
