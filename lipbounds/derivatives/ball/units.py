r"""A block in units of its own: weights near 1, so that products of powers of them neither overflow nor vanish.

The third differential multiplies values by the cube of W_Q W_K^T X: at the corners of the range in which blocks are
accepted (lipbounds.derivatives.rounding.range) such products leave float64, and a term that has vanished is missing
from an upper bound. For powers of two c_x, c_m, a, b, o the block with

    x' = c_x x,  m' = c_m m,  W_Q' = a W_Q / c_x,  W_K' = W_K / (a c_m),  W_V' = b W_V / c_m,  W_O' = o W_O / b,

biases alike, m = x and c_m = c_x in self-attention, has the same maps, the Jacobian o J / c at the input scaled by c,
and the ball of radius c eps; no entry is rounded. Here they make the largest entry of each weight lie in [1/2, 2), and
that of the input that stays in [1/2, 1). What moves is left as large as it then is: where it is small, so are the terms
of higher order beside those of lower order, and where it is large, a bound may be infinite.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.targets._attention_checks import TRAILING
from lipbounds.targets.attention import Attention


ORDINARY = 32  # exponents up to which a block is left as it is: the eighth power of all its factors is in range
Parts = dict[str, Tensor]
Compute = Callable[[Attention, float], Parts]
WEIGHTS = ("w_q", "w_k", "w_v", "w_o")


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Exponents of the powers of two; see the top of this file.

    Args:
        x: of c_x.
        memory: of c_m; that of c_x in self-attention.
        logits: of a.
        values: of b.
        output: of o.
        scale: what goes from the scale into W_Q.
        moving: of c, the factor of the input that moves.
    """

    x: int
    memory: int
    logits: int
    values: int
    output: int
    scale: int
    moving: int


def in_own_units(block: Attention, radius: float, compute: Compute) -> Parts:
    """Norms of derivatives over a ball, computed where weights are near 1; of an ordinary block, as it is.

    Args:
        block: in float64.
        radius: eps.
        compute: upper bounds of norms with the units of the Jacobian, each rounded up, given a block and a radius.
    """
    if block.query_norm is not None:
        return _with_norm(block, radius, compute)
    names = (*WEIGHTS, *(["x"] if block.moves == "memory" else ["memory"] if block.moves == "query" else []))
    largest, smallest = torch.stack([_sizes(getattr(block, name), TRAILING[name]) for name in names], 1).tolist()
    scale = _exponent(abs(block.scale_value))
    if all(abs(exponent) <= ORDINARY for exponent in (scale, *map(_exponent, [*largest, *smallest]))):
        return compute(block, radius)
    if block.batch_shape.numel() > 1:
        return _item_by_item(block, radius, compute)
    units = _units(block.moves, dict(zip(names, map(_exponent, largest), strict=True)), scale)
    parts = compute(_in_units(block, units), _moved(radius, units.moving))
    return {name: _back(part, units.moving - units.output) for name, part in parts.items()}


def _with_norm(block: Attention, radius: float, compute: Compute) -> Parts:
    """The same with QK-norm, where queries and keys have no units to choose: those of the inputs, W_V and W_O."""
    names = ("w_v", "w_o", "x", *(() if block.moves == "self" else ("memory",)))
    largest, smallest = torch.stack([_sizes(getattr(block, name), TRAILING[name]) for name in names], 1).tolist()
    if all(abs(exponent) <= ORDINARY for exponent in map(_exponent, [*largest, *smallest])):
        return compute(block, radius)
    if block.batch_shape.numel() > 1:
        return _item_by_item(block, radius, compute)
    exponents = dict(zip(names, map(_exponent, largest), strict=True))
    x, memory = -exponents["x"], -exponents.get("memory", exponents["x"])
    values = memory - exponents["w_v"]
    units = Units(
        x=x,
        memory=memory,
        logits=0,
        values=values,
        output=values - exponents["w_o"],
        scale=0,
        moving=memory if block.moves == "memory" else x,
    )
    parts = compute(_in_units(block, units), _moved(radius, units.moving))
    return {name: _back(part, units.moving - units.output) for name, part in parts.items()}


