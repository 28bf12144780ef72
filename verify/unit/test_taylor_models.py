"""Taylor models: values stay in their enclosures, the promises of all operations hold, and rounding is covered."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lipbounds import InvalidInput, Unsupported
from lipbounds.compose.rewrite import flat
from lipbounds.compose.taylor import TaylorMargin, bilinear, normalization, rounded, softmax
from lipbounds.compose.taylor import margin as taylor_margin
from lipbounds.compose.taylor import model as taylor_model
from lipbounds.compose.taylor.ball import Norm
from lipbounds.compose.taylor.coefficient import exact, weighted_product
from lipbounds.compose.taylor.model import CENTRE, INPUT, Value
from lipbounds.compose.taylor.network import Walk
from lipbounds.compose.taylor.norms import spectral_upper
from lipbounds.compose.taylor.quadratic import Quadratic
from lipbounds.compose.taylor.relu import Relu
from lipbounds.compose.taylor.rounded import Rounded
from lipbounds.compose.taylor.second import SECOND, as_matrices, pairs
from lipbounds.compose.taylor.smooth import SmoothPointwise
from lipbounds.compose.taylor.touching import Cases, Parabolas
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Linear,
    Normalization,
    Patches,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
)
from verify.unit.networks import Draw, attention


SLACK = 1e-11  # of what a sample computes in float64


def model(
    draw: Draw,
    activation: str = "gelu",
    *,
    pool: str = "flat",
    normed: bool = True,
    gain: float = 1.0,
    depth: int = 1,
) -> Sequence:
    """Blocks on images of 4 x 4, with a class token."""
    dim, hidden = 4, 5

    def block() -> list[Any]:
        norm = Normalization(True, 0.3, draw(dim), draw(dim)) if normed else Linear(torch.eye(dim).double() - 1 / dim)
        layer = attention(draw, 5, dim, scale=gain)
        mlp = Sequence(
            (norm, Linear(draw(hidden, dim), draw(hidden)), Pointwise(activation), Linear(draw(dim, hidden)))
        )
        return [Residual(Sequence((norm, layer))), Residual(mlp)]

    ends: dict[str, tuple[Any, ...]] = {
        "flat": (Flatten(), Linear(draw(3, 5 * dim))),
        "mean": (Pool("mean"), Linear(draw(3, dim))),
        "first": (Normalization(False, 0.2), Pool("first"), Linear(draw(3, dim), draw(3))),
        "last": (Pool("last"), Linear(draw(3, dim))),
    }
    start = (Patches((2, 2), (2, 2)), Linear(draw(dim, 4), draw(dim)), Positions(draw(1, dim), draw(5, dim)))
    blocks = [layer for _ in range(depth) for layer in block()]
    return Sequence((*start, *blocks, *ends[pool]))


def directions(margin: TaylorMargin, draw: Draw, count: int) -> Tensor:
    """Unit displacements: random ones, and those that move the inputs of the operations most."""
    inputs = len(margin.margins.linear.matrix)
    found = [draw(inputs) for _ in range(count)]
    for operation in margin.operations[1:4]:
        moved = operation.output.coefficients[INPUT].matrix.flatten(1)
        left = torch.linalg.svd(moved, full_matrices=False)[0][:, 0]
        found += [left, -left]
    stacked = torch.stack(found)
    return stacked / stacked.norm(dim=1, keepdim=True)


@dc.dataclass(frozen=True, eq=False)
class Promises:
    """What one operation says over the ball about itself and about some functionals of its remainder.

    Where the second order is followed, it comes first among the remainders, and that of an operation is what is left.
    """

    operation: Any
    first: Tensor
    total: Tensor
    known: Any
    rows: Tensor
    formed: Tensor | None
    quadratic: Tensor
    crossed: dict[str, Tensor]
    beyond: Tensor
    parabolas: Parabolas | None

    def check(self, value: Tensor, h: Tensor, remainders: dict[str, Tensor]) -> None:
        """The remainder at one displacement, from the value there, against every promise."""
        parts, name = self.operation.output.coefficients, self.operation.name
        linear = torch.tensordot(h, parts[INPUT].matrix, 1)
        rest = value - self.operation.output.centre - linear
        for other, q in remainders.items():
            if other in parts:
                rest = rest - torch.tensordot(q, parts[other].matrix, 1)
        assert bool((linear.abs() <= self.first + SLACK).all()), "the first order is too small"
        assert bool(((value - self.operation.output.centre).abs() <= self.total + SLACK).all()), "an entry leaves"
        q = rest.flatten()
        # In every row of a softmax q sums to zero, and the columns are I - P 1^T.
        assert float((torch.tensordot(q, parts[name].matrix, 1) - rest).abs().max()) <= SLACK
        assert float(q.norm()) <= float(self.known.ball[0]) + SLACK, "the ball is too small"
        if self.known.box is not None:
            assert bool((q.abs() <= self.known.box[0] + SLACK).all()), "the box is too small"
        if self.known.groups is not None:
            groups = q.unflatten(0, (self.known.groups.shape[1], -1)).norm(dim=1)
            assert bool((groups <= self.known.groups[0] + SLACK).all()), "a group is too small"
        if self.formed is not None:
            assert bool(((self.rows @ q).abs() <= self.formed + SLACK).all()), "a functional is too small"
        if isinstance(self.operation, Rounded):  # what is sampled has no rounding of that size
            remainders[name] = q
            return
        form = torch.einsum("a,cab,b->c", h, self.quadratic, h)
        for other, matrix in self.crossed.items():
            form = form + torch.einsum("s,csb,b->c", remainders[other], matrix, h)
        lost = form - self.rows @ q  # one-sided: what a margin can lose
        assert bool((lost <= self.beyond + SLACK).all()), "more is left beyond the second order than promised"
        if self.parabolas is not None:
            self.check_parabolas(-lost, h, remainders)
        remainders[name] = q

    def check_parabolas(self, left: Tensor, h: Tensor, remainders: dict[str, Tensor]) -> None:
        """What the functionals make of the rest at one displacement, against the parabolas below it."""
        assert self.parabolas is not None
        found, parts = self.parabolas, self.operation.value.coefficients
        linear = torch.tensordot(h, parts[INPUT].matrix, 1).flatten()
        carried = [torch.tensordot(q, parts[name].matrix, 1) for name, q in remainders.items() if name in parts]
        e = torch.stack([part.flatten() for part in carried]).sum(0) if carried else 0 * linear
        away = linear - found.touch
        low = found.heights + found.slopes * away - found.bends * away.square() / 2 + found.carried * e
        assert bool((left >= low.sum(1) - found.lost - SLACK).all()), "a parabola is above"


def promises(operation: Any, ranges: Any, draw: Draw) -> Promises:
    first, later = ranges.linear_and_rest(operation.output, 0)
    rows = draw(6, len(operation.output.coefficients[operation.name].matrix))
    error = torch.zeros(len(rows)).double()
    formed = operation.functional(rows, error, ranges)
    parabolas = None
    if isinstance(operation, SmoothPointwise | Relu):
        h = draw(len(rows), len(operation.value.linear.matrix))
        first_ball = torch.zeros(len(rows), dtype=torch.int64)
        points = float(ranges.radii[0]) * h / h.norm(dim=1, keepdim=True)
        parabolas = operation.touched(rows, error, Cases(first_ball, torch.arange(len(rows)), points), ranges)
    return Promises(
        operation=operation,
        first=first[0],
        total=(first + later)[0],
        known=ranges.known[operation.name],
        rows=rows,
        formed=None if formed is None else formed[0],
        quadratic=operation.quadratic(rows, error)[0] * (not operation.second),
        crossed={name: matrix for name, (matrix, _) in operation.crossed(rows, error).items()},
        beyond=operation.beyond(rows, error, ranges)[0],
        parabolas=parabolas,
    )


class Replay(Walk):
    """The same operations as another walk: near its threshold, rounding may be worth a term at one input only."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def rounds(self, name: str, value: Value) -> bool:
        return self.names[len(self.operations) :][:1] == [name]


