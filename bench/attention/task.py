"""How attention spreads over the keys, beside the local constants of blocks and the perturbations that fool a model.

Each block is measured three times at its input: the whole Jacobian; its mixing part, with the attention map held fixed,
which g_1 says nothing about; its softmax part, with the values held fixed, which g_1 bounds. The first is taken from
the records of `tightness` where they have it.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.smallest import SEED, Effort, Norm, smallest_found
from bench.attention.maps import examples, statistics
from bench.attention.measures import bounds, methods, part_norms, row_correlations, true_constant
from bench.engine.answers import Answer, Answers
from bench.engine.machine import git_state
from bench.engine.records import Record
from bench.workloads.case import Case
from bench.workloads.models import captured, tensors_hash, zoo
from lipbounds.capture import capture
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.models.lipschitz_vit import load_lipschitz_vit


VERSION = 1  # of what is computed here: raise it when numbers change
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"digits-vit": load_digits_vit, "lipschitz-vit": load_lipschitz_vit}
LIPSCHITZ_VIT = "ViT made to be certified: 16 tokens, 32 features, 4 heads, gentle attention, on test images"
BATCH = 50  # images attacked at a time
SHOWN_TOKENS = 12  # of the input whose maps are drawn, at least


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        inputs: number of inputs, by model.
        attacked: number of test images that are attacked, by classifier; at most its inputs.
        norms: of the attacks.
        effort: of the attacks.
        rows: number of inputs of a model at which the rows of small blocks are measured one by one.
    """

    inputs: Mapping[str, int]
    attacked: Mapping[str, int]
    norms: tuple[Norm, ...] = ("L2", "Linf")
    effort: Effort = dc.field(default_factory=Effort)
    rows: int = 8


PROFILES = {
    "quick": Profile(
        inputs={"minilm": 1, "digits-vit": 9},
        attacked={"digits-vit": 9},
        norms=("L2",),
        effort=Effort(iterations=10, fab_targets=2, apgd_targets=1),
        rows=0,
    ),
    "standard": Profile(
        inputs={
            **{"digits-vit": 100, "lipschitz-vit": 40, "minilm": 20},
            **{"torch-encoder": 12, "random-4-heads": 16, "random-1-head": 16},
        },
        attacked={"digits-vit": 100, "lipschitz-vit": 40},
    ),
}


