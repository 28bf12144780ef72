"""A verification session: every check and the ascent, within a time budget, as one report."""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Callable
from typing import Any

import torch

from lipbounds.claims import Kind, Scope
from lipbounds.registry import BoundSpec, select
from lipbounds.targets.attention import Attention
from lipbounds.testing.contract import checks_for, checks_of, run_check
from lipbounds.testing.difficulty import Difficulty, Seen
from lipbounds.testing.falsify import Falsification, can_climb, falsify_widely
from lipbounds.testing.other_norms import reached_norm
from lipbounds.testing.recipes import Recipe, build
from lipbounds.testing.shrink import shrink
from lipbounds.testing.snippet import check_snippet, snippet
from lipbounds.testing.snippet_run import why_not
from lipbounds.testing.target_ascent import can_climb_target, climb_widely
from lipbounds.testing.verdict import Refuted


FIRST_ROUND = 20  # blocks for each check; every round doubles it
SHARE_OF_ASCENT = 0.4
ENOUGH_ROUNDS = 2  # of all checks: 60 blocks each
ENOUGH_STARTS = 200  # of the ascent
COMPARED = 24  # blocks on which tightness is measured
Progress = Callable[[str, float], None]


@dc.dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far above the truth a bound is on the sample of `compare`.

    Args:
        name: of the bound.
        median: median of value / truth over the blocks.
        worst: the largest.
        blocks: number of blocks it supports.
    """

    name: str
    median: float
    worst: float
    blocks: int


@dc.dataclass(frozen=True, kw_only=True)
class Report:
    """What a verification session found.

    Args:
        name: of the bound.
        kind: of its promise.
        scope: of its promise.
        seed: of the session.
        seconds: processor time it took.
        examples: blocks tried by each check.
        rounds: rounds of all checks that were done to their end.
        starts: starting points of the ascent; None where ascent does not apply.
        worst_ratio: largest true norm / claimed norm that ascent found; None where ascent does not apply.
        refuted_by: the check that failed, `ascent`, or empty.
        message: what was found; empty if nothing was.
        snippet: Python source that shows it, run before it is returned; empty if nothing was found, or if no file
            shows it, which the message says.
        difficulty: of the blocks that the check `value` drew; None for a target that is no `Attention`.
        comparisons: tightness beside all other bounds of the same kind and scope; empty for a refuted bound.
    """

    name: str
    kind: Kind
    scope: Scope
    seed: int
    seconds: float = 0.0
    examples: dict[str, int] = dc.field(default_factory=dict)
    rounds: int = 0
    starts: int | None = None
    worst_ratio: float | None = None
    refuted_by: str = ""
    message: str = ""
    snippet: str = ""
    difficulty: Difficulty | None = None
    comparisons: list[Comparison] = dc.field(default_factory=list)

    @property
    def missing(self) -> str:
        """What the search lacks of the least that a verdict takes, whatever the clock says; empty if nothing."""
        lacks = []
        if self.rounds < ENOUGH_ROUNDS:
            lacks.append(f"{self.rounds} of {ENOUGH_ROUNDS} rounds of checks")
        if self.starts is not None and self.starts < ENOUGH_STARTS:
            lacks.append(f"{self.starts} of {ENOUGH_STARTS} starts of the ascent")
        return " and ".join(lacks)

    @property
    def sound_so_far(self) -> bool:
        """Nothing was found, and enough was searched for it to mean something; that is no proof."""
        return not self.refuted_by and not self.missing

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with a schema version."""
        return {"schema_version": 1, "sound_so_far": self.sound_so_far, "missing": self.missing, **dc.asdict(self)}


def verify(spec: BoundSpec, *, seconds: float = 60.0, seed: int = 0, progress: Progress | None = None) -> Report:
    """Attack a bound with every check that applies, in rounds of growing size, and then by ascent.

    Each check runs at least once, so a session may take longer than asked. One that had no time for the least that a
    verdict takes is not sound so far: the report says what is missing.

    Args:
        spec: the bound.
        seconds: processor time to spend: on a busy machine a session takes longer, and searches as much.
        seed: of all searches.
        progress: called with what is being done and the share of the time that has passed.
    """
    begun = time.process_time()
    report = Report(name=spec.name, kind=spec.claim.kind, scope=spec.claim.scope, seed=seed)
    examples: dict[str, int] = dict.fromkeys(checks_for(spec), 0)
    climbs = can_climb(spec) or can_climb_target(spec)
    until = seconds * (1 - SHARE_OF_ASCENT) if climbs else seconds

    def elapsed() -> float:
        return time.process_time() - begun

    def tell(what: str) -> None:
        if progress is not None:
            progress(what, min(1.0, elapsed() / seconds) if seconds > 0 else 1.0)

    tried: dict[str, int] = dict.fromkeys(examples, 0)  # rounds of each check
    drawn = Seen()

    def done(**found: Any) -> Report:
        found |= {"rounds": _whole_rounds(spec, tried), "difficulty": drawn.summary()}
        return dc.replace(report, seconds=elapsed(), examples=examples, **found)

    try:
        for name in _rounds(spec, list(examples), lambda: elapsed() < until):
            tell(f"check {name[0]}")
            check, size, round_seed = name
            seen = drawn if check == "value" else None  # other checks draw blocks of the same kinds
            examples[check] += run_check(spec, check, max_examples=size, seed=seed + round_seed, seen=seen)
            tried[check] += 1
    except Refuted as refuted:
        examples[refuted.check] += refuted.examples or 0
        return done(refuted_by=refuted.check, **_shown(spec, refuted.reason, refuted.snippet))
    climbed: dict[str, Any] = {}
    if climbs:
        tell("ascent")
        climbed = _ascent(spec, seed, max(0.0, seconds - elapsed()), lambda: tell("ascent"))
    if "refuted_by" in climbed:
        return done(**climbed)
    tell("tightness")
    return done(**climbed, comparisons=compare(spec))


