"""The Jacobian of a target as a matrix that is only ever multiplied with.

The estimators see flat float64 vectors `[*batch, N]` and two products. Of J^T J and J J^T, which share their nonzero
eigenvalues, the one on the smaller side is used.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.jacobian import Roundoff
from lipbounds.errors import InvalidInput
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.network import Network


@runtime_checkable
class Target(Protocol):
    """What an estimator needs: a batch of functions at one input each, and products with their Jacobians.

    The moving input is `[*batch, n, D]` (leading dimensions may be left to broadcasting), except for a `Network`,
    which says itself how many of its leading dimensions are batch.
    """

    @property
    def moving_input(self) -> Tensor: ...

    @property
    def batch_shape(self) -> Any: ...  # a torch.Size; pyright does not match a cached_property with a declared type

    def jvp(self, tangent: Tensor) -> Tensor: ...

    def vjp(self, cotangent: Tensor) -> Tensor: ...


class JacobianOperator:
    """J of every batch item, divided by `scale`, a power of two of the order of its norm, or of the rounding of that.

    The division keeps squares inside the float range, and is exact. An `Attention` is evaluated in float64, detached;
    any other target in the dtype of its own input.

    Args:
        target: the target; its Jacobian is `out_size` x `in_size` for each batch item.
    """

    def __init__(self, target: Target) -> None:
        if not isinstance(target, Target):
            raise InvalidInput(
                f"target must offer moving_input, batch_shape, jvp and vjp, got {type(target).__name__}; "
                "wrap a function or a module as lipbounds.targets.network.Network(function, x)."
            )
        self.target = working_copy(target)
        moving = self.target.moving_input
        self.dtype, self.device = moving.dtype, moving.device
        self.batch_shape = target.batch_shape
        item_dims = moving.dim() - target.batch_dims if isinstance(target, Network) else 2
        self._in_shape = moving.shape[moving.dim() - item_dims :]
        self.in_size = math.prod(self._in_shape)
        self._roundoff = Roundoff(self.target) if isinstance(self.target, Attention) else None
        self.scale = torch.ones(self.batch_shape, dtype=torch.float64, device=self.device)
        # A random direction shows the shape of the output and, almost surely, the order of magnitude of J.
        probe = sphere(self.batch_shape, self.in_size, torch.Generator().manual_seed(0), self.device)
        image = self.target.jvp(self._item(probe, self._in_shape))
        if not bool(image.isfinite().all()):
            raise InvalidInput(
                f"the Jacobian must be finite, got {int((~image.isfinite()).sum())} entries of J v that are not; "
                "rescale the weights or the input."
            )
        self._out_shape = image.shape[len(self.batch_shape) :]
        self.out_size = math.prod(self._out_shape)
        magnitude = self._flat(image, self._out_shape).abs().amax(-1)
        if self._roundoff is not None:
            # Where J is zero but for rounding, another direction may be stretched by all of the rounding.
            error = self._roundoff.jvp(self._item(probe.abs(), self._in_shape))
            magnitude = torch.maximum(magnitude, self._flat(error, self._out_shape).amax(-1))
        self.scale = power_of_two(magnitude)

    @property
    def size(self) -> int:
        """N, the dimension of the smaller side, on which `gram` acts."""
        return min(self.in_size, self.out_size)

    @property
    def entries_per_direction(self) -> int:
        """Entries of the largest tensor that one product makes for one direction, in all batch items together."""
        widest = max(self.in_size, self.out_size)
        if isinstance(self.target, Attention):
            n, m = self.target.logits.shape[-2:]
            widths = [weights.shape[-2:] for weights in (self.target.w_q, self.target.w_v, self.target.w_o)]
            widest = self.target.heads * max(n, m) * max(n, m, *(size for pair in widths for size in pair))
        return max(1, self.batch_shape.numel() * widest)

    @property
    def _starts_at_output(self) -> bool:
        return self.out_size < self.in_size

    def jvp(self, v: Float[Tensor, "*batch in_size"]) -> Float[Tensor, "*batch out_size"]:
        """J v / scale; extra leading dimensions are directions."""
        image = self.target.jvp(self._item(v, self._in_shape))
        return self._flat(image, self._out_shape) / self.scale[..., None]

    def vjp(self, u: Float[Tensor, "*batch out_size"]) -> Float[Tensor, "*batch in_size"]:
        """J^T u / scale; extra leading dimensions are directions."""
        image = self.target.vjp(self._item(u, self._out_shape))
        return self._flat(image, self._in_shape) / self.scale[..., None]

    def stretch(self, v: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch large"]:
        """From the smaller side to the larger one: J v or J^T v, divided by scale."""
        return self.vjp(v) if self._starts_at_output else self.jvp(v)

    def gram(self, v: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """J^T J v or J J^T v, divided by scale squared."""
        return self.jvp(self.vjp(v)) if self._starts_at_output else self.vjp(self.jvp(v))

    def representable(self, v: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """`v` rounded to the floats that the target is evaluated at."""
        return v.to(self.dtype).to(torch.float64)

    def stretch_error(self, v: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch"]:
        """Upper bound on the l2 norm of the rounding error of `stretch(v)`; 0 for a `Network`, whose arithmetic is
        taken as exact."""
        if self._roundoff is None:
            return torch.zeros_like(self.scale)
        bound = self._roundoff.vjp if self._starts_at_output else self._roundoff.jvp
        shape, out = (self._out_shape, self._in_shape) if self._starts_at_output else (self._in_shape, self._out_shape)
        error = self._flat(bound(self._item(v.abs(), shape)), out) / self.scale[..., None]
        return inflate(vector_norm(error), error.shape[-1] + 4)

    def norm_error(self) -> Float[Tensor, "*batch"]:
        """Upper bound on the spectral norm of (computed J - J) / scale, for both products; 0 for a `Network`.

        The error is at most E, entry by entry, so its norm is at most the root of the largest row sum of E times the
        largest column sum.
        """
        if self._roundoff is None:
            return torch.zeros_like(self.scale)
        ones_in = self.scale.new_ones(*self.batch_shape, *self._in_shape)
        ones_out = self.scale.new_ones(*self.batch_shape, *self._out_shape)
        rows = self._flat(self._roundoff.jvp(ones_in), self._out_shape).amax(-1) / self.scale
        columns = self._flat(self._roundoff.vjp(ones_out), self._in_shape).amax(-1) / self.scale
        return inflate(rows.sqrt() * columns.sqrt(), 4)

    def _item(self, flat: Tensor, shape: torch.Size) -> Tensor:
        return flat.to(self.dtype).reshape(*flat.shape[:-1], *shape)

    def _flat(self, image: Tensor, shape: torch.Size) -> Tensor:
        return image.reshape(*image.shape[: image.dim() - len(shape)], math.prod(shape)).to(torch.float64)


def sphere(batch: torch.Size, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Independent unit vectors, uniformly distributed on the sphere, in float64; the same on every device."""
    vectors = torch.randn(*batch, size, generator=generator, dtype=torch.float64, device=generator.device).to(device)
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)


def power_of_two(magnitude: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The power of two above `magnitude`, and 1 for zero: dividing by it commits no rounding error."""
    return torch.where(magnitude > 0, magnitude / magnitude.frexp().mantissa, 1.0)


def working_copy(target: Target) -> Target:
    """An `Attention` in float64, without gradients; other targets as they are.

    Detached first: the block caches its intermediate tensors, and caches filled under no_grad would cut the gradients
    of a later bound on the same block.
    """
    if not isinstance(target, Attention):
        return target
    return target.detached.double
