"""Hypothesis strategies for blocks other than `Attention`; hard cases are drawn on purpose.

A block is built from a handful of choices and a seed, as the larger blocks of `strategies` are. The choices hold what
breaks wrong constants: one token, duplicated tokens, tokens near zero beside a small eps, weights of very different
sizes or of rank one, one-hot rows, ties in the maximum that LipschitzNorm divides by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.ops.activations import ACTIVATIONS
from lipbounds.registry import BoundSpec
from lipbounds.targets.cosine_attention import CosineAttention
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention
from lipbounds.targets.mlp import Mlp
from lipbounds.targets.target import Target


T = TypeVar("T")
# Hypothesis shrinks towards the front of each of these: the simplest first.
SIZES = (1, 2, 3, 2, 4, 5, 8)
WIDTHS = (1, 2, 3, 4)
GEOMETRIES = ("gaussian", "gaussian", "duplicated", "collapsed", "outlier", "offset", "one_hot", "zero")
SPECTRA = ("gaussian", "gaussian", "identity", "rank_one")
WEIGHT_SIZES = (1.0, 1.0, 1.0, 3.0, 0.3, 30.0, 1e-2, 1e3)
SPREADS = (1.0, 0.1, 2.0, 4.0, 16.0, 100.0, 1e-3)
EPS = (1.0, 0.1, 1e-2, 1e-4, 1e-8)
INVERSE_TEMPERATURES = (1.0, 0.1, 10.0, 100.0)
DTYPES = (torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16)
BATCHES = ((), (), (2,), (4,), (2, 2))
NORMS = (1.0, 1.0, 1.0, 3.0, 0.3, 100.0, 1e-2, 0.0)


def target_blocks(
    spec: BoundSpec, *, batches: bool | None = None, extreme: bool = True, dtype: torch.dtype | None = None
) -> SearchStrategy[Target]:
    """Blocks of the class that a bound is about, with the features it supports.

    Args:
        spec: the bound.
        batches: whether batch dimensions occur; None for sometimes.
        extreme: whether degenerate inputs and weights of extreme sizes occur.
        dtype: the only dtype; None for float64, float32 and bfloat16.

    Raises:
        InvalidInput: no strategy is known for the class.
    """
    strategy = STRATEGIES.get(spec.target)
    if strategy is None:
        known = sorted(target.__name__ for target in STRATEGIES)
        raise InvalidInput(
            f"blocks can be drawn for Attention and {known}, got {spec.target.__name__}; "
            "add a strategy to lipbounds.testing.other_targets.STRATEGIES."
        )
    return strategy(spec, batches=batches, extreme=extreme, dtype=dtype)


@st.composite
def l2_attentions(draw: Callable[..., Any], spec: BoundSpec, **options: Any) -> L2Attention:
    """L2 attention; the spread is that of s |q_i - q_j|^2.

    Args:
        draw: given by Hypothesis.
        spec: the bound, for the features it supports.
        **options: those of `target_blocks`.
    """
    make = _Maker(draw, options)
    heads = draw(st.sampled_from((1, 1, 2, 3))) if "heads" in spec.supports else 1
    n, dim, width, value_dim, out_dim = draw(st.sampled_from(SIZES)), *(draw(st.sampled_from(WIDTHS)) for _ in range(4))
    w_q = make.weights(heads, dim, width)
    w_v, w_o = make.weights(heads, dim, value_dim), make.weights(heads, value_dim, out_dim)
    x = make.tokens(n, dim)
    queries = x.unsqueeze(-3) @ w_q
    away = (queries.unsqueeze(-2) - queries.unsqueeze(-3)).square().sum(-1).amax() * width**-0.5
    x = x * (make.pick(SPREADS, 5) / away).sqrt() if away > 0 else x
    return L2Attention(**make.finish(x=x, w_q=w_q, w_v=w_v, w_o=w_o))


@st.composite
def cosine_attentions(draw: Callable[..., Any], spec: BoundSpec, **options: Any) -> CosineAttention:
    """Scaled cosine similarity attention; the spread is that of the tokens beside the size at which eps matters.

    Args:
        draw: given by Hypothesis.
        spec: the bound.
        **options: those of `target_blocks`.
    """
    make = _Maker(draw, options)
    n, dim, width, value_dim = draw(st.sampled_from(SIZES)), *(draw(st.sampled_from(WIDTHS)) for _ in range(3))
    weights = {name: make.weights(dim, size) for name, size in (("w_q", width), ("w_k", width), ("w_v", value_dim))}
    eps = make.pick(EPS, 4)
    size = max(float(w.square().sum((-2, -1)).sqrt().amax()) for w in weights.values())
    x = make.tokens(n, dim) * (make.pick(SPREADS, 5) * eps**0.5 / size)
    return CosineAttention(
        **make.finish(x=x, **weights),
        eps=eps,
        scale=make.pick(INVERSE_TEMPERATURES, 3),
        output_scale=draw(st.sampled_from((1.0, 0.5, 8.0))),
    )


@st.composite
def lipschitz_norm_attentions(draw: Callable[..., Any], spec: BoundSpec, **options: Any) -> LipschitzNormAttention:
    """LipschitzNorm attention; the three norms in its scores are drawn one by one, and often tie.

    Args:
        draw: given by Hypothesis.
        spec: the bound.
        **options: those of `target_blocks`.
    """
    make = _Maker(draw, options)
    m, n = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    dim, value_dim = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    parts = [make.tokens(*shape) for shape in ((m, dim), (n, dim), (n, value_dim))]
    sizes = [make.pick(NORMS, 5) for _ in parts]
    if sizes.count(0.0) > 1:
        sizes = [size or 1.0 for size in sizes]
    norms = [parts[0].flatten(-2).norm(dim=-1), *(part.norm(dim=-1).amax(-1) for part in parts[1:])]
    queries, keys, values = (
        torch.where((norm > 0)[..., None, None], part / norm.clamp(min=1e-30)[..., None, None], 1.0) * size
        for part, norm, size in zip(parts, norms, sizes, strict=True)
    )
    return LipschitzNormAttention(**make.finish(queries=queries, keys=keys, values=values))


@st.composite
def mlps(draw: Callable[..., Any], spec: BoundSpec, **options: Any) -> Mlp:
    """Feed-forward networks of one to four layers, most often with relu.

    Args:
        draw: given by Hypothesis.
        spec: the bound.
        **options: those of `target_blocks`.
    """
    make = _Maker(draw, options)
    sizes = [draw(st.sampled_from(SIZES)) for _ in range(1 + draw(st.sampled_from((2, 1, 3, 4))))]
    x = make.tokens(1, sizes[0])[..., 0, :] * make.pick(SPREADS, 5)
    make.batch = ()  # the weights are those of one network
    weights = [make.weights(rows, cols) for cols, rows in pairwise(sizes)]
    biases = [make.tokens(1, rows)[0] if draw(st.booleans()) else None for rows in sizes[1:]]
    named = make.finish(x=x, **{f"weights{i}": weight for i, weight in enumerate(weights)})
    return Mlp(
        x=named["x"],
        weights=tuple(named[f"weights{i}"] for i in range(len(weights))),
        biases=tuple(None if bias is None else bias.to(make.dtype) for bias in biases),
        activation=draw(st.sampled_from(("relu", "relu", "relu", *sorted(ACTIVATIONS)))),  # some bounds refuse others
    )


Strategy = Callable[..., SearchStrategy[Any]]
STRATEGIES: dict[type[Target], Strategy] = {
    L2Attention: l2_attentions,
    CosineAttention: cosine_attentions,
    LipschitzNormAttention: lipschitz_norm_attentions,
    Mlp: mlps,
}


class _Maker:
    """Tensors of one block from a seed and the choices common to all classes."""

    def __init__(self, draw: Callable[..., Any], options: dict[str, Any]) -> None:
        self.draw, self.extreme = draw, options["extreme"]
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**24)))
        self.dtype = draw(st.sampled_from(DTYPES)) if options["dtype"] is None else options["dtype"]
        shapes = {True: BATCHES[2:], False: ((),), None: BATCHES}[options["batches"]]
        self.batch: Sequence[int] = draw(st.sampled_from(shapes))
        # Rounded entries tie and vanish.
        self.rounded = draw(st.booleans())

    def pick(self, choices: Sequence[T], ordinary: int) -> T:
        """One of the choices, of the first ones only unless extreme cases are wanted."""
        return self.draw(st.sampled_from(choices if self.extreme else choices[:ordinary]))

    def weights(self, *shape: int) -> Tensor:
        """Weights of every batch item."""
        spectrum = self.pick(SPECTRA, 3)
        rows, cols = shape[-2:]
        if spectrum == "identity":
            matrix = torch.eye(rows, cols, dtype=torch.float64).expand(*self.batch, *shape)
        elif spectrum == "rank_one":
            matrix = self._gaussian(*shape[:-1], 1) @ self._gaussian(*shape[:-2], 1, cols)
        else:
            matrix = self._gaussian(*shape)
        return matrix * self.pick(WEIGHT_SIZES, 5)

    def tokens(self, n: int, dim: int) -> Tensor:
        """Tokens of every batch item, of size about 1."""
        x = self._gaussian(n, dim)
        geometry = self.pick(GEOMETRIES, 3)
        if geometry == "duplicated":
            x = x[..., torch.arange(n) // 2, :]
        elif geometry == "collapsed":
            x = x[..., :1, :] + 1e-3 * x
        elif geometry == "outlier":
            x = torch.cat([100 * x[..., :1, :], x[..., 1:, :]], -2)
        elif geometry == "offset":
            x = x + 10
        elif geometry == "one_hot":
            x = torch.eye(n, dim, dtype=torch.float64).expand(x.shape)
        elif geometry == "zero":
            x = torch.cat([x[..., :1, :], torch.zeros_like(x[..., 1:, :])], -2)
        return x

    def finish(self, **tensors: Tensor) -> dict[str, Tensor]:
        """The fields in the dtype of the block."""
        return {name: tensor.to(self.dtype).contiguous() for name, tensor in tensors.items()}

    def _gaussian(self, *shape: int) -> Tensor:
        entries = torch.randn(*self.batch, *shape, generator=self.generator, dtype=torch.float64)
        return (2 * entries).round() / 2 if self.rounded else entries
