"""Collecting the attention blocks of a run, each one when its output projection is called."""

from __future__ import annotations

import dataclasses as dc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lipbounds.capture import operations as ops
from lipbounds.capture.blocks import (
    Call,
    Captured,
    CapturedAttention,
    CrossMoves,
    Output,
    Skipped,
    blocks_of,
    residual_of,
)
from lipbounds.capture.eager import eager_call, softmax_before
from lipbounds.capture.entries import Tracer
from lipbounds.capture.fused import fused_arguments, fused_call
from lipbounds.capture.leaks import check_leaks, warnings_of
from lipbounds.capture.multi_head import multi_head_arguments, multi_head_call
from lipbounds.capture.operands import Layout
from lipbounds.capture.outputs import Mixed, merged, output_of, reads, side_by_side
from lipbounds.capture.projections import Projection, product_operands, projection
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.records import Invocation
from lipbounds.capture.refusals import function_name, place, unsupported
from lipbounds.capture.replay import tensors_in, version
from lipbounds.capture.sites import Sites
from lipbounds.errors import InvalidInput, Unsupported


OnUnsupported = Literal["raise", "skip"]
# The number of a call, and what was found after it and before the next one.
Place = tuple[int, int]


@dc.dataclass(eq=False)
class _Open:
    """An attention call, its output on the way to a projection.

    Args:
        index: the number of the call.
        mixed: the call.
        version: of the output.
        returned: what the module that holds the projections and the call returned of it.
        met: the function that the output was last seen going into.
        results: of the projections that read it.
        failed: it was reported.
    """

    index: int
    mixed: Mixed
    version: int
    returned: Tensor | None = None
    met: str = ""
    results: list[weakref.ref[Tensor]] = dc.field(default_factory=list)
    failed: bool = False


# Attention calls with their outputs, in the order of the heads of a block.
Group = list[tuple[_Open, Tensor]]


