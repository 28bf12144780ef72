r"""Fewer numbers than the input has: networks that begin with a linear map onto fewer.

If a value behind leading linear layers is c + C h with fewer entries than h has numbers, only C h matters, and the ball
|h| <= r becomes an ellipsoid in fewer dimensions. With any invertible T,

    c + C h = c + T w,   w = T^-1 C h,   |w| <= ||T^-1 C|| r,

and T with T T^T = C C^T makes T^-1 C a matrix of orthonormal rows: the ellipsoid is the image of the ball |w| <= r,
exactly, so nothing is lost, and the Taylor model has as many columns as the value has entries. Forms of second order
then fit where they would not (lipbounds.compose.taylor.second).

T is a computed Cholesky factor, and its floats count as exact: `stretch`, the bound on ||T^-1 C||, covers what it is
off by. With X and Y the computed T^-1 C and T^-1, and every row of C known up to e,

    ||T^-1 C|| <= ||X|| + ||T^-1|| ( ||C - T X||_F + |e| ),   ||T^-1|| <= ||Y|| / (1 - ||I - T Y||_F).
"""

from __future__ import annotations

import dataclasses as dc

import torch

from lipbounds.compose.rewrite import flat
from lipbounds.compose.taylor.coefficient import exact, norm_upper
from lipbounds.compose.taylor.model import CENTRE, INPUT, Order, Value, starting_value, with_second
from lipbounds.compose.taylor.network import Named, Walk
from lipbounds.compose.taylor.second import SECOND
from lipbounds.ops.eigen import try_cholesky
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.layers import Flatten, Layer, Linear, Patches, Pool, Positions


LARGEST_STRETCH = 1 + 1e-6  # beyond it, C has nearly dependent rows, and the input is followed as it is


@dc.dataclass(frozen=True, eq=False)
class Start:
    """Where a Taylor model of a network begins.

    Args:
        value: behind the first layers, as a function of w.
        stretch: |w| <= stretch |h|; 1 where w is h.
        layers: that follow.
    """

    value: Value
    stretch: float
    layers: Named


def narrow_start(network: Layer, x: torch.Tensor, order: Order = 2) -> Start:
    """Behind the leading linear layer that leaves the fewest numbers, if these are fewer than those of the input.

    Args:
        network: in float64.
        x: one input, without batch dimensions.
        order: to which values are followed.
    """
    layers = flat([("", network)])
    count, fewest = 0, x.numel()
    y = x
    for index, (_, layer) in enumerate(layers):
        if not isinstance(layer, Linear | Patches | Positions | Flatten | Pool):
            break
        y = layer(y)
        if y.numel() < fewest:
            count, fewest = index + 1, y.numel()
    whole = whole_start(network, x, order)
    if count == 0:
        return whole
    found = narrowed(Walk().through(layers[:count], whole.value, None), order)
    return whole if found is None else Start(*found, layers[count:])


def whole_start(network: Layer, x: torch.Tensor, order: Order = 2) -> Start:
    """At the input itself.

    Args:
        network: in float64.
        x: one input, without batch dimensions.
        order: to which values are followed.
    """
    return Start(starting_value(x, order), 1.0, flat([("", network)]))


def narrowed(value: Value, order: Order = 2) -> tuple[Value, float] | None:
    """A value that is linear in h as a function of w, with the bound on |w| / |h|; None where that loses too much.

    Args:
        value: without remainders, with fewer entries than columns.
        order: to which values are followed.
    """
    linear = value.linear
    matrix = linear.matrix.flatten(1).mT
    factor, ended = try_cholesky(matrix @ matrix.mT)
    if value.coefficients.keys() - {CENTRE, INPUT, SECOND} or not bool(ended):
        return None
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    rows = torch.linalg.solve_triangular(factor, matrix, upper=False)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    terms, size = len(factor) + 2, norm_upper(factor.flatten())
    off = norm_upper((identity - factor @ inverse).flatten())
    off = inflate(off + gamma(terms) * (size * norm_upper(inverse.flatten()) + norm_upper(identity.flatten())), 8)
    residual = norm_upper((matrix - factor @ rows).flatten())
    residual = residual + gamma(terms) * (size * norm_upper(rows.flatten()) + norm_upper(matrix.flatten()))
    residual = residual + norm_upper(linear.error.flatten())
    inverse_norm = inflate(spectral_norm_upper(inverse) / (1 - off), 4)
    stretch = float(inflate(spectral_norm_upper(rows) + inverse_norm * inflate(residual, 8), 8))
    if not (float(off) < 0.5 and stretch <= LARGEST_STRETCH):
        return None
    columns = exact(factor.mT.reshape(len(factor), *value.centre.shape).contiguous())
    return with_second({CENTRE: value.coefficients[CENTRE], INPUT: columns}, order), stretch
