r"""Dasoulas, Scaman, Virmaux 2021: Lipschitz Normalization for Self-Attention Layers (ICML 2021, arXiv 2103.04886).

The constant of dot-product attention with LipschitzNorm in (Q, K, V), for m queries and n keys. The scores were read in
the released code; the constant is recollected, with the orientation of m/n derived again:

    recollected:      e^sqrt(3) sqrt(m/n) + 2 sqrt(6)
    tighter (ours):   max( sqrt(8 + g), sqrt(6 + 2 sqrt(g) + g) ),    g = m / (1 + (n-1) e^(-2))

Proof. S = Q K^T / M, M = max(u v, u w, v w) with u = ||Q||_F, v = max|k_j|, w = max|v_j|. The map is locally Lipschitz
where M > 0, so its constant is the largest norm of its differential where that exists. |S_ij| <= u v / M <= 1, so
P_ij <= 1 / (1 + (n-1) e^(-2)), column sums of P are at most g, rows sum to 1: ||P dV|| <= sqrt(g) ||dV||.
Row i of dP V is the covariance under P_i of v_j and dS_ij, at most w times the standard deviation of
dS_ij = ( <dq_i, k_j> + <q_i, dk_j> ) / M - S_ij dM / M. Its parts, summed over rows:
- <dq_i, k_j>: w v |dq_i| / M, at most ||dQ||.
- <q_i, dk_j>: w |q_i| max|dk_j| / M, and w u / M <= 1: at most ||dK||.
- S_ij dM / M: w (u v / M) |dM| / M, by cases, with |du| <= ||dQ||, |dv| <= ||dK||, |dw| <= ||dV||:
      M = u v:  (u w / M) |dv| + (v w / M) |du|            <= ||dK|| + ||dQ||
      M = u w:  (v / w) |dw| + (v / u) |du|,  v <= w, u    <= ||dV|| + ||dQ||
      M = v w:  (u / w) |dw| + (u / v) |dv|,  u <= w, v    <= ||dV|| + ||dK||
With (a, b, c) the norms of dQ, dK, dV this is sqrt(g) c + a + b + one of a + b, c + a, c + b, hence at most the norm of
(2, 2, sqrt(g)) or of (2, 1, 1 + sqrt(g)) times |(a, b, c)|.
`recollected` is above it: sqrt(g) <= e sqrt(m/n), sqrt(8 + g) <= sqrt(8) + sqrt(g), sqrt(5 + (1 + sqrt(g))^2) <=
sqrt(5) + 1 + sqrt(g), and sqrt(8) < sqrt(5) + 1 < 2 sqrt(6).

The value depends on the shapes alone, so it has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.registry import BoundSpec, bound
from lipbounds.rounding import cast_up, inflate
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention


def _recollected(m: int, n: int) -> float:
    return math.exp(3**0.5) * (m / n) ** 0.5 + 2 * 6**0.5


def _tighter(m: int, n: int) -> float:
    g = m / (1 + (n - 1) * math.exp(-2))
    return max(8 + g, 6 + 2 * g**0.5 + g) ** 0.5


def _declare(name: str, formula: Callable[[int, int], float], statement: str) -> BoundSpec:
    def compute(block: LipschitzNormAttention) -> Tensor:
        constant = formula(block.queries.shape[-2], block.keys.shape[-2])
        value = torch.full(block.batch_shape, constant, dtype=torch.float64, device=block.device)
        return cast_up(inflate(value, 32), block.dtype)

    compute.__doc__ = statement
    compute.__qualname__ = name
    return bound(
        name=f"dasoulas2021.{name}",
        claim=Claim(kind="proved", scope="global", norm="l2"),
        source=Source(
            title="Lipschitz Normalization for Self-Attention Layers with Application to Graph Neural Networks",
            authors="Dasoulas, Scaman, Virmaux",
            year=2021,
            arxiv="2103.04886",
            statement=statement,
        ),
        cost="O(1)",
        target=LipschitzNormAttention,
    )(compute)


recollected = _declare("recollected", _recollected, "LipschitzNorm constant, recollected and derived again")
tighter = _declare("tighter", _tighter, "LipschitzNorm constant with the parts of the score kept apart, ours")
