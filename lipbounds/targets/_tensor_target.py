"""What the attention types other than `Attention` share: a frozen dataclass of float tensors and numbers."""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.targets._attention_checks import FLOAT_DTYPES, check_finite
from lipbounds.targets.frozen import record_versions
from lipbounds.targets.given import odd_kind
from lipbounds.targets.target import Target


# typing.Self cannot be checked by beartype where functions are decorated one by one, as jaxtyping does in tests.
Block = TypeVar("Block", bound="TensorTarget")


class TensorTarget(Target):
    """Base of frozen dataclasses whose tensor fields share one floating dtype and device.

    Leading batch dimensions broadcast against each other. `trailing` names the tensor fields and the number of their
    dimensions that are not batch dimensions.
    """

    trailing: ClassVar[dict[str, int]]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {name: getattr(self, name) for name in self.trailing}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @cached_property
    def batch_shape(self) -> torch.Size:
        leading = [tensor.shape[: tensor.dim() - self.trailing[name]] for name, tensor in self.tensors.items()]
        return broadcast_shape(leading)

    def forward(self) -> Float[Tensor, "*batch n out_dim"]:
        """The output of the block."""
        return self.function()(self.moving_input)

    def at(self: Block, moving: Tensor) -> Block:
        raise NotImplementedError

    def replace(self: Block, **changes: Any) -> Block:
        return dc.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportType]

    def to(self: Block, target: torch.dtype | torch.device | str) -> Block:
        return self.replace(**{name: tensor.to(target) for name, tensor in self.tensors.items()})

    @property
    def double(self: Block) -> Block:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The same block in float64, where bounds are evaluated: floats of every supported dtype are exact there."""
        return self if self.dtype == torch.float64 else self.to(torch.float64)


def check_tensors(block: TensorTarget) -> None:
    """Raise InvalidInput unless the tensor fields are finite floats of one dtype, device and batch shape."""
    first = next(iter(block.trailing))
    for name, tensor in block.tensors.items():
        _check_one(name, tensor, block.trailing[name])
        lead = getattr(block, first)
        if tensor.dtype != lead.dtype or tensor.device != lead.device:
            raise InvalidInput(
                f"all tensors must share one dtype and device, got {first} ({lead.dtype}, {lead.device}) and "
                f"{name} ({tensor.dtype}, {tensor.device}); convert one."
            )
        if (odd := odd_kind(tensor)) is not None:
            raise InvalidInput(f"{name} must be a plain tensor of real numbers, got {odd}; convert it.")
    leading = {name: tensor.shape[: tensor.dim() - block.trailing[name]] for name, tensor in block.tensors.items()}
    try:
        broadcast_shape(leading.values())
    except ValueError:
        shapes = {name: tuple(shape) for name, shape in leading.items() if shape}
        raise InvalidInput(f"leading batch dimensions must broadcast against each other, got {shapes}.") from None
    check_finite(block.tensors)
    record_versions(block)


def check_shapes(block: TensorTarget, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise InvalidInput unless each tensor ends in the shape it must have to fit the others."""
    for name, shape in expected.items():
        found = tuple(getattr(block, name).shape)
        if found[len(found) - len(shape) :] != shape:
            raise InvalidInput(f"{name} must end in the shape {shape} to fit the other tensors, got {found}.")


def check_positive(**numbers: float) -> None:
    """Raise InvalidInput unless each number is positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise InvalidInput(f"{name} must be positive and finite, got {name}={number}.")


def _check_one(name: str, tensor: Tensor, dimensions: int) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{name} must be a torch tensor, got {type(tensor).__name__}; use torch.as_tensor.")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]
        raise InvalidInput(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}.")
    if tensor.dim() < dimensions or 0 in tensor.shape[tensor.dim() - dimensions :]:
        raise InvalidInput(
            f"{name} must have at least {dimensions} dimensions, the last {dimensions} not empty, "
            f"got shape {tuple(tensor.shape)}."
        )
