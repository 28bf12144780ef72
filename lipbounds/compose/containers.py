"""Sequences and residuals."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from torch import Tensor

from lipbounds.compose.primitives import leaf_step
from lipbounds.compose.propagated_set import (
    LayerBound,
    PropagatedSet,
    Rules,
    Step,
    identity,
    mixing,
    per_token,
    times,
    total_norm,
)
from lipbounds.compose.reading import ReadResidual, bounded_layers
from lipbounds.compose.rewrite import FoldedLinear
from lipbounds.compose.running_error import lost_by
from lipbounds.errors import InvalidInput
from lipbounds.ops.enclosure import Enclosure, matrix, only_norm, plus, then
from lipbounds.ops.spectral import vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, inflate, product
from lipbounds.targets.layers import Layer, Linear, Pool, Residual, Sequence


def sequence_step(
    layers: list[tuple[str, Layer]], inputs: PropagatedSet, rules: Rules, log: list[LayerBound], depth: int = 0
) -> Step:
    """Layers one after the other.

    Args:
        layers: with their paths.
        inputs: that can reach the first.
        rules: how layers are bounded.
        log: where the account goes.
        depth: of the layers in the tree.
    """
    start = here = inputs if inputs.lost is None else dc.replace(inputs, lost=torch.zeros_like(inputs.radius))
    closed: Tensor | None = None  # bound of everything up to the last layer that mixes tokens
    run: Enclosure | None = None  # the layers after it, token by token
    run_start = start
    for path, layer in bounded_layers(layers, inputs.x, rules):
        before = here
        if isinstance(layer, Pool):
            closed, run, run_start, here = _pooled(layer, closed, run, run_start, here)
            norm = torch.ones_like(start.radius)
            own = torch.full_like(start.radius, 1.0 if layer.how != "mean" else before.x.shape[-2] ** -0.5)
        else:
            if isinstance(layer, Residual):
                step = _residual_step(path, layer, here, rules, log, depth)
            else:
                step = leaf_step(layer, here, rules)
            norm = total_norm(step)
            own = norm if step.own is None else step.own
            here = step.outputs
            if step.per_token:
                run = step.jacobians if run is None else then(run, step.jacobians)
            else:
                closed = times(_joint(closed, run, start.radius), norm)
                run, run_start = None, here
        joint = _joint(closed, run, start.radius)
        here = _rounded(layer, before, here, norm)
        here = _tightened(here, inflate(product(joint, start.radius), 2), run, run_start)
        log.append(
            LayerBound(
                path=path,
                description=layer.description,
                depth=depth,
                input_radius=before.radius,
                token_radius=before.largest_token(),
                bound=own.expand(start.radius.shape),
                so_far=joint if depth == 0 else None,
            )
        )
    if closed is not None or here.tokens is None or start.tokens is None:
        return Step(only_norm(_joint(closed, run, start.radius)), False, here)
    return Step(run if run is not None else identity(here), True, here)


def _joint(closed: Tensor | None, run: Enclosure | None, like: Tensor) -> Tensor:
    total = torch.ones_like(like) if closed is None else closed
    if run is None:
        return total
    return times(total, run.norm.amax(-1))


def _rounded(layer: Layer, before: PropagatedSet, here: PropagatedSet, norm: Tensor) -> PropagatedSet:
    """The set behind a layer with what the rounding of its forward pass adds.

    Args:
        layer: the layer.
        before: in front of it.
        here: behind it; of a residual, with the rounding inside its body in `lost`.
        norm: of its Jacobian.
    """
    if before.lost is None:
        return here
    dimensions = 3 if before.tokens is None else 2
    own = lost_by(layer, before.x, here.x, dimensions) if here.lost is None else here.lost
    return dc.replace(here.grown(own), lost=inflate(product(norm, before.lost) + own, 4))


def _tightened(here: PropagatedSet, radius: Tensor, run: Enclosure | None, run_start: PropagatedSet) -> PropagatedSet:
    """The smaller of what was found layer by layer and for the sequence so far; never more than both allow."""
    lost = torch.zeros_like(radius) if here.lost is None else here.lost
    radius = torch.minimum(here.radius, inflate(radius + lost, 2))
    tokens = here.tokens
    if tokens is not None:
        if run is not None and run_start.tokens is not None:
            behind = inflate(product(run.norm, run_start.tokens) + lost.unsqueeze(-1), 4)
            tokens = torch.minimum(tokens, behind)
        tokens = torch.minimum(tokens, radius.unsqueeze(-1))
        radius = torch.minimum(radius, inflate(vector_norm(tokens), tokens.shape[-1] + 4))
    return dc.replace(here, radius=radius, tokens=tokens)


def _pooled(
    pool: Pool, closed: Tensor | None, run: Enclosure | None, run_start: PropagatedSet, here: PropagatedSet
) -> tuple[Tensor | None, Enclosure | None, PropagatedSet, PropagatedSet]:
    """A sequence after one token of many is taken."""
    y, tokens = pool(here.x), here.token_radii
    count = tokens.shape[-1]
    if pool.how != "mean":
        run = None if run is None else run.item(0 if pool.how == "first" else count - 1)
        # The map to one token is no map of tokens one by one any more: with closed set, its norm stands for the whole.
        closed = torch.ones_like(here.radius) if closed is None else closed
        return (
            closed,
            run,
            _one_token(pool, run_start if run is not None else here),
            _one_token(pool, here),
        )
    norms = torch.ones_like(tokens) if run is None else run.norm.expand(tokens.shape)
    share = inflate(vector_norm(norms) / count, count + 8)
    closed = share if closed is None else times(closed, share)
    radius = torch.minimum(inflate(here.radius / math.sqrt(count), 4), inflate(tokens.mean(-1), count + 4))
    moved = PropagatedSet(y, radius, radius.unsqueeze(-1))
    return closed, None, moved, moved


def _one_token(pool: Pool, inputs: PropagatedSet) -> PropagatedSet:
    """The set in which the first or the last token lies."""
    radii = inputs.token_radii[..., :1] if pool.how == "first" else inputs.token_radii[..., -1:]
    return PropagatedSet(pool(inputs.x), torch.minimum(inputs.radius, radii.squeeze(-1)), radii)


def _residual_step(
    path: str, layer: Residual, inputs: PropagatedSet, rules: Rules, log: list[LayerBound], depth: int
) -> Step:
    inner = path if isinstance(layer.body, Sequence) else f"{path}.body" if path else "body"
    body = sequence_step([(inner, layer.body)], inputs, rules, log, depth + 1)
    whole_input, inputs = inputs, _one_token(layer.read, inputs) if isinstance(layer, ReadResidual) else inputs
    y = inputs.x if layer.skip is None else layer.skip(inputs.x)
    if body.outputs.x.shape != y.shape:
        raise InvalidInput(
            f"the body of a residual must keep the shape of its input, got {tuple(y.shape)} and "
            f"{tuple(body.outputs.x.shape)} at {path or 'the network'}."
        )
    through, y = y, y + body.outputs.x
    skip = identity(inputs) if layer.skip is None else _skip(layer.skip, inputs)
    if body.per_token:
        step = per_token(plus(skip, body.jacobians), inputs, y)
    else:
        norm = inflate(skip.norm.amax(-1) + total_norm(body), 2)
        step = mixing(norm, whole_input, y)
    apart = inflate(product(skip.norm, inputs.token_radii) + body.outputs.token_radii, 4)
    tokens = torch.minimum(step.outputs.token_radii, apart)
    whole = inflate(product(skip.norm.amax(-1), inputs.radius) + body.outputs.radius, 4)
    after = PropagatedSet(y, torch.minimum(step.outputs.radius, whole), tokens, lost=None)
    if body.outputs.lost is not None:
        lost = (
            body.outputs.lost if layer.skip is None else body.outputs.lost + lost_by(layer.skip, inputs.x, through, 2)
        )
        sizes = (through.abs() + body.outputs.x.abs()).flatten(-2).norm(dim=-1)
        after = dc.replace(after, lost=inflate(lost + 2 * UNIT_ROUNDOFF * sizes, 16))
    return Step(step.jacobians, step.per_token, after)


def _skip(layer: Linear, inputs: PropagatedSet) -> Enclosure:
    """The matrix of a skip connection; with what it lost if it was folded."""
    skip = matrix(layer.weight, inputs.token_radii)
    if not isinstance(layer, FoldedLinear):
        return skip
    assert skip.deviation is not None
    lost = inflate(layer.lost.square().sum().sqrt(), layer.lost.numel() + 8)
    return dc.replace(skip, deviation=skip.deviation + lost)
