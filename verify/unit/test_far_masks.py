"""Masks of very negative numbers, as models write them for -inf: hidden keys, and no doubt about the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds import Attention
from lipbounds.derivatives.ball.log_odds import maps_interval
from lipbounds.derivatives.rounding.logits import key_logit_error, logit_error
from verify.unit.blocks import normed, random_block, true_norm, turned


FLOATS = [torch.float32, torch.float64]
FUTURE = torch.ones(4, 4, dtype=torch.bool).triu(1)


def masked(number: float, hidden: Tensor = FUTURE, **fields: Any) -> Attention:
    bias = torch.zeros(4, 4, dtype=torch.float64).masked_fill(hidden, number)
    return random_block(1, logit_bias=bias, **fields)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fields", [{}, {**turned(4), **normed(2)}], ids=["plain", "normed"])
def test_the_most_negative_float_hides_a_key_as_minus_infinity_does(dtype: Any, fields: dict[str, Any]) -> None:
    block, hidden = masked(torch.finfo(dtype).min, **fields), masked(-torch.inf, **fields)
    for name in ("sharp", "sharp_fast", "yudin2025.biased", "covariance.exact"):
        one, other = (lipbounds.get(name)(each).value.item() for each in (block, hidden))
        assert one == pytest.approx(other, rel=1e-9), name
    one, other = (lipbounds.get("sharp_ball")(each, 0.01).value.item() for each in (block, hidden))
    assert other * (1 - 1e-9) <= one <= 1.05 * other


def test_a_row_that_is_hidden_as_a_whole_is_as_uncertain_as_its_logits() -> None:
    """Its keys are as near to each other as ever, and their logits are rounded to multiples of 10^22."""
    rows = torch.zeros(4, 4, dtype=torch.bool)
    rows[2] = True
    block = masked(torch.finfo(torch.float32).min, rows)
    assert bool((logit_error(block)[:, 2] > 1e22).all())
    assert bool((logit_error(block)[:, [0, 1, 3]] < 1e-9).all())
    assert lipbounds.get("sharp")(block).value >= true_norm(block)


@pytest.mark.parametrize("moves", [0.5, 1.0, 2.0])
def test_a_key_that_the_ball_brings_back_is_in_the_interval(moves: float) -> None:
    """One query, two keys, one of them 2^44 below: no key of weight 0 once the token has moved by that much."""
    far, steep = 2.0**44, 2.0**30
    eye = torch.eye(2, dtype=torch.float64)
    block = Attention(
        x=torch.zeros(1, 2, dtype=torch.float64), memory=eye, moves="query", w_q=steep * eye[None], w_k=eye[None],
        w_v=eye[None], w_o=eye[None], scale=1.0, logit_bias=torch.tensor([[0.0, -far]], dtype=torch.float64),
    )  # fmt: skip
    assert logit_error(block).max() < 1e-3
    assert (key_logit_error(block)[0, 0] > 1e-4).tolist() == [False, True]
    radius = moves * far / steep / 2**0.5
    interval = maps_interval(block, radius)
    for share in torch.linspace(0, 1, 65).tolist():
        step = share * radius / 2**0.5
        maps = block.at(torch.tensor([[-step, step]], dtype=torch.float64)).probabilities
        assert bool((maps <= interval.upper).all())
        assert bool((maps >= interval.lower).all())
    assert (interval.upper[0, 0, 1] > 0.5) == (moves >= 1)
