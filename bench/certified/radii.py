"""Certified radii of one image at a time, by every method, and what attacks and smoothing say beside them."""

from __future__ import annotations

import dataclasses as dc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.attacks.images import Ball, autoattack, distance, right
from bench.attacks.smallest import Effort, smallest_found
from bench.certified.classifier import Classifier
from bench.engine.store import Answer, Store
from lipbounds.certify import Method, certify
from lipbounds.compose.taylor.ball import Norm
from lipbounds.compose.taylor.second import LARGEST_SQUARE
from lipbounds.smoothing import certify_smoothed
from lipbounds.targets.layers import Sequence


RADIUS_VERSION = 1  # of certified radii: raise it when numbers change
SEARCH = "ray with steep rises, of what is read"  # how slopes on balls become a radius: lipbounds.compose.ray
THIRD = "both means"  # how `joint` bounds the third differential on a ball: lipbounds.derivatives.ball.third
VALUES = "to first and to second order"  # how Taylor models follow small inputs: lipbounds.compose.taylor.second
ACTIVATIONS = "along the worst direction"  # how margins follow activations: lipbounds.compose.taylor.touching
OTHER_NORMS: tuple[Norm, ...] = ("l_inf", "l1")
METHODS: tuple[Method, ...] = ("taylor", "joint", "product")
ATTACK_SEED = 0
EFFORT = Effort(iterations=20, fab_targets=4, apgd_targets=2)
SMOOTHING: dict[str, Any] = {"sigma": 0.25, "samples": 10_000, "delta": 1e-3, "seed": 0}


@dc.dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is done with one classifier.

    Args:
        images: that are certified by `taylor`, the first ones of the test part.
        slower: of those, how many are certified by the other methods.
        smoothed: of those, how many have a radius by smoothing.
        attacked: of those, how many are attacked.
        radii: of the attacks.
        other_norms: of those, how many are certified in the maximum norm and in the sum norm, too.
    """

    images: int
    slower: int = 0
    smoothed: int = 0
    attacked: int = 0
    radii: tuple[float, ...] = ()
    other_norms: int = 0

    @property
    def pieces(self) -> int:
        """Number of calls of `advance`."""
        attacks = len(self.radii) + 1 if self.attacked else 0
        other_norms = self.other_norms * len(OTHER_NORMS)
        return self.images + other_norms + self.slower * (len(METHODS) - 1) + self.smoothed + attacks


def measure(
    answers: Store,
    shared: Answer,
    found: Classifier,
    amount: Amount,
    *,
    force: bool,
    advance: Callable[[str], None],
) -> None:
    """Everything about one classifier that is not in the file yet.

    Args:
        answers: the file.
        shared: what all questions share.
        found: the classifier.
        amount: how much is done.
        force: make again what is in the file.
        advance: called before each piece of work with its name.
    """
    network: list[Sequence] = []

    def built() -> Sequence:
        network[:] = network or [found.network()]
        return network[0]

    for method in METHODS:
        for index in range(amount.images if method == "taylor" else amount.slower):
            advance(f"{shared['model']}: {method}, image {index}")
            given = found.images[index : index + 1], found.labels[index : index + 1]
            question = {**shared, "what": "radius", "version": RADIUS_VERSION, "method": method, "norm": "l2"}
            question["image"] = found.indices[index]
            if method != "taylor":
                question["search"] = SEARCH
            if method == "joint":
                question["third"] = THIRD
            if method == "taylor":
                question["activations"] = ACTIVATIONS
                if found.images[0].numel() <= LARGEST_SQUARE:
                    question["values"] = VALUES
            answers.ask(question, lambda g=given, m=method: certificate(built(), *g, m), force=force)
    for norm in OTHER_NORMS:
        for index in range(amount.other_norms):
            advance(f"{shared['model']}: taylor in {norm}, image {index}")
            given = found.images[index : index + 1], found.labels[index : index + 1]
            question = {**shared, "what": "radius", "version": RADIUS_VERSION, "method": "taylor", "norm": norm}
            question |= {"image": found.indices[index], "activations": ACTIVATIONS}
            answers.ask(question, lambda g=given, n=norm: certificate(built(), *g, "taylor", n), force=force)
    for index in range(amount.smoothed):
        advance(f"{shared['model']}: smoothing, image {index}")
        given = found.images[index : index + 1], found.labels[index : index + 1]
        question = {**shared, "what": "smoothing", "image": found.indices[index], **SMOOTHING}
        answers.ask(question, lambda g=given: smoothed(found.model, *g), force=force)
    chosen = found.images[: amount.attacked], found.labels[: amount.attacked]
    named = {**shared, "images": found.indices[: amount.attacked]}
    for radius in amount.radii if amount.attacked else ():
        advance(f"{shared['model']}: attack with radius {radius:g}")
        question = {**named, "what": "attack", "radius": radius, "seed": ATTACK_SEED}
        answers.ask(question, lambda r=radius: attack(found.model, *chosen, r), force=force)
    if amount.attacked:
        advance(f"{shared['model']}: smallest perturbations")
        question = {**named, "what": "smallest", "effort": dc.asdict(EFFORT)}
        answers.ask(question, lambda: smallest(found.model, *chosen), force=force)


def certificate(network: Sequence, image: Tensor, label: Tensor, method: Method, norm: Norm = "l2") -> Answer:
    """A proved radius, with what a short attack found inside it: another class there raises.

    Args:
        network: the classifier.
        image: a batch of one.
        label: its class.
        method: of `certify`.
        norm: of the balls.
    """
    start = time.process_time()
    found = certify(network, image, label, method=method, norm=norm, unit="pixels in [0, 1]")
    seconds = time.process_time() - start
    checked = certify_attacked(network, image, label, float(found.radius), norm)
    return {
        "radius": float(found.radius),
        "correct": bool(found.correct),
        "margin": float(found.margin),
        "attacked": checked,
        "kind": "proved",
        "seconds": seconds,
    }


def certify_attacked(network: Sequence, image: Tensor, label: Tensor, radius: float, norm: Norm = "l2") -> float | None:
    """The smallest margin that an attack found within the radius; None for radius 0.

    Args:
        network: the classifier.
        image: a batch of one.
        label: its class.
        radius: certified.
        norm: of the ball.
    """
    from lipbounds.compose.attack import smallest_margin

    if not radius > 0:
        return None
    return smallest_margin(network.to(torch.float64), image[0].double(), int(label), radius, norm=norm)


def smoothed(model: nn.Module, image: Tensor, label: Tensor) -> Answer:
    """A radius of the smoothed classifier, which is wrong with probability at most delta.

    Args:
        model: the classifier.
        image: a batch of one.
        label: its class.
    """
    start = time.process_time()
    found = certify_smoothed(model, image, label, **SMOOTHING)
    return {
        "radius": float(found.radius),
        "correct": bool(found.correct),
        "probability": float(found.probability),
        "kind": found.kind,
        "seconds": time.process_time() - start,
    }


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


def smallest(model: nn.Module, images: Tensor, labels: Tensor) -> Answer:
    """l2 distance to the nearest image of another class that FAB and APGD found; 0 where the class is wrong as it is.

    Args:
        model: the classifier.
        images: 4-dimensional, in [0, 1].
        labels: the right classes.
    """
    start, kept = time.process_time(), right(model, images, labels)
    distances = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    if bool(kept.any()):
        distances[kept] = smallest_found(model, images[kept], labels[kept], "L2", EFFORT)
    listed = [value if math.isfinite(value) else None for value in distances.tolist()]
    return {"distances": listed, "seconds": time.process_time() - start}
