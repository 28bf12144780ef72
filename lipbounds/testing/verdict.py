"""What a check says when a bound fails it."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import Unsupported
from lipbounds.registry import BoundSpec
from lipbounds.targets.target import Target
from lipbounds.testing.snippet import check_snippet


class Refuted(AssertionError):
    """A bound broke its promise at a block; the message ends with a Python snippet that shows it.

    Args:
        reason: what must hold and what was found.
        check: name of the check in `contract.checks_of(spec)`.
        spec: the bound.
        block: the counterexample.
        radius: of the ball, for the scopes that have one.
        seed: the number the check drew its own random numbers from.
        claimed: the number the bound returned.
        reached: the number it should have respected.
        source: the snippet; None for one that runs the check again.
    """

    def __init__(
        self,
        reason: str,
        *,
        check: str,
        spec: BoundSpec,
        block: Target,
        radius: float | None = None,
        seed: int = 0,
        claimed: float = math.nan,
        reached: float = math.nan,
        source: str | None = None,
    ) -> None:
        self.reason, self.check, self.spec_name = reason, check, spec.name
        self.block, self.radius, self.seed = block, radius, seed
        self.claimed, self.reached = claimed, reached
        self.snippet = source if source is not None else check_snippet(spec, check, block, radius, seed)
        self.examples: int | None = None  # blocks tried before the first failure; set by `contract.run_check`
        super().__init__(f"{spec.name} fails the check {check!r}: {reason}\n\n{self.snippet}")


def evaluate(
    check: str, spec: BoundSpec, block: Target, radius: float | None = None, seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Float[Tensor, "*batch"]:  # fmt: skip
    """The value of the bound in float64, with its gradient; an error it raises refutes it.

    Raises:
        Refuted: the bound raised an error, or returned NaN or a wrong shape.
        Unsupported: the bound refuses the block, which breaks no promise.
    """
    try:
        return spec(block, radius, grad=True, **(options or {})).value.to(torch.float64)
    except Unsupported:
        raise
    except Exception as error:
        raise Refuted(
            f"a valid block it supports must get a value, got {type(error).__name__}: {error}",
            check=check, spec=spec, block=block, radius=radius, seed=seed,
        ) from error  # fmt: skip
