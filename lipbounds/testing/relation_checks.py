"""Blocks that compute the same function must get the same number, up to rounding.

Each check evaluates the bound at a block and at a rewritten one whose Jacobian has the same norm, or a known multiple.
A sound formula in norms of the parts obeys these laws; one that has lost a head, a row or a power does not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.range import LARGEST
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.registry import BoundSpec
from lipbounds.rounding import SMALLEST_NORMAL
from lipbounds.targets.attention import Attention
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.testing.oracles import additive_mask, batch_item
from lipbounds.testing.verdict import Refuted, evaluate


EXPONENTS = 16  # scaling laws use powers of two up to 2^16, for which floats lose nothing
# Relative difference that is put down to rounding: a bound may take the root of a slack of order 1e-16.
SAME = 1e-6
FAR = 2.0 ** (2 * EXPONENTS)


def permutation(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """The order of tokens does not matter: queries and keys are permuted, and the logit bias with them."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(block.x.shape[-2], generator=generator)
    keys = queries if block.memory is None else torch.randperm(block.memory.shape[-2], generator=generator)
    changes: dict[str, Any] = {"x": block.x[..., queries, :]}
    if block.memory is not None:
        changes["memory"] = block.memory[..., keys, :]
    if block.queries_at is not None:  # the tokens with a query stay in their order: so do rows of mask and rotation
        changes["queries_at"] = queries.argsort()[block.queries_at]
        queries = torch.arange(block.tokens)
    if block.query_rotation is not None and block.key_rotation is not None:  # a token keeps its position
        changes["query_rotation"] = block.query_rotation[..., queries, :, :]
        changes["key_rotation"] = block.key_rotation[..., keys, :, :]
    if block.causal:
        changes |= {"causal": False, "logit_bias": additive_mask(block)[..., queries, :][..., keys]}
    elif block.logit_bias is not None:
        full = block.logit_bias.expand(*block.logit_bias.shape[:-2], len(queries), len(keys))
        changes["logit_bias"] = full[..., queries, :][..., keys]
    _compare("permutation", spec, block, block.replace(**changes), radius, radius, 1.0, seed)


