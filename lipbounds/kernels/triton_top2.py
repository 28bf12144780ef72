r"""log g_1 of every row of softmax(scale Q K^T) in one pass over the keys: a Triton kernel, with its gradient.

The values of `lipbounds.ops.log_g.log_g_1`, to the nearest float and no bound: what JaSMin with k = 0 is made of. A
program takes some rows and goes over the keys in tiles, keeping of each row the two largest logits m_1 >= m_2 and r =
sum of exp(S_j - m_2) over all keys but the largest (online softmax). A tile with b_1, b_2 and its own r is merged by

    m_1' = max(m_1, b_1),  lo = min(m_1, b_1),  m_2' = max(m_2, b_2, lo),
    r' = r exp(m_2 - m_2') + r_b exp(b_2 - m_2') + exp(lo - m_2').

Then log sum exp S = m_1 + log1p(r exp(m_2 - m_1)) =: L, and log g_1 = m_1 - L + m_2 + log1p(r) - L, in which nothing
cancels. The gradient with respect to a logit is [j = 1st] + [j != 1st] exp(S_j - m_2) / (1 + r) + [j = 2nd] / (1 + r)
- 2 p_j: two more kernels go over the same tiles, one for the queries and one for the keys.

Nothing of size n x m is stored. Written for CUDA; tested on a CPU through Triton's interpreter (TRITON_INTERPRET=1,
set before this module is imported), never measured on a GPU here.
"""

# Kernels are a language of their own inside Python, which its type annotations do not describe.
# pyright: reportArgumentType=false, reportCallIssue=false

# The type checker takes the arguments of kernels for those of Python functions.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput


ROWS, COLS = 32, 64  # of a tile
WIDTHS = (16, 128)  # of the heads: the whole width of a tile is in registers


