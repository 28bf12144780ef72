r"""Bounds of whole networks from bounds of their layers, at a point and on a ball, and where the product grows.

The constant of a sequence is at most the product of the constants of its parts, each over the inputs that can reach it;
that of skip + body is at most the sum. The inputs that can reach a part lie in a ball around its own input at x, with a
Frobenius radius that has grown by the bound of everything before it, and each token within a radius of its own.

What is better than products and sums of norms:

- Layers that act on tokens one by one have block diagonal Jacobians. Runs of them (normalisation, feed-forward with its
  residual, normalisation) are kept as matrices a token with a deviation (`lipbounds.ops.enclosure`): at a point the
  norm is that of the exact product, on a ball the deviation is added. The norm of the run is the largest of a token.
- W2 diag(f') W1: with slopes in m +- w over the ball (`lipbounds.ops.activations`), the centre is W2 diag(m) W1 and the
  deviation ||W2 diag(w)^1/2|| ||diag(w)^1/2 W1||, for diag(w) = diag(w)^1/2 S diag(w)^1/2 with |S| <= 1.
- A normalisation before attention is split into z and the scale and shift, which go into the weights of the attention
  with the centring: z has mean 0, so I - 1 1^T / D may stand before every weight. The attention bound then sees
  the norms of C diag(gamma) W, and not max|gamma| times those of W.
- The output of a normalisation lies on a sphere of radius sqrt(D): no token moves further than 2 sqrt(D).
- The mean of n tokens whose Jacobians have norms L_i has (sum_i L_i^2)^1/2 / n.

Windows of an image: |unfold(x)|^2 counts every pixel as often as it is in a window, at most c = ceil(size / stride)
times along each axis, so the norm is at most sqrt(c), and 1 where windows do not overlap. Then a convolution followed
by nothing else has the exact norm of its matrix.

Numerics: float64, every bound of a layer rounded up. The forward pass that gives the input of each layer, and the
weights folded into others, are computed in float64 and taken as exact, as `lipbounds.targets.network.Network` takes the
arithmetic of its function.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds import registry
from lipbounds.claims import BoundResult, Claim, Kind, check_result
from lipbounds.errors import InvalidInput
from lipbounds.ops.activations import slope_interval
from lipbounds.ops.enclosure import Enclosure, diagonal, matrix, only_norm, plus, then
from lipbounds.ops.normalization import normalization_jacobian, normalization_range
from lipbounds.ops.spectral import spectral_norm_upper, vector_norm
from lipbounds.registry import BoundSpec
from lipbounds.rounding import UNIT_ROUNDOFF, cast_up, gamma, inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import (
    AttentionLayer,
    Layer,
    Linear,
    Normalization,
    Patches,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
)


AT_POINT, ON_BALL = "covariance.exact", "yudin2025_ball.biased"
MATRIX_ENTRIES = 2**24  # of all matrices a token of one layer; beyond it norms alone are kept
HIDDEN_ENTRIES = 2**26  # of the scaled weights a token of one feed-forward layer; beyond it tokens share one matrix


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


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class NetworkBound:
    """The bound of a network, with the account of where it comes from.

    Args:
        result: value, kind and scope.
        layers: in the order in which they act; the parts of a residual come before it.
    """

    result: BoundResult
    layers: tuple[LayerBound, ...]

    @property
    def value(self) -> Float[Tensor, "*batch"]:
        return self.result.value


def network_bound(
    network: Layer, x: Float[Tensor, "..."], radius: float = 0.0, *, attention: str | tuple[str, ...] | None = None
) -> NetworkBound:
    """Upper bound on the Lipschitz constant of a network at its input, or on a Frobenius ball around it.

    Promise: with radius 0 at least the norm of the Jacobian at `x`, with a radius at least that at every point of the
    ball, hence at least the Lipschitz constant there; for each batch item. Proved if the attention bounds are; with a
    probable one the probabilities of failure of all calls add up. Differentiable only where the parts are.

    Args:
        network: the network; `Patches` as the first layer take images, everything else takes tokens.
        x: inputs, `[*batch, n, D]` or `[*batch, channels, height, width]`.
        radius: of the ball, in the Frobenius norm of one input.
        attention: names of registered bounds, the smallest of which is taken for every attention layer; by default
            `covariance.exact` at a point and `yudin2025_ball.biased` on a ball.

    Raises:
        InvalidInput: the radius is negative or not finite; the shape of `x` does not fit; a bound is not an upper one
            in l2 of the right scope.
    """
    if not 0 <= radius < math.inf:
        raise InvalidInput(f"radius must be finite and >= 0, got radius={radius}.")
    specs = attention_specs(attention, on_ball=radius > 0)
    network, wide = network.to(torch.float64), x.detach().to(torch.float64)
    start = starting_reach(network, wide, radius)
    rules = Rules(specs)
    log: list[LayerBound] = []
    step = sequence_step([("", network)], start, rules, log)
    value = cast_up(total_norm(step), x.dtype if x.dtype.is_floating_point else torch.float64)
    check_result("network_bound", value, start.radius.shape)
    kinds: set[Kind] = {spec.claim.kind for spec in specs if rules.calls}
    delta = rules.failures(wide) if "probable" in kinds else None
    claim = Claim(kind="probable" if "probable" in kinds else "proved", scope="ball" if radius else "point")
    result = BoundResult(name="network_bound", value=value, claim=claim, radius=radius if radius else None, delta=delta)
    return NetworkBound(result=result, layers=tuple(log))


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


def starting_reach(network: Layer, x: Tensor, radius: float) -> Reach:
    """The ball around the input.

    Args:
        network: the network, for the number of dimensions of one input.
        x: the input, in float64.
        radius: of the ball.
    """
    images = isinstance(_flat([("", network)])[0][1], Patches)
    dimensions = 3 if images else 2
    if x.dim() < dimensions or x.numel() == 0 or not bool(x.isfinite().all()):
        kind = "images [*batch, channels, height, width]" if images else "tokens [*batch, n, D]"
        raise InvalidInput(f"x must hold finite {kind} and not be empty, got shape {tuple(x.shape)}.")
    radii = x.new_full(x.shape[: x.dim() - dimensions], radius)
    tokens = None if images else radii.unsqueeze(-1).expand(x.shape[:-1]).clone()
    return Reach(x, radii, tokens)


def total_norm(step: Step) -> Float[Tensor, "*batch"]:
    """The norm of the Jacobian of a step over its reach: of tokens, the largest.

    Args:
        step: the step.
    """
    norm = step.jacobians.norm
    shape = step.reach.radius.shape
    return norm.expand(*shape, norm.shape[-1]).amax(-1) if step.per_token else norm.expand(shape)


# -- sequences and residuals ------------------------------------------------------------------------------------------


def sequence_step(
    layers: list[tuple[str, Layer]], reach: Reach, rules: Rules, log: list[LayerBound], depth: int = 0
) -> Step:
    """Layers one after the other.

    Args:
        layers: with their paths.
        reach: what reaches the first.
        rules: how layers are bounded.
        log: where the account goes.
        depth: of the layers in the tree.
    """
    start, here = reach, reach
    closed: Tensor | None = None  # bound of everything up to the last layer that mixes tokens
    run: Enclosure | None = None  # the layers after it, token by token
    run_start = reach
    for path, layer in rewritten(_flat(layers)):
        before = here
        if isinstance(layer, Pool):
            closed, run, run_start, here = _pooled(layer, closed, run, run_start, here)
            own = torch.full_like(start.radius, 1.0 if layer.how != "mean" else before.x.shape[-2] ** -0.5)
        else:
            step = _step(path, layer, here, rules, log, depth)
            own = total_norm(step) if step.own is None else step.own
            here = step.reach
            if step.per_token:
                run = step.jacobians if run is None else then(run, step.jacobians)
            else:
                closed = _times(_joint(closed, run, start.radius), total_norm(step))
                run, run_start = None, here
        joint = _joint(closed, run, start.radius)
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
    return Step(run if run is not None else _identity(here), True, here)


def _joint(closed: Tensor | None, run: Enclosure | None, like: Tensor) -> Tensor:
    total = torch.ones_like(like) if closed is None else closed
    if run is None:
        return total
    return _times(total, run.norm.amax(-1))


def _times(one: Tensor, other: Tensor) -> Tensor:
    return inflate(product(one, other), 2)


def _tightened(here: Reach, radius: Tensor, run: Enclosure | None, run_start: Reach) -> Reach:
    """The smaller of what was found layer by layer and for the sequence so far; never more than both allow."""
    radius = torch.minimum(here.radius, radius)
    tokens = here.tokens
    if tokens is not None:
        if run is not None and run_start.tokens is not None:
            tokens = torch.minimum(tokens, inflate(product(run.norm, run_start.tokens), 2))
        tokens = torch.minimum(tokens, radius.unsqueeze(-1))
        radius = torch.minimum(radius, inflate(vector_norm(tokens), tokens.shape[-1] + 4))
    return Reach(here.x, radius, tokens)


def _pooled(
    pool: Pool, closed: Tensor | None, run: Enclosure | None, run_start: Reach, here: Reach
) -> tuple[Tensor | None, Enclosure | None, Reach, Reach]:
    """A sequence after one token of many is taken."""
    y, tokens = pool(here.x), here.token_radii
    count = tokens.shape[-1]
    if pool.how != "mean":
        index = 0 if pool.how == "first" else count - 1
        run = None if run is None else run.item(index)

        def chosen(reach: Reach, x: Tensor) -> Reach:
            radii = reach.token_radii[..., index : index + 1]
            return Reach(x, torch.minimum(reach.radius, radii.squeeze(-1)), radii)

        # The map to one token is no map of tokens one by one any more: with closed set, its norm stands for the whole.
        closed = torch.ones_like(here.radius) if closed is None else closed
        return (
            closed,
            run,
            chosen(run_start, pool(run_start.x)) if run is not None else chosen(here, y),
            chosen(here, y),
        )
    norms = torch.ones_like(tokens) if run is None else run.norm.expand(tokens.shape)
    share = inflate(vector_norm(norms) / count, count + 8)
    closed = share if closed is None else _times(closed, share)
    radius = torch.minimum(inflate(here.radius / math.sqrt(count), 4), inflate(tokens.mean(-1), count + 4))
    moved = Reach(y, radius, radius.unsqueeze(-1))
    return closed, None, moved, moved


def _residual_step(path: str, layer: Residual, reach: Reach, rules: Rules, log: list[LayerBound], depth: int) -> Step:
    inner = path if isinstance(layer.body, Sequence) else f"{path}.body" if path else "body"
    body = sequence_step([(inner, layer.body)], reach, rules, log, depth + 1)
    y = reach.x if layer.skip is None else layer.skip(reach.x)
    if body.reach.x.shape != y.shape:
        raise InvalidInput(
            f"the body of a residual must keep the shape of its input, got {tuple(y.shape)} and "
            f"{tuple(body.reach.x.shape)} at {path or 'the network'}."
        )
    y = y + body.reach.x
    skip = _identity(reach) if layer.skip is None else matrix(layer.skip.weight, reach.token_radii)
    if body.per_token:
        step = _per_token(plus(skip, body.jacobians), reach, y)
    else:
        norm = inflate(skip.norm.amax(-1) + total_norm(body), 2)
        step = _mixing(norm, reach, y)
    apart = inflate(product(skip.norm, reach.token_radii) + body.reach.token_radii, 4)
    tokens = torch.minimum(step.reach.token_radii, apart)
    whole = inflate(product(skip.norm.amax(-1), reach.radius) + body.reach.radius, 4)
    return Step(step.jacobians, step.per_token, Reach(y, torch.minimum(step.reach.radius, whole), tokens))


# -- layers -----------------------------------------------------------------------------------------------------------


def _step(path: str, layer: Layer, reach: Reach, rules: Rules, log: list[LayerBound], depth: int) -> Step:
    if isinstance(layer, Residual):
        return _residual_step(path, layer, reach, rules, log, depth)
    y = layer(reach.x)
    if isinstance(layer, Patches):
        norm = torch.full_like(reach.radius, math.sqrt(layer.copies) * (1 + 4 * UNIT_ROUNDOFF))
        step = _mixing(norm, reach, y)
        # No window holds a pixel twice.
        return Step(step.jacobians, False, Reach(y, step.reach.radius, reach.radius.unsqueeze(-1).expand(y.shape[:-1])))
    if isinstance(layer, Positions):
        return _positions_step(layer, reach, y)
    if isinstance(layer, AttentionLayer):
        return _mixing(_attention_norm(layer.block, reach, rules), reach, y)
    if isinstance(layer, Linear):
        return _per_token(matrix(layer.weight, reach.token_radii[..., :1]), reach, y)
    if isinstance(layer, Pointwise):
        return _per_token(_pointwise(layer, reach), reach, y)
    if isinstance(layer, Normalization):
        return _normalization_step(layer, reach, y)
    if isinstance(layer, FeedForward):
        return _per_token(_feed_forward(layer, reach), reach, y)
    raise InvalidInput(f"network must be built of the layers of lipbounds.targets.layers, got {type(layer).__name__}.")


def _per_token(jacobians: Enclosure, reach: Reach, y: Tensor, own: Tensor | None = None) -> Step:
    norms = jacobians.norm
    tokens = inflate(product(norms, reach.token_radii), 2)
    radius = _times(norms.amax(-1), reach.radius)
    return Step(jacobians, True, Reach(y, radius, tokens), own)


def _mixing(norm: Tensor, reach: Reach, y: Tensor) -> Step:
    radius = _times(norm, reach.radius)
    return Step(only_norm(norm), False, Reach(y, radius, radius.unsqueeze(-1).expand(y.shape[:-1])))


def _identity(reach: Reach) -> Enclosure:
    return diagonal(torch.ones_like(reach.x.flatten(0, -2)[0]), reach.token_radii[..., :1])


def _positions_step(layer: Positions, reach: Reach, y: Tensor) -> Step:
    tokens = reach.token_radii
    if layer.first is None:
        return Step(_identity(reach), True, Reach(y, reach.radius, tokens))
    still = tokens.new_zeros(*tokens.shape[:-1], len(layer.first))
    return Step(only_norm(torch.ones_like(reach.radius)), False, Reach(y, reach.radius, torch.cat([still, tokens], -1)))


def _normalization_step(layer: Normalization, reach: Reach, y: Tensor) -> Step:
    radii, dim = reach.token_radii, reach.x.shape[-1]
    known = normalization_range(reach.x, radii, layer.epsilon, centred=layer.centred)
    if radii.numel() * dim**2 > MATRIX_ENTRIES:
        jacobians = only_norm(known.norm)
    else:
        centre = normalization_jacobian(reach.x, layer.epsilon, centred=layer.centred)
        jacobians = Enclosure(limit=known.norm, centre=centre, deviation=known.deviation, tight=True)
    largest = torch.ones_like(radii[..., :1])
    if layer.weight is not None:
        largest = largest * layer.weight.abs().amax()
        jacobians = then(jacobians, diagonal(layer.weight, radii[..., :1]))
    own = inflate(product(known.norm, largest), 2)
    jacobians = dc.replace(jacobians, limit=torch.minimum(jacobians.limit, own))
    step = _per_token(jacobians, reach, y, own.amax(-1))
    sphere = inflate(2 * math.sqrt(dim) * largest, 4)
    return dc.replace(step, reach=Reach(y, step.reach.radius, torch.minimum(step.reach.token_radii, sphere)))


def _middle(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Midpoint and half width of the intervals, the latter rounded up so that both ends are within."""
    return (low + high) / 2, ((high - low) / 2 + 2 * UNIT_ROUNDOFF * (low.abs() + high.abs())) * (1 + 4 * UNIT_ROUNDOFF)


