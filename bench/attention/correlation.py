"""Rank and log correlations over blocks, with bootstrap intervals that resample inputs.

Arrays have the shape `[layers, inputs]`. Inputs are what is drawn, so a bootstrap sample draws inputs with
replacement and takes all layers of each; the layers of a model are fixed. Within layers: ranks, or logs, are centred in
each layer and pooled, so that layers that differ as a whole count for nothing. Across: all blocks in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


REPLICATES = 1000
LEVEL = 0.95
SEED = 0
FEWEST_INPUTS = 8  # below this an interval says nothing
# Of two arrays `[layers, inputs]` and of samples, numbers of inputs `[samples, inputs]`: one number a sample.
Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A number with its 95 % interval; NaN where there are too few inputs or nothing varies."""

    value: float
    low: float
    high: float

    def verdict(self, sign: int, neutral: float = 0.0) -> str:
        """Whether the interval is on the claimed side of `neutral`: "holds", "the opposite" or "not seen".

        Args:
            sign: 1 if the claim is that the number is above, -1 if below.
            neutral: the number that says neither.
        """
        low, high = sorted((sign * (self.low - neutral), sign * (self.high - neutral)))
        if low > 0:
            return "holds"
        return "the opposite" if high < 0 else "not seen"


def spearman_within(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Spearman's correlation within layers, pooled."""
    counts = _counts(drawn)
    return _pooled(_ranks(x, counts), _ranks(y, counts), counts)


def spearman_within_given(z: np.ndarray) -> Statistic:
    """The statistic that is Spearman's partial correlation within layers, pooled: what is left with `z` held fixed.

    Args:
        z: `[layers, inputs]`.
    """

    def statistic(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        xy, xz, yz = (spearman_within(*pair, drawn) for pair in ((x, y), (x, z), (y, z)))
        return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))

    return statistic


def pearson_logs_within(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Pearson's correlation of logarithms within layers, pooled."""
    return _pooled(np.log(x), np.log(y), _counts(drawn))


def spearman_across(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Spearman's correlation over all blocks."""
    return spearman_within(x.reshape(1, -1), y.reshape(1, -1), _all_layers(drawn, len(x)))


def pearson_logs_across(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Pearson's correlation of logarithms over all blocks."""
    return pearson_logs_within(x.reshape(1, -1), y.reshape(1, -1), _all_layers(drawn, len(x)))


def thirds_ratio(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Median of `y` over the third of the inputs with the largest `x` over that with the smallest; mean of the layers.

    The mean is that of logarithms. Layers count alike.
    """
    x, y = x[:, drawn], y[:, drawn]
    sorted_y = np.take_along_axis(y, np.argsort(x, axis=-1, kind="stable"), -1)
    third = max(1, x.shape[-1] // 3)
    low, high = np.median(sorted_y[..., :third], -1), np.median(sorted_y[..., -third:], -1)
    return np.exp(np.log(high / low).mean(0))


def mean_of_first(x: np.ndarray, y: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Mean of `x`."""
    return x[:, drawn].mean((0, -1))


def estimate(statistic: Statistic, x: np.ndarray, y: np.ndarray) -> Estimate:
    """A statistic with its percentile bootstrap interval, the same for the same numbers.

    Args:
        statistic: a function of this module.
        x: `[layers, inputs]`, positive where logs are taken.
        y: likewise.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        inputs = x.shape[-1]
        value = float(statistic(x, y, np.arange(inputs)[None])[0]) if inputs > 2 else float("nan")
        if inputs < FEWEST_INPUTS:
            return Estimate(value, float("nan"), float("nan"))
        values = statistic(x, y, np.random.default_rng(SEED).integers(inputs, size=(REPLICATES, inputs)))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail]) if np.isfinite(values).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def _all_layers(drawn: np.ndarray, layers: int) -> np.ndarray:
    """Inputs as all of their blocks."""
    return np.concatenate([drawn + layer * drawn.shape[-1] for layer in range(layers)], -1)


def _counts(drawn: np.ndarray) -> np.ndarray:
    """How often each input is in each sample: a sample is as good as weights, and those need no sorting."""
    samples, inputs = drawn.shape
    places = drawn + inputs * np.arange(samples)[:, None]
    return np.bincount(places.ravel(), minlength=drawn.size).reshape(samples, inputs).astype(float)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks of each input within its sample, ties at their mean: `[layers, samples, inputs]`."""
    found = np.empty((len(values), *counts.shape))
    for layer, of in enumerate(values):
        distinct, group = np.unique(of, return_inverse=True)
        sizes = counts @ (group[:, None] == np.arange(len(distinct)))
        found[layer] = (np.cumsum(sizes, -1) - sizes + (sizes + 1) / 2)[:, group]
    return found


def _pooled(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Correlation of what is centred in each layer of each sample; NaN where nothing but rounding varies.

    Args:
        x: `[layers, samples, inputs]`, or `[layers, inputs]` if it is alike in all samples.
        y: likewise.
        counts: `[samples, inputs]`.
    """
    centred = []
    for values in (x, y):
        values = values if values.ndim == 3 else values[:, None]
        centred.append(values - (counts * values).sum(-1, keepdims=True) / counts.sum(-1)[:, None])
    left, right = centred
    both, first, second = ((counts * product).sum((0, -1)) for product in (left * right, left**2, right**2))
    varies = (first > 1e-20) & (second > 1e-20)
    return np.where(varies, both / np.sqrt(np.where(varies, first * second, 1.0)), np.nan)