def _item_by_item(block: Attention, radius: float, compute: Compute) -> Parts:
    """Each item has units of its own."""
    items = [in_own_units(item, radius, compute) for item in _items(block)]
    return {name: torch.stack([item[name] for item in items]).reshape(block.batch_shape) for name in items[0]}


def _sizes(tensor: Tensor, dims: int) -> Tensor:
    """The largest entry over all batch items, and the least of the items' largest entries that are not 0; 0 if none."""
    items = tensor.detach().abs().flatten(-dims).amax(-1)
    least = torch.where(items > 0, items, torch.inf).amin()
    return torch.stack([items.amax(), torch.where(least < torch.inf, least, 0.0)])


def _exponent(size: float) -> int:
    """e with 2^(e - 1) <= size < 2^e; 0 of 0."""
    return math.frexp(size)[1] if 0 < size < math.inf else 0


def _items(block: Attention) -> list[Attention]:
    """The items of a batch, without batch dimensions, in the order of a flattened one."""
    shape = block.batch_shape
    fields = {name: getattr(block, name) for name in TRAILING if getattr(block, name) is not None}
    flat = {}
    for name, tensor in fields.items():
        own = tensor.shape[max(0, tensor.dim() - TRAILING[name]) :]
        flat[name] = tensor.expand(*shape, *own).reshape(shape.numel(), *own)
    return [block.replace(**{name: tensor[i] for name, tensor in flat.items()}) for i in range(shape.numel())]


def _units(moves: str, exponents: dict[str, int], scale: int) -> Units:
    """Exponents that leave each weight and the input that stays with an exponent of 0; one weight may keep 1."""
    queries, keys = exponents["w_q"] + scale, exponents["w_k"]
    if moves == "self":
        x = memory = moving = (queries + keys) // 2
        logits = x - queries
    elif moves == "query":
        memory = -exponents["memory"]
        logits = keys - memory
        x = moving = queries + logits
    else:
        x = -exponents["x"]
        logits = x - queries
        memory = moving = keys - logits
    values = memory - exponents["w_v"]
    output = values - exponents["w_o"]
    return Units(x=x, memory=memory, logits=logits, values=values, output=output, scale=scale, moving=moving)


def _in_units(block: Attention, units: Units) -> Attention:
    queries = units.logits + units.scale  # what the scale loses
    powers = {
        "x": units.x,
        "memory": units.memory,
        "w_q": queries - units.x,
        "w_k": -units.logits - units.memory,
        "w_v": units.values - units.memory,
        "w_o": units.output - units.values,
        "b_q": queries,
        "b_k": -units.logits,
        "b_v": units.values,
    }
    given = {name: getattr(block, name) for name in powers}
    changes = {name: _times(tensor, powers[name]) for name, tensor in given.items() if tensor is not None}
    return block.replace(**changes, b_o=None, scale=math.ldexp(block.scale_value, -units.scale))


def _moved(radius: float, exponent: int) -> float:
    """The radius of the scaled ball; never 0 where there is a ball."""
    try:
        moved = math.ldexp(radius, exponent)
    except OverflowError:
        return math.inf
    return moved if moved > 0 or radius == 0 else math.ulp(0.0)


def _times(tensor: Tensor, exponent: int) -> Tensor:
    """A tensor times a power of two that may itself be out of range."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half)


def _back(norm: Tensor, exponent: int) -> Tensor:
    """An upper bound times a power of two; where digits are lost below the smallest normal float, rounded up."""
    result = _times(norm, exponent)
    lost = (norm > 0) & (result < torch.finfo(torch.float64).tiny)
    return torch.where(lost, result + math.ulp(0.0), result)
