"""Of every row of a map and key j: the functional c_j = e_j - q_j, q_j the row without j, by which log-odds grow.

Notation and use: lipbounds.derivatives.ball.log_odds.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention


@dc.dataclass(frozen=True, eq=False)
class OddsRows:
    """What counts of the c_j of every head, row and key j, [heads, n, m]; q_j as computed.

    Args:
        block: in float64.
    """

    block: Attention

    @cached_property
    def top(self) -> Tensor:
        """Whether a key is the one with the largest probability in its row."""
        index = self.block.probabilities.argmax(-1, keepdim=True)
        return torch.zeros_like(self.block.logits, dtype=torch.bool).scatter(-1, index, True)

    @cached_property
    def rest(self) -> Tensor:
        """The row without its largest entry, normalised."""
        others = self.block.probabilities.masked_fill(self.top, 0.0)
        total = others.sum(-1, keepdim=True)
        return others / torch.where(total > 1e-290, total, 1.0)

    @property
    def known(self) -> Tensor:
        """False for the largest entry of a row in which the others have underflowed."""
        return ~self.top | (self.rest.sum(-1, keepdim=True) > 0.5)

    def each(self, of_row: Tensor, of_rest: Tensor, power: int) -> Tensor:
        """Of e_j - P, divided by 1 - P_j as often as it occurs, and for the largest key of e_j - (the rest)."""
        left = 1 - self.block.probabilities.masked_fill(self.top, 0.5)  # >= 1/2
        return torch.where(self.top, of_rest, of_row / left**power)

    @cached_property
    def entries(self) -> Tensor:
        """sum_l c_jl^2."""
        maps = self.block.probabilities
        others = (maps.square().sum(-1, keepdim=True) - maps.square()).clamp(min=0)
        return 1 + self.each(others, self.rest.square().sum(-1, keepdim=True), 2)

    @cached_property
    def own(self) -> Tensor:
        """c_jl of the token l that the query is at."""
        block, tokens = self.block, self.block.logits.shape[-1]
        places = torch.arange(tokens, device=block.device)
        at = (places if block.queries_at is None else block.queries_at).unsqueeze(-1)
        same = (at == places).to(block.logits)
        own = [(same - (row * same).sum(-1, keepdim=True)) for row in (block.probabilities, self.rest)]
        return self.each(own[0], own[1], 1)
