"""Kinds of attention that a search starts from: each changes a Gaussian instance in place.

Left alone, every ascent drifts to logits near zero, where the mixing term alone is tight. These
start where the softmax part matters, or where a common mistake shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor


Parameters = dict[str, Tensor]
Regime = Callable[[Parameters, Generator], None]


def _gaussian(p: Parameters, generator: Generator) -> None:
    """As drawn."""


def _small_logits(p: Parameters, generator: Generator) -> None:
    """Uniform attention."""
    p["w_q"] *= 1e-3
    p["w_k"] *= 1e-1


def _one_hot(p: Parameters, generator: Generator) -> None:
    """Each query attends to one key."""
    p["w_q"] *= 30.0 / _logit_size(p)


def _two_alike(p: Parameters, generator: Generator) -> None:
    """Large logits and pairs of nearly equal tokens: rows near (1/2, 1/2)."""
    for name in _present(p, "x", "memory"):
        tokens = p[name]
        odd = tokens[1::2]
        odd.copy_(tokens[: 2 * len(odd) : 2] + 0.05 * odd)
    p["w_q"] *= 10.0 / _logit_size(p)


def _clustered(p: Parameters, generator: Generator) -> None:
    """All tokens nearly equal."""
    for name in _present(p, "x", "memory"):
        p[name] = p[name][:1] + 1e-2 * p[name]


def _rank_one(p: Parameters, generator: Generator) -> None:
    """Every matrix of rank one."""
    for name in _present(p, "x", "w_q", "w_k", "w_v", "w_o"):
        matrix = p[name]
        p[name] = matrix[..., :1] @ matrix[..., :1, :] / matrix[..., :1, :1].abs().clamp(min=0.1)


def _aligned(p: Parameters, generator: Generator) -> None:
    """W_Q = W_K: every query likes its own key best."""
    p["w_k"] = p["w_q"].clone()


def _opposed(p: Parameters, generator: Generator) -> None:
    """W_Q = -W_K: every query likes its own key least."""
    p["w_k"] = -p["w_q"]


def _antipodal(p: Parameters, generator: Generator) -> None:
    """Tokens u, -u, ... and all weights along u, logits of order 1: the worst case of one feature."""
    u = _directions(p, generator)[:, 0]
    _along(p, generator, 1.0, u, {"w_q": (u,), "w_k": (u,), "w_v": (u,)})
    p["w_q"] *= 10 ** uniform(generator, -0.3, 0.6) / _logit_size(p)


def _common_mean(p: Parameters, generator: Generator) -> None:
    """A large mean in all tokens."""
    mean = 10 * p["x"].norm() * normal(generator, p["x"].shape[-1])
    for name in _present(p, "x", "memory"):
        p[name] = p[name] + mean


def _one_massive(p: Parameters, generator: Generator) -> None:
    """One token far larger than the others."""
    p["x"][0] *= 30.0


def _crossed(p: Parameters, generator: Generator) -> None:
    """Large queries and keys, logits near 0: tokens along u, and W_Q W_K^T takes u to an orthogonal v and v to u.

    Here the softmax part dominates and rows stay at (1/2, 1/2): Theorem 3 of Yudin et al. 2025 is tight in the limit.
    """
    basis = _directions(p, generator)
    u, v = basis[:, 0], basis[:, -1]
    _along(p, generator, 10 ** uniform(generator, 0.0, 1.3), u, {"w_q": (u, v), "w_k": (v, u), "w_v": (u,)})


def _cancelling_biases(p: Parameters, generator: Generator) -> None:
    """Large biases that cancel X W, around a large common mean."""
    _common_mean(p, generator)
    for letter, source in (("q", "x"), ("k", "memory"), ("v", "memory")):
        if f"b_{letter}" in p:
            tokens = p.get(source, p["x"])
            p[f"b_{letter}"] = 0.3 * p[f"b_{letter}"] - tokens.mean(0) @ p[f"w_{letter}"]


def _large_biases(p: Parameters, generator: Generator) -> None:
    """Biases far larger than the rest."""
    for name in _present(p, "b_q", "b_k", "b_v"):
        p[name] *= 10 ** uniform(generator, 0.0, 2.0)


# One that matters most comes twice.
REGIMES: tuple[Regime, ...] = (
    _gaussian,
    _crossed,
    _antipodal,
    _small_logits,
    _one_hot,
    _two_alike,
    _large_biases,
    _aligned,
    _crossed,
    _opposed,
    _rank_one,
    _cancelling_biases,
    _clustered,
    _common_mean,
    _one_massive,
)


def _present(p: Parameters, *names: str) -> list[str]:
    """Those of the names that there are, in this order: the order of a set differs between runs."""
    return [name for name in names if name in p]


def _directions(p: Parameters, generator: Generator) -> Tensor:
    """Orthonormal directions of the token space, as columns."""
    dim = p["x"].shape[-1]
    return torch.linalg.qr(normal(generator, dim, dim)).Q


def _along(
    p: Parameters, generator: Generator, size: float, tokens: Tensor, columns: dict[str, tuple[Tensor, ...]]
) -> None:
    """Tokens of alternating sign along a direction and first columns of weights along others, with a little noise."""
    for name in _present(p, "x", "memory"):
        signs = 1.0 - 2 * (torch.arange(len(p[name])) % 2)
        p[name] = size * (signs.unsqueeze(-1) * tokens + 0.02 * normal(generator, *p[name].shape))
    for name, directions in columns.items():
        p[name] = 0.02 * p[name]
        for column, direction in zip(range(p[name].shape[-1]), directions, strict=False):
            p[name][..., column] += direction


def _logit_size(p: Parameters) -> float:
    logits = (p["x"] @ p["w_q"]) @ (p.get("memory", p["x"]) @ p["w_k"]).mT
    return max(float(logits.abs().amax()) * p["w_q"].shape[-1] ** -0.5, 1e-6)


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))
