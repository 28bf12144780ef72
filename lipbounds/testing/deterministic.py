"""A bound is a function: at one block it returns one number, however often it is asked."""

from __future__ import annotations

import torch

from lipbounds.registry import BoundSpec
from lipbounds.targets.target import Target
from lipbounds.testing.global_state import anew
from lipbounds.testing.snippet import head
from lipbounds.testing.verdict import Refuted, evaluate


REPEATS = 4
SUSPECTED = 32  # where a check has failed once and then passed at the same block
SAME = 1e-12  # relative: sums on several threads may be added in another order
_TAIL = """values = [spec(block{radius}).value.tolist() for _ in range({repeats})]
print(f"one block, {{len(set(map(str, values)))}} values: {{values[:4]}}")
assert all(value == values[0] for value in values), "the bound is not deterministic"
"""


def deterministic(spec: BoundSpec, block: Target, radius: float | None = None, seed: int = 0) -> None:
    """The same block gets the same number again: what is drawn comes from the option `seed`, with a default."""
    if (found := changing(spec, block, radius, REPEATS)) is not None:
        raise found


def changing(spec: BoundSpec, block: Target, radius: float | None, repeats: int) -> Refuted | None:
    """The verdict on a bound whose number changes from call to call; None if it does not.

    Args:
        spec: the bound.
        block: where it is asked.
        radius: for the scopes that have one.
        repeats: how often it is asked.
    """
    first = evaluate("deterministic", spec, block, radius).detach()
    for _ in range(repeats - 1):
        again = evaluate("deterministic", spec, anew(block), radius).detach()
        off = torch.where(again == first, -1.0, (again - first).abs() - SAME * first.abs())
        if not bool((off <= 0).all()):
            worst = off.flatten().argmax()
            claimed, reached = again.flatten()[worst].item(), first.flatten()[worst].item()
            return Refuted(
                f"the same block must get the same number, got {reached!r} and then {claimed!r}: the bound is not "
                "deterministic. Draw random numbers from a generator with a fixed seed, an option `seed=0`",
                check="deterministic", spec=spec, block=block, radius=radius, claimed=claimed, reached=reached,
                source=_source(spec, block, radius),
            )  # fmt: skip
    return None


def _source(spec: BoundSpec, block: Target, radius: float | None) -> str:
    """A file that asks often: no seed shows what depends on none."""
    shown = "" if radius is None else f", radius={radius!r}"
    return head(spec, block) + _TAIL.format(radius=shown, repeats=8 * SUSPECTED)
