"""Rotary positions: the function, its Jacobian and its rounding, what supports them, and what is refused."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lipbounds
from lipbounds import Attention, InvalidInput, UnsupportedAttention
from lipbounds.derivatives.logit_changes import key_norm, query_norm
from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.derivatives.rounding.logits import logit_error
from lipbounds.targets.rotary import rotate, rotate_back, rotation_norm
from lipbounds.testing import extended, oracles
from lipbounds.testing.falsify import judge
from lipbounds.testing.recipes import ROTATIONS
from lipbounds.testing.shrink import shrink
from lipbounds.testing.snippet import snippet
from verify.unit.blocks import check_batch_is_its_items, check_function, error, turned_block
from verify.unit.sample_bounds import spec


MOVES = ("self", "query", "memory")
BOUNDS = ("centred.products", "centred.weights", "covariance.exact", "sharp", "sharp_cheap", "sharp_fast",
          "yudin2025.biased_exact")  # fmt: skip
ESTIMATORS = {"exact", "lanczos", "lanczos_certificate", "lanczos_posterior", "power_iteration"}
ON_BALLS = {"ascent_jacobians", "ascent_pairs", "clever", "random_jacobians", "random_pairs"}
SHARP_BALL = {"sharp_ball", "sharp_ball.deviation", "sharp_ball.direct", "sharp_ball.taylor"}
NO_BIASES = {"hu2024.ball"}
FORMULAS_ON_BALLS = {"centred.change", "havens2024.change", "yudin2025_ball.biased", *NO_BIASES}
SUPPORTING = {
    *BOUNDS,
    *SHARP_BALL,
    *FORMULAS_ON_BALLS,
    *ESTIMATORS,
    *ON_BALLS,
    "yudin2025.biased",
    "yudin2025.biased_half",
    "yudin2025.biased_one",
}


def angles_of(positions: Tensor, pairs: int) -> Tensor:
    rotation = positions[:, None] * 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.stack([rotation.cos(), rotation.sin()], -2)


def by_complex_numbers(block: Attention, moving: Tensor) -> Tensor:
    """The output, with each pair of features as a complex number: another way to write a rotation."""
    x = block.x if block.moves == "memory" else moving
    source = block.source_input if block.moves == "query" else moving

    def turned(tokens: Tensor, weights: Tensor, bias: Tensor | None, rotation: Tensor | None) -> Tensor:
        assert rotation is not None
        rows = tokens @ weights + (0 if bias is None else bias[:, None])
        pairs = rotation.shape[-1]
        numbers = torch.complex(rows[..., :pairs], rows[..., pairs : 2 * pairs])
        numbers = numbers * torch.complex(rotation[:, 0], rotation[:, 1])
        return torch.cat([numbers.real, numbers.imag, rows[..., 2 * pairs :]], -1)

    queries = turned(x, block.w_q, block.b_q, block.query_rotation)
    keys = turned(source, block.w_k, block.b_k, block.key_rotation)
    logits = block.scale_value * queries @ keys.mT + (0 if block.mask is None else block.mask)
    values = source @ block.w_v + (0 if block.b_v is None else block.b_v[:, None])
    output = (logits.softmax(-1) @ values @ block.w_o).sum(0)
    return output if block.b_o is None else output + block.b_o


@pytest.mark.parametrize("moves", MOVES)
def test_the_block_and_its_judges_are_the_function_written_in_complex_numbers(moves: str) -> None:
    block = turned_block(moves)
    exact = check_function(block, lambda tokens: by_complex_numbers(block, tokens))
    assert abs(oracles.jacobian_norm(block).item() - exact) <= oracles.truth_slack(block).item() < 1e-6 * exact
    assert exact <= lipbounds.get("exact")(block).value.item() < exact * (1 + 1e-9)


@pytest.mark.parametrize("moves", MOVES)
def test_a_batch_of_positions_is_its_items(moves: str) -> None:
    block = turned_block(moves, batch=(2, 2), batched="both")
    assert block.query_rotation is not None
    assert block.query_rotation.shape[:-3] == block.batch_shape == (2, 2)
    check_batch_is_its_items(block, dict.fromkeys(BOUNDS, 1e-7))


def test_the_layout_is_that_of_llama() -> None:
    vectors = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    rotation = angles_of(torch.arange(5).double(), 3)
    cos, sin = (torch.cat([part, part], -1)[None] for part in rotation.unbind(-2))
    expected, _ = apply_rotary_pos_emb(vectors, vectors, cos, sin)
    torch.testing.assert_close(rotate(vectors, rotation), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(rotate_back(rotate(vectors, rotation), rotation), vectors, rtol=0, atol=1e-14)


def test_only_differences_of_positions_matter() -> None:
    block = turned_block(rotary="none")
    values = []
    for first in (0.0, 100.0):
        rotation = angles_of(torch.arange(4).double() + first, 2)
        moved = block.replace(query_rotation=rotation, key_rotation=rotation)
        values.append(
            torch.stack([oracles.jacobian_norm(moved), *(lipbounds.get(name)(moved).value for name in BOUNDS)])
        )
    torch.testing.assert_close(*values, rtol=1e-10, atol=0.0)
    assert abs(values[0][0] / oracles.jacobian_norm(block) - 1) > 1e-3


def test_the_identity_is_no_rotation() -> None:
    plain = turned_block(rotary="none")
    still = torch.tensor([1.0, 0.0]).double()[:, None].expand(4, 2, 2)
    block = plain.replace(query_rotation=still, key_rotation=still)
    assert "rotary" not in plain.features
    assert block.forward().equal(plain.forward())
    # Three have forms of their own where keys are turned, such as |W_K| |q| for |W_K q|; `sharp` sums in another order.
    for name in sorted({*BOUNDS} - {"covariance.exact", "sharp_cheap", "sharp_fast"}):
        one, other = (lipbounds.get(name)(b).value.item() for b in (block, plain))
        assert one == pytest.approx(other, rel=1e-8 if name == "sharp" else 1e-12)


def test_only_bounds_that_say_so_take_rotary_positions() -> None:
    block = turned_block()
    assert {found.name for found in lipbounds.select(block=block)} == SUPPORTING - NO_BIASES
    for found in lipbounds.select(scope="point"):
        if found.name not in SUPPORTING:
            with pytest.raises(UnsupportedAttention, match=r"rotary \(rotary positions"):
                found(block)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rotation_survives_a_short_dtype(dtype: torch.dtype) -> None:
    """Its floats are then no rotation in float64, and the bounds are about them as they are."""
    block = turned_block().to(dtype)
    rotation = block.double.query_rotation
    assert rotation is not None
    assert (rotation.square().sum(-2) - 1).abs().max() > 1e-9
    exact = float(extended.jacobian_norm_extended(block))
    assert lipbounds.get("lanczos")(block).value.item() <= exact
    assert exact <= lipbounds.get("exact")(block).value.item() <= lipbounds.get("centred.weights")(block).value.item()


def test_the_norm_of_a_rotation_is_that_of_its_floats() -> None:
    rotation = torch.randn(7, 3).to(torch.bfloat16).double()
    rotation = torch.stack([rotation.cos(), rotation.sin()], -2).to(torch.bfloat16).double()
    largest = max(torch.linalg.matrix_norm(rotate(torch.eye(6)[:, None].double(), row[None]).squeeze(-2), 2)
                  for row in rotation)  # fmt: skip
    assert largest > 1 + 1e-4
    found = rotation_norm(rotation, torch.ones(1).double()).item()
    assert largest.item() * (1 - 1e-15) <= found <= largest.item() * (1 + 1e-14)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_rounding_stays_below_its_bounds(size: float) -> None:
    """Of logits, rotated norms, J v and J^T u, against 60 digits; large biases that cancel in the logits."""
    largest = 0.0
    for seed in range(3):
        block = turned_block(seed=seed, heads=1, bias_scale=size, head_dim=4, rotary="random", value_dim=4)
        generator = torch.Generator().manual_seed(seed)
        v, u = (torch.randn(4, width, generator=generator, dtype=torch.float64) for width in (3, 4))
        roundoff = Roundoff(block)
        with extended.decimal.localcontext(extended.CONTEXT):
            columns = torch.eye(12).double().reshape(12, 4, 3)
            dense = [extended._product(block, extended._exact(column)).reshape(-1) for column in columns]
            transposed = extended.np.array([column @ extended._exact(u).reshape(-1) for column in dense])
            errors = [
                (error(block.jvp(v), extended._product(block, extended._exact(v))), roundoff.jvp(v.abs())),
                (error(block.vjp(u), transposed), roundoff.vjp(u.abs())),
                (error(block.queries[0] @ block.keys[0].mT * block.scale_value, exact_logits(block)),
                 logit_error(block)[0, :, None].expand(4, 4)),
            ]  # fmt: skip
        for found, allowed in errors:
            assert (found <= allowed).all()
            largest = max(largest, float((found / allowed.clamp(min=1e-300)).max()))
        for rows, norm in ((block.queries, query_norm(block)), (block.keys, key_norm(block))):
            assert (torch.linalg.matrix_norm(rows, 2) <= norm).all()
            assert (norm <= torch.linalg.matrix_norm(rows, 2) * (1 + 1e-10)).all()
    assert largest > 1e-6  # the bounds are not absurdly large


def exact_logits(block: Attention) -> Any:
    rows = []
    for tokens, weights, bias, side in (
        (block.x, block.w_q, block.b_q, "query"),
        (block.x, block.w_k, block.b_k, "key"),
    ):
        assert bias is not None
        plain = extended._exact(tokens) @ extended._exact(weights[0]) + extended._exact(bias[0])
        rows.append(extended._turned(oracles.rotation_matrices(block, side), plain))
    return Decimal(block.scale_value) * (rows[0] @ rows[1].T)


def test_all_kinds_of_rotation_are_built() -> None:
    for name in ROTATIONS:
        block = turned_block(rotary=name)
        assert ("rotary" in block.features) == (name != "none")
        logits = turned_block(rotary=name, mask="none").logits
        assert (logits.amax(-1) - logits.amin(-1)).max().item() == pytest.approx(4.0)
    assert "rotary" not in turned_block(head_dim=1).features  # no pair to turn


def test_a_counterexample_keeps_what_it_needs_and_runs() -> None:
    block = turned_block(n=3, dim=2, head_dim=4, heads=1, mask="none", biases=frozenset())
    wrong = spec(lambda b: oracles.jacobian_norm(b) * (0.5 if b.query_rotation is not None else 1.0))
    found = shrink(wrong, judge(wrong, block), seconds=3.0)
    assert found.refuted
    assert found.block.features == {"rotary"}
    assert max(found.block.x.shape) <= 2
    source = snippet("centred.weights", turned_block(biases=frozenset(("b_k",)))).split("print(")[0]
    shown: dict[str, Any] = {}
    exec(source, shown)  # with the truth it computes by itself, in an independent way
    assert shown["truth"] == pytest.approx(oracles.jacobian_norm(shown["block"]).item(), rel=1e-10)


ROTATION = angles_of(torch.arange(4).double(), 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_rotation": None}, "go together, got key_rotation alone"),
        ({"key_rotation": None}, "go together, got query_rotation alone"),
        ({"query_rotation": ROTATION[:3]}, r"query_rotation must end in the shape \(4, 2, 2\).*got \(3, 2, 2\)"),
        ({"key_rotation": ROTATION[..., :1]}, r"key_rotation must end in the shape \(4, 2, 2\)"),
        ({"key_rotation": ROTATION.mT[..., :1]}, "key_rotation must end in the shape"),
        ({"key_rotation": ROTATION[0]}, "key_rotation must have at least 3 dimensions"),
        ({"query_rotation": torch.cat([ROTATION] * 2, -1), "key_rotation": torch.cat([ROTATION] * 2, -1)},
         "1 to 2 pairs for queries of width 5, got 4"),
        ({"query_rotation": ROTATION[..., :0], "key_rotation": ROTATION[..., :0]}, "1 to 2 pairs .* got 0"),
        ({"key_rotation": 1.1 * ROTATION}, r"key_rotation must hold cosines and sines.*error of 0\.21"),
        ({"key_rotation": ROTATION / 0}, "key_rotation must be finite"),
        ({"key_rotation": ROTATION.float()}, "share one dtype"),
    ],
)  # fmt: skip
def test_a_wrong_rotation_is_named(fields: dict[str, Any], message: str, as_a_user_runs_it: None) -> None:
    block = turned_block(rotary="by_position")
    with pytest.raises(InvalidInput, match=message):
        block.replace(**fields)
