"""Calls of `multi_head_attention_forward`, that is `nn.MultiheadAttention`: all weights are among the arguments."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lipbounds.capture.blocks import Call, Output
from lipbounds.capture.masks import additive, future
from lipbounds.capture.operands import HeadProjection, check_constant
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import dropout_error, unsupported


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_WEIGHTS = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight")


def multi_head_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `multi_head_attention_forward` by name."""
    bound = _MULTI_HEAD.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def multi_head_call(recorder: Recorder, given: dict[str, Any], result: Tensor) -> tuple[Call, Output]:
    """A call of `multi_head_attention_forward`: all weights are among its arguments."""
    extra = [name for name in ("bias_k", "bias_v", "static_k", "static_v") if given[name] is not None]
    if extra or given["add_zero_attn"]:
        raise unsupported(
            recorder.module, f"keys and values must come from tokens, got {extra or ['add_zero_attn']} beside them"
        )
    if given["training"] and given["dropout_p"] > 0:
        raise dropout_error(recorder.module)
    sources = [given[name] for name in ("query", "key", "value")]
    qkv = [_head_projection(given, role, source) for role, source in enumerate(sources)]
    causal = given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]
    masks = [] if causal else [given["attn_mask"], given["key_padding_mask"]]
    weights = [given[name] for name in _WEIGHTS]
    for part in qkv:
        check_constant(recorder, part.source, "mask or weights", [*masks, *weights])
    bias = None if causal else _logit_bias(given)
    call = Call(
        module=recorder.module,
        qkv=qkv,
        scale=qkv[0].weight.shape[-1] ** -0.5,
        logit_bias=bias,
        causal=causal,
        start=recorder.common_start([]),
        time=recorder.now(),
    )
    b_o = given["out_proj_bias"]
    output = Output(
        w_o=_heads(given, given["out_proj_weight"].mT).clone(),
        b_o=None if b_o is None else b_o.clone(),
        result=_batch_first(result),
    )
    return call, output


def multi_head_logit_inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and keys, each `batch heads tokens head_dim`, and the logit bias of a call, with their gradients.

    Args:
        given: as `multi_head_arguments` returns them.
    """
    if given["add_zero_attn"] or any(given[name] is not None for name in ("bias_k", "static_k")):
        raise unsupported("", "keys must come from tokens, got further ones beside them")
    sides = []
    for role, name in enumerate(("query", "key")):
        weight, bias = _role(given, role)
        tokens = F.linear(_batch_first(given[name]), weight, bias)
        sides.append(tokens.unflatten(-1, (given["num_heads"], -1)).transpose(-3, -2))
    query, key = sides
    causal = given["is_causal"] and given["key_padding_mask"] is None and not given["need_weights"]
    return query, key, future(query.shape[-2], key.shape[-2], query) if causal else _logit_bias(given)


def _role(given: dict[str, Any], role: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the projection to queries (role 0), keys (1) or values (2)."""
    if given["use_separate_proj_weight"]:
        weight = given[("q_proj_weight", "k_proj_weight", "v_proj_weight")[role]]
    else:
        weight = given["in_proj_weight"].chunk(3)[role]
    return weight, None if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)[role]


def _head_projection(given: dict[str, Any], role: int, source: Tensor) -> HeadProjection:
    """Queries (role 0), keys (1) or values (2)."""
    weight, bias = _role(given, role)
    tokens = _batch_first(source)
    rows = torch.arange(source.shape[:-1].numel(), device=source.device).view(source.shape[:-1])
    return HeadProjection(
        tokens=tokens.clone(),
        weight=_heads(given, weight).mT.clone(),
        bias=None if bias is None else bias.reshape(given["num_heads"], -1).clone(),
        source=source,
        rows=_batch_first(rows.unsqueeze(-1)).reshape(-1, tokens.shape[-2]),
    )


def _heads(given: dict[str, Any], weight: Tensor) -> Tensor:
    """A matrix with one row a feature of all heads as one matrix a head."""
    return weight.reshape(given["num_heads"], -1, weight.shape[-1])


def _batch_first(tokens: Tensor) -> Tensor:
    """The call has `n batch dim`, or `n dim` without a batch."""
    return tokens.transpose(0, 1) if tokens.dim() == 3 else tokens


def _logit_bias(given: dict[str, Any]) -> Tensor | None:
    """The attention mask and the padding mask in one; in this call True hides a key."""
    query, heads = given["query"], given["num_heads"]
    keys = given["key"].shape[0]
    batch = query.shape[1:-1]
    total = query.new_zeros(1, 1, query.shape[0], keys)
    for name, shape in (("attn_mask", (-1, heads, query.shape[0], keys)), ("key_padding_mask", (-1, 1, 1, keys))):
        mask = given[name]
        if mask is not None:
            mask = additive(~mask if mask.dtype == torch.bool else mask, query.dtype)
            shape = (1, 1, *shape[2:]) if name == "attn_mask" and mask.dim() == 2 else shape
            total = total + mask.reshape(shape)
    if total.shape[:2] == (1, 1):
        total = total[0, 0]
    elif not batch:
        total = total[0]
    return total.clone() if bool((total != 0).any()) else None
