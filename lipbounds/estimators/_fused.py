r"""Products with the Jacobian of self-attention without QK-norm by few large matrix products.

With W = [s W_Q  W_K  W_V] of all heads side by side and one product of inner size 2 d for both changes of the logits,

    J v:    [dq dk dv] = v W,   dS = [dq  q] [k  dk]^T,   dP = P o dS - P rowsum(P o dS),   (dP V + P dv) W_O,
    J^T u:  y = u W_O^T,        dS = J(P) (y V^T),        [dS K   dS^T Q   P^T y] W^T

(q and Q with the factor s), where `Attention.jvp` has a product for each head and part. With rotary positions dq and dk
are turned as q and k are, and dS K and dS^T Q are turned back. Sums are longer: up to H (2 d + d_v) terms at the ends.
The bound on their rounding counts these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.estimators._operator import JacobianOperator, Target
from lipbounds.ops.shapes import broadcast_shape
from lipbounds.targets.attention import Attention
from lipbounds.targets.rotary import rotate, rotate_back


class FusedOperator(JacobianOperator):
    """`JacobianOperator` that is faster where the target is self-attention without QK-norm.

    Args:
        target: the target; `products` are what makes it faster, None for another one.
    """

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.products: Products | None = None
        if isinstance(self.target, Attention) and _is_covered(self.target):
            self.products = Products(self.target)
            assert self._roundoff is not None
            self._roundoff.operations += 2 * self.products.longest_sum

    def jvp(self, v: Tensor) -> Tensor:
        if self.products is None:
            return super().jvp(v)
        return self._flat(self.products.jvp(self._item(v, self._in_shape)), self._out_shape) / self.scale[..., None]

    def vjp(self, u: Tensor) -> Tensor:
        if self.products is None:
            return super().vjp(u)
        return self._flat(self.products.vjp(self._item(u, self._out_shape)), self._in_shape) / self.scale[..., None]


def _is_covered(block: Attention) -> bool:
    return block.query_norm is None and block.memory is None and block.queries_at is None


class Products:
    """Both products of one block, or of a batch of inputs or of weights.

    Args:
        block: in float64.
    """

    def __init__(self, block: Attention) -> None:
        self.heads, dim, self.width = block.w_q.shape[-3:]
        self.value_width = block.w_v.shape[-1]
        inner = (block.scale_value * block.w_q, block.w_k, block.w_v)
        batch = broadcast_shape(weights.shape[:-3] for weights in inner)
        flat = [weights.transpose(-3, -2).flatten(-2).expand(*batch, -1, -1) for weights in inner]
        self.weights = torch.cat(flat, -1)
        self.output = block.w_o.flatten(-3, -2)
        self.maps, self.values, self.keys = block.probabilities, block.values, block.keys
        self.queries = block.scale_value * block.queries
        self.query_rotation, self.key_rotation = block.query_rotation, block.key_rotation
        self.longest_sum = self.weights.shape[-1] + self.output.shape[-2] + dim
        self.sizes = [self.heads * self.width, self.heads * self.width, self.heads * self.value_width]

    def jvp(self, tangent: Tensor) -> Tensor:
        """J v; extra leading dimensions are directions."""
        return self.after_weights(tangent @ self.weights)

    def after_weights(self, projected: Tensor) -> Tensor:
        """J v from v W."""
        parts = projected.split(self.sizes, -1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts)
        queries, keys = rotate(queries, self.query_rotation), rotate(keys, self.key_rotation)
        own = self.queries.expand_as(queries), self.keys.expand_as(keys)
        change = torch.cat([queries, own[0]], -1) @ torch.cat([own[1], keys], -1).mT
        image = self._softmax_derivative(change) @ self.values + self.maps @ values
        return image.transpose(-3, -2).flatten(-2) @ self.output

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T u, likewise."""
        # `weights` carry the scale of the first part; keys did not.
        return self.before_weights(cotangent) @ self.weights.mT

    def before_weights(self, cotangent: Tensor) -> Tensor:
        """What W^T makes J^T u of."""
        image = (cotangent @ self.output.mT).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
        change = self._softmax_derivative(image @ self.values.mT)
        by_query = rotate_back(change @ self.keys, self.query_rotation)
        by_key = rotate_back(change.mT @ self.queries, self.key_rotation)
        parts = (by_query, by_key, self.maps.mT @ image)
        return torch.cat([part.transpose(-3, -2).flatten(-2) for part in parts], -1)

    def _softmax_derivative(self, change: Tensor) -> Tensor:
        weighted = self.maps * change
        return torch.addcmul(weighted, self.maps, weighted.sum(-1, keepdim=True), value=-1)
