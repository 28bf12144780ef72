"""The second differential at a point and the third over a ball, against derivatives by automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.linalg import vector_norm

import lipbounds
from lipbounds import Attention
from lipbounds.bounds import sharp_ball
from lipbounds.derivatives.ball.first import BallDerivatives, Centre
from lipbounds.derivatives.ball.third import BallThirdDerivative
from lipbounds.derivatives.second import norm as attention_second
from lipbounds.derivatives.second.norm import second_norm
from lipbounds.derivatives.second.rows import second_norm_by_rows
from verify.unit.blocks import random_block
from verify.unit.test_sharp_ball import CASES, in_ball, small_block


PLAIN = {name: fields for name, fields in CASES.items() if not {"query_rotation", "norm_eps"} & fields.keys()}
Norm = Callable[[Attention], torch.Tensor]
NORMS = (second_norm, second_norm_by_rows)
TAYLOR = lipbounds.get("sharp_ball.taylor")
SHAPES: dict[str, dict[str, Any]] = {**PLAIN, "wide values": {"heads": 2, "dim": 6}, "one token": {"n": 1}}


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(7, **{"n": 3, **SHAPES[request.param]})


def hessian(block: Attention) -> torch.Tensor:
    """Output times input times input."""
    found = torch.func.jacfwd(torch.func.jacrev(block.function()))(block.moving_input)
    size = block.moving_input.numel()
    return found.reshape(-1, size, size)


def derivative_norms(block: Attention, order: int, seed: int = 0, steps: int = 8) -> Iterator[torch.Tensor]:
    """Norms of d^order F[a, ..., a, .] over unit a that climb towards the norm of d^order F."""
    slope = torch.func.jacrev(block.function())
    point = block.moving_input
    a = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def along(x: torch.Tensor, direction: torch.Tensor, times: int) -> torch.Tensor:
        if times == 0:
            return slope(x)
        return torch.func.jvp(lambda y: along(y, direction, times - 1), (x,), (direction,))[1]

    for _ in range(steps):
        a = a / a.norm()
        matrix = along(point, a, order - 1).reshape(-1, point.numel())
        _, size, right = torch.linalg.svd(matrix)
        yield size[0]
        a = right[0].reshape(point.shape)


# -- the second differential ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_second_norm_is_above_the_norm(block: Attention, norm: Norm) -> None:
    assert max(max(derivative_norms(block, 2, seed)) for seed in (0, 1)) <= norm(block)


def test_second_norm_is_above_and_near_the_flattened_norm(block: Attention) -> None:
    """What the Gram blocks bound is the norm for all matrices, not only products a y^T: it must not be below that."""
    flattened = torch.linalg.matrix_norm(hessian(block).flatten(1), 2)
    assert flattened <= second_norm(block) <= 1.5 * flattened + 1e-6


@pytest.mark.parametrize("gain", [1.0, 12.0])
def test_second_norm_far_below_the_sum_of_rates(gain: float) -> None:
    block = small_block(0, 6, 12, 3, gain)
    rates = sum(BallDerivatives(Centre(block), 0.0).second().values())
    allowed = second_norm(block)
    assert max(derivative_norms(block, 2)) <= allowed < 0.35 * rates


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-90, 90])
def test_tokens_of_any_unit_give_the_same_second_differential(norm: Norm, power: int) -> None:
    """x / t with weights that undo it has the second differential times t^2."""
    block, unit = random_block(5, n=3, biases=False), 2.0**power
    other = block.replace(x=block.x / unit, **{name: getattr(block, name) * unit for name in ("w_q", "w_k", "w_v")})
    torch.testing.assert_close(norm(other) / unit / unit, norm(block), rtol=1e-9, atol=0)


def test_rows_that_rest_on_one_key() -> None:
    """Near one key there is little to move; nearer still, the error of the map is all there is, and the rates know."""
    block = small_block(0, 4, 8, 2, 300.0)
    reached = max(derivative_norms(block, 2))
    assert reached <= second_norm(block) < 1.3 * reached < 0.02 * second_norm(small_block(0, 4, 8, 2, 30.0))
    assert TAYLOR(small_block(0, 4, 8, 2, 1e3), 1.0).details["second"] < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_second_norm_of_a_batch_is_that_of_its_items(norm: Norm) -> None:
    block = random_block(3, n=3)
    batch = block.at(torch.stack([block.x, -2 * block.x]))
    alone = torch.stack([norm(block), norm(block.at(-2 * block.x))])
    torch.testing.assert_close(norm(batch), alone, rtol=1e-10, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_second_norm_in_chunks(monkeypatch: pytest.MonkeyPatch, block: Attention, norm: Norm) -> None:
    together = norm(block)
    monkeypatch.setattr(attention_second, "CHUNK_ENTRIES", 1)
    torch.testing.assert_close(norm(block.replace()), together, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["x", "w_q", "w_k", "w_v", "w_o"])
def test_second_norm_carries_a_gradient(norm: Norm, name: str) -> None:
    block = random_block(6, n=3, dim=3)
    start = getattr(block, name).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: norm(block.replace(**{name: w})), start, atol=1e-5)


# -- the third differential -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("radius", [0.0, 0.2])
@pytest.mark.parametrize("case", {**SHAPES, **CASES}, ids=lambda name: name.replace(" ", "-"))
def test_third_is_above_the_third_differential_in_the_ball(case: str, radius: float) -> None:
    block = random_block(7, **{"n": 3, **{**SHAPES, **CASES}[case]})
    allowed = sum(BallThirdDerivative(Centre(block), radius).third().values())
    for moved in in_ball(block, radius * (1 - 1e-9), 3) if radius else [block]:
        for seed in (0, 1):
            assert max(derivative_norms(moved, 3, seed)) <= allowed


def cumulants(block: Attention, a: torch.Tensor) -> dict[str, torch.Tensor]:
    """The terms of d3F[a, a, a] of self-attention, as in lipbounds.derivatives.ball.third."""
    scale, maps = block.scale_value, block.probabilities
    values, moved = block.values @ block.w_o, a @ block.w_v @ block.w_o  # heads x m x out
    query = torch.einsum("ia,hja->hij", a, scale * block.keys @ block.w_q.mT)
    key = torch.einsum("hia,ja->hij", scale * block.queries @ block.w_k.mT, a)
    logits = 2 * scale * (a @ block.w_q) @ (a @ block.w_k).mT

    def centred(numbers: torch.Tensor) -> torch.Tensor:
        return numbers - (maps * numbers).sum(-1, keepdim=True)

    def mean(rows: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        """E[ rows~ times the factors ] of every row and head, summed over heads."""
        weights = maps
        for factor in factors:
            weights = weights * centred(factor)
        away = rows.unsqueeze(-3) - (maps @ rows).unsqueeze(-2)
        return torch.einsum("hij,hijo->hio", weights, away)

    def pair(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (maps * centred(one) * centred(other)).sum(-1, keepdim=True)

    def fourth(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        less = mean(values, x) * pair(y, z) + mean(values, y) * pair(x, z) + mean(values, z) * pair(x, y)
        return mean(values, x, y, z) - less

    terms = {
        "values_logits": 3 * mean(moved, logits),
        "values_query_query": 3 * mean(moved, query, query),
        "values_query_key": 6 * mean(moved, query, key),
        "values_key_key": 3 * mean(moved, key, key),
        "logits_query": 3 * mean(values, logits, query),
        "logits_key": 3 * mean(values, logits, key),
        "query_query_query": fourth(query, query, query),
        "query_query_key": 3 * fourth(query, query, key),
        "query_key_key": 3 * fourth(query, key, key),
        "key_key_key": fourth(key, key, key),
    }
    return {name: term.sum(0) for name, term in terms.items()}


def test_the_terms_are_the_third_differential() -> None:
    block = random_block(7, n=4, heads=3)
    a = torch.randn(block.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = block.function()
    for _ in range(3):
        found = lambda x, f=found: torch.func.jvp(f, (x,), (a,))[1]  # noqa: E731
    torch.testing.assert_close(sum(cumulants(block, a).values()), found(block.x), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("gain", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_every_term_is_above_what_a_climb_reaches(gain: float, radius: float) -> None:
    """Each alone: in the sum a term that were too small could hide behind the others."""
    block = small_block(1, 4, 6, 2, gain)
    allowed = BallThirdDerivative(Centre(block), radius).third()
    names, limits = list(allowed), torch.stack([*allowed.values()]).unsqueeze(-1)
    generator = torch.Generator().manual_seed(2)
    tightest = torch.zeros_like(limits)
    for moved in in_ball(block, radius * (1 - 1e-9), 3) if radius else [block]:
        every = torch.vmap(torch.vmap(partial(cumulants, moved)))
        # From three starts for each term, all at once.
        a = torch.randn((len(names), 3, *block.x.shape), generator=generator, dtype=torch.float64)
        for _ in range(25):
            a = (a / vector_norm(a, dim=(-2, -1), keepdim=True)).requires_grad_()
            terms = every(a)
            sizes = vector_norm(torch.stack([terms[name][k] for k, name in enumerate(names)]), dim=(-2, -1))
            assert (sizes <= limits).all(), dict(zip(names, (sizes / limits).tolist(), strict=True))
            tightest = torch.maximum(tightest, (sizes / limits).detach().amax(-1, keepdim=True))
            (slope,) = torch.autograd.grad(sizes.sum(), a)
            a = a.detach() + 2 * slope / vector_norm(slope, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    assert radius > 0 or tightest.min() > 0.003  # on balls, one-hot rows leave it far below


def test_one_far_key_among_many() -> None:
    """Its value is opposed to those of the others, and it is the token's own: both means of a term count in full."""
    number = 200
    x = torch.zeros(number, 3, dtype=torch.float64)
    x[1:, 0] = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(number)[: number - 1]
    x[1:, 1] = 12 * x[1:, 0]
    x[0] = torch.tensor([20.0, -(number**0.5), 0.0])
    towards = torch.eye(3, dtype=torch.float64)
    block = Attention(
        x=x,
        w_q=torch.stack([towards[2], torch.zeros_like(towards[2])], -1)[None],
        w_k=towards[:, [0, 2]][None],
        w_v=towards[:, [1]][None],
        w_o=towards[[1]][None],
        b_q=torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        scale=1.0,
    )
    own = torch.zeros_like(x)
    own[0, 2] = 1.0
    allowed = BallThirdDerivative(Centre(block), 0.0).third()
    reached = {name: vector_norm(term, dim=(-2, -1)) for name, term in cumulants(block, own).items()}
    assert all(reached[name] <= allowed[name] for name in allowed), (reached, allowed)
    assert reached["query_query_key"] > 0.8 * allowed["query_query_key"]


