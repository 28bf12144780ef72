"""Is a captured block the function that the model computes, also beside the input? The model is run again to see.

A block agrees with the model at the input it was captured at. It is the wrong function all the same if the model draws
random numbers, or if a mask, a weight, a scale or a choice by `if` follows the input in a way that capture did not see.
So the model is captured twice more: at the same input, where it must compute the same, and at inputs moved by a share
of sqrt(eps) of their size along one random direction. There, each block at its new tokens must be what the model now
computes: the difference quotient of the captured block and that of the model are compared,

    |B(X') - Y'| <= t |Y' - Y| + the residuals,        t some tens of times sqrt(eps),

with X, Y the tokens and the output of the model at the input, and X', Y' at the moved one, in the dtype of the model.
Differences are seen in proportion to the movement along that direction: a part that moves the output by less passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lipbounds.capture.blocks import Captured, CapturedAttention
from lipbounds.capture.refusals import unsupported
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention
from lipbounds.targets.derivative_check import tolerance_of


Again = Callable[..., Captured]
FIX = "fix its noise, its masks and its numbers, or build the Attention by hand"


@torch.no_grad()
def check_repeats(
    found: Captured, again: Again, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse blocks that are not what the model computes when it is run again, there and a little beside.

    Args:
        found: the blocks, captured at the input.
        again: captures the model at other inputs.
        model: the model.
        args: its inputs.
        kwargs: its keyword inputs.

    Raises:
        Unsupported: a block differs from the model, or the calls of the model do.
        InvalidInput: nothing floating point goes in, and there is no `nn.Embedding`.
    """
    for one, other in _pairs(found, again(*args, **kwargs)):
        y, y_again = (_forward(block.attention) for block in (one, other))
        distance, size = float((y - y_again).norm()), float(y.norm())
        if not distance <= 1e3 * torch.finfo(one.attention.dtype).eps * size:
            raise unsupported(
                one.module,
                f"the model must compute the same whenever it is run, got outputs that differ by {distance:.3g} of "
                f"{size:.3g} at the same input; {FIX}",
            )
    with _moved(model, args, kwargs) as (moved_args, moved_kwargs):
        there = again(*moved_args, **moved_kwargs)
    for one, other in _pairs(found, there):
        _check_moved(one, other)


def _check_moved(one: CapturedAttention, other: CapturedAttention) -> None:
    block, beside = one.attention, other.attention
    changes = {"x": beside.x} if block.memory is None else {"x": beside.x, "memory": beside.memory}
    y, wanted, got = _forward(block), _forward(beside), _forward(block.replace(**changes))
    moved, apart = (wanted - y).norm(), (got - wanted).norm()
    rounding = 2 * max(one.residual, other.residual, 1e-12) * wanted.norm()
    if not bool(apart <= tolerance_of(block.dtype) * moved + rounding):
        raise unsupported(
            one.module,
            f"the block must change with its tokens as the model does, got a change by {float((got - y).norm()):.3g} "
            f"where that of the model is {float(moved):.3g}, {float(apart):.3g} away; {FIX}",
        )


def _pairs(found: Captured, other: Captured) -> Iterator[tuple[CapturedAttention, CapturedAttention]]:
    """Blocks of two runs; the model must have made the same calls."""
    for one, two in zip(found, other, strict=False):
        shapes = [tuple(block.attention.x.shape) for block in (one, two)]
        if (one.module, one.index, shapes[0]) != (two.module, two.index, shapes[1]):
            raise unsupported(one.module, f"the model must make the same calls in every run, got others; {FIX}")
        yield one, two
    if len(found) != len(other):
        raise unsupported(
            found[0].module if found else "",
            f"the model must make the same calls in every run, got {len(found)} and {len(other)} blocks; {FIX}",
        )


def _forward(block: Attention) -> Tensor:
    return block.to(torch.float64).forward()


@contextmanager
def _moved(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs with the first one moved, or those of a model that embeds it."""
    named = [*enumerate(args), *kwargs.items()]
    tensors: list[tuple[int | str, Tensor]] = [(key, value) for key, value in named if isinstance(value, Tensor)]
    if tensors and tensors[0][1].is_floating_point():
        key, value = tensors[0]
        if isinstance(key, int):
            yield (*args[:key], _shifted(value), *args[key + 1 :]), kwargs
        else:
            yield args, {**kwargs, key: _shifted(value)}
        return

    def shifted(_module: nn.Module, _given: Any, output: Any) -> Tensor:
        return _shifted(output)

    handles = [module.register_forward_hook(shifted) for module in model.modules() if isinstance(module, nn.Embedding)]
    if not handles:
        raise InvalidInput(
            "check=True moves the first input of the model, which must be floating point, or embedded by nn.Embedding; "
            "pass check=False."
        )
    try:
        yield args, kwargs
    finally:
        for handle in handles:
            handle.remove()


def _shifted(tensor: Tensor) -> Tensor:
    """The tensor moved by sqrt(eps) of its size, along a direction that its shape determines."""
    step = math.sqrt(torch.finfo(tensor.dtype).eps)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device=generator.device).to(tensor.device)
    size = tensor.double().square().mean().sqrt()
    size = torch.where(size > 0, size, 1.0)
    return (tensor.double() + step * size * v).to(tensor.dtype)
