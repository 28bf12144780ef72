"""Devices by their names, and questions to them."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput


def answers(*questions: Tensor) -> list[bool]:
    """Whether any entry of each tensor is True: all at once, because each answer alone makes the host wait.

    Args:
        questions: booleans, all on one device.
    """
    return torch.stack([question.any() for question in questions]).tolist() if questions else []


def device_named(name: str) -> torch.device:
    """The device of that name, which must be there.

    Args:
        name: such as "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        InvalidInput: torch knows no such device, or this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float64, device=device)
        if device.type == "meta":
            raise RuntimeError("meta tensors have no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch without CUDA asserts
        reason = str(error).strip().split("\n", 1)[0]
        raise InvalidInput(
            f"device must be a device that is here, such as cpu or cuda, got {name!r} ({reason})."
        ) from error
    return device
