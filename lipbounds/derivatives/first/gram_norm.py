r"""The norm of the matrix of norms of Gram blocks of the Jacobian: equations (1) and (2) of lipbounds.bounds.sharp.

    ||J||^2 = ||J J^T||  <=  || ( ||J_i J_k^T|| )_ik ||,                                                          (1)
    ||J||^2  <=  sum_i ||J_i J_i^T||,                                                                             (2)

J_i the part of the Jacobian for output token i. Which of them a block gets, and with how many squarings in the Schatten
norm, depends on the size of the block, not of the batch. Rounding: lipbounds.derivatives.first.gram_blocks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.first.gram_blocks import row_products
from lipbounds.derivatives.first.rows import Rows, jacobian_rows
from lipbounds.ops.schatten import schatten_norm_upper
from lipbounds.ops.spectral import root, spectral_norm_upper
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention


GRAM_WORK = (2.5e12, 4e11, 2e11, 2e10, 1e10, 5e9)  # largest work for (1) with 0, 1, ... squarings: p = 2, 4, ...
ROWS_WORK = 1e12
ROWS_SQUARINGS = 2
CHUNK_ENTRIES = 2**20  # of the blocks made at a time


def has_gram_norm(block: Attention) -> bool:
    """Whether the block is small enough for (1).

    Args:
        block: the attention block.
    """
    return _squarings(block) is not None


def norm_work(block: Attention) -> int:
    """Floating-point operations of the one of (1) and (2) that the block is small enough for; 0 where it is for none.

    Args:
        block: the attention block.
    """
    squarings = _squarings(block)
    if squarings is not None:
        return _work(block, squarings, block.tokens * (block.tokens + 1) // 2)
    return _work(block, ROWS_SQUARINGS, block.tokens) if has_rows_norm(block) else 0


def has_rows_norm(block: Attention) -> bool:
    """Whether the block is small enough for (2).

    Args:
        block: the attention block.
    """
    return _work(block, ROWS_SQUARINGS, block.tokens) <= ROWS_WORK


@cached_per_block
def gram_norm(block: Attention) -> Float[Tensor, "*#batch"]:
    """The root of (1): an upper bound of the norm of the Jacobian, rounded up; differentiable.

    Args:
        block: in float64, with `has_gram_norm`.
    """
    squarings = _squarings(block)
    assert squarings is not None
    rows = jacobian_rows(block)
    products = row_products(rows)
    count = rows.scale.shape[-1]
    chunk = max(1, CHUNK_ENTRIES // products.entries)
    lines = []
    for i in range(count):
        norms = [schatten_norm_upper(products(i, k, min(k + chunk, count)), squarings) for k in range(i, count, chunk)]
        lines.append(torch.nn.functional.pad(torch.cat(norms, -1), (i, 0)))
    upper = torch.stack(lines, -2)
    scale, largest = _relative(rows)
    entries = (upper + upper.triu(1).mT + products.slack()) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return inflate(root(spectral_norm_upper(entries)), 8) * largest * rows.unit


def rows_norm(block: Attention) -> Float[Tensor, "*#batch"]:
    """The root of (2): an upper bound of the norm of the Jacobian, rounded up; differentiable.

    Args:
        block: in float64.
    """
    rows = jacobian_rows(block)
    products = row_products(rows, squares_only=True)
    norms = [schatten_norm_upper(products(i, i, i + 1), ROWS_SQUARINGS) for i in range(rows.scale.shape[-1])]
    squares = torch.cat(norms, -1) + products.slack().diagonal(dim1=-2, dim2=-1)
    scale, largest = _relative(rows)
    total = inflate((squares * scale.square()).sum(-1), squares.shape[-1] + 4)
    return inflate(root(total), 8) * largest * rows.unit


def _relative(rows: Rows) -> tuple[Tensor, Tensor]:
    """The scales of the rows relative to the largest one, and that: powers of two; 0 for rows that are exactly 0."""
    scale = torch.where(rows.size + rows.error > 0, rows.scale, 0.0)
    largest = scale.amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return scale / largest, largest.squeeze(-1)


def _squarings(block: Attention) -> int | None:
    """How many squarings (1) may take at this size; None where it is too large for any."""
    pairs = block.tokens * (block.tokens + 1) // 2
    fitting = [k for k, limit in enumerate(GRAM_WORK) if _work(block, k, pairs) <= limit]
    return max(fitting, default=None)


def _work(block: Attention, squarings: int, products: int) -> int:
    """Multiplications and additions for the norms of that many products of rows, the large ones counted."""
    heads, keys = block.heads, block.logits.shape[-1]
    inner, out = heads * block.w_v.shape[-1], block.w_o.shape[-1]
    work = inner * inner * (keys + out) + inner * out * out + squarings * out**3
    if block.memory_moves and (block.key_norm is not None or block.key_rotation is not None):
        own = block.w_k.shape[-1]
        features = heads * own if block.norm_over == "all_heads" else own
        work += inner * heads * keys * (block.w_v.shape[-1] + features) + heads**2 * keys * features**2
    return products * 2 * work
