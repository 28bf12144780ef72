"""Qi et al. 2023: LipsFormer (ICLR 2023, arXiv 2304.09856), scaled cosine similarity attention.

Theorem 1, recollected and consistent with what Nair 2025 says of it, for n tokens:

    nu e ( 2 n (n-1) tau ||W_K||  +  2 (n-1) tau ||W_Q||  +  2 n ||W_V|| )

| symbol | meaning |
|---|---|
| tau, nu | temperature and output factor, as in CosineAttention |
| e = eps^(-1/2) | eps, what the normalisation of a row adds to its squared length |

Numerics: float64, norms of the weights rounded up, a few operations on positive numbers. Proof (ours):
docs/bounds/qi2023.md.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.cosine_attention import CosineAttention


@bound(
    name="qi2023.theorem1",
    claim=Claim(kind="proved", scope="global", norm="l2"),
    source=Source(
        title="LipsFormer: Introducing Lipschitz Continuity to Vision Transformers",
        authors="Qi et al.",
        year=2023,
        arxiv="2304.09856",
        statement="Theorem 1, recollected and derived again",
    ),
    cost="O(D d^2)",
    target=CosineAttention,
)
def theorem1(block: CosineAttention) -> Tensor:
    """Theorem 1 on scaled cosine similarity attention, recollected and derived again.

    Args:
        block: the block of cosine attention.
    """
    wide, n = block.double, block.tokens
    queries, keys, values = (spectral_norm_upper(weights) for weights in (wide.w_q, wide.w_k, wide.w_v))
    tau, factor = wide.scale, wide.output_scale / wide.eps**0.5
    value = factor * (2 * n * (n - 1) * tau * keys + 2 * (n - 1) * tau * queries + 2 * n * values)
    return cast_up(inflate(value, 32).expand(block.batch_shape), block.dtype)
