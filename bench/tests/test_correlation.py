"""Correlations and their intervals against scipy on samples drawn out, and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from bench.attention.correlation import (
    Estimate,
    estimate,
    pearson_logs_across,
    pearson_logs_within,
    spearman_across,
    spearman_within,
    spearman_within_given,
    thirds_ratio,
)


def numbers(layers: int = 3, inputs: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With ties in the first; and samples of inputs."""
    random = np.random.default_rng(0)
    x = random.integers(1, 6, size=(layers, inputs)).astype(float)
    return x, x + random.exponential(3, size=x.shape), random.integers(inputs, size=(5, inputs))


@pytest.mark.parametrize(
    ("within", "across", "reference"),
    [
        (spearman_within, spearman_across, lambda x, y: spearmanr(x, y)[0]),
        (pearson_logs_within, pearson_logs_across, lambda x, y: pearsonr(np.log(x), np.log(y))[0]),
    ],
)
def test_samples_agree_with_scipy_on_the_drawn_inputs(within, across, reference) -> None:
    x, y, drawn = numbers()
    expected = [reference(x[0, of], y[0, of]) for of in drawn]
    np.testing.assert_allclose(within(x[:1], y[:1], drawn), expected, rtol=1e-10)
    expected = [reference(x[:, of].ravel(), y[:, of].ravel()) for of in drawn]
    np.testing.assert_allclose(across(x, y, drawn), expected, rtol=1e-10)


def test_within_layers_is_blind_to_what_tells_layers_apart() -> None:
    x, y, _ = numbers()
    shifts = np.array([[1.0], [100.0], [1e4]])
    assert estimate(spearman_within, x * shifts, y / shifts) == estimate(spearman_within, x, y)
    assert estimate(spearman_across, x * shifts, y / shifts).value < 0 < estimate(spearman_across, x, y).value


def test_what_follows_from_a_third_number_alone_is_gone_with_it_held_fixed() -> None:
    random = np.random.default_rng(0)
    z = random.random((1, 300))
    x, y = z + 0.3 * random.random(z.shape), z + 0.3 * random.random(z.shape)
    assert estimate(spearman_within, x, y).low > 0.8
    given = estimate(spearman_within_given(z), x, y)
    assert given.low < 0 < given.high
    assert estimate(spearman_within_given(random.random(z.shape)), x, y).low > 0.8


def test_intervals_hold_the_value_shrink_and_repeat() -> None:
    x, y, _ = numbers(1, 30)
    few, many = estimate(spearman_within, x, y), estimate(spearman_within, np.tile(x, 8), np.tile(y, 8))
    assert few.low < few.value < few.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert estimate(spearman_within, x, y) == few


def test_too_few_inputs_have_no_interval_and_constants_no_correlation() -> None:
    x, y, _ = numbers(1, 6)
    assert math.isfinite(estimate(spearman_within, x, y).value)
    assert math.isnan(estimate(spearman_within, x, y).low)
    x, y, _ = numbers()
    assert math.isnan(estimate(spearman_within, np.ones_like(x), y).value)
    assert math.isnan(estimate(pearson_logs_within, np.full_like(x, 0.3), y).value)


def test_thirds() -> None:
    x = np.arange(1.0, 10)[None]
    assert estimate(thirds_ratio, x, x).value == pytest.approx(8 / 2)
    assert estimate(thirds_ratio, x, 1 / x).value == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("low", "high", "sign", "neutral", "expected"),
    [
        (0.1, 0.3, 1, 0.0, "holds"),
        (0.1, 0.3, -1, 0.0, "the opposite"),
        (-0.3, -0.1, -1, 0.0, "holds"),
        (-0.1, 0.3, 1, 0.0, "not seen"),
        (0.8, 0.9, -1, 1.0, "holds"),
        (0.8, 1.1, 1, 1.0, "not seen"),
        (math.nan, math.nan, 1, 0.0, "not seen"),
    ],
)
def test_verdicts(low: float, high: float, sign: int, neutral: float, expected: str) -> None:
    assert Estimate((low + high) / 2, low, high).verdict(sign, neutral) == expected
