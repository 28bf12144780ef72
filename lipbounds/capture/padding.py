"""Padded queries, which see no key: they are left out of a block, with the padding that nobody sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture.masks import future


Items = tuple[int, ...] | None
# The fields of an `Attention`, the output that belongs to it, and its items and tokens among those of the model.
Piece = tuple[dict[str, Any], Tensor, Items, Items]


def without_padding(fields: dict[str, Any], result: Tensor) -> Iterator[Piece]:
    """The block, without queries that see no key; items of the batch with other padding are blocks of their own.

    Args:
        fields: of the `Attention`.
        result: what the model computed, shape `*batch n out_dim`.
    """
    blind = None if fields.get("queries_at") is not None else _blind(fields)
    if blind is None or not bool(blind.any()) or bool(blind.all()):
        yield fields, result, None, None
        return
    batch = fields["x"].shape[:-2]
    blind = blind.expand(*batch, blind.shape[-1]).reshape(-1, blind.shape[-1])
    patterns, of_item = blind.unique(dim=0, return_inverse=True)
    order = sorted(range(len(patterns)), key=lambda i: int((of_item == i).int().argmax()))
    for number in order:
        keep = (~patterns[number]).nonzero()[:, 0]
        items = (of_item == number).nonzero()[:, 0]
        if not len(keep):
            continue  # an item of padding alone
        every = len(items) == len(blind)
        piece = _piece(fields, batch, items, keep)
        rows = result.reshape(-1, *result.shape[-2:])[items][:, keep]
        shape = batch if every else torch.Size([len(items)]) if batch else batch
        yield (
            {name: _shaped(value, name, shape, batch) for name, value in piece.items()},
            rows.view(*shape, *rows.shape[-2:]),
            None if every else tuple(items.tolist()),
            tuple(keep.tolist()) if len(keep) < blind.shape[-1] else None,
        )


def _mask(fields: dict[str, Any]) -> Tensor | None:
    mask = fields["logit_bias"]
    if fields["causal"] and mask is not None:
        mask = mask + future(*mask.shape[-2:], mask)
    return mask


def _blind(fields: dict[str, Any]) -> Tensor | None:
    """Which queries see no key in any head, if nobody who sees one sees them; shape `*batch n`. None without a mask."""
    mask = _mask(fields)
    if mask is None:
        return None
    hidden = mask.isneginf()
    heads = hidden.dim() > 2
    hidden = hidden.all(-3) if heads else hidden
    blind = hidden.all(-1)
    if fields.get("memory") is not None:
        return blind
    seen_by_others = (~hidden & ~blind[..., :, None]).any(-2)
    return blind & ~seen_by_others


def _piece(fields: dict[str, Any], batch: torch.Size, items: Tensor, keep: Tensor) -> dict[str, Any]:
    """The fields with a flat batch of `items`, and of the tokens `keep`."""

    def chosen(tensor: Tensor, own: int, dims: tuple[int, ...]) -> Tensor:
        if tensor.dim() > own:
            tensor = tensor.expand(*batch, *tensor.shape[-own:]).reshape(-1, *tensor.shape[-own:])[items]
        for dim in dims:
            tensor = tensor.index_select(dim, keep)
        return tensor

    crossed = fields.get("memory") is not None
    piece = dict(fields)
    piece["x"] = chosen(fields["x"], 2, (-2,))
    if crossed:
        piece["memory"] = chosen(fields["memory"], 2, ())
    bias = fields["logit_bias"]
    piece["logit_bias"] = chosen(bias, min(bias.dim(), 3), (-2,) if crossed else (-2, -1))
    for name, dims in (("query_rotation", (-3,)), ("key_rotation", () if crossed else (-3,))):
        if fields[name] is not None:
            piece[name] = chosen(fields[name], 3, dims)
    if not bool((piece["logit_bias"] != 0).any()):
        piece["logit_bias"] = None
    return piece


_OWN = {"x": 2, "memory": 2, "logit_bias": 3, "query_rotation": 3, "key_rotation": 3}


def _shaped(value: Any, name: str, shape: torch.Size, batch: torch.Size) -> Any:
    """A flat batch dimension in the shape of the model's, where all items are there."""
    if name not in _OWN or not isinstance(value, Tensor) or value.dim() <= _OWN[name] or len(shape) == 1:
        return value
    return value.view(*shape, *value.shape[-_OWN[name] :])