def _pointwise(layer: Pointwise, reach: Reach) -> Enclosure:
    radii = reach.token_radii.unsqueeze(-1)
    low, high = slope_interval(layer.activation, reach.x - radii, reach.x + radii)
    limit = torch.maximum(low.abs(), high.abs()).amax(-1)
    if reach.x.numel() * reach.x.shape[-1] > MATRIX_ENTRIES:
        return only_norm(limit)
    middle, half = _middle(low, high)
    return Enclosure(limit=limit, centre=torch.diag_embed(middle), deviation=half.amax(-1))


@dc.dataclass(frozen=True, eq=False, repr=False)
class FeedForward(Layer):
    """linear, activation, linear: what a sequence is rewritten to where the three follow each other."""

    first: Linear
    activation: Pointwise
    second: Linear

    def function(self):
        return lambda x: self.second(self.activation(self.first(x)))

    @property
    def description(self) -> str:
        sizes = self.first.weight.shape
        return f"feed-forward {sizes[1]}, {sizes[0]}, {self.second.weight.shape[0]}, {self.activation.activation}"


def _feed_forward(layer: FeedForward, reach: Reach) -> Enclosure:
    first, second = layer.first.weight, layer.second.weight
    size = first.shape[1]
    rows = inflate(vector_norm(first), size + 4)
    bias = 0.0 if layer.first.bias is None else layer.first.bias.abs()
    lengths = inflate(vector_norm(reach.x), size + 4).unsqueeze(-1)
    error = 2 * gamma(size + 4) * (rows * lengths + bias)
    moved = inflate(product(rows, reach.token_radii.unsqueeze(-1)) + error, 4)
    hidden = layer.first(reach.x)
    low, high = slope_interval(layer.activation.activation, hidden - moved, hidden + moved)
    if reach.token_radii.numel() * max(first.numel(), second.numel()) > HIDDEN_ENTRIES:
        low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    middle, half = _middle(low, high)
    centre = (second * middle.unsqueeze(-2)) @ first
    sizes = inflate(first.norm() * second.norm(), first.numel() + second.numel() + 8)
    rounding = 2 * gamma(first.shape[0] + 8) * sizes * torch.maximum(low.abs(), high.abs()).amax(-1)
    if bool((half.amax(-1) * sizes <= 1e-11 * sizes).all()):
        return Enclosure(
            limit=torch.full_like(rounding, torch.inf), centre=centre, deviation=half.amax(-1) * sizes + rounding
        )
    deviation = inflate(_split_norm(first, half, second) + rounding, 4)
    limit = _split_norm(first, torch.maximum(low.abs(), high.abs()), second)
    return Enclosure(limit=limit, centre=centre, deviation=deviation)


