"""Registering bounds and estimators, and finding them again."""

from __future__ import annotations

import difflib
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import get_args

from torch import Tensor

from lipbounds.bound_spec import NOT_COVERED as NOT_COVERED
from lipbounds.bound_spec import BoundSpec as BoundSpec
from lipbounds.bound_spec import BoundTable, Captured, Role, Status, block_in
from lipbounds.bound_spec import Terms as Terms
from lipbounds.claims import FEATURES, KINDS, NORMS, SCOPES, Claim, Feature, Source
from lipbounds.errors import InvalidInput, UnknownBound
from lipbounds.targets.attention import Attention
from lipbounds.targets.network import Network
from lipbounds.targets.target import Target


ENTRY_POINT_GROUP = "lipbounds.bounds"


class Registry:
    """Name -> BoundSpec, filled by the decorator, by imports of `lipbounds.bounds` and by entry points."""

    def __init__(self) -> None:
        self._specs: dict[str, BoundSpec] = {}
        self._loaded = False
        self._broken: list[str] = []  # what is wrong with plug-ins that could not be loaded

    def add(self, spec: BoundSpec) -> BoundSpec:
        """Register `spec`; a name that is taken raises and names both owners."""
        owner = self._specs.get(spec.name)
        if owner is not None and _origin(owner) != _origin(spec):
            raise InvalidInput(
                f"the name {spec.name!r} is taken by {_origin(owner)}, got it again from {_origin(spec)}; "
                "choose another name."
            )
        self._specs[spec.name] = spec
        return spec

    def get(self, name: str) -> BoundSpec:
        """The spec of that name; a miss suggests near names."""
        self._load()
        if name not in self._specs:
            near = difflib.get_close_matches(name, self._specs, n=3, cutoff=0.5)
            hint = f"did you mean {near}?" if near else "lipbounds.select() lists all of them."
            broken = "".join(f" A plug-in is missing: {reason}" for reason in self._broken)
            raise UnknownBound(f"no bound or estimator named {name!r}; {hint}{broken}")
        return self._specs[name]

    def __iter__(self) -> Iterator[BoundSpec]:
        self._load()
        return iter(sorted(self._specs.values(), key=lambda spec: spec.name))

    def _load(self) -> None:
        """Import our own files, then the plug-ins; at the first use and never at import. A broken one is left out."""
        if self._loaded:
            return
        self._loaded = True
        importlib.import_module("lipbounds.bounds")
        importlib.import_module("lipbounds.estimators")
        if os.environ.get("LIPBOUNDS_NO_PLUGINS") == "1":
            return
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            before = dict(self._specs)
            try:
                self._add_plugin(entry)
            except (Exception, SystemExit) as error:  # whatever a stranger's module does when it is imported
                self._specs = before
                said = " ".join(str(error).split())
                self._broken.append(
                    f"the entry point {entry.name!r} ({entry.value}) in the group {ENTRY_POINT_GROUP!r} could not be "
                    f"loaded, {type(error).__name__}: {said} Repair or uninstall its package; all other bounds work."
                )
        for reason in self._broken:  # at the end: where warnings are errors, no bound is lost
            warnings.warn(reason, RuntimeWarning, stacklevel=4)

    def _add_plugin(self, entry: EntryPoint) -> None:
        spec = entry.load()
        if not isinstance(spec, BoundSpec):
            raise InvalidInput(
                f"it must name a BoundSpec, got {type(spec).__name__}; decorate the function with lipbounds.bound(...)."
            )
        self.add(spec)


def _origin(spec: BoundSpec) -> str:
    return f"{spec.compute.__module__}.{spec.compute.__qualname__}"


registry = Registry()


def bound(
    *,
    name: str,
    claim: Claim,
    source: Source,
    supports: Iterable[Feature] = (),
    cost: str,
    role: Role = "bound",
    status: Status = "standing",
    version: int = 1,
    target: type[Target] = Attention,
    networks: bool = False,
) -> Callable[[Callable[..., Tensor | tuple[Tensor, Terms]]], BoundSpec]:
    """Decorator: turn a function of an `Attention` into a registered `BoundSpec`.

    Args:
        name: unique, `<first author><year>.<thing>` for published ones.
        claim: kind, scope and norm of the promise.
        source: where the formula was read or derived.
        supports: the features beyond a single head without biases and mask for which the promise holds.
        cost: in O(.) notation; n tokens, D width, H heads, d head width.
        role: `estimator` for a method that measures the constant instead of bounding it by a formula.
        status: `refuted` for a published formula kept although a counterexample is known.
        version: raise it when the returned numbers or what is supported change, so that stored records are not mixed.
        target: class of the blocks the bound is about.
        networks: the method also takes a `Network`.

    Raises:
        InvalidInput: the name is taken or malformed, or `supports` holds an unknown feature.
    """

    def register(function: Callable[..., Tensor | tuple[Tensor, Terms]]) -> BoundSpec:
        spec = BoundSpec(
            name=name,
            claim=claim,
            source=source,
            supports=frozenset(supports),
            cost=cost,
            compute=function,
            role=role,
            status=status,
            version=version,
            target=target,
            networks=networks,
        )
        return registry.add(spec)

    return register


def get(name: str) -> BoundSpec:
    """The registered bound or estimator of that name.

    Raises:
        UnknownBound: there is none; the message suggests near names.
    """
    return registry.get(name)


def select(
    *,
    kind: str | None = None,
    scope: str | None = None,
    norm: str | None = None,
    supports: str | Iterable[str] = (),
    role: str | None = None,
    target: type[Target] = Attention,
    block: Target | Network | Captured | None = None,
) -> BoundTable:
    """All registered specs that match every argument given, without the refuted ones, sorted by name.

    Args:
        kind: `proved`, `probable`, `estimate` or `lower`.
        scope: `point`, `ball`, `change`, `compact` or `global`.
        norm: `l2`, `linf`, `token` or `token_mean`.
        supports: features that the promise must cover, such as `mask`.
        role: `bound` or `estimator`.
        target: class of the blocks the bound is about; not read where a block is given.
        block: only those whose promise covers this block; an `Attention`, one that `lipbounds.capture` found, or
            another target.

    Raises:
        InvalidInput: a value that is none of these.
    """
    features = frozenset([supports] if isinstance(supports, str) else supports)
    for name, value, known in (
        ("kind", kind, KINDS),
        ("scope", scope, SCOPES),
        ("norm", norm, NORMS),
        ("role", role, get_args(Role)),
        *(("supports", feature, FEATURES) for feature in features),
    ):
        if value is not None and value not in known:
            raise InvalidInput(f"{name} must be one of {sorted(known)}, got {name}={value!r}.")
    given = None if block is None else block_in(block)
    return BoundTable(
        spec
        for spec in registry
        if spec.status == "standing"
        and (spec.target is target if given is None else spec.takes(given))
        and (kind is None or spec.claim.kind == kind)
        and (scope is None or spec.claim.scope == scope)
        and (norm is None or spec.claim.norm == norm)
        and features <= spec.supports
        and (role is None or spec.role == role)
        and (given is None or not spec.missing_features(given))
    )


def standing() -> list[BoundSpec]:
    """All specs for every kind of block without the refuted ones, sorted by name."""
    return [spec for spec in registry if spec.status == "standing"]


def refuted() -> list[BoundSpec]:
    """The published formulas kept although they are no bounds, sorted by name."""
    return [spec for spec in registry if spec.status == "refuted"]
