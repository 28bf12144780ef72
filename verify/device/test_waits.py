"""How often the host waits for the device: once to check a block, once before a bound and once after it."""

from __future__ import annotations

import pytest
import torch

from lipbounds import Attention, BoundSpec, Claim, Source
from lipbounds.devices import answers
from lipbounds.testing import synchronisations
from verify.device.blocks import BLOCKS, DEVICE


ATTENTION = [name for name, block in BLOCKS.items() if isinstance(block, Attention)]
NOTHING = BoundSpec(
    name="tests.nothing",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="a bound that computes nothing"),
    supports=frozenset({"heads", "biases", "mask", "cross", "rotary", "qk_norm"}),
    cost="O(1)",
    compute=lambda block: torch.zeros(block.batch_shape, dtype=block.dtype, device=block.device),
)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_checked_in_one_wait(name: str) -> None:
    block = BLOCKS[name].to("pretend")
    with synchronisations() as seen:
        block.replace()
    own = [each for each in seen if "lipschitz_norm" not in each.where]  # its scores are checked, too
    assert len(own) == 1, seen


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", ATTENTION)
def test_a_bound_is_checked_in_one_wait_before_it_and_one_after(name: str) -> None:
    block = BLOCKS[name].to("pretend")
    with synchronisations() as seen:
        NOTHING(block)
    assert len(seen) == 2, seen


def test_questions_are_answered_together() -> None:
    x = torch.tensor([1.0, -1.0, 2.0], device=DEVICE)
    with synchronisations() as seen:
        assert answers(x > 1, x > 2, x[0] > 0) == [True, False, True]
    assert len(seen) == 1
    assert answers() == []
