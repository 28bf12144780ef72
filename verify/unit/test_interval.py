"""Interval softmax and its g_1: enclosures that are attained, sound at random points, and exact at radius 0."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch

from lipbounds.ops.interval import g_interval_upper, softmax_interval
from lipbounds.ops.softmax import g_upper_from_logits


ROWS = [[0.0, 0.0], [2.0, -1.0, 0.5], [30.0, 0.0, -5.0], [400.0, 0.0, -400.0], [1.0, float("-inf"), 0.3], [0.7]]


def row(entries: list[float]) -> torch.Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def corners(logits: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(logits))), dtype=torch.float64)
    return torch.where(logits.isneginf(), -torch.inf, logits + signs * radius)


@pytest.mark.parametrize("entries", ROWS, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3, 20.0])
def test_ends_are_attained_at_corners(entries: list[float], size: float) -> None:
    logits = row(entries)
    radius = size * torch.linspace(0.5, 1.0, len(entries), dtype=torch.float64)
    interval = softmax_interval(logits, radius)
    maps = corners(logits, radius).softmax(-1)
    assert (maps <= interval.upper * (1 + 1e-13)).all()
    assert (maps >= interval.lower * (1 - 1e-13)).all()
    torch.testing.assert_close(interval.upper, maps.amax(0), rtol=1e-11, atol=1e-200)
    torch.testing.assert_close(interval.lower, maps.amin(0), rtol=1e-11, atol=1e-200)


def test_complement_of_a_one_hot_row_keeps_its_digits() -> None:
    interval = softmax_interval(row([60.0, 0.0]), row([0.5, 0.5]))
    with mpmath.workdps(50):
        exact = 1 / (1 + mpmath.exp(mpmath.mpf(59)))
        assert exact <= mpmath.mpf(interval.complement[0].item()) <= exact * (1 + mpmath.mpf("1e-11"))


@pytest.mark.parametrize("entries", ROWS, ids=str)
def test_g_1_at_radius_zero_is_g_1(entries: list[float]) -> None:
    logits = row(entries)
    value = g_interval_upper(softmax_interval(logits, torch.zeros_like(logits)))
    exact = g_upper_from_logits(logits)
    assert value >= exact * (1 - 1e-13)
    torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("seed", range(8))
def test_g_1_over_the_interval_is_above_every_point_and_near_the_largest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
    radius = torch.rand(4, generator=generator, dtype=torch.float64)
    bound = g_interval_upper(softmax_interval(logits, radius))
    shifts = 2 * torch.rand(20000, 4, generator=generator, dtype=torch.float64) - 1
    points = torch.cat([logits + shifts * radius, corners(logits, radius)])
    reached = g_upper_from_logits(points).max()
    assert reached <= bound * (1 + 1e-12)
    assert bound <= 1.35 * reached  # how tight the closed form is; measured at most 1.2 here


def test_the_gradient_at_two_tied_keys_is_that_of_g_1() -> None:
    """Found by the verifier: at p = (1/2, 1/2, 0) g_1 is smooth, and moving one of the keys does not change it."""
    gradients = []
    for of in (g_upper_from_logits, lambda rows: g_interval_upper(softmax_interval(rows, torch.zeros_like(rows)))):
        logits = row([8.0, 8.0, -8.0]).requires_grad_()
        gradients.append(torch.autograd.grad(of(logits), logits)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)
