"""A counterexample is small, and the Python file that shows it runs."""

from __future__ import annotations

import dataclasses as dc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.testing.contract import CHECKS, Refuted, run_check
from lipbounds.testing.oracles import jacobian_norm
from lipbounds.testing.recipes import Recipe, build
from lipbounds.testing.snippet import snippet, tensor_source
from verify.unit.sample_bounds import AT_CENTRE, GRID, spec


# Searches: they run as users run them. Other tests keep the shape checks of what is used here.
pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")


@pytest.mark.parametrize(
    "factor",
    [lambda block: 1.0 if block.heads == 1 else 0.9, lambda block: 0.95 if block.double.logits.amax() > 8 else 1.0],
    ids=["several-heads", "large-logits"],
)
def test_a_failure_shrinks_to_a_handful_of_numbers(factor: Callable[[Attention], float]) -> None:
    wrong = spec(lambda block: jacobian_norm(block) * factor(block))
    with pytest.raises(Refuted) as caught:
        run_check(wrong, "value", max_examples=60, seed=1)
    block = caught.value.block
    assert block.batch_shape == ()
    assert max(block.tokens, block.source_input.shape[-2], block.x.shape[-1], block.w_o.shape[-1]) <= 3
    assert len(caught.value.snippet.splitlines()) < 60


USERS_MODULE = """
import torch
from lipbounds import Attention
from lipbounds.testing import jacobian_norm

def too_small(block: Attention) -> torch.Tensor:
    return 0.9 * jacobian_norm(block)
"""


def run_in_a_new_process(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "counterexample.py"
    path.write_text(source)
    search = os.pathsep.join([str(folder), str(Path(lipbounds.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": search}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, check=False)


def test_a_snippet_runs_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_users_module.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    block = build(dc.replace(GRID[5], dtype=torch.bfloat16, mask="relative_window"))
    done = run_in_a_new_process(snippet("a_users_module:too_small", block), tmp_path)
    assert done.returncode == 1
    assert "AssertionError: the bound is below the truth" in done.stderr
    claimed, truth = (float(part.split()[-1]) for part in done.stdout.split(","))
    assert claimed == pytest.approx(0.9 * truth)
    assert truth == pytest.approx(jacobian_norm(block).item(), rel=1e-10)


@pytest.mark.parametrize("recipe", GRID, ids=lambda r: f"{r.mask}-{r.moves}-{len(r.biases)}")
def test_the_truth_of_a_snippet_is_the_truth(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    block = build(recipe)
    source = snippet("yudin2025.biased", block)
    assert compile(source, "snippet", "exec")
    exec(source, {})  # a bound that holds: the assert passes
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(jacobian_norm(block).item(), rel=1e-10)


def test_a_snippet_shows_the_point_of_the_ball() -> None:
    block = build(GRID[0])
    with pytest.raises(Refuted) as caught:
        CHECKS["value"].function(AT_CENTRE, block, 0.5)
    refuted = caught.value
    source = refuted.snippet.replace("spec = ...", "spec = AT_CENTRE")
    with pytest.raises(AssertionError, match="the bound is below the truth"):
        exec(source, {"AT_CENTRE": AT_CENTRE})
    assert refuted.reached > refuted.claimed == jacobian_norm(block).item()


def test_a_snippet_runs_the_check_again_for_other_properties() -> None:
    wrong = spec(lambda block: jacobian_norm(block) + 1e-3)
    with pytest.raises(Refuted) as caught:
        CHECKS["scaling"].function(wrong, build(GRID[0]), None, 3)
    with pytest.raises(Refuted, match="'scaling'"):
        exec(caught.value.snippet.replace("spec = ...", "spec = WRONG"), {"WRONG": wrong})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_literals_are_exact(dtype: torch.dtype) -> None:
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    values[0, 0, 0] = -torch.inf
    again = eval(tensor_source(values), {"torch": torch, "inf": float("inf")})
    assert again.dtype == dtype
    assert torch.equal(again, values)
