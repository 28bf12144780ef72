"""What the task `attention` found, in sentences made of the numbers."""

from __future__ import annotations

import math

import numpy as np

from bench.attention.correlation import Estimate, estimate, spearman_within
from bench.attention.links import (
    AT_LENGTH,
    CONSTANT,
    LARGEST,
    MEAN,
    WHOLE,
    Data,
    Link,
    arrays,
    bound_names,
    whole_network,
)
from bench.pages.formatting import figure
from lipbounds.number_format import counted


NORMS = {"L2": "l2", "Linf": "l_inf"}


def statements(data: Data, chains: dict[str, list[Link]], measures: dict[str, list[Link]]) -> list[str]:
    """What the numbers say, in sentences.

    Args:
        data: what `bench.attention.task.run` returned.
        chains: of each model, from `links`.
        measures: of each model, from `factors`.
    """
    lines = [
        _summary(chains),
        _claim("**Smaller g_1, smaller local constant of the block**", chains, f"blocks: {MEAN} with the {CONSTANT}",
               measures, CONSTANT),
        _claim("**The same with the length of the input held fixed, where it varies**", chains,
               f"blocks: {MEAN} with the {CONSTANT}{AT_LENGTH}"),
        _claim("**Smaller largest g_1 (which Theorem 3 uses), smaller local constant of the block**", chains,
               f"blocks: {LARGEST} with the {CONSTANT}"),
        _claim("**Smaller g_1, smaller local constant of the whole network**", chains, f"images: {MEAN} with {WHOLE}"),
    ]  # fmt: skip
    lines += [
        _claim(f"**Smaller g_1, harder to fool ({NORMS[norm]})**", chains,
               f"images: {MEAN} with the perturbation, {norm}", measures, f"perturbation, {norm}")
        for norm in _norms(data)
    ]  # fmt: skip
    more = [_mixing(data), _saturation(data), _best_bound(data), _shapes(data)]
    return [line for line in (*lines, *_other_predictors(data), *more) if line]


def _summary(chains: dict[str, list[Link]]) -> str:
    """How often the interval is on the claimed side, at each step from g_1 to robustness."""
    steps = {
        "smaller constants of blocks": f"blocks: {MEAN} with the {CONSTANT}",
        "a smaller constant of the whole network": f"images: {MEAN} with {WHOLE}",
        "larger perturbations": f"images: {MEAN} with the perturbation, ",
    }
    cells = []
    for words, start in steps.items():
        found = []
        for chain in chains.values():
            links = [link for link in chain if link.words.startswith(start)]
            fixed = [link for link in links if link.words.endswith(AT_LENGTH)]
            found += fixed or links
        held = sum(link.found.verdict(link.sign) == "holds" for link in found)
        cells += [f"with {words} in {held} of {counted(len(found), 'case')}"] if found else []
    return (
        f"**In short**, across inputs a smaller g_1 goes {', '.join(cells)} (a case: a model, or a model "
        "and a norm; the length of the input is held fixed where it varies)."
    )


def _norms(data: Data) -> list[str]:
    return list(dict.fromkeys(norm for attack in data["attacks"].values() for norm in attack["distances"]))


def _claim(
    title: str,
    chains: dict[str, list[Link]],
    words: str,
    measures: dict[str, list[Link]] | None = None,
    measured: str = "",
) -> str:
    """One claim at all models that have the link: verdicts, correlations, and by how much."""
    found = {name: link for name, chain in chains.items() for link in chain if link.words == words}
    if not found:
        return ""
    verdicts = {name: link.found.verdict(link.sign) for name, link in found.items()}
    counts = [
        f"{verdict} at {sum(other == verdict for other in verdicts.values())}"
        for verdict in ("holds", "the opposite", "not seen")
        if verdict in verdicts.values()
    ]
    cells = []
    for name, link in found.items():
        ratio = next((row for row in (measures or {}).get(name, []) if row.words == measured), None)
        factor = "" if ratio is None else f", factor {interval(ratio.found)}"
        cells.append(f"{name} {interval(link.found)}{factor} ({verdicts[name]})")
    return f"{title}: {', '.join(counts)} of {counted(len(found), 'model')}. Spearman: {'; '.join(cells)}."


def _other_predictors(data: Data) -> list[str]:
    """What does tell how hard an image is to fool, in the first norm of the attacks."""
    lines = []
    for name, attack in data["attacks"].items():
        norm = next(iter(attack["distances"]))
        cells = [f"{words} {interval(value)}" for words, value in whole_network(attack, norm).items()]
        lines.append(f"What goes with the perturbation that fools {name}, {NORMS[norm]}: {'; '.join(cells)}.")
    return lines


def _mixing(data: Data) -> str:
    cells = []
    for name, model in data["models"].items():
        found = arrays(model)
        mixing, softmax = (np.median(found[part] / found["true constant"]) for part in ("mixing part", "softmax part"))
        cells.append(f"{name} {figure(float(mixing))} and {figure(float(softmax))}")
    return (
        "g_1 bounds the softmax part alone. Norm of the mixing part, which it says nothing about, and of the softmax "
        f"part, over the true constant, medians: {'; '.join(cells)}."
    )


def _saturation(data: Data) -> str:
    cells = [f"{name} {figure(float(np.median(arrays(model)[LARGEST])))}" for name, model in data["models"].items()]
    return f"The largest g_1 of a block can be 1/2 at most, and its median is: {'; '.join(cells)}."


def _best_bound(data: Data) -> str:
    cells = []
    for name, model in data["models"].items():
        found = arrays(model)
        constant = found["true constant"]
        scores = {bound: estimate(spearman_within, found[bound], constant) for bound in bound_names(found)}
        scores = {bound: score for bound, score in scores.items() if math.isfinite(score.value)}
        if scores:
            best = max(scores, key=lambda bound: scores[bound].value)
            cells.append(f"{name} `{best}` {interval(scores[best])}")
    return f"The bound whose ranks follow the true constant best, within layers: {'; '.join(cells)}."


def _shapes(data: Data) -> str:
    cells = []
    for name, model in data["models"].items():
        layers = [layer for answer in model["inputs"] for layer in answer["layers"]]
        peaked = np.mean([layer["one_hot_rows"] for layer in layers])
        sinks = np.mean([share > 0.5 for layer in layers for share in layer["heads"]["most_attended"]])
        cells.append(f"{name} {peaked:.0%} and {sinks:.0%}")
    return f"Rows with p_(1) > 0.9, and maps with half of their mass on one key: {'; '.join(cells)}."


def interval(found: Estimate) -> str:
    """An estimate with its interval, a dash if there is none."""
    if not math.isfinite(found.value):
        return "-"
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.2f}{interval}"
