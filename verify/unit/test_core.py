"""Claims, registry and rounding: what is declared is what comes back, and mistakes are named."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lipbounds
from lipbounds import Claim, InvalidInput, Source, UnknownBound, UnsupportedAttention
from lipbounds.registry import BoundSpec, Registry
from lipbounds.rounding import cast_up
from verify.unit.blocks import random_block


def spec(value: object = 1.0, **fields: object) -> BoundSpec:
    def compute(block: lipbounds.Attention) -> torch.Tensor:
        """A number."""
        return torch.as_tensor(value, dtype=torch.float64).expand(block.batch_shape)

    declared = {
        "name": "test.number",
        "claim": Claim(kind="proved"),
        "source": Source(title="a test"),
        "supports": frozenset({"heads", "biases"}),
        "cost": "O(1)",
        "compute": compute,
    }
    return BoundSpec(**(declared | fields))  # pyright: ignore[reportArgumentType]


def test_a_result_carries_its_claim() -> None:
    result = spec(2.0)(random_block())
    assert (result.value.item(), result.kind, result.scope, result.radius) == (2.0, "proved", "point", None)
    assert repr(result) == "BoundResult(test.number: 2, proved, at a point, l2, float64)"


def test_details_are_kept_apart_from_terms() -> None:
    def compute(block: lipbounds.Attention) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        one = torch.ones(block.batch_shape)
        return one, {"part": one, "detail.residual": one}

    result = spec(compute=compute)(random_block())
    assert set(result.terms) == {"part"}
    assert set(result.details) == {"residual"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spec()(random_block(), radius=1.0), InvalidInput, "takes no radius, got radius=1.0"),
        (lambda: spec(claim=Claim(kind="proved", scope="ball"))(random_block()), InvalidInput, "pass radius="),
        (lambda: spec(claim=Claim(kind="proved", scope="ball"))(random_block(), -1.0), InvalidInput, "radius=-1.0"),
        (lambda: spec()(random_block(), steps=3), InvalidInput, r"options \[\], got \['steps'\]"),
        (lambda: spec()(random_block(causal=True)), UnsupportedAttention, r"mask \(a logit bias or mask\)"),
        (lambda: spec()(torch.ones(2, 2)), InvalidInput, "needs an Attention, got Tensor"),
        (lambda: spec(float("nan"))(random_block()), InvalidInput, "returned NaN"),
        (lambda: spec(compute=lambda block: torch.ones(3))(random_block()), InvalidInput, "one value per batch item"),
        (lambda: spec(supports=frozenset({"wings"})), InvalidInput, r"got also \['wings'\]"),
        (lambda: spec(name="two words"), InvalidInput, "without spaces"),
        (lambda: Claim(kind="certain"), InvalidInput, "kind must be one of"),  # pyright: ignore
        (lambda: Claim(kind="proved", scope="here"), InvalidInput, "scope must be one of"),  # pyright: ignore
    ],
)
def test_mistakes_are_named(call: object, error: type[Exception], message: str, as_a_user_runs_it: None) -> None:
    with pytest.raises(error, match=message):
        call()  # pyright: ignore


def test_an_unknown_name_gets_near_ones_and_a_readable_message() -> None:
    with pytest.raises(UnknownBound) as caught:
        lipbounds.get("yudin2025.teorem3")
    assert str(caught.value).startswith(
        "no bound or estimator named 'yudin2025.teorem3'; did you mean ['yudin2025.theorem3'"
    )


def test_a_taken_name_names_both_owners() -> None:
    registry = Registry()
    registry.add(spec())
    registry.add(spec())  # the same function again, as a reload does

    def other(block: lipbounds.Attention) -> torch.Tensor:
        return torch.ones(block.batch_shape)

    with pytest.raises(InvalidInput, match=r"taken by .*compute.*again from .*other"):
        registry.add(spec(compute=other))


def test_select_filters() -> None:
    everything = lipbounds.select()
    assert [s.name for s in everything] == sorted(s.name for s in everything)
    assert {s.claim.kind for s in lipbounds.select(kind="proved")} == {"proved"}
    biased = random_block()
    names = {s.name for s in lipbounds.select(block=biased, role="bound", scope="point")}
    assert "yudin2025.biased" in names
    assert "yudin2025.theorem3" not in names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cast_up_is_the_smallest_float_above(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 1 + 1e-12, 1e-60, -1e-60, 3.3, -3.3, 70000.0, 1e300], dtype=torch.float64)
    cast = cast_up(values, dtype)
    assert cast.dtype == dtype
    assert (cast.double() >= values).all()
    below = torch.nextafter(cast, torch.full_like(cast, -torch.inf))
    assert (below.double() < values).logical_or(cast.double() == values).all()


def test_import_needs_torch_only_and_is_quick() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import lipbounds; lipbounds.select();"
        "heavy = {'transformers', 'hypothesis', 'matplotlib', 'sklearn', 'rich', 'typer', 'scipy', 'pytest'};"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
