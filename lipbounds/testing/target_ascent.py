"""Ascent on log(true / claimed) over input and weights, for bounds on attention types other than `Attention`.

As `falsify` for `Attention`: a population of blocks climbs by Adam on exact gradients, in float64. It proves a fault,
never soundness. Each tensor of a block is a direction times exp(log size), so that one learning rate suits entries of
every magnitude, and weights can grow or vanish: a formula of the wrong degree gives itself away there.
"""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.targets._tensor_target import TensorTarget
from lipbounds.targets.cosine_attention import CosineAttention
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention
from lipbounds.testing import dense_jacobian
from lipbounds.testing.target_checks import item


FIRST_RATE, LAST_RATE = 0.1, 0.003
LOG_SIZES = (-9.0, 9.0)  # of the size of each tensor
SMALLEST = 1e-300
SHAPES = ((2, 2, 2), (1, 2, 2), (3, 2, 1), (4, 3, 2), (6, 2, 2))  # tokens, features, width of a head; in turn
EPS = (1.0, 1e-4)
INVERSE_TEMPERATURES = (1.0, 4.0, 0.2)


@dc.dataclass(frozen=True, kw_only=True)
class Climb:
    """The worst block that a climb found.

    Args:
        spec: name of the bound.
        ratio: reached / claimed.
        block: the block, unbatched and in float64.
        claimed: value of the bound.
        reached: norm of the Jacobian.
        slack: how far rounding can take `reached` from the exact norm.
        starts: starting points.
        seconds: time the search took.
    """

    spec: str
    ratio: float
    block: TensorTarget
    claimed: float
    reached: float
    slack: float
    starts: int
    seconds: float = 0.0

    @property
    def refuted(self) -> bool:
        """Whether this block is a counterexample."""
        return not self.reached <= self.claimed + self.slack

    def __repr__(self) -> str:
        verdict = "refuted" if self.refuted else "not refuted"
        return f"Climb({self.spec}: {verdict}, true/bound {self.ratio:.10g}, {self.starts} starts, {self.block})"


def can_climb_target(spec: BoundSpec) -> bool:
    """Whether the search is for this bound: proved, at a point or global, on a block of one of the classes in `STARTS`.

    Feed-forward networks are not among them: their weights have no batch dimensions for a population.
    """
    return spec.claim.kind == "proved" and spec.claim.scope in ("point", "global") and spec.target in STARTS


def climb_widely(
    spec: BoundSpec, *, seed: int = 0, seconds: float = 60.0, progress: Callable[[float], None] | None = None
) -> Climb:
    """Climbs from blocks of one shape after the other, one at least, until the time is over or the bound refuted.

    Args:
        spec: a proved bound on a block of one of the classes in `STARTS`.
        seed: of the search.
        seconds: after which no climb begins.
        progress: called with the largest ratio so far.

    Raises:
        InvalidInput: a bound of another kind, scope or class.
    """
    begun, worst, starts, number = time.process_time(), None, 0, 0
    while worst is None or (not worst.refuted and time.process_time() - begun < seconds):
        found = climb(spec, seed=seed + number, number=number)
        starts += found.starts
        worst = found if worst is None or found.refuted or found.ratio > worst.ratio else worst
        number += 1
        if progress is not None:
            progress(worst.ratio)
    return dc.replace(worst, starts=starts, seconds=time.process_time() - begun)


def climb(spec: BoundSpec, *, seed: int = 0, number: int = 0, starts: int = 16, steps: int = 80) -> Climb:
    """One climb of a population of blocks.

    Args:
        spec: a proved bound at a point or global.
        seed: of the starting points.
        number: of the shape of the blocks; shapes take turns.
        starts: blocks that climb together.
        steps: of Adam.

    Raises:
        InvalidInput: a bound of another kind, scope or class.
    """
    if not can_climb_target(spec):
        known = sorted(target.__name__ for target in STARTS)
        raise InvalidInput(
            f"ascent needs a proved bound at a point or global on one of {known}, got {spec.name} with "
            f"kind={spec.claim.kind!r}, scope={spec.claim.scope!r}, target={spec.target.__name__}."
        )
    block = STARTS[spec.target](spec, Generator().manual_seed(seed), number, starts)
    leaves = _split(block.tensors)
    moments = {name: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for name, leaf in leaves.items()}
    best, best_at = torch.full((starts,), -torch.inf, dtype=torch.float64), leaves
    for step in range(steps):
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        height = _log_ratio(spec, block.replace(**_join(leaves)))
        seen = height.detach().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        better = seen > best
        best_at = {n: torch.where(_column(better, leaf), leaf.detach(), best_at[n]) for n, leaf in leaves.items()}
        best = torch.maximum(best, seen)
        rate = FIRST_RATE * (LAST_RATE / FIRST_RATE) ** (step / steps)
        leaves = _adam(leaves, _gradient(height, leaves), moments, step + 1, rate)
    return _worst(spec, block.replace(**_join(best_at)), best)


