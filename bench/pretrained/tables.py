"""The page of the task `pretrained`: the answers in sentences made of the numbers, then the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from bench.attention.correlation import FEWEST_INPUTS, estimate, spearman_across
from bench.attention.findings import interval
from bench.pages.formatting import figure, table
from bench.pages.page import bullets, folded, marked_part, page
from bench.pretrained.measures import BOUNDS, NEAR_ONE, ONE_HOT, QUANTILES, SHARP, SINK
from bench.pretrained.task import BLOCK, TIGHTEST, WITHOUT
from lipbounds.number_format import counted


Data = dict[str, Any]
LOW, MIDDLE, HIGH = (QUANTILES.index(mark) for mark in (0.05, 0.5, 0.95))
PAPER = "yudin2025.biased"
METHODS = (
    f"Rows that see one key only are left out. One-hot: p_(1) > {ONE_HOT:g}. theta = 4 max_S p(S) (1 - p(S)) over the "
    "sets S of keys, the balanced-mass factor of Emadi 2026 (arXiv 2602.18849), is exact where p_(1) >= 1/2; elsewhere "
    "it is given from below, by the best of two chains of sets, and 1 from above. g_1 is rounded up. Quantiles are "
    "over the rows of a block, then means over blocks. Sink: a map of which one key gets more than "
    f"{SINK:.0%} of the mass. "
    "Constant: norm of the Jacobian of the block in l2 at its input, by Lanczos from below until the residual is at "
    "most 1e-6 of it (kind lower). Ratios are proved bounds over that constant, at a point, in l2, float64."
)


def report(data: Data, command: str, records_path: str, environments: list[str]) -> str:
    """The page of results.

    Args:
        data: what `bench.pretrained.task.shown` returned.
        command: that made it.
        records_path: where the answers are.
        environments: of the runs, a line each.
    """
    made = f"Made by `{command}` from `{records_path}`; nothing here is written by hand."
    packages = (
        "The weights lie in packages of the Python index ([how to install them](../docs/models.md)); `python -m bench "
        "render` needs none of them. Inputs: the sample images of ImageNet in foolbox 3.3.4, `sentences.txt` and "
        "`reactions.txt` of this repository, the first ones of at least 8 tokens. What was left out for its time: "
        "more and longer texts and more reactions (`--full` has some), and `sharp` but for the blocks its table names. "
        "Bounds on balls, at shorter inputs, have [a page of their own](pretrained_balls.md)."
    )
    parts = [
        "# Attention and tightness on pretrained models",
        bullets([_theta(data), _one_hot(data), _sinks(data), *_hidden_words(data), _tight(data)]),
        marked_part("pretrained", _overall(data)),
        made,
        METHODS,
        packages,
        "## What sinks do to the bounds",
        *_hidden(data, made),
        *_correlations(data, made),
        "## By layer",
    ]
    for name, of in data.items():
        parts += [f"### {name}", _about(of), folded("Rows and maps by layer", _rows_by_layer(of), made)]
        parts += [folded("Constants and bounds by layer", _bounds_by_layer(of), made), *_sharp(of, made)]
    return page([*parts, "## Environment", bullets(environments)])


def _about(of: Data) -> str:
    tokens = sorted({answer["tokens"] for answer in of[BLOCK]})
    inputs = len({answer["input"] for answer in of[BLOCK]})
    span = f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else f"{tokens[0]}"
    return f"{of['about']}. {counted(inputs, 'input')}, {span} tokens; {counted(len(of[BLOCK]), 'block')}."


# -- numbers of some blocks ---------------------------------------------------------------------------------------


def _share(blocks: Sequence[Data], value: Callable[[Data], float]) -> float:
    """Of all rows of the blocks."""
    return sum(value(block) * block["rows"] for block in blocks) / sum(block["rows"] for block in blocks)


def _maps(blocks: Sequence[Data]) -> tuple[int, int, int]:
    """How many maps there are, how many have a sink, and how many of those at the first token."""
    found = [block["sinks"] for block in blocks]
    return tuple(sum(each[key] for each in found) for key in ("heads", "count", "first"))  # pyright: ignore[reportReturnType]


def _ratio(block: Data, bound: str) -> float:
    return block["bounds"][bound] / block["constant"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _near(blocks: Sequence[Data]) -> str:
    """Share of rows with theta near 1, from below and above where they differ."""
    ends = [_percent(_share(blocks, lambda block, end=end: block["theta_near_1"][end])) for end in (0, 1)]
    return " to ".join(dict.fromkeys(ends))


def _mean(blocks: Sequence[Data], key: str, place: int) -> float:
    return fmean(block[key][place] for block in blocks)


# -- sentences ----------------------------------------------------------------------------------------------------


def _theta(data: Data) -> str:
    cells = [
        f"{name} {figure(_mean(of[BLOCK], 'theta', MIDDLE))} (5 % of the rows are below "
        f"{figure(_mean(of[BLOCK], 'theta', LOW))}; {_near(of[BLOCK])} of them reach {NEAR_ONE:g})"
        for name, of in data.items()
    ]
    return f"**theta of Emadi 2026**, median over rows, mean over blocks: {'; '.join(cells)}."


def _one_hot(data: Data) -> str:
    cells = [f"{name} {_percent(_share(of[BLOCK], lambda block: block['one_hot']))}" for name, of in data.items()]
    return f"**One-hot rows** (p_(1) > {ONE_HOT:g}): {'; '.join(cells)}."


def _sinks(data: Data) -> str:
    cells = []
    for name, of in data.items():
        maps, count, first = _maps(of[BLOCK])
        where = f", {_percent(first / count)} of them {of['first']}" if count else ""
        cells.append(f"{name} {_percent(count / maps)} of the maps{where}")
    return f"**Sinks**: {'; '.join(cells)}."


def _hidden_words(data: Data) -> list[str]:
    cells = []
    for name, of in data.items():
        if pairs := _pairs(of):
            constant, *factors = _factors(pairs)
            told = ", ".join(f"`{bound}` by {figure(factor)}" for bound, factor in zip(BOUNDS, factors, strict=True))
            counted = f"{len(pairs)} block{'s' if len(pairs) > 1 else ''}"
            cells.append(f"{name} ({counted}): the constant by {figure(constant)}, {told}")
    if not cells:
        return []
    return [
        f"**Hiding the sinks** from the rows that see another key multiplies, in the median: {'; '.join(cells)}. This "
        "is about the numbers of these blocks, not about a model trained without sinks."
    ]


def _tight(data: Data) -> str:
    cells = []
    for name, of in data.items():
        medians = {bound: median(_ratio(block, bound) for block in of[BLOCK]) for bound in BOUNDS}
        best = min(medians, key=medians.__getitem__)
        cells.append(f"{name} `{best}` {figure(medians[best])}, the paper's `{PAPER}` {figure(medians[PAPER])}")
    return f"**Bound over truth**, median over blocks, nearest of the bounds measured everywhere: {'; '.join(cells)}."


# -- tables -------------------------------------------------------------------------------------------------------


def _overall(data: Data) -> str:
    rows: dict[str, Callable[[Data], str]] = {
        "rows with p_(1) > 0.9": lambda of: _percent(_share(of[BLOCK], lambda block: block["one_hot"])),
        "rows with theta >= 0.9": lambda of: _near(of[BLOCK]),
        "theta, mean": lambda of: figure(fmean(block["theta_mean"][0] for block in of[BLOCK])),
        "theta, 5 % and median": lambda of: " and ".join(
            figure(_mean(of[BLOCK], "theta", place)) for place in (LOW, MIDDLE)
        ),
        "g_1, median and 95 %": lambda of: " and ".join(
            figure(_mean(of[BLOCK], "g_1", place)) for place in (MIDDLE, HIGH)
        ),
        "maps with a sink": lambda of: _percent(_maps(of[BLOCK])[1] / _maps(of[BLOCK])[0]),
        "value of the sink / median value": lambda of: _values(of[BLOCK]),
        "constant, median": lambda of: figure(median(block["constant"] for block in of[BLOCK])),
    }
    body = [[words, *(cell(of) for of in data.values())] for words, cell in rows.items()]
    for bound in BOUNDS:
        cells = [[_ratio(block, bound) for block in of[BLOCK]] for of in data.values()]
        body.append(
            [f"`{bound}` / constant", *(f"{figure(median(values))} ({figure(max(values))})" for values in cells)]
        )
    caption = (
        "By model; ratios of proved bounds to the constant: median (worst) over blocks. Constant: of a block in l2, at "
        "a point, lower bound by Lanczos up to 1e-6. Value: norm of the value of the sink, median over maps."
    )
    return f"{caption}\n\n{table(['', *data], body)}"


def _values(blocks: Sequence[Data]) -> str:
    found = [block["sinks"]["values"] for block in blocks if block["sinks"]["values"] is not None]
    return figure(median(found)) if found else "-"


def _pairs(of: Data) -> list[tuple[Data, Data]]:
    """The blocks with sinks, as they are and with the sinks hidden."""
    whole = {(block["input"], block["layer"]): block for block in of[BLOCK]}
    return [(whole[hidden["input"], hidden["layer"]], hidden) for hidden in of[WITHOUT]]


def _factors(pairs: Sequence[tuple[Data, Data]]) -> list[float]:
    """Median factor of the constant and of each bound."""
    found = [median(hidden["constant"] / whole["constant"] for whole, hidden in pairs)]
    return found + [median(hidden["bounds"][b] / whole["bounds"][b] for whole, hidden in pairs) for b in BOUNDS]


def _hidden(data: Data, made: str) -> list[str]:
    body = []
    for name, of in data.items():
        pairs = _pairs(of)
        if not pairs:
            continue
        body.append([name, len(pairs), *map(figure, _factors(pairs))])
        for bound in (BOUNDS[0], PAPER):
            ends = [figure(median(_ratio(pair[end], bound) for pair in pairs)) for end in (0, 1)]
            body.append([f"{name}: `{bound}` / constant, before and after", "", " and ".join(ends)])
    if not body:
        return ["No block with a sink was measured with the sink hidden."]
    caption = (
        "Median factor by which hiding the sinks changes the constant and each bound; and the median ratio of two "
        f"bounds before and after. {made}"
    )
    return [caption, table(["model", "blocks", "constant", *(f"`{bound}`" for bound in BOUNDS)], body)]


def _correlations(data: Data, made: str) -> list[str]:
    body = []
    for name, of in data.items():
        sink = _array(of, lambda block: block["sinks"]["count"] / block["sinks"]["heads"])
        targets = {"constant": lambda block: block["constant"]}
        targets |= {f"`{b}` / constant": lambda block, b=b: _ratio(block, b) for b in BOUNDS}
        cells = [_spearman(sink, _array(of, value)) for value in targets.values()]
        body.append([name, *cells])
    caption = (
        "Spearman's correlation, over all blocks of a model, of the share of maps with a sink with the constant and "
        "with the ratios; 95 % bootstrap intervals over inputs from eight inputs on. Layers differ in more than their "
        f"sinks. {made}"
    )
    return [caption, table(["model", "constant", *(f"`{bound}` / constant" for bound in BOUNDS)], body)]


def _spearman(x: np.ndarray, y: np.ndarray) -> str:
    """With its interval, where there are inputs enough to draw from."""
    inputs = x.shape[-1]
    if inputs >= FEWEST_INPUTS:
        return interval(estimate(spearman_across, x, y))
    value = float(spearman_across(x, y, np.arange(inputs)[None])[0])
    return figure(value) if math.isfinite(value) else "-"


def _array(of: Data, value: Callable[[Data], float]) -> np.ndarray:
    """A number of each block as an array `[layers, inputs]`."""
    layers = len({block["layer"] for block in of[BLOCK]})
    return np.array([value(block) for block in of[BLOCK]], dtype=float).reshape(-1, layers).T


def _layers(of: Data) -> list[tuple[int, list[Data]]]:
    numbers = sorted({block["layer"] for block in of[BLOCK]})
    return [(number, [block for block in of[BLOCK] if block["layer"] == number]) for number in numbers]


def _rows_by_layer(of: Data) -> str:
    body = []
    for number, blocks in _layers(of):
        maps, count, first = _maps(blocks)
        row = [number, _percent(_share(blocks, lambda block: block["one_hot"])), _near(blocks)]
        row += [figure(_mean(blocks, "theta", place)) for place in (LOW, MIDDLE)]
        row += [figure(_mean(blocks, "g_1", place)) for place in range(len(QUANTILES))]
        row += [figure(max(block["g_1_largest"] for block in blocks)), _percent(count / maps)]
        body.append([*row, _percent(first / count) if count else "-", _values(blocks)])
    titles = ["layer", "one-hot rows", "theta >= 0.9", "theta, 5 %", "theta, median"]
    titles += [f"g_1, {mark:.0%}" for mark in QUANTILES]
    titles += ["largest g_1", "maps with a sink", "of those the first token", "value of the sink / median value"]
    return table(titles, body)


def _bounds_by_layer(of: Data) -> str:
    body = [
        [number, figure(median(block["constant"] for block in blocks))]
        + [figure(median(_ratio(block, bound) for block in blocks)) for bound in BOUNDS]
        for number, blocks in _layers(of)
    ]
    return "Median ratios over inputs:\n\n" + table(["layer", "constant", *(f"`{bound}`" for bound in BOUNDS)], body)


def _sharp(of: Data, made: str) -> list[str]:
    if not of[TIGHTEST]:
        return []
    body = [[answer["layer"], figure(_ratio(answer, SHARP)), figure(answer["seconds"])] for answer in of[TIGHTEST]]
    caption = f"`{SHARP}` at the first input; seconds of processor time. {made}"
    return [folded(f"`{SHARP}` at a few layers", caption, table(["layer", f"`{SHARP}` / constant", "seconds"], body))]
