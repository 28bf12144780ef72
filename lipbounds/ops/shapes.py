"""The common shape of leading dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def broadcast_shape(shapes: Iterable[Sequence[int]]) -> torch.Size:
    """What `torch.broadcast_shapes` returns, for plain integers.

    That one takes a millisecond a call and imports sympy, two seconds, at the first one: blocks are made by thousands.

    Args:
        shapes: leading dimensions.

    Raises:
        ValueError: two of them have different sizes, none of them 1, in the same place.
    """
    common: list[int] = []
    for shape in shapes:
        common = [1] * (len(shape) - len(common)) + common
        for place, size in enumerate(reversed(shape), 1):
            if size != 1 and common[-place] not in (1, size):
                raise ValueError(f"{tuple(shape)} does not broadcast against {tuple(common)}")
            if size != 1:
                common[-place] = size
    return torch.Size(common)
