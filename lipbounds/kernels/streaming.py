r"""Attention maps of long inputs, some rows at a time: never the n x m map, O(chunk m) numbers beside the inputs.

Each row is complete in its chunk, so that its maximum, second largest logit, sum and g_1 come from the formulas of
lipbounds.ops.softmax with their rounding. With e = gamma(d + 4) s |q_i| max_j |k_j| + 2 u max |B_ij| for the rounding
of the logits in float64, at given queries, keys and logit biases, g_1 is off by a factor of at most exp(4 e) and P_ij
by exp(2 e) (lipbounds.derivatives.rounding.logits).

||P||: for any v > 0, ||P||^2 <= max_j (P^T P v)_j / v_j (lipbounds.ops.nonnegative). A pass over the rows adds up P^T P
v. From v = 1 the first pass gives the largest column sum, since rows sum to 1; each pass more is a step of the power
method, which lowers the bound and never takes it below ||P||.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.logit_changes import change_by_keys, change_by_queries
from lipbounds.derivatives.norms import LARGEST_EXPONENT, combine_heads, value_norm
from lipbounds.derivatives.rounding.logits import logit_error
from lipbounds.devices import waits_for
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.ops.softmax import g_upper_from_logits
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, cast_up, gamma, inflate
from lipbounds.targets.attention import Attention


ENTRIES = 2**22  # of the logits made at a time, all heads together: 32 MiB
ENTRIES_APART = 2**27  # the same on a device of its own, which many small products would leave idle: 1 GiB
PASSES = 4
SMALLEST_ENTRY = 1e-150  # of the vector: any positive one will do, and quotients stay in range
SMALLEST_NORMAL = torch.finfo(torch.float64).tiny


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class RowSummary:
    """What a pass over an attention map leaves of each row, in float64.

    Args:
        largest: the largest logit.
        second: the second largest, -inf where one key is visible.
        log_total: log sum_j exp S_j.
        log_tail: log(1 - p_(1)), without cancellation; -inf where one key is visible.
        g_1: p_(1) (1 - p_(1) + p_(2)) rounded up, at least the norm of the softmax Jacobian at the exact logits.
    """

    largest: Float[Tensor, "*batch n"]
    second: Float[Tensor, "*batch n"]
    log_total: Float[Tensor, "*batch n"]
    log_tail: Float[Tensor, "*batch n"]
    g_1: Float[Tensor, "*batch n"]


@torch.no_grad()
def streaming_g1(
    queries: Float[Tensor, "*batch n d"],
    keys: Float[Tensor, "*batch m width"],
    scale: float,
    *,
    causal: bool = False,
    logit_bias: Float[Tensor, "*bias rows cols"] | None = None,
    chunk: int | None = None,
) -> RowSummary:
    """Row maximum, second largest logit, sum, tail and an upper bound on g_1 of softmax(scale Q K^T + bias).

    Args:
        queries: of any float dtype.
        keys: of the same dtype.
        scale: of the logits.
        causal: hide the keys after each query; n = m.
        logit_bias: added to the logits, -inf where a key is hidden; sliced, so a broadcast view costs nothing.
        chunk: rows at a time; by default as many as make about four million logits, 130 million on a GPU.

    Raises:
        InvalidInput: a shape or `chunk` does not fit, a logit is NaN or +inf, or a row has no visible key.
    """
    parts: list[tuple[Tensor, ...]] = []
    for logits, error in logit_chunks(queries, keys, scale, causal, logit_bias, chunk):
        g_1 = _blurred(g_upper_from_logits(logits), error)
        largest, index = logits.max(-1)
        rest = logits.scatter(-1, index.unsqueeze(-1), -torch.inf)
        log_total = logits.logsumexp(-1)
        parts.append((largest, rest.amax(-1), log_total, rest.logsumexp(-1) - log_total, g_1))
    largest, second, log_total, log_tail, g_1 = (torch.cat(values, -1) for values in zip(*parts, strict=True))
    return RowSummary(largest=largest, second=second, log_total=log_total, log_tail=log_tail, g_1=g_1)


@torch.no_grad()
def streaming_map_norm(
    queries: Float[Tensor, "*batch n d"],
    keys: Float[Tensor, "*batch m width"],
    scale: float,
    *,
    passes: int = PASSES,
    causal: bool = False,
    logit_bias: Float[Tensor, "*bias rows cols"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Upper bound on ||P||, P = softmax(scale Q K^T + bias): proved, whatever the number of passes; float64.

    Args:
        queries: as in `streaming_g1`.
        keys: as in `streaming_g1`.
        scale: as in `streaming_g1`.
        passes: over the map; with one, the root of the largest column sum.
        causal: as in `streaming_g1`.
        logit_bias: as in `streaming_g1`.
        chunk: as in `streaming_g1`.

    Raises:
        InvalidInput: as `streaming_g1`; `passes` is below 1.
    """
    if passes < 1:
        raise InvalidInput(f"passes must be at least 1, got passes={passes}.")
    n, m = queries.shape[-2], keys.shape[-2]
    vector = torch.ones_like(keys[..., :1].double().mT)
    smallest = torch.full((), float(n), dtype=torch.float64, device=keys.device)  # ||P||^2 <= n: rows sum to 1
    for _ in range(passes):
        again = torch.zeros_like(vector)
        for logits, error in logit_chunks(queries, keys, scale, causal, logit_bias, chunk):
            maps = logits.softmax(-1) * _factor(2 * error).unsqueeze(-1)
            maps = inflate(maps.clamp(max=1.0), m + 24).masked_fill(logits.isneginf(), 0.0) + SMALLEST_NORMAL
            again = again + (vector @ maps.mT) @ maps
        ratio = inflate((again + (n + m) * SMALLEST_NORMAL) / vector, n + m + 8).amax((-2, -1))
        smallest = torch.minimum(smallest, ratio)
        vector = (again / again.amax(-1, keepdim=True)).clamp(min=SMALLEST_ENTRY)
    return inflate(smallest.sqrt(), 4)