def log_g_1(
    queries: Float[Tensor, "*batch n d"], keys: Float[Tensor, "*batch m d"], scale: float, *, causal: bool = False
) -> Float[Tensor, "*batch n"]:
    """log g_1 of each row of softmax(scale Q K^T), float32; -inf, with gradient 0, where one key is visible.

    Args:
        queries: float16, bfloat16 or float32; products are accumulated in float32.
        keys: of the same dtype and batch shape.
        scale: of the logits.
        causal: hide the keys after each query; n = m.

    Raises:
        InvalidInput: shapes do not fit, or the width of the heads is no power of two from 16 to 128.
    """
    (n, d), m = queries.shape[-2:], keys.shape[-2]
    if queries.shape[:-2] != keys.shape[:-2] or keys.shape[-1] != d:
        raise InvalidInput(
            f"queries and keys must have one batch shape and width, got {tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    if not WIDTHS[0] <= d <= WIDTHS[1] or d & (d - 1):
        raise InvalidInput(
            f"the width of the heads must be a power of two from {WIDTHS[0]} to {WIDTHS[1]}, got {d}; use "
            "lipbounds.ops.log_g.log_g_1 on the logits."
        )
    if causal and n != m:
        raise InvalidInput(f"causal=True needs as many queries as keys, got {n} and {m}.")
    flat = _LogG1.apply(queries.reshape(-1, n, d), keys.reshape(-1, m, d), scale, causal)
    return flat.unflatten(0, queries.shape[:-2]) if queries.dim() != 2 else flat[0]  # pyright: ignore


class _LogG1(torch.autograd.Function):
    """The kernels on [batch, n, d] and [batch, m, d]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scale: float, causal: bool) -> Tensor:
        queries, keys = queries.contiguous(), keys.contiguous()
        (batch, n, d), m = queries.shape, keys.shape[1]
        value, total, second, rest = (queries.new_empty(batch, n, dtype=torch.float32) for _ in range(4))
        top = torch.empty(batch, n, 2, dtype=torch.int32, device=queries.device)
        _forward[(triton.cdiv(n, ROWS), batch)](
            queries, keys, value, total, second, rest, top, n, m, scale, causal, d, ROWS, COLS
        )
        ctx.save_for_backward(queries, keys, total, second, rest, top)
        ctx.scale, ctx.causal = scale, causal
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyright: ignore
        queries, keys, total, second, rest, top = ctx.saved_tensors
        (batch, n, d), m = queries.shape, keys.shape[1]
        of_queries, of_keys = torch.empty_like(queries), torch.empty_like(keys)
        shared = (queries, keys, grad.contiguous(), total, second, rest, top)
        sizes = (n, m, ctx.scale, ctx.causal, d, ROWS, COLS)
        _backward_queries[(triton.cdiv(n, ROWS), batch)](*shared, of_queries, *sizes)
        _backward_keys[(triton.cdiv(m, COLS), batch)](*shared, of_keys, *sizes)
        return of_queries, of_keys, None, None


@triton.jit
def _tile(queries, keys, rows, cols, item, n, m, scale, CAUSAL: tl.constexpr, D: tl.constexpr):
    """Logits of some rows and columns, -inf beyond the ends and where a key is hidden; and the two factors."""
    d = tl.arange(0, D)
    q = tl.load(queries + (item * n + rows[:, None]) * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    k = tl.load(keys + (item * m + cols[:, None]) * D + d[None, :], mask=cols[:, None] < m, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    visible = cols[None, :] < m
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None])
    return tl.where(visible, logits, float("-inf")), q, k


@triton.jit
def _weight(logits, reference):
    """exp(logits - reference), 0 where the logit is -inf, also if the reference is."""
    return tl.where(logits == float("-inf"), 0.0, tl.exp(logits - reference))


@triton.jit
def _forward(
    queries, keys, value, total, second, rest, top, n, m, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, item = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    m_1 = tl.full([ROWS], float("-inf"), tl.float32)
    m_2 = tl.full([ROWS], float("-inf"), tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    at_1 = tl.full([ROWS], -1, tl.int32)
    at_2 = tl.full([ROWS], -1, tl.int32)
    for start in range(0, m, COLS):
        cols = start + tl.arange(0, COLS)
        logits, _, _ = _tile(queries, keys, rows, cols, item, n, m, scale, CAUSAL, D)
        b_1, first = tl.max(logits, 1), tl.argmax(logits, 1)
        others = tl.where(tl.arange(0, COLS)[None, :] == first[:, None], float("-inf"), logits)
        b_2, next_one = tl.max(others, 1), tl.argmax(others, 1)
        b_at_1, b_at_2 = (start + first).to(tl.int32), (start + next_one).to(tl.int32)
        low, at_low = tl.minimum(m_1, b_1), tl.where(b_1 > m_1, at_1, b_at_1)
        new_2 = tl.maximum(tl.maximum(m_2, b_2), low)
        r_b = tl.sum(_weight(others, b_2[:, None]), 1)
        r = r * _weight(m_2, new_2) + r_b * _weight(b_2, new_2) + _weight(low, new_2)
        at_2 = tl.where(low == new_2, at_low, tl.where(m_2 == new_2, at_2, b_at_2))
        at_1 = tl.where(b_1 > m_1, b_at_1, at_1)
        m_1, m_2 = tl.maximum(m_1, b_1), new_2
    share = r * _weight(m_2, m_1)
    # log1p by series where 1 + share has lost the digits of share: nearly one-hot rows.
    log_1p = tl.where(share < 1e-3, share * (1 - share * (0.5 - share / 3)), tl.log(1 + share))
    # 1st and total relative to m_1: m_1 - L = -log1p(share).
    log_g = tl.where(m_2 == float("-inf"), float("-inf"), m_2 - m_1 + tl.log(1 + r) - 2 * log_1p)
    inside = rows < n
    tl.store(value + item * n + rows, log_g, mask=inside)
    tl.store(total + item * n + rows, m_1 + log_1p, mask=inside)
    tl.store(second + item * n + rows, m_2, mask=inside)
    tl.store(rest + item * n + rows, r, mask=inside)
    tl.store(top + (item * n + rows) * 2, at_1, mask=inside)
    tl.store(top + (item * n + rows) * 2 + 1, at_2, mask=inside)


@triton.jit
def _slopes(logits, rows, cols, item, grad, total, second, rest, top, n):
    """The gradient with respect to the logits of a tile."""
    inside = rows < n
    at = item * n + rows
    g = tl.load(grad + at, mask=inside, other=0.0)
    m_2 = tl.load(second + at, mask=inside, other=float("-inf"))
    r = tl.load(rest + at, mask=inside, other=0.0)
    first = cols[None, :] == tl.load(top + 2 * at, mask=inside, other=-1)[:, None]
    next_one = cols[None, :] == tl.load(top + 2 * at + 1, mask=inside, other=-1)[:, None]
    p = _weight(logits, tl.load(total + at, mask=inside, other=0.0)[:, None])
    share = _weight(tl.where(first, float("-inf"), logits), m_2[:, None]) / (1 + r)[:, None]
    slope = tl.where(first, 1.0, share) + tl.where(next_one, 1 / (1 + r)[:, None], 0.0) - 2 * p
    # A row with one visible key is constant; g may be anything there, as 0 times infinity is no number.
    return tl.where((m_2 == float("-inf"))[:, None], 0.0, slope * g[:, None])


@triton.jit
def _backward_queries(
    queries, keys, grad, total, second, rest, top, result, n, m, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, item = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    sums = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, m, COLS):
        cols = start + tl.arange(0, COLS)
        logits, _, k = _tile(queries, keys, rows, cols, item, n, m, scale, CAUSAL, D)
        slope = _slopes(logits, rows, cols, item, grad, total, second, rest, top, n)
        sums += tl.dot(slope, k.to(tl.float32), input_precision="ieee")
    d = tl.arange(0, D)
    tl.store(result + (item * n + rows[:, None]) * D + d[None, :], sums * scale, mask=rows[:, None] < n)


@triton.jit
def _backward_keys(
    queries, keys, grad, total, second, rest, top, result, n, m, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols, item = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.program_id(1)
    sums = tl.zeros([COLS, D], tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        logits, q, _ = _tile(queries, keys, rows, cols, item, n, m, scale, CAUSAL, D)
        slope = _slopes(logits, rows, cols, item, grad, total, second, rest, top, n)
        sums += tl.dot(tl.trans(slope), q.to(tl.float32), input_precision="ieee")
    d = tl.arange(0, D)
    tl.store(result + (item * m + cols[:, None]) * D + d[None, :], sums * scale, mask=cols[:, None] < m)
