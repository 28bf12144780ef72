"""The norm of the dense Jacobian of small blocks, rounded up: for bounds that start from the truth at one point.

The norm of the Jacobian as computed is verified by a Cholesky factorisation (lipbounds.ops.verified_norm); how far its
entries can be from the exact ones is added. Proof: docs/derivatives.md, section 4.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_per_block, is_tracked
from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.ops.eigen import singular
from lipbounds.ops.spectral import vector_norm
from lipbounds.ops.verified_norm import verified_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention


BATCH_ENTRIES = 2**25  # of all Jacobians of a batch at once; larger batches go item by item


def jacobian_entries(block: Attention) -> int:
    """Entries of the Jacobian of one batch item."""
    return block.moving_input.shape[-2:].numel() * block.tokens * block.w_o.shape[-1]


@cached_per_block
def dense_norm(block: Attention) -> Float[Tensor, "*batch"]:
    """Spectral norm of the Jacobian, rounded up; differentiable, with the top right singular vector held fixed.

    Args:
        block: in float64; the caller sees to it that its Jacobian is small (`jacobian_entries`).
    """
    if block.batch_shape.numel() * jacobian_entries(block) > BATCH_ENTRIES and block.batch_shape.numel() > 1:
        items = [dense_norm(item) for item in batch_items(block)]
        return torch.stack(items).reshape(block.batch_shape)
    moving = block.moving_input
    with torch.no_grad():
        # A copy of its own: what a block caches under no_grad cuts gradients.
        frozen = block.at(moving.detach())
        jacobian = _jacobian(frozen)
        finite = jacobian.isfinite().all(-1).all(-1)
        jacobian = torch.where(finite[..., None, None], jacobian, 0.0)
        value = inflate(verified_norm(jacobian) + _rounding(frozen, jacobian), 2)
        value = torch.where(finite & value.isfinite(), value, torch.inf)
    if not (torch.is_grad_enabled() and is_tracked(block)):
        return value
    with torch.no_grad():
        top = singular(jacobian)[2][..., 0, :]
    image = block.jvp(top.unflatten(-1, moving.shape[-2:]))
    stretch = vector_norm(image.expand(*block.batch_shape, *image.shape[-2:]).flatten(-2))
    return value + (stretch - stretch.detach())


def _jacobian(block: Attention) -> Float[Tensor, "*batch out_size in_size"]:
    """Block (i, j) is sum_h P_ij (M_h^T + v~_j u_i^T), and, where i = j and the query moves, sum_hl P_il v~_l w_l^T.

    Of token i and head h: v~_l = W_O^T (value l less the mean value), u_i = s W_K q_i, w_l = s W_Q k_l, M_h = W_V W_O.
    With rotary positions or QK-norm by products with unit covectors.
    """
    batch, maps = block.batch_shape, block.probabilities
    if not block.features.isdisjoint(("rotary", "qk_norm")):  # gradients of each query and key: row by row
        size = block.tokens * block.w_o.shape[-1]
        identity = torch.eye(size, dtype=maps.dtype, device=maps.device).reshape(
            size, *[1] * len(batch), block.tokens, -1
        )
        return block.vjp(identity).flatten(-2).movedim(0, -2).expand(*batch, -1, -1)
    values = block.values @ block.w_o
    apart = values.unsqueeze(-3) - (maps @ values).unsqueeze(-2)  # heads x n x m x out
    weighted = (maps.unsqueeze(-1) * apart).movedim(-4, -1)  # n x m x out x heads
    n, m = maps.shape[-2:]
    rows, columns = block.w_o.shape[-1], block.moving_input.shape[-1]
    own = blocks = maps.new_zeros(())
    if block.query_moves:
        by_head = (block.scale_value * block.keys @ block.w_q.mT).movedim(-3, -2)  # m x heads x D
        own = weighted.transpose(-3, -2).flatten(-2) @ by_head.flatten(-3, -2).unsqueeze(-3)
        blocks = own.new_zeros(*own.shape[:-3], n, block.x.shape[-2], rows, columns)
    if block.memory_moves:
        mixing = (block.w_v @ block.w_o).mT.flatten(-2)  # heads x (out D)
        blocks = maps.movedim(-3, -1).flatten(-3, -2) @ mixing
        keys = (block.scale_value * block.queries @ block.w_k.mT).movedim(-3, -2)  # n x heads x D
        blocks = blocks.unflatten(-1, (rows, columns)).unflatten(-3, (n, m)) + weighted @ keys.unsqueeze(-3)
    if block.query_moves:
        token = torch.arange(n, device=maps.device)
        blocks[..., token, token if block.queries_at is None else block.queries_at, :, :] += own
    return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2).expand(*batch, -1, -1)


def _rounding(block: Attention, jacobian: Tensor) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the computed Jacobian minus the exact one."""
    roundoff = Roundoff(block)
    rows = roundoff.jvp(jacobian.new_ones(*block.batch_shape, *block.moving_input.shape[-2:]))
    columns = roundoff.vjp(jacobian.new_ones(*block.batch_shape, block.tokens, block.w_o.shape[-1]))
    return inflate(rows.amax((-2, -1)).sqrt() * columns.amax((-2, -1)).sqrt(), 8).expand(block.batch_shape)


def batch_items(block: Attention) -> list[Attention]:
    """The batch items one by one, each without batch dimensions, in the order of the flattened batch."""
    names = {"x": 2, "memory": 2, "logit_bias": 3, "b_o": 1, "query_rotation": 3, "key_rotation": 3}
    names |= {"w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2}
    names |= {"query_norm_weight": 2, "key_norm_weight": 2}
    fields = {name: (getattr(block, name), own) for name, own in names.items() if getattr(block, name) is not None}
    wide = {}
    for name, (tensor, own) in fields.items():
        missing = own - tensor.dim()  # a logit bias may have fewer dimensions than heads x n x m
        tensor = tensor.reshape(*[1] * missing, *tensor.shape) if missing > 0 else tensor
        wide[name] = tensor.expand(*block.batch_shape, *tensor.shape[tensor.dim() - own :])
    indices = itertools.product(*(range(size) for size in block.batch_shape))
    return [block.replace(**{name: tensor[index] for name, tensor in wide.items()}) for index in indices]
