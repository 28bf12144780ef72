"""Newhouse et al. 2025: training transformers with enforced Lipschitz constants (arXiv 2507.13338).

Bounds in the norm max_i |x_i| of the tokens, on the inputs with |x_i| <= R, for any number of tokens and any mask:

    composed:                ||W_V|| ( 1 + 2 s ||W_Q|| ||W_K|| R^2 )
    as_coded (refuted):      ||W_V|| s ( 1 + 2 ||W_Q|| ||W_K|| R^2 )

In `as_coded` s multiplies the part of the values, too, which it does not enter. In the code the norms are
root-mean-square ones and the map is divided by 3; here they are Euclidean and it is not. Heads (ours): ||W_O||
sqrt(sum_h L_h^2), for each token.

The paper was not read here; a bound of attention as a function of q, k, v was seen in third-party code, and the formula
of the authors' own code. The composition with the projections is derived: docs/bounds/newhouse2025.md.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.attention import Attention


PAPER, AUTHORS = "Training Transformers with Enforced Lipschitz Constants", "Newhouse et al."


@bound(
    name="newhouse2025.composed",
    claim=Claim(kind="proved", scope="compact", norm="token"),
    source=Source(
        title=PAPER, authors=AUTHORS, year=2025, arxiv="2507.13338", statement="attention bound, composed here"
    ),
    supports=("heads", "mask"),
    cost="O(H D d^2)",
)
def composed(block: Attention, radius: float) -> Tensor:
    """Norms of the weights and the largest token: the same for any number of tokens.

    Args:
        block: the attention block.
        radius: R, the largest Euclidean norm of a token.
    """
    wide = block.double
    return _finish(block, spectral_norm_upper(wide.w_v) * (1 + 2 * abs(wide.scale_value) * _logits(wide, radius)))


@bound(
    name="newhouse2025.as_coded",
    claim=Claim(kind="proved", scope="compact", norm="token"),
    source=Source(title=PAPER, authors=AUTHORS, year=2025, arxiv="2507.13338", statement="as in the authors' code"),
    supports=("heads", "mask"),
    cost="O(H D d^2)",
    status="refuted",
)
def as_coded(block: Attention, radius: float) -> Tensor:
    """The scale of the logits multiplies the part of the values as well: false for scales below 1.

    Args:
        block: the attention block.
        radius: R, the largest Euclidean norm of a token.
    """
    wide = block.double
    return _finish(block, spectral_norm_upper(wide.w_v) * abs(wide.scale_value) * (1 + 2 * _logits(wide, radius)))


def _logits(block: Attention, radius: float) -> Tensor:
    return spectral_norm_upper(block.w_q) * spectral_norm_upper(block.w_k) * radius * radius


def _finish(block: Attention, heads: Tensor) -> Tensor:
    wide = block.double
    return cast_up(inflate(combine_heads(wide, heads.expand(*wide.batch_shape, wide.heads)), 24), block.dtype)
