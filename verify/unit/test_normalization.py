"""LayerNorm and RMSNorm: the Jacobian, its norm on balls and how far it moves, against dense truths."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipbounds.ops.normalization import normalization_jacobian, normalization_range, normalize
from verify.unit.networks import Draw


def truth(x: torch.Tensor, epsilon: float, centred: bool) -> torch.Tensor:
    return torch.func.jacrev(lambda x: normalize(x, epsilon, centred=centred))(x)


def points(x: torch.Tensor, radius: float) -> list[torch.Tensor]:
    """Points of the ball: towards and beyond the smallest deviation, across, and at random."""
    centre = x - x.mean()
    draw = Draw(1)
    ways = [-centre, centre, -x, *(draw(*x.shape) for _ in range(12))]
    ways = [way / way.norm() for way in ways if float(way.norm()) > 0]
    return [x, *(x + share * radius * way for way in ways for share in (0.5, 1 - 1e-12))]


TOKENS = {
    "ordinary": lambda draw, dim: draw(dim),
    "constant": lambda draw, dim: torch.full((dim,), 3.0, dtype=torch.float64),
    "zero": lambda draw, dim: torch.zeros(dim, dtype=torch.float64),
    "tiny variance": lambda draw, dim: 5 + 1e-6 * draw(dim),
    "large": lambda draw, dim: 1e6 * draw(dim),
}


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("radius", [0.0, 1e-7, 0.1, 3.0])
def test_norm_and_movement_hold_in_the_ball(centred: bool, dim: int, kind: str, epsilon: float, radius: float) -> None:
    x = TOKENS[kind](Draw(dim), dim)
    known = normalization_range(x, torch.tensor(radius, dtype=torch.float64), epsilon, centred=centred)
    centre = normalization_jacobian(x, epsilon, centred=centred)
    # Automatic differentiation loses what the closed form keeps, by cancellation relative to 1/sigma.
    loss = 1e-12 * float(known.norm) + 1e-13 / epsilon**0.5
    for point in points(x, radius):
        reached = normalization_jacobian(point, epsilon, centred=centred)
        assert float(torch.linalg.matrix_norm(reached, 2)) <= float(known.norm) * (1 + 1e-9) + loss
        assert float(torch.linalg.matrix_norm(reached - centre, 2)) <= float(known.deviation) * (1 + 1e-9) + loss


@given(
    seed=st.integers(0, 10_000),
    dim=st.integers(1, 6),
    centred=st.booleans(),
    log_epsilon=st.integers(-12, 1),
    log_radius=st.integers(-8, 1),
)
def test_the_jacobian_is_that_of_automatic_differentiation(
    seed: int, dim: int, centred: bool, log_epsilon: int, log_radius: int
) -> None:
    draw, epsilon = Draw(seed), 10.0**log_epsilon
    x = draw(dim)
    computed = normalization_jacobian(x, epsilon, centred=centred)
    known = normalization_range(x, torch.zeros((), dtype=torch.float64), epsilon, centred=centred)
    torch.testing.assert_close(computed, truth(x, epsilon, centred), rtol=1e-6, atol=1e-6 * float(known.norm) + 1e-9)
    radius = 10.0**log_radius
    wide = normalization_range(x, torch.tensor(radius, dtype=torch.float64), epsilon, centred=centred)
    for point in points(x, radius)[:9]:
        reached = torch.linalg.matrix_norm(normalization_jacobian(point, epsilon, centred=centred), 2)
        centre = point - point.mean() if centred else point
        loss = 1e-15 / (float(centre.square().mean()) + epsilon) ** 0.5  # 1 - z^2 / D cancels where no other is left
        assert float(reached) <= float(wide.norm) * (1 + 1e-9) + loss


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_the_norm_is_reached(centred: bool) -> None:
    """At the centre, and in the ball at the point of the smallest deviation."""
    x, epsilon = Draw(2)(5), 1e-3
    size = float((x - x.mean()).norm()) if centred else float(x.norm())
    for radius in (0.0, 0.3 * size, 0.9 * size):
        known = normalization_range(x, torch.tensor(radius, dtype=torch.float64), epsilon, centred=centred)
        direction = x - x.mean() if centred else x
        reached = truth(x - radius * direction / direction.norm(), epsilon, centred)
        assert float(torch.linalg.matrix_norm(reached, 2)) == pytest.approx(float(known.norm), rel=1e-9)


def test_the_bound_on_the_movement_is_reached_in_the_limit() -> None:
    """max of 3 t (1 - t^2) is 2 / sqrt 3, at t = 1 / sqrt 3: a step along z where |z|^2 / D = 1/3."""
    dim = 4
    z = Draw(3)(dim)
    x = z / z.norm() * (0.5 * dim) ** 0.5  # |x|^2 / D = 1/2, with e = 1: |z|^2 / D = 1/3
    step = 1e-5
    moved = normalization_jacobian(x * (1 - step / x.norm()), 1.0, centred=False)
    change = torch.linalg.matrix_norm(moved - normalization_jacobian(x, 1.0, centred=False), 2)
    known = normalization_range(x, torch.tensor(step, dtype=torch.float64), 1.0, centred=False)
    assert 0.999 * float(known.deviation) <= float(change) <= float(known.deviation)


def test_at_high_precision_with_a_tiny_variance() -> None:
    """All digits of the variance are lost in float64 but for the rounding that is accounted for."""
    x = torch.tensor([1e8, 1e8 + 1e-7 * 3, 1e8 - 2e-8], dtype=torch.float64)
    known = normalization_range(x, torch.zeros((), dtype=torch.float64), 1e-18, centred=True)
    with mpmath.workdps(50):
        entries = [mpmath.mpf(float(value)) for value in x]
        mean = sum(entries) / 3
        sigma = mpmath.sqrt(sum((entry - mean) ** 2 for entry in entries) / 3 + mpmath.mpf("1e-18"))
        assert 1 / sigma <= mpmath.mpf(float(known.norm))


def test_dimensions_that_leave_no_direction() -> None:
    radius = torch.tensor(0.1, dtype=torch.float64)
    assert float(normalization_range(Draw(0)(1), radius, 1e-5, centred=True).norm) == 0
    for dim, centred in ((2, True), (1, False)):
        x = 3 * Draw(4)(dim)
        known = normalization_range(x, 0 * radius, 1e-2, centred=centred)
        with mpmath.workdps(40):
            entries = [mpmath.mpf(float(value)) for value in x]
            mean = sum(entries) / dim if centred else 0
            sigma = mpmath.sqrt(sum((entry - mean) ** 2 for entry in entries) / dim + mpmath.mpf(1e-2))
            exact = mpmath.mpf(1e-2) / sigma**3
            assert exact <= mpmath.mpf(float(known.norm)) <= exact * (1 + mpmath.mpf("1e-13"))
        reached = torch.linalg.matrix_norm(truth(x, 1e-2, centred), 2)
        assert float(reached) == pytest.approx(float(exact), rel=1e-9)
