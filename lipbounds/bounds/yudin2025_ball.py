r"""Theorem 3 of Yudin et al. 2025 extended to a ball (ours): every factor of its proof bounded over the ball.

The ball is ||X - X0||_F <= eps in the input that moves; it is convex, so the supremum of the Jacobian norm over it is
the Lipschitz constant on it. The suprema of the factors of the bias-aware form (lipbounds.bounds.yudin2025) and their
proofs are in lipbounds.derivatives.ball.logits; at eps = 0 this is the bias-aware form at the point. With QK-norm how
far the logits move is the smaller of that and of the norms of weights, queries and keys apart, as normalised queries
and keys have bounded norms (lipbounds.derivatives.ball.turned_products).

Numerics: float64; at a block in a shorter dtype, on the CPU, float32 with its rounding proved and added
(lipbounds.derivatives.ball.single_precision), where that adds under 5 %; `details["bits"]` says which it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.ball.logits import logit_change, theorem_3_on_ball
from lipbounds.derivatives.ball.logits import logit_radius as logit_radius
from lipbounds.derivatives.ball.single_precision import theorem_3_on_ball_in_single_precision
from lipbounds.derivatives.ball.turned_products import apart_on_ball
from lipbounds.derivatives.first.single_parts import in_single_or_double
from lipbounds.derivatives.first.single_precision import Precision
from lipbounds.registry import Terms, bound
from lipbounds.targets.attention import Attention


@bound(
    name="yudin2025_ball.biased",
    claim=Claim(kind="proved", scope="ball", norm="l2"),
    source=Source(
        title="lipbounds",
        authors="after Yudin, Gaponov, Kudriashov, Rakhuba",
        year=2025,
        arxiv="2507.07814",
        statement="proof of Theorem 3 over a ball, derived here",
    ),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 (d + n) + H n D d + H D d^2); with rotary positions or QK-norm also O(H n^2 d D + H n d^3)",
    version=4,
)
def biased(block: Attention, radius: float, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """Bias-aware Theorem 3 with every factor bounded over the Frobenius ball of the given radius.

    Args:
        block: the attention block.
        radius: of the ball.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """

    def in_float64(wide: Attention) -> tuple[Tensor, Terms]:
        change = logit_change(wide, radius)
        if wide.query_norm is not None:
            change = torch.minimum(change, apart_on_ball(wide, radius))
        value, parts = theorem_3_on_ball(wide, radius, change=change)
        return value, {f"detail.{name}": part for name, part in parts.items()}

    return in_single_or_double(
        block, precision, lambda parts: theorem_3_on_ball_in_single_precision(parts, radius), in_float64
    )
