"""The bounds on rounding errors, against 60-digit arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch

from lipbounds import Attention
from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._measured import quotients
from lipbounds.estimators._operator import JacobianOperator, sphere
from lipbounds.estimators._rayleigh import attained
from lipbounds.estimators.exact import exact
from lipbounds.estimators.lanczos import lanczos, lanczos_certificate
from lipbounds.estimators.power import power_iteration
from lipbounds.ops.verified_norm import verified_norm
from lipbounds.rounding import UNIT_ROUNDOFF, cast_down
from verify.unit.blocks import random_block, true_norm


mp = mpmath.mp
MAGNITUDES = [1e-3, 1.0, 30.0, 1e3, 1e5]


@pytest.fixture(autouse=True)
def sixty_digits() -> Any:
    with mpmath.workdps(60):
        yield


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cancelling_block(seed: int, magnitude: float) -> Attention:
    """Logits of size magnitude squared with differences of order 1: the attention maps lose the most digits."""
    block = random_block(seed, n=3, dim=3, heads=1)
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return block.replace(
        w_q=block.w_q * (1 - first),
        w_k=block.w_k / torch.where(first > 0, max(1.0, magnitude), 1.0),
        b_q=magnitude * first[None],
        b_k=magnitude * first[None],
    )


def exact_jacobian(block: Attention) -> Any:
    """The Jacobian of a self-attention block with one head, biases and no mask, as an mpmath matrix."""

    def matrix(tensor: torch.Tensor | None) -> Any:
        assert tensor is not None
        return mp.matrix(tensor.tolist())

    x, w_q, w_k, w_v, w_o = (matrix(t) for t in (block.x, block.w_q[0], block.w_k[0], block.w_v[0], block.w_o[0]))
    n, dim = block.x.shape
    ones = mp.matrix([[1]] * n)
    q, k, v = (x * w + ones * matrix(b) for w, b in ((w_q, block.b_q), (w_k, block.b_k), (w_v, block.b_v)))
    scale = mp.mpf(block.scale_value)
    exponentials = (scale * q * k.T).apply(mp.exp)
    sums = [sum(exponentials[i, j] for j in range(n)) for i in range(n)]

    def product(tangent: Any) -> Any:
        change = scale * (tangent * w_q * k.T + q * (tangent * w_k).T)
        maps, moved = mp.matrix(n, n), mp.matrix(n, n)
        for i in range(n):
            for j in range(n):
                maps[i, j] = exponentials[i, j] / sums[i]
            mean = sum(maps[i, j] * change[i, j] for j in range(n))
            for j in range(n):
                moved[i, j] = maps[i, j] * (change[i, j] - mean)
        return (moved * v + maps * tangent * w_v) * w_o

    jacobian = mp.matrix(n * dim, n * dim)
    for column in range(n * dim):
        unit = mp.matrix(n, dim)
        unit[column // dim, column % dim] = 1
        image = product(unit)
        for row in range(n * dim):
            jacobian[row, column] = image[row // dim, row % dim]
    return jacobian


def exact_output(block: Attention, moving: torch.Tensor) -> Any:
    """The output of such a block at another input, without `b_o`, as a list of mpmath numbers."""

    def matrix(tensor: torch.Tensor | None) -> Any:
        assert tensor is not None
        return mp.matrix(tensor.tolist())

    x, w_o = matrix(moving), matrix(block.w_o[0])
    ones = mp.matrix([[1]] * len(moving))
    q, k, v = (
        x * matrix(w[0]) + ones * matrix(b)
        for w, b in ((block.w_q, block.b_q), (block.w_k, block.b_k), (block.w_v, block.b_v))
    )
    weights = (mp.mpf(block.scale_value) * q * k.T).apply(mp.exp)
    rows = range(len(moving))
    maps = mp.matrix([[weights[i, j] / sum(weights[i, :]) for j in rows] for i in rows])
    return list(maps * v * w_o)


def error(computed: torch.Tensor, exact: Any) -> torch.Tensor:
    """|computed - exact|, subtracted before it is rounded."""
    differences = [float(abs(mp.mpf(c) - e)) for c, e in zip(computed.flatten().tolist(), exact, strict=True)]
    return torch.tensor(differences, dtype=torch.float64).reshape(computed.shape)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_rounding_errors_stay_below_their_bound(magnitude: float) -> None:
    largest = 0.0
    for seed in range(4):
        block = cancelling_block(seed, magnitude)
        jacobian, roundoff = exact_jacobian(block), Roundoff(block)
        v, u = draw(3, 3, seed=seed + 1), draw(3, 3, seed=seed + 2)
        errors = (
            (error(block.jvp(v), jacobian * mp.matrix(v.flatten().tolist())), roundoff.jvp(v.abs())),
            (error(block.vjp(u), jacobian.T * mp.matrix(u.flatten().tolist())), roundoff.vjp(u.abs())),
        )
        for committed, limit in errors:
            assert bool((committed <= limit).all())
            largest = max(largest, float((committed / limit).max()))
    assert largest > 1e-4  # a vacuous bound would hold too


def test_rounding_of_a_long_sum_stays_below_its_bound() -> None:
    """1 and 4095 numbers just below the rounding unit of 1: each addition to the 1 loses one of them."""
    size = 4096
    zero, one = torch.zeros(1, size, 1, dtype=torch.float64), torch.ones(1, size, 1, dtype=torch.float64)
    block = Attention(x=one.mT[0], w_q=zero, w_k=zero, w_v=one, w_o=one[:, :1])
    tangent = torch.full((1, size), 0.9 * UNIT_ROUNDOFF, dtype=torch.float64)
    tangent[0, 0] = 1
    lost = abs(Fraction(float(block.jvp(tangent))) - sum(map(Fraction, tangent[0].tolist())))
    assert 100 * UNIT_ROUNDOFF < lost <= float(Roundoff(block).jvp(tangent))


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_estimators_stay_on_their_side_of_the_exact_norm(magnitude: float) -> None:
    for seed in range(2):
        block = cancelling_block(seed, magnitude)
        norm = mpmath.svd_r(exact_jacobian(block), compute_uv=False)[0]
        for spec in (lanczos, power_iteration):
            assert mp.mpf(float(spec(block, steps=9).value)) <= norm
        for spec in (exact, lanczos_certificate):
            assert mp.mpf(float(spec(block).value)) >= norm


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_rounding_errors_of_the_output_stay_below_their_bound(magnitude: float) -> None:
    largest = 0.0
    for seed in range(4):
        block = cancelling_block(seed, magnitude).replace(b_o=None)
        committed, limit = error(block.forward(), exact_output(block, block.x)), Roundoff(block).forward()
        assert bool((committed <= limit).all())
        largest = max(largest, float((committed / limit).max()))
    assert largest > 1e-4  # a vacuous bound would hold too


def test_quotients_are_below_the_exact_ones_where_rounding_decides() -> None:
    refuted = 0
    for seed, magnitude in ((0, 1.0), (1, 30.0), (2, 1e3)):
        block = cancelling_block(seed, magnitude).replace(b_o=None)
        for radius in (1e-12, 1e-9, 1e-3):
            ball = Ball(block, radius, seed)
            pairs = ball.points(ball.uniform_steps(6)).chunk(2)
            values = quotients(ball, *pairs)
            plain = (block.at(pairs[0]).forward() - block.at(pairs[1]).forward()).flatten(-2).norm(dim=-1)
            for y, z, value, computed in zip(*pairs, values.tolist(), plain.tolist(), strict=True):
                outputs = zip(exact_output(block, y), exact_output(block, z), strict=True)
                change = mp.sqrt(sum((a - b) ** 2 for a, b in outputs))
                moved = zip(y.flatten().tolist(), z.flatten().tolist(), strict=True)
                quotient = change / mp.sqrt(sum((mp.mpf(a) - mp.mpf(b)) ** 2 for a, b in moved))
                assert mp.mpf(value) <= quotient
                assert value > 0.99 * quotient or radius < 1e-4
                refuted += computed > change
    assert refuted  # without the subtraction some would be too large


def test_a_jacobian_that_is_zero_but_for_rounding_has_the_lower_bound_zero() -> None:
    """With equal keys the query cannot move the output; the computed softmax derivative does not vanish."""
    same = draw(1, 6, seed=3).expand(3, 6)
    block = random_block(memory=same, moves="query", logit_bias=draw(4, 3, seed=4))
    assert float(block.jvp(draw(4, 6, seed=5)).abs().max()) > 0
    assert float(lanczos(block).value) == 0
    assert float(power_iteration(block).value) == 0
    assert 0 < float(exact(block).value) < 1e-10


def test_a_scale_that_one_direction_gave_may_be_far_too_small() -> None:
    """One key decides the norm, and the probe is blind to it: J v / scale is near the end of the floats."""
    block = random_block(1, n=3)
    operator = JacobianOperator(block)
    operator.scale = torch.full_like(operator.scale, 2.0**-900)
    value, residual = attained(operator, sphere(operator.batch_shape, operator.size, torch.Generator(), block.device))
    assert 0 < value <= true_norm(block)
    assert residual == torch.inf


def test_the_scale_is_not_below_what_rounding_may_stretch() -> None:
    """Rows that rest on one key: one direction is stretched by 1e-200, another by all of the rounding."""
    tokens = torch.tensor([[1.0], [0.3]], dtype=torch.float64)
    keys = torch.tensor([[0.0], [1.0], [0.3]], dtype=torch.float64)
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    block = Attention(x=tokens, w_q=2e3 * weight, w_k=weight, w_v=weight, w_o=weight, memory=keys, moves="query")
    operator = JacobianOperator(block)
    vectors = sphere(operator.batch_shape, operator.size, torch.Generator(), block.device)
    assert operator.stretch_error(vectors) < 100
    assert lanczos(block).value == 0


@pytest.mark.parametrize("finite_mask", [-1e4, torch.finfo(torch.float32).min])
def test_a_finite_mask_costs_no_accuracy(finite_mask: float) -> None:
    hidden = torch.ones(4, 4, dtype=torch.float64).triu(1)
    block = random_block(logit_bias=finite_mask * hidden)
    assert float(exact(block).value) == pytest.approx(float(true_norm(random_block(causal=True))), rel=1e-8)


def test_logits_beyond_the_digits_of_float64_give_a_wide_but_finite_answer() -> None:
    block = random_block(n=3, x=1e9 * draw(3, 6, seed=1))
    assert float(lanczos(block).value) <= float(exact(block).value) < float("inf")


HADAMARD = torch.tensor([[1.0]], dtype=torch.float64)
for _ in range(6):
    HADAMARD = torch.cat([torch.cat([HADAMARD, HADAMARD], 1), torch.cat([HADAMARD, -HADAMARD], 1)])
KNOWN_NORMS = [
    (torch.ones(64, 4, dtype=torch.float64), 16.0),
    (torch.ones(9, 4, dtype=torch.float64), 6.0),
    (HADAMARD, 8.0),
    (HADAMARD[:, :5], 8.0),
    (torch.diag(torch.tensor([3e-200, 1e-250], dtype=torch.float64)), 3e-200),
    (torch.zeros(3, 2, dtype=torch.float64), 0.0),
    (torch.full((1, 1), -7.0, dtype=torch.float64), 7.0),
]


def test_verified_norm_of_matrices_with_a_known_norm() -> None:
    for matrix, norm in KNOWN_NORMS:
        assert norm <= float(verified_norm(matrix)) <= norm * (1 + 1e-11)


def test_verified_norm_does_not_trust_the_eigensolver(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: 0.5 * solver(matrix))
    for matrix, norm in KNOWN_NORMS:
        assert norm <= float(verified_norm(matrix)) <= 2 * norm


def test_start_vectors_have_the_moments_of_the_uniform_sphere() -> None:
    vectors = sphere(torch.Size([4000]), 10, torch.Generator().manual_seed(0), torch.device("cpu"))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4000, dtype=torch.float64), rtol=1e-14, atol=0)
    assert float(vectors.mean(0).abs().max()) < 0.02
    second = vectors.mT @ vectors / 4000
    torch.testing.assert_close(second, torch.eye(10, dtype=torch.float64) / 10, rtol=0, atol=0.01)
    assert float(vectors.pow(4).mean()) == pytest.approx(3 / (10 * 12), rel=0.05)


def test_cast_down_takes_the_next_float_below() -> None:
    value = torch.tensor([1.0, 1 + 1e-12, -1 - 1e-12, 1e300, 0.0], dtype=torch.float64)
    down = cast_down(value, torch.float32)
    assert bool((down.double() <= value).all())
    expected = [1.0, 1.0, torch.nextafter(torch.tensor(-1.0), torch.tensor(-2.0)), torch.finfo(torch.float32).max, 0.0]
    assert down.tolist() == expected
