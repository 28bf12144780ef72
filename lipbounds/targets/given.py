"""Tensors as users hand them over: torch tensors, NumPy arrays, lists; odd ones are told apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput


WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def given_tensor(name: str, value: Any) -> Tensor:
    """A tensor from what was passed: a tensor, a NumPy array, or a list of numbers or tensors; numbers are kept.

    Args:
        name: of the argument, for the message.
        value: what was passed.

    Raises:
        InvalidInput: it is none of these, ragged, or a tensor that is sparse, nested, quantized or without numbers.
    """
    tensor = value
    try:
        if isinstance(value, list | tuple) and value and all(isinstance(entry, Tensor) for entry in value):
            tensor = torch.stack(list(value))
        elif not isinstance(value, Tensor):
            tensor = torch.as_tensor(value, dtype=None, device="cpu")  # of the dtype of the array
            if tensor.is_floating_point() and isinstance(value, list | tuple | float):
                tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu")  # as Python has them
    except (TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InvalidInput(
            f"{name} must be a tensor, a NumPy array or a list of numbers, got {type(value).__name__} ({reason}); "
            "pass torch.as_tensor(...) of it."
        ) from error
    odd = odd_kind(tensor)
    if odd is not None:
        raise InvalidInput(f"{name} must be a plain tensor of real numbers, got {odd}; convert it.")
    return tensor


def odd_kind(tensor: Tensor) -> str | None:
    """What is unusual about a tensor with which nothing can be computed here; None for a plain one.

    Args:
        tensor: any.
    """
    kinds = {
        "a nested one": tensor.is_nested,
        f"one of layout {tensor.layout}": tensor.layout != torch.strided,
        "one without numbers (device meta)": tensor.is_meta,
        "a quantized one": tensor.is_quantized,
        "complex numbers": tensor.is_complex(),
    }
    return next((kind for kind, holds in kinds.items() if holds), None)
