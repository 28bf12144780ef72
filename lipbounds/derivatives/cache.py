"""Norms at one block that several bounds, balls of several radii, or its heads alone ask for: made once."""

from __future__ import annotations

import dataclasses as dc
import functools
import weakref
from collections.abc import Callable, MutableMapping
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention


Found = TypeVar("Found")
Given = ParamSpec("Given")
_originals: MutableMapping[Attention, weakref.ref[Attention]] = weakref.WeakKeyDictionary()
_by_head: list[MutableMapping[Attention, Tensor]] = []  # what each function of `cached_by_head` has found


def cached_per_block(function: Callable[[Attention], Found]) -> Callable[[Attention], Found]:
    """Keep what the function returns as long as the block lives (blocks are frozen); not where a gradient is wanted.

    Args:
        function: of a block alone; what it returns must not refer to the block, which would live for ever.
    """
    return _cached(function, weakref.WeakKeyDictionary())


def cached_by_head(
    function: Callable[Concatenate[Attention, Given], Tensor],
) -> Callable[Concatenate[Attention, Given], Tensor]:
    """As `cached_per_block`, and `hand_to_heads` gives a head alone what was found for it in its block.

    Args:
        function: of a block, and of what its caller has made of that block already. Returns a tensor with an axis of
            heads behind those of the batch, where what belongs to a head depends on no other head, in no bit.
    """
    found: MutableMapping[Attention, Tensor] = weakref.WeakKeyDictionary()
    _by_head.append(found)
    return _cached(function, found)


def hand_to_heads(block: Attention, alone: Attention, heads: slice) -> None:
    """Give blocks of one head each what is known of their heads.

    Args:
        block: without batch dimensions.
        alone: a batch of its heads.
        heads: which.
    """
    for found in _by_head:
        if block in found:
            found[alone] = found[block][heads].unsqueeze(1)


def copy_of(block: Attention) -> Attention:
    """The same block, for what is kept for it to refer to: both share what is found, and the copy keeps no block alive.

    Args:
        block: that takes part in no gradient.
    """
    copy = block.replace()
    copy.__dict__["_norms"] = block.weight_norms
    _originals[copy] = weakref.ref(block)
    return copy


def _original(block: Attention) -> Attention:
    """What a copy is of, as long as that lives; another block itself."""
    original = _originals[block]() if block in _originals else None
    return block if original is None else original


def _cached(
    function: Callable[Concatenate[Attention, Given], Found], found: MutableMapping[Attention, Found]
) -> Callable[Concatenate[Attention, Given], Found]:
    @functools.wraps(function)
    def cached(block: Attention, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        if torch.is_grad_enabled() and is_tracked(block):
            return function(block, *args, **kwargs)
        key = _original(block)
        if key not in found:
            found[key] = function(block, *args, **kwargs)
        return found[key]

    return cached


def is_tracked(block: Attention) -> bool:
    """Whether a gradient is wanted for the input or a weight.

    Args:
        block: the attention block.
    """
    fields = (getattr(block, field.name) for field in dc.fields(block))
    return any(isinstance(value, Tensor) and value.requires_grad for value in fields)
