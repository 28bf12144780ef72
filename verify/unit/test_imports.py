"""`import lipbounds` needs torch and jaxtyping, and loads nothing that is slow to load beside them."""

from __future__ import annotations

import subprocess
import sys

import pytest


SCRIPT = """
import sys
import torch
before = set(sys.modules)
import lipbounds
lipbounds.get  # public names are imported at their first use
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in set(sys.modules) - before if name.startswith("lipbounds.")))
"""
OWN = {
    *{
        "lipbounds",
        "lipbounds.bound_spec",
        "lipbounds.lazy",
        "lipbounds.claims",
        "lipbounds.devices",
        "lipbounds.errors",
        "lipbounds.registry",
        "lipbounds.rounding",
    },
    *{"lipbounds.derivatives", "lipbounds.ops", "lipbounds.targets"},
}
HEAVY = {
    *{"accelerate", "beartype", "hypothesis", "matplotlib", "pandas", "pyautoattack", "pytest", "ray"},
    *{"rich", "scipy", "sklearn", "tabulate", "transformers", "triton", "typer"},
}


@pytest.fixture(scope="module")
def loaded() -> tuple[set[str], set[str]]:
    command = [sys.executable, "-c", SCRIPT]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return set(lines[-2].split()), set(lines[-1].split())


def test_no_heavy_package_is_loaded(loaded: tuple[set[str], set[str]]) -> None:
    assert "jaxtyping" in loaded[0]
    assert not loaded[0] & HEAVY


def test_bounds_are_loaded_at_their_first_use(loaded: tuple[set[str], set[str]]) -> None:
    other = {name for name in loaded[1] if ".".join(name.split(".")[:2]) not in OWN}
    assert not other
