"""Emadi 2026: sharp softmax norms in l_inf to l_1, and length-free bounds of attention (arXiv 2602.18849).

In the norm max_i |x_i| of the tokens, at a point, for any mask and any number of tokens:

    balanced_mass:  ||W_V|| + s max_i theta(P_i) ( max_j |W_Q k_j| + |W_K q_i| ) max_j |v_j|

| symbol | meaning |
|---|---|
| theta(p) | ||J(p)|| from l_inf to l_1, the balanced-mass factor, in [0, 1] |
| k_j, v_j | keys and values, without their biases |

Where only the query moves, the first and the last term are absent; where only the memory moves, that with W_Q is. Heads
(ours): ||W_O|| sqrt(sum_h L_h^2), for each token. Of the paper only the abstract was read; the bound is derived:
docs/bounds/emadi2026.md.

Numerics: float64; the rounding of the logits moves theta by a factor within e^{4 eta}
(lipbounds.derivatives.rounding.logits), as it is a product of two probabilities of subsets. At a block of more than 12
keys in a shorter dtype, on the CPU: float32 with its rounding proved and added (lipbounds.derivatives.first.
single_parts), where that adds under 5 %; `details["bits"]` says which, and `precision="float64"` asks for float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.single_parts import SingleParts, in_single_or_double
from lipbounds.derivatives.first.single_precision import Precision, Rounded, known
from lipbounds.derivatives.first.single_softmax import theta_of_long_rows
from lipbounds.derivatives.norms import combine_heads
from lipbounds.derivatives.rounding.logits import logit_error
from lipbounds.ops.softmax import ENUMERATED_LENGTH, inf_to_one_norm_upper
from lipbounds.ops.spectral import row_norms_upper, spectral_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import SMALLEST_NORMAL, inflate, product
from lipbounds.targets.attention import Attention


@bound(
    name="emadi2026.balanced_mass",
    claim=Claim(kind="proved", scope="point", norm="token"),
    source=Source(
        title="Balanced-mass factor of the softmax Jacobian",
        authors="Emadi",
        year=2026,
        arxiv="2602.18849",
        statement="factor named in the abstract, attention bound derived here",
    ),
    supports=("heads", "biases", "mask", "cross", "some_queries"),
    cost="O(H n^2 + H n D d)",
    version=2,
)
def balanced_mass(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """The balanced-mass factor of each attention row, and the largest key, query and value: free of the length.

    Args:
        block: the attention block.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    if block.source_input.shape[-2] <= ENUMERATED_LENGTH:  # so small that float32 saves nothing
        return in_single_or_double(block, precision, None, _in_double)
    return in_single_or_double(block, precision, _in_single, _in_double)


def _in_single(parts: SingleParts) -> Rounded:
    change = known(torch.zeros_like(parts.maps.error[..., :1]))
    if parts.block.query_moves:
        change = change + parts.key_reach
    if parts.block.memory_moves:
        change = change + parts.query_lengths
    heads = (theta_of_long_rows(parts.maps) * change).largest() * parts.largest_value * parts.scale
    return parts.of_heads(heads + known(parts.norms.values) if parts.block.memory_moves else heads)


def _in_double(wide: Attention) -> tuple[Tensor, Terms]:
    tokens = wide.source_input.unsqueeze(-3)
    theta = _theta(wide)
    change = torch.zeros_like(theta)
    if wide.query_moves:
        change = change + row_norms_upper(tokens, wide.w_k, wide.w_q.mT).amax(-1, keepdim=True)
    if wide.memory_moves:
        change = change + row_norms_upper(*wide.query_factors, wide.w_k.mT)
    largest_value = row_norms_upper(tokens, wide.w_v).amax(-1)
    softmax_part = product(product(theta, change).amax(-1), abs(wide.scale_value), largest_value)
    mixing = spectral_norm_upper(wide.w_v) if wide.memory_moves else torch.zeros_like(softmax_part)
    value = inflate(combine_heads(wide, mixing + softmax_part), 24)
    return value, {"detail.softmax_part": softmax_part, "detail.theta": theta.amax((-2, -1))}


def _theta(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """theta of each row, rounded up; never above 1, which always holds."""
    slack = (4 * logit_error(block) + 2.0**-50 * (block.logits.shape[-1] + 16)).clamp(max=600.0).exp()
    lost = 8 * block.logits.shape[-1] * SMALLEST_NORMAL  # what underflow of the probabilities takes off
    return (inf_to_one_norm_upper(block.probabilities) * slack + lost).clamp(max=1.0)
