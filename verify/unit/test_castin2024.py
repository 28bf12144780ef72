"""The bounds on a compact set: formulas by hand, above the truth over the set, in their order."""

from __future__ import annotations

import math

import pytest
import torch

import lipbounds
from lipbounds import UnsupportedAttention
from lipbounds.testing.contract import CHECKS
from verify.unit.blocks import random_block, true_norm


NAMES = ["castin2024.general", "castin2024.triangle", "castin2024.mean_field", "castin2024.mean_field_finite"]


def by_hand(name: str, r: float, n: int) -> float:
    return {
        "castin2024.general": math.sqrt(3) * math.sqrt(r**2 * (4 * n + 1) + n),
        "castin2024.triangle": math.sqrt(n) + r * (1 + math.sqrt(n)),
        "castin2024.mean_field": (1 + 3 * r) * math.exp(2 * r),
        "castin2024.mean_field_finite": math.exp(r) + r + r * math.exp(r),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_worked_by_hand(name: str) -> None:
    """One head: r = ||A|| R^2 with A = s W_Q W_K^T."""
    block, radius = random_block(21, heads=1, biases=False), 0.7
    r = float(torch.linalg.matrix_norm(block.scale_value * block.w_q[0] @ block.w_k[0].mT, 2)) * radius**2
    outer = float(torch.linalg.matrix_norm(block.w_v[0], 2) * torch.linalg.matrix_norm(block.w_o[0], 2))
    expected = outer * by_hand(name, r, block.tokens)
    assert float(lipbounds.get(name)(block, radius=radius).value) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("radius", [0.01, 0.3, 1.0, 3.0])
def test_above_the_truth_at_tokens_on_the_sphere(name: str, radius: float) -> None:
    block = random_block(22, biases=False)
    claimed = lipbounds.get(name)(block, radius=radius).value
    for seed in range(20):
        x = torch.randn(block.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert claimed >= true_norm(block.at(radius * x / x.norm(dim=-1, keepdim=True)))


def test_the_triangle_beats_the_general_form_and_the_finite_mean_field_the_limit() -> None:
    block = random_block(23, biases=False)
    for radius in (0.01, 0.3, 1.0, 2.0):
        general, triangle, limit, finite = (float(lipbounds.get(n)(block, radius=radius).value) for n in NAMES)
        assert triangle <= general
        assert finite <= limit


def test_few_logits_make_the_mean_field_form_free_of_the_number_of_tokens() -> None:
    small = random_block(24, biases=False)
    large = small.at(small.x.repeat(8, 1))
    finite = lipbounds.get("castin2024.mean_field_finite")
    assert finite(small, radius=0.1).value == finite(large, radius=0.1).value
    assert finite(large, radius=0.1).value < lipbounds.get("castin2024.triangle")(large, radius=0.1).value


def test_a_mask_is_refused_by_the_mean_field_forms() -> None:
    """Under a mask P_ij <= e^(2 r) / n is false: a row may see one key."""
    block = random_block(25, causal=True, biases=False)
    with pytest.raises(UnsupportedAttention, match="mask"):
        lipbounds.get("castin2024.mean_field")(block, radius=1.0)


def test_above_the_range_of_a_short_dtype_the_number_is_infinite_and_no_fault() -> None:
    """Found by the verifier: 2e65 in float64, infinity in float32."""
    spec = lipbounds.get("castin2024.mean_field_finite")
    block = random_block(26, biases=False).to(torch.float32)
    radius = 10.0
    assert spec(block.double, radius=radius).value > torch.finfo(torch.float32).max
    assert spec(block, radius=radius).value.isposinf()
    CHECKS["dtype"].function(spec, block, radius=radius, seed=0)


@pytest.mark.parametrize("name", ["w_v", "w_o"])
def test_weights_of_zero_give_zero_where_the_exponential_is_beyond_floats(name: str) -> None:
    """Found by the verifier: 0 * inf."""
    block = random_block(27, biases=False)
    block = block.replace(**{name: torch.zeros_like(getattr(block, name))})
    assert lipbounds.get("castin2024.mean_field")(block, radius=1e4).value == 0
