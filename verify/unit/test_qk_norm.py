"""QK-norm: the function, its Jacobian and its rounding, what supports it, and what is refused."""

from __future__ import annotations

import itertools
from decimal import Decimal
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lipbounds
from lipbounds import Attention, InvalidInput, UnsupportedAttention
from lipbounds.compose.curvature import supports_curvature
from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.derivatives.rounding.logits import key_error, logit_error, query_error
from lipbounds.derivatives.token_maps import key_maps, query_maps
from lipbounds.kernels.streaming import streaming_theorem_3
from lipbounds.registry import BoundSpec, registry
from lipbounds.report.heads import heads_alone
from lipbounds.targets.rotary import rotate
from lipbounds.testing import extended, oracles
from lipbounds.testing.contract import CHECKS
from lipbounds.testing.falsify import Setting, attack, judge
from lipbounds.testing.recipes import NORMS
from lipbounds.testing.relation_checks import rounding_room
from lipbounds.testing.shrink import shrink
from lipbounds.testing.snippet import snippet
from verify.unit.blocks import check_batch_is_its_items, check_function, error, turned_block
from verify.unit.sample_bounds import spec


MOVES = ("self", "query", "memory")
OVER = ("head", "all_heads")
PROVED = {
    *{"centred.products", "centred.weights", "covariance.exact", "sharp", "sharp_cheap", "sharp_fast"},
    *{f"yudin2025.biased{form}" for form in ("", "_exact", "_half", "_one")},
}
SHARP_BALL = {"sharp_ball", "sharp_ball.deviation", "sharp_ball.direct", "sharp_ball.taylor"}
NO_BIASES = {"hu2024.ball"}
FORMULAS_ON_BALLS = {"centred.change", "havens2024.change", "yudin2025_ball.biased", *NO_BIASES}
ESTIMATORS = {"exact", "lanczos", "lanczos_certificate", "lanczos_posterior", "power_iteration"}
ON_BALLS = {"ascent_jacobians", "ascent_pairs", "clever", "random_jacobians", "random_pairs"}
SUPPORTING = PROVED | SHARP_BALL | FORMULAS_ON_BALLS | ESTIMATORS | ON_BALLS
BIASES = frozenset(("b_q", "b_k", "b_v", "b_o"))


def normed_block(moves: str = "self", over: str = "head", **fields: Any) -> Attention:
    """`turned_block` with QK-norm."""
    return turned_block(moves, **({"norm": "near_ones", "norm_over": over, "norm_eps": 0.01} | fields))


def by_torch(block: Attention, moving: Tensor) -> Tensor:
    """The output, with torch's own norm, head by head: another way to write it."""
    x = block.x if block.moves == "memory" else moving
    source = block.source_input if block.moves == "query" else moving

    def normed(tokens: Tensor, side: str) -> Tensor:
        weights, bias, gain = (getattr(block, name) for name in (f"w_{side[0]}", f"b_{side[0]}", f"{side}_norm_weight"))
        rows = [tokens @ matrix + offset for matrix, offset in zip(weights, bias, strict=True)]
        if block.norm_over == "all_heads":
            whole = torch.cat(rows, -1)
            rows = F.rms_norm(whole, whole.shape[-1:], gain.flatten(), block.norm_eps).chunk(len(rows), -1)
        else:
            rows = [F.rms_norm(row, row.shape[-1:], own, block.norm_eps) for row, own in zip(rows, gain, strict=True)]
        return rotate(torch.stack([*rows]), getattr(block, f"{side}_rotation"))

    queries, keys = normed(x, "query"), normed(source, "key")
    logits = block.scale_value * queries @ keys.mT + (0 if block.mask is None else block.mask)
    assert block.b_v is not None
    assert block.b_o is not None
    return (logits.softmax(-1) @ (source @ block.w_v + block.b_v[:, None]) @ block.w_o).sum(0) + block.b_o


@pytest.mark.parametrize(("moves", "over", "rotary"), [*itertools.product(MOVES, OVER, ("none", "random"))])
def test_the_block_and_its_judges_are_the_function_written_with_the_norm_of_torch(
    moves: str, over: str, rotary: str
) -> None:
    block = normed_block(moves, over, rotary=rotary)
    exact = check_function(block, lambda tokens: by_torch(block, tokens))
    assert abs(oracles.jacobian_norm(block).item() - exact) <= oracles.truth_slack(block).item() < 1e-3 * exact
    assert exact <= lipbounds.get("exact")(block).value.item() < exact * (1 + 1e-9)
    assert exact * (1 - 1e-9) < lipbounds.get("lanczos")(block).value.item() <= exact


