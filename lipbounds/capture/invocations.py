"""Which module of the model is running, and since when."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lipbounds.capture.records import Invocation


class Invocations:
    """The modules that are running, from the model inwards, and the clock that orders the events of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.invocations: tuple[Invocation, ...] = (Invocation("", 0),)
        self.just_left: list[str] = []  # the modules that returned, or raised, since the last call
        self._clock = itertools.count(1)

    @property
    def module(self) -> str:
        """The qualified name of the innermost module that is running; empty for the model itself."""
        return self.invocations[-1].module

    def now(self) -> int:
        """The time."""
        return next(self._clock)

    def common_start(self, others: list[tuple[Invocation, ...]]) -> int:
        """When the innermost module started that is running now and was running in all of `others`."""
        shared = [invocation for invocation in self.invocations if all(invocation in other for other in others)]
        return shared[-1].start

    def watch(self, model: nn.Module, left: Callable[[Invocation, Any], None]) -> list[RemovableHandle]:
        """Follow which module of `model` is running; the caller removes the hooks that come back.

        Args:
            model: whose modules are followed.
            left: told of each module that returns, with its output.
        """
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            handles.append(module.register_forward_hook(lambda *given: self._leave(given[-1], left), always_call=True))
        return handles

    def _enter(self, name: str) -> None:
        self.invocations = (*self.invocations, Invocation(name, next(self._clock)))

    def _leave(self, output: Any, left: Callable[[Invocation, Any], None]) -> None:
        invocation, self.invocations = self.invocations[-1], self.invocations[:-1]
        self.just_left.append(invocation.module)
        left(invocation, output)
