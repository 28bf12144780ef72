"""What a report holds: frozen data, every number with the promise it carries."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.claims import BoundResult, Kind, Norm, Scope
from lipbounds.number_format import rounded as rounded
from lipbounds.number_format import shown as shown
from lipbounds.report.patches import Grid, Picture


SCHEMA_VERSION = 2


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of one method.

    Args:
        value: as computed; infinite where a bound says nothing.
        method: the registered name, or the function that made it.
        kind: upper bounds are `proved` or `probable`.
        scope: `point` or `ball`.
        norm: of input and output.
        dtype: of the number.
        delta: allowed probability of failure of a probable bound.
        radius: of the ball.
    """

    value: float
    method: str
    kind: Kind
    scope: Scope
    norm: Norm
    dtype: str
    delta: float | None = None
    radius: float | None = None

    @property
    def shown(self) -> str:
        """With three digits, rounded to the side on which the promise still holds."""
        return shown(self.value, self.kind)


def numbers_of(result: BoundResult) -> list[Number]:
    """One number for each item of a batch, in the order of the flattened batch."""
    dtype = str(result.value.dtype).removeprefix("torch.")
    return [
        Number(
            value=value,
            method=result.name,
            kind=result.kind,
            scope=result.scope,
            norm=result.claim.norm,
            dtype=dtype,
            delta=result.delta,
            radius=result.radius,
        )
        for value in result.value.detach().double().flatten().tolist()
    ]


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class HeadReport:
    """One head alone: the block that is left when all other heads are taken away.

    Args:
        head: its number, from 0.
        proved: bounds at the point.
        constant: the exact or the probable constant; None where the time was up.
        lower: a lower bound of it.
        g_1: of each row of the attention map, rounded up: at least the l2 norm of its softmax Jacobian.
        entropy: of a row of the map in nats, mean over rows.
        sink: the key that gets most of the attention.
        sink_share: its share of the attention, mean over rows.
        attention: the map, queries by keys, to five digits; None where the maps would make the file too large.
    """

    head: int
    proved: tuple[Number, ...]
    constant: Number | None
    lower: Number | None
    g_1: tuple[float, ...]
    entropy: float
    sink: int
    sink_share: float
    attention: tuple[tuple[float, ...], ...] | None


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One attention block at one input.

    Args:
        layer: the number of its attention call in the run, from 0.
        module: the qualified name of the module that made the call.
        queries: a label for each query.
        keys: a label for each key.
        moving: a label for each token of the input that moves.
        features: of the block, such as `mask`.
        input_norm: the l2 norm of the input that moves.
        proved: bounds at the point.
        constant: the exact or the probable constant.
        lower: a lower bound of it.
        balls: bounds on balls, radius by radius.
        tokens: for each moving token a lower bound of what the output does when it alone moves.
        heads: one entry per head.
        notes: what could not be computed, and why.
        grid: which tokens are patches of the picture.
    """

    layer: int
    module: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    moving: tuple[str, ...]
    features: tuple[str, ...]
    input_norm: float
    proved: tuple[Number, ...]
    constant: Number | None
    lower: Number | None
    balls: tuple[Number, ...]
    tokens: tuple[Number, ...]
    heads: tuple[HeadReport, ...]
    notes: tuple[str, ...]
    grid: Grid | None = None


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class SkippedReport:
    """One attention call without numbers, because no `Attention` can express it.

    Args:
        layer: the number of its attention call in the run, from 0.
        module: the qualified name of the module that made the call.
        reason: what it has that `Attention` has not.
    """

    layer: int
    module: str
    reason: str


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class InputReport:
    """All layers of one run of the model.

    Args:
        name: of the input, for people.
        layers: in the order of their calls.
        skipped: attention calls that could not be captured; what is said of all layers is said without them.
        warnings: what may concern a layer, though capture cannot tell.
        picture: that the model was given, if it was one.
    """

    name: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedReport, ...] = ()
    warnings: tuple[str, ...] = ()
    picture: Picture | None = None


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """The report on a model.

    Args:
        model: its name, for people.
        dtype: of its weights.
        device: on which it ran.
        seed: of all random starts.
        lipbounds: version of this library.
        torch: version of torch.
        inputs: one entry per run of the model.
    """

    model: str
    dtype: str
    device: str
    seed: int
    lipbounds: str
    torch: str
    inputs: tuple[InputReport, ...]


def least(numbers: tuple[Number, ...]) -> Number | None:
    """The smallest of proved bounds, which is one."""
    return min(numbers, key=lambda number: number.value, default=None)


def least_at_point(part: LayerReport | HeadReport) -> Number | None:
    """The smallest proved bound that covers the point: one at the point, or one on a ball, whose centre the point is.

    Args:
        part: a layer or a head.
    """
    balls = part.balls if isinstance(part, LayerReport) else ()
    return least((*part.proved, *(number for number in balls if number.kind == "proved")))


def ratio(part: LayerReport | HeadReport) -> Number | None:
    """How many times above the truth the smallest proved bound is at most: bound over lower bound."""
    bound = least_at_point(part)
    if bound is None or part.lower is None or part.lower.value == 0:
        return None
    return dc.replace(bound, value=bound.value / part.lower.value * (1 + 1e-15), method="ratio")
