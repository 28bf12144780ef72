"""Bounds on balls around short inputs of the pretrained models, and what refuses their blocks.

An answer is one bound on one ball, so that a new version of a bound measures that bound alone again.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.engine.answers import Shown
from bench.engine.evaluate import TimeLimitReached, limited
from bench.engine.records import content_hash
from bench.engine.store import Answer, Store
from bench.engine.store_file import Entry
from bench.pretrained.measures import versions
from bench.pretrained.workloads import Pretrained, short_workloads
from bench.workloads.case import Case
from bench.workloads.radii import Multiple
from lipbounds import registry
from lipbounds.bound_spec import NOT_COVERED
from lipbounds.claims import FEATURES
from lipbounds.errors import Unsupported


VERSION = 1  # of what is computed here: raise it when numbers change
UPPERS = ("sharp_ball", "yudin2025_ball.biased", "hu2024.ball")
LOWER = "ascent_jacobians"
OPTIONS: Mapping[str, Mapping[str, Any]] = {LOWER: {"steps": 4, "restarts": 2}}
RELATIVE = (1e-3, 0.03)  # of the median norm of the tokens that enter the block
TIME_LIMIT = 60  # seconds of processor time for one bound on one ball


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        layers: at the first input, by workload.
        relative: radii over the median norm of the tokens.
    """

    layers: Mapping[str, Sequence[int]]
    relative: Sequence[float] = RELATIVE


PROFILES = {
    "quick": Profile(layers={"albert-rxn": (6,)}, relative=RELATIVE[:1]),
    "standard": Profile(
        layers={"albert-rxn": (0, 6, 11), "dinov2-s at 56 px": (0, 6, 11), "smollm2-135m": (0, 15, 29)}
    ),
}


def chosen(profile: Profile) -> list[Pretrained]:
    """The workloads of a profile, in its order.

    Args:
        profile: how much is done.
    """
    known = {workload.name: workload for workload in short_workloads()}
    return [known[name] for name in profile.layers]


def pieces(profile: Profile) -> int:
    """Number of calls of `advance` in a run."""
    return sum(map(len, profile.layers.values())) * len(profile.relative) * (len(UPPERS) + 1)


def run(
    answers: Store, profile: Profile, *, force: bool = False, advance: Callable[[str], None] = lambda what: None
) -> None:
    """Everything of a profile that is not in the file yet.

    Args:
        answers: the file.
        profile: how much is done.
        force: make again what is in the file.
        advance: called before each bound with the name of the block.

    Raises:
        LipboundsError: a package with weights or images is not installed.
    """
    for workload in chosen(profile):
        for case in workload.cases(1):
            for relative in profile.relative if case.layer in profile.layers[workload.name] else ():
                for name in (*UPPERS, LOWER):
                    advance(f"{case.model}, layer {case.layer}, {name}")
                    place = {
                        **{"task": "pretrained_balls", "version": VERSION, "model": case.model},
                        **{"weights": case.model_hash, "input": case.input, "input_hash": case.input_hash},
                        **{"layer": case.layer, "relative": relative, "bound": name, "bounds": versions((name,))},
                        "options": dict(OPTIONS.get(name, {})),
                    }
                    again = force or _is_covered_now(answers.entries.get(content_hash(place)), name)
                    answers.ask(place, functools.partial(_on_ball, case, name, relative), force=again)
            case.release()


def _is_covered_now(known: Entry | None, name: str) -> bool:
    """Whether the bound refused a block in an answer for features that it supports by now: its version stays then."""
    refused = "" if known is None else known.flat.get("refused", "")
    named = {feature for feature in FEATURES if f"{feature} ({FEATURES[feature]})" in refused}
    return NOT_COVERED in refused and bool(named) and named <= registry.get(name).supports


def _on_ball(case: Case, name: str, relative: float) -> Answer:
    """What a bound says of a ball, or why it says nothing, with the seconds of processor time that it took."""
    radius = Multiple(relative).at(case.block).value
    found: Answer = {"tokens": case.block.tokens, "radius": radius}
    fresh = case.block.replace()  # without what the bound before has cached, which would flatter the time
    start = time.process_time()
    try:
        with torch.no_grad(), limited(TIME_LIMIT, of="processor"):
            result = registry.get(name)(fresh, radius=radius, **OPTIONS.get(name, {}))
    except Unsupported as error:
        return {**found, "refused": str(error)}
    except TimeLimitReached:
        return {**found, "refused": f"`{name}` had no result after {TIME_LIMIT} s of processor time."}
    return {**found, "value": result.value.item(), "seconds": round(time.process_time() - start, 3)}


def shown(found: Shown) -> dict[str, Any]:
    """For each workload its description and, for each layer and relative radius, the answers by bound.

    Args:
        found: the answers of a run.
    """
    data: dict[str, Any] = {}
    for workload in short_workloads():
        balls: dict[tuple[int, float], dict[str, Answer]] = {}
        for answer in found.select(model=workload.name):
            balls.setdefault((answer["layer"], answer["relative"]), {})[answer["bound"]] = answer
        if balls:
            data[workload.name] = {"about": workload.about, "balls": balls}
    return data


def violations(data: dict[str, Any]) -> list[str]:
    """Bounds below what ascent reached in the same ball: there must be none.

    Args:
        data: what `shown` returned.
    """
    return [
        f"{name}, layer {layer}, radius {relative:g} of a token: {bound} claims <= {answer['value']:.6g}, but "
        f"{at[LOWER]['value']:.6g} is reached"
        for name, of in data.items()
        for (layer, relative), at in of["balls"].items()
        for bound, answer in at.items()
        if bound != LOWER and "value" in answer and "value" in at.get(LOWER, {})
        if not answer["value"] >= at[LOWER]["value"] * (1 - 1e-9)
    ]
