"""qi2023, nair2025 and dasoulas2021: formulas by hand, their order, and what makes the constants necessary."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds.targets.cosine_attention import CosineAttention
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention
from lipbounds.testing.dense_jacobian import jacobian_norm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(n: int = 4, tau: float = 2.0, eps: float = 0.25) -> CosineAttention:
    weights = {"w_q": draw(3, 2, seed=1), "w_k": draw(3, 2, seed=2), "w_v": draw(3, 5, seed=3)}
    return CosineAttention(x=draw(n, 3), **weights, scale=tau, output_scale=0.5, eps=eps)


def by_hand(name: str, n: int, tau: float, q: float, k: float, v: float) -> float:
    """Without the factor nu / sqrt(eps)."""
    g = n / (1 + (n - 1) * math.exp(-2 * tau))
    return {
        "qi2023.theorem1": 2 * n * (n - 1) * tau * k + 2 * (n - 1) * tau * q + 2 * n * v,
        "nair2025.theorem2": n**2 * tau * k + n * tau * q + 2 * n * v,
        "nair2025.half": n / 2 * tau * (q + k) + math.sqrt(n) * v,
        "nair2025.covariance": tau * q + math.sqrt(g) * (tau * k + v),
    }[name]


COSINE = ["qi2023.theorem1", "nair2025.theorem2", "nair2025.half", "nair2025.covariance"]


@pytest.mark.parametrize("name", COSINE)
def test_the_formula_worked_by_hand(name: str) -> None:
    block = cosine()
    norms = [float(torch.linalg.svdvals(weights)[0]) for weights in (block.w_q, block.w_k, block.w_v)]
    expected = 0.5 / math.sqrt(0.25) * by_hand(name, 4, 2.0, *norms)
    assert float(lipbounds.get(name)(block).value) == pytest.approx(expected, rel=1e-12)


def test_ours_are_below_the_published_ones_and_the_covariance_form_below_one_half() -> None:
    for n in (1, 2, 4, 16, 100):
        qi, nair, half, covariance = (float(lipbounds.get(name)(cosine(n)).value) for name in COSINE)
        assert half <= nair
        assert covariance <= nair
        if n >= 4:
            assert covariance <= half
        if n >= 2:
            assert covariance <= qi


def test_one_short_token_makes_the_constant_of_order_one_over_root_eps() -> None:
    """Scaling a token towards zero raises the norm until eps stops it, so no constant without eps can hold."""
    truths = []
    for eps in (1e-2, 1e-4, 1e-6):
        block = cosine(2, tau=1.0, eps=eps)
        x = torch.cat([1e-6 * block.x[:1], block.x[1:]])
        truths.append(float(jacobian_norm(block.at(x), "l2")))
    assert truths[1] == pytest.approx(10 * truths[0], rel=0.2)
    assert truths[2] == pytest.approx(10 * truths[1], rel=0.2)


def lipschitz_norm(m: int, n: int, sizes: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> LipschitzNormAttention:
    q, k, v = sizes
    return LipschitzNormAttention(queries=q * draw(m, 2), keys=k * draw(n, 2, seed=1), values=v * draw(n, 3, seed=2))


@pytest.mark.parametrize(("m", "n"), [(1, 4), (4, 4), (6, 3), (3, 8), (8, 2), (1, 1)])
def test_lipschitz_norm_by_hand_and_above_the_truth(m: int, n: int) -> None:
    block = lipschitz_norm(m, n)
    g = m / (1 + (n - 1) * math.exp(-2))
    recollected, tighter = (lipbounds.get(f"dasoulas2021.{name}")(block).value for name in ("recollected", "tighter"))
    assert float(recollected) == pytest.approx(math.exp(math.sqrt(3)) * math.sqrt(m / n) + 2 * math.sqrt(6), rel=1e-12)
    assert float(tighter) == pytest.approx(max(math.sqrt(8 + g), math.sqrt(5 + (1 + math.sqrt(g)) ** 2)), rel=1e-12)
    assert tighter <= recollected
    # Each of the three products is the largest in turn.
    for sizes in ((1.0, 1.0, 1.0), (3.0, 3.0, 0.1), (3.0, 0.1, 3.0), (0.1, 3.0, 3.0)):
        assert jacobian_norm(lipschitz_norm(m, n, sizes), "l2") <= tighter


def test_lipschitz_norm_knows_no_scale() -> None:
    """Scores do not change when Q, K and V grow together, so neither does the Jacobian."""
    small, large = lipschitz_norm(3, 4), lipschitz_norm(3, 4, (1e3, 1e3, 1e3))
    assert float(jacobian_norm(small, "l2")) == pytest.approx(float(jacobian_norm(large, "l2")), rel=1e-12)
