"""The Lipschitz constant on a ball from random points of it: the simplest lower bounds, and the baseline of the others.

Both say little in high dimension: a random direction is stretched by about ||J||_F / sqrt(N), not by ||J||, and random
points of the ball rarely come near the worst one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._measured import jacobian_norms, points_per_chunk, quotients
from lipbounds.estimators._options import check_count, check_seed
from lipbounds.registry import bound
from lipbounds.rounding import cast_down
from lipbounds.targets.attention import Attention


SOURCE = Source(title="lipbounds", statement="folklore: the supremum over a sample is at most the supremum")


@bound(
    name="random_pairs",
    claim=Claim(kind="lower", scope="ball"),
    source=SOURCE,
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(m H n (n + D) d), m pairs",
    role="estimator",
)
@torch.no_grad()
def random_pairs(block: Attention, radius: float, *, samples: int = 32, seed: int = 0) -> Tensor:
    """Largest |f(y) - f(z)|_F / |y - z|_F over random pairs of points of the ball, rounded down.

    Promise: at most the Lipschitz constant on the ball: the points are in it, and the bounded rounding of both outputs
    is subtracted. So it falls to 0 as the radius does, and is 0 at radius 0, where there is no pair.
    Numerics: float64 inside. Not differentiable.

    Args:
        block: the attention block.
        radius: of the ball, in the Frobenius norm.
        samples: pairs, both points independent and uniform in the ball.
        seed: of the points.

    Raises:
        InvalidInput: `samples` or `seed` is out of range.
    """
    check_count("samples", samples)
    check_seed(seed)
    ball = Ball(block, radius, seed)
    best = ball.block.x.new_zeros(block.batch_shape)
    if ball.is_point:
        return best.to(block.dtype)
    chunk = points_per_chunk(ball)
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        first, second = ball.points(ball.uniform_steps(2 * count)).chunk(2)
        best = torch.maximum(best, quotients(ball, first, second).amax(0))
    return cast_down(best, block.dtype)


@bound(
    name="random_jacobians",
    claim=Claim(kind="lower", scope="ball"),
    source=SOURCE,
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(m k H n (n + D) d), m points, k Lanczos steps",
    role="estimator",
)
@torch.no_grad()
def random_jacobians(block: Attention, radius: float, *, samples: int = 8, steps: int = 8, seed: int = 0) -> Tensor:
    """Largest norm of the Jacobian, from below, at the centre and at random points of the ball.

    Promise: at most the Lipschitz constant on the ball. Each norm is ||J v|| / ||v|| at the top Ritz vector v of a few
    Lanczos steps, with the bounded rounding of J v subtracted; it is the norm itself where the Jacobian has at most
    `steps` rows or columns.
    Numerics: float64 inside. Not differentiable.

    Args:
        block: the attention block.
        radius: of the ball, in the Frobenius norm.
        samples: points: the centre, and the others uniform in the ball.
        steps: Lanczos steps at each point.
        seed: of the points and of the start vectors.

    Raises:
        InvalidInput: `samples`, `steps` or `seed` is out of range; the Jacobian
            overflows at a point of the ball.
    """
    check_count("samples", samples)
    check_count("steps", steps)
    check_seed(seed)
    ball = Ball(block, radius, seed)
    return cast_down(sampled_norms(ball, samples, steps, seed).amax(0), block.dtype)


def sampled_norms(ball: Ball, samples: int, steps: int, seed: int) -> Tensor:
    """Lower bounds on the Jacobian norms at the centre and at `samples` - 1 random points, in chunks of them."""
    samples = 1 if ball.is_point else samples
    chunk, norms = points_per_chunk(ball), []
    for start in range(0, samples, chunk):
        moves = ball.uniform_steps(min(chunk, samples - start))
        if start == 0:
            moves[0] = 0
        norms.append(jacobian_norms(ball, ball.points(moves), steps, seed))
    return torch.cat(norms)
