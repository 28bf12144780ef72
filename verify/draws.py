"""Blocks that depend on the seed alone."""

from __future__ import annotations

from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants


def pin_draws() -> None:
    """Let a seed of Hypothesis give the same draws in every process, and for every change of the code.

    Hypothesis draws constants that stand in the modules loaded so far, too. Which those are depends on what ran before
    and on how the process was started; without them a search is repeated by its seed.
    """
    nothing = Constants()
    providers._get_local_constants = lambda: nothing
