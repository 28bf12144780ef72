"""A counterexample is printed as a file only where the file, run, shows it."""

from __future__ import annotations

import pytest
import torch

from lipbounds import Attention, BoundSpec
from lipbounds.testing import relation_checks, session
from lipbounds.testing.falsify import judge
from lipbounds.testing.oracles import jacobian_norm
from lipbounds.testing.recipes import build
from lipbounds.testing.snippet import check_snippet, snippet
from lipbounds.testing.snippet_run import why_not
from verify.unit.sample_bounds import GRID, spec


WRONG = spec(lambda block: 0.9 * jacobian_norm(block))
RIGHT = spec(lambda block: 1.1 * jacobian_norm(block))


def test_a_snippet_that_shows_its_violation_is_told_from_one_that_does_not() -> None:
    block = build(GRID[0])
    for make in (snippet, lambda s, b: check_snippet(s, "value", b, None, 0)):
        assert why_not(make(WRONG, block), WRONG) == ""
        assert why_not(make(RIGHT, block), RIGHT).startswith("it passes")
    assert "ends in NameError" in why_not("print(unknown)", WRONG)


def test_a_file_that_shows_nothing_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FIRST_ROUND", 3)
    sources = []

    def passes(source: str, spec: BoundSpec) -> str:
        sources.append(why_not(source, spec))
        return "it passes and prints 'claimed 0.0, truth 0.0'"

    monkeypatch.setattr(session, "why_not", passes)
    found = session.verify(WRONG, seconds=0.0)
    assert found.refuted_by
    assert sources == [""], "the true file shows it"
    assert found.snippet == ""
    assert "No file shows it: run, it passes and prints 'claimed 0.0, truth 0.0'" in found.message


def test_a_truth_below_all_normal_floats_refutes_nothing() -> None:
    def two_keys(apart: float) -> Attention:
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        memory = torch.tensor([[0.0], [-apart]], dtype=torch.float64)
        return Attention(x=one[0], memory=memory, moves="query", w_q=one, w_k=one, w_v=one, w_o=one, scale=1.0)

    nothing = spec(lambda block: torch.zeros((), dtype=torch.float64))
    assert judge(nothing, two_keys(700.0)).refuted  # 490000 exp(-700)
    found = judge(nothing, two_keys(740.0))
    assert 0 < found.reached < 1e-310
    assert not found.refuted


def test_corners_of_the_range_are_those_of_every_item_of_a_batch() -> None:
    """An item that is much smaller than another one left the range, and the refusal refuted a sound bound."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 2)} | dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (2, 1, 2, 2))
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["w_o"][0] *= 2.0**-60
    block = Attention(**tensors)
    exact = spec(lambda block: jacobian_norm(block) * (1 + 1e-9))
    for seed in (1, 3, 5, 7):
        relation_checks.scaling(exact, block, seed=seed)
