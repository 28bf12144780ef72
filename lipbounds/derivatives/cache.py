"""Norms at one block that several bounds, or balls of several radii, ask for: made once."""

from __future__ import annotations

import dataclasses as dc
import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention


Found = TypeVar("Found")


def cached_per_block(function: Callable[[Attention], Found]) -> Callable[[Attention], Found]:
    """Keep what the function returns as long as the block lives (blocks are frozen); not where a gradient is wanted.

    Args:
        function: of a block alone; what it returns must not refer to the block, which would live for ever.
    """
    found: weakref.WeakKeyDictionary[Attention, Found] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def cached(block: Attention) -> Found:
        if torch.is_grad_enabled() and is_tracked(block):
            return function(block)
        if block not in found:
            found[block] = function(block)
        return found[block]

    return cached


def is_tracked(block: Attention) -> bool:
    """Whether a gradient is wanted for the input or a weight.

    Args:
        block: the attention block.
    """
    fields = (getattr(block, field.name) for field in dc.fields(block))
    return any(isinstance(value, Tensor) and value.requires_grad for value in fields)
