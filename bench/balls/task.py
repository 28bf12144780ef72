"""Bounds on a ball as curves over its radius, above the largest value that ascent finds in it.

A few blocks, radii from nearly nothing to a token's norm: layers of trained models on an input or two, and small blocks
without biases of the make for which figures of other methods are known (REFERENCES, quoted and not measured here).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bench.engine.evaluators import CPU, evaluator
from bench.engine.schedule import Method, single
from bench.engine.session import Outcome, Session
from bench.engine.store import Store
from bench.workloads.case import Case
from bench.workloads.hashes import recipe_hash
from bench.workloads.models import Model, zoo
from bench.workloads.radii import ONE, Multiple
from lipbounds import registry
from lipbounds.cluster import Cluster
from lipbounds.targets.attention import Attention


TASK = "balls"
SEED = 0  # of the small blocks
RELATIVE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the median norm of the tokens
NAMED = 0.1  # as it is: the radius that the target of ball bounds on MiniLM names
SMALL_RADII = (1e-3, 1e-2, 1e-1, 1.0)  # as they are: tokens of small blocks have norms of a few units
LOWER = "ascent_jacobians"
UPPERS = ("sharp_ball", "hu2024.ball")  # the first one carries the parts it is the least of
OPTIONS: dict[str, dict[str, Any]] = {"sharp_ball": {"dense": 2**22}, LOWER: {"steps": 4, "restarts": 2}}
LAYERS = {"minilm": (0, 3, 5), "digits-vit": (0,)}
INPUTS = {"minilm": (0, 2), "digits-vit": (0,)}  # numbers of the inputs: MiniLM's have 5 and 32 tokens
QUICK_LAYERS = {"minilm": (3,), "digits-vit": ()}
# n, D, H, gain of the queries; auto_LiRPA (IBP) and emltorch there, as multiples of the norm at the centre by radius.
SHAPES = {"random": (8, 16, 2, 1.0), "one-hot": (8, 16, 2, 12.0)}
REFERENCES = {
    "random": {"intervals (IBP)": {0.01: 1.431, 0.1: 7.01}, "Theorem 3, emltorch": {0.01: 35.5, 0.1: 36.3}},
    "one-hot": {"intervals (IBP)": {0.01: 3.374, 0.1: 24.68}, "Theorem 3, emltorch": {0.01: 30.5, 0.1: 31.4}},
}


def small_block(gain: float, n: int, dim: int, heads: int, seed: int = SEED) -> Attention:
    """Gaussian tokens; weights of variance 1/dim, the query weights times `gain`, which makes rows one-hot."""
    generator = torch.Generator().manual_seed(seed)
    width = dim // heads
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    shapes = {**dict.fromkeys(("w_q", "w_k", "w_v"), (heads, dim, width)), "w_o": (heads, width, dim)}
    weights = {name: torch.randn(*s, generator=generator, dtype=torch.float64) / dim**0.5 for name, s in shapes.items()}
    weights["w_q"] = gain * weights["w_q"]
    return Attention(x=x, **weights)


def _loaded(gain: float, n: int, dim: int, heads: int) -> tuple[str, Attention]:
    return "", small_block(gain, n, dim, heads)


def cases(quick: bool, models: Sequence[Model] | None = None) -> Iterator[tuple[Case, tuple[Multiple, ...]]]:
    """The blocks with the radii at which they are evaluated.

    Args:
        quick: fewer layers, one input.
        models: by default the zoo.
    """
    for name, (n, dim, heads, gain) in SHAPES.items():
        digest = recipe_hash(block="Gaussian", tokens=n, width=dim, heads=heads, gain=gain, seed=SEED)
        load = functools.partial(_loaded, gain, n, dim, heads)
        case = Case(model=f"small-{name}", model_hash=digest, input="seed-0", input_hash=digest, layer=0, load=load)
        yield case, tuple(Multiple(radius, ONE) for radius in SMALL_RADII)
    chosen = QUICK_LAYERS if quick else LAYERS
    for model in zoo() if models is None else models:
        layers = chosen.get(model.name, ())
        if not layers:
            continue
        inputs = INPUTS[model.name][: 1 if quick else None]
        count = 1 + max(inputs)
        for index, case in enumerate(itertools.islice(model.cases(count), count * model.layers)):
            if index // model.layers in inputs and case.layer in layers:
                yield case, (*map(Multiple, RELATIVE), Multiple(NAMED, ONE))


def run(
    store: Store,
    *,
    quick: bool = False,
    force: bool = False,
    time_limit: float = 120.0,
    cluster: Cluster | None = None,
    device: torch.device = CPU,
    models: Sequence[Model] | None = None,
    advance: Callable[[Case], None] = lambda case: None,
) -> Outcome:
    """Evaluate what is not in the store yet.

    Args:
        store: where records come from and go to.
        quick: fewer layers.
        force: evaluate what is in the store again, too.
        time_limit: seconds for one evaluation.
        cluster: where evaluations are made; None for this process.
        device: that evaluates in this process.
        models: by default the zoo.
        advance: called after each block.
    """
    session = Session(
        store=store, task=TASK, methods=[registry.get(name) for name in (*UPPERS, LOWER)], models={}, force=force,
        evaluator=evaluator(cluster, time_limit, device),
    )  # fmt: skip
    session.run(((case, [*map(single, _methods(radii))]) for case, radii in cases(quick, models)), done=advance)
    return session.outcome


def _methods(radii: Sequence[Multiple]) -> Iterator[Method]:
    """The centre first, then every method on every ball."""
    yield _method(UPPERS[0], Multiple(0.0, ONE))
    for radius in radii:
        for name in (*UPPERS, LOWER):
            yield _method(name, radius)


def _method(name: str, radius: Multiple) -> Method:
    return Method(registry.get(name), OPTIONS.get(name, {}), radius)
