r"""Rotary positions: each query and key turned by an angle of its token, pair of features by pair of features.

A rotation is a tensor `[*batch, tokens, 2, pairs]`: the cosines (index 0) and the sines (index 1) of the angles of each
token. With r pairs, features e and e + r of a query or key are pair e, as in Llama (half-split layout); features from
2 r on stay as they are (partial rotary). Pairs of neighbouring features (GPT-J) are the same after one permutation of
the columns of W_Q and W_K (and of b_Q, b_K), which leaves the logits alone.

What is meant is the function that the given floats define, and no float pair satisfies c^2 + s^2 = 1 exactly. It need
not: for any c, s the 2 x 2 matrix [[c, -s], [s, c]] is sqrt(c^2 + s^2) times an orthogonal one. So the matrix of a
token has exactly the norm of its largest sqrt(c^2 + s^2) (and at least 1 with features left alone), its transpose has
the same, and with rho the largest over tokens and pairs |R_i v| <= rho |v|. Bounds use rho rounded up, never 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import inflate


def rotate(
    vectors: Float[Tensor, "*batch heads n head_dim"], rotation: Float[Tensor, "*rotary n 2 pairs"] | None
) -> Float[Tensor, "*out heads n head_dim"]:
    """The queries or keys of all heads turned by the rotation of their token; unchanged for None.

    Args:
        vectors: queries or keys.
        rotation: cosines and sines.
    """
    return vectors if rotation is None else _turned(vectors, *_cos_sin(rotation))


def rotate_back(
    vectors: Float[Tensor, "*batch heads n head_dim"], rotation: Float[Tensor, "*rotary n 2 pairs"] | None
) -> Float[Tensor, "*out heads n head_dim"]:
    """The transpose of `rotate`, for covectors; it is the inverse up to the rounding of cosines and sines.

    Args:
        vectors: one covector a token and head.
        rotation: cosines and sines.
    """
    if rotation is None:
        return vectors
    cos, sin = _cos_sin(rotation)
    return _turned(vectors, cos, -sin)


def rotate_sizes(
    sizes: Float[Tensor, "*batch heads n head_dim"], rotation: Float[Tensor, "*rotary n 2 pairs"] | None
) -> Float[Tensor, "*out heads n head_dim"]:
    """|R_i| times non-negative entries: bounds every entry of `rotate` and of `rotate_back` of what they bound.

    Args:
        sizes: non-negative.
        rotation: cosines and sines.
    """
    if rotation is None:
        return sizes
    cos, sin = _cos_sin(rotation.abs())
    return _combined(sizes, cos, sin, sin)


def rotation_norm(
    rotation: Float[Tensor, "*rotary n 2 pairs"] | None, like: Float[Tensor, "*weights heads"]
) -> Float[Tensor, "*rotary_or_one one"]:
    """Upper bound on the norm of every R_i, with an axis for the heads; 1 for None.

    Args:
        rotation: cosines and sines in float64.
        like: gives dtype and device where there is no rotation.
    """
    if rotation is None:
        return torch.ones_like(like[..., :1])
    lengths = rotation.square().sum(-2).sqrt().amax((-2, -1))
    return inflate(lengths, 4).clamp(min=1.0).unsqueeze(-1)  # 1 for the features that are left alone


def rotation_matrices(
    rotation: Float[Tensor, "*rotary n 2 pairs"], head_dim: int
) -> Float[Tensor, "*rotary one n head_dim head_dim"]:
    """R_i of each token as a matrix, with an axis for the heads.

    Args:
        rotation: cosines and sines.
        head_dim: width of queries and keys.
    """
    identity = torch.eye(head_dim, dtype=rotation.dtype, device=rotation.device)
    units = identity.unsqueeze(-2).expand(-1, rotation.shape[-3], -1)  # a unit vector a head
    return rotate(units, rotation).movedim(-3, -1).unsqueeze(-4)


def _cos_sin(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Both with an axis for the heads: [*rotary, 1, n, pairs]."""
    cos, sin = rotation.unsqueeze(-4).unbind(-2)
    return cos, sin


def _turned(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _combined(vectors, cos, -sin, sin)


def _combined(vectors: Tensor, cos: Tensor, into_first: Tensor, into_second: Tensor) -> Tensor:
    """[[cos, into_first], [into_second, cos]] times each pair."""
    pairs = cos.shape[-1]
    first, second, rest = vectors.split([pairs, pairs, vectors.shape[-1] - 2 * pairs], -1)
    turned = [first * cos + second * into_first, second * cos + first * into_second]
    return torch.cat([*turned, rest.expand(*turned[0].shape[:-1], rest.shape[-1])], -1)
