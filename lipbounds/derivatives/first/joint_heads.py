r"""Two parts of the differential with all heads in one, from m x m matrices between the keys of two heads.

    ||T2||  <=  max_i || sum_h s W_O^hT Cov_hi(V, K) W_Q^hT ||_F                                                  (3)

needs no covariance: with A = V_h W_O^h W_O^gT V_g^T and B = K_h W_Q^hT W_Q^g K_g^T, V and K centred, its square is s^2
times the sum over pairs of heads h, g of

    p_h^T (A o B) p_g  -  sum_j p_hj (A p_g)_j (B p_g)_j  -  sum_l p_gl (p_h^T A)_l (p_h^T B)_l
                       +  (p_h^T A p_g) (p_h^T B p_g).

    ||T3||  <=  nu_O s || [diag(a_h) Q_h W_K^hT]_h ||,      nu_O >= ||[U_O^1 ... U_O^H]||,                        (4)

all heads stacked, with a_hi >= ||V'^T J_hi|| and the U_O of lipbounds.derivatives.first.overlap_parts: T3 dX has the
rows sum_h U_O^h z_hi, |z_hi| <= a_hi |dX u_hi|, and sum_hi a_hi^2 |dX u_hi|^2 is the squared Frobenius norm of the
stacked matrix times dX^T.

Rounding: as in lipbounds.derivatives.first.head_rows. The absolute values in (3) add up to at most 4 (sum_h R_h R'_h)^2
with R_h the largest |v_hj| ||W_O^h||_F and R'_h the largest |k_hj| ||W_Q^h||_F, which goes under the root; errors of
maps and rows are added for each head. In (4) the Gram matrix is off by gamma(...) times the square of sum_h ||diag(a_h)
Q_h||_F ||W_K^h||_F, and rows of Q that are off add their share of that.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import CentredRows, centred_keys, map_error
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.ops.eigen import largest_eigenvalue
from lipbounds.ops.spectral import power_of_two, root, vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate, product


def joint_query(parts: OverlapParts) -> Float[Tensor, "*batch"]:
    """||T2|| by (3), rounded up.

    Args:
        parts: of a block whose queries move, without rotary positions and QK-norm.
    """
    block = parts.block
    outputs, queries = parts.norms.products("w_o"), parts.norms.products("w_q")
    values = _Scaled(parts.values, parts.norms.factors("w_o").unit, block.w_o)
    keys = _Scaled(centred_keys(block), parts.norms.factors("w_q").unit, block.w_q)
    maps = block.probabilities
    total = _squared(maps, values.rows, keys.rows, outputs, queries)
    with torch.no_grad():
        size = (values.size * keys.size).sum(-1, keepdim=True)
        operations = sum(block.w_o.shape[-2:]) + sum(block.w_q.shape[-2:]) + 4 * maps.shape[-1] + block.heads**2 + 64
        slack = 8 * gamma(2 * operations) * size.square()
        rows = values.error * keys.size + keys.error * values.size + values.error * keys.error
        off = (4 * map_error(block) * (values.size * keys.size).unsqueeze(-1) + rows.unsqueeze(-1)).sum(-2)
    found = root((total.clamp(min=0) + slack).amax(-1)) + inflate(off.amax(-1), operations)
    return product(inflate(found * abs(block.scale_value), 16), values.unit * keys.unit)


def stacked_key(parts: OverlapParts) -> Float[Tensor, "*batch"]:
    """||T3|| by (4), rounded up.

    Args:
        parts: of a block whose memory moves, without rotary positions and QK-norm.
    """
    block = parts.block
    unit = parts.grams.values.unit
    common = power_of_two(unit.unsqueeze(-1))[..., 0]
    softmax_value_norm = parts.softmax_value_norm * (unit / common).unsqueeze(-1)
    rows = softmax_value_norm.unsqueeze(-1) * block.queries
    scale = power_of_two(rows.detach().flatten(-3, -2))[..., 0, 0]
    rows = rows / scale[..., None, None, None]
    by_key = power_of_two(block.w_k.detach().flatten(-3, -2))
    w_k = block.w_k / by_key.unsqueeze(-3)
    inner = w_k @ (rows.mT @ rows)
    gram = inner.transpose(-3, -2).flatten(-2) @ w_k.transpose(-3, -2).flatten(-2).mT
    with torch.no_grad():
        lengths = w_k.norm(dim=(-2, -1))
        size = (rows.norm(dim=(-2, -1)) * lengths).sum(-1)
        operations = block.tokens + sum(w_k.shape[-2:]) + block.heads * w_k.shape[-1] + 32
        width = gram.shape[-1]
        slack = (2 * gamma(operations + 8) + 16 * width * UNIT_ROUNDOFF) * size.square()
        length = vector_norm(query_error(block) * softmax_value_norm) / scale.unsqueeze(-1)
        off = inflate((length * lengths).sum(-1), operations)
    largest = largest_eigenvalue((gram + gram.mT) / 2)
    found = product(inflate(root(largest + slack) + off, operations), scale * by_key[..., 0, 0] * common[..., 0])
    return inflate(product(found, abs(block.scale_value) * parts.norms.factors("w_o").jointly), 16)


class _Scaled:
    """Centred rows of all heads over one power of two, and sizes of what they become with their weights."""

    def __init__(self, centred: CentredRows, weights_unit: Tensor, weights: Tensor) -> None:
        rows = centred.rows * weights_unit[..., None, None]
        self.unit = power_of_two(rows.detach().flatten(-3, -2))[..., 0, 0]
        factor = weights_unit / self.unit.unsqueeze(-1)
        length = weights.detach().norm(dim=(-2, -1)) / weights_unit
        self.rows = centred.rows * factor[..., None, None]
        self.size = inflate(centred.size.detach() * factor * length, 8)
        self.error = inflate(centred.error * factor * length, 8)


def _squared(maps: Tensor, values: Tensor, keys: Tensor, outputs: Tensor, queries: Tensor) -> Float[Tensor, "*batch n"]:
    """The sum over pairs of heads in (3), one head h at a time with the heads g >= h: (h, g) and (g, h) are equal."""
    mean_values, mean_keys = maps @ values, maps @ keys
    total = torch.zeros_like(maps[..., 0, :, 0])
    for h in range(maps.shape[-3]):
        one, rest = slice(h, h + 1), slice(h, None)
        p, others = maps[..., one, :, :], maps[..., rest, :, :]
        first = _between(values, mean_values, outputs[..., h, rest, :, :], h)
        second = _between(keys, mean_keys, queries[..., h, rest, :, :], h)
        both = ((p @ (first[0] * second[0]) - first[1] * second[1]) * others).sum(-1)
        both = both - (first[2] * second[2] * p).sum(-1) + first[3] * second[3]
        total = total + (both[..., 0, :] + 2 * both[..., 1:, :].sum(-2))
    return total


def _between(rows: Tensor, means: Tensor, products: Tensor, h: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A_hg, p_h^T A_hg, A_hg p_g and p_h^T A_hg p_g for the heads g >= h."""
    one, rest = slice(h, h + 1), slice(h, None)
    own, others = rows[..., one, :, :], rows[..., rest, :, :]
    mean, means = means[..., one, :, :], means[..., rest, :, :]
    turned = mean @ products
    matrix = (own @ products) @ others.mT
    return matrix, turned @ others.mT, (means @ products.mT) @ own.mT, (turned * means).sum(-1)
