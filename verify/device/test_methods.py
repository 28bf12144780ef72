"""Every registered bound and estimator on a device of its own: the numbers of the CPU, on that device."""

from __future__ import annotations

import pytest
import torch

from lipbounds import BoundSpec, registry
from verify.device.blocks import BLOCKS, assert_same


def blocks_of(spec: BoundSpec) -> list[str]:
    """The two blocks with most features that it supports: more of them cost more than they show."""
    return [
        name for name, block in BLOCKS.items() if isinstance(block, spec.target) and not spec.missing_features(block)
    ][-2:]


CASES = [
    pytest.param(spec, name, id=f"{spec.name}, {name}") for spec in registry.standing() for name in blocks_of(spec)
]


def test_every_method_has_a_block() -> None:
    assert {case.values[0].name for case in CASES} == {spec.name for spec in registry.standing()}  # pyright: ignore


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(("spec", "name"), CASES)
def test_a_method_is_that_of_the_cpu(spec: BoundSpec, name: str) -> None:
    block, radius = BLOCKS[name], 0.1 if spec.needs_radius else None
    assert_same(spec(block.to("pretend"), radius), spec(block, radius))


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["yudin2025.biased", "covariance.exact", "yudin2025_ball.biased"])
def test_short_dtypes(name: str, dtype: torch.dtype) -> None:
    block, spec = BLOCKS["biases"].to(dtype), registry.get(name)
    radius = 0.1 if spec.needs_radius else None
    # On the CPU alone it may be evaluated in float32.
    options = {"precision": "float64"} if "precision" in spec.defaults else {}
    assert_same(spec(block.to("pretend"), radius), spec(block, radius, **options), rtol=1e-2)
