"""Published formulas that are no bounds: each has its counterexample, and the search finds one without being told."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds.ops.softmax import inf_to_one_norm_upper
from lipbounds.registry import BoundSpec
from lipbounds.testing.contract import Refuted, checks_of, run_check
from verify.golden.witnesses import WITNESSES


REFUTED = lipbounds.registry.refuted()


def test_every_refuted_formula_has_its_counterexample() -> None:
    assert set(WITNESSES) == {spec.name for spec in REFUTED}


@pytest.mark.parametrize("spec", REFUTED, ids=lambda spec: spec.name)
def test_the_counterexample_is_one(spec: BoundSpec) -> None:
    block, radius = WITNESSES[spec.name]()
    with pytest.raises(Refuted):
        checks_of(spec)["value"].function(spec, block, radius=radius, seed=0)


@pytest.mark.parametrize("spec", REFUTED, ids=lambda spec: spec.name)
def test_the_search_finds_one_by_itself(spec: BoundSpec, without_shrinking: None) -> None:
    with pytest.raises(Refuted):
        run_check(spec, "value", max_examples=2000)


@pytest.mark.parametrize("row", [(0.5, 0.5), (0.5, 0.25, 0.25)], ids=len)
def test_n_over_4_is_below_the_norm_of_a_softmax_row_from_l_inf_to_l1(row: tuple[float, ...]) -> None:
    """VeriStressGT (arXiv 2605.17153): a formula of a row, so in no registry; docs/bounds/refuted.md."""
    p = torch.tensor(row, dtype=torch.float64)
    jacobian = torch.diag(p) - torch.outer(p, p)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(row))
    truth = float((signs @ jacobian).abs().sum(-1).amax())  # a convex function on the cube is largest at a corner
    assert truth == 1.0 > len(row) / 4
    assert truth <= float(inf_to_one_norm_upper(p)) <= 1 + 1e-12
