"""The stages in which the numbers of one attention block are computed; any process can do each."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lipbounds.cluster import check_device
from lipbounds.derivatives.first.dense import jacobian_entries
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.estimators.tokens import token_lower
from lipbounds.registry import get
from lipbounds.report.heads import heads_alone
from lipbounds.report.schema import Number, numbers_of
from lipbounds.targets.attention import Attention


AT_POINT = ("sharp_fast", "covariance.exact", "yudin2025.biased")
ON_BALL = ("sharp_ball.deviation", "sharp_ball.direct", "yudin2025_ball.biased")
RADII = (0.01, 0.1, 1.0)
EXACT_ENTRIES = 1200**2  # of a Jacobian whose exact norm takes about a second
STEPS = 60  # of Lanczos at most; its vectors for all heads treated at once stay below
KRYLOV_ENTRIES = 2**25
WITHIN = 1.02  # of its Ritz value, where a probable bound is good enough
LOWER_STEPS = 30
DEVIATION_ENTRIES = 2**22  # of logits times the width of a head: above, `sharp_ball.deviation` takes ten seconds
MAX_TOKENS = 256  # each of which is an iteration of its own


@dc.dataclass(frozen=True, kw_only=True)
class Plan:
    """Which numbers are wanted.

    Args:
        at_point: names of proved bounds at the point.
        on_ball: names of proved bounds on a ball.
        radii: of the balls, ascending.
        delta: of each probable bound.
        seed: of random starts.
        sharp: whether layers get `sharp`, too, as far as the budget goes (lipbounds.report.budget); small heads do.
        sharp_ball: the same of `sharp_ball`.
    """

    at_point: tuple[str, ...]
    on_ball: tuple[str, ...]
    radii: tuple[float, ...]
    delta: float
    seed: int
    sharp: bool
    sharp_ball: bool


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
    by_scope = {scope: [spec.name for spec in specs if spec.claim.scope == scope] for scope in ("point", "ball")}
    return Plan(
        at_point=tuple(by_scope["point"] or AT_POINT),
        on_ball=tuple(by_scope["ball"] or ON_BALL),
        radii=tuple(chosen),
        delta=delta,
        seed=seed,
        sharp=not by_scope["point"],
        sharp_ball=not by_scope["ball"],
    )


@dc.dataclass(frozen=True, kw_only=True)
class Stage:
    """One sort of numbers of a block.

    Args:
        name: for people; `layers`, `heads`, `tokens`, `sharp`, or a ball with its radius.
        share: of the time, in units of that of the tokens.
        radius: of the ball.
        sharp: of a ball, whether the norm at its centre may be that of `sharp`, as it is known.
        sharp_ball: of a ball, whether `sharp_ball` is wanted.
        direct: of a ball, whether a large block gets `sharp_ball.direct`; a small one does.
    """

    name: str
    share: float
    radius: float | None = None
    sharp: bool = False
    sharp_ball: bool = False
    direct: bool = True


def cheap_stages() -> list[Stage]:
    """What every block gets, in the order in which a limit of time leaves the most."""
    return [Stage(name="layers", share=2.0), Stage(name="heads", share=2.0), Stage(name="tokens", share=1.0)]


def costly_stages(plan: Plan, *, sharp: bool = True, sharp_ball: bool = True, direct: bool = True) -> list[Stage]:
    """What comes after the cheap stages.

    Args:
        plan: what is wanted.
        sharp: whether `sharp` is affordable.
        sharp_ball: whether `sharp_ball` is.
        direct: whether `sharp_ball.direct` is at a large block.
    """
    at_point = [Stage(name="sharp", share=2.0)] if plan.sharp and sharp else []
    known = {"sharp": sharp and plan.sharp, "sharp_ball": sharp_ball and plan.sharp_ball, "direct": direct}
    balls = (Stage(name=f"ball {radius:g}", share=1.0, radius=radius, **known) for radius in plan.radii)
    return [*at_point, *balls]


@dc.dataclass(kw_only=True)
class Numbers:
    """Those of one block, as far as they are computed.

    Args:
        proved: bounds of the whole.
        constant: of the whole.
        lower: bound of the whole from below.
        balls: bounds on balls.
        tokens: bounds from below of what each token alone can do.
        head_proved: bounds of each head.
        head_constant: of each head.
        head_lower: bounds of each head from below.
    """

    proved: list[Number] = dc.field(default_factory=list)
    constant: Number | None = None
    lower: Number | None = None
    balls: list[Number] = dc.field(default_factory=list)
    tokens: list[Number] = dc.field(default_factory=list)
    head_proved: list[list[Number]] = dc.field(default_factory=list)
    head_constant: list[Number] = dc.field(default_factory=list)
    head_lower: list[Number] = dc.field(default_factory=list)

    def add(self, other: Numbers) -> None:
        """Take over what another stage computed."""
        for field in dc.fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, here + there if isinstance(here, list) else there or here)


@dc.dataclass
class Found:
    """What a stage found.

    Args:
        items: the numbers of each item of the batch.
        notes: what was left out.
    """

    items: list[Numbers] = dc.field(default_factory=list)
    notes: list[str] = dc.field(default_factory=list)


@torch.no_grad()
def compute(
    items: Sequence[Attention],
    stage: Stage,
    plan: Plan,
    device: str | None = None,
    keep: Callable[[Found], None] = lambda found: None,
) -> Found:
    """The numbers of one stage.

    Args:
        items: blocks in float64, without batch dimensions.
        stage: which numbers.
        plan: what is wanted.
        device: where; where the blocks are if None.
        keep: told what is found so far, after each number.

    Raises:
        ClusterError: the device is not there.
    """
    if device is not None:
        check_device(device)
    found = Found()
    for item in items:
        block = item if device is None else item.to(device)
        found.items.append(Numbers())
        for part in _parts(block, stage, plan, found.notes):
            found.items[-1].add(part)
            keep(found)
    return found


def _parts(block: Attention, stage: Stage, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """The numbers of one stage, one after the other."""
    if stage.radius is not None:
        yield from _ball(block, stage, plan, notes)
    else:
        parts = {"layers": _whole, "heads": _heads, "tokens": _tokens, "sharp": _sharp}[stage.name]
        yield from parts(block, plan, notes)


def _ball(block: Attention, stage: Stage, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """Bounds on one ball."""
    for name in ("sharp_ball", *plan.on_ball) if stage.sharp_ball else plan.on_ball:
        options: dict[str, Any] = {"radius": stage.radius}
        if name == "sharp_ball.deviation" and plan.sharp_ball:  # no one asked for it: it may not cost much
            if is_large(block):
                _note(
                    notes, f"{name}: left out, it takes half a minute a layer of this size; --bounds {name} computes it"
                )
                continue
            options["gram"] = stage.sharp
        if name == "sharp_ball.direct" and plan.sharp_ball and not stage.direct and is_large(block):
            _note(
                notes,
                f"{name}: left out, at blocks of this size it takes seconds for each ball, and the most fragile layer "
                f"alone has it; --bounds {name} computes it",
            )
            continue
        yield Numbers(balls=[values[0] for values in _evaluated([name], block, notes, **options)])


def is_large(block: Attention) -> bool:
    """Whether bounds on balls that look at each logit take seconds to half a minute."""
    return block.logits.numel() * block.w_q.shape[-1] > DEVIATION_ENTRIES


def _whole(block: Attention, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """Bounds and constant of the whole block."""
    for name in plan.at_point:
        yield Numbers(proved=[values[0] for values in _evaluated([name], block, notes)])
    (constant,), (lower,) = _truth(block, plan)
    yield Numbers(constant=constant, lower=lower)


def _sharp(block: Attention, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """The tightest proved bound of the whole block."""
    del plan
    yield Numbers(proved=[values[0] for values in _evaluated(["sharp"], block, notes)])


def _heads(block: Attention, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """Bounds and constant of each head alone."""
    size = block.moving_input.shape[-2:].numel()
    names = (*plan.at_point, "sharp") if plan.sharp and jacobian_entries(block) <= EXACT_ENTRIES else plan.at_point
    step = max(1, KRYLOV_ENTRIES // (STEPS * size))
    for start in range(0, block.heads, step):
        stop = min(start + step, block.heads)
        alone = heads_alone(block, start, stop)
        proved: list[list[Number]] = [[] for _ in range(start, stop)]
        for values in _evaluated(names, alone, notes):
            for of_head, value in zip(proved, values, strict=True):
                of_head.append(value)
        constants, lowers = _truth(alone, plan)
        yield Numbers(head_proved=proved, head_constant=constants, head_lower=lowers)


def _tokens(block: Attention, plan: Plan, notes: list[str]) -> Iterator[Numbers]:
    """What the output does when one token alone moves, from below."""
    if block.moving_input.shape[-2] > MAX_TOKENS:
        _note(notes, f"tokens: left out, there are more than {MAX_TOKENS}")
        return
    values = token_lower(block, seed=plan.seed).tolist()
    lower = Number(value=0.0, method="token_lower", kind="lower", scope="point", norm="l2", dtype="float64")
    yield Numbers(tokens=[dc.replace(lower, value=value) for value in values])


def _evaluated(names: Sequence[str], block: Attention, notes: list[str], **options: Any) -> list[list[Number]]:
    found = []
    for name in names:
        try:
            found.append(numbers_of(get(name)(block, **options)))
        except UnsupportedAttention as error:
            _note(notes, str(error).partition(";")[0])
    return found


def _truth(block: Attention, plan: Plan) -> tuple[list[Number], list[Number]]:
    """The exact constant of small blocks or else a probable one, and a lower bound; both of the latter from one run."""
    if jacobian_entries(block) <= EXACT_ENTRIES:
        return numbers_of(get("exact")(block)), numbers_of(get("lanczos")(block, steps=LOWER_STEPS, seed=plan.seed))
    found = get("lanczos_posterior")(block, delta=plan.delta, steps=STEPS, within=WITHIN, seed=plan.seed)
    constants = numbers_of(found)
    values = found.details["lower"].double().flatten().tolist()
    lowers = [
        dc.replace(number, value=value, kind="lower", delta=None)
        for number, value in zip(constants, values, strict=True)
    ]
    return constants, lowers


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
