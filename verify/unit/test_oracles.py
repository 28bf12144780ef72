"""The judge judged: the truth against automatic differentiation and against arithmetic in 60 digits."""

from __future__ import annotations

import ast
import dataclasses as dc
import itertools
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipbounds import Attention, InvalidInput
from lipbounds.targets._attention_checks import WEIGHTS
from lipbounds.testing import extended, oracles, recipes, strategies
from lipbounds.testing._fields import of_some_tokens
from lipbounds.testing.oracles import batch_item, jacobian, jacobian_norm, truth_slack
from lipbounds.testing.recipes import Recipe, build
from verify.unit.sample_bounds import GRID, SEARCH


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: f"{r.mask}-{r.moves}-{len(r.biases)}")
def test_the_jacobian_is_that_of_the_forward_pass(recipe: Recipe) -> None:
    block = build(recipe)
    moving = block.moving_input
    automatic = torch.func.jacrev(lambda tokens: oracles.attention_output(block, tokens))(moving)
    automatic = automatic.reshape(-1, moving.numel())
    assert torch.allclose(jacobian(block), automatic, rtol=1e-10, atol=1e-12 * automatic.abs().max().item())
    assert jacobian_norm(block).item() == pytest.approx(torch.linalg.matrix_norm(automatic, 2).item(), rel=1e-12)


@pytest.mark.parametrize("recipe", GRID[::5], ids=lambda r: f"{r.mask}-{r.moves}-{len(r.biases)}")
def test_the_forward_pass_is_that_of_the_block(recipe: Recipe) -> None:
    block = build(recipe)
    assert torch.allclose(oracles.attention_output(block, block.moving_input), block.forward(), rtol=1e-10)


@SEARCH
@given(block=strategies.attention_blocks(largest=5), seed=st.integers(0, 99))
def test_float64_and_sixty_digits_agree_within_the_slack(block: Attention, seed: int) -> None:
    assert_sixty_digits_agree(batch_item(block, (0,) * len(block.batch_shape)), seed)


@pytest.mark.parametrize("rotary", ["none", "half_turns"])
def test_sixty_digits_know_blocks_in_which_some_tokens_have_queries(rotary: str) -> None:
    block = build(Recipe(seed=3, n=4, dim=3, heads=2, head_dim=2, mask="block_sparse", rotary=rotary))
    assert_sixty_digits_agree(of_some_tokens(block, torch.tensor([3, 1])), seed=5)


def assert_sixty_digits_agree(single: Attention, seed: int) -> None:
    """The norm and one product of the Jacobian, in float64 and in 60 digits, differ by no more than the slack."""
    slack = Decimal(truth_slack(single).item())
    assert abs(Decimal(jacobian_norm(single).item()) - extended.jacobian_norm_extended(single)) <= slack
    direction = torch.randn(single.moving_input.shape, generator=torch.Generator().manual_seed(seed)).double()
    exact = extended._product(single, extended._exact(direction)).reshape(-1)
    computed = (jacobian(single) @ direction.reshape(-1)).tolist()
    error = sum((Decimal(a) - b) ** 2 for a, b in zip(computed, exact, strict=True)).sqrt()
    assert error <= slack * Decimal(float(direction.norm()) + 1)


def test_the_largest_logit_may_be_lost_in_rounding() -> None:
    """Logits of 7e19, equal but for their last digits, whose largest is not the one that floats call so."""
    recipe = Recipe(
        seed=8357306, n=2, dim=3, heads=2, head_dim=2, value_dim=4, out_dim=3, geometry="antipodal", input_scale=1e-4,
        key="identity", spread=1000.0, mask="block_sparse", rotary="half_turns", biases=frozenset({"b_q", "b_v"}),
        scale=-1.0, dtype=torch.bfloat16, batch=(1,), batched="mask",
    )  # fmt: skip
    block = batch_item(build(recipe), (0,))
    found = Decimal(jacobian_norm(block).item())
    assert found.is_finite()
    assert abs(found - extended.jacobian_norm_extended(block)) <= Decimal(truth_slack(block).item())


def test_sixty_digits_resolve_rows_that_floats_call_one_hot() -> None:
    """d/dq of softmax((q, -q)) v at q = 400: 4 e^-800, far below what 1 - p or floats can hold."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    memory = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    block = Attention(x=400 * one[0], w_q=one, w_k=one, w_v=one, w_o=one, memory=memory, moves="query")
    exact = extended.jacobian_norm_extended(block)
    assert float(exact * Decimal(800).exp()) == pytest.approx(4.0, rel=1e-12)


def test_a_rows_small_remainder_keeps_its_digits() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    memory = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    block = Attention(x=30 * one[0], w_q=one, w_k=one, w_v=one, w_o=one, memory=memory, moves="query")
    assert jacobian_norm(block).item() == pytest.approx(4 * torch.tensor(-60.0).double().exp().item(), rel=1e-13)


def test_the_norm_needs_one_block_for_sixty_digits() -> None:
    with pytest.raises(InvalidInput, match=r"batch shape \(2,\)"):
        extended.jacobian_norm_extended(build(Recipe(batch=(2,))))


def test_batch_items_are_the_items() -> None:
    block = build(Recipe(seed=3, heads=2, batch=(2, 2), batched="mask", mask="relative"))
    block = block.replace(x=torch.stack([block.x, 2 * block.x]))  # batch (2,) against the mask's (2, 2)
    norms = jacobian_norm(block)
    for index in itertools.product(range(2), repeat=2):
        assert not batch_item(block, index).batch_shape
        assert jacobian_norm(batch_item(block, index)).item() == pytest.approx(norms[index].item(), rel=1e-13)


@pytest.mark.parametrize("rotary", ["none", "random"])
@pytest.mark.parametrize("norm", ["none", "gaussian"])
@pytest.mark.parametrize("norm_over", ["head", "all_heads"])
@pytest.mark.parametrize("where", [("x",), ("logit_bias",), WEIGHTS])
def test_a_batch_in_some_fields_alone_gives_the_items(rotary, norm, norm_over, where) -> None:
    recipe = Recipe(seed=3, n=3, dim=3, heads=2, head_dim=2, norm=norm, norm_over=norm_over, rotary=rotary)
    block = build(dc.replace(recipe, mask="relative"))
    given = {name: getattr(block, name) for name in where if getattr(block, name) is not None}
    block = block.replace(**{name: torch.stack([field, field * 1.5]) for name, field in given.items()})
    norms, slacks, outputs = jacobian_norm(block), truth_slack(block), oracles.attention_output(block, block.x)
    assert norms.shape == slacks.shape == block.batch_shape == (2,)
    for i in range(2):
        item = batch_item(block, (i,))
        assert jacobian_norm(item).item() == pytest.approx(norms[i].item(), rel=1e-13)
        assert truth_slack(item).item() == pytest.approx(slacks[i].item(), rel=1e-6)
        torch.testing.assert_close(oracles.attention_output(item, item.x), outputs[i])


@pytest.mark.parametrize("module", [oracles, extended, recipes, strategies], ids=lambda m: m.__name__.split(".")[-1])
def test_the_judge_shares_no_code_with_the_judged(module: object) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())  # pyright: ignore[reportAttributeAccessIssue]
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    judged = ("lipbounds.ops", "lipbounds.bounds", "lipbounds.estimators", "lipbounds.rounding")
    assert not [name for name in imported if name.startswith(judged)]
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"probabilities", "logits", "queries_of", "forward", "jvp", "vjp", "function"}
