"""How far above the true local Lipschitz constant each bound is: every bound at every block, and the reference.

The reference is the exact norm of the Jacobian where the block is small enough, and everywhere a lower bound and a
probable upper bound from Lanczos, which bracket the truth. It is shared by all scopes: the norm of the Jacobian at the
input is a lower bound of the constant on every set around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from bench.engine.evaluators import CPU, evaluator
from bench.engine.reference import CERTIFICATE, CERTIFICATE_OPTIONS, LOWER, SMALL, TASK, converged_lanczos
from bench.engine.schedule import Chain, Method, single
from bench.engine.session import Outcome, Session, declaration
from bench.engine.store import Store
from bench.engine.succession import LEAST_OF
from bench.workloads.case import Case
from bench.workloads.models import Model
from bench.workloads.radii import INPUTS, SEARCHED_INPUTS, multiples
from lipbounds import registry
from lipbounds.cluster import Cluster
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


# Bounds that cost seconds a block, with the number of inputs of each model they are evaluated at.
COSTLY = {"sharp_ball": 1, "sharp_ball.direct": 1, "sharp_ball.deviation": 1, "sharp_ball.taylor": 1}
# What sharp_ball is the least of, and keeps beside its value: at blocks of this many numbers it is enough.
PARTS, LARGE = ("sharp_ball.direct", "sharp_ball.deviation", "sharp_ball.taylor"), 2**15


def run(
    store: Store,
    models: Iterable[Model],
    *,
    quick: bool = False,
    force: bool = False,
    time_limit: float = 120.0,
    cluster: Cluster | None = None,
    device: torch.device = CPU,
    advance: Callable[[Case, float], None] = lambda case, seconds: None,
) -> Outcome:
    """Evaluate everything that is not in the store yet.

    Args:
        store: where records come from and go to.
        models: whose blocks are bounded.
        quick: few inputs.
        force: evaluate what is in the store again, too.
        time_limit: seconds for one evaluation.
        cluster: where evaluations are made; None for this process.
        device: that evaluates in this process.
        advance: called after each block with the seconds it was expected to take.
    """
    models = list(models)
    session = Session(
        store=store, task=TASK, methods=registry.select(), models={model.name: model.description for model in models},
        force=force, evaluator=evaluator(cluster, time_limit, device),
    )  # fmt: skip
    seconds = {model.name: model.seconds for model in models}
    blocks = _blocks(models, quick, store, session.outcome.problems)
    session.run(blocks, done=lambda case: advance(case, seconds[case.model]))
    return session.outcome


def _blocks(
    models: Iterable[Model], quick: bool, store: Store, problems: dict[str, str]
) -> Iterator[tuple[Case, list[Chain]]]:
    """Every method at one block after the other."""
    known = store.tokens()
    for model in models:
        inputs: set[str] = set()
        for case in _cases(model, model.count(quick), problems):
            inputs.add(case.input)
            case.known_tokens = known.get((case.model_hash, case.input_hash), 0)
            yield case, [*map(single, methods(case, len(inputs))), converged_lanczos()]


def _cases(model: Model, count: int, problems: dict[str, str]) -> Iterator[Case]:
    """The blocks of a model up to where it breaks: one broken model must not cost the others their numbers."""
    try:
        yield from model.cases(count)
    except Exception as error:
        problems[model.name] = f"{type(error).__name__}: {error}"


def methods(case: Case, number: int = 1) -> Iterator[Method]:
    """Every registered bound, refuted ones included, and the estimators that this block is small enough for.

    Lanczos from below is not among them: it is tried with more and more steps. Bounds that do not support the block
    are: what they say is recorded.

    Args:
        case: the block.
        number: of its input among those of the model, from 1: what has a radius is evaluated at the first ones only.
    """
    # What follows from the records of others comes after them.
    specs = sorted([*registry.select(), *registry.refuted()], key=lambda spec: (spec.name, spec.version) in LEAST_OF)
    for spec in specs:
        if spec.name == LOWER or not issubclass(Attention, spec.target) or not affordable(case, spec, number):
            continue
        options = CERTIFICATE_OPTIONS if spec.name == CERTIFICATE else {}
        for radius in multiples(spec.claim.scope):
            yield Method(spec, options, radius)


def affordable(case: Case, spec: BoundSpec, number: int) -> bool:
    """Whether the method is cheap enough at this block and input.

    Args:
        case: the block.
        spec: the bound or estimator.
        number: of the input, from 1.
    """
    searches = spec.role == "estimator" and spec.name != CERTIFICATE
    if spec.needs_radius and number > (SEARCHED_INPUTS if searches else INPUTS):
        return False
    if number > COSTLY.get(spec.name, number):
        return False
    if spec.name in PARTS and case.numbers >= LARGE:
        return False
    return not searches or case.size <= SMALL


def refuted() -> dict[str, dict[str, Any]]:
    """The declarations of the refuted formulas, of every kind of attention, by name."""
    return {spec.name: declaration(spec) for spec in registry.refuted()}
