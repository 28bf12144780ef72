"""How far log-odds of attention maps can grow in a ball, and means under maps whose entries are capped."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds import Attention
from lipbounds.derivatives.ball import log_odds
from lipbounds.derivatives.ball.first import BallDerivatives, Centre
from lipbounds.derivatives.ball.log_odds import log_odds_gain, maps_interval
from lipbounds.derivatives.ball.logits import logit_radius
from lipbounds.derivatives.ball.suprema import RowDeviations
from lipbounds.ops.capped_mean import largest_mean, threshold
from verify.unit.blocks import normed, random_block, turned, turns


CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "one head": {"heads": 1, "biases": False},
    "some queries": {"queries_at": torch.tensor([2, 0])},
    "query": {"memory": random_block(3, n=5).x, "moves": "query"},
    "memory": {"memory": random_block(3, n=5).x, "moves": "memory"},
    "one key": {"memory": random_block(3, n=1).x, "moves": "memory"},
    "far logits": {"scale": 20.0},
    "rotary": turned(3),
    "rotary, some queries": turned(3) | {"query_rotation": turns(2), "queries_at": torch.tensor([2, 0])},
    "rotary, memory": turned(3, 5) | {"memory": random_block(3, n=5).x, "moves": "memory"},
    "rotary, query": turned(3, 5) | {"memory": random_block(3, n=5).x, "moves": "query"},
    "norm": normed(2),
    "norm of all": normed(2, "all_heads") | turned(3),
}


def cases(name: str) -> Attention:
    return random_block(7, n=3, **CASES[name])


def odds(block: Attention) -> Tensor:
    """Log-odds of every key against all others; -inf where it is masked, +inf where no other is seen."""
    length = block.logits.shape[-1]
    own = torch.eye(length, dtype=torch.bool)
    rivals = block.logits.unsqueeze(-2).masked_fill(own, -torch.inf)
    alone = rivals.isneginf().all(-1)
    total = rivals.masked_fill(alone.unsqueeze(-1), 0.0).logsumexp(-1)
    return torch.where(alone, torch.inf, block.logits - total)


def reached(block: Attention, radius: float, steps: int = 12) -> Tensor:
    """The largest growth of each log-odds that gradient ascent from the centre finds in the ball."""
    start, centre = odds(block), block.moving_input
    count = start.numel()
    moving, best = centre.expand(count, *centre.shape), torch.zeros(count, dtype=torch.float64)
    for _ in range(steps):
        moving = moving.detach().requires_grad_()
        each = (odds(block.at(moving)) - start).reshape(count, count).diagonal()
        seen = each.isfinite()
        best = torch.where(seen, torch.maximum(best, each.detach()), best)
        (slope,) = torch.autograd.grad(torch.where(seen, each, 0.0).sum(), moving)
        size = slope.nan_to_num(0.0).flatten(1).norm(dim=1)[:, None, None]
        step = moving.detach() - centre + radius * slope.nan_to_num(0.0) / size.clamp(min=1e-300)
        length = step.flatten(1).norm(dim=1)[:, None, None]
        moving = centre + step * (radius * (1 - 1e-12) / length.clamp(min=radius))
    return best.reshape(start.shape)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("radius", [1e-3, 0.3, 2.0])
def test_no_log_odds_grow_beyond(name: str, radius: float) -> None:
    block = cases(name)
    found, allowed = reached(block, radius), log_odds_gain(block, radius)
    finite = odds(block).isfinite()
    assert (found <= allowed)[finite].all()
    share = 0.99 if radius < 0.01 else 0.1 if "qk_norm" in block.features else 0.2
    assert (found[finite] > share * allowed[finite]).any() or block.logits.shape[-1] == 1


def _no_own(rows: Any) -> Tensor:
    return torch.zeros_like(rows.block.logits)


def _entry_of_the_key_alone(rows: Any) -> Tensor:
    return torch.ones_like(rows.block.logits)


def _half(rows: Any) -> Tensor:
    return RIGHT["squares"](rows) / 4


RIGHT: dict[str, Callable[[Any], Tensor]] = {
    name: getattr(log_odds._Functionals, name).func for name in ("own", "entries", "squares")
}
FAULTS = {"own": _no_own, "entries": _entry_of_the_key_alone, "squares": _half}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own token is forgotten; only the key itself counts, not its rivals; half of the slope."""
    monkeypatch.setattr(log_odds._Functionals, name, property(FAULTS[name]))
    excess = [(reached(block, 1e-3, 3) - log_odds_gain(block, 1e-3))[odds(block).isfinite()] for block in EVERY]
    assert any(bool((each > 0).any()) for each in excess)