def head_order(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """The order of heads does not matter: it is reversed."""
    changes = {name: getattr(block, name).flip(-3) for name in ("w_q", "w_k", "w_v", "w_o")}
    changes |= {
        name: getattr(block, name).flip(-2)
        for name in ("b_q", "b_k", "b_v", "query_norm_weight", "key_norm_weight")
        if getattr(block, name) is not None
    }
    if block.logit_bias is not None and block.logit_bias.dim() > 2:
        changes["logit_bias"] = block.logit_bias.flip(-3)
    _compare("head_order", spec, block, block.replace(**changes), radius, radius, 1.0, seed)


def rotation(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """An orthogonal change of basis inside each head, of queries and keys and of values, changes nothing.

    With rotary positions the one of queries and keys must commute with all rotations of tokens: it turns each of the
    turned pairs of features by an angle of its own, and mixes the others. With QK-norm, whose weights differ from
    feature to feature, it can only change signs, of both features of a pair alike.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = _rotations(block.heads, block.w_q.shape[-1], generator)
    if block.norm_eps is not None:
        inner = _signs(block, generator)
    elif block.query_rotation is not None:
        inner = _commuting(inner, block.query_rotation.shape[-1], generator)
    inner = inner.to(block.x)
    outer = _rotations(block.heads, block.w_v.shape[-1], generator).to(block.x)
    changes = {
        "w_q": block.w_q @ inner,
        "w_k": block.w_k @ inner,
        "w_v": block.w_v @ outer,
        "w_o": outer.mT @ block.w_o,
    }
    for name, basis in (("b_q", inner), ("b_k", inner), ("b_v", outer)):
        bias = getattr(block, name)
        if bias is not None:
            changes[name] = (bias.unsqueeze(-2) @ basis).squeeze(-2)
    _compare("rotation", spec, block, block.replace(**changes), radius, radius, 1.0, seed)


def scaling(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """Scaling laws: input against weights, queries against keys, values against outputs, and the output itself.

    With c, a, b, o powers of two: x -> c x with the weights it meets / c; W_Q -> a W_Q with W_K -> W_K / a;
    W_V -> b W_V with W_O -> o W_O / b, biases alike. The norm becomes o / c times as large, on a ball of radius c times
    as large. With biases c is 1: they would be small or large beside the scaled weights, and rounding slack with them.
    With QK-norm, a scales W_Q, W_K, their biases and the root of eps alike, and the weights of the two norms inversely.

    Without QK-norm, for every other seed, the powers go to the corners of the range in which blocks are accepted
    (lipbounds.derivatives.rounding.range). There a bound may be infinite, and never too small.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-EXPONENTS, EXPONENTS + 1, (4,), generator=generator).tolist()
    if seed % 2 and block.norm_eps is None:
        drawn = _corner(block, [exponent > 0 for exponent in drawn])
    c, a, b, o = (2.0**exponent for exponent in drawn)
    c = 1.0 if "biases" in block.features else c
    queries = c if block.query_moves else 1.0
    keys = c if block.memory_moves else 1.0
    factors = {
        "x": queries,
        "memory": keys,
        "w_q": a / queries,
        "w_k": 1 / (a * keys),
        "w_v": b / keys,
        "w_o": o / b,
        "b_q": a,
        "b_k": 1 / a,
        "b_v": b,
        "b_o": o,
    }
    changes = {name: getattr(block, name) * f for name, f in factors.items() if getattr(block, name) is not None}
    if block.norm_eps is not None:
        assert block.query_norm_weight is not None  # checked at construction
        assert block.key_norm_weight is not None
        changes |= {"w_k": block.w_k * (a / keys), "norm_eps": block.norm_eps * a * a}
        changes |= {} if block.b_k is None else {"b_k": block.b_k * a}
        changes |= {"query_norm_weight": block.query_norm_weight * a, "key_norm_weight": block.key_norm_weight / a}
    larger = None if radius is None else radius * c
    _compare("scaling", spec, block, block.replace(**changes), radius, larger, o / c, seed)


def _corner(block: Attention, up: list[bool]) -> list[int]:
    """Exponents of c, a, b, o that are as large, or as small, as the tensors leave room for, one after the other."""
    names = ("x", "w_q", "w_k", "w_v", "w_o", *(() if block.memory is None else ("memory",)))
    sizes = {name: _sizes(getattr(block, name), 2 if name in ("x", "memory") else 3) for name in names}
    moving = {"self": ("x",), "query": ("x",), "memory": ("x" if block.memory is None else "memory",)}[block.moves]
    reached = {"self": ("w_q", "w_k", "w_v"), "query": ("w_q",), "memory": ("w_k", "w_v")}[block.moves]
    exponents: list[int] = []
    for (rising, falling), largest in zip(
        ((moving, () if "biases" in block.features else reached), (("w_q",), ("w_k",)), (("w_v",), ()), (("w_o",), ())),
        up,
        strict=True,
    ):
        above = [_spare(sizes[name], 1) for name in rising] + [_spare(sizes[name], -1) for name in falling]
        below = [_spare(sizes[name], -1) for name in rising] + [_spare(sizes[name], 1) for name in falling]
        exponent = min(above) if largest else -min(below)
        exponent = 0 if "biases" in block.features and not exponents else exponent
        exponents.append(exponent)
        for moved, factor in ((rising, 2.0**exponent), (falling, 2.0**-exponent)):
            sizes |= {name: (sizes[name][0] * factor, sizes[name][1] * factor) for name in moved}
    # b multiplies W_V and divides W_O, o multiplies W_O: what b took, o gives back.
    return [*exponents[:3], exponents[3] + exponents[2]]


def _sizes(tensor: Tensor, dims: int) -> tuple[float, float]:
    """The largest entry of the batch item that has the smallest one, of those that are not zero, and of all items."""
    items = tensor.detach().abs().flatten(-dims).amax(-1).flatten()
    return float(items[items > 0].min()) if bool((items > 0).any()) else 0.0, float(items.max())


def _spare(sizes: tuple[float, float], sign: int) -> int:
    """How many powers of two up (or down) a tensor may go before an item leaves the range; all there are for 0."""
    limit, size = math.log2(LARGEST) - 1, sizes[1] if sign > 0 else sizes[0]
    return 2 * int(limit) if size == 0 else max(0, math.floor(limit - sign * math.log2(size)) - 1)


def batch(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """A batch of blocks gets the numbers its items get one by one."""
    together = evaluate("batch", spec, block, radius, seed).detach()
    room = rounding_room(block, together)
    for flat in range(together.numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat, dtype=torch.int64), together.shape))
        alone = evaluate("batch", spec, batch_item(block, index), radius, seed).detach()
        _same("batch", spec, block, radius, seed, alone, together[index], room[index], "alone, as in its batch")


