"""Attention blocks with Gaussian weights, from flat to peaked attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.workloads.case import Case
from bench.workloads.hashes import recipe_hash
from lipbounds.targets.attention import Attention


SEED = 0
TOKENS, WIDTH = 16, 32
LOGIT_SCALES = (0.25, 1.0, 4.0, 16.0)  # from nearly uniform rows to nearly one-hot ones


@functools.cache
def _weights(heads: int) -> dict[str, Tensor]:
    """Gaussian weights of variance 1/width, so that queries, keys and unscaled logits have standard deviation 1."""
    width = WIDTH
    generator = torch.Generator().manual_seed(SEED)
    shapes = {
        **dict.fromkeys(("w_q", "w_k", "w_v"), (heads, width, width // heads)),
        "w_o": (heads, width // heads, width),
    }
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) / width**0.5
        for name, shape in shapes.items()
    }


def _block(heads: int, seed: int, factor: float) -> tuple[str, Attention]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weights = _weights(heads)
    turned: dict[str, Any] = {**weights, "w_q": weights["w_q"] * factor}
    return f"logit spread {factor:g}", Attention(x=x, **turned)


def random_blocks(heads: int, count: int) -> Iterator[Case]:
    """The cases of the model of that many heads: a layer for each factor of the logits.

    Args:
        heads: of a block.
        count: of inputs.
    """
    weights = recipe_hash(weights="Gaussian", heads=heads, width=WIDTH, spreads=LOGIT_SCALES, seed=SEED)
    for seed in range(count):
        for layer, factor in enumerate(LOGIT_SCALES):
            yield Case(
                model=f"random-{heads}-head{'s' if heads > 1 else ''}",
                model_hash=weights,
                input=f"seed-{seed}",
                input_hash=recipe_hash(tokens="Gaussian", shape=[TOKENS, WIDTH], seed=seed),
                layer=layer,
                load=functools.partial(_block, heads, seed, factor),
                width=WIDTH,
                block_features=frozenset({"heads"} if heads > 1 else ()),
            )
