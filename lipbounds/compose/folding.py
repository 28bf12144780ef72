r"""What the rounding of folded weights can do to the Jacobian of attention.

Let W and b of a head be known up to e_W and e_b (Frobenius norms), and for tokens Z with |Z|_F <= R

    q = rho (R |W_Q| + n^1/2 |b_Q|),   d_q = rho (R e_Q + n^1/2 e_b),   q' = q + d_q,

k and v alike (rho >= 1 the norm of rotary positions, 1 for v), so that |Q| <= q and the exact Q is within d_q of it.
With D the derivative of the softmax of all rows, T[U] = s (U W_Q K^T + Q W_K^T U^T) and J[U] = (D[T[U]] V + P U W_V)
W_O, primes for exact ones,

    |S' - S| <= d_S = s (q' d_k + d_q k'),
    |T|, |T'| <= t = s (w_Q' k' + q' w_K'),           |T' - T| <= d_t = s (w_Q' d_k + e_Q k' + q' e_K + d_q w_K'),
    |D| <= 1/2,  |D' - D| <= d_S,  |P' - P| <= d_S / 2,  |P| <= n^1/2,

for the second derivative of the softmax is p_j ((a_j - E a)(b_j - E b) - cov(a, b)), whose l1 norm is at most twice the
standard deviations of a and b under p, each at most |a| / 2^1/2. From J' - J = (D' - D)[T'] V' + D[T' - T] V' +
D[T] (V' - V) + (P' - P) U W_V' + P U (W_V' - W_V),

    |J' - J| <= sum over heads of |W_O| ( d_S t v' + d_t v' / 2 + t d_v / 2 + d_S w_V' / 2 + n^1/2 e_V ).

Everything is a norm, so this is far above the truth, and still a millionth of a millionth of the norms that it is made
of: nothing beside what attention bounds lose.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.rewrite import FoldedAttention
from lipbounds.ops.spectral import never_nan
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import AttentionLayer
from lipbounds.targets.rotary import rotation_norm


@dc.dataclass(frozen=True, eq=False)
class _Size:
    """Norms of one of queries, keys and values of every head, of what is computed and of what is exact.

    Args:
        tokens: q'.
        off: d_q.
        weight: w'.
        weight_off: e.
    """

    tokens: Tensor
    off: Tensor
    weight: Tensor
    weight_off: Tensor


@torch.no_grad()
def folding_change(layer: AttentionLayer, x: Float[Tensor, "*batch n dim"], radius: Tensor) -> Float[Tensor, "*batch"]:
    """Upper bound on the difference of the Jacobians with exact and with folded weights, anywhere in the ball.

    Args:
        layer: attention; 0 unless its weights are folded.
        x: the tokens at the centre.
        radius: of the ball, for each batch item.
    """
    if not isinstance(layer, FoldedAttention):
        return torch.zeros_like(radius)
    block = layer.block
    size = (_norm(x, 2) + radius).unsqueeze(-1)
    turned = (
        rotation_norm(block.query_rotation, block.w_q[..., 0, 0]),
        rotation_norm(block.key_rotation, block.w_k[..., 0, 0]),
    )
    q, k, v = (
        _size(block, layer.lost, name, size, rotation)
        for name, rotation in zip("qkv", (*turned, torch.ones_like(turned[0])), strict=True)
    )
    scale, root = abs(block.scale_value), math.sqrt(x.shape[-2])
    moved = scale * (q.tokens * k.off + q.off * k.tokens)
    slope = scale * (q.weight * k.tokens + q.tokens * k.weight)
    slope_off = scale * (q.weight * k.off + q.weight_off * k.tokens + q.tokens * k.weight_off + q.off * k.weight)
    heads = moved * slope * v.tokens + slope_off * v.tokens / 2 + slope * v.off / 2
    heads = heads + moved * v.weight / 2 + root * v.weight_off
    return never_nan(inflate((heads * _norm(block.w_o, 2)).sum(-1), 64 + block.heads)).expand(radius.shape)


def _size(block: Attention, lost: dict[str, Tensor], name: str, size: Tensor, rotation: Tensor) -> _Size:
    root = math.sqrt(block.x.shape[-2])
    weight, weight_off = _norm(getattr(block, f"w_{name}"), 2), _norm(lost[f"w_{name}"], 2)
    bias, bias_off = getattr(block, f"b_{name}"), lost.get(f"b_{name}")
    tokens, off = size * weight, size * weight_off
    tokens = tokens if bias is None else tokens + root * _norm(bias, 1)
    off = off if bias_off is None else off + root * _norm(bias_off, 1)
    return _Size(
        tokens=inflate(rotation * (tokens + off), 8),
        off=inflate(rotation * off, 8),
        weight=inflate(rotation * (weight + weight_off), 8),
        weight_off=inflate(rotation * weight_off, 8),
    )


def _norm(values: Tensor, dims: int) -> Tensor:
    """Frobenius norm of the last axes, rounded up."""
    flat = values.flatten(-dims)
    return inflate(flat.square().sum(-1).sqrt(), flat.shape[-1] + 4) + 1e-150
