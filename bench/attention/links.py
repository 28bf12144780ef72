"""The numbers behind the page of the task `attention`: arrays over layers and inputs, and the links of the explanation.

The explanation under test, in our words, after Yudin et al. 2025: rows with a small g_1 give
small local constants, and these make a model harder to fool. Each link is a correlation with the sign that the
explanation claims.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.attention.correlation import (
    Estimate,
    estimate,
    mean_of_first,
    spearman_within,
    spearman_within_given,
    thirds_ratio,
)


Data = dict[str, Any]
Arrays = dict[str, np.ndarray]
MEAN, LARGEST = "mean g_1", "largest g_1"
# Names of what describes a map, with the key of its per-head numbers; each is averaged over heads, but for the largest.
DESCRIPTIONS = {
    MEAN: "g_1",
    LARGEST: "max_g_1",
    "entropy / log keys": "entropy",
    "largest probability": "largest",
    "distance to uniform": "to_uniform",
    "distance to one-hot": "to_one_hot",
    "share of the most attended key": "most_attended",
    "share of the first key": "first",
}
CONSTANT, WHOLE = "true constant", "the norm of the whole Jacobian"
AT_LENGTH = ", length held fixed"
MODELS_KEPT = 8
_MADE: list[tuple[Data, Arrays]] = []  # of the last models: tables and figures ask for the same arrays
PARTS = {"constant": CONSTANT, "mixing": "mixing part", "softmax": "softmax part"}


class Link(NamedTuple):
    """One link of the explanation at one model.

    Args:
        words: what is correlated.
        sign: the claimed one.
        found: Spearman's correlation.
    """

    words: str
    sign: int
    found: Estimate


def arrays(model: Data) -> Arrays:
    """Each number of the blocks of a model as an array `[layers, inputs]`: descriptions, parts, bounds, tokens.

    Args:
        model: an entry of `models` of what `bench.attention.task.run` returned; it stays as it is.
    """
    for known, found in _MADE:
        if known is model:
            return found
    found = _arrays(model)
    del _MADE[:-MODELS_KEPT]
    _MADE.append((model, found))
    return found


def _arrays(model: Data) -> Arrays:
    blocks = [layer for answer in model["inputs"] for layer in answer["layers"]]
    inputs = len(model["inputs"])

    def gather(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=float).reshape(inputs, -1).T

    found = {}
    for words, key in DESCRIPTIONS.items():
        heads = [np.array(layer["heads"][key]) for layer in blocks]
        found[words] = gather([of.max() if words == LARGEST else of.mean() for of in heads])
    found |= {words: gather([layer[key] for layer in blocks]) for key, words in PARTS.items()}
    found["tokens"] = gather([layer["tokens"] for layer in blocks])
    everywhere = set.intersection(*(set(layer["bounds"]) for layer in blocks))
    return found | {name: gather([layer["bounds"][name] for layer in blocks]) for name in sorted(everywhere)}


def bound_names(found: Arrays) -> list[str]:
    """Those of the arrays that are bounds."""
    return [name for name in found if name not in {*DESCRIPTIONS, *PARTS.values(), "tokens"}]


def attacked(attack: Data, model: Data, norm: str) -> tuple[Arrays, np.ndarray]:
    """The arrays of the attacked images, and the distances at which they were fooled, alike in all layers.

    Args:
        attack: an entry of `attacks`.
        model: the entry of `models` of the same name.
        norm: of the attack.
    """
    places = {answer["input"]: number for number, answer in enumerate(model["inputs"])}
    chosen = [places[f"image-{image}"] for image in attack["images"]]
    found = {name: values[:, chosen] for name, values in arrays(model).items()}
    distances = np.array(attack["distances"][norm])
    return found, np.broadcast_to(distances, found[MEAN].shape)


def over_layers(values: np.ndarray) -> np.ndarray:
    """Geometric mean over layers, as one layer."""
    return np.exp(np.log(np.maximum(values, 1e-300)).mean(0, keepdims=True))


def links(data: Data, name: str) -> list[Link]:
    """The links of the explanation at a model.

    Args:
        data: what `bench.attention.task.run` returned.
        name: of the model.
    """
    model = data["models"][name]
    found = arrays(model)
    constant = found[CONSTANT]
    chain = [
        *_rows(model),
        Link(f"blocks: {MEAN} with the softmax part", 1, _spearman(found[MEAN], found["softmax part"])),
        Link(f"blocks: {MEAN} with the {CONSTANT}", 1, _spearman(found[MEAN], constant)),
        Link(f"blocks: {LARGEST} with the {CONSTANT}", 1, _spearman(found[LARGEST], constant)),
    ]
    if np.ptp(found["tokens"]) > 0:  # longer inputs have other maps and other constants
        for words in ("softmax part", CONSTANT):
            given = estimate(spearman_within_given(found["tokens"]), found[MEAN], found[words])
            chain.append(Link(f"blocks: {MEAN} with the {words}{AT_LENGTH}", 1, given))
    return [*chain, *_images(data["attacks"][name], model)] if name in data["attacks"] else chain


def _images(attack: Data, model: Data) -> list[Link]:
    """From the blocks to the whole network, and from both to the perturbations that fool images."""
    found = []
    for number, norm in enumerate(attack["distances"]):
        of, distances = attacked(attack, model, norm)
        whole = np.array(attack["first"]["jacobian"])[None]
        blocks = {words: over_layers(of[words]) for words in (MEAN, LARGEST, CONSTANT)}
        if number == 0:
            found += [Link(f"images: {words} with {WHOLE}", 1, _spearman(x, whole)) for words, x in blocks.items()]
        every = {**blocks, WHOLE: whole}
        found += [
            Link(f"images: {words} with the perturbation, {norm}", -1, _spearman(x, distances[:1]))
            for words, x in every.items()
        ]
    return found


def _spearman(x: np.ndarray, y: np.ndarray) -> Estimate:
    return estimate(spearman_within, x, y)


def factors(data: Data, name: str) -> list[Link]:
    """By how much: medians in the third of inputs with the largest mean g_1 over those in the third with the smallest.

    Args:
        data: what `bench.attention.task.run` returned.
        name: of the model.
    """
    model = data["models"][name]
    found = arrays(model)
    rows = [Link(words, 1, estimate(thirds_ratio, found[MEAN], found[words])) for words in ("softmax part", CONSTANT)]
    for norm in data["attacks"].get(name, {}).get("distances", {}):
        of, distances = attacked(data["attacks"][name], model, norm)
        ratio = estimate(thirds_ratio, over_layers(of[MEAN]), distances[:1])
        rows.append(Link(f"perturbation, {norm}", -1, ratio))
    return rows


def whole_network(attack: Data, norm: str) -> dict[str, Estimate]:
    """Correlations of numbers of the whole network at an image with the perturbation that fools it.

    Args:
        attack: an entry of `attacks`.
        norm: of the attack.
    """
    first = {key: np.array(values)[None] for key, values in attack["first"].items()}
    distances = np.array(attack["distances"][norm])[None]
    numbers = {
        "norm of the Jacobian": first["jacobian"],
        "largest slope of a difference of logits": first["slope"],
        "margin": first["margin"],
        "margin / norm of the Jacobian": first["margin"] / first["jacobian"],
        "distance to the boundary of the linear model": first[norm],
    }
    return {words: estimate(spearman_within, values, distances) for words, values in numbers.items()}


def _rows(model: Data) -> list[Link]:
    """Mean of the correlations over the rows of each block, where rows were measured."""
    found = []
    for key, words in (("softmax", "softmax part of the row"), ("constant", "whole row")):
        inputs = [[(layer["rows"] or {}).get(key) for layer in answer["layers"]] for answer in model["inputs"]]
        values = [[value for value in layers if value is not None] for layers in inputs]
        means = np.array([[np.mean(layers) for layers in values if layers]])
        if means.size:
            mean = estimate(mean_of_first, means, means)
            found.append(Link(f"rows: g_1 with the norm of the {words}", 1, mean))
    return found
