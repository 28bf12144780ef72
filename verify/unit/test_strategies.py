"""The blocks that are drawn: every hard case occurs, and only what was asked for."""

from __future__ import annotations

import dataclasses as dc
import importlib
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipbounds import InvalidInput
from lipbounds.targets.rms_norm import NORM_OVER
from lipbounds.testing import strategies
from lipbounds.testing.recipes import GEOMETRIES, MASKS, NORMS, REGIMES, ROTATIONS, SPECTRA, Recipe, build
from verify.unit.sample_bounds import SEARCH


def drawn(strategy: st.SearchStrategy, examples: int = 300) -> list:
    found: list = []

    @hypothesis.settings(SEARCH, max_examples=examples)
    @hypothesis.seed(0)
    @given(strategy)
    def collect(value: object) -> None:
        found.append(value)

    collect()
    return found


def test_every_choice_is_drawn() -> None:
    found = drawn(strategies.recipes(), 600)
    for field, names in {
        "mask": MASKS, "rotary": ROTATIONS, "geometry": GEOMETRIES, "regime": REGIMES,
        "norm": NORMS, "norm_over": NORM_OVER, "norm_eps": strategies.NORM_EPS,
        "query": SPECTRA, "value": SPECTRA, "dtype": strategies.DTYPES, "moves": ("self", "query", "memory"),
        "spread": strategies.SPREADS, "scale": strategies.SCALES, "heads": (1, 2, 3, 4),
    }.items():  # fmt: skip
        assert set(names) <= {getattr(recipe, field) for recipe in found}, field
    assert max(recipe.n for recipe in found) > 16
    assert max(recipe.dim for recipe in found) > 16
    assert any(recipe.groups < recipe.heads for recipe in found)
    assert any(recipe.value_dim != recipe.head_dim for recipe in found)
    assert sum(recipe.value == "zero" or recipe.output == "zero" for recipe in found) < len(found) / 8


@pytest.mark.parametrize(
    "features",
    [
        (),
        ("heads",),
        ("biases",),
        ("mask",),
        ("cross",),
        ("rotary",),
        ("qk_norm",),
        ("some_queries",),
        ("heads", "mask"),
    ],
    ids=str,
)
def test_blocks_have_the_features_that_were_asked_for(features: tuple) -> None:
    present = [block.features for block in drawn(strategies.attention_blocks(features), 150)]
    assert all(found <= set(features) for found in present)
    assert set().union(*present) == set(features)


def test_blocks_can_be_limited() -> None:
    for block in drawn(strategies.attention_blocks(largest=4, batches=False, extreme=False, dtype=torch.float32), 60):
        assert max(*block.x.shape, *block.w_o.shape) <= 4
        assert block.batch_shape == ()
        assert block.dtype == torch.float32


def test_rows_of_logits_are_rows() -> None:
    found = drawn(strategies.logits(), 200)
    assert all(row.dim() == 1 and row.isfinite().any() for row in found)
    assert any(row.isneginf().any() for row in found)


def test_regimes_by_construction() -> None:
    free = Recipe(seed=4, n=6, dim=4, head_dim=4, spread=3.0)
    logits = build(free).logits
    assert (logits.amax(-1) - logits.amin(-1)).max().item() == pytest.approx(3.0)
    uniform = build(dc.replace(free, regime="uniform")).probabilities
    assert torch.allclose(uniform, torch.full_like(uniform, 1 / 6))
    half = build(dc.replace(free, regime="half", spread=1e4)).probabilities.sort(-1).values
    assert torch.allclose(half[..., -2:], torch.full_like(half[..., -2:], 0.5))
    one_hot = build(dc.replace(free, regime="one_hot", spread=1e4)).probabilities
    assert one_hot.amax(-1).min() > 1 - 1e-6
    sink = build(dc.replace(free, regime="sink", spread=100.0)).probabilities
    assert sink[..., -1].min() > 0.9


def test_fewer_tokens_leave_the_others_alone() -> None:
    large, small = build(Recipe(n=9, dim=5, seed=7)), build(Recipe(n=3, dim=2, seed=7))
    assert torch.equal(large.x[:3, :2], small.x)


def test_unknown_features_and_sizes_are_named(as_a_user_runs_it: None) -> None:
    with pytest.raises(InvalidInput, match="wings"):
        strategies.attention_blocks(["wings"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInput, match="largest=64"):
        strategies.attention_blocks(largest=64)


def test_a_seed_draws_the_same_whatever_modules_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = st.floats(allow_nan=False)
    before = drawn(numbers)
    (tmp_path / "many_constants.py").write_text(f"NUMBERS = {[k + 1 / 3 for k in range(300)]}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("many_constants")
    assert drawn(numbers) == before
