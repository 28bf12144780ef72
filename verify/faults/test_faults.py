"""The verifier refutes every planted fault and no sound bound."""

from __future__ import annotations

import json
import re

import pytest

from lipbounds.registry import registry
from verify.faults.catalogue import CONTROLS, FAULTS
from verify.faults.detection import RESULTS
from verify.faults.hunt import FALSIFY, hunt


# What refutes a fault must be the verifier, not the shape checks that only tests switch on.
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")
# The check that refuted a fault when results/detection.json was written goes first: it should do so again.
RECORD = json.loads((RESULTS / "detection.json").read_text(encoding="utf-8"))
BEFORE: dict[str, str] = {row["name"]: row["caught_by"] for row in RECORD["faults"]}
# Of the ascent also the shape: it begins there.
SHAPES = {
    row["name"]: int(re.findall(r"seed (\d+)", row["reason"])[-1]) - RECORD["seed"]
    for row in RECORD["faults"]
    if row["caught_by"] == FALSIFY
}
CONTROL_EXAMPLES = 5  # of each check; the ci profile of the suite gives the registered bounds more
CONTROL_SECONDS = 1.0


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str) -> None:
    fault = FAULTS[name]
    outcome = hunt(fault.spec, first=BEFORE.get(name), skip=SHAPES.get(name, 0))
    assert outcome.caught_by is not None, fault.what


@pytest.mark.parametrize("name", CONTROLS)
def test_a_sound_bound_is_not_accused(name: str) -> None:
    control = CONTROLS[name]
    outcome = hunt(control.spec, max_examples=CONTROL_EXAMPLES, seconds=CONTROL_SECONDS)
    assert outcome.caught_by is None, outcome.reason


def test_faults_are_never_registered() -> None:
    planted = {fault.spec.name for fault in (*FAULTS.values(), *CONTROLS.values())}
    assert not planted & {spec.name for spec in registry}


def test_names_are_unique_and_explained() -> None:
    assert len({fault.spec.name for fault in FAULTS.values()}) == len(FAULTS) >= 45
    assert not set(FAULTS) & set(CONTROLS)
    assert all(fault.what.endswith(".") for fault in FAULTS.values())
