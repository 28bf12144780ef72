"""The Lipschitz constants of activations: proofs by interval arithmetic, and how close they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipbounds.ops.activations import ACTIVATIONS, slope_interval


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


def extremes(name: str, low: float, high: float) -> tuple[float, float]:
    """Least and largest slope on a fine grid of the interval, by automatic differentiation."""
    grid = torch.linspace(low, high, 2001, dtype=torch.float64).clamp(low, high).requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[name].function(grid).sum(), grid)
    return float(slope.min()), float(slope.max())


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(centre=st.floats(-9, 9), width=st.sampled_from([0.0, 1e-9, 1e-3, 0.3, 1.0, 4.0, 30.0]))
def test_slopes_on_an_interval_hold_and_are_close(name: str, centre: float, width: float) -> None:
    low, high = centre - width, centre + width
    ends = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
    least, largest = (float(value) for value in slope_interval(name, *ends))
    reached_least, reached_largest = extremes(name, low, high)
    assert least <= reached_least + 1e-15
    assert reached_largest <= largest + 1e-15
    if name not in ("relu", "gelu_tanh"):  # a grid may miss the kink; the bracket of the peak is wide
        assert largest - reached_largest <= 1e-12 + 0.01 * width**2
        assert reached_least - least <= 1e-12 + 0.01 * width**2


@pytest.mark.parametrize("name", ["gelu", "silu", "gelu_tanh"])
def test_slopes_at_a_point_against_thirty_digits(name: str) -> None:
    exact = gelu_slope if name == "gelu" else half_line(mp)[name]
    for x in [*range(0, 12), 0.001, 1.4, 1.42, 2.4, 37.0, 38.6]:
        least, largest = slope_interval(name, *2 * [torch.tensor([float(x)], dtype=torch.float64)])
        negative = slope_interval(name, *2 * [torch.tensor([-float(x)], dtype=torch.float64)])
        assert mp.mpf(float(least)) <= exact(mp.mpf(x)) <= mp.mpf(float(largest))
        assert mp.mpf(float(negative[0])) <= 1 - exact(mp.mpf(x)) <= mp.mpf(float(negative[1]))


def test_the_peaks_are_in_their_brackets() -> None:
    low, high = (mp.mpf(end) for end in ACTIVATIONS["gelu"].peak or ())
    assert low < mp.sqrt(2) < high
    low, high = (mp.mpf(end) for end in ACTIVATIONS["silu"].peak or ())
    assert low * mp.tanh(low / 2) < 2 < high * mp.tanh(high / 2)


def sign_is_proved(start: float, end: float, sign: int) -> bool:
    """Whether f'' of gelu_tanh has that sign on [start, end], by bisection of intervals."""
    todo = [(mp.mpf(start), mp.mpf(end))]
    while todo:
        low, high = todo.pop()
        curvature = sign * gelu_tanh_curvature(iv.mpf([low, high]))
        if not curvature.a > 0:
            if high - low < 1e-6:
                return False
            middle = (low + high) / 2
            todo += [(low, middle), (middle, high)]
    return True


def test_the_slope_of_gelu_tanh_grows_up_to_its_bracket_and_falls_after_it() -> None:
    low, high = ACTIVATIONS["gelu_tanh"].peak or (0.0, 0.0)
    assert sign_is_proved(0, low, 1)
    assert sign_is_proved(high, 2, -1)
    assert not sign_is_proved(0, high, 1)
    # Beyond 2: f'' has the sign of 2 w + x w' - x w^2 tanh(u), where x w' <= 2 w, so it is negative where
    # x w tanh(u) > 4: that product grows with x.
    x, root = mp.mpf(2), mp.sqrt(2 / mp.pi)
    w = 2 * root * (1 + 3 * mp.mpf("0.044715") * x**2)
    assert x * w * mp.tanh(root * (x + mp.mpf("0.044715") * x**3)) > 4


def test_infinite_intervals_give_the_constants() -> None:
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    for name, rule in ACTIVATIONS.items():
        least, largest = slope_interval(name, -infinity, infinity)
        assert float(largest) >= 1
        assert float(torch.maximum(-least, largest)) <= rule.lipschitz * (1 + 1e-15)
