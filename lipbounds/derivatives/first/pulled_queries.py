r"""Gradients of the logits in the tokens of the keys where each key moves through a map of its own.

With rotary positions or QK-norm dk_j = T_j W_K^T dx_j (lipbounds.derivatives.token_maps), so that the logits of query i
have one gradient for each key, u_hij = W_K^h t_hij with the pulled query

    t_hij = s T_hj^T q_hi,

f numbers each: the width of a head, or of all heads where they are normalised together. Sums over the keys are taken of
the t_hij, of which the products with W_K follow; inner products <u_hij, u_gkj> are those of t_hij and t_gkj under
W_K^hT W_K^g. Rounding: docs/derivatives.md, section 2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.derivatives.token_maps import TokenMaps, key_maps, query_maps
from lipbounds.ops.spectral import power_of_two
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


class PulledQueries:
    """The t_hij of a block, W_K of order 1, and their sizes and errors.

    Args:
        block: in float64, with rotary positions or QK-norm.
    """

    def __init__(self, block: Attention) -> None:
        maps = key_maps(block)
        assert maps is not None
        unit = power_of_two(maps.weights.detach().flatten(-3, -2)).unsqueeze(-3)
        self.weights = maps.weights / unit
        self._matrices = maps.matrices
        self._queries = block.queries * (block.scale_value * unit)
        with torch.no_grad():
            self.weights_size = inflate(self.weights.norm(dim=(-2, -1)), self.weights.shape[-2:].numel())
            self.error = self._error(block, maps, abs(block.scale_value) * unit[..., 0, 0])
            self.largest = inflate(maps.norm * self._queries.norm(dim=-1).amax(-1), 4) + self.error.amax(-1)

    def __call__(self, rows: slice = slice(None)) -> Float[Tensor, "*batch heads rows m features"]:
        """The t_hij of some rows i.

        Args:
            rows: which.
        """
        return torch.einsum("...hjdf,...hid->...hijf", self._matrices, self._queries[..., rows, :])

    @torch.no_grad()
    def _error(self, block: Attention, maps: TokenMaps, scale: Tensor) -> Float[Tensor, "*batch heads n"]:
        """How far a computed t_hij can be from the exact one, the largest over j."""
        return pulled_error(maps, self._queries.norm(dim=-1), query_error(block) * scale.unsqueeze(-1))


@torch.no_grad()
def pulled_error(
    maps: TokenMaps, length: Float[Tensor, "*#batch heads n"], off: Float[Tensor, "*#batch heads n"]
) -> Float[Tensor, "*#batch heads n"]:
    """How far computed T^T q can be from exact ones, the largest over the maps T.

    Args:
        maps: of the tokens that the rows are pulled back through.
        length: of the rows q as computed.
        off: how far each of them can be from the exact one.
    """
    size = maps.norm.unsqueeze(-1) * (length + off)
    own = 2 * gamma(maps.matrices.shape[-2] + 8) * maps.matrices.shape[-2] ** 0.5 * size
    error = maps.norm.unsqueeze(-1) * off + own
    if maps.error is not None:
        error = error + (1 + 1e-9) * maps.error.unsqueeze(-1) * (length + off)
    return inflate(error, 16)


def through_query_maps(
    block: Attention, cross: Float[Tensor, "*batch heads n value_dim head_dim"], error: Float[Tensor, "*batch heads n"]
) -> tuple[
    Float[Tensor, "*batch heads n value_dim features"],
    Float[Tensor, "*batch heads n"],
    Float[Tensor, "*weights any_heads query_dim features"],
]:
    """Cov_hi(V, K) T_hi, its error in Frobenius norm, and the W_Q that it meets; as given where T_hi is the identity.

    Args:
        block: in float64.
        cross: Cov_hi(V, K) as computed.
        error: of it.
    """
    maps = query_maps(block)
    if maps is None:
        return cross, error, block.w_q
    with torch.no_grad():
        size = cross.norm(dim=(-2, -1))
        norm = maps.norm.unsqueeze(-1)
        own = 2 * gamma(maps.matrices.shape[-2] + 8) * cross.shape[-1] ** 0.5
        error = (error + own * size) * norm
        if maps.error is not None:
            error = error + (size + error) * maps.error.unsqueeze(-1)
        error = inflate(error, 2 * cross.shape[-2:].numel())
    return cross @ maps.matrices, error, maps.weights
