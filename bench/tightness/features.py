"""The table of features: what each registered bound promises and for which blocks, from the registry."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.pages.formatting import table
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


def differentiable(spec: BoundSpec) -> str:
    """With respect to what the value has a gradient that is finite and not zero: input, weights, both or nothing.

    Args:
        spec: the bound or estimator; about a class of blocks that `SAMPLES` has a block of.
    """
    if spec.target.__name__ not in SAMPLES:
        return "not measured"
    block = spec.target(**SAMPLES[spec.target.__name__]())
    moving = block.moving_input.detach().clone().requires_grad_()
    block = block.at(moving)
    weights = [tensor.requires_grad_() for tensor in _tensors(block) if tensor.is_leaf and tensor is not moving]
    value = spec(block, RADIUS if spec.needs_radius else None, grad=True).value
    if not value.requires_grad:
        return "no"
    gradients = torch.autograd.grad(value.sum(), [moving, *weights], allow_unused=True)
    if any(gradient is not None and not gradient.isfinite().all() for gradient in gradients):
        return "no: not finite"
    flows = [gradient is not None and bool((gradient != 0).any()) for gradient in gradients]
    reached = ["input"] * flows[0] + ["weights"] * any(flows[1:])
    return " and ".join(reached) or "no"


def _tensors(block: Target) -> list[Tensor]:
    """The tensors among the fields of a block, also those in tuples."""
    values = [getattr(block, field.name) for field in dc.fields(block)]  # pyright: ignore[reportArgumentType]
    flat = [entry for value in values for entry in (value if isinstance(value, tuple) else (value,))]
    return [entry for entry in flat if isinstance(entry, Tensor)]


def _draw(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Gaussian tensors of these shapes, in float64, always the same."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


# For each class of blocks the fields of a small one without features, which every bound supports.
SAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "Attention": lambda: _draw(x=(5, 4), w_q=(1, 4, 3), w_k=(1, 4, 3), w_v=(1, 4, 3), w_o=(1, 3, 4)),
    "L2Attention": lambda: _draw(x=(5, 4), w_q=(1, 4, 3), w_v=(1, 4, 3), w_o=(1, 3, 4)),
    "CosineAttention": lambda: _draw(x=(5, 4), w_q=(4, 3), w_k=(4, 3), w_v=(4, 3)) | {"eps": 0.1},
    "LipschitzNormAttention": lambda: _draw(queries=(5, 4), keys=(6, 4), values=(6, 3)),
    "Mlp": lambda: {"x": _draw(x=(4,))["x"], "weights": tuple(_draw(first=(5, 4), second=(3, 5)).values())},
}


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
    return [f"`{spec.name}`", *promise, differentiable(spec), spec.cost, str(spec.source)]


def _meanings(title: str, meanings: dict[Any, str]) -> str:
    return f"{title}:\n\n" + "\n".join(f"- `{name}`: {meaning}." for name, meaning in meanings.items())
