"""What is known of each tensor of a run: how it was made, and of which others."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.invocations import Invocations
from lipbounds.capture.records import Function, Leak, Origin, Record
from lipbounds.capture.replay import AFFINE, LINEAR, MOVES_AND_CASTS, Kinds, Step, tensors_in, version


ATTENDED = "attended"


class Provenance(Invocations):
    """The records of a run, to be asked; `Recorder` writes them.

    Over 150 lines, because each question is answered from the same records and by way of the others.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.leaks: list[Leak] = []
        self._hidden: list[Origin] = []
        self._records: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._attended: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._stand_ins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._held = [*_held_by(model)]  # alive throughout, so that no other tensor gets the id of one
        self._static = {id(tensor): number for number, tensor in enumerate(self._held)}
        self._changed_by: dict[int, Function] = {}
        self._numbers: dict[Hashable, int] = {}
        self._fresh_numbers = itertools.count(len(self._held))

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
        return self._changed_by.get(storage_of(tensor))

    def trace_back(self, tensor: Tensor, kinds: Kinds) -> tuple[Tensor, list[Step]]:
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
        root = self.trace_back(tensor, AFFINE)[0]
        step = self.fresh_step(root)
        made = step is not None and step.function in ops.PRODUCT and root not in self._attended
        return made and step is not None and not self.is_constant(step.versions[1][0])

    def has_values(self, tensor: Tensor) -> bool:
        """Whether `tensor` is no stand-in for one that was changed in place."""
        return tensor not in self._stand_ins

    def is_map(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the result of a softmax, apart from moves of its entries and casts."""
        step = self.fresh_step(self.trace_back(tensor, MOVES_AND_CASTS)[0])
        return step is not None and step.function in ops.SOFTMAX

    def mark_attended(self, tensor: Tensor) -> None:
        """Note that `tensor` is what an attention call gave: what is made of it is followed."""
        self._attended[tensor] = version(tensor)

    def attended(self, tensor: Tensor) -> Tensor | None:
        """The output of an attention call that `tensor` is first made of by linear steps; None if it is not."""
        root = self.trace_back(tensor, LINEAR)[0]
        return root if self._attended.get(root) == version(root) else None

    def projected(self, tensor: Tensor) -> Tensor | None:
        """The projection, its norm or the attention output that `tensor` was made of by linear steps; None if none."""
        root = self.trace_back(tensor, LINEAR)[0]
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
                source = self.trace_back(source, MOVES_AND_CASTS)[0]
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
        origin = Origin(tuple(self._hidden), tensor.dtype.is_floating_point, self.now())
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


def storage_of(tensor: Tensor) -> int:
    """Equal for tensors that share their memory."""
    return tensor.untyped_storage()._cdata


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that modules hold as plain attributes."""
    yield from itertools.chain(model.parameters(), model.buffers())
    for module in model.modules():
        yield from tensors_in([value for name, value in vars(module).items() if not name.startswith("_")])
