r"""The truth for attention types other than `Attention`: the dense Jacobian by automatic differentiation in float64.

`truth_slack` is how far rounding can take it from the exact one. Let u = 2**-53, K the roundings in a row, k those up
to the logits, and gamma(K) = K u / (1 - K u) (Higham 2002, Lemma 3.1). An output is sum_j P_ij v_j, and its derivative
consists of products of a map entry, a value or its derivative, and the derivative of a logit. An error of at most d in
the logits moves each map entry by a factor within exp(2 d), and a term holds up to three of them; everything else is
at most 8 gamma(K) of the same formula on absolute values, `size` below, of which Frobenius norms are taken:

    slack = ( expm1(6 d) + 8 gamma(K) ) size  +  8 max(rows, columns) u ||J||_F.

With |.| entrywise, ||.|| Frobenius, a = max_i |x_i| and the weights of each head, summed over heads:
- L2:        d = 16 gamma(k) s (a ||W_Q||)^2,      size = 4 n s ||W_Q||^2 ||W_V|| ||W_O|| ( 1 + 16 s (a ||W_Q||)^2 )
- cosine:    d = 8 gamma(k) tau (1 + k_Q + k_K),   size = 8 n^2 nu (1 + k) e ( tau ||W_Q|| + tau ||W_K|| + ||W_V|| )
  with e = eps^(-1/2), k_Q = a ||W_Q|| e the factor by which the norm of a short query x_i W_Q can magnify its rounding,
  k_K and k_V alike, and k = k_Q + k_K + k_V.
- LipschitzNorm:  d = 8 gamma(K),   size = 16 m n
For feed-forward networks there are no logits. The input of layer k + 1 is off by at most e_k, e_k = ||W_k|| e_{k-1} +
gamma(K) (||W_k|| (|a_{k-1}| + e_{k-1}) + |b_k|), so that slopes of the activation are off by at most 2 e_k + 16 u (the
second derivatives in lipbounds.ops.activations are below 2), and with l >= 1 the largest slope

    slack = ( sum_k (2 e_k + 16 u) + 8 gamma(K) ) prod_k ||W_k|| l  +  the last term above.

A relu whose input is within e_k of 0 has the slope 0 or 1: then nothing can be concluded, and the slack is infinite.
A row sum is off by at most sqrt(columns) times as much as the Frobenius norm. Where a slack is large
(tokens far larger than the scale at which a map changes) nothing can be concluded, and the smaller inputs decide.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Norm
from lipbounds.errors import InvalidInput
from lipbounds.targets.cosine_attention import CosineAttention
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention
from lipbounds.targets.mlp import Mlp
from lipbounds.targets.target import Target


UNIT = 2.0**-53


def jacobian(block: Target) -> Float[Tensor, "*batch outputs inputs"]:
    """Jacobian of the flattened output by the flattened moving input; differentiable in the fields of the block.

    Args:
        block: in float64.
    """
    depth = len(block.batch_shape)
    function = block.function()
    moving = block.moving_input
    moving = moving.expand(*block.batch_shape, *_own_shape(block))

    def summed(inputs: Tensor) -> Tensor:
        output = function(inputs).flatten(depth)
        return output.sum(tuple(range(depth))) if depth else output  # items do not meet: one pass serves all of them

    return torch.func.jacrev(summed)(moving).flatten(1 + depth).movedim(0, depth)


def jacobian_norm(block: Target, norm: Norm) -> Float[Tensor, "*batch"]:
    """Norm of the Jacobian: spectral for `l2`, largest absolute row sum for `linf`; off by at most `truth_slack`.

    Args:
        block: in float64.
        norm: `l2` or `linf`.

    Raises:
        InvalidInput: another norm.
    """
    return dense_norm(jacobian(block), norm)


def dense_norm(matrix: Float[Tensor, "*batch outputs inputs"], norm: Norm) -> Float[Tensor, "*batch"]:
    """Operator norm of a dense matrix for `l2` or `linf`."""
    if norm == "l2":
        size = matrix.detach().abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
        scaled = matrix / size
        gram = scaled @ scaled.mT if scaled.shape[-2] <= scaled.shape[-1] else scaled.mT @ scaled
        # The largest eigenvalue of a Gram matrix is accurate to rounding; only the small ones are not.
        return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt() * size[..., 0, 0]
    if norm == "linf":
        return matrix.abs().sum(-1).amax(-1)
    raise InvalidInput(f"the truth is known in the norms 'l2' and 'linf' for this kind of block, got norm={norm!r}.")


@torch.no_grad()
def truth_slack(block: Target, norm: Norm, matrix: Float[Tensor, "*batch outputs inputs"]) -> Float[Tensor, "*batch"]:
    """How far the norm of the computed Jacobian `matrix` of `block` can be from the exact one; see the top of the file.

    Args:
        block: in float64.
        norm: `l2` or `linf`.
        matrix: what `jacobian` returned.

    Raises:
        InvalidInput: a class of blocks whose rounding has not been worked out.
    """
    if isinstance(block, L2Attention):
        logit_error, size, operations = _l2(block)
    elif isinstance(block, CosineAttention):
        logit_error, size, operations = _cosine(block)
    elif isinstance(block, LipschitzNormAttention):
        logit_error, size, operations = _lipschitz_norm(block)
    elif isinstance(block, Mlp):
        logit_error, size, operations = _mlp(block)
    else:
        raise InvalidInput(
            "the rounding of the truth is known for L2Attention, CosineAttention, LipschitzNormAttention and Mlp, "
            f"got {type(block).__name__}; add it to lipbounds.testing.dense_jacobian."
        )
    spectrum = 8 * max(matrix.shape[-2:]) * UNIT * matrix.square().sum((-2, -1)).sqrt()
    slack = (torch.expm1(6 * logit_error) + 8 * _gamma(operations)) * size + spectrum
    return slack * matrix.shape[-1] ** 0.5 if norm == "linf" else slack


Rounding = tuple[Tensor, Tensor, int]  # error d of the logits, size of the formula on absolute values, roundings K


def _l2(block: L2Attention) -> Rounding:
    operations = block.tokens + block.x.shape[-1] + sum(block.w_q.shape[-2:]) + sum(block.w_o.shape[-2:]) + 32
    w_q = _frobenius(block.w_q)
    spread = block.scale * (_longest(block.x).unsqueeze(-1) * w_q).square()
    size = 4 * block.tokens * block.scale * w_q.square() * _frobenius(block.w_v) * _frobenius(block.w_o)
    logit_error = 16 * _gamma(sum(block.w_q.shape[-2:]) + 8) * spread.amax(-1)
    return logit_error, (size * (1 + 16 * spread)).sum(-1), operations


def _cosine(block: CosineAttention) -> Rounding:
    operations = block.tokens + block.x.shape[-1] + block.w_q.shape[-1] + block.w_v.shape[-1] + 32
    e = block.eps**-0.5
    sizes = [_frobenius(weights) for weights in (block.w_q, block.w_k, block.w_v)]
    k = [_longest(block.x) * size * e for size in sizes]
    logit_error = 8 * _gamma(sum(block.w_q.shape[-2:]) + 8) * block.scale * (1 + k[0] + k[1])
    whole = block.scale * (sizes[0] + sizes[1]) + sizes[2]
    size = 8 * block.tokens**2 * block.output_scale * e * (1 + k[0] + k[1] + k[2]) * whole
    return logit_error, size, operations


def _lipschitz_norm(block: LipschitzNormAttention) -> Rounding:
    (m, dim), (n, value_dim) = block.queries.shape[-2:], block.values.shape[-2:]
    operations = m * dim + n + dim + value_dim + 32
    size = torch.full(block.batch_shape, 16.0 * m * n, dtype=torch.float64, device=block.device)
    return torch.full_like(size, 8 * _gamma(operations)), size, operations


def _mlp(block: Mlp) -> Rounding:
    """As if the error of the slopes were one of logits: expm1(6 d) is at least 6 d."""
    operations = sum(sum(weight.shape) for weight in block.weights) + 32
    values, error = block.x, torch.zeros_like(block.x[..., 0])
    slopes, size = torch.zeros_like(error), torch.ones_like(error)
    for layer, weight in enumerate(block.weights[:-1]):
        norm = _frobenius(weight)
        error = norm * error + 2 * _gamma(operations) * (
            norm * (values.norm(dim=-1) + error) + block.bias(layer).norm()
        )
        values = values @ weight.mT + block.bias(layer)
        if block.activation == "relu":
            near = (values.abs() <= error.unsqueeze(-1)).any(-1)
            slopes = slopes + torch.where(near, torch.inf, 0.0)
        else:
            slopes = slopes + 2 * error + 16 * UNIT
        values, error = block.activation_rule.function(values), 2 * error
        size = size * norm * max(1.0, block.activation_rule.lipschitz)
    return slopes, size * _frobenius(block.weights[-1]), operations


def _gamma(operations: int) -> float:
    return operations * UNIT / (1 - operations * UNIT)


def _longest(tokens: Float[Tensor, "*batch n dim"]) -> Float[Tensor, "*batch"]:
    return tokens.norm(dim=-1).amax(-1)


def _frobenius(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    return matrix.flatten(-2).norm(dim=-1)


def _own_shape(block: Target) -> torch.Size:
    """Shape of the moving input without batch dimensions."""
    dimensions = 1 if isinstance(block, LipschitzNormAttention | Mlp) else 2
    return block.moving_input.shape[-dimensions:]
