"""One recorded call, sorted by what it does to the tensor that is followed."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.decompositions import set_entries
from lipbounds.capture.provenance import Provenance
from lipbounds.capture.qk_norm import norm_kind
from lipbounds.capture.replay import MOVES, Kind, Step, tensors_in, version


def classify(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    pick: int | None,
    recorder: Provenance,
) -> Step | None:
    """The call as a step; None if it does nothing that capture can follow.

    Args:
        function: what was called.
        args: its positional arguments.
        kwargs: its keyword arguments.
        output: the result, or one of several.
        pick: which of several results `output` is.
        recorder: of the run; tells what tensors were made of.
    """
    tensors = tensors_in(args, kwargs)
    if not tensors:
        return None
    kind, source = norm_kind(function, args, kwargs, tensors, recorder.fresh_step, recorder.projected)
    if kind is None:
        kind, source = _kind(function, args, kwargs, tensors, output, recorder)
    if kind is None and function in ops.COMBINE | {set_entries}:
        kind, source = _combined(function, kwargs, tensors, recorder)
    if kind is None or source is None:
        return None
    versions = tuple((tensor, version(tensor)) for tensor in tensors)
    return Step(function, args, kwargs, kind, source, output.shape, output.dtype, pick, versions)


def _kind(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    output: Tensor,
    recorder: Provenance,
) -> tuple[Kind | None, Tensor | None]:
    first = tensors[0]
    if function in ops.REINDEX:
        reinterprets = any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values()))
        return (None, None) if reinterprets else ("reindex", first)
    if function in ops.JOIN:
        filled = [tensor for tensor in tensors if tensor.numel() > 0]
        return ("reindex", filled[0]) if len(filled) == 1 else (None, None)
    if function in ops.COPY | ops.CAST:
        return "same" if output.dtype == first.dtype and output.device == first.device else "cast", first
    if function in ops.DROPOUT:
        return "dropout" if _drops(args, kwargs) else "same", first
    if function in ops.MULTIPLY | ops.DIVIDE:
        source = _scaled(function, args, kwargs, output)
        return ("scale", source) if source is not None else _weighed(function, args, kwargs, output, recorder)
    if function in ops.ADD | ops.SUBTRACT | ops.FILL | {set_entries}:
        return _shifted(function, kwargs, tensors, output, recorder)
    if function in ops.ROW_MAXIMUM | ops.EXP and output.dtype.is_floating_point and recorder.is_score(first):
        return "call", first
    if function in ops.SUM:
        step = recorder.fresh_step(first)
        return ("call", first) if step is not None and step.function in ops.EXP else (None, None)
    return ("call", first) if function in ops.PROJECTION | ops.SOFTMAX | ops.LOG_SOFTMAX else (None, None)


def _shifted(
    function: Callable[..., Any], kwargs: dict[str, Any], tensors: list[Tensor], output: Tensor, recorder: Provenance
) -> tuple[Kind | None, Tensor | None]:
    """Attention scores plus a tensor, minus their own maxima, or overwritten in part."""
    # In a difference only the first tensor keeps its sign; `alpha` would scale the second.
    sides = tensors[:1] if function in ops.SUBTRACT | {set_entries} else tensors
    scores = [t for t in sides if t.shape == output.shape and recorder.is_score(t)] if "alpha" not in kwargs else []
    if len(scores) != 1:
        return None, None
    if function in ops.SUBTRACT and len(tensors) == 2:
        maximum = recorder.fresh_step(recorder.trace_back(tensors[1], MOVES)[0])
        own = None if maximum is None or maximum.function not in ops.ROW_MAXIMUM else maximum.source
        if own is not None and recorder.trace_back(own, MOVES)[0] is recorder.trace_back(scores[0], MOVES)[0]:
            return "level", scores[0]
    return "fill" if function in ops.FILL | {set_entries} else "shift", scores[0]


def _weighed(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, recorder: Provenance
) -> tuple[Kind | None, Tensor | None]:
    """Attention scores times a constant tensor."""
    operands = [*args, *kwargs.values()]
    if len(operands) != 2 or not all(isinstance(operand, Tensor) for operand in operands):
        return None, None
    for source, other in (operands, operands[::-1]):
        follows = source.shape == output.shape and recorder.is_score(source) and not recorder.is_score(other)
        if follows and not (function in ops.DIVIDE and source is operands[1]):
            return "weigh", source
    return None, None


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a dropout call, `(input, p, training)`, sets anything to zero."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0


def _scaled(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor | None:
    """The tensor that is multiplied by one number; None for a product of another kind."""
    operands = [*args, *kwargs.values()]
    if len(operands) != 2 or "rounding_mode" in kwargs:
        return None
    first, second = operands
    for source, other in ((first, second), (second, first)):
        is_number = other.numel() == 1 if isinstance(other, Tensor) else isinstance(other, Real)
        if isinstance(source, Tensor) and source is not other and source.shape == output.shape and is_number:
            return None if function in ops.DIVIDE and source is second else source
    return None


def _combined(
    function: Callable[..., Any], kwargs: dict[str, Any], tensors: list[Tensor], recorder: Provenance
) -> tuple[Kind | None, Tensor | None]:
    """A call that is linear in tensors made of projections of the same tokens, or of attention outputs.

    A sum is followed only if all of it was made of the same tokens, or the rest is constant: to follow residual
    connections would keep the whole run in memory.
    """
    filled = [tensor for tensor in tensors if tensor.numel() > 0]
    if function is set_entries:
        filled = [tensor for tensor in (tensors[0], tensors[-1]) if tensor.dtype.is_floating_point]
    roots = [recorder.projected(tensor) for tensor in filled]
    moving = [(tensor, root) for tensor, root in zip(filled, roots, strict=True) if root is not None]
    if not moving or "alpha" in kwargs or "rounding_mode" in kwargs:
        return None, None
    first = moving[0][0]
    constant = all(recorder.is_constant(t) for t, root in zip(filled, roots, strict=True) if root is None)
    if function in ops.MULTIPLY | ops.DIVIDE:
        fits = len(filled) == 2 and len(moving) == 1 and (function in ops.MULTIPLY or first is filled[0])
        fits = fits and (constant or recorder.attended(first) is None)  # a gate is more than a projection
    elif function in ops.ADD | ops.SUBTRACT:
        fits = len(filled) == 2 and constant and _same_origin([root for _, root in moving], recorder)
    else:
        whole = len(moving) == len(filled) or (function is set_entries and is_blank(tensors[0], recorder))
        fits = whole and _same_origin([root for _, root in moving], recorder)
    return ("combine", first) if fits else (None, None)


def is_blank(tensor: Tensor, recorder: Provenance) -> bool:
    """Whether `tensor` was made to be written over: empty, or of zeros."""
    record = recorder.record(tensor)
    name = "" if record is None else getattr(record.function, "__name__", "")
    return "empty" in name or "zeros" in name


def _same_origin(roots: list[Tensor], recorder: Provenance) -> bool:
    if all(root is roots[0] for root in roots):
        return True
    common = set.intersection(*map(recorder.projected_from, roots))
    return bool(common)
