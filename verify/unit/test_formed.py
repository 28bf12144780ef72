"""The constant of a whole model from the rows of its Jacobian: the truth, in blocks of any size, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lipbounds import InvalidInput, Unsupported
from lipbounds.estimators import formed
from lipbounds.estimators.formed import formed_constant
from lipbounds.estimators.whole_model import whole_model_constant


def model(outputs: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, outputs))


@pytest.mark.parametrize("outputs", [1, 5, 9])
@pytest.mark.parametrize("entries", [1, 36, 2**27])
def test_it_is_the_norm_of_the_jacobian(outputs: int, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, two rows, or all rows at a time; more outputs than inputs, too."""
    monkeypatch.setattr(formed, "BLOCK_ENTRIES", entries)
    network, x = model(outputs), torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    found = formed_constant(network, x)
    wide = model(outputs).double()
    for item, value in zip(x.double(), found.value.tolist(), strict=True):
        truth = float(torch.linalg.matrix_norm(torch.func.jacrev(wide)(item).detach(), 2))
        assert truth * (1 - 1e-14) <= value <= truth * (1 + 1e-9)
    assert (found.kind, found.value.dtype) == ("proved", torch.float64)
    assert bool(found.details["derivative_checked"].all())
    lower = whole_model_constant(network, x).terms["lower"]
    assert bool((lower <= found.value * (1 + 1e-14)).all())


def test_any_function_and_any_size_of_its_values() -> None:
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]).double()
    for size in (1e-120, 1.0, 1e120):
        found = formed_constant(lambda x, size=size: size * (x @ weight.T), torch.ones(1, 3))
        assert 5 * size <= float(found.value) <= 5 * size * (1 + 1e-9)


def test_what_it_cannot_answer_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 6)
    with pytest.raises(Unsupported, match="derivative"):
        formed_constant(lambda x: x * x.detach(), x)
    monkeypatch.setattr(formed, "LARGEST_SIDE", 4)
    with pytest.raises(InvalidInput, match="at most 4 outputs or inputs, got 5 and 6"):
        formed_constant(model(), x)
