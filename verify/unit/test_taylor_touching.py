"""Margins that follow activations along the worst direction: the parabolas are below, and the bounds near the truth."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lipbounds.certify import certify
from lipbounds.compose.taylor import TaylorMargin
from lipbounds.compose.taylor import margin as taylor_margin
from lipbounds.compose.taylor import model as taylor_model
from lipbounds.compose.taylor.ball import Ball, Norm
from lipbounds.compose.taylor.relu import Relu
from lipbounds.compose.taylor.smooth import SmoothPointwise
from lipbounds.compose.taylor.touching import Cases, Parabolas
from lipbounds.ops.activations import ACTIVATIONS
from lipbounds.targets.layers import Flatten, Linear, Pointwise, Sequence
from verify.unit.networks import Draw


SLACK = 1e-12  # of what a sample computes in float64
INPUTS, HIDDEN, STEPS = 3, 6, 9
Second = Callable[[Tensor], Tensor]
SECOND: dict[str, Second] = {
    "gelu": lambda x: (2 - x.square()) * (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5,
    "tanh": lambda x: -2 * x.tanh() * (1 - x.tanh().square()),
    "relu": torch.zeros_like,
}


def network(draw: Draw, activation: str, *, curved: bool, inputs: int = INPUTS, hidden: int = HIDDEN) -> Sequence:
    """An activation, behind another one if `curved`, so that its input has remainders."""
    first = (Linear(draw(inputs, inputs)), Pointwise("tanh"), Linear(draw(inputs, inputs))) if curved else ()
    middle = Linear(draw(hidden, inputs), draw(hidden, scale=0.3)), Pointwise(activation)
    return Sequence((*first, *middle, Flatten(), Linear(draw(3, hidden))))


def left(operation: Any, activation: str, u: Tensor, linear: Tensor) -> Tensor:
    """What a margin does not follow exactly of each entry, from the inputs of the activation and their first order."""
    c, d, rest = operation.value.centre, u - operation.value.centre, u - operation.value.centre - linear
    f, second = ACTIVATIONS[activation].function, SECOND[activation](c)
    slope = operation.slope if activation == "relu" else ACTIVATIONS[activation].slope(c)
    return f(u) - f(c) - slope * d - second * (d.square() - rest.square()) / 2


def check_parabolas(activation: str, *, curved: bool, radius: float, norm: Norm = "l2") -> None:
    """Raises AssertionError where a parabola of one entry is above; touched, and looked at, along the entry's row."""
    draw = Draw(0)
    whole, x = network(draw, activation, curved=curved), draw(1, INPUTS)
    margin = TaylorMargin(whole, x, 0, norm=norm)
    operation: Any = margin.operations[-1]
    ranges = margin.ranges(torch.tensor([radius], dtype=torch.float64))
    rows = operation.value.linear.matrix.flatten(1).mT
    shares = torch.linspace(-1, 1, STEPS, dtype=torch.float64)[:, None, None]
    displaced = radius * shares * Ball(norm, INPUTS).steepest(rows)  # [steps, entries, inputs]
    before = Sequence(whole.layers[: len(whole.layers) - 3])
    u = before(x + displaced.reshape(-1, 1, INPUTS)).reshape(STEPS, HIDDEN, HIDDEN).diagonal(dim1=1, dim2=2)
    linear = torch.einsum("sea,ea->se", displaced, rows)
    e = u - operation.value.centre.flatten() - linear
    truth = left(operation, activation, u, linear)
    sizes = torch.cat([torch.eye(HIDDEN), -torch.eye(HIDDEN)]).double()
    for points in displaced:
        cases = Cases(torch.zeros(2 * HIDDEN, dtype=torch.int64), torch.arange(2 * HIDDEN), points.repeat(2, 1))
        found = operation.touched(sizes, torch.zeros(2 * HIDDEN).double(), cases, ranges)
        for there, there_e, true in zip(linear, e, truth, strict=True):
            away = there - found.touch
            low = found.heights + found.slopes * away - found.bends * away.square() / 2 + found.carried * there_e
            assert bool(((sizes * true).sum(1) >= low.sum(1) - found.lost - SLACK).all()), "a parabola is above"


def check_all() -> None:
    for curved in (False, True):
        for radius in (1e-3, 0.3, 2.0):
            for activation in SECOND:
                check_parabolas(activation, curved=curved, radius=radius)


def check_chords() -> None:
    for norm in ("l_inf", "l1"):
        for radius in (1e-3, 0.3, 2.0):
            check_parabolas("relu", curved=True, radius=radius, norm=norm)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("second", [False, True])
def test_parabolas_are_below(monkeypatch: pytest.MonkeyPatch, second: bool) -> None:
    if not second:
        monkeypatch.setattr(taylor_model, "LARGEST_SQUARE", 0)
    check_all()


def other(**factors: float) -> Callable[[Any], Any]:
    """Parabolas with fields multiplied by numbers."""

    def plant(right: Any) -> Any:
        def touched(*args: Any) -> Parabolas:
            found = right(*args)
            return dc.replace(found, **{field: getattr(found, field) * factor for field, factor in factors.items()})

        return touched

    return plant


