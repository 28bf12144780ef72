"""Putting the pieces of a call together as an `Attention`, and checking it against the model."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lipbounds.capture.masks import future
from lipbounds.capture.operands import HeadProjection
from lipbounds.capture.padding import Items, without_padding
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.refusals import place, unsupported
from lipbounds.capture.replay import MOVES, reindex
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
        index: the number of the call among the attention calls of the run, from 0; calls of one head each that are put
            side by side count as one.
        attention: the block.
        residual: the distance between the output of the block and the model's own, relative to the latter, in the l2
            norm; the largest over the batch.
        projected: whether the block ends with an output projection; where the module has none, the output weights
            put the heads side by side.
        items: the items of the flattened batch that the block holds; None for all. Items in which other tokens are
            padding have a block of their own.
        tokens: the tokens that the block holds; None for all. Padding is left out: tokens that nobody sees and whose
            own rows do not count.
    """

    module: str
    index: int
    attention: Attention = dc.field(repr=False)
    residual: float
    projected: bool = True
    items: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None


@dc.dataclass(frozen=True, kw_only=True)
class Skipped:
    """An attention call that was not captured.

    Args:
        module: the qualified name of the innermost module that was running; empty for the model itself.
        index: the number of the call among the attention calls of the run, as in `CapturedAttention`.
        reason: what it has that `Attention` has not.
    """

    module: str
    index: int
    reason: str


