"""Vuckovic, Baratin, Tachet des Combes 2020: a mathematical theory of attention (arXiv 2007.02876).

Attention as a map of measures that is Lipschitz in the 1-Wasserstein distance on the compact set |x_i| <= R, for n
equally weighted tokens:

    w1:  ||W_V|| ( r + (1 + 2 r) e^{2 r} ),  r = s ||W_Q W_K^T|| R^2,  free of n, without masks and biases

Only the abstracts were read (also of arXiv 2102.05628): the constant is derived. Heads (ours): sum_h ||W_V^h W_O^h||
times the factor of each. Proof: docs/bounds/vuckovic2020.md.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.ops.spectral import product_norm_upper
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, inflate, product
from lipbounds.targets.attention import Attention


@bound(
    name="vuckovic2020.w1",
    claim=Claim(kind="proved", scope="compact", norm="token_mean"),
    source=Source(
        title="A Mathematical Theory of Attention",
        authors="Vuckovic, Baratin, Tachet des Combes",
        year=2020,
        arxiv="2007.02876",
        statement="1-Wasserstein bound on a compact set, constant derived here",
    ),
    supports=("heads",),
    cost="O(H D d^2)",
)
def w1(block: Attention, radius: float) -> Tensor:
    """1-Wasserstein constant of equally weighted tokens of norm at most R.

    Args:
        block: the attention block.
        radius: R, the largest Euclidean norm of a token.
    """
    wide = block.double
    r = inflate(abs(wide.scale_value) * product_norm_upper(wide.w_q, wide.w_k.mT) * radius * radius, 4)
    exponent = 2 * r * (1 + 2.0**-48)  # an absolute error of the exponent is a relative one of the result
    heads = product(product_norm_upper(wide.w_v, wide.w_o), r + (1 + 2 * r) * exponent.exp())
    return cast_up(inflate(heads.sum(-1), wide.heads + 32).expand(wide.batch_shape), block.dtype)
