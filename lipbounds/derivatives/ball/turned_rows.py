r"""Keys and queries of all heads seen from the tokens where rotary positions turn them or QK-norm divides them.

With dq_i = T_i W_Q^T dx_i and dk_j = T_j W_K^T dx_j (lipbounds.derivatives.token_maps) the gradients of the logits
depend on both tokens,

    w_hij = s W_Q^h T_hi^T k_hj,      u_hij = s W_K^h T_hj^T q_hi,

so that row i of the map has keys of its own. Each row of lipbounds.derivatives.ball.rows becomes one for each i, each
u_hi one for each j. In the ball T moves, too, if it comes from a norm: what that does to a row is part of its error.
Proof: docs/derivatives.md, section 6.
"""

from __future__ import annotations

import dataclasses as dc
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.reach import logit_bend, reaches
from lipbounds.derivatives.ball.rows import OWN_ROUNDING, Queries, Rows, TurnedRows, factored
from lipbounds.derivatives.first.pulled_queries import PulledQueries, pulled_error
from lipbounds.derivatives.rounding.logits import key_error
from lipbounds.derivatives.token_maps import TokenMaps, query_maps
from lipbounds.ops.spectral import spectral_norm_upper, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


CHUNK_ENTRIES = 2**22  # of gradients in the space of tokens that are made at a time


def is_turned(block: Attention) -> bool:
    """Whether queries and keys have rotary positions or QK-norm.

    Args:
        block: the attention block.
    """
    return not block.features.isdisjoint(("rotary", "qk_norm"))


class PulledKeys:
    """T_hi^T k_hj of every query and key, the W_Q that they meet, with the heads it has, and their error.

    Args:
        block: in float64, with rotary positions or QK-norm.
    """

    def __init__(self, block: Attention) -> None:
        maps = query_maps(block)
        assert maps is not None
        self.maps: TokenMaps = maps
        self.weights = maps.weights
        self._keys = block.keys
        with torch.no_grad():
            self.error = pulled_error(maps, block.keys.norm(dim=-1), key_error(block)).amax(-1)

    def __call__(self, rows: slice = slice(None)) -> Float[Tensor, "*batch heads rows m features"]:
        """Those of some queries.

        Args:
            rows: which.
        """
        return torch.einsum("...hidf,...hjd->...hijf", self.maps.matrices[..., rows, :, :], self._keys)


