r"""CLEVER (Weng et al., ICLR 2018), adapted to functions with many outputs.

The method as recollected, not read here: the Lipschitz constant of a scalar function on a ball is the supremum of its
gradient norm; that norm is sampled at uniform points of the ball in batches, the maxima of the batches are taken to be
draws from a reverse Weibull distribution, and its end point, fitted by maximum likelihood, is the estimate.

The adaptation (ours): a block has many outputs, and its Lipschitz constant on the ball is the supremum of the spectral
norm of its Jacobian. So that norm is sampled in place of the gradient norm, by a few Lanczos steps at each point. The
estimate is of that supremum and of nothing else; no margin of a classifier is involved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.errors import InvalidInput
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._options import check_count, check_seed
from lipbounds.estimators._weibull import fit_reverse_weibull
from lipbounds.estimators.sampling import sampled_norms
from lipbounds.registry import Terms, bound
from lipbounds.targets.attention import Attention


@bound(
    name="clever",
    claim=Claim(kind="estimate", scope="ball"),
    source=Source(
        title="Evaluating the Robustness of Neural Networks: An Extreme Value Theory Approach",
        authors="Weng et al.",
        year=2018,
        arxiv="1801.10578",
        statement="recollected, and adapted from gradient norms to the spectral norm of the Jacobian",
    ),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(m k H n (n + D) d), m points, k Lanczos steps",
    role="estimator",
)
@torch.no_grad()
def clever(
    block: Attention, radius: float, *, batches: int = 16, samples: int = 8, steps: int = 6, seed: int = 0
) -> tuple[Tensor, Terms]:
    """CLEVER for the spectral norm of the Jacobian: end point of a reverse Weibull fit to maxima over random points.

    No promise: neither an upper nor a lower bound on the Lipschitz constant on the ball. `details` holds what the fit
    is worth: `ks_distance`, the Kolmogorov-Smirnov distance between fit and maxima; `shape` and `scale`, the fit's
    parameters; `sampled`, the largest norm seen, which is itself a lower bound; `at_edge`, whether the likelihood was
    still growing at the largest end point tried, ten times the range of the maxima above them: the value then says
    nothing, and more samples are needed. Where the norm is the same at all points (as at radius 0) it is returned, with
    distance and scale 0.
    Numerics: float64 inside; rounded to nearest. Not differentiable.

    Args:
        block: the attention block.
        radius: of the ball, in the Frobenius norm.
        batches: maxima that are fitted, at least 5; the paper's experiments are recollected to use 500.
        samples: points in each batch, uniform in the ball; recollected to be 1024 in the paper.
        steps: Lanczos steps at each point.
        seed: of the points and of the start vectors.

    Raises:
        InvalidInput: `batches`, `samples`, `steps` or `seed` is out of range; the Jacobian
            overflows at a point of the ball.
    """
    for name, count in (("batches", batches), ("samples", samples), ("steps", steps)):
        check_count(name, count)
    if batches < 5:
        raise InvalidInput(f"batches must be at least 5 to fit three parameters, got batches={batches}.")
    check_seed(seed)
    norms = sampled_norms(Ball(block, radius, seed), batches * samples, steps, seed)
    if len(norms) == 1:  # a ball that is one point
        norms = norms.expand(batches * samples, *norms.shape[1:])
    maxima = norms.unflatten(0, (batches, samples)).amax(1)
    fit = fit_reverse_weibull(maxima)
    details = {
        "detail.ks_distance": fit.distance,
        "detail.shape": fit.shape,
        "detail.scale": fit.scale,
        "detail.sampled": norms.amax(0),
        "detail.at_edge": fit.at_edge,
    }
    return fit.location.to(block.dtype), details
