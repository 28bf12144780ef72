"""Attention blocks from a handful of choices and a seed: small to print, easy to shrink, the same on every machine.

A seed gives large Gaussian master tensors; a block is their upper left corner, transformed as the recipe says. Fewer
tokens, features or heads therefore leave the remaining numbers as they were, which is what lets a counterexample
shrink.
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention, Moves
from lipbounds.targets.rms_norm import NormOver
from lipbounds.testing._families import GEOMETRIES as GEOMETRIES
from lipbounds.testing._families import MASKS as MASKS
from lipbounds.testing._families import NORMS as NORMS
from lipbounds.testing._families import ROTATIONS as ROTATIONS
from lipbounds.testing._families import SPECTRA as SPECTRA
from lipbounds.testing._families import duplicated


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
    "positions": (1, 32, 4),
    "query_norm_weight": (4, 1, 8),
    "key_norm_weight": (4, 1, 8),
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
        rotary: name in `ROTATIONS`; without effect on heads of width 1, which have no pair of features to turn.
        norm: name in `NORMS`, of the weights of QK-norm.
        norm_over: as in `Attention`; without effect where there is no norm.
        norm_eps: as in `Attention`, likewise.
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
    rotary: str = "none"
    norm: str = "none"
    norm_over: NormOver = "head"
    norm_eps: float = 1e-6
    biases: frozenset[str] = frozenset()
    bias_scale: float = 1.0
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    batch: tuple[int, ...] = ()
    batched: str = "inputs"
    rounded: bool = False


def build(recipe: Recipe) -> Attention:
    """The block that a recipe describes."""
    fields = {**_tokens(recipe), **_weights(recipe), **_biases(recipe), **_rotations(recipe), **_norms(recipe)}
    if recipe.regime == "sink":
        _point_at_one_key(fields)
    mask = _mask(recipe)
    _set_spread(recipe, fields)
    options: dict[str, Any] = {"scale": recipe.scale, "moves": recipe.moves}
    if recipe.norm != "none":
        options |= {"norm_eps": recipe.norm_eps, "norm_over": recipe.norm_over}
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
    return duplicated(tokens) if recipe.regime == "half" else tokens


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


def _rotations(recipe: Recipe) -> dict[str, Tensor]:
    """Cosines and sines; in cross-attention the queries continue the positions of the keys, as with a cache."""
    make = ROTATIONS[recipe.rotary]
    if make is None or recipe.head_dim < 2:
        return {}
    tokens = recipe.n if recipe.m is None else min(recipe.m + recipe.n, MASTER["positions"][1])
    gaussian = _master(recipe, "positions", recipe.batched == "both")[..., 0, :tokens, : recipe.head_dim // 2]
    angles = make(gaussian)
    rotation = torch.stack([angles.cos(), angles.sin()], -2)
    keys = tokens if recipe.m is None else recipe.m
    return {"query_rotation": rotation[..., -recipe.n :, :, :], "key_rotation": rotation[..., :keys, :, :]}


def _norms(recipe: Recipe) -> dict[str, Tensor]:
    """Weights of the RMSNorm of queries and keys."""
    make = NORMS[recipe.norm]
    if make is None:
        return {}
    batched = recipe.batched in ("weights", "both")
    groups = recipe.heads if recipe.tied else recipe.groups
    return {
        name: make(_master(recipe, name, batched)[..., :heads, 0, : recipe.head_dim])
        for name, heads in (("query_norm_weight", recipe.heads), ("key_norm_weight", groups))
    }


def _normalised(recipe: Recipe, vectors: Tensor, weight: Tensor | None) -> Tensor:
    """Divided by their root mean square, times the weights of each head."""
    if weight is None:
        return vectors
    together = (-3, -1) if recipe.norm_over == "all_heads" else -1
    square = (vectors**2).mean(together, keepdim=True)
    return vectors / (square + recipe.norm_eps) ** 0.5 * weight.unsqueeze(-2)


def _turned(vectors: Tensor, rotation: Tensor | None) -> Tensor:
    """Each pair of features as a complex number, times that of its angle."""
    if rotation is None:
        return vectors
    pairs = rotation.shape[-1]
    numbers = torch.complex(vectors[..., :pairs], vectors[..., pairs : 2 * pairs])
    numbers = numbers * torch.complex(rotation[..., 0, :], rotation[..., 1, :]).unsqueeze(-3)
    rest = vectors[..., 2 * pairs :]
    return torch.cat([numbers.real, numbers.imag, rest.expand(*numbers.shape[:-1], rest.shape[-1])], -1)


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
    keys = source.unsqueeze(-3) @ w_k
    normed = "query_norm_weight" in fields
    if "b_k" in fields and (normed or "key_rotation" in fields):  # else it moves all logits of a row alike
        b_k = fields["b_k"].repeat_interleave(recipe.heads // fields["b_k"].shape[-2], -2)
        keys = keys + b_k.unsqueeze(-2)
    if normed:
        weight = fields["key_norm_weight"]
        weight = weight.repeat_interleave(recipe.heads // weight.shape[-2], -2)
        queries, keys = _normalised(recipe, queries, fields["query_norm_weight"]), _normalised(recipe, keys, weight)
    queries, keys = _turned(queries, fields.get("query_rotation")), _turned(keys, fields.get("key_rotation"))
    logits = scale * queries @ keys.mT
    found = float((logits.amax(-1) - logits.amin(-1)).max())
    wanted = {"uniform": 0.0, "half": max(recipe.spread, 100.0), "one_hot": max(recipe.spread, 40.0)}
    if found > 1e-24:  # else the weights would leave the range of float32
        for name in {"query_norm_weight"} if normed else {"w_q", "b_q"} & set(fields):
            fields[name] = fields[name] * (wanted.get(recipe.regime, recipe.spread) / found)
