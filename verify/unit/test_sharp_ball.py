"""The sharp bounds on a ball and the suprema they are made of, against points of the ball and derivatives there."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.bounds import sharp_ball
from lipbounds.derivatives.ball.first import BallDerivatives, Centre, centre_of
from lipbounds.derivatives.ball.rows import joint_norms
from lipbounds.derivatives.ball.suprema import logit_gradient_moment
from lipbounds.derivatives.ball.third import BallThirdDerivative
from lipbounds.derivatives.first import dense as attention_dense
from lipbounds.derivatives.first import gram_norm as attention_gram_norm
from lipbounds.derivatives.first.dense import dense_norm
from lipbounds.derivatives.first.differential_parts import differential_parts
from lipbounds.ops.interval import softmax_interval, variance_interval_upper
from lipbounds.targets.projection import project
from lipbounds.targets.rms_norm import normalise
from lipbounds.targets.rotary import rotate
from lipbounds.testing.contract import CHECKS
from lipbounds.testing.relation_checks import EXPONENTS
from verify.unit.blocks import normed, random_block, true_norm, turned


ENDINGS = ("", ".direct", ".deviation", ".taylor")
BALL, DIRECT, DEVIATION, TAYLOR = EVERY = [lipbounds.get(f"sharp_ball{ending}") for ending in ENDINGS]
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "causal": {"causal": True},
    "one head": {"heads": 1, "biases": False},
    "three heads": {"heads": 3},
    "query": {"memory": random_block(3, n=5).x, "moves": "query"},
    "memory": {"memory": random_block(3, n=5).x, "moves": "memory"},
    "one key": {"memory": random_block(3, n=1).x, "moves": "memory"},
    "rotary": turned(3),
    "rotary, memory": turned(3, 5) | {"memory": random_block(3, n=5).x, "moves": "memory"},
    "norm": normed(2),
    "norm of all, rotary, query": normed(2, "all_heads")
    | turned(3, 5)
    | {"memory": random_block(3, n=5).x, "moves": "query"},
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def block(request: pytest.FixtureRequest) -> Attention:
    return random_block(7, n=3, **CASES[request.param])


def small_block(seed: int, n: int, dim: int, heads: int, gain: float) -> Attention:
    """Without biases, weights of variance 1/dim, the queries times `gain`."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    width = dim // heads
    weights = [draw(heads, dim, width) * dim**-0.5 for _ in range(3)]
    return Attention(
        x=draw(n, dim), w_q=gain * weights[0], w_k=weights[1], w_v=weights[2], w_o=draw(heads, width, dim) * dim**-0.5
    )