def dtype(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """In a short dtype a block gets the number of the same floats in float64, up to the rounding of the short one."""
    unit, largest = torch.finfo(block.dtype).eps, torch.finfo(block.dtype).max
    # Above its range a short dtype has only infinity (and, rounded down, its largest float) for a number.
    short = evaluate("dtype", spec, block, radius, seed).detach().clamp(max=largest)
    long = evaluate("dtype", spec, block.double, radius, seed).detach().clamp(max=largest)
    smallest = unit * torch.finfo(block.dtype).smallest_normal  # what a number of less is rounded up to
    room = rounding_room(block.double, long, unit) + 64 * unit * long + smallest
    _same("dtype", spec, block, radius, seed, short, long, room, f"in {block.dtype}, as in float64")


def device(spec: BoundSpec, block: Attention, radius: float | None = None, seed: int = 0) -> None:
    """On every accelerator there is, the block gets the number it gets on the CPU."""
    here = evaluate("device", spec, block, radius, seed).detach().cpu()
    room = rounding_room(block, here)
    for name in accelerators():
        there = evaluate("device", spec, block.to(name), radius, seed).detach().cpu()
        _same("device", spec, block, radius, seed, there, here, room, f"on {name}, as on the CPU")


def accelerators() -> list[str]:
    """Devices with float64 other than the CPU."""
    return ["cuda"] if torch.cuda.is_available() else []


def rounding_room(block: Attention, value: Float[Tensor, "*batch"], unit: float = 2.0**-53) -> Float[Tensor, "*batch"]:
    """Difference between two evaluations of a formula at `block` that rounding with unit `unit` explains.

    The rounding of the logits, which the softmax turns into a relative error of everything after it, and cancellation
    in products, measured by the same product of Frobenius norms; besides `SAME`. With QK-norm, through whose Jacobian
    an error of the logits meets terms that cancel, the bound on the rounding of J v (lipbounds.targets.
    attention_roundoff) as well, twice for either evaluation: each may add it to what it computes.

    Args:
        block: in float64.
        value: what the bound returned there.
        unit: of the arithmetic.
    """
    sums = block.x.shape[-1] + block.source_input.shape[-1] + block.w_q.shape[-1]
    products, naive = uncancelled(block)
    mask = additive_mask(block)
    bias = torch.where(mask.isneginf(), 0.0, mask).abs().max()
    logits = unit * (2 * sums * products + 4 * bias)
    spread = torch.expm1((16 * logits).clamp(max=50.0)).amax(-1)
    room = (SAME + spread) * value + 2.0**14 * unit * naive + 1e-290
    if block.query_norm is not None:
        operator = JacobianOperator(block)
        room = room + 4 * operator.norm_error() * operator.scale
    return room


def uncancelled(block: Attention) -> tuple[Float[Tensor, "*#batch heads"], Float[Tensor, "*#batch"]]:
    """Sizes of the logits of each head, and of the Jacobian, as products of Frobenius norms: what nothing cancels in.

    Args:
        block: in float64.
    """
    sizes = [_size(tokens, weights, bias) for tokens, weights, bias in (
        (block.x, block.w_q, block.b_q), (block.source_input, block.w_k, block.b_k),
        (block.source_input, block.w_v, block.b_v),
    )]  # fmt: skip
    if block.query_norm is not None and block.key_norm is not None:
        sizes[0] = sizes[0] * _magnified(block.query_norm, block.projected_queries)
        sizes[1] = sizes[1] * _magnified(block.key_norm, block.projected_keys)
    products = abs(block.scale_value) * sizes[0] * sizes[1]
    return products, (sizes[2] * (1 + products) * block.w_o.square().sum((-2, -1)).sqrt()).sum(-1)


def _size(tokens: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Frobenius norm of the tokens times that of the weights of each head; a bias is one more row, met by ones."""
    left, right = tokens.square().sum((-2, -1)).unsqueeze(-1), weights.square().sum((-2, -1))
    if bias is not None:
        left, right = left + tokens.shape[-2], right + bias.square().sum(-1)
    return (left * right).sqrt()


def _magnified(norm: RmsNorm, projected: Tensor) -> Tensor:
    """Largest factor by which a norm magnifies errors, of each head."""
    root = norm.inverse_root(projected).amax((-2, -1))
    return norm.weight.abs().amax(-1) * root


def _signs(block: Attention, generator: torch.Generator) -> Tensor:
    """Diagonal matrices of signs, the same for both features of a pair that is turned."""
    heads, width = block.w_q.shape[-3], block.w_q.shape[-1]
    signs = 1.0 - 2.0 * torch.randint(2, (heads, width), generator=generator).double()
    if block.query_rotation is not None:
        pairs = block.query_rotation.shape[-1]
        signs[:, pairs : 2 * pairs] = signs[:, :pairs]
    return torch.diag_embed(signs)


def _rotations(heads: int, width: int, generator: torch.Generator) -> Tensor:
    gaussian = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


def _commuting(rotations: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """As `_rotations`, of features e and e + pairs among themselves, and of the features from 2 pairs on."""
    heads, width, _ = rotations.shape
    angles = 2 * torch.pi * torch.rand(heads, pairs, generator=generator, dtype=torch.float64)
    found = torch.zeros_like(rotations)
    first = torch.arange(pairs)
    found[:, first, first] = found[:, first + pairs, first + pairs] = angles.cos()
    found[:, first, first + pairs], found[:, first + pairs, first] = -angles.sin(), angles.sin()
    found[:, 2 * pairs :, 2 * pairs :] = _rotations(heads, width - 2 * pairs, generator)
    return found


def _compare(
    check: str, spec: BoundSpec, block: Attention, other: Attention, radius: float | None, other_radius: float | None,
    factor: float, seed: int,
) -> None:  # fmt: skip
    """Raise Refuted unless the bound at `other` is `factor` times the bound at `block`."""
    value = evaluate(check, spec, block, radius, seed).detach() * factor
    found = evaluate(check, spec, other, other_radius, seed).detach()
    # A bound may round 0 up to the smallest normal number, which no law scales.
    room = rounding_room(block, value / factor) * factor + 2 * SMALLEST_NORMAL
    law = f"at a block of the same function, as {factor:g} times the bound at this one"
    if factor > FAR or factor < 1 / FAR:  # in the corners of the range infinity is true, and says nothing
        found = torch.where(found.isposinf(), value, found)
    _same(check, spec, block, radius, seed, found, value, room, law)


def _same(
    check: str, spec: BoundSpec, block: Attention, radius: float | None, seed: int, found: Tensor, expected: Tensor,
    room: Tensor, law: str,
) -> None:  # fmt: skip
    # Two infinities are equal; their difference is NaN.
    excess = torch.where(found == expected, -1.0, (found - expected).abs() - room)
    if bool((excess <= 0).all()):
        return
    worst = excess.flatten().argmax()
    claimed, reached = found.flatten()[worst].item(), expected.flatten()[worst].item()
    raise Refuted(
        f"the bound must be the same {law} (within {room.flatten()[worst].item():.2g}), "
        f"got {claimed!r} and {reached!r}",
        check=check, spec=spec, block=block, radius=radius, seed=seed, claimed=claimed, reached=reached,
    )  # fmt: skip
