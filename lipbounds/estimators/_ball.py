r"""Points of the Frobenius ball around the input of a block that are in the ball in exact arithmetic, too.

A step s with |s| <= usable gives the float fl(x + s), whose distance to x + s is at most u |x + s| <= u (|x| + |s|)
with u = 2**-53. So usable = radius (1 - c) - 2 u (|x| + radius), where c pays for the lengths computed here, keeps it
within the radius. Where that is negative, the floats around x are further apart than the ball is wide: s = 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.estimators._operator import working_copy
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate
from lipbounds.targets.attention import Attention


class Ball:
    """The ball around the moving input of a block; each batch item has its own.

    Args:
        block: the block; it is evaluated in float64, detached.
        radius: Frobenius norm, >= 0.
        seed: of the random points.
    """

    def __init__(self, block: Attention, radius: float, seed: int) -> None:
        copy = working_copy(block)
        assert isinstance(copy, Attention)
        moving = copy.moving_input
        self.block = copy
        self.centre = moving.expand(*block.batch_shape, *moving.shape[-2:])
        self.size = moving.shape[-2:].numel()
        self.generator = torch.Generator().manual_seed(seed)
        length = inflate(vector_norm(self.centre.flatten(-2)), self.size + 4)
        spare = 2 * UNIT_ROUNDOFF * (length + radius)
        self.usable = (radius * (1 - 4 * gamma(self.size + 32)) - spare).clamp(min=0)[..., None, None]

    @property
    def is_point(self) -> bool:
        """Whether no batch item has a float beside the centre in its ball that can be reached."""
        return not bool((self.usable > 0).any())

    def uniform_steps(self, count: int) -> Float[Tensor, "count *batch moving dim"]:
        """Steps from the centre to points that are uniform in the ball, the same on every device."""
        shape = (count, *self.centre.shape)
        source = self.generator.device
        direction = torch.randn(shape, generator=self.generator, dtype=torch.float64, device=source)
        uniform = torch.rand(shape[:-2], generator=self.generator, dtype=torch.float64, device=source)
        fraction = uniform ** (1 / self.size)
        direction = direction / _length(direction)
        return (direction * fraction[..., None, None]).to(self.centre.device) * self.usable

    def project(self, steps: Float[Tensor, "count *batch moving dim"]) -> Float[Tensor, "count *batch moving dim"]:
        """Steps from the centre, those that lead out of the ball shortened to its surface."""
        return steps * (self.usable / _length(steps).clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1)

    def points(self, steps: Float[Tensor, "count *batch moving dim"]) -> Float[Tensor, "count *batch moving dim"]:
        """The points of the ball that the steps lead to; a step that is not finite leads nowhere."""
        return self.centre + self.project(steps.nan_to_num(0.0, 0.0, 0.0))

    def block_at(self, points: Float[Tensor, "count *batch moving dim"]) -> Attention:
        """The block at all the points at once: its batch dimensions are [count, *batch]."""
        return self.block.at(points)


def _length(steps: Tensor) -> Tensor:
    return vector_norm(steps.flatten(-2))[..., None, None]
