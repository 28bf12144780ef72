"""The numbers of one attention block: of the whole, of each head alone, of each token, and on balls."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

from lipbounds.capture import CapturedAttention
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.estimators.tokens import token_lower
from lipbounds.registry import BoundSpec, get
from lipbounds.report.contents import HeadReport, LayerReport, Number, numbers_of, rounded
from lipbounds.report.heads import heads_alone, mean_entropy, sinks
from lipbounds.targets.attention import Attention
from lipbounds.targets.attention_dense import batch_items, jacobian_entries
from lipbounds.targets.attention_norms import row_g_1


AT_POINT = ("sharp_fast", "covariance.exact", "yudin2025.biased")
ON_BALL = ("sharp_ball", "yudin2025_ball.biased")
RADII = (0.01, 0.1, 1.0)
EXACT_ENTRIES = 1200**2  # of a Jacobian whose exact norm takes about a second
STEPS = 60  # of Lanczos; its vectors for all heads treated at once stay below
KRYLOV_ENTRIES = 2**25
MAP_DIGITS = 4
MAX_TOKENS = 64  # each of which is a power iteration of its own


@dc.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which numbers are wanted.

    Args:
        at_point: proved bounds at the point.
        on_ball: proved bounds on a ball.
        radii: of the balls, ascending.
        delta: of each probable bound.
        seed: of random starts.
    """

    at_point: tuple[BoundSpec, ...]
    on_ball: tuple[BoundSpec, ...]
    radii: tuple[float, ...]
    delta: float
    seed: int


def plan(*, bounds: Sequence[str], radii: Sequence[float] | None, delta: float, seed: int) -> Plan:
    """The plan that the arguments ask for.

    Args:
        bounds: names; the default ones for a scope of which none is named.
        radii: of the balls; the default ones if None.
        delta: of each probable bound.
        seed: of random starts.

    Raises:
        UnknownBound: there is no bound of such a name.
        InvalidInput: a bound that is not proved, in another norm or scope; a radius or delta out of range.
    """
    specs = [get(name) for name in dict.fromkeys(bounds)]
    for spec in specs:
        claim = spec.claim
        fits = claim.kind == "proved" and claim.scope in ("point", "ball") and claim.norm == "l2"
        if not (fits and spec.target is Attention and spec.status == "standing"):
            raise InvalidInput(
                "bounds must name standing proved bounds of attention in l2, at a point or on a ball, got "
                f"{spec.name} ({spec.status}, {claim.kind}, {claim.scope}, {claim.norm}, {spec.target.__name__}); "
                "`lipbounds bounds` lists them."
            )
    chosen = [*dict.fromkeys(RADII if radii is None else sorted(radii))]
    if not all(0 < radius < float("inf") for radius in chosen):
        raise InvalidInput(f"radii (eps) must be finite and above 0, got {chosen}.")
    if not 0 < delta < 1:
        raise InvalidInput(f"delta must be above 0 and below 1, got {delta=}.")
    by_scope = {scope: [spec for spec in specs if spec.claim.scope == scope] for scope in ("point", "ball")}
    return Plan(
        at_point=tuple(by_scope["point"] or map(get, AT_POINT)),
        on_ball=tuple(by_scope["ball"] or map(get, ON_BALL)),
        radii=tuple(chosen),
        delta=delta,
        seed=seed,
    )


class _Numbers:
    """Those of one block, filled in stage by stage."""

    def __init__(self, block: Attention) -> None:
        self.block = block
        self.proved: list[Number] = []
        self.constant: Number | None = None
        self.lower: Number | None = None
        self.balls: list[Number] = []
        self.tokens: list[Number] = []
        self.head_proved: list[list[Number]] = [[] for _ in range(block.heads)]
        self.head_constant: list[Number] = []
        self.head_lower: list[Number] = []


