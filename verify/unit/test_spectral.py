"""Spectral norms of products are rounded up, exact to a few ulps, and survive cancellation and extreme scales."""

from __future__ import annotations

import mpmath
import pytest
import torch

from lipbounds.ops.spectral import product_norm_upper, root, spectral_norm_upper


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(*factors: torch.Tensor) -> mpmath.mpf:
    with mpmath.workdps(50):
        product = mpmath.matrix(factors[0].tolist())
        for factor in factors[1:]:
            product = product * mpmath.matrix(factor.tolist())
        return max(mpmath.svd_r(product, compute_uv=False))


@pytest.mark.parametrize(
    "shapes", [[(3, 5)], [(5, 3)], [(6, 2), (2, 6)], [(2, 6), (6, 2)], [(4, 3), (3, 2), (2, 5)]], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e150])
def test_just_above_the_exact_norm(shapes: list[tuple[int, int]], scale: float) -> None:
    factors = [draw(seed, *shape) for seed, shape in enumerate(shapes)]
    factors[0] = factors[0] * scale
    value, truth = mpmath.mpf(product_norm_upper(*factors).item()), exact(*factors)
    assert truth <= value <= truth * (1 + 1e-11)


def test_a_product_that_cancels_is_not_underestimated() -> None:
    """x W + b with b = -x W rounded: the float product is 0 or noise, the norm of the given floats is not."""
    x, w = draw(0, 1, 8), draw(1, 8, 3)
    left = torch.cat([x, torch.ones(1, 1, dtype=torch.float64)], -1)
    right = torch.cat([w, -(x @ w)], -2)
    assert mpmath.mpf(product_norm_upper(left, right).item()) >= exact(left, right) > 0


def test_zero_and_one_entry() -> None:
    zero = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    norm = spectral_norm_upper(zero)
    norm.backward()
    assert norm.item() == 0
    assert zero.grad is not None
    assert (zero.grad == 0).all()
    assert spectral_norm_upper(torch.tensor([[-3.0]], dtype=torch.float64)).item() == pytest.approx(3, rel=1e-13)


@pytest.mark.parametrize(
    "shapes", [[(3, 5)], [(5, 3)], [(6, 2), (2, 6)], [(2, 6), (6, 2)], [(4, 3), (3, 2), (2, 5)]], ids=str
)
def test_gradient(shapes: list[tuple[int, int]]) -> None:
    factors = [draw(seed, 2, *shape).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(product_norm_upper, factors, atol=1e-6)


def test_the_root_of_what_overflowed_is_infinity_and_that_of_zero_has_no_slope() -> None:
    squares = torch.tensor([torch.nan, torch.inf, 4.0, 0.0], dtype=torch.float64, requires_grad=True)
    roots = root(squares)
    assert roots.tolist() == [torch.inf, torch.inf, 2.0, 0.0]
    (slope,) = torch.autograd.grad(roots[2:].sum(), squares)
    assert slope[2:].tolist() == [0.25, 0.0]
