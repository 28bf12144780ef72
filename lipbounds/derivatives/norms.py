"""Norms of the parts of an attention block, each rounded up: what the bounds are put together from.

All take the block in float64 (`block.double`) and cover the rounding of its logits
(lipbounds.derivatives.rounding.logits).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_by_head
from lipbounds.derivatives.rounding.logits import logit_error
from lipbounds.ops import softmax, softmax_spectrum
from lipbounds.ops.nonnegative import nonnegative_norm_upper
from lipbounds.ops.spectral import product_norm_upper, vector_norm
from lipbounds.rounding import inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.projection import affine_tokens


LARGEST_EXPONENT = 600.0  # exp of it is finite; infinite slack would make the gradient NaN


def largest_g_1(block: Attention) -> Float[Tensor, "*batch heads"]:
    """max_i g_1(P_i) of each head, at least the largest softmax Jacobian norm of its rows."""
    return row_g_1(block).amax(-1)


def row_g_1(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """g_1(P_i) of each row, at least the norm of its softmax Jacobian."""
    return _with_slack(block, softmax.g_upper_from_logits(block.logits))


def largest_softmax_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """max_i ||J(P_i)|| of each head, exact."""
    return _with_slack(block, softmax_spectrum.spectral_norm_upper_from_logits(block.logits)).amax(-1)


def _with_slack(block: Attention, norms: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch heads n"]:
    """Each row with the slack for rounded logits; never above 1/2, which always holds."""
    exponent = 4 * logit_error(block)
    blurred = (exponent > LARGEST_EXPONENT) & (norms > 0)  # a norm of 0 is that of a single visible key: exact
    slack = exponent.clamp(max=LARGEST_EXPONENT).exp()
    return torch.where(blurred, 0.5, norms * slack).clamp(max=0.5)


@cached_by_head
def map_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||P|| of each head; never above sqrt(n), which holds for n rows that sum to 1."""
    # ||P|| >= sqrt(n / m), so a larger slack ends at sqrt(n), too.
    slack = torch.exp((2 * logit_error(block).amax(-1)).clamp(max=LARGEST_EXPONENT))
    norm = inflate(nonnegative_norm_upper(block.probabilities) * slack, block.logits.shape[-1] + 16)
    return torch.clamp(norm, max=inflate(norm.new_full((), float(block.tokens)).sqrt(), 2))


def value_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||V|| of each head, with its bias."""
    tokens = affine_tokens(block.source_input, block.b_v)
    return product_norm_upper(tokens, block.weight_norms.affine_values, whole=block.values)


def output_norm(block: Attention) -> Float[Tensor, "*weights"]:
    """||W_O||, the spectral norm of the whole output projection."""
    return block.weight_norms.output


def combine_heads(block: Attention, heads: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch"]:
    """||W_O|| sqrt(sum_h L_h^2), a bound of the block from bounds L_h of its heads.

    The concatenation of functions with constants L_h has the constant sqrt(sum_h L_h^2); W_O multiplies by its norm.
    """
    value = product(output_norm(block), vector_norm(heads))
    return inflate(value, block.heads + 16).expand(block.batch_shape)


def combine_rows(block: Attention, rows: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch"]:
    """max_i ||W_O|| sqrt(sum_h L_hi^2), a bound of the largest token from bounds L_hi of each head's tokens."""
    value = product(output_norm(block), vector_norm(rows.mT).amax(-1))
    return inflate(value, block.heads + 16).expand(block.batch_shape)
