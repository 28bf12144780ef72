"""Bounds and blocks that the tests of the testing kit share."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis
from hypothesis import Phase
from torch import Tensor

from lipbounds import BoundSpec, Claim, Source
from lipbounds.claims import FEATURES
from lipbounds.testing import contract
from lipbounds.testing.oracles import jacobian_norm
from lipbounds.testing.recipes import Recipe


Compute = Callable[..., Tensor]
# No shrinking and no memory of earlier runs.
SEARCH = hypothesis.settings(
    max_examples=80,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=contract.TOLERATED,
)


def spec(compute: Compute, name: str = "test.bound", **fields: object) -> BoundSpec:
    """An unregistered proved bound at the point for every feature; `fields` replace those of BoundSpec."""
    declared = {
        "name": name,
        "claim": Claim(kind="proved"),
        "source": Source(title="a test"),
        "supports": frozenset(FEATURES),
        "cost": "O(1)",
        "compute": compute,
    }
    return BoundSpec(**(declared | fields))  # pyright: ignore[reportArgumentType]


EXACT = spec(lambda block: jacobian_norm(block), "exact")
ALMOST_EXACT = spec(lambda block: jacobian_norm(block) * (1 + 1e-6), "exact.times_1_plus_1e-6")
AT_CENTRE = spec(lambda block, radius: jacobian_norm(block), "centre", claim=Claim(kind="proved", scope="ball"))
GRID = [
    Recipe(
        seed=seed, n=4, dim=3, heads=2, groups=1, head_dim=2, value_dim=3, out_dim=5, spread=4.0,
        mask=mask, biases=frozenset(biases), moves=moves, m=None if moves == "self" else 3,
    )
    for seed, (mask, biases, moves) in enumerate(itertools.product(
        ("none", "causal", "padding", "relative"), ((), ("b_q", "b_k", "b_v", "b_o")), ("self", "query", "memory"),
    ))
]  # fmt: skip
