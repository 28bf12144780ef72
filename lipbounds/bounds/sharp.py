"""Norms of products of block rows of the Jacobian, and the three parts of the differential with all heads: ours.

    sharp:       the smallest of || ( ||J_i J_k^T|| )_ik ||^(1/2)                (1)
                 or, on large blocks, of ( sum_i ||J_i J_i^T|| )^(1/2)          (2),
                 of ||T1|| + ||T2|| + ||T3||, each in Frobenius norms of Gram blocks or by heads     (5), (3), (6),
                 and of sharp_fast
    sharp_fast:  ||T1 + T3|| + ||T2||: the parts of `sharp_cheap`, T2 with all heads in one, and T3 with all heads
                 stacked                                                        (4);
                 on small blocks each part is replaced by (5), (3), (6) where these are smaller

J_i is the part of the Jacobian for output token i; T1, T2, T3 are mixing, query and key part. What is evaluated depends
on the size of the block, not of the batch (lipbounds.derivatives.first.gram_norm, `SMALL`). With rotary positions or
QK-norm each key has a gradient of the logits of its own, u_hij = s W_K^h T_hj^T q_hi in place of u_hi, the covariances
of T2 meet the map T_hi of the query, and (4), which needs a factor that all keys share, is left out. Formulas, size
rules and proof: docs/bounds/sharp.md.

Numerics: float64. The rounding of (1) and (2) is added to every norm of a block: it costs 1e-7 of the number at most
where the factors do not cancel, and the sums over heads take over where they do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.first.differential_parts import differential_parts
from lipbounds.derivatives.first.gram_norm import gram_norm, has_gram_norm, has_rows_norm, norm_work, rows_norm
from lipbounds.derivatives.first.joint_heads import joint_query, stacked_key
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


SMALL = 1e11  # multiplications and additions of (6), up to which `sharp_fast` evaluates (5) and (6), too


@bound(
    name="sharp",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="norms of Gram blocks of the Jacobian, derived here"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(n^2 D^2 (D + n)) up to a size, then O(n D^3), then that of sharp_fast",
    version=4,
)
def sharp(block: Attention) -> tuple[Tensor, Terms]:
    """Norm of the matrix of norms of Gram blocks: all heads, keys and parts are summed before a norm is taken.

    Args:
        block: the attention block.
    """
    wide = block.double
    value, _ = _parts(wide)
    if not _is_small(wide):
        mixing, query, key = differential_parts(wide)
        value = torch.minimum(value, mixing + query + key)
    terms = {"detail.parts": value}
    if has_gram_norm(wide):
        terms["detail.gram"] = gram_norm(wide)
        value = torch.minimum(value, terms["detail.gram"])
    elif has_rows_norm(wide):
        terms["detail.rows"] = rows_norm(wide)
        value = torch.minimum(value, terms["detail.rows"])
    value = inflate(value, 8).expand(block.batch_shape)
    return cast_up(value, block.dtype), terms


@bound(
    name="sharp_fast",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="three parts of the differential with all heads, derived here"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H^2 n^2 (n + d) + D^3); on small blocks also O(n D^2 (n + D) + n^2 H^4)",
    version=3,
)
def sharp_fast(block: Attention) -> tuple[Tensor, Terms]:
    """The three parts of the differential with all heads in one, from Gram matrices of heads and keys.

    Args:
        block: the attention block.
    """
    wide = block.double
    value, terms = _parts(wide)
    return cast_up(inflate(value, 8).expand(block.batch_shape), block.dtype), {**terms}


def sharp_work(block: Attention) -> int:
    """Floating-point operations of `sharp` for one batch item, beside those of `sharp_fast`; large ones are counted.

    Args:
        block: the attention block.
    """
    return norm_work(block)


@cached_per_block
def _parts(block: Attention) -> tuple[Tensor, Terms]:
    """||T1 + T3|| + ||T2||, each part the smallest of its forms."""
    parts, with_rows = OverlapParts(block), _is_small(block)
    mixing = query = key = memory = parts.nothing
    if with_rows:
        mixing, query, key = differential_parts(block)
    if block.query_moves:
        own = torch.minimum(parts.query, joint_query(parts)) if parts.is_plain else parts.query
        query = torch.minimum(query, own) if with_rows else own
    if block.memory_moves:
        own = torch.minimum(parts.key, stacked_key(parts)) if parts.is_plain else parts.key
        key = torch.minimum(key, own) if with_rows else own
        mixing = torch.minimum(mixing, parts.mixing.norm) if with_rows else parts.mixing.norm
        memory = parts.memory(mixing, key)
    terms = {"detail.mixing": mixing, "detail.query_part": query, "detail.key_part": key}
    return memory + query, terms


def _is_small(block: Attention) -> bool:
    """Whether (6), the dearest of (3), (5) and (6), is affordable; the same for every item of a batch."""
    inner = block.heads * block.w_v.shape[-1]
    return 2 * block.tokens * inner**2 * (inner + block.logits.shape[-1]) <= SMALL
