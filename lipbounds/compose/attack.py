"""A short attack inside a ball: the self-check of certificates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.ball import Norm
from lipbounds.targets.layers import Layer


STEPS, STARTS, RIVALS = 20, 3, 3


def smallest_margin(
    network: Layer,
    x: Float[Tensor, "..."],
    label: int,
    radius: float,
    *,
    steps: int = STEPS,
    starts: int = STARTS,
    norm: Norm = "l2",
) -> float:
    """The smallest margin of the label found in the ball: an upper bound on the truth, by gradient descent.

    Args:
        network: its output is one token of logits.
        x: one input, without batch dimensions.
        label: the class.
        radius: of the ball.
        steps: of each descent.
        starts: the centre, from which the margins to the nearest classes are descended one by one, since in l1 and
            l_inf steps towards two classes in turn end between them; then random points of the sphere (from a fixed
            seed), from which the least margin is.
        norm: of the ball.
    """
    with torch.no_grad():
        logits = network(x.unsqueeze(0)).flatten()
    nearest = [j for j in logits.argsort(descending=True).tolist() if j != label][:RIVALS]
    generator = torch.Generator().manual_seed(0)
    best = torch.inf
    for rival in [*nearest, *[None] * (starts - 1)]:
        move = torch.zeros_like(x)
        if rival is None:
            move = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
            move = _onto(move, radius, norm)
        for step in range(steps + 1):
            move = _inside(move, radius, norm)
            point = (x + move).detach().requires_grad_()
            with torch.enable_grad():
                logits = network(point.unsqueeze(0)).flatten()
                rest = torch.cat([logits[:label], logits[label + 1 :]])
                margin = logits[label] - rest.max()
                aim = margin if rival is None else logits[label] - logits[rival]
                (slope,) = torch.autograd.grad(aim, point)
            best = min(best, float(margin.detach()))
            move = move - _onto(_steepest(slope, norm), radius * (0.5 if step < steps // 2 else 0.1), norm)
    return best


def _steepest(slope: Tensor, norm: Norm) -> Tensor:
    """The direction in which the margin falls fastest for its length in the norm."""
    if norm == "l2":
        return slope
    if norm == "l_inf":
        return slope.sign()
    return torch.where(slope.abs() >= slope.abs().amax(), slope, 0.0)


def _size(move: Tensor, norm: Norm) -> float:
    return float(torch.linalg.vector_norm(move, {"l2": 2, "l_inf": torch.inf, "l1": 1}[norm]))


def _onto(move: Tensor, radius: float, norm: Norm) -> Tensor:
    size = _size(move, norm)
    return move * (radius / size) if size > 0 else move


def _inside(move: Tensor, radius: float, norm: Norm) -> Tensor:
    # The last roundings stay inside: a point outside would prove nothing.
    shorter = radius * (1 - 1e-12)
    if norm == "l_inf":
        return move.clamp(-shorter, shorter)
    return _onto(move, shorter, norm) if _size(move, norm) > shorter else move
