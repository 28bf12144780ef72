"""Products and sums of matrices known up to a norm ball: members combine to members."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lipbounds.ops.enclosure import Enclosure, diagonal, matrix, only_norm, plus, then
from verify.unit.networks import Draw


def norm(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.matrix_norm(values, 2)


def around(draw: Draw, rows: int, cols: int, size: float) -> tuple[Enclosure, torch.Tensor]:
    """A set, and a member near its edge, which the rounding of the member does not reach."""
    centre, way = draw(3, rows, cols), draw(3, rows, cols)
    deviation = torch.full((3,), size, dtype=torch.float64)
    member = centre + size * (1 - 1e-6) * way / norm(way)[:, None, None]
    limit = norm(centre) + size if size < 1 else norm(member)
    return Enclosure(limit=limit, centre=centre, deviation=deviation), member


def holds(found: Enclosure, member: torch.Tensor) -> None:
    assert bool((norm(member) <= found.norm * (1 + 1e-12)).all())
    if found.centre is not None and found.deviation is not None:
        assert bool((norm(member - found.centre) <= found.deviation * (1 + 1e-12)).all())


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e-9, 0.1, 5.0]), st.sampled_from([0.0, 0.1, 5.0]))
def test_members_combine_to_members(seed: int, one: float, other: float) -> None:
    draw = Draw(seed)
    (a, in_a), (b, in_b), (c, in_c) = around(draw, 3, 4, one), around(draw, 2, 3, other), around(draw, 3, 4, other)
    holds(then(a, b), in_b @ in_a)
    holds(plus(a, c), in_a + in_c)
    holds(then(plus(a, c), b), in_b @ (in_a + in_c))
    holds(then(only_norm(norm(in_a)), b), in_b @ in_a)
    holds(a.item(1), in_a[1:2])


def test_an_exact_product_has_its_exact_norm() -> None:
    draw = Draw(1)
    factors = [draw(4, 4) for _ in range(5)]
    found = matrix(factors[0], torch.zeros(1, dtype=torch.float64))
    whole = factors[0]
    for factor in factors[1:]:
        found, whole = then(found, matrix(factor, torch.zeros(1, dtype=torch.float64))), factor @ whole
    torch.testing.assert_close(found.norm, norm(whole)[None], rtol=1e-11, atol=0)
    assert bool((found.norm >= norm(whole) * (1 - 1e-14)).all())


def test_a_diagonal_may_be_negative() -> None:
    found = diagonal(torch.tensor([1.0, -3.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert float(found.norm) == 3
