"""The bound of a whole network by the product of the bounds of its parts."""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds import registry
from lipbounds.claims import BoundResult, Claim, Kind, check_result
from lipbounds.compose.containers import sequence_step
from lipbounds.compose.propagated_set import LayerBound, PropagatedSet, Rules, total_norm
from lipbounds.compose.rewrite import flat
from lipbounds.errors import InvalidInput
from lipbounds.registry import BoundSpec
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from lipbounds.targets.given import given_tensor
from lipbounds.targets.layers import Layer, Patches


AT_POINT, ON_BALL = "sharp_fast", "yudin2025_ball.biased"


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class NetworkBound:
    """The bound of a network, with the account of where it comes from.

    Args:
        result: value, kind and scope.
        layers: in the order in which they act; the parts of a residual come before it.
        output: of the network at its input, as computed layer by layer in float64.
        lost: on a ball, how far `output` is from its exact value, at most; None at a point, where the inputs of the
            layers, as computed, count as exact.
    """

    result: BoundResult
    layers: tuple[LayerBound, ...]
    output: Float[Tensor, "*batch n dim"]
    lost: Float[Tensor, "*batch"] | None

    @property
    def value(self) -> Float[Tensor, "*batch"]:
        return self.result.value


def network_bound(
    network: Layer,
    x: Float[Tensor, "..."] | Any,
    radius: float = 0.0,
    *,
    attention: str | tuple[str, ...] | None = None,
) -> NetworkBound:
    """Upper bound on the Lipschitz constant of a network at its input, or on a Frobenius ball around it.

    Promise: with radius 0 at least the norm of the Jacobian at `x`, with a radius at least that at every point of the
    ball, hence at least the Lipschitz constant there; for each batch item. Proved if the attention bounds are; with a
    probable one the probabilities of failure of all calls add up. Differentiable only where the parts are.

    Args:
        network: the network; `Patches` as the first layer take images, everything else takes tokens.
        x: inputs, `[*batch, n, D]` or `[*batch, channels, height, width]`; a tensor, a NumPy array, or a list.
        radius: of the ball, in the Frobenius norm of one input.
        attention: names of registered bounds, the smallest of which is taken for every attention layer; by default
            `sharp_fast` at a point and `yudin2025_ball.biased` on a ball.

    Raises:
        InvalidInput: the radius is negative or not finite; the shape of `x` does not fit; a bound is not an upper one
            in l2 of the right scope.
    """
    if not 0 <= radius < math.inf:
        raise InvalidInput(f"radius must be finite and >= 0, got radius={radius}.")
    specs, x = attention_specs(attention, on_ball=radius > 0), given_tensor("x", x)
    network, wide = network.to(torch.float64), x.detach().to(torch.float64)
    start = starting_set(network, wide, radius)
    rules = Rules(specs)
    log: list[LayerBound] = []
    step = sequence_step([("", network)], start, rules, log)
    value = cast_up(total_norm(step), x.dtype if x.dtype.is_floating_point else torch.float64)
    check_result("network_bound", value, start.radius.shape)
    kinds: set[Kind] = {spec.claim.kind for spec in specs if rules.calls}
    delta = rules.failures(wide) if "probable" in kinds else None
    claim = Claim(kind="probable" if "probable" in kinds else "proved", scope="ball" if radius else "point")
    result = BoundResult(name="network_bound", value=value, claim=claim, radius=radius if radius else None, delta=delta)
    return NetworkBound(result=result, layers=tuple(log), output=step.outputs.x, lost=step.outputs.lost)


def attention_specs(names: str | tuple[str, ...] | None, *, on_ball: bool) -> tuple[BoundSpec, ...]:
    """The registered bounds of those names, checked for what is asked of them.

    Args:
        names: one or several; None: the default.
        on_ball: whether they must hold on a ball.

    Raises:
        InvalidInput: a bound is refuted, not an upper one, not in l2, or of another scope.
    """
    names = (ON_BALL if on_ball else AT_POINT) if names is None else names
    specs = tuple(registry.get(name) for name in ((names,) if isinstance(names, str) else names))
    scopes = ("ball", "global") if on_ball else ("point", "ball", "global")
    for spec in specs:
        claim = spec.claim
        good = spec.status == "standing" and claim.kind in ("proved", "probable") and spec.target is Attention
        if not (good and claim.norm == "l2" and claim.scope in scopes):
            raise InvalidInput(
                f"attention must name standing upper bounds of attention in l2 with a scope among {scopes}, got "
                f"{spec.name} ({claim.kind}, {claim.scope}, {claim.norm}, {spec.status})."
            )
    if not specs:
        raise InvalidInput("attention must name at least one bound, got none.")
    return specs


def starting_set(network: Layer, x: Tensor, radius: float) -> PropagatedSet:
    """The ball around the input.

    Args:
        network: the network, for the number of dimensions of one input.
        x: the input, in float64.
        radius: of the ball.

    Raises:
        InvalidInput: the input is no finite one of images or tokens, or the network does not run on it.
    """
    images = isinstance(flat([("", network)])[0][1], Patches)
    dimensions = 3 if images else 2
    if x.dim() < dimensions or x.numel() == 0 or not bool(x.isfinite().all()):
        kind = "images [*batch, channels, height, width]" if images else "tokens [*batch, n, D]"
        raise InvalidInput(f"x must hold finite {kind} and not be empty, got shape {tuple(x.shape)}.")
    output_at(network, x)
    radii = x.new_full(x.shape[: x.dim() - dimensions], radius)
    tokens = None if images else radii.unsqueeze(-1).expand(x.shape[:-1]).clone()
    return PropagatedSet(x, radii, tokens, lost=None if radius == 0 else torch.zeros_like(radii))


@torch.no_grad()
def output_at(network: Layer, x: Tensor) -> Tensor:
    """What the network returns, with what it raises told as what is wrong with its input.

    Args:
        network: the network.
        x: its input, in float64.

    Raises:
        InvalidInput: the network does not run on it.
    """
    try:
        return network(x)
    except InvalidInput:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InvalidInput(
            f"network must run on x, float64 of shape {tuple(x.shape)}, got {type(error).__name__}: {reason}; pass "
            "inputs of the shape that it was made for, with their batch dimensions in front."
        ) from error
