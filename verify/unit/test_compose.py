"""Whole networks: bounds of layers and compositions against dense Jacobians at the point and by ascent in the ball."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lipbounds
from lipbounds.compose import containers as tree
from lipbounds.compose import network_bound, rewrite
from lipbounds.compose import primitives as leaves
from lipbounds.compose.propagated_set import PropagatedSet, Step
from lipbounds.compose.rewrite import flat, rewritten
from lipbounds.ops import activations, enclosure
from lipbounds.ops.normalization import NormalizationRange
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Layer,
    Linear,
    Normalization,
    Patches,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
    layer_norm,
    rms_norm,
)
from lipbounds.targets.network import Network
from verify.unit.blocks import random_block
from verify.unit.networks import Draw, attention, feed_forward, largest_norm, norm, transformer


Case = tuple[Layer, torch.Tensor, float]


def ratio(case: Case, **options: Any) -> float:
    """The largest norm found in the ball over the bound: above 1 is a refutation."""
    network, x, radius = case
    reached, bound = largest_norm(network.function(), x, radius, starts=6), network_bound(network, x, radius, **options)
    value = float(bound.value)
    return reached / value if value > 0 else math.inf if reached > 0 else 0.0


def image(draw: Draw) -> torch.Tensor:
    return draw(2, 4, 4)


def two_linear(draw: Draw) -> Layer:
    return Sequence((Linear(draw(4, 3), draw(4)), Linear(draw(2, 4))))


LAYERS: dict[str, tuple[Callable[[Draw], Layer], Callable[[Draw], torch.Tensor]]] = {
    "linear": (lambda d: Linear(d(4, 3), d(4)), lambda d: d(2, 3)),
    "two linear": (two_linear, lambda d: d(2, 3)),
    "layer norm": (lambda d: norm(d, 4), lambda d: d(3, 4)),
    "layer norm, constant token": (lambda d: norm(d, 4), lambda d: torch.ones(1, 4, dtype=torch.float64)),
    "layer norm, D = 1": (lambda d: layer_norm(d(1), d(1)), lambda d: d(2, 1)),
    "layer norm, D = 2": (lambda d: norm(d, 2), lambda d: d(2, 2)),
    "rms norm": (lambda d: norm(d, 4, False), lambda d: d(3, 4)),
    "rms norm, D = 1": (lambda d: rms_norm(d(1), epsilon=0.1), lambda d: d(2, 1)),
    **{name: (lambda d, name=name: Pointwise(name), lambda d: 2 * d(2, 3)) for name in activations.ACTIVATIONS},
    "feed-forward": (lambda d: feed_forward(d, 3, 5, "gelu"), lambda d: d(2, 3)),
    "feed-forward with residual": (lambda d: Residual(feed_forward(d, 3, 5, "silu")), lambda d: d(2, 3)),
    "linear with residual": (lambda d: Residual(Linear(-0.5 * torch.eye(3).double())), lambda d: d(2, 3)),
    "attention": (lambda d: attention(d, 3, 4), lambda d: d(3, 4)),
    "attention with residual": (lambda d: Residual(attention(d, 3, 4)), lambda d: d(3, 4)),
    "attention after norm": (lambda d: Sequence((norm(d, 4), attention(d, 3, 4))), lambda d: d(3, 4)),
    "post-norm": (lambda d: Sequence((norm(d, 4), Residual(attention(d, 3, 4)))), lambda d: d(3, 4)),
    "causal": (lambda d: attention(d, 3, 4, causal=True), lambda d: d(3, 4)),
    "mean": (lambda d: Sequence((norm(d, 3), Pool("mean"))), lambda d: d(4, 3)),
    "first": (lambda d: Sequence((norm(d, 3), Pool("first"), Linear(d(2, 3)))), lambda d: d(4, 3)),
    "last": (lambda d: Pool("last"), lambda d: d(4, 3)),
    "flat": (lambda d: Sequence((norm(d, 3), Flatten(), Linear(d(2, 12)))), lambda d: d(4, 3)),
    "patches": (lambda d: Sequence((Patches((2, 2), (2, 2)), Linear(d(3, 8)))), image),
    "overlapping": (lambda d: Sequence((Patches((3, 3), (1, 1), (1, 1)), Linear(d(3, 18)))), image),
    "sparse patches": (lambda d: Sequence((Patches((1, 2), (2, 3)), Linear(d(3, 4)))), image),
    "class token": (lambda d: Sequence((Positions(d(1, 3), d(4, 3)), norm(d, 3))), lambda d: d(3, 3)),
}


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_bounded_in_its_ball(name: str, radius: float) -> None:
    make, inputs = LAYERS[name]
    draw = Draw(len(name))
    network, x = make(draw), inputs(draw)
    assert ratio((network, x, radius)) <= 1 + 1e-9


EXACT = ["linear", "two linear", "layer norm", "rms norm", "gelu", "silu", "relu", "tanh", "feed-forward"]
EXACT += ["feed-forward with residual", "linear with residual", "first", "last", "patches", "sparse patches"]


@pytest.mark.parametrize("name", EXACT)
def test_what_acts_on_tokens_alone_is_exact_at_a_point(name: str) -> None:
    make, inputs = LAYERS[name]
    draw = Draw(7)
    assert ratio((make(draw), inputs(draw), 0.0)) == pytest.approx(1, abs=1e-9)


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 3),
    dim=st.integers(1, 4),
    pre_norm=st.booleans(),
    centred=st.booleans(),
    activation=st.sampled_from(["gelu", "gelu_tanh", "silu", "relu", "tanh"]),
    how=st.sampled_from(["mean", "first", "last"]),
    depth=st.integers(1, 2),
    radius=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_random_transformers_are_bounded(
    seed: int, n: int, dim: int, pre_norm: bool, centred: bool, activation: str, how: Any, depth: int, radius: float
) -> None:
    draw = Draw(seed)
    network = transformer(draw, n, dim, pre_norm=pre_norm, centred=centred, activation=activation, how=how, depth=depth)
    x = draw(n, dim)
    reached = largest_norm(network.function(), x, radius, steps=3, starts=2)
    # The truth by automatic differentiation carries rounding of its own, relative to the norms of the layers.
    assert reached <= float(network_bound(network, x, radius).value) * (1 + 1e-9) + 1e-12


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    dim=st.integers(1, 4),
    centred=st.booleans(),
    scale=st.sampled_from([1e-8, 1e-2, 1.0, 1e3]),
    log_epsilon=st.integers(-12, 0),
    share=st.sampled_from([0.0, 1e-3, 0.5, 2.0]),
)
def test_normalisation_layers_are_bounded(
    seed: int, dim: int, centred: bool, scale: float, log_epsilon: int, share: float
) -> None:
    draw = Draw(seed)
    layer = Normalization(centred, 10.0**log_epsilon, draw(dim), draw(dim))
    x = scale * draw(2, dim)
    bound = network_bound(layer, x, share * scale)
    sigma = 10.0 ** (log_epsilon / 2)
    reached = largest_norm(layer.function(), x, share * scale, steps=4, starts=2)
    assert reached <= float(bound.value) * (1 + 1e-9) + 1e-13 / sigma


# -- the account ------------------------------------------------------------------------------------------------------


def small(pre_norm: bool = True, seed: int = 3, **options: Any) -> tuple[Sequence, torch.Tensor]:
    draw = Draw(seed)
    settings = {"pre_norm": pre_norm, "centred": True, "activation": "gelu", "how": "mean"} | options
    return transformer(draw, 3, 4, **settings), draw(3, 4)


@pytest.mark.parametrize("radius", [0.0, 0.01])
def test_the_account_ends_in_the_value(radius: float) -> None:
    network, x = small()
    bound = network_bound(network, x, radius)
    top = [line for line in bound.layers if line.depth == 0]
    assert top[-1].so_far is not None
    torch.testing.assert_close(top[-1].so_far, bound.value, rtol=1e-12, atol=0)
    assert [line.so_far is None for line in bound.layers] == [line.depth > 0 for line in bound.layers]
    product = math.prod(float(line.bound) for line in top)
    assert float(bound.value) <= product * (1 + 1e-9)
    assert bound.result.claim.kind == "proved"
    assert bound.result.claim.scope == ("ball" if radius else "point")
    assert float(top[0].input_radius) == radius
    if radius:
        for before, after in itertools.pairwise(top):
            assert float(after.input_radius) <= float(before.input_radius * before.bound) * (1 + 1e-9)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_no_token_leaves_the_radius_of_its_layer(pre_norm: bool) -> None:
    """What a layer gets at a point of the ball is within the radii of the account, as a whole and token by token."""
    network, x = small(pre_norm)
    radius = 0.02
    lines = [line for line in network_bound(network, x, radius).layers if line.depth == 0]
    parts = [part for _, part in rewritten(flat([("", network)]))]
    draw = Draw(9)
    for _ in range(20):
        move = draw(*x.shape)
        here, there = x, x + radius * move / move.norm()
        for line, part in zip(lines, parts, strict=True):
            change = there - here
            assert float(change.norm()) <= float(line.input_radius) * (1 + 1e-9)
            assert float(change.norm(dim=-1).max()) <= float(line.token_radius) * (1 + 1e-9)
            here, there = part(here), part(there)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_rewriting_keeps_the_function(pre_norm: bool, centred: bool) -> None:
    network, x = small(pre_norm, centred=centred)
    y = x
    for _, part in rewritten(flat([("", network)])):
        if isinstance(part, Residual) and isinstance(part.body, Sequence):
            part = Residual(Sequence(tuple(p for _, p in rewritten(flat([("", part.body)])))), part.skip)
        y = part(y)
    torch.testing.assert_close(y, network(x), rtol=1e-12, atol=1e-12)


def test_a_batch_is_its_items() -> None:
    network, _ = small()
    x = Draw(5)(2, 2, 3, 4)
    for radius in (0.0, 0.01):
        whole = network_bound(network, x, radius).value
        for index in ((0, 0), (1, 1)):
            torch.testing.assert_close(whole[index], network_bound(network, x[index], radius).value, rtol=1e-9, atol=0)


def test_grows_with_the_radius_from_the_value_at_the_point() -> None:
    network, x = small()
    names = ("yudin2025_ball.biased",)
    values = [
        float(network_bound(network, x, r, attention=names).value) for r in (0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 50.0)
    ]
    assert values == sorted(values)
    assert values[1] <= values[0] * 1.01


def test_several_attention_bounds_give_the_smallest() -> None:
    network, x = small()
    one, other = (float(network_bound(network, x, attention=name).value) for name in ("covariance.exact", "exact"))
    both = float(network_bound(network, x, attention=("covariance.exact", "exact")).value)
    assert both <= min(one, other) * (1 + 1e-12)
    assert other < one


def test_a_probable_attention_bound_makes_a_probable_network_bound() -> None:
    network, x = small(depth=2)
    result = network_bound(network, x, attention="lanczos_certificate").result
    assert result.kind == "probable"
    assert result.delta == pytest.approx(2e-9)


def test_cheap_forms_for_large_networks_hold_too(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = small()
    tight = float(network_bound(network, x).value)
    monkeypatch.setattr(leaves, "MATRIX_ENTRIES", 0)
    monkeypatch.setattr(leaves, "HIDDEN_ENTRIES", 0)
    for radius in (0.0, 0.01):
        assert ratio((network, x, radius)) <= 1
    assert float(network_bound(network, x).value) >= tight


def test_float32_is_its_floats_in_float64() -> None:
    network, x = (part.to(torch.float32) for part in small())
    value = network_bound(network, x).value
    assert value.dtype == torch.float32
    wide = network_bound(network.to(torch.float64), x.double()).value
    assert float(wide) <= float(value) <= float(wide) * (1 + 2e-7)


# -- planted faults: each makes some bound too small, and the comparison above must see it -----------------------------


def relu_dip(draw: Draw) -> Case:
    """A neuron off at the centre that is on in the ball."""
    first = Linear(torch.eye(2).double(), torch.tensor([-0.05, -0.05], dtype=torch.float64))
    return Sequence((first, Pointwise("relu"), Linear(torch.eye(2).double()))), torch.zeros(1, 2).double(), 0.1


def gelu_peak(draw: Draw) -> Case:
    return Pointwise("gelu"), torch.full((1, 1), math.sqrt(2)).double(), 1.0


def shrinking(draw: Draw) -> Case:
    return layer_norm(epsilon=1e-6), draw(1, 5), 0.5


CASES: dict[str, Callable[[Draw], Case]] = {
    "relu": relu_dip,
    "gelu": gelu_peak,
    "norm": shrinking,
    "norm at a point": lambda d: (layer_norm(epsilon=0.1), d(1, 5), 0.0),
    "negative gamma": lambda d: (layer_norm(torch.tensor([0.1, 0.1, -3.0]).double()), d(1, 3), 0.0),
    "two": lambda d: (Residual(Linear(torch.eye(2).double())), d(1, 2), 0.0),
    "grown": lambda d: (
        Sequence((Linear(10 * torch.eye(3).double()), layer_norm(epsilon=1e-9))),
        torch.tensor([[0.1, 0.0, -0.1]]).double(),
        0.1,
    ),
    "mean": lambda d: (Pool("mean"), d(4, 2), 0.0),
    "windows": lambda d: (Patches((3, 3), (1, 1)), d(1, 7, 7), 0.0),
    "feed-forward": lambda d: (
        Sequence((Linear(torch.eye(1).double()), Pointwise("tanh"), Linear(torch.eye(1).double()))),
        torch.full((1, 1), 2.0).double(),
        1.9,
    ),
    "values": lambda d: (
        Sequence((layer_norm(3 * torch.ones(4).double(), epsilon=1e-3), AttentionLayer(mixing_only(d)))),
        d(1, 4),
        0.0,
    ),
    "after attention": lambda d: (
        Sequence((AttentionLayer(mixing_only(d, 20.0)), layer_norm(epsilon=1e-9))),
        0.05 * d(1, 4),
        0.04,
    ),
    "two tokens": lambda d: (
        Sequence((Positions(), layer_norm(epsilon=1e-6), Pool("first"), Linear(d(4, 4)))),
        torch.stack([0.1 * d(4), 10 * d(4)]),
        0.0,
    ),
}


def mixing_only(draw: Draw, scale: float = 1.0) -> lipbounds.Attention:
    """One token, one head: attention is the linear map scale * x."""
    eye = torch.eye(4).double()[None]
    zero = torch.zeros_like(eye)
    return lipbounds.Attention(x=draw(1, 4), w_q=zero, w_k=zero, w_v=scale * eye, w_o=eye)


def patched(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, make(getattr(module, name)))


def range_with(change: Callable[..., NormalizationRange]) -> Callable[[Any], Any]:
    def make(right: Any) -> Any:
        return lambda x, radius, epsilon, *, centred: change(right, x, radius, epsilon, centred)

    return make


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "the deviation of a token does not shrink in the ball": (
        "norm",
        patched(leaves, "normalization_range", range_with(lambda f, x, r, e, c: f(x, 0 * r, e, centred=c))),
    ),
    "the ball shrinks the deviation by r / D": (
        "norm",
        patched(
            leaves, "normalization_range", range_with(lambda f, x, r, e, c: f(x, r / x.shape[-1] ** 0.5, e, centred=c))
        ),
    ),
    "epsilon is added to the deviation twice": (
        "norm at a point",
        patched(leaves, "normalization_range", range_with(lambda f, x, r, e, c: f(x, r, 2 * e, centred=c))),
    ),
    "the largest gamma instead of its largest size": (
        "negative gamma",
        patched(
            leaves,
            "diagonal",
            lambda f: lambda entries, like: enclosure.only_norm(entries.clamp(min=0).amax() * torch.ones_like(like)),
        ),
    ),
    "the residual adds nothing": (
        "two",
        patched(tree, "plus", lambda f: lambda skip, body: body),
    ),
    "the slopes are those at the ends of the interval": (
        "gelu",
        patched(
            leaves,
            "slope_interval",
            lambda f: (
                lambda name, low, high: (
                    torch.minimum(f(name, low, low)[0], f(name, high, high)[0]),
                    torch.maximum(f(name, low, low)[1], f(name, high, high)[1]),
                )
            ),
        ),
    ),
    "the slopes are those at the centre": (
        "relu",
        patched(
            leaves, "slope_interval", lambda f: lambda name, low, high: f(name, (low + high) / 2, (low + high) / 2)
        ),
    ),
    "the deviation of the slopes is forgotten": (
        "feed-forward",
        patched(leaves, "_split_norm", lambda f: lambda first, slopes, second: 0 * f(first, slopes, second)),
    ),
    "the radius does not grow": (
        "grown",
        patched(
            leaves,
            "per_token",
            lambda f: (
                lambda j, inputs, y, own=None: Step(j, True, PropagatedSet(y, inputs.radius, inputs.token_radii), own)
            ),
        ),
    ),
    "the radius of tokens is kept by attention": (
        "after attention",
        patched(
            leaves,
            "mixing",
            lambda f: (
                lambda norm, inputs, y: Step(
                    enclosure.only_norm(norm), False, PropagatedSet(y, norm * inputs.radius, inputs.tokens)
                )
            ),
        ),
    ),
    "gamma is forgotten in the folded values": (
        "values",
        patched(
            rewrite, "_folded_block", lambda f: lambda norm, block: f(Normalization(norm.centred, norm.epsilon), block)
        ),
    ),
    "overlapping windows count as one": (
        "windows",
        lambda monkeypatch: monkeypatch.setattr(Patches, "copies", property(lambda self: 1)),
    ),
    "the mean has norm 1 / n": (
        "mean",
        patched(tree, "vector_norm", lambda f: lambda values: f(values) / values.shape[-1] ** 0.5),
    ),
    "the wrong token is pooled": (
        "two tokens",
        lambda monkeypatch: monkeypatch.setattr(
            enclosure.Enclosure, "item", lambda self, index, right=enclosure.Enclosure.item: right(self, -1 - index)
        ),
    ),
    "the product forgets the right deviation": (
        "norm",
        patched(
            leaves,
            "normalization_range",
            range_with(lambda f, x, r, e, c: NormalizationRange(f(x, 0 * r, e, centred=c).norm, 0 * r)),
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_right_rules_pass_where_the_faults_are_planted(name: str) -> None:
    case = CASES[name](Draw(11))
    assert ratio(case) <= 1 + 1e-9


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, plant = FAULTS[name]
    network, x, radius = CASES[case](Draw(11))
    plant(monkeypatch)
    assert ratio((network, x, radius)) > 1 + 1e-6


# -- errors -----------------------------------------------------------------------------------------------------------

NET = Sequence((Linear(torch.eye(2).double()),))
X = torch.ones(1, 2).double()
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "negative radius": (lambda: network_bound(NET, X, -1.0), "radius=-1"),
    "infinite radius": (lambda: network_bound(NET, X, math.inf), "radius=inf"),
    "vector": (lambda: network_bound(NET, X[0], 0.0), "tokens"),
    "nan": (lambda: network_bound(NET, X * math.nan), "finite"),
    "point bound on a ball": (lambda: network_bound(NET, X, 0.1, attention="covariance.exact"), "covariance.exact"),
    "lower bound": (lambda: network_bound(NET, X, attention="lanczos"), "lower"),
    "token norm": (lambda: network_bound(NET, X, attention="covariance_token.exact"), "token"),
    "no bound": (lambda: network_bound(NET, X, attention=()), "at least one"),
    "no layer": (lambda: Sequence(()), "at least one"),
    "not a layer": (lambda: Sequence((torch.nn.ReLU(),)), "ReLU"),  # type: ignore[arg-type]
    "names": (lambda: Sequence((Linear(torch.eye(2)),), ("a", "b")), "2 for 1"),
    "activation": (lambda: Pointwise("mish"), "mish"),
    "epsilon": (lambda: layer_norm(epsilon=-1.0), "epsilon=-1"),
    "weight": (lambda: Linear(torch.ones(2)), "2 dimensions"),
    "weight nan": (lambda: Linear(torch.full((2, 2), math.nan)), "4 of 4"),
    "integer": (lambda: Linear(torch.ones(2, 2, dtype=torch.long)), "floating"),
    "bias": (lambda: Linear(torch.ones(2, 2), torch.ones(3)), r"\(2,\)"),
    "memory": (
        lambda: AttentionLayer(random_block(1, memory=random_block(2).x, moves="query")),
        "memory",
    ),
    "pool": (lambda: Pool("max"), "max"),  # type: ignore[arg-type]
    "stride": (lambda: Patches((2, 2), (0, 1)), "stride"),
    "shape": (lambda: network_bound(Residual(Linear(torch.ones(3, 2).double())), X), "keep the shape"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises((lipbounds.InvalidInput, RuntimeError), match=message):
        call()


def test_the_truth_by_lanczos_is_below() -> None:
    from lipbounds.estimators.lanczos import lanczos_upper

    network, x = small()
    value, _ = lanczos_upper(Network(network.function(), x))
    assert float(value) <= float(network_bound(network, x).value)
