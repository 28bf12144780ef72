"""Calls of `scaled_dot_product_attention`, and what they share with attention written out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture.blocks import Call
from lipbounds.capture.entries import Tracer
from lipbounds.capture.masks import additive, for_layout
from lipbounds.capture.operands import Layout, Operand, check_constant, qkv_and_layout
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import dropout_error, unsupported
from lipbounds.capture.tracing import trace
from lipbounds.ops.shapes import broadcast_shape


_FUSED_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def fused_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name."""
    return _FUSED_DEFAULTS | dict(zip(("query", "key", "value", *_FUSED_DEFAULTS), args, strict=False)) | kwargs


def fused_call(recorder: Recorder, given: dict[str, Any]) -> tuple[Call, Layout]:
    """A call of `scaled_dot_product_attention`, traced back to tokens and weights."""
    if given["dropout_p"] > 0:
        raise dropout_error(recorder.module)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    repeats = query.shape[-3] // key.shape[-3] if given["enable_gqa"] else 1
    tracer = Tracer(recorder)
    operands = [
        trace(tracer, query, "queries"),
        trace(tracer, key, "keys", repeats=repeats),
        trace(tracer, value, "values", repeats=repeats),
    ]
    scale = query.shape[-1] ** -0.5 if given["scale"] is None else float(given["scale"])
    mask = None if given["attn_mask"] is None else additive(given["attn_mask"], query.dtype)
    return traced_call(tracer, operands, scale, mask, (given["attn_mask"],), causal=given["is_causal"])


def traced_call(
    tracer: Tracer,
    operands: list[list[Operand]],
    scale: float,
    mask: Tensor | None,
    mask_sources: Iterable[Any],
    causal: bool = False,
) -> tuple[Call, Layout]:
    """The call with these queries, keys and values.

    Args:
        tracer: of the run.
        operands: queries, keys and values, each as functions of one or several stages of their tokens.
        scale: factor of the logits.
        mask: additive, broadcasts to the logits.
        mask_sources: the model's own tensors that the mask was read from.
        causal: queries see no later keys.
    """
    recorder = tracer.recorder
    chosen = _of_same_tokens(tracer, operands)
    query, key, _ = chosen
    alike = (query.rotation is None) == (key.rotation is None) and _order(query).equal(_order(key))
    if not alike:
        raise unsupported(
            recorder.module, "queries and keys must be turned in the same pairs of features, got different ones"
        )
    if (query.norm is None) != (key.norm is None):
        raise unsupported(recorder.module, "queries and keys must both be normalised, got one of them alone")
    lead = broadcast_shape(operand.lead for operand in chosen)
    qkv, layout = qkv_and_layout(recorder, [operand.expand(lead) for operand in chosen])
    area = qkv[0].tokens.shape[-2], qkv[1].tokens.shape[-2]
    for part in qkv:
        check_constant(recorder, part.source, "mask", mask_sources)
    call = Call(
        module=recorder.module,
        qkv=qkv,
        scale=scale,
        logit_bias=None if mask is None else for_layout(mask.to(qkv[0].tokens.dtype), lead, area, layout),
        causal=causal,
        start=recorder.common_start([operand.invocations for operand in chosen]),
        time=recorder.now(),
        dtypes=tuple(dtype for operand in chosen for dtype in operand.dtypes),
        numbers=(scale, *(number for operand in chosen for number in operand.numbers)),
    )
    return call, layout


def _of_same_tokens(tracer: Tracer, operands: list[list[Operand]]) -> list[Operand]:
    """Queries, keys and values as functions of the same tokens, the latest there are; else of their own."""
    queries, keys, values = operands
    for query in queries:
        alike = [
            [one for one in options if tracer.same_tokens(one.projection, query.projection)]
            for options in (keys, values)
        ]
        if all(alike):
            return [query, alike[0][0], alike[1][0]]
    for key in keys:
        alike = [one for one in values if tracer.same_tokens(one.projection, key.projection)]
        if alike:
            return [queries[0], key, alike[0]]
    return [queries[0], keys[0], values[0]]


def _order(operand: Operand) -> Tensor:
    """The column of the call that each column of the operand is."""
    columns = operand.features.shape[-1]
    return torch.arange(columns, device=operand.features.device) if operand.order is None else operand.order