EVERY = [cases(name) for name in ("self", "memory")]


@pytest.mark.parametrize("name", CASES)
def test_maps_stay_in_the_interval(name: str) -> None:
    block, radius = cases(name), 0.5
    interval = maps_interval(block, radius)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(200, *block.moving_input.shape, generator=generator, dtype=torch.float64)
    steps = radius * (1 - 1e-12) * steps / steps.flatten(1).norm(dim=1)[:, None, None]
    maps = block.at(block.moving_input + steps).probabilities
    assert (maps <= interval.upper).all()
    assert (maps >= interval.lower).all()
    others = maps.sum(-1, keepdim=True) - maps
    assert (others <= interval.complement + 1e-12).all()
    peaked = interval.lower > 0.5
    assert (maps * others <= interval.lower * interval.complement + 1e-12)[:, peaked].all()


def test_the_complement_of_a_key_far_ahead_keeps_its_digits() -> None:
    interval = maps_interval(cases("far logits"), 1e-3)
    assert (interval.complement > 0).all()
    assert interval.complement.amin() < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_largest_mean_and_threshold_by_a_grid(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, caps = torch.rand(4, generator=generator).double(), 0.3 + torch.rand(4, generator=generator).double() / 2
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 21, dtype=torch.float64)] * 4)
    rows = grid[((grid.sum(-1) - 1).abs() < 1e-9) & (grid <= caps + 1e-12).all(-1)]
    found, best = largest_mean(values, caps), (rows @ values).amax()
    assert best <= found <= best + 0.1
    level = threshold(values, caps)
    dual = lambda mu: mu + (caps * (values - mu).clamp(min=0)).sum()  # noqa: E731
    torch.testing.assert_close(dual(level), found)
    assert all(dual(level) <= dual(mu) + 1e-12 for mu in values)


@pytest.mark.parametrize("cap", [1.0, 0.6])
def test_deviations_of_maps_that_sum_to_one(cap: float) -> None:
    """With all caps at 1 the farthest row alone; never below what any row of the simplex under the caps gives."""
    block = random_block(3, n=4)
    centre = Centre(block)
    maps = BallDerivatives(centre, 0.0).maps
    rows = RowDeviations(
        block, centre.values, dc.replace(maps, upper=torch.full_like(maps.upper, cap)), torch.zeros_like(centre.zero)
    )
    away = centre.values.reduced.unsqueeze(-3) - (block.probabilities @ centre.values.reduced).unsqueeze(-2)
    allowed = rows.plain.heads
    drawn = torch.distributions.Dirichlet(torch.full((4,), 0.3, dtype=torch.float64)).sample(torch.Size([2000]))
    drawn = torch.cat([torch.eye(4, dtype=torch.float64), 0.6 * torch.eye(4) + 0.4 * torch.eye(4).roll(1, 0), drawn])
    drawn = drawn[(drawn <= cap).all(-1)]
    moments = torch.einsum("kj,hija,hijb->khiab", drawn, away, away)
    reached = torch.linalg.matrix_norm(moments, 2).sqrt().amax(0)
    assert (reached <= allowed).all()
    assert (allowed <= 1.5 * reached).all()
    torch.testing.assert_close(rows.plain.total, torch.ones_like(rows.plain.total), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["self", "query", "memory", "one key"])
@pytest.mark.parametrize("exponent", [-30, 30])
def test_rounding_is_added_in_the_units_of_what_moves(name, exponent):
    block, c = cases(name), 2.0**exponent
    block = block.replace(b_q=None, b_k=None, b_v=None)
    moving = {"self": ("x",), "query": ("x",), "memory": ("memory",)}[block.moves]
    meeting = {"self": ("w_q", "w_k", "w_v"), "query": ("w_q",), "memory": ("w_k", "w_v")}[block.moves]
    powers = dict.fromkeys(moving, c) | dict.fromkeys(meeting, 1 / c)
    same = block.replace(**{field: getattr(block, field) * power for field, power in powers.items()})
    for function in (log_odds_gain, logit_radius):
        torch.testing.assert_close(function(same, 0.3 * c), function(block, 0.3), rtol=1e-14, atol=0)
