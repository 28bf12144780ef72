"""A block as it is sent to another process."""

from __future__ import annotations

import dataclasses as dc

import torch

from lipbounds.targets.attention import Attention


def detached_copy(block: Attention) -> Attention:
    """A copy on the CPU that owns its numbers: no cached results, and nothing of the tensors that it was cut from.

    Args:
        block: on any device.
    """
    fields = {field.name: getattr(block, field.name) for field in dc.fields(block)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return block.replace(**{name: tensor.detach().cpu().clone() for name, tensor in tensors.items()})
