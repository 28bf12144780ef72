"""What capture says when it cannot describe a block."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.overrides import resolve_name

from lipbounds.capture import operations as ops
from lipbounds.capture.provenance import Provenance
from lipbounds.capture.replay import Step
from lipbounds.errors import InvalidInput, Unsupported


QK_NORM = "the one normalisation of queries and keys (QK-norm) that is part of Attention is RMSNorm"


def place(module: str) -> str:
    """The module in words."""
    return f"the attention in {module!r}" if module else "the attention in the model itself"


def unsupported(module: str, reason: str) -> Unsupported:
    """The error for a block that `Attention` cannot express."""
    return Unsupported(
        f"{place(module)} cannot be captured: {reason}; build the Attention by hand if the block has this form."
    )


def unfollowed_in_words(recorder: Provenance, tensor: Tensor) -> str:
    """The functions nearest to `tensor`, where the trace ends, that are not followed from there to a projection."""
    origin = recorder.origin(tensor)
    waiting, seen, met = [origin], {origin}, dict[Any, None]()
    while waiting:
        origin = waiting.pop()
        if origin is None or origin.function is None or origin.function in ops.PROJECTION:
            continue
        if origin.function not in ops.FOLLOWED:
            met[origin.written or origin.function] = None
            continue
        fresh = [parent for parent in origin.parents if parent not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    names = " and ".join(map(function_name, met)) if met else origin_in_words(recorder, tensor)
    return f"{names} in between" + (f"; {QK_NORM}" if not ops.NORMALIZE.isdisjoint(met) else "")


def origin_in_words(recorder: Provenance, tensor: Tensor) -> str:
    """What made `tensor`, for a message."""
    record = recorder.record(tensor)
    if record is None or record.function is None:
        return "a tensor that no recorded function made"
    name = function_name(record.function)
    modified = record.step is not None and recorder.fresh_step(tensor) is None
    if not modified:
        return name
    by = recorder.changed_by(tensor)
    return f"the result of {name}, modified in place{'' if by is None else f' by {function_name(by)}'},"


def function_name(function: object) -> str:
    """The dotted name of a torch function."""
    return resolve_name(function) or getattr(function, "__name__", repr(function))


def transform_error(module: str, trace: TracebackType | None = None) -> Unsupported:
    """The error for attention inside `torch.func.vmap` or `flex_attention`, where tensors are not the model's own.

    Args:
        module: that was running.
        trace: of the exception that came out of it, if one did.
    """
    frames = [frame for frame, _ in traceback.walk_stack(None)] + [frame for frame, _ in traceback.walk_tb(trace)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    if any(name.startswith("torch.nn.attention.flex_attention") for name in names):
        return unsupported(
            module, "flex_attention is not followed; use scaled_dot_product_attention with the mask or bias as a tensor"
        )
    what = "torch.compile is" if trace is not None else "torch.func.vmap, and other transforms of torch.func, are"
    return unsupported(module, f"{what} not followed; run plain torch, with the batch dimension written out")


def check_dropout(module: str, chain: Iterable[Step]) -> None:
    """Refuse a step that sets entries to zero at random."""
    if any(step.kind == "dropout" for step in chain):
        raise dropout_error(module)


def dropout_error(module: str) -> InvalidInput:
    """The error for a block that is random."""
    return InvalidInput(
        f"{place(module)} must not drop entries at random, got dropout > 0 in training; call model.eval()."
    )
