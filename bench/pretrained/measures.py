"""What is measured at one attention block: how its rows and maps are distributed, its constant, and bounds on it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bench.engine.reference import LARGEST_RESIDUAL, LOWER, STEPS
from bench.engine.store import Answer
from lipbounds import registry
from lipbounds.errors import Unsupported
from lipbounds.ops.attention_statistics import row_statistics, sink_shares
from lipbounds.ops.softmax import inf_to_one_norm_upper
from lipbounds.targets.attention import Attention


BOUNDS = ("sharp_fast", "covariance.exact", "centred.products", "yudin2025.biased", "yudin2025.biased_half")
SHARP = "sharp"  # seconds a block, so at the first input and a few layers only
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ONE_HOT, NEAR_ONE, SINK = 0.9, 0.9, 0.5
DIGITS = 6


def distribution(block: Attention) -> Answer:
    """How the rows and the maps of a block are distributed.

    Rows that see one key only (the first of a causal map) are one-hot by construction, and left out of the rows.

    Args:
        block: without batch dimensions.
    """
    logits = block.logits
    rows = row_statistics(logits)
    seen = rows.keys > 1
    lower, upper = theta_lower(logits)[seen], theta_upper(logits)[seen]
    g_1, largest = rows.g_1[seen], rows.largest[seen]
    marks = torch.tensor(QUANTILES, dtype=g_1.dtype, device=g_1.device)
    return {
        "rows": int(seen.sum()),
        "one_hot": _share(largest > ONE_HOT),
        "g_1": _list(torch.quantile(g_1.flatten(), marks)),
        "g_1_mean": _number(g_1.mean()),
        "g_1_largest": _number(g_1.max()),
        "theta": _list(torch.quantile(lower.flatten(), marks)),
        "theta_mean": [_number(lower.mean()), _number(upper.mean())],
        "theta_near_1": [_share(lower >= NEAR_ONE), _share(upper >= NEAR_ONE)],
        "sinks": sinks(block),
    }


def theta_upper(logits: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n"]:
    """theta of each row from above: exact where p_(1) >= 1/2, otherwise 1 unless the row is short.

    Args:
        logits: -inf marks a masked key.
    """
    return inf_to_one_norm_upper(logits.softmax(-1)).clamp(max=1.0)


def theta_lower(logits: Float[Tensor, "*batch n m"]) -> Float[Tensor, "*batch n"]:
    """theta = 4 max_S m(S) (1 - m(S)) of each row from below: the best of two chains of sets S.

    The first chain takes the keys from the most probable down; the second takes the most probable and then the others
    from the least probable up. Where p_(1) >= 1/2, the first set of either is the best of all. Exact up to rounding
    for the sets that are tried.

    Args:
        logits: -inf marks a masked key.
    """
    down = logits.softmax(-1).sort(-1, descending=True).values
    up = torch.cat([down[..., :1], down[..., 1:].flip(-1)], -1)
    masses = torch.stack([down.cumsum(-1), up.cumsum(-1)])
    return (4 * masses * (1 - masses)).amax(-1).amax(0).clamp(min=0.0)


def sinks(block: Attention) -> Answer:
    """The maps of which one key gets more than half of the mass, where that key is, and how large its value is.

    `values`: the norm of the value of that key over the median norm of the values, median over these maps.

    Args:
        block: without batch dimensions.
    """
    found = sink_shares(block.logits)
    sink = found.most_attended > SINK
    positions = found.position[sink].tolist()
    norms = block.values.norm(dim=-1)
    relative = norms.gather(-1, found.position.unsqueeze(-1)).squeeze(-1) / norms.median(-1).values
    return {
        "heads": block.heads,
        "count": int(sink.sum()),
        "first": sum(position == 0 for position in positions),
        "positions": positions,
        "mass": _number(found.most_attended.mean()),
        "values": _number(relative[sink].median()) if positions else None,
    }


def without_sinks(block: Attention) -> Attention | None:
    """The block with the sink of each map hidden, from the rows that see another key; None where no map has one.

    It says what the sink does to the numbers of this block, and nothing about a model that was trained without.

    Args:
        block: without batch dimensions.
    """
    found = sink_shares(block.logits)
    sink = found.most_attended > SINK
    if not bool(sink.any()):
        return None
    at_sink = torch.nn.functional.one_hot(found.position, block.logits.shape[-1]).bool()
    hidden: Bool[Tensor, "heads n m"] = (at_sink & sink.unsqueeze(-1)).unsqueeze(-2) & _several(block).unsqueeze(-1)
    bias = torch.zeros_like(block.logits).masked_fill(hidden, -torch.inf)
    return block.replace(logit_bias=bias if block.logit_bias is None else block.logit_bias + bias)


def _several(block: Attention) -> Bool[Tensor, "heads n"]:
    """Whether a row sees more than one key."""
    return (~block.logits.isneginf()).sum(-1) > 1


def norms(block: Attention, names: tuple[str, ...] = BOUNDS) -> Answer:
    """The constant of a block by Lanczos from below, until the residual is at most 1e-6 of it, and bounds on it.

    Args:
        block: without batch dimensions, in float64.
        names: of the bounds; those that do not cover the block are left out.
    """
    constant, residual = float("nan"), float("nan")
    for steps in STEPS:
        result = registry.get(LOWER)(block, steps=steps)
        constant, residual = result.value.item(), float(result.details.get("residual", 0.0))
        if residual <= LARGEST_RESIDUAL:
            break
    found: dict[str, float] = {}
    for name in names:
        try:
            found[name] = registry.get(name)(block).value.item()
        except Unsupported:
            continue
    return {"constant": constant, "residual": residual, "bounds": found}


def versions(names: tuple[str, ...]) -> dict[str, int]:
    """Those of bounds, which the answers depend on.

    Args:
        names: of the bounds.
    """
    return {name: registry.get(name).version for name in names}


def _share(flags: Tensor) -> float:
    return _number(flags.double().mean())


def _number(value: Any) -> float:
    return float(f"{float(value):.{DIGITS}g}")


def _list(values: Tensor) -> list[float]:
    return [_number(value) for value in values.tolist()]
