"""Published bounds worked by hand at one head, their order, and where they are sharp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds import Attention, UnsupportedAttention
from lipbounds.testing.oracles import attention_output
from verify.unit.blocks import random_block


RADIUS = 0.3


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def block_without_biases() -> Attention:
    return random_block(41, heads=1, biases=False)


def parts(block: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Tokens, the weights of the head, and the scale."""
    return block.x, block.w_q[0], block.w_k[0], block.w_v[0], block.w_o[0], block.scale_value


def theta(row: Tensor) -> Tensor:
    """4 m (1 - m) for the subset of mass closest to 1/2, by enumeration."""
    subsets = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(row))
    mass = subsets @ row
    return (4 * mass * (1 - mass)).max()


def by_hand(name: str, block: Attention) -> Tensor:
    x, w_q, w_k, w_v, w_o, s = parts(block)
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    maps = (s * q @ k.mT).softmax(-1)
    n = len(x)
    logits = norm(k @ w_q.mT) + norm(q @ w_k.mT) + RADIUS * norm(w_q @ w_k.mT)
    if name == "hu2024.printed":
        return n * (n + 1) * (x.norm() + RADIUS) ** 2 * norm(w_v) * (norm(w_q) * norm(w_k) + 1) * norm(w_o)
    if name == "hu2024.ball":
        return norm(w_v) * norm(w_o) * (n**0.5 + s * norm(w_q) * norm(w_k) * (norm(x) + RADIUS) ** 2)
    if name == "havens2024.change":
        mixing = torch.minimum(norm(maps) * norm(w_v @ w_o), norm(w_o) * norm(maps) * norm(w_v))
        return mixing + s / 2 * logits * (norm(v @ w_o) + RADIUS * norm(w_v @ w_o))
    if name == "centred.change":
        logits = norm((k - k.mean(0)) @ w_q.mT) + norm(q @ w_k.mT) + RADIUS * norm(w_q @ w_k.mT)
        values = norm(v - v.mean(0)) + RADIUS * norm(w_v)
        return norm(w_o) * (norm(w_v) * norm(maps) + s / 2 * logits * values)
    if name == "newhouse2025.composed":
        return norm(w_v) * norm(w_o) * (1 + 2 * s * norm(w_q) * norm(w_k) * RADIUS**2)
    if name == "newhouse2025.as_coded":
        return norm(w_v) * norm(w_o) * s * (1 + 2 * norm(w_q) * norm(w_k) * RADIUS**2)
    if name == "vuckovic2020.w1":
        r = s * norm(w_q @ w_k.mT) * RADIUS**2
        return norm(w_v @ w_o) * (r + (1 + 2 * r) * (2 * r).exp())
    mass = torch.stack([theta(row) for row in maps])
    moves = (k @ w_q.mT).norm(dim=-1).max() + (q @ w_k.mT).norm(dim=-1)
    if name == "emadi2026.balanced_mass":
        return norm(w_o) * (norm(w_v) + s * (mass * moves).max() * v.norm(dim=-1).max())
    assert name == "covariance_token.exact"
    rows = []
    for i, row in enumerate(maps):
        jacobian = torch.diag(row) - torch.outer(row, row)
        spread = norm(v.mT @ jacobian @ v).sqrt()
        rows.append(norm(w_v) + s * norm(v.mT @ jacobian @ k @ w_q.mT) + s * (w_k @ q[i]).norm() * spread)
    return norm(w_o) * torch.stack(rows).max()


NAMES = [
    "hu2024.printed", "hu2024.ball", "havens2024.change", "centred.change", "newhouse2025.composed",
    "newhouse2025.as_coded", "vuckovic2020.w1", "emadi2026.balanced_mass", "covariance_token.exact",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_worked_by_hand(name: str) -> None:
    block, spec = block_without_biases(), lipbounds.get(name)
    value = spec(block, radius=RADIUS if spec.needs_radius else None).value
    torch.testing.assert_close(value, by_hand(name, block), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["havens2024.change", "centred.change"])
@pytest.mark.parametrize("radius", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_no_point_of_the_ball_is_further_away(name: str, radius: float, causal: bool) -> None:
    block = random_block(42, causal=causal)
    claimed = lipbounds.get(name)(block, radius=radius).value
    moves = torch.randn(500, *block.x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moves = radius * moves / moves.flatten(1).norm(dim=-1)[:, None, None]
    points = block.x + moves
    change = attention_output(block.at(points), points) - attention_output(block, block.x)
    assert (change.flatten(1).norm(dim=-1) <= claimed * radius).all()


def test_centring_never_costs_and_pays_for_a_common_offset() -> None:
    plain, centred = lipbounds.get("havens2024.change"), lipbounds.get("centred.change")
    block = random_block(43, heads=1)
    moved = block.at(block.x + 20.0)
    assert centred(moved, radius=RADIUS).value < plain(moved, radius=RADIUS).value / 2


def test_the_corrected_specformer_form_is_above_the_ball_form_of_theorem_3() -> None:
    """It replaces every norm by the product of norms, and g_1 by 1/2."""
    block = block_without_biases()
    for radius in (0.0, 0.1, 1.0):
        refined = lipbounds.get("yudin2025_ball.biased")(block, radius=radius).value
        assert refined <= lipbounds.get("hu2024.ball")(block, radius=radius).value


def test_the_token_forms_are_in_order() -> None:
    """Covariances below the balanced-mass factor below the norms of the weights and the largest token."""
    block = block_without_biases()
    largest = float(block.x.norm(dim=-1).max())
    by_covariance = lipbounds.get("covariance_token.exact")(block).value
    by_mass = lipbounds.get("emadi2026.balanced_mass")(block).value
    by_weights = lipbounds.get("newhouse2025.composed")(block, radius=largest).value
    assert by_covariance <= by_mass <= by_weights


def test_more_of_the_same_tokens_do_not_change_the_token_forms() -> None:
    block = block_without_biases()
    twice = block.at(block.x.repeat(2, 1))
    for name in ("covariance_token.exact", "newhouse2025.composed"):
        spec = lipbounds.get(name)
        radius = RADIUS if spec.needs_radius else None
        torch.testing.assert_close(
            spec(twice, radius=radius).value, spec(block, radius=radius).value, rtol=1e-9, atol=0
        )


@pytest.mark.parametrize("name", ["hu2024.ball", "newhouse2025.composed", "vuckovic2020.w1"])
def test_biases_are_refused_where_the_formula_does_not_know_them(name: str) -> None:
    with pytest.raises(UnsupportedAttention, match="biases"):
        lipbounds.get(name)(random_block(44), radius=1.0)
