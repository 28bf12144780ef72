"""Declaring bounds and estimators, and finding them again."""

from __future__ import annotations

import dataclasses as dc
import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import Tensor

from lipbounds.claims import FEATURES, BoundResult, Claim, Feature, Source, check_result
from lipbounds.derivatives.rounding.range import check_range
from lipbounds.errors import InvalidInput, UnknownBound, UnsupportedAttention
from lipbounds.targets.attention import Attention
from lipbounds.targets.target import Target


ENTRY_POINT_GROUP = "lipbounds.bounds"
Role = Literal["bound", "estimator"]
Status = Literal["standing", "refuted"]
Terms = dict[str, Tensor]
NO_PROMISE = "makes no promise for a block with"  # in the error for features that a bound does not support


@dc.dataclass(frozen=True, kw_only=True)
class BoundSpec:
    """A registered bound or estimator: its declaration and the function that computes it.

    Calling it on a block checks that the block is supported, runs `compute`, checks the shape and that no NaN came out,
    and attaches the claim. `target` is the class of the blocks: `Attention` unless the bound is about another kind of
    attention, whose function is another one.

    `compute` takes the block (and, for the scopes `ball`, `compact`, a radius in the l2 norm) and returns the value,
    one number per batch item, or `(value, terms)` with the named parts of the value. Terms named `detail.*` are not
    parts of the value; they end up in `BoundResult.details`. Keyword arguments with defaults are the method's options.

    A published formula that was found false stays, with the status `refuted`: it can be evaluated, it is in no list of
    bounds, and the verifier must go on refuting it.
    """

    name: str
    claim: Claim
    source: Source
    supports: frozenset[Feature]
    cost: str
    compute: Callable[..., Tensor | tuple[Tensor, Terms]]
    role: Role = "bound"
    status: Status = "standing"
    version: int = 1
    target: type[Target] = Attention
    summary: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(character.isspace() for character in self.name):
            raise InvalidInput(f"name must be non-empty and without spaces, got name={self.name!r}.")
        unknown = sorted(set(self.supports) - set(FEATURES))
        if unknown:
            raise InvalidInput(f"supports may hold {sorted(FEATURES)}, got also {unknown}.")
        if not self.summary:
            doc = inspect.getdoc(self.compute) or ""
            object.__setattr__(self, "summary", doc.split("\n", 1)[0])

    @property
    def needs_radius(self) -> bool:
        return self.claim.scope in ("ball", "change", "compact")

    def missing_features(self, block: Target) -> list[Feature]:
        """The features of `block` that this bound makes no promise for."""
        return sorted(block.features - self.supports)

    def __call__(self, block: Target, radius: float | None = None, **options: Any) -> BoundResult:
        """Evaluate at `block`.

        Args:
            block: the attention block at its input.
            radius: l2 radius; required for the scopes `ball`, `change` and `compact`, refused otherwise.
            **options: the method's own options, such as `delta` of a probable bound.

        Raises:
            InvalidInput: `radius` missing, superfluous, negative or not finite; an option the method does not have;
                tokens or weights of an `Attention` too large or too small for a bound in float64.
            UnsupportedAttention: the block has a feature the bound makes no promise for.
        """
        self._check_call(block, radius, options)
        output = self.compute(block, *((radius,) if self.needs_radius else ()), **options)
        value, parts = output if isinstance(output, tuple) else (output, {})
        check_result(self.name, value, block.batch_shape)
        terms = {key: part for key, part in parts.items() if not key.startswith("detail.")}
        details = {key.removeprefix("detail."): part for key, part in parts.items() if key not in terms}
        delta = {**self.defaults, **options}.get("delta") if self.claim.kind == "probable" else None
        return BoundResult(
            name=self.name,
            value=value,
            claim=self.claim,
            terms=terms,
            details=details,
            radius=radius,
            delta=delta,
        )

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the method with their default values."""
        parameters = list(inspect.signature(self.compute).parameters.values())
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def _check_call(self, block: Target, radius: float | None, options: dict[str, Any]) -> None:
        if not isinstance(block, self.target):
            name = self.target.__name__
            how = " or lipbounds.capture(model, inputs)" if self.target is Attention else ""
            raise InvalidInput(
                f"{self.name} needs {_with_article(name)}, got {type(block).__name__}; build one with {name}(...){how}."
            )
        if self.needs_radius and radius is None:
            raise InvalidInput(f"{self.name} is a bound on a {self.claim.scope}: pass radius=.")
        if not self.needs_radius and radius is not None:
            raise InvalidInput(
                f"{self.name} has scope {self.claim.scope!r} and takes no radius, got radius={radius}; "
                "choose a bound with scope 'ball'."
            )
        if radius is not None and not 0 <= radius < float("inf"):
            raise InvalidInput(f"radius must be finite and >= 0, got radius={radius}.")
        unknown = sorted(set(options) - set(self.defaults))
        if unknown:
            raise InvalidInput(f"{self.name} has the options {sorted(self.defaults)}, got {unknown}.")
        missing = self.missing_features(block)
        if missing:
            described = "; ".join(f"{feature} ({FEATURES[feature]})" for feature in missing)
            raise UnsupportedAttention(
                f"{self.name} {NO_PROMISE} {described}; "
                "lipbounds.select(block=block) lists the bounds that hold for it."
            )
        if self.role == "bound" and isinstance(block, Attention):
            check_range(block, self.name)


class Registry:
    """Name -> BoundSpec, filled by the decorator, by imports of `lipbounds.bounds` and by entry points."""

    def __init__(self) -> None:
        self._specs: dict[str, BoundSpec] = {}
        self._loaded = False

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
            raise UnknownBound(f"no bound or estimator named {name!r}; {hint}")
        return self._specs[name]

    def __iter__(self) -> Iterator[BoundSpec]:
        self._load()
        return iter(sorted(self._specs.values(), key=lambda spec: spec.name))

    def _load(self) -> None:
        """Import our own files, then the plug-ins; at the first use and never at import."""
        if self._loaded:
            return
        self._loaded = True
        importlib.import_module("lipbounds.bounds")
        importlib.import_module("lipbounds.estimators")
        if os.environ.get("LIPBOUNDS_NO_PLUGINS") == "1":
            return
        for entry in entry_points(group=ENTRY_POINT_GROUP):
            spec = entry.load()
            if not isinstance(spec, BoundSpec):
                raise InvalidInput(
                    f"entry point {entry.name!r} ({entry.value}) must name a BoundSpec, got {type(spec).__name__}; "
                    "decorate the function with lipbounds.bound(...)."
                )
            self.add(spec)


def _origin(spec: BoundSpec) -> str:
    return f"{spec.compute.__module__}.{spec.compute.__qualname__}"


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOL" else f"a {noun}"


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
    role: Role | None = None,
    target: type[Target] = Attention,
    block: Target | None = None,
) -> list[BoundSpec]:
    """All registered specs that match every argument given, without the refuted ones, sorted by name.

    Args:
        kind: `proved`, `probable`, `estimate` or `lower`.
        scope: `point`, `ball`, `change`, `compact` or `global`.
        role: `bound` or `estimator`.
        target: class of the blocks the bound is about; not read where a block is given.
        block: only those whose promise covers this block.
    """
    wanted = target if block is None else type(block)
    return [
        spec
        for spec in registry
        if spec.status == "standing"
        and spec.target is wanted
        and (kind is None or spec.claim.kind == kind)
        and (scope is None or spec.claim.scope == scope)
        and (role is None or spec.role == role)
        and (block is None or not spec.missing_features(block))
    ]


def standing() -> list[BoundSpec]:
    """All specs for every kind of block without the refuted ones, sorted by name."""
    return [spec for spec in registry if spec.status == "standing"]


def refuted() -> list[BoundSpec]:
    """The published formulas kept although they are no bounds, sorted by name."""
    return [spec for spec in registry if spec.status == "refuted"]
