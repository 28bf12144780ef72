"""The numbers of a report are what they say they are."""

from __future__ import annotations

import base64
import dataclasses as dc
import importlib
import json
import re
import time
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import nn

from lipbounds.capture import capture
from lipbounds.derivatives.first.dense import batch_items
from lipbounds.errors import InvalidInput, UnknownBound, Unsupported
from lipbounds.estimators import tokens
from lipbounds.estimators.tokens import token_lower
from lipbounds.models.loading import load_model
from lipbounds.report import budget, evaluation, from_json, maps, measure, to_json
from lipbounds.report.heads import heads_alone
from lipbounds.report.inputs import default_inputs
from lipbounds.report.page import page
from lipbounds.report.patches import Grid, grid_of, labels_of, picture_of
from lipbounds.report.schema import InputReport, Number, least_at_point, shown
from lipbounds.report.summary import fragile_heads, fragile_layer, notes_of, summary
from verify.unit.blocks import random_block, true_norm
from verify.unit.reported import tiny_input, tiny_model, tiny_report


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


ANGLES = draw(4, 2)
TURNS = torch.stack([ANGLES.cos(), ANGLES.sin()], -2)
BLOCKS = {
    "rotary": {"dim": 8, "query_rotation": TURNS, "key_rotation": TURNS},
    "biases": {},
    "one mask for all heads": {"logit_bias": draw(4, 4)},
    "a mask with one head": {"logit_bias": draw(1, 4, 4)},
    "a mask for each head": {"logit_bias": draw(2, 4, 4)},
    "causal": {"causal": True},
    "grouped keys": {"w_k": draw(1, 6, 3), "w_v": draw(1, 6, 3), "b_k": draw(1, 3), "b_v": draw(1, 3)},
    "a memory": {"memory": draw(5, 6), "moves": "memory"},
}


