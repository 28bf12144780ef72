"""Values that leave torch, tokens that are equal but not the same, and code that nobody sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from verify.unit.capture_models import DIM, HEADS, WIDTH, Fused, WrittenOut, check_whole, multi_head, run, tokens
from verify.unit.capture_models import float64_and_seed as float64_and_seed


class Temperature(WrittenOut):
    """Logits times a number that was computed from the tokens."""

    def __init__(self, number: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        factor = self.number(x)
        self.change = lambda scores: scores * factor
        return super().forward(x)


class Outer(nn.Module):
    """The value leaves torch outside the module that it goes into."""

    def __init__(self, use: bool) -> None:
        super().__init__()
        self.inner, self.use = WrittenOut(), use

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().mean().item()
        self.inner.change = lambda scores: scores * size if self.use else scores
        return self.inner(x)


class NumpyBias(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, torch.from_numpy(x.detach().mean(-1).numpy()[:, None, None].copy()))


LEAKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "item": (lambda: Temperature(lambda x: x.abs().mean().item()), "torch.Tensor.item takes a value out of torch"),
    "float": (lambda: Temperature(lambda x: 2 * float(x.norm())), "torch.Tensor.__float__ takes"),
    "list": (lambda: Temperature(lambda x: x[0, 0].tolist()[0]), "torch.Tensor.tolist takes"),
    "numpy": (lambda: Temperature(lambda x: float(x.numpy().std())), "torch.Tensor.numpy takes"),
    "decision": (lambda: Temperature(lambda x: 2.0 if x.sum() > 0 else 1.0), "torch.Tensor.__bool__ takes"),
    "made by numpy": (NumpyBias, "mask must not depend on the tokens|torch.Tensor.numpy takes"),
    "outside": (lambda: Outer(use=True), "torch.Tensor.item takes"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_value_of_the_tokens_that_left_torch_is_no_constant(name: str) -> None:
    make, message = LEAKS[name]
    with pytest.raises(Unsupported, match=message):
        run(make(), tokens())


def test_a_value_that_goes_elsewhere_is_warned_of() -> None:
    found = run(Outer(use=False), tokens())
    assert len(found) == 1
    assert len(found.warnings) == 1
    assert "torch.Tensor.item takes a value out of torch" in found.warnings[0]
    assert run(Fused(), tokens()).warnings == ()


def test_equal_tokens_are_not_the_same_tokens() -> None:
    x = tokens()
    (found,) = run(multi_head(), x, x.clone(), x.clone(), cross_moves="memory")
    assert found.attention.moves == "memory"
    check_whole(multi_head(), x, y := x.clone(), y, cross_moves="memory")
    (found,) = run(multi_head(), x, x, x)
    assert found.attention.memory is None


class Prepared(nn.Module):
    """Three functions of the same tokens."""

    def __init__(self, *change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.change = multi_head(), change

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*(change(x) for change in self.change))[0]


def test_the_same_function_computed_again_gives_the_same_tokens() -> None:
    again: list[Callable[[Tensor], Tensor]] = [lambda x: F.layer_norm(x, (DIM,)).clone() for _ in range(3)]
    (found,) = run(Prepared(*again), tokens())
    assert found.attention.memory is None


def test_another_function_with_equal_values_is_not_taken_for_the_same() -> None:
    """The block would agree, and its derivative would be another: relu(x) is x where x is positive, up to kinks."""
    with pytest.raises(Unsupported, match="must be projections of the same tokens"):
        run(Prepared(lambda x: x, lambda x: x * torch.ones(DIM), lambda x: x), tokens())


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.act = Fused(), torch.jit.script(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.attention(x))


class Mapped(Fused):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(super().forward)(x)


class Flexible(Fused):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).transpose(-4, -2).unbind(-3)
        return self.proj(flex_attention(q, k, v).transpose(-3, -2).flatten(-2))


@pytest.mark.filterwarnings("ignore")  # by torch itself
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Scripted, r"its module '0.act' was made by torch\.jit\.script"),
        (Mapped, r"'0' cannot be captured: torch\.func\.vmap"),
        (Flexible, "'0' cannot be captured: flex_attention is not followed; use scaled_dot_product_attention"),
    ],
)
def test_what_nobody_sees_is_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with torch.no_grad(), pytest.raises(Unsupported, match=message):
        capture(nn.Sequential(make()).eval(), tokens())


def test_one_block_that_is_refused_is_listed_and_the_others_are_there() -> None:
    model = nn.Sequential(Fused(), Fused(after=lambda o: F.layer_norm(o, (DIM,))), Fused())
    found = run(model, tokens(), on_unsupported="skip")
    assert [(one.index, one.module) for one in found] == [(0, "0"), (2, "2")]
    (skipped,) = found.skipped
    assert (skipped.index, skipped.module) == (1, "1")
    assert "last seen going into torch.nn.functional.layer_norm" in skipped.reason
    with pytest.raises(Unsupported, match="'1' cannot be captured"):
        run(model, tokens())
