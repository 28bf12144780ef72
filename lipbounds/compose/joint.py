"""The Jacobian of a small network as one matrix, with a bound on how far it moves in a ball.

    ||J_l ... J_1 - C_l||  <=  a_l  =  ||B_l|| a_{l-1} + e_l S_{l-1}
    ||J_l ... J_1||        <=  S_l  =  min( ||C_l|| + a_l, (||B_l|| + e_l) S_{l-1} )
    |w^T (J_L ... J_1) - w^T C_L|  <=  sum_l |w^T B_L ... B_{l+1}| e_l S_{l-1}      for a row w of the output

At radius 0 this is the norm of the exact Jacobian.

| symbol | meaning |
|---|---|
| B_l, J_l | Jacobian of layer l at its centre, and anywhere in the ball |
| C_l = B_l ... B_1 | that of all layers up to l, dense |
| e_l | bound on ||J_l - B_l|| over what reaches layer l |
| t_l, n_l | distance of the computed centre of layer l from the exact one; rounding of layer l at it |

Rounding: products of dense matrices are off by gamma(k + 2) times Frobenius norms, which is added to a_l and to the
rows; the Jacobian of attention by what lipbounds.estimators bounds, and by what folded weights lost. With t_{l+1} =
(||B_l|| + e_l) t_l + n_l (lipbounds.compose.running_error), the radius of what reaches layer l is S_{l-1} eps + t_l.

Proof, and what e_l is: docs/functions.md, section 10.
"""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.bounds.sharp_ball import jacobian_change
from lipbounds.compose.containers import sequence_step
from lipbounds.compose.curvature import curvature, supports_curvature
from lipbounds.compose.folding import folding_change
from lipbounds.compose.network import attention_specs, starting_set
from lipbounds.compose.one_input import network_of_input
from lipbounds.compose.propagated_set import PropagatedSet, Rules, Step, norm_over_tokens
from lipbounds.compose.reading import ReadResidual, bounded_layers
from lipbounds.compose.rewrite import FoldedLinear, flat, rewritten
from lipbounds.compose.running_error import lost_by
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators.exact import jacobian
from lipbounds.ops.spectral import never_nan, spectral_norm_upper, vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import AttentionLayer, Flatten, Layer, Linear, Patches, Pool, Positions, Residual


LARGEST_SIDE = 4096  # of a dense Jacobian of one layer
# What reaches a layer is then as many times wider than its Jacobian says, and the ball too large to prove anything:
# attention is bounded there by what takes no time.
HOPELESS = 1e4
LARGEST_H = 1e150  # beyond it a curvature is no better than none, and its square would overflow


@dc.dataclass(frozen=True, eq=False)
class _Stage:
    """One layer: its dense Jacobian at the centre, and what is needed for its deviation in a ball."""

    path: str
    layer: Layer
    x: Tensor
    matrix: Float[Tensor, "outputs inputs"]
    norm: Float[Tensor, ""]
    size: Float[Tensor, ""]
    before_norm: Float[Tensor, ""]  # ||C_{l-1}||
    so_far: Float[Tensor, "outputs start"]  # C_l
    so_far_norm: Float[Tensor, ""]
    token_norms: Float[Tensor, " n"]  # of the rows of each output token in C_l
    so_far_rounding: Float[Tensor, ""]
    lost: Float[Tensor, ""]  # n_l, how far the computed output is from that of the layer at x
    attention: _AttentionStage | None = None


@dc.dataclass(frozen=True, eq=False)
class _AttentionStage:
    """Attention inside a stage skip + attention(before(x)): the layers before it, and the norm and rounding of its
    Jacobian."""

    before: list[tuple[str, Layer]]
    layer: AttentionLayer
    block: Attention
    norm: Float[Tensor, ""]
    rounding: Float[Tensor, ""]
    forming: Float[Tensor, ""]  # bound on the rounding of skip + attention @ before


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class JointBound:
    """Bounds on the Jacobian over a ball.

    Args:
        norm: on the norm of the Jacobian of the whole network; infinite where a normalisation may collapse, never NaN.
        rows: on the Euclidean norm of each row, the gradient of one output feature.
        radii: what reaches each layer, with its path.
        norms: S_l, bounds on everything up to each layer.
        deviations: e_l.
        lost: how far the computed output is from the exact one at the input, at most, in l2.
    """

    norm: Float[Tensor, ""]
    rows: Float[Tensor, " outputs"]
    radii: tuple[tuple[str, float], ...]
    norms: tuple[float, ...]
    deviations: tuple[float, ...]
    lost: Float[Tensor, ""]


