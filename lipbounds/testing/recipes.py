"""Attention blocks from a handful of choices and a seed: small to print, easy to shrink, the same on every machine.

A seed gives large Gaussian master tensors; a block is their upper left corner, transformed as the recipe says. Fewer
tokens, features or heads therefore leave the remaining numbers as they were, which is what lets a counterexample
shrink.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention, Moves


# Heads, rows and columns of the master tensors: the largest sizes there are.
MASTER = {
    "x": (1, 32, 32),
    "memory": (1, 32, 32),
    "w_q": (4, 32, 8),
    "w_k": (4, 32, 8),
    "w_v": (4, 32, 8),
    "w_o": (4, 8, 32),
    "b_q": (4, 1, 8),
    "b_k": (4, 1, 8),
    "b_v": (4, 1, 8),
    "b_o": (1, 1, 32),
    "mask": (1, 32, 32),
}
LARGE = 1e3

# -- what the input looks like: each takes Gaussian tokens -----------------------------------------------------------


def _duplicated(x: Tensor) -> Tensor:
    return x[..., torch.arange(x.shape[-2]) // 2 * 2, :]


def _antipodal(x: Tensor) -> Tensor:
    signs = 1 - 2 * (torch.arange(x.shape[-2]) % 2).to(x)
    return _duplicated(x) * signs.unsqueeze(-1)


def _massive(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0, 0] = LARGE
    return x


GEOMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "antipodal": _antipodal,
    "duplicated": _duplicated,
    "equal": lambda x: x[..., :1, :].expand(x.shape),
    "large_mean": lambda x: x + LARGE * x[..., :1, :],
    "massive": _massive,
    "rank_one": lambda x: x[..., :, :1] * x[..., :1, :],
    "zero": torch.zeros_like,
}


# -- what the weights look like: each takes Gaussian matrices ---------------------------------------------------------


def _identity(w: Tensor) -> Tensor:
    return torch.eye(*w.shape[-2:], dtype=w.dtype).expand(w.shape)


def _ill_conditioned(w: Tensor) -> Tensor:
    return w * torch.logspace(0, -8, w.shape[-1], dtype=w.dtype)


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda w: w,
    "identity": _identity,
    "low_rank": lambda w: w[..., :, :1] * w[..., :1, :],
    "ill_conditioned": _ill_conditioned,
    "one_huge": lambda w: w + LARGE * w[..., :, :1] * w[..., :1, :],
    "zero": torch.zeros_like,
}


# -- what each query may see: (heads, queries, keys) -> what is added to the logits -----------------------------------


def _visible(sees: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[int, int, int], Tensor]:
    def mask(heads: int, n: int, m: int) -> Tensor:
        queries, keys = torch.arange(n).unsqueeze(-1), torch.arange(m)
        hidden = ~sees(queries, keys, m)
        return torch.zeros(n, m, dtype=torch.float64).masked_fill(hidden, -math.inf)

    return mask


def _relative(heads: int, n: int, m: int) -> Tensor:
    distance = (torch.arange(n).unsqueeze(-1) - torch.arange(m)).abs().to(torch.float64)
    slopes = 2.0 ** -torch.arange(heads, dtype=torch.float64)
    return -slopes[:, None, None] * distance


MASKS: dict[str, Callable[[int, int, int], Tensor] | None] = {
    "none": None,
    "causal": None,  # the flag of Attention; in cross-attention, the rectangular triangle
    "triangle": _visible(lambda i, j, m: j <= i % m),
    "padding": _visible(lambda i, j, m: (j <= m // 2) & (i >= 0)),
    "block_sparse": _visible(lambda i, j, m: j // 2 == i % m // 2),
    "window": _visible(lambda i, j, m: (j - i % m).abs() <= 1),
    "one_visible": _visible(lambda i, j, m: j == (7 * i + 1) % m),
    "relative": _relative,
    "relative_window": lambda heads, n, m: (
        _relative(heads, n, m) + _visible(lambda i, j, m: (j - i % m).abs() <= 2)(heads, n, m)
    ),
}
# Attention maps by construction; each fixes the spread of the logits, and `half`, `sink` shape tokens and weights, too.
REGIMES = ("free", "uniform", "half", "one_hot", "sink")
BIASES = ("b_q", "b_k", "b_v", "b_o")
BATCHED = ("inputs", "weights", "both", "mask")


@dc.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices behind a block; `build` follows them.

    Args:
        seed: of the Gaussian master tensors.
        n: queries.
        m: keys; None for self-attention.
        dim: features of the tokens.
        heads: query heads, at most 4.
        groups: key-value heads; divides `heads`.
        head_dim: columns of W_Q and W_K of a head.
        value_dim: columns of W_V of a head.
        out_dim: features of the output.
        moves: as in `Attention`.
        geometry: name in `GEOMETRIES`, for the tokens that give the keys.
        input_scale: factor on the tokens.
        query, key, value, output: names in `SPECTRA`.
        tied: W_K = W_Q, which makes the logits a Gram matrix.
        regime: name in `REGIMES`.
        spread: difference of the largest and the smallest logit of a row, before masks, in the widest row of all.
        mask: name in `MASKS`.
        biases: names in `BIASES`.
        bias_scale: factor on the biases.
        scale: of the logits; None for 1/sqrt(head_dim).
        dtype: of all tensors.
        batch: leading shape.
        batched: which fields have it, a name in `BATCHED`.
        rounded: tokens and weights are multiples of 1/2 before they are scaled: short to print, full of ties.
    """

    seed: int = 0
    n: int = 2
    m: int | None = None
    dim: int = 2
    heads: int = 1
    groups: int = 1
    head_dim: int = 2
    value_dim: int = 2
    out_dim: int = 2
    moves: Moves = "self"
    geometry: str = "gaussian"
    input_scale: float = 1.0
    query: str = "gaussian"
    key: str = "gaussian"
    value: str = "gaussian"
    output: str = "gaussian"
    tied: bool = False
    regime: str = "free"
    spread: float = 1.0
    mask: str = "none"
    biases: frozenset[str] = frozenset()
    bias_scale: float = 1.0
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    batch: tuple[int, ...] = ()
    batched: str = "inputs"
    rounded: bool = False


