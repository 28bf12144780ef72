"""Families that a recipe names: tokens, weights, masks, rotary positions and norms of a certain kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


LARGE = 1e3

# -- what the input looks like: each takes Gaussian tokens -----------------------------------------------------------


def duplicated(x: Float[Tensor, "*batch n dim"]) -> Float[Tensor, "*batch n dim"]:
    """Each token twice."""
    return x[..., torch.arange(x.shape[-2]) // 2 * 2, :]


def _antipodal(x: Tensor) -> Tensor:
    signs = 1 - 2 * (torch.arange(x.shape[-2]) % 2).to(x)
    return duplicated(x) * signs.unsqueeze(-1)


def _massive(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0, 0] = LARGE
    return x


GEOMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda x: x,
    "antipodal": _antipodal,
    "duplicated": duplicated,
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


# -- how queries and keys are turned: Gaussian numbers [*batch, tokens, pairs of a head] -> angles ---------------------


def _by_position(gaussian: Tensor) -> Tensor:
    """Token i at position i, wave lengths as in Llama."""
    positions = torch.arange(gaussian.shape[-2], dtype=gaussian.dtype)
    pairs = torch.arange(gaussian.shape[-1], dtype=gaussian.dtype)
    return (positions[:, None] * 10_000.0 ** (-pairs / len(pairs))).expand(gaussian.shape)


ROTATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "by_position": _by_position,
    "first_pair": lambda gaussian: _by_position(gaussian[..., :1]),  # partial: the other features are left alone
    "same_position": lambda gaussian: (3 * gaussian[..., :1, :]).expand(gaussian.shape),
    "half_turns": lambda gaussian: (
        math.pi * (torch.arange(gaussian.shape[-2]) % 2).to(gaussian)[:, None].expand(gaussian.shape)
    ),
    "random": lambda gaussian: 3 * gaussian,
}


# -- how queries and keys are normalised: Gaussian numbers [*batch, heads, head_dim] -> weights of RMSNorm -------------

NORMS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "ones": torch.ones_like,
    "near_ones": lambda gaussian: 1 + gaussian / 4,
    "gaussian": lambda gaussian: gaussian,
    "one_large": lambda gaussian: torch.where(gaussian == gaussian.amax(-1, keepdim=True), 30.0, gaussian / 4),
}
