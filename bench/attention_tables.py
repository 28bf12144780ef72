"""The page of the task `attention`: first what was found, in sentences made of the numbers, then the tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.attention_links import (
    DESCRIPTIONS,
    LARGEST,
    MEAN,
    PARTS,
    Data,
    Link,
    arrays,
    attacked,
    bound_names,
    factors,
    links,
    over_layers,
    whole_network,
)
from bench.correlation import (
    Estimate,
    Statistic,
    estimate,
    pearson_logs_across,
    pearson_logs_within,
    spearman_across,
    spearman_within,
)
from bench.wording import figure, table


NORMS = {"L2": "l2", "Linf": "l_inf"}
HEADS_SHOWN = ("minilm", "digits-vit")


def report(data: Data, command: str, records_path: str, environment: str) -> str:
    """The page of results.

    Args:
        data: what `bench.tasks.attention.run` returned.
        command: that made it.
        records_path: where the answers are.
        environment: of this run, in a line.
    """
    chains = {name: links(data, name) for name in data["models"]}
    measures = {name: factors(data, name) for name in data["models"]}
    parts = [
        "# Attention distributions, local constants and perturbations",
        f"Made by `{command}` from `{records_path}`; nothing here is written by hand.",
        "The explanation under test (Yudin et al. 2025): rows of attention with a small "
        "g_1 = p_(1) (1 - p_(1) + p_(2)) give small local Lipschitz constants, and these make a model harder to fool. "
        "Here it is tested across inputs, at fixed weights; whether training with the penalty JaSMin lowers constants "
        "and helps robustness is another question, which `python -m bench robustness` is about.",
        "## What was found",
        "\n".join(f"- {line}" for line in statements(data, chains, measures)),
        "![attention maps beside g_1 of their rows](attention_maps.png)",
        "![g_1 against the true constant, and perturbations](attention_scatter.png)",
        "## The explanation, link by link",
        "Spearman's correlation and its 95 % interval. `holds`: the interval is on the claimed side of 0; `the "
        "opposite`: on the other side; `not seen`: 0 is inside. Claimed are positive correlations, but negative ones "
        "with the perturbation. Blocks: within layers, pooled. Rows: mean over blocks of the correlation over the "
        "rows of a block, g_1 being the mean over heads. Images: geometric mean over layers. With about twenty "
        "intervals a table, one misses its truth by chance.",
        _links(chains),
        "By how much: the median in the third of the inputs with the largest mean g_1 over that in the third with the "
        "smallest, mean over layers. 1 is no difference.",
        _links(measures, neutral=1.0),
        "## What a block's numbers say about its true constant",
    ]
    for title, statistic in CORRELATIONS.items():
        parts += [f"### {title}", _predictors(data, statistic)]
    parts += [_METHODS, *_attacks(data), "## Attention maps", "![histograms by layer](attention_statistics.png)"]
    parts += [part for name, model in data["models"].items() for part in _layers(name, model)]
    return "\n\n".join([*parts, "## Environment", f"- {environment}"]) + "\n"


CORRELATIONS: dict[str, Statistic] = {
    "Across inputs within a layer, Spearman": spearman_within,
    "Across inputs within a layer, Pearson of logarithms": pearson_logs_within,
    "All blocks of a model together, Spearman": spearman_across,
    "All blocks of a model together, Pearson of logarithms": pearson_logs_across,
}
_METHODS = (
    "Within a layer: ranks or logarithms are centred in each layer, then pooled over layers. Intervals: percentile "
    "bootstrap, 1000 replicates, seeded; inputs are drawn with all their layers, so that an interval is about other "
    "inputs of the same model, not about other models. True constant: norm of the Jacobian of the block at its input, "
    "exact or by Lanczos to a residual of 1e-6. Mixing part: the Jacobian with the attention map held fixed; softmax "
    "part: the rest. `tokens`: length of the input, where it varies."
)


def statements(data: Data, chains: dict[str, list[Link]], measures: dict[str, list[Link]]) -> list[str]:
    """What the numbers say, in sentences.

    Args:
        data: what `bench.tasks.attention.run` returned.
        chains: of each model, from `links`.
        measures: of each model, from `factors`.
    """
    return [
        _claim("**Smaller g_1, smaller local constant**", chains, "blocks: mean g_1 with the true constant", measures),
        _claim("**Smaller largest g_1 (which Theorem 3 uses), smaller local constant**", chains,
               "blocks: largest g_1 with the true constant"),
        *(
            _claim(f"**Smaller g_1, harder to fool ({NORMS[norm]})**", chains,
                   f"images: {MEAN} with the perturbation, {norm}", measures, f"perturbation, {norm}")
            for norm in _norms(data)
        ),
        *(
            _claim(f"**Smaller local constants of the blocks, harder to fool ({NORMS[norm]})**", chains,
                   f"images: true constant with the perturbation, {norm}")
            for norm in _norms(data)
        ),
        *_other_predictors(data),
        _mixing(data),
        _saturation(data),
        _best_bound(data),
        _shapes(data),
    ]  # fmt: skip


def _norms(data: Data) -> list[str]:
    return list(dict.fromkeys(norm for attack in data["attacks"].values() for norm in attack["distances"]))


def _claim(
    title: str,
    chains: dict[str, list[Link]],
    words: str,
    measures: dict[str, list[Link]] | None = None,
    measured: str = "true constant",
) -> str:
    """One claim at all models that have the link: verdicts, correlations, and by how much."""
    found = {name: link for name, chain in chains.items() for link in chain if link.words == words}
    verdicts = {name: link.found.verdict(link.sign) for name, link in found.items()}
    counts = [
        f"{verdict} at {sum(other == verdict for other in verdicts.values())}"
        for verdict in ("holds", "the opposite", "not seen")
        if verdict in verdicts.values()
    ]
    cells = []
    for name, link in found.items():
        ratio = next((row for row in (measures or {}).get(name, []) if row.words == measured), None)
        factor = "" if ratio is None else f", factor {_interval(ratio.found)}"
        cells.append(f"{name} {_interval(link.found)}{factor} ({verdicts[name]})")
    return f"{title}: {', '.join(counts)} of {len(found)} models. Spearman: {'; '.join(cells)}."


def _other_predictors(data: Data) -> list[str]:
    """What does tell how hard an image is to fool."""
    lines = []
    for name, attack in data["attacks"].items():
        for norm in attack["distances"]:
            found = whole_network(attack, norm)
            cells = [f"{words} {_interval(value)}" for words, value in found.items()]
            lines.append(f"What goes with the perturbation that fools {name} ({NORMS[norm]}): {'; '.join(cells)}.")
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
            cells.append(f"{name} `{best}` {_interval(scores[best])}")
    return f"The bound whose ranks follow the true constant best, within layers: {'; '.join(cells)}."


def _shapes(data: Data) -> str:
    cells = []
    for name, model in data["models"].items():
        layers = [layer for answer in model["inputs"] for layer in answer["layers"]]
        peaked = np.mean([layer["one_hot_rows"] for layer in layers])
        sinks = np.mean([share > 0.5 for layer in layers for share in layer["heads"]["most_attended"]])
        cells.append(f"{name} {peaked:.0%} and {sinks:.0%}")
    return f"Rows with p_(1) > 0.9, and maps with half of their mass on one key: {'; '.join(cells)}."


def _interval(found: Estimate) -> str:
    if not math.isfinite(found.value):
        return "-"
    interval = f" [{found.low:.2f}, {found.high:.2f}]" if math.isfinite(found.low) else ""
    return f"{found.value:.2f}{interval}"


def _links(chains: dict[str, list[Link]], neutral: float = 0.0) -> str:
    words = list(dict.fromkeys(link.words for chain in chains.values() for link in chain))
    rows = []
    for row in words:
        by_model = {name: link for name, chain in chains.items() for link in chain if link.words == row}
        signs = {link.sign for link in by_model.values()}
        claimed = ("above" if signs == {1} else "below") + f" {neutral:g}"
        rows.append([row, claimed, *(_verdict(by_model.get(name), neutral) for name in chains)])
    return table(["link", "claimed", *chains], rows)


def _verdict(link: Link | None, neutral: float) -> str:
    if link is None or not math.isfinite(link.found.value):
        return "-"
    return f"{_interval(link.found)} {link.found.verdict(link.sign, neutral)}"


def _predictors(data: Data, statistic: Statistic) -> str:
    """Correlation of everything known about a block with its true constant."""
    found = {name: arrays(model) for name, model in data["models"].items()}
    names = [*DESCRIPTIONS, "tokens", "mixing part", "softmax part"]
    names += sorted({name for of in found.values() for name in bound_names(of)})
    rows = []
    for predictor in names:
        cells = [
            _interval(estimate(statistic, of[predictor], of["true constant"])) if predictor in of else "-"
            for of in found.values()
        ]
        rows.append([f"`{predictor}`" if "." in predictor or predictor == "sharp_fast" else predictor, *cells])
    return table(["of a block", *found], rows)


def _attacks(data: Data) -> list[str]:
    """The correlations with the perturbations, layer by layer."""
    effort = data["effort"]
    parts = [
        "## What goes with the perturbation that fools an image",
        "Per image, the smallest distance to an image of another class that FAB found (of AutoAttack; "
        f"{effort['fab_targets']} most probable other classes, {effort['iterations']} iterations), that APGD on the "
        f"cross-entropy and at {effort['apgd_targets']} other classes found inside smaller radii ({effort['rounds']} "
        f"rounds of bisection between {effort['lowest']:g} and 1 times that distance), or that lies on the segment to "
        "the nearest of them. It is an upper bound of the true smallest perturbation. Pixels stay in [0, 1]; images "
        "that are classified wrong are left out.",
    ]
    for name, attack in data["attacks"].items():
        model = data["models"][name]
        for norm, distances in attack["distances"].items():
            found, broadcast = attacked(attack, model, norm)
            parts += [
                f"### {name}, {NORMS[norm]}",
                f"{len(distances)} images, {attack['wrong']} left out. Distances: median "
                f"{figure(float(np.median(distances)))}, smallest {figure(min(distances))}, largest "
                f"{figure(max(distances))}. Spearman's correlation with the distance over images:",
                _by_layer(found, broadcast),
                table(
                    ["of the whole network", "correlation"],
                    [[words, _interval(value)] for words, value in whole_network(attack, norm).items()],
                ),
            ]
    return parts


def _by_layer(found: dict[str, np.ndarray], distances: np.ndarray) -> str:
    layers = range(len(distances))
    rows = []
    for predictor in [*DESCRIPTIONS, *PARTS.values(), *bound_names(found)]:
        values = found[predictor]
        cells = [_interval(estimate(spearman_within, values[[k]], distances[[k]])) for k in layers]
        cells.append(_interval(estimate(spearman_within, over_layers(values), distances[:1])))
        rows.append([predictor, *cells])
    return table(["of a block", *(f"layer {k}" for k in layers), "geometric mean"], rows)


def _layers(name: str, model: Data) -> list[str]:
    """Statistics per layer, and per head for the trained models."""
    found = arrays(model)
    columns = [*DESCRIPTIONS, *PARTS.values()]
    modules = [layer["module"] for layer in model["inputs"][0]["layers"]]
    rows = [
        [modules[k] if " " in modules[k] else k, *(figure(float(found[column][k].mean())) for column in columns)]
        for k in range(len(modules))
    ]
    title = f"### {name}"
    about = f"{model['description']}. {len(model['inputs'])} inputs; means over rows, heads and inputs."
    parts = [title, about, table(["layer", *columns], rows)]
    if name in HEADS_SHOWN:
        parts += ["Per head, means over rows and inputs, the largest g_1 too being a mean over inputs:", _heads(model)]
    return parts


def _heads(model: Data) -> str:
    inputs: list[list[Any]] = [answer["layers"] for answer in model["inputs"]]
    rows = []
    for k in range(len(inputs[0])):
        values = {
            words: np.mean([layers[k]["heads"][key] for layers in inputs], 0) for words, key in DESCRIPTIONS.items()
        }
        heads = range(len(values[MEAN]))
        rows += [[k, head, *(figure(float(of[head])) for of in values.values())] for head in heads]
    return table(["layer", "head", *DESCRIPTIONS], rows)
