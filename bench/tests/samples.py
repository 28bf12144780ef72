"""A tiny model, and records with round numbers, for the tests of the benchmark."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.engine.records import Question, Record
from bench.engine.store_file import read
from bench.workloads.case import Case
from bench.workloads.models import Model
from lipbounds.claims import Claim, Source
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention


def tiny_block(seed: int = 0, *, biases: bool = True, tokens: int = 3) -> Attention:
    """Two heads on four features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fields: dict[str, Any] = {"w_q": draw(2, 4, 2), "w_k": draw(2, 4, 2), "w_v": draw(2, 4, 2), "w_o": draw(2, 2, 4)}
    fields |= {"b_q": draw(2, 2)} if biases else {}
    return Attention(x=draw(tokens, 4), **fields)


def tiny_case(seed: int = 0, layer: int = 0, **block: Any) -> Case:
    return Case(
        model="tiny",
        model_hash="weights",
        input=f"seed-{seed}",
        input_hash=f"hash-{seed}",
        layer=layer,
        load=lambda: (f"block.{layer}", tiny_block(2 * seed + layer, **block)),
    )


def records_at(path: Path) -> dict[str, Record]:
    """The records of a file by key."""
    return {key: entry.record for key, entry in read(path).entries.items()}


def tiny_model(name: str = "tiny", breaks_at: int | None = None) -> Model:
    """Two layers, three inputs; one input in a quick run."""

    def cases(count: int) -> Iterator[Case]:
        for seed in range(count):
            if seed == breaks_at:
                raise OSError("the disk is gone")
            yield from (dc.replace(tiny_case(seed, layer), model=name) for layer in range(2))

    return Model(
        name=name, description="Tiny: two layers", layers=2, inputs=3, quick_inputs=1, cases=cases, seconds=0.1
    )


def spec(
    compute: Callable[..., Any],
    *,
    name: str = "test.bound",
    kind: Any = "proved",
    scope: Any = "point",
    norm: Any = "l2",
    **fields: Any,
) -> BoundSpec:
    """A bound that is declared and not registered."""
    return BoundSpec(
        name=name,
        claim=Claim(kind=kind, scope=scope, norm=norm),
        source=Source(title="test"),
        supports=fields.pop("supports", frozenset({"heads", "biases", "mask", "cross"})),
        cost="O(1)",
        compute=compute,
        summary="A test bound",
        **fields,
    )


def record(bound: str = "test.bound", value: float | None = 2.0, kind: str = "proved", **fields: Any) -> Record:
    """A record with the given fields of Question and Record, the rest made up."""
    asked: dict[str, Any] = {"task": "tightness", "model": "tiny", "model_hash": "weights", "layer": 0}
    asked |= {"input": "seed-0", "input_hash": "hash-0", "bound_version": 1, "norm": "l2"}
    asked |= {"dtype": "float64", "device": "cpu"}
    answer: dict[str, Any] = {
        "module": "block.0",
        "tokens": 3,
        "heads": 2,
        "scope": "point",
        "seconds": 0.5,
        "environment": "here",
    }
    answer["status"] = "failed" if value is None else "ok"
    for name, given in fields.items():
        for fields_of, place in ((Record, answer), (Question, asked)):
            if name in fields_of.__dataclass_fields__:
                place[name] = given
    return Record(question=Question(**asked, bound=bound), value=value, kind=kind, **answer)


def environment_line(*bounds: str, kind: str = "proved", **kinds: str) -> dict[str, Any]:
    """What an environment line says about these methods and the tiny model."""
    methods = {
        name: {"role": "bound", "version": 1, "kind": kinds.get(name, kind), "scope": "point", "norm": "l2"}
        | {"summary": f"Summary of {name}: more.", "source": "test", "cost": "O(1)"}
        for name in (*bounds, *kinds)
    }
    return {
        "started": "2025-01-01T00:00:00.000+00:00",
        "command": "python -m bench",
        "environment": {"cpu": "abacus", "commit": "0123456789abcdef", "dirty": True, "packages": {"torch": "2.6"}},
        "methods": methods,
        "models": {"tiny": "Tiny: two layers"},
    }
