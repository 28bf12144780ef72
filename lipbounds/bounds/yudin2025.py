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
up. At a block in a shorter dtype, on the CPU: float32 with its rounding proved and added
(lipbounds.derivatives.first.single_parts), where that adds under 5 %; `details["bits"]` says which it was, and
`precision="float64"` asks for float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.derivatives.first.single_parts import SingleParts, in_single_or_double
from lipbounds.derivatives.first.single_precision import Precision, Rounded, known
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
from lipbounds.rounding import product
from lipbounds.targets.attention import Attention


SoftmaxNorm = Callable[[Attention], Float[Tensor, "*batch heads"]]
SingleSoftmaxNorm = Callable[[SingleParts], Rounded]
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


def _literal_in_single(parts: SingleParts, softmax_norm: Rounded) -> Rounded:
    weights = 2 * parts.scale * parts.norms.logits * parts.norms.values
    return parts.of_heads(parts.mixing + parts.tokens_norm * parts.tokens_norm * softmax_norm * weights)


def _with_biases_in_single(parts: SingleParts, softmax_norm: Rounded) -> Rounded:
    values, change = parts.value_and_change()
    return parts.of_heads(values * softmax_norm * change + parts.mixing)


def _combine(block: Attention, mixing: Tensor, softmax_part: Tensor, norms: Tensor) -> tuple[Tensor, Terms]:
    terms = {
        "output_weights": output_norm(block).expand(block.batch_shape),
        "detail.mixing": mixing,
        "detail.softmax_part": softmax_part,
        "detail.softmax_norm": norms,
    }
    return combine_heads(block, mixing + softmax_part), terms


def _declare(
    name: str, formula: Callable[[Attention, SoftmaxNorm], tuple[Tensor, Terms]], factor: str, statement: str
) -> BoundSpec:
    literal = formula is _literal
    in_single = _literal_in_single if literal else _with_biases_in_single
    double, single = FACTORS[factor]

    def compute(block: Attention, precision: Precision = "auto") -> tuple[Tensor, Terms]:
        return in_single_or_double(
            block, precision, lambda parts: in_single(parts, single(parts)), lambda wide: formula(wide, double)
        )

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
        version=2 if literal else 3,
    )(compute)


def _constant_in_single(parts: SingleParts, norm: float) -> Rounded:
    return known(parts.norms.values.new_full((), norm))


# What stands for the norm of the softmax Jacobian, of a block in float64 and of parts in float32.
FACTORS: dict[str, tuple[SoftmaxNorm, SingleSoftmaxNorm]] = {
    "g_1": (largest_g_1, lambda parts: parts.maps.g_1),
    "exact": (largest_softmax_norm, lambda parts: parts.softmax_norm),
    "half": (one_half, lambda parts: _constant_in_single(parts, 0.5)),
    "one": (one, lambda parts: _constant_in_single(parts, 1.0)),
}

theorem3 = _declare("theorem3", _literal, "g_1", "Theorem 3 as printed")
theorem3_exact = _declare("theorem3_exact", _literal, "exact", "Theorem 3 with the exact softmax norm")
theorem3_half = _declare("theorem3_half", _literal, "half", "Theorem 3 with 1/2 for the softmax norm (Nair 2025)")
theorem3_one = _declare("theorem3_one", _literal, "one", "Theorem 3 with 1 for the softmax norm (naive)")
biased = _declare("biased", _with_biases, "g_1", "proof of Theorem 3 with the real Q, K, V")
biased_exact = _declare("biased_exact", _with_biases, "exact", "real Q, K, V and the exact softmax norm")
biased_half = _declare("biased_half", _with_biases, "half", "real Q, K, V and 1/2 for the softmax norm (Nair 2025)")
biased_one = _declare("biased_one", _with_biases, "one", "real Q, K, V and 1 for the softmax norm (naive)")