def _ascent(spec: BoundSpec, seed: int, seconds: float, advance: Callable[[], None]) -> dict[str, Any]:
    """Search for a block on which the bound is too small: what a report says of the search and of what it found."""
    if spec.target is Attention:
        found = falsify_widely(spec, seed=seed, seconds=seconds, progress=lambda step, ratio: advance())
    else:
        found = climb_widely(spec, seed=seed, seconds=seconds, progress=lambda ratio: advance())
    starts = found.starts
    if not found.refuted:
        return {"worst_ratio": found.ratio, "starts": starts}
    if isinstance(found, Falsification):
        found = shrink(spec, found)
        source = _snippet_of(spec, found)
    else:
        source = check_snippet(spec, "value", found.block, None, 0)
    reason = f"the truth must be <= the bound, got the bound {found.claimed!r} and the truth {found.reached!r}"
    return {"refuted_by": "ascent", "worst_ratio": found.ratio, "starts": starts, **_shown(spec, reason, source)}


def _shown(spec: BoundSpec, message: str, source: str) -> dict[str, str]:
    """The message and a file that shows it; where the file does not when it is run, the message says so instead."""
    if not (failure := why_not(source, spec)):
        return {"message": message, "snippet": source}
    return {
        "message": f"{message}. No file shows it: run, {failure}. Search again with another --seed, and see "
        "docs/verify.md on what a bound may do about underflow",
        "snippet": "",
    }


def _whole_rounds(spec: BoundSpec, tried: dict[str, int]) -> int:
    """Rounds of all checks that draw blocks; those on fixed blocks run once."""
    return min(count for name, count in tried.items() if checks_of(spec)[name].fixed is None)


def compare(spec: BoundSpec, *, radius: float = 0.1, seed: int = 0) -> list[Comparison]:
    """Tightness of a bound and of all registered ones of its kind and scope, on a seeded sample, tightest first.

    The truth is the norm at the input (in the norms `token`, `token_mean` what a search reaches of it); for the other
    scopes, too, so that their ratios are never smaller than those to the constant on the ball or the compact set.

    Args:
        spec: an upper bound of dot-product attention; for others the list is empty.
        radius: for a bound on a ball; for one on a compact set it is the largest norm of a token of the sample.
        seed: of the sample.
    """
    if spec.claim.kind != "proved" or spec.target is not Attention:
        return []
    alike = select(kind="proved", scope=spec.claim.scope, role="bound", target=spec.target)
    rivals = [rival for rival in alike if rival.name != spec.name and rival.claim.norm == spec.claim.norm]
    blocks = _sample(spec, seed)
    truths = [reached_norm(block, spec.claim.norm)[0] for block in blocks]
    if spec.claim.scope == "compact":
        radius = max(float(block.x.norm(dim=-1).max()) for block in blocks)
    found = []
    for candidate in [spec, *rivals]:
        ratios = [
            float(candidate(block, radius if candidate.needs_radius else None).value.double() / truth)
            for block, truth in zip(blocks, truths, strict=True)
            if not candidate.missing_features(block) and float(truth) > 0
        ]
        if ratios:
            values = torch.tensor(ratios, dtype=torch.float64)
            worst = float(values.max())
            found.append(
                Comparison(name=candidate.name, median=float(values.quantile(0.5)), worst=worst, blocks=len(ratios))
            )
    return sorted(found, key=lambda comparison: comparison.median)


def _snippet_of(spec: BoundSpec, found: Falsification) -> str:
    """A file that computes the truth by itself; in other norms than `l2` one that runs the check `value` there."""
    if spec.claim.norm == "l2":
        return snippet(spec, found.block, found.radius, point=found.point)
    return check_snippet(spec, "value", found.block, found.radius, seed=0)


def _rounds(spec: BoundSpec, checks: list[str], more: Callable[[], bool]) -> Any:
    """(check, blocks, round) for one round at least, then while there is time."""
    drawn = {name: check.fixed is None for name, check in checks_of(spec).items()}
    number = 0
    while number == 0 or more():
        for check in checks:
            if number == 0 or (more() and drawn[check]):
                yield check, FIRST_ROUND * 2**number, number
        number += 1
        if not any(drawn[check] for check in checks):
            return


def _sample(spec: BoundSpec, seed: int) -> list[Any]:
    """Gaussian blocks of the features the bound supports, with logits from flat to peaked."""
    heads = 2 if "heads" in spec.supports else 1
    spreads = (0.1, 1.0, 3.0, 10.0)
    return [
        build(
            Recipe(
                seed=seed + index,
                n=(2, 4, 8)[index % 3],
                dim=(2, 4, 8)[index // 3 % 3],
                heads=heads,
                head_dim=2,
                value_dim=2,
                out_dim=(2, 4, 8)[index // 3 % 3],
                spread=spreads[index % len(spreads)],
            )
        )
        for index in range(COMPARED)
    ]
