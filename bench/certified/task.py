"""Certified accuracy against radius beside what attacks leave, and the bounds of whole models beside their constant.

Images are those of the test part of the digits, in order. Radii are in the Euclidean norm of the pixels, which lie in
[0, 1]. The attacks keep pixels in [0, 1]: they search a part of the ball, so what they leave is above the truth, and
what is certified below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.certified.models import CLASSIFIERS, MNIST, as_network, load
from bench.certified.profiles import PEER, PEER_FULL, PROFILES, Profile
from bench.certified.radii import OTHER_NORMS, Amount, measure
from bench.engine.answers import Shown
from bench.engine.evaluators import CPU
from bench.engine.records import content_hash
from bench.engine.store import Answer, Store
from bench.workloads.architectures import ARCHITECTURES
from bench.workloads.hashes import tensors_hash
from lipbounds.compose import network_bound
from lipbounds.compose.constant import proved_constant
from lipbounds.compose.network import AT_POINT, attention_specs
from lipbounds.compose.propagated_set import Rules
from lipbounds.compose.reading import bounded_layers
from lipbounds.estimators.formed import formed_constant
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.models.digits_data import load_digits_split
from lipbounds.targets.layers import Pool, Sequence


VERSION = 1  # of what is computed here: raise it when numbers change
WHOLE_VERSION = 2  # of bounds of whole models, layer by layer
CONSTANT_VERSION = 2  # of proved constants
FORMED_VERSION = 1  # of constants from rows in float64
LANCZOS = {"delta": 1e-9, "steps": 60}
SENTENCE = "A bound is a promise about every point of a set."


def run(
    answers: Store,
    profile: Profile,
    *,
    device: torch.device = CPU,
    force: bool = False,
    peer: Path | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> None:
    """Everything of a profile that is not in the file yet.

    Args:
        answers: the file.
        profile: how much is done.
        device: where it is computed.
        force: make again what is in the file.
        peer: the folder of the ViTs on MNIST, which then are certified too.
        advance: called before each piece of work with its name.
    """
    for name, amount in amounts(profile, peer).items():
        found = load(name, device, peer)
        shared = {"task": "certified", "version": VERSION, "model": name, "weights": found.weights}
        shared["device"] = device.type
        measure(answers, shared, found, amount, force=force, advance=advance)
    if peer is not None:
        from bench.certified.mnist import published

        question = {"task": "certified", "version": VERSION, "model": MNIST, "what": "published"}
        for norm in ("l2", *OTHER_NORMS):
            answers.ask({**question, "norm": norm}, lambda n=norm: published(peer, n), force=force)
    for name in profile.whole:
        advance(f"{name}: whole model")
        question = whole_question(name, device)
        answers.ask(question, lambda n=name: _whole(*whole_model(n, device)), force=force)
        shared = {key: question[key] for key in ("task", "model", "weights", "input_hash", "device")}
        if name in CLASSIFIERS:
            question = {**shared, "version": CONSTANT_VERSION, "what": "constant"}
            answers.ask(question, lambda n=name: _constant(*whole_model(n, device)), force=force)
        if name in profile.formed:
            question = {**shared, "version": FORMED_VERSION, "what": "formed"}
            answers.ask(question, lambda n=name: _formed(*whole_model(n, device)), force=force)


def shown(found: Shown) -> dict[str, Any]:
    """What page and figures are made of.

    Args:
        found: the answers of a run.
    """
    models = {
        name: {
            "certificates": found.select(what="radius", model=name),
            "smoothing": found.select(what="smoothing", model=name),
            "attacks": found.select(what="attack", model=name),
            "smallest": found.select(what="smallest", model=name),
            "published": found.select(what="published", model=name),
        }
        for name in dict.fromkeys(row["model"] for row in found.select(what="radius"))
    }
    proved, formed = (
        {row["model"]: row["value"] for row in found.select(what=what)} for what in ("constant", "formed")
    )
    whole = {
        row["model"]: {**row, "joint": proved.get(row["model"]), "formed": formed.get(row["model"])}
        for row in found.select(what="whole")
    }
    return {"models": models, "whole": whole}


def amounts(profile: Profile, peer: Path | None) -> dict[str, Amount]:
    """How much is done with each classifier.

    Args:
        profile: how much is done.
        peer: the folder of the ViTs on MNIST.
    """
    if peer is None:
        return profile.amounts
    return {**profile.amounts, **(PEER_FULL if profile is PROFILES["full"] else PEER)}


def pieces(profile: Profile, peer: Path | None = None) -> int:
    """Number of calls of `advance` in a run."""
    return sum(amount.pieces for amount in amounts(profile, peer).values()) + len(profile.whole)


def violations(data: dict[str, Any]) -> list[str]:
    """Images that an attack changed inside their certified radius: there must be none.

    Args:
        data: what `run` returned.
    """
    found = []
    for name, model in data["models"].items():
        for row in model["certificates"]:
            told = f"{name}: image {row['image']} is certified to {row['radius']:.6g} by {row['method']}, and "
            if row["attacked"] is not None and not row["attacked"] >= 0:
                found.append(f"{told}the self-check found another class inside")
            if row["norm"] != "l2":
                continue  # what follows looks in Euclidean balls
            for attacked in model["attacks"]:
                robust = dict(zip(attacked["images"], attacked["robust"], strict=True)).get(row["image"], True)
                if row["correct"] and row["radius"] >= attacked["distance"] and not robust:
                    found.append(f"{told}an attack of radius {attacked['radius']:g} changes it")
            for one in model["smallest"]:
                nearest = dict(zip(one["images"], one["distances"], strict=True)).get(row["image"])
                if row["correct"] and nearest is not None and row["radius"] > nearest:
                    found.append(f"{told}an image of another class is {nearest:.6g} away")
    for name, row in data["whole"].items():
        for bound in (row[key] for key in ("bound", "joint", "formed") if row.get(key) is not None):
            # What is reached is itself a float64 evaluation.
            if not row["lower"] <= bound * (1 + 1e-12):
                found.append(f"{name}: bound {bound:.6g} is below {row['lower']:.6g}, which is reached")
    return found


def whole_question(name: str, device: torch.device = CPU) -> Answer:
    """What the numbers of a whole model depend on.

    Args:
        name: of the model.
        device: where it is computed.
    """
    weights, given = raw_hashes(name)
    question = {"task": "certified", "version": WHOLE_VERSION, "what": "whole", "model": name, "weights": weights}
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


def _whole(network: Sequence, x: Tensor) -> Answer:
    """Bound and constant of a model and of each of its layers at one input."""
    start = time.perf_counter()
    bound = network_bound(network, x)
    seconds = time.perf_counter() - start
    truth = whole_model_constant(network, x, **LANCZOS)
    top = [line for line in bound.layers if line.depth == 0]
    layers, here = [], x
    parts = bounded_layers([("", network)], x, Rules(attention_specs(None, on_ball=False)))
    for line, (_, layer) in zip(top, parts, strict=True):
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
    return {
        "bound": float(bound.value),
        "constant": float(truth.value),
        "lower": float(truth.terms["lower"]),
        "seconds": seconds,
        "seconds_constant": time.perf_counter() - start - seconds,
        "layers": layers,
    }


def _constant(network: Sequence, x: Tensor) -> Answer:
    """The proved constant of a model at one input."""
    start = time.process_time()
    found = proved_constant(network, x)
    return {
        "value": float(found.value),
        "rounding": float(found.terms["rounding"]),
        "kind": found.kind,
        "seconds": time.process_time() - start,
    }


def _formed(network: Sequence, x: Tensor) -> Answer:
    """The constant of a model at one input from the rows of its Jacobian, as float64 computes them."""
    start = time.process_time()
    found = formed_constant(network, x)
    return {"value": float(found.value), "kind": found.kind, "seconds": time.process_time() - start}


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
