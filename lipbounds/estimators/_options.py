"""Checks of the options that the iterative estimators share."""

from __future__ import annotations

from lipbounds.errors import InvalidInput


def check_count(name: str, count: int) -> None:
    """Raise InvalidInput unless the option `name` is a whole number >= 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidInput(f"{name} must be a whole number >= 1, got {name}={count!r}.")


def check_seed(seed: int) -> None:
    """Raise InvalidInput unless `seed` is a number that torch.Generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidInput(f"seed must be a whole number with 0 <= seed < 2**63, got seed={seed!r}.")


def check_steps_and_seed(steps: int, seed: int) -> None:
    """Raise InvalidInput unless `steps` >= 1 and `seed` is a number that torch.Generator takes."""
    check_count("steps", steps)
    check_seed(seed)
