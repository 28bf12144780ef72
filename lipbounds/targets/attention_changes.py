r"""How far the logits move with queries and with keys: the norms in the softmax part of Theorem 3 and its relatives.

Without rotary positions dS = s (dX W_Q K^T + Q W_K^T dX^T), of norm at most s (||K W_Q^T|| + ||Q W_K^T||) |dX|. With
them, Q and K being turned, row i of the first part is s K R_i W_Q^T dx_i and column j of the second s Q R_j W_K^T dx_j.
The parts are block diagonal in i and in j: their norms are max_i ||K R_i W_Q^T|| and max_j ||Q R_j W_K^T||. A constant
row may be taken off K in the first part, as before (bounds/centred.py).

Rounding: turned rows are computed, with the error of `projection_error`; what is off by e in Frobenius norm moves the
norm of the product by at most e rho ||W||_F.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_rounding import projection_error
from lipbounds.targets.projection import affine_tokens
from lipbounds.targets.rotary import rotation_matrices, rotation_norm


def change_by_queries(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||K W_Q^T||, or max_i ||K R_i W_Q^T|| with rotary positions.

    Args:
        block: in float64.
    """
    if block.query_rotation is None:
        tokens, norms = affine_tokens(block.source_input, block.b_k), block.weight_norms
        return product_norm_upper(tokens, norms.affine_keys, norms.query_factor, before_last=block.keys)
    error = _total_error(block.key_factors, block.key_rotation)
    return turned_product_norm(block.keys, error, block.query_rotation, block.w_q)


def change_by_keys(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||Q W_K^T||, or max_j ||Q R_j W_K^T|| with rotary positions.

    Args:
        block: in float64.
    """
    if block.key_rotation is None:
        tokens, norms = affine_tokens(block.x, block.b_q), block.weight_norms
        return product_norm_upper(tokens, norms.affine_queries, norms.key_factor, before_last=block.queries)
    error = _total_error(block.query_factors, block.query_rotation)
    return turned_product_norm(block.queries, error, block.key_rotation, block.w_k)


def turned_product_norm(
    rows: Float[Tensor, "*batch heads rows head_dim"],
    error: Float[Tensor, "*batch heads"],
    rotation: Float[Tensor, "*rotary n 2 pairs"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
) -> Float[Tensor, "*out heads"]:
    """max_i ||rows R_i W^T||, rounded up.

    Args:
        rows: queries or keys as computed in float64.
        error: bound on their distance to the exact ones, in Frobenius norm.
        rotation: the R_i.
        weights: W.
    """
    matrices = rotation_matrices(rotation, weights.shape[-1])
    norms = product_norm_upper(rows.unsqueeze(-3), matrices, weights.mT.unsqueeze(-3)).amax(-1)
    sizes = rotation_norm(rotation, weights[..., 0, 0]) * weights.norm(dim=(-2, -1))
    return norms + inflate(error * sizes, sum(weights.shape[-2:]) + 8)


def query_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||Q|| of each head, after the bias and the rotation.

    Args:
        block: in float64.
    """
    return _rotated_norm(block.queries, block.query_factors, block.query_rotation)


def key_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||K|| of each head, after the bias and the rotation.

    Args:
        block: in float64.
    """
    return _rotated_norm(block.keys, block.key_factors, block.key_rotation)


def query_weights_norm(block: Attention) -> Float[Tensor, "*weights heads"]:
    """max_i ||R_i W_Q^T||, at most rho ||W_Q||: how far a query moves with its token.

    Args:
        block: in float64.
    """
    return block.weight_norms.queries * rotation_norm(block.query_rotation, block.w_q[..., 0, 0])


def key_weights_norm(block: Attention) -> Float[Tensor, "*weights heads"]:
    """max_j ||R_j W_K^T||, at most rho ||W_K||: how far a key moves with its token.

    Args:
        block: in float64.
    """
    return block.weight_norms.keys * rotation_norm(block.key_rotation, block.w_k[..., 0, 0])


def _rotated_norm(
    rows: Float[Tensor, "*batch heads n head_dim"], factors: tuple[Tensor, Tensor], rotation: Tensor | None
) -> Float[Tensor, "*batch heads"]:
    """Each row has a rotation of its own, so that turned rows are no product of two given matrices."""
    return (
        product_norm_upper(*factors)
        if rotation is None
        else spectral_norm_upper(rows) + _total_error(factors, rotation)
    )


def _total_error(factors: tuple[Tensor, Tensor], rotation: Tensor | None) -> Float[Tensor, "*batch heads"]:
    """Error of all turned rows in Frobenius norm."""
    error = projection_error(*factors, rotation)
    return inflate(vector_norm(error), error.shape[-1] + 8)