class LayerWork:
    """The numbers of one captured call, in float64 and item by item of its batch.

    Args:
        found: the call.
        labels: one a token, where their count is right.
        plan: what is wanted.
    """

    def __init__(self, found: CapturedAttention, labels: tuple[str, ...], plan: Plan) -> None:
        self.found = found
        self._labels = labels
        self._plan = plan
        self._items = [_Numbers(item) for item in batch_items(found.attention.double)]
        self._notes: list[str] = []

    def whole(self) -> None:
        """Bounds and constant of the whole block."""
        for item in self._items:
            item.proved = [values[0] for values in self._evaluated(self._plan.at_point, item.block)]
            item.constant, item.lower = (values[0] for values in self._truth(item.block))

    def heads(self) -> None:
        """Bounds and constant of each head alone."""
        for item in self._items:
            size = item.block.moving_input.shape[-2:].numel()
            step = max(1, KRYLOV_ENTRIES // (STEPS * size))
            for start in range(0, item.block.heads, step):
                alone = heads_alone(item.block, start, min(start + step, item.block.heads))
                for values in self._evaluated(self._plan.at_point, alone):
                    for head, value in enumerate(values, start):
                        item.head_proved[head].append(value)
                constants, lowers = self._truth(alone)
                item.head_constant += constants
                item.head_lower += lowers

    def tokens(self) -> None:
        """What the output does when one token alone moves, from below."""
        for item in self._items:
            if item.block.moving_input.shape[-2] > MAX_TOKENS:
                self._note(f"tokens: left out, there are more than {MAX_TOKENS}")
                continue
            values = token_lower(item.block, seed=self._plan.seed)
            item.tokens = [
                Number(value=value, method="token_lower", kind="lower", scope="point", norm="l2", dtype="float64")
                for value in values.tolist()
            ]

    def ball(self, radius: float) -> None:
        """Bounds on the ball of one radius."""
        for item in self._items:
            item.balls += [values[0] for values in self._evaluated(self._plan.on_ball, item.block, radius=radius)]

    def skip(self, what: str, max_seconds: float | None) -> None:
        """Note that a stage was left out because the time was up."""
        self._note(f"{what}: not computed, the limit of {max_seconds:g} seconds was reached")

    def reports(self) -> list[LayerReport]:
        """What was computed; a batch item after the first has its number in the name of the module."""
        return [self._report(item, number) for number, item in enumerate(self._items)]

    def _evaluated(self, specs: Sequence[BoundSpec], block: Attention, **radius: float) -> list[list[Number]]:
        found = []
        for spec in specs:
            try:
                found.append(numbers_of(spec(block, **radius)))
            except UnsupportedAttention as error:
                self._note(str(error).partition(";")[0])
        return found

    def _truth(self, block: Attention) -> tuple[list[Number], list[Number]]:
        """The exact constant of small blocks or else a probable one, and a lower bound."""
        seed = self._plan.seed
        if jacobian_entries(block) <= EXACT_ENTRIES:
            constant = get("exact")(block)
        else:
            constant = get("lanczos_certificate")(block, delta=self._plan.delta, steps=STEPS, seed=seed)
        return numbers_of(constant), numbers_of(get("lanczos")(block, steps=STEPS, seed=seed))

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)

    def _report(self, item: _Numbers, number: int) -> LayerReport:
        block = item.block
        module = self.found.module or "the model itself"
        return LayerReport(
            layer=self.found.index,
            module=module if number == 0 else f"{module}, item {number + 1} of the batch",
            queries=self._named(block.tokens),
            keys=self._named(block.logits.shape[-1]),
            moving=self._named(block.moving_input.shape[-2]),
            features=tuple(sorted(block.features)),
            input_norm=float(block.moving_input.norm()),
            proved=tuple(item.proved),
            constant=item.constant,
            lower=item.lower,
            balls=tuple(item.balls),
            tokens=tuple(item.tokens),
            heads=self._heads(item),
            notes=tuple(self._notes),
        )

    def _heads(self, item: _Numbers) -> tuple[HeadReport, ...]:
        maps = item.block.probabilities
        g_1 = row_g_1(item.block).tolist()
        entropy = mean_entropy(maps).tolist()
        keys, shares = sinks(maps)
        return tuple(
            HeadReport(
                head=head,
                proved=tuple(item.head_proved[head]),
                constant=_at(item.head_constant, head),
                lower=_at(item.head_lower, head),
                g_1=tuple(float(rounded(value, "proved", MAP_DIGITS)) for value in g_1[head]),
                entropy=float(rounded(entropy[head], "estimate", MAP_DIGITS)),
                sink=keys[head],
                sink_share=float(rounded(shares[head], "estimate", MAP_DIGITS)),
                attention=_to_digits(maps[head].tolist()),
            )
            for head in range(item.block.heads)
        )

    def _named(self, count: int) -> tuple[str, ...]:
        return self._labels if len(self._labels) == count else tuple(str(i) for i in range(count))


def _at(numbers: list[Number], index: int) -> Number | None:
    return numbers[index] if index < len(numbers) else None


def _to_digits(rows: list[list[float]]) -> tuple[tuple[float, ...], ...]:
    """Attention with few digits: it is shown, not computed with."""
    return tuple(tuple(float(f"{p:.{MAP_DIGITS}g}") for p in row) for row in rows)
