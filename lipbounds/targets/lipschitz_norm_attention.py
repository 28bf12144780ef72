r"""Dot-product attention with LipschitzNorm (Dasoulas, Scaman, Virmaux 2021, arXiv 2103.04886).

| paper | here | shape |
|---|---|---|
| Q, K, V | `queries`, `keys`, `values` | m x d, n x d, n x d_v |
| u, v, w | ||Q||_F, max_j |k_j|, max_j |v_j| | |
| P | row softmax of Q K^T / max(u v, u w, v w) | m x n |
| Att | `forward()` | P V, m x d_v |

Queries, keys and values are independent inputs here, as in the paper's theorem: what moves is the vector of all their
entries, whose Euclidean norm is the Frobenius norm of (Q, K, V). Where they are X W_Q, X W_K, X W_V, multiply a bound
by the spectral norm of [W_Q W_K W_V]. The scores are read from the released code, for one neighbourhood of all keys.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput
from lipbounds.targets._tensor_target import TensorTarget, check_shapes, check_tensors


@dc.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LipschitzNormAttention(TensorTarget):
    """One head of attention with normalised scores at given queries, keys and values, frozen; without a mask.

    Args:
        queries: Q.
        keys: K.
        values: V.

    Raises:
        InvalidInput: a shape, dtype or device does not fit; an entry is NaN or infinite; two of Q, K, V are zero, where
            the scores are not defined.
    """

    trailing: ClassVar[dict[str, int]] = {"queries": 2, "keys": 2, "values": 2}

    queries: Float[Tensor, "*#batch m dim"]
    keys: Float[Tensor, "*#batch n dim"]
    values: Float[Tensor, "*#batch n value_dim"]

    def __post_init__(self) -> None:
        check_tensors(self)
        n, dim = self.keys.shape[-2:]
        check_shapes(self, {"queries": (self.queries.shape[-2], dim), "values": (n, self.values.shape[-1])})
        largest = _largest_product(*(tensor.detach().double() for tensor in self._parts))
        if not bool(((largest > 0) & largest.isfinite()).all()):
            raise InvalidInput(
                "the scores divide by the largest product of two of ||queries||, max|keys|, max|values|, which must be "
                f"positive and finite, got {largest.flatten().tolist()[:4]}; at most one of the three may be zero."
            )

    @cached_property
    def moving_input(self) -> Float[Tensor, "*batch entries"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All entries of Q, K and V in a row."""
        return torch.cat(
            [tensor.expand(*self.batch_shape, *tensor.shape[-2:]).flatten(-2) for tensor in self._parts], -1
        )

    @cached_property
    def features(self) -> frozenset[Feature]:
        return frozenset()

    def at(self, moving: Float[Tensor, "*batch entries"]) -> LipschitzNormAttention:
        """The same block at other queries, keys and values."""
        queries, keys, values = self._split(moving)
        return self.replace(queries=queries, keys=keys, values=values)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The block as a plain function of its entries, without validation, for automatic differentiation."""

        def call(moving: Tensor) -> Tensor:
            queries, keys, values = self._split(moving)
            largest = _largest_product(queries, keys, values)[..., None, None]
            return (queries @ keys.mT / largest).softmax(-1) @ values

        return call

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries, self.keys, self.values

    def _split(self, moving: Tensor) -> tuple[Tensor, ...]:
        shapes = [part.shape[-2:] for part in self._parts]
        pieces = moving.split([shape.numel() for shape in shapes], -1)
        return tuple(piece.unflatten(-1, shape) for piece, shape in zip(pieces, shapes, strict=True))


def _largest_product(
    queries: Float[Tensor, "*#batch m dim"],
    keys: Float[Tensor, "*#batch n dim"],
    values: Float[Tensor, "*#batch n value_dim"],
) -> Float[Tensor, "*batch"]:
    """max(u v, u w, v w)."""
    u, v, w = queries.flatten(-2).norm(dim=-1), keys.norm(dim=-1).amax(-1), values.norm(dim=-1).amax(-1)
    return torch.stack(torch.broadcast_tensors(u * v, u * w, v * w), -1).amax(-1)
