"""The covariance form in the norm max_i |x_i| of the tokens, ours.

    exact:  max_i ( ||W_V|| + s ||Cov_i(V, K) W_Q^T|| + |u_i| ||Cov_i(V, V)||^{1/2} ),

at a point, for any mask and any number of tokens. Heads: for each token ||W_O|| sqrt(sum_h L_hi^2), then the largest.
Where only the query moves, the second part remains; where only the memory moves, the other two.

| symbol | meaning |
|---|---|
| u_i = s W_K q_i | gradient of the logits of row i by a token |
| Cov_i(Y, Z) = Y^T J(P_i) Z | covariance under row i of the attention map |

Numerics: as in `covariance`; a square root of a covariance that rounding blurs carries the root of its error.
Proof: docs/bounds/covariance_token.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.covariance import centred_projection, row_covariance
from lipbounds.derivatives.norms import combine_rows
from lipbounds.ops.spectral import product_norm_upper, row_norms_upper, spectral_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


@bound(
    name="covariance_token.exact",
    claim=Claim(kind="proved", scope="point", norm="token"),
    source=Source(title="lipbounds", statement="covariance form in the token norm, derived here (E2)"),
    supports=("heads", "biases", "mask", "cross", "some_queries"),
    cost="O(H n^2 d^2 + H n d^3)",
)
def exact(block: Attention) -> tuple[Tensor, Terms]:
    """Spectral norms of the covariances of keys and values under each row, for the largest token.

    Args:
        block: the attention block.
    """
    wide = block.double
    scale = abs(wide.scale_value)
    values = centred_projection(wide.source_input, wide.w_v)
    query_part = key_part = mixing = torch.zeros_like(wide.logits[..., 0])
    if wide.query_moves:
        cross, error = row_covariance(wide, values, centred_projection(wide.source_input, wide.w_k))
        queries = wide.w_q.mT.unsqueeze(-3)
        query_part = scale * (product_norm_upper(cross, queries) + error * queries.norm(dim=(-2, -1)))
    if wide.memory_moves:
        covariance, error = row_covariance(wide, values, values)
        variance = spectral_norm_upper(covariance) + error
        positive = variance > 0  # the root has gradient 0 at 0
        deviation = torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)
        key_part = scale * row_norms_upper(*wide.query_factors, wide.w_k.mT) * deviation
        mixing = mixing + spectral_norm_upper(wide.w_v).unsqueeze(-1)
    value = inflate(combine_rows(wide, mixing + query_part + key_part), 16)
    return cast_up(value, block.dtype), {"detail.query_part": query_part, "detail.key_part": key_part}
