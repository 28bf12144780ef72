"""The Lipschitz constants of activations: proofs by interval arithmetic, and how close they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch

from lipbounds.ops.activations import ACTIVATIONS


mp, iv = mpmath.mp, mpmath.iv


@pytest.fixture(autouse=True)
def thirty_digits() -> Iterator[None]:
    before = iv.dps
    iv.dps = 30
    with mpmath.workdps(30):
        yield
    iv.dps = before


def half_line(context: Any) -> dict[str, Callable[[Any], Any]]:
    """f' of each activation x s(x) on x >= 0, for numbers of mp or intervals of iv."""
    one = context.mpf(1)
    root = context.sqrt(2 / context.pi)

    def sigma(x: Any) -> Any:
        return one / (one + context.exp(-x))

    def silu(x: Any) -> Any:
        s = sigma(x)
        return s + x * s * (1 - s)

    def gelu_tanh(x: Any) -> Any:
        s = sigma(2 * root * (x + context.mpf("0.044715") * x**3))
        return s + 2 * x * root * (1 + 3 * context.mpf("0.044715") * x**2) * s * (1 - s)

    return {"silu": silu, "gelu_tanh": gelu_tanh}


def gelu_slope(x: Any) -> Any:
    return mp.ncdf(x) + x * mp.npdf(x)


def gelu_tanh_curvature(x: Any) -> Any:
    """f'' of gelu_tanh as an interval: f' = s + x w g with g = s (1 - s), w = (2 u)', s' = w g."""
    root, cubic = iv.sqrt(2 / iv.pi), iv.mpf("0.044715")
    s = 1 / (1 + iv.exp(-2 * root * (x + cubic * x**3)))
    w, slope_of_w = 2 * root * (1 + 3 * cubic * x**2), 12 * root * cubic * x
    return s * (1 - s) * (2 * w + x * slope_of_w + x * w**2 * (1 - 2 * s))


def proved_below(limit: float, start: float, end: float) -> int:
    """Number of intervals needed to prove that the slope of gelu_tanh is at most `limit` on [start, end]."""
    slope = half_line(iv)["gelu_tanh"]
    todo, proved = [(mp.mpf(start), mp.mpf(end))], 0
    while todo:
        low, high = todo.pop()
        middle = (low + high) / 2
        whole = iv.mpf([low, high])
        upper = slope(iv.mpf(middle)) + gelu_tanh_curvature(whole) * (whole - iv.mpf(middle))
        if upper.b <= limit:
            proved += 1
        elif high - low < 1e-7:
            raise AssertionError(f"the slope may exceed {limit} near {middle}")
        else:
            todo += [(low, middle), (middle, high)]
    return proved


def test_gelu_tanh_is_proved_on_the_whole_line() -> None:
    limit = ACTIVATIONS["gelu_tanh"].lipschitz
    assert proved_below(limit, 0, 10) > 1
    # Beyond 10: s <= 1, 1 - s <= exp(-2 u), 2 u >= x and 2 x u' <= 2 x^3 bound f' by 1 + 2 x^3 exp(-x), which falls.
    assert 1 + 2 * mp.mpf(10) ** 3 * mp.exp(-10) < limit
    # Below 0: f'(-x) = 1 - f'(x), and f' >= 0 for x >= 0, so it lies between 1 - limit and 1.


def test_a_constant_that_is_too_small_is_not_proved() -> None:
    with pytest.raises(AssertionError, match="may exceed"):
        proved_below(1.128993, 1, 2)


def test_gelu_is_the_closed_form_rounded_up() -> None:
    exact = (1 + mp.erf(1)) / 2 + 1 / (mp.e * mp.sqrt(mp.pi))
    assert abs(exact - gelu_slope(mp.sqrt(2))) < mp.mpf(10) ** -25
    assert exact <= mp.mpf(ACTIVATIONS["gelu"].lipschitz) <= exact + mp.mpf(10) ** -12


def test_silu_is_above_the_slope_at_the_root() -> None:
    """x tanh(x/2) grows with x > 0, so where it is above 2, x is above the root r, and 1/2 + x/4 above the slope."""
    x = 4 * (mp.mpf(ACTIVATIONS["silu"].lipschitz) - mp.mpf(1) / 2)
    assert 2 < x * mp.tanh(x / 2) < 2 + mp.mpf(10) ** -11
    assert abs(half_line(mp)["silu"](x) - (mp.mpf(1) / 2 + x / 4)) < mp.mpf(10) ** -12


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_on_a_grid_reach_the_constant_and_stay_below(name: str) -> None:
    activation = ACTIVATIONS[name]
    grid = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation.function(grid).sum(), grid)
    largest = float(slope.abs().max())
    assert activation.lipschitz * (1 - 1e-7) <= largest <= activation.lipschitz * (1 + 1e-15)
