"""Mistakes in the bounds that start from the centre of a ball: each changes one thing in the parts that we ship."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lipbounds.ops.interval import softmax_interval, variance_interval_upper
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_ball import logit_radius
from lipbounds.targets.attention_dense import dense_norm
from lipbounds.targets.attention_parts import BallParts, Centre
from lipbounds.targets.attention_suprema import Maps, reach
from verify.faults.fault import planted


Shells = tuple[float, ...]
Part = type[BallParts]


def direct(parts: Part, block: Attention, radius: float) -> Tensor:
    """The sum of the three parts over the ball."""
    return _cast(block, sum(parts(Centre(block.double), radius).first().values()))


def deviation(
    parts: Part, block: Attention, radius: float, *, shells: Shells = (0.5, 1.0), inner: bool = False
) -> Tensor:
    """The exact norm at the centre plus the integral of the rates, without caps; with rates at the inner radii if so."""
    wide = block.double
    centre = Centre(wide)
    value, before = dense_norm(wide), 0.0
    for share in shells if radius else ():
        rates = parts(centre, radius * (before if inner else share)).second()
        value = value + (share - before) * radius * sum(rates.values()) * (1 + 1e-12)
        before = share
    return _cast(block, value)


def _cast(block: Attention, value: Tensor | float) -> Tensor:
    assert isinstance(value, Tensor)
    return cast_up((value * (1 + 1e-12)).nan_to_num(nan=torch.inf, posinf=torch.inf).expand(block.batch_shape), block.dtype)


def _without(name: str) -> Part:
    """A part that does not change over the ball."""

    class Fixed(BallParts):
        def second(self) -> dict[str, Tensor]:
            return {key: part * (key != name) for key, part in super().second().items()}

    return Fixed


def _with_maps(change: Callable[[BallParts, Maps], Maps]) -> Part:
    """Suprema of the maps replaced."""

    class Changed(BallParts):
        def __init__(self, centre: Centre, radius: float) -> None:
            super().__init__(centre, radius)
            self.maps = change(self, self.maps)
            for rows in (self._values, *((self._keys,) if self.block.query_moves else ())):
                rows.maps = self.maps
                rows.plain = rows._spread(self.maps.upper, rows._error, None)

    return Changed


@planted(scope="ball")
def rate_at_the_centre(block: Attention, radius: float) -> Tensor:
    """eps times the rate of change at the centre, as though the second derivative were constant in the ball."""
    return deviation(BallParts, block, radius, shells=(1.0,), inner=True)


@planted(scope="ball")
def inner_radius_of_each_shell(block: Attention, radius: float) -> Tensor:
    """The rates are integrated with their values at the inner radius of each shell: a lower sum of a growing function."""
    return deviation(BallParts, block, radius, shells=(0.25, 0.5, 0.75, 1.0), inner=True)


@planted(scope="ball")
def second_power_of_the_radius(block: Attention, radius: float) -> Tensor:
    """The deviation is taken to be of second order, eps^2 times the rate, as at a stationary point."""
    found, centre = deviation(BallParts, block.double, radius), dense_norm(block.double)
    return _cast(block, centre + radius * (found - centre))


@planted(scope="ball", subtle=True)
def query_part_fixed(block: Attention, radius: float) -> Tensor:
    """The query part is left as it is at the centre."""
    return deviation(_without("query_part"), block, radius)


@planted(scope="ball", subtle=True)
def key_part_fixed(block: Attention, radius: float) -> Tensor:
    """The key part is left as it is at the centre."""
    return deviation(_without("key_part"), block, radius)


@planted(scope="ball", subtle=True)
def deviation_of_one_head(block: Attention, radius: float) -> Tensor:
    """Only the first head moves away from the centre."""
    wide = block.double
    groups = {name: getattr(wide, name)[..., :1, :, :] for name in ("w_q", "w_k", "w_v", "w_o")}
    groups |= {n: getattr(wide, n)[..., :1, :] for n in ("b_q", "b_k", "b_v") if getattr(wide, n) is not None}
    if wide.logit_bias is not None and wide.logit_bias.dim() > 2:
        groups["logit_bias"] = wide.logit_bias[..., :1, :, :]
    one = wide.replace(**groups)
    return _cast(block, dense_norm(wide) + deviation(BallParts, one, radius) - dense_norm(one))


@planted(scope="ball", subtle=True)
def maps_at_their_lower_ends(block: Attention, radius: float) -> Tensor:
    """P' is taken at the lower end of its interval where the upper one is needed."""
    lower = _with_maps(lambda parts, maps: dc.replace(maps, upper=(parts.block.probabilities - maps.away).clamp(min=0)))
    return direct(lower, block, radius)


