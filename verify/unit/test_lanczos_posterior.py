"""The certificate from what Lanczos saw: as rare failures as it says, never above the one known before the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lipbounds import Attention
from lipbounds.errors import InvalidInput
from lipbounds.estimators._fused import FusedOperator
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators.lanczos import lanczos, lanczos_certificate
from lipbounds.estimators.lanczos_posterior import lanczos_posterior
from verify.unit.blocks import random_block, true_norm, turned_block


def diagonal(spectrum: torch.Tensor, items: int | None = None) -> Attention:
    """One token that attends to itself: the Jacobian is the diagonal matrix; a batch of the same block draws starts."""
    size = len(spectrum)
    leading = () if items is None else (items,)
    zero = torch.zeros(1, size, 1).double()
    identity = torch.eye(size).double()[None]
    x = torch.ones(*leading, 1, size).double()
    return Attention(x=x, w_q=zero, w_k=zero, w_v=spectrum.double().diag()[None], w_o=identity)


def test_it_fails_as_rarely_as_it_says_and_nearly_as_often() -> None:
    """With one value far above the rest the inequality loses little: failures come close to delta."""
    block = diagonal(torch.cat([torch.ones(1), torch.linspace(0.3, 0.01, 99)]), items=400)
    result = lanczos_posterior(block, delta=0.3, steps=3)
    failures = float((result.value < 1).double().mean())
    assert 0.12 < failures < 0.3 + 4 * (0.3 * 0.7 / 400) ** 0.5


@pytest.mark.parametrize("steps", [16, 24, 40])
def test_never_above_the_bound_known_before_the_run(steps: int) -> None:
    for spectrum in (torch.linspace(0, 1, 300), torch.cat([torch.ones(1), torch.linspace(0.9, 0.1, 299)])):
        block = diagonal(spectrum)
        found, known = (bound(block, steps=steps, delta=1e-9) for bound in (lanczos_posterior, lanczos_certificate))
        assert found.terms["ritz"] <= 1 + 1e-12
        assert 1 <= found.value <= known.value


def test_it_stops_as_soon_as_it_is_within_the_factor() -> None:
    block = random_block(2, n=12, dim=12, heads=3)
    truth = true_norm(block)
    made = []
    for within in (3.0, 1.1, 1.001, None):
        result = lanczos_posterior(block, within=within)
        made.append(float(result.details["steps"]))
        assert truth <= result.value
        if within is not None:
            assert result.value <= within * result.terms["ritz"] * (1 + 1e-9)
            assert result.value <= within * truth
    assert made[0] < made[1] < made[2] <= made[3] == 60


@pytest.mark.parametrize("within", [None, 1.1])
def test_its_lower_bound_is_that_of_as_many_steps_of_lanczos(within: float | None) -> None:
    block = random_block(2, n=12, dim=12, heads=3)
    block = block.at(torch.stack([block.x, 2 * block.x]))
    found = lanczos_posterior(block, within=within, seed=3)
    steps = {int(made) for made in found.details["steps"].tolist()}
    assert len(steps) == 1
    alone = lanczos(block, steps=steps.pop(), seed=3).value
    torch.testing.assert_close(found.details["lower"], alone, rtol=1e-9, atol=0.0)
    truth = torch.stack([true_norm(block.at(x)) for x in block.x])
    assert bool((found.details["lower"] <= truth).all())
    assert bool((found.details["lower"] >= found.value / (within or 1.05)).all())


def test_an_exhausted_space_ends_the_run_at_the_norm() -> None:
    """Three different singular values: after three steps nothing new is seen."""
    block = diagonal(torch.tensor([1.0] * 40 + [0.5] * 40 + [0.25] * 20))
    result = lanczos_posterior(block)
    assert float(result.details["steps"]) <= 4
    assert 1 <= float(result.value) <= 1 + 1e-4
    assert 1 - 1e-6 <= float(result.details["lower"]) <= 1
    nothing = lanczos_posterior(diagonal(torch.zeros(100)))
    assert 0 <= float(nothing.value) < 1e-12
    assert float(nothing.details["lower"]) == 0


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(
    "fields", [{}, {"causal": True, "biases": False}, {"memory": random_block(4, n=5).x, "moves": "memory"}]
)
def test_fused_products_are_those_of_the_block(fields: dict[str, Any], batch: tuple[int, ...]) -> None:
    block = random_block(3, heads=3, **fields)
    block = block.at(block.x.expand(*batch, -1, -1))
    check_fused_products(block, batch)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_fused_products_turn_queries_and_keys(batch: tuple[int, ...]) -> None:
    block = turned_block()
    check_fused_products(block.at(block.x.expand(*batch, -1, -1)), batch)


def test_fused_products_take_weights_for_each_item() -> None:
    block = random_block(3, heads=3)
    apart = {name: getattr(block, name).unsqueeze(-3) for name in ("w_q", "w_v", "w_o")}  # and the keys of one for all
    check_fused_products(block.replace(**apart, w_k=block.w_k[:1], b_q=None, b_k=None, b_v=None), (3,))


def check_fused_products(block: Attention, batch: tuple[int, ...]) -> None:
    fused, plain = FusedOperator(block), JacobianOperator(block)
    draw = torch.Generator().manual_seed(0)
    for directions in ((), (4,)):
        v = torch.randn(*directions, *batch, plain.in_size, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(fused.jvp(v), plain.jvp(v), rtol=1e-11, atol=1e-11)
        u = torch.randn(*directions, *batch, plain.out_size, generator=draw, dtype=torch.float64)
        torch.testing.assert_close(fused.vjp(u), plain.vjp(u), rtol=1e-11, atol=1e-11)
    assert bool((fused.norm_error() >= plain.norm_error()).all())


def test_options_out_of_range_are_refused() -> None:
    for options, what in (({"within": 1.0}, "within=1.0"), ({"delta": 0.0}, "delta=0.0"), ({"steps": 0}, "steps=0")):
        with pytest.raises(InvalidInput, match=what):
            lanczos_posterior(random_block(), **options)  # pyright: ignore[reportArgumentType]
