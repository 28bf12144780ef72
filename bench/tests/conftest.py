"""The benchmark runs in its tests as it runs for users."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def _as_a_user_runs_it() -> Iterator[None]:
    """Without the shape checks that only tests switch on: those of the library keep them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
