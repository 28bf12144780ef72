"""Frozen means frozen: a block keeps the tensors it was given, and refuses to go on after one was changed in place.

A block caches what it computes. After `x.mul_(2)`, or a step of an attack or optimiser in place, numbers made from
tensors cached before and after the change would be of no block at all. Copies would cost the memory of the weights for
each block, so torch's counters of changes are compared instead. They do not see changes under inference mode, through
`.data` or through memory shared with NumPy.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch

from lipbounds.errors import InvalidInput


VERSIONS = "_versions"  # where a block keeps them


def record_versions(target: Any) -> None:
    """Note how often each tensor of a new block has been changed in place.

    Args:
        target: a block whose tensors are fields.
    """
    versions = {name: _version(value) for name, value in _tensors(target).items()}
    target.__dict__[VERSIONS] = versions


def check_frozen(target: Any) -> None:
    """Refuse a block one of whose tensors was changed in place after the block was made.

    Args:
        target: any block; one whose versions were not recorded passes.

    Raises:
        InvalidInput: a tensor has changed.
    """
    known = target.__dict__.get(VERSIONS, {})
    for name, value in _tensors(target).items():
        if name in known and _version(value) != known[name]:
            raise InvalidInput(
                f"{name} must stay as it was when the block was made, got a tensor that was changed in place since: "
                f"what the block has cached is of the old one. Make a new block (block.replace({name}=...), or "
                "capture again), or give the block a copy, tensor.clone()."
            )


def _tensors(target: Any) -> dict[str, torch.Tensor]:
    fields = ((field.name, getattr(target, field.name)) for field in dc.fields(target))
    return {name: value for name, value in fields if isinstance(value, torch.Tensor)}


def _version(tensor: torch.Tensor) -> int | None:
    """None where nothing is counted: in inference mode."""
    return None if tensor.is_inference() else tensor._version
