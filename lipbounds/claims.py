"""What a number promises: its kind, its scope, its norm and where the promise comes from."""

from __future__ import annotations

import dataclasses as dc
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput


Kind = Literal["proved", "probable", "estimate", "lower"]
Scope = Literal["point", "ball", "change", "compact", "global"]
Norm = Literal["l2", "linf", "token", "token_mean"]
Feature = Literal["heads", "biases", "mask", "cross", "rotary", "qk_norm"]

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


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class BoundResult:
    """A number per batch item, with the promise it carries.

    `terms` holds the named parts the value is made of; `details` what a reader needs to judge it, such as
    a residual. `radius` is set for every scope but `point`, `delta` for the kind `probable`.
    """

    name: str
    value: Float[Tensor, "*batch"]
    claim: Claim
    terms: dict[str, Tensor] = dc.field(default_factory=dict)
    details: dict[str, Tensor] = dc.field(default_factory=dict)
    radius: float | None = None
    delta: float | None = None

    @property
    def kind(self) -> Kind:
        return self.claim.kind

    @property
    def scope(self) -> Scope:
        return self.claim.scope

    def __repr__(self) -> str:
        value = self.value.detach()
        shown = f"{value.item():.6g}" if value.numel() == 1 else f"[{value.min():.6g} .. {value.max():.6g}]"
        extra = f", radius={self.radius:g}" if self.radius is not None else ""
        extra += f", delta={self.delta:g}" if self.delta is not None else ""
        dtype, where = str(value.dtype).removeprefix("torch."), SCOPE_WORDS[self.scope]
        return f"BoundResult({self.name}: {shown}, {self.kind}, {where}, {self.claim.norm}, {dtype}{extra})"


def check_result(name: str, value: Tensor, batch_shape: torch.Size) -> None:
    """Refuse a value of the wrong shape or with NaN in it: a silently wrong number is the worst outcome."""
    if value.shape != batch_shape:
        raise InvalidInput(
            f"{name} must return one value per batch item, shape {tuple(batch_shape)}, got {tuple(value.shape)}; "
            "reduce over heads, rows and features inside the bound."
        )
    if bool(value.isnan().any()):
        raise InvalidInput(
            f"{name} returned NaN for {int(value.isnan().sum())} of {value.numel()} batch items; "
            "the weights or inputs are too large for its arithmetic: rescale them."
        )