def in_ball(block: Attention, radius: float, count: int, seed: int = 0) -> list[Attention]:
    """Random points on the sphere, half of them with all of the radius spent on one token."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, *block.moving_input.shape, generator=generator, dtype=torch.float64)
    token = torch.arange(count) % block.moving_input.shape[-2]
    alone = torch.nn.functional.one_hot(token, block.moving_input.shape[-2]).unsqueeze(-1)
    steps = torch.where((torch.arange(count) % 2 == 0)[:, None, None], steps, steps * alone)
    steps = radius * steps / steps.flatten(1).norm(dim=1)[:, None, None]
    return [block.at(block.moving_input + step) for step in steps]


def less_mean(block: Attention, rows: torch.Tensor) -> torch.Tensor:
    """Rows, [heads, m, D] or [heads, n, m, D] where each query sees others, less their mean under each row."""
    rows = rows.unsqueeze(-3) if rows.dim() == 3 else rows
    return rows - block.probabilities.unsqueeze(-2) @ rows


def gradients(block: Attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits in the token of the query and in that of the key, [heads, n, m, D], by automatic differentiation."""

    def logits(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        queries = normalise(project(x, block.w_q, block.b_q), block.query_norm)
        keys = normalise(project(memory, block.w_k, block.b_k), block.key_norm)
        return block.scale_value * rotate(queries, block.query_rotation) @ rotate(keys, block.key_rotation).mT

    by_query, by_key = torch.func.jacrev(logits, argnums=(0, 1))(block.query_input, block.source_input)
    return by_query.diagonal(dim1=1, dim2=3).movedim(-1, 1), by_key.diagonal(dim1=2, dim2=3).movedim(-1, 2)


def covariance(block: Attention, rows: torch.Tensor) -> torch.Tensor:
    """sum_h Cov_hi(rows_h), of rows in the space of tokens."""
    away = less_mean(block, rows)
    return torch.einsum("hij,hija,hijb->iab", block.probabilities, away, away)


# -- the bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [BALL, DEVIATION, TAYLOR], ids=lambda spec: spec.name)
def test_at_radius_zero_it_is_the_truth(spec: lipbounds.BoundSpec, block: Attention) -> None:
    torch.testing.assert_close(spec(block, 0.0).value, true_norm(block), rtol=1e-9, atol=0)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("radius", [0.01, 0.3, 2.0])
def test_above_the_truth_in_the_ball_by_ascent(block: Attention, radius: float) -> None:
    bound = min(spec(block, radius).value for spec in EVERY)
    centre = block.moving_input
    moving = in_ball(block, radius / 2, 1)[0].moving_input.clone().requires_grad_()
    for _ in range(15):
        reached = true_norm(block.at(moving))
        assert reached <= bound
        (gradient,) = torch.autograd.grad(reached, moving)
        if gradient.norm() == 0:  # with one key the block is linear
            break
        step = moving.detach() + 0.2 * radius * gradient / gradient.norm() - centre
        moving = (centre + step * min(1.0, radius / step.norm().item())).requires_grad_()


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_grows_with_the_radius(block: Attention) -> None:
    for spec in EVERY:
        values = torch.stack([spec(block, radius).value for radius in [0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3]])
        assert (values.diff() >= -1e-12 * values[1:]).all(), spec.name


def test_tends_to_the_truth_in_proportion_to_the_radius(block: Attention) -> None:
    slopes = [(BALL(block, radius).value - true_norm(block)) / radius for radius in (1e-4, 1e-5)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0.05, atol=1e-4)
    assert slopes[0] < (1e3 if block.features.isdisjoint(("rotary", "qk_norm")) else 2e3)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_the_least_of_four(block: Attention) -> None:
    for radius in (0.0, 0.1, 3.0):
        found = BALL(block, radius)
        # Of turned or normalised tokens the bound of that name knows more than its form in here.
        plain = block.features.isdisjoint(("rotary", "qk_norm"))
        theorem_3 = lipbounds.get("yudin2025_ball.biased")(block, radius).value
        last = theorem_3 if plain else found.details["theorem_3"]
        values = torch.stack([*(spec(block, radius).value for spec in (DIRECT, DEVIATION, TAYLOR)), last])
        torch.testing.assert_close(found.value, values.amin(), rtol=1e-12, atol=0)
        assert set(found.details) == {"taylor", "deviation", "direct", "theorem_3"}


# Intervals through the Jacobian (auto_LiRPA) and Theorem 3 over intervals (emltorch) on blocks of the same make, as
# multiples of the norm at the centre at radius 0.01 and 0.1, the better of the two (theory.md, section 3).
REFERENCES = {(8, 16, 2, 1): (1.43, 7.0), (8, 16, 2, 12): (3.37, 24.6), (32, 32, 4, 1): (2.31, 22.5)}


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [*REFERENCES, (32, 32, 4, 12)])
def test_below_what_others_reach(shape: tuple[int, int, int, int], seed: int) -> None:
    block = small_block(seed, *shape)
    references = REFERENCES.get(shape, (5.62, 151.0))
    centre = true_norm(block)
    for radius, reference in zip((0.01, 0.1), references, strict=True):
        assert BALL(block, radius).value < reference * centre


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_gradient() -> None:
    block = random_block(8, n=2, dim=4)
    for spec in (DIRECT, DEVIATION, TAYLOR):
        value = lambda x: spec(block.at(x), 0.2, grad=True).value  # noqa: B023, E731
        assert torch.autograd.gradcheck(value, block.x.clone().requires_grad_(), atol=1e-5), spec.name


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_gradient_for_the_weights() -> None:
    block = random_block(9, n=2, dim=2)
    for name in ("w_q", "w_k", "w_v", "w_o"):
        value = lambda w: BALL(block.replace(**{name: w}), 0.01, grad=True).value  # noqa: B023, E731
        assert torch.autograd.gradcheck(value, getattr(block, name).clone().requires_grad_(), atol=1e-5), name