@pytest.mark.usefixtures("as_a_user_runs_it")  # the contract checks the shapes of these bounds and estimators
@pytest.mark.parametrize(("moves", "over"), [*itertools.product(MOVES, OVER)])
def test_a_batch_of_norms_is_its_items(moves: str, over: str) -> None:
    block = normed_block(moves, over, batch=(2, 2), batched="both")
    assert block.query_norm_weight is not None
    assert block.query_norm_weight.shape[:-2] == block.batch_shape == (2, 2)
    check_batch_is_its_items(
        block, {name: 1e-4 if name == "power_iteration" else 1e-6 for name in sorted(PROVED | ESTIMATORS)}
    )


def test_repeated_keys_have_the_mean_of_their_groups() -> None:
    block = normed_block(over="all_heads", heads=4, groups=2, rotary="none")
    assert block.b_k is not None
    once = block.source_input @ block.w_k[::2] + block.b_k[::2, None]
    whole = once.movedim(0, -2).flatten(-2)
    assert block.key_norm_weight is not None
    expected = F.rms_norm(whole, (10,), block.key_norm_weight[::2].flatten(), block.norm_eps)
    torch.testing.assert_close(block.keys[::2], expected.unflatten(-1, (2, 5)).movedim(-2, 0))
    torch.testing.assert_close(block.keys[1::2], block.keys[::2])


@pytest.mark.parametrize("over", OVER)
def test_a_norm_with_a_huge_eps_is_none(over: str) -> None:
    """r is then eps^(-1/2) at all tokens, which the weights undo."""
    plain = normed_block(norm="none", heads=3, rotary="none", groups=3)
    gain = torch.full((3, 5), 1e8).double()
    block = plain.replace(query_norm_weight=gain, key_norm_weight=gain, norm_eps=1e16, norm_over=over)
    assert "qk_norm" not in plain.features
    torch.testing.assert_close(block.forward(), plain.forward())
    # Of these, parts are larger: max |T_j| |W_K| |q| stands in place of |W_K q|.
    forms = PROVED - {"covariance.exact", "sharp_cheap", "sharp_fast"}
    if over == "all_heads":
        forms -= {"centred.weights"}  # the norm of W_Q of all heads in place of that of one
    for name in sorted(forms):
        one, other = (lipbounds.get(name)(b).value.item() for b in (block, plain))
        assert one == pytest.approx(other, rel=1e-6), name


def test_keys_that_are_scaled_alike_are_the_same_keys() -> None:
    """But for eps, a norm does not see the size of what is projected."""
    block = normed_block(norm_eps=1e-12, biases=frozenset(), rotary="none")
    larger = block.replace(w_q=7 * block.w_q, w_k=block.w_k / 3)
    torch.testing.assert_close(block.logits, larger.logits, rtol=1e-9, atol=1e-9)
    for name in sorted(PROVED):
        one, other = (lipbounds.get(name)(b).value.item() for b in (block, larger))
        assert one == pytest.approx(other, rel=1e-6), name


# -- who takes them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [found for found in registry if found.target is Attention], ids=lambda s: s.name)
def test_no_bound_silently_ignores_a_norm(found: BoundSpec) -> None:
    """Neither an upper nor a lower bound, nor a refuted formula; a block of one head, without anything else."""
    block = normed_block(heads=1, mask="none", biases=frozenset(), rotary="none")
    assert block.features == {"qk_norm"}
    radius = 0.1 if found.needs_radius else None
    if found.name not in SUPPORTING:
        with pytest.raises(UnsupportedAttention, match=r"qk_norm \(QK-norm: queries and keys divided by"):
            found(block, radius)
        return
    value = found(block, radius).value.item()
    plain = block.replace(query_norm_weight=None, key_norm_weight=None, norm_eps=None, norm_over=None)
    assert abs(value / found(plain, radius).value.item() - 1) > 1e-3
    truth = oracles.jacobian_norm(block).item()
    if found.claim.kind in ("proved", "probable"):
        assert truth <= value
    elif found.claim.scope == "point":
        assert value <= truth


