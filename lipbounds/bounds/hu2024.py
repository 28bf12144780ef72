"""Hu et al. 2024: SpecFormer, robust vision transformers by penalised singular values (ECCV 2024, arXiv 2402.03317).

The local bound behind the penalty, on the ball of radius eps around X:

    printed (recollected, refuted):  N (N + 1) (||X||_F + eps)^2 ||W_V|| (||W_Q|| ||W_K|| + 1)
    ball (ours):                     ||W_V|| ( sqrt(n) + s ||W_Q|| ||W_K|| (||X|| + eps)^2 ),  for any mask
    ball, rotary or QK-norm (ours):  ||W_V|| ( sqrt(n) + (s/2) (||X|| + eps) ( a sup ||K'|| + b sup ||Q'|| ) ),

a and b the largest derivatives of a query and of a key by its token over the ball.

| paper | here |
|---|---|
| N, X, delta | `block.tokens`, `block.x`, `radius` |

`printed` vanishes with X and eps, while the norm of the Jacobian at X = 0 is ||W_V|| ||P|| > 0. The paper was not read
here: only that the formula has N (N + 1) and is quadratic in ||X||_F + eps was seen, quoted in reviews. Heads (ours):
||W_O|| sqrt(sum_h L_h^2). Proof of `ball`: docs/bounds/hu2024.md.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.ball.turned_products import apart_on_ball
from lipbounds.derivatives.ball.turned_rows import is_turned
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.spectral import spectral_norm_upper, vector_norm
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, inflate, product
from lipbounds.targets.attention import Attention


PAPER, AUTHORS = (
    "SpecFormer: Guarding Vision Transformer Robustness via Maximum Singular Value Penalization",
    "Hu et al.",
)


@bound(
    name="hu2024.printed",
    claim=Claim(kind="proved", scope="ball", norm="l2"),
    source=Source(
        title=PAPER, authors=AUTHORS, year=2024, arxiv="2402.03317", statement="local bound on a ball, recollected"
    ),
    supports=("mask",),
    cost="O(H D d^2)",
    status="refuted",
)
def printed(block: Attention, radius: float) -> Tensor:
    """The local bound as recollected: false for small inputs, where it vanishes.

    Args:
        block: the attention block.
        radius: of the Frobenius ball around the input.
    """
    wide = block.double
    size = (vector_norm(wide.x.flatten(-2)) + radius).square() * wide.tokens * (wide.tokens + 1)
    weights = spectral_norm_upper(wide.w_q) * spectral_norm_upper(wide.w_k) + 1
    heads = spectral_norm_upper(wide.w_v) * weights * size.unsqueeze(-1)
    value = combine_heads(wide, heads.expand(*wide.batch_shape, wide.heads))
    return cast_up(inflate(value, 2 * wide.x.shape[-2:].numel() + 32), block.dtype)


@bound(
    name="hu2024.ball",
    claim=Claim(kind="proved", scope="ball", norm="l2"),
    source=Source(
        title=PAPER, authors=AUTHORS, year=2024, arxiv="2402.03317", statement="local bound on a ball, corrected here"
    ),
    supports=("heads", "mask", "rotary", "qk_norm"),
    cost="O(n D^2 + H D d^2); with rotary positions or QK-norm also O(H n d (n + d))",
)
def ball(block: Attention, radius: float) -> Tensor:
    """The local bound with the term that it lacked: norms of the weights and of the input alone.

    Args:
        block: the attention block.
        radius: of the Frobenius ball around the input.
    """
    wide = block.double
    size = (spectral_norm_upper(wide.x) + radius).unsqueeze(-1)
    if is_turned(wide):
        change = product(size, abs(wide.scale_value) / 2, apart_on_ball(wide, radius))
    else:
        change = abs(wide.scale_value) * spectral_norm_upper(wide.w_q) * spectral_norm_upper(wide.w_k) * size.square()
    heads = product(spectral_norm_upper(wide.w_v), wide.tokens**0.5 + change)
    value = combine_heads(wide, heads.expand(*wide.batch_shape, wide.heads))
    return cast_up(inflate(value, 24), block.dtype)
