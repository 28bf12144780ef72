"""What several bounds of one block, and balls of several radii, need is computed once, and is what each finds alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.bounds import covariance
from lipbounds.derivatives import cache
from lipbounds.derivatives.ball import turned_logits
from lipbounds.derivatives.first import differential_parts
from lipbounds.ops import spectral
from lipbounds.report.heads import heads_alone
from verify.unit.blocks import random_block, turned_block


def counted(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, which: Callable[..., bool] = lambda *args: True
) -> list[int]:
    """How often a function that a module uses is called, told in a list of one number.

    Args:
        monkeypatch: that puts the function back.
        module: that uses it.
        name: of the function.
        which: whether a call with these arguments counts.
    """
    calls, function = [0], getattr(module, name)

    def told(*args: Any, **options: Any) -> Any:
        calls[0] += which(*args)
        return function(*args, **options)

    monkeypatch.setattr(module, name, told)
    return calls


BOUNDS: dict[str, Callable[[Attention], Any]] = {
    "sharp_fast": lipbounds.get("sharp_fast"),
    "sharp": lipbounds.get("sharp"),
    "small ball": lambda block: lipbounds.get("sharp_ball.deviation")(block, radius=0.1, dense=0),
    "large ball": lambda block: lipbounds.get("sharp_ball.deviation")(block, radius=1.0, dense=0),
}


@torch.no_grad()
def test_bounds_of_a_block_share_the_parts_of_its_differential(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(5, heads=3, causal=True)
    alone = {name: bound(block.replace()).value for name, bound in BOUNDS.items()}
    calls = counted(monkeypatch, differential_parts, "joint_rows")
    found = {name: bound(block).value for name, bound in BOUNDS.items()}
    assert calls == [1]
    assert found == alone


@torch.no_grad()
def test_balls_share_the_norms_of_weights_where_positions_are_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = lipbounds.get("sharp_ball.direct")
    block, radii = turned_block(), (0.01, 0.1, 1.0)
    alone = [bound(block.replace(), radius=radius).value for radius in radii]
    beside = (block.w_q.shape[-2], block.heads * block.w_q.shape[-1])  # weights of all heads side by side
    calls = counted(monkeypatch, spectral, "_scaled_norm", lambda parts, *_: parts[0].matrix.shape == beside)
    found = [bound(block, radius=radii[0]).value]
    once = calls[0]
    found += [bound(block, radius=radius).value for radius in radii[1:]]
    assert 2 <= once == calls[0]
    assert found == alone


HEADS = 3  # blocks below are large enough to hand on what is known of their heads (lipbounds.report.heads, `LARGE`)
NORMED = {"query_norm_weight": torch.linspace(0.5, 2.0, 48, dtype=torch.float64).reshape(HEADS, 16), "norm_eps": 1e-6}
LARGE_BLOCKS: dict[str, dict[str, Any]] = {
    "biases": {},
    "causal": {"causal": True},
    "mask": {"logit_bias": torch.linspace(-2.0, 1.0, HEADS * 256, dtype=torch.float64).reshape(HEADS, 16, 16).sin()},
    "QK-norm": NORMED | {"key_norm_weight": NORMED["query_norm_weight"].flip(0), "norm_over": "head"},
    "QK-norm of all heads": NORMED | {"key_norm_weight": NORMED["query_norm_weight"], "norm_over": "all_heads"},
}
OF_HEADS = tuple(map(lipbounds.get, ("sharp_fast", "covariance.exact", "yudin2025.biased_exact")))


@torch.no_grad()
@pytest.mark.parametrize("fields", LARGE_BLOCKS.values(), ids=LARGE_BLOCKS.keys())
def test_heads_alone_get_what_they_get_without_their_block(fields: dict[str, Any]) -> None:
    block = random_block(6, n=16, dim=48, heads=HEADS, **fields)
    for bound in OF_HEADS:
        bound(block)
    shared, alone = heads_alone(block, 1), heads_alone(block.replace(), 1)
    for bound in OF_HEADS:
        assert torch.equal(bound(shared).value, bound(alone).value), bound.name


@torch.no_grad()
def test_heads_alone_solve_no_eigenproblem_that_their_block_has_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(6, n=16, dim=48, heads=HEADS)
    exact = lipbounds.get("covariance.exact")
    calls = counted(monkeypatch, covariance, "row_covariance")
    exact(block)
    assert calls == [2]
    exact(heads_alone(block))
    assert calls == [2]
    exact(heads_alone(block.replace()))
    assert calls == [4]


@torch.no_grad()
def test_bounds_on_a_ball_share_gradients_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = lipbounds.get("sharp_ball.direct"), lipbounds.get("yudin2025_ball.biased")
    block = turned_block()
    alone = [bound(block.replace(), radius=0.1).value for bound in bounds]
    calls = counted(monkeypatch, turned_logits, "_chunk")
    found = [bound(block, radius=0.1).value for bound in bounds]
    assert calls == [1]
    assert found == alone


def test_a_copy_shares_what_is_found_and_keeps_no_block_alive() -> None:
    calls = []
    found = cache.cached_per_block(lambda block: calls.append(block.heads))
    block = random_block()
    copy = cache.copy_of(block)
    found(copy)
    found(block)
    assert calls == [2]
    known = weakref.ref(block)
    del block
    gc.collect()
    assert known() is None
    found(copy)
    assert calls == [2, 2]
