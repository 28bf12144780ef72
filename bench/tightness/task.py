"""How far above the true local Lipschitz constant each bound is: every bound at every block, and the reference.

The reference is the exact norm of the Jacobian where the block is small enough, and everywhere a lower bound and a
probable upper bound from Lanczos, which bracket the truth. It is shared by all scopes: the norm of the Jacobian at the
input is a lower bound of the constant on every set around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.engine.evaluators import evaluator
from bench.engine.reference import CERTIFICATE, CERTIFICATE_OPTIONS, LOWER, SMALL, TASK, converged_lanczos
from bench.engine.schedule import Chain, Method, single
from bench.engine.session import Outcome, Session, declaration
from bench.engine.store import RecordStore
from bench.workloads.case import Case
from bench.workloads.models import Model
from bench.workloads.radii import INPUTS, SEARCHED_INPUTS, radii
from lipbounds import registry
from lipbounds.cluster import Cluster
from lipbounds.registry import BoundSpec


# Bounds that cost seconds a block, with the number of inputs of each model they are evaluated at.
COSTLY = {"sharp_ball": 1, "sharp_ball.direct": 1, "sharp_ball.deviation": 1, "sharp_ball.taylor": 1}
# What sharp_ball is the least of, and keeps beside its value: at blocks of this many numbers it is enough.
PARTS, LARGE = ("sharp_ball.direct", "sharp_ball.deviation", "sharp_ball.taylor"), 2**15


def run(
    store: RecordStore,
    models: Iterable[Model],
    *,
    quick: bool = False,
    force: bool = False,
    time_limit: float = 120.0,
    command: str = "",
    cluster: Cluster | None = None,
    advance: Callable[[Case, float], None] = lambda case, seconds: None,
) -> Outcome:
    """Evaluate everything that is not in the store yet.

    Args:
        store: where records come from and go to.
        models: whose blocks are bounded.
        quick: few inputs.
        force: evaluate what is in the store again, too.
        time_limit: seconds for one evaluation.
        command: the command line, for the environment line.
        cluster: where evaluations are made; None for this process.
        advance: called after each block with the seconds it was expected to take.
    """
    models = list(models)
    session = Session(
        store=store, task=TASK, methods=registry.select(), models={model.name: model.description for model in models},
        force=force, command=command, evaluator=evaluator(cluster, time_limit),
    )  # fmt: skip
    seconds = {model.name: model.seconds for model in models}
    session.run(_blocks(models, quick, session.outcome.problems), done=lambda case: advance(case, seconds[case.model]))
    return session.outcome


def _blocks(models: Iterable[Model], quick: bool, problems: dict[str, str]) -> Iterator[tuple[Case, list[Chain]]]:
    """Every method at one block after the other."""
    for model in models:
        inputs: set[str] = set()
        for case in _cases(model, model.count(quick), problems):
            inputs.add(case.input)
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
    for spec in [*registry.select(), *registry.refuted()]:
        if spec.name == LOWER or not isinstance(case.block, spec.target) or not affordable(case, spec, number):
            continue
        options = CERTIFICATE_OPTIONS if spec.name == CERTIFICATE else {}
        for radius in radii(case.block, spec.claim.scope):
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
    block = case.block
    if spec.name in PARTS and block.moving_input.numel() >= LARGE:
        return False
    return not searches or max(block.moving_input.numel(), block.tokens * block.w_o.shape[-1]) <= SMALL


def refuted() -> dict[str, dict[str, Any]]:
    """The declarations of the refuted formulas, of every kind of attention, by name."""
    return {spec.name: declaration(spec) for spec in registry.refuted()}
