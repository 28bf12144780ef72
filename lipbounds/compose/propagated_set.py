"""What reaches a layer, and what is known of it there."""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.ops.enclosure import Enclosure, diagonal, only_norm
from lipbounds.ops.shapes import broadcast_shape
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
    """How layers are bounded, and how often attention was.

    Args:
        attention: its bounds, of which the smallest is taken.
        centre_at_point: the centres of enclosures are Jacobians at the centre of the ball; otherwise what is in the
            middle of those in the ball, which makes deviations smaller.
        calls: number of attention layers bounded.
    """

    attention: tuple[BoundSpec, ...]
    centre_at_point: bool = False
    calls: int = 0

    @property
    def reads_some_tokens(self) -> bool:
        """Whether every bound of attention holds where some of the tokens only have queries."""
        return all("some_queries" in spec.supports for spec in self.attention)

    def failures(self, x: Tensor) -> float:
        """Sum of the probabilities of failure of all calls made: delta holds for each batch item of each."""
        return self.calls * sum(spec.defaults.get("delta", 0.0) for spec in self.attention)


@dc.dataclass(frozen=True, eq=False)
class PropagatedSet:
    """The inputs that can reach a layer: |X - x|_F <= radius, and every token i within tokens_i of that of x.

    x is what the forward pass computed, and X is exact: the radii hold the rounding of the forward pass too.

    Args:
        x: the centre.
        radius: one a batch item.
        tokens: one a token; None for images.
        lost: how far x is, at most, from the exact image of the centre that the sequence started with; None: not
            followed, and x counts as exact.
    """

    x: Tensor
    radius: Float[Tensor, "*batch"]
    tokens: Float[Tensor, "*batch n"] | None = None
    lost: Float[Tensor, "*batch"] | None = None

    def grown(self, by: Float[Tensor, "*batch"]) -> PropagatedSet:
        """The set with all radii larger by what rounding moved the centre.

        Args:
            by: how far.
        """
        tokens = None if self.tokens is None else inflate(self.tokens + by.unsqueeze(-1), 2)
        return dc.replace(self, radius=inflate(self.radius + by, 2), tokens=tokens)

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
        outputs: the set that its outputs lie in.
        own: its norm where that is known without an eigenproblem.
    """

    jacobians: Enclosure
    per_token: bool
    outputs: PropagatedSet
    own: Tensor | None = None


def total_norm(step: Step) -> Float[Tensor, "*batch"]:
    """The norm of the Jacobian of a step over its inputs: of tokens, the largest.

    Args:
        step: the step.
    """
    norm = step.jacobians.norm
    shape = step.outputs.radius.shape
    return norm.expand(*shape, norm.shape[-1]).amax(-1) if step.per_token else norm.expand(shape)


def per_token(jacobians: Enclosure, inputs: PropagatedSet, y: Tensor, own: Tensor | None = None) -> Step:
    """A layer that acts on every token alone.

    Args:
        jacobians: of every token.
        inputs: that can reach it.
        y: its output at the centre.
        own: its norm, where it is known without an eigenproblem.
    """
    norms = jacobians.norm
    tokens = inflate(product(norms, inputs.token_radii), 2)
    radius = norm_over_tokens(norms, inputs.token_radii, inputs.radius)
    return Step(jacobians, True, PropagatedSet(y, radius, tokens), own)


def mixing(norm: Tensor, inputs: PropagatedSet, y: Tensor) -> Step:
    """A layer of which only the norm is known.

    Args:
        norm: of its Jacobian.
        inputs: that can reach it.
        y: its output at the centre.
    """
    radius = times(norm, inputs.radius)
    return Step(only_norm(norm), False, PropagatedSet(y, radius, radius.unsqueeze(-1).expand(y.shape[:-1])))


def identity(inputs: PropagatedSet) -> Enclosure:
    """The Jacobian of the identity on every token.

    Args:
        inputs: the tokens.
    """
    return diagonal(torch.ones_like(inputs.x.flatten(0, -2)[0]), inputs.token_radii[..., :1])


def norm_over_tokens(
    factors: Float[Tensor, "*batch one"], tokens: Float[Tensor, "*batch n"], whole: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Bound on (sum_i f_i^2 t_i^2)^1/2 for all t with t_i <= tokens_i and |t| <= whole, rounded up.

    For every k, with tokens in the order of falling f, its square is at most sum_{i <= k} (f_i tokens_i)^2 + (f_{k+1}
    whole)^2: the smallest is taken. Tokens that hardly move may have large factors for nothing.

    Args:
        factors: f, one a token or one for all.
        tokens: the largest t_i.
        whole: the largest |t|.
    """
    factors = factors.expand(broadcast_shape((factors.shape, tokens.shape)))
    order = factors.argsort(-1, descending=True)
    ordered = factors.gather(-1, order)
    own = product(ordered, tokens.expand(factors.shape).gather(-1, order))
    heads = torch.cat([torch.zeros_like(own[..., :1]), own.square().cumsum(-1)], -1)
    tails = torch.cat([product(ordered, whole.unsqueeze(-1)), torch.zeros_like(own[..., :1])], -1)
    return inflate((heads + tails.square()).sqrt().amin(-1), factors.shape[-1] + 8)


def times(one: Tensor, other: Tensor) -> Tensor:
    """Product of bounds, rounded up.

    Args:
        one: a bound.
        other: a bound.
    """
    return inflate(product(one, other), 2)
