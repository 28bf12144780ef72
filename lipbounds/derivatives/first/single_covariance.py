"""Variances of the tokens under each row of a map in float32, and what is made of them.

tr C_i = sum_j P_ij |y_j|^2 - |sum_j P_ij y_j|^2 for y_j = x_j less any row. It is 1/2 sum_jl P_ij P_il |x_j - x_l|^2,
in which factors of the map are relative errors; those of the sums are relative to the first term. Proof:
docs/derivatives.md, section 16.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.single_precision import (
    OWN_ROUNDING,
    SMALLEST_SINGLE,
    Rounded,
    SingleMaps,
    gamma_single,
)
from lipbounds.ops.spectral import power_of_two


def row_variance(maps: SingleMaps, tokens: Float[Tensor, "*batch m dim"]) -> Rounded:
    """tr C_i of each row of each head.

    Args:
        maps: of the heads.
        tokens: that the keys are made of, as float32 holds them.
    """
    single = tokens.float()
    shifted = single - single.mean(-2, keepdim=True)
    unit = power_of_two(shifted.abs().amax((-2, -1), keepdim=True).double())
    rows = (shifted / unit.float()).unsqueeze(-3)
    table, (keys, dim) = maps.weights / maps.sums.unsqueeze(-1), rows.shape[-2:]
    squares = (table @ rows.square().sum(-1, keepdim=True)).squeeze(-1)
    means = (table @ (rows @ rows.mT) * table).sum(-1) if keys <= dim else (table @ rows).square().sum(-1)
    found = (squares - means).clamp(min=0).double()
    off = 4 * gamma_single(keys + dim + 8) * squares.double() + 16 * (keys + 2) * (dim + 2) * SMALLEST_SINGLE
    upper = (found + off) * ((1 + 4 * gamma_single(keys + 8)) * OWN_ROUNDING) * (4 * maps.error).exp()
    return Rounded(found, upper) * unit.square()


def column_norm(maps: SingleMaps, rows: Rounded) -> Rounded:
    """sqrt(max_j sum_i P_ij r_i) of each head.

    Args:
        maps: of the heads.
        rows: r_i >= 0 of each row of each head.
    """
    count, keys = maps.weights.shape[-2:]
    both = torch.stack([rows.found, rows.upper * (2 * maps.error).exp()], -2)
    unit = power_of_two(both)
    table = (both / unit).float() / maps.sums.unsqueeze(-2)
    found, upper = (table @ maps.weights).amax(-1).double().unbind(-1)
    upper = upper * (1 + 2 * gamma_single(count + keys + 8)) + 8 * count * SMALLEST_SINGLE
    unit = unit[..., 0, 0]
    return Rounded((found * unit).sqrt(), (upper * unit).sqrt() * OWN_ROUNDING)