class Captured(list[CapturedAttention]):
    """The attention blocks of a model, in the order of their calls, and what was left out.

    Args:
        found: the blocks.
        skipped: attention calls that could not be captured.
        warnings: what may concern a block, though capture cannot tell.
    """

    def __init__(
        self, found: Iterable[CapturedAttention], skipped: Iterable[Skipped] = (), warnings: Iterable[str] = ()
    ) -> None:
        super().__init__(found)
        self.skipped = tuple(skipped)
        self.warnings = tuple(warnings)


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """What an attention call says of its block; the output projection is still to come.

    Args:
        module: the innermost module that was running.
        qkv: queries, keys and values.
        scale: factor of the logits.
        logit_bias: as `Attention` has it.
        causal: queries see no later keys.
        start: the time at which the module started that holds the projections and the call.
        time: of the call.
        numbers: that were read from arguments which are no tensors.
        dtypes: all in which the model computed; some take the softmax in float32 whatever the rest is in.
    """

    module: str
    qkv: list[HeadProjection]
    scale: float
    logit_bias: Tensor | None
    causal: bool
    start: int
    time: int
    numbers: tuple[float, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What its output moves with: masks, weights and rotary positions are constant."""
        return tuple(part.source for part in self.qkv)


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


def blocks_of(
    recorder: Recorder, call: Call, output: Output, cross_moves: CrossMoves
) -> list[tuple[Attention, Tensor, Items, Items]]:
    """The complete block, or one for each sort of padding: with what the model computed, its items and tokens.

    Args:
        recorder: of the run.
        call: all but the output projection.
        output: the output projection.
        cross_moves: the input that moves in cross-attention.
    """
    w_o, b_o = output.w_o, output.b_o
    query, key, value = call.qkv
    fields: dict[str, Any] = {
        **{"x": query.tokens, "w_q": query.weight, "w_k": key.weight, "w_v": value.weight, "w_o": w_o},
        **{"b_q": query.bias, "b_k": key.bias, "b_v": value.bias, "b_o": b_o},
        **{"query_rotation": query.rotation, "key_rotation": key.rotation},
        **_norms(call),
        **{"scale": call.scale, "logit_bias": call.logit_bias, "causal": call.causal},
    }
    if not (_same(recorder, query, key) and _same(recorder, query, value)):
        at = _places_among(recorder, query, key) if _same(recorder, key, value) else None
        some = {"x": key.tokens, "queries_at": at}
        fields |= _memory(recorder, call, cross_moves) if at is None else some
    if call.causal and (fields.get("memory") is not None or fields.get("queries_at") is not None):
        mask = future(query.tokens.shape[-2], key.tokens.shape[-2], query.tokens)
        fields |= {"causal": False, "logit_bias": mask if call.logit_bias is None else call.logit_bias + mask}
    try:
        pieces = without_padding(fields, output.result)
        return [(Attention(**piece), result, items, tokens) for piece, result, items, tokens in pieces]
    except LipboundsError as error:
        error.add_note(f"while {place(call.module)} was captured")
        raise


def _norms(call: Call) -> dict[str, Any]:
    """The fields of QK-norm."""
    query, key, _ = call.qkv
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


_RELATED = (
    "queries, keys and values must be projections of the same tokens, or of tokens that have nothing to do with each "
    "other inside the module, got "
)


def _same(recorder: Recorder, one: HeadProjection, other: HeadProjection) -> bool:
    """Whether both project the same tokens: not equal ones, but the same function of the same input."""
    if recorder.number(one.source) == recorder.number(other.source):
        return one.rows.shape == other.rows.shape and torch.equal(one.rows, other.rows)
    found, other_found = _entries(recorder, one), _entries(recorder, other)
    if found is None or other_found is None:
        return False
    (root, entries), (other_root, other_entries) = found, other_found
    same = recorder.number(root) == recorder.number(other_root)
    return same and entries.shape == other_entries.shape and torch.equal(entries, other_entries)


def _entries(recorder: Recorder, part: HeadProjection) -> tuple[Tensor, Tensor] | None:
    """The tensor that the source of a part is a rearrangement of, and which of its entries the tokens are.

    None where the tokens are not the rows of the source, as before a convolution.
    """
    rows = part.source.flatten(0, -2) if part.source.dim() > 1 else part.source
    if part.source.dim() < 2 or int(part.rows.max()) >= len(rows) or rows.shape[-1] != part.tokens.shape[-1]:
        return None
    if not torch.equal(rows[part.rows].reshape(part.tokens.shape).to(part.tokens), part.tokens):
        return None
    root, chain = recorder.trace_back(part.source, MOVES)
    entries = torch.arange(root.numel(), dtype=torch.int64, device=root.device).reshape(root.shape)
    return root, reindex(chain, entries).flatten(0, -2)[part.rows]


def _places_among(recorder: Recorder, query: HeadProjection, key: HeadProjection) -> Tensor | None:
    """Which of the tokens of the keys the queries are made of, the same ones in each item; None if they are not."""
    found, others = _entries(recorder, query), _entries(recorder, key)
    if found is None or others is None or recorder.number(found[0]) != recorder.number(others[0]):
        return None
    (of_queries, of_keys), tokens = (pair[1] for pair in (found, others)), key.rows.shape[-1]
    first = of_keys[0].flatten(1)
    places = (of_queries[0].flatten(1)[:, None] == first).all(-1)
    if not bool((places.sum(-1) == 1).all()) or query.rows.shape[-1] >= tokens:
        return None
    at = places.int().argmax(-1)
    return at if torch.equal(of_keys[:, at], of_queries) else None


def _how_related(recorder: Recorder, query: HeadProjection, other: HeadProjection) -> str:
    whole = [recorder.number(recorder.trace_back(part.source, MOVES)[0]) for part in (query, other)]
    if whole[0] != whole[1]:
        return "different functions of the same tokens"
    return "the same tokens in another order or number"


def _memory(recorder: Recorder, call: Call, cross_moves: CrossMoves) -> dict[str, Any]:
    """The fields of a block whose keys and values come from other tokens than its queries."""
    query, key, value = call.qkv
    for other in (key, value):
        if not _same(recorder, query, other) and recorder.related(query.source, other.source, call.start):
            raise unsupported(call.module, _RELATED + _how_related(recorder, query, other))
    unrelated_copy = torch.equal(key.tokens, value.tokens) and not recorder.related(key.source, value.source)
    if _same(recorder, key, value) or unrelated_copy:
        return {"memory": key.tokens, "moves": cross_moves}
    if cross_moves == "memory" or _same(recorder, query, key) or _same(recorder, query, value):
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
