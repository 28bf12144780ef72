r"""The largest of the spectral norms of many products with one matrix, from few eigenproblems.

A spectral norm is at most the Frobenius norm, which costs a fraction of it: ||C W||_F^2 = <C W W^T, C> has no product
longer than the inner size once W W^T is known. So the norm of the product with the largest one is made, and after it
only those norms whose Frobenius norm reaches that: where norms of products differ, a few in a hundred.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.devices import is_transformed, waits_for
from lipbounds.ops.spectral import never_nan, power_of_two, product_norm_upper, root
from lipbounds.rounding import gamma


# What `product_norm_upper` adds for rounding stays below this share of the squared product of Frobenius norms, so that
# the maximum is that over all norms in every bit.
ROUNDING = 2.0**-30


def largest_product_norm(
    matrices: Float[Tensor, "*batch n rows inner"],
    weights: Float[Tensor, "*weights inner cols"],
    off: Float[Tensor, "*batch n"],
) -> Float[Tensor, "*batch"]:
    """max_i of ||C_i W|| + off_i, rounded up: the number that `product_norm_upper` of all of them gives.

    All norms are made where a gradient is wanted, inside of a transform, or where the host would wait for a device.

    Args:
        matrices: C_i, float64, finite.
        weights: W, with the leading dimensions of the matrices or such as are broadcast to them.
        off: >= 0.
    """
    tracked = torch.is_grad_enabled() and (matrices.requires_grad or weights.requires_grad or off.requires_grad)
    if tracked or waits_for(matrices) or is_transformed(matrices) or is_transformed(weights):
        return (product_norm_upper(matrices, weights.unsqueeze(-3)) + off).amax(-1)
    batch, count = matrices.shape[:-3], matrices.shape[-3]
    flat, flat_off = matrices.flatten(0, -3), off.expand(*batch, count).flatten()
    places = torch.arange(weights.shape[:-2].numel(), device=weights.device).reshape(weights.shape[:-2])
    places, flat_weights = places.expand(batch).flatten(), weights.reshape(-1, *weights.shape[-2:])

    def norms(which: Int[Tensor, " some"]) -> Float[Tensor, " some"]:
        """Of some matrices, by their number in all."""
        return product_norm_upper(flat[which], flat_weights[places[which // count]]) + flat_off[which]

    reach = (never_nan(_frobenius(matrices, weights)) + off).reshape(-1, count)
    first = reach.argmax(-1)
    top = first + count * torch.arange(len(first), device=first.device)
    found = torch.full_like(reach, -torch.inf)
    found.view(-1)[top] = largest = norms(top)
    others = reach >= largest.unsqueeze(-1)
    others.view(-1)[top] = False
    which = others.flatten().nonzero().squeeze(-1)
    if len(which):
        found.view(-1)[which] = norms(which)
    return found.amax(-1).reshape(batch)


def _frobenius(
    matrices: Float[Tensor, "*batch n rows inner"], weights: Float[Tensor, "*weights inner cols"]
) -> Float[Tensor, "*batch n"]:
    """||C_i W||_F, rounded up, with `ROUNDING`.

    Scaled by the largest C_i: the squares of others may vanish, but so small a norm is not the largest one, since that
    of the largest C_i has at least `ROUNDING` of its size here, and its rounding there.
    """
    of_weights, of_all = power_of_two(weights), power_of_two(matrices.flatten(-3, -2))
    weights, matrices = weights / of_weights, matrices / of_all.unsqueeze(-1)
    gram = weights @ weights.mT
    squares = ((matrices @ gram.unsqueeze(-3)) * matrices).sum((-2, -1)).clamp(min=0)
    size = matrices.square().sum((-2, -1)) * weights.square().sum((-2, -1)).unsqueeze(-1)
    rows, inner = matrices.shape[-2:]
    slack = ROUNDING + 4 * gamma(weights.shape[-1] + inner * (rows + 2) + 16)
    return root(squares + slack * size) * (of_weights * of_all)[..., 0]