# -- heads and tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS.keys())
def test_the_heads_alone_add_up_to_the_block(fields: dict[str, Any]) -> None:
    block = random_block(3, **fields)
    alone = heads_alone(block)
    assert alone.batch_shape == (2,)
    assert alone.heads == 1
    torch.testing.assert_close(alone.forward().sum(0) + block.b_o, block.forward(), rtol=1e-12, atol=1e-12)
    tangent = draw(*block.moving_input.shape)
    torch.testing.assert_close(alone.jvp(tangent).sum(0), block.jvp(tangent), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(heads_alone(block, 1).forward()[0], alone.forward()[1])


@pytest.mark.parametrize("fields", [BLOCKS["biases"], BLOCKS["rotary"], BLOCKS["a memory"]])
def test_a_token_alone_moves_the_output_as_far_as_its_columns_say(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = random_block(4, **fields)
    jacobian = torch.func.jacrev(block.function())(block.moving_input)
    columns = jacobian.flatten(0, 1)  # outputs x tokens x features
    truth = torch.linalg.matrix_norm(columns.movedim(1, 0), 2)
    found = token_lower(block)
    monkeypatch.setattr(tokens, "CHUNK_ENTRIES", 2)
    torch.testing.assert_close(token_lower(block), found, rtol=0.05, atol=0)  # one token at a time
    assert bool((found <= truth).all())
    assert bool((found >= 0.95 * truth).all())


def test_a_token_that_nothing_depends_on_counts_as_zero() -> None:
    block = random_block(
        4,
        memory=draw(5, 6),
        moves="memory",
        logit_bias=torch.tensor([[0.0, 0, 0, 0, -torch.inf]]).double().expand(4, 5),
    )
    assert token_lower(block)[-1] == 0


# -- the numbers --------------------------------------------------------------------------------------------------


def test_every_number_lies_on_its_side_of_the_truth() -> None:
    with torch.no_grad():
        found = capture(tiny_model(), tiny_input())
    for layer, one in zip(tiny_report().inputs[0].layers, found, strict=True):
        block = one.attention.double.replace(x=one.attention.double.x[0])
        parts = [(layer, block)]
        for head in layer.heads:
            alone = heads_alone(block, head.head, head.head + 1)
            parts.append(
                (
                    head,
                    alone.replace(
                        **{n: getattr(alone, n)[0] for n in ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v")}
                    ),
                )
            )
        for part, target in parts:
            truth = float(true_norm(target))
            assert part.constant is not None
            assert part.lower is not None
            assert [number.method for number in part.proved] == [*evaluation.AT_POINT, "sharp"]
            assert all(number.value >= truth for number in part.proved)
            assert truth <= part.constant.value <= truth * (1 + 1e-6)
            assert truth * (1 - 1e-6) <= part.lower.value <= truth
        assert [number.method for number in layer.balls] == ["sharp_ball", *evaluation.ON_BALL]
        assert all(number.radius == 0.5 for number in layer.balls)
        assert all(number.value >= layer.constant.value for number in layer.balls)


def test_rows_of_attention_and_their_g_1_are_those_of_the_block() -> None:
    with torch.no_grad():
        block = capture(tiny_model(), tiny_input())[1].attention
    p = block.probabilities[0].double()
    top = p.sort(-1, descending=True).values
    g_1 = top[..., 0] * (1 - top[..., 0] + top[..., 1])
    for head in tiny_report().inputs[0].layers[1].heads:
        torch.testing.assert_close(torch.tensor(head.attention).double(), p[head.head], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(torch.tensor(head.g_1).double(), g_1[head.head], rtol=2e-3, atol=0)
        assert head.sink == p[head.head].mean(0).argmax()


@pytest.mark.parametrize("value", [1.38528, 0.99999, 12.0001, 1234.5, 99.95, 1e-9, 3.3e8, 0.5])
def test_what_is_shown_is_on_the_same_side_as_the_number(value: float) -> None:
    assert Decimal(value) <= Decimal(shown(value, "proved")) <= Decimal(value) * Decimal("1.0101")
    assert Decimal(value) >= Decimal(shown(value, "lower")) >= Decimal(value) * Decimal("0.989")
    assert len(re.sub(r"e.*|\D", "", shown(value, "lower")).strip("0")) <= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.38528, "1.39"), (39.1, "39.2"), (9.9933, "10.0"), (1234.5, "1240"), (0.0, "0"), (float("inf"), "inf")],
)
def test_numbers_are_shown_plainly(value: float, text: str) -> None:
    assert shown(value, "proved") == text


def test_the_summary_names_the_layer_with_the_largest_constant() -> None:
    run = tiny_report().inputs[0]
    worst = max(run.layers, key=lambda layer: layer.constant.value)
    words = summary(run)
    assert f"layer {worst.layer} is the most fragile" in words
    assert f"up to {worst.constant.shown} times as far (exact" in words
    assert f"proved bound {min((*worst.proved, *worst.balls), key=lambda n: n.value).shown} (" in words


def test_a_probable_constant_says_how_probable() -> None:
    run = tiny_report().inputs[0]
    probable = Number(
        value=9.0, method="lanczos_certificate", kind="probable", scope="point", norm="l2", dtype="float64", delta=1e-9
    )
    layers = (dc.replace(run.layers[0], constant=probable), run.layers[1])
    words = summary(dc.replace(run, layers=layers))
    assert "(probable: the chance that it fails for any of the 2 layers is at most 2e-09)" in words


def test_what_there_was_no_time_for_is_named() -> None:
    report = measure(tiny_model(), tiny_input(), max_seconds=1e-9)
    (run,) = report.inputs
    assert summary(run) == "No number was computed before the time was up."
    assert "heads: not computed, the limit of 1e-09 seconds was reached" in run.layers[0].notes
    assert run.layers[0].heads[0].attention is not None
    assert from_json(to_json(report)) == report
    assert "not computed" in page(report)


def test_tokens_are_left_out_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MAX_TOKENS", 5)
    report = measure(tiny_model(), tiny_input(), bounds=["covariance.trace"], radii=[], layers=[0])
    layer = report.inputs[0].layers[0]
    assert layer.tokens == ()
    assert layer.notes == ("tokens: left out, there are more than 5",)


def test_the_bound_that_is_shown_is_the_least_of_all_that_cover_the_point() -> None:
    report = measure(tiny_model(), tiny_input(), bounds=["covariance.trace", "sharp_ball"], radii=[1e-3], layers=[0])
    (layer,) = report.inputs[0].layers
    (loose,), (ball,) = layer.proved, layer.balls
    assert ball.value < loose.value
    assert least_at_point(layer) == ball
    assert f"proved bound {ball.shown} (sharp_ball)" in summary(report.inputs[0])


def test_sharp_is_left_out_and_named_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BUDGET", 1e3)
    monkeypatch.setattr(budget, "LARGEST", 2 * budget.sharp_work(random_block(0, n=6, dim=12, heads=3)))
    (run,) = measure(tiny_model(), tiny_input(), radii=[0.5]).inputs
    fragile = fragile_layer(run)
    assert fragile is not None
    for place, layer in enumerate(run.layers):  # the layer of the sentence at the top gets it, and no other
        methods = [number.method for number in layer.proved]
        assert methods == [*evaluation.AT_POINT, "sharp"] if place == fragile else methods == [*evaluation.AT_POINT]
        assert [number.method for number in layer.balls] == [*evaluation.ON_BALL]
    monkeypatch.setattr(evaluation, "DEVIATION_ENTRIES", 10)
    (large,) = measure(tiny_model(), tiny_input(), radii=[0.5], layers=[1]).inputs
    assert [number.method for number in large.layers[0].balls] == ["sharp_ball.direct", "yudin2025_ball.biased"]
    assert any("--bounds sharp_ball.deviation computes it" in note for note in notes_of(large))
    (both,) = measure(tiny_model(), tiny_input(), radii=[0.5]).inputs  # of large layers the most fragile one has it
    for place, layer in enumerate(both.layers):
        assert ("sharp_ball.direct" in [number.method for number in layer.balls]) == (place == fragile)
        assert "yudin2025_ball.biased" in [number.method for number in layer.balls]
        assert "sharp_ball" not in [number.method for number in layer.balls]
    assert any(f"Layer {1 - fragile}: sharp_ball.direct: left out" in note for note in notes_of(both))
    at_point, on_ball = sorted(notes_of(run))[::-1]
    assert at_point.startswith(f"Layer {1 - fragile}: sharp, the tightest proved bound at a point, was left out: it")
    assert at_point.endswith("the most fragile first; --bounds sharp computes it.")
    assert on_ball.startswith("All layers: sharp_ball, the tightest proved bound on a ball, was left out: it takes")
    (asked,) = measure(tiny_model(), tiny_input(), bounds=["sharp"], radii=[], layers=[1]).inputs
    assert [number.method for number in asked.layers[0].proved] == ["sharp"]


def test_the_layer_of_the_sentence_is_the_one_that_is_opened() -> None:
    (run, _) = tiny_report().inputs
    place = fragile_layer(run)
    assert place is not None
    assert f"layer {run.layers[place].layer} is the most fragile" in summary(run)
    sizes = [layer.constant.value for layer in run.layers if layer.constant is not None]
    assert sizes[place] == max(sizes)


def test_patches_are_found_by_their_number() -> None:
    image = torch.rand(3, 8, 4)
    shown = picture_of(image)
    pixels = base64.b64decode(shown.rgb)
    assert (shown.width, shown.height, len(pixels)) == (4, 8, 96)
    assert pixels[3] == round(255 * float(image[0, 0, 1]))
    assert grid_of(9, shown) == Grid(first=1, rows=4, columns=2)
    assert grid_of(8, shown) == Grid(first=0, rows=4, columns=2)
    assert grid_of(7, shown) == Grid(first=5, rows=2, columns=1)
    assert grid_of(30, shown) is None
    grid = grid_of(9, shown)
    assert grid is not None
    assert labels_of(grid)[:4] == ("class", "row 1, col 1", "row 1, col 2", "row 2, col 1")
    with pytest.raises(InvalidInput, match="1 or 3 channels"):
        picture_of(torch.rand(2, 8, 4))


def test_a_report_of_an_image_names_its_patches_and_comes_back_whole() -> None:
    loaded = load_model("digits-vit")
    (given,) = default_inputs(loaded)
    report = measure(loaded.module, [given], layers=[0], radii=[], bounds=["yudin2025.biased"], max_seconds=1e-9)
    (layer,) = report.inputs[0].layers
    assert layer.grid == Grid(first=1, rows=4, columns=4)
    assert layer.queries[16] == "row 4, col 4"
    assert from_json(to_json(report)) == report
    old = {**json.loads(to_json(report))}
    for run in old["inputs"]:  # as it was before there were pictures
        del run["picture"], run["layers"][0]["grid"]
    assert from_json(json.dumps(old)).inputs[0].layers[0].grid is None


def test_bounds_radii_and_layers_are_those_asked_for() -> None:
    report = measure(
        tiny_model(), tiny_input(2), bounds=["yudin2025.biased", "yudin2025_ball.biased"], radii=[0.5], layers=[1]
    )
    assert [len(run.layers) for run in report.inputs] == [1, 1]
    layer = report.inputs[1].layers[0]
    assert layer.layer == 1
    assert [number.method for number in layer.proved] == ["yudin2025.biased"]
    assert [(number.method, number.radius) for number in layer.balls] == [("yudin2025_ball.biased", 0.5)]


def test_a_bound_that_does_not_cover_a_block_is_left_out_and_named() -> None:
    report = measure(tiny_model(), tiny_input(), bounds=["yudin2025.theorem3"], radii=[], layers=[0])
    layer = report.inputs[0].layers[0]
    assert layer.proved == ()
    (note,) = layer.notes
    assert note.startswith("yudin2025.theorem3 does not cover a block with biases")
    assert layer.constant is not None
    assert "is the most fragile" in summary(report.inputs[0])


def without_maps(run: InputReport) -> InputReport:
    layers = (
        dc.replace(layer, heads=tuple(dc.replace(head, attention=None) for head in layer.heads)) for layer in run.layers
    )
    return dc.replace(run, layers=tuple(layers))


def test_of_too_many_maps_those_of_the_most_fragile_heads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    report = tiny_report()  # before the patch: the report is shared by all tests
    monkeypatch.setattr(maps, "MAP_ENTRIES", 5 * 36)
    blocks = [
        [item for one in capture(tiny_model(), data) for item in batch_items(one.attention.double)]
        for data in (tiny_input(), tiny_input() / 2)
    ]
    run, other = maps.with_maps(tuple(map(without_maps, report.inputs)), blocks)
    kept = {
        (position, head.head) for position, layer in enumerate(run.layers) for head in layer.heads if head.attention
    }
    for position, head in kept:
        assert run.layers[position].heads[head] == report.inputs[0].layers[position].heads[head]
    assert kept == set(fragile_heads(run, 3))  # the second input keeps two
    assert sum(head.attention is not None for layer in other.layers for head in layer.heads) == 2
    assert run.layers[0].heads[0].g_1 == report.inputs[0].layers[0].heads[0].g_1


# -- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "a bound that is none": ({"bounds": ["yudin"]}, UnknownBound, "no bound or estimator named 'yudin'"),
    "a lower bound": ({"bounds": ["lanczos"]}, InvalidInput, "bounds must name standing proved bounds"),
    "another norm": ({"bounds": ["covariance_token.rows"]}, (InvalidInput, UnknownBound), "bounds must|no bound"),
    "a negative radius": ({"radii": [0.1, -1.0]}, InvalidInput, r"radii \(eps\) must be finite and above 0"),
    "an infinite radius": ({"radii": [float("inf")]}, InvalidInput, r"radii \(eps\) must be finite and above 0"),
    "a layer that is none": ({"layers": [0, 7]}, InvalidInput, r"layers must be among 0 to 1.*got \[7\]"),
    "no time": ({"max_seconds": 0.0}, InvalidInput, "max_seconds must be above 0"),
    "a wrong delta": ({"delta": 2.0}, InvalidInput, "delta must be above 0 and below 1"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_argument_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(tiny_model(), tiny_input(), **options)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match="the model must call scaled_dot_product_attention"):
        measure(nn.Linear(12, 3), tiny_input())


@pytest.mark.parametrize("inputs", [torch.zeros(0, 6, 12), torch.zeros(3), []], ids=str)
def test_inputs_must_be_there(inputs: Any) -> None:
    with pytest.raises(InvalidInput, match="inputs must be a tensor"):
        measure(tiny_model(), inputs)


class Capped(nn.Module):
    """Attention that no Attention says."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).tanh().softmax(-1) @ v)


def test_a_layer_that_cannot_be_captured_is_left_out_and_said_at_the_top() -> None:
    model = nn.Sequential(*tiny_model(), Capped()).eval()
    report = measure(model, tiny_input(), bounds=["covariance.trace"], radii=[], layers=[0])
    (run,) = report.inputs
    assert [layer.layer for layer in run.layers] == [0]
    (skipped,) = run.skipped
    assert (skipped.layer, skipped.module) == (2, "2")
    assert "got torch.Tensor.tanh in between" in skipped.reason
    assert summary(run).startswith("1 attention layer could not be captured and is left out: layer 2 in 2. At")
    assert from_json(to_json(report)) == report
    assert "got torch.Tensor.tanh in between" in page(report)
    with pytest.raises(Unsupported, match="'2' cannot be captured"):
        measure(model, tiny_input(), layers=[2])
    with pytest.raises(Unsupported, match="cannot be captured"):
        measure(nn.Sequential(Capped()), tiny_input())


def test_a_deadline_holds_whatever_is_running() -> None:
    """The bounds of a block of this size take longer than that, each; the process that computes them is ended."""
    layer = nn.TransformerEncoderLayer(512, 1, 16, dropout=0.0, batch_first=True).eval()
    start = time.monotonic()
    report = measure(layer, draw(1, 500, 512).float(), max_seconds=4.0)
    assert time.monotonic() - start < 4 + 10
    (run,) = report.inputs
    assert any("the limit of 4 seconds was reached" in note for note in run.layers[0].notes)
    assert from_json(to_json(report)) == report


class Slow(nn.Module):
    """A minute for inputs above 1, in many short calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(600 * int(x.amax() > 1)):
            x = x + 0.0
            time.sleep(0.1)
        return self.inner(x)


def test_the_limit_of_time_holds_for_runs_of_the_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("lipbounds.report.measure"), "GRACE", 0.5)
    quick = tiny_input() / tiny_input().abs().amax()
    start = time.monotonic()
    report = measure(Slow(), torch.cat([quick, 9 * quick]), bounds=["covariance.trace"], radii=[], max_seconds=1.0)
    assert time.monotonic() - start < 1 + 10
    first, second = report.inputs
    assert len(first.layers) == 2
    assert second.layers == ()
    assert "the model was not run to its end at this input: the limit of 1 seconds" in second.warnings[0]
    assert from_json(to_json(report)) == report
    assert "not run to its end" in page(report)
    with pytest.raises(InvalidInput, match=r"max_seconds must leave time to run the model, got max_seconds=0\.1"):
        measure(Slow(), 9 * quick, max_seconds=0.1)


def test_what_is_found_is_told_number_by_number() -> None:
    seen: list[list[str]] = []
    wanted = evaluation.plan(bounds=["covariance.trace", "covariance.exact"], radii=[], delta=1e-9, seed=0)
    keep = lambda found: seen.append([one.method for one in found.items[0].proved])  # noqa: E731
    found = evaluation.compute([random_block(0)], evaluation.cheap_stages()[0], wanted, keep=keep)
    assert seen == [["covariance.trace"], ["covariance.trace", "covariance.exact"], seen[1]]
    assert found.items[0].constant is not None


def test_a_process_of_its_own_finds_the_same_numbers() -> None:
    options: dict[str, Any] = {"bounds": ["covariance.trace"], "radii": [], "layers": [0]}
    assert measure(tiny_model(), tiny_input(), max_seconds=1e4, **options) == measure(
        tiny_model(), tiny_input(), **options
    )
