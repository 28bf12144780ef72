"""Running a model once and collecting its attention blocks."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.blocks import (
    Call,
    CapturedAttention,
    CrossMoves,
    Output,
    block_of,
    output_of,
    residual_of,
)
from lipbounds.capture.eager import refuse_changed_map, written_out_call, written_out_inputs
from lipbounds.capture.fused import fused_arguments, fused_call
from lipbounds.capture.multi_head import multi_head_arguments, multi_head_call
from lipbounds.capture.operands import Layout
from lipbounds.capture.projections import projection
from lipbounds.capture.recorded_calls import MOVES_AND_SCALES, tensors_in, version
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import function_name, unsupported
from lipbounds.errors import InvalidInput, Unsupported


def capture(model: nn.Module, *args: Any, cross_moves: CrossMoves = "query", **kwargs: Any) -> list[CapturedAttention]:
    """The attention blocks of `model` at the given inputs, complete with weights, in the order of their calls.

    The model is run once. Each block is recomputed from what was captured and compared with what the model computed.
    Attention is found in calls of `scaled_dot_product_attention`, in `nn.MultiheadAttention` (also inside
    `nn.TransformerEncoderLayer`) and where it is written out as `softmax(scale * q @ k.T + mask) @ v`. Self-attention
    is told from cross-attention by the values: queries, keys and values projected from equal tokens. Rotary positions
    and QK-norm are read off the steps between projection and attention, in whatever layout these have. A captured block
    ends with its output projection; a bias that is added in a separate call afterwards is not part of it.

    Args:
        model: any module whose forward method is plain torch; in eval mode.
        *args: its inputs. A batch gives blocks with batch dimensions.
        cross_moves: the input that the Lipschitz constant of cross-attention is about, the other one being fixed.
        **kwargs: its keyword inputs.

    Returns:
        One entry a call. Tensors carry gradients if gradients are enabled where this is called; the model's own
        tensors are copied.

    Raises:
        Unsupported: a block that `Attention` cannot express, such as one with capped logits, or no block at all.
        InvalidInput: dropout that is active; a query that sees no key; inference mode.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be a torch.nn.Module, got {type(model).__name__}; wrap the function in one.")
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise InvalidInput("model must not be compiled, got one made by torch.compile; pass the module it was made of.")
    if torch.is_inference_mode_enabled():
        raise InvalidInput("capture cannot follow tensors under torch.inference_mode(); use torch.no_grad() instead.")
    if cross_moves not in ("query", "memory"):
        raise InvalidInput(f"cross_moves must be 'query' or 'memory', got {cross_moves=}.")
    recorder = Recorder(model)
    collector = _Collector(recorder, cross_moves)
    with _watched(model, recorder, collector):
        model(*args, **kwargs)
    return collector.blocks()


@dc.dataclass(eq=False)
class _Open:
    """An attention call whose output projection is still to come."""

    index: int
    call: Call
    layout: Layout
    version: int
    met: str = ""


class _Collector:
    """Hears of every torch call of a run, and completes a block when its output projection is called."""

    def __init__(self, recorder: Recorder, cross_moves: CrossMoves) -> None:
        self._recorder = recorder
        self._cross_moves: CrossMoves = cross_moves
        self._done: dict[int, CapturedAttention] = {}
        self._open: dict[int, _Open] = {}
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[Tensor, ...] | None:
        """Take note of one call; returns the tensors that an attention output moves with, None for other calls."""
        self._close(function, args, kwargs, result)
        if function in ops.FUSED_ATTENTION:
            return self._begin(*fused_call(self._recorder, fused_arguments(args, kwargs)), result)
        if function in ops.MULTI_HEAD_ATTENTION:
            given = multi_head_arguments(args, kwargs)
            call, output = multi_head_call(self._recorder, given, result[0])
            self._finish(self._count, call, output)
            self._count += 1
            return call.sources
        if function in ops.PRODUCT:
            inputs = written_out_inputs(self._recorder, args, kwargs)
            if inputs is not None:
                return self._begin(*written_out_call(self._recorder, args, kwargs, inputs), result)
        for factor in tensors_in(args) if function in ops.OTHER_PRODUCT else ():
            refuse_changed_map(self._recorder, factor)
        return None

    def blocks(self) -> list[CapturedAttention]:
        """All blocks of the run, in the order of their calls."""
        if self._open:
            pending = self._open[min(self._open)]
            met = f"; it was last seen going into {pending.met}" if pending.met else ""
            raise unsupported(
                pending.call.module,
                "the output must go into a linear projection through re-indexing and scaling only, got none" + met,
            )
        if not self._done:
            raise Unsupported(
                "the model must call scaled_dot_product_attention, nn.MultiheadAttention or softmax(q @ k.T) @ v in "
                "plain torch, got no such call; choose such an attention implementation (transformers: "
                "attn_implementation='sdpa'), and do not compile the model."
            )
        return [self._done[index] for index in sorted(self._done)]

    def _begin(self, call: Call, layout: Layout, mixed: Tensor) -> tuple[Tensor, ...]:
        self._open[self._count] = self._outputs[mixed] = _Open(self._count, call, layout, version(mixed))
        self._count += 1
        return call.sources

    def _close(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Complete the block whose attention output goes into this call, if it is a projection."""
        for tensor in tensors_in(args, kwargs) if len(self._outputs) else ():
            mixed, _ = self._recorder.walk(tensor, MOVES_AND_SCALES)
            pending = self._outputs.get(mixed)
            if pending is None or pending.version != version(mixed):
                continue
            found = projection(function, args, kwargs, result.shape) if isinstance(result, Tensor) else None
            if found is None or found.tokens is not tensor:
                pending.met = function_name(function)
                continue
            if pending.index not in self._open:
                raise unsupported(pending.call.module, "the output must go into one projection, got a second one")
            module = pending.call.module
            output = output_of(self._recorder, pending.layout, mixed, found, result, module)
            del self._open[pending.index]
            self._finish(pending.index, pending.call, output)

    def _finish(self, index: int, call: Call, output: Output) -> None:
        block = block_of(self._recorder, call, output.w_o, output.b_o, self._cross_moves)
        residual = residual_of(block, output.result, call)
        self._done[index] = CapturedAttention(module=call.module, index=index, attention=block, residual=residual)


@contextmanager
def _watched(model: nn.Module, recorder: Recorder, collector: _Collector) -> Iterator[None]:
    """Record what happens inside, with the fused encoder layer of torch, which hides its attention call, turned off."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    handles = recorder.watch(model)
    recorder.listener = collector
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with recorder:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
