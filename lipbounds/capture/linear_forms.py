"""Queries, keys or values as linear forms in the entries of one projection: which entries, times which numbers.

The recorded steps are run again, each on the numbers of the entries and on their coefficients. So what a rotation does
to a feature is read off exactly; nothing is fitted.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.recorded_calls import LINEAR, Step
from lipbounds.capture.recorder import Recorder


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


def form_of(recorder: Recorder, tensor: Tensor, root: Tensor) -> Form | Tensor:
    """`tensor` as linear forms in the entries of `root`; where it is none, the tensor at which the trace ends.

    Args:
        recorder: of the run.
        tensor: made of `root` by linear steps, as far as its first factors and summands show.
        root: the result of a projection.
    """
    known: dict[int, Terms] = {id(root): [_entries(root)]}
    steps: list[Step] = []
    waiting = [tensor]
    while waiting:
        current = waiting[-1]
        step = recorder.fresh_step(current)
        if id(current) not in known:
            if step is None or step.kind not in LINEAR or step.dtype not in FINE_DTYPES:
                return current
            needed = [part for part in _moving(recorder, step) if id(part) not in known]
            if needed:
                waiting.extend(needed)
                continue
            known[id(current)] = _run(step, known)
            steps.append(step)
        waiting.pop()
    with_values = [step for step in steps if step.kind in ("scale", "combine")]
    constants = [other for step in with_values for other in step.others if id(other) not in known]
    return Form(known[id(tensor)], steps, constants)


def _entries(root: Tensor) -> Term:
    index = torch.arange(root.numel(), device=root.device).view(root.shape)
    return index, torch.ones(root.shape, dtype=torch.float64, device=root.device)


def _moving(recorder: Recorder, step: Step) -> list[Tensor]:
    """What went into the step that was made of the projection."""
    if step.kind != "combine":
        return [step.source]
    return [tensor for tensor, _ in step.versions if recorder.projected(tensor) is not None]


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
