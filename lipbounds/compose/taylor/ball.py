r"""Balls of other norms: |h|_p <= r for p = 2, infinity or 1, each inside a Euclidean ball.

With N numbers in the input, |h|_inf <= r gives |h|_2 <= N^1/2 r, and |h|_1 <= r gives |h|_2 <= r. So whatever holds on
the Euclidean ball of that radius holds here. What is linear in h is bounded by the dual norm as well:
|a . h| <= r |a|_q with 1/p + 1/q = 1, which for entries that few pixels move is much less. A row known up to the l2
distance e is known in the dual norm up to N^1/2 e (q = 1) or e (q = infinity).
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import Coefficient, norm_upper
from lipbounds.rounding import inflate


Norm = Literal["l2", "l_inf", "l1"]
NORMS: tuple[Norm, ...] = ("l2", "l_inf", "l1")


@dc.dataclass(frozen=True)
class Ball:
    """The shape of the balls.

    Args:
        norm: of h.
        inputs: N.
    """

    norm: Norm
    inputs: int

    def euclidean(self, radii: Float[Tensor, " radii"]) -> Float[Tensor, " radii"]:
        """Radii of Euclidean balls around the balls, rounded up.

        Args:
            radii: in the norm of the balls.
        """
        return inflate(radii * math.sqrt(self.inputs), 4) if self.norm == "l_inf" else radii

    def dual(self, rows: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*lead"]:
        """Dual norm of the floats of rows, rounded up.

        Args:
            rows: linear functions of h.
        """
        if self.norm == "l2":
            return norm_upper(rows)
        sizes = rows.abs()
        return inflate(sizes.sum(-1), rows.shape[-1]) if self.norm == "l_inf" else sizes.amax(-1)

    def steepest(self, rows: Float[Tensor, "*lead inputs"]) -> Float[Tensor, "*lead inputs"]:
        """The point of the unit ball where each row is largest, nearly.

        Args:
            rows: linear functions of h.
        """
        if self.norm == "l_inf":
            return rows.sign()
        if self.norm == "l2":
            return rows / norm_upper(rows).unsqueeze(-1)
        largest = rows.abs().argmax(-1, keepdim=True)
        return torch.zeros_like(rows).scatter(-1, largest, rows.gather(-1, largest).sign())

    def dual_error(self, error: Float[Tensor, "*lead"]) -> Float[Tensor, "*lead"]:
        """What an error of rows in l2 is in the dual norm, at most.

        Args:
            error: of each row.
        """
        return inflate(error * math.sqrt(self.inputs), 4) if self.norm == "l_inf" else error

    def of(self, part: Coefficient) -> Float[Tensor, "*shape"]:
        """Dual norms of the exact rows of a coefficient, rounded up.

        Args:
            part: with a column for every number of the input.
        """
        return inflate(self.dual(part.matrix.movedim(0, -1)) + self.dual_error(part.error), 2)
