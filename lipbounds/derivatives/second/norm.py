"""The norm of the second differential of a block at a point, all heads, keys and parts summed before a norm is taken.

    ||d2F||  <=  || (t_i,jl) ||,   an n x m^2 matrix,

t_ijl^2 the norm of the Gram matrix of what the parts of a direction at tokens j and l do to output token i; ||.|| of a
Gram matrix is replaced by a Schatten norm (lipbounds.ops.schatten). Proof and rounding: docs/derivatives.md, section
5.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.second.factors import Factors, factors_of
from lipbounds.derivatives.second.gram_blocks import own_size, own_square, pair_products
from lipbounds.ops.schatten import schatten_norm_upper
from lipbounds.ops.spectral import root, spectral_norm_upper
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


SQUARINGS = 4  # p = 32: at most a tenth above the norm for the Gram matrices of 768 features
APART = 2**22  # multiplications for the pairs of a row from which those with its own token are made by themselves
CHUNK_ENTRIES = 2**22  # of Gram matrices made at a time


def second_work(block: Attention) -> int:
    """Multiplications and additions of `second_norm` for one batch item, the large ones counted.

    Args:
        block: the attention block.
    """
    inner, out = block.heads * block.w_v.shape[-1], block.w_o.shape[-1]
    pairs = block.logits.shape[-1] * (block.logits.shape[-1] + 1) // 2 if block.memory_moves else 1
    features = block.moving_input.shape[-1]
    one = inner * inner * (2 * features + out) + inner * out * out + SQUARINGS * out**3
    return 2 * block.tokens * pairs * one


@cached_per_block
def second_norm(block: Attention) -> Float[Tensor, "*#batch"]:
    """Upper bound of the norm of the second differential at the block's input, rounded up; differentiable.

    Args:
        block: in float64, without rotary positions and QK-norm.
    """
    factors = factors_of(block)
    rows = torch.stack([_row(block, factors, i) for i in range(block.tokens)], -3)
    finite = rows.isfinite().all(-1).all(-1).all(-1)
    rows = torch.where(finite[..., None, None, None], rows, 0.0)
    norm = spectral_norm_upper(rows.flatten(-2)) if block.memory_moves else rows.flatten(-3).amax(-1)
    return torch.where(finite, inflate(norm, 8) * factors.unit, torch.inf).expand(block.batch_shape)


def _row(block: Attention, factors: Factors, i: int) -> Float[Tensor, "*#batch m m"]:
    """t_ijl of one i; where only the query moves, one number."""
    m = block.logits.shape[-1]
    if not block.memory_moves:
        gram, size = own_square(factors, i), own_size(factors, i)
        error = factors.error[..., i : i + 1]
        return gram_norms(factors, gram.unsqueeze(-5), size.unsqueeze(-2), error).unsqueeze(-1)  # [*, 1, 1]
    first, second = torch.triu_indices(m, m, device=block.device)
    if block.query_moves:  # where the row's own token is one of the two, it is the first
        own = block.token_of(i)
        first, second = torch.where(second == own, second, first), torch.where(second == own, first, second)
    norms = pair_norms(block, factors, i, first, second)
    rows = norms.new_zeros(*norms.shape[:-1], m, m)
    rows[..., first, second] = norms
    rows[..., second, first] = norms
    return rows


def pair_norms(
    block: Attention, factors: Factors, i: int, first: Tensor, second: Tensor
) -> Float[Tensor, "*#batch count"]:
    """t_ijl of pairs (j, l), as `lipbounds.derivatives.second.gram_blocks.pair_products` takes them.

    Args:
        block: the attention block; its memory moves.
        factors: of the block.
        i: number of a row of the output.
        first: numbers of the tokens j.
        second: numbers of the tokens l.
    """
    error, chunk = factors.error[..., i : i + 1], chunk_of(factors)
    kinds = [torch.ones_like(first, dtype=torch.bool)]
    if block.query_moves and first.numel() * factors.output.shape[-2] ** 2 * factors.w_v.shape[-2] > APART:
        mine = first == block.token_of(i)  # pairs without the own token of the row have fewer terms
        kinds = [mine, ~mine]
    groups = [group for kind in kinds for group in kind.nonzero()[:, 0].split(chunk) if group.numel()]
    found = [gram_norms(factors, *pair_products(block, factors, i, first[k], second[k]), error) for k in groups]
    return torch.cat(found, -1)[..., torch.cat(groups).argsort()]


def chunk_of(factors: Factors) -> int:
    """Number of Gram matrices to be made at a time."""
    inner, out = factors.output.shape[-2:]
    return max(1, CHUNK_ENTRIES // max(inner, out, factors.w_v.shape[-2]) ** 2)


def gram_norms(
    factors: Factors,
    gram: Float[Tensor, "*#batch count heads v heads w"],
    size: Float[Tensor, "*#batch count heads"],
    error: Float[Tensor, "*#batch #count"],
) -> Float[Tensor, "*#batch count"]:
    """Norms of blocks from the Gram matrices of their parts before the output weights.

    Args:
        factors: of the block.
        gram: sums of products.
        size: roots of the sums of these products in absolute value, at least.
        error: of the blocks, output weights included.
    """
    inner, out = factors.output.shape[-2:]
    output = factors.output.unsqueeze(-3)
    square = output.mT @ gram.flatten(-2).flatten(-3, -2) @ output
    operations = 2 * (inner + out + factors.to_query.shape[-2] + factors.w_v.shape[-2] + factors.maps.shape[-1])
    operations = max(operations, 2 * factors.to_query.shape[-1])  # heads may be wider than all else
    with torch.no_grad():
        heads = factors.output.unflatten(-2, (size.shape[-1], -1)).norm(dim=(-2, -1))
        total = (heads.unsqueeze(-2) * size).sum(-1)
        slack = 2 * gamma(2 * operations + 64) * total.square()
    norms = root(schatten_norm_upper(square, SQUARINGS) + slack)
    return inflate(norms + error, 8)
