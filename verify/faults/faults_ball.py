"""Wrong bounds on a ball."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import Formula, dense_jacobian, g_1, norm
from verify.faults.right_ball import Ball, Interval, logit_radius


def _nothing(radius: float) -> float:
    return 0.0


@planted(scope="ball")
def centre_only(block: Attention, radius: float) -> Tensor:
    """The bound at the centre for the whole ball."""
    return Formula()(block)


@planted(scope="ball")
def half_of_the_radius(block: Attention, radius: float) -> Tensor:
    """eps/2 in place of eps, diameter taken for radius."""
    return Ball()(block, radius / 2)


@planted(scope="ball")
def square_of_the_radius(block: Attention, radius: float) -> Tensor:
    """eps^2 in place of eps: too small below 1."""
    return Ball()(block, radius**2)


@planted(scope="ball")
def radius_shared_among_tokens(block: Attention, radius: float) -> Tensor:
    """Each token is given eps/sqrt(n), but the whole of eps may be spent on one."""
    return Ball()(block, radius * block.moving_input.shape[-2] ** -0.5)


@planted(scope="ball")
def second_order_forgotten(block: Attention, radius: float) -> Tensor:
    """The eps^2 terms of the logits and of their change are dropped."""
    return Ball(change_radius=_nothing, logit_radius=_first_order)(block, radius)


@planted(scope="ball", subtle=True)
def values_at_the_centre(block: Attention, radius: float) -> Tensor:
    """||V|| at the centre, everything else over the ball."""
    return Ball(value_radius=_nothing)(block, radius)


@planted(scope="ball", subtle=True)
def change_at_the_centre(block: Attention, radius: float) -> Tensor:
    """||K W_Q^T|| and ||Q W_K^T|| at the centre, everything else over the ball."""
    return Ball(change_radius=_nothing)(block, radius)


@planted(scope="ball", subtle=True)
def softmax_at_the_centre(block: Attention, radius: float) -> Tensor:
    """g_1 at the centre, everything else over the ball."""
    return Ball(softmax_radius=_nothing)(block, radius)


@planted(scope="ball", subtle=True)
def map_at_the_centre(block: Attention, radius: float) -> Tensor:
    """||P|| at the centre, everything else over the ball."""
    return Ball(map_radius=_nothing)(block, radius)


@planted(scope="ball", subtle=True)
def largest_entry_at_its_largest(block: Attention, radius: float) -> Tensor:
    """g_1 evaluated where p_(1) is largest, although it falls beyond 1/2."""

    def at_upper_end(rows: Interval) -> Tensor:
        top = torch.cat([rows.upper, torch.zeros_like(rows.upper[..., :1])], -1).sort(-1, descending=True).values
        return (top[..., 0] * (1 - top[..., 0] + torch.minimum(top[..., 1], 1 - top[..., 0]))).clamp(0, 0.5)

    return Ball(softmax=at_upper_end)(block, radius)


@planted(scope="ball", subtle=True)
def lower_ends_only(block: Attention, radius: float) -> Tensor:
    """g_1 of the lower ends of the probabilities."""

    def at_lower_end(rows: Interval) -> Tensor:
        ordered = rows.lower.sort(-1, descending=True).values
        return g_1(torch.cat([ordered, ordered.new_zeros(*ordered.shape[:-1], 2)], -1))

    return Ball(softmax=at_lower_end)(block, radius)


@planted(scope="ball")
def grows_by_relative_radius(block: Attention, radius: float) -> Tensor:
    """The value at the centre times 1 + eps / ||X||, as though the norm were homogeneous of degree 1."""
    wide = block.double
    size = norm(wide.moving_input).clamp(min=1e-300)
    return cast_up(Formula()(wide) * (1 + radius / size), block.dtype)


@planted(scope="ball")
def falls_with_the_radius(block: Attention, radius: float) -> Tensor:
    """Divided by 1 + eps, a normalisation that does not belong there."""
    return cast_up(Ball()(block.double, radius) / (1 + radius), block.dtype)


@planted(scope="ball", subtle=True)
def dips_near_radius_one(block: Attention, radius: float) -> Tensor:
    """Valid, but not monotone: the slack falls as the radius grows."""
    return cast_up(Ball()(block.double, radius) * (1 + 1 / (1 + 100 * radius)), block.dtype)


@planted(scope="ball")
def sampled_ball(block: Attention, radius: float) -> Tensor:
    """The exact norm at 16 random points of the ball, sold as a bound."""
    wide = block.double
    steps = torch.randn(16, *wide.moving_input.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = steps / torch.linalg.matrix_norm(steps)[..., None, None]
    points = [dense_jacobian(wide.at(wide.moving_input + radius * step)) for step in steps]
    norms = torch.stack([torch.linalg.matrix_norm(point, 2) for point in points])
    return cast_up(norms.amax(0), block.dtype)


def _first_order(block: Attention, radius: float) -> Tensor:
    """The change of the logits without its part in eps^2."""
    tiny = 2.0**-40
    return (logit_radius(block, tiny) - logit_radius(block, 0.0)) * (radius / tiny) + logit_radius(block, 0.0)
