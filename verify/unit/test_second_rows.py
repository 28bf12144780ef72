"""The norm of the second differential row by row: its groups of blocks, and that it is above the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention, Unsupported
from lipbounds.bounds import sharp_ball
from lipbounds.derivatives.second.factors import factors_of
from lipbounds.derivatives.second.gram_blocks import pair_products
from lipbounds.derivatives.second.norm import second_norm
from lipbounds.derivatives.second.rows import _two_keys, one_key, own_and_another, second_norm_by_rows, two_keys
from lipbounds.testing.contract import run_check
from lipbounds.testing.falsify import falsify
from verify.unit.blocks import NAMED, random_block
from verify.unit.test_sharp_ball import CASES, small_block
from verify.unit.test_taylor import derivative_norms, hessian


SOME: dict[str, dict[str, Any]] = {
    "some queries": {"queries_at": torch.tensor([2, 0])},
    "one query": {"queries_at": torch.tensor([1])},
}


def is_turned(name: str) -> bool:
    return any(word in name for word in ("rotary", "norm"))


TURNED = [name for name in CASES if is_turned(name)]
KNOWN = [name for name in CASES if name != "query" and not is_turned(name)] + [*SOME]


@pytest.fixture(params=KNOWN, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(7, n=3, **(CASES | SOME)[request.param])


def test_pairs_with_the_own_token_come_apart_in_large_blocks(block: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    together = (
        second_norm(block.replace()),
        second_norm_by_rows(block.replace()),
    )  # copies: what is cached goes with them
    monkeypatch.setattr("lipbounds.derivatives.second.norm.APART", 0)
    torch.testing.assert_close((second_norm(block), second_norm_by_rows(block)), together, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n", [2, 4, 6])
@pytest.mark.parametrize("gain", [0.3, 3.0, 30.0])
def test_it_is_above_the_norm_and_of_its_size(n: int, gain: float) -> None:
    block = small_block(n, n, 6, 2, gain)
    reached = max(max(derivative_norms(block, 2, seed)) for seed in range(3))
    assert reached <= second_norm_by_rows(block) < 5 * reached


@pytest.mark.parametrize("name", TURNED, **NAMED)
def test_turned_and_normed_rows_are_refused(name: str) -> None:
    block = random_block(7, n=3, **CASES[name])
    for norm in (second_norm, second_norm_by_rows, factors_of):
        with pytest.raises(Unsupported, match="joint norm of the second differential"):
            norm(block)


def test_the_groups_are_those_of_the_second_differential(block: Attention) -> None:
    """Each is above its share of the Hessian, flattened: what one key does, two keys, the own token and another."""
    factors = factors_of(block)
    tensor = hessian(block)  # outputs x inputs x inputs
    n, out, (m, dim) = block.tokens, block.w_o.shape[-1], block.moving_input.shape[-2:]
    tensor = tensor.reshape(n, out, m, dim, m, dim).transpose(3, 4)  # n, out, m, m, D, D
    apart = two_keys(block, factors)
    for i in range(n):
        here, own = tensor[i], block.token_of(i)
        left_out = [own] if block.query_moves else []
        alone = one_key(block, factors, i) * factors.unit
        for j in range(m):
            assert torch.linalg.matrix_norm(here[:, j, j].flatten(1), 2) <= alone[j] * (1 + 1e-9)
        kept = 1 - torch.eye(m, dtype=tensor.dtype)
        kept[left_out], kept[:, left_out] = 0.0, 0.0
        found = torch.linalg.matrix_norm((here * kept[..., None, None]).flatten(1), 2)
        allowed = apart[i] * factors.unit
        assert found <= allowed * (1 + 1e-9) + 1e-12
        # p = 32 of Schatten's norms; the root of the rounding of a Gram matrix
        assert allowed <= 1.1 * found + 1e-6 * factors.unit
        if block.query_moves and m > 1:
            others = [j for j in range(m) if j != own]
            found = torch.linalg.matrix_norm(here[:, own, others].flatten(1), 2)
            assert found <= own_and_another(block, factors, i) * factors.unit * (1 + 1e-9)


@pytest.mark.parametrize("name", SOME)
def test_queries_of_some_tokens_by_pairs_and_by_rows(name: str) -> None:
    block = small_block(3, 4, 6, 2, 3.0).replace(**SOME[name])
    reached = max(max(derivative_norms(block, 2, seed)) for seed in range(3))
    for norm in (second_norm, second_norm_by_rows):
        assert reached <= norm(block) <= norm(block.replace(queries_at=None)) * (1 + 1e-9)
    assert second_norm(block) < 3 * reached


def test_two_keys_in_closed_form_is_the_sum_over_pairs() -> None:
    block = small_block(1, 5, 6, 3, 3.0)
    factors = factors_of(block)
    for i in range(5):
        kept = torch.arange(5) != i
        rows = slice(i, i + 1)
        maps, spread = factors.maps[:, rows] * kept, factors.deviations[:, rows] * kept[:, None]
        found, size = _two_keys(factors, maps, spread, rows)
        pairs = [(j, k) for j in range(5) for k in range(5) if j != k and i not in (j, k)]
        products, sizes = pair_products(block, factors, i, *torch.tensor(pairs).T)
        torch.testing.assert_close(found[0], products.sum(0), rtol=1e-9, atol=1e-14)
        assert (sizes.square().sum(0).sqrt() <= size[0]).all()


def test_rows_that_move_alike_add_up() -> None:
    """Nine equal queries: the largest row alone would be too small (a fault too subtle for the search on balls)."""
    memory = random_block(3, n=2).x
    block = random_block(7, n=1, memory=memory, moves="memory", biases=False)
    block = block.replace(x=block.x.expand(9, -1).clone())
    factors = factors_of(block)
    row = (one_key(block, factors, 0).amax(-1) + two_keys(block, factors)[0]) * factors.unit
    assert 1.2 * row < max(derivative_norms(block, 2)) <= second_norm_by_rows(block)


def test_it_is_within_three_times_what_pairs_give() -> None:
    for gain in (1.0, 6.0):
        block = small_block(0, 10, 8, 2, gain)
        assert second_norm_by_rows(block) < 3 * second_norm(block)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize(("check", "blocks"), [("value", 200), ("scaling", 30), ("permutation", 30), ("batch", 30)])
def test_taylor_by_rows_survives_the_contract(monkeypatch: pytest.MonkeyPatch, check: str, blocks: int) -> None:
    """Blocks of the strategies are small, where pairs are taken: here their limit is 0."""
    monkeypatch.setattr(sharp_ball, "PAIRS_WORK", 0.0)
    run_check(lipbounds.get("sharp_ball.taylor"), check, max_examples=blocks, seed=0)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_taylor_by_rows_survives_ascent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharp_ball, "PAIRS_WORK", 0.0)
    found = falsify(lipbounds.get("sharp_ball.taylor"), seconds=8, seed=0)
    assert not found.refuted, found
    assert found.ratio > 0.5
