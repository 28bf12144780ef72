"""L2 attention: formulas by hand, their order, the lemma behind them, and what is wrong with the refuted one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds import InvalidInput, UnsupportedAttention
from lipbounds.ops.lambert import phi_inverse_upper
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.testing.dense_jacobian import jacobian_norm
from verify.unit.blocks import random_block, true_norm


def block(n: int = 4, *, heads: int = 2, seed: int = 0, size: float = 1.0) -> L2Attention:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return L2Attention(x=draw(n, 4), w_q=size * draw(heads, 4, 2), w_v=draw(heads, 4, 2), w_o=draw(heads, 2, 4))


def value(name: str, at: L2Attention) -> float:
    return float(lipbounds.get(f"kim2021.{name}")(at).value)


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


def row_sum(matrix: Tensor) -> float:
    return max(sum(abs(float(entry)) for entry in row) for row in matrix)


@pytest.mark.parametrize("y", [0, 1, 2, 3, 10, 1000, 10**6, 2**53])
def test_phi_inverse_is_lambert_rounded_up(y: int) -> None:
    from mpmath import mp, mpf

    with mp.workdps(40):
        exact = mp.lambertw(mpf(y) / mp.e).real
        found = mpf(phi_inverse_upper(y))
        assert exact <= found <= exact * (1 + mpf(2) ** -40)


def test_phi_inverse_names_a_mistake() -> None:
    with pytest.raises(InvalidInput, match="y=-1"):
        phi_inverse_upper(-1)


def test_the_formulas_worked_by_hand() -> None:
    """n = 2, so c = W(1/e) = 0.27846454; d = 2, so s = 1/sqrt(2); two heads."""
    at, c, s = block(2), 0.2784645427610738, 2**-0.5
    heads = [(at.w_q[h], at.w_v[h]) for h in range(2)]
    outer = spectral(at.w_o.reshape(4, 4))
    squares = [spectral(q) ** 4 * spectral(v) ** 2 for q, v in heads]
    published = s * math.sqrt(2) * (4 * c + 1) * outer
    assert value("l2", at) == pytest.approx(published * math.sqrt(sum(squares)), rel=1e-12)
    wrong = published * math.sqrt(sum(spectral(q) ** 2 * spectral(v) ** 2 for q, v in heads))
    assert value("l2_recollected", at) == pytest.approx(wrong, rel=1e-12)
    tighter = s * (math.sqrt(1.5) + 4 * c) * outer * math.sqrt(sum(squares))
    assert value("l2_tighter", at) == pytest.approx(tighter, rel=1e-12)
    queries, values = ([f(*head) for head in heads] for f in (
        lambda q, v: row_sum(q) * row_sum(q.T), lambda q, v: row_sum(v.T),
    ))  # fmt: skip
    whole = row_sum(at.w_o.reshape(4, 4).T)
    assert value("linf", at) == pytest.approx((4 * c + s) * whole * max(queries) * max(values), rel=1e-12)
    products = [q * v for q, v in zip(queries, values, strict=True)]
    assert value("linf_tighter", at) == pytest.approx((2 * c * (1 + s) + s) * whole * max(products), rel=1e-12)


def test_ours_are_never_above_the_published_ones() -> None:
    for n in (1, 2, 3, 10, 100):
        assert value("l2_tighter", block(n)) <= value("l2", block(n))
        assert value("linf_tighter", block(n)) <= value("linf", block(n))


def test_one_token_makes_them_equal_to_the_truth() -> None:
    """The map is x -> A x; with one feature every norm is exact."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    at = L2Attention(x=one[0], w_q=3 * one, w_v=2 * one, w_o=-one)
    assert float(jacobian_norm(at, "l2")) == 18.0
    for name in ("l2", "l2_tighter", "linf", "linf_tighter"):
        assert value(name, at) == pytest.approx(18.0, rel=1e-12)
        assert value(name, at) >= 18.0


def test_the_lemma_and_the_entries_of_the_map() -> None:
    """sum_j P_ij s |q_i - q_j|^2 <= c, reached where all others are at distance c + 1; P_ij <= 1/2 off the diagonal."""
    n = 5
    c = phi_inverse_upper(n - 1)
    for size in (0.1, 0.5, 1.0, 2.0):
        at = block(n, heads=1, size=size)
        q = at.x @ at.w_q[0]
        squares = at.scale * (q.unsqueeze(0) - q.unsqueeze(1)).square().sum(-1)
        maps = (-squares).softmax(-1)
        assert ((maps * squares).sum(-1) <= c).all()
        assert (maps - maps.diagonal().diag() <= 0.5).all()
    logits = torch.tensor([0.0] + [-(c + 1)] * (n - 1), dtype=torch.float64)
    assert float(-(logits.softmax(-1) * logits).sum()) == pytest.approx(c, rel=1e-12)


def test_the_recollected_constant_is_too_small_by_the_norm_of_w_q() -> None:
    """One token, one feature: the truth is w_q^2 and the formula says w_q (a ratio of 5.1 was seen)."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for size in (2.0, 5.1, 1000.0):
        at = L2Attention(x=one[0], w_q=size * one, w_v=one, w_o=one)
        assert float(jacobian_norm(at, "l2")) / value("l2_recollected", at) == pytest.approx(size, rel=1e-9)
        assert value("l2", at) >= float(jacobian_norm(at, "l2"))


def test_certvit_by_hand_and_for_one_head_only() -> None:
    at = block(3, heads=1)
    c = phi_inverse_upper(3)
    by_hand = math.sqrt(3 / math.sqrt(2) ** 2) * (4 * c + 1) * math.sqrt(spectral(at.w_q[0]) + spectral(at.w_v[0]))
    spec = lipbounds.get("certvit2023.l2")
    assert float(spec(at).value) == pytest.approx(by_hand * spectral(at.w_o[0]), rel=1e-12)
    with pytest.raises(UnsupportedAttention, match="more than one head"):
        spec(block(3))


def test_dot_product_attention_on_bounded_tokens() -> None:
    """By hand for one head; above the truth on the sphere, also under a causal mask; below castin2024.triangle."""
    spec = lipbounds.get("kim2021.dot_product_compact")
    single, radius = random_block(31, heads=1, biases=False), 0.7
    r = spectral(single.scale_value * single.w_q[0] @ single.w_k[0].mT) * radius**2
    by_hand = spectral(single.w_v[0]) * spectral(single.w_o[0]) * (r + math.sqrt(4 * (1 + r**2)))
    assert float(spec(single, radius=radius).value) == pytest.approx(by_hand, rel=1e-12)
    causal = random_block(32, biases=False, causal=True)
    for radius in (0.1, 1.0, 3.0):
        claimed = spec(causal, radius=radius).value
        assert claimed <= lipbounds.get("castin2024.triangle")(causal, radius=radius).value
        for seed in range(10):
            x = torch.randn(causal.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            assert claimed >= true_norm(causal.at(radius * x / x.norm(dim=-1, keepdim=True)))