@torch.no_grad()
def streaming_theorem_3(block: Attention, *, passes: int = PASSES, chunk: int | None = None) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the Jacobian, Theorem 3 of Yudin et al. 2025 with biases, without the n x m map.

    As `yudin2025.biased`, with ||P|| from `streaming_map_norm`: never below it but for rounding. Not differentiable.

    Args:
        block: self- or cross-attention without rotary positions and QK-norm.
        passes: as in `streaming_map_norm`.
        chunk: as in `streaming_g1`.

    Raises:
        InvalidInput: as `streaming_map_norm`.
        UnsupportedAttention: the block has rotary positions or QK-norm.
    """
    if block.query_rotation is not None:
        raise UnsupportedAttention("streaming_theorem_3 takes no rotary positions; use yudin2025.biased.")
    if block.query_norm is not None:
        raise UnsupportedAttention(
            "streaming_theorem_3 takes no QK-norm; lipbounds.select(block=block) lists what does."
        )
    wide = block.double
    norms = block_g_1(wide, chunk).amax(-1)
    change = mixing = torch.zeros_like(norms)
    if wide.query_moves:
        change = change + change_by_queries(wide)
    if wide.memory_moves:
        change = change + change_by_keys(wide)
        mixing = wide.weight_norms.values * block_map_norm(wide, passes, chunk)
    softmax_part = value_norm(wide) * norms * abs(wide.scale_value) * change
    return cast_up(inflate(combine_heads(wide, mixing + softmax_part), 16), block.dtype)


def block_g_1(block: Attention, chunk: int | None) -> Float[Tensor, "*batch heads n"]:
    """g_1 of each row at the exact logits, rounded up.

    Args:
        block: in float64.
        chunk: as in `streaming_g1`.
    """
    rows = [g_upper_from_logits(logits) for logits, _ in logit_chunks(*logits_of(block), chunk)]
    return _blurred(torch.cat(rows, -1), logit_error(block))


def block_map_norm(block: Attention, passes: int, chunk: int | None) -> Float[Tensor, "*batch heads"]:
    """||P|| of each head at the exact logits, rounded up.

    Args:
        block: in float64.
        passes: as in `streaming_map_norm`.
        chunk: as in `streaming_g1`.
    """
    queries, keys, scale, causal, bias = logits_of(block)
    found = streaming_map_norm(queries, keys, scale, passes=passes, causal=causal, logit_bias=bias, chunk=chunk)
    # `streaming_map_norm` takes queries and keys as given.
    return inflate(found * _factor(2 * logit_error(block).amax(-1)), 4).clamp(max=block.tokens**0.5 * (1 + 1e-15))


def logits_of(block: Attention) -> tuple[Tensor, Tensor, float, bool, Tensor | None]:
    """What `logit_chunks` needs of a block; no causal mask is made.

    Args:
        block: in float64.
    """
    bias = block.logit_bias
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], block.tokens, block.source_input.shape[-2])
    return block.queries, block.keys, block.scale_value, block.causal, bias


def logit_chunks(
    queries: Tensor, keys: Tensor, scale: float, causal: bool, logit_bias: Tensor | None, chunk: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of some rows after the other in float64, and how far those of a row can be from the exact ones.

    Args:
        queries: as in `streaming_g1`.
        keys: as in `streaming_g1`.
        scale: as in `streaming_g1`.
        causal: as in `streaming_g1`.
        logit_bias: as in `streaming_g1`.
        chunk: as in `streaming_g1`.

    Raises:
        InvalidInput: as `streaming_g1`.
    """
    n, m = queries.shape[-2], keys.shape[-2]
    if queries.shape[-1] != keys.shape[-1]:
        raise InvalidInput(f"queries and keys must have one width, got {queries.shape[-1]} and {keys.shape[-1]}.")
    if causal and n != m:
        raise InvalidInput(f"causal=True needs as many queries as keys, got {n} and {m}; pass a logit_bias.")
    if logit_bias is not None and tuple(logit_bias.shape[-2:]) != (n, m):
        raise InvalidInput(
            f"logit_bias must end in the shape ({n}, {m}), got {tuple(logit_bias.shape)}; expand it, which is a view."
        )
    if chunk is None:
        entries = ENTRIES_APART if waits_for(keys) else ENTRIES
        chunk = max(1, entries // (m * max(queries[..., 0, 0].numel(), keys[..., 0, 0].numel())))
    if chunk < 1:
        raise InvalidInput(f"chunk must be at least 1, got chunk={chunk}.")
    wide = keys.double()
    reach = gamma(keys.shape[-1] + 4) * abs(scale) * vector_norm(wide).amax(-1, keepdim=True) * (1 + 1e-9)
    for start in range(0, n, chunk):
        rows = queries[..., start : start + chunk, :].double()
        logits = scale * rows @ wide.mT
        error = reach * vector_norm(rows)
        if logit_bias is not None:
            bias = logit_bias[..., start : start + chunk, :].double()
            logits = logits + bias
            error = error + 2 * UNIT_ROUNDOFF * bias.masked_fill(bias.isneginf(), 0.0).abs().amax(-1)
        if causal:
            numbers = torch.arange(start, start + rows.shape[-2], device=keys.device)
            later = torch.arange(m, device=keys.device) > numbers.unsqueeze(-1)
            logits = logits.masked_fill(later, -torch.inf)
        yield logits, error.expand(logits.shape[:-1])


def _factor(exponent: Tensor) -> Tensor:
    """exp of the error of a logarithm, large enough where it is beyond all use."""
    return exponent.clamp(max=LARGEST_EXPONENT).exp()


def _blurred(norms: Tensor, error: Tensor) -> Tensor:
    """Norms of the softmax Jacobian with the slack for the error of the logits; never above 1/2, which always holds."""
    lost = (4 * error > LARGEST_EXPONENT) & (norms > 0)  # a norm of 0 is that of a single visible key: exact
    return torch.where(lost, 0.5, inflate(norms * _factor(4 * error), 8)).clamp(max=0.5)