def _split_norm(first: Tensor, slopes: Tensor, second: Tensor) -> Tensor:
    """||W2 diag(d)^1/2|| ||diag(d)^1/2 W1||, rounded up: at least ||W2 diag(s) W1|| for all |s| <= d."""
    root = inflate(slopes.sqrt(), 4)
    return inflate(
        spectral_norm_upper(second * root.unsqueeze(-2)) * spectral_norm_upper(root.unsqueeze(-1) * first), 8
    )


def _attention_norm(block: Attention, reach: Reach, rules: Rules) -> Float[Tensor, "*batch"]:
    """The smallest of the chosen bounds; on balls one call for each batch item, whose radii differ."""
    block = block.at(reach.x)
    rules.calls += 1
    values = []
    for spec in rules.attention:
        if not spec.needs_radius:
            values.append(spec(block).value.expand(reach.radius.shape))
            continue
        each = [
            spec(item, radius=radius).value if radius < math.inf else reach.radius.new_tensor(math.inf)
            for item, radius in zip(_items(block), reach.radius.flatten().tolist(), strict=True)
        ]
        values.append(torch.stack(each).view(reach.radius.shape))
    return torch.stack(values).amin(0)


def _items(block: Attention) -> list[Attention]:
    """The batch items of a block, each without batch dimensions."""
    trailing = {"x": 2, "w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2, "b_o": 1}
    trailing |= {"query_rotation": 3, "key_rotation": 3, "logit_bias": 3}
    batch = block.x.shape[:-2]
    named = {name: getattr(block, name) for name in trailing if getattr(block, name) is not None}
    flat = {}
    for name, tensor in named.items():
        own = tensor.shape[max(tensor.dim() - trailing[name], 0) :]
        lead = tensor.shape[: max(tensor.dim() - trailing[name], 0)]
        flat[name] = tensor.expand(*batch, *own).reshape(-1, *own) if math.prod(lead) != 1 or name == "x" else tensor
    count = math.prod(batch)
    return [
        block.replace(
            **{
                n: t[i] if t is not named[n] or n == "x" else t.reshape(t.shape[max(t.dim() - trailing[n], 0) :])
                for n, t in flat.items()
            }
        )
        for i in range(count)
    ]


# -- rewriting --------------------------------------------------------------------------------------------------------


def _flat(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """Sequences inside sequences laid out in one line."""
    out: list[tuple[str, Layer]] = []
    for path, layer in layers:
        if isinstance(layer, Sequence):
            inner = [(f"{path}.{name}" if path else name, child) for name, child in layer.named()]
            out += _flat(inner)
        else:
            out.append((path, layer))
    return out


def rewritten(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """The same function with normalisations folded into attention, and feed-forward layers put together.

    Args:
        layers: with their paths, flat.
    """
    out: list[tuple[str, Layer]] = []
    index = 0
    while index < len(layers):
        (path, layer), rest = layers[index], [following for _, following in layers[index + 1 : index + 3]]
        if (
            isinstance(layer, Linear)
            and len(rest) == 2
            and isinstance(rest[0], Pointwise)
            and isinstance(rest[1], Linear)
        ):
            out.append((path, FeedForward(layer, rest[0], rest[1])))
            index += 3
        elif isinstance(layer, Normalization) and rest and _attends(rest[0]):
            plain = Normalization(layer.centred, layer.epsilon)
            out += [(path, plain), (layers[index + 1][0], _folded(layer, rest[0]))]
            index += 2
        else:
            out.append((path, layer))
            index += 1
    return out


def _attends(layer: Layer) -> bool:
    return isinstance(layer, AttentionLayer) or (
        isinstance(layer, Residual) and layer.skip is None and isinstance(layer.body, AttentionLayer)
    )


def _folded(norm: Normalization, layer: Layer) -> Layer:
    """Attention (with its residual) after a normalisation, as a function of the normalised tokens z."""
    if isinstance(layer, AttentionLayer):
        return AttentionLayer(_folded_block(norm, layer.block))
    assert isinstance(layer, Residual)
    assert isinstance(layer.body, AttentionLayer)
    dim = layer.body.block.x.shape[-1]
    like = layer.body.block.x
    weight = like.new_ones(dim) if norm.weight is None else norm.weight
    skip = weight.diag() - weight.unsqueeze(-1) / dim if norm.centred else weight.diag()
    return Residual(AttentionLayer(_folded_block(norm, layer.body.block)), Linear(skip, norm.bias))


def _folded_block(norm: Normalization, block: Attention) -> Attention:
    changes: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        weights, bias = getattr(block, f"w_{name}"), getattr(block, f"b_{name}")
        scaled = weights if norm.weight is None else norm.weight.unsqueeze(-1) * weights
        changes[f"w_{name}"] = scaled - scaled.mean(-2, keepdim=True) if norm.centred else scaled
        if norm.bias is not None:
            shift = (norm.bias.unsqueeze(-2) @ weights).squeeze(-2)
            changes[f"b_{name}"] = shift if bias is None else shift + bias
    return block.replace(**changes)
