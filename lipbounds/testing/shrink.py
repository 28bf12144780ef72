"""Make a counterexample small: fewer tokens, heads and features, and entries of few digits, while it still refutes."""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing._falsification import Falsification, judge


Case = dict[
    str, Any
]  # the fields of the block, and of a ball the `radius` and the `shift` of the point from its centre
Edit = Callable[[Case], Case | None]
WEIGHTS = ("w_q", "w_k", "w_v", "w_o")
BIASES = ("b_q", "b_k", "b_v")
NORM = ("query_norm_weight", "key_norm_weight", "norm_eps", "norm_over")
NUMBERS = ("scale", "radius", "norm_eps")
ROTATIONS = ("query_rotation", "key_rotation")


def shrink(spec: BoundSpec, found: Falsification, *, seconds: float = 30.0) -> Falsification:
    """A simpler counterexample that keeps at least half of the violation, judged as the given one was.

    Args:
        spec: the bound that `found` refutes.
        found: a counterexample.
        seconds: return what is reached after this time.

    Raises:
        InvalidInput: `found` does not refute the bound.
    """
    if not found.refuted:
        raise InvalidInput(f"only a counterexample can be shrunk, got ratio={found.ratio!r}; search longer for one.")
    needed = 1 + min((found.ratio - 1) / 2, 0.5)
    deadline = time.process_time() + seconds
    case, smallest, changed = _case(found), found, True
    while changed:
        changed = False
        for edit in _edits(case):
            if time.process_time() > deadline:
                return smallest
            candidate = edit(case)
            judged = None if candidate is None else _judged(spec, candidate)
            if candidate is not None and judged is not None and judged.refuted and judged.ratio >= needed:
                case, changed = candidate, True
                smallest = dc.replace(
                    judged, starts=found.starts, steps=found.steps, seconds=found.seconds, seed=found.seed
                )
    return smallest


def _case(found: Falsification) -> Case:
    case = {field.name: getattr(found.block, field.name) for field in dc.fields(found.block)}
    if found.radius is not None:
        case["radius"] = found.radius
    if found.point is not None:
        case["shift"] = found.point - found.block.moving_input
    return {name: value for name, value in case.items() if value is not None}


def _judged(spec: BoundSpec, case: Case) -> Falsification | None:
    """The verdict on the case; None where it is malformed, outside the ball or refused by the bound."""
    fields = {name: value for name, value in case.items() if name not in ("radius", "shift")}
    try:
        block = Attention(**fields)
        point = block.moving_input + case["shift"] if "shift" in case else None
        return judge(spec, block, radius=case.get("radius"), point=point)
    except Exception:  # whatever a stranger's bound raises: this case is then no counterexample
        return None


def _edits(case: Case) -> Iterator[Edit]:
    """All single simplifications, the largest first; each is applied to the case as it is by then."""
    for axes in _axes(case):
        name, axis = next(iter(axes.items()))
        # From the end, so that the remaining indices stay right when one is dropped.
        yield from (_dropping(axes, index) for index in reversed(range(case[name].shape[axis])))
    yield from (_removing(name) for name in (*BIASES, "b_o", "logit_bias", "causal"))
    yield from (_removing(*names) for names in (ROTATIONS, NORM))
    yield from (_setting(name, 1.0) for name in NUMBERS)
    tensors = [name for name, value in case.items() if isinstance(value, Tensor)]
    for digits in (1, 2, 3):
        yield from (_rounding(name, digits) for name in tensors)
        yield from (_rounding(name, digits) for name in NUMBERS)
    for simpler in (lambda value: 0.0, lambda value: 1.0 if value > 0 else -1.0, _one_digit, _two_digits):
        for name in tensors:
            yield from (_changing(name, index, simpler) for index in range(case[name].numel()))


def _axes(case: Case) -> Iterator[dict[str, int]]:
    """For each size of the block, the tensors that have it and on which axis."""
    moves, cross = case["moves"], "memory" in case
    shift = "shift"
    tokens = {"x": -2, "logit_bias": -2, "query_rotation": -3} | ({} if moves == "memory" else {shift: -2})
    width = {"x": -1, "w_q": -2} | ({} if moves == "memory" else {shift: -1})
    if cross:
        moving = moves == "memory"
        yield {"memory": -2, "logit_bias": -1, "key_rotation": -3} | ({shift: -2} if moving else {})
        yield {"memory": -1, "w_k": -2, "w_v": -2} | ({shift: -1} if moving else {})
    else:
        width |= {"w_k": -2, "w_v": -2}
        tokens |= {"key_rotation": -3}
    yield tokens
    yield dict.fromkeys(WEIGHTS, -3) | dict.fromkeys((*BIASES, *NORM[:2]), -2) | {"logit_bias": -3}
    yield width
    yield {"w_o": -1, "b_o": -1}
    # Other pairs of features are turned after it: another block, judged afresh, or none if too few features are left.
    yield dict.fromkeys(("w_q", "w_k", "b_q", "b_k", *NORM[:2]), -1)
    if "query_rotation" in case:
        yield dict.fromkeys(ROTATIONS, -1)
    yield {"w_v": -1, "w_o": -2, "b_v": -1}


def _dropping(axes: dict[str, int], index: int) -> Edit:
    def edit(case: Case) -> Case | None:
        changed = dict(case)
        present = {name: axis for name, axis in axes.items() if name in case and case[name].dim() >= -axis}
        first, axis = next(iter(axes.items()))
        size = case[first].shape[axis]
        if index >= size or size == 1:
            return None
        kept = torch.arange(size) != index
        for name, axis in present.items():
            if case[name].shape[axis] == size:  # a logit bias may have size 1 there, for all
                changed[name] = case[name].movedim(axis, 0)[kept].movedim(0, axis)
        if "x" in axes and axes["x"] == -2 and "memory" not in case and "logit_bias" in changed:
            changed["logit_bias"] = changed["logit_bias"][..., kept]  # the token was a key, too
        return changed

    return edit


def _removing(*names: str) -> Edit:
    def edit(case: Case) -> Case | None:
        return {key: value for key, value in case.items() if key not in names} if names[0] in case else None

    return edit


def _setting(name: str, value: float) -> Edit:
    def edit(case: Case) -> Case | None:
        return case | {name: value} if name in case and case[name] != value else None

    return edit


def _rounding(name: str, digits: int) -> Edit:
    """A whole tensor or a number rounded to so many significant digits."""

    def edit(case: Case) -> Case | None:
        if name not in case:
            return None
        value = case[name]
        if not isinstance(value, Tensor):
            return _setting(name, _rounded(value, digits))(case)
        rounded = [_rounded(entry, digits) for entry in value.reshape(-1).tolist()]
        return _if_changed(case, name, torch.tensor(rounded, dtype=value.dtype).reshape(value.shape))

    return edit


def _changing(name: str, index: int, simpler: Callable[[float], float]) -> Edit:
    """One entry of a tensor made simpler; 0 and what is 1 in size already stay."""

    def edit(case: Case) -> Case | None:
        if name not in case or index >= case[name].numel():
            return None
        entries = case[name].reshape(-1).clone()
        value = float(entries[index])
        entries[index] = 0.0 if value == 0 else simpler(value)
        if abs(value) == 1 and entries[index] != 0:
            return None
        return _if_changed(case, name, entries.reshape(case[name].shape))

    return edit


def _if_changed(case: Case, name: str, tensor: Tensor) -> Case | None:
    return None if torch.equal(tensor, case[name]) else case | {name: tensor}


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _one_digit(value: float) -> float:
    return _rounded(value, 1)


def _two_digits(value: float) -> float:
    return _rounded(value, 2)
