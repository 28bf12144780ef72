"""Attention written out as `softmax(scale * q @ k.T + mask) @ v`."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.blocks import Call
from lipbounds.capture.fused import traced_call
from lipbounds.capture.masks import additive
from lipbounds.capture.operands import Layout
from lipbounds.capture.projections import product_operands
from lipbounds.capture.recorded_calls import AFFINE, MOVES_AND_CASTS, Step, factor, reindex, replay
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import check_dropout, origin_in_words, unfollowed_in_words, unsupported
from lipbounds.capture.tracing import trace


# What a model fills in for a hidden logit; nothing below it survives the softmax unless the whole row is hidden.
FILL_IS_HIDDEN_BELOW = -1e4
# How many functions back from a product a changed attention map is still recognised.
CHANGED_MAP_DEPTH = 6


def written_out_inputs(recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Queries, transposed keys, values of a product whose left side is an attention map; None for other products."""
    left, right = product_operands(args, kwargs)
    map_root, _ = recorder.walk(left, MOVES_AND_CASTS)
    softmax = recorder.fresh_step(map_root)
    if recorder.is_parameter(right):  # classes mixed by their probabilities, not tokens
        return None
    if softmax is None or softmax.function not in ops.SOFTMAX:
        refuse_changed_map(recorder, left)
        return None
    scores_root, _ = recorder.walk(softmax.source, AFFINE)
    scores = recorder.fresh_step(scores_root)
    if scores is None or scores.function not in ops.PRODUCT:
        raise unsupported(
            recorder.module,
            "the logits must be a product of queries and keys, scaled and masked only, "
            f"got {unfollowed_in_words(recorder, scores_root)}",
        )
    return (*product_operands(scores.args, scores.kwargs), right)


def written_out_call(
    recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[Tensor, ...]
) -> tuple[Call, Layout]:
    """The call whose last product this is, traced back to tokens and weights.

    Args:
        recorder: of the run.
        args: of the product of attention map and values.
        kwargs: of the same.
        inputs: queries, transposed keys and values.
    """
    query, key, value = inputs
    map_root, after = recorder.walk(product_operands(args, kwargs)[0], MOVES_AND_CASTS)
    softmax = recorder.fresh_step(map_root)
    assert softmax is not None  # written_out_inputs found it
    scores, before = recorder.walk(softmax.source, AFFINE)
    check_dropout(recorder.module, [*before, *after])
    lead_of = _lead_in_scores(recorder, scores, before, after, softmax)
    operands = [trace(recorder, query, "queries"), trace(recorder, key, "keys", transposed=True)]
    operands = [operand.expand(scores.shape[:-2]).take(lead_of.flatten()) for operand in operands]
    gain = factor(before)
    if isinstance(gain, Tensor):
        read_from = [other for step in before if step.kind == "scale" for other in step.others]
        operands[0], gain = operands[0].times(gain, read_from), 1.0
    values = trace(recorder, value, "values")
    if torch.broadcast_shapes(values.lead, lead_of.shape) != lead_of.shape:
        raise unsupported(
            recorder.module, f"each attention map must have its values, got {values.lead} for {lead_of.shape}"
        )
    masks = [other for step in before if step.kind in ("shift", "fill") for other in step.others]
    bias = reindex(after, _logit_bias(recorder, scores, before)).reshape(-1, *softmax.shape[-2:]).to(value.dtype)
    call, layout = traced_call(recorder, [*operands, values.expand(lead_of.shape)], gain, bias, masks)
    dtypes = (*call.dtypes, softmax.dtype, *(step.dtype for step in (*before, *after)))
    return dc.replace(call, dtypes=dtypes), layout


def _lead_in_scores(recorder: Recorder, scores: Tensor, before: list[Step], after: list[Step], softmax: Step) -> Tensor:
    """For each leading index of the attention map, the flat leading index of the scores it was made of."""
    area = scores.shape[-2:].numel()
    inside = torch.arange(area, device=scores.device).view(scores.shape[-2:])
    index = reindex(before, torch.arange(scores.numel(), device=scores.device).view(scores.shape))
    for table in (index, reindex(after, index)):
        if table.shape[-2:] != inside.shape or not torch.equal(table % area, inside.expand(table.shape)):
            raise unsupported(recorder.module, "an attention map must keep queries as rows and keys as columns")
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    if dim not in (-1, index.dim() - 1):
        raise unsupported(recorder.module, f"the softmax must be over the keys, the last dimension, got {dim=}")
    return reindex(after, index)[..., 0, 0] // area


def _logit_bias(recorder: Recorder, scores: Tensor, before: list[Step]) -> Tensor:
    """What is added to the scaled scores: the steps from scores to softmax, run on zeros.

    An entry that is the same when they are run on ones was overwritten by a mask.
    """
    zero, one = (replay(before, scores.new_full(scores.shape, value, dtype=torch.float64)) for value in (0.0, 1.0))
    filled = zero == one
    if bool((filled & (zero > FILL_IS_HIDDEN_BELOW)).any()):
        rule = f"a masked logit must be filled with at most {FILL_IS_HIDDEN_BELOW:g}"
        raise unsupported(recorder.module, f"{rule}, got {float(zero[filled].max()):g}")
    return additive(zero.masked_fill(filled, -torch.inf), torch.float64)


def refuse_changed_map(recorder: Recorder, tensor: Tensor) -> None:
    """Refuse a factor of a product that was a softmax some functions ago: an attention map that cannot be followed."""
    origin = recorder.origin(tensor)
    waiting = [] if origin is None else [(origin, 0)]
    while waiting:
        origin, depth = waiting.pop()
        if origin.function in ops.SOFTMAX and origin.size == tensor.numel():
            raise unsupported(
                recorder.module,
                "an attention map must go from the softmax into a matrix product with the values, got "
                f"{origin_in_words(recorder, tensor)} in between, or a product of another form",
            )
        waiting.extend((parent, depth + 1) for parent in origin.parents if depth < CHANGED_MAP_DEPTH)
