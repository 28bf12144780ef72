"""What every kind of attention block offers to bounds, estimators and the verifier."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.targets.frozen import VERSIONS, record_versions


class Target:
    """One attention block at one input, frozen: the function whose Lipschitz constant is bounded, and where."""

    def __repr__(self) -> str:
        """The fields that are set, tensors by their shapes: their entries would fill pages."""
        parts = []
        for field in dc.fields(self):  # pyright: ignore[reportArgumentType]  # every target is a dataclass
            value = getattr(self, field.name)
            if value is not None and value is not False:
                parts.append(f"{field.name}={_shape(value)}")
        return f"{type(self).__name__}({', '.join(parts)}, {str(self.dtype).removeprefix('torch.')})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the counters of changes, which mean nothing in another process."""
        return {name: value for name, value in vars(self).items() if name != VERSIONS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        record_versions(self)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of all its tensors."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        raise NotImplementedError

    @property
    def moving_input(self) -> Tensor:
        """The input that the Lipschitz constant is about."""
        raise NotImplementedError

    @cached_property
    def batch_shape(self) -> torch.Size:
        """The leading shape of inputs and weights together."""
        raise NotImplementedError

    @cached_property
    def features(self) -> frozenset[Feature]:
        """What a bound must make a promise for to be evaluated here."""
        raise NotImplementedError

    @cached_property
    def double(self) -> Target:
        """The same block in float64."""
        raise NotImplementedError

    @cached_property
    def detached(self) -> Any:  # of the class of the block
        """The same block cut off from every graph: itself where none of its tensors needs a gradient."""
        fields = {field.name: getattr(self, field.name) for field in dc.fields(self)}  # pyright: ignore
        if not any(tensor.requires_grad for value in fields.values() for tensor in _tensors(value)):
            return self
        # The values are those that were checked already.
        copy = object.__new__(type(self))
        for name, value in fields.items():
            object.__setattr__(copy, name, _detach(value))
        return copy

    def function(self) -> Callable[[Tensor], Tensor]:
        """The block as a plain function of its moving input, for automatic differentiation."""
        raise NotImplementedError

    def at(self, moving: Tensor) -> Target:
        """The same block with the moving input replaced."""
        raise NotImplementedError

    def replace(self, **changes: Any) -> Target:
        """The same block with some fields replaced, validated again."""
        raise NotImplementedError

    def to(self, target: torch.dtype | torch.device | str) -> Target:
        """The same block in another dtype or on another device."""
        raise NotImplementedError


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a field: itself, or those in a tuple."""
    if isinstance(value, tuple | list):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return [value] if isinstance(value, Tensor) else []


def _detach(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_detach, value))
    return value.detach() if isinstance(value, Tensor) else value


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return "x".join(str(size) for size in value.shape)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_shape(entry) for entry in value)}]"  # pyright: ignore[reportUnknownVariableType]
    return repr(value)
