"""A network for one input of a batch: its own masks, positions and weights, where attention holds one for each input.

Blocks that were captured at a batch have a padding mask for each input. A bound at one input is about the function with
the mask of that input.
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.targets._attention_checks import TRAILING
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import Layer


def network_of_input(network: Layer, index: int = 0, count: int = 1) -> Layer:
    """The network as one input of a batch meets it: attention without batch dimensions.

    Args:
        network: the network; unchanged where attention has no batch dimensions.
        index: of the input.
        count: how many inputs the batch has.

    Raises:
        InvalidInput: attention has batch dimensions that are not those of the batch.
    """
    return _of_input(network, index, count)


def _of_input(value: Any, index: int, count: int) -> Any:
    if isinstance(value, Attention):
        return _block_of_input(value, index, count)
    if isinstance(value, tuple):
        parts = tuple(_of_input(part, index, count) for part in value)
        return value if all(new is old for new, old in zip(parts, value, strict=True)) else parts
    if not isinstance(value, Layer):
        return value
    fields = {field.name: getattr(value, field.name) for field in dc.fields(value)}  # pyright: ignore[reportArgumentType]
    found = {name: _of_input(part, index, count) for name, part in fields.items()}
    changes = {name: part for name, part in found.items() if part is not fields[name]}
    return dc.replace(value, **changes) if changes else value  # pyright: ignore[reportArgumentType, reportType]


def _block_of_input(block: Attention, index: int, count: int) -> Attention:
    """The own input of a block in a network is not used: of a batch, the first one stands for its shape."""
    changes: dict[str, Tensor] = {}
    for name, trailing in TRAILING.items():
        tensor = getattr(block, name)
        if tensor is None or tensor.dim() <= trailing:
            continue
        lead, own = tensor.shape[:-trailing], tensor.shape[-trailing:]
        if name != "x" and math.prod(lead) != 1 and lead != (count,):
            raise InvalidInput(
                f"attention of network must have no batch dimensions or those of x, ({count},), got the leading shape "
                f"{tuple(lead)} of {name}; pass one block for each input, or bound the inputs one by one."
            )
        changes[name] = tensor.reshape(-1, *own)[index if name != "x" and lead == (count,) else 0]
    return block.replace(**changes) if changes else block
