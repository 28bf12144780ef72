r"""The mixing part of the differential, split by the mean over outputs and by one direction over inputs.

T1 dX = sum_h P_h dX M_h with M_h = W_V^h W_O^h. Let e = (1, ..., 1) / sqrt(n) and f a unit vector over the keys, here
the one along the mean row of all maps. Outputs are split into their part along e and the rest, inputs along f and the
rest, which makes of T1 a 2 x 2 array of maps; the norm of an array of blocks is at most that of the matrix of norms:

    t11 >= || sum_h (e^T P_h f) M_h ||,                    t12 >= || sum_h e^T P_h (I - f f^T) (x) M_h ||,
    t21 >= || sum_h (I - e e^T) P_h f (x) M_h ||,          t22 >= || sum_h (I - e e^T) P_h (I - f f^T) (x) M_h ||.

Attention maps are much alike in their mean row: t11 is the large one, and it holds one number a head, of which the
middle value a goes to sum_h M_h, whose norm is known: || sum_h a_h M_h || <= a || sum_h M_h || + || sum_h (a_h - a) M_h
||. For matrices A_h in place of the maps, || sum_h A_h (x) M_h || is at most

    ||W_O|| ||[W_V^1 ... W_V^H]|| max_h ||A_h||,   and
    sqrt( || sum_h c_h U_O^h U_O^hT || || sum_h c_h U_V^h U_V^hT || ),   c_h = ||A_h|| ||L_V^hT L_O^h||,

with the factors of lipbounds.targets.head_factors (lipbounds.ops.mixture has the proof). The norm of the last A_h is
replaced by its Schatten norm with p = 8, or by the root of the largest column sum of P_h, whose rows sum to 1; a
column sum is off by the sum of the errors of the rows.

Rounding: each of the four A_h is computed from P_h by sums of at most n + m terms, with an error below 8 gamma(n + m +
32) ||P_h||_F in Frobenius norm, f being off its unit vector by gamma(m + 8) included; P_h itself is off by the lengths
of `map_error`.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import map_error
from lipbounds.ops.mixture import mixture_norm_upper
from lipbounds.ops.schatten import schatten_norm_upper
from lipbounds.ops.spectral import root, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.weight_norms import WeightNorms


DOUBLINGS = 2  # Schatten norms with p = 8


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class SplitMixing:
    """The direction f, and norms of T1 on it and on all that is orthogonal to it.

    Args:
        direction: f.
        along: sqrt(t11^2 + t21^2).
        across: sqrt(t12^2 + t22^2).
        norm: of the 2 x 2 matrix.
    """

    direction: Float[Tensor, "*batch m"]
    along: Float[Tensor, "*batch"]
    across: Float[Tensor, "*batch"]
    norm: Float[Tensor, "*batch"]


def split_mixing(block: Attention, norms: WeightNorms) -> SplitMixing:
    """T1 by its parts, each rounded up.

    Args:
        block: in float64.
        norms: of its weights.
    """
    maps = block.probabilities
    rows, cols = maps.shape[-2:]
    even = rows**-0.5
    means = maps.sum(-2) * even  # e^T P_h
    total = means.sum(-2)
    direction = total / total.norm(dim=-1, keepdim=True)
    along = (means * direction.unsqueeze(-2)).sum(-1)  # e^T P_h f
    images = (maps @ direction[..., None, :, None]).squeeze(-1)  # P_h f
    rest = images - (along * even).unsqueeze(-1)  # (I - e e^T) P_h f
    across = means - along.unsqueeze(-1) * direction.unsqueeze(-2)
    inner = maps - (means * even).unsqueeze(-2) - rest.unsqueeze(-1) * direction[..., None, None, :]
    inner = inner if rows <= cols else inner.mT
    with torch.no_grad():
        moved = map_error(block)
        off = 8 * gamma(rows + cols + 32) * maps.flatten(-2).norm(dim=-1)
        off = inflate(off + vector_norm(moved), rows * cols + 16)
        moved = moved.sum(-1)
    columns = inflate(root(means.amax(-1) / even + moved), rows + 16)
    largest = torch.minimum(schatten_norm_upper(inner, DOUBLINGS) + off, columns)
    sizes = across.norm(dim=-1) + off, rest.norm(dim=-1) + off, largest
    return put_together(direction, along, off, sizes, norms)


def put_together(
    direction: Float[Tensor, "*batch m"],
    along: Float[Tensor, "*batch heads"],
    off: Float[Tensor, "*batch heads"],
    sizes: tuple[Tensor, Tensor, Tensor],
    norms: WeightNorms,
) -> SplitMixing:
    """The four parts from the numbers of each head.

    Args:
        direction: f.
        along: e^T P_h f as computed.
        off: how far it can be off.
        sizes: norms of e^T P_h (I - f f^T), of (I - e e^T) P_h f and of (I - e e^T) P_h (I - f f^T), rounded up.
        norms: of the weights.
    """
    middle = (along.amax(-1) + along.amin(-1)) / 2
    apart = (along - middle.unsqueeze(-1)).abs() + off
    spread, t12, t21, t22 = _mixed(torch.stack([apart, *sizes], -2), norms).unbind(-1)
    t11 = inflate(middle * norms.through_jointly + spread, 8)
    first, second = _length(t11, t21), _length(t12, t22)
    return SplitMixing(direction=direction, along=first, across=second, norm=_norm_of_two(t11, t12, t21, t22))


def _mixed(sizes: Float[Tensor, "*batch rows heads"], norms: WeightNorms) -> Float[Tensor, "*out rows"]:
    """|| sum_h A_h (x) M_h || for each row of norms of the A_h."""
    outputs, values = norms.factors("w_o"), norms.factors("w_v")
    weights = inflate(sizes * norms.inner.unsqueeze(-2), sizes.shape[-1] + 8)
    by_head = root(mixture_norm_upper(weights, outputs.overlap, outputs.jointly))
    by_head = by_head * root(mixture_norm_upper(weights, values.overlap, values.jointly))
    jointly = (norms.output * norms.values_jointly).unsqueeze(-1) * sizes.amax(-1)
    return inflate(torch.minimum(by_head, jointly), sizes.shape[-1] + 16)


def _length(first: Tensor, second: Tensor) -> Tensor:
    return inflate(vector_norm(torch.stack([first, second], -1)), 8)


def _norm_of_two(t11: Tensor, t12: Tensor, t21: Tensor, t22: Tensor) -> Float[Tensor, "*batch"]:
    """Norm of a 2 x 2 matrix of non-negative numbers, rounded up."""
    largest = torch.stack([t11, t12, t21, t22]).amax(0).detach()
    unit = torch.where(largest > 0, largest, 1.0)
    a, b, c, d = (entry / unit for entry in (t11, t12, t21, t22))
    first, second, product = a.square() + c.square(), b.square() + d.square(), a * b + c * d
    gap = root((first - second).square() + 4 * product.square())
    return inflate(root((first + second + gap) / 2) * unit, 32)
