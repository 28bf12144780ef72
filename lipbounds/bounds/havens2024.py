"""Havens, Araujo, Zhang, Hu 2024: fine-grained local sensitivity of transformers, LoFAST (ICML 2024, PMLR 235:17680).

How far the output moves when the input moves by at most eps in Frobenius norm, from the given X, over that move:

    xi + sum_l (s/2) ( ||K_l W_Q^lT|| + ||Q_l W_K^lT|| + eps ||W_Q^l W_K^lT|| ) ( ||V_l W_O^l|| + eps ||W_V^l W_O^l|| )

| paper | here |
|---|---|
| X, X' = X + D, ||D||_F <= eps | `block.x`, a point of the ball, `radius` |
| P_l, W_V^l W_O^l of head l | `probabilities[l]`, `w_v[l] @ w_o[l]`; a bias is one more row of the weights |
| xi | ||sum_l P_l (x) (W_V^l W_O^l)^T||, here bounded from above |

The paper takes xi by power iteration, which approaches it from below. The paper was not read here: its plan is known
from the reviews, the constants are derived. With rotary positions or QK-norm (ours) another bracket bounds how far the
logits change (lipbounds.derivatives.ball.turned_products). Proof: docs/bounds/havens2024.md.

Numerics: float64; at a block in a shorter dtype, on the CPU, float32 with its rounding proved and added
(lipbounds.derivatives.first.single_parts), where that adds under 5 %; `details["bits"]` says which it was, and
`precision="float64"` asks for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.ball.turned_products import change_from_centre
from lipbounds.derivatives.first.single_parts import SingleParts, in_single_or_double
from lipbounds.derivatives.first.single_precision import OWN_ROUNDING, Precision, Rounded, known
from lipbounds.derivatives.logit_changes import change_by_queries
from lipbounds.derivatives.norms import combine_heads, map_norm
from lipbounds.ops.spectral import product_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import inflate, product
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
    supports=("heads", "biases", "mask", "rotary", "qk_norm"),
    cost="O(H n^2 (d + n) + H D d^2); with rotary positions or QK-norm also O(H n d^3), of all heads O(H^2 n d^2 D)",
    version=2,
)
def change(block: Attention, radius: float, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """Change of the output with the attention map frozen, plus that of the map by the constant 1/2 of the softmax.

    Args:
        block: the attention block.
        radius: of the Frobenius ball around the input.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    return in_single_or_double(
        block, precision, lambda parts: _in_single(parts, radius), lambda wide: _in_double(wide, radius)
    )


def _in_single(parts: SingleParts, radius: float) -> Rounded:
    norms, maps = parts.norms, parts.map_norm
    mixing = (maps * norms.through).sum().least(parts.of_heads(parts.mixing))
    _, logits = parts.value_and_change()
    logits = logits + known(radius * parts.scale * norms.logits)
    values = parts.through_output + known(radius * norms.through)
    return (mixing + (logits * values * 0.5).sum()) * OWN_ROUNDING


def _in_double(wide: Attention, radius: float) -> tuple[Tensor, Terms]:
    maps, through = map_norm(wide), wide.weight_norms.through
    by_sum = inflate((maps * through).sum(-1), wide.heads)
    mixing = torch.minimum(by_sum, combine_heads(wide, maps * wide.weight_norms.values))
    logits = change_from_centre(wide, radius, change_by_queries(wide))
    values = product_norm_upper(*wide.value_factors, wide.w_o) + radius * through
    softmax_part = product(logits, abs(wide.scale_value) / 2, values).sum(-1)
    value = inflate(mixing + softmax_part, wide.heads + 16)
    return value, {"mixing": mixing, "softmax_part": softmax_part}
