"""Theorem 3 against its formula worked by hand, the truth, and the cases it must refuse."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds import Attention, UnsupportedAttention
from verify.unit.blocks import random_block, true_norm


LITERAL = ["theorem3", "theorem3_exact", "theorem3_half", "theorem3_one"]
BIASED = ["biased", "biased_exact", "biased_half", "biased_one"]


def norm(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def g_1(p: torch.Tensor) -> torch.Tensor:
    top = p.sort(-1, descending=True).values
    return (top[..., 0] * (1 - top[..., 0] + top[..., 1])).amax(-1)


def test_theorem_3_equals_the_printed_formula() -> None:
    block = random_block(heads=1, biases=False, w_o=torch.eye(6, dtype=torch.float64)[None])
    x, w_q, w_k, w_v, p = block.x, block.w_q[0], block.w_k[0], block.w_v[0], block.probabilities[0]
    a = w_q @ w_k.mT / 6**0.5
    expected = norm(w_v) * (norm(p) + 2 * norm(x) ** 2 * norm(a) * g_1(p))
    assert lipbounds.get("yudin2025.theorem3")(block).value.item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_biased_form_equals_its_formula_by_hand() -> None:
    block = random_block(causal=True)
    total = torch.zeros((), dtype=torch.float64)
    for h in range(2):
        q, k, v, p = block.queries[h], block.keys[h], block.values[h], block.probabilities[h]
        change = norm(k @ block.w_q[h].mT) + norm(q @ block.w_k[h].mT)
        total += (norm(block.w_v[h]) * norm(p) + norm(v) * g_1(p) * change / 3**0.5) ** 2
    expected = norm(block.w_o.reshape(6, 6)) * total.sqrt()
    assert lipbounds.get("yudin2025.biased")(block).value.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("name", LITERAL)
def test_the_literal_theorem_refuses_biases_and_cross_attention(name: str) -> None:
    bound = lipbounds.get(f"yudin2025.{name}")
    with pytest.raises(UnsupportedAttention, match="biases"):
        bound(random_block())
    cross = random_block(biases=False, memory=random_block().x, moves="query")
    with pytest.raises(UnsupportedAttention, match="cross"):
        bound(cross)


def test_the_literal_theorem_is_indeed_no_bound_with_biases() -> None:
    """Why it refuses: two tokens, one feature and a query bias put the printed formula 16 % below the truth."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    x = torch.tensor([[0.05], [-0.05]], dtype=torch.float64)
    block = Attention(x=x, w_q=one, w_k=one, w_v=one, w_o=one, b_q=torch.full((1, 1), 10.0, dtype=torch.float64))
    p = block.probabilities[0]
    printed = norm(p) + 2 * norm(x) ** 2 * g_1(p)
    assert printed < 0.85 * true_norm(block)
    assert lipbounds.get("yudin2025.biased")(block).value >= true_norm(block)


@pytest.mark.parametrize("name", [*LITERAL, *BIASED])
@pytest.mark.parametrize("gain", [1e-3, 1.0, 20.0])
def test_above_the_truth_and_ordered(name: str, gain: float) -> None:
    block = random_block(1, biases=False)
    block = block.replace(w_q=gain * block.w_q)
    assert lipbounds.get(f"yudin2025.{name}")(block).value >= true_norm(block)
    family = LITERAL if name in LITERAL else BIASED
    values = [lipbounds.get(f"yudin2025.{member}")(block).value.item() for member in family]
    g, exact, half, one = values
    assert exact <= g * (1 + 1e-9)
    assert g <= half * (1 + 1e-9) < one


@pytest.mark.parametrize("moves", ["query", "memory"])
def test_cross_attention(moves: str) -> None:
    block = random_block(2, memory=random_block(3, n=7).x, moves=moves)
    assert lipbounds.get("yudin2025.biased")(block).value >= true_norm(block)


@pytest.mark.parametrize("name", BIASED)
def test_gradient_and_batches(name: str) -> None:
    bound = lipbounds.get(f"yudin2025.{name}")
    block = random_block(4, n=3)
    assert torch.autograd.gradcheck(
        lambda x: bound(block.at(x), grad=True).value, block.x.clone().requires_grad_(), atol=1e-5
    )
    inputs = torch.stack([random_block(seed, n=3).x for seed in range(3)])
    together = bound(block.at(inputs)).value
    torch.testing.assert_close(together, torch.stack([bound(block.at(x)).value for x in inputs]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_blocks_are_rounded_up(dtype: torch.dtype) -> None:
    block = random_block(5).to(dtype)
    biased = lipbounds.get("yudin2025.biased")
    result, wide = biased(block, precision="float64"), biased(block.double).value
    assert result.value.dtype == dtype
    assert wide <= result.value.double() <= wide * (1 + 2 * torch.finfo(dtype).eps)
    assert wide <= biased(block).value.double() <= wide * (1.05 + 2 * torch.finfo(dtype).eps)  # in float32 where it can