def onto(directions: Tensor, norm: Norm) -> Tensor:
    """Displacements on the sphere of a norm: those directions, and corners of the ball near them."""
    corners = {"l2": directions, "l_inf": directions.sign()}.get(norm)
    if corners is None:
        corners = torch.eye(directions.shape[1]).double()[directions.abs().argmax(1)] * directions.sign()
    order = {"l2": 2, "l_inf": math.inf, "l1": 1}[norm]
    both = torch.cat([directions, corners])
    return both / torch.linalg.vector_norm(both, order, dim=1, keepdim=True)


def check_model(
    network: Sequence, x: Tensor, radius: float, *, seed: int = 0, count: int = 3, norm: Norm = "l2"
) -> None:
    """Raises AssertionError where a sample leaves what is promised over the ball."""
    draw = Draw(seed)
    margin = TaylorMargin(network, x, 0, norm=norm)
    radii = torch.tensor([radius], dtype=torch.float64)
    ranges = margin.ranges(radii)
    with pytest.MonkeyPatch.context() as patch:  # activations are followed along the worst direction at every margin
        patch.setattr(taylor_margin, "LITTLE", math.inf)
        patch.setattr(taylor_margin, "HOPELESS", -math.inf)
        lower = margin.lower(radii)[0]
    promised = [promises(operation, ranges, draw) for operation in margin.operations]
    for direction in onto(directions(margin, draw, count), norm):
        h = radius * direction
        start = Value({CENTRE: exact((x + h.reshape(x.shape))[None]), INPUT: exact(h.reshape(1, *x.shape))})
        walk = Replay([operation.name for operation in margin.operations])
        logits = walk.through(flat([("", network)]), start, None).centre[0]
        assert bool((logits[0] - logits[1:] >= lower - SLACK).all()), "a margin is below its lower bound"
        one, other = pairs(h.numel(), h.device)
        remainders = {SECOND: torch.where(one == other, 1.0, torch.tensor(2.0).double().sqrt()) * h[one] * h[other]}
        assert float(remainders[SECOND].norm()) <= float(ranges.known[SECOND].ball[0]) + SLACK
        for promise, there in zip(promised, walk.operations, strict=True):
            promise.check(there.output.centre, h, remainders)