def test_what_is_no_registered_bound_refuses_it() -> None:
    block = normed_block(rotary="none")
    assert {found.name for found in lipbounds.select(block=block)} == SUPPORTING - NO_BIASES
    assert not supports_curvature(block)
    with pytest.raises(UnsupportedAttention, match="QK-norm"):
        streaming_theorem_3(block)


@pytest.mark.parametrize("over", OVER)
def test_the_heads_alone_add_up_to_the_block(over: str) -> None:
    block = normed_block(over=over, heads=3, groups=3)
    alone = heads_alone(block)
    assert alone.batch_shape == (3,)
    torch.testing.assert_close(alone.forward().sum(0) + block.b_o, block.forward(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(heads_alone(block, 1, 2).forward()[0], alone.forward()[1])
    for head, value in enumerate(lipbounds.get("yudin2025.biased")(alone).value):
        assert oracles.jacobian_norm(oracles.batch_item(alone, (head,))) <= value


# -- dtypes and rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "over"), [*itertools.product((torch.float32, torch.bfloat16, torch.float16), OVER)])
def test_a_norm_survives_a_short_dtype(dtype: torch.dtype, over: str) -> None:
    block = normed_block(over=over).to(dtype)
    assert block.query_norm_weight is not None
    assert block.query_norm_weight.dtype == block.dtype == dtype
    wide = block.double
    assert (wide.norm_eps, wide.norm_over, wide.dtype) == (0.01, over, torch.float64)
    exact = float(extended.jacobian_norm_extended(block))
    assert lipbounds.get("lanczos")(block).value.item() <= exact
    assert exact <= lipbounds.get("exact")(block).value.item() <= lipbounds.get("centred.products")(block).value.item()
    assert exact <= lipbounds.get("covariance.exact")(block).value.item()


def exact_rows(block: Attention, side: str) -> list[Any]:
    """Queries or keys of each head in 60 digits."""
    weights, bias, gain = (getattr(block, name) for name in (f"w_{side[0]}", f"b_{side[0]}", f"{side}_norm_weight"))
    tokens = extended._exact(block.x)
    rows, _ = extended._normalised(block, gain, *extended._projected(tokens, tokens, weights, bias))
    return [extended._turned(oracles.rotation_matrices(block, side), row) for row in rows]  # pyright: ignore


@pytest.mark.parametrize(
    ("size", "over", "eps", "left"),
    [
        (1.0, "head", 1e-2, 1.0),
        (1.0, "all_heads", 1e-6, 1e-3),
        (1e3, "head", 1e-6, 1e-9),
        (1e6, "all_heads", 1e-12, 1e-9),
        (1e6, "head", 1e-20, 1e-9),
        (1e6, "head", 1e-24, 0.0),  # nothing but rounding is left of the first query: r is hardly known
    ],
)
def test_rounding_stays_below_its_bounds(size: float, over: str, eps: float, left: float) -> None:
    """Of J v, J^T u, rows and logits, against 60 digits; biases that nearly cancel the first query."""
    largest = 0.0
    for seed in range(3):
        block = normed_block(over=over, seed=seed, norm_eps=eps, bias_scale=size, biases=BIASES - {"b_o"})
        assert block.b_q is not None
        block = block.replace(
            w_q=size * block.w_q, b_q=-size * (block.x[0] @ block.w_q) * (1 + left * block.b_q / size)
        )
        generator = torch.Generator().manual_seed(seed)
        v, u = (torch.randn(4, width, generator=generator, dtype=torch.float64) for width in (3, 4))
        roundoff = Roundoff(block)
        with extended.decimal.localcontext(extended.CONTEXT):
            columns = torch.eye(12).double().reshape(12, 4, 3)
            dense = [extended._product(block, extended._exact(column)).reshape(-1) for column in columns]
            transposed = extended.np.array([column @ extended._exact(u).reshape(-1) for column in dense])
            queries, keys = (exact_rows(block, side) for side in ("query", "key"))
            logits = extended.np.stack(
                [Decimal(block.scale_value) * q @ k.T for q, k in zip(queries, keys, strict=True)]
            )
            products = block.scale_value * block.queries @ block.keys.mT
            errors = [
                (error(block.jvp(v), extended._product(block, extended._exact(v))), roundoff.jvp(v.abs())),
                (error(block.vjp(u), transposed), roundoff.vjp(u.abs())),
                (error(products, extended.np.stack(logits)), logit_error(block).unsqueeze(-1).expand(products.shape)),
                (error(block.queries, extended.np.stack(queries)).norm(dim=-1), query_error(block)),
                (error(block.keys, extended.np.stack(keys)).norm(dim=-1), key_error(block)),
            ]  # fmt: skip
        for found, allowed in errors:
            assert (found <= allowed).all()
            largest = max(largest, float((found / allowed.clamp(min=1e-300)).max()))
    assert largest > 1e-6  # the bounds are not absurdly large


@pytest.mark.parametrize(("side", "over", "rotary"), [*itertools.product(("query", "key"), OVER, ("none", "random"))])
def test_the_maps_of_tokens_are_the_derivatives_of_queries_and_keys(side: str, over: str, rotary: str) -> None:
    block = normed_block(over=over, rotary=rotary)
    maps = query_maps(block) if side == "query" else key_maps(block)
    assert maps is not None
    assert maps.error is not None

    def rows(x: Tensor) -> Tensor:
        moved = block.at(x)
        return moved.queries if side == "query" else moved.keys

    found = maps.matrices @ maps.weights.mT.unsqueeze(-3)  # heads n d D
    jacobian = torch.func.jacrev(rows)(block.x).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    torch.testing.assert_close(found, jacobian, rtol=1e-11, atol=1e-11)
    norms = torch.linalg.matrix_norm(maps.matrices, 2).amax(-1)
    assert (norms <= maps.norm).all()
    assert (maps.norm < 3 * norms).all()  # at most the ratio of the weights, and of r over the tokens
    assert (maps.error < 1e-12 * norms).all()


# -- the verifier ------------------------------------------------------------------------------------------------


def test_all_kinds_of_norm_are_built() -> None:
    for name, over in itertools.product(NORMS, OVER):
        block = normed_block(norm=name, over=over)
        assert ("qk_norm" in block.features) == (name != "none")
        logits = normed_block(norm=name, over=over, mask="none").logits
        assert (logits.amax(-1) - logits.amin(-1)).max().item() == pytest.approx(4.0)


@pytest.mark.parametrize("over", OVER)
def test_ascent_finds_a_bound_that_forgets_the_norm(over: str) -> None:
    wrong = spec(lambda block: block.replace(
        query_norm_weight=None, key_norm_weight=None, norm_eps=None, norm_over=None
    ).w_v.new_tensor(1e-3).expand(block.batch_shape))  # fmt: skip
    found = attack(wrong, Setting(tokens=2, dim=2, heads=2, norm_over=over), starts=4, steps=5)
    assert found.refuted
    assert found.block.norm_over == over


def test_ascent_climbs_to_the_constant_of_a_normalised_block() -> None:
    """The truth that is climbed is the one that judges."""
    found = attack(spec(oracles.jacobian_norm), Setting(tokens=3, dim=3, heads=3, norm_over="all_heads", rotary=False),
                   starts=4, steps=3)  # fmt: skip
    assert found.ratio == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("over", "rotary"), [*itertools.product(OVER, ("none", "random"))])
def test_a_counterexample_keeps_what_it_needs_and_runs(over: str, rotary: str) -> None:
    block = normed_block(over=over, n=3, dim=2, head_dim=4, mask="none", biases=frozenset(("b_q",)), rotary=rotary)
    wrong = spec(lambda b: oracles.jacobian_norm(b) * (0.5 if b.norm_over == over else 1.0))
    found = shrink(wrong, judge(wrong, block), seconds=3.0)
    assert found.refuted
    assert found.block.features == {"qk_norm"}
    assert max(found.block.x.shape) <= 2
    shown: dict[str, Any] = {}
    for shape in ({"moves": "self"}, {"moves": "memory", "biases": frozenset(("b_k", "b_v"))}, {"moves": "query"}):
        source = snippet("centred.weights", normed_block(over=over, rotary=rotary, **shape)).split("print(")[0]
        exec(source, shown)  # with the truth it computes by itself, in an independent way
        assert shown["truth"] == pytest.approx(oracles.jacobian_norm(shown["block"]).item(), rel=1e-10)
        assert shown["truth"] <= shown["claimed"]


# -- wrong fields ------------------------------------------------------------------------------------------------

GAIN = torch.ones(2, 5).double()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_norm_weight": None}, "go together, got no query_norm_weight"),
        ({"key_norm_weight": None, "norm_eps": None}, "got no key_norm_weight and no norm_eps; pass all four"),
        ({"norm_over": None}, "got no norm_over"),
        ({"norm_over": "heads"}, r"norm_over must be one of \('head', 'all_heads'\), got norm_over='heads'"),
        ({"norm_eps": 0.0}, r"norm_eps must be finite and above 0, got norm_eps=0\.0"),
        ({"norm_eps": -1e-6}, "norm_eps must be finite and above 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be finite and above 0, got norm_eps=nan"),
        ({"norm_eps": float("inf")}, "norm_eps must be finite and above 0"),
        ({"query_norm_weight": GAIN[:, :4]}, r"query_norm_weight must end in the shape \(2, 5\).*got \(2, 4\)"),
        ({"query_norm_weight": GAIN[:1]}, r"query_norm_weight must end in the shape \(2, 5\).*got \(1, 5\)"),
        ({"query_norm_weight": GAIN[0]}, "query_norm_weight must have at least 2 dimensions"),
        ({"key_norm_weight": GAIN[:, :1]}, r"key_norm_weight must end in the shape \(2, 5\)"),
        ({"key_norm_weight": GAIN / 0}, "key_norm_weight must be finite"),
        ({"key_norm_weight": 0 * GAIN / 0}, "key_norm_weight must be finite"),
        ({"key_norm_weight": GAIN.float()}, "share one dtype"),
        ({"key_norm_weight": [[1.0] * 5] * 2}, "key_norm_weight must be a torch tensor"),
    ],
)
def test_a_wrong_norm_is_named(fields: dict[str, Any], message: str, as_a_user_runs_it: None) -> None:
    with pytest.raises(InvalidInput, match=message):
        normed_block(groups=2).replace(**fields)


