r"""Havens, Araujo, Zhang, Hu 2024: fine-grained local sensitivity of transformers, LoFAST (ICML 2024, PMLR 235:17680).

How far the output moves when the input moves by at most eps in Frobenius norm, from the given X. The paper was not
read here: its plan is known from the reviews (split the change into one with P frozen and one from the change of P,
the latter through the change of the scores); the constants below are derived on this page.

| paper | here |
|---|---|
| X, X' = X + D, ||D||_F <= eps | `block.x`, a point of the ball, `radius` |
| P_l, W_V^l W_O^l of head l | `probabilities[l]`, `w_v[l] @ w_o[l]` |

With S = s Q K^T + B and a bias as one more row of the weights,

    F(X') - F(X) = sum_l P_l D W_V^l W_O^l  +  sum_l (P'_l - P_l) V'_l W_O^l.

- The first sum: at most xi ||D||_F with xi = ||sum_l P_l (x) (W_V^l W_O^l)^T||.
- The softmax has the Lipschitz constant 1/2, so ||P'_l - P_l||_F <= (1/2) ||S'_l - S_l||_F, and S' - S =
  s (D W_Q K^T + Q W_K^T D^T + D W_Q W_K^T D^T); ||V'_l W_O^l|| <= ||V_l W_O^l|| + eps ||W_V^l W_O^l||.

Divided by ||D||_F, and growing in it, so for the whole ball:

    xi + sum_l (s/2) ( ||K_l W_Q^lT|| + ||Q_l W_K^lT|| + eps ||W_Q^l W_K^lT|| ) ( ||V_l W_O^l|| + eps ||W_V^l W_O^l|| ).

The paper takes xi by power iteration, which approaches it from below. Here it is bounded from above by the smaller of
sum_l ||P_l|| ||W_V^l W_O^l|| and ||W_O|| sqrt(sum_l ||P_l||^2 ||W_V^l||^2); with one head the former is xi itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.norms import combine_heads, map_norm
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_up, inflate, product
from lipbounds.targets.attention import Attention


@bound(
    name="havens2024.change",
    claim=Claim(kind="proved", scope="change", norm="l2"),
    source=Source(
        title="Fine-grained Local Sensitivity Analysis of Standard Dot-Product Self-Attention",
        authors="Havens, Araujo, Zhang, Hu",
        year=2024,
        statement="split of the change known from reviews, constants derived here",
    ),
    supports=("heads", "biases", "mask"),
    cost="O(H n^2 (d + n) + H D d^2)",
)
def change(block: Attention, radius: float) -> tuple[Tensor, Terms]:
    """Change of the output with the attention map frozen, plus that of the map by the constant 1/2 of the softmax."""
    wide = block.double
    maps, through = map_norm(wide), product_norm_upper(wide.w_v, wide.w_o)
    by_sum = inflate((maps * through).sum(-1), wide.heads)
    mixing = torch.minimum(by_sum, combine_heads(wide, maps * spectral_norm_upper(wide.w_v)))
    logits = product_norm_upper(*wide.key_factors, wide.w_q.mT) + product_norm_upper(*wide.query_factors, wide.w_k.mT)
    logits = logits + radius * product_norm_upper(wide.w_q, wide.w_k.mT)
    values = product_norm_upper(*wide.value_factors, wide.w_o) + radius * through
    softmax_part = product(logits, abs(wide.scale_value) / 2, values).sum(-1)
    value = inflate(mixing + softmax_part, wide.heads + 16)
    return cast_up(value, block.dtype), {"mixing": mixing, "softmax_part": softmax_part}
