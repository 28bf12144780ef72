"""Mistakes in the bounds that start from the centre of a ball: each changes one thing in the parts that we ship."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.derivatives.ball.first import BallDerivatives, Centre
from lipbounds.derivatives.ball.suprema import Maps
from lipbounds.derivatives.first.dense import dense_norm
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted


Shells = tuple[float, ...]
Part = type[BallDerivatives]


def direct(parts: Part, block: Attention, radius: float) -> Tensor:
    """The sum of the three parts over the ball."""
    return _cast(block, sum(parts(Centre(block.double), radius).first().values()))


def deviation(
    parts: Part, block: Attention, radius: float, *, shells: Shells = (0.5, 1.0), inner: bool = False
) -> Tensor:
    """The exact norm at the centre plus the integral of the rates, without caps; at the inner radii if so."""
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
    return cast_up(
        (value * (1 + 1e-12)).nan_to_num(nan=torch.inf, posinf=torch.inf).expand(block.batch_shape), block.dtype
    )


def _without(name: str) -> Part:
    """A part that does not change over the ball."""

    class Fixed(BallDerivatives):
        def second(self) -> dict[str, Tensor]:
            return {key: part * (key != name) for key, part in super().second().items()}

    return Fixed


def _with_maps(change: Callable[[BallDerivatives, Maps], Maps]) -> Part:
    """Suprema of the maps replaced."""

    class Changed(BallDerivatives):
        def __init__(self, centre: Centre, radius: float) -> None:
            super().__init__(centre, radius)
            self.maps = change(self, self.maps)
            for rows in (self._values, *((self._keys,) if self.block.query_moves else ())):
                rows.maps = self.maps
                rows.plain = rows._bound(torch.ones_like(self.maps.upper), rows._error, None)

    return Changed


@planted(scope="ball")
def rate_at_the_centre(block: Attention, radius: float) -> Tensor:
    """eps times the rate of change at the centre, as though the second derivative were constant in the ball."""
    return deviation(BallDerivatives, block, radius, shells=(1.0,), inner=True)


@planted(scope="ball")
def second_power_of_the_radius(block: Attention, radius: float) -> Tensor:
    """The deviation is taken to be of second order, eps^2 times the rate, as at a stationary point."""
    found, centre = deviation(BallDerivatives, block.double, radius), dense_norm(block.double)
    return _cast(block, centre + radius * (found - centre))


@planted(scope="ball", subtle=True)
def query_part_fixed(block: Attention, radius: float) -> Tensor:
    """The query part is left as it is at the centre."""
    return deviation(_without("query_part"), block, radius)


@planted(scope="ball", subtle=True)
def capped_by_the_part_at_the_centre(block: Attention, radius: float) -> Tensor:
    """A part is said to change by no more than its size at the centre, where it may be near 0: one-hot rows."""
    wide = block.double
    centre = Centre(wide)
    there, rates = BallDerivatives(centre, 0.0).first(), BallDerivatives(centre, radius).second()
    moved = [torch.minimum(radius * rates[name], part) for name, part in there.items()]
    return _cast(block, dense_norm(wide) + sum(moved))


@planted(scope="ball", subtle=True)
def maps_at_their_lower_ends(block: Attention, radius: float) -> Tensor:
    """P' is taken at the lower end of its interval where the upper one is needed."""
    lower = _with_maps(lambda parts, maps: dc.replace(maps, upper=(parts.block.probabilities - maps.away).clamp(min=0)))
    return direct(lower, block, radius)


@planted(scope="ball", subtle=True)
def maps_at_the_centre(block: Attention, radius: float) -> Tensor:
    """P at the centre in place of its supremum, everything else over the ball."""
    centre = _with_maps(lambda parts, maps: BallDerivatives(parts.centre, 0.0).maps)
    return direct(centre, block, radius)


@planted(scope="ball")
def centre_by_power_iteration(block: Attention, radius: float) -> Tensor:
    """The norm at the centre from a few steps of power iteration, which comes from below."""
    wide = block.double
    vector = torch.ones(*wide.batch_shape, *wide.moving_input.shape[-2:], dtype=torch.float64)
    for _ in range(4):
        vector = wide.vjp(wide.jvp(vector))
        vector = vector / vector.flatten(-2).norm(dim=-1)[..., None, None].clamp(min=1e-300)
    found = wide.jvp(vector).flatten(-2).norm(dim=-1)
    return _cast(block, found + deviation(BallDerivatives, wide, radius) - dense_norm(wide))
