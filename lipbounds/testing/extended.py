"""The norm of the Jacobian in 60-digit arithmetic: it decides where a claim is too close to the truth for float64."""

from __future__ import annotations

import decimal
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention
from lipbounds.testing._fields import whole
from lipbounds.testing.oracles import additive_mask, jacobian, rotation_matrices


# Attention to a hidden or distant key may be 10^-4343 and smaller: the widest exponents there are.
CONTEXT = decimal.Context(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.InvalidOperation])
Decimals = np.ndarray[Any, np.dtype[np.object_]]


def jacobian_norm_extended(block: Attention) -> Decimal:
    """Norm of the Jacobian of an unbatched block in 60 digits, from below.

    The value is ||J v|| / ||v|| at the top right singular vector v of the float64 Jacobian, so it is at most the exact
    norm whatever v is, and below it only by the square of the error in v. A second at 32 tokens, 32 features, 4 heads.

    Args:
        block: only its fields are read.

    Raises:
        InvalidInput: the block has batch dimensions.
    """
    if block.batch_shape:
        raise InvalidInput(
            f"one block at a time is evaluated in 60 digits, got the batch shape {tuple(block.batch_shape)}; "
            "take one item with oracles.batch_item(block, index)."
        )
    moving = block.memory if block.moves == "memory" else block.x
    assert moving is not None  # checked at construction
    dense = jacobian(block)
    size = dense.abs().max()
    top = torch.linalg.svd(dense / torch.where(size > 0, size, 1.0), full_matrices=False).Vh[0]
    with decimal.localcontext(CONTEXT):
        tangent = _exact(top.reshape(moving.shape))
        return _length(_product(block, tangent)) / _length(tangent)


def _product(block: Attention, tangent: Decimals) -> Decimals:
    """Jacobian times `tangent`: the rows of the tokens that have a query."""
    image = _product_of_all_queries(whole(block), tangent)
    return image if block.queries_at is None else image[block.queries_at.tolist()]


def _product_of_all_queries(block: Attention, tangent: Decimals) -> Decimals:
    """Jacobian times `tangent`, each row relative to its most visible key, so that one-hot rows keep all digits."""
    memory = block.x if block.memory is None else block.memory
    x, source = _exact(block.x), _exact(memory)
    d_x = tangent if block.moves != "memory" else x * 0
    d_source = tangent if block.moves != "query" else source * 0
    mask = additive_mask(block)
    mask = _exact(mask.expand(block.w_q.shape[-3], *mask.shape[-2:]))
    scale = Decimal(float(block.scale or 0.0))
    turn_queries, turn_keys = (rotation_matrices(block, side) for side in ("query", "key"))
    total: Any = 0
    all_queries = _normalised(block, block.query_norm_weight, *_projected(x, d_x, block.w_q, block.b_q))
    # The bias cancels in differences of values, and in those of keys unless they are normalised or turned.
    all_keys = _normalised(block, block.key_norm_weight, *_projected(source, d_source, block.w_k, block.b_k))
    for head in range(block.w_q.shape[-3]):
        w_v, w_o = _exact(block.w_v[head]), _exact(block.w_o[head])
        queries, d_queries = (_turned(turn_queries, rows[head]) for rows in all_queries)
        keys, d_keys = (_turned(turn_keys, rows[head]) for rows in all_keys)
        values, d_values = source @ w_v, d_source @ w_v
        rows = []
        for i in range(x.shape[0]):
            top = int(np.argmax(scale * (keys @ queries[i]) + mask[head, i]))
            key, value = keys - keys[top], values - values[top]
            logits = scale * (key @ queries[i]) + (mask[head, i] - mask[head, i, top])
            weights = np.array([logit.exp() for logit in logits], dtype=object)
            p = weights / weights.sum()
            change = scale * (key @ d_queries[i] + (d_keys - d_keys[top]) @ queries[i])
            rows.append(p @ d_values + (p * (change - p @ change)) @ value)
        total = total + np.stack(rows) @ w_o
    return total


def _projected(
    tokens: Decimals, tangent: Decimals, weights: Tensor, bias: Tensor | None
) -> tuple[list[Decimals], list[Decimals]]:
    """Of each head the projected tokens with their bias, and the projected tangent."""
    matrices = [_exact(matrix) for matrix in weights]
    rows = [tokens @ matrix for matrix in matrices]
    if bias is not None:
        rows = [plain + _exact(own) for plain, own in zip(rows, bias, strict=True)]
    return rows, [tangent @ matrix for matrix in matrices]


def _normalised(
    block: Attention, weight: Tensor | None, rows: list[Decimals], changes: list[Decimals]
) -> tuple[list[Decimals], list[Decimals]]:
    """Of each head the normalised rows w k / sqrt(m), m = mean k^2 + eps, and their changes by the quotient rule."""
    if weight is None or block.norm_eps is None:
        return rows, changes
    alone = [[head] for head in range(len(rows))]
    together = [list(range(len(rows)))] * len(rows) if block.norm_over == "all_heads" else alone
    found: tuple[list[Decimals], list[Decimals]] = ([], [])
    for head, others in enumerate(together):
        count = Decimal(len(others) * rows[head].shape[1])
        square: Any = sum((rows[g] * rows[g]).sum(1) for g in others) / count + Decimal(block.norm_eps)
        change: Any = sum((2 * rows[g] * changes[g]).sum(1) for g in others) / count
        root = np.array([entry.sqrt() for entry in square], dtype=object)[:, None]
        slope = (change / (2 * square))[:, None]
        gain = _exact(weight[head])
        found[0].append(gain * rows[head] / root)
        found[1].append(gain * (changes[head] - rows[head] * slope) / root)
    return found


def _turned(matrices: Tensor | None, vectors: Decimals) -> Decimals:
    """Each row times the matrix of its token."""
    if matrices is None:
        return vectors
    return np.stack([matrix @ vector for matrix, vector in zip(_exact(matrices), vectors, strict=True)])


def _exact(tensor: Tensor) -> Decimals:
    """The same numbers as decimals; every float is one."""
    flat = [Decimal(value) for value in tensor.detach().to(torch.float64).reshape(-1).tolist()]
    return np.array(flat, dtype=object).reshape(tuple(tensor.shape))


def _length(array: Decimals) -> Decimal:
    return sum((entry * entry for entry in array.reshape(-1)), Decimal(0)).sqrt()
