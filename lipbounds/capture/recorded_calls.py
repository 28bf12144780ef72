"""One recorded call, sorted by what it does to the tensor that is followed, and how to run it again on another."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.qk_norm import norm_kind
from lipbounds.errors import InvalidInput


# reindex: moves entries around; same: copies; cast: changes the dtype; scale: times one number; shift: plus a tensor;
# fill: overwrites some entries; combine: linear in what was made of one projection; dropout: with a positive
# probability; statistic, normalise: steps of QK-norm (lipbounds.capture.qk_norm); call: not followed, only looked at.
Kind = Literal[
    "reindex", "same", "cast", "scale", "shift", "fill", "combine", "dropout", "statistic", "normalise", "call"
]
Kinds = tuple[Kind, ...]
MOVES: Kinds = ("reindex", "same", "dropout")
MOVES_AND_SCALES: Kinds = (*MOVES, "scale")
MOVES_AND_CASTS: Kinds = (*MOVES, "cast")
AFFINE: Kinds = (*MOVES_AND_SCALES, "cast", "shift", "fill")
LINEAR: Kinds = (*MOVES_AND_SCALES, "cast", "combine")


@dc.dataclass(frozen=True, eq=False, slots=True)
class Step:
    """The call that made one tensor: `shape` and `dtype` are its own, `source` is the tensor that is followed."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: Kind
    source: Tensor
    shape: torch.Size
    dtype: torch.dtype
    pick: int | None
    versions: tuple[tuple[Tensor, int], ...]

    @property
    def others(self) -> list[Tensor]:
        """The tensors that went in beside the source."""
        return [tensor for tensor, _ in self.versions if tensor is not self.source]

    @property
    def factor(self) -> float | Tensor:
        """What a step of kind `scale` multiplies by."""
        operands = [*self.args, *self.kwargs.values()]
        (other,) = [operand for operand in operands if operand is not self.source]
        other = other.reshape(()) if isinstance(other, Tensor) else float(other)
        return 1 / other if self.function in ops.DIVIDE else other

    def again(self, value: Tensor) -> Tensor:
        """The result of the same call with `value` in place of the source."""
        if self.kind in ("same", "dropout"):
            return value
        function = ops.WITHOUT_STRIDES.get(self.function, self.function)
        result = function(*self._put(value, self.args), **self._put(value, self.kwargs))
        return result if self.pick is None else result[self.pick]

    def _put(self, value: Tensor, item: Any) -> Any:
        if item is self.source:
            return value
        if isinstance(item, tuple | list) and not isinstance(item, torch.Size):
            return type(item)(self._put(value, part) for part in item)
        if isinstance(item, dict):
            return {key: self._put(value, part) for key, part in item.items()}
        # An empty part of a `cat` still decides the dtype of the result.
        return item.to(value.dtype) if isinstance(item, Tensor) and self.function in ops.JOIN else item


def classify(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    pick: int | None,
    is_score: Callable[[Tensor], bool],
    projected: Callable[[Tensor], Tensor | None],
    fresh_step: Callable[[Tensor], Step | None],
) -> Step | None:
    """The call as a step; None if it does nothing that capture can follow.

    Args:
        function: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: the result, or one of several.
        pick: which of several results `output` is.
        is_score: tells whether a tensor is made of attention scores; sums with constants are followed for those only.
        projected: the result of a projection that a tensor was made of by linear steps, or None.
        fresh_step: the step that made a tensor.
    """
    tensors = tensors_in(args, kwargs)
    if not tensors:
        return None
    kind, source = norm_kind(function, args, kwargs, tensors, fresh_step, projected)
    if kind is None:
        kind, source = _kind(function, args, kwargs, tensors, output, is_score)
    if kind is None and function in ops.COMBINE:
        kind, source = _combined(function, kwargs, tensors, projected)
    if kind is None or source is None:
        return None
    versions = tuple((tensor, version(tensor)) for tensor in tensors)
    return Step(function, args, kwargs, kind, source, output.shape, output.dtype, pick, versions)


