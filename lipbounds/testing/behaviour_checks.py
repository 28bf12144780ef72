"""How a bound behaves beyond one number: what it refuses, its gradient, its growth with the radius."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.errors import UnsupportedAttention
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing.relation_checks import SAME, rounding_room, uncancelled
from lipbounds.testing.value_checks import value as value_check
from lipbounds.testing.verdict import Refuted, evaluate


STEP = 1e-6  # of the finite differences, relative to the size of the input
KINK = 1e-4  # one-sided differences further apart than this, relative to value / input, mean a kink in between
ROOT = 2.0**-23  # of a slack of order 2^-46: relative to a Jacobian in which nothing cancels
GROWTH = (0.0, 1e-3, 0.25, 1.0, 1.5, 8.0)


def unsupported(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """A block with a feature that the bound does not cover raises UnsupportedAttention."""
    missing = spec.missing_features(block)
    if not missing:
        return
    try:
        found = repr(spec(block, radius).value.tolist())
    except UnsupportedAttention:
        return
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    raise Refuted(
        f"a block with {missing}, which the bound does not support, must raise UnsupportedAttention, got {found}",
        check="unsupported", spec=spec, block=block, radius=radius, seed=seed,
    )  # fmt: skip


def gradient(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """Where the value has a gradient for the moving input, it is that of finite differences; kinks are left out.

    A value without a gradient passes: being differentiable is no promise of `BoundSpec`. Neither is a gradient of the
    slack that pays for rounding, so where a value is nothing but slack any slope of that size passes, and where
    rounding may move more of a value than a kink is told by, any finite slope does: with QK-norm in front of few
    features, the Jacobian may be what is left of terms thousands of times as large. Where pieces of a minimum touch at
    this very point, one of them with a kink there, differences do not see it, but the gradients next to the point agree
    with them.
    """
    moving = block.moving_input.detach()
    direction = torch.randn(moving.shape, generator=torch.Generator().manual_seed(seed), dtype=moving.dtype).to(moving)
    direction = direction / direction.norm()

    def slope_at(shift: float) -> tuple[Tensor, float] | None:
        tracked = (moving + shift * direction).requires_grad_()
        with torch.enable_grad():
            values = evaluate("gradient", spec, block.at(tracked), radius, seed)
            if not values.requires_grad:
                return None
            (slope,) = torch.autograd.grad(values.sum(), tracked)
        return values.detach(), float((slope * direction).sum())

    found = slope_at(0.0)
    if found is None:
        return
    values, got = found
    size = float(moving.norm()) or 1.0
    step = STEP * size

    def at(shift: float) -> float:
        return evaluate("gradient", spec, block.at(moving + shift * direction), radius, seed).sum().item()

    middle, ahead, behind = at(0.0), at(step), at(-step)
    right, left = (ahead - middle) / step, (middle - behind) / step
    natural = abs(middle) / size + abs(right)
    if abs(right - left) > KINK * natural:
        return
    expected = (right + left) / 2
    room = rounding_room(block.double, values)
    slack = float((room + ROOT * uncancelled(block.double)[1]).sum()) / size
    blurred = bool(((values > 0) & (room > KINK * values)).all())
    allowed = float("inf") if blurred else 4 * KINK * natural + slack
    if abs(expected - got) <= allowed:
        return
    beside = [slope_at(shift) for shift in (-step, step)]
    if not all(near is not None and abs(expected - near[1]) <= allowed for near in beside):
        raise Refuted(
            f"the gradient must be that of finite differences, got {got!r} and {expected!r} along a random direction",
            check="gradient", spec=spec, block=block, radius=radius, seed=seed, claimed=got, reached=expected,
        )  # fmt: skip


def monotone(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """A bound on a ball does not fall as the radius grows, and at radius 0 it is not below the truth at the centre."""
    assert radius is not None  # only bounds on a ball are checked
    value_check(spec, block, 0.0, seed)
    before: Tensor | None = None
    for factor in GROWTH:
        now = evaluate("monotone", spec, block, radius * factor, seed).detach()
        if before is not None:
            _check_growth(spec, block, radius, seed, before, now)
        before = now


def _check_growth(spec: BoundSpec, block: Attention, radius: float, seed: int, before: Tensor, now: Tensor) -> None:
    room = rounding_room(block.double, before) + SAME * before
    fall = torch.where(before == now, -1.0, before - now - room)
    if not bool((fall <= 0).all()):
        worst = fall.flatten().argmax()
        claimed, reached = now.flatten()[worst].item(), before.flatten()[worst].item()
        raise Refuted(
            f"the bound on a larger ball must not be smaller, got {claimed!r} after {reached!r} at a smaller radius",
            check="monotone", spec=spec, block=block, radius=radius, seed=seed, claimed=claimed, reached=reached,
        )  # fmt: skip
