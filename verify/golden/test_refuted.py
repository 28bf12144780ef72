"""Published formulas that are no bounds: each has its counterexample, and the search finds one without being told."""

from __future__ import annotations

import pytest

import lipbounds
from lipbounds.registry import BoundSpec
from lipbounds.testing.contract import Refuted, checks_of, run_check
from verify.golden.witnesses import WITNESSES


REFUTED = lipbounds.registry.refuted()


def test_every_refuted_formula_has_its_counterexample() -> None:
    assert set(WITNESSES) == {spec.name for spec in REFUTED}


@pytest.mark.parametrize("spec", REFUTED, ids=lambda spec: spec.name)
def test_the_counterexample_is_one(spec: BoundSpec) -> None:
    block, radius = WITNESSES[spec.name]()
    with pytest.raises(Refuted):
        checks_of(spec)["value"].function(spec, block, radius=radius, seed=0)


@pytest.mark.parametrize("spec", REFUTED, ids=lambda spec: spec.name)
def test_the_search_finds_one_by_itself(spec: BoundSpec, without_shrinking: None) -> None:
    with pytest.raises(Refuted):
        run_check(spec, "value", max_examples=2000)
