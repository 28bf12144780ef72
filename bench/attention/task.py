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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.smallest import SEED, Effort, Norm, smallest_found
from bench.attention.maps import examples, statistics
from bench.attention.measures import bounds, methods, part_norms, row_correlations, true_constant
from bench.engine.answers import Shown
from bench.engine.evaluators import CPU
from bench.engine.store import Answer, Store
from bench.engine.store_file import Entry
from bench.workloads.capturing import captured
from bench.workloads.case import Case
from bench.workloads.hashes import tensors_hash
from bench.workloads.models import digits_inputs, zoo
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.models.lipschitz_vit import load_lipschitz_vit
from lipbounds.targets.attention import Attention


VERSION = 1  # of what is computed here: raise it when numbers change
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"digits-vit": load_digits_vit, "lipschitz-vit": load_lipschitz_vit}
LIPSCHITZ_VIT = "ViT made to be certified: 16 tokens, 32 features, 4 heads, gentle attention, on test images"
LIPSCHITZ_LAYERS = 2
FIRST_ORDER = ("jacobian", "margin", "slope", "L2", "Linf")
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
    answers: Store,
    profile: Profile,
    known: Mapping[str, Entry],
    *,
    device: torch.device = CPU,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> None:
    """Everything of a profile that is not in the file yet.

    Args:
        answers: the file.
        profile: how much is done.
        known: entries of the task `tightness` by key.
        device: where it is computed.
        force: make again what is in the file.
        advance: called before each piece of work with its name.
    """
    for name, count in profile.attacked.items():
        _attacked(answers, name, count, profile, device, force, advance)
    for name, count in profile.inputs.items():
        shown = False
        for number, cases in enumerate(by_input(name, count)):
            advance(f"{name}: {cases[0].input}")
            place = {**_place(cases[0]), "device": device.type}
            rows = number < profile.rows
            question = {**place, "what": "blocks", "bounds": _versions(), "rows": rows}
            answers.ask(question, functools.partial(_blocks, cases, known, rows, device), force=force)
            if not shown and _shown(name, cases, number, count):
                shown = True
                answers.ask({**place, "what": "examples"}, functools.partial(examples, cases), force=force)


def shown(found: Shown, profile: Profile) -> dict[str, Any]:
    """What page and figures are made of.

    Args:
        found: the answers of a run.
        profile: of the run.
    """
    described = descriptions()
    data: dict[str, Any] = {"models": {}, "attacks": {}, "effort": dc.asdict(profile.effort)}
    for name in dict.fromkeys(row["model"] for row in found.select(what="slopes")):
        (slopes,) = found.select(what="slopes", model=name)
        distances: dict[str, list[float]] = {}
        for row in found.select(what="attack", model=name):
            distances.setdefault(row["norm"], []).extend(row["distances"])
        data["attacks"][name] = {
            **{"weights": slopes["weights"], "images": slopes["images"], "distances": distances},
            "wrong": profile.attacked[name] - len(slopes["images"]),
            "first": {key: slopes[key] for key in FIRST_ORDER},
        }
    for row in found.select(what="blocks"):
        model = data["models"].setdefault(row["model"], {"description": described[row["model"]], "inputs": []})
        model["inputs"].append(row)
    if drawn := found.select(what="examples"):
        data["examples"] = drawn[0]
    return data


