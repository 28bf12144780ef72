"""Dasoulas, Scaman, Virmaux 2021: Lipschitz Normalization for Self-Attention Layers (ICML 2021, arXiv 2103.04886).

The constant of dot-product attention with LipschitzNorm in (Q, K, V), for m queries and n keys. The scores were read in
the released code; the constant is recollected, with the orientation of m/n derived again:

    recollected:      e^sqrt(3) sqrt(m/n) + 2 sqrt(6)
    tighter (ours):   max( sqrt(8 + g), sqrt(6 + 2 sqrt(g) + g) ),    g = m / (1 + (n-1) e^(-2))

Proof: docs/bounds/dasoulas2021.md. The value depends on the shapes alone, so it has no gradient.
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
