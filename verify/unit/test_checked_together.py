"""Checks that are read together: none is lost, whatever ends the call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lipbounds.claims import check_result
from lipbounds.devices import checked_together, refuse
from lipbounds.errors import InvalidInput


WRONG = torch.tensor([False, True])


class Limit(BaseException):
    """As a limit of time ends a call: no Exception, so that nothing catches it on the way."""


@pytest.mark.parametrize("failure", [Limit, KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_call_that_is_ended_leaves_the_checks_of_later_calls(failure: type[BaseException]) -> None:
    with pytest.raises(failure), checked_together():
        raise failure
    with pytest.raises(InvalidInput, match="now"):
        refuse((WRONG, lambda: InvalidInput("now")))
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    with pytest.raises(InvalidInput, match="NaN"):
        check_result("test", nan, nan.shape)


def refused_then(work: Callable[[], object]) -> None:
    with checked_together():
        refuse((WRONG, lambda: InvalidInput("first")), (WRONG, lambda: InvalidInput("second")))
        work()


def test_checks_wait_for_the_end_and_come_before_what_they_cause() -> None:
    reached: list[int] = []
    with pytest.raises(InvalidInput, match="first"):
        refused_then(lambda: reached.append(1))
    assert reached == [1]
    with pytest.raises(InvalidInput, match="first") as caught:
        refused_then(lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_inside_of_another_call_the_outer_checks_are_kept() -> None:
    def inner() -> None:
        with checked_together():
            refuse((~WRONG & False, lambda: InvalidInput("inner")))

    with pytest.raises(InvalidInput, match="first"):
        refused_then(inner)
