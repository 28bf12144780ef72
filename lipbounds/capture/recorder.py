"""Where each tensor of a run comes from: a mode that sees every torch function the model calls."""

from __future__ import annotations

import dataclasses as dc
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]  # not in the stubs
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.decompositions import DECOMPOSITIONS, Runner, functional_form
from lipbounds.capture.provenance import storage_of
from lipbounds.capture.recorded_calls import classify, is_blank
from lipbounds.capture.records import Function, Leak, Origin, Record
from lipbounds.capture.refusals import transform_error
from lipbounds.capture.replay import Step, tensors_in, version


class Listener(Protocol):
    """Is told of each call after it ran."""

    def __call__(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[Tensor, ...] | None:
        """Returns the tensors the result moves with, or None if those are all that went in."""
        ...

    def added(self, result: Tensor) -> None:
        """Is told of a sum once it is recorded."""
        ...


class Recorder(Runner, TorchFunctionMode):
    """Records, for every tensor made while it is active, the call that made it.

    Tensors are held weakly: an entry goes with its tensor, and the inputs of a call are kept only for the functions
    that are followed back. So a run takes about the memory of a run without gradients.

    A call that consists of others (einsum, a product with a factor, softmax written out) is run as these, and an
    in-place call is recorded as the call that computes what is written, so that few kinds of steps remain.

    Over 150 lines, because torch has one hook for all calls, and each writes the same records.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.listener: Listener | None = None
        self.written: Function | None = None
        self._uses: MutableMapping[Tensor, list[weakref.ref[Tensor]]] = WeakIdKeyDictionary()
        self._in_storage: dict[int, list[weakref.ref[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(ops.canonical(func), args, kwargs or {})

    def run(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, decomposed where a decomposition is known, and record it."""
        if func in ops.QUESTION:
            return func(*args, **kwargs)
        self.just_left.clear()
        decomposition = DECOMPOSITIONS.get(func)
        if decomposition is not None:
            with self._as_written(func):
                result = decomposition(self, args, kwargs)
            if result is not NotImplemented:
                return result
        given = tensors_in(args, kwargs)
        if any(map(is_transformed, given)):
            self._hide(func, given)
            return func(*args, **kwargs)
        before = [(tensor, version(tensor)) for tensor in given]
        result = func(*args, **kwargs)
        changed = [tensor for tensor, old in before if version(tensor) != old]
        outputs = tensors_in(result)
        if not outputs and not changed:
            self._note_leak(func, before, result)
            return result
        inputs = None if self.listener is None else self.listener(func, args, kwargs, result)
        attends = inputs is not None
        if inputs is None:
            used = 0 if func in ops.LIKE else 1 if func in ops.FIRST_ONLY else len(before)
            inputs = tuple(tensor for tensor, _ in before[:used])
        for tensor in changed:
            self._change(tensor, dict_version(before, tensor), func, args, kwargs, inputs)
        known = {id(tensor) for tensor, _ in before}
        for position, output in enumerate(outputs):
            # A function that returns its argument unchanged, as `contiguous` often does, leaves its origin as it was.
            if id(output) not in known:
                pick = position if isinstance(result, tuple | list) else None
                step = classify(func, args, kwargs, output, pick, self)
                self._add(output, func, step, inputs, self._number(func, args, kwargs, output, pick), attends)
        if func in ops.ADD and self.listener is not None and isinstance(result, Tensor):
            self.listener.added(result)
        return result

    def call(self, func: Function, *args: Any, **kwargs: Any) -> Any:
        """Run and record one part of a call."""
        return self.run(func, args, kwargs)

    def add_constant(self, tensor: Tensor) -> None:
        """Take note of a tensor made of parameters outside the run."""
        self._add(tensor, torch.tensor, None, ())

    @contextmanager
    def _as_written(self, func: Function) -> Iterator[None]:
        outer, self.written = self.written, self.written or func
        try:
            yield
        finally:
            self.written = outer

    def _add(
        self,
        tensor: Tensor,
        func: Function,
        step: Step | None,
        taken: tuple[Tensor, ...],
        number: int | None = None,
        attends: bool = False,
    ) -> None:
        origins = [origin for origin in map(self.origin, taken) if origin is not None]
        if func in ops.FROM_NUMBERS:
            origins += [leak.origin for leak in self.leaks]
        parents = {id(origin): origin for origin in origins}
        origin, written = None, self.written or func
        if parents:
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            activations = sum(one.floating for one in origins)
            time = self.now()
            origin = Origin(
                tuple(parents.values()), floating, time, func, written, tensor.numel(), activations, attends
            )
        number = next(self._fresh_numbers) if number is None else number
        self._put(tensor, Record(written, step, origin, version(tensor), self.invocations, number))

    def _put(self, tensor: Tensor, record: Record) -> None:
        self._records[tensor] = record
        if record.step is None:
            return
        for used, _ in record.step.versions:
            self._uses.setdefault(used, []).append(weakref.ref(tensor))
        alike = self._in_storage.setdefault(storage_of(tensor), [])
        alike[:] = [ref for ref in alike if ref() is not None and ref() is not tensor]
        alike.append(weakref.ref(tensor))

    # -- what left torch ----------------------------------------------------------------------------------------

    def _note_leak(self, func: Function, before: list[tuple[Tensor, int]], result: Any) -> None:
        if func not in ops.LEAVE:
            return
        for tensor, _ in before:
            origin = self.origin(tensor)
            if origin is not None and self.ancestors(tensor):
                value = float(result) if isinstance(result, float) else None
                self.leaks.append(Leak(origin, func, self.module, self.now(), value))
                if func not in ops.DECIDE:
                    self._hidden.append(origin)

    def _hide(self, func: Function, given: list[Tensor]) -> None:
        """Take note of a call inside a transform of torch.func, whose tensors are not those that come out of it."""
        if func in ops.SOFTMAX | ops.FUSED_ATTENTION | ops.MULTI_HEAD_ATTENTION:
            raise transform_error(self.module)
        inside = [_functorch.get_unwrapped(t) if is_transformed(t) else t for t in given]
        self._hidden += [origin for origin in map(self.origin, inside) if origin is not None and origin.floating]

    # -- changes in place ---------------------------------------------------------------------------------------

    def _change(
        self,
        tensor: Tensor,
        old: int,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: tuple[Tensor, ...],
    ) -> None:
        """Record what was written over `tensor`: a function of what it was before, for which a stand-in is put."""
        record = self.record(tensor)
        self._changed_by[storage_of(tensor)] = self.written or func
        form = functional_form(func, args, kwargs)
        first = args[0] if args else None
        if form is None or first is not tensor or (record is not None and record.version != old):
            self._add(tensor, func, None, inputs)
            return
        past = self._past(tensor, old)
        if func is torch.Tensor.__setitem__ and is_blank(tensor, self):
            past.setdefault(id(tensor), self._stand_in(tensor, record))
        function, given, named = form(past.get(id(tensor), tensor))
        step = classify(function, given, named, tensor, None, self)
        if id(tensor) not in past and step is not None and any(used is tensor for used, _ in step.versions):
            step = None  # a constant whose former values are lost
        self._add(tensor, func, step, inputs)

    def _past(self, tensor: Tensor, old: int) -> dict[int, Tensor]:
        """Stand-ins for all that share the memory of `tensor`, as they were: with shapes and records, no values."""
        alive = [ref() for ref in self._in_storage.pop(storage_of(tensor), [])]
        group = [one for one in alive if one is not None]
        past: dict[int, Tensor] = {}
        for one in group:
            record = self.record(one)
            if record is not None and record.step is not None and record.version == old:
                past[id(one)] = self._stand_in(one, record)
        users = [
            user for one in group if id(one) in past for ref in self._uses.get(one, ()) if (user := ref()) is not None
        ]
        for user in {id(user): user for user in (*users, *past.values())}.values():
            record = self.record(user)
            if record is not None and record.step is not None and record.step.kind != "call":
                step = record.step.with_past(past, old, lambda t: self.projected(t) is not None)
                self._put(user, dc.replace(record, step=step))
        return past

    def _stand_in(self, tensor: Tensor, record: Record | None) -> Tensor:
        result = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        if record is not None:
            self._records[result] = dc.replace(record, version=0)
        self._stand_ins[result] = True
        return result


def is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` lives inside a transform of torch.func."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def dict_version(before: list[tuple[Tensor, int]], tensor: Tensor) -> int:
    """The version that `tensor` had."""
    return next(old for one, old in before if one is tensor)
