r"""The weights of each head as a basis of the D features times a small square factor, and how far the heads overlap.

With C_h the D x d weights of a head (W_Q^h, W_K^h, W_V^h, or W_O^hT) divided by a power of two, and any invertible L_h,

    C_h = U_h L_h^T,    U_h = C_h L_h^(-T),    Omega_hg >= ||U_h^T U_g||,    nu >= ||[U_1 ... U_H]||.

For the layout `whitened` L_h is the Cholesky factor of C_h^T C_h + mu^2 I, mu^2 a small part of the trace: the singular
values of U_h are near 1 but for directions in which C_h all but vanishes. For rotary positions L_h is diagonal and the
same for both features of a pair that is turned (`pairs`), so that it commutes with every rotation. `plain` has L_h = I.
Where C_h is 0, so are U_h and L_h.

Rounding: L_h is given floats, the identity C_h = U_h L_h^T is exact, and only the overlaps are of computed matrices. A
triangular system solved for a row u is one with L + E, |E| <= gamma(d) |L| (Higham 2002, Theorem 8.5), so U_h is off by
gamma(d) ||U_h||_F ||L_h||_F ||L_h^(-1)||, and ||L_h^(-1)|| <= sqrt(2) / mu as mu^2 is above four times the error of the
matrix that is factorised (ibid., Theorem 10.3).
"""

from __future__ import annotations

import dataclasses as dc
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.eigen import try_cholesky
from lipbounds.ops.spectral import power_of_two, spectral_norm_upper
from lipbounds.rounding import gamma, inflate


Layout = Literal["whitened", "pairs", "plain", "together"]
SMALLEST_PART = 2.0**-36  # mu^2 over the trace of C^T C


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class HeadFactors:
    """L_h, and the overlaps of the U_h; weights are `unit` times U_h L_h^T.

    Args:
        factor: L_h.
        unit: power of two of each head.
        overlap: Omega, symmetric; None where only nu is known.
        jointly: nu.
    """

    factor: Float[Tensor, "*weights heads head_dim head_dim"]
    unit: Float[Tensor, "*weights heads"]
    overlap: Float[Tensor, "*weights heads heads"] | None
    jointly: Float[Tensor, "*weights"]


def head_factors(weights: Float[Tensor, "*weights heads dim head_dim"], layout: Layout, pairs: int = 0) -> HeadFactors:
    """The factors of one of the layouts that the top of this file describes.

    Args:
        weights: C_h, float64.
        layout: `together` is `plain` for heads that are normalised together: only nu is known.
        pairs: how many pairs of features are turned, for `pairs`.
    """
    if layout == "whitened":
        return _whitened(weights)
    return _by_pairs(weights, pairs) if layout == "pairs" else _plain(weights, layout == "together")


def _whitened(weights: Float[Tensor, "*weights heads dim head_dim"]) -> HeadFactors:
    """With the columns of U_h orthonormal where the weights have full rank."""
    unit = power_of_two(weights.detach())
    columns = weights / unit
    dim, width = columns.shape[-2:]
    gram = columns.mT @ columns
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    floor = max(SMALLEST_PART, 16 * gamma(dim + width + 8)) * torch.where(trace > 0, trace, 1.0)
    identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
    factor, _ = try_cholesky(gram + floor * identity)
    basis = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    size = factor.detach().norm(dim=(-2, -1)) * basis.detach().norm(dim=(-2, -1))
    off = 2 * gamma(width + 8) * size * (2 / floor.detach()[..., 0, 0]).sqrt()
    return _with_overlaps(basis, factor, unit, off)


def _by_pairs(weights: Float[Tensor, "*weights heads dim head_dim"], pairs: int) -> HeadFactors:
    """With L_h diagonal, of the size of each pair of features that is turned; the same for all that are left alone."""
    unit = power_of_two(weights.detach())
    columns = weights / unit
    squares = columns.square().sum(-2)
    first, second, rest = squares.split([pairs, pairs, squares.shape[-1] - 2 * pairs], -1)
    turned = (first + second) / 2
    if rest.shape[-1]:
        rest = rest.mean(-1, keepdim=True).expand_as(rest)
    trace = squares.sum(-1, keepdim=True)
    floor = SMALLEST_PART * torch.where(trace > 0, trace, 1.0)
    sizes = (torch.cat([turned, turned, rest], -1) + floor).sqrt()
    basis = columns / sizes.unsqueeze(-2)
    return _with_overlaps(basis, torch.diag_embed(sizes), unit, 2 * gamma(4) * basis.detach().norm(dim=(-2, -1)))


def _plain(weights: Float[Tensor, "*weights heads dim head_dim"], together: bool) -> HeadFactors:
    """With L_h = I."""
    unit = power_of_two(weights.detach())
    if together:
        unit = unit.amax(-3, keepdim=True).expand_as(unit)
    columns = weights / unit
    factor = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device).expand(
        *weights.shape[:-2], -1, -1
    )
    found = _with_overlaps(columns, factor, unit, torch.zeros_like(unit[..., 0, 0]))
    return dc.replace(found, overlap=None) if together else found


def _with_overlaps(basis: Tensor, factor: Tensor, unit: Tensor, off: Float[Tensor, "*weights heads"]) -> HeadFactors:
    """Overlaps of matrices known up to `off` in Frobenius norm."""
    heads, dim = basis.shape[-3:-1]
    first, second = torch.triu_indices(heads, heads, device=basis.device)
    products = basis.mT[..., first, :, :] @ basis[..., second, :, :]
    size = basis.detach().norm(dim=(-2, -1))
    length = size[..., first] * size[..., second]
    moved = (
        off[..., first] * size[..., second] + off[..., second] * size[..., first] + off[..., first] * off[..., second]
    )
    found = inflate(spectral_norm_upper(products) + 2 * gamma(dim + 4) * length + moved, 8)
    place = torch.zeros(heads, heads, dtype=torch.long, device=basis.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=basis.device)
    overlap = found[..., place]
    # Where the weights of a head are 0, so is L_h: one of the size of mu would count in how much each head weighs.
    factor = torch.where((size > 0)[..., None, None], factor, 0.0)
    flat = basis.transpose(-3, -2).flatten(-2)
    jointly = inflate(spectral_norm_upper(flat) + off.square().sum(-1).sqrt(), heads + 8)
    return HeadFactors(factor=factor, unit=unit[..., 0, 0], overlap=overlap, jointly=jointly)