def test_grouped_queries_are_repeated_heads() -> None:
    block = random_block(4, n=3, dim=6, heads=3)
    one = {name: getattr(block, name)[:1] for name in ("w_k", "w_v", "b_k", "b_v")}
    repeated = {name: value.expand(3, *value.shape[1:]) for name, value in one.items()}
    grouped = BALL(block.replace(**one), 0.1).value
    torch.testing.assert_close(grouped, BALL(block.replace(**repeated), 0.1).value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gram", [True, False])
def test_a_centre_too_large_to_form_is_bounded_at_the_point(
    monkeypatch: pytest.MonkeyPatch, block: Attention, gram: bool
) -> None:
    if not gram:
        monkeypatch.setattr(attention_gram_norm, "GRAM_WORK", (0,))
    known = torch.minimum(
        DIRECT(block, 0.0).value, sum(differential_parts(block), torch.zeros((), dtype=torch.float64))
    )
    known = torch.minimum(known, attention_gram_norm.gram_norm(block)) if gram else known
    for spec in (DEVIATION, TAYLOR):
        found = spec(block, 0.01, dense=1)
        torch.testing.assert_close(found.details["centre"], known, rtol=1e-9, atol=0)
        assert found.value > spec(block, 0.01).value


# -- the norm at the centre ---------------------------------------------------------------------------------------


def test_a_large_batch_goes_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_block(1, n=3)
    block = first.replace(
        x=torch.stack([first.x, 2 * first.x])[:, None],
        b_o=None,
        **{
            name: torch.stack([value, value.flip(0), -2 * value])
            for name in ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v")
            if (value := getattr(first, name)) is not None
        },
        logit_bias=torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float64).expand(3, 3).triu().contiguous(),
    )
    together = dense_norm(block)
    monkeypatch.setattr(attention_dense, "BATCH_ENTRIES", 1)
    alone = dense_norm(block.replace())
    assert together.shape == (2, 3)
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)


def test_the_norm_is_above_the_computed_one_by_rounding_only(block: Attention) -> None:
    excess = dense_norm(block) / true_norm(block) - 1
    assert 0 < excess < 1e-9


# -- suprema ------------------------------------------------------------------------------------------------------


def test_variance_over_an_interval() -> None:
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = torch.rand(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    allowed = variance_interval_upper(softmax_interval(logits, radius))
    reached = torch.zeros_like(allowed)
    for signs in torch.cartesian_prod(*[torch.linspace(-1, 1, 5, dtype=torch.float64)] * 4):
        p = (logits + signs * radius).softmax(-1)
        reached = torch.maximum(reached, p * (1 - p))
    assert (reached <= allowed).all()
    assert (reached >= 0.8 * allowed).all()


def test_variance_near_one_does_not_cancel() -> None:
    logits = torch.tensor([60.0, 0.0, 0.0], dtype=torch.float64)
    allowed = variance_interval_upper(softmax_interval(logits, torch.zeros_like(logits)))
    odds = 2 * torch.tensor(-60.0, dtype=torch.float64).exp()
    torch.testing.assert_close(allowed[0], odds / (1 + odds) ** 2, rtol=1e-9, atol=0)
    assert allowed[0] >= odds / (1 + odds) ** 2


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0])
def test_spreads_and_reach_hold_in_the_ball(block: Attention, radius: float) -> None:
    parts = BallDerivatives(Centre(block), radius)
    parts.second()
    tightest = 0.0
    for moved in in_ball(block, radius * (1 - 1e-9), 60) if radius else [block]:
        values = moved.values @ moved.w_o
        found = [(covariance(moved, values), parts._sg)]
        by_query, by_key = gradients(moved)
        if block.query_moves:
            found.append((covariance(moved, by_query), parts._om))
            assert (less_mean(moved, by_query).norm(dim=-1) <= parts._keys.far).all()
        assert (less_mean(moved, values).norm(dim=-1) <= parts._values.far).all()
        for matrix, spread in found:
            norms, allowed = torch.linalg.matrix_norm(matrix, 2).sqrt(), spread.joint(parts.centre.even)
            assert (norms <= allowed).all()
            tightest = max(tightest, (norms / allowed).max().item())
        if block.memory_moves:
            gram = torch.einsum("hij,hija,hijb->ijab", parts.maps.pairs, by_key, by_key)
            allowed = logit_gradient_moment(parts.queries, parts._query_radius, parts.maps.pairs)
            assert (torch.linalg.matrix_norm(gram, 2) <= allowed).all()
    assert tightest > 0.2 or block.source_input.shape[-2] == 1


