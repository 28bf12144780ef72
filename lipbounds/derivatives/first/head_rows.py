r"""Queries, keys and values seen through the weights that they meet, and their covariances from Gram matrices of keys.

With the factors of the weights (lipbounds.targets.head_factors) W_O^hT = U_O L_O^T, W_Q^h = U_Q L_Q^T and W_K^h = U_K
L_K^T, and V and K centred by their mean over the keys,

    V' = V L_O,    K' = K L_Q,    Q' = Q L_K.

Of the d x d covariance C_i = V'^T J(p_i) K' of a row only the Frobenius norm is needed, and that needs no covariance:
with the m x m Gram matrices G = V' V'^T and G' = K' K'^T, and `o` the product entry by entry,

    ||C_i||_F^2  =  p^T (G o G') p  -  2 sum_j p_j (G p)_j (G' p)_j  +  (p^T G p) (p^T G' p).

For V' and V' the trace is t = sum_j p_j |v'_j|^2 - p^T G p, and with F = ||C_i||_F, r >= its rank, the largest
eigenvalue of C_i is at most min( F, t, t/r + sqrt( (1 - 1/r) (F^2 - t^2/r) ) ) (Wolkowicz and Styan 1980). The last
falls in t where t >= F, so that a lower bound of t is put in, and is not taken elsewhere. J 1 = 0: r < m.

Rounding, with R, R' the largest norms of computed rows, e, e' their errors, tau the error of a row of P in sum |.|
(lipbounds.derivatives.first.covariance.map_error): the four sums above add up to at most 4 R^2 R'^2 in absolute value
and have at most 2 k + 4 m + 16 roundings each, which goes under the root; the formula is that of || sum_j p_j a_j
b_j^T - (sum_j p_j a_j) (sum_j p_j b_j)^T || whatever the sum of p, so that a row of P that is off adds at most 4 tau R
R', and rows that are off e R' + e' R + e e', as ||A^T J B||_F <= max |a_j| max |b_j|. This slack carries no gradient.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import map_error
from lipbounds.ops.spectral import power_of_two, root, spectral_norm_upper
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.head_factors import HeadFactors


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class HeadRows:
    """V', K' or Q' of each head, divided by a power of two.

    Args:
        rows: as computed, of order 1.
        size: largest norm of a row as computed.
        error: largest error of a row.
        unit: power of two that was divided by.
    """

    rows: Float[Tensor, "*batch heads m width"]
    size: Float[Tensor, "*batch heads"]
    error: Float[Tensor, "*batch heads"]
    unit: Float[Tensor, "*batch heads"]

    @property
    def norm(self) -> Float[Tensor, "*batch heads"]:
        """Spectral norm of all rows of a head, rounded up."""
        return spectral_norm_upper(self.rows) + inflate(self.error * self.rows.shape[-2] ** 0.5, 4)


def through(
    rows: Float[Tensor, "*batch heads m width"], error: Float[Tensor, "*batch heads"], heads: HeadFactors
) -> HeadRows:
    """Rows times the factor of the weights that they meet.

    Args:
        rows: as computed in float64.
        error: bound on the error of each of them.
        heads: the factors.
    """
    scale = power_of_two(rows.detach())
    scaled = rows / scale
    image = scaled @ heads.factor
    with torch.no_grad():
        length = heads.factor.norm(dim=(-2, -1))
        own = 2 * gamma(rows.shape[-1] + 4) * scaled.norm(dim=-1).amax(-1)
        off = inflate((error / scale[..., 0, 0] + own) * length, rows.shape[-1] ** 2 + 16)
        size = inflate(image.norm(dim=-1).amax(-1), image.shape[-1] + 4)
    return HeadRows(rows=image, size=size, error=off, unit=scale[..., 0, 0] * heads.unit)


def largest_eigenvalue_upper(
    frobenius: Float[Tensor, "*batch"], trace: Float[Tensor, "*batch"], off: Float[Tensor, "*batch"], *, rank: int
) -> Float[Tensor, "*batch"]:
    """The largest eigenvalue of positive semidefinite matrices, rounded up; see the top of this file.

    Args:
        frobenius: at least the Frobenius norm of each.
        trace: of each, as computed.
        off: how far it can be off.
        rank: at least that of each.
    """
    lowest = (trace - off).clamp(min=0)
    rest = (frobenius.square() - lowest.square() / rank).clamp(min=0) * (1 - 1 / rank)
    by_trace = inflate(lowest / rank + root(rest) + 16 * gamma(8) * frobenius.detach(), 16)
    bounded = torch.where(lowest > frobenius, torch.minimum(by_trace, frobenius), frobenius)
    return torch.minimum(bounded, trace.clamp(min=0) + off)


def change_under(
    maps: Float[Tensor, "*batch heads n m"], vector: Float[Tensor, "*batch m"], values: HeadRows
) -> Float[Tensor, "*batch heads n"]:
    """|V'^T J_i f| of each row as computed.

    Args:
        maps: the rows P_i.
        vector: f, of length at most 1 but for rounding.
        values: V'.
    """
    weighted = maps * vector[..., None, None, :]
    return ((weighted - maps * weighted.sum(-1, keepdim=True)) @ values.rows).norm(dim=-1)


@torch.no_grad()
def change_error(off: Float[Tensor, "*batch heads n"], values: HeadRows) -> Float[Tensor, "*batch heads n"]:
    """How far `change_under` can be off.

    Args:
        off: error of each row of the maps.
        values: V'.
    """
    relative = 4 * off + 8 * gamma(4 * values.rows.shape[-2] + values.rows.shape[-1] + 32)
    return relative * values.size.unsqueeze(-1) + 4 * values.error.unsqueeze(-1)


class GramMatrices:
    """The maps of a block against the Gram matrices of V' (and K').

    Args:
        block: in float64.
        values: V'.
    """

    def __init__(self, block: Attention, values: HeadRows) -> None:
        self.maps, self.off = block.probabilities, map_error(block)
        self.values = values
        self.gram = values.rows @ values.rows.mT
        self.met, self.squares = self._met(values)

    def cross(self, keys: HeadRows) -> Float[Tensor, "*batch heads n"]:
        """||V'^T J_i K'||_F of each row, rounded up.

        Args:
            keys: K'.
        """
        return self._rounded_up(self._frobenius(keys.rows @ keys.rows.mT, *self._met(keys)), keys)

    def largest_variance(self) -> Float[Tensor, "*batch heads n"]:
        """The largest eigenvalue of V'^T J_i V' of each row, rounded up."""
        values = self.values
        frobenius = self._rounded_up(self._frobenius(self.gram, self.met, self.squares), values)
        keys, width = values.rows.shape[-2:]
        lengths = self.gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        trace = (self.maps @ lengths).squeeze(-1) - self.squares
        with torch.no_grad():
            relative = 4 * self.off + 8 * gamma(width + 2 * keys + 16)
            off = 2 * values.size * values.error + values.error.square()
            off = inflate(relative * values.size.square().unsqueeze(-1) + off.unsqueeze(-1), 8)
        return largest_eigenvalue_upper(frobenius, trace, off, rank=max(1, min(width, keys - 1)))

    def image(self, vector: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch heads n"]:
        """|V'^T J_i f| of each row, rounded up.

        Args:
            vector: f, of length at most 1 but for rounding.
        """
        return change_under(self.maps, vector, self.values) + change_error(self.off, self.values)

    def _met(self, rows: HeadRows) -> tuple[Tensor, Tensor]:
        """(G p_i)^T as rows and p_i^T G p_i, from the means sum_j p_ij r_j: shorter products than those with G."""
        means = self.maps @ rows.rows
        return means @ rows.rows.mT, means.square().sum(-1)

    def _frobenius(self, gram: Tensor, met: Tensor, squares: Tensor) -> Tensor:
        """||V'^T J_i Z||_F^2 as computed, from the Gram matrix of Z."""
        both = ((self.maps @ (self.gram * gram)) * self.maps).sum(-1)
        return both - 2 * (self.met * met * self.maps).sum(-1) + self.squares * squares

    def _rounded_up(self, squares: Tensor, other: HeadRows) -> Tensor:
        """The root, with what rounding can have taken off it."""
        values = self.values
        width = values.rows.shape[-1] + other.rows.shape[-1]
        with torch.no_grad():
            size = values.size * other.size
            slack = 8 * gamma(width + 4 * values.rows.shape[-2] + 32) * size.square().unsqueeze(-1)
            rows = values.error * other.size + other.error * values.size + values.error * other.error
            off = 4 * self.off * size.unsqueeze(-1) + rows.unsqueeze(-1)
        return inflate(root(squares.clamp(min=0) + slack) + off, 8)
