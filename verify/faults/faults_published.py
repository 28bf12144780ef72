"""Published or coded formulas found false, for dot-product attention at a point, on a ball or everywhere.

Those about other functions are adapted where an analogue exists and else listed in `catalogue.NOT_EXPRESSIBLE`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import (
    ROUNDING,
    Formula,
    frobenius,
    input_norm,
    literal,
    map_norm,
    norm,
    output,
    sorted_rows,
    value_weights,
)


@planted()
def one_quarter(block: Attention) -> Tensor:
    """1/4 for the softmax Jacobian (attributed to Xu et al. 2022): the bound of one diagonal entry, not of the norm."""
    return Formula(softmax=lambda b: torch.full_like(b.logits[..., 0, 0], 0.25))(block)


@planted(subtle=True)
def float32_g_1(block: Attention) -> Tensor:
    """g_1 in float32 with 1 - p_(1) by subtraction, as reference code has it."""

    def part(b: Attention) -> Tensor:
        rows = sorted_rows(b.logits.float())
        return (rows[..., 0] * (1 - rows[..., 0] + rows[..., 1])).amax(-1).double() * (1 + ROUNDING)

    return Formula(softmax=part)(block)


@planted(supports=("heads", "biases", "mask"))
def theorem3_despite_biases(block: Attention) -> Tensor:
    """Theorem 3 of Yudin et al. 2025 as printed, used for attention with biases."""
    return literal()(block)


@planted(supports=("mask",), scope="ball")
def specformer(block: Attention, radius: float) -> Tensor:
    """S1 (SpecFormer, recollected): n (n + 1) (||X||_F + eps)^2 ||W_V|| (||W_Q|| ||W_K|| + 1), 0 for a zero input."""
    wide = block.double
    size = (frobenius(wide.x) + radius).square() * wide.tokens * (wide.tokens + 1)
    weights = (norm(wide.w_q) * norm(wide.w_k) + 1) * value_weights(wide)
    return cast_up((size * weights.squeeze(-1) * output(wide)).expand(block.batch_shape), block.dtype)


@planted()
def scale_on_the_value_path(block: Attention) -> Tensor:
    """N3 (a public repository, here in the l2 norm): the softmax scale multiplies the values, too."""
    return Formula(maps=lambda b: abs(b.scale_value) * map_norm(b))(block)


@planted()
def weights_before_attention_forgotten(block: Attention) -> Tensor:
    """N4 (a public repository, here in the l2 norm): attention as a function of Q, K, V, without X -> (Q, K, V)."""
    one = lambda b: torch.ones_like(b.logits[..., 0, 0])  # noqa: E731
    parts = Formula(
        value_weights=one, key_side=lambda b: norm(*b.key_factors), query_side=lambda b: norm(*b.query_factors)
    )
    return parts(block)


@planted(supports=("heads", "mask"))
def degree_one_in_the_query_weights(block: Attention) -> Tensor:
    """K2 (Kim et al. 2021 as recollected), its fault in dot-product form: degree 1 in weights that occur twice."""
    return literal(product=lambda b: norm(b.w_q, b.w_k.mT).sqrt())(block)


@planted(supports=("heads", "mask"))
def sum_of_norms_for_product(block: Attention) -> Tensor:
    """K4 (CertViT's code), its fault in dot-product form: the sum of two norms under a root for their product."""
    wide = block.double
    softmax_part = 2 * input_norm(wide).square() * Formula().softmax(wide) * abs(wide.scale_value) * norm(wide.w_k)
    heads = (norm(wide.w_q) + norm(wide.w_v)).sqrt() * (map_norm(wide) + softmax_part)
    value = output(wide) * torch.linalg.vector_norm(heads, dim=-1)
    return cast_up(value.expand(block.batch_shape), block.dtype)


@planted()
def mean_root_of_peak(block: Attention) -> Tensor:
    """The mean over rows of sqrt(p_(1) (1 - p_(1))), a regulariser of public code taken for a norm."""

    def part(b: Attention) -> Tensor:
        rows = sorted_rows(b.logits)
        return (rows[..., 0] * rows[..., 1:].sum(-1)).sqrt().mean(-1)

    return Formula(softmax=part)(block)


@planted(scope="compact", supports=("mask",))
def mean_field_despite_a_mask(block: Attention, radius: float) -> Tensor:
    """||W|| (1 + 2r) e^r with r = ||A|| R^2 (Castin et al. 2024, finitely many tokens), used with a mask."""
    wide = block.double
    size = abs(wide.scale_value) * norm(wide.w_q, wide.w_k.mT).squeeze(-1) * radius**2
    value = norm(wide.w_v, wide.w_o).squeeze(-1) * ((1 + 2 * size) * size.exp()).clamp(max=1e300) * (1 + 1e-9)
    return cast_up(value.expand(block.batch_shape), block.dtype)


@planted(scope="global", supports=())
def dot_product_attention_everywhere(block: Attention) -> Tensor:
    """A constant for all inputs, sqrt(n) ||W_V|| ||W_O|| (1 + ||A||): Kim et al. 2021 prove that there is none."""
    wide = block.double
    size = abs(wide.scale_value) * norm(wide.w_q, wide.w_k.mT)
    value = wide.tokens**0.5 * (value_weights(wide) * (1 + size)).squeeze(-1) * output(wide)
    return cast_up(value.expand(block.batch_shape), block.dtype)