def build(recipe: Recipe) -> Attention:
    """The block that a recipe describes."""
    fields = {**_tokens(recipe), **_weights(recipe), **_biases(recipe)}
    if recipe.regime == "sink":
        _point_at_one_key(fields)
    mask = _mask(recipe)
    _set_spread(recipe, fields)
    options: dict[str, Any] = {"scale": recipe.scale, "moves": recipe.moves}
    options["causal"] = recipe.mask == "causal" and recipe.m is None
    tensors = {name: tensor.to(recipe.dtype) for name, tensor in (fields | mask).items()}
    return Attention(**tensors, **options)


def _master(recipe: Recipe, name: str, batched: bool) -> Tensor:
    """Gaussian numbers [*batch, heads, rows, columns], the same for every size of the block."""
    items = math.prod(recipe.batch) if batched else 1
    stacked = []
    for item in range(items):
        generator = torch.Generator().manual_seed(16 * (64 * recipe.seed + item) + list(MASTER).index(name))
        stacked.append(torch.randn(*MASTER[name], generator=generator, dtype=torch.float64))
    values = torch.stack(stacked)
    values = (2 * values).round() / 2 if recipe.rounded else values
    return values.reshape(*recipe.batch, *MASTER[name]) if batched else values[0]


def _tokens(recipe: Recipe) -> dict[str, Tensor]:
    batched = recipe.batched in ("inputs", "both")
    shape = GEOMETRIES[recipe.geometry]
    x = _master(recipe, "x", batched)[..., 0, : recipe.n, : recipe.dim]
    if recipe.m is None:
        x = shape(_in_pairs(recipe, x))
        return {"x": x * recipe.input_scale}
    memory = _master(recipe, "memory", batched)[..., 0, : recipe.m, : recipe.dim]
    return {"x": x * recipe.input_scale, "memory": shape(_in_pairs(recipe, memory)) * recipe.input_scale}


