"""Wrong norms where each key has a gradient of the logits of its own, as with rotary positions."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from lipbounds.targets.rotary import rotate, rotate_back
from verify.faults.fault import UNNORMED, planted
from verify.faults.right import ROUNDING, jacobian_error


ALL = UNNORMED


def pulled_queries(block: Attention) -> Float[Tensor, "*batch heads n m head_dim"]:
    """R_j^T q_i for each query i and key j."""
    keys = block.source_input.shape[-2]
    queries = block.queries.movedim(-2, 0).unsqueeze(-2)  # [n, *batch, H, 1, d]
    return rotate_back(queries.expand(*queries.shape[:-2], keys, -1), block.key_rotation).movedim(0, -3)


def turned_covariances(block: Attention, cross: Tensor) -> Float[Tensor, "*batch heads n value_dim head_dim"]:
    """Cov_i(V, K) R_i; the rows of its transpose are turned back."""
    return rotate_back(cross.movedim(-2, 0), block.query_rotation).movedim(0, -2)


@dc.dataclass(frozen=True, kw_only=True)
class Differential:
    """The norm of the Jacobian, put together from the three parts of the differential; parts can be replaced.

    Args:
        pulled: R_j^T q_i, which W_K makes the gradient of the logits of query i in key j of.
        cross: of Cov_i(V, K), what W_Q^T meets.
    """

    pulled: Callable[[Attention], Tensor] = pulled_queries
    cross: Callable[[Attention, Tensor], Tensor] = turned_covariances

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        maps, values, keys = wide.probabilities, wide.values, wide.keys
        spread = maps.unsqueeze(-1) * (values.unsqueeze(-3) - (maps @ values).unsqueeze(-2))
        jacobian = values.new_zeros(())
        if wide.memory_moves:
            gradients = wide.scale_value * self.pulled(wide) @ wide.w_k.mT.unsqueeze(-3)
            jacobian = torch.einsum("...hijv,...hva,...hijb->...iajb", spread, wide.w_o, gradients)
            jacobian = jacobian + torch.einsum("...hij,...hva,...hbv->...iajb", maps, wide.w_o, wide.w_v)
        if wide.query_moves:
            apart = keys.unsqueeze(-3) - (maps @ keys).unsqueeze(-2)
            cross = wide.scale_value * self.cross(wide, spread.mT @ apart)
            own = torch.einsum("...hva,...hivd,...hbd->...iab", wide.w_o, cross, wide.w_q)
            rows = wide.of_queries(torch.eye(wide.x.shape[-2], dtype=torch.float64))
            jacobian = jacobian + own.unsqueeze(-2) * rows[:, None, :, None]
        found = torch.linalg.matrix_norm(jacobian.flatten(-2).flatten(-3, -2), 2)
        value = found * (1 + ROUNDING) + 4 * jacobian_error(block)
        return cast_up(value.expand(block.batch_shape), block.dtype).detach()


def _unturned(block: Attention) -> Tensor:
    pulled = pulled_queries(block)
    return rotate_back(block.queries, block.query_rotation).unsqueeze(-2).expand_as(pulled)


def _the_wrong_way(block: Attention) -> Tensor:
    keys = block.source_input.shape[-2]
    queries = block.queries.movedim(-2, 0).unsqueeze(-2)
    return rotate(queries.expand(*queries.shape[:-2], keys, -1), block.key_rotation).movedim(0, -3)


@planted(supports=ALL)
def gradient_of_unturned_queries(block: Attention) -> Tensor:
    """The gradient in a key made of the query before it was turned: the two turns taken to cancel."""
    return Differential(pulled=_unturned)(block)


@planted(supports=ALL, subtle=True)
def key_turned_the_wrong_way(block: Attention) -> Tensor:
    """The turn of a key in place of its transpose, which pulls the query back."""
    return Differential(pulled=_the_wrong_way)(block)


@planted(supports=ALL)
def query_part_without_the_turn(block: Attention) -> Tensor:
    """Cov_i(V, K) W_Q^T with turned keys, without the turn of the query between them."""
    return Differential(cross=lambda block, cross: cross)(block)
