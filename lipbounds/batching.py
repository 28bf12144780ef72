"""One bound at many blocks: those of one shape are evaluated together, such as the layers of a model at one input.

Small blocks cost what their Python costs, whatever their size; a batch pays for it once. Where weights are large, it
costs as much to put them side by side: such blocks are evaluated one by one. The numbers are those of the blocks alone,
up to rounding.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipbounds.bound_spec import BoundSpec, block_in
from lipbounds.claims import BoundResult
from lipbounds.targets._attention_checks import TRAILING
from lipbounds.targets.attention import Attention


ENTRIES = 2**24  # of the attention maps of the blocks that are evaluated together
SMALL_WEIGHTS = 2**16  # entries of W_Q of all heads; with 2^12 six blocks took a third of the time, with 2^17 as long


def bound_all(
    spec: BoundSpec, blocks: Sequence[Attention], radius: float | None = None, **options: Any
) -> list[BoundResult]:
    """A bound at each of several blocks, in their order; small blocks of one shape are evaluated in one batch.

    Estimators draw random numbers for a batch that a block alone would not get: they are evaluated one by one.

    Args:
        spec: the bound or estimator.
        blocks: attention blocks, or what `lipbounds.capture` found; those that are batches themselves, and blocks of
            other kinds, are evaluated one by one.
        radius: as `spec` takes it.
        **options: the method's own options.

    Returns:
        what `spec` returns for each block, as though it had been called for it alone.

    Raises:
        InvalidInput: as `spec` raises it.
        UnsupportedAttention: as `spec` raises it, for the first block that it does not cover.
    """
    blocks = [block_in(block) for block in blocks]
    groups: dict[Any, list[int]] = {}
    for place, block in enumerate(blocks):
        alone = spec.role == "estimator" or not isinstance(block, Attention) or bool(block.batch_shape)
        alone = alone or block.w_q.numel() > SMALL_WEIGHTS
        groups.setdefault(place if alone else _kind(block), []).append(place)
    found: dict[int, BoundResult] = {}
    for places in groups.values():
        one = blocks[places[0]]
        most = 1 if len(places) == 1 else max(1, ENTRIES // (one.heads * one.tokens * one.source_input.shape[-2]))
        for start in range(0, len(places), most):
            chosen = places[start : start + most]
            results = _together(spec, [blocks[place] for place in chosen], radius, options)
            found |= dict(zip(chosen, results, strict=True))
    return [found[place] for place in range(len(blocks))]


def _kind(block: Attention) -> tuple[Any, ...]:
    """What blocks of one batch have in common: all but the entries of tensors, of floats; and which tokens have
    queries, which is no batch."""
    fields = ((field.name, getattr(block, field.name)) for field in dc.fields(block))
    at = None if block.queries_at is None else tuple(block.queries_at.tolist())
    return at, *(
        (name, tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else (name, value)
        for name, value in fields
    )


def _together(
    spec: BoundSpec, blocks: list[Attention], radius: float | None, options: dict[str, Any]
) -> list[BoundResult]:
    if len(blocks) == 1:
        return [spec(blocks[0], radius, **options)]
    stacked = {
        name: torch.stack([_with_heads(name, getattr(block, name)) for block in blocks])
        for name in TRAILING
        if getattr(blocks[0], name) is not None
    }
    whole = spec(blocks[0].replace(**stacked), radius, **options)
    return [
        dc.replace(
            whole,
            value=whole.value[place],
            terms={name: _item(term, place, len(blocks)) for name, term in whole.terms.items()},
            details={name: _item(term, place, len(blocks)) for name, term in whole.details.items()},
        )
        for place in range(len(blocks))
    ]


def _with_heads(name: str, tensor: Tensor) -> Tensor:
    """A bias of the logits without an axis for the heads gets one: the batch would be taken for it."""
    return tensor.unsqueeze(0) if name == "logit_bias" and tensor.dim() < TRAILING[name] else tensor


def _item(term: Tensor, place: int, count: int) -> Tensor:
    """A term of one block; all are shaped as the batch, with more axes behind."""
    return term[place] if term.dim() and term.shape[0] == count else term
