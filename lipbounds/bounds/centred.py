"""Theorem 3's proof with centred keys and values, ours.

    products:  ||W_V|| ||P|| + max_i ||J(P_i)|| s ||V_c|| ( ||K_c W_Q^T|| + ||Q W_K^T|| )
    weights:   ||W_V|| ||P|| + max_i ||J(P_i)|| s ||V_c|| ( ||W_Q|| ||K|| + ||W_K|| ||Q|| )
    change:    ||W_V|| ||P|| + (s/2) ( ||V_c|| + eps ||W_V|| ) ( ||K_c W_Q^T|| + ||Q W_K^T|| + eps ||W_Q W_K^T|| )

V_c and K_c are V and K minus their mean over the keys. Heads: ||W_O|| sqrt(sum_h L_h^2). Where only the query moves,
the terms with W_V and W_K are absent; where only the memory moves, that with W_Q is. Proof, rotary positions and
QK-norm: docs/bounds/centred.md.

Numerics: float64; V_c and K_c are products of the given floats [X a] and [W; -mean(X) W / a], so their rounding is
covered as that of any product. The slack is relative to the norms of the factors, so a is of the size of X. At a block
in a shorter dtype, on the CPU: float32 with its rounding proved and added (lipbounds.derivatives.first.single_parts),
where that adds under 5 %; `details["bits"]` says which it was, and `precision="float64"` asks for float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.ball.turned_products import change_from_centre
from lipbounds.derivatives.first.covariance import centred_keys
from lipbounds.derivatives.first.single_parts import SingleParts, in_single_or_double
from lipbounds.derivatives.first.single_precision import Precision, Rounded, known
from lipbounds.derivatives.logit_changes import (
    change_by_keys,
    key_lipschitz,
    key_norm,
    mapped_product_norm,
    query_lipschitz,
    query_norm,
)
from lipbounds.derivatives.norms import combine_heads, largest_softmax_norm, map_norm
from lipbounds.derivatives.token_maps import query_maps
from lipbounds.ops.spectral import power_of_two, product_norm_upper
from lipbounds.registry import Terms, bound
from lipbounds.rounding import inflate, product
from lipbounds.targets.attention import Attention


@bound(
    name="centred.products",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="centred form of Theorem 3 of Yudin et al. 2025, derived here (D1)"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 (d + n) + H D d^2); with rotary positions or QK-norm also O(H n d^3), of all heads O(H^2 n d^2 D)",
    version=4,
)
def products(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """Theorem 3 with keys and values centred: never above the bias-aware form for centred data, often far below.

    Args:
        block: the attention block.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    return in_single_or_double(block, precision, _products_in_single, _products)


def _products_in_single(parts: SingleParts) -> Rounded:
    values, change = parts.value_and_change(centre=True)
    return parts.of_heads(parts.softmax_norm * values * change + parts.mixing)


def _products(wide: Attention) -> tuple[Tensor, Terms]:
    change = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        change = change + _change_by_queries(wide)
    if wide.memory_moves:
        change = change + change_by_keys(wide)
    return _finish(wide, change)


@bound(
    name="centred.weights",
    claim=Claim(kind="proved", scope="point", norm="l2"),
    source=Source(title="lipbounds", statement="centred form with separate norms, derived here (D4)"),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(H n^2 (d + n) + H D d^2)",
    version=4,
)
def weights(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """Centred values, and the norms of W_Q, W_K, Q and K apart: the form that rotary positions leave valid.

    Args:
        block: the attention block.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    return in_single_or_double(block, precision, _weights_in_single, _weights)


def _weights_in_single(parts: SingleParts) -> Rounded:
    values, change = parts.rows_apart
    return parts.of_heads(parts.softmax_norm * values * change + parts.mixing)


def _weights(wide: Attention) -> tuple[Tensor, Terms]:
    change = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        change = change + query_lipschitz(wide) * key_norm(wide)
    if wide.memory_moves:
        change = change + key_lipschitz(wide) * query_norm(wide)
    return _finish(wide, inflate(change, 4))


@bound(
    name="centred.change",
    claim=Claim(kind="proved", scope="change", norm="l2"),
    source=Source(
        title="lipbounds", statement="change from the centre of a ball, keys and values centred, derived here"
    ),
    supports=("heads", "biases", "mask", "rotary", "qk_norm"),
    cost="O(H n^2 (d + n) + H D d^2); with rotary positions or QK-norm also O(H n d^3), of all heads O(H^2 n d^2 D)",
    version=2,
)
def change(block: Attention, radius: float, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    """The map frozen, plus its change by the constant 1/2 of the softmax, with keys and values centred.

    Args:
        block: the attention block.
        radius: of the Frobenius ball around the input.
        precision: `float64`, or `auto` for float32 where its proved rounding adds under 5 %.

    Raises:
        InvalidInput: `precision` is neither.
    """
    return in_single_or_double(
        block, precision, lambda parts: _change_in_single(parts, radius), lambda wide: _change(wide, radius)
    )


def _change_in_single(parts: SingleParts, radius: float) -> Rounded:
    values, logits = parts.value_and_change(centre=True)
    values = values + known(radius * parts.norms.values)
    logits = logits + known(radius * parts.scale * parts.norms.logits)
    return parts.of_heads(values * logits * 0.5 + parts.mixing)


def _change(wide: Attention, radius: float) -> tuple[Tensor, Terms]:
    value_weights = wide.weight_norms.values
    values = product_norm_upper(*_centred_factors(wide.x, wide.w_v)) + radius * value_weights
    logits = change_from_centre(wide, radius, _change_by_queries(wide))
    mixing = product(value_weights, map_norm(wide))
    softmax_part = product(values, abs(wide.scale_value) / 2, logits)
    value = inflate(combine_heads(wide, mixing + softmax_part), 16)
    return value, {"detail.mixing": mixing, "detail.softmax_part": softmax_part}


def _finish(wide: Attention, change: Tensor) -> tuple[Tensor, Terms]:
    values = product_norm_upper(*_centred_factors(wide.source_input, wide.w_v))
    softmax_part = product(largest_softmax_norm(wide), abs(wide.scale_value), values, change)
    mixing = torch.zeros_like(change)
    if wide.memory_moves:
        mixing = product(wide.weight_norms.values, map_norm(wide))
    value = inflate(combine_heads(wide, mixing + softmax_part), 8)
    return value, {"detail.mixing": mixing, "detail.softmax_part": softmax_part}


def _change_by_queries(block: Attention) -> Tensor:
    """||K_c W_Q^T||, or max_i ||K_c T_i W_Q^T|| with rotary positions or QK-norm."""
    maps = query_maps(block)
    if maps is None:
        return product_norm_upper(*_centred_factors(block.source_input, block.w_k), block.weight_norms.query_factor)
    keys = centred_keys(block)
    error = inflate(keys.error * keys.rows.shape[-2] ** 0.5, 4)
    return mapped_product_norm(keys.rows, error, maps)


def _centred_factors(tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """[X a] and [W; -mean(X) W / a]: their product is X W without its mean row."""
    tokens = tokens.unsqueeze(-3)
    size = power_of_two(tokens.detach())
    row = -tokens.mean(-2, keepdim=True) @ weights / size
    with_row = torch.cat([weights.expand(*row.shape[:-2], *weights.shape[-2:]), row], -2)
    return torch.cat([tokens, size.expand_as(tokens[..., :1])], -1), with_row
