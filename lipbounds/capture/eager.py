"""Attention written out as `softmax(scale * q @ k.T + mask) @ v`."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.blocks import Call
from lipbounds.capture.decompositions import softmax_dim
from lipbounds.capture.entries import Tracer
from lipbounds.capture.fused import traced_call
from lipbounds.capture.masks import most_negative
from lipbounds.capture.operands import Layout
from lipbounds.capture.projections import product_operands
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import check_dropout, unfollowed_in_words, unsupported
from lipbounds.capture.replay import AFFINE, MOVES, MOVES_AND_CASTS, Step, numbers_in, reindex
from lipbounds.capture.tracing import trace


# What a model fills in for a hidden logit; nothing below it survives the softmax unless the whole row is hidden.
FILL_IS_HIDDEN_BELOW = -1e4


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Map:
    """An attention map on its way from the scores into a product with the values.

    Args:
        scores: the step that multiplied queries and keys.
        root: the scores.
        before: from the scores to the softmax.
        softmax: the step.
        after: from the softmax to the product.
    """

    scores: Step
    root: Tensor
    before: list[Step]
    softmax: Step
    after: list[Step]


def softmax_before(recorder: Recorder, tensor: Tensor) -> Tensor | None:
    """The result of the softmax that `tensor` is, apart from moves of its entries; None if it is none."""
    root, _ = recorder.trace_back(tensor, MOVES_AND_CASTS)
    step = recorder.fresh_step(root)
    return root if step is not None and step.function in ops.SOFTMAX else None


def map_of(recorder: Recorder, tensor: Tensor) -> Map:
    """How the attention map `tensor` was made.

    Raises:
        Unsupported: it is not the softmax of a product of two matrices, scaled and masked.
    """
    root, after = recorder.trace_back(tensor, MOVES_AND_CASTS)
    softmax = recorder.fresh_step(root)
    assert softmax is not None  # softmax_before found it
    scores_root, before = recorder.trace_back(softmax.source, AFFINE)
    scores = recorder.fresh_step(scores_root)
    if scores is None or scores.function not in ops.PRODUCT:
        raise unsupported(
            recorder.module,
            "the logits must be a product of queries and keys, scaled and masked only, "
            f"got {unfollowed_in_words(recorder, scores_root)}",
        )
    return Map(scores=scores, root=scores_root, before=before, softmax=softmax, after=after)


def eager_call(recorder: Recorder, left: Tensor, value: Tensor) -> tuple[Call, Layout]:
    """The call whose last product is `left @ value`, traced back to tokens and weights.

    Args:
        recorder: of the run.
        left: the attention map.
        value: the values.
    """
    found = map_of(recorder, left)
    check_dropout(recorder.module, [*found.before, *found.after])
    lead_of, swapped = _places(recorder, found, left)
    one, other = product_operands(found.scores.args, found.scores.kwargs)
    tracer = Tracer(recorder)
    query, key = (other, one) if swapped else (one, other)
    operands = [
        trace(tracer, query, "queries", transposed=swapped),
        trace(tracer, key, "keys", transposed=not swapped),
    ]
    lead = found.root.shape[:-2]
    operands = [[each.expand(lead).take(lead_of.flatten()) for each in options] for options in operands]
    slope, bias = (t.reshape(-1, *left.shape[-2:]) for t in _affine(recorder, found))
    gain, read_from = _gain(recorder, slope, bias), _read(found, ("scale", "weigh"))
    factor: float = 1.0
    if bool((gain == gain[0]).all()) and not any(isinstance(_number(step), Tensor) for step in found.before):
        factor = float(gain[0])
    else:
        operands[0] = [each.times(gain.to(value.dtype), read_from) for each in operands[0]]
    values = trace(tracer, value, "values")
    if torch.broadcast_shapes(values[0].lead, lead_of.shape) != lead_of.shape:
        raise unsupported(
            recorder.module, f"each attention map must have its values, got {values[0].lead} for {lead_of.shape}"
        )
    values = [each.expand(lead_of.shape) for each in values]
    masks = [*_read(found, ("shift", "fill", "weigh"))]
    call, layout = traced_call(tracer, [*operands, values], factor, bias.to(value.dtype), masks)
    floats = [step.dtype for step in (found.softmax, *found.before, *found.after) if step.dtype.is_floating_point]
    numbers = (*call.numbers, *numbers_in([*found.before, *found.after]))
    return dc.replace(call, dtypes=(*call.dtypes, *floats), numbers=numbers), layout


def _number(step: Step) -> Any:
    """What a step multiplies by."""
    return step.factor if step.kind == "scale" else step.others[0] if step.kind == "weigh" else None


def _read(found: Map, kinds: tuple[str, ...]) -> list[Tensor]:
    return [other for step in found.before if step.kind in kinds for other in step.others]


def _places(recorder: Recorder, found: Map, left: Tensor) -> tuple[Tensor, bool]:
    """For each leading index of the map, the flat one of the scores it was made of; whether rows and columns changed.

    Queries must be the rows of the map, keys its columns, all of them in their order, and the softmax over the keys.
    """
    queries, keys = found.root.shape[-2:]
    index = torch.arange(found.root.numel(), device=left.device).view(found.root.shape)
    at_softmax = reindex(found.before, index)
    at_product = reindex(found.after, at_softmax)
    dim = softmax_dim(found.softmax.args, found.softmax.kwargs)
    if not isinstance(dim, int):
        raise unsupported(recorder.module, f"the softmax must be over one dimension that is named, got {dim=}")
    together = at_softmax.movedim(dim, -1)
    rows, columns = at_product // keys % queries, at_product % keys
    swapped = left.shape[-2:] == (keys, queries) and bool((rows == rows[..., :1, :]).all())
    if swapped:
        rows, columns = columns, rows
    kept = torch.arange(left.shape[-2], device=left.device)[:, None], torch.arange(left.shape[-1], device=left.device)
    lead = at_product // (queries * keys)
    whole = left.shape[-2:] == ((keys, queries) if swapped else (queries, keys))
    in_order = bool((rows == kept[0]).all()) and bool((columns == kept[1]).all())
    if not whole or not in_order or not bool((lead == lead[..., :1, :1]).all()):
        part = "a part of them" if bool((lead == lead[..., :1, :1]).all()) and not whole else "others"
        raise unsupported(
            recorder.module, f"an attention map must keep queries as rows and keys as columns, all of them, got {part}"
        )
    along = (together // keys % queries) if swapped else together % keys
    others = together - along * (keys if swapped else 1)
    count = queries if swapped else keys
    over_keys = together.shape[-1] == count and bool((along == torch.arange(count, device=left.device)).all())
    if not over_keys or not bool((others == others[..., :1]).all()):
        raise unsupported(recorder.module, f"the softmax must be over the keys, got {dim=}, which is not theirs")
    _check_levels(recorder, found, dim)
    return lead[..., 0, 0], swapped


def _check_levels(recorder: Recorder, found: Map, dim: int) -> None:
    """What was subtracted to keep exponentials small must be one number for each softmax."""
    if not any(step.kind == "level" for step in found.before):
        return
    value = torch.zeros(found.root.shape, dtype=torch.float64, device=found.root.device)
    for step in found.before:
        if step.kind in ("reindex", "scale"):
            value = step.again(value)
        elif step.kind == "weigh":
            value = _weighed(step, value)
        elif step.kind == "level":
            value = value - step.others[0].double()
    value = value.movedim(dim, -1)
    if not bool((value == value[..., :1]).all()):
        raise unsupported(recorder.module, "what is subtracted from the logits must be one number for each softmax")


def _weighed(step: Step, value: Tensor) -> Tensor:
    other = step.others[0].to(value.dtype)
    return value / other if step.function in ops.DIVIDE else value * other


def _affine(recorder: Recorder, found: Map) -> tuple[Tensor, Tensor]:
    """What each score is multiplied by, and what is added: -inf where it is hidden; in the layout of the map."""
    slope = torch.ones(found.root.shape, dtype=torch.float64, device=found.root.device)
    bias = torch.zeros_like(slope)
    filled = torch.zeros(slope.shape, dtype=torch.bool, device=slope.device)
    for step in found.before:
        if step.kind in MOVES or step.kind == "scale":
            slope, bias, filled = step.again(slope), step.again(bias), _moved(step, filled)
        elif step.kind == "weigh":
            slope, bias = _weighed(step, slope), _weighed(step, bias)
        elif step.kind == "fill":
            zero, one = (step.again(torch.full_like(bias, number)) for number in (0.0, 1.0))
            filled = filled | (zero == one)
            bias = step.again(bias)
        elif step.kind == "shift":
            bias = step.again(bias)
    filled = filled | ((slope == 0) & (slope != _largest(slope)))
    if bool((filled & (bias > FILL_IS_HIDDEN_BELOW)).any()):
        rule = f"a masked logit must be filled with at most {FILL_IS_HIDDEN_BELOW:g}"
        raise unsupported(recorder.module, f"{rule}, got {float(bias[filled].max()):g}")
    bias = bias.masked_fill(filled | most_negative(bias, found.root.dtype), -torch.inf)
    return reindex(found.after, slope), reindex(found.after, bias)


def _largest(slope: Tensor) -> Tensor:
    return slope.abs().amax()


def _moved(step: Step, table: Tensor) -> Tensor:
    return step.again(table) if step.kind == "reindex" else table


def _gain(recorder: Recorder, slope: Tensor, bias: Tensor) -> Tensor:
    """One factor for each leading index of the map."""
    seen = ~bias.isneginf()
    first = seen.flatten(1).int().argmax(-1)
    gain = slope.flatten(1).gather(1, first[:, None])[:, 0]
    if bool((seen & (slope != gain[:, None, None])).any()):
        raise unsupported(
            recorder.module, "all logits of a head must be multiplied by the same number, got different ones"
        )
    return gain
