"""The truth in other norms: against enumeration, below the claims of right bounds, and above those of wrong ones."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds.claims import Claim, Norm, Scope
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing import oracles
from lipbounds.testing.contract import Refuted, run_check
from lipbounds.testing.falsify import falsify
from lipbounds.testing.other_norms import reached_change, reached_norm
from verify.unit.blocks import random_block


# Searches: they run as users run them. Other tests keep the shape checks of what is used here.
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")


@pytest.mark.parametrize("norm", ["linf", "token", "token_mean"])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_one_feature_against_all_signs(norm: Norm, seed: int) -> None:
    """With one feature a token the unit ball is a cube, or spanned by single tokens."""
    block = random_block(seed, n=5, dim=1, heads=1)
    dense = oracles.jacobian(block)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    exact = dense.abs().sum(0).max() if norm == "token_mean" else (signs @ dense.mT).abs().max()
    value, slack = reached_norm(block, norm)
    torch.testing.assert_close(value, exact, rtol=1e-12, atol=0)
    assert slack < 1e-10 * value


@pytest.mark.parametrize("norm", ["linf", "token", "token_mean"])
def test_no_direction_is_stretched_more(norm: Norm) -> None:
    block = random_block(31, n=4, dim=3, heads=2)
    moves = torch.randn(20_000, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = {
        "linf": lambda change: change.abs().amax((-2, -1)),
        "token": lambda change: change.norm(dim=-1).amax(-1),
        "token_mean": lambda change: change.norm(dim=-1).mean(-1),
    }[norm]
    images = (moves.flatten(-2) @ oracles.jacobian(block).mT).unflatten(-1, (4, 3))
    stretch = (size(images) / size(moves)).max()
    value, _ = reached_norm(block, norm)
    assert stretch <= value < 3 * stretch


@pytest.mark.parametrize("norm", ["linf", "token", "token_mean"])
def test_a_constant_block_reaches_nothing(norm: Norm) -> None:
    """Found by the verifier: 1e-154 in place of 0."""
    block = random_block(34)
    value, slack = reached_norm(block.replace(w_o=torch.zeros_like(block.w_o)), norm)
    assert value == 0
    assert slack < 1e-300


@pytest.mark.parametrize("norm", ["token", "token_mean"])
def test_a_tiny_block_reaches_as_many_times_less(norm: Norm) -> None:
    """Squares of its entries underflow: the long search once took 1.08 times the norm of such a block for its norm."""
    block = random_block(seed=5).double
    tiny = block.replace(w_o=2.0**-540 * block.w_o)
    value, _ = reached_norm(block, norm)
    assert reached_norm(tiny, norm)[0] == 2.0**-540 * value


def test_a_batch_gets_the_numbers_of_its_items() -> None:
    block = random_block(32, n=3, dim=2, heads=1)
    points = torch.randn(2, 3, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together, _ = reached_norm(block.at(points), "token")
    assert together.shape == (2, 3)
    torch.testing.assert_close(together[1, 2], reached_norm(block.at(points[1, 2]), "token")[0])


def test_a_small_change_is_that_of_the_derivative() -> None:
    block = random_block(33)
    direction = torch.randn(block.x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction = direction / direction.norm()
    quotient, slack = reached_change(block, (block.x + 1e-4 * direction).unsqueeze(0))
    derivative = (oracles.jacobian(block) @ direction.flatten()).norm()
    torch.testing.assert_close(quotient[0], derivative, rtol=1e-3, atol=0)
    assert slack < 1e-6 * quotient  # rounding, divided by the step


def claiming(scope: Scope, norm: Norm, formula: Callable[..., Tensor]) -> BoundSpec:
    right = lipbounds.get("newhouse2025.composed")
    claim = Claim(kind="proved", scope=scope, norm=norm)
    return dc.replace(right, name="a.wrong.one", claim=claim, compute=formula, supports=frozenset(), summary="")


def share_of(name: str, factor: float) -> BoundSpec:
    right = lipbounds.get(name)
    arguments = (lambda block, radius: factor * right(block, radius).value, lambda block: factor * right(block).value)
    compute = arguments[0] if right.needs_radius else arguments[1]
    return dc.replace(right, name="a.wrong.one", compute=compute, summary="")


def without_softmax_part(block: Attention, radius: float) -> Tensor:
    return lipbounds.get("havens2024.change")(block, radius).terms["mixing"]


def quarter(block: Attention, radius: float) -> Tensor:
    """1/4 in place of the 1/2 of the softmax."""
    terms = lipbounds.get("havens2024.change")(block, radius).terms
    return terms["mixing"] + terms["softmax_part"] / 2


WRONG = {
    "reached token norm": claiming("point", "token", lambda block: 0.98 * reached_norm(block, "token")[0]),
    "token in the place of linf": claiming("point", "linf", lambda block: reached_norm(block, "token")[0]),
    "reached mean": claiming("point", "token_mean", lambda block: 0.98 * reached_norm(block, "token_mean")[0]),
    "newhouse2025": share_of("newhouse2025.composed", 0.95),
    "emadi2026": share_of("emadi2026.balanced_mass", 0.95),
    "covariance_token": share_of("covariance_token.exact", 0.97),
    "vuckovic2020": share_of("vuckovic2020.w1", 0.95),
    "no softmax part": claiming("change", "l2", without_softmax_part),
    "hu2024": share_of("hu2024.ball", 0.95),
}
CLIMBED = {"a quarter": claiming("change", "l2", quarter)}


@pytest.mark.parametrize("name", WRONG)
def test_the_search_refutes_a_wrong_one(name: str, without_shrinking: None) -> None:
    with pytest.raises(Refuted):
        run_check(WRONG[name], "value", max_examples=400)


def test_ascent_refutes_what_random_blocks_do_not() -> None:
    """Half of the softmax part: above the truth at nearly all blocks."""
    found = falsify(CLIMBED["a quarter"], tokens=2, dim=2, steps=100, seconds=20.0)
    assert found.ratio > 1.05


@pytest.mark.parametrize("name", ["newhouse2025.composed", "emadi2026.balanced_mass", "castin2024.mean_field_finite"])
def test_ascent_comes_close_to_a_sharp_bound_and_not_above(name: str) -> None:
    found = falsify(lipbounds.get(name), tokens=2, dim=1, starts=16, steps=40, seconds=20.0)
    assert 0.9 < found.ratio <= 1 + 1e-9


def test_a_compact_set_is_searched_on_its_sphere() -> None:
    """A right bound for half the radius: only tokens near the sphere refute it."""
    right = lipbounds.get("newhouse2025.composed")
    halved = dc.replace(right, compute=lambda block, radius: right(block, radius=radius / 2).value, summary="")
    found = falsify(halved, tokens=2, dim=1, starts=16, steps=40, seconds=20.0, radius=3.0)
    assert found.refuted
    assert found.block.x.norm(dim=-1).max() <= 3.0
