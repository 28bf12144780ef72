"""The benchmark runs in its tests as it runs for users."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

from lipbounds.testing import pretend_device


pretend_device()  # before any backward pass


@pytest.fixture(autouse=True)
def _as_a_user_runs_it() -> Iterator[None]:
    """Without the shape checks that only tests switch on: those of the library keep them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """What a model is trained to depends on it, and processes share the threads there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
