r"""The scores of JaSMin for every row of softmax(scale Q K^T + B) in one pass over the keys: Triton, with gradients.

The values of `lipbounds.ops.log_g`, to the nearest float and no bounds. A program takes a tile of rows and goes over
the keys in tiles, as FlashAttention does: products on tensor cores, logits never outside the chip. Of each row it keeps
the K largest logits t_1 .. t_K with their places, K = k + 1 rounded up to a power of two, and of all others
R = sum exp(S_j - t_K) (an online softmax relative to the smallest logit kept, so that nothing overflows). In each tile

1. while a logit is above the smallest one kept, it takes its place, and that one joins the rest:
   R' = (R + 1) exp(t_K - t_K'): after a few tiles this happens seldom, a row of n meets about K log n such logits;
2. the logits that are left join the rest: R' = R + sum exp(S_j - t_K).

With rho = t_K + log R, the logarithm of the sum over the rest, all scores are functions of t_1 .. t_K and rho, in which
nothing cancels: they are written in torch, and their gradients come from it. The gradient with respect to a logit is
that of t_i where it is kept, and exp(S_j - rho) that of rho elsewhere: two more kernels go over the same tiles, one for
the queries and one for the keys.

Memory: O(n (d + K)); nothing of size n x m is stored but a bias that the caller stores. Written for CUDA; tested on a
CPU through Triton's interpreter (TRITON_INTERPRET=1, set before this module is imported), and compiled for compute
capability 9.0; never run on a GPU so far.
"""

# Kernels are a language of their own inside Python, which its type annotations do not describe.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import os
from typing import Any, Literal

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipbounds.errors import InvalidInput


WIDTHS = (16, 128)  # of the heads: the whole width of a tile is in registers
LARGEST_K = 15
Precision = Literal["ieee", "tf32x3", "tf32"]
# What rounding an entry of a product costs: float32 loses digits on tensor cores, shorter dtypes enter as they are.
ENTRY = {"ieee": 0.0, "tf32x3": 2.0**-20, "tf32": 2.0**-10}
ADDITION = 2.0**-22  # of the accumulators of tensor cores, which do not round to nearest

# Tiles (rows, columns), warps and stages that are tried on a card, once for each size; the interpreter takes the first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_TRIED = [(32, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 128, 4, 3)]
if INTERPRETED.value:
    _TRIED = _TRIED[:1]
CONFIGS = [
    triton.Config({"ROWS": rows, "COLS": cols}, num_warps=warps, num_stages=stages)
    for rows, cols, warps, stages in _TRIED
]
_KEY = ["SIZE", "D", "KEPT", "CAUSAL", "BIASED"]


def jasmin_scores(
    queries: Float[Tensor, "*batch heads n d"],
    keys: Float[Tensor, "*batch groups m d"],
    scale: float,
    k: int = 0,
    *,
    causal: bool = False,
    logit_bias: Float[Tensor, "*bias rows cols"] | None = None,
    precision: Precision = "ieee",
) -> Float[Tensor, "*batch heads n"]:
    """log g_1 of each row for k = 0, log(g_1 / g_k) for k >= 1, in float32: estimates, rounded to nearest.

    Rows that see one key have -inf for k = 0 and 0 else, and no gradient. k counts no further than the visible keys.

    Args:
        queries: float16, bfloat16 or float32; products are accumulated in float32.
        keys: of the same dtype; each of their heads is that of heads / groups heads of queries.
        scale: of the logits.
        k: from 0 to 15.
        causal: hide the keys after each query; n = m.
        logit_bias: added to the logits, -inf where a key is hidden; broadcast views cost nothing; without gradient.
        precision: of products of float32; see `logit_error`.

    Raises:
        InvalidInput: shapes do not fit, the width of the heads is no power of two from 16 to 128, or k is out of range.
    """
    return scored_rows(queries, keys, scale, k, causal=causal, logit_bias=logit_bias, precision=precision)[0]


