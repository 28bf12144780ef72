"""The largest of many norms is that of all of them, from few eigenproblems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipbounds.ops import largest_norm
from lipbounds.ops.largest_norm import largest_product_norm
from lipbounds.ops.spectral import product_norm_upper


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_all(matrices: Tensor, weights: Tensor, off: Tensor) -> Tensor:
    return (product_norm_upper(matrices, weights.unsqueeze(-3)) + off).amax(-1)


SIZES = torch.logspace(-2, 2, 12, dtype=torch.float64)[:, None, None]
ACROSS = torch.cat([torch.eye(4, 2), torch.zeros(4, 2)], -1).double()  # ACROSS x BESIDE = 0
BESIDE = torch.cat([torch.zeros(2, 5), draw(2, 5)]).double()
CASES: dict[str, tuple[Tensor, Tensor]] = {
    "sizes that differ": (SIZES * draw(2, 3, 12, 5, 4), draw(3, 4, 9)),
    "equal sizes": (draw(2, 3, 12, 5, 4), draw(3, 4, 9)),
    "copies": (draw(5, 4).expand(3, 12, 5, 4), draw(3, 4, 9)),
    "weights of each item": (SIZES * draw(2, 3, 12, 5, 4), draw(2, 3, 4, 9)),
    "a narrow product": (SIZES * draw(3, 12, 7, 2), draw(3, 2, 9)),
    "rank one under flat ones": (
        torch.cat([torch.eye(4).double().expand(2, 5, 4, 4), 1.5 * torch.ones(2, 3, 4, 4) / 4], 1),
        torch.eye(4).double().expand(2, 4, 4),
    ),
    "products that cancel": (SIZES * torch.cat([ACROSS.expand(2, 11, 4, 4), draw(2, 1, 4, 4) * 1e-12], 1), BESIDE),
    "nothing": (torch.zeros(2, 12, 5, 4).double(), draw(2, 4, 9)),
    "hardly anything": (2.0**-800 * SIZES * draw(2, 12, 5, 4), 2.0**600 * draw(2, 4, 9)),
    "one that is beyond squares": (
        torch.cat([2.0**-700 * draw(2, 11, 5, 4), 2.0**500 * draw(2, 1, 5, 4)], 1), 2.0**-400 * draw(2, 4, 9),
    ),
    "one item": (draw(1, 1, 4), draw(4, 3)),
}  # fmt: skip


@pytest.mark.parametrize(("matrices", "weights"), CASES.values(), ids=CASES.keys())
def test_the_largest_norm_is_that_of_all_in_every_bit(matrices: Tensor, weights: Tensor) -> None:
    for off in (torch.zeros(matrices.shape[:-2]).double(), 0.3 * draw(*matrices.shape[:-2], seed=1).abs()):
        assert torch.equal(largest_product_norm(matrices, weights, off), of_all(matrices, weights, off))


def test_an_entry_that_is_not_finite_makes_the_norm_infinite() -> None:
    matrices, off = draw(2, 12, 5, 4), torch.zeros(2, 12).double()
    matrices[0, 3, 1, 1], matrices[1, 5, 0, 0] = math.inf, math.nan
    assert largest_product_norm(matrices, draw(2, 4, 9), off).tolist() == [math.inf, math.inf]


def test_few_norms_are_made_and_all_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def told(matrices: Tensor, weights: Tensor) -> Tensor:
        made.append(matrices.shape[:-2].numel())
        return product_norm_upper(matrices, weights)

    monkeypatch.setattr(largest_norm, "product_norm_upper", told)
    matrices, weights = torch.logspace(0, 3, 100).double()[:, None, None] * draw(2, 100, 8, 8), draw(2, 8, 30)
    off = torch.zeros(2, 100).double()
    expected = largest_product_norm(matrices, weights, off)
    assert sum(made) < 40
    made.clear()
    weights.requires_grad_()
    found = largest_product_norm(matrices, weights, off)
    assert made == [200]
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
    found.sum().backward()
    assert weights.grad is not None


def test_inside_of_a_transform_all_norms_are_made() -> None:
    matrices, weights, off = draw(3, 12, 5, 4), draw(4, 9), torch.zeros(12).double()
    found = torch.func.vmap(lambda one: largest_product_norm(one, weights, off))(matrices)
    torch.testing.assert_close(found, largest_product_norm(matrices, weights, off.expand(3, 12)), rtol=1e-12, atol=0)
