"""Zero weights of a head, and an input that stays, have no units: what stands in for them must not weigh in a bound."""

from __future__ import annotations

from typing import Any

import pytest

import lipbounds
from lipbounds.targets.attention import Attention
from lipbounds.testing.contract import CHECKS
from verify.unit.blocks import random_block


SCALING = CHECKS["scaling"]
BOUNDS = [spec for spec in lipbounds.registry.select(target=Attention) if SCALING.applies(spec)]
CROSS = [spec for spec in BOUNDS if "cross" in spec.supports]
SEEDS = (1, 3)  # odd ones go to the corners of the range of magnitudes


def check(spec: lipbounds.BoundSpec, block: Attention) -> None:
    for seed in SEEDS:
        SCALING.function(spec, block, radius=0.3 if spec.needs_radius else None, seed=seed)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", ["w_q", "w_k", "w_v", "w_o"])
@pytest.mark.parametrize("spec", [spec for spec in BOUNDS if "heads" in spec.supports], ids=lambda spec: spec.name)
def test_a_head_of_zero_weights_keeps_the_scaling_laws(spec: lipbounds.BoundSpec, name: str) -> None:
    block = random_block(5, n=3, dim=4, biases=False)
    zero = getattr(block, name).clone()
    zero[0] = 0
    check(spec, block.replace(**{name: zero}))


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("moves", ["query", "memory"])
@pytest.mark.parametrize("spec", CROSS, ids=lambda spec: spec.name)
def test_an_input_that_stays_keeps_the_scaling_laws(spec: lipbounds.BoundSpec, moves: Any) -> None:
    heads = 2 if "heads" in spec.supports else 1
    memory = random_block(6, n=2, dim=4).x
    check(spec, random_block(5, n=3, dim=4, heads=heads, biases=False, memory=memory, moves=moves))