def scored_rows(
    queries: Float[Tensor, "*batch heads n d"],
    keys: Float[Tensor, "*batch groups m d"],
    scale: float,
    k: int = 0,
    *,
    causal: bool = False,
    logit_bias: Float[Tensor, "*bias rows cols"] | None = None,
    precision: Precision = "ieee",
) -> tuple[Float[Tensor, "*batch heads n"], Bool[Tensor, "*batch heads n"]]:
    """`jasmin_scores`, and which rows see more than one key.

    Args:
        queries: as in `jasmin_scores`.
        keys: as in `jasmin_scores`.
        scale: as in `jasmin_scores`.
        k: as in `jasmin_scores`.
        causal: as in `jasmin_scores`.
        logit_bias: as in `jasmin_scores`.
        precision: as in `jasmin_scores`.

    Raises:
        InvalidInput: as `jasmin_scores`.
    """
    if not 0 <= k <= LARGEST_K:
        raise InvalidInput(f"k must be from 0 to {LARGEST_K}, got {k=}; use lipbounds.ops.log_g on the logits.")
    if precision not in ENTRY:
        raise InvalidInput(f"precision must be one of {sorted(ENTRY)}, got {precision=}.")
    shape = queries.shape[:-1]
    flat, held, bias = _flattened(queries, keys, causal, logit_bias)
    kept = triton.next_power_of_2(max(k, 1) + 1)
    top, rest = _Largest.apply(flat, held, bias, scale, causal, kept, precision)  # pyright: ignore[reportGeneralTypeIssues]
    return _score(top, rest, k).reshape(shape), (~top[..., 1].isneginf()).reshape(shape)


def logit_error(
    queries: Float[Tensor, "*batch n d"], keys: Float[Tensor, "*batch m d"], scale: float, precision: Precision = "ieee"
) -> Float[Tensor, "*batch n"]:
    """How far the logits of each row in the kernels can be from those of the given floats, without a bias; float64.

    |scale| |q_i| max_j |k_j| times (2 e + e^2 + (d + 4) a): e is what an entry loses on its way to the tensor cores
    (nothing for float16 and bfloat16, whose products are exact in float32), a what an addition there costs: 2^-22,
    twice that of float32 rounded down. Hardware gives no guarantee for either; they are what its makers describe.

    Args:
        queries: as in `jasmin_scores`.
        keys: one head for each of the queries.
        scale: of the logits.
        precision: of products of float32.
    """
    entry = ENTRY[precision] if queries.dtype == torch.float32 else 0.0
    share = 2 * entry + entry**2 + (queries.shape[-1] + 4) * ADDITION
    largest = keys.double().norm(dim=-1).amax(-1, keepdim=True)
    return abs(scale) * share * queries.double().norm(dim=-1) * largest * (1 + 1e-9)


