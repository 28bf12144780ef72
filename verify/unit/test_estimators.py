"""Estimators against automatic differentiation, dense decompositions, exact arithmetic and known norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lipbounds import Attention, InvalidInput
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators.exact import exact, exact_norm, jacobian
from lipbounds.estimators.lanczos import lanczos, lanczos_certificate
from lipbounds.estimators.power import power_iteration
from lipbounds.registry import select
from verify.unit.blocks import random_block


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_item(value_scales: list[float]) -> dict[str, Any]:
    """Weights of one block an item, at one input for all; the value weights of item i times `value_scales[i]`."""
    items = len(value_scales)
    shapes = {"w_q": (6, 3), "w_k": (6, 3), "w_v": (6, 3), "w_o": (3, 6)}
    weights = {name: draw(items, 2, *shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    weights["w_v"] = weights["w_v"] * torch.tensor(value_scales, dtype=torch.float64).view(-1, 1, 1, 1)
    return weights | {"biases": False}


VARIANTS: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "query moves": {"memory": draw(3, 6), "moves": "query"},
    "memory moves": {"memory": draw(3, 6), "moves": "memory"},
    "more outputs than inputs": {"w_o": draw(2, 3, 11), "biases": False},
    "fewer outputs than inputs": {"w_o": draw(2, 3, 2), "b_o": draw(2)},
    "one token": {"x": draw(1, 6)},
    "one feature": {"dim": 1, "heads": 1},
    "one number": {"dim": 1, "heads": 1, "n": 1},
    "batch": {"x": draw(2, 3, 4, 6)},
    "batched weights": per_item([1, 0, 1e-100]),
    "zero": {"w_o": torch.zeros(2, 3, 6, dtype=torch.float64)},
    "tiny": {"w_o": 1e-180 * draw(2, 3, 6), "biases": False},
    "huge": {"w_o": 1e180 * draw(2, 3, 6), "biases": False},
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(**VARIANTS[request.param])


def dense(block: Attention) -> torch.Tensor:
    """`[*batch, out, in]` by automatic differentiation of the plain function, one batch item at a time."""
    moving, function = block.moving_input, block.function()
    size = moving.shape[-2:].numel()
    items = moving.expand(*block.batch_shape, *moving.shape[-2:]).reshape(-1, *moving.shape[-2:])
    rows = []
    for number, item in enumerate(items):
        place = math.prod(block.batch_shape)
        full = torch.func.jacrev(lambda m: function(m.expand(*block.batch_shape, *m.shape)))(item)
        rows.append(full.reshape(place, -1, size)[number])
    return torch.stack(rows).reshape(*block.batch_shape, -1, size)


def dense_norm(block: Attention) -> torch.Tensor:
    jacobian = dense(block)
    scale = jacobian.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)
    return torch.linalg.svdvals(jacobian / scale)[..., 0] * scale[..., 0, 0]


def diagonal(singular_values: torch.Tensor, items: int = 1) -> Attention:
    """`items` copies of a block of one token, whose Jacobian is diag(singular_values)."""
    size = len(singular_values)
    zero = torch.zeros(1, size, 1, dtype=torch.float64)
    return Attention(
        x=torch.ones(items, 1, size, dtype=torch.float64),
        w_q=zero,
        w_k=zero,
        w_v=torch.diag(singular_values)[None],
        w_o=torch.eye(size, dtype=torch.float64)[None],
    )


# -- agreement on small blocks ------------------------------------------------------------------------------------


def test_jacobian_equals_automatic_differentiation(block: Attention) -> None:
    expected = dense(block)
    scale = float(expected.abs().max())
    torch.testing.assert_close(jacobian(block), expected, rtol=1e-10, atol=1e-13 * scale)


def test_exact_is_the_largest_singular_value_rounded_up(block: Attention) -> None:
    truth = dense_norm(block)
    value = exact(block).value
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)
    assert bool((value >= truth * (1 - 1e-13)).all())  # the reference itself is rounded to nearest


def test_lower_bounds_reach_the_truth_from_below(block: Attention) -> None:
    truth = dense_norm(block)
    for method, steps, tolerance in ((lanczos, 24, 1e-8), (power_iteration, 15, 0.1)):
        result = method(block, steps=steps)
        assert bool((result.value <= truth * (1 + 1e-13)).all())
        torch.testing.assert_close(result.value, truth, rtol=tolerance, atol=0)
        assert float(result.details["residual"].max()) < 10 * tolerance


@pytest.mark.parametrize("steps", [1, 2])
def test_lower_bounds_are_lower_before_convergence(block: Attention, steps: int) -> None:
    truth = dense_norm(block)
    for method in (lanczos, power_iteration):
        value = method(block, steps=steps, seed=steps).value
        assert bool((value <= truth * (1 + 1e-13)).all())
        assert bool((value >= 0).all())


def test_certificate_on_a_small_block_is_the_dense_norm(block: Attention) -> None:
    result = lanczos_certificate(block, delta=1e-12)
    torch.testing.assert_close(result.value, exact(block).value, rtol=0, atol=0)
    assert result.delta == 1e-12
    assert bool((result.details["delta"] == 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_in_the_dtype_of_the_block_stay_on_their_side(dtype: torch.dtype) -> None:
    block = random_block(3).to(dtype)
    truth = dense_norm(block.double)
    upper, lower = exact(block).value, lanczos(block).value
    assert upper.dtype == lower.dtype == dtype
    assert float(lower) <= float(truth) <= float(upper)
    assert float(upper) == pytest.approx(float(truth), rel=2 * torch.finfo(dtype).eps)
    assert float(lower) == pytest.approx(float(truth), rel=2 * torch.finfo(dtype).eps)


def test_estimators_leave_the_gradients_of_later_bounds_alone() -> None:
    block = random_block(w_q=draw(2, 6, 3).requires_grad_())
    for spec in (exact, lanczos, lanczos_certificate, power_iteration):
        assert not spec(block).value.requires_grad
    assert block.queries.requires_grad


# -- the Krylov space ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [0, 1, 2, 5])
def test_lanczos_survives_an_exhausted_krylov_space(distinct: int) -> None:
    values = torch.zeros(40, dtype=torch.float64)
    values[: 5 * distinct] = torch.arange(1, distinct + 1, dtype=torch.float64).repeat_interleave(5)
    block = diagonal(values, items=3)
    result = lanczos(block, steps=20)
    assert result.value.tolist() == pytest.approx([distinct] * 3, rel=1e-12)
    assert bool((result.details["residual"] < 1e-10).all())
    certificate = lanczos_certificate(block, steps=20)
    assert bool((certificate.value >= distinct).all())
    assert torch.equal(certificate.terms["relative_inflation"] > 0.1, torch.ones(3, dtype=torch.bool))
    assert bool((certificate.value <= 1.5 * distinct).all())


def test_lanczos_finds_a_clustered_top_that_power_iteration_misses() -> None:
    values = torch.linspace(0, 1, 300, dtype=torch.float64)
    block = diagonal(values)
    assert float(lanczos(block, steps=40).value) > 1 - 1e-4
    assert float(power_iteration(block, steps=40).value) < 1 - 1e-3


@pytest.mark.parametrize("spread", [1e-6, 1e-11, 1e-14])
def test_ritz_vector_is_a_unit_vector_on_a_cluster(spread: float) -> None:
    """A times q is nearly q here, so what is left after one projection is mostly rounding."""
    values = 1 + spread * draw(60)
    operator = JacobianOperator(diagonal(values, items=2))
    theta, vector = largest_ritz_pair(operator, 20, seed=0)
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(vector.norm(dim=-1), one, rtol=1e-13, atol=0)
    torch.testing.assert_close(theta * operator.scale.square() / values.max() ** 2, one, rtol=1e-7, atol=0)


def test_result_is_determined_by_the_seed() -> None:
    block = diagonal(torch.linspace(0, 1, 300, dtype=torch.float64))
    assert float(lanczos(block, steps=5, seed=1).value) == float(lanczos(block, steps=5, seed=1).value)
    assert float(lanczos(block, steps=5, seed=1).value) != float(lanczos(block, steps=5, seed=2).value)


# -- the certificate ----------------------------------------------------------------------------------------------


def test_certificate_fails_as_rarely_as_it_says_on_a_hard_spectrum() -> None:
    steps, delta, size = 8, 0.3, 100
    e = (math.log(1.648 * math.sqrt(size) / delta) / (2 * steps - 1)) ** 2
    # The eigenvalues where the Chebyshev polynomial of the proof is large: the inequality is nearly sharp here.
    eigenvalues = (1 - e) * torch.cos(torch.linspace(0, math.pi / 2, size - 1, dtype=torch.float64)).square()
    block = diagonal(torch.cat([torch.ones(1, dtype=torch.float64), eigenvalues.sqrt()]), items=1000)
    result = lanczos_certificate(block, delta=delta, steps=steps)
    failures = float((result.value < 1).double().mean())
    assert 0.05 < failures < delta  # none at all would mean that the spectrum tests nothing
    half = result.terms["ritz"] / math.sqrt(1 - e / 2)
    assert float((half < 1).double().mean()) > delta


def test_certificate_has_the_published_size() -> None:
    block = diagonal(torch.linspace(0, 1, 1000, dtype=torch.float64))
    result = lanczos_certificate(block)
    e = (math.log(1.648 * math.sqrt(1000) / 1e-9) / 119) ** 2
    assert float(result.terms["relative_inflation"]) == pytest.approx(1 / math.sqrt(1 - e) - 1, rel=1e-9)
    assert float(result.value) == pytest.approx(float(result.terms["ritz"]) / math.sqrt(1 - e), rel=1e-9)
    assert 1 <= float(result.value) < 1.03


def test_certificate_names_the_steps_it_needs() -> None:
    block = diagonal(torch.linspace(0, 1, 300, dtype=torch.float64))
    with pytest.raises(InvalidInput, match="needs at least steps=13, got steps=12"):
        lanczos_certificate(block, steps=12)
    assert float(lanczos_certificate(block, steps=13).value) >= 1


# -- larger blocks without a Jacobian -----------------------------------------------------------------------------


def test_matrix_free_norm_equals_a_known_norm_at_4096_inputs() -> None:
    """With constant logits Y = (1/n) 1 1^T X M, whose norm is that of M."""
    zero = torch.zeros(1, 64, 8, dtype=torch.float64)
    block = Attention(x=draw(64, 64), w_q=zero, w_k=zero, w_v=draw(1, 64, 64, seed=1), w_o=draw(1, 64, 64, seed=2))
    truth = float(torch.linalg.matrix_norm(block.w_v[0] @ block.w_o[0], 2))
    assert float(lanczos(block).value) == pytest.approx(truth, rel=1e-8)
    assert float(lanczos(block).value) <= truth
    assert truth <= float(lanczos_certificate(block).value) <= 1.03 * truth


def test_matrix_free_norm_equals_power_iteration_by_automatic_differentiation() -> None:
    block = random_block(1, n=64, dim=64, heads=1).replace(scale=0.01)
    function, vector = block.function(), draw(64, 64)
    for _ in range(40):
        image = torch.func.jvp(function, (block.x,), (vector,))[1]
        vector = torch.func.vjp(function, block.x)[1](image)[0]
        vector = vector / vector.norm()
    norm = float(torch.func.jvp(function, (block.x,), (vector,))[1].norm())
    assert float(lanczos(block).value) == pytest.approx(norm, rel=1e-8)
    assert norm <= float(lanczos_certificate(block).value)


# -- errors ---------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no target": (lambda: exact_norm(torch.ones(2)), InvalidInput, "moving_input"),  # type: ignore[arg-type]
    "steps": (lambda: lanczos(random_block(), steps=0), InvalidInput, "steps=0"),
    "power steps": (lambda: power_iteration(random_block(), steps=1.5), InvalidInput, "steps=1.5"),
    "seed": (lambda: lanczos(random_block(), seed=-1), InvalidInput, "seed=-1"),
    "delta": (lambda: lanczos_certificate(random_block(), delta=0.0), InvalidInput, "delta=0.0"),
    "delta too large": (lambda: lanczos_certificate(random_block(), delta=1.0), InvalidInput, "delta=1.0"),
    "overflow": (
        lambda: lanczos(random_block(w_o=1e200 * draw(2, 3, 6), w_v=1e200 * draw(2, 6, 3))),
        InvalidInput,
        "Jacobian must be finite",
    ),
    "too large": (lambda: exact(random_block(n=12_000, dim=1, heads=1)), InvalidInput, "use lipbounds.truth"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_estimators_are_registered_with_their_kind() -> None:
    kinds = {spec.name: spec.claim.kind for spec in select(role="estimator")}
    expected = {
        "exact": "proved",
        "lanczos": "lower",
        "lanczos_certificate": "probable",
        "power_iteration": "lower",
    }
    assert expected.items() <= kinds.items()
