"""Taylor models of networks that begin with a linear map onto fewer numbers: nothing is lost, nothing forgotten."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lipbounds.compose.taylor import TaylorMargin, narrow
from lipbounds.compose.taylor import margin as taylor_margin
from lipbounds.compose.taylor import model as taylor_model
from lipbounds.compose.taylor.model import CENTRE, INPUT, Value, starting_value
from lipbounds.compose.taylor.narrow import narrow_start, narrowed
from lipbounds.compose.taylor.network import Walk
from lipbounds.targets.layers import Flatten, Linear, Patches, Pointwise, Positions, Residual, Sequence
from verify.unit.networks import Draw, attention


def model(draw: Draw) -> Sequence:
    """One block on 4 patches of images of 6 x 6, of which a first map leaves two numbers each."""
    block = Residual(attention(draw, 4, 4, scale=1.0))
    mlp = Residual(Sequence((Linear(draw(5, 4), draw(5)), Pointwise("gelu"), Linear(draw(4, 5)))))
    start = (Patches((3, 3), (3, 3)), Linear(draw(2, 9)), Linear(draw(4, 2)), Positions(None, draw(4, 4)))
    return Sequence((*start, block, mlp, Flatten(), Linear(draw(3, 16))))


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("second", [False, True])
def test_what_is_followed_with_fewer_numbers_proves_the_same(second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(1)
    network, x = model(draw), draw(1, 6, 6)
    monkeypatch.setattr(taylor_model, "LARGEST_SQUARE", 127 if second else 0)
    radii = torch.tensor([1e-3, 0.03, 0.1], dtype=torch.float64)
    few = TaylorMargin(network, x, 0)
    assert len(few.margins.linear.matrix) == 8
    monkeypatch.setattr(taylor_margin, "narrow_start", narrow.whole_start)
    all_of_them = TaylorMargin(network, x, 0)
    assert len(all_of_them.margins.linear.matrix) == 36
    torch.testing.assert_close(few.slopes, all_of_them.slopes, rtol=1e-9, atol=0)
    fall, before = few.at_point - few.lower(radii), few.at_point - all_of_them.lower(radii)
    # Norms are the same in any coordinates, but for the rounding of some that are computed by squaring.
    torch.testing.assert_close(fall, before, rtol=1e-3, atol=0)


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_no_image_of_a_ball_has_a_smaller_margin() -> None:
    draw = Draw(2)
    network, x = model(draw), draw(1, 6, 6)
    margin = TaylorMargin(network, x, 0)
    radii = torch.tensor([1e-3, 0.1, 1.0], dtype=torch.float64)
    lower, steep = margin.lower(radii), [_slope(network, x, other) for other in (1, 2)]
    for direction in [*(draw(1, 6, 6) for _ in range(20)), *steep]:
        moves = radii.reshape(-1, 1, 1, 1) * direction / direction.norm()
        logits = network(x - moves).flatten(1)
        assert bool((logits[:, :1] - logits[:, 1:] >= lower - 1e-11).all())


def _slope(network: Sequence, x: Tensor, other: int) -> Tensor:
    point = x.clone().requires_grad_()
    logits = network(point.unsqueeze(0)).flatten()
    return torch.autograd.grad(logits[0] - logits[other], point)[0]


@pytest.mark.parametrize("planted", [0.0, 1e-9, -1e-9, 1e-7])
def test_the_stretch_covers_what_the_factor_is_off_by(planted: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """|T^-1 C h| <= stretch |h| in exact arithmetic, with the floats of a factor that is off by more than rounding."""
    draw = Draw(3)
    true = narrow.try_cholesky
    monkeypatch.setattr(narrow, "try_cholesky", lambda gram: (true(gram)[0] * (1 + planted), true(gram)[1]))
    layer = Linear(draw(3, 7) * torch.tensor([[1.0], [1e3], [1e-3]]).double())
    value = Walk().through([("", layer)], starting_value(draw(1, 7)), None)
    found = narrowed(value)
    assert found is not None
    start, stretch = found
    assert stretch >= 1 - planted - 1e-15
    assert stretch <= 1 + 1e-6
    h = torch.linalg.svd(layer.weight)[2][0]  # and any other vector
    for move in (h, draw(7)):
        w = _solved(start.linear.matrix[:, 0].mT.tolist(), _times(layer.weight.tolist(), move.tolist()))
        length = sum(Fraction(entry) ** 2 for entry in move.tolist())
        assert sum(entry**2 for entry in w) <= Fraction(stretch) ** 2 * length


def _times(matrix: list[list[float]], vector: list[float]) -> list[Fraction]:
    return [sum((Fraction(a) * Fraction(b) for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def _solved(lower: list[list[float]], right: list[Fraction]) -> list[Fraction]:
    found: list[Fraction] = []
    for row, entry in zip(lower, right, strict=True):
        known = sum((Fraction(a) * b for a, b in zip(row, found, strict=False)), Fraction(0))
        found.append((entry - known) / Fraction(row[len(found)]))
    return found


def test_the_input_is_followed_as_it_is_where_that_is_no_gain() -> None:
    draw = Draw(4)
    x = draw(1, 6, 6)
    same = torch.ones(2, 9).double()  # fewer numbers, but their rows depend on each other
    for weight in (draw(9, 9), same):
        network = Sequence((Patches((3, 3), (3, 3)), Linear(weight), Pointwise("gelu"), Flatten()))
        start = narrow_start(network, x)
        assert (len(start.value.linear.matrix), start.stretch, len(start.layers)) == (36, 1.0, 4)
    terms = Value({name: starting_value(x).coefficients[name] for name in (CENTRE, INPUT)}).with_outputs("operation")
    assert narrowed(terms) is None
