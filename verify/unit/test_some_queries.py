"""Blocks in which some of the tokens have queries: the rows of the block in which all have, and no other function."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lipbounds
from lipbounds.claims import Feature
from lipbounds.derivatives.ball.logits import logit_radius
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators.tokens import token_lower
from lipbounds.targets.attention import Attention
from lipbounds.testing import oracles
from lipbounds.testing._fields import of_some_tokens
from lipbounds.testing._jacobian import largest_block_sum
from lipbounds.testing.strategies import attention_blocks
from verify.unit.blocks import random_block


PARTS: tuple[Feature, ...] = ("heads", "biases", "mask", "rotary", "qk_norm")
BOUNDS = [spec for spec in lipbounds.registry.select(target=Attention) if "some_queries" in spec.supports]
AT_A_POINT = [spec for spec in BOUNDS if not spec.needs_radius]
ON_A_BALL = [spec for spec in BOUNDS if spec.claim.scope == "ball"]


def rows_of(jacobian: Tensor, block: Attention, at: Tensor) -> Tensor:
    """The rows of a dense Jacobian of the whole block that belong to the tokens `at`."""
    return jacobian.unflatten(-2, (block.tokens, -1))[..., at, :, :].flatten(-3, -2)


@st.composite
def pairs(draw: Any, features: Iterable[Any], **options: Any) -> tuple[Attention, Tensor]:
    """A block of self-attention, and some of its tokens."""
    wanted = [name for name in PARTS if name in set(features)]
    block = draw(attention_blocks(wanted, largest=5, **options))
    order = draw(st.permutations(range(block.tokens)))
    return block, torch.tensor(order[: draw(st.integers(1, block.tokens))])


def reached(rows: Tensor, block: Attention, norm: str) -> Tensor:
    """What the norm of these rows of the Jacobian reaches."""
    if norm == "l2":
        return torch.linalg.matrix_norm(rows, 2)
    blocks = rows.unflatten(-1, (block.tokens, -1)).unflatten(-3, (-1, block.w_o.shape[-1]))
    shape = (3, blocks.shape[-4], *blocks.shape[:-4], blocks.shape[-3])
    return largest_block_sum(blocks, torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=rows.dtype))


@pytest.mark.parametrize("extra", [(), ("rotary",), ("qk_norm",)], ids=["plain", "rotary", "qk_norm"])
@settings(max_examples=15)
@given(data=st.data())
def test_derivatives_are_the_rows_of_the_whole_block(extra, data):
    whole, at = data.draw(pairs({"heads", "biases", "mask", *extra}, dtype=torch.float64, batches=False, extreme=False))
    block, wanted = of_some_tokens(whole, at), rows_of(oracles.jacobian(whole), whole, at)
    slack = float(oracles.truth_slack(whole)) + 1e-12 * float(wanted.abs().max())
    torch.testing.assert_close(block.forward(), whole.forward()[at])
    inputs = torch.eye(wanted.shape[1], dtype=torch.float64).view(-1, *block.x.shape)
    outputs = torch.eye(wanted.shape[0], dtype=torch.float64).view(-1, len(at), block.w_o.shape[-1])
    for found in (block.jvp(inputs).flatten(1).mT, block.vjp(outputs).flatten(1)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=slack)


@pytest.mark.parametrize("spec", AT_A_POINT, ids=lambda spec: spec.name)
@settings(max_examples=20)
@given(data=st.data())
def test_no_bound_is_below_the_rows_of_the_whole_block(spec, data):
    whole, at = data.draw(pairs(spec.supports))
    dense, slack = rows_of(oracles.jacobian(whole), whole, at), oracles.truth_slack(whole)
    truth, value = reached(dense, whole, spec.claim.norm), spec(of_some_tokens(whole, at)).value.double()
    room = slack * dense.shape[-1] ** 0.5 + 1e-12 * truth
    if spec.claim.kind == "lower":
        assert bool((value <= truth + room).all())
    else:
        assert bool((value >= truth - room).all())


@pytest.mark.parametrize("spec", ON_A_BALL, ids=lambda spec: spec.name)
@settings(max_examples=12)
@given(data=st.data())
def test_no_bound_on_a_ball_is_below_a_point_of_it(spec, data):
    if spec.claim.kind != "proved":
        pytest.skip("an estimate on a ball promises nothing at a point of it")
    whole, at = data.draw(pairs(spec.supports, dtype=torch.float64, batches=False))
    radius = data.draw(st.sampled_from((0.0, 0.01, 0.3, 2.0))) * float(whole.x.norm() + 1e-3)
    value, block = spec(of_some_tokens(whole, at), radius).value, of_some_tokens(whole, at)
    dense = rows_of(oracles.jacobian(whole), whole, at)
    principal = torch.linalg.svd(dense, full_matrices=False).Vh[:2].view(-1, *whole.x.shape)
    drawn = torch.randn(4, *whole.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = drawn / drawn.flatten(1).norm(dim=1)[:, None, None]
    for direction in (*principal, *-principal, *drawn, *-drawn):
        there = whole.at(whole.x + radius * (1 - 1e-12) * direction / max(1.0, float(direction.norm())))
        truth = torch.linalg.matrix_norm(rows_of(oracles.jacobian(there), there, at), 2)
        assert bool(value >= truth - oracles.truth_slack(there)), block


def test_logits_move_on_a_ball_as_those_rows_of_the_whole_block_do():
    whole, at = random_block(3, n=6, dim=8), torch.tensor([4, 1])
    found, wanted = logit_radius(of_some_tokens(whole, at), 0.5), logit_radius(whole, 0.5)[..., at, :]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_rounding_of_the_products_covers_those_of_some_queries():
    whole = random_block(3, n=6, dim=8)
    at = torch.tensor([4, 1])
    block = of_some_tokens(whole, at)
    short = block.to(torch.float32)
    operator = JacobianOperator(short)
    assert operator.out_size < operator.in_size
    v = torch.randn(operator.in_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert bool((operator.jvp(v).norm() > 0).all())
    assert token_lower(short).shape == (6,)  # each token moves the output: as a key, two of them as queries, too
    lower = token_lower(block)
    columns = rows_of(oracles.jacobian(whole), whole, at).unflatten(-1, (6, -1)).movedim(-2, 0)
    torch.testing.assert_close(lower, torch.linalg.matrix_norm(columns, 2), rtol=1e-3, atol=0)


def test_the_field_outlives_conversions():
    block = of_some_tokens(random_block(1), torch.tensor([2]))
    assert block.queries_at is not None
    for other in (
        block.to(torch.float32).double,
        block.double,
        pickle.loads(pickle.dumps(block)),
        block.at(2 * block.x),
    ):
        assert other.queries_at is not None
        assert torch.equal(other.queries_at, block.queries_at)
        assert other.queries_at.dtype == torch.int64
    assert block.to(torch.bfloat16).forward().shape == (1, block.w_o.shape[-1])
    assert "some_queries" in block.features
    assert "queries_at=1" in repr(block)


def test_bounds_without_a_proof_for_them_refuse():
    block = of_some_tokens(random_block(1), torch.tensor([0]))
    with pytest.raises(UnsupportedAttention, match="some_queries"):
        lipbounds.get("hu2024.ball")(block, 0.1)
    refusing = [s for s in lipbounds.registry.select(target=Attention) if "some_queries" not in s.supports]
    for spec in refusing:
        assert "some_queries" in spec.missing_features(block)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"queries_at": torch.tensor([0], dtype=torch.int32)},
            "int64 with one dimension and not empty, got torch.int32",
        ),
        ({"queries_at": torch.tensor([], dtype=torch.int64)}, "not empty"),
        ({"queries_at": torch.tensor([1, 1])}, "at most once"),
        ({"queries_at": torch.tensor([9])}, "from 0 to 3"),
        ({"queries_at": torch.tensor([-1])}, "from 0 to 3"),
        ({"queries_at": torch.tensor([0]), "causal": True}, "pass the rows of the mask as logit_bias"),
        ({"queries_at": torch.tensor([0]), "logit_bias": torch.zeros(1, 3, dtype=torch.float64)}, "logit_bias must"),
        (
            {"queries_at": torch.tensor([0]), "memory": torch.ones(3, 6, dtype=torch.float64), "moves": "query"},
            "got a memory",
        ),
    ],
)
def test_malformed_fields_are_refused(changes, message):
    with pytest.raises(InvalidInput, match=message):
        random_block(1).replace(**changes)
