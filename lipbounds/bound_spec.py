"""A registered bound: what it declares, and what happens when it is called.

Values carry no graph unless the caller asks: `bound(block)` is evaluated on a copy of the block that is cut off from
every graph, so that a model captured with its gradients costs no memory for them; `bound(block, grad=True)` is
evaluated on the block itself, and its value has a gradient where the bound is differentiable.
"""

from __future__ import annotations

import dataclasses as dc
import html
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, overload, runtime_checkable

from torch import Tensor

from lipbounds.claims import FEATURES, SCOPE_WORDS, BoundResult, Claim, Feature, Source, check_result
from lipbounds.derivatives.rounding.range import check_range
from lipbounds.devices import checked_together
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.targets.attention import Attention
from lipbounds.targets.frozen import check_frozen
from lipbounds.targets.network import Network
from lipbounds.targets.target import Target


Role = Literal["bound", "estimator"]
Status = Literal["standing", "refuted"]
Terms = dict[str, Tensor]
EXACT_ARITHMETIC = "arithmetic of the network taken as exact"
NOT_COVERED = "does not cover a block with"  # in the error for features that a bound does not support
COLUMNS = ("name", "target", "kind", "scope", "norm", "supports", "source")


@runtime_checkable
class Captured(Protocol):
    """What `lipbounds.capture` found: an attention block and where it is in the model."""

    @property
    def attention(self) -> Attention: ...


@dc.dataclass(frozen=True, kw_only=True, repr=False)
class BoundSpec:
    """A registered bound or estimator: its declaration and the function that computes it.

    Calling it on a block checks that the block is supported, runs `compute`, checks the shape and that no NaN came out,
    and attaches the claim. `target` is the class of the blocks: `Attention` unless the bound is about another kind of
    attention, whose function is another one. An estimator that says so (`networks`) also takes a `Network`, whose
    arithmetic it takes as exact.

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
    networks: bool = False
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

    def missing_features(self, block: Target | Network) -> list[Feature]:
        """The features of `block` that this bound does not cover."""
        return sorted(block.features - self.supports)

    @overload
    def __call__(
        self, block: Sequence[Captured], radius: float | None = None, *, grad: bool = False, **options: Any
    ) -> list[BoundResult]: ...

    @overload
    def __call__(
        self, block: Target | Network | Captured, radius: float | None = None, *, grad: bool = False, **options: Any
    ) -> BoundResult: ...

    def __call__(self, block: Any, radius: float | None = None, *, grad: bool = False, **options: Any) -> Any:
        """Evaluate at `block`.

        Args:
            block: the attention block at its input; or one that `lipbounds.capture` found, or the list of them.
            radius: l2 radius; required for the scopes `ball`, `change` and `compact`, refused otherwise.
            grad: let the value carry a graph to the tensors of the block, for training; without, it carries none.
            **options: the method's own options, such as `delta` of a probable bound.

        Returns:
            A result with one number per batch item; for a list, the list of them.

        Raises:
            InvalidInput: `radius` missing, superfluous, negative or not finite; an option the method does not have;
                tokens or weights of an `Attention` too large or too small for a bound in float64.
            UnsupportedAttention: the block has a feature that the bound does not cover.
        """
        if isinstance(block, Sequence) and not isinstance(block, str):
            return [self(one, radius, grad=grad, **options) for one in block]
        block = block_in(block)
        self._check_block(block)
        block = block if grad else block.detached
        self._check_call(block, radius, options)
        with checked_together():
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
            note=EXACT_ARITHMETIC if isinstance(block, Network) else "",
        )

    def __repr__(self) -> str:
        """In one line: what it promises."""
        claim = self.claim
        status = "" if self.status == "standing" else f", {self.status}"
        return f"BoundSpec({self.name}: {claim.kind}, {SCOPE_WORDS[claim.scope]}, {claim.norm}{status})"

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The options of the method with their default values."""
        parameters = list(inspect.signature(self.compute).parameters.values())
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def takes(self, block: Any) -> bool:
        """Whether it is about blocks of this class, whatever their features.

        Args:
            block: an attention block, another target or a `Network`.
        """
        return isinstance(block, self.target) or (self.networks and isinstance(block, Network))

    def _check_block(self, block: Any) -> None:
        if not self.takes(block):
            name = self.target.__name__
            how = " or lipbounds.capture(model, inputs)" if self.target is Attention else ""
            raise InvalidInput(
                f"{self.name} needs {_with_article(name)}, got {type(block).__name__}; build one with {name}(...){how}."
            )
        if isinstance(block, Target):
            check_frozen(block)

    def _check_call(self, block: Target | Network, radius: float | None, options: dict[str, Any]) -> None:
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
                f"{self.name} {NOT_COVERED} {described}; "
                "lipbounds.select(block=block) lists the bounds that hold for it."
            )
        if self.role == "bound" and isinstance(block, Attention):
            check_range(block, self.name)


def block_in(block: Any) -> Any:
    """The attention block in what `lipbounds.capture` found; anything else as it is.

    Args:
        block: what a bound was called with.
    """
    inside = getattr(block, "attention", None)
    return inside if isinstance(inside, Attention) else block


class BoundTable(list[BoundSpec]):
    """A list of bounds that prints as a table."""

    def rows(self) -> list[tuple[str, ...]]:
        """Name, class of the blocks, kind, scope, norm, features and source of each."""
        return [
            (
                spec.name,
                spec.target.__name__,
                spec.claim.kind,
                SCOPE_WORDS[spec.claim.scope],
                spec.claim.norm,
                " ".join(sorted(spec.supports)),
                str(spec.source),
            )
            for spec in self
        ]

    def __repr__(self) -> str:
        if not self:
            return "no bounds"
        rows = [COLUMNS, *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
        lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.rows()]
        head = "".join(f"<th>{title}</th>" for title in COLUMNS)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOL" else f"a {noun}"
