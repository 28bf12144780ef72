"""The end point of a reverse Weibull distribution, fitted to maxima by maximum likelihood.

The distribution function is G(y) = exp(-((a - y) / b)^c) for y <= a. For a given end point a the likelihood has one
maximum over b and c, found by bisection; a is looked for on a grid, with c kept at or above 1.

| symbol | meaning |
|---|---|
| a, b, c | end point, scale, shape |
| z = a - y | Weibull with scale b and shape c |

Derivation, and why c >= 1 and a bounded range for a: docs/bounds/estimators.md, "The fit of CLEVER".
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


NEAREST, FARTHEST = 1e-3, 10.0  # offsets of the end point from the largest value, in units of the range of the data
GRID = 64
BISECTIONS = 40
LARGEST_SHAPE = 1e5  # only a bracket: an end point ten ranges away gives shapes of about 50
SAME = 1e-9  # relative range below which the values are one number and its rounding errors


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class ReverseWeibull:
    """A fit: end point a, scale b, shape c, and its Kolmogorov-Smirnov distance to the data.

    `at_edge` says that the likelihood was still growing at the largest end point tried, which then means nothing.

    Where all values are the same up to rounding there is nothing to fit: the end point is the largest value, scale and
    distance are 0, the shape is 1.
    """

    location: Float[Tensor, "*batch"]
    scale: Float[Tensor, "*batch"]
    shape: Float[Tensor, "*batch"]
    distance: Float[Tensor, "*batch"]
    at_edge: Bool[Tensor, "*batch"]


def fit_reverse_weibull(values: Float[Tensor, " count *batch"]) -> ReverseWeibull:
    """The fit of largest likelihood, with shape at least 1 and the end point on the grid; see the top of this file.

    Args:
        values: at least two maxima for each batch item, float64, finite.
    """
    largest, smallest = values.amax(0), values.amin(0)
    spread = largest - smallest
    same = spread <= SAME * largest.abs()
    unit = torch.where(same, 1.0, spread)
    below = (largest - values) / unit  # in [0, 1]
    below = torch.where(same, torch.zeros_like(below), below)
    grid = torch.linspace(math.log(NEAREST), math.log(FARTHEST), GRID, dtype=values.dtype, device=values.device)
    offsets = grid.reshape(-1, *[1] * spread.dim()).expand(-1, *spread.shape)
    step = (math.log(FARTHEST) - math.log(NEAREST)) / (GRID - 1)
    offset = _best_offset(below, offsets)
    finer = torch.linspace(-step, step, GRID, dtype=values.dtype, device=values.device)
    finer = offset + finer.reshape(-1, *[1] * spread.dim())
    offset = _best_offset(below, finer.clamp(math.log(NEAREST), math.log(FARTHEST)))
    gaps = below + offset.exp()
    shape, log_scale = _shape_and_log_scale(gaps.unsqueeze(1))
    shape, log_scale = shape.squeeze(0), log_scale.squeeze(0)
    distance = _distance((-(shape * (gaps.log() - log_scale)).exp()).exp())
    return ReverseWeibull(
        location=torch.where(same, largest, largest + unit * offset.exp()),
        scale=torch.where(same, 0.0, unit * log_scale.exp()),
        shape=torch.where(same, 1.0, shape),
        distance=torch.where(same, 0.0, distance),
        at_edge=~same & (offset >= math.log(FARTHEST) - 1e-9),
    )


def _best_offset(below: Tensor, log_offsets: Tensor) -> Tensor:
    """The candidate, for each batch item, at which the likelihood is largest."""
    gaps = below.unsqueeze(1) + log_offsets.exp()  # [count, grid, *batch]
    shape, log_scale = _shape_and_log_scale(gaps)
    logs = gaps.log() - log_scale
    likelihood = shape.log() - log_scale + ((shape - 1) * logs - (shape * logs).exp()).mean(0)
    return log_offsets.gather(0, likelihood.argmax(0, keepdim=True)).squeeze(0)


def _shape_and_log_scale(gaps: Float[Tensor, "count grid *batch"]) -> tuple[Tensor, Tensor]:
    """The shape >= 1 of largest likelihood for given gaps to the end point, and the log of the scale."""
    logs = gaps.log()
    mean = logs.mean(0)
    low, high = torch.zeros_like(mean), torch.full_like(mean, math.log(LARGEST_SHAPE))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        weights = (middle.exp() * logs).softmax(0)
        too_small = (-middle).exp() > (weights * logs).sum(0) - mean
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    shape = low.exp()
    return shape, ((shape * logs).logsumexp(0) - math.log(len(gaps))) / shape


def _distance(fitted: Float[Tensor, " count *batch"]) -> Tensor:
    """Largest difference between the fitted distribution function and that of the data."""
    ordered = fitted.sort(0).values
    count = len(fitted)
    ranks = torch.arange(count, dtype=fitted.dtype, device=fitted.device).reshape(-1, *[1] * (fitted.dim() - 1))
    return torch.maximum((ordered - ranks / count).amax(0), ((ranks + 1) / count - ordered).amax(0))
