"""Two bounds of attention: one that holds, and one with a mistake that the verifier finds.

Both bound the Jacobian of one head by its three parts with Frobenius norms in place of spectral norms:
||W_V W_O||_F sqrt(n) for the mixing of values, and s ||V W_O||_F / 2 (||K W_Q^T||_F + ||Q W_K^T||_F) for the change of
the attention map, since the softmax Jacobian has norm at most 1/2 and each Frobenius norm is at least the spectral one.
Heads add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds import Attention, BoundSpec, Claim, Source


def frobenius(block: Attention) -> Tensor:
    """Frobenius norms throughout: cheap, loose, and right."""
    return _sum_of_parts(block, softmax_norm=0.5)


def too_small(block: Attention) -> Tensor:
    """The same with 1/4 for the softmax norm, a value found in print: the norm of one entry, not of the matrix."""
    return _sum_of_parts(block, softmax_norm=0.25)


def _sum_of_parts(block: Attention, softmax_norm: float) -> Tensor:
    wide = block.double
    mixing = _frobenius(wide.w_v @ wide.w_o) * wide.tokens**0.5
    values = _frobenius(wide.values @ wide.w_o)
    change = _frobenius(wide.keys @ wide.w_q.mT) + _frobenius(wide.queries @ wide.w_k.mT)
    heads = mixing + softmax_norm * abs(wide.scale_value) * values * change
    rounded_up = heads.sum(-1) * (1 + 1e-9) + torch.finfo(torch.float64).tiny
    return rounded_up.expand(block.batch_shape)


def _frobenius(matrices: Tensor) -> Tensor:
    # Of entries of order 1: squares of tiny numbers would be 0.
    unit = matrices.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.linalg.matrix_norm(matrices / unit) * unit[..., 0, 0]


# What the promise covers is declared; a block with anything else is refused with a clear error.
FROBENIUS = BoundSpec(
    name="my_bounds.frobenius",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="my_bounds", statement="three terms in Frobenius norms"),
    supports=frozenset({"heads", "biases", "mask"}),
    cost="O(H n D d)",
    compute=frobenius,
)
TOO_SMALL = BoundSpec(
    name="my_bounds.too_small",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="my_bounds", statement="with 1/4 for the softmax norm"),
    supports=frozenset({"heads", "biases", "mask"}),
    cost="O(H n D d)",
    compute=too_small,
)
