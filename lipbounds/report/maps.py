"""Which attention maps a report keeps: all where they fit into a file, else those of the most fragile heads."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lipbounds.report.schema import InputReport
from lipbounds.report.summary import fragile_heads
from lipbounds.targets.attention import Attention


MAP_DIGITS = 4
MAP_ENTRIES = 2_000_000  # of all maps: about 16 MB of HTML


def with_maps(inputs: tuple[InputReport, ...], blocks: Sequence[Sequence[Attention]]) -> tuple[InputReport, ...]:
    """The same reports with attention maps, of no more entries than `MAP_ENTRIES`: the inputs take turns, head by head.

    Args:
        inputs: without maps.
        blocks: of each input, one for each layer of its report.
    """
    order = [_by_fragility(run) for run in inputs]
    kept: list[set[tuple[int, int]]] = [set() for _ in inputs]
    left = MAP_ENTRIES
    for turn in range(max(map(len, order), default=0)):
        for run, heads, chosen in zip(inputs, order, kept, strict=True):
            if turn >= len(heads):
                continue
            layer = run.layers[heads[turn][0]]
            left -= len(layer.queries) * len(layer.keys)
            if left >= 0:
                chosen.add(heads[turn])
    return tuple(_with(*one) for one in zip(inputs, blocks, kept, strict=True))


def _by_fragility(run: InputReport) -> list[tuple[int, int]]:
    """All heads, the most fragile first and those without a constant last."""
    every = [(position, head.head) for position, layer in enumerate(run.layers) for head in layer.heads]
    return list(dict.fromkeys([*fragile_heads(run, most=len(every)), *every]))


def _with(run: InputReport, blocks: Sequence[Attention], kept: set[tuple[int, int]]) -> InputReport:
    layers = []
    for position, (layer, block) in enumerate(zip(run.layers, blocks, strict=True)):
        heads = tuple(
            dc.replace(head, attention=_to_digits(block.probabilities[head.head])) if (position, head.head) in kept
            else head
            for head in layer.heads
        )  # fmt: skip
        layers.append(dc.replace(layer, heads=heads))
    return dc.replace(run, layers=tuple(layers))


def _to_digits(rows: Float[Tensor, "n m"]) -> tuple[tuple[float, ...], ...]:
    """Attention with few digits: it is shown, not computed with."""
    return tuple(tuple(float(f"{p:.{MAP_DIGITS}g}") for p in row) for row in rows.tolist())
