"""Estimators of the Lipschitz constant on a ball: random points, gradient ascent, CLEVER."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from scipy import stats

from lipbounds import Attention, BoundSpec, InvalidInput, get, select
from lipbounds.claims import FEATURES
from lipbounds.estimators import _measured
from lipbounds.estimators._ball import Ball
from lipbounds.estimators._weibull import fit_reverse_weibull
from lipbounds.estimators.ascent import ascent_jacobians, ascent_pairs
from lipbounds.estimators.clever import clever
from lipbounds.estimators.exact import exact
from lipbounds.estimators.sampling import random_jacobians, random_pairs
from verify.unit.blocks import random_block


PAIRS, JACOBIANS = (random_pairs, ascent_pairs), (random_jacobians, ascent_jacobians)
LOWER = (*PAIRS, *JACOBIANS)


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "query moves": {"memory": draw(3, 6), "moves": "query"},
    "memory moves": {"memory": draw(3, 6), "moves": "memory"},
    "batch": {"x": draw(2, 1, 4, 6), "logit_bias": draw(2, 1, 1, 4, 4)},
    "batched weights": {
        "w_q": draw(3, 2, 6, 3),
        "w_k": draw(3, 2, 6, 3, seed=6),
        "w_v": draw(3, 2, 6, 3, seed=7),
        "w_o": draw(3, 2, 3, 6, seed=8),
        "biases": False,
    },
    "one number": {"n": 1, "dim": 1, "heads": 1},
    "zero": {"w_o": torch.zeros(2, 3, 6, dtype=torch.float64)},
}


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(**VARIANTS[request.param])


def averaging(value_norm: float = 3.0) -> Attention:
    """Constant logits: Y = (1/n) 1 1^T X M is linear, and its constant is the norm of M, everywhere."""
    zero = torch.zeros(1, 4, 2, dtype=torch.float64)
    singular = torch.diag(torch.tensor([value_norm, 1.0, 0.5, 0.1], dtype=torch.float64))[None]
    return Attention(x=draw(3, 4), w_q=zero, w_k=zero, w_v=singular, w_o=torch.eye(4, dtype=torch.float64)[None])


# -- the side of the lower bounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1e-2, 3.0])
def test_lower_bounds_are_below_the_proved_one(block: Attention, radius: float) -> None:
    upper = get("yudin2025_ball.biased")(block, radius).value
    for spec in LOWER:
        value = spec(block, radius).value
        assert value.shape == block.batch_shape
        assert bool(((value >= 0) & (value <= upper)).all()), spec.name


def test_at_the_centre_jacobians_give_the_norm_and_pairs_nothing(block: Attention) -> None:
    truth = exact(block).value
    for radius in (0.0, 1e-7):
        for spec in JACOBIANS:
            torch.testing.assert_close(spec(block, radius).value, truth, rtol=1e-3, atol=0)
    torch.testing.assert_close(clever(block, 1e-7, steps=12).value, truth, rtol=1e-3, atol=0)
    for spec in PAIRS:
        assert bool((spec(block, 0.0).value == 0).all())
    torch.testing.assert_close(ascent_pairs(block, 1e-5).value, truth, rtol=0.02, atol=0)


def test_points_are_in_the_ball_in_exact_arithmetic() -> None:
    for size in (1.0, 1e8):
        block = random_block(x=size * draw(2, 6))
        for radius in (1e-12, 1e-7, 1.0, 1e9):
            ball = Ball(block, radius, seed=0)
            steps = 3 * radius * draw(20, 2, 6, seed=1)
            points = torch.cat([ball.points(steps), ball.points(ball.uniform_steps(20))])
            for point in points:
                pairs = zip(point.flatten().tolist(), block.x.flatten().tolist(), strict=True)
                assert sum((Fraction(p) - Fraction(c)) ** 2 for p, c in pairs) <= Fraction(radius) ** 2
            reached = (points[:20] - ball.centre).norm(dim=(-2, -1)) / radius
            assert bool((reached > 0.99).all()) or radius < 1e-6 * size


def test_points_are_uniform_in_the_ball() -> None:
    ball = Ball(averaging(), 2.0, seed=0)
    steps = ball.uniform_steps(4000)
    lengths = steps.norm(dim=(-2, -1)) / 2
    assert stats.kstest((lengths**12).numpy(), "uniform").statistic < 0.03
    assert float(steps.mean(0).abs().max()) < 0.05


@pytest.mark.parametrize("radius", [1e-14, 10.0])
def test_a_linear_block_has_its_norm_on_every_ball(radius: float) -> None:
    for spec in LOWER:
        assert float(spec(averaging(), radius).value) <= 3
    for spec in JACOBIANS:
        assert float(spec(averaging(), radius).value) == pytest.approx(3, rel=1e-12)
    if radius > 1:
        assert float(ascent_pairs(averaging(), radius, steps=40).value) == pytest.approx(3, rel=1e-3)


def test_an_output_bias_costs_a_pair_nothing() -> None:
    shifted = averaging().replace(b_o=torch.full((4,), 1e12, dtype=torch.float64))
    for spec in PAIRS:
        assert float(spec(shifted, 0.1).value) == float(spec(averaging(), 0.1).value) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_rounded_down_to_the_dtype_of_the_block(dtype: torch.dtype) -> None:
    block = random_block(3).to(dtype)
    for spec in LOWER:
        value, wide = spec(block, 0.5).value, spec(block.double, 0.5).value
        assert value.dtype == dtype
        assert float(wide) * (1 - 2 * torch.finfo(dtype).eps) <= float(value) <= float(wide)


# -- how far they come --------------------------------------------------------------------------------------------


def test_ascent_beats_random_points() -> None:
    """With as many points to look at: 16 to choose the starts from, and one for each start, step and restart."""
    for seed in range(3):
        block = random_block(seed)
        assert float(ascent_pairs(block, 1.0).value) > 2 * float(random_pairs(block, 1.0, samples=200).value)
        found = float(ascent_jacobians(block, 0.1, steps=12, restarts=4).value)
        assert found > 1.02 * float(random_jacobians(block, 0.1, samples=16 + 4 * 13).value)


def test_more_effort_never_lowers_the_start() -> None:
    """The centre is always looked at, and what the ascent has seen is never forgotten."""
    for seed in range(2):
        block = random_block(seed)
        at_centre = ascent_jacobians(block, 0.0).value
        for steps in (1, 5):
            assert bool((ascent_jacobians(block, 2.0, steps=steps, restarts=1).value >= at_centre).all())


def test_results_are_determined_by_the_seed() -> None:
    block = random_block()
    for spec in (*LOWER, clever):
        assert torch.equal(spec(block, 0.5, seed=1).value, spec(block, 0.5, seed=1).value)
        assert not torch.equal(spec(block, 0.5, seed=1).value, spec(block, 0.5, seed=2).value)


def test_points_in_small_chunks_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    block = random_block(1, x=draw(2, 4, 6))
    before = {spec.name: spec(block, 0.5).value for spec in (random_pairs, random_jacobians)}
    monkeypatch.setattr(_measured, "CHUNK_ENTRIES", 1000)
    assert _measured.points_per_chunk(Ball(block, 0.5, 0)) == 10
    for name, value in before.items():
        torch.testing.assert_close(get(name)(block, 0.5).value, value, rtol=0.5, atol=0)


def test_gradients_of_the_caller_are_left_alone() -> None:
    block = random_block(w_q=draw(2, 6, 3).requires_grad_())
    for spec in (*LOWER, clever):
        assert not spec(block, 0.1).value.requires_grad
        with torch.no_grad():
            assert bool((spec(block, 0.1).value > 0).all())
    assert block.w_q.grad is None
    assert block.queries.requires_grad


def test_logits_that_overflow_in_a_large_ball_give_no_number() -> None:
    block = random_block(w_q=1e160 * draw(2, 6, 3), w_k=1e140 * draw(2, 6, 3))
    for spec in PAIRS:
        assert bool(spec(block, 1e20).value.isfinite().all())


# -- CLEVER -------------------------------------------------------------------------------------------------------


def test_clever_comes_near_the_supremum_with_enough_points() -> None:
    for seed in range(2):
        block = random_block(seed, n=2, dim=2, heads=1)
        result = clever(block, 0.3, batches=40, samples=20, steps=4)
        supremum = float(ascent_jacobians(block, 0.3, steps=60, restarts=8).value)
        assert 0.9 < float(result.value) / supremum < 1.2
        assert float(result.value) > float(result.details["sampled"])
        assert 0 < float(result.details["ks_distance"]) < 0.25
        assert not bool(result.details["at_edge"])


def test_details_of_the_fit_are_finite(block: Attention) -> None:
    result = clever(block, 0.5)
    assert bool(result.value.isfinite().all())
    for name in ("ks_distance", "shape", "scale", "sampled", "at_edge"):
        assert result.details[name].shape == block.batch_shape
        assert bool(result.details[name].isfinite().all())
    assert bool((result.value >= result.details["sampled"]).all())


def test_one_number_repeated_is_returned() -> None:
    result = clever(averaging(), 1.0)
    assert float(result.value) == pytest.approx(3, rel=1e-12)
    assert float(result.details["ks_distance"]) == float(result.details["scale"]) == 0


@pytest.mark.parametrize("shape", [1.5, 3.0, 8.0])
def test_fit_is_that_of_largest_likelihood(shape: float) -> None:
    values = stats.weibull_max.rvs(shape, loc=5, scale=2, size=(300, 2), random_state=1)
    fit = fit_reverse_weibull(torch.from_numpy(values))
    for i in range(2):
        own = (float(fit.shape[i]), float(fit.location[i]), float(fit.scale[i]))
        best = stats.weibull_max.fit(values[:, i], shape, loc=5, scale=2)
        reached, possible = (stats.weibull_max.logpdf(values[:, i], *p).sum() for p in (own, best))
        assert reached > possible - 0.01
        distance = stats.kstest(values[:, i], "weibull_max", args=own).statistic
        assert float(fit.distance[i]) == pytest.approx(distance, rel=1e-9)
        assert not bool(fit.at_edge[i])


def test_data_without_an_end_point_is_said_to_be() -> None:
    levels = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    fit = fit_reverse_weibull(-(-levels.log()).log())  # quantiles of Gumbel's distribution
    assert bool(fit.at_edge)


def test_fit_moves_and_stretches_with_the_data() -> None:
    values = torch.from_numpy(stats.weibull_max.rvs(2.0, size=60, random_state=2))
    one, other = fit_reverse_weibull(values), fit_reverse_weibull(1e-6 * values + 7)
    torch.testing.assert_close(other.location, 1e-6 * one.location + 7, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.scale, 1e-6 * one.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.distance, one.distance, rtol=1e-6, atol=0)


# -- errors -------------------------------------------------------------------------------------------------------

BAD: list[tuple[BoundSpec, dict[str, Any], str]] = [
    (random_pairs, {"samples": 0}, "samples=0"),
    (random_pairs, {"seed": -1}, "seed=-1"),
    (random_pairs, {"steps": 3}, r"got \['steps'\]"),
    (random_jacobians, {"samples": 1.5}, "samples=1.5"),
    (random_jacobians, {"steps": True}, "steps=True"),
    (random_jacobians, {"seed": 2**63}, "seed=9223372036854775808"),
    (ascent_pairs, {"restarts": 0}, "restarts=0"),
    (ascent_pairs, {"steps": 0}, "steps=0"),
    (ascent_jacobians, {"restarts": "4"}, "restarts='4'"),
    (ascent_jacobians, {"seed": 0.5}, "seed=0.5"),
    (clever, {"batches": 4}, "batches must be at least 5"),
    (clever, {"batches": 0}, "batches=0"),
    (clever, {"samples": 0}, "samples=0"),
    (clever, {"steps": 0}, "steps=0"),
    (clever, {"seed": -1}, "seed=-1"),
]


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(("spec", "options", "message"), BAD, ids=lambda v: v.name if isinstance(v, BoundSpec) else "")
def test_bad_options_are_named(spec: BoundSpec, options: dict[str, Any], message: str) -> None:
    block = random_block()
    with pytest.raises(InvalidInput, match=message):
        spec(block, 0.1, **options)


def test_registered_with_their_kind_and_for_every_block() -> None:
    specs = {spec.name: spec for spec in select(role="estimator", scope="ball")}
    kinds = {name: spec.claim.kind for name, spec in specs.items()}
    assert {spec.name: "lower" for spec in LOWER} | {"clever": "estimate"} == kinds
    assert all(spec.supports == set(FEATURES) for spec in specs.values())
