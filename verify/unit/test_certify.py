"""Certified radii: exact for linear classifiers, consistent under scaling, and never beaten by an attack inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipbounds import InvalidInput, LipboundsError, Unsupported
from lipbounds.certify import Certificate, certify
from lipbounds.compose import joint
from lipbounds.compose.constant import proved_constant
from lipbounds.compose.taylor import TaylorMargin
from lipbounds.errors import UnknownBound
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Layer,
    Linear,
    Patches,
    Pointwise,
    Pool,
    Residual,
    Sequence,
)
from verify.unit.networks import Draw, attention, feed_forward, norm


def attacked(network: Layer, x: torch.Tensor, label: int, radius: float, *, steps: int = 20, starts: int = 3) -> float:
    """The smallest margin of the label found in the ball, by projected gradient descent on the margin."""
    worst, draw = math.inf, Draw(0)
    for start in range(starts):
        move = draw(*x.shape) if start else torch.zeros_like(x)
        move = move * (radius / move.norm().clamp(min=1e-300)) if start else move
        for step in range(steps):
            point = (x + move).requires_grad_()
            logits = network(point).flatten()
            others = logits[torch.arange(len(logits)) != label]
            margin = logits[label] - others.max()
            worst = min(worst, float(margin.detach()))
            (slope,) = torch.autograd.grad(margin, point)
            move = move - radius * (0.5 if step < steps // 2 else 0.1) * slope / slope.norm().clamp(min=1e-300)
            move = move * min(1.0, radius / max(float(move.norm()), 1e-300))
    return worst


def classifier(draw: Draw, *, n: int = 3, dim: int = 4, classes: int = 4, flat: bool = False) -> Sequence:
    body = (
        Residual(Sequence((norm(draw, dim, epsilon=1.0), attention(draw, n, dim, scale=0.4)))),
        Residual(feed_forward(draw, dim, 5, "gelu")),
    )
    end = (Flatten(), Linear(draw(classes, n * dim))) if flat else (Pool("mean"), Linear(draw(classes, dim)))
    return Sequence((*body, *end))


@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 5),
    method=st.sampled_from(["taylor", "joint", "product"]),
)
def test_a_linear_classifier_has_the_exact_radius(seed: int, classes: int, method: Any) -> None:
    draw = Draw(seed)
    weight, bias, x = draw(classes, 6), draw(classes), draw(3, 2, 3)
    network = Sequence((Flatten(), Linear(weight, bias)))
    logits = x.flatten(1) @ weight.T + bias
    labels = logits.argmax(1)
    labels[2] = (labels[2] + 1) % classes
    found = certify(network, x, labels, method=method)
    for i in range(3):
        if i == 2:
            assert float(found.radius[i]) == 0
            assert not bool(found.correct[i])
            continue
        y = int(labels[i])
        others = [j for j in range(classes) if j != y]
        exact = min(float((logits[i, y] - logits[i, j]) / (weight[y] - weight[j]).norm()) for j in others)
        assert exact * (1 - 1e-6) - 1e-8 <= float(found.radius[i]) <= min(exact, 10.0)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), norm=st.sampled_from(["l_inf", "l1"]))
def test_a_linear_classifier_has_the_exact_radius_in_every_norm(seed: int, norm: Any) -> None:
    draw = Draw(seed)
    weight, x = draw(3, 6), draw(1, 2, 3)
    network = Sequence((Flatten(), Linear(weight)))
    logits = (x.flatten(1) @ weight.T)[0]
    y = int(logits.argmax())
    dual = 1 if norm == "l_inf" else math.inf
    gaps = [(float(logits[y] - logits[j]), weight[y] - weight[j]) for j in range(3) if j != y]
    exact = min(gap / float(torch.linalg.vector_norm(w, dual)) for gap, w in gaps)
    found = certify(network, x, torch.tensor([y]), norm=norm, check=True)
    assert exact * (1 - 1e-6) - 1e-8 <= float(found.radius) <= exact
    assert found.norm == norm
    assert found.attacked is not None
    assert float(found.attacked) <= 1e-6 * float(logits.abs().max())  # the attack goes to the end of the ball


def test_another_norm_has_one_method() -> None:
    network, x = plain()
    with pytest.raises(InvalidInput, match="norm='l1' and method='joint'"):
        certify(network, x, torch.tensor([0]), norm="l1", method="joint")


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@settings(max_examples=3)
@given(seed=st.integers(0, 10_000), flat=st.booleans(), method=st.sampled_from(["taylor", "joint", "product"]))
def test_no_attack_succeeds_inside_the_radius(seed: int, flat: bool, method: Any) -> None:
    draw = Draw(seed)
    network, x = classifier(draw, flat=flat), draw(2, 3, 4)
    labels = network(x).squeeze(1).argmax(1)
    found = certify(network, x, labels, method=method, steps=6)
    assert bool(found.correct.all())
    for point, label, radius in zip(x, labels.tolist(), found.radius.tolist(), strict=True):
        assert attacked(network, point, label, radius) >= 0
    assert bool((found.lipschitz[found.radius > 0].amax(1) > 0).all())


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_joint_gives_more_than_the_product() -> None:
    draw = Draw(1)
    network, x = classifier(draw), draw(2, 3, 4)
    labels = network(x).squeeze(1).argmax(1)
    one, other = (certify(network, x, labels, method=method).radius for method in ("joint", "product"))
    assert bool((one > other).all())
    assert bool((other > 0).all())


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_radii_scale_with_the_input_and_not_with_the_logits() -> None:
    draw = Draw(2)
    first, rest = Linear(draw(4, 4)), classifier(draw)
    x = draw(2, 3, 4)
    network = Sequence((first, *rest.layers))
    labels = network(x).squeeze(1).argmax(1)
    expected = certify(network, x, labels, method="joint").radius
    head = rest.layers[-1]
    assert isinstance(head, Linear)
    louder = Sequence((first, *rest.layers[:-1], Linear(8 * head.weight)))
    torch.testing.assert_close(certify(louder, x, labels, method="joint").radius, expected, rtol=3e-3, atol=0)
    wider = Sequence((Linear(first.weight / 4), *rest.layers))
    torch.testing.assert_close(certify(wider, 4 * x, labels, method="joint").radius, 4 * expected, rtol=3e-3, atol=0)


def test_images_and_batches_and_progress() -> None:
    draw = Draw(3)
    network = Sequence((Patches((2, 2), (2, 2)), Linear(draw(4, 4)), *classifier(draw, n=4).layers))
    x = draw(3, 1, 4, 4)
    labels = network(x).squeeze(1).argmax(1)
    labels[1] = (labels[1] + 1) % 4
    done: list[int] = []
    found = certify(network, x, labels, advance=lambda: done.append(1))
    assert len(done) == 3
    assert found.correct.tolist() == [True, False, True]
    assert float(found.radius[1]) == 0
    alone = certify(network, x[2:], labels[2:])
    torch.testing.assert_close(found.radius[2:], alone.radius, rtol=1e-9, atol=0)
    assert found.accuracy(0.0) == pytest.approx(2 / 3)
    assert found.accuracy(float(found.radius.max()) * 1.01) == 0
    assert isinstance(found, Certificate)


def test_no_radius_above_the_largest() -> None:
    draw = Draw(4)
    network = Sequence((Flatten(), Linear(1e-6 * draw(3, 4), torch.tensor([5.0, 0.0, 0.0]).double())))
    assert float(certify(network, draw(1, 2, 2), torch.tensor([0]), largest=2.5).radius) == 2.5


def test_the_default_is_taylor_where_it_fits() -> None:
    draw = Draw(5)
    network, x = classifier(draw, n=2, dim=2, classes=3), draw(1, 2, 2)
    labels = network(x).squeeze(1).argmax(1)
    found = certify(network, x, labels, check=True)
    assert found.method == "taylor"
    assert found.attacked is not None
    assert 0 <= float(found.attacked) <= float(found.margin)
    assert float(found.radius) > float(certify(network, x, labels, method="joint").radius) > 0
    silu = Sequence((Linear(draw(2, 2)), Pointwise("silu"), Flatten(), Linear(draw(3, 4))))
    assert certify(silu, x, silu(x).squeeze(1).argmax(1)).method == "joint"


def test_the_self_check_finds_a_wrong_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    (network, x), label = steep(), torch.tensor([0])
    monkeypatch.setattr(joint.JointNetwork, "bound", at_point(joint.JointNetwork.bound))
    with pytest.raises(LipboundsError, match="fault of lipbounds"):
        certify(network, x, label, method="joint", check=True)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1.0, 1e6]))
def test_the_rounding_of_the_logits_is_bounded(seed: int, size: float) -> None:
    draw = Draw(seed)
    weight, bias, x = size * draw(3, 8), draw(3), size * draw(1, 8)
    output = TaylorMargin(Linear(weight, bias), x, 0).output
    logits, error = output.centre, output.centre_error
    for j in range(3):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(x[0].tolist(), weight[j].tolist(), strict=True))
        exact += Fraction(float(bias[j]))
        assert abs(exact - Fraction(float(logits[0, j]))) <= Fraction(float(error[0, j]))
    assert float(error.max()) <= 1e-13 * size * size * 100


# -- planted faults ---------------------------------------------------------------------------------------------------


def shrunk(right: Any) -> Any:
    return lambda *args: 0.2 * right(*args)


def steep() -> tuple[Sequence, torch.Tensor]:
    """The margin falls faster away from the input: a certificate from the slope at the point alone is too large."""
    head = Linear(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([1.0, 0.0]).double())
    return Sequence((Linear(torch.ones(1, 1).double()), Pointwise("gelu"), head)), torch.full((1, 1, 1), -3.0).double()


def at_point(right: Any) -> Any:
    return lambda self, radius, rows=None: right(self, 0.0, rows)


def plain() -> tuple[Sequence, torch.Tensor]:
    return Sequence((Flatten(), Linear(torch.eye(2).double()))), torch.tensor([[[1.0, 0.5]]]).double()


Make = Callable[[], tuple[Sequence, torch.Tensor]]
FAULTS: dict[str, tuple[Make, str, Callable[[Any], Any]]] = {
    "the slope is that at the point": (steep, "bound", at_point),
    "rows are five times too short": (plain, "_rows", shrunk),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, method, plant = FAULTS[name]
    (network, x), label = make(), torch.tensor([0])
    right = certify(network, x, label, method="joint")
    assert attacked(network, x[0], 0, float(right.radius)) >= 0
    monkeypatch.setattr(joint.JointNetwork, method, plant(getattr(joint.JointNetwork, method)))
    wrong = certify(network, x, label, method="joint")
    assert attacked(network, x[0], 0, float(wrong.radius)) < 0


# -- errors -----------------------------------------------------------------------------------------------------------

NET = Sequence((Flatten(), Linear(torch.ones(2, 4).double())))
X, Y = torch.ones(1, 2, 2).double(), torch.tensor([0])
DIP = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]).double()
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "method": (lambda: certify(NET, X, Y, method="exact"), InvalidInput, "exact"),  # type: ignore[arg-type]
    "largest": (lambda: certify(NET, X, Y, largest=0.0), InvalidInput, "largest=0"),
    "steps": (lambda: certify(NET, X, Y, steps=0), InvalidInput, "steps=0"),
    "labels": (lambda: certify(NET, X, torch.tensor([0, 1])), InvalidInput, "one integer an input"),
    "float labels": (lambda: certify(NET, X, torch.tensor([0.0])), InvalidInput, "one integer an input"),
    "no class": (lambda: certify(NET, X, torch.tensor([2])), InvalidInput, "between 0 and 1"),
    "nan": (lambda: certify(NET, X * math.nan, Y), InvalidInput, "finite"),
    "one class": (lambda: certify(Sequence((Flatten(), Linear(torch.ones(1, 4).double()))), X, Y), InvalidInput, "two"),
    "tokens": (lambda: certify(Linear(torch.ones(2, 2).double()), X, Y), InvalidInput, "one token"),
    "no head": (lambda: certify(Flatten(), X + DIP, Y, method="product"), InvalidInput, "ends in a Linear"),
    "large": (
        lambda: certify(Linear(torch.eye(2, 5000).double()), torch.eye(1, 5000).double()[None], Y),
        Unsupported,
        "4096",
    ),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
def test_the_fall_of_a_margin_is_that_of_the_certified_ball() -> None:
    """One ball is tried, of which half is proved for the first class; the margin to the second falls ever slower."""
    identity, logits = torch.eye(2).double(), torch.tensor([[0.0, 0.0], [3.7, 0.0], [0.0, -1.0]]).double()
    network = Sequence((Linear(identity), Pointwise("gelu"), Linear(logits, torch.tensor([0.0, -1.0, -1.0]).double())))
    found = certify(network, torch.zeros(1, 1, 2), torch.tensor([0]), method="taylor", steps=1, largest=0.54)
    radius, claimed = float(found.radius), found.lipschitz[0]
    assert 0.1 < radius < 0.4
    ends = radius * torch.tensor([[[1.0, 0.0]], [[0.0, -1.0]]]).double()
    fallen = network(torch.zeros(1, 1, 2).double()) - network(ends)
    margins = (fallen[..., :1] - fallen).squeeze(1)
    assert float(margins[0, 1]) <= radius * float(claimed[1])
    assert float(margins[1, 2]) <= radius * float(claimed[2])


@pytest.mark.parametrize(
    "names",
    [("input", "b", "c"), ("a", "b", "input"), ("second", "b", "c"), ("centre", "b", "c"), ("b.2", "b", "b")],
)
def test_layers_may_have_any_names(names: tuple[str, ...]) -> None:
    draw = Draw(5)
    layers = [part for _ in range(3) for part in (Linear(2 * draw(4, 4)), Pointwise("gelu"))]
    layers, x = (*layers, Linear(draw(3, 4))), draw(1, 1, 4)
    labels = Sequence(layers)(x).flatten(1).argmax(1)
    expected = certify(Sequence(layers), x, labels, method="taylor").radius
    named = Sequence(layers, ("x", names[0], "y", names[1], "z", names[2], "logits"))
    assert torch.equal(certify(named, x, labels, method="taylor").radius, expected)
    assert float(expected) > 0


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("method", ["taylor", "joint", "product"])
def test_each_input_has_its_own_mask(method: Any) -> None:
    """As many inputs as heads: their masks must not be taken for those of heads."""
    draw, x = Draw(8), Draw(9)(2, 3, 4)
    block = attention(draw, 3, 4, scale=0.4).block
    assert block.heads == len(x)
    masks, head = torch.zeros(2, 1, 3, 3).double(), Linear(draw(3, 4))
    masks[0, ..., 2], masks[1, ..., 0] = -math.inf, -math.inf

    def network(mask: torch.Tensor, at: torch.Tensor) -> Sequence:
        return Sequence((Residual(AttentionLayer(block.replace(logit_bias=mask, x=at))), Pool("mean"), head))

    together = network(masks, x)
    labels = together(x).squeeze(1).argmax(1)
    found = certify(together, x, labels, method=method, steps=4, check=True).radius
    alone = [
        certify(network(m, x[0]), x[i : i + 1], labels[i : i + 1], method=method, steps=4) for i, m in enumerate(masks)
    ]
    assert torch.equal(found, torch.cat([one.radius for one in alone]))
    constants = [proved_constant(network(m, x[0]), x[i : i + 1]).value for i, m in enumerate(masks)]
    torch.testing.assert_close(proved_constant(together, x).value, torch.cat(constants), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "prepare", [lambda net, x: TaylorMargin(net, x, 0), joint.JointNetwork], ids=["taylor", "joint"]
)
def test_a_batch_of_masks_is_refused_at_one_input(prepare: Callable[[Layer, torch.Tensor], Any]) -> None:
    block = attention(Draw(8), 3, 4).block.replace(logit_bias=Draw(7)(2, 1, 3, 3))
    with pytest.raises(InvalidInput, match=r"attention of network must have no batch dimensions.*\(2,\) of logit_bias"):
        prepare(Sequence((AttentionLayer(block), Pool("mean"))), Draw(9)(3, 4))


def test_bounds_of_attention_are_for_the_methods_that_ask_them() -> None:
    """The default method is then one of these, and where there is none the argument is refused, not ignored."""
    draw = Draw(8)
    network, x = classifier(draw), draw(1, 3, 4)
    labels = network(x).squeeze(1).argmax(1)
    assert certify(network, x, labels, steps=2).method == "taylor"
    assert certify(network, x, labels, steps=2, attention="yudin2025_ball.biased").method == "joint"
    with pytest.raises(UnknownBound):
        certify(network, x, labels, attention="no such bound")
    options: list[dict[str, Any]] = [{"method": "taylor"}, {"norm": "l_inf"}, {"norm": "l1", "method": "taylor"}]
    for given_options in options:
        with pytest.raises(InvalidInput, match="attention names bounds for the methods 'joint' and 'product'"):
            certify(network, x, labels, attention="sharp_ball", **given_options)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("method", ["taylor", "joint"])
def test_the_most_negative_float_hides_a_key(method: Any) -> None:
    """The rounding of such a logit is huge, and of no weight."""
    draw = Draw(8)
    block, head, x = attention(draw, 3, 4, scale=0.4).block, Linear(draw(3, 4)), Draw(9)(1, 3, 4)
    radii = []
    for hidden in (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min):
        mask = torch.zeros(1, 3, 3).double()
        mask[..., 2] = hidden
        layer = AttentionLayer(block.replace(logit_bias=mask))
        network = Sequence((Residual(layer), Pool("mean"), head))
        labels = network(x).squeeze(1).argmax(1)
        radii.append(float(certify(network, x, labels, method=method, steps=8, check=True).radius))
    assert min(radii[1:]) > 0.99 * radii[0] > 0
