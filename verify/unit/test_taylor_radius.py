"""The search for the largest ball that Taylor models prove, on margins whose zero is known."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipbounds.compose.taylor import radius as search
from lipbounds.compose.taylor.radius import taylor_radius
from lipbounds.targets.layers import Linear


Curve = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")  # margins of another class
NETWORK, X = Linear(torch.eye(2).double()), torch.zeros(1, 2).double()


@dc.dataclass
class Margin:
    """One margin of 1 and slope 1 at the point, and what is proved of it on a ball of each radius."""

    curve: Curve
    second: bool
    tried: list[float]

    @property
    def margins(self) -> Margin:
        return self

    operations = ()
    at_point = slopes = torch.ones(1).double()

    def evaluate(self, radii: Tensor) -> tuple[Tensor, Tensor]:
        self.tried += radii.tolist()
        lower = self.curve(radii)
        return lower.unsqueeze(1), torch.where(lower >= 0, radii, 0.0)


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> dict[int, Margin]:
    """The margins by order; those of the first order are looked at only if there are some of the second."""
    made: dict[int, Margin] = {}

    def make(network: Linear, x: Tensor, label: int, *, norm: str, order: int = 2) -> Margin:
        return made[order]

    monkeypatch.setattr(search, "TaylorMargin", make)
    return made


def found(margins: dict[int, Margin], steps: int = 20, largest: float = 10.0) -> float:
    radius, _ = taylor_radius(NETWORK, X, 0, largest=largest, steps=steps, precision=1e-3)
    assert all(len(margin.tried) <= steps for margin in margins.values())
    return radius


CURVES: dict[str, tuple[Curve, float]] = {
    "line": (lambda r: 1 - r, 1.0),
    "above the slope": (lambda r: 1 - 0.9 * r, 1 / 0.9),
    "bent": (lambda r: 1 - r - 40 * r**3, 0.26400),
    "steep": (lambda r: 1 - r - (r / 0.01) ** 8, 0.009988),
    "wall": (lambda r: torch.where(r < 0.3, 1 - r, -math.inf), 0.3),
    "unknown": (lambda r: torch.where(r < 0.3, 1 - r, math.nan), 0.3),
}


@pytest.mark.parametrize("name", CURVES)
def test_the_radius_is_just_below_the_zero(name: str, margins: dict[int, Margin]) -> None:
    curve, zero = CURVES[name]
    margins[2] = Margin(curve, second=False, tried=[])
    assert 0.998 * zero <= found(margins) <= zero * (1 + 1e-4)


def test_no_radius_is_larger_than_asked_for(margins: dict[int, Margin]) -> None:
    margins[2] = Margin(CURVES["line"][0], second=False, tried=[])
    assert found(margins, largest=0.5) == 0.5
    assert len(margins[2].tried) <= search.AT_ONCE


def test_few_balls_prove_a_smaller_radius(margins: dict[int, Margin]) -> None:
    margins[2] = Margin(CURVES["bent"][0], second=False, tried=[])
    assert 0 < found(margins, steps=4) < CURVES["bent"][1]


def test_nothing_is_proved_where_no_ball_is(margins: dict[int, Margin]) -> None:
    margins[2] = Margin(lambda r: -torch.ones_like(r), second=False, tried=[])
    assert found(margins, steps=5000) == 0.0


@pytest.mark.parametrize("better", [1, 2])
def test_the_larger_radius_of_both_orders_counts(better: int, margins: dict[int, Margin]) -> None:
    margins[better] = Margin(CURVES["line"][0], second=better == 2, tried=[])
    margins[3 - better] = Margin(CURVES["bent"][0], second=better == 1, tried=[])
    assert found(margins) == pytest.approx(1.0, rel=2e-3)
    if better == 2:
        assert len(margins[1].tried) == 1  # a little above what the second order proved
