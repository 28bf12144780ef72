"""Nair 2025: Softmax is 1/2-Lipschitz (TMLR, arXiv 2510.23012), applied to scaled cosine similarity attention.

Theorem 1, ||J(p)|| <= 1/2 in every l_p norm, is what the `half` baselines of yudin2025 use. For n tokens

    theorem2:             nu e ( n^2 tau ||W_K||  +  n tau ||W_Q||  +  2 n ||W_V|| )
    half (ours):          nu e ( (n/2) tau ( ||W_Q|| + ||W_K|| )  +  sqrt(n) ||W_V|| )
    covariance (ours):    nu e ( tau ||W_Q||  +  sqrt(g) ( tau ||W_K|| + ||W_V|| ) ),    g = n / (1 + (n-1) e^(-2 tau))

| symbol | meaning |
|---|---|
| tau, nu | temperature and output factor, as in CosineAttention |
| e = eps^(-1/2) | eps, what the normalisation of a row adds to its squared length |
| g | bound of the column sums of the attention map |

Numerics: float64, norms of the weights rounded up, a few operations on positive numbers. Theorem 2 was read. Proofs of
all three: docs/bounds/nair2025.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import BoundSpec, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.cosine_attention import CosineAttention


Formula = Callable[[int, float], tuple[float, float, float]]


def _theorem2(n: int, tau: float) -> tuple[float, float, float]:
    return n * tau, n**2 * tau, 2.0 * n


def _half(n: int, tau: float) -> tuple[float, float, float]:
    return n / 2 * tau, n / 2 * tau, n**0.5


def _covariance(n: int, tau: float) -> tuple[float, float, float]:
    # The exponent is rounded towards a larger column sum.
    largest = (n / (1 + (n - 1) * math.exp(-2 * tau * (1 + 2.0**-48)))) ** 0.5
    return tau, largest * tau, largest


def _declare(name: str, formula: Formula, statement: str) -> BoundSpec:
    def compute(block: CosineAttention) -> Float[Tensor, "*batch"]:
        wide = block.double
        factors = formula(wide.tokens, wide.scale)
        norms = (spectral_norm_upper(weights) for weights in (wide.w_q, wide.w_k, wide.w_v))
        terms = [factor * norm for factor, norm in zip(factors, norms, strict=True)]
        value = wide.output_scale / wide.eps**0.5 * (terms[0] + terms[1] + terms[2])
        return cast_up(inflate(value, 32).expand(block.batch_shape), block.dtype)

    compute.__doc__ = statement
    compute.__qualname__ = name
    return bound(
        name=f"nair2025.{name}",
        claim=Claim(kind="proved", scope="global", norm="l2"),
        source=Source(
            title="Softmax is 1/2-Lipschitz: A tight bound across all l_p norms",
            authors="Nair",
            year=2025,
            arxiv="2510.23012",
            statement=statement,
        ),
        cost="O(D d^2)",
        target=CosineAttention,
    )(compute)


theorem2 = _declare("theorem2", _theorem2, "Theorem 2 on scaled cosine similarity attention")
half = _declare("half", _half, "cosine attention with 1/2 for the softmax norm, ours")
covariance = _declare("covariance", _covariance, "cosine attention by covariances under the attention map, ours")
