"""What is measured at many points of a ball at once: Jacobian norms and quotients of differences, from below."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators._rayleigh import attained
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import gamma, inflate


CHUNK_ENTRIES = 2**22  # of the largest tensor made for the points that are treated at once


def points_per_chunk(ball: Ball) -> int:
    """How many points fit into bounded memory."""
    return max(1, CHUNK_ENTRIES // JacobianOperator(ball.block).entries_per_direction)


def jacobian_norms(
    ball: Ball, points: Float[Tensor, "count *batch moving dim"], krylov: int, seed: int
) -> Float[Tensor, " count *batch"]:
    """Lower bounds on the Jacobian norms at the points, by Lanczos, rounded down.

    Args:
        ball: the ball.
        points: of the ball, in float64.
        krylov: Lanczos steps; from the smaller side of the Jacobian on the norm is exact up to rounding.
        seed: of the start vectors.
    """
    operator = JacobianOperator(ball.block_at(points))
    _, direction = largest_ritz_pair(operator, krylov, seed)
    return attained(operator, direction)[0]


def quotients(
    ball: Ball, first: Float[Tensor, "count *batch moving dim"], second: Float[Tensor, "count *batch moving dim"]
) -> Float[Tensor, " count *batch"]:
    """Lower bounds on |f(first) - f(second)| / |first - second|, rounded down; 0 for two equal points.

    The difference of the outputs is known up to the rounding errors of both, bounded entry by entry
    (`targets/attention_roundoff.py`).
    They are subtracted, so two points too close together for float64 give a small number or 0, never a large one.

    Args:
        ball: the ball.
        first: points of the ball, in float64.
        second: as many others.
    """
    block = ball.block.replace(b_o=None)  # drops out of the difference, so it must not cost accuracy
    one, other = block.at(first), block.at(second)
    change = (one.forward() - other.forward()).flatten(-2)
    error = (Roundoff(one).forward() + Roundoff(other).forward()).flatten(-2)
    operations = change.shape[-1] + 8
    certain = vector_norm(change) * (1 - 2 * gamma(operations)) - inflate(vector_norm(error), operations)
    distance = inflate(vector_norm((first - second).flatten(-2)), ball.size + 8)
    quotient = certain.clamp(min=0) / distance
    # Logits may overflow far out in a large ball: nothing is known there.
    return torch.where((distance > 0) & quotient.isfinite(), quotient, 0.0)