def _kind(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    output: Tensor,
    is_score: Callable[[Tensor], bool],
) -> tuple[Kind | None, Tensor | None]:
    first = tensors[0]
    if function in ops.REINDEX:
        reinterprets = any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values()))
        return (None, None) if reinterprets else ("reindex", first)
    if function in ops.JOIN:
        filled = [tensor for tensor in tensors if tensor.numel() > 0]
        return ("reindex", filled[0]) if len(filled) == 1 else (None, None)
    if function in ops.COPY | ops.CAST:
        return "same" if output.dtype == first.dtype and output.device == first.device else "cast", first
    if function in ops.DROPOUT:
        return "dropout" if _drops(args, kwargs) else "same", first
    if function in ops.MULTIPLY | ops.DIVIDE:
        source = _scaled(function, args, kwargs, output)
        return ("scale", source) if source is not None else (None, None)
    if function in ops.ADD | ops.SUBTRACT | ops.FILL:
        # In a difference only the first tensor keeps its sign; `alpha` would scale the second.
        sides = tensors[:1] if function in ops.SUBTRACT else tensors
        scores = [t for t in sides if t.shape == output.shape and is_score(t)] if "alpha" not in kwargs else []
        kind: Kind = "fill" if function in ops.FILL else "shift"
        return (kind, scores[0]) if len(scores) == 1 else (None, None)
    return ("call", first) if function in ops.PROJECTION | ops.SOFTMAX else (None, None)


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout call, `(input, p, training)`, sets anything to zero."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0


def _scaled(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """The tensor that is multiplied by one number; None for a product of another kind."""
    operands = [*args, *kwargs.values()]
    if len(operands) != 2 or "rounding_mode" in kwargs:
        return None
    first, second = operands
    for source, other in ((first, second), (second, first)):
        is_number = other.numel() == 1 if isinstance(other, Tensor) else isinstance(other, Real)
        if isinstance(source, Tensor) and source is not other and source.shape == output.shape and is_number:
            return None if function in ops.DIVIDE and source is second else source
    return None


def _combined(
    function: Callable[..., Any],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    projected: Callable[[Tensor], Tensor | None],
) -> tuple[Kind | None, Tensor | None]:
    """A call that is linear in tensors made of one projection.

    A sum is followed only if all of it was made of the same one: to follow residual connections would keep the whole
    run in memory.
    """
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    roots = [projected(tensor) for tensor in filled]
    moving = [tensor for tensor, root in zip(filled, roots, strict=True) if root is not None]
    if not moving or "alpha" in kwargs or "rounding_mode" in kwargs:
        return None, None
    if function in ops.MULTIPLY | ops.DIVIDE:
        fits = len(filled) == 2 and len(moving) == 1 and (function in ops.MULTIPLY or moving[0] is filled[0])
    else:
        two = len(filled) == 2 or function not in ops.ADD | ops.SUBTRACT
        fits = two and all(root is roots[0] for root in roots)
    return ("combine", moving[0]) if fits else (None, None)


def replay(chain: Iterable[Step], value: Tensor) -> Tensor:
    """`value` sent through all steps of a chain, in the order of the run."""
    for step in chain:
        value = step.again(value)
    return value


def reindex(chain: Iterable[Step], index: Tensor) -> Tensor:
    """`index` sent through the steps of a chain that move entries around, the others left out."""
    return replay([step for step in chain if step.kind == "reindex"], index)


def factor(chain: Iterable[Step]) -> float | Tensor:
    """The product of the numbers that the steps of a chain multiply by."""
    product: float | Tensor = 1.0
    for step in chain:
        product = product * step.factor if step.kind == "scale" else product
    return product


def version(tensor: Tensor) -> int:
    """Counts the in-place changes of `tensor`."""
    if tensor.is_inference():
        raise InvalidInput(
            "capture needs tensors that count their in-place changes, got one made under torch.inference_mode(); "
            "use torch.no_grad() instead."
        )
    return tensor._version


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, from left to right."""
    found: list[Tensor] = []
    waiting = list(reversed(values))
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            waiting.extend(reversed(value))
        elif isinstance(value, dict):
            waiting.extend(reversed(value.values()))
    return found
