"""Every registered bound and estimator against every check that applies to it, or the one given by `--bound`."""

from __future__ import annotations

import pytest

from lipbounds import registry
from lipbounds.registry import BoundSpec
from lipbounds.testing.contract import checks_for, load_spec, run_check


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = metafunc.config.getoption("--bound")
    specs = [load_spec(path) for path in chosen] if chosen else registry.standing()
    cases = [(spec, check) for spec in specs for check in checks_for(spec)]
    metafunc.parametrize(("spec", "check"), cases, ids=[f"{spec.name}-{check}" for spec, check in cases])


# The searches run as users run the bound. This one keeps the shape checks that only tests switch on.
SHAPES_CHECKED = ("returns",)


def test_contract(spec: BoundSpec, check: str, request: pytest.FixtureRequest) -> None:
    if check not in SHAPES_CHECKED:
        request.getfixturevalue("as_a_user_runs_it")
    run_check(spec, check)