@pytest.mark.usefixtures("as_a_user_runs_it")
@settings(max_examples=6)
@given(
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(["gelu", "relu", "tanh", "identity"]),
    pool=st.sampled_from(["flat", "mean", "first", "last"]),
    normed=st.booleans(),
    radius=st.sampled_from([1e-6, 0.01, 0.1, 0.5, 3.0]),
    gain=st.sampled_from([0.3, 3.0]),
    second=st.booleans(),
)
def test_every_sample_stays_in_every_enclosure(
    seed: int, activation: str, pool: str, normed: bool, radius: float, gain: float, second: bool
) -> None:
    draw = Draw(seed)
    with pytest.MonkeyPatch.context() as patch:
        if not second:
            patch.setattr(taylor_model, "LARGEST_SQUARE", 0)
        check_model(model(draw, activation, pool=pool, normed=normed, gain=gain), draw(1, 4, 4), radius, seed=seed)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("norm", ["l_inf", "l1"])
@pytest.mark.parametrize("radius", [1e-4, 0.03, 0.3])
def test_every_sample_of_another_ball_stays_in_every_enclosure(norm: Norm, radius: float) -> None:
    for seed, activation, pool in ((1, "gelu", "flat"), (2, "relu", "first")):
        draw = Draw(seed)
        check_model(model(draw, activation, pool=pool), draw(1, 4, 4), radius, seed=seed, norm=norm)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_masks_and_biases() -> None:
    draw = Draw(3)
    hidden = torch.tensor([[0.0, 0.2], [-math.inf, 0.0]]).double()
    layers: list[Any] = [Linear(draw(2, 2))]
    for mask in ({"causal": True}, {"logit_bias": hidden}):
        block = attention(draw, 2, 2, scale=1.0).block.replace(**mask)
        layers.append(Residual(AttentionLayer(block)))
    network = Sequence((*layers, Flatten(), Linear(draw(2, 4))))
    for radius in (0.01, 0.3):
        check_model(network, draw(2, 2), radius)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("over", ["head", "all_heads"])
