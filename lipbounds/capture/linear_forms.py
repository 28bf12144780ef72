"""Queries, keys or values as linear forms in the entries of one projection: which entries, times which numbers.

The recorded steps are run again, each on the numbers of the entries and on their coefficients. So what a rotation does
to a feature is read off exactly; nothing is fitted.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.decompositions import set_entries
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.replay import LINEAR, Step


# A cast to one of these is the identity up to rounding; one to integers or eight bits is a function of its own.
FINE_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)
# Numbers of the entries of the projection, and their coefficients in float64 or complex128; a value is the sum of its
# terms.
Term = tuple[Tensor, Tensor]
Terms = list[Term]


@dc.dataclass(frozen=True, eq=False, slots=True)
class Form:
    """A tensor as a sum of terms, each of its shape.

    Args:
        terms: at least one.
        steps: from the projection to the tensor, in the order of the run.
        constants: the model's own tensors that the coefficients were read from.
    """

    terms: Terms
    steps: list[Step]
    constants: list[Tensor]


def linear_leaves(
    recorder: Recorder, tensor: Tensor, is_leaf: Callable[[Tensor], bool]
) -> tuple[list[Tensor], list[Tensor]] | Tensor:
    """The leaves that `tensor` is made of by linear steps, and the tensors in between, in the order of the run.

    Where it is no such, the tensor at which the trace ends.

    Args:
        recorder: of the run.
        tensor: a tensor.
        is_leaf: tells where to stop.
    """
    leaves: dict[int, Tensor] = {}
    between: dict[int, Tensor] = {}
    waiting = [tensor]
    while waiting:
        current = waiting[-1]
        if id(current) in leaves or id(current) in between:
            waiting.pop()
        elif is_leaf(current):
            leaves[id(waiting.pop())] = current
        else:
            step = recorder.fresh_step(current)
            if step is None or step.kind not in LINEAR or step.dtype not in FINE_DTYPES:
                return current
            needed = [t for t in _moving(recorder, step) if id(t) not in leaves and id(t) not in between]
            waiting += needed
            if not needed:
                between[id(waiting.pop())] = current
    return [*leaves.values()], [*between.values()]


def form_of(recorder: Recorder, tensor: Tensor, leaves: dict[int, Tensor], between: list[Tensor]) -> Form:
    """`tensor` as linear forms.

    Args:
        recorder: of the run.
        tensor: what is asked about.
        leaves: by the id of each leaf, the numbers of its entries.
        between: the tensors between the leaves and `tensor`, in the order of the run.
    """
    known: dict[int, Terms] = {
        name: [(index, torch.ones(index.shape, dtype=torch.float64, device=index.device))]
        for name, index in leaves.items()
    }
    steps: list[Step] = []
    for current in between:
        step = recorder.fresh_step(current)
        assert step is not None  # linear_leaves found it
        known[id(current)] = _run(step, known)
        steps.append(step)
    with_values = [step for step in steps if step.kind in ("scale", "combine") and step.function is not set_entries]
    constants = [other for step in with_values for other in step.others if id(other) not in known]
    return Form(known[id(tensor)], steps, constants)


def _moving(recorder: Recorder, step: Step) -> list[Tensor]:
    """What went into the step that was made of the projection."""
    if step.kind != "combine":
        return [step.source]
    return [tensor for tensor, _ in step.versions if tensor.numel() and recorder.projected(tensor) is not None]


def _run(step: Step, known: dict[int, Terms]) -> Terms:
    terms = known[id(step.source)]
    if step.kind == "cast":
        return terms  # rounding is no part of the function
    if step.kind == "scale":
        factor = step.factor.double() if isinstance(step.factor, Tensor) else step.factor
        return [(index, coefficient * factor) for index, coefficient in terms]
    if step.kind != "combine":
        return [(step.again(index), step.again(coefficient)) for index, coefficient in terms]
    if step.function in ops.JOIN | ops.STACK:
        return _joined(step, known)
    if step.function in ops.ADD | ops.SUBTRACT:
        return _added(step, known)
    if step.function is set_entries:
        return _assigned(step, known)
    if step.function in ops.NEGATE:
        return [(index, -coefficient) for index, coefficient in terms]
    if step.function in ops.AS_COMPLEX:
        return [(index[..., i], coefficient[..., i] * 1j**i) for index, coefficient in terms for i in (0, 1)]
    if step.function in ops.AS_REAL:
        return [(torch.stack([index, index], -1), torch.view_as_real(coefficient)) for index, coefficient in terms]
    return _multiplied(step, terms)


def _multiplied(step: Step, terms: Terms) -> Terms:
    (other,) = step.others
    other = other.to(torch.complex128 if other.is_complex() else torch.float64)
    other = 1 / other if step.function in ops.DIVIDE else other
    return [(index.expand(step.shape), (coefficient * other).expand(step.shape)) for index, coefficient in terms]


def _added(step: Step, known: dict[int, Terms]) -> Terms:
    first, second = (tensor for tensor, _ in step.versions)
    sign = -1 if step.function in ops.SUBTRACT else 1
    signed = [*known[id(first)], *((index, sign * coefficient) for index, coefficient in known[id(second)])]
    return [(index.expand(step.shape), coefficient.expand(step.shape)) for index, coefficient in signed]


def _assigned(step: Step, known: dict[int, Terms]) -> Terms:
    """Some entries replaced; what was there before, where it did not move, counts as zero."""
    target, place, value = step.args
    written = known[id(value)] if isinstance(value, Tensor) else []
    before = known.get(id(target), [])
    any_index = (before or written)[0][0].flatten()[:1]

    def padded(terms: Terms, number: int, shape: torch.Size) -> Term:
        if number < len(terms):
            return terms[number]
        return any_index.expand(shape), torch.zeros(shape, dtype=torch.float64, device=any_index.device)

    result = []
    for number in range(max(len(before), len(written))):
        (old_index, old), (index, coefficient) = (
            padded(before, number, step.shape),
            padded(written, number, any_index.shape),
        )
        result.append((set_entries(old_index, place, index), set_entries(old, place, coefficient)))
    return result


def _joined(step: Step, known: dict[int, Terms]) -> Terms:
    """Side by side; where one part has fewer terms than another, it gets some with coefficient 0."""
    parts = [known[id(tensor)] for tensor, _ in step.versions if tensor.numel() > 0]
    most = max(len(part) for part in parts)
    filled = [[*part, *[(part[0][0], torch.zeros_like(part[0][1]))] * (most - len(part))] for part in parts]
    options: dict[str, Any] = {name: value for name, value in step.kwargs.items() if name not in ("tensors", "out")}
    dim = step.args[1:2]
    return [
        (
            step.function([part[number][0] for part in filled], *dim, **options),
            step.function([part[number][1] for part in filled], *dim, **options),
        )
        for number in range(most)
    ]
