"""The ball extension of Theorem 3: equal to the point at radius 0, monotone, above what ascent finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.bounds.yudin2025_ball import logit_radius
from lipbounds.derivatives.rounding.logits import logit_error
from verify.unit.blocks import normed, random_block, true_norm, turned


BALL = lipbounds.get("yudin2025_ball.biased")
POINT = lipbounds.get("yudin2025.biased")
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "one head": {"heads": 1, "biases": False},
    "query": {"memory": random_block(3, n=5).x, "moves": "query"},
    "memory": {"memory": random_block(3, n=5).x, "moves": "memory"},
    "rotary": {"causal": True, **turned(3)},
    "QK-norm": {**turned(3), **normed(2, "all_heads")},
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> lipbounds.Attention:
    return random_block(7, n=3, **CASES[request.param])


def in_ball(block: lipbounds.Attention, radius: float, count: int) -> list[lipbounds.Attention]:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(count, *block.moving_input.shape, generator=generator, dtype=torch.float64)
    steps = radius * steps / steps.flatten(1).norm(dim=1)[:, None, None]
    return [block.at(block.moving_input + step) for step in steps]


def test_equals_the_point_bound_at_radius_zero(block: lipbounds.Attention) -> None:
    torch.testing.assert_close(BALL(block, 0.0).value, POINT(block).value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0])
def test_logits_stay_within_their_radius(block: lipbounds.Attention, radius: float) -> None:
    allowed = logit_radius(block, radius)
    worst = torch.zeros(())
    for moved in in_ball(block, radius, 300):
        change = (moved.logits - block.logits).nan_to_num(0.0).abs()  # -inf - -inf where masked
        worst = torch.maximum(worst, (change / allowed).max())
    assert worst <= 1
    assert worst > 0.2  # within reach of random directions, so not idly large


@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_above_the_truth_in_the_ball_by_ascent(block: lipbounds.Attention, radius: float) -> None:
    bound = BALL(block, radius).value
    centre = block.moving_input
    moving = in_ball(block, radius / 2, 1)[0].moving_input.clone().requires_grad_()
    for _ in range(40):
        reached = true_norm(block.at(moving))
        assert reached <= bound
        (gradient,) = torch.autograd.grad(reached, moving)
        step = moving.detach() + 0.2 * radius * gradient / gradient.norm() - centre
        moving = (centre + step * min(1.0, radius / step.norm().item())).requires_grad_()


def test_grows_with_the_radius(block: lipbounds.Attention) -> None:
    values = torch.stack([BALL(block, radius).value for radius in [0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3]])
    assert (values.diff() >= 0).all()


def test_gradient() -> None:
    block = random_block(8, n=3)
    assert torch.autograd.gradcheck(
        lambda x: BALL(block.at(x), 0.2, grad=True).value, block.x.clone().requires_grad_(), atol=1e-5
    )


def test_logits_whose_rounding_leaves_nothing_of_the_map_give_a_number() -> None:
    """The rounding error of the logits is so large that exp of it is infinite, and hidden keys have P = 0."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    block = Attention(
        x=torch.full((2, 1), -2.5e4, dtype=torch.float64), w_q=one, w_k=one, w_v=one, w_o=one, b_q=2e4 * one[0],
        b_k=2e4 * one[0], scale=1e4, causal=True,
    )  # fmt: skip
    assert logit_error(block).exp().isinf().any()
    value = lipbounds.get("yudin2025_ball.biased")(block, radius=1.0).value
    assert value.isfinite()
    assert value >= true_norm(block)
