"""Norms of the softmax Jacobians of a map in float32, the largest one exact but for rounding.

g_1 is above the norm of a row, and two vectors give a number below it: with weights w_1 = 1 >= w_2 >= ... of sum s and
t = s - 1, e_1 gives t / s^2, and e_1 - e_2 gives (4 w_2 + (1 + w_2) (t - w_2)) / (2 s^2). Rows whose g_1 is below the
largest of these numbers need no exact norm. Proof: docs/derivatives.md, section 16.
"""

from __future__ import annotations

import torch

from lipbounds.derivatives.first.single_precision import (
    SMALLEST_SINGLE,
    Rounded,
    SingleMaps,
    gamma_single,
)
from lipbounds.ops.softmax_spectrum import spectral_norm_upper_from_weights


ROUNDED = 1 - 2.0**-16  # of the numbers below, so that the row that gives the largest one is among those that are left


def largest_softmax_norm(maps: SingleMaps) -> Rounded:
    """max_i ||J(P_i)|| of each head, at most 1/2 with its rounding.

    Args:
        maps: of the heads.
    """
    tail, second, square = maps.tail, maps.second, maps.sums.square()
    below = torch.maximum(tail / square, (4 * second + (1 + second) * (tail - second)) / (2 * square))
    least = below.double().amax(-1, keepdim=True)
    possible = maps.row_g_1.upper >= least * ROUNDED
    found = torch.zeros_like(maps.error)
    found[possible] = spectral_norm_upper_from_weights(maps.weights[possible])
    lost = 4 * (maps.weights.shape[-1] + 2) * SMALLEST_SINGLE
    upper = ((found + lost) * (4 * maps.error).exp()).clamp(max=0.5)
    return Rounded(found.amax(-1), torch.maximum(upper, least).amax(-1))


def theta_of_long_rows(maps: SingleMaps) -> Rounded:
    """theta(P_i), the norm of the softmax Jacobian from l_inf to l_1, of each row: 1 where p_(1) is below 1/2.

    4 p_(1) (1 - p_(1)) is exact elsewhere (lipbounds.ops.softmax.inf_to_one_norm_upper).

    Args:
        maps: of the heads, of so many keys that subsets are not enumerated.
    """
    peaked = (4 * maps.tail / maps.sums.square()).double()
    found = torch.where(maps.sums <= 2, peaked, 1.0)
    keys = maps.weights.shape[-1]
    slack = (1 + 8 * gamma_single(keys + 8)) * (4 * maps.error).exp()
    return Rounded(found, ((found + 8 * keys * SMALLEST_SINGLE) * slack).clamp(max=1.0))
