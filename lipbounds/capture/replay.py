"""The steps of a run that capture follows: one recorded call each, and how to run it again on another tensor."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.errors import InvalidInput


# reindex: moves entries around; same: copies; cast: changes the dtype; scale: times one number; shift: plus a tensor;
# weigh: times a constant tensor; level: minus the maximum of each row; fill: overwrites some entries; combine: affine
# in what was made of projections of the same tokens; dropout: with a positive probability; statistic, normalise: steps
# of QK-norm (lipbounds.capture.qk_norm); call: not followed, only looked at.
Kind = Literal[
    "reindex",
    "same",
    "cast",
    "scale",
    "weigh",
    "shift",
    "level",
    "fill",
    "combine",
    "dropout",
    "statistic",
    "normalise",
    "call",
]
Kinds = tuple[Kind, ...]
MOVES: Kinds = ("reindex", "same", "dropout")
MOVES_AND_SCALES: Kinds = (*MOVES, "scale")
MOVES_AND_CASTS: Kinds = (*MOVES, "cast")
AFFINE: Kinds = (*MOVES_AND_SCALES, "cast", "weigh", "shift", "level", "fill")
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

    @property
    def tokens(self) -> Tensor:
        """What a projection projects."""
        if self.function in ops.ADDMM:
            return self.args[1] if len(self.args) > 1 else self.kwargs["mat1"]
        return self.source

    def with_past(self, past: dict[int, Tensor], old: int, moves: Callable[[Tensor], bool]) -> Step:
        """The same step with stand-ins for tensors that changed since.

        Args:
            past: the stand-ins by the ids of the tensors.
            old: the version of all of them that the stand-ins stand for.
            moves: tells which tensors of a step of kind `combine` are followed; the values of the others are needed.
        """
        followed = [t for t, _ in self.versions if t is self.source or (self.kind == "combine" and moves(t))]
        ids = {id(tensor) for tensor in followed if id(tensor) in past}
        stand_in = {id(tensor) for tensor, seen in self.versions if id(tensor) in ids and seen == old}
        if not stand_in:
            return self

        def put(item: Any) -> Any:
            if isinstance(item, Tensor):
                return past[id(item)] if id(item) in stand_in else item
            if isinstance(item, tuple | list) and not isinstance(item, torch.Size):
                return type(item)(map(put, item))
            return {key: put(part) for key, part in item.items()} if isinstance(item, dict) else item

        versions = tuple((past[id(t)], 0) if id(t) in stand_in else (t, seen) for t, seen in self.versions)
        source = put(self.source)
        return dc.replace(self, args=put(self.args), kwargs=put(self.kwargs), source=source, versions=versions)

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


def numbers_in(chain: Iterable[Step]) -> tuple[float, ...]:
    """The numbers that steps were given, beside tensors."""
    given = [value for step in chain for value in (*step.args, *step.kwargs.values())]
    return tuple(float(value) for value in given if isinstance(value, Real) and not isinstance(value, bool))


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
