"""Statistics of attention maps as they go into the records, and the maps that are drawn, chosen by rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.workloads.case import Case
from lipbounds.ops.attention_statistics import row_statistics, sink_shares


ROW_STATISTICS = ("g_1", "largest", "entropy", "to_uniform", "to_one_hot")
HISTOGRAMS = {"g_1": 0.5, "largest": 1.0, "entropy": 1.0}  # with the largest value
BINS = 20
DIGITS = 6
# Title of each drawn map, with what it is the largest of.
KINDS = ("nearly one-hot", "sink", "nearly uniform", "half and half")


def statistics(logits: Tensor) -> dict[str, Any]:
    """Per head means over rows, the largest g_1, sink shares, and counts of rows over all heads for histograms.

    Entropy is divided by the logarithm of the number of visible keys, and 0 where there is one.

    Args:
        logits: of one block, `[heads, n, m]`.
    """
    rows, sinks = _rows(logits), sink_shares(logits)
    heads: dict[str, list[float]] = {name: _list(rows[name].mean(-1)) for name in ROW_STATISTICS}
    heads |= {"max_g_1": _list(rows["g_1"].amax(-1))}
    heads |= {"most_attended": _list(sinks.most_attended), "first": _list(sinks.first)}
    counts = {
        name: torch.histc(rows[name].clamp(0, top), BINS, 0, top).int().tolist() for name, top in HISTOGRAMS.items()
    }
    shares = {"one_hot_rows": float((rows["largest"] > 0.9).double().mean())}
    return {"heads": heads, "histograms": counts, **shares}


def examples(cases: list[Case]) -> dict[str, Any]:
    """One map of each kind among all heads at an input, with g_1 of its rows.

    Nearly one-hot: the largest mean p_(1) among heads where no key gets half of the mass. Sink: the largest share on
    one key. Nearly uniform: the smallest mean distance to uniform rows. Half and half: the largest mean g_1.

    Args:
        cases: the blocks at the input.
    """
    heads = [
        (case.layer, head, _rows(logits), float(sink_shares(logits).most_attended), logits)
        for case in cases
        for head, logits in enumerate(case.block.logits)
    ]
    scores = {
        "nearly one-hot": lambda rows, sink: float(rows["largest"].mean()) if sink < 0.5 else -1.0,
        "sink": lambda rows, sink: sink,
        "nearly uniform": lambda rows, sink: -float(rows["to_uniform"].mean()),
        "half and half": lambda rows, sink: float(rows["g_1"].mean()),
    }
    maps = []
    for kind in KINDS:
        layer, head, rows, sink, logits = max(heads, key=lambda entry: scores[kind](entry[2], entry[3]))
        maps.append(
            {
                **{"kind": kind, "layer": layer, "head": head, "sink": round(sink, DIGITS)},
                "map": [[round(value, 4) for value in row] for row in logits.softmax(-1).tolist()],
                "g_1": [round(value, 4) for value in rows["g_1"].tolist()],
            }
        )
    return {"maps": maps}


def _rows(logits: Tensor) -> dict[str, Tensor]:
    rows = row_statistics(logits)
    found = {name: getattr(rows, name) for name in ROW_STATISTICS}
    found["entropy"] = torch.where(rows.keys > 1, found["entropy"] / rows.keys.clamp(min=2).log(), 0.0)
    return found


def _list(values: Tensor) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
