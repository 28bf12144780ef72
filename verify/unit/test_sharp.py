"""Norms of Gram blocks: above the truth, below the forms they are built from, and equal to it where nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.derivatives.first import gram_norm as module
from lipbounds.derivatives.first.differential_parts import differential_parts, key_part, mixing_part, query_part
from lipbounds.derivatives.first.gram_blocks import row_products
from lipbounds.derivatives.first.gram_norm import gram_norm
from lipbounds.derivatives.first.rows import jacobian_rows
from lipbounds.ops.schatten import schatten_norm_upper
from lipbounds.rounding import inflate
from verify.unit.blocks import MEMORY, NAMED, PLAIN, random_block, spectral, true_norm


NAMES = ["sharp", "sharp_fast"]


def turns(tokens: int) -> torch.Tensor:
    """Rotary positions of heads of width 3: a pair of features is turned, the third is not; a little off length 1."""
    angles = 2.5 * torch.arange(1, tokens + 1, dtype=torch.float64)[:, None]
    return 1.005 * torch.stack([angles.cos(), angles.sin()], -2)


def normed(over: str) -> dict[str, Any]:
    """QK-norm of two heads of width 3."""
    gains = torch.linspace(0.5, 3.0, 6, dtype=torch.float64).reshape(2, 3)
    return {"query_norm_weight": gains, "key_norm_weight": gains.flip(0), "norm_eps": 0.05, "norm_over": over}


# Each key has a gradient of the logits of its own.
PULLED: dict[str, dict[str, Any]] = {
    "turned": {"query_rotation": turns(4), "key_rotation": turns(4), "causal": True},
    "turned query": {"query_rotation": turns(4), "key_rotation": turns(5), **PLAIN["query"]},
    "turned memory": {"query_rotation": turns(4), "key_rotation": turns(5), **PLAIN["memory"]},
    "normed": normed("head"),
    "normed and turned": {"query_rotation": turns(4), "key_rotation": turns(4), **normed("head")},
    "normed together": {"query_rotation": turns(4), "key_rotation": turns(4), **normed("all_heads")},
    "normed together memory": {**PLAIN["memory"], **normed("all_heads")},
}
CASES = PLAIN | PULLED
IDS: dict[str, Any] = {"argvalues": CASES, **NAMED}


def block_jacobian(block: Attention) -> torch.Tensor:
    """The Jacobian by output token, feature, input token and feature."""
    return torch.func.jacrev(block.function())(block.moving_input)


def dense(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(2).flatten(0, 1)


def three_parts(block: Attention) -> dict[str, torch.Tensor]:
    """T1, T2, T3 as dense matrices: T2 is what queries alone move, T1 + T3 what keys and values do."""
    parts = {}
    apart = {moves: block for moves in (block.moves,)}
    if block.moves == "self":
        fixed: dict[str, Any] = {"memory": block.x, "causal": False, "logit_bias": block.mask}
        apart = {moves: block.replace(moves=moves, **fixed) for moves in ("query", "memory")}
    if "query" in apart:
        parts["query"] = dense(block_jacobian(apart["query"]))
    if "memory" in apart:
        mixing = torch.einsum("hij,hva,hbv->iajb", block.probabilities, block.w_o, block.w_v.mT.mT)
        parts["mixing"] = dense(mixing)
        parts["key"] = dense(block_jacobian(apart["memory"])) - parts["mixing"]
    return parts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", **IDS)
@pytest.mark.parametrize("gain", [0.0, 0.01, 1.0, 30.0])
def test_above_the_truth(name: str, case: str, gain: float) -> None:
    block = random_block(11, **CASES[case])
    block = block.replace(w_q=gain * block.w_q)
    assert lipbounds.get(name)(block).value >= true_norm(block) * (1 - 1e-12)


@pytest.mark.parametrize("case", **IDS)
def test_gram_blocks_are_those_of_the_jacobian(case: str) -> None:
    """The factored products against autodiff, within the slack that the bound adds for them."""
    block = random_block(21, **CASES[case])
    rows = jacobian_rows(block)
    products, jacobian = row_products(rows), block_jacobian(block)
    exact = torch.einsum("iajb,kcjb->ikac", jacobian, jacobian)
    unit = rows.scale.unsqueeze(-1) * rows.scale * rows.unit**2
    for i in range(block.tokens):
        for squares_only in (False, True):
            found = row_products(rows, squares_only)(i, 0, block.tokens) * unit[i, :, None, None]
            torch.testing.assert_close(found, exact[i], rtol=1e-9, atol=1e-9)
            off = torch.linalg.matrix_norm(found - exact[i])
            assert (off <= products.slack()[i] * unit[i] + 1e-13 * torch.linalg.matrix_norm(exact[i])).all()


@pytest.mark.parametrize("case", **IDS)
def test_size_and_error_of_rows_are_upper_bounds(case: str) -> None:
    block = random_block(22, **CASES[case])
    rows = jacobian_rows(block)
    lengths = block_jacobian(block).flatten(1).norm(dim=-1)
    assert (lengths <= (rows.size + rows.error) * rows.scale * rows.unit * (1 + 1e-12)).all()
    # Of the turned blocks one has a row that rests on one key: its covariances nearly vanish.
    assert (rows.error < (1e-9 if case in PLAIN else 1e-6) * rows.size).all()


@pytest.mark.parametrize("case", **IDS)
def test_each_part_is_above_its_norm(case: str) -> None:
    block = random_block(23, **CASES[case])
    parts = three_parts(block)
    if block.memory_moves:
        assert spectral(parts["mixing"]) <= mixing_part(block) <= 3 * spectral(parts["mixing"])
        assert spectral(parts["key"]) * (1 - 1e-12) <= key_part(block) <= 3 * spectral(parts["key"]) + 1e-5
    if block.query_moves:
        assert spectral(parts["query"]) * (1 - 1e-12) <= query_part(block) <= 3 * spectral(parts["query"]) + 1e-5


@pytest.mark.parametrize("case", **IDS)
def test_between_the_truth_and_the_norm_of_block_norms(case: str) -> None:
    """With p = 8 the Gram blocks lose at most D^(1/16) to spectral norms, with which (1) is below the block norms."""
    block = random_block(24, **CASES[case])
    jacobian = block_jacobian(block)
    norms = spectral(jacobian.transpose(1, 2))
    width = block.w_o.shape[-1]
    value = lipbounds.get("sharp")(block).value
    assert value <= spectral(norms) * width ** (1 / 16) * (1 + 1e-6)


@pytest.mark.parametrize("case", PLAIN, **NAMED)
def test_never_above_the_three_term_form(case: str) -> None:
    """T1 + T2 + T3 with all heads joined, as it was before Gram blocks (theory.md, section 2)."""
    block = random_block(25, **CASES[case])
    maps, values = block.probabilities, block.values
    through = torch.einsum(
        "hijv,hva->iajh", maps.unsqueeze(-1) * (values.unsqueeze(-3) - (maps @ values).unsqueeze(-2)), block.w_o
    )
    reach = block.scale_value * block.queries @ block.w_k.mT
    total = spectral(three_parts(block)["query"]) if block.query_moves else torch.zeros(()).double()
    if block.memory_moves:
        products = block.w_v @ block.w_o
        side = spectral(torch.cat(list(maps), -1)) * spectral(torch.cat(list(products), -1))
        total = total + torch.minimum(side, (spectral(maps) * spectral(products)).sum())
        total = total + spectral(through.flatten(2)).amax() * spectral(reach.flatten(0, 1))
    assert lipbounds.get("sharp")(block).value <= total * 6 ** (1 / 128)  # p = 64
    assert lipbounds.get("sharp_fast")(block).value >= lipbounds.get("sharp")(block).value


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_combined_better_than_by_the_root_of_the_sum_of_squares(name: str) -> None:
    """One head with large output and small value weights: ||W_O|| sqrt(sum L_h^2) gives its ||W_O|| to the other."""
    block = random_block(26, heads=2, biases=False)
    strength = torch.tensor([100.0, 1.0]).double()[:, None, None]
    block = block.replace(w_o=block.w_o * strength, w_v=block.w_v / strength)
    heads = [block.replace(w_q=block.w_q[h : h + 1], w_k=block.w_k[h : h + 1], w_v=block.w_v[h : h + 1],
                           w_o=torch.eye(3).double().unsqueeze(0)) for h in range(2)]  # fmt: skip
    squares = sum(float(true_norm(head)) ** 2 for head in heads)
    rooted = float(spectral(block.w_o.flatten(0, 1))) * squares**0.5
    assert lipbounds.get(name)(block).value < 0.1 * rooted


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens_and_one_head_leave_the_constant_itself(name: str) -> None:
    block = random_block(13, heads=1, biases=False)
    block = block.at(block.x[:1].expand(4, 6).clone())
    torch.testing.assert_close(lipbounds.get(name)(block).value, true_norm(block), rtol=1e-5, atol=0)


def test_one_feature_leaves_only_signs_between_rows() -> None:
    """D_out = 1: blocks are numbers, so the bound is the norm of |J J^T|."""
    block = random_block(27)
    block = block.replace(w_o=block.w_o[..., :1], b_o=None)
    jacobian = dense(block_jacobian(block))
    expected = spectral((jacobian @ jacobian.mT).abs()).sqrt()
    torch.testing.assert_close(lipbounds.get("sharp")(block).value, expected, rtol=1e-6, atol=0)


def test_queries_alone_lose_nothing_but_the_schatten_norm() -> None:
    block = random_block(28, memory=MEMORY, moves="query")
    truth = true_norm(block)
    own = [spectral(block_jacobian(block)[i, :, i]) for i in range(block.tokens)]
    torch.testing.assert_close(torch.stack(own).amax(), truth)
    assert truth <= lipbounds.get("sharp")(block).value <= truth * 6 ** (1 / 16)


@pytest.mark.parametrize("name", NAMES)
def test_common_offsets_of_keys_and_values_cost_nothing(name: str) -> None:
    block = random_block(12)
    assert block.b_v is not None
    assert block.b_k is not None
    shifted = block.replace(b_v=block.b_v + 100, b_k=block.b_k - 3)
    torch.testing.assert_close(lipbounds.get(name)(shifted).value, lipbounds.get(name)(block).value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_items(name: str) -> None:
    items = [random_block(seed) for seed in (1, 2, 3)]
    fields = ("x", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v")
    batch = Attention(**{field: torch.stack([getattr(item, field) for item in items]) for field in fields})
    alone = torch.stack([lipbounds.get(name)(item).value for item in items])
    torch.testing.assert_close(lipbounds.get(name)(batch).value, alone, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["causal", "query", "memory", "pulled"])
def test_gradient(name: str, case: str) -> None:
    pulled = {"query_rotation": turns(3), "key_rotation": turns(3), **normed("all_heads")}
    block = random_block(14, **{"n": 3, **(pulled if case == "pulled" else CASES[case])})
    bound = lipbounds.get(name)
    moving = block.moving_input.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bound(block.at(x), grad=True).value, moving, atol=1e-5)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("name", NAMES)
def test_a_head_without_effect_leaves_the_gradient_alone(name: str) -> None:
    """Its norm is 0 up to rounding, and the direction of rounding is no gradient. Found by the contract suite."""
    block = random_block(29, heads=2, biases=False)
    along = torch.linalg.svd(block.w_v[0]).Vh.mT[:, :1]  # head 0 moves along it only, and W_O^0 does not read it
    w_v = block.w_v.clone()
    w_v[0] = w_v[0] @ along @ along.mT
    w_o = block.w_o.clone()
    w_o[0] = w_o[0] - along @ (along.mT @ w_o[0])
    quiet = block.replace(w_v=w_v, w_o=w_o)
    moving = quiet.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lipbounds.get(name)(quiet.at(x), grad=True).value, moving, atol=1e-5)


@pytest.mark.parametrize("squarings", [0, 1, 2])
def test_schatten_norms(squarings: int) -> None:
    matrix = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    power = 2 * 2**squarings
    expected = torch.linalg.svdvals(matrix).pow(power).sum(-1).pow(1 / power)
    for unit in (1.0, 1e-200, 1e200):
        found = schatten_norm_upper(unit * matrix, squarings)
        torch.testing.assert_close(found, unit * expected, rtol=1e-9, atol=0)
        assert (found >= unit * expected * (1 - 1e-15)).all()
    assert (schatten_norm_upper(0 * matrix, squarings) == 0).all()


def test_large_blocks_take_rows_alone_and_larger_ones_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(30)
    by_gram = lipbounds.get("sharp")(block)
    monkeypatch.setattr(module, "GRAM_WORK", (0, 0, 0))
    by_rows = lipbounds.get("sharp")(block)
    monkeypatch.setattr(module, "ROWS_WORK", 0)
    by_parts = lipbounds.get("sharp")(block)
    assert set(by_gram.details) == {"parts", "gram"}
    assert set(by_rows.details) == {"parts", "rows"}
    assert set(by_parts.details) == {"parts"}
    assert true_norm(block) <= by_gram.value <= by_rows.value <= by_parts.value
    rows = torch.linalg.matrix_norm(block_jacobian(block).flatten(2), 2).square().sum().sqrt()
    assert rows <= by_rows.details["rows"] <= rows * 6 ** (1 / 16)


@pytest.mark.parametrize("small", [0, 1e11])
def test_sharp_is_the_least_of_its_forms(monkeypatch: pytest.MonkeyPatch, small: float) -> None:
    """The benchmark reads version 4 off the records of version 3 (three parts, Gram blocks) and of `sharp_fast`."""
    monkeypatch.setattr("lipbounds.bounds.sharp.SMALL", small)
    for seed in range(20):
        block = random_block(seed, n=5, causal=seed % 2 == 0)
        third = min(float(sum(differential_parts(block))), float(gram_norm(block)))
        found, fast = (lipbounds.get(name)(block).value.item() for name in ("sharp", "sharp_fast"))
        assert found == min(inflate(torch.tensor(third, dtype=torch.float64), 8).item(), fast)


@pytest.mark.parametrize("name", ["sharp", "sharp_fast"])
def test_tokens_whose_products_overflow_are_not_taken_for_zero(name: str) -> None:
    """Squares of squares of the centred values are infinite, and infinity less infinity is no number.

    Such blocks are refused before they are evaluated: the formula must not be what is wrong with them.
    """
    draw = torch.Generator().manual_seed(12)
    shapes = {"x": (4, 3), "w_q": (2, 3, 2), "w_k": (2, 3, 2), "w_v": (2, 3, 2), "w_o": (2, 2, 3)}
    sizes = {"x": 1e100, "w_q": 1e-100, "w_k": 1e-100}
    tensors = {
        name: sizes.get(name, 1.0) * torch.randn(shape, generator=draw, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    block = Attention(**tensors)  # pyright: ignore[reportArgumentType]
    value, _ = lipbounds.get(name).compute(block)
    assert float(value) >= float(lipbounds.get("lanczos")(block).value) > 0
