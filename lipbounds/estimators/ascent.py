"""The Lipschitz constant on a ball by gradient ascent in it: lower bounds that come close to it on small blocks.

Both take steps along the normalised gradient of a logarithm, of a length that falls from a large to a small share of
the radius, and go back to the ball. Every restart remembers the best it has seen as computed; that alone is evaluated
once more with its rounding errors, which decides the value.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._measured import jacobian_norms, quotients
from lipbounds.estimators._operator import sphere
from lipbounds.estimators._options import check_count, check_seed
from lipbounds.ops.spectral import vector_norm
from lipbounds.registry import bound
from lipbounds.rounding import cast_down
from lipbounds.targets.attention import Attention


FIRST_STEP, LAST_STEP = 0.5, 0.02  # shares of the radius
KRYLOV = 12  # Lanczos steps at the best points
# Points among which those with the largest norms are taken as starts: in a large ball the norm has many local maxima,
# and a good start is worth more than many steps.
SCREENED, SCREENING_STEPS = 16, 6
SOURCE = Source(title="lipbounds", statement="projected gradient ascent on the quotient or on the Jacobian norm, ours")
TINY = torch.finfo(torch.float64).tiny


@bound(
    name="ascent_pairs",
    claim=Claim(kind="lower", scope="ball"),
    source=SOURCE,
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(r k H n (n + D) d), r restarts, k steps",
    role="estimator",
)
@torch.inference_mode(False)
def ascent_pairs(block: Attention, radius: float, *, steps: int = 15, restarts: int = 4, seed: int = 0) -> Tensor:
    """Largest |f(y) - f(z)|_F / |y - z|_F found by gradient ascent on both points in the ball, rounded down.

    Promise: at most the Lipschitz constant on the ball: the points are in it, and the bounded rounding of both outputs
    is subtracted. So it falls to 0 with the radius once that is near the rounding of the input, and is 0 at radius 0,
    where there is no pair.
    Numerics: float64 inside. Not differentiable. All restarts are held in memory at once.

    Args:
        block: the attention block.
        radius: of the ball, in the Frobenius norm.
        steps: gradient steps.
        restarts: pairs that start independent and uniform in the ball.
        seed: of the starts.

    Raises:
        InvalidInput: `steps`, `restarts` or `seed` is out of range.
    """
    _check(steps, restarts, seed)
    ball = Ball(_outside_inference(block), radius, seed)
    function = ball.block.replace(b_o=None).function()

    def log_quotient(pair: Tensor) -> Tensor:
        points = ball.centre + pair
        outputs = function(points)
        return _log_length(outputs[0] - outputs[1]) - _log_length(points[0] - points[1])

    pair = torch.stack([ball.uniform_steps(restarts), ball.uniform_steps(restarts)])
    first, second = _climb(ball, pair, log_quotient, steps)
    with torch.no_grad():
        value = quotients(ball, ball.points(first), ball.points(second)).amax(0)
    return cast_down(value, block.dtype)


@bound(
    name="ascent_jacobians",
    claim=Claim(kind="lower", scope="ball"),
    source=SOURCE,
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(r k H n (n + D) d), r restarts, k steps",
    role="estimator",
)
@torch.inference_mode(False)
def ascent_jacobians(block: Attention, radius: float, *, steps: int = 7, restarts: int = 4, seed: int = 0) -> Tensor:
    """Largest norm of the Jacobian found by gradient ascent in the ball, from below.

    Promise: at most the Lipschitz constant on the ball. Ascent is on ||J(y) v|| over y, with one step of power
    iteration for v at every y; at the starts, the best points and the centre ||J v|| / ||v|| is evaluated at the top
    Ritz vector of some Lanczos steps, with the bounded rounding of J v subtracted.
    Numerics: float64 inside. Not differentiable. All restarts are held in memory at once.

    Args:
        block: the attention block.
        radius: of the ball, in the Frobenius norm.
        steps: gradient steps.
        restarts: starts, the points of largest norm among the centre and random points, at least 15 of them.
        seed: of the starts and of the directions.

    Raises:
        InvalidInput: `steps`, `restarts` or `seed` is out of range; the Jacobian
            overflows at a point of the ball.
    """
    _check(steps, restarts, seed)
    ball = Ball(_outside_inference(block), radius, seed)
    start = _promising(ball, restarts, seed)
    direction = sphere(start.shape[:-2], ball.size, ball.generator, start.device).view(start.shape)

    def log_stretch(moves: Tensor) -> Tensor:
        nonlocal direction
        local = ball.block_at(ball.centre + moves)
        stretched = local.jvp(direction)  # first: what the block caches under no_grad cuts gradients
        with torch.no_grad():
            pulled = local.vjp(stretched)
            length = vector_norm(pulled.flatten(-2))[..., None, None]
            direction = torch.where((length > 0) & length.isfinite(), pulled / length.clamp(min=TINY), direction)
        return _log_length(stretched)

    best = _climb(ball, start[None], log_stretch, steps)[0]
    with torch.no_grad():
        candidates = torch.cat([torch.zeros_like(best[:1]), start, best])
        value = jacobian_norms(ball, ball.points(candidates), KRYLOV, seed).amax(0)
    return cast_down(value, block.dtype)


def _outside_inference(block: Attention) -> Attention:
    """The block without tensors made in inference mode, its cached ones included: gradients cannot pass them."""
    fields = {field.name: getattr(block, field.name) for field in dc.fields(block)}
    made = {name: value for name, value in fields.items() if isinstance(value, Tensor) and value.is_inference()}
    return block.replace(**{name: tensor.clone() for name, tensor in made.items()})


@torch.no_grad()
def _promising(ball: Ball, count: int, seed: int) -> Float[Tensor, "restarts *batch moving dim"]:
    """Steps to the points of largest Jacobian norm among the centre and random points, for each batch item."""
    steps = ball.uniform_steps(1 if ball.is_point else max(count, SCREENED))
    steps[0] = 0
    norms = jacobian_norms(ball, ball.points(steps), SCREENING_STEPS, seed)
    order = norms.argsort(0, descending=True)[:count]
    return steps.gather(0, order[..., None, None].expand(*order.shape, *steps.shape[-2:]))


def _climb(
    ball: Ball,
    moves: Float[Tensor, "points restarts *batch moving dim"],
    objective: Callable[[Tensor], Tensor],
    steps: int,
) -> Float[Tensor, "points restarts *batch moving dim"]:
    """The best steps from the centre that ascent on the objective has seen, for each restart and batch item."""
    best, highest = moves, torch.full(moves.shape[1:-2], -math.inf, dtype=moves.dtype, device=moves.device)
    if ball.is_point:
        return best
    for step in range(steps + 1):
        moves = moves.detach().requires_grad_()
        with torch.enable_grad():
            reached = objective(moves)
            (slope,) = torch.autograd.grad(reached.sum(), moves)
        reached, moves = reached.detach(), moves.detach()
        better = reached > highest  # false for NaN
        best = torch.where(better[..., None, None], moves, best)
        highest = torch.where(better, reached, highest)
        share = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (step / steps)
        slope = slope.nan_to_num(0.0, 0.0, 0.0)
        length = vector_norm(slope.flatten(-2))[..., None, None]
        moves = ball.project(moves + share * ball.usable * slope / length.clamp(min=TINY))
    return best


def _log_length(values: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    return vector_norm(values.flatten(-2)).clamp(min=TINY).log()


def _check(steps: int, restarts: int, seed: int) -> None:
    check_count("steps", steps)
    check_count("restarts", restarts)
    check_seed(seed)
