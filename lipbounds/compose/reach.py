"""What reaches a layer, and what is known of it there."""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.enclosure import Enclosure, diagonal, only_norm
from lipbounds.registry import BoundSpec
from lipbounds.rounding import inflate, product


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class LayerBound:
    """One line of the account.

    Args:
        path: of the layer in the tree, names joined by dots.
        description: of the layer.
        depth: 0 for the layers of the network itself; the parts of a residual are deeper.
        input_radius: of the ball of inputs that can reach it, one a batch item.
        token_radius: the largest radius of a token in that set.
        bound: on its own constant over that set.
        so_far: bound on everything up to it, from the input of the network; None at a depth above 0.
    """

    path: str
    description: str
    depth: int
    input_radius: Float[Tensor, "*batch"]
    token_radius: Float[Tensor, "*batch"]
    bound: Float[Tensor, "*batch"]
    so_far: Float[Tensor, "*batch"] | None = None


@dc.dataclass(eq=False)
class Rules:
    """How layers are bounded, and how often attention was."""

    attention: tuple[BoundSpec, ...]
    calls: int = 0

    def failures(self, x: Tensor) -> float:
        """Sum of the probabilities of failure of all calls made: delta holds for each batch item of each."""
        return self.calls * sum(spec.defaults.get("delta", 0.0) for spec in self.attention)


@dc.dataclass(frozen=True, eq=False)
class Reach:
    """The inputs that can reach a layer: |X - x|_F <= radius, and every token i within tokens_i of that of x.

    Args:
        x: the centre.
        radius: one a batch item.
        tokens: one a token; None for images.
    """

    x: Tensor
    radius: Float[Tensor, "*batch"]
    tokens: Float[Tensor, "*batch n"] | None = None

    @property
    def token_radii(self) -> Float[Tensor, "*batch n"]:
        assert self.tokens is not None
        return self.tokens

    def largest_token(self) -> Float[Tensor, "*batch"]:
        """The largest radius of a token."""
        return self.radius if self.tokens is None else torch.minimum(self.radius, self.tokens.amax(-1))


@dc.dataclass(frozen=True, eq=False)
class Step:
    """A layer on the inputs that reach it.

    Args:
        jacobians: of every token if `per_token`, else of the whole.
        per_token: the layer acts on every token alone.
        reach: what its outputs can reach.
        own: its norm where that is known without an eigenproblem.
    """

    jacobians: Enclosure
    per_token: bool
    reach: Reach
    own: Tensor | None = None


def total_norm(step: Step) -> Float[Tensor, "*batch"]:
    """The norm of the Jacobian of a step over its reach: of tokens, the largest.

    Args:
        step: the step.
    """
    norm = step.jacobians.norm
    shape = step.reach.radius.shape
    return norm.expand(*shape, norm.shape[-1]).amax(-1) if step.per_token else norm.expand(shape)


def per_token(jacobians: Enclosure, reach: Reach, y: Tensor, own: Tensor | None = None) -> Step:
    """A layer that acts on every token alone.

    Args:
        jacobians: of every token.
        reach: what reaches it.
        y: its output at the centre.
        own: its norm, where it is known without an eigenproblem.
    """
    norms = jacobians.norm
    tokens = inflate(product(norms, reach.token_radii), 2)
    radius = times(norms.amax(-1), reach.radius)
    return Step(jacobians, True, Reach(y, radius, tokens), own)


def mixing(norm: Tensor, reach: Reach, y: Tensor) -> Step:
    """A layer of which only the norm is known.

    Args:
        norm: of its Jacobian.
        reach: what reaches it.
        y: its output at the centre.
    """
    radius = times(norm, reach.radius)
    return Step(only_norm(norm), False, Reach(y, radius, radius.unsqueeze(-1).expand(y.shape[:-1])))


def identity(reach: Reach) -> Enclosure:
    """The Jacobian of the identity on every token.

    Args:
        reach: of the tokens.
    """
    return diagonal(torch.ones_like(reach.x.flatten(0, -2)[0]), reach.token_radii[..., :1])


def times(one: Tensor, other: Tensor) -> Tensor:
    """Product of bounds, rounded up.

    Args:
        one: a bound.
        other: a bound.
    """
    return inflate(product(one, other), 2)