def _in_pairs(recipe: Recipe, tokens: Tensor) -> Tensor:
    return _duplicated(tokens) if recipe.regime == "half" else tokens


def _weights(recipe: Recipe) -> dict[str, Tensor]:
    batched = recipe.batched in ("weights", "both")
    groups = recipe.heads if recipe.tied else recipe.groups
    shapes = {
        "w_q": (recipe.query, recipe.heads, recipe.dim, recipe.head_dim),
        "w_k": (recipe.key, groups, recipe.dim, recipe.head_dim),
        "w_v": (recipe.value, groups, recipe.dim, recipe.value_dim),
        "w_o": (recipe.output, recipe.heads, recipe.value_dim, recipe.out_dim),
    }
    fields = {}
    for name, (spectrum, heads, rows, columns) in shapes.items():
        fields[name] = SPECTRA[spectrum](_master(recipe, name, batched)[..., :heads, :rows, :columns])
    return fields | ({"w_k": fields["w_q"]} if recipe.tied else {})


def _biases(recipe: Recipe) -> dict[str, Tensor]:
    batched = recipe.batched in ("weights", "both")
    groups = recipe.heads if recipe.tied else recipe.groups
    shapes = {
        "b_q": (recipe.heads, recipe.head_dim),
        "b_k": (groups, recipe.head_dim),
        "b_v": (groups, recipe.value_dim),
    }
    fields = {}
    for name in sorted(recipe.biases):
        values = _master(recipe, name, batched) * recipe.bias_scale
        heads, columns = shapes.get(name, (1, recipe.out_dim))
        values = values[..., :heads, 0, :columns]
        fields[name] = values[..., 0, :] if name == "b_o" else values
    return fields


def _mask(recipe: Recipe) -> dict[str, Tensor]:
    n, m = recipe.n, recipe.n if recipe.m is None else recipe.m
    causal = recipe.mask == "causal"
    if recipe.mask == "none" or (causal and recipe.m is None):
        return {}
    make = MASKS["triangle" if causal else recipe.mask]
    assert make is not None
    mask = make(recipe.heads, n, m)
    if recipe.batched == "mask" and recipe.batch:
        mask = mask if mask.dim() == 3 else mask.unsqueeze(0)
        finite = _master(recipe, "mask", True)[..., :1, :n, :m]
        mask = mask + finite
    return {"logit_bias": mask}


def _point_at_one_key(fields: dict[str, Tensor]) -> None:
    """Every query finds the last key best: a constant feature asks for a feature that only that token has."""
    source = "memory" if "memory" in fields else "x"
    fields["w_q"], fields["w_k"] = fields["w_q"] / 8, fields["w_k"] / 8
    fields["w_q"][..., 0, 0] = 1.0
    fields["w_k"][..., -1, 0] = 1.0
    for name in {"x", source}:
        fields[name] = fields[name].clone()
    size = fields["x"].abs().amax().clamp(min=1e-6)
    fields["x"][..., :, 0] = size
    fields[source][..., -1, -1] = 8 * size


def _set_spread(recipe: Recipe, fields: dict[str, Tensor]) -> None:
    """Scale the queries so that the logits of a row differ by as much as the recipe says."""
    source = fields.get("memory", fields["x"])
    queries = fields["x"].unsqueeze(-3) @ fields["w_q"]
    if "b_q" in fields:
        queries = queries + fields["b_q"].unsqueeze(-2)
    w_k = fields["w_k"].repeat_interleave(recipe.heads // fields["w_k"].shape[-3], -3)
    scale = recipe.head_dim**-0.5 if recipe.scale is None else recipe.scale
    logits = scale * queries @ (source.unsqueeze(-3) @ w_k).mT
    found = float((logits.amax(-1) - logits.amin(-1)).max())
    wanted = {"uniform": 0.0, "half": max(recipe.spread, 100.0), "one_hot": max(recipe.spread, 40.0)}
    if found > 1e-24:  # else the weights would leave the range of float32
        for name in {"w_q", "b_q"} & set(fields):
            fields[name] = fields[name] * (wanted.get(recipe.regime, recipe.spread) / found)