def test_third_is_of_the_size_of_the_third_differential() -> None:
    """A term that were a hundred times too large would hide a wrong one."""
    for case in ("self", "query", "memory"):
        block = random_block(7, n=3, **CASES[case])
        allowed = sum(BallThirdDerivative(Centre(block), 0.0).third().values())
        assert max(derivative_norms(block, 3)) > 0.02 * allowed, case


# -- the formula ----------------------------------------------------------------------------------------------------


def test_the_remainder_is_the_integral_of_the_third(monkeypatch: pytest.MonkeyPatch, block: Attention) -> None:
    """With a third differential of 1 everywhere it is eps^2 / 2, whatever the shells."""
    monkeypatch.setattr(BallThirdDerivative, "third", lambda self: {"one": torch.ones_like(self.radius)})
    for radius in (1e-3, 0.7):
        found = TAYLOR(block, radius).details["third"]
        torch.testing.assert_close(found, torch.full_like(found, radius**2 / 2), rtol=1e-12, atol=0)


def test_where_the_second_differential_is_too_large_the_rates_take_over(
    monkeypatch: pytest.MonkeyPatch, block: Attention
) -> None:
    found = TAYLOR(block, 0.1)
    monkeypatch.setattr(sharp_ball, "PAIRS_WORK", 0.0)
    monkeypatch.setattr(sharp_ball, "SECOND_WORK", 0.0)
    without = TAYLOR(block, 0.1)
    rates = sum(BallDerivatives(Centre(block), 0.0).second().values())
    torch.testing.assert_close(without.details["second"], 0.1 * rates, rtol=1e-9, atol=0)
    assert without.value >= found.value * (1 - 1e-12)
    whole = lipbounds.get("sharp_ball")(block, 0.1)
    assert "taylor" not in whole.details
    assert whole.value <= whole.details["deviation"]


def test_magnitudes_that_the_registry_refuses_give_no_change_of_the_jacobian() -> None:
    """Inside a network nothing else looks at them: squares of covariances underflow there."""
    block = random_block(2, n=3)
    assert sharp_ball.jacobian_change(block, 0.1) is not None
    assert sharp_ball.jacobian_change(block.replace(w_k=block.w_k * 2.0**-300), 0.1) is None
