"""Statistics of attention maps against their formulas, at rows where subtraction would lose all digits, and masked."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from lipbounds.errors import InvalidInput
from lipbounds.ops.attention_statistics import row_statistics, sink_shares


def logits(spread: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (spread * torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_agree_with_the_formulas(dtype: torch.dtype) -> None:
    given = logits(dtype=dtype)
    found = row_statistics(given)
    p = given.double().softmax(-1)
    first, second = p.topk(2, -1).values.unbind(-1)
    expected = {
        "g_1": first * (1 - first + second),
        "largest": first,
        "entropy": -(p * p.log()).sum(-1),
        "to_uniform": (p - 1 / 7).abs().sum(-1) / 2,
        "to_one_hot": 1 - first,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value.to(dtype), msg=name)
    assert (found.keys == 7).all()
    assert (found.g_1 >= expected["g_1"].to(dtype) * (1 - 1e-12)).all()


def test_a_row_that_is_one_hot_to_all_digits_keeps_its_digits() -> None:
    """1 - p_(1) is 0 in float64 here, and p log p of the largest entry cancels."""
    gap = 60.0
    found = row_statistics(torch.tensor([[0.0, -gap, -gap]], dtype=torch.float64))
    with mpmath.workdps(60):
        tail = mpmath.exp(-gap)
        total = 1 + 2 * tail
        to_one_hot = 2 * tail / total
        entropy = mpmath.log(total) + 2 * tail / total * gap
    assert found.to_one_hot.item() == pytest.approx(float(to_one_hot), rel=1e-12)
    assert found.entropy.item() == pytest.approx(float(entropy), rel=1e-12)
    assert found.g_1.item() == pytest.approx(float(3 * tail), rel=1e-12)


def test_masked_keys_count_nowhere() -> None:
    given = logits()
    masked = torch.cat([given, torch.full((3, 5, 2), -torch.inf, dtype=given.dtype)], -1)
    for name in ("g_1", "largest", "entropy", "to_uniform", "to_one_hot", "keys"):
        torch.testing.assert_close(
            getattr(row_statistics(masked), name), getattr(row_statistics(given), name), rtol=1e-12, atol=1e-14
        )
    single = row_statistics(torch.tensor([[0.3, -torch.inf]]))
    assert (single.entropy, single.to_uniform, single.to_one_hot, single.largest) == (0, 0, 0, 1)


def test_the_ends_of_the_table() -> None:
    uniform = row_statistics(torch.zeros(1, 4, dtype=torch.float64))
    assert uniform.g_1.item() == pytest.approx(1 / 4)
    assert uniform.entropy.item() == pytest.approx(math.log(4))
    assert (uniform.to_uniform.item(), uniform.to_one_hot.item()) == (0, 0.75)
    half = row_statistics(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]))
    assert half.g_1.item() == pytest.approx(1 / 2)


def test_sinks() -> None:
    given = logits()
    given[1, :, 4] += 50
    found = sink_shares(given)
    columns = given.softmax(-1).mean(-2)
    torch.testing.assert_close(found.most_attended, columns.amax(-1))
    torch.testing.assert_close(found.first, columns[:, 0])
    assert found.position[1] == 4
    assert found.most_attended[1] > 0.999


@pytest.mark.parametrize("function", [row_statistics, sink_shares])
def test_rows_without_a_key_are_refused(function) -> None:
    with pytest.raises(InvalidInput, match="finite logit"):
        function(torch.full((2, 3), -torch.inf))
