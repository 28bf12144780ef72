r"""What QK-norm adds to the second and third differential on a ball: queries and keys that bend with their tokens.

The logits have second and third derivatives in one token,

    s <D2 phi_i[a_i, y_i], k_j>,  s <q_i, D2 psi_j[a_j, y_j]>,  and the same with D3,

whose variances under a row of the map are at most s^2 |D^k phi|^2 ||Cov(k)|| and sum_j pi_ij s^2 |q_i|^2 |D^k psi|^2.
Symbols and proof: docs/derivatives.md, sections 7 and 8.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.reach import Reach
from lipbounds.derivatives.ball.rows import Rows
from lipbounds.derivatives.ball.suprema import Maps, RowDeviations
from lipbounds.derivatives.rounding.logits import key_error, query_error
from lipbounds.ops.spectral import root, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


class NormBends:
    """Deviations of the derivatives of logits by QK-norm over a ball, for one or several balls at once.

    Args:
        block: in float64, with QK-norm.
        maps: over the ball.
        reaches: of queries and keys.
        radii: of the ball for queries and for keys, 0 where these do not move.
    """

    def __init__(
        self, block: Attention, maps: Maps, reaches: tuple[Reach, Reach], radii: tuple[Tensor, Tensor]
    ) -> None:
        self.scale, self.maps = abs(block.scale_value), maps
        self.queries, self.keys = reaches
        deviation = RowDeviations(block, _rows_of_keys(block, self.keys), maps, radii[1]).plain
        self.key_deviation = inflate(deviation.alone() + root(deviation.total) * deviation.error, 8)
        size = vector_norm(block.queries) + query_error(block)
        size = size + inflate(radii[0].unsqueeze(-1) * self.queries.rate, 8).unsqueeze(-1)
        self.query_size = inflate(torch.minimum(size, self.queries.size.unsqueeze(-1)), block.w_q.shape[-1] + 8)

    def of_queries(self, factors: Float[Tensor, "*#batch heads n"], order: int = 2) -> Float[Tensor, "*#batch n"]:
        """Root of sum_h f_h Var_hi( s <D^k phi_i, k> ) for a unit move of the token.

        Args:
            factors: f >= 0.
            order: k.
        """
        bend = _derivative(self.queries, order).unsqueeze(-1)
        squares = factors * (self.scale * bend * self.key_deviation).square()
        return inflate(root(squares.sum(-2)), factors.shape[-2] + 16)

    def of_keys(self, factors: Float[Tensor, "*#batch heads n"], order: int = 2) -> Float[Tensor, "*#batch n m"]:
        """g_ij with sum_h f_h Var_hi( s <q_i, D^k psi> ) <= sum_j g_ij |a_j|^(2k).

        Args:
            factors: f >= 0.
            order: k.
        """
        size = self.query_size * _derivative(self.keys, order).unsqueeze(-1)
        return self._weighted(factors, size)

    def crossed(self, factors: Float[Tensor, "*#batch heads n"], order: int) -> Float[Tensor, "*#batch n m"]:
        """g_ij of s <D^k phi_i, D psi_j> for k = 2, or of s <D phi_i, D^2 psi_j> for k = 1.

        Args:
            factors: f >= 0.
            order: k.
        """
        size = _derivative(self.queries, order) * _derivative(self.keys, 3 - order)
        return self._weighted(factors, size.unsqueeze(-1))

    def _weighted(self, factors: Tensor, size: Tensor) -> Tensor:
        weights = factors * (self.scale * size).square()
        return inflate((weights.unsqueeze(-1) * self.maps.pairs).sum(-3), factors.shape[-2] + 16)


def _derivative(reach: Reach, order: int) -> Float[Tensor, "*#batch heads"]:
    return (reach.rate, reach.bend, reach.twist)[order - 1]


def _rows_of_keys(block: Attention, reach: Reach) -> Rows:
    """The keys themselves, of which no matrix makes rows in the space of tokens."""
    reduced = block.keys - block.keys.mean(-2, keepdim=True)
    off, largest = key_error(block).amax(-1), block.keys.detach().norm(dim=-1).amax(-1)
    error = 2 * off + 4 * gamma(sum(block.keys.shape[-2:]) + 16) * largest
    one = torch.ones_like(error)
    joint = one.sum(-1).sqrt()
    return Rows(reduced, one, joint, error, reach.rate, reach.rate, 0 * one, reach.together)
