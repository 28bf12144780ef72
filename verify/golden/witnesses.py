"""For each formula kept as refuted, an input at which it is below the truth: the smallest that was found.

A name of the registry -> a function that returns the block, and the radius for the scopes that have one.
"""

from __future__ import annotations

from collections.abc import Callable

from lipbounds.targets.target import Target


Witness = tuple[Target, float | None]

WITNESSES: dict[str, Callable[[], Witness]] = {}
