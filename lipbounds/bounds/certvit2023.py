r"""Gupta, Verma 2023: CertViT (arXiv 2302.10287). The bound in its code on L2 attention is no bound.

Read in the code (sagarverma/transformer-lipschitz), with L(.) the spectral norm of a weight, N
the number of tokens and W_0 Lambert's function, so that W_0(N/e) = phi^-1(N), lipbounds.ops.lambert:

    sqrt( N / (D/H) ) ( 4 W_0(N/e) + 1 ) sqrt( L(W_Q) + L(W_V) ) L(W_O).

The norms are added under the root where a product is due: the map has degree 2 in W_Q and 1 in W_V, the formula 1/2 in
each. Kept to be refuted, for one head, where it can be read in one way only. The code's own forward pass leaves out the
factor A_h, and is not covered here: where W_Q is rank deficient that map is not even Lipschitz.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.ops.lambert import phi_inverse_upper
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.l2_attention import L2Attention


@bound(
    name="certvit2023.l2",
    claim=Claim(kind="proved", scope="global", norm="l2"),
    source=Source(
        title="CertViT: Certified Robustness of Pre-Trained Vision Transformers",
        authors="Gupta, Verma",
        year=2023,
        arxiv="2302.10287",
        statement="l2 constant of L2 attention as coded, a sum of weight norms under the root: no bound",
    ),
    cost="O(D d^2)",
    status="refuted",
    target=L2Attention,
)
def l2(block: L2Attention) -> Tensor:
    """l2 constant of L2 attention as coded, with a sum of weight norms under the root: no bound.

    Args:
        block: the block of L2 attention.
    """
    wide = block.double
    weights = (spectral_norm_upper(wide.w_q) + spectral_norm_upper(wide.w_v)).sqrt() * spectral_norm_upper(wide.w_o)
    factor = wide.scale * wide.tokens**0.5 * (4 * phi_inverse_upper(wide.tokens) + 1)
    return cast_up(inflate(factor * weights.squeeze(-1), 32).expand(block.batch_shape), block.dtype)
