"""The table of features: what each registered bound promises and for which blocks, from the registry."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.wording import cell, table
from lipbounds.claims import FEATURES, KINDS, NORMS, SCOPES
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.targets.target import Target


RADIUS = 2.0  # for the gradients; its size does not matter


def page(specs: Sequence[BoundSpec]) -> str:
    """The page of all bounds and estimators.

    Args:
        specs: all of the registry, refuted ones included.
    """
    parts = [
        "# Bounds and estimators: what each promises, and for which blocks",
        "Made by `python -m bench` from the registry; nothing here is written by hand.",
        _meanings("Features of a block that a promise covers beyond one head without biases and mask", FEATURES),
        _meanings("Kinds", KINDS),
        _meanings("Scopes", SCOPES),
        _meanings("Norms", NORMS),
        "Differentiable: with respect to what the value has a gradient that is not zero, measured at a small block "
        "by automatic differentiation. A bound on a set that does not depend on the input has one for the weights "
        "only. Cost: n tokens, D width, H heads, d head width.",
    ]
    for title, chosen in _groups(specs):
        rows = [_row(spec) for spec in sorted(chosen, key=_place)]
        titles = ["name", "kind", "scope", "norm", *FEATURES, "differentiable", "cost", "source"]
        parts += [f"## {title}", table(titles, rows)]
    return "\n\n".join(parts) + "\n"


def differentiable(spec: BoundSpec, sample: Callable[[], Target] | None = None) -> str:
    """With respect to what the value has a gradient that is finite and not zero: input, weights, both or nothing.

    Args:
        spec: the bound or estimator.
        sample: makes a block that it supports; by default the one of `SAMPLES` for its class of blocks.
    """
    sample = sample or SAMPLES.get(spec.target)
    if sample is None:
        return "not measured"
    block = sample()
    tensors = {
        field.name: value.requires_grad_()
        for field in dc.fields(block)  # pyright: ignore[reportArgumentType]
        if isinstance(value := getattr(block, field.name), Tensor)
    }
    moving = block.moving_input
    value = spec(block, RADIUS if spec.needs_radius else None).value
    if not value.requires_grad:
        return "no"
    gradients = torch.autograd.grad(value.sum(), list(tensors.values()), allow_unused=True)
    if any(gradient is not None and not gradient.isfinite().all() for gradient in gradients):
        return "no: not finite"
    reached = {
        "input" if tensor is moving else "weights"
        for tensor, gradient in zip(tensors.values(), gradients, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    }
    return " and ".join(sorted(reached)) or "no"


def attention_sample() -> Attention:
    """One head without biases and mask, which every bound of `Attention` supports."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights: dict[str, Any] = {name: draw(1, 4, 3) for name in ("w_q", "w_k", "w_v")}
    return Attention(x=draw(5, 4), w_o=draw(1, 3, 4), **weights)


# For each class of blocks a function that makes a small one.
SAMPLES: dict[type[Target], Callable[[], Target]] = {Attention: attention_sample}


def _groups(specs: Sequence[BoundSpec]) -> list[tuple[str, list[BoundSpec]]]:
    """Bounds of each class of blocks, `Attention` first, then estimators, then refuted formulas."""
    targets = sorted({spec.target.__name__ for spec in specs}, key=lambda name: (name != Attention.__name__, name))
    groups = []
    for role in ("bound", "estimator"):
        for target in targets:
            chosen = [s for s in specs if (s.role, s.status, s.target.__name__) == (role, "standing", target)]
            groups.append((f"{role.capitalize()}s for `{target}`", chosen))
    groups.append(("Refuted formulas, which are no bounds", [spec for spec in specs if spec.status == "refuted"]))
    return [(title, chosen) for title, chosen in groups if chosen]


def _place(spec: BoundSpec) -> tuple[int, int, int, str]:
    claim = spec.claim
    return [*NORMS].index(claim.norm), [*SCOPES].index(claim.scope), [*KINDS].index(claim.kind), spec.name


def _row(spec: BoundSpec) -> list[str]:
    claim = spec.claim
    covered = ["yes" if feature in spec.supports else "-" for feature in FEATURES]
    promise = [claim.kind, claim.scope, claim.norm, *covered]
    return [f"`{spec.name}`", *promise, differentiable(spec), spec.cost, cell(str(spec.source))]


def _meanings(title: str, meanings: dict[Any, str]) -> str:
    return f"{title}:\n\n" + "\n".join(f"- `{name}`: {meaning}." for name, meaning in meanings.items())
