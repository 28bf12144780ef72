"""Magnitudes at which bounds of attention can be evaluated in float64.

Bounds multiply up to eight norms of tokens and weights, and square covariances: far from 1 such products leave float64.
What overflows is infinity or NaN and shows; what underflows is zero, and a bound made of it is too small. Between the
limits below, which hold all floats of shorter dtypes, neither happens to the largest terms: factors of very different
size meet in `lipbounds.rounding.product`, which scales them first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lipbounds.devices import answers
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention


LARGEST = 2.0**200
SMALLEST = 2.0**-200
# A bias may be as small as it likes: beside it stands a product with a weight.
TENSORS = {"x": 2, "memory": 2, "w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3}
TENSORS |= {"query_norm_weight": 2, "key_norm_weight": 2}
FOUND = "_out_of_range"  # where a block keeps the answer
BIASES = {"b_q": 2, "b_k": 2, "b_v": 2}


def check_range(block: Attention, name: str) -> None:
    """Refuse a block whose tokens or weights are too large or too small for a bound.

    Args:
        block: the attention block.
        name: of the bound.

    Raises:
        InvalidInput: the largest entry of a tensor, in a batch item, is above 2^200, or below 2^-200 without being 0.
    """
    found = block.__dict__.get(FOUND)  # blocks are frozen: one question for all bounds
    if found is None:
        found = block.__dict__[FOUND] = _out_of_range(block)
    for field, got in found.items():
        raise InvalidInput(
            f"{field} must be 0 or have a largest entry between {SMALLEST:.1e} and {LARGEST:.1e} in size for "
            f"{name}, got {got:.3g}: products of such numbers leave float64. Multiply x by "
            "a power of two and w_q, w_k and w_v by its inverse, or w_v by one and w_o by its inverse."
        )
    for field in ("scale", "norm_eps"):
        number = abs(getattr(block, field) or 0.0)
        if number > LARGEST or 0 < number < SMALLEST:
            raise InvalidInput(
                f"{field} must be 0 or between {SMALLEST:.1e} and {LARGEST:.1e} in size for {name}, got {number:.3g}; "
                "scale the weights instead."
            )


def _out_of_range(block: Attention) -> dict[str, float]:
    """The tensors whose largest entry is out of range, with that of the first batch item that is."""
    sizes = dict(_largest(block))
    outside = {field: _outside(field, largest) for field, largest in sizes.items()}
    found = dict(zip(outside, answers(*outside.values()), strict=True))
    return {field: sizes[field][bad].reshape(-1)[0].item() for field, bad in outside.items() if found[field]}


def _outside(field: str, largest: Tensor) -> Tensor:
    """Whether the largest entry of a tensor is out of range."""
    return largest > LARGEST if field in BIASES else (largest > LARGEST) | ((largest < SMALLEST) & (largest > 0))


def _largest(block: Attention) -> Iterator[tuple[str, Tensor]]:
    """The largest entry of each tensor in each batch item."""
    for field, dims in (TENSORS | BIASES).items():
        tensor = getattr(block, field)
        if tensor is not None and tensor.dtype == torch.float64:  # others have no float outside of the limits
            entries = tensor.detach().flatten(-dims)  # twice the reading, and no copy of the sizes
            yield field, torch.maximum(entries.amax(-1), -entries.amin(-1))
