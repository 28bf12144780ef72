"""Sharp bounds on a ball ||X' - X||_F <= eps, ours: all heads jointly, and the truth at the centre plus a deviation.

- sharp_ball.direct: the sum of mixing, query and key part, each bounded over the ball;
- sharp_ball.deviation: ||J(X)|| plus the integral of how fast each part can change, in shells of the ball;
- sharp_ball.taylor: ||J(X)|| + eps ||d2F(X)|| + the integral of (1 - t) sup ||d3F|| over the ball, in shells;
- sharp_ball: the least of the three and of Theorem 3 on the ball; a minimum of bounds is one.

Formulas, size rules and proof: docs/bounds/sharp_ball.md. ||J(X)|| is exact where the Jacobian has at most 1200**2
entries (an option), elsewhere the least of what is known at a point: the last three tend to it as eps -> 0, linearly.

Numerics: float64; every part is rounded up where it is made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Feature, Source
from lipbounds.derivatives.ball.first import BallDerivatives, centre_of
from lipbounds.derivatives.ball.log_odds import maps_interval
from lipbounds.derivatives.ball.logits import theorem_3_on_ball
from lipbounds.derivatives.ball.third import BallThirdDerivative
from lipbounds.derivatives.ball.turned_rows import is_turned
from lipbounds.derivatives.ball.units import Compute, Parts, in_own_units
from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.first.dense import dense_norm, jacobian_entries
from lipbounds.derivatives.first.differential_parts import differential_parts
from lipbounds.derivatives.first.gram_norm import gram_norm, has_gram_norm, norm_work
from lipbounds.derivatives.rounding.range import check_range
from lipbounds.derivatives.second.norm import second_norm, second_work
from lipbounds.derivatives.second.rows import rows_work, second_norm_by_rows
from lipbounds.errors import InvalidInput
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


SUPPORTS: tuple[Feature, ...] = ("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries")
CLAIM = Claim(kind="proved", scope="ball", norm="l2")
DENSE = 1200**2  # entries of the Jacobian of one batch item: about a second
# Multiplications and additions for the second differential at the centre:
PAIRS_WORK = 2e11  # a few seconds; what a block inside a network may take, too
SECOND_WORK = 2.5e12  # up to a minute, as `sharp` may take
TOGETHER = 2**22  # entries of the largest tensors up to which all balls are made at once
SHELLS = tuple(k / 8 for k in range(1, 9))  # r_k / eps
SHELLS_OF_LARGE_BLOCKS = (0.5, 1.0)
COST = "O((n D)^3 + n^3 D^3) on small blocks, O(n^2 D^3) up to a size, then O(H n^2 (d^2 + H^2) + n D^2 (n + D))"
TOTAL = "total"


@bound(
    name="sharp_ball.direct",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="three joint parts with suprema over a ball, derived here"),
    supports=SUPPORTS,
    cost="O(H n^2 (d^2 + H^2) + H D^3)",
    version=2,
)
def direct(block: Attention, radius: float) -> tuple[Tensor, Terms]:
    """Mixing, query and key part of all heads jointly, each bounded over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
    """
    return _sum_of(block, radius, lambda wide, eps: BallDerivatives(centre_of(wide), eps).first())


@bound(
    name="sharp_ball.deviation",
    claim=CLAIM,
    source=Source(
        title="lipbounds", statement="norm at the centre and integral of the second derivative, derived here"
    ),
    supports=SUPPORTS,
    cost=COST,
    version=4,
)
def deviation(block: Attention, radius: float, *, dense: int = DENSE, gram: bool = True) -> tuple[Tensor, Terms]:
    """The norm of the Jacobian at the centre plus how far the Jacobian can move over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
        gram: whether that norm may come from Gram blocks, too, which takes as long as `sharp`.
    """
    return _sum_of(block, radius, _from_centre(_deviation, dense, gram=gram))


@bound(
    name="sharp_ball.taylor",
    claim=CLAIM,
    source=Source(
        title="lipbounds", statement="norms of the first and second differential at the centre, third over the ball"
    ),
    supports=SUPPORTS,
    cost=COST,
    version=4,
)
def taylor(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """Norms of Jacobian and second differential at the centre, the third differential over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """
    return _sum_of(block, radius, _from_centre(_taylor, dense))


@bound(
    name="sharp_ball",
    claim=CLAIM,
    source=Source(title="lipbounds", statement="least of the bounds on a ball, derived here"),
    supports=SUPPORTS,
    cost=COST,
    version=5,
)
def sharp_ball(block: Attention, radius: float, *, dense: int = DENSE) -> tuple[Tensor, Terms]:
    """The least of Taylor's formula, centre plus deviation, the three joint parts and Theorem 3 over the ball.

    Args:
        block: the attention block.
        radius: of the ball.
        dense: number of entries up to which the Jacobian of a batch item is formed for its norm at the centre.
    """

    def three(wide: Attention, eps: float) -> Parts:
        balls = _Balls(wide, eps, SECOND_WORK)
        centre = _centre_norm(balls, dense)
        values = {} if balls.large else {"taylor": _total(wide, _taylor(balls, centre))}
        return values | {
            "deviation": _total(wide, _deviation(balls, centre)),
            "direct": _total(wide, balls.first[1]),
        }

    values = in_own_units(block.double, radius, three)
    values["theorem_3"] = _known(theorem_3_on_ball(block.double, radius, maps_interval(block.double, radius))[0])
    return _finish(block, torch.stack([*values.values()]).amin(0), values)


def jacobian_change(block: Attention, radius: float) -> Float[Tensor, "*batch"] | None:
    """Upper bound of ||J(X') - J(X)|| over the ball; None where the block is large, or refused for its magnitudes.

    Args:
        block: in float64, without rotary positions and QK-norm.
        radius: eps, Frobenius norm.
    """
    try:  # the registry does the same before it evaluates a bound
        check_range(block, "jacobian_change")
    except InvalidInput:
        return None
    if _is_large(block, PAIRS_WORK):
        return None

    def least(wide: Attention, eps: float) -> Parts:
        balls = _Balls(wide, eps, PAIRS_WORK)
        changes = [part(balls, torch.zeros_like(wide.logits[..., 0, 0, 0])) for part in (_taylor, _deviation)]
        return {"least": torch.minimum(*(_total(wide, change) for change in changes))}

    return in_own_units(block, radius, least)["least"]


def sharp_ball_work(block: Attention) -> int:
    """Floating-point operations of `sharp_ball` for one batch item that do not depend on the radius, at most.

    They are those of the norms of the first and the second differential at the centre, which balls about one input
    share; 0 for a block that is too large for them.

    Args:
        block: the attention block.
    """
    if _is_large(block, SECOND_WORK):
        return 0
    by_pairs = second_work(block)
    return norm_work(block) + (by_pairs if by_pairs <= PAIRS_WORK else rows_work(block))


def _is_large(block: Attention, limit: float) -> bool:
    return second_work(block) > PAIRS_WORK and rows_work(block) > limit


class _Balls:
    """The balls of the radii r_0 = 0, ..., r_K about the input of a block; each tensor has these balls in front."""

    def __init__(self, block: Attention, radius: float, limit: float) -> None:
        self.block, self.radius = block, radius
        self.by_pairs = second_work(block) <= PAIRS_WORK
        self.large = _is_large(block, limit)
        shares = SHELLS_OF_LARGE_BLOCKS if self.large else SHELLS
        sizes = [0.0, *(share * radius for share in shares if radius)]
        radii = torch.tensor(sizes, dtype=torch.float64, device=block.device)
        self.radii = radii.reshape((-1, *[1] * len(block.batch_shape)))
        # Small blocks take as long one by one as together; of large ones all balls may not fit into memory.
        entries = block.logits.numel() * max(block.w_q.shape[-1], block.w_v.shape[-1])
        groups = [radii] if radii.numel() * entries <= TOGETHER else [*radii.split(1)]
        centre = centre_of(block)
        self.groups = [BallThirdDerivative(centre, group) for group in groups]

    @cached_property
    def first(self) -> tuple[Parts, Parts]:
        """The parts at the centre, and over the largest ball."""
        smallest = self.groups[0].first()
        largest = smallest if len(self.groups) == 1 else self.groups[-1].first()
        return {name: part[0] for name, part in smallest.items()}, {name: part[-1] for name, part in largest.items()}

    def second(self) -> Parts:
        """Rates of change of the parts at the centre."""
        return {name: rates[0] for name, rates in self.groups[0].second().items()}

    def above(self, terms: Callable[[BallThirdDerivative], Parts]) -> Parts:
        """What is asked for of the balls above radius 0."""
        groups = self.groups if len(self.groups) == 1 else self.groups[1:]
        found = [terms(group) for group in groups]
        return {name: torch.cat([part[name] for part in found])[1 - self.radii.shape[0] :] for name in found[0]}


def _from_centre(change: Callable[[_Balls, Tensor], Parts], dense: int, *, gram: bool = True) -> Compute:
    """The norm at the centre and what a change over the balls adds to it."""

    def parts(wide: Attention, eps: float) -> Parts:
        balls = _Balls(wide, eps, SECOND_WORK)
        return change(balls, _centre_norm(balls, dense, gram=gram))

    return parts


def _centre_norm(balls: _Balls, dense: int, *, gram: bool = True) -> Tensor:
    """The norm of the Jacobian at the centre."""
    if jacobian_entries(balls.block) <= dense:
        return dense_norm(balls.block)
    value = torch.minimum(_total(balls.block, balls.first[0]), _sum_of_parts(balls.block))
    if not gram or balls.large or not has_gram_norm(balls.block):
        return value
    return torch.minimum(value, _known(inflate(gram_norm(balls.block), 8)))


@cached_per_block
def _sum_of_parts(block: Attention) -> Tensor:
    mixing, query, key = differential_parts(block)
    return _total(block, {"mixing": mixing, "query_part": query, "key_part": key})


def _deviation(balls: _Balls, centre: Tensor) -> Parts:
    """Norm at the centre, and the largest change of each part."""
    parts = {"centre": centre}
    if not balls.radius:
        return parts
    there, here = balls.first
    steps = balls.radii[1:] - balls.radii[:-1]
    for name, rates in balls.above(BallThirdDerivative.second).items():
        moved = inflate((steps * rates).sum(0), 16)
        parts[name] = torch.minimum(_known(moved), _known(here[name] + there[name]))
    return parts


def _taylor(balls: _Balls, centre: Tensor) -> Parts:
    """Norm at the centre, its first change, and what the third differential adds."""
    parts = {"centre": centre}
    if not balls.radius:
        return parts
    second = inflate(_sum(balls.second()), 8)
    if not balls.large and not is_turned(balls.block):
        joint = second_norm(balls.block) if balls.by_pairs else second_norm_by_rows(balls.block)
        second = torch.minimum(_known(second), joint)
    parts["second"] = inflate(balls.radius * second, 8)
    inner, outer = balls.radii[:-1], balls.radii[1:]
    # ((eps - r_(k-1))^2 - (eps - r_k)^2) / 2 without cancellation
    weights = (outer - inner) * (2 * balls.radius - outer - inner) / 2
    parts["third"] = inflate((weights * _sum(balls.above(BallThirdDerivative.third))).sum(0), 32)
    return parts


def _known(value: Tensor) -> Tensor:
    """NaN, which infinite factors make, says no more than infinity does."""
    return torch.where(value.isnan(), torch.inf, value)


def _sum(parts: Parts) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*parts.values())).sum(0)


def _total(block: Attention, parts: Parts) -> Float[Tensor, "*batch"]:
    return _known(inflate(_sum(parts), len(parts) + 8)).expand(block.batch_shape)


def _sum_of(block: Attention, radius: float, parts_of: Compute) -> tuple[Tensor, Terms]:
    """A bound that is the sum of its parts."""

    def parts(wide: Attention, eps: float) -> Parts:
        found = {name: part.expand(wide.batch_shape) for name, part in parts_of(wide, eps).items()}
        return found | {TOTAL: _total(wide, found)}

    found = in_own_units(block.double, radius, parts)
    return _finish(block, found.pop(TOTAL), found)


def _finish(block: Attention, value: Tensor, parts: Parts) -> tuple[Tensor, Terms]:
    return cast_up(value, block.dtype), {f"detail.{name}": part for name, part in parts.items()}
