"""Fixtures, options and Hypothesis profiles shared by all tests."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase

from verify.draws import pin_draws
from verify.shapes import check_each_kind_of_call_once


check_each_kind_of_call_once()  # before the library is imported

# ci: the whole of .ci/run under twenty minutes on two cores; nightly: what a release is believed on.
SHARED = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
hypothesis.settings.register_profile("ci", max_examples=100, **SHARED)
hypothesis.settings.register_profile("nightly", max_examples=10_000, **SHARED)
hypothesis.settings.register_profile("quick", max_examples=40, phases=[Phase.reuse, Phase.generate], **SHARED)
hypothesis.settings.load_profile("ci")
# Files with single tests of half a minute.
LONGEST = frozenset({"test_howtos.py", "test_certified.py", "test_robustness.py", "test_render.py", "test_ray.py"})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bound",
        action="append",
        default=[],
        metavar="package.module:attribute",
        help="run the contract suite on this bound alone (a registered name will do, too); repeatable",
    )


@pytest.hookimpl(tryfirst=True)  # before the plugin of Hypothesis reads its seed
def pytest_configure(config: pytest.Config) -> None:
    from lipbounds.testing import pretend_device

    pretend_device()  # before any backward pass
    torch.set_num_threads(1)  # the blocks are small, and xdist takes the cores
    if config.getoption("--hypothesis-seed") is None:  # a new search every time, but one that can be repeated
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    pin_draws()


def pytest_report_header(config: pytest.Config) -> str:
    return f"the searches are repeated by --hypothesis-seed={config.getoption('--hypothesis-seed')}"


def pytest_collection_finish() -> None:
    """What the tests have loaded stays: it is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)  # cycles may hold large tensors


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --bound, nothing but the contract of that bound is run; what takes longest begins first."""
    if config.getoption("--bound"):
        others = [item for item in items if item.path.parent.name != "contract"]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    items.sort(key=lambda item: item.path.name not in LONGEST)  # else a worker waits for the other one in the end


@pytest.fixture
def as_a_user_runs_it() -> Iterator[None]:
    """Without the shape checks that only tests switch on: the library's own errors must come first for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def without_shrinking() -> Iterator[None]:
    """For searches that are meant to find something: the first counterexample will do."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.register_profile("without shrinking", phases=[Phase.generate], database=None)
    hypothesis.settings.load_profile("without shrinking")
    yield
    hypothesis.settings.load_profile(before)
