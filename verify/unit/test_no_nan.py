"""Where no number is left, an upper bound is infinity or our error: never NaN, never an error of an eigensolver."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lipbounds
from lipbounds import Attention, LipboundsError
from lipbounds.compose.joint import JointNetwork
from lipbounds.ops import eigen
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper
from lipbounds.registry import select
from lipbounds.targets.layers import Flatten, Layer, Linear, Sequence, layer_norm, rms_norm
from verify.unit.networks import Draw


PACKAGE = Path(lipbounds.__file__).parent
DECOMPOSITIONS = {
    "cholesky", "cholesky_ex", "cond", "eig", "eigh", "eigvals", "eigvalsh", "lstsq", "matrix_norm", "matrix_rank",
    "pinv", "qr", "svd", "svdvals",
}  # fmt: skip
INDEFINITE = [[1.0, 0.0], [0.0, -1.0]]


def test_decompositions_are_called_in_one_guarded_module() -> None:
    """All but those of the oracles, which share no code with what they judge, and of the models themselves."""
    apart = {PACKAGE / "ops" / "eigen.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path in apart or {"testing", "models"} & set(path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in DECOMPOSITIONS:
                assert ast.unparse(node.value) not in ("torch", "torch.linalg", "linalg"), f"{path}:{node.lineno}"
            assert not (isinstance(node, ast.ImportFrom) and node.module == "torch.linalg"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_one_matrix_of_a_batch_that_is_not_finite_leaves_the_others_alone(entry: float) -> None:
    good = Draw(0)(3, 3)
    good = good @ good.mT
    both = torch.stack([good, torch.full_like(good, entry)])
    assert eigen.largest_eigenvalue(both).tolist() == [eigen.largest_eigenvalue(good).item(), torch.inf]
    values, vectors = eigen.eigen(both)
    assert values[1].tolist() == [torch.inf] * 3
    assert torch.allclose(vectors[0] @ values[0].diag() @ vectors[0].mT, good)
    triangle, ended = eigen.try_cholesky(both)
    assert ended.tolist() == [True, False]
    assert triangle[1].isnan().all()
    assert eigen.triangle(both)[1].isnan().all()
    assert spectral_norm_upper(both)[1] == torch.inf
    assert product_norm_upper(both, good)[1] == torch.inf
    assert product_norm_upper(both, good)[0].isfinite()
    with pytest.raises(lipbounds.Unsupported, match="finite entries"):
        eigen.singular(both)


def test_a_factorisation_that_breaks_off_has_no_triangle() -> None:
    triangle, ended = eigen.try_cholesky(torch.tensor(INDEFINITE, dtype=torch.float64))
    assert not ended
    assert triangle.isnan().all()


def test_a_solver_that_does_not_converge_costs_tightness_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    gram = torch.tensor([[2.0, 9.0], [1.0, 3.0]], dtype=torch.float64)  # the lower triangle counts
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert eigen.largest_eigenvalue(gram) == 4.0
    with pytest.raises(lipbounds.Unsupported, match="does not converge"):
        eigen.eigen(gram)


COLLAPSED: dict[str, tuple[Callable[..., Layer], Tensor, float]] = {
    "equal features": (layer_norm, torch.ones(1, 6, dtype=torch.float64), 0.0),
    "a zero token": (rms_norm, torch.zeros(1, 6, dtype=torch.float64), 0.0),
    "inside the ball": (layer_norm, torch.arange(6.0, dtype=torch.float64)[None], 100.0),
    "two features": (layer_norm, torch.arange(2.0, dtype=torch.float64)[None], 100.0),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_a_normalisation_that_may_collapse_has_no_bound(name: str) -> None:
    norm, x, radius = COLLAPSED[name]
    width = x.shape[-1]
    network = Sequence(
        (Linear(torch.eye(width, dtype=x.dtype)), norm(epsilon=0.0), Flatten(), Linear(Draw(2)(3, width)))
    )
    found = JointNetwork(network, x).bound(radius)
    assert found.norm == torch.inf
    assert (found.rows == torch.inf).all()
    assert not any(number != number for number in (*found.norms, *found.deviations, *(r for _, r in found.radii)))


@pytest.mark.parametrize("radius", [1e100, 1e160, 1e308])
@pytest.mark.parametrize("name", [s.name for s in select(target=Attention) if s.needs_radius])
def test_a_huge_ball(name: str, radius: float) -> None:
    draw = Draw(0)
    block = Attention(x=draw(3, 4), w_q=draw(2, 4, 2), w_k=draw(2, 4, 2), w_v=draw(2, 4, 2), w_o=draw(2, 2, 4))
    try:
        value = float(lipbounds.get(name)(block, radius).value)
    except LipboundsError:
        return
    assert value >= 0  # not so of NaN


@pytest.mark.parametrize("name", [s.name for s in select(target=Attention) if "qk_norm" in s.supports])
def test_a_huge_epsilon_of_a_norm(name: str) -> None:
    draw, one = Draw(0), torch.ones(2, 2, dtype=torch.float64)
    weights = {"query_norm_weight": one, "key_norm_weight": one, "norm_eps": 1e160, "norm_over": "head"}
    block = Attention(
        x=draw(3, 4), w_q=draw(2, 4, 2), w_k=draw(2, 4, 2), w_v=draw(2, 4, 2), w_o=draw(2, 2, 4), **weights
    )
    spec = lipbounds.get(name)
    try:
        value = float(spec(block, 0.1 if spec.needs_radius else None).value)
    except LipboundsError:
        return
    assert value >= 0
