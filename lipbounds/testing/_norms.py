r"""QK-norm as the judge computes it: N(k) = w r k with r = (mean k^2 + eps)^(-1/2), see lipbounds.testing.oracles.

Shares no code with the library that it judges. Sizes for error analysis are the same formulas on absolute values, with
r taken at the numbers themselves (`at`); by how much r magnifies their errors is `magnified`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention


Side = Literal["query", "key"]
LARGEST_MAGNIFIED = 1e-3  # relative error of r up to which sums of its multiples say enough


def projected(block: Attention, side: Side) -> Float[Tensor, "*batch heads n head_dim"]:
    """x W + b in float64.

    Args:
        block: only its fields are read.
        side: whose.
    """
    tokens, weights, bias = (
        (block.x, block.w_q, block.b_q)
        if side == "query"
        else (block.x if block.memory is None else block.memory, block.w_k, block.b_k)
    )
    rows = torch.einsum("...nd,...hde->...hne", _double(tokens), _double(weights))
    return rows if bias is None else rows + _double(bias).unsqueeze(-2)


def normalise(
    block: Attention, side: Side, vectors: Float[Tensor, "*batch heads n head_dim"], *, at: Tensor | None = None
) -> Float[Tensor, "*batch heads n head_dim"]:
    """N of what was projected; unchanged without QK-norm.

    Args:
        block: only its fields are read.
        side: whose norm.
        vectors: x W + b of all heads; bounds on absolute values if `at` is given, and so is the result.
        at: x W + b itself, where r is taken.
    """
    if block.norm_eps is None:
        return vectors
    weight = _weight(block, side)
    weight = weight if at is None else weight.abs()
    return weight * vectors * _root(block, vectors if at is None else at)


def moved_weights(
    block: Attention,
    side: Side,
    weights: Float[Tensor, "*weights heads dim head_dim"],
    vectors: Float[Tensor, "*batch heads n head_dim"],
    *,
    at: Tensor | None = None,
) -> Float[Tensor, "*out heads tokens_or_one dim head_dim"]:
    """The transposed derivative of N(x W + b) of each head by the token, before it is turned; W without QK-norm.

    Args:
        block: only its fields are read.
        side: whose.
        weights: W; its absolute values if `at` is given, and the result is a bound on absolute values.
        vectors: x W + b of all heads, or bounds on absolute values.
        at: x W + b itself, where r is taken.
    """
    if block.norm_eps is None:
        return weights.unsqueeze(-3)
    weight, sign = _weight(block, side), -1.0
    if at is not None:
        weight, sign = weight.abs(), 1.0
    root = _root(block, vectors if at is None else at)
    unit = vectors * root
    radial = torch.einsum("...hde,...hne->...hnd", weights, unit)
    if block.norm_over == "all_heads":
        radial = radial.sum(-3, keepdim=True)
    outer = radial.unsqueeze(-1) * unit.unsqueeze(-2) / _width(block)
    return root.unsqueeze(-1) * (weights.unsqueeze(-3) + sign * outer) * weight.unsqueeze(-2)


def normalised_differences(
    block: Attention,
    dx: Float[Tensor, "*batch heads n m dim"],
    w_k: Float[Tensor, "*weights heads dim head_dim"],
    top: Float[Tensor, "*batch heads n m"],
    keys: Float[Tensor, "*tokens heads m head_dim"],
    *,
    at: Tensor | None = None,
) -> Float[Tensor, "*out heads n m head_dim"]:
    """N(k_j) - N(k_t(i)), formed from the differences of tokens `dx`; each head h has its own t(i).

    Args:
        block: only its fields are read.
        dx: x_j - x_t(i); absolute values if `at` is given, and the result is a bound on absolute values.
        w_k: key weights, likewise.
        top: one-hot rows that say which key is t(i).
        keys: x W + b of all heads, without the batch of a bias of the logits; or bounds on absolute values.
        at: x W + b itself, where r is taken.
    """
    weight = _weight(block, "key")
    weight = (weight if at is None else weight.abs()).unsqueeze(-2)
    root = _root(block, keys if at is None else at).expand(*keys.shape[:-1], 1)[..., 0]
    own = torch.einsum("...hnmd,...hde->...hnme", dx, w_k)
    at_top = torch.einsum("...hnm,...hme->...hne", top, keys).unsqueeze(-2)
    if block.norm_over == "all_heads":  # of every head g, relative to the key that head h sees best
        apart = torch.einsum("...hnmd,...gde->...hgnme", dx, w_k)
        tops = torch.einsum("...hnm,...gme->...hgne", top, keys).unsqueeze(-2)
        products = (apart * (tops + keys.unsqueeze(-3).unsqueeze(-5))).sum((-4, -1))
    else:
        products = (own * (at_top + keys.unsqueeze(-3))).sum(-1)
    root_top = torch.einsum("...hnm,...hm->...hn", top, root).unsqueeze(-1)
    root = root.unsqueeze(-2)
    change = products / _width(block) * (root * root_top).square() / (root + root_top)
    sign = -1.0 if at is None else 1.0
    return weight * (root.unsqueeze(-1) * own + sign * change.unsqueeze(-1) * at_top)


def magnified(block: Attention, operations: int) -> Float[Tensor, "*batch"]:
    """The largest mean(|k| size(k)) r^2 of all queries and keys: r is off by this many times the roundings of k.

    Infinite where that is more than small; 0 without QK-norm.

    Args:
        block: only its fields are read.
        operations: roundings in a row.
    """
    found = torch.zeros(block.batch_shape, dtype=torch.float64, device=block.x.device)
    for side in ("query", "key") if block.norm_eps is not None else ():
        vectors = projected(block, side)
        sizes = projected(_absolute(block), side)
        products = (vectors.abs() + operations * 2.0**-53 * sizes) * sizes
        axes = (-3, -1) if block.norm_over == "all_heads" else (-1,)
        each = products.mean(axes, keepdim=True) * _root(block, vectors).square()
        found = torch.maximum(found, each.flatten(-3).amax(-1).expand(found.shape))
    return torch.where(operations * 2.0**-53 * found < LARGEST_MAGNIFIED, found, torch.inf)


def _absolute(block: Attention) -> Attention:
    names = ("x", "memory", "w_q", "w_k", "b_q", "b_k")
    return block.replace(**{name: t.abs() for name in names if (t := getattr(block, name)) is not None})


def _root(block: Attention, vectors: Tensor) -> Tensor:
    """r, with axes of size 1 for what the mean is taken over."""
    assert block.norm_eps is not None
    axes = (-3, -1) if block.norm_over == "all_heads" else (-1,)
    return 1 / (vectors * vectors).mean(axes, keepdim=True).add(block.norm_eps).sqrt()


def _width(block: Attention) -> int:
    heads, _, head_dim = block.w_q.shape[-3:]
    return heads * head_dim if block.norm_over == "all_heads" else head_dim


def _weight(block: Attention, side: Side) -> Tensor:
    """w with an axis for the tokens, in float64."""
    weight = block.query_norm_weight if side == "query" else block.key_norm_weight
    assert weight is not None
    return _double(weight).unsqueeze(-2)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)
