r"""Sharp bounds on a ball ||X' - X||_F <= eps, ours: all heads jointly, and the truth at the centre plus a deviation.

The differential has three parts, mixing, query part and key part: how each is bounded over the ball, and how fast each
can change there, is in lipbounds.targets.attention_ball_parts, with proofs.

- sharp_ball.direct: the sum of the three parts over the ball.
- sharp_ball.deviation: along the segment from X to X' each part moves by at most the integral of its rate of change, so

      sup ||J(X')|| <= ||J(X)|| + sum over the parts of min( sum_k (r_k - r_(k-1)) sup over the ball of radius r_k of
      the rate,  sup over the ball of the part + the part at X ),       0 = r_0 < ... < r_K = eps,

  with ||J(X)|| from the dense Jacobian where that has at most 1200**2 entries (an option), and sharp_ball.direct at
  radius 0 elsewhere. It tends to the truth at X as eps -> 0, linearly.
- sharp_ball: the least of the two and of Theorem 3 on the ball; a minimum of bounds is one.

Numerics: float64; every part is rounded up where it is made.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Feature, Source
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_ball import theorem_3_on_ball
from lipbounds.targets.attention_ball_parts import BallParts, Centre
from lipbounds.targets.attention_dense import dense_norm, jacobian_entries


SUPPORTS: tuple[Feature, ...] = ("heads", "biases", "mask", "cross")
CLAIM = Claim(kind="proved", scope="ball", norm="l2")
DENSE = 1200**2  # entries of the Jacobian of one batch item: about a second
SHELLS = (0.5, 1.0)  # r_k / eps; twice as many gain a tenth where logits move by one unit
COST = "O((n D)^3) where the Jacobian is small, O(H n^2 (d^2 + H^2) + H D^3) elsewhere"
Parts = dict[str, Tensor]


@bound(
    name="sharp_ball.direct",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="three joint parts with suprema over a ball, derived here"),
    supports=SUPPORTS,
    cost="O(H n^2 (d^2 + H^2) + H D^3)",
)
def direct(block: Attention, radius: float) -> tuple[Tensor, Terms]:
    """Mixing, query and key part of all heads jointly, each bounded over the ball."""
    parts = BallParts(Centre(block.double), radius).first()
    return _finish(block, _total(block, parts), parts)


@bound(
    name="sharp_ball.deviation",
    claim=CLAIM,
    source=Source(
        title="lipbounds", statement="norm at the centre and integral of the second derivative, derived here"
    ),
    supports=SUPPORTS,
    cost=COST,
)
def deviation(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """The norm of the Jacobian at the centre plus how far the Jacobian can move over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """
    centre = Centre(block.double)
    parts = _deviation(centre, BallParts(centre, radius), dense)
    return _finish(block, _total(block, parts), parts)


@bound(
    name="sharp_ball",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="least of the bounds on a ball, derived here"),
    supports=SUPPORTS,
    cost=COST,
)
def sharp_ball(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """The least of: centre plus deviation, the three joint parts over the ball, Theorem 3 over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """
    centre = Centre(block.double)
    ball = BallParts(centre, radius)
    values = {
        "deviation": _total(block, _deviation(centre, ball, dense)),
        "direct": _total(block, ball.first()),
        "theorem_3": _known(theorem_3_on_ball(block.double, radius)[0]),
    }
    return _finish(block, torch.stack([*values.values()]).amin(0), values)


def _deviation(centre: Centre, ball: BallParts, dense: int) -> Parts:
    """Norm at the centre, and the largest change of each part."""
    there = BallParts(centre, 0.0).first()
    small = jacobian_entries(centre.block) <= dense
    parts = {"centre": dense_norm(centre.block) if small else _total(centre.block, there)}
    if not ball.radius:
        return parts
    moved = {name: torch.zeros_like(part) for name, part in there.items()}
    before = 0.0
    for share in SHELLS:
        shell = ball if share == 1 else BallParts(centre, share * ball.radius)
        width = (share - before) * ball.radius
        before = share
        for name, rate in shell.second().items():
            moved[name] = moved[name] + inflate(width * rate, 4)
    here = ball.first()
    for name, part in moved.items():
        parts[name] = torch.minimum(_known(part), _known(here[name] + there[name]))
    return parts


def _known(value: Tensor) -> Tensor:
    """NaN, which infinite factors make, says no more than infinity does."""
    return torch.where(value.isnan(), torch.inf, value)


def _total(block: Attention, parts: Parts) -> Float[Tensor, "*batch"]:
    value = torch.stack(torch.broadcast_tensors(*parts.values())).sum(0)
    return _known(inflate(value, len(parts) + 8)).expand(block.batch_shape)


def _finish(block: Attention, value: Tensor, parts: Parts) -> tuple[Tensor, Terms]:
    return cast_up(value, block.dtype), {f"detail.{name}": part for name, part in parts.items()}
