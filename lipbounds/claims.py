"""What a number promises: its kind, its scope, its norm and where the promise comes from."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.devices import refuse
from lipbounds.errors import InvalidInput


Kind = Literal["proved", "probable", "estimate", "lower"]
Scope = Literal["point", "ball", "change", "compact", "global"]
Norm = Literal["l2", "linf", "token", "token_mean"]
Feature = Literal["heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"]

KINDS: dict[Kind, str] = {
    "proved": "an upper bound with a proof",
    "probable": "an upper bound that fails with probability at most delta over the method's own random numbers",
    "estimate": "neither an upper nor a lower bound",
    "lower": "a lower bound: the true constant is at least this",
}
SCOPES: dict[Scope, str] = {
    "point": "the norm of the Jacobian at the given input, and nothing about its neighbours",
    "ball": "the Lipschitz constant on the Frobenius ball of the given radius around the input",
    "change": "the largest |f(y) - f(x)| / |y - x| from the given input x to the points y of the ball of the given "
    "radius around it, and nothing about two other points",
    "compact": "the Lipschitz constant on the set of inputs whose tokens have norm at most the given radius",
    "global": "the Lipschitz constant on all inputs",
}
SCOPE_WORDS: dict[Scope, str] = {
    "point": "at a point",
    "ball": "on a ball",
    "change": "from the centre of a ball",
    "compact": "on a compact set",
    "global": "everywhere",
}
NORMS: dict[Norm, str] = {
    "l2": "the Euclidean norm of all entries, for input and output",
    "linf": "the largest entry, for input and output",
    "token": "the largest Euclidean norm of a token, for input and output",
    "token_mean": "the mean of the Euclidean norms of the tokens, for input and output",
}
FEATURES: dict[Feature, str] = {
    "heads": "more than one head",
    "biases": "query, key or value biases",
    "mask": "a logit bias or mask",
    "cross": "keys and values from another input than the queries",
    "rotary": "rotary positions: each query and key turned by an angle of its token",
    "qk_norm": "QK-norm: queries and keys divided by their root mean square",
    "some_queries": "queries of some of the tokens only, such as the class token",
}


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a formula was read or derived."""

    title: str
    authors: str = ""
    year: int | None = None
    arxiv: str = ""
    statement: str = ""

    def __str__(self) -> str:
        who = f"{self.authors} {self.year}" if self.authors else self.title
        parts = [who, f"arXiv {self.arxiv}" if self.arxiv else "", self.statement]
        return ", ".join(part for part in parts if part)


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The promise attached to a number: `value` against the local Lipschitz constant, in `norm`, over `scope`."""

    kind: Kind
    scope: Scope = "point"
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput(f"kind must be one of {sorted(KINDS)}, got kind={self.kind!r}.")
        if self.scope not in SCOPES:
            raise InvalidInput(f"scope must be one of {sorted(SCOPES)}, got scope={self.scope!r}.")
        if self.norm not in NORMS:
            raise InvalidInput(f"norm must be one of {sorted(NORMS)}, got norm={self.norm!r}.")


@dc.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundResult:
    """A number per batch item, with the promise it carries.

    A result of one number can be used as a number: `float(result)`, `f"{result:.3g}"`, `result < 2.0`,
    `min(results)`. Comparisons are those of the values, item by item, and tell nothing about the promises; only two
    results in different norms are never compared. The value carries no graph unless the bound was asked for one
    (`bound(block, grad=True)`).

    Args:
        name: of the bound or function.
        value: one number per batch item.
        claim: kind, scope and norm of the promise.
        terms: the named parts that the value is made of.
        details: what a reader needs to judge it, such as a residual.
        radius: in the l2 norm; set for every scope but `point` and `global`.
        delta: probability of failure that the kind `probable` allows.
        note: what the promise takes for granted, in words; empty if nothing.
    """

    name: str
    value: Float[Tensor, "*batch"]
    claim: Claim
    terms: dict[str, Tensor] = dc.field(default_factory=dict)
    details: dict[str, Tensor] = dc.field(default_factory=dict)
    radius: float | None = None
    delta: float | None = None
    note: str = ""

    @property
    def kind(self) -> Kind:
        return self.claim.kind

    @property
    def scope(self) -> Scope:
        return self.claim.scope

    @property
    def norm(self) -> Norm:
        return self.claim.norm

    def item(self) -> float:
        """The value as a Python number.

        Raises:
            InvalidInput: there are several batch items.
        """
        if self.value.numel() != 1:
            raise InvalidInput(
                f"{self.name} holds {self.value.numel()} numbers, one per batch item of shape "
                f"{tuple(self.value.shape)}, and cannot be one number; take .value, .numpy() or .value.max()."
            )
        return float(self.value.detach())

    def numpy(self) -> Any:
        """The value as a NumPy array on the CPU; bfloat16, which NumPy lacks, becomes float32 without a change."""
        value = self.value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values: numbers, lists, strings and None; what `json.dumps` takes, but for infinities."""
        parts = {"terms": self.terms, "details": self.details}
        return {
            "name": self.name,
            "value": self.value.detach().tolist(),
            "kind": self.kind,
            "scope": self.scope,
            "norm": self.norm,
            "radius": self.radius,
            "delta": self.delta,
            "dtype": str(self.value.dtype).removeprefix("torch."),
            "note": self.note,
            **{name: {key: part.detach().tolist() for key, part in of.items()} for name, of in parts.items()},
        }

    def __float__(self) -> float:
        return self.item()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __lt__(self, other: BoundResult | Tensor | float | int) -> Tensor:
        return self.value < self._comparable(other)

    def __le__(self, other: BoundResult | Tensor | float | int) -> Tensor:
        return self.value <= self._comparable(other)

    def __gt__(self, other: BoundResult | Tensor | float | int) -> Tensor:
        return self.value > self._comparable(other)

    def __ge__(self, other: BoundResult | Tensor | float | int) -> Tensor:
        return self.value >= self._comparable(other)

    def _comparable(self, other: BoundResult | Tensor | float | int) -> Tensor | float | int:
        if not isinstance(other, BoundResult):
            return other
        if other.norm != self.norm:
            raise InvalidInput(
                f"only numbers in one norm can be compared, got {self.name} in {self.norm} and {other.name} in "
                f"{other.norm}; choose bounds with lipbounds.select(norm=...)."
            )
        return other.value

    def __repr__(self) -> str:
        value = self.value.detach()
        shown = f"{value.item():.6g}" if value.numel() == 1 else f"[{value.min():.6g} .. {value.max():.6g}]"
        extra = f", radius={self.radius:g}" if self.radius is not None else ""
        extra += f", delta={self.delta:g}" if self.delta is not None else ""
        extra += f"; {self.note}" if self.note else ""
        dtype, where = str(value.dtype).removeprefix("torch."), SCOPE_WORDS[self.scope]
        return f"BoundResult({self.name}: {shown}, {self.kind}, {where}, {self.claim.norm}, {dtype}{extra})"


def check_result(name: str, value: Tensor, batch_shape: torch.Size) -> None:
    """Refuse a value of the wrong shape or with NaN in it: a silently wrong number is the worst outcome."""
    if value.shape != batch_shape:
        raise InvalidInput(
            f"{name} must return one value per batch item, shape {tuple(batch_shape)}, got {tuple(value.shape)}; "
            "reduce over heads, rows and features inside the bound."
        )
    refuse((value.isnan(), lambda: _not_a_number(name, value)))


def _not_a_number(name: str, value: Tensor) -> InvalidInput:
    return InvalidInput(
        f"{name} returned NaN for {int(value.isnan().sum())} of {value.numel()} batch items; "
        "the weights or inputs are too large for its arithmetic: rescale them."
    )
