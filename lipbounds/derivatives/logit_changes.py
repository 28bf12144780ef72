"""How far the logits move with queries and with keys: the norms in the softmax part of Theorem 3 and its relatives.

s ||K W_Q^T|| and s ||Q W_K^T||; with rotary positions or QK-norm s max_i ||K T_i W_Q^T|| and s max_j ||Q T_j W_K^T||,
T the map of each token (lipbounds.derivatives.token_maps). Proof and rounding: docs/derivatives.md, section 9.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_by_head
from lipbounds.derivatives.rounding.logits import key_error, query_error
from lipbounds.derivatives.token_maps import TokenMaps, key_maps, query_maps
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.projection import affine_tokens
from lipbounds.targets.rotary import rotation_norm


@cached_by_head
def change_by_queries(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||K W_Q^T||, or max_i ||K T_i W_Q^T|| with rotary positions or QK-norm.

    Args:
        block: in float64.
    """
    maps = query_maps(block)
    if maps is None:
        tokens, norms = affine_tokens(block.source_input, block.b_k), block.weight_norms
        return product_norm_upper(tokens, norms.affine_keys, norms.query_factor, before_last=block.keys)
    return mapped_product_norm(block.keys, _total(key_error(block)), maps)


@cached_by_head
def change_by_keys(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||Q W_K^T||, or max_j ||Q T_j W_K^T|| with rotary positions or QK-norm.

    Args:
        block: in float64.
    """
    maps = key_maps(block)
    if maps is None:
        tokens, norms = affine_tokens(block.query_input, block.b_q), block.weight_norms
        return product_norm_upper(tokens, norms.affine_queries, norms.key_factor, before_last=block.queries)
    return mapped_product_norm(block.queries, _total(query_error(block)), maps)


def mapped_product_norm(
    rows: Float[Tensor, "*batch heads rows head_dim"], error: Float[Tensor, "*batch heads"], maps: TokenMaps
) -> Float[Tensor, "*out heads"]:
    """max_i ||rows T_i W^T||, rounded up.

    Args:
        rows: queries or keys as computed in float64.
        error: bound on their distance to the exact ones, in Frobenius norm.
        maps: the T_i, and W.
    """
    weights = maps.weights.mT.unsqueeze(-3)
    norms = product_norm_upper(rows.unsqueeze(-3), maps.matrices, weights).amax(-1)
    size = maps.weights.norm(dim=(-2, -1))
    moved = error * maps.norm * size
    if maps.error is not None:
        moved = moved + (rows.detach().norm(dim=(-2, -1)) + error) * maps.error * size
    return norms + inflate(moved, sum(maps.weights.shape[-2:]) + rows.shape[-2] + 8)


def query_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||Q|| of each head, after the bias, the norm and the rotation.

    Args:
        block: in float64.
    """
    plain = block.query_norm is None and block.query_rotation is None
    return product_norm_upper(*block.query_factors) if plain else _rows_norm(block.queries, query_error(block))


def key_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||K|| of each head, after the bias, the norm and the rotation.

    Args:
        block: in float64.
    """
    plain = block.key_norm is None and block.key_rotation is None
    return product_norm_upper(*block.key_factors) if plain else _rows_norm(block.keys, key_error(block))


def query_lipschitz(block: Attention) -> Float[Tensor, "*out heads"]:
    """max_i ||T_i W_Q^T||, at most the norms of the two: how far a query moves with its token.

    Args:
        block: in float64.
    """
    return _token_lipschitz(
        block.weight_norms.queries, None if block.query_norm is None else query_maps(block), block.query_rotation
    )


def key_lipschitz(block: Attention) -> Float[Tensor, "*out heads"]:
    """max_j ||T_j W_K^T||, at most the norms of the two: how far a key moves with its token.

    Args:
        block: in float64.
    """
    maps = None if block.key_norm is None else key_maps(block)
    return _token_lipschitz(block.weight_norms.keys, maps, block.key_rotation)


def _token_lipschitz(weights: Tensor, maps: TokenMaps | None, rotation: Tensor | None) -> Tensor:
    if maps is not None:
        return maps.weights_norm * maps.norm
    return weights * rotation_norm(rotation, weights)


def _rows_norm(
    rows: Float[Tensor, "*batch heads n head_dim"], error: Float[Tensor, "*batch heads n"]
) -> Float[Tensor, "*batch heads"]:
    """Each row has a map of its own, so that the rows are no product of two given matrices."""
    return spectral_norm_upper(rows) + _total(error)


def _total(error: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch heads"]:
    """Error of all rows in Frobenius norm."""
    return inflate(vector_norm(error), error.shape[-1] + 8)
