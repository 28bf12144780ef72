"""How often the host waits for the device: once to check a block, once before its first bound, once after each."""

from __future__ import annotations

import pytest
import torch

from lipbounds import Attention, BoundSpec, Claim, Source, registry
from lipbounds.devices import Check, answers, checked_together, refuse
from lipbounds.errors import InvalidInput
from lipbounds.ops.eigen import largest_eigenvalue
from lipbounds.testing import synchronisations
from verify.device.blocks import BLOCKS, DEVICE
from verify.device.test_methods import blocks_of


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


FORMULAS = [
    pytest.param(spec, blocks_of(spec)[-1], id=f"{spec.name}, {blocks_of(spec)[-1]}")
    for spec in registry.standing()
    if spec.role == "bound" and spec.claim.scope == "point"
]


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(("spec", "name"), FORMULAS)
def test_a_bound_at_a_point_makes_the_host_wait_twice(spec: BoundSpec, name: str) -> None:
    block = BLOCKS[name].to("pretend")
    with synchronisations() as seen:
        spec(block)
    assert len(seen) <= 2, seen
    with synchronisations() as seen:
        spec(block)
    assert len(seen) <= 1, seen


def test_every_formula_at_a_point_is_counted() -> None:
    at_point = {spec.name for spec in registry.select(scope="point") if spec.role == "bound"}
    assert {"sharp_cheap", "sharp_fast", "yudin2025.biased"} < at_point
    assert at_point <= {case.values[0].name for case in FORMULAS}  # pyright: ignore


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_lanczos_reads_the_run_at_once() -> None:
    block, spec = BLOCKS["plain"].to("pretend"), registry.get("lanczos_posterior")
    spec(block, steps=20)  # the first one checks the block
    with synchronisations() as whole:
        spec(block, steps=20)
    with synchronisations() as seen:
        made = spec(block, steps=20, within=1 + 1e-9).details["steps"]  # looks at the bound every second step
    assert made >= 10
    assert len(seen) == len(whole) + int(made) // 2
    assert len(whole) <= 8, whole


def test_the_largest_eigenvalue_is_found_without_a_wait() -> None:
    factors = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors[1] *= 1e-150
    gram = torch.cat([factors @ factors.mT, torch.eye(5).double().expand(2, -1, -1)])
    gram[-1] = 0
    there, expected = gram.to(DEVICE), torch.linalg.eigvalsh(gram)[..., -1]
    with synchronisations() as seen:
        found = largest_eigenvalue(there)
    assert not seen
    assert bool((found.cpu() >= expected * (1 - 1e-14)).all())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)


def test_checks_are_read_together() -> None:
    x = torch.tensor([1.0, -1.0, 2.0], device=DEVICE)
    with synchronisations() as seen, checked_together():
        refuse((x > 2, lambda: InvalidInput("too large")), (x < -1, lambda: InvalidInput("too small")))
        refuse((x.isnan(), lambda: InvalidInput("no number")))
    assert len(seen) == 1
    with pytest.raises(InvalidInput, match="too small"):
        fail_after((x > 2, lambda: InvalidInput("too large")), (x < 0, lambda: InvalidInput("too small")))
    with pytest.raises(ArithmeticError):
        fail_after((x > 2, lambda: InvalidInput("too large")))
    with pytest.raises(InvalidInput, match="too large"):
        refuse((x > 1, lambda: InvalidInput("too large")))


@checked_together()
def fail_after(*checks: Check) -> None:
    refuse(*checks)
    raise ArithmeticError("what bad input led to, or something else")


def test_questions_are_answered_together() -> None:
    x = torch.tensor([1.0, -1.0, 2.0], device=DEVICE)
    with synchronisations() as seen:
        assert answers(x > 1, x > 2, x[0] > 0) == [True, False, True]
    assert len(seen) == 1
    assert answers() == []
