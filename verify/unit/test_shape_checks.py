"""The shape checks of the tests: every kind of call is checked, and one that has passed is not checked again."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from verify import shapes
from verify.unit.blocks import random_block


def watched(function: Any) -> tuple[Callable[..., Any], list[int]]:
    """The function as the modules of the library are decorated, and one entry for each call that was checked."""
    checks: list[int] = []

    def check(plain: Callable[..., Any]) -> Callable[..., Any]:
        checked = jaxtyping._decorator.jaxtyped(plain, typechecker=beartype.beartype)

        def counted(*args: Any, **kwargs: Any) -> Any:
            checks.append(1)
            return checked(*args, **kwargs)

        return counted

    return shapes._once_for_each_kind(function, check), checks


def test_each_kind_of_call_is_checked_once() -> None:
    def both(first: Float[Tensor, " n"], second: Float[Tensor, " n"], times: int = 1) -> Float[Tensor, " n"]:
        return times * (first + second)

    call, checks = watched(both)
    for n in (2, 3, 2, 3):
        call(torch.zeros(n), torch.ones(n))
    assert len(checks) == 2
    call(torch.zeros(2, dtype=torch.float64), torch.ones(2))
    call(torch.zeros(2), torch.ones(2), 2)
    call(torch.zeros(2), torch.ones(2), times=2)
    assert len(checks) == 5
    for wrong in ((torch.zeros(2), torch.ones(1)), (torch.zeros(2), torch.ones(2), 1.0), (torch.zeros(2), None)):
        for _ in range(2):  # what has failed has not passed
            with pytest.raises(jaxtyping.TypeCheckError):
                call(*wrong)
    assert len(checks) == 11


def test_a_result_of_another_shape_is_told() -> None:
    def half(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return values[: len(values) // 2 + 1]

    call, _ = watched(half)
    assert call(torch.zeros(1)).shape == (1,)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        call(torch.zeros(4))


def test_objects_are_told_apart_by_what_they_hold() -> None:
    block = random_block(1)
    same, short, other = random_block(2), block.to(torch.float32), random_block(1, n=block.tokens + 1)
    kinds = [shapes.kind_of(found) for found in (block, same, short, other)]
    assert kinds[0] == kinds[1]
    assert len(set(kinds)) == 3
    assert shapes.kind_of(block) == kinds[0]
    assert shapes.kind_of([block, 1]) != shapes.kind_of([block, 2]) != shapes.kind_of((block, 2))


def test_what_is_not_known_is_always_checked() -> None:
    @dc.dataclass
    class Strange:
        size: int

    def sized(strange: Any) -> Float[Tensor, " 2"]:
        return torch.zeros(strange.size)

    call, checks = watched(sized)
    for _ in range(2):
        call(Strange(2))
    with pytest.raises(jaxtyping.TypeCheckError):
        call(Strange(3))
    assert len(checks) == 3


def test_the_library_is_decorated_so() -> None:
    from lipbounds.ops.spectral import spectral_norm_upper

    assert spectral_norm_upper.__code__ is not spectral_norm_upper.__wrapped__.__code__  # pyright: ignore
    assert spectral_norm_upper.__wrapped__.__code__ in shapes._seen  # pyright: ignore
    with pytest.raises(jaxtyping.TypeCheckError):
        spectral_norm_upper(torch.zeros(3))
