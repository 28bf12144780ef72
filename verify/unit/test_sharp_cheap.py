"""`sharp_cheap`: each part above its dense counterpart, overlaps and covariances those of their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.derivatives.first.covariance import centred_keys, centred_projection
from lipbounds.derivatives.first.head_rows import GramMatrices, through
from lipbounds.derivatives.first.joint_heads import joint_query, stacked_key
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.derivatives.first.split_mixing import split_mixing
from lipbounds.ops.mixture import mixture_norm_upper
from lipbounds.targets.head_factors import head_factors
from verify.unit.blocks import NAMED, PLAIN, random_block, spectral, true_norm


IDS: dict[str, Any] = {"argvalues": PLAIN, **NAMED}


@pytest.mark.parametrize("case", **IDS)
@pytest.mark.parametrize("gain", [0.0, 0.01, 1.0, 30.0])
def test_above_the_truth(case: str, gain: float) -> None:
    block = random_block(11, **PLAIN[case])
    block = block.replace(w_q=gain * block.w_q)
    assert lipbounds.get("sharp_cheap")(block).value >= true_norm(block) * (1 - 1e-12)


@pytest.mark.parametrize("case", **IDS)
def test_the_mixing_part_is_above_its_norm(case: str) -> None:
    block = random_block(12, **PLAIN[case])
    dense = torch.einsum("hij,hba->iajb", block.probabilities, block.w_v @ block.w_o).flatten(2).flatten(0, 1)
    found = split_mixing(block, block.weight_norms)
    assert spectral(dense) * (1 - 1e-12) <= found.norm <= 3 * spectral(dense)
    apart = torch.kron(found.direction.unsqueeze(-1), torch.eye(6).double())
    assert spectral(dense @ apart) <= found.along
    assert spectral(dense - dense @ apart @ apart.mT) <= found.across


@pytest.mark.parametrize("case", **IDS)
def test_gram_matrices_give_the_norms_of_covariances(case: str) -> None:
    block = random_block(13, **PLAIN[case])
    norms = block.weight_norms
    values = through(*_rows(centred_projection(block.source_input, block.w_v)), norms.factors("w_o"))
    keys = through(*_rows(centred_keys(block)), norms.factors("w_q"))
    grams = GramMatrices(block, values)
    jacobians = (
        torch.diag_embed(block.probabilities) - block.probabilities.unsqueeze(-1) * block.probabilities[..., None, :]
    )
    left = block.values @ block.w_o
    cross = left.mT.unsqueeze(-3) @ jacobians @ (block.keys @ block.w_q.mT).unsqueeze(-3)
    unit = (values.unit * keys.unit).unsqueeze(-1)
    torch.testing.assert_close(grams.cross(keys) * unit, torch.linalg.matrix_norm(cross), rtol=1e-4, atol=1e-4)
    assert (grams.cross(keys) * unit >= spectral(cross) * (1 - 1e-12)).all()
    own = left.mT.unsqueeze(-3) @ jacobians @ left.unsqueeze(-3)
    largest = grams.largest_variance() * values.unit.square().unsqueeze(-1)
    assert (largest >= spectral(own) * (1 - 1e-12)).all()
    assert (largest <= torch.linalg.matrix_norm(own) * (1 + 1e-4) + 1e-4).all()


@pytest.mark.parametrize("case", [case for case in PLAIN if case not in ("query", "memory")])
def test_heads_jointly_are_the_dense_norms(case: str) -> None:
    block = random_block(17, **PLAIN[case])
    parts, maps = OverlapParts(block), block.probabilities
    jacobians = torch.diag_embed(maps) - maps.unsqueeze(-1) * maps[..., None, :]
    through_output = (block.values @ block.w_o).mT.unsqueeze(-3) @ jacobians
    own = through_output @ (block.keys @ block.w_q.mT).unsqueeze(-3)
    exact = torch.linalg.matrix_norm(block.scale_value * own.sum(-4)).amax()
    assert exact * (1 - 1e-12) <= joint_query(parts) <= exact * (1 + 1e-5) + 1e-4
    reach = block.scale_value * block.queries @ block.w_k.mT
    key = torch.einsum("hiaj,hib->iajb", through_output, reach).flatten(2).flatten(0, 1)
    assert spectral(key) * (1 - 1e-12) <= stacked_key(parts)
    rows = (parts.softmax_value_norm * parts.grams.values.unit.unsqueeze(-1)).unsqueeze(-1) * reach
    stacked = spectral(rows.flatten(0, 1)) * block.weight_norms.factors("w_o").jointly
    torch.testing.assert_close(stacked_key(parts), stacked, rtol=1e-5, atol=1e-5)


def test_the_fast_form_takes_the_old_parts_on_small_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(18)
    with_rows = lipbounds.get("sharp_fast")(block).value
    monkeypatch.setattr("lipbounds.bounds.sharp.SMALL", 0)
    without = lipbounds.get("sharp_fast")(random_block(18)).value  # a block keeps its parts
    cheap = lipbounds.get("sharp_cheap")(block).value
    assert true_norm(block) <= lipbounds.get("sharp")(block).value <= with_rows < without <= cheap


def _rows(centred: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return centred.rows, centred.error


@pytest.mark.parametrize("layout", ["whitened", "pairs", "plain"])
def test_factors_give_the_weights_back_and_overlaps_bound_theirs(layout: Any) -> None:
    weights = random_block(14, dim=6, heads=3).w_q * torch.tensor([1e-3, 1.0, 1e3]).double()[:, None, None]
    weights = torch.cat([weights, torch.zeros_like(weights[:1]), weights[:1] * torch.tensor([1.0, 0.0]).double()])
    found = head_factors(weights, layout, 1)
    assert found.overlap is not None
    nothing = torch.eye(2, dtype=torch.float64) * (weights == 0).all(-1).all(-1)[:, None, None]  # L is 0, too
    assert (found.factor[3] == 0).all()
    basis = torch.linalg.solve(found.factor + nothing, weights.mT).mT / found.unit[:, None, None]
    for h in range(5):
        for g in range(5):
            assert found.overlap[h, g] >= spectral(basis[h].mT @ basis[g]) * (1 - 1e-9)
    assert found.jointly >= spectral(basis.transpose(0, 1).flatten(1)) * (1 - 1e-9)
    if layout == "whitened":
        assert found.overlap.diagonal() == pytest.approx([1, 1, 1, 0, 1], abs=1e-4)


def test_a_mixture_is_above_its_norm_and_equal_to_it_for_orthogonal_heads() -> None:
    draw = torch.Generator().manual_seed(1)
    bases = torch.linalg.qr(torch.randn(3, 8, 2, generator=draw, dtype=torch.float64)).Q
    overlap, jointly = spectral(bases.mT.unsqueeze(1) @ bases.unsqueeze(0)), spectral(bases.transpose(0, 1).flatten(1))
    weights = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0], [1e-200, 1e-200, 1.0]]).double()
    exact = spectral(torch.einsum("rh,had,hbd->rab", weights, bases, bases))
    found = mixture_norm_upper(weights, overlap, jointly)
    assert (found >= exact * (1 - 1e-14)).all()
    torch.testing.assert_close(found[1:], exact[1:], rtol=1e-12, atol=0)
    apart = mixture_norm_upper(weights, torch.eye(3).double(), torch.tensor(1.0).double())
    torch.testing.assert_close(apart, weights.amax(-1), rtol=1e-12, atol=0)


def test_heads_that_write_to_the_same_features_add_up_and_others_do_not() -> None:
    """Two equal heads double the bound; two heads in orthogonal features leave it as it is."""
    one = random_block(15, heads=1, dim=6, biases=False)
    assert one.b_o is None
    alone = lipbounds.get("sharp_cheap")(one).value
    fields = {name: getattr(one, name) for name in ("w_q", "w_k", "w_v", "w_o")}
    twice = Attention(x=one.x, **{name: weights.repeat(2, 1, 1) for name, weights in fields.items()})
    torch.testing.assert_close(lipbounds.get("sharp_cheap")(twice).value, 2 * alone, rtol=1e-5, atol=0)
    wide = torch.cat([one.x, one.x], -1)
    zero = torch.zeros(1, 6, 6).double()
    doubled = {name: torch.cat([torch.cat([w, zero], 1), torch.cat([zero, w], 1)]) for name, w in fields.items()}
    doubled["w_o"] = torch.cat([torch.cat([one.w_o, zero], 2), torch.cat([zero, one.w_o], 2)])
    apart = Attention(x=wide, **doubled)
    torch.testing.assert_close(lipbounds.get("sharp_cheap")(apart).value, alone, rtol=1e-5, atol=0)


def test_turned_and_normalised_blocks_are_bounded() -> None:
    angles = torch.linspace(0.0, 3.0, 4).double()[:, None] * torch.tensor([1.0]).double()
    rotation = torch.stack([angles.cos(), angles.sin()], -2)
    for seed in range(4):
        block = random_block(seed, dim=6, heads=2, query_rotation=rotation, key_rotation=rotation)
        ones = torch.ones(2, 3).double()
        normed = {"query_norm_weight": ones, "key_norm_weight": 0.5 * ones, "norm_eps": 1e-6}
        for over in (None, "head", "all_heads"):
            turned = block if over is None else block.replace(**normed, norm_over=over)
            truth = true_norm(turned)
            assert truth <= lipbounds.get("sharp_cheap")(turned).value < 12 * truth


@pytest.mark.parametrize("case", ["self", "causal", "query", "memory"])
@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_gradient(case: str) -> None:
    block = random_block(14, **{"n": 3, **PLAIN[case]})
    moving = block.moving_input.clone().requires_grad_()
    bound = lipbounds.get("sharp_cheap")
    assert torch.autograd.gradcheck(lambda x: bound(block.at(x), grad=True).value, moving, atol=1e-5)


def test_weights_have_gradients() -> None:
    block = random_block(16, biases=False)
    bound = lipbounds.get("sharp_cheap")
    for name in ("w_q", "w_v", "w_o"):
        weights = getattr(block, name).clone().requires_grad_()
        (slope,) = torch.autograd.grad(bound(block.replace(**{name: weights}), grad=True).value, weights)
        draw = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        ahead, behind = (bound(block.replace(**{name: weights.detach() + e * draw})).value for e in (1e-6, -1e-6))
        assert (slope * draw).sum().item() == pytest.approx(((ahead - behind) / 2e-6).item(), rel=1e-4)
