"""What bounds cost, in operations: counted by torch and by the dispatcher, so that no clock is read.

Multiplications and additions of products of matrices (torch's counter), in units of one forward pass, and the number of
operators that run. Eigenvalue problems are not in the first count: they are counted by their size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lipbounds import Attention, get
from lipbounds.estimators._fused import FusedOperator
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.targets.weight_norms import keep_weight_norms


# name: options, flops in forward passes, operators without views; each a fifth above what was counted.
LIMITS: dict[str, tuple[dict[str, Any], float, int]] = {
    "yudin2025.biased": ({}, 1.3, 485),
    "yudin2025.biased in float64": ({"precision": "float64"}, 1.35, 1020),
    "yudin2025_ball.biased": ({"radius": 0.1}, 1.8, 1110),
    "centred.products": ({}, 1.6, 1480),
    "covariance.exact": ({}, 15.0, 950),
    "sharp_cheap": ({}, 5.5, 1720),
    "sharp_fast": ({}, 71.0, 3740),
}
VIEWS = ("view", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze", "detach", "t.", "alias")


class Operators(TorchDispatchMode):
    """Counts operators that compute, and the sizes of eigenvalue problems."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest_eigenproblem = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        self.count += not any(view in name for view in VIEWS)
        if "eigh" in name:
            self.largest_eigenproblem = max(self.largest_eigenproblem, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def block_of(tokens: int, width: int, heads: int) -> Attention:
    draw = torch.Generator().manual_seed(0)
    scaled = lambda *shape: torch.randn(*shape, generator=draw) * width**-0.5  # noqa: E731
    weights = {name: scaled(heads, width, width // heads) for name in ("w_q", "w_k", "w_v")}
    return Attention(x=torch.randn(tokens, width, generator=draw), w_o=scaled(heads, width // heads, width), **weights)


def flops_of(call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counted(name: str, options: dict[str, Any]) -> tuple[float, int, int]:
    """Flops in forward passes, operators, and the largest eigenvalue problem, once the weights are known."""
    block = block_of(64, 96, 6)
    function, bound = block.function(), get(name)
    forward = flops_of(lambda: function(block.moving_input))
    with keep_weight_norms():
        bound(block.replace(), **options)
        flops = flops_of(lambda: bound(block.replace(), **options))
        with Operators() as operators:
            bound(block.replace(), **options)
    return flops / forward, operators.count, operators.largest_eigenproblem


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", LIMITS)
def test_a_bound_costs_no_more_than_it_did(name: str) -> None:
    options, flops, operators = LIMITS[name]
    found = counted(name.partition(" ")[0], options)
    assert found[0] <= flops, "more multiplications than before: say why, and raise the limit"
    assert found[1] <= operators, "more operators than before: say why, and raise the limit"
    assert found[0] >= flops / 2, "far fewer multiplications: lower the limit"


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_the_cheap_bound_solves_no_eigenproblem_larger_than_a_head() -> None:
    assert counted("sharp_cheap", {})[2] == 16


def test_a_gram_step_costs_two_and_a_half_passes() -> None:
    block = block_of(64, 96, 6)
    forward = flops_of(lambda: block.function()(block.moving_input))
    fused, plain = FusedOperator(block), JacobianOperator(block)
    vector = torch.ones(fused.size, dtype=torch.float64)
    assert flops_of(lambda: fused.gram(vector)) <= 2.6 * forward
    assert flops_of(lambda: fused.gram(vector)) <= flops_of(lambda: plain.gram(vector))
