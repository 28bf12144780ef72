"""How long bounds take beside one forward pass: `pytest bench/speed --benchmark-only`; not part of the tests.

One thread, weights known from earlier inputs; `--benchmark-compare` and `--benchmark-json` work as in pytest-benchmark.
What guards the costs in CI are counts of operations: verify/unit/test_operation_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.speed.plan import VIT, Shape
from lipbounds import get
from lipbounds.targets.attention import Attention
from lipbounds.targets.weight_norms import keep_weight_norms


SHAPES = {
    "vit-b16": VIT,
    "minilm": Shape(tokens=32, width=384, heads=12, biases=True),
    "small": Shape(tokens=64, width=64, heads=2),
}
BOUNDS: dict[str, dict[str, Any]] = {
    "yudin2025.biased": {},
    "centred.products": {},
    "sharp_cheap": {},
    "sharp_fast": {},
    "lanczos_posterior": {"within": 1.1},
    "yudin2025_ball.biased": {"radius": 0.1},
}


@pytest.fixture(params=SHAPES, scope="module")
def block(request: pytest.FixtureRequest) -> Attention:
    torch.set_num_threads(1)
    return SHAPES[request.param].block(torch.device("cpu"))


def test_forward(benchmark: Callable[..., Any], block: Attention) -> None:
    function = block.function()
    benchmark(lambda: function(block.moving_input))


@pytest.mark.parametrize("name", BOUNDS)
def test_bound(benchmark: Callable[..., Any], block: Attention, name: str) -> None:
    bound = get(name)
    with keep_weight_norms():
        bound(block.replace(), **BOUNDS[name])
        result = benchmark(lambda: bound(block.replace(), **BOUNDS[name]))
    assert bool(result.value.isfinite().all())
