"""What is kept of a run: of each tensor, of each module that ran, and of each value that left torch."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

from lipbounds.capture.replay import Step


Function = Callable[..., Any]


@dc.dataclass(frozen=True, eq=False, slots=True)
class Invocation:
    """One execution of a module's forward method."""

    module: str
    start: int


@dc.dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """A result in the ancestry of later ones; it holds no tensor, so that the whole graph of a run stays small.

    Args:
        parents: of what it was computed.
        floating: it can move.
        time: of the call.
        function: that was called.
        written: the function that the user called, where `function` is one of its parts.
        size: number of entries.
        activations: how many of the tensors that went in depend on the input of the model and can move.
        attends: it is what a call of attention gave.
    """

    parents: tuple[Origin, ...]
    floating: bool
    time: int
    function: Function | None = None
    written: Function | None = None
    size: int = 0
    activations: int = 0
    attends: bool = False


@dc.dataclass(frozen=True, eq=False, slots=True)
class Record:
    """What is known of one tensor.

    Args:
        function: that made it, as the user wrote it.
        step: how it was made; None if that is not followed.
        origin: what it was made from; None if from constants only.
        version: of the tensor when it was made.
        invocations: the modules that were running.
        number: equal for tensors that are the same function of the same tensors.
    """

    function: Function | None
    step: Step | None
    origin: Origin | None
    version: int
    invocations: tuple[Invocation, ...]
    number: int


@dc.dataclass(frozen=True, eq=False, slots=True)
class Leak:
    """A value that left torch: where, through which function, and what it had been computed from."""

    origin: Origin
    function: Function
    module: str
    time: int
    value: float | None
