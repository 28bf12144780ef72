"""Attention distributions, constants and bounds of every block of the pretrained models at a few inputs.

An answer is one block: a run that is killed goes on from there.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench.engine.answers import Shown
from bench.engine.store import Answer, Store
from bench.pretrained.measures import BOUNDS, SHARP, distribution, norms, versions, without_sinks
from bench.pretrained.workloads import Pretrained, workloads
from bench.workloads.case import Case


VERSION = 1  # of what is computed here: raise it when numbers change
BLOCK, TIGHTEST, WITHOUT = "block", "sharp", "without sinks"


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        inputs: number of inputs, by workload; the others are left out.
        sharp: layers at which `sharp` is evaluated at the first input, by workload.
        hidden: number of inputs at which the sinks are hidden, by workload.
    """

    inputs: Mapping[str, int]
    sharp: Mapping[str, Sequence[int]] = dc.field(default_factory=dict)
    hidden: Mapping[str, int] = dc.field(default_factory=dict)


PROFILES = {
    "quick": Profile(inputs={"albert-rxn": 1}, sharp={"albert-rxn": (0,)}, hidden={"albert-rxn": 1}),
    # What one core can do in three quarters of an hour.
    "standard": Profile(
        inputs={"dinov2-s at 112 px": 20, "smollm2-135m": 2, "albert-rxn": 4, "dinov2-s at 224 px": 20},
        sharp={"dinov2-s at 112 px": (0, 6, 11), "smollm2-135m": (0, 15, 29), "albert-rxn": (0, 6, 11)},
        hidden={"dinov2-s at 112 px": 1, "smollm2-135m": 1, "albert-rxn": 1},
    ),
    "full": Profile(
        inputs={"dinov2-s at 112 px": 20, "smollm2-135m": 20, "albert-rxn": 8, "dinov2-s at 224 px": 20},
        sharp={
            **{"dinov2-s at 112 px": (0, 6, 11), "smollm2-135m": (0, 7, 15, 22, 29), "albert-rxn": (0, 6, 11)},
            "dinov2-s at 224 px": (0,),
        },
        hidden={"dinov2-s at 112 px": 4, "smollm2-135m": 4, "albert-rxn": 4, "dinov2-s at 224 px": 1},
    ),
}


def run(
    answers: Store, profile: Profile, *, force: bool = False, advance: Callable[[str], None] = lambda what: None
) -> None:
    """Everything of a profile that is not in the file yet.

    Args:
        answers: the file.
        profile: how much is done.
        force: make again what is in the file.
        advance: called before each block with its name.

    Raises:
        LipboundsError: a package with weights or images is not installed.
    """
    for workload in chosen(profile):
        cases = workload.cases(profile.inputs[workload.name])
        for number, (_, group) in enumerate(itertools.groupby(cases, key=lambda case: case.input)):
            for case in group:
                advance(f"{case.model}, {case.input}, layer {case.layer}")
                _asked(answers, case, number, workload, profile, force)
                case.release()


def chosen(profile: Profile) -> list[Pretrained]:
    """The workloads of a profile, in its order.

    Args:
        profile: how much is done.
    """
    known = {workload.name: workload for workload in workloads()}
    return [known[name] for name in profile.inputs]


def pieces(profile: Profile) -> int:
    """Number of calls of `advance` in a run."""
    return sum(workload.layers * profile.inputs[workload.name] for workload in chosen(profile))


def _asked(answers: Store, case: Case, number: int, workload: Pretrained, profile: Profile, force: bool) -> None:
    """What is asked at one block of the input with that number."""
    place = {
        **{"task": "pretrained", "version": VERSION, "model": case.model, "weights": case.model_hash},
        **{"input": case.input, "input_hash": case.input_hash, "layer": case.layer},
    }

    def ask(what: str, bounds: tuple[str, ...], work: Callable[[], Answer]) -> None:
        answers.ask({**place, "what": what, "bounds": versions(bounds)}, functools.partial(_timed, work), force=force)

    ask(BLOCK, BOUNDS, lambda: _block(case))
    if number == 0 and case.layer in profile.sharp.get(workload.name, ()):
        ask(TIGHTEST, (SHARP,), lambda: norms(case.block, (SHARP,)))
    if number < profile.hidden.get(workload.name, 0):
        ask(WITHOUT, BOUNDS, lambda: _without(case))


@torch.no_grad()
def _timed(work: Callable[[], Answer]) -> Answer:
    """The answer with the seconds of processor time that it took."""
    start = time.process_time()
    return {**work(), "seconds": round(time.process_time() - start, 3)}


def _block(case: Case) -> Answer:
    block = case.block
    return {"module": case.module, "tokens": block.tokens, **distribution(block), **norms(block)}


def _without(case: Case) -> Answer:
    hidden = without_sinks(case.block)
    return {"some": False} if hidden is None else {"some": True, **norms(hidden)}


def shown(found: Shown) -> dict[str, Any]:
    """What the page is made of: for each workload its description and its answers, in the order of the page.

    Args:
        found: the answers of a run.
    """
    data: dict[str, Any] = {}
    for workload in workloads():
        blocks = found.select(what=BLOCK, model=workload.name)
        if blocks:
            more = {what: found.select(what=what, model=workload.name) for what in (TIGHTEST, WITHOUT)}
            more[WITHOUT] = [answer for answer in more[WITHOUT] if answer["some"]]
            data[workload.name] = {"about": workload.about, "first": workload.first, BLOCK: blocks, **more}
    return data


def violations(data: dict[str, Any]) -> list[str]:
    """Bounds below the constant that they bound: there must be none.

    Args:
        data: what `shown` returned.
    """
    return [
        f"{name}, {answer['input']}, layer {answer['layer']} ({what}): {bound} claims <= {value:.6g}, but "
        f"{answer['constant']:.6g} is reached"
        for name, of in data.items()
        for what in (BLOCK, TIGHTEST, WITHOUT)
        for answer in of[what]
        for bound, value in answer["bounds"].items()
        if not value >= answer["constant"] * (1 - 1e-9)
    ]
