"""Devices by their names, and questions to them: whatever is read from a device makes the host wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput


Check = tuple[Tensor, Callable[[], Exception]]  # what must be nowhere True, and the error if it is
_together: ContextVar[list[Check] | None] = ContextVar("checks read together", default=None)


def refuse(*checks: Check) -> None:
    """Raise the error of the first check with an entry that is True; inside of `checked_together`, at its end.

    Args:
        *checks: booleans, all on one device, each with what makes its error.
    """
    waiting = _together.get()
    if waiting is not None:
        waiting.extend(checks)
        return
    for (_, error), wrong in zip(checks, answers(*(wrong for wrong, _ in checks)), strict=True):
        if wrong:
            raise error()


@contextmanager
def checked_together() -> Iterator[None]:
    """Inside, what `refuse` is asked waits; all is read from the device at once at the end.

    Numbers computed from input that is to be refused are of no use, and never leave: its error is raised before, also
    where the computation fails because of it.
    """
    checks: list[Check] = []
    before = _together.get()
    try:
        _together.set(checks)
        yield
    except Exception as failure:
        _together.set(before)
        try:
            refuse(*checks)
        except Exception as cause:
            raise cause from failure
        raise
    finally:  # also after a limit of time or Ctrl-C: otherwise no later check would ever be read
        _together.set(before)
    refuse(*checks)


def waits_for(tensor: Tensor) -> bool:
    """Whether reading a number of the tensor makes the host wait for another device."""
    return tensor.device.type != "cpu"


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func (grad, vmap) looks through this tensor: then it has no memory of its own.

    Args:
        tensor: any.
    """
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


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
