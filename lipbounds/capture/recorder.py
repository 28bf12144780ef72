"""Where each tensor of a run comes from: a mode that sees every torch function the model calls."""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.recorded_calls import AFFINE, LINEAR, Kinds, Step, classify, tensors_in, version


Function = Callable[..., Any]
# Told of each call after it ran; returns the tensors the result moves with, or None if those are all that went in.
Listener = Callable[[Function, tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, ...] | None]


@dc.dataclass(frozen=True, eq=False, slots=True)
class Invocation:
    """One execution of a module's forward method."""

    module: str
    start: int


@dc.dataclass(frozen=True, eq=False, slots=True)
class Origin:
    """A result in the ancestry of later ones; it holds no tensor, so that the whole graph of a run stays small."""

    parents: tuple[Origin, ...]
    floating: bool
    time: int
    function: Function | None = None
    size: int = 0


@dc.dataclass(frozen=True, eq=False, slots=True)
class Record:
    """What is known of one tensor: how it was made (None if that is not followed), and what it was made from."""

    function: Function | None
    step: Step | None
    origin: Origin | None
    version: int
    invocations: tuple[Invocation, ...]


class Recorder(TorchFunctionMode):
    """Records, for every tensor made while it is active, the call that made it.

    Tensors are held weakly: an entry goes with its tensor, and the inputs of a call are kept only for the functions
    that are followed back. So a run takes about the memory of a run without gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.listener: Listener | None = None
        self.invocations: tuple[Invocation, ...] = (Invocation("", 0),)
        self._records: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._static = {id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
        self._clock = itertools.count(1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ops.QUESTION:
            return func(*args, **kwargs)
        before = [(tensor, version(tensor)) for tensor in tensors_in(args, kwargs)]
        result = func(*args, **kwargs)
        changed = [tensor for tensor, old in before if version(tensor) != old]
        outputs = tensors_in(result)
        if not outputs and not changed:
            return result
        inputs = None if self.listener is None else self.listener(func, args, kwargs, result)
        if inputs is None:
            used = 0 if func in ops.LIKE else 1 if func in ops.FIRST_ONLY else len(before)
            inputs = tuple(tensor for tensor, _ in before[:used])
        for tensor in changed:
            self._add(tensor, func, None, inputs)
        known = {id(tensor) for tensor, _ in before}
        for position, output in enumerate(outputs):
            # A function that returns its argument unchanged, as `contiguous` often does, leaves its origin as it was.
            if id(output) not in known:
                pick = position if isinstance(result, tuple | list) else None
                step = classify(func, args, kwargs, output, pick, self.is_score, self.projected, self.fresh_step)
                self._add(output, func, step, inputs)
        return result

    def _add(self, tensor: Tensor, func: Function, step: Step | None, taken: tuple[Tensor, ...]) -> None:
        parents = {id(origin): origin for origin in map(self.origin, taken) if origin is not None}
        origin = None
        if parents:
            floating = tensor.dtype.is_floating_point
            origin = Origin(tuple(parents.values()), floating, next(self._clock), func, tensor.numel())
        self._records[tensor] = Record(func, step, origin, version(tensor), self.invocations)

    # -- what is known of a tensor ------------------------------------------------------------------------------

    def record(self, tensor: Tensor) -> Record | None:
        """How `tensor` was made; None if no recorded function made it."""
        return self._records.get(tensor)

    def fresh_step(self, tensor: Tensor) -> Step | None:
        """The step that made `tensor`, provided that neither it nor what it was made from was modified since."""
        record = self.record(tensor)
        if record is None or record.step is None or record.version != version(tensor):
            return None
        return record.step if all(version(used) == old for used, old in record.step.versions) else None

    def is_stale(self, tensor: Tensor) -> bool:
        """Whether `tensor` was modified through another view of its memory, so that its origin is not known."""
        record = self.record(tensor)
        return record is not None and record.version != version(tensor)

    def walk(self, tensor: Tensor, kinds: Kinds) -> tuple[Tensor, list[Step]]:
        """Back from `tensor` through steps of these kinds: where they start, and the steps in the order of the run."""
        chain: list[Step] = []
        step = self.fresh_step(tensor)
        while step is not None and step.kind in kinds:
            chain.append(step)
            tensor = step.source
            step = self.fresh_step(tensor)
        return tensor, chain[::-1]

    def is_score(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a product of two matrices, apart from steps that keep it affine in that product."""
        step = self.fresh_step(self.walk(tensor, AFFINE)[0])
        return step is not None and step.function in ops.PRODUCT

    def projected(self, tensor: Tensor) -> Tensor | None:
        """The result of a projection or of its norm that `tensor` was made of by linear steps; None if it was not."""
        root = self.walk(tensor, LINEAR)[0]
        step = self.fresh_step(root)
        found = step is not None and (step.function in ops.PROJECTION or step.kind in ("shift", "normalise"))
        return root if found else None

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter or buffer of the model."""
        return id(tensor) in self._static

    def origin(self, tensor: Tensor) -> Origin | None:
        """The place of `tensor` in the ancestry graph; None if it depends on parameters and constants only."""
        record = self.record(tensor)
        if record is not None:
            return record.origin
        if self.is_parameter(tensor):
            return None
        origin = Origin((), tensor.dtype.is_floating_point, next(self._clock))
        self._records[tensor] = Record(None, None, origin, version(tensor), self.invocations)
        return origin

    def ancestors(self, tensor: Tensor, since: int = 0) -> set[Origin]:
        """The floating-point tensors that `tensor` was computed from, back to those that existed at time `since`.

        `tensor` itself is one. Token ids and masks of integers are passed through but not counted: they cannot move.
        """
        seen: set[Origin] = set()
        waiting = [self.origin(tensor)]
        while waiting:
            origin = waiting.pop()
            if origin is not None and origin not in seen:
                seen.add(origin)
                waiting.extend(origin.parents if origin.time >= since else ())
        return {origin for origin in seen if origin.floating}

    def related(self, first: Tensor, second: Tensor, since: int = 0) -> bool:
        """Whether one tensor was computed from the other, or both from a third, after time `since`."""
        return not self.ancestors(first, since).isdisjoint(self.ancestors(second, since))

    # -- which module is running --------------------------------------------------------------------------------

    @property
    def module(self) -> str:
        """The qualified name of the innermost module that is running; empty for the model itself."""
        return self.invocations[-1].module

    def common_start(self, others: list[tuple[Invocation, ...]]) -> int:
        """When the innermost module started that is running now and was running in all of `others`."""
        shared = [invocation for invocation in self.invocations if all(invocation in other for other in others)]
        return shared[-1].start

    def watch(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Follow which module of `model` is running; the caller removes the hooks that come back."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return handles

    def _enter(self, name: str) -> None:
        self.invocations = (*self.invocations, Invocation(name, next(self._clock)))

    def _leave(self) -> None:
        self.invocations = self.invocations[:-1]