def test_one_group_of_norm_weights_is_repeated_for_its_heads() -> None:
    block = normed_block()
    given = {name: getattr(block, name)[:1] for name in ("w_k", "w_v", "b_k", "b_v", "key_norm_weight")}
    again = block.replace(**given)
    torch.testing.assert_close(again.key_norm_weight, block.key_norm_weight, rtol=0, atol=0)
    assert "norm_eps=0.01" in repr(again)


def test_a_rewritten_block_may_differ_by_the_rounding_that_a_sharp_norm_magnifies() -> None:
    """Two keys agree to 1e-5 after the norm and meet a weight of 1e5: `exact` adds 0.006 of 1.8 for rounding there."""
    block = Attention(
        x=torch.tensor([[-2.5, -0.5, -1.0, 1.0, -1.0, -1.5]], dtype=torch.float64),
        w_q=torch.tensor([[[-1.0], [-2.0], [-2.0], [1.0], [-1.0], [0.5]]], dtype=torch.float64),
        w_k=torch.tensor([[[0.0], [0.0], [-0.5], [0.0], [0.0], [0.0]]], dtype=torch.float64),
        w_v=torch.tensor(
            [[[1.0, -1.5], [0.5, 0.5], [-0.5, -1.5], [-1.0, 0.0], [0.5, 0.0], [-1.0, -1.5]]], dtype=torch.float64
        ),
        w_o=torch.tensor([[[1.0], [-0.5]]], dtype=torch.float64),
        query_norm_weight=torch.tensor([[140626.87654532367]], dtype=torch.float64),
        key_norm_weight=torch.tensor([[1.0]], dtype=torch.float64),
        norm_eps=1e-06,
        norm_over="head",
        scale=1.0,
        memory=torch.tensor(
            [[-0.5, -0.5, -0.5, -0.5, -0.5, -0.5], [0.5, 0.0, -1.5, -0.5, -2.0, 0.0]], dtype=torch.float64
        ),
        moves="memory",
    )
    exact = lipbounds.get("exact")
    CHECKS["rotation"].function(exact, block, radius=None, seed=0)
    bound = exact(block)
    assert rounding_room(block, bound.value) < 0.02 * bound.value  # and a fault of two in a hundred is still seen