@planted(scope="ball", subtle=True)
def maps_at_the_centre(block: Attention, radius: float) -> Tensor:
    """P at the centre in place of its supremum, everything else over the ball."""
    centre = _with_maps(lambda parts, maps: BallParts(parts.centre, 0.0).maps)
    return direct(centre, block, radius)


@planted(scope="ball", subtle=True)
def half_of_the_variance(block: Attention, radius: float) -> Tensor:
    """J(p) <= diag(p (1 - p)), the diagonal of J alone; the off-diagonal entries double it."""
    halved = _with_maps(lambda parts, maps: dc.replace(maps, pairs=torch.minimum(maps.pairs / 2, maps.upper)))
    return direct(halved, block, radius)


@planted(scope="ball", subtle=True)
def least_of_two_diagonals(block: Attention, radius: float) -> Tensor:
    """J(p) <= diag(min(p, 2 p (1 - p))): each of the two is above J(p), the least of them entry by entry is not."""
    least = _with_maps(lambda parts, maps: dc.replace(maps, pairs=torch.minimum(maps.upper, 2 * parts.variance)))

    class Least(least):
        @property
        def variance(self) -> Tensor:
            interval = softmax_interval(self.block.logits, logit_radius(self.block, self.radius))
            return variance_interval_upper(interval)

    return direct(Least, block, radius)


@planted(scope="ball", subtle=True)
def queries_at_the_centre(block: Attention, radius: float) -> Tensor:
    """u_i = s W_K q_i of the key part at the centre, everything else over the ball."""

    class AtCentre(BallParts):
        def _reach(self, factors: Tensor) -> Tensor:
            return reach(self.centre.queries, 0.0, self.maps.pairs * factors)

    return direct(AtCentre, block, radius)


@planted(scope="ball", subtle=True)
def values_and_keys_at_the_centre(block: Attention, radius: float) -> Tensor:
    """Keys and values do not move with their tokens in the covariances, the maps do."""

    class AtCentre(BallParts):
        def __init__(self, centre: Centre, radius: float) -> None:
            super().__init__(centre, radius)
            for rows in (self._values, *((self._keys,) if self.block.query_moves else ())):
                rows.plain = dc.replace(rows.plain, radius=0.0)

    return direct(AtCentre, block, radius)


@planted(scope="ball")
def joint_norm_of_the_largest_head(block: Attention, radius: float) -> Tensor:
    """The heads together are given the largest spread of one of them: their outputs add up."""

    class Largest(BallParts):
        @cached_property
        def _sg(self):  # noqa: ANN202
            spread = super()._sg
            return dc.replace(spread, rows=dc.replace(spread.rows, joint=torch.ones_like(spread.rows.joint)))

    return direct(Largest, block, radius)


@planted(scope="ball")
def sides_of_the_mixing_part_mixed_up(block: Attention, radius: float) -> Tensor:
    """||[P_1 ... P_H]|| side by side with the M_h stacked, where sum_h P_h (x) M_h^T needs both the same way."""

    class Crossed(BallParts):
        def __init__(self, centre: Centre, radius: float) -> None:
            super().__init__(centre, radius)
            if self.block.memory_moves:
                centre.mixing_weights = centre.mixing_weights[::-1]

    return direct(Crossed, block, radius)


@planted(scope="ball", subtle=True)
def root_of_the_sum_of_squares(block: Attention, radius: float) -> Tensor:
    """The three parts are combined as though their images were orthogonal."""
    parts = BallParts(Centre(block.double), radius).first()
    return _cast(block, torch.stack(torch.broadcast_tensors(*parts.values())).norm(dim=0))


@planted(scope="ball")
def centre_by_power_iteration(block: Attention, radius: float) -> Tensor:
    """The norm at the centre from a few steps of power iteration, which comes from below."""
    wide = block.double
    vector = torch.ones(*wide.batch_shape, *wide.moving_input.shape[-2:], dtype=torch.float64)
    for _ in range(4):
        vector = wide.vjp(wide.jvp(vector))
        vector = vector / vector.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-300)
    found = wide.jvp(vector).flatten(-2).norm(dim=-1)
    return _cast(block, found + deviation(BallParts, wide, radius) - dense_norm(wide))
