"""Kim, Papamakarios, Mnih 2021: The Lipschitz Constant of Self-Attention (ICML 2021, arXiv 2006.04710).

| paper | here |
|---|---|
| N tokens, D/H | n, d = `w_q.shape[-1]`; s = 1/sqrt(d) |
| phi(x) = x e^(x+1), c = phi^-1(N-1), c_1 = phi^-1(1) | `phi_inverse_upper(n - 1)`, `phi_inverse_upper(1)` |

L2 attention with W_Q = W_K = W, one head before W_V and W_O; constants recollected, each proved again on
docs/bounds/kim2021.md:

    linf:  ( 4 c + s ) ||W|| ||W^T||            linf_tighter (ours):  ( 2 c (1 + s) + s ) ||W|| ||W^T||
    l2:    s ||W||^2 sqrt(n) (4 c + 1)          l2_tighter (ours):
                                                s ||W||^2 ( sqrt((n+1)/2) + 2 c + 2 sqrt(c c_1 (n-1)) )
    l2_recollected:  s ||W|| sqrt(n) (4 c + 1), no bound: the map has degree 2 in W
    dot_product_compact (ours; tokens of norm at most R, r = ||A|| R^2):  ||W_V|| ( r + sqrt(n (1 + r^2)) )

Numerics: float64, norms of the weights rounded up, phi^-1 rounded up, a few operations on non-negative numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Norm, Source
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.lambert import phi_inverse_upper
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.registry import BoundSpec, Status, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.l2_attention import L2Attention


PAPER, AUTHORS, ARXIV = "The Lipschitz Constant of Self-Attention", "Kim, Papamakarios, Mnih", "2006.04710"
OPERATIONS = 32  # roundings of the longest formula in n, d and norms


def _l2_recollected(block: L2Attention) -> Float[Tensor, "*weights"]:
    return _l2(block, spectral_norm_upper(block.w_q) * _published_factor(block))


def _l2_corrected(block: L2Attention) -> Float[Tensor, "*weights"]:
    return _l2(block, spectral_norm_upper(block.w_q).square() * _published_factor(block))


def _l2_tighter(block: L2Attention) -> Float[Tensor, "*weights"]:
    n, c = block.tokens, phi_inverse_upper(block.tokens - 1)
    factor = ((n + 1) / 2) ** 0.5 + 2 * c + 2 * (c * phi_inverse_upper(1) * (n - 1)) ** 0.5
    return _l2(block, spectral_norm_upper(block.w_q).square() * block.scale * factor)


def _published_factor(block: L2Attention) -> float:
    return block.scale * block.tokens**0.5 * (4 * phi_inverse_upper(block.tokens - 1) + 1)


def _l2(block: L2Attention, heads: Float[Tensor, "*weights heads"]) -> Float[Tensor, "*weights"]:
    """||W_O|| sqrt( sum_h ||W_V^h||^2 L_h^2 ) from bounds L_h of the maps without value weights."""
    whole = spectral_norm_upper(block.w_o.flatten(-3, -2)) * vector_norm(spectral_norm_upper(block.w_v) * heads)
    return inflate(whole, block.heads + OPERATIONS)


def _linf(block: L2Attention) -> Float[Tensor, "*weights"]:
    factor = 4 * phi_inverse_upper(block.tokens - 1) + block.scale
    queries = (_largest_row_sum(block.w_q) * _largest_row_sum(block.w_q.mT)).amax(-1)
    return _linf_whole(block, factor * queries * _largest_row_sum(block.w_v.mT).amax(-1))


def _linf_tighter(block: L2Attention) -> Float[Tensor, "*weights"]:
    factor = 2 * phi_inverse_upper(block.tokens - 1) * (1 + block.scale) + block.scale
    heads = _largest_row_sum(block.w_q) * _largest_row_sum(block.w_q.mT) * _largest_row_sum(block.w_v.mT)
    return _linf_whole(block, factor * heads.amax(-1))


def _linf_whole(block: L2Attention, concatenated: Float[Tensor, "*weights"]) -> Float[Tensor, "*weights"]:
    whole = concatenated * _largest_row_sum(block.w_o.flatten(-3, -2).mT)
    sums = sum(sum(weights.shape[-2:]) for weights in (block.w_q, block.w_v)) + block.heads * block.w_o.shape[-2]
    return inflate(whole, sums + OPERATIONS)


def _largest_row_sum(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """The norm ||.||_inf of a matrix, up to cols - 1 roundings."""
    return matrix.abs().sum(-1).amax(-1)


def _declare(
    name: str, norm: Norm, formula: Callable[[L2Attention], Tensor], statement: str, status: Status = "standing"
) -> BoundSpec:
    def compute(block: L2Attention) -> Tensor:
        return cast_up(formula(block.double).expand(block.batch_shape), block.dtype)

    compute.__doc__ = statement
    compute.__qualname__ = name
    return bound(
        name=f"kim2021.{name}",
        claim=Claim(kind="proved", scope="global", norm=norm),
        source=Source(title=PAPER, authors=AUTHORS, year=2021, arxiv=ARXIV, statement=statement),
        supports=("heads",),
        cost="O(H D d)" if norm == "linf" else "O(H D d^2)",
        status=status,
        target=L2Attention,
    )(compute)


linf = _declare("linf", "linf", _linf, "linf constant of L2 attention, recollected and derived again")
linf_tighter = _declare("linf_tighter", "linf", _linf_tighter, "linf constant of L2 attention, ours")
l2 = _declare("l2", "l2", _l2_corrected, "l2 constant of L2 attention with ||W_Q||^4 under the root, derived by us")
l2_tighter = _declare("l2_tighter", "l2", _l2_tighter, "l2 constant of L2 attention, ours")
l2_recollected = _declare(
    "l2_recollected", "l2", _l2_recollected,
    "l2 constant of L2 attention as recollected, with ||W_Q||^2 under the root: no bound", status="refuted",
)  # fmt: skip


@bound(
    name="kim2021.dot_product_compact",
    claim=Claim(kind="proved", scope="compact", norm="l2"),
    source=Source(
        title=PAPER, authors=AUTHORS, year=2021, arxiv=ARXIV,
        statement="dot-product attention, which has no global constant, on bounded tokens; ours",
    ),
    supports=("heads", "mask"),
    cost="O(H D d^2)",
)  # fmt: skip
def dot_product_compact(block: Attention, radius: float) -> Tensor:
    """Dot-product attention on tokens of norm at most R: ||W_V|| (r + sqrt(n (1 + r^2))), ours.

    Args:
        block: the attention block.
        radius: R, the largest Euclidean norm of a token.
    """
    wide = block.double
    r = inflate(abs(wide.scale_value) * product_norm_upper(wide.w_q, wide.w_k.mT) * radius * radius, 4)
    heads = spectral_norm_upper(wide.w_v) * (r + (wide.tokens * (1 + r.square())).sqrt())
    value = combine_heads(wide, heads.expand(*wide.batch_shape, wide.heads))
    return cast_up(inflate(value, OPERATIONS), block.dtype)