FIELDS = [{"bends": 0.5}, {"heights": 0.9}, {"heights": 1.1}, {"slopes": 0.9}, {"carried": -1.0}]


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(
    ("owner", "factors"),
    # For relu only rounding is lost.
    [*((owner, field) for owner in (SmoothPointwise, Relu) for field in FIELDS), (SmoothPointwise, {"lost": 0.0})],
    ids=str,
)
def test_planted_faults_are_caught(owner: Any, factors: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "touched", other(**factors)(owner.touched))
    with pytest.raises(AssertionError):
        check_all()


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("factors", [{"heights": 0.0}, {"slopes": 0.9}, {"carried": -1.0}], ids=str)
def test_planted_faults_of_chords_are_caught(factors: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    check_chords()
    monkeypatch.setattr(Relu, "touched", other(**factors)(Relu.touched))
    with pytest.raises(AssertionError):
        check_chords()


def attacked(whole: Sequence, x: Tensor, radius: float) -> Tensor:
    """The smallest margins found in the ball: gradient descent from many starts."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(64, *x.shape, generator=generator, dtype=torch.float64)
    best = torch.full((2,), torch.inf, dtype=torch.float64)
    for row in range(2):
        for _ in range(60):
            h = (radius * h / h.flatten(1).norm(dim=1)[:, None, None]).requires_grad_()
            logits = whole(x + h)[:, 0]
            margins = logits[:, 0] - logits[:, 1 + row]
            best[row] = torch.minimum(best[row], margins.detach().amin())
            (slope,) = torch.autograd.grad(margins.sum(), h)
            h = h.detach() / radius - 0.5 * slope / slope.flatten(1).norm(dim=1)[:, None, None]
    return best


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(
    ("activation", "curved", "left_over"),
    [("gelu", False, 0.05), ("relu", False, 0.05), ("gelu", True, 0.2), ("tanh", True, 0.2)],
)
def test_bounds_are_below_the_smallest_margin_and_near_it(
    activation: str, curved: bool, left_over: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what bounds entry by entry lose to the truth, little is left."""
    draw, radius = Draw(3), 0.3
    whole, x = network(draw, activation, curved=curved, inputs=12, hidden=60), draw(1, 12)
    radii = torch.tensor([radius], dtype=torch.float64)
    monkeypatch.setattr(taylor_margin, "HOPELESS", torch.inf)
    entry_by_entry = TaylorMargin(whole, x, 0).lower(radii)[0]
    monkeypatch.setattr(taylor_margin, "HOPELESS", -torch.inf)
    monkeypatch.setattr(taylor_margin, "LITTLE", torch.inf)
    found, truth = TaylorMargin(whole, x, 0).lower(radii)[0], attacked(whole, x, radius)
    assert bool((found <= truth + SLACK).all())
    assert float((truth - found).sum()) < left_over * float((truth - entry_by_entry).sum())


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("norm", ["l_inf", "l1"])
def test_chords_gain_in_other_norms(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, radii = Draw(3), torch.tensor([0.1 if norm == "l_inf" else 0.4], dtype=torch.float64)
    whole, x = network(draw, "relu", curved=False, inputs=12, hidden=60), draw(1, 12)
    monkeypatch.setattr(taylor_margin, "HOPELESS", torch.inf)
    entry_by_entry = TaylorMargin(whole, x, 0, norm=norm).lower(radii)[0]
    monkeypatch.setattr(taylor_margin, "HOPELESS", -torch.inf)
    monkeypatch.setattr(taylor_margin, "LITTLE", torch.inf)
    assert bool((TaylorMargin(whole, x, 0, norm=norm).lower(radii)[0] > entry_by_entry).all())


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("norm", ["l2", "l_inf", "l1"])
@pytest.mark.parametrize("size", [1e-140, 1e-151, 1e-154])
def test_tiny_inputs_of_relu_under_huge_weights(norm: Norm, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The margin 1 - relu(t x) / t falls to 1 - r, whatever t: no floor under tiny numbers may flatten a chord."""
    monkeypatch.setattr(taylor_margin, "LITTLE", torch.inf)
    first, last = (torch.tensor(w, dtype=torch.float64) for w in ([[size]], [[0.0], [1 / size]]))
    head = Linear(last, torch.tensor([1.0, 0.0], dtype=torch.float64))
    whole = Sequence((Linear(first), Pointwise("relu"), Flatten(), head))
    margin = TaylorMargin(whole, torch.zeros(1, 1, dtype=torch.float64), 0, norm=norm)
    radii = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)
    assert bool((margin.lower(radii)[:, 0] <= 1 - radii + SLACK).all())


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_a_margin_falls_from_where_it_really_is_though_rounding_hides_it() -> None:
    """A sum of huge terms is about 1e-7 and computed as 0; relu passes it, and a step of 1e-10 takes it away."""
    draw = Draw(0)
    weight, x = draw(1, 5) * 1e9, draw(1, 5)
    computed = (x @ weight.mT)[0]
    terms = zip(weight[0].tolist(), x[0].tolist(), strict=True)
    hidden = sum((Fraction(w) * Fraction(number) for w, number in terms), start=-Fraction(float(computed)))
    assert hidden > 1e-7
    ends = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([1.0, 0.0]).double()
    whole = Sequence((Linear(weight, -computed), Pointwise("relu"), Flatten(), Linear(*ends)))
    found = certify(whole, x[None], torch.tensor([0]), method="taylor", largest=1e-10)
    assert hidden < float(found.radius) * float(weight.norm())
    assert hidden <= float(found.radius) * float(found.lipschitz[0, 1])
