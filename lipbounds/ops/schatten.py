r"""Schatten norms of matrices, rounded up: upper bounds of the spectral norm by matrix products alone.

||B||_S(2k) = (sum_a sigma_a^(2k))^(1/2k) >= ||B||, and for a power of two k it is the Frobenius norm of (B B^T)^(k/2)
to the power 1/k: k = 1 is the Frobenius norm of B, each squaring doubles k. It is above ||B|| by the factor r^(1/2k) at
most, r the rank, and it is smooth where B is not zero.

Rounding: B is divided by a power of two of its Frobenius norm, so that ||B||_F < 2. A computed square of a matrix M
is off by gamma(cols) ||M||_F^2, and an error e of M by 2 e ||M||_F + e^2 more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.spectral import root
from lipbounds.rounding import gamma, inflate


def schatten_norm_upper(matrix: Float[Tensor, "*batch rows cols"], doublings: int) -> Float[Tensor, "*batch"]:
    """||matrix||_S(p), rounded up, with p = 2 * 2^doublings; at least the spectral norm.

    Args:
        matrix: finite float64 entries.
        doublings: number of matrix products, 0 for the Frobenius norm.
    """
    rows, cols = matrix.shape[-2:]
    size = matrix.detach().abs().amax((-2, -1), keepdim=True) * (rows * cols) ** 0.5
    scale = torch.where(size > 0, torch.exp2(torch.log2(torch.where(size > 0, size, 1.0)).floor()), 1.0)
    power = matrix / scale
    error = torch.zeros_like(scale[..., 0, 0])
    for _ in range(doublings):
        with torch.no_grad():
            length = power.norm(dim=(-2, -1))
            error = 2 * error * length + error.square() + 2 * gamma(power.shape[-1] + 4) * length.square()
        power = power @ power.mT
    norm = _positive_norm(power) + error
    for _ in range(doublings):
        norm = root(norm)
    return inflate(norm, rows * cols + 2 * doublings + 8) * scale[..., 0, 0]


def _positive_norm(matrix: Tensor) -> Tensor:
    return matrix.flatten(-2).norm(dim=-1)