def _flattened(
    queries: Tensor, keys: Tensor, causal: bool, logit_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[batch, heads, n, d], [batch, groups, m, d] and [batch, heads, n, m], the bias as a view."""
    (n, d), m = queries.shape[-2:], keys.shape[-2]
    if queries.dim() != keys.dim() or queries.shape[:-3] != keys.shape[:-3] or keys.shape[-1] != d:
        raise InvalidInput(
            f"queries and keys must have one batch shape and width, got {tuple(queries.shape)} and {tuple(keys.shape)}."
        )
    if not WIDTHS[0] <= d <= WIDTHS[1] or d & (d - 1):
        raise InvalidInput(
            f"the width of the heads must be a power of two from {WIDTHS[0]} to {WIDTHS[1]}, got {d}; use "
            "lipbounds.ops.log_g on the logits."
        )
    if causal and n != m:
        raise InvalidInput(f"causal=True needs as many queries as keys, got {n} and {m}.")
    heads, groups = (t.shape[-3] if t.dim() > 2 else 1 for t in (queries, keys))
    if heads % groups:
        raise InvalidInput(f"the heads of the keys must divide those of the queries, got {groups} and {heads}.")
    flat, held = queries.reshape(-1, heads, n, d), keys.reshape(-1, groups, m, d)
    if logit_bias is None:
        return flat, held, None
    try:
        whole = logit_bias.detach().expand(*queries.shape[:-1], m)
    except RuntimeError as error:
        raise InvalidInput(
            f"logit_bias must broadcast to {(*queries.shape[:-1], m)}, got {tuple(logit_bias.shape)}."
        ) from error
    return flat, held, whole.reshape(-1, heads, n, m) if whole.dim() != 4 else whole


def _score(top: Tensor, rest: Tensor, k: int) -> Tensor:
    """The scores from the largest logits of each row, in order, and the logarithm of the sum over all others."""
    visible = ~top.isneginf()
    single = ~visible[..., 1]
    # Rows with one visible key are replaced by zeros, so that no inf - inf reaches the gradient of the others.
    top = torch.where(single.unsqueeze(-1), 0.0, top)
    rest = torch.where(single, 0.0, rest)
    first, second = top[..., 0], top[..., 1]
    others = torch.logsumexp(torch.cat([top[..., 1:], rest.unsqueeze(-1)], -1), -1)
    log_total = torch.nn.functional.softplus(others - first, threshold=60.0)  # less the largest
    log_g = torch.logaddexp(others, second) - first - 2 * log_total
    if k == 0:
        return torch.where(single, -torch.inf, log_g)
    rank = visible.sum(-1, keepdim=True).clamp(max=k) - 1
    padded = torch.nn.functional.pad(top, (0, 1), value=-torch.inf)
    here, after = (padded.gather(-1, rank + step)[..., 0] - first - log_total for step in (0, 1))
    ratio = log_g - here - torch.log1p(after.exp() - here.exp())
    return torch.where(rank[..., 0] == 0, 0.0, ratio)  # g_1 over itself, also for k = 1


class _Largest(torch.autograd.Function):
    """The largest logits of each row in order, and the logarithm of the sum of exp over all others."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float, causal: bool, kept: int,
        precision: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        queries, keys = queries.contiguous(), keys.contiguous()
        (batch, heads, n, d), (groups, m) = queries.shape, keys.shape[1:3]
        top = torch.empty(batch, heads, n, kept, dtype=torch.float32, device=queries.device)
        place = torch.empty(batch, heads, n, kept, dtype=torch.int32, device=queries.device)
        rest = torch.empty(batch, heads, n, dtype=torch.float32, device=queries.device)
        ctx.constants = (n, m, scale, heads, groups), _strides(bias), (d, kept, causal, bias is not None, precision)

        def grid(meta: dict[str, Any]) -> tuple[Any, int]:
            return triton.cdiv(n, meta["ROWS"]), batch * heads

        _forward[grid](queries, keys, bias, top, place, rest, *_sizes(ctx))
        top, order = torch.sort(top, dim=-1, descending=True, stable=True)
        place = place.gather(-1, order)
        ctx.save_for_backward(queries, keys, bias, place, rest)
        return top, rest

    @staticmethod
    @once_differentiable  # a second derivative would be wrong without a word
    def backward(ctx: Any, of_top: Tensor, of_rest: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, keys, bias, place, rest = ctx.saved_tensors
        (batch, heads, n, _), (groups, m) = queries.shape, keys.shape[1:3]
        of_queries, of_keys = torch.empty_like(queries), torch.empty_like(keys)
        shared = (queries, keys, bias, of_top.contiguous(), of_rest.contiguous(), place, rest)
        _backward_queries[lambda meta: (triton.cdiv(n, meta["ROWS"]), batch * heads)](*shared, of_queries, *_sizes(ctx))
        _backward_keys[lambda meta: (triton.cdiv(m, meta["COLS"]), batch * groups)](*shared, of_keys, *_sizes(ctx))
        return of_queries, of_keys, None, None, None, None, None


def _strides(bias: Tensor | None) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if bias is None else bias.stride()  # pyright: ignore[reportReturnType]


def _sizes(ctx: Any) -> tuple[Any, ...]:
    """What all kernels end with but for their tiles; SIZE puts lengths that share tiles together."""
    (n, m, scale, heads, groups), strides, constants = ctx.constants
    return (n, m, scale, heads, heads // groups, *strides, triton.next_power_of_2(max(n, m)), *constants)


@triton.jit
def _logits(
    queries, keys, bias, rows, cols, item, n, m, scale, heads, group, s_b, s_h, s_n, s_m,
    D: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of some rows and columns, -inf beyond the ends and where a key is hidden; and the two factors."""
    d = tl.arange(0, D)
    b, h = item // heads, item % heads
    own = b * (heads // group) + h // group
    q = tl.load(queries + (item.to(tl.int64) * n + rows[:, None]) * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    k = tl.load(keys + (own.to(tl.int64) * m + cols[:, None]) * D + d[None, :], mask=cols[:, None] < m, other=0.0)
    logits = _product(q, tl.trans(k), PRECISION) * scale
    visible = (cols[None, :] < m) & (rows[:, None] < n)
    if BIASED:
        at = b.to(tl.int64) * s_b + h * s_h + rows[:, None].to(tl.int64) * s_n + cols[None, :] * s_m
        logits += tl.load(bias + at, mask=visible, other=float("-inf")).to(tl.float32)
    if CAUSAL:
        visible = visible & (cols[None, :] <= rows[:, None])
    return tl.where(visible, logits, float("-inf")), q, k


@triton.jit
def _product(first, second, PRECISION: tl.constexpr):
    """On tensor cores, in the dtype of the factors; the interpreter takes bfloat16 for integers, so it gets float32."""
    if INTERPRETED:
        return tl.dot(first.to(tl.float32), second.to(tl.float32), input_precision="ieee")
    return tl.dot(first, second, input_precision=PRECISION)


@triton.jit
def _weight(logits, reference):
    """exp(logits - reference), 0 where the logit is -inf, or the reference, which then stands for an empty sum."""
    empty = (logits == float("-inf")) | (reference == float("-inf"))
    return tl.where(empty, 0.0, tl.exp(tl.where(empty, 0.0, logits - reference)))


@triton.autotune(configs=CONFIGS, key=_KEY)
@triton.jit
def _forward(
    queries, keys, bias, top, place, rest, n, m, scale, heads, group, s_b, s_h, s_n, s_m, SIZE,
    D: tl.constexpr, KEPT: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, item = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    slots = tl.arange(0, KEPT)
    held = tl.full([ROWS, KEPT], float("-inf"), tl.float32)
    at = tl.full([ROWS, KEPT], -1, tl.int32)
    smallest = tl.full([ROWS], float("-inf"), tl.float32)
    r = tl.zeros([ROWS], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * ROWS)  # what is right of the diagonal is hidden
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        logits, _, _ = _logits(
            queries, keys, bias, rows, cols, item, n, m, scale, heads, group, s_b, s_h, s_n, s_m, D, CAUSAL, BIASED,
            PRECISION,
        )  # fmt: skip
        largest = tl.max(logits, 1)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:
            enters = largest > smallest
            column = tl.argmax(logits, 1)
            slot = tl.argmin(held, 1)
            takes = enters[:, None] & (slots[None, :] == slot[:, None])
            held = tl.where(takes, largest[:, None], held)
            at = tl.where(takes, (start + column)[:, None].to(tl.int32), at)
            left = tl.min(held, 1)
            r = tl.where(enters, r * _weight(smallest, left) + _weight(smallest, left), r)
            smallest = left
            gone = enters[:, None] & (tl.arange(0, COLS)[None, :] == column[:, None])
            logits = tl.where(gone, float("-inf"), logits)
            largest = tl.max(logits, 1)
        r += tl.sum(_weight(logits, smallest[:, None]), 1)
    inside = rows < n
    flat = item.to(tl.int64) * n + rows
    tl.store(top + flat[:, None] * KEPT + slots[None, :], held, mask=inside[:, None])
    tl.store(place + flat[:, None] * KEPT + slots[None, :], at, mask=inside[:, None])
    tl.store(rest + flat, tl.where(r > 0, smallest + tl.log(tl.where(r > 0, r, 1.0)), float("-inf")), mask=inside)


@triton.jit
def _slopes(
    logits, rows, cols, item, of_top, of_rest, place, rest, n, KEPT: tl.constexpr
):  # fmt: skip
    """The gradient with respect to the logits of a tile."""
    inside = rows < n
    flat = item.to(tl.int64) * n + rows
    slope = tl.load(of_rest + flat, mask=inside, other=0.0)[:, None]
    slope = slope * _weight(logits, tl.load(rest + flat, mask=inside, other=float("-inf"))[:, None])
    for slot in tl.static_range(KEPT):
        here = tl.load(place + flat * KEPT + slot, mask=inside, other=-1)[:, None] == cols[None, :]
        slope = tl.where(here, tl.load(of_top + flat * KEPT + slot, mask=inside, other=0.0)[:, None], slope)
    return tl.where(logits == float("-inf"), 0.0, slope)


@triton.autotune(configs=CONFIGS, key=_KEY)
@triton.jit
def _backward_queries(
    queries, keys, bias, of_top, of_rest, place, rest, result, n, m, scale, heads, group, s_b, s_h, s_n, s_m, SIZE,
    D: tl.constexpr, KEPT: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, item = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    sums = tl.zeros([ROWS, D], tl.float32)
    end = m
    if CAUSAL:
        end = tl.minimum(m, (tl.program_id(0) + 1) * ROWS)
    for start in range(0, end, COLS):
        cols = start + tl.arange(0, COLS)
        logits, _, k = _logits(
            queries, keys, bias, rows, cols, item, n, m, scale, heads, group, s_b, s_h, s_n, s_m, D, CAUSAL, BIASED,
            PRECISION,
        )  # fmt: skip
        slope = _slopes(logits, rows, cols, item, of_top, of_rest, place, rest, n, KEPT)
        sums += _product(slope.to(k.dtype), k, PRECISION)
    d = tl.arange(0, D)
    tl.store(result + (item.to(tl.int64) * n + rows[:, None]) * D + d[None, :], sums * scale, mask=rows[:, None] < n)


@triton.autotune(configs=CONFIGS, key=_KEY)
@triton.jit
def _backward_keys(
    queries, keys, bias, of_top, of_rest, place, rest, result, n, m, scale, heads, group, s_b, s_h, s_n, s_m, SIZE,
    D: tl.constexpr, KEPT: tl.constexpr, CAUSAL: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols, own = tl.program_id(0) * COLS + tl.arange(0, COLS), tl.program_id(1)
    groups = heads // group
    sums = tl.zeros([COLS, D], tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.program_id(0) * COLS // ROWS * ROWS  # what is above the diagonal is hidden
    for member in range(0, group):
        item = own // groups * heads + own % groups * group + member
        for start in range(begin, n, ROWS):
            rows = start + tl.arange(0, ROWS)
            logits, q, _ = _logits(
                queries, keys, bias, rows, cols, item, n, m, scale, heads, group, s_b, s_h, s_n, s_m, D, CAUSAL,
                BIASED, PRECISION,
            )  # fmt: skip
            slope = _slopes(logits, rows, cols, item, of_top, of_rest, place, rest, n, KEPT)
            sums += _product(tl.trans(slope).to(q.dtype), q, PRECISION)
    d = tl.arange(0, D)
    tl.store(result + (own.to(tl.int64) * m + cols[:, None]) * D + d[None, :], sums * scale, mask=cols[:, None] < m)
