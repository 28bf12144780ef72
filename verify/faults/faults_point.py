"""Wrong formulas at a point: a factor, a head, a side or a term that is wrong or missing."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import (
    Formula,
    frobenius,
    length,
    literal,
    norm,
    value_weights,
)


LITERAL = ("heads", "mask")


def _none(block: Attention) -> Tensor:
    return torch.zeros_like(block.logits[..., 0, 0])


# -- factors and sides -----------------------------------------------------------------------------------------------


@planted(supports=LITERAL)
def factor_two_missing(block: Attention) -> Tensor:
    """||X||^2 ||A|| for the change of the logits, without the factor 2."""
    return literal(query_side=_none)(block)


@planted()
def key_side_missing(block: Attention) -> Tensor:
    """Only the first term of the product rule: keys do not move."""
    return Formula(query_side=_none)(block)


@planted()
def query_side_missing(block: Attention) -> Tensor:
    """Only the second term of the product rule: queries do not move."""
    return Formula(key_side=_none)(block)


@planted(supports=LITERAL)
def symmetric_part_of_the_product(block: Attention) -> Tensor:
    """A and its transpose together as twice the symmetric part of A: other rows than the own one move, too."""
    product = lambda b: norm((b.w_q @ b.w_k.mT + b.w_k @ b.w_q.mT) / 2)  # noqa: E731
    return literal(product=product)(block)


@planted(supports=LITERAL)
def spectral_radius(block: Attention) -> Tensor:
    """The largest eigenvalue of A in place of its largest singular value."""
    radius = lambda b: torch.linalg.eigvals((b.w_q @ b.w_k.mT).detach()).abs().amax(-1)  # noqa: E731
    return literal(product=radius)(block)


@planted()
def divided_by_head_dim(block: Attention) -> Tensor:
    """The logits divided by d in place of sqrt(d)."""
    return Formula(scale=lambda b: abs(b.scale_value) * b.w_q.shape[-1] ** -0.5)(block)


@planted()
def divided_by_root_of_model_dim(block: Attention) -> Tensor:
    """sqrt(D) of the model in place of sqrt(d) of the head."""
    return Formula(scale=lambda b: abs(b.scale_value) * (b.w_q.shape[-1] / max(b.w_q.shape[-2:])) ** 0.5)(block)


@planted()
def sign_of_scale_kept(block: Attention) -> Tensor:
    """The scale without its absolute value: a negative one lowers the bound."""
    return Formula(scale=lambda b: b.scale_value)(block)


@planted(supports=LITERAL)
def longest_token_for_input_norm(block: Attention) -> Tensor:
    """||X|| replaced by the norm of the longest token."""
    return literal(inputs=lambda b: torch.linalg.vector_norm(b.x, dim=-1).amax(-1, keepdim=True))(block)


@planted(subtle=True)
def root_of_squares_of_terms(block: Attention) -> Tensor:
    """The two terms combined as sqrt(a^2 + b^2), as though they were orthogonal."""
    return Formula(terms=torch.hypot)(block)


@planted()
def larger_of_the_terms(block: Attention) -> Tensor:
    """The larger of the two terms in place of their sum."""
    return Formula(terms=torch.maximum)(block)


# -- the attention map -----------------------------------------------------------------------------------------------


@planted()
def map_norm_one(block: Attention) -> Tensor:
    """||P|| taken as 1, because its rows sum to 1."""
    return Formula(maps=lambda b: 1.0 + _none(b))(block)


@planted()
def frobenius_over_root_of_tokens(block: Attention) -> Tensor:
    """||P||_F / sqrt(n) in place of ||P||."""
    return Formula(maps=lambda b: frobenius(b.probabilities) / b.tokens**0.5)(block)


@planted(subtle=True)
def column_sum_without_root(block: Attention) -> Tensor:
    """The largest column sum of P without the root: right for self-attention, wrong with more keys than queries."""
    return Formula(maps=lambda b: b.probabilities.sum(-2).amax(-1) * (1 + 1e-9))(block)


@planted()
def memory_does_not_mix(block: Attention) -> Tensor:
    """The term ||W_V|| ||P|| only in self-attention: missing where the memory of a cross-attention moves."""
    return Formula(value_weights=lambda b: value_weights(b) * float(b.moves == "self"))(block)


@planted()
def mask_ignored(block: Attention) -> Tensor:
    """A mask is accepted and silently ignored."""
    return Formula()(block.replace(logit_bias=None, causal=False)).expand(block.batch_shape)


@planted()
def query_bias_ignored(block: Attention) -> Tensor:
    """The query bias left out of ||Q W_K^T||, as in Theorem 3 as printed."""
    return Formula(query_side=lambda b: norm(b.x.unsqueeze(-3), b.w_q, b.w_k.mT))(block)


# -- heads and output ------------------------------------------------------------------------------------------------


@planted()
def last_head_dropped(block: Attention) -> Tensor:
    """The sum over heads ends one head early."""
    return Formula(heads=lambda heads: length(heads[..., : max(heads.shape[-1] - 1, 1)]))(block)


@planted()
def largest_head(block: Attention) -> Tensor:
    """Heads combined by their maximum in place of the root of the sum of squares."""
    return Formula(heads=lambda heads: heads.amax(-1))(block)


@planted()
def mean_of_heads(block: Attention) -> Tensor:
    """Heads combined by their mean in place of the root of the sum of squares."""
    return Formula(heads=lambda heads: heads.mean(-1))(block)


@planted()
def output_weights_forgotten(block: Attention) -> Tensor:
    """W_O left out."""
    return Formula(output=lambda b: torch.ones_like(b.w_o[..., 0, 0, 0]))(block)


@planted()
def output_weights_of_first_head(block: Attention) -> Tensor:
    """W_O of the first head for that of all heads."""
    return Formula(output=lambda b: norm(b.w_o[..., 0, :, :]))(block)


@planted()
def largest_output_weights(block: Attention) -> Tensor:
    """The largest ||W_O^h|| in place of the norm of all of them side by side."""
    return Formula(output=lambda b: norm(b.w_o).amax(-1))(block)
