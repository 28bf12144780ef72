"""The falsifier finds planted faults, leaves sound bounds alone, and reports only what holds on the single instance."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention, BoundSpec, Claim, InvalidInput, Source, UnsupportedAttention
from lipbounds.testing import _claims
from lipbounds.testing._ascent import Ascent
from lipbounds.testing._falsification import squared_distance
from lipbounds.testing._jacobian import jacobian_parts, spectral_norm
from lipbounds.testing._starts import REGIMES, draw_starts
from lipbounds.testing.falsify import SLACK, Setting, attack, falsify, falsify_widely, judge
from lipbounds.testing.shrink import shrink
from verify.unit.blocks import true_norm


# Searches: they run as users run them. Other tests keep the shape checks of what is used here.
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")

LITERAL = frozenset({"heads", "mask"})
ALL = LITERAL | {"biases", "cross"}


def spec_of(compute: Callable[..., Any], *, supports: frozenset[Any] = ALL, **claim: Any) -> BoundSpec:
    """A bound for a test, never registered."""
    return BoundSpec(
        name=f"planted.{getattr(compute, '__name__', 'bound').strip('<>')}",
        claim=dc.replace(Claim(kind="proved"), **claim),
        source=Source(title="planted"),
        supports=supports,
        cost="O(1)",
        compute=compute,
    )


# -- bounds written a second time, with a place for each fault ------------------------------------------------------


def norm(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def g_1(p: torch.Tensor) -> torch.Tensor:
    top = p.topk(2, -1).values
    return top[..., 0] * (1 - top[..., 0] + top[..., 1])


def largest_row(values: torch.Tensor) -> torch.Tensor:
    return values.amax(-1)


def theorem3(
    block: Attention,
    *,
    factor: float = 2.0,
    over_rows: Callable[[torch.Tensor], torch.Tensor] = largest_row,
    combine: Callable[[torch.Tensor], torch.Tensor] = lambda heads: heads.square().sum(-1).sqrt(),
) -> torch.Tensor:
    products = abs(block.scale_value) * norm(block.w_q @ block.w_k.mT)
    softmax = factor * norm(block.x).unsqueeze(-1).square() * products * over_rows(g_1(block.probabilities))
    return norm(block.w_o.flatten(-3, -2)) * combine(norm(block.w_v) * (norm(block.probabilities) + softmax))


def biased(block: Attention, *, softmax_norm: float) -> torch.Tensor:
    change = torch.zeros_like(block.logits[..., 0, 0])
    mixing = change
    if block.query_moves:
        change = change + norm(block.keys @ block.w_q.mT)
    if block.memory_moves:
        change = change + norm(block.queries @ block.w_k.mT)
        mixing = norm(block.w_v) * norm(block.probabilities)
    heads = mixing + norm(block.values) * softmax_norm * abs(block.scale_value) * change
    return norm(block.w_o.flatten(-3, -2)) * heads.square().sum(-1).sqrt()


def without_factor_2(block: Attention) -> torch.Tensor:
    return theorem3(block, factor=1.0)


def a_quarter(block: Attention) -> torch.Tensor:
    return biased(block, softmax_norm=0.25)


def mean_of_rows(block: Attention) -> torch.Tensor:
    return theorem3(block, over_rows=lambda values: values.mean(-1))


def last_head_dropped(block: Attention) -> torch.Tensor:
    return theorem3(block, combine=lambda heads: heads[..., :-1].square().sum(-1).sqrt())


def largest_head(block: Attention) -> torch.Tensor:
    return theorem3(block, combine=lambda heads: heads.amax(-1))


def centre_only(block: Attention, radius: float) -> torch.Tensor:
    return lipbounds.get("yudin2025.biased").compute(block)[0]


def a_tenth_of_the_radius(block: Attention, radius: float) -> torch.Tensor:
    return lipbounds.get("yudin2025_ball.biased")(block, radius / 10).value


FAULTS: dict[str, tuple[BoundSpec, Setting]] = {
    "no factor 2": (spec_of(without_factor_2, supports=LITERAL), Setting(tokens=2, dim=2)),
    "1/4 for the softmax": (spec_of(a_quarter), Setting(tokens=2, dim=2)),
    "1/4, memory moves": (spec_of(a_quarter), Setting(tokens=2, dim=2, moves="memory", memory_tokens=2)),
    "1/4, query moves": (spec_of(a_quarter), Setting(tokens=1, dim=2, moves="query", memory_tokens=3)),
    "biases ignored": (spec_of(theorem3), Setting(tokens=2, dim=2, biases=True)),
    "mean of rows": (spec_of(mean_of_rows, supports=LITERAL), Setting(tokens=2, dim=1)),
    "mean of rows, causal": (spec_of(mean_of_rows, supports=LITERAL), Setting(tokens=3, dim=2, mask="causal")),
    "head dropped": (spec_of(last_head_dropped, supports=LITERAL), Setting(tokens=2, dim=2, heads=2)),
    "largest head": (spec_of(largest_head, supports=LITERAL), Setting(tokens=2, dim=2, heads=2)),
    "centre of the ball only": (spec_of(centre_only, scope="ball"), Setting(tokens=2, dim=2)),
    "a tenth of the radius": (spec_of(a_tenth_of_the_radius, scope="ball"), Setting(tokens=2, dim=1, radius=0.1)),
}


# -- the pieces -----------------------------------------------------------------------------------------------------

SETTINGS = [
    Setting(tokens=3, dim=2, heads=2, biases=True, value_dim=3),
    Setting(tokens=3, dim=2, mask="causal", scale=-0.7),
    Setting(tokens=2, dim=3, mask="padding", moves="memory", biases=True),
    Setting(tokens=4, dim=2, mask="one_visible"),
    Setting(tokens=2, dim=3, heads=2, head_dim=2, mask="offsets", moves="query"),
    Setting(tokens=1, dim=1),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_both_jacobian_parts_add_up_to_the_automatic_jacobian(setting: Setting) -> None:
    parameters = draw_starts(setting, 3, True, torch.Generator().manual_seed(1))
    block = setting.block(parameters)
    points = setting.point(parameters, block)
    mixing, softmax = jacobian_parts(block, points)
    for i in range(3):
        one = setting.block({name: tensor[i] for name, tensor in parameters.items()})
        automatic = torch.func.jacrev(one.function())(points[i]).reshape(mixing[i].shape)
        torch.testing.assert_close(
            mixing[i] + softmax[i], automatic, rtol=1e-9, atol=1e-9 * automatic.abs().max().item()
        )


def test_the_softmax_part_is_what_remains_when_values_do_not_mix() -> None:
    setting = Setting(tokens=3, dim=2, moves="query")
    block = setting.block(draw_starts(setting, 2, False, torch.Generator().manual_seed(2)))
    mixing, softmax = jacobian_parts(block, block.moving_input)
    assert mixing.shape == softmax.shape
    assert not mixing.any()
    assert softmax.any()


def test_gradient_of_the_true_norm() -> None:
    setting = Setting(tokens=2, dim=2)
    parameters = draw_starts(setting, 1, False, torch.Generator().manual_seed(3))

    def true(x: torch.Tensor, w_q: torch.Tensor, w_v: torch.Tensor) -> torch.Tensor:
        block = setting.block(parameters | {"x": x, "w_q": w_q, "w_v": w_v})
        mixing, softmax = jacobian_parts(block, block.moving_input)
        return spectral_norm(mixing + softmax)

    inputs = tuple(parameters[name].requires_grad_() for name in ("x", "w_q", "w_v"))
    assert torch.autograd.gradcheck(true, inputs)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_starts_are_valid_blocks_with_the_features_of_their_setting(setting: Setting) -> None:
    parameters = draw_starts(setting, len(REGIMES), True, torch.Generator().manual_seed(4))
    block = setting.block(parameters)
    assert block.batch_shape == (len(REGIMES),)
    assert block.features == setting.features
    assert all(tensor.isfinite().all() for tensor in parameters.values())
    for centre, point in zip(block.moving_input, setting.point(parameters, block), strict=True):
        assert squared_distance(point, centre) <= 1


# -- sound bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("yudin2025.theorem3", Setting(tokens=2, dim=2)),
        ("yudin2025.theorem3_exact", Setting(tokens=2, dim=1)),
        ("yudin2025.biased", Setting(tokens=2, dim=2, biases=True, heads=2)),
        ("yudin2025.biased", Setting(tokens=1, dim=1, moves="query")),
        ("yudin2025_ball.biased", Setting(tokens=2, dim=1, radius=0.1)),
    ],
    ids=str,
)
def test_sound_bounds_are_not_refuted(name: str, setting: Setting) -> None:
    found = attack(lipbounds.get(name), setting, steps=10, starts=8)
    assert not found.refuted
    assert 0.9 < found.ratio <= 1  # no slack: these are rounded outwards; and the search got close


def test_theorem_3_is_tight_where_logits_vanish() -> None:
    found = falsify(lipbounds.get("yudin2025.theorem3"), tokens=2, dim=1, starts=6, steps=16)
    assert 0.999 < found.ratio <= 1


def test_the_truth_itself_passes() -> None:
    found = attack(lipbounds.get("exact"), Setting(tokens=2, dim=2, moves="query"), starts=4, steps=3)
    assert not found.refuted
    assert found.ratio > 1 - 1e-9


# -- planted faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_planted_faults_are_refuted_and_the_instance_proves_it(fault: str) -> None:
    spec, setting = FAULTS[fault]
    found = attack(spec, setting, steps=30, starts=10, stop_above=1.01)
    assert found.refuted
    assert found.ratio > 1.001
    assert found.block.batch_shape == ()
    # Without the falsifier's own truth: the value of the bound there, and a Jacobian by automatic differentiation.
    arguments = () if found.radius is None else (found.radius,)
    claimed = spec(found.block, *arguments).value.item()
    there = found.block if found.point is None else found.block.at(found.point)
    assert claimed == found.claimed
    assert true_norm(there).item() == pytest.approx(found.reached, rel=1e-6)
    assert true_norm(there).item() > claimed * 1.0009
    if found.point is not None and found.radius is not None:
        assert torch.linalg.matrix_norm(found.point - found.block.x) <= found.radius


def almost_right(block: Attention) -> torch.Tensor:
    return theorem3(block, factor=1.8)


def test_ascent_finds_what_its_starting_points_do_not() -> None:
    spec = spec_of(almost_right, supports=LITERAL)
    setting = Setting(tokens=2, dim=1)
    assert not attack(spec, setting, starts=8, steps=1, seed=1).refuted
    assert attack(spec, setting, starts=8, steps=16, seed=1).ratio > 1.0005


def in_numpy(block: Attention) -> torch.Tensor:
    return torch.as_tensor(almost_right(block).numpy())  # raises where gradients are recorded


def one_at_a_time(block: Attention) -> torch.Tensor:
    if block.batch_shape:
        raise ValueError("one block only")
    return almost_right(block)


def as_a_number(block: Attention) -> torch.Tensor:
    return torch.tensor(almost_right(block).detach().item(), dtype=block.dtype)  # raises on batches


def with_a_part_detached(block: Attention) -> torch.Tensor:
    return almost_right(block.replace(x=block.x.detach()))


@pytest.mark.parametrize("compute", [in_numpy, one_at_a_time, as_a_number, with_a_part_detached])
def test_bounds_without_batches_or_gradients_are_climbed_all_the_same(compute: Callable[..., torch.Tensor]) -> None:
    found = attack(
        spec_of(compute, supports=LITERAL), Setting(tokens=2, dim=1), starts=8, steps=16, seed=1, stop_above=1.0002
    )
    assert found.ratio > 1.0002


@pytest.mark.parametrize(
    ("compute", "gradient", "alone"),
    [
        (almost_right, True, False),
        (in_numpy, False, False),
        (one_at_a_time, True, True),
        (as_a_number, False, True),
        (with_a_part_detached, False, False),
    ],
)
def test_how_a_bound_can_be_used_is_noticed(compute: Callable[..., torch.Tensor], gradient: bool, alone: bool) -> None:
    claims = _claims.Claims(spec_of(compute, supports=LITERAL), Setting(tokens=2, dim=2))
    ascent = Ascent(claims, 7, torch.Generator().manual_seed(5))
    ascent.run(1, deadline=math.inf, stop_above=math.inf, progress=None)
    assert ascent.has_gradient is gradient
    assert claims.one_by_one is alone


def refuses_some(block: Attention) -> torch.Tensor:
    if bool((block.logits.abs() > 1).any()):
        raise InvalidInput("logits must be small")
    return 0.9 * theorem3(block)


def test_instances_that_a_bound_refuses_are_left_out() -> None:
    found = attack(spec_of(refuses_some, supports=LITERAL), Setting(tokens=2, dim=2), starts=4, steps=6)
    assert found.refuted
    assert found.block.logits.abs().max() <= 1


def smallest_of_the_batch(block: Attention) -> torch.Tensor:
    values = lipbounds.get("yudin2025.biased").compute(block)[0]
    return values.min().expand(values.shape)


def test_only_what_a_single_block_shows_is_reported() -> None:
    found = attack(spec_of(smallest_of_the_batch), Setting(tokens=2, dim=1), starts=6, steps=6)
    assert not found.refuted
    assert found.ratio <= 1


def zero(block: Attention) -> torch.Tensor:
    return torch.zeros_like(block.x[..., 0, 0])


def test_a_claim_of_zero_is_refuted_without_a_division_by_zero() -> None:
    found = attack(spec_of(zero), Setting(tokens=2, dim=1), starts=4, steps=2)
    assert found.ratio == math.inf
    assert found.refuted


def test_nothing_is_refuted_where_the_truth_is_zero() -> None:
    found = attack(spec_of(zero), Setting(tokens=1, dim=1, moves="query", memory_tokens=1), starts=4, steps=2)
    assert (found.ratio, found.reached, found.refuted) == (0.0, 0.0, False)


def test_instances_without_a_truth_are_never_the_best() -> None:
    claims = _claims.Claims(spec_of(zero), Setting(tokens=1, dim=1, moves="query", memory_tokens=1))
    ascent = Ascent(claims, 3, torch.Generator().manual_seed(6))
    ascent.run(2, deadline=math.inf, stop_above=math.inf, progress=None)
    assert bool(ascent.best_log_ratio.isneginf().all())


# -- the wide search ------------------------------------------------------------------------------------------------


def wrong_where_the_query_moves(block: Attention) -> torch.Tensor:
    value = lipbounds.get("yudin2025.biased")(block).value
    return value * (0.5 if block.moves == "query" else 1.0)


def wrong_for_negative_scales(block: Attention) -> torch.Tensor:
    return theorem3(block, factor=2.0 if block.scale_value > 0 else -2.0).abs()


@pytest.mark.parametrize(
    ("compute", "supports"),
    [(wrong_where_the_query_moves, frozenset({"cross"})), (wrong_for_negative_scales, frozenset())],
)
def test_the_wide_search_finds_a_fault_of_one_feature(
    compute: Callable[..., torch.Tensor], supports: frozenset[Any]
) -> None:
    found = falsify_widely(spec_of(compute, supports=supports), seconds=600.0)
    assert found.refuted
    assert found.seconds < 300  # it stops once it has one
    assert found.steps > 40  # all settings are counted, not the last alone


def test_the_wide_search_goes_on_from_a_shape() -> None:
    spec = spec_of(wrong_for_negative_scales, supports=frozenset())
    whole = falsify_widely(spec, seed=5, seconds=600.0)
    again = falsify_widely(spec, seed=5, seconds=600.0, skip=whole.seed - 5)
    assert whole.refuted
    assert again.ratio == whole.ratio
    assert again.steps < whole.steps
    with pytest.raises(InvalidInput, match="skip must be >= 0, got -1"):
        falsify_widely(spec, skip=-1)


def test_the_wide_search_keeps_to_its_time() -> None:
    found = falsify_widely(lipbounds.get("yudin2025.theorem3"), seconds=0.5)
    assert 0.4 < found.seconds < 10
    assert 0 < found.ratio <= 1


def test_a_bound_that_refuses_everything_is_no_success() -> None:
    def refuse(block: Attention) -> torch.Tensor:
        raise UnsupportedAttention("never")

    with pytest.raises(UnsupportedAttention, match="never"):
        falsify_widely(spec_of(refuse), seconds=0.01)


# -- shrinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "setting", "largest"),
    [
        ("head dropped", Setting(tokens=3, dim=3, heads=3), 2),
        ("1/4, memory moves", Setting(tokens=2, dim=2, moves="memory", memory_tokens=2, mask="offsets"), 2),
        ("centre of the ball only", Setting(tokens=2, dim=2, moves="query", memory_tokens=2, radius=0.3), 2),
    ],
)
def test_shrunk_counterexamples_are_small_and_still_refute(fault: str, setting: Setting, largest: int) -> None:
    spec, _ = FAULTS[fault]
    found = attack(spec, setting, steps=16, starts=10, stop_above=1.1)
    assert found.refuted
    small = shrink(spec, found)
    assert small.refuted
    assert small.ratio - 1 >= min((found.ratio - 1) / 2, 0.5)
    assert small.ratio == judge(spec, small.block, radius=small.radius, point=small.point).ratio
    assert small.block.tokens <= largest
    entries = [small.block.x, small.block.w_q, small.block.w_k, small.block.w_v, small.block.w_o]
    assert all(entry == float(f"{entry:.2e}") for tensor in entries for entry in tensor.flatten().tolist())
    assert sum(tensor.numel() for tensor in entries) < sum(math.prod(s) for s in setting.shapes(False).values())
    assert (small.seed, small.steps) == (found.seed, found.steps)


def test_only_counterexamples_can_be_shrunk(as_a_user_runs_it: None) -> None:
    spec = lipbounds.get("yudin2025.biased")
    with pytest.raises(InvalidInput, match="only a counterexample"):
        shrink(spec, attack(spec, Setting(tokens=1, dim=1), starts=2, steps=1))


# -- the interface --------------------------------------------------------------------------------------------------


def test_the_same_seed_finds_the_same_instance() -> None:
    spec, setting = FAULTS["no factor 2"]
    first, again, other = (attack(spec, setting, steps=8, starts=8, seed=seed) for seed in (3, 3, 4))
    assert first.ratio == again.ratio != other.ratio
    assert torch.equal(first.block.x, again.block.x)


def test_progress_is_reported_and_falsify_passes_its_features_on() -> None:
    seen: list[tuple[int, float]] = []
    found = falsify(
        lipbounds.get("yudin2025.biased"), features=("biases", "cross", "mask"), tokens=2, dim=2, heads=2, starts=4,
        steps=8, progress=lambda step, ratio: seen.append((step, ratio)),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(1, 11))
    assert [ratio for _, ratio in seen] == sorted(ratio for _, ratio in seen)
    assert found.block.features == {"heads", "biases", "cross", "mask"}
    assert (found.starts, found.steps, found.spec) == (4, 10, "yudin2025.biased")


def test_the_slack_is_the_documented_one() -> None:
    block = Setting(tokens=2, dim=1).block(
        {name: torch.ones(shape, dtype=torch.float64) for name, shape in Setting(tokens=2, dim=1).shapes(False).items()}
    )
    found = judge(spec_of(lambda block: norm(block.w_v)[..., 0]), block)  # ones: attention averages, norm 1
    assert found.reached == pytest.approx(1, rel=1e-15)
    assert SLACK == 1e-9
    assert not dc.replace(found, ratio=1 + SLACK).refuted
    assert dc.replace(found, ratio=1 + 2 * SLACK).refuted
    assert dc.replace(found, ratio=math.nan).refuted


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "kind": (lambda: falsify(spec_of(zero, kind="lower")), "kind 'proved'"),
    "scope": (lambda: falsify(spec_of(zero, scope="global")), "scope 'global'"),
    "norm": (lambda: Claim(kind="proved", norm="l3"), "norm='l3'"),  # pyright: ignore
    "starts": (lambda: falsify(spec_of(zero), starts=0), "starts=0"),
    "tokens": (lambda: falsify(spec_of(zero), tokens=0), "tokens=0"),
    "radius": (lambda: Setting(radius=0.0), "radius=0.0"),
    "mask": (lambda: Setting(mask="window"), "mask='window'"),  # pyright: ignore
    "causal cross": (lambda: Setting(mask="causal", moves="query"), "moves='self'"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda name: name.replace(" ", "-"))
def test_bad_arguments_get_one_clear_error(case: str, as_a_user_runs_it: None) -> None:
    call, message = BAD[case]
    with pytest.raises(InvalidInput, match=message):
        call()


def test_features_beyond_the_promise_are_not_attacked() -> None:
    with pytest.raises(UnsupportedAttention, match="biases"):
        falsify(lipbounds.get("yudin2025.theorem3"), features=("biases",))


def test_a_point_outside_the_ball_is_no_evidence() -> None:
    setting = Setting(tokens=1, dim=1)
    block = setting.block(
        {name: torch.ones(shape, dtype=torch.float64) for name, shape in setting.shapes(False).items()}
    )
    spec = spec_of(centre_only, scope="ball")
    just_outside = block.x + math.nextafter(1.0, 2.0)
    assert judge(spec, block, radius=1.0, point=block.x + 1.0).radius == 1.0
    with pytest.raises(InvalidInput, match=r"radius=1\.0"):
        judge(spec, block, radius=1.0, point=just_outside + 1e-15)
