"""Ending a run of a model, and its capture, when the time is up.

The model is the caller's and stays in this process, which nobody can end. But whatever a model and `capture` do, they
do by calls of torch, and before each of these the clock is looked at: a run ends within the time of one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode


class TimeUp(Exception):
    """The time is up."""


class Deadline(TorchFunctionMode):
    """Raises `TimeUp` at the first torch call after the time is up.

    Args:
        at: on the clock of `time.monotonic`; None for no limit.
    """

    def __init__(self, at: float | None) -> None:
        super().__init__()
        self._at = at

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._at is not None and time.monotonic() > self._at:
            raise TimeUp
        return func(*args, **(kwargs or {}))
