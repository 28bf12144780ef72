"""Sizes of matrices together with how far they may be from exact ones, entry by entry, through sums and products.

The calculus of lipbounds.derivatives.rounding.jacobian: errors are carried along, never formed by a difference.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

from torch import Tensor

from lipbounds.targets.rotary import rotate_sizes


# Pays for the rounding of the bounds themselves: sums of positive terms, each with fewer than a million roundings.
OWN_ROUNDING = 1 + 1e-9


@dc.dataclass(frozen=True, slots=True)
class Pair:
    """A bound on |Z| and a bound on |fl(Z) - Z|, entry by entry; the second is None for what is given exactly."""

    size: Tensor
    error: Tensor | None = None

    @property
    def mT(self) -> Pair:
        return Pair(self.size.mT, None if self.error is None else self.error.mT)

    def rotated(self, rotation: Tensor | None) -> Pair:
        """A bound for the vectors turned either way; the two roundings of a turn are counted by `operations`."""
        error = None if self.error is None else rotate_sizes(self.error, rotation)
        return Pair(rotate_sizes(self.size, rotation), error)

    def mapped(self, choose: Callable[[Tensor], Tensor]) -> Pair:
        """A bound for what is left, or put in other places, by a function that does not compute with the entries."""
        return Pair(choose(self.size), None if self.error is None else choose(self.error))

    def sum(self, dim: int | tuple[int, ...], keepdim: bool = False) -> Pair:
        error = None if self.error is None else self.error.sum(dim, keepdim)
        return Pair(self.size.sum(dim, keepdim), error)

    def __add__(self, other: Pair) -> Pair:
        return Pair(self.size + other.size, plus(self.error, other.error))

    def __matmul__(self, other: Pair) -> Pair:
        right = None if other.error is None else self.size @ other.error
        left = None if self.error is None else self.error @ plus_all(other.size, other.error)
        return Pair(self.size @ other.size, plus(left, right))

    def __mul__(self, other: Pair) -> Pair:
        right = None if other.error is None else self.size * other.error
        left = None if self.error is None else self.error * plus_all(other.size, other.error)
        return Pair(self.size * other.size, plus(left, right))


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def plus_all(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a + b
