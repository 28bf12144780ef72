r"""The norm of the dense Jacobian of small blocks, rounded up: for bounds that start from the truth at one point.

The Jacobian is computed by products with the unit vectors of the input; the norm of the floats found is verified by a
Cholesky factorisation (lipbounds.ops.verified_norm), and how far they can be from the exact ones is bounded entry by
entry (lipbounds.targets.attention_roundoff): a matrix with entries at most E has norm at most the root of its largest
row sum times the root of its largest column sum.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.spectral import vector_norm
from lipbounds.ops.verified_norm import verified_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_roundoff import Roundoff


CHUNK_ENTRIES = 2**21  # of the largest tensor made for one chunk of unit vectors
BATCH_ENTRIES = 2**25  # of all Jacobians of a batch at once; larger batches go item by item


def jacobian_entries(block: Attention) -> int:
    """Entries of the Jacobian of one batch item."""
    return block.moving_input.shape[-2:].numel() * block.tokens * block.w_o.shape[-1]


def dense_norm(block: Attention) -> Float[Tensor, "*batch"]:
    """Spectral norm of the Jacobian, rounded up; differentiable, with the top right singular vector held fixed.

    Args:
        block: in float64; the caller sees to it that its Jacobian is small (`jacobian_entries`).
    """
    if block.batch_shape.numel() * jacobian_entries(block) > BATCH_ENTRIES and block.batch_shape.numel() > 1:
        items = [dense_norm(item) for item in _items(block)]
        return torch.stack(items).reshape(block.batch_shape)
    moving = block.moving_input
    with torch.no_grad():
        frozen = block.at(moving.detach())  # of its own: what a block caches under no_grad cuts gradients
        jacobian = _jacobian(frozen)
        finite = jacobian.isfinite().all(-1).all(-1)
        jacobian = torch.where(finite[..., None, None], jacobian, 0.0)
        value = inflate(verified_norm(jacobian) + _rounding(frozen, jacobian), 2)
        value = torch.where(finite & value.isfinite(), value, torch.inf)
    if not torch.is_grad_enabled() or not block.logits.requires_grad:
        return value
    with torch.no_grad():
        top = torch.linalg.svd(jacobian, full_matrices=False).Vh[..., 0, :]
    image = block.jvp(top.unflatten(-1, moving.shape[-2:]))
    stretch = vector_norm(image.expand(*block.batch_shape, *image.shape[-2:]).flatten(-2))
    return value + (stretch - stretch.detach())


def _jacobian(block: Attention) -> Float[Tensor, "*batch out_size in_size"]:
    rows, columns = block.tokens * block.w_o.shape[-1], block.moving_input.shape[-2:].numel()
    batch = block.batch_shape
    jacobian = block.logits.new_empty(*batch, rows, columns)
    widest = block.heads * max(block.logits.shape[-2:]) * max(*block.logits.shape[-2:], *block.w_o.shape[-2:])
    chunk = max(1, CHUNK_ENTRIES // max(1, widest * batch.numel()))
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        basis = jacobian.new_zeros(stop - start, columns)
        basis[:, start:stop].fill_diagonal_(1)
        directions = basis.reshape(-1, *[1] * len(batch), *block.moving_input.shape[-2:])
        images = block.jvp(directions).expand(-1, *batch, -1, -1)
        jacobian[..., start:stop] = images.flatten(-2).movedim(0, -1)
    return jacobian


def _rounding(block: Attention, jacobian: Tensor) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the computed Jacobian minus the exact one."""
    roundoff = Roundoff(block)
    rows = roundoff.jvp(torch.ones_like(block.moving_input))
    columns = roundoff.vjp(jacobian.new_ones(*block.batch_shape, block.tokens, block.w_o.shape[-1]))
    return inflate(rows.amax((-2, -1)).sqrt() * columns.amax((-2, -1)).sqrt(), 8).expand(block.batch_shape)


def _items(block: Attention) -> list[Attention]:
    """The batch items one by one, in the order of the flattened batch."""
    names = {"x": 2, "memory": 2, "logit_bias": 3, "b_o": 1, "query_rotation": 3, "key_rotation": 3}
    names |= {"w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2}
    fields = {name: (getattr(block, name), own) for name, own in names.items() if getattr(block, name) is not None}
    wide = {}
    for name, (tensor, own) in fields.items():
        missing = own - tensor.dim()  # a logit bias may have fewer dimensions than heads x n x m
        tensor = tensor.reshape(*[1] * missing, *tensor.shape) if missing > 0 else tensor
        wide[name] = tensor.expand(*block.batch_shape, *tensor.shape[tensor.dim() - own :])
    indices = itertools.product(*(range(size) for size in block.batch_shape))
    return [block.replace(**{name: tensor[index] for name, tensor in wide.items()}) for index in indices]
