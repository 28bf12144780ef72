"""A short attack inside a ball: the self-check of certificates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.layers import Layer


STEPS, STARTS = 20, 3


def smallest_margin(
    network: Layer, x: Float[Tensor, "..."], label: int, radius: float, *, steps: int = STEPS, starts: int = STARTS
) -> float:
    """The smallest margin of the label found in the ball: an upper bound on the truth, by gradient descent.

    Args:
        network: its output is one token of logits.
        x: one input, without batch dimensions.
        label: the class.
        radius: of the ball, in l2.
        steps: of each descent.
        starts: the centre, then random points of the sphere (from a fixed seed).
    """
    generator = torch.Generator().manual_seed(0)
    best = torch.inf
    for start in range(starts):
        move = torch.zeros_like(x)
        if start:
            move = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
        for step in range(steps + 1):
            move = _inside(move, radius) if step or start == 0 else _onto(move, radius)
            point = (x + move).detach().requires_grad_()
            with torch.enable_grad():
                logits = network(point.unsqueeze(0)).flatten()
                rest = torch.cat([logits[:label], logits[label + 1 :]])
                margin = logits[label] - rest.max()
                (slope,) = torch.autograd.grad(margin, point)
            best = min(best, float(margin.detach()))
            move = move - _onto(slope, radius * (0.5 if step < steps // 2 else 0.1))
    return best


def _onto(move: Tensor, radius: float) -> Tensor:
    norm = move.norm()
    return move * (radius / norm) if float(norm) > 0 else move


def _inside(move: Tensor, radius: float) -> Tensor:
    # The last roundings stay inside: a point outside would prove nothing.
    return _onto(move, radius * (1 - 1e-12)) if float(move.norm()) > radius * (1 - 1e-12) else move