class JointNetwork:
    """A network at one input, prepared for bounds on balls of any radius around it.

    Over 150 lines, because its stages are prepared once and used by one recursion over layers.

    Args:
        network: the network; no layer may have more than 4096 inputs or outputs in all tokens together.
        x: one input, without batch dimensions.
        attention: names of registered bounds on balls, used where they give less than the curvature.

    Raises:
        InvalidInput: `x` or attention has batch dimensions, or `x` does not fit.
        Unsupported: a layer is too large, or attention is nested deeper than in one residual.
    """

    @torch.no_grad()
    def __init__(
        self, network: Layer, x: Float[Tensor, "..."], *, attention: str | tuple[str, ...] | None = None
    ) -> None:
        self._rules = Rules(attention_specs(attention, on_ball=True), centre_at_point=True)
        network, wide = network_of_input(network).to(torch.float64), x.detach().to(torch.float64)
        self._start = starting_set(network, wide, 0.0)
        if self._start.radius.dim() > 0:
            raise InvalidInput(f"x must be one input without batch dimensions, got shape {tuple(x.shape)}.")
        self._stages: list[_Stage] = []
        here = wide
        for path, layer in bounded_layers([("", network)], wide, self._rules):
            self._stages.append(self._stage(path, layer, here))
            here = layer(here)
        self.output = here.flatten()
        self._tails: Tensor | None = None

    def _stage(self, path: str, layer: Layer, x: Tensor) -> _Stage:
        y = layer(x)
        if max(x.numel(), y.numel()) > LARGEST_SIDE:
            raise Unsupported(
                f"a layer may have at most {LARGEST_SIDE} inputs and outputs, got {x.numel()} and {y.numel()} at "
                f"{path or 'the network'}; use network_bound."
            )
        attention, matrix = self._attention_matrix(layer, x)
        before = self._stages[-1] if self._stages else None
        norm = self._matrix_norm(layer, matrix, x, y)
        size = inflate(matrix.square().sum().sqrt(), matrix.numel() + 8)
        if before is None:
            so_far, rounding = matrix, torch.zeros_like(size)
        else:
            so_far = matrix @ before.so_far
            old = inflate(before.so_far.square().sum().sqrt(), before.so_far.numel() + 8)
            rounding = 2 * gamma(matrix.shape[1] + 4) * size * old + norm * before.so_far_rounding
        rows = so_far.reshape(y.shape[-2] if y.dim() > 1 else 1, -1, so_far.shape[1])
        return _Stage(
            path=path,
            layer=layer,
            x=x,
            matrix=matrix,
            norm=norm,
            size=size,
            before_norm=torch.ones_like(size) if before is None else before.so_far_norm,
            so_far=so_far,
            so_far_norm=spectral_norm_upper(so_far),
            token_norms=spectral_norm_upper(rows),
            so_far_rounding=never_nan(rounding * (1 + 1e-9)),
            lost=lost_by(layer, x, y, 3 if isinstance(layer, Patches) else 2),
            attention=attention,
        )

    def _matrix_norm(self, layer: Layer, matrix: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """||B_l||; of a block diagonal matrix the largest of a block, which costs less."""
        if isinstance(layer, Patches | Positions | Pool | Flatten) or _attention_of(layer) is not None:
            return spectral_norm_upper(matrix)
        count = x.shape[-2]
        blocks = matrix.reshape(count, y.shape[-1], count, x.shape[-1]).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return spectral_norm_upper(blocks).amax()

    def _attention_matrix(self, layer: Layer, x: Tensor) -> tuple[_AttentionStage | None, Tensor]:
        """The dense Jacobian at `x`, and the attention in the layer."""
        found = _attention_of(layer)
        if found is None:
            return None, _matrix_of(layer, x, self._rules)
        before, attention = found
        z, inner = x, torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        if before:
            step = sequence_step(before, _still(x), self._rules, [], depth=1)
            z, inner = step.outputs.x, _dense(step, x, "what stands before attention")
        block = attention.block.at(z)
        own = jacobian(block)
        operator = JacobianOperator(block)
        matrix, skip = own @ inner, torch.zeros_like(own[:, :0])
        skip_lost = own.new_zeros(())
        if isinstance(layer, Residual):
            skip = _block_diagonal(None if layer.skip is None else layer.skip.weight, x)
            tokens = x.shape[-2]
            if isinstance(layer, ReadResidual):
                skip, tokens = layer.read(skip.unflatten(0, (tokens, -1)).movedim(0, -2)).squeeze(-2), 1
            matrix = matrix + skip
            if isinstance(layer.skip, FoldedLinear):
                skip_lost = 2 * math.sqrt(tokens) * layer.skip.lost.norm()
        sizes = own.norm() * inner.norm() + skip.norm() + matrix.norm()
        stage = _AttentionStage(
            before=before,
            layer=attention,
            block=block,
            norm=spectral_norm_upper(own),
            rounding=operator.norm_error() * operator.scale,
            forming=4 * gamma(own.shape[1] + 16) * sizes + skip_lost,
        )
        return stage, matrix

    @torch.no_grad()
    def bound(self, radius: float, rows: Float[Tensor, "count outputs"] | None = None) -> JointBound:
        """Bounds over the ball of that radius, in the Frobenius norm of the input.

        Args:
            radius: >= 0.
            rows: combinations of the output features whose gradients are bounded; by default the features themselves.

        Raises:
            InvalidInput: the radius is negative or not finite.
        """
        if not 0 <= radius < math.inf:
            raise InvalidInput(f"radius must be finite and >= 0, got radius={radius}.")
        start = self._start.radius
        norm, apart = torch.ones_like(start), torch.zeros_like(start)  # S_{l-1} and a_{l-1}
        lost = torch.zeros_like(start)  # t_l
        tokens: Tensor | None = None if self._start.tokens is None else torch.ones_like(self._start.tokens)
        norms, deviations, radii, moved = [], [], [], []
        for stage in self._stages:
            # A ball of radius 0 stays a point however steep the layers are, hence `product`, not infinity times 0.
            inputs = PropagatedSet(stage.x, product(norm, radius), None if tokens is None else product(tokens, radius))
            inputs = dc.replace(inputs.grown(lost), lost=torch.zeros_like(lost))
            # NaN is infinity less or times something (a normalisation that may collapse): no bound is known.
            deviation, change = (never_nan(found) for found in self._change(stage, inputs, norm, tokens))
            apart = never_nan(inflate(stage.norm * apart + change, 8))
            lost = never_nan(inflate(product(stage.norm + deviation, lost) + stage.lost, 8))
            total = apart + stage.so_far_rounding
            through = never_nan((stage.norm + deviation) * norm)
            norm = torch.minimum(inflate(stage.so_far_norm + total, 4), inflate(through, 4))
            tokens = torch.minimum(inflate(stage.token_norms + total, 4), norm)
            radii.append((stage.path, float(inputs.radius)))
            norms.append(float(norm))
            deviations.append(float(deviation))
            moved.append(change)
        return JointBound(
            norm=norm,
            rows=self._rows(torch.stack(moved), rows),
            radii=tuple(radii),
            norms=tuple(norms),
            deviations=tuple(deviations),
            lost=lost,
        )

    def _rows(self, moved: Float[Tensor, " layers"], rows: Tensor | None) -> Float[Tensor, " count"]:
        """|w^T C_L| + sum_l |w^T B_L ... B_{l+1}| (e_l S_{l-1})."""
        last = self._stages[-1]
        identity = torch.eye(len(last.matrix), dtype=last.matrix.dtype, device=last.matrix.device)
        tail = identity if rows is None else rows.to(identity)
        error = tail.new_zeros(len(tail))  # of the computed tail, each row
        total = torch.zeros_like(error)
        for stage, change in zip(reversed(self._stages), moved.flip(0), strict=True):
            size = inflate(vector_norm(tail), tail.shape[1] + 8)
            total = inflate(total + (size + error) * change, 4)
            error = (error * stage.norm + 2 * gamma(tail.shape[1] + 4) * size * stage.size) * (1 + 1e-9)
            tail = tail @ stage.matrix
        return never_nan(inflate(total + vector_norm(tail) + error, tail.shape[1] + 8))

    def _change(
        self, stage: _Stage, inputs: PropagatedSet, norm: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """e_l, and a bound on ||(J_l - B_l) J_{l-1} ... J_1||."""
        layer = stage.layer
        if isinstance(layer, Patches | Positions | Pool | Flatten):
            rounded = 4 * UNIT_ROUNDOFF * stage.norm if isinstance(layer, Pool) else torch.zeros_like(norm)
            return rounded, rounded * norm
        if stage.attention is not None:
            assert tokens is not None
            return self._attention_change(stage, stage.attention, inputs, norm, tokens)
        step = sequence_step([(stage.path, layer)], inputs, self._rules, [], depth=1)
        each = step.jacobians.deviation
        if not step.per_token or each is None or tokens is None:
            raise Unsupported(f"{type(layer).__name__} has no known deviation at {stage.path}.")
        return each.amax(-1), norm_over_tokens(each, tokens, norm)

    def _attention_change(
        self, stage: _Stage, attention: _AttentionStage, inputs: PropagatedSet, norm: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_change`. With N' the Jacobian of the layers before attention, d and n its deviation and norm a token:
        (J - B) A' = A0 (N' - N0) A' + (A - A0) N' A', at most ||A0|| |d A'| + e |n A'|."""
        ones, one = torch.ones_like(tokens), torch.ones_like(norm)
        inner, gain = torch.zeros_like(ones), ones
        if attention.before:
            step = sequence_step(attention.before, inputs, self._rules, [], depth=1)
            if not step.per_token or step.jacobians.deviation is None:
                raise Unsupported("what stands before attention in a residual must act on tokens one by one.")
            inner, gain, inputs = step.jacobians.deviation, step.jacobians.norm, step.outputs
        folding = folding_change(attention.layer, attention.block.x, inputs.radius)
        turn = self._turn(attention, float(inputs.radius), quick=bool(norm > HOPELESS * stage.before_norm))
        turn = turn + attention.rounding + folding
        deviation, change = (
            product(attention.norm, norm_over_tokens(inner, each, whole))
            + product(turn, norm_over_tokens(gain, each, whole))
            for each, whole in ((ones, one), (tokens, norm))
        )
        return inflate(deviation + attention.forming, 8), inflate(change + product(attention.forming, norm), 8)

    def _turn(self, stage: _AttentionStage, radius: float, *, quick: bool) -> Tensor:
        """sup ||J(Z) - J(Z0)|| of attention over the ball; if quick without `jacobian_change`."""
        best = torch.full_like(stage.norm, math.inf)
        if radius == 0:
            return torch.zeros_like(stage.norm)
        if not radius < math.inf:
            return best
        if supports_curvature(stage.block):
            turned = curvature(stage.block, radius) * radius
            best = turned if float(turned) < LARGEST_H else best
            change = None if quick else jacobian_change(stage.block, radius)
            best = best if change is None else torch.minimum(best, change)
        for spec in self._rules.attention:
            largest = spec(stage.block, radius=radius if spec.needs_radius else None, grad=True)
            best = torch.minimum(best, inflate(largest.value + stage.norm, 2))
        return inflate(best, 4)


def _attention_of(layer: Layer) -> tuple[list[tuple[str, Layer]], AttentionLayer] | None:
    """The attention of a layer with what stands before it in the same residual."""
    if isinstance(layer, AttentionLayer):
        return [], layer
    if not isinstance(layer, Residual):
        return None
    parts = rewritten(flat([("", layer.body)]))
    places = [index for index, (_, part) in enumerate(parts) if isinstance(part, AttentionLayer)]
    deeper = [part for _, part in parts if isinstance(part, Residual) and _attention_of(part) is not None]
    if deeper or (places and places != [len(parts) - 1]):
        raise Unsupported("attention must be the last layer of the body of a residual, and the only one in it.")
    if not places:
        return None
    last = parts[-1][1]
    assert isinstance(last, AttentionLayer)
    return parts[:-1], last


def _matrix_of(layer: Layer, x: Tensor, rules: Rules) -> Tensor:
    """The dense Jacobian of a layer without attention at `x`: that of a linear one, or blocks on the diagonal."""
    if isinstance(layer, Patches | Positions | Pool | Flatten):
        # Without what is added, which would only round; what is left copies entries, or averages them.
        layer = dc.replace(layer, added=None) if isinstance(layer, Positions) else layer
        zero = layer(torch.zeros_like(x))
        basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape)
        return torch.stack([(layer(direction) - zero).flatten() for direction in basis], 1)
    if isinstance(layer, Linear):
        return _block_diagonal(layer.weight, x)
    return _dense(sequence_step([("", layer)], _still(x), rules, [], depth=1), x, type(layer).__name__)


def _still(x: Tensor) -> PropagatedSet:
    return PropagatedSet(x, x.new_zeros(()), x.new_zeros(x.shape[:-1]))


def _dense(step: Step, x: Tensor, what: str) -> Tensor:
    """The centre of a step on tokens one by one, as one block diagonal matrix."""
    centre = step.jacobians.centre
    if centre is None or not step.per_token:
        raise Unsupported(f"{what} must act on tokens one by one and be small enough for matrices; use network_bound.")
    return torch.block_diag(*centre.expand(x.shape[-2], *centre.shape[-2:]))


def _block_diagonal(weight: Tensor | None, x: Tensor) -> Tensor:
    weight = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) if weight is None else weight
    return torch.block_diag(*[weight] * x.shape[-2])