def test_rotary_positions_and_norms_of_queries_and_keys(over: Any) -> None:
    draw = Draw(4)
    angles = draw(3, 1)
    rotation = torch.stack([angles.cos(), angles.sin()], -2)
    fields = {"query_rotation": rotation, "key_rotation": rotation, "norm_eps": 0.1, "norm_over": over}
    fields |= {"query_norm_weight": draw(2, 2), "key_norm_weight": draw(2, 2)}
    layers = (attention(draw, 3, 4, scale=1.0, **fields), Residual(attention(draw, 3, 4, scale=0.5, **fields)))
    for pool in ("first", "last"):
        network = Sequence((Residual(layers[0]), layers[1], Pool(pool), Linear(draw(2, 4))))
        for radius in (0.01, 0.3):
            check_model(network, draw(3, 4), radius)


def test_the_second_order_is_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is carried along as a coefficient or added up at the end."""
    draw = Draw(5)
    network, x = model(draw, "gelu", pool="first"), draw(1, 4, 4)
    margin = TaylorMargin(network, x, 1)

    def difference(z: Tensor) -> Tensor:
        logits = network(z.reshape(1, 4, 4)).flatten()
        return logits[1] - logits[2]

    hessian = torch.autograd.functional.hessian(difference, x.flatten())
    assert isinstance(hessian, Tensor)
    carried = as_matrices(margin.margins.coefficients[SECOND])[0][1]
    torch.testing.assert_close(2 * carried, hessian, rtol=1e-9, atol=1e-10)
    monkeypatch.setattr(taylor_model, "LARGEST_SQUARE", 15)
    many = TaylorMargin(network, x, 1)
    assert not many.margins.second
    total = torch.zeros_like(hessian)
    for operation in many.operations:
        rows, error = many._rows(operation)
        total = total + operation.quadratic(rows, error)[0][1]
    torch.testing.assert_close(total + total.mT, hessian, rtol=1e-9, atol=1e-10)
    gradient = torch.autograd.functional.jacobian(difference, x.flatten())
    torch.testing.assert_close(margin.margins.linear.matrix[:, 1], gradient, rtol=1e-9, atol=1e-12)


def test_the_second_order_of_values_makes_bounds_tighter(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(21)
    network, x = model(draw, "gelu", pool="first", gain=2.0, depth=2), draw(1, 4, 4)
    radii = torch.tensor([0.1], dtype=torch.float64)
    margin = TaylorMargin(network, x, 0)
    loss = margin.at_point - margin.lower(radii)
    monkeypatch.setattr(taylor_model, "LARGEST_SQUARE", 0)
    before = margin.at_point - TaylorMargin(network, x, 0).lower(radii)
    assert bool((before - loss > 0.3 * (before - 0.1 * margin.slopes)).all())


# -- rounding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1.0, 1e8]))
def test_errors_cover_the_rounding_of_sums_and_products(seed: int, size: float) -> None:
    draw = Draw(seed)
    part = exact(draw(3, 6) * torch.tensor([1.0, size, 1.0, size, 1.0, 1e-8]).double())
    weight, numbers = draw(6, 6) * size, exact(draw(1, 6))
    summed = part.summed(lambda t: t @ weight, lambda t: t @ weight.abs(), 8)
    twice = summed.times(numbers, torch.mul, 2).plus(part)
    entries, w, b = part.matrix.tolist(), weight.tolist(), numbers.matrix[0].tolist()
    for j in range(6):
        row = []
        for k in range(3):
            total = sum(Fraction(entries[k][i]) * Fraction(w[i][j]) for i in range(6))
            total = total * Fraction(b[j]) + Fraction(entries[k][j])
            row.append(float(total - Fraction(float(twice.matrix[k, j]))))
        assert math.hypot(*row) <= float(twice.error[j])
    products, lost = weighted_product(part, part, draw(1, 6), torch.zeros(1, 6).double())
    assert products.shape == (1, 3, 3)
    assert float(lost) > 0


def test_the_error_of_the_logits_covers_another_order_of_evaluation() -> None:
    draw = Draw(11)
    network, x = model(draw, "gelu", pool="first", gain=2.0), draw(1, 4, 4)
    margin = TaylorMargin(network, x, 0)
    logits = margin.output.centre.flatten()
    single = network.to(torch.float64)(x).flatten()
    assert bool(((logits - single).abs() <= 2 * margin.output.centre_error.flatten()).all())
    assert float(margin.output.centre_error.max()) < 1e-9


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_rounding_becomes_a_term_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that are planted in a value come back as a remainder that is carried on, and the rest stays as it was."""
    draw = Draw(31)
    network, x = model(draw, "gelu", pool="first"), draw(1, 4, 4)
    radii = torch.tensor([0.01], dtype=torch.float64)
    plain = TaylorMargin(network, x, 0)
    monkeypatch.setattr(rounded, "LARGEST_ERROR", 1e-300)
    always = TaylorMargin(network, x, 0)
    assert sum(isinstance(operation, Rounded) for operation in always.operations) > 5
    torch.testing.assert_close(always.lower(radii), plain.lower(radii), rtol=1e-9, atol=1e-9)
    assert float(always.output.centre_error.amax()) < float(plain.output.centre_error.amax())
    first = next(operation for operation in always.operations if isinstance(operation, Rounded))
    box = first.measure(always.ranges(radii)).box
    assert box is not None
    assert bool((box[0] >= first.value.centre_error.flatten()).all())
    check_model(network, x, 0.1)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), indefinite=st.booleans(), radius=st.sampled_from([0.01, 1.0, 30.0]))
