"""Checks of the options that the iterative estimators share."""

from __future__ import annotations

from lipbounds.errors import InvalidInput


def check_steps_and_seed(steps: int, seed: int) -> None:
    """Raise InvalidInput unless `steps` >= 1 and `seed` is a number that torch.Generator takes."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidInput(f"steps must be a whole number >= 1, got steps={steps!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed must be a whole number with 0 <= seed < 2**63, got seed={seed!r}.")
