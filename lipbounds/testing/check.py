"""One property of a bound, as the contract lists it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import hypothesis
from hypothesis.strategies import SearchStrategy

from lipbounds.registry import BoundSpec
from lipbounds.testing.strategies import attention_blocks


FEWEST_EXAMPLES = 10
Case = tuple[Any, float | None]  # a block, and the radius for the scopes that have one


@runtime_checkable
class CheckFunction(Protocol):
    """Raises `Refuted` if the bound breaks its promise at the block."""

    def __call__(self, spec: BoundSpec, block: Any, radius: float | None = None, seed: int = 0) -> None: ...


@dc.dataclass(frozen=True, kw_only=True)
class Check:
    """One property of a bound.

    Args:
        function: raises `Refuted` where the property fails.
        applies: whether the property is promised by a bound.
        blocks: the blocks to draw for a bound.
        share: of the examples of the Hypothesis profile that this check gets.
        fixed: cases to run instead of drawing any, given the bound and the seconds of processor time they may take.
    """

    function: CheckFunction
    applies: Callable[[BoundSpec], bool] = lambda spec: True
    blocks: Callable[[BoundSpec], SearchStrategy[Any]] = lambda spec: attention_blocks(spec.supports)
    share: float = 0.25
    fixed: Callable[[BoundSpec, float], Iterable[Case]] | None = None

    @property
    def examples(self) -> int:
        """Blocks to draw under the current Hypothesis profile."""
        return max(FEWEST_EXAMPLES, round(self.share * hypothesis.settings().max_examples))

    @property
    def summary(self) -> str:
        """First line of the documentation of the check."""
        return (self.function.__doc__ or "").split("\n", 1)[0]
