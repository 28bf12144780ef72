r"""A sound bound of blocks with QK-norm, written once more from replaceable parts: `centred.weights`, not centred.

For each head, with M_i and L_j the derivatives of a normalised and turned query and key by its token, D x d matrices,

    L = ||W_V|| ||P|| + ||V|| max_i g_1(P_i) |s| ( ||K|| max_i ||M_i|| + ||Q|| max_j ||L_j|| ),
    M_i = r ( W_h - c u_h^T / N ) diag(w) R_i^T,    u = r z,  c = sum W u,  r = (mean z^2 + eps)^(-1/2),

z = x W + b, sums and means over the N features that are normalised together.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention
from lipbounds.targets.rotary import rotate
from verify.faults.right import ROUNDING, Formula, frobenius, norm, row_size


Reach = Callable[[Attention, str], Tensor]  # of each head, for the side "query" or "key"


@dc.dataclass(frozen=True, kw_only=True)
class Derivative:
    """max_i ||M_i||; each part can be replaced.

    Args:
        eps: what is added to the mean square.
        gain: the weights w.
        over: what is normalised together.
        mean: whether squares are averaged.
        radial: whether the part along z is taken off.
    """

    eps: Callable[[Attention], float] = lambda block: block.norm_eps or 1.0
    gain: Callable[[Tensor], Tensor] = lambda gain: gain
    over: Callable[[Attention], str | None] = lambda block: block.norm_over
    mean: bool = True
    radial: bool = True

    def __call__(self, block: Attention, side: str) -> Float[Tensor, "*batch heads"]:
        """The largest norm of a token's derivative, with its rounding.

        Args:
            block: in float64.
            side: `query` or `key`.
        """
        tokens, affine = getattr(block, f"{side}_factors")
        weights = block.w_q if side == "query" else block.w_k
        gain, rotation = getattr(block, f"{side}_norm_weight"), getattr(block, f"{side}_rotation")
        derivative, root = weights.unsqueeze(-3), torch.ones_like(weights[..., :1, :1])
        if gain is not None:
            gain = self.gain(gain).unsqueeze(-2)
            rows, mixing, root = self._normalised(block, tokens @ affine, weights)
            derivative = root.unsqueeze(-1) * (derivative - mixing.unsqueeze(-1) * rows.unsqueeze(-2))
            derivative = derivative * gain.unsqueeze(-2)
        if rotation is not None:
            turned = derivative.expand(*derivative.shape[:-3], rotation.shape[-3], *derivative.shape[-2:])
            derivative = rotate(turned.movedim(-2, 0), rotation).movedim(0, -2)
        largest = torch.linalg.matrix_norm(derivative, 2).amax(-1)
        room = row_size(block, side) * root.amax((-2, -1)) * frobenius(weights).square().sum(-1, keepdim=True).sqrt()
        return largest * (1 + ROUNDING) + 10 * ROUNDING * room

    def _normalised(self, block: Attention, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, c / N (0 if it is left out) and r of each token."""
        together = (-3, -1) if self.over(block) == "all_heads" else (-1,)
        count = rows.shape[-1] * (rows.shape[-3] if len(together) > 1 else 1)
        share = 1 / count if self.mean else 1.0
        root = (rows.square().sum(together, keepdim=True) * share + self.eps(block)).rsqrt()
        unit = rows * root
        mixing = torch.einsum("...hde,...hne->...hnd", weights, unit) * (share if self.radial else 0.0)
        return unit, mixing.sum(-3, keepdim=True) if len(together) > 1 else mixing, root


RIGHT = Derivative()


def normed(
    *,
    keys: Callable[[Attention], Tensor] = lambda block: norm(block.keys),
    queries: Callable[[Attention], Tensor] = lambda block: norm(block.queries),
    reach: Reach = RIGHT,
) -> Formula:
    """`Formula` with ||K|| max_i ||M_i|| and ||Q|| max_j ||L_j||.

    Args:
        keys: ||K||, after norm and rotation.
        queries: ||Q||, likewise.
        reach: max_i ||M_i|| and max_j ||L_j||.
    """

    def key_side(block: Attention) -> Tensor:
        return (keys(block) + _room(block, "key")) * reach(block, "query")

    def query_side(block: Attention) -> Tensor:
        return (queries(block) + _room(block, "query")) * reach(block, "key")

    return Formula(key_side=key_side, query_side=query_side)


def _room(block: Attention, side: str) -> Tensor:
    """Rounding of all queries or keys of a head."""
    return ROUNDING * row_size(block, side) * getattr(block, f"{side}_factors")[0].shape[-2] ** 0.5
