"""The table of features: one row a registered method, and gradients that are measured."""

from __future__ import annotations

import pytest
from torch import Tensor

from bench.tests.samples import spec
from bench.tightness.features import SAMPLES, differentiable, page
from lipbounds import registry
from lipbounds.claims import FEATURES
from lipbounds.targets.attention import Attention


def detached(block: Attention) -> Tensor:
    return block.x.detach().norm()


def of_input(block: Attention) -> Tensor:
    return block.x.norm()


def of_weights(block: Attention) -> Tensor:
    return block.w_v.norm() + 0 * block.x.sum()


def of_both(block: Attention) -> Tensor:
    return block.values.norm()


def not_finite(block: Attention) -> Tensor:
    return (block.x * 0).norm() * 0 + (block.x - block.x).square().sum().sqrt()


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (detached, "no"),
        (of_input, "input"),
        (of_weights, "weights"),
        (of_both, "input and weights"),
        (not_finite, "no: not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_differentiable_is_measured(compute: object, expected: str) -> None:
    assert differentiable(spec(compute)) == expected  # pyright: ignore[reportArgumentType]


def test_every_registered_method_has_one_row_and_every_feature_a_column() -> None:
    specs = list(registry.registry)
    written = page(specs)
    rows = [line for line in written.splitlines() if line.startswith("| `")]
    assert sorted(line.split("`")[1] for line in rows) == sorted(each.name for each in specs)
    titles = [line for line in written.splitlines() if line.startswith("| name")]
    assert all(f"| {feature} " in line for line in titles for feature in FEATURES)


def test_a_row_says_what_the_declaration_says() -> None:
    bound = spec(on_set, scope="compact", norm="token", supports=frozenset({"mask"}), status="refuted")
    written = page([bound])
    (row,) = [line for line in written.splitlines() if line.startswith("| `test.bound`")]
    cells = [part.strip() for part in row.strip("|").split("|")]
    covered = ["yes" if feature == "mask" else "-" for feature in FEATURES]
    assert cells == ["`test.bound`", "proved", "compact", "token", *covered, "weights", "O(1)", "test"]
    assert "## Refuted formulas" in written.split("| name")[0]


def on_set(block: Attention, radius: float) -> Tensor:
    return radius * block.w_v.norm()


def test_the_samples_have_no_features_and_every_class_of_blocks_has_one() -> None:
    targets = {each.target for each in registry.registry}
    assert {target.__name__ for target in targets} <= set(SAMPLES)
    assert all(target(**SAMPLES[target.__name__]()).features == frozenset() for target in targets)