def test_the_variance_of_a_row_is_within_its_pairs() -> None:
    """J(P) <= diag(pairs) in the Loewner order; not with the least of two diagonals in each entry, nor with half."""
    block = small_block(0, 6, 8, 2, 6.0)
    p, pairs = block.probabilities, BallDerivatives(Centre(block), 0.0).maps.pairs
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    assert (p.amax(-1) > 0.6).any()
    assert (p.amax(-1) < 0.5).any()
    smallest = lambda diagonal: torch.linalg.eigvalsh(torch.diag_embed(diagonal) - jacobian).amin()  # noqa: E731
    assert smallest(pairs) > -1e-12
    assert smallest(torch.minimum(p, 2 * p * (1 - p))) < -0.01
    assert smallest(p * (1 - p)) < -0.01
    assert (pairs < 0.5 * p).any()


@pytest.mark.parametrize("radius", [0.0, 0.2])
def test_parts_are_above_the_differentials(block: Attention, radius: float) -> None:
    """The norm of J and of its derivative in a direction, at points of the ball, by automatic differentiation."""
    parts = BallDerivatives(Centre(block), radius)
    first, second = sum(parts.first().values()), sum(parts.second().values())
    generator = torch.Generator().manual_seed(0)
    slope = 0.0
    jacobian = torch.func.jacrev(block.function())
    for moved in in_ball(block, radius * (1 - 1e-9), 2) if radius else [block]:
        point = moved.moving_input
        assert true_norm(moved) <= first
        direction = torch.randn(point.shape, generator=generator, dtype=torch.float64)
        for _ in range(5):  # towards the direction in which J moves most
            if direction.norm() == 0:  # with one key the block is linear
                slope = 1.0
                break
            direction = direction / direction.norm()
            change = torch.func.jvp(jacobian, (point,), (direction,))[1]
            left, size, right = torch.linalg.svd(change.reshape(-1, point.numel()))
            assert size[0] <= second
            slope = max(slope, (size[0] / second).item() if second > 0 else 1.0)

            def along(x: torch.Tensor, left=left[:, 0], right=right[0]) -> torch.Tensor:
                return left @ jacobian(x).reshape(-1, x.numel()) @ right

            direction = torch.func.grad(along)(point)
    # QK-norm bends most where what it divides is shortest, and all of it is bounded there.
    assert slope > (0.001 if "qk_norm" in block.features else 0.005)


def test_joint_norms_are_above_the_joint_form() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((5, 2), (2, 4)))
    allowed = torch.minimum(*joint_norms(left, right))
    x, y = torch.randn(5, generator=generator).double(), torch.randn(4, generator=generator).double()
    products, reached = left @ right, 0.0
    for _ in range(50):
        x, y = x / x.norm(), y / y.norm()
        inner = torch.einsum("a,hab,b->h", x, products, y)
        reached = inner.norm()
        x = torch.einsum("h,hab,b->a", inner, products, y)
        y = torch.einsum("h,hab,a->b", inner, products, x)
    assert 0.5 * allowed < reached <= allowed


