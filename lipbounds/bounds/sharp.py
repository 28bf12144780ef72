"""Norms of products of block rows of the Jacobian, and the three parts of the differential with all heads: ours.

    sharp:       the smaller of sharp_fast and || ( ||J_i J_k^T|| )_ik ||^(1/2)     (1)
                 or, on large blocks, of sharp_fast and ( sum_i ||J_i J_i^T|| )^(1/2)    (2)
    sharp_fast:  ||T1|| + ||T2|| + ||T3||, each in Frobenius norms of Gram blocks or by heads

J_i is the part of the Jacobian for output token i; T1, T2, T3 are mixing, query and key part. Which of (1) and (2) is
evaluated depends on the size of the block, not of the batch (lipbounds.derivatives.first.gram_norm). Formulas, size
rule and proof: docs/bounds/sharp.md.

Numerics: float64. The rounding of (1) and (2) is added to every norm of a block: it costs 1e-7 of the number at most
where the factors do not cancel, and the sums over heads take over where they do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.gram_norm import gram_norm, has_gram_norm, has_rows_norm, rows_norm
from lipbounds.derivatives.first.three_parts import three_parts
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="sharp",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="norms of Gram blocks of the Jacobian, derived here"),
    supports=("heads", "biases", "mask", "cross"),
    cost="O(n^2 D^2 (D + n)) up to a size, then O(n D^3), then that of sharp_fast",
    version=3,
)
def sharp(block: Attention) -> tuple[Tensor, Terms]:
    """Norm of the matrix of norms of Gram blocks: all heads, keys and parts are summed before a norm is taken."""
    wide = block.double
    mixing, query, key = three_parts(wide)
    parts = mixing + query + key
    terms = {"detail.parts": parts}
    value = parts
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
    supports=("heads", "biases", "mask", "cross"),
    cost="O(n D^2 (n + D) + n^2 H^4)",
    version=2,
)
def sharp_fast(block: Attention) -> tuple[Tensor, Terms]:
    """The three parts of the differential with all heads in one, from Gram matrices of heads and keys."""
    mixing, query, key = three_parts(block.double)
    value = inflate(mixing + query + key, 8).expand(block.batch_shape)
    terms = {"detail.mixing": mixing, "detail.query_part": query, "detail.key_part": key}
    return cast_up(value, block.dtype), terms
