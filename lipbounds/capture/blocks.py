"""Putting the pieces of a call together as an `Attention`, and checking it against the model."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal

import torch
from torch import Tensor

from lipbounds.capture.masks import future
from lipbounds.capture.operands import Layout, Part, check_constant
from lipbounds.capture.projections import Projection
from lipbounds.capture.recorded_calls import MOVES_AND_SCALES, factor, reindex
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import check_dropout, place, unsupported
from lipbounds.errors import LipboundsError
from lipbounds.targets.attention import Attention


CrossMoves = Literal["query", "memory"]
# How far the recomputed output may be from the model's own, relative: some hundred roundings of the model's dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dc.dataclass(frozen=True, kw_only=True)
class CapturedAttention:
    """One attention block of a model, at the input the model was run on.

    Args:
        module: the qualified name of the innermost module that was running; empty for the model itself.
        index: the number of the call among the attention calls of the run, from 0.
        attention: the block.
        residual: the distance between the output of the block and the model's own, relative to the latter, in the l2
            norm; the largest over the batch.
    """

    module: str
    index: int
    attention: Attention = dc.field(repr=False)
    residual: float


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What an attention call says of its block; the output projection is still to come.

    Args:
        module: the innermost module that was running.
        parts: queries, keys and values.
        scale: factor of the logits.
        logit_bias: as `Attention` has it.
        causal: queries see no later keys.
        start: the time at which the module started that holds the projections and the call.
        dtypes: all in which the model computed; some take the softmax in float32 whatever the rest is in.
    """

    module: str
    parts: list[Part]
    scale: float
    logit_bias: Tensor | None
    causal: bool
    start: int
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What its output moves with: masks, weights and rotary positions are constant."""
        return tuple(part.source for part in self.parts)


def block_of(recorder: Recorder, call: Call, w_o: Tensor, b_o: Tensor | None, cross_moves: CrossMoves) -> Attention:
    """The complete block.

    Args:
        recorder: of the run.
        call: all but the output projection.
        w_o: output weights, shape `heads value_dim out_dim`.
        b_o: output bias, shape `out_dim`.
        cross_moves: the input that moves in cross-attention.
    """
    query, key, value = call.parts
    fields: dict[str, Any] = {
        **{"x": query.tokens, "w_q": query.weight, "w_k": key.weight, "w_v": value.weight, "w_o": w_o},
        **{"b_q": query.bias, "b_k": key.bias, "b_v": value.bias, "b_o": b_o},
        **{"query_rotation": query.rotation, "key_rotation": key.rotation},
        **_norms(call),
        **{"scale": call.scale, "logit_bias": call.logit_bias, "causal": call.causal},
    }
    if not (torch.equal(query.tokens, key.tokens) and torch.equal(query.tokens, value.tokens)):
        fields |= _memory(recorder, call, cross_moves)
    if fields.get("memory") is not None and call.causal:
        mask = future(query.tokens.shape[-2], key.tokens.shape[-2], query.tokens)
        fields |= {"causal": False, "logit_bias": mask if call.logit_bias is None else call.logit_bias + mask}
    try:
        return Attention(**fields)
    except LipboundsError as error:
        error.add_note(f"while {place(call.module)} was captured")
        raise


def _norms(call: Call) -> dict[str, Any]:
    """The fields of QK-norm."""
    query, key, _ = call.parts
    if query.norm is None or key.norm is None:  # both are; a call with one of them was refused
        return {}
    (query_weight, eps, query_over), (key_weight, key_eps, key_over) = query.norm, key.norm
    over = query_over & key_over
    if eps != key_eps or not over:
        raise unsupported(
            call.module,
            f"queries and keys must be normalised alike, got eps {eps:g} and {key_eps:g}, over {sorted(query_over)} "
            f"and {sorted(key_over)}",
        )
    fields = {"query_norm_weight": query_weight, "key_norm_weight": key_weight, "norm_eps": eps}
    return fields | {"norm_over": "head" if "head" in over else "all_heads"}


def _memory(recorder: Recorder, call: Call, cross_moves: CrossMoves) -> dict[str, Any]:
    """The fields of a block whose keys and values come from other tokens than its queries."""
    query, key, value = call.parts
    for other in (key, value):
        if recorder.related(query.source, other.source, call.start):
            raise unsupported(
                call.module,
                "queries, keys and values must be projections of the same tokens, or of tokens that have nothing to do "
                "with each other inside the module, got different functions of the same tokens",
            )
    if torch.equal(key.tokens, value.tokens):
        return {"memory": key.tokens, "moves": cross_moves}
    if cross_moves == "memory" or torch.equal(query.tokens, key.tokens) or torch.equal(query.tokens, value.tokens):
        raise unsupported(
            call.module,
            "keys and values must be projections of the same tokens, got different ones; no one input moves",
        )
    # Keys and values stand still: side by side they are one memory, of which each weight reads its own half.
    w_k = torch.cat(
        [key.weight, key.weight.new_zeros(len(key.weight), value.tokens.shape[-1], key.weight.shape[-1])], 1
    )
    w_v = torch.cat(
        [value.weight.new_zeros(len(value.weight), key.tokens.shape[-1], value.weight.shape[-1]), value.weight], 1
    )
    return {"memory": torch.cat([key.tokens, value.tokens], -1), "w_k": w_k, "w_v": w_v, "moves": cross_moves}


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Output:
    """The output projection of a block.

    Args:
        w_o: output weights, shape `heads value_dim out_dim`.
        b_o: output bias.
        result: what the model computed with them, shape `*batch n out_dim`.
    """

    w_o: Tensor
    b_o: Tensor | None
    result: Tensor


def output_of(
    recorder: Recorder, layout: Layout, mixed: Tensor, found: Projection, result: Tensor, module: str
) -> Output:
    """Sort the weights and the result of the projection that reads an attention output.

    Args:
        recorder: of the run.
        layout: of the attention call.
        mixed: the output of the attention call, shape `*lead n value_dim`.
        found: the projection that reads it, through re-indexing and scaling.
        result: what the projection gave.
        module: that made the attention call.
    """
    _, chain = recorder.walk(found.tokens, MOVES_AND_SCALES)
    check_dropout(module, chain)
    queries, width = mixed.shape[-2:]
    batch, head = (t.view(*mixed.shape[:-2], 1, 1) for t in layout.locate())
    places = torch.arange(queries, device=mixed.device)[:, None]
    columns = torch.arange(width, device=mixed.device)
    tokens, features = (
        found.rows(reindex(chain, index.expand(mixed.shape).contiguous()))
        for index in (batch * queries + places, head * width + columns)
    )
    row_of, column_of = tokens[:, 0].argsort(), features[0].argsort()
    one_token_a_row = torch.equal(tokens, tokens[:, :1].expand_as(tokens)) and _is_order(
        tokens[row_of, 0], layout.cell.shape[0] * queries
    )
    one_feature_a_column = torch.equal(features, features[:1].expand_as(features)) and _is_order(
        features[0, column_of], layout.heads * width
    )
    if not (one_token_a_row and one_feature_a_column):
        raise unsupported(module, "the output projection must read all heads of one token at a time, got them mixed")
    scales = [other for step in chain if step.kind == "scale" for other in step.others]
    check_constant(recorder, found.tokens, "output weights", [*found.constants, *scales])
    w_o = (found.weight[column_of] * factor(chain)).view(layout.heads, width, -1)
    ordered = found.rows(result)[row_of].view(*layout.batch_shape, queries, -1)
    return Output(w_o=w_o, b_o=None if found.bias is None else found.bias.clone(), result=ordered)


def _is_order(numbers: Tensor, count: int) -> bool:
    return torch.equal(numbers, torch.arange(count, device=numbers.device))


def residual_of(block: Attention, result: Tensor, call: Call) -> float:
    """How far the output of the block is from the model's own `result`, relative; more than rounding is refused."""
    # On a copy: a block caches what it computes, and what was computed without gradients is no use to the caller.
    with torch.no_grad():
        wanted = result.double()
        distance = (block.to(torch.float64).forward() - wanted).flatten(-2).norm(dim=-1)
        size = wanted.flatten(-2).norm(dim=-1)
        residual = float(torch.where(size > 0, distance / size, distance).max())
    tolerance = max(TOLERANCE[dtype] for dtype in (result.dtype, *call.dtypes))
    if not residual <= tolerance:
        raise unsupported(
            call.module, f"the recomputed output must agree with the model's to {tolerance:g}, got {residual=:.3g}"
        )
    return residual