def chunks(block: Attention) -> list[slice]:
    """Rows of the map whose gradients are made at a time.

    Args:
        block: the attention block.
    """
    features = max(block.w_q.shape[-2], block.w_k.shape[-2])
    each = block.logits.shape[-1] * block.heads * features
    step = max(1, CHUNK_ENTRIES // each)
    return [slice(k, min(k + step, block.tokens)) for k in range(0, block.tokens, step)]


def gradient_error(
    weights: Float[Tensor, "*#batch any_heads dim features"],
    pulled: Float[Tensor, "*#batch heads"],
    error: Float[Tensor, "*#batch heads"],
) -> Float[Tensor, "*#batch heads"]:
    """How far a computed product of weights with a pulled row can be from the exact one; without a gradient.

    Args:
        weights: W.
        pulled: the largest norm of a row.
        error: of a row.
    """
    size = weights.detach().square().sum((-2, -1)).sqrt()
    return size * (error + 2 * gamma(weights.shape[-1] + 8) * (pulled.detach() + error)) * OWN_ROUNDING


class TurnedTokens:
    """Rows of the keys and queries of a block on balls about its input; what does not depend on the radius, once.

    Args:
        block: in float64, with rotary positions or QK-norm.
    """

    def __init__(self, block: Attention) -> None:
        self.block = block

    def keys(self, radius: Float[Tensor, "*#batch"]) -> Rows:
        """w_hij = s W_Q^h T_hi^T k_hj and how far it moves; the errors are those in the ball.

        Args:
            radius: of the ball.
        """
        queries, keys = reaches(self.block, radius)
        scale, (base, rest) = abs(self.block.scale_value), self._keys
        change, joint_change = logit_bend(self.block, queries, keys)
        maps = query_maps(self.block)
        assert maps is not None
        first = inflate(maps.norm * keys.rate, 4)  # of T_i^T (k' - k) for each unit of the radius
        error = base.error
        if self.block.query_norm is not None:  # s (A' - A)^T (k' - c), A = T W_Q^T, c the mean of the keys of a row
            apart = self._spread + (radius.unsqueeze(-1) * keys.rate if self.block.memory_moves else 0.0)
            turn = torch.minimum(radius.unsqueeze(-1) * queries.bend, 2 * queries.rate)
            error = error + inflate(scale * turn * torch.minimum(apart, 2 * keys.size), 16)
        return dc.replace(
            base,
            error=error,
            change=change,
            reduced_change=inflate(base.reduced_change * first, 4),
            change_error=(rest * first).detach() * OWN_ROUNDING,
            joint_change=joint_change,
        )

    def queries(self, radius: Float[Tensor, "*#batch"]) -> Queries:
        """u_hij = s W_K^h T_hj^T q_hi and how far it moves; the error is that in the ball.

        Args:
            radius: of the ball.
        """
        queries, keys = reaches(self.block, radius)
        change, joint_change = logit_bend(self.block, queries, keys)
        error = self._queries.error
        if self.block.key_norm is not None:  # s (B' - B)^T q', B = T W_K^T
            turn = torch.minimum(radius.unsqueeze(-1) * keys.bend, 2 * keys.rate)
            error = error + inflate(abs(self.block.scale_value) * turn * queries.size, 16)
        return dc.replace(self._queries, error=error, change=change, joint_change=joint_change)

    @cached_property
    def _keys(self) -> tuple[Rows, Float[Tensor, "*#batch heads"]]:
        """At the centre, `reduced_change` for each unit that T_i^T k_j moves; what B L^T leaves of the weights."""
        block, pulled = self.block, PulledKeys(self.block)
        weights = abs(block.scale_value) * pulled.weights
        basis = factored(weights.expand(*weights.shape[:-3], block.heads, *weights.shape[-2:]))
        tokens = pulled()
        centred = tokens - tokens.mean(-2, keepdim=True)
        with torch.no_grad():
            error = basis.error(tokens.norm(dim=-1).amax((-2, -1)), pulled.error, tokens.shape[-2])
            rest = basis.rest * basis.own_unit
        unit = basis.unit
        reduced = centred @ basis.triangle.unsqueeze(-3) * unit[..., None, None, None]
        turned = unit * spectral_norm_upper(basis.triangle)
        nothing = torch.zeros_like(turned)
        rows = TurnedRows(reduced, basis.norm, basis.joint, error, nothing, turned, nothing, nothing[..., 0])
        return rows, rest

    @cached_property
    def _spread(self) -> Float[Tensor, "*#batch heads"]:
        """Largest distance of a key from the mean of its row at the centre, the error of keys included."""
        block = self.block
        means = block.probabilities @ block.keys
        apart = torch.cdist(means, block.keys.expand(*means.shape[:-2], *block.keys.shape[-2:]),
                            compute_mode="donot_use_mm_for_euclid_dist")  # fmt: skip
        return inflate(apart.amax((-2, -1)) + key_error(block).amax(-1), block.keys.shape[-1] + 16)

    @cached_property
    def _queries(self) -> Queries:
        """At the centre."""
        block, pulled = self.block, PulledQueries(self.block)
        inner, sizes, lengths, largest = [], [], [], []
        hidden = block.logits.isneginf()
        for rows in chunks(block):
            rows_pulled = pulled(rows)
            gradients = rows_pulled @ pulled.weights.mT.unsqueeze(-3)  # heads x rows x m x D
            beside = gradients.movedim(-4, -2)
            inner.append(beside @ beside.mT)
            length = inflate(vector_norm(gradients), gradients.shape[-1] + 8)
            sizes.append(torch.where(hidden[..., rows, :], 0.0, length).amax(-1))
            lengths.append(length.detach().square().sum(-3).amax(-1))
            largest.append(rows_pulled.detach().norm(dim=-1).amax((-2, -1)))
        error = gradient_error(pulled.weights, torch.stack(largest).amax(0), pulled.error.amax(-1))
        slack = 2 * gamma(block.w_k.shape[-2] + 4) * torch.cat(lengths, -1)
        nothing = torch.zeros_like(error)
        return Queries(None, torch.cat(inner, -4), torch.cat(sizes, -1), error, slack, nothing, nothing[..., 0])
