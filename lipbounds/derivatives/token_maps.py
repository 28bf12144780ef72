"""How a query or key moves with its token: the linear map of each token, where it is not the same for all of them.

dq_i = T_i W^T dx_i, where T_i is the rotation R_i for rotary positions alone, and with QK-norm, for the D features that
are normalised together, T_i = r R_i diag(w) ( E - u_h u^T / D ), E the rows of the identity that belong to the head.
Proof: docs/bounds/yudin2025.md, "Rotary positions and QK-norm"; rounding: docs/derivatives.md, section 9.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import projection_error
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.rounding import gamma
from lipbounds.targets.attention import Attention
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotate, rotation_matrices, rotation_norm


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class TokenMaps:
    """T_i and W of all heads; an axis of heads of size 1 stands for all of them.

    Args:
        matrices: T_i as computed.
        weights: W; that of all heads side by side, with one head, where they are normalised together.
        norm: upper bound on the largest norm of the exact T_i.
        error: upper bound on how far a computed T_i is from the exact one, in norm, without a gradient; None if exact.
    """

    matrices: Float[Tensor, "*batch heads n head_dim features"]
    weights: Float[Tensor, "*weights any_heads dim features"]
    norm: Float[Tensor, "..."]  # *batch heads
    error: Float[Tensor, "..."] | None = None  # *batch heads

    @property
    def weights_norm(self) -> Float[Tensor, "*weights any_heads"]:
        """||W||."""
        return spectral_norm_upper(self.weights)


def query_maps(block: Attention) -> TokenMaps | None:
    """Of the queries; None where T_i is the identity.

    Args:
        block: in float64.
    """
    if block.query_norm is None and block.query_rotation is None:
        return None  # before the factors are made
    return _maps(block.w_q, block.query_factors, block.query_norm, block.query_rotation, block.projected_queries)


def key_maps(block: Attention) -> TokenMaps | None:
    """Of the keys; None where T_j is the identity.

    Args:
        block: in float64.
    """
    if block.key_norm is None and block.key_rotation is None:
        return None  # before the factors are made
    return _maps(block.w_k, block.key_factors, block.key_norm, block.key_rotation, block.projected_keys)


def _maps(
    weights: Tensor, factors: tuple[Tensor, Tensor], norm: RmsNorm | None, rotation: Tensor | None, projected: Tensor
) -> TokenMaps | None:
    rho = rotation_norm(rotation, weights[..., 0, 0])
    if norm is not None:
        return _normalised_maps(weights, factors, norm, rotation, projected, rho)
    if rotation is None:
        return None
    matrices = rotation_matrices(rotation, weights.shape[-1])
    return TokenMaps(matrices=matrices, weights=weights, norm=rho)


def _normalised_maps(
    weights: Tensor,
    factors: tuple[Tensor, Tensor],
    norm: RmsNorm,
    rotation: Tensor | None,
    projected: Tensor,
    rho: Tensor,
) -> TokenMaps:
    root = norm.inverse_root(projected)
    unit = projected * root
    heads, head_dim = unit.shape[-3], unit.shape[-1]
    identity = torch.eye(norm.width, dtype=unit.dtype, device=unit.device)
    together, own = unit, identity.expand(heads, -1, -1)
    if norm.over == "all_heads":
        together = unit.movedim(-3, -2).flatten(-2).unsqueeze(-3)
        own = identity.unflatten(0, (heads, head_dim))
        weights = weights.movedim(-3, -2).flatten(-2).unsqueeze(-3)
    matrices = own.unsqueeze(-3) - unit.unsqueeze(-1) * together.unsqueeze(-2) / norm.width
    matrices = root.unsqueeze(-1) * norm.per_token.unsqueeze(-1) * matrices
    if rotation is not None:  # columns are vectors of the head
        matrices = rotate(matrices.movedim(-1, 0), rotation).movedim(0, -1)
    relative, error = _errors(norm, factors, projected)
    size = rho * norm.weight.abs().amax(-1)
    known = relative < 0.5
    largest = torch.where(known, root * torch.where(known, 1 + relative, 1.0), norm.eps**-0.5).squeeze(-1).amax(-1)
    return TokenMaps(
        matrices=matrices, weights=weights, norm=size * largest * (1 + 1e-9), error=(size * error).detach()
    )


@torch.no_grad()
def _errors(
    norm: RmsNorm, factors: tuple[Tensor, Tensor], projected: Tensor
) -> tuple[Float[Tensor, "*batch heads n one"], Float[Tensor, "*batch heads"]]:
    """Relative error t of each r; error of T_i over rho max|w|, the largest of the tokens."""
    off = norm.total(projection_error(*factors, None).unsqueeze(-1).square()).sqrt() * (1 + 1e-9)
    length = norm.total(projected.square()).sqrt() * (1 + 1e-9)
    root = norm.inverse_root(projected)
    relative = (2 * length * off + off.square() + 1e-300) / norm.width * root.square() * (1 + 1e-9)
    relative = relative + 2 * gamma(norm.width + 16)
    unit = length * root
    moved = root * off * (1 + relative) + (relative + 2 * gamma(4)) * unit
    reach = norm.width**0.5
    outer = (1 + relative) * moved * (2 * reach + moved) / norm.width
    error = root * (relative + outer + 2 * gamma(16) * (projected.shape[-1] ** 0.5 + 1)) * (1 + 1e-9)
    error = torch.where(relative < 0.5, error, 4 * norm.eps**-0.5)
    return relative, error.squeeze(-1).amax(-1)
