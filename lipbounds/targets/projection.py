"""Tokens into the heads and out of them: the linear parts of an attention block."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def project(
    tokens: Float[Tensor, "*batch n dim"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
    bias: Float[Tensor, "*weights heads head_dim"] | None = None,
) -> Float[Tensor, "*out heads n head_dim"]:
    """Tokens times the weights of each head, plus its bias."""
    if weights.dim() == 3 and tokens.dim() > 2:  # one product: to broadcast the weights would copy them for each item
        heads, _, width = weights.shape
        product = (tokens @ weights.movedim(0, 1).flatten(1)).unflatten(-1, (heads, width)).transpose(-3, -2)
    else:
        product = tokens.unsqueeze(-3) @ weights
    return product if bias is None else product + bias.unsqueeze(-2)


def project_heads(
    tokens: Float[Tensor, "*batch n dim"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
    bias: Float[Tensor, "*weights heads head_dim"] | None = None,
) -> Float[Tensor, "*out heads n head_dim"]:
    """As `project`, by one product for all heads where the weights are those of one block: nearly twice as fast."""
    if weights.dim() != 3:
        return project(tokens, weights, bias)
    heads, _, width = weights.shape
    product = tokens @ weights.transpose(0, 1).flatten(1)
    if bias is not None:
        product = product + bias.flatten()
    return product.unflatten(-1, (heads, width)).movedim(-2, -3).contiguous()


def merge_heads(
    per_head: Float[Tensor, "*batch heads n value_dim"], w_o: Float[Tensor, "*weights heads value_dim out_dim"]
) -> Float[Tensor, "*out n out_dim"]:
    """Sum over heads of the head outputs times their output weights."""
    if w_o.dim() == 3 and per_head.dim() > 3:
        return per_head.transpose(-3, -2).flatten(-2) @ w_o.flatten(0, 1)
    return (per_head @ w_o).sum(-3)


def affine_factors(
    tokens: Float[Tensor, "*batch n dim"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
    bias: Float[Tensor, "*weights heads head_dim"] | None,
) -> tuple[Tensor, Tensor]:
    """[tokens 1] and [weights; bias], or just tokens and weights."""
    return affine_tokens(tokens, bias), affine_weights(weights, bias)


def affine_tokens(
    tokens: Float[Tensor, "*batch n dim"], bias: Float[Tensor, "*weights heads head_dim"] | None
) -> Float[Tensor, "*batch one n dim_or_more"]:
    """[tokens 1], or just the tokens where there is no bias, with an axis for the heads."""
    tokens = tokens.unsqueeze(-3)
    return tokens if bias is None else torch.cat([tokens, torch.ones_like(tokens[..., :1])], -1)


def affine_weights(
    weights: Float[Tensor, "*weights heads dim head_dim"], bias: Float[Tensor, "*weights heads head_dim"] | None
) -> Float[Tensor, "*weights heads dim_or_more head_dim"]:
    """[weights; bias], or just the weights."""
    return weights if bias is None else torch.cat([weights, bias.unsqueeze(-2)], -2)