def test_the_quadratic_is_bounded_tightly(seed: int, indefinite: bool, radius: float) -> None:
    draw = Draw(seed)
    square, slopes = draw(2, 5, 5), draw(2, 5)
    matrices = square + square.mT if indefinite else square @ square.mT
    zero = torch.zeros(2).double()
    found = Quadratic(slopes, matrices, zero, zero).lower(torch.tensor([radius], dtype=torch.float64))[0]
    eigenvalues, vectors = torch.linalg.eigh(2 * matrices)
    rotated = torch.einsum("cab,ca->cb", vectors, slopes)
    for c in range(2):
        mus = torch.logspace(-12, 6, 4000, dtype=torch.float64) + float((-eigenvalues[c].min()).clamp(min=0))
        dual = -(rotated[c].square() / (eigenvalues[c] + mus[:, None])).sum(1) / 2 - mus * radius**2 / 2
        best = float(dual.max())  # the minimum over the ball is at least that, and nearly equal
        points = torch.cat([draw(200, 5), -slopes[c][None], vectors[c].mT, -vectors[c].mT])
        points = radius * points / points.norm(dim=1, keepdim=True)
        values = points @ slopes[c] + torch.einsum("na,ab,nb->n", points, matrices[c], points)
        assert float(found[c]) <= float(values.min())
        assert float(found[c]) >= best - 0.02 * abs(best) - 1e-9


@given(seed=st.integers(0, 10_000))
@settings(max_examples=5)
def test_the_norm_of_a_large_matrix_is_bounded(seed: int) -> None:
    matrix = Draw(seed)(330, 340)
    true = float(torch.linalg.matrix_norm(matrix, 2))
    assert true <= float(spectral_upper(matrix)) <= 1.7 * true


# -- planted faults ---------------------------------------------------------------------------------------------------


def scaled(factor: float) -> Callable[[Any], Any]:
    return lambda right: lambda *args, **kwargs: factor * right(*args, **kwargs)


