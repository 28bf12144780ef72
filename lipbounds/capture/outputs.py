"""From the outputs of attention calls on to the output projection; several calls may be heads of one block."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture.blocks import Call, Output
from lipbounds.capture.linear_forms import form_of, linear_leaves
from lipbounds.capture.masks import future
from lipbounds.capture.operands import HeadProjection, Layout, check_constant
from lipbounds.capture.projections import Projection
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import check_dropout, unsupported
from lipbounds.ops.shapes import broadcast_shape


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Mixed:
    """One attention call whose output is still to be projected.

    Args:
        call: the call.
        layout: of the call.
        shape: of its output, `*lead n value_dim`.
    """

    call: Call
    layout: Layout
    shape: torch.Size


def output_of(
    recorder: Recorder, mixed: Sequence[Mixed], leaves: Sequence[Tensor], found: Projection, rows: Tensor
) -> Output | None:
    """Sort the weights and the result of the projection that reads the outputs of attention calls; None if it does not.

    Args:
        recorder: of the run.
        mixed: the calls.
        leaves: their outputs, which `found.tokens` is made of, in the order of the heads of the block.
        found: the projection.
        rows: what it gave, for each row of its tokens.
    """
    module = mixed[0].call.module
    form = _form(recorder, mixed[0].call.module, leaves, found.tokens)
    if form is None:
        return None
    index, coefficient, constants = form
    batch, row, head, column = _places(mixed, index)
    queries, width = mixed[0].shape[-2:]
    heads = sum(one.layout.heads for one in mixed)
    tokens, features = found.rows(batch * queries + row), found.rows(head * width + column)
    row_of, column_of = tokens[:, 0].argsort(), features[0].argsort()
    one_token_a_row = torch.equal(tokens, tokens[:, :1].expand_as(tokens)) and _is_order(
        tokens[row_of, 0], mixed[0].layout.cell.shape[0] * queries
    )
    one_feature_a_column = torch.equal(features, features[:1].expand_as(features)) and _is_order(
        features[0, column_of], heads * width
    )
    if not (one_token_a_row and one_feature_a_column):
        raise unsupported(module, "the output projection must read all heads of one token at a time, got them mixed")
    factors = found.rows(coefficient)
    if not bool((factors == factors[:1]).all()):
        raise unsupported(module, "the output must be multiplied by the same numbers for all tokens")
    check_constant(recorder, found.tokens, "output weights", [*found.constants, *constants])
    weight = found.weight
    if bool((factors[0] != 1).any()):
        weight = weight * factors[0, :, None].to(weight.dtype)
    ordered = rows[row_of].view(*mixed[0].layout.batch_shape, queries, -1)
    w_o = weight[column_of].view(heads, width, -1)
    return Output(w_o=w_o, b_o=None if found.bias is None else found.bias.clone(), result=ordered)


def side_by_side(tensor: Tensor) -> Projection:
    """No projection: the identity on the last dimension."""
    one = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    return Projection(tokens=tensor, weight=one, bias=None, shape=tensor.shape)


def reads(recorder: Recorder, tensor: Tensor, is_mixed: Any) -> list[Tensor]:
    """The outputs of attention calls that `tensor` is made of by linear steps alone; none if there is more to it."""
    if recorder.attended(tensor) is None:
        return []
    found = linear_leaves(recorder, tensor, is_mixed)
    return [] if isinstance(found, Tensor) else found[0]


def _form(
    recorder: Recorder, module: str, outputs: Sequence[Tensor], tensor: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """For each entry of `tensor` the number of an entry of the outputs, what it is multiplied by, and its sources."""
    leaves, start = {}, 0
    for one in outputs:
        leaves[id(one)] = start + torch.arange(one.numel(), device=tensor.device).view(one.shape)
        start += one.numel()
    found = linear_leaves(recorder, tensor, lambda t: id(t) in leaves)
    assert not isinstance(found, Tensor)  # `reads` found the leaves
    form = form_of(recorder, tensor, leaves, found[1])
    check_dropout(module, form.steps)
    if len(form.terms) != 1:
        return None
    ((index, coefficient),) = form.terms
    return index, coefficient, form.constants


def _places(mixed: Sequence[Mixed], index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each entry of a form its batch item, query, head and feature."""
    batch, row, head, column = [], [], [], []
    heads = 0
    for one in mixed:
        shape = one.shape
        queries, width = shape[-2:]
        numbers = torch.arange(shape.numel(), device=index.device)
        item, place = one.layout.locate()
        lead = numbers // (queries * width)
        batch.append(item[lead])
        head.append(place[lead] + heads)
        row.append(numbers // width % queries)
        column.append(numbers % width)
        heads += one.layout.heads
    return tuple(torch.cat(table)[index] for table in (batch, row, head, column))  # pyright: ignore[reportReturnType]


def _is_order(numbers: Tensor, count: int) -> bool:
    return torch.equal(numbers, torch.arange(count, device=numbers.device))


# -- several calls, one block ---------------------------------------------------------------------------------------


def merged(recorder: Recorder, calls: Sequence[Call], layouts: Sequence[Layout]) -> Call:
    """The calls as heads of one block: same tokens and positions, each with its own weights, scale and mask."""
    first = calls[0]
    if len(calls) == 1:
        return first
    for call in calls[1:]:
        for one, other in zip(first.qkv, call.qkv, strict=True):
            alike = recorder.number(one.source) == recorder.number(other.source) and torch.equal(one.rows, other.rows)
            if not alike or not _equal(one.rotation, other.rotation) or (one.norm is None) != (other.norm is None):
                raise unsupported(
                    first.module, "heads side by side must be of the same tokens and positions, got different ones"
                )
            if one.norm is not None and other.norm is not None and one.norm[1:] != other.norm[1:]:
                raise unsupported(first.module, "heads side by side must be normalised alike")
    qkv = [_merged([call.qkv[role] for call in calls]) for role in range(3)]
    scale = first.scale
    if any(call.scale != scale for call in calls):
        qkv[0] = _scaled(qkv[0], calls, layouts)
        scale = 1.0
    causal = all(call.causal for call in calls)
    return dc.replace(
        first,
        qkv=qkv,
        scale=scale,
        causal=causal,
        logit_bias=_merged_bias(calls, layouts, causal),
        start=min(call.start for call in calls),
        dtypes=tuple(dtype for call in calls for dtype in call.dtypes),
        numbers=tuple(number for call in calls for number in call.numbers),
    )


def _merged(parts: Sequence[HeadProjection]) -> HeadProjection:
    bias = None
    if any(part.bias is not None for part in parts):
        shapes = [part.weight[:, 0] for part in parts]
        bias = torch.cat(
            [torch.zeros_like(s) if part.bias is None else part.bias for part, s in zip(parts, shapes, strict=True)]
        )
    norm = parts[0].norm
    if norm is not None:
        norm = (torch.cat([part.norm[0] for part in parts if part.norm is not None]), *norm[1:])
    return dc.replace(parts[0], weight=torch.cat([part.weight for part in parts]), bias=bias, norm=norm)


def _scaled(query: HeadProjection, calls: Sequence[Call], layouts: Sequence[Layout]) -> HeadProjection:
    """Queries with the scale of each call in the weights of its heads."""
    scales = [scale for call, layout in zip(calls, layouts, strict=True) for scale in [call.scale] * layout.heads]
    each = query.weight.new_tensor(scales)
    if query.norm is not None:
        return dc.replace(query, norm=(query.norm[0] * each[:, None], *query.norm[1:]))
    bias = None if query.bias is None else query.bias * each[:, None]
    return dc.replace(query, weight=query.weight * each[:, None, None], bias=bias)


def _merged_bias(calls: Sequence[Call], layouts: Sequence[Layout], causal: bool) -> Tensor | None:
    biases = []
    for call in calls:
        bias = call.logit_bias
        if call.causal and not causal:
            mask = future(call.qkv[0].rows.shape[-1], call.qkv[1].rows.shape[-1], call.qkv[0].tokens)
            bias = mask if bias is None else bias + mask
        biases.append(bias)
    if all(bias is None for bias in biases) or all(_equal(bias, biases[0]) for bias in biases):
        return biases[0]
    area = calls[0].qkv[0].rows.shape[-1], calls[0].qkv[1].rows.shape[-1]
    blank = calls[0].qkv[0].tokens.new_zeros(area)
    filled = [blank if bias is None else bias for bias in biases]
    filled = [
        (one if one.dim() > 2 else one[None]).expand(*one.shape[:-3], layout.heads, *area)
        for one, layout in zip(filled, layouts, strict=True)
    ]
    lead = broadcast_shape(bias.shape[:-3] for bias in filled)
    return torch.cat([bias.expand(*lead, *bias.shape[-3:]) for bias in filled], -3)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
