"""What a search for a counterexample found, judged on the single instance."""

from __future__ import annotations

import dataclasses as dc
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Norm
from lipbounds.errors import InvalidInput
from lipbounds.number_format import counted
from lipbounds.registry import BoundSpec
from lipbounds.rounding import SMALLEST_NORMAL
from lipbounds.targets.attention import Attention
from lipbounds.testing.extended import jacobian_norm_extended
from lipbounds.testing.other_norms import reached_norm


# How far below the truth, relatively, a claim may be before it is refuted. The truth is a 60-digit value from below, so
# the slack is for the bound alone: a float64 formula that equals the truth but is not rounded outwards still passes.
SLACK = 1e-9


@dc.dataclass(frozen=True, kw_only=True, eq=False)
class Falsification:
    """The worst instance a search found: true norm over claimed norm, both evaluated on that one instance.

    Args:
        spec: name of the bound.
        ratio: reached / claimed; above 1 the claim is below the truth.
        block: the unbatched float64 block; for a ball bound at the centre.
        radius: radius of the ball in the Frobenius norm; None for a bound at the point.
        point: the moving input, within the ball, at which the norm is reached; None for a bound at the point.
        claimed: value of the bound.
        reached: ||J v|| / ||v|| in 60 digits at one direction v, in other norms than `l2` a float64 number less its
            rounding: never above the true norm.
        starts: starting points of the search.
        steps: ascent steps done.
        seconds: time the search took.
        seed: of the search.
    """

    spec: str
    ratio: float
    block: Attention
    radius: float | None = None
    point: Float[Tensor, "moving dim"] | None = None
    claimed: float
    reached: float
    starts: int = 0
    steps: int = 0
    seconds: float = 0.0
    seed: int = 0

    @property
    def refuted(self) -> bool:
        """Whether this instance is a counterexample: the claim is below the truth by more than SLACK."""
        return not self.ratio <= 1 + SLACK  # a ratio that is no number is no proof of soundness

    def __repr__(self) -> str:
        verdict = "refuted" if self.refuted else "not refuted"
        sizes = f"n={self.block.tokens}, D={self.block.x.shape[-1]}, H={self.block.heads}"
        ball = "" if self.radius is None else f", radius={self.radius:g}"
        return (
            f"Falsification({self.spec}: {verdict}, true/bound >= {self.ratio:.10g} at {sizes}{ball}, "
            f"{counted(self.starts, 'start')}, {counted(self.steps, 'step')}, {self.seconds:.1f} s, seed {self.seed})"
        )


def judge(
    spec: BoundSpec,
    block: Attention,
    *,
    radius: float | None = None,
    point: Float[Tensor, "moving dim"] | None = None,
) -> Falsification:
    """Evaluate claim and truth on one unbatched instance.

    Args:
        spec: the bound.
        block: unbatched.
        radius: of the ball, for a bound on a ball.
        point: the moving input at which the norm is taken; that of the block if None.

    Raises:
        InvalidInput: `point` is outside the ball, or the block outside the compact set, decided in exact arithmetic;
            the block has batch dimensions.
    """
    if spec.claim.scope == "compact" and radius is not None:
        tokens = block.moving_input
        if any(squared_distance(token, 0 * token) > Fraction(radius) ** 2 for token in tokens):
            raise InvalidInput(f"tokens must have norms of at most radius={radius}; scale them down.")
    if point is not None and (radius is None or squared_distance(point, block.moving_input) > Fraction(radius) ** 2):
        raise InvalidInput(f"point must lie in the ball of radius={radius} around the moving input; scale it inwards.")
    claimed = float(spec(block, *(() if radius is None else (radius,))).value.detach())
    reached = _reached(block if point is None else block.at(point), spec.claim.norm)
    return Falsification(
        spec=spec.name,
        ratio=_ratio(reached, claimed),
        block=block,
        radius=radius,
        point=point,
        claimed=claimed,
        reached=reached,
    )


def _reached(block: Attention, norm: Norm) -> float:
    if norm == "l2":
        return float(jacobian_norm_extended(block))
    value, slack = reached_norm(block, norm)
    return max(0.0, float(value - slack))


def _ratio(reached: float, claimed: float) -> float:
    if reached < SMALLEST_NORMAL:
        return 0.0  # nothing to refute, also where the claim is 0: below it, float64 has lost digits of every formula
    return reached / claimed if claimed > 0 else float("inf")


def squared_distance(first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]) -> Fraction:
    """Squared Frobenius distance of the floats given, exactly."""
    pairs = zip(_flat(first), _flat(second), strict=True)
    return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction(0))


def _flat(tensor: Tensor) -> list[float]:
    return tensor.detach().to(torch.float64).reshape(-1).tolist()
