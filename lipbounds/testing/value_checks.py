"""Is the number on the right side of the truth? The check the others exist to support."""

from __future__ import annotations

from decimal import Decimal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing import oracles
from lipbounds.testing.extended import jacobian_norm_extended
from lipbounds.testing.other_norms import reached_change, reached_norm
from lipbounds.testing.snippet import snippet
from lipbounds.testing.verdict import Refuted, evaluate


DIRECTIONS = 4
NOTHING = 1e-270  # numbers below it may be lost to the range of floats
INSIDE = 1 - 1e-9  # rounding must not push a sampled point out of the ball
LARGEST_SLACK = 1e-6  # relative; beyond it, on ill-conditioned blocks, only 60 digits are believed
GLOBAL_SCALES = (1e-3, 0.1, 1.0, 10.0, 1e3)


def returns(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """Every supported block gets one number >= 0 per batch item, without an error and without NaN."""
    value = evaluate("returns", spec, block, radius, seed)
    if not bool((value >= 0).all()):
        worst = value.min().item()
        raise Refuted(
            f"a norm must be >= 0, got {worst!r}",
            check="returns", spec=spec, block=block, radius=radius, seed=seed, claimed=worst,
        )  # fmt: skip


def finite(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """At an ordinary block the number is finite: infinity is true of everything and says nothing."""
    value = evaluate("finite", spec, block, radius, seed)
    if not bool(value.isfinite().all()):
        raise Refuted(
            "an ordinary block must get a finite number, got inf",
            check="finite", spec=spec, block=block, radius=radius, seed=seed, claimed=float("inf"),
        )  # fmt: skip


def value(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """An upper bound is not below the norm of the Jacobian anywhere in its scope, a lower bound is not above it.

    Upper: `claimed + slack >= truth`, the truth decided by 60-digit arithmetic where float64 is not sure. The slack is
    `oracles.truth_slack`, what rounding to nearest costs a float64 evaluation of the exact constant: about 1e-13 of it,
    and never more than a millionth. Nothing else is tolerated. In other norms, and for the scope `change`, the truth is
    approached from below (lipbounds.testing.other_norms). Lower bounds on a ball are compared at radius 0, where the
    truth is known.

    Raises:
        Refuted: the promise is broken.
    """
    _judge("value", spec, block, radius, seed)


def tight(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """As `value`, at blocks where sharp bounds equal the truth and rounding the wrong way shows at once."""
    _judge("tight", spec, block, radius, seed)


def attack_directions(
    block: Attention, radius: float, generator: torch.Generator
) -> Float[Tensor, "points *batch moving dim"]:
    """Points on the sphere around the moving input at which the norm of the Jacobian tends to be large.

    Random directions and their opposites, all of the radius spent on one token, the direction of the input itself, and
    the combination of the random ones that the differences of the truth point to.
    """
    centre = _moving(block)
    random = torch.randn(DIRECTIONS, *centre.shape, generator=generator, dtype=torch.float64).to(centre.device)
    token = torch.zeros_like(random[:1])
    token[..., int(torch.randint(centre.shape[-2], (), generator=generator)), :] = random[0, ..., 0, :]
    directions = _unit(torch.cat([random, token, centre.unsqueeze(0)]))
    directions = torch.cat([directions, -directions])
    reached = oracles.jacobian_norm(block.double.at(centre + radius * INSIDE * directions))
    count = len(directions) // 2
    weights = (reached[:count] - reached[count:]).unsqueeze(-1).unsqueeze(-1)
    combined = _unit((weights * directions[:count]).sum(0, keepdim=True))
    steps = torch.cat([directions, combined])
    return centre + radius * INSIDE * steps


def _judge(check: str, spec: BoundSpec, block: Attention, radius: float | None, seed: int) -> None:
    lower = spec.claim.kind == "lower"
    if lower and spec.needs_radius:
        radius = 0.0
    claimed = evaluate(check, spec, block, radius, seed).detach()
    if lower:
        _judge_lower(check, spec, block, radius, claimed)
        return
    for points in _points(spec, block, radius, seed):
        if spec.claim.norm != "l2":
            reached, slack = reached_norm(block if points is None else block.double.at(points), spec.claim.norm)
            _judge_reached(check, spec, block, radius, seed, claimed, reached - slack)
        elif spec.claim.scope == "change" and points is not None:
            reached, slack = reached_change(block, points)
            _judge_reached(check, spec, block, radius, seed, claimed, reached - slack)
        else:
            _judge_upper(check, spec, block, radius, claimed, points)


def _points(spec: BoundSpec, block: Attention, radius: float | None, seed: int) -> list[Tensor | None]:
    """Inputs of the scope to try; None stands for the input of the block itself."""
    generator = torch.Generator().manual_seed(seed)
    scope = spec.claim.scope
    if scope == "point":
        return [None]
    centre = _moving(block)
    if scope in ("ball", "change"):
        assert radius is not None  # the spec has checked it
        if radius == 0:
            return [None]
        around = attack_directions(block, radius, generator)
        if scope == "change":  # where the derivative at the centre is largest, the change is large as well
            step = radius * INSIDE * _principal(block)
            around = torch.cat([around, torch.stack([centre + step, centre - step])])
        return [None, around]
    random = torch.randn(DIRECTIONS, *centre.shape, generator=generator, dtype=torch.float64).to(centre.device)
    if scope == "global":
        return [None, torch.cat([scale * random[:2] for scale in GLOBAL_SCALES])]
    assert radius is not None
    tokens = torch.cat([random, centre.unsqueeze(0)])
    length = tokens.norm(dim=-1, keepdim=True)
    sphere = radius * INSIDE * tokens / length.clamp(min=oracles.SMALLEST)
    return [torch.cat([sphere, torch.where(length <= radius * INSIDE, tokens, sphere)])]


def _judge_upper(
    check: str, spec: BoundSpec, block: Attention, radius: float | None, claimed: Tensor, points: Tensor | None
) -> None:
    at = block if points is None else block.double.at(points)
    truth = oracles.jacobian_norm(at)
    if bool((truth <= claimed).all()):
        return
    excess = truth - claimed - torch.minimum(oracles.truth_slack(at), LARGEST_SLACK * truth) / 2
    for flat in excess.flatten().argsort(descending=True).tolist():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat, dtype=torch.int64), excess.shape))
        if not excess[index] > 0:
            return
        own = index if points is None else index[1:]
        claim = claimed[own].item()
        exact = _confirmed(oracles.batch_item(at, index), claim)
        if exact is not None:
            reason = (
                f"the truth must be <= the bound, got the bound {claim!r} and the truth {float(exact)!r}, "
                f"{_times(exact, claim)} times as large"
            )
            point = None if points is None else points[index]
            raise _refuted(check, reason, spec, block, own, radius, claim, float(exact), point)


def _judge_reached(
    check: str, spec: BoundSpec, block: Attention, radius: float | None, seed: int, claimed: Tensor, reached: Tensor
) -> None:
    """Refute a claim below what is reached for sure; `reached` may have one more axis, of points, in front."""
    if not bool((reached > claimed).any()):
        return
    worst = (reached - claimed).flatten().argmax()
    truth, claim = reached.flatten()[worst].item(), claimed.expand_as(reached).flatten()[worst].item()
    raise Refuted(
        f"the truth must be <= the bound, got the bound {claim!r} and a truth of at least {truth!r}",
        check=check, spec=spec, block=block, radius=radius, seed=seed, claimed=claim, reached=truth,
    )  # fmt: skip


def _confirmed(block: Attention, claim: float) -> Decimal | None:
    """The exact norm if it is above the claim by more than the rounding of a float64 evaluation of it, else None."""
    norm, slack = oracles.jacobian_norm(block), oracles.truth_slack(block)
    allowed = Decimal(min(slack.item(), LARGEST_SLACK * norm.item() + NOTHING))
    if Decimal(claim) + allowed < Decimal(norm.item()) - Decimal(slack.item()):  # more than float64 can be wrong about
        return Decimal(norm.item())
    exact = jacobian_norm_extended(block)
    return exact if Decimal(claim) + allowed < exact else None


def _judge_lower(check: str, spec: BoundSpec, block: Attention, radius: float | None, claimed: Tensor) -> None:
    truth = oracles.jacobian_norm(block)
    if bool((claimed <= truth).all()):
        return
    excess = claimed - truth - oracles.truth_slack(block)
    index = tuple(int(i) for i in torch.unravel_index(excess.flatten().argmax(), excess.shape))
    if excess[index] > 0:
        claim, reached = claimed[index].item(), truth[index].item()
        reason = f"a lower bound must be <= the truth, got the bound {claim!r} and the truth {reached!r}"
        raise _refuted(check, reason, spec, block, index, radius, claim, reached)


def _refuted(
    check: str, reason: str, spec: BoundSpec, block: Attention, index: tuple[int, ...], radius: float | None,
    claimed: float, reached: float, point: Tensor | None = None,
) -> Refuted:  # fmt: skip
    """The verdict on one batch item, shown by the item alone if the bound gives the same number there."""
    single = oracles.batch_item(block, index)
    alone = evaluate(check, spec, single, radius).item() == claimed
    return Refuted(
        reason, check=check, spec=spec, block=single if alone else block, radius=radius, claimed=claimed,
        reached=reached, source=snippet(spec, single, radius, point=point) if alone else None,
    )  # fmt: skip


def _moving(block: Attention) -> Tensor:
    """The moving input in float64, with all batch dimensions of the block."""
    moving = block.memory if block.moves == "memory" else block.x
    assert moving is not None  # checked at construction
    return moving.detach().to(torch.float64).expand(*block.batch_shape, *moving.shape[-2:])


def _principal(block: Attention) -> Tensor:
    """The unit direction in which the output moves fastest at the input."""
    rows = torch.linalg.svd(oracles.jacobian(block), full_matrices=False).Vh[..., 0, :]
    return _unit(rows.unflatten(-1, block.moving_input.shape[-2:]))


def _unit(directions: Tensor) -> Tensor:
    length = directions.flatten(-2).norm(dim=-1)[..., None, None]
    return torch.where(length > 0, directions / length.clamp(min=oracles.SMALLEST), 0.0)


def _times(truth: Decimal, claim: float) -> str:
    return f"{float(truth / Decimal(claim)):.6g}" if claim > 0 else "infinitely many"
