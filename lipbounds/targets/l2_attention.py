r"""L2 attention with tied queries and keys at one input (Kim, Papamakarios, Mnih 2021, arXiv 2006.04710).

| paper | here | shape |
|---|---|---|
| X | `x` | n tokens, D features |
| W^{Q,h} = W^{K,h}, W^{V,h} | `w_q[h]`, `w_v[h]` | D x d, D x d_v |
| W^O | `w_o[h]`: its rows of head h | d_v x D_out |
| 1/sqrt(D/H) | `scale` s | 1/sqrt(d) |
| A_h | s W_Q^h W_Q^hT | D x D |
| P^h | row softmax of -s |x_i^T W_Q^h - x_j^T W_Q^h|^2 | n x n |
| F | `forward()` | sum_h P^h X A_h W_V^h W_O^h, n x D_out |

Recollected from the paper; its text was not read here.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.targets._tensor_target import TensorTarget, check_shapes, check_tensors


@dc.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class L2Attention(TensorTarget):
    """A multi-head block of L2 attention with W_Q = W_K at one input, frozen; without masks, biases and dropout.

    Args:
        x: the tokens.
        w_q: query and key weights, one matrix a head.
        w_v: value weights, which meet X A_h, not X.
        w_o: output weights, one matrix a head: the rows of the usual output projection that belong to the head.

    Raises:
        InvalidInput: a shape, dtype or device does not fit; an entry is NaN or infinite.
    """

    trailing: ClassVar[dict[str, int]] = {"x": 2, "w_q": 3, "w_v": 3, "w_o": 3}

    x: Float[Tensor, "*#batch n dim"]
    w_q: Float[Tensor, "*#weights heads dim head_dim"]
    w_v: Float[Tensor, "*#weights heads dim value_dim"]
    w_o: Float[Tensor, "*#weights heads value_dim out_dim"]

    def __post_init__(self) -> None:
        check_tensors(self)
        heads, dim, value_dim = self.w_v.shape[-3:]
        check_shapes(
            self,
            {
                "x": (self.tokens, dim),
                "w_q": (heads, dim, self.w_q.shape[-1]),
                "w_o": (heads, value_dim, self.w_o.shape[-1]),
            },
        )

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.w_q.shape[-3]

    @property
    def tokens(self) -> int:
        """Number of tokens n."""
        return self.x.shape[-2]

    @property
    def scale(self) -> float:
        """Factor s = 1/sqrt(d) of the squared distances, and of A_h."""
        return self.w_q.shape[-1] ** -0.5

    @property
    def moving_input(self) -> Tensor:
        return self.x

    @cached_property
    def features(self) -> frozenset[Feature]:
        return frozenset({"heads"} if self.heads > 1 else ())

    def at(self, moving: Float[Tensor, "*batch n dim"]) -> L2Attention:
        """The same block at other tokens."""
        return self.replace(x=moving)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The block as a plain function of its tokens, without validation, for automatic differentiation."""

        def call(x: Tensor) -> Tensor:
            queries = x.unsqueeze(-3) @ self.w_q
            # A token attends itself the most: relative to it, neither one-hot rows nor a common offset lose digits.
            away = queries.unsqueeze(-2) - queries.unsqueeze(-3)
            maps = (-self.scale * away.square().sum(-1)).softmax(-1)
            averages = queries - (maps.unsqueeze(-2) @ away).squeeze(-2)
            mixed = self.scale * averages @ self.w_q.mT  # P X A_h
            return (mixed @ self.w_v @ self.w_o).sum(-3)

        return call
