r"""How hard the blocks of a search are: what a verdict was reached on.

Bounds on attention are loose or wrong where rows are peaked, keys share an offset, or logits are large. Of each block,

- the weight of the largest key, the mean of max_j P_ij over rows and heads: 1/m for uniform rows of m keys, 1 where
  every query sees one key alone;
- the offset of the keys, |mean of k_j| / sqrt(mean of |k_j|^2), the largest over heads: 0 for centred keys, 1 for equal
  ones;
- ||A|| = |s| ||W_Q W_K^T||, the largest over heads.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention
from lipbounds.targets.target import Target


SHARES = (0.1, 0.5, 0.9)


@dc.dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Quantiles over the blocks of a search; each tuple is the 10 % quantile, the median and the 90 % quantile.

    Args:
        blocks: how many, each item of a batch counted.
        largest_weight: weight of the largest key, mean over the rows of a block.
        key_offset: of the keys, from 0 (centred) to 1 (equal).
        logit_weights: ||A||, the norm of the weights of the logits with their scale.
    """

    blocks: int
    largest_weight: tuple[float, float, float]
    key_offset: tuple[float, float, float]
    logit_weights: tuple[float, float, float]


class Seen:
    """Collects the difficulty of blocks; to be passed as `seen` to `lipbounds.testing.contract.run_check`."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def __call__(self, block: Target) -> None:
        """Note a block; one that is no `Attention` is left out.

        Args:
            block: not changed; nothing is cached on it.
        """
        if isinstance(block, Attention):
            self._rows.append(difficulty_of(block))

    def summary(self) -> Difficulty | None:
        """Quantiles over what was noted; None if nothing was."""
        if not self._rows:
            return None
        table = torch.cat(self._rows)
        found = [_quantiles(column) for column in table.unbind(1)]
        return Difficulty(blocks=len(table), largest_weight=found[0], key_offset=found[1], logit_weights=found[2])


@torch.no_grad()
def difficulty_of(block: Attention) -> Float[Tensor, "blocks 3"]:
    """Weight of the largest key, offset of the keys and ||A|| of each item of a batch of blocks, in float64.

    Args:
        block: any.
    """
    wide = block.replace().double  # a copy: checks must not find what was cached here
    weights = wide.probabilities.amax(-1).mean((-2, -1))
    keys = wide.keys / wide.keys.abs().amax((-3, -2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    size = keys.square().sum(-1).mean(-1)
    mean = keys.mean(-2).square().sum(-1)
    offset = (mean / size.where(size > 0, torch.ones_like(size))).sqrt().amax(-1)
    norms = (abs(wide.scale_value) * wide.weight_norms.logits).amax(-1)
    shape = wide.batch_shape
    return torch.stack([value.expand(shape).flatten() for value in (weights, offset, norms)], -1)


def _quantiles(values: Float[Tensor, " blocks"]) -> tuple[float, float, float]:
    ordered = values.sort().values.tolist()
    low, middle, high = (ordered[math.floor(share * (len(ordered) - 1) + 0.5)] for share in SHARES)
    return low, middle, high