class Collector:
    """Hears of every torch call of a run, and completes a block when its output projection is called.

    Over 150 lines, because a block is opened, read and closed by the same few records.
    """

    def __init__(self, recorder: Recorder, cross_moves: CrossMoves, on_unsupported: OnUnsupported) -> None:
        self._recorder = recorder
        self._cross_moves: CrossMoves = cross_moves
        self._on_unsupported: OnUnsupported = on_unsupported
        self._sites = Sites(recorder)
        self._done: dict[int, list[CapturedAttention]] = {}
        self._skipped: dict[Place, Skipped] = {}
        self._open: dict[int, _Open] = {}
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> tuple[Tensor, ...] | None:
        """Take note of one call; returns the tensors that an attention output moves with, None for other calls."""
        self._read_outputs(function, args, kwargs, result)
        self._sites.hear(function, args, kwargs, result, self._count)
        if function in ops.FUSED_ATTENTION:
            return self._begin(lambda: fused_call(self._recorder, fused_arguments(args, kwargs)), result)
        if function in ops.MULTI_HEAD_ATTENTION:
            return self._whole(args, kwargs, result[0])
        if function in ops.PRODUCT:
            left, value = product_operands(args, kwargs)
            site = self._sites.of_map(left)
            if softmax_before(self._recorder, left) is not None:
                if self._recorder.is_constant(value):  # classes mixed by their probabilities, not tokens
                    return None
                began = self._begin(lambda: eager_call(self._recorder, left, value), result, site is None)
                if site is not None:
                    site.done = True
                return began
        return None

    def result(self) -> Captured:
        """All blocks of the run, in the order of their calls."""
        self._finish()
        for number, site in enumerate(self._sites.left(), start=1):
            met = site.met or "nothing that is followed"
            error = unsupported(
                site.module,
                f"an attention map must go from the softmax ({site.function}) into a matrix product with the values, "
                f"got {met} in between, or a product of another form",
            )
            self._skip(error, site.module, (site.order - 1, number))
        if not self._done and not self._skipped:
            raise Unsupported(
                "the model must call scaled_dot_product_attention, nn.MultiheadAttention or softmax(q @ k.T) @ v in "
                "plain torch, got no such call; choose such an attention implementation (transformers: "
                "attn_implementation='sdpa'), and do not compile the model."
            )
        places = sorted([*((index, 0) for index in self._done), *self._skipped])
        order = {place: number for number, place in enumerate(places)}
        found = [dc.replace(one, index=order[index, 0]) for index in sorted(self._done) for one in self._done[index]]
        skipped = [dc.replace(one, index=order[place]) for place, one in sorted(self._skipped.items())]
        return Captured(found, skipped, warnings_of(self._recorder))

    def left_module(self, invocation: Invocation, output: Any) -> None:
        """Keep what a module returned of attention outputs: where no projection follows, that is the end of a block."""
        for tensor in tensors_in(output) if self._open else ():
            for one, _ in self._read_by(tensor):
                if one.mixed.call.start == invocation.start and not one.results:
                    one.returned = tensor

    def added(self, result: Tensor) -> None:
        """A sum: perhaps of two projections of one attention output, which are one (LoRA before it is merged)."""
        if not any(len(one.results) > 1 and not one.failed for one in self._open.values()):
            return
        tracer = Tracer(self._recorder)
        entries = tracer.entries(result)
        for stage in [] if entries is None else tracer.ladder(entries):
            group = self._read_by(stage.projection.tokens)
            parts = [ref() for ref in group[0][0].results] if group else []
            if group and all(part is not None and id(part) in stage.made_of for part in parts):
                stage = stage.folded()
                rows = stage.projection.rows(stage.projection.tokens).shape[0]
                ordered = result.new_zeros(rows, stage.width).index_put((stage.rows, stage.features), result)
                for one, _ in group:
                    one.results.clear()
                self._close(group, stage.projection, ordered, result)
                return

    # -- from the call to the projection ------------------------------------------------------------------------

    def _begin(
        self, read: Callable[[], tuple[Call, Layout]], mixed: Tensor, optional: bool = False
    ) -> tuple[Tensor, ...] | None:
        index, self._count = self._count, self._count + 1
        try:
            call, layout = read()
        except Unsupported as error:
            if not optional:  # else it was no attention
                self._skip(error, self._recorder.module, (index, 0))
            return None
        self._recorder.mark_attended(mixed)
        self._open[index] = _Open(index, Mixed(call=call, layout=layout, shape=mixed.shape), version(mixed))
        self._outputs[mixed] = index
        return call.sources

    def _whole(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> tuple[Tensor, ...] | None:
        index, self._count = self._count, self._count + 1
        try:
            call, output = multi_head_call(self._recorder, multi_head_arguments(args, kwargs), result)
            self._done[index] = self._blocks(index, call, output)
        except Unsupported as error:
            self._skip(error, self._recorder.module, (index, 0))
            return None
        return call.sources

    def _read_by(self, tensor: Tensor) -> Group:
        """The attention calls whose outputs `tensor` is made of by linear steps, in the order of the calls."""
        leaves = reads(self._recorder, tensor, lambda t: t in self._outputs) if len(self._outputs) else []
        found = sorted(((self._outputs[leaf], leaf) for leaf in leaves), key=lambda pair: pair[0])
        group = [(self._open[number], leaf) for number, leaf in found]
        return group if all(one.version == version(leaf) and not one.failed for one, leaf in group) else []

    def _read_outputs(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Complete the block whose attention output goes into this call, if it is a projection."""
        for tensor in tensors_in(args, kwargs) if self._open else ():
            group = self._read_by(tensor)
            if not group:
                continue
            found = projection(function, args, kwargs, result.shape) if isinstance(result, Tensor) else None
            if found is not None and found.tokens is tensor:
                self._close(group, found, found.rows(result), result)
            else:
                for one, _ in group:
                    one.met = function_name(self._recorder.written or function)

    def _close(self, group: Group, found: Projection, rows: Tensor, result: Tensor) -> None:
        """Complete a block whose output projection gave `rows`, one for each row of `found.tokens`."""
        calls = [one for one, _ in group]
        first, again = calls[0], any(one.results for one in calls)
        for one in calls:
            one.results.append(weakref.ref(result))
            one.returned = None
        if again:  # a second projection of the same output; if both are not added, that is refused in the end
            return
        try:
            mixed = [one.mixed for one in calls]
            output = output_of(self._recorder, mixed, [leaf for _, leaf in group], found, rows)
            if output is None:
                raise unsupported(first.mixed.call.module, "the output must be projected once, got a sum of outputs")
            call = merged(self._recorder, [one.call for one in mixed], [one.layout for one in mixed])
            self._done[first.index] = self._blocks(first.index, call, output)
        except Unsupported as error:
            self._fail(calls, error)

    def _fail(self, calls: Iterable[_Open], error: Unsupported) -> None:
        calls = [*calls]
        self._skip(error, calls[0].mixed.call.module, (calls[0].index, 0))
        for one in calls:
            one.failed = True
            self._done.pop(one.index, None)

    def _finish(self) -> None:
        """What became of the attention calls whose outputs were not projected once."""
        for one in self._open.values():
            module = one.mixed.call.module
            if one.failed or len(one.results) == 1:
                continue
            if one.results:
                self._fail([one], unsupported(module, "the output must go into one projection, got a second one"))
            elif one.returned is None:
                met = f"; it was last seen going into {one.met}" if one.met else ""
                what = "the output must go into a linear projection through re-indexing and scaling only"
                self._fail([one], unsupported(module, f"{what}, or be what the module returns, got neither{met}"))
            else:
                returned = one.returned
                group = self._read_by(returned)
                self._close(group, side_by_side(returned), returned.reshape(-1, returned.shape[-1]), returned)
                if one.index in self._done:
                    self._done[one.index] = [dc.replace(block, projected=False) for block in self._done[one.index]]

    def _blocks(self, index: int, call: Call, output: Output) -> list[CapturedAttention]:
        check_leaks(self._recorder, call)
        try:
            pieces = blocks_of(self._recorder, call, output, self._cross_moves)
        except InvalidInput as error:
            if self._on_unsupported == "raise":
                raise
            raise Unsupported(f"{place(call.module)} cannot be captured: {error}") from error
        found = []
        for block, result, items, tokens in pieces:
            residual = residual_of(block, result, call)
            one = CapturedAttention(
                module=call.module, index=index, attention=block, residual=residual, items=items, tokens=tokens
            )
            found.append(one)
        return found

    def _skip(self, error: Unsupported, module: str, at: Place) -> None:
        if self._on_unsupported == "raise":
            raise error
        self._skipped[at] = Skipped(module=module, index=at[0], reason=str(error))
