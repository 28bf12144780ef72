"""The fields of an `Attention` as the judge reads them, sharing nothing with the library that it judges."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.targets.attention import Attention


# Number of trailing dimensions of each tensor field that are not batch dimensions.
TRAILING = {"x": 2, "memory": 2, "w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2, "b_o": 1}
TRAILING |= {"query_rotation": 3, "key_rotation": 3, "query_norm_weight": 2, "key_norm_weight": 2}


def additive_mask(block: Attention) -> Float[Tensor, "*mask n m"]:
    """Logit bias and causal mask together in float64, with at least the axes of head, query and key."""
    tokens = block.x.shape[-2]
    n = tokens if block.queries_at is None else len(block.queries_at)
    m = tokens if block.memory is None else block.memory.shape[-2]
    mask = torch.zeros(1, n, m, dtype=torch.float64, device=block.x.device)
    if block.causal:
        positions = torch.arange(n, device=block.x.device)
        mask = mask.masked_fill(positions.unsqueeze(-1) < positions, -math.inf)
    return mask if block.logit_bias is None else mask + block.logit_bias.detach().to(torch.float64)


def of_some_tokens(block: Attention, at: Int[Tensor, " queries"]) -> Attention:
    """The block of self-attention with queries of some of its tokens only.

    Args:
        block: in which every token has one.
        at: the numbers of the tokens.
    """
    bias = additive_mask(block).to(block.dtype) if block.causal else block.logit_bias
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], *2 * bias.shape[-1:])[..., at, :]
    rotation = block.query_rotation
    rotation = None if rotation is None else rotation[..., at, :, :]
    return block.replace(queries_at=at, logit_bias=bias, causal=False, query_rotation=rotation)


def whole(block: Attention) -> Attention:
    """The block in which every token has a query: the one with `queries_at` has some of its rows.

    Args:
        block: only its fields are read.
    """
    at = block.queries_at
    if at is None:
        return block
    n, bias, rotation = block.x.shape[-2], block.logit_bias, block.query_rotation
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], len(at), n)
        bias = bias.new_zeros(*bias.shape[:-2], n, n).index_copy(-2, at, bias)
    if rotation is not None:
        assert block.key_rotation is not None  # they go together
        lead = torch.broadcast_shapes(rotation.shape[:-3], block.key_rotation.shape[:-3])
        every = block.key_rotation.expand(*lead, *block.key_rotation.shape[-3:])
        rotation = every.index_copy(-3, at, rotation.expand(*lead, *rotation.shape[-3:]))
    return block.replace(queries_at=None, logit_bias=bias, query_rotation=rotation)


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
