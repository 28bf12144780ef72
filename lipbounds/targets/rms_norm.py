r"""QK-norm: queries and keys divided by their root mean square (RMSNorm) before they are turned by rotary positions.

For one token let z be what is projected, x W + b, of one head (d features, `over="head"`, as in Qwen3 and Gemma 3) or
of all heads side by side (H d features, `over="all_heads"`, as in OLMo 2), and D the number of its features. With r =
(|z|^2 / D + e)^(-1/2), u = r z and weights w,

    N(z) = w u,      dN = w r ( I - u u^T / D ) dz      (products with w entry by entry).

As |u|^2 = D |z|^2 / (|z|^2 + D e) < D, the matrix in brackets lies between 0 and I, so |dN| <= r max|w| |dz|. Keys of
grouped heads are repeated, each equally often, which leaves the mean over all heads as it was.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


NormOver = Literal["head", "all_heads"]
NORM_OVER: tuple[NormOver, ...] = ("head", "all_heads")


@dc.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RmsNorm:
    """The normalisation of the queries or of the keys of all heads.

    Args:
        weight: w, one vector a head.
        eps: e, added to the mean square.
        over: the features whose mean square is taken: those of a head, or of all heads of the token.
    """

    weight: Float[Tensor, "*weights heads head_dim"]
    eps: float
    over: NormOver

    @property
    def axes(self) -> tuple[int, ...]:
        """Of vectors `[*batch, heads, n, head_dim]`, those over which the mean is taken."""
        return (-1,) if self.over == "head" else (-3, -1)

    @property
    def width(self) -> int:
        """D, the number of features over which the mean is taken."""
        heads, head_dim = self.weight.shape[-2:]
        return head_dim if self.over == "head" else heads * head_dim

    def total(self, vectors: Tensor) -> Tensor:
        """The sum over the features that are normalised together, with axes of size 1 for them."""
        return vectors.sum(self.axes, keepdim=True)

    def inverse_root(
        self, vectors: Float[Tensor, "*batch heads n head_dim"]
    ) -> Float[Tensor, "*batch heads_or_one n one"]:
        """r of each token, and of each head where each has its own."""
        return torch.rsqrt(self.total(vectors.square()) / self.width + self.eps)

    def __call__(self, vectors: Float[Tensor, "*batch heads n head_dim"]) -> Float[Tensor, "*batch heads n head_dim"]:
        """N(z).

        Args:
            vectors: z, of all heads.
        """
        return vectors * self.inverse_root(vectors) * self.per_token

    def jvp(
        self, vectors: Float[Tensor, "*batch heads n head_dim"], tangent: Float[Tensor, "*extra heads n head_dim"]
    ) -> Float[Tensor, "*out heads n head_dim"]:
        """dN: the Jacobian at z times a change of z.

        Args:
            vectors: z, of all heads.
            tangent: dz; extra leading dimensions are directions.
        """
        return self._without_radial(vectors, tangent) * self.per_token

    def vjp(
        self, vectors: Float[Tensor, "*batch heads n head_dim"], cotangent: Float[Tensor, "*extra heads n head_dim"]
    ) -> Float[Tensor, "*out heads n head_dim"]:
        """The transposed Jacobian at z times a covector.

        Args:
            vectors: z, of all heads.
            cotangent: one covector a token and head; extra leading dimensions are directions.
        """
        return self._without_radial(vectors, cotangent * self.per_token)

    @property
    def per_token(self) -> Float[Tensor, "*weights heads one head_dim"]:
        """w with an axis for the tokens."""
        return self.weight.unsqueeze(-2)

    def _without_radial(self, vectors: Tensor, change: Tensor) -> Tensor:
        """r (I - u u^T / D) times a change; the matrix is symmetric, so this serves both directions."""
        root = self.inverse_root(vectors)
        unit = vectors * root
        return root * (change - unit * (self.total(unit * change) / self.width))


def normalise(
    vectors: Float[Tensor, "*batch heads n head_dim"], norm: RmsNorm | None
) -> Float[Tensor, "*batch heads n head_dim"]:
    """The queries or keys of all heads normalised; unchanged for None.

    Args:
        vectors: as projected.
        norm: of them.
    """
    return vectors if norm is None else norm(vectors)
