"""The radius that slopes on balls prove, against integrals that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lipbounds.compose.ray import Slopes, farthest, proved_radius


def ball(radius: float, slopes: list[float], margins: list[float]) -> Slopes:
    return Slopes(radius, torch.tensor(slopes, dtype=torch.float64), torch.tensor(margins, dtype=torch.float64))


def test_by_hand() -> None:
    """1 a unit up to 1, 4 beyond: of a margin of 3, 1 is gone at 1 and the rest half a unit later."""
    found = proved_radius([ball(1.0, [1.0, 0.5], [3.0, 9.0]), ball(2.0, [4.0, 0.5], [3.0, 9.0])])
    assert (found.ball, found.margin) == (1, 0)
    assert found.radius == pytest.approx(1.5, rel=1e-12)
    torch.testing.assert_close(found.falls, torch.tensor([3.0, 0.75]).double())
    assert found.radius <= 1.5
    assert float(found.falls[0]) <= 3.0 * (1 + 1e-14)


def test_a_slope_without_a_bound_ends_the_radius_where_the_last_one_held() -> None:
    found = proved_radius([ball(1.0, [1.0], [3.0]), ball(2.0, [math.inf], [3.0])])
    assert found.radius == 1.0
    assert proved_radius([ball(2.0, [math.inf], [3.0])]).radius == 0.0
    assert proved_radius([ball(2.0, [math.nan], [3.0])]).radius == 0.0
    assert proved_radius([ball(2.0, [1.0], [-1.0])]).radius == 0.0


CURVES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "constant": (lambda t: 2.0, lambda r: 2 * r),
    "linear": (lambda t: 1 + t, lambda r: r + r * r / 2),
    "cubic": (lambda t: 1 + t**3, lambda r: r + r**4 / 4),
    "exponential": (lambda t: math.exp(min(5 * t, 500.0)), lambda r: math.expm1(min(5 * r, 500.0)) / 5),
    "a steep rise": (
        lambda t: 8 + 400 * t * math.exp(min(2e7 * t * t, 300.0)),
        lambda r: 8 * r + 1e-5 * math.expm1(min(2e7 * r * r, 300.0)),
    ),
    "a wall": (lambda t: 1.0 if t < 0.7 else math.inf, lambda r: r if r < 0.7 else math.inf),
}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("margin", [1e-3, 1.0, 50.0])
def test_near_the_integral_and_never_beyond(name: str, margin: float) -> None:
    slope, integral = CURVES[name]
    asked: list[float] = []

    def slopes_on(radius: float) -> Slopes:
        asked.append(radius)
        return ball(radius, [slope(radius), 0.1], [margin, 100.0])

    radius, falls = farthest(slopes_on, largest=100.0, steps=20, precision=1e-3)
    assert falls is not None
    assert len(asked) <= 21
    assert integral(radius) <= float(falls[0]) <= margin * (1 + 1e-12)
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if integral(middle) <= margin else (low, middle)
    assert 0.88 * low <= radius <= low * (1 + 1e-12)
    # One ball alone proves the radius at which radius times slope is the margin.
    if name in ("linear", "cubic") and margin >= 1:
        assert radius * slope(radius) > 1.05 * margin


@given(widths=st.lists(st.floats(1e-6, 10), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_every_fall_within_the_radius_is_within_the_margin(widths: list[float], seed: int) -> None:
    """The falls add up, and at the radius no margin is below 0 while that of some class is 0, or all balls count."""
    generator = torch.Generator().manual_seed(seed)
    radii = torch.tensor(widths, dtype=torch.float64).cumsum(0)
    slopes = torch.rand(len(widths), 3, generator=generator).double().cumsum(0)
    margins = 10 * torch.rand(3, generator=generator).double()
    found = proved_radius([Slopes(r, s, margins) for r, s in zip(radii.tolist(), slopes, strict=True)])
    inner = torch.cat([torch.zeros(1).double(), radii[:-1]])

    def fall(radius: float) -> Tensor:
        return ((radii.clamp(max=radius) - inner).clamp(min=0).unsqueeze(1) * slopes).sum(0)

    assert (fall(found.radius) <= margins * (1 + 1e-12)).all()
    assert (fall(found.radius) <= found.falls * (1 + 1e-12)).all()
    if found.ball < len(radii):
        assert (fall(found.radius * (1 + 1e-9) + 1e-300) > margins * (1 - 1e-12)).any()