def run(
    answers: Answers,
    profile: Profile,
    known: Mapping[str, Record],
    *,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything of a profile that is not in the file yet; returns what page and figures are made of.

    Args:
        answers: the file.
        profile: how much is done.
        known: records of the task `tightness` by key.
        force: make again what is in the file.
        advance: called before each piece of work with its name.
    """
    described = descriptions()
    data: dict[str, Any] = {"models": {}, "attacks": {}, "effort": dc.asdict(profile.effort)}
    for name, count in profile.attacked.items():
        data["attacks"][name] = _attacked(answers, name, count, profile, force, advance)
    for name, count in profile.inputs.items():
        inputs = []
        for number, cases in enumerate(_by_input(name, count)):
            advance(f"{name}: {cases[0].input}")
            question = {**_place(cases[0]), "what": "blocks", "bounds": _versions(cases[0])}
            rows = number < profile.rows
            work = functools.partial(_blocks, cases, known, rows)
            inputs.append(_ask(answers, question | {"rows": rows}, work, force))
            if "examples" not in data and _shown(name, cases, number, count):
                shown = {**_place(cases[0]), "what": "examples"}
                data["examples"] = _ask(answers, shown, functools.partial(examples, cases), force)
        data["models"][name] = {"description": described[name], "inputs": inputs}
    return data


def pieces(profile: Profile) -> int:
    """Number of calls of `advance` in a run."""
    batches = [-(-count // BATCH) for count in profile.attacked.values()]
    return sum(profile.inputs.values()) + sum(batches) * len(profile.norms) + len(profile.attacked)


def violations(data: dict[str, Any], certificates: Mapping[str, Answer]) -> list[str]:
    """Bounds below the norm they bound, and images fooled inside their certified radius: there must be none.

    Args:
        data: what `run` returned.
        certificates: answers of the task `certified` by key.
    """
    found = []
    for name, model in data["models"].items():
        for answer in model["inputs"]:
            for layer in answer["layers"]:
                found += [
                    f"{name}, {answer['input']}, layer {layer['layer']}: {bound} claims <= {value:.6g}, but "
                    f"{layer['constant']:.6g} is reached"
                    for bound, value in layer["bounds"].items()
                    if not value >= layer["constant"] * (1 - 1e-6)
                ]
    proved = {
        (row["model"], row["weights"], row["image"]): row["radius"]
        for row in certificates.values()
        if row.get("what") == "certificate"
    }
    for name, attack in data["attacks"].items():
        for image, distance in zip(attack["images"], attack["distances"].get("L2", []), strict=False):
            radius = proved.get((name, attack["weights"], image), 0.0)
            if not distance >= radius:
                found.append(f"{name}: image {image} is certified to {radius:.6g} and fooled at {distance:.6g}")
    return found


def descriptions() -> dict[str, str]:
    """What each model is, by name."""
    return {"lipschitz-vit": LIPSCHITZ_VIT, **{model.name: model.description for model in zoo()}}


def _ask(answers: Answers, question: Answer, work: Callable[[], Answer], force: bool) -> Answer:
    """As `Answers.ask`, with the commit that made the answer."""
    return answers.ask(question, lambda: {**work(), **_commit()}, force=force)


@functools.cache
def _commit() -> Answer:
    return git_state()


def _by_input(name: str, count: int) -> Iterator[list[Case]]:
    """The blocks of each input, in the order of the layers."""
    if name == "lipschitz-vit":
        cases = _lipschitz_vit(count)
    else:
        (model,) = (model for model in zoo() if model.name == name)
        cases = model.cases(count)
    for _, group in itertools.groupby(cases, key=lambda case: case.input):
        yield list(group)


def _lipschitz_vit(count: int) -> Iterator[Case]:
    model, test = load_lipschitz_vit(), load_digits_split().test
    inputs = [
        (f"image-{int(test.indices[i])}", tensors_hash([("image", image)]), functools.partial(capture, model, image))
        for i in range(count)
        for image in [test.images[i : i + 1]]
    ]
    return captured("lipschitz-vit", model, tensors_hash(model.state_dict().items()), inputs)


def _place(case: Case) -> Answer:
    return {
        **{"task": "attention", "version": VERSION, "model": case.model, "weights": case.model_hash},
        **{"input": case.input, "input_hash": case.input_hash},
    }


def _versions(case: Case) -> dict[str, int]:
    return {spec.name: spec.version for spec in methods(case.block)}


def _shown(name: str, cases: list[Case], number: int, count: int) -> bool:
    return name == "minilm" and (cases[0].block.tokens >= SHOWN_TOKENS or number == count - 1)


def _blocks(cases: list[Case], known: Mapping[str, Record], rows: bool) -> Answer:
    """Statistics, norms and bounds of all blocks at one input."""
    start = time.perf_counter()
    layers = []
    with torch.no_grad():
        for case in cases:
            constant, source = true_constant(case, known)
            mixing, softmax = part_norms(case.block)
            layers.append(
                {
                    **{"layer": case.layer, "module": case.module, "tokens": case.block.tokens},
                    **statistics(case.block.logits),
                    **{"constant": constant, "source": source, "mixing": mixing, "softmax": softmax},
                    "bounds": bounds(case, known),
                    "rows": row_correlations(case.block) if rows else None,
                }
            )
    return {"layers": layers, "seconds": round(time.perf_counter() - start, 3)}


def _attacked(
    answers: Answers, name: str, count: int, profile: Profile, force: bool, advance: Callable[[str], None]
) -> Answer:
    """Distances to the nearest images found of another class, and first-order numbers, of the images classified right.

    What is in `distances` and the other lists goes with the list `images`.
    """
    model, split = CLASSIFIERS[name](), load_digits_split().test
    images, labels, indices = split.images[:count], split.labels[:count], split.indices[:count]
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels, indices = images[right], labels[right], indices[right].tolist()
    shared = {
        "task": "attention",
        "version": VERSION,
        "model": name,
        "weights": tensors_hash(model.state_dict().items()),
    }
    distances: dict[str, list[float]] = {}
    for norm in profile.norms:
        distances[norm] = []
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            advance(f"{name}: attack in {norm}, from image {start}")
            question = {**shared, "what": "attack", "norm": norm, "images": indices[batch], "seed": SEED}
            work = functools.partial(_distances, model, images[batch], labels[batch], norm, profile.effort)
            found = _ask(answers, question | {"effort": dc.asdict(profile.effort)}, work, force)
            distances[norm] += found["distances"]
    advance(f"{name}: slopes")
    work = functools.partial(first_order, model, images, labels)
    slopes = _ask(answers, {**shared, "what": "slopes", "images": indices}, work, force)
    numbers = {key: slopes[key] for key in ("jacobian", "margin", "slope", "L2", "Linf")}
    wrong = int((~right).sum())
    return {"weights": shared["weights"], "images": indices, "wrong": wrong, "distances": distances, "first": numbers}


def _distances(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, effort: Effort) -> Answer:
    start = time.perf_counter()
    found = smallest_found(model, images, labels, norm, effort)
    return {"distances": found.tolist(), "seconds": round(time.perf_counter() - start, 3)}


def first_order(model: nn.Module, images: Tensor, labels: Tensor) -> Answer:
    """From the exact Jacobian of the logits at each image, in float64.

    `jacobian`: its spectral norm. `margin`: logit of the class less the largest other. `slope`: largest norm of the
    gradient of a difference of logits to the class. `L2` and `Linf`: where the nearest class boundary would be if the
    model were linear, min_j (f_y - f_j) over the dual norm of the gradient of f_y - f_j. No bound of anything.

    Args:
        model: the classifier.
        images: classified right.
        labels: their classes.
    """
    exact = copy.deepcopy(model).double()
    found: dict[str, list[float]] = {key: [] for key in ("jacobian", "margin", "slope", "L2", "Linf")}
    for image, label in zip(images.double(), labels, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: exact(x[None])[0], image).flatten(1)
        with torch.no_grad():
            logits = exact(image[None])[0]
        others = torch.arange(len(logits)) != label
        margins, gradients = (logits[label] - logits)[others], (jacobian[label] - jacobian)[others]
        found["jacobian"].append(float(torch.linalg.matrix_norm(jacobian, 2)))
        found["margin"].append(float(margins.min()))
        found["slope"].append(float(gradients.norm(dim=1).max()))
        found["L2"].append(float((margins / gradients.norm(dim=1)).min()))
        found["Linf"].append(float((margins / gradients.abs().sum(1)).min()))
    return found