@pytest.mark.parametrize("batched", [False, True])
def test_several_balls_at_once_get_the_numbers_of_each(block: Attention, batched: bool) -> None:
    block = block.at(torch.stack([block.moving_input, 0.5 * block.moving_input])) if batched else block
    radii, centre = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float64), Centre(block)
    together = BallThirdDerivative(centre, radii)
    for parts in (BallThirdDerivative.first, BallThirdDerivative.second, BallThirdDerivative.third):
        alone = [parts(BallThirdDerivative(centre, radius)) for radius in radii.tolist()]
        for name, part in parts(together).items():
            assert part.shape[0] == len(radii)
            each = torch.stack([one[name] for one in alone])
            torch.testing.assert_close(part, each.expand_as(part), rtol=1e-12, atol=0)


@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_balls_one_by_one_give_the_same_bounds(
    monkeypatch: pytest.MonkeyPatch, block: Attention, radius: float
) -> None:
    together = BALL(block, radius)
    monkeypatch.setattr(sharp_ball, "TOGETHER", 0)
    alone = BALL(block.replace(), radius)
    torch.testing.assert_close(together.value, alone.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(together.details, alone.details, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sharp_ball", "sharp_ball.deviation", "sharp_ball.taylor"])
def test_where_the_jacobian_is_not_formed_the_centre_is_that_of_sharp(block: Attention, name: str) -> None:
    found = lipbounds.get(name)(block, 1e-12, dense=0).value
    assert true_norm(block) <= found <= lipbounds.get("sharp")(block).value * (1 + 1e-6)


def corner_seeds() -> list[int]:
    """Odd seeds with which the check `scaling` goes to each of the 16 corners of the range of magnitudes once."""
    found: dict[tuple[bool, ...], int] = {}
    for seed in range(1, 1000, 2):
        drawn = torch.randint(-EXPONENTS, EXPONENTS + 1, (4,), generator=torch.Generator().manual_seed(seed))
        found.setdefault(tuple((drawn > 0).tolist()), seed)
    assert len(found) == 16
    return [*found.values()]


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(
    ("spec", "moves"), [(DIRECT, "self"), (DEVIATION, "self"), (TAYLOR, "self"), (BALL, "query"), (BALL, "memory")]
)
def test_no_corner_of_the_range_of_magnitudes_loses_a_term(spec: lipbounds.BoundSpec, moves: str) -> None:
    """Products of powers of tiny weights vanished there, and with them whole terms of an upper bound."""
    memory: dict[str, Any] = {} if moves == "self" else {"memory": random_block(6, n=3, dim=2).x, "moves": moves}
    block = random_block(5, n=3, dim=2, biases=False, **memory)
    for seed in corner_seeds():
        CHECKS["scaling"].function(spec, block, radius=0.3, seed=seed)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_a_batch_of_blocks_in_very_different_units_is_its_items() -> None:
    block = random_block(5, n=2, dim=2)
    sizes = 2.0 ** torch.tensor([0.0, 150.0, -150.0], dtype=torch.float64)[:, None, None]
    many = block.replace(
        x=block.x * sizes,
        **{name: getattr(block, name) / sizes[:, None] for name in ("w_q", "w_k", "w_v")},
        w_o=block.w_o * torch.ones(2, 1, 1, 1, 1),
    )
    for spec in (DIRECT, TAYLOR):
        together = spec(many, 0.3)
        assert together.value.shape == (2, 3)
        for i in range(3):
            item = block.replace(**{n: getattr(many, n)[0, i] for n in ("w_q", "w_k", "w_v")}, x=many.x[i])
            alone = spec(item, 0.3)
            torch.testing.assert_close(together.value[:, i], alone.value.expand(2), rtol=1e-9, atol=0)


def test_balls_about_one_input_share_their_centre_and_do_not_keep_the_block() -> None:
    block = random_block(3)
    first = DEVIATION(block, 0.1).value
    assert centre_of(block) is centre_of(block)
    torch.testing.assert_close(DEVIATION(random_block(3), 0.1).value, first, rtol=0, atol=0)
    known = weakref.ref(block)
    del block
    gc.collect()
    assert known() is None


def test_without_gram_blocks_the_centre_is_known_less_well_but_holds() -> None:
    block = random_block(5, n=5, dim=8)
    tight, loose = (DEVIATION(block, 0.0, dense=0, gram=gram).value for gram in (True, False))
    assert true_norm(block) <= tight < loose
