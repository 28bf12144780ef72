"""Formula bounds in float32: their rounding covers what float32 does, and where that is too much float64 takes over."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds import Attention, InvalidInput, get
from lipbounds.derivatives.ball import single_precision as ball
from lipbounds.derivatives.ball.logits import logit_radius
from lipbounds.derivatives.first import single_precision
from lipbounds.derivatives.first.single_parts import SingleParts
from lipbounds.derivatives.first.single_precision import Rounded, has_single_precision
from lipbounds.derivatives.rounding.logits import logit_error
from lipbounds.ops.eigen import eigenvalue_by_squaring
from verify.unit.blocks import random_block


BOUND = get("yudin2025.biased")
ON_BALL = get("yudin2025_ball.biased")


OTHERS = [
    get(name)
    for name in (
        *(f"yudin2025.{name}" for name in ("theorem3", "theorem3_exact", "theorem3_half", "theorem3_one")),
        *(f"yudin2025.biased_{name}" for name in ("exact", "half", "one")),
        *(f"centred.{name}" for name in ("products", "weights", "change")),
        "covariance.trace",
        "havens2024.change",
        "emadi2026.balanced_mass",
    )
]


def theorem_3(block: Attention) -> Rounded:
    parts = SingleParts(block)
    values, change = parts.value_and_change()
    return parts.of_heads(values * parts.maps.g_1 * change + parts.mixing)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wide(tokens: int = 40, dim: int = 300, heads: int = 3, spread: float = 1.0, **options: Any) -> Attention:
    """With sums of three chunks."""
    weights: dict[str, Any] = {
        name: draw(heads, dim, 20, seed=seed) * dim**-0.5 for seed, name in enumerate(("w_q", "w_k", "w_v"), start=1)
    }
    weights["w_q"] = weights["w_q"] * spread
    biases: dict[str, Any] = {f"b_{name}": draw(heads, 20, seed=seed) for seed, name in enumerate("qkv", start=5)}
    block = Attention(x=draw(tokens, dim), w_o=draw(heads, 20, dim, seed=4) * dim**-0.5, **weights, **biases)
    return block.replace(**options).to(torch.float32)


def in_a_batch(*blocks: Attention) -> Attention:
    fields = [{f.name: getattr(block, f.name) for f in dc.fields(block)} for block in blocks]
    names = [name for name, value in fields[0].items() if isinstance(value, Tensor)]
    return blocks[0].replace(**{name: torch.stack([each[name] for each in fields]) for name in names})


BLOCKS = {
    "self": wide(),
    "causal": wide(causal=True),
    "biased logits": wide(logit_bias=3 * draw(40, 40, seed=9)),
    "query moves": wide(memory=draw(50, 300, seed=9), moves="query"),
    "memory moves": wide(memory=draw(50, 300, seed=9), moves="memory"),
    "batch": wide(x=draw(2, 40, 300)),
    "weights in a batch": in_a_batch(wide(), wide(spread=2.0)),
    "small": random_block(x=draw(2, 4, 6), logit_bias=draw(4, 4)).to(torch.float32),
    "bfloat16": wide().to(torch.bfloat16),
    "tiny numbers": wide(w_v=1e-25 * draw(3, 300, 20), b_v=1e-25 * draw(3, 20)),
    "huge numbers": wide(x=1e25 * draw(40, 300)),
    "peaked": wide(spread=60.0),
}
ONE = torch.eye(2).unsqueeze(0)
ONE_HOT = Attention(x=torch.eye(2), w_q=30.0 * ONE, w_k=ONE, w_v=ONE, w_o=ONE, scale=1.0)
IN_FLOAT64_IF_SMALL = (get("emadi2026.balanced_mass"),)  # of 12 keys or fewer
IN_FLOAT64 = {"tiny numbers", "huge numbers", "peaked"}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_never_below_float64_and_five_per_cent_above_at_most(name: str) -> None:
    block = BLOCKS[name]
    found, expected = BOUND(block), BOUND(block, precision="float64")
    short = name not in IN_FLOAT64
    assert set(found.details["bits"].flatten().tolist()) == {32.0 if short else 64.0}
    assert bool((found.value >= expected.value).all())
    assert bool((found.value <= expected.value * (1.05 if short else 1.0)).all())


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BLOCKS)
def test_other_formula_bounds_are_never_below_float64_and_five_per_cent_above_at_most(name: str) -> None:
    block = BLOCKS[name]
    plain = block.replace(b_q=None, b_k=None, b_v=None)
    for spec in OTHERS:
        given = plain if "biases" in spec.missing_features(block) else block
        if spec.missing_features(given):
            continue
        radius = (0.2,) if spec.needs_radius else ()
        found, expected = (spec(given, *radius, precision=precision) for precision in ("auto", "float64"))
        short = found.details["bits"].flatten()[0].item() == 32
        assert short or name in IN_FLOAT64 or spec in IN_FLOAT64_IF_SMALL, spec.name
        assert set(expected.details["bits"].flatten().tolist()) == {64.0}
        assert bool((found.value >= expected.value).all()), spec.name
        assert bool((found.value <= expected.value * (1.05 if short else 1.0)).all()), spec.name


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("radius", [0.0, 0.2])
@pytest.mark.parametrize("name", [*BLOCKS, "one-hot"])
def test_on_a_ball_it_is_never_below_float64_and_one_per_cent_above_at_most(name: str, radius: float) -> None:
    block = ONE_HOT if name == "one-hot" else BLOCKS[name]
    found, expected = (ON_BALL(block, radius, precision=precision) for precision in ("auto", "float64"))
    short = name not in IN_FLOAT64
    assert set(found.details["bits"].flatten().tolist()) == {32.0 if short else 64.0}
    assert bool(((found.value >= expected.value) | expected.value.isnan()).all())
    assert bool((found.value <= expected.value * (1.01 if short else 1.0)).all() or expected.value.isnan().all())


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", ["self", "causal", "query moves", "memory moves", "batch", "small", "one-hot"])
def test_the_interval_of_a_ball_holds_what_is_in_it(name: str) -> None:
    """Of logits that move by the radii, towards and away from each key; and the radii are those of float64."""
    block = ONE_HOT if name == "one-hot" else BLOCKS[name]
    exact, norms = block.double, block.double.weight_norms
    queries = single_precision.single_rows(block.x, norms, "w_q")
    keys = single_precision.single_rows(block.source_input, norms, "w_k")
    maps = single_precision.single_maps(block, queries, keys)
    weights, sums, error = maps.weights, maps.sums, maps.error
    reach = ball._logit_radius(block, queries, keys, 0.2)
    truth = logit_radius(exact, 0.2)
    assert bool((reach >= truth - logit_error(exact).unsqueeze(-1) - 1e-9 * truth).all())
    assert bool((reach <= truth * 1.01 + 1e-5).all())
    moved = truth + error.unsqueeze(-1)
    softmax, norm = ball._over_interval(block, weights, sums, moved.float() * (1 + 1e-6))
    for key in range(0, weights.shape[-1], 7):
        sign = torch.ones(weights.shape[-1], dtype=torch.float64)
        sign[key] = -1
        for direction in (sign, -sign):
            p = (exact.logits + direction * truth).softmax(-1)
            first, second = p.topk(2, -1).values.unbind(-1)
            index = p.argmax(-1, keepdim=True)
            g_1 = first * (p.scatter(-1, index, 0.0).sum(-1) + second)
            assert bool((softmax >= g_1.amax(-1)).all())
            assert bool((norm >= torch.linalg.matrix_norm(p, 2) - 1e-12).all() or not block.memory_moves)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_a_ball_in_which_logits_move_far_is_for_float64() -> None:
    assert ON_BALL(BLOCKS["self"], 100.0).details["bits"] == 64
    with pytest.raises(InvalidInput, match="precision must be"):
        ON_BALL(BLOCKS["self"], 0.1, precision="float16")


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_a_single_key_leaves_nothing_on_a_ball_but_rounding() -> None:
    """What may be lost to underflow is no value: the map does not change."""
    alone = wide(memory=draw(1, 300, seed=9), moves="query")
    result = ON_BALL(alone, 0.2)
    assert result.details["bits"].item() == 64
    assert result.value.item() <= torch.finfo(torch.float32).smallest_normal  # rounded up


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", ["self", "causal", "biased logits", "query moves", "batch", "small", "peaked"])
def test_every_error_is_covered(name: str) -> None:
    block, exact = BLOCKS[name], BLOCKS[name].double
    norms = exact.weight_norms
    queries = single_precision.single_rows(block.x, norms, "w_q")
    keys = single_precision.single_rows(block.source_input, norms, "w_k")
    for rows, truth in ((queries, exact.queries), (keys, exact.keys)):
        assert bool(((rows.rows.double() - truth).norm(dim=-1) <= rows.error).all())
        assert bool((rows.length >= rows.rows.double().norm(dim=-1)).all())
    found = single_precision.single_maps(block, queries, keys)
    weights, sums, softmax, error = found.weights, found.sums, found.g_1, found.error
    maps = (weights / sums.unsqueeze(-1)).double()
    factor, seen = (2 * error).exp().unsqueeze(-1), exact.probabilities > 1e-30
    assert bool((maps[seen] <= (exact.probabilities * factor * (1 + 1e-5))[seen]).all())
    assert bool((maps[seen] >= (exact.probabilities / factor * (1 - 1e-5))[seen]).all())
    top = exact.probabilities.sort(-1, descending=True).values
    truth = (top[..., 0] * (top[..., 1:].sum(-1) + top[..., 1])).amax(-1)
    assert bool((softmax.upper >= truth).all())
    norm = single_precision.map_norm_upper(weights, sums, error)
    assert bool((norm.upper >= torch.linalg.matrix_norm(exact.probabilities, 2)).all())


def test_the_tail_of_a_one_hot_row_is_not_a_difference() -> None:
    """1 - p_(1) is 0 in float32 from logits that are 18 apart."""
    block, norms = ONE_HOT, ONE_HOT.double.weight_norms
    rows = [single_precision.single_rows(block.x, norms, name) for name in ("w_q", "w_k")]
    softmax = single_precision.single_maps(block, *rows).g_1
    assert softmax.upper.item() >= 2 * torch.tensor(-30.0, dtype=torch.float64).exp().item()


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_where_float32_is_no_choice() -> None:
    block = BLOCKS["self"]
    assert has_single_precision(block)
    assert not has_single_precision(block.double)
    assert not has_single_precision(block.replace(x=block.x.clone().requires_grad_()))
    rotation = torch.stack([torch.ones(40, 2), torch.zeros(40, 2)], -2)
    assert not has_single_precision(block.replace(query_rotation=rotation, key_rotation=rotation))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not has_single_precision(block)
    finally:
        torch.set_float32_matmul_precision(before)
    matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009 - the newer switch, after which torch may refuse to answer by the older one
    shorter = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert not has_single_precision(block)
        assert BOUND(block).details["bits"] == 64
    finally:
        matmul.fp32_precision = shorter
    assert has_single_precision(block)
    with pytest.raises(InvalidInput, match="precision must be"):
        BOUND(block, precision="float16")


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BOUND(BLOCKS["self"])
    assert found.details["bits"] == 32
    assert torch.equal(found.value, BOUND(BLOCKS["self"]).value)


def test_numbers_without_rounding_are_the_smaller_ones() -> None:
    found = theorem_3(BLOCKS["self"])
    assert bool((found.found < found.upper).all())
    assert [field.name for field in dc.fields(found)] == ["found", "upper"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squarings", [0, 3, 8, 44])
def test_squaring_is_never_below_the_largest_eigenvalue(dtype: torch.dtype, squarings: int) -> None:
    factors = [draw(20, 30), draw(20, 1), torch.linalg.qr(draw(20, 20)).Q, 1e-10 * draw(20, 20)]
    for factor in factors:
        gram = (factor @ factor.mT).to(dtype)
        gram = gram.tril() + gram.tril(-1).mT
        truth = torch.linalg.eigvalsh(gram.double())[-1]
        found = eigenvalue_by_squaring(gram, squarings).double()
        assert found >= truth * (1 - 1e-14)
        assert found <= truth * 20 ** (2.0**-squarings) * (1 + (1e-12 if dtype == torch.float64 else 1.2e-4))
