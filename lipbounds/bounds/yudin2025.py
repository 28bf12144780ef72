"""Yudin, Gaponov, Kudriashov, Rakhuba 2025: Pay Attention to Attention Distribution (arXiv 2507.07814).

| paper | here |
|---|---|
| X, n x D | `block.x` |
| W_Q, W_K, W_V of a head; A = W_Q W_K^T / sqrt(d) | `w_q[h]`, `w_k[h]`, `w_v[h]`; `scale * w_q[h] @ w_k[h].T` |
| P, g_1(P_i) | `block.probabilities`, lipbounds.ops.softmax |

    theorem3 (one head, no biases):  ||W_V|| ( ||P|| + 2 ||X||^2 ||A|| max_i g_1(P_i) )
    biased:                          ||W_V|| ||P|| + ||V|| max_i g_1(P_i) s ( ||K W_Q^T|| + ||Q W_K^T|| )

Heads (ours: the theorem is stated for one): ||W_O|| sqrt(sum_h L_h^2). Where only the query moves, the first and the
last term of `biased` are 0; where only the memory moves, ||K W_Q^T|| is. Baselines replace g_1 by the exact norm of the
softmax Jacobian, by 1/2 (Nair 2025, arXiv 2510.23012, Theorem 1) and by 1. Proof, biases, rotary positions, QK-norm:
docs/bounds/yudin2025.md.

Numerics: float64, logits with the error analysis of lipbounds.derivatives.rounding.logits, norms of products rounded
up. `biased` at a block in a shorter dtype, on the CPU: float32 with its rounding proved and added
(lipbounds.derivatives.first.single_precision), where that adds under 5 %; `detail.bits` says which it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.single_precision import (
    Precision,
    theorem_3_in_single_precision,
    wanted_in_single_precision,
)
from lipbounds.derivatives.logit_changes import change_by_keys, change_by_queries
from lipbounds.derivatives.norms import (
    combine_heads,
    largest_g_1,
    largest_softmax_norm,
    map_norm,
    output_norm,
    value_norm,
)
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import BoundSpec, Terms, bound
from lipbounds.rounding import cast_up, product
from lipbounds.targets.attention import Attention


SoftmaxNorm = Callable[[Attention], Float[Tensor, "*batch heads"]]
PAPER = "Pay Attention to Attention Distribution"
WITH_MAPS = "O(H n^2 (d + n) + H D d^2); with rotary positions or QK-norm also O(H n d^3), of all heads O(H^2 n d^2 D)"
AUTHORS = "Yudin, Gaponov, Kudriashov, Rakhuba"


def one_half(block: Attention) -> Float[Tensor, "*batch heads"]:
    """The constant 1/2 >= ||J(p)|| for every p (Nair 2025, Theorem 1)."""
    return torch.full_like(block.logits[..., 0, 0], 0.5)


def one(block: Attention) -> Float[Tensor, "*batch heads"]:
    """The constant 1 >= ||J(p)|| for every p."""
    return torch.ones_like(block.logits[..., 0, 0])


def _literal(block: Attention, softmax_norm: SoftmaxNorm) -> tuple[Tensor, Terms]:
    """Theorem 3 as printed, heads combined as the top of this file says."""
    inputs = spectral_norm_upper(block.x).unsqueeze(-1)
    products = abs(block.scale_value) * block.weight_norms.logits
    norms = softmax_norm(block)
    values = block.weight_norms.values
    softmax_part = product(values, 2.0, inputs.square(), products, norms)
    return _combine(block, product(values, map_norm(block)), softmax_part, norms)


def _with_biases(block: Attention, softmax_norm: SoftmaxNorm) -> tuple[Tensor, Terms]:
    """The same proof with the real queries, keys and values."""
    norms = softmax_norm(block)
    logit_change = torch.zeros_like(norms)
    mixing = torch.zeros_like(norms)
    if block.query_moves:
        logit_change = logit_change + change_by_queries(block)
    if block.memory_moves:
        logit_change = logit_change + change_by_keys(block)
        mixing = product(block.weight_norms.values, map_norm(block))
    values = value_norm(block)
    return _combine(block, mixing, product(values, norms, abs(block.scale_value), logit_change), norms)


def _biased(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
    if wanted_in_single_precision(block, precision):
        short = theorem_3_in_single_precision(block)
        if short.is_close():
            return short.result(block)
    value, terms = _with_biases(block.double, largest_g_1)
    return cast_up(value, block.dtype), {**terms, "detail.bits": torch.full_like(value, 64)}


def _combine(block: Attention, mixing: Tensor, softmax_part: Tensor, norms: Tensor) -> tuple[Tensor, Terms]:
    terms = {
        "output_weights": output_norm(block).expand(block.batch_shape),
        "detail.mixing": mixing,
        "detail.softmax_part": softmax_part,
        "detail.softmax_norm": norms,
    }
    return combine_heads(block, mixing + softmax_part), terms


def _declare(
    name: str,
    formula: Callable[..., tuple[Tensor, Terms]],
    factor: SoftmaxNorm,
    statement: str,
    *,
    compute: Callable[..., tuple[Tensor, Terms]] | None = None,
    version: int | None = None,
) -> BoundSpec:
    literal = formula is _literal

    def in_float64(block: Attention) -> tuple[Tensor, Terms]:
        value, terms = formula(block.double, factor)
        return cast_up(value, block.dtype), terms

    compute = in_float64 if compute is None else compute
    compute.__doc__ = statement
    compute.__qualname__ = name
    return bound(
        name=f"yudin2025.{name}",
        claim=Claim(kind="proved", scope="point", norm="l2"),
        source=Source(title=PAPER, authors=AUTHORS, year=2025, arxiv="2507.07814", statement=statement),
        supports=("heads", "mask", "some_queries")
        if literal
        else ("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
        cost="O(H n^2 (d + n) + H D d^2)" if literal else WITH_MAPS,
        version=version or (1 if literal else 2),
    )(compute)


theorem3 = _declare("theorem3", _literal, largest_g_1, "Theorem 3 as printed")
theorem3_exact = _declare("theorem3_exact", _literal, largest_softmax_norm, "Theorem 3 with the exact softmax norm")
theorem3_half = _declare("theorem3_half", _literal, one_half, "Theorem 3 with 1/2 for the softmax norm (Nair 2025)")
theorem3_one = _declare("theorem3_one", _literal, one, "Theorem 3 with 1 for the softmax norm (naive)")
biased = _declare(
    "biased", _with_biases, largest_g_1, "proof of Theorem 3 with the real Q, K, V", compute=_biased, version=3
)
biased_exact = _declare("biased_exact", _with_biases, largest_softmax_norm, "real Q, K, V and the exact softmax norm")
biased_half = _declare("biased_half", _with_biases, one_half, "real Q, K, V and 1/2 for the softmax norm (Nair 2025)")
biased_one = _declare("biased_one", _with_biases, one, "real Q, K, V and 1 for the softmax norm (naive)")
