r"""Bounds on q^T K h over |h| <= r and what is known of the remainder q of an operation.

|q^T K h| <= r min( |q| ||K|| , sum_k box_k |K_k| , sum over groups |q_g| ||K_g|| ), K_k the rows of K; on balls of
another norm also r sum_k box_k |K_k|_dual.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import norm_upper
from lipbounds.compose.taylor.model import Ranges
from lipbounds.compose.taylor.norms import spectral_upper
from lipbounds.rounding import UNIT_ROUNDOFF, inflate


class Summed:
    """A sum of matrices with a bound on its error in the Frobenius norm.

    Args:
        zero: of their shape.
    """

    def __init__(self, zero: Float[Tensor, "rows left right"]) -> None:
        self.matrix, self.error = zero, zero.new_zeros(len(zero))

    def add(self, matrix: Float[Tensor, "rows left right"], error: Float[Tensor, " rows"]) -> None:
        """One more term.

        Args:
            matrix: as computed.
            error: of it.
        """
        self.matrix = self.matrix + matrix
        self.error = inflate(self.error + error + 2 * UNIT_ROUNDOFF * norm_upper(self.matrix.flatten(1)), 8)


class Crossed:
    """q^T K h for several functionals.

    Args:
        name: of the operation whose remainder is q.
        matrix: K, as computed.
        error: of it, in the Frobenius norm.
    """

    def __init__(self, name: str, matrix: Float[Tensor, "rows left right"], error: Float[Tensor, " rows"]) -> None:
        self.name, self._error = name, error
        self._norm = inflate(spectral_upper(matrix) + error, 4)
        self._rows = norm_upper(matrix)
        self._matrix = matrix
        self._groups: Tensor | None = None

    def upper(self, ranges: Ranges) -> Float[Tensor, "radii rows"]:
        """Bounds over the balls.

        Args:
            ranges: with the range of the operation.
        """
        known = ranges.known[self.name]
        best = ranges.per_radius(known.ball, self._norm)
        if known.box is not None:
            boxed = known.box @ self._rows.mT + norm_upper(known.box).unsqueeze(1) * self._error
            best = torch.minimum(best, inflate(boxed, known.box.shape[1] + 8).nan_to_num(nan=torch.inf))
        if known.groups is not None:
            if self._groups is None:
                self._groups = spectral_upper(self._matrix.unflatten(1, (known.groups.shape[1], -1)))
            grouped = known.groups @ self._groups.mT + norm_upper(known.groups).unsqueeze(1) * self._error
            best = torch.minimum(best, inflate(grouped, known.groups.shape[1] + 8).nan_to_num(nan=torch.inf))
        euclidean = inflate(ranges.radii.unsqueeze(1) * best, 4)
        if ranges.ball is None or known.box is None:
            return euclidean
        rows = ranges.ball.dual(self._matrix)
        boxed = known.box @ rows.mT + norm_upper(known.box).unsqueeze(1) * ranges.ball.dual_error(self._error)
        boxed = inflate(ranges.own.unsqueeze(1) * boxed, known.box.shape[1] + 12).nan_to_num(nan=torch.inf)
        return torch.minimum(euclidean, boxed)
