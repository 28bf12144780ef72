"""The fields of an `Attention` as the judge reads them, sharing nothing with the library that it judges."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention


# Number of trailing dimensions of each tensor field that are not batch dimensions.
TRAILING = {"x": 2, "memory": 2, "w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2, "b_o": 1}
TRAILING |= {"query_rotation": 3, "key_rotation": 3, "query_norm_weight": 2, "key_norm_weight": 2}


def additive_mask(block: Attention) -> Float[Tensor, "*mask n m"]:
    """Logit bias and causal mask together in float64, with at least the axes of head, query and key."""
    n = block.x.shape[-2]
    m = n if block.memory is None else block.memory.shape[-2]
    mask = torch.zeros(1, n, m, dtype=torch.float64, device=block.x.device)
    if block.causal:
        positions = torch.arange(n, device=block.x.device)
        mask = mask.masked_fill(positions.unsqueeze(-1) < positions, -math.inf)
    return mask if block.logit_bias is None else mask + block.logit_bias.detach().to(torch.float64)


def rotation_matrices(
    block: Attention, side: Literal["query", "key"]
) -> Float[Tensor, "*batch tokens head_dim head_dim"] | None:
    """The rotary matrix R of each token, dense, in float64; None without rotary positions.

    Args:
        block: only its fields are read.
        side: whose.
    """
    given = block.query_rotation if side == "query" else block.key_rotation
    if given is None:
        return None
    given = given.detach().to(torch.float64)
    pairs, width = given.shape[-1], block.w_q.shape[-1]
    matrices = torch.eye(width, dtype=torch.float64, device=given.device).repeat(*given.shape[:-2], 1, 1)
    for first in range(pairs):
        second = first + pairs
        cos, sin = given[..., 0, first], given[..., 1, first]
        matrices[..., first, first], matrices[..., first, second] = cos, -sin
        matrices[..., second, first], matrices[..., second, second] = sin, cos
    return matrices


def batch_item(block: Attention, index: tuple[int, ...]) -> Attention:
    """One item of a batch of blocks, with the batch dimensions of every field removed.

    Args:
        block: a block whose fields may have different batch dimensions that broadcast.
        index: position in `block.batch_shape`.
    """
    depth = len(block.batch_shape)
    trailing = dict(TRAILING) | {"logit_bias": 3 if depth else 0}
    changes: dict[str, Tensor] = {}
    for name, kept in trailing.items():
        tensor = getattr(block, name)
        if tensor is None or tensor.dim() <= kept or not depth:
            continue
        leading = tensor.shape[: tensor.dim() - kept]
        own = index[depth - len(leading) :]
        changes[name] = tensor[tuple(0 if size == 1 else i for i, size in zip(own, leading, strict=True))]
    return block.replace(**changes)
