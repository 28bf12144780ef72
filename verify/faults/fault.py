"""A planted fault: a wrong bound with a sentence that says what is wrong."""

from __future__ import annotations

import dataclasses as dc
import inspect
from collections.abc import Callable, Iterable

from torch import Tensor

from lipbounds.claims import FEATURES, Claim, Feature, Kind, Scope, Source
from lipbounds.registry import BoundSpec


Compute = Callable[..., Tensor]
# A fault that does not read rotary positions or norms would be caught by them, whatever else is wrong with it.
UNNORMED: tuple[Feature, ...] = tuple(feature for feature in FEATURES if feature != "qk_norm")
UNTURNED: tuple[Feature, ...] = tuple(feature for feature in UNNORMED if feature != "rotary")


@dc.dataclass(frozen=True, kw_only=True)
class Fault:
    """A wrong bound.

    Args:
        name: short, unique in the catalogue.
        what: what is wrong, in one sentence.
        subtle: wrong by less than 5 % on most inputs, or on few inputs only.
        spec: the bound; never registered.
    """

    name: str
    what: str
    subtle: bool
    spec: BoundSpec


def planted(
    *,
    kind: Kind = "proved",
    scope: Scope = "point",
    supports: Iterable[Feature] = UNTURNED,
    subtle: bool = False,
    estimator: bool = False,
) -> Callable[[Compute], Fault]:
    """Decorator: a function of a block, whose docstring says what is wrong, becomes a `Fault`.

    The spec is named by its import path, so that the snippet of a failure finds it again.

    Args:
        kind: what is claimed.
        scope: where it is claimed.
        supports: features for which it is claimed.
        subtle: as in `Fault`.
        estimator: whether it measures; then it is not asked for gradients.
    """

    def declare(function: Compute) -> Fault:
        what = " ".join((inspect.getdoc(function) or "").split())
        spec = BoundSpec(
            name=f"{function.__module__}:{function.__name__}.spec",
            claim=Claim(kind=kind, scope=scope),
            source=Source(title="planted fault"),
            supports=frozenset(supports),
            cost="not stated",
            compute=function,
            role="estimator" if estimator else "bound",
        )
        return Fault(name=function.__name__, what=what, subtle=subtle, spec=spec)

    return declare


def faults_in(module: object) -> list[Fault]:
    """The faults a module defines, in their order."""
    return [member for member in vars(module).values() if isinstance(member, Fault)]
