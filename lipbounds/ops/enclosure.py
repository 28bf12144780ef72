"""Matrices known up to a spectral-norm ball: all J with ||J - centre|| <= deviation and ||J|| <= norm.

The Jacobians of a layer over a ball of inputs lie in such a set, and sets of layers combine to sets of networks by
products and sums. What the rounding of centres costs goes into the deviation; where a deviation is that small,
Frobenius norms stand in for spectral ones. Rules and proof: docs/functions.md, section 7.
"""

from __future__ import annotations

import dataclasses as dc
import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate, product


NEGLIGIBLE = 1e-10  # deviations below this part of the centre's Frobenius norm are taken for rounding errors


@dc.dataclass(frozen=True, eq=False)
class Enclosure:
    """A set of matrices, one for each batch item.

    Args:
        limit: upper bound on the norm of every member.
        centre: a matrix near all of them; None: only `limit` is known.
        deviation: upper bound on the norm of the difference to the centre; None without a centre.
        tight: `limit` is about as small as it can be, so no eigenproblem is solved for a smaller one.
    """

    limit: Float[Tensor, "*batch"]
    centre: Float[Tensor, "*matrices rows cols"] | None = None
    deviation: Float[Tensor, "*batch"] | None = None
    tight: bool = False

    @cached_property
    def norm(self) -> Float[Tensor, "*batch"]:
        """Upper bound on the norm of every member."""
        if self.tight or self.centre is None or self.deviation is None:
            return self.limit
        return torch.minimum(self.limit, inflate(self.centre_norm + self.deviation, 2))

    @cached_property
    def centre_norm(self) -> Float[Tensor, "*matrices"]:
        """Spectral norm of the centre, rounded up; that of any member and the deviation add up to at least it."""
        assert self.centre is not None
        assert self.deviation is not None
        if self.tight:
            return inflate(self.limit + self.deviation, 2)
        return spectral_norm_upper(self.centre)

    @cached_property
    def centre_size(self) -> Float[Tensor, "*matrices"]:
        """Frobenius norm of the centre, rounded up."""
        assert self.centre is not None
        return inflate(self.centre.square().sum((-2, -1)).sqrt(), math.prod(self.centre.shape[-2:]) + 8)

    @property
    def is_exact(self) -> bool:
        """Whether there is a centre, and nothing but rounding around it."""
        if self.centre is None or self.deviation is None:
            return False
        return bool((self.deviation <= NEGLIGIBLE * self.centre_size).all())

    def item(self, index: int) -> Enclosure:
        """The sets of one place in the last batch dimension, which stays, with size 1."""

        def chosen(values: Tensor, dim: int) -> Tensor:
            return values if values.shape[dim] == 1 else values.narrow(dim, index % values.shape[dim], 1)

        centre = None if self.centre is None or self.centre.dim() < 3 else chosen(self.centre, -3)
        centre = self.centre if centre is None else centre
        deviation = None if self.deviation is None else chosen(self.deviation, -1)
        return Enclosure(limit=chosen(self.limit, -1), centre=centre, deviation=deviation, tight=self.tight)


def only_norm(norm: Float[Tensor, "*batch"]) -> Enclosure:
    """All matrices up to a norm.

    Args:
        norm: upper bound.
    """
    return Enclosure(limit=norm)


def diagonal(entries: Float[Tensor, " size"], like: Float[Tensor, "*batch"]) -> Enclosure:
    """One diagonal matrix, exactly.

    Args:
        entries: of the diagonal, in float64.
        like: a tensor of the shape of the batch.
    """
    limit = torch.ones_like(like) * entries.abs().amax()
    return Enclosure(limit=limit, centre=entries.diag(), deviation=torch.zeros_like(like), tight=True)


def matrix(centre: Float[Tensor, "*matrices rows cols"], like: Float[Tensor, "*batch"]) -> Enclosure:
    """One matrix, exactly.

    Args:
        centre: the matrix, in float64; leading dimensions broadcast against the batch.
        like: a tensor of the shape of the batch.
    """
    return Enclosure(limit=torch.full_like(like, torch.inf), centre=centre, deviation=torch.zeros_like(like))


def then(first: Enclosure, second: Enclosure) -> Enclosure:
    """All products J_second J_first.

    Args:
        first: acts first: the right factor.
        second: the left factor.
    """
    a, b = first, second
    if a.centre is None or b.centre is None or a.deviation is None or b.deviation is None:
        return only_norm(inflate(product(b.norm, a.norm), 2))
    centre = b.centre @ a.centre
    rounding = 2 * gamma(b.centre.shape[-1] + 4) * b.centre_size * a.centre_size
    if a.is_exact and b.is_exact:
        deviation = b.centre_size * a.deviation + b.deviation * (a.centre_size + a.deviation)
        limit = torch.full_like(deviation, torch.inf)
    else:
        one = product(b.centre_norm, a.deviation) + product(b.deviation, a.norm)
        other = product(b.norm, a.deviation) + product(b.deviation, a.centre_norm)
        deviation, limit = torch.minimum(one, other), inflate(product(b.norm, a.norm), 2)
    return Enclosure(limit=limit, centre=centre, deviation=inflate(deviation + rounding, 8))


def plus(one: Enclosure, other: Enclosure) -> Enclosure:
    """All sums of two members.

    Args:
        one: of the same shape as the other.
        other: the other.
    """
    if one.centre is None or other.centre is None or one.deviation is None or other.deviation is None:
        return only_norm(inflate(one.norm + other.norm, 2))
    rounding = 2 * UNIT_ROUNDOFF * (one.centre_size + other.centre_size)
    deviation = inflate(one.deviation + other.deviation + rounding, 8)
    both_exact = one.is_exact and other.is_exact
    limit = torch.full_like(deviation, torch.inf) if both_exact else inflate(one.norm + other.norm, 2)
    return Enclosure(limit=limit, centre=one.centre + other.centre, deviation=deviation)
