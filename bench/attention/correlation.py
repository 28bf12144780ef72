"""Rank and log correlations over blocks, with bootstrap intervals that resample inputs.

Arrays have the shape `[layers, inputs]`. Inputs are what is drawn, so a bootstrap sample draws inputs with
replacement and takes all layers of each; the layers of a model are fixed. Within layers: ranks, or logs, are centred in
each layer and pooled, so that layers that differ as a whole count for nothing. Across: all blocks in one.
"""

from __future__ import annotations

import functools
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
    left, right = _centred_ranks(x, counts), _centred_ranks(y, counts)
    return _quotient(*(_moment(counts, *pair) for pair in ((left, right), (left, left), (right, right))))


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
    counts = _counts(drawn)
    left, right = (of - of.mean(-1, keepdims=True) for of in (np.log(x), np.log(y)))
    return _quotient(*(_covariance(counts, *pair) for pair in ((left, right), (left, left), (right, right))))


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
        values = statistic(x, y, _samples(inputs))
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail]) if np.isfinite(values).any() else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


@functools.cache
def _samples(inputs: int) -> np.ndarray:
    """The bootstrap samples, the same at each call: `[samples, inputs]`."""
    return np.random.default_rng(SEED).integers(inputs, size=(REPLICATES, inputs))


def _all_layers(drawn: np.ndarray, layers: int) -> np.ndarray:
    """Inputs as all of their blocks."""
    return np.concatenate([drawn + layer * drawn.shape[-1] for layer in range(layers)], -1)


def _counts(drawn: np.ndarray) -> np.ndarray:
    """How often each input is in each sample: a sample is as good as weights, and those need no sorting."""
    samples, inputs = drawn.shape
    places = drawn + inputs * np.arange(samples)[:, None]
    return np.bincount(places.ravel(), minlength=drawn.size).reshape(samples, inputs).astype(float)


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Twice the distances of ranks to their mean within each sample, ties at their mean: `[layers, samples, inputs]`.

    The rank of input i is half of the sum of sign(x_i - x_j) over the sample, up to a constant: integers, and exact.
    """
    layers, inputs = values.shape
    signs = np.sign(values[:, None, :] - values[:, :, None])  # [layers, j, i]
    ranks = counts.astype(np.float32) @ signs.transpose(1, 0, 2).reshape(inputs, -1).astype(np.float32)
    return ranks.reshape(len(counts), layers, inputs).transpose(1, 0, 2)


def _moment(counts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of the products over layers and inputs of each sample; of integers, and exact.

    Args:
        counts: `[samples, inputs]`.
        left: `[layers, samples, inputs]`.
        right: likewise.
    """
    return np.einsum("si,lsi,lsi->s", counts, left, right)


def _covariance(counts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum over layers of the covariance within each sample, times the number of inputs.

    Args:
        counts: `[samples, inputs]`.
        left: `[layers, inputs]`, centred in each layer.
        right: likewise.
    """
    return (counts @ (left * right).T - (counts @ left.T) * (counts @ right.T) / counts.shape[-1]).sum(-1)


def _quotient(both: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlations from a covariance and two variances; NaN where nothing but rounding varies."""
    varies = (first > 1e-20) & (second > 1e-20)
    return np.where(varies, both / np.sqrt(np.where(varies, first * second, 1.0)), np.nan)
