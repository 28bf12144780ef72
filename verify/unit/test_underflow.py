"""Products of factors of very different size: no tiny factor is lost before a huge one multiplies it."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.rounding import SMALLEST_NORMAL, product


# Logarithms to base 2 of x, W_Q, the memory, W_V, W_O and the scale; W_K makes the two keys `gap` apart in the logits.
CORNERS = {
    "tiny scale, one-hot row": (45, 27, 67, 190, 199, -199, 700.0),
    "tiny scale, weights below the smallest float": (-71, 73, 162, 109, 150, -199, 800.0),
    "tiny queries": (-199, -100, 190, 199, 199, 199, 690.0),
    "tiny values first": (60, 60, 60, -199, 199, -100, 650.0),
    "large scale": (-150, -150, 190, 199, 100, 199, 720.0),
}
POINT = [
    s.name
    for s in lipbounds.select(kind="proved", scope="point", role="bound")
    if "cross" in s.supports and s.claim.norm in ("l2", "token")
]
NAMES = [*POINT, "yudin2025_ball.biased", "sharp_ball.direct", "sharp_ball"]


def _corner(name: str) -> tuple[Attention, Decimal]:
    """One query between two keys: dY/dX = s W_Q W_K dm W_V dm W_O p (1 - p), the two tokens dm apart."""
    x, w_q, memory, w_v, w_o, scale, gap = CORNERS[name]
    w_k = round(math.log2(gap)) - (x + w_q + memory + scale)
    tokens = torch.tensor([[0.5], [-0.5]], dtype=torch.float64) * 2.0**memory
    entry = {"w_q": 2.0**w_q, "w_k": gap * 2.0 ** (w_k - round(math.log2(gap))), "w_v": 2.0**w_v, "w_o": 2.0**w_o}
    weights = {key: torch.full((1, 1, 1), value, dtype=torch.float64) for key, value in entry.items()}
    query = torch.full((1, 1), 2.0**x, dtype=torch.float64)
    block = Attention(x=query, memory=tokens, moves="query", scale=2.0**scale, **weights)
    with localcontext() as context:
        context.prec = 50
        apart = Decimal(2.0**memory)
        slope = Decimal(2.0**scale) * Decimal(entry["w_q"]) * Decimal(entry["w_k"]) * apart
        weight = (-slope * Decimal(2.0**x)).exp()
        truth = slope * apart * Decimal(entry["w_v"]) * Decimal(entry["w_o"]) * weight / (1 + weight) ** 2
    return block, truth


@pytest.mark.parametrize("corner", CORNERS)
@pytest.mark.parametrize("name", NAMES)
def test_no_product_of_a_bound_underflows(name: str, corner: str) -> None:
    block, truth = _corner(corner)
    bound = lipbounds.get(name)
    claimed = bound(block, 0.0 if bound.needs_radius else None).value.item()
    assert truth > Decimal("1e-300")  # a float: what is to be reached
    assert claimed >= float(truth) * (1 - 1e-12)


def test_product_is_exact_powers_of_two_apart() -> None:
    a, b, c = (torch.tensor([value], dtype=torch.float64) for value in (3.0 * 2.0**-1000, 5.0 * 2.0**-900, 7.0))
    huge = torch.tensor([2.0**1000], dtype=torch.float64)
    assert product(a, b, huge, huge, c).item() == 105.0 * 2.0**100
    assert product(huge, huge, a, a).item() == 9.0
    assert product(huge, huge).item() == math.inf
    assert product(a, a).item() == SMALLEST_NORMAL  # positive, below all floats, and rounded up
    assert product(0 * a, huge / 0, huge).item() == 0.0
    assert product(huge / 0, a, b).item() == math.inf
    assert product(c, 0.5).item() == 3.5


def test_product_is_that_of_floats_bit_by_bit_and_has_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.rand(50, generator=generator, dtype=torch.float64) * 10.0**k for k in (-8, 0, 5)]
    assert torch.equal(product(*factors), factors[0] * factors[1] * factors[2])
    assert torch.autograd.gradcheck(product, [(factor[:4] + 0.1).requires_grad_() for factor in factors])