def _log_ratio(spec: BoundSpec, block: TensorTarget) -> Tensor:
    truth = dense_jacobian.jacobian_norm(block, spec.claim.norm)
    return truth.clamp(min=SMALLEST).log() - spec(block, grad=True).value.clamp(min=SMALLEST).log()


def _worst(spec: BoundSpec, block: TensorTarget, log_ratio: Tensor) -> Climb:
    single = item(block, (int(log_ratio.argmax()),))
    claimed = spec(single).value
    matrix = dense_jacobian.jacobian(single)
    reached = dense_jacobian.dense_norm(matrix, spec.claim.norm)
    slack = dense_jacobian.truth_slack(single, spec.claim.norm, matrix)
    return Climb(
        spec=spec.name,
        ratio=float(reached / claimed) if claimed > 0 else float("inf") if reached > 0 else 0.0,
        block=single,
        claimed=claimed.item(),
        reached=reached.item(),
        slack=slack.item(),
        starts=len(log_ratio),
    )


# -- starting points ------------------------------------------------------------------------------------------------


def _l2(spec: BoundSpec, generator: Generator, number: int, count: int) -> L2Attention:
    n, dim, width = SHAPES[number % len(SHAPES)]
    heads = 1 + number % 2 if "heads" in spec.supports else 1
    draw = _drawer(generator, count)
    return L2Attention(
        x=draw(n, dim), w_q=draw(heads, dim, width), w_v=draw(heads, dim, width), w_o=draw(heads, width, dim)
    )


def _cosine(spec: BoundSpec, generator: Generator, number: int, count: int) -> CosineAttention:
    n, dim, width = SHAPES[number % len(SHAPES)]
    eps, scale = EPS[number % len(EPS)], INVERSE_TEMPERATURES[number % len(INVERSE_TEMPERATURES)]
    draw = _drawer(generator, count)
    return CosineAttention(
        x=eps**0.5 * draw(n, dim),
        w_q=draw(dim, width),
        w_k=draw(dim, width),
        w_v=draw(dim, width),
        eps=eps,
        scale=scale,
    )


def _lipschitz_norm(spec: BoundSpec, generator: Generator, number: int, count: int) -> LipschitzNormAttention:
    n, dim, value_dim = SHAPES[number % len(SHAPES)]
    m = SHAPES[number // 2 % len(SHAPES)][0]
    draw = _drawer(generator, count)
    return LipschitzNormAttention(queries=draw(m, dim), keys=draw(n, dim), values=draw(n, value_dim))


STARTS: dict[type, Callable[[BoundSpec, Generator, int, int], TensorTarget]] = {
    L2Attention: _l2,
    CosineAttention: _cosine,
    LipschitzNormAttention: _lipschitz_norm,
}


def _drawer(generator: Generator, count: int) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(count, *shape, generator=generator, dtype=torch.float64)


# -- the population -------------------------------------------------------------------------------------------------


Leaves = dict[str, Tensor]


def _split(tensors: Leaves) -> Leaves:
    """Each tensor as a direction of root mean square 1 and the log of its size, under the name with a dot."""
    leaves: Leaves = {}
    for name, tensor in tensors.items():
        size = tensor.square().flatten(1).mean(-1).sqrt().clamp(min=1e-8)
        leaves[name] = tensor / _column(size, tensor)
        leaves[f"{name}.log_size"] = size.log()
    return leaves


def _join(leaves: Leaves) -> Leaves:
    sizes = {name: leaves[f"{name}.log_size"].clamp(*LOG_SIZES).exp() for name in leaves if "." not in name}
    return {name: leaves[name].clamp(-50.0, 50.0) * _column(size, leaves[name]) for name, size in sizes.items()}


def _gradient(height: Tensor, leaves: Leaves) -> Leaves:
    """Gradient for each block; 0 where there is none."""
    total = torch.where(height.isfinite(), height, 0.0).sum()
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: slope.nan_to_num(0.0, 0.0, 0.0) for name, slope in zip(leaves, slopes, strict=True)}


def _adam(
    leaves: Leaves, gradient: Leaves, moments: dict[str, tuple[Tensor, Tensor]], step: int, rate: float
) -> Leaves:
    moved = {}
    for name, slope in gradient.items():
        first, second = moments[name]
        first.mul_(0.9).add_(slope, alpha=0.1)
        second.mul_(0.99).addcmul_(slope, slope, value=0.01)
        size = (second / (1 - 0.99**step)).sqrt()
        moved[name] = leaves[name].detach() + rate * first / (1 - 0.9**step) / (size + 1e-12)
    return moved


def _column(values: Tensor, like: Tensor) -> Tensor:
    """One value a block, shaped to multiply a tensor that has blocks along its first axis."""
    return values.reshape(-1, *[1] * (like.dim() - 1))
