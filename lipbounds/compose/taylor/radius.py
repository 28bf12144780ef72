"""The largest ball that Taylor models prove: a search over radii, several at a time."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.ball import Norm
from lipbounds.compose.taylor.margin import TaylorMargin
from lipbounds.rounding import inflate
from lipbounds.targets.layers import Layer


AT_ONCE = 8  # balls evaluated together: most of the work is the same for all of them


def taylor_radius(
    network: Layer,
    x: Float[Tensor, "..."],
    label: int,
    *,
    largest: float,
    steps: int,
    precision: float,
    norm: Norm = "l2",
) -> tuple[float, Float[Tensor, " classes"] | None]:
    """A radius within which the label provably keeps a largest logit, and how fast the margins may fall.

    The first balls halve from the one that the slopes at the point allow, which no bound can exceed by much; the next
    ones divide the gap between the largest radius proved and the next ball above it.

    Args:
        network: in float64.
        x: one input, in float64.
        label: the class.
        largest: no larger radius is looked for.
        steps: balls tried, at most.
        precision: the search ends when the gap is this share of the radius.
        norm: of the balls.

    Returns:
        The radius, 0 if nothing is proved, and for every class a bound on the fall of its margin over that ball,
        divided by the radius; None at radius 0. The ball that was evaluated may be larger than the one it proves: a
        margin falls at least as far there, but maybe less for its radius.
    """
    margin = TaylorMargin(network, x, label, norm=norm)
    if not bool((margin.at_point > 0).all()):
        return 0.0, None
    top = min(float(inflate((margin.at_point / margin.slopes).amin(), 64)), largest)
    low, high, falls = 0.0, top, None
    while steps > 0 and high > low * (1 + precision) and high > 1e-300:
        count = min(AT_ONCE, steps)
        steps -= count
        radii = _grid(low, high, count, x)
        lower, inside = margin.evaluate(radii)
        best = int(inside.argmax())
        if float(inside[best]) > low:
            low, falls = float(inside[best]), inflate((margin.at_point - lower[best]) / inside[best], 4)
        above = radii[(inside < radii) & (radii > low)]
        high = min(high, float(above.min())) if len(above) else low
    if falls is None:
        return 0.0, None
    return low, torch.cat([falls[:label], falls.new_zeros(1), falls[label:]])


def _grid(low: float, high: float, count: int, like: Tensor) -> Tensor:
    """`count` radii up to `high`: halving if nothing is proved yet, else evenly above `low`."""
    steps = torch.arange(count, dtype=like.dtype, device=like.device)
    if low == 0:
        return high * torch.exp2(-steps)
    return low + (high - low) * (steps + 1) / (count + (high < low * 2))
