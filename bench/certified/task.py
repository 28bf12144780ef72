"""Certified accuracy against radius beside what an attack leaves, and the bounds of whole models beside their constant.

Images are those of the test part of the digits, in order. Radii are in the Euclidean norm of the pixels, which lie in
[0, 1]. The attack is AutoAttack in its standard version for l2, which keeps pixels in [0, 1]: it searches a part of the
ball, so what it leaves is above the truth, and what is certified below it.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.images import Ball, autoattack, distance, right
from bench.engine.answers import Shown
from bench.engine.evaluators import CPU
from bench.engine.records import content_hash
from bench.engine.store import Answer, Store
from bench.workloads.architectures import ARCHITECTURES
from bench.workloads.hashes import tensors_hash
from lipbounds.certify import certify
from lipbounds.compose import network_bound
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.network import AT_POINT, ON_BALL
from lipbounds.compose.rewrite import flat, rewritten
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.models.lipschitz_vit import load_lipschitz_vit
from lipbounds.targets.layers import Pool, Sequence


VERSION = 1  # of what is computed here: raise it when numbers change
CERTIFICATE_VERSION = 3  # of certificates: 2 since attention is followed to the second order, 3 since in eight shells
RADII = {"lipschitz-vit": (0.1, 0.2, 0.3, 0.5), "digits-vit": (0.3,)}
LANCZOS = {"delta": 1e-9, "steps": 60}
ATTACK_SEED = 0
SENTENCE = "A bound is a promise about every point of a set."


@dc.dataclass(frozen=True, kw_only=True)
class Profile:
    """How much is done.

    Args:
        certified: number of images that are certified, by model.
        attacked: of those, how many are attacked, by model.
        radii: how many of the radii of a model are attacked.
        whole: models whose bound is compared with their constant.
    """

    certified: dict[str, int]
    attacked: dict[str, int]
    radii: int
    whole: tuple[str, ...]


PROFILES = {
    "quick": Profile(
        certified={"lipschitz-vit": 3, "digits-vit": 1},
        attacked={"lipschitz-vit": 3, "digits-vit": 0},
        radii=1,
        whole=("lipschitz-vit",),
    ),
    "standard": Profile(
        certified={"lipschitz-vit": 24, "digits-vit": 5},
        attacked={"lipschitz-vit": 24, "digits-vit": 5},
        radii=4,
        whole=("digits-vit", "lipschitz-vit", "minilm", "gpt-2", "vit-b-16"),
    ),
    "full": Profile(
        certified={"lipschitz-vit": 120, "digits-vit": 120},
        attacked={"lipschitz-vit": 120, "digits-vit": 120},
        radii=4,
        whole=("digits-vit", "lipschitz-vit", "minilm", "gpt-2", "vit-b-16"),
    ),
}
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"lipschitz-vit": load_lipschitz_vit, "digits-vit": load_digits_vit}


def as_network(name: str, model: nn.Module, images: Tensor) -> Sequence:
    """A classifier as a network.

    Args:
        name: of a classifier.
        model: the classifier.
        images: a few, to check the network with.
    """
    # Adapters import transformers, which takes seconds.
    from lipbounds.adapters.digits_vit import digits_vit_network
    from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network

    adapters: dict[str, Callable[[Any, Tensor], Sequence]] = {
        "lipschitz-vit": lipschitz_vit_network,
        "digits-vit": digits_vit_network,
    }
    return adapters[name](model, images)


def run(
    answers: Store,
    profile: Profile,
    *,
    device: torch.device = CPU,
    force: bool = False,
    advance: Callable[[str], None] = lambda what: None,
) -> None:
    """Everything of a profile that is not in the file yet.

    Args:
        answers: the file.
        profile: how much is done.
        device: where it is computed.
        force: make again what is in the file.
        advance: called before each piece of work with its name.
    """
    split = load_digits_split().test
    for name, count in profile.certified.items():
        model = CLASSIFIERS[name]().to(device)
        shared = _shared(name, model, device)
        network = functools.cache(lambda n=name, m=model: as_network(n, m, split.images[:2].to(device)))
        for index in range(count):
            advance(f"{name}: certify image {index}")
            given = split.images[index : index + 1].to(device), split.labels[index : index + 1].to(device)
            question = {**shared, "what": "certificate", "attention": ON_BALL, "image": int(split.indices[index])}
            question["version"] = CERTIFICATE_VERSION
            answers.ask(question, lambda given=given, n=network: _certificate(n(), *given), force=force)
        chosen = slice(0, profile.attacked[name])
        for radius in RADII[name][: profile.radii] if profile.attacked[name] else ():
            advance(f"{name}: attack with radius {radius:g}")
            given = split.images[chosen].to(device), split.labels[chosen].to(device)
            question = {**shared, "what": "attack", "radius": radius, "images": split.indices[chosen].tolist()}
            question["seed"] = ATTACK_SEED
            answers.ask(question, lambda m=model, g=given, r=radius: attack(m, *g, r), force=force)
    for name in profile.whole:
        advance(f"{name}: whole model")
        answers.ask(whole_question(name, device), lambda n=name: _whole(n, *whole_model(n, device)), force=force)


def shown(found: Shown) -> dict[str, Any]:
    """What page and figures are made of.

    Args:
        found: the answers of a run.
    """
    rows = [*found.select(what="certificate"), *found.select(what="attack")]
    models = {
        name: {
            "certificates": found.select(what="certificate", model=name),
            "attacks": found.select(what="attack", model=name),
        }
        for name in dict.fromkeys(row["model"] for row in rows)
    }
    return {"models": models, "whole": {row["model"]: row for row in found.select(what="whole")}}


def pieces(profile: Profile) -> int:
    """Number of calls of `advance` in a run."""
    attacks = sum(profile.radii for count in profile.attacked.values() if count)
    return sum(profile.certified.values()) + len(profile.whole) + attacks


def _shared(name: str, model: nn.Module, device: torch.device) -> Answer:
    weights = tensors_hash(model.state_dict().items())
    return {"task": "certified", "version": VERSION, "model": name, "weights": weights, "device": device.type}


def violations(data: dict[str, Any]) -> list[str]:
    """Images that an attack changed inside their certified radius: there must be none.

    Args:
        data: what `run` returned.
    """
    found = []
    for name, model in data["models"].items():
        for attacked in model["attacks"]:
            for row, robust in zip(model["certificates"], attacked["robust"], strict=False):
                if row["correct"] and row["radius"] >= attacked["distance"] and not robust:
                    found.append(
                        f"{name}: image {row['image']} is certified to {row['radius']:.6g}, and an attack of radius "
                        f"{attacked['radius']:g} changes it"
                    )
    for name, row in data["whole"].items():
        if not row["lower"] <= row["bound"]:
            found.append(f"{name}: bound {row['bound']:.6g} is below {row['lower']:.6g}, which is reached")
    return found


def attack(model: nn.Module, images: Tensor, labels: Tensor, radius: float) -> Answer:
    """Which images keep their class under AutoAttack-standard in l2.

    Args:
        model: the classifier.
        images: 4-dimensional, in [0, 1].
        labels: the right classes.
        radius: of the ball.

    Raises:
        InvalidInput: as `bench.attacks.images.autoattack`.
    """
    start = time.perf_counter()
    moved = autoattack(model, images, labels, Ball("l2", radius), seed=ATTACK_SEED)
    return {
        "robust": right(model, moved, labels).tolist(),
        # Steps of length `radius` in float32 may end a little outside.
        "distance": max(radius, float(distance(moved, images, "l2").max())),
        "seconds": time.perf_counter() - start,
    }


def _certificate(network: Sequence, image: Tensor, label: Tensor) -> Answer:
    start = time.perf_counter()
    found = certify(network, image, label, method="joint")
    product = certify(network, image, label, method="product")
    others = torch.arange(found.lipschitz.shape[1]) != int(label)
    return {
        "radius": float(found.radius),
        "product_radius": float(product.radius),
        "correct": bool(found.correct),
        "margin": float(found.margin),
        "slope": float(found.lipschitz[0, others].max()) if float(found.radius) > 0 else None,
        "seconds": time.perf_counter() - start,
    }


def whole_question(name: str, device: torch.device = CPU) -> Answer:
    """What the numbers of a whole model depend on.

    Args:
        name: of the model.
        device: where it is computed.
    """
    weights, given = raw_hashes(name)
    question = {"task": "certified", "version": VERSION, "what": "whole", "model": name, "weights": weights}
    return question | {"input_hash": given, "device": device.type, "attention": AT_POINT} | LANCZOS


def raw_hashes(name: str) -> tuple[str, str]:
    """Hashes of the weights and of the raw input of a whole model.

    Args:
        name: of a model in `PROFILES`.
    """
    if name in CLASSIFIERS:
        weights = tensors_hash(CLASSIFIERS[name]().state_dict().items())
        return weights, tensors_hash([("image", load_digits_split().test.images[:1])])
    if name == "minilm":
        from lipbounds.models.minilm import load_minilm

        return tensors_hash(load_minilm()[0].state_dict().items()), content_hash(SENTENCE)
    found = ARCHITECTURES[name]
    return found.model_hash(), found.input_hash(0)


def _whole(name: str, network: Sequence, x: Tensor) -> Answer:
    """Bound and constant of a model and of each of its layers at one input."""
    start = time.perf_counter()
    bound = network_bound(network, x)
    seconds = time.perf_counter() - start
    truth = whole_model_constant(network, x, **LANCZOS)
    top = [line for line in bound.layers if line.depth == 0]
    layers, here = [], x
    for line, (_, layer) in zip(top, rewritten(flat([("", network)])), strict=True):
        with torch.no_grad():
            there = layer(here)
        found = None if isinstance(layer, Pool) else whole_model_constant(layer, here, **LANCZOS)
        layers.append(
            {
                "path": line.path,
                "description": line.description,
                "bound": float(line.bound),
                "constant": float(line.bound if found is None else found.value),
                "reached": float(line.bound if found is None else found.terms["lower"]),
                "so_far": float(line.so_far if line.so_far is not None else line.bound),
            }
        )
        here = there
    small = name in CLASSIFIERS
    return {
        "bound": float(bound.value),
        "joint": float(JointNetwork(network, x[0]).bound(0.0).norm) if small else None,
        "constant": float(truth.value),
        "lower": float(truth.terms["lower"]),
        "seconds": seconds,
        "seconds_constant": time.perf_counter() - start - seconds,
        "layers": layers,
    }


def whole_model(name: str, device: torch.device = CPU) -> tuple[Sequence, Tensor]:
    """A model as a network, and one input in float64.

    Args:
        name: of a model in `PROFILES`.
        device: where they are.
    """
    if name in CLASSIFIERS:
        images = load_digits_split().test.images[:1].double().to(device)
        return as_network(name, CLASSIFIERS[name]().to(device), images), images
    from lipbounds.adapters.bert import bert_network
    from lipbounds.adapters.gpt2 import gpt2_network
    from lipbounds.adapters.vit import vit_network

    if name == "minilm":
        from lipbounds.models.minilm import load_minilm

        model, tokenizer = load_minilm()
        model.to(device)  # pyright: ignore[reportArgumentType]  # transformers decorates it
        tokens = tokenizer(SENTENCE, return_tensors="pt")["input_ids"].to(device)
        with torch.no_grad():
            x = model.get_input_embeddings()(tokens).double()
        return bert_network(model, x), x  # pyright: ignore[reportArgumentType]
    found = ARCHITECTURES[name]
    model, given = found.model().to(device), found.input(0).to(device)
    if name == "vit-b-16":
        return vit_network(model, given.double()), given.double()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        x = model.get_input_embeddings()(given).double()  # pyright: ignore[reportCallIssue]
    return gpt2_network(model, x), x  # pyright: ignore[reportArgumentType]
