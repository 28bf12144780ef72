r"""Scaled cosine similarity attention at one input (Qi et al. 2023, LipsFormer, arXiv 2304.09856).

| paper | here | shape |
|---|---|---|
| X | `x` | n tokens, D features |
| W_Q, W_K, W_V | `w_q`, `w_k`, `w_v` | D x d, D x d, D x d_v |
| tau | `scale`: factor of the logits, an inverse temperature | |
| nu | `output_scale` | |
| eps | `eps` | |
| q_i, k_i, v_i | rows z of X W_Q, X W_K, X W_V, each divided by sqrt(|z|^2 + eps) | |
| SCSA | `forward()` | nu softmax(tau Q K^T) V, n x d_v |

The additive eps is what makes the map Lipschitz: the released code normalises by the plain norm and leaves the values
alone, and no bound here covers that.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.targets._tensor_target import TensorTarget, check_positive, check_shapes, check_tensors


@dc.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CosineAttention(TensorTarget):
    """One head of scaled cosine similarity attention at one input, frozen; without masks and biases.

    Args:
        x: the tokens.
        w_q: query weights.
        w_k: key weights.
        w_v: value weights.
        scale: factor tau of the logits, which lie between -tau and tau.
        output_scale: factor nu of the output.
        eps: added to the squared norm before each query, key and value is divided by its root.

    Raises:
        InvalidInput: a shape, dtype or device does not fit; an entry is NaN or infinite; a number is not positive.
    """

    trailing: ClassVar[dict[str, int]] = {"x": 2, "w_q": 2, "w_k": 2, "w_v": 2}

    x: Float[Tensor, "*#batch n dim"]
    w_q: Float[Tensor, "*#weights dim head_dim"]
    w_k: Float[Tensor, "*#weights dim head_dim"]
    w_v: Float[Tensor, "*#weights dim value_dim"]
    scale: float = 1.0
    output_scale: float = 1.0
    eps: float

    def __post_init__(self) -> None:
        check_tensors(self)
        dim, head_dim = self.w_q.shape[-2:]
        check_shapes(self, {"x": (self.tokens, dim), "w_k": (dim, head_dim), "w_v": (dim, self.w_v.shape[-1])})
        check_positive(scale=self.scale, output_scale=self.output_scale, eps=self.eps)

    @property
    def tokens(self) -> int:
        """Number of tokens n."""
        return self.x.shape[-2]

    @property
    def moving_input(self) -> Tensor:
        return self.x

    @cached_property
    def features(self) -> frozenset[Feature]:
        return frozenset()

    def at(self, moving: Float[Tensor, "*batch n dim"]) -> CosineAttention:
        """The same block at other tokens."""
        return self.replace(x=moving)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The block as a plain function of its tokens, without validation, for automatic differentiation."""

        def call(x: Tensor) -> Tensor:
            queries, keys, values = (self._normalised(x @ weights) for weights in (self.w_q, self.w_k, self.w_v))
            return self.output_scale * (self.scale * queries @ keys.mT).softmax(-1) @ values

        return call

    def _normalised(self, rows: Tensor) -> Tensor:
        return rows / (rows.square().sum(-1, keepdim=True) + self.eps).sqrt()
