"""Small random networks, and how large their Jacobians get in a ball: the truth for bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lipbounds import Attention
from lipbounds.targets.layers import (
    AttentionLayer,
    Layer,
    Linear,
    Normalization,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
)


class Draw:
    """Gaussian tensors in float64, determined by the seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def attention(draw: Draw, n: int, dim: int, heads: int = 2, scale: float = 0.5, **fields: Any) -> AttentionLayer:
    width = max(1, dim // heads)
    weights = {name: draw(heads, dim, width, scale=scale) for name in ("w_q", "w_k", "w_v")}
    biases = {name: draw(heads, width, scale=scale) for name in ("b_q", "b_k", "b_v")}
    block = Attention(x=draw(n, dim), w_o=draw(heads, width, dim, scale=scale), **weights, **biases, **fields)
    return AttentionLayer(block)


def feed_forward(draw: Draw, dim: int, hidden: int, activation: str) -> Sequence:
    first, second = Linear(draw(hidden, dim), draw(hidden)), Linear(draw(dim, hidden, scale=0.5), draw(dim))
    return Sequence((first, Pointwise(activation), second))


def norm(draw: Draw, dim: int, centred: bool = True, epsilon: float = 1e-2) -> Normalization:
    return Normalization(centred, epsilon, draw(dim), draw(dim) if centred else None)


def transformer(
    draw: Draw, n: int, dim: int, *, pre_norm: bool, centred: bool, activation: str, how: Any, depth: int = 1
) -> Sequence:
    """Positions, blocks of attention and feed-forward layers, pooling, and a head of two features."""
    layers: list[Layer] = [Positions(None, draw(n, dim))]
    for _ in range(depth):
        mix, mlp = attention(draw, n, dim), feed_forward(draw, dim, dim + 2, activation)
        if pre_norm:
            layers += [Residual(Sequence((norm(draw, dim, centred), mix)))]
            layers += [Residual(Sequence((norm(draw, dim, centred), mlp)))]
        else:
            layers += [Residual(mix), norm(draw, dim, centred), Residual(mlp), norm(draw, dim, centred)]
    return Sequence((*layers, Pool(how), norm(draw, dim, centred), Linear(draw(2, dim))))


def jacobian_norm(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Norm of the dense Jacobian, by automatic differentiation; differentiable."""
    jacobian = torch.func.jacrev(function)(x)
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)


def largest_norm(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, radius: float, *, steps: int = 8, starts: int = 3
) -> float:
    """The largest norm of the Jacobian found in the ball: at its centre, at random points, and by ascent from them."""
    best = float(jacobian_norm(function, x))
    draw = Draw(0)
    for start in range(starts if radius > 0 else 0):
        move = torch.zeros_like(x) if start == 0 else draw(*x.shape)
        move = move * (radius * 0.9 / move.norm().clamp(min=1e-300))
        move = move + draw(*x.shape, scale=1e-3 * radius) / x.numel() ** 0.5
        for step in range(steps):
            point = (x + move * min(1.0, radius / float(move.norm()))).requires_grad_()
            reached = jacobian_norm(function, point)
            best = max(best, float(reached.detach()))
            if not reached.requires_grad:
                break
            (slope,) = torch.autograd.grad(reached, point, allow_unused=True)
            if slope is None or not bool(slope.isfinite().all()) or float(slope.norm()) == 0:
                break
            move = point.detach() - x + radius * 0.5 * 0.7**step * slope / slope.norm()
            move = move * min(1.0, radius / float(move.norm()))
    return best
