"""Queries and keys that rotary positions turn or a norm divides, in the bounds on balls that are formulas of norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds import Attention
from lipbounds.derivatives.ball.turned_products import apart_on_ball, change_from_centre
from lipbounds.derivatives.logit_changes import change_by_queries
from lipbounds.derivatives.rounding.logits import key_error, logit_error, query_error
from verify.unit.blocks import normed, random_block, spectral, turned


CASES: dict[str, dict[str, Any]] = {
    "rotary": turned(4),
    "steep norm": {**turned(4), **normed(2, eps=1e-4)},
    "norm of all heads": normed(2, "all_heads", eps=0.1),
}
RADII = (0.1, 1.0, 10.0)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(5, **CASES[request.param])


def steps(block: Attention, radius: float) -> Tensor:
    """In random directions, and straight to the points where a projected query or key is 0."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(40, *block.x.shape, generator=generator, dtype=torch.float64)
    found = [radius * some / some.flatten(1).norm(dim=1)[:, None, None]]
    for weights, bias in ((block.w_q, block.b_q), (block.w_k, block.b_k)):
        assert bias is not None
        for head in range(block.heads):
            to_zero = -(block.x @ weights[head] + bias[head]) @ torch.linalg.pinv(weights[head])
            each = torch.eye(len(block.x), dtype=torch.float64)[:, :, None] * to_zero
            found += [each * torch.clamp(radius / each.flatten(1).norm(dim=1), max=1.0)[:, None, None] * 0.999]
    return torch.cat(found)


@pytest.mark.parametrize("radius", RADII)
def test_logits_change_by_no_more_from_the_centre(block: Attention, radius: float) -> None:
    allowed = change_from_centre(block, radius, change_by_queries(block)) * block.scale_value
    moved = steps(block, radius)
    at = [block.at(block.x + step) for step in moved]
    change = torch.stack([other.logits - block.logits for other in at]).flatten(-2).norm(dim=-1)
    reached = change / moved.flatten(1).norm(dim=1, keepdim=True) / allowed
    assert reached.max() <= 1
    assert reached.max() > 0.01


@pytest.mark.parametrize("radius", RADII)
def test_products_with_derivatives_stay_below_those_of_norms_apart(block: Attention, radius: float) -> None:
    """The largest || K' d q'_i / d x_i || + || Q' d k'_j / d x_j ||, by automatic differentiation."""
    allowed = apart_on_ball(block, radius)

    def largest(side: str, other: str, at: Attention) -> Tensor:
        rows = torch.func.jacrev(lambda x: getattr(at.replace(x=x), side))(at.x)  # heads, n, d, n, D
        own = rows.diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return spectral(getattr(at, other).unsqueeze(1) @ own).amax(-1)

    for step in steps(block, radius)[::5]:
        at = block.at(block.x + step)
        assert (largest("queries", "keys", at) + largest("keys", "queries", at) <= allowed).all()


@pytest.mark.parametrize("over", ["head", "all_heads"])
def test_a_norm_keeps_bounds_on_large_balls_from_growing_with_its_slope(over: str) -> None:
    """Twice the radius is at most twice the bound, where derivatives are at their largest already."""
    block = random_block(2, biases=False, **normed(2, over, eps=1e-6))
    for name in ("yudin2025_ball.biased", "hu2024.ball", "centred.change", "havens2024.change"):
        one, two = (lipbounds.get(name)(block, radius).value.item() for radius in (100.0, 200.0))
        assert one < two < 2.01 * one, name


@pytest.mark.parametrize("error", [logit_error, query_error, key_error])
def test_what_is_made_for_rounding_keeps_its_graph(error: Any) -> None:
    """The block keeps queries and keys; made without a graph first they would have no gradient later."""
    block = random_block(5, **CASES["steep norm"])
    tracked = block.at(block.x.clone().requires_grad_())
    assert not error(tracked).requires_grad
    assert tracked.queries.requires_grad
    assert tracked.keys.requires_grad
