"""Where each tensor of a run comes from: a mode that sees every torch function the model calls."""

from __future__ import annotations

import dataclasses as dc
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.decompositions import PARTS, functional_form
from lipbounds.capture.recorded_calls import (
    AFFINE,
    LINEAR,
    MOVES_AND_CASTS,
    Kinds,
    Step,
    classify,
    is_blank,
    tensors_in,
    version,
)
from lipbounds.capture.refusals import transform_error


Function = Callable[..., Any]


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


ATTENDED = "attended"


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
    """

    parents: tuple[Origin, ...]
    floating: bool
    time: int
    function: Function | None = None
    written: Function | None = None
    size: int = 0
    activations: int = 0


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


class Recorder(TorchFunctionMode):
    """Records, for every tensor made while it is active, the call that made it.

    Tensors are held weakly: an entry goes with its tensor, and the inputs of a call are kept only for the functions
    that are followed back. So a run takes about the memory of a run without gradients.

    A call that consists of others (einsum, a product with a factor, softmax written out) is run as these, and an
    in-place call is recorded as the call that computes what is written, so that few kinds of steps remain.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.listener: Listener | None = None
        self.invocations: tuple[Invocation, ...] = (Invocation("", 0),)
        self.leaks: list[Leak] = []
        self._hidden: list[Origin] = []
        self.written: Function | None = None
        self.just_left: list[str] = []  # the modules that returned, or raised, since the last call
        self._records: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._attended: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._uses: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._stand_ins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._in_storage: dict[int, list[weakref.ref[Tensor]]] = {}
        self._held = [*_held_by(model)]  # alive throughout, so that no other tensor gets the id of one
        self._static = {id(tensor): number for number, tensor in enumerate(self._held)}
        self._changed_by: dict[int, Function] = {}
        self._numbers: dict[Hashable, int] = {}
        self._fresh_numbers = itertools.count(len(self._held))
        self._clock = itertools.count(1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(ops.canonical(func), args, kwargs or {})

    def run(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call, as its parts if it has some, and record it."""
        if func in ops.QUESTION:
            return func(*args, **kwargs)
        self.just_left.clear()
        parts = PARTS.get(func)
        if parts is not None:
            with self._as_written(func):
                result = parts(self, args, kwargs)
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
                self._add(output, func, step, inputs, self._number(func, args, kwargs, output, pick))
        if func in ops.ADD and self.listener is not None:
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
        self, tensor: Tensor, func: Function, step: Step | None, taken: tuple[Tensor, ...], number: int | None = None
    ) -> None:
        origins = [origin for origin in map(self.origin, taken) if origin is not None]
        if func in ops.FROM_NUMBERS:
            origins += [leak.origin for leak in self.leaks]
        parents = {id(origin): origin for origin in origins}
        origin, written = None, self.written or func
        if parents:
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            activations = sum(one.floating for one in origins)
            time = next(self._clock)
            origin = Origin(tuple(parents.values()), floating, time, func, written, tensor.numel(), activations)
        number = next(self._fresh_numbers) if number is None else number
        self._put(tensor, Record(written, step, origin, version(tensor), self.invocations, number))

    def _put(self, tensor: Tensor, record: Record) -> None:
        self._records[tensor] = record
        if record.step is None:
            return
        for used, _ in record.step.versions:
            self._uses.setdefault(used, []).append(weakref.ref(tensor))
        alike = self._in_storage.setdefault(_storage(tensor), [])
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
                self.leaks.append(Leak(origin, func, self.module, next(self._clock), value))
                if func not in ops.DECIDE:
                    self._hidden.append(origin)

    def _hide(self, func: Function, given: list[Tensor]) -> None:
        """Take note of a call inside a transform of torch.func, whose tensors are not those that come out of it."""
        if func in ops.SOFTMAX | ops.FUSED_ATTENTION | ops.MULTI_HEAD_ATTENTION:
            raise transform_error(self.module)
        inside = [torch._C._functorch.get_unwrapped(t) if is_transformed(t) else t for t in given]
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
        self._changed_by[_storage(tensor)] = self.written or func
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
        alive = [ref() for ref in self._in_storage.pop(_storage(tensor), [])]
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

    def changed_by(self, tensor: Tensor) -> Function | None:
        """The function that last changed the memory of `tensor` in place."""
        return self._changed_by.get(_storage(tensor))

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
        """Whether `tensor` is a product of two matrices, apart from steps that keep it affine in that product.

        A product with a constant matrix on the right is a projection.
        """
        root = self.walk(tensor, AFFINE)[0]
        step = self.fresh_step(root)
        made = step is not None and step.function in ops.PRODUCT and root not in self._attended
        return made and step is not None and not self.is_constant(step.versions[1][0])

    def has_values(self, tensor: Tensor) -> bool:
        """Whether `tensor` is no stand-in for one that was changed in place."""
        return tensor not in self._stand_ins

    def is_map(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the result of a softmax, apart from moves of its entries and casts."""
        step = self.fresh_step(self.walk(tensor, MOVES_AND_CASTS)[0])
        return step is not None and step.function in ops.SOFTMAX

    def mark_attended(self, tensor: Tensor) -> None:
        """Note that `tensor` is what an attention call gave: what is made of it is followed."""
        self._attended[tensor] = version(tensor)

    def attended(self, tensor: Tensor) -> Tensor | None:
        """The output of an attention call that `tensor` is first made of by linear steps; None if it is not."""
        root = self.walk(tensor, LINEAR)[0]
        return root if self._attended.get(root) == version(root) else None

    def projected(self, tensor: Tensor) -> Tensor | None:
        """The projection, its norm or the attention output that `tensor` was made of by linear steps; None if none."""
        root = self.walk(tensor, LINEAR)[0]
        if root in self._attended:
            return root
        step = self.fresh_step(root)
        found = step is not None and (step.function in ops.PROJECTION or step.kind in ("shift", "normalise"))
        return root if found else None

    def projected_from(self, root: Tensor) -> set[Hashable]:
        """What `root`, which `projected` returned, is a function of, projections of projections followed back."""
        if root in self._attended:
            return {ATTENDED}
        found: set[Hashable] = set()
        step = self.fresh_step(root)
        while step is not None and (step.kind in LINEAR or step.kind in ("shift", "normalise", "call")):
            if step.kind == "call" and step.function not in ops.PROJECTION:
                break
            source = step.tokens if step.kind == "call" else step.source
            if step.kind == "call":
                source = self.walk(source, MOVES_AND_CASTS)[0]
                found.add(self.number(source))
            step = self.fresh_step(source)
        return found

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether `tensor` depends on parameters and constants only."""
        return not self.is_stale(tensor) and self.origin(tensor) is None

    def number(self, tensor: Tensor) -> int:
        """Equal for tensors that are the same function of the same tensors."""
        self.origin(tensor)  # makes a record of an input
        record = self.record(tensor)
        if self.is_stale(tensor):
            return next(self._fresh_numbers)
        return self._static[id(tensor)] if record is None else record.number

    def _number(
        self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, pick: int | None
    ) -> int | None:
        """The number of a new tensor; None if it cannot be told to be equal to another."""
        first = args[0] if args else None
        if func in ops.COPY or (func in ops.CAST and isinstance(first, Tensor) and first.dtype == output.dtype):
            return self.number(first) if isinstance(first, Tensor) else None
        if getattr(func, "__name__", "") in ops.RANDOM or func in ops.DROPOUT:
            return None
        try:
            key = (func, pick, self._key(args), self._key(kwargs))
            hash(key)
        except TypeError:
            return None
        if key not in self._numbers:
            self._numbers[key] = next(self._fresh_numbers)
        return self._numbers[key]

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return ("tensor", self.number(value))
        if isinstance(value, tuple | list):
            return (type(value).__name__, *map(self._key, value))
        if isinstance(value, dict):
            return tuple((name, self._key(part)) for name, part in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", value.start, value.stop, value.step)
        return (type(value).__name__, value)

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a parameter, a buffer or another tensor that the model holds."""
        return id(tensor) in self._static

    def origin(self, tensor: Tensor) -> Origin | None:
        """The place of `tensor` in the ancestry graph; None if it depends on parameters and constants only."""
        record = self.record(tensor)
        if record is not None:
            return record.origin
        if self.is_parameter(tensor):
            return None
        # What was made where nobody sees may be made of all that went there.
        origin = Origin(tuple(self._hidden), tensor.dtype.is_floating_point, next(self._clock))
        number = next(self._fresh_numbers)
        self._records[tensor] = Record(None, None, origin, version(tensor), self.invocations, number)
        return origin

    def ancestors(self, tensor: Tensor, since: int = 0) -> set[Origin]:
        """The floating-point tensors that `tensor` was computed from, back to those that existed at time `since`.

        `tensor` itself is one. Token ids and masks of integers are passed through but not counted: they cannot move.
        """
        return self.ancestors_of(self.origin(tensor), since)

    def ancestors_of(self, origin: Origin | None, since: int = 0) -> set[Origin]:
        """As `ancestors`, of a place in the graph."""
        seen: set[Origin] = set()
        waiting = [origin]
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

    def now(self) -> int:
        """The time."""
        return next(self._clock)

    def common_start(self, others: list[tuple[Invocation, ...]]) -> int:
        """When the innermost module started that is running now and was running in all of `others`."""
        shared = [invocation for invocation in self.invocations if all(invocation in other for other in others)]
        return shared[-1].start

    def watch(
        self, model: nn.Module, left: Callable[[Invocation, Any], None]
    ) -> list[torch.utils.hooks.RemovableHandle]:
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


def is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` lives inside a transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def dict_version(before: list[tuple[Tensor, int]], tensor: Tensor) -> int:
    """The version that `tensor` had."""
    return next(old for one, old in before if one is tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from itertools.chain(model.parameters(), model.buffers())
    for module in model.modules():
        yield from tensors_in([value for name, value in vars(module).items() if not name.startswith("_")])
