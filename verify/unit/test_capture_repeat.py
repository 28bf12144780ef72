"""With check=True, a block that is the model at one input alone is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import InvalidInput, Unsupported
from verify.unit.capture_models import WrittenOut, tokens
from verify.unit.capture_models import float64_and_seed as float64_and_seed


class Outer(nn.Module):
    """The value leaves torch outside the module of the block, where capture can only warn."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.inner, self.number = WrittenOut(), number

    def forward(self, x: Tensor) -> Tensor:
        factor = self.number(x)
        self.inner.change = lambda scores: scores * factor
        return self.inner(x)


class Noisy(nn.Module):
    """The scale of the logits is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.runs = WrittenOut(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        factor = 1.0 + 0.1 * self.runs
        self.inner.change = lambda scores: scores * factor
        return self.inner(x)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(10, 12), nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.inner(x, x, x)[0]


def count_of_layers(x: Tensor) -> float:
    return float(round(x.abs().mean().item())) + 1.0


GOOD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "written out": (WrittenOut, tokens),
    "a number that does not move": (lambda: Outer(count_of_layers), tokens),
    "an encoder layer": (
        lambda: nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval(),
        lambda: torch.randn(2, 5, 12),
    ),
    "token numbers": (lambda: Language().eval(), lambda: torch.arange(8).view(2, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GOOD)
def test_what_the_model_computes_passes(name: str, dtype: torch.dtype) -> None:
    make, inputs = GOOD[name]
    given = inputs()
    given = given.to(dtype) if given.is_floating_point() else given
    assert capture(make().to(dtype), given, check=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_number_from_the_tokens_is_seen_where_capture_only_warns(dtype: torch.dtype) -> None:
    model, x = Outer(lambda x: 1 + 3 * x[0, 0, 0].item()).to(dtype), tokens().to(dtype)
    with pytest.raises(Unsupported, match="change with its tokens as the model does"):
        capture(model, x, check=True)


def test_a_model_that_differs_from_run_to_run_is_refused() -> None:
    assert capture(Noisy(), tokens())
    with pytest.raises(Unsupported, match="the same whenever it is run"):
        capture(Noisy(), tokens(), check=True)


class Alternating(nn.Module):
    """Every other run has a second attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.runs = WrittenOut(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.inner(self.inner(x)) if self.runs % 2 == 0 else self.inner(x)


def test_other_calls_are_refused() -> None:
    with pytest.raises(Unsupported, match="the same calls in every run, got 1 and 2 blocks"):
        capture(Alternating(), tokens(), check=True)


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Parameter(torch.randn(10, 12)), nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table[ids]
        return self.inner(x, x, x)[0]


def test_what_cannot_be_moved_is_said() -> None:
    with pytest.raises(InvalidInput, match=r"nn\.Embedding"):
        capture(Indexed().eval(), torch.arange(4)[None], check=True)