def pieces(profile: Profile) -> int:
    """Number of calls of `advance` in a run."""
    batches = [-(-count // BATCH) for count in profile.attacked.values()]
    return sum(profile.inputs.values()) + sum(batches) * len(profile.norms) + len(profile.attacked)


def violations(data: dict[str, Any], certificates: Iterable[Answer]) -> list[str]:
    """Bounds below the norm they bound, and images fooled inside their certified radius: there must be none.

    Args:
        data: what `run` returned.
        certificates: answers of the task `certified`.
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
        for row in certificates
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


def by_input(name: str, count: int) -> Iterator[list[Case]]:
    """The blocks of each input, in the order of the layers.

    Args:
        name: of the model.
        count: of inputs.
    """
    if name == "lipschitz-vit":
        cases = _lipschitz_vit(count)
    else:
        (model,) = (model for model in zoo() if model.name == name)
        cases = model.cases(count)
    for _, group in itertools.groupby(cases, key=lambda case: case.input):
        yield list(group)


def _lipschitz_vit(count: int) -> Iterator[Case]:
    model = load_lipschitz_vit()
    weights = tensors_hash(model.state_dict().items())
    return captured("lipschitz-vit", lambda: model, weights, digits_inputs(count), range(LIPSCHITZ_LAYERS))


def _place(case: Case) -> Answer:
    return {
        **{"task": "attention", "version": VERSION, "model": case.model, "weights": case.model_hash},
        **{"input": case.input, "input_hash": case.input_hash},
    }


def _versions() -> dict[str, int]:
    return {spec.name: spec.version for spec in methods(Attention)}


def _shown(name: str, cases: list[Case], number: int, count: int) -> bool:
    return name == "minilm" and (cases[0].block.tokens >= SHOWN_TOKENS or number == count - 1)


def _blocks(cases: list[Case], known: Mapping[str, Entry], rows: bool, device: torch.device) -> Answer:
    """Statistics, norms and bounds of all blocks at one input."""
    start = time.perf_counter()
    layers = []
    with torch.no_grad():
        for case in cases:
            constant, source = true_constant(case, known, device)
            block = case.block.to(device)
            mixing, softmax = part_norms(block)
            layers.append(
                {
                    **{"layer": case.layer, "module": case.module, "tokens": case.block.tokens},
                    **statistics(block.logits),
                    **{"constant": constant, "source": source, "mixing": mixing, "softmax": softmax},
                    "bounds": bounds(case, known, device),
                    "rows": row_correlations(block) if rows else None,
                }
            )
    return {"layers": layers, "seconds": round(time.perf_counter() - start, 3)}


def _attacked(
    answers: Store,
    name: str,
    count: int,
    profile: Profile,
    device: torch.device,
    force: bool,
    advance: Callable[[str], None],
) -> None:
    """Distances to the nearest images found of another class, and first-order numbers, of the images classified right.

    What is in `distances` and the other lists goes with the list `images`.
    """
    model, split = CLASSIFIERS[name]().to(device), load_digits_split().test
    images, labels, indices = split.images[:count].to(device), split.labels[:count].to(device), split.indices[:count]
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    images, labels, indices = images[right], labels[right], indices[right.cpu()].tolist()
    shared = {"task": "attention", "version": VERSION, "model": name, "device": device.type}
    shared["weights"] = tensors_hash(model.state_dict().items())
    for norm in profile.norms:
        for start in range(0, len(images), BATCH):
            batch = slice(start, start + BATCH)
            advance(f"{name}: attack in {norm}, from image {start}")
            question = {**shared, "what": "attack", "norm": norm, "images": indices[batch], "seed": SEED}
            work = functools.partial(_distances, model, images[batch], labels[batch], norm, profile.effort)
            answers.ask(question | {"effort": dc.asdict(profile.effort)}, work, force=force)
    advance(f"{name}: slopes")
    work = functools.partial(first_order, model, images, labels)
    answers.ask({**shared, "what": "slopes", "images": indices}, work, force=force)


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
    found: dict[str, list[float]] = {key: [] for key in FIRST_ORDER}
    for image, label in zip(images.double(), labels, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: exact(x[None])[0], image).flatten(1)
        with torch.no_grad():
            logits = exact(image[None])[0]
        others = torch.arange(len(logits), device=logits.device) != label
        margins, gradients = (logits[label] - logits)[others], (jacobian[label] - jacobian)[others]
        found["jacobian"].append(float(torch.linalg.matrix_norm(jacobian, 2)))
        found["margin"].append(float(margins.min()))
        found["slope"].append(float(gradients.norm(dim=1).max()))
        found["L2"].append(float((margins / gradients.norm(dim=1)).min()))
        found["Linf"].append(float((margins / gradients.abs().sum(1)).min()))
    return found
