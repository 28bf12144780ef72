"""Run everything the verifier has against one bound, until something refutes it."""

from __future__ import annotations

import dataclasses as dc
import time

import hypothesis
from hypothesis import Phase

from lipbounds.registry import BoundSpec
from lipbounds.testing.contract import Refuted, checks_for, run_check
from lipbounds.testing.falsify import can_climb, falsify_widely


FALSIFY = "falsify"
MAX_EXAMPLES = 100
SECONDS = 120.0  # processor time of the long ascent
SHORT_SECONDS = 10.0  # of the first ascent
DEEPER = 10  # times as many examples in the last round
SEED = 0
PROFILE = "planted faults"
# No shrinking and no memory of earlier runs: what counts here is whether and when a fault is found.
hypothesis.settings.register_profile(PROFILE, phases=[Phase.generate], database=None, deadline=None)


@dc.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to one bound.

    Args:
        caught_by: name of the check, `falsify` for the search by ascent, None if the bound survived.
        examples: blocks that this check tried until the failure, or the starts of the ascent.
        before: blocks that the checks before it tried.
        seconds: for all of it.
        reason: what the check said.
    """

    caught_by: str | None
    examples: int
    before: int
    seconds: float
    reason: str = ""


def hunt(
    spec: BoundSpec,
    *,
    first: str | None = None,
    skip: int = 0,
    max_examples: int = MAX_EXAMPLES,
    seconds: float = SECONDS,
    seed: int = SEED,
) -> Outcome:
    """All checks and the ascent, in the order of `_plan`, until one refutes the bound.

    Args:
        spec: the bound.
        first: a check to run before all others, such as the one that refuted the bound before.
        skip: where that is the ascent, shapes that it leaves out at the beginning.
        max_examples: blocks a check.
        seconds: for the ascent.
        seed: of every search.
    """
    begun = time.monotonic()
    before = 0
    plan = [(check, effort, 0) for check, effort in _plan(spec, max_examples, seconds)]
    known = [(check, effort, skip if check == FALSIFY else 0) for check, effort, _ in plan if check == first][:1]
    for check, effort, left_out in [*known, *(step for step in plan if step not in known)]:
        try:
            tried = _attack(spec, seed, effort, left_out) if check == FALSIFY else _draw(spec, check, int(effort), seed)
        except _Found as found:
            return Outcome(
                caught_by=check,
                examples=found.examples,
                before=before,
                seconds=time.monotonic() - begun,
                reason=found.reason,
            )
        before += tried
    return Outcome(caught_by=None, examples=0, before=before, seconds=time.monotonic() - begun)


class _Found(Exception):
    def __init__(self, examples: int, reason: str) -> None:
        self.examples, self.reason = examples, reason
        super().__init__(reason)


def _plan(spec: BoundSpec, max_examples: int, seconds: float) -> list[tuple[str, float]]:
    """Checks with their blocks, the ascent with its seconds: what is likely to find something quickly comes first.

    `value` and `tight`, a short ascent, the other checks in the order of `CHECKS`; for what survives a long ascent and
    `value` and `tight` again with many more blocks.
    """
    checks = checks_for(spec)
    attackable = can_climb(spec) and spec.role == "bound"
    value = [check for check in checks if check in ("value", "tight")]
    short = [(FALSIFY, min(seconds, SHORT_SECONDS))] if attackable else []
    long = [(FALSIFY, seconds)] if attackable and seconds > SHORT_SECONDS else []  # else it would repeat the short one
    others = [(check, max_examples) for check in checks if check not in value]
    deeper = [(check, DEEPER * max_examples) for check in value]
    return [*((check, max_examples) for check in value), *short, *others, *long, *deeper]


def _draw(spec: BoundSpec, check: str, max_examples: int, seed: int) -> int:
    profile = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile(PROFILE)
    try:
        return run_check(spec, check, max_examples=max_examples, seed=seed)
    except Refuted as refuted:
        raise _Found(refuted.examples or 0, refuted.reason) from refuted
    finally:
        hypothesis.settings.load_profile(profile)


def _attack(spec: BoundSpec, seed: int, seconds: float, skip: int) -> int:
    found = falsify_widely(spec, seed=seed, seconds=seconds, skip=skip)
    if found.refuted:
        raise _Found(found.starts, repr(found).split(": ", 1)[1].rstrip(")"))
    return found.starts
