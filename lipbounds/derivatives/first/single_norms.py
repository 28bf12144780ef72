r"""Norms of rows that float32 gave, from Gram matrices of d x d numbers and their squares, their rounding proved.

For rows Z of a head, ||Z W^T||^2 is the largest eigenvalue of L^T (Z^T Z) L with L L^T = W^T W from float64. Rows less
their mean are those times a projection, so that they are no further off. Proof: docs/derivatives.md, sections 14, 16.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.single_precision import (
    OWN_ROUNDING,
    SMALLEST_SINGLE,
    UNIT_SINGLE,
    Rounded,
    SingleRows,
    gamma_single,
    lengths,
)
from lipbounds.ops.eigen import eigenvalue_by_squaring
from lipbounds.ops.spectral import Factor
from lipbounds.rounding import gamma
from lipbounds.targets.attention import Attention


SQUARINGS = 8  # of Gram matrices: of 64 x 64, the norm is above by 0.4 % at most


@dc.dataclass(frozen=True, slots=True)
class Gram:
    """A symmetric matrix of the squares of a norm, how far it can be off, and what is to be added to the norm."""

    matrix: Float[Tensor, "*batch heads width width"]
    off: Float[Tensor, "*batch heads"]
    added: Float[Tensor, "*batch heads"]


def gram_of(values: SingleRows) -> Gram:
    """Of the exact rows."""
    matrix, off, _ = _squares(values)
    return Gram(matrix, off, values.error.norm(dim=-1))


def gram_through(rows: SingleRows, factor: Factor, size: Float[Tensor, "*weights heads"]) -> Gram:
    """Of the exact rows times W^T, W of norm `size`, W^T = L Q^T with a small factor L."""
    matrix, off, total = _squares(rows)
    low = factor.narrow * factor.scale
    frobenius = (factor.size * factor.scale[..., 0, 0]) * OWN_ROUNDING
    inner = low.mT @ matrix.double() @ low
    norm = size * OWN_ROUNDING
    off = off * norm.square() + 8 * gamma(low.shape[-2] + 2) * frobenius.square() * total
    turned = 16 * gamma(8 * math.prod(factor.matrix.shape[-2:])) * frobenius * total.sqrt()
    return Gram(inner, off, rows.error.norm(dim=-1) * norm + turned)


def _squares(rows: SingleRows) -> tuple[Tensor, Tensor, Tensor]:
    """Z^T Z of the rows as computed, how far it can be off in norm, and the trace of the exact one, rounded up."""
    count, width = rows.rows.shape[-2:]
    matrix = rows.rows.mT @ rows.rows
    total = rows.length.square().sum(-1) * OWN_ROUNDING
    return matrix, gamma_single(count + 2) * total + 4 * count * width * SMALLEST_SINGLE, total


def norms_of_grams(grams: list[Gram]) -> list[Rounded]:
    """Square roots of the largest eigenvalues: in one batch where the sizes agree."""
    matrices = [gram.matrix.float() for gram in grams]
    if len({matrix.shape for matrix in matrices}) == 1:
        squares = list(eigenvalue_by_squaring(torch.stack(matrices), SQUARINGS))
    else:
        squares = [eigenvalue_by_squaring(matrix, SQUARINGS) for matrix in matrices]
    found = []
    for gram, square in zip(grams, squares, strict=True):
        width = gram.matrix.shape[-1]  # the cast to float32 adds u sqrt(width) of the norm
        upper = square.double() * (1 + 2 * UNIT_SINGLE * (width**0.5 + 1)) + width * SMALLEST_SINGLE
        found.append(Rounded(square.double().sqrt(), (upper + gram.off).sqrt() * OWN_ROUNDING + gram.added))
    return found


def through_lengths(rows: SingleRows, factor: Factor, size: Float[Tensor, "*weights heads"]) -> Rounded:
    """|W z| of the exact rows, from the small factor of W."""
    low = factor.narrow * factor.scale
    frobenius = (factor.size * factor.scale[..., 0, 0] * OWN_ROUNDING).unsqueeze(-1)
    image = rows.rows @ low.float()
    turned = 16 * gamma(8 * math.prod(factor.matrix.shape[-2:])) + gamma_single(low.shape[-2] + 4)
    lost = 4 * low.shape[-1] * (low.shape[-2] + 2) * SMALLEST_SINGLE * (1 + frobenius + rows.length)
    upper = lengths(image) + turned * frobenius * rows.length + rows.error * size.unsqueeze(-1) + lost
    return Rounded(as_computed(image), upper * OWN_ROUNDING)


def as_computed(rows: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    """Lengths of float32 rows without what their rounding adds."""
    return torch.linalg.vector_norm(rows, dim=-1).double()


def centred(values: SingleRows) -> SingleRows:
    """The rows less their mean over the tokens."""
    count = values.rows.shape[-2]
    mean = values.rows.mean(-2, keepdim=True)
    rows = values.rows - mean
    size, error = values.length.norm(dim=-1, keepdim=True), values.error.mean(-1, keepdim=True)
    # The mean is off by gamma(n + 2) of that of the sizes, whose length is at most that of all rows by sqrt(n).
    off = gamma_single(count + 4) * size * count**-0.5 + UNIT_SINGLE * values.length
    lost = (count + 2) * SMALLEST_SINGLE * rows.shape[-1] ** 0.5
    return SingleRows(rows, lengths(rows), (values.error + error + off + lost) * OWN_ROUNDING)


def unbiased(values: SingleRows, bias: Float[Tensor, "*weights heads width"] | None) -> SingleRows:
    """The rows less the bias that they were made with."""
    if bias is None:
        return values
    rows = values.rows - bias.float().unsqueeze(-2)
    size = lengths(rows)
    return SingleRows(rows, size, (values.error + 2 * UNIT_SINGLE * size) * OWN_ROUNDING)


def tokens_norm(tokens: Float[Tensor, "*batch n dim"]) -> Rounded:
    """||X|| of tokens that float32 holds, with an axis for the heads."""
    exact = tokens.float().unsqueeze(-3)
    rows = exact if exact.shape[-1] <= exact.shape[-2] else exact.mT  # whose Gram matrix is the smaller one
    size = lengths(rows)
    return norms_of_grams([gram_of(SingleRows(rows, size, torch.zeros_like(size)))])[0]


def norms_of_values_and_changes(
    block: Attention, values: SingleRows, queries: SingleRows, keys: SingleRows
) -> tuple[Rounded, Rounded]:
    """||V||, and the sum of ||K W_Q^T|| and ||Q W_K^T|| as far as queries and memory move."""
    norms = block.double.weight_norms
    grams = [gram_of(values)]
    if block.query_moves:
        grams.append(gram_through(keys, norms.query_factor, norms.queries))
    if block.memory_moves:
        grams.append(gram_through(queries, norms.key_factor, norms.keys))
    value_norm, *change_norms = norms_of_grams(grams)
    return value_norm, sum(change_norms[1:], change_norms[0])