def smaller_range(field: str) -> Callable[[Any], Any]:
    """A range whose field is a hundred times too small."""

    def plant(right: Any) -> Any:
        def measure(self: Any, ranges: Any) -> Any:
            known = right(self, ranges)
            value = getattr(known, field)
            return known if value is None else dc.replace(known, **{field: value / 100})

        return measure

    return plant


def half_matrix(right: Any) -> Any:
    def quadratic_(self: Any, rows: Tensor, error: Tensor) -> Any:
        matrix, lost = right(self, rows, error)
        return matrix / 2, lost

    return quadratic_


def half_second(right: Any) -> Any:
    def bend(self: Any) -> Any:
        part = right(self)
        return dc.replace(part, matrix=part.matrix / 2)

    return bend


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "bilinear: the box": (bilinear.Bilinear, "measure", smaller_range("box")),
    "bilinear: the groups": (bilinear.Bilinear, "measure", smaller_range("groups")),
    "bilinear: the ball": (bilinear.Bilinear, "measure", smaller_range("ball")),
    "bilinear: half of the second order": (bilinear.Bilinear, "bend", half_second),
    "bilinear: half of the second order, added up at the end": (bilinear.Bilinear, "quadratic", half_matrix),
    "softmax: the box": (softmax.Softmax, "measure", smaller_range("box")),
    "softmax: the ball": (softmax.Softmax, "measure", smaller_range("ball")),
    "softmax: half of the second order": (softmax.Softmax, "bend", half_second),
    "softmax: half of the second order, added up at the end": (softmax.Softmax, "quadratic", half_matrix),
    "softmax: nothing beyond": (softmax.Softmax, "beyond", scaled(0.0)),
    "gelu: the box": (SmoothPointwise, "measure", smaller_range("box")),
    "gelu: half of the second order": (SmoothPointwise, "bend", half_second),
    "gelu: half of the second order, added up at the end": (SmoothPointwise, "quadratic", half_matrix),
    "gelu: nothing beyond": (SmoothPointwise, "beyond", scaled(0.0)),
    "norm: the groups": (normalization.Normalize, "measure", smaller_range("groups")),
    "norm: half of the second order": (normalization.Normalize, "bend", half_second),
    "norm: half of the second order, added up at the end": (normalization.Normalize, "quadratic", half_matrix),
    "norm: nothing beyond": (normalization.Normalize, "beyond", scaled(0.0)),
    "functionals": (bilinear.Bilinear, "functional", scaled(0.01)),
}


def check_two_radii(activation: str = "gelu") -> None:
    """At a small radius the second order decides, at a large one what is beyond it."""
    draw = Draw(21)
    network, x = model(draw, activation, pool="first", gain=2.0), draw(1, 4, 4)
    for radius in (1e-3, 0.3):
        check_model(network, x, radius)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_nothing_is_found_without_a_fault() -> None:
    check_two_radii()
    check_two_radii("relu")
    draw = Draw(22)
    check_model(model(draw, "gelu", depth=2), draw(1, 4, 4), 0.05)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, plant = FAULTS[name]
    if method == "quadratic":
        monkeypatch.setattr(taylor_model, "LARGEST_SQUARE", 0)
    monkeypatch.setattr(owner, method, plant(getattr(owner, method)))
    with pytest.raises(AssertionError):
        check_two_radii()


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_what_has_no_rule_is_refused() -> None:
    draw = Draw(0)
    silu = Sequence((Linear(draw(2, 2)), Pointwise("silu"), Flatten()))
    with pytest.raises(Unsupported, match="silu"):
        TaylorMargin(silu, draw(1, 2), 0)
    with pytest.raises(Unsupported, match="4096"):
        TaylorMargin(Linear(draw(2, 5000)), draw(1, 5000), 0)
    with pytest.raises(Unsupported, match="more than 10;"):
        TaylorMargin(model(draw), draw(1, 4, 4), 0, largest=10)
    with pytest.raises(InvalidInput, match="one token"):
        TaylorMargin(Linear(draw(2, 2)), draw(3, 2), 0)
