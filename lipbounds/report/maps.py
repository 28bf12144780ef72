"""Which attention maps a report keeps: all where they fit into a file, else those of the most fragile heads."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.report.schema import InputReport
from lipbounds.report.summary import fragile_heads


MAP_ENTRIES = 2_000_000  # of all maps: about 16 MB of HTML


def without_most_maps(inputs: tuple[InputReport, ...]) -> tuple[InputReport, ...]:
    """The same reports, with no more entries of maps than `MAP_ENTRIES`: the inputs take turns, head by head.

    Args:
        inputs: with all maps.
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
            if left < 0:
                return tuple(_only(one, some) for one, some in zip(inputs, kept, strict=True))
            chosen.add(heads[turn])
    return inputs


def _by_fragility(run: InputReport) -> list[tuple[int, int]]:
    """All heads, the most fragile first and those without a constant last."""
    every = [(position, head.head) for position, layer in enumerate(run.layers) for head in layer.heads]
    return list(dict.fromkeys([*fragile_heads(run, most=len(every)), *every]))


def _only(run: InputReport, kept: set[tuple[int, int]]) -> InputReport:
    layers = []
    for position, layer in enumerate(run.layers):
        heads = tuple(
            head if (position, head.head) in kept else dc.replace(head, attention=None) for head in layer.heads
        )
        layers.append(dc.replace(layer, heads=heads))
    return dc.replace(run, layers=tuple(layers))
