"""The page of the task `attention`: first what was found, in sentences made of the numbers, then the tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bench.attention.correlation import (
    Statistic,
    estimate,
    pearson_logs_across,
    pearson_logs_within,
    spearman_across,
    spearman_within,
)
from bench.attention.findings import NORMS, interval, statements
from bench.attention.links import (
    DESCRIPTIONS,
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
from bench.pages.formatting import figure, table
from bench.pages.page import bullets, folded, page
from lipbounds.number_format import counted


HEADS_SHOWN = ("minilm", "digits-vit")


def report(data: Data, command: str, records_path: str, environment: str) -> str:
    """The page of results.

    Args:
        data: what `bench.attention.task.run` returned.
        command: that made it.
        records_path: where the answers are.
        environment: of this run, in a line.
    """
    chains = {name: links(data, name) for name in data["models"]}
    measures = {name: factors(data, name) for name in data["models"]}
    told = statements(data, chains, measures)
    parts = [
        "# Attention distributions, local constants and perturbations",
        told[0],
        "![g_1 against the true constant, and perturbations](attention_scatter.png)",
        "By how much: the median in the third of the inputs with the largest mean g_1 over that in the third with the "
        "smallest, mean over layers, and its 95 % interval. 1 is no difference. `holds`: the interval is on the "
        "claimed side of 1; `the opposite`: on the other side; `not seen`: 1 is inside.",
        _links(measures, neutral=1.0),
        "![attention maps and, to the right of each, g_1 of their rows](attention_maps.png)",
        f"Made by `{command}` from `{records_path}`; nothing here is written by hand.",
        "The explanation under test, in our words, after Yudin et al. 2025: rows of attention with a "
        "small g_1 = p_(1) (1 - p_(1) + p_(2)) give small local Lipschitz constants, and these make a model "
        "harder to fool. Here it is tested across inputs, at fixed weights; whether training with the penalty JaSMin "
        "lowers constants and helps robustness is another question, which `python -m bench robustness` is about.",
        "## What was found",
        folded(
            "All findings, with their numbers",
            "Spearman's correlation with its 95 % interval. Factor: as in the table above.",
            bullets(told[1:]),
        ),
        "## The explanation, link by link",
        "Spearman's correlation and its 95 % interval. `holds`: the interval is on the claimed side of 0; `the "
        "opposite`: on the other side; `not seen`: 0 is inside. Claimed are positive correlations, but negative ones "
        "with the perturbation. Blocks: within layers, pooled. Rows: mean over blocks of the correlation over the "
        "rows of a block, g_1 being the mean over heads. Length held fixed: partial correlation given the number of "
        "tokens. Images: geometric mean over layers. Of twenty such "
        "intervals one misses its truth by chance.",
        folded("All links", _links(chains)),
        "## What a block's numbers say about its true constant",
        _METHODS,
    ]
    parts += [folded(title, _predictors(data, statistic)) for title, statistic in CORRELATIONS.items()]
    parts += [*_attacks(data), "## Attention maps", "![histograms by layer](attention_statistics.png)"]
    parts += [part for name, model in data["models"].items() for part in _layers(name, model)]
    return page([*parts, "## Environment", f"- {environment}"])


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
    return f"{interval(link.found)} {link.found.verdict(link.sign, neutral)}"


def _predictors(data: Data, statistic: Statistic) -> str:
    """Correlation of everything known about a block with its true constant."""
    found = {name: arrays(model) for name, model in data["models"].items()}
    names = [*DESCRIPTIONS, "tokens", "mixing part", "softmax part"]
    names += sorted({name for of in found.values() for name in bound_names(of)})
    rows = []
    for predictor in names:
        cells = [
            interval(estimate(statistic, of[predictor], of["true constant"])) if predictor in of else "-"
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
                f"{counted(len(distances), 'image')}, {attack['wrong']} left out. Distances: median "
                f"{figure(float(np.median(distances)))}, smallest {figure(min(distances))}, largest "
                f"{figure(max(distances))}. Spearman's correlation with the distance over images:",
                folded("By layer", _by_layer(found, broadcast)),
                table(
                    ["of the whole network", "correlation"],
                    [[words, interval(value)] for words, value in whole_network(attack, norm).items()],
                ),
            ]
    return parts


def _by_layer(found: dict[str, np.ndarray], distances: np.ndarray) -> str:
    layers = range(len(distances))
    rows = []
    for predictor in [*DESCRIPTIONS, *PARTS.values(), *bound_names(found)]:
        values = found[predictor]
        cells = [interval(estimate(spearman_within, values[[k]], distances[[k]])) for k in layers]
        cells.append(interval(estimate(spearman_within, over_layers(values), distances[:1])))
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
    about = f"{model['description']}. {counted(len(model['inputs']), 'input')}; means over rows, heads and inputs."
    parts = [title, about, folded("By layer", table(["layer", *columns], rows))]
    if name in HEADS_SHOWN:
        per_head = "Means over rows and inputs; the largest g_1, too, is a mean over inputs."
        parts += [folded("By head", per_head, _heads(model))]
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
